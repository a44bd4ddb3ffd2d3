"""Ordinary mistakes in a config file: exit code 2 and one plain line that says where and what."""

import os
import sys

import pytest

from pipeline.config_file import ConfigFileError, load, split_argument
from tests.command import run_main

START = "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n"
END = "    return c\n"


def changed(*lines: str) -> str:
    """Returns a config file that changes the defaults; the first change is on line 6."""
    return START + "".join(f"    {line}\n" for line in lines) + END


RAISES = (
    "class Bad({kind}):\n    def __str__(self):\n        {does}\n\n\n"
    "def get_config():\n    raise Bad\n"
)
IGNORE = "with c.unlocked(), c.ignore_type(): "
MISTAKES = {  # content → what the line says
    # a value of another type
    changed('c.ppo.total_steps = "2"'): (":6: TypeError", "total_steps", 'c.ppo.total_steps = "2"'),
    changed('c.ppo["learning_rate"] = "fast"'): (
        ":6: TypeError",
        'c.ppo["learning_rate"] = "fast"',
    ),
    changed("c.ppo.seed = 1.5"): (":6: TypeError", "c.ppo.seed = 1.5"),
    changed("c.ppo.seed = (1,)"): (":6: TypeError", "c.ppo.seed = (1,)"),
    changed("c.ppo.seed = print"): (":6: TypeError", "c.ppo.seed = print"),
    changed("c.ppo.seed = c.get_ref('dtype')"): (":6: TypeError", "get_ref('dtype')"),
    changed("import numpy", "c.ppo.seed = numpy.int64(3)"): (":7: TypeError", "numpy.int64(3)"),
    changed("c.ppo = 3"): (":6: TypeError", "c.ppo = 3"),
    changed("c.dtype = 16"): (":6: TypeError", "c.dtype = 16"),
    changed("c.ppo.gamma = 10**400"): (":6: OverflowError", "c.ppo.gamma = 10**400"),
    changed("c.ppo.seed = True"): ("ppo.seed=True: expected int",),
    changed(IGNORE + "c.ppo.seed = '2'"): ("ppo.seed='2': expected int",),
    changed(IGNORE + "c.ppo = {'seed': 1}"): ("ppo.algorithm is missing",),
    changed(IGNORE + "c.probe.set_value = 'x'"): ("probe.set_value='x': expected float",),
    changed("c.update({'ppo': {'seed': 10**5000}})"): ("ppo.seed=<int of 16610 bits>: must be at",),
    # None, a field deleted or added
    changed("c.ppo.total_steps = None"): ("ppo.total_steps=None: expected int",),
    changed("c.ppo = None"): ("ppo=None: expected options",),
    changed("c.reward.alpha_values = None"): ("reward.alpha_values=None: expected str",),
    changed("del c.ppo.seed"): (":6: ", "del c.ppo.seed"),
    changed("with c.unlocked(): del c.ppo['seed']"): ("ppo.seed is missing",),
    changed("with c.unlocked(): del c['ppo']"): ("ppo is missing",),
    changed("with c.unlocked(): del c['dtype']"): ("dtype is missing",),
    changed("c.ppo.sed = 1"): (":6: AttributeError", "c.ppo.sed = 1"),
    changed("with c.unlocked(): c.ppo.sed = 1"): (
        "ppo.sed: no such option (did you mean ppo.seed?)",
    ),
    changed("with c.unlocked(): c.f = lambda: 0"): ("f: no such option",),
    changed("with c.unlocked(): c[3] = 0"): ("the config: the name of an option must be a text",),
    changed("with c.unlocked(): c.experiments = 3"): (":6: TypeError", "c.experiments = 3"),
    changed("with c.unlocked(): c.experiments[3] = {}"): ("experiments: the name of an option",),
    # references
    changed("c.ppo.seed = c.get_ref('sarm_batch_size') // 0"): (":6: ZeroDivisionError",),
    changed(
        "c.ppo.seed = c.ppo.get_ref('total_steps') // c.ppo.get_ref('eval_batches')",
        "c.ppo.eval_batches = 0",
    ): ("ppo.seed: has no value (ZeroDivisionError",),
    changed(
        "from ml_collections.config_dict import required_placeholder",
        "c.policy_model = required_placeholder(str)",
    ): ("policy_model: has no value (RequiredValueError",),
    changed("c.ppo.seed = c.get_ref('sarm_batch_size') * 2**31"): (
        "ppo.seed=34359738368: must be",
    ),
    # another result
    "def get_config():\n    return {'ppo': 1}\n": ("must return a ConfigDict, not a dict",),
    "def get_config():\n    return None\n": ("must return a ConfigDict, not a NoneType",),
    "def get_config():\n    yield\n": ("must return a ConfigDict, not a generator",),
    "from ml_collections import *\nget_config = lambda: FrozenConfigDict()\n": (
        "not a FrozenConfig",
    ),
    "from ml_collections import *\nget_config = ConfigDict\n": ("checkpoint is missing",),
    "get_config = 3\n": ("its get_config must be a function",),
    "def get_config(variant):\n    pass\n": ("needs an argument",),
    "x = 1\n": ("has no attribute 'get_config'",),
    "": ("has no attribute 'get_config'",),
    # programs that end, and exceptions of every kind
    "import sys\nsys.exit(0)\n": (":2: SystemExit: 0 (in: sys.exit(0))",),
    "def get_config():\n    exit()\n": (":2: SystemExit: None (in: exit())",),
    "def get_config():\n    raise SystemExit('x')\n": (":2: SystemExit: x",),
    "def get_config():\n    raise BaseException('x')\n": (":2: BaseException: x",),
    "def get_config():\n    raise GeneratorExit\n": (":2: GeneratorExit",),
    "def get_config():\n    get_config()\n": (":2: RecursionError",),
    "def get_config():\n    raise OSError(2, 'gone', 'f')\n": (":2: FileNotFoundError", "gone"),
    "def get_config():\n    open('/no/such')\n": (":2: FileNotFoundError", "/no/such"),
    "def get_config():\n    raise MemoryError\n": (":2: MemoryError",),
    "def get_config():\n    raise KeyError\n": (":2: KeyError",),
    "def get_config():\n    raise ValueError('a\\nb\\x1b')\n": (":2: ValueError: a b\\x1b",),
    "def get_config():\n    raise ExceptionGroup('two', [OSError(1)])\n": (":2: ExceptionGroup",),
    RAISES.format(kind="Exception", does="raise ValueError"): (":7: Bad: an error without a text",),
    RAISES.format(kind="TypeError", does="raise self"): (":7: Bad: an error without a text",),
    RAISES.format(kind="OSError", does="return 3"): (":7: Bad: an error without a text",),
    RAISES.format(kind="KeyError", does="raise SystemExit(0)"): (":7: Bad:",),
    RAISES.format(kind="BaseException", does="raise SystemExit(0)"): (":7: Bad: an error without",),
    # no Python
    "def get_config(:": ("mine.py:1: SyntaxError: ",),
    "def get_config():\nreturn 1": ("mine.py:2: IndentationError: ",),
    "import no_such_module\n": (":1: ModuleNotFoundError: No module named 'no_such_module'",),
    "x = '\udcff'\n": ("mine.py",),
    "x = 1\0\n": ("mine.py",),
}


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_is_one_plain_line(number, tmp_path, monkeypatch, capfd):
    content, messages = list(MISTAKES.items())[number]
    file = tmp_path / "mine.py"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "empty").mkdir()
    monkeypatch.syspath_prepend(str(sys.path[0]))
    monkeypatch.chdir(tmp_path / "empty")
    for stage in ("train", "report", "all"):
        assert run_main(f"--config={file}", f"--stage={stage}") == 2
        shown = capfd.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert shown.err.strip().isprintable() and "Traceback" not in shown.err
        for message in messages:
            assert message in shown.err, shown.err
    assert not list((tmp_path / "empty").iterdir())


