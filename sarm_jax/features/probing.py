"""Causal probes: the effect on the reward of changing a feature at the pooled token.

    R(z with z'_i) = R(z) + w_i (z'_i − z_i)
    z'_i = v                                        with `set_value`, or
    z'_i = min(max(z_i, `min_value`), `max_value`)  with bounds; None leaves a bound open

The head is linear and reads only the pooled latents, so the trunk runs once over the data for any
number of probed features. There are two modes:
    pairs     measures the change of the reward of each response. Rows are {prompt, response} or
              {prompt, chosen, rejected}; the latter give two responses, the chosen one first.
    bestofn   measures whether another candidate is selected. Rows are {prompt, candidates}; the
              candidate of one `rank` is selected, 1 for the best. Among equal scores the earlier
              candidate ranks first.
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sarm_jax.features.certificates import CertificateConfig, certify, matched_controls
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.row_files import place_of
from sarm_jax.models.conversation import plain_text
from sarm_jax.models.latent_store import Contrast, Latents
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import Interval, mean_interval

MODES = ("pairs", "bestofn")
LARGEST = float(np.finfo(np.float32).max)
LARGEST_CHANGE = 1e30  # of a reward; sums over the rows of a file stay finite in float32


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Options of the stage probe. Features are changed one at a time.

    Attributes:
        features: ids of the features to probe.
        set_value: value that the feature is set to, or None if it is bounded.
        mode: "pairs" or "bestofn".
        certificate: options of the certificates.
        min_value: lower bound of the feature, or None.
        max_value: upper bound of the feature, or None.
        rank: rank of the selected candidate in best-of-N.
    """

    features: tuple[int, ...]
    set_value: float | None
    mode: str
    certificate: CertificateConfig = dataclasses.field(default_factory=CertificateConfig)
    min_value: float | None = None
    max_value: float | None = None
    rank: int = 1

    def __post_init__(self) -> None:
        if not self.features:
            raise InputError("probe.feature is empty: name a feature, a list, or @FILE:key")
        self._check_values()
        if self.mode not in MODES:
            raise InputError(f"probe.mode={self.mode!r}: expected {' or '.join(MODES)}")
        if self.rank < 1:
            raise InputError(f"probe.rank={self.rank}: must be at least 1, the best candidate")
        if self.rank > 1 and self.mode != "bestofn":
            raise InputError(
                f"probe.rank={self.rank} with probe.mode={self.mode}: only bestofn selects"
            )

    def _check_values(self) -> None:
        names = ("set_value", "min_value", "max_value")
        values = {name: x for name in names if (x := getattr(self, name)) is not None}
        for name, x in values.items():
            if not abs(x) <= LARGEST:
                raise InputError(f"probe.{name}={x}: must be a finite number")
        if not values:
            raise InputError(
                "probe.set_value, probe.min_value and probe.max_value are empty: name a value or a "
                "bound"
            )
        bounds = [f"probe.{name}={x}" for name, x in values.items() if name != "set_value"]
        if self.set_value is not None and bounds:
            raise InputError(
                f"probe.set_value={self.set_value} and {' and '.join(bounds)}: a feature that is "
                "set cannot be bounded as well: leave out one of them"
            )
        if len(bounds) == 2 and values["min_value"] > values["max_value"]:
            raise InputError(f"{bounds[0]} exceeds {bounds[1]}")

    def change(self, z_bn: np.ndarray) -> np.ndarray:
        """Computes z' − z of latents `[B, n]`, float32."""
        if self.set_value is not None:
            return np.float32(self.set_value) - z_bn
        low = -np.inf if self.min_value is None else self.min_value
        high = np.inf if self.max_value is None else self.max_value
        return np.clip(z_bn, np.float32(low), np.float32(high)) - z_bn

    def effects(self, weight_n: np.ndarray, z_bn: np.ndarray) -> np.ndarray:
        """Computes w (z' − z), the changes of the reward `[B, n]` float32.

        Raises:
            InputError: a change is too large for the sums and differences of it in float32.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            delta_bn = weight_n * self.change(z_bn)
        if not np.abs(delta_bn).max(initial=0) <= LARGEST_CHANGE:
            values = {name: getattr(self, name) for name in ("set_value", "min_value", "max_value")}
            named = " ".join(f"probe.{name}={x}" for name, x in values.items() if x is not None)
            raise InputError(f"{named}: changes a reward by more than {LARGEST_CHANGE:.3g}")
        return delta_bn

    def select(self, score_c: np.ndarray) -> int:
        """Returns the index of the candidate of rank `rank` among scores `[C]`."""
        return int(np.argsort(-score_c, kind="stable")[self.rank - 1])


@dataclasses.dataclass(frozen=True)
class Probe:
    """The results of one feature: the rows of its CSV file and its entry in the summary."""

    feature: int
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def probe(
    config: ProbeConfig, model: RewardModel, data: Sequence[Mapping[str, Any]]
) -> tuple[list[Probe], list[dict[str, Any]]]:
    """Probes every feature on the rows of `data` (see the module for their fields).

    Returns:
        (a probe of each feature, a certificate of each feature).

    Raises:
        InputError: a feature or a row of the data is not valid.
    """
    groups = check_probe(config, model.latent_size, data)
    prompts = [row["prompt"] for row, group in zip(data, groups, strict=True) for _ in group]
    responses = [text for group in groups for text in group]
    score_b, latents = model.store(prompts, responses, "probe")
    weight_f = model.feature_weights()
    weight_n = weight_f[list(config.features)]
    z_bn = latents.columns(config.features)
    delta_bn = config.effects(weight_n, z_bn)
    probes = []
    for feature, weight, delta_b in zip(config.features, weight_n, delta_bn.T, strict=True):
        if config.mode == "pairs":
            rows = _changes(prompts, responses, score_b=score_b, delta_b=delta_b)
            effect = _effect(data, groups, delta_b)
        else:
            rows = _selections(config, data, groups=groups, score_b=score_b, delta_b=delta_b)
            changed_n = [row["changed"] for row in rows]
            effect = {"rank": config.rank, "changed": _by_prompt(data, changed_n)}
        summary = {
            "feature": int(feature),
            "set_value": config.set_value,
            "min_value": config.min_value,
            "max_value": config.max_value,
            "head_weight": float(weight),
            "rows": len(rows),
            **effect,
        }
        probes.append(Probe(int(feature), rows, summary))
    certificates = _certificates(
        config, data, groups=groups, latents=latents, weight_f=weight_f, score_b=score_b
    )
    return probes, certificates


def check_latents(config: ProbeConfig, latent_size: int) -> None:
    """Raises InputError for a feature that a SARM of so many latents does not have."""
    too_large = [i for i in config.features if i >= latent_size]
    if too_large:
        raise InputError(
            f"probe.feature={too_large[0]}: the SARM has {latent_size} latents, numbered from 0"
        )


def check_probe(
    config: ProbeConfig,
    latent_size: int,
    data: Sequence[Mapping[str, Any]],
    source: str = "probe.data_jsonl",
) -> list[list[str]]:
    """Validates features and data, and returns the responses of every row.

    Args:
        config: the probe.
        latent_size: number of latents of the SARM.
        data: rows, see the module for their fields.
        source: name of the data in error messages; if it is a file, they give the line as well.

    Raises:
        InputError: names the feature, or the row of the data, that is not valid.
    """
    check_latents(config, latent_size)
    groups = []
    for number, row in enumerate(data, 1):
        try:
            groups.append(_responses(config, row))
        except ValueError as error:
            raise InputError(f"{place_of(source, number)}: {error}") from None
    return groups


def _certificates(
    config: ProbeConfig,
    data: Sequence[Mapping[str, Any]],
    groups: Sequence[list[str]],
    latents: Latents,
    weight_f: np.ndarray,
    score_b: np.ndarray,
) -> list[dict[str, Any]]:
    """Measures the effects of the probed features and of their controls, and tests them."""
    rate_f, mean_f = np.zeros(latents.size), np.zeros(latents.size)
    all_rows = np.arange(len(latents))
    for ids, z_nb, _ in Contrast(latents, all_rows, all_rows).blocks():
        rate_f[ids], mean_f[ids] = (z_nb > 0).mean(axis=0), z_nb.mean(axis=0)
    controls = matched_controls(config.features, rate_f, mean_f, config=config.certificate)
    changed = sorted({*config.features, *(i for drawn in controls.values() for i in drawn)})
    delta_nb = config.effects(weight_f[changed], latents.columns(changed))
    effects = {
        i: _row_effects(config, groups, score_b=score_b, delta_b=delta_b)
        for i, delta_b in zip(changed, delta_nb.T, strict=True)
    }
    return certify(
        config.certificate,
        effects,
        controls,
        cluster_n=_clusters(data),
        signed=config.mode == "pairs",
    )


def _row_effects(
    config: ProbeConfig, groups: Sequence[list[str]], score_b: np.ndarray, delta_b: np.ndarray
) -> np.ndarray:
    """Computes e of each row: the change of a reward or margin, or 1 if the selection changes."""
    effects, start = [], 0
    for group in groups:
        base, delta = (x[start : start + len(group)] for x in (score_b, delta_b))
        start += len(group)
        if config.mode == "bestofn":
            effects.append(float(config.select(base) != config.select(base + delta)))
        else:
            effects.append(float(delta[0] - delta[1] if len(group) == 2 else delta[0]))
    return np.array(effects)


def write_probes(folder: Path, probes: Sequence[Probe]) -> None:
    """Writes `probe_f{ID}.csv` of each probe into `folder`."""
    for result in probes:
        with replacing(folder / f"probe_f{result.feature}.csv") as file:
            writer = csv.DictWriter(file, list(result.rows[0]))
            writer.writeheader()
            writer.writerows(result.rows)


def _responses(config: ProbeConfig, row: Mapping[str, Any]) -> list[str]:
    """Returns the responses of a row of the data; raises ValueError if the row is not valid."""
    if config.mode == "bestofn":
        candidates = row.get("candidates")
        if not (isinstance(candidates, list) and len(candidates) > 1):
            raise ValueError("'candidates' must list two or more")
        if not all(isinstance(text, str) for text in candidates):
            raise ValueError("'candidates' must be texts")
        if len(candidates) < config.rank:
            count = len(candidates)
            raise ValueError(f"'candidates' lists {count}, fewer than probe.rank={config.rank}")
        return candidates
    fields = ("response",) if "response" in row else ("chosen", "rejected")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise ValueError(
                f"expected 'response', or 'chosen' and 'rejected', as text; found {sorted(row)}"
            )
    return [row[field] for field in fields]


def _changes(prompts, responses, score_b, delta_b) -> list[dict[str, Any]]:
    """Lists the rows of the CSV file of mode pairs: the change of each response's reward."""
    columns = zip(prompts, responses, score_b, delta_b, strict=True)
    return [
        {
            "idx": idx,
            "prompt": plain_text(prompt),
            "response": response,
            "reward_base": float(score),
            "reward_intervene": float(score + delta),
            "delta": float(delta),
        }
        for idx, (prompt, response, score, delta) in enumerate(columns)
    ]


