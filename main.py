"""Runs one stage of an experiment.

    python main.py --config=configs/full_method.py [--stage=train] [--workdir=outputs/full_method]
                   [--config.ppo.total_steps=20 …] [--alpha_values=0.1,0.1 …]

Exit codes: 0 done; 2 bad input (one `error: …` line on stderr); 3 training stopped because
numbers became non-finite; 130 and 143 interrupted, after a checkpoint.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from configs import command_line
from conversion import load_policy, load_sarm
from conversion.load import read_policy_config, read_sarm_config
from conversion.peft import save_adapter
from conversion.to_hf import save_sarm
from ppo import options
from ppo.human_latents import collect_human_latents, save_human_latents
from ppo.prompts import read_prompts
from ppo.train import NonFiniteError, Trainer
from ppo.workdir import claim, prepare
from sarm_jax.errors import InputError
from sarm_jax.files import replacing
