"""The PyTorch baseline: one PPO iteration on SmolLM2-135M with transformers and PEFT.

An iteration does the same work as this project's, on the same prompts (`ppo_iteration` runs both):

1. Rollout: sample up to the longest response, with a KV cache. `generate` says in which of the ways
   of `torch_rollout`.
2. Score: a reward of SARM's shape. The first 15 layers of the same model are the trunk, followed by
   standardise → TopK SAE (random weights) → linear head at the last token of the response.
3. Update: old log-probs and values, reference log-probs (without adapters), then `epochs` epochs
   over the whole batch: the clipped PPO loss on LoRA (r 16 on q, k, v, o) and a value head, AdamW.

It runs on a GPU if there is one, with float32 products in TF32 as in JAX. It is meant to be as fast
as plain PyTorch gets: sdpa attention, inference_mode if no gradient is needed, adapters merged into
the weights for the rollout (on a CPU faster than separate adapters), logits only on the response
positions, and gradients only for the trained parameters. With `generate="eager"`, the default, it
uses neither a compiler nor CUDA graphs.

Sources: PPO, arXiv 1707.06347, with the details of arXiv 2403.17031.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel

from benchmarks.torch_rollout import MODES, TorchRollout, fastest, prepare_torch
from benchmarks.workload import Workload

TRUNK_LAYERS, LATENTS, TOP_K = 15, 4608, 32
GAMMA, LAM, CLIP, VALUE_CLIP, VF_COEF, KL_COEF = 1.0, 0.95, 0.2, 0.2, 0.1, 0.02
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0


class Sarm(torch.nn.Module):
    """A reward model of SARM's shape: frozen trunk, TopK SAE with random weights, linear head."""

    def __init__(self, model_dir: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = LlamaModel.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
        self.trunk.layers = self.trunk.layers[:TRUNK_LAYERS]
        self.trunk.norm = torch.nn.Identity()  # SARM applies no final norm
        self.encoder = torch.nn.Linear(self.trunk.config.hidden_size, LATENTS, dtype=dtype)
        self.head = torch.nn.Linear(LATENTS, 1, bias=False)
        self.requires_grad_(False)

    def forward(self, ids_bt: torch.Tensor, mask_bt: torch.Tensor) -> torch.Tensor:
        """Computes the score [B] at the last token that is no padding."""
        h_btd = self.trunk(ids_bt, mask_bt, positions(mask_bt), use_cache=False).last_hidden_state
        places_t = torch.arange(mask_bt.shape[1], device=mask_bt.device)
        h_bd = h_btd[torch.arange(len(mask_bt)), (mask_bt * places_t).argmax(-1)].float()
        std_b1, mean_b1 = torch.std_mean(h_bd, dim=-1, keepdim=True)  # ddof = 1
        x_bd = ((h_bd - mean_b1) / (std_b1 + 1e-6)).to(self.encoder.weight.dtype)
        top_bk, index_bk = self.encoder(x_bd).float().topk(TOP_K, dim=-1)
        return (top_bk * self.head.weight[0, index_bk]).sum(-1)


class TorchPPO:
    """The policy with its adapters and value head, the reward model, the prompts, the optimizer."""

    def __init__(
        self, model_dir: str, work: Workload, *, dtype: torch.dtype, cache: bool, generate: str
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="sdpa"
        )
        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = get_peft_model(base, lora).eval()  # no effect, as there is no dropout
        self.policy.to(self.device)
        self.trunk, self.lm_head = base.model, base.lm_head
        self.value_head = torch.nn.Linear(base.config.hidden_size, 1, device=self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.sarm = Sarm(model_dir, dtype).to(self.device)
        self.params = [p for p in self.policy.parameters() if p.requires_grad]
        self.params += list(self.value_head.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=LEARNING_RATE, eps=1e-5, weight_decay=0.0, fused=True
        )
        self.new_tokens, self.epochs, self.cache = work.new_tokens, work.epochs, cache
        prompts, lengths_b = [torch.tensor(row) for row in work.prompts], torch.tensor(work.lengths)
        pad = base.config.pad_token_id or 0
        ones = [torch.ones_like(row) for row in prompts]
        arrays = (
            pad_sequence(prompts, True, pad, padding_side="left"),
            pad_sequence(ones, True, 0, padding_side="left"),
            (torch.arange(work.new_tokens) < lengths_b[:, None]).long(),
        )
        self.prompts_bp, self.prompt_mask_bp, self.counted_bn = (x.to(self.device) for x in arrays)
        self.losses: list[float] = []  # of the last iteration, one per epoch
        self.pad, self.rollouts = pad, self._choose(base, work, generate)

    def _choose(self, base: PreTrainedModel, work: Workload, generate: str) -> TorchRollout | None:
        """Returns the way to sample, the fastest for "best"; None: `generate` in this module."""
        if generate == "eager":
            return None
        rollouts = {
            mode: TorchRollout(base, work.prompts, work.lengths, mode=mode, slots=len(work.prompts))
            for mode in (MODES if generate == "best" else [generate])
        }
        if generate == "best":
            with merged(self.policy):
                generate = fastest(rollouts)
        return rollouts[generate]

    def iteration(self) -> dict[str, float]:
        """Runs one PPO iteration; returns the seconds of rollout, score, update and total."""
        start = self.now()
        ids_bt = self.rollout()
        mask_bt = torch.cat([self.prompt_mask_bp, self.counted_bn], dim=1)
        rolled_out = self.now()
        with torch.inference_mode():
            score_b = self.sarm(ids_bt, mask_bt)
        scored = self.now()
        self.update(ids_bt, mask_bt, score_b)
        end = self.now()
        return {
            "rollout": rolled_out - start,
            "score": scored - rolled_out,
            "update": end - scored,
            "total": end - start,
        }

    def now(self) -> float:
        """Waits until the device has finished its work; returns the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rollout(self) -> torch.Tensor:
        """Samples at temperature 1; returns prompts and responses [B, P + N]."""
        if self.rollouts is not None:
            with merged(self.policy):
                responses = [torch.tensor(row) for row in self.rollouts.run()]
            responses_bn = pad_sequence(responses, True, self.pad).to(self.device)
            return torch.cat([self.prompts_bp, responses_bn], dim=1)
        with merged(self.policy), torch.inference_mode():
            ids_bt = self.policy.generate(
                input_ids=self.prompts_bp,
                attention_mask=self.prompt_mask_bp,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=self.new_tokens,
                max_new_tokens=self.new_tokens,
                use_cache=self.cache,
            )
        return ids_bt.clone()  # an ordinary tensor, which autograd can save

    def logp_and_values(
        self, ids_bt: torch.Tensor, mask_bt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the log-probs and values [B, N] of the response tokens.

        Both are read at the positions that predict the tokens.
        """
        hidden_btd = self.trunk(
            ids_bt[:, :-1], mask_bt[:, :-1], positions(mask_bt[:, :-1]), use_cache=False
        ).last_hidden_state
        hidden_id = hidden_btd[:, -self.new_tokens :].flatten(0, 1)  # i: B · N; one large matmul
        targets_bn = ids_bt[:, -self.new_tokens :]
        logits_iv = self.lm_head(hidden_id).float()
        nll_i = F.cross_entropy(logits_iv, targets_bn.flatten(), reduction="none")
        return -nll_i.view_as(targets_bn), self.value_head(hidden_id.float()).view_as(targets_bn)

    def update(self, ids_bt: torch.Tensor, mask_bt: torch.Tensor, score_b: torch.Tensor) -> None:
        """Computes log-probs, values, reference log-probs and advantages, then runs the epochs."""
        with torch.inference_mode():
            old_logp_bn, old_value_bn = self.logp_and_values(ids_bt, mask_bt)
            with self.policy.disable_adapter():
                ref_logp_bn, _ = self.logp_and_values(ids_bt, mask_bt)
            reward_bn = -KL_COEF * (old_logp_bn - ref_logp_bn)
            response_bn = self.counted_bn.float()
            reward_bn[torch.arange(len(score_b)), self.counted_bn.sum(-1) - 1] += score_b
            advantage_bn = gae(reward_bn, old_value_bn, response_bn)
            return_bn = advantage_bn + old_value_bn
            advantage_bn = whiten(advantage_bn, response_bn)
        targets = {
            "old_logp_bn": old_logp_bn,
            "old_value_bn": old_value_bn,
            "advantage_bn": advantage_bn,
            "return_bn": return_bn,
            "mask_bn": response_bn,
        }
        # Clones are ordinary tensors, as in `rollout`.
        targets = {name: x_bn.clone() for name, x_bn in targets.items()}
        self.losses = []
        for _ in range(self.epochs):
            logp_bn, value_bn = self.logp_and_values(ids_bt, mask_bt)
            loss = ppo_loss(logp_bn, value_bn, **targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
            self.optimizer.step()
            self.losses.append(loss.item())


def positions(mask_bt: torch.Tensor) -> torch.Tensor:
    """Computes position ids [B, T] that do not count padding."""
    return (mask_bt.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def merged(policy: torch.nn.Module) -> Iterator[None]:
    """Merges the adapters into the weights, in place, during the block."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight.data for layer in layers]
    halves = [weight for weight in weights if weight.dtype != torch.float32]
    kept = [weight.clone() for weight in halves]  # since a rounded sum cannot be undone
    policy.merge_adapter()
    try:
        yield
    finally:
        policy.unmerge_adapter()
        for weight, original in zip(halves, kept, strict=True):
            weight.copy_(original)


def gae(reward_bn: torch.Tensor, value_bn: torch.Tensor, mask_bn: torch.Tensor) -> torch.Tensor:
    """Computes generalised advantage estimates [B, N]; the value after the last token is 0."""
    next_value_bn = F.pad(value_bn * mask_bn, (0, 1))[:, 1:]
    delta_bn = (reward_bn + GAMMA * next_value_bn - value_bn) * mask_bn
    advantage_bn = torch.empty_like(delta_bn)
    carry_b = torch.zeros_like(delta_bn[:, 0])
    for t in reversed(range(delta_bn.shape[1])):
        carry_b = delta_bn[:, t] + GAMMA * LAM * carry_b
        advantage_bn[:, t] = carry_b
    return advantage_bn


def whiten(x_bn: torch.Tensor, mask_bn: torch.Tensor) -> torch.Tensor:
    """Whitens [B, N] over all masked tokens of the batch: (x - mean) / sqrt(var + 1e-8)."""
    tokens = mask_bn.sum()
    mean = (x_bn * mask_bn).sum() / tokens
    var = ((x_bn - mean).square() * mask_bn).sum() / tokens
    return (x_bn - mean) * torch.rsqrt(var + 1e-8)


def ppo_loss(
    logp_bn: torch.Tensor,
    value_bn: torch.Tensor,
    old_logp_bn: torch.Tensor,
    old_value_bn: torch.Tensor,
    advantage_bn: torch.Tensor,
    return_bn: torch.Tensor,
    mask_bn: torch.Tensor,
) -> torch.Tensor:
    """Computes the clipped policy loss plus `VF_COEF` times the clipped value loss.

    Both are means over the masked tokens.
    """
    ratio_bn = (logp_bn - old_logp_bn).clamp(-20.0, 20.0).exp()
    clipped_bn = ratio_bn.clamp(1.0 - CLIP, 1.0 + CLIP)
    policy_bn = torch.maximum(-advantage_bn * ratio_bn, -advantage_bn * clipped_bn)
    near_bn = old_value_bn + (value_bn - old_value_bn).clamp(-VALUE_CLIP, VALUE_CLIP)
    error_bn = torch.maximum((value_bn - return_bn).square(), (near_bn - return_bn).square())
    return ((policy_bn + 0.5 * VF_COEF * error_bn) * mask_bn).sum() / mask_bn.sum()


def build(
    model_dir: str, work: Workload, dtype: str, cache: bool = True, generate: str = "eager"
) -> TorchPPO:
    """Loads the models; `.iteration()` then runs and times one PPO iteration on all cores.

    Args:
        model_dir: a Hugging Face directory with config.json and model.safetensors.
        work: the workload.
        dtype: dtype of the weights.
        cache: use a KV cache; without it every token costs a pass over all positions before it.
        generate: one of the ways to sample of `torch_rollout`, or "best": the fastest one.
    """
    prepare_torch()
    return TorchPPO(model_dir, work, dtype=getattr(torch, dtype), cache=cache, generate=generate)
