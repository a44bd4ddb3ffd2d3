"""What a run says while it goes."""

import functools
import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm

from sarm_jax.io.secrets import secrets, without_secrets

LOG = logging.getLogger(__name__)
OTHERS = ("transformers", "huggingface_hub")  # which bring handlers of their own


def show_progress(prefix: str = "", level: int = logging.INFO, everything: bool = True) -> None:
    """Shows this project's own messages from `level` on; of the libraries' only warnings.

    Of a process that only follows another, not `everything`: its errors, and no bars.
    No line shows a secret, whoever logs it: neither theirs, nor an error's that nobody expected.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutSecrets(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    for name in OTHERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    sys.excepthook = _unexpected
    for package in ("sarm_jax", "ppo", "configs", "conversion"):
        logging.getLogger(package).setLevel(level if everything else logging.ERROR)
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not everything:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record), secrets())


def _unexpected(kind, *error) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)
        return
    LOG.critical(
        "an error in the program: please report it with these lines; checkpoints and finished "
        "stages are kept, and the same command goes on from them",
        exc_info=(kind, *error),
    )
