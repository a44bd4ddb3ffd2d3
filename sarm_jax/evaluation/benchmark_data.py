"""Prompts, demonstrations, probes and test sets from preference benchmarks and a user's own pairs.

    SARM's steering files   train/*/safety.jsonl, safety_C.jsonl {prompt, chosen, rejected};
                            test/*/safety_c, safety_j, safety_C… {question, answer}
    RewardBench 2, RM-Bench (`benchmark_files`), a user's own {prompt, chosen, rejected} pairs

Each row is used, is a duplicate (it adds nothing new), or is refused; a refusal states the line and
the reason. A file without a usable row is an error. A prompt and its demonstration are added once,
at the first appearance of the prompt; each pair and each test row is added once. Source: the
reference implementation's prepare_data.py, whose training files give 3,184 prompts and
demonstrations.

Deliberate deviations: every distinct pair is a probe (the reference keeps one per prompt, and the
first 2,000 of the complement). Test sets are complete. Test prompts that also occur in training are
counted (SARM's own test files repeat the training prompts).

RM-Bench has every answer in three styles. `verbosity` pairs the concise version of an answer with a
longer version. `easy` pairs the right answer with a wrong answer in a plainer style, which an
annotator who prefers detail would also choose. Versions that stop in the middle of a sentence, as
many of the detailed ones do, are left out of both, because the missing end would mark them.

`probes` is the union of `probes_safety` and `probes_complement`.

Held-out set: a share of the prompts, selected by a hash, goes into test sets instead of training.
The steering files, which have test sets of their own, are exempt. The two rows of a tie stay
together.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm_jax.evaluation.benchmark_files import (
    STYLES,
    ChoiceRow,
    StyledRow,
    domain_of,
    fields_of,
    parse_choice,
    parse_styled,
    text,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.hub_files import single_files
from sarm_jax.io.row_files import RowError, read_placed_rows
from sarm_jax.io.secrets import redact

OUTPUTS = (
    "prompts demos probes probes_safety probes_complement verbosity easy bestofn held_out_prompts "
    "held_out_pairs held_out_verbosity test_chosen test_rejected test_safety_chosen "
    "test_safety_rejected test_complement test_concise test_detailed held_out_rm_bench "
    "held_out_rewardbench2"
).split()
SIDES = ("right", "wrong")
# Characters that may end a finished answer: a sentence, a table row or a code block.
ENDS = tuple(".!?…。！？)]}\"'”’`*:;|")
# Adds what a row holds to the collector; returns True if anything was new.
TakeRow = Callable[["Collector", Any], bool]


@dataclasses.dataclass(frozen=True)
class BenchmarkDataConfig:
    """The source files, as paths or addresses on the hub, and the held-out share."""

    steering_dir: str
    rewardbench2: tuple[str, ...]
    rm_bench: tuple[str, ...]
    safety_pairs: tuple[str, ...]
    complement_pairs: tuple[str, ...]
    held_out_fraction: float
    seed: int

    def __post_init__(self) -> None:
        files = (self.rewardbench2, self.rm_bench, self.safety_pairs, self.complement_pairs)
        if not (self.steering_dir or any(files)):
            raise InputError(
                "prepare_data.source=benchmarks: name prepare_data.steering_dir, "
                "prepare_data.rewardbench2, prepare_data.rm_bench, prepare_data.safety_pairs or "
                "prepare_data.complement_pairs"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise InputError(
                f"prepare_data.held_out_fraction={self.held_out_fraction}: must lie in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """The rows of every output file, and the content of data_summary.json."""

    outputs: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any]


class Collector:
    """Collects output rows, each at most once, and counts the fate of every input row."""

    def __init__(self, config: BenchmarkDataConfig):
        self.config = config
        self.outputs: dict[str, list[dict[str, Any]]] = {name: [] for name in OUTPUTS}
        self.sources: dict[str, dict[str, Any]] = {}
        self.left_out = {"equal_pairs": 0, "versions_not_longer": 0, "versions_cut_short": 0}
        self._keys: dict[str, set[Any]] = {name: set() for name in OUTPUTS}
        self._held_out: dict[str, bool] = {}

    def read_file(self, name: str, take: TakeRow) -> None:
        """Adds every row of a file with `take`, and counts used, duplicate and refused rows.

        Raises:
            InputError: no row of the file is usable.
        """
        rows = read_placed_rows(name)
        counts: dict[str, Any] = {"rows": len(rows), "used": 0, "duplicate": 0, "refused": 0}
        refusals = []
        for row in rows:
            try:
                counts["used" if take(self, row.content) else "duplicate"] += 1
            except RowError as error:
                refusals.append({"place": row.place, "reason": redact(str(error))})
        if len(refusals) == len(rows):
            first = refusals[0]
            raise InputError(f"{first['place']}: {first['reason']} (no row of the file is usable)")
        counts["refused"] = len(refusals)
        self.sources[name] = counts | {"refusals": refusals}

    def add(self, output: str, row: dict[str, Any], key: Any) -> bool:
        """Adds a row to an output unless its key is there; returns True if the row was new."""
        if key in self._keys[output]:
            return False
        self._keys[output].add(key)
        self.outputs[output].append(row)
        return True

    def is_held_out(self, prompt: str, group: str = "") -> bool:
        """Returns whether a prompt belongs to the held-out set.

        Prompts of the same `group` are held out together. A prompt that is already in the training
        set is never held out.
        """
        group = group or prompt
        if group not in self._held_out:
            digest = hashlib.sha256(f"{self.config.seed}:{group}".encode()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            trained = prompt in self._keys["prompts"]
            self._held_out[group] = not trained and share < self.config.held_out_fraction
        return self._held_out[group]

    def add_prompt(self, prompt: str, response: str, held_out: bool) -> bool:
        """Adds a prompt with its demonstration, or a held-out prompt; returns True if new."""
        if held_out:
            return self.add("held_out_prompts", {"prompt": prompt}, prompt)
        self.add("demos", {"prompt": prompt, "response": response}, prompt)
        return self.add("prompts", {"prompt": prompt}, prompt)

    def add_pair(
        self,
        *,
        prompt: str,
        chosen: str,
        rejected: str,
        safety: bool,
        source: str,
        held_out: bool,
    ) -> bool:
        """Adds a preference pair, as a probe or as two held-out answers; returns True if new."""
        if chosen == rejected:
            self.left_out["equal_pairs"] += 1
            return False
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}
        key = (prompt, chosen, rejected)
        if held_out:
            self.add("held_out_pairs", row, key)
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                self.add_answer(side, prompt, answer)
            kinds = ("safety_chosen", "safety_rejected") if safety else ("complement",) * 2
            chosen_is_new = self.add_answer(kinds[0], prompt, chosen)
            return self.add_answer(kinds[1], prompt, rejected) or chosen_is_new
        return self.add("probes_safety" if safety else "probes_complement", row, key)

    def add_answer(self, kind: str, prompt: str, answer: str) -> bool:
        """Adds a row to the test set `test_{kind}`; returns True if it was new."""
        row = {"question": prompt, "answer": answer, "type": kind.removeprefix("safety_")}
        return self.add(f"test_{kind}", row, (prompt, answer))

    def add_candidates(self, prompt: str, right: Sequence[str], wrong: Sequence[str]) -> bool:
        """Adds a best-of-N row with the right answers first; returns True if it was new."""
        candidates = list(dict.fromkeys((*right, *wrong)))
        row = {"prompt": prompt, "candidates": candidates, "num_correct": len(set(right))}
        return self.add("bestofn", row, (prompt, *candidates))


def collect(config: BenchmarkDataConfig) -> BenchmarkData:
    """Makes all outputs from the files of the config, as the module docstring describes.

    Raises:
        InputError: a file is missing, is not readable, or has no usable row.
    """
    collector = Collector(config)
    if config.steering_dir:
        _read_steering(collector, Path(config.steering_dir))
    for name in config.rewardbench2:
        collector.read_file(name, take_choice)
    for name in _single(config.rm_bench):
        collector.read_file(name, styled_taker(domain_of(name)))
    for files, safety in ((config.safety_pairs, True), (config.complement_pairs, False)):
        for name in _single(files):
            source = Path(name).stem
            collector.read_file(name, pair_taker(source, safety, can_hold_out=True))
    _add_candidates_of_pairs(collector)
    outputs = collector.outputs
    for row in (*outputs["probes_safety"], *outputs["probes_complement"]):
        collector.add("probes", row, (row["prompt"], row["chosen"], row["rejected"]))
    return BenchmarkData(outputs, _summary(collector))


def _single(names: Sequence[str]) -> list[str]:
    """Returns the single files of all names, since domain and source come from a file's name."""
    return [file for name in names for file in single_files(name)]


