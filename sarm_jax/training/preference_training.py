"""Bradley–Terry training of a SARM, in the four modes of the reference implementation.

    mode  trunk   SAE            head
    0     frozen  frozen         L_BT     the pooled latents are computed once
    1     L_BT    frozen         L_BT
    2     L       L              L_BT
    3     L_BT    λ L_rec only   L_BT     x is detached in L_rec, the SAE in L_BT

The optimizer is AdamW with a cosine schedule and a 3 % warm-up. Norm scales and SAE biases have no
weight decay. The final norm, which a SARM never applies, is not trained. Source: arXiv 2508.08746.

On a mesh the float32 weights, their gradients and their moments are sharded like the weights of a
policy, and every step splits its pairs over the data axes.

Deliberate deviation: the head, which starts at 0, has its own learning rate.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Lowered
from tqdm import tqdm

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import bucket_length, pad_batch
from sarm_jax.models.sarm import SARM
from sarm_jax.parallel.sharding import Placement, parameter_paths
from sarm_jax.training.activations import Conversation
from sarm_jax.training.divergence import check_loss
from sarm_jax.training.preference_loss import batch_metrics, piece_loss
from sarm_jax.training.progress import NOTHING_KEPT, Log, Progress
from sarm_jax.training.schedule import warmup_cosine

T = TypeVar("T", bound=nnx.Module)
HEAD_RATE = "train_sarm.head_learning_rate"
RATES = f"train_sarm.learning_rate or {HEAD_RATE}"
# Equal scores have a Bradley-Terry loss of 0.69, and a reconstruction by 0 has a loss of 1.
LARGEST_LOSS = 10.0
LAST_STEPS = 20  # steps whose mean loss is compared with `LARGEST_LOSS`
# (tokens, mask, mask of the assistant turn, ties), see `pair_batches`.
PairBatch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class PreferenceTraining:
    """Options of Bradley–Terry training.

    Attributes:
        mode: 0 to 3, what is trained (see the module).
        reconstruction_weight: λ.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        learning_rate: peak learning rate of trunk and SAE.
        head_learning_rate: peak learning rate of the head.
        warmup_fraction: share of the steps in which the rates rise.
        weight_decay: weight decay of AdamW.
        seed: seed of the order of the pairs.
        tie_weight: weight of a tie in L_BT; a preference has the weight 1.
        gradient_accumulation_steps: pieces of a batch whose gradients are added up.
    """

    mode: int
    reconstruction_weight: float
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup_fraction: float
    weight_decay: float
    seed: int
    tie_weight: float = 1.0
    gradient_accumulation_steps: int = 1

    def batch_of(self, pairs: int) -> int:
        """Returns the number of pairs in a batch, given the number of training pairs.

        Raises:
            InputError: the batch cannot be divided into `gradient_accumulation_steps` pieces.
        """
        batch, pieces = min(self.batch_size, pairs), self.gradient_accumulation_steps
        if batch % pieces:
            few = (
                f", which {pairs} training pairs cut to {batch}" if batch < self.batch_size else ""
            )
            raise InputError(
                f"train_sarm.gradient_accumulation_steps={pieces} does not divide "
                f"train_sarm.batch_size={self.batch_size}{few}"
            )
        return batch

    @property
    def largest_loss(self) -> float:
        """The mean loss above which training has diverged; it grows with the weight of ties."""
        return LARGEST_LOSS * max(1.0, self.tie_weight)


def defined_mean(value_s: np.ndarray) -> float | None:
    """Returns the mean over the steps in which a metric is defined; None if there is none.

    An accuracy is undefined, NaN, in a step of ties alone.
    """
    defined_s = value_s[~np.isnan(value_s)]
    return float(defined_s.mean()) if len(defined_s) else None


def fine_tune(
    sarm: SARM,
    rows: Sequence[Conversation],
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    log: Log,
    tie_p: np.ndarray | None = None,
    progress: Progress = NOTHING_KEPT,
) -> SARM:
    """Trains a copy of a SARM (modes 1 to 3).

    The trunk computes in its own dtype, but the optimizer works on float32 copies: half precision
    would round away the steps of a small learning rate.

    Args:
        sarm: the SARM to start from; it is not changed.
        rows: the conversations.
        pairs_p2: row numbers (chosen, rejected) of each pair.
        options: options of the training.
        log: receives a metrics row after each step.
        tie_p: which pairs are ties; None if none is.
        progress: restores the state of an interrupted training, and keeps it after each step.

    Returns:
        The trained SARM; its trained parameters are float32.

    Raises:
        DivergedError: training diverged.
    """
    steps = options.epochs * (len(pairs_p2) // options.batch_of(len(pairs_p2)))
    graphdef, state, train_step = _start(sarm, options, steps)
    done, state = progress.restore("preferences", state)
    params, opt_state, frozen = state
    last: deque[Mapping[str, Any]] = deque(progress.rows[-done:] if done else (), LAST_STEPS)
    pieces, placement = options.gradient_accumulation_steps, sarm.trunk.placement
    with (
        tqdm(total=steps, initial=done, desc="preferences", unit="step") as bar,
        progress.running(),
    ):
        for step, batch in enumerate(_batches_of_epochs(rows, pairs_p2, options, tie_p)):
            if step < done:  # a resumed run draws the batches of earlier steps without using them
                continue
            params, opt_state, metrics = train_step(
                params, opt_state, frozen, placed_batch(batch, pieces, placement)
            )
            loss, acc = float(metrics["loss"]), float(metrics["accuracy"])
            check_loss(loss, "the loss on preferences", RATES)
            row = {name: defined_mean(np.asarray([value])) for name, value in metrics.items()}
            log({"stage": "preferences", "step": step + 1, **row})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", acc=f"{acc:.2f}")
            last.append(row)
            progress.keep("preferences", step + 1, (params, opt_state, frozen))
    _check_last_losses(last, options)
    return nnx.merge(graphdef, params, frozen)


def _start(sarm: SARM, options: PreferenceTraining, steps: int) -> tuple[Any, Any, Any]:
    """Returns (structure, (parameters, moments, frozen parameters), compiled step)."""
    compute_dtype, placement = sarm.trunk.embed_tokens.dtype, sarm.trunk.placement
    graphdef, params, frozen = nnx.split(sarm, trainable(options.mode), ...)  # type: ignore[misc]
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    params, frozen = placement.parameters(params), placement.parameters(frozen)
    optimizer = make_optimizer(options, steps)
    opt_state = map_moments(
        optimizer,
        optimizer.init(params),
        params,
        of_parameter=placement.trained,
        other=placement.replicated,
    )
    step = compiled_step(
        graphdef,
        optimizer,
        options=options,
        compute_dtype=compute_dtype,
        placement=placement,
        params=params,
        opt_state=opt_state,
    )
    return graphdef, (params, opt_state, frozen), step


def _batches_of_epochs(
    rows: Sequence[Conversation],
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    tie_p: np.ndarray | None,
) -> Iterator[PairBatch]:
    """Yields the batches of all epochs."""
    rng = np.random.default_rng(options.seed)
    for _ in range(options.epochs):
        yield from pair_batches(rows, pairs_p2, batch_size=options.batch_size, rng=rng, tie_p=tie_p)


def _check_last_losses(last: Collection[Mapping[str, Any]], options: PreferenceTraining) -> None:
    """Raises DivergedError if the mean loss of the last steps is that of a divergence."""
    largest = {"bradley_terry": options.largest_loss, "reconstruction": LARGEST_LOSS}
    for name, limit in largest.items():
        loss = sum(row[name] for row in last) / len(last)
        check_loss(loss, f"the loss {name}", RATES, limit)


def trainable(mode: int) -> nnx.filterlib.Filter:
    """Selects the parameters that `mode` trains, which never include the unused final norm."""

    def keep(path: tuple, _: Any) -> bool:
        if path[0] == "trunk":
            return mode > 0 and path[1] != "norm"
        return mode > 1 if path[0] == "sae" else True

    return keep


def make_optimizer(options: PreferenceTraining, steps: int) -> optax.GradientTransformation:
    """Makes AdamW with one learning-rate schedule for the head and one for everything else."""
    return optax.multi_transform(
        {
            "head": adamw(options.head_learning_rate, options, steps),
            "body": adamw(options.learning_rate, options, steps),
        },
        lambda params: _by_path(params, lambda names: "head" if "score" in names else "body"),
    )


@cache
def adamw(learning_rate, options, steps):
    """Makes AdamW with warm-up, cosine schedule and the weight decay of the options.

    Equal arguments give the same object, so that the heads of an ensemble share a program.
    """

    def decays(params):
        undecayed = {"scale", "pre_bias", "latent_bias"}
        return _by_path(params, lambda names: not undecayed & set(names))

    schedule = warmup_cosine(learning_rate, options.warmup_fraction, steps)
    return optax.adamw(schedule, weight_decay=options.weight_decay, mask=decays)


def _by_path(params, rule):
    """Applies `rule` to the names on the path of every parameter."""

    def apply(path, _):
        return rule([getattr(key, "key", getattr(key, "name", "")) for key in path])

    return jax.tree_util.tree_map_with_path(apply, params)


def pair_batches(
    rows: Sequence[Conversation],
    pairs_p2: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    tie_p: np.ndarray | None = None,
) -> Iterator[PairBatch]:
    """Yields the batches of one epoch: (tokens, mask, mask of the assistant turn, ties).

    Tokens and masks are `[2B, T]`, and the B chosen rows come first. The ties are `[B]`, or None if
    `tie_p` is. Pairs of similar length share a batch. Each epoch leaves out fewer than B random
    pairs that do not fill a batch.
    """
    batch_size = min(batch_size, len(pairs_p2))
    order = rng.permutation(len(pairs_p2))[: len(pairs_p2) // batch_size * batch_size]
    length_p = [bucket_length(max(len(rows[i].ids) for i in pair)) for pair in pairs_p2]
    order = order[np.argsort(np.asarray(length_p)[order], kind="stable")]
    for chunk in rng.permutation(order.reshape(-1, batch_size)):
        batch = [rows[i] for i in pairs_p2[chunk].T.ravel()]
        tokens_bt, mask_bt = pad_batch([r.ids for r in batch], max(length_p[p] for p in chunk), 0)
        from_end_bt = np.cumsum(mask_bt[:, ::-1], axis=1)[:, ::-1]
        turn_b1 = np.asarray([[r.turn_length] for r in batch])
        tie_b = None if tie_p is None else tie_p[chunk]
        yield tokens_bt, mask_bt, mask_bt & (from_end_bt <= turn_b1), tie_b


def placed_batch(batch: PairBatch, pieces: int, placement: Placement) -> Any:
    """Puts a batch on the mesh, its rows split; several pieces become a leading dimension."""
    if pieces == 1:
        return placement.rows(batch)
    tokens_bt, mask_bt, turn_bt, tie_b = batch

    def cut(x_bt):
        """Cuts `[2B, T]` into P pieces `[P, 2B / P, T]`; in each, the chosen rows come first."""
        sides = x_bt.reshape(2, pieces, -1, x_bt.shape[1])
        return sides.swapaxes(0, 1).reshape(pieces, -1, x_bt.shape[1])

    tie_pb = None if tie_b is None else tie_b.reshape(pieces, -1)
    return placement.rows((cut(tokens_bt), cut(mask_bt), cut(turn_bt), tie_pb), dimension=1)


def compiled_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    options: PreferenceTraining,
    compute_dtype: Any,
    placement: Placement,
    params: Any,
    opt_state: Any,
) -> jax.stages.Wrapped:
    """Returns the function (params, opt_state, frozen, batch) → (params, opt_state, metrics).

    It makes one optimizer step on a batch of `placed_batch`, and returns parameters and moments
    where it got them. They are donated. For compiling they may be abstract.
    """
    step = partial(_step, graphdef, optimizer, options, compute_dtype, placement)
    out: Any = None
    if placement.mesh is not None:
        out = (*jax.tree.map(lambda x: x.sharding, (params, opt_state)), None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out)


def _step(graphdef, optimizer, options, compute_dtype, placement, params, opt_state, frozen, batch):
    """Makes one optimizer step, see `compiled_step`."""
    tokens_bt, _, turn_bt, tie_b = batch  # of several pieces, [P, B, T] and [P, B]
    pairs, turn_tokens = tokens_bt[..., 0].size // 2, turn_bt.sum()

    def loss_fn(params, piece):
        sarm = nnx.merge(graphdef, params, frozen)
        sarm.trunk = cast(sarm.trunk, compute_dtype)
        # Otherwise the compiler might gather the float32 weights and cast them afterwards.
        structure, state = nnx.split(sarm)
        sarm = nnx.merge(structure, placement.constrain_parameters(state))
        tokens_bt, mask_bt, turn_bt, tie_b = placement.constrain_rows(piece)
        return piece_loss(
            sarm,
            tokens_bt,
            mask_bt,
            turn_bt=turn_bt,
            mode=options.mode,
            reconstruction_weight=options.reconstruction_weight,
            pairs=pairs,
            turn_tokens=turn_tokens,
            tie_b=tie_b,
            tie_weight=options.tie_weight,
        )

    def gradients(piece):
        grads, losses = jax.grad(loss_fn, has_aux=True)(params, piece)
        return placement.constrain_parameters(grads), losses

    if options.gradient_accumulation_steps == 1:
        grads, losses = gradients(batch)
    else:
        grads, losses = _accumulated(gradients, jax.tree.map(jnp.zeros_like, params), batch)
        tie_b = None if tie_b is None else tie_b.reshape(-1)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, batch_metrics(losses, tie_b)


def _accumulated(gradients, zeros, batch):
    """Returns the sum of the gradients of all pieces, and the losses of the whole batch."""

    def add(total, piece):
        grads, losses = gradients(piece)
        return jax.tree.map(jnp.add, total, grads), losses

    grads, losses = jax.lax.scan(add, zeros, batch)
    # Scores [P, B] are joined, and shares of a loss [P] are added.
    return grads, jax.tree.map(lambda x: x.sum() if x.ndim == 1 else x.reshape(-1), losses)


def lower_step(sarm: SARM, options: PreferenceTraining, length: int) -> Lowered:
    """Lowers the step of `fine_tune` from shapes alone, for conversations of one length.

    Args:
        sarm: the SARM before training, of descriptions of arrays.
        options: options of the training.
        length: tokens of a padded conversation.
    """
    dtype, placement = sarm.trunk.embed_tokens.dtype, sarm.trunk.placement
    graphdef, params, frozen = nnx.split(sarm, trainable(options.mode), ...)  # type: ignore[misc]
    params = placement.abstract_parameters(params, jnp.float32)
    optimizer = make_optimizer(options, steps=2)
    opt_state = map_moments(
        optimizer,
        jax.eval_shape(optimizer.init, params),
        params,
        of_parameter=lambda path, x: placement.abstract_parameter(path, x.shape, x.dtype),
        other=placement.abstract_replicated,
    )
    rows, pieces = 2 * options.batch_size, options.gradient_accumulation_steps
    shape = (rows, length) if pieces == 1 else (pieces, rows // pieces, length)
    tokens, mask = (
        placement.abstract_rows(shape, kind, len(shape) - 2) for kind in (jnp.int32, bool)
    )
    step = compiled_step(
        graphdef,
        optimizer,
        options=options,
        compute_dtype=dtype,
        placement=placement,
        params=params,
        opt_state=opt_state,
    )
    frozen = placement.abstract_parameters(frozen)
    return step.lower(params, opt_state, frozen, (tokens, mask, mask, None))


def map_moments(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    of_parameter: Callable[[str, Any], Any],
    other: Callable[[Any], Any],
) -> Any:
    """Maps the arrays of an optimizer's state.

    Args:
        optimizer: the optimizer.
        opt_state: its state.
        params: the parameters that it optimizes.
        of_parameter: maps (dotted path of the parameter, array) for an array of a parameter.
        other: maps any other array, such as the number of steps.
    """

    def apply(array, path):
        return array if isinstance(array, optax.MaskedNode) else of_parameter(path, array)

    return optax.tree.map_params(
        optimizer,
        apply,
        opt_state,
        parameter_paths(params),
        transform_non_params=other,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def cast(module: T, dtype: Any) -> T:
    """Returns the module with its parameters in `dtype`; it copies only those of another dtype."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(dtype), state))
