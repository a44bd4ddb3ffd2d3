"""The stages: what each reads from the config, what it calls, and which files it writes."""

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save

from configs.benchmark_stage import prepare_benchmarks
from configs.evaluation_stage import run_evaluate
from configs.records import check_checkpoint, check_same_everywhere, provenance
from configs.report_stage import run_report
from configs.shared import (
    mesh_config,
    placement,
    plain,
    required,
    reward_model,
    split_paths,
    write_json,
)
from conversion import load_policy
from conversion.checkpoint import open_checkpoint
from conversion.keys import abstract_policy, abstract_sarm
from conversion.load import check_models, load_hf_tokenizer, read_policy_config, read_sarm_config
from conversion.peft import save_adapter
from conversion.to_hf import save_policy, save_sarm
from ppo.human_latents import collect_human_latents, human_buffer, save_human_latents
from ppo.options import reward_config, train_config
from ppo.plan import Layout, Planner, candidates, layouts_for, search, table
from ppo.profiling import ProfileConfig
from ppo.prompts import PromptDeck, read_prompts
from ppo.train import Trainer
from sarm_jax import processes
from sarm_jax.certificates import CertificateConfig
from sarm_jax.chips import target_devices
from sarm_jax.detectors import Detectors
from sarm_jax.errors import InputError
from sarm_jax.feature_lists import parse_features
from sarm_jax.features import IdentifyConfig, identify
from sarm_jax.files import replacing
from sarm_jax.jsonl import read_jsonl, write_jsonl
from sarm_jax.lab.build import LabConfig, make_data, make_models
from sarm_jax.lab.gates import measure_gates, require_gates
from sarm_jax.llama import REMAT
from sarm_jax.preference_pairs import PairsConfig, make_pairs
from sarm_jax.probing import ProbeConfig, check_probe, probe, write_probes
from sarm_jax.reward_model import RewardModel
from sarm_jax.training import PAIR_FIELDS, TrainSARMConfig, train_sarm
from sarm_jax.workdir import claim

LOG = logging.getLogger(__name__)
DEMO = {"prompt": str, "response": str}


def run_prepare_data(config: ConfigDict, workdir: Path) -> None:
    """What the later stages read: preference pairs, or the whole of the lab's world."""
    section = config.prepare_data.to_dict()
    source = section["source"]
    if source == "lab":
        prepare_lab(config, workdir)
    elif source == "demonstrations":
        names = [field.name for field in dataclasses.fields(PairsConfig)]
        prepare_pairs(PairsConfig(**{name: section[name] for name in names}), config, workdir)
    elif source == "benchmarks":
        prepare_benchmarks(config, workdir)
    else:
        raise InputError(
            f"prepare_data.source={source!r}: expected demonstrations, lab or benchmarks"
        )


def prepare_pairs(options: PairsConfig, config: ConfigDict, workdir: Path) -> None:
    """Demonstrations → preference pairs, rejected answers being made from good ones."""
    required(config, "prepare_data.demos_jsonl", "policy_model")
    demos = read_jsonl(options.demos_jsonl, DEMO)
    options.check(demos)
    LOG.info("pairs from %d demonstrations, for %s", len(demos), workdir / "data" / "pairs.jsonl")
    policy, tokenizer = load_policy(config.policy_model, config.dtype)
    pairs = make_pairs(options, policy, tokenizer, demos)
    write_jsonl(workdir / "data" / "pairs.jsonl", pairs)
    LOG.info("%d pairs in %s", len(pairs), workdir / "data" / "pairs.jsonl")


def prepare_lab(config: ConfigDict, workdir: Path) -> None:
    """A seed → the lab's data, its pretrained model and its policy, in the HF layout."""
    options = lab_config(config)
    if (workdir / "policy").exists():
        raise InputError(f"{workdir / 'policy'} exists already: delete it to train again")
    LOG.info("a world and its models, for %s", workdir)
    shutil.rmtree(workdir / "pretrained", ignore_errors=True)  # of a call that did not finish
    data = make_data(options)
    for field in dataclasses.fields(data):
        write_jsonl(workdir / "data" / f"{field.name}.jsonl", getattr(data, field.name))
    pretrained, policy, tokenizer, _ = make_models(options, data)
    save_policy(workdir / "pretrained", pretrained, tokenizer)
    save_policy(workdir / "policy", policy, tokenizer)
    LOG.info("the lab's data and models are in %s", workdir)


