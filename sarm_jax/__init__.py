"""SARM in JAX: a reward model whose reward is a sum of sparse, controllable features.

    from sarm_jax import SARM, Llama, RewardModel, generate

`conversion.load_policy` and `conversion.load_sarm` read these models from Hugging Face directories.
"""

import sys

from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.sampling import generate as _generate
from sarm_jax.version import VERSION

__version__ = VERSION
generate = _generate.generate
# Notebooks also know it as `from sarm_jax.generate import generate`.
sys.modules[f"{__name__}.generate"] = _generate

__all__ = ["SARM", "Llama", "LlamaConfig", "RewardModel", "SARMConfig", "__version__", "generate"]
