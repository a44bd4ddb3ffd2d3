"""Training of a SARM from any supported chat model: trunk → activations → SAE → preferences.

    1. The first `source_layer` layers of the model become the trunk.
    2. Its states on the assistant turns of the training pairs pretrain the SAE (`sae_training`).
    3. Bradley–Terry on the pairs trains the head, in modes 1–3 also SAE or trunk
       (`preference_training`).
    4. The reported metrics are measured on held-out prompts.

Ties, pairs of two responses that are equally good, take part in step 3 only: the SAE and the split
of the preference pairs are the same with and without them. Their loss keeps the reward from paying
for what the two sides differ in.

Source: arXiv 2508.08746. All randomness follows from `seed`.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import encode_conversation, encode_prompt
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig, centre_heads
from sarm_jax.reporting.statistics import count_wins, wilson_interval
from sarm_jax.training.divergence import (
    DivergedError,
    check_loss,
    check_summary,
    check_weights,
)
from sarm_jax.training.held_out import draw_held_out
from sarm_jax.training.option_checks import OptionChecks
from sarm_jax.training.preference_training import (
    RATES,
    PreferenceTraining,
    cast,
    fine_tune,
    train_head,
    train_heads,
)
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
LARGEST_MARGIN = 1000.0  # at a margin of 20 nats a model is as good as certain


@dataclasses.dataclass(frozen=True)
class TrainSARMConfig:
    """Options of the stage train_sarm; `configs/base.py` describes them."""

    pairs_jsonl: tuple[str, ...]
    held_out_fraction: float  # of the prompts
    max_length: int  # in tokens; a longer conversation loses its beginning
    source_layer: int
    latent_size: int
    k: int
    use_topk: bool  # the reference's `sarm_use_activation`; False: the head reads pre-activations
    mode: int  # the reference's `sarm_train_mode`, see preference_training
    reconstruction_weight: float  # the reference's `sarm_rec_lambda`
    sae_tokens: int  # largest number of activations to collect
    sae_steps: int
    sae_batch_tokens: int
    sae_learning_rate: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    epochs: int
    batch_size: int  # pairs
    learning_rate: float  # of the trunk and, in modes 2 and 3, of the SAE
    head_learning_rate: float
    weight_decay: float
    warmup_fraction: float
    seed: int
    tie_pairs_jsonl: tuple[str, ...] = ()
    tie_weight: float = 1.0
    heads: int = 1

    def __post_init__(self) -> None:
        check = OptionChecks("train_sarm", self)
        check.require("mode", self.mode in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
        check.of_an_sae()
        check.at_least(1, "source_layer", "sae_tokens", "sae_steps", "sae_batch_tokens")
        check.at_least(1, "epochs", "batch_size", "heads")
        check.positive("sae_learning_rate", "learning_rate", "head_learning_rate")
        check.not_negative("reconstruction_weight", "weight_decay")
        check.positive("tie_weight")
        if self.mode > 0:
            rule = f"train_sarm.mode={self.mode} trains the trunk; several heads need mode=0"
            check.require("heads", self.heads == 1, rule)
        if self.tie_weight != 1 and not self.tie_pairs_jsonl:
            check.require("tie_weight", False, "train_sarm.tie_pairs_jsonl names no ties")

    def check_layers(self, layers: int) -> None:
        """Raises InputError if a model of so many layers does not contain the trunk."""
        check_source_layer(self.source_layer, layers)

    def held_out(
        self, pairs: Sequence[Mapping[str, Any]], ties: Sequence[Mapping[str, Any]] = ()
    ) -> set[Prompt]:
        """Draws the held-out prompts: those of the pairs, then those that only ties have.

        Raises:
            InputError: no prompt would be left for training or for evaluation, or no tie for
                training.
        """
        own = {pair["prompt"] for pair in pairs}
        held_out = draw_held_out(
            (pair["prompt"] for pair in pairs),
            fraction=self.held_out_fraction,
            seed=self.seed,
            stage="train_sarm",
        )
        others = [tie["prompt"] for tie in ties if tie["prompt"] not in own]
        count = len(set(others))
        if 0 < round(self.held_out_fraction * count) < count:
            held_out |= draw_held_out(
                others, fraction=self.held_out_fraction, seed=self.seed, stage="train_sarm"
            )
        if ties and all(tie["prompt"] in held_out for tie in ties):
            raise InputError(
                f"train_sarm.tie_pairs_jsonl: the prompts of all {len(ties)} ties are held out: "
                "none is left for training"
            )
        return held_out

    def sae_training(self) -> SAETraining:
        """Returns the options of SAE pretraining."""
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
        """Returns the options of Bradley–Terry training."""
        shared = {f.name for f in dataclasses.fields(PreferenceTraining)}
        return PreferenceTraining(**{name: getattr(self, name) for name in shared})


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Preferences and ties as tokens.

    Attributes:
        rows: the distinct conversations, those of the preferences first.
        pairs_p2: row numbers (chosen, rejected) of each pair.
        prompt_p: number of the prompt of each pair.
        held_out_p: True for the pairs of held-out prompts.
        source_p: name of the source of each pair.
        tie_p: True for the ties, which come last; None if there are none.
    """

    rows: list[Conversation]
    pairs_p2: np.ndarray
    prompt_p: np.ndarray
    held_out_p: np.ndarray
    source_p: list[str]
    tie_p: np.ndarray | None = None

    @property
    def preferences(self) -> "PairSet":
        """The pairs that are no ties, with their conversations."""
        return self if self.tie_p is None else self._select(~self.tie_p)

    @property
    def ties(self) -> "PairSet | None":
        """The ties, with all conversations; None if there are none."""
        return None if self.tie_p is None else self._select(self.tie_p)

    def _select(self, keep_p: np.ndarray) -> "PairSet":
        return PairSet(
            rows=self.rows[: self.pairs_p2[keep_p].max() + 1],
            pairs_p2=self.pairs_p2[keep_p],
            prompt_p=self.prompt_p[keep_p],
            held_out_p=self.held_out_p[keep_p],
            source_p=[source for source, keep in zip(self.source_p, keep_p, strict=True) if keep],
        )


