"""Guards: when each is active, when none is, and that a resumed run gives the same warnings."""

import logging

import pytest

from ppo.options import guard_config, train_config
from ppo.tracking.guards import GUARDS, Watch
from sarm_jax.io.errors import InputError
from tests.tiny_models import guard_options, reward_options

# The last step of the lab's full method (seed 0) and of its baseline, which has lost its gold
# reward by then, without the columns that no guard reads.
HEALTHY = {
    "step": 0, "skipped_updates": 0, "ratio_0_max_dev": 0.0, "ref_kl": 5.4, "disc_acc": 0.89,
    "response_length_mean": 4.4, "kl_penalty": 0.1, "entropy": 0.3, "distinct_responses": 0.9,
    "eos_fraction": 1.0, "approx_kl": 0.006, "clip_fraction": 0.05,
}  # fmt: skip
HACKED = HEALTHY | {"ref_kl": 24.9, "response_length_mean": 14.0, "entropy": 1.4}
BAD = {
    "nonfinite": {"skipped_updates": 1},
    "ratio": {"ratio_0_max_dev": 2e-5},
    "reference_kl": {"ref_kl": 24.9, "response_length_mean": 14.0},
    "update_kl": {"approx_kl": 0.19},
    "discriminator": {"disc_acc": 0.99},
    "entropy": {"entropy": 0.01},
    "identical_responses": {"distinct_responses": 1 / 8},
    "no_eos": {"eos_fraction": 0.0},
}
CONFIG = guard_options()


def rows(row, count):
    return [row | {"step": step} for step in range(count)]


def test_a_healthy_run_has_no_warnings():
    watch = Watch(CONFIG, [2.0, 0.5])
    assert not any(watch.check(row) for row in rows(HEALTHY, 10))
    assert watch.warnings == []


def test_a_hacked_run_is_not_called_healthy():
    watch = Watch(CONFIG)
    held = [watch.check(row) for row in rows(HACKED, 5)]
    assert held == [[], [], ["reference_kl"], ["reference_kl"], ["reference_kl"]]
    (warning,) = watch.warnings
    assert (warning["guard"], warning["first_step"], warning["steps"]) == ("reference_kl", 2, 3)
    assert "ref_kl=24.9" in warning["message"] and "ppo.kl_coef" in warning["message"]


@pytest.mark.parametrize("name", BAD)
def test_each_guard_fires_alone_and_is_logged_once(name, caplog):
    watch = Watch(CONFIG)
    with caplog.at_level(logging.WARNING):
        held = [watch.check(row) for row in rows(HEALTHY | BAD[name], 4)]
    at_once = next(guard.at_once for guard in GUARDS if guard.name == name)
    assert at_once == (name in ("nonfinite", "ratio"))
    assert [bool(names) for names in held] == ([True] * 4 if at_once else [False] * 2 + [True] * 2)
    assert {guard for names in held for guard in names} == {name}
    assert len(caplog.records) == 1 and f"guard {name}:" in caplog.text


def test_a_spike_does_not_fire():
    watch = Watch(CONFIG)
    for step in range(12):
        spike = {"ref_kl": 660.0} if step % 3 else {}
        assert watch.check(HEALTHY | spike | {"step": step}) == []


def test_every_guard_is_covered():
    assert {guard.name for guard in GUARDS} == {*BAD, "reward_scale"}


@pytest.mark.parametrize(
    ("alphas", "unit", "std", "fires"),
    [
        ((0.1,) * 3, "score", 0.05, False),  # Llama-SARM-4B: 2 sd
        ((0.1,) * 3, "score", 1.7, True),  # the same α on a score forty times as wide
        ((0.1,) * 3, "score", 0.005, True),
        ((2.0, 0.0), "sd", 0.005, False),  # 0 switches a penalty off
        ((), "score", 1.0, False),
    ],
)
def test_penalties_far_from_the_scale_of_the_score(alphas, unit, std, fires):
    taus, features = (1.0,) * len(alphas), tuple(range(len(alphas)))
    reward = reward_options(
        penalize_features=features, tau_values=taus, alpha_values=alphas, unit=unit
    )
    watch = Watch(CONFIG, reward.alphas_sd(std))
    assert watch.check(HEALTHY) == (["reward_scale"] if fires else [])


def test_a_run_without_a_discriminator_has_no_warning_about_it():
    row = {name: value for name, value in HEALTHY.items() if name not in ("disc_acc", "kl_penalty")}
    watch = Watch(CONFIG)
    assert not any(watch.check(row) for row in rows(row, 4))


def test_the_same_rows_give_the_same_warnings_after_a_resumption():
    story = [HEALTHY, *[HACKED] * 2, HEALTHY | BAD["no_eos"], *[HACKED | BAD["no_eos"]] * 4]
    story = [row | {"step": step} for step, row in enumerate(story)]
    whole, parts = Watch(CONFIG), Watch(CONFIG)
    for row in story:
        whole.check(row)
    for row in story[:5]:  # of an earlier process
        Watch(CONFIG).check(row)
        parts.check(row)
    for row in story[5:]:
        parts.check(row)
    assert whole.warnings == parts.warnings and len(whole.warnings) == 2


def test_stop_names_guards(base_config):
    section = base_config.guards.to_dict()
    chosen = guard_config(section | {"stop": "reference_kl, no_eos"})
    assert chosen.stops("no_eos") and not chosen.stops("entropy")
    assert all(guard_config(section | {"stop": "all"}).stops(guard.name) for guard in GUARDS)
    assert guard_config(section) == CONFIG == train_config(base_config).guards
    for bad, message in (
        ({"stop": "kl"}, "no guard is called 'kl'; expected all or some of nonfinite, ratio"),
        ({"steps": 0}, "guards.steps=0"),
        ({"entropy": float("nan")}, "guards.entropy=nan"),
        ({"ref_kl": -1.0}, "guards.ref_kl=-1.0"),
    ):
        with pytest.raises(InputError, match=message):
            guard_config(section | bad)


def test_long_responses_may_be_far_in_sum():
    watch = Watch(CONFIG)
    row = HEALTHY | {"ref_kl": 20.0, "response_length_mean": 300.0}
    assert not any(watch.check(row | {"step": n}) for n in range(5))
