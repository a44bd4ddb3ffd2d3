"""Finding features and proving that they are causal."""
