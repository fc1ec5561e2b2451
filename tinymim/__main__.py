"""``python -m tinymim``: the same as the ``tinymim`` command."""

import sys

from tinymim.cli import main

sys.exit(main())
