"""Small runs of the whole method, `configs/full_method.py`, from train_sarm to the report."""

import json
from pathlib import Path

from tests.oracles import save_tiny_llama, tiny_llama_config, tiny_tokenizer

WORDS = ["red", "green", "blue", "round", "tall", "old", "new", "warm"]
SELECTED = "@{workdir}/probes/selected_features.json"
# Options of the config that are other than those of the published run.
OPTIONS = (
    "policy_model={0}/policy sarm_model={{workdir}}/sarm dtype=float32 remat=dots mesh.tensor=1 "
    "prompts_jsonl={0}/demos.jsonl human_latents.demos_jsonl={0}/demos.jsonl sarm_batch_size=4 "
    "train_sarm.pairs_jsonl={0}/pairs.jsonl train_sarm.mode=3 train_sarm.source_layer=2 "
    "train_sarm.latent_size=64 train_sarm.k=8 train_sarm.aux_k=8 train_sarm.max_length=64 "
    "train_sarm.sae_steps=40 train_sarm.sae_batch_tokens=32 train_sarm.dead_after_steps=10 "
    "train_sarm.epochs=2 train_sarm.batch_size=4 train_sarm.warmup_fraction=0.0 "
    "train_sarm.sae_learning_rate=0.01 train_sarm.learning_rate=0.001 "
    "identify.pairs_jsonl={0}/pairs.jsonl identify.top_k=3 identify.resamples=100 "
    "probe.data_jsonl={0}/pairs.jsonl probe.feature={1}:safety_harming probe.controls=4 "
    "reward.penalize_features={1}:safety_harming reward.tau_values=0.0,0.0,0.0 "
    "reward.alpha_values=0.1,0.1,0.1 reward.latent_indices={1}:safety_harming "
    "ppo.total_steps=3 ppo.batch_size=4 ppo.max_new_tokens=4 ppo.calibration_batches=2 "
    "ppo.max_prompt_tokens=120 ppo.pack_levels=1 ppo.learning_rate=0.001 ppo.checkpoint_every=2 "
    "ppo.logprob_chunk=0 lora.rank=4 lora.alpha=8.0 discriminator.hidden_size=8 "
    "evaluate.prompts_jsonl={0}/demos.jsonl evaluate.data_jsonl={0}/demos.jsonl "
    "evaluate.steering_json={{workdir}}/probes/steering_config.json evaluate.resamples=100 "
    "evaluate.batch_size=4"
)


def make_world(root: Path) -> Path:
    """Writes a tiny policy, pairs and demonstrations; returns the folder."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    save_tiny_llama(root / "policy", tiny_llama_config(**heads), tiny_tokenizer())
    pairs = [
        {"prompt": f"name {n} {w}", "chosen": f"it is {w}.", "rejected": "no " * (n % 4 + 1)}
        for n, w in enumerate(WORDS * 3)
    ]
    demos = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs[:8]]
    for name, rows in (("demos", demos), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(world: Path, workdir: Path, *options: str, stage: str = "all") -> list[str]:
    """Returns the arguments of `main.py`; an option is given without its `--config.`."""
    fields = [*OPTIONS.format(world, SELECTED).split(), *options]
    line = ["--config=configs/full_method.py", f"--stage={stage}", f"--workdir={workdir}"]
    return [*line, *(f"--config.{field}" for field in fields)]
