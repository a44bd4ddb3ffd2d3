"""The guide for users of the reference: all that it names exists, and nothing is missing."""

import re

from absl import flags
from ml_collections import ConfigDict

from configs import base
from pipeline import cli  # noqa: F401  (defines the flags)
from pipeline import stage as stages
from tests.paths import ROOT
from tests.reference_flags import PPO_FLAGS

GUIDE = (ROOT / "docs/guides/coming_from_the_reference.md").read_text(encoding="utf-8")
TABLES = [row.split("|")[1:-1] for row in GUIDE.splitlines() if row.startswith("| ")]


def exists(field: str) -> bool:
    value = base.get_config()
    for part in field.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return False
        value = value[part]
    return True


def test_options_and_stages_exist():
    for field in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", GUIDE):
        assert exists(field), field
    for stage in re.findall(r"--stage=(\w+)", GUIDE):
        assert stage in (*stages.names(), "all"), stage
    for config in re.findall(r"configs/(\w+)\.py", GUIDE):
        assert (ROOT / "configs" / f"{config}.py").is_file(), config


def test_every_flag_of_its_ppo_program_has_a_row():
    named = {flag for row in TABLES for flag in re.findall(r"--([a-z_]+)", row[0])}
    assert named >= set(PPO_FLAGS)
    for flag in PPO_FLAGS:
        assert flag in flags.FLAGS


def test_what_is_absent_has_a_reason():
    for row in TABLES:
        for cell in row[1:]:
            _, word, reason = cell.partition("absent")
            assert not word or len(reason.split()) > 1, row


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", GUIDE, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
