"""Compare reward models on held-out pairs: what features carry, and what clamping them does.

    python -m benchmarks.after_the_fact --list=WORKDIR --count=16
    python -m benchmarks.after_the_fact --pairs=HELD_OUT.jsonl NAME=REWARD_MODEL:WORKDIR …

The first command prints the features that carry most of the margin on the pairs that `identify` of
this working directory has read, those with the largest w_i (mean z_i on chosen − mean z_i on
rejected responses), for probe.feature. The second one compares models after `probe`. REWARD_MODEL
is a SARM or a classifier with an SAE. With F = Σ_i w_i z_i and R the score, over all responses:

    share_features     Cov(F, R) / Var(R), which is 1 for a SARM; the rest is the SAE's error
    certified_clamped  all certified features are set to 0, which takes Σ w_i z_i from a score
    probed_clamped     all probed features are set to 0
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.lab_studies import refusing
from conversion import load_sarm
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file
from sarm_jax.io.json_files import read_json
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.reporting.statistics import count_wins, mean_interval

SIDES = ("chosen", "rejected")


def main() -> None:
    """Prints a list of features, or one JSON object with the figures of every reward model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", type=Path, metavar="WORKDIR", help="list features of identify")
    parser.add_argument("--count", type=int, default=16, help="features to list")
    parser.add_argument("--pairs", help="held-out pairs, to compare models on")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("models", nargs="*", metavar="NAME=REWARD_MODEL:WORKDIR")
    args = parser.parse_args()
    with refusing(parser):
        if args.list is not None:
            print_features(args.list, args.count)
        elif args.pairs and args.models:
            print_figures(args.models, args.pairs, args.max_length)
        else:
            parser.error("give --list, or --pairs and models")


def print_features(workdir: Path, count: int) -> None:
    """Prints the features of identify that carry most of the margin, separated by commas."""
    path = workdir / "probes" / "feature_scores.safetensors"
    check_file(path, str(path))
    with as_input_error(f"{path}: not a safetensors file"):
        scores = load_file(path)
    order = np.argsort(scores["carried_reward"], kind="stable")  # of the rejected side
    print(",".join(map(str, order[:count])))


def print_figures(models: Sequence[str], pairs_file: str, max_length: int) -> None:
    """Prints one JSON object with the figures of every reward model, NAME=REWARD_MODEL:WORKDIR."""
    named = {}
    for entry in models:
        name, _, paths = entry.partition("=")
        src, _, workdir = paths.rpartition(":")
        if not (name and src and workdir):
            raise InputError(f"{entry}: expected NAME=REWARD_MODEL:WORKDIR")
        named[name] = (src, Path(workdir))
    pairs = read_pairs(pairs_file)
    result = {
        name: measure(src, workdir, pairs, max_length) for name, (src, workdir) in named.items()
    }
    print(json.dumps(result, indent=2))


def measure(
    src: str, workdir: Path, pairs: list[dict[str, Any]], max_length: int
) -> dict[str, Any]:
    """Measures one reward model.

    Args:
        src: the reward model.
        workdir: the working directory of its `probe`.
        pairs: the held-out pairs.
        max_length: length limit of a conversation in tokens.
    """
    rm = load_sarm(src)
    rm.max_length = max_length
    texts = list(dict.fromkeys((pair["prompt"], pair[side]) for pair in pairs for side in SIDES))
    row = {text: n for n, text in enumerate(texts)}
    pairs_p2 = np.array([[row[pair["prompt"], pair[side]] for side in SIDES] for pair in pairs])
    prompts, responses = (list(column) for column in zip(*texts, strict=True))
    score_n, z_nf = rm.score(prompts, responses)
    features_n = z_nf.astype(np.float64) @ rm.feature_weights()
    centred_n = score_n - score_n.mean(dtype=np.float64)
    variance = np.square(centred_n).mean()
    probed = read_json(workdir / "probes" / "certificates.json")["features"]
    certified = [entry["feature"] for entry in probed if entry["certified"]]
    weight_f = rm.feature_weights().astype(np.float64)

    def figures(clamped: list[int]) -> dict[str, Any]:
        return pair_figures(score_n - z_nf[:, clamped] @ weight_f[clamped], pairs, pairs_p2)

    return {
        "responses": len(texts),
        "pairs": len(pairs),
        "score_sd": float(np.sqrt(variance)),
        "share_features": float((centred_n * features_n).mean() / variance),
        "latents_active": float((z_nf != 0).sum(axis=1).mean()),
        "probed": len(probed),
        "certified": len(certified),
        "plain": figures([]),
        "certified_clamped": figures(certified),
        "probed_clamped": figures([entry["feature"] for entry in probed]),
    }


def pair_figures(
    score_n: np.ndarray, pairs: list[dict[str, Any]], pairs_p2: np.ndarray
) -> dict[str, Any]:
    """Returns accuracy and margin with intervals over prompts, and the accuracy by source."""
    margin_p = score_n[pairs_p2[:, 0]].astype(np.float64) - score_n[pairs_p2[:, 1]]
    right_p = count_wins(margin_p)
    prompt_p = np.unique([str(pair["prompt"]) for pair in pairs], return_inverse=True)[1]
    source_p = np.array([pair.get("source", "") for pair in pairs])
    by_prompt = [
        [x_p[prompt_p == n].mean() for n in range(prompt_p.max() + 1)]
        for x_p in (right_p, margin_p)
    ]
    return {
        "accuracy": float(right_p.mean()),
        "accuracy_over_prompts": mean_interval(np.array(by_prompt[0])),
        "margin": float(margin_p.mean()),
        "margin_over_prompts": mean_interval(np.array(by_prompt[1])),
        "accuracy_by_source": {
            str(source): float(right_p[source_p == source].mean()) for source in np.unique(source_p)
        },
    }


if __name__ == "__main__":
    main()
