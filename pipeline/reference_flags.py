"""Accept the flags of the reference implementation (nikhilk7153/cpsc4710), or name the option.

The flags of its PPO program are accepted with their meaning there: `--output_dir` is `--workdir`,
and `--batch_size` and `--gradient_accumulation_steps` count rows on a device, see `set_batch`. A
flag of its other scripts, or of its launcher, is refused with the option to use instead.
"""

import math
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sarm_jax.io.errors import InputError

_STRING, _FLOAT, _INTEGER = flags.DEFINE_string, flags.DEFINE_float, flags.DEFINE_integer
SHORTHANDS = {  # flag: (kind, config field)
    "policy_model": (_STRING, "policy_model"),
    "sarm_model": (_STRING, "sarm_model"),
    "prompts_jsonl": (_STRING, "prompts_jsonl"),
    "experiment_name": (_STRING, "experiment_name"),
    "human_latents": (_STRING, "reward.human_latents"),
    "penalize_features": (_STRING, "reward.penalize_features"),
    "tau_values": (_STRING, "reward.tau_values"),
    "alpha_values": (_STRING, "reward.alpha_values"),
    "clamp_features": (_STRING, "reward.clamp_features"),
    "clamp_set_values": (_STRING, "reward.clamp_set_values"),
    "clamp_min_values": (_STRING, "reward.clamp_min_values"),
    "clamp_max_values": (_STRING, "reward.clamp_max_values"),
    "beta": (_FLOAT, "reward.beta"),
    "latent_indices": (_STRING, "reward.latent_indices"),
    "disc_lr": (_FLOAT, "discriminator.learning_rate"),
    "learning_rate": (_FLOAT, "ppo.learning_rate"),
    "total_steps": (_INTEGER, "ppo.total_steps"),
    "ppo_epochs": (_INTEGER, "ppo.ppo_epochs"),
    "clip_range": (_FLOAT, "ppo.clip_range"),
    "vf_coef": (_FLOAT, "ppo.vf_coef"),
    "max_grad_norm": (_FLOAT, "ppo.max_grad_norm"),
    "seed": (_INTEGER, "ppo.seed"),
    "lora_r": (_INTEGER, "lora.rank"),
    "lora_alpha": (_FLOAT, "lora.alpha"),
    "lora_dropout": (_FLOAT, "lora.dropout"),
    "max_new_tokens": (_INTEGER, "ppo.max_new_tokens"),
    "temperature": (_FLOAT, "ppo.temperature"),
    "top_p": (_FLOAT, "ppo.top_p"),
}
BATCH = {  # flag: (config field, description)
    "batch_size": ("ppo.batch_size", "responses of a microbatch on a device"),
    "gradient_accumulation_steps": (
        "ppo.gradient_accumulation_steps",
        "microbatches of an optimizer step; with --batch_size both are multiplied",
    ),
}
_LATENTS = "--stage=human_latents writes {workdir}/human_latents.safetensors"
_PROBE_FILES = "--stage=probe writes {workdir}/probes/probe_f{ID}.csv"
_DATA = (
    "--config.probe.data_jsonl, --config.identify.pairs_jsonl or --config.evaluate.data_jsonl, "
    "as the stage reads it"
)
REPLACED = {  # flag of another script: what stands for it
    "api_base": "no service is called: probes/naming_prompts.jsonl holds prompts to paste",
    "api_key": "no service is called: probes/naming_prompts.jsonl holds prompts to paste",
    "apply_threshold": "--config.identify.examples, the strongest responses of a feature",
    "config_file": "--config.mesh.data, --config.mesh.fsdp and --config.mesh.tensor",
    "data_jsonl": "--config.probe.data_jsonl or --config.evaluate.data_jsonl",
    "data_path": _DATA,
    "demos_jsonl": "--config.human_latents.demos_jsonl",
    "device": "JAX_PLATFORMS=cpu or cuda, in the environment",
    "dtype": "--config.dtype",
    "engine": "no service is called: probes/naming_prompts.jsonl holds prompts to paste",
    "feature": "--config.probe.feature",
    "head_delta": "--config.evaluate.steering_json with a factor on the feature",
    "interpret": "probes/naming_prompts.jsonl of --stage=identify, to paste into a chat model",
    "lr": "--learning_rate",
    "main_process_port": "--coordinator_address",
    "max_length": "--config.sarm_max_length",
    "max_value": "--config.probe.max_value",
    "min_value": "--config.probe.min_value",
    "mode": "--config.probe.mode",
    "model_name": "--sarm_model",
    "model_path": "--sarm_model",
    "num_example": "--config.evaluate.num_example",
    "num_machines": "--num_processes",
    "openai_key": "no service is called: probes/naming_prompts.jsonl holds prompts to paste",
    "out": _LATENTS,
    "out_csv": _PROBE_FILES,
    "output_file": "--stage=identify writes {workdir}/probes/feature_scores.safetensors",
    "output_path": "--stage=evaluate writes {workdir}/eval/steering_rows.jsonl",
    "plot_path": "--stage=evaluate writes {workdir}/eval/steering_*.png",
    "quick": "--config=configs/reference_small.py, or smaller --total_steps",
    "sarm_base_model": "the architecture is read from the model's config.json",
    "set_value": "--config.probe.set_value",
    "steering_path": "--config.evaluate.steering_json",
    "tokenizer_path": "the tokenizer is read from the model's directory",
    "top_k": "--config.identify.top_k, or --config.probe.rank for a candidate's rank",
    "trust_remote_code": "no code of a model is ever run",
}


def define() -> None:
    """Defines the flags that are accepted; those that are not given leave the config alone."""
    define_flag: Any  # absl's functions have different signatures
    for name, (define_flag, field) in SHORTHANDS.items():
        define_flag(name, None, f"shorthand for --config.{field}")
    for name, (_, description) in BATCH.items():
        _INTEGER(name, None, description)
    _STRING("output_dir", None, "another name of --workdir")


def replacement(name: str) -> str | None:
    """Returns what to use instead of a flag of the reference that is not taken, or None."""
    return REPLACED.get(name)


def set_batch(config: ConfigDict, argv: Sequence[str]) -> None:
    """Sets the batch from --batch_size and --gradient_accumulation_steps, as Hugging Face counts.

    A device has microbatches of `--batch_size` rows, an optimizer step has
    `--gradient_accumulation_steps` of them, on every data-parallel device (mesh.data × mesh.fsdp),
    and a PPO step has ppo.num_minibatches optimizer steps per epoch. ppo.batch_size is their
    product. With `--gradient_accumulation_steps` alone ppo.batch_size stays, cut in as many pieces.
    """
    rows: Any
    pieces: Any
    rows, pieces = (flags.FLAGS[name].value for name in BATCH)
    for name, (field, _) in BATCH.items():
        value: Any = flags.FLAGS[name].value
        if value is None:
            continue
        if value < 1:
            raise InputError(f"--{name}={value}: must be at least 1")
        if any(a.partition("=")[0].lstrip("-") == f"config.{field}" for a in argv):
            raise InputError(f"--{name}={value} and --config.{field} are both given: give one")
    if pieces is not None:
        config.ppo.gradient_accumulation_steps = pieces
    if rows is not None:
        pieces = config.ppo.gradient_accumulation_steps
        factors = pieces, config.ppo.num_minibatches, config.mesh.data, config.mesh.fsdp
        if min(factors) > 0:  # else their own check refuses them
            config.ppo.batch_size = rows * math.prod(factors)
