"""Formats numbers for the report."""

import math
from typing import Any

NOTHING = "–"
NOISE = 1e-12  # values below it are rounding errors of zero


def number(value: Any, digits: int = 3) -> str:
    """Formats a number as "1.23", "−0.045" or "1,234"; anything else is an en dash."""
    if not _is_finite(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return _format(value, scale=value, digits=digits)


def change(ends: tuple[float, float]) -> str:
    """Formats a start and an end as "0.31 → 0.97"."""
    return f"{number(ends[0])} → {number(ends[1])}"


def estimate(value: Any) -> str:
    """Formats a number, or a dict {mean, low, high} as "0.93" with "(0.90 to 0.96)" below.

    All numbers of an interval have the decimal places that its largest number needs. An interval
    without width is omitted. Any other value is formatted with `str`.
    """
    if isinstance(value, dict) and "mean" in value:
        numbers = [value[name] for name in ("mean", "low", "high") if _is_finite(value.get(name))]
        if len(numbers) < 3 or numbers[1] == numbers[2]:
            return number(value["mean"])
        scale = max(map(abs, numbers))
        mean, low, high = (_format(n, scale) for n in numbers)
        return f"{mean}\n({low} to {high})"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _format(value: float, scale: float, digits: int = 3) -> str:
    """Formats `value` with the decimal places that `scale` needs for `digits` digits."""
    if abs(scale) < NOISE:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(scale))))
    text = f"{value:.2e}" if places > 8 else f"{value:,.{places}f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")
