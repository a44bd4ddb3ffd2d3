"""Rows in every format that people keep them in, written by the libraries that write them."""

import gzip
import json
import shutil
import subprocess

import datasets
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from sarm_jax.io import compression, row_files
from sarm_jax.io.errors import InputError
from sarm_jax.io.row_files import parse_rows, place_of, read_placed_rows, read_rows

ROWS = [
    {"prompt": [{"role": "user", "content": "é\u2028 ✓"}], "text": "a", "n": 1, "parts": ["x"]},
    {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "\n"}],
        "text": "b",
        "n": 2,
        "parts": [],
    },
]
FIELDS = {"prompt": list, "text": str, "n": int}


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def parquet_bytes(rows, **options) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


FORMATS = {"lines": lines, "array": array, "parquet": parquet_bytes}
PACKERS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_rows_under_any_name(tmp_path, format, packer):
    content = PACKERS[packer](FORMATS[format](ROWS))
    for name in ("x.jsonl", "x.json", "x.jsonl.gz", "x.parquet", "x.zst", "x"):
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name, FIELDS) == ROWS
        assert read_rows(str(tmp_path / name), {}) == ROWS


def write_with_datasets(rows, folder):
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "a.parquet")
    table.to_json(folder / "a.jsonl")
    table.to_json(folder / "b.json", lines=False, orient="records")
    table.to_json(folder / "c.jsonl.gz", compression="gzip")


def write_with_pandas(rows, folder):
    frame = pandas.DataFrame(rows)
    frame.to_parquet(folder / "a.parquet")
    frame.to_parquet(folder / "b.parquet", compression="zstd", index=False)
    frame.to_json(folder / "a.jsonl", orient="records", lines=True)
    frame.to_json(folder / "a.json", orient="records")
    frame.to_json(folder / "a.jsonl.gz", orient="records", lines=True)


def write_with_pyarrow(rows, folder):
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "a.parquet", row_group_size=1, compression="gzip")
    text = table.column("text").dictionary_encode()
    table = table.set_column(table.column_names.index("text"), "text", text)
    parquet.write_table(table, folder / "b.parquet", version="1.0")


def write_with_tools(rows, folder):
    for tool in ("gzip", "zstd"):
        if shutil.which(tool):
            (folder / "a.jsonl").write_bytes(lines(rows))
            subprocess.run([tool, "-q", "-k", folder / "a.jsonl"], check=True)


WRITERS = (write_with_datasets, write_with_pandas, write_with_pyarrow, write_with_tools)


@pytest.mark.parametrize("write", WRITERS)
def test_files_of_other_libraries(tmp_path, write):
    write(ROWS, tmp_path)
    for path in tmp_path.iterdir():
        assert read_rows(path, FIELDS) == ROWS, path


def test_members_one_behind_the_other_are_all_read():
    first, second = lines(ROWS[:1]), lines(ROWS[1:])
    for pack in (gzip.compress, zstd):
        rows = parse_rows(pack(first) + pack(second), "x")
        assert [row.content for row in rows] == ROWS
        assert [row.place for row in rows] == ["x:1", "x:2"]


def test_null_in_parquet_is_a_missing_field():
    rows = [{"a": "x", "source": None, "m": [{"r": "u", "name": None}]}, {"a": "y", "source": "s"}]
    contents = [row.content for row in parse_rows(parquet_bytes(rows), "x")]
    assert contents == [{"a": "x", "m": [{"r": "u"}]}, {"a": "y", "source": "s"}]


@pytest.mark.parametrize("format", FORMATS)
def test_places(tmp_path, format):
    path = tmp_path / "x"
    path.write_bytes(FORMATS[format](ROWS))
    places = [f"{path}:1", f"{path}:2"]
    if format != "lines":
        places = [f"{path}: row 1", f"{path}: row 2"]
    assert [row.place for row in read_placed_rows(path)] == places
    assert [place_of(path, number) for number in (1, 2, 3)] == [*places, f"{path}:3"]
    path.write_bytes(b"\n\n" + lines(ROWS[:1]))
    assert place_of(path, 1) == f"{path}:3"
    assert place_of(tmp_path / "none", 7) == f"{tmp_path}/none:7"
    assert place_of("prompts", 7) == "prompts:7"


def test_parquet_of_many_batches(monkeypatch):
    rows = [{"n": n, "text": str(n)} for n in range(10)]
    monkeypatch.setattr(row_files, "BATCH", 3)
    content = parquet_bytes(rows, row_group_size=4)
    assert [row.content for row in parse_rows(content, "x")] == rows


