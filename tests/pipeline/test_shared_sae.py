"""The stage train_sarm with the SAE of another SARM: the same bytes as with an SAE of its own."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.sarm_checkpoints import SARMCheckpoints
from pipeline.study_runs import pretrained_own_sae
from tests.closeness import assert_close
from tests.command import run_main
from tests.oracles import save_tiny_llama, tiny_llama_config, tiny_tokenizer

pytestmark = pytest.mark.slow
SMALL = (
    "source_layer=1 latent_size=16 k=4 aux_k=4 sae_steps=40 sae_batch_tokens=16 epochs=2 "
    "batch_size=2 max_length=32 warmup_fraction=0.0 dead_after_steps=10 sae_learning_rate=0.01 "
    "learning_rate=0.001"
).split()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Returns a function that trains a SARM in a folder of its own and returns the folder."""
    root = tmp_path_factory.mktemp("shared_sae")
    save_tiny_llama(root / "policy", tiny_llama_config(), tiny_tokenizer())
    for name in ("pairs", "ties"):
        rows = [
            {"prompt": f"{name} {n}", "chosen": f"it is {n}", "rejected": "no " * (n + 1)}
            for n in range(8)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *options, mesh=()):
        assert (
            run_main(
                "--config=configs/base.py",
                "--stage=train_sarm",
                f"--policy_model={root}/policy",
                f"--config.train_sarm.pairs_jsonl={root}/pairs.jsonl",
                f"--workdir={root / name}",
                *(f"--config.train_sarm.{option}" for option in (*SMALL, *options)),
                *(f"--config.mesh.{axis}=2" for axis in mesh),
            )
            == 0
        )
        return root / name

    run.root = root
    return run


@pytest.fixture(scope="module")
def frozen(train):
    """The folder of a SARM on a frozen trunk."""
    return train("frozen", "mode=0")


def weights(folder):
    return load_file(folder / "sarm" / "model.safetensors")


def read(folder):
    """Returns the summary and the stages of the rows of training."""
    summary = json.loads((folder / "sarm_summary.json").read_text())
    rows = (folder / "sarm_metrics.jsonl").read_text().splitlines()
    return summary, {json.loads(row)["stage"] for row in rows}


@pytest.mark.parametrize("changed", [("heads=2",), ("tie_pairs_jsonl={}/ties.jsonl",)])
def test_on_the_same_trunk_the_sae_need_not_be_trained_again(train, frozen, changed):
    options = ["mode=0", *(option.format(train.root) for option in changed)]
    own = train(f"own_{changed[0][:4]}", *options)
    shared = train(f"shared_{changed[0][:4]}", *options, f"sae_model={frozen}/sarm")
    for file in (own / "sarm").iterdir():
        assert file.read_bytes() == (shared / "sarm" / file.name).read_bytes(), file.name
    (of_own, own_rows), (of_shared, shared_rows) = read(own), read(shared)
    assert of_own["sae"].pop("dead_fraction") is not None
    assert {k: v for k, v in of_own.items() if k != "seconds"} == {
        k: v for k, v in of_shared.items() if k != "seconds"
    }
    assert own_rows == {"sae", "head"} and shared_rows == {"head"}
    assert not np.array_equal(weights(own)["score.weight"], weights(frozen)["score.weight"])
    assert pretrained_own_sae(own) and not pretrained_own_sae(shared)
    assert not pretrained_own_sae(train.root / "nothing")


def test_a_trained_trunk_starts_from_the_sae_on_any_mesh(train, frozen):
    option = f"sae_model={frozen}/sarm"
    one = train("one", "mode=3", option)
    summary, rows = read(one)
    assert rows == {"preferences"}
    assert summary["sae"] == read(train("kept", "mode=1", option))[0]["sae"]
    encoder = "sae.encoder.weight"
    name = next(name for name in weights(one) if name.endswith(encoder))
    np.testing.assert_array_equal(weights(train.root / "kept")[name], weights(frozen)[name])
    assert not np.array_equal(weights(one)[name], weights(frozen)[name])  # mode 3 trains it
    for mode, expected in ((3, one), (0, frozen)):
        mesh = train(f"mesh_{mode}", f"mode={mode}", option, mesh=("data", "fsdp", "tensor"))
        assert weights(mesh).keys() == weights(expected).keys()
        for name, array in weights(expected).items():
            assert_close(weights(mesh)[name], array, 1e-4, name=name)


def test_an_interrupted_training_on_a_shared_sae_goes_on(train, frozen, monkeypatch):
    """Its checkpoints count the steps on preferences alone."""
    options, saved = ("mode=3", f"sae_model={frozen}/sarm"), []
    expected = train("whole", *options)
    keep = SARMCheckpoints.keep

    def stop(self, phase, steps, state):
        saved.append(steps)
        if steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self, phase, steps, state)

    monkeypatch.setattr(SARMCheckpoints, "keep", stop)
    with pytest.raises(SystemExit):
        train("resumed", *options)
    folder = train.root / "resumed"
    assert [path.name for path in (folder / "sarm_checkpoints").iterdir()] == ["4"]
    monkeypatch.setattr(SARMCheckpoints, "keep", keep)
    train("resumed", *options)
    for file in (expected / "sarm").iterdir():
        assert file.read_bytes() == (folder / "sarm" / file.name).read_bytes(), file.name


def test_an_sae_of_another_model_is_warned_of(train, frozen, capfd):
    save_tiny_llama(train.root / "policy", tiny_llama_config(), tiny_tokenizer(), seed=1)
    train("other", "mode=0", f"sae_model={frozen}/sarm")
    assert "it may be one of another model" in capfd.readouterr().err
