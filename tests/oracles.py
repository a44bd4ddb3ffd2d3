"""Independent oracles: tiny transformers checkpoints, a PyTorch SARM, and loops for the PPO maths.

This module does not import the project, so that an error cannot occur on both sides. The models are
transformers' own Llama with large random weights: at the usual std of 0.02 attention is nearly
uniform, logits are nearly equal, and most errors would pass at a tolerance of 1e-4.

Sources: the Llama-3.1 and ChatML chat templates; SARM (arXiv 2508.08746); PPO (arXiv 1707.06347,
1506.02438) with the details of arXiv 2403.17031.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LLAMA3_ROPE = {  # wavelengths 6, 63, 628, 6283 at head_dim 8 cover all three branches of the rule
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
             "original_max_position_embeddings": 128}  # fmt: skip

# A tiny config of each supported architecture, as changes of `tiny_llama_config`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}

# As in Llama-3.x, the template writes BOS, the date defaults to today, and contents are stripped.
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message['role'] + "<|end_header_id|>\\n\\n" }}
    {{- message['content'] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""

CHATML_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
+ '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def _byte_level(specials: list[str], specials_first: bool) -> Tokenizer:
    """Returns byte-level BPE without merges: a token per UTF-8 byte, plus the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = specials + alphabet if specials_first else alphabet + specials
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return core


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 262 tokens in Llama-3's style.

    BOS is 256, EOS `<|eot_id|>` 260, and PAD 261, the last one, as if added later. Like Llama-3's
    tokenizer it prepends BOS to a text, so templated text must be encoded without special tokens.
    """
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    core = _byte_level([*specials, "<|eot_id|>", "[PAD]"], specials_first=False)
    bos = ("<|begin_of_text|>", core.token_to_id("<|begin_of_text|>"))
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="[PAD]",
        chat_template=LLAMA3_TEMPLATE,
    )


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 259 tokens in SmolLM2's style, which adds no BOS.

    PAD is 0, `<|im_start|>` 1 and `<|im_end|>` 2.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


def tiny_llama_config(model_type: str = "llama", **overrides: Any) -> LlamaConfig:
    """Returns a config of 3 layers, width 32, 4 heads over 2 KV heads and 262 tokens.

    4 does not divide the vocabulary. `model_type` selects another architecture's config class.
    """
    defaults: dict[str, Any] = {
        "vocab_size": 262,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    return CONFIG_MAPPING[model_type](**{**defaults, **overrides})


def _with_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Returns a copy of `config` with the tokenizer's special tokens."""
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size {config.vocab_size} < {len(tokenizer)} tokens")
    config = copy.deepcopy(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return config


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int, dtype: str, std: float = 0.3) -> None:
    """Draws matrices from N(0, std²) and norm weights from U(0.5, 1.5), rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.ndim == 1:
            param.uniform_(0.5, 1.5, generator=generator)
        else:
            param.normal_(0.0, std, generator=generator)
        param.copy_(param.to(getattr(torch, dtype)))


def _write_old_dialect(config_json: Path) -> None:
    """Rewrites config.json with the older fields rope_theta, rope_scaling and torch_dtype."""
    raw = json.loads(config_json.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    raw["torch_dtype"] = raw.pop("dtype")
    if raw.get("head_dim", 0) * raw["num_attention_heads"] == raw["hidden_size"]:
        del raw["head_dim"]  # implied, and missing in most files
    config_json.write_text(json.dumps(raw, indent=2) + "\n")


def save_tiny_llama(
    path: str | Path,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: int | str | None = None,
    dialect: str = "new",
) -> PreTrainedModel:
    """Writes a random model as a Hugging Face directory and returns it.

    Args:
      max_shard_size: for instance "50KB" splits the weights into several files with an index.
      dialect: "new" writes `rope_parameters`; "old" writes `rope_theta` + `rope_scaling`.

    Returns:
      The model in float32 and eval mode, its weights equal to those on disk (rounded to `dtype`).
    """
    if dialect not in ("new", "old"):
        raise ValueError(f"dialect must be 'new' or 'old', got {dialect!r}")
    model = AutoModelForCausalLM.from_config(_with_tokens(config, tokenizer)).eval()
    _randomize(model, seed, dtype)
    on_disk = copy.deepcopy(model).to(getattr(torch, dtype))
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    on_disk.save_pretrained(path, **sharding)
    tokenizer.save_pretrained(path)
    if dialect == "old":
        _write_old_dialect(Path(path) / "config.json")
    return model


def save_tiny_classifier(
    path: str | Path,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Writes a random classifier with one label and its tokenizer; `changes` are config fields.

    Returns:
      The model in float32 and eval mode.
    """
    config = _with_tokens(config, tokenizer)
    for name, value in {"num_labels": 1, **changes}.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    _randomize(model, seed, "float32")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


