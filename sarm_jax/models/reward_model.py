"""A SARM with its tokenizer: text in, scores and latents out.

Rows are sorted by length and run in padded batches of a few fixed shapes, so that compilations
stay bounded; a score does not depend on the rows it is batched with.
"""

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

from sarm_jax.models.chat import encode_conversation, pad_batch, pad_id, scored_length
from sarm_jax.models.latent_store import EncodedLatents, Latents, TopKLatents
from sarm_jax.models.sarm import SARM, Intervention, intervention
from sarm_jax.parallel.compilation import compile_programs
from sarm_jax.parallel.processes import fetch
from sarm_jax.parallel.sharding import Placement


class RewardModel:
    """`max_length` in tokens (longer conversations lose their beginning), `batch_size` in rows.

    Rows are put where the model's weights are, see `Llama.placement`. The model is not to be
    changed once it has scored something.
    """

    def __init__(self, model: SARM, tokenizer: Any, max_length: int = 4096, batch_size: int = 16):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._asked: set = set()  # programs and shapes, for which they are compiled already

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The model for compiled programs; to take it apart takes longer than some of them."""
        return nnx.split(self.model)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores `[B]`, latents `[B, M]`), float32, in the order given.

        `clamp` changes latents before the head reads them ({feature: value} sets them); the
        latents returned are the unchanged ones, reduced to `latent_indices` when given.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise ValueError("prompts and responses are lists of texts, found a text")
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        return self.score_tokens(rows, clamp, latent_indices)

    def encode(self, prompt: str, response: str) -> list[int]:
        """The conversation as this model reads it, ending in the end-of-turn token."""
        return encode_conversation(self.tokenizer, prompt, response, self.max_length)

    def programs(
        self,
        batches: Iterable[Sequence[int]],
        extra: int,
        clamp: Intervention | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields what `score` runs on batches of conversations, for every shape that it can pad to.

        `batches` hold the tokens of each conversation without its response, which adds 0 to
        `extra`.
        """
        shapes: set[tuple[int, int]] = set()
        for lengths in batches:
            # Whatever the responses add, the n-th longest lies between these two n-th longest.
            least = self._chunks(lengths)
            most = self._chunks([length + extra for length in lengths])
            for (_, (rows, shortest)), (_, (_, longest)) in zip(least, most, strict=True):
                length = shortest
                shapes.add((rows, length))
                while length < longest:
                    length = min(scored_length(length + 1), self.max_length)
                    shapes.add((rows, length))
        yield from self._new_programs(_score, sorted(shapes), *self._reads(clamp, latent_indices))

    def score_tokens(
        self,
        rows: Sequence[Sequence[int]],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`score` of conversations that are encoded already; padding is this method's own."""
        change, indices = self._reads(clamp, latent_indices)
        width = self.model.config.sae.latent_size if indices is None else len(indices)
        score_b, z_bf = np.zeros(len(rows), np.float32), np.zeros((len(rows), width), np.float32)
        for chosen, (scores, latents) in self._on_batches(_score, rows, change, indices):
            score_b[chosen], z_bf[chosen] = scores[: len(chosen)], latents[: len(chosen)]
        return score_b, z_bf

    def store(
        self, prompts: Sequence[str], responses: Sequence[str], label: str = "responses"
    ) -> tuple[np.ndarray, Latents]:
        """(scores `[N]`, all latents, in the order given, in far less memory than `[N, M]`).

        One pass of the trunk in batches of similar lengths, with a progress bar; a conversation
        that comes several times, such as an answer that is in several pairs, is run once.
        """
        encoded = [tuple(self.encode(p, r)) for p, r in zip(prompts, responses, strict=True)]
        number = {row: n for n, row in enumerate(dict.fromkeys(encoded))}
        rows, place_n = list(number), np.asarray([number[row] for row in encoded], np.int64)
        sae = self.model.config.sae
        width = sae.k if sae.use_topk else sae.hidden_size
        score_n, kept_nk = np.zeros(len(rows), np.float32), np.zeros((len(rows), width), np.float32)
        index_nk = np.zeros((len(rows), sae.k if sae.use_topk else 0), np.int32)
        with tqdm(total=len(rows), desc=label, unit="row") as bar:
            for chosen, found in self._on_batches(_code, rows):
                for whole, part in zip((score_n, kept_nk, index_nk), found, strict=True):
                    whole[chosen] = part[: len(chosen)]
                bar.update(len(chosen))
        score_n, kept_nk, index_nk = score_n[place_n], kept_nk[place_n], index_nk[place_n]
        if sae.use_topk:
            return score_n, TopKLatents(kept_nk, index_nk, sae.latent_size)
        return score_n, EncodedLatents(kept_nk, self.model.sae)

    def _reads(self, clamp, latent_indices):
        """What a program is told of the latents: how they are changed, and which it returns."""
        if isinstance(clamp, dict):
            clamp = intervention(self.model.config.sae.latent_size, set_to=clamp)
        return clamp, None if latent_indices is None else np.asarray(latent_indices, np.int32)

    def _on_batches(self, program, rows, *given):
        """(which rows, what `program` gives for them, on the host); the next batch runs meanwhile.

        Several shapes that are new to it are compiled side by side first.
        """
        chunks = list(self._chunks([len(row) for row in rows]))
        new = list(self._new_programs(program, [shape for _, shape in chunks], *given))
        if len(new) > 1:
            compile_programs(new)

        def start(chosen, shape):
            batch = self._batch([rows[i] for i in chosen], shape)
            return chosen, program(*self._split, *batch, *given)

        started: Any = (start(*chunk) for chunk in chunks)
        for (chosen, found), _ in pairwise(chain(started, [None])):
            yield chosen, fetch(found)

    def _new_programs(self, program, shapes, *given) -> Iterator[Callable[[], Lowered]]:
        """What lowers `program` for those of the shapes that it has not been asked for yet."""
        leaves = tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(given))
        for shape in dict.fromkeys(shapes):
            asked = program, shape, jax.tree.structure(given), leaves
            if asked not in self._asked:
                self._asked.add(asked)
                batch = self._batch([[0] * shape[1]], shape)
                yield partial(program.lower, *self._split, *batch, *given)

    def _chunks(self, lengths):
        """By length: (which rows, the shape of their batch)."""
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            length = min(scored_length(lengths[chosen[-1]]), self.max_length)
            yield chosen, (_batch_bucket(len(chosen), self.batch_size), length)

    def _batch(self, rows, shape):
        """Tokens and mask of that shape, with padding, and rows beyond them filled."""
        filler = [rows[0]] * (shape[0] - len(rows))
        padded = pad_batch([*rows, *filler], shape[1], pad_id(self.tokenizer))
        return self.model.trunk.placement.rows(padded)


