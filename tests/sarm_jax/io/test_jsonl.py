import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import line_of, read_jsonl, write_jsonl

FIELDS = {"prompt": str, "score": float, "n": int, "parts": list}
GOOD = '{"prompt": "a", "score": 1, "n": 2, "parts": ["x"]}'


def test_round_trip_keeps_unicode_line_separators_and_extra_fields(tmp_path):
    rows = [{"prompt": "é\u2028\n\x85 ✓", "source": "x"}, {"prompt": "b"}]
    write_jsonl(tmp_path / "new" / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "new" / "a.jsonl", {"prompt": str}) == rows


def test_the_last_line_may_lack_its_newline_and_lines_may_end_in_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{GOOD}\r\n{GOOD}".encode())
    assert len(read_jsonl(path, FIELDS)) == 2


BLANK = "\n  \n\r\n\t\n"  # four lines


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{BLANK}{GOOD}\n{BLANK}{GOOD}\n{BLANK}")
    assert read_jsonl(path, FIELDS) == read_jsonl(path, FIELDS, lenient=True)
    assert len(read_jsonl(path, FIELDS)) == 2
    assert [line_of(path, row) for row in (1, 2)] == [5, 10]
    path.write_text(f"{BLANK}{GOOD}\n{BLANK}{{broken\n")
    with pytest.raises(InputError, match=f"{path}:10: .*broken"):
        read_jsonl(path, FIELDS)
    path.write_text(BLANK)
    with pytest.raises(InputError, match="the file is empty"):
        read_jsonl(path, FIELDS)


def test_the_line_of_a_row_without_a_file_is_its_number(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff")
    for path in ("probe.data_jsonl", "", tmp_path, tmp_path / "none", tmp_path / "binary"):
        assert line_of(path, 7) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "{broken"),
        ("[1]", "found [1]"),
        ('{"prompt": "a", "score": 1, "n": 2}', "'parts' is missing"),
        (GOOD.replace('"a"', '" "'), "'prompt' is empty"),
        (GOOD.replace('["x"]', "[]"), "'parts' is empty"),
        (GOOD.replace('"a"', "3"), "'prompt' must be str, found 3"),
        (GOOD.replace("2", "2.5"), "'n' must be int, found 2.5"),
        (GOOD.replace("2", "true"), "'n' must be int, found true"),
        (GOOD.replace("1", "null"), "'score' must be float, found null"),
    ],
)
def test_the_error_for_a_bad_line_names_it_and_quotes_its_value(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(InputError) as error:
        read_jsonl(path, FIELDS)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), (b"", "empty"), (b'{"a": "\xff"}', "UTF-8")]
)
def test_a_bad_file_is_named(tmp_path, content, problem):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        read_jsonl(path, {"a": str})
    assert str(path) in str(error.value)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": "old"}])
    with pytest.raises(ValueError, match="Out of range"):
        write_jsonl(path, [{"a": "new"}, {"a": float("nan")}])
    assert read_jsonl(path, {"a": str}) == [{"a": "old"}]
    assert list(tmp_path.iterdir()) == [path]
