"""Reads what a study of the lab has left in its directory."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion import load_sarm
from pipeline.study_records import FILE, read_record, seed_folders
from sarm_jax.features.detectors import Detectors
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.models.reward_model import RewardModel

NOT_READ = float("nan")  # rates of detectors that no script here reads


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns an InputError into one line after the usage, and exit code 2."""
    try:
        yield
    except InputError as error:
        parser.error(str(error))


def begun_seeds(study: Path) -> dict[int, Path]:
    """Returns the folders of a study's seeds, by seed; raises InputError if there are none."""
    folders = seed_folders(study)
    if not folders:
        raise InputError(f"{study}: has no seed_*/; it is no study, or no seed has begun")
    return folders


def recorded_options(study: Path) -> dict[Path, dict[str, Any]]:
    """Returns the options of each seed that has ended, by its folder.

    Raises:
        InputError: there are none, or the record of one cannot be read.
    """
    folders = [folder for folder in seed_folders(study).values() if (folder / FILE).exists()]
    if not folders:
        raise InputError(f"{study}: has no seed_*/{FILE}; it is no study, or no seed has ended")
    return {folder: read_record(folder)[0] for folder in folders}


def read_detectors(seed_folder: Path) -> Detectors:
    """Reads the detectors that identify found for a seed, without their rates."""
    selected = read_json(seed_folder / "probes" / "selected_features.json")
    return Detectors(
        features=tuple(selected["detectors"]),
        tau=tuple(selected["tau_detectors"]),
        detection_rate=NOT_READ,
        false_positive_rate=NOT_READ,
    )


def load_seed_model(seed_folder: Path) -> RewardModel:
    """Loads the reward model that all conditions of a seed share, unless they have their own."""
    model = load_sarm(str(seed_folder / "sarm"), dtype="float32")
    model.batch_size = 128
    return model
