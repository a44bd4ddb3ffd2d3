"""The policy part of the stage evaluate: the base and trained adapters on held-out prompts."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs.shared import split_paths, write_json
from conversion import load_policy
from conversion.keys import tensor_specs
from conversion.peft import load_adapter, read_adapter
from ppo.policy_comparison import ResponseConfig, Responses, respond
from ppo.prompts import read_prompts
from sarm_jax.errors import InputError
from sarm_jax.evaluation import policy_metrics as metrics
from sarm_jax.evaluation.controls import PENALISED, PLAIN, Controls, score_variants
from sarm_jax.evaluation.latent_map import principal_plane
from sarm_jax.generate import Sampling
from sarm_jax.jsonl import read_jsonl, write_jsonl
from sarm_jax.reward_model import RewardModel

LOG = logging.getLogger(__name__)
SHOWN_TERMS = 8  # of a score, in responses.jsonl
ADAPTER = "adapter_config.json"


def adapters_of(runs: tuple[str, ...], workdir: Path) -> dict[str, Path]:
    """Adapter directories by run name; without `runs` the working directory's own, if any."""
    found: dict[str, Path] = {}
    if not runs:
        own = workdir / "adapter"
        runs = (str(workdir),) if (own / ADAPTER).is_file() else ()
    for run in runs:
        places = [p for p in (Path(run) / "adapter", Path(run)) if (p / ADAPTER).is_file()]
        if not places:
            raise InputError(f"evaluate.runs={run}: no adapter there (expected adapter/{ADAPTER})")
        name = Path(run).resolve().name
        if name in found or name in ("base", "human"):
            raise InputError(f"evaluate.runs={run}: another run or a side is named {name!r}")
        found[name] = places[0]
    return found


def evaluate_policy(
    config: ConfigDict,
    model: RewardModel,
    controls: Controls,
    prompts: list[str],
    adapters: dict[str, Path],
    folder: Path,
) -> None:
    """policy.json, responses.jsonl and latent_map.json."""
    section = config.evaluate
    human = []
    if section.human_jsonl:
        human = read_jsonl(section.human_jsonl, {"prompt": str, "response": str})
    sides = responses_of(config, prompts, adapters)
    scored = _score(model, controls, prompts, sides)
    index_rn = metrics.bootstrap_indices(len(prompts), section.resamples, section.seed)
    summary = _summary(sides, scored, index_rn)
    summary["prompts"] = len(prompts)
    summary["temperature"] = section.temperature
    weight_f = np.asarray(model.model.score[...])
    write_jsonl(folder / "responses.jsonl", _rows(prompts, sides, scored, weight_f))
    write_json(folder / "latent_map.json", _map(model, prompts, sides, scored, human))
    write_json(folder / "policy.json", summary)
    LOG.info("policies in %s", folder / "policy.json")


def responses_of(
    config: ConfigDict, prompts: list[str], adapters: dict[str, Path]
) -> dict[str, Responses]:
    """Responses of the base and of every adapter; all adapters are checked before any runs."""
    section = config.evaluate
    options = ResponseConfig(
        Sampling(config.ppo.max_new_tokens, section.temperature), section.batch_size, section.seed
    )
    base, tokenizer = load_policy(config.policy_model, config.dtype)
    for path in adapters.values():
        read_adapter(path, tensor_specs(base))
    sides = {"base": respond(options, base, base, tokenizer, prompts)}
    for name, path in adapters.items():
        policy = nnx.merge(*nnx.split(base))  # shares the base's arrays
        load_adapter(path, policy)
        sides[name] = respond(options, base, policy, tokenizer, prompts)
        LOG.info("%s: %d responses", name, len(prompts))
    return sides


def _score(model, controls: Controls, prompts, sides: dict[str, Responses]) -> dict[str, dict]:
    """Scores by run. All are scored at once: penalties in "sd" then have one σ for every run."""
    asked = list(prompts) * len(sides)
    texts = [text for side in sides.values() for text in side.texts]
    found = score_variants(model, asked, texts, controls)
    _, z_bf = model.score(asked, texts)
    plain_b = found.variants[PLAIN]
    last_b = list(found.variants.values())[-1]  # with every control that is set
    before_b = list(found.variants.values())[-2] if PENALISED in found.variants else last_b
    scale = float(plain_b.std()) if controls.unit == "sd" else 1.0
    scored = {}
    for number, name in enumerate(sides):
        rows = slice(number * len(prompts), (number + 1) * len(prompts))
        fires_bn = z_bf[rows][:, list(controls.penalize_features)] > np.asarray(controls.tau)
        scored[name] = {
            "score": plain_b[rows],
            "controlled_score": last_b[rows],
            "penalty": before_b[rows] - last_b[rows],  # after the cap
            "z": z_bf[rows],
            "penalties": {
                str(i): fires_bn[:, j] * controls.alpha[j] * scale
                for j, i in enumerate(controls.penalize_features)
            },
        }
    return scored


