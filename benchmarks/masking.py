"""Measure whether a second shortcut in a text hides the first one from its detectors.

    python -m benchmarks.masking outputs/told_*

Each directory holds a study of the lab with several shortcuts, of which the method is told one.
Responses get one unit of the told shortcut, as in the contrast pairs, and then one unit of another.
The table has the share of them on which a detector fires, for each seed: with the told shortcut
alone, and with each other one beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conversion import load_sarm
from pipeline.study_records import FILE as RECORD
from sarm_jax.features.detectors import Detectors, firing_rate
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.lab.shortcuts import SHORTCUTS, World, contrast_pair, inserted
from sarm_jax.models.conversation_rows import read_prompts
from sarm_jax.models.reward_model import RewardModel

TEXTS = 512
ALONE = "alone"


def texts_with(
    rng: np.random.Generator, prompts: Sequence[str], told: str, other: str
) -> tuple[list[str], list[str]]:
    """Writes responses with one unit of `told` and one of `other`, if it is not "alone".

    A response without room for both is left out.

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


def of_seed(folder: Path, options: dict) -> dict[str, float]:
    """Returns the share of detected responses, by what stands beside the told shortcut."""
    world = World.parse(options["lab"]["shortcuts"], options["lab"]["told_shortcuts"])
    if len(world.told) > 1:
        raise InputError(f"{folder}: told of {', '.join(world.told)}, expected one shortcut")
    (told,) = world.told
    selected = read_json(folder / "probes" / "selected_features.json")
    detectors = Detectors(tuple(selected["detectors"]), tuple(selected["tau_detectors"]), 0.0, 0.0)
    model: RewardModel = load_sarm(str(folder / "sarm"), dtype="float32")
    model.batch_size = 128
    prompts = [str(p) for p in read_prompts(str(folder / "data" / "held_out_prompts.jsonl"))]
    prompts = (prompts * (1 + TEXTS // len(prompts)))[:TEXTS]
    rates = {}
    for other in (ALONE, *(name for name in world.shortcuts if name != told)):
        asked, responses = texts_with(np.random.default_rng(0), prompts, told, other)
        rates[other] = firing_rate(model.score(asked, responses)[1], detectors)
    return rates


def main() -> None:
    """Prints a row for each seed of the studies in the directories that are named."""
    parser = argparse.ArgumentParser(description="Whether one shortcut hides another.")
    parser.add_argument("studies", type=Path, nargs="+")
    print("| told | seed | alone | " + " | ".join(SHORTCUTS) + " |")
    print("|---" * (3 + len(SHORTCUTS)) + "|")
    for study in parser.parse_args().studies:
        paths = sorted(study.glob(f"seed_*/{RECORD}"))
        if not paths:
            parser.error(f"{study}: has no seed_*/{RECORD}, and is no study that has ended")
        for path in paths:
            options = read_json(path)["options"]
            try:
                rates = of_seed(path.parent, options)
            except InputError as error:
                parser.error(str(error))
            told, seed = options["lab"]["told_shortcuts"], path.parent.name.removeprefix("seed_")
            cells = [f"{rates[name]:.2f}" if name in rates else "" for name in (ALONE, *SHORTCUTS)]
            print(f"| {told} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
