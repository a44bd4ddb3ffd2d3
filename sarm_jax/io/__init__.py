"""Errors, files, logging and signals."""
