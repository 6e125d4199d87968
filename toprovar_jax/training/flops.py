"""How many operations the matrix products and convolutions of a program are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

TRAINING = 3
"""A training step's operations over those of its loss: the backward pass has two products for each of the forward."""


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations (a multiplication and an addition are two) of one call; nothing is computed.

    Loops with a fixed number of turns count so often; of several branches the most expensive counts, of a ``while``
    one turn. Element-wise work is left out, as the field does for utilisation.

    Args:
      function: traceable.
      arguments: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(program: Any) -> float:
    return sum((_of_equation(equation) for equation in program.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    times = parameters["length"] if name == "scan" else 1
    return times * sum((_count(inner) for inner in _inner(parameters)), 0.0)


def _inner(parameters: dict[str, Any]) -> list[Any]:
    """Programs that an equation calls."""
    found = [getattr(value, "jaxpr", value) for value in parameters.values()]
    return [value for value in found if hasattr(value, "eqns")]
