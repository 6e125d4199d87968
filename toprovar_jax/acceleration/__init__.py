"""Plans and policies: which scales, layers and tokens are computed. Importing it touches neither jax nor numpy."""

from collections.abc import Callable, Mapping

from toprovar_jax.acceleration.dense import Dense
from toprovar_jax.acceleration.fixed import FixedPlan
from toprovar_jax.acceleration.plan import AccelerationPolicy, AdaptivePolicy, GenerationPlan, GroupPlan, ScalePlan
from toprovar_jax.acceleration.statistics import ScaleStatistics
from toprovar_jax.acceleration.step import ScaleStep, Selection
from toprovar_jax.acceleration.toprovar import ToProVAR
from toprovar_jax.errors import unknown_name

POLICIES: Mapping[str, Callable[[], AccelerationPolicy]] = {
    "dense": Dense,
    "toprovar": ToProVAR,
    "toprovar-fast": ToProVAR.fast,
}
"""Policy name to what makes it; every command line and the pipeline read this table."""


def policy_named(name: str) -> AccelerationPolicy:
    """The policy of that name with its default settings.

    Raises:
      UserInputError: an unknown name.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    return POLICIES[name]()


__all__ = [
    "POLICIES",
    "AccelerationPolicy",
    "AdaptivePolicy",
    "Dense",
    "FixedPlan",
    "GenerationPlan",
    "GroupPlan",
    "ScalePlan",
    "ScaleStatistics",
    "ScaleStep",
    "Selection",
    "ToProVAR",
    "policy_named",
]
