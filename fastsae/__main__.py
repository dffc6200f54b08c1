"""`python -m fastsae` is the command `fastsae`."""

import sys

from fastsae.cli import main

sys.exit(main())
