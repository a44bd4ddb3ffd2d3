"""The language model, its LoRA and the SARM on it."""
