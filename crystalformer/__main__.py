"""python -m crystalformer"""

import sys

from .app.cli import program

sys.exit(program())