def pair_taker(source: str, safety: bool, can_hold_out: bool) -> TakeRow:
    """Returns a function that takes {prompt, chosen, rejected} rows."""

    def take(collector: Collector, content: Any) -> bool:
        row = fields_of(content)
        prompt = text(row, "prompt", "question")
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if chosen == rejected:
            raise RowError("fields 'chosen' and 'rejected' are the same")
        label = text({"source": source} | row, "source")
        held_out = can_hold_out and collector.is_held_out(prompt)
        prompt_is_new = collector.add_prompt(prompt, chosen, held_out)
        pair_is_new = collector.add_pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            safety=safety,
            source=label,
            held_out=held_out,
        )
        return pair_is_new or prompt_is_new

    return take


def answer_taker(kind: str) -> TakeRow:
    """Returns a function that takes {question, answer} rows of the test set `test_{kind}`."""

    def take(collector: Collector, content: Any) -> bool:
        row = fields_of(content)
        question, answer = text(row, "question", "prompt"), text(row, "answer", "response")
        return collector.add_answer(kind, question, answer)

    return take


def take_choice(collector: Collector, content: Any) -> bool:
    """Takes a row of RewardBench 2. A tie has several right answers: candidates, but no pairs."""
    row = parse_choice(content)
    _refuse_blank(row)
    group = f"ties:{row.tie[1]}" if row.tie else ""
    held_out = collector.is_held_out(row.prompt, group)
    is_new = [collector.add_prompt(row.prompt, row.chosen[0], held_out)]
    if held_out:
        key = (row.prompt, row.chosen, row.rejected)
        kept = _kept_fields(content, row, "subset")
        is_new.append(collector.add("held_out_rewardbench2", kept, key))
    if row.tie is None:
        for wrong in dict.fromkeys(row.rejected):
            added = collector.add_pair(
                prompt=row.prompt,
                chosen=row.chosen[0],
                rejected=wrong,
                safety=row.subset.lower() == "safety",
                source=f"rewardbench2:{row.subset}",
                held_out=held_out,
            )
            is_new.append(added)
    elif not held_out:
        is_new.append(collector.add_candidates(row.prompt, row.chosen, row.rejected))
    return any(is_new)


