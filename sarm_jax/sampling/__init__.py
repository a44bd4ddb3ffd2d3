"""Sampling responses, one token at a time."""
