"""``python -m convert SOURCE... --out DIR``."""

import sys

from convert.command import main

sys.exit(main())
