"""JSON that anybody may have written: no key twice, bounded depth, and no NaN unless allowed."""

import json
from typing import Any


def parse_json(text: str, constants: bool = False, unicode: bool = True) -> Any:
    """The value of a JSON text.

    Args:
      constants: accept NaN and Infinity, which are no JSON but what Python writes.
      unicode: refuse half a surrogate pair, which no tokenizer and no file can take.

    Raises:
      ValueError: bad syntax, or what is refused; the message says what, and where if it can.
    """
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark: save it as UTF-8 without one")
    refuse = None if constants else _no_constant
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=refuse)
        if unicode and "\\u" in text:  # only an escape can make one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(f"{half} is half of a surrogate pair, no text") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name!r} appears twice")
            seen.add(name)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
