"""PPO with the compound reward, as one story: roll out → score → reward → update → log.

Every random choice is a function of (seed, step), so a run that is resumed from its newest
checkpoint goes on exactly as if it had never stopped.
"""

import dataclasses
import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from ppo.checkpoint import Checkpoints
from ppo.config import PPOConfig
from ppo.density_ratio import DensityRatio, DiscriminatorConfig
from ppo.human_latents import HumanLatents
from ppo.learner import Learner
from ppo.metrics import RunLog, read_metrics, summarise
from ppo.prompts import PromptDeck
from ppo.reward import RewardConfig, RewardTerms, ScoreScale, compound_reward
from ppo.update import Batch, Updater, batch_metrics
from sarm_jax.chat import pad_id
from sarm_jax.files import replacing
from sarm_jax.generate import Generation
from sarm_jax.llama import Llama
from sarm_jax.lora import LoRAConfig
from sarm_jax.reward_model import RewardModel

LOG = logging.getLogger(__name__)

RATIO_TOLERANCE = 1e-5


class NonFiniteError(RuntimeError):
    """Training stopped because an update was not finite; the last checkpoint is kept."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of the train stage, section by section."""

    ppo: PPOConfig
    lora: LoRAConfig
    reward: RewardConfig
    discriminator: DiscriminatorConfig


