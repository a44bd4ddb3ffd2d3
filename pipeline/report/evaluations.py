"""Reads the files that the stage evaluate writes to eval/, and checks what the report relies on.

The explanation of a score must add up to the score:

    score = Σ z_i · w_i over the terms in the file + rest + what is outside the features
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.runs import read_object
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import line_of, read_jsonl
from sarm_jax.models.conversation_rows import prompt_of

FILES = ("policy", "rm_bench", "rewardbench2", "steering", "latent_map")
BASE = "base"
TOLERANCE = 1e-4  # relative to Σ |term|; the terms are float32
EVALUATE = "python main.py --config=CONFIG --stage=evaluate --workdir="


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The content of `folder`/eval: the JSON files by name, and the rows of responses.jsonl.

    The prompts of the rows are parsed. `names` are those of features.
    """

    name: str
    folder: Path
    parts: Mapping[str, Mapping[str, Any]]
    responses: Sequence[Mapping[str, Any]]
    names: FeatureNames = NO_NAMES

    @property
    def missing(self) -> list[str]:
        """Names of the files that do not exist."""
        names = [f"{name}.json" for name in FILES if name not in self.parts]
        return names + ["responses.jsonl"] * (not self.responses)


def read_evaluation(name: str, folder: Path) -> Evaluation:
    """Reads `folder`/eval; any of its files may be missing.

    Raises:
        InputError: a file is malformed, or an explanation does not add up.
    """
    eval_folder = folder / "eval"
    contents = {part: read_object(eval_folder / f"{part}.json") for part in FILES}
    parts = {part: content for part, content in contents.items() if content is not None}
    path = eval_folder / "responses.jsonl"
    responses = read_jsonl(path, {"responses": dict}, lenient=True) if path.exists() else []
    for number, row in enumerate(responses, 1):
        try:
            row["prompt"] = prompt_of(row)
            for policy, response in row["responses"].items():
                _check_response(response, policy)
        except InputError as error:
            raise InputError(f"{path}:{line_of(path, number)}: {error}") from None
    if "latent_map" in parts:
        _check_map(parts["latent_map"], eval_folder / "latent_map.json")
    return Evaluation(name=name, folder=folder, parts=parts, responses=responses)


def _check_response(response: Any, place: str) -> None:
    if not (isinstance(response, dict) and isinstance(response.get("response"), str)):
        raise InputError(f"{place}: field 'response' must be str")
    if not _is_number(response.get("score")):
        raise InputError(f"{place}: field 'score' must be a number")
    if not isinstance(response.get("penalties", {}), dict):
        raise InputError(f"{place}: field 'penalties' must map features to numbers")
    terms = response.get("terms")
    if terms is None:
        return
    if not isinstance(terms, list):
        raise InputError(f"{place}: field 'terms' must be a list")
    for term in terms:
        if not (isinstance(term, list) and len(term) == 4 and all(map(_is_number, term))):
            raise InputError(f"{place}: a term must be [feature, z, w, z·w], found {term!r}")
    if not _is_number(response.get("rest")):
        raise InputError(f"{place}: field 'rest' must be a number")
    outside = response.get("outside", {})
    if not (isinstance(outside, dict) and all(map(_is_number, outside.values()))):
        raise InputError(f"{place}: field 'outside' must map parts of the score to numbers")
    summands = [term[3] for term in terms] + [response["rest"], *outside.values()]
    limit = TOLERANCE * sum(map(abs, summands)) + 1e-9
    wrong = next((term for term in terms if abs(term[1] * term[2] - term[3]) > limit), None)
    if wrong:
        raise InputError(f"{place}: the term of feature {wrong[0]} is not z·w: {wrong[1:]}")
    if abs(math.fsum(summands) - response["score"]) > limit:
        raise InputError(
            f"{place}: the terms and the rest add up to {math.fsum(summands):.6g}, "
            f"not to the score {response['score']:.6g}"
        )


def _check_map(content: Mapping[str, Any], path: Path) -> None:
    points = content.get("points")
    if not isinstance(points, list):
        raise InputError(f"{path}: field 'points' must be a list")
    for number, point in enumerate(points):
        has_source = isinstance(point, dict) and isinstance(point.get("source"), str)
        if not (has_source and _is_number(point.get("x")) and _is_number(point.get("y"))):
            raise InputError(f"{path}: points[{number}] needs source, x and y")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
