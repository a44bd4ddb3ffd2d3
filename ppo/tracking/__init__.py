"""Metrics, checkpoints, guards and traces of a run."""
