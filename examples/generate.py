"""Makes pictures from text:  python examples/generate.py --prompt "a red sphere"

With no --model the small embedded model is used: simple objects, 8 colours. See --help for everything else.
"""

import os
import sys


def start() -> int:
    """Runs the command, which answers a Ctrl-C itself once its own imports are done."""
    try:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from toprovar_jax.cli.generate import main

        return main()
    except KeyboardInterrupt:
        print("error: interrupted; no picture was saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
