"""Latents at every token: equal to those of the conversation that ends there; pieces of text."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sarm_jax.features.token_latents import token_latents, token_texts
from sarm_jax.models.linear_reward import LinearReward, LinearRewardConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from tests.closeness import assert_close
from tests.meshes import divisible_llama_config, place_parameters
from tests.tiny_models import scale_matrices

TEXTS = [("say hi", "hi there"), ("Ça va ?", "naïve 😊"), ("p", "x" * 60)]
FEATURES = (3, 9, 40)


@pytest.fixture
def classifier(architecture, tokenizer):
    """A classifier that pools the last token that is not PAD, with an SAE."""
    config = LinearRewardConfig(architecture, tokenizer.pad_token_id, SAEConfig(32, 64, 8))
    model = LinearReward(config, rngs=nnx.Rngs(1))
    scale_matrices(model.trunk)
    model.score[...] = jax.random.normal(jax.random.key(2), (32,))
    return RewardModel(model, tokenizer, max_length=512, batch_size=8)


@pytest.mark.parametrize("kind", ["reward_model", "classifier"])
def test_a_latent_at_a_token_is_that_of_the_conversation_up_to_it(kind, request):
    model = request.getfixturevalue(kind)
    rows = token_latents(model, TEXTS, FEATURES)
    _, z_bf = model.score(*zip(*TEXTS, strict=True), latent_indices=FEATURES)
    for row, z_f, (prompt, response) in zip(rows, z_bf, TEXTS, strict=True):
        assert row.ids == model.encode(prompt, response)
        assert_close(row.z_ts[row.pooled], z_f, 1e-5)
        places = range(row.response, len(row.ids), 31)
        _, before = model.score_tokens([row.ids[: t + 1] for t in places], None, FEATURES)
        assert_close(row.z_ts[list(places)], before, 1e-5)
    assert any(row.z_ts.any() for row in rows)


def test_the_response_starts_where_its_first_token_is(reward_model):
    for row, (_, response) in zip(token_latents(reward_model, TEXTS, [0]), TEXTS, strict=True):
        pieces = token_texts(reward_model.tokenizer, row.ids[row.response : row.pooled + 1])
        assert "".join(text for text, _ in pieces) == f"{response}<|eot_id|>"
        assert sum(count for _, count in pieces) == row.pooled + 1 - row.response


def test_a_truncated_conversation_is_read_from_its_beginning(reward_model):
    reward_model.max_length = 40
    (row,) = token_latents(reward_model, [("p" * 90, "short")], [0])
    assert len(row.ids) == 40 == len(row.z_ts) and row.pooled == 39
    decoded = reward_model.tokenizer.decode(row.ids[row.response :])
    assert decoded.startswith("short") and "p" not in decoded.removeprefix("short")
    (row,) = token_latents(reward_model, [("question", "r" * 90)], [0])
    assert len(row.ids) == 40 and row.response == int(
        row.ids[0] == reward_model.tokenizer.bos_token_id
    )


@pytest.mark.parametrize("text", ["plain words", "Ça naïve 😊😊 拒絶", "\n\n a  b", "", "é"])
def test_pieces_make_up_the_text_and_split_no_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(count for _, count in pieces) == len(ids)
    assert all("\ufffd" not in piece for piece, _ in pieces)


def test_bytes_that_are_no_character_do_not_swallow_the_rest(tokenizer):
    (start,) = tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    ids = [start, *tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]]
    pieces = token_texts(tokenizer, ids)
    assert sum(count for _, count in pieces) == len(ids)
    assert "".join(text for text, _ in pieces).endswith("efgh")


def test_one_row_has_the_same_latents_in_any_batch(reward_model):
    alone = [token_latents(reward_model, [text], FEATURES)[0] for text in TEXTS]
    for one, row in zip(alone, token_latents(reward_model, TEXTS, FEATURES), strict=True):
        assert one.ids == row.ids and dataclasses.astuple(one)[2:] == dataclasses.astuple(row)[2:]
        np.testing.assert_allclose(one.z_ts, row.z_ts, atol=1e-5)


def test_a_mesh_gives_the_same_latents(tokenizer):
    trunk = divisible_llama_config(tokenizer, layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    scale_matrices(sarm.trunk)
    single = token_latents(RewardModel(sarm, tokenizer, 512, batch_size=4), TEXTS, FEATURES)
    placement = Placement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    sarm.trunk.placement = placement
    model = RewardModel(place_parameters(sarm, placement), tokenizer, 512, batch_size=4)
    for row, other in zip(single, token_latents(model, TEXTS, FEATURES), strict=True):
        assert_close(other.z_ts, row.z_ts, 1e-5)
