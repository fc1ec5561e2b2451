#!/usr/bin/env python
"""The cost model of several GPUs against what can be measured without one; writes docs/scaling.md.

python tools/scaling.py --processes 2
"""

import sys

from tinymim.benchmarks.scaling import main

if __name__ == "__main__":
    sys.exit(main())
