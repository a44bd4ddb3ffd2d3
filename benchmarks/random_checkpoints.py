"""Write random inputs of a run of full_method at full size: models, prompts, demonstrations.

    python -m benchmarks.random_checkpoints DIR

DIR/llama_3_1_8b_instruct and DIR/llama_sarm_4b become Hugging Face directories with random bits in
the shapes of configs/architectures, 25 GB in all. DIR/prompts.jsonl and DIR/demos.jsonl contain
words of their tokenizer.
"""

import argparse
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.full_size_conversion import read_architecture, stored_bytes, write_checkpoint
from conversion.scratch import check_space
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import write_jsonl

MODELS = ("llama_3_1_8b_instruct", "llama_sarm_4b")
ROWS, PROMPT_WORDS, RESPONSE_WORDS = 64, (400, 505), 200


def main() -> None:
    """Writes the models in parallel, then prompts and demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--architectures", type=Path, default=Path("configs/architectures"))
    args = parser.parse_args()
    if args.directory.exists():
        parser.error(f"directory={args.directory}: exists already; name a new directory")
    try:
        models = [read_architecture(args.architectures / model) for model in MODELS]
        check_space(args.directory, sum(stored_bytes(specs) for _, specs in models))
    except InputError as error:
        parser.error(str(error))
    args.directory.mkdir(parents=True)
    jobs = [
        (args.directory / name, hf, specs) for name, (hf, specs) in zip(MODELS, models, strict=True)
    ]
    with get_context("spawn").Pool(len(MODELS)) as pool:
        pool.starmap(write_checkpoint, jobs)
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(10, 30_000, count))

    fewest, most = PROMPT_WORDS
    prompts = [words(count) for count in rng.integers(fewest, most, size=ROWS)]
    demos = [{"prompt": prompt, "response": words(RESPONSE_WORDS)} for prompt in prompts]
    write_jsonl(args.directory / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_jsonl(args.directory / "demos.jsonl", demos)


if __name__ == "__main__":
    main()
