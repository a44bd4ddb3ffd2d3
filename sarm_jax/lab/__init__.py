"""The reward-hacking lab: a small world whose true reward is known."""
