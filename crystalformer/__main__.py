"""python -m crystalformer"""

import sys

from .app.cli import main

sys.exit(main())
