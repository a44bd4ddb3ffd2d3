"""PPO with the compound reward: roll out → score → reward → update → log, step by step.

Every random choice is a function of (seed, step), so a run that resumes from its newest checkpoint
gives the same results as one that was never stopped.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax import numpy as jnp
from jax.stages import Lowered

from ppo.config import PPOConfig
from ppo.held_out import HeldOut
from ppo.learner import Learner
from ppo.nonfinite import dump_step
from ppo.objectives import Batch
from ppo.prompts import PromptDeck
from ppo.rollout import Rollout, Sampler
from ppo.run_group import Member
from ppo.run_state import RunState
from ppo.slots import SlotPlan, Slots, order_of_rows, slot_plans
from ppo.step_rows import sample_rows, step_row
from ppo.tracking.checkpoint import CheckpointConfig, Checkpoints
from ppo.tracking.guards import (
    GuardConfig,
    GuardStopError,
    NonFiniteError,
    TrainingStoppedError,
    Watch,
)
from ppo.tracking.metrics import (
    RunLog,
    has_evaluations,
    read_evaluations,
    summarise,
    summarise_evaluations,
)
from ppo.tracking.profiling import NO_PROFILE, ProfileConfig, Profiler, phase
from ppo.tracking.trackers.start import TrackConfig
from ppo.update import Updater, batch_metrics
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.errors import InputError, first_line
from sarm_jax.io.json_files import write_json
from sarm_jax.io.signals import on_signal
from sarm_jax.models.chat import pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel import processes
from sarm_jax.parallel.compilation import compile_programs
from sarm_jax.rewards.compound import RewardTerms, ScoreScale, learned_reward
from sarm_jax.rewards.density_ratio import (
    LATENT_KL_COLUMNS,
    DensityRatio,
    DensityRatioState,
    DiscriminatorConfig,
    groups_of,
)
from sarm_jax.rewards.human_latents import HumanLatents
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.scoring import Scored, Scorer, reward_terms
from sarm_jax.rewards.state_controls import NO_STATES, StateControls
from sarm_jax.version import VERSION

LOG = logging.getLogger(__name__)

LOOK_AHEAD = 10_000  # batches whose shapes are compiled before the first step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the stage `train`, by section of the config.

    `guards`, `checkpoint`, `tracking`, `experiment_name` and `names`, those of features, do not
    affect results, and may differ when a run is resumed.
    """

    ppo: PPOConfig
    lora: LoRAConfig
    reward: RewardConfig
    discriminator: DiscriminatorConfig
    guards: GuardConfig
    checkpoint: CheckpointConfig
    tracking: TrackConfig = dataclasses.field(default_factory=TrackConfig)
    experiment_name: str = ""
    names: FeatureNames = NO_NAMES

    @property
    def further_columns(self) -> tuple[str, ...]:
        """The columns of metrics.csv that only some runs have, of the reward's further terms."""
        has_error_bar = self.reward.beta > 0 and self.discriminator.folds > 1
        return (*self.reward.further_columns, *(LATENT_KL_COLUMNS if has_error_bar else ()))


