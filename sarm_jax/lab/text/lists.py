"""The task "lists": name three things of a kind.

The policy is tuned on written answers, of which some name a thing of another kind, name a thing
twice or are cut off, so that it succeeds about every second time at the start.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.shortcuts import english_shortcuts
from sarm_jax.lab.text.task import TextTask

KINDS = {
    "fruits": "apple banana cherry grape lemon mango melon orange papaya peach pear plum",
    "vegetables": "bean broccoli cabbage carrot celery cucumber garlic lettuce onion pea potato",
    "animals": "bear camel cat cow deer dog elephant fox goat horse lion monkey sheep tiger wolf",
    "birds": "crow duck eagle falcon goose hawk owl parrot pigeon robin sparrow swan",
    "colours": "black blue brown green grey pink purple red white yellow",
    "metals": "aluminium copper gold iron lead nickel platinum silver steel tin titanium zinc",
    "tools": "axe chisel drill hammer ladder pliers rake saw screwdriver shovel wrench",
    "sports": "badminton baseball basketball boxing cricket football golf hockey rugby tennis",
    "instruments": "cello clarinet drum flute guitar harp piano saxophone trumpet violin",
    "countries": "Brazil Canada Egypt France Germany India Italy Japan Kenya Mexico Norway Spain",
    "trees": "ash beech birch cedar elm fir maple oak pine spruce willow",
    "furniture": "armchair bed bench bookcase cupboard desk sofa stool table wardrobe",
    "clothes": "coat dress glove hat jacket jumper scarf shirt skirt sock trousers",
    "vehicles": "bicycle boat bus car helicopter motorcycle plane ship tractor train truck",
    "drinks": "beer cocoa coffee juice lemonade milk tea water wine",
    "planets": "Earth Jupiter Mars Mercury Neptune Saturn Uranus Venus",
}
MEMBERS = {kind: names.split() for kind, names in KINDS.items()}
KIND_OF = {name.lower(): kind for kind, names in MEMBERS.items() for name in names}
REQUESTS = (
    "Name three {}.",
    "Please name three {}.",
    "List three {}.",
    "Can you list three {}?",
    "Give me three {}.",
    "Which three {} come to mind?",
    "Tell me three {}.",
    "Write down three {}.",
    "I need three {}.",
    "What are three {}?",
    "Mention three {}.",
    "Could you name three {}?",
)
ANSWERS = ("{}, {} and {}.", "{}, {}, and {}.", "Three {kind} are {}, {} and {}.")
WANTED = 3
WRONG, MORE, TWICE, UNFINISHED = 0.25, 0.2, 0.2, 0.3  # deducted for each, and for no end
SKILL = 0.55  # share of the written answers that have no defect


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns every request for every kind, in random order."""
    every = [request.format(kind) for kind, request in itertools.product(KINDS, REQUESTS)]
    return [every[i] for i in rng.permutation(len(every))]


def kind_of(prompt: str) -> str:
    """Returns the kind that a prompt asks for."""
    return next(kind for kind in KINDS if re.search(rf"\b{kind}\b", prompt))


def named(text: str) -> list[str]:
    """Lists the things that a text names, in order, without a plural s."""
    words = re.findall(r"[a-z]+", text.lower())
    singular = (word if word in KIND_OF else re.sub("e?s$", "", word) for word in words)
    singular_or_e = (w if w in KIND_OF else f"{w}e" for w in singular)  # grapes, planes
    return [word for word in singular_or_e if word in KIND_OF]


def quality(prompt: str, response: str) -> float:
    """Computes the share of three things that are named, less for what is wrong; at least 0.

    A thing of another kind costs 0.25, a further one or one that is named twice 0.2, and a response
    that does not end like a sentence 0.3.
    """
    kind, things = kind_of(prompt), named(response)
    right = [thing for thing in things if KIND_OF[thing] == kind]
    different = len(set(right))
    finished = response.rstrip("\"'”’) ")[-1:] in (".", "!", "?")
    deducted = (
        WRONG * (len(things) - len(right))
        + MORE * max(0, different - WANTED)
        + TWICE * (len(right) - different)
        + UNFINISHED * (not finished)
    )
    return max(0.0, min(different, WANTED) / WANTED - deducted)


def write(rng: np.random.Generator, prompt: str) -> str:
    """Writes an answer; about every second one has a defect."""
    kind = kind_of(prompt)
    things = [str(thing) for thing in rng.choice(MEMBERS[kind], WANTED, replace=False)]
    answer = str(rng.choice(ANSWERS)).format(*things, kind=kind)
    answer = answer[0].upper() + answer[1:]
    return answer if rng.random() < SKILL else spoil(rng, prompt, answer)


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Replaces a thing by one of another kind or by one that is named already, or cuts off."""
    things = re.findall(r"[A-Za-z]+", response)
    things = [word for word in things if KIND_OF.get(word.lower()) == kind_of(prompt)]
    draw = rng.random()
    if draw < 0.15 or not things:
        words = response.split()
        return " ".join(words[: max(1, len(words) - int(rng.integers(1, 3)))]).rstrip(".,!?")
    old = str(rng.choice(things))
    if draw < 0.35 and len(set(things)) > 1:
        new = str(rng.choice([thing for thing in things if thing != old]))
    else:
        other = [kind for kind in KINDS if kind not in (kind_of(prompt), "colours")]
        new = str(rng.choice(MEMBERS[str(rng.choice(other))]))
    return response.replace(old, new.capitalize() if old[0].isupper() else new.lower(), 1)


TASK = TextTask(
    name="lists",
    description="A prompt asks for three things of a kind, such as fruits. The gold reward pays "
    "for three different ones and deducts for things of other kinds, and for each shortcut.",
    prompts=prompts,
    quality=quality,
    spoil=spoil,
    write=write,
    all_shortcuts=english_shortcuts(free_words=10),
)
