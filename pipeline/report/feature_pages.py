"""The pages on single features, merged from feature_pages.json of identify and of evaluate.

A working directory may have both files. They describe the same features on different responses:
preference pairs, and responses of people and policies.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.feature_files import CERTIFICATES, FILES, read_certificates, read_pages
from pipeline.report.runs import Run
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.features.feature_pages import MAX_PAGES

# What a feature is to a run, in the order of its importance; further roles come last.
ROLES = (
    "penalised",
    "clamped",
    "steered",
    "certified",
    "latent KL",
    "detector",
    "carrier",
    "top mover",
    "harming",
    "promoting",
    "verbosity",
)
LEVELS = 5  # shades of activation
STRONGEST = 6  # words that are named above the examples
COSINE_SHOWN = 0.1  # decoder rows that are less similar than this are no neighbours
TOLERANCE = 1e-4  # relative, of weights of the same reward model in both files


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in shares of the width and the height of its strip."""

    x: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Strip:
    """The activations of a feature in one group of responses.

    `fires` and `above_tau` are shares of its `responses`; `tau` is the place of the threshold on
    the axis, from 0 to 1, or None.
    """

    group: str
    responses: int
    fires: float
    above_tau: float | None
    bars: Sequence[Bar]
    tau: float | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a response: its shade from 0 to `LEVELS`, or the number of pieces left out."""

    text: str
    z: float = 0.0
    level: int = 0
    left_out: int = 0

    @property
    def word(self) -> str:
        """The text without the blanks before it."""
        return self.text.lstrip() or self.text

    @property
    def blank(self) -> str:
        """The blanks before a word."""
        return self.text.removesuffix(self.word)


@dataclasses.dataclass(frozen=True)
class Example:
    """A response that excites a feature; the last of its pieces is the one the reward reads."""

    z: float
    groups: str
    prompt: str
    pieces: Sequence[Piece]


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A feature with a similar decoder row; `anchor` is that of its page, if it has one."""

    feature: int
    cosine: float
    anchor: str | None


@dataclasses.dataclass(frozen=True)
class FeaturePage:
    """All that is shown of one feature; `low` and `high` are the ends of the histograms' axis."""

    feature: int
    anchor: str
    roles: Sequence[str]
    weight: float
    weight_rank: int
    tau: float | None
    low: float
    high: float
    strips: Sequence[Strip]
    strongest: Sequence[Piece]
    examples: Sequence[Example]
    neighbours: Sequence[Neighbour]
    certificate: str


@dataclasses.dataclass(frozen=True)
class FeaturePages:
    """The pages of one reward model: those of one working directory.

    `left_out` is the number of features that the files describe beyond `MAX_PAGES`, `missing` are
    features with a penalty or a clamp that no file describes, and `notes` say what is wrong.
    """

    name: str
    latents: int
    pages: Sequence[FeaturePage]
    left_out: int = 0
    missing: Sequence[int] = ()
    notes: Sequence[str] = ()


def read_feature_pages(
    folders: Mapping[str, Path], runs: Sequence[Run], names: FeatureNames
) -> list[FeaturePages]:
    """Reads the pages of all working directories that have some.

    Args:
        folders: working directories by name.
        runs: the runs of the report, whose penalised and clamped features come first.
        names: names of features, which must be features of every reward model.

    Raises:
        InputError: a file is malformed, or a name belongs to no feature.
    """
    result: list[FeaturePages] = []
    for name, folder in folders.items():
        contents = {path: content for path in FILES if (content := read_pages(folder / path))}
        if contents:
            place = folder.resolve()
            own = [r for r in runs if len(folders) == 1 or r.folder.resolve().is_relative_to(place)]
            prefix = f"{len(result) + 1}-" if result else ""
            pages = _merged(name, folder, contents, runs=own, prefix=prefix)
            names.check(pages.latents)
            result.append(pages)
    return result


def _merged(
    name: str,
    folder: Path,
    contents: Mapping[str, Mapping[str, Any]],
    *,
    runs: Sequence[Run],
    prefix: str,
) -> FeaturePages:
    """Merges the files of one working directory."""
    notes = []
    if len(contents) > 1 and not _same_model(*contents.values()):
        notes = [
            f"{folder / FILES[0]} is of another reward model than {folder / FILES[1]}, and is not "
            "shown; --stage=identify makes it again."
        ]
        contents = {FILES[1]: contents[FILES[1]]}
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for content in contents.values():
        for row in content["features"]:
            rows.setdefault(row["feature"], []).append(row)
    controlled = {
        "penalised": [i for run in runs for i in run.features],
        "clamped": [i for run in runs for i in run.clamped],
    }
    certificates = read_certificates(folder / CERTIFICATES)
    roles = {i: _roles(i, own, controlled, certificates) for i, own in rows.items()}
    order = sorted(rows, key=lambda i: min(map(_rank, roles[i]), default=len(ROLES)))
    shown = order[:MAX_PAGES]
    anchors = {i: f"feature-{prefix}{i}" for i in shown}
    pages = [_page(i, rows[i], roles[i], anchors, certificates.get(i)) for i in shown]
    missing = {i for own in controlled.values() for i in own} - rows.keys()
    return FeaturePages(
        name=name,
        latents=next(iter(contents.values()))["latents"],
        pages=pages,
        left_out=len(order) - len(shown),
        missing=sorted(missing),
        notes=notes,
    )


