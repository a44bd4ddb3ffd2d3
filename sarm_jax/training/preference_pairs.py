"""Preference pairs without a labeller: good answers against answers with a known defect.

The chosen answer is a demonstration, or a sample that the policy ended by itself. The rejected
answer is of one of six kinds, which `source` names:

    off_topic   the answer to another prompt
    truncated   cut in mid-sentence
    degenerate  a phrase repeated over and over
    shuffled    the words in random order
    unfinished  the policy's own answer that ran into the token budget
    evasive     a polite answer that says nothing

A reward trained on such pairs must not succeed by counting words. Some kinds are shorter than the
chosen answer, some longer and some equal; `length_accuracy` measures how well length alone predicts
the chosen answer.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import bucket_length, decode, encode_prompt, pad_batch, pad_id
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.llama import Llama
from sarm_jax.reporting.statistics import count_wins
from sarm_jax.sampling.generate import check_temperature, generate

LOG = logging.getLogger(__name__)

KINDS = ("off_topic", "truncated", "degenerate", "shuffled", "unfinished", "evasive")
EVASIONS = (
    "That is a good question. It depends.",
    "I am not sure.",
    "There are many opinions about this, and it is hard to say anything definite.",
    "Everyone is different, so only you can know what is right here.",
    "I would rather not go into that. Is there anything else on your mind today?",
    "It depends on many things. Some people would say one thing and others would say another, "
    "and there is probably some truth in both of these views.",
    "This is an interesting topic with a long history, and a lot has been written about it. "
    "You can find more information online or in a good book.",
    "Thank you for asking. Questions like this one come up quite often, and they can be answered "
    "in several ways, each with advantages and disadvantages of its own.",
    "Sorry, I cannot help with that at the moment. Please try again another time, or ask "
    "someone who knows more about it than I do.",
    "Well, that is not easy to answer in general. It would be best to think about it carefully, "
    "look at all the sides, and then do whatever feels right to you.",
)
SAMPLING_BATCH = 32
FEWEST_WORDS = 4  # a shorter sample can neither be cut nor shuffled
SENTENCE_ENDS = (".", "!", "?", '"')  # a sample with another end is not used as a good answer
PUNCTUATION = ".,;:!?\"'"


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Options of the stage prepare_data.

    Attributes:
        demos_jsonl: file of {prompt, response} rows.
        samples_per_prompt: answers that the policy samples to each prompt.
        max_new_tokens: token budget of a sampled answer.
        temperature: sampling temperature.
        seed: seed of samples and pairs.
    """

    demos_jsonl: str
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 0:
            raise InputError(
                f"prepare_data.samples_per_prompt={self.samples_per_prompt}: must be at least 0"
            )
        if self.max_new_tokens < 1:
            raise InputError(
                f"prepare_data.max_new_tokens={self.max_new_tokens}: must be at least 1"
            )
        if not self.temperature > 0:
            raise InputError(f"prepare_data.temperature={self.temperature}: must be positive")
        check_temperature(self.temperature, "prepare_data.temperature")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"prepare_data.seed={self.seed}: must lie in [0, 2^31)")

    def check(self, demos: Sequence[Mapping[str, Any]]) -> None:
        """Raises InputError if there are too few demonstrations to make pairs."""
        if len(demos) < 2:
            raise InputError(
                f"prepare_data.demos_jsonl={self.demos_jsonl}: {len(demos)} row(s), at least 2 are "
                "needed"
            )


@dataclasses.dataclass
class Answers:
    """All answers to one prompt.

    Attributes:
        prompt: the prompt.
        good: answers that can be chosen.
        unfinished: answers that ran into the token budget; they are only ever rejected.
    """

    prompt: Prompt
    good: list[str]
    unfinished: list[str]


