"""Converts a Hugging Face directory (or repository) to our layout, one tensor at a time.

    python -m conversion.from_hf --kind=KIND --src=SRC --dst=DIR [--dtype=bfloat16|float32]
    python -m conversion.from_hf --kind=reward --src=SRC --sae=SAE --dst=DIR [--dtype=...]

KIND is policy, sarm, or reward for a sequence classifier with one label. SAE is the directory of an
SAE in SAELens' format, which the reward model gets in place of any that it has.

The result holds the weights in our orientation, `sarm_jax.json`, and the tokenizer. Without
`--dtype` every tensor keeps its own dtype. Everything is checked before anything is written.
"""

import time
from pathlib import Path
from typing import Any

from absl import flags

from conversion import cli
from conversion.checkpoint import Kind, open_checkpoint, verified_files
from conversion.converted import write_converted
from conversion.load import load_hf_tokenizer
from conversion.saelens import read_sae
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import LlamaConfig

FLAGS = flags.FlagValues()
KINDS = ["policy", "sarm", "reward"]
flags.DEFINE_enum("kind", None, KINDS, "Kind of model.", FLAGS, required=True)
flags.DEFINE_string("src", None, "HF directory or repository id.", FLAGS, required=True)
flags.DEFINE_string("dst", None, "New directory to write.", FLAGS, required=True)
flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Default: the dtype of each tensor.", FLAGS
)
flags.DEFINE_string("sae", None, "SAE in SAELens' format, for --kind=reward.", FLAGS)


def convert(
    src: str | Path,
    dst: str | Path,
    kind: Kind,
    *,
    dtype: str | None = None,
    sae: str | Path | None = None,
) -> str:
    """Writes the converted directory and returns a summary line.

    The host holds two shards and one tensor at a time.

    Args:
        src: an HF directory or a repository id.
        dst: the new directory.
        kind: "policy", "sarm" or "reward".
        dtype: the dtype of the weights; by default every tensor keeps its own.
        sae: the directory of an SAE in SAELens' format, for a reward model.

    Raises:
        InputError: the model or the SAE cannot be read, they do not fit, or `dst` cannot be
            written.
    """
    start = time.perf_counter()
    if sae is not None and kind != "reward":
        raise InputError(f"--sae={sae}: a model of --kind={kind} takes none, --kind=reward does")
    checkpoint = open_checkpoint(src, kind)
    files = verified_files(checkpoint)
    config = checkpoint.config
    trunk = config if isinstance(config, LlamaConfig) else config.trunk
    load_hf_tokenizer(checkpoint.directory, trunk.vocab_size)
    own = None if sae is None else read_sae(sae)
    if own is not None and own.config.hidden_size != trunk.hidden_size:
        raise InputError(
            f"--sae={sae}: the SAE reads states of {own.config.hidden_size} dimensions, but those "
            f"of {src} have {trunk.hidden_size}"
        )
    tensors, size = write_converted(checkpoint, files, dst, dtype=dtype, sae=own)
    seconds = time.perf_counter() - start
    features = "" if own is None else f" with {own.config.latent_size} features"
    return f"{dst}: {tensors} tensors{features}, {size:,} bytes, {seconds:.1f} s"


def main(values: Any) -> str:
    """Runs the command with parsed flags."""
    return convert(values.src, values.dst, kind=values.kind, dtype=values.dtype, sae=values.sae)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
