#!/usr/bin/env python
"""Latency of TinyViT's and our backbones, exported, on every runtime.

python tools/bench_backbones.py --markdown docs/backbones_amd_epyc.md --json docs/backbones_amd_epyc.json
"""

import sys

from tinymim.benchmarks.backbones import main

if __name__ == "__main__":
    sys.exit(main())
