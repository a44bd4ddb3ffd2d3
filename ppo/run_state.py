"""The state of a run: everything that a PPO step changes."""

from flax import struct

from ppo.learner import TrainState
from sarm_jax.rewards.density_ratio import DensityRatioState


@struct.dataclass
class RunState:
    """State of the policy and, if β > 0, of the discriminator.

    Checkpoints and nonfinite_step_*.npz name their arrays after these fields, as in
    `train.params.value_head.bias`, so that renaming a field would change both formats.
    """

    train: TrainState
    density_ratio: DensityRatioState | None
