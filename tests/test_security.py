"""What is not trusted cannot do: run code, reach other files, or read the secrets of the user."""

import ast
import json
import logging
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
from absl.testing import flagsaver

import main
from conversion import load_policy, to_hf
from conversion.containment import contained
from conversion.load import load_hf_tokenizer
from sarm_jax.errors import InputError, printable
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer
from tests.report_runs import write_run

SOURCES = [
    path
    for folder in ("sarm_jax", "ppo", "conversion", "configs")
    for path in sorted(Path(folder).rglob("*.py"))
] + [Path("main.py")]
RUNS_CODE = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "torch"}
CANARY = "hf_CANARYcanaryCANARYcanary0123456789"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_unpickles_or_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not RUNS_CODE & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in RUNS_CODE
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__", "os.system", "np.load", "yaml.load")
            for keyword in node.keywords:
                unsafe = keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                assert not unsafe or ast.unparse(keyword.value) == "False"


def test_code_in_a_model_directory_is_not_run(tmp_path):
    save_tiny_llama(tmp_path / "model", tiny_llama_config(), tiny_tokenizer())
    for name in ("tokenization_evil", "modeling_evil"):
        (tmp_path / "model" / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
        )
    path = tmp_path / "model" / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    try:
        load_hf_tokenizer(tmp_path / "model")
    except InputError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_the_hubs_own_links_are_followed_and_no_others(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    save_tiny_llama(snapshot, tiny_llama_config(), tiny_tokenizer())
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    policy, _ = load_policy(snapshot)
    assert policy.config.hidden_size == 32
    (tmp_path / "secret").write_text("secret")
    for number, target in enumerate([tmp_path / "secret", Path("../../../secret"), "/etc/passwd"]):
        link = snapshot / f"link{number}"
        link.symlink_to(target)
        with pytest.raises(InputError, match="leads out of its directory"):
            contained(snapshot, link.name)
    (snapshot / "loop").symlink_to("loop")
    with pytest.raises(InputError):
        contained(snapshot, "../../../secret")
    with pytest.raises(InputError, match="leads out"):
        load_policy(snapshot)


def test_an_export_does_not_copy_what_links_point_to(tmp_path):
    (tmp_path / "token").write_text(CANARY)
    (tmp_path / "adapter").mkdir()
    save_tiny_llama(tmp_path / "base", tiny_llama_config(), tiny_tokenizer())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    (tmp_path / "adapter" / "README.md").symlink_to(tmp_path / "token")
    with pytest.raises(InputError, match=r"README\.md: leads out of its directory"):
        to_hf.export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_messages_are_one_printable_line_without_secrets():
    environment = {"HF_TOKEN": CANARY, "MY_API_KEY": "abcdefgh1", "HOME": "/home/someone"}
    text = f"a\n\tb {CANARY} abcdefgh1 /home/someone \x1b[2J \u202e"
    assert printable(text, environment) == (
        "a b [HF_TOKEN] [MY_API_KEY] /home/someone \\x1b[2J \\u202e"
    )
    assert len(printable("x" * 10**6, {})) < 2100


def test_the_token_is_in_no_output(tmp_path, monkeypatch, capfd, caplog):
    """Stages that succeed, that fail, and whose download fails with the token in the message."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY[::-1])

    def fails(*_, **__):
        raise OSError(f"401 for Authorization: Bearer {huggingface_hub.get_token()}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    caplog.set_level(logging.DEBUG)
    save_tiny_llama(tmp_path / "policy", tiny_llama_config(), tiny_tokenizer())
    save_tiny_sarm(tmp_path / "sarm", tiny_tokenizer())
    write_run(tmp_path / "run", steps=3)
    demos = [{"prompt": f"p {n}", "response": "r"} for n in range(3)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    models = [f"--policy_model={tmp_path}/policy", f"--sarm_model={tmp_path}/sarm"]
    hub = "hf://datasets/owner/name/file.json"
    commands = {
        "--policy_model=owner/name": 2,
        f"--stage=evaluate --config.evaluate.rm_bench={hub}": 2,
        f"--stage=human_latents --config.human_latents.demos_jsonl={tmp_path}/demos.jsonl": 0,
        f"--stage=report --config.report.runs={tmp_path}/run": 0,
        "--stage=train --config.reward.human_latents=none --beta=1": 2,
    }
    for number, (command, code) in enumerate(commands.items()):
        workdir = f"--workdir={tmp_path}/out{number}"
        prompts = f"--prompts_jsonl={tmp_path}/demos.jsonl"
        argv = ["main.py", "--config=configs/base.py", workdir, prompts, *models, *command.split()]
        monkeypatch.setattr(sys, "argv", argv)
        with flagsaver.flagsaver():
            assert main.main(argv) == code, command
    shown = capfd.readouterr()
    assert "[HF_TOKEN]" in shown.err  # it was in the message of the failing download
    everything = [shown.out, shown.err, caplog.text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in files)
    everything += [path.read_bytes().decode("latin-1") for path in files]
    for text in everything:
        assert not re.search(CANARY, text) and CANARY[::-1] not in text
