"""Answers of several files: a set per file and type, each with a name of its own."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from configs import base
from pipeline.preflight import check
from pipeline.report import responses, tables
from sarm_jax.evaluation.benchmark_files import named_files
from sarm_jax.evaluation.controls import Controls
from sarm_jax.evaluation.figures import before_after
from sarm_jax.evaluation.steering import (
    choose_answers,
    evaluate_steering,
    read_answer_sets,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import intervention
from tests.command import run_main
from tests.evaluations import evaluation_of, steering_config
from tests.oracles import save_tiny_sarm, tiny_tokenizer

OPTION = "evaluate.data_jsonl"
LAYOUT = [
    f"{folder}/safety_{side}.jsonl"
    for folder in ("rewardbenchv2", "rm_bench")
    for side in ("c", "j")
]
LABELS = {"c": "chosen", "j": "rejected"}


def write(path: Path, kinds: list[str | None], field: str = "type", rows: int = 6) -> Path:
    """Writes `rows` answers of every type; for the type None the field is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"question": f"q {n}", "answer": f"{path.parent.name} {path.stem} {kind} " + "so " * n}
        | ({field: kind} if kind else {})
        for n in range(rows)
        for kind in kinds
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def four(tmp_path):
    """Test files like those of the SARM repository: equal names, and the type in `label`."""
    return [
        str(write(tmp_path / "steering/test" / name, [LABELS[Path(name).stem[-1]]], "label"))
        for name in LAYOUT
    ]


@pytest.fixture
def two(tmp_path):
    """A file for each benchmark, with answers of both types."""
    return [
        str(write(tmp_path / folder / "safety.jsonl", ["chosen", "rejected"]))
        for folder in ("rewardbenchv2", "rm_bench")
    ]


def sets_of(*files: str) -> dict[str, tuple[str, str]]:
    """Returns (source, type) by name of the set."""
    answers = read_answer_sets(named_files(files, OPTION))
    return {answer.set_name: (answer.source, answer.kind) for answer in answers}


def test_the_four_rows_of_two_benchmarks(four, two):
    assert sets_of(*four) == {
        "rewardbenchv2/safety_c_chosen": ("rewardbenchv2/safety_c", "chosen"),
        "rewardbenchv2/safety_j_rejected": ("rewardbenchv2/safety_j", "rejected"),
        "rm_bench/safety_c_chosen": ("rm_bench/safety_c", "chosen"),
        "rm_bench/safety_j_rejected": ("rm_bench/safety_j", "rejected"),
    }
    assert sets_of(*two) == {
        f"{folder}/safety_{kind}": (f"{folder}/safety", kind)
        for folder in ("rewardbenchv2", "rm_bench")
        for kind in ("chosen", "rejected")
    }
    reference = {
        f"{bench}_safety_{kind}": (f"{bench}_safety", kind)
        for bench in ("rb2", "rmb")
        for kind in ("chosen", "rejected")
    }
    names = ("rb2_safety", "rb2_safety", "rmb_safety", "rmb_safety")
    assert sets_of(*map("{}={}".format, names, four)) == reference
    assert sets_of(*map("{}={}".format, names[1:3], two)) == reference
    sets = sets_of(*map("{}={}".format, reference, four))
    assert {name: kind for name, (_, kind) in sets.items()} == {
        name: kind for name, (_, kind) in reference.items()
    }


def test_types_of_only_one_file_are_the_names_of_sets(tmp_path):
    both = write(tmp_path / "a/safety.jsonl", ["chosen", "rejected"])
    assert list(sets_of(str(both))) == ["chosen", "rejected"]
    assert sets_of(f"mine={both}") == {
        "mine_chosen": ("mine", "chosen"),
        "mine_rejected": ("mine", "rejected"),
    }
    one = [str(write(tmp_path / f"test_{kind}.jsonl", [kind])) for kind in ("concise", "detailed")]
    assert list(sets_of(*one)) == ["concise", "detailed"]
    assert list(sets_of(*one, str(both))) == ["concise", "detailed", "chosen", "rejected"]
    untyped = [str(write(tmp_path / folder / "own.jsonl", [None])) for folder in "xy"]
    assert list(sets_of(untyped[0])) == ["own"]
    assert list(sets_of(*untyped)) == ["x/own", "y/own"]


def test_ambiguous_names_of_sets_are_written_in_full(tmp_path):
    files = [str(write(tmp_path / f"{n}.jsonl", ["chosen"])) for n in ("safety", "safety_chosen")]
    assert list(sets_of(*files)) == ["safety_chosen", "safety_chosen_chosen"]
    first, second = write(tmp_path / "a.jsonl", ["b_c"]), write(tmp_path / "a_b.jsonl", ["c"])
    with pytest.raises(InputError, match=r"two sets are called 'n_b_c': .*NAME=FILE"):
        sets_of(f"n={first}", f"n_b={second}")


