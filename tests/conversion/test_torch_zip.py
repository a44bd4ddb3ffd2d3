"""Human latents in files of torch.save are read as torch reads them, without running code."""

import contextlib
import copy
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion import cli, human_latents
from conversion.torch_zip import MAX_PROGRAM_BYTES, read_object
from sarm_jax.io.errors import InputError
from sarm_jax.rewards.human_latents import load_human_latents

Z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
IDS = [3, 48659, 700, 65535]


def saved(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


def converted(path: Path, content) -> tuple[np.ndarray, tuple[int, ...]]:
    """Saves a file with torch, converts it with the command, and loads it as the stages do."""
    source = saved(path / "human.pt", content)
    human_latents.convert(source, path / "human.safetensors")
    human = load_human_latents(path / "human.safetensors")
    return human.z_ns, human.latent_indices


TENSORS = {
    "float32": Z,
    "float16": Z.half(),
    "bfloat16": Z.bfloat16(),
    "transposed": Z.T.contiguous().T,
    "columns of a larger one": torch.randn(5, 9)[:, 3:7],
    "rows of a larger one": torch.randn(9, 4)[2:7],
    "every second row": torch.randn(10, 4)[::2],
    "one column": Z[:, :1],
    "one row": Z[:1],
    "with a gradient": Z.clone().requires_grad_(),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("named", [True, False])
def test_files_of_torch_are_read_as_torch_reads_them(tmp_path, name, named):
    z = TENSORS[name]
    ids = IDS[: z.shape[1]] if named else None
    z_ns, indices = converted(tmp_path, {"latent_indices": ids, "z": z})
    read = torch.load(tmp_path / "human.pt", weights_only=True)
    np.testing.assert_array_equal(z_ns, read["z"].detach().float().numpy())
    assert z_ns.dtype == np.float32 and indices == tuple(ids or range(z.shape[1]))


def test_all_65536_features_and_a_list_of_as_many(tmp_path):
    z = torch.randn(3, 65_536)
    ids = torch.randperm(65_536).tolist()
    z_ns, indices = converted(tmp_path, {"latent_indices": ids, "z": z})
    assert indices == tuple(ids) and np.array_equal(z_ns, z.numpy())


def test_two_tensors_of_one_storage(tmp_path):
    content = read_object(saved(tmp_path / "a.pt", {"a": Z, "b": Z[1:, 1], "n": [None, True, ()]}))
    np.testing.assert_array_equal(content["b"], Z[1:, 1].numpy())
    np.testing.assert_array_equal(content["a"], Z.numpy())
    assert content["n"] == [None, True, ()]


# ---- what is refused


class Hostile:
    """An object that calls os.system when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def archive(path: Path, program: bytes, storage: bytes = b"", compression=zipfile.ZIP_STORED):
    """Writes a zip archive in the layout of torch.save with any program and storage."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/byteorder", "little")
        file.writestr("x/data/0", storage)
    return path


class Name:
    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Described(pickle._Pickler):
    """Pickles a tensor as torch does, but with any sizes."""

    def __init__(self, file):
        super().__init__(file, 2)

    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.called)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Call:
    def __init__(self, called, *arguments):
        self.called, self.arguments = called, arguments


def described(
    size=20, offset=0, shape=(5, 4), strides=(4, 1), storage="FloatStorage", key="0"
) -> bytes:
    storage_id = "storage", Name("torch", storage), key, "cpu", size
    hooks = Call(Name("collections", "OrderedDict"))
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    z = Call(rebuild, storage_id, offset, shape, strides, False, hooks)
    file = io.BytesIO()
    Described(file).dump({"latent_indices": IDS, "z": z})
    return file.getvalue()


def test_the_oracle_describes_tensors_as_torch_does(tmp_path):
    path = archive(tmp_path / "a.pt", described(), Z.numpy().tobytes())
    np.testing.assert_array_equal(read_object(path)["z"], Z.numpy())


