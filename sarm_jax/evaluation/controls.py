"""Scores of a SARM with and without its controls, from one pass through the trunk.

    plain        R(z) = w · z
    controlled   R(z') = R(z) + Σ_i w_i (z'_i − z_i),   z' the clamped and steered latents
    penalised    R(z') − min(Σ_j α_j · 1[z_j > τ_j], cap)

The head is linear and only the named features change, so that nothing runs twice. α is in the
reward model's units or in standard deviations ("sd"); in PPO those are of reference responses, here
of the plain scores that are evaluated. The cap is in those standard deviations too. The latent KL
is no property of a single response and is left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sarm_jax.features.feature_lists import LARGEST_ID
from sarm_jax.io.errors import InputError
from sarm_jax.io.strict_json import parse_json
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention

PLAIN, CONTROLLED, PENALISED = "plain", "controlled", "penalised"


@dataclasses.dataclass(frozen=True)
class Controls:
    """`change` clamps and steers; `tau` and `alpha` belong to `penalize_features`."""

    change: Intervention | None = None
    penalize_features: tuple[int, ...] = ()
    tau: tuple[float, ...] = ()
    alpha: tuple[float, ...] = ()
    unit: str = "score"
    penalty_cap: float = float("inf")

    @property
    def features(self) -> tuple[int, ...]:
        """Every feature that something is done about, the changed ones first."""
        return tuple(dict.fromkeys((*self.changed, *self.penalize_features)))

    @property
    def changed(self) -> tuple[int, ...]:
        """The features that are clamped or steered."""
        return () if self.change is None else tuple(np.asarray(self.change.indices).tolist())


@dataclasses.dataclass(frozen=True)
class Scored:
    """`variants`: scores `[B]` by name, float32; `z_bn`: the latents of `features`, unchanged."""

    variants: dict[str, np.ndarray]
    features: tuple[int, ...]
    z_bn: np.ndarray


def score_variants(
    model: RewardModel, prompts: Sequence[str], responses: Sequence[str], controls: Controls
) -> Scored:
    """The scores of every variant that the controls give."""
    plain_b, latents = model.store(prompts, responses, "scores")
    z_bn = latents.columns(controls.features)
    weight_f = np.asarray(model.model.score[...], np.float32)
    variants = apply_controls(controls, plain_b, z_bn, weight_f, float(plain_b.std()))
    return Scored(variants, controls.features, z_bn)


def apply_controls(
    controls: Controls,
    plain_b: np.ndarray,
    z_bn: np.ndarray,
    weight_f: np.ndarray,
    deviation: float,
) -> dict[str, np.ndarray]:
    """Scores `[B]` of every variant from plain ones and the latents of `controls.features`.

    `weight_f` is the head, `deviation` the unit "sd".
    """
    variants = {PLAIN: plain_b}
    controlled_b = plain_b
    if controls.change is not None:
        before_bn = z_bn[:, : len(controls.changed)]
        change = dataclasses.replace(controls.change, indices=jnp.arange(len(controls.changed)))
        after_bn = np.asarray(change(jnp.asarray(before_bn)))
        controlled_b = plain_b + (after_bn - before_bn) @ weight_f[list(controls.changed)]
        variants[CONTROLLED] = controlled_b
    if controls.penalize_features:
        variants[PENALISED] = controlled_b - penalties(controls, z_bn, deviation)[1]
    return variants


def penalties(
    controls: Controls, z_bn: np.ndarray, deviation: float
) -> tuple[np.ndarray, np.ndarray]:
    """(α_j · 1[z_j > τ_j] `[B, J]` of the penalised features, their capped sum `[B]`).

    `z_bn` are the latents of `controls.features`, `deviation` is the unit "sd".
    """
    places = [controls.features.index(j) for j in controls.penalize_features]
    alpha_j = np.asarray(controls.alpha, np.float32)
    alpha_j = alpha_j * np.float32(deviation if controls.unit == "sd" else 1.0)
    penalty_bj = (z_bn[:, places] > np.asarray(controls.tau, np.float32)) * alpha_j
    # Scores that are all the same, as a single one is, are no unit for a cap.
    limited = np.isfinite(controls.penalty_cap) and deviation > 0
    capped = controls.penalty_cap * deviation if limited else np.inf
    return penalty_bj, np.minimum(penalty_bj.sum(axis=1), np.float32(capped))


def read_steering(path: str | Path) -> dict[int, tuple[str, float]]:
    """A steering file, {"48659": ["*", 0.0], "7": ["+", 1.5]}: multiply a feature, or add to it."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected an object of features, as in {{'7': ['*', 0.0]}}")
    steering: dict[int, tuple[str, float]] = {}
    for key, action in content.items():
        if not key.isdecimal() or len(key) > 10 or int(key) > LARGEST_ID or int(key) in steering:
            raise InputError(f"{path}: {key!r}: expected a feature id, and each one once")
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
    largest = float(np.finfo(np.float32).max)
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -largest <= value <= largest
    )
