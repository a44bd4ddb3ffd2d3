"""Measure conversion at full size: memory, time against a copy of the same files, and the bits.

    python -m benchmarks.full_size_conversion --workdir=outputs/full_size \\
        --config=configs/architectures/llama_3_1_8b_instruct [--rounds=2] [--json=FILE]

The benchmark writes a checkpoint of random bits in the shapes of a config.json (sharded, bfloat16).
Then it converts and copies the checkpoint in turn. Both read from the disk instead of the page
cache and end with fsync. Converting is the whole command, `python -m conversion.from_hf`, in a
separate process. Its anonymous memory, which excludes mapped files, is read twenty times a second.
The bits of sampled tensors are compared through the safetensors library. Each result is removed
before the next turn and everything at the end, so the disk must hold the checkpoint twice.
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

from benchmarks.process_memory import status_bytes
from benchmarks.word_tokenizer import word_tokenizer
from conversion.checkpoint import Kind
from conversion.directory import TOKENIZER_FILES, write_hf_json
from conversion.hf_config import is_sarm, llama_config, sarm_config
from conversion.keys import TensorSpec, abstract_model, tensor_specs
from conversion.safetensors_io import TensorFiles, TensorWriter
from conversion.scratch import check_space
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import sync_to_disk
from sarm_jax.io.json_files import read_json

DISK_FACTOR = 2.05  # times the bytes of the checkpoint: source and result


def main() -> None:
    """Prints a line per turn and the summary; writes the summary to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="directory with a config.json")
    parser.add_argument("--workdir", type=Path, required=True, help="new directory, later removed")
    parser.add_argument("--rounds", type=int, default=2, help="conversions, and copies")
    parser.add_argument("--sampled", type=int, default=24, help="tensors to compare bit by bit")
    parser.add_argument("--json", type=Path, help="file of the summary")
    args = parser.parse_args()
    if args.workdir.exists():
        parser.error(f"--workdir={args.workdir}: exists already; name a new directory")
    try:
        hf, specs = read_architecture(args.config)
        size = stored_bytes(specs)
        check_space(args.workdir, round(DISK_FACTOR * size))
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
                result = convert(source, dst, kind) if name == "convert" else copy(source, dst)
                if name == "convert":
                    result["equal_tensors"] = compare(source, dst, specs, count=args.sampled)
                shutil.rmtree(dst)
                turns.append({"turn": name, **result})
                print(turns[-1], flush=True)
        summary = summarise(args.config.name, size, turns)
        print(json.dumps(summary, indent=2))
        if args.json:
            write_hf_json(args.json, summary | {"turns": turns})
    finally:
        shutil.rmtree(args.workdir)


def read_architecture(directory: Path) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Reads an architecture: (config.json, the tensors of the policy or SARM that it describes)."""
    hf = read_json(directory / "config.json")
    return hf, tensor_specs(
        abstract_model(sarm_config(hf, "") if is_sarm(hf) else llama_config(hf))
    )


def stored_bytes(specs: list[TensorSpec]) -> int:
    """Returns the number of bytes of the tensors in bfloat16."""
    return 2 * sum(int(np.prod(spec.shape)) for spec in specs)


def write_checkpoint(directory: Path, hf: dict[str, Any], specs: list[TensorSpec]) -> None:
    """Writes a Hugging Face directory with random finite bfloat16 weights and a tokenizer."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    with TensorWriter(directory) as writer:
        for spec in specs:
            words = -(-int(np.prod(spec.shape)) // 4)  # of four values each
            bits = rng.integers(0, 1 << 64, size=words, dtype=np.uint64)
            bits &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # exponents below 128: neither inf nor NaN
            flat = bits.view(np.uint16)[: int(np.prod(spec.shape))]
            writer.add(spec.hf_name, flat.view(ml_dtypes.bfloat16).reshape(spec.hf_shape))
        writer.close()
    write_hf_json(directory / "config.json", hf | {"torch_dtype": "bfloat16"})
    word_tokenizer(hf["vocab_size"]).save_pretrained(directory)
    for file in directory.iterdir():
        sync_to_disk(file)


def convert(source: Path, dst: Path, kind: Kind) -> dict[str, float]:
    """Runs the conversion; returns its seconds, CPU seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "conversion.from_hf"]
    command += [f"--kind={kind}", f"--src={source}", f"--dst={dst}"]
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command)
    anonymous = resident = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, status_bytes(status, "RssAnon"))
            resident = max(resident, status_bytes(status, "VmHWM"))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"conversion.from_hf failed with exit code {process.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
    }


def copy(source: Path, dst: Path) -> dict[str, float]:
    """Copies weights and tokenizer and flushes them to the disk; returns the seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    dst.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors" or file.name in TOKENIZER_FILES:
            shutil.copyfile(file, dst / file.name)
            sync_to_disk(dst / file.name)
    sync_to_disk(dst)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def compare(source: Path, dst: Path, specs: list[TensorSpec], count: int) -> int:
    """Compares the bits of sampled tensors; one of them is the largest.

    Returns:
        The number of compared tensors, all of which are equal.

    Raises:
        SystemExit: a tensor differs.
    """
    original, converted = TensorFiles(source), TensorFiles(dst)
    largest = max(specs, key=lambda spec: int(np.prod(spec.shape)))
    sampled = np.random.default_rng(1).choice(len(specs), count - 1, replace=False)
    for spec in [largest, *(specs[i] for i in sampled)]:
        a, b = _bits(original, spec.hf_name), _bits(converted, spec.name)
        if not np.array_equal(a.reshape(spec.hf_shape), spec.to_hf(b)):
            raise SystemExit(f"{spec.name}: its bits differ from those of {spec.hf_name}")
    return count


def summarise(name: str, size: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises the turns; each ratio compares a conversion with the copy next to it."""
    names = ("convert", "copy")
    seconds = {n: [t["seconds"] for t in turns if t["turn"] == n] for n in names}
    cpu = {n: [t["cpu_seconds"] for t in turns if t["turn"] == n] for n in names}
    ratios = [a / b for a, b in zip(seconds["convert"], seconds["copy"], strict=True)]
    peak = max(t.get("peak_anonymous_bytes", 0) for t in turns)
    return {
        "model": name,
        "checkpoint_gb": size / 1e9,
        "convert_seconds": seconds["convert"],
        "copy_seconds": seconds["copy"],
        "convert_cpu_seconds": cpu["convert"],
        "copy_cpu_seconds": cpu["copy"],
        "load_average": os.getloadavg()[0],
        "ratio_median": float(np.median(ratios)),
        "ratio_worst": max(ratios),
        "peak_anonymous_gib": peak / 2**30,
        "peak_resident_gib": max(t.get("peak_resident_bytes", 0) for t in turns) / 2**30,
    }


def forget(directory: Path) -> None:
    """Drops the files of a directory from the page cache."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _bits(files: TensorFiles, name: str) -> np.ndarray:
    """Reads the bits of one tensor."""
    path = files.directory / files.shard(name)
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name).view(np.uint16)


if __name__ == "__main__":
    main()
