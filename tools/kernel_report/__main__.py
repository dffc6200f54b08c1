"""The command line of the report."""

import sys

from tools.kernel_report.compiled import main

sys.exit(main())
