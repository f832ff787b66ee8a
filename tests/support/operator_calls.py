"""One small call of every public operator, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import spot_kernels

# Those whose results are integers, or stand for integers: nothing flows back through them.
INTEGERS = ("linear_assignment", "assign_masks", "match_masks", "overlap_counts", "mask_labels")


def calls(device: str = "cpu", batch: int = 2, tokens: int = 9) -> dict[str, tuple[Callable, tuple[torch.Tensor, ...]]]:
    """Operator → a function of tensors and the tensors, float32 or labels, the same in every process.

    Two heads, three slots; every optional result is requested. tokens: a square.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    def labels() -> torch.Tensor:
        return torch.randint(3, (batch, tokens), generator=generator, dtype=torch.int64, device="cpu").to(device)

    order = torch.randperm(tokens, generator=generator, dtype=torch.int64, device="cpu").to(device)
    rows = 3 * batch
    return {
        "slot_attention_step": (
            lambda q, k, v: spot_kernels.slot_attention_step(q, k, v, return_attn=True, return_logits=True),
            (normal(batch, 2, 3, 8), normal(batch, 2, tokens, 8), normal(batch, 2, tokens, 8)),
        ),
        "slot_cross_attention": (
            spot_kernels.slot_cross_attention,
            (normal(batch, 2, tokens, 8), normal(batch, 2, 3, 8), normal(batch, 2, 3, 8)),
        ),
        "slot_cross_map": (spot_kernels.slot_cross_map, (normal(batch, 2, tokens, 8), normal(batch, 2, 3, 8))),
        "folded_cross_attention": (
            lambda x, a, v: spot_kernels.folded_cross_attention(x, a, v, scale=0.5),
            (normal(batch, tokens, 16), normal(batch, 2, 3, 16), normal(batch, 2, 3, 16)),
        ),
        "folded_cross_map": (
            lambda x, a: spot_kernels.folded_cross_map(x, a, scale=0.5),
            (normal(batch, tokens, 16), normal(batch, 2, 3, 16)),
        ),
        "permuted_causal_attention": (
            lambda q, k, v: spot_kernels.permuted_causal_attention(q, k, v, order, check=True),
            tuple(normal(batch, 2, tokens, 8) for _ in "qkv"),
        ),
        "shift_by_order": (
            lambda x, bos: spot_kernels.shift_by_order(x, bos, order, check=True),
            (normal(batch, tokens, 8), normal(8)),
        ),
        "gru_norm": (
            spot_kernels.gru_norm,
            (normal(rows, 24), normal(rows, 24), normal(rows, 8), normal(8), normal(8)),
        ),
        "add_norm": (
            lambda x, delta, weight, bias: spot_kernels.add_norm(x, weight, bias, delta=delta)[:2],
            (normal(batch, tokens, 8), normal(batch, tokens, 8), normal(8), normal(8)),
        ),
        "linear_relu": (spot_kernels.linear_relu, (normal(batch, tokens, 8), normal(24, 8), normal(24))),
        "linear_assignment": (spot_kernels.linear_assignment, (normal(batch, 3, 4),)),
        "assign_masks": (lambda a, b: spot_kernels.assign_masks(a, b, 3), (labels(), labels())),
        "match_masks": (lambda a, b: spot_kernels.match_masks(a, b, 3), (labels(), labels())),
        "overlap_counts": (lambda a, b: spot_kernels.overlap_counts(a, b, 3, 4), (labels(), labels())),
        "mask_labels": (lambda masks: spot_kernels.mask_labels(masks, 80), (normal(batch, tokens, 3),)),
    }


def results_of(results: object) -> tuple[torch.Tensor, ...]:
    """A tuple of an operator's results, one or several."""
    return results if isinstance(results, tuple) else (results,)


def with_gradients(function: Callable, tensors: Sequence[torch.Tensor], view: Callable = lambda x: x) -> list:
    """The results of a call, then the gradients of all floating inputs under a gradient of every floating result.

    view: gives those gradients another layout.
    """
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    results = results_of(function(*leaves))
    through = [result for result in results if result.requires_grad]
    given = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in through]
    given = [view(gradient) for gradient in given]
    gradients = torch.autograd.grad(through, leaves, given) if through else ()
    return [*(result.detach() for result in results), *gradients]
