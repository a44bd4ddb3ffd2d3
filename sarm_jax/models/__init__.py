"""The Llama language model, LoRA adapters, and the SARM reward model."""
