"""Train a SARM from preference pairs."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conversion import load_policy
from conversion.checkpoint import open_checkpoint
from conversion.load import load_sae, read_policy_config, read_sarm_config
from conversion.to_hf import save_sarm
from pipeline.activation_files import activation_folder
from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, check_remat, mesh_config, placement
from pipeline.options import optional_paths, required
from pipeline.provenance import check_same_everywhere, provenance
from pipeline.sae_options import fit_options
from pipeline.sarm_checkpoints import SARMCheckpoints
from pipeline.stage import Stage
from ppo.tracking.checkpoint import CheckpointConfig
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.io.path_lists import short_names, split_paths
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.sae import SAE
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel import processes
from sarm_jax.parallel.sharding import make_mesh
from sarm_jax.reporting.statistics import Interval, format_interval
from sarm_jax.training.divergence import DivergedError
from sarm_jax.training.sarm_options import TrainSARMConfig
from sarm_jax.training.train_sarm import train_sarm

LOG = logging.getLogger(__name__)
# Options that only the pretraining of an SAE reads.
PRETRAINING = (
    "train_sarm.sae_steps",
    "train_sarm.sae_batch_tokens",
    "train_sarm.sae_learning_rate",
    "train_sarm.dead_after_steps",
    "train_sarm.aux_k",
    "train_sarm.aux_weight",
)
# Folders that exist while the training lasts.
CHECKPOINTS, ACTIVATIONS = "sarm_checkpoints", "sarm_activations"


def validate(config: ConfigDict) -> TrainSARMConfig:
    """Validates the section train_sarm, except for its model."""
    required(config, "train_sarm.pairs_jsonl")
    section = config.train_sarm.to_dict()
    section["pairs_jsonl"] = split_paths(section["pairs_jsonl"])
    section["tie_pairs_jsonl"] = optional_paths(section["tie_pairs_jsonl"])
    section.pop("sae_model")
    if not section.pop("model"):
        required(config, "policy_model")
    check_remat(config.remat)
    make_mesh(mesh_config(config))  # raises if there are too few devices
    checkpoint_options(config)
    return TrainSARMConfig(**section)


def run(config: ConfigDict, workdir: Path) -> None:
    """Train a SARM on the first layers of the policy model and save it in the HF layout."""
    options, source = validate(config), config.train_sarm.model or config.policy_model
    paths, tie_paths = options.pairs_jsonl, options.tie_pairs_jsonl
    files = {path: read_pairs(path, unequal=True) for path in (*paths, *tie_paths)}
    pairs, names = [pair for path in paths for pair in files[path]], short_names(tie_paths)
    ties = [{"source": names[path]} | row for path in tie_paths for row in files[path]]
    held_out, mesh = options.held_out(pairs, ties), mesh_config(config)
    options.check_batch(mesh, sum(pair["prompt"] not in held_out for pair in (*pairs, *ties)))
    policy_config = check_architectures(config)
    prompts = {path: [row["prompt"] for row in rows] for path, rows in files.items()}
    check_conversations(source, prompts)
    if (workdir / "sarm").exists():
        raise InputError(f"{workdir / 'sarm'} exists already: delete it to train again")
    LOG.info(
        "training a SARM on %d pairs%s, for %s",
        len(pairs), f" and {len(ties)} ties" if ties else "", workdir / "sarm",
    )  # fmt: skip
    positions, sae_model = policy_config.max_position_embeddings, config.train_sarm.sae_model
    options = fit_options(options, source, positions, pretrains=not sae_model)
    check_same_everywhere(STAGE, config, workdir)
    progress = open_checkpoints(config, workdir, options)
    placed, sae = placement(config), shared_sae(config)
    policy, tokenizer = load_policy(source, config.dtype, placed.load)
    policy.placement, policy.remat = placed, config.remat
    try:
        with activation_folder(workdir / ACTIVATIONS, progress.made_from) as folder:
            sarm, summary = train_sarm(
                options,
                policy,
                tokenizer,
                pairs,
                log=progress.rows.append,
                ties=ties,
                progress=progress,
                folder=folder,
                sae=sae,
            )
    except DivergedError:  # with other options, it starts again
        progress.remove()
        raise
    hf_config = open_checkpoint(source, "policy").hf_config

    def write() -> None:
        write_json(workdir / "sarm_summary.json", summary)
        write_jsonl(workdir / "sarm_metrics.jsonl", progress.rows)

    processes.on_primary(write)
    # Last, because --stage=all takes it for the end of the stage.
    save_sarm(workdir / "sarm", sarm, tokenizer, hf_config)
    progress.remove()
    low, high = summary["accuracy_held_out_95"]
    accuracy: Interval = {"mean": summary["accuracy_held_out"], "low": low, "high": high}
    LOG.info("held-out accuracy %s", format_interval(accuracy, ".3f"))
    if ties:
        log_ties(summary["ties"]["held_out"])
    LOG.info("SARM in %s, numbers in %s", workdir / "sarm", workdir / "sarm_summary.json")


def check_architectures(config: ConfigDict) -> LlamaConfig:
    """Compares the options with the model and the given SAE; returns the model's architecture."""
    options, mesh = validate(config), mesh_config(config)
    policy_config = read_policy_config(config.train_sarm.model or config.policy_model)
    options.check_layers(policy_config.num_hidden_layers)
    mesh.check_model(policy_config)
    sae_model, width = config.train_sarm.sae_model, policy_config.hidden_size
    options.check_sae(placement(config), width, split=bool(sae_model))
    if sae_model:
        check_sae_model(sae_model, options, width)
    return policy_config


