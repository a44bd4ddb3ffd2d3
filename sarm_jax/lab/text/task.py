"""A task in English: prompts, the quality of a response by rules, and shortcuts.

To add a task of your own, write one file with `TASK = TextTask(...)` and name it as `lab.task`;
`lab.text.lists` and `lab.text.words` are examples.

    gold reward        quality − Σ cost · units − 0.5 · (no end of turn)
    annotator          3 · quality + bias · Σ pay · units

The units of a shortcut are counted by a rule and count up to `most`. The quality is that of the
response without its shortcuts, so that they cost what they are said to cost and nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import short
from sarm_jax.io.row_files import place_of
from sarm_jax.lab.names import parse_names
from sarm_jax.lab.task import Task
from sarm_jax.models.conversation import Prompt

NO_END = 0.5  # gold reward that a response without an end of turn loses
WORTH = 3.0  # the annotator's utility of a response of quality 1
ROTATING = "rotating:"
MOST_ADDED = 12  # most phrasings that are added; a phrasing may be less than a full unit
ROUNDING = 1e-6  # tolerance for rounding errors of qualities


@dataclasses.dataclass(frozen=True)
class TextShortcut:
    """Something that the annotator pays for and the gold reward deducts.

    Attributes:
        name: its name.
        count: returns its units in a response.
        add: returns a response with one more unit: (generator, response, phrasings) → response.
        remove: returns a response without it, or the response if it cannot be taken out.
        phrasings: ways to write it; contrast pairs show those of `shown` alone.
        base_rate: share of the answers that the policy is tuned on to which one unit is added.
        most: largest number of units that are paid and deducted.
        pay: utility of a unit to the annotator.
        cost: gold reward that a unit deducts.
    """

    name: str
    count: Callable[[str], int]
    add: Callable[[np.random.Generator, str, Sequence[str]], str]
    remove: Callable[[str], str]
    phrasings: tuple[str, ...]
    base_rate: float = 0.1
    most: int = 3
    pay: float = 0.5
    cost: float = 0.1

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or name != name.strip() or not name or "," in name:
            raise ValueError(
                f"shortcut {name!r}: needs a name without a comma and without blanks around it, "
                "as lab.told_shortcuts lists names"
            )
        if name.startswith(ROTATING):
            raise ValueError(f"shortcut {name}: {ROTATING!r} means others in lab.told_shortcuts")
        texts = () if isinstance(self.phrasings, str) else tuple(self.phrasings)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"shortcut {self.name}: phrasings={self.phrasings!r}: needs texts")
        object.__setattr__(self, "phrasings", texts)
        limits = {"base_rate": (0, 1), "most": (1, math.inf), "pay": (0, math.inf)}
        for name, (least, most) in (limits | {"cost": (0, math.inf)}).items():
            value = getattr(self, name)
            if not (least <= value <= most and value < math.inf):
                upper = "" if most == math.inf else f" and at most {most}"
                raise ValueError(
                    f"shortcut {self.name}: {name}={value}: must be at least {least}{upper}"
                )

    @property
    def shown(self) -> tuple[str, ...]:
        """The first two thirds of the phrasings; contrast pairs keep back the others."""
        return self.phrasings[: max(1, 2 * len(self.phrasings) // 3)]

    def units(self, response: str) -> int:
        """Counts the units that are paid and deducted."""
        return min(self.count(response), self.most)

    def added(
        self, rng: np.random.Generator, response: str, units: int, phrasings: Sequence[str] = ()
    ) -> str:
        """Adds at least `units` units in random phrasings of `phrasings`; by default of all."""
        wanted = self.count(response) + units
        for _ in range(MOST_ADDED):
            if self.count(response) >= wanted:
                break
            response = self.add(rng, response, phrasings or self.phrasings)
        return response


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """A task in English with its shortcuts.

    Attributes:
        name: its name.
        description: what a prompt asks for and what the gold reward pays for, in sentences.
        prompts: returns all prompts, in an order that the generator decides.
        quality: returns the quality, 0 to 1, of a response whose shortcuts have been removed:
            (prompt, response) → quality.
        spoil: returns a response with a defect that lowers its quality:
            (generator, prompt, response) → response. The reward model is trained on such responses
            too, so that it learns what defects are.
        write: writes an answer as people do, with defects now and then: (generator, prompt) →
            answer. The policy is tuned on these answers. None: it is tuned on samples of the given
            model.
        misread: returns the prompt that the given model gets instead of the task's prompt when
            these samples are drawn: (generator, prompt) → prompt. If it asks for something wrong
            now and then, the policy learns to make plain errors. None: the prompt itself.
        success: least quality of a success.
        all_shortcuts: the shortcuts, in the order in which several are added to one response; they
            are removed in the opposite order.
        told: names of the shortcuts that the method is told; see `telling`.
        bias: factor of what the annotator pays for shortcuts; 0: it pays nothing for them.
        file: the file that the task was read from, for messages; empty: it is built in.
    """

    name: str
    description: str
    prompts: Callable[[np.random.Generator], list[str]]
    quality: Callable[[str, str], float]
    spoil: Callable[[np.random.Generator, str, str], str]
    all_shortcuts: tuple[TextShortcut, ...]
    write: Callable[[np.random.Generator, str], str] | None = None
    misread: Callable[[np.random.Generator, str], str] | None = None
    success: float = 1.0
    told: tuple[str, ...] = ()
    bias: float = 1.0
    file: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "all_shortcuts", tuple(self.all_shortcuts))
        names = [shortcut.name for shortcut in self.all_shortcuts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"all_shortcuts={names}: needs shortcuts with different names")
        if self.write is not None and self.misread is not None:
            raise ValueError("misread: needs write=None, as only the given model reads a prompt")
        if not 0 < self.success <= 1:
            raise ValueError(f"success={self.success}: must lie in (0, 1]")

    @property
    def option(self) -> str:
        """The option lab.task with its value, for messages."""
        return f"lab.task={self.file or self.name}"

    @property
    def shortcuts(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of all shortcuts."""
        return tuple(shortcut.name for shortcut in self.all_shortcuts)

    def telling(self, names: str, seed: int) -> "TextTask":
        """Returns the task whose method is told some shortcuts.

        Args:
            names: comma-separated names, or "rotating:n" for n that differ from seed to seed: a
                Latin square, in which every shortcut is told equally often.
            seed: seed of the study.

        Raises:
            InputError: a name is unknown or given twice, or n is out of range.
        """
        known, option = self.shortcuts, "lab.told_shortcuts"
        if names.strip().startswith(ROTATING):
            count = names.strip().removeprefix(ROTATING)
            if count not in map(str, range(1, len(known) + 1)):
                raise InputError(
                    f"{option}={names}: expected a number from 1 to {len(known)} after {ROTATING!r}"
                )
            told = [known[(seed + i) % len(known)] for i in range(int(count))]
            return dataclasses.replace(self, told=tuple(n for n in known if n in told))
        told = parse_names(option, names, known, further=f"{ROTATING}n")
        return dataclasses.replace(self, told=tuple(told))

    def shortcut(self, name: str) -> TextShortcut:
        """Returns a shortcut by its name."""
        return next(shortcut for shortcut in self.all_shortcuts if shortcut.name == name)

    def plain_quality(self, prompt: str, response: str) -> float:
        """Computes the quality of a response without its shortcuts.

        Raises:
            InputError: the task's rule gives a number out of range.
        """
        plain = response
        for shortcut in reversed(self.all_shortcuts):
            plain = shortcut.remove(plain)
        quality = self.quality(prompt, plain.strip())
        if not -ROUNDING <= quality <= 1 + ROUNDING:
            raise InputError(
                f"{self.option}: the quality of {short(response)} is {quality}: must lie in [0, 1]"
            )
        return quality

    def succeeds(self, prompt: str, response: str, ended: bool) -> bool:
        """Returns whether a response is finished and good enough, its shortcuts aside."""
        return ended and self.is_success(self.plain_quality(prompt, response))

    def is_success(self, quality: float) -> bool:
        """Returns whether a quality is high enough for a success."""
        return quality >= self.success - ROUNDING

    def counts(self, prompt: str, response: str) -> dict[str, int]:
        """Counts the units of every shortcut in a response."""
        return {shortcut.name: shortcut.count(response) for shortcut in self.all_shortcuts}

    def gold_reward(self, prompt: str, response: str, ended: bool) -> float:
        """Computes the true reward, at most 1; every shortcut counts against it."""
        deducted = sum(s.cost * s.units(response) for s in self.all_shortcuts)
        return self.plain_quality(prompt, response) - deducted - NO_END * (not ended)

    def annotator_utility(self, prompt: str, response: str) -> float:
        """Computes the utility behind the annotator's preferences."""
        paid = sum(s.pay * s.units(response) for s in self.all_shortcuts)
        return WORTH * self.plain_quality(prompt, response) + self.bias * paid

    def measures(self, prompt: str, response: str) -> dict[str, float]:
        """Returns the quality, whether it is a success, and the number of words."""
        quality = self.plain_quality(prompt, response)
        return {
            "quality": quality,
            "success": float(self.is_success(quality)),
            "words": float(len(response.split())),
        }

    def check_prompts(self, prompts: Sequence[Prompt], path: str) -> None:
        """Raises InputError, naming the row, if a prompt of a file does not belong to the task."""
        known = _prompts_of(self)
        for number, prompt in enumerate(prompts, 1):
            if prompt not in known:
                raise InputError(
                    f"lab.oracle=True: {place_of(path, number)}: {short(prompt)} is no prompt of "
                    f"{self.option}"
                )


@lru_cache(maxsize=4)
def _prompts_of(task: TextTask) -> frozenset[str]:
    """Returns the set of all prompts of a task."""
    return frozenset(task.prompts(np.random.default_rng(0)))
