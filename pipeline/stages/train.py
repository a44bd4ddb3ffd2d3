"""Train the policy by PPO with the compound reward, and save its adapter."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from conversion.load import (
    check_models,
    load_hf_tokenizer,
    read_policy_config,
)
from conversion.peft import save_adapter
from pipeline import together
from pipeline.changes import Provenance, change
from pipeline.feature_names import feature_names
from pipeline.inputs import Input, Kind
from pipeline.models import (
    check_conversations,
    check_remat,
    check_reward_model,
    mesh_config,
)
from pipeline.options import required
from pipeline.provenance import (
    check_claim,
    check_same_everywhere,
    claim_workdir,
    provenance,
)
from pipeline.reward_inputs import REWARD_FILES, REWARD_LISTS
from pipeline.stage import Stage
from pipeline.tasks import task_of
from ppo.config import PPOConfig
from ppo.options import track_config, train_config
from ppo.prompts import PromptDeck
from ppo.tracking.checkpoint import finished_steps, newest_facts
from ppo.tracking.metrics import check_log
from ppo.tracking.profiling import ProfileConfig
from ppo.tracking.trackers.record import FILE as TRACKERS
from ppo.tracking.trackers.record import read_runs
from ppo.tracking.trackers.start import check_available
from ppo.train import TrainConfig, Trainer, run_slots
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.workdir import lock_workdir, read_settings
from sarm_jax.lab.gate import require_gates
from sarm_jax.lab.oracle import OracleRewardModel
from sarm_jax.models.checks import check_positions
from sarm_jax.models.conversation_rows import read_prompts
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import Llama
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import SARMConfig, check_ensemble
from sarm_jax.parallel import processes
from sarm_jax.parallel.devices import describe_devices
from sarm_jax.parallel.sharding import make_mesh
from sarm_jax.rewards.human_latents import HumanLatents, human_buffer
from sarm_jax.rewards.options import reward_config
from sarm_jax.rewards.state_controls import StateControls, state_controls

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads except weights, checked.

    `human` is None if beta is 0. `states` is what the reward reads from pooled states.
    """

    options: TrainConfig
    profile: ProfileConfig
    tokenizer: Any
    deck: PromptDeck
    eval_deck: PromptDeck | None
    human: HumanLatents | None
    states: StateControls


def validate(config: ConfigDict) -> tuple[TrainConfig, ProfileConfig]:
    """Validates all that PPO reads of the config, and that there are its devices and trackers."""
    options, profile = train_config(config), ProfileConfig(**config.profile)
    profile.check_steps(options.ppo.total_steps)
    check_remat(config.remat)
    required(config, "policy_model", "sarm_model", "prompts_jsonl")
    feature_names(config)  # raises for a malformed file
    check_available(options.tracking)
    together.check_experiments_at_once(config, options)
    mesh = mesh_config(config)
    make_mesh(mesh)  # raises if there are too few devices
    rows = options.ppo.batch_size // options.ppo.pieces
    mesh.check_batch(rows, "ppo.batch_size / (num_minibatches × gradient_accumulation_steps)")
    mesh.check_batch(options.ppo.prompts_per_batch, "ppo.batch_size / samples_per_prompt")
    mesh.check_batch(options.ppo.rollout_slots, "ppo.rollout_slots")
    return options, profile


def run(config: ConfigDict, workdir: Path) -> None:
    """Train by PPO; write metrics, samples, checkpoints and, last, the adapter."""
    with processes.writable_workdir(workdir) as place, lock_workdir(place):
        _train(config, place)


def _train(config: ConfigDict, workdir: Path) -> None:
    """Trains in a working directory that is this process's own."""
    inputs = read_inputs(config)
    made_from = check_run(config, workdir, inputs)
    log_start(config, workdir, inputs)
    policy, tokenizer = together.load_policy(config)
    policy.remat = config.remat
    trainer = Trainer(
        config=inputs.options,
        policy=policy,
        tokenizer=tokenizer,
        reward_model=reward_model_of(config, inputs.options.reward.reads_features),
        deck=inputs.deck,
        human=inputs.human,
        states=inputs.states,
        workdir=workdir,
        eval_deck=inputs.eval_deck,
        profile=inputs.profile,
        made_from=dataclasses.asdict(made_from),
        on_start=partial(claim_workdir, STAGE, config, workdir),
        member=together.member(),
    )
    processes.raise_on_all()
    try:
        summary = trainer.run()
    except TrainingStoppedError:
        with processes.raising_on_all():
            save_run(config, workdir, trainer, policy, tokenizer)
        LOG.info("adapter of the steps so far in %s", workdir / "adapter")
        raise
    with processes.raising_on_all():
        save_run(config, workdir, trainer, policy, tokenizer)
    log_end(workdir, summary)


