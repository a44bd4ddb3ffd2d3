"""Training a SARM from any Llama-family chat model: trunk → activations → SAE → preferences.

    1. the first `source_layer` layers of the model are the trunk;
    2. its states on the assistant turns of the training pairs pretrain the SAE (`sae_training`);
    3. Bradley–Terry on the pairs trains the head, and in modes 1–3 more (`preference_training`);
    4. everything reported is measured on prompts that neither step has seen.

Source: arXiv 2508.08746. Everything random follows from `seed`.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import encode_conversation, encode_prompt
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.reporting.statistics import wilson_interval
from sarm_jax.training.preference_training import PreferenceTraining, cast, fine_tune, train_head
from sarm_jax.training.sae_training import (
    Activations,
    Conversation,
    Log,
    SAETraining,
    collect_activations,
    pretrain_sae,
    sae_metrics,
)

LOG = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class TrainSARMConfig:
    """All options of the stage; the units stand in `configs/base.py`."""

    pairs_jsonl: tuple[str, ...]
    held_out_fraction: float  # of the prompts
    max_length: int  # tokens of a conversation; longer ones lose their beginning
    source_layer: int
    latent_size: int
    k: int
    use_topk: bool  # `sarm_use_activation`: False lets the head read the pre-activations
    mode: int  # `sarm_train_mode`: see preference_training
    reconstruction_weight: float  # `sarm_rec_lambda`
    sae_tokens: int  # activations to collect, at most
    sae_steps: int
    sae_batch_tokens: int
    sae_learning_rate: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    epochs: int
    batch_size: int  # pairs
    learning_rate: float  # of the trunk, and of the SAE in modes 2 and 3
    head_learning_rate: float
    weight_decay: float
    warmup_fraction: float
    seed: int

    def __post_init__(self) -> None:
        self._require("mode", self.mode in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
        self._require("held_out_fraction", 0 < self.held_out_fraction < 1, "must lie in (0, 1)")
        self._require("warmup_fraction", 0 <= self.warmup_fraction < 1, "must lie in [0, 1)")
        for name in (
            "source_layer",
            "latent_size",
            "k",
            "max_length",
            "sae_tokens",
            "sae_steps",
            "sae_batch_tokens",
            "dead_after_steps",
            "aux_k",
            "epochs",
            "batch_size",
        ):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("sae_learning_rate", "learning_rate", "head_learning_rate"):
            self._require(name, 0 < getattr(self, name) < np.inf, "must be positive")
        for name in ("reconstruction_weight", "aux_weight", "weight_decay"):
            self._require(name, 0 <= getattr(self, name) < np.inf, "must not be negative")
        at_most = f"must be at most latent_size={self.latent_size}"
        self._require("max_length", self.max_length >= 2, "must be at least 2")
        self._require("seed", 0 <= self.seed < 2**31, "must lie in [0, 2^31)")
        self._require("k", self.k <= self.latent_size, at_most)
        self._require("aux_k", self.aux_k <= self.latent_size, at_most)

    def _require(self, name: str, condition: bool, rule: str) -> None:
        if not condition:
            raise InputError(f"train_sarm.{name}={getattr(self, name)}: {rule}")

    def check_layers(self, layers: int) -> None:
        """Raises InputError for a model of so many layers that the trunk cannot be cut from."""
        most = f"the model has {layers} layers"
        self._require("source_layer", 1 <= self.source_layer <= layers, most)

    def held_out(self, pairs: Sequence[dict[str, str]]) -> set[str]:
        """The held-out prompts; InputError where either side of the split would be empty."""
        prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
        order = np.random.default_rng(self.seed).permutation(len(prompts))
        held_out = order[: round(self.held_out_fraction * len(prompts))]
        if not 0 < len(held_out) < len(prompts):
            raise InputError(
                f"train_sarm.held_out_fraction={self.held_out_fraction}: holds out {len(held_out)} "
                f"of {len(prompts)} prompts; training and evaluation each need at least one"
            )
        return {prompts[i] for i in held_out}

    def sae_training(self) -> SAETraining:
        """The options of SAE pretraining."""
        return SAETraining(
            steps=self.sae_steps,
            batch_tokens=self.sae_batch_tokens,
            learning_rate=self.sae_learning_rate,
            warmup_fraction=self.warmup_fraction,
            dead_after_steps=self.dead_after_steps,
            aux_k=self.aux_k,
            aux_weight=self.aux_weight,
            seed=self.seed,
        )

    def preference_training(self) -> PreferenceTraining:
        """The options of Bradley–Terry training."""
        shared = {f.name for f in dataclasses.fields(PreferenceTraining)}
        return PreferenceTraining(**{name: getattr(self, name) for name in shared})


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs as tokens: each conversation once in `rows`, pairs as (chosen, rejected) row numbers.

    `pairs_p2 [P, 2]`; `prompt_p [P]` numbers the prompts, `held_out_p [P]` is True for the pairs
    of held-out prompts, `source_p` names where a pair comes from.
    """

    rows: list[Conversation]
    pairs_p2: np.ndarray
    prompt_p: np.ndarray
    held_out_p: np.ndarray
    source_p: list[str]


