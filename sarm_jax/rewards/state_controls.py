"""Inputs of the reward terms that read the pooled state: a dense probe, and human states.

The state is the one that the SAE reads (`RewardModel.score_with_states`). It is returned by the
forward pass that scores the responses, and only if one of these terms is on.
"""

import dataclasses

import numpy as np

from sarm_jax.features.dense_probe import DenseProbe, load_probe
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import processes
from sarm_jax.rewards.compound import StateReadings
from sarm_jax.rewards.human_states import HumanStates, load_human_states
from sarm_jax.rewards.reward_config import RewardConfig


@dataclasses.dataclass(frozen=True)
class StateControls:
    """The probe, and mean and covariance of human states; None if no term reads them."""

    probe: DenseProbe | None = None
    human: HumanStates | None = None

    @property
    def read_states(self) -> bool:
        """True if a term reads the pooled states."""
        return self.probe is not None or self.human is not None

    def read(self, x_bd: np.ndarray) -> StateReadings:
        """Reads the states `[B, D]` of B responses; the result is the same in every process."""
        return StateReadings(
            margin_b=None if self.probe is None else _of_primary(self.probe.margin(x_bd)),
            distance_b=None if self.human is None else _of_primary(self.human.distance(x_bd)),
        )


NO_STATES = StateControls()


def _of_primary(own_b: np.ndarray) -> np.ndarray:
    """Returns the primary process's numbers, since other CPUs may round sums differently."""
    return processes.broadcast_array(own_b, own_b if processes.is_primary() else None)


def state_controls(reward: RewardConfig, state_size: int) -> StateControls:
    """Reads the files of the terms that are on.

    Args:
        reward: the options.
        state_size: the number of dimensions of a state of the reward model.

    Raises:
        InputError: a file is missing or bad, or was made with another reward model.
    """
    return StateControls(
        probe=_probe(reward.probe, state_size) if reward.reads_probe else None,
        human=_human(reward.human_states, state_size) if reward.distance_penalty else None,
    )


def _probe(path: str, state_size: int) -> DenseProbe:
    probe = load_probe(path)
    if len(probe.direction_d) != state_size:
        raise InputError(
            f"reward.probe={path}: a direction of {len(probe.direction_d)} dimensions for states "
            f"of {state_size}: was it made with another reward model?"
        )
    return probe


def _human(path: str, state_size: int) -> HumanStates:
    human = load_human_states(path)
    if len(human.mean_d) != state_size:
        raise InputError(
            f"reward.human_states={path}: states of {len(human.mean_d)} dimensions, the reward "
            f"model's have {state_size}: were they collected with another reward model?"
        )
    return human
