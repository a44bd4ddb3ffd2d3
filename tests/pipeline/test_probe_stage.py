"""The stage probe from the command line: names of features, in its files and in its log."""

import json
import logging

from pipeline.stages.train import log_names
from ppo.train import TrainConfig
from sarm_jax.features.feature_names import FeatureNames
from tests.command import run_main
from tests.tiny_models import guard_options, reward_options


def test_names_stand_beside_probed_features(world, tmp_path, caplog):
    rows = [{"prompt": f"p {n}", "chosen": f"it is {n}", "rejected": "no"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "names.json").write_text(json.dumps({"3": "flattery", "63": "refusals"}))
    options = (
        "--config=configs/base.py", "--stage=probe", f"--workdir={tmp_path / 'run'}",
        f"--sarm_model={world / 'sarm'}", "--config.probe.feature=3,5",
        f"--config.probe.data_jsonl={tmp_path / 'pairs.jsonl'}", "--config.probe.level=0.999",
        "--config.probe.flips=99", "--config.probe.controls=2",
    )  # fmt: skip
    assert run_main(*options) == 0
    folder = tmp_path / "run" / "probes"
    before = {name: json.loads((folder / name).read_text()) for name in
              ("probe_summary.json", "certificates.json")}  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert run_main(*options, f"--config.identify.feature_names={tmp_path}/names.json") == 0
    certified = []
    for name, content in before.items():
        features = json.loads((folder / name).read_text())["features"]
        assert [row.pop("name", None) for row in features] == ["flattery", None]
        assert features == content["features"]
        certified += [row["feature"] for row in features if row.get("certified")]
    assert ('certified: 3 "flattery"' in caplog.text) == (3 in certified)


def test_the_features_that_training_reads_are_logged_with_their_names(caplog):
    reward = reward_options(
        penalize_features=(3, 5), tau_values=(0.1, 0.2), alpha_values=(0.2, 0.1),
        clamp_features=(7,), clamp_set_values=(0.0,), latent_indices=(3, 9),
    )  # fmt: skip
    options = TrainConfig(
        ppo=None, lora=None, reward=reward, discriminator=None, guards=guard_options(),
        checkpoint=None, names=FeatureNames({3: "flattery", 9: "refusals"}),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        log_names(options)
    assert caplog.messages == ['penalised: 3 "flattery", 5']
