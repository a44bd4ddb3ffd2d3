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
    of_task = {"quality": "lambda prompt, response: 1.0"}
    for name in ("prompts", "quality", "spoil", "write", "misread"):
        if name in fields:
            of_task[name] = fields.pop(name)
    changed = ", ".join(f"{name}={value}" for name, value in of_task.items())
    arguments = ", ".join(f"{name}={value}" for name, value in fields.items())
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\n"
        "from sarm_jax.lab.text.task import TextShortcut\n"
        "from sarm_jax.lab.text.words import TASK as WORDS\n"
        f"DOTS = TextShortcut({arguments})\n"
        f"TASK = dataclasses.replace(WORDS, all_shortcuts=[DOTS], {changed})\n"
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
        ("phrasings", "[1, 2]", "phrasings=[1, 2]: needs texts"),
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


@pytest.mark.parametrize(
    ("function", "value", "found"),
    [
        ("quality", "lambda p, r: 1 / len(r)", "quality: {0}:5: ZeroDivisionError: division"),
        ("quality", "lambda p, r: int(r)", "quality: {0}:5: ValueError: invalid literal"),
        ("quality", "lambda p, r: exit()", "quality: {0}:5: SystemExit"),
        ("quality", "lambda p, r: [][0]", "quality: {0}:5: IndexError: list index out of range"),
        ("quality", "lambda p: 1.0", "quality: lab.task={0}: TypeError: <lambda>() takes 1"),
        ("quality", "lambda p, r: None", "quality: returned None, expected a number"),
        ("quality", "lambda p, r: 'good'", "quality: returned 'good', expected a number"),
        ("quality", "0.5", "quality: expected a function, found 0.5"),
        ("count", "lambda r: None", "count of dots: returned None, expected a whole number from 0"),
        ("count", "lambda r: -1", "count of dots: returned -1, expected a whole number from 0"),
        ("count", "lambda r: 0.5", "count of dots: returned 0.5, expected a whole number from 0"),
        ("count", "lambda r: r.dots", "count of dots: {0}:4: AttributeError: 'str'"),
        ("add", "lambda rng, r, p: None", "add of dots: returned None, expected a text"),
        ("remove", "lambda r: r.split()", "remove of dots: returned [], expected a text"),
        ("spoil", "lambda rng, p, r: None", "spoil: returned None, expected a text"),
        ("misread", "lambda rng, p: p.split()", "misread: returned ['a', 'prompt'], expected a"),
        ("prompts", "lambda rng: {'a', 'b'}", "prompts: returned {{"),
        ("prompts", "lambda rng: ['a', ' ']", "prompts: returned ['a', ' '], expected a list of"),
        ("prompts", "lambda rng: [['a']]", "prompts: returned [['a']], expected a list of texts"),
    ],
)
def test_a_function_of_a_task_that_fails_is_named(tmp_path, function: str, value: str, found: str):
    """The functions meet texts that nobody thought of, such as an empty response."""
    path, rng = tmp_path / "own.py", np.random.default_rng(0)
    with pytest.raises(InputError) as error:
        task = own_task(tmp_path, **{function: value})
        task.prompts(rng)
        task.annotator_utility("a prompt", "")
        task.all_shortcuts[0].added(rng, "", 1)
        if task.misread is not None:
            task.misread(rng, "a prompt")
        task.spoil(rng, "a prompt", "")
    assert str(error.value).startswith(f"lab.task={path}: {found.format(path)}")


@pytest.mark.parametrize("name", ["''", "' dots'", "'a,b'", "'rotating:1'", "3"])
def test_a_name_that_cannot_be_told_is_refused(tmp_path, name: str):
    with pytest.raises(InputError, match=r"own.py:4: ValueError: shortcut .*lab\.told_shortcuts"):
        own_task(tmp_path, name=name)


def test_messages_about_a_task_name_its_file(tmp_path):
    task = own_task(tmp_path, quality="lambda prompt, response: 2.0")
    with pytest.raises(InputError, match=f"^lab.task={tmp_path}/own.py: the quality of"):
        task.plain_quality("a prompt", "yes.")


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
