"""What the programs of a PPO step have to do, whatever the compiler makes of it.

FLOPs are those of matrix products and causal attention (a multiplication and an addition each).
The inherent bytes are the weights once per pass, in the layout that a device reads, and for a
decoded token the keys and values before it; activations could stay on the chip and count nothing.
"""

import dataclasses

from ppo.config import PPOConfig
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Per device and run."""

    flops: float
    inherent_bytes: float


def step_costs(
    config: PPOConfig,
    lora: LoRAConfig,
    policy: LlamaConfig,
    sarm: SARMConfig,
    mesh: MeshConfig,
    score_rows: int,
    remat: str,
    bytes_per_weight: int,
) -> dict[str, tuple[Cost, ...]]:
    """By the names of `ppo.planning.programs`, of full batches: parts that follow each other.

    Those of a rollout are its prefill and all tokens after it; other programs are one part.
    """
    rows, prompt, new = config.batch_size, config.max_prompt_tokens, config.max_new_tokens
    length = prompt + new
    step_rows = rows // config.num_minibatches

    def cost(flops: float, weights: float, cache: float = 0.0, passes: int = 1) -> Cost:
        # A device computes with all of a layer that its `tensor` axis does not split.
        read = passes * weights / mesh.tensor + cache / mesh.devices
        return Cost(flops / mesh.devices, bytes_per_weight * read)

    whole = layer_weights(policy) * policy.num_hidden_layers
    head = policy.vocab_size * policy.hidden_size
    prefill = cost(forward_flops(policy, rows, prompt, logits=rows), whole + head)
    context = prompt + new / 2  # of a token, in the mean
    heads = policy.num_attention_heads * policy.head_dim
    decode_flops = 2.0 * rows * (whole + head)
    decode_flops += 4 * rows * context * heads * policy.num_hidden_layers
    kv = 2 * policy.num_key_value_heads * policy.head_dim * policy.num_hidden_layers
    decode = cost(decode_flops, whole + head, cache=rows * context * kv)
    tokens = Cost((new - 1) * decode.flops, (new - 1) * decode.inherent_bytes)
    trunk = layer_weights(sarm.trunk) * sarm.trunk.num_hidden_layers
    encoder = sarm.sae.hidden_size * sarm.sae.latent_size
    score_flops = forward_flops(sarm.trunk, score_rows, length) + 2 * score_rows * encoder
    reference = forward_flops(policy, rows, length, logits=rows * new)
    forward = forward_flops(policy, step_rows, length, logits=step_rows * new)
    adapters = 2 * step_rows * length * lora.rank * adapted_widths(policy, lora)
    # Backward: the gradients of the activations, of the adapters, and what is computed again.
    again = forward if remat == "full" else 0.0
    passes = (3 if again else 2) * config.gradient_accumulation_steps
    step = cost(2 * forward + again + 3 * adapters, whole + head, passes=passes)
    return {
        "rollout": (prefill, tokens),
        "prefill": (prefill,),
        "decode": (decode,),
        "score": (cost(score_flops, trunk + encoder),),
        "reference": (cost(reference, whole + head, passes=config.pieces),),
        "targets": (cost(reference, whole + head, passes=config.pieces),),
        "first_step": (step,),
        "step": (step,),
    }


def layer_weights(config: LlamaConfig) -> int:
    """Matrix entries of one layer."""
    d, h = config.hidden_size, config.head_dim
    attention = 2 * d * h * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * d * config.intermediate_size


def adapted_widths(config: LlamaConfig, lora: LoRAConfig) -> int:
    """Σ (inputs + outputs) over the adapted products of all layers."""
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


def forward_flops(config: LlamaConfig, rows: int, length: int, logits: int = 0) -> float:
    """Of `rows` sequences of `length` tokens, and the vocabulary projection of `logits` tokens."""
    products = 2 * rows * length * layer_weights(config)
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * rows * (length * (length + 1) / 2) * heads
    vocabulary = 2 * logits * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * (products + attention) + vocabulary
