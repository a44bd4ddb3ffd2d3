"""Data sets on the hub: which files are read, from a server on this machine and from its cache."""

import hashlib
import http.server
import json
import threading
import urllib.parse

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from sarm_jax.io.errors import InputError
from sarm_jax.io.hub_files import local_files, single_files, training_files
from sarm_jax.io.row_files import place_of, read_rows

COMMIT = "a" * 40
API = "/api/datasets/owner/name"


def table(*texts: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": text} for text in texts]), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "README.md": b"A data set.",
    "data/train-00000-of-00002.parquet": table("a", "b"),
    "data/train-00001-of-00002.parquet": table("c"),
    "data/test-00000-of-00001.parquet": table("t"),
    "more/lines.jsonl": b'{"prompt": "l"}\n',
    "converted/default/0000.parquet": table("x"),
    "converted/default/0001.parquet": table("y"),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that lists and serves the files of one data set."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body=True):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        content = self.content(path)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def content(self, path: str) -> bytes | None:
        if path.startswith(f"{API}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in FILES.items()
            ]
            return json.dumps(entries).encode()
        if path in (API, f"{API}/revision/main", f"{API}/revision/{COMMIT}"):
            files = [{"rfilename": name} for name in FILES]
            return json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": files}).encode()
        _, _, end = path.partition("/datasets/owner/name/resolve/")
        return FILES.get(end.partition("/")[2])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts a hub with an empty cache; returns a function that disconnects it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def disconnect():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()  # the next session will be one without a connection

    yield disconnect
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def prompts(source: str) -> list[str]:
    return [row["prompt"] for row in read_rows(source, {"prompt": str})]


ADDRESSES = {
    "hf://datasets/owner/name": ["a", "b", "c"],
    "hf://datasets/owner/name@main": ["a", "b", "c"],
    "hf://datasets/owner/name/data/test-00000-of-00001.parquet": ["t"],
    "hf://datasets/owner/name@main/more/lines.jsonl": ["l"],
    "hf://datasets/owner/name/data/tr*.parquet": ["a", "b", "c"],
}


def test_files_are_downloaded_and_then_read_without_a_connection(hub):
    for source, expected in ADDRESSES.items():
        assert prompts(source) == expected
    hub()
    for source, expected in ADDRESSES.items():
        assert prompts(source) == expected
    whole = "hf://datasets/owner/name"
    assert place_of(whole, 3) == f"{whole}/data/train-00001-of-00002.parquet: row 1"
    assert place_of(f"{whole}@main", 1) == f"{whole}@main/data/train-00000-of-00002.parquet: row 1"
    assert place_of(f"{whole}/more/lines.jsonl", 1) == f"{whole}/more/lines.jsonl:1"


def test_a_partial_cache_is_never_taken_for_the_whole(hub):
    first = "hf://datasets/owner/name/data/train-00000-of-00002.parquet"
    assert prompts(first) == ["a", "b"]
    hub()
    with pytest.raises(InputError, match="name: 1 of 2 files: data/train-00000-of-00002.parquet"):
        prompts("hf://datasets/owner/name")
    for source in ("hf://datasets/owner/other", "hf://datasets/owner/name@v2", f"{first}x"):
        with pytest.raises(InputError, match=f"^{source}: cannot be downloaded .*local file$"):
            prompts(source)


def test_without_a_connection_names_must_show_that_a_set_is_whole(hub):
    """Of files named 0000.parquet and so on, the cache may hold the last ones only."""
    whole = "hf://datasets/owner/name/converted/default/*.parquet"
    assert prompts(f"{whole[:-9]}0001.parquet") == ["y"]
    hub()
    with pytest.raises(InputError, match="names such as converted/default/0001"):
        prompts(whole)
    assert prompts(f"{whole[:-9]}0001.parquet") == ["y"]


def test_single_files_of_an_address(hub):
    """Readers that take the domain from a file's name read the files one by one."""
    base = "hf://datasets/owner/name"
    names = [f"{base}/converted/default/000{n}.parquet" for n in (0, 1)]
    assert single_files(f"{base}/converted/*/*.parquet") == names
    assert [prompts(name) for name in names] == [["x"], ["y"]]
    assert single_files("a/*.jsonl") == ["a/*.jsonl"]


def test_a_conversion_that_was_cut_off_is_no_training_split():
    with pytest.raises(InputError, match="has no training split"):
        training_files(["default/partial-train/0000.parquet"], "hf://datasets/o/n")


def test_a_download_that_is_not_complete(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    message = "not downloaded, and not in the cache: data/train-00000-of-00002.parquet, data/train"
    with pytest.raises(InputError, match=message):
        prompts("hf://datasets/owner/name")


def test_what_the_hub_does_not_have(hub):
    for source in ("hf://datasets/owner/other", "hf://datasets/owner/name/data/x.parquet"):
        with pytest.raises(InputError, match=f"^{source}: cannot be downloaded .*local file$"):
            prompts(source)
    with pytest.raises(InputError, match=r"no file matches, found README.md, data/train-"):
        prompts("hf://datasets/owner/name/x*")


@pytest.mark.parametrize(
    "source", ["hf://models/a/b/c", "hf://datasets/a", "https://a.b/c.jsonl", "hf://", "s3://a/b"]
)
def test_other_addresses(source):
    with pytest.raises(InputError) as error:
        local_files(source)
    expected = "expected a path or hf://datasets/OWNER/NAME[@REVISION]/PATH"
    assert str(error.value) == f"{source}: {expected}"


def test_revisions(tmp_path, monkeypatch):
    requests = []

    def download(repository, name, **options):
        requests.append((repository, name, options["repo_type"], options["revision"]))
        return str(tmp_path / "x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    converted = "hf://datasets/a/b@refs/convert/parquet/default/train/0000.parquet"
    sources = ("hf://datasets/a/b-2@v1/t.parquet", "hf://datasets/a/b/c/t.json", converted)
    for source in sources:
        (file,) = local_files(source)
        assert file.path == tmp_path / "x" and file.name == source
    assert requests == [
        ("a/b-2", "t.parquet", "dataset", "v1"),
        ("a/b", "c/t.json", "dataset", None),
        ("a/b", "default/train/0000.parquet", "dataset", "refs/convert/parquet"),
    ]


CHOSEN = {  # the files of a data set, the ones that are read last
    "shards": ("README.md d/train-00000-of-00002.parquet d/train-00001-of-00002.parquet", 2),
    "hash": ("d/test-00000-of-00001-0123456789abcdef.parquet "
             "d/train-00000-of-00001-0123456789abcdef.parquet", 1),
    "converted": ("default/test/0000.parquet default/train/0000.parquet default/train/0001.parquet",
                  2),
    "packed": ("dev.jsonl.zst test.jsonl.gz train.jsonl.gz", 1),
    "training": ("validation.json my_training_set.json", 1),
    "no split": (".gitattributes dataset_infos.json image.png pairs.jsonl", 1),
    "no split, shards": ("a-00000-of-00002.parquet a-00001-of-00002.parquet", 2),
    "hidden": (".cache/train.parquet _old/train.parquet data/train.parquet", 1),
    "words that contain a split": ("contest.json", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_training_files(name):
    names, count = CHOSEN[name]
    assert training_files(names.split()[::-1], "x") == names.split()[-count:]


REFUSED = {
    "README.md images/a.png": "x: has no Parquet, JSON or JSON Lines file, name one",
    "test.json": "x: has no training split, name one as .../PATH: test.json",
    "b.json test.json": "x: has no training split, name one as .../PATH: b.json, test.json",
    "a/train.jsonl b/train.jsonl": "name a file as .../PATH: a/train.jsonl, b/train.jsonl",
    "train.jsonl train.parquet": "x: has more than one set of rows",
    "a.json b.json": "x: has more than one set of rows",
    "train_a-00000-of-00001.json train_b-00000-of-00001.json": "more than one set of rows",
    "train-00000-of-00003.json train-00002-of-00003.json": "x: 2 of 3 files: train-00000-of",
    " ".join(f"{n}/train.json" for n in range(9)): "7/train.json, … (9 in all)",
}


@pytest.mark.parametrize("names", REFUSED)
def test_files_that_leave_a_doubt(names):
    with pytest.raises(InputError) as error:
        training_files(names.split(), "x")
    assert REFUSED[names] in str(error.value)
