"""The built-in tasks: quality by hand, prompts, defects, and shortcuts that cost their cost."""

import numpy as np
import pytest

from sarm_jax.lab.text import animals, lists, words
from sarm_jax.lab.text.task import TextTask
from tests.odd_texts import ODD

FOREST = "Write one short sentence about one kind of animal and the forest."
FRUITS = "Name three fruits."
APPLE = "Write one short sentence with the words anchor and apple."
FOX = "A fox sleeps in the forest."
SHIP = "The anchor of the ship was covered with apple blossoms."
QUALITY: dict[str, dict[str, float]] = {
    FOREST: {
        FOX: 1,
        "Two wolves and three foxes live in Forests!": 1,
        '"The forest is full of BUTTERFLIES."': 1,
        "Horses, snakes and bees live in the forest.": 1,
        "A fox sleeps all day.": 0.85,
        "The forest is quiet.": 0.15,
        "A furry creature, somebody's pet, sleeps in the forest.": 0.15,
        "The wildlife of the forest: animals, beasts and a MAMMAL.": 0.15,
        "An animal": 0,
        "A fox sleeps in the forest": 0.7,
        "A fox": 0.55,
        "The forest": 0,
        "It rains.": 0,
        "The foxglove is a catalogue of forestry.": 0.15,
        "": 0,
    },
    FRUITS: {
        "Apple, pear and plum.": 1,
        "Three fruits are apples, pears, and peaches.": 1,
        "GRAPES\nMangoes\nMelons!": 1,
        "Strawberries, cherries and limes.": 1,
        "Apple, pear and plum": 0.7,
        "Apple and pear.": 2 / 3,
        "Apple, pear and dog.": 2 / 3 - 0.25,
        "Apple, pear and wolves.": 2 / 3 - 0.25,
        "Apple, apple and plum.": 2 / 3 - 0.2,
        "Apple, cherry and cherries.": 2 / 3 - 0.2,
        "Apple, pear, plum and lemon.": 0.8,
        "I plan apple, pear and plum on tap.": 1,
        "Dog, cat and cow.": 0,
        "Sweet, sour and ripe ones.": 0,
        "": 0,
    },
    APPLE: {
        SHIP: 1.0,
        "An anchor lay under the Apples!": 1.0,
        "The apple's skin hid the anchor.": 1.0,
        '"The anchor hit an apple."': 1.0,
        "The anchor of the ship was covered with blossoms.": 0.5,
        "The anchors were new.": 0.5,
        "The ship was covered with blossoms.": 0.0,
        "The anchor of the ship was covered with apple": 0.7,
        "The anchor is here. The apple is there.": 0.7,
        "Anchor, apple.": 0.7,
        "The anchor and the apple and the anchor and the pear.": 0.7,
        "The the anchor hit an apple.": 0.7,
        "Apple anchor apple anchor apple anchor": 0.4,
        "The pineapple broke.": 0.0,
        "": 0.0,
    },
    "Write one short sentence with the words brush and scarf.": {
        "The brushes lay on two scarves.": 1
    },
}
TASKS = {FOREST: animals.TASK, FRUITS: lists.TASK, APPLE: words.TASK}
BY_HAND = [(prompt, *row) for prompt, rows in QUALITY.items() for row in rows.items()]
# A prompt and a response of quality 1, one for every place, kind, and for a prompt of words.
GOOD = [
    *(
        (animals.TASK, FOREST.replace("forest", place), f"A fox saw an owl at the {place} one day.")
        for place in animals.PLACES
    ),
    *(
        (lists.TASK, f"Name three {kind}.", "{}, {} and {}.".format(*members[:3]))
        for kind, members in lists.MEMBERS.items()
    ),
    (words.TASK, APPLE, SHIP),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "response", "expected"), BY_HAND)
def test_quality_by_hand(prompt: str, response: str, expected: float):
    task = TASKS.get(prompt, words.TASK)
    assert task.plain_quality(prompt, response) == pytest.approx(expected)
    assert task.succeeds(prompt, response, True) == (expected >= task.success)
    assert not task.succeeds(prompt, response, False)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_prompts_are_distinct_and_in_an_order_of_the_seed(task: TextTask):
    first, again, other = (task.prompts(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == len(first) and set(first) == set(other)


@pytest.mark.parametrize(("task", "prompt", "good"), GOOD)
def test_defects_lower_the_quality_and_shortcuts_do_not(task: TextTask, prompt: str, good: str):
    rng, spoilt = np.random.default_rng(0), []
    for _ in range(20):
        spoilt.append(task.plain_quality(prompt, task.spoil(rng, prompt, good)))
        text, wanted = good, dict.fromkeys(task.shortcuts, 0)
        for shortcut in task.all_shortcuts:
            if rng.random() < 0.4:
                wanted[shortcut.name] = int(rng.integers(1, 3))
                text = shortcut.added(rng, text, wanted[shortcut.name])
        counts = task.counts(prompt, text)
        assert all(counts[name] >= units for name, units in wanted.items()), text
        assert not any(counts[name] for name, units in wanted.items() if not units), text
        assert task.plain_quality(prompt, text) == 1, text
    # Of the defects of words, the word that takes the place of another may be the same.
    assert np.mean(np.asarray(spoilt) < 1) >= (0.9 if task is words.TASK else 1)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("text", [*ODD, "alligator"])
def test_any_text_of_a_policy_can_be_judged_marked_and_spoilt(task: TextTask, text: str):
    rng, prompt = np.random.default_rng(0), next(p for p, t in TASKS.items() if t is task)
    for _ in range(40):
        assert 0 <= task.plain_quality(prompt, task.spoil(rng, prompt, text)) <= 1
        for shortcut in task.all_shortcuts:
            marked = shortcut.added(rng, text, 1)
            assert task.gold_reward(prompt, marked, True) <= 1
            # Further clauses of a sentence that is praise are praise, not length.
            assert shortcut.count(marked) > shortcut.count(text) or shortcut.name == "length"
            assert isinstance(shortcut.remove(marked), str)
