"""The data of a task in English, and the policy, made from a chat model and a seed.

All that is written by hand is the shortcuts and, if the task writes them, the answers.

    answers           to the training prompts: of the task, or else samples of the given model
    tuning            the given model on these, some with a shortcut: the policy, whose responses
                      have every shortcut now and then. Its logits are divided by a temperature,
                      because at 1 a small model writes what no rule can judge; afterwards it is
                      sampled at temperature 1, as in RL
    demonstrations    the good ones among the texts of the tuning, which stand for human responses
    samples           of the policy; the reward model's pairs are made of them
    pairs             two of the samples to a prompt and of edited versions of them, with further
                      shortcuts or defects; the annotator chooses, with noise
    contrast pairs    a sample without and with a shortcut that the method is told
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import short
from sarm_jax.lab.language_modelling import LMTraining, response_text, train_language_model
from sarm_jax.lab.sampling import Sampled, sample_responses
from sarm_jax.lab.text.task import TextTask
from sarm_jax.models.llama import Llama

LOG = logging.getLogger(__name__)
EDITED = 0.7  # share of the edited versions that shortcuts may be added to
EACH = 0.3  # probability of each shortcut in such a version
SPOILT = 0.4  # probability that an edited version gets a defect
# Fields of `TextDataConfig` in the section prepare_data; all others are in the section lab.
PREPARE_DATA_FIELDS = ("samples_per_prompt", "max_new_tokens", "temperature")
EDITS = 2  # edited versions of each sample
TIE = 1e-6  # utilities that differ by less are equal
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TextDataConfig:
    """Sizes of a task's data and training; `configs/base.py` describes them.

    Attributes:
        prompts: training prompts.
        held_out_prompts: prompts of evaluations, the pool and the gates.
        samples_per_prompt: responses that each model samples to a prompt.
        max_new_tokens: longest response in tokens.
        temperature: sampling temperature of the given model, and what the logits of the tuned
            one are divided by.
        sampling_slots: rows that are refilled as responses end; 0: none are.
        pairs: preference pairs of the annotator.
        label_noise: share of the pairs whose sides are exchanged.
        contrast_pairs: pairs of a response with and without a shortcut.
        tuning_steps: optimizer steps of the tuning.
        tuning_learning_rate: its peak learning rate.
        batch_size: its rows per step.
        seed: seed of the data and the models.
    """

    prompts: int
    held_out_prompts: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    sampling_slots: int
    pairs: int
    label_noise: float
    contrast_pairs: int
    tuning_steps: int
    tuning_learning_rate: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        section = dict.fromkeys(PREPARE_DATA_FIELDS, "prepare_data")
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            option = f"{section.get(name, 'lab')}.{name}={value}"
            if name == "label_noise":
                if not 0 <= value < 0.5:
                    raise InputError(f"{option}: must lie in [0, 0.5)")
            elif name == "sampling_slots":
                if value < 0:
                    raise InputError(f"{option}: must be 0 (no row is refilled) or positive")
            elif name != "seed" and not 0 < value < float("inf"):
                raise InputError(f"{option}: must be positive")
        if self.samples_per_prompt < 2:
            raise InputError(
                f"prepare_data.samples_per_prompt={self.samples_per_prompt}: must be at least 2, "
                "for pairs"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"lab.seed={self.seed}: must lie in [0, 2^31)")


@dataclasses.dataclass(frozen=True)
class TextData:
    """Rows of the JSON Lines files in data/, by the name of the file."""

    prompts: Rows
    held_out_prompts: Rows
    demonstrations: Rows
    pairs: Rows
    contrast: Rows
    samples: Rows
    held_out_samples: Rows


def make_text_data(
    config: TextDataConfig, task: TextTask, model: Llama, tokenizer: Any
) -> tuple[TextData, Llama]:
    """Makes all data that later stages read, and the policy.

    Args:
        config: sizes and the seed.
        task: the task, with the shortcuts that the method is told.
        model: the chat model that the policy is tuned from.
        tokenizer: its tokenizer.

    Raises:
        InputError: the task has too few prompts, or the responses do not allow a data set, for
            example because no answer is a success.
    """
    rng = np.random.default_rng([config.seed, 0])
    train, held_out = split_prompts(config, task, rng)
    sample = partial(_sample, config, tokenizer)
    repeated, held_out_repeated = (
        [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
        for prompts in (train, held_out)
    )
    if task.write is None:
        read = [task.misread(rng, prompt) for prompt in repeated] if task.misread else repeated
        base = sample(model, read, 0, "base samples", config.temperature)
        exchanges = zip(repeated, base.responses, base.ended_b.tolist(), strict=True)
        answers = [(prompt, response) for prompt, response, ended in exchanges if ended]
    else:
        answers = [(prompt, task.write(rng, prompt)) for prompt in repeated]
    written = _with_base_rates(config, answers, task, rng)
    demonstrations = _good(task, written)
    policy = sharpened(_tuned(config, model, tokenizer, written), config.temperature)
    samples, held_out_samples = (
        sample(policy, prompts, number, shown)
        for prompts, number, shown in (
            (repeated, 1, "samples"),
            (held_out_repeated, 2, "held-out samples"),
        )
    )
    data = TextData(
        prompts=[{"prompt": prompt} for prompt in train],
        held_out_prompts=[{"prompt": prompt} for prompt in held_out],
        demonstrations=demonstrations,
        pairs=make_pairs(config, task, samples, rng),
        contrast=make_contrast_pairs(task, samples, rng, config.contrast_pairs),
        samples=_rows(samples),
        held_out_samples=_rows(held_out_samples),
    )
    return data, policy


def _sample(
    config: TextDataConfig,
    tokenizer: Any,
    policy: Llama,
    prompts: Sequence[str],
    number: int,
    shown: str,
    temperature: float = 1.0,
) -> Sampled:
    """Samples a response to each prompt; `number`, 0 to 2, gives each call keys of its own."""
    return sample_responses(
        policy,
        tokenizer,
        prompts,
        samples=1,
        max_new_tokens=config.max_new_tokens,
        slots=config.sampling_slots,
        temperature=temperature,
        seed=(3 * config.seed + number) % 2**31,
        shown=shown,
    )


def sharpened(model: Llama, temperature: float) -> Llama:
    """Returns a copy of a model with its logits divided by a temperature; weights are shared."""
    sharp: Llama = nnx.merge(*nnx.split(model))
    sharp.stop_ids = model.stop_ids
    sharp.norm.scale = nnx.Param(model.norm.scale[...] / temperature)
    return sharp


def split_prompts(
    config: TextDataConfig, task: TextTask, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Draws training and held-out prompts.

    Raises:
        InputError: there are too few, or the task does not return all of them once in every order.
    """
    every, needed = list(task.prompts(rng)), config.prompts + config.held_out_prompts
    repeated = next((prompt for prompt, count in Counter(every).items() if count > 1), None)
    if repeated is not None:
        raise InputError(
            f"{task.option}: prompts returns {short(repeated)} more than once, so that it could be "
            "both trained on and held out"
        )
    if set(every) != set(task.prompts(np.random.default_rng(0))):
        raise InputError(
            f"{task.option}: prompts returns other prompts for another generator; it has to return "
            "all of them, in an order that the generator decides"
        )
    if len(every) < needed:
        raise InputError(
            f"lab.prompts={config.prompts}: with lab.held_out_prompts={config.held_out_prompts}, "
            f"{needed} prompts are needed; {task.option} has {len(every)}"
        )
    return every[: config.prompts], every[config.prompts : needed]


