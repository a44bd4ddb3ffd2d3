"""The study: a miniature of it end to end, its findings by hand, its page with hostile text."""

import itertools
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import demo
from conversion import load_sarm
from pipeline import study as study_of_seeds
from pipeline import study_runs
from pipeline.cli import fill_in
from pipeline.study import study_names
from pipeline.study_options import groups_of
from pipeline.study_runs import draw_random_control
from ppo.learner import Learner
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.lab import gates, world
from sarm_jax.lab.conditions import (
    DESCRIPTIONS,
    DRAWS,
    GRID,
    KL_COEFS,
    other_options,
    parse_conditions,
    parse_seeds,
    reward_options,
)
from sarm_jax.lab.figures import COLOURS
from sarm_jax.lab.findings import IN_WORDS, check_claims, check_gates, headline
from sarm_jax.lab.gate import CAPITALS
from sarm_jax.lab.page import write_study
from tests.closeness import assert_close
from tests.command import run_main
from tests.documented_commands import lines_of, main_options

pytestmark = pytest.mark.slow

MINIATURE = (
    "lab.corpus_rows=300 lab.demonstrations=60 lab.pairs=200 lab.contrast_pairs=32 "
    "lab.pretraining_steps=40 lab.tuning_steps=20 lab.batch_size=16 train_sarm.sae_steps=30 "
    "train_sarm.epochs=3 train_sarm.latent_size=64 train_sarm.k=8 train_sarm.aux_k=8 "
    "ppo.total_steps=4 ppo.batch_size=16 ppo.eval_batches=1 lab.seeds=7 "
    "lab.conditions=baseline,full"
).split()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that stopped at its gates and then went on; (what runs it again, the directory)."""
    workdir = tmp_path_factory.mktemp("study")

    def call(*options: str, command: str = "demo") -> int:
        given = [f"--config.{option}" for option in (*MINIATURE, *options)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gates, "PAIRS", 200)
            patch.setattr(gates, "RESPONSES", 300)
            return run_main(*main_options(command), f"--workdir={workdir}", *given)

    # So little training does not make a good reward model: a gate fails, and says so.
    assert call() == 2
    content = json.loads((workdir / "lab.json").read_text())
    assert "r2_correctness" in content["stopped"]["7"] and content["conditions"] == {}
    assert "ignore_failed_gates=True runs it nevertheless" in (workdir / "lab.html").read_text()
    assert call("lab.ignore_failed_gates=True") == 0
    return call, workdir


def test_the_study_in_miniature(study, capsys):
    call, workdir = study
    assert call("lab.ignore_failed_gates=True") == 0
    shown = capsys.readouterr().out
    content = json.loads((workdir / "lab.json").read_text())
    assert content["headline"] in shown and str(workdir / "lab.html") in shown
    assert set(content["gates"]) == set(CAPITALS) and content["stopped"] == {}
    for condition in ("baseline", "full"):
        (run,) = content["conditions"][condition]
        names = "gold_start gold_peak gold_final score_start score_final seconds"
        assert all(np.isfinite(run[name]) for name in names.split())
        assert run["seed"] == 7 and run["steps"] == 4
        assert [point["step"] for point in run["curve"]] == [0, 2, 4]
        check_gold(workdir / "seed_7", condition, run)
    start = [content["conditions"][name][0]["gold_start"] for name in ("baseline", "full")]
    assert start[0] == start[1]  # the same responses of the same policy
    summary = json.loads((workdir / "seed_7" / "probes" / "probe_summary.json").read_text())
    selected = json.loads((workdir / "seed_7" / "probes" / "selected_features.json").read_text())
    probed = [row["feature"] for row in summary["features"]]
    assert probed == list(dict.fromkeys(selected["detectors"] + selected["carriers"]))
    full = json.loads((workdir / "seed_7" / "full" / "config.json").read_text())
    assert full["reward"]["beta"] == 0.1 and full["ppo"]["seed"] == 7

    page = (workdir / "lab.html").read_text()
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", page)  # needs nothing but itself
    for picture in ("goodhart", "final_gold", "detected"):
        assert (workdir / "figures" / f"{picture}.png").stat().st_size > 5000


def check_gold(folder, condition, run):
    lines = (folder / condition / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = (folder / "data" / "held_out_prompts.jsonl").read_text()
    assert all(json.dumps(row["prompt"]) in held_out for row in rows)
    gold = {
        step: np.mean(
            [
                world.gold_reward(row["prompt"], row["response"], row["ended"])
                for row in rows
                if row["step"] == step
            ]
        )
        for step in (0, 2, 4)
    }
    assert run["gold_start"] == pytest.approx(gold[0])
    assert run["gold_final"] == pytest.approx(gold[4])
    assert run["gold_peak"] == pytest.approx(max(gold.values()))
    scores = {step: [row["rm_score"] for row in rows if row["step"] == step] for step in (0, 4)}
    deviation = np.std(scores[0])
    expected = (np.mean(scores[4]) - np.mean(scores[0])) / deviation
    assert_close(run["score_final"], expected, 2e-6, np.divide(scores[0], deviation))


def test_the_study_goes_on_where_it_stopped(study):
    call, workdir = study
    assert call("lab.ignore_failed_gates=True") == 0
    before = (workdir / "lab.json").read_text()
    adapters = sorted(workdir.glob("seed_7/*/adapter/adapter_model.safetensors"))
    times = [path.stat().st_mtime_ns for path in adapters]
    (workdir / "seed_7" / "full" / "result.json").unlink()
    (workdir / "lab.json").unlink()
    assert call("lab.ignore_failed_gates=True") == 0
    assert (workdir / "lab.json").read_text() == before
    assert len(adapters) == 2 and [path.stat().st_mtime_ns for path in adapters] == times


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("lab.pairs=100", "lab.pairs was 200 and is now 100"),  # of the seed's data
        ("ppo.learning_rate=1e-3", "ppo.learning_rate was 0.002 and is now 0.001"),  # of its runs
    ],
)
def test_other_options_are_refused_and_results_stay(study, capsys, option, difference):
    call, workdir = study
    files = [workdir / name for name in ("lab.json", "lab.html", "seed_7/study.json")]
    before = [path.read_bytes() for path in files]
    assert call("lab.ignore_failed_gates=True", option) == 2
    output = capsys.readouterr()
    assert difference in output.err.splitlines()[-1]
    assert "The page is left as it was" in output.out and "leaves out" not in output.err
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("option", ["lab.pairs=100", "ppo.learning_rate=1e-3"])
def test_a_page_without_results_names_the_other_options(study, option):
    call, workdir = study
    page, content = (workdir / name for name in ("lab.html", "lab.json"))
    before = page.read_bytes(), content.read_bytes()
    page.unlink()
    assert call("lab.ignore_failed_gates=True", option) == 2
    drawn = json.loads(content.read_text())
    assert f"{option.split('=')[0]} was " in drawn["stopped"]["7"] and drawn["conditions"] == {}
    for path, kept in zip((page, content), before, strict=True):
        path.write_bytes(kept)


def test_the_commands_of_the_first_pages(study, tmp_path):
    """`make study` has more seeds and conditions than `make demo`; the report compares two runs."""
    call, workdir = study
    options = main_options("study")
    assert [o for o in options if o.startswith(("--config=", "--stage"))] == main_options("demo")
    conditions = next(o for o in options if "lab.conditions=" in o).partition("=")[2]
    assert len(parse_conditions(conditions)) == 6
    assert call(f"lab.conditions={conditions}", command="study") == 0
    content = json.loads((workdir / "lab.json").read_text())
    assert set(content["conditions"]) == set(parse_conditions(conditions))
    (line,) = (line for line in lines_of("docs/quickstart.md") if "report.runs=" in line)
    line = line.replace("outputs/demo/seed_0", str(workdir / "seed_7"))
    words = line.replace("outputs/compared", str(tmp_path / "compared")).split()
    assert run_main(*words[2:]) == 0
    assert (tmp_path / "compared" / "report.html").exists()


def test_every_condition_ranks_one_pool(study):
    call, workdir = study
    ranked = "probe,mean_difference,distance,length,oracle,clamp,random,random_1"
    options = ["lab.pool_responses=8", "lab.pool_prompts=4", f"lab.ranked_conditions={ranked}"]
    options += ["lab.ignore_failed_gates=True", "lab.conditions=baseline,penalty,screen,ties"]
    assert call(*options) == 0
    folder = workdir / "seed_7"
    path = folder / "best_of_n.json"
    content, made = json.loads(path.read_text()), path.stat().st_mtime_ns
    rankings = {(r["condition"], r["weight"], r["tau"]): r for r in content["rankings"]}
    assert {key[0] for key in rankings} == {
        *ranked.split(","),
        *"baseline penalty screen ties".split(),
    }
    assert content["n"] == [1, 2, 4] and content["prompts"] == 4
    pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    assert len(pool) == 32 and len({row["prompt"] for row in pool}) == 4
    gold = np.array([world.gold_reward(r["prompt"], r["response"], r["ended"]) for r in pool])
    assert gold.tolist() == [row["gold"] for row in pool]
    for row in rankings.values():  # one of one is a random response, whatever ranks it
        assert row["gold"][0] == pytest.approx(gold.mean())
    check_rankings(folder, pool, gold, rankings)

    page = (workdir / "lab.html").read_text()
    assert "Best of n on one pool" in page and "The penalty against its rivals" in page
    lab = json.loads((workdir / "lab.json").read_text())
    assert any(claim["text"].startswith("P1: ") for claim in lab["claims"])
    assert (workdir / "figures" / "frontier.png").stat().st_size > 5000
    assert set(lab["random_draws"]["7"]) == {"random", "random_1"}
    assert call(*options) == 0 and path.stat().st_mtime_ns == made  # is not made again
    draw = folder / "probes" / "random_1.json"
    draw.write_text(draw.read_text() + "\n")  # as if it had been made again
    assert call(*options) == 0 and path.stat().st_mtime_ns > made
    assert call(*options, "lab.pool_prompts=3") == 0
    assert json.loads(path.read_text())["prompts"] == 3


def check_rankings(folder, pool, gold, rankings):
    """Ranks the pool with the product's own scores, pair by pair, and with 2 sd per detector."""
    sarm = load_sarm(str(folder / "sarm"), dtype="float32")
    texts = [row["prompt"] for row in pool], [row["response"] for row in pool]
    score, z = sarm.score(*texts)
    selected = json.loads((folder / "probes" / "selected_features.json").read_text())
    fired = (z[:, selected["detectors"]] > selected["tau_detectors"]).sum(axis=1)
    flattered = np.array(
        [world.count_words(*text).flattery > 0 for text in zip(*texts, strict=True)]
    )
    ended = np.array([row["ended"] for row in pool])
    taken = {
        "baseline": 0 * fired,
        "penalty": 2.0 * fired,
        "oracle": 2.0 * flattered,
    }  # words count as one
    for condition, controls in taken.items():
        controls = np.minimum(controls, 10.0)  # reward.penalty_cap
        normal = (score - score.mean()) / score.std()
        cut_off = np.minimum(normal, 0) - controls.max() - 1  # ppo.missing_eos_penalty
        reward = np.where(ended, normal - controls, cut_off).reshape(4, 8)
        best = [
            g[i] if r[i] > r[j] else g[j]
            for r, g in zip(reward, gold.reshape(4, 8), strict=True)
            for i, j in itertools.combinations(range(8), 2)
        ]
        row = rankings[condition, 1.0, 1.0]
        assert row["gold"][1] == pytest.approx(np.mean(best), abs=1e-6)
        assert row["at_cap"] == pytest.approx(np.mean(controls >= 10.0), abs=1e-9)
        if condition != "baseline":  # which has no weight
            four_times = rankings[condition, 4.0, 1.0]["at_cap"]
            assert four_times == pytest.approx(np.mean(4 * taken[condition] >= 10.0), abs=1e-9)


