"""Options of a PPO run. `configs/base.py` gives their defaults and units."""

import dataclasses
from functools import cached_property
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.sampling.generate import check_temperature

AT_LEAST_ONE = (
    "total_steps batch_size samples_per_prompt num_minibatches gradient_accumulation_steps "
    "ppo_epochs max_new_tokens max_prompt_tokens calibration_batches checkpoint_every "
    "keep_checkpoints eval_every eval_batches"
).split()
POSITIVE = "learning_rate clip_range value_clip_range max_grad_norm temperature".split()
NOT_NEGATIVE = (
    "rollout_slots clip_range_high warmup_steps vf_coef weight_decay kl_coef missing_eos_penalty "
    "logprob_chunk pack_levels samples_per_step"
).split()

ALGORITHMS = ("ppo", "rloo", "grpo")
LOSS_AVERAGES = ("tokens", "responses", "constant")
# Options that no compiled program depends on, with the values that they have in programs.
NOT_IN_PROGRAMS: dict[str, Any] = {
    "seed": 0,
    "long_prompts": "error",
    "missing_eos_penalty": 0.0,
    **dict.fromkeys(
        (
            "max_prompt_tokens calibration_batches pack_levels checkpoint_every keep_checkpoints "
            "samples_per_step eval_every eval_batches"
        ).split(),
        1,
    ),
}
CRITIC_OPTIONS = ("vf_coef", "value_clip_range", "gamma", "gae_lambda", "whiten_advantages")


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Options of the RL loop, the section `ppo` of a config.

    Raises:
        InputError: an option is invalid; the message names `ppo.<field>` and its value.
    """

    algorithm: str
    total_steps: int
    batch_size: int
    samples_per_prompt: int
    num_minibatches: int
    gradient_accumulation_steps: int
    ppo_epochs: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    clip_range: float
    clip_range_high: float
    value_clip_range: float
    vf_coef: float
    gamma: float
    gae_lambda: float
    kl_coef: float
    missing_eos_penalty: float
    whiten_advantages: bool
    scale_advantages: bool
    loss_average: str
    temperature: float
    top_p: float
    rollout_slots: int
    max_new_tokens: int
    max_prompt_tokens: int
    long_prompts: str
    calibration_batches: int
    logprob_chunk: int
    pack_levels: int
    checkpoint_every: int
    keep_checkpoints: int
    samples_per_step: int
    eval_every: int
    eval_batches: int
    seed: int

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_updates()
        if self.top_p != 1:
            raise InputError(
                f"ppo.top_p={self.top_p}: PPO compares log-probabilities of the distribution that "
                "was sampled from, and dropping tokens changes it between updates; use "
                "ppo.top_p=1.0"
            )
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise InputError(
                f"ppo.lr_schedule={self.lr_schedule!r}: expected constant, linear or cosine"
            )
        if self.long_prompts not in ("error", "drop", "truncate"):
            raise InputError(
                f"ppo.long_prompts={self.long_prompts!r}: expected error, drop or truncate"
            )
        self._check_algorithm()
        if self.batch_size % self.pieces:
            raise InputError(
                f"ppo.batch_size={self.batch_size} is not divisible by ppo.num_minibatches × "
                f"ppo.gradient_accumulation_steps = {self.num_minibatches} × "
                f"{self.gradient_accumulation_steps}"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"ppo.seed={self.seed}: must lie in [0, 2^31)")

    def _check_updates(self) -> None:
        """Raises InputError if the optimizer, which counts in int32, cannot count the updates."""
        for name in ("total_steps", "warmup_steps"):
            if getattr(self, name) * self.updates_per_step >= 2**31:
                raise InputError(
                    f"ppo.{name}={getattr(self, name)}: with ppo.ppo_epochs={self.ppo_epochs} and "
                    f"ppo.num_minibatches={self.num_minibatches} these are 2^31 updates or more"
                )

    def _check_ranges(self) -> None:
        """Raises InputError for the first number that is out of its range."""
        for name in AT_LEAST_ONE:
            if not 1 <= getattr(self, name) < float("inf"):
                raise InputError(f"ppo.{name}={getattr(self, name)}: must be at least 1")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"ppo.{name}={getattr(self, name)}: must be positive")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"ppo.{name}={getattr(self, name)}: must not be negative")
        check_temperature(self.temperature, "ppo.temperature")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name}={getattr(self, name)}: must lie in [0, 1]")

    def _check_algorithm(self) -> None:
        """Raises InputError for an unknown algorithm, or an option that it does not have."""
        if self.algorithm not in ALGORITHMS:
            raise InputError(
                f"ppo.algorithm={self.algorithm!r}: expected one of {', '.join(ALGORITHMS)}"
            )
        if self.loss_average not in LOSS_AVERAGES:
            raise InputError(
                f"ppo.loss_average={self.loss_average!r}: expected one of "
                f"{', '.join(LOSS_AVERAGES)}"
            )
        if not self.has_critic and self.samples_per_prompt < 2:
            raise InputError(
                f"ppo.samples_per_prompt={self.samples_per_prompt}: ppo.algorithm="
                f"{self.algorithm} compares responses to the same prompt, so it needs at least 2"
            )
        if self.batch_size % self.samples_per_prompt:
            raise InputError(
                f"ppo.batch_size={self.batch_size} is not divisible by "
                f"ppo.samples_per_prompt={self.samples_per_prompt}"
            )
        slots = self.rollout_slots
        if slots and (slots >= self.batch_size or slots % self.samples_per_prompt):
            raise InputError(
                f"ppo.rollout_slots={slots}: must be less than ppo.batch_size={self.batch_size} "
                f"and a multiple of ppo.samples_per_prompt={self.samples_per_prompt} (0: all "
                "responses are sampled at once)"
            )
        for name, default in (("loss_average", "tokens"), ("scale_advantages", True)):
            if self.algorithm != "grpo" and getattr(self, name) != default:
                raise InputError(
                    f"ppo.{name}={getattr(self, name)}: is an option of ppo.algorithm=grpo, found "
                    f"{self.algorithm}"
                )

    @property
    def has_critic(self) -> bool:
        """True if the algorithm has a value head."""
        return self.algorithm == "ppo"

    @property
    def prompts_per_batch(self) -> int:
        """Number of prompts in a batch."""
        return self.batch_size // self.samples_per_prompt

    @property
    def rollout_rows(self) -> int:
        """Number of responses that are sampled at a time."""
        return self.rollout_slots or self.batch_size

    @property
    def unused(self) -> tuple[str, ...]:
        """Options that the algorithm does not use."""
        return () if self.has_critic else CRITIC_OPTIONS

    @cached_property
    def for_programs(self) -> "PPOConfig":
        """The options without those that no compiled program depends on.

        Options are static arguments of programs. Runs that differ only in other options, such as
        the seed, share their programs. A constant learning rate does not depend on the number of
        steps, and without a warm-up it does not depend on the number of updates in a step either.
        """
        changes = dict(NOT_IN_PROGRAMS)
        if self.lr_schedule == "constant":
            changes["total_steps"] = 1
            if not self.warmup_steps:
                changes["ppo_epochs"] = 1
        return dataclasses.replace(self, **changes)

    def evaluates(self, finished: int) -> bool:
        """Returns whether the policy is evaluated after `finished` steps, unless a guard stops."""
        return finished % self.eval_every == 0 or finished == self.total_steps

    @property
    def pieces(self) -> int:
        """Number of microbatches in a batch."""
        return self.num_minibatches * self.gradient_accumulation_steps

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer steps in a PPO step."""
        return self.ppo_epochs * self.num_minibatches
