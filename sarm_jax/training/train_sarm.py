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

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE
from sarm_jax.models.sarm import SARM, SARMConfig, centre_heads
from sarm_jax.parallel.finite import NotFiniteError
from sarm_jax.parallel.sharding import Placement
from sarm_jax.training.activations import (
    ActivationFolder,
    Activations,
    Rows,
    collect_pooled,
    read_rows,
    temporary_folder,
)
from sarm_jax.training.divergence import (
    DivergedError,
    check_loss,
    check_summary,
    check_weights,
)
from sarm_jax.training.head_training import train_head, train_heads
from sarm_jax.training.pair_set import SIDES, PairSet, encode_turn
from sarm_jax.training.preference_summary import (
    head_summary,
    preference_summary,
    score_by_head,
    score_pooled,
    tie_summary,
)
from sarm_jax.training.preference_training import RATES, cast, fine_tune
from sarm_jax.training.progress import NOTHING_KEPT, Log, Progress
from sarm_jax.training.sae_training import pretrain_sae, sae_metrics
from sarm_jax.training.sarm_options import TrainSARMConfig, check_source_layer

LOG = logging.getLogger(__name__)

LARGEST_MARGIN = 1000.0  # nats; at a margin of 20 a model is already nearly certain


def train_sarm(
    config: TrainSARMConfig,
    policy: Llama,
    tokenizer: Any,
    pairs: Sequence[Mapping[str, Any]],
    log: Log,
    ties: Sequence[Mapping[str, Any]] = (),
    progress: Progress = NOTHING_KEPT,
    folder: ActivationFolder | None = None,
    sae: SAE | None = None,
) -> tuple[SARM, dict[str, Any]]:
    """Trains a SARM on the first layers of a policy.

    Args:
        config: options of the training.
        policy: the chat model. Its weights are never overwritten; in mode 0 the trunk shares them.
        tokenizer: tokenizer of the policy.
        pairs: {prompt, chosen, rejected} rows, optionally with "source".
        log: receives the metrics rows.
        ties: rows of the same kind whose sides are equally good; the rejected one has the shortcut.
        progress: restores the state of an interrupted training, and keeps it while it runs.
        folder: where the activations are kept; None: in a temporary folder.
        sae: an SAE of the configured sizes to use; None: one is pretrained.

    Returns:
        (the SARM in the policy's dtype, the summary for sarm_summary.json).

    Raises:
        InputError: the options do not fit the model or the pairs.
        DivergedError: training diverged.
        OSError: there is no disk space for the activations.
    """
    with contextlib.nullcontext(folder) if folder else temporary_folder() as used:
        return _train(
            config,
            policy,
            tokenizer,
            pairs=pairs,
            log=log,
            ties=ties,
            progress=progress,
            folder=used,
            shared=sae,
        )


def _train(
    config: TrainSARMConfig,
    policy: Llama,
    tokenizer: Any,
    *,
    pairs: Sequence[Mapping[str, Any]],
    log: Log,
    ties: Sequence[Mapping[str, Any]],
    progress: Progress,
    folder: ActivationFolder,
    shared: SAE | None,
) -> tuple[SARM, dict[str, Any]]:
    """Trains a SARM, see `train_sarm`, whose `sae` is called `shared` here."""
    clock = [time.perf_counter()]
    data = encode_pairs(tokenizer, pairs, config, ties)
    trunk, (_, held_out_rows) = truncate(policy, config.source_layer), _split_rows(data.preferences)
    sae, metrics = shared or _new_sae(config, trunk), progress.noted("sae")
    activations: Any = None
    if metrics is None:  # otherwise `_fine_tune` restores the SAE from the checkpoint
        activations = _collect(config, trunk, data, folder)
        clock.append(time.perf_counter())
        if shared is None:
            sae, metrics = _pretrain(
                config, sae, data, activations, placement=trunk.placement, log=log,
                progress=progress,
            )  # fmt: skip
        else:
            sae.placement = trunk.placement
            metrics = _metrics_of_shared(sae, _select_rows(activations, held_out_rows))
        LOG.info("SAE: %s", {name: value and round(value, 4) for name, value in metrics.items()})
        progress.note("sae", metrics)
    clock.append(time.perf_counter())
    summary: dict[str, Any] = {"sae": metrics}

    sarm = assemble(trunk, sae, config.heads)
    if config.mode > 0:
        sarm = _fine_tune(config, sarm, data, log=log, progress=progress)
    else:
        _train_heads(config, sarm, data=data, activations=activations, log=log)
    sarm = cast(sarm, policy.embed_tokens.dtype)
    check_weights(sarm, RATES)
    clock.append(time.perf_counter())
    if config.mode > 0:
        folder.remove()
        activations = _collect_again(config, sarm, data, folder)
        summary["sae_after"] = sae_metrics(sarm.sae, _select_rows(activations, held_out_rows))
    summary |= _summary_of_pairs(sarm, data, activations)
    _check_preferences(summary)
    phases = ("collect", "sae", "preferences")[-len(clock) + 1 :]  # of this call
    seconds = {name: b - a for name, a, b in zip(phases, clock, clock[1:], strict=False)}
    summary["seconds"] = dict.fromkeys(("collect", "sae"), 0.0) | seconds
    summary["seconds"]["total"] = time.perf_counter() - clock[0]
    return sarm, summary


