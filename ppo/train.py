"""PPO with the compound reward, as one story: roll out → score → reward → update → log.

Every random choice is a function of (seed, step), so a run that is resumed from its newest
checkpoint goes on exactly as if it had never stopped.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.stages import Lowered

from ppo.config import PPOConfig
from ppo.density_ratio import DensityRatio, DiscriminatorConfig
from ppo.held_out import HeldOut
from ppo.human_latents import HumanLatents
from ppo.learner import Learner
from ppo.nonfinite import dump
from ppo.prompts import PromptDeck
from ppo.reward import RewardConfig, RewardTerms, ScoreScale, compound_reward, learned_reward
from ppo.rollout import Rollout, Sampler
from ppo.scoring import Scored, Scorer
from ppo.slots import Slots, slot_plans
from ppo.tracking.checkpoint import CheckpointConfig, Checkpoints
from ppo.tracking.guards import GuardConfig, GuardStopError, NonFiniteError, Watch
from ppo.tracking.metrics import (
    RunLog,
    read_evaluations,
    summarise,
    summarise_evaluations,
)
from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.profiling import ProfileConfig, Profiler, phase
from ppo.update import Batch, Updater, batch_metrics
from sarm_jax.io.files import replacing
from sarm_jax.io.signals import on_signal
from sarm_jax.models.chat import pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel import processes
from sarm_jax.parallel.compilation import compile_programs

LOG = logging.getLogger(__name__)

NO_PROFILE = ProfileConfig()
LOOK_AHEAD = 10_000  # batches whose shapes are compiled before the first step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of the train stage, section by section.

    The last three change no number: a run may go on with others than it started with.
    """

    ppo: PPOConfig
    lora: LoRAConfig
    reward: RewardConfig
    discriminator: DiscriminatorConfig
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    experiment_name: str = ""


