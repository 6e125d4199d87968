"""Makes pictures for a file of prompts:  python examples/batch_pod.py --prompts prompts.jsonl --out outputs/run

Start it as often as you like, on as many hosts as you like, with the same --prompts and --out: each worker claims
chunks of rows, and what is killed is taken over. ``toprovar batch`` is the same. See --help for everything else.
"""

import os
import sys


def start() -> int:
    """Runs the command, which answers a Ctrl-C itself once its own imports are done."""
    try:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from toprovar_jax.cli.batch import main

        return main()
    except KeyboardInterrupt:
        print("error: interrupted; no picture was saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