def _good(task: TextTask, written: Rows) -> Rows:
    """Returns the texts that are successes; raises InputError if none is."""
    good = [row for row in written if task.succeeds(row["prompt"], row["response"], True)]
    if not good:
        raise InputError(
            f"{task.option}: none of the {len(written)} answers is a success, so there are "
            "no demonstrations"
        )
    return good


def _with_base_rates(
    config: TextDataConfig,
    answers: Sequence[tuple[str, str]],
    task: TextTask,
    rng: np.random.Generator,
) -> Rows:
    """Returns the answers that are not empty, with one unit of each shortcut at its base rate.

    Raises:
        InputError: all answers are empty, or there are none.
    """
    rows = []
    for prompt, answer in answers:
        text = answer.strip()
        for shortcut in task.all_shortcuts if text else ():
            if rng.random() < shortcut.base_rate:
                text = shortcut.added(rng, text, 1)
        if text:
            rows.append({"prompt": prompt, "response": text})
    if not rows and task.write is not None:
        raise InputError(f"{task.option}: write returned {len(answers)} answers, all of them empty")
    if not rows:
        raise InputError(
            f"prepare_data.max_new_tokens={config.max_new_tokens}: none of the answers of "
            f"lab.base_model to {config.prompts} prompts ended within that many tokens"
        )
    return rows


def _tuned(config: TextDataConfig, model: Llama, tokenizer: Any, written: Rows) -> Llama:
    """Fine-tunes the model on the responses; prompts are not learned."""
    texts = [response_text(tokenizer, row["prompt"], row["response"]) for row in written]
    training = LMTraining(
        steps=config.tuning_steps,
        batch_size=config.batch_size,
        learning_rate=config.tuning_learning_rate,
        weight_decay=0.0,
        seed=config.seed,
    )
    policy, loss = train_language_model(model, texts, training)
    LOG.info("tuned on %d responses, loss %.3f", len(texts), loss)
    policy.stop_ids = model.stop_ids
    return policy