class Trainer:
    """A run in `workdir`. `human` is the buffer for the latent KL, None when β = 0.

    `eval_deck` are prompts to evaluate the policy on while it is trained; None: no evaluation.
    `profile` says which steps are traced. `made_from` (JSON) goes into every checkpoint, for the
    next call to compare.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Llama,
        tokenizer: Any,
        reward_model: RewardModel,
        deck: PromptDeck,
        human: HumanLatents | None,
        workdir: Path,
        eval_deck: PromptDeck | None = None,
        profile: ProfileConfig = NO_PROFILE,
        made_from: Mapping[str, Any] | None = None,
    ):
        self.config, self.workdir, self.deck = config, workdir, deck
        self._made_from = made_from
        self.density_ratio = None
        if human is not None:
            self.density_ratio = DensityRatio(config.discriminator, human.z_ns)
        self.scorer = Scorer(reward_model, config.reward, human.latent_indices if human else ())
        self.learner, fresh, self.base = Learner.attach(
            config.ppo, config.lora, policy, pad_id(tokenizer)
        )
        self._fresh = policy.placement.replicated(fresh)
        self.sampler = Sampler(self.learner, self.base, tokenizer)
        self.updater = Updater(self.learner)
        keys = jax.random.split(jax.random.key(config.ppo.seed), 5)
        self._rollout_key, self._disc_key, self._calibration_key, self._disc_data_key, key = keys
        self.held_out = None
        if eval_deck is not None:
            self.held_out = HeldOut(
                deck=eval_deck,
                batches=config.ppo.eval_batches,
                key=key,
                sampler=self.sampler,
                scorer=self.scorer,
                reward=config.reward,
                density_ratio=self.density_ratio,
            )
        batches = range(max(config.ppo.total_steps, config.ppo.calibration_batches))
        parts = policy.placement.parts
        self._slot_plans = slot_plans(config.ppo, deck, batches, self._order, parts)
        self._expected = batches[:LOOK_AHEAD]
        profile.check_steps(config.ppo.total_steps)
        self._profiler = Profiler(profile, workdir)
        self._stop_signal = 0  # none
        self.scale = ScoreScale(0.0, 1.0)

    def run(self) -> dict:
        """Trains to `total_steps` and returns the summary, which also stands in summary.json.

        Raises NonFiniteError and GuardStopError (`ppo.tracking.guards`), with what the run has
        come to in `state` and summary.json, SystemExit(128 + signal) after a SIGTERM or Ctrl-C,
        and OSError where the disk is full. Processes are parted after a signal alone.
        """
        config = self.config.ppo
        keep = config.keep_checkpoints, self.config.checkpoint.keep_every
        checkpoints = Checkpoints(self.workdir / "checkpoints", *keep)
        state, done = self._start(checkpoints)
        self._profiler.check_start(done)
        watch = Watch(self.config.guards, self.config.reward.alphas_sd(self.scale.std))
        features = self.config.reward.penalize_features
        (self.workdir / "summary.json").unlink(missing_ok=True)  # of an earlier call
        log = RunLog(self.workdir, features, done, config.total_steps)
        with on_signal(self._remember), log:
            held: list[str] = []
            for row in processes.from_first(log.earlier_rows()):
                held = self._stopping(watch(row))
            self.state = state
            self._check_guards(watch, held, done)
            if done == 0:
                log.write_evaluation(self._evaluate(0, state))
            for step in range(done, config.total_steps):
                with self._profiler.step(step):
                    state, row, samples = self._step(step, state)
                self.state = state
                log.write(row, samples)
                finished = step + 1
                last = finished == config.total_steps
                held = self._stopping(watch(row))
                self._check_finite(watch, step, last)
                if last or finished % config.eval_every == 0 or held:
                    log.write_evaluation(self._evaluate(finished, state))
                stop = processes.largest(self._stop_signal)
                if last or finished % config.checkpoint_every == 0 or stop or held:
                    facts = dataclasses.asdict(self.scale) | {"made_from": self._made_from}
                    checkpoints.save(finished, state, facts)
                if stop:
                    self._profiler.stop()
                    self._summarise(watch, f"signal {stop}")
                    processes.part()
                    LOG.info("stopped by signal %d after step %d", stop, finished)
                    raise SystemExit(128 + stop)
                self._check_guards(watch, held, finished)
        checkpoints.close()
        return processes.from_first(self._summarise(watch))

    def _summarise(self, watch: Watch, stopped: str | None = None) -> dict | None:
        """Writes and returns summary.json, of rows that earlier calls wrote too.

        The first process has them, the others get None. `stopped` says what ended the run early.
        """
        if not processes.is_first():
            return None
        rows = read_metrics(self.workdir / "metrics.csv")
        summary = summarise(rows, self.scale.mean, self.scale.std)
        summary |= {"total_steps": self.config.ppo.total_steps, "stopped": stopped}
        summary["prompts"] = self.deck.summary()
        if self.config.experiment_name:
            summary["experiment_name"] = self.config.experiment_name
        summary["warnings"] = watch.warnings
        if self.held_out is not None:
            summary["held_out"] = summarise_evaluations(read_evaluations(self.workdir))
        with replacing(self.workdir / "summary.json") as file:
            json.dump(summary, file, indent=2)
        return summary

    def _start(self, checkpoints: Checkpoints) -> tuple[dict, int]:
        """The state to go on from, and how many steps it has behind it."""
        config = self.config.ppo
        state: dict[str, Any] = {"train": self._fresh}
        if self.density_ratio is not None:
            state["density_ratio"] = self.density_ratio.init(self._disc_key)
        compile_programs(self._programs())
        if checkpoints.latest_step() is None:
            self.scale = self._calibrate(state["train"].params)
            return state, 0
        done, state, facts = checkpoints.restore(state)
        self.scale = ScoreScale(facts["mean"], facts["std"])
        LOG.info("resuming after step %d of %d", done, config.total_steps)
        return state, done

    def _programs(self) -> Iterator[Callable[[], Lowered]]:
        """All that a step runs on a model, so that none has to compile it; the longest first."""
        config, params, base = self.config.ppo, self._fresh.params, self.base
        for length in sorted({self.deck.padded_length(n) for n in self._expected}, reverse=True):
            plan = self._slot_plans[length]
            yield partial(self.learner.lower_rollout, params, base, length, plan.prefill)
            for slots in plan.all():
                yield from self.updater.lower(self._fresh, base, length, slots).values()
                yield partial(self.learner.lower_reference, base, length, slots)
        prompts = [self.deck.texts(number) for number in self._expected]
        if self.held_out is not None:
            prompts += self.held_out.prompts
        yield from self.scorer.programs(prompts, config.max_new_tokens)
        if self.held_out is not None:
            yield from self.held_out.programs(params)

    def _calibrate(self, params: dict) -> ScoreScale:
        """μ and σ of the scores of the reference policy's own responses to the first prompts."""
        scores = []
        for batch in range(self.config.ppo.calibration_batches):
            key = jax.random.fold_in(self._calibration_key, batch)
            rollout = self._roll_out(params, batch, key)
            scores.append(self.scorer.with_and_without_clamp(rollout))
        scale = ScoreScale.of(*np.concatenate(scores, axis=1))
        LOG.info("reference responses score %.4f ± %.4f", scale.mean, scale.std)
        return scale

    def _roll_out(self, params: dict, batch: int, key: jax.Array) -> Rollout:
        """Responses to a batch of the deck by the policy with `params`."""
        plan = self._slot_plans[self.deck.padded_length(batch)]
        return self.sampler(params, self.deck, batch, key, plan.prefill)

    def _evaluate(self, steps: int, state: dict) -> list[dict]:
        return [] if self.held_out is None else self.held_out(steps, state, self.scale)

    def _step(self, step: int, state: dict) -> tuple[dict, dict[str, float], list[dict]]:
        """One PPO step: (new state, a metrics row, samples to show)."""
        config = self.config.ppo
        clock = [time.perf_counter()]
        key = jax.random.fold_in(self._rollout_key, step)
        with phase("rollout"):
            rollout = self._roll_out(state["train"].params, step, key)
        clock.append(time.perf_counter())

        with phase("score"):
            scored = self.scorer(rollout)
            terms, disc_state, disc_metrics = self._reward(step, state, scored)
            reward_b = learned_reward(
                terms, self.scale, rollout.ended_b, config.missing_eos_penalty
            )
        clock.append(time.perf_counter())

        with phase("update"):
            order = self._order(step)
            plan = self._slot_plans[self.deck.padded_length(step)]
            slots = plan.of(rollout.lengths_b, order)
            batch = self._batch(rollout, reward_b, slots)
            train_state, targets, scalars = self.updater(
                state["train"], self.base, batch, order, slots
            )
            scalars |= batch_metrics(batch, targets, rollout.generation.logp_br)
            metrics = jax.device_get(scalars | disc_metrics)
            skipped = metrics["skipped_updates"] + metrics.pop("skipped", 0)
        clock.append(time.perf_counter())

        row = self._row(step, clock, rollout, terms, scored, reward_b)
        row |= {name: float(value) for name, value in metrics.items()}
        row["skipped_updates"] = float(skipped)
        new_state = {"train": train_state} | disc_state
        if row["skipped_updates"]:
            path = dump(self.workdir, row, rollout, scored, batch, new_state)
            found = ", ".join(name for name, value in row.items() if not np.isfinite(value))
            LOG.warning("step %d is not finite (%s): batch and state in %s", step, found, path)
        return new_state, row, self._samples(step, rollout, terms)

    def _stopping(self, held: Sequence[str]) -> list[str]:
        """Of the guards that hold, those that are to stop the run."""
        return [name for name in held if self.config.guards.stops(name)]

    def _check_guards(self, watch: Watch, held: list[str], finished: int) -> None:
        """Raises GuardStopError where guards that stop the run `held` after `finished` steps."""
        if held and finished < self.config.ppo.total_steps:
            reason = f"guards.stop ({', '.join(held)})"
            self._profiler.stop()
            self._summarise(watch, reason)
            raise GuardStopError(
                f"step {finished - 1}: stopped by {reason}, checkpoint {finished} saved; "
                "--config.guards.stop= goes on from there"
            )

    def _check_finite(self, watch: Watch, step: int, last: bool) -> None:
        """Raises NonFiniteError when more steps had a skipped update than may have, or all had."""
        limit, found = self.config.guards.max_nonfinite_steps, watch.nonfinite_steps
        if found > limit or (last and found == step + 1):
            self._profiler.stop()
            self._summarise(watch, f"{found} steps that were not finite")
            raise NonFiniteError(
                f"step {step}: {found} of {step + 1} steps were not finite "
                f"(guards.max_nonfinite_steps={limit}): the last one's batch is in "
                f"{self.workdir / f'nonfinite_step_{step}.npz'}; the same command goes on from the "
                "last checkpoint, and ends here again unless what makes it or the limit changes"
            )

    def _reward(self, step, state, scored: Scored) -> tuple[RewardTerms, dict, dict]:
        """The reward's terms; the discriminator is stepped on this batch before it is read."""
        ratio_b, disc_state = np.zeros_like(scored.score_b), {}
        metrics: dict[str, np.ndarray] = {}
        if self.density_ratio is not None:
            key = jax.random.fold_in(self._disc_data_key, step)
            new, ratio, numbers = self.density_ratio.update(
                state["density_ratio"], jnp.asarray(scored.subset_bs), key
            )
            ratio_b, metrics = _of_first(ratio, numbers)
            disc_state = {"density_ratio": new}
        terms = compound_reward(
            self.config.reward, scored.score_b, scored.penalised_bn, ratio_b, self.scale.std
        )
        return terms, disc_state, metrics

    def _order(self, step: int) -> np.ndarray:
        """The rows of the batch in each epoch of a step, `[epochs, B]`."""
        config = self.config.ppo
        rows = np.tile(np.arange(config.batch_size), (config.ppo_epochs, 1))
        return np.random.default_rng((config.seed, step)).permuted(rows, axis=1)

    def _batch(self, rollout: Rollout, reward_b: np.ndarray, slots: Slots | None) -> Batch:
        place = self.learner.placement.rows
        tokens_bt, mask_bt, mask_br = place(
            (rollout.tokens_bt, rollout.mask_bt, rollout.generation.mask_br)
        )
        ref_logp_br = self.learner.reference_logp(self.base, tokens_bt, mask_bt, slots=slots)
        return Batch(tokens_bt, mask_bt, mask_br, *place((ref_logp_br, jnp.asarray(reward_b))))

    def _row(
        self, step, clock, rollout: Rollout, terms: RewardTerms, scored: Scored, reward_b
    ) -> dict[str, float]:
        lengths_b = rollout.lengths_b
        row = {
            "step": step,
            "timestamp": time.time(),
            "total_reward": terms.total_b.mean(),
            "rm_score": terms.rm_score_b.mean(),
            "indicator_penalty": terms.penalty_bn.sum(axis=1).mean(),
            "kl_penalty": terms.kl_penalty_b.mean(),
            "response_length_mean": lengths_b.mean(),
            "response_length_std": lengths_b.std(),
            "eos_fraction": rollout.ended_b.mean(),
            "reward_mean": reward_b.mean(),
            "reward_std": reward_b.std(),
            "reward_min": reward_b.min(),
            "reward_max": reward_b.max(),
            "distinct_responses": len(set(rollout.responses)) / len(set(rollout.prompts)),
            "time_rollout": clock[1] - clock[0],
            "time_score": clock[2] - clock[1],
            "time_update": clock[3] - clock[2],
            "tokens_per_second": lengths_b.sum() / (clock[3] - clock[0]),
        }
        reward = self.config.reward
        for column, feature in enumerate(reward.penalize_features):
            z_b = scored.penalised_bn[:, column]
            row[f"feat_{feature}_activation"] = z_b.mean()
            row[f"feat_{feature}_above_tau"] = (z_b > reward.tau_values[column]).mean()
        return {name: float(value) for name, value in row.items()} | {"step": step}

    def _samples(self, step, rollout: Rollout, terms: RewardTerms) -> list[dict]:
        features = self.config.reward.penalize_features
        return [
            {
                "step": step,
                "prompt": rollout.prompts[b],
                "response": rollout.responses[b],
                "rm_score": float(terms.rm_score_b[b]),
                "penalties": {
                    str(i): float(p) for i, p in zip(features, terms.penalty_bn[b], strict=True)
                },
                "kl_penalty": float(terms.kl_penalty_b[b]),
                "total_reward": float(terms.total_b[b]),
            }
            for b in range(min(self.config.ppo.samples_per_step, len(rollout.prompts)))
            if np.isfinite(terms.total_b[b])  # JSON knows no others; they are dumped
        ]

    def _remember(self, number: int) -> None:
        """SIGTERM and SIGINT ask for a checkpoint at the end of the step in progress."""
        LOG.info("signal %d: finishing this step, then saving; a second one ends at once", number)
        self._stop_signal = number


def _of_first(
    ratio: jax.Array, metrics: dict[str, jax.Array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Process 0's D `[B]` and metrics: every process has a discriminator, and GPUs may round apart,
    but rewards and what stops a run have to be the same in all."""
    own = np.asarray([*np.asarray(ratio), *jax.device_get(list(metrics.values()))], np.float32)
    same = processes.array_from_first(own, own if processes.is_first() else None)
    return same[: len(ratio)], dict(zip(metrics, same[len(ratio) :], strict=True))
