"""``python -m mergekit_torch.cli`` is ``mkrs``."""

import sys

from .main import main

sys.exit(main())