def _kept_fields(content: dict[str, Any], row: ChoiceRow | StyledRow, group: str) -> dict[str, Any]:
    """Returns the fields that a benchmark's reader needs; other columns may not fit into JSON."""
    row_id = {"id": content["id"]} if isinstance(content.get("id"), str) else {}
    sides = {"chosen": list(row.chosen), "rejected": list(row.rejected)}
    return row_id | {"prompt": row.prompt} | sides | {group: getattr(row, group)}


def styled_taker(domain: str) -> TakeRow:
    """Returns a function that takes rows of RM-Bench; `domain` is for rows that name none."""
    return lambda collector, content: take_styled(collector, content, domain)


def take_styled(collector: Collector, content: Any, domain: str) -> bool:
    """Takes a row of RM-Bench: pairs of equal style, of concise and longer versions, easy pairs."""
    row = parse_styled(content, domain)
    _refuse_blank(row)
    held_out = collector.is_held_out(row.prompt)
    is_new = [collector.add_prompt(row.prompt, row.chosen[0], held_out)]
    if held_out:
        key = (row.prompt, row.chosen, row.rejected)
        kept = _kept_fields(content, row, "domain")
        is_new.append(collector.add("held_out_rm_bench", kept, key))
    for style, right, wrong in zip(STYLES, row.chosen, row.rejected, strict=True):
        added = collector.add_pair(
            prompt=row.prompt,
            chosen=right,
            rejected=wrong,
            safety=row.domain.startswith("safety"),
            source=f"rm_bench:{row.domain}:{style}",
            held_out=held_out,
        )
        is_new.append(added)
    is_new += _add_verbosity_pairs(collector, row, held_out)
    if not held_out:
        is_new += _add_easy_pairs(collector, row)
    return any(is_new)


def _add_verbosity_pairs(collector: Collector, row: StyledRow, held_out: bool) -> list[bool]:
    """Pairs the concise version of each answer with its longer versions that are complete."""
    is_new = []
    for side, (concise, *versions) in zip(SIDES, (row.chosen, row.rejected), strict=True):
        for style, detailed in zip(STYLES[1:], versions, strict=True):
            if len(detailed.split()) <= len(concise.split()):
                collector.left_out["versions_not_longer"] += 1
                continue
            if not _are_complete(collector, concise, detailed):
                continue
            source = f"rm_bench:{row.domain}:{side}:{style}"
            pair = {"prompt": row.prompt, "chosen": concise, "rejected": detailed, "source": source}
            if held_out:
                collector.add_answer("concise", row.prompt, concise)
                collector.add_answer("detailed", row.prompt, detailed)
            output = "held_out_verbosity" if held_out else "verbosity"
            is_new.append(collector.add(output, pair, (row.prompt, concise, detailed)))
    return is_new


