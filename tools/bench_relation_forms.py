#!/usr/bin/env python
"""What each compact form of TinyMIM's targets costs in bytes and loses in loss and gradient.

python tools/bench_relation_forms.py --data PHOTOS --teacher-weights dinov2_small.safetensors --student student.pth
"""

import sys

from tinymim.benchmarks.relation_forms import main

if __name__ == "__main__":
    sys.exit(main())
