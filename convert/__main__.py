"""``python -m convert SOURCE... --out DIR``."""

import sys

from toprovar_jax.cli.convert import main

sys.exit(main())
