"""prepare_data with source benchmarks: public benchmarks and own pairs → the files of phase 2."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import split_paths, write_json
from conversion.hub import locate_file
from sarm_jax.evaluation.benchmark_data import (
    OUTPUTS,
    BenchmarkDataConfig,
    collect,
    counts_table,
)
from sarm_jax.jsonl import write_jsonl

LOG = logging.getLogger(__name__)
SHOWN_REFUSALS = 5  # per file, of all that are in data_summary.json


def prepare_benchmarks(config: ConfigDict, workdir: Path) -> None:
    """data/*.jsonl and, last, data/data_summary.json; files of an earlier call are replaced."""
    section = config.prepare_data
    options = BenchmarkDataConfig(
        steering_dir=section.steering_dir,
        rewardbench2=located(section.rewardbench2),
        rm_bench=located(section.rm_bench),
        safety_pairs=located(section.safety_pairs),
        complement_pairs=located(section.complement_pairs),
        held_out_fraction=section.held_out_fraction,
        seed=section.seed,
    )
    data = collect(options)
    folder = workdir / "data"
    (folder / "data_summary.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        path = folder / f"{name}.jsonl"
        if data.outputs[name]:
            write_jsonl(path, data.outputs[name])
        else:
            path.unlink(missing_ok=True)
    write_json(folder / "data_summary.json", data.summary)
    for found in data.summary["sources"].values():
        for refusal in found["refusals"][:SHOWN_REFUSALS]:
            LOG.warning("refused: %s: %s", refusal["place"], refusal["reason"])
    print(counts_table(data.summary))
    LOG.info("data in %s, counts in %s", folder, folder / "data_summary.json")


def located(text: str) -> tuple[tuple[str, Path], ...]:
    """Comma-separated files as (name, local path)."""
    names = split_paths(text) if text else ()
    return tuple((name, locate_file(name)) for name in names)
