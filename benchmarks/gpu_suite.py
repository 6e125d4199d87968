"""Everything that needs a GPU or TPU, in one command: ``make gpu-suite``.

    python benchmarks/gpu_suite.py [--budget-s 540] [--steps conformance tune ...] [--out FOLDER]

Steps: ``conformance`` of every implementation against float64, ``tune`` of the configurations that pass it, ``bench``
of every case group with and without entropy, ``spectrum`` timing. Each runs in a process of its own that is killed at
its time limit, because a wrong kernel may hang; what it had written until then counts, and the suite goes on. After
every step the results are in ``benchmarks/results/kernels_<device>.json`` and in the package's table
``pallas_kernels/attention/tuned/<device>.json``. A run adds to the results of an earlier one, so that the steps can
be spread over several runs. At the end the targets are printed as hit or missed.

A machine without network needs jax, triton and (for the Triton kernel) jax-triton. That last one is pure Python: a
folder with it, made by ``pip install --no-deps --target FOLDER jax-triton==0.3.1``, put on PYTHONPATH is enough.

Exit codes: 0 all steps ended, 1 one was killed or failed, 2 wrong options or no device to run on, 130 interrupted.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from gpu_processes import end_by, stop_on_signals
from gpu_verdicts import earlier, judged, measured_table, targets

from pallas_kernels.attention import tuning
from pallas_kernels.report import Parser, folder_path, write_report

ROOT = pathlib.Path(__file__).parent.parent
GROUPS = ("infinity", "pruned", "tails", "fa3")
KERNELS = {"cuda": ("mosaic_gpu", "triton", "cudnn"), "tpu": ("mosaic_tpu",), "cpu": ()}
TUNED = ("triton", "mosaic_gpu", "mosaic_tpu")
PARTS = {
    "edges": ["--heads", "2"],
    "tails": ["--heads", "2", "--dtypes", "bfloat16"],
    "infinity": ["--heads", "1", "--dtypes", "bfloat16"],
    "pruned": ["--heads", "1", "--dtypes", "bfloat16"],
}
"""Groups of cases that prove an implementation. Each has a process of its own: one that is killed loses no other."""
SMOKE_PARTS = {"edges": ["--heads", "1", "--dtypes", "float32"]}
STEPS = ("conformance", "tune", *(f"bench:{group}" for group in GROUPS), "spectrum")
LIMITS = {"conformance": 150.0, "tune": 150.0, "bench:infinity": 110.0, "spectrum": 40.0}
"""Seconds after which a step is killed; 80 for those that are not listed. All end with the budget, too."""


class Suite:
    """The state of one run: results so far, where they go, and how much time is left.

    Raises:
      ValueError: earlier results that cannot be read.
    """

    def __init__(self, options: argparse.Namespace, environment: dict):
        self.options = options
        self.deadline = time.monotonic() + options.budget_s
        self.device = environment["device"]
        self.platform = "cuda" if environment["platform"] == "gpu" else str(environment["platform"])
        self.path = options.out / f"kernels_{tuning.slug(self.device)}.json"
        self.results = {**earlier(self.path), **environment}
        self.measured = {name: environment[name] for name in ("date", "versions")}
        self.ended: dict[str, str] = {}
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_suite_"))

    @property
    def implementations(self) -> tuple[str, ...]:
        return (*KERNELS.get(self.platform, ()), "xla")

    def proven(self) -> list[str]:
        """Implementations whose conformance ended without a failure."""
        return [name for name, found in self.results["conformance"].items() if found["passed"]]

    def save(self) -> None:
        self.results["targets"] = [dataclasses.asdict(target) for target in targets(self.results)]
        write_report(self.path, self.results)
        table = measured_table(self.results)
        if table is not None and not self.options.smoke:
            tuning.write(table, self.options.tuned)

    def record(self, step: str, how: str, seconds: float = 0.0) -> None:
        self.ended[step] = how
        self.results["steps"][step] = {"ended": how, "seconds": seconds, "measured": self.measured}

    def run_all(
        self, step: str, commands: dict[str, list[str]], limit: float, watched: pathlib.Path | None = None
    ) -> dict[str, str]:
        """Run the commands side by side until ``limit``; returns how each ended and records it."""
        limit = max(0.0, min(limit, self.deadline - time.monotonic()))
        started = time.monotonic()
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if self.options.platform == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        logs = {name: self.folder / f"{step}_{name}.log".replace(":", "_") for name in commands}
        ended = end_by(commands, logs, environment, limit, watched)
        for name, how in ended.items():
            print(f"[{time.monotonic() - started:5.0f} s] {step} {name}: {how}", flush=True)
            text = logs[name].read_text(errors="replace").splitlines()
            if how != "done":
                print("\n".join(f"    {line}" for line in text[-8:]), flush=True)
            self.record(f"{step} {name}".strip(), how, time.monotonic() - started)
        return ended


def load(path: pathlib.Path):
    """What a step wrote, or None if it wrote nothing or was killed while writing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def conformance(suite: Suite) -> None:
    parts = SMOKE_PARTS if suite.options.smoke else PARTS
    pairs = [(name, group) for group in parts for name in suite.implementations]
    files = {(name, group): suite.folder / f"conformance_{name}_{group}.json" for name, group in pairs}
    base = [sys.executable, "-m", "pallas_kernels.conformance", "--implementations"]
    commands = {
        f"{name} {group}": [*base, name, "--cases", group, *parts[group], "--json", str(files[name, group])]
        for name, group in pairs
    }
    # A GPU is shared; a TPU belongs to one process at a time.
    together = [commands] if suite.platform != "tpu" else [{name: command} for name, command in commands.items()]
    until = time.monotonic() + LIMITS["conformance"]
    ended: dict[str, str] = {}
    for some in together:
        ended |= suite.run_all("conformance", some, until - time.monotonic())
    found = suite.results["conformance"]
    for name in suite.implementations:
        ends = {group: ended[f"{name} {group}"] for group in parts}
        written = {group: load(files[name, group]) for group in parts}
        found[name] = judged(found.get(name, {}), ends, written, suite.measured)


