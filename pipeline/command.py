"""Run one stage of an experiment.

    python main.py --config=configs/full_method.py [--stage=train] [--workdir=outputs/full_method]
                   [--config.ppo.total_steps=20 …] [--alpha_values=0.1,0.1 …] [--log_level=info]
                   [--coordinator_address=host:port --num_processes=2 --process_id=0]
    python main.py --help | --version

Exit codes: 0 done; 2 bad input, a full disk, no memory or a lost host (one `error: …` line on
stderr); 3 training was stopped by a guard, or because numbers became non-finite; 130 and 143
interrupted, after a checkpoint.
"""

import sys
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from pipeline import cli
from pipeline import stage as stages
from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError, TrainingStoppedError, first_line, out_of_memory
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.progress import show_last_line, show_progress
from sarm_jax.io.signals import exit_after_cleanup, on_signal
from sarm_jax.io.workdir import open_workdir
from sarm_jax.parallel import processes
from sarm_jax.parallel.devices import exact_float32, set_memory_share
from sarm_jax.parallel.lost_primary import on_lost_primary
from sarm_jax.version import VERSION

MEMORY_ADVICE = (
    "--stage=plan shows what fits: remat=full, a larger mesh.fsdp or mesh.tensor, "
    "ppo.gradient_accumulation_steps, or a smaller ppo.batch_size or sarm_batch_size; memory "
    "outside of JAX's own pool needs a smaller XLA_CLIENT_MEM_FRACTION"
)

LOST_PEER = (
    "another process of the run has ended, or cannot be reached; its last line may say why; run "
    "the same commands again on all hosts"
)


def main(argv: list[str]) -> int:
    """Parses the arguments, runs the stage, and turns errors into one line and the exit code."""
    secrets.collect()
    options = set(argv[1:])
    if options & {"--help", "-h"}:
        print(__doc__, cli.usage(), sep="\n")
        return 0
    if "--version" in options:
        print(f"sarm-jax {VERSION}")
        return 0
    workdir: Path | None = None
    try:
        template, stage, workdir = cli.parse(argv)
        _check(template, stage)
        set_up(template, stage)
        with on_signal(_interrupted), processes.primary_only(open_workdir(workdir)):
            _run(template, stage, workdir)
            processes.shut_down()
    except InputError as error:
        show_error(str(error))
        processes.raise_on_others(str(error))
        return 2
    except TrainingStoppedError as error:
        show_error(str(error))
        processes.shut_down()
        return 3
    except (MemoryError, RuntimeError, ValueError) as error:
        if processes.lost_peer(error):
            show_error(f"{LOST_PEER} ({first_line(error)})")
            return 2
        if not out_of_memory(error):
            raise
        line = (str(error) or "out of memory").splitlines()[0]
        show_error(f"{InputError(line)}; {MEMORY_ADVICE}")
        return 2
    except OSError as error:  # a full disk, or a path that cannot be written
        advice = "; free space and run the same command again" if disk_is_full(error) else ""
        message = f"{error.filename or workdir}: {error.strerror or error}"
        show_error(f"{InputError(message)}{advice}")
        return 2
    return 0


def run() -> None:
    """Runs this process's command line and exits with its code."""
    sys.argv = cli.with_installed_config(sys.argv)  # ml_collections reads overrides from there
    with processes.exit_without_barrier():
        sys.exit(main(sys.argv))


def set_up(template: ConfigDict, stage: str) -> None:
    """Sets up logging, devices and, if there are several processes, their connection."""
    show_progress(level=cli.log_level())
    set_memory_share()
    if template.dtype == "float32":
        exact_float32()
    hosts = cli.hosts(stage)
    if hosts and template.experiments:
        raise InputError(f"--num_processes={hosts.count}: experiments run in one process")
    if hosts and stage == "all" and template.prepare_data.source == "lab":
        raise InputError(f"--num_processes={hosts.count}: the lab's study runs in one process")
    if hosts:
        show_progress(f"process {hosts.number}: ", cli.log_level(), not hosts.number)
        processes.connect(hosts)
        if hosts.number:
            on_lost_primary(hosts, partial(show_error, f"{LOST_PEER} (process 0)"))


def show_error(message: str) -> None:
    """Prints the last line of a command that failed."""
    show_last_line(f"error: {message}")


def _check(template: ConfigDict, stage: str) -> None:
    # Imported here, since models take seconds to import and --help needs none.
    from pipeline.models import check_scoring

    if stage not in ("all", *stages.names()):
        raise InputError(f"--stage={stage}: expected all or one of {', '.join(stages.names())}")
    check_scoring(template)


def _run(template: ConfigDict, stage: str, workdir: Path) -> None:
    from pipeline import all_stages, runner

    if stage == "all":
        all_stages.run(template, workdir)
    else:
        runner.run_stage(stage, cli.fill_in(template, workdir), workdir, cli.shorthands())


def _interrupted(number: int) -> None:
    """Exits at a signal; PPO handles signals itself and saves a checkpoint first."""
    show_last_line("interrupted; the same command goes on")
    exit_after_cleanup(128 + number)
