#!/usr/bin/env python
"""Speed and quality of deployment: one segmentor in every precision and runtime, compared with plain exports.

python tools/study_deployment.py --checkpoint runs/seg/segmentor.pth --data-root FOLDER --out runs/deployment
"""

import sys

from tinymim.benchmarks.deployment import main

if __name__ == "__main__":
    sys.exit(main())
