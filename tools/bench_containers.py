#!/usr/bin/env python
"""Containers for target stores: safetensors, Arrow IPC, Parquet, LMDB and TinyViT's files (pyarrow and lmdb if there).

python tools/bench_containers.py
"""

import sys

from tinymim.benchmarks.containers import main

if __name__ == "__main__":
    sys.exit(main())
