"""Experiments: `base` holds every option, each other file is a diff from it."""
