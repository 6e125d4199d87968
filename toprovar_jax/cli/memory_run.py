"""What the memory command does once it has started; imports jax only after the backend is chosen."""

from __future__ import annotations

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.memory_options import MemoryCommand, asked, limit_of


def run(options: MemoryCommand) -> None:
    """Carries out parsed options.

    Raises:
      UserInputError: a value is not legal, or it does not fit; the table is printed before that.
    """
    arguments, limit = asked(options), limit_of(options)
    # A given size is judged without looking for a device.
    start_backend("cpu" if limit is not None and options.backend is None else options.backend)
    from toprovar_jax.memory import check_fits, device_limit, memory_report

    report = memory_report(**arguments)
    print(report.to_json() if options.json else report)
    limit = device_limit() if limit is None else limit
    if limit is not None:
        check_fits(report, limit)
