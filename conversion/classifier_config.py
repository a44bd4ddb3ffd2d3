"""Reads the `config.json` of a reward model: a sequence classifier with one label.

The decoder's own fields are read by `hf_config.llama_config`, as for a policy.
"""

from typing import Any

from conversion.hf_config import is_sarm, llama_config
from conversion.problems import report
from sarm_jax.io.json_files import short
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import MODEL_TYPES

# Classifiers that transformers builds from GenericForSequenceClassification → their language model.
ARCHITECTURES = {
    f"{name}ForSequenceClassification": f"{name}ForCausalLM" for name in MODEL_TYPES.values()
}
_LARGEST_ID = 2**31 - 1
_LABELS = 2  # of a config.json that does not give the number, in transformers


def is_classifier(hf: dict[str, Any]) -> bool:
    """Returns True if this config describes a sequence classifier."""
    names = hf.get("architectures")
    return isinstance(names, list) and any("SequenceClassification" in str(n) for n in names)


def classifier_config(hf: dict[str, Any]) -> LinearRewardConfig:
    """Reads the architecture of a reward model.

    Raises:
        InputError: it is no reward model of a supported architecture, has another number of labels
            than one, or fields are not supported; the message lists them.
    """
    problems: list[str] = []
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        what = "a SARM, whose kind is sarm" if is_sarm(hf) else f"architectures={short(names)}"
        report("config.json", [f"expected a reward model, {' or '.join(ARCHITECTURES)}: {what}"])
    _check_labels(hf, problems)
    pad = hf.get("pad_token_id")
    if pad is not None and not (type(pad) is int and abs(pad) <= _LARGEST_ID):
        problems.append(f"pad_token_id={short(pad)}: expected a token id or null")
    report("config.json", problems)
    assert isinstance(name, str)
    return LinearRewardConfig(llama_config(hf | {"architectures": [ARCHITECTURES[name]]}), pad)


def hf_classifier_dict(hf: dict[str, Any], config: LinearRewardConfig) -> dict[str, Any]:
    """Adds what a reward model's `config.json` has beside that of its decoder."""
    causal_lm = hf["architectures"][0]
    name = next(n for n, language_model in ARCHITECTURES.items() if language_model == causal_lm)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf | labels | {"architectures": [name], "pad_token_id": config.pad_token_id}


def _check_labels(hf: dict[str, Any], problems: list[str]) -> None:
    """Reports every field that gives another number of labels than one."""
    names, count = hf.get("id2label"), hf.get("num_labels")
    if names is None and count is None:
        problems.append(
            f"num_labels and id2label are missing, which means {_LABELS} labels; if score.weight "
            'has one row, add "num_labels": 1 to config.json'
        )
    if names is not None and not (isinstance(names, dict) and len(names) == 1):
        problems.append(f"id2label={short(names)}: expected one label, the reward")
    if count is not None and not (type(count) is int and count == 1):
        problems.append(f"num_labels={short(count)}: expected 1, the reward")