def _summary(sides, scored, index_rn) -> dict[str, Any]:
    values = {name: _values(side, scored[name], scored["base"]) for name, side in sides.items()}
    runs: dict[str, dict] = {}
    paired: dict[str, dict] = {}
    for name, found in values.items():
        runs[name] = {key: metrics.bootstrap_mean(v, index_rn) for key, v in found.items()}
        r = metrics.correlation_interval(found["length"], found["score"], index_rn)
        if r is not None:
            runs[name]["length_score_correlation"] = r
        if name != "base":
            paired[name] = {
                key: metrics.bootstrap_mean(v - values["base"][key], index_rn)
                for key, v in found.items()
                if not key.startswith("win_rate")
            }
    return {"runs": runs, "paired": paired}


def _values(side: Responses, scored: dict, base: dict) -> dict[str, np.ndarray]:
    names = ("score", "controlled_score")
    values = {name: scored[name] for name in (*names, "penalty")}
    values |= {"kl": side.kl_n, "length": side.length_n, "ended": side.ended_n}
    values["repetition"] = np.array([metrics.repetition(text) for text in side.texts])
    for i, penalty_n in scored["penalties"].items():
        values[f"penalty_{i}"] = penalty_n
        values[f"latent_{i}"] = scored["z"][:, int(i)]
        values[f"active_{i}"] = scored["z"][:, int(i)] > 0
    values["win_rate"] = metrics.wins(scored["score"], base["score"])
    values["win_rate_controlled"] = metrics.wins(*(s["controlled_score"] for s in (scored, base)))
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def _rows(prompts, sides, scored, weight_f):
    for n, prompt in enumerate(prompts):
        row = {}
        for name, side in sides.items():
            found = scored[name]
            score = float(found["score"][n])
            terms, rest = metrics.score_terms(found["z"][n], weight_f, score, SHOWN_TERMS)
            row[name] = {
                "response": side.texts[n],
                "score": score,
                "controlled_score": float(found["controlled_score"][n]),
                "length": int(side.length_n[n]),
                "ended": bool(side.ended_n[n]),
                "kl": float(side.kl_n[n]),
                "bias": 0.0,  # the head is w · z
                "terms": terms,
                "rest": rest,
                "penalties": {i: float(v[n]) for i, v in found["penalties"].items()},
            }
        yield {"prompt": prompt, "responses": row}


def _map(model, prompts, sides, scored, human) -> dict[str, Any]:
    named = [
        (name, p, t) for name, s in sides.items() for p, t in zip(prompts, s.texts, strict=True)
    ]
    latents = [scored[name]["z"] for name in sides]
    if human:
        pairs = [(row["prompt"], row["response"]) for row in human]
        named += [("human", *pair) for pair in pairs]
        latents.append(model.score(*zip(*pairs, strict=True))[1])
    xy_n2, explained = principal_plane(np.concatenate(latents))
    points = [
        {"source": name, "x": float(x), "y": float(y), "prompt": prompt, "response": text}
        for (name, prompt, text), (x, y) in zip(named, xy_n2, strict=True)
    ]
    return {"explained": explained, "points": points}


def policy_inputs(config: ConfigDict, workdir: Path) -> tuple[list[str], dict[str, Path]]:
    """(held-out prompts, adapters), both empty where the config names nothing to compare."""
    section = config.evaluate
    path = section.prompts_jsonl or config.eval_prompts_jsonl
    runs = split_paths(section.runs) if section.runs else ()
    if runs and not path:
        raise InputError(f"evaluate.runs={section.runs}: needs evaluate.prompts_jsonl")
    adapters = adapters_of(runs, workdir) if path else {}
    if section.prompts_jsonl and not adapters:
        raise InputError(
            f"evaluate.prompts_jsonl={path}: name evaluate.runs, {workdir} has no adapter"
        )
    if adapters and section.resamples < 100:
        raise InputError(f"evaluate.resamples={section.resamples}: must be at least 100")
    return (read_prompts(path) if adapters else []), adapters
