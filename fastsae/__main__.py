"""`python -m fastsae` is the command `fastsae`."""

import sys

from fastsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