def _effect(
    data: Sequence[Mapping[str, Any]], groups: Sequence[list[str]], delta_b: np.ndarray
) -> dict[str, Any]:
    """Computes the mean change over prompts, for pairs also of each side and of the margin."""
    delta_n = np.add.reduceat(delta_b, np.cumsum([0, *map(len, groups[:-1])]))
    effect: dict[str, Any] = {"delta": _by_prompt(data, delta_n / [len(g) for g in groups])}
    if all(len(group) == 2 for group in groups):
        chosen_n, rejected_n = delta_b[::2], delta_b[1::2]
        effect["delta_chosen"] = _by_prompt(data, chosen_n)
        effect["delta_rejected"] = _by_prompt(data, rejected_n)
        effect["delta_margin"] = _by_prompt(data, chosen_n - rejected_n)
    return effect


def _by_prompt(data: Sequence[Mapping[str, Any]], values_n: ArrayLike) -> Interval:
    """Averages over the prompts' own means, because rows of one prompt are not independent."""
    cluster_n = _clusters(data)
    return mean_interval(np.bincount(cluster_n, np.asarray(values_n)) / np.bincount(cluster_n))


def _clusters(data: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Numbers the distinct prompts and returns the number of each row's prompt."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(row["prompt"] for row in data))}
    return np.array([number[row["prompt"]] for row in data])


def _selections(config: ProbeConfig, data, groups, score_b, delta_b) -> list[dict[str, Any]]:
    """Lists the rows of the CSV file of mode bestofn: the candidate selected before and after."""
    rows, start = [], 0
    for idx, (row, group) in enumerate(zip(data, groups, strict=True)):
        base = score_b[start : start + len(group)]
        intervened = base + delta_b[start : start + len(group)]
        start += len(group)
        first, second = config.select(base), config.select(intervened)
        rows.append(
            {
                "idx": idx,
                "prompt": plain_text(row["prompt"]),
                "n_candidates": len(group),
                "selected_base": first,
                "selected_intervene": second,
                "changed": int(first != second),
                "reward_selected_base": float(base[first]),
                "reward_selected_intervene": float(intervened[second]),
            }
        )
    return rows
