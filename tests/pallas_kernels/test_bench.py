"""The benchmark's report and arithmetic; no test looks at how long anything took."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, profiling, report
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.profiling import Span, Timing

SMALL = Case("small", 1, 5, 9, 1, 8, 0.5, "cosine")
TINY = ["--heads", "1", "--max-queries", "4", "--max-keys", "16", "--rounds", "2"]


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setitem(CASES, "tails", (SMALL,))


@pytest.mark.usefixtures("one_case")
def test_a_run_writes_its_machine_its_timer_and_a_line_for_everything(tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    asked = ["reference", "xla", "cudnn"]
    arguments = ["--implementations", *asked, "--cases", "tails", *TINY, "--spectrum", "--json", str(path)]
    assert bench.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report["timers"] == ["wall"]
    assert "host's clock" in capsys.readouterr().out
    assert report["device"] == "cpu"
    assert report["versions"]["jax"] is not None
    assert report["date"].endswith("+00:00")
    lines = {(line["implementation"], line["with_entropy"]): line for line in report["records"]}
    assert set(lines) == {(name, entropy) for name in asked for entropy in (False, True)}
    for name in ("reference", "xla"):
        for entropy in (False, True):
            line = lines[name, entropy]
            low, high = line["quartiles"]
            assert 0 < low <= line["milliseconds"] <= high
            assert (line["entropy_cost"] is None) != entropy
            assert line["ratio_to_cudnn"] is None
            assert line["peak_share"] is None
    assert "platform cpu" in lines["cudnn", True]["reason"]
    assert report["spectrum"]["milliseconds"] > 0
    assert report["spectrum"]["relative_error"] < 1e-5


@pytest.mark.usefixtures("one_case")
def test_what_breaks_is_told_in_its_line_and_in_the_exit_code(monkeypatch, tmp_path):
    real = bench.attention

    def breaks(*arrays, implementation, **options):
        if implementation == "xla":
            raise RuntimeError("out of memory\nand a long story")
        return real(*arrays, implementation=implementation, **options)

    monkeypatch.setattr(bench, "attention", breaks)
    path = tmp_path / "report.json"
    arguments = ["--implementations", "reference", "xla", "--cases", "tails", "--entropy", "without", *TINY]
    assert bench.main([*arguments, "--json", str(path)]) == 1
    good, bad = json.loads(path.read_text())["records"]
    assert good["milliseconds"] is not None
    assert bad["milliseconds"] is None
    assert bad["failure"] == "RuntimeError: out of memory"


@pytest.mark.usefixtures("one_case")
def test_rates_and_ratios_are_those_of_the_times(monkeypatch):
    real = bench.attention
    played = {"xla False": 2.0, "xla True": 2.5, "cudnn False": 1.6, "cudnn True": 4.0}
    monkeypatch.setattr(bench, "why_not", lambda *given: None)
    monkeypatch.setattr(bench, "attention", lambda *x, implementation, **options: real(*x, **options))
    monkeypatch.setattr(bench, "peak_tflops", lambda kind, dtype: 1e-6)
    monkeypatch.setattr(bench, "measure", lambda runs, rounds: Timing("wall", {name: [played[name]] for name in runs}))
    made = bench.bench_case(SMALL, "tails", ["xla", "cudnn"], "float32", entropies=(False, True), rounds=1)
    lines = {f"{line.implementation} {line.with_entropy}": line for line in made}
    work = 2 * (2 * 5 * 9 * 8)
    for name, line in lines.items():
        assert line.milliseconds == played[name]
        assert line.tflops == pytest.approx(work / (played[name] * 1e-3) / 1e12)
        assert line.peak_share == pytest.approx(line.tflops / 1e-6)
        assert line.ratio_to_cudnn == pytest.approx(played[name] / 1.6)
    assert lines["xla True"].entropy_cost == pytest.approx(0.25)
    assert lines["cudnn True"].entropy_cost == pytest.approx(1.5)
    assert lines["xla False"].entropy_cost is None


@pytest.mark.usefixtures("one_case")
def test_a_run_in_which_nothing_can_run_fails(capsys):
    assert bench.main(["--implementations", "cudnn", "--cases", "tails", *TINY]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "nothing ran"
    assert bench.main(["--implementations", "xla", "--cases", "tails", "--entropy", "with", *TINY]) == 0
    assert "nothing ran" not in capsys.readouterr().out


@pytest.mark.usefixtures("one_case")
def test_an_interrupt_ends_with_status_130_and_one_line(monkeypatch, capsys):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "bench_case", interrupted)
    assert bench.main(["--cases", "tails"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("one_case")
def test_an_interrupt_does_not_wait_for_compilations_that_have_not_begun(monkeypatch):
    pools = []

    class Pool(bench.concurrent.futures.ThreadPoolExecutor):
        def __init__(self):
            super().__init__(max_workers=1)
            pools.append(self)

        def shutdown(self, wait=True, *, cancel_futures=False):
            self.told = (wait, cancel_futures)
            super().shutdown(wait=True, cancel_futures=True)

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.concurrent.futures, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(bench.concurrent.futures, "wait", interrupted)
    assert bench.main(["--implementations", "xla", "--cases", "tails", *TINY]) == 130
    assert [pool.told for pool in pools] == [(False, True)]


@pytest.mark.parametrize("place", ["folder", "under a file"])
def test_a_report_with_nowhere_to_go_is_refused_before_any_work(monkeypatch, tmp_path, capsys, place):
    monkeypatch.setattr(bench, "environment", lambda: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    path = tmp_path if place == "folder" else tmp_path / "file" / "deep" / "report.json"
    with pytest.raises(SystemExit) as ended:
        bench.main(["--json", str(path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


def test_an_interrupted_process_ends_without_taking_the_interpreter_down(monkeypatch):
    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(report.os, "_exit", end)
    with pytest.raises(Ended, match="130"):
        report.leave(130)
    with pytest.raises(SystemExit) as ended:
        report.leave(1)
    assert ended.value.code == 1


def test_a_report_replaces_the_earlier_one_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.json"
    report.write_report(path, {"a": 1})
    monkeypatch.setattr(pathlib.Path, "replace", lambda *given: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        report.write_report(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_functions_are_announced_before_each_of_their_calls():
    told = []
    timing = profiling.measure(
        {"a": lambda: told.append("ran a"), "b": lambda: told.append("ran b")}, 2, lambda name: told.append(name)
    )
    assert told == ["a", "ran a"] * 2 + ["b", "ran b"] * 2 + ["a", "ran a", "b", "ran b"] * 2
    assert {name: len(times) for name, times in timing.milliseconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--rounds", "0"], "--rounds 0"), (["--cases", "huge"], "huge"), (["--implementations", "cuda"], "cuda")],
    ids=["rounds", "cases", "implementations"],
)
def test_wrong_options_end_with_status_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_work_counts_visible_keys_only():
    ragged = Case("ragged", 2, 10, 20, 3, 8, 1.0, key_length=(20, 5))
    assert ragged.flops == 4 * 3 * 10 * 8 * 25
    windows = next(case for case in CASES["tails"] if case.block_mask is not None)
    whole = 4 * windows.batch * windows.heads * windows.num_queries * windows.num_keys * windows.head_dim
    assert windows.flops == pytest.approx(whole * windows.block_mask.density)


def test_drawn_arrays_have_the_scores_of_the_case():
    q, k, v, lengths = Case("drawn", 2, 7, 30, 2, 16, 1.0, "cosine", key_length=(30, 4)).draw_on_device("float32")
    assert (q.shape, k.shape, v.shape) == ((2, 7, 2, 16), (2, 30, 2, 16), (2, 30, 2, 16))
    cosines = np.einsum("btnh,bsnh->bnts", q, k)
    np.testing.assert_allclose(np.max(cosines, axis=-1)[..., ::2], 1.0, rtol=1e-5)
    assert np.all(np.max(cosines, axis=-1)[..., 1::2] < 0.99)
    np.testing.assert_array_equal(lengths, [30, 4])
    assert SMALL.draw_on_device("bfloat16")[0].dtype == jnp.bfloat16


def test_reduction_keeps_what_the_flags_leave_alone():
    case = Case("long", 2, 100, 200, 4, 8, 1.0, key_length=(150, 20))
    assert bench.reduced(case, None, None, None) == case
    short = bench.reduced(case, 1, 10, 50)
    assert (short.heads, short.num_queries, short.num_keys, short.key_length) == (1, 10, 50, (50, 20))


def test_kernels_are_attributed_to_the_call_that_launched_them():
    # Two functions in turns; the device's clock is ahead, so that a kernel seems to end after its call.
    windows = [Span(start, 800.0) for start in (0, 1000, 2000, 3000)]
    kernels = [
        *(Span(100, 200), Span(500, 300), Span(1750, 100)),
        *(Span(2100, 220), Span(2500, 280), Span(3600, 120)),
    ]
    got = profiling.attribute(kernels[::-1], windows, ["a", "b", "a", "b"])
    assert got == {"a": pytest.approx([5e-4, 5e-4]), "b": pytest.approx([1e-4, 1.2e-4])}


@pytest.mark.parametrize(
    "kernels",
    [[Span(100, 10)], [Span(100, 10), Span(150, 10), Span(2100, 10), Span(1100, 10)], [Span(100, 10), Span(1100, 10)]],
    ids=["a call without kernels", "unequal numbers of kernels", "a lost call"],
)
def test_an_attribution_that_cannot_be_is_refused(kernels):
    windows = [Span(start, 800.0) for start in (0, 1000, 2000)]
    assert profiling.attribute(kernels, windows, ["a", "b", "a"]) is None


class Plane:
    def __init__(self, name, **lines):
        self.name, self.lines = name, [Line(name, events) for name, events in lines.items()]


class Line:
    def __init__(self, name, events):
        self.name, self.events = name.replace("_", " "), [Event(*event) for event in events]


class Event:
    def __init__(self, name, start_ns, duration_ns):
        self.name, self.start_ns, self.duration_ns = name, start_ns, duration_ns


def test_a_gpu_counts_its_streams_and_a_tpu_its_programs():
    gpu = Plane("/device:GPU:0", Stream_7=[("kernel", 5, 2), ("copy", 9, 1)], XLA_Modules=[("jit_f", 5, 5)])
    tpu = Plane("/device:TPU:0", XLA_Modules=[("jit_f", 1, 8)], XLA_Ops=[("fusion", 1, 4), ("fusion", 5, 4)])
    host = Plane("/host:CPU", python=[("timed call 1", 30, 4), ("other", 0, 1), ("timed call 0", 20, 4)])
    assert profiling.device_spans([gpu, host]) == [Span(5, 2), Span(9, 1)]
    assert profiling.device_spans([tpu]) == [Span(1, 8)]
    assert profiling.call_spans([gpu, host]) == [Span(20, 4), Span(30, 4)]


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.0),
        ("NVIDIA H100 80GB HBM3", "float16", 989.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA L40", "bfloat16", 181.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v5p", "bfloat16", 459.0),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
    ids=str,
)
def test_the_peak_is_that_of_the_longest_matching_name(kind, dtype, peak):
    assert profiling.peak_tflops(kind, dtype) == peak
