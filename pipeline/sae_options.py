"""Options of SAE training, which `train_sarm` and `train_sae` share, made to fit a model."""

import dataclasses
import logging
from typing import TypeVar

from sarm_jax.training.sarm_options import TrainSARMConfig
from sarm_jax.training.train_sae import TrainSAEConfig

LOG = logging.getLogger(__name__)
Options = TypeVar("Options", TrainSARMConfig, TrainSAEConfig)


def fit_options(options: Options, model: str, positions: int, pretrains: bool = True) -> Options:
    """Lowers `max_length` to the positions of the model; warns if no latent can count as dead.

    Args:
        options: the section of a stage.
        model: name or directory of the model, for the log.
        positions: the positions that the model has.
        pretrains: whether an SAE is trained.
    """
    if isinstance(options, TrainSARMConfig):
        section, name, steps = "train_sarm", "sae_steps", options.sae_steps
    else:
        section, name, steps = "train_sae", "steps", options.steps
    if options.max_length > positions:  # as in scoring, see `load_reward_model`
        LOG.info("%s has %d positions: %s.max_length=%d", model, positions, section, positions)
        options = dataclasses.replace(options, max_length=positions)
    if pretrains and options.dead_after_steps >= steps:
        LOG.warning(
            "%s.dead_after_steps=%d: no latent counts as dead in %s=%d, and aux_k=%d brings none "
            "back",
            section, options.dead_after_steps, name, steps, options.aux_k,
        )  # fmt: skip
    return options
