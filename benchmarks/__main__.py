"""`python -m benchmarks`: the harness with torch and numpy alone, where the command line's packages are missing."""

import sys

from .harness.command import main

sys.exit(main())