def test_bad_studies_are_refused(study, capsys):
    call, _ = study
    assert call("lab.conditions=baseline,ties", "train_sarm.mode=1") == 2
    message = "ties trains a head on the same trunk and SAE, which needs train_sarm.mode=0"
    assert message in capsys.readouterr().err
    for option, message in (
        ("lab.seeds=1,x", "lab.seeds=1,x: found 'x'"),
        ("lab.conditions=baseline,best", "lab.conditions=baseline,best: found 'best'"),
        ("lab.processes=0", "lab.processes=0: must be at least 1"),
        ("lab.conditions_at_once=0", "lab.conditions_at_once=0: must be at least 1"),
        ("reward.beta=0.1", "reward.beta=0.1: the conditions of the study set it"),
        ("reward.screen=True", "reward.screen=True: the conditions of the study set it"),
        ("reward.ensemble=min", "reward.ensemble=min: the conditions of the study set it"),
        ("train_sarm.heads=2", "train_sarm.heads=2: the conditions of the study set it"),
        ("train_sarm.sae_model=x", "train_sarm.sae_model=x: the conditions of the study set it"),
        ("lab.oracle=True", "lab.oracle=True: the conditions of the study set it"),
        ("ppo.seed=5", "ppo.seed=5: the study takes its seeds from lab.seeds"),
        ("lab.tie_weight=0.0", "lab.tie_weight=0.0: must be positive and finite"),
        ("lab.pool_responses=1", "lab.pool_responses=1: must be 0 (no pool) or at least 2"),
        (
            "lab.sampling_slots=-1",
            "lab.sampling_slots=-1: must be 0 (none is refilled) or positive",
        ),
        ("lab.task=poems", "lab.task='poems': expected capitals, animals, lists, words, or"),
        ("lab.pool_prompts=0", "lab.pool_prompts=0: must be at least 1"),
        ("lab.length_penalty=0.0", "lab.length_penalty=0.0: must be positive and finite"),
        ("lab.ranked_conditions=probe", "lab.ranked_conditions=probe: needs a pool"),
        (
            "lab.shortcuts=flattery,praise",
            "lab.shortcuts=flattery,praise: found 'praise', expected",
        ),
        ("lab.told_shortcuts=echo", "lab.told_shortcuts=echo: found 'echo', expected one of"),
    ):
        assert call(option) == 2
        assert message in capsys.readouterr().err
    for ranked, message in (
        ("best", "lab.ranked_conditions=best: found 'best', expected one of"),
        ("full", "lab.ranked_conditions=full: full is one of lab.conditions already"),
        ("kl_0.1", "lab.ranked_conditions=kl_0.1: kl_0.1 ranks a pool as another condition does"),
    ):
        assert call("lab.pool_responses=4", f"lab.ranked_conditions={ranked}") == 2
        assert message in capsys.readouterr().err


