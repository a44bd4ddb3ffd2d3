"""Load this project's exports with transformers 4, transformers 5 and the published SARM class.

    python -m benchmarks.reference_loader --workdir=DIR [--reference_code=DIR] [--python=FILE]

The benchmark writes small random models, whose config.json is in the dialect of transformers 4, of
transformers 5 or in both. From them it makes every kind of directory that this project writes:
merged policies, PEFT adapters, SARMs through from_hf and to_hf, trained SARMs, and policies of the
lab. Each is loaded with transformers 4.46, in its own environment or with --python, and with the
installed version. Logits, tokens and chat templates must equal what this project computes from the
sources.

`--reference_code` names a directory with the published modeling_sarm_llama.py, or with the files
sarm_llama.py and sae.py of the SARM repository. With it, that class scores the SARMs as well.
transformers loads it offline: from beside config.json if the source had it there, otherwise from a
cache with the layout of the hub's cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.transformers_consumer import tokenizer_facts
from conversion import from_hf, load_policy, load_sarm, to_hf
from conversion.directory import write_hf_json
from conversion.model_code import AUTO_CLASS, PUBLISHED
from conversion.peft import save_adapter
from sarm_jax.io.json_files import read_json
from sarm_jax.models.chat import DATE_STRING
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from tests import oracles

PACKAGES = ("transformers==4.46.*", "peft<0.15", "torch", "safetensors", "jinja2", "numpy<2.3")
ROPE = oracles.LLAMA3_ROPE | {"rope_theta": 123456.0}
DIALECTS = ("old", "new", "both")
TOLERANCE = 1e-5  # relative to the largest value
WIDTH = 300  # number of tokens whose logits are compared
CONVERSATIONS = [
    [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "well, héllo!"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "some  spaces , here ."}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "the end\n"},
     {"role": "assistant", "content": "hell the he"}],
]  # fmt: skip
# The repository's class takes these values as arguments; the published one reads the config.
ADAPTER = """\
from sarm_llama import LlamaSARM as _LlamaSARM


class LlamaSARM(_LlamaSARM):
    def __init__(self, config):
        param = config.sarm_param
        super().__init__(
            config,
            param["sae_source_layer"],
            param["sae_latent_size"],
            param["sae_k"],
            param["sae_use_sequence_level"],
            param["sarm_use_activation"],
        )
"""


def main() -> None:
    """Prints a line per directory and version; exits with 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="new or reused directory")
    parser.add_argument("--reference_code", type=Path, help="directory with the SARM class")
    parser.add_argument("--python", type=Path, help="interpreter with transformers 4.46")
    args = parser.parse_args()
    code = args.reference_code and find_code(parser, args.reference_code)
    args.workdir.mkdir(parents=True, exist_ok=True)
    models_dir = args.workdir / "models"
    shutil.rmtree(models_dir, ignore_errors=True)
    python = args.python or environment(args.workdir / "transformers4")
    jobs, expected, shared = write_all(models_dir, code)
    failures = 0
    for name, interpreter in (("4", python), ("5", Path(sys.executable))):
        selected = [n for n, job in enumerate(jobs) if name == "4" or job["kind"] != "sarm"]
        output = consume(
            args.workdir, interpreter, jobs=[jobs[n] for n in selected], shared=shared, code=code
        )
        for n, result in zip(selected, output["results"], strict=True):
            line, equal = compare(expected[n], result)
            failures += not equal
            path = Path(jobs[n]["path"]).relative_to(models_dir.resolve())
            print(f"transformers {output['transformers']}  {path}: {line}", flush=True)
    print(f"{failures} failures" if failures else "all equal")
    sys.exit(bool(failures))


def find_code(parser: argparse.ArgumentParser, directory: Path) -> Path:
    """Checks that the directory has one of the two forms of the class."""
    published, repository = directory / "modeling_sarm_llama.py", directory / "sarm_llama.py"
    if not published.is_file() and not repository.is_file():
        parser.error(
            f"--reference_code={directory}: holds neither modeling_sarm_llama.py nor sarm_llama.py"
        )
    return directory.resolve()


