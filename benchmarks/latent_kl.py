"""Measure the bias of the latent KL on Gaussians, whose divergence is known.

    python -m benchmarks.latent_kl [--runs=16] [--steps=60]

Human latents are N rows of a standard normal distribution in 20 dimensions, the latents of a policy
are those of one whose mean is shifted, so that KL(policy ‖ human) is half the squared shift. Every
step of a run trains on fresh policy rows, as a step of PPO does. The estimates of the second half
of each run are averaged. The table compares them with the true value, and their deviation between
runs with the standard error that the estimator reports for a step. Runs differ in their human rows,
too.

Settings: rows of the buffer, responses per step, minibatches per step. The first is that of
`configs/verbosity_smollm2.py`.
"""

import argparse

import jax
import numpy as np

from sarm_jax.rewards.density_ratio import DensityRatio, DiscriminatorConfig

LATENTS = 20
DIVERGENCES = (0.0, 0.72, 0.9, 2.0)
SETTINGS = ((240, 16, 16), (240, 64, 16), (1000, 64, 16), (240, 64, 4))
HEADER = (
    "| human rows | responses a step | minibatches a step | KL | 1 discriminator | 4 folds "
    "| standard error of a step | deviation between runs |"
)


def estimates(
    config: DiscriminatorConfig, *, humans: int, responses: int, shifts: list[float], steps: int,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Returns the estimate and its standard error, in nats, of every step: `[shift, step, 2]`."""
    rng = np.random.default_rng(seed)
    human_ns = rng.normal(size=(humans, LATENTS)).astype(np.float32)
    ratio = DensityRatio(config, human_ns)
    values = np.zeros((len(shifts), steps, 2))
    for number, shift in enumerate(shifts):
        state = ratio.init(jax.random.key(seed))
        for step in range(steps):
            policy_bs = rng.normal(size=(responses, LATENTS)).astype(np.float32)
            policy_bs[:, 0] += shift
            state, d_b, metrics = ratio.update(state, policy_bs, jax.random.key(step))
            values[number, step] = d_b.mean(), metrics.get("latent_kl_se", 0.0)
    return values


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for each setting and divergence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=16, help="human buffers per setting")
    parser.add_argument("--steps", type=int, default=60, help="steps per run")
    options = parser.parse_args(arguments)
    shifts = [float(np.sqrt(2 * kl)) for kl in DIVERGENCES]
    print(HEADER)
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    for humans, responses, minibatches in SETTINGS:
        means = {}
        for folds in (1, 4):
            config = DiscriminatorConfig(steps=minibatches, folds=folds)
            runs = [
                estimates(
                    config,
                    humans=humans,
                    responses=responses,
                    shifts=shifts,
                    steps=options.steps,
                    seed=seed,
                )
                for seed in range(options.runs)
            ]
            means[folds] = np.stack(runs)[:, :, options.steps // 2 :].mean(axis=2)
        for number, kl in enumerate(DIVERGENCES):
            old, new = means[1][:, number, 0], means[4][:, number, 0]
            error = means[4][:, number, 1].mean()
            print(
                f"| {humans} | {responses} | {minibatches} | {kl:.2f} | {old.mean():.2f} | "
                f"{new.mean():.2f} | {error:.2f} | {new.std(ddof=1):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
