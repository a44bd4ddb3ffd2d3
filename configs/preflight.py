"""What `--stage=all` refuses before its first stage: hours later is too late for a typing error.

Files that an earlier stage writes are not there yet, and lists that are read from them wait too.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import check_remat, mesh_config, split_paths
from ppo.config import PPOConfig
from ppo.density_ratio import DiscriminatorConfig
from ppo.options import guard_config, lora_config, reward_config
from ppo.profiling import ProfileConfig
from ppo.responses import ResponseConfig
from sarm_jax.errors import InputError
from sarm_jax.evaluation.report.page import ReportConfig
from sarm_jax.features import IdentifyConfig
from sarm_jax.generate import Sampling
from sarm_jax.training import TrainSARMConfig

INPUTS = (
    "prompts_jsonl eval_prompts_jsonl prepare_data.demos_jsonl prepare_data.steering_dir "
    "prepare_data.rewardbench2 prepare_data.rm_bench prepare_data.safety_pairs "
    "prepare_data.complement_pairs train_sarm.pairs_jsonl identify.pairs_jsonl "
    "human_latents.demos_jsonl probe.data_jsonl evaluate.prompts_jsonl evaluate.human_jsonl "
    "evaluate.data_jsonl evaluate.steering_json evaluate.rm_bench evaluate.rewardbench2"
).split()


def check(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for an option out of range or a file that no stage will write."""
    check_inputs(config, workdir)
    PPOConfig(**config.ppo)
    lora_config(config.lora)
    DiscriminatorConfig(**config.discriminator)
    guard_config(config.guards)
    ProfileConfig(**config.profile).check_steps(config.ppo.total_steps)
    check_remat(config.remat)
    mesh_config(config)
    references = [v for v in config.reward.values() if isinstance(v, str) and v.startswith("@")]
    if all(Path(text[1:].split(":")[0]).exists() for text in references):
        reward_config(config.reward)
    pairs = config.train_sarm.pairs_jsonl
    if pairs:
        section = config.train_sarm.to_dict() | {"pairs_jsonl": split_paths(pairs)}
        TrainSARMConfig(**{k: v for k, v in section.items() if k != "model"})
    if config.identify.pairs_jsonl:
        section = config.identify.to_dict()
        IdentifyConfig(**{k: v for k, v in section.items() if k != "pairs_jsonl"})
    section = config.evaluate
    sampling = Sampling(config.ppo.max_new_tokens, section.temperature)
    ResponseConfig(sampling, section.samples, section.batch_size, section.seed)
    ReportConfig(**config.report)


def check_inputs(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for the first file that is not there and lies outside `workdir`."""
    for field in INPUTS:
        section, _, name = field.rpartition(".")
        text = (config[section] if section else config)[name]
        for path in split_paths(text) if text else ():
            own = Path(path).absolute().is_relative_to(workdir.absolute())
            if not (path.startswith("hf://") or own or Path(path).exists()):
                raise InputError(f"{field}={path}: no such file")
