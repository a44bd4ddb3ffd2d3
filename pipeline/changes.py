"""Describe what differs between what a result was made from and what it would be made from now.

Models and files count by their content, wherever they are: a directory that was renamed, or that is
named in another way, is the same. A path counts only if no content was recorded, which is so for a
model on the hub.
"""

import copy
import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.inputs import MODELS, Input
from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import first_difference

# Options that did not exist from the start, with the value that stands for what was done before:
# records that lack them are taken to have it.
DEFAULTS = {
    "ppo": {
        "long_prompts": "error",
        "algorithm": "ppo",
        "samples_per_prompt": 1,
        "clip_range_high": 0.0,
        "scale_advantages": True,
        "loss_average": "tokens",
        "rollout_slots": 0,
    },
    "discriminator": {"folds": 1},
    "reward": {
        "probe": "",
        "probe_penalty": 0.0,
        "screen": False,
        "human_states": "",
        "distance_penalty": 0.0,
        "length_penalty": 0.0,
        "bound": "",
        "ensemble": "mean",
    },
    "human_latents": {"states": False},
    "train_sarm": {
        "tie_pairs_jsonl": "",
        "tie_weight": 1.0,
        "sae_model": "",
        "heads": 1,
        "gradient_accumulation_steps": 1,
    },
    "train_sae": {"activation": "topk"},
    "lab": {
        "shortcuts": "flattery",
        "told_shortcuts": "flattery",
        "oracle": False,
        "annotator_bias": 1.0,
    },
    "identify.feature_names": "",
}
# A file with one of these in its path may lack a digest in older records.
UNRECORDED = set(",=:@[] ")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The options by field, and the digests of the inputs by path, that a result depends on."""

    options: dict[str, Any]
    inputs: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of an input: its label, its path, and the digests of its files by relative path."""

    label: str
    path: Path | None
    digests: Mapping[str, str]

    def is_same(self, now: "Entry") -> bool:
        """Returns whether an entry that was recorded is the same as the entry `now`."""
        if self.label != now.label:
            return False
        if self.digests:
            return self.digests == now.digests
        if not now.digests:  # a value, a model on the hub, or nothing to read, such as no adapter
            return bool(self.label) or self.place == now.place
        return bool(UNRECORDED & set(str(self.path))) and self.place == now.place

    @property
    def place(self) -> Path | None:
        """The absolute path."""
        return self.path and self.path.absolute()


def change(
    stage: Stage, before: Mapping[str, Any], now: Provenance, continuing: bool = False
) -> str | None:
    """Describes the first difference; returns None if there is none.

    Args:
        stage: the stage that made the result.
        before: the record {options, inputs} of the result.
        now: what the result would be made from now.
        continuing: ignore changes that the stage can continue a result with, see `Stage.continued`.
    """
    options = json.loads(json.dumps(now.options))
    stored = copy.deepcopy(dict(before["options"]))
    if continuing:
        stored = stage.continued(stored, options)
    for field in stage.unread(options):
        for side in (stored, options):
            _set_value(side, field, None)
    read_before, read_now = dict(before["inputs"]), dict(now.inputs)
    changed_file = None
    for item in stage.inputs:
        texts = _value(stored, item.field), _value(options, item.field)
        if not all(isinstance(text, str) for text in texts):
            continue
        old = _entries(item, texts[0], before["inputs"])
        new = _entries(item, texts[1], now.inputs)
        for entries, read in ((old, read_before), (new, read_now)):
            for path in [path for entry in entries for path in _paths(entry)]:
                read.pop(path, None)
        if item.kind in MODELS:  # older records have files that are not read, such as a README
            for path in [path for entry in old for path in _others(entry, read_before)]:
                if path not in now.inputs:
                    del read_before[path]
        if [e.label for e in old] == [e.label for e in new] and all(
            a.is_same(b) or a.place == b.place for a, b in zip(old, new, strict=True)
        ):
            _set_value(stored, item.field, texts[1])
            changed_file = changed_file or _changed_file(old, new)
    difference = first_difference(stored, options, defaults=DEFAULTS)
    if difference or changed_file:
        return difference or changed_file
    return _first_changed(read_before, read_now)


