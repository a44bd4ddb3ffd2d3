"""Responses of a policy before and after training, with the terms of their reward.

    python -m benchmarks.before_after --workdir=outputs/smollm2 \\
        --prompts=configs/data/everyday_held_out.jsonl

Greedy decoding, so that the table is a function of the run. The policy, the SARM and the reward
are those of the run's config.json. Writes `before_after.jsonl` into the working directory and
prints a Markdown table of the first `--show` prompts and the means over all of them.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from conversion import load_policy, load_sarm
from conversion.peft import load_adapter
from ppo.options import reward_config
from ppo.prompts import read_prompts
from sarm_jax.chat import bucket_length, encode_prompt, pad_batch, pad_id
from sarm_jax.generate import generate
from sarm_jax.jsonl import write_jsonl


def responses(policy, tokenizer, prompts: list[str], new_tokens: int) -> tuple[list[str], list]:
    """(texts, whether each ended by itself), greedy."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    length = bucket_length(max(map(len, rows)))
    tokens_bt, mask_bt = pad_batch(rows, length, pad_id(tokenizer), side="left")
    out = generate(
        policy,
        jnp.asarray(tokens_bt),
        jnp.asarray(mask_bt),
        max_new_tokens=new_tokens,
        temperature=0.0,
        pad_id=pad_id(tokenizer),
    )
    pairs = zip(np.asarray(out.tokens_br), np.asarray(out.mask_br), strict=True)
    texts = [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in pairs]
    return texts, np.asarray(out.ended_b).tolist()


def main() -> None:
    """Prints the table and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--show", type=int, default=5)
    args = parser.parse_args()
    config = json.loads((args.workdir / "config.json").read_text(encoding="utf-8"))
    summary = json.loads((args.workdir / "summary.json").read_text(encoding="utf-8"))
    reward = reward_config(config["reward"])
    prompts = read_prompts(args.prompts)
    policy, tokenizer = load_policy(config["policy_model"], config["dtype"])
    sides = {"before": responses(policy, tokenizer, prompts, config["ppo"]["max_new_tokens"])}
    load_adapter(args.workdir / "adapter", policy)
    sides["after"] = responses(policy, tokenizer, prompts, config["ppo"]["max_new_tokens"])
    sarm = load_sarm(config["sarm_model"], config["dtype"])

    mean, std = summary["score_mean_at_start"], summary["score_std_at_start"]
    rows: list[dict] = [{"prompt": prompt} for prompt in prompts]
    for side, (texts, ended) in sides.items():
        score_b, z_bn = sarm.score(prompts, texts, latent_indices=reward.penalize_features)
        fired_bn = z_bn > np.asarray(reward.tau_values)
        for row, text, done, score, fired in zip(
            rows, texts, ended, score_b, fired_bn, strict=True
        ):
            row[side] = {
                "response": text,
                "ended": done,
                "words": len(text.split()),
                "score_sd": float((score - mean) / std),
                "fired": [i for i, f in zip(reward.penalize_features, fired, strict=True) if f],
            }
    write_jsonl(args.workdir / "before_after.jsonl", rows)
    for row in rows[: args.show]:
        print(f"**{row['prompt']}**\n")
        for side in sides:
            shown = row[side]
            end = "" if shown["ended"] else " …(cut off)"
            text = " ".join(shown["response"].split())
            print(f"- *{side}* ({shown['score_sd']:+.2f} sd): {text}{end}")
        print()
    print("| over all prompts | before | after |\n|---|---|---|")
    for name in ("score_sd", "words", "ended"):
        means = [np.mean([row[side][name] for row in rows]) for side in sides]
        print(f"| {name} | {means[0]:.2f} | {means[1]:.2f} |")


if __name__ == "__main__":
    main()
