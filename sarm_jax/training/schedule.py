"""The learning-rate schedule of the SAE, the SARM and the lab's language model."""

import optax


def warmup_cosine(peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """Makes a schedule with a linear warm-up and a cosine decay to 0.

    The first update of a warm-up has rate 0, so a warm-up of a single update is left out.

    Args:
        peak: the highest learning rate.
        warmup_fraction: share of the updates in which the rate rises.
        steps: number of updates.
    """
    warmup = round(warmup_fraction * steps)
    if warmup < 2:
        return optax.cosine_decay_schedule(peak, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