def train_sarm(
    config: TrainSARMConfig,
    policy: Llama,
    tokenizer: Any,
    pairs: Sequence[Mapping[str, Any]],
    log: Log,
    ties: Sequence[Mapping[str, Any]] = (),
) -> tuple[SARM, dict[str, Any]]:
    """Trains a SARM on the first layers of a policy.

    Args:
        config: options of the training.
        policy: the chat model. Its weights are never overwritten; in mode 0 the trunk shares them.
        tokenizer: tokenizer of the policy.
        pairs: {prompt, chosen, rejected} rows, optionally with "source".
        log: receives the metrics rows.
        ties: rows of the same kind whose sides are equally good; the rejected one has the shortcut.

    Returns:
        (the SARM in the policy's dtype, the summary for sarm_summary.json).

    Raises:
        InputError: the options do not fit the model or the pairs.
        DivergedError: training diverged.
    """
    start = time.perf_counter()
    data = encode_pairs(tokenizer, pairs, config, ties)
    trunk = truncate(policy, config.source_layer)
    train_rows, held_out_rows = _split_rows(data.preferences)
    activations = collect_activations(
        trunk, data.preferences.rows, max_tokens=config.sae_tokens, seed=config.seed
    )
    collected = time.perf_counter()
    sae, metrics = pretrain_sae(
        _new_sae(config, trunk),
        train=_select_rows(activations, train_rows),
        held_out=_select_rows(activations, held_out_rows),
        options=config.sae_training(),
        log=log,
    )
    LOG.info("SAE: %s", {name: value and round(value, 4) for name, value in metrics.items()})
    pretrained = time.perf_counter()
    summary: dict[str, Any] = {"sae": metrics}

    sarm = _learn_preferences(
        config, assemble(trunk, sae, config.heads), data=data, activations=activations, log=log
    )
    sarm = cast(sarm, policy.embed_tokens.dtype)
    check_weights(sarm, RATES)
    trained = time.perf_counter()
    if config.mode > 0:
        activations = _collect_again(config, sarm, data)
        summary["sae_after"] = sae_metrics(sarm.sae, _select_rows(activations, held_out_rows))
    summary |= _summary_of_pairs(sarm, data, activations)
    _check_preferences(summary)
    summary["seconds"] = {
        "collect": collected - start,
        "sae": pretrained - collected,
        "preferences": trained - pretrained,
        "total": time.perf_counter() - start,
    }
    return sarm, summary


def _summary_of_pairs(sarm: SARM, data: PairSet, activations: Activations) -> dict[str, Any]:
    """Summarises the scores of preferences and, if there are any, of ties and of several heads."""
    score_r = score_pooled(sarm, _pooled(sarm.trunk, data, activations))
    summary = preference_summary(data.preferences, score_r)
    if sarm.config.heads > 1:
        score_rh = score_by_head(sarm, activations.pooled_rd)
        summary["heads"] = head_summary(data.preferences, score_rh)
    if data.ties is not None:
        summary["ties"] = tie_summary(data.ties, score_r)
    return summary


