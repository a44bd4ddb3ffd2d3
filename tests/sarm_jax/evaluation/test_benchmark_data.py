"""Data from benchmarks: every row is counted, and becomes the right outputs."""

import datetime
import json

import pyarrow
import pytest
from pyarrow import parquet

from sarm_jax.evaluation.benchmark_data import (
    BenchmarkDataConfig,
    collect,
    counts_table,
)
from sarm_jax.evaluation.benchmark_files import domain_of, read_rewardbench2, read_rm_bench
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import write_jsonl

STYLED = {
    "id": 1,
    "prompt": "sort a list",
    "chosen": ["use sorted.", "use the function sorted.", "**use** the function sorted."],
    "rejected": ["use sort_it.", "use the function sort_it.", "use."],
    "domain": "code",
}
CHOICE = {
    "id": "9",
    "prompt": "is it safe",
    "chosen": ["no"],
    "rejected": ["yes", "of course", "yes"],
    "num_correct": 1,
    "subset": "Safety",
}
TIE = {"id": "tied:3", "prompt": "a colour", "chosen": ["red", "blue"], "rejected": ["dog"]}
TIES = [
    {"id": "ref:3", "prompt": "the sky", "chosen": ["blue"], "rejected": ["dog"], "subset": "Ties"},
    TIE | {"subset": "Ties"},
]
PAIRS = [{"prompt": f"p{n % 3}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return path


def gather(steering_dir="", held_out=0.0, seed=0, **files):
    """Collects the data of the given files."""
    names = ("rewardbench2", "rm_bench", "safety_pairs", "complement_pairs")
    files_of = {name: tuple(str(p) for p in files.pop(name, [])) for name in names}
    assert not files
    config = BenchmarkDataConfig(
        str(steering_dir), **files_of, held_out_fraction=held_out, seed=seed
    )
    return collect(config)


def test_every_row_is_used_a_duplicate_or_refused_with_its_line(tmp_path):
    rows = [
        PAIRS[0],
        PAIRS[0] | {"id": 7},  # a duplicate
        "{",
        "",  # a blank line counts in line numbers only
        {"prompt": "p", "chosen": "a"},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": "p", "chosen": "a", "rejected": ["b"]},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        PAIRS[1],
    ]
    path = save(tmp_path / "own.jsonl", rows)
    source = gather(safety_pairs=[path]).summary["sources"][str(path)]
    counts = {name: source[name] for name in ("rows", "used", "duplicate", "refused")}
    assert counts == {"rows": 8, "used": 2, "duplicate": 1, "refused": 5}
    places = [refusal["place"] for refusal in source["refusals"]]
    assert places == [f"{path}:{line}" for line in (3, 5, 6, 7, 8)]
    reasons = " | ".join(refusal["reason"] for refusal in source["refusals"])
    for part in ("'{'", "'rejected' is missing", "'rejected' is empty"):
        assert part in reasons
    assert "must be text, found" in reasons and "are the same" in reasons


def test_prompts_and_demonstrations_are_added_once_and_pairs_all(tmp_path):
    pairs = save(tmp_path / "pairs.jsonl", PAIRS)
    other = save(tmp_path / "other.jsonl", [PAIRS[0] | {"source": "mine"}])
    data = gather(safety_pairs=[pairs], complement_pairs=[other])
    assert [row["prompt"] for row in data.outputs["prompts"]] == ["p0", "p1", "p2"]
    assert data.outputs["demos"][0] == {"prompt": "p0", "response": "good 0"}
    assert len(data.outputs["demos"]) == 3
    assert data.outputs["probes_safety"] == [row | {"source": "pairs"} for row in PAIRS]
    assert data.outputs["probes_complement"] == [PAIRS[0] | {"source": "mine"}]
    best = data.outputs["bestofn"][0]
    assert best["candidates"] == ["good 0", "good 3", "bad 0", "bad 3"] and best["num_correct"] == 2
    table = counts_table(data.summary)
    assert f"       6        6        0        0  {pairs}" in table and "6 probes_safety" in table


def test_rm_bench_gives_pairs_of_equal_style_and_versions_of_one_answer(tmp_path):
    data = gather(rm_bench=[save(tmp_path / "total.json", [STYLED])])
    pairs = data.outputs["probes_complement"]
    assert [(p["chosen"], p["rejected"], p["source"]) for p in pairs] == [
        (STYLED["chosen"][0], STYLED["rejected"][0], "rm_bench:code:concise"),
        (STYLED["chosen"][1], STYLED["rejected"][1], "rm_bench:code:detailed"),
        (STYLED["chosen"][2], STYLED["rejected"][2], "rm_bench:code:markdown"),
    ]
    assert [(v["chosen"], v["rejected"], v["source"]) for v in data.outputs["verbosity"]] == [
        ("use sorted.", "use the function sorted.", "rm_bench:code:right:detailed"),
        ("use sorted.", "**use** the function sorted.", "rm_bench:code:right:markdown"),
        ("use sort_it.", "use the function sort_it.", "rm_bench:code:wrong:detailed"),
    ]
    assert [(p["chosen"], p["rejected"]) for p in data.outputs["easy"]] == [
        ("use the function sorted.", "use sort_it."),
        ("**use** the function sorted.", "use sort_it."),
        ("**use** the function sorted.", "use the function sort_it."),
    ]
    left_out = {"equal_pairs": 0, "versions_not_longer": 1, "versions_cut_short": 0}
    assert data.summary["left_out_of_used_rows"] == left_out
    assert data.outputs["demos"] == [{"prompt": "sort a list", "response": "use sorted."}]
    safe = save(tmp_path / "safety-refuse_filtered.json", [{**STYLED, "domain": "safety-refuse"}])
    assert len(gather(rm_bench=[safe]).outputs["probes_safety"]) == 3


def test_versions_that_stop_in_the_middle_are_left_out(tmp_path):
    chosen = ["use sorted.", "use the function that", "use it:\n```\nsorted(x)\n```"]
    data = gather(rm_bench=[save(tmp_path / "total.json", [STYLED | {"chosen": chosen}])])
    ours = [v for v in data.outputs["verbosity"] if ":right:" in v["source"]]
    assert [v["rejected"] for v in ours] == [chosen[2]]
    assert {p["chosen"] for p in data.outputs["easy"]} == {chosen[2]}
    # The cut version occurs twice: with its concise version, and with the wrong concise answer.
    assert data.summary["left_out_of_used_rows"]["versions_cut_short"] == 2


def test_the_domain_of_a_file_is_used_if_a_row_names_none(tmp_path):
    row = {k: v for k, v in STYLED.items() if k != "domain"}
    path = save(tmp_path / "chat_filtered.json", [row])
    assert read_rm_bench(path)[0].domain == "chat"
    assert domain_of("x/safety-response_filtered.json") == "safety-response"
    assert domain_of("own.jsonl") == "own"


def test_an_address_of_several_files_keeps_their_domains(tmp_path, monkeypatch):
    """The name of each file counts, and not that of the address."""
    row = {name: value for name, value in STYLED.items() if name != "domain"}
    names = [save(tmp_path / f"{name}.json", [row]) for name in ("chat_1", "safety-refuse_1")]
    address = "hf://datasets/o/n/*.json"

    def single_files(source):
        return names if source == address else [source]

    for module in ("benchmark_data", "benchmark_files"):
        monkeypatch.setattr(f"sarm_jax.evaluation.{module}.single_files", single_files)
    domains = [domain_of(str(name)) for name in names]
    assert len(set(domains)) == 2
    assert [row.domain for row in read_rm_bench(address)] == domains
    assert gather(rm_bench=[address]).outputs == gather(rm_bench=names).outputs


def test_rewardbench2_gives_pairs_and_ties_give_candidates(tmp_path):
    path = save(tmp_path / "rb2.jsonl", [CHOICE, *TIES])
    data = gather(rewardbench2=[path])
    assert [p["rejected"] for p in data.outputs["probes_safety"]] == ["yes", "of course"]
    assert "probes_complement" not in data.summary["outputs"]
    best = {row["prompt"]: row for row in data.outputs["bestofn"]}
    assert best["a colour"]["candidates"] == ["red", "blue", "dog"]
    assert best["a colour"]["num_correct"] == 2
    assert best["is it safe"]["candidates"] == ["no", "yes", "of course"]
    assert len(data.outputs["prompts"]) == 3


def test_parquet_gives_the_same_rows_as_json(tmp_path):
    rows = [CHOICE | {"additional_metadata": {"x": 1}}]
    rows += [{"num_correct": len(t["chosen"]), "additional_metadata": None} | t for t in TIES]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    same = save(tmp_path / "test.jsonl", rows)
    assert read_rewardbench2(tmp_path / "test.parquet") == read_rewardbench2(same)
    assert read_rewardbench2(same)[2].tie == ("tied", 3)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"bad.parquet: not parquet"):
        read_rewardbench2(tmp_path / "bad.parquet")


def steering_files(folder):
    question = {"question": "p0", "answer": "good 0", "label": "chosen"}
    save(folder / "train/rewardbenchv2/safety.jsonl", PAIRS[:3])
    save(folder / "train/rm_bench/safety_C.jsonl", PAIRS[3:])
    save(folder / "test/rewardbenchv2/safety_c.jsonl", [question, question | {"id": 3}])
    save(folder / "test/rewardbenchv2/safety_j.jsonl", [{"question": "new", "answer": "bad"}])
    save(folder / "test/rm_bench/safety_C_cj.jsonl", [{"question": "new", "answer": "fine"}])
    return folder


def test_steering_files_by_name(tmp_path):
    data = gather(steering_dir=steering_files(tmp_path))
    assert [p["source"] for p in data.outputs["probes_safety"]] == ["rewardbenchv2:safety"] * 3
    assert {p["source"] for p in data.outputs["probes_complement"]} == {"rm_bench:complement"}
    assert len(data.outputs["prompts"]) == len(data.outputs["demos"]) == 3
    tests = {name: data.outputs[f"test_{name}"] for name in ("safety_chosen", "safety_rejected")}
    assert tests["safety_chosen"] == [{"question": "p0", "answer": "good 0", "type": "chosen"}]
    assert tests["safety_rejected"][0]["type"] == "rejected"
    assert data.outputs["test_complement"][0]["type"] == "complement"
    seen = data.summary["test_prompts_also_trained_on"]
    assert seen == {"test_safety_chosen": 1, "test_safety_rejected": 0, "test_complement": 0}


def test_held_out_prompts_are_only_in_test_sets(tmp_path):
    pairs = [{"prompt": f"q{n // 2}", "chosen": f"g{n}", "rejected": f"b{n}"} for n in range(400)]
    ties = []
    for n in range(40):
        ties += [row | {"id": f"{kind}:{n}", "prompt": f"{kind} {n}"}
                 for kind, row in zip(("ref", "tied"), TIES, strict=True)]  # fmt: skip
    styled = [STYLED | {"prompt": f"q{n}"} for n in range(100, 300)]
    files = {
        "safety_pairs": [save(tmp_path / "own.jsonl", pairs)],
        "rm_bench": [save(tmp_path / "code.json", styled)],
        "rewardbench2": [save(tmp_path / "rb2.jsonl", ties)],
    }
    data = gather(held_out=0.25, **files)
    trained = {row["prompt"] for row in data.outputs["prompts"]}
    held = {row["prompt"] for row in data.outputs["held_out_prompts"]}
    assert not trained & held and len(trained | held) == 300 + 80
    assert 0.18 < len(held) / len(trained | held) < 0.32
    for name in ("probes_safety", "probes_complement", "verbosity", "bestofn", "demos"):
        assert {row["prompt"] for row in data.outputs[name]} <= trained
    for name, rows in data.outputs.items():
        if name.startswith("test_"):
            assert rows and {row["question"] for row in rows} <= held
    assert set(data.summary["test_prompts_also_trained_on"].values()) == {0}
    kept = data.outputs["held_out_rewardbench2"]
    numbers = [row["id"].split(":") for row in kept]
    assert kept and sorted(n for k, n in numbers if k == "ref") == sorted(
        n for k, n in numbers if k == "tied"
    )
    again = read_rm_bench(save(tmp_path / "held.json", data.outputs["held_out_rm_bench"]))
    assert {row.prompt for row in again} <= held and again[0].domain == "code"
    assert gather(held_out=0.25, **files).outputs == data.outputs
    assert gather(held_out=0.25, seed=1, **files).outputs != data.outputs


def test_columns_that_json_cannot_hold_are_dropped(tmp_path):
    odd = {"at": datetime.date(2026, 1, 1), "score": float("nan")}
    rows = [odd | TIES[n % 2] | {"id": f"tied:{n}", "prompt": str(n)} for n in range(1, 99, 2)]
    path = tmp_path / "rb2.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    infinite = json.dumps([STYLED | {"prompt": str(n), "x": 0} for n in range(50)])
    (tmp_path / "code.json").write_text(infinite.replace('"x": 0', '"x": 1e999'))
    files = {"rewardbench2": [path], "rm_bench": [tmp_path / "code.json"]}
    data = gather(held_out=0.9, **files)
    for name, read in (("rewardbench2", read_rewardbench2), ("rm_bench", read_rm_bench)):
        held = tmp_path / f"{name}.jsonl"
        write_jsonl(held, data.outputs[f"held_out_{name}"])
        original = {row.prompt: row for row in read(files[name][0])}
        assert len(read(held)) > 30 and all(row == original[row.prompt] for row in read(held))


def test_prompts_of_the_steering_files_are_never_held_out(tmp_path):
    own = save(tmp_path / "own.jsonl", [PAIRS[0] | {"chosen": f"c{n}"} for n in range(3)])
    data = gather(steering_dir=steering_files(tmp_path / "s"), safety_pairs=[own], held_out=0.999)
    assert not data.outputs["held_out_prompts"]


def test_blank_answers_are_scored_but_give_no_data(tmp_path):
    row = CHOICE | {"rejected": ["", "yes", "no!"]}
    path = save(tmp_path / "rb2.jsonl", [row, CHOICE])
    assert len(read_rewardbench2(path)) == 2
    source = gather(rewardbench2=[path]).summary["sources"][str(path)]
    assert source["refusals"] == [{"place": f"{path}:1", "reason": "an answer is empty"}]


BAD = {
    "nothing.json": (None, "No such file"),
    "empty.jsonl": ("", "the file is empty"),
    "none.json": ("[]", "holds no rows"),
    "cut.json": ('[\n{"prompt": "a",\n', r"cut.json:\d: not JSON"),
    "object.json": ("{}", "object.json:1: field .chosen. is missing"),
    "binary.json": (b"\xff\xfe", "not UTF-8"),
    "two.json": (
        [STYLED | {"chosen": ["a", "b"]}],
        "row 1: field 'chosen' has 2 texts, expected 3",
    ),
    "text.json": ([STYLED | {"rejected": "a"}], "row 1: field 'rejected' must be a list of texts"),
    "number.json": ([3], "row 1: expected an object, found 3"),
    "prompt.json": ([STYLED | {"prompt": " "}], "row 1: field 'prompt' is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_a_usable_row_is_an_error(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if isinstance(content, list):
        save(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: read_rm_bench(path), lambda: gather(rm_bench=[path])):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_correct": 2}, "num_correct=2, but 'chosen' has 1"),
        ({"chosen": ["a", "b"], "num_correct": 2}, "expected 1 outside Ties"),
        ({"subset": "Ties"}, "id='9' of a Ties row: expected ref:N or tied:N"),
        ({"subset": "Ties", "id": "tied:4"}, "needs two or more"),
        ({"subset": 3}, "field 'subset' must be text"),
        ({"rejected": []}, "'rejected' must be a list of texts"),
    ],
)
def test_bad_rows_of_rewardbench2(tmp_path, change, message):
    path = save(tmp_path / "rb2.jsonl", [CHOICE, CHOICE | change])
    with pytest.raises(InputError, match=rf"rb2.jsonl:2: .*{message}"):
        read_rewardbench2(path)


def test_bad_folders_and_options(tmp_path):
    with pytest.raises(InputError, match="steering_dir=.*none: no such directory"):
        gather(steering_dir=tmp_path / "none")
    with pytest.raises(InputError, match="no train/"):
        gather(steering_dir=tmp_path)
    odd = save(tmp_path / "train/rm_bench/chat.jsonl", PAIRS)
    with pytest.raises(InputError, match=f"{odd}: expected safety.jsonl"):
        gather(steering_dir=tmp_path)
    with pytest.raises(InputError, match="name prepare_data.steering_dir"):
        gather()
    with pytest.raises(InputError, match=r"held_out_fraction=1.0: must lie in \[0, 1\)"):
        gather(safety_pairs=[odd], held_out=1.0)
