"""What may be asked of a pipeline: single values, lists and arrays are brought into one form, misfits are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.acceleration.policy import AccelerationPolicy
from toprovar_jax.drivers import TokenArrays
from toprovar_jax.errors import UserInputError
from toprovar_jax.sampling import Sampling
from toprovar_jax.settings import MAX_SEED, check_setting
from toprovar_jax.shapes import Array
from toprovar_jax.text_encoder import TokenBatch

Number = int | float | np.number
"""What may be given for a number; integers are checked where only they make sense."""

Numbers = Number | Sequence[Number] | np.ndarray | Array
"""One number, or several: a list, a range or an array."""


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """A request that has been checked and completed; nothing was computed for it yet.

    Attributes:
      prompts, seeds: one entry per picture.
      negative_prompts: one per picture, or None for the learned "no text".
      size: height and width in pixels.
      plan: what will be computed.
      policy: what made the plan, and may choose among its alternatives.
      sampling: guidance, temperature, top-k, top-p.
      tokens: the prompts' token ids.
      warnings: one line each.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompts: tuple[str, ...] | None
    size: tuple[int, int]
    plan: GenerationPlan
    policy: AccelerationPolicy
    sampling: Sampling
    tokens: TokenArrays
    warnings: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        """How many pictures."""
        return len(self.prompts)


def plain_numbers(given: Any) -> Any:
    """Python numbers and lists of them, for what numpy or jax hold them as."""
    if isinstance(given, (np.ndarray, np.generic, jax.Array)):
        return given.tolist()
    return [plain_numbers(item) for item in given] if isinstance(given, (list, tuple, range)) else given


def texts_of(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """The texts of ``prompt`` or ``negative_prompt``, each checked."""
    if isinstance(given, str):
        given = (given,)
    elif not isinstance(given, Iterable) or isinstance(given, (bytes, Mapping)):
        raise UserInputError(f"{name} {given!r}", "must be text or a list of texts", "write it in words")
    texts = tuple(given)
    if not texts:
        raise UserInputError(f"{name} list", "must not be empty", "pass at least one text")
    return tuple(check_setting(name, text) for text in texts)


def negatives_of(given: str | Iterable[str] | None, images: int, per_prompt: int) -> tuple[str, ...] | None:
    """One negative prompt per image; None where there is no text in them."""
    if given is None:
        return None
    texts = texts_of("negative_prompt", given)
    if not any(text.strip() for text in texts):
        return None
    if not all(text.strip() for text in texts):
        raise UserInputError(
            "negative_prompt list with empty entries", "must have text for every prompt or for none", "split the call"
        )
    if isinstance(given, str):
        return texts * images
    if len(texts) * per_prompt != images:
        raise UserInputError(
            f"list of {len(texts)} negative prompts", f"must have one per prompt ({images // per_prompt})", "match them"
        )
    return tuple(text for text in texts for _ in range(per_prompt))


def seeds_of(given: Numbers, prompts: int, per_prompt: int) -> tuple[int, ...]:
    """One seed per image: given so, or counted up from one per prompt, or from one for all."""
    plain = plain_numbers(given)
    seeds = [check_setting("seed", seed) for seed in (plain if isinstance(plain, list) else [plain] * prompts)]
    if len(seeds) == prompts * per_prompt:
        return tuple(seeds)
    if len(seeds) == prompts:
        return tuple((seed + k) % (MAX_SEED + 1) for seed in seeds for k in range(per_prompt))
    raise UserInputError(
        f"list of {len(seeds)} seeds",
        f"must have one per prompt ({prompts}) or one per image ({prompts * per_prompt})",
        "match them, or give one integer",
    )


def per_scale(name: str, given: Numbers, count: int) -> float | tuple[float, ...]:
    """A legal ``guidance`` or ``tau``: one number, or as many as there are scales."""
    value = check_setting(name, plain_numbers(given))
    if isinstance(value, tuple) and len(value) != count:
        raise UserInputError(
            f"{name} list of {len(value)} numbers",
            f"must have one per scale ({count} at this size)",
            "or give one number",
        )
    low, high = _RANGES[name]
    for number in value if isinstance(value, tuple) else (value,):
        if not low <= number <= high:
            raise UserInputError(f"{name} {number:g}", f"must be from {low:g} to {high:g}", "values near 1 are usual")
    return value


_RANGES = {"guidance": (0.0, 1000.0), "tau": (0.001, 1000.0)}
"""Beyond these, float32 scores overflow or every bit is decided by rounding."""


def cut_warnings(name: str, texts: Sequence[str], tokens: TokenBatch) -> list[str]:
    """One line per text that was longer than the model reads."""
    length = tokens.ids.shape[1]
    return [
        f"{name} {_short(text)}: has {count} tokens, the model reads {length}; the first {length - 1} and the "
        "end token were kept"
        for text, count in zip(texts, tokens.truncated, strict=True)
        if count is not None
    ]


def scenes_warnings(prompts: Sequence[str], world: str) -> list[str]:
    """One line per prompt that asks for more than ``world`` holds (a key of ``scenes.reading.WORLDS``)."""
    from toprovar_jax.scenes.reading import describe_world, read_prompt

    return [
        f"prompt {_short(prompt)}: outside what the embedded model knows ({', '.join(unknown)}); "
        f"{describe_world(world)}; for anything else pass --model with a folder of Infinity weights"
        for prompt in dict.fromkeys(prompts)
        if (unknown := read_prompt(prompt, world).unknown)
    ]


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
