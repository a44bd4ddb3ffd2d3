"""Reads and writes the rotary embedding of a `config.json` in both dialects.

transformers 4 reads `rope_theta` and `rope_scaling` and ignores `rope_parameters`, in which
transformers 5 keeps both. A file may hold either dialect, or both if they are equal. Both are
written, because a version that does not find its own dialect silently uses a base of 10000.
"""

import dataclasses
from typing import Any

from conversion.fields import is_off, number, positive
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.rope import SCALINGS, Llama3Scaling, RopeScaling, YarnScaling

_DEFAULT_THETA = 10000.0
CONTEXT = "original_max_position_embeddings"
_LEAST_TURNS = 1e-6  # with fewer turns in the original context YaRN's ramp could overflow

Rope = tuple[float, RopeScaling | None]


def rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """Returns the fields for the base and the scaling in both dialects."""
    theta, scaling = config.rope_theta, config.rope_scaling
    values: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        fields = {name: value for name, value in vars(scaling).items() if value is not None}
        values = {"rope_type": scaling.rope_type, **fields}
    return {
        "rope_theta": theta,
        "rope_scaling": values if scaling else None,
        "rope_parameters": {"rope_theta": theta, **values},
    }


def needs_transformers5(hf: dict[str, Any], config: LlamaConfig) -> bool:
    """Returns True if transformers 4 would compute another rotary embedding than `config` has."""
    old = hf.get("rope_theta") is not None or hf.get("rope_scaling")
    return not old and (config.rope_theta, config.rope_scaling) != (_DEFAULT_THETA, None)


def read_rope(hf: dict[str, Any], problems: list[str]) -> Rope:
    """Reads (base, scaling); adds a problem if the dialects contradict each other."""
    new, old, theta = (hf.get(n) for n in ("rope_parameters", "rope_scaling", "rope_theta"))
    for name, fields in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(fields or {}, dict):
            problems.append(f"{name}={fields!r}: expected an object")
            return 1.0, None
    before = len(problems)
    dialects: dict[str, Rope] = {}
    if new:
        dialects["rope_parameters"] = _read_dialect(
            "rope_parameters", fields=new, theta=theta, problems=problems
        )
    if old or theta is not None or not new:
        dialects["rope_scaling"] = _read_dialect(
            "rope_scaling", fields=old or {}, theta=theta, problems=problems
        )
    ropes = list(dialects.values())
    differ = len(problems) == before and ropes[0][1] != ropes[-1][1]
    if differ or (new and old and _kind(new) != _kind(old)):
        problems.append(f"rope_scaling={old} contradicts rope_parameters={new}")
    if len(problems) == before and ropes[0][0] != ropes[-1][0]:
        thetas = f"rope_theta={ropes[-1][0]!r}", f"rope_parameters.rope_theta={ropes[0][0]!r}"
        problems.append(" contradicts ".join(thetas))
    if len(problems) == before:
        problems += _context_problems(hf, ropes[0][1], parent=next(iter(dialects)))
    return ropes[0]


def _context_problems(hf: dict[str, Any], scaling: RopeScaling | None, parent: str) -> list[str]:
    """Describes an original context beside the object `parent` that differs from its own.

    transformers prefers the one beside it, and some versions of it the one inside.
    """
    inside = getattr(scaling, CONTEXT, None)
    beside = hf.get(CONTEXT)
    if None in (inside, beside) or (type(beside) is int and beside == inside):
        return []
    return [f"{CONTEXT}={beside!r} contradicts {parent}.{CONTEXT}={inside!r}"]


def _read_dialect(parent: str, fields: dict[str, Any], theta: Any, problems: list[str]) -> Rope:
    """Reads the object `parent`; `theta` is the base that config.json has beside it, if any."""
    inside = fields.get("rope_theta")
    if None not in (inside, theta) and inside != theta:
        problems.append(f"rope_theta={theta!r} contradicts {parent}.rope_theta={inside!r}")
    first = next((value for value in (inside, theta) if value is not None), _DEFAULT_THETA)
    base = number({"rope_theta": first}, "rope_theta", problems)
    kind = _kind(fields)
    if kind not in ("default", *SCALINGS):
        supported = ", ".join(map(repr, ("default", *SCALINGS)))
        problems.append(f"{parent}.rope_type={kind!r}: only {supported} are supported")
        return base, None
    allowed = {"rope_type", "type", "rope_theta"}
    if kind != "default":
        allowed |= {field.name for field in dataclasses.fields(SCALINGS[kind])}
    for name, value in fields.items():
        full_rotation = name == "partial_rotary_factor" and value == 1
        if name not in allowed and not is_off(value) and not full_rotation:
            problems.append(f"{parent}.{name}={value!r}: unknown field")
    if kind == "default":
        return base, None
    scaling = _read_scaling(parent, SCALINGS[kind], fields, problems)
    if isinstance(scaling, YarnScaling):
        if base <= 1:
            problems.append(f"rope_theta={base}: must exceed 1 for rope_type='yarn'")
        for name in ("beta_fast", "beta_slow"):
            if getattr(scaling, name) < _LEAST_TURNS:
                problems.append(
                    f"{parent}.{name}={fields[name]!r}: must be at least {_LEAST_TURNS}"
                )
    return base, scaling


def _read_scaling(
    parent: str, scaling: type[RopeScaling], fields: dict[str, Any], problems: list[str]
) -> RopeScaling:
    """Reads the fields of a scaling from the object `parent`; adds what is wrong with them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(scaling):
        name, value = field.name, fields.get(field.name)
        if name not in fields and field.default is not dataclasses.MISSING:
            continue
        if name == CONTEXT:
            values[name] = positive(fields, name, problems, prefix=f"{parent}.")
        elif name == "truncate":
            values[name] = value
            if not isinstance(value, bool):
                problems.append(f"{parent}.truncate={value!r}: expected true or false")
        elif value is not None or field.default is dataclasses.MISSING:
            values[name] = number(fields, name, problems, prefix=f"{parent}.")
    result = scaling(**values)
    if isinstance(result, Llama3Scaling):
        low, high = result.low_freq_factor, result.high_freq_factor
        if high <= low:
            problems.append(f"{parent}.high_freq_factor={high}: must exceed low_freq_factor={low}")
    return result


def _kind(fields: dict[str, Any]) -> Any:
    return fields.get("rope_type", fields.get("type", "default"))
