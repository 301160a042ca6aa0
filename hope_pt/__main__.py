"""`python -m hope_pt` is the `hope` command."""

import sys

from hope_pt.cli import main

if __name__ == "__main__":
    sys.exit(main())
