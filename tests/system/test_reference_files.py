"""Handmade files in the formats of the reference implementation are read without changes."""

import json

import pytest

from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.evaluation.controls import read_steering
from sarm_jax.evaluation.steering import read_answers
from sarm_jax.features.feature_lists import parse_features
from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation_rows import read_demonstrations, read_pairs, read_prompts
from sarm_jax.rewards.options import reward_config
from tests.report_runs import REFERENCE_COLUMNS, write_recording

SELECTED = {
    "features of one kind under the names of another": {
        "verbosity_features": [31, 53, 12, 6],
        "safety_harming": [31, 53, 12],
        "safety_promoting": [],
        "method": "verbosity_clamping",
    },
    "lists with a strategy": {
        "penalize_features": [30, 35, 13],
        "encourage_features": [42, 37],
        "strategy": "penalize_bad_encourage_good",
    },
    "lists with their statistics": {
        "verbosity_features": [10, 29, 6],
        "method": "differential_activation_real_data",
        "n_samples": 85,
        "top_differential": [
            {
                "feature": 10,
                "chosen_mean": 1.25,
                "rejected_mean": 9.0,
                "diff": 7.75,
                "weight": -8e-5,
            }
        ],
    },
}
LISTS = [
    (kind, key, content)
    for kind, selected in SELECTED.items()
    for key, content in selected.items()
    if isinstance(content, list) and not any(isinstance(entry, dict) for entry in content)
]


@pytest.mark.parametrize(("kind", "key", "content"), LISTS, ids=lambda value: str(value)[:20])
def test_lists_of_features(tmp_path, kind, key, content):
    path = tmp_path / "selected_features.json"
    path.write_text(json.dumps(SELECTED[kind]))
    if not content:
        for text in (f"@{path}:{key}", f"@{path}:{key}[:5]"):
            with pytest.raises(InputError, match="empty") as error:
                parse_features("penalize_features", text)
            assert f"penalize_features=@{path}:{key}" in str(error.value)
        assert parse_features("penalize_features", f"@{path}:{key}[:0]") == ()
        return
    assert parse_features("penalize_features", f"@{path}:{key}") == tuple(content)
    for count in range(len(content) + 1):
        assert parse_features("f", f"@{path}:{key}[:{count}]") == tuple(content[:count])


def test_other_values_than_lists_of_features_are_refused(tmp_path):
    path = tmp_path / "selected_features.json"
    path.write_text(json.dumps(SELECTED["lists with their statistics"]))
    with pytest.raises(InputError, match="no list 'method'"):
        parse_features("f", f"@{path}:method")
    with pytest.raises(InputError, match=r"found \{'feature': 10"):
        parse_features("f", f"@{path}:top_differential")


def test_an_empty_list_beside_another_list_adds_nothing(tmp_path):
    path = tmp_path / "selected_features.json"
    path.write_text(json.dumps({"promoting": [], "harming": [3, 5]}))
    assert parse_features("f", f"@{path}:promoting,@{path}:harming,7") == (3, 5, 7)


def test_an_empty_list_does_not_select_all_latents(tmp_path):
    path = tmp_path / "selected_features.json"
    path.write_text(json.dumps({"promoting": []}))
    section = dict.fromkeys(
        "penalize_features tau_values alpha_values clamp_features clamp_set_values "
        "clamp_min_values clamp_max_values latent_indices".split(),
        "",
    )
    section |= {"beta": 0.1, "unit": "score", "penalty_cap": 10.0}
    assert reward_config(section).latent_indices == ()
    with pytest.raises(InputError, match="latent_indices=.*: the list is empty"):
        reward_config(section | {"latent_indices": f"@{path}:promoting"})


def test_steering_config(tmp_path):
    path = tmp_path / "steering_config.json"
    path.write_text('{"48659": ["*", 0.0], "28879": ["*", 0.0], "26446": ["+", -1.5]}')
    assert read_steering(path) == {48659: ("*", 0.0), 28879: ("*", 0.0), 26446: ("+", -1.5)}


@pytest.mark.parametrize("blank", ["", "\n", " \r\n\t\n"])
def test_prompts_pairs_demonstrations_and_answers(tmp_path, blank):
    """Files may have blank lines before, between and after rows; the reference skips them."""

    def save(name: str, *rows: dict) -> str:
        path = tmp_path / name
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text(blank + "".join(f"{line}\n{blank}" for line in lines), encoding="utf-8")
        return str(path)

    prompts = save("prompts.jsonl", {"prompt": "a “quoted” one"}, {"prompt": "b", "subset": "Ties"})
    assert read_prompts(prompts) == ["a “quoted” one", "b"]
    demos = [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y\n\nz"}]
    assert read_demonstrations(save("demos.jsonl", *demos)) == demos
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    pairs = [pair | {"source": "safety"}, pair | {"source": "complement"}, pair | {"id": "7"}]
    assert read_pairs(save("probes.jsonl", *pairs)) == pairs
    answer = {"question": "q", "answer": "a"}
    test_files = save(
        "safety_all.jsonl", answer | {"type": "chosen"}, answer | {"type": "rejected"}
    )
    assert [read.kind for read in read_answers(test_files)] == ["chosen", "rejected"]
    numbers = {"question_id": 3, "id": "3746"}
    labelled = save("safety_j.jsonl", answer | numbers | {"label": "rejected"}, answer | numbers)
    assert [read.kind for read in read_answers(labelled)] == ["rejected", "safety_j"]


def test_metrics(tmp_path):
    rows = read_metrics(write_recording(tmp_path, "full", steps=3))
    features = [f"feat_{i}_{measure}" for measure in ("activation", "above_tau") for i in (48, 28)]
    assert list(rows[0]) == [*REFERENCE_COLUMNS, *features]
    assert [row["step"] for row in rows] == [1, 2, 3]
