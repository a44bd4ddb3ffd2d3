"""Test whether features are causal."""

import dataclasses
import logging
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.feature_names import feature_names
from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, check_reward_model, load_reward_model
from pipeline.options import required
from pipeline.provenance import check_same_everywhere
from pipeline.stage import Stage
from sarm_jax.features.certificates import CertificateConfig
from sarm_jax.features.feature_lists import parse_features
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.features.probing import ProbeConfig, check_latents, check_probe, probe, write_probes
from sarm_jax.io.json_files import write_json
from sarm_jax.models.conversation_rows import read_probe_rows
from sarm_jax.parallel import processes

LOG = logging.getLogger(__name__)


def validate(config: ConfigDict) -> ProbeConfig:
    """Validates the section probe."""
    section = config.probe
    features = parse_features("probe.feature", section.feature)
    certificate = CertificateConfig(section.controls, section.flips, section.level, section.seed)
    low, high, value = section.min_value, section.max_value, section.set_value
    if value is None and low is None and high is None:
        value = 0.0
    options = ProbeConfig(
        features=tuple(dict.fromkeys(features)),
        set_value=value,
        mode=section.mode,
        certificate=certificate,
        min_value=low,
        max_value=high,
        rank=section.rank,
    )
    required(config, "probe.data_jsonl", "sarm_model")
    feature_names(config)  # raises for a malformed file
    return options


def check_architectures(config: ConfigDict) -> FeatureNames:
    """Checks that the SARM has the latents that are probed or named; returns their names."""
    latent_size = check_reward_model(config).latent_size
    check_latents(validate(config), latent_size)
    return feature_names(config, latent_size)


def run(config: ConfigDict, workdir: Path) -> None:
    """Set or bound one feature at a time and write what the reward does."""
    options, path = validate(config), config.probe.data_jsonl
    rows = read_probe_rows(path, options.mode)
    check_probe(options, check_reward_model(config).latent_size, rows, path)
    names = check_architectures(config)
    check_conversations(config.sarm_model, {path: [row["prompt"] for row in rows]})
    folder = workdir / "probes"
    LOG.info("probing %d features on %d rows, for %s", len(options.features), len(rows), folder)
    check_same_everywhere(STAGE, config, workdir)
    probes, certificates = probe(options, load_reward_model(config), rows)

    def write() -> None:
        folder.mkdir(exist_ok=True)
        write_probes(folder, probes)
        content = {"options": dataclasses.asdict(options), "features": certificates}
        write_json(folder / "certificates.json", names.annotated(content))
        # Last, because --stage=all takes it for the end of the stage.
        summary = {"features": [result.summary for result in probes]}
        write_json(folder / "probe_summary.json", names.annotated(summary))

    processes.on_primary(write)
    certified = [row["feature"] for row in certificates if row["certified"]]
    LOG.info("%d of %d features certified", len(certified), len(certificates))
    if names.of(certified):
        LOG.info("certified: %s", names.show_all(certified))
    LOG.info("%d features probed; summary in %s", len(probes), folder / "probe_summary.json")


def writes(config: ConfigDict) -> list[str]:
    """Returns the names of all files, a table for each feature among them."""
    tables = [f"probes/probe_f{feature}.csv" for feature in validate(config).features]
    return ["probes/certificates.json", "probes/probe_summary.json", *tables]


STAGE = Stage(
    name="probe",
    summary="Responses, with a feature set or bounded → what the reward does, and certificates.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=("probe", "sarm_model", "sarm_max_length", "dtype"),
    inputs=(
        Input("probe.feature", Kind.LIST),
        Input("probe.data_jsonl", Kind.ROWS),
        Input("sarm_model", Kind.SARM),
    ),
    output="probes/probe_summary.json",
    makes=("probes/probe_*", "probes/certificates.json"),
    writes=writes,
    after=("identify", "human_latents"),
    wanted=lambda config: bool(config.probe.data_jsonl),
    processes="all",
)
