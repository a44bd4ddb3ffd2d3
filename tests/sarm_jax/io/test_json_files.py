"""JSON files are read strictly, with errors that name the file, and written atomically."""

import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import parse_json, read_json, write_json


def test_round_trip_with_the_values_that_python_writes(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"é": float("inf")}}
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text().startswith('{\n  "b": [\n')
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(InputError, match="Infinity is not a number in JSON"):
        read_json(tmp_path / "a.json", allow_nan=False)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{\n"a": 1,\n}', "line 3 column 1 (char 10)"),
        (b'{"a": "\xff"}', "not JSON ('utf-8' codec can't decode byte 0xff"),
        (b'\xef\xbb\xbf{"a": 1}', "it starts with a byte order mark"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' appears twice"),
        (b'{"a": "\\ud800"}', r"'\ud800' is half of a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000, "it is nested too deeply"),
        (b"[1, 2]", "expected the options of a run, found [1, 2]"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(tmp_path, content, problem):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path, expected="the options of a run")
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)
    with pytest.raises(InputError, match=r"^plan.prompt_lengths=x: "):
        read_json(path, "plan.prompt_lengths=x")


def test_a_directory_or_a_device_is_not_read(tmp_path):
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="is not a file"):
            read_json(path)


def test_half_of_a_surrogate_pair_is_accepted_on_request():
    assert parse_json('"\\ud800"', allow_surrogates=True) == "\ud800"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": "old"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
