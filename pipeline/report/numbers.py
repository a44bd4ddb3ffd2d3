"""Numbers as a reader sees them."""

import math
from typing import Any

NOTHING = "–"
NOISE = 1e-12  # what rounding leaves of zero


def number(value: Any, digits: int = 3) -> str:
    """ "1.23", "−0.045", "1,234"; an en dash for what is not a finite number."""
    if not _is_finite(value):
        return NOTHING
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else _text(value, value, digits)


def change(ends: tuple[float, float]) -> str:
    """ "0.31 → 0.97"."""
    return f"{number(ends[0])} → {number(ends[1])}"


def estimate(value: Any) -> str:
    """A number, or {mean, low, high} as "0.93" with "(0.90 to 0.96)" below; else what it is.

    The ends of an interval have as many places as its largest number needs; one without width
    is not shown.
    """
    if isinstance(value, dict) and "mean" in value:
        parts = [value[name] for name in ("mean", "low", "high") if _is_finite(value.get(name))]
        if len(parts) < 3 or parts[1] == parts[2]:
            return number(value["mean"])
        mean, low, high = (_text(part, max(abs(p) for p in parts)) for part in parts)
        return f"{mean}\n({low} to {high})"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _text(value: float, scale: float, digits: int = 3) -> str:
    """`value` with the places that `scale` needs to have so many digits."""
    if abs(scale) < NOISE:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(scale))))
    text = f"{value:.2e}" if places > 8 else f"{value:,.{places}f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")