def _check_preferences(summary: Mapping[str, Any]) -> None:
    """Raises DivergedError if the summary shows that training diverged."""
    check_summary(summary, RATES)
    margin = max(abs(summary[f"margin_{part}"]) for part in ("train", "held_out"))
    check_loss(margin, "the mean margin of a pair in nats", RATES, LARGEST_MARGIN)


def _collect_again(config: TrainSARMConfig, sarm: SARM, data: PairSet) -> Activations:
    """Collects the states of the trained trunk; raises DivergedError if one is not finite."""
    try:
        return collect_activations(
            sarm.trunk, data.preferences.rows, max_tokens=config.sae_tokens, seed=config.seed
        )
    except InputError as error:  # its states were finite before training
        raise DivergedError(f"{error}: training diverged; lower {RATES}") from None


def _learn_preferences(
    config: TrainSARMConfig, sarm: SARM, *, data: PairSet, activations: Activations, log: Log
) -> SARM:
    """Trains the head, or the whole SARM, on the pairs that are not held out; returns the SARM."""
    options, train_pairs = config.preference_training(), data.pairs_p2[~data.held_out_p]
    tie_p = None if data.tie_p is None else data.tie_p[~data.held_out_p]
    if config.mode > 0:
        return fine_tune(sarm, data.rows, train_pairs, options=options, log=log, tie_p=tie_p)
    pooled_rd = _pooled(sarm.trunk, data, activations)
    if config.heads == 1:
        sarm.score[...] = train_head(
            sarm.sae, pooled_rd, train_pairs, options=options, log=log, tie_p=tie_p
        )
        return sarm
    sarm.score[...] = train_heads(
        sarm.sae, pooled_rd, train_pairs, options=options, log=log, heads=config.heads, tie_p=tie_p
    )
    train_rows, _ = _split_rows(data.preferences)
    sarm.score_bias[...] = centre_heads(score_by_head(sarm, pooled_rd[train_rows]))
    return sarm


def _pooled(trunk: Llama, data: PairSet, activations: Activations) -> np.ndarray:
    """Returns the pooled states of all conversations, `[R, D]`.

    Args:
        trunk: the trunk that the states come from.
        data: the pairs.
        activations: states of the conversations of the preferences, which come first.
    """
    others = data.rows[len(activations.pooled_rd) :]
    if not others:
        return activations.pooled_rd
    of_ties = collect_activations(trunk, others, max_tokens=len(others), seed=0)
    return np.concatenate([activations.pooled_rd, of_ties.pooled_rd])


def truncate(policy: Llama, source_layer: int) -> Llama:
    """Cuts the trunk out of a policy: its first layers, without final norm and head.

    The trunk shares embedding and norm with the policy; its layers are slices of the stack.
    """
    check_source_layer(source_layer, policy.config.num_hidden_layers)
    config = dataclasses.replace(policy.config, num_hidden_layers=source_layer)
    abstract = nnx.eval_shape(
        lambda: Llama(config, rngs=nnx.Rngs(0), final_norm=False, head=False, remat=policy.remat)
    )
    graphdef, _ = nnx.split(abstract)
    state = nnx.state(policy)
    state.pop("lm_head", None)
    state["layers"] = jax.tree.map(lambda p: p[:source_layer], state["layers"])
    return nnx.merge(graphdef, state)


def check_source_layer(source_layer: int, layers: int) -> None:
    """Raises InputError if a model of so many layers has no such source layer."""
    if not 1 <= source_layer <= layers:
        raise InputError(f"train_sarm.source_layer={source_layer}: the model has {layers} layers")


