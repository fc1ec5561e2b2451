#!/usr/bin/env python
"""Every check of the project that needs a GPU, in at most 8 minutes on a bare machine; one JSON and one Markdown file.

python tools/gpu_check.py --prepare .gpu     # here: collects what the other machine lacks, prints its command
python tools/gpu_check.py --wheels .gpu      # there
python tools/gpu_check.py --device cpu --quick
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has the checkout only

from tinymim.benchmarks.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
