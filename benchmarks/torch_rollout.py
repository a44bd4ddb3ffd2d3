"""PyTorch's rollouts with given lengths, in the three ways that transformers has to sample.

- `eager`: `generate` in batches of `slots` rows. A batch runs until its longest row has its length.
- `static`: the same with a static cache and `torch.compile` of the forward pass of a token
  (`cache_implementation="static"`); on a GPU its kernels are launched as one CUDA graph. All
  batches have the same shapes, so that it compiles once.
- `continuous`: transformers' continuous batching, with `slots` rows at a time and a cache for as
  many. Prefixes are not shared: prompts come again, with other weights in PPO, and no other side
  profits from that.

Every response has exactly its length, whatever its tokens are; `check_lengths` makes sure of it.
On a CPU all three run, without CUDA graphs, and `static` needs a C++ compiler. The machine has to
be idle: PyTorch's threads wait for each other after every operation.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.workload import Workload

PAD = 0
PAGE_TOKENS = 64  # of the paged cache; smaller pages than transformers' 256 waste less of them
PREFILL_TOKENS = 2048  # most tokens of a continuous batch
RESULT_SECONDS = 600.0  # that a response may take until it is an error


class LengthsReached(StoppingCriteria):
    """Ends row b of a batch when it has `lengths_b[b]` tokens."""

    def __init__(self, prompt_tokens: int, lengths_b: torch.Tensor) -> None:
        self.prompt_tokens, self.lengths_b = prompt_tokens, lengths_b

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Returns which rows end [B]."""
        return input_ids.shape[1] - self.prompt_tokens >= self.lengths_b