def assemble(trunk: Llama, sae: SAE, heads: int = 1) -> SARM:
    """Joins trunk and SAE, which are not copied, with heads of zeros."""
    config = SARMConfig(trunk.config, sae.config, heads)
    sarm = nnx.eval_shape(lambda: SARM(config, rngs=nnx.Rngs(0)))
    sarm.trunk, sarm.sae = trunk, sae
    sarm.score = nnx.Param(jnp.zeros(sarm.score.shape, jnp.float32))
    if heads > 1:
        sarm.score_bias = nnx.Param(jnp.zeros(sarm.score_bias.shape, jnp.float32))
    return sarm


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[Mapping[str, Any]],
    config: TrainSARMConfig,
    ties: Sequence[Mapping[str, Any]] = (),
) -> PairSet:
    """Tokenises pairs and ties and splits them by prompt, so that no prompt is on both sides.

    Raises:
        InputError: one side of the split would be empty, or both responses of a pair are equal.
    """
    rows: dict[tuple[Prompt, str], int] = {}
    prompts: dict[Prompt, int] = {}
    for option, given in (("pairs_jsonl", pairs), ("tie_pairs_jsonl", ties)):
        for number, pair in enumerate(given, 1):
            if pair["chosen"] == pair["rejected"]:
                raise InputError(
                    f"train_sarm.{option}: pair {number}: chosen and rejected are equal: "
                    f"{pair['chosen']!r}"
                )
            prompts.setdefault(pair["prompt"], len(prompts))
            for side in SIDES:
                rows.setdefault((pair["prompt"], pair[side]), len(rows))
    held_out = [prompts[prompt] for prompt in config.held_out(pairs, ties)]
    both = [*pairs, *ties]
    prompt_p = np.asarray([prompts[pair["prompt"]] for pair in both])
    return PairSet(
        rows=[
            encode_turn(tokenizer, prompt, response=response, max_length=config.max_length)
            for prompt, response in rows
        ],
        pairs_p2=np.asarray([[rows[p["prompt"], p[side]] for side in SIDES] for p in both]),
        prompt_p=prompt_p,
        held_out_p=np.isin(prompt_p, held_out),
        source_p=[pair.get("source", "") for pair in both],
        tie_p=np.arange(len(both)) >= len(pairs) if ties else None,
    )


def encode_turn(
    tokenizer: Any, prompt: Prompt, response: str, max_length: int, ends_with_turn: bool = True
) -> Conversation:
    """Encodes an exchange; its assistant turn is the response with the end of turn.

    A conversation of more than `max_length` tokens loses its beginning. With `ends_with_turn` False
    the turn includes what the chat template writes after it.
    """
    encode = partial(
        encode_conversation, tokenizer, prompt, response, ends_with_turn=ends_with_turn
    )
    ids = encode(max_length=sys.maxsize)
    prompt_ids = encode_prompt(tokenizer, prompt)
    token_pairs = enumerate(zip(ids, prompt_ids, strict=False))
    first_difference = next((n for n, (a, b) in token_pairs if a != b), None)
    if first_difference is None:
        first_difference = min(len(ids), len(prompt_ids))
    turn_length = len(ids) - first_difference
    if len(ids) > max_length:
        ids = encode(max_length=max_length)
    bos = int(ids[0] == tokenizer.bos_token_id)  # truncation keeps it; it is no part of the turn
    return Conversation(ids, min(turn_length, len(ids) - bos))


def score_pooled(sarm: SARM, pooled_rd: np.ndarray, batch: int = 256) -> np.ndarray:
    """Computes the scores `[R]` of pooled, standardised trunk states `[R, D]`."""
    graphdef, state = nnx.split(sarm)
    return np.concatenate(
        [
            np.asarray(_score_pooled(graphdef, state, pooled_rd[start : start + batch]))
            for start in range(0, len(pooled_rd), batch)
        ]
    )


@partial(jax.jit, static_argnums=0)
def _score_pooled(graphdef, state, x_bd):
    """Computes the scores `[B]` of one batch."""
    sarm = nnx.merge(graphdef, state)
    return sarm.head(sarm.sae.encode(x_bd))


def score_by_head(sarm: SARM, pooled_rd: np.ndarray, batch: int = 256) -> np.ndarray:
    """Computes the scores `[R, H]` that the heads of an ensemble give to pooled states `[R, D]`."""
    graphdef, state = nnx.split(sarm)
    starts = range(0, len(pooled_rd), batch)
    return np.concatenate(
        [
            np.asarray(_score_by_head(graphdef, state, pooled_rd[start : start + batch]))
            for start in starts
        ]
    )


@partial(jax.jit, static_argnums=0)
def _score_by_head(graphdef, state, x_bd):
    """Computes the scores `[B, H]` of one batch."""
    sarm = nnx.merge(graphdef, state)
    return sarm.scores_by_head(sarm.sae.encode(x_bd))


