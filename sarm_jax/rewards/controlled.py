"""The compound reward as a reward function for the trainers of other libraries.

    from conversion import load_sarm
    from sarm_jax.rewards import RewardConfig, controlled_reward

    sarm = load_sarm("Llama-SARM-4B")
    controls = RewardConfig(
        penalize_features=(48659,), tau_values=(0.4,), alpha_values=(0.5,), unit="sd"
    )
    trainer = GRPOTrainer(reward_funcs=controlled_reward(sarm, controls), ...)

A call is what a PPO step does with its responses: scores under the clamp, penalties on the latents
before it, the discriminator trained and read, and the cap. So a call must see all responses of a
training step, as it does in TRL, where it sees those of one process.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from safetensors import safe_open
from safetensors.numpy import save

from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.files import check_file, replacing
from sarm_jax.io.json_files import short
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.conversation import UNSUPPORTED, Prompt, PromptValue, parse_prompt
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.rewards.compound import RewardTerms, ScoreScale, learned_reward
from sarm_jax.rewards.density_ratio import (
    DensityRatio,
    DensityRatioState,
    DiscriminatorConfig,
    groups_of,
)
from sarm_jax.rewards.human_latents import HumanLatents, human_buffer
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.scoring import Scored, Scorer, feature_count, reward_terms
from sarm_jax.rewards.state_controls import state_controls

LOG = logging.getLogger(__name__)

Completion = str | Sequence[Mapping[str, str]]
NO_SCALE = ScoreScale(0.0, 1.0)
# Streams of random keys, as PPO splits the seed: the initial discriminator, and its minibatches.
STREAMS, DISCRIMINATOR_KEY, MINIBATCH_KEY = 5, 1, 3


class ControlledReward:
    """A function from prompts and completions to R_total, as TRL's `reward_funcs` takes it.

    Args:
        sarm: the reward model.
        controls: penalties, clamps, latent KL, their unit, and the cap.
        human_latents: the file that `--stage=human_latents` writes, or its content; β > 0 needs it.
        discriminator: size and training of the discriminator behind the latent KL.
        scale: μ and σ of the scores of reference responses. None: those of the first call, which a
            trainer makes with responses of the untrained policy. σ is the unit of `unit="sd"` and
            of the cap; μ is used with `normalise` and `missing_eos_penalty`, and is the centre of
            `bound`.
        normalise: return (R_total − μ) / σ, which PPO here learns from, instead of R_total.
        missing_eos_penalty: as `ppo.missing_eos_penalty`, in σ: a response without a stop token
            gets less than the same text with one (`sarm_jax.rewards.compound.learned_reward`). 0:
            responses need not end. It needs the argument `completion_ids`, which TRL passes.
        stop_ids: the policy's stop tokens; `missing_eos_penalty` needs them.
        seed: seed of the discriminator.
        log: called with the mean of every term after each call.

    Attributes:
        terms: terms of the last call; None before the first.
        calls: number of calls that trained the discriminator.

    Raises:
        InputError: an option is invalid, or the SARM has no such feature.
    """

    __name__ = "controlled_reward"  # the column's name in TRL's logs

    def __init__(
        self,
        sarm: RewardModel,
        controls: RewardConfig,
        *,
        human_latents: HumanLatents | str | Path | None = None,
        discriminator: DiscriminatorConfig | None = None,
        scale: ScoreScale | None = None,
        normalise: bool = False,
        missing_eos_penalty: float = 0.0,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
        log: Callable[[dict[str, float]], None] | None = None,
    ):
        if not 0 <= missing_eos_penalty < float("inf"):
            raise InputError(f"missing_eos_penalty={missing_eos_penalty}: must not be negative")
        if missing_eos_penalty and not stop_ids:
            raise InputError(
                f"missing_eos_penalty={missing_eos_penalty}: needs stop_ids, the tokens that end a "
                "response of the policy"
            )
        if controls.screen:
            raise InputError(
                "reward.screen=True: the trainer takes a number for every response and cannot "
                "leave one out; use penalties, or PPO, RLOO and GRPO of this project"
            )
        self.controls, self.scale, self.log = controls, scale, log
        self.terms: RewardTerms | None = None
        self.calls = 0
        self._normalise, self._missing_eos_penalty = normalise, missing_eos_penalty
        self._stop_ids = frozenset(stop_ids)
        human = human_buffer(controls, human_latents, feature_count(sarm, controls))
        self._features = human.latent_indices if human else ()
        states = state_controls(controls, sarm.state_size)
        self._scorer = Scorer(sarm, controls, self._features, states)
        keys = jax.random.split(jax.random.key(seed), STREAMS)
        self._key = keys[MINIBATCH_KEY]
        self._density_ratio: DensityRatio | None = None
        self._state: DensityRatioState | None = None
        if human is not None:
            config = discriminator or DiscriminatorConfig()
            self._density_ratio = DensityRatio(config, human.z_ns)
            self._state = self._density_ratio.init(keys[DISCRIMINATOR_KEY])

    def __call__(
        self,
        prompts: Sequence[PromptValue],
        completions: Sequence[Completion],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Trains the discriminator, if there is one, and returns a reward for each completion.

        Args:
            prompts: texts or conversations, one for each completion.
            completions: texts, or lists of one assistant message.
            completion_ids: tokens of the completions, without padding; `missing_eos_penalty` and
                `length_penalty` need them.
            log_metric: called with the name and the mean of every term; TRL passes it.
            log_extra: called with the name and the values of every term; TRL passes it.
            **kwargs: other columns of the data set; not used.

        Raises:
            InputError: a prompt or a completion is not usable.
            TrainingStoppedError: a reward is not finite. Nothing has changed.
        """
        parsed = [parse_prompt(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
        responses = _texts(completions)
        ended_b = self._ended(completion_ids, len(responses))
        scored = self._scorer.score(parsed, responses)
        scale = self.scale
        if scale is None:
            scale = self._calibrate(parsed, responses) if self._needs_scale else NO_SCALE
        d_b, state = self._train_discriminators(parsed, scored)
        terms = reward_terms(
            self.controls,
            scored,
            d_b=d_b,
            scale=scale,
            lengths_b=self._lengths(completion_ids, len(responses)),
        )
        reward_b = self._reward(terms, scale, ended_b)
        wrong = np.flatnonzero(~np.isfinite(reward_b))
        if len(wrong):
            raise TrainingStoppedError(
                f"call {self.calls}: the reward of response {wrong[0]} is {reward_b[wrong[0]]}",
                "not finite",
            )
        if self._needs_scale:
            self.scale = scale
        self._state, self.terms = state, terms
        self.calls += 1
        self._log_terms(log_metric, log_extra)
        return [float(reward) for reward in reward_b]

    def _train_discriminators(
        self, prompts: Sequence[Prompt], scored: Scored
    ) -> tuple[np.ndarray, DensityRatioState | None]:
        """Returns D `[B]`, which is 0 without a latent KL, and the new state of the discriminators.

        Raises:
            TrainingStoppedError: the training is not finite.
        """
        if self._density_ratio is None:
            return np.zeros_like(scored.score_b), self._state
        key = jax.random.fold_in(self._key, self.calls)
        assert self._state is not None
        state, d_b, metrics = self._density_ratio.update(
            self._state, scored.z_bs, key, groups_of(prompts)
        )
        if metrics["skipped"]:
            raise TrainingStoppedError(
                f"call {self.calls}: the discriminator's update is not finite", "not finite"
            )
        return np.asarray(d_b), state

    @property
    def _needs_scale(self) -> bool:
        """True if μ or σ affects the reward."""
        has_controls = self.controls.has_controls
        return has_controls or self._normalise or self._missing_eos_penalty > 0

    def calibrate(self, prompts: Sequence[PromptValue], responses: Sequence[str]) -> ScoreScale:
        """Sets and returns μ and σ, measured on responses of the untrained policy.

        Raises:
            InputError: the scores have no spread.
        """
        parsed = [parse_prompt(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
        self.scale = self._calibrate(parsed, responses)
        return self.scale

    def save(self, path: str | Path) -> None:
        """Writes the discriminator, μ, σ and the number of calls, for `restore`."""
        scale = [self.scale.mean, self.scale.std] if self.scale else None
        facts = {"calls": self.calls, "scale": scale, "features": list(self._features)}
        with replacing(path, "wb") as file:
            file.write(save(self._arrays(), {"controlled_reward": json.dumps(facts)}))

    def restore(self, path: str | Path) -> None:
        """Continues from a file of `save`, made with the same controls and the same discriminator.

        Raises:
            InputError: there is no such file, or it is another reward's.
        """
        check_file(path, str(path))
        with as_input_error(f"{path}: not a file of ControlledReward.save"):
            with safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["controlled_reward"])
            scale = ScoreScale(*map(float, facts["scale"])) if facts["scale"] else None
            calls, features = int(facts["calls"]), tuple(facts["features"])
        if features != tuple(self._features):
            raise InputError(
                f"{path}: its discriminator reads the features {list(features)}, this one "
                f"{list(self._features)}"
            )
        own = self._arrays()
        for name in own.keys() | arrays.keys():
            shapes = [part[name].shape if name in part else None for part in (arrays, own)]
            if shapes[0] != shapes[1]:
                raise InputError(f"{path}: {name} has the shape {shapes[0]}, expected {shapes[1]}")
        leaves = [jnp.asarray(arrays[name]) for name in own]
        self._state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)
        self.scale, self.calls = scale, calls

    def _arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the discriminator's state by their path."""
        leaves = jax.tree_util.tree_leaves_with_path(self._state)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def _calibrate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> ScoreScale:
        score_b, unclamped_b = self._scorer.score_with_and_without_clamp(prompts, responses)
        scale = ScoreScale.estimate(score_b, unclamped_b)
        LOG.info("%s", scale.describe(len(responses)))
        return scale

    def _ended(self, completion_ids: Sequence[Sequence[int]] | None, count: int) -> np.ndarray:
        """Returns which responses end with a stop token, `[B]`; all, if they need not."""
        if self._missing_eos_penalty == 0:
            return np.ones(count, bool)
        option = f"missing_eos_penalty={self._missing_eos_penalty}"
        rows = _tokens(completion_ids, count, option)
        return np.asarray([len(ids) > 0 and int(ids[-1]) in self._stop_ids for ids in rows])

    def _lengths(
        self, completion_ids: Sequence[Sequence[int]] | None, count: int
    ) -> np.ndarray | None:
        """Returns the tokens of each response, `[B]`; None if they have no penalty."""
        if not self.controls.length_penalty:
            return None
        option = f"reward.length_penalty={self.controls.length_penalty}"
        return np.asarray([len(ids) for ids in _tokens(completion_ids, count, option)])

    def _reward(self, terms: RewardTerms, scale: ScoreScale, ended_b: np.ndarray) -> np.ndarray:
        if not (self._normalise or self._missing_eos_penalty):
            return terms.total_b
        reward_b = learned_reward(
            terms, scale=scale, ended_b=ended_b, missing_eos_penalty=self._missing_eos_penalty
        )
        return reward_b if self._normalise else reward_b * scale.std + scale.mean

    def _log_terms(self, log_metric, log_extra) -> None:
        """Passes the terms on under the names of metrics.csv."""
        terms = self.terms
        assert terms is not None
        columns = {
            "total_reward": terms.total_b,
            "rm_score": terms.score_b,
            "indicator_penalty": terms.penalty_bn.sum(axis=1),
            "kl_penalty": terms.kl_penalty_b,
            **terms.further,
        }
        means = {name: float(value_b.mean()) for name, value_b in columns.items()}
        if self.log is not None:
            self.log(means)
        for name, value_b in columns.items():
            if log_metric is not None:
                log_metric(name, means[name])
            if log_extra is not None:
                log_extra(name, value_b.tolist())


def _tokens(
    completion_ids: Sequence[Sequence[int]] | None, count: int, option: str
) -> Sequence[Sequence[int]]:
    """Returns the tokens of `count` completions; raises InputError if `option` lacks them."""
    if completion_ids is None or len(completion_ids) != count:
        found = "none" if completion_ids is None else len(completion_ids)
        raise InputError(f"{option}: needs completion_ids of {count} completions, found {found}")
    return completion_ids


def _texts(completions: Sequence[Completion]) -> list[str]:
    """Returns the texts of completions, which may each be a list of one assistant message."""
    texts = []
    for number, completion in enumerate(completions):
        text = completion if isinstance(completion, str) else _content(completion)
        if text is None:
            raise InputError(
                f"completions[{number}]: expected a text or a list of one assistant message with "
                f"a text, found {short(completion)}"
            )
        texts.append(text)
    return texts


def _content(completion: Any) -> str | None:
    """Returns the text of a list of one assistant message, which may be empty; otherwise None."""
    match completion:
        case [{"role": "assistant", "content": str(text), **others}]:
            return None if any(others.get(name) for name in UNSUPPORTED) else text
    return None


controlled_reward = ControlledReward  # reads as the function that it makes
