#!/usr/bin/env python
"""The paper's headline rows: exact command lines, and the cost of each by its dry run; writes docs/headline.md.

python tools/headline.py --data imagenet/train --seg-data ADE20K
"""

import sys

from tinymim.benchmarks.headline import main

if __name__ == "__main__":
    sys.exit(main())
