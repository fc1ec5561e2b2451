#!/usr/bin/env python
"""What was transferred from a teacher to its students: one page of similarity, attention, health and k-NN.

python tools/what_was_transferred.py --teacher timm/vit_base_patch16_224.mae --students random=tinymim_vit_tiny
    relation=runs/t/student.pth --photos PHOTOS --labelled-classes imagenette/val --out runs/transferred
"""

import sys

from tinymim.benchmarks.transferred import main

if __name__ == "__main__":
    sys.exit(main())
