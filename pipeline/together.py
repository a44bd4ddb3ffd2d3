"""Trains several runs at a time: over one copy of the models, with shared rollouts.

The runs are experiments, or conditions of a study. Each keeps its working directory and everything
in it. `experiments_at_once` and `lab.conditions_at_once` limit how many are trained at a time;
memory has to hold the adapters, optimizer states and KV caches of all of them.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from pipeline.models import load_policy_model, load_reward_model
from ppo.run_group import Member, RunGroup
from ppo.train import TrainConfig
from sarm_jax.io.errors import InputError
from sarm_jax.io.progress import named_messages
from sarm_jax.models.llama import Llama
from sarm_jax.models.reward_model import RewardModel

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a run in a group, and the models that the group has loaded so far."""

    member: Member
    models: dict[str, Any]


_place: ContextVar[Place | None] = ContextVar("place", default=None)


def member() -> Member | None:
    """Returns the place of this thread's run in its group; None if it is trained alone."""
    place = _place.get()
    return None if place is None else place.member


def load_policy(config: ConfigDict) -> tuple[Llama, Any]:
    """Returns a policy of the run's own and its tokenizer; a group loads the weights once."""
    place = _place.get()
    if place is None:
        return load_policy_model(config)
    if "policy" not in place.models:
        policy, tokenizer = load_policy_model(config)
        place.models["policy"] = nnx.split(policy), tokenizer
    split, tokenizer = place.models["policy"]
    return nnx.merge(*split), tokenizer


def load_reward(config: ConfigDict, needs_features: bool) -> RewardModel:
    """Returns the reward model, see `load_reward_model`; the runs of a group use the same one.

    It is loaded with any features that it has, whether or not the first run needs them: a run that
    does has checked that they are there.
    """
    place = _place.get()
    if place is None:
        return load_reward_model(config, needs_features)
    if "reward_model" not in place.models:
        place.models["reward_model"] = load_reward_model(config, needs_features=False)
    return place.models["reward_model"]


def check_at_once(option: str, count: int, config: ConfigDict, options: TrainConfig) -> None:
    """Checks the number of runs that are trained at a time.

    Args:
        option: the full name of the option that holds the number.
        count: its value.
        config: the config of the runs.
        options: its options of training.

    Raises:
        InputError: the number is out of range, or another option allows one run only.
    """
    if count < 1:
        raise InputError(f"{option}={count}: must be at least 1")
    if count == 1:
        return
    if config.profile.start_step >= 0:
        raise InputError(
            f"profile.start_step={config.profile.start_step}: JAX traces one run at a time; set "
            f"{option}=1 (it is {count})"
        )
    if "wandb" in options.tracking.services:
        raise InputError(
            f"track={config.track}: W&B has one run in a process; set {option}=1 (it is {count})"
        )


def check_experiments_at_once(config: ConfigDict, options: TrainConfig) -> None:
    """Raises InputError for `experiments_at_once` as `check_at_once`, or without experiments."""
    count = config.experiments_at_once
    check_at_once("experiments_at_once", count, config, options)
    if count > 1 and len(config.experiments) < 2:
        raise InputError(
            f"experiments_at_once={count}: the config has {len(config.experiments)} experiments to "
            "train at a time"
        )


def run_together(works: Sequence[tuple[str, Callable[[], None]]], at_once: int) -> None:
    """Calls (name, function) pairs, each of which trains a run, `at_once` of them at a time.

    All runs have the same policy and reward model. The name, such as "experiment tau_2", is put
    before every message of a run.

    Raises:
        BaseException: the first error of a run, after the other runs of its group have ended;
            SystemExit, which a signal leads to, goes before other errors.
    """
    models: dict[str, Any] = {}
    for start in range(0, len(works), at_once):
        group = works[start : start + at_once]
        ended = RunGroup().run([partial(_run, models, name, work) for name, work in group])
        errors = [error for error in ended if error is not None]
        for error in sorted(errors, key=lambda error: not isinstance(error, SystemExit)):
            raise error


def _run(models: dict[str, Any], name: str, work: Callable[[], None], member: Member) -> None:
    """Trains a run; its error is logged at once, since the other runs go on."""
    _place.set(Place(member, models))  # of this thread alone
    with named_messages(name):
        try:
            work()
        except InputError as error:
            LOG.error("stopped: %s", error)
            raise
        except Exception:
            LOG.exception("stopped")
            raise