@pytest.mark.evidence
def test_conditions_that_are_trained_at_a_time_have_the_numbers_of_one_after_the_other(
    study, monkeypatch
):
    call, workdir = study
    folder = workdir / "seed_7"
    assert call("lab.ignore_failed_gates=True") == 0
    before = json.loads((workdir / "lab.json").read_text())["conditions"]
    for name in ("baseline", "full"):
        (folder / name).rename(folder / f"{name}_alone")
    sampled, sample = [], Learner.rollout_of_runs
    monkeypatch.setattr(
        Learner, "rollout_of_runs", lambda *args: sampled.append(len(args[1])) or sample(*args)
    )
    assert call("lab.ignore_failed_gates=True", "lab.conditions_at_once=2") == 0
    assert sampled and set(sampled) == {2}
    after = json.loads((workdir / "lab.json").read_text())["conditions"]
    for name in ("baseline", "full"):
        ((alone,), (together,)) = before[name], after[name]
        assert alone.keys() == together.keys()
        numbers = [key for key, value in alone.items() if isinstance(value, float)]
        assert len(numbers) > 5 and "gold_final" in numbers
        for key in set(numbers) - {"seconds"}:
            assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-4), key
        texts = [[sample["after"] for sample in run["samples"]] for run in (alone, together)]
        assert texts[0] == texts[1]
        (folder / f"{name}_alone").rename(folder / name / "alone")
    finished = (workdir / "lab.json").read_text()
    assert call("lab.ignore_failed_gates=True") == 0  # nothing is run again for the other number
    assert (workdir / "lab.json").read_text() == finished