def read_inputs(config: ConfigDict) -> RunInputs:
    """Reads and checks all options and files of a run, before any weight is loaded."""
    options, profile = validate(config)
    if config.lab.gates_json:
        require_gates(Path(config.lab.gates_json), config.lab.ignore_failed_gates)
    prompts = read_prompts(config.prompts_jsonl)
    scorer, features = check_architectures(config)
    human = human_buffer(options.reward, config.reward.human_latents, features)
    states = state_controls(options.reward, scorer.trunk.hidden_size)
    options = dataclasses.replace(options, names=feature_names(config, scorer.latent_size))
    tokenizer = load_hf_tokenizer(config.policy_model)
    deck = PromptDeck(prompts, tokenizer, options.ppo, config.prompts_jsonl)
    eval_deck, eval_prompts = None, []
    if path := config.eval_prompts_jsonl:
        eval_prompts = read_prompts(path)
        eval_deck = PromptDeck(eval_prompts, tokenizer, options.ppo, path)
    check_context(config, deck, *([eval_deck] if eval_deck else []))
    check_models(config.policy_model, scorer=config.sarm_model)
    files = {config.eval_prompts_jsonl: eval_prompts, config.prompts_jsonl: prompts}
    if config.lab.oracle:
        for path, rows in files.items():
            task_of(config).check_prompts(rows, path)
    check_conversations(config.sarm_model, files)
    return RunInputs(options, profile, tokenizer, deck, eval_deck, human, states)


def check_architectures(config: ConfigDict) -> tuple[SARMConfig | LinearRewardConfig, int]:
    """Compares the options with the policy and the reward model.

    Returns:
        (architecture of the reward model, number of its features, with those of `lab.oracle`).
    """
    mesh_config(config).check_model(read_policy_config(config.policy_model))
    reward = reward_config(config.reward)
    scorer = check_reward_model(config, reward.reads_features)
    features = scorer.latent_size + (len(task_of(config).shortcuts) if config.lab.oracle else 0)
    reward.check_features(features)
    check_ensemble(reward.ensemble, scorer)
    feature_names(config, scorer.latent_size)
    return scorer, features


def reward_model_of(config: ConfigDict, needs_features: bool) -> RewardModel:
    """Loads the reward model; with `lab.oracle` its last features count the lab's shortcuts."""
    model = together.load_reward(config, needs_features)
    return OracleRewardModel(model, task_of(config)) if config.lab.oracle else model


def check_run(config: ConfigDict, workdir: Path, inputs: RunInputs) -> Provenance:
    """Checks that the run in the working directory, if there is one, is this one.

    Raises:
        InputError: there is another run, checkpoint or log in the working directory, or another
            process has other options or files.
    """
    made_from = provenance(STAGE, config, workdir)
    finished, recorded = check_checkpoint(workdir / "checkpoints", made_from)
    check_claim(STAGE, config, workdir, recorded.get("inputs"))
    if processes.is_primary():
        options = inputs.options
        check_log(
            workdir,
            options.reward.penalize_features,
            done=finished,
            checkpoint_every=options.ppo.checkpoint_every,
            algorithm=options.ppo.algorithm,
            further=options.further_columns,
        )
        if options.tracking.services:
            read_runs(workdir)  # raises if the file is damaged
        if STAGE.has_begun(config, workdir):
            check_longer(
                config, inputs, (read_settings(workdir) or {}, recorded.get("options", {}))
            )
        elif read_settings(workdir) is None and is_taken(workdir / "adapter"):
            raise InputError(
                f"{workdir / 'adapter'}: exists already, and is of no run here; choose another "
                "--workdir, or move it away"
            )
    check_same_everywhere(STAGE, config, workdir)
    return made_from


def is_taken(path: Path) -> bool:
    """Returns whether a run would replace something at the path of its adapter."""
    return path.is_symlink() or (path.is_dir() and any(path.iterdir()))