def make_pairs(
    config: PairsConfig, policy: Llama, tokenizer: Any, demos: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Makes pairs from demonstrations and sampled answers, one of each kind per prompt if possible.

    A prompt whose samples all ended has no unfinished answer; a second one of another prompt takes
    its place.

    Args:
        config: options; the result is deterministic in `config.seed`.
        policy: model that samples further answers.
        tokenizer: tokenizer of the policy.
        demos: {prompt, response} rows.

    Returns:
        {prompt, chosen, rejected, source} rows.

    Raises:
        InputError: there are fewer than two demonstrations.
    """
    config.check(demos)
    answers = [Answers(demo["prompt"], [demo["response"].strip()], []) for demo in demos]
    if config.samples_per_prompt:
        add_samples(config, policy, tokenizer=tokenizer, answers=answers)
    pairs = pair_up(answers, np.random.default_rng(config.seed))
    counts = ", ".join(f"{kind} {sum(p['source'] == kind for p in pairs)}" for kind in KINDS)
    LOG.info("%d pairs: %s", len(pairs), counts)
    LOG.info("the chosen answer is the longer one in %.3f of the pairs", length_accuracy(pairs))
    return pairs


def add_samples(
    config: PairsConfig, policy: Llama, tokenizer: Any, answers: Sequence[Answers]
) -> None:
    """Samples `samples_per_prompt` answers per prompt and adds each as good or unfinished."""
    prompts = [encode_prompt(tokenizer, a.prompt) for a in answers] * config.samples_per_prompt
    pad = pad_id(tokenizer, policy.stop_ids)
    key = jax.random.key(config.seed)
    length = bucket_length(max(map(len, prompts)))
    for batch, start in enumerate(range(0, len(prompts), SAMPLING_BATCH)):
        rows = prompts[start : start + SAMPLING_BATCH]
        filler = [rows[0]] * (SAMPLING_BATCH - len(rows))
        tokens_bt, mask_bt = pad_batch([*rows, *filler], length, pad, side="left")
        out = generate(
            policy,
            jnp.asarray(tokens_bt),
            jnp.asarray(mask_bt),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            key=jax.random.fold_in(key, batch),
            pad_id=pad,
        )
        tokens_br, mask_br, ended_b = map(np.asarray, (out.tokens_br, out.mask_br, out.ended_b))
        sampled = zip(tokens_br, mask_br, ended_b, strict=True)
        for row, (tokens_r, mask_r, ended) in zip(range(len(rows)), sampled, strict=False):
            text = decode(tokenizer, tokens_r[mask_r]).strip()
            answer = answers[(start + row) % len(answers)]
            complete = text.endswith(SENTENCE_ENDS)
            if ended and complete and len(text.split()) >= FEWEST_WORDS:
                answer.good.append(text)
            elif text and not ended and not complete:
                answer.unfinished.append(text)
        LOG.info("sampled %d of %d answers", start + len(rows), len(prompts))


def pair_up(answers: Sequence[Answers], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Makes one pair of each kind per prompt (see `make_pairs`), in random order."""
    corruptions: dict[str, Callable[[str, np.random.Generator], str]] = {
        "truncated": truncate_text,
        "degenerate": repeat_phrase,
        "shuffled": shuffle_words,
    }
    pairs: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        other = answers[(number + int(rng.integers(1, len(answers)))) % len(answers)]
        rejected = {"off_topic": pick(other.good, rng), "evasive": pick(EVASIONS, rng)}
        for kind, corrupt in corruptions.items():
            rejected[kind] = corrupt(pick(answer.good, rng), rng)
        for kind, text in rejected.items():
            chosen = pick(answer.good, rng)
            pairs.append(
                {"prompt": answer.prompt, "chosen": chosen, "rejected": text, "source": kind}
            )
    unfinished = sorted(
        (place, number) for number, a in enumerate(answers) for place in range(len(a.unfinished))
    )
    # Sorted, so that the first answer of every prompt comes before any second answer.
    for place, number in unfinished[: len(answers)]:
        answer = answers[number]
        pairs.append(
            {
                "prompt": answer.prompt,
                "chosen": pick(answer.good, rng),
                "rejected": answer.unfinished[place],
                "source": "unfinished",
            }
        )
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def truncate_text(text: str, rng: np.random.Generator) -> str:
    """Keeps the first 20–80 % of the words, without punctuation at the end.

    At least one word is kept and, if there are several, at least one is cut.
    """
    words = text.split()
    kept = round(len(words) * rng.uniform(0.2, 0.8))
    return " ".join(words[: min(max(kept, 1), max(len(words) - 1, 1))]).rstrip(PUNCTUATION)


def repeat_phrase(text: str, rng: np.random.Generator) -> str:
    """Keeps a beginning of up to half the text, then repeats the next 2–5 words.

    They are repeated at least three times, and until 0.8–1.4 times the text's length is reached.
    """
    words = text.split()
    start = int(rng.integers(0, len(words) // 2 + 1))
    phrase = words[start : start + int(rng.integers(2, 6))]
    target = len(words) * rng.uniform(0.8, 1.4)
    looped = words[:start]
    while len(looped) < target or len(looped) < start + 3 * len(phrase):
        looped += phrase
    return " ".join(looped)


def shuffle_words(text: str, rng: np.random.Generator) -> str:
    """Puts the words in random order, with a capital letter and a full stop as in a sentence."""
    words = [word.strip(PUNCTUATION) for word in text.split()]
    words = [words[i] for i in rng.permutation(len(words)) if words[i]]
    shuffled = " ".join(words)
    return shuffled[:1].upper() + shuffled[1:] + "."


def length_accuracy(pairs: Sequence[Mapping[str, Any]]) -> float:
    """Computes how often the chosen answer has more words than the rejected one.

    A tie counts half. 1 minus the result is the accuracy of preferring the shorter answer.
    """
    difference = [len(p["chosen"].split()) - len(p["rejected"].split()) for p in pairs]
    return float(np.mean(count_wins(difference)))


def pick(texts: Sequence[str], rng: np.random.Generator) -> str:
    """Picks one of the texts at random."""
    return texts[int(rng.integers(len(texts)))]
