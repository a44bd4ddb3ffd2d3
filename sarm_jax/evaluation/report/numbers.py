"""Numbers as a reader sees them."""

import math
from typing import Any

NOTHING = "–"


def number(value: Any, digits: int = 3) -> str:
    """ "1.23", "−0.045", "1,234"; an en dash for what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.2e}" if places > 8 else f"{value:,.{places}f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def change(ends: tuple[float, float]) -> str:
    """ "0.31 → 0.97"."""
    return f"{number(ends[0])} → {number(ends[1])}"


def estimate(value: Any) -> str:
    """A number, or {mean, low, high} as "0.93 (0.90 to 0.96)"; otherwise what it is."""
    if isinstance(value, dict) and "mean" in value:
        mean, low, high = (number(value.get(name)) for name in ("mean", "low", "high"))
        return mean if NOTHING in (low, high) else f"{mean} ({low} to {high})"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)
