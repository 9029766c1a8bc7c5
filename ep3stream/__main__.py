"""`python -m ep3stream`: the command line."""

import sys

from ep3stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