def head_summary(data: PairSet, score_rh: np.ndarray) -> dict[str, Any]:
    """Summarises the heads of an ensemble by their scores `[R, H]`, on held-out pairs.

    Returns:
        By head: `accuracy` and `worst_share`, the share of the responses to which the head gives
        the least score of all heads. `accuracy_min` is the accuracy of that least score, and
        `margin_std` the standard deviation of a pair's margin over the heads, mean over pairs.
    """
    pairs_p2, score_rh = data.pairs_p2[data.held_out_p], score_rh.astype(np.float64)
    margin_ph = score_rh[pairs_p2[:, 0]] - score_rh[pairs_p2[:, 1]]
    least_r = score_rh.min(axis=1)
    worst_r = score_rh[np.unique(pairs_p2)].argmin(axis=1)
    shares = np.bincount(worst_r, minlength=score_rh.shape[1]) / len(worst_r)
    least_margin_p = least_r[pairs_p2[:, 0]] - least_r[pairs_p2[:, 1]]
    return {
        "accuracy": count_wins(margin_ph).mean(axis=0).tolist(),
        "worst_share": shares.tolist(),
        "accuracy_min": float(count_wins(least_margin_p).mean()),
        "margin_std": float(margin_ph.std(axis=1).mean()),
    }


def preference_summary(data: PairSet, score_r: np.ndarray) -> dict[str, Any]:
    """Summarises accuracies, margins and scales of the scores `[R]` of all conversations.

    `length_only_accuracy_held_out` is the accuracy of preferring the longer or the shorter
    conversation in tokens, whichever is better: what a reward would reach that only counts.
    """
    margin_p = score_r[data.pairs_p2[:, 0]] - score_r[data.pairs_p2[:, 1]]
    right_p = count_wins(margin_p)
    held_out_p = data.held_out_p
    length_r = np.asarray([len(row.ids) for row in data.rows])
    longer_p = count_wins(length_r[data.pairs_p2[:, 0]] - length_r[data.pairs_p2[:, 1]])
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


def tie_summary(ties: PairSet, score_r: np.ndarray) -> dict[str, Any]:
    """Summarises what the scores `[R]` make of ties, whose rejected sides have the shortcut.

    Returns:
        `train`, `held_out` and, by source, `held_out_by_source`: each with the numbers of `pairs`
        and `prompts`, `margin_abs`, the mean |difference| of the scores, `prefers_rejected`, the
        share of the pairs whose shortcut side scores higher (equal scores count half), and its
        95 % interval. A mean over no pairs is null.
    """
    score_r = score_r.astype(np.float64)
    margin_p = score_r[ties.pairs_p2[:, 0]] - score_r[ties.pairs_p2[:, 1]]
    source_p = np.asarray(ties.source_p)

    def summarise(keep_p: np.ndarray) -> dict[str, Any]:
        prompts = len(np.unique(ties.prompt_p[keep_p]))
        if not prompts:
            return {"pairs": 0, "prompts": 0, "margin_abs": None} | dict.fromkeys(shares)
        share = float(count_wins(-margin_p[keep_p]).mean())
        values = share, wilson_interval(share, prompts)
        return {
            "pairs": int(keep_p.sum()),
            "prompts": prompts,
            "margin_abs": float(np.abs(margin_p[keep_p]).mean()),
            **dict(zip(shares, values, strict=True)),
        }

    shares = ("prefers_rejected", "prefers_rejected_95")
    return {
        "train": summarise(~ties.held_out_p),
        "held_out": summarise(ties.held_out_p),
        "held_out_by_source": {
            str(source): summarise(ties.held_out_p & (source_p == source))
            for source in np.unique(source_p[ties.held_out_p])
        },
    }


def _split_rows(data: PairSet) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers of the training prompts and of the held-out prompts."""
    held_out_p = data.held_out_p
    return np.unique(data.pairs_p2[~held_out_p]), np.unique(data.pairs_p2[held_out_p])


def _new_sae(config: TrainSARMConfig, trunk: Llama) -> SAE:
    """Makes an SAE of the configured size for the states of a trunk."""
    sae_config = SAEConfig(
        hidden_size=trunk.config.hidden_size,
        latent_size=config.latent_size,
        k=config.k,
        activation="topk" if config.use_topk else "identity",
    )
    return SAE(sae_config, rngs=nnx.Rngs(config.seed))


def _select_rows(activations: Activations, rows: np.ndarray) -> Activations:
    """Selects the activations of the conversations with the row numbers `rows`."""
    # A pooled token is the last one of its conversation.
    row_n = np.cumsum(activations.pooled_n) - activations.pooled_n
    keep_n = np.isin(row_n, rows)
    return Activations(activations.x_nd[keep_n], activations.pooled_n[keep_n])
