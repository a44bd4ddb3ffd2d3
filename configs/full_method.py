"""Llama-3.1-8B-Instruct against Llama-SARM-4B: harmful features penalised, plus the latent KL.

Paper: SARM, arXiv 2508.08746; the features come from its steering set for safety.
Before: accept the licences of both models on Hugging Face and log in, or convert the models
        (python -m conversion.from_hf). Write {"prompt"} lines to outputs/data/prompts.jsonl and
        {"prompt", "response"} lines to outputs/data/demos.jsonl. Then collect the human latents:
        python main.py --config=configs/full_method.py --stage=human_latents
Command: python main.py --config=configs/full_method.py
Hardware: 4×H100 80 GB, with every layer split over all four. On one or two GPUs:
        --config.mesh.tensor=1 or 2.
Time: 1.2 s per PPO step, as --stage=plan estimates it for the reference's prompts. Measured on one
        H100 (--config.mesh.tensor=1) for prompts of 512 tokens and random weights: 3.0 s. The
        reference implementation took 13.5 s.
Expected result: not run with the real models. In the reference implementation the policy did not
        move (KL about 0). An alpha of 0.1 is about two standard deviations of the SARM's score.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "meta-llama/Llama-3.1-8B-Instruct"
    config.sarm_model = "Schrieffer/Llama-SARM-4B"
    config.dtype = "bfloat16"
    config.remat = "full"
    config.mesh.tensor = 4
    config.plan.target = "h100x4"
    config.plan.policy_config = "configs/architectures/llama_3_1_8b_instruct"
    config.plan.sarm_config = "configs/architectures/llama_sarm_4b"
    # Lengths of the 3,184 prompts in nikhilk7153/cpsc4710, data/train/prompts.jsonl, in tokens with
    # the Llama-3.1 chat template.
    config.plan.prompt_lengths = "configs/data/reference_prompt_lengths.json"
    config.prompts_jsonl = "outputs/data/prompts.jsonl"
    config.human_latents.demos_jsonl = "outputs/data/demos.jsonl"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.ppo.total_steps = 100
    config.ppo.batch_size = 8
    config.ppo.max_new_tokens = 256
    config.ppo.long_prompts = "drop"  # one of those 3,184 prompts has more than 1,024 tokens
    config.ppo.logprob_chunk = 64

    # Old and new log-probabilities come from two programs, which round differently in bfloat16.
    config.guards.ratio_0_max_dev = 0.1
    config.reward.penalize_features = "48659,28879,26446"
    config.reward.tau_values = "3.0,3.0,3.0"
    config.reward.alpha_values = "0.1,0.1,0.1"
    config.reward.beta = 0.01
    config.reward.latent_indices = "48659,28879,26446,46231,25241"
    config.reward.human_latents = "{workdir}/human_latents.safetensors"
    return config