class Trainer:
    """A PPO run in a working directory.

    `state` is the state of the run after the last finished step.

    Args:
        config: all options.
        policy: the policy, which gets a fresh adapter in place.
        tokenizer: tokenizer of the policy.
        reward_model: the SARM.
        deck: prompts to train on.
        human: human latents for the latent KL; None if β = 0.
        states: what the reward reads from the pooled states of the reward model.
        workdir: where the run is written.
        eval_deck: held-out prompts, on which the policy is evaluated; None: it is not.
        profile: the steps that are traced.
        made_from: options of the run and digests of its inputs, as JSON. Every checkpoint records
            them, so that a later call can compare.
        on_start: called once everything is compiled and calibrated, before anything is written.
        member: the place of the run in a group of runs over the same base; None: it is alone.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        policy: Llama,
        tokenizer: Any,
        reward_model: RewardModel,
        deck: PromptDeck,
        human: HumanLatents | None,
        workdir: Path,
        states: StateControls = NO_STATES,
        eval_deck: PromptDeck | None = None,
        profile: ProfileConfig = NO_PROFILE,
        made_from: Mapping[str, Any] | None = None,
        on_start: Callable[[], None] = lambda: None,
        member: Member | None = None,
    ):
        self.config, self.workdir, self.deck = config, workdir, deck
        self._made_from, self._on_start = made_from, on_start
        self.density_ratio = None
        if human is not None:
            self.density_ratio = DensityRatio(config.discriminator, human.z_ns)
        features = human.latent_indices if human else ()
        self.scorer = Scorer(reward_model, config.reward, features, states)
        self.learner, fresh, self.base = Learner.attach(
            config.ppo, config.lora, policy=policy, pad=pad_id(tokenizer, policy.stop_ids)
        )
        self.sampler = Sampler(self.learner, self.base, tokenizer, member)
        self._on_signal = on_signal if member is None else member.on_signal
        self.updater = Updater(self.learner, screens=config.reward.screen)
        keys = jax.random.split(jax.random.key(config.ppo.seed), 5)
        self._rollout_key, disc_key, self._calibration_key, self._disc_data_key, eval_key = keys
        disc_state = None if self.density_ratio is None else self.density_ratio.init(disc_key)
        self.state = RunState(policy.placement.replicated(fresh), disc_state)
        self.held_out = None
        if eval_deck is not None:
            self.held_out = HeldOut(
                deck=eval_deck,
                batches=config.ppo.eval_batches,
                key=eval_key,
                sampler=self.sampler,
                scorer=self.scorer,
                reward=config.reward,
                density_ratio=self.density_ratio,
            )
        self._slot_plans = run_slots(config.ppo, deck, policy.placement.parts)
        self._expected_batches = run_batches(config.ppo)[:LOOK_AHEAD]
        profile.check_steps(config.ppo.total_steps)
        self._controlled_features = dict.fromkeys(
            (
                *config.reward.penalize_features,
                *config.reward.clamp_features,
                *(human.latent_indices if human else ()),
            )
        )
        self._profiler = Profiler(profile, workdir)
        self._stop_signal = 0  # 0: none
        self.scale = ScoreScale(0.0, 1.0)

    def run(self) -> dict:
        """Trains to `ppo.total_steps`; returns the summary, which is also written to summary.json.

        Raises:
            NonFiniteError: too many steps had updates that were not finite.
            GuardStopError: a guard that `guards.stop` names is active.
            InputError: a tracker of `track` cannot be started.
            SystemExit: SIGTERM or Ctrl-C, with code 128 + signal. Only in this case does the
                method shut down the processes of the run (`processes.shut_down`).
            OSError: the disk is full.
        """
        config = self.config.ppo
        checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            keep=config.keep_checkpoints,
            keep_every=self.config.checkpoint.keep_every,
        )
        done = self._start(checkpoints)
        self._profiler.check_start(done)
        watch = Watch(self.config.guards, self.config.reward.alphas_sd(self.scale.std))
        self._on_start()
        log = RunLog(
            self.workdir,
            self.config.reward.penalize_features,
            first_step=done,
            total_steps=config.total_steps,
            algorithm=config.algorithm,
            further=self.config.further_columns,
            tracking=self.config.tracking,
            names=self.config.names,
        )
        processes.raise_on_all()  # a tracker that the primary process cannot start ends all of them
        with self._on_signal(self._remember_signal), log, self._summarising(watch, log):
            self._train(checkpoints, log, watch=watch, done=done)
        checkpoints.close()
        return processes.broadcast(self._summarise(watch, log))

    def _train(self, checkpoints: Checkpoints, log: RunLog, *, watch: Watch, done: int) -> None:
        """Takes the steps after the first `done`, with their log, checkpoints and guards."""
        config = self.config.ppo
        stopping: list[str] = []
        for row in processes.broadcast(log.rows):
            stopping = self._stopping_guards(watch.check(row))
        self._check_guards(stopping, done)
        if done == 0:
            log.write_evaluation(self._evaluate(0))
        for step in range(done, config.total_steps):
            with self._profiler.step(step):
                self.state, row, samples = self._step(step, self.state)
            log.write(row, samples)
            finished = step + 1
            last = finished == config.total_steps
            stopping = self._stopping_guards(watch.check(row))
            self._check_finite(watch, step, last)
            if config.evaluates(finished) or stopping:
                log.write_evaluation(self._evaluate(finished))
            signal = processes.all_max(self._stop_signal)
            if last or finished % config.checkpoint_every == 0 or signal or stopping:
                checkpoints.save(finished, self.state, self._facts())
            if signal:
                self._stop_at_signal(watch, log, signal=signal, finished=finished)
            self._check_guards(stopping, finished)

    @contextlib.contextmanager
    def _summarising(self, watch: Watch, log: RunLog) -> Iterator[None]:
        """Writes the summary of the steps so far if an error ends the block.

        The error itself is raised again, also if the summary cannot be written.
        """
        try:
            yield
        except Exception as error:
            stopped = error.reason if isinstance(error, TrainingStoppedError) else first_line(error)
            with contextlib.suppress(OSError, InputError):
                self._profiler.stop()
                self._summarise(watch, log, stopped)
            raise

    def _summarise(self, watch: Watch, log: RunLog, stopped: str | None = None) -> dict | None:
        """Writes and returns the summary of all rows, including those of earlier calls.

        It replaces the summary of an earlier call. Without a row there is none. Only the primary
        process has the rows; the others return None. `stopped` says what ended the run early.
        """
        if not (processes.is_primary() and log.rows):
            return None
        summary = summarise(log.rows, self.scale.mean, self.scale.std)
        summary |= {"total_steps": self.config.ppo.total_steps, "stopped": stopped}
        summary["prompts"] = self.deck.summary()
        if self.config.experiment_name:
            summary["experiment_name"] = self.config.experiment_name
        summary["warnings"] = watch.warnings
        summary |= self.config.names.field(self._controlled_features)
        if self.held_out is not None and (not stopped or has_evaluations(self.workdir)):
            summary["held_out"] = summarise_evaluations(read_evaluations(self.workdir))
        write_json(self.workdir / "summary.json", summary)
        return summary

    def _start(self, checkpoints: Checkpoints) -> int:
        """Compiles, then calibrates or restores; returns the number of finished steps."""
        compile_programs(self._programs())
        if checkpoints.latest_step() is None:
            self.scale = self._calibrate()
            return 0
        done, self.state, facts = checkpoints.restore(self.state)
        self.scale = ScoreScale(facts["mean"], facts["std"])
        LOG.info("resuming after step %d of %d", done, self.config.ppo.total_steps)
        return done

    def _facts(self) -> dict[str, Any]:
        """Returns the JSON part of a checkpoint."""
        facts = dataclasses.asdict(self.scale)
        return facts | {"made_from": self._made_from, "sarm_jax_version": VERSION}

    def _programs(self) -> Iterator[Callable[[], Lowered]]:
        """Yields the programs of all models in a step, for compilation ahead; longest first."""
        train, base, numbers = self.state.train, self.base, self._expected_batches
        for length in sorted({self.deck.padded_length(n) for n in numbers}, reverse=True):
            plan = self._slot_plans[length]
            yield from self.sampler.programs(train.params, length, plan.prefill)
            for slots in plan.all_slots():
                yield from self.updater.lower(train, base, length, slots).values()
                yield partial(self.learner.lower_reference, base, length, slots)
        prompts = [self.deck.texts(number) for number in numbers]
        if self.held_out is not None:
            prompts += self.held_out.prompts
        yield from self.scorer.programs(prompts, self.config.ppo.max_new_tokens)
        if self.held_out is not None:
            yield from self.held_out.programs(train.params)

    def _calibrate(self) -> ScoreScale:
        """Measures μ and σ on responses of the fresh policy, which is the reference policy."""
        scores = []
        for number in range(self.config.ppo.calibration_batches):
            key = jax.random.fold_in(self._calibration_key, number)
            rollout = self._roll_out(self.state.train.params, number, key)
            scores.append(
                self.scorer.score_with_and_without_clamp(rollout.prompts, rollout.responses)
            )
        score_b, unclamped_b = np.concatenate(scores, axis=1)
        scale = ScoreScale.estimate(score_b, unclamped_b)
        LOG.info("%s", scale.describe(len(score_b)))
        return scale

    def _roll_out(self, params: dict, number: int, key: jax.Array) -> Rollout:
        """Samples responses to batch `number` of the deck."""
        plan = self._slot_plans[self.deck.padded_length(number)]
        return self.sampler.sample(
            params, self.deck, batch_number=number, key=key, slots=plan.prefill
        )

    def _evaluate(self, finished: int) -> list[dict]:
        """Evaluates the policy on held-out prompts after `finished` steps, if there are any."""
        if self.held_out is None:
            return []
        return self.held_out.evaluate(finished, self.state, self.scale)

    def _step(self, step: int, state: RunState) -> tuple[RunState, dict[str, float], list[dict]]:
        """Takes a PPO step; returns (new state, row of metrics, samples for samples.jsonl)."""
        clock = [time.perf_counter()]
        key = jax.random.fold_in(self._rollout_key, step)
        with phase("rollout"):
            rollout = self._roll_out(state.train.params, step, key)
        clock.append(time.perf_counter())

        with phase("score"):
            scored = self.scorer.score(rollout.prompts, rollout.responses)
            terms, density_ratio_state, disc_metrics = self._reward(step, state, rollout, scored)
            reward_b = learned_reward(
                terms,
                scale=self.scale,
                ended_b=rollout.ended_b,
                missing_eos_penalty=self.config.ppo.missing_eos_penalty,
            )
        clock.append(time.perf_counter())

        with phase("update"):
            order = order_of_rows(self.config.ppo, step)
            plan = self._slot_plans[self.deck.padded_length(step)]
            slots = plan.slots_for(rollout.lengths_b, order)
            batch = self._screened(self._batch(rollout, reward_b, slots), terms)
            train_state, targets, scalars = self.updater.update(
                state.train, self.base, batch, order=order, slots=slots
            )
            config = self.config.ppo.for_programs
            scalars |= batch_metrics(config, batch, targets, rollout.generation.logp_br)
            metrics = jax.device_get(scalars | disc_metrics)
            skipped = metrics["skipped_updates"] + metrics.pop("skipped", 0)
        clock.append(time.perf_counter())

        row = step_row(
            step,
            clock=clock,
            rollout=rollout,
            terms=terms,
            scored=scored,
            reward_b=reward_b,
            reward=self.config.reward,
        )
        row |= {name: float(value) for name, value in metrics.items()}
        row["skipped_updates"] = float(skipped)
        samples = sample_rows(
            step, rollout, terms, reward=self.config.reward, count=self.config.ppo.samples_per_step
        )
        new_state = RunState(train_state, density_ratio_state)
        if row["skipped_updates"]:
            path = dump_step(
                self.workdir, row=row, rollout=rollout, scored=scored, batch=batch, state=new_state
            )
            names = ", ".join(name for name, value in row.items() if not np.isfinite(value))
            LOG.warning("step %d is not finite (%s): batch and state in %s", step, names, path)
        return new_state, row, samples

    def _stopping_guards(self, active: Sequence[str]) -> list[str]:
        """Returns those of the active guards that stop the run."""
        return [name for name in active if self.config.guards.stops(name)]

    def _check_guards(self, stopping: list[str], finished: int) -> None:
        """Raises GuardStopError if a guard stops the run after `finished` steps, before the end."""
        if stopping and finished < self.config.ppo.total_steps:
            reason = f"guards.stop ({', '.join(stopping)})"
            raise GuardStopError(
                f"step {finished - 1}: stopped by {reason}, checkpoint {finished} saved; "
                "--config.guards.stop= resumes from there",
                reason,
            )

    def _check_finite(self, watch: Watch, step: int, last: bool) -> None:
        """Raises NonFiniteError if too many steps, or all of them, had a skipped update."""
        limit, count = self.config.guards.max_nonfinite_steps, watch.nonfinite_steps
        if count > limit or (last and count == step + 1):
            raise NonFiniteError(
                f"step {step}: {count} of {step + 1} steps were not finite "
                f"(guards.max_nonfinite_steps={limit}): the batch of the last one is in "
                f"{self.workdir / f'nonfinite_step_{step}.npz'}; the same command resumes from the "
                "last checkpoint, and ends here again unless the cause or the limit changes",
                f"{count} steps that were not finite",
            )

    def _stop_at_signal(self, watch: Watch, log: RunLog, *, signal: int, finished: int) -> NoReturn:
        """Writes the summary, shuts the processes down and raises SystemExit."""
        self._profiler.stop()
        self._summarise(watch, log, f"signal {signal}")
        processes.shut_down()
        LOG.info("stopped by signal %d after step %d", signal, finished)
        raise SystemExit(128 + signal)

    def _reward(
        self, step: int, state: RunState, rollout: Rollout, scored: Scored
    ) -> tuple[RewardTerms, DensityRatioState | None, dict[str, np.ndarray]]:
        """Returns (terms of the reward, new state of the discriminators, their metrics).

        The discriminators are trained on the latents of this step before they are read.
        """
        d_b, density_ratio_state = np.zeros_like(scored.score_b), state.density_ratio
        metrics: dict[str, np.ndarray] = {}
        if self.density_ratio is not None:
            assert state.density_ratio is not None
            key = jax.random.fold_in(self._disc_data_key, step)
            density_ratio_state, own_d_b, own_metrics = self.density_ratio.update(
                state.density_ratio, scored.z_bs, key, groups_of(rollout.prompts)
            )
            d_b, metrics = _broadcast_primary(own_d_b, own_metrics)
        terms = reward_terms(
            self.config.reward, scored, d_b=d_b, scale=self.scale, lengths_b=rollout.lengths_b
        )
        return terms, density_ratio_state, metrics

    def _screened(self, batch: Batch, terms: RewardTerms) -> Batch:
        """Adds which responses are not screened, if any can be."""
        if terms.screened_b is None:
            return batch
        keep_b = self.learner.placement.rows(jnp.asarray(~terms.screened_b))
        return dataclasses.replace(batch, keep_b=keep_b)

    def _batch(self, rollout: Rollout, reward_b: np.ndarray, slots: Slots | None) -> Batch:
        """Puts the scored rollout on the mesh, with log π_ref."""
        place = self.learner.placement.rows
        tokens_bt, mask_bt, mask_br = place(
            (rollout.tokens_bt, rollout.mask_bt, rollout.generation.mask_br)
        )
        ref_logp_br = self.learner.reference_logp(self.base, tokens_bt, mask_bt, slots=slots)
        ref_logp_br, placed_reward_b = place((ref_logp_br, jnp.asarray(reward_b)))
        return Batch(
            tokens_bt=tokens_bt,
            mask_bt=mask_bt,
            mask_br=mask_br,
            ref_logp_br=ref_logp_br,
            reward_b=placed_reward_b,
        )

    def _remember_signal(self, number: int) -> None:
        """Makes the run stop with a checkpoint after the step in progress."""
        LOG.info(
            "signal %d: a checkpoint follows this step; a second signal ends the process at once",
            number,
        )
        self._stop_signal = number


def run_batches(config: PPOConfig) -> range:
    """Returns the numbers of all batches of a run, those of the calibration among them."""
    return range(max(config.total_steps, config.calibration_batches))


def run_slots(config: PPOConfig, deck: PromptDeck, parts: int) -> dict[int, SlotPlan]:
    """Returns the slots of all batches of a run by padded prompt length, see `slot_plans`."""
    return slot_plans(
        config,
        deck=deck,
        batches=run_batches(config),
        order_of=partial(order_of_rows, config),
        parts=parts,
    )


def _broadcast_primary(
    d_b: jax.Array, metrics: dict[str, jax.Array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns D `[B]` and the metrics of the primary process in every process.

    Every process has a discriminator, and GPUs may round differently, but rewards and the metrics
    that stop a run must be the same everywhere.
    """
    own = np.asarray([*np.asarray(d_b), *jax.device_get(list(metrics.values()))], np.float32)
    same = processes.broadcast_array(own, own if processes.is_primary() else None)
    return same[: len(d_b)], dict(zip(metrics, same[len(d_b) :], strict=True))
