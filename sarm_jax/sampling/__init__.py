"""Samples responses one token at a time."""
