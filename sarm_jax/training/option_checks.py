"""Checks of the options of a training stage, whose errors name the option in full."""

from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError


class OptionChecks:
    """Checks of the fields of an options dataclass.

    Args:
        section: name of the section of the config that the options belong to.
        options: the dataclass.
    """

    def __init__(self, section: str, options: Any):
        self.section, self.options = section, options

    def require(self, name: str, condition: bool, rule: str) -> None:
        """Raises InputError, naming the option and the rule, if the condition does not hold."""
        if not condition:
            raise InputError(f"{self.section}.{name}={getattr(self.options, name)}: {rule}")

    def at_least(self, least: int, *names: str) -> None:
        """Requires numbers that are not below `least`."""
        for name in names:
            self.require(name, getattr(self.options, name) >= least, f"must be at least {least}")

    def positive(self, *names: str) -> None:
        """Requires positive, finite numbers."""
        for name in names:
            self.require(name, 0 < getattr(self.options, name) < np.inf, "must be positive")

    def not_negative(self, *names: str) -> None:
        """Requires finite numbers that are 0 or more."""
        for name in names:
            self.require(name, 0 <= getattr(self.options, name) < np.inf, "must not be negative")

    def of_an_sae(self) -> None:
        """Checks the options that both trainings of an SAE have: held-out set, sizes, seed."""
        o = self.options
        self.require("held_out_fraction", 0 < o.held_out_fraction < 1, "must lie in (0, 1)")
        self.require("warmup_fraction", 0 <= o.warmup_fraction < 1, "must lie in [0, 1)")
        self.at_least(1, "latent_size", "k", "dead_after_steps", "aux_k")
        self.at_least(2, "max_length")
        self.not_negative("aux_weight")
        self.require("seed", 0 <= o.seed < 2**31, "must lie in [0, 2^31)")
        at_most = f"must be at most {self.section}.latent_size={o.latent_size}"
        self.require("k", o.k <= o.latent_size, at_most)
        self.require("aux_k", o.aux_k <= o.latent_size, at_most)
