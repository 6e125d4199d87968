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

Exit codes: 0 all steps ended, 1 one was killed or failed, 2 there is no device to run on.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from gpu_verdicts import measured_table, targets

from pallas_kernels.attention import tuning

ROOT = pathlib.Path(__file__).parent.parent
GROUPS = ("infinity", "pruned", "tails", "fa3")
KERNELS = {"cuda": ("mosaic_gpu", "triton", "cudnn"), "tpu": ("mosaic_tpu",), "cpu": ()}
TUNED = ("triton", "mosaic_gpu", "mosaic_tpu")
STEPS = ("conformance", "tune", *(f"bench:{group}" for group in GROUPS), "spectrum")
LIMITS = {"conformance": 150.0, "tune": 150.0, "bench:infinity": 110.0, "spectrum": 40.0}
"""Seconds after which a step is killed; 80 for those that are not listed. All end with the budget, too."""
STILL = 60.0
"""Seconds without a new result after which tuning is taken to hang in the configuration it is trying."""


class Suite:
    """The state of one run: results so far, where they go, and how much time is left."""

    def __init__(self, options: argparse.Namespace, environment: dict):
        self.options = options
        self.deadline = time.monotonic() + options.budget_s
        self.device = environment["device"]
        self.platform = "cuda" if environment["platform"] == "gpu" else str(environment["platform"])
        self.path = options.out / f"kernels_{tuning.slug(self.device)}.json"
        empty = {"conformance": {}, "tuning": {}, "bench": {}, "spectrum": None, "steps": {}}
        self.results = {**empty, **(json.loads(self.path.read_text()) if self.path.is_file() else {}), **environment}
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_suite_"))

    @property
    def implementations(self) -> tuple[str, ...]:
        return (*KERNELS.get(self.platform, ()), "xla")

    def proven(self) -> list[str]:
        """Implementations whose conformance ended without a failure."""
        return [name for name, found in self.results["conformance"].items() if found["passed"]]

    def save(self) -> None:
        self.results["targets"] = [dataclasses.asdict(target) for target in targets(self.results)]
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        table = measured_table(self.results)
        if table is not None and not self.options.smoke:
            tuning.write(table, self.options.tuned)

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
            self.results["steps"][f"{step} {name}".strip()] = {"ended": how, "seconds": time.monotonic() - started}
        return ended


def end_by(
    commands: dict[str, list[str]],
    logs: dict[str, pathlib.Path],
    environment: dict[str, str],
    limit: float,
    watched: pathlib.Path | None = None,
) -> dict[str, str]:
    """Run commands side by side: ``done``, ``exit N``, ``timed out`` or ``stood still`` for each.

    Args:
      commands: by name.
      logs: where the output of each goes.
      environment: of the processes.
      limit: seconds; none lives longer.
      watched: a file whose last change may not be longer ago than :data:`STILL` seconds.
    """
    started = time.monotonic()
    if limit <= 0:
        for log in logs.values():
            log.write_text("")
        return dict.fromkeys(commands, "no time left")
    running = {}
    for name, command in commands.items():
        with logs[name].open("w") as log:
            # In a session of its own, so that what it started can be killed with it.
            running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
    ended: dict[str, str] = {}
    while len(ended) < len(commands):
        time.sleep(0.2)
        now = time.monotonic()
        changed = watched.stat().st_mtime if watched is not None and watched.is_file() else 0.0
        still = watched is not None and now - started > STILL and time.time() - changed > STILL
        for name, process in running.items():
            if name in ended:
                continue
            code = process.poll()
            if code is not None:
                ended[name] = "done" if code == 0 else f"exit {code}"
            elif still or now - started > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended[name] = f"stood still for {STILL:.0f} s" if still else f"timed out after {limit:.0f} s"
    return ended


