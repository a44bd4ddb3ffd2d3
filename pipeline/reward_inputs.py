"""The inputs of the section reward, which several stages read."""

from pipeline.inputs import Input, Kind
from sarm_jax.rewards.options import PARSERS

# Lists of features and of their values.
REWARD_LISTS = tuple(Input(f"reward.{name}", Kind.LIST) for name in PARSERS)
