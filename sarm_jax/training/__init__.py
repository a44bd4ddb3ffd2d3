"""Training a SARM from preference pairs."""
