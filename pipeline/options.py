"""Config fields: their values, and the paths that they hold."""

from typing import Any

from ml_collections import ConfigDict

from sarm_jax.io.errors import InputError
from sarm_jax.io.path_lists import split_paths


def field_value(config: ConfigDict, field: str) -> Any:
    """Returns the value of a field such as "dtype", "reward" or "reward.beta"."""
    value = config
    for name in field.split("."):
        value = value[name]
    return value


def plain(value: Any) -> Any:
    """Returns a config section as JSON-ready values, and any other value as it is."""
    return value.to_dict() if isinstance(value, ConfigDict) else value


def required(config: ConfigDict, *fields: str) -> None:
    """Checks that none of the fields is empty.

    Raises:
        InputError: names the first field that is.
    """
    for field in fields:
        if not field_value(config, field):
            raise InputError(f"{field} is empty: name it with --config.{field}=…")


def optional_paths(text: str) -> tuple[str, ...]:
    """Splits the comma-separated paths of a field that may be empty."""
    return split_paths(text) if text else ()
