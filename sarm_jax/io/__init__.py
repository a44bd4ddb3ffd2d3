"""Errors, files, JSON, working directories, logging, signals and secrets."""
