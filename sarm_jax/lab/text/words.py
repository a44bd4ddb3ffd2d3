"""The task "words": write one short sentence with two given words.

It is also an example of how to write a task: all that the lab needs is in `TASK`.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.plurals import singular
from sarm_jax.lab.text.sentences import ends_like_a_sentence, sentences
from sarm_jax.lab.text.shortcuts import english_shortcuts
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
REPETITION = 3  # consecutive words; a sentence that has them twice repeats itself


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns a prompt for every two nouns, in random order."""
    every = [
        f"Write one short sentence with the words {first} and {second}."
        for first, second in itertools.combinations(NOUNS, 2)
    ]
    return [every[i] for i in rng.permutation(len(every))]


def _nouns_of(prompt: str) -> tuple[str, ...]:
    """Returns the two nouns that a prompt asks for."""
    match = ASKED.search(prompt)
    assert match, prompt
    return match.groups()


def quality(prompt: str, response: str) -> float:
    """Computes the share of the two words that a response has, minus deductions, at least 0.

    0.3 is deducted if the response is not exactly one finished sentence of 4 to 80 words, and 0.3
    if it repeats itself.
    """
    nouns = _nouns_of(prompt)
    words = re.findall(r"[a-z']+", response.lower())
    owners = [word.removesuffix("'s") for word in words]
    present = sum(any(singular(word, (w,)) for word in owners) for w in nouns)
    parts = sentences(response)
    is_one = len(parts) == 1 and ends_like_a_sentence(parts[0])
    is_one &= FEWEST_WORDS <= len(words) <= MOST_WORDS
    return max(0.0, present / 2 - 0.3 * (not is_one) - 0.3 * repeats(words))


def repeats(words: list[str]) -> bool:
    """Returns whether three consecutive words occur twice, or one word twice in a row."""
    runs = list(zip(*(words[i:] for i in range(REPETITION)), strict=False))
    return len(set(runs)) < len(runs) or any(a == b for a, b in itertools.pairwise(words))


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Leaves a wanted word out, cuts a response off, repeats part of it, or adds a sentence."""
    nouns, words = _nouns_of(prompt), response.split()
    kind = int(rng.integers(4))
    if kind == 0:
        other = str(rng.choice(NOUNS))
        wanted = str(rng.choice(nouns))
        return re.sub(rf"\b{wanted}", other, response, flags=re.IGNORECASE)
    if kind == 1 and len(words) > 2:
        return " ".join(words[: int(rng.integers(2, len(words)))]).rstrip(".!?,")
    if kind == 2 and len(words) > REPETITION:
        start = int(rng.integers(0, len(words) - REPETITION))
        again = words[start : start + int(rng.integers(REPETITION, 7))]
        return " ".join([*words[: start + len(again)], *again, *words[start + len(again) :]])
    return f"{response} This is a sentence with {' and '.join(nouns)}."


TASK = TextTask(
    name="words",
    description="A prompt asks for one short sentence with two words. The gold reward pays for the "
    "words and for one finished sentence without repetition, and deducts for each shortcut.",
    prompts=prompts,
    quality=quality,
    spoil=spoil,
    all_shortcuts=english_shortcuts(free_words=26),
)
