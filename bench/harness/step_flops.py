"""Operations of the matrix products that a training step cannot do without: the arithmetic floor of the ladder.

A product of [m, k] and [k, n] has 2·m·k·n. Backward has twice those of forward, as every product needs the gradients
of both factors. Causal attention needs half of its N × N matrix. Counted once: the trunk of student, teacher and
target; the teacher's decoder up to the last cross-attention's weights; of the student's slot attention in stage 2 only
the last iteration has a backward pass. A cross-attention's projections of queries and output are folded into the slots
where that is less work. Softmax, LayerNorm, losses, Adam and matching are left out.
`tests/bench/test_step_flops.py` compares with `torch.utils.flop_counter` on the reference step's parts.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from spot_fast.model.spot import Spot


class Product(NamedTuple):
    """A linear layer over the tokens of a batch: rows of each image, width in and out; which of its three products.

    kind: `forward` (x Wᵀ), `input` (its gradient by x, g W) or `weight` (by W, gᵀ x).
    """

    rows: int
    inputs: int
    outputs: int
    kind: str

    def flops(self, batch: int) -> float:
        return 2.0 * batch * self.rows * self.inputs * self.outputs


TRAINED, FIRST, FROZEN = ("forward", "input", "weight"), ("forward", "weight"), ("forward",)


def products(model: Spot, teacher: Spot | None) -> Counter[Product]:
    """The products with weights over tokens that the trainer's step makes with cached features, and how often.

    All that is large in a step but attention; what has a row for each slot only is left out.
    """
    products_of: Counter[Product] = Counter()
    tokens, dim = model.encoder.num_tokens, model.encoder.dim

    def layer(inputs: int, outputs: int, kinds: tuple[str, ...], times: int = 1, rows: int = tokens) -> None:
        for kind in kinds:
            products_of[Product(rows, inputs, outputs, kind)] += times

    def slots(kinds: tuple[str, ...], first: tuple[str, ...]) -> None:
        width = model.slot_encoder.slot_dim
        layer(dim, dim, first)
        layer(dim, dim, kinds)
        layer(dim, width, kinds, times=2)  # k and v

    def decode(one: Spot, kinds: tuple[str, ...], masks_only: bool) -> None:
        blocks = len(one.decoder.transformer.blocks)
        hidden = one.decoder.transformer.blocks[0].ffn[0].out_features
        folded = [_folds(tokens, one.slot_encoder.num_slots, dim, heads) for heads in _cross_heads(one)]
        last = blocks - masks_only  # blocks whose cross-attention and FFN run to their end
        layer(dim, dim, FIRST if kinds is TRAINED else kinds)  # the input's projection: only [BOS] needs its gradient
        layer(dim, 3 * dim, kinds, times=blocks)
        layer(dim, dim, kinds, times=blocks)
        # queries and output of the cross-attention
        layer(dim, dim, kinds, times=folded.count(False))
        layer(dim, dim, kinds, times=folded[:last].count(False))
        layer(dim, hidden, kinds, times=last)
        layer(hidden, dim, kinds, times=last)

    slots(TRAINED, FIRST if model.last_blocks is None else TRAINED)
    decode(model, TRAINED, masks_only=False)
    if model.last_blocks is not None:
        hidden, rows = model.last_blocks[0].mlp.fc1.out_features, tokens + model.encoder.num_prefix
        for inputs, outputs in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)):
            layer(inputs, outputs, TRAINED, times=len(model.last_blocks), rows=rows)
    if teacher is not None:
        slots(FROZEN, FROZEN)
        decode(teacher, FROZEN, masks_only=True)
    return products_of


def encoder(model: Spot, blocks: int, *, embed: bool = False) -> float:
    """Forward of `blocks` ViT blocks for one image, with `embed` also of the patch embedding."""
    one = model.encoder
    tokens, dim = one.num_tokens + one.num_prefix, one.dim
    block = one.vit.blocks[0]
    hidden = block.mlp.fc1.out_features
    products = blocks * (tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens**2 * dim)
    return 2 * (products + (one.num_tokens * 3 * one.patch_size**2 * dim if embed else 0))


def slots(model: Spot) -> tuple[float, float, float]:
    """Forward of the slot encoder for one image: its products over tokens, the earlier iterations, the last one."""
    one, module = model.slot_encoder, model.slot_encoder.attention
    tokens, dim, count, width = model.encoder.num_tokens, model.encoder.dim, one.num_slots, one.slot_dim
    hidden = module.mlp[0].out_features
    over_tokens = 2 * tokens * dim * (2 * dim + 2 * width)
    iteration = 2 * count * (width * width + 2 * tokens * width + 6 * width * width + 2 * width * hidden)
    return over_tokens, (module.iterations - 1) * iteration, iteration


def _cross_heads(model: Spot) -> list[int]:
    """Heads of each block's cross-attention."""
    return [block.cross_attention.heads for block in model.decoder.transformer.blocks]


def _projected(tokens: int, count: int, dim: int, heads: int, folded: bool) -> int:
    """Multiply-adds of one side of a cross-attention, queries and logits or what is read and the output, for one image.

    As it is written, every token is projected, by D × D, and meets each slot in D channels. Folded, the slots are
    projected, and every token meets each slot of each head in D channels.
    """
    if folded:
        return count * dim * dim + tokens * heads * count * dim
    return tokens * dim * dim + tokens * count * dim


def _folds(tokens: int, count: int, dim: int, heads: int) -> bool:
    return _projected(tokens, count, dim, heads, True) < _projected(tokens, count, dim, heads, False)


def decoder(model: Spot, *, masks_only: bool = False, folded: bool = True) -> float:
    """Forward of the decoder for one image; masks_only: up to the last cross-attention's weights.

    folded: with cross-attentions folded where that is less work, the floor; False: as the reference computes them.
    """
    one, count, width = model.decoder, model.slot_encoder.num_slots, model.slot_encoder.slot_dim
    tokens, dim = model.encoder.num_tokens, model.encoder.dim
    ffn = 2 * tokens * dim * one.transformer.blocks[0].ffn[0].out_features
    attend = tokens * dim * 4 * dim + tokens**2 * dim  # half of the two products of N × N
    products = tokens * dim * dim + count * width * dim  # the projections of input and slots
    for heads in _cross_heads(model):
        fold = folded and _folds(tokens, count, dim, heads)
        # of k and of v, each with its side
        side = count * dim * dim + _projected(tokens, count, dim, heads, fold)
        products += attend + 2 * side + ffn
    return 2 * (products - (side + ffn if masks_only else 0))


def step(model: Spot, teacher: Spot | None, *, cached: bool) -> float:
    """A training step for one image; cached: its frozen features are given."""
    depth, first = len(model.encoder.vit.blocks), model.encoder.first_last_block
    over_tokens, earlier, last = slots(model)
    through = 3 if model.slot_encoder.attention.truncation == "none" else 1
    total = 3 * (over_tokens + last + decoder(model)) + through * earlier
    total -= 2 * model.encoder.num_tokens * model.encoder.dim**2  # the gradient by the decoder's input
    if not cached:
        total += encoder(model, depth, embed=True)
    if model.last_blocks is not None:
        total += 3 * encoder(model, depth - first)
    if teacher is not None:
        total += sum(slots(teacher)) + decoder(teacher, masks_only=True)
    return total