def environment(directory: Path) -> Path:
    """Makes a virtual environment with transformers 4.46 and returns its interpreter."""
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (directory / "complete").touch()
    return python


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a byte-level BPE with few merges and the ids of Llama-3.1's special tokens.

    The published class asserts that the scored token is 128009.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("t", "he"), ("Ġ", "the")]
    tokens = bytes_ + ["".join(pair) for pair in merges]
    tokens += [f"Ġfiller{n}" for n in range(128000 - len(tokens))]
    special = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
               7: "<|end_header_id|>", 9: "<|eot_id|>", 256: "[PAD]"}  # fmt: skip
    names = [special.get(n, f"<|reserved_special_token_{n}|>") for n in range(257)]
    vocab = {token: n for n, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    bos = (names[0], core.token_to_id(names[0]))
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=names[0],
        eos_token=names[9],
        pad_token=names[256],
        additional_special_tokens=[names[6], names[7]],
        chat_template=oracles.LLAMA3_TEMPLATE,
    )


def write_dialect(directory: Path, dialect: str) -> None:
    """Rewrites a config.json's rotary embedding: for transformers 4, for 5, or for both."""
    fields = read_json(directory / "config.json")
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.pop(name, None)
    scaling = {name: value for name, value in ROPE.items() if name != "rope_theta"}
    old = {"rope_theta": ROPE["rope_theta"], "rope_scaling": scaling}
    new = {"rope_parameters": ROPE}
    dtype = {"dtype" if dialect == "new" else "torch_dtype": "float32"}
    rope = {"old": old, "new": new, "both": old | new}[dialect]
    for name in ("dtype", "torch_dtype"):
        fields.pop(name, None)
    write_hf_json(directory / "config.json", fields | rope | dtype)


def write_all(root: Path, code: Path | None) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Writes every kind of directory; returns the consumer's jobs, our results, shared inputs."""
    root, tokenizer = root.resolve(), llama3_tokenizer()
    texts = ["hello there", "  the hell", "héé\n\n"]
    shared = {"date": DATE_STRING, "conversations": CONVERSATIONS, "texts": texts, "width": WIDTH}
    jobs: list[dict] = []
    expected: list[dict] = []
    for dialect in DIALECTS:
        folder = root / dialect
        results = write_sources(folder, dialect, tokenizer=tokenizer, shared=shared)
        for name, kind, result in write_policies(folder) + write_sarms(folder, code):
            kind = kind if code or kind != "sarm" else "tokenizer"
            jobs.append({"kind": kind, "path": str(folder / name)})
            expected.append({**results[result], "tokenizer": results["tokenizer"]})
    return jobs, expected, shared