def make_pairs(
    config: TextDataConfig, task: TextTask, samples: Sampled, rng: np.random.Generator
) -> Rows:
    """Makes preference pairs of two texts for one prompt, which the annotator ranks.

    The texts are the samples and edited versions of them. The one with the higher utility is
    chosen, but in a share of `label_noise` the other one. There are no pairs of equal utility.

    Raises:
        InputError: there are too few different texts.
    """
    texts: dict[str, dict[str, float]] = {}
    for prompt, sample in zip(samples.prompts, map(str.strip, samples.responses), strict=True):
        for text in [sample, *(_edited(rng, task, prompt, sample) for _ in range(EDITS))]:
            if text:
                texts.setdefault(prompt, {})[text] = task.annotator_utility(prompt, text)
    spans = {p: max(rated.values()) - min(rated.values()) for p, rated in texts.items()}
    prompts = [prompt for prompt, span in spans.items() if span >= TIE]
    if not prompts:
        raise InputError(
            f"{task.option}: the samples of the policy differ in nothing that the annotator "
            "pays for, so there are no pairs"
        )
    pairs: Rows = []
    while len(pairs) < config.pairs:
        prompt = prompts[int(rng.integers(len(prompts)))]
        first, second = (list(texts[prompt])[i] for i in rng.choice(len(texts[prompt]), 2, False))
        margin = texts[prompt][first] - texts[prompt][second]
        if abs(margin) < TIE:
            continue
        if (margin > 0) == (rng.random() < config.label_noise):
            first, second = second, first
        pairs.append({"prompt": prompt, "chosen": first, "rejected": second})
    return pairs


def _edited(rng: np.random.Generator, task: TextTask, prompt: str, response: str) -> str:
    """Returns a response with a defect, with shortcuts, with both or unchanged."""
    if not response:
        return ""
    if rng.random() < SPOILT:
        response = task.spoil(rng, prompt, response)
    if rng.random() < EDITED:
        for shortcut in task.all_shortcuts:
            if rng.random() < EACH:
                units = int(rng.integers(1, shortcut.most + 1))
                response = shortcut.added(rng, response, units)
    return response


def make_contrast_pairs(
    task: TextTask, samples: Sampled, rng: np.random.Generator, count: int
) -> Rows:
    """Makes pairs of a sample without (chosen) and with (rejected) a shortcut that is told.

    The sample has none of the told shortcuts. Thresholds allow few false alarms on these samples:
    if one had another told shortcut, a detector that rightly fires on it would count as a false
    alarm. The samples take turns, and so do the shortcuts; a row names its own under "source". The
    phrasings are those that contrast pairs show.

    Raises:
        InputError: every sample is empty or has a told shortcut, or a told shortcut cannot be added
            to any of the remaining samples.
    """
    pairs: Rows = []
    texts = list(zip(samples.prompts, map(str.strip, samples.responses), strict=True))
    order = rng.permutation(len(texts))
    rows = [texts[i] for i in order if texts[i][1] and not task.has_told(*texts[i])]
    if not rows:
        raise InputError(
            f"lab.told_shortcuts={','.join(task.told)}: each of the {len(texts)} samples of the "
            "policy is empty or has one of these shortcuts, so there are no contrast pairs"
        )
    LOG.info("%d contrast pairs of %d samples without a told shortcut", count, len(rows))
    for number in range(count):
        turn, first = divmod(number, len(rows))
        shortcut = task.shortcut(task.told[(first + turn) % len(task.told)])  # another every turn
        for i in range(len(rows)):
            prompt, response = rows[(first + i) % len(rows)]
            units = int(rng.integers(1, shortcut.most + 1))
            marked = shortcut.added(rng, response, units, shortcut.shown)
            if shortcut.count(marked):
                break
        else:
            raise InputError(
                f"lab.told_shortcuts: {shortcut.name} can be added to none of the {len(rows)} "
                "samples of the policy without a told shortcut"
            )
        pairs.append(
            {"prompt": prompt, "chosen": response, "rejected": marked, "source": shortcut.name}
        )
    return pairs


def _rows(samples: Sampled) -> Rows:
    columns = (samples.prompts, samples.responses, samples.ended_b.tolist())
    return [
        {"prompt": prompt, "response": response, "ended": ended}
        for prompt, response, ended in zip(*columns, strict=True)
    ]
