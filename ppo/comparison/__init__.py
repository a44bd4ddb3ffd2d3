"""Comparison of trained policies with their base on held-out prompts."""