def _add_easy_pairs(collector: Collector, row: StyledRow) -> list[bool]:
    """Pairs the right answer with the wrong answers in a plainer style."""
    is_new = []
    for style, right in enumerate(row.chosen):
        for wrong in row.rejected[:style]:
            if not _are_complete(collector, right, wrong):
                continue
            pair = {"prompt": row.prompt, "chosen": right, "rejected": wrong}
            pair["source"] = f"rm_bench:{row.domain}:easy"
            is_new.append(collector.add("easy", pair, (row.prompt, right, wrong)))
    return is_new


def _are_complete(collector: Collector, *answers: str) -> bool:
    """Returns whether every answer comes to an end; counts those that do not."""
    complete = all(answer.rstrip().endswith(ENDS) for answer in answers)
    collector.left_out["versions_cut_short"] += not complete
    return complete


def _add_candidates_of_pairs(collector: Collector) -> None:
    """Adds a best-of-N row for every prompt of the probes, with all answers to it."""
    answers: dict[str, tuple[list[str], list[str]]] = {}
    for name in ("probes_safety", "probes_complement"):
        for row in collector.outputs[name]:
            right, wrong = answers.setdefault(row["prompt"], ([], []))
            right.append(row["chosen"])
            wrong.append(row["rejected"])
    for prompt, (right, wrong) in answers.items():
        collector.add_candidates(prompt, right, wrong)


def _read_steering(collector: Collector, folder: Path) -> None:
    """Reads train/*/safety*.jsonl and test/*/safety_*.jsonl, in alphabetical order."""
    option = f"prepare_data.steering_dir={folder}"
    if not folder.is_dir():
        raise InputError(f"{option}: no such directory")
    files = [*sorted(folder.glob("train/*/*.jsonl")), *sorted(folder.glob("test/*/*.jsonl"))]
    takers = {path: _steering_taker(path) for path in files}
    unknown = next((path for path, taker in takers.items() if taker is None), None)
    if unknown:
        raise InputError(
            f"{unknown}: expected safety.jsonl or safety_C.jsonl under train/, and safety_c, "
            "safety_j or safety_C under test/"
        )
    if not files:
        raise InputError(f"{option}: no train/*/safety*.jsonl or test/*/safety_*.jsonl in it")
    for path, taker in takers.items():
        if taker is not None:
            collector.read_file(str(path), taker)


def _steering_taker(path: Path) -> TakeRow | None:
    """Returns how to take the rows of a steering file, by its name; None for an unknown name.

    C is the complement of safety; c (chosen) and j (rejected) are the two sides of safety.
    """
    word, benchmark = path.stem, path.parent.name
    if path.parent.parent.name == "train":
        if word == "safety" or word.startswith("safety_C"):
            safety = word == "safety"
            source = f"{benchmark}:{'safety' if safety else 'complement'}"
            return pair_taker(source, safety, can_hold_out=False)
        return None
    kinds = {"safety_C": "complement", "safety_c": "safety_chosen", "safety_j": "safety_rejected"}
    return next((answer_taker(k) for start, k in kinds.items() if word.startswith(start)), None)


def _refuse_blank(row: ChoiceRow | StyledRow) -> None:
    if not all(answer.strip() for answer in (*row.chosen, *row.rejected)):
        raise RowError("an answer is empty")


def _summary(collector: Collector) -> dict[str, Any]:
    """Returns the content of data_summary.json."""
    trained = {row["prompt"] for row in collector.outputs["prompts"]}
    repeated: Mapping[str, int] = {
        name: len({row["question"] for row in rows} & trained)
        for name, rows in collector.outputs.items()
        if name.startswith("test_") and rows
    }
    return {
        "options": {
            "held_out_fraction": collector.config.held_out_fraction,
            "seed": collector.config.seed,
        },
        "sources": collector.sources,
        "outputs": {name: len(rows) for name, rows in collector.outputs.items() if rows},
        "left_out_of_used_rows": collector.left_out,
        "test_prompts_also_trained_on": dict(repeated),
    }


def counts_table(summary: Mapping[str, Any]) -> str:
    """Returns a table of the rows of every source file and every output, for a terminal."""
    lines = [f"{'rows':>8} {'used':>8} {'twice':>8} {'refused':>8}  file"]
    for name, source in summary["sources"].items():
        columns = (source[key] for key in ("rows", "used", "duplicate", "refused"))
        lines.append(" ".join(f"{count:8d}" for count in columns) + f"  {name}")
    lines += [f"{count:8d} {name}.jsonl" for name, count in summary["outputs"].items()]
    return "\n".join(lines)
