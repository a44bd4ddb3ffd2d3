"""Train an SAE for a reward model, so that it has features."""

import dataclasses
import logging
from pathlib import Path
from typing import cast

from ml_collections import ConfigDict

from conversion import load_reward_model
from conversion.converted import save_with_sae
from conversion.load import check_models, read_reward_config
from pipeline.activation_files import activation_folder
from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, mesh_config, placement
from pipeline.options import required
from pipeline.provenance import check_same_everywhere, provenance
from pipeline.sae_options import fit_options
from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.io.path_lists import split_paths
from sarm_jax.models.conversation_rows import read_responses
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.parallel import processes
from sarm_jax.parallel.sharding import make_mesh
from sarm_jax.training.train_sae import TrainSAEConfig, train_sae

LOG = logging.getLogger(__name__)
OUTPUT = "reward_model"
ACTIVATIONS = "sae_activations"  # folder that exists while the training lasts


def validate(config: ConfigDict) -> TrainSAEConfig:
    """Validates the section train_sae."""
    required(config, "train_sae.model", "train_sae.responses_jsonl")
    section = config.train_sae.to_dict()
    section["responses_jsonl"] = split_paths(section["responses_jsonl"])
    make_mesh(mesh_config(config))  # raises if there are too few devices
    return TrainSAEConfig(**section)


def run(config: ConfigDict, workdir: Path) -> None:
    """Train an SAE on the states of responses; save the reward model with it."""
    options = validate(config)
    files = {path: read_responses(path) for path in options.responses_jsonl}
    rows_read = [row for path in options.responses_jsonl for row in files[path]]
    responses = [(prompt, text) for prompt, texts in rows_read for text in texts]
    options.held_out([prompt for prompt, _ in responses])
    prompts = {path: [prompt for prompt, _ in rows] for path, rows in files.items()}
    check_models(reward=options.model)
    check_conversations(options.model, prompts)
    if (workdir / OUTPUT).exists():
        raise InputError(f"{workdir / OUTPUT} exists already: delete it to train again")
    LOG.info("training an SAE on %d responses, for %s", len(responses), workdir / OUTPUT)
    trunk = check_architectures(config)
    options = fit_options(options, options.model, trunk.max_position_embeddings)
    check_same_everywhere(STAGE, config, workdir)
    placed = placement(config)
    model = load_reward_model(options.model, config.dtype, placed.load)
    reward_model = cast(LinearReward, model.model)
    reward_model.trunk.placement = placed
    rows: list[dict] = []
    made_from = dataclasses.asdict(provenance(STAGE, config, workdir))
    with activation_folder(workdir / ACTIVATIONS, made_from) as folder:
        sae, summary = train_sae(
            options, reward_model, model.tokenizer, responses, log=rows.append, folder=folder
        )

    def write() -> None:
        write_json(workdir / "sae_summary.json", summary)
        write_jsonl(workdir / "sae_metrics.jsonl", rows)
        # Last, because --stage=all takes it for the end of the stage.
        save_with_sae(options.model, workdir / OUTPUT, sae)

    processes.on_primary(write)
    _report(summary)
    LOG.info("the reward model with its SAE is in %s: name it as sarm_model", workdir / OUTPUT)


def check_architectures(config: ConfigDict) -> LlamaConfig:
    """Checks that the mesh can divide the reward model's trunk; returns its architecture."""
    trunk = read_reward_config(config.train_sae.model).trunk
    mesh_config(config).check_model(trunk)
    return trunk


def _report(summary: dict) -> None:
    """Logs what the SAE explains on held-out responses."""

    def shown(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    sae, reward = summary["sae"], summary["reward"]
    LOG.info(
        "held out: explained variance %s, silent latents %s, share of the reward's variance in the "
        "features %s and in the error term %s",
        shown(sae["explained_variance_pooled"]),
        shown(sae["silent_fraction_held_out"]),
        shown(reward["share_features"]),
        shown(reward["share_error"]),
    )


STAGE = Stage(
    name="train_sae",
    summary="Responses and a reward model → the reward model with an SAE, for `sarm_model`.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=("train_sae", "dtype"),
    inputs=(
        Input("train_sae.responses_jsonl", Kind.FILES),
        Input("train_sae.model", Kind.REWARD),
    ),
    output=OUTPUT,
    makes=(f"{OUTPUT}/", "sae_summary.json", "sae_metrics.jsonl", f"{ACTIVATIONS}/"),
    after=("prepare_data",),
    wanted=lambda config: bool(config.train_sae.responses_jsonl),
    costly=lambda config: True,
    processes="all",
)
