"""Reads what a study of the lab has left in its directory."""

from pathlib import Path

from conversion import load_sarm
from pipeline.study_records import FILE
from sarm_jax.features.detectors import Detectors
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.models.reward_model import RewardModel

NOT_READ = float("nan")  # rates of detectors that no script here reads


def record_files(study: Path) -> list[Path]:
    """Returns the records of the seeds of a study; raises InputError if there are none."""
    paths = sorted(study.glob(f"seed_*/{FILE}"))
    if not paths:
        raise InputError(f"{study}: has no seed_*/{FILE}; it is no study, or no seed has ended")
    return paths


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