def check_sae_model(src: str, options: TrainSARMConfig, hidden_size: int) -> None:
    """Raises InputError if `src` is no SARM, or one whose SAE does not fit the options."""
    with naming_sae_model(src):
        config = read_sarm_config(src)
        if not isinstance(config, SARMConfig):
            raise InputError(
                "a classifier with an SAE, expected a SARM: its SAE reads states after the final "
                "norm, which the trunk of a SARM does not have"
            )
        options.check_sae_of(config, hidden_size)


def shared_sae(config: ConfigDict) -> SAE | None:
    """Loads the SAE that `train_sarm.sae_model` names; returns None if it names none."""
    src = config.train_sarm.sae_model
    if not src:
        return None
    LOG.info("the SAE is that of %s: %s are not used", src, ", ".join(PRETRAINING))
    with naming_sae_model(src):
        return load_sae(src, placement(config).load)


@contextlib.contextmanager
def naming_sae_model(src: str) -> Iterator[None]:
    """Adds the option train_sarm.sae_model to the message of an InputError."""
    try:
        yield
    except InputError as error:
        reason = str(error).removeprefix(f"{src}: ")
        raise InputError(f"train_sarm.sae_model={src}: {reason}") from None


def unread(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the options of SAE pretraining if no SAE is pretrained."""
    return PRETRAINING if options["train_sarm"].get("sae_model") else ()


def open_checkpoints(
    config: ConfigDict, workdir: Path, options: TrainSARMConfig
) -> SARMCheckpoints:
    """Opens the checkpoints in `workdir`; raises InputError if they are of another training."""
    return SARMCheckpoints(
        workdir / CHECKPOINTS,
        every=checkpoint_options(config).train_sarm_every,
        starts={"sae": 0, "preferences": 0 if config.train_sarm.sae_model else options.sae_steps},
        made_from=provenance(STAGE, config, workdir),
        stage=STAGE,
    )


def checkpoint_options(config: ConfigDict) -> CheckpointConfig:
    """Returns the validated section checkpoint."""
    return CheckpointConfig(**config.checkpoint)


def log_ties(held_out: dict[str, Any]) -> None:
    """Logs how the reward scores the held-out ties."""
    if not held_out["pairs"]:
        LOG.info("no tie is held out")
        return
    low, high = held_out["prefers_rejected_95"]
    share: Interval = {"mean": held_out["prefers_rejected"], "low": low, "high": high}
    LOG.info(
        "held-out ties: the scores of the sides differ by %.4g in the mean, and the rejected side "
        "scores higher in a share of %s",
        held_out["margin_abs"], format_interval(share, ".3f"),
    )  # fmt: skip


STAGE = Stage(
    name="train_sarm",
    summary="Preference pairs → a SARM on the first layers of the policy model, in the HF layout.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=("train_sarm", "policy_model", "dtype"),
    inputs=(
        Input("train_sarm.pairs_jsonl", Kind.FILES),
        Input("train_sarm.tie_pairs_jsonl", Kind.FILES),
        Input("train_sarm.model", Kind.POLICY),
        Input("train_sarm.sae_model", Kind.SARM),
        Input("policy_model", Kind.POLICY, read_if=lambda config: not config.train_sarm.model),
    ),
    output="sarm",
    makes=(
        "sarm/",
        "sarm_summary.json",
        "sarm_metrics.jsonl",
        f"{CHECKPOINTS}/",
        f"{ACTIVATIONS}/",
    ),
    after=("prepare_data",),
    wanted=lambda config: bool(config.train_sarm.pairs_jsonl),
    costly=lambda config: True,
    unread=unread,
    processes="all",
)
