"""Convert tables or .npy files into a store: the same as `ep3stream convert`."""

import sys

from ep3stream.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
