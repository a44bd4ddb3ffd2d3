"""Runs one stage of an experiment.

    python main.py --config=configs/full_method.py [--stage=train] [--workdir=outputs/full_method]
                   [--config.ppo.total_steps=20 …] [--alpha_values=0.1,0.1 …] [--log_level=info]
                   [--coordinator_address=host:port --num_processes=2 --process_id=0]

Exit codes: 0 done; 2 bad input, a full disk or no memory (one `error: …` line on stderr); 3
training stopped because numbers became non-finite, or by a guard; 130 and 143 interrupted, after a
checkpoint.
"""

import sys

from pipeline import cli as command_line
from pipeline import stages
from pipeline.runner import run_stage
from pipeline.shared import check_scoring
from ppo.tracking.guards import TrainingStoppedError
from sarm_jax.io.errors import InputError, out_of_memory
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.progress import show_progress
from sarm_jax.io.signals import leave, on_signal
from sarm_jax.io.workdir import open_workdir
from sarm_jax.parallel import processes
from sarm_jax.parallel.devices import exact_float32, set_memory_share

MEMORY_ADVICE = (
    "--stage=plan says what fits: remat=full, a larger mesh.fsdp or mesh.tensor, "
    "ppo.gradient_accumulation_steps, or a smaller ppo.batch_size or sarm_batch_size; what is not "
    "JAX's own memory needs a smaller XLA_CLIENT_MEM_FRACTION"
)


def main(argv: list[str]) -> int:
    """Parses, runs the stage, and turns errors into the exit code and one line."""
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__, command_line.usage(), sep="\n")
        return 0
    try:
        template, stage, workdir = command_line.parse(argv)
        show_progress(level=command_line.log_level())
        if stage not in (*stages.STAGES, "all"):
            raise InputError(f"--stage={stage}: expected all or one of {', '.join(stages.STAGES)}")
        check_scoring(template)
        set_memory_share()
        if template.dtype == "float32":
            exact_float32()
        hosts = command_line.hosts(stage)
        if hosts and template.experiments:
            raise InputError(f"--num_processes={hosts.count}: experiments run in one process")
        if hosts:
            show_progress(f"process {hosts.number}: ", command_line.log_level(), not hosts.number)
            processes.connect(hosts)
        with (
            on_signal(_interrupted),
            processes.place_to_write(workdir) as place,
            open_workdir(place),
        ):
            if stage == "all":
                stages.load("all").run(template, workdir)
            else:
                config = command_line.fill_in(template, workdir)
                run_stage(stage, config, place, command_line.shorthands())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.refuse(str(error))
        return 2
    except TrainingStoppedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        first = (str(error) or "out of memory").splitlines()[0]
        print(f"error: {InputError(first)}; {MEMORY_ADVICE}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk; a path that cannot be or must not be written
        advice = "; free space, and the same command goes on" if disk_is_full(error) else ""
        where = f"{error.filename or workdir}: {error.strerror or error}"
        print(f"error: {InputError(where)}{advice}", file=sys.stderr)
        return 2
    return 0


def _interrupted(number: int) -> None:
    """At a signal outside PPO's steps, which are finished and saved first."""
    print("interrupted; the same command goes on", file=sys.stderr)
    leave(128 + number)


if __name__ == "__main__":
    with processes.nobody_waits():
        sys.exit(main(sys.argv))
