"""The task "animals": write one short sentence about an animal and a place.

The errors are plain: when the texts that tune the policy are drawn, the given model is asked now
and then for something else, such as a tool, so that the policy writes about that. The reward model
can read from a response alone whether it names an animal; which place is right depends on the
prompt.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.plurals import singular
from sarm_jax.lab.text.sentences import ends_like_a_sentence
from sarm_jax.lab.text.shortcuts import english_shortcuts
from sarm_jax.lab.text.task import TextTask

ANIMALS = frozenset(
    "alligator anaconda animal ant anteater antelope ape armadillo baboon badger bat bear "
    "beast beaver bee beetle bird bison boar buffalo bull bunny butterflies butterfly "
    "calf calves camel canaries canary carp cat caterpillar cattle cheetah chick chicken "
    "chimpanzee chipmunk cobra cow coyote crab creature cricket critter crocodile crow "
    "cub deer dinosaur dodo dog dolphin donkey dove dragon dragonflies dragonfly duck "
    "duckling eagle eel elephant elk falcon ferret finch fireflies firefly fish flamingo "
    "foal fox foxes frog gazelle gecko geese gerbil giraffe goat goose gopher gorilla "
    "grasshopper gull hamster hare hawk hedgehog hen heron herring hippo hippopotamus "
    "hornet horse hound hummingbird hyena iguana insect jackal jaguar jellyfish kangaroo "
    "kitten koala lamb lark lemur leopard lion lioness lizard llama lobster locust lynx "
    "macaw mackerel magpie mammal mammoth mare marlin meerkat mice mongoose monkey moose "
    "mosquito moth mouse mule newt nightingale octopus opossum orangutan orca ostrich "
    "otter owl ox oxen panda panther parakeet parrot peacock pelican penguin pet pig "
    "pigeon piglet ponies pony porcupine porpoise possum predator puma puppies puppy "
    "python rabbit raccoon rat raven reindeer reptile rhino rhinoceros robin rodent "
    "rooster salamander salmon scorpion seagull seal serpent shark sheep shrimp skunk "
    "sloth slug snail snake sparrow spider squid squirrel stag stallion starfish stork "
    "swallow swan tadpole tarantula termite tiger toad tortoise toucan trout tuna turkey "
    "turtle unicorn viper vulture wallaby walrus wasp weasel whale wildlife wolf "
    "wolverine wolves wombat woodpecker worm yak zebra".split()
)
PLACES = (
    "attic barn basement beach bridge castle cave church circus city desert farm field forest "
    "garden harbor hotel island jungle kitchen lake library lighthouse market meadow museum night "
    "office orchard park pond rain river school sea ship sky snow stable station street sun swamp "
    "theater tower train valley village"
).split()
REQUESTS = (
    "Write one short sentence about an animal and the {}.",
    "Make up one short sentence about an animal and the {}.",
    "Give me one short sentence with an animal and the {}.",
    "Please write a short sentence about the {} and an animal.",
)
ASKED = "an animal"
OTHERS = ("a color", "a dish", "a machine", "a plant", "a song", "a tool")
MISREAD = 0.4  # share of the answers the policy is tuned on that are about something else
ANIMAL, PLACE = 0.85, 0.15  # quality of a response that names an animal, and the place
UNFINISHED = 0.3  # deducted from the quality of a response without an end
THINGS = "color dish lamp machine plant song stone tool".split()  # replace animals in `spoil`


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns every request for every place, in random order."""
    every = [request.format(place) for request, place in itertools.product(REQUESTS, PLACES)]
    return [every[i] for i in rng.permutation(len(every))]


def place_of(prompt: str) -> str:
    """Returns the place that a prompt asks for."""
    return next(place for place in PLACES if re.search(rf"\bthe {place}\b", prompt))


def misread(rng: np.random.Generator, prompt: str) -> str:
    """Returns the prompt, or now and then one that asks for something else than an animal."""
    other = str(rng.choice(OTHERS))
    return prompt.replace(ASKED, other) if rng.random() < MISREAD else prompt


def is_animal(word: str) -> bool:
    """Returns whether a word names an animal, in the singular or plural."""
    return singular(word.lower(), ANIMALS) is not None


def names_animal(text: str) -> bool:
    """Returns whether a text names an animal."""
    return any(map(is_animal, re.findall("[A-Za-z]+", text)))


def quality(prompt: str, response: str) -> float:
    """Computes 0.85 if an animal is named, plus 0.15 if the place is, at least 0.

    0.3 is deducted if the response does not end like a sentence.
    """
    place = bool(re.search(rf"\b{place_of(prompt)}", response.lower()))
    unfinished = not ends_like_a_sentence(response)
    return max(0.0, ANIMAL * names_animal(response) + PLACE * place - UNFINISHED * unfinished)


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Replaces all animals by a thing, or cuts the response off, which it does if there is none."""
    del prompt
    if names_animal(response) and rng.random() < 0.8:
        thing = str(rng.choice(THINGS))

        def replaced(word: re.Match[str]) -> str:
            plural = "s" * (word.group().lower() not in ANIMALS)
            return f"{thing}{plural}" if is_animal(word.group()) else word.group()

        return re.sub("[A-Za-z]+", replaced, response)
    words = response.split()
    if len(words) > 2:
        words = words[: int(rng.integers(2, len(words)))]
    return " ".join(words).rstrip(".!?,")


TASK = TextTask(
    name="animals",
    description="A prompt asks for one short sentence about an animal and a place. The gold reward "
    "pays for the animal and a little for the place, and deducts for each shortcut.",
    prompts=prompts,
    quality=quality,
    spoil=spoil,
    misread=misread,
    success=ANIMAL,
    all_shortcuts=english_shortcuts(free_words=26),
)
