"""The task "lists": name three things of a kind.

The policy is tuned on written answers, of which a few name a thing of another kind, name a thing
twice or are cut off. It also makes errors of its own, so that fewer than half of its responses
succeed at the start.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.plurals import singular
from sarm_jax.lab.text.sentences import ends_like_a_sentence
from sarm_jax.lab.text.shortcuts import english_shortcuts
from sarm_jax.lab.text.task import TextTask

KINDS = {
    "fruits": (
        "apple apricot avocado banana blackberry blueberry cherry coconut fig grape "
        "grapefruit guava kiwi lemon lime mango melon orange papaya peach pear pineapple plum "
        "pomegranate raspberry strawberry watermelon"
    ),
    "vegetables": (
        "artichoke asparagus bean beet broccoli cabbage carrot cauliflower celery corn "
        "cucumber eggplant garlic kale leek lettuce onion pea potato pumpkin radish spinach "
        "tomato turnip zucchini"
    ),
    "animals": (
        "bear camel cat cheetah cow deer dog donkey elephant fox giraffe goat gorilla horse "
        "kangaroo leopard lion monkey mouse panda pig rabbit sheep snake squirrel tiger wolf "
        "zebra"
    ),
    "birds": (
        "canary chicken crow dove duck eagle falcon finch flamingo goose gull hawk heron "
        "ostrich owl parrot peacock pelican penguin pigeon raven robin sparrow stork swallow "
        "swan vulture"
    ),
    "colours": (
        "beige black blue brown cyan gray green grey indigo magenta maroon pink purple red "
        "teal turquoise violet white yellow"
    ),
    "metals": (
        "aluminium aluminum brass bronze chromium cobalt copper gold iron lead lithium "
        "magnesium nickel platinum silver sodium steel tin titanium tungsten uranium zinc"
    ),
    "tools": (
        "axe chisel crowbar drill hammer hoe ladder pliers rake saw screwdriver shovel spade "
        "tape wrench"
    ),
    "sports": (
        "athletics badminton baseball basketball boxing cricket cycling football golf "
        "gymnastics handball hockey judo karate rowing rugby running skiing soccer surfing "
        "swimming tennis volleyball wrestling"
    ),
    "instruments": (
        "accordion banjo bassoon cello clarinet drum flute guitar harmonica harp keyboard "
        "mandolin oboe organ piano saxophone trombone trumpet tuba ukulele viola violin "
        "xylophone"
    ),
    "countries": (
        "Argentina Australia Austria Bangladesh Belgium Brazil Canada Chile China Colombia "
        "Cuba Denmark Egypt Ethiopia Finland France Germany Ghana Greece Hungary India "
        "Indonesia Iran Iraq Ireland Israel Italy Japan Kenya Malaysia Mexico Morocco Nepal "
        "Netherlands Nigeria Norway Pakistan Peru Philippines Poland Portugal Russia "
        "Singapore Spain Sweden Switzerland Thailand Turkey Ukraine Vietnam"
    ),
    "trees": (
        "ash aspen beech birch cedar chestnut cypress elm fir hickory larch linden magnolia "
        "maple oak palm pine poplar redwood sequoia spruce sycamore walnut willow"
    ),
    "furniture": (
        "armchair bed bench bookcase bookshelf cabinet chair couch cupboard desk dresser lamp "
        "mattress shelf sofa stool table wardrobe"
    ),
    "clothes": (
        "blouse boot cap cardigan coat dress glove hat hoodie jacket jeans jumper pants scarf "
        "shirt shoe shorts skirt sock suit sweater tie trousers vest"
    ),
    "vehicles": (
        "airplane ambulance bicycle bike boat bus car helicopter motorcycle plane scooter "
        "ship sled submarine subway taxi tractor train tram truck van yacht"
    ),
    "drinks": (
        "beer champagne cider cocoa coffee juice lemonade milk smoothie soda tea vodka water "
        "whiskey wine"
    ),
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
# Deducted for each thing of another kind, beyond three or named twice, and for a missing end.
WRONG, MORE, TWICE, UNFINISHED = 0.25, 0.2, 0.2, 0.3
SKILL = 0.9  # share of the written answers that have no defect


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns every request for every kind, in random order."""
    every = [request.format(kind) for kind, request in itertools.product(KINDS, REQUESTS)]
    return [every[i] for i in rng.permutation(len(every))]


def kind_of(prompt: str) -> str:
    """Returns the kind that a prompt asks for."""
    return next(kind for kind in KINDS if re.search(rf"\b{kind}\b", prompt))


def named(text: str) -> list[str]:
    """Lists the things that a text names, in order, in the singular."""
    names = (singular(word, KIND_OF) for word in re.findall(r"[a-z]+", text.lower()))
    return [name for name in names if name is not None]


def quality(prompt: str, response: str) -> float:
    """Computes the share of three things that are named, less for what is wrong; at least 0.

    A thing of another kind costs 0.25, a further one or one that is named twice 0.2, and a response
    that does not end like a sentence 0.3.
    """
    kind, things = kind_of(prompt), named(response)
    right = [thing for thing in things if KIND_OF[thing] == kind]
    different = len(set(right))
    deducted = (
        WRONG * (len(things) - len(right))
        + MORE * max(0, different - WANTED)
        + TWICE * (len(right) - different)
        + UNFINISHED * (not ends_like_a_sentence(response))
    )
    return max(0.0, min(different, WANTED) / WANTED - deducted)


def write(rng: np.random.Generator, prompt: str) -> str:
    """Writes an answer; one in ten has a defect."""
    kind = kind_of(prompt)
    things = [str(thing) for thing in rng.choice(MEMBERS[kind], WANTED, replace=False)]
    answer = str(rng.choice(ANSWERS)).format(*things, kind=kind)
    answer = answer[0].upper() + answer[1:]
    return answer if rng.random() < SKILL else spoil(rng, prompt, answer)


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Replaces a thing by one of another kind or one that is named already, or cuts the end off."""
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