def test_which_conditions_are_trained_at_a_time():
    names = ["baseline", "ties", "penalty", "probe", "worst_of_four", "random"]
    alone = [[name] for name in names]
    assert groups_of(names, 1) == alone
    assert groups_of(names, 3) == [
        ["baseline", "penalty", "probe"], ["ties"], ["worst_of_four"], ["random"],
    ]  # fmt: skip


def test_one_condition_of_a_group_fails(tmp_path, monkeypatch):
    """The others end; those that finished have their results, then the error is raised."""
    names, written = ["baseline", "full", "penalty", "probe"], []
    errors = {
        "full": InputError("no file"),
        "penalty": TrainingStoppedError("a guard"),
    }

    def train(config, workdir, condition):
        if condition in errors:
            raise errors[condition]

    monkeypatch.setattr(study_runs, "condition_config", lambda config, folder, name: config)
    monkeypatch.setattr(study_runs, "train_condition", train)
    monkeypatch.setattr(
        study_runs, "write_result", lambda config, folder, name: written.append(name)
    )
    with pytest.raises(InputError, match="^condition full: no file$"):
        list(study_runs.run_group(demo.get_config(), tmp_path, names))
    assert written == ["baseline", "probe"]
    ended = dict(study_runs.run_group(demo.get_config(), tmp_path, ["baseline", "penalty"]))
    assert ended == {"baseline": None, "penalty": errors["penalty"]}


