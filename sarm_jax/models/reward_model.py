"""A reward model with its tokenizer: computes scores and latents of texts.

Rows are sorted by length and run in padded batches of a few fixed shapes, so that there are few
compilations. A score does not depend on the other rows of its batch.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered
from tqdm import tqdm

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import encode_conversation, pad_batch, pad_id, scored_length
from sarm_jax.models.checks import check_features, check_rows, is_index
from sarm_jax.models.conversation import Conversation, PromptValue, parse_prompt
from sarm_jax.models.latent_store import EncodedLatents, Latents, TopKLatents
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.sae import SAE
from sarm_jax.models.sarm import SARM, Intervention, check_ensemble, intervention
from sarm_jax.parallel.compilation import compile_programs
from sarm_jax.parallel.finite import require_finite
from sarm_jax.parallel.processes import fetch
from sarm_jax.parallel.sharding import Placement


class RewardModel:
    """A reward model for texts.

    Batches are put on the mesh of the weights, see `Llama.placement`. The model must not be changed
    after its first use.

    Args:
        model: a SARM, or a reward model with a linear head on its last state.
        tokenizer: its tokenizer.
        max_length: tokens of a conversation, at most the positions of the model; a longer one loses
            its beginning.
        batch_size: rows that are run together.

    Raises:
        InputError: `max_length` is below 2, or `batch_size` below 1.
    """

    def __init__(
        self,
        model: SARM | LinearReward,
        tokenizer: Any,
        max_length: int = 4096,
        batch_size: int = 16,
    ):
        self.model, self.tokenizer = model, tokenizer
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
            if not is_index(value, sys.maxsize) or value < least:
                raise InputError(f"{name}={value!r}: expected a whole number, at least {least}")
        self.max_length, self.batch_size = min(max_length, self._positions), batch_size
        self._compiled: set = set()  # programs with the shapes that they were compiled for

    @property
    def _positions(self) -> int:
        return self.model.config.trunk.max_position_embeddings

    @property
    def _kind(self) -> str:
        return "SARM" if isinstance(self.model, SARM) else "reward model"

    @property
    def sae(self) -> SAE:
        """The SAE.

        Raises:
            InputError: the reward model has none.
        """
        if self.model.sae is None:
            raise InputError(
                "this reward model has no SAE, and so no features: --stage=train_sae trains one"
            )
        return self.model.sae

    @property
    def has_features(self) -> bool:
        """True if the reward model has an SAE."""
        return self.model.sae is not None

    @property
    def latent_size(self) -> int:
        """The number of features M; raises InputError without an SAE."""
        return self.sae.config.latent_size

    @property
    def state_size(self) -> int:
        """The number of dimensions D of a pooled state."""
        return self.model.config.trunk.hidden_size

    @property
    def is_linear(self) -> bool:
        """False if the score is the least one of an ensemble: it is not linear in the latents."""
        return getattr(self.model, "ensemble", "mean") == "mean"

    def with_ensemble(self, ensemble: str) -> "RewardModel":
        """Returns this reward model with the scores of its heads combined in another way.

        The weights are shared.

        Args:
            ensemble: "mean" or "min", the least score of any head.

        Raises:
            InputError: there is one head only, or no such way to combine them.
        """
        check_ensemble(ensemble, self.model.config)
        if self.is_linear == (ensemble == "mean"):
            return self
        model: Any = nnx.merge(*nnx.split(self.model))
        model.ensemble = ensemble
        return RewardModel(model, self.tokenizer, self.max_length, self.batch_size)

    def feature_weights(self) -> np.ndarray:
        """Returns what a unit of every latent adds to the score, float32 `[M]`.

        Of an ensemble these are the weights of the mean head.

        Raises:
            InputError: the reward model has no SAE.
        """
        assert self.sae is not None  # raises without one
        return self.model.feature_weights()

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The split model for compiled programs; splitting can take longer than running one."""
        return nnx.split(self.model)

    def score(
        self,
        prompts: Sequence[PromptValue],
        responses: Sequence[str],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Scores responses to prompts.

        Args:
            prompts: the prompts: texts, or conversations as lists of {"role", "content"} whose last
                turn is the user's.
            responses: one response to each prompt.
            clamp: changes latents before the head reads them; {feature: value} sets features.
            latent_indices: the features to return; by default all M.

        Returns:
            (scores `[B]`, latents `[B, M]` before the change), float32, in the given order. The
            latents are None if the reward model has no SAE.

        Raises:
            InputError: there are not as many prompts as responses, or an argument is no text or
                names a feature or a value that cannot be.
        """
        rows = self._encode_all(prompts, responses)
        return self.score_tokens(rows, clamp, latent_indices)

    def score_with_states(
        self,
        prompts: Sequence[PromptValue],
        responses: Sequence[str],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Any, np.ndarray]:
        """Scores responses, and returns their pooled states from the same forward pass.

        Args:
            prompts: as in `score`, like all arguments.
            responses: one response to each prompt.
            clamp: changes latents before the head reads them.
            latent_indices: the features to return.

        Returns:
            (scores, latents) as in `score`, and the states `[B, D]` float32 that an SAE reads: of a
            SARM the standardised ones, of a classifier those that its head reads.

        Raises:
            InputError: as `score`.
        """
        rows = self._encode_all(prompts, responses)
        arguments = self._score_arguments(clamp, latent_indices)
        x_bd = np.zeros((len(rows), self.state_size), np.float32)
        score_b, z_bf = self._empty_results(len(rows), latent_indices)
        self._fill(_score_with_states, rows, arguments, (score_b, z_bf, x_bd))
        return score_b, z_bf, x_bd

    def encode(self, prompt: PromptValue, response: str) -> list[int]:
        """Encodes a prompt, as in `score`, and its response.

        For a SARM it ends in the end-of-turn token. A classifier reads all that its chat template
        writes, as transformers does, which may end in a newline.
        """
        prompt = parse_prompt(prompt, "prompt")
        is_sarm = isinstance(self.model, SARM)
        return encode_conversation(
            self.tokenizer,
            prompt,
            response,
            max_length=self.max_length,
            ends_with_turn=is_sarm,
        )

    def programs(
        self,
        batches: Iterable[Sequence[int]],
        extra: int,
        clamp: Intervention | None = None,
        latent_indices: Sequence[int] | None = None,
        states: bool = False,
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields functions that lower what `score` runs, one for every shape that it can pad to.

        Args:
            batches: the number of tokens of each conversation without its response, per batch.
            extra: the maximum number of tokens of a response.
            clamp: as in `score`.
            latent_indices: as in `score`.
            states: lower what `score_with_states` runs instead.
        """
        shapes: set[tuple[int, int]] = set()
        for lengths in batches:
            # The n-th longest conversation lies between the n-th longest of these two cases.
            least = self._chunks(lengths)
            most = self._chunks([length + extra for length in lengths])
            for (_, (rows, shortest)), (_, (_, longest)) in zip(least, most, strict=True):
                length = shortest
                shapes.add((rows, length))
                while length < longest:
                    length = min(scored_length(length + 1), self.max_length)
                    shapes.add((rows, length))
        arguments = self._score_arguments(clamp, latent_indices)
        program = _score_with_states if states else _score
        yield from self._new_programs(program, sorted(shapes), arguments)

    def score_tokens(
        self,
        rows: Sequence[Sequence[int]],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Scores encoded conversations, without padding, like `score`.

        Raises:
            InputError: a row is empty, too long, or has ids of no token; or as `score`.
        """
        most = min(self.max_length, self._positions)
        check_rows(rows, vocab_size=self.model.config.trunk.vocab_size, most=most)
        arguments = self._score_arguments(clamp, latent_indices)
        score_b, z_bf = self._empty_results(len(rows), latent_indices)
        self._fill(_score, rows, arguments, (score_b, z_bf))
        return score_b, z_bf

    def _empty_results(
        self, rows: int, latent_indices: Sequence[int] | None
    ) -> tuple[np.ndarray, Any]:
        """Returns arrays for scores and latents; None in place of latents without an SAE."""
        score_b, z_bf = np.zeros(rows, np.float32), None
        if self.has_features:
            width = self.latent_size if latent_indices is None else len(latent_indices)
            z_bf = np.zeros((rows, width), np.float32)
        return score_b, z_bf

    def _fill(self, program, rows, arguments, arrays) -> None:
        """Runs a program on all rows and writes its results into `arrays`, in the given order."""
        for batch, results in self._run_batches(program, rows, arguments):
            for array, result in zip(arrays, results, strict=True):
                if array is not None:
                    array[batch] = result[: len(batch)]

    def store(
        self, prompts: Sequence[PromptValue], responses: Sequence[str], label: str = "responses"
    ) -> tuple[np.ndarray, Latents]:
        """Scores responses and stores all their latents in far less memory than `[N, M]`.

        The trunk runs once, in batches of similar lengths, with a progress bar. A conversation that
        occurs several times, such as an answer in several pairs, is run once.

        Args:
            prompts: the prompts, as in `score`.
            responses: one response to each prompt.
            label: the name of the progress bar.

        Returns:
            (scores `[N]`, latents), in the given order.

        Raises:
            InputError: a score or a latent is not finite; or as `score`.
        """
        sae = self.sae.config
        encoded = [tuple(row) for row in self._encode_all(prompts, responses)]
        number = {row: n for n, row in enumerate(dict.fromkeys(encoded))}
        rows, number_n = list(number), np.asarray([number[row] for row in encoded], np.int64)
        width = sae.k if sae.use_topk else sae.hidden_size
        score_n, kept_nk = np.zeros(len(rows), np.float32), np.zeros((len(rows), width), np.float32)
        index_nk = np.zeros((len(rows), sae.k if sae.use_topk else 0), np.int32)
        with tqdm(total=len(rows), desc=label, unit="row") as bar:
            for batch, (scores, kept, indices) in self._run_batches(_code, rows):
                score_n[batch] = scores[: len(batch)]
                kept_nk[batch], index_nk[batch] = kept[: len(batch)], indices[: len(batch)]
                bar.update(len(batch))
        require_finite({"scores": score_n, "latents": kept_nk}, f"the {self._kind}, {label}")
        score_n, kept_nk, index_nk = score_n[number_n], kept_nk[number_n], index_nk[number_n]
        if sae.use_topk:
            return score_n, TopKLatents(kept_nk, index_nk, sae.latent_size)
        return score_n, EncodedLatents(kept_nk, self.sae)

    def _encode_all(
        self, prompts: Sequence[PromptValue], responses: Sequence[str]
    ) -> list[list[int]]:
        """Parses the prompts, and encodes each with its response."""
        _check_lists(prompts, responses)
        parsed = [parse_prompt(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
        return [self.encode(p, r) for p, r in zip(parsed, responses, strict=True)]

    def _score_arguments(self, clamp, latent_indices):
        """Returns the last arguments of `_score`: the intervention and the features to return."""
        if clamp is None and latent_indices is None:
            return None, None
        size = self.latent_size
        if isinstance(clamp, dict):
            clamp = intervention(size, set_to=clamp)
        elif clamp is not None:
            clamp.check(size)
        if latent_indices is None:
            return clamp, None
        return clamp, check_features("latent_indices", latent_indices, size)

    def _run_batches(self, program, rows, arguments=()):
        """Yields (row numbers of a batch, results on the host); the next batch runs meanwhile.

        If several shapes are new to the program, it is first compiled for all of them at once.

        Args:
            program: a compiled function of the split model, tokens, mask and `arguments`.
            rows: the encoded conversations.
            arguments: the last arguments of `program`.
        """
        chunks = list(self._chunks([len(row) for row in rows]))
        new = list(self._new_programs(program, [shape for _, shape in chunks], arguments))
        if len(new) > 1:
            compile_programs(new)

        def start(batch, shape):
            padded = self._pad([rows[i] for i in batch], shape)
            return batch, program(*self._split, *padded, *arguments)

        started: Any = (start(batch, shape) for batch, shape in chunks)
        for (batch, result), _ in pairwise(chain(started, [None])):
            yield batch, fetch(result)

    def _new_programs(self, program, shapes, arguments) -> Iterator[Callable[[], Lowered]]:
        """Yields functions that lower `program` for the shapes that it was not compiled for yet."""
        leaves = tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(arguments))
        for shape in dict.fromkeys(shapes):
            signature = program, shape, jax.tree.structure(arguments), leaves
            if signature not in self._compiled:
                self._compiled.add(signature)
                padded = self._pad([[0] * shape[1]], shape)
                yield partial(program.lower, *self._split, *padded, *arguments)

    def _chunks(self, lengths):
        """Sorts rows by length and yields (row numbers of a batch, its padded shape)."""
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            length = min(scored_length(lengths[batch[-1]]), self.max_length)
            yield batch, (_padded_rows(len(batch), self.batch_size), length)

    def _pad(self, rows, shape):
        """Pads rows to a shape and puts them on the mesh; missing rows repeat the first one."""
        filler = [rows[0]] * (shape[0] - len(rows))
        padded = pad_batch([*rows, *filler], shape[1], pad_id(self.tokenizer))
        return self.model.trunk.placement.rows(padded)


def _check_lists(prompts: Sequence[PromptValue], responses: Sequence[str]) -> None:
    """Raises InputError unless both are lists of as many prompts and texts."""
    expected: list[tuple] = [
        ("prompts", prompts, "texts or conversations", (str, list, tuple, Conversation)),
        ("responses", responses, "texts", str),
    ]
    for name, texts, wanted, kinds in expected:
        if isinstance(texts, str):
            raise InputError(f"{name}: expected a list of texts, found a text")
        wrong = [text for text in texts if not isinstance(text, kinds)]
        if wrong:
            raise InputError(f"{name}: expected {wanted}, found {type(wrong[0]).__name__}")
    if len(prompts) != len(responses):
        raise InputError(f"{len(prompts)} prompts for {len(responses)} responses")


def _padded_rows(rows: int, batch_size: int) -> int:
    """Rounds up to a power of two, at most `batch_size`, so that few batch sizes are compiled."""
    return min(1 << (rows - 1).bit_length(), batch_size)


@partial(jax.jit, static_argnums=0)
def _score(graphdef, state, tokens_bt, mask_bt, change, indices):
    score_b, z_bf = nnx.merge(graphdef, state)(tokens_bt, mask_bt, change)
    return score_b, z_bf if indices is None or z_bf is None else z_bf[:, indices]


@partial(jax.jit, static_argnums=0)
def _score_with_states(graphdef, state, tokens_bt, mask_bt, change, indices):
    """Returns what `_score` returns, and the pooled states `[B, D]`."""
    model = nnx.merge(graphdef, state)
    x_bd = model.pooled(tokens_bt, mask_bt)
    z_bf = None if model.sae is None else model.sae.encode(x_bd)
    score_b = model.reward(x_bd, z_bf, change)
    return score_b, z_bf if indices is None or z_bf is None else z_bf[:, indices], x_bd


@partial(jax.jit, static_argnums=0)
def _code(graphdef, state, tokens_bt, mask_bt):
    """Returns (scores, k kept values, their indices); without TopK (scores, pooled states, [])."""
    model = nnx.merge(graphdef, state)
    x_bd = model.pooled(tokens_bt, mask_bt)
    z_bf = model.sae.encode(x_bd)
    score_b = model.reward(x_bd, z_bf)
    if not model.config.sae.use_topk:
        return score_b, x_bd, jnp.zeros((len(tokens_bt), 0), jnp.int32)
    # A kept value may be negative; all others are 0.
    _, index_bk = jax.lax.top_k(jnp.abs(z_bf), model.config.sae.k)
    return score_b, jnp.take_along_axis(z_bf, index_bk, axis=1), index_bk


def lower_score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    placement: Placement,
    rows: int,
    length: int,
    watched: int,
) -> Lowered:
    """Lowers the scoring program from shapes alone.

    Args:
        graphdef: the split model.
        state: its state, of arrays or their descriptions.
        placement: the mesh.
        rows: conversations in a batch.
        length: the padded number of tokens of a conversation.
        watched: the number of latents that are returned per row.
    """
    tokens_bt, mask_bt = (placement.abstract_rows((rows, length), t) for t in (jnp.int32, bool))
    indices = placement.abstract_replicated(jax.ShapeDtypeStruct((watched,), jnp.int32))
    return _score.lower(graphdef, state, tokens_bt, mask_bt, None, indices)


def lower_code(
    graphdef: nnx.GraphDef, state: nnx.State, placement: Placement, rows: int, length: int
) -> Lowered:
    """Lowers the program of `RewardModel.store` from shapes alone; arguments as `lower_score`."""
    tokens_bt, mask_bt = (placement.abstract_rows((rows, length), t) for t in (jnp.int32, bool))
    return _code.lower(graphdef, placement.abstract_parameters(state), tokens_bt, mask_bt)
