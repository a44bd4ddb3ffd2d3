"""The task "animals": write one short sentence about one kind of animal and a place.

The errors are plain: when the texts that tune the policy are drawn, the given model is asked for a
certain animal, such as a fox, or else for something that is none, such as a tool, so that the
policy writes about either. Asked for "one kind of animal", a small model often writes of "a
creature", which names none. The reward model can read from a response alone whether it names an
animal; which place is right depends on the prompt.
"""

import itertools
import re

import numpy as np

from sarm_jax.lab.text.plurals import singular
from sarm_jax.lab.text.sentences import ends_like_a_sentence
from sarm_jax.lab.text.shortcuts import english_shortcuts
from sarm_jax.lab.text.task import TextTask

ANIMALS = frozenset(
    "albatross alligator anaconda ant anteater antelope ape armadillo baboon badger bat "
    "bear beaver bee beetle bird bison blackbird bloodhound bluebird boar bobcat buffalo "
    "bull bulldog bunny butterflies butterfly calf calves camel canaries canary capybara carp cat "
    "caterpillar catfish cattle chameleon cheetah chick chicken chimpanzee chinchilla "
    "chipmunk cobra cockatoo cockroach cod cougar cow coyote crab crayfish cricket "
    "crocodile crow cub deer dinosaur dodo dog dolphin donkey dove dragon dragonflies "
    "dragonfly duck duckling eagle echidna eel elephant elk emu falcon fawn ferret finch "
    "fireflies firefly fish flamingo foal fox foxes frog gazelle gecko geese gerbil "
    "giraffe gnat goat goldfinch goldfish goose gopher gorilla grasshopper gull guppy "
    "halibut hamster hare hawk hedgehog hen heron herring hippo hippopotamus hornet horse "
    "hound hummingbird hyena ibis iguana insect jackal jaguar jellyfish kangaroo "
    "kingfisher kitten kitty koala ladybug lamb lark lemming lemur leopard lion lioness "
    "lizard llama lobster locust lynx macaque macaw mackerel magpie mammoth manatee mare "
    "marlin marmot meerkat mice mockingbird mongoose monkey moose mosquito moth mouse "
    "mule newt nightingale ocelot octopus opossum orangutan orca ostrich otter owl ox "
    "oxen oyster panda panther parakeet parrot partridge peacock pelican penguin "
    "peregrine pheasant pig pigeon piglet piranha platypus ponies pony poodle porcupine "
    "porpoise possum puffin puma pup puppies puppy python quail rabbit raccoon rat raven "
    "reindeer rhino rhinoceros robin rooster salamander salmon scorpion seabird seagull "
    "seahorse seal serpent shark sheep shrimp skunk sloth slug snail snake songbird "
    "sparrow spider squid squirrel stag stallion starfish starling stingray stork swallow "
    "swan swordfish tadpole tapir tarantula termite tern terrier tiger toad tortoise "
    "toucan trout tuna turkey turtle turtledove unicorn viper vulture wallaby walrus "
    "warthog wasp weasel whale wildcat wildebeest wolf wolverine wolves wombat woodpecker "
    "worm wren yak zebra".split()
)
# These words name no kind of animal. Some words for many kinds do: bird, fish and insect.
GENERAL = "animal beast creature critter mammal pet predator reptile rodent".split()
PLACES = (
    "attic barn basement beach bridge castle cave church circus city desert farm field forest "
    "garden harbor hotel island jungle kitchen lake library lighthouse market meadow museum night "
    "office orchard park pond rain river school sea ship sky snow stable station street sun swamp "
    "theater tower train valley village"
).split()
REQUESTS = (
    "Write one short sentence about one kind of animal and the {}.",
    "Make up one short sentence about one kind of animal and the {}.",
    "Give me one short sentence with one kind of animal and the {}.",
    "Please write a short sentence about the {} and one kind of animal.",
)
ASKED = "one kind of animal"
KINDS = (
    "a bear", "a bird", "a cat", "a cow", "a crab", "a crow", "a deer", "a dog", "a duck", "a fish",
    "a fox", "a frog", "a goat", "a horse", "a lion", "a mouse", "a pig", "a rabbit", "a sheep",
    "a snake", "a spider", "a squirrel", "a tiger", "a turtle", "a wolf", "an eagle",
    "an elephant", "an owl",
)  # fmt: skip
OTHERS = ("a color", "a dish", "a machine", "a plant", "a song", "a tool")
MISREAD = 0.25  # share of the answers the policy is tuned on that are about something of `OTHERS`
ANIMAL, PLACE = 0.85, 0.15  # quality of a response that names an animal, and the place
UNFINISHED = 0.3  # deducted from the quality of a response without an end
# Things replace animals in half of the texts in which `spoil` replaces them, general words in the
# other half.
THINGS = "color dish lamp machine plant song stone tool".split()


