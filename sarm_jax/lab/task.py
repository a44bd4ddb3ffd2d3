"""The interface of the lab's tasks: the measures of a run, none of which is trained on.

The world of capitals (`lab.shortcuts.World`) and tasks in English (`lab.text`) implement it. Once
data and models have been made, a study uses a task through this interface alone.
"""

import abc
from collections.abc import Sequence

from sarm_jax.models.conversation import Prompt


class Task(abc.ABC):
    """A task with a true ("gold") reward, and shortcuts that the annotator pays for.

    Attributes:
        description: what a prompt asks for and what the gold reward pays for, in sentences.
        shortcuts: names of all shortcuts.
        told: names of the shortcuts that the method is told by contrast pairs.
    """

    description: str
    shortcuts: tuple[str, ...]
    told: tuple[str, ...]

    @abc.abstractmethod
    def gold_reward(self, prompt: str, response: str, ended: bool) -> float:
        """Computes the true reward, at most 1; `ended` tells if there is an end of turn."""

    @abc.abstractmethod
    def counts(self, prompt: str, response: str) -> dict[str, int]:
        """Counts the units of every shortcut in a response, by rules that no detector uses."""

    @abc.abstractmethod
    def measures(self, prompt: str, response: str) -> dict[str, float]:
        """Computes further measures of a response, by name; their means are plotted."""

    @abc.abstractmethod
    def check_prompts(self, prompts: Sequence[Prompt], path: str) -> None:
        """Raises InputError, naming the row, if a prompt of a file does not belong to the task."""

    @property
    def untold(self) -> tuple[str, ...]:
        """The shortcuts that the method is not told."""
        return tuple(name for name in self.shortcuts if name not in self.told)

    def has_told(self, prompt: str, response: str) -> bool:
        """Returns whether a response has a shortcut that the method is told."""
        counts = self.counts(prompt, response)
        return any(counts[name] for name in self.told)

    def has_untold(self, prompt: str, response: str) -> bool:
        """Returns whether a response has a shortcut that the method is not told."""
        counts = self.counts(prompt, response)
        return any(counts[name] for name in self.untold)