def tune(suite: Suite) -> None:
    script = str(ROOT / "benchmarks/tune_kernels.py")
    until = time.monotonic() + LIMITS["tune"]
    for name in [name for name in TUNED if name in suite.proven()]:
        path = suite.folder / f"tune_{name}.json"
        commands = {name: [sys.executable, script, name, "--json", str(path)]}
        # A configuration that hung is left out when the command is run again; without one, it would hang again.
        while suite.run_all("tune", commands, until - time.monotonic(), path)[name].startswith("stood still"):
            if not (load(path) or {}).get("trying"):
                break
        written = load(path)
        if written and (written["timed"] or name not in suite.results["tuning"]):
            suite.results["tuning"][name] = {**written, "measured": suite.measured}


def bench(suite: Suite, group: str) -> None:
    path = suite.folder / f"bench_{group}.json"
    names = [name for name in suite.implementations if name in (*suite.proven(), "cudnn")]
    if group != "infinity":
        names = [name for name in names if name != "xla"] or names
    sizes = ["--heads", "1", "--max-queries", "4", "--max-keys", "16", "--rounds", "1"] if suite.options.smoke else []
    command = [sys.executable, "-m", "pallas_kernels.bench", "--cases", group, *sizes, "--json", str(path)]
    if not names:
        suite.record(f"bench:{group}", "nothing proven")
        return
    suite.run_all(f"bench:{group}", {"": [*command, "--implementations", *names]}, LIMITS.get(f"bench:{group}", 80.0))
    written = load(path)
    if written:
        suite.results["bench"][group] = {**written, "measured": suite.measured}


def spectrum(suite: Suite) -> None:
    path = suite.folder / "spectrum.json"
    command = [sys.executable, "-m", "pallas_kernels.bench", "--cases", "--spectrum", "--rounds", "20"]
    suite.run_all("spectrum", {"": [*command, "--json", str(path)]}, LIMITS["spectrum"])
    written = (load(path) or {}).get("spectrum")
    if written:
        suite.results["spectrum"] = {**written, "measured": suite.measured}


def probe(platform: str | None) -> dict | None:
    """Device, versions and date, asked in another process so that this one holds no device memory."""
    command = [sys.executable, "-c", "import json, pallas_kernels.profiling as p; print(json.dumps(p.environment()))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def budget(text: str) -> float:
    """Type of ``--budget-s``."""
    seconds = float(text)
    if not seconds > 0.0:  # Neither is nan.
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number of seconds")
    return seconds


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=budget, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=folder_path, default=ROOT / "benchmarks/results", help="folder of the results")
    parser.add_argument("--tuned", type=folder_path, default=tuning.DIRECTORY, help="folder of the package's tables")
    parser.add_argument("--platform", choices=("cpu",), help="run on the CPU, with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no table written: whether the suite works")
    options = parser.parse_args(arguments)
    if (options.platform == "cpu") != options.smoke:
        parser.error("--platform cpu and --smoke: must be given together; the CPU is only for a smoke run")
    environment = probe(options.platform)
    if environment is None or (environment["platform"] == "cpu" and options.platform != "cpu"):
        print("no GPU or TPU found; run this where there is one, or with --platform cpu --smoke", file=sys.stderr)
        return 2
    try:
        suite = Suite(options, environment)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return run_steps(suite)
    except KeyboardInterrupt:
        print(f"interrupted; the steps that had ended are in {suite.path}", file=sys.stderr)
        return 130


def run_steps(suite: Suite) -> int:
    """Run what the options ask for, save after every step, and print the promises; returns the exit code."""
    options = suite.options
    print(f"on {suite.device}, budget {options.budget_s:.0f} s, details in {suite.folder}", flush=True)
    steps = {"conformance": conformance, "tune": tune, "spectrum": spectrum}
    for step in [step for step in STEPS if step in options.steps]:
        if step in steps:
            steps[step](suite)
        else:
            bench(suite, step.partition(":")[2])
        suite.save()
    for target in targets(suite.results):
        value = "not measured" if target.value is None else f"{target.value:.3f}"
        print(
            f"{'-' if target.hit is None else 'hit' if target.hit else 'MISS':<5}{target.name}: {value} ({target.goal})"
        )
    print(f"results: {suite.path}")
    return int(any(how != "done" for how in suite.ended.values()))


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
