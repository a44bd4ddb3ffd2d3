"""The curves of a run: reward and its terms, reference KL, response length and end of turn.

    python -m benchmarks.plot_run --workdir=outputs/smollm2 [--table]

Writes `figures/training.png` into the working directory; `--table` prints the first and the last
five steps as Markdown.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sarm_jax.metrics_csv import read_metrics

TABLE = (
    "step total_reward rm_score indicator_penalty kl_penalty ref_kl response_length_mean "
    "eos_fraction entropy approx_kl clip_fraction"
).split()


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Three panels over the steps."""

    def column(name):
        return [row[name] for row in rows]

    steps = column("step")
    figure, (reward, kl, length) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, label in (
        ("total_reward", "R_total"),
        ("rm_score", "R_SARM"),
        ("indicator_penalty", "penalty"),
        ("kl_penalty", "β · D"),
    ):
        reward.plot(steps, column(name), label=label, linewidth=2.2 if label == "R_total" else 1.2)
    reward.set(title="reward, reward-model units", xlabel="step")
    reward.legend()
    kl.plot(steps, column("ref_kl"), color="tab:red")
    kl.set(title="KL to the reference policy", xlabel="step", ylabel="nats per response")
    length.plot(steps, column("response_length_mean"), color="tab:gray")
    length.set(title="responses", xlabel="step", ylabel="mean length, tokens (grey)")
    ended = length.twinx()
    ended.plot(steps, column("eos_fraction"), color="tab:green")
    ended.set(ylim=(0, 1.02), ylabel="share that ended by itself (green)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws the figure, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    rows = read_metrics(args.workdir / "metrics.csv")
    plot(rows, args.workdir / "figures" / "training.png")
    if args.table:
        print("| " + " | ".join(TABLE) + " |")
        print("|" + "---|" * len(TABLE))
        for row in [*rows[:5], *rows[-5:]]:
            cells = [f"{row[name]:.3g}" for name in TABLE]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
