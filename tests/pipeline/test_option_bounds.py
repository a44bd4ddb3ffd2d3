"""Every option of `configs/base.py` with bad and with good values."""

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder

from configs import base
from pipeline import cli, option_bounds
from pipeline.option_bounds import INT32, LARGEST, checked, value_of_type
from pipeline.stage import load_all
from ppo.config import PPOConfig
from sarm_jax.evaluation.controls import read_steering
from sarm_jax.features.feature_lists import parse_bounds, parse_values
from sarm_jax.io.errors import InputError
from sarm_jax.parallel.processes import Hosts
from tests.command import run_main
from tests.paths import ROOT

HUGE = 10**18


def leaves(section: ConfigDict, path: str = "") -> Iterator[tuple[str, type, Any]]:
    """Yields (full name, type, default) of every option."""
    for name in section:
        if isinstance(section[name], ConfigDict):
            yield from leaves(section[name], f"{path}{name}.")
        else:
            yield f"{path}{name}", section.get_type(name), section[name]


OPTIONS = list(leaves(base.get_config()))
NUMBERS = [(name, kind) for name, kind, _ in OPTIONS if kind in (int, float)]
OUT_OF_RANGE = {
    int: [HUGE, -HUGE, 2**31, 10**5000],
    float: [1e300, -1e300, 1e-300, -1e-300, 1e-44, math.nan, 10**400, 3.5e38],
    bool: [],
    str: [],
}
OF_ANOTHER_TYPE = {
    int: [True, None, "1", 1.0, math.nan, (1,), [1], {"a": 1}, print],
    float: [True, "1", (1.0,), [1.0], {"a": 1}, print, 1j, np.array(1.0), b"1"],
    bool: [None, 1, 0, 1.0, "true"],
    str: [None, 1, ("a",), b"a", Path("a"), print],
}


def config_with(name: str, value: Any) -> ConfigDict:
    """Returns the base config with one option set to anything."""
    config = base.get_config()
    section, _, field = name.rpartition(".")
    with config.unlocked(), config.ignore_type():
        place = config[section] if section else config
        del place[field]
        place[field] = value
    return config


