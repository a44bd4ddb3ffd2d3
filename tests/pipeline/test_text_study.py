"""The study of a task in English, in miniature: a tiny chat model, a task file, all stages."""

import json
import re

import numpy as np
import pytest

from tests.command import run_main

pytestmark = pytest.mark.slow

TASK = """
from sarm_jax.lab.text.shortcuts import english_shortcuts
from sarm_jax.lab.text.task import TextTask

TASK = TextTask(
    name="letters",
    description="A prompt asks for letters & numbers.",
    prompts=lambda rng: [f"letter {i}" for i in rng.permutation(12)],
    quality=lambda prompt, response: float(len(response) % 2),
    spoil=lambda rng, prompt, response: response[:-1],
    all_shortcuts=english_shortcuts(free_words=10),
)
"""
OPTIONS = (
    "lab.prompts=8 lab.held_out_prompts=4 lab.pairs=60 lab.contrast_pairs=24 lab.tuning_steps=2 "
    "lab.batch_size=4 lab.told_shortcuts=rotating:2 lab.seeds=1 lab.ignore_failed_gates=True "
    "lab.conditions=baseline,probe,penalty,untold lab.pool_responses=4 lab.pool_prompts=2 "
    "lab.ranked_conditions=oracle prepare_data.max_new_tokens=40 ppo.max_new_tokens=12 "
    "prepare_data.samples_per_prompt=16 "
    "train_sarm.source_layer=1 train_sarm.latent_size=32 train_sarm.k=4 train_sarm.aux_k=4 "
    "train_sarm.sae_steps=20 train_sarm.epochs=3 train_sarm.held_out_fraction=0.2 "
    "ppo.total_steps=2 ppo.batch_size=8 ppo.eval_every=2 ppo.eval_batches=1 "
    "ppo.calibration_batches=1 ppo.max_prompt_tokens=80 ppo.pack_levels=0 lora.rank=2"
).split()


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    """(The directory of a study of seed 1, what runs it again with further options)."""
    root = tmp_path_factory.mktemp("text")
    (root / "letters.py").write_text(TASK)

    def call(*more: str) -> int:
        given = [
            f"lab.task={root}/letters.py",
            f"lab.base_model={world}/policy",
            *OPTIONS,
            *more,
        ]
        return run_main(
            "--config=configs/smollm2_task.py",
            "--stage=all",
            f"--workdir={root}/study",
            *(f"--config.{option}" for option in given),
        )

    assert call() == 0
    return root / "study", call


def test_the_page_and_its_numbers(study):
    workdir, _ = study
    content = json.loads((workdir / "lab.json").read_text())
    assert list(content["conditions"]) == ["baseline", "probe", "penalty", "untold"]
    assert set(content["gates"]) == {
        "success_at_start",
        "failure_at_start",
        "truth_auroc",
        "accuracy_equal_shortcuts",
        "least_bonus",
    }
    (run,) = content["conditions"]["penalty"]
    point = run["curve"][-1]
    assert {"quality", "success", "words", "told", "untold", "rate_emoji"} <= point.keys()
    assert "flattery" not in point and all(np.isfinite(value) for value in point.values())
    texts = [claim["text"] for claim in content["claims"]]
    assert not any("2.5 sd" in text for text in texts)  # a claim about the world of capitals
    assert any("untold ends" in text for text in texts)
    assert {row["condition"] for row in content["best_of_n"]["rankings"]} == {
        "baseline",
        "probe",
        "penalty",
        "untold",
        "oracle",
    }
    page = (workdir / "lab.html").read_text()
    assert "letters &amp; numbers" in page and "capitals" not in page
    assert re.search(r"told of hedging, praise", page)


def test_a_pool_alone_is_ranked_without_training_a_policy(study, capsys):
    workdir, call = study
    conditions = "baseline,penalty,untold,ties"
    ranked = ("lab.conditions=", f"lab.ranked_conditions={conditions}", "lab.pool_responses=5")
    assert call(*ranked, "lab.seeds=1") == 0
    assert "No policy was trained" in capsys.readouterr().out
    content = json.loads((workdir / "lab.json").read_text())
    assert content["conditions"] == {} and not content["stopped"]
    assert {row["condition"] for row in content["best_of_n"]["rankings"]} == set(
        conditions.split(",")
    )
    assert len(content["conclusion"]) == 3  # the penalty against the three others
    assert (workdir / "seed_1/ties/sarm").is_dir()
    page = (workdir / "lab.html").read_text()
    assert "best of the largest n" in page and "Gold reward by condition" not in page


def test_the_policy_is_another_one_than_the_base_model(study, world):
    workdir, _ = study
    rows = [
        json.loads(line)
        for line in (workdir / "seed_1/data/demonstrations.jsonl").read_text().splitlines()
    ]
    assert rows and all(row["response"] for row in rows)
    tuned, base = (
        (folder / "model.safetensors").read_bytes()
        for folder in (workdir / "seed_1/policy", world / "policy")
    )
    assert tuned != base


def test_the_untold_condition_bounds_every_feature(study):
    workdir, _ = study
    bound = json.loads((workdir / "seed_1/probes/untold.json").read_text())
    assert bound["features"] == list(range(32)) and len(bound["tau"]) == 32
    config = json.loads((workdir / "seed_1/untold/config.json").read_text())
    assert config["reward"]["penalty_cap"] == 4.0
    assert set(config["reward"]["alpha_values"].split(",")) == {"0.125"}


def test_a_task_whose_file_changed_is_prepared_again(study, capsys):
    workdir, call = study
    before = (workdir / "seed_1/policy/model.safetensors").stat().st_mtime_ns
    assert call() == 0  # nothing is done again
    assert (workdir / "seed_1/policy/model.safetensors").stat().st_mtime_ns == before
    record = json.loads((workdir / "seed_1/study.json").read_text())
    assert len(record["options"]["task_file"]) == 64  # pages leave out seeds of another file
    path = workdir.parent / "letters.py"
    path.write_text(TASK.replace("% 2", "% 3 > 0"))
    assert call() == 2
    assert "task_file" in capsys.readouterr().err
    path.write_text(TASK)