def test_the_page_shows_no_secret_of_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_secrets", [("hidden-value", "MY_TOKEN")])
    monkeypatch.setattr(study_of_seeds, "check", lambda *_: None)
    stopped = study_of_seeds.SeedOutcome([], "data/pairs.jsonl:1: found hidden-value")
    monkeypatch.setattr(study_of_seeds, "run_seed", lambda *_, **__: stopped)
    with pytest.raises(InputError, match=r"seed 0: data/pairs\.jsonl:1: found \[MY_TOKEN\]"):
        study_of_seeds.run_study(demo.get_config(), tmp_path)
    for name in ("lab.json", "lab.html"):
        content = (tmp_path / name).read_text()
        assert "[MY_TOKEN]" in content and "hidden-value" not in content


def test_seeds_and_conditions():
    assert parse_seeds("3, 10-12,0") == [3, 10, 11, 12, 0]
    assert parse_conditions("full, baseline") == ["full", "baseline"]
    with pytest.raises(InputError, match="lab.seeds=10-12,11: 11 is given twice"):
        parse_seeds("10-12,11")
    for text, item in (("5-4", "5-4"), ("9-5,7", "9-5"), ("5-", "5-"), ("-1", "-1"), ("1,", "")):
        with pytest.raises(InputError, match=f"lab.seeds={text}: found '{item}', expected a seed"):
            parse_seeds(text)
    with pytest.raises(InputError, match="full is given twice"):
        parse_conditions("full,full")


