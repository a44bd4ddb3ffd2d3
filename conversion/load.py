"""Loads models from a Hugging Face directory, a converted directory, or a repository id.

The model is built without weights and then filled parameter by parameter. Beside the memory-mapped
files, the host holds one stack of layers at a time, or on a mesh one device's shard of it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from conversion.checkpoint import (
    Checkpoint,
    Kind,
    is_reward_model,
    open_checkpoint,
    verified_files,
)
from conversion.hub import CONFIG_FILES, TOKENIZER_FILES, locate
from conversion.keys import TensorSpec, abstract_model
from conversion.safetensors_io import TensorFiles, contiguous
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.io.libraries import as_input_error, native_messages_of_failure_dropped
from sarm_jax.models.chat import decode, end_of_turn_id, stop_ids
from sarm_jax.models.chat_template import chat_template
from sarm_jax.models.linear_reward import LinearReward, LinearRewardConfig
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAE
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.finite import describe, first_not_finite, is_finite
from sarm_jax.parallel.processes import raising_on_all
from sarm_jax.parallel.sharding import ONE_DEVICE, Read

LOG = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
_TRIAL = "A text."  # a broken tokenizer may be readable and fail when it is used
Place = Callable[[str, Sequence[int], Any, Read], jax.Array]


def load_policy(
    src: str | Path, dtype: str = "float32", place: Place | None = None
) -> tuple[Llama, Any]:
    """Loads a policy and its tokenizer.

    Args:
        src: an HF directory, a converted directory, or a repository id "owner/name".
        dtype: the dtype of the weights in memory, "float32" or "bfloat16".
        place: puts a parameter on devices, such as `Placement.load`. Its arguments are the dotted
            path, the shape, the dtype, and a function that reads any region. By default the
            parameters are put on one device.

    Returns:
        (policy, tokenizer). `policy.stop_ids` are those of the tokenizer and of
        generation_config.json.

    Raises:
        InputError: the files are wrong. They are checked before any weight is loaded, and the
            message lists all problems. Or a tensor is not finite, which is checked afterwards.
    """
    check_dtype(dtype)
    checkpoint, files, tokenizer, stops = _open_policy(src)
    policy = cast(Llama, _fill(checkpoint, files, dtype=dtype, place=place))
    policy.stop_ids = stops
    return policy, tokenizer


def load_sarm(src: str | Path, dtype: str = "float32", place: Place | None = None) -> RewardModel:
    """Loads a SARM, or a reward model with an SAE, and its tokenizer; see `load_policy`."""
    check_dtype(dtype)
    return _reward_model(*_open_sarm(src), dtype=dtype, place=place)


def load_scorer(src: str | Path, dtype: str = "float32", place: Place | None = None) -> RewardModel:
    """Loads a SARM, or a reward model with or without an SAE; see `load_policy`."""
    check_dtype(dtype)
    return _reward_model(*_open_reward(src, _kind_of_sarm(src)), dtype=dtype, place=place)


def load_sae(src: str | Path, place: Place | None = None) -> SAE:
    """Loads the SAE of a SARM in float32, and no weight of its trunk; see `load_policy`.

    The dotted path that `place` gets begins with "sae".
    """
    checkpoint, files, _ = _open_sarm(src)
    return cast(SAE, _fill(checkpoint, files, dtype="float32", place=place, attribute="sae"))


def load_reward_model(
    src: str | Path, dtype: str = "float32", place: Place | None = None
) -> RewardModel:
    """Loads a sequence classifier with one label and its tokenizer; see `load_policy`.

    It has no features unless an SAE was trained for it: `score` then returns no latents.
    """
    check_dtype(dtype)
    return _reward_model(*_open_reward(src, "reward"), dtype=dtype, place=place)


def _reward_model(
    checkpoint: Checkpoint, files: TensorFiles, tokenizer: Any, *, dtype: str, place: Place | None
) -> RewardModel:
    model = cast(SARM | LinearReward, _fill(checkpoint, files, dtype=dtype, place=place))
    return RewardModel(model, tokenizer)


def check_models(
    policy: str | Path = "",
    sarm: str | Path = "",
    reward: str | Path = "",
    scorer: str | Path = "",
) -> None:
    """Checks the models that are named, as loading them does, without loading a weight."""
    if policy:
        _open_policy(policy)
    if sarm:
        _open_sarm(sarm)
    if scorer:
        _open_reward(scorer, _kind_of_sarm(scorer))
    if reward:
        _open_reward(reward, "reward")


def _open_policy(src: str | Path) -> tuple[Checkpoint, TensorFiles, Any, tuple[int, ...]]:
    checkpoint = open_checkpoint(src, "policy")
    files = verified_files(checkpoint)
    vocab_size = cast(LlamaConfig, checkpoint.config).vocab_size
    tokenizer = load_hf_tokenizer(checkpoint.directory, vocab_size)
    return checkpoint, files, tokenizer, _stop_ids(checkpoint, tokenizer, vocab_size)


def _open_sarm(src: str | Path) -> tuple[Checkpoint, TensorFiles, Any]:
    read_sarm_config(src)
    return _open_reward(src, _kind_of_sarm(src))


def _open_reward(src: str | Path, kind: Kind) -> tuple[Checkpoint, TensorFiles, Any]:
    checkpoint = open_checkpoint(src, kind)
    files = verified_files(checkpoint)
    vocab_size = cast(SARMConfig | LinearRewardConfig, checkpoint.config).trunk.vocab_size
    tokenizer = load_hf_tokenizer(checkpoint.directory, vocab_size)
    chat_template(tokenizer)  # checks it: a response is scored at the end of its turn
    return checkpoint, files, tokenizer


def read_policy_config(src: str | Path) -> LlamaConfig:
    """Reads the architecture of a policy without reading its weights."""
    return cast(LlamaConfig, open_checkpoint(src, "policy", CONFIG_FILES).config)


def read_reward_config(src: str | Path) -> LinearRewardConfig:
    """Reads the architecture of a sequence classifier without reading its weights."""
    return cast(LinearRewardConfig, open_checkpoint(src, "reward", CONFIG_FILES).config)


def read_sarm_config(src: str | Path) -> SARMConfig | LinearRewardConfig:
    """Reads the architecture of a SARM, or of a reward model with an SAE, without its weights."""
    config = read_scorer_config(src)
    if config.sae is None:
        raise InputError(
            f"{src}: not a SARM but a classifier without an SAE, whose score no latents explain; "
            f"--stage=train_sae --config.train_sae.model={src} trains an SAE for it, and "
            "--stage=train_sarm makes a SARM from a language model"
        )
    return config


def read_scorer_config(src: str | Path) -> SARMConfig | LinearRewardConfig:
    """Reads the architecture of a SARM, or of a reward model with or without an SAE."""
    config = open_checkpoint(src, _kind_of_sarm(src), CONFIG_FILES).config
    assert not isinstance(config, LlamaConfig)
    return config


def _kind_of_sarm(src: str | Path) -> Kind:
    """Returns the kind of a model that was given as a SARM: it may be a classifier with an SAE."""
    return "reward" if is_reward_model(src) else "sarm"


def load_hf_tokenizer(src: str | Path, vocab_size: int | None = None) -> Any:
    """Loads the fast tokenizer of a model.

    Args:
        src: as in `load_policy`.
        vocab_size: the number of tokens that the model embeds, if known.

    Raises:
        InputError: tokenizer.json is missing or broken, or has ids beyond `vocab_size`.
    """
    directory = locate(src, TOKENIZER_FILES)
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory}: tokenizer.json is missing")
    # The import is slow, so it comes after the first check.
    from transformers import PreTrainedTokenizerFast

    with (
        native_messages_of_failure_dropped(),
        as_input_error(f"{directory}: the tokenizer cannot be read"),
    ):
        # This class keeps the file as it is. AutoTokenizer rebuilds the pipeline of some classes,
        # with another result.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        if isinstance(tokenizer.chat_template, dict):  # several templates: take the one for chats
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        vocabulary = tokenizer.get_vocab()
        for options in ({}, {"add_special_tokens": False, "split_special_tokens": True}):
            ids = tokenizer(_TRIAL, **options)["input_ids"]
            decode(tokenizer, ids)
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise InputError(
            f"{directory}/tokenizer.json: model.dropout="
            f"{tokenizer.backend_tokenizer.model.dropout} makes tokens depend on chance: "
            "set it to null"
        )
    if not ids:
        raise InputError(f"{directory}: the tokenizer cannot be read ({_TRIAL!r} has no tokens)")
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if vocab_size is not None and last >= vocab_size:
        raise InputError(
            f"{directory}: token {token!r} has id {last}, but the model embeds {vocab_size} tokens"
        )
    return tokenizer


def _fill(
    checkpoint: Checkpoint,
    files: TensorFiles,
    dtype: str,
    place: Place | None,
    attribute: str = "",
) -> nnx.Module:
    """Builds a model, or its `attribute`; loads its parameters and checks their values."""
    place = ONE_DEVICE.load if place is None else place
    specs: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in checkpoint.specs():
        specs.setdefault(spec.path, []).append(spec)
    model = abstract_model(checkpoint.config, dtype)
    graphdef, state = nnx.split(getattr(model, attribute) if attribute else model)
    prefix = (attribute,) if attribute else ()
    filled = []
    with raising_on_all():  # a file may be damaged on one host only
        for keys, variable in nnx.to_flat_state(state):
            path = (*prefix, *map(str, keys))
            read = _reader(checkpoint, files, specs=specs[path], dtype=variable.dtype)
            array = place(".".join(path), variable.shape, variable.dtype, read)
            filled.append((keys, variable.replace(array)))
    arrays = ((".".join((*prefix, *map(str, keys))), v[...]) for keys, v in filled)
    bad = first_not_finite(arrays)
    if bad is not None:
        raise InputError(
            _describe_not_finite(checkpoint, files, specs[tuple(bad.split("."))], dtype)
        )
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _describe_not_finite(
    checkpoint: Checkpoint, files: TensorFiles, specs: list[TensorSpec], dtype: str
) -> str:
    """Names the first tensor of a parameter, as stored, that is not finite in `dtype`."""
    for spec in specs:
        name = checkpoint.stored_name(spec)
        stored = files.read(name)
        source = f"{checkpoint.directory / files.shard(name)}: {name}"
        if not is_finite(stored):
            return f"{source}: {describe(stored)}, expected finite numbers"
        with np.errstate(over="ignore"):
            loaded = stored.astype(dtype)
        if not is_finite(loaded):
            largest = np.abs(stored.astype(np.float64)).max()
            return f"{source}: {largest:.3g} is too large for dtype={dtype}"
    return f"{checkpoint.directory}: {'.'.join(specs[0].path)} is not finite on its devices"


def _reader(
    checkpoint: Checkpoint, files: TensorFiles, specs: list[TensorSpec], dtype: Any
) -> Read:
    """Returns a function that reads regions of one parameter.

    `specs` are the parameter's tensors: a single one, or one per layer.
    """

    @np.errstate(over="ignore")  # what overflows is found when all parameters are checked
    def read(region: tuple[slice, ...]) -> np.ndarray:
        if specs[0].layer is None:
            array = checkpoint.read(files, specs[0], region)
            return contiguous(array).astype(dtype, copy=False)
        layers, *within_layer = region
        stack = np.empty([s.stop - s.start for s in region], dtype)
        for spec in specs[layers]:
            array = checkpoint.read(files, spec, tuple(within_layer))
            stack[spec.layer - layers.start] = contiguous(array)
        return stack

    return read


def _stop_ids(checkpoint: Checkpoint, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Collects the tokens that end a response, from the tokenizer and generation_config.json."""
    path, fields = checkpoint.directory / "generation_config.json", checkpoint.hf_config
    if path.is_file():
        fields = read_json(path)
    else:
        path = checkpoint.directory / "config.json"
    eos = fields.get("eos_token_id")
    listed = [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None]
    for token in listed:
        fits = isinstance(token, int) and not isinstance(token, bool)
        if not (fits and 0 <= token < vocab_size):
            raise InputError(f"{path}: eos_token_id={token!r}, expected ids below {vocab_size}")
    if not tokenizer.chat_template:  # a base model; encoding a prompt for it raises an error
        return tuple(sorted({*listed, tokenizer.eos_token_id} - {None}))
    chat_template(tokenizer).check_generation()
    end = end_of_turn_id(tokenizer)
    if path.name == "generation_config.json" and listed and end not in listed:
        LOG.warning(
            "%s: eos_token_id=%s does not list %d (%s), which ends a turn in the chat template; "
            "responses end at either",
            path, eos, end, chat_template(tokenizer).end_token,
        )  # fmt: skip
    return tuple(sorted({*listed, *stop_ids(tokenizer)}))


def check_dtype(dtype: str) -> None:
    """Raises InputError if the option `dtype` is not supported for weights."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
