"""Guards: conditions on the metrics of a run that say when its numbers cannot be trusted.

A guard is a condition on a row of metrics.csv. It is active once the condition has been true on
enough steps in a row. An active guard is logged once and listed in summary.json under `warnings`;
if `guards.stop` names it, the run stops there, with a checkpoint. With the defaults no guard is
active on any run of the lab that kept its gold reward, and at least one is on every run that lost
it (`benchmarks/guards_on_runs.py`).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from sarm_jax.io.errors import InputError, TrainingStoppedError

LOG = logging.getLogger(__name__)
Row = Mapping[str, float]


class NonFiniteError(TrainingStoppedError):
    """Too many steps had updates that were not finite. None of these updates was applied."""


class GuardStopError(TrainingStoppedError):
    """A guard that `guards.stop` names is active. A checkpoint of that step was saved."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Options of the guards, the section `guards` of a config, whose units `configs/base.py` gives.

    `stop` holds names of guards, or "all". `steps` is how many steps in a row make a guard active,
    and `max_nonfinite_steps` how many steps of a run may have updates that were not finite. The
    others are thresholds.

    Raises:
        InputError: an option is invalid; the message names `guards.<field>` and its value.
    """

    stop: tuple[str, ...]
    steps: int
    max_nonfinite_steps: int
    ratio_0_max_dev: float
    ref_kl: float
    ref_kl_per_token: float
    approx_kl: float
    disc_acc: float
    entropy: float
    distinct_responses: float
    eos_fraction: float
    alpha_low: float
    alpha_high: float

    def __post_init__(self) -> None:
        names = [guard.name for guard in GUARDS]
        for name in self.stop:
            if name not in (*names, "all"):
                raise InputError(
                    f"guards.stop: no guard is called {name!r}; expected all or some of "
                    f"{', '.join(names)}"
                )
        if self.steps < 1:
            raise InputError(f"guards.steps={self.steps}: must be at least 1")
        for name, value in dataclasses.asdict(self).items():
            if name != "stop" and not value >= 0:
                raise InputError(f"guards.{name}={value}: must not be negative")

    def stops(self, name: str) -> bool:
        """Returns whether the run stops if this guard is active."""
        return name in self.stop or "all" in self.stop


@dataclasses.dataclass(frozen=True)
class Guard:
    """A condition on a row of metrics, with a message for the user.

    Attributes:
        name: the name in `guards.stop` and summary.json.
        columns: the columns whose values the warning quotes.
        condition: the condition on a row.
        meaning: the first part of the message, what the condition means.
        advice: the second part, what the user can do about it.
        at_once: whether the guard is active on the first such step, not after `guards.steps`.
    """

    name: str
    columns: tuple[str, ...]
    condition: Callable[[Row, GuardConfig], bool]
    meaning: str
    advice: str
    at_once: bool = False


# A column that a run does not have is NaN, and every comparison with it is false.
GUARDS = (
    Guard(
        name="nonfinite",
        columns=("skipped_updates",),
        condition=lambda row, limit: row["skipped_updates"] > 0,
        meaning="updates were not finite and were not applied",
        advice="look at the batch in nonfinite_step_*.npz; lower ppo.learning_rate if it happens "
        "again",
        at_once=True,
    ),
    Guard(
        name="ratio",
        columns=("ratio_0_max_dev",),
        condition=lambda row, limit: row["ratio_0_max_dev"] > limit.ratio_0_max_dev,
        meaning="the first minibatch is not on-policy: old and new log-probabilities come from "
        "programs that do not agree, so that clipping starts from the wrong ratio",
        advice="use float32, or another mesh or packing; report it if it stays",
        at_once=True,
    ),
    Guard(
        name="reference_kl",
        columns=("ref_kl", "response_length_mean"),
        condition=lambda row, limit: (
            row["ref_kl"] > limit.ref_kl
            and row["ref_kl"] > limit.ref_kl_per_token * row["response_length_mean"]
        ),
        meaning="the policy is far from the reference: a higher reward no longer means that "
        "responses are better",
        advice="read samples.jsonl; raise ppo.kl_coef, lower ppo.learning_rate, or take an earlier "
        "checkpoint",
    ),
    Guard(
        name="update_kl",
        columns=("approx_kl", "clip_fraction"),
        condition=lambda row, limit: row["approx_kl"] > limit.approx_kl,
        meaning="updates take the policy far from the one that sampled: the advantages measured "
        "there no longer apply, and clipping cannot undo a step that was taken",
        advice="read samples.jsonl; lower ppo.learning_rate, or let ppo.lr_schedule lower it",
    ),
    Guard(
        name="discriminator",
        columns=("disc_acc", "kl_penalty"),
        condition=lambda row, limit: row["disc_acc"] > limit.disc_acc,
        meaning="the discriminator tells policy from human responses nearly every time: the latent "
        "KL is too large to be estimated, D is held at its bound, and kl_penalty means nothing",
        advice="give more human responses, fewer reward.latent_indices, or a higher reward.beta "
        "from the start",
    ),
    Guard(
        name="entropy",
        columns=("entropy",),
        condition=lambda row, limit: row["entropy"] < limit.entropy,
        meaning="the policy has collapsed: its responses are almost deterministic",
        advice="lower ppo.learning_rate or ppo.ppo_epochs, raise ppo.kl_coef",
    ),
    Guard(
        name="identical_responses",
        columns=("distinct_responses",),
        condition=lambda row, limit: row["distinct_responses"] < limit.distinct_responses,
        meaning="the policy has collapsed: it answers different prompts with the same words",
        advice="read samples.jsonl; the reward pays for that answer whatever the prompt",
    ),
    Guard(
        name="no_eos",
        columns=("eos_fraction",),
        condition=lambda row, limit: row["eos_fraction"] < limit.eos_fraction,
        meaning="hardly any response ends by itself: the reward model reads them where they are "
        "cut off",
        advice="raise ppo.max_new_tokens or ppo.missing_eos_penalty",
    ),
    Guard(
        name="reward_scale",
        columns=("alpha_low_in_sd", "alpha_high_in_sd"),
        condition=lambda row, limit: (
            row["alpha_low_in_sd"] < limit.alpha_low or row["alpha_high_in_sd"] > limit.alpha_high
        ),
        meaning="a penalty is far from the reward's own scale: it is either negligible beside the "
        "score, or so large that the score is",
        advice="choose reward.alpha_values near one standard deviation of the score, or "
        'reward.unit="sd"',
        at_once=True,
    ),
)


class Watch:
    """Checks the rows of a run, from the first on. The same rows give the same warnings.

    Args:
        config: thresholds.
        alphas_sd: the penalties α, in standard deviations of the reference responses' scores.
    """

    def __init__(self, config: GuardConfig, alphas_sd: Sequence[float] = ()):
        self._config = config
        nonzero = [alpha for alpha in alphas_sd if alpha > 0]
        self._alphas = {
            "alpha_low_in_sd": min(nonzero, default=math.nan),
            "alpha_high_in_sd": max(nonzero, default=math.nan),
        }
        self._in_a_row = dict.fromkeys((guard.name for guard in GUARDS), 0)
        self._warnings: dict[str, dict] = {}
        self.nonfinite_steps = 0

    def check(self, row: Row) -> list[str]:
        """Checks the next row; returns the names of active guards and logs those that are new."""
        values = {name: row.get(name, math.nan) for guard in GUARDS for name in guard.columns}
        values |= self._alphas
        self.nonfinite_steps += values["skipped_updates"] > 0
        return [guard.name for guard in GUARDS if self._is_active(guard, values, int(row["step"]))]

    @property
    def warnings(self) -> list[dict]:
        """One {guard, first_step, steps, message} per guard that was active on `steps` steps."""
        return list(self._warnings.values())

    def _is_active(self, guard: Guard, row: Row, step: int) -> bool:
        """Counts the row, and returns whether the guard is active; logs it if it is new."""
        count = self._in_a_row[guard.name] + 1 if guard.condition(row, self._config) else 0
        self._in_a_row[guard.name] = count
        if count < (1 if guard.at_once else self._config.steps):
            return False
        if guard.name not in self._warnings:
            values = ", ".join(f"{name}={row[name]:.3g}" for name in guard.columns)
            message = f"{guard.meaning} ({values}); {guard.advice}"
            LOG.warning("step %d: guard %s: %s", step, guard.name, message)
            warning = {"guard": guard.name, "first_step": step, "steps": 0, "message": message}
            self._warnings[guard.name] = warning
        self._warnings[guard.name]["steps"] += 1
        return True
