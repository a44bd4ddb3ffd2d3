"""Kill every stage at random moments, run the same command again, and compare the results.

    python -m benchmarks.kill_campaign --workdir=outputs/kill_campaign [--seed=0] [--rounds=1]

The runs are a miniature of the lab, so that each takes seconds. First everything runs without
interruption, PPO twice, and the duration of every call of every place in the code is recorded. Then
SIGKILL is sent at a random moment within a random call of each place: three times to a PPO run
before it is left to finish. Every other stage is killed twice, at any moment. A kill is survived if
the results equal those of the uninterrupted run. For PPO they are LoRA, value head, discriminator
and every Adam moment of the last checkpoint, the adapter's files, metrics.csv and summary.json
except for times, samples.jsonl and evaluations.jsonl; for the other stages, their files. The exit
code is 1 unless every kill was survived.

The campaign takes about 20 minutes on two cores. The last line summarises it.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from ppo.tracking.manifest import check_manifest
from sarm_jax.io.jsonl import read_jsonl

KILLS_PER_RUN, KILLS_PER_STAGE = 3, 2
OPTIONS = (
    "lab.corpus_rows=300 lab.demonstrations=60 lab.pairs=200 lab.contrast_pairs=32 "
    "lab.pretraining_steps=40 lab.tuning_steps=20 train_sarm.sae_steps=30 train_sarm.epochs=3 "
    "train_sarm.latent_size=64 train_sarm.k=8 train_sarm.aux_k=8 ppo.total_steps=8 "
    "ppo.batch_size=16 ppo.eval_batches=1 ppo.eval_every=2 ppo.checkpoint_every=2 "
    "ppo.keep_checkpoints=2 reward.beta=0.1 lab.ignore_failed_gates=True "
    "probe.controls=2 probe.flips=99"
).split()
PLACES = "start rollout scoring update log evaluation checkpoint manifest export".split()
OUTPUTS = {  # files of the other stages, in the order of the pipeline
    "prepare_data": ("data", "policy", "pretrained"),
    "train_sarm": ("sarm", "sarm_summary.json", "sarm_metrics.jsonl"),
    "identify": tuple(
        f"probes/{name}"
        for name in "feature_analysis.json feature_scores.safetensors gates.json "
        "naming_prompts.jsonl steering_config.json selected_features.json".split()
    ),
    "human_latents": ("human_latents.safetensors",),
    "probe": ("probes/certificates.json", "probes/probe_summary.json"),
    "evaluate": ("eval/rm_bench.json",),
}
TIMES = {"timestamp", "time_rollout", "time_score", "time_update", "tokens_per_second"}
TIMES |= {"seconds", "seconds_per_step_median"}


class Campaign:
    """The directories and the counts of a campaign.

    Attributes:
        root: directory of the campaign; its folder `reference` is the uninterrupted PPO run.
        world: directory of the uninterrupted pipeline.
        seconds: stage → place → seconds of each call.
        tried: number of kills by place or stage.
        survived: number of survived kills by place or stage.
    """

    def __init__(self, root: Path, seed: int):
        self.root, self.world, self.random = root, root / "world", random.Random(seed)
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.tried: dict[str, int] = {}
        self.survived: dict[str, int] = {}

    def command(self, stage: str, workdir: Path) -> list[str]:
        """Returns the arguments of main.py."""
        options = [f"--config.{option}" for option in OPTIONS]
        if stage == "train":  # reads the inputs of the world but has its own working directory
            for field in ("policy_model", "sarm_model", "prompts_jsonl", "eval_prompts_jsonl"):
                path = {"policy_model": "policy", "sarm_model": "sarm"}.get(field)
                path = path or f"data/{'held_out_' * ('eval' in field)}prompts.jsonl"
                options.append(f"--config.{field}={self.world / path}")
            selected = f"@{self.world}/probes/selected_features.json"
            options += [
                f"--config.reward.human_latents={self.world / 'human_latents.safetensors'}",
                f"--config.lab.gates_json={self.world / 'probes/gates.json'}",
                f"--penalize_features={selected}:safety_harming[:2]",
                f"--tau_values={selected}:tau_harming[:2]",
                "--alpha_values=1,1",
            ]
        if stage == "evaluate":
            options.append(f"--config.evaluate.rm_bench={self.root / 'rm_bench.json'}")
        config = "--config=configs/demo.py"
        return [config, f"--stage={stage}", f"--workdir={workdir}", *options]

    def call(self, stage: str, workdir: Path, killed: Sequence[str] = ()) -> int:
        """Runs main.py and returns its exit code; `killed` are arguments of benchmarks.killed."""
        program = ["-m", "benchmarks.killed", *killed, "--"] if killed else ["main.py"]
        with (self.root / "log.txt").open("a", encoding="utf-8") as log:
            command = [sys.executable, *program, *self.command(stage, workdir)]
            print(f"$ {' '.join(command)}", file=log, flush=True)
            environment = {"TQDM_DISABLE": "1", **os.environ}
            return subprocess.call(command, stdout=log, stderr=log, env=environment)

    def record(self, stage: str, workdir: Path) -> None:
        """Runs a stage uninterrupted and records the seconds of its calls."""
        path = self.root / f"{stage}.json"
        if self.call(stage, workdir, [f"--record={path}"]) != 0:
            raise SystemExit(f"the uninterrupted stage {stage} failed: see {self.root / 'log.txt'}")
        self.seconds[stage] = json.loads(path.read_text(encoding="utf-8"))

    def prepare(self) -> None:
        """Runs the pipeline uninterrupted; copies the world before each stage."""
        self.world.mkdir(parents=True)
        for stage in OUTPUTS:
            shutil.copytree(self.world, self.root / f"before_{stage}")
            if stage == "evaluate":
                self.write_benchmark()
            self.record(stage, self.world)
        for name in ("reference", "again"):
            self.record("train", self.root / name)
        same = run_digest(self.root / "reference") == run_digest(self.root / "again")
        print(f"two uninterrupted PPO runs: {'equal' if same else 'DIFFERENT'}", flush=True)
        if not same:
            raise SystemExit(1)

    def write_benchmark(self) -> None:
        """Writes the lab's contrast pairs in the format of RM-Bench."""
        fields = {"prompt": str, "chosen": str, "rejected": str}
        pairs = read_jsonl(self.world / "data" / "contrast_single.jsonl", fields)[:16]
        rows = [
            {"prompt": p["prompt"], "domain": "chat"}
            | {side: [p[side]] * 3 for side in ("chosen", "rejected")}
            for p in pairs
        ]
        (self.root / "rm_bench.json").write_text(json.dumps(rows), encoding="utf-8")

    def moment(self, stage: str, place: str, resumed: bool) -> list[str]:
        """Draws a random moment, uniform over the time spent in a place.

        After a resumption the moment lies in the first call. Returns arguments of
        benchmarks.killed.
        """
        seconds = self.seconds[stage][place]
        index = 0 if resumed else self.random.choices(range(len(seconds)), seconds)[0]
        delay = self.random.uniform(0, seconds[index])
        return [f"--place={place}", f"--call={index + 1}", f"--delay={delay:.4f}"]

    def kill_training(self, place: str, name: str) -> None:
        """Kills a PPO run `KILLS_PER_RUN` times in a place, lets it finish, and compares it."""
        workdir, kills = self.root / name, 0
        while kills < KILLS_PER_RUN:
            code = self.call("train", workdir, self.moment("train", place, kills > 0))
            if code == 0:
                break
            kills += code == -9
            if code != -9:
                raise SystemExit(f"exit code {code}: see {self.root / 'log.txt'}")
        code = self.call("train", workdir)
        same = code == 0 and run_digest(workdir) == run_digest(self.root / "reference")
        self.count(f"train: {place}", kills, same)
        if same:
            shutil.rmtree(workdir)

    def kill_stage(self, stage: str, name: str) -> None:
        """Kills another stage once, runs it again, and compares its files."""
        workdir, code = self.root / name, 0
        path = self.root / f"{stage}.json"
        while code != -9:
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.copytree(self.root / f"before_{stage}", workdir)
            options = self.moment(stage, "stage", False)
            code = self.call_as_world(stage, workdir, [*options, f"--record={path}"])
            if code == 0:  # it ended before the signal, since its programs are compiled by now
                self.seconds[stage] = json.loads(path.read_text(encoding="utf-8"))
            elif code != -9:
                raise SystemExit(f"exit code {code}: see {self.root / 'log.txt'}")
        done = digest(workdir, OUTPUTS[stage]) == digest(self.world, OUTPUTS[stage])
        code = self.call_as_world(stage, workdir)
        # A stage that was killed after its last file refuses to overwrite its output: exit 2.
        same = digest(workdir, OUTPUTS[stage]) == digest(self.world, OUTPUTS[stage])
        self.count(stage, 1, same and (code == 0 or (code == 2 and done)))
        if same:
            shutil.rmtree(workdir)

    def call_as_world(self, stage: str, workdir: Path, killed: Sequence[str] = ()) -> int:
        """Runs a stage with `workdir` moved to the path of the world.

        Some outputs contain the paths of their inputs, which must not differ.
        """
        aside = self.root / "aside"
        self.world.rename(aside)
        workdir.rename(self.world)
        try:
            return self.call(stage, self.world, killed)
        finally:
            self.world.rename(workdir)
            aside.rename(self.world)

    def count(self, name: str, kills: int, survived: bool) -> None:
        """Adds kills to the counts and prints them."""
        self.tried[name] = self.tried.get(name, 0) + kills
        self.survived[name] = self.survived.get(name, 0) + kills * survived
        print(f"{name}: {kills} killed, {kills * survived} survived", flush=True)

    def result(self) -> str:
        """Summarises the campaign in one line."""
        tried, survived = sum(self.tried.values()), sum(self.survived.values())
        counts = ", ".join(f"{name} {kills}" for name, kills in self.tried.items())
        return f"{survived} of {tried} kills survived, bit for bit ({counts})"


