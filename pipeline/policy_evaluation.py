"""Compare the base policy and trained adapters on held-out prompts, for the stage evaluate."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from conversion.keys import abstract_policy, tensor_specs
from conversion.load import load_hf_tokenizer, read_policy_config
from conversion.peft import CONFIG, load_adapter, read_adapter
from pipeline.experiments import RESERVED
from pipeline.models import check_conversations, load_policy_model, mesh_config
from pipeline.options import required
from ppo.comparison.movers import movers, rows_by_group
from ppo.comparison.policy_comparison import (
    BASE,
    Comparison,
    compare,
    latent_map,
    response_rows,
    summary,
)
from ppo.comparison.responses import ResponseConfig, Responses, respond
from ppo.prompts import encode_prompts
from sarm_jax.evaluation.controls import Controls
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.features.feature_pages import PAGES, ResponseGroups, feature_pages
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.io.workdir import named_workdirs
from sarm_jax.models.checks import check_positions
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.conversation_rows import read_demonstrations, read_prompts
from sarm_jax.models.llama import Llama
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel import processes
from sarm_jax.rewards.options import reward_config
from sarm_jax.sampling.generate import Sampling, check_temperature

LOG = logging.getLogger(__name__)
MOVERS = 16  # features that moved the score most, with a page each


@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """The data and adapters of a comparison, read and checked before any model is loaded."""

    prompts: list[Prompt]
    rows: list[list[int]]
    human: list[tuple[Prompt, str]]
    adapters: dict[str, Path]
    options: ResponseConfig


def response_config(config: ConfigDict) -> ResponseConfig:
    """Returns the sampling options of the section evaluate."""
    section = config.evaluate
    check_temperature(section.temperature, "evaluate.temperature")
    sampling = Sampling(config.ppo.max_new_tokens, section.temperature)
    return ResponseConfig(sampling, section.samples, section.batch_size, section.seed)


def policy_inputs(config: ConfigDict, workdir: Path) -> PolicyInputs | None:
    """Reads what is compared; returns None if the config names no policies to compare.

    Raises:
        InputError: an option, a file or an adapter is bad, or a run has no adapter.
    """
    section = config.evaluate
    path = section.prompts_jsonl or config.eval_prompts_jsonl
    if section.runs and not path:
        raise InputError(f"evaluate.runs={section.runs}: needs evaluate.prompts_jsonl")
    adapters = adapters_of(section.runs, workdir) if path else {}
    if not adapters:
        if section.prompts_jsonl:
            raise InputError(
                f"evaluate.prompts_jsonl={path}: name evaluate.runs, {workdir} has no adapter"
            )
        return None
    options = response_config(config)
    required(config, "policy_model")
    model = read_policy_config(config.policy_model)
    mesh_config(config).check_model(model)
    _check_adapters(config, adapters)
    prompts = read_prompts(path)
    tokenizer = load_hf_tokenizer(config.policy_model, model.vocab_size)
    ppo = config.ppo
    encoded = encode_prompts(prompts, tokenizer, ppo.max_prompt_tokens, path, ppo.long_prompts)
    check_positions(
        max(map(len, encoded.rows)),
        ppo.max_new_tokens,
        model.positions,
        option="ppo.max_new_tokens",
        model=config.policy_model,
    )
    human = []
    if section.human_jsonl:
        human = read_demonstrations(section.human_jsonl)
    pairs = [(row["prompt"], row["response"]) for row in human]
    files = {path: prompts, section.human_jsonl: [prompt for prompt, _ in pairs]}
    check_conversations(config.sarm_model, files)
    return PolicyInputs(encoded.texts, encoded.rows, pairs, adapters, options)


def adapters_of(text: str, workdir: Path) -> dict[str, Path]:
    """Returns adapter directories by run name.

    Without `text` that is the working directory's own adapter, or nothing if it has none.
    """
    adapters: dict[str, Path] = {}
    for name, run in named_workdirs(text, workdir, "evaluate.runs").items():
        places = [p for p in (run / "adapter", run) if (p / CONFIG).is_file()]
        if not places and not text:
            return {}
        if not places:
            raise InputError(f"evaluate.runs={run}: no adapter there (expected adapter/{CONFIG})")
        if name in RESERVED:
            raise InputError(f"evaluate.runs: {name!r} has a meaning of its own: use NAME={run}")
        adapters[name] = places[0]
    return adapters


def _check_adapters(config: ConfigDict, adapters: dict[str, Path]) -> None:
    specs = tensor_specs(abstract_policy(read_policy_config(config.policy_model), config.dtype))
    for path in adapters.values():
        read_adapter(path, specs)
        trained_on = read_json(path / CONFIG).get("base_model_name_or_path")
        if trained_on != config.policy_model:
            LOG.warning(
                "%s was trained on %s, and is compared on --policy_model=%s",
                path, trained_on, config.policy_model,
            )  # fmt: skip


def evaluate_policies(
    config: ConfigDict,
    model: RewardModel,
    inputs: PolicyInputs,
    *,
    controls: Controls,
    names: FeatureNames,
    folder: Path,
) -> None:
    """Samples and compares responses; writes policy.json, responses.jsonl and latent_map.json."""
    responses = responses_of(config, inputs)
    comparison = compare(
        model, controls, prompts=inputs.prompts, responses=responses, human=inputs.human
    )
    section = config.evaluate
    content = summary(comparison, section.resamples, section.seed)
    content["temperature"], content["seed"] = section.temperature, section.seed
    content |= names.field(controls.features)
    pages, latents = pages_of(config, model, comparison), latent_map(comparison)

    def write() -> None:
        write_jsonl(folder / "responses.jsonl", response_rows(comparison))
        write_json(folder / "latent_map.json", latents)
        write_json(folder / PAGES, pages, indent=1)
        write_json(folder / "policy.json", content)

    processes.on_primary(write)
    for name, means in content["runs"].items():
        shown = ("score", "penalty", "kl", "length", "ended")
        text = ", ".join(f"{key} {means[key]['mean']:.3g}" for key in shown)
        LOG.info("policy %s: %s", name, text)
    LOG.info("policies in %s", folder / "policy.json")


def pages_of(config: ConfigDict, model: RewardModel, comparison: Comparison) -> dict[str, Any]:
    """Describes the controlled features and the top movers on the responses of all policies."""
    reward, controls = reward_config(config.reward), comparison.controls
    roles: dict[int, list[str]] = {}
    for role, features in (
        ("penalised", controls.penalize_features),
        ("clamped", reward.clamp_features),
        ("steered", set(controls.changed_features) - set(reward.clamp_features)),
        ("latent KL", reward.latent_indices if reward.beta else ()),
        ("top mover", movers(comparison, MOVERS)),
    ):
        for i in features:
            roles.setdefault(i, []).append(role)
    return feature_pages(
        model,
        ResponseGroups(
            texts=[(prompt, response) for _, prompt, response in comparison.texts],
            latents=comparison.latents,
            groups=rows_by_group(comparison),
        ),
        roles,
        tau=dict(zip(controls.penalize_features, controls.tau_values, strict=True)),
    )


def responses_of(config: ConfigDict, inputs: PolicyInputs) -> dict[str, Responses]:
    """Samples responses of the base and of every adapter; returns them by name."""
    base, tokenizer = load_policy_model(config)

    def sample(policy: Llama, label: str) -> Responses:
        return respond(
            inputs.options,
            base=base,
            policy=policy,
            tokenizer=tokenizer,
            prompts=inputs.rows,
            chunk=config.ppo.logprob_chunk,
            label=label,
        )

    responses = {BASE: sample(base, BASE)}
    for name, path in inputs.adapters.items():
        policy = nnx.merge(*nnx.split(base))  # shares the base's arrays
        with processes.raising_on_all():
            load_adapter(path, policy)
        responses[name] = sample(policy, name)
    return responses