GOOD, STORAGE = {"latent_indices": IDS, "z": Z}, Z.numpy().tobytes()
BAD = {  # name → (function that writes the file, part of the message)
    "a call": (lambda p: saved(p, GOOD | {"x": Hostile()}), "names 'posix system'"),
    "a call in place of the latents": (lambda p: saved(p, Hostile()), "names 'posix system'"),
    "a call by another protocol": (
        lambda p: saved(p, GOOD | {"x": Hostile()}, pickle_protocol=4),
        "an instruction",
    ),
    "an older layout": (
        lambda p: saved(p, GOOD, _use_new_zipfile_serialization=False),
        "no whole zip archive",
    ),
    "a bare pickle": (lambda p: p.write_bytes(pickle.dumps(Hostile())), "no whole zip archive"),
    "a parameter": (lambda p: saved(p, {"z": torch.nn.Parameter(Z)}), "_rebuild_parameter"),
    "integers": (lambda p: saved(p, GOOD | {"z": Z.long()}), "torch LongStorage"),
    "doubles": (lambda p: saved(p, GOOD | {"z": Z.double()}), "torch DoubleStorage"),
    "a bare tensor": (lambda p: saved(p, Z), "holds a tensor, expected a dict"),
    "a list": (lambda p: saved(p, [Z]), "holds a list, expected a dict"),
    "other keys": (lambda p: saved(p, {"z": Z}), "holds 'z', expected 'latent_indices' and 'z'"),
    "more keys": (lambda p: saved(p, GOOD | {"a": 1}), "holds 'a', 'latent_indices', 'z'"),
    "a vector": (lambda p: saved(p, GOOD | {"z": Z[0]}), "found shape [4]"),
    "no rows": (lambda p: saved(p, GOOD | {"z": Z[:0]}), "found shape [0, 4]"),
    "no tensor": (lambda p: saved(p, GOOD | {"z": [1]}), "a matrix [responses, features], found"),
    "NaN": (lambda p: saved(p, GOOD | {"z": Z * torch.nan}), "z must hold finite numbers"),
    "few indices": (lambda p: saved(p, GOOD | {"latent_indices": IDS[:3]}), "4 columns for 3"),
    "an index twice": (lambda p: saved(p, GOOD | {"latent_indices": [1] * 4}), "a feature twice"),
    "an index below 0": (
        lambda p: saved(p, GOOD | {"latent_indices": [-1, 1, 2, 3]}),
        "feature ids",
    ),
    "truths for indices": (
        lambda p: saved(p, GOOD | {"latent_indices": [True] * 4}),
        "feature ids",
    ),
    "indices in a tensor": (
        lambda p: saved(p, GOOD | {"latent_indices": torch.ones(4)}),
        "latent_indices must be a list or None",
    ),
    "a storage too short": (lambda p: archive(p, described(), STORAGE[:-4]), "has 76 bytes"),
    "a storage too long": (lambda p: archive(p, described(), STORAGE + b"1234"), "has 84 bytes"),
    "a storage that is missing": (lambda p: archive(p, described(key="9")), "'data/9' is missing"),
    "a storage outside": (
        lambda p: archive(p, described(key="../../etc/passwd")),
        "'data/../../etc/passwd' is missing",
    ),
    "a view beyond its storage": (
        lambda p: archive(p, described(strides=(8, 1)), STORAGE),
        "reaches beyond its 20 elements",
    ),
    "an offset beyond its storage": (
        lambda p: archive(p, described(offset=1), STORAGE),
        "reaches beyond its 20 elements",
    ),
    "strides backwards": (lambda p: archive(p, described(strides=(4, -1)), STORAGE), "damaged"),
    "a shape below 0": (lambda p: archive(p, described(shape=(-5, -4)), STORAGE), "damaged"),
    "strides of fewer dimensions": (lambda p: archive(p, described(strides=(4,))), "damaged"),
    "very many dimensions": (
        lambda p: archive(p, described(shape=(1,) * 9, strides=(1,) * 9), STORAGE),
        "damaged",
    ),
    "a small storage that is repeated": (
        lambda p: saved(p, GOOD | {"z": torch.ones(1).expand(1 << 20, 1 << 16)}),
        "in a storage of 1 elements",
    ),
    "a claim of terabytes": (
        lambda p: archive(p, described(size=2**31 - 1, shape=(2**15, 2**15)), STORAGE),
        "has 80 bytes",
    ),
    "a storage that unfolds": (
        lambda p: archive(p, described(), bytes(1 << 24), zipfile.ZIP_DEFLATED),
        "is compressed or encrypted",
    ),
    "a huge program": (
        lambda p: archive(p, b"N" * (MAX_PROGRAM_BYTES + 1)),
        "entry 'data.pkl' has 4,194,305 bytes",
    ),
    "big-endian": (
        lambda p: spoilt(p, "byteorder", lambda content: b"big"),
        "byte order b'big'",
    ),
    "no program": (lambda p: other_names(p), "not written by torch.save"),
    "a program that is cut off": (lambda p: archive(p, described()[:-9], STORAGE), "damaged"),
    "an empty program": (lambda p: archive(p, b""), "damaged"),
    "a program of nothing": (lambda p: archive(p, b"."), "damaged"),
    "a far place in the memo": (
        lambda p: archive(p, b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"."),
        "holds a NoneType",
    ),
    "an archive that is cut off": (
        lambda p: p.write_bytes(saved(p, GOOD).read_bytes()[:-30]),
        "no whole zip archive",
    ),
    "an archive with a byte changed": (
        lambda p: p.write_bytes(saved(p, GOOD).read_bytes().replace(STORAGE[:9], b"x" * 9)),
        "Bad CRC-32",
    ),
    "no archive": (lambda p: p.write_text("hello"), "no whole zip archive"),
    "an empty file": (lambda p: p.write_bytes(b""), "no whole zip archive"),
    "a directory": (lambda p: p.mkdir(), "is not a file but a directory"),
    "no file": (lambda p: None, "cannot be read (No such file or directory)"),
}


