"""The buffer of latents of human responses, with which the discriminator compares the policy.

The file is in the safetensors format, with `z [N, S]` float32 and `latent_indices [S]` int32.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file, replacing
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.finite import require_finite
from sarm_jax.reporting.spread import is_constant
from sarm_jax.rewards.reward_config import RewardConfig

LOG = logging.getLogger(__name__)
LATENTS_FILE = "human_latents.safetensors"  # in the working directory


@dataclasses.dataclass(frozen=True)
class HumanLatents:
    """Latents `[N, S]` float32 of N human responses, with the ids of the features."""

    z_ns: np.ndarray
    latent_indices: tuple[int, ...]

    def select(self, latent_indices: tuple[int, ...]) -> "HumanLatents":
        """Returns the columns of `latent_indices`; raises InputError if one is missing."""
        columns = {feature: column for column, feature in enumerate(self.latent_indices)}
        missing = [i for i in latent_indices if i not in columns]
        if missing:
            raise InputError(
                f"reward.latent_indices: feature {missing[0]} is not in the human latents "
                f"({len(self.latent_indices)} features); collect them with --stage=human_latents"
            )
        return HumanLatents(self.z_ns[:, [columns[i] for i in latent_indices]], latent_indices)


def collect_human_latents(
    reward_model: RewardModel,
    demos: Sequence[Mapping[str, Any]],
    latent_indices: tuple[int, ...] = (),
) -> HumanLatents:
    """Computes the latents of demonstrations.

    Args:
        reward_model: the SARM.
        demos: rows with the fields `prompt` and `response`.
        latent_indices: features to keep; all features of the SARM if empty.

    Raises:
        InputError: the SARM does not have one of the features.
    """
    indices = _indices(reward_model, latent_indices)
    prompts, responses = [d["prompt"] for d in demos], [d["response"] for d in demos]
    _, z_ns = reward_model.score(prompts, responses, latent_indices=indices)
    return HumanLatents(z_ns, indices)


def collect_with_states(
    reward_model: RewardModel,
    demos: Sequence[Mapping[str, Any]],
    latent_indices: tuple[int, ...] = (),
) -> tuple[HumanLatents | None, np.ndarray]:
    """Computes latents and pooled states `[N, D]` of demonstrations in one pass.

    The arguments are those of `collect_human_latents`. The latents are None without an SAE.
    """
    indices = _indices(reward_model, latent_indices) if reward_model.has_features else None
    prompts, responses = [d["prompt"] for d in demos], [d["response"] for d in demos]
    _, z_ns, x_nd = reward_model.score_with_states(prompts, responses, latent_indices=indices)
    return None if indices is None else HumanLatents(z_ns, indices), x_nd


def _indices(reward_model: RewardModel, latent_indices: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the features to keep; raises InputError if the SARM does not have one of them."""
    size = reward_model.latent_size
    missing = [i for i in latent_indices if i >= size]
    if missing:
        raise InputError(
            f"reward.latent_indices: feature {missing[0]} of a SARM with {size} latents"
        )
    return latent_indices or tuple(range(size))


def save_human_latents(path: str | Path, human: HumanLatents) -> None:
    """Writes the file atomically; raises InputError for latents that are not finite."""
    indices = np.asarray(human.latent_indices, np.int32)
    require_finite({"z": human.z_ns}, path)
    with replacing(path, "wb") as file:
        file.write(save({"z": np.ascontiguousarray(human.z_ns), "latent_indices": indices}))


def load_human_latents(path: str | Path) -> HumanLatents:
    """Reads the file, and checks its shapes, types and values.

    Raises:
        InputError: the file is not there, not safetensors, or not a buffer of finite latents.
    """
    path = Path(path)
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".bin", ".npy", ".npz"):
        raise InputError(
            f"reward.human_latents={path}: only safetensors are read, because unpickling runs "
            f"code; python -m conversion.human_latents --src={path} "
            f"--dst={path.with_suffix('.safetensors')} converts a file of torch.save without "
            "running any, and --stage=human_latents makes a new one"
        )
    if not path.exists():
        raise InputError(
            f"reward.human_latents={path}: no such file; make it with --stage=human_latents"
        )
    check_file(path, f"reward.human_latents={path}")
    with (
        as_input_error(f"reward.human_latents={path}: not a safetensors file"),
        safe_open(path, framework="np") as file,
    ):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if set(tensors) != {"z", "latent_indices"}:
        raise InputError(
            f"reward.human_latents={path}: holds {sorted(tensors)}, expected z and latent_indices"
        )
    z_ns, indices = tensors["z"], tensors["latent_indices"]
    _check_tensors(path, z_ns, indices)
    with np.errstate(over="ignore"):  # of float64
        z_ns = z_ns.astype(np.float32)
    require_finite({"z": z_ns}, f"reward.human_latents={path}")
    return HumanLatents(z_ns, tuple(int(i) for i in indices))


def _check_tensors(path: Path, z_ns: np.ndarray, indices: np.ndarray) -> None:
    """Raises InputError unless the tensors are latents of distinct features."""
    if z_ns.ndim != 2 or indices.ndim != 1 or z_ns.shape[1] != len(indices) or not z_ns.size:
        raise InputError(
            f"reward.human_latents={path}: z has shape {z_ns.shape} for {indices.shape} "
            "latent_indices"
        )
    if not np.issubdtype(z_ns.dtype, np.floating):
        raise InputError(f"reward.human_latents={path}: z must hold floats, found {z_ns.dtype}")
    if not np.issubdtype(indices.dtype, np.integer) or len(set(indices.tolist())) < len(indices):
        raise InputError(
            f"reward.human_latents={path}: latent_indices must be distinct integers, found "
            f"{indices.dtype}"
        )


def human_buffer(
    reward: RewardConfig, source: HumanLatents | str | Path | None, latent_size: int
) -> HumanLatents | None:
    """Reads and checks the buffer that β > 0 needs, reduced to `reward.latent_indices`.

    Args:
        reward: β and the features.
        source: the file, `reward.human_latents` of the config, or its content.
        latent_size: number of latents of the SARM.

    Returns:
        The buffer; None if β = 0.

    Raises:
        InputError: there is no file, it is no buffer of this SARM, or it holds one response.
    """
    if reward.beta == 0:
        return None
    if not source:
        raise InputError(
            f"reward.beta={reward.beta} needs human latents: make them with --stage=human_latents "
            "and name the file with --human_latents"
        )
    name = "reward.human_latents"
    if isinstance(source, HumanLatents):
        human = source
    else:
        human, name = load_human_latents(source), f"{name}={source}"
    foreign = [i for i in human.latent_indices if not 0 <= i < latent_size]
    if foreign:
        raise InputError(
            f"{name}: feature {foreign[0]} of a SARM with {latent_size} "
            "latents: was it collected with another SARM?"
        )
    if len(human.z_ns) < 2:
        raise InputError(f"{name}: holds one response, reward.beta needs several")
    human = human.select(reward.latent_indices) if reward.latent_indices else human
    constant = int(is_constant(human.z_ns, axis=0).sum())
    if constant:
        LOG.warning(
            "%d of the %d latents that reward.beta compares are the same in all human responses",
            constant, len(human.latent_indices),
        )  # fmt: skip
    return human
