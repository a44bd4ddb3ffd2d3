"""Trains several experiments at a time: over one copy of the models, with shared rollouts.

Each experiment keeps its working directory and everything in it. `experiments_at_once` limits how
many are trained at a time; memory has to hold the adapters, optimizer states and KV caches of all
of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from pipeline.models import load_policy_model, load_reward_model
from ppo.run_group import Member, RunGroup
from sarm_jax.io.progress import named_messages
from sarm_jax.models.llama import Llama
from sarm_jax.models.reward_model import RewardModel


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
    """Returns the reward model, see `load_reward_model`; the runs of a group use the same one."""
    place = _place.get()
    if place is None:
        return load_reward_model(config, needs_features)
    name = "features" if needs_features else "scores"  # of which the reward model is asked
    if name not in place.models:
        place.models[name] = load_reward_model(config, needs_features)
    return place.models[name]


def run_together(works: Sequence[tuple[str, Callable[[], None]]], at_once: int) -> None:
    """Calls (name, function) pairs, each of which trains a run, `at_once` of them at a time.

    Raises:
        BaseException: the first error of a run, after the other runs of its group have ended.
    """
    for start in range(0, len(works), at_once):
        group = works[start : start + at_once]
        models: dict[str, Any] = {}
        errors = RunGroup().run([partial(_run, models, name, work) for name, work in group])
        for error in errors:
            if error is not None:
                raise error


def _run(models: dict[str, Any], name: str, work: Callable[[], None], member: Member) -> None:
    _place.set(Place(member, models))  # of this thread alone
    with named_messages(f"experiment {name}"):
        work()