def run_train_sarm(config: ConfigDict, workdir: Path) -> None:
    """Preference pairs → a SARM on the first layers of the policy model, in the HF layout."""
    required(config, "train_sarm.pairs_jsonl")
    paths = split_paths(config.train_sarm.pairs_jsonl)
    section = config.train_sarm.to_dict() | {"pairs_jsonl": paths}
    model = section.pop("model") or config.policy_model
    if not model:
        required(config, "policy_model")
    options = TrainSARMConfig(**section)
    pairs = read_pairs(paths, unequal=True)
    options.held_out(pairs)
    options.check_layers(read_policy_config(model).num_hidden_layers)
    if (workdir / "sarm").exists():
        raise InputError(f"{workdir / 'sarm'} exists already: delete it to train again")
    LOG.info("training a SARM on %d pairs, for %s", len(pairs), workdir / "sarm")
    policy, tokenizer = load_policy(model, config.dtype)
    rows: list[dict] = []
    sarm, summary = train_sarm(options, policy, tokenizer, pairs, rows.append)
    hf_config = open_checkpoint(model, "policy").hf_config
    write_json(workdir / "sarm_summary.json", summary)
    write_jsonl(workdir / "sarm_metrics.jsonl", rows)
    # Last, because --stage=all takes it for the end of the stage.
    save_sarm(workdir / "sarm", sarm, tokenizer, hf_config)
    accuracy, interval = summary["accuracy_held_out"], summary["accuracy_held_out_95"]
    LOG.info("held-out accuracy %.3f (95 %% %.3f to %.3f)", accuracy, *interval)
    LOG.info("SARM in %s, numbers in %s", workdir / "sarm", workdir / "sarm_summary.json")


def run_identify(config: ConfigDict, workdir: Path) -> None:
    """Preference pairs → which latents tell chosen from rejected, with thresholds."""
    required(config, "identify.pairs_jsonl", "sarm_model")
    section = config.identify.to_dict()
    paths = split_paths(section.pop("pairs_jsonl"))
    pairs = [{"source": Path(path).stem} | row for path in paths for row in read_pairs((path,))]
    options = IdentifyConfig(**section)
    folder = workdir / "probes"
    LOG.info("features that tell the sides of %d pairs apart, for %s", len(pairs), folder)
    model = reward_model(config)
    analysis, selected, scores = identify(options, model, pairs)
    folder.mkdir(exist_ok=True)
    write_json(folder / "feature_analysis.json", analysis)
    with replacing(folder / "feature_scores.safetensors", "wb") as file:
        file.write(save(scores))
    if config.prepare_data.source == "lab":
        detectors = Detectors(
            tuple(selected["detectors"]),
            tuple(selected["tau_detectors"]),
            analysis["detectors"]["detection"],
            analysis["detectors"]["false_alarms"],
        )
        check_lab(config, workdir, model, detectors)
    write_json(folder / "selected_features.json", selected)
    LOG.info("features in %s", folder / "selected_features.json")


def check_lab(config: ConfigDict, workdir: Path, model: RewardModel, detectors: Detectors) -> None:
    """Measures the lab's gates on held-out prompts, says which hold, and writes gates.json."""
    data = workdir / "data"
    prompts, held_out = (
        read_prompts(str(data / name)) for name in ("prompts.jsonl", "held_out_prompts.jsonl")
    )
    contrast = read_jsonl(data / "contrast_single.jsonl", PAIR_FIELDS)
    gates = measure_gates(model, detectors, contrast, prompts, held_out, config.lab.seed)
    for gate in gates:
        LOG.info("gate %s: %s", "passed" if gate.passed else "FAILED", gate)
    values = {gate.name: {"value": gate.value, "passed": gate.passed} for gate in gates}
    write_json(workdir / "probes" / "gates.json", values)