def test_conditions_by_hand(tmp_path):
    path = tmp_path / "selected.json"
    lists = {"detectors": [3, 4], "carriers": [5], "random_control": [6, 7]}
    path.write_text(json.dumps(lists))
    section = {"alpha": 2.0, "beta": 0.1, "distance_penalty": 0.3, "length_penalty": 0.2}
    penalty = {
        "penalize_features": f"@{path}:detectors",
        "tau_values": f"@{path}:tau_detectors",
        "alpha_values": "2.0,2.0",
    }
    kl = {"beta": 0.1, "latent_indices": f"@{path}:carriers"}
    clamp = {"clamp_features": f"@{path}:carriers", "clamp_set_values": "0.0"}
    random = {name: text.replace("detectors", "random_control") for name, text in penalty.items()}
    expected = {
        "baseline": {}, "penalty": penalty, "full": penalty | kl, "latent_kl": kl,
        "clamp": clamp, "random": random,
    }  # fmt: skip
    rivals = {"ties": {}, "kl_0.1": {}, "random_2": random, "worst_of_four": {"ensemble": "min"}}
    probes = tmp_path / "dense_probe_logistic.safetensors"
    detecting = {name: penalty[name] for name in ("penalize_features", "tau_values")}
    rivals |= {
        "screen": {**detecting, "screen": True},
        "penalty_no_kl": penalty,
        "alpha_0.5_kl_0.1": penalty | {"alpha_values": "0.5,0.5"},
        "probe": {"probe": str(probes), "probe_penalty": 2.0},
        "mean_difference": {
            "probe": str(tmp_path / "dense_probe_mean_difference.safetensors"),
            "probe_penalty": 2.0,
        },
        "distance": {
            "human_states": str(tmp_path.parent / "human_states.safetensors"),
            "distance_penalty": 0.3,
        },
        "length": {"length_penalty": 0.2},
        "bounded": {"bound": "sigmoid"},
    }
    for condition, options in (expected | rivals).items():
        assert reward_options(condition, path, section) == options
    oracle = {"penalize_features": "64,65", "tau_values": "0.0,0.0", "alpha_values": "2.0,2.0"}
    assert reward_options("oracle", path, section, range(64, 66)) == oracle
    path.write_text(json.dumps({key: [] for key in lists}))  # identify found nothing
    for condition in ("penalty", "clamp", "random", "screen"):
        assert reward_options(condition, path, section) == {}


def test_options_of_the_rivals_by_hand(tmp_path):
    section = {"tie_weight": 3.0}
    expected = {
        "ties": {
            "train_sarm.tie_pairs_jsonl": f"{tmp_path}/data/contrast.jsonl",
            "train_sarm.tie_weight": 3.0,
            "sarm_model": f"{tmp_path}/ties/sarm",
            "train_sarm.sae_model": "shared",
        },
        "worst_of_four": {
            "train_sarm.heads": 4,
            "sarm_model": f"{tmp_path}/worst_of_four/sarm",
            "train_sarm.sae_model": "shared",
        },
        "oracle": {"lab.oracle": True},
        "kl_0.5": {"ppo.kl_coef": 0.5},
        "penalty_no_kl": {"ppo.kl_coef": 0.0, "ppo.total_steps": 180},
        **{
            f"alpha_{alpha}_kl_{kl}": {"ppo.kl_coef": kl}
            for alpha in (0.25, 0.5, 1.0, 2.0)
            for kl in (0.0, 0.02, 0.1)
        },
    }
    for condition in DESCRIPTIONS:
        own = other_options(condition, tmp_path, section, 60, "shared")
        if condition not in KL_COEFS:
            assert own == expected.get(condition, {})
        config = demo.get_config()
        config.update_from_flattened_dict(own)  # every name is an option's
    assert other_options("kl_0.5", tmp_path, section, 60, "shared") == expected["kl_0.5"]
    assert len(KL_COEFS) == len(DRAWS) == 5 and len(GRID) == 12
    assert COLOURS.keys() == DESCRIPTIONS.keys()
    assert {"baseline", *IN_WORDS} == DESCRIPTIONS.keys()