class TorchRollout:
    """A model, prompts, the lengths of their responses, and a way to sample.

    Args:
        model: the model; its `generation_config` is replaced.
        prompts: token ids of each prompt.
        lengths: number of tokens of each response.
        mode: one of `MODES`.
        slots: rows that are sampled at a time.
        compile_level: `default_compile_level` of continuous batching, 0 (not compiled) to 3.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        lengths: Sequence[int],
        *,
        mode: str,
        slots: int,
        compile_level: int = 0,
    ) -> None:
        self.model, self.prompts, self.lengths = model, list(prompts), list(lengths)
        self.slots, self.compile_level = slots, compile_level
        self.prompt_tokens, self.limit = max(map(len, prompts)), max(lengths)
        self._sample = MODES[mode]
        self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD,
            max_new_tokens=self.limit,
        )  # fmt: skip

    def run(self) -> list[list[int]]:
        """Samples all responses; returns their tokens."""
        responses = self._sample(self)
        check_lengths(responses, self.lengths)
        return responses

    def iteration(self) -> dict[str, float]:
        """Samples all responses; returns the seconds, as a side of a benchmark."""
        start = time.perf_counter()
        self.run()
        return {"rollout": time.perf_counter() - start}

    def eager(self) -> list[list[int]]:
        """Samples with `generate`."""
        return self._in_batches()

    def static(self) -> list[list[int]]:
        """Samples with `generate`, a static cache and a compiled forward pass."""
        config = CompileConfig()
        if self.model.device.type == "cpu":  # which transformers does not compile for by itself
            config = CompileConfig(mode="default")
            config._compile_all_devices = True
        return self._in_batches(cache_implementation="static", compile_config=config)

    def continuous(self) -> list[list[int]]:
        """Samples with continuous batching, whose manager and graphs are kept for the next call."""
        config = copy.deepcopy(self.model.generation_config)
        config.eos_token_id = -1  # none
        manager_of_run = self.model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=self._continuous_config(),
            persistent_manager=True,
        )
        responses: dict[str, list[int]] = {}
        with manager_of_run as manager:
            names = [
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
                for prompt, length in zip(self.prompts, self.lengths, strict=True)
            ]
            while len(responses) < len(names):
                result = manager.get_result(timeout=RESULT_SECONDS)
                if result is None or result.error:
                    reason = result.error if result else "its thread ended or gave no result"
                    raise SystemExit(f"continuous batching of transformers: {reason}")
                if result.is_finished():
                    responses[result.request_id] = list(result.generated_tokens)
        return [responses[name] for name in names]

    def _continuous_config(self) -> Any:
        """Returns a cache for `slots` rows of the longest prompt and the longest response."""
        try:
            from transformers.generation import ContinuousBatchingConfig
        except ImportError as error:
            raise SystemExit(f"continuous: needs a newer transformers ({error})") from error
        pages = -(-(self.prompt_tokens + self.limit) // PAGE_TOKENS)
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=self.slots * pages,
            max_batch_tokens=max(PREFILL_TOKENS, self.slots),
            max_requests_per_batch=self.slots,
            allow_block_sharing=False,
            default_compile_level=self.compile_level,
        )

    def _in_batches(self, **options: object) -> list[list[int]]:
        """Calls `generate` on one batch of `slots` rows after the other."""
        responses: list[list[int]] = []
        for start in range(0, len(self.prompts), self.slots):
            rows = self.prompts[start : start + self.slots]
            lengths = self.lengths[start : start + self.slots]
            missing = self.slots - len(rows)  # filled up with short rows, for equal shapes
            tokens_bt = self._generate(
                rows + rows[-1:] * missing, lengths + [1] * missing, **options
            )
            responses += [row[:n].tolist() for row, n in zip(tokens_bt, lengths, strict=False)]
        return responses

    def _generate(
        self, rows: list[list[int]], lengths: list[int], **options: object
    ) -> torch.Tensor:
        """Samples a batch; returns the tokens after the prompts, on the CPU."""
        device = self.model.device
        prompts = [torch.tensor(row) for row in rows]
        # A row as long as the longest prompt makes all batches as wide; it is dropped again.
        widest = torch.zeros(self.prompt_tokens, dtype=torch.long)
        ids_bt = pad_sequence([*prompts, widest], True, PAD, padding_side="left")[:-1].to(device)
        ones = [torch.ones_like(row) for row in prompts]
        mask_bt = pad_sequence([*ones, widest], True, 0, padding_side="left")[:-1].to(device)
        ends = LengthsReached(self.prompt_tokens, torch.tensor(lengths, device=device))
        with torch.inference_mode():
            tokens_bt = self.model.generate(
                input_ids=ids_bt,
                attention_mask=mask_bt,
                stopping_criteria=StoppingCriteriaList([ends]),
                **options,
            )
        return tokens_bt[:, self.prompt_tokens :].cpu()


MODES: dict[str, Callable[[TorchRollout], list[list[int]]]] = {
    "eager": TorchRollout.eager,
    "static": TorchRollout.static,
    "continuous": TorchRollout.continuous,
}


def check_lengths(responses: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Ends the benchmark if a response does not have its length."""
    for number, (response, length) in enumerate(zip(responses, lengths, strict=True)):
        if len(response) != length:
            raise SystemExit(f"response {number} has {len(response)} tokens, expected {length}")


def fastest(rollouts: dict[str, TorchRollout]) -> str:
    """Returns the fastest mode: each runs once to warm up, and once timed."""
    seconds = {}
    for mode, rollout in rollouts.items():
        rollout.run()
        seconds[mode] = rollout.iteration()["rollout"]
    print("PyTorch rollouts, seconds:", seconds, file=sys.stderr, flush=True)
    return min(seconds, key=lambda mode: seconds[mode])


def prepare_torch() -> torch.device:
    """Makes PyTorch use all cores, a GPU if there is one, and TF32 there, as in JAX."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    return torch.device("cpu")


def build(
    model_dir: str, work: Workload, *, dtype: str, mode: str, slots: int, compile_level: int
) -> TorchRollout:
    """Loads the model; `.iteration()` then samples all responses and takes the time.

    Args:
        model_dir: a Hugging Face directory with config.json and model.safetensors.
        work: prompts and lengths.
        dtype: dtype of the weights.
        mode: one of `MODES`.
        slots: rows that are sampled at a time.
        compile_level: as in `TorchRollout`.
    """
    device = prepare_torch()
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return TorchRollout(
        model.eval().to(device), work.prompts, work.lengths,
        mode=mode, slots=slots, compile_level=compile_level,
    )  # fmt: skip
