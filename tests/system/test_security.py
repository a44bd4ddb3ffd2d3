"""Untrusted files cannot run code, reach other files, or read the secrets of the user."""

import ast
import copy
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from conversion import cli, from_hf, load_policy, to_hf
from conversion.containment import contained
from conversion.load import load_hf_tokenizer
from pipeline.report.page import ReportConfig, write_report
from sarm_jax.io import secrets
from sarm_jax.io.errors import CUT, MAX_CHARACTERS, InputError, printable
from sarm_jax.io.progress import show_progress
from tests.command import run_main
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer
from tests.report_runs import write_run

SOURCES = [
    path
    for folder in ("sarm_jax", "ppo", "conversion", "configs", "pipeline")
    for path in sorted(Path(folder).rglob("*.py"))
] + [Path("main.py")]
RUNS_CODE = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "torch"}
CANARY = "hf_CANARYcanaryCANARYcanary0123456789"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_unpickles_or_executes_data(path):
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


def test_only_links_within_a_hub_snapshot_are_followed(tmp_path):
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


def test_an_export_does_not_copy_targets_of_links(tmp_path):
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


@pytest.fixture
def only_login(monkeypatch):
    """Sets a login stored by `hf auth login`, and no token in the environment."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: CANARY)
    secrets.collect()


def test_messages_are_one_printable_line():
    text = "a\n\tb /home/someone \x1b[2J \u202e"
    assert printable(text) == "a b /home/someone \\x1b[2J \\u202e"
    assert len(printable("x" * 10**6)) < 2100


def test_secrets_are_redacted_by_name(monkeypatch):
    key = "-----BEGIN KEY-----\nMIIEvQ\n-----END KEY-----\n"  # a message has it on one line
    values = {"HF_TOKEN": CANARY, "MY_API_KEY": CANARY[:9], "SECRET_FLAG": "true", "A_SECRET": key}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    secrets.collect()
    assert secrets.redact(f"{CANARY} {CANARY[:9]} true") == "[HF_TOKEN] [MY_API_KEY] true"
    assert secrets.redact(str(InputError(f"found {key}"))) == "found [A_SECRET]"
    assert secrets.redact(f"found {key}") == "found [A_SECRET]"


@pytest.mark.parametrize("kept", [12, len(CANARY) - 1])
def test_a_secret_that_a_long_message_cuts_is_redacted(only_login, kept):
    before = "x" * (MAX_CHARACTERS * 3 // 4 - kept)
    beginning = printable(before + CANARY + "y" * 10**4)
    assert CANARY[:kept] + CUT in beginning
    assert secrets.redact(beginning).startswith(f"{before}[HF_TOKEN]{CUT}y")
    after = "y" * (MAX_CHARACTERS // 4 - kept)
    end = printable("x" * 10**4 + CANARY + after)
    assert CUT + CANARY[-kept:] in end
    assert secrets.redact(end).endswith(f"x{CUT}[HF_TOKEN]{after}")


def test_an_error_reads_no_secrets(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("read a file"))
    assert str(InputError("a message")) == "a message"
    assert secrets.redact("a message") == "a message"


def test_the_token_is_in_no_output(tmp_path, monkeypatch, capfd, caplog):
    """Runs stages that succeed, that fail, and whose download fails with the token in the error."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY[::-1])

    def fail(*_, **__):
        raise OSError(f"401 for Authorization: Bearer {huggingface_hub.get_token()}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
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
        arguments = [workdir, prompts, *models, *command.split()]
        assert run_main("--config=configs/base.py", *arguments) == code, command
    output = capfd.readouterr()
    assert "[HF_TOKEN]" in output.err  # from the error of the failing download
    everything = [output.out, output.err, caplog.text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in files)
    everything += [path.read_bytes().decode("latin-1") for path in files]
    for text in everything:
        assert not re.search(CANARY, text) and CANARY[::-1] not in text


def test_a_stored_login_is_also_a_secret(only_login):
    assert secrets.redact(str(InputError(f"401 for {CANARY}"))) == "401 for [HF_TOKEN]"


@pytest.mark.parametrize("logger", ["ppo.train", "transformers", "huggingface_hub", "absl", "any"])
def test_no_log_line_of_any_logger_shows_a_secret(only_login, capfd, logger):
    show_progress()
    try:
        raise OSError(f"Bearer {CANARY}")
    except OSError:
        logging.getLogger(logger).warning("asked with %s", CANARY, exc_info=True)
    error = capfd.readouterr().err
    assert "asked with [HF_TOKEN]" in error and "OSError: Bearer [HF_TOKEN]" in error
    assert CANARY not in error


def test_an_unexpected_error_shows_no_secret_and_gives_advice():
    script = (
        "import os; from sarm_jax.io.progress import show_progress; show_progress()\n"
        "raise LookupError(os.environ['HF_TOKEN'])"
    )
    environment = os.environ | {"HF_TOKEN": CANARY}
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and CANARY not in done.stderr
    assert "LookupError: [HF_TOKEN]" in done.stderr and "please report it" in done.stderr


PLANTED = [  # other tools accept a token within an address
    f"--policy_model=https://user:{CANARY}@huggingface.co/owner/name",
    f"--prompts_jsonl={CANARY}.jsonl",
    f"--workdir=outputs/{CANARY}",
    f"--config.report.runs={CANARY}=a",
    f"--config.evaluate.rm_bench=hf://datasets/owner/name@{CANARY}/a.json",
    f"--stage={CANARY}",
    f"--{CANARY}=1",
]


@pytest.mark.parametrize("stage", ["train", "report", "all"])
@pytest.mark.parametrize("option", PLANTED)
def test_an_option_with_a_secret_is_refused(
    only_login, tmp_path, monkeypatch, capfd, option, stage
):
    arguments = [f"--config={Path('configs/base.py').resolve()}", f"--stage={stage}", option]
    refused(arguments, tmp_path, monkeypatch=monkeypatch, capfd=capfd)


def test_a_config_that_takes_a_secret_from_the_environment_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    config = tmp_path / "mine.py"
    config.write_text(
        "import os\nfrom configs import base\n\n\ndef get_config():\n"
        "    config = base.get_config()\n"
        "    config.train_sarm.model = 'https://' + os.environ['HF_TOKEN']\n    return config\n"
    )
    error = refused([f"--config={config}"], tmp_path / "run", monkeypatch=monkeypatch, capfd=capfd)
    assert "--config.train_sarm.model=https://[HF_TOKEN]" in error


def refused(arguments, folder, *, monkeypatch, capfd) -> str:
    """Runs main, which must exit with 2, show one line without the secret, and write nothing."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    assert run_main(*arguments) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "[HF_TOKEN]" in error and "holds a secret" in error
    assert CANARY not in error and not list(folder.iterdir())
    return error


def test_a_conversion_refuses_a_secret(only_login, tmp_path, capfd):
    options = ["--kind=policy", f"--src=https://{CANARY}@host/x", f"--dst={tmp_path}/new"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(from_hf.main, copy.deepcopy(from_hf.FLAGS), "", ["from_hf", *options])
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "[HF_TOKEN]" in error and CANARY not in error
    assert not list(tmp_path.iterdir())


def test_a_report_shows_no_secret_from_its_data(only_login, tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        path = run / name
        path.write_text(path.read_text().replace("second line", CANARY))
    assert CANARY in path.read_text()
    page = write_report(ReportConfig(str(run), 0), tmp_path).read_text()
    assert CANARY not in page and "[HF_TOKEN]" in page
