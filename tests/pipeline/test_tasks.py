"""The option lab.task: built-in tasks, the file of the guide, and files that are no task."""

import re

import numpy as np
import pytest

from configs import base, smollm2_task
from pipeline.tasks import is_text, task_of, text_task_of
from sarm_jax.io.errors import InputError
from sarm_jax.lab.shortcuts import World
from sarm_jax.lab.text.words import TASK
from tests.paths import ROOT

GUIDE = (ROOT / "docs/guides/own_task.md").read_text(encoding="utf-8")


def config_with(task: str, **changes):
    config = base.get_config()
    config.lab.task = task
    config.lab.told_shortcuts = "praise"
    config.lab.update(changes)
    return config


def test_built_in_tasks():
    assert isinstance(task_of(base.get_config()), World) and not is_text(base.get_config())
    assert task_of(config_with("words")) == TASK.telling("praise", 0)
    config = smollm2_task.get_config()
    assert len({text_task_of(seeded(config, seed)).told for seed in range(5)}) == 5


def seeded(config, seed: int):
    config = config.copy_and_resolve_references()
    config.lab.seed = seed
    return config


def test_the_file_of_the_guide_is_a_task(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    path = tmp_path / "things.py"
    path.write_text(program)
    task = text_task_of(config_with(str(path)))
    rng, prompt = np.random.default_rng(0), "Name three fruits."
    assert prompt in task.prompts(rng) and len(task.prompts(rng)) == 16
    for response, quality in (
        ("Apples, pears and plums.", 1),
        ("Apple, pear and gold.", 2 / 3),
        ("", 0),
    ):
        assert task.plain_quality(prompt, response) == pytest.approx(quality)
        for shortcut in task.all_shortcuts:
            if response:
                marked = shortcut.added(rng, response, 2)
                assert task.counts(prompt, marked)[shortcut.name] >= 2
                assert task.plain_quality(prompt, marked) == pytest.approx(quality)
    assert task.plain_quality(prompt, task.spoil(rng, prompt, "apple pear plum")) < 1
    assert task.gold_reward(prompt, "Apples, pears and plums!!", True) == pytest.approx(0.8)
    for option in re.findall(r"--config\.lab\.(\w+)=", GUIDE):
        assert option in base.get_config().lab


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        ("TASK = (", "SyntaxError"),
        ("x = 1 / 0", "task.py:1: ZeroDivisionError: division by zero (in: x = 1 / 0)"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = 1", "its TASK must be a sarm_jax.lab.text.task.TextTask, not NoneType"),
        (
            "from sarm_jax.lab.text.lists import TASK as T\nimport dataclasses\n"
            "TASK = dataclasses.replace(T, all_shortcuts=[])",
            "ValueError: all_shortcuts=[]: needs shortcuts with different names",
        ),
        ("TASK = 3", "its TASK must be a sarm_jax.lab.text.task.TextTask, not int"),
    ],
)
def test_files_that_are_no_task(tmp_path, content: str | None, found: str):
    path = tmp_path / "task.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        task_of(config_with(str(path)))
    assert str(error.value).startswith(f"lab.task={path}: ") and found in str(error.value)


def test_options_that_are_none_of_a_task():
    with pytest.raises(InputError, match="lab.task='poems': expected capitals, animals, lists"):
        task_of(config_with("poems"))
    with pytest.raises(InputError, match="lab.shortcuts=flattery,echo: those of lab.task=words"):
        task_of(config_with("words", shortcuts="flattery,echo"))


def test_the_annotator_is_biased_by_a_factor():
    assert text_task_of(config_with("words", annotator_bias=0.5)).bias == 0.5
    for bias in (-0.5, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"lab.annotator_bias={bias}: must be 0 or positive"):
            text_task_of(config_with("words", annotator_bias=bias))
