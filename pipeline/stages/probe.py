"""Features proven causal, or not."""

import dataclasses
import logging
from pathlib import Path

from ml_collections import ConfigDict

from conversion.load import read_sarm_config
from pipeline.shared import required, reward_model, write_json
from sarm_jax.features.certificates import CertificateConfig
from sarm_jax.features.feature_lists import parse_features
from sarm_jax.features.probing import ProbeConfig, check_probe, probe, write_probes
from sarm_jax.io.jsonl import read_jsonl

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> ProbeConfig:
    """The section probe."""
    section = config.probe
    features = parse_features("probe.feature", section.feature)
    certificate = CertificateConfig(section.controls, section.flips, section.level, section.seed)
    low, high, value = section.min_value, section.max_value, section.set_value
    if value is None and low is None and high is None:
        value = 0.0
    probe_options = ProbeConfig(
        features=tuple(dict.fromkeys(features)),
        set_value=value,
        mode=section.mode,
        certificate=certificate,
        min_value=low,
        max_value=high,
        rank=section.rank,
    )
    required(config, "probe.data_jsonl", "sarm_model")
    return probe_options


def run(config: ConfigDict, workdir: Path) -> None:
    """Sets or bounds features, one at a time, and says what the reward does."""
    asked, path = options(config), config.probe.data_jsonl
    data = read_jsonl(path, {"prompt": str})
    latent_size = read_sarm_config(config.sarm_model).sae.latent_size
    check_probe(asked, latent_size, data, path)
    folder = workdir / "probes"
    LOG.info("probing %d features on %d rows, for %s", len(asked.features), len(data), folder)
    probes, certificates = probe(asked, reward_model(config), data)
    folder.mkdir(exist_ok=True)
    write_probes(folder, probes)
    content = {"options": dataclasses.asdict(asked), "features": certificates}
    write_json(folder / "certificates.json", content)
    # Last, because --stage=all takes it for the end of the stage.
    write_json(folder / "probe_summary.json", {"features": [found.summary for found in probes]})
    certified = sum(row["certified"] for row in certificates)
    LOG.info("%d of %d features certified", certified, len(certificates))
    LOG.info("%d features probed; summary in %s", len(probes), folder / "probe_summary.json")
