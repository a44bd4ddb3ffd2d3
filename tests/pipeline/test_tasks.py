"""The option lab.task: built-in tasks, the file of the guide, and files that are no task."""

import re

import numpy as np
import pytest

from configs import base, smollm2_task, smollm2_task_gpu
from pipeline.option_bounds import checked
from pipeline.study_options import check_pool, check_study, groups_of, trained_conditions
from pipeline.tasks import is_text, task_of, text_task_of
from ppo.options import train_config
from sarm_jax.io.errors import InputError
from sarm_jax.lab.conditions import parse_seeds
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


def test_the_study_on_a_gpu():
    config = checked(smollm2_task_gpu.get_config())
    check_study(config)
    check_pool(config)
    trained = groups_of(trained_conditions(config), config.lab.conditions_at_once)
    assert [len(group) for group in trained] == [11, 1]
    assert len(parse_seeds(config.lab.seeds)) == 10
    assert train_config(config).ppo.prompts_per_batch == 16


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


def own_task(tmp_path, **changes):
    """Writes the file of a task with a shortcut of its own, and returns the task."""
    fields = {"name": "'dots'", "count": "len", "add": "lambda rng, text, _: text + '.'"}
    fields |= {"remove": "lambda text: text.rstrip('.')", "phrasings": "['.', '..']"} | changes
    quality = fields.pop("quality", "lambda prompt, response: 1.0")
    arguments = ", ".join(f"{name}={value}" for name, value in fields.items())
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\n"
        "from sarm_jax.lab.text.task import TextShortcut\n"
        "from sarm_jax.lab.text.words import TASK as WORDS\n"
        f"DOTS = TextShortcut({arguments})\n"
        f"TASK = dataclasses.replace(WORDS, all_shortcuts=[DOTS], quality={quality})\n"
    )
    return text_task_of(config_with(str(path), told_shortcuts="dots"))


def test_the_lists_of_a_task_of_ones_own_may_be_lists(tmp_path):
    task = own_task(tmp_path)
    assert task.all_shortcuts[0].phrasings == (".", "..")
    task.check_prompts(task.prompts(np.random.default_rng(0))[:2], "prompts.jsonl")
    with pytest.raises(InputError, match="is no prompt of lab.task="):
        task.check_prompts(["Name three fruits."], "prompts.jsonl")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("phrasings", "()", "phrasings=(): needs texts"),
        ("phrasings", "'...'", "phrasings='...': needs texts"),
        ("base_rate", "1.5", "base_rate=1.5: must be at least 0 and at most 1"),
        ("most", "0", "most=0: must be at least 1"),
        ("pay", "-0.5", "pay=-0.5: must be at least 0"),
        ("cost", "float('nan')", "cost=nan: must be at least 0"),
        ("pay", "float('inf')", "pay=inf: must be at least 0"),
    ],
)
def test_a_shortcut_that_cannot_be_is_refused(tmp_path, name: str, value: str, found: str):
    with pytest.raises(InputError) as error:
        own_task(tmp_path, **{name: value})
    assert f"own.py:4: ValueError: shortcut dots: {found}" in str(error.value)


@pytest.mark.parametrize("value", ["1.1", "-0.5", "float('nan')"])
def test_a_quality_out_of_range_is_refused(tmp_path, value: str):
    """A gold reward above 1, or an annotator who prefers nothing, would be silently wrong."""
    task = own_task(tmp_path, quality=f"lambda prompt, response: {value}")
    shown = value.removeprefix("float('").removesuffix("')")
    message = rf'lab.task=\S*: the quality of "yes." is {shown}: must lie in \[0, 1\]'
    for judge in (task.plain_quality, task.annotator_utility, task.measures):
        with pytest.raises(InputError, match=message):
            judge("a prompt", "yes.")


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