def run_digest(workdir: Path) -> dict[str, str]:
    """Hashes all results of a PPO run except for times."""
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    check_manifest(last)
    state = ocp.StandardCheckpointer().restore((last / "state").absolute())
    hashes = {
        f"{last.name}.{name}": sha(np.ascontiguousarray(state[name]).tobytes()) for name in state
    }
    with (workdir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    hashes["metrics.csv"] = sha(json.dumps(rows).encode())
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in summary.items() if k not in TIMES}
    hashes["summary.json"] = sha(json.dumps(kept).encode())
    return hashes | digest(workdir, ("samples.jsonl", "evaluations.jsonl", "adapter"))


def digest(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Hashes the named files, and all files in the named directories, except for times in JSON."""
    hashes = {}
    for name in names:
        path = root / name
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
        for file in files or [path]:
            content = file.read_bytes() if file.is_file() else b"missing"
            if file.suffix == ".json" and file.is_file():
                content = json.dumps(without_times(json.loads(content))).encode()
            hashes[str(file.relative_to(root))] = sha(content)
    return hashes


def without_times(value):
    """Removes the keys in `TIMES` from a JSON value."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def sha(content: bytes) -> str:
    """Returns the SHA-256 hash."""
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    """Prints a line per run and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="outputs/kill_campaign", type=Path)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--rounds", default=1, type=int)
    args = parser.parse_args()
    root, start = args.workdir.absolute(), time.monotonic()
    if root.exists():
        raise SystemExit(f"--workdir={root}: exists already; name a new directory")
    campaign = Campaign(root, args.seed)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    campaign.prepare()
    for number in range(args.rounds):
        for place in PLACES:
            campaign.kill_training(place, f"train_{place}_{number}")
        for stage in OUTPUTS:
            for repeat in range(KILLS_PER_STAGE):
                campaign.kill_stage(stage, f"{stage}_{number}_{repeat}")
    print("| where | killed | survived |\n|---|---|---|")
    for name, kills in campaign.tried.items():
        print(f"| {name} | {kills} | {campaign.survived[name]} |")
    minutes = (time.monotonic() - start) / 60
    print(f"{campaign.result()}; seed {args.seed}, {minutes:.0f} minutes")
    return int(campaign.tried != campaign.survived)


if __name__ == "__main__":
    sys.exit(main())
