"""What a run says while it goes."""

import logging

from absl import logging as absl_logging


def show_progress(prefix: str = "", level: int = logging.INFO) -> None:
    """Shows this project's own messages from `level` on; of the libraries' only warnings."""
    line = f"%(asctime)s {prefix}%(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", force=True)
    for package in ("sarm_jax", "ppo", "configs", "conversion"):
        logging.getLogger(package).setLevel(level)
    absl_logging.set_verbosity(absl_logging.WARNING)
