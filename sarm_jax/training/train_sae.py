"""Training of an SAE for a reward model that exists: states of responses → SAE → what it explains.

    1. The states h of responses, after the final norm: those that the head reads, and on request
       further ones of the responses.
    2. A TopK SAE learns to reconstruct (h − μ) s, where μ is the mean of the pooled training states
       and s scales their distance from μ to √D on average. Then μ and s are folded into the SAE's
       biases: it reads and reconstructs h itself, and its decoder rows have length 1.
    3. On held-out prompts: explained variance, dead latents, and the share of the variance of the
       reward that the features carry, against the error term.

The reward model is not changed. All randomness follows from `seed`.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.sae import SAE, TOPK, SAEConfig
from sarm_jax.parallel.processes import fetch
from sarm_jax.reporting.spread import is_constant
from sarm_jax.training.activations import (
    ActivationFolder,
    Activations,
    Conversation,
    Rows,
    all_equal,
    mean_row,
    pieces,
    temporary_folder,
)
from sarm_jax.training.divergence import check_summary, check_weights
from sarm_jax.training.held_out import draw_held_out
from sarm_jax.training.option_checks import OptionChecks
from sarm_jax.training.pair_set import encode_turn
from sarm_jax.training.preference_training import cast
from sarm_jax.training.progress import Log
from sarm_jax.training.sae_training import (
    SAETraining,
    pretrain_sae,
    reconstruct,
    sae_metrics,
)

LOG = logging.getLogger(__name__)
LEARNING_RATE = "train_sae.learning_rate"


@dataclasses.dataclass(frozen=True)
class TrainSAEConfig:
    """Options of the stage train_sae; `configs/base.py` describes them."""

    model: str
    responses_jsonl: tuple[str, ...]
    held_out_fraction: float  # of the prompts
    max_length: int  # in tokens; a longer conversation loses its beginning
    token_states: int  # most states besides the pooled ones; 0: none
    latent_size: int
    k: int
    activation: str  # of sarm_jax.models.sae
    steps: int
    batch_states: int
    learning_rate: float
    warmup_fraction: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    seed: int

    def __post_init__(self) -> None:
        check = OptionChecks("train_sae", self)
        check.of_an_sae()
        check.at_least(1, "steps", "batch_states")
        check.not_negative("token_states")
        check.positive("learning_rate")
        expected = f"expected {' or '.join(TOPK)}"
        check.require("activation", self.activation in TOPK, expected)

    def held_out(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Draws the held-out prompts and returns which rows have one, bool `[R]`.

        Raises:
            InputError: no prompt would be left for training or for evaluation.
        """
        held_out = draw_held_out(
            prompts, fraction=self.held_out_fraction, seed=self.seed, stage="train_sae"
        )
        return np.asarray([prompt in held_out for prompt in prompts])

    def sae_config(self, hidden_size: int) -> SAEConfig:
        """Returns the sizes and the activation of an SAE for states of so many dimensions."""
        return SAEConfig(hidden_size, self.latent_size, self.k, activation=self.activation)

    def sae_training(self) -> SAETraining:
        """Returns the options of the optimizer."""
        return SAETraining(
            steps=self.steps,
            batch_tokens=self.batch_states,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup_fraction,
            dead_after_steps=self.dead_after_steps,
            aux_k=self.aux_k,
            aux_weight=self.aux_weight,
            seed=self.seed,
            rate_option=LEARNING_RATE,
        )


def train_sae(
    config: TrainSAEConfig,
    model: LinearReward,
    tokenizer: Any,
    responses: Sequence[tuple[Prompt, str]],
    log: Log,
    folder: ActivationFolder | None = None,
) -> tuple[SAE, dict[str, Any]]:
    """Trains an SAE on the states of responses under a reward model.

    Args:
        config: options of the training.
        model: the reward model; an SAE that it has already is not read.
        tokenizer: its tokenizer.
        responses: (prompt, response) of each response.
        log: receives the metrics rows.
        folder: where the states are kept; None: in a temporary folder.

    Returns:
        (the SAE in the dtype of the model, the summary for sae_summary.json).

    Raises:
        InputError: the options do not fit the responses.
        DivergedError: training diverged.
        OSError: there is no disk space for the states.
    """
    with contextlib.nullcontext(folder) if folder else temporary_folder() as used:
        return _train(config, model, tokenizer, responses=responses, log=log, folder=used)