class SarmOutput(NamedTuple):
    """Output of TorchSarm for one sequence of T tokens."""

    score: torch.Tensor  # []
    z_m: torch.Tensor  # [M], input of the head at the last token
    a_m: torch.Tensor  # [M], pre-activations at the last token
    rec_loss: torch.Tensor  # [], mean over all tokens
    rec_loss_t: torch.Tensor  # [T]; the caller masks it to a turn


class TorchSarm(torch.nn.Module):
    """A SARM for one unpadded sequence at a time, with the parameter names of the HF checkpoint.

    h = trunk(ids), without the final norm
    x = (h - mean(h)) / (std(h) + 1e-6),    std with ddof = 1
    a = W_enc (x - b_pre) + b_latent
    z = topk(a) without ReLU, or a itself if not `use_activation`
    score = w · z at the last token
    rec = mean((W_dec topk(a) + b_pre - x)²) / mean(x²) per token, over topk(a) in either case
    """

    def __init__(
        self,
        config: LlamaConfig,
        sae_source_layer: int,
        latent_size: int,
        k: int,
        use_activation: bool,
    ) -> None:
        super().__init__()
        trunk_config = copy.deepcopy(config)
        trunk_config.num_hidden_layers = sae_source_layer
        if getattr(trunk_config, "layer_types", None) is not None:
            trunk_config.layer_types = trunk_config.layer_types[:sae_source_layer]
        self.model = AutoModel.from_config(trunk_config, dtype=torch.float32)
        self.model.norm = torch.nn.Identity()
        self.sae = torch.nn.Module()
        self.sae.pre_bias = torch.nn.Parameter(torch.zeros(config.hidden_size))
        self.sae.latent_bias = torch.nn.Parameter(torch.zeros(latent_size))
        self.sae.encoder = torch.nn.Linear(config.hidden_size, latent_size, bias=False)
        self.sae.decoder = torch.nn.Linear(latent_size, config.hidden_size, bias=False)
        self.score = torch.nn.Linear(latent_size, 1, bias=False)
        self.k, self.use_activation = k, use_activation

    def forward(self, ids_1t: torch.Tensor) -> SarmOutput:
        """Scores the last token of `ids_1t`, int64 [1, T] without padding."""
        if ids_1t.ndim != 2 or ids_1t.shape[0] != 1:
            raise ValueError(f"expected token ids [1, T], got {tuple(ids_1t.shape)}")
        h_td = self.model(input_ids=ids_1t, use_cache=False).last_hidden_state[0]
        mean_t1 = h_td.mean(-1, keepdim=True)
        variance_t1 = ((h_td - mean_t1) ** 2).sum(-1, keepdim=True) / (h_td.shape[-1] - 1)
        x_td = (h_td - mean_t1) / (variance_t1.sqrt() + 1e-6)

        a_tm = self.sae.encoder(x_td - self.sae.pre_bias) + self.sae.latent_bias
        top_tk, index_tk = a_tm.topk(self.k, dim=-1)
        sparse_tm = torch.zeros_like(a_tm).scatter(-1, index_tk, top_tk)
        z_m = (sparse_tm if self.use_activation else a_tm)[-1]

        x_hat_td = self.sae.decoder(sparse_tm) + self.sae.pre_bias
        rec_loss_t = ((x_hat_td - x_td) ** 2).mean(-1) / (x_td**2).mean(-1)
        return SarmOutput(
            score=self.score(z_m)[0],
            z_m=z_m,
            a_m=a_tm[-1],
            rec_loss=rec_loss_t.mean(),
            rec_loss_t=rec_loss_t,
        )


def save_tiny_sarm(
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    layers: int = 2,
    latent_size: int = 64,
    k: int = 8,
    use_activation: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    extra_declared_layers: bool = True,
    **config_overrides: Any,
) -> TorchSarm:
    """Writes a random SARM in the layout of `Schrieffer/Llama-SARM-4B` and returns its oracle.

    As in that checkpoint, config.json has the old fields and declares more layers than exist
    (unless `extra_declared_layers` is False), and the file holds a `model.norm.weight` that must
    not be applied. The latent bias is so low that some of the kept latents are negative.

    Returns:
      The oracle in float32 and eval mode, its weights equal to those on disk (rounded to `dtype`).
    """
    declared = layers + 2 if extra_declared_layers else layers
    overrides = config_overrides | {"num_hidden_layers": declared}
    config = _with_tokens(tiny_llama_config(**overrides), tokenizer)
    config.architectures, config.dtype = ["LlamaSARM"], getattr(torch, dtype)
    config.sarm_param = {
        "sae_source_layer": layers,
        "sae_latent_size": latent_size,
        "sae_k": k,
        "sae_use_sequence_level": False,
        "sarm_use_activation": use_activation,
    }
    sarm = TorchSarm(
        config,
        sae_source_layer=layers,
        latent_size=latent_size,
        k=k,
        use_activation=use_activation,
    ).eval()
    _randomize(sarm, seed, dtype)
    with torch.no_grad():
        sarm.sae.pre_bias.sub_(1.0)
        sarm.sae.latent_bias.sub_(4.0)
        for bias in (sarm.sae.pre_bias, sarm.sae.latent_bias):
            bias.copy_(bias.to(config.dtype))

    norm = torch.linspace(2.0, 3.0, config.hidden_size)
    tensors = {**sarm.state_dict(), "model.norm.weight": norm}
    tensors = {name: tensor.to(config.dtype).contiguous() for name, tensor in tensors.items()}
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    _write_old_dialect(Path(path) / "config.json")
    return sarm


