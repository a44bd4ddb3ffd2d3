"""Load exported directories with the installed transformers, and write what it computes.

    python transformers_consumer.py JOBS.json RESULTS.json

The script runs in its own environment (see `benchmarks.reference_loader`) and imports nothing of
the project. A job is {kind, path}; all jobs share the texts. Only jobs of kind "sarm" run the code
that their config.json names.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def tokenizer_facts(path: str, shared: dict) -> dict:
    """Encodes and decodes the shared texts."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    conversations = [
        tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, date_string=shared["date"]
        )
        for turns in shared["conversations"]
        for generation in (False, True)
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in conversations]
    return {
        "conversations": conversations,
        "ids": ids,
        "plain_ids": [tokenizer(text)["input_ids"] for text in shared["texts"]],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "special": sorted(tokenizer.all_special_ids),
        "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }


def logits(model: torch.nn.Module, shared: dict) -> list:
    """Computes the logits of the first tokens of the vocabulary, at every position of every row."""
    rows = [model(torch.tensor([row])).logits[0, :, : shared["width"]] for row in shared["rows"]]
    return [row.float().tolist() for row in rows]


def scores(path: str, shared: dict) -> dict:
    """Scores the rows one by one, and as one batch padded on the right."""
    model = AutoModelForSequenceClassification.from_pretrained(
        path, trust_remote_code=True, torch_dtype=torch.float32
    ).eval()
    single = [model(torch.tensor([row])).logits.item() for row in shared["rows"]]
    length, pad = max(map(len, shared["rows"])) + 1, model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in shared["rows"]])
    batch = model(ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist()
    config = model.config
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "layers": len(model.model.layers),
        "single": single,
        "batch": batch,
        "rope": [config.rope_theta, config.rope_scaling],
    }


@torch.no_grad()
def run(job: dict, shared: dict) -> dict:
    """Runs one job; an error becomes part of the result."""
    path = job["path"]
    try:
        result = {"tokenizer": tokenizer_facts(path, shared)}
        if job["kind"] == "policy":
            model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
            result["logits"] = logits(model.eval(), shared)
        elif job["kind"] == "adapter":
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
            result["logits"] = logits(model.eval(), shared)
        elif job["kind"] == "sarm":
            result["scores"] = scores(path, shared)
        return result
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Reads the jobs and writes the results."""
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = [run(job, jobs["shared"]) for job in jobs["jobs"]]
    output = {"transformers": transformers.__version__, "results": results}
    Path(sys.argv[2]).write_text(json.dumps(output), encoding="utf-8")


if __name__ == "__main__":
    main()
