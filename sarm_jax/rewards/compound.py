"""The compound reward, term by term.

    R_total = R_SARM(clamp(z)) − Σ_i α_i · 1[z_i > τ_i] − β · D(z_S) − further terms

The indicator reads the latents *before* the clamp. D is the logit of the discriminator in
`sarm_jax.rewards.density_ratio`. The further terms are off by default:

    probe_penalty · 1[p · h > τ]     a dense probe p on the pooled state h, `features.dense_probe`
    distance_penalty · d(h)          distance of h from human responses, `rewards.human_states`
    length_penalty · T               response tokens T
    R_SARM − B(R_SARM)               B(R) = μ + u · (1 / (1 + exp(−(R − μ) / u)) − ½)   bounded

B is the reward of PAR (Fu et al. 2502.18770), the sigmoid of the score minus that of reference
responses. u is 1 with `unit="score"`, as there, or σ with `unit="sd"`. Deliberate deviations: μ is
the mean over reference responses to many prompts, not the score of one to the same prompt, and ½ is
taken off, so that reference responses have the reward μ on average, as without the bound.

Units: R_SARM is in the reward model's own units; for Llama-SARM-4B its standard deviation is about
0.05. α and β are in the same units with `unit="score"`, or in standard deviations σ of the
reference responses' scores with `unit="sd"`. R_total is always in the reward model's units. PPO
learns from (R_total − μ) / σ, where μ and σ are measured on reference responses.

Two bounds keep a policy from escaping its penalties:

- The penalties of features, the latent KL, and the penalties on probe and distance together take
  at most `penalty_cap` · σ from a response. The length penalty is beside the cap: within it, a
  response that reaches the cap could grow for free.
- A response that does not end has no end-of-turn token, which is where its latents are read.
  `learned_reward` therefore charges it the largest penalty of its batch, and gives it no credit for
  a score above μ.

A score or a latent that is not finite makes the learned reward NaN, so that no update is applied:
every comparison with NaN is false, and would otherwise waive the penalty.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.special import expit

from sarm_jax.features.penalties import (
    cap_in_score,
    fired_penalties,
    share_within_cap,
    unit_scale,
)
from sarm_jax.io.errors import InputError
from sarm_jax.reporting.spread import standard_deviation
from sarm_jax.rewards.reward_config import RewardConfig


@dataclasses.dataclass(frozen=True)
class StateReadings:
    """Numbers that terms read from the pooled states of B responses; None if no term reads them.

    `margin_b` is p · h − τ of the dense probe, `distance_b` the distance from human responses.
    """

    margin_b: np.ndarray | None = None
    distance_b: np.ndarray | None = None

    @property
    def means(self) -> dict[str, float]:
        """The means over the responses, by the names of metrics.csv."""
        means = {}
        if self.margin_b is not None:
            means["probe_margin"] = float(self.margin_b.mean())
            means["probe_above_tau"] = float((self.margin_b > 0).mean())
        if self.distance_b is not None:
            means["state_distance"] = float(self.distance_b.mean())
        return means


NO_READINGS = StateReadings()


@dataclasses.dataclass(frozen=True)
class RewardTerms:
    """The terms of R_total for B responses, in the reward model's units, float32.

    `score_b` is R_SARM. `penalty_bn` has a column per penalised feature: α_i if the feature fired,
    otherwise 0. `further` has what each term of `RewardConfig.further_terms` takes, `[B]` by name.
    If the terms within the cap together exceed it, they are all scaled down to it. `screened_b` is
    True for responses that the policy does not learn from; None without `screen`.
    """

    score_b: np.ndarray
    penalty_bn: np.ndarray
    kl_penalty_b: np.ndarray
    further: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    screened_b: np.ndarray | None = None

    @property
    def controls_b(self) -> np.ndarray:
        """The sum of the terms that are taken from the bounded score of each response, `[B]`."""
        controls_b = self.penalty_bn.sum(axis=1) + self.kl_penalty_b
        for name, taken_b in self.further.items():
            if name != "bound_deduction":
                controls_b = controls_b + taken_b
        return controls_b

    @property
    def bounded_b(self) -> np.ndarray:
        """The score after its bound, `[B]`; the score itself if there is no bound."""
        if "bound_deduction" not in self.further:
            return self.score_b
        return self.score_b - self.further["bound_deduction"]

    @property
    def total_b(self) -> np.ndarray:
        """R_total `[B]`."""
        total_b = self.score_b - self.penalty_bn.sum(axis=1) - self.kl_penalty_b
        for taken_b in self.further.values():
            total_b = total_b - taken_b
        return total_b

    @property
    def further_means(self) -> dict[str, float]:
        """The means of the further terms over the responses, by the names of metrics.csv."""
        means = {name: float(taken_b.mean()) for name, taken_b in self.further.items()}
        if self.screened_b is not None:
            means["screened_fraction"] = float(self.screened_b.mean())
        return means

    def further_of(self, b: int) -> dict[str, float | bool]:
        """Returns the further terms of response b by name, and whether it is screened."""
        terms: dict[str, float | bool] = {
            name: float(taken_b[b]) for name, taken_b in self.further.items()
        }
        return terms if self.screened_b is None else terms | {"screened": bool(self.screened_b[b])}


def compound_reward(
    config: RewardConfig,
    *,
    score_b: np.ndarray,
    z_bn: np.ndarray,
    d_b: np.ndarray,
    score_std: float,
    score_mean: float,
    states: StateReadings = NO_READINGS,
    lengths_b: np.ndarray | None = None,
) -> RewardTerms:
    """Computes the terms of R_total for B responses.

    Args:
        config: α, β, τ, their unit, the cap, and the further terms.
        score_b: R_SARM of each response, `[B]`.
        z_bn: latents of the penalised features before the clamp, `[B, N]`.
        d_b: D(z_S), the discriminator's log density ratio of each response, `[B]`.
        score_std: σ of the reference responses' scores, in which the cap and `unit="sd"` are given.
        score_mean: μ of the reference responses' scores, around which the bound is.
        states: what the further terms read from the pooled states.
        lengths_b: number of tokens of each response, `[B]`; None if they have no penalty.
    """
    scale = unit_scale(config.unit, score_std)
    alphas = (0.0,) * len(config.penalize_features) if config.screen else config.alpha_values
    penalty_bn = fired_penalties(
        z_bn, tau_values=config.tau_values, alpha_values=alphas, scale=scale
    )
    kl_penalty_b = scale * np.float32(config.beta) * d_b
    within_cap = _state_penalties(config, states, scale)
    cap = cap_in_score(config.penalty_cap, score_std)
    sum_b = sum(within_cap.values(), start=penalty_bn.sum(axis=1) + kl_penalty_b)
    share_b = share_within_cap(sum_b, cap)
    further = {name: taken_b * share_b for name, taken_b in within_cap.items()}
    if config.length_penalty:
        assert lengths_b is not None
        further["length_penalty"] = (scale * config.length_penalty * lengths_b).astype(np.float32)
    if config.bound:
        further["bound_deduction"] = _bound_deduction(score_b, mean=score_mean, scale=scale)
    terms = RewardTerms(score_b, penalty_bn * share_b[:, None], kl_penalty_b * share_b, further)
    return _screened(config, terms, z_bn, states) if config.screen else terms


def _state_penalties(
    config: RewardConfig, states: StateReadings, scale: np.float32
) -> dict[str, np.ndarray]:
    """Returns what the terms on the pooled state take before the cap, by name.

    A probe whose margin is not finite takes NaN, as features do.
    """
    taken = {}
    if config.probe_penalty:
        assert states.margin_b is not None
        taken["probe_penalty"] = fired_penalties(
            states.margin_b[:, None],
            tau_values=(0.0,),
            alpha_values=(config.probe_penalty,),
            scale=scale,
        )[:, 0]
    if config.distance_penalty:
        assert states.distance_b is not None
        taken["distance_penalty"] = scale * np.float32(config.distance_penalty) * states.distance_b
    return taken


def _bound_deduction(score_b: np.ndarray, *, mean: float, scale: np.float32) -> np.ndarray:
    """Returns R − B(R), which is negative below μ; NaN if the score is not finite."""
    centred_b = score_b.astype(np.float64) - mean
    bounded_b = float(scale) * (expit(centred_b / float(scale)) - 0.5)
    return (centred_b - bounded_b).astype(np.float32)


def _screened(
    config: RewardConfig, terms: RewardTerms, z_bn: np.ndarray, states: StateReadings
) -> RewardTerms:
    """Marks the responses on which a feature or the probe fires as screened.

    A response whose total is not finite is never screened, so that the error is not overlooked.
    """
    fires_b = (z_bn > np.asarray(config.tau_values, np.float32)).any(axis=1)
    if states.margin_b is not None:
        fires_b = fires_b | (states.margin_b > 0)
        finite_b = np.isfinite(states.margin_b)
        terms = dataclasses.replace(
            terms, score_b=np.where(finite_b, terms.score_b, np.float32("nan"))
        )
    return dataclasses.replace(terms, screened_b=fires_b & np.isfinite(terms.total_b))


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

    def describe(self, responses: int) -> str:
        """Describes μ and σ, and how uncertain σ of so many responses is, for the log."""
        error = 1 / np.sqrt(2 * max(responses - 1, 1))  # of a normal distribution's σ
        return (
            f"{responses} reference responses score {self.mean:.4f} ± {self.std:.4f}; σ, the unit "
            f"of α and β in sd, is uncertain by {error:.0%}"
        )

    def normalise(self, total_b: np.ndarray) -> np.ndarray:
        """Returns (R_total − μ) / σ, float32."""
        return ((total_b - self.mean) / self.std).astype(np.float32)


def learned_reward(
    terms: RewardTerms, *, scale: ScoreScale, ended_b: np.ndarray, missing_eos_penalty: float
) -> np.ndarray:
    """Returns the reward that PPO learns from, `[B]` in σ, float32; NaN if R_total is not finite.

    ended        (R_total − μ) / σ
    not ended    min((R_SARM − μ) / σ, 0) − c / σ − missing_eos_penalty

    c is the most that the terms take from any response of the batch that is not screened, so the
    same text with an end is always worth more. With `missing_eos_penalty` = 0 responses need not
    end, and the first line holds for all of them.
    """
    ended_reward_b = scale.normalise(terms.total_b)
    ended_reward_b = np.where(np.isfinite(ended_reward_b), ended_reward_b, np.float32("nan"))
    if missing_eos_penalty == 0:
        return ended_reward_b
    controls_b = terms.controls_b
    if terms.screened_b is not None:
        controls_b = np.append(controls_b[~terms.screened_b], np.float32(0))
    most = np.maximum(controls_b.max(), 0) / scale.std
    credited_b = np.minimum(scale.normalise(terms.bounded_b), 0)
    cut_off_reward_b = credited_b - np.float32(most + missing_eos_penalty)
    keeps_b = ended_b | np.isnan(ended_reward_b)
    return np.where(keeps_b, ended_reward_b, cut_off_reward_b).astype(np.float32)
