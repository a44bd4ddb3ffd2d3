"""Files of names of features: their forms, what is refused, and how a feature is shown."""

import gzip
import json

import pytest

from sarm_jax.features.feature_names import (
    MAX_CHARACTERS,
    NO_NAMES,
    FeatureNames,
    read_feature_names,
    shown_name,
)
from sarm_jax.io.errors import InputError

NAMES = {987: "flattery", 0: "refusals, 拒絶", 12: "says 'I' a lot"}
OBJECT = {str(i): name for i, name in NAMES.items()}
ANSWERS = [
    {"feature": i, "name": name, "explanation": "…", "score": 4} for i, name in NAMES.items()
]
NEURONPEDIA = [
    {
        "modelId": "gemma-2-2b",
        "layer": "20-gemmascope-res-16k",
        "index": str(i),
        "description": name,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
    }
    for i, name in NAMES.items()
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


GOOD = [
    ("names.json", OBJECT),
    ("names.json", json.dumps(OBJECT, indent=2).encode()),
    ("names.jsonl", OBJECT),
    ("names.jsonl", json.dumps(OBJECT, indent=2).encode()),
    ("names", OBJECT),
    ("names.json.gz", gzip.compress(json.dumps(OBJECT).encode())),
    ("answers.jsonl", lines(ANSWERS)),
    ("answers.json", lines(ANSWERS)),
    ("answers.json", ANSWERS),
    ("answers.jsonl.gz", gzip.compress(lines(ANSWERS))),
    ("neuronpedia.json", NEURONPEDIA),
    ("neuronpedia.jsonl", lines(NEURONPEDIA)),
    ("batch-0.jsonl.gz", gzip.compress(lines(NEURONPEDIA))),
    ("answers.jsonl", lines([{"feature": str(i), "name": name} for i, name in NAMES.items()])),
]


@pytest.mark.parametrize("name, content", GOOD, ids=range(len(GOOD)))
def test_names_are_read_in_every_form(tmp_path, name, content):
    names = read_feature_names(write(tmp_path, name, content))
    assert dict(names.by_feature) == NAMES
    assert names.show(987) == '987 "flattery"' and names.show(5) == "5"
    assert names.show_all([5, 12]) == "5, 12 \"says 'I' a lot\""
    names.check(988)


@pytest.mark.parametrize("row", [ANSWERS[0], NEURONPEDIA[0]])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ""])
def test_a_single_row_is_a_file_as_well(tmp_path, row, suffix):
    assert read_feature_names(write(tmp_path, f"one{suffix}", row)).of([987]) == {"987": "flattery"}


def test_several_explanations_of_a_latent_and_empty_ones_are_what_neuronpedia_has(tmp_path):
    second = NEURONPEDIA[0] | {"description": "praise", "explanationModelName": "other"}
    empty = NEURONPEDIA[0] | {"index": "3", "description": None}
    rows = [*NEURONPEDIA, second, empty, empty | {"description": ""}]
    assert dict(read_feature_names(write(tmp_path, "n.jsonl", lines(rows))).by_feature) == NAMES


