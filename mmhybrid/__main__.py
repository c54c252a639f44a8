"""``python -m mmhybrid``."""

import sys

from .cli import main

sys.exit(main())
