"""Compile all programs of a step of `full_method` for every mesh of absent GPUs.

    pip install "jax[cuda12]"
    JAX_PLATFORMS=cpu python -m benchmarks.compile_meshes [--target=h100x4] [--pack_levels=2]

The models have the shapes of Llama-3.1-8B-Instruct and Llama-SARM-4B, but only two layers each,
since all layers are alike. This partitions and compiles kernels that only GPUs have, above all
cuDNN's attention, which the tests on virtual CPU devices cannot do.
"""

import argparse
import dataclasses
import sys

from configs import full_method
from conversion.keys import abstract_policy, abstract_sarm
from conversion.load import read_policy_config, read_sarm_config
from ppo.options import train_config
from ppo.planning.chips import target_devices
from ppo.planning.plan import Planner, layouts_for
from sarm_jax.io.errors import InputError

LAYERS, BATCH, PROMPT, WATCHED = 2, 8, 512, 8


def make_planner(target: str, pack_levels: int) -> Planner:
    """Makes the planner of `full_method` with two layers in either model."""
    config = full_method.get_config()
    config.ppo.batch_size, config.ppo.max_prompt_tokens = BATCH, PROMPT
    config.ppo.pack_levels = pack_levels
    options = train_config(config)
    policy = dataclasses.replace(
        read_policy_config(config.plan.policy_config), num_hidden_layers=LAYERS
    )
    sarm = read_sarm_config(config.plan.sarm_config)
    sarm = dataclasses.replace(
        sarm, trunk=dataclasses.replace(sarm.trunk, num_hidden_layers=LAYERS)
    )
    return Planner(
        name=target,
        config=options.ppo,
        lora=options.lora,
        policy=lambda: abstract_policy(policy, config.dtype),
        sarm=lambda: abstract_sarm(sarm, config.dtype),
        score_batch=config.sarm_batch_size,
        watched=WATCHED,
    )


def main() -> None:
    """Prints a line per layout; exits with 1 if a layout does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="h100x4")
    parser.add_argument("--pack_levels", type=int, default=0)
    args = parser.parse_args()
    planner, failed = make_planner(args.target, args.pack_levels), 0
    for layout in layouts_for(target_devices(args.target), BATCH):
        try:
            planner.plan(layout)
            outcome = "compiles"
        except InputError as error:
            outcome = f"does not fit these models: {error}"
        except Exception as error:  # the compiler raises many kinds of errors
            failed += 1
            outcome = "DOES NOT COMPILE: " + " ".join(str(error).split())[-400:]
        print(f"{layout}: {outcome}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
