"""Plans and policies: which scales, layers and tokens are computed."""

from toprovar_jax.acceleration.dense import Dense
from toprovar_jax.acceleration.plan import AccelerationPolicy, GenerationPlan, ScalePlan
from toprovar_jax.errors import unknown_name

POLICIES = {Dense.name: Dense}
"""Policy name to its class; every command line and the pipeline read this table."""


def policy_named(name: str) -> AccelerationPolicy:
    """The policy of that name with its default settings.

    Raises:
      UserInputError: an unknown name.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    return POLICIES[name]()


__all__ = ["POLICIES", "AccelerationPolicy", "Dense", "GenerationPlan", "ScalePlan", "policy_named"]
