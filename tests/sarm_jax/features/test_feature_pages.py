"""The content of feature_pages.json, against plain loops."""

import json

import numpy as np
import pytest

from sarm_jax.features import feature_pages as feature_pages_module
from sarm_jax.features.feature_pages import (
    AROUND,
    MAX_PAGES,
    TOKENS,
    ResponseGroups,
    _tokens,
    feature_pages,
)
from sarm_jax.features.neighbours import decoder_directions
from sarm_jax.features.token_latents import TokenLatents

TEXTS = [(f"prompt {n}", f"answer {n} " * (n % 4 + 1)) for n in range(9)] + [("prompt 0", "naïve")]


@pytest.fixture
def responses(reward_model):
    _, latents = reward_model.store(*zip(*TEXTS, strict=True))
    groups = {"chosen": np.array([0, 1, 1, 2, 9]), "rejected": np.arange(3, 9)}
    return ResponseGroups(TEXTS, latents, groups)


def test_every_number_of_a_page(reward_model, responses):
    size, weight_f = reward_model.latent_size, reward_model.feature_weights()
    _, z_nf = reward_model.score(*zip(*TEXTS, strict=True))
    ids = np.argsort(-(z_nf > 0).sum(axis=0))[:3].tolist()
    roles = {i: ["detector", "carrier"][: n + 1] for n, i in enumerate(ids)}
    content = feature_pages(reward_model, responses, roles, tau={ids[0]: 0.25}, examples=4)
    assert content["latents"] == size
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [row["feature"] for row in content["features"]] == ids
    decoder = np.asarray(reward_model.sae.decoder[...])
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for row in content["features"]:
        i, z_n = row["feature"], z_nf[:, row["feature"]]
        assert row["roles"] == roles[i] and row["weight"] == pytest.approx(weight_f[i])
        assert row["weight_rank"] == 1 + sum(abs(w) > abs(weight_f[i]) for w in weight_f)
        for name, rows in responses.groups.items():
            group = row["groups"][name]
            assert group["responses"] == len(rows)
            assert group["fires"] == np.mean([z_n[n] > 0 for n in rows])
            above = np.mean([z_n[n] > 0.25 for n in rows]) if i == ids[0] else None
            assert group["above_tau"] == above
            assert sum(group["counts"]) == sum(z_n[n] != 0 for n in rows)
            assert group["range"] == pytest.approx([min(0, z_n.min()), max(0, z_n.max())])
        best = [n for n in np.argsort(-z_n, kind="stable")[:4] if z_n[n] > 0]
        assert [e["z"] for e in row["examples"]] == pytest.approx([z_n[n] for n in best])
        for example, n in zip(row["examples"], best, strict=True):
            prompt, response = TEXTS[n]
            assert example["prompt"] == prompt
            assert "".join(text for text, _ in example["tokens"]) == f"{response.strip()}<|eot_id|>"
            assert example["tokens"][-1][1] == pytest.approx(z_n[n], rel=1e-3, abs=1e-5)
            assert example["groups"] == [g for g, rows in responses.groups.items() if n in rows]
        cosine = unit @ unit[i]
        nearest = [n for n in np.argsort(-cosine) if n != i][:5]
        assert [n["feature"] for n in row["neighbours"]] == nearest
        assert [n["cosine"] for n in row["neighbours"]] == pytest.approx(cosine[nearest], abs=1e-4)


def test_there_are_at_most_so_many_pages_and_none_without_features(reward_model, responses):
    roles = {i: ["x"] for i in range(64)}
    content = feature_pages(reward_model, responses, roles, tau={}, examples=0)
    assert len(content["features"]) == MAX_PAGES
    assert all(row["examples"] == [] for row in content["features"])
    assert feature_pages(reward_model, responses, {}, tau={})["features"] == []


def test_a_response_that_occurs_twice_is_shown_once(reward_model):
    texts = [*TEXTS, *TEXTS]
    _, latents = reward_model.store(*zip(*texts, strict=True))
    groups = {"base": np.arange(len(TEXTS)), "trained": np.arange(len(TEXTS), len(texts))}
    roles = {i: ["x"] for i in range(20)}
    content = feature_pages(reward_model, ResponseGroups(texts, latents, groups), roles, tau={})
    for row in content["features"]:
        shown = [json.dumps(example["tokens"]) + example["prompt"] for example in row["examples"]]
        assert len(shown) == len(set(shown))
        assert row["groups"]["base"] == row["groups"]["trained"]


def test_the_token_that_is_read_is_a_piece_of_its_own(tokenizer):
    half = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    ids = [half, half, tokenizer.eos_token_id]
    z_ts = np.array([[3], [2], [1]], np.float32)
    shown = _tokens(tokenizer, TokenLatents(ids, z_ts, response=0, pooled=2), 0)
    assert shown[-1] == ["<|eot_id|>", 1.0] and max(z for _, z in shown) == 3


@pytest.mark.parametrize("strongest", [0, 100, 300, 399])
def test_of_a_long_response_the_end_and_the_strongest_tokens_are_kept(tokenizer, strongest):
    ids = tokenizer("x" * 400, add_special_tokens=False)["input_ids"]
    z_ts = np.zeros((400, 2), np.float32)
    z_ts[strongest, 1] = 1
    shown = _tokens(tokenizer, TokenLatents(ids, z_ts, response=0, pooled=399), 1)
    gaps = [piece["left_out"] for piece in shown if isinstance(piece, dict)]
    pieces = [piece for piece in shown if not isinstance(piece, dict)]
    around = [n for n in range(400) if n >= 400 - TOKENS or abs(n - strongest) <= AROUND]
    assert len(pieces) == len(around) and sum(gaps) == 400 - len(around)
    assert [z for _, z in pieces if z] == [1.0]
    assert len(gaps) == (0 if len(around) == 400 else 1 + (strongest == 100))


def test_the_stage_scales_the_decoder_rows_once(reward_model, responses, monkeypatch):
    """Pages with the rows of `identify` are those that scale them themselves."""
    roles = {i: ["x"] for i in range(3)}
    content = feature_pages(reward_model, responses, roles, tau={}, examples=0)
    direction_fd = decoder_directions(reward_model.sae)
    monkeypatch.delattr(feature_pages_module, "decoder_directions")
    again = feature_pages(
        reward_model, responses, roles, tau={}, examples=0, direction_fd=direction_fd
    )
    assert again == content
