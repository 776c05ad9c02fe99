"""``python -m mas_ext`` is ``mas-ext``."""

import sys

from mas_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
