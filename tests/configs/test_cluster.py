"""The scripts for clusters run the command of `make study` for one seed."""

import subprocess

import yaml

from tests.documented_commands import main_options
from tests.paths import ROOT

FOLDER = ROOT / "configs" / "cluster"


def expected(seed: int, workdir: str) -> list[str]:
    """Returns the arguments of `make study` for one seed in one process."""
    own = [f"--workdir={workdir}", f"--config.lab.seeds={seed}"]
    replaced = ("--workdir=", "--config.lab.seeds=", "--config.lab.processes=")
    others = [o for o in main_options("study") if not o.startswith(replaced)]
    return sorted([*others, *own])


def arguments(script: str, **variables: str) -> list[str]:
    """Returns the arguments that a shell gives the program in a script."""
    program = 'run() { shift "$1"; printf "%s\\n" "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", program + script], env=variables, capture_output=True, text=True, check=True
    )
    return sorted(done.stdout.splitlines())


def test_the_job_array_of_slurm():
    script = (FOLDER / "study.slurm").read_text()
    assert "#SBATCH --array=20-29\n" in script
    script = script.replace("srun .venv/bin/python", "run 2")
    assert arguments(script, SLURM_ARRAY_TASK_ID="23") == expected(23, "outputs/study")


def test_the_indexed_job_of_kubernetes():
    spec = yaml.safe_load((FOLDER / "study_job.yaml").read_text())["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == 10
    (container,) = spec["template"]["spec"]["containers"]
    (script,) = container["args"]
    script = script.replace("exec sarm-jax", "run 1")
    assert arguments(script, JOB_COMPLETION_INDEX="3") == expected(23, "/outputs/study")
