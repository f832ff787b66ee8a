"""The whole module, `spot_kernels.SlotAttention`: SPOT's features 768 wide, slots 256, MLP 1024, three iterations.

Bytes: the inputs and the slots read, the results written, and k and v once written and read by each iteration (they do
not fit on the chip beside the rest); backward the same again, gradients written, k and v and their gradients once more
for each iteration. Operations: the projections of k and v (4·B·N·D·U), and for each iteration the attention and, for
each slot, the query (2U²), the GRU (12U²) and the MLP (4U·hidden); products cost twice as much backward, attention
two and a half times.

Eager and torch.compile run the same module with its operators on PyTorch. On a GPU the products are bfloat16 through
torch.autocast, as in training; gradients go to the inputs, the initial slots and the weights.
"""

from __future__ import annotations

import copy

import torch
from harness.kernel_bench import Case, Function, Problem, Setting, compiled, randn, sizes, under
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, MODULE, OURS

from spot_kernels import SlotAttention

OURS_COMPILED = "ours, compiled"
AUTOCAST = "bf16 autocast"
ITERATIONS = 3


def work(batch: int, tokens: int, slots: int, inputs: int, width: int, hidden: int, size: int) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes (slots and attn are 4 bytes an element)."""
    kv = 2 * batch * tokens * width * size
    edges = batch * tokens * inputs * size + 4 * 2 * batch * slots * width
    products = 4 * batch * tokens * inputs * width
    products += ITERATIONS * batch * slots * (2 * width**2 + 12 * width**2 + 4 * width * hidden)
    attention = ITERATIONS * 4 * batch * tokens * slots * width
    forward = Work(edges + (1 + ITERATIONS) * kv, products + attention)
    return forward, Work(2 * edges + (1 + 2 * ITERATIONS) * kv, 2 * products + 2.5 * attention)


def weights(module: SlotAttention) -> tuple[torch.Tensor, ...]:
    """All but the bias of the queries' LayerNorm: the softmax over slots does not see what all queries share, so that
    gradient is zero but for rounding."""
    return tuple(weight for name, weight in module.named_parameters() if name != "norm_slots.bias")


def build(dims: tuple[int, ...], dtype: str, setting: Setting, names: tuple[str, ...]) -> Problem:
    batch, tokens, slots, width_in, width, hidden = dims
    device = setting.device
    torch.manual_seed(0)
    module = SlotAttention(width_in, width, mlp_hidden=hidden, iterations=ITERATIONS).to(device)
    double = copy.deepcopy(module).double()

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        """In mixed precision the inputs come from a layer, in bfloat16, the slots are float32."""
        kind = torch.bfloat16 if dtype == AUTOCAST else torch.float32
        (tokens_in,) = randn(seed, (batch, tokens, width_in), device=device, dtype=kind)
        return tokens_in, *randn(seed + 1000, (batch, slots, width), device=device, dtype=torch.float32)

    def autocast(function: Function) -> Function:
        if dtype != AUTOCAST:
            return function

        def call(*given: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return function(*given)

        return call

    def updated(tokens_in: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Slots in float32, as ours are: autocast of a GPU makes those of PyTorch's GRU bfloat16."""
        return module(tokens_in, initial)[0].float()

    techniques = {
        OURS: lambda: autocast(updated),
        OURS_COMPILED: lambda: autocast(compiled(updated)()),
        EAGER: lambda: under("torch", autocast(updated)),
        COMPILE: lambda: under("torch", autocast(compiled(updated)())),
    }
    exact = under("torch", lambda tokens_in, initial: double(tokens_in, initial)[0])
    chosen = {name: techniques[name] for name in names}
    return Problem(inputs, chosen, exact, weights(module), weights(double), joint=True)


def cases(setting: Setting) -> list[Case]:
    shapes = (("SPOT", 64, 8, 196, 7), ("MOVi-E", 64, 0, 196, 24))
    widths = (16, 8, 12) if setting.tiny else (768, 256, 1024)
    made = []
    for name, full, on_cpu, tokens, slots in (("tiny", 1, 1, 9, 3),) if setting.tiny else shapes:
        batch = setting.batch(full, on_cpu)
        if not batch:
            continue
        label = sizes(name, batch, full, f"{tokens} K{slots} D{widths[0]} U{widths[1]}")
        for dtype in (AUTOCAST,) if setting.gpu else ("float32", AUTOCAST):
            dims = batch, tokens, slots, *widths
            # compiling all of it takes a CPU half a minute
            compare = setting.gpu or dtype == "float32" and not setting.tiny
            names = (OURS, *[OURS_COMPILED] * setting.gpu, EAGER, *[COMPILE] * compare)
            made.append(
                Case(
                    MODULE,
                    label,
                    dtype,
                    *work(*dims, 2 if dtype == AUTOCAST else 4),
                    names,
                    lambda dims=dims, dtype=dtype, names=names: build(dims, dtype, setting, names),
                    "slot_attention_step",
                )
            )
    return made


def test_speed(time_it):
    """Right first, then timed, at every shape and with every technique."""
    time_it()
