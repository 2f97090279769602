"""``python -m fisherkern.bench``."""

import sys

from fisherkern.bench.cli import main

sys.exit(main())