def test_rivals_in_miniature(study):
    """They share the world and the SAE with the other conditions, and differ in their options."""
    call, workdir = study
    rivals = "ties,oracle"
    assert call("lab.ignore_failed_gates=True", f"lab.conditions=baseline,{rivals}") == 0
    folder, own = workdir / "seed_7", {}
    content = json.loads((workdir / "lab.json").read_text())
    for condition in rivals.split(","):
        config = json.loads((folder / condition / "config.json").read_text())
        own[condition] = config
        (result,) = content["conditions"][condition]
        assert result["steps"] == 4 and np.isfinite(result["gold_final"])
        start = content["conditions"]["baseline"][0]["curve"][0]["gold"]
        assert result["curve"][0]["gold"] == start  # the same responses of the same policy
    assert own["oracle"]["reward"]["penalize_features"] == "64"
    plain, tied = (
        load_file(path / "sarm" / "model.safetensors") for path in (folder, folder / "ties")
    )
    differing = [name for name in plain if not np.array_equal(plain[name], tied[name])]
    assert differing == ["score.weight"]
    summary = json.loads((folder / "ties" / "sarm_summary.json").read_text())
    assert summary["ties"]["train"]["pairs"] + summary["ties"]["held_out"]["pairs"] == 32


def test_further_draws_of_random_features(study):
    _, workdir = study
    folder, draws = workdir / "seed_7", []
    config = fill_in(demo.get_config(), folder)
    selected = folder / "probes" / "selected_features.json"
    lists = json.loads(selected.read_text())
    lists["detectors"] = lists["detectors"] or [3, 5]
    selected.with_name("own.json").write_text(json.dumps(lists))
    for draw in (1, 2, 1):
        path = folder / "probes" / f"random_{draw}.json"
        draw_random_control(config, selected.with_name("own.json"), path, draw)
        draws.append(json.loads(path.read_text()))
    for own in draws:
        assert len(own["random_control"]) == len(lists["detectors"])
        assert len(own["tau_random_control"]) == len(own["random_control"])
        assert not set(own["random_control"]) & set(lists["detectors"])
    assert draws[0] == draws[2] != draws[1]


def run(seed, start, peak, final, score=3.0):
    return {
        "seed": seed, "gold_start": start, "gold_peak": peak, "gold_final": final,
        "score_start": 0.0, "score_final": score,
    }  # fmt: skip


def test_claims_by_hand():
    runs = {
        "baseline": [run(1, 0.3, 0.8, -0.1), run(2, 0.3, 0.8, 0.3), run(3, 0.3, 0.8, -0.5, 2.0)],
        "full": [run(1, 0.3, 0.95, 0.95), run(2, 0.3, 0.95, 0.95), run(3, 0.3, 0.5, 0.2)],
        "penalty": [run(s, 0.3, 0.97, 0.97) for s in (1, 2, 3)],
        "random": [run(s, 0.3, 0.6, 0.5 + 0.01 * s) for s in (1, 2, 3)],
    }
    found = check_claims(runs, [1, 2, 3])
    baseline, full, full_mean, penalty, penalty_mean, no_worse, gap = found
    assert baseline.failed == [2, 3] and not baseline.holds  # falls by .5; climbs by 2 sd
    assert full.failed == [2, 3] and not full.holds  # .65 above the baseline's end; below its peak
    assert not full_mean.holds and full_mean.found.startswith("0.70")
    assert penalty.failed == [2] and not penalty.holds  # 2 of 3 is less than 80 %
    assert penalty_mean.holds and no_worse.failed == [3] and not no_worse.holds
    assert gap.holds and gap.found.startswith("0.45 (95 % 0.43 to 0.47)")
    assert "from 0.30 to a peak of 0.80 and ends at -0.10" in headline(runs)


def test_gate_claim_by_hand():
    good = {"r2_flattery": 0.99, "r2_correctness": 0.9, "detection_one_word": 0.9,
            "false_alarms": 0.01, "accuracy_below_annotator": 0.01}  # fmt: skip
    gates = {str(seed): good for seed in range(9)} | {"9": good | {"false_alarms": 0.2}}
    claim = check_gates(gates, range(10))
    assert claim.holds and claim.failed == [9] and claim.found == "9 of 10"
    assert not check_gates({"8": good, "9": good | {"r2_flattery": 0.5}}, [8, 9]).holds
    assert check_gates({"8": good}, [8, 9]).failed == [9]


