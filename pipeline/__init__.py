"""From a config to finished stages."""