def _summary_of_pairs(sarm: SARM, data: PairSet, activations: Activations) -> dict[str, Any]:
    """Summarises the scores of preferences and, if there are any, of ties and of several heads."""
    score_r = score_pooled(sarm, _pooled(sarm.trunk, data, activations))
    summary = preference_summary(data.preferences, score_r)
    if sarm.config.heads > 1:
        score_rh = score_by_head(sarm, activations.pooled)
        summary["heads"] = head_summary(data.preferences, score_rh)
    if data.ties is not None:
        summary["ties"] = tie_summary(data.ties, score_r)
    return summary


def _check_preferences(summary: Mapping[str, Any]) -> None:
    """Raises DivergedError if the summary shows that training diverged."""
    check_summary(summary, RATES)
    margin = max(abs(summary[f"margin_{part}"]) for part in ("train", "held_out"))
    check_loss(margin, "the mean margin of a pair in nats", RATES, LARGEST_MARGIN)


def _collect_again(
    config: TrainSARMConfig, sarm: SARM, data: PairSet, folder: ActivationFolder
) -> Activations:
    """Collects the states of the trained trunk; raises DivergedError if one is not finite."""
    try:
        return _collect(config, sarm.trunk, data, folder, trained=True)
    except NotFiniteError as error:  # its states were finite before training
        raise DivergedError(f"{error}: training diverged; lower {RATES}") from None


def _collect(
    config: TrainSARMConfig,
    trunk: Llama,
    data: PairSet,
    folder: ActivationFolder,
    trained: bool = False,
) -> Activations:
    """Collects the states of the conversations of the preferences.

    Args:
        config: options of the training.
        trunk: the trunk.
        data: the pairs.
        folder: where the states are kept.
        trained: True for the trunk after training. The states of the trunk before training are
            used again if the stage is resumed; these are not.
    """
    return folder.collect(
        "trained" if trained else "pretrained",
        trunk,
        data.preferences.rows,
        max_tokens=config.sae_tokens,
        seed=config.seed,
        reuse=not trained,
    )


def _pretrain(
    config: TrainSARMConfig,
    sae: SAE,
    data: PairSet,
    activations: Activations,
    *,
    placement: Placement,
    log: Log,
    progress: Progress,
) -> tuple[SAE, dict[str, float | None]]:
    """Pretrains the SAE on the states of the training prompts; returns it and its metrics."""
    train_rows, held_out_rows = _split_rows(data.preferences)
    sae, metrics = pretrain_sae(
        sae,
        train=_select_rows(activations, train_rows),
        held_out=_select_rows(activations, held_out_rows),
        options=config.sae_training(),
        log=log,
        placement=placement,
        progress=progress,
    )
    return sae, metrics


def _metrics_of_shared(sae: SAE, held_out: Activations) -> dict[str, float | None]:
    """Measures an SAE that was trained elsewhere; warns if it does not fit the states."""
    metrics = sae_metrics(sae, held_out)
    explained = metrics["explained_variance"]
    if explained is not None and explained < 0:
        LOG.warning(
            "train_sarm.sae_model: the SAE explains less of the states than their mean does "
            "(explained variance %.3g): it may be one of another model",
            explained,
        )
    return metrics


