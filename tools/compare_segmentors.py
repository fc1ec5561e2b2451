#!/usr/bin/env python
"""Our segmentor and common alternatives: same data, same steps, one table of size, speed and mIoU.

    python tools/compare_segmentors.py --data-root ../shared/data/camvid --student student.pth --steps 2000

Trainings can run in parallel; measure last, with nothing else running:

    OMP_NUM_THREADS=1 ... --models pidnet_s_camvid --stages train export score &
    OMP_NUM_THREADS=1 ... --models segformer_b0_camvid --stages train export score; wait; ... --stages measure
"""

import sys

from tinymim.benchmarks.segmentors import main

if __name__ == "__main__":
    sys.exit(main())
