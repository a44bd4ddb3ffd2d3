"""Train a classification head on a language model: an ordinary reward model, without features.

    python -m benchmarks.classification_head --model=DIR --layers=15 --pairs=PAIRS.jsonl --dst=DIR

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
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from conversion.directory import copy_tokenizer_files
from conversion.load import load_hf_tokenizer
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.models.chat import encode_conversation
from sarm_jax.models.conversation import to_json
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.training.held_out import draw_held_out

SIDES = ("chosen", "rejected")
TOKENS_PER_BATCH = 2048


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
    pairs, tokenizer = read_pairs(str(args.pairs)), load_hf_tokenizer(args.model)
    held_out = draw_held_out(
        (pair["prompt"] for pair in pairs),
        fraction=args.held_out_fraction,
        seed=args.seed,
        stage="train_sarm",
    )
    held_out_p = torch.tensor([pair["prompt"] in held_out for pair in pairs])
    rows: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        for side in SIDES:
            ids = encode_conversation(
                tokenizer,
                pair["prompt"],
                pair[side],
                max_length=args.max_length,
                ends_with_turn=False,
            )
            pair[side, "row"] = rows.setdefault(tuple(ids), len(rows))
    sizes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32, **sizes
    ).eval()
    h_rd = states(model, list(rows))
    difference_pd = torch.stack(
        [h_rd[pair["chosen", "row"]] - h_rd[pair["rejected", "row"]] for pair in pairs]
    )
    weight_d = fit_head(difference_pd[~held_out_p], h_rd.std(), args.ridge)
    model.score.weight.data = weight_d[None]
    model.save_pretrained(args.dst)
    copy_tokenizer_files(Path(args.model), args.dst)
    for name, keep_p in (("train", ~held_out_p), ("held_out", held_out_p)):
        own = [pair for pair, keep in zip(pairs, keep_p, strict=True) if keep]
        path = args.pairs.with_name(f"{args.pairs.stem}_{name}.jsonl")
        write_jsonl(path, [_plain(pair) for pair in own])
    margin_p = difference_pd @ weight_d
    summary = {"pairs_train": int((~held_out_p).sum()), "pairs_held_out": int(held_out_p.sum())}
    for name, keep_p in (("train", ~held_out_p), ("held_out", held_out_p)):
        summary[f"accuracy_{name}"] = (margin_p[keep_p] > 0).double().mean().item()
        summary[f"margin_{name}"] = margin_p[keep_p].mean().item()
    print(json.dumps(summary, indent=2))


@torch.no_grad()
def states(model: torch.nn.Module, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Returns the state after the final norm at the last token of each row, `[R, D]`."""
    h_rd = torch.empty(len(rows), model.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda r: len(rows[r]))
    with tqdm(total=len(rows), desc="states", unit="row") as bar:
        while order:
            length = len(rows[order[-1]])
            batch = order[-max(TOKENS_PER_BATCH // length, 1) :]
            order = order[: -len(batch)]
            tokens_bt = torch.zeros(len(batch), length, dtype=torch.long)
            mask_bt = torch.zeros_like(tokens_bt)
            for b, r in enumerate(batch):
                tokens_bt[b, : len(rows[r])] = torch.tensor(rows[r])
                mask_bt[b, : len(rows[r])] = 1
            hidden_btd = model.model(tokens_bt, attention_mask=mask_bt).last_hidden_state
            h_rd[batch] = hidden_btd[torch.arange(len(batch)), mask_bt.sum(1) - 1]
            bar.update(len(batch))
    return h_rd


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


def _plain(pair: dict) -> dict:
    """Returns the row of a file that a pair was read from."""
    row = {name: value for name, value in pair.items() if isinstance(name, str)}
    return row | {"prompt": to_json(pair["prompt"])}


if __name__ == "__main__":
    main()
