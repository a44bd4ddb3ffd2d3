"""A table of bad inputs: the options, the damage to a file, and the parts of the error message.

`{bad}` in options and messages stands for the damaged copy or file, `{world}` for the directory of
the good models and data, which `tests/system/test_bad_inputs.py` makes. Every case must be refused
before any weight is loaded, unless `loads` is set.
"""

import dataclasses
import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.oracles import LLAMA3_ROPE
from tests.paths import ROOT

# (world, an empty directory) → the path that {bad} stands for
Damage = Callable[[Path, Path], Path]
INDEX, WEIGHTS, ADAPTER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
)
Q = "model.layers.0.self_attn.q_proj.weight"
A = f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"


@dataclasses.dataclass(frozen=True)
class BadInput:
    """A command and its expected error.

    Attributes:
        name: the name of the case.
        options: the options, separated by blanks.
        messages: parts of the error message.
        damage: makes the damaged file or directory; None: `{bad}` is an empty directory.
        command: main, from_hf or to_hf.
        loads: True if the error shows only after a model is loaded.
    """

    name: str
    options: str
    messages: tuple[str, ...]
    damage: Damage | None = None
    command: str = "main"
    loads: bool = False


# ---- Kinds of damage


def file(content: bytes | str, name: str = "bad.jsonl") -> Damage:
    """Makes a file with this content."""

    def damage(world: Path, folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return damage


def copied(part: str, change: Callable[[Path], object]) -> Damage:
    """Copies a directory of the world and changes the copy in place."""

    def damage(world: Path, folder: Path) -> Path:
        copy = folder / Path(part).name
        shutil.copytree(world / part, copy, symlinks=True)
        change(copy)
        return copy

    return damage


def json_fields(part: str, name: str, **fields: Any) -> Damage:
    """Sets fields of a JSON file in a copy; `...` deletes a field, a dict updates an object."""

    def change(copy: Path) -> None:
        path = copy / name
        content = json.loads(path.read_text())
        for key, value in fields.items():
            old = content.get(key)
            content[key] = old | value if isinstance(old, dict) and type(value) is dict else value
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return copied(part, change)


def config(**fields: Any) -> Damage:
    """Sets fields in the config.json of a policy."""
    return json_fields("policy", "config.json", **fields)


def content(part: str, name: str, text: bytes | str) -> Damage:
    """Replaces the content of one file in a copy."""
    encoded = text if isinstance(text, bytes) else text.encode()
    return copied(part, lambda copy: (copy / name).write_bytes(encoded))


def without(part: str, *names: str) -> Damage:
    """Deletes files in a copy."""
    return copied(part, lambda copy: [(copy / name).unlink() for name in names])


def tensors(part: str, change: Callable[[dict], object], name: str = WEIGHTS) -> Damage:
    """Changes the tensors in a copy."""

    def rewrite(copy: Path) -> None:
        arrays = load_file(copy / name)
        change(arrays)
        save_file(arrays, copy / name, metadata={"format": "pt"})

    return copied(part, rewrite)


def header(fields: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file with any header; `length` is the header length that it states."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(dtype: str, shape: list, start: int, end: int) -> dict:
    """Returns the description of a tensor in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def weights(raw: bytes) -> Damage:
    """Replaces the weights file of a policy."""
    return content("policy", WEIGHTS, raw)


def cut(copy: Path) -> None:
    """Cuts the last bytes off the weights."""
    path = copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


def indexed(change: Callable[[dict], object]) -> Damage:
    """Changes the weight_map of a sharded policy."""

    def rewrite(copy: Path) -> None:
        listed = json.loads((copy / INDEX).read_text())
        change(listed["weight_map"])
        (copy / INDEX).write_text(json.dumps(listed))

    return copied("sharded", rewrite)


def linked(part: str, name: str) -> Damage:
    """Replaces a file in a copy by a link to the original, outside the copy."""

    def damage(world: Path, folder: Path) -> Path:
        copy = copied(part, lambda copy: (copy / name).unlink())(world, folder)
        (copy / name).symlink_to(world / part / name)
        return copy

    return damage


def shard_linked(world: Path, folder: Path) -> Path:
    """Copies a sharded policy, with one shard that is a link out of the directory."""
    copy = copied("sharded", lambda copy: None)(world, folder)
    name = json.loads((copy / INDEX).read_text())["weight_map"][Q]
    (copy / name).unlink()
    (copy / name).symlink_to(Path("..") / ".." / ".." / "world" / "sharded" / name)
    return copy


def template(text: str, part: str = "policy") -> Damage:
    """Replaces the chat template of a tokenizer."""
    return content(part, "chat_template.jinja", text)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}"
    "{% endif %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
    "{% endif %}"
)


def latents(**arrays: np.ndarray) -> Damage:
    """Makes a human-latents file of these arrays."""

    def damage(world: Path, folder: Path) -> Path:
        save_file(arrays, folder / "human.safetensors")
        return folder / "human.safetensors"

    return damage


def parquet(rows: list[dict]) -> Damage:
    """Makes a Parquet file of these rows."""

    def damage(world: Path, folder: Path) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bad.parquet")
        return folder / "bad.parquet"

    return damage


def zstd(content: bytes) -> bytes:
    """Compresses with Zstandard."""
    import pyarrow

    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def run_with(**files: str) -> Damage:
    """Replaces files of a run; __ in a name stands for a dot, and "-" deletes the file."""

    def change(copy: Path) -> None:
        for name, text in files.items():
            path = copy / name.replace("__", ".")
            path.unlink() if text == "-" else path.write_text(text)

    return copied("run", change)


def nothing(world: Path, place: Path) -> Path:
    """Returns an empty directory."""
    return place


def recordings(*names: str, text: str = "step\n", summary: str = "{}") -> Damage:
    """Makes a directory with the metrics and summaries of runs of another program."""

    def damage(world: Path, folder: Path) -> Path:
        for name in names:
            (folder / f"{name}_metrics.csv").write_text(text)
            (folder / f"{name}_summary.json").write_text(summary)
        return folder

    return damage


def trained(change: Callable[[Path], object], *deleted: str) -> Damage:
    """Copies a run and its models, all with relative paths, and changes the copy in place.

    `deleted` are files of the run that are removed, such as records that identify a checkpoint.
    """

    def damage(world: Path, folder: Path) -> Path:
        shutil.copytree(world / "trained", folder, dirs_exist_ok=True)
        for name in deleted:
            (folder / "run" / name).unlink()
        change(folder)
        return folder / "run"

    return damage


def exchanged(part: str, other: str) -> Callable[[Path], object]:
    """Replaces a model of the world by another."""

    def change(place: Path) -> None:
        shutil.rmtree(place / part)
        shutil.copytree(place.parent.parent / "world" / other, place / part)

    return change


def doubled(name: str) -> Callable[[Path], object]:
    """Doubles all weights of a file."""

    def change(place: Path) -> None:
        arrays = load_file(place / name)
        save_file({key: 2 * value for key, value in arrays.items()}, place / name)

    return change


def flipped(pattern: str) -> Callable[[Path], object]:
    """Flips a bit in the middle of a file of the run's checkpoint."""

    def change(place: Path) -> None:
        path = next(p for p in sorted((place / "run/checkpoints/2").glob(pattern)) if p.is_file())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def pickled(part: str, weights_name: str, name: str) -> Damage:
    """Replaces weights by a pickle that would create a file beside it when it is unpickled."""

    def change(copy: Path) -> None:
        (copy / weights_name).unlink()
        target = str(copy / "unpickled").encode()
        (copy / name).write_bytes(b"cbuiltins\nopen\n(V" + target + b"\nVw\ntR.")

    return copied(part, change)


def main(
    name: str, options: str, *messages: str, damage: Damage | None = None, loads=False
) -> BadInput:
    return BadInput(name, options, messages=messages, damage=damage, loads=loads)


def policy(name: str, damage: Damage, *messages: str) -> BadInput:
    """A case in which `train` refuses the policy."""
    return BadInput(name, "--policy_model={bad}", messages=messages, damage=damage)


def reward_model(name: str, damage: Damage, *messages: str) -> BadInput:
    """A case in which `train_sae` refuses the reward model."""
    options = (
        "--stage=train_sae --config.train_sae.model={bad} "
        "--config.train_sae.responses_jsonl={world}/pairs.jsonl"
    )
    return BadInput(name, options, messages=messages, damage=damage)


def prompts(name: str, text: bytes | str, *messages: str) -> BadInput:
    """A case in which `train` refuses the prompts."""
    return BadInput(name, "--prompts_jsonl={bad}", messages=messages, damage=file(text))


def human(name: str, damage: Damage, *messages: str) -> BadInput:
    """A case in which `train` refuses the human latents."""
    options = "--beta=0.5 --human_latents={bad}"
    return BadInput(name, options, messages=messages, damage=damage)


def adapter(name: str, damage: Damage, *messages: str) -> BadInput:
    """A case in which `evaluate` refuses an adapter."""
    options = (
        "--stage=evaluate --config.evaluate.runs={bad} "
        "--config.evaluate.prompts_jsonl={world}/demos.jsonl"
    )
    return BadInput(name, options, messages=messages, damage=damage)


def bench(name: str, options: str, *messages: str, damage: Damage | None = None) -> BadInput:
    """A case for `evaluate`; the options are fields of that section."""
    arguments = " ".join(f"--config.evaluate.{option}" for option in options.split())
    options = f"--stage=evaluate {arguments}"
    return BadInput(name, options, messages=messages, damage=damage)


def features(
    name: str, damage: Damage | None, *messages: str, key: str = "{bad}:harming"
) -> BadInput:
    """A case in which `train` refuses a list behind "@"."""
    options = f"--penalize_features=@{key} --tau_values=1 --alpha_values=1"
    return BadInput(name, options, messages=messages, damage=damage)


PENALTY = "--penalize_features=1,2 --tau_values=1,1 --alpha_values=1,1"
HOSTS = "--coordinator_address=localhost:1 --num_processes=2 --process_id=0"
PROBE = "--stage=probe --config.probe.feature=1"
PLAN = "--stage=plan --config.plan.target"
ALL = "--stage=all --config.prepare_data.source=lab"
WORDS = (
    "--stage=prepare_data --config.prepare_data.source=lab --config.lab.task=words "
    "--config.lab.base_model={world}/policy --config.lab.told_shortcuts=praise"
)
ABLATIONS = ROOT / "configs" / "ablations.py"

FLAGS = [
    main("unknown stage", "--stage=dance", "--stage=dance", "train_sarm"),
    main("unknown option", "--config.ppo.steps=3", "--config.ppo.steps=3: no such option"),
    main(
        "option that is nearly one",
        "--config.ppo.learning_rat=1",
        "--config.ppo.learning_rat=1: no such option (did you mean --config.ppo.learning_rate?)",
    ),
    main("word for a number in the config", "--config.ppo.total_steps=many", "total_steps"),
    main("fraction for a whole number", "--config.ppo.total_steps=1.5", "total_steps", "1.5"),
    main("unknown flag", "--no_such_flag=1", "no_such_flag"),
    main("argument without a flag", "stray", "unexpected argument 'stray'"),
    main(
        "responses beyond the policy's positions",
        "--max_new_tokens=9000",
        "ppo.max_new_tokens=9000: with the",
        "positions (max_position_embeddings)",
    ),
    main("empty working directory", "--workdir=", "--workdir is empty"),
    main("empty output directory", "--output_dir=", "--output_dir is empty"),
    main("file for a working directory", "--workdir={world}/demos.jsonl", "is a file"),
    main("model for a working directory", "--workdir={world}/policy", "holds a model"),
    main("no steps", "--total_steps=0", "ppo.total_steps=0: must be at least 1"),
    main("word for a number in a flag", "--total_steps=x", "--total_steps=x"),
    main(
        "batch that cannot be split",
        "--config.ppo.batch_size=5 --gradient_accumulation_steps=2",
        "ppo.batch_size=5 is not divisible",
    ),
    main(
        "unknown algorithm",
        "--config.ppo.algorithm=reinforce",
        "ppo.algorithm='reinforce': expected one of ppo, rloo, grpo",
    ),
    main(
        "group of one",
        "--config.ppo.algorithm=rloo",
        "ppo.samples_per_prompt=1: ppo.algorithm=rloo compares",
    ),
    main(
        "batch that does not consist of groups",
        "--config.ppo.samples_per_prompt=3",
        "is not divisible by ppo.samples_per_prompt=3",
    ),
    main(
        "option of another algorithm",
        "--config.ppo.loss_average=responses",
        "ppo.loss_average=responses: is an option of ppo.algorithm=grpo, found ppo",
    ),
    main("negative upper clip", "--config.ppo.clip_range_high=-0.1", "ppo.clip_range_high=-0.1"),
    main(
        "as many slots as responses",
        "--config.ppo.rollout_slots=4",
        "ppo.rollout_slots=4: must be less than ppo.batch_size=4",
    ),
    main("no rows on a device", "--batch_size=0", "--batch_size=0: must be at least 1"),
    main(
        "batch in two ways",
        "--batch_size=2 --config.ppo.batch_size=4",
        "--batch_size=2 and --config.ppo.batch_size",
    ),
    main(
        "flag of the launcher",
        "--config_file=configs/accelerate_4gpu.yaml",
        "--config_file is not taken: --config.mesh.data",
    ),
    main(
        "flag of another script",
        "--set_value=0.0 --stage=probe",
        "--set_value is not taken: --config.probe.set_value",
    ),
    main(
        "working directory under two names",
        "--output_dir={world}/other",
        "two names of the same option",
    ),
    main("negative learning rate", "--learning_rate=-1", "ppo.learning_rate=-1.0"),
    main("clip range NaN", "--clip_range=nan", "ppo.clip_range=nan"),
    main("temperature 0 in PPO", "--temperature=0", "ppo.temperature=0.0"),
    main("top-p in PPO", "--top_p=0.95", "ppo.top_p=0.95", "use ppo.top_p=1.0"),
    main("rank 0", "--lora_r=0", "lora.rank=0"),
    main("LoRA scale 0", "--lora_alpha=0", "lora.alpha=0.0"),
    main("LoRA scale infinite", "--lora_alpha=inf", "lora.alpha=inf"),
    main("dropout 1", "--lora_dropout=1", "lora.dropout=1.0"),
    main("negative seed", "--seed=-1", "ppo.seed=-1"),
    main("unknown LoRA target", "--config.lora.target_modules=q_proj,wrong", "q_proj,wrong"),
    main("unknown dtype", "--config.dtype=float16", "dtype='float16'", "bfloat16"),
    main("unknown remat", "--config.remat=some", "remat='some'", "dots"),
    main("unknown tracker", "--config.track=wandb,mlflow", "track=wandb,mlflow", "'mlflow'"),
    main("tracker twice", "--config.track=wandb,wandb", "track=wandb,wandb", "twice"),
    main("project of a tracker", "--config.track_project=a/b", "track_project='a/b'"),
    main("unknown schedule", "--config.ppo.lr_schedule=step", "lr_schedule='step'", "cosine"),
    main(
        "unknown treatment of long prompts",
        "--config.ppo.long_prompts=cut",
        "ppo.long_prompts='cut'",
        "truncate",
    ),
    main("gamma above 1", "--config.ppo.gamma=1.5", "ppo.gamma=1.5", "[0, 1]"),
    main("infinite KL weight", "--config.ppo.kl_coef=inf", "ppo.kl_coef=inf"),
    main("no evaluation step", "--config.ppo.eval_every=0", "ppo.eval_every=0"),
    main("discriminator without a rate", "--disc_lr=inf", "discriminator.learning_rate=inf"),
    main("no discriminator", "--config.discriminator.folds=0", "discriminator.folds=0"),
    main("discriminator of no width", "--config.discriminator.hidden_size=0", "hidden_size=0"),
    main("discriminator decay NaN", "--config.discriminator.weight_decay=nan", "weight_decay=nan"),
    main("no room for a conversation", "--config.sarm_max_length=0", "sarm_max_length=0"),
    main("no rows at a time", "--config.sarm_batch_size=0", "sarm_batch_size=0"),
    main("no experiment at a time", "--config.experiments_at_once=0", "experiments_at_once=0"),
    main(
        "several experiments of none",
        "--config.experiments_at_once=2",
        "experiments_at_once=2: the config has 0 experiments",
    ),
    main("trace before the start", "--config.profile.start_step=-2", "profile.start_step=-2"),
    main(
        "trace after the end",
        "--config.profile.start_step=1",
        "profile.start_step=1 and profile.num_steps=2 end after ppo.total_steps=2",
    ),
    main(
        "trace of nothing",
        "--config.profile.start_step=0 --config.profile.num_steps=0",
        "profile.num_steps=0",
    ),
    main("half of the hosts' flags", "--num_processes=2", "--coordinator_address", "go together"),
    main("address without a port", f"{HOSTS} --coordinator_address=gpu0", "gpu0", "HOST:PORT"),
    main("address of a port beyond", f"{HOSTS} --coordinator_address=gpu0:70000", "gpu0:70000"),
    main(
        "one process of one",
        f"{HOSTS} --num_processes=1",
        "--num_processes=1",
        "must lie in [2, 65536]",
    ),
    main("process beyond the last", f"{HOSTS} --process_id=2", "--process_id=2", "0 to 1"),
    *(
        main(f"processes for {stage}", f"{HOSTS} --stage={stage}", f"--stage={stage}", "one")
        for stage in ("plan", "prepare_data", "report")
    ),
    main(
        "processes for the lab's study",
        f"{HOSTS} --stage=all --config.prepare_data.source=lab",
        "--num_processes=2: the lab's study runs in one process",
    ),
    main("mesh of no devices", "--config.mesh.data=0", "mesh.data=0"),
    main(
        "mesh of too many devices",
        "--config.mesh.data=16",
        "mesh data=16 fsdp=1 tensor=1 takes 16 devices; there are 8",
    ),
    main(
        "heads that cannot be split",
        "--config.mesh.tensor=8",
        "mesh.tensor=8 does not divide num_attention_heads=4",
    ),
    main(
        "rows that cannot be split",
        "--config.mesh.fsdp=8",
        "= 4 rows do not divide over data × fsdp = 8",
    ),
    main("workdir that cannot be made", "--workdir=/proc/run", "--workdir=/proc/run"),
    main("workdir that is a file", "--workdir={world}/demos.jsonl", "demos.jsonl"),
    main("workdir with a name too long", f"--workdir={{world}}/{'x' * 300}", "name too long"),
    main(
        "config that is not there",
        "--config=configs/nope.py",
        "--config=configs/nope.py: no such file",
    ),
    main(
        "variant that is not there",
        f"--config={ABLATIONS}:tau_3",
        "no variant is called 'tau_3'",
        "one of alpha_005, alpha_02, tau_2, tau_4",
    ),
    main("variant missing", f"--config={ABLATIONS}", "the variant is missing", "alpha_005"),
    main(
        "config that is no Python",
        "--config={bad}",
        "bad.py",
        damage=file("def get_config(:", "bad.py"),
    ),
]

REWARD = [
    main(
        "fewer α than features",
        "--penalize_features=1,2 --tau_values=1,1 --alpha_values=1",
        "reward.alpha_values has 1 values for 2 reward.penalize_features",
    ),
    main(
        "fewer τ than features",
        "--penalize_features=1,2 --tau_values=1 --alpha_values=1,1",
        "reward.tau_values has 1 values for 2 reward.penalize_features",
    ),
    main(
        "negative α",
        "--penalize_features=1,2 --tau_values=1,1 --alpha_values=1,-1",
        "reward.alpha_values: -1.0",
    ),
    main("α that is no number", f"{PENALTY} --alpha_values=1,x", "reward.alpha_values: found 'x'"),
    main("τ infinite", f"{PENALTY} --tau_values=1,inf", "reward.tau_values: found 'inf'"),
    main(
        "feature beyond the SARM",
        f"{PENALTY} --penalize_features=1,64",
        "feature 64 of a SARM with 64 latents",
    ),
    main(
        "feature that is no number",
        f"{PENALTY} --penalize_features=1,b",
        "reward.penalize_features: found 'b'",
    ),
    main("feature twice", f"{PENALTY} --penalize_features=1,1", "feature 1 is given twice"),
    main(
        "feature beyond any index",
        f"{PENALTY} --penalize_features=1,99999999999",
        "reward.penalize_features: found '99999999999'",
    ),
    main("clamp without a value", "--clamp_features=1", "reward.clamp_features=1"),
    main(
        "clamp with its ends exchanged",
        "--clamp_features=1 --clamp_min_values=2 --clamp_max_values=1",
        "feature 1: clamp minimum 2.0 exceeds its maximum 1.0",
    ),
    main(
        "set and bounded",
        "--clamp_features=1 --clamp_set_values=2 --clamp_max_values=1",
        "feature 1 is set to 2.0",
    ),
    main("negative β", "--beta=-0.5", "reward.beta=-0.5"),
    main("β without human latents", "--beta=0.5", "reward.beta=0.5 needs human", "--human_latents"),
    main("unknown unit", "--config.reward.unit=nats", "reward.unit='nats'", "sd"),
    main(
        "counts of the lab on other prompts",
        "--config.lab.oracle=True",
        "lab.oracle=True: {world}/demos.jsonl:1: ",
        "is no prompt of the lab",
    ),
    main("unknown ensemble", "--config.reward.ensemble=max", "reward.ensemble='max'", "'min'"),
    main(
        "worst of one head",
        "--config.reward.ensemble=min",
        "reward.ensemble='min': the reward model has one head; train_sarm.heads trains several",
    ),
    main("negative cap", "--config.reward.penalty_cap=-1", "reward.penalty_cap=-1.0"),
    main(
        "failed or foreign gates",
        "--config.lab.gates_json={bad}",
        "bad.json: expected the gates of --stage=identify, found [1]",
        damage=file("[1]", "bad.json"),
    ),
    main("no gates", "--config.lab.gates_json=none.json", "none.json: no such file"),
    features("list in no file", None, "nowhere.json", key="nowhere.json:harming"),
    features("list without a key", file("{}", "a.json"), "expected @FILE:key", key="{bad}"),
    features("list that is not there", file('{"tau": [1]}', "a.json"), "no list 'harming'", "tau"),
    features(
        "list too short",
        file('{"harming": [1]}', "a.json"),
        "lists only 1",
        key="{bad}:harming[:2]",
    ),
    features(
        "list that is empty",
        file('{"harming": []}', "a.json"),
        "reward.penalize_features=@{bad}:harming: the list is empty",
    ),
    features(
        "first of a list that is empty",
        file('{"harming": []}', "a.json"),
        "reward.penalize_features=@{bad}:harming[:5]: the list is empty; name another list",
        key="{bad}:harming[:5]",
    ),
    main(
        "list of probed features that is empty",
        "--stage=probe --config.probe.feature=@{bad}:harming "
        "--config.probe.data_jsonl={world}/demos.jsonl",
        "probe.feature=@{bad}:harming: the list is empty",
        damage=file('{"harming": []}', "a.json"),
    ),
    main(
        "list of compared latents that is empty",  # an empty option would select all of them
        "--beta=0.5 --human_latents=x --latent_indices=@{bad}:harming",
        "reward.latent_indices=@{bad}:harming: the list is empty",
        damage=file('{"harming": []}', "a.json"),
    ),
    features(
        "list of fractions", file('{"harming": [1.5]}', "a.json"), "found 1.5", "a whole number"
    ),
    features("list of lists", file('{"harming": [[1]]}', "a.json"), "found [1]"),
    features("list in broken JSON", file('{"harming": [1', "a.json"), "a.json: not JSON"),
    features("list in a nesting bomb", file("[" * 100_000, "a.json"), "nested too deeply"),
    features(
        "list under a key that is there twice",
        file('{"harming": [1], "harming": [2]}'),
        "key 'harming' appears twice",
    ),
]

JSONL = [
    main(
        "no file",
        "--prompts_jsonl=/no/such/file.jsonl",
        "prompts_jsonl=/no/such/file.jsonl: no such",
    ),
    prompts(
        "conversation with a tool's turn",
        '{"prompt": [{"role": "tool", "content": "4"}, {"role": "user", "content": "and?"}]}',
        ":1: field 'prompt'[0].role",
        "tool",
    ),
    prompts(
        "conversation that ends with an answer",
        '{"prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}',
        ":1: field 'prompt'[1].role",
    ),
    prompts(
        "message without content",
        '{"prompt": "hi"}\n{"prompt": [{"role": "user"}]}',
        ":2: field 'prompt'[0]",
        "content",
    ),
    main("no file name", "--prompts_jsonl=", "prompts_jsonl is empty"),
    main("directory for a file", "--prompts_jsonl={world}", "is not a file"),
    main("device for a file", "--prompts_jsonl=/dev/zero", "/dev/zero: is not a file"),
    main("path that is too long", f"--prompts_jsonl={'y' * 5000}", "name too long"),
    main("held-out prompts not there", "--config.eval_prompts_jsonl=/no/such.jsonl", "such.jsonl"),
    main(
        "prompts too long",
        "--config.ppo.max_prompt_tokens=10",
        "demos.jsonl:1",
        "ppo.max_prompt_tokens=10",
    ),
    prompts("empty file", b"", "bad.jsonl: the file is empty"),
    prompts(
        "number for text",
        '{"prompt": "a"}\n{"prompt": 3}\n',
        "bad.jsonl:2: field 'prompt' must be str or a list of messages, found 3",
    ),
    prompts("null for text", '{"prompt": null}\n', "bad.jsonl:1", "found null"),
    prompts(
        "field missing",
        '{"prompt": "a"}\n{"text": "b"}\n',
        "bad.jsonl:2: field 'prompt' is missing, found ['text']",
    ),
    prompts("blank lines alone", "\n \n\n", "bad.jsonl: the file is empty"),
    prompts("bad line after blank ones", '\n\n{"prompt": "a"}\n \n{"prompt": 3}', "bad.jsonl:5:"),
    main(
        "prompt too long after blank lines",
        "--prompts_jsonl={bad} --config.ppo.max_prompt_tokens=60",
        "bad.jsonl:5: the prompt has",
        damage=file('\n\n{"prompt": "a"}\n \n{"prompt": "' + "many words " * 99 + '"}\n'),
    ),
    main(
        "pair of equals after blank lines",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={bad}",
        "bad.jsonl:3: fields 'chosen' and 'rejected' are the same",
        damage=file('\n\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n'),
    ),
    main(
        "source that is no text after blank lines",
        "--stage=identify --config.identify.pairs_jsonl={bad}",
        "bad.jsonl:3: field 'source' must be str",
        damage=file('\n\n{"prompt": "a", "chosen": "b", "rejected": "c", "source": [1]}\n'),
    ),
    main(
        "nothing to probe after blank lines",
        "--stage=probe --config.probe.feature=1 --config.probe.data_jsonl={bad}",
        "bad.jsonl:4: expected 'response', or 'chosen' and 'rejected'",
        damage=file('{"prompt": "a", "response": "b"}\n\n\n{"prompt": "a"}\n'),
    ),
    prompts(
        "conversation with a tool",
        '{"prompt": [{"role": "user", "content": "a"}]}\n'
        '{"prompt": [{"role": "tool", "content": "a"}]}\n',
        "bad.jsonl:2: field 'prompt'[0].role: expected system, user or assistant, found \"tool\"",
    ),
    prompts(
        "conversation that ends in an answer",
        '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
        "bad.jsonl:1: field 'prompt'[0].role: the last turn of a prompt must be 'user'",
    ),
    prompts("conversation of nothing", '{"prompt": []}\n', "bad.jsonl:1: field 'prompt' is empty"),
    main(
        "policy whose template refuses a conversation",
        "--policy_model={bad} --prompts_jsonl={world}/talks.jsonl",
        "talks.jsonl:9: the chat template of",
        "fails for the turns system, user (no system turns)",
        damage=template(NO_SYSTEM),
    ),
    *[
        main(
            f"SARM whose template refuses a conversation of {name}",
            f"--sarm_model={{bad}} {options.format('{world}/talks.jsonl')}",
            "talks.jsonl:9: the chat template of",
            "fails for the turns system, user (no system turns)",
            damage=template(NO_SYSTEM, part="sarm"),
        )
        for name, options in (
            ("train", "--prompts_jsonl={}"),
            ("train, held out", "--config.eval_prompts_jsonl={}"),
            ("human_latents", "--stage=human_latents --config.human_latents.demos_jsonl={}"),
            ("probe", "--stage=probe --config.probe.feature=1 --config.probe.data_jsonl={}"),
        )
    ],
    main(
        "policy whose template refuses a demonstration",
        "--stage=prepare_data --policy_model={bad} "
        "--config.prepare_data.demos_jsonl={world}/talks.jsonl",
        "talks.jsonl:9: the chat template of",
        damage=template(NO_SYSTEM),
    ),
    main(
        "demonstration without an answer",
        "--stage=human_latents --config.human_latents.demos_jsonl={bad}",
        "bad.jsonl:1: field 'messages'[0].role: the last turn must be 'assistant'",
        damage=file('{"messages": [{"role": "user", "content": "a"}]}\n'),
    ),
    *[
        main(
            f"pair of two conversations for {stage}",
            f"--stage={stage} --config.{stage}.pairs_jsonl={{bad}}",
            "bad.jsonl:1: fields 'chosen' and 'rejected' differ before their last turns",
            damage=file(
                '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content":'
                ' "b"}], "rejected": [{"role": "user", "content": "c"}, {"role": "assistant",'
                ' "content": "d"}]}\n'
            ),
        )
        for stage in ("identify", "train_sarm")
    ],
    main(
        "candidate of two messages",
        "--stage=probe --config.probe.feature=1 --config.probe.mode=bestofn "
        "--config.probe.data_jsonl={bad}",
        "bad.jsonl:1: field 'candidates'[1] must hold one assistant message, found 2",
        damage=file(
            '{"prompt": "a", "candidates": ["b", ['
            + ", ".join(['{"role": "assistant", "content": "c"}'] * 2)
            + "]]}\n"
        ),
    ),
    prompts("blank text", '{"prompt": "  "}\n', "bad.jsonl:1: field 'prompt' is empty"),
    prompts("no JSON", '{"prompt": "a"}\nnot json\n', "bad.jsonl:2", "'not json'"),
    prompts("not UTF-8", b'{"prompt": "\xff"}\n', "not UTF-8 (byte 12"),
    prompts("UTF-16", '{"prompt": "a"}\n'.encode("utf-16"), "not UTF-8 (byte 0"),
    prompts("byte order mark", '\ufeff{"prompt": "a"}\n', "bad.jsonl:1", "byte order mark"),
    prompts("byte 0 between", b'{"prompt": "a"}\x00\n', "bad.jsonl:1", "Extra data"),
    prompts("byte 0 within a text", b'{"prompt": "a\x00b"}\n', "bad.jsonl:1", "control character"),
    prompts("array for an object", '["prompt"]\n', "bad.jsonl:1: expected a JSON object"),
    prompts("one object for all lines", '{"data":\n[{"prompt": "a"}]}\n', "one JSON object"),
    prompts("key twice", '{"prompt": "a", "prompt": "b"}\n', "key 'prompt' appears twice"),
    prompts("NaN", '{"prompt": "a", "score": NaN}\n', "bad.jsonl:1", "NaN is not a number"),
    prompts("nesting bomb", '{"prompt": ' + "[" * 100_000, "bad.jsonl:1", "nested too deeply"),
    prompts("huge line without sense", "x" * (4 << 20), "bad.jsonl:1", "xxx"),
    prompts("huge number", '{"prompt": "a", "n": ' + "9" * 5000 + "}\n", "bad.jsonl:1"),
    prompts("half a surrogate pair", '{"prompt": "\\ud83d"}\n', "half of a surrogate pair"),
    prompts("two objects on a line", '{"prompt": "a"} {"prompt": "b"}\n', "Extra data"),
    prompts("single quotes", "{'prompt': 'a'}\n", "bad.jsonl:1", "double quotes"),
    prompts(
        "escape codes for a terminal",
        b'{"\\u001b[2J\\u001b]0;x\\u0007": "a"}\n',
        "bad.jsonl:1: field 'prompt' is missing",
    ),
]

STAGES = [
    main(
        "no demonstrations for pairs", "--stage=prepare_data", "prepare_data.demos_jsonl is empty"
    ),
    main("unknown source", "--stage=prepare_data --config.prepare_data.source=web", "source='web'"),
    main(
        "one demonstration",
        "--stage=prepare_data --config.prepare_data.demos_jsonl={bad}",
        "prepare_data.demos_jsonl={bad}: 1 row(s), at least 2",
        damage=file('{"prompt": "a", "response": "b"}\n'),
    ),
    main(
        "no samples",
        "--stage=prepare_data --config.prepare_data.samples_per_prompt=-1",
        "samples_per_prompt=-1",
    ),
    main("no pairs to train on", "--stage=train_sarm", "train_sarm.pairs_jsonl is empty"),
    main(
        "pairs file with no name",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl=a.jsonl,",
        "'a.jsonl,'",
    ),
    main(
        "pair of equals",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={bad}",
        "bad.jsonl:1: fields 'chosen' and 'rejected' are the same",
        damage=file('{"prompt": "a", "chosen": "b", "rejected": "b"}\n'),
    ),
    main(
        "tie of equals",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.tie_pairs_jsonl={bad}",
        "bad.jsonl:1: fields 'chosen' and 'rejected' are the same",
        damage=file('{"prompt": "a", "chosen": "b", "rejected": "b"}\n'),
    ),
    main(
        "ties file with no name",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.tie_pairs_jsonl=a.jsonl,",
        "'a.jsonl,'",
    ),
    main(
        "weight of ties without ties",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.tie_weight=2.0",
        "train_sarm.tie_weight=2.0: train_sarm.tie_pairs_jsonl names no ties",
    ),
    main(
        "SAE of a SARM that is not there",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.source_layer=2 --config.train_sarm.sae_model={world}/nothing",
        "train_sarm.sae_model={world}/nothing: ",
    ),
    main(
        "SAE of a policy",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.source_layer=2 "
        "--config.train_sarm.sae_model={world}/policy",
        "train_sarm.sae_model={world}/policy: ",
    ),
    *(
        main(
            f"SAE of another {name}",
            "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
            "--config.train_sarm.sae_model={world}/sarm --config.train_sarm.aux_k=8 "
            + " ".join(f"--config.train_sarm.{option}" for option in options.split()),
            f"train_sarm.sae_model={{world}}/sarm: {message}",
        )
        for name, options, message in (
            ("layer", "source_layer=1", "its SAE reads layer 2, expected train_sarm.source_layer="),
            ("size", "source_layer=2 latent_size=63 k=8", "its SAE has 64 latents, expected"),
            ("k", "source_layer=2 latent_size=64 k=7", "its SAE has k=8, expected train_sarm.k=7"),
            (
                "activation",
                "source_layer=2 latent_size=64 k=8 use_topk=False",
                "its head reads latents with use_topk=True, expected train_sarm.use_topk=False",
            ),
        )
    ),
    # Found before the first stage, identify or train_sarm, loads a weight.
    *(
        main(
            f"{name}, before the first stage",
            "--stage=all --config.identify.pairs_jsonl={world}/pairs.jsonl "
            + " ".join(f"--config.{option}" for option in options.split()),
            message,
        )
        for name, options, message in (
            (
                "a penalised feature that the SARM lacks",
                "reward.penalize_features=64 reward.tau_values=0 reward.alpha_values=1",
                "reward.penalize_features: feature 64 of a SARM with 64 latents",
            ),
            (
                "a latent of the KL that the SARM lacks",
                "reward.latent_indices=70 reward.beta=1 reward.human_latents={world}/demos.jsonl",
                "reward.latent_indices: feature 70 of a SARM with 64 latents",
            ),
            (
                "a probed feature that the SARM lacks",
                "probe.data_jsonl={world}/pairs.jsonl probe.feature=64",
                "probe.feature=64: the SARM has 64 latents, numbered from 0",
            ),
            (
                "an ensemble of one head",
                "reward.ensemble=min",
                "reward.ensemble='min': the reward model has one head",
            ),
            (
                "a trunk that is too deep",
                "train_sarm.pairs_jsonl={world}/pairs.jsonl train_sarm.source_layer=99",
                "train_sarm.source_layer=99: the model has 3 layers",
            ),
            (
                "an SAE of another layer",
                "train_sarm.pairs_jsonl={world}/pairs.jsonl train_sarm.source_layer=1 "
                "train_sarm.sae_model={world}/sarm",
                "its SAE reads layer 2, expected train_sarm.source_layer=1",
            ),
        )
    ),
    main(
        "several heads on a trunk that is trained",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.heads=4 --config.train_sarm.mode=2",
        "train_sarm.heads=4: train_sarm.mode=2 trains the trunk; several heads need mode=0",
    ),
    main(
        "no heads",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.heads=0 --config.train_sarm.mode=0",
        "train_sarm.heads=0: must be at least 1",
    ),
    main(
        "no pieces of a batch of pairs",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.gradient_accumulation_steps=0",
        "train_sarm.gradient_accumulation_steps=0: must be at least 1",
    ),
    main(
        "negative number of steps between checkpoints of train_sarm",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.checkpoint.train_sarm_every=-1",
        "checkpoint.train_sarm_every=-1: must not be negative",
    ),
    main(
        "pieces that do not divide a batch of pairs",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.gradient_accumulation_steps=3",
        "train_sarm.gradient_accumulation_steps=3 does not divide train_sarm.batch_size=16",
    ),
    main(
        "pieces that do not divide the pairs that there are",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.source_layer=1 "
        "--config.train_sarm.gradient_accumulation_steps=4",
        "train_sarm.gradient_accumulation_steps=4 does not divide train_sarm.batch_size=16, which "
        "6 training pairs cut to 6",
    ),
    main(
        "pieces of a batch for a head alone",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.mode=0 "
        "--config.train_sarm.gradient_accumulation_steps=2",
        "train_sarm.gradient_accumulation_steps=2: train_sarm.mode=0 trains the head on whole",
    ),
    main(
        "pairs that the mesh does not divide",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.batch_size=3 "
        "--config.mesh.data=4",
        "2 × train_sarm.batch_size / train_sarm.gradient_accumulation_steps = 6 rows do not divide "
        "over data × fsdp = 4 devices",
    ),
    main(
        "latents that the mesh does not divide",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.source_layer=1 "
        "--config.train_sarm.latent_size=1023 --config.mesh.tensor=2",
        "mesh.tensor=2 does not divide dimension 1 of sae.encoder, whose shape is (32, 1023)",
    ),
    main(
        "a mesh of too many devices for train_sarm",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.mesh.data=16",
        "mesh data=16 fsdp=1 tensor=1 takes 16 devices; there are 8",
    ),
    main(
        "negative weight of ties",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.tie_pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.tie_weight=-1.0",
        "train_sarm.tie_weight=-1.0: must be positive",
    ),
    main(
        "source that is no text",
        "--stage=identify --config.identify.pairs_jsonl={bad}",
        "bad.jsonl:1: field 'source' must be str",
        damage=file('{"prompt": "a", "chosen": "b", "rejected": "c", "source": [1]}\n'),
    ),
    main(
        "nothing held out",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.held_out_fraction=0.01",
        "holds out 0 of 8 prompts",
    ),
    main(
        "unknown mode",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.mode=4",
        "train_sarm.mode=4",
    ),
    main(
        "more kept than there are",
        "--stage=train_sarm --config.train_sarm.k=9 "
        "--config.train_sarm.latent_size=8 --config.train_sarm.aux_k=1 "
        "--config.train_sarm.pairs_jsonl={world}/pairs.jsonl",
        "train_sarm.k=9: must be at most train_sarm.latent_size=8",
    ),
    main(
        "layer the model does not have",
        "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_sarm.source_layer=4",
        "train_sarm.source_layer=4: the model has 3 layers",
    ),
    main(
        "trained already",
        "--stage=train_sarm --config.train_sarm.source_layer=1 "
        "--config.train_sarm.pairs_jsonl={world}/pairs.jsonl --workdir={world}",
        "sarm exists already: delete it",
    ),
    main("no pairs to identify on", "--stage=identify", "identify.pairs_jsonl is empty"),
    main(
        "no list",
        "--stage=identify --config.identify.top_k=0 "
        "--config.identify.pairs_jsonl={world}/pairs.jsonl",
        "identify.top_k=0",
    ),
    main(
        "unknown method",
        "--stage=identify --config.identify.method=luck "
        "--config.identify.pairs_jsonl={world}/pairs.jsonl",
        "identify.method='luck'",
    ),
    main(
        "quantile 1",
        "--stage=identify --config.identify.tau_quantile=1.0 "
        "--config.identify.pairs_jsonl={world}/pairs.jsonl",
        "identify.tau_quantile=1.0",
    ),
    main(
        "negative number of naming examples",
        "--stage=identify --config.identify.naming_examples=-1 "
        "--config.identify.pairs_jsonl={world}/pairs.jsonl",
        "identify.naming_examples=-1: must be at least 0",
    ),
    main("no feature to probe", "--stage=probe", "probe.feature is empty"),
    main(
        "no data to probe on", "--stage=probe --config.probe.feature=1", "probe.data_jsonl is empty"
    ),
    main(
        "probed feature no number",
        "--stage=probe --config.probe.feature=1,x",
        "probe.feature: found 'x'",
    ),
    main(
        "unknown probe",
        "--stage=probe --config.probe.feature=1 --config.probe.mode=all",
        "probe.mode='all'",
        "bestofn",
    ),
    main(
        "probed feature beyond the SARM",
        "--stage=probe --config.probe.feature=64 --config.probe.data_jsonl={world}/demos.jsonl",
        "probe.feature=64: the SARM has 64 latents",
    ),
    main(
        "best of no candidates",
        "--stage=probe --config.probe.feature=1 "
        "--config.probe.mode=bestofn --config.probe.data_jsonl={world}/demos.jsonl",
        "demos.jsonl:1: 'candidates' must list two or more",
    ),
    main(
        "feature set and bounded",
        f"{PROBE} --config.probe.set_value=0 --config.probe.min_value=1 --config.probe.max_value=2",
        "probe.set_value=0.0 and probe.min_value=1.0 and probe.max_value=2.0",
    ),
    main(
        "bounds the wrong way round",
        f"{PROBE} --config.probe.min_value=3 --config.probe.max_value=2",
        "probe.min_value=3.0 exceeds probe.max_value=2.0",
    ),
    main("value of NaN", f"{PROBE} --config.probe.set_value=nan", "probe.set_value=nan: must be"),
    main("bound of NaN", f"{PROBE} --config.probe.min_value=nan", "probe.min_value=nan: must be"),
    main("endless bound", f"{PROBE} --config.probe.max_value=inf", "probe.max_value=inf: must be"),
    main("bound beyond floats", f"{PROBE} --config.probe.max_value=1e39", "probe.max_value=1e+39"),
    main(
        "word for a bound",
        f"{PROBE} --config.probe.min_value=low",
        "probe.min_value=low: could not convert",
    ),
    main(
        "bound that is nearly one",
        "--config.probe.min_valu=1",
        "--config.probe.min_valu=1: no such option (did you mean --config.probe.min_value?)",
    ),
    main("rank 0", f"{PROBE} --config.probe.mode=bestofn --config.probe.rank=0", "probe.rank=0"),
    main("rank of pairs", f"{PROBE} --config.probe.rank=2", "probe.rank=2 with probe.mode=pairs"),
    main(
        "rank beyond the candidates",
        f"{PROBE} --config.probe.mode=bestofn --config.probe.rank=3 "
        "--config.probe.data_jsonl={bad}",
        "bad.jsonl:2: 'candidates' lists 2, fewer than probe.rank=3",
        damage=file(
            '{"prompt": "a", "candidates": ["b", "c", "d"]}\n'
            '{"prompt": "a", "candidates": ["b", "c"]}\n'
        ),
    ),
    main(
        "few flips",
        "--stage=probe --config.probe.feature=1 --config.probe.flips=9",
        "probe.flips=9",
    ),
    main(
        "no demonstrations for latents",
        "--stage=human_latents",
        "human_latents.demos_jsonl is empty",
    ),
    main(
        "latents beyond the SARM",
        "--stage=human_latents --latent_indices=3,64 "
        "--config.human_latents.demos_jsonl={world}/demos.jsonl",
        "reward.latent_indices: feature 64 of a SARM with 64",
    ),
    main(
        "plan of a stage that has none",
        f"{PLAN}=host --config.plan.stage=probe",
        "plan.stage='probe': expected one of train, train_sarm, identify",
    ),
    main(
        "plan of identify without pairs",
        f"{PLAN}=host --config.plan.stage=identify --config.plan.pairs=0",
        "plan.pairs=0: must be at least 1",
    ),
    main(
        "plan of identify without a reward model",
        f"{PLAN}=host --config.plan.stage=identify --sarm_model=",
        "sarm_model is empty",
    ),
    main(
        "plan of identify whose batch does not divide",
        f"{PLAN}=host --config.plan.stage=identify --config.sarm_batch_size=3 --config.mesh.data=2",
        "sarm_batch_size = 3 rows do not divide over data × fsdp = 2 devices",
    ),
    main(
        "plan of several experiments of none",
        f"{PLAN}=host --config.experiments_at_once=2",
        "experiments_at_once=2: the config has 0 experiments",
    ),
    main(
        "no condition at a time",
        f"{PLAN}=host --config.lab.conditions_at_once=0",
        "lab.conditions_at_once=0: must be at least 1",
    ),
    main(
        "plan of training without pairs",
        f"{PLAN}=host --config.plan.stage=train_sarm --config.plan.pairs=0",
        "plan.pairs=0: must be at least 1",
    ),
    main(
        "plan of training without a model",
        f"{PLAN}=host --config.plan.stage=train_sarm --policy_model=",
        "policy_model is empty",
    ),
    main(
        "plan of a layer the model does not have",
        f"{PLAN}=host --config.plan.stage=train_sarm --config.train_sarm.source_layer=4",
        "train_sarm.source_layer=4: the model has 3 layers",
    ),
    main(
        "plan of pairs that the mesh does not divide",
        f"{PLAN}=host --config.plan.stage=train_sarm --config.train_sarm.source_layer=1 "
        "--config.mesh.data=3",
        "/ train_sarm.gradient_accumulation_steps = 32 rows do not divide over data × fsdp = 3",
    ),
    main("unknown target", f"{PLAN}=tpu", "plan.target='tpu': expected host"),
    main(
        "unknown target of a search", f"{PLAN}=tpu --config.plan.search=True", "plan.target='tpu'"
    ),
    main("mesh smaller than the target", f"{PLAN}=h100x2", "the mesh takes 1 devices, not 2"),
    main(
        "plan of rows that cannot be split",
        "--stage=plan --config.mesh.data=3",
        "do not divide over data × fsdp = 3",
    ),
    *(
        main(
            f"prompt lengths: {name}",
            f"{PLAN}=host --config.plan.prompt_lengths={{bad}} {options}",
            "plan.prompt_lengths={bad}: ",
            *messages,
            damage=file(text, "lengths.json"),
        )
        for name, text, options, messages in (
            ("not JSON", "{'36': 1}", "", ("not JSON",)),
            ("not text", b"\xff\xfe", "", ("not JSON",)),
            ("empty file", "", "", ("not JSON",)),
            ("a list", "[36, 40]", "", ('{"tokens": prompts, …}', "found [36, 40]")),
            ("no counts", "{}", "", ("at least one length", "found {}")),
            ("negative", '{"-3": 1}', "", ("found length '-3', expected tokens",)),
            ("of no tokens", '{"0": 1}', "", ("found length '0'",)),
            ("a word", '{"long": 1}', "", ("found length 'long'",)),
            ("a fraction", '{"3.5": 1}', "", ("found length '3.5'",)),
            ("huge", f'{{"{"9" * 5000}": 1}}', "", ("found length '999",)),
            ("twice", '{"36": 1, "36": 2}', "", ("key '36' appears twice",)),
            ("negative count", '{"36": -1}', "", ("found -1 prompts of 36 tokens",)),
            ("count that is a word", '{"36": "1"}', "", ('found "1" prompts of 36 tokens',)),
            ("count that is a fraction", '{"36": 1.5}', "", ("found 1.5 prompts of 36",)),
            ("count that is true", '{"36": true}', "", ("found true prompts of 36",)),
            ("more than there are", '{"36": 99999999999999}', "", ("99,999,999,999,999 prompts",)),
            (
                "too long",
                '{"36": 9, "2000": 3}',
                "",
                (
                    "3 of 12 prompts have more than ppo.max_prompt_tokens=1024",
                    "longest 2000",
                    "ppo.long_prompts=drop",
                ),
            ),
            (
                "all dropped",
                '{"2000": 3}',
                "--config.ppo.long_prompts=drop",
                ("3 of 3 prompts", "leaves none"),
            ),
        )
    ),
    main(
        "no file of prompt lengths",
        f"{PLAN}=host --config.plan.prompt_lengths=gone.json",
        "plan.prompt_lengths=gone.json: cannot be read (No such file or directory)",
    ),
    main(
        "folder for a file of prompt lengths",
        f"{PLAN}=host --config.plan.prompt_lengths={{world}}/policy",
        "plan.prompt_lengths={world}/policy: is not a file",
    ),
    main("plan of no model", f"{PLAN}=host --policy_model=", "policy_model is empty"),
    main("seeds that are no numbers", f"{ALL} --config.lab.seeds=a", "lab.seeds=a: found 'a'"),
    main("too many seeds", f"{ALL} --config.lab.seeds=0-999999999999", "at most 1000"),
    main(
        "unknown condition",
        f"{ALL} --config.lab.conditions=none",
        "lab.conditions=none: found 'none'",
    ),
    main(
        "seed of the lab",
        "--stage=prepare_data --config.prepare_data.source=lab --config.lab.seed=-1",
        "lab.seed=-1",
    ),
    main(
        "unknown task of the lab",
        "--stage=prepare_data --config.prepare_data.source=lab --config.lab.task=poems",
        "lab.task='poems': expected capitals, animals, lists, words, or a Python file with TASK",
    ),
    main(
        "no file of a task",
        "--stage=prepare_data --config.prepare_data.source=lab --config.lab.task=gone.py",
        "lab.task=gone.py: no such file",
    ),
    main(
        "a task without a model",
        f"{WORDS} --config.lab.base_model=",
        "lab.base_model is empty",
    ),
    main(
        "unknown told shortcut of a task",
        f"{WORDS} --config.lab.told_shortcuts=flattery",
        "lab.told_shortcuts=flattery: found 'flattery', expected one of length",
    ),
    main(
        "more told shortcuts than there are",
        f"{WORDS} --config.lab.told_shortcuts=rotating:9",
        "lab.told_shortcuts=rotating:9: expected a number from 1 to 5",
    ),
    main(
        "told shortcuts counted in other digits",
        f"{WORDS} --config.lab.told_shortcuts=rotating:٣",
        "lab.told_shortcuts=rotating:٣: expected a number from 1 to 5",
    ),
    main(
        "told shortcuts of too many digits",
        f"{WORDS} --config.lab.told_shortcuts=rotating:{'9' * 5000}",
        "lab.told_shortcuts=rotating:999",
        "expected a number from 1 to 5",
    ),
    main(
        "an option of the world of capitals",
        f"{WORDS} --config.lab.corpus_rows=5",
        "lab.corpus_rows=5: lab.task=words does not read it",
    ),
    main(
        "the layer of a pretraining that there is not",
        f"{WORDS} --config.lab.tap_layer=5",
        "lab.tap_layer=5: lab.task=words does not read it",
    ),
    main(
        "an option of tasks in English",
        "--stage=prepare_data --config.prepare_data.source=lab --config.lab.prompts=5",
        "lab.prompts=5: lab.task=capitals does not read it",
    ),
    main("all labels are noise", f"{WORDS} --config.lab.label_noise=0.5", "lab.label_noise=0.5"),
    main("a negative bias", f"{WORDS} --config.lab.annotator_bias=-1", "lab.annotator_bias=-1"),
    main("a bias of capitals", f"{ALL} --config.lab.annotator_bias=0", "lab.annotator_bias=0"),
    main("a task without prompts", f"{WORDS} --config.lab.prompts=0", "lab.prompts=0"),
    main(
        "more prompts than a task has",
        f"{WORDS} --config.lab.prompts=5000",
        "lab.prompts=5000: with lab.held_out_prompts=64, 5064 prompts are needed; lab.task=words",
    ),
    main(
        "a study of no model",
        f"{ALL} --config.lab.task=words --config.lab.base_model=gone",
        "error: lab.base_model=gone: no such directory",
    ),
    main(
        "unknown source of data for all stages",
        "--stage=all --config.prepare_data.source=labs",
        "prepare_data.source='labs': expected demonstrations, lab or benchmarks",
    ),
    main(
        "a task without held-out prompts",
        f"{WORDS} --config.lab.held_out_prompts=0",
        "lab.held_out_prompts=0",
    ),
    main(
        "a negative number of slots",
        f"{WORDS} --config.lab.sampling_slots=-1",
        "lab.sampling_slots=-1",
    ),
    main(
        "no penalty of all features",
        f"{ALL} --config.lab.untold_alpha=0.0",
        "lab.untold_alpha=0.0",
    ),
    main("no cap", f"{ALL} --config.lab.untold_cap=-1.0", "lab.untold_cap=-1.0"),
    main("controls of a study", f"{ALL} --beta=1.0", "reward.beta=1.0", "lab.beta"),
    main(
        "a pool of one response",
        f"{ALL} --config.lab.pool_responses=1",
        "lab.pool_responses=1",
        "at least 2",
    ),
    main(
        "a pool without prompts",
        f"{ALL} --config.lab.pool_prompts=0",
        "lab.pool_prompts=0",
        "at least 1",
    ),
    main(
        "rankings without a pool",
        f"{ALL} --config.lab.ranked_conditions=probe",
        "lab.ranked_conditions=probe",
        "needs a pool",
    ),
    main(
        "a ranking that nobody knows",
        f"{ALL} --config.lab.pool_responses=4 --config.lab.ranked_conditions=x",
        "lab.ranked_conditions=x: found 'x'",
    ),
    main(
        "no penalty on a distance",
        f"{ALL} --config.lab.distance_penalty=0.0",
        "lab.distance_penalty=0.0",
        "positive",
    ),
    main(
        "a bounty on length",
        f"{ALL} --config.lab.length_penalty=-1.0",
        "lab.length_penalty=-1.0",
        "positive",
    ),
]

LABELS = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
SAE = {"hidden_size": 32, "latent_size": 64, "k": 8, "activation": "topk"}
OLD_SAE = {"hidden_size": 32, "latent_size": 64, "k": 8}  # before there were other activations
OTHER_SAES = {  # fields of an SAE → the message
    "hidden_size": (16, "sae.hidden_size=16: the states have 32 dimensions"),
    "latent_size": (63, "sae.encoder: shape [32, 64], expected [32, 63]"),
    "k": (65, "sae.k=65: exceeds latent_size=64"),
    "activation": ("gelu", "sae.activation='gelu': expected one of topk, topk_relu, jumprelu"),
    "threshold": (1, "threshold"),
}
REWARD_MODELS = [
    reward_model(
        "reward model with two labels",
        json_fields("classifier", "config.json", **dict.fromkeys(LABELS, ...), num_labels=2),
        "num_labels=2: expected 1",
    ),
    reward_model(
        "reward model whose labels have names",
        json_fields("classifier", "config.json", **LABELS),
        "id2label=",
        "expected one label",
    ),
    reward_model(
        "reward model of another architecture",
        json_fields("classifier", "config.json", architectures=["BertForSequenceClassification"]),
        "BertForSequenceClassification",
        "LlamaForSequenceClassification",
    ),
    reward_model(
        "reward model without a head",
        tensors("classifier", lambda t: t.pop("score.weight")),
        "score.weight: missing",
    ),
    BadInput(
        "policy converted as a reward model",
        "--kind=reward --src={world}/policy --dst={bad}/new",
        ("LlamaForCausalLM",),
        command="from_hf",
    ),
    *(
        main(
            f"classifier without an SAE in the place of a SARM, {name}",
            f"--sarm_model={{world}}/classifier {options}",
            "without an SAE",
            "--stage=train_sae",
        )
        for name, options in {
            "penalties": "--penalize_features=1 --tau_values=1 --alpha_values=1",
            "clamps": "--clamp_features=1 --clamp_set_values=1",
            "latent KL": "--beta=1 --human_latents={world}/demos.jsonl",
            "human latents": "--stage=human_latents "
            "--config.human_latents.demos_jsonl={world}/demos.jsonl",
        }.items()
    ),
    *(
        main(
            f"SAE of a reward model with another {name}",
            "--sarm_model={bad}",
            message,
            damage=json_fields("reward", "sarm_jax.json", config={"sae": SAE | {name: value}}),
        )
        for name, (value, message) in OTHER_SAES.items()
    ),
    main(
        "SAE of a reward model from an older version",
        "--sarm_model={bad}",
        "sae.use_topk=1: expected true or false",
        damage=json_fields("reward", "sarm_jax.json", config={"sae": OLD_SAE | {"use_topk": 1}}),
    ),
    main(
        "SAE of a reward model with thresholds",
        "--sarm_model={bad}",
        "sae.threshold: missing",
        damage=json_fields(
            "reward", "sarm_jax.json", config={"sae": SAE | {"activation": "jumprelu"}}
        ),
    ),
    main(
        "SAE of train_sae with thresholds",
        "--stage=train_sae --config.train_sae.model={world}/classifier "
        "--config.train_sae.responses_jsonl={world}/pairs.jsonl "
        "--config.train_sae.activation=jumprelu",
        "train_sae.activation=jumprelu: expected topk or topk_relu",
    ),
]

ROPE = "rope_parameters"
HF_CONFIG = [
    main("no model", "--policy_model=/no/such/model", "/no/such/model: no such directory"),
    main("no model's name", "--policy_model=", "policy_model is empty"),
    main("model with .. for an id", "--policy_model=../x/y", "../x/y: no such directory"),
    main("file for a model", "--policy_model={world}/demos.jsonl", "is a file, expected a model"),
    main("model with a name too long", f"--sarm_model={'z' * 5000}", "name too long"),
    main("SARM for a policy", "--policy_model={world}/sarm", "is a SARM"),
    main("policy for a SARM", "--sarm_model={world}/policy", "not a SARM"),
    policy("no config.json", without("policy", "config.json"), "holds weights, but no config.json"),
    policy("broken config.json", content("policy", "config.json", "{"), "config.json: not JSON"),
    policy("list for a config", content("policy", "config.json", "[]"), "found []"),
    policy(
        "nesting bomb for a config",
        content("policy", "config.json", '{"a":' * 100_000),
        "nested too deeply",
    ),
    policy(
        "config with a key twice",
        content("policy", "config.json", '{"a": 1, "a": 2}'),
        "key 'a' appears twice",
    ),
    *(
        policy(
            f"another architecture: {kind}",
            config(model_type=kind, architectures=[name]),
            f"model_type='{kind}' ({name}): only 'llama', 'mistral', 'qwen2' and 'qwen3'",
        )
        for kind, name in (
            ("gemma3_text", "Gemma3ForCausalLM"),
            ("mixtral", "MixtralForCausalLM"),
            ("qwen3_moe", "Qwen3MoeForCausalLM"),
        )
    ),
    policy(
        "two architectures",
        config(model_type="qwen2"),
        "architectures=['LlamaForCausalLM']: expected ['Qwen2ForCausalLM']",
    ),
    policy(
        "window shorter than the context",
        config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16),
        "ppo.max_new_tokens=",
        "exceeds the 16 positions (sliding_window) of",
    ),
    policy(
        "missing biases",
        config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "model.layers.0.self_attn.k_proj.bias: missing",
    ),
    policy(
        "missing norms of heads",
        config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
        "model.layers.0.self_attn.k_norm.weight: missing",
    ),
    policy(
        "unexpected bias",
        tensors("policy", lambda t: t.update({Q.replace("weight", "bias"): np.ones(32, "f4")})),
        "model.layers.0.self_attn.q_proj.bias: unexpected tensor",
    ),
    policy("another head size", config(head_dim=16), f"{Q}: shape [32, 32], expected [64, 32]"),
    policy("kind of layer", config(layer_types=["chunked_attention"] * 3), "layer_types[0]="),
    policy("too few kinds of layers", config(layer_types=["full_attention"]), "found 1 entries"),
    policy("classifier", config(architectures=["LlamaForSequenceClassification"]), "Sequence"),
    policy("number for architectures", config(architectures=3), "architectures=3"),
    policy("attention bias", config(attention_bias=True), "attention_bias=True: only False"),
    policy("another activation", config(hidden_act="gelu"), "hidden_act='gelu': only 'silu'"),
    policy("sliding window", config(sliding_window=4096), "sliding_window=4096: unknown field"),
    policy("quantised", config(quantization_config={"bits": 4}), "quantization_config"),
    policy("code of its own", config(auto_map={"AutoModel": "x.Y"}), "auto_map=", "unknown field"),
    policy("no vocabulary", config(vocab_size=0), "vocab_size=0: expected a positive integer"),
    policy("negative width", config(hidden_size=-32), "hidden_size=-32: expected a positive"),
    policy("text for a width", config(hidden_size="32"), "hidden_size='32': expected a positive"),
    policy("no width", config(hidden_size=...), "hidden_size=None: expected a positive integer"),
    policy("absurd width", config(hidden_size=10**30), "hidden_size=1000", "at most"),
    policy(
        "a billion layers", config(num_hidden_layers=10**9), "num_hidden_layers", "at most 4096"
    ),
    policy("ε beyond any float", config(rms_norm_eps=10**400), "rms_norm_eps=1000"),
    policy("ε not a number", config(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    policy("heads that do not fit", config(num_key_value_heads=3), "not a multiple of 3"),
    policy("odd head", config(head_dim=7), "head_dim=7: must be even"),
    policy("text for true", config(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
    policy("unknown rope", config(rope_parameters=[1]), "rope_parameters=[1]: expected an object"),
    policy(
        "unknown scaling",
        config(rope_parameters={"rope_type": "longrope", "factor": 4}),
        "rope_type='longrope': only 'default', 'linear', 'dynamic', 'llama3', 'yarn' are supported",
    ),
    policy(
        "yarn without its context",
        config(rope_parameters={"rope_type": "yarn", "factor": 4}),
        "original_max_position_embeddings=None",
    ),
    policy(
        "two ropes", config(rope_scaling={"rope_type": "linear"}), "contradicts rope_parameters"
    ),
    policy("two thetas", config(rope_theta=5.0), "rope_theta=5.0 contradicts"),
    policy(
        "rope without a factor",
        config(rope_parameters={**LLAMA3_ROPE, "factor": None}),
        "factor=None: expected a positive number",
    ),
    policy(
        "rope with its ends exchanged",
        config(rope_parameters={**LLAMA3_ROPE, "high_freq_factor": 1.0}),
        "must exceed",
    ),
    main(
        "more kept latents than there are",
        "--sarm_model={bad}",
        "sae_k=65: exceeds",
        damage=json_fields("sarm", "config.json", sarm_param={"sae_k": 65}),
    ),
    main(
        "absurd SAE",
        "--sarm_model={bad}",
        "sae_latent_size",
        "at most",
        damage=json_fields("sarm", "config.json", sarm_param={"sae_latent_size": 10**12}),
    ),
    main(
        "absurd number of heads",
        "--sarm_model={bad}",
        "sarm_heads",
        "at most",
        damage=json_fields("sarm", "config.json", sarm_param={"sarm_heads": 10**12}),
    ),
    main(
        "several heads with the weights of one",
        "--sarm_model={bad}",
        "score.weight: shape [1, 64]",
        damage=json_fields("sarm", "config.json", sarm_param={"sarm_heads": 4}),
    ),
    main(
        "SAE of another size",
        "--sarm_model={bad}",
        "sae.encoder.weight: shape [64, 32]",
        damage=json_fields("sarm", "config.json", sarm_param={"sae_latent_size": 63}),
    ),
    main(
        "SAE that does not say what it reads",
        "--sarm_model={bad}",
        "sarm_use_activation=1",
        damage=json_fields("sarm", "config.json", sarm_param={"sarm_use_activation": 1}),
    ),
    *REWARD_MODELS,
    main(
        "converted with a format of the future",
        "--policy_model={bad}",
        "format=2, expected 1",
        damage=json_fields("ours", "sarm_jax.json", format=2),
    ),
    main(
        "converted with half a config",
        "--policy_model={bad}",
        "config or hf_config is not",
        damage=json_fields("ours", "sarm_jax.json", config=[1]),
    ),
]

ONE_WORD = {"type": "WordLevel", "vocab": {"a": 262}, "unk_token": "a"}
TOKENIZER = [
    policy("no tokenizer", without("policy", "tokenizer.json"), "tokenizer.json is missing"),
    policy(
        "broken tokenizer",
        content("policy", "tokenizer.json", '{"model": 3}'),
        "the tokenizer cannot be read",
    ),
    policy(
        "no chat template",
        without("policy", "chat_template.jinja"),
        "has no chat template",
        "instruction-tuned",
    ),
    policy("template with bad syntax", template("{% for %}"), "chat template", "fails"),
    policy("template that asks for more", template("{{ nothing.there.at_all }}"), "fails"),
    policy("template that raises", template("{{ raise_exception('only system') }}"), "only system"),
    policy(
        "template that reaches into Python",
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "fails",
    ),
    policy(
        "template without a special token",
        template("{% for m in messages %}{{ m.role + m.content }}{% endfor %}"),
        "does not close the assistant's turn",
    ),
    policy("template without the response", template("{{ messages[0].content }}"), "leaves out"),
    policy(
        "template without a generation prompt",
        template("{% for m in messages %}{{ m.role + m.content }}<|eot_id|>{% endfor %}"),
        "has no generation prompt",
    ),
    main(
        "SARM whose template leaves the last turn open",
        "--sarm_model={bad}",
        "does not close the assistant's turn",
        damage=content(
            "sarm",
            "chat_template.jinja",
            "{% for m in messages %}{{ m.role + m.content }}"
            "{% if not loop.last %}<|eot_id|>{% endif %}{% endfor %}",
        ),
    ),
    policy(
        "more tokens than embeddings",
        content(
            "policy",
            "tokenizer.json",
            json.dumps({"version": "1.0", "added_tokens": [], "model": ONE_WORD}),
        ),
        "token 'a' has id 262",
        "embeds 262 tokens",
    ),
    policy(
        "end token beyond the vocabulary",
        json_fields("policy", "generation_config.json", eos_token_id=[262]),
        "eos_token_id=262",
    ),
    policy(
        "end token that is a list of lists",
        json_fields("policy", "generation_config.json", eos_token_id=[[1]]),
        "eos_token_id=[1]",
    ),
    main(
        "SARM without a chat template",
        "--sarm_model={bad}",
        "has no chat template",
        damage=without("sarm", "chat_template.jinja"),
    ),
    main(
        "SARM without a tokenizer",
        "--sarm_model={bad}",
        "tokenizer.json is missing",
        damage=without("sarm", "tokenizer.json"),
    ),
]

ONE = described("F32", [2], 0, 8)
SAFETENSORS = [
    policy("weights missing", without("policy", WEIGHTS), "neither model.safetensors nor"),
    policy("weights cut off", copied("policy", cut), "truncated or not safetensors"),
    policy("empty weights", weights(b""), "truncated or not safetensors"),
    policy("header longer than the file", weights(header({}, length=1 << 20)), "truncated"),
    policy("absurd header", weights(header({}, length=(1 << 63) - 1)), "truncated"),
    policy("header that is no JSON", weights(header(b"{]")), "truncated or not safetensors"),
    policy("header that is a list", weights(header([1])), "truncated or not safetensors"),
    policy("header that is not UTF-8", weights(header(b'{"\xff": 1}')), "truncated or not"),
    policy(
        "overlapping tensors",
        weights(header({"a": ONE, "b": described("F32", [2], 4, 12)}, bytes(12))),
        "truncated or not safetensors",
    ),
    policy(
        "offsets backwards",
        weights(header({"a": described("F32", [2], 8, 0)}, bytes(8))),
        "truncated or not safetensors",
    ),
    policy(
        "offsets beyond the file",
        weights(header({"a": described("F32", [2**40], 0, 2**42)})),
        "truncated or not safetensors",
    ),
    policy(
        "absurd shape",
        weights(header({"a": described("F32", [2**62, 2**62], 0, 8)}, bytes(8))),
        "truncated or not safetensors",
    ),
    policy(
        "negative shape",
        weights(header({"a": described("F32", [-2], 0, 8)}, bytes(8))),
        "truncated or not safetensors",
    ),
    policy(
        "unknown dtype",
        weights(header({"a": described("F77", [2], 0, 8)}, bytes(8))),
        "truncated or not safetensors",
    ),
    policy("tensors missing and surplus", weights(header({"a": ONE}, bytes(8))), "missing", "more"),
    policy(
        "tensor missing",
        tensors("policy", lambda t: t.pop("model.norm.weight")),
        "model.norm.weight: missing",
    ),
    policy(
        "bias",
        tensors("policy", lambda t: t.update({f"{Q[:-6]}bias": np.ones(32)})),
        "q_proj.bias: unexpected tensor",
    ),
    policy(
        "shape",
        tensors("policy", lambda t: t.update({Q: np.ones((32, 31), np.float32)})),
        f"{Q}: shape [32, 31], expected [32, 32]",
    ),
    policy(
        "integers",
        tensors("policy", lambda t: t.update({Q: np.ones((32, 32), np.int8)})),
        f"{Q}: dtype int8",
    ),
    main(
        "SARM without a head",
        "--sarm_model={bad}",
        "score.weight: missing",
        damage=tensors("sarm", lambda t: t.pop("score.weight")),
    ),
    policy(
        "pickled weights",
        pickled("policy", WEIGHTS, "pytorch_model.bin"),
        "pytorch_model.bin",
        "unpickling runs code",
        "safe_serialization=True",
    ),
    policy("pickled .pt", pickled("policy", WEIGHTS, "model.pt"), "model.pt", "unpickling"),
    policy(
        "shard missing",
        copied("sharded", lambda copy: next(copy.glob("model-00002*")).unlink()),
        "model-00002",
        "the shard is missing",
    ),
    policy(
        "tensor listed in another shard",
        indexed(lambda m: m.update(ghost=m[Q])),
        "ghost:",
        "which does not hold it",
    ),
    policy(
        "tensor not listed",
        indexed(lambda m: m.pop("model.norm.weight")),
        "model.norm.weight: stored in model-",
        f"missing from {INDEX}",
    ),
    policy("index of nothing", content("sharded", INDEX, "{}"), "weight_map is missing or empty"),
    policy("index that is a bomb", content("sharded", INDEX, "[" * 100_000), "nested too deeply"),
    policy(
        "shard above the directory",
        indexed(lambda m: m.update({Q: "../policy/" + WEIGHTS})),
        Q,
        "'../policy/model.safetensors'",
        "not the name of a safetensors file",
    ),
    policy(
        "shard with an absolute path",
        indexed(lambda m: m.update({Q: "/etc/passwd"})),
        Q,
        "'/etc/passwd'",
    ),
    policy("shard with a backslash", indexed(lambda m: m.update({Q: "..\\x.safetensors"})), Q),
    policy("shard with a byte 0", indexed(lambda m: m.update({Q: "x\0.safetensors"})), "x\\x00"),
    policy("shard that is pickled", indexed(lambda m: m.update({Q: "x.bin"})), Q, "'x.bin'"),
    policy("shard that is a number", indexed(lambda m: m.update({Q: 3})), Q, "3"),
    policy("shard linked out of the directory", shard_linked, "leads out of its directory", "copy"),
    policy("weights linked out of the directory", linked("policy", WEIGHTS), WEIGHTS, "leads out"),
    policy("config linked out of the directory", linked("policy", "config.json"), "leads out"),
]

ADAPTERS = [
    adapter("no adapter", lambda world, place: place, "no adapter there (expected adapter/"),
    adapter("another rank", json_fields("adapter", "adapter_config.json", r=3), "expected [3, "),
    adapter(
        "rank that is text",
        json_fields("adapter", "adapter_config.json", r="x"),
        "adapter_config.json",
    ),
    adapter(
        "unknown target",
        json_fields("adapter", "adapter_config.json", target_modules=["q_proj", "lm_head"]),
        "q_proj,lm_head",
    ),
    adapter(
        "targets that are text",
        json_fields("adapter", "adapter_config.json", target_modules="q_("),
        "target_modules: the expression 'q_('",
    ),
    adapter(
        "target without tensors",
        json_fields("adapter", "adapter_config.json", target_modules=["up_proj"]),
        "up_proj.lora_A.weight: missing",
    ),
    adapter(
        "infinite scale",
        json_fields("adapter", "adapter_config.json", lora_alpha=float("inf")),
        "lora.alpha=inf",
    ),
    adapter("DoRA", json_fields("adapter", "adapter_config.json", use_dora=True), "use_dora=True"),
    adapter("another kind", json_fields("adapter", "adapter_config.json", peft_type="IA3"), "IA3"),
    adapter(
        "rank pattern",
        json_fields("adapter", "adapter_config.json", rank_pattern={"q_proj": 0}),
        "rank_pattern.q_proj=0: expected a whole number",
    ),
    adapter(
        "saved modules",
        json_fields("adapter", "adapter_config.json", modules_to_save=["lm_head"]),
        "modules_to_save",
    ),
    adapter("tensor missing", tensors("adapter", lambda t: t.pop(A), ADAPTER), f"{A}: missing"),
    adapter(
        "tensor surplus",
        tensors("adapter", lambda t: t.update(x=np.ones(1)), ADAPTER),
        "x: unexpected tensor",
    ),
    adapter(
        "tensor of integers",
        tensors("adapter", lambda t: t.update({A: t[A].astype("int32")}), ADAPTER),
        f"{A}: dtype int32",
    ),
    adapter(
        "pickled adapter",
        pickled("adapter", ADAPTER, "adapter_model.bin"),
        "adapter_model.bin",
        "unpickling runs code",
    ),
    adapter("no weights", without("adapter", ADAPTER), "neither adapter_model.safetensors nor"),
    adapter("weights linked out of the directory", linked("adapter", ADAPTER), "leads out"),
    adapter("file linked out of the directory", linked("adapter", "tokenizer.json"), "leads out"),
    adapter("broken description", content("adapter", "adapter_config.json", "{"), "not JSON"),
]

Z = np.ones((4, 2), np.float32)
I = np.array([1, 2], np.int32)  # noqa: E741 (the indices)
HUMAN = [
    main(
        "no human latents",
        "--beta=0.5 --human_latents=nowhere.safetensors",
        "no such file",
        "--stage=human_latents",
    ),
    human("width", latents(z=Z, latent_indices=np.arange(3)), "z has shape (4, 2) for (3,)"),
    human("no rows", latents(z=Z[:0], latent_indices=I), "z has shape (0, 2)"),
    human("NaN", latents(z=Z * np.nan, latent_indices=I), "z: holds NaN"),
    human("integers", latents(z=Z.astype(int), latent_indices=I), "must hold floats, found int64"),
    human(
        "indices that are floats",
        latents(z=Z, latent_indices=I.astype(float)),
        "latent_indices must be distinct integers, found float64",
    ),
    human("index twice", latents(z=Z, latent_indices=I * 0), "must be distinct integers"),
    human(
        "index of another SARM",
        latents(z=Z, latent_indices=I + 90),
        "feature 91 of a SARM with 64 latents",
        "another SARM?",
    ),
    human("other tensors", latents(x=Z), "holds ['x'], expected z and latent_indices"),
    human("no safetensors", file("no", "human.safetensors"), "not a safetensors file"),
    human("pickled", file(b"\x80\x04", "human.pt"), "unpickling", "-m conversion.human_latents"),
    main(
        "feature that was not collected",
        "--beta=0.5 --human_latents={bad} --latent_indices=3",
        "feature 3 is not in the human latents",
        damage=latents(z=Z, latent_indices=I),
    ),
]

FILE_OF = {"probe": "--stage=train_probe", "human_states": "human_latents.states=True"}
PENALTY_OF = {"probe": "probe_penalty", "human_states": "distance_penalty"}
UNIT = np.eye(1, 32, dtype=np.float32)[0]
SPHERE = {
    "mean": 0 * UNIT,
    "axes": np.eye(3, 32, dtype=np.float32),
    "variance": np.ones(3, np.float32),
    "floor": np.ones(1, np.float32),
}
ALONG = {"direction": UNIT, "tau": np.zeros(1, np.float32)}


def state_file(field: str, name: str, *messages: str, **arrays: Any) -> BadInput:
    """A case in which `train` refuses the file of a term that reads the pooled state."""
    good = ALONG if field == "probe" else SPHERE
    tensors = {key: value for key, value in (good | arrays).items() if value is not ...}
    return BadInput(
        f"{field}: {name}",
        f"--config.reward.{field}={{bad}} --config.reward.{PENALTY_OF[field]}=0.5",
        messages=("reward." + field, *messages),
        damage=latents(**tensors),
    )


STATE_FILES = [
    *(
        main(
            f"{field}: no file",
            f"--config.reward.{field}=nowhere --config.reward.{PENALTY_OF[field]}=0.5",
            f"reward.{field}=nowhere: no such file",
            maker,
        )
        for field, maker in FILE_OF.items()
    ),
    *(
        main(
            f"{field}: no safetensors",
            f"--config.reward.{field}={{bad}} --config.reward.{PENALTY_OF[field]}=0.5",
            f"reward.{field}=",
            "not a safetensors file",
            damage=file("no", "bad.safetensors"),
        )
        for field in FILE_OF
    ),
    state_file("probe", "no τ", "holds ['direction'], expected ['direction', 'tau']", tau=...),
    state_file("probe", "more", "holds ['direction', 'more', 'tau']", more=UNIT),
    state_file(
        "probe",
        "integers",
        "direction must hold floats, found int64",
        direction=np.eye(1)[0].astype(int),
    ),
    state_file("probe", "rank", "direction has the shape (1, 32)", direction=UNIT[None]),
    state_file("probe", "no direction", "direction has the shape (0,)", direction=UNIT[:0]),
    state_file("probe", "NaN", "direction holds numbers that are not", direction=UNIT * np.nan),
    state_file("probe", "two τ", "tau has the shape (2,), expected (1,)", tau=UNIT[:2]),
    state_file("probe", "long direction", "direction has the length 2,", direction=2 * UNIT),
    state_file("probe", "other model", "16 dimensions for states of 32", direction=UNIT[:16]),
    state_file("human_states", "no floor", "expected ['axes', 'floor', 'mean'", floor=...),
    state_file("human_states", "shapes", "do not belong together", variance=UNIT[:1] + 1),
    state_file("human_states", "floor 0", "floor holds 0, expected positive", floor=UNIT[1:2]),
    state_file("human_states", "variance", "variance holds -1", variance=-SPHERE["variance"]),
    state_file("human_states", "long axes", "axes has a row of length", axes=2 * SPHERE["axes"]),
    state_file(
        "human_states",
        "other model",
        "states of 16 dimensions, the reward model's have 32",
        mean=UNIT[:16],
        axes=np.eye(3, 16, dtype=np.float32),
    ),
]
FURTHER = [
    main("negative probe penalty", "--config.reward.probe_penalty=-1", "reward.probe_penalty=-1.0"),
    main("no probe", "--config.reward.probe_penalty=1", "reward.probe_penalty=1.0 needs a probe"),
    main("negative distance", "--config.reward.distance_penalty=-1", "reward.distance_penalty=-1"),
    main("no states", "--config.reward.distance_penalty=1", "needs human states"),
    main("negative length", "--config.reward.length_penalty=-1", "reward.length_penalty=-1.0"),
    main("unknown bound", "--config.reward.bound=tanh", "reward.bound='tanh'", "sigmoid"),
    main("nothing to screen with", "--config.reward.screen=True", "reward.screen=True: needs"),
    main(
        "screen with penalties",
        "--config.reward.screen=True --penalize_features=1 --tau_values=1 --alpha_values=2",
        "reward.alpha_values=2.0: reward.screen=True",
    ),
    main(
        "screen with a probe's penalty",
        "--config.reward.screen=True --config.reward.probe=x --config.reward.probe_penalty=2",
        "reward.probe_penalty=2.0: reward.screen=True",
    ),
    main("no pairs for a probe", "--stage=train_probe", "identify.pairs_jsonl is empty"),
    main(
        "negative λ",
        "--stage=train_probe --config.identify.pairs_jsonl={world}/pairs.jsonl "
        "--config.train_probe.l2=0",
        "train_probe.l2=0.0: must be positive",
    ),
    main(
        "budget of a probe",
        "--stage=train_probe --config.identify.pairs_jsonl={world}/pairs.jsonl "
        "--config.identify.false_alarm_budget=1",
        "identify.false_alarm_budget=1.0",
    ),
    main(
        "probe on bad pairs",
        "--stage=train_probe --config.identify.pairs_jsonl={bad}",
        "bad.jsonl:1",
        damage=file("{}"),
    ),
    main(
        "states of one response",
        "--stage=human_latents --config.human_latents.states=True "
        "--config.human_latents.demos_jsonl={bad}",
        "human_latents.demos_jsonl=",
        "has 1 demonstrations: human_latents.states=True needs at least 3",
        damage=file('{"prompt": "a", "response": "b"}'),
    ),
]

STYLED = {"prompt": "p", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "chat"}
CHOICE = {"prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Math", "id": "1"}
ANSWERS = "data_jsonl={world}/answers.jsonl"
STEER = f"{ANSWERS} steering_json={{bad}}"


def rows(*originals: dict, **changes: Any) -> Damage:
    """Makes a JSON Lines file of rows with fields changed; `...` deletes a field."""
    changed = [{k: v for k, v in (row | changes).items() if v is not ...} for row in originals]
    return file("".join(json.dumps(row) + "\n" for row in changed))


BENCHMARKS = [
    bench("nothing", "num_example=0", "nothing to evaluate: name evaluate.data_jsonl"),
    bench(
        "negative number of examples",
        "rm_bench={world}/demos.jsonl num_example=-2",
        "evaluate.num_example=-2",
    ),
    bench("no such file", "rm_bench=none.json", "evaluate.rm_bench=none.json: no such file"),
    bench("address of something else", "rm_bench=https://x.y/z.json", "expected a path or hf://"),
    bench(
        "another benchmark",
        "rm_bench={bad}",
        "bad.jsonl:1: field 'chosen' has 1 texts",
        damage=rows(CHOICE),
    ),
    bench(
        "text for a list",
        "rm_bench={bad}",
        "bad.jsonl:1: field 'chosen' must be a list",
        damage=rows(STYLED, chosen="a"),
    ),
    bench(
        "no prompt", "rm_bench={bad}", "field 'prompt' is missing", damage=rows(STYLED, prompt=...)
    ),
    bench(
        "number for a domain",
        "rm_bench={bad}",
        "'domain' must be text",
        damage=rows(STYLED, domain=3),
    ),
    bench(
        "array with a number",
        "rm_bench={bad}",
        "bad.json: row 1: expected an object",
        damage=file("[1]", "bad.json"),
    ),
    bench(
        "broken array", "rm_bench={bad}", "bad.json:2: not JSON", damage=file("[\n1", "bad.json")
    ),
    bench(
        "array bomb", "rm_bench={bad}", "nested too deeply", damage=file("[" * 100_000, "bad.json")
    ),
    bench("no rows", "rewardbench2={bad}", "holds no rows", damage=file("[]", "bad.json")),
    bench(
        "object for rows",
        "rewardbench2={bad}",
        "bad.json:1: field 'chosen' is missing",
        damage=file("{}", "bad.json"),
    ),
    bench(
        "two right answers",
        "rewardbench2={bad}",
        "has 2 texts, expected 1",
        damage=rows(CHOICE, chosen=["a", "b"]),
    ),
    bench(
        "count that is wrong",
        "rewardbench2={bad}",
        "num_correct=2",
        damage=rows(CHOICE, num_correct=2),
    ),
    bench(
        "tie without a number",
        "rewardbench2={bad}",
        "expected ref:N or tied:N",
        damage=rows(CHOICE, subset="Ties"),
    ),
    bench(
        "tie without its other half",
        "rewardbench2={bad}",
        "evaluate.rewardbench2=",
        damage=rows(CHOICE, subset="Ties", id="ref:1"),
    ),
    bench(
        "no parquet",
        "rewardbench2={bad}",
        "bad.parquet: not parquet",
        damage=file(b"PAR1" + bytes(64) + b"PAR1", "bad.parquet"),
    ),
    bench(
        "parquet without a column",
        "rewardbench2={bad}",
        "row 1: field 'subset' is missing",
        damage=parquet([{"prompt": "p", "chosen": ["a"], "rejected": ["b"]}]),
    ),
    bench(
        "parquet of numbers",
        "rewardbench2={bad}",
        "row 1: field 'chosen' must be a list of",
        damage=parquet([CHOICE | {"chosen": [1]}]),
    ),
    bench(
        "parquet of bytes",
        "rewardbench2={bad}",
        "row 1: field 'prompt' must be text",
        damage=parquet([CHOICE | {"prompt": b"p"}]),
    ),
    bench("nothing steered", ANSWERS, "no feature is steered: give evaluate.steering_json"),
    bench(
        "no answers",
        "data_jsonl={world}/pairs.jsonl steering_json={world}/answers.jsonl",
        "pairs.jsonl:1: field 'answer' or 'response' is missing",
    ),
    bench("answers twice", f"{ANSWERS},{{world}}/answers.jsonl", "answers.jsonl is given twice"),
    bench("answers without a name", "data_jsonl=={world}/answers.jsonl", "expected FILE or NAME="),
    bench(
        "no steering file", f"{ANSWERS} steering_json=none.json", "steering_json=none.json: no such"
    ),
    bench(
        "steering beyond the SARM",
        STEER,
        "a.json: feature 640 does not exist",
        damage=file('{"640": ["*", 0]}', "a.json"),
    ),
    bench(
        "steering beyond any index",
        STEER,
        "expected a feature id",
        damage=file('{"%s": ["*", 0]}' % ("9" * 5000), "a.json"),
    ),
    bench(
        "steering by words",
        STEER,
        "feature 1: found ['set', 0]",
        "'*' or '+'",
        damage=file('{"1": ["set", 0]}', "a.json"),
    ),
    bench(
        "steering by NaN", STEER, "NaN is not a number", damage=file('{"1": ["+", NaN]}', "a.json")
    ),
    bench(
        "steering beyond floats",
        STEER,
        "feature 1: found",
        damage=file('{"1": ["+", 1%s]}' % ("0" * 400), "a.json"),
    ),
    bench(
        "steering twice",
        STEER,
        "key '1' appears twice",
        damage=file('{"1": ["+", 1], "1": ["+", 2]}', "a.json"),
    ),
    bench("steering list", STEER, "expected an object of features", damage=file("[1]", "a.json")),
    bench("steering in no text", STEER, "not JSON", damage=file(b"\xff", "a.json")),
    main(
        "no benchmark to prepare",
        "--stage=prepare_data --config.prepare_data.source=benchmarks",
        "name prepare_data.steering_dir",
    ),
    main(
        "benchmark of another kind",
        "--stage=prepare_data "
        "--config.prepare_data.source=benchmarks --config.prepare_data.rm_bench={bad}",
        "bad.jsonl:1: field 'chosen' has 1 texts",
        damage=rows(CHOICE),
    ),
    main(
        "everything held out",
        "--stage=prepare_data --config.prepare_data.source=benchmarks "
        "--config.prepare_data.rm_bench=x --config.prepare_data.held_out_fraction=1.0",
        "held_out_fraction=1.0",
    ),
    bench("prompts without a run", "prompts_jsonl={world}/demos.jsonl", "has no adapter"),
    bench("run without prompts", "runs={world}/adapter", "needs evaluate.prompts_jsonl"),
    bench(
        "no samples",
        "prompts_jsonl={world}/demos.jsonl runs={world}/adapter samples=0",
        "evaluate.samples=0",
    ),
    bench(
        "greedy samples",
        "prompts_jsonl={world}/demos.jsonl runs={world}/adapter samples=2",
        "greedy responses are all equal",
    ),
    bench(
        "few resamples",
        "prompts_jsonl={world}/demos.jsonl runs={world}/adapter resamples=9",
        "evaluate.resamples=9",
    ),
    bench(
        "run called as the base",
        "prompts_jsonl={world}/demos.jsonl runs=base={world}/adapter",
        "'base' has a meaning of its own",
    ),
    bench(
        "no human responses",
        "prompts_jsonl={world}/demos.jsonl runs={world}/adapter human_jsonl=none.jsonl",
        "evaluate.human_jsonl=none.jsonl: no such file",
    ),
]

# Every option that names rows, with `{bad}` for their file.
# Every stage that shows features, with `{bad}` for the file of their names.
NAMED_STAGES = {
    "train": "",
    "identify": "--stage=identify --config.identify.pairs_jsonl={world}/pairs.jsonl",
    "probe": f"{PROBE} --config.probe.data_jsonl={{world}}/pairs.jsonl",
    "evaluate": (
        "--stage=evaluate --config.evaluate.runs={world}/adapter "
        "--config.evaluate.prompts_jsonl={world}/demos.jsonl"
    ),
    "report": "--stage=report",
    "all stages": ALL,
}
NAME_DAMAGES = [
    ("no JSON", '{"1": "a"', "not JSON"),
    ("no latent", '{"flattery": "1"}', '"flattery": expected a feature id'),
    ("a number for a name", '{"1": 2}', "the name of feature 1 must be a text, found 2"),
    ("a latent twice", '{"1": "a", "01": "b"}', "feature 1 is named twice"),
    ("a latent that does not exist", '{"64": "a"}', "64: the reward model has 64 latents"),
]
NAMES = [
    main(
        f"names for {stage}: {name}",
        f"{options} --config.identify.feature_names={{bad}}",
        f"identify.feature_names={{bad}}: {message}",
        damage=file(content, "names.json"),
    )
    for stage, options in NAMED_STAGES.items()
    for name, content, message in NAME_DAMAGES
    if not (stage in ("report", "all stages") and "does not exist" in name)
]
NAMES += [
    main(
        f"no file of names for {stage}",
        f"{options} --config.identify.feature_names=none.json",
        "identify.feature_names=none.json",
    )
    for stage, options in NAMED_STAGES.items()
]

BENCHMARK_DATA = "--stage=prepare_data --config.prepare_data.source=benchmarks"
COMPARISON = "--stage=evaluate --config.evaluate.runs={world}/adapter"
ROW_OPTIONS = (
    "--prompts_jsonl={bad}",
    "--config.eval_prompts_jsonl={bad}",
    "--stage=prepare_data --config.prepare_data.demos_jsonl={bad}",
    f"{BENCHMARK_DATA} --config.prepare_data.rewardbench2={{bad}}",
    f"{BENCHMARK_DATA} --config.prepare_data.rm_bench={{bad}}",
    f"{BENCHMARK_DATA} --config.prepare_data.safety_pairs={{bad}}",
    f"{BENCHMARK_DATA} --config.prepare_data.complement_pairs={{bad}}",
    "--stage=train_sarm --config.train_sarm.pairs_jsonl={bad}",
    "--stage=identify --config.identify.pairs_jsonl={bad}",
    "--stage=identify --config.identify.pairs_jsonl={world}/pairs.jsonl "
    "--config.identify.verbosity_jsonl={bad}",
    "--stage=probe --config.probe.feature=1 --config.probe.data_jsonl={bad}",
    "--stage=human_latents --config.human_latents.demos_jsonl={bad}",
    "--stage=evaluate --config.evaluate.data_jsonl={bad}",
    "--stage=evaluate --config.evaluate.rm_bench={bad}",
    "--stage=evaluate --config.evaluate.rewardbench2={bad}",
    f"{COMPARISON} --config.evaluate.prompts_jsonl={{bad}}",
    f"{COMPARISON} --config.evaluate.prompts_jsonl={{world}}/demos.jsonl "
    "--config.evaluate.human_jsonl={bad}",
)
NO_FIELD = b'{"other": "x"}'
ROW_DAMAGES = (
    ("Parquet", parquet([{"other": "x"}]), ("bad.parquet: row 1: field ", " is missing")),
    ("JSON array", file(b"[" + NO_FIELD + b"]", "bad.json"), ("bad.json: row 1: field ",)),
    ("half of gzip", file(gzip.compress(NO_FIELD)[:-9], "bad.gz"), ("unpacked with gzip",)),
    ("zstd", file(zstd(NO_FIELD), "bad.jsonl.zst"), ("bad.jsonl.zst:1: field ",)),
)
ROW_FILES = [
    main(f"{name} for {options.split('.')[-1]}", options, *messages, damage=damage)
    for options in ROW_OPTIONS
    for name, damage, messages in ROW_DAMAGES
]
ROW_FILES += [
    main(
        f"model on the hub for {options.split('.')[-1]}",
        options.replace("{bad}", "hf://models/owner/name"),
        "hf://models/owner/name: expected a path or hf://datasets/OWNER/NAME",
    )
    for options in ROW_OPTIONS
]

REPORT = [
    main(name, f"--stage=report --config.report.{options}", *messages, damage=damage)
    for name, options, messages, damage in [
        ("negative samples", "samples=-1", ("report.samples=-1",), None),
        ("no such run", "runs={world}/none", ("none is not a directory",), None),
        ("no run in it", "runs={bad}", ("holds no run", "makes one"), nothing),
        ("no such metrics", "runs=x={bad}/x.csv", ("{bad}/x.csv: no such file",), nothing),
        (
            "metrics of several runs",
            "runs=x={bad}",
            ("holds the metrics of several runs (a_metrics.csv, b_metrics.csv)", "NAME={bad}/a_"),
            recordings("a", "b"),
        ),
        (
            "metrics of another program that are none",
            "runs={bad}/a_metrics.csv",
            ("a_metrics.csv:3: 1 cells for 2 columns",),
            recordings("a", text="step,gpu_memory_gb\n1,2\n3\n"),
        ),
        (
            "summary of another program that is none",
            "runs={bad}",
            ("a_summary.json: not JSON",),
            recordings("a", text="step,gpu_memory_gb\n1,2\n", summary="{"),
        ),
        ("two of a name", "runs={world}/run,{bad}", ("called 'run'", "NAME=DIR"), run_with()),
        ("nothing between commas", "runs={world}/run,,", ("found ''", "NAME=DIR"), None),
        ("no name before =", "runs={world}/run,={world}/run", ("expected DIR or NAME=DIR",), None),
        (
            "row too short",
            "runs={bad}",
            ("metrics.csv:2: 1 cells for 2",),
            run_with(metrics__csv="step,a\n1\n1,2\n"),
        ),
        (
            "word in a column",
            "runs={bad}",
            ("metrics.csv:2: column 'a' is 'high'",),
            run_with(metrics__csv="step,a\n1,high\n"),
        ),
        (
            "no header",
            "runs={bad}",
            ("metrics.csv:1: no column 'step'",),
            run_with(metrics__csv="\n1,2\n"),
        ),
        (
            "column twice",
            "runs={bad}",
            ("column 'a' appears twice",),
            run_with(metrics__csv="step,a,a\n1,2,3\n"),
        ),
        (
            "cell without an end",
            "runs={bad}",
            ("metrics.csv: not CSV (field larger",),
            run_with(metrics__csv='step,a\n1,"' + "x" * 200_000 + "\n"),
        ),
        (
            "sample with a word",
            "runs={bad}",
            ("samples.jsonl:1: field 'step' must be int",),
            run_with(samples__jsonl='{"step": "x"}\n'),
        ),
        ("broken options", "runs={bad}", ("config.json: not JSON",), run_with(config__json="{")),
        (
            "options bomb",
            "runs={bad}",
            ("nested too deeply",),
            run_with(config__json="[" * 100_000),
        ),
        (
            "list for a summary",
            "runs={bad}",
            ("summary.json: expected a JSON object, found [",),
            run_with(summary__json="[]"),
        ),
    ]
]

WORKDIRS = [
    main(
        "run of other options",
        "--workdir={bad}",
        "holds a run of another configuration",
        "choose another --workdir",
        damage=run_with(),
    ),
    main(
        "options that are a list",
        "--workdir={bad}",
        "config.json: expected the options of a run",
        damage=run_with(config__json="[1]"),
    ),
    main(
        "options that are broken",
        "--workdir={bad}",
        "config.json: not JSON",
        damage=run_with(config__json="{"),
    ),
]


TRAINED = (
    "--workdir=run --policy_model=policy --sarm_model=sarm --prompts_jsonl=demos.jsonl "
    "--config.ppo.max_prompt_tokens=120 --config.ppo.calibration_batches=1"
)
RECORDS = "stages.json", "config.json"  # without them, the checkpoint itself identifies its run


def nothing(place: Path) -> None:
    """Changes nothing."""


def checkpoint(name: str, damage: Damage, *messages: str, options: str = "") -> BadInput:
    """A case in which a run cannot resume from its checkpoint."""
    return main(name, f"{TRAINED} {options}", *messages, damage=damage)


OF_ANOTHER = "run/checkpoints/2: a checkpoint of another run: "
CHECKPOINTS = [
    checkpoint(
        "checkpoint of another rank",
        trained(nothing, *RECORDS),
        f"{OF_ANOTHER}lora.rank was 16 and is now 4; put this run's own back",
        options="--lora_r=4",
    ),
    checkpoint(
        "checkpoint of another seed",
        trained(nothing, *RECORDS),
        f"{OF_ANOTHER}ppo.seed was 0 and is now 1",
        options="--seed=1",
    ),
    checkpoint(
        "checkpoint of another reward",
        trained(nothing, *RECORDS),
        f"{OF_ANOTHER}reward.alpha_values was '' and is now '1,1'",
        options=PENALTY,
    ),
    checkpoint(
        "checkpoint of a wider model",
        trained(exchanged("policy", "wide"), *RECORDS),
        f"{OF_ANOTHER}policy/config.json has changed",
    ),
    checkpoint(
        "checkpoint of other weights",
        trained(doubled("policy/model.safetensors"), *RECORDS),
        f"{OF_ANOTHER}policy/model.safetensors has changed",
    ),
    checkpoint(
        "checkpoint of another SARM",
        trained(doubled("sarm/model.safetensors"), *RECORDS),
        f"{OF_ANOTHER}sarm/model.safetensors has changed",
    ),
    checkpoint(
        "checkpoint of other prompts",
        trained(lambda place: (place / "demos.jsonl").write_text('{"prompt": "a"}\n'), *RECORDS),
        f"{OF_ANOTHER}demos.jsonl has changed",
    ),
    checkpoint(
        "run of a wider model",
        trained(exchanged("policy", "wide")),
        "--workdir=run holds a run of another configuration: train: policy/config.json has changed",
    ),
    checkpoint(
        "run of other weights",
        trained(doubled("policy/model.safetensors")),
        "train: policy/model.safetensors has changed",
    ),
    checkpoint(
        "run of another rank",
        trained(nothing),
        "train: lora.rank was 16 and is now 4",
        options="--lora_r=4",
    ),
    checkpoint(
        "run of another rank without its record",
        trained(nothing, "stages.json"),
        f"{OF_ANOTHER}lora.rank was 16 and is now 4",
        options="--lora_r=4",
    ),
    checkpoint(
        "only checkpoint damaged",
        trained(flipped("state/**/*")),
        "run/checkpoints: no checkpoint is intact (2: state/",
        "has another SHA-256",
        "restore a copy of one",
    ),
    checkpoint(
        "facts of a checkpoint of another run",
        trained(flipped("facts/metadata")),
        "no checkpoint is intact (2: facts/metadata has another SHA-256",
    ),
    checkpoint(
        "manifest of a checkpoint missing",
        trained(lambda place: (place / "run/checkpoints/2/manifest/sha256.json").unlink()),
        "no checkpoint is intact (2: manifest/sha256.json is missing)",
    ),
]


def convert(name: str, options: str, *messages: str, damage: Damage | None = None) -> BadInput:
    return BadInput(name, options, messages=messages, damage=damage, command="from_hf")


def export(name: str, options: str, *messages: str, damage: Damage | None = None) -> BadInput:
    return BadInput(name, options, messages=messages, damage=damage, command="to_hf")


def sae_of(**fields: Any) -> Damage:
    """Makes an SAE in SAELens' format of states of 48 dimensions, with other `fields`."""

    def damage(world: Path, folder: Path) -> Path:
        place = folder / "bad"
        place.mkdir()
        shapes = {"W_enc": (48, 8), "W_dec": (8, 48), "b_enc": (8,), "b_dec": (48,)}
        arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        save_file(arrays, place / "sae_weights.safetensors")
        content = {"architecture": "topk", "k": 4, "d_in": 48, "d_sae": 8} | fields
        (place / "cfg.json").write_text(json.dumps(content))
        return place

    return damage


def imported(name: str, *messages: str, damage: Damage | None = None) -> BadInput:
    """A case in which `from_hf` refuses the SAE of a classifier."""
    options = f"--kind=reward --sae={{bad}} --src={{world}}/classifier {NEW}"
    return convert(name, options, *messages, damage=damage)


NEW = "--dst={world}/../new"
CONVERSION = [
    imported("SAE of another width", "--sae={bad}", "48 dimensions", "have 32", damage=sae_of()),
    imported(
        "SAE of another architecture",
        'cfg.json: architecture="gated": expected one of topk, jumprelu, standard',
        damage=sae_of(architecture="gated"),
    ),
    imported(
        "SAE of scaled states",
        'normalize_activations="layer_norm"',
        "depends on the state",
        damage=sae_of(normalize_activations="layer_norm"),
    ),
    imported(
        "SAE of another layer",
        'hook_name="blocks.3.hook_resid_post"',
        "after the final norm",
        damage=sae_of(metadata={"hook_name": "blocks.3.hook_resid_post"}),
    ),
    convert(
        "no SAE",
        f"--kind=reward --sae={{world}}/policy --src={{world}}/classifier {NEW}",
        "policy: no SAE in SAELens' format: cfg.json is missing",
    ),
    convert(
        "SAE for a policy",
        f"--kind=policy --sae={{world}}/policy --src={{world}}/policy {NEW}",
        "--sae=",
        "--kind=policy takes none",
    ),
    convert(
        "reward model converted for a policy",
        f"--kind=policy --src={{world}}/reward {NEW}",
        "kind='reward', expected 'policy'; is it the model of the other option?",
    ),
    export("SAE of a classifier", f"--kind=sae --src={{world}}/classifier {NEW}", "without an SAE"),
    export("SAE of a SARM", f"--kind=sae --src={{world}}/sarm {NEW}", "standardised states"),
    export("SAE that is signed", f"--kind=sae --src={{world}}/reward {NEW}", "may be negative"),
    export(
        "SAE that is merged", f"--kind=sae --merge --src={{world}}/reward {NEW}", "holds no adapter"
    ),
    convert("no kind", f"--src={{world}}/policy {NEW}", "--kind"),
    convert(
        "unknown kind",
        f"--kind=critic --src={{world}}/policy {NEW}",
        "critic",
        "policy|sarm|reward",
    ),
    convert("unknown dtype", f"--kind=policy --dtype=int4 --src={{world}}/policy {NEW}", "int4"),
    convert("unknown flag", f"--kind=policy --source={{world}}/policy {NEW}", "source"),
    convert("stray argument", f"--kind=policy --src=x {NEW} stray", "'stray'"),
    convert("no source", f"--kind=policy --src={{world}}/none {NEW}", "none: no such directory"),
    convert("policy for a SARM", f"--kind=sarm --src={{world}}/policy {NEW}", "not a SARM"),
    convert("SARM for a policy", f"--kind=policy --src={{world}}/sarm {NEW}", "is a SARM"),
    convert(
        "destination taken",
        "--kind=policy --src={world}/policy --dst={world}/sarm",
        "sarm: exists already",
        "name a new directory",
    ),
    convert(
        "destination within a file",
        "--kind=policy --src={world}/policy --dst={world}/demos.jsonl/x",
        "cannot be written",
    ),
    convert(
        "another architecture",
        f"--kind=policy --src={{bad}} {NEW}",
        "model_type='gpt2'",
        damage=config(model_type="gpt2"),
    ),
    convert(
        "tensor missing",
        f"--kind=policy --src={{bad}} {NEW}",
        "model.norm.weight: missing",
        damage=tensors("policy", lambda t: t.pop("model.norm.weight")),
    ),
    convert(
        "pickled",
        f"--kind=policy --src={{bad}} {NEW}",
        "unpickling runs code",
        damage=pickled("policy", WEIGHTS, "consolidated.00.pth"),
    ),
    convert(
        "weights linked out",
        f"--kind=policy --src={{bad}} {NEW}",
        "leads out",
        damage=linked("policy", WEIGHTS),
    ),
    convert(
        "template linked out",
        f"--kind=policy --src={{bad}} {NEW}",
        "leads out",
        damage=linked("policy", "chat_template.jinja"),
    ),
    export(
        "merge without an adapter",
        f"--merge --src={{world}}/policy {NEW}",
        "--merge",
        "holds no adapter",
    ),
    export("policy for a SARM", f"--kind=sarm --src={{world}}/policy {NEW}", "not a SARM"),
    export(
        "adapter without a base",
        f"--src={{bad}} {NEW}",
        "base_model_name_or_path=None",
        damage=json_fields("adapter", "adapter_config.json", base_model_name_or_path=...),
    ),
    export(
        "adapter with a base that is a list",
        f"--merge --src={{bad}} {NEW}",
        "base_model_name_or_path=['x']",
        damage=json_fields("adapter", "adapter_config.json", base_model_name_or_path=["x"]),
    ),
    export(
        "adapter of another model",
        f"--merge --src={{bad}} {NEW}",
        "expected [2, 32]",
        damage=tensors("adapter", lambda t: t.update({A: np.ones((2, 31), np.float32)}), ADAPTER),
    ),
    export(
        "adapter with a file linked out",
        f"--src={{bad}} {NEW}",
        "leads out",
        damage=linked("adapter", "tokenizer.json"),
    ),
    export(
        "pickled adapter",
        f"--src={{bad}} {NEW}",
        "unpickling runs code",
        damage=pickled("adapter", ADAPTER, "adapter_model.bin"),
    ),
    export("destination taken", "--src={world}/adapter --dst={world}/sarm", "exists already"),
]

BAD_INPUTS = [
    *FLAGS,
    *REWARD,
    *JSONL,
    *STAGES,
    *HF_CONFIG,
    *TOKENIZER,
    *SAFETENSORS,
    *ADAPTERS,
    *HUMAN,
    *STATE_FILES,
    *FURTHER,
    *BENCHMARKS,
    *ROW_FILES,
    *NAMES,
    *REPORT,
    *WORKDIRS,
    *CHECKPOINTS,
    *CONVERSION,
]
