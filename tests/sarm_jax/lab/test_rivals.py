"""The comparison of the penalty with its rivals, by hand, and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from sarm_jax.lab import rivals
from sarm_jax.lab.pool import evading_gain


def run(seed, golds, kls, **last):
    curve = [
        {"step": 2 * i, "gold": gold, "ref_kl": kl, "told": 0.5, "told_undetected": 0.0,
         "near_tau": 0.1}
        for i, (gold, kl) in enumerate(zip(golds, kls, strict=True))
    ]  # fmt: skip
    curve[-1] |= last
    return {
        "seed": seed,
        "curve": curve,
        "gold_start": golds[0],
        "gold_peak": max(golds),
        "gold_final": golds[-1],
        "ref_kl_final": kls[-1],
    }


def test_gold_at_a_budget_is_that_of_the_last_evaluation_within_it():
    falling = run(0, [0.3, 0.6, 0.7, 0.2, 0.9], [0.0, 1.9, 2.1, 6.0, 1.0])
    assert rivals.gold_at_budget(falling, 2.0) == 0.6
    assert rivals.gold_at_budget(falling, 5.0) == 0.7  # not the end, although its KL is small
    assert rivals.gold_at_budget(falling, 10.0) == 0.9
    estimate = run(0, [0.3, 0.6], [0.4, 3.0])
    assert rivals.gold_at_budget(estimate, 0.1) == 0.3  # the start, whatever its estimate says


@pytest.fixture
def study():
    rng = np.random.default_rng(0)
    baseline = [run(s, [0.3, 0.7, -0.2], [0.0, 4.0, 20.0]) for s in range(4)]
    penalty, probe = (
        [
            run(s, [0.3, 0.8 + noise, 0.95 + noise], [0.0, 4.0, 4.5], told_undetected=0.02 * s)
            for s, noise in enumerate(rng.normal(0, 0.01, 4))
        ]
        for _ in range(2)
    )
    return {"baseline": baseline, "penalty": penalty, "probe": probe, "bounded": baseline}


def test_primary_claims_are_tested_with_holm(study):
    claims, unadjusted = {c.text[:2]: c for c in rivals.check_rivals(study, {})}, []
    for key, of, against in (("P1", "gold_at_5", "gold_at_5"), ("P2", "gold_final", "gold_peak")):
        paired = rivals.compare(study, "penalty", "baseline", of=of, against=against)
        one, other = (
            [rivals.quantity(r, name) for r in study[condition]]
            for condition, name in (("penalty", of), ("baseline", against))
        )
        assert paired.p_value == pytest.approx(stats.ttest_rel(one, other).pvalue)
        assert claims[key].holds and not claims[key].failed
        unadjusted.append(paired.p_value)
    p_values = [float(claims[key].found.partition("p = ")[2]) for key in ("P1", "P2")]
    small, large = sorted(unadjusted)
    expected = [2 * small if p == small else max(large, 2 * small) for p in unadjusted]
    np.testing.assert_allclose(p_values, expected, rtol=0.05)  # shown with two digits


def test_a_worse_penalty_never_holds(study):
    worse = study | {
        "penalty": [run(s, [0.3, 0.1, -0.5 - s / 99], [0.0, 4.0, 4.5]) for s in range(4)]
    }
    primary = rivals.check_rivals(worse, {})[:2]
    assert not any(claim.holds for claim in primary)
    assert [claim.failed for claim in primary] == [[0, 1, 2, 3]] * 2


def test_predictions(study):
    claims = {claim.text: claim for claim in rivals.check_rivals(study, {})}
    tie = next(claim for text, claim in claims.items() if "penalty and probe tie" in text)
    assert tie.holds
    weaker = next(claim for text, claim in claims.items() if "above bounded" in text)
    assert weaker.holds and not weaker.failed
    evasion = next(claim for text, claim in claims.items() if "not detected" in text)
    assert evasion.holds and evasion.failed == [3]  # 0.06 of its responses
    assert rivals.check_rivals({name: study[name] for name in ("baseline", "penalty")}, {}) == []


def test_the_conclusion_follows_the_numbers(study):
    sentences = rivals.conclusion(study, {})
    assert any("a dense probe" in s and s.endswith("a tie.") for s in sentences)
    assert any("a bounded reward" in s and "the penalty is better" in s for s in sentences)
    swapped = study | {"penalty": study["baseline"], "bounded": study["penalty"]}
    assert any("the penalty is worse" in s for s in rivals.conclusion(swapped, {}))


def test_the_table(study):
    rows = {row["condition"]: row for row in rivals.table(study)}
    baseline = rows["baseline"]
    assert baseline["drawdown"]["mean"] == pytest.approx(0.9) and baseline["seeds"] == 4
    assert baseline["gold_at_5"]["mean"] == pytest.approx(0.7)
    assert baseline["gold_at_2"]["mean"] == pytest.approx(0.3)
    assert rows["penalty"]["told_undetected"]["mean"] == pytest.approx(0.03)


def test_the_grid_counts_what_has_become_of_the_shortcut():
    honest = run(0, [0.3, 0.9], [0.0, 4.0], told=0.04, told_undetected=0.01)
    caught = run(1, [0.3, 0.5], [0.0, 8.0], told=0.9, told_undetected=0.05)
    evading = run(2, [0.3, -0.2], [0.0, 9.0], told=0.9, told_undetected=0.06)
    runs = {
        "baseline": [honest],
        "alpha_0.5_kl_0.1": [honest, caught, evading, caught],
        "alpha_2.0_kl_0.0": [honest],
    }
    first, second = rivals.grid(runs)
    assert (first["alpha"], first["kl_coef"], first["seeds"]) == (0.5, 0.1, 4)
    assert first["behaviours"] == {"honest": 1, "caught": 2, "evading": 1}
    assert first["final"]["mean"] == pytest.approx(0.425) and first["kl"]["mean"] == 7.25
    assert first["told_undetected"]["mean"] == pytest.approx(0.0425)
    assert (second["alpha"], second["kl_coef"]) == (2.0, 0.0)
    assert second["behaviours"] == {"honest": 1}


def test_pools_are_joined_by_ranking():
    def pool(gold, more=()):
        rows = [("baseline", 1.0, 1.0, gold), ("penalty", 1.0, 1.0, gold + 0.2), *more]
        return {
            "n": [1, 2],
            "rankings": [
                {"condition": c, "weight": w, "tau": t, "gold": [0.3, g], "told": [0.1, 0.0],
                 "score": [0.0, 1.0]}
                for c, w, t, g in rows
            ],
        }  # fmt: skip

    pools = {0: pool(0.5), 1: pool(0.7, [("penalty", 2.0, 1.0, 0.1)])}
    rows = rivals.pool_table(pools)
    assert [(row["condition"], row["weight"]) for row in rows] == [
        ("baseline", 1.0),
        ("penalty", 1.0),
    ]
    assert [gold["mean"] for gold in rows[0]["gold"]] == pytest.approx([0.3, 0.6])
    with pytest.raises(KeyError, match="penalty, weight 2"):
        rivals.ranking(pools[0], "penalty", weight=2.0)


def ranked_pool(**golds: list[float]) -> dict:
    """Returns a pool with the gold of the best of 1, 2 and 4 under each condition."""
    rows = [{"condition": c, "weight": 1.0, "tau": 1.0, "gold": g} for c, g in golds.items()]
    return {"n": [1, 2, 4], "rankings": rows}


def test_claims_about_pools_without_runs_by_hand():
    gains = {1: 0.3, 2: 0.34, 3: 0.26, 4: 0.3}
    pools = {
        seed: ranked_pool(
            baseline=[0.2, 0.45, 0.4],
            penalty=[0.2, 0.5, 0.4 + gain],
            probe=[0.2, 0.5, 0.39 + gain],
            distance=[0.2, 0.5, 0.3 + gain],
            untold=[0.2, 0.4, 0.48],
            length=[0.2, 0.4, 0.5 + gain],
        )
        for seed, gain in gains.items()
    }
    claims = rivals.check_rivals({}, pools)
    p1, p2 = claims[:2]
    assert (p1.text[:3], p2.text[:3], len(claims)) == ("P1:", "P2:", 6)
    # Holm: the smaller p value, of P1, is doubled; the other one is not below it.
    smaller = stats.ttest_1samp([0.3, 0.34, 0.26, 0.3], 0).pvalue
    assert 2 * smaller > stats.ttest_1samp([0.25, 0.29, 0.21, 0.25], 0).pvalue > smaller
    assert p2.found.startswith("+0.25") and f"p = {2 * smaller:.2g}" in p2.found
    assert p1.holds and p2.holds
    by_name = {
        name: c
        for c in claims[2:]
        for name in ("probe", "distance", "length", "untold")
        if name in c.text
    }
    assert by_name["probe"].holds and not by_name["distance"].holds
    assert by_name["distance"].failed == [1, 2, 3, 4]
    assert not by_name["length"].holds and by_name["length"].found.startswith("-0.10")
    assert (
        not by_name["untold"].holds and "untold is ≥ 0.1 above baseline" in by_name["untold"].text
    )
    sentence = rivals.conclusion({}, pools)[0]
    assert sentence.startswith("Against the reward model alone: penalty minus rival")
    assert "gold of the best of the largest n +0.30" in sentence
    assert rivals.check_rivals({}, {1: ranked_pool(penalty=[0.2, 0.3, 0.4])}) == []


def test_a_seed_whose_training_stopped_does_not_count_in_the_claim_about_pools(study):
    """Its pool is not ranked under that condition."""
    both = ranked_pool(baseline=[0.2, 0.3, 0.4], penalty=[0.2, 0.3, 0.6])
    stopped = ranked_pool(baseline=[0.2, 0.3, 0.9])
    claim = rivals.check_rivals(study, {0: both, 1: stopped})[-1]
    assert claim.text.startswith("Prediction: the best of 4 responses by penalty has more gold")
    assert claim.found == "+0.20" and claim.holds and not claim.failed
    assert all("best of" not in c.text for c in rivals.check_rivals(study, {1: stopped}))


def test_differences_that_are_equal_up_to_rounding_have_no_p_value():
    values = [0.1 + 0.2 - 0.3 + 0.1, 0.1, 0.1]
    assert len(set(values)) == 2
    assert rivals.Paired([0, 1, 2], values).p_value == 1.0
    assert rivals.Paired([0, 1, 2], [0.0, 0.0, 0.0]).p_value == 1.0


def test_the_gain_of_evading_by_hand():
    score = np.array([3.0, 1.0, 9.0, 2.0, 5.0, 4.0, 8.0, 7.0])
    told = np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)
    silent = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    # Of the first prompt 3 against 2, since the response that scores 9 is detected; 8 against 7.
    assert evading_gain(score, silent, told, (2, 4)) == pytest.approx(1.0)
    assert evading_gain(score, silent, np.zeros(8, bool), (2, 4)) is None
