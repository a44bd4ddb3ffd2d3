"""Token-level PPO against a SARM, with penalties, clamps and a latent KL on its features."""
