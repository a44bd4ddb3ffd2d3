"""PyTorch's ways to sample: the given lengths, and the same greedy tokens."""

import pytest
import torch
import transformers
from transformers import GenerationConfig

from tests.oracles import save_tiny_llama, tiny_llama_config, tiny_tokenizer

if not hasattr(transformers.generation, "ContinuousBatchingConfig"):
    pytest.skip("transformers has no continuous batching", allow_module_level=True)

from benchmarks.torch_rollout import PAD, TorchRollout, check_lengths

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [5], [6, 7, 8], [3, 4, 9]]
LENGTHS = [4, 3, 5, 1, 9, 7]


@pytest.fixture
def sample(tmp_path):
    """Returns a function that samples in a mode, greedily or not."""
    save_tiny_llama(tmp_path / "policy", tiny_llama_config(), tiny_tokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", attn_implementation="sdpa"
    ).eval()

    def run(mode: str, greedy: bool) -> list[list[int]]:
        torch.manual_seed(0)
        rollout = TorchRollout(model, PROMPTS, LENGTHS, mode=mode, slots=4)
        if greedy:
            longest = max(LENGTHS)
            model.generation_config = GenerationConfig(max_new_tokens=longest, pad_token_id=PAD)
        return rollout.run()

    yield run
    model.destroy_cached_continuous_batching_manager()


# `static` is left out of both: it takes a minute to compile.


@pytest.mark.parametrize("mode", ["eager", "continuous"])
def test_the_given_lengths(sample, mode):
    assert [len(row) for row in sample(mode, greedy=False)] == LENGTHS


def test_the_greedy_tokens(sample):
    assert sample("eager", greedy=True) == sample("continuous", greedy=True)


def test_a_response_of_another_length_ends_the_benchmark():
    check_lengths([[1, 2], [3]], [2, 1])
    with pytest.raises(SystemExit, match="response 1 has 1 tokens, expected 2"):
        check_lengths([[1, 2], [3]], [2, 2])
