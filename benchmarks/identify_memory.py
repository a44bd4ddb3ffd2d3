"""Measure time and memory of identify at full size on random codes, without a model.

    python -m benchmarks.identify_memory --pairs=100000 --latents=65536 --k=192

Every response has its own codes. Features fire with frequencies that fall like 1/rank, and a few
hundred planted features fire more often on the rejected side. A dense array of the same latents
would take 2 × pairs × latents × 4 bytes. Memory is the resident memory that Linux reports; its peak
is measured from the start of identify.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.process_memory import status_bytes
from sarm_jax.features.identify import IdentifyConfig, identify
from sarm_jax.models.latent_store import TopKLatents

GIB = 2**30
PLANTED = 300  # features that fire more often on the rejected side
WIDTH = 2048  # of a decoder row


def draw_codes(rows: int, latents: int, k: int, rng: np.random.Generator) -> TopKLatents:
    """Draws k distinct features per row; the second half of the rows are rejected responses."""
    weight_f = 1 / np.arange(10, latents + 10)
    cdf_f = np.cumsum(weight_f / weight_f.sum())
    index_nk = np.empty((rows, k), np.int32)
    for start in range(0, rows, 4096):
        chunk = index_nk[start : start + 4096]
        drawn = np.minimum(np.searchsorted(cdf_f, rng.random(chunk.shape)), latents - 1)
        drawn = np.sort(drawn, axis=1)
        # An unused feature replaces each repetition.
        repeated = np.zeros_like(drawn, bool)
        repeated[:, 1:] = drawn[:, 1:] == drawn[:, :-1]
        unused = latents - 1 - np.cumsum(repeated, axis=1)
        chunk[:] = np.where(repeated, unused, drawn)
    rejected = np.arange(rows // 2, rows)
    index_nk[rejected, 0] = rng.integers(latents // 2, latents // 2 + PLANTED, len(rejected))
    value_nk = rng.exponential(size=(rows, k)).astype(np.float32)
    return TopKLatents(value_nk, index_nk, latents)


def main() -> None:
    """Prints the seconds, and the peak of the memory beyond what is in use before identify."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    latents = draw_codes(2 * args.pairs, args.latents, k=args.k, rng=rng)
    sae = SimpleNamespace(decoder=rng.normal(size=(args.latents, WIDTH)).astype(np.float32))
    weight_f = rng.normal(size=args.latents).astype(np.float32)

    def store(prompts, responses, label):
        return np.zeros(len(prompts), np.float32), latents

    model = SimpleNamespace(model=SimpleNamespace(score=weight_f, sae=sae), store=store)
    pairs = [
        {"prompt": f"p{n // 2}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(args.pairs)
    ]
    config = IdentifyConfig(
        top_k=10, method="differential", tau_quantile=0.98, false_alarm_budget=0.05, seed=0
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _resident_gib("VmRSS"), time.perf_counter()
    features = identify(config, model, pairs)
    seconds, peak = time.perf_counter() - start, _resident_gib("VmHWM")
    planted = range(args.latents // 2, args.latents // 2 + PLANTED)
    hits = sum(i in planted for i in features.selected["safety_harming"])
    dense = 2 * args.pairs * args.latents * 4 / GIB
    print(
        f"{args.pairs} pairs, {args.latents} latents, k={args.k}: identify takes {seconds:.0f} s, "
        f"{peak - before:.2f} GiB beyond the {before:.2f} GiB of codes and decoder (dense latents: "
        f"{dense:.1f} GiB); {hits} of the 10 most harming are planted"
    )


def _resident_gib(field: str) -> float:
    """Returns the resident memory in GiB: VmRSS is the current value, VmHWM the peak."""
    return status_bytes(Path("/proc/self/status").read_text(), field) / GIB


if __name__ == "__main__":
    main()