TREES = [
    "a/x.jsonl b/x.jsonl c/y.jsonl",
    "a/x.jsonl a/x.json b/x.jsonl",
    "p/a/x.jsonl q/a/x.jsonl q/b/x.jsonl",
    "x.jsonl a/x.jsonl a/a/x.jsonl",
    "x.jsonl y.jsonl",
    "../n/x.jsonl x.jsonl",
    "x.parquet x.jsonl x.json",
]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("absolute", [False, True])
def test_names_of_files_are_short_and_unique(tree, absolute, tmp_path):
    paths = [str(tmp_path / "here" / path) if absolute else path for path in tree.split()]
    for order in itertools.permutations(paths):
        files = named_files(order, OPTION)
        assert [file.path for file in files] == list(order) and not any(
            f.named_by_user for f in files
        )
        names = [file.name for file in files]
        assert len(set(names)) == len(names)
        for path, name in zip(order, names, strict=True):
            full = str(Path(path).absolute())
            assert full.endswith(name) or full.rpartition(".")[0].endswith(name)
            stems = [Path(other).stem for other in order]
            if stems.count(Path(path).stem) == 1:
                assert name == Path(path).stem


def test_names_from_the_user(tmp_path):
    file, odd = write(tmp_path / "x.jsonl", ["a"]), write(tmp_path / "lr=0.1/x=y.jsonl", ["b"])
    files = named_files([f"first one = {file}", str(odd), f"n={odd}"], OPTION)
    assert [(f.name, f.path, f.named_by_user) for f in files] == [
        ("first one", str(file), True),
        ("x=y", str(odd), False),
        ("n", str(odd), True),
    ]
    missing = f"{tmp_path}/lr=0.1/gone.jsonl"  # the name of its folder has a "="
    assert named_files([missing], OPTION)[0].path == missing
    assert named_files(["n=gone.jsonl"], OPTION)[0].path == "gone.jsonl"


@pytest.mark.parametrize(
    "files, message",
    [
        (["=x.jsonl"], "found '=x.jsonl', expected FILE or NAME=FILE"),
        (["n="], "found 'n=', expected FILE or NAME=FILE"),
        (["x.jsonl", "x.jsonl"], "x.jsonl is given twice"),
        (["a/x.jsonl", "a/../a/x.jsonl"], "x.jsonl is given twice"),
        (["n=x.jsonl", "n=./x.jsonl"], "x.jsonl is given twice"),
        (["y=x.jsonl", "y.jsonl"], "two files are called 'y': give both as NAME=FILE"),
    ],
)
def test_names_that_are_refused(files, message):
    with pytest.raises(InputError) as error:
        named_files(files, OPTION)
    assert str(error.value).startswith(OPTION) and message in str(error.value)


def test_num_example_answers_of_every_file_and_type_are_chosen(two):
    answers = read_answer_sets(named_files(two, OPTION))
    for count in (1, 4, 6, 100):
        chosen = choose_answers(steering_config(num_example=count, seed=7), answers)
        for source, kind in {(a.source, a.kind) for a in answers}:
            own = [a for a in chosen if (a.source, a.kind) == (source, kind)]
            assert len(own) == min(count, 6) and len(set(own)) == len(own)
    alone = read_answer_sets(named_files(two[:1], OPTION))
    assert len(choose_answers(steering_config(num_example=4, seed=7), alone)) == 8


@pytest.fixture
def controls():
    return Controls(intervention(64, steer={3: ("+", 2.0), 5: ("*", 3.0)}))


def test_every_set_holds_the_scores_of_its_file_alone(reward_model, controls, two):
    answers = read_answer_sets(named_files(two, OPTION))
    together = evaluate_steering(steering_config(), reward_model, answers, controls=controls)
    sets = together.summary["sets"]
    assert len(sets) == 4
    for file, folder in zip(two, ("rewardbenchv2", "rm_bench"), strict=True):
        answers = read_answer_sets(named_files([file], OPTION))
        alone = evaluate_steering(steering_config(), reward_model, answers, controls=controls)
        for kind, expected in alone.summary["sets"].items():
            actual = sets[f"{folder}/safety_{kind}"]
            assert actual["source"] == f"{folder}/safety" and actual["type"] == kind
            assert expected["source"] == "safety" and expected["type"] == kind
            for side in ("before", "after"):
                np.testing.assert_allclose(
                    actual["scores"][side], expected["scores"][side], atol=1e-5
                )
    rows = [(row["source"], row["type"]) for row in together.rows]
    assert set(rows) == {(own["source"], own["type"]) for own in sets.values()}
    specificity = together.summary["specificity"]
    assert specificity["targets"] == [name for name in sets if name.endswith("rejected")]
    assert specificity["others"] == [name for name in sets if name.endswith("chosen")]


