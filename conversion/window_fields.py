"""Reads the sliding window of a `config.json`.

A window of W tokens, in which a token attends to itself and the W − 1 tokens before it, changes
nothing in a sequence of at most W tokens. It is therefore not computed here: the window becomes the
longest sequence of the model, and longer ones are refused. Source: transformers, masking_utils.py.
"""

from typing import Any

from conversion.fields import is_off, positive

_DEFAULT_WINDOW = 4096  # of transformers' MistralConfig, Qwen2Config and Qwen3Config
_DEFAULT_FULL_LAYERS = 28  # `max_window_layers` of transformers' Qwen2Config and Qwen3Config
FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(
    hf: dict[str, Any], model_type: str, layers: int, problems: list[str]
) -> int | None:
    """Returns the window in tokens of any of the first `layers` layers; None if none has one."""
    types = _read_layer_types(hf, layers, problems)
    if model_type == "llama":
        for name in ("sliding_window", "use_sliding_window"):
            if not is_off(hf.get(name)):
                problems.append(f"{name}={hf[name]!r}: unknown field")
        slides = False
    elif model_type == "mistral":
        slides = True
    else:
        slides = hf.get("use_sliding_window") or False
        if not isinstance(slides, bool):
            problems.append(f"use_sliding_window={slides!r}: expected true or false")
    fields = {"sliding_window": _DEFAULT_WINDOW, **hf}
    if not slides or fields["sliding_window"] is None:
        if SLIDING in types:
            problems.append(f"layer_types[{types.index(SLIDING)}]={SLIDING!r}: there is no window")
        return None
    window = positive(fields, "sliding_window", problems)
    if model_type == "mistral":  # it reads no layer_types
        return window
    if not types:
        default = {"max_window_layers": _DEFAULT_FULL_LAYERS, **hf}
        if default["max_window_layers"] != 0:
            full = positive(default, "max_window_layers", problems)
            types = [FULL] * min(full, layers)
        types += [SLIDING] * (layers - len(types))
    return window if SLIDING in types else None


def _read_layer_types(hf: dict[str, Any], layers: int, problems: list[str]) -> list[str]:
    """Returns the kinds of attention of the first `layers` layers; [] if they are not listed."""
    types = hf.get("layer_types")
    if types is None:
        return []
    if not isinstance(types, list) or len(types) < layers:
        found = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        problems.append(f"layer_types: expected a list of {layers} layers, found {found}")
        return []
    for number, kind in enumerate(types[:layers]):
        if kind not in (FULL, SLIDING):
            problems.append(f"layer_types[{number}]={kind!r}: expected {FULL!r} or {SLIDING!r}")
            return []
    return types[:layers]