def check_longer(config: ConfigDict, inputs: RunInputs, recorded: Sequence[Mapping]) -> None:
    """Raises InputError if more steps than before would change the batches of earlier steps.

    The sizes of packed batches are chosen so that every batch of a run fits.

    Args:
        config: the config.
        inputs: what was read for it.
        recorded: options of the run so far, from each place that has them.
    """
    ppo, parts = inputs.options.ppo, mesh_config(config).batch_parts
    longer = run_slots(ppo, inputs.deck, parts)
    numbers = {steps for steps in map(recorded_steps, recorded) if steps is not None}
    for steps in numbers - {ppo.total_steps}:
        shorter = run_slots(dataclasses.replace(ppo, total_steps=steps), inputs.deck, parts)
        if any(plan.sizes != longer[length].sizes for length, plan in shorter.items()):
            raise InputError(
                f"ppo.total_steps={ppo.total_steps}: with ppo.pack_levels={ppo.pack_levels} the "
                f"batches of the first {steps} steps would have been packed in another size; "
                "choose another --workdir"
            )


def log_start(config: ConfigDict, workdir: Path, inputs: RunInputs) -> None:
    """Logs what will be trained, and the options that have no effect."""
    options, ppo = inputs.options, inputs.options.ppo
    mesh = mesh_config(config)
    batch = describe_batch(ppo, mesh.batch_parts)
    LOG.info(
        "%s, %d steps of %s to %d prompts, on %s; log and checkpoints in %s",
        ppo.algorithm.upper(), ppo.total_steps, batch, len(inputs.deck.prompts),
        describe_devices(mesh.devices), workdir,
    )  # fmt: skip
    log_names(options)
    if ppo.warmup_steps >= ppo.total_steps:
        LOG.warning(
            "ppo.warmup_steps=%d: the learning rate never gets to ppo.learning_rate=%g in %d steps",
            ppo.warmup_steps, ppo.learning_rate, ppo.total_steps,
        )  # fmt: skip
    if not options.reward.beta and (config.reward.human_latents or options.reward.latent_indices):
        LOG.info("beta is 0: human_latents and latent_indices are not used")
    if config.reward.probe and not options.reward.reads_probe:
        LOG.info("probe_penalty is 0: the probe is not used")
    if config.reward.human_states and not options.reward.distance_penalty:
        LOG.info("distance_penalty is 0: human_states are not used")
    if ppo.unused:
        names = ", ".join(f"ppo.{name}" for name in ppo.unused)
        LOG.info("ppo.algorithm=%s does not use %s", ppo.algorithm, names)
    if options.lora.dropout:
        dropout = options.lora.dropout
        LOG.info("lora.dropout=%g is only recorded: PPO runs without dropout", dropout)


def log_names(options: TrainConfig) -> None:
    """Logs the features that the reward penalises, clamps or holds to human data, if named."""
    reward = options.reward
    for what, features in (
        ("penalised", reward.penalize_features),
        ("clamped", reward.clamp_features),
        ("held to human latents", reward.latent_indices if reward.beta else ()),
    ):
        if options.names.of(features):
            LOG.info("%s: %s", what, options.names.show_all(features))


def log_end(workdir: Path, summary: dict) -> None:
    """Logs the end of a run that was not stopped."""
    LOG.info(
        "%d steps: total reward %+.2f sd, reference KL %.2f nats, ended %.0f %%",
        summary["steps"],
        summary["total_reward_change_in_sd"],
        summary["last_steps"]["ref_kl"],
        100 * summary["last_steps"]["eos_fraction"],
    )
    LOG.info("adapter in %s, numbers in %s", workdir / "adapter", workdir / "summary.json")


def save_run(
    config: ConfigDict, workdir: Path, trainer: Trainer, policy: Llama, tokenizer: Any
) -> None:
    """Saves the adapter and the value head of the run's present state."""
    params = trainer.state.train.params
    nnx.update(policy, params["lora"])
    save_adapter(
        workdir / "adapter",
        policy,
        trainer.config.lora,
        config.policy_model,
        tokenizer,
        jax.device_get(params.get("value_head")),
        replace=True,
    )


def describe_batch(ppo: PPOConfig, devices: int) -> str:
    """Describes how many responses a PPO step has and how they are split.

    `devices` is the number of data-parallel devices.
    """
    rows = ppo.batch_size // (ppo.pieces * devices)
    factors = [
        (ppo.gradient_accumulation_steps, "accumulated"),
        (ppo.num_minibatches, "optimizer steps an epoch"),
        (devices, "data-parallel devices"),
    ]
    product = "".join(f" × {count} {text}" for count, text in factors if count > 1)
    copies = ppo.samples_per_prompt
    if copies > 1:
        product += f", {copies} to each prompt"
    return f"{ppo.batch_size} responses ({rows} on a device{product})"


