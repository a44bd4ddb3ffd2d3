"""Hugging Face ⇄ Flax: load models, convert directories, export adapters."""

import os

# Set before transformers is imported, which would advise to install PyTorch. Nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from conversion.load import load_policy, load_reward_model, load_sarm

__all__ = ["load_policy", "load_reward_model", "load_sarm"]
