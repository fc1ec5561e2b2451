"""``python -m tinymim``: the same as the ``tinymim`` command."""

import sys

from tinymim.cli import main

if __name__ == "__main__":
    sys.exit(main())
