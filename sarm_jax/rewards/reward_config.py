"""Options of the compound reward, checked; `sarm_jax.rewards.compound` computes it."""

import dataclasses

from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import ENSEMBLES, Intervention, intervention

# The terms besides score, penalties of features and latent KL: name → the option that turns it on.
FURTHER_TERMS = {
    "probe_penalty": "probe_penalty",
    "distance_penalty": "distance_penalty",
    "length_penalty": "length_penalty",
    "bound_deduction": "bound",
}
CLAMP_VALUES = ("clamp_set_values", "clamp_min_values", "clamp_max_values")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Options of the compound reward, the section `reward` of a config, with the same defaults.

    `tau_values` and `alpha_values` have one value per penalised feature. Each list of clamp values
    is empty or has one value per clamped feature. A value of None leaves that bound open, and a
    feature that is set to a value can have no bounds. `penalty_cap` is in σ of the scores of
    reference responses, whatever the `unit` of α and β. `probe` names a file of
    `--stage=train_probe`.
    With `screen` there are no `alpha_values`: features and probe screen responses instead.
    `human_states` names a file of `--stage=human_latents`.
    `ensemble` says how the scores of several heads become R_SARM (`sarm_jax.models.sarm`); the
    latents are the same for all heads.

    Raises:
        InputError: an option is invalid; the message names `reward.<field>` and its value.
    """

    penalize_features: tuple[int, ...] = ()
    tau_values: tuple[float, ...] = ()
    alpha_values: tuple[float, ...] = ()
    clamp_features: tuple[int, ...] = ()
    clamp_set_values: tuple[float | None, ...] = ()
    clamp_min_values: tuple[float | None, ...] = ()
    clamp_max_values: tuple[float | None, ...] = ()
    beta: float = 0.0
    latent_indices: tuple[int, ...] = ()
    unit: str = "score"
    penalty_cap: float = 10.0
    probe: str = ""
    probe_penalty: float = 0.0
    screen: bool = False
    human_states: str = ""
    distance_penalty: float = 0.0
    length_penalty: float = 0.0
    bound: str = ""
    ensemble: str = "mean"

    def __post_init__(self) -> None:
        self._check_lengths()
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            ids = getattr(self, name)
            repeated = sorted({i for i in ids if ids.count(i) > 1})
            if repeated:
                raise InputError(f"reward.{name}: feature {repeated[0]} is given twice")
        for name in ("tau_values", "alpha_values"):
            for value in getattr(self, name):
                if not 0 <= value < float("inf"):
                    raise InputError(f"reward.{name}: {value} must be finite and not negative")
        for name in ("beta", "probe_penalty", "distance_penalty", "length_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(
                    f"reward.{name}={getattr(self, name)}: must be finite and not negative"
                )
        if self.probe_penalty and not self.probe:
            raise InputError(
                f"reward.probe_penalty={self.probe_penalty} needs a probe: make one with "
                "--stage=train_probe and name its file with --config.reward.probe"
            )
        if self.distance_penalty and not self.human_states:
            raise InputError(
                f"reward.distance_penalty={self.distance_penalty} needs human states: make them "
                "with --stage=human_latents --config.human_latents.states=True and name their file "
                "with --config.reward.human_states"
            )
        self._check_screen()
        if self.unit not in ("score", "sd"):
            raise InputError(f"reward.unit={self.unit!r}: expected 'score' or 'sd'")
        if self.bound not in ("", "sigmoid"):
            raise InputError(f"reward.bound={self.bound!r}: expected 'sigmoid', or '' for none")
        if self.ensemble not in ENSEMBLES:
            raise InputError(f"reward.ensemble={self.ensemble!r}: expected 'mean' or 'min'")
        if not self.penalty_cap > 0:
            raise InputError(f"reward.penalty_cap={self.penalty_cap}: must be positive (inf: none)")

    def _check_lengths(self) -> None:
        """Raises InputError unless lists that belong together have equal lengths."""
        for name in ("tau_values",) if self.screen else ("tau_values", "alpha_values"):
            self._check_length(name, "penalize_features")
        bounds = [name for name in CLAMP_VALUES if getattr(self, name)]
        if bool(self.clamp_features) != bool(bounds):
            raise InputError(
                f"reward.clamp_features={','.join(map(str, self.clamp_features)) or '(none)'} with "
                f"{' '.join(f'reward.{name}' for name in bounds) or 'no clamp values'}: "
                "give both or neither"
            )
        for name in bounds:
            self._check_length(name, "clamp_features")

    def _check_screen(self) -> None:
        """Raises InputError unless a screen has something to read, and no penalty beside it."""
        if not self.screen:
            return
        if not (self.penalize_features or self.probe):
            raise InputError("reward.screen=True: needs reward.penalize_features or reward.probe")
        check_screens_alone(",".join(map(str, self.alpha_values)), self.probe_penalty)

    def _check_length(self, name: str, features: str) -> None:
        count, expected = len(getattr(self, name)), len(getattr(self, features))
        if count != expected:
            raise InputError(
                f"reward.{name} has {count} values for {expected} reward.{features}: "
                "give one value per feature"
            )

    @property
    def reads_features(self) -> bool:
        """True if the reward depends on features beyond the score itself."""
        return bool(self.penalize_features or self.clamp_features) or self.beta > 0

    @property
    def reads_probe(self) -> bool:
        """True if the reward depends on the dense probe."""
        return self.probe_penalty > 0 or (self.screen and bool(self.probe))

    @property
    def has_controls(self) -> bool:
        """True if anything is taken from the score."""
        return bool(self.penalize_features) or self.beta > 0 or bool(self.further_terms)

    @property
    def further_terms(self) -> tuple[str, ...]:
        """Names of the terms besides score, feature penalties and latent KL that are on."""
        return tuple(name for name, option in FURTHER_TERMS.items() if getattr(self, option))

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Columns of metrics.csv that a run has only if a further term is on."""
        probe = ("probe_margin", "probe_above_tau") if self.reads_probe else ()
        distance = ("state_distance",) if self.distance_penalty else ()
        screen = ("screened_fraction", "screened_updates") if self.screen else ()
        return (*self.further_terms, *probe, *distance, *screen)

    def alphas_sd(self, score_std: float) -> list[float]:
        """Returns every penalty, of features and probe, in σ of the scores, `score_std`."""
        unit = 1.0 if self.unit == "sd" else score_std
        return [alpha / unit for alpha in (*self.alpha_values, self.probe_penalty)]

    def check_features(self, latent_size: int) -> None:
        """Raises InputError for features or clamps that a SARM of `latent_size` cannot have."""
        for name in ("penalize_features", "clamp_features", "latent_indices"):
            for i in getattr(self, name):
                if not 0 <= i < latent_size:
                    raise InputError(
                        f"reward.{name}: feature {i} of a SARM with {latent_size} latents"
                    )
        self.clamp(latent_size)

    def clamp(
        self, latent_size: int, steer: dict[int, tuple[str, float]] | None = None
    ) -> Intervention | None:
        """Builds the clamp as an intervention; None if it changes nothing.

        `steer` holds the actions of a steering file, which are applied before the bounds.
        """
        if not self.clamp_features and not steer:
            return None

        def by_feature(values):
            pairs = zip(self.clamp_features, values, strict=False)
            return {i: v for i, v in pairs if v is not None}

        return intervention(
            latent_size,
            set_to=by_feature(self.clamp_set_values),
            minimum=by_feature(self.clamp_min_values),
            maximum=by_feature(self.clamp_max_values),
            steer=steer,
        )


def check_screens_alone(alpha_values: str, probe_penalty: float) -> None:
    """Raises InputError for penalties beside a screen; `alpha_values` is the text of the option."""
    if alpha_values:
        raise InputError(
            f"reward.alpha_values={alpha_values}: reward.screen=True leaves responses out instead "
            "of penalising them; leave out reward.alpha_values"
        )
    if probe_penalty:
        raise InputError(
            f"reward.probe_penalty={probe_penalty}: reward.screen=True leaves responses out "
            "instead of penalising them; leave out reward.probe_penalty"
        )
