"""Reads fields of a JSON object and adds what is wrong with them to a list of problems."""

from typing import Any

import numpy as np

# These limits exceed every known model. Without them, a list of tensors could fill the memory.
_MAX_SIZES = {
    "num_hidden_layers": 4096,
    "sae_source_layer": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 22,
    "intermediate_size": 1 << 24,
    "sae_latent_size": 1 << 28,
    "sarm_heads": 1 << 16,
}


def positive(fields: dict[str, Any], name: str, problems: list[str], prefix: str = "") -> int:
    """Reads a positive integer; returns 1 after adding a problem."""
    value = fields.get(name)
    most = _MAX_SIZES.get(name, (1 << 31) - 1)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
        return value
    limit = f", at most {most}" if isinstance(value, int) and value > most else ""
    problems.append(f"{prefix}{name}={value!r}: expected a positive integer{limit}")
    return 1


def number(fields: dict[str, Any], name: str, problems: list[str], prefix: str = "") -> float:
    """Reads a positive number that float32 can hold; returns 1.0 after adding a problem."""
    value = fields.get(name)
    largest = float(np.finfo(np.float32).max)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= largest:
        return float(value)
    problems.append(f"{prefix}{name}={value!r}: expected a positive number")
    return 1.0


def is_off(value: Any) -> bool:
    """Returns True if a field with this value has no effect."""
    return value is None or value is False or value in ({}, [])