def write_sources(
    root: Path, dialect: str, tokenizer: PreTrainedTokenizerFast, shared: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes policy, SARM and adapter in one dialect; returns what they compute and encode."""
    size = {"vocab_size": 128257, "rope_parameters": ROPE, "tie_word_embeddings": True}
    oracles.save_tiny_llama(root / "policy", oracles.tiny_llama_config(**size), tokenizer, seed=1)
    oracles.save_tiny_sarm(root / "sarm", tokenizer, **size)
    for name in ("policy", "sarm"):
        write_dialect(root / name, dialect)
    sarm = load_sarm(root / "sarm")
    rows = [sarm.encode(turns[-2]["content"], turns[-1]["content"]) for turns in CONVERSATIONS]
    shared["rows"] = rows
    to_hf.save_sarm(
        root / "trained",
        sarm.model,
        tokenizer=sarm.tokenizer,
        hf_config=read_json(root / "policy" / "config.json"),
    )
    policy, loaded = load_policy(root / "policy")
    results: dict[str, dict[str, Any]] = {"policy": {"logits": first_logits(policy, rows)}}
    to_hf.save_policy(root / "lab_policy", policy, loaded)
    lora = LoRAConfig(rank=4, alpha=8.0)
    add_lora(policy, lora, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        variable[...] = jnp.asarray(rng.normal(0, 0.2, variable.shape), jnp.float32)
    # The base is written by this project, since transformers 4 misreads the dialect "new".
    save_adapter(
        root / "run" / "adapter",
        policy,
        lora_config=lora,
        base_model=str(root / "policy_back"),
        tokenizer=loaded,
    )
    write_hf_json(root / "run" / "config.json", {"policy_model": str(root / "policy_back")})
    results["adapted"] = {"logits": first_logits(policy, rows)}
    results["sarm"] = {"scores": sarm.score_tokens(rows)[0].tolist()}
    return results | {"tokenizer": tokenizer_facts(str(root / "policy"), shared)}


def first_logits(policy: Llama, rows: list[list[int]]) -> np.ndarray:
    """Computes the logits of the first `WIDTH` tokens, the positions of all rows concatenated."""
    logits = [policy(np.asarray([row]), np.ones((1, len(row)), bool)) for row in rows]
    return np.concatenate([np.asarray(row)[0, :, :WIDTH] for row in logits])


def write_policies(root: Path) -> list[tuple[str, str, str]]:
    """Writes what is made from policy and adapter: (directory, kind, name of our result)."""
    from_hf.convert(root / "policy", root / "policy_converted", "policy")
    to_hf.export(root / "policy_converted", root / "policy_back")
    to_hf.export(root / "run", root / "adapter_export")
    to_hf.export(root / "run", root / "merged", merge=True)
    write_hf_json(root / "run" / "config.json", {"policy_model": str(root / "policy_converted")})
    to_hf.export(root / "run", root / "merged_converted", merge=True)
    return [
        ("lab_policy", "policy", "policy"),
        ("policy_back", "policy", "policy"),
        ("merged", "policy", "adapted"),
        ("merged_converted", "policy", "adapted"),
        ("run/adapter", "adapter", "adapted"),
        ("adapter_export", "adapter", "adapted"),
    ]


def write_sarms(root: Path, code: Path | None) -> list[tuple[str, str, str]]:
    """Writes what is made from the SARM: (directory, kind, name of our result)."""
    from_hf.convert(root / "sarm", root / "sarm_converted", "sarm")
    to_hf.export(root / "sarm_converted", root / "sarm_back", kind="sarm")
    written = [("trained", "sarm", "sarm"), ("sarm_back", "sarm", "sarm")]
    if code is not None:
        source = root / "sarm_with_code"
        shutil.copytree(root / "sarm", source)
        place_code(code, source)
        entry = {AUTO_CLASS: PUBLISHED.split("--")[1]}
        write_hf_json(
            source / "config.json", read_json(source / "config.json") | {"auto_map": entry}
        )
        from_hf.convert(source, root / "code_converted", "sarm")
        shutil.rmtree(source)  # so that the file must be in the converted directory
        to_hf.export(root / "code_converted", root / "code_back", kind="sarm")
        written.append(("code_back", "sarm", "sarm"))
    return written


def place_code(code: Path, directory: Path) -> None:
    """Copies the published module to `directory`, or writes one that adapts the repository's."""
    directory.mkdir(parents=True, exist_ok=True)
    if (code / "modeling_sarm_llama.py").is_file():
        for file in code.glob("*.py"):
            shutil.copyfile(file, directory / file.name)
    else:
        (directory / "modeling_sarm_llama.py").write_text(ADAPTER)


def consume(
    workdir: Path, python: Path, jobs: list[dict], shared: dict[str, Any], code: Path | None
) -> dict[str, Any]:
    """Runs the consumer offline, with a cache that contains the file of the published class."""
    home = workdir.resolve() / "hf_home"
    shutil.rmtree(home, ignore_errors=True)
    if code is not None:
        repository = PUBLISHED.split("--")[0].replace("/", "--")
        cached = home / "hub" / f"models--{repository}"
        place_code(code, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    jobs_path, results_path = workdir / "jobs.json", workdir / "results.json"
    write_hf_json(jobs_path, {"jobs": jobs, "shared": shared})
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code or "")}
    script = Path(__file__).with_name("transformers_consumer.py").resolve()
    command = [python, script, jobs_path, results_path]
    subprocess.run(command, env=os.environ | variables, check=True)
    return json.loads(results_path.read_text(encoding="utf-8"))


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, bool]:
    """Compares the results of a job: (a line that describes them, True if all are equal)."""
    if "error" in theirs:
        return theirs["error"], False
    facts, other_facts = ours["tokenizer"], theirs["tokenizer"]
    different = [name for name in facts if facts[name] != other_facts[name]]
    texts, equal = [f"tokens differ in {different}" if different else "tokens equal"], not different
    pairs = []
    if "logits" in theirs:
        pairs.append(("logits", ours["logits"], np.concatenate(theirs["logits"])))
    if "scores" in theirs:
        texts.append(f"{theirs['scores']['layers']} layers")
        for name in ("single", "batch"):
            pairs.append((name, np.asarray(ours["scores"]), np.asarray(theirs["scores"][name])))
    for name, mine, other in pairs:
        error = np.abs(mine - other).max() / np.abs(mine).max()
        texts.append(f"{name} {error:.1e}")
        equal &= bool(error < TOLERANCE)
    return ", ".join(texts), equal


if __name__ == "__main__":
    main()
