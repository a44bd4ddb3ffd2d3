"""From benchmark files to eval/*.json through the command line."""

import json

import numpy as np
import pytest

from conversion import load_sarm
from tests.command import run_main
from tests.oracles import save_tiny_sarm, tiny_tokenizer

STYLED = [
    {
        "prompt": f"name {n}",
        "chosen": [f"it is {n}.", f"it is {n} and no more.", f"**it** is {n} and no more."],
        "rejected": [f"it is {n}{n}.", f"it is {n}{n} and no more.", f"**it** is {n}{n} and more."],
        "domain": ("chat", "safety-refuse")[n % 2],
    }
    for n in range(8)
]
CHOICES = [
    {"id": str(n), "prompt": f"pick {n}", "chosen": [f"{n}"], "rejected": ["a", "bb", "ccc"]}
    | {"subset": ("Math", "Focus")[n % 2]}
    for n in range(4)
]
CHOICES += [
    {"id": f"{kind}:1", "prompt": kind, "chosen": right, "rejected": ["no"], "subset": "Ties"}
    for kind, right in (("ref", ["red"]), ("tied", ["red", "blue"]))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny SARM, benchmark files, and a steering file of two features that are ever active."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_sarm(root / "sarm", tiny_tokenizer())
    (root / "rm_bench.json").write_text(json.dumps(STYLED))
    (root / "rb2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    model = load_sarm(str(root / "sarm"), "float32")
    _, z = model.score([r["prompt"] for r in STYLED], [r["chosen"][0] for r in STYLED])
    first, second = np.argsort(-(z != 0).mean(axis=0))[:2].tolist()
    steering = {str(first): ["*", 0.0], str(second): ["+", 2.0]}
    (root / "steering.json").write_text(json.dumps(steering))
    return root


@pytest.fixture
def run(world, tmp_path):
    """Runs `main` with the tiny SARM; returns its exit code."""

    def call(*options: str) -> int:
        given = [f"--workdir={tmp_path / 'run'}", f"--sarm_model={world / 'sarm'}"]
        return run_main("--config=configs/base.py", *given, *options)

    return call


def test_from_benchmark_files_to_results(world, run, tmp_path, capsys):
    prepare = ["--stage=prepare_data", "--config.prepare_data.source=benchmarks"]
    rm_bench = f"rm_bench={world}/rm_bench.json"
    data, folder = tmp_path / "run" / "data", tmp_path / "run" / "eval"
    assert run(*prepare, f"--config.prepare_data.{rm_bench}") == 0
    assert not (data / "test_concise.jsonl").exists() and (data / "verbosity.jsonl").exists()
    held = "--config.prepare_data.held_out_fraction=0.5"
    rb2 = f"rewardbench2={world}/rb2.jsonl"
    options = [f"--config.prepare_data.{rm_bench}", f"--config.prepare_data.{rb2}", held]
    assert run(*prepare, *options) == 0
    assert f"{world}/rb2.jsonl" in capsys.readouterr().out
    summary = json.loads((data / "data_summary.json").read_text())
    for name, count in summary["outputs"].items():
        assert len((data / f"{name}.jsonl").read_text().splitlines()) == count
    assert sorted(p.stem for p in data.glob("*.jsonl")) == sorted(summary["outputs"])
    assert run(
        "--stage=evaluate",
        f"--config.evaluate.steering_json={world}/steering.json",
        f"--config.evaluate.data_jsonl={data}/test_concise.jsonl,{data}/test_detailed.jsonl",
        "--config.evaluate.steering_targets=detailed",
        "--config.evaluate.num_example=5",
        f"--config.evaluate.{rm_bench}",
        f"--config.evaluate.{rb2}",
        "--penalize_features=1,2",
        "--tau_values=0.0,0.0",
        "--alpha_values=0.5,0.25",
    ) == 0  # fmt: skip
    steering = json.loads((folder / "steering.json").read_text())
    assert set(steering["sets"]) == {"concise", "detailed"}
    rows = (folder / "steering_rows.jsonl").read_text().splitlines()
    assert len(rows) == sum(part["responses"] for part in steering["sets"].values()) <= 10
    assert 0 <= steering["specificity"]["mean"] <= 1
    variants = {"plain", "controlled", "penalised"}
    for name in ("rm_bench", "rewardbench2"):
        found = json.loads((folder / f"{name}.json").read_text())
        assert set(found["variants"]) == variants
        assert set(found["change"]) == variants - {"plain"}
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"steering_1.png", "steering_2.png", "rm_bench.png", "rewardbench2.png"}


def test_all_prepares_benchmarks_once(run, world, capsys, tmp_path):
    options = ["--stage=all", "--config.prepare_data.source=benchmarks"]
    options.append(f"--config.prepare_data.rm_bench={world}/rm_bench.json")
    summary = tmp_path / "run" / "data" / "data_summary.json"
    run(*options)
    assert "rm_bench.json" in capsys.readouterr().out
    written = summary.stat().st_mtime_ns
    run(*options)
    assert summary.stat().st_mtime_ns == written
