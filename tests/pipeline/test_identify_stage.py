"""The files of identify, from preference pairs through the command line."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion import load_sarm
from sarm_jax.evaluation.controls import read_steering
from sarm_jax.features.contrast_statistics import differential
from sarm_jax.features.feature_lists import parse_features
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.io.path_lists import short_names
from tests.command import run_main


@pytest.fixture
def pairs(tmp_path):
    """Two benchmarks whose files have the same name."""
    files = {}
    for name, count in (("rewardbenchv2", 9), ("rm_bench", 5)):
        rows = [
            {"prompt": f"{name} {n}", "chosen": f"être {n} ✓", "rejected": "zzz" * (n % 3 + 1)}
            for n in range(count)
        ]
        path = tmp_path / "train" / name / "safety.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files[path] = rows
    return files


@pytest.fixture
def run(world, tmp_path, pairs):
    """Runs identify on both files; the folder of its results."""

    def call(*options: str):
        assert run_main(
            "--config=configs/base.py",
            "--stage=identify",
            f"--workdir={tmp_path / 'run'}",
            f"--sarm_model={world / 'sarm'}",
            f"--config.identify.pairs_jsonl={','.join(map(str, pairs))}",
            "--config.identify.resamples=100",
            *options,
        ) == 0  # fmt: skip
        return tmp_path / "run" / "probes"

    return call


def content(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("top_k, steered", [(3, 3), (8, 5)])
def test_the_steering_file_sets_the_first_harming_features_to_0(run, top_k, steered):
    folder = run(f"--config.identify.top_k={top_k}")
    harming = content(folder / "selected_features.json")["safety_harming"]
    steering = read_steering(folder / "steering_config.json")
    assert list(steering) == harming[:steered]
    assert set(steering.values()) == {("*", 0.0)}


def test_two_files_of_a_name_are_two_sources(run, world, pairs):
    folder = run("--config.identify.combine=sources")
    analysis = content(folder / "feature_analysis.json")
    assert analysis["sources"] == {"rewardbenchv2/safety": 9, "rm_bench/safety": 5}
    model, each = load_sarm(str(world / "sarm"), "float32"), []
    for rows in pairs.values():
        prompts = [row["prompt"] for row in rows]
        c, j = (
            model.score(prompts, [row[side] for row in rows])[1] for side in ("chosen", "rejected")
        )
        parts = c, j, np.abs(c) + np.abs(j)  # this SARM keeps negative latents too
        each.append(differential(*(z.mean(axis=0) for z in parts)))
    scores = load_file(folder / "feature_scores.safetensors")["differential"]
    np.testing.assert_allclose(scores, np.mean(each, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/x.jsonl"], ["x"]),
        (["a/x.jsonl", "a/y.jsonl"], ["x", "y"]),
        (["a/c/x.jsonl", "b/c/x.jsonl", "y.jsonl"], ["a/c/x", "b/c/x", "y"]),
        (["x.jsonl", "b/x.jsonl"], ["x", "b/x"]),
        (["a/x.jsonl", "a/x.json"], ["a/x.jsonl", "a/x.json"]),
        (["x.jsonl", "x.jsonl"], ["x", "x"]),
    ],
)
def test_sources_are_called_by_what_tells_them_apart(paths, names):
    found = short_names(paths)
    assert [found[path] for path in paths] == names


LISTS = (
    "safety_harming safety_promoting alternative_safety_harming alternative_safety_promoting "
    "detectors random_control carriers"
).split()


def test_every_listed_feature_that_fires_has_a_prompt(run, world, pairs):
    folder = run("--config.identify.method=head_weight", "--config.identify.examples=1")
    path = folder / "naming_prompts.jsonl"
    rows = read_jsonl(path, {"feature": int, "prompt": str})
    assert all(set(row) == {"feature", "prompt"} for row in rows)
    lists = ",".join(f"@{folder}/selected_features.json:{name}" for name in LISTS)
    listed = list(dict.fromkeys(parse_features("lists", lists)))
    texts = list(
        dict.fromkeys(
            (row["prompt"], row[side])
            for side in ("chosen", "rejected")
            for rows_of_file in pairs.values()
            for row in rows_of_file
        )
    )
    model = load_sarm(str(world / "sarm"), "float32")
    _, z = model.score(*zip(*texts, strict=True))
    fires = {i: int((z[:, i] > 0).sum()) for i in listed}
    assert 0 in fires.values()
    assert {row["feature"] for row in rows} == {i for i, count in fires.items() if count}
    for row in rows:
        i, prompt = row["feature"], row["prompt"]
        assert f"{fires[i]} of the {len(texts)} responses" in prompt
        assert len(re.findall(r"^--- .* activation", prompt, re.MULTILINE)) == min(10, fires[i])
        off = re.findall(r"^--- off, .*\nPrompt:\n> (.*)\nResponse:\n> (.*)$", prompt, re.MULTILINE)
        assert len(off) == len(set(off)) == min(3, len(texts) - fires[i])
        assert all(z[texts.index(text), i] <= 0 for text in off)
        _, best = texts[int(np.argmax(z[:, i]))]
        first = prompt[prompt.index("--- 1 of") : prompt.index("--- 1 of") + 200]
        assert f"> {best}\n" in first and f"activation {z[:, i].max():.4g} " in first
    assert "être" in path.read_text()  # as it is, not escaped


def test_naming_examples_are_as_many_as_asked_for_or_there_is_no_file(run):
    folder = run("--config.identify.naming_examples=2", "--config.identify.examples=3")
    rows = read_jsonl(folder / "naming_prompts.jsonl", {"feature": int, "prompt": str})
    assert max(row["prompt"].count(", activation ") for row in rows) == 2
    described = content(folder / "feature_analysis.json")["harming"]
    assert max(len(row["examples"]) for row in described) == 3
    run("--config.identify.naming_examples=0")
    assert not (folder / "naming_prompts.jsonl").exists()


def features_in(value) -> list[dict]:
    """Returns all objects with a feature, at any depth."""
    if isinstance(value, dict):
        own = [value] if "feature" in value else []
        return own + [item for inner in value.values() for item in features_in(inner)]
    return (
        [item for inner in value for item in features_in(inner)] if isinstance(value, list) else []
    )


def test_names_stand_beside_features_and_change_nothing_else(run, tmp_path):
    folder = run()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = {str(i): f"name of {i}" for i in range(64)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    run(f"--config.identify.feature_names={tmp_path / 'names.json'}")
    for name in ("feature_analysis.json", "naming_prompts.jsonl"):
        text = (folder / name).read_text()
        content = [json.loads(line) for line in text.split("\n") if name.endswith("l") and line]
        found = features_in(content or json.loads(text))
        assert len(found) > 5
        assert all(row["name"] == f"name of {row['feature']}" for row in found)
        assert "name of" not in "".join(row.get("prompt", "") for row in found)
        assert files.pop(name).decode() == re.sub(r'"name": "name of \d+",\s+', "", text)
    for name, before in files.items():  # among them selected_features.json, which runs depend on
        assert (folder / name).read_bytes() == before


def test_the_features_of_all_lists_have_pages(run, world, pairs):
    folder = run("--config.identify.examples=2")
    pages = content(folder / "feature_pages.json")
    selected = content(folder / "selected_features.json")
    roles = {row["feature"]: row["roles"] for row in pages["features"]}
    assert pages["latents"] == 64 and len(roles) == len(pages["features"])
    assert list(roles)[: len(selected["detectors"])] == selected["detectors"]
    for key, role in (("carriers", "carrier"), ("safety_harming", "harming")):
        assert [i for i in roles if role in roles[i]] and set(selected[key]) == {
            i for i in roles if role in roles[i]
        }
    analysis = content(folder / "feature_analysis.json")
    described = {row["feature"]: row for row in features_in(analysis["harming"]) if "tau" in row}
    for page in pages["features"]:
        row = described.get(page["feature"])
        if row:
            chosen, rejected = page["groups"]["chosen"], page["groups"]["rejected"]
            assert chosen["fires"] == pytest.approx(row["fires_chosen"])
            assert rejected["above_tau"] == pytest.approx(row["above_tau_rejected"])
            assert page["weight"] == row["head_weight"] and page["tau"] == row["tau"]
            assert [e["z"] for e in page["examples"]] == [e["z"] for e in row["examples"]]
            assert [n["feature"] for n in page["neighbours"]] == [
                n["feature"] for n in row["neighbours"]
            ]