def _train(
    config: TrainSAEConfig,
    model: LinearReward,
    tokenizer: Any,
    *,
    responses: Sequence[tuple[Prompt, str]],
    log: Log,
    folder: ActivationFolder,
) -> tuple[SAE, dict[str, Any]]:
    """Trains an SAE, see `train_sae`."""
    responses = list(dict.fromkeys(responses))
    held_out_r = config.held_out([prompt for prompt, _ in responses])
    rows = [
        encode_response(model, tokenizer, prompt, response, config.max_length)
        for prompt, response in responses
    ]
    train = _collect(config, model, rows, keep_r=~held_out_r, folder=folder, name="train")
    held_out = _collect(config, model, rows, keep_r=held_out_r, folder=folder, name="held_out")
    mean_d, scale = scaling(train.pooled)
    sae, metrics = pretrain_sae(
        _new_sae(config, model),
        train=_scaled(train, mean_d, scale),
        held_out=_scaled(held_out, mean_d, scale),
        options=config.sae_training(),
        log=log,
        placement=model.trunk.placement,
    )
    sae = cast(folded(sae, mean_d, scale), model.score.dtype)
    check_weights(sae, LEARNING_RATE)
    summary = {
        "responses_train": int((~held_out_r).sum()),
        "responses_held_out": int(held_out_r.sum()),
        "prompts_held_out": len({responses[n][0] for n in np.flatnonzero(held_out_r)}),
        "states_train": len(train.x_nd),
        "sae": sae_metrics(sae, held_out)
        | {"dead_fraction": metrics["dead_fraction"]}
        | {"silent_fraction_held_out": silent_fraction(sae, held_out.pooled_rd)},
        "reward": reward_shares(model, sae, held_out.pooled_rd),
    }
    check_summary(summary, LEARNING_RATE)
    return sae, summary


def _collect(
    config: TrainSAEConfig,
    model: LinearReward,
    rows: Sequence[Conversation],
    *,
    keep_r: np.ndarray,
    folder: ActivationFolder,
    name: str,
) -> Activations:
    """Collects the states of the rows that `keep_r` marks: the pooled ones and `token_states`."""
    return folder.collect(
        name,
        model.trunk,
        [row for row, kept in zip(rows, keep_r, strict=True) if kept],
        max_tokens=int(keep_r.sum()) + config.token_states,
        seed=config.seed,
        standardised=False,
    )


def encode_response(
    model: LinearReward, tokenizer: Any, prompt: Prompt, response: str, max_length: int
) -> Conversation:
    """Encodes a response up to the token that the head reads."""
    row = encode_turn(tokenizer, prompt, response, max_length=max_length, ends_with_turn=False)
    ids, pad = row.ids, model.config.pad_token_id
    end = next((n for n in range(len(ids), 0, -1) if ids[n - 1] != pad), 1)
    return Conversation(ids[:end], max(row.turn_length - (len(ids) - end), 1))


def scaling(pooled_rd: Rows) -> tuple[np.ndarray, float]:
    """Returns the mean μ `[D]` of pooled states, and s that scales their distance from it to √D.

    Raises:
        InputError: the states are all equal.
    """
    if all_equal(pooled_rd):
        raise InputError(
            f"the states of the {len(pooled_rd)} responses that the SAE would learn from are all "
            "equal (is the reward model trained?)"
        )
    mean_d = mean_row(pooled_rd, np.float64)
    squares = np.float64(0)
    for x_kd in pieces(pooled_rd):
        squares += np.square(x_kd - mean_d).sum()
    variance = squares / (len(pooled_rd) * len(mean_d))
    return mean_d.astype(np.float32), float(1 / np.sqrt(variance))