class Trainer:
    """A run in `workdir`. `human` is the buffer for the latent KL, None when β = 0."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Llama,
        tokenizer: Any,
        reward_model: RewardModel,
        deck: PromptDeck,
        human: HumanLatents | None,
        workdir: Path,
    ):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.reward_model, self.workdir = reward_model, workdir
        ppo, reward = config.ppo, config.reward
        reward.check_features(reward_model.model.config.sae.latent_size)
        self.deck = deck
        self.learner, self._fresh, self.base = Learner.attach(
            ppo, config.lora, policy, pad_id(tokenizer)
        )
        self.updater = Updater(self.learner)
        self.density_ratio = None
        subset: tuple[int, ...] = ()
        if human is not None:
            subset = human.latent_indices
            self.density_ratio = DensityRatio(config.discriminator, human.z_ns)
        # One gather per response: the penalised features first, then the discriminator's subset.
        self._watched = (*reward.penalize_features, *subset)
        self._clamp = reward.clamp(reward_model.model.config.sae.latent_size)
        self._stop_signal: int | None = None
        self.scale = ScoreScale(0.0, 1.0)

    def run(self) -> dict:
        """Trains to `total_steps` and returns the summary, which also stands in summary.json.

        Raises `NonFiniteError`, and SystemExit(128 + signal) after a SIGTERM or Ctrl-C.
        """
        config = self.config.ppo
        checkpoints = Checkpoints(self.workdir / "checkpoints", config.keep_checkpoints)
        state, done = self._start(checkpoints)
        features = self.config.reward.penalize_features
        with self._signals(), RunLog(self.workdir, features, done, config.total_steps) as log:
            for step in range(done, config.total_steps):
                state, row, samples = self._step(step, state)
                log.write(row, samples)
                finished = step + 1
                if finished % config.checkpoint_every == 0 or finished == config.total_steps:
                    checkpoints.save(finished, state, dataclasses.asdict(self.scale))
                if self._stop_signal is not None:
                    checkpoints.save(finished, state, dataclasses.asdict(self.scale))
                    LOG.info("stopped by signal %d after step %d", self._stop_signal, finished)
                    raise SystemExit(128 + self._stop_signal)
        checkpoints.close()
        self.state = state
        rows = read_metrics(self.workdir / "metrics.csv")
        summary = summarise(rows, self.scale.mean, self.scale.std)
        with replacing(self.workdir / "summary.json") as file:
            json.dump(summary, file, indent=2)
        return summary

    def _start(self, checkpoints: Checkpoints) -> tuple[dict, int]:
        """The state to go on from, and how many steps it has behind it."""
        keys = jax.random.split(jax.random.key(self.config.ppo.seed), 4)
        self._rollout_key, disc_key, calibration_key, self._disc_data_key = keys
        state: dict[str, Any] = {"train": self._fresh}
        if self.density_ratio is not None:
            state["density_ratio"] = self.density_ratio.init(disc_key)
        self._compile_scoring()
        if checkpoints.latest_step() is None:
            self.scale = self._calibrate(state["train"], calibration_key)
            return state, 0
        done, state, facts = checkpoints.restore(state)
        self.scale = ScoreScale(**facts)
        LOG.info("resuming after step %d of %d", done, self.config.ppo.total_steps)
        return state, done

    def _compile_scoring(self) -> None:
        """Compiles every padded length that scoring can meet, so that no step does."""
        rows = [self.reward_model.encode(prompt, "") for prompt in self.deck.prompts]
        longest = max(map(len, rows)) + self.config.ppo.max_new_tokens
        shortest = min(map(len, rows))
        self.reward_model.compile(
            shortest, longest, self.config.ppo.batch_size, self._clamp, self._watched
        )

    def _calibrate(self, train_state, key: jax.Array) -> ScoreScale:
        """μ and σ of the scores of the reference policy's own responses to the first prompts."""
        scores = []
        for batch in range(self.config.ppo.calibration_batches):
            texts, tokens_bp, mask_bp = self.deck.deal(batch, self.config.ppo.batch_size)
            batch_key = jax.random.fold_in(key, batch)
            generation = self.learner.rollout(
                train_state.params, self.base, tokens_bp, mask_bp, batch_key
            )
            score_b, _ = self.reward_model.score(
                texts, self._decode(generation), self._clamp, self._watched
            )
            scores.append(score_b)
        scale = ScoreScale.of(np.concatenate(scores))
        LOG.info("reference responses score %.4f ± %.4f", scale.mean, scale.std)
        return scale

    def _step(self, step: int, state: dict) -> tuple[dict, dict[str, float], list[dict]]:
        """One PPO step: (new state, a metrics row, samples to show)."""
        config = self.config.ppo
        clock = [time.perf_counter()]
        prompts, tokens_bp, mask_bp = self.deck.deal(step, config.batch_size)
        key = jax.random.fold_in(self._rollout_key, step)
        generation = self.learner.rollout(state["train"].params, self.base, tokens_bp, mask_bp, key)
        responses = self._decode(generation)
        clock.append(time.perf_counter())

        score_b, z_bn = self.reward_model.score(prompts, responses, self._clamp, self._watched)
        terms, disc_state, disc_metrics = self._reward(step, state, score_b, z_bn)
        ended_b = np.asarray(generation.ended_b)
        reward_b = self.scale.normalise(terms.total_b)
        reward_b = reward_b - np.float32(config.missing_eos_penalty) * ~ended_b
        clock.append(time.perf_counter())

        batch = self._batch(tokens_bp, mask_bp, generation, reward_b)
        order = np.random.default_rng((config.seed, step)).permuted(
            np.tile(np.arange(config.batch_size), (config.ppo_epochs, 1)), axis=1
        )
        train_state, targets, scalars = self.updater(state["train"], self.base, batch, order)
        scalars |= batch_metrics(batch, targets, generation.logp_br)
        metrics = {name: float(value) for name, value in jax.device_get(scalars).items()}
        clock.append(time.perf_counter())

        if not metrics.pop("finite"):
            self._dump(step, prompts, responses, batch, metrics)
        if metrics["ratio_0_max_dev"] > RATIO_TOLERANCE:
            LOG.warning("step %d: ratio_0_max_dev=%.2e", step, metrics["ratio_0_max_dev"])
        row = self._row(step, clock, generation, terms, z_bn, reward_b)
        row |= metrics | {name: float(value) for name, value in disc_metrics.items()}
        new_state = {"train": train_state} | disc_state
        return new_state, row, self._samples(step, prompts, responses, terms)

    def _decode(self, generation: Generation) -> list[str]:
        """Response texts, without special tokens."""
        tokens_br, mask_br = jax.device_get((generation.tokens_br, generation.mask_br))
        rows = [tokens[mask] for tokens, mask in zip(tokens_br, mask_br, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _reward(self, step, state, score_b, z_bn) -> tuple[RewardTerms, dict, dict]:
        """The reward's terms; the discriminator is stepped on this batch before it is read."""
        reward = self.config.reward
        split = len(reward.penalize_features)
        ratio_b, disc_state, metrics = np.zeros_like(score_b), {}, {}
        if self.density_ratio is not None:
            key = jax.random.fold_in(self._disc_data_key, step)
            new, ratio, metrics = self.density_ratio.update(
                state["density_ratio"], jnp.asarray(z_bn[:, split:]), key
            )
            ratio_b, disc_state = np.asarray(ratio), {"density_ratio": new}
        terms = compound_reward(reward, score_b, z_bn[:, :split], ratio_b, self.scale.std)
        return terms, disc_state, metrics

    def _batch(self, tokens_bp, mask_bp, generation: Generation, reward_b) -> Batch:
        tokens_bt = jnp.concatenate([jnp.asarray(tokens_bp), generation.tokens_br], axis=1)
        mask_bt = jnp.concatenate([jnp.asarray(mask_bp), generation.mask_br], axis=1)
        ref_logp_br = self.learner.reference_logp(self.base, tokens_bt, mask_bt)
        return Batch(tokens_bt, mask_bt, generation.mask_br, ref_logp_br, jnp.asarray(reward_b))

    def _row(self, step, clock, generation, terms, z_bn, reward_b) -> dict[str, float]:
        lengths_b = np.asarray(generation.mask_br).sum(axis=1)
        row = {
            "step": step,
            "timestamp": time.time(),
            "total_reward": terms.total_b.mean(),
            "rm_score": terms.rm_score_b.mean(),
            "indicator_penalty": terms.penalty_bn.sum(axis=1).mean(),
            "kl_penalty": terms.kl_penalty_b.mean(),
            "response_length_mean": lengths_b.mean(),
            "response_length_std": lengths_b.std(),
            "eos_fraction": np.asarray(generation.ended_b).mean(),
            "reward_mean": reward_b.mean(),
            "reward_std": reward_b.std(),
            "reward_min": reward_b.min(),
            "reward_max": reward_b.max(),
            "time_rollout": clock[1] - clock[0],
            "time_score": clock[2] - clock[1],
            "time_update": clock[3] - clock[2],
            "tokens_per_second": lengths_b.sum() / (clock[3] - clock[0]),
        }
        reward = self.config.reward
        for column, feature in enumerate(reward.penalize_features):
            z_b = z_bn[:, column]
            row[f"feat_{feature}_activation"] = z_b.mean()
            row[f"feat_{feature}_above_tau"] = (z_b > reward.tau_values[column]).mean()
        return {name: float(value) for name, value in row.items()} | {"step": step}

    def _samples(self, step, prompts, responses, terms: RewardTerms) -> list[dict]:
        features = self.config.reward.penalize_features
        return [
            {
                "step": step,
                "prompt": prompts[b],
                "response": responses[b],
                "rm_score": float(terms.rm_score_b[b]),
                "penalties": {
                    str(i): float(p) for i, p in zip(features, terms.penalty_bn[b], strict=True)
                },
                "kl_penalty": float(terms.kl_penalty_b[b]),
                "total_reward": float(terms.total_b[b]),
            }
            for b in range(min(self.config.ppo.samples_per_step, len(prompts)))
        ]

    def _dump(self, step, prompts, responses, batch: Batch, metrics) -> None:
        """Keeps the offending batch and stops; the state before the update is not overwritten."""
        path = self.workdir / f"nonfinite_step_{step}.npz"
        arrays = jax.device_get({f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
        np.savez(path, prompts=prompts, responses=responses, **arrays)
        found = ", ".join(f"{k}={v}" for k, v in metrics.items() if not np.isfinite(v))
        raise NonFiniteError(f"step {step} is not finite ({found}); the batch is in {path}")

    def _signals(self):
        """SIGTERM and SIGINT ask for a checkpoint at the end of the step in progress."""
        return _SignalHandlers(self._remember)

    def _remember(self, number: int, _frame: Any) -> None:
        LOG.info("signal %d: finishing this step, then saving", number)
        self._stop_signal = number


class _SignalHandlers:
    """Installs a handler for SIGTERM and SIGINT, and puts the old ones back."""

    def __init__(self, handler):
        self._handler = handler

    def __enter__(self) -> None:
        chosen = (signal.SIGTERM, signal.SIGINT)
        self._old = {number: signal.signal(number, self._handler) for number in chosen}

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
