"""The inputs of the section reward, which several stages read."""

from ml_collections import ConfigDict

from pipeline.inputs import Input, Kind
from sarm_jax.rewards.human_states import MAKER
from sarm_jax.rewards.options import PARSERS

# Lists of features and of their values.
REWARD_LISTS = tuple(Input(f"reward.{name}", Kind.LIST) for name in PARSERS)


def reads_probe(config: ConfigDict) -> bool:
    """Returns whether a run with this config reads the dense probe."""
    return config.reward.probe_penalty != 0 or config.reward.screen


# Files that a PPO run reads.
REWARD_FILES = (
    Input(
        "reward.human_latents",
        read_if=lambda config: config.reward.beta != 0,
        maker="--stage=human_latents",
    ),
    Input("reward.probe", read_if=reads_probe, maker="--stage=train_probe"),
    Input(
        "reward.human_states",
        read_if=lambda config: config.reward.distance_penalty != 0,
        maker=MAKER,
    ),
)
