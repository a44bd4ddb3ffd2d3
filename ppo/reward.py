"""The compound reward, term by term.

    R_total = R_SARM(clamp(z)) − Σ_i α_i · 1[z_i > τ_i] − β · D(z_S)

The indicator reads the latents *before* the clamp. D is the logit of `density_ratio`.

Units. R_SARM is in the reward model's own units (for Llama-SARM-4B a standard deviation is about
0.05). α and β are in the same units with `unit="score"`, or in standard deviations of the
reference responses' scores with `unit="sd"`. R_total is always reported in the reward model's
units; PPO then learns from (R_total − μ) / σ, μ and σ being those of the reference responses.

Two bounds keep a policy from escaping its penalties. What the controls take from a response,
Σ_i α_i · 1[z_i > τ_i] + β · D, is at most `penalty_cap` σ. And a response that does not end has
dodged the end-of-turn token that everything is read at, so `learned_reward` charges it as much as
any response of its batch, and believes no score above the reference responses' mean.

A score or a latent that is not finite makes the learned reward NaN, which no update survives: a
comparison with NaN is false, and would otherwise waive the penalty.
"""

import dataclasses

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import Intervention, intervention


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The controlled features; lists that belong together have equal lengths.

    A clamp value of None leaves that bound open; `set` excludes the other two. `penalty_cap` is in
    σ of the reference responses' scores, whatever the `unit` of α and β.
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

    def __post_init__(self) -> None:
        self._check_lengths()
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            ids = getattr(self, name)
            repeated = sorted({i for i in ids if ids.count(i) > 1})
            if repeated:
                raise InputError(f"{name}: feature {repeated[0]} is given twice")
        for name in ("tau_values", "alpha_values"):
            for value in getattr(self, name):
                if not 0 <= value < float("inf"):
                    raise InputError(f"{name}: {value} must be a number that is not negative")
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"beta={self.beta}: must be a number that is not negative")
        if self.unit not in ("score", "sd"):
            raise InputError(f"reward.unit={self.unit!r}: expected 'score' or 'sd'")
        if not self.penalty_cap > 0:
            raise InputError(f"reward.penalty_cap={self.penalty_cap}: must be positive (inf: none)")

    def _check_lengths(self) -> None:
        groups = [("penalize_features", name) for name in ("tau_values", "alpha_values")]
        for first, second in groups:
            have, want = len(getattr(self, second)), len(getattr(self, first))
            if have != want:
                raise InputError(
                    f"{second} has {have} values for {want} {first}: give one value per feature"
                )
        bounds = ("clamp_set_values", "clamp_min_values", "clamp_max_values")
        given = [n for n in bounds if getattr(self, n)]
        if bool(self.clamp_features) != bool(given):
            raise InputError(
                f"clamp_features={','.join(map(str, self.clamp_features)) or '(none)'} with "
                f"{' '.join(given) or 'no clamp values'}: give both or neither"
            )
        for name in given:
            if len(getattr(self, name)) != len(self.clamp_features):
                raise InputError(
                    f"{name} has {len(getattr(self, name))} values for "
                    f"{len(self.clamp_features)} clamp_features: give one value per feature"
                )

    def alphas_sd(self, score_std: float) -> list[float]:
        """α in σ of the reference responses' scores, `score_std`."""
        unit = 1.0 if self.unit == "sd" else score_std
        return [alpha / unit for alpha in self.alpha_values]

    def check_features(self, latent_size: int) -> None:
        """Raises InputError for features or clamps that a SARM of `latent_size` cannot have."""
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            for i in getattr(self, name):
                if not 0 <= i < latent_size:
                    raise InputError(f"{name}: feature {i} of a SARM with {latent_size} latents")
        self.clamp(latent_size)

    def clamp(
        self, latent_size: int, steer: dict[int, tuple[str, float]] | None = None
    ) -> Intervention | None:
        """The clamp, after the steering of a steering file, as an intervention; or None."""
        if not self.clamp_features and not steer:
            return None

        def chosen(values):
            pairs = zip(self.clamp_features, values, strict=False)
            return {i: v for i, v in pairs if v is not None}

        return intervention(
            latent_size,
            set_to=chosen(self.clamp_set_values),
            minimum=chosen(self.clamp_min_values),
            maximum=chosen(self.clamp_max_values),
            steer=steer,
        )


