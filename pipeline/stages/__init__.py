"""The stages, one module each, every one of which ends in `STAGE = Stage(...)`."""
