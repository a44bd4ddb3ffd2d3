"""The Tunix baseline: one PPO iteration on SmolLM2-135M with google-tunix, in float32.

An iteration is a global step of Tunix's `PPOLearner` with Tunix's sampler, on the same prompts as
the other sides of `ppo_iteration`. It has LoRA (r 16 on q, k, v, o) on the policy, the frozen
policy as the reference, and `epochs` epochs over the whole batch. The reward model is the first 15
layers of the same model with a scalar head, without an SAE, whose cost at one token per row is
negligible. Tunix's critic is a separate model; here it is as small as possible, one layer of 8
units. No token stops a response, so all lengths of the workload must be equal.

It needs its own environment (`pip install google-tunix`), see `ppo_iteration --tunix_python`.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoConfig
from tunix.models.llama3 import params
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.workload import Workload

TRUNK_LAYERS = 15
NO_TOKEN = -1  # an id that is never sampled, so that it ends no response
LEARNING_RATE, MAX_GRAD_NORM, KL_COEF = 1e-4, 1.0, 0.02
PHASES = {  # method of the cluster → phase that its seconds count for
    "generate": "rollout",
    "get_rewards": "score",
    "get_ref_per_token_logps": "update",
    "get_old_per_token_logps": "update",
    "get_values": "update",
    "update_actor": "update",
    "update_critic": "update",
}


class Numbers:
    """A tokenizer whose text is the token ids in decimal, so that it keeps the drawn prompts."""

    def encode(self, text: str, **_: object) -> list[int]:
        """Returns the token ids of the text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        """Returns the text of token ids."""
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """Returns None: prompts have no start token."""

    def eos_id(self) -> int:
        """Returns an id that never stops a response."""
        return NO_TOKEN

    def pad_id(self) -> int:
        """Returns the id of the padding before a prompt."""
        return 0


class TunixPPO:
    """Tunix's learner in a thread, which runs a step for every requested batch of prompts."""

    def __init__(self, model_dir: str, work: Workload) -> None:
        if set(work.lengths) != {work.new_tokens}:
            raise SystemExit("--lengths: Tunix's side needs equal lengths")
        config = llama_config(model_dir)
        base = params.create_model_from_safe_tensors(model_dir, config, dtype=jnp.float32)
        provider = qwix.LoraProvider(
            module_path=".*(q_proj|k_proj|v_proj|o_proj)", rank=16, alpha=32.0
        )
        actor = qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(0), **base.get_model_input())
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        roles = (Role.ACTOR, Role.CRITIC, Role.REFERENCE, Role.REWARD, Role.ROLLOUT)
        batch, longest = len(work.prompts), max(map(len, work.prompts))
        optimizer = optax.chain(
            optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, eps=1e-5)
        )
        self.cluster = RLCluster(
            actor=actor,
            reference=base,
            critic=critic(config),
            reward=reward_model(base),
            tokenizer=Numbers(),
            cluster_config=ClusterConfig(
                role_to_mesh=dict.fromkeys(roles, mesh),
                training_config=RLTrainingConfig(
                    actor_optimizer=optimizer,
                    critic_optimizer=optimizer,
                    eval_every_n_steps=1_000_000,
                    max_steps=1_000_000,
                    mini_batch_size=batch,
                    train_micro_batch_size=batch,
                ),
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=work.new_tokens,
                    max_prompt_length=longest,
                    kv_cache_size=longest + work.new_tokens + 1,
                    temperature=1.0,
                    eos_tokens=[NO_TOKEN],
                ),
            ),
        )
        options = PPOConfig(num_iterations=work.epochs, beta=KL_COEF)
        learner = PPOLearner(self.cluster, options)
        self.spans: dict[str, float] = {}
        for method, phase in PHASES.items():
            setattr(self.cluster, method, self._timed(getattr(self.cluster, method), phase))
        self.prompts = np.asarray([Numbers().decode(row) for row in work.prompts])
        self.requests, self.finished = queue.Queue[bool](), queue.Queue[float]()
        threading.Thread(target=learner.train, args=(self._batches(),), daemon=True).start()
        self.finished.get()

    def iteration(self) -> dict[str, float]:
        """Runs one PPO iteration; returns the seconds of rollout, score, update and total."""
        self.spans = {"rollout": 0.0, "score": 0.0, "update": 0.0}
        start = time.perf_counter()
        self.requests.put(True)
        total = self.finished.get() - start
        return self.spans | {"total": total}

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the learner's batches; the learner asks for the next one after each step."""
        while True:
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            self.finished.put(time.perf_counter())
            self.requests.get()
            yield {"prompts": self.prompts}

    def _timed(self, method, phase):
        """Wraps a method so that its seconds are added to a phase."""

        def run(*args, **kwargs):
            start = time.perf_counter()
            result = jax.block_until_ready(method(*args, **kwargs))
            self.spans[phase] += time.perf_counter() - start
            return result

        return run


def llama_config(model_dir: str) -> ModelConfig:
    """Returns Tunix's config of a Hugging Face Llama."""
    hf = AutoConfig.from_pretrained(model_dir)
    theta = getattr(hf, "rope_theta", None) or hf.rope_parameters["rope_theta"]
    return ModelConfig(
        num_layers=hf.num_hidden_layers,
        vocab_size=hf.vocab_size,
        embed_dim=hf.hidden_size,
        hidden_dim=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        head_dim=hf.hidden_size // hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        rope_theta=theta,
        norm_eps=hf.rms_norm_eps,
        weight_tying=hf.tie_word_embeddings,
    )


class Scorer(Llama3):
    """A Llama with a scalar output instead of logits, which Tunix uses for scores and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(dataclasses.replace(config, weight_tying=False), rngs=nnx.Rngs(0))
        self.lm_head = nnx.Linear(config.embed_dim, 1, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, *args, segment_ids: jax.Array | None = None, **kwargs):
        """Drops `segment_ids`, which Tunix's scoring passes but its Llama does not accept."""
        return super().__call__(*args, **kwargs)


def reward_model(base: Llama3) -> Scorer:
    """Makes a reward model of the first layers of the policy and a scalar head."""
    model = Scorer(dataclasses.replace(base.config, num_layers=TRUNK_LAYERS))
    pairs = [(model.embedder, base.embedder), *zip(model.layers, base.layers, strict=False)]
    for ours, theirs in pairs:
        nnx.update(ours, jax.tree.map(jnp.copy, nnx.state(theirs)))
    return model


def critic(config: ModelConfig) -> Scorer:
    """Makes the smallest possible critic."""
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    return Scorer(dataclasses.replace(config, num_layers=1, embed_dim=8, hidden_dim=8, **heads))


def build(model_dir: str, work: Workload) -> TunixPPO:
    """Loads the models; `.iteration()` then runs and times one PPO iteration."""
    return TunixPPO(model_dir, work)
