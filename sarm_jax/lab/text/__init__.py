"""Tasks in English for a real language model, with a true reward and shortcuts."""
