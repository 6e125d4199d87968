"""Makes pictures from text:  python examples/generate.py --prompt "a red sphere"

With no --model the small embedded model is used: one simple object, 8 colours. See --help for everything else.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from toprovar_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
