"""The reference implementation's command lines, and what they come to here."""

import re
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from configs import base
from pipeline import cli as command_line
from pipeline import reference_flags
from pipeline.stages.train import describe_batch
from ppo.config import PPOConfig
from sarm_jax.io.errors import InputError
from tests.reference_flags import OTHER_FLAGS, PPO_FLAGS

COMMAND = [
    "main.py", "--config=configs/full_method.py",
    "--policy_model", "meta-llama/Llama-3.1-8B-Instruct",
    "--sarm_model", "Schrieffer/Llama-SARM-4B",
    "--prompts_jsonl", "data/train/prompts.jsonl",
    "--output_dir", "outputs/ppo_run",
    "--penalize_features", "48659,28879,26446",
    "--tau_values", "3.0,3.0,3.0",
    "--alpha_values", "0.1,0.1,0.1",
    "--batch_size", "2",
    "--gradient_accumulation_steps", "4",
    "--total_steps", "100",
    "--lora_r", "16",
    "--lora_alpha", "32",
]  # fmt: skip


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line in a set of flags of its own."""

    def parse_all(argv):
        monkeypatch.setattr(sys, "argv", list(argv))  # overrides of the config are read from there
        found = command_line.parse(list(argv))
        flags.FLAGS.unparse_flags()
        for name in list(flags.FLAGS):
            if name in (*PPO_FLAGS, "workdir", "stage"):
                flags.FLAGS[name].unparse()
            elif name.startswith("config."):  # defined by each parse
                delattr(flags.FLAGS, name)
        return found

    return parse_all


@pytest.fixture
def ppo(parsed):
    """The options of PPO that arguments come to."""

    def make(*arguments):
        config, _, _ = parsed(["main.py", "--config=configs/base.py", *arguments])
        return PPOConfig(**config.ppo)

    return make


def test_the_command_of_the_references_readme(parsed):
    config, stage, workdir = parsed(COMMAND)
    assert stage == "train" and str(workdir) == "outputs/ppo_run"
    assert config.prompts_jsonl == "data/train/prompts.jsonl"
    assert config.reward.penalize_features == "48659,28879,26446"
    assert (config.ppo.batch_size, config.ppo.gradient_accumulation_steps) == (8, 4)
    assert (config.lora.rank, config.lora.alpha, config.ppo.total_steps) == (16, 32.0, 100)


@pytest.mark.parametrize("name", sorted({*PPO_FLAGS, *OTHER_FLAGS}))
def test_every_flag_is_taken_or_named_with_what_replaces_it(name):
    assert (name in flags.FLAGS) != (reference_flags.replacement(name) is not None)
    if name in PPO_FLAGS:
        assert name in flags.FLAGS


def test_replacements_name_options_and_flags_that_exist():
    config = base.get_config()
    for name, text in reference_flags.REPLACED.items():
        for field in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text):
            value = config
            for part in field.split("."):
                assert part in value, f"{name}: {field}"
                value = value[part] if isinstance(value, ConfigDict) else None
        for flag in re.findall(r"--([a-z_]+)(?![a-z_.])", text):
            assert flag == "config" or flag in flags.FLAGS, f"{name}: --{flag}"


@pytest.mark.parametrize(
    "arguments, batch, pieces",
    [
        ((), 8, 1),  # the config's own
        (("--batch_size=2",), 2, 1),
        (("--batch_size=2", "--gradient_accumulation_steps=4"), 8, 4),
        (("--gradient_accumulation_steps=4",), 8, 4),  # the config's batch, cut in four
        (("--batch_size=2", "--config.mesh.data=4"), 8, 1),
        (("--batch_size=2", "--config.mesh.data=2", "--config.mesh.fsdp=2"), 8, 1),
        (("--batch_size=2", "--config.mesh.tensor=4"), 2, 1),
        (("--batch_size=3", "--config.ppo.num_minibatches=2"), 6, 1),
        (("--batch_size=2", "--config.ppo.gradient_accumulation_steps=4"), 8, 4),
        (("--config.ppo.batch_size=16", "--gradient_accumulation_steps=4"), 16, 4),
    ],
)
def test_the_batch_is_counted_per_device(ppo, parsed, arguments, batch, pieces):
    found = ppo(*arguments)
    assert (found.batch_size, found.gradient_accumulation_steps) == (batch, pieces)
    if "--batch_size=2" in arguments:  # rows of a microbatch on a device
        config, _, _ = parsed(["main.py", "--config=configs/base.py", *arguments])
        assert found.batch_size // (found.pieces * config.mesh.data * config.mesh.fsdp) == 2


def test_the_first_line_says_how_many_responses_a_step_has(ppo):
    found = ppo("--batch_size=2", "--gradient_accumulation_steps=4", "--config.mesh.data=4")
    assert describe_batch(found, 4) == (
        "32 responses (2 on a device × 4 accumulated × 4 data-parallel devices)"
    )
    assert describe_batch(ppo(), 1) == "8 responses (8 on a device)"


def test_output_dir_is_workdir(parsed):
    assert str(parsed(["main.py", "--config=configs/base.py", "--output_dir=a/b"])[2]) == "a/b"


def test_the_same_directory_under_both_names(parsed):
    arguments = ["--output_dir=a/b", "--workdir=a/b/"]
    assert str(parsed(["main.py", "--config=configs/base.py", *arguments])[2]) == "a/b"


def test_a_flag_of_another_script_names_the_option(parsed):
    with pytest.raises(
        InputError, match=r"^--num_example is not taken: --config\.evaluate\.num_ex"
    ):
        parsed(["main.py", "--config=configs/base.py", "--num_example", "400"])


def test_help_lists_them():
    done = subprocess.run(
        [sys.executable, "main.py", "--help"], capture_output=True, text=True, check=True
    )
    for name in PPO_FLAGS:
        assert f"--{name}" in done.stdout or f"--[no]{name}" in done.stdout
