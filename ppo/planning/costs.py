"""The costs that are inherent in the programs of a PPO step, however they are compiled.

FLOPs are those of matrix products and causal attention; a multiplication and an addition count as
two. The inherent bytes are the weights that a device reads, once per pass, and for a decoded token
the keys and values before it. Activations do not count, since they could stay on the chip.
"""

import dataclasses
import math

from ppo.config import PPOConfig
from ppo.slots import largest_slots
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig
from sarm_jax.sampling.refilling import refill_size


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and inherent bytes of one run of a program on one device."""

    flops: float
    inherent_bytes: float


def step_costs(
    config: PPOConfig,
    lora: LoRAConfig,
    *,
    policy: LlamaConfig,
    sarm: SARMConfig | LinearRewardConfig,
    mesh: MeshConfig,
    score_rows: int,
    remat: str,
    bytes_per_weight: int,
) -> dict[str, tuple[Cost, ...]]:
    """Returns the costs of each program of `ppo.planning.programs`, for full batches.

    The costs of a program are those of its parts, which run one after the other. A rollout consists
    of the prefill and all tokens after it; every other program is one part.

    Args:
        config: options of PPO; every prompt has `config.max_prompt_tokens` tokens.
        lora: options of the adapter.
        policy: architecture of the policy.
        sarm: architecture of the SARM.
        mesh: the device mesh.
        score_rows: conversations that are scored at a time.
        remat: rematerialisation of the policy, "dots" or "full".
        bytes_per_weight: bytes of one weight.
    """
    rows, prompt, new = config.batch_size, config.max_prompt_tokens, config.max_new_tokens
    length = prompt + new

    def cost(flops: float, read_weights: float, cache: float = 0.0, passes: int = 1) -> Cost:
        # A device reads all weights except those that the `tensor` axis splits.
        read = passes * read_weights / mesh.tensor + cache / mesh.devices
        return Cost(flops / mesh.devices, bytes_per_weight * read)

    weights = all_weights(policy)
    parts, prompts = mesh.batch_parts, config.prompts_per_batch
    prefill_flops = forward_flops(policy, prompts, prompt, logits=prompts)
    prefills = cost(prefill_flops, weights, passes=refills(config))
    context = prompt + new / 2  # mean number of tokens before a decoded token
    running = config.rollout_rows
    cache = cached_numbers(policy, running, context)
    decode = cost(decode_flops(policy, running, context), weights, cache=cache)
    steps, *_ = open_loops(config)
    tokens = Cost(steps * decode.flops, steps * decode.inherent_bytes)
    score_flops, score_weights = score_work(sarm, score_rows, length)
    computed = computed_tokens(config, parts)
    reference_flops = forward_flops(policy, rows, length, logits=rows * new, tokens=computed)
    reference = cost(reference_flops, weights, passes=config.pieces)
    passes = (3 if remat == "full" else 2) * config.gradient_accumulation_steps
    step = cost(step_flops(config, lora, policy, remat, parts), weights, passes=passes)
    return {
        "rollout": (prefills, tokens),
        "prefill": (cost(prefill_flops, weights),),
        "decode": (decode,),
        "score": (cost(score_flops, score_weights),),
        "reference": (reference,),
        "targets": (reference,),
        "first_step": (step,),
        "step": (step,),
    }


def all_weights(config: LlamaConfig) -> int:
    """Returns the number of weights that a token is multiplied with, those of the head included."""
    layers = layer_weights(config) * config.num_hidden_layers
    return layers + config.vocab_size * config.hidden_size


def refills(config: PPOConfig) -> int:
    """Returns how often a rollout runs prompts: once, or each time that slots are refilled."""
    if not config.rollout_slots:
        return 1
    prompts = config.prompts_per_batch
    return prompts // refill_size(prompts, config.samples_per_prompt, config.rollout_slots)


def open_loops(config: PPOConfig) -> tuple[int, ...]:
    """Returns how often the loops of a rollout run if every response is at its limit.

    The outer loop decodes tokens. With refilled slots, an inner loop fills the slots.
    """
    tokens = config.max_new_tokens - 1  # the first token is drawn from the prefill
    if not config.rollout_slots:
        return (tokens,)
    return (tokens * math.ceil(config.batch_size / config.rollout_rows), refills(config))


def score_work(
    sarm: SARMConfig | LinearRewardConfig, rows: int, length: int
) -> tuple[float, float]:
    """Returns the FLOPs of scoring a batch, and the number of weights that it reads."""
    trunk = layer_weights(sarm.trunk) * sarm.trunk.num_hidden_layers
    encoder = sarm.trunk.hidden_size * sarm.latent_size
    return forward_flops(sarm.trunk, rows, length) + 2 * rows * encoder, trunk + encoder


def cached_numbers(config: LlamaConfig, rows: int, context: float) -> float:
    """Returns how many keys and values decoding a token reads in `rows` sequences."""
    heads = config.num_key_value_heads * config.head_dim
    return rows * context * (2 * heads * config.num_hidden_layers)


def decode_flops(config: LlamaConfig, rows: int, context: float) -> float:
    """Returns the FLOPs of decoding a token in `rows` sequences, after `context` tokens."""
    heads = config.num_attention_heads * config.head_dim
    return 2.0 * rows * all_weights(config) + 4 * rows * context * heads * config.num_hidden_layers


def step_flops(
    config: PPOConfig, lora: LoRAConfig, policy: LlamaConfig, remat: str, parts: int = 1
) -> float:
    """Returns the FLOPs of an optimizer step, with every prompt and response at its limit.

    `parts` is the number of parts that a batch is split into, see `computed_tokens`.
    """
    rows = config.batch_size // config.num_minibatches
    length = config.max_prompt_tokens + config.max_new_tokens
    tokens = computed_tokens(config, parts) // config.num_minibatches
    forward = forward_flops(
        policy, rows, length, logits=rows * config.max_new_tokens, tokens=tokens
    )
    adapters = 2 * tokens * lora.rank * adapted_widths(policy, lora)
    # The backward pass: gradients of activations and adapters, and what is computed again.
    again = forward if remat == "full" else 0.0
    return 2 * forward + again + 3 * adapters


def computed_tokens(config: PPOConfig, parts: int = 1) -> int:
    """Returns the tokens of a batch that a forward pass computes.

    In packed batches a prompt counts once for all its responses in the same microbatch and the same
    of `parts` parts.
    """
    slots = largest_slots(config, config.max_prompt_tokens, parts)
    if slots is None:
        return config.batch_size * (config.max_prompt_tokens + config.max_new_tokens)
    return config.pieces * parts * slots.tokens


def layer_weights(config: LlamaConfig) -> int:
    """Returns the number of matrix entries in a layer."""
    d, h = config.hidden_size, config.head_dim
    attention = 2 * d * h * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * d * config.intermediate_size


def adapted_widths(config: LlamaConfig, lora: LoRAConfig) -> int:
    """Returns Σ (inputs + outputs) over the adapted matrices of all layers."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    widths = {
        "q_proj": d + q,
        "k_proj": d + kv,
        "v_proj": d + kv,
        "o_proj": q + d,
        "gate_proj": d + f,
        "up_proj": d + f,
        "down_proj": f + d,
    }
    return config.num_hidden_layers * sum(widths[name] for name in lora.target_modules)


def forward_flops(
    config: LlamaConfig, rows: int, length: int, logits: int = 0, tokens: int | None = None
) -> float:
    """Returns the FLOPs of a forward pass over `rows` sequences of `length` tokens.

    `logits` is the number of tokens for which the vocabulary projection is computed. `tokens` is
    the number that the weights of the layers are applied to; None: all. Attention is computed for
    all.
    """
    products = 2 * (rows * length if tokens is None else tokens) * layer_weights(config)
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * rows * (length * (length + 1) / 2) * heads
    vocabulary = 2 * logits * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * (products + attention) + vocabulary
