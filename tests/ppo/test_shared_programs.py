"""Runs that differ only in options that no program depends on share their programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.config import NOT_IN_PROGRAMS
from ppo.learner import Learner, RunPrompts, _compile_rollout_of_runs
from ppo.run_group import SHARED_OPTIONS
from ppo.update import Updater, batch_metrics
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.rewards.density_ratio import DensityRatio, DiscriminatorConfig
from tests.tiny_models import ALGORITHMS

PROMPT = 5
# Another value for every option that is left out of the programs, also of a constant rate.
OTHER = {
    "seed": 7, "long_prompts": "drop", "missing_eos_penalty": 2.5, "max_prompt_tokens": 90,
    "calibration_batches": 3, "pack_levels": 2, "checkpoint_every": 5, "keep_checkpoints": 2,
    "samples_per_step": 3, "eval_every": 9, "eval_batches": 4,
}  # fmt: skip
OF_A_CONSTANT_RATE = {"total_steps": 11, "ppo_epochs": 3}
# Another value for every option that other programs depend on, but no rollout of several runs.
OF_UPDATES = {
    "algorithm": "grpo", "num_minibatches": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 0.5, "lr_schedule": "linear", "warmup_steps": 1, "weight_decay": 0.5,
    "max_grad_norm": 2.5, "clip_range": 0.3, "clip_range_high": 0.4, "value_clip_range": 0.3,
    "vf_coef": 0.7, "gamma": 0.9, "gae_lambda": 0.6, "kl_coef": 0.6, "whiten_advantages": False,
    "scale_advantages": False, "loss_average": "constant", "logprob_chunk": 3,
}  # fmt: skip
LORA = LoRAConfig(rank=2)
OTHER_LORA = {"rank": 4, "alpha": 5.0, "dropout": 0.5, "target_modules": ("q_proj", "v_proj")}
OTHER_DISCRIMINATOR = {
    "learning_rate": 2e-3, "hidden_size": 8, "steps": 3, "batch_size": 4, "weight_decay": 0.0,
    "folds": 2,
}  # fmt: skip


@pytest.fixture
def make_updater(architecture, ppo_config):
    """Returns a function that makes (updater, state, base) with fields of PPOConfig changed."""

    def make(lora=LORA, **changes):
        policy = Llama(architecture, rngs=nnx.Rngs(0), stop_ids=(3,))
        learner, state, base = Learner.attach(ppo_config(**changes), lora, policy=policy, pad=1)
        return Updater(learner), state, base

    return make


def text_of_step(updater, state, base):
    """Lowers an optimizer step for exactly this updater, with all of its options."""
    batch, _ = updater._abstract(updater.config.batch_size, PROMPT)
    count = jax.ShapeDtypeStruct((), jnp.float32)
    return updater._step.lower(updater, state, base, batch, None, count, None, None).as_text()


def texts_of_programs(updater, state, base):
    """Lowers all programs of a run like `text_of_step`."""
    learner = updater.learner
    batch, targets = updater._abstract(updater.config.batch_size, PROMPT)
    tokens_bp, mask_bp = learner._abstract_tokens(updater.config.prompts_per_batch, PROMPT)
    key = jax.random.key(0)
    reference = learner._reference_logp.lower(
        learner, base, batch.tokens_bt, batch.mask_bt, slots=None
    )
    rollout = learner._compiled_rollout.lower(
        learner, state.params, base, tokens_bp, mask_bp, key, slots=None
    )
    lowered = [
        reference,
        rollout,
        updater._targets.lower(updater, state.params, base, batch, None),
        batch_metrics.lower(updater.config, batch, targets, batch.ref_logp_br),
    ]
    if learner.samples_runs_together:
        lowered.append(lower_rollout_of_runs(learner, state, base))
    return [text_of_step(updater, state, base), *(program.as_text() for program in lowered)]


def lower_rollout_of_runs(learner, state, base):
    """Lowers the rollout of two runs for exactly this learner, with all of its options."""
    tokens_bp, mask_bp = learner._abstract_tokens(learner.config.prompts_per_batch, PROMPT)
    runs = 2 * (RunPrompts(state.params["lora"], tokens_bp, mask_bp, jax.random.key(0)),)
    return _compile_rollout_of_runs(()).lower(learner, runs, base, slots=None)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_program_depends_on_an_option_that_is_left_out(make_updater, algorithm):
    assert OTHER.keys() == NOT_IN_PROGRAMS.keys()
    one = make_updater(**ALGORITHMS[algorithm])
    changed = OTHER | OF_A_CONSTANT_RATE
    other = make_updater(**ALGORITHMS[algorithm], **changed)
    own, others = one[0].config, other[0].config
    assert all(getattr(own, name) != getattr(others, name) for name in changed)
    assert texts_of_programs(*one) == texts_of_programs(*other)
    assert one[0] != other[0] and one[0].for_programs == other[0].for_programs
    assert one[0].learner.for_programs == other[0].learner.for_programs


def test_other_options_are_kept_for_programs(ppo_config):
    config = ppo_config()
    left_out = NOT_IN_PROGRAMS.keys() | OF_A_CONSTANT_RATE.keys()
    for field in dataclasses.fields(config):
        same = getattr(config.for_programs, field.name) == getattr(config, field.name)
        assert same or field.name in left_out, field.name
    assert config.seed == 0 and dataclasses.replace(config, seed=3).seed == 3


def test_a_rollout_of_several_runs_depends_on_the_shared_options_alone(make_updater):
    """`RunGroup` samples with one program for runs that agree in these."""
    changed = OTHER | OF_A_CONSTANT_RATE | OF_UPDATES
    named = {*changed, *SHARED_OPTIONS, "rollout_slots", "top_p"}  # no slots, and no other top_p
    made = [make_updater(samples_per_prompt=2, **changes) for changes in ({}, changed)]
    own, other = (updater.config for updater, *_ in made)
    assert named == {field.name for field in dataclasses.fields(own)}
    assert all(getattr(own, name) != getattr(other, name) for name in changed)
    texts = [lower_rollout_of_runs(u.learner, *rest).as_text() for u, *rest in made]
    assert texts[0] == texts[1]


def test_an_adapter_shares_programs_only_with_those_that_compute_the_same(make_updater):
    assert OTHER_LORA.keys() == {field.name for field in dataclasses.fields(LORA)}
    one = make_updater()
    others = {
        name: make_updater(lora=dataclasses.replace(LORA, **{name: value}))
        for name, value in OTHER_LORA.items()
    }
    shared = {name for name, made in others.items() if made[0].for_programs == one[0].for_programs}
    assert shared == {"dropout"}  # it is recorded for PEFT alone
    assert text_of_step(*others["dropout"]) == text_of_step(*one)


def test_discriminators_share_programs_only_with_those_that_compute_the_same():
    """Their number of human responses, and so their bound, is not among their options."""
    config, z_ns = DiscriminatorConfig(), np.eye(6, 2, dtype=np.float32)
    assert OTHER_DISCRIMINATOR.keys() == {field.name for field in dataclasses.fields(config)}
    changed = [dataclasses.replace(config, **{n: v}) for n, v in OTHER_DISCRIMINATOR.items()]
    sizes = [z_ns, z_ns[:4], z_ns[:, :1]]
    made = [DensityRatio(c, z)._estimator for c in (config, *changed) for z in sizes]
    assert len(set(made)) == len(made)
    assert DensityRatio(config, 3 * z_ns + 1)._estimator == made[0]  # latents are an argument


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_decays_depends_on_the_number_of_updates(make_updater, schedule):
    texts = []
    for steps, epochs in ((4, 1), (5, 1), (4, 2)):
        made = make_updater(lr_schedule=schedule, total_steps=steps, ppo_epochs=epochs)
        config = made[0].config.for_programs
        assert (config.total_steps, config.ppo_epochs) == (steps, epochs)
        texts.append(text_of_step(*made))
    assert len(set(texts)) == 3


def test_a_warm_up_depends_on_the_updates_of_a_step_alone(make_updater):
    texts = []
    for steps, epochs in ((4, 2), (9, 2), (4, 3)):
        made = make_updater(warmup_steps=2, total_steps=steps, ppo_epochs=epochs)
        assert made[0].config.for_programs.ppo_epochs == epochs
        texts.append(text_of_step(*made))
    assert texts[0] == texts[1] != texts[2]


def test_a_second_run_traces_nothing_again(make_updater):
    results, counts = [], []
    events: list[str] = []

    def listen(event, _seconds, **_):
        events.extend([event] if event == "/jax/core/compile/jaxpr_trace_duration" else [])

    tokens = jnp.ones((2, PROMPT), jnp.int32)
    mask, key = jnp.ones_like(tokens, bool), jax.random.key(0)
    made = [make_updater(batch_size=2, **changes) for changes in ({}, {"total_steps": 9})]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for updater, state, base in made:
            events.clear()
            out = updater.learner.rollout(state.params, base, tokens, mask, key)
            counts.append(len(events))
            results.append(np.asarray(out.tokens_br))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[0] > 0 and counts[1] == 0
    np.testing.assert_array_equal(*results)