def _batch_bucket(rows: int, most: int) -> int:
    """The next power of two, at most `most`: a handful of compiled batch sizes."""
    return min(1 << (rows - 1).bit_length(), most)


@partial(jax.jit, static_argnums=0)
def _score(graphdef, state, tokens_bt, mask_bt, change, indices):
    score_b, z_bf = nnx.merge(graphdef, state)(tokens_bt, mask_bt, change)
    return score_b, z_bf if indices is None else z_bf[:, indices]


@partial(jax.jit, static_argnums=0)
def _code(graphdef, state, tokens_bt, mask_bt):
    """(scores, k kept values, their indices), or without TopK (scores, pooled states, nothing)."""
    model = nnx.merge(graphdef, state)
    x_bd = model.pooled(tokens_bt, mask_bt)
    z_bf = model.sae.encode(x_bd)
    if not model.config.sae.use_topk:
        return model.head(z_bf), x_bd, jnp.zeros((len(tokens_bt), 0), jnp.int32)
    # The kept values are those that are not 0, of either sign.
    _, index_bk = jax.lax.top_k(jnp.abs(z_bf), model.config.sae.k)
    return model.head(z_bf), jnp.take_along_axis(z_bf, index_bk, axis=1), index_bk


def lower_score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    placement: Placement,
    rows: int,
    length: int,
    watched: int,
) -> Lowered:
    """The scoring program of `rows` conversations padded to `length` tokens, from shapes alone.

    `watched` is how many latents it returns per row.
    """
    tokens_bt, mask_bt = (placement.abstract_rows((rows, length), t) for t in (jnp.int32, bool))
    indices = placement.abstract_replicated(jax.ShapeDtypeStruct((watched,), jnp.int32))
    return _score.lower(graphdef, state, tokens_bt, mask_bt, None, indices)
