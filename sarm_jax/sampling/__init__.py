"""Sampling of responses, one token at a time."""
