"""The last line of a command that failed is its error, whatever is drawn on stderr."""

import ast
import copy
import logging
import sys
from pathlib import Path

import pytest
import tqdm.auto
from huggingface_hub.utils import tqdm as hub_tqdm
from tqdm import tqdm as plain_tqdm

from conversion import cli
from sarm_jax.io import progress
from sarm_jax.io.errors import InputError
from tests.command import run_main
from tests.paths import ROOT

KINDS = [plain_tqdm, tqdm.auto.tqdm, hub_tqdm]


def lines(text: str) -> list[str]:
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
@pytest.mark.parametrize("options", [{}, {"leave": False}, {"leave": None}, {"disable": True}])
@pytest.mark.parametrize("count", [1, 3])
def test_open_bars_are_closed_before_the_last_line(kind, options, count, capfd):
    bars = [kind(total=5, desc=f"bar {n}", mininterval=0, **options) for n in range(count)]
    for bar in bars:
        bar.update()
    progress.show_last_line("error: the end")
    for bar in bars:
        bar.update()
        bar.refresh() if not bar.disable else None
    del bars, bar  # what Python deletes, it would draw again
    shown = capfd.readouterr().err
    assert lines(shown)[-1] == "error: the end" and shown.endswith("error: the end\n")
    assert shown.count("error: the end") == 1
    assert "\nerror: the end\n" in "\n" + shown.replace("\r", "\n")


def fails_with_open_bars(*_, **__):
    """Stands for a stage; the exception keeps its frame, and so the bars, alive."""
    bars = [plain_tqdm(total=5, desc=f"bar {n}", mininterval=0) for n in range(2)]
    bars[0].update()
    raise InputError("ppo.seed=1: refused late")


def test_the_error_of_a_stage_is_the_last_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pipeline.runner.run_stage", fails_with_open_bars)
    assert run_main(f"--config={ROOT}/configs/base.py", f"--workdir={tmp_path}/run") == 2
    shown = capfd.readouterr().err
    assert "bar 1" in shown and shown.endswith("\nerror: ppo.seed=1: refused late\n")


def test_the_error_of_a_conversion_is_the_last_line(capfd):
    from conversion import from_hf

    with pytest.raises(SystemExit):
        options = ["from_hf", "--kind=policy", "--src=a", "--dst=b"]
        cli.run(fails_with_open_bars, copy.deepcopy(from_hf.FLAGS), "", options)
    assert capfd.readouterr().err.endswith("\nerror: ppo.seed=1: refused late\n")


def test_nothing_is_drawn_behind_an_unexpected_error(capfd):
    bar = plain_tqdm(total=5, desc="bar", mininterval=0)
    bar.update()
    progress.show_progress()
    try:
        raise LookupError("the end")
    except LookupError:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.excepthook = sys.__excepthook__
        logging.getLogger().handlers.clear()
    del bar
    assert lines(capfd.readouterr().err)[-1] == "LookupError: the end"


def test_a_bar_that_cannot_be_drawn_hides_no_error(capfd):
    class Broken:
        def write(self, _: str) -> None:
            raise OSError("no place to draw")

        def flush(self) -> None: ...

    bar = plain_tqdm(total=5, file=sys.stderr)
    bar.update()
    bar.fp = Broken()
    bar.sp = bar.status_printer(sys.stderr)
    progress.show_last_line("error: the end")
    assert capfd.readouterr().err.endswith("error: the end\n")
    bar.disable = True


@pytest.mark.parametrize("folder", ["sarm_jax", "ppo", "conversion", "pipeline"])
def test_only_one_function_prints_to_stderr(folder):
    """Every last line goes through `show_last_line`, which closes the bars."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if is_print(node)]
        allowed = Path(progress.__file__) == path
        assert allowed or not calls, path


def is_print(node: ast.AST) -> bool:
    """Returns whether a node prints to stderr."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stderr.write")):
        return False
    return "sys.stderr" in ast.unparse(node)
