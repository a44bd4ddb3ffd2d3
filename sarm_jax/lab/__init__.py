"""The reward-hacking lab: a small world in which the true reward is known."""