@dataclasses.dataclass(frozen=True)
class RewardTerms:
    """The terms of R_total for B responses, in the reward model's units, float32.

    `penalty_bn` has a column per penalised feature: α_i where the feature fired, else 0. Where the
    controls together exceed the cap, both they and `kl_penalty_b` are scaled down to meet it.
    """

    rm_score_b: np.ndarray
    penalty_bn: np.ndarray
    kl_penalty_b: np.ndarray

    @property
    def controls_b(self) -> np.ndarray:
        """What the controls take from each response `[B]`."""
        return self.penalty_bn.sum(axis=1) + self.kl_penalty_b

    @property
    def total_b(self) -> np.ndarray:
        """R_total `[B]`."""
        return self.rm_score_b - self.penalty_bn.sum(axis=1) - self.kl_penalty_b


def compound_reward(
    config: RewardConfig,
    score_b: np.ndarray,
    z_bn: np.ndarray,
    log_ratio_b: np.ndarray,
    score_std: float,
) -> RewardTerms:
    """R_total of responses scored `score_b`, with the penalised features' latents `z_bn`.

    `log_ratio_b` is D(z_S); `score_std` the σ that the cap and `unit="sd"` refer to.
    """
    scale = np.float32(score_std if config.unit == "sd" else 1.0)
    tau_n = np.asarray(config.tau_values, np.float32)
    alpha_n = np.asarray(config.alpha_values, np.float32)
    penalty_bn = np.where(z_bn > tau_n, scale * alpha_n, np.float32(0))
    penalty_bn = np.where(np.isfinite(z_bn), penalty_bn, np.float32("nan"))
    kl_penalty_b = scale * np.float32(config.beta) * log_ratio_b
    cap = np.float32(config.penalty_cap * score_std)
    controls_b = penalty_bn.sum(axis=1) + kl_penalty_b
    share_b = np.ones_like(controls_b)
    np.divide(cap, controls_b, out=share_b, where=controls_b > cap)
    return RewardTerms(score_b, penalty_bn * share_b[:, None], kl_penalty_b * share_b)


@dataclasses.dataclass(frozen=True)
class ScoreScale:
    """μ and σ of the reward model's scores on reference responses.

    μ is that of the clamped scores, from which R_total begins; σ is that of the scores before any
    clamp, so that what a clamp takes away is gone, and the rest is not magnified in its place.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, score_b: np.ndarray, unclamped_b: np.ndarray) -> "ScoreScale":
        """Estimates the scale; constant scores are an error, since nothing can be learned."""
        std = float(np.std(unclamped_b))
        if not (np.isfinite(std) and std > 0):
            raise InputError(
                f"the reward model's scores on {len(score_b)} reference responses have a standard "
                f"deviation of {std}: there is nothing to learn from (is the SARM trained?)"
            )
        return cls(float(np.mean(score_b)), std)

    def normalise(self, total_b: np.ndarray) -> np.ndarray:
        """(R_total − μ) / σ, float32."""
        return ((total_b - self.mean) / self.std).astype(np.float32)


def learned_reward(
    terms: RewardTerms, scale: ScoreScale, ended_b: np.ndarray, missing_eos_penalty: float
) -> np.ndarray:
    """What PPO learns from `[B]`, in σ, float32: normalised R_total where the response ended.

    One that did not end gets min((R_SARM − μ) / σ, 0) − c / σ − `missing_eos_penalty`, c being the
    most that the controls take from any response of the batch: the same words with an end are
    always worth more. A `missing_eos_penalty` of 0 says that responses need not end, and no
    difference is made. NaN where R_total is not finite.
    """
    valid_b = scale.normalise(terms.total_b)
    valid_b = np.where(np.isfinite(valid_b), valid_b, np.float32("nan"))
    if missing_eos_penalty == 0:
        return valid_b
    most = np.maximum(terms.controls_b.max(), 0) / scale.std
    believed_b = np.minimum(scale.normalise(terms.rm_score_b), 0)
    invalid_b = believed_b - np.float32(most + missing_eos_penalty)
    return np.where(ended_b | np.isnan(valid_b), valid_b, invalid_b).astype(np.float32)
