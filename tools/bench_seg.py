#!/usr/bin/env python
"""A segmentor's training step and prediction, as MMSegmentation makes them and as ours are made; one table.

python tools/bench_seg.py --config upernet_tinymim_t_light --parts train predict memory --profile
"""

import sys

from tinymim.benchmarks.seg_step import main

if __name__ == "__main__":
    sys.exit(main())