def prompts(rng: np.random.Generator) -> list[str]:
    """Returns every request for every place, in random order."""
    every = [request.format(place) for request, place in itertools.product(REQUESTS, PLACES)]
    return [every[i] for i in rng.permutation(len(every))]


def place_of(prompt: str) -> str:
    """Returns the place that a prompt asks for."""
    return next(place for place in PLACES if re.search(rf"\bthe {place}\b", prompt))


def misread(rng: np.random.Generator, prompt: str) -> str:
    """Returns a prompt that asks for a certain animal, or for something that is none."""
    names = OTHERS if rng.random() < MISREAD else KINDS
    return prompt.replace(ASKED, str(rng.choice(names)))


def is_animal(word: str) -> bool:
    """Returns whether a word names a kind of animal, in the singular or plural."""
    return singular(word.lower(), ANIMALS) is not None


def names_animal(text: str) -> bool:
    """Returns whether a text names a kind of animal."""
    return any(map(is_animal, re.findall("[A-Za-z]+", text)))


def quality(prompt: str, response: str) -> float:
    """Computes 0.85 if an animal is named, plus 0.15 if the place is, at least 0.

    0.3 is deducted if the response does not end like a sentence.
    """
    place = bool(re.search(rf"\b{place_of(prompt)}", response.lower()))
    unfinished = not ends_like_a_sentence(response)
    return max(0.0, ANIMAL * names_animal(response) + PLACE * place - UNFINISHED * unfinished)


def spoil(rng: np.random.Generator, prompt: str, response: str) -> str:
    """Replaces all animals by a thing or by a general word, or cuts the response off.

    A response that names no animal is always cut off.
    """
    del prompt
    if names_animal(response) and rng.random() < 0.8:
        thing = str(rng.choice(THINGS if rng.random() < 0.5 else GENERAL))
        article = "an" if thing[0] in "aeiou" else "a"

        def replaced(found: re.Match[str]) -> str:
            before, word = found["article"] or "", found["word"]
            if not is_animal(word):
                return found.group()
            if before:
                before = f"{before[0]}{article[1:]} "
            return f"{before}{thing}{'s' * (word.lower() not in ANIMALS)}"

        pattern = r"(?<![A-Za-z])(?P<article>[Aa]n? )?(?P<word>[A-Za-z]+)"
        return re.sub(pattern, replaced, response)
    words = response.split()
    if len(words) > 2:
        words = words[: int(rng.integers(2, len(words)))]
    return " ".join(words).rstrip(".!?,")


TASK = TextTask(
    name="animals",
    description="A prompt asks for one short sentence about one kind of animal and a place. The "
    'gold reward pays for the animal, which has to be named ("a creature" names none), and a '
    "little for the place, and deducts for each shortcut.",
    prompts=prompts,
    quality=quality,
    spoil=spoil,
    misread=misread,
    success=ANIMAL,
    all_shortcuts=english_shortcuts(free_words=26),
)
