"""Logs a run to Weights & Biases. Its own files are in `wandb/` in the working directory.

W&B drops what is logged for an earlier step than before, and an evaluation and a step may have the
same number. Its own step therefore is the position of the entry, and charts have the column `step`
as their x axis.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo.tracking.trackers.tracker import Entry, flat_samples

FINISH_SECONDS = 300.0  # that the end of a run waits for uploads
WITHOUT_LOGIN = ("offline", "disabled", "dryrun")  # values of WANDB_MODE


class WandbRun:
    """A run of W&B, which is new or, if W&B has a run of this id, the same run again.

    The mode (`WANDB_MODE=offline`), the entity and the server are W&B's own settings.

    Args:
        workdir: the working directory.
        project: the project.
        name: the name that is shown.
        run_id: the id.
        options: all options, as the run's config.
    """

    def __init__(
        self, *, workdir: Path, project: str, name: str, run_id: str, options: Mapping[str, Any]
    ):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config=dict(options),
            # No source code, and nothing of the terminal, is uploaded.
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True, finish_timeout=FINISH_SECONDS
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, entry: Entry) -> None:
        """Logs an entry; samples are the table `samples`."""
        data: dict[str, Any] = {"step": entry.step, **entry.metrics}
        if rows := flat_samples(entry.samples):
            columns = list(rows[0])
            data["samples"] = self._table(columns=columns, data=[list(r.values()) for r in rows])
        self._run.log(data, step=entry.position, commit=True)

    def finish(self, failed: bool) -> None:
        """Uploads the rest, for `FINISH_SECONDS` at most; `wandb sync` uploads what is left."""
        self._run.finish(exit_code=int(failed))


def check_login() -> None:
    """Checks that W&B can be used: logs in, with a prompt if there is a terminal.

    Raises:
        Exception: one of W&B's errors; there is no valid API key, or the server does not answer.
    """
    import wandb

    if os.environ.get("WANDB_MODE") not in WITHOUT_LOGIN:
        wandb.login()
