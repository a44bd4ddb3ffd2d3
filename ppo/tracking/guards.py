"""What tells, while a run goes, that its numbers no longer mean what they seem to.

A guard is a condition on a row of metrics.csv. One that holds often enough in a row is said once in
the log and stands in summary.json under `warnings`; with `guards.stop` the run stops there, with a
checkpoint. The defaults leave alone every run of the lab that kept its gold reward, and name every
one that lost it (`benchmarks/guards_on_runs.py`).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from sarm_jax.io.errors import InputError

LOG = logging.getLogger(__name__)
Row = Mapping[str, float]


class TrainingStoppedError(RuntimeError):
    """Training stopped before its last step; the checkpoints are kept."""


class NonFiniteError(TrainingStoppedError):
    """Too many updates were not finite; none of them was applied."""


class GuardStopError(TrainingStoppedError):
    """A guard that `guards.stop` names holds; what it looks at is saved in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Thresholds; units stand in `configs/base.py`. `stop` are names of guards, or "all"."""

    stop: tuple[str, ...] = ()
    steps: int = 3
    max_nonfinite_steps: int = 3
    ratio_0_max_dev: float = 1e-5
    ref_kl: float = 15.0
    ref_kl_per_token: float = 0.1
    approx_kl: float = 0.1
    disc_acc: float = 0.97
    entropy: float = 0.02
    distinct_responses: float = 0.3
    eos_fraction: float = 0.05
    alpha_low: float = 0.1
    alpha_high: float = 10.0

    def __post_init__(self) -> None:
        known = [guard.name for guard in GUARDS]
        for name in self.stop:
            if name not in (*known, "all"):
                raise InputError(
                    f"guards.stop: no guard is called {name!r}; expected all or some of "
                    f"{', '.join(known)}"
                )
        if self.steps < 1:
            raise InputError(f"guards.steps={self.steps}: must be at least 1")
        for name, value in dataclasses.asdict(self).items():
            if name != "stop" and not value >= 0:
                raise InputError(f"guards.{name}={value}: must not be negative")

    def stops(self, name: str) -> bool:
        """Whether the run is to end where this guard holds."""
        return name in self.stop or "all" in self.stop


@dataclasses.dataclass(frozen=True)
class Guard:
    """Warns where `holds`; `shows` are the columns that the warning quotes.

    `at_once`: on the first step, not only after `guards.steps` in a row.
    """

    name: str
    shows: tuple[str, ...]
    holds: Callable[[Row, GuardConfig], bool]
    meaning: str
    advice: str
    at_once: bool = False


# A column that a run does not have is NaN, and no comparison with it holds.
GUARDS = (
    Guard(
        "nonfinite",
        ("skipped_updates",),
        lambda row, limit: row["skipped_updates"] > 0,
        "updates were not finite and were not applied",
        "look at the batch in nonfinite_step_*.npz; lower ppo.learning_rate if it comes again",
        at_once=True,
    ),
    Guard(
        "ratio",
        ("ratio_0_max_dev",),
        lambda row, limit: row["ratio_0_max_dev"] > limit.ratio_0_max_dev,
        "the first minibatch is not on-policy: old and new log-probabilities come from programs "
        "that do not agree, and clipping starts from a wrong place",
        "use float32, or another mesh or packing; report it if it stays",
        at_once=True,
    ),
    Guard(
        "reference_kl",
        ("ref_kl", "response_length_mean"),
        lambda row, limit: (
            row["ref_kl"] > limit.ref_kl
            and row["ref_kl"] > limit.ref_kl_per_token * row["response_length_mean"]
        ),
        "the policy is far from the reference: a higher reward no longer says that responses are "
        "better",
        "read samples.jsonl; raise ppo.kl_coef, lower ppo.learning_rate, or take an earlier "
        "checkpoint",
    ),
    Guard(
        "update_kl",
        ("approx_kl", "clip_fraction"),
        lambda row, limit: row["approx_kl"] > limit.approx_kl,
        "updates take the policy far from the one that sampled: what PPO measured there no longer "
        "holds, and clipping cannot take back a step that is made",
        "read samples.jsonl; lower ppo.learning_rate, or let ppo.lr_schedule lower it",
    ),
    Guard(
        "discriminator",
        ("disc_acc", "kl_penalty"),
        lambda row, limit: row["disc_acc"] > limit.disc_acc,
        "the discriminator tells policy from human responses nearly every time: the latent KL is "
        "too large to be estimated, kl_penalty means nothing, and D is held at its bound",
        "give more human responses, fewer latent_indices, or a higher beta from the start",
    ),
    Guard(
        "entropy",
        ("entropy",),
        lambda row, limit: row["entropy"] < limit.entropy,
        "the policy has collapsed: it hardly samples any more",
        "lower ppo.learning_rate or ppo.ppo_epochs, raise ppo.kl_coef",
    ),
    Guard(
        "identical_responses",
        ("distinct_responses",),
        lambda row, limit: row["distinct_responses"] < limit.distinct_responses,
        "the policy has collapsed: it answers different prompts with the same words",
        "read samples.jsonl; the reward pays for that answer whatever the prompt",
    ),
    Guard(
        "no_eos",
        ("eos_fraction",),
        lambda row, limit: row["eos_fraction"] < limit.eos_fraction,
        "hardly any response ends by itself: the reward model reads them where they are cut off",
        "raise ppo.max_new_tokens or ppo.missing_eos_penalty",
    ),
    Guard(
        "reward_scale",
        ("alpha_low_in_sd", "alpha_high_in_sd"),
        lambda row, limit: (
            row["alpha_low_in_sd"] < limit.alpha_low or row["alpha_high_in_sd"] > limit.alpha_high
        ),
        "a penalty is far from the reward's own scale: too small to be felt beside the score, or "
        "so large that nothing else is",
        'choose alpha_values near one standard deviation of the score, or reward.unit="sd"',
        at_once=True,
    ),
)


class Watch:
    """The guards over the rows of a run, from its first on; the same rows give the same warnings.

    `alphas_sd` are the penalties in standard deviations of the reference responses' scores.
    """

    def __init__(self, config: GuardConfig, alphas_sd: Sequence[float] = ()):
        self._config = config
        used = [alpha for alpha in alphas_sd if alpha > 0]
        self._scale = {
            "alpha_low_in_sd": min(used, default=math.nan),
            "alpha_high_in_sd": max(used, default=math.nan),
        }
        self._in_a_row = dict.fromkeys((guard.name for guard in GUARDS), 0)
        self._warnings: dict[str, dict] = {}
        self.nonfinite_steps = 0

    def __call__(self, row: Row) -> list[str]:
        """Takes the next row; the guards that hold by now, new ones also in the log."""
        known = {name: row.get(name, math.nan) for guard in GUARDS for name in guard.shows}
        known |= self._scale
        self.nonfinite_steps += known["skipped_updates"] > 0
        return [guard.name for guard in GUARDS if self._check(guard, known, int(row["step"]))]

    @property
    def warnings(self) -> list[dict]:
        """{guard, first_step, steps, message}: where each began to hold, and on how many steps."""
        return list(self._warnings.values())

    def _check(self, guard: Guard, row: Row, step: int) -> bool:
        count = self._in_a_row[guard.name] + 1 if guard.holds(row, self._config) else 0
        self._in_a_row[guard.name] = count
        if count < (1 if guard.at_once else self._config.steps):
            return False
        if guard.name not in self._warnings:
            shown = ", ".join(f"{name}={row[name]:.3g}" for name in guard.shows)
            message = f"{guard.meaning} ({shown}); {guard.advice}"
            LOG.warning("step %d: guard %s: %s", step, guard.name, message)
            new = {"guard": guard.name, "first_step": step, "steps": 0, "message": message}
            self._warnings[guard.name] = new
        self._warnings[guard.name]["steps"] += 1
        return True
