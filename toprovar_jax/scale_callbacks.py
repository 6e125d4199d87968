"""What is called after every scale of a generation: a caller's own function, told of its pictures, and a bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toprovar_jax.drivers import OnScaleEnd
from toprovar_jax.request import ResolvedRequest


def naming(on_scale_end: OnScaleEnd | None, images: Sequence[int]) -> OnScaleEnd | None:
    """``on_scale_end``, told as well which pictures it is about; rows beyond ``images`` are none."""
    if on_scale_end is None:
        return None

    def call(index: int, count: int, info: dict[str, Any]) -> None:
        rows = [place for place, row in enumerate(info["images"]) if row < len(images)]
        if rows:
            named = {"images": tuple(images[info["images"][place]] for place in rows)}
            on_scale_end(index, count, info | {"latents": info["latents"][rows]} | named)

    return call


def both(first: OnScaleEnd | None, second: OnScaleEnd | None) -> OnScaleEnd | None:
    """One callback for two, of which either may be missing; the second is called first."""
    if first is None or second is None:
        return first or second

    def call(index: int, count: int, info: dict[str, Any]) -> None:
        second(index, count, info)
        first(index, count, info)

    return call


class ScaleBar:
    """A bar over all scales of all pictures; nothing where it is switched off."""

    def __init__(self, request: ResolvedRequest, enabled: bool):
        from tqdm import tqdm

        total = request.plan.num_run * request.batch_size
        self.bar = tqdm(total=total, desc="scales", unit="scale", disable=not enabled)

    def on_scale_end(self, index: int, count: int, info: dict[str, Any]) -> None:
        """Counts a scale of the pictures in ``info``."""
        del index, count
        height, width = info["grid"]
        self.bar.set_postfix_str(f"{height}x{width}")
        self.bar.update(len(info["images"]))

    def __enter__(self) -> ScaleBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
