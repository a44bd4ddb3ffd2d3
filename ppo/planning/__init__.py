"""Plans the memory and time of a PPO step, for a machine that need not be present."""
