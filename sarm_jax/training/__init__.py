"""Training of a SARM from preference pairs."""
