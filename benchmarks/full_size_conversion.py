"""Conversion at full size: memory, time against a copy of the same files, and the bits.

    python -m benchmarks.full_size_conversion --workdir=outputs/full_size \\
        --config=configs/architectures/llama_3_1_8b_instruct [--rounds=2] [--json=FILE]

Writes a checkpoint of random bits in the shapes of a config.json (sharded, bfloat16), then
converts and copies it in turn: each reads from the disk, not from the page cache, and ends with
fsync. Converting is the whole command, `python -m conversion.from_hf`, in a process of its own,
whose anonymous memory is read twenty times a second: what it has mapped from files, the page cache,
is not counted. Bits are compared on sampled tensors through the safetensors library. Each result is
removed before the next turn and everything at the end, so the disk must hold the checkpoint twice.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from benchmarks.word_tokenizer import word_tokenizer
from conversion.checkpoint import Kind
from conversion.directory import TOKENIZER_FILES
from conversion.hf_config import is_sarm, llama_config, sarm_config
from conversion.json_files import read_json, write_json
from conversion.keys import TensorSpec, abstract_model, tensor_specs
from conversion.safetensors_io import TensorFiles, TensorWriter
from conversion.scratch import check_space
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import to_disk

TWICE = 2.05  # of the checkpoint's bytes: source and result


def main() -> None:
    """Prints a line per turn and the summary; writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="directory with a config.json")
    parser.add_argument("--workdir", type=Path, required=True, help="new directory, removed after")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sampled", type=int, default=24, help="tensors compared bit by bit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.workdir.exists():
        parser.error(f"{args.workdir}: exists already; name a new directory")
    try:
        hf, specs = read_architecture(args.config)
        size = stored_bytes(specs)
        check_space(args.workdir, round(TWICE * size))
    except InputError as error:
        parser.error(str(error))
    kind: Kind = "sarm" if is_sarm(hf) else "policy"
    args.workdir.mkdir(parents=True)
    try:
        source = args.workdir / "hf"
        write_checkpoint(source, hf, specs)
        print(f"{args.config.name}: {len(specs)} tensors, {size:,} bytes", flush=True)
        turns: list[dict[str, Any]] = []
        for turn in range(args.rounds):
            for name in ("convert", "copy") if turn % 2 == 0 else ("copy", "convert"):
                dst = args.workdir / name
                forget(source)
                found = convert(source, dst, kind) if name == "convert" else copy(source, dst)
                if name == "convert":
                    found["equal_tensors"] = compare(source, dst, specs, args.sampled)
                shutil.rmtree(dst)
                turns.append({"turn": name, **found})
                print(turns[-1], flush=True)
        summary = summarise(args.config.name, size, turns)
        print(json.dumps(summary, indent=2))
        if args.json:
            write_json(args.json, summary | {"turns": turns})
    finally:
        shutil.rmtree(args.workdir)


def read_architecture(directory: Path) -> tuple[dict[str, Any], list[TensorSpec]]:
    """(a config.json, the tensors of the policy or SARM that it describes)."""
    hf = read_json(directory / "config.json")
    return hf, tensor_specs(
        abstract_model(sarm_config(hf, "") if is_sarm(hf) else llama_config(hf))
    )


def stored_bytes(specs: list[TensorSpec]) -> int:
    """Of their bfloat16 values."""
    return 2 * sum(int(np.prod(spec.shape)) for spec in specs)


def write_checkpoint(directory: Path, hf: dict[str, Any], specs: list[TensorSpec]) -> None:
    """A Hugging Face directory with random finite bfloat16 weights and a tokenizer."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    with TensorWriter(directory) as writer:
        for spec in specs:
            bits = rng.integers(0, 1 << 64, -(-int(np.prod(spec.shape)) // 4), np.uint64)
            bits &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # exponents below 128: neither inf nor NaN
            flat = bits.view(np.uint16)[: int(np.prod(spec.shape))]
            writer.add(spec.hf_name, flat.view(ml_dtypes.bfloat16).reshape(spec.hf_shape))
        writer.close()
    write_json(directory / "config.json", hf | {"torch_dtype": "bfloat16"})
    word_tokenizer(hf["vocab_size"]).save_pretrained(directory)
    for file in directory.iterdir():
        to_disk(file)


def convert(source: Path, dst: Path, kind: Kind) -> dict[str, float]:
    """Seconds of the command, of the CPU too, and the peaks of its memory in bytes."""
    command = [sys.executable, "-m", "conversion.from_hf"]
    command += [f"--kind={kind}", f"--src={source}", f"--dst={dst}"]
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command)
    anonymous = resident = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, _bytes(status, "RssAnon"))
            resident = max(resident, _bytes(status, "VmHWM"))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"the command failed with exit code {process.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
    }


def copy(source: Path, dst: Path) -> dict[str, float]:
    """Seconds to copy the weights and the tokenizer, flushed to the disk."""
    start, cpu = time.perf_counter(), time.process_time()
    dst.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors" or file.name in TOKENIZER_FILES:
            shutil.copyfile(file, dst / file.name)
            to_disk(dst / file.name)
    to_disk(dst)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def compare(source: Path, dst: Path, specs: list[TensorSpec], count: int) -> int:
    """How many of `count` sampled tensors, the largest among them, have the same bits."""
    ours, theirs = (TensorFiles(d) for d in (source, dst))
    largest = max(specs, key=lambda spec: int(np.prod(spec.shape)))
    picks = np.random.default_rng(1).choice(len(specs), count - 1, replace=False)
    for spec in [largest, *(specs[i] for i in picks)]:
        a, b = _bits(ours, spec.hf_name), _bits(theirs, spec.name)
        if not np.array_equal(a.reshape(spec.hf_shape), spec.to_hf(b)):
            raise SystemExit(f"{spec.name}: not the bits of {spec.hf_name}")
    return count


def summarise(name: str, size: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that are reported; the ratio is that of neighbouring turns, worst and median."""
    names = ("convert", "copy")
    by = {n: [t["seconds"] for t in turns if t["turn"] == n] for n in names}
    cpu = {n: [t["cpu_seconds"] for t in turns if t["turn"] == n] for n in names}
    ratios = [a / b for a, b in zip(by["convert"], by["copy"], strict=True)]
    peak = max(t.get("peak_anonymous_bytes", 0) for t in turns)
    return {
        "model": name,
        "checkpoint_gb": size / 1e9,
        "convert_seconds": by["convert"],
        "copy_seconds": by["copy"],
        "convert_cpu_seconds": cpu["convert"],
        "copy_cpu_seconds": cpu["copy"],
        "load_average": os.getloadavg()[0],
        "ratio_median": float(np.median(ratios)),
        "ratio_worst": max(ratios),
        "peak_anonymous_gib": peak / 2**30,
        "peak_resident_gib": max(t.get("peak_resident_bytes", 0) for t in turns) / 2**30,
    }


def forget(directory: Path) -> None:
    """Drops a directory's files from the page cache."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _bits(files: TensorFiles, name: str) -> np.ndarray:
    path = files.directory / files.shard(name)
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name).view(np.uint16)


def _bytes(status: str, field: str) -> int:
    lines = [line for line in status.splitlines() if line.startswith(field + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else 0  # a process that has just ended has none


if __name__ == "__main__":
    main()