def train_sarm(
    config: TrainSARMConfig,
    policy: Llama,
    tokenizer: Any,
    pairs: Sequence[dict[str, str]],
    log: Log,
) -> tuple[SARM, dict[str, Any]]:
    """(the SARM in the policy's dtype, a summary for JSON); `log` receives the metrics rows.

    `pairs` are {prompt, chosen, rejected}, optionally with `source`. In mode 0 the trunk shares
    its weights with `policy`; they are never overwritten. Raises `InputError` where the options
    do not fit the model or the pairs.
    """
    start = time.perf_counter()
    data = encode_pairs(tokenizer, pairs, config)
    trunk = truncate(policy, config.source_layer)
    dtype = trunk.embed_tokens.dtype

    train_rows, held_out_rows = _split_rows(data)
    activations = collect_activations(trunk, data.rows, config.sae_tokens, config.seed)
    collected = time.perf_counter()
    sae = SAE(
        SAEConfig(trunk.config.hidden_size, config.latent_size, config.k, config.use_topk),
        rngs=nnx.Rngs(config.seed),
    )
    sae, metrics = pretrain_sae(
        sae,
        _of_rows(activations, train_rows),
        _of_rows(activations, held_out_rows),
        config.sae_training(),
        log,
    )
    LOG.info("SAE: %s", {name: round(value, 4) for name, value in metrics.items()})
    pretrained = time.perf_counter()
    summary: dict[str, Any] = {"sae": metrics}

    sarm = assemble(trunk, sae)
    options, train_pairs = config.preference_training(), data.pairs_p2[~data.held_out_p]
    if config.mode == 0:
        head_m = train_head(sae, activations.pooled_rd, train_pairs, options, log)
        sarm.score[...] = head_m
    else:
        sarm = fine_tune(sarm, data.rows, train_pairs, options, log)
    sarm = cast(sarm, dtype)
    trained = time.perf_counter()
    if config.mode > 0:
        activations = collect_activations(sarm.trunk, data.rows, config.sae_tokens, config.seed)
        summary["sae_after"] = sae_metrics(sarm.sae, _of_rows(activations, held_out_rows))
    summary |= preference_summary(data, score_pooled(sarm, activations.pooled_rd))
    summary["seconds"] = {
        "collect": collected - start,
        "sae": pretrained - collected,
        "preferences": trained - pretrained,
        "total": time.perf_counter() - start,
    }
    return sarm, summary


def truncate(policy: Llama, source_layer: int) -> Llama:
    """The trunk: the first `source_layer` layers, no final norm, no head.

    Embedding and norm are shared with `policy`, the layers are sliced out of the stack.
    """
    layers = policy.config.num_hidden_layers
    if not 1 <= source_layer <= layers:
        raise InputError(f"train_sarm.source_layer={source_layer}: the model has {layers} layers")
    config = dataclasses.replace(policy.config, num_hidden_layers=source_layer)
    abstract = nnx.eval_shape(
        lambda: Llama(config, rngs=nnx.Rngs(0), final_norm=False, head=False, remat=policy.remat)
    )
    graphdef, _ = nnx.split(abstract)
    state = nnx.state(policy)
    state.pop("lm_head", None)
    state["layers"] = jax.tree.map(lambda p: p[:source_layer], state["layers"])
    return nnx.merge(graphdef, state)


def assemble(trunk: Llama, sae: SAE) -> SARM:
    """A SARM of these two parts and a head of zeros, without allocating a second copy of either."""
    config = SARMConfig(trunk.config, sae.config)
    sarm = nnx.eval_shape(lambda: SARM(config, rngs=nnx.Rngs(0)))
    sarm.trunk, sarm.sae = trunk, sae
    sarm.score = nnx.Param(jnp.zeros((sae.config.latent_size,), jnp.float32))
    return sarm


