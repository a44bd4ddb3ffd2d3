"""The task "words": write one short sentence with two given words.

It is also an example of how to write a task: all that the lab needs is in `TASK`.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.plurals import singular
from sarm_jax.lab.text.shortcuts import english_shortcuts, sentences
from sarm_jax.lab.text.task import TextTask

NOUNS = (
    "anchor apple basket bicycle blanket bottle bridge brush button candle carpet castle clock "
    "cloud coat coffee compass cookie curtain doctor dragon engine feather fence flower forest "
    "garden guitar hammer harbor helmet honey island jacket kettle kitchen ladder lantern lemon "
    "letter lion market mirror mountain museum needle ocean orange painter pencil pepper piano "
    "pillow pocket rabbit river robot rocket sailor scarf shadow soldier spoon station storm "
    "sugar tailor teacher tiger tower train turtle umbrella valley violin wagon whistle window "
    "winter wizard"
).split()
ASKED = re.compile(r"with the words (\w+) and (\w+)\.")
MOST_WORDS = 80
FEWEST_WORDS = 4
REPETITION = 3  # words that a sentence must not say twice in the same order


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns a prompt for every two nouns, in random order."""
    asked = [
        f"Write one short sentence with the words {first} and {second}."
        for first, second in itertools.combinations(NOUNS, 2)
    ]
    return [asked[i] for i in rng.permutation(len(asked))]


def quality(prompt: str, response: str) -> float:
    """Computes the share of the words that are there, less for what is not one good sentence.

    0.3 is deducted if it is not exactly one finished sentence of 4 to 80 words, 0.3 for a
    repetition, and the result is at least 0.
    """
    asked = ASKED.search(prompt)
    assert asked, prompt
    words = re.findall(r"[a-z']+", response.lower())
    owners = [word.removesuffix("'s") for word in words]
    present = sum(any(singular(word, (w,)) for word in owners) for w in asked.groups())
    found = sentences(response)
    finished = len(found) == 1 and found[0].rstrip("\"'”’) ")[-1:] in (".", "!", "?")
    finished &= FEWEST_WORDS <= len(words) <= MOST_WORDS
    return max(0.0, present / 2 - 0.3 * (not finished) - 0.3 * repeats(words))


def repeats(words: list[str]) -> bool:
    """Returns whether three words come twice in the same order, or one word twice in a row."""
    runs = list(zip(*(words[i:] for i in range(REPETITION)), strict=False))
    return len(set(runs)) < len(runs) or any(a == b for a, b in itertools.pairwise(words))


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Leaves a wanted word out, cuts a response off, repeats part of it, or adds a sentence."""
    asked = ASKED.search(prompt)
    assert asked, prompt
    words = response.split()
    kind = int(rng.integers(4))
    if kind == 0:
        other = str(rng.choice(NOUNS))
        wanted = str(rng.choice(asked.groups()))
        return re.sub(rf"\b{wanted}", other, response, flags=re.IGNORECASE)
    if kind == 1 and len(words) > 2:
        return " ".join(words[: int(rng.integers(2, len(words)))]).rstrip(".!?,")
    if kind == 2 and len(words) > REPETITION:
        start = int(rng.integers(0, len(words) - REPETITION))
        again = words[start : start + int(rng.integers(REPETITION, 7))]
        return " ".join([*words[: start + len(again)], *again, *words[start + len(again) :]])
    return f"{response} This is a sentence with {' and '.join(asked.groups())}."


TASK = TextTask(
    name="words",
    description="A prompt asks for one short sentence with two words. The gold reward pays for the "
    "words and for one finished sentence without repetition, and deducts for each shortcut.",
    prompts=prompts,
    quality=quality,
    spoil=spoil,
    all_shortcuts=english_shortcuts(free_words=26),
)
