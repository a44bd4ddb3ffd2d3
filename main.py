"""Run one stage of an experiment; `pipeline/command.py` says how.

python main.py --config=configs/full_method.py [--stage=train] [--config.ppo.total_steps=20 …]
"""

from pipeline.command import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