def _fine_tune(
    config: TrainSARMConfig, sarm: SARM, data: PairSet, *, log: Log, progress: Progress
) -> SARM:
    """Trains the whole SARM on the pairs that are not held out."""
    train_p = ~data.held_out_p
    return fine_tune(
        sarm,
        data.rows,
        data.pairs_p2[train_p],
        options=config.preference_training(),
        log=log,
        tie_p=None if data.tie_p is None else data.tie_p[train_p],
        progress=progress,
    )


def _train_heads(
    config: TrainSARMConfig, sarm: SARM, *, data: PairSet, activations: Activations, log: Log
) -> None:
    """Trains the head or heads of a SARM, in place, on the pairs that are not held out."""
    train_p, pooled_rd = ~data.held_out_p, _pooled(sarm.trunk, data, activations)
    train = partial(
        train_head if config.heads == 1 else partial(train_heads, heads=config.heads),
        sarm.sae,
        pooled_rd,
        data.pairs_p2[train_p],
        options=config.preference_training(),
        log=log,
        tie_p=None if data.tie_p is None else data.tie_p[train_p],
        placement=sarm.trunk.placement,
    )
    sarm.score[...] = train()
    if config.heads > 1:
        train_rows, _ = _split_rows(data.preferences)
        of_training = read_rows(pooled_rd, train_rows)
        sarm.score_bias[...] = centre_heads(score_by_head(sarm, of_training))


def _pooled(trunk: Llama, data: PairSet, activations: Activations) -> Rows:
    """Returns the pooled states of all conversations, `[R, D]`.

    Args:
        trunk: the trunk that the states come from.
        data: the pairs.
        activations: states of the conversations of the preferences, which come first.
    """
    others = data.rows[len(activations.pooled) :]
    if not others:
        return activations.pooled
    return np.concatenate([activations.pooled_rd, collect_pooled(trunk, others)])


def truncate(policy: Llama, source_layer: int) -> Llama:
    """Cuts the trunk out of a policy: its first layers, without final norm and head.

    The trunk shares embedding and norm with the policy; its layers are slices of the stack, on the
    same mesh.
    """
    check_source_layer(source_layer, policy.config.num_hidden_layers)
    config = dataclasses.replace(policy.config, num_hidden_layers=source_layer)
    abstract = nnx.eval_shape(
        lambda: Llama(config, rngs=nnx.Rngs(0), final_norm=False, head=False, remat=policy.remat)
    )
    abstract.placement = policy.placement
    graphdef, _ = nnx.split(abstract)
    state = nnx.state(policy)
    state.pop("lm_head", None)
    state["layers"] = jax.tree.map(lambda p: p[:source_layer], state["layers"])
    return nnx.merge(graphdef, policy.placement.parameters(state))


def assemble(trunk: Llama, sae: SAE, heads: int = 1) -> SARM:
    """Joins trunk and SAE, which are not copied but get the same mesh, with heads of zeros."""
    config = SARMConfig(trunk.config, sae.config, heads)
    sarm = nnx.eval_shape(lambda: SARM(config, rngs=nnx.Rngs(0)))
    sarm.trunk, sarm.sae = trunk, sae
    sae.placement = trunk.placement
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


def _split_rows(data: PairSet) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers of the training prompts and of the held-out prompts."""
    held_out_p = data.held_out_p
    return np.unique(data.pairs_p2[~held_out_p]), np.unique(data.pairs_p2[held_out_p])


def _new_sae(config: TrainSARMConfig, trunk: Llama) -> SAE:
    """Makes an SAE of the configured size for the states of a trunk."""
    return SAE(config.sae_config(trunk.config.hidden_size), rngs=nnx.Rngs(config.seed))


def _select_rows(activations: Activations, rows: np.ndarray) -> Activations:
    """Selects the activations of the conversations with the row numbers `rows`."""
    # A pooled token is the last one of its conversation.
    row_n = np.cumsum(activations.pooled_n) - activations.pooled_n
    keep_n = np.isin(row_n, rows)
    return activations.select(keep_n)
