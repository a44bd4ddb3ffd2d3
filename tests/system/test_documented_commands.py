"""Every command of README and the quickstart is run, with models and numbers that are small.

`tests/pipeline/test_study.py` runs `make demo` and `make study` in miniature. Continuous
integration itself sets up `.venv` as the first pages do.
"""

import copy
import json
import shutil

import pytest

from conversion import cli, load_policy, to_hf
from ppo.tracking.metrics_csv import read_metrics
from tests.command import run_main
from tests.documented_commands import FIRST_PAGES, lines_of, main_options, recipe
from tests.oracles import save_tiny_llama, tiny_llama_config, tiny_tokenizer
from tests.paths import ROOT

pytestmark = pytest.mark.slow

SET_UP = (
    "python3 -m venv .venv",
    "pip install",
    ".venv/bin/pip install",
    ". .venv/bin/activate",
    "make",
)
HERE = {
    "python main.py --help",
    "make smollm2",
    "python main.py --config=configs/mine.py --stage=all",
    "python main.py --config=configs/full_method.py --config.ppo.total_steps=20 "
    "--alpha_values=0.1,0.1,0.1",
}
IN_TEST_STUDY = {
    "make demo",
    "make study",
    "python main.py --config=configs/demo.py --stage=report --workdir=outputs/compared "
    "--config.report.runs=outputs/demo/seed_0/baseline,outputs/demo/seed_0/full",
}
SMALL = (
    "prepare_data.samples_per_prompt=1 prepare_data.max_new_tokens=4 train_sarm.source_layer=2 "
    "train_sarm.latent_size=64 train_sarm.k=8 train_sarm.aux_k=8 train_sarm.sae_steps=20 "
    "train_sarm.sae_batch_tokens=32 train_sarm.epochs=1 identify.resamples=100 "
    "ppo.total_steps=2 ppo.batch_size=4 ppo.max_new_tokens=4 ppo.calibration_batches=2 "
    "ppo.max_prompt_tokens=200 evaluate.resamples=100 lora.rank=2"
).split()


def test_every_command_of_the_first_pages_is_run():
    for page in FIRST_PAGES:
        lines = lines_of(page)
        assert lines
        for line in lines:
            if not line.startswith(SET_UP[:-1]) and line != "make":
                assert line in HERE | IN_TEST_STUDY, f"{page}: {line}"


def test_help(capsys):
    assert run_main("--help") == 0
    assert "--config" in capsys.readouterr().out


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Returns the root of a run of a copy of configs/smollm2.py whose models are tiny."""
    root = tmp_path_factory.mktemp("mine")
    config = tiny_llama_config()
    save_tiny_llama(root / "policy", config, tiny_tokenizer())
    for name in ("everyday_demos", "everyday_held_out"):
        rows = (ROOT / "configs" / "data" / f"{name}.jsonl").read_text().splitlines()[:6]
        (root / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    text = (ROOT / "configs" / "smollm2.py").read_text(encoding="utf-8")
    text = text.replace("outputs/models/SmolLM2-135M-Instruct", str(root / "policy"))
    (root / "mine.py").write_text(text.replace("configs/data/", f"{root}/"))
    options = [f"--config.{option}" for option in SMALL]
    words = main_options("smollm2")
    assert words == ["--config=configs/smollm2.py", "--stage=all"]
    words = [words[0].replace("configs/smollm2.py", str(root / "mine.py")), *words[1:]]
    assert run_main(*words, f"--workdir={root / 'run'}", *options) == 0
    return root


def test_a_config_of_ones_own_from_a_model_to_a_report(mine):
    run = mine / "run"
    for name in ("sarm", "adapter", "report.html", "eval/policy.json", "human_latents.safetensors"):
        assert (run / name).exists(), name
    assert len(read_metrics(run / "metrics.csv")) == 2
    export = recipe("smollm2")[1]
    assert export[:2] == ["-m", "conversion.to_hf"]
    words = [word.replace("outputs/smollm2", str(run)) for word in export[2:]]
    cli.run(to_hf.main, copy.deepcopy(to_hf.FLAGS), "", ["to_hf", *words])
    merged, _ = load_policy(run / "merged")
    assert merged.config == load_policy(mine / "policy")[0].config


def test_the_full_method(mine, tmp_path):
    """As README has it; the models, their features and the number of steps are small."""
    (line,) = (line for line in lines_of("README.md") if "full_method" in line)
    selected = f"@{mine}/run/probes/selected_features.json"
    small = [
        *(f"--config.{option}" for option in SMALL if option.startswith(("ppo", "lora"))),
        "--config.dtype=float32",
        "--config.mesh.tensor=1",
        f"--policy_model={mine}/policy",
        f"--sarm_model={mine}/run/sarm",
        f"--prompts_jsonl={mine}/everyday_demos.jsonl",
        f"--human_latents={mine}/run/human_latents.safetensors",
        f"--penalize_features={selected}:safety_harming[:3]",
        f"--latent_indices={selected}:safety_promoting",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert run_main(*line.split()[2:], *small) == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())
    assert options["reward"]["alpha_values"] == "0.1,0.1,0.1"
    shutil.rmtree(tmp_path / "run")