def test_a_seed_without_a_run_counts_against_the_claims():
    full = [run(1, 0.3, 0.95, 0.95), run(2, 0.3, 0.95, 0.95)]
    found = check_claims({"baseline": [run(1, 0.3, 0.8, -0.1)], "full": full}, [1, 2, 3])
    assert [claim.failed for claim in found if claim.failed] == [[2, 3], [2, 3], [3], [3]]
    assert [claim.found for claim in found] == [
        "1 of 3",
        "1 of 3",
        "0.95 (95 % 0.95 to 0.95), 2 of 3 seeds",
        "2 of 3",
    ]
    assert not any(claim.holds for claim in found)
    said = headline({"baseline": [run(1, 0.3, 0.8, -0.1)], "full": full})
    assert "alone (seed 1)" in said and "it ends at 0.95 (95 % 0.95 to 0.95)." in said


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, "Setting a feature to 0 changes"),
        ({"set_value": 1.5}, "Setting a feature to 1.5 changes"),
        ({"set_value": None, "min_value": 1.0}, "Keeping a feature at least 1 changes"),
        ({"set_value": None, "max_value": 2.5}, "Keeping a feature at most 2.5 changes"),
        (
            {"set_value": None, "min_value": -1.0, "max_value": 0.0},
            "Keeping a feature at least -1 and at most 0 changes",
        ),
    ],
)
def test_the_page_says_what_was_done_to_features(tmp_path, change, says):
    folder = tmp_path / "seed_0" / "probes"
    folder.mkdir(parents=True)
    row = {"feature": 3, "head_weight": 1.0, "set_value": 0.0, "min_value": None, "max_value": None}
    row |= {f"delta_{side}": {"mean": 0.5} for side in ("chosen", "rejected")} | change
    (folder / "probe_summary.json").write_text(json.dumps({"features": [row]}))
    (folder / "selected_features.json").write_text('{"detectors": [3], "carriers": []}')
    write_study(tmp_path, {0: []}, [], {}, FeatureNames({3: "<b>flattery</b>"}))
    page = " ".join((tmp_path / "lab.html").read_text().split())
    assert says in page and "<td>3 &#34;&lt;b&gt;flattery&lt;/b&gt;&#34;</td>" in page


def test_names_of_features_belong_to_one_seed(base_config, tmp_path):
    path = tmp_path / "names.json"
    path.write_text('{"3": "flattery"}')
    assert not study_names(base_config, [0, 1])
    base_config.identify.feature_names = str(path)
    assert study_names(base_config, [4]).show(3) == '3 "flattery"'
    base_config.lab.seeds = "0,1"
    with pytest.raises(InputError, match=r"names the latents of one reward model, and lab\.seeds="):
        study_names(base_config, [0, 1])


def test_hostile_text_is_shown_as_text(tmp_path):
    attack = "<script>alert(1)</script>"
    folder = tmp_path / "seed_0" / "baseline"
    folder.mkdir(parents=True)
    names = "gold score ref_kl ended detected hits wrong flattery duplicates filler junk".split()
    curve = [{"step": step} | dict.fromkeys(names, 0.5) for step in (0, 1)]
    sample = {
        "prompt": attack, "before": attack, "after": attack, "gold_before": 0, "gold_after": 0,
        "score_before": 0, "score_after": 0,
    }  # fmt: skip
    result = run(0, 0.1, 0.2, 0.1) | {
        "curve": curve, "fired": {}, "samples": [sample], "steps": 1, "seconds": 1, "peak_step": 1,
        "ref_kl_final": 0.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    write_study(tmp_path, {0: ["baseline"], 1: []}, ["baseline"], {1: attack})
    page = (tmp_path / "lab.html").read_text()
    assert attack not in page and page.count("&lt;script&gt;") >= 4