def load(path: pathlib.Path):
    """What a step wrote, or None if it wrote nothing or was killed while writing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def conformance(suite: Suite) -> None:
    base = [sys.executable, "-m", "pallas_kernels.conformance", "--heads", "1" if suite.options.smoke else "2"]
    parts = {"edges": ["--dtypes", "float32"] if suite.options.smoke else []}
    if not suite.options.smoke:
        parts["tails"] = ["--dtypes", "bfloat16"]
    files = {
        (name, group): suite.folder / f"conformance_{name}_{group}.json"
        for name in suite.implementations
        for group in parts
    }
    commands = {
        f"{name} {group}": [*base, "--cases", group, *parts[group], "--implementations", name, "--json", str(path)]
        for (name, group), path in files.items()
    }
    ended = suite.run_all("conformance", commands, LIMITS["conformance"])
    for name in suite.implementations:
        ends = [ended[f"{name} {group}"] for group in parts]
        lines = [record for group in parts for record in load(files[name, group]) or []]
        ran = [record["passed"] for record in lines if record["passed"] is not None]
        passed = set(ends) == {"done"} and bool(ran) and all(ran)
        suite.results["conformance"][name] = {"ended": ends, "passed": passed, "records": lines}


def tune(suite: Suite) -> None:
    script = str(ROOT / "benchmarks/tune_kernels.py")
    until = time.monotonic() + LIMITS["tune"]
    for name in [name for name in TUNED if name in suite.proven()]:
        path = suite.folder / f"tune_{name}.json"
        command = [sys.executable, script, name, "--json", str(path)]
        # A configuration that hung is left out when the command is run again.
        while suite.run_all("tune", {name: command}, until - time.monotonic(), path)[name].startswith("stood still"):
            pass
        suite.results["tuning"][name] = load(path)


def bench(suite: Suite, group: str) -> None:
    path = suite.folder / f"bench_{group}.json"
    names = [name for name in suite.implementations if name in (*suite.proven(), "cudnn")]
    if group != "infinity":
        names = [name for name in names if name != "xla"] or names
    sizes = ["--heads", "1", "--max-queries", "4", "--max-keys", "16", "--rounds", "1"] if suite.options.smoke else []
    command = [sys.executable, "-m", "pallas_kernels.bench", "--cases", group, *sizes, "--json", str(path)]
    if not names:
        suite.results["steps"][f"bench:{group}"] = {"ended": "nothing proven", "seconds": 0.0}
        return
    suite.run_all(f"bench:{group}", {"": [*command, "--implementations", *names]}, LIMITS.get(f"bench:{group}", 80.0))
    suite.results["bench"][group] = load(path) or suite.results["bench"].get(group)


def spectrum(suite: Suite) -> None:
    path = suite.folder / "spectrum.json"
    command = [sys.executable, "-m", "pallas_kernels.bench", "--cases", "--spectrum", "--rounds", "20"]
    suite.run_all("spectrum", {"": [*command, "--json", str(path)]}, LIMITS["spectrum"])
    suite.results["spectrum"] = (load(path) or {}).get("spectrum")


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results", help="folder of the results")
    parser.add_argument("--tuned", type=pathlib.Path, default=tuning.DIRECTORY, help="folder of the package's tables")
    parser.add_argument("--platform", choices=("cpu",), help="run on the CPU, with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no table written: whether the suite works")
    options = parser.parse_args(arguments)
    if (options.platform == "cpu") != options.smoke:
        parser.error("--platform cpu and --smoke: must be given together; the CPU is only for a smoke run")
    environment = probe(options.platform)
    if environment is None or (environment["platform"] == "cpu" and options.platform != "cpu"):
        print("no GPU or TPU found; run this where there is one, or with --platform cpu --smoke", file=sys.stderr)
        return 2
    suite = Suite(options, environment)
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
    mine = [value["ended"] for name, value in suite.results["steps"].items() if name.split()[0] in options.steps]
    return int(any(ended != "done" for ended in mine))


if __name__ == "__main__":
    sys.exit(main())
