"""Prompts, demonstrations, probes and test sets from preference benchmarks and own pairs.

    SARM's steering files   train/*/safety.jsonl, safety_C.jsonl {prompt, chosen, rejected};
                            test/*/safety_c, safety_j, safety_C… {question, answer}
    RewardBench 2, RM-Bench (`benchmark_files`), own pairs {prompt, chosen, rejected}

Each row is used, a duplicate (it adds nothing new), or refused, with its line and the reason. A
file of which no row can be used is an error. A prompt, and its demonstration, is taken once, at
its first appearance; pairs and test rows once each. Source: the reference implementation's
prepare_data.py, whose training files give 3,184 prompts and demonstrations.

Deliberate deviations: every distinct pair is a probe (the reference keeps one per prompt, and the
first 2,000 of the complement); test sets are whole; test prompts that also occur in training are
counted (SARM's own test files repeat the training prompts).

RM-Bench has every answer in three styles. `verbosity` has the concise version of an answer against
a longer one; `easy` the right answer against a wrong one in a plainer style, which is what an
annotator who likes detail would choose. Versions that stop in the middle (many of the detailed ones
do) are left out of both: what marks them is the missing end.

`probes` are both kinds of pairs, one after the other.

Held out: a share of the prompts of everything but the steering files, drawn by a hash, goes into
test sets instead of training; the two rows of a tie stay together.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.evaluation.benchmark_files import (
    STYLES,
    ChoiceRow,
    RowError,
    StyledRow,
    domain_of,
    fields_of,
    parse_choice,
    parse_styled,
    read_rows,
    text,
)
from sarm_jax.io.errors import InputError

OUTPUTS = (
    "prompts demos probes probes_safety probes_complement verbosity easy bestofn held_out_prompts "
    "held_out_pairs held_out_verbosity test_chosen test_rejected test_safety_chosen "
    "test_safety_rejected test_complement test_concise test_detailed held_out_rm_bench "
    "held_out_rewardbench2"
).split()
SIDES = ("right", "wrong")
ENDS = tuple(".!?…。！？)]}\"'”’`*:;|")  # what may stand after a last sentence, row or code block
Take = Callable[["Collector", Any], bool]


@dataclasses.dataclass(frozen=True)
class BenchmarkDataConfig:
    """Where the data is. Files are (what the user called it, its path) pairs."""

    steering_dir: str
    rewardbench2: tuple[tuple[str, Path], ...]
    rm_bench: tuple[tuple[str, Path], ...]
    safety_pairs: tuple[tuple[str, Path], ...]
    complement_pairs: tuple[tuple[str, Path], ...]
    held_out_fraction: float
    seed: int

    def __post_init__(self) -> None:
        files = (self.rewardbench2, self.rm_bench, self.safety_pairs, self.complement_pairs)
        if not (self.steering_dir or any(files)):
            raise InputError(
                "prepare_data.source=benchmarks: name prepare_data.steering_dir, rewardbench2, "
                "rm_bench, safety_pairs or complement_pairs"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise InputError(
                f"prepare_data.held_out_fraction={self.held_out_fraction}: must lie in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """`outputs`: the rows of every file; `summary`: the content of data_summary.json."""

    outputs: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any]


class Collector:
    """The rows so far, each at most once, and what became of every row of every file."""

    def __init__(self, config: BenchmarkDataConfig):
        self.config = config
        self.outputs: dict[str, list[dict[str, Any]]] = {name: [] for name in OUTPUTS}
        self.sources: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, set[Any]] = {name: set() for name in OUTPUTS}
        self.left_out = {"equal_pairs": 0, "versions_not_longer": 0, "versions_cut_short": 0}
        self._held_out: dict[str, bool] = {}

    def read(self, name: str, path: Path, take: Take) -> None:
        """Takes every row of a file."""
        rows = read_rows(path, name)
        found: dict[str, Any] = {"rows": len(rows), "used": 0, "duplicate": 0, "refused": 0}
        refusals = []
        for row in rows:
            try:
                found["used" if take(self, row.content) else "duplicate"] += 1
            except RowError as error:
                refusals.append({"place": row.place, "reason": str(error)})
        if len(refusals) == len(rows):
            first = refusals[0]
            raise InputError(f"{first['place']}: {first['reason']} (no row of the file is usable)")
        found["refused"] = len(refusals)
        self.sources[name] = found | {"refusals": refusals}

    def add(self, output: str, row: dict[str, Any], key: Any) -> bool:
        """Whether the row was new."""
        if key in self._seen[output]:
            return False
        self._seen[output].add(key)
        self.outputs[output].append(row)
        return True

    def held_out(self, prompt: str, group: str = "") -> bool:
        """Whether a prompt belongs to the tests; one that is trained on already never does."""
        group = group or prompt
        if group not in self._held_out:
            digest = hashlib.sha256(f"{self.config.seed}:{group}".encode()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            trained = prompt in self._seen["prompts"]
            self._held_out[group] = not trained and share < self.config.held_out_fraction
        return self._held_out[group]

    def prompt(self, prompt: str, response: str, held_out: bool) -> bool:
        """A prompt with its demonstration, or a held-out prompt; whether it was new."""
        if held_out:
            return self.add("held_out_prompts", {"prompt": prompt}, prompt)
        self.add("demos", {"prompt": prompt, "response": response}, prompt)
        return self.add("prompts", {"prompt": prompt}, prompt)

    def pair(
        self, prompt: str, chosen: str, rejected: str, safety: bool, source: str, held_out: bool
    ) -> bool:
        """A preference pair: a probe, or two held-out answers; whether anything was new."""
        if chosen == rejected:
            self.left_out["equal_pairs"] += 1
            return False
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}
        key = (prompt, chosen, rejected)
        if held_out:
            self.add("held_out_pairs", row, key)
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                self.answer(side, prompt, answer)
            kinds = ("safety_chosen", "safety_rejected") if safety else ("complement",) * 2
            first = self.answer(kinds[0], prompt, chosen)
            return self.answer(kinds[1], prompt, rejected) or first
        return self.add("probes_safety" if safety else "probes_complement", row, key)

    def answer(self, kind: str, prompt: str, answer: str) -> bool:
        """A row of the test set `test_{kind}`; whether it was new."""
        row = {"question": prompt, "answer": answer, "type": kind.removeprefix("safety_")}
        return self.add(f"test_{kind}", row, (prompt, answer))


def collect(config: BenchmarkDataConfig) -> BenchmarkData:
    """Reads every file of the config; see the module. Raises InputError for bad files."""
    found = Collector(config)
    if config.steering_dir:
        _read_steering(found, Path(config.steering_dir))
    for name, path in config.rewardbench2:
        found.read(name, path, take_choice)
    for name, path in config.rm_bench:
        found.read(name, path, styled_taker(domain_of(name)))
    for files, safety in ((config.safety_pairs, True), (config.complement_pairs, False)):
        for name, path in files:
            source = Path(name).stem
            found.read(name, path, pair_taker(source, safety, can_hold_out=True))
    _add_candidates(found)
    for row in (*found.outputs["probes_safety"], *found.outputs["probes_complement"]):
        found.add("probes", row, (row["prompt"], row["chosen"], row["rejected"]))
    return BenchmarkData(found.outputs, _summary(found))


def pair_taker(source: str, safety: bool, can_hold_out: bool) -> Take:
    """Takes {prompt, chosen, rejected} rows."""

    def take(into: Collector, content: Any) -> bool:
        row = fields_of(content)
        prompt = text(row, "prompt", "question")
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if chosen == rejected:
            raise RowError("fields 'chosen' and 'rejected' are the same")
        label = text({"source": source} | row, "source")
        held_out = can_hold_out and into.held_out(prompt)
        fresh = into.prompt(prompt, chosen, held_out)
        return into.pair(prompt, chosen, rejected, safety, label, held_out) or fresh

    return take


def answer_taker(kind: str) -> Take:
    """Takes {question, answer} rows of a test set."""

    def take(into: Collector, content: Any) -> bool:
        row = fields_of(content)
        return into.answer(kind, text(row, "question", "prompt"), text(row, "answer", "response"))

    return take


def take_choice(into: Collector, content: Any) -> bool:
    """A row of RewardBench 2. A tie has several right answers: it gives candidates, no pairs."""
    row = parse_choice(content)
    _refuse_blank(*row.chosen, *row.rejected)
    group = f"ties:{row.tie[1]}" if row.tie else ""
    held_out = into.held_out(row.prompt, group)
    fresh = [into.prompt(row.prompt, row.chosen[0], held_out)]
    if held_out:
        key = (row.prompt, row.chosen, row.rejected)
        fresh.append(into.add("held_out_rewardbench2", _kept(content, row, "subset"), key))
    if row.tie is None:
        safety, source = row.subset.lower() == "safety", f"rewardbench2:{row.subset}"
        for wrong in dict.fromkeys(row.rejected):
            fresh.append(into.pair(row.prompt, row.chosen[0], wrong, safety, source, held_out))
    elif not held_out:
        fresh.append(_candidates(into, row.prompt, row.chosen, row.rejected))
    return any(fresh)


def _kept(content: dict[str, Any], row: ChoiceRow | StyledRow, group: str) -> dict[str, Any]:
    """The row as it is read again; other columns may hold what JSON cannot."""
    name = {"id": content["id"]} if isinstance(content.get("id"), str) else {}
    sides = {"chosen": list(row.chosen), "rejected": list(row.rejected)}
    return name | {"prompt": row.prompt} | sides | {group: getattr(row, group)}


def styled_taker(domain: str) -> Take:
    """Takes rows of RM-Bench, of this domain where they name none."""
    return lambda into, content: take_styled(into, content, domain)


def take_styled(into: Collector, content: Any, domain: str) -> bool:
    """A row of RM-Bench: pairs of equal style, and short against long versions of one answer."""
    row = parse_styled(content, domain)
    _refuse_blank(*row.chosen, *row.rejected)
    held_out, safety = into.held_out(row.prompt), row.domain.startswith("safety")
    fresh = [into.prompt(row.prompt, row.chosen[0], held_out)]
    if held_out:
        key = (row.prompt, row.chosen, row.rejected)
        fresh.append(into.add("held_out_rm_bench", _kept(content, row, "domain"), key))
    for style, right, wrong in zip(STYLES, row.chosen, row.rejected, strict=True):
        source = f"rm_bench:{row.domain}:{style}"
        fresh.append(into.pair(row.prompt, right, wrong, safety, source, held_out))
    for side, answers in zip(SIDES, (row.chosen, row.rejected), strict=True):
        for style, version in zip(STYLES[1:], answers[1:], strict=True):
            source = f"rm_bench:{row.domain}:{side}:{style}"
            fresh.append(_contrast(into, row.prompt, answers[0], version, source, held_out))
    for place, right in enumerate(row.chosen):
        for wrong in row.rejected[:place]:
            pair = {"prompt": row.prompt, "chosen": right, "rejected": wrong}
            if not held_out and _whole(into, right, wrong):
                pair["source"] = f"rm_bench:{row.domain}:easy"
                fresh.append(into.add("easy", pair, (row.prompt, right, wrong)))
    return any(fresh)


def _contrast(
    into: Collector, prompt: str, concise: str, detailed: str, source: str, held_out: bool
) -> bool:
    """The concise version of an answer against a longer one; none if it is not longer."""
    if len(detailed.split()) <= len(concise.split()):
        into.left_out["versions_not_longer"] += 1
        return False
    if not _whole(into, concise, detailed):
        return False
    row = {"prompt": prompt, "chosen": concise, "rejected": detailed, "source": source}
    if held_out:
        into.answer("concise", prompt, concise)
        into.answer("detailed", prompt, detailed)
    output = "held_out_verbosity" if held_out else "verbosity"
    return into.add(output, row, (prompt, concise, detailed))


def _whole(into: Collector, *answers: str) -> bool:
    """Whether every answer comes to an end."""
    whole = all(answer.rstrip().endswith(ENDS) for answer in answers)
    into.left_out["versions_cut_short"] += not whole
    return whole


def _candidates(into: Collector, prompt: str, right: tuple, wrong: tuple) -> bool:
    candidates = list(dict.fromkeys((*right, *wrong)))
    row = {"prompt": prompt, "candidates": candidates, "num_correct": len(set(right))}
    return into.add("bestofn", row, (prompt, *candidates))


def _add_candidates(into: Collector) -> None:
    """Best-of-N rows of the pairs: all answers to a prompt, the right ones first."""
    answers: dict[str, tuple[list[str], list[str]]] = {}
    for name in ("probes_safety", "probes_complement"):
        for row in into.outputs[name]:
            right, wrong = answers.setdefault(row["prompt"], ([], []))
            right.append(row["chosen"])
            wrong.append(row["rejected"])
    for prompt, (right, wrong) in answers.items():
        _candidates(into, prompt, tuple(right), tuple(wrong))


def _read_steering(into: Collector, folder: Path) -> None:
    """train/*/safety*.jsonl and test/*/safety_*.jsonl, in alphabetical order."""
    name = f"prepare_data.steering_dir={folder}"
    if not folder.is_dir():
        raise InputError(f"{name}: no such directory")
    files = [*sorted(folder.glob("train/*/*.jsonl")), *sorted(folder.glob("test/*/*.jsonl"))]
    takers = {path: _steering_taker(path) for path in files}
    unknown = next((path for path, taker in takers.items() if taker is None), None)
    if unknown:
        raise InputError(
            f"{unknown}: expected safety.jsonl or safety_C.jsonl under train/, and safety_c, "
            "safety_j or safety_C under test/"
        )
    if not files:
        raise InputError(f"{name}: no train/*/safety*.jsonl or test/*/safety_*.jsonl in it")
    for path, taker in takers.items():
        if taker is not None:
            into.read(str(path), path, taker)


def _steering_taker(path: Path) -> Take | None:
    """By name: C is the complement of safety, c (chosen) and j (rejected) its two sides."""
    word, benchmark = path.stem, path.parent.name
    if path.parent.parent.name == "train":
        if word == "safety" or word.startswith("safety_C"):
            safety = word == "safety"
            source = f"{benchmark}:{'safety' if safety else 'complement'}"
            return pair_taker(source, safety, can_hold_out=False)
        return None
    kinds = {"safety_C": "complement", "safety_c": "safety_chosen", "safety_j": "safety_rejected"}
    return next((answer_taker(k) for start, k in kinds.items() if word.startswith(start)), None)


def _refuse_blank(*answers: str) -> None:
    if not all(answer.strip() for answer in answers):
        raise RowError("an answer is empty")


def _summary(found: Collector) -> dict[str, Any]:
    trained = {row["prompt"] for row in found.outputs["prompts"]}
    tests: Mapping[str, int] = {
        name: len({row["question"] for row in rows} & trained)
        for name, rows in found.outputs.items()
        if name.startswith("test_") and rows
    }
    return {
        "options": {
            "held_out_fraction": found.config.held_out_fraction,
            "seed": found.config.seed,
        },
        "sources": found.sources,
        "outputs": {name: len(rows) for name, rows in found.outputs.items() if rows},
        "left_out_of_used_rows": found.left_out,
        "test_prompts_also_trained_on": dict(tests),
    }


def counts_table(summary: Mapping[str, Any]) -> str:
    """What became of every file's rows, and how many rows every output has, for a terminal."""
    lines = [f"{'rows':>8} {'used':>8} {'twice':>8} {'refused':>8}  file"]
    for name, found in summary["sources"].items():
        columns = (found[key] for key in ("rows", "used", "duplicate", "refused"))
        lines.append(" ".join(f"{count:8d}" for count in columns) + f"  {name}")
    lines += [f"{count:8d} {name}.jsonl" for name, count in summary["outputs"].items()]
    return "\n".join(lines)
