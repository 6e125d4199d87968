"""The page about pods: what it tells to type is typed, and what it names is there."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
import yaml

from toprovar_jax.cli.main import main
from toprovar_jax.distributed.batch.health import Status

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pods.md").read_text()
JOBSET = ROOT / "examples" / "jobset.yaml"
SLURM = ROOT / "examples" / "slurm.sh"
CLOUD = ("gcloud", "kubectl", "docker")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def section(title: str) -> str:
    """The text below a heading, down to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", fenced_headings_hidden(PAGE), re.DOTALL | re.M)
    return text.replace("\0", "#")


def fenced_headings_hidden(page: str) -> str:
    """Comments in fenced blocks look like headings."""
    return re.sub(r"```.*?```", lambda block: block[0].replace("#", "\0"), page, flags=re.DOTALL)


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of fenced blocks."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def pieces(title: str) -> str:
    return "".join(content for _, content in fences(section(title)))


def commands(shell: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each command line before and from the command's own name on; the latter are none in other lines."""
    for line in shell.replace("\\\n", " ").replace("#SBATCH", "sbatch").splitlines():
        with contextlib.suppress(ValueError):  # half of a quotation: no line of options
            words = shlex.split(line, comments=True)
            ours = [place for place, word in enumerate(words[:-1]) if word.rpartition("/")[2] == "toprovar"]
            ours = ours if words and words[0] not in CLOUD else []
            yield (words[: ours[0]], words[ours[0] + 1 :]) if ours else (words, [])


@pytest.fixture
def shell(tmp_path):
    """Runs a script in an empty folder where toprovar and python are commands; its environment, for changing."""
    tools = tmp_path / "tools"
    tools.mkdir()
    words = {"toprovar": "-c 'from toprovar_jax.cli.main import main; raise SystemExit(main())'", "python": ""}
    for name, arguments in words.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(flags),  # one device per process, as on a user's machine
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("TOPROVAR_TEST_CACHE", str(ROOT / ".cache" / "xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=300,
        )

    run.folder = tmp_path
    return run


def test_the_section_about_one_machine_can_be_typed_from_its_first_line_to_its_last(shell):
    blocks = fences(section("Try it on one machine"))
    typed = {"bash": "{}", "python": "python - << 'PYTHON'\n{}PYTHON\n", "sh": ""}
    # On a fast machine a worker may have ended before it is killed: that command alone may fail.
    done = shell("bash", "-c", "".join(typed[language].format(content) for language, content in blocks))
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(shell.folder / "outputs" / "first" / "manifest.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(80))
    rows = pq.read_table(shell.folder / "outputs" / "second" / "manifest.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["plain", *["many"] * 24, "empty", "own", "4"]
    for said in (
        "80 pictures",
        "Counter({'made': 80})",
        "wrong: []",
        "exit status 2",
        "a blue cube and a yellow cone",
    ):
        assert said in done.stdout
    for said in ("nothing to do: all 80 prompts are done", "settings.seed is 0 there, 7 here"):
        assert said in done.stderr
    assert re.search(r"^78 \['00000000-000.json'", done.stdout, re.M)
    assert re.search(r"^empty - .*\n4 - .*$", done.stdout, re.M)


def test_the_page_shows_and_explains_all_of_both_launchers():
    assert pieces("examples/jobset.yaml, line by line") == JOBSET.read_text()
    assert pieces("examples/slurm.sh, line by line") == SLURM.read_text()


def test_every_option_that_is_named_is_one(capsys):
    options: dict[str, set[str]] = {}
    foreign = {"--help"}
    for _, block in fences(PAGE):
        for others, ours in commands(block):
            foreign |= set(FLAG.findall(" ".join(others)))
            if ours:
                name = ours[0]
                options.setdefault(name, options_of(name, capsys))
                assert set(FLAG.findall(" ".join(ours))) <= options[name]
    assert {"batch", "convert", "plan-pod"} <= options.keys()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    named = set(FLAG.findall(" ".join(span for span in spans if not span.startswith(CLOUD))))
    assert "--lease-seconds" in named
    assert named <= options["batch"] | foreign


def options_of(name: str, capsys) -> set[str]:
    assert main([name, "--help"]) == 0
    return set(FLAG.findall(capsys.readouterr().out))


def test_the_jobset_gives_the_command_options_that_it_has(capsys):
    jobset = yaml.safe_load(JOBSET.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (worker,) = job["template"]["spec"]["containers"]
    assert worker["command"] == ["toprovar", "batch"]
    assert {argument.partition("=")[0] for argument in worker["args"]} <= options_of("batch", capsys)
    rows, columns = map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["parallelism"] * worker["resources"]["limits"]["google.com/tpu"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == worker["name"]
    (mount,) = worker["volumeMounts"]
    assert mount["name"] in [volume["name"] for volume in job["template"]["spec"]["volumes"]]


@pytest.fixture
def cluster(shell):
    """A stand-in for Slurm: two tasks at once on this machine; what is queued again is noted."""
    tools = shell.folder / "tools"
    (tools / "srun").write_text(
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'for task in 0 1; do SLURM_PROCID=$task "$@" & tasks+=($!); done\n'
        'worst=0; for task in "${tasks[@]}"; do wait "$task"; now=$?; ((now > worst)) && worst=$now; done\n'
        'exit "$worst"\n'
    )
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> queued\n')
    for name in ("srun", "scontrol"):
        (tools / name).chmod(0o755)
    command = shell.folder / ".venv" / "bin" / "toprovar"
    command.parent.mkdir(parents=True)
    command.symlink_to(tools / "toprovar")

    def submit(*arguments: str, **more: str) -> tuple[subprocess.CompletedProcess[str], bool]:
        queued = shell.folder / "queued"
        queued.unlink(missing_ok=True)
        done = shell("bash", str(SLURM), *arguments, SLURM_JOB_ID="17", BACKEND="cpu", **more)
        again = queued.exists()
        assert not again or queued.read_text() == "requeue 17\n"
        return done, again

    submit.command = command
    return submit


def test_the_slurm_script_makes_all_pictures_with_two_tasks(cluster, tmp_path):
    (tmp_path / "p.txt").write_text("a red sphere\na blue cube\n" * 3)
    done, again = cluster("--prompts", "p.txt", "--out", "run", "--chunk", "2")
    assert (done.returncode, again) == (0, False), done.stderr
    assert pq.read_table(tmp_path / "run" / "manifest.parquet").num_rows == 6
    workers = [path.read_text() for path in (tmp_path / "run" / ".work" / "workers").iterdir()]
    assert sorted(re.findall(r'"index": (\d)', " ".join(workers))) == ["0", "1"]


def test_the_slurm_script_queues_again_what_was_stopped_and_not_what_cannot_work(cluster):
    done, again = cluster("--out", "run")
    assert (done.returncode, again) == (2, False)
    cluster.command.unlink()
    cluster.command.write_text("#!/bin/sh\nexit $((143 * SLURM_PROCID))\n")
    cluster.command.chmod(0o755)
    done, again = cluster()
    assert (done.returncode, again) == (143, True)
    done, again = cluster(SLURM_RESTART_COUNT="100")
    assert (done.returncode, again) == (143, False)


def test_every_metric_that_is_named_is_written():
    status = Status(1, 0, 1, 0, 0, 0, 0.0, 1, 1.0, 0.0, (), ())
    written = set(re.findall(r"^(toprovar_batch_\w+) ", status.as_prometheus().decode(), re.M))
    assert set(re.findall(r"toprovar_batch_\w+", PAGE)) == written


def test_messages_that_are_explained_are_those_of_the_command():
    sources = [*ROOT.glob("toprovar_jax/distributed/**/*.py"), *ROOT.glob("toprovar_jax/cli/*.py")]
    source = "\n".join(path.read_text() for path in sources)
    rows = re.findall(r"^\| (.*?) \| .*? \| .*? \|$", section("When something goes wrong"), re.M)
    quoted = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    fragments = [part.strip() for span in quoted if not span.startswith("--") for part in span.split("…")]
    missing = [part for part in fragments if part and part not in source]
    assert missing == ["Pending"]  # what kubectl says
