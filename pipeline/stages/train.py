"""PPO, and the adapter that it leaves."""

import dataclasses
import logging
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from conversion.load import check_models, load_hf_tokenizer, read_policy_config, read_sarm_config
from conversion.peft import save_adapter
from pipeline.provenance import ADAPTER, DEFAULTS, Provenance, change, provenance, train_settings
from pipeline.shared import check_remat, mesh_config, policy_model, required, reward_model
from ppo.config import PPOConfig
from ppo.human_latents import human_buffer
from ppo.options import train_config
from ppo.prompts import PromptDeck, read_prompts
from ppo.tracking.checkpoint import newest_facts
from ppo.tracking.guards import TrainingStoppedError
from ppo.tracking.metrics import check_log
from ppo.tracking.profiling import ProfileConfig
from ppo.train import TrainConfig, Trainer
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import claim, is_claimed, nobody_else_in
from sarm_jax.lab.gates import require_gates
from sarm_jax.parallel import processes
from sarm_jax.parallel.devices import describe_devices
from sarm_jax.parallel.sharding import make_mesh

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> tuple[TrainConfig, ProfileConfig]:
    """All that PPO reads, on a mesh that the devices can make."""
    found, profile = train_config(config), ProfileConfig(**config.profile)
    profile.check_steps(found.ppo.total_steps)
    check_remat(config.remat)
    required(config, "policy_model", "sarm_model", "prompts_jsonl")
    mesh = mesh_config(config)
    make_mesh(mesh)  # are there enough devices?
    rows = found.ppo.batch_size // found.ppo.pieces
    mesh.check_batch(rows, "ppo.batch_size / (num_minibatches × gradient_accumulation_steps)")
    return found, profile


def run(config: ConfigDict, workdir: Path) -> None:
    """PPO with the compound reward → metrics, samples, checkpoints and a PEFT adapter."""
    with nobody_else_in(workdir):
        _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> None:
    asked, profile = options(config)
    if config.lab.gates_json:
        require_gates(Path(config.lab.gates_json), config.lab.ignore_failed_gates)
    prompts = read_prompts(config.prompts_jsonl)
    mesh_config(config).check_model(read_policy_config(config.policy_model))
    latent_size = read_sarm_config(config.sarm_model).sae.latent_size
    asked.reward.check_features(latent_size)
    human = human_buffer(asked.reward, config.reward.human_latents, latent_size)
    tokenizer = load_hf_tokenizer(config.policy_model)
    ppo = asked.ppo
    deck = PromptDeck(prompts, tokenizer, ppo, config.prompts_jsonl)
    eval_deck = None
    if path := config.eval_prompts_jsonl:
        eval_deck = PromptDeck(read_prompts(path), tokenizer, ppo, path)
    check_context(config, deck, *([eval_deck] if eval_deck else []))
    check_models(config.policy_model, config.sarm_model)
    made_from = provenance(train_settings(config), (), workdir / ADAPTER)
    done = check_checkpoint(workdir / "checkpoints", made_from)
    is_claimed(workdir, train_settings(config), DEFAULTS)
    if processes.is_first():
        check_log(workdir, asked.reward.penalize_features, done, ppo.checkpoint_every)
    claim(workdir, train_settings(config), DEFAULTS)
    processes.agree()
    check_same_everywhere(made_from)

    steps = ppo.total_steps
    where = describe_devices(mesh_config(config).devices)
    batch = describe_batch(ppo, mesh_config(config).batch_parts)
    what = f"PPO, {steps} steps of {batch} to {len(deck.prompts)} prompts, on {where}"
    LOG.info("%s; log and checkpoints in %s", what, workdir)
    if ppo.warmup_steps >= steps:
        LOG.warning(
            "ppo.warmup_steps=%d: the learning rate never gets to ppo.learning_rate=%g in %d steps",
            ppo.warmup_steps, ppo.learning_rate, steps,
        )  # fmt: skip
    if not asked.reward.beta and (config.reward.human_latents or asked.reward.latent_indices):
        LOG.info("beta is 0: human_latents and latent_indices are not used")
    if asked.lora.dropout:
        LOG.info("lora.dropout=%g is only recorded: PPO runs without dropout", asked.lora.dropout)
    policy, tokenizer = policy_model(config)
    policy.remat = config.remat
    model = reward_model(config)
    trainer = Trainer(
        asked,
        policy,
        tokenizer,
        model,
        deck,
        human,
        workdir,
        eval_deck,
        profile,
        dataclasses.asdict(made_from),
    )
    processes.agree()

    def save() -> None:
        """The adapter that the run has come to."""
        params = trainer.state["train"].params
        nnx.update(policy, params["lora"])
        value_head = jax.device_get(params["value_head"])
        model, folder = config.policy_model, workdir / "adapter"
        save_adapter(folder, policy, asked.lora, model, tokenizer, value_head, replace=True)

    try:
        summary = trainer.run()
    except TrainingStoppedError:
        save()
        LOG.info("adapter of the steps so far in %s", workdir / "adapter")
        processes.part()
        raise
    save()
    LOG.info(
        "%d steps: total reward %+.2f sd, reference KL %.2f nats, ended %.0f %%",
        summary["steps"],
        summary["total_reward_change_in_sd"],
        summary["last_steps"]["ref_kl"],
        100 * summary["last_steps"]["eos_fraction"],
    )
    LOG.info("adapter in %s, numbers in %s", workdir / "adapter", workdir / "summary.json")
    processes.part()


def describe_batch(ppo: PPOConfig, parts: int) -> str:
    """Says how many responses a PPO step has, and how they are cut."""
    rows = ppo.batch_size // (ppo.pieces * parts)
    cuts = [
        (ppo.gradient_accumulation_steps, "accumulated"),
        (ppo.num_minibatches, "optimizer steps an epoch"),
        (parts, "data-parallel devices"),
    ]
    product = "".join(f" × {count} {what}" for count, what in cuts if count > 1)
    return f"{ppo.batch_size} responses ({rows} on a device{product})"


def check_context(config: ConfigDict, *decks: PromptDeck) -> None:
    """Raises InputError where a response can go beyond the positions that the policy knows."""
    positions = read_policy_config(config.policy_model).max_position_embeddings
    prompt, new = max(deck.longest for deck in decks), config.ppo.max_new_tokens
    if prompt + new > positions:
        raise InputError(
            f"ppo.max_new_tokens={new}: with the {prompt} tokens of the longest prompt more than "
            f"the {positions} positions (max_position_embeddings) of {config.policy_model}"
        )


def check_checkpoint(directory: Path, made_from: Provenance) -> int:
    """The finished steps of the newest checkpoint, 0 where there is none.

    Raises InputError where a run would go on from a checkpoint of another one.

    stages.json and config.json say so too, where they are there and belong to the checkpoint.
    Checkpoints of versions that did not record what they were made from are taken.
    """
    newest = newest_facts(directory)
    if newest is None:
        return 0
    steps, facts = newest
    changed = facts.get("made_from") and change(facts["made_from"], made_from)
    if changed:
        raise InputError(
            f"{directory / str(steps)}: a checkpoint of another run: {changed}; put this run's "
            "own back, or choose another --workdir"
        )
    return steps


def check_same_everywhere(made_from: Provenance) -> None:
    """Raises InputError in every process where one has other options or files than process 0."""
    first = processes.from_first(dataclasses.asdict(made_from))
    changed = change(first, made_from)
    processes.agree(f"not what process 0 has: {changed}" if changed else "")