def test_targets_are_types_or_sets(reward_model, controls, two):
    answers = read_answer_sets(named_files(two, OPTION))

    def targets(*names):
        options = steering_config(steering_targets=names)
        result = evaluate_steering(options, reward_model, answers, controls=controls)
        return result.summary["specificity"]["targets"]

    assert targets("chosen") == ["rewardbenchv2/safety_chosen", "rm_bench/safety_chosen"]
    assert targets("rm_bench/safety_rejected") == ["rm_bench/safety_rejected"]
    with pytest.raises(InputError, match="no answers of type 'safety', there are chosen, rejected"):
        targets("safety")


def test_figures_and_tables_show_where_answers_come_from(reward_model, controls, two):
    answers = read_answer_sets(named_files(two, OPTION))
    result = evaluate_steering(steering_config(), reward_model, answers, controls=controls)
    content = result.summary
    evaluation = evaluation_of(steering=content)
    table = tables.steering(evaluation)[0]
    assert list(table.header[:3]) == ["", "source", "responses"] and table.numeric == 2
    assert [row[:3] for row in table.rows] == [
        [name, own["source"], "6"] for name, own in content["sets"].items()
    ]
    pictures = responses.steering_pictures(evaluation)
    assert len({p.name for p in pictures}) == 4 and not any("/" in p.name for p in pictures)
    for name, picture in zip(content["sets"], pictures, strict=True):
        assert name in picture.caption
        assert before_after(
            f"$\\frac{{{name}", content["sets"][name]
        )  # a name that looks like a formula


def test_files_of_an_older_version_are_still_shown():
    level = {"mean": 0.5, "low": 0.4, "high": 0.6}
    answer_set = {"responses": 3, "before": level, "after": level, "change": level}
    content = {"sets": {"chosen": answer_set, "rejected": answer_set}}
    (table,) = tables.steering(evaluation_of(steering=content))
    assert list(table.header[:2]) == ["", "responses"] and table.numeric == 1
    assert [row[0] for row in table.rows] == ["chosen", "rejected"]


@pytest.fixture(scope="module")
def sarm(tmp_path_factory):
    path = tmp_path_factory.mktemp("sarm")
    save_tiny_sarm(path, tiny_tokenizer())
    return path


def test_four_files_through_the_command_line(sarm, four, tmp_path, capsys):
    (tmp_path / "steering.json").write_text(json.dumps({"3": ["+", 2.0]}))
    names = ("rb2_safety", "rb2_safety", "rmb_safety", "rmb_safety")
    options = [
        "--config=configs/base.py",
        f"--workdir={tmp_path / 'run'}",
        f"--sarm_model={sarm}",
        f"--config.evaluate.steering_json={tmp_path}/steering.json",
        "--config.evaluate.num_example=4",
    ]
    files = ",".join(map("{}={}".format, names, four))
    for stage in ("evaluate", "all"):
        command = [f"--stage={stage}", *options, f"--config.evaluate.data_jsonl={files}"]
        assert run_main(*command) == 0
    log = capsys.readouterr().err
    folder = tmp_path / "run" / "eval"
    sets = json.loads((folder / "steering.json").read_text())["sets"]
    assert list(sets) == [
        "rb2_safety_chosen",
        "rb2_safety_rejected",
        "rmb_safety_chosen",
        "rmb_safety_rejected",
    ]
    for number, (name, own) in enumerate(sets.items(), 1):
        assert own["responses"] == 4 and own["figure"] == f"steering_{number}.png"
        assert (folder / own["figure"]).exists() and f"{name}: 4 responses" in log
    record = json.loads((tmp_path / "run" / "stages.json").read_text())["evaluate"]["inputs"]
    assert set(four) <= set(record)

    def refused(data: str, message: str, stage: str) -> None:
        command = [f"--stage={stage}", *options, f"--config.evaluate.data_jsonl={data}"]
        assert run_main(*command) == 2
        error = capsys.readouterr().err
        assert message in error, error

    before = (folder / "steering.json").read_bytes()
    for stage in ("evaluate", "all"):
        refused("a=gone.jsonl", f"{OPTION}=gone.jsonl: no such file", stage)
        refused(f"{four[0]},{four[0]}", f"{OPTION}: {four[0]} is given twice", stage)
    assert (folder / "steering.json").read_bytes() == before


def test_files_that_an_earlier_stage_writes_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = base.get_config()
    config.policy_model = config.sarm_model = "owner/name"
    for path in ("run/data/x.jsonl", "n=run/data/x.jsonl", "a b=run/x.jsonl", "run/lr=1/x.jsonl"):
        config.evaluate.data_jsonl = path
        check(config, Path("run"), [])
    for path in ("gone/x.jsonl", "n=gone/x.jsonl", "lr=1/gone=x.jsonl"):
        config.evaluate.data_jsonl = path
        with pytest.raises(InputError, match=r"evaluate.data_jsonl=.*x.jsonl: no such file"):
            check(config, Path("run"), [])
