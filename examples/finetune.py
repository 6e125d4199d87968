"""Finetunes a model on pictures with captions:  python examples/finetune.py --model infinity-2b --data DIR --out DIR2

DIR holds NAME.png beside NAME.txt, or a metadata.jsonl, or .tar shards. With no --model the small embedded model is
used. See --help.
"""

import os
import sys


def start() -> int:
    """Runs the command, which answers a Ctrl-C itself once its own imports are done."""
    try:
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from toprovar_jax.cli.finetune import main

        return main()
    except KeyboardInterrupt:
        print("error: interrupted; nothing was trained", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
