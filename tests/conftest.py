"""Fixtures: tiny random models without an oracle (a byte-level chat policy and a SARM), runs."""

import dataclasses
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from configs import base
from ppo.config import PPOConfig
from ppo.prompts import PromptDeck
from ppo.tracking.checkpoint import CheckpointConfig
from ppo.tracking.profiling import NO_PROFILE
from ppo.train import TrainConfig, Trainer
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.rewards.human_latents import HumanLatents, collect_human_latents, save_human_latents
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.state_controls import state_controls
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer
from tests.tiny_models import (
    ACTIVE,
    DISCRIMINATOR,
    HELD_OUT,
    PROMPTS,
    REWARD,
    guard_options,
    scale_matrices,
)

jax.config.update("jax_num_cpu_devices", 8)  # virtual devices, for the tests of sharding
# On few, busy cores the virtual devices may wait long for each other; XLA aborts after 40 seconds.
TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# XLA's older code generator compiles in a third of the time and is fast enough for tiny models.
# A program as one module of LLVM, not one per kernel, takes a fifth less CPU time to compile.
# Later versions of XLA may not have these flags; they exit at an unknown one.
CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
KNOWN_CODE = CODE if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {TIMEOUT} {KNOWN_CODE}"
# Each worker has cores of its own: threads of several on one core would wait for each other.
torch.set_num_threads(1)
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if WORKER and hasattr(os, "sched_setaffinity"):
    CORES = sorted(os.sched_getaffinity(0))
    OWN = CORES[int(WORKER) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, OWN or CORES)
# With Python's thresholds, collections take a tenth of the tests' time: JAX makes many objects
# while it traces, and few of them are garbage.
gc.set_threshold(50_000, 20, 50)
MAPS, MAX_MAPS = Path("/proc/self/maps"), 16_000  # memory maps; Linux allows 65,530
SECONDS_TO_COUNT = 1.0  # CPU seconds after which the maps are counted again


def pytest_collection_modifyitems(items):
    """Moves the files of whole runs to the front, so that no worker ends with a long one alone.

    pytest-xdist deals files to workers in this order with `--no-loadscope-reorder`; by default it
    begins with the files of most tests, and those of whole runs have few.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def exempt_from_collection():
    """Exempts all objects that are alive from garbage collection.

    Every stage ends with a full collection, which takes longer than many tests if it goes through
    the objects of torch and transformers, thousands of tests, and all that JAX has traced.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    exempt_from_collection()


@pytest.fixture(autouse=True, scope="module")
def exempt_what_a_module_leaves():
    yield
    exempt_from_collection()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True, scope="session")
def handle_interrupts():
    """Restores the handler of Ctrl-C, which a shell disables for background processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def leaving(monkeypatch):
    """`signals.exit_after_cleanup` raises SystemExit instead of ending the tests."""
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture(scope="session")
def architecture(tokenizer, request):
    """A tiny Llama; indirect parametrisation selects another model type."""
    model_type = getattr(request, "param", "llama")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if model_type == "qwen3" else 8,
        model_type=model_type,
    )


@pytest.fixture
def policy(architecture, tokenizer):
    stops = chat.stop_ids(tokenizer)
    return scale_matrices(Llama(architecture, rngs=nnx.Rngs(0), stop_ids=stops))


@pytest.fixture(autouse=True, scope="session")
def keep_compiled_programs(tmp_path_factory):
    """Shares compiled programs between all modules, workers and child processes of a test run.

    Most of the time of the tests is compilation. pytest removes the folder after a few runs. LLVM's
    optimisations are off, as in JAX's own tests: models are tiny, and compilation takes half the
    time.
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


@pytest.fixture(scope="session")
def counted_at():
    """The CPU time of this process when its memory maps were last counted, in a list."""
    return [0.0]


@pytest.fixture(autouse=True)
def forget_programs(counted_at):
    """Frees compiled programs before a worker with thousands of them runs out of memory maps.

    Counting the maps takes longer than most tests. Programs take CPU time to compile, so that the
    maps cannot have grown much if little of it has passed.
    """
    yield
    if time.process_time() - counted_at[0] < SECONDS_TO_COUNT or not MAPS.is_file():
        return
    counted_at[0] = time.process_time()
    if MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()


@pytest.fixture
def reward_model(architecture, tokenizer):
    trunk = dataclasses.replace(architecture, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    scale_matrices(sarm.trunk)
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    return RewardModel(sarm, tokenizer, max_length=512, batch_size=8)


@pytest.fixture(scope="session")
def ppo_config():
    """Returns a function that makes a small PPOConfig with the given fields changed."""

    def make(**changes) -> PPOConfig:
        small = {"batch_size": 4, "max_new_tokens": 6, "total_steps": 4, "max_prompt_tokens": 200}
        small["pack_levels"] = 1  # fewer compilations
        return PPOConfig(**{**base.get_config().ppo, **small, **changes})

    return make


@pytest.fixture
def make_trainer(architecture, tokenizer, reward_model, ppo_config, tmp_path):
    """Returns a function that makes the trainer of a tiny run."""

    def make(
        workdir: Path,
        reward: RewardConfig = REWARD,
        evaluate=False,
        profile=NO_PROFILE,
        stop_ids=None,
        guards=None,
        prompts=PROMPTS,
        held_out=HELD_OUT,
        policy=None,
        member=None,
        **changes,
    ):
        workdir.mkdir(exist_ok=True)
        if policy is None:
            stop_ids = chat.stop_ids(tokenizer) if stop_ids is None else stop_ids
            policy = Llama(architecture, rngs=nnx.Rngs(0), stop_ids=stop_ids)
            policy = scale_matrices(policy)
        ppo: PPOConfig = ppo_config(**{"calibration_batches": 4, "checkpoint_every": 2, **changes})
        deck = PromptDeck(prompts, tokenizer, ppo)
        demos = [{"prompt": p, "response": f"well, {p}"} for p in PROMPTS]
        human = collect_human_latents(reward_model, demos, ACTIVE) if reward.beta else None
        config = TrainConfig(
            ppo=ppo,
            lora=LoRAConfig(rank=4),
            reward=reward,
            discriminator=DISCRIMINATOR,
            guards=guard_options(**(guards or {})),
            checkpoint=CheckpointConfig(keep_every=0),
        )
        return Trainer(
            config=config,
            policy=policy,
            tokenizer=tokenizer,
            reward_model=reward_model,
            deck=deck,
            human=human,
            states=state_controls(reward, reward_model.state_size),
            workdir=workdir,
            eval_deck=PromptDeck(held_out, tokenizer, ppo) if evaluate else None,
            profile=profile,
            member=member,
        )

    return make


@pytest.fixture
def base_config():
    return base.get_config()


@pytest.fixture
def batch_bt():
    """Two prompts of different lengths, padded left, right and in the middle."""
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
