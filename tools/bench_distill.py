#!/usr/bin/env python
"""A distillation step, ours and the published one in turns: images/s, memory, waiting for data, utilisation.

python tools/bench_distill.py --pair "T<-B" --size 224 --loss
python tools/bench_distill.py --all
"""

import sys

from tinymim.benchmarks.distill_step import main

if __name__ == "__main__":
    sys.exit(main())