def test_a_mistake_is_named_before_the_options_of_the_command_line(tmp_path, capfd):
    file = tmp_path / "mine.py"
    file.write_text(changed("with c.unlocked(): del c['ppo']"))
    assert run_main(f"--config={file}", "--config.ppo.seed=1", "--total_steps=3") == 2
    assert capfd.readouterr().err.startswith("error: ppo is missing: ")


GOOD = {
    changed("c.ppo.gamma = 1"): ("ppo.gamma", 1.0),
    changed("import numpy", "c.ppo.gamma = numpy.float64(0.5)"): ("ppo.gamma", 0.5),
    changed("c.ppo.update(seed=3)"): ("ppo.seed", 3),
    changed("c.ppo.seed = c.get_ref('sarm_batch_size') + 1"): ("ppo.seed", 17),
    changed("c.probe.set_value = None"): ("probe.set_value", None),
    changed("c.probe.set_value = 2"): ("probe.set_value", 2.0),
    changed("c.reward.penalty_cap = float('inf')"): ("reward.penalty_cap", float("inf")),
    changed("c.update({'ppo': {'seed': 4}, 'dtype': 'bfloat16'})"): ("ppo.seed", 4),
    changed("c.ppo.total_steps = 10**8"): ("ppo.total_steps", 10**8),
    changed("import dataclasses", "c.ppo.seed = 5", "c = c.copy_and_resolve_references()"): (
        "ppo.seed",
        5,
    ),
    "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n"
    "    seed: int = 6\n" + changed("c.ppo.seed = A().seed"): ("ppo.seed", 6),
    changed("import sys", "sys.stderr.write('')", "c.ppo.seed = 8"): ("ppo.seed", 8),
    changed(
        "from ml_collections.config_dict import required_placeholder",
        "c.sarm_model = required_placeholder(str)",
    ): ("sarm_model", "s"),
}


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_what_is_right_is_taken(number, tmp_path, monkeypatch):
    content, (field, value) = list(GOOD.items())[number]
    (tmp_path / "mine.py").write_text(content)
    seen = []
    monkeypatch.setattr("pipeline.runner.run_stage", lambda stage, config, *_: seen.append(config))
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run_main(f"--config={tmp_path}/mine.py", workdir, "--sarm_model=s") == 0
    for part in field.split("."):
        seen[0] = seen[0][part]
    assert seen[0] == value and type(seen[0]) is type(value)