BAD = {
    "no JSON": (b"{names}", "n.json: not JSON"),
    "half of an object": (b'{"1": "a", ', "n.json: not JSON"),
    "no names": (b"{}", "n.json: holds no names"),
    "a list of texts": (["flattery"], 'n.json: row 1: expected a JSON object, found "flattery"'),
    "a number": (b"3", "n.json:1: expected a JSON object, found 3"),
    "empty": (b"", "n.json: the file is empty"),
    "binary": (b"PAR1nonsense", "n.json: not parquet"),
    "a pickle": (b"\x80\x04nonsense", "n.json: is a pickle"),
    "not UTF-8": (b'{"1": "\xff"}', "n.json: not JSON"),
    "a key that is no latent": ({"flattery": "987"}, 'n.json: "flattery": expected a feature id'),
    "a negative key": ({"-1": "a"}, 'n.json: "-1": expected a feature id'),
    "a fraction": ({"1.0": "a"}, 'n.json: "1.0": expected a feature id'),
    "another digit": ({"٣": "a"}, 'n.json: "٣": expected a feature id'),
    "a latent beyond int32": ({"2147483648": "a"}, "2147483648"),
    "a long key": ({"9" * 5000: "a"}, "expected a feature id"),
    "a name that is a number": ({"987": 3}, "n.json: the name of feature 987 must be a text"),
    "a name that is an object": ({"987": {"description": "a"}}, "feature 987 must be a text"),
    "a name that is null": ({"987": None}, "feature 987 must be a text, found null"),
    "an empty name": ({"987": " \n"}, "n.json: the name of feature 987 is empty"),
    "a key twice": (b'{"987": "a", "987": "b"}', "n.json: not JSON (key '987' appears twice)"),
    "a latent twice": ({"987": "a", "0987": "b"}, "n.json: feature 987 is named twice"),
    "half of a surrogate pair": (b'{"987": "\\ud83d"}', "n.json: not JSON"),
    "rows without a feature": (lines([{"name": "a"}] * 2), "n.json:1: field 'feature' or 'index'"),
    "rows without a name": (lines([{"feature": 1}] * 2), "n.json:1: field 'name' or 'description'"),
    "a row without a name": ({"feature": 1}, "n.json: field 'name' or 'description' is missing"),
    "rows of a feature twice": (lines([ANSWERS[0], ANSWERS[0]]), "n.json:2: feature 987 is named"),
    "rows with a bool": ([{"feature": True, "name": "a"}], "row 1: true: expected a feature id"),
    "rows with a fraction": ([{"feature": 1.5, "name": "a"}], "row 1: 1.5: expected a feature id"),
    "rows with a list": ([{"index": [1], "description": "a"}], "row 1: [1]: expected a feature id"),
    "rows of two layers": (
        [NEURONPEDIA[0], NEURONPEDIA[1] | {"layer": "21"}],
        'n.json: field \'layer\' is "20-gemmascope-res-16k" and "21": keep the rows of one SAE',
    ),
    "only empty explanations": ([NEURONPEDIA[0] | {"description": None}], "holds no names"),
    "a broken line": (lines(ANSWERS) + b'{"feature": 1', "n.json:4: expected a JSON object"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_place(tmp_path, content, message):
    path = write(tmp_path, "n.json", content)
    with pytest.raises(InputError) as error:
        read_feature_names(path)
    assert str(error.value).startswith(f"identify.feature_names={path}") and "\n" not in str(error)
    assert message in str(error.value)


def test_a_missing_file_and_a_latent_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(InputError, match="identify.feature_names=none.json: cannot be read"):
        read_feature_names("none.json")
    path = write(tmp_path, "n.json", OBJECT)
    with pytest.raises(InputError, match=r"n\.json: 987: the reward model has 987 latents"):
        read_feature_names(path).check(987)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("flattery", "flattery"),
        ("  two\n lines\t", "two lines"),
        ("<b>&\"'", "<b>&\"'"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202egnirts", "\\u202egnirts"),
        ("a\u2028b", "a b"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
        ("x" * 10_000, "x" * (MAX_CHARACTERS - 1) + "…"),
        ("拒絶", "拒絶"),
    ],
)
def test_a_name_is_one_short_line_without_control_characters(text, shown):
    assert shown_name(text) == shown
    assert len(shown) <= MAX_CHARACTERS and shown.isprintable()


def test_objects_with_a_feature_get_its_name():
    names = FeatureNames({7: "flattery"})
    row = {"feature": 7, "z": 1.0, "neighbours": [{"feature": 7}, {"feature": 8}], "n": [[7, 8]]}
    annotated = names.annotated({"harming": [row], "options": {"top_k": 7}})
    assert annotated == {
        "harming": [
            {
                "feature": 7,
                "name": "flattery",
                "z": 1.0,
                "neighbours": [{"feature": 7, "name": "flattery"}, {"feature": 8}],
                "n": [[7, 8]],
            }
        ],
        "options": {"top_k": 7},
    }
    assert NO_NAMES.annotated(annotated) == annotated
    assert names.field([8]) == {} and names.field([8, 7]) == {"feature_names": {"7": "flattery"}}
    assert not NO_NAMES and names
