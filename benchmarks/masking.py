"""Measure whether a second shortcut in a text hides the first one from the detectors.

    python -m benchmarks.masking outputs/told_*

Each directory holds a study of the lab with several shortcuts, of which the method is told one.
Responses get one unit of the told shortcut, as in the contrast pairs, and then one unit of another.
For each seed the table has the share of the responses on which a detector fires: with the told
shortcut alone, and together with each other shortcut.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lab_studies import (
    load_seed_model,
    read_detectors,
    recorded_options,
    refusing,
)
from sarm_jax.features.detectors import firing_rate
from sarm_jax.io.errors import InputError
from sarm_jax.lab.shortcuts import SHORTCUTS, World, contrast_pair, inserted
from sarm_jax.models.conversation_rows import read_prompts

TEXTS = 512  # prompts that responses are written to; they are repeated if there are fewer
ALONE = "alone"


def texts_with(
    rng: np.random.Generator, prompts: Sequence[str], told: str, other: str
) -> tuple[list[str], list[str]]:
    """Writes responses with one unit of `told` and, unless it is "alone", one of `other`.

    A response that has no room for both is left out.

    Returns:
        (prompts, responses).
    """
    names = (told,) if other == ALONE else (told, other)
    kept: list[tuple[str, str]] = []
    for prompt in prompts:
        text = contrast_pair(rng, prompt, SHORTCUTS[told], 1)["rejected"]
        if other != ALONE:
            text = inserted(rng, text, SHORTCUTS[other].words(rng, prompt, text, 1))
        if all(SHORTCUTS[name].count(prompt, text) for name in names):
            kept.append((prompt, text))
    return [prompt for prompt, _ in kept], [text for _, text in kept]


def detected_shares(folder: Path, options: dict) -> dict[str, float]:
    """Measures the share of detected responses of a seed, by the second shortcut or "alone"."""
    world = World.parse(options["lab"]["shortcuts"], options["lab"]["told_shortcuts"])
    if len(world.told) > 1:
        raise InputError(f"{folder}: told of {', '.join(world.told)}, expected one shortcut")
    (told,) = world.told
    detectors, model = read_detectors(folder), load_seed_model(folder)
    prompts = [str(p) for p in read_prompts(str(folder / "data" / "held_out_prompts.jsonl"))]
    prompts = (prompts * (1 + TEXTS // len(prompts)))[:TEXTS]
    rates = {}
    for other in (ALONE, *(name for name in world.shortcuts if name != told)):
        kept_prompts, responses = texts_with(np.random.default_rng(0), prompts, told, other)
        rates[other] = firing_rate(model.score(kept_prompts, responses)[1], detectors)
    return rates


def main() -> None:
    """Prints a row for each seed of the studies in the directories that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+", help="directories of studies")
    studies = parser.parse_args().studies
    with refusing(parser):
        seeds = [seed for study in studies for seed in recorded_options(study).items()]
        print("| told | seed | alone | " + " | ".join(SHORTCUTS) + " |")
        print("|---" * (3 + len(SHORTCUTS)) + "|")
        for folder, options in seeds:
            print_row(folder, options)


def print_row(folder: Path, options: dict) -> None:
    """Prints the row of a seed."""
    shares, seed = detected_shares(folder, options), folder.name.removeprefix("seed_")
    cells = [f"{shares[name]:.2f}" if name in shares else "" for name in (ALONE, *SHORTCUTS)]
    told = options["lab"]["told_shortcuts"]
    print(f"| {told} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