def check_context(config: ConfigDict, *decks: PromptDeck) -> None:
    """Raises InputError if a response can exceed the positions that the policy has."""
    check_positions(
        max(deck.longest for deck in decks),
        config.ppo.max_new_tokens,
        read_policy_config(config.policy_model).positions,
        option="ppo.max_new_tokens",
        model=config.policy_model,
    )


def check_checkpoint(directory: Path, made_from: Provenance) -> tuple[int, Mapping[str, Any]]:
    """Returns the number of finished steps of the newest checkpoint, and what it was made from.

    Without a checkpoint that is 0, and nothing.

    stages.json and config.json tell runs apart too, if they are there and belong to the checkpoint.
    Checkpoints of versions that did not record what they were made from are accepted.

    Raises:
        InputError: the checkpoint belongs to another run.
    """
    newest = newest_facts(directory)
    if newest is None:
        return 0, {}
    steps, facts = newest
    recorded = facts.get("made_from") or {}
    changed = recorded and change(STAGE, recorded, made_from, continuing=True)
    if changed:
        raise InputError(
            f"{directory / str(steps)}: a checkpoint of another run: {changed}; put this run's "
            "own back, or choose another --workdir"
        )
    return steps, recorded


def begun(workdir: Path) -> bool:
    """Returns whether a run has finished a step in the working directory."""
    log, checkpoints = workdir / "metrics.csv", workdir / "checkpoints"
    logged = log.is_file() and log.read_bytes().count(b"\n") > 1  # more than the header
    return logged or finished_steps(checkpoints) is not None


def recorded_steps(options: Mapping[str, Any]) -> int | None:
    """Returns ppo.total_steps of recorded options; None if they have none."""
    ppo = options.get("ppo")
    steps = ppo.get("total_steps") if isinstance(ppo, Mapping) else None
    return steps if isinstance(steps, int) else None


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns the recorded options with the present number of steps, if a run can go on to it.

    A schedule that decays depends on the number of steps; a constant one does not.
    """
    old, new = recorded_steps(before), now["ppo"]["total_steps"]
    if old is None or new < old or now["ppo"]["lr_schedule"] != "constant":
        return before
    return before | {"ppo": before["ppo"] | {"total_steps": new}}


RUN_FILES = "config.json metrics.csv samples.jsonl evaluations.jsonl summary.json".split()


def writes(config: ConfigDict) -> list[str]:
    """Returns what a run writes, a trace and the files of trackers if the config asks for them."""
    traced = ["profile/", "profile_summary.json"] if config.profile.start_step >= 0 else []
    services = track_config(config).services
    tracked = [TRACKERS] if services else []
    tracked += ["wandb/"] if "wandb" in services else []
    return [*RUN_FILES, "checkpoints/", "adapter/", *traced, *tracked]


STAGE = Stage(
    name="train",
    summary="PPO with the compound reward → metrics, samples, checkpoints and a PEFT adapter.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=(
        "policy_model",
        "sarm_model",
        "prompts_jsonl",
        "eval_prompts_jsonl",
        "dtype",
        "remat",
        "sarm_max_length",
        "lora",
        "ppo",
        "reward",
        "discriminator",
        "lab.oracle",
        "lab.shortcuts",
        "lab.task",
    ),
    inputs=(
        Input("policy_model", Kind.POLICY),
        Input("sarm_model", Kind.SCORER),
        Input("prompts_jsonl", Kind.ROWS),
        Input("eval_prompts_jsonl", Kind.ROWS),
        *REWARD_LISTS,
        *REWARD_FILES,
    ),
    output="adapter/adapter_config.json",
    makes=("adapter/", "experiments/", "*.csv", "summary.json", "samples.jsonl", "checkpoints/"),
    writes=writes,
    after=("identify", "train_probe", "human_latents", "probe"),
    wanted=lambda config: bool(config.prompts_jsonl),
    costly=lambda config: True,
    per_experiment=True,
    begun=begun,
    continued=continued,
    made_from=("identify", "train_probe", "human_latents"),
    processes="all",
)
