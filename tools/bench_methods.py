#!/usr/bin/env python
"""A step of every method on ViT-T in turns: time and memory of MAE, D-MAE, D2-MAE, TinyMIM, fast distillation.

python tools/bench_methods.py --size 224 --batch 32
"""

import sys

from tinymim.benchmarks.method_step import main

if __name__ == "__main__":
    sys.exit(main())
