"""Gates: conditions on the reward model that RL on a task of the lab needs to be meaningful."""

import dataclasses
import logging
import operator
from collections.abc import Iterable
from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json

LOG = logging.getLogger(__name__)
# The gates of the world of capitals, see `lab.gates`: the comparison that a value has to pass.
CAPITALS = {
    "r2_flattery": (">=", 0.97),
    "r2_correctness": (">=", 0.85),
    "detection_one_word": (">=", 0.85),
    "false_alarms": ("<=", 0.06),
    "accuracy_below_annotator": ("<=", 0.03),
}
# The gates of tasks in English, see `lab.text.gates`.
TEXT = {
    "success_at_start": (">=", 0.3),
    "failure_at_start": (">=", 0.35),
    "truth_auroc": (">=", 0.85),
    "accuracy_equal_shortcuts": (">=", 0.75),
}
BIASED = TEXT | {"least_bonus": (">", 0.0)}  # if the annotator pays for shortcuts
LIMITS = CAPITALS | BIASED
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}


@dataclasses.dataclass(frozen=True)
class Gate:
    """A measured value, which has to be within the limit of its name in `LIMITS`."""

    name: str
    value: float

    @property
    def passed(self) -> bool:
        """True if the value is within its limit."""
        sign, limit = LIMITS[self.name]
        return bool(_COMPARE[sign](self.value, limit))

    def __str__(self) -> str:
        sign, limit = LIMITS[self.name]
        return f"{self.name} {self.value:.3f} (must be {sign} {limit})"


def limits_of(names: Iterable[str]) -> dict[str, tuple[str, float]]:
    """Returns the limits of the kind of task whose gates have these names."""
    present = set(names)
    if not present & BIASED.keys():
        return CAPITALS
    return BIASED if "least_bonus" in present else TEXT


def require_gates(path: Path, ignore_failed: bool) -> None:
    """Raises InputError if a gate in gates.json failed and `ignore_failed` is False."""
    if not path.exists():
        raise InputError(f"lab.gates_json={path}: no such file; --stage=identify writes it")
    values = read_json(
        path, f"lab.gates_json={path}", expected="the gates of --stage=identify", allow_nan=False
    )
    try:
        gates = [Gate(name, float(values[name]["value"])) for name in limits_of(values)]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise InputError(
            f"lab.gates_json={path}: not what --stage=identify writes ({error!r})"
        ) from None
    failed = [gate for gate in gates if not gate.passed]
    if not failed:
        return
    values_and_limits = ", ".join(map(str, failed))
    if not ignore_failed:
        raise InputError(
            f"lab.gates_json={path}: a PPO run would not be meaningful, because gates failed: "
            f"{values_and_limits}; --config.lab.ignore_failed_gates=True runs it nevertheless"
        )
    LOG.warning("lab.ignore_failed_gates=True: running despite failed gates: %s", values_and_limits)
