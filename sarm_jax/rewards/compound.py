"""The compound reward, term by term.

    R_total = R_SARM(clamp(z)) − Σ_i α_i · 1[z_i > τ_i] − β · D(z_S)

The indicator reads the latents *before* the clamp. D is the logit of the discriminator in
`sarm_jax.rewards.density_ratio`.

Units: R_SARM is in the reward model's own units; for Llama-SARM-4B its standard deviation is about
0.05. α and β are in the same units with `unit="score"`, or in standard deviations σ of the
reference responses' scores with `unit="sd"`. R_total is always in the reward model's units. PPO
learns from (R_total − μ) / σ, where μ and σ are measured on reference responses.

Two bounds keep a policy from escaping its penalties:

- The penalties and the latent KL together take at most `penalty_cap` · σ from a response.
- A response that does not end has no end-of-turn token, which is where its latents are read.
  `learned_reward` therefore charges it the largest penalty of its batch, and gives it no credit for
  a score above μ.

A score or a latent that is not finite makes the learned reward NaN, so that no update is applied:
every comparison with NaN is false, and would otherwise waive the penalty.
"""

import dataclasses

import numpy as np

from sarm_jax.features.penalties import (
    cap_in_score,
    fired_penalties,
    share_within_cap,
    unit_scale,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import ENSEMBLES, Intervention, intervention
from sarm_jax.reporting.spread import standard_deviation

CLAMP_VALUES = ("clamp_set_values", "clamp_min_values", "clamp_max_values")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Options of the compound reward, the section `reward` of a config, with the same defaults.

    `tau_values` and `alpha_values` have one value per penalised feature. Each list of clamp values
    is empty or has one value per clamped feature. None among them leaves that bound open, and a
    feature that is set can have no bounds. `penalty_cap` is in σ of the reference responses'
    scores, whatever the `unit` of α and β. `ensemble` says how the scores of several heads become
    R_SARM (`sarm_jax.models.sarm`); the latents are the same for all heads.

    Raises:
        InputError: an option is invalid; the message names `reward.<field>` and its value.
    """

    penalize_features: tuple[int, ...] = ()
    tau_values: tuple[float, ...] = ()
    alpha_values: tuple[float, ...] = ()
    clamp_features: tuple[int, ...] = ()
    clamp_set_values: tuple[float | None, ...] = ()
    clamp_min_values: tuple[float | None, ...] = ()
    clamp_max_values: tuple[float | None, ...] = ()
    beta: float = 0.0
    latent_indices: tuple[int, ...] = ()
    unit: str = "score"
    penalty_cap: float = 10.0
    ensemble: str = "mean"

    def __post_init__(self) -> None:
        self._check_lengths()
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            ids = getattr(self, name)
            repeated = sorted({i for i in ids if ids.count(i) > 1})
            if repeated:
                raise InputError(f"reward.{name}: feature {repeated[0]} is given twice")
        for name in ("tau_values", "alpha_values"):
            for value in getattr(self, name):
                if not 0 <= value < float("inf"):
                    raise InputError(
                        f"reward.{name}: {value} must be a number that is not negative"
                    )
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"reward.beta={self.beta}: must be a number that is not negative")
        if self.unit not in ("score", "sd"):
            raise InputError(f"reward.unit={self.unit!r}: expected 'score' or 'sd'")
        if self.ensemble not in ENSEMBLES:
            raise InputError(f"reward.ensemble={self.ensemble!r}: expected 'mean' or 'min'")
        if not self.penalty_cap > 0:
            raise InputError(f"reward.penalty_cap={self.penalty_cap}: must be positive (inf: none)")

    def _check_lengths(self) -> None:
        """Raises InputError unless lists that belong together have equal lengths."""
        for name in ("tau_values", "alpha_values"):
            self._check_length(name, "penalize_features")
        bounds = [name for name in CLAMP_VALUES if getattr(self, name)]
        if bool(self.clamp_features) != bool(bounds):
            raise InputError(
                f"reward.clamp_features={','.join(map(str, self.clamp_features)) or '(none)'} with "
                f"{' '.join(f'reward.{name}' for name in bounds) or 'no clamp values'}: "
                "give both or neither"
            )
        for name in bounds:
            self._check_length(name, "clamp_features")

    def _check_length(self, name: str, features: str) -> None:
        count, expected = len(getattr(self, name)), len(getattr(self, features))
        if count != expected:
            raise InputError(
                f"reward.{name} has {count} values for {expected} reward.{features}: "
                "give one value per feature"
            )

    def alphas_sd(self, score_std: float) -> list[float]:
        """Returns α in σ of the reference responses' scores, `score_std`."""
        unit = 1.0 if self.unit == "sd" else score_std
        return [alpha / unit for alpha in self.alpha_values]

    def check_features(self, latent_size: int) -> None:
        """Raises InputError for features or clamps that a SARM of `latent_size` cannot have."""
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            for i in getattr(self, name):
                if not 0 <= i < latent_size:
                    raise InputError(
                        f"reward.{name}: feature {i} of a SARM with {latent_size} latents"
                    )
        self.clamp(latent_size)

    def clamp(
        self, latent_size: int, steer: dict[int, tuple[str, float]] | None = None
    ) -> Intervention | None:
        """Builds the clamp as an intervention; None if it changes nothing.

        `steer` holds the actions of a steering file, which are applied before the bounds.
        """
        if not self.clamp_features and not steer:
            return None

        def by_feature(values):
            pairs = zip(self.clamp_features, values, strict=False)
            return {i: v for i, v in pairs if v is not None}

        return intervention(
            latent_size,
            set_to=by_feature(self.clamp_set_values),
            minimum=by_feature(self.clamp_min_values),
            maximum=by_feature(self.clamp_max_values),
            steer=steer,
        )


@dataclasses.dataclass(frozen=True)
class RewardTerms:
    """The terms of R_total for B responses, in the reward model's units, float32.

    `score_b` is R_SARM. `penalty_bn` has a column per penalised feature: α_i if the feature fired,
    otherwise 0. If penalties and latent KL together exceed the cap, both `penalty_bn` and
    `kl_penalty_b` are scaled down to it.
    """

    score_b: np.ndarray
    penalty_bn: np.ndarray
    kl_penalty_b: np.ndarray

    @property
    def controls_b(self) -> np.ndarray:
        """Penalties and latent KL, which are taken from the score of each response, `[B]`."""
        return self.penalty_bn.sum(axis=1) + self.kl_penalty_b

    @property
    def total_b(self) -> np.ndarray:
        """R_total `[B]`."""
        return self.score_b - self.penalty_bn.sum(axis=1) - self.kl_penalty_b


def compound_reward(
    config: RewardConfig,
    *,
    score_b: np.ndarray,
    z_bn: np.ndarray,
    d_b: np.ndarray,
    score_std: float,
) -> RewardTerms:
    """Returns the terms of R_total.

    Args:
        config: α, β, τ, their unit, and the cap.
        score_b: R_SARM of each response.
        z_bn: latents of the penalised features, before the clamp.
        d_b: D(z_S), the discriminator's log density ratio of each response.
        score_std: σ of the reference responses' scores, in which the cap and `unit="sd"` are given.
    """
    scale = unit_scale(config.unit, score_std)
    penalty_bn = fired_penalties(
        z_bn, tau_values=config.tau_values, alpha_values=config.alpha_values, scale=scale
    )
    kl_penalty_b = scale * np.float32(config.beta) * d_b
    cap = cap_in_score(config.penalty_cap, score_std)
    share_b = share_within_cap(penalty_bn.sum(axis=1) + kl_penalty_b, cap)
    return RewardTerms(score_b, penalty_bn * share_b[:, None], kl_penalty_b * share_b)


@dataclasses.dataclass(frozen=True)
class ScoreScale:
    """μ and σ of the reward model's scores on reference responses.

    μ is the mean of the clamped scores, from which R_total begins. σ is the standard deviation of
    the scores before any clamp, so that a clamp which removes most of the reward does not magnify
    the rest.
    """

    mean: float
    std: float

    @classmethod
    def estimate(cls, score_b: np.ndarray, unclamped_b: np.ndarray) -> "ScoreScale":
        """Estimates μ from clamped and σ from unclamped scores of the same responses.

        Raises:
            InputError: the scores are equal up to rounding or not finite, so that nothing can be
                learned.
        """
        std = standard_deviation(unclamped_b)
        if not (np.isfinite(std) and std > 0):
            raise InputError(
                f"the reward model's scores on {len(score_b)} reference responses have a standard "
                f"deviation of {std}: there is nothing to learn from (is the SARM trained?)"
            )
        return cls(float(np.mean(score_b)), std)

    def normalise(self, total_b: np.ndarray) -> np.ndarray:
        """Returns (R_total − μ) / σ, float32."""
        return ((total_b - self.mean) / self.std).astype(np.float32)


def learned_reward(
    terms: RewardTerms, *, scale: ScoreScale, ended_b: np.ndarray, missing_eos_penalty: float
) -> np.ndarray:
    """Returns the reward that PPO learns from, `[B]` in σ, float32; NaN if R_total is not finite.

    ended        (R_total − μ) / σ
    not ended    min((R_SARM − μ) / σ, 0) − c / σ − missing_eos_penalty

    c is the most that penalties and latent KL take from any response of the batch, so the same text
    with an end is always worth more. With `missing_eos_penalty` = 0 responses need not end, and the
    first line holds for all of them.
    """
    ended_reward_b = scale.normalise(terms.total_b)
    ended_reward_b = np.where(np.isfinite(ended_reward_b), ended_reward_b, np.float32("nan"))
    if missing_eos_penalty == 0:
        return ended_reward_b
    most = np.maximum(terms.controls_b.max(), 0) / scale.std
    credited_b = np.minimum(scale.normalise(terms.score_b), 0)
    cut_off_reward_b = credited_b - np.float32(most + missing_eos_penalty)
    keeps_b = ended_b | np.isnan(ended_reward_b)
    return np.where(keeps_b, ended_reward_b, cut_off_reward_b).astype(np.float32)