def run_probe(config: ConfigDict, workdir: Path) -> None:
    """Sets features to a value, one at a time, and says what the reward does."""
    section = config.probe
    features = parse_features("probe.feature", section.feature)
    certificate = CertificateConfig(section.controls, section.flips, section.level, section.seed)
    ids = tuple(dict.fromkeys(features))
    options = ProbeConfig(ids, section.set_value, section.mode, certificate)
    required(config, "probe.data_jsonl", "sarm_model")
    data = read_jsonl(section.data_jsonl, {"prompt": str})
    latent_size = read_sarm_config(config.sarm_model).sae.latent_size
    check_probe(options, latent_size, data, section.data_jsonl)
    folder = workdir / "probes"
    LOG.info("probing %d features on %d rows, for %s", len(ids), len(data), folder)
    probes, certificates = probe(options, reward_model(config), data)
    folder.mkdir(exist_ok=True)
    write_probes(folder, probes)
    content = {"options": dataclasses.asdict(options), "features": certificates}
    write_json(folder / "certificates.json", content)
    # Last, because --stage=all takes it for the end of the stage.
    write_json(folder / "probe_summary.json", {"features": [found.summary for found in probes]})
    certified = sum(row["certified"] for row in certificates)
    LOG.info("%d of %d features certified", certified, len(certificates))
    LOG.info("%d features probed; summary in %s", len(probes), folder / "probe_summary.json")


def run_human_latents(config: ConfigDict, workdir: Path) -> None:
    """Human demonstrations → the buffer of latents that the discriminator compares with."""
    required(config, "human_latents.demos_jsonl", "sarm_model")
    demos = read_jsonl(config.human_latents.demos_jsonl, DEMO)
    reward = reward_config(config.reward)
    reward.check_features(read_sarm_config(config.sarm_model).sae.latent_size)
    path = workdir / "human_latents.safetensors"
    LOG.info("latents of %d demonstrations, for %s", len(demos), path)
    human = collect_human_latents(reward_model(config), demos, reward.latent_indices)
    save_human_latents(path, human)
    LOG.info("latents %s in %s", human.z_ns.shape, path)


def run_train(config: ConfigDict, workdir: Path) -> None:
    """PPO with the compound reward → metrics, samples, checkpoints and a PEFT adapter."""
    options = train_config(config)
    if config.lab.gates_json:
        require_gates(Path(config.lab.gates_json), config.lab.ignore_failed_gates)
    profile = ProfileConfig(**config.profile)
    profile.check_steps(options.ppo.total_steps)
    check_remat(config.remat)
    required(config, "policy_model", "sarm_model", "prompts_jsonl")
    prompts = read_prompts(config.prompts_jsonl)
    mesh, placed = mesh_config(config), placement(config)
    mesh.check_model(read_policy_config(config.policy_model))
    rows = options.ppo.batch_size // options.ppo.pieces
    mesh.check_batch(rows, "ppo.batch_size / (num_minibatches × gradient_accumulation_steps)")
    latent_size = read_sarm_config(config.sarm_model).sae.latent_size
    options.reward.check_features(latent_size)
    human = human_buffer(options.reward, config.reward.human_latents, latent_size)
    tokenizer = load_hf_tokenizer(config.policy_model)
    ppo = options.ppo
    deck = PromptDeck(prompts, tokenizer, ppo.max_prompt_tokens, ppo.seed, config.prompts_jsonl)
    eval_deck = None
    if path := config.eval_prompts_jsonl:
        eval_prompts = read_prompts(path)
        eval_deck = PromptDeck(eval_prompts, tokenizer, ppo.max_prompt_tokens, ppo.seed, path)
    check_models(config.policy_model, config.sarm_model)
    made_from = provenance(train_settings(config), (), workdir / ADAPTER)
    check_checkpoint(workdir / "checkpoints", made_from)
    claim(workdir, train_settings(config))
    processes.agree()
    check_same_everywhere(made_from)

    steps = options.ppo.total_steps
    LOG.info("PPO, %d steps on %d prompts; log and checkpoints in %s", steps, len(prompts), workdir)
    if options.lora.dropout:
        LOG.info("lora.dropout=%g is only recorded: PPO runs without dropout", options.lora.dropout)
    policy, tokenizer = load_policy(config.policy_model, config.dtype, placed.load)
    policy.remat = config.remat
    model = reward_model(config)
    trainer = Trainer(
        options,
        policy,
        tokenizer,
        model,
        deck,
        human,
        workdir,
        eval_deck,
        placed,
        profile,
        dataclasses.asdict(made_from),
    )
    processes.agree()
    summary = trainer.run()
    params = trainer.state["train"].params
    nnx.update(policy, params["lora"])
    value_head = jax.device_get(params["value_head"])
    save_adapter(
        workdir / "adapter",
        policy,
        options.lora,
        config.policy_model,
        tokenizer,
        value_head,
        replace=True,
    )
    LOG.info(
        "%d steps: total reward %+.2f sd, reference KL %.2f nats, ended %.0f %%",
        summary["steps"],
        summary["total_reward_change_in_sd"],
        summary["last_steps"]["ref_kl"],
        100 * summary["last_steps"]["eos_fraction"],
    )
    LOG.info("adapter in %s, numbers in %s", workdir / "adapter", workdir / "summary.json")
    processes.part()


