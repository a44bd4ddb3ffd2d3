"""The last line and the exit code of a process whose process 0 has died, or that aborts itself."""

import os
import signal
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.sarm_jax.parallel.test_processes import unused_port

pytestmark = pytest.mark.slow
# Process 0 dies, or waits for the other one, which is in a collective or computes alone.
SCRIPT = """
import os, sys, time
from functools import partial
from sarm_jax.io.progress import show_last_line
from sarm_jax.parallel import processes
from sarm_jax.parallel.lost_primary import on_lost_primary
from sarm_jax.parallel.processes import Hosts

address, number, event = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hosts = Hosts(address, 2, number)
processes.connect(hosts)
if number:
    on_lost_primary(hosts, partial(show_last_line, "error: lost"))
processes.all_max(number)
if event == "abort":
    time.sleep(600) if number == 0 else os.abort()
elif number == 0:
    os.kill(os.getpid(), 9)
elif event == "alone":
    time.sleep(600)
try:
    processes.all_max(number)
except (RuntimeError, ValueError) as error:
    assert processes.lost_peer(error), error
    show_last_line("error: lost")
    os._exit(2)
"""


@pytest.mark.parametrize(
    ("event", "code"), [("collective", 2), ("alone", 2), ("abort", -signal.SIGABRT)]
)
def test_the_loss_of_process_0_is_one_line_and_another_abort_is_one(event, code):
    address = f"localhost:{unused_port()}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(number), event],
            cwd=ROOT,
            env=os.environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    )
    errors = second.communicate(timeout=300)[1]
    first.kill()
    first.communicate()
    assert second.returncode == code, errors
    last_line = errors.strip().rpartition("\n")[2]
    assert (last_line == "error: lost") == (event != "abort"), errors
