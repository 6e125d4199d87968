"""The README's tables of converting released weights and of their memory; see ``readme_tables.py``."""

import pathlib

from kernel_tables import RESULTS, results

from toprovar_jax.memory import memory_report
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions

OPTIONS = {
    "everything on the device": ON_DEVICE,
    "`--text-encoder-on on-demand`": MemoryOptions(text_encoder="on_demand"),
    "the same with `--int8`": MemoryOptions(text_encoder="on_demand", quantization="int8"),
    "`--low-memory`": MemoryOptions(text_encoder="on_demand", stream_blocks=True, decoder_strips=8),
}


def conversion(folder: pathlib.Path = RESULTS) -> str:
    """Memory and speed of conversions at full size."""
    lines = [
        "| file | read | memory of its own | speed | of the disk's copying | tensors compared |",
        "|---|---|---|---|---|---|",
    ]
    with results(folder / "conversion.json", "benchmarks/conversion.py") as report:
        for name, found in report.items():
            peak = found["peak_bytes"]["anonymous"]
            lines.append(
                f"| `{name}` | {found['bytes_read'] / 1e9:.1f} GB | {peak / 1e9:.2f} GB | "
                f"{found['convert_mb_per_second']} MB/s | {100 * found['share_of_copy_speed']:.0f} % | "
                f"{found['verified_tensors']} |"
            )
    lines += ["", "Random numbers in files of the released sizes, 2 CPU cores; `benchmarks/conversion.py`."]
    return "\n".join(lines)


def memory(folder: pathlib.Path = RESULTS) -> str:
    """Predicted peaks of the two released sizes, and how far predictions are from the compiler's own numbers."""
    lines = ["| at 1M, one picture, dense | Infinity-2B | Infinity-8B |", "|---|---|---|"]
    for title, options in OPTIONS.items():
        peaks = (memory_report(f"infinity-{size}", pixels="1M", memory=options).peak for size in ("2b", "8b"))
        lines.append(f"| {title} | {' | '.join(f'{peak / 1e9:.1f} GB' for peak in peaks)} |")
    with results(folder / "memory_report.json", "benchmarks/memory_report.py") as report:
        errors = [(abs(found["error"]), name) for name, found in report.items() if found["error"] is not None]
        targets = ", ".join(dict.fromkeys(name.split()[0] for _, name in errors))
        worst = max(errors)
    lines += [
        "",
        f"Predicted by `toprovar memory`. Compiled ahead of time for {targets}, {len(errors)} programs take what is "
        f"predicted within {100 * worst[0]:.0f} %; `benchmarks/memory_report.py`.",
    ]
    return "\n".join(lines)


TABLES = {"conversion": conversion, "memory": memory}
