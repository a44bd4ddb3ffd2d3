"""SARM in JAX: a reward model whose reward is a sum of sparse, controllable features."""
