"""Entry point of `python -m data_prep VERB`."""

import sys

from data_prep.cli import main

if __name__ == "__main__":  # spawned worker processes import this file too
    sys.exit(main())
