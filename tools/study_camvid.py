#!/usr/bin/env python
"""Distilled or from scratch on real photos: teacher, student and segmentor for several seeds, one table.

    python tools/study_camvid.py --photos ../shared/data/imagenette224/train --labels ../shared/data/camvid

Seeds can run in parallel: OMP_NUM_THREADS=1 ... --seeds 0 & ... --seeds 1.
"""

import sys

from tinymim.benchmarks.camvid import main

if __name__ == "__main__":
    sys.exit(main())
