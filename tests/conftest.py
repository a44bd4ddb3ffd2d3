"""Tiny models for tests that need no oracle: a byte-level chat policy and a SARM, both random."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from configs import base
from ppo.config import PPOConfig
from ppo.density_ratio import DiscriminatorConfig
from ppo.human_latents import HumanLatents, collect_human_latents, save_human_latents
from ppo.prompts import PromptDeck
from ppo.reward import RewardConfig
from ppo.tracking.guards import GuardConfig
from ppo.train import NO_PROFILE, TrainConfig, Trainer
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer

jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for the tests of sharding
# They meet on few cores that others use as well: XLA would give up, and abort, after 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# XLA's older code generator: a third of the time to compile, and fast enough for tiny models.
# Later versions have no other any more, and end at a flag that they do not know.
QUICK = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE} {QUICK}"
torch.set_num_threads(1)  # each worker has one core; threads of several wait for each other
MAPS, MOST_MAPS = Path("/proc/self/maps"), 12_000  # of the 65,530 that Linux allows
PROMPTS = [f"say {i}" for i in range(10)]
HELD_OUT = [f"what about {i}" for i in range(6)]
REWARD = RewardConfig((3, 5), (0.1, 0.2), (0.2, 0.1), beta=0.05)
ACTIVE = (3, 4, 5, 8, 9, 13)  # features that fire: what is 0 everywhere has no latent KL
DISCRIMINATOR = DiscriminatorConfig(1e-3, hidden_size=8, steps=2, batch_size=8, weight_decay=0.0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True, scope="session")
def heed_interrupts():
    """A shell has what it runs in the background ignore Ctrl-C; these tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def leaving(monkeypatch):
    """`signals.leave` raises SystemExit instead of ending the tests."""
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture(scope="session")
def architecture(tokenizer):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )


def spread(module: nnx.Module, factor: float = 10.0) -> nnx.Module:
    """Scales the matrices of a fresh model up, so that attention and logits are not flat."""
    for _, value in nnx.to_flat_state(nnx.state(module)):
        if value[...].ndim >= 2 and value[...].shape[-2] > 3:
            value[...] = value[...] * factor
    return module


@pytest.fixture
def policy(architecture, tokenizer):
    stops = chat.stop_ids(tokenizer)
    return spread(Llama(architecture, rngs=nnx.Rngs(0), stop_ids=stops))


@pytest.fixture(autouse=True, scope="session")
def keep_compiled_programs(tmp_path_factory):
    """Compiles a program once for all modules, workers and child processes of a run of the tests.

    Most of the time of the tests is compilation. pytest removes the folder after a few runs. LLVM
    does not optimise, as in JAX's own tests: models are tiny, and compiling takes half the time.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def forget_programs():
    """Frees a test's programs: a worker that keeps thousands runs out of memory maps."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def reward_model(architecture, tokenizer):
    trunk = dataclasses.replace(architecture, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    spread(sarm.trunk)
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    return RewardModel(sarm, tokenizer, max_length=512, batch_size=8)


@pytest.fixture
def ppo_config():
    """PPOConfig of the base config, small, with the given fields changed."""

    def make(**changes) -> PPOConfig:
        small = {"batch_size": 4, "max_new_tokens": 6, "total_steps": 4, "max_prompt_tokens": 200}
        small["pack_levels"] = 1  # fewer compilations
        return PPOConfig(**{**base.get_config().ppo, **small, **changes})

    return make


@pytest.fixture
def make_trainer(architecture, tokenizer, reward_model, ppo_config, tmp_path):
    def make(
        workdir: Path,
        reward: RewardConfig = REWARD,
        evaluate=False,
        profile=NO_PROFILE,
        stop_ids=None,
        guards=None,
        prompts=PROMPTS,
        **changes,
    ):
        workdir.mkdir(exist_ok=True)
        stop_ids = chat.stop_ids(tokenizer) if stop_ids is None else stop_ids
        policy = Llama(architecture, rngs=nnx.Rngs(0), stop_ids=stop_ids)
        ppo: PPOConfig = ppo_config(**{"calibration_batches": 4, "checkpoint_every": 2, **changes})
        deck = PromptDeck(prompts, tokenizer, ppo)
        demos = [{"prompt": p, "response": f"well, {p}"} for p in PROMPTS]
        human = collect_human_latents(reward_model, demos, ACTIVE) if reward.beta else None
        limits = GuardConfig(**(guards or {}))
        config = TrainConfig(ppo, LoRAConfig(rank=4), reward, DISCRIMINATOR, limits)
        eval_deck = PromptDeck(HELD_OUT, tokenizer, ppo) if evaluate else None
        return Trainer(
            config,
            spread(policy),
            tokenizer,
            reward_model,
            deck,
            human,
            workdir,
            eval_deck,
            profile=profile,
        )

    return make


@pytest.fixture
def base_config():
    return base.get_config()


@pytest.fixture
def batch_bt():
    """Two prompts of different length, padded left, right and in the middle."""
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    left = SimpleNamespace(
        tokens=[[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]], mask=[[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    )
    right = SimpleNamespace(
        tokens=[[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]], mask=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    )
    middle = SimpleNamespace(
        tokens=[[5, 6, 7, 8, 9], [10, 0, 11, 0, 12]], mask=[[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]]
    )
    return SimpleNamespace(rows=rows, left=left, right=right, middle=middle)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny policy, a tiny SARM, human latents and prompts, for commands in other processes."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    save_tiny_llama(root / "policy", tiny_llama_config(), tokenizer)
    save_tiny_sarm(root / "sarm", tokenizer)
    z_ns = np.random.default_rng(0).exponential(size=(32, 3)).astype(np.float32)
    save_human_latents(root / "human.safetensors", HumanLatents(z_ns, (1, 2, 7)))
    rows = [json.dumps({"prompt": f"name {n}", "response": f"it is {n}."}) for n in range(8)]
    (root / "demos.jsonl").write_text("\n".join(rows) + "\n")
    return root
