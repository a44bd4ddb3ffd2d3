"""Train a classification head on a language model: an ordinary reward model, without features.

    python -m benchmarks.classification_head --model=DIR --pairs=PAIRS.jsonl --dst=DIR [--layers=15]

The language model stays as it is, but can be cut after some of its layers, as a SARM's trunk is;
its final norm is kept. The head w is the minimum of

    −mean log σ(w · (h_chosen − h_rejected) / s) + ridge / 2 ‖w‖²        s: deviation of the h

over the pairs that are not held out, where h is the state after the final norm at the last token.
The problem is convex, so no seed and no learning rate decide the result. The held-out prompts are
those of train_sarm and train_sae with the same fraction and seed. Beside PAIRS.jsonl the script
writes PAIRS_train.jsonl and PAIRS_held_out.jsonl.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification

from conversion import load_reward_model
from conversion.directory import atomic_directory, copy_tokenizer_files
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.models.conversation import to_json
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.training.activations import collect_pooled
from sarm_jax.training.held_out import draw_held_out
from sarm_jax.training.train_sae import encode_response

SIDES = ("chosen", "rejected")


def main() -> None:
    """Trains the head, writes the classifier, and prints its accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="language model, a Hugging Face directory")
    parser.add_argument("--layers", type=int, help="first layers to keep; by default all")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--dst", required=True, type=Path)
    parser.add_argument("--held_out_fraction", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out prompts")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    pairs = read_pairs(str(args.pairs))
    held_out = draw_held_out(
        (pair["prompt"] for pair in pairs),
        fraction=args.held_out_fraction,
        seed=args.seed,
        stage="train_sarm",
    )
    held_out_p = torch.tensor([pair["prompt"] in held_out for pair in pairs])
    sizes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32, **sizes
    )
    with tempfile.TemporaryDirectory() as directory:
        save(model, args.model, Path(directory))  # with a random head, which is not read
        row, h_rd = states(Path(directory), pairs, args.max_length)
    difference_pd = torch.stack(
        [h_rd[row[p["prompt"], p["chosen"]]] - h_rd[row[p["prompt"], p["rejected"]]] for p in pairs]
    )
    weight_d = fit_head(difference_pd[~held_out_p], h_rd.std(), args.ridge)
    model.score.weight.data = weight_d[None]
    for name, keep_p in (("train", ~held_out_p), ("held_out", held_out_p)):
        own = [pair for pair, keep in zip(pairs, keep_p, strict=True) if keep]
        path = args.pairs.with_name(f"{args.pairs.stem}_{name}.jsonl")
        write_jsonl(path, [pair | {"prompt": to_json(pair["prompt"])} for pair in own])
    with atomic_directory(args.dst) as directory:  # last, since it stands for all files
        save(model, args.model, directory)
    margin_p = difference_pd @ weight_d
    summary = {"pairs_train": int((~held_out_p).sum()), "pairs_held_out": int(held_out_p.sum())}
    for name, keep_p in (("train", ~held_out_p), ("held_out", held_out_p)):
        summary[f"accuracy_{name}"] = (margin_p[keep_p] > 0).double().mean().item()
        summary[f"margin_{name}"] = margin_p[keep_p].mean().item()
    print(json.dumps(summary, indent=2))


def save(model: Any, source: str, dst: Path) -> None:
    """Writes a classifier with the tokenizer of `source`."""
    model.save_pretrained(dst)
    copy_tokenizer_files(Path(source), dst)


def states(
    classifier: Path, pairs: Sequence[dict[str, Any]], max_length: int
) -> tuple[dict[tuple[Any, str], int], torch.Tensor]:
    """Returns the row number of each (prompt, response), and the state `[R, D]` of each row."""
    rm = load_reward_model(classifier)
    texts = list(dict.fromkeys((pair["prompt"], pair[side]) for pair in pairs for side in SIDES))
    model = cast(LinearReward, rm.model)
    rows = [encode_response(model, rm.tokenizer, *text, max_length) for text in texts]
    pooled_rd = collect_pooled(model.trunk, rows, standardised=False)
    return {text: n for n, text in enumerate(texts)}, torch.tensor(pooled_rd)


def fit_head(difference_pd: torch.Tensor, scale: torch.Tensor, ridge: float) -> torch.Tensor:
    """Minimises the loss of the module in float64; returns w / s, the weights of h."""
    x_pd = (difference_pd / scale).double()
    weight_d = torch.zeros(x_pd.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_d], max_iter=1000, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(x_pd @ weight_d).mean()
        loss = loss + ridge / 2 * weight_d.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weight_d.detach() / scale).float()


if __name__ == "__main__":
    main()
