"""Kills conversions at random moments, and sees that the folder they fill is whole, as it was before, or not there.

    python benchmarks/conversion_kills.py [--count 20] [--seed 0]

Converts a random VAE as large as the released one (0.4 GB). Every other time the folder holds an earlier conversion, of
other numbers, that is being replaced. After every kill the folder is compared number by number with what may be there,
and the same command, run again, must finish. Prints a line per kill; status 1 if one of them did harm. Linux only.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from synthetic_checkpoints import write_files

from convert.orbax_writer import open_array
from convert.recognise import IMAGE_TOKENIZER, parameter_shapes
from toprovar_jax.presets import PRESETS

ROOT = Path(__file__).parents[1]
FILE = "infinity_vae_d32reg.pth"
SHAPES = parameter_shapes(IMAGE_TOKENIZER, PRESETS["infinity-2b"].image_tokenizer)


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "convert", str(source), "--out", str(out), "--force", "--quiet"]


def begun(process: subprocess.Popen[bytes], out: Path) -> None:
    """Returns when the process, which takes a while to start, has locked its target."""
    lock = out.with_name(f".{out.name}.lock")
    while not lock.exists() and process.poll() is None:
        time.sleep(0.002)


def holds(folder: Path, whole: Path) -> bool:
    """Whether ``folder`` is a converted VAE with the numbers of ``whole``."""
    if not (folder / "model.json").is_file():
        return False
    pairs = ((open_array(place / "image_tokenizer", name) for place in (folder, whole)) for name in SHAPES)
    return all(np.array_equal(*(array.read().result() for array in pair)) for pair in pairs)


def main() -> int:
    """Kills and checks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill conversions at random moments.")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, harm, unfinished = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (source,) = write_files(folder, "full", [FILE])
        other = folder / "other.pth"
        content = bytearray(source.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4] = bytes(4)  # one number of one tensor
        other.write_bytes(content)
        del content
        for file in (other, source):
            with subprocess.Popen(command(file, folder / file.stem), cwd=ROOT) as process:
                begun(process, folder / file.stem)
                start = time.perf_counter()
                process.wait()
                seconds = time.perf_counter() - start
        old, new, out = folder / other.stem, folder / source.stem, folder / "out"
        for number in range(options.count):
            replaced = bool(number % 2)
            shutil.rmtree(out, ignore_errors=True)
            if replaced:
                shutil.copytree(old, out)
            wait = draw.uniform(0.0, 1.1 * seconds)
            with subprocess.Popen(command(source, out), cwd=ROOT) as process:
                begun(process, out)
                time.sleep(wait)
                process.kill()
            unfinished += process.returncode == -signal.SIGKILL
            if not out.exists():
                # Between two renamings an earlier conversion is set aside, to be put back by the next run.
                aside = holds(folder / ".out.replaced", old)
                state = "set aside" if aside else "absent"
                good = aside or not replaced
            else:
                state = "new" if holds(out, new) else "as before" if replaced and holds(out, old) else "torn"
                good = state != "torn"
            again = subprocess.run(command(source, out), cwd=ROOT, check=False).returncode
            good = good and again == 0 and holds(out, new)
            left = sorted(path.name for path in folder.glob(".out*"))
            harm += not good or bool(left)
            how = "killed" if process.returncode == -signal.SIGKILL else "had finished"
            print(f"{number:3d} {how} after {wait:.2f} s: {state}; again: status {again} {left or ''}", flush=True)
    print(f"{options.count} conversions of {seconds:.1f} s, {unfinished} killed in the midst, {harm} with harm")
    return int(harm > 0)


if __name__ == "__main__":
    sys.exit(main())