def test_ctrl_c_in_a_config_is_no_mistake(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{tmp_path}/mine.py")


def test_the_argument_behind_the_name(tmp_path):
    (tmp_path / "mine.py").write_text(START.replace("()", "(x='')", 1) + "    c.dtype = x\n" + END)
    assert load(f"{tmp_path}/mine.py:a:b").dtype == "a:b"
    assert load(f"{tmp_path}/mine.py:").dtype == load(f"{tmp_path}/mine.py").dtype == ""
    (tmp_path / "mine.py").write_text(changed())
    with pytest.raises(ConfigFileError, match="takes no argument"):
        load(f"{tmp_path}/mine.py:a")


def test_a_file_that_was_changed_within_a_second_is_read_again(tmp_path):
    file = tmp_path / "mine.py"
    for seed in (1, 2):
        file.write_text(changed(f"c.ppo.seed = {seed}"))
        os.utime(file, (10**9, 10**9))
        assert load(str(file)).ppo.seed == seed
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("folder", ["plain", "a:b", "a:b/c:d", ":x"])
def test_a_config_may_lie_in_a_folder_with_a_colon(tmp_path, folder):
    path = tmp_path / folder / "c.py"
    path.parent.mkdir(parents=True)
    path.write_text("def get_config(name='none'):\n    return name\n")
    assert split_argument(str(path)) == (str(path), "", "")
    assert split_argument(f"{path}:one:two") == (str(path), ":", "one:two")
    assert split_argument("configs/nosuch.py:one") == ("configs/nosuch.py", ":", "one")
    assert split_argument("a\0:b") == ("a\0", ":", "b")