def run_plan(config: ConfigDict, workdir: Path) -> None:
    """Architectures and options → memory, traffic and time of a PPO step on a machine."""
    options, section = train_config(config), config.plan
    for part, model in (("policy_config", "policy_model"), ("sarm_config", "sarm_model")):
        if not section[part]:
            required(config, model)
    policy = read_policy_config(section.policy_config or config.policy_model)
    sarm = read_sarm_config(section.sarm_config or config.sarm_model)
    options.reward.check_features(sarm.sae.latent_size)
    planner = Planner(
        name=section.target,
        config=options.ppo,
        lora=options.lora,
        policy=lambda: abstract_policy(policy, config.dtype),
        sarm=lambda: abstract_sarm(sarm, config.dtype),
        score_batch=config.sarm_batch_size,
        watched=len(options.reward.penalize_features) + len(options.reward.latent_indices),
    )
    check_remat(config.remat)
    if section.search:
        found = layouts_for(target_devices(section.target), options.ppo.batch_size)
        plans = search(planner, list(found))
        plan = plans[0] | {"candidates": plans[1:]}
        print(candidates(plans), end="\n\n")
    else:
        accumulation = options.ppo.gradient_accumulation_steps
        plan = planner.plan(Layout(mesh_config(config), config.remat, accumulation))
    write_json(workdir / "plan.json", plan)
    print(table(plan))
    LOG.info("the plan is in %s", workdir / "plan.json")


STAGES = {
    "prepare_data": run_prepare_data,
    "train_sarm": run_train_sarm,
    "identify": run_identify,
    "probe": run_probe,
    "human_latents": run_human_latents,
    "train": run_train,
    "evaluate": run_evaluate,
    "report": run_report,
    "plan": run_plan,
}
ADAPTER = "adapter/adapter_config.json"  # what the stage train writes last
TRAIN_SETTINGS = (
    "policy_model sarm_model prompts_jsonl eval_prompts_jsonl dtype remat sarm_max_length "
    "lora ppo reward discriminator"
).split()


def train_settings(config: ConfigDict) -> dict:
    """What a run in a working directory must not differ in."""
    return {name: plain(config[name]) for name in TRAIN_SETTINGS}


def lab_config(config: ConfigDict) -> LabConfig:
    """The lab section's part that makes the world."""
    section = config.lab.to_dict()
    return LabConfig(**{field.name: section[field.name] for field in dataclasses.fields(LabConfig)})


def check_remat(name: str) -> None:
    """Raises InputError for what `Llama` does not know."""
    if name not in REMAT:
        raise InputError(f"remat={name!r}: expected one of {', '.join(REMAT)}")


def read_pairs(paths: tuple[str, ...], unequal: bool = False) -> list[dict]:
    """The preference pairs of JSONL files, one after the other.

    InputError for a source that is no text and, if they have to be `unequal`, a pair of equals.
    """
    pairs = []
    for path in paths:
        for number, row in enumerate(read_jsonl(path, PAIR_FIELDS), 1):
            if not isinstance(row.get("source", ""), str):
                raise InputError(f"{path}:{number}: field 'source' must be str")
            if unequal and row["chosen"] == row["rejected"]:
                raise InputError(f"{path}:{number}: fields 'chosen' and 'rejected' are the same")
            pairs.append(row)
    return pairs
