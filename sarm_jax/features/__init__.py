"""Identification of features and tests of their causal effect on the reward."""