def gae_loop(
    rewards_bt: np.ndarray, values_bt: np.ndarray, mask_bt: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Computes generalised advantages: δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γ λ A_{t+1}.

    V and A are 0 after the last token of the mask; entries outside the mask are never read.

    Returns:
      advantages [B, T] before whitening and returns A + V [B, T], float64, 0 outside the mask.
    """
    advantages_bt = np.zeros(rewards_bt.shape, np.float64)
    returns_bt = np.zeros(rewards_bt.shape, np.float64)
    for b in range(rewards_bt.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(rewards_bt.shape[1])):
            if not mask_bt[b, t]:
                continue
            value = float(values_bt[b, t])
            delta = float(rewards_bt[b, t]) + gamma * next_value - value
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value
            advantages_bt[b, t] = next_advantage
            returns_bt[b, t] = next_advantage + value
    return advantages_bt, returns_bt


def masked_whiten_loop(values_bt: np.ndarray, mask_bt: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """Computes (x − μ) / √(σ² + eps) over the masked entries of the batch, ddof 0; 0 elsewhere."""
    where = [(b, t) for b, t in np.ndindex(values_bt.shape) if mask_bt[b, t]]
    mean = math.fsum(float(values_bt[i]) for i in where) / len(where)
    variance = math.fsum((float(values_bt[i]) - mean) ** 2 for i in where) / len(where)
    whitened_bt = np.zeros(values_bt.shape, np.float64)
    for i in where:
        whitened_bt[i] = (float(values_bt[i]) - mean) / math.sqrt(variance + eps)
    return whitened_bt


def ppo_loss_loop(
    logp_bt: np.ndarray,
    old_logp_bt: np.ndarray,
    advantages_bt: np.ndarray,
    values_bt: np.ndarray,
    old_values_bt: np.ndarray,
    returns_bt: np.ndarray,
    mask_bt: np.ndarray,
    clip_range: float,
    value_clip_range: float,
    token_count: int | None = None,
) -> dict[str, float]:
    """Computes the clipped policy and value losses, ρ = exp(clip(log π − log π_old, ±20)).

    policy_loss = Σ max(−Aρ, −A clip(ρ, 1 ± ε)) / N
    value_loss = ½ Σ max((V − R)², (clip(V, V_old ± ε_v) − R)²) / N

    Args:
      token_count: N, the tokens of the whole step; default: the tokens of this mask.

    Returns:
      policy_loss, value_loss, and the means over N of approx_kl = ρ − 1 − log ρ and of
      clip_fraction = 1[|ρ − 1| > ε].
    """
    sums = {"policy_loss": 0.0, "value_loss": 0.0, "approx_kl": 0.0, "clip_fraction": 0.0}
    tokens = 0
    for b, t in np.ndindex(mask_bt.shape):
        if not mask_bt[b, t]:
            continue
        tokens += 1
        log_ratio = min(max(float(logp_bt[b, t]) - float(old_logp_bt[b, t]), -20.0), 20.0)
        ratio = math.exp(log_ratio)
        clipped_ratio = min(max(ratio, 1.0 - clip_range), 1.0 + clip_range)
        advantage = float(advantages_bt[b, t])
        sums["policy_loss"] += max(-advantage * ratio, -advantage * clipped_ratio)
        sums["approx_kl"] += ratio - 1.0 - log_ratio
        sums["clip_fraction"] += abs(ratio - 1.0) > clip_range

        value, old_value = float(values_bt[b, t]), float(old_values_bt[b, t])
        target = float(returns_bt[b, t])
        clipped = min(max(value, old_value - value_clip_range), old_value + value_clip_range)
        sums["value_loss"] += 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    divisor = float(token_count or tokens)
    return {name: total / divisor for name, total in sums.items()}
