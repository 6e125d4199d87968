"""Shows how a picture is made and what is spared:  python examples/explain.py --prompt "a red sphere" --out DIR

Needs matplotlib (pip install 'toprovar-jax[demo]'). With no --model the small embedded model is used. See --help.
"""

import os
import sys


def start() -> int:
    """Runs the command, which answers a Ctrl-C itself once its own imports are done."""
    try:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from toprovar_jax.cli.explain import main

        return main()
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