def folded(sae: SAE, mean_d: np.ndarray, scale: float) -> SAE:
    """Returns the SAE of h that does what `sae` does with (h − μ) s.

    With z / s for z, encoder and decoder stay as they are.
    """
    graphdef, state = nnx.split(sae)
    new = nnx.merge(graphdef, state)
    new.pre_bias[...] = jnp.asarray(mean_d) + new.pre_bias[...] / scale
    new.latent_bias[...] = new.latent_bias[...] / scale
    return new


def reward_shares(model: LinearReward, sae: SAE, pooled_rd: np.ndarray) -> dict[str, float | None]:
    """Splits the variance of the rewards of pooled states `[R, D]` into features and error.

    With F = Σ_i z_i (W_dec,i · w) and E = e · w, which add up to R without its constant:
        share_features   Cov(F, R) / Var(R)
        share_error      Cov(E, R) / Var(R), which add up to 1
        r2               1 − Var(E) / Var(R): how well F alone predicts R
    All three are None if the rewards are equal.
    """
    weight_d = np.asarray(fetch(model.score[...]), np.float64)
    reward_r = pooled_rd.astype(np.float64) @ weight_d
    x_hat_rd, _ = reconstruct(sae, pooled_rd)
    feature_r = x_hat_rd.astype(np.float64) @ weight_d
    parts: dict[str, float | None] = dict.fromkeys(("share_features", "share_error", "r2"))
    if not is_constant(reward_r, axis=0):
        centred_r, error_r = reward_r - reward_r.mean(), reward_r - feature_r
        variance = np.square(centred_r).mean()
        parts["share_features"] = float((centred_r * feature_r).mean() / variance)
        parts["share_error"] = float((centred_r * error_r).mean() / variance)
        parts["r2"] = float(1 - error_r.var() / variance)
    return {"mean": float(reward_r.mean()), "std": float(reward_r.std()), **parts}


def silent_fraction(sae: SAE, x_nd: np.ndarray, batch: int = 256) -> float:
    """Returns the share of the latents that are 0 in all of the states `[N, D]`."""
    graphdef, state = nnx.split(sae)
    fired_f = np.zeros(sae.config.latent_size, bool)
    for start in range(0, len(x_nd), batch):
        x_bd = x_nd[start : start + batch]
        padded = np.pad(x_bd, ((0, batch - len(x_bd)), (0, 0)), mode="edge")
        fired_f |= fetch(_fired(graphdef, state, padded))
    return float(1 - fired_f.mean())


@partial(jax.jit, static_argnums=0)
def _fired(graphdef, state, x_bd):
    """Returns which latents are not 0 in some state of the batch, bool `[M]`."""
    return nnx.merge(graphdef, state).encode(x_bd).astype(bool).any(axis=0)


@dataclasses.dataclass(frozen=True)
class _ScaledRows:
    """Rows (x − μ) s of other rows x, which are read when they are asked for."""

    x_nd: Rows
    mean_d: np.ndarray
    scale: np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x_nd.shape

    def __len__(self) -> int:
        return len(self.x_nd)

    def __getitem__(self, index: Any) -> np.ndarray:
        return (self.x_nd[index] - self.mean_d) * self.scale


def _scaled(activations: Activations, mean_d: np.ndarray, scale: float) -> Activations:
    x_nd = _ScaledRows(activations.x_nd, mean_d, np.float32(scale))
    return Activations(x_nd, activations.pooled_n)


def _new_sae(config: TrainSAEConfig, model: LinearReward) -> SAE:
    """Makes an SAE of the configured size for the states of a reward model."""
    sae_config = config.sae_config(model.config.trunk.hidden_size)
    return SAE(sae_config, rngs=nnx.Rngs(config.seed))
