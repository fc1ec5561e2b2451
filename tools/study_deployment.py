#!/usr/bin/env python
"""What deployment costs and gives: one segmentor as every file and runtime we have, and what others would export.

python tools/study_deployment.py --checkpoint runs/seg/segmentor.pth --data-root FOLDER --out runs/deployment
"""

import sys

from tinymim.benchmarks.deployment import main

if __name__ == "__main__":
    sys.exit(main())
