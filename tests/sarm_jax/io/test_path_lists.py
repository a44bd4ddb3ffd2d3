"""Lists of paths: what is written into a list comes out of it again, whatever its characters."""

import itertools
import json
from pathlib import Path

import pytest

from sarm_jax.evaluation.benchmark_files import named_files
from sarm_jax.features.feature_lists import parse_features, parse_values
from sarm_jax.io.errors import InputError
from sarm_jax.io.path_lists import (
    ListInFile,
    escaped,
    list_entries,
    named_paths,
    relocated,
    short_names,
    split_entries,
    split_name,
    split_paths,
    unescaped,
)
from sarm_jax.io.workdir import named_workdirs

# Names of folders that contain what separates something in a list, or what surrounds a value.
NAMES = [
    "plain", "a=b", "a,b", "a:b", "@a", "[a]", "a[:2]", "a b", " a ", "  ", "a\\", "\\,", "\\\\",
    "a\\=b",
    "%s", "%(x)s", "{workdir}", "{}", "\udc80\udcff", "ü", "日本", "a\u00a0", "\u2003a", "#", "~",
    "$HOME",
    "none", "3", "-1", "*", "?", "a=b,c=d:e[:1]", "@a:b[:1],@c:d", "=", ",", ":", "\\ ", "\t",
]  # fmt: skip
PATHS = [f"/tmp/{name}/f.json" for name in NAMES] + [name for name in NAMES if name != "  "]


@pytest.mark.parametrize("path", PATHS)
def test_an_escaped_path_comes_out_of_every_list(path):
    text = escaped(path)
    assert unescaped(text) == path and split_paths(text) == (path,)
    assert split_paths(f" {text} , other,{text}") == (path, "other", path)
    assert [unescaped(entry) for entry in split_entries(f"{text},b")] == [path, "b"]
    for name in ("", "n", "n m", "a=b"):
        entry = f"{escaped(name)}={text}" if name else text
        assert split_name(entry) == (name, path)
        assert named_paths(f"{entry},x=y", "option", "DIR") == [(name, path), ("x", "y")]
    for key, count in itertools.product(("tau", "a=b", "a b"), (None, "0", "12")):
        item = ListInFile(path, key, count)
        found = list_entries("option", f"3,{item} , none")
        assert found == ["3", item, "none"]
        assert (
            relocated(f"3,{item}", lambda p: f"{p},") == f"3,{ListInFile(path + ',', key, count)}"
        )


@pytest.mark.parametrize("name", [n for n in NAMES if n.strip() and not n.startswith("\t")])
def test_every_parser_reads_the_file_that_is_meant(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "f.json").write_text(json.dumps({"tau": [0.5, 2.0], "ids": [4, 9]}))
    file = escaped(str(folder / "f.json"))
    assert parse_values("o", f"1.0,@{file}:tau") == (1.0, 0.5, 2.0)
    assert parse_features("o", f"@{file}:ids[:1],3") == (4, 3)
    assert parse_features("o", f"@{file}:ids[:0]") == ()
    assert named_workdirs(f"x={escaped(str(folder))},y=b", Path(), "o")["x"] == folder
    assert list(named_workdirs(escaped(str(folder)), Path(), "o").values()) == [folder]
    assert list(named_workdirs("", folder, "o").values()) == [folder]
    assert [f.path for f in named_files([f"n={file}", "m=x"], "o")] == [str(folder / "f.json"), "x"]


@pytest.mark.parametrize("text, expected", [
    ("a", ("", "a")),
    ("n=a", ("n", "a")),
    ("full method=c=d/e", ("full method=c", "d/e")),
    ("/x/a=b/c", ("", "/x/a=b/c")),
    ("n=/x/a=b/c", ("n", "/x/a=b/c")),
    ("lr=0.1/x", ("lr", "0.1/x")),
    ("C:\\a\\b", ("", "C:\\a\\b")),
])  # fmt: skip
def test_names_without_escapes(text, expected):
    assert split_name(text) == expected


@pytest.mark.parametrize("text", ["a,,b", ",", "a,", " ", ""])
def test_empty_entries_are_refused(text):
    with pytest.raises(InputError, match="expected file names with commas"):
        split_paths(text)


def test_a_typed_path_with_colons_and_brackets_needs_no_escape():
    assert list_entries("o", "@/tmp/a:b/[c]/f.json:tau[:2]") == [
        ListInFile("/tmp/a:b/[c]/f.json", "tau", "2")
    ]


def test_short_names_of_no_paths():
    assert short_names([]) == {}
