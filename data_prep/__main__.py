"""`python -m data_prep VERB`."""

import sys

from data_prep.cli import main

if __name__ == "__main__":  # spawned workers import this file again
    sys.exit(main())
