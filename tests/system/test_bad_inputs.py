"""Every row of the table of bad inputs, through the real commands, in this process.

Each command must exit with code 2 within seconds and print one line on stderr that names the bad
input. It must not load a weight, and must not create or change a file.
"""

import contextlib
import copy
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from flax import nnx

import conversion.load
from conversion import cli, from_hf, load_policy, to_hf
from conversion.converted import save_with_sae
from conversion.peft import save_adapter
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.models.sae import SAE, SAEConfig
from tests.bad_inputs import BAD_INPUTS, TRAINED, BadInput
from tests.command import run_main
from tests.oracles import (
    save_tiny_classifier,
    save_tiny_llama,
    save_tiny_sarm,
    tiny_llama_config,
    tiny_tokenizer,
)
from tests.report_runs import write_run

pytestmark = pytest.mark.slow

BASE = Path("configs/base.py").resolve()
MAX_SECONDS = 10  # duration of a refusal; nearly all take a tenth of a second
SMALL = "--config.ppo.total_steps=2 --config.ppo.batch_size=4 --config.ppo.max_new_tokens=6"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a directory whose subdirectory world holds the good models and data."""
    root = tmp_path_factory.mktemp("root")
    world, tokenizer = root / "world", tiny_tokenizer()
    save_tiny_llama(world / "policy", tiny_llama_config(), tokenizer)
    save_tiny_llama(world / "sharded", tiny_llama_config(), tokenizer, max_shard_size="60KB")
    save_tiny_sarm(world / "sarm", tokenizer)
    save_tiny_classifier(world / "classifier", tiny_llama_config(), tokenizer)
    sae = SAE(SAEConfig(32, latent_size=64, k=8), rngs=nnx.Rngs(0))
    save_with_sae(world / "classifier", world / "reward", sae)
    from_hf.convert(world / "policy", world / "ours", "policy")
    policy, _ = load_policy(world / "policy")
    lora = LoRAConfig(rank=2)
    add_lora(policy, lora, nnx.Rngs(0))
    save_adapter(world / "adapter", policy, lora, str(world / "policy"), tokenizer)
    write_run(world / "run")
    demos = [{"prompt": f"name {n}", "response": f"it is {n}"} for n in range(8)]
    write_rows(world / "demos.jsonl", demos)
    pairs = [{"prompt": d["prompt"], "chosen": d["response"], "rejected": "no"} for d in demos]
    write_rows(world / "pairs.jsonl", pairs)
    talk = [{"role": "system", "content": "brief"}, {"role": "user", "content": "name 9"}]
    write_rows(world / "talks.jsonl", [*demos, {"prompt": talk, "response": "it is 9"}])
    write_rows(world / "answers.jsonl", [{"question": "q", "answer": "a"}])
    save_tiny_llama(world / "wide", tiny_llama_config(hidden_size=64), tokenizer)
    train_in(world / "trained", world)
    return root


def train_in(folder: Path, world: Path) -> None:
    """Makes a finished run in folder/run, with copies of its models and data beside it."""
    for name in ("policy", "sarm"):
        shutil.copytree(world / name, folder / name)
    shutil.copy(world / "demos.jsonl", folder)
    with contextlib.chdir(folder):
        assert run_main(f"--config={BASE}", *SMALL.split(), *TRAINED.split()) == 0
    assert (folder / "run" / "checkpoints" / "2").is_dir()


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fingerprint(root: Path) -> dict[str, str]:
    """Returns every path below `root` with the hash of its content, or the target of a link."""
    digests = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            digests[name] = f"→ {path.readlink()}"
        elif path.is_file():
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            digests[name] = "directory"
    return digests


def run(case: BadInput, options: list[str], root: Path) -> int:
    """Runs the command and returns its exit code."""
    if case.command != "main":
        module = {"from_hf": from_hf, "to_hf": to_hf}[case.command]
        with pytest.raises(SystemExit) as stopped:
            cli.run(module.main, copy.deepcopy(module.FLAGS), "", [case.command, *options])
        return stopped.value.code
    world = root / "world"
    arguments = {
        "--config": f"--config={BASE}",
        "--workdir": f"--workdir={root / 'out' / 'put'}",
        "--policy_model": f"--policy_model={world / 'policy'}",
        "--sarm_model": f"--sarm_model={world / 'sarm'}",
        "--prompts_jsonl": f"--prompts_jsonl={world / 'demos.jsonl'}",
    }
    others = []
    for option in options:
        name = option.split("=")[0]
        if name in arguments:
            arguments[name] = option
        else:
            others.append(option)
    return run_main(*arguments.values(), *SMALL.split(), *others)


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input_is_refused(case, root, tmp_path_factory, monkeypatch, capfd):
    folder = root / "cases" / str(BAD_INPUTS.index(case))
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    bad = case.damage(root / "world", folder) if case.damage else folder
    if not case.loads:
        monkeypatch.setattr(
            conversion.load, "_fill", lambda *_, **__: pytest.fail("weights are loaded")
        )
    names = {"{bad}": str(bad), "{world}": str(root / "world")}

    def fill_in(text: str) -> str:
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    before, start = fingerprint(root), time.monotonic()
    capfd.readouterr()
    code = run(case, [fill_in(option) for option in case.options.split()], root)
    shown, seconds = capfd.readouterr(), time.monotonic() - start
    assert code == 2, shown
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert shown.err.strip().isprintable() and len(shown.err) < 2500
    for message in case.messages:
        assert fill_in(message) in shown.err
    assert fingerprint(root) == before
    shutil.rmtree(folder)  # otherwise every case would hash the files of earlier cases
    assert seconds < MAX_SECONDS


def test_the_table_is_long_and_has_no_duplicates():
    assert len(BAD_INPUTS) >= 300
    assert len({(case.command, case.options, case.name) for case in BAD_INPUTS}) == len(BAD_INPUTS)