def value_of(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def bad_values(kind: type) -> list[Any]:
    """Returns what every option of a type must refuse."""
    return OUT_OF_RANGE[kind] + OF_ANOTHER_TYPE[kind]


CASES = [(name, value) for name, kind, _ in OPTIONS for value in bad_values(kind)]


def test_every_option_refuses_what_it_cannot_be():
    accepted = []
    for name, value in CASES:
        try:
            value_of_type(name, value)
            accepted.append((name, value))
        except InputError as error:
            assert str(error).startswith(f"{name}="), error
            assert str(error).isprintable() and len(str(error)) < 2100
    assert not accepted
    assert len(CASES) > 1300


def test_a_config_with_one_bad_value_is_refused():
    for number, (name, kind, _) in enumerate(OPTIONS):
        values = bad_values(kind)
        value = values[number % len(values)]
        with pytest.raises(InputError, match=rf"^{re.escape(name)}[=.]"):  # {"a": 1} is a section
            checked(config_with(name, value))


@pytest.mark.parametrize("name", [name for name, kind in NUMBERS if kind is float])
def test_a_number_is_infinite_only_where_it_switches_something_off(name):
    config = config_with(name, math.inf)
    if name.startswith("guards.") or name == "reward.penalty_cap":
        assert value_of(checked(config), name) == math.inf
        return
    with pytest.raises(InputError, match=rf"^{name}=inf: must be a finite number"):
        checked(config)


GOOD = {
    int: [-1, 0, 1, 2, 1000, "largest"],
    float: [0, 1, -2, 0.5, 1e-6, 1e-37, 3.4e38, 1e30, np.float64(0.5)],
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("number", range(9))
def test_good_values_are_left_alone(kind, number):
    """All options of a type have the value at once."""
    config, expected = base.get_config(), {}
    for name in (name for name, of_kind in NUMBERS if of_kind is kind):
        value = GOOD[kind][number % len(GOOD[kind])]
        if value == "largest":
            value = LARGEST.get(name, INT32)
        if name in option_bounds.TEMPERATURES:
            value = max(value, option_bounds.LEAST_TEMPERATURE)
        config.update_from_flattened_dict({name: value})
        expected[name] = value
    found = checked(config)
    for name, value in expected.items():
        assert value_of(found, name) == value and type(value_of(found, name)) is kind


def test_upper_bounds_are_of_options():
    names = {name for name, kind in NUMBERS if kind is int}
    assert set(LARGEST) <= names
    assert set(option_bounds.TEMPERATURES) <= {name for name, _ in NUMBERS}
    for name, default in ((n, d) for n, _, d in OPTIONS if n in LARGEST):
        assert default * 4 <= LARGEST[name]


CONFIGS = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "__init__"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_the_project_is_left_alone(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config("tau_2") if name == "ablations" else get_config()
    assert repr(checked(config).to_dict()) == repr(config.to_dict())
    assert checked(config).is_locked


def test_an_experiment_is_checked_like_the_config():
    for changes, message in (
        ({"ppo": {"learning_rate": 1e300}}, r"^experiments\.a\.ppo\.learning_rate=1e\+300: must"),
        (
            {"ppo": {"batch_size": HUGE}},
            r"^experiments\.a\.ppo\.batch_size=1000.*: must be at most",
        ),
        ({"ppo": {"seed": True}}, r"^experiments\.a\.ppo\.seed=True: expected int"),
        ({"ppo": 3}, r"^experiments\.a\.ppo=3: expected options"),
        ({"ppo": {"sed": 3}}, r"^experiments\.a\.ppo\.sed: no such option \(did you mean .*seed"),
        (3, r"^experiments\.a=3: expected options"),
    ):
        config = base.get_config()
        with config.unlocked():
            config.experiments.a = ConfigDict(changes) if isinstance(changes, dict) else changes
        with pytest.raises(InputError, match=message):
            checked(config)
    config = base.get_config()
    with config.unlocked():
        config.experiments = {"b": {"reward": {"beta": 1}}, "a": {}}
    assert checked(config).experiments.to_dict() == {"a": {}, "b": {"reward": {"beta": 1.0}}}


def test_references_are_replaced_by_their_values():
    config = base.get_config()
    config.policy_model = required_placeholder(str)
    config.evaluate.seed = config.ppo.get_ref("seed")
    config.ppo.seed = 7
    option_bounds.check_names(config)  # the value may still come from a flag
    config.policy_model = "here"
    assert (checked(config).evaluate.seed, checked(config).policy_model) == (7, "here")


TOO_LARGE = [
    (name, value) for name, kind in NUMBERS for value in ([HUGE] if kind is int else ["1e300"])
]


@pytest.mark.slow
def test_the_stage_that_reads_an_option_refuses_it(tmp_path, monkeypatch, capfd):
    """Runs the command itself: exit code 2, one line that names the option, nothing written."""
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'configs' / 'base.py'}"
    stages = load_all()
    for name, value in TOO_LARGE:
        readers = [stage.name for stage in stages if stage.reads_option(name)] or ["train"]
        assert run_main(config, f"--stage={readers[0]}", f"--config.{name}={value}") == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {name}=") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())
    assert len(TOO_LARGE) > 100


FLAGS = ["--learning_rate=1e300", "--beta=1e-300", "--temperature=1e-30", "--batch_size=1000000000"]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_the_reference_have_the_same_bounds(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    field = {"--beta": "reward.beta"}.get(flag.split("=")[0], f"ppo.{flag[2:].split('=')[0]}")
    with pytest.raises(InputError, match=f"^{field}="):
        parse_flags(f"--config={ROOT / 'configs' / 'base.py'}", flag)


@pytest.mark.parametrize("count", [10**6, HUGE, 10**30, -HUGE])
def test_the_number_of_processes_has_bounds(count):
    with pytest.raises(InputError, match=f"^--num_processes={count}: must lie in"):
        Hosts("localhost:1234", count, 0)


def parse_flags(*options: str) -> ConfigDict:
    with flagsaver.flagsaver():
        return cli.parse(["main.py", *options])[0]


def test_the_steps_of_a_run_fit_the_counter_of_the_optimizer():
    ppo = base.get_config().ppo
    PPOConfig(**{**ppo, "total_steps": 10**8})
    for name in ("total_steps", "warmup_steps"):
        with pytest.raises(InputError, match=rf"^ppo\.{name}=2000000000: .*ppo_epochs"):
            PPOConfig(**{**ppo, name: 2 * 10**9})


@pytest.mark.parametrize("text", ["1e300", "-1e39", "1e-300", "1e-45", "nan", "inf"])
def test_lists_of_values_fit_float32(text, tmp_path):
    for parse in (parse_values, parse_bounds):
        with pytest.raises(InputError, match="^reward.x: found .*float32"):
            parse("reward.x", f"1,{text}")
    if text in ("nan", "inf"):
        return
    for content in (f'{{"x": [{text}]}}', '{"x": [true]}'):
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(InputError, match="^reward.x: found .*float32"):
            parse_values("reward.x", f"@{tmp_path}/list.json:x")
    (tmp_path / "steering.json").write_text(f'{{"1": ["*", {text}]}}')
    with pytest.raises(InputError, match="feature 1: found"):
        read_steering(tmp_path / "steering.json")


def test_good_lists_are_read():
    assert parse_values("x", "0,-0.0,1e-30,3e38,-5") == (0, 0, 1e-30, 3e38, -5)
    assert parse_bounds("x", "none,0,NONE,1e-37") == (None, 0, None, 1e-37)
