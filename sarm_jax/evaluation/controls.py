"""Scores of a SARM with and without its controls, from one pass through the trunk.

    plain        R(z) = w · z
    controlled   R(z') = R(z) + Σ_i w_i (z'_i − z_i),   z' the clamped and steered latents
    penalised    R(z') − min(Σ_j α_j · 1[z_j > τ_j], cap)

The head is linear and only the controlled features change, so one forward pass is enough; the least
score of an ensemble (`reward.ensemble="min"`) is not linear, and takes a second pass. α is in
the reward model's units or in standard deviations of the score ("sd"); the cap is always in
standard deviations. Here they are standard deviations of the plain scores under evaluation, in PPO
those of reference responses. The latent KL is not a property of a single response and is left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sarm_jax.features.feature_lists import LARGEST_ID
from sarm_jax.features.penalties import cap_in_score, capped, fired_penalties, unit_scale
from sarm_jax.io.errors import InputError
from sarm_jax.io.float32 import fits_float32
from sarm_jax.io.json_files import read_json
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention
from sarm_jax.parallel.finite import require_finite
from sarm_jax.reporting.spread import standard_deviation

PLAIN, CONTROLLED, PENALISED = "plain", "controlled", "penalised"


@dataclasses.dataclass(frozen=True)
class Controls:
    """The features that are clamped, steered or penalised.

    `intervention` clamps and steers. `tau_values` and `alpha_values` belong to `penalize_features`,
    one for each. `unit` is the unit of the alphas, "score" or "sd"; `penalty_cap` is in standard
    deviations of the score.
    """

    intervention: Intervention | None = None
    penalize_features: tuple[int, ...] = ()
    tau_values: tuple[float, ...] = ()
    alpha_values: tuple[float, ...] = ()
    unit: str = "score"
    penalty_cap: float = float("inf")

    @property
    def features(self) -> tuple[int, ...]:
        """All controlled features, the changed ones first."""
        return tuple(dict.fromkeys((*self.changed_features, *self.penalize_features)))

    @property
    def changed_features(self) -> tuple[int, ...]:
        """The features that are clamped or steered."""
        if self.intervention is None:
            return ()
        return tuple(np.asarray(self.intervention.indices).tolist())


@dataclasses.dataclass(frozen=True)
class ScoredVariants:
    """Scores of B responses under every variant of the controls.

    `variants` maps the name of a variant to scores `[B]`, float32. `z_bn` are the latents of
    `features` before any change.
    """

    variants: dict[str, np.ndarray]
    features: tuple[int, ...]
    z_bn: np.ndarray


def score_variants(
    model: RewardModel, prompts: Sequence[str], responses: Sequence[str], controls: Controls
) -> ScoredVariants:
    """Scores responses under every variant that the controls define."""
    plain_b, latents = model.store(prompts, responses, "scores")
    z_bn = latents.columns(controls.features)
    variants = apply_controls(
        controls,
        plain_b=plain_b,
        z_bn=z_bn,
        weight_f=model.feature_weights(),
        score_std=standard_deviation(plain_b),
        controlled_b=rescored(model, prompts, responses, controls.intervention),
    )
    return ScoredVariants(variants, controls.features, z_bn)


def rescored(
    model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    change: Intervention | None,
) -> np.ndarray | None:
    """Scores responses under a change if its effect cannot be computed from the latents.

    Returns:
        The scores `[B]`; None without a change, and if the score is linear in the latents.
    """
    if change is None or model.is_linear:
        return None
    return model.score(prompts, responses, change, np.asarray(change.indices).tolist())[0]


def apply_controls(
    controls: Controls,
    *,
    plain_b: np.ndarray,
    z_bn: np.ndarray,
    weight_f: np.ndarray,
    score_std: float,
    controlled_b: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns the scores `[B]` of every variant by name, in the order plain, controlled, penalised.

    Args:
        controls: the controls; a variant that they do not define is absent.
        plain_b: scores without controls.
        z_bn: latents of `controls.features`.
        weight_f: weights w of the linear head.
        score_std: the standard deviation that the unit "sd" and the cap refer to.
        controlled_b: scores under the intervention from `rescored`, if it computed them.

    Raises:
        InputError: a score is not finite.
    """
    variants = {PLAIN: plain_b}
    if controlled_b is not None:
        variants[CONTROLLED] = controlled_b
    elif controls.intervention is None:
        controlled_b = plain_b
    else:
        changed = list(controls.changed_features)
        before_bn = z_bn[:, : len(changed)]
        on_columns = dataclasses.replace(controls.intervention, indices=jnp.arange(len(changed)))
        after_bn = np.asarray(on_columns(jnp.asarray(before_bn)))
        controlled_b = plain_b + (after_bn - before_bn) @ weight_f[changed]
        variants[CONTROLLED] = controlled_b
    if controls.penalize_features:
        variants[PENALISED] = controlled_b - penalties(controls, z_bn, score_std)[1]
    require_finite(variants, "scores under clamps, steering and penalties")
    return variants


def penalties(
    controls: Controls, z_bn: np.ndarray, score_std: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the penalties of each response in the reward model's units.

    Args:
        controls: the controls, with J penalised features.
        z_bn: latents of `controls.features`.
        score_std: the standard deviation that the unit "sd" and the cap refer to.

    Returns:
        α_j · 1[z_j > τ_j] `[B, J]`, and their capped sum `[B]`.
    """
    columns = [controls.features.index(j) for j in controls.penalize_features]
    penalty_bj = fired_penalties(
        z_bn[:, columns],
        tau_values=controls.tau_values,
        alpha_values=controls.alpha_values,
        scale=unit_scale(controls.unit, score_std) if columns else np.float32(1),
    )
    cap = cap_in_score(controls.penalty_cap, score_std)
    return penalty_bj, capped(penalty_bj.sum(axis=1), cap)


def read_steering(path: str | Path) -> dict[int, tuple[str, float]]:
    """Reads a steering file such as {"48659": ["*", 0.0], "7": ["+", 1.5]}.

    Returns:
        feature id → (operation, number); "*" multiplies the latent, "+" adds to it.

    Raises:
        InputError: the file cannot be read, is empty, or has another structure.
    """
    expected = "an object of features, as in {'7': ['*', 0.0]}"
    content = read_json(path, expected=expected, allow_nan=False)
    if not content:
        raise InputError(f"{path}: expected {expected}")
    steering: dict[int, tuple[str, float]] = {}
    for key, action in content.items():
        if not key.isdecimal() or len(key) > 10 or int(key) > LARGEST_ID or int(key) in steering:
            raise InputError(f"{path}: {key!r}: expected a feature id that occurs once")
        if not _is_action(action):
            raise InputError(
                f"{path}: feature {key}: found {action!r}, expected ['*' or '+', number]"
            )
        steering[int(key)] = (action[0], float(action[1]))
    return steering


def _is_action(action: Any) -> bool:
    if not (isinstance(action, list) and len(action) == 2 and action[0] in ("*", "+")):
        return False
    value = action[1]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and fits_float32(value)