def encode_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, str]], config: TrainSARMConfig
) -> PairSet:
    """Tokenises and splits by prompt: no prompt is on both sides.

    Raises `InputError` where either side would be empty, or a pair has nothing to prefer.
    """
    rows: dict[tuple[str, str], int] = {}
    prompts: dict[str, int] = {}
    for number, pair in enumerate(pairs, 1):
        if pair["chosen"] == pair["rejected"]:
            raise InputError(f"pair {number}: chosen and rejected are equal: {pair['chosen']!r}")
        prompts.setdefault(pair["prompt"], len(prompts))
        for side in ("chosen", "rejected"):
            rows.setdefault((pair["prompt"], pair[side]), len(rows))
    held_out = [prompts[prompt] for prompt in config.held_out(pairs)]
    prompt_p = np.asarray([prompts[pair["prompt"]] for pair in pairs])
    return PairSet(
        rows=[encode_turn(tokenizer, *row, config.max_length) for row in rows],
        pairs_p2=np.asarray(
            [[rows[p["prompt"], p[side]] for side in ("chosen", "rejected")] for p in pairs]
        ),
        prompt_p=prompt_p,
        held_out_p=np.isin(prompt_p, held_out),
        source_p=[pair.get("source", "") for pair in pairs],
    )


def encode_turn(tokenizer: Any, prompt: str, response: str, max_length: int) -> Conversation:
    """The exchange, and how many of its last tokens are the response with its end of turn."""
    whole = encode_conversation(tokenizer, prompt, response, max_length=sys.maxsize)
    before = encode_prompt(tokenizer, prompt)
    same = next((n for n, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), None)
    turn_length = len(whole) - (min(len(whole), len(before)) if same is None else same)
    if len(whole) > max_length:
        whole = encode_conversation(tokenizer, prompt, response, max_length)
    bos = int(whole[0] == tokenizer.bos_token_id)  # is kept, and is nobody's turn
    return Conversation(whole, min(turn_length, len(whole) - bos))


def score_pooled(sarm: SARM, pooled_rd: np.ndarray, batch: int = 256) -> np.ndarray:
    """Scores `[R]` of pooled, standardised trunk states `[R, D]`."""
    graphdef, state = nnx.split(sarm)
    return np.concatenate(
        [
            np.asarray(_score_pooled(graphdef, state, pooled_rd[start : start + batch]))
            for start in range(0, len(pooled_rd), batch)
        ]
    )


@partial(jax.jit, static_argnums=0)
def _score_pooled(graphdef, state, x_bd):
    sarm = nnx.merge(graphdef, state)
    return sarm.head(sarm.sae.encode(x_bd))


def preference_summary(data: PairSet, score_r: np.ndarray) -> dict[str, Any]:
    """Accuracies, margins and score scales of all rows' scores `[R]`.

    `length_only_accuracy_held_out` is that of the better of "longer wins" and "shorter wins",
    in tokens: what a reward that only counts would reach.
    """
    margin_p = score_r[data.pairs_p2[:, 0]] - score_r[data.pairs_p2[:, 1]]
    right_p = (np.sign(margin_p) + 1) / 2
    held_out_p = data.held_out_p
    length_r = np.asarray([len(row.ids) for row in data.rows])
    longer_p = (np.sign(length_r[data.pairs_p2[:, 0]] - length_r[data.pairs_p2[:, 1]]) + 1) / 2
    longer = float(longer_p[held_out_p].mean())
    held_out = float(right_p[held_out_p].mean())
    prompts = len(np.unique(data.prompt_p[held_out_p]))
    source_p = np.asarray(data.source_p)
    scores = {side: score_r[data.pairs_p2[held_out_p, i]] for i, side in enumerate(SIDES)}
    return {
        "pairs_train": int((~held_out_p).sum()),
        "pairs_held_out": int(held_out_p.sum()),
        "prompts_held_out": prompts,
        "accuracy_train": float(right_p[~held_out_p].mean()),
        "accuracy_held_out": held_out,
        "accuracy_held_out_95": wilson_interval(held_out, prompts),
        "accuracy_held_out_by_source": {
            str(source): float(right_p[held_out_p & (source_p == source)].mean())
            for source in np.unique(source_p[held_out_p])
        },
        "length_only_accuracy_held_out": max(longer, 1 - longer),
        "margin_train": float(margin_p[~held_out_p].mean()),
        "margin_held_out": float(margin_p[held_out_p].mean()),
        **{f"score_{side}_mean": float(scores[side].mean()) for side in SIDES},
        **{f"score_{side}_std": float(scores[side].std()) for side in SIDES},
    }


def _split_rows(data: PairSet) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training prompts and of the held-out ones."""
    held_out_p = data.held_out_p
    return np.unique(data.pairs_p2[~held_out_p]), np.unique(data.pairs_p2[held_out_p])


def _of_rows(activations: Activations, rows: np.ndarray) -> Activations:
    """The activations of some conversations."""
    row_n = np.cumsum(activations.pooled_n) - activations.pooled_n  # pooled tokens end their row
    keep_n = np.isin(row_n, rows)
    return Activations(activations.x_nd[keep_n], activations.pooled_n[keep_n])
