"""Hugging Face ⇄ Flax: loading models, converting directories, exporting adapters."""

import os

# before transformers is imported: it would advise to install PyTorch, which nothing here needs
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from conversion.load import load_policy, load_sarm

__all__ = ["load_policy", "load_sarm"]
