"""Experiments: `base` holds every option, every other file is a diff from it."""
