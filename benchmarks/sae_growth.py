"""Measure how a step of SAE pretraining grows with the number of latents, in three implementations.

    python -m benchmarks.sae_growth --latents=4096,16384,65536 --tokens=128

    dense     TopK as a comparison with the k-th largest pre-activation; decoder product of z [B, M]
    ours      `sarm_jax.training.sae_training`: TopK as a scatter of k values; the same product
    sparse    the decoder product gathers k rows of the decoder a token, and its gradient adds to
              these rows; the encoder product and its gradient stay dense

All three have the same loss, gradient and Adam step (`tests/benchmarks/test_sae_growth.py`).
Temporaries are those that XLA plans for a step. Times are those of whole steps in turns; the state
is handed from one implementation to the next, so that it is in memory once (24 bytes a weight, and
the temporaries: 9 GiB for 65,536 latents of 4,096).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sarm_jax.models.sae import SAE, SAEConfig, reconstruction_loss
from sarm_jax.training import sae_training
from sarm_jax.training.sae_training import SAETraining, remove_parallel, unit_rows
from sarm_jax.training.schedule import warmup_cosine

GIB = 2**30
BLOCK = 8  # tokens whose decoder rows are gathered at a time


@jax.custom_vjp
def gather_decode(value_bk: jax.Array, index_bk: jax.Array, decoder_fd: jax.Array) -> jax.Array:
    """Computes Σ_k value · decoder row `[B, D]` without an array `[B, M]`."""

    def one(token):
        value_k, index_k = token
        return value_k @ decoder_fd[index_k]

    return jax.lax.map(one, (value_bk, index_bk), batch_size=BLOCK)


def _forward(value_bk, index_bk, decoder_fd):
    return gather_decode(value_bk, index_bk, decoder_fd), (value_bk, index_bk, decoder_fd)


def _backward(saved, g_bd):
    value_bk, index_bk, decoder_fd = saved

    def one(token):
        index_k, g_d = token
        return decoder_fd[index_k] @ g_d

    def add(gradient_fd, block):
        value_ck, index_ck, g_cd = block
        rows = value_ck[:, :, None] * g_cd[:, None]
        return gradient_fd.at[index_ck].add(rows), None

    value_gradient_bk = jax.lax.map(one, (index_bk, g_bd), batch_size=BLOCK)
    blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), (value_bk, index_bk, g_bd))
    gradient_fd, _ = jax.lax.scan(add, jnp.zeros_like(decoder_fd), blocks)
    return value_gradient_bk, None, gradient_fd


gather_decode.defvjp(_forward, _backward)


def ours(sae: SAE, x_bd: jax.Array, dead_f: jax.Array, options: SAETraining) -> jax.Array:
    """Computes the loss as the training does."""
    loss, _ = sae_training.sae_loss(sae, x_bd, dead_f=dead_f, options=options)
    return loss


def dense(sae: SAE, x_bd: jax.Array, dead_f: jax.Array, options: SAETraining) -> jax.Array:
    """Computes the loss with z as a product of the pre-activations and a mask."""

    def keep(a_bf, k):
        least_b1 = jax.lax.stop_gradient(jax.lax.top_k(a_bf, k)[0][:, -1:])
        return jnp.where(a_bf >= least_b1, a_bf, 0.0)

    a_bf = sae.pre_activations(x_bd)
    return _loss(
        sae,
        x_bd,
        dead_f=dead_f,
        options=options,
        decode=lambda a_bf, k, mask_f: keep(a_bf, k) * mask_f @ sae.decoder[...],
        a_bf=a_bf,
    )


def sparse(sae: SAE, x_bd: jax.Array, dead_f: jax.Array, options: SAETraining) -> jax.Array:
    """Computes the loss with decoder rows that are gathered."""

    def decode(a_bf, k, mask_f):
        value_bk, index_bk = jax.lax.top_k(a_bf, k)
        return gather_decode(value_bk * mask_f[index_bk], index_bk, sae.decoder[...])

    a_bf = sae.pre_activations(x_bd)
    return _loss(sae, x_bd, dead_f=dead_f, options=options, decode=decode, a_bf=a_bf)


def _loss(sae, x_bd, *, dead_f, options, decode, a_bf):
    """Computes the loss of `sae_training.sae_loss`, given a decoder of the k largest latents."""
    x_hat_bd = decode(a_bf, sae.config.k, jnp.ones(a_bf.shape[1])) + sae.pre_bias[...]
    residual_bd = jax.lax.stop_gradient(x_bd - x_hat_bd)

    def revive(a_bf):
        dead_bf = jnp.where(dead_f, a_bf, jnp.finfo(a_bf.dtype).min)
        e_hat_bd = decode(dead_bf, options.aux_k, dead_f.astype(jnp.float32))
        return reconstruction_loss(residual_bd, e_hat_bd).mean()

    auxiliary = jax.lax.cond(dead_f.any(), revive, lambda _: jnp.float32(0), a_bf)
    return reconstruction_loss(x_bd, x_hat_bd).mean() + options.aux_weight * auxiliary


@partial(jax.jit, static_argnames=("graphdef", "optimizer", "options", "loss"), donate_argnums=3)
def step(graphdef, optimizer, options, state, x_bd, dead_f, loss):
    """Makes one optimizer step, as `sae_training` does: (state, loss, norm of the gradient)."""
    params, opt_state = state

    def loss_fn(params):
        return loss(nnx.merge(graphdef, params), x_bd, dead_f, options)

    value, grads = jax.value_and_grad(loss_fn)(params)
    norm = optax.global_norm(grads)
    grads["decoder"] = jax.tree.map(remove_parallel, grads["decoder"], params["decoder"])
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    params["decoder"] = jax.tree.map(unit_rows, params["decoder"])
    return (params, opt_state), value, norm


IMPLEMENTATIONS: dict[str, Callable] = {"dense": dense, "ours": ours, "sparse": sparse}


def start(args: argparse.Namespace, latents: int) -> tuple[Any, Any, Any]:
    """Makes an SAE of random unit rows without further copies: (structure, optimizer, state)."""
    config = SAEConfig(args.width, latents, args.k)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: SAE(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    rows = np.random.default_rng(args.seed).standard_normal((latents, args.width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    params["decoder"] = jax.tree.map(lambda _: jnp.array(rows), params["decoder"])
    params["encoder"] = jax.tree.map(lambda _: jnp.array(rows.T), params["encoder"])
    optimizer = optax.adam(warmup_cosine(1e-4, 0.0, 1000))
    return graphdef, optimizer, (params, optimizer.init(params))


def grow(args: argparse.Namespace, latents: int) -> None:
    """Prints temporaries and seconds of the implementations for one number of latents."""
    graphdef, optimizer, state = start(args, latents)
    options = SAETraining(
        steps=1000, batch_tokens=args.tokens, learning_rate=1e-4, warmup_fraction=0.0,
        dead_after_steps=100, aux_k=min(256, latents), aux_weight=1 / 32, seed=args.seed,
    )  # fmt: skip
    rng = np.random.default_rng(args.seed)
    x_bd = rng.standard_normal((args.tokens, args.width), np.float32)
    dead_f = np.arange(latents) % 10 == 0 if args.dead else np.zeros(latents, bool)
    programs, seconds = {}, {name: [] for name in IMPLEMENTATIONS}
    for name, loss in IMPLEMENTATIONS.items():
        arguments = graphdef, optimizer, options, state, x_bd, dead_f
        programs[name] = step.lower(*arguments, loss=loss).compile()
        analysis: Any = programs[name].memory_analysis()
        print(
            f"{latents} latents, {name}: temporaries "
            f"{analysis.temp_size_in_bytes / GIB:.2f} GiB beside "
            f"{analysis.argument_size_in_bytes / GIB:.2f} GiB of weights and moments",
            flush=True,
        )
    for number in range(args.rounds + 1):
        for name, program in programs.items():
            before = time.perf_counter(), time.process_time()
            state, value, norm = jax.block_until_ready(program(state, x_bd, dead_f))
            wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
            if number:
                seconds[name].append((wall, cpu))
            print(
                f"{latents} latents, {name}: {wall:.2f} s, {cpu:.2f} s of CPU time, "
                f"loss {value:.5f}, norm of the gradient {norm:.5f}",
                flush=True,
            )
    for name, each in seconds.items():
        ratios = [
            statistics.median(x[c] / y[c] for x, y in zip(each, seconds["ours"], strict=True))
            for c in (0, 1)
        ]
        print(f"{latents} latents, {name}: {ratios[0]:.2f} × ours, CPU time {ratios[1]:.2f} × ours")


def main() -> None:
    """Prints the growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", default="4096,16384,65536")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dead", action="store_true", help="a tenth of the latents is dead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for latents in map(int, args.latents.split(",")):
        grow(args, latents)


if __name__ == "__main__":
    main()
