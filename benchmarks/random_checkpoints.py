"""What a run of full_method reads, at full size and random: both models, prompts, demonstrations.

    python -m benchmarks.random_checkpoints DIR

Hugging Face directories DIR/llama_3_1_8b_instruct and DIR/llama_sarm_4b, 25 GB, of random bits in
the shapes of configs/architectures; prompts.jsonl and demos.jsonl of words of their tokenizer.
"""

import argparse
import json
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.full_size_conversion import read_architecture, stored_bytes, write_checkpoint
from conversion.scratch import check_space
from sarm_jax.io.errors import InputError

MODELS = ("llama_3_1_8b_instruct", "llama_sarm_4b")
ROWS, PROMPT_WORDS, RESPONSE_WORDS = 64, (400, 505), 200


def main() -> None:
    """Writes them, the models side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a new one")
    parser.add_argument("--architectures", type=Path, default=Path("configs/architectures"))
    args = parser.parse_args()
    if args.directory.exists():
        parser.error(f"{args.directory}: exists already; name a new directory")
    try:
        models = [read_architecture(args.architectures / model) for model in MODELS]
        check_space(args.directory, sum(stored_bytes(specs) for _, specs in models))
    except InputError as error:
        parser.error(str(error))
    args.directory.mkdir(parents=True)
    places = [args.directory / model for model in MODELS]
    with get_context("spawn").Pool(len(MODELS)) as pool:
        pool.starmap(
            write_checkpoint, [(place, *m) for place, m in zip(places, models, strict=True)]
        )
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(10, 30_000, count))

    prompts = [words(count) for count in rng.integers(*PROMPT_WORDS, ROWS)]
    demos = [{"prompt": prompt, "response": words(RESPONSE_WORDS)} for prompt in prompts]
    write_lines(args.directory / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_lines(args.directory / "demos.jsonl", demos)


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
