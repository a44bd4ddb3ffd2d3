"""What a PPO step takes on a machine that need not be there."""