def _page(
    feature: int,
    rows: Sequence[Mapping[str, Any]],
    roles: Sequence[str],
    anchors: Mapping[int, str],
    certificate: Mapping[str, Any] | None,
) -> FeaturePage:
    """Merges what the files say of one feature; the last file that has a τ gives it."""
    tau = next((row["tau"] for row in reversed(rows) if row["tau"] is not None), None)
    # A share above another τ would be read as one above this.
    groups = {
        name: group if row["tau"] == tau else {**group, "above_tau": None}
        for row in rows
        for name, group in row["groups"].items()
    }
    ends = [end for group in groups.values() for end in group["range"]]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    examples = _distinct([example for row in rows for example in row["examples"]])
    largest = max((z for e in examples for _, z in _pieces(e)), default=0.0)
    return FeaturePage(
        feature=feature,
        anchor=anchors[feature],
        roles=roles,
        weight=rows[-1]["weight"],
        weight_rank=rows[-1]["weight_rank"],
        tau=tau,
        low=low,
        high=high,
        strips=[_strip(name, group, low, high, tau) for name, group in groups.items()],
        strongest=_strongest(examples, largest),
        examples=[_example(e, largest) for e in sorted(examples, key=lambda e: -e["z"])],
        neighbours=[
            Neighbour(n["feature"], n["cosine"], anchors.get(n["feature"]))
            for n in rows[-1]["neighbours"]
            if n["cosine"] >= COSINE_SHOWN
        ],
        certificate=str((certificate or {}).get("reason", "")),
    )


def _strip(
    name: str, group: Mapping[str, Any], low: float, high: float, tau: float | None
) -> Strip:
    """Places the histogram of a group on an axis from `low` to `high`, its highest bar full."""
    span, (first, last) = high - low, group["range"]
    width, highest = (last - first) / len(group["counts"]), max(group["counts"])
    bars = [
        Bar((first + n * width - low) / span, width / span, count / highest)
        for n, count in enumerate(group["counts"])
        if count
    ]
    place = None if tau is None or not low <= tau <= high else (tau - low) / span
    return Strip(
        group=name,
        responses=group["responses"],
        fires=group["fires"],
        above_tau=group["above_tau"],
        bars=bars,
        tau=place,
    )


def _distinct(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns every response once, with the groups of both files."""
    distinct: dict[tuple, dict[str, Any]] = {}
    for example in examples:
        key = example["prompt"], tuple(text for text, _ in _pieces(example))
        own = distinct.setdefault(key, {**example, "groups": []})
        own["groups"] += [name for name in example["groups"] if name not in own["groups"]]
    return list(distinct.values())


def _example(example: Mapping[str, Any], largest: float) -> Example:
    pieces = [
        Piece("", left_out=piece["left_out"])
        if isinstance(piece, dict)
        else Piece(piece[0], z=piece[1], level=_level(piece[1], largest))
        for piece in example["tokens"]
    ]
    groups = ", ".join(example["groups"])
    return Example(z=example["z"], groups=groups, prompt=example["prompt"], pieces=pieces)


def _strongest(examples: Iterable[Mapping[str, Any]], largest: float) -> list[Piece]:
    """Returns the words that excite a feature most, each once; the pooled token is no word."""
    z_of: dict[str, float] = {}
    for example in examples:
        for text, z in _pieces(example)[:-1]:
            word = text.strip()
            if word and z > 0:
                z_of[word] = max(z, z_of.get(word, 0.0))
    words = sorted(z_of, key=lambda word: -z_of[word])[:STRONGEST]
    return [Piece(word, z=z_of[word], level=_level(z_of[word], largest)) for word in words]


def _pieces(example: Mapping[str, Any]) -> list[Sequence[Any]]:
    return [piece for piece in example["tokens"] if not isinstance(piece, dict)]


def _level(z: float, largest: float) -> int:
    return min(LEVELS, math.ceil(LEVELS * z / largest)) if z > 0 else 0


def _roles(
    feature: int,
    rows: Sequence[Mapping[str, Any]],
    controlled: Mapping[str, Sequence[int]],
    certificates: Mapping[int, Mapping[str, Any]],
) -> list[str]:
    """Returns what a feature is to the runs, the most important role first."""
    roles = [role for row in rows for role in row["roles"]]
    roles += [role for role, features in controlled.items() if feature in features]
    if certificates.get(feature, {}).get("certified") is True:
        roles.append("certified")
    return sorted(dict.fromkeys(roles), key=_rank)


def _rank(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _same_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Returns whether two files can be of the same reward model, by latents and weights."""
    weights = [{row["feature"]: row["weight"] for row in c["features"]} for c in (first, second)]
    shared = weights[0].keys() & weights[1].keys()
    return first["latents"] == second["latents"] and all(
        math.isclose(weights[0][i], weights[1][i], rel_tol=TOLERANCE, abs_tol=1e-12) for i in shared
    )