def spoilt(path: Path, name: str, change) -> None:
    """Writes a file with torch.save and changes one of its entries."""
    with zipfile.ZipFile(saved(path, GOOD)) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, change(content) if entry.endswith(f"/{name}") else content)


def other_names(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "text")


@pytest.mark.parametrize("name", BAD)
def test_everything_else_is_refused_in_one_line_and_nothing_is_run(
    tmp_path, monkeypatch, capfd, name
):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[name]
    make(tmp_path / "human.pt")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        arguments = ["human_latents", "--src=human.pt", "--dst=new/human.safetensors"]
        cli.run(human_latents.main, copy.deepcopy(human_latents.FLAGS), "", arguments)
    shown = capfd.readouterr().err
    assert stopped.value.code == 2 and shown.startswith("error: human.pt: "), shown
    assert shown.count("\n") == 1 and shown.strip().isprintable() and message in shown
    assert sorted(tmp_path.iterdir()) == before  # no "pwned", no "new"


def test_torch_runs_the_code_in_the_hostile_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(saved(tmp_path / "a.pt", GOOD | {"x": Hostile()}), weights_only=False)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("dst", "message"),
    [
        ("taken.safetensors", "exists already"),
        ("human.pt", "the name must end in .safetensors"),
        ("file/human.safetensors", "is not a folder"),
    ],
)
def test_destinations(tmp_path, monkeypatch, dst, message):
    monkeypatch.chdir(tmp_path)
    saved(Path("source.pt"), GOOD)
    for name in ("taken.safetensors", "file"):
        Path(name).write_text("kept")
    with pytest.raises((InputError, OSError), match=message):
        human_latents.convert("source.pt", dst)
    assert Path("taken.safetensors").read_text() == "kept" == Path("file").read_text()


def test_the_stages_name_the_command(tmp_path):
    with pytest.raises(InputError) as error:
        load_human_latents(saved(tmp_path / "human.pt", GOOD))
    command = f"-m conversion.human_latents --src={tmp_path}/human.pt --dst={tmp_path}/human.safe"
    assert "unpickling runs code" in str(error.value) and command in str(error.value)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("fuzz") / "human.pt", GOOD).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_spoilt_files(tmp_path_factory, valid_file, data):
    """A file with a few changed, removed or added bytes is read, or refused in one line."""
    path = tmp_path_factory.getbasetemp() / "spoilt.pt"
    in_program = data.draw(st.booleans())
    content = bytearray(described() if in_program else valid_file)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=6))
    if in_program:
        archive(path, bytes(content), STORAGE)
    else:
        path.write_bytes(content)
    with contextlib.suppress(InputError):
        read_object(path)
