"""Next-token training of a Llama, from random or given weights: weighted cross-entropy, AdamW.

With `tap_layer` the same loss is also computed after that layer, through the model's own final norm
and head (deep supervision, Lee et al. 1409.5185). A reward model that is cut at that layer then has
access to what the model knows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sarm_jax.models.chat import bucket_length, encode_conversation, encode_prompt, pad_batch
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.training.divergence import check_loss, check_weights
from sarm_jax.training.schedule import warmup_cosine

RATE = "lab.pretraining_learning_rate or lab.tuning_learning_rate"
LARGEST_LOSS = 10.0  # in losses of a model for which all tokens are equally likely
STEPS_PER_CALL = 20  # minibatches on the device at a time, if all texts are short
SHORT_TEXT = 64  # tokens; if any text is longer, each minibatch is padded to its own longest text
LOSS_WINDOW = 20  # the reported loss is the mean of this many last minibatches


@dataclasses.dataclass(frozen=True)
class LMTraining:
    """Options of the training.

    Attributes:
        steps: number of optimizer steps.
        batch_size: texts per step.
        learning_rate: peak learning rate.
        tap_layer: layer after which the loss is computed as well; 0 for none.
        warmup_fraction: share of the steps in which the rate rises.
        weight_decay: weight decay of AdamW.
        seed: seed of the minibatches.
    """

    steps: int
    batch_size: int
    learning_rate: float
    tap_layer: int = 0
    warmup_fraction: float = 0.03
    weight_decay: float = 0.01
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class WeightedText:
    """Token ids and, for each, the weight of its prediction in the loss; 0 if it is not learned."""

    ids: Sequence[int]
    weights: Sequence[float]


def response_text(tokenizer: Any, prompt: str, response: str) -> WeightedText:
    """Encodes an exchange, of which only the response and its end of turn are learned."""
    ids = encode_conversation(tokenizer, prompt, response)
    start = len(encode_prompt(tokenizer, prompt))
    return WeightedText(ids, [0.0] * start + [1.0] * (len(ids) - start))


def from_scratch(config: LlamaConfig, seed: int) -> Llama:
    """Makes a model with random weights from N(0, 1 / fan-in).

    The standard deviation of 0.02 that is usual for large models leaves the attention of a small
    model nearly uniform for many steps.
    """
    policy = Llama(config, rngs=nnx.Rngs(0))
    noise = nnx.Rngs(seed)

    def draw(path, value):
        if "scale" in path:  # norms keep their scale of 1
            return value
        fan_in = value.shape[-2 if "kernel" in path else -1]
        return jax.random.normal(noise.params(), value.shape, value.dtype) * fan_in**-0.5

    flat = nnx.to_flat_state(nnx.state(policy))
    drawn = [(path, variable.replace(draw(path, variable[...]))) for path, variable in flat]
    nnx.update(policy, nnx.from_flat_state(drawn))
    return policy


def train_language_model(
    policy: Llama, rows: Sequence[WeightedText], options: LMTraining
) -> tuple[Llama, float]:
    """Trains a copy of a model on texts.

    Args:
        policy: the model to start from; it is not changed.
        rows: the texts.
        options: options of the training.

    Returns:
        (the trained copy, the mean loss of the last `LOSS_WINDOW` minibatches).

    Raises:
        DivergedError: training diverged.
    """
    length = _padded_length(rows)
    tokens_nt, mask_nt = pad_batch([row.ids for row in rows], length, 0)
    weights_nt = np.zeros(tokens_nt.shape, np.float32)
    for weights_t, row in zip(weights_nt, rows, strict=True):
        weights_t[: len(row.weights)] = row.weights
    schedule = warmup_cosine(options.learning_rate, options.warmup_fraction, options.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=options.weight_decay)
    )
    graphdef, params = nnx.split(policy)
    params = jax.tree.map(jnp.copy, params)  # because `_steps` donates its arguments
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(options.seed)
    steps_per_call = STEPS_PER_CALL if length <= SHORT_TEXT else 1
    loss, losses = float("nan"), []
    with tqdm(total=options.steps, desc="language model", unit="step") as bar:
        for start in range(0, options.steps, steps_per_call):
            steps = min(steps_per_call, options.steps - start)
            n_sb = rng.integers(len(rows), size=(steps, options.batch_size))
            used = length if steps_per_call > 1 else _padded_length([rows[n] for n in n_sb[0]])
            batches = tuple(array_nt[n_sb, :used] for array_nt in (tokens_nt, mask_nt, weights_nt))
            params, opt_state, loss_s = _steps(
                graphdef,
                optimizer,
                tap_layer=options.tap_layer,
                params=params,
                opt_state=opt_state,
                batches=batches,
            )
            losses.extend(np.asarray(loss_s).tolist())
            loss = float(np.mean(losses[-LOSS_WINDOW:]))
            check_loss(loss, "the language model's loss", RATE)
            bar.update(steps)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    terms = 2 if options.tap_layer else 1
    chance = terms * float(np.log(policy.config.vocab_size))
    check_loss(loss, "the language model's loss", RATE, LARGEST_LOSS * chance)
    trained = nnx.merge(graphdef, params)
    check_weights(trained, RATE)
    return trained, loss


def _padded_length(rows: Sequence[WeightedText]) -> int:
    """Returns the length to which texts are padded together, in tokens."""
    return bucket_length(max(len(row.ids) for row in rows), smallest=8)


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "tap_layer"),
    donate_argnames=("params", "opt_state"),
)
def _steps(graphdef, optimizer, tap_layer, params, opt_state, batches):
    """Makes one optimizer step on each minibatch: (parameters, optimizer state, losses `[S]`)."""

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(_loss)(params, graphdef, tap_layer, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), loss_s = jax.lax.scan(step, (params, opt_state), batches)
    return params, opt_state, loss_s


def _loss(params, graphdef, tap_layer, batch):
    """Computes the loss on one minibatch (tokens, mask, weights), each `[B, T]`."""
    tokens_bt, mask_bt, weights_bt = batch
    policy = nnx.merge(graphdef, params)
    x_lbtd = policy.layer_states(tokens_bt, mask_bt)
    states = [x_lbtd[-1], x_lbtd[tap_layer - 1]] if tap_layer else [x_lbtd[-1]]
    return sum(_cross_entropy(policy.logits(policy.norm(x)), tokens_bt, weights_bt) for x in states)


def _cross_entropy(logits_btv, tokens_bt, weights_bt):
    """Computes the weighted mean cross-entropy of the next tokens."""
    loss_bt = optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1], tokens_bt[:, 1:])
    weights_bt = weights_bt[:, 1:]
    return (weights_bt * loss_bt).sum() / weights_bt.sum()
