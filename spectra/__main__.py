"""`python -m spectra`: the same as the command `spectra`."""

import sys

from spectra.cli import main

if __name__ == "__main__":
    sys.exit(main())
