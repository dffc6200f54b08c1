"""The command line of the report."""

import sys

from tools.kernel_report.report import main

sys.exit(main())