def input_change(
    stage: Stage, before: Mapping[str, Any], now: Provenance, field: str
) -> str | None:
    """Describes how an input, or a file that was read and would be read, changed; or returns None.

    Args:
        stage: the stage that made the result.
        before: the record of the result.
        now: what the result would be made from now.
        field: the field of the input.
    """
    item = next(item for item in stage.inputs if item.field == field)
    texts = _value(before["options"], field), _value(now.options, field)
    old = _entries(item, texts[0], before["inputs"])
    new = _entries(item, texts[1], now.inputs)
    if len(old) != len(new) or not all(a.is_same(b) for a, b in zip(old, new, strict=True)):
        same_place = [e.place for e in old] == [e.place for e in new]
        changed = _changed_file(old, new) if same_place else None
        return changed or f"{field} was {texts[0]!r} and is {texts[1]!r}"
    both = before["inputs"].keys() & now.inputs.keys()
    return _first_changed(
        {path: before["inputs"][path] for path in both}, {path: now.inputs[path] for path in both}
    )


def _entries(item: Input, text: str, digests: Mapping[str, str]) -> list[Entry]:
    """Parses the value of an input; a value that cannot be parsed stands for itself."""
    try:
        entries = item.entries(text, Path())
    except InputError:
        return [Entry(text, None, {})]
    return [
        Entry(label, path, {} if path is None else _digests_within(item, path, digests))
        for label, path in entries
    ]


def _digests_within(item: Input, path: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Returns the digests of a file, as ".", or of the files in a folder, by relative path."""
    if str(path) in digests:
        return {".": digests[str(path)]}
    within = {
        str(Path(name).relative_to(path)): digest
        for name, digest in digests.items()
        if Path(name).is_relative_to(path)
    }
    of_run = {name: digest for name, digest in within.items() if _matches(name, item.content)}
    return of_run or within


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Returns whether a relative path matches a pattern, part by part."""
    parts = Path(name).parts
    return any(
        len(parts) == len(Path(pattern).parts)
        and all(map(fnmatch.fnmatchcase, parts, Path(pattern).parts))
        for pattern in patterns
    )


def _paths(entry: Entry) -> list[str]:
    return [str(entry.path / name) for name in entry.digests] if entry.path is not None else []


def _others(entry: Entry, read: Mapping[str, str]) -> list[str]:
    """Returns the files that were read in an entry's folder and are none of its own."""
    return [p for p in read if entry.path is not None and Path(p).is_relative_to(entry.path)]


def _changed_file(old: list[Entry], new: list[Entry]) -> str | None:
    """Describes the first file that differs between entries of the same places."""
    for before, now in zip(old, new, strict=True):
        if not before.is_same(now):
            names = sorted(before.digests.keys() | now.digests.keys())
            changed = [n for n in names if before.digests.get(n) != now.digests.get(n)]
            return f"{(now.path or Path()) / changed[0] if changed else now.path} has changed"
    return None


def _first_changed(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            return f"{path} has changed"
    return None


def _value(options: Mapping[str, Any], field: str) -> Any:
    """Returns a field of recorded options, some of which are sections; None if it is not there."""
    for key, value in options.items():
        if key == field:
            return value
        if field.startswith(f"{key}.") and isinstance(value, dict):
            return _value(value, field[len(key) + 1 :])
    return None


def _set_value(options: dict[str, Any], field: str, new: Any) -> None:
    for key, value in options.items():
        if key == field:
            options[key] = new
            return
        if field.startswith(f"{key}.") and isinstance(value, dict):
            _set_value(value, field[len(key) + 1 :], new)
            return