BAD_ROWS = {  # the second row, and what the message says
    "missing": ({"n": 1}, "field 'text' is missing"),
    "type": ({"n": 1, "text": 3}, "field 'text' must be str, found 3"),
    "list": ({"n": 1, "text": ["a"]}, "field 'text' must be str, found [\"a\"]"),
    "blank": ({"n": 1, "text": " "}, "field 'text' is empty"),
    "number": ({"n": 1.5, "text": "a"}, "field 'n' must be int, found 1.5"),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, kind, format, packer):
    bad, message = BAD_ROWS[kind]
    # One type for a column of Parquet, so that there both rows are bad but for one field.
    good = {"n": 1, "text": "a"} if format != "parquet" or kind in ("missing", "blank") else bad
    path = tmp_path / "x"
    path.write_bytes(PACKERS[packer](FORMATS[format]([good, bad])))
    place = f"{path}:2: " if format == "lines" else f"{path}: row {1 + (good != bad)}: "
    with pytest.raises(InputError) as error:
        read_rows(path, {"text": str, "n": int})
    assert str(error.value).startswith(place + message)


def table_bytes(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def not_text() -> bytes:
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"a\xff")]
    )
    return table_bytes(text=text)


def column_twice() -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), sink)
    return sink.getvalue().to_pybytes()


TABLE = parquet_bytes(ROWS)
BAD_FILES = {
    "nothing": (b"", "x: the file is empty"),
    "blanks, packed": (gzip.compress(b" \n"), "x: the file is empty"),
    "no rows": (b" []", "x: holds no rows"),
    "no rows of Parquet": (table_bytes(a=pyarrow.array([], pyarrow.string())), "x: holds no rows"),
    "object": (
        b'{\n"data": [{"text": "a"}]}',
        "x: is one JSON object over several lines, expected",
    ),
    "object on a line": (b'{"data": [1]}', "x:1: field 'text' is missing, found ['data']"),
    "not UTF-8": (b'[{"text": "\xff"}]', "x: not UTF-8 (byte 11"),
    "not UTF-8, packed": (zstd(b'{"text": "\xff"}'), "x: not UTF-8 (byte 10"),
    "not UTF-8 in Parquet": (not_text(), "x: row 2: not UTF-8"),
    "cut array": (b'[{"text": "a"},\n', "x:2: not JSON (Expecting value)"),
    "NaN": (b'[{"text": "a"},\n {"text": "a", "n": NaN}]', "x: row 2: NaN is not a number in JSON"),
    "key twice": (b'[1, {"a": 1, "a": 2}]', "x: row 2: key 'a' appears twice"),
    "half a pair": (b'[{"text": "\\ud83d"}]', "x: row 1: '\\ud83d' is half of a surrogate pair"),
    "nesting bomb": (b"[" * 100_000, "x: row 1: it is nested too deeply"),
    "number": (b'[{"text": "a"}, 3]', "x: row 2: expected a JSON object, found 3"),
    "bytes": (table_bytes(text=[b"a"]), "x: row 1: field 'text' must be str, found \"b'a'\""),
    "column twice": (column_twice(), "x: column 'a' appears twice"),
    "Parquet without an end": (TABLE[:-20], "x: not parquet ("),
    "Parquet with a bad end": (TABLE[:-40] + b"\xff" * 32 + TABLE[-8:], "x: not parquet ("),
    "Parquet with a bad page": (TABLE[:30] + bytes(60) + TABLE[90:], "x: not parquet ("),
    "packed twice": (gzip.compress(gzip.compress(b"{}")), "x: is compressed with gzip: unpack it"),
    "bzip2": (b"BZh9", "x: is compressed with bzip2: unpack it, expected JSON Lines"),
}
for packer_name in ("gzip", "zstd"):
    PACKED = PACKERS[packer_name](lines(ROWS))
    PROBLEM = f"x: cannot be unpacked with {packer_name} ("
    BAD_FILES |= {
        f"cut {packer_name}": (PACKED[:-3], PROBLEM),
        f"start of {packer_name}": (PACKED[:5], PROBLEM),
        f"cut second {packer_name}": (PACKED + PACKED[:-3], PROBLEM),
        f"{packer_name} and something else": (PACKED + b"something else", PROBLEM),
        f"damaged {packer_name}": (PACKED[:20] + b"~~~~" + PACKED[24:], PROBLEM),
    }


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_on_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_FILES[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows("x", {"text": str})
    assert str(error.value).startswith(message) and str(error.value).isprintable()


def test_a_file_that_is_huge_once_it_is_unpacked_is_refused():
    bombs = [pack(bytes(3 << 20)) for pack in (gzip.compress, zstd)]
    bombs.append(table_bytes(a=["x" * 1000] * 3000))  # once in the file
    bombs.append(table_bytes(a=pyarrow.nulls(100_000)))
    for content in bombs:
        assert len(content) < 30_000
        with pytest.raises(InputError, match="^x: has more than 2,097,152 bytes unpacked"):
            parse_rows(content, "x", max_bytes=2 << 20)


def test_zstd_that_is_not_installed(monkeypatch):
    content = zstd(lines(ROWS))
    codec = type("Codec", (), {"is_available": staticmethod(lambda name: False)})
    monkeypatch.setattr(pyarrow, "Codec", codec)
    with pytest.raises(InputError, match="^x: the installed pyarrow cannot read zstd: install"):
        compression.unpacked(content, "x")
