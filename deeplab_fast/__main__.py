"""``python -m deeplab_fast`` is ``deeplab-fast``."""

import sys

from deeplab_fast.cli import main

sys.exit(main())
