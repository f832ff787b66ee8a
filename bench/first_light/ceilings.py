"""What the card can do: copy, a large product, and the products of a step, which make the floor of its time.

    python bench/first_light/ceilings.py [--rehearse]

The step's products (`step_flops.products`) have 64 images of 196 tokens, so 12,544 rows. Each is timed alone,
forward, input gradient and weight gradient, in a replayed graph over several sets of inputs; a stage's floor is the sum
of their times, as often as a step makes them, and what is left (attention, slots) at the large product's rate.
"""

from __future__ import annotations

import sys
from collections import Counter

from record import GO, NO_GO, Options, Recorder, Time, parser, run

import torch  # isort: skip
from harness import step_flops
from harness.kernel_bench import sets_needed
from harness.kernel_clock import DeviceClock, captured, clock_of, measure_ceilings, samples, spread
from harness.step_flops import Product
from harness.step_runs import settings

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.model.spot import Spot

BATCH = 64


def models(stage: int, *, tiny: bool) -> tuple[Spot, Spot | None]:
    """Model and teacher with the shapes of the stage; their weights do not matter."""
    config = settings(stage, precision="float32", batch_size=2, tiny=tiny)
    encoder = frozen_encoder(config)
    first = settings(1, precision="float32", batch_size=2, tiny=tiny)
    return Spot(config, encoder), Spot(first, encoder) if stage == 2 else None


def operands(product: Product, batch: int, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors [m, k] and [k, n] as a step has them: activations row by row, weights [outputs, inputs]."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = batch * product.rows

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    if product.kind == "forward":
        return made(rows, product.inputs), made(product.outputs, product.inputs).t()
    if product.kind == "input":
        return made(rows, product.outputs), made(product.outputs, product.inputs)
    return made(rows, product.outputs).t(), made(rows, product.inputs)


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of the first rows of the product, relative to float64."""
    few = left[:64]
    exact = few.double() @ right.double()
    return ((few @ right - exact).norm() / exact.norm()).item()


def seconds(product: Product, batch: int, options: Options) -> tuple[list[float], float]:
    """Samples of a product's time, and its error."""
    device = options.device
    first = operands(product, batch, device, 0)
    size = sum(t.numel() for t in first) * 2 + 2 * first[0].shape[0] * first[1].shape[1]
    sets = [first] + [operands(product, batch, device, seed) for seed in range(1, sets_needed(size, device, most=8))]

    def call(i: int) -> torch.Tensor:
        left, right = sets[i % len(sets)]
        return left @ right

    wrong = error(*first)
    if not options.gpu:
        return samples(clock_of(device), {"": call}, seconds=0.0, least=2, most=2)[""], wrong
    replay, why = captured(call, len(sets))
    if replay is None:
        raise RuntimeError(f"a product cannot be captured: {why}")
    taken = samples(DeviceClock(), {"": replay}, seconds=0.06, least=5)[""]
    return [each / len(sets) for each in taken], wrong


def ceilings(recorder: Recorder, options: Options, time: Time) -> None:
    device = options.device
    found = measure_ceilings(device, tiny=options.rehearse)
    recorder.add("copy", figure="GB/s, read and written", value=found.bytes / 1e9)
    for name, flops in found.flops.items():
        recorder.add("large product", name, figure="TFLOP/s", value=flops / 1e12)
    batch = 2 if options.rehearse else BATCH
    both = {stage: models(stage, tiny=options.rehearse) for stage in (1, 2)}
    counts = {stage: step_flops.products(*pair) for stage, pair in both.items()}
    times: dict[Product, float] = {}
    every = Counter(counts[2]) | Counter(counts[1])
    for product in sorted(every, key=lambda p: -p.flops(1) * every[p]):
        taken, wrong = seconds(product, batch, options)
        taken = spread(taken)
        times[product] = taken.median
        rate = product.flops(batch) / taken.median
        recorder.add(
            f"{batch * product.rows:,} × {product.inputs} × {product.outputs}",
            product.kind,
            figure="µs",
            value=1e6 * taken.median,
            low=1e6 * taken.low,
            high=1e6 * taken.high,
            error=wrong,
            allowed=1e-2,
            verdict=GO if wrong <= 1e-2 else NO_GO,
            note=f"{rate / 1e12:.0f} TFLOP/s, {100 * rate / found.flops['bfloat16']:.0f} % of the large product",
        )
    for stage, pair in both.items():
        whole = batch * step_flops.step(*pair, cached=True)
        measured = sum(times[product] * count for product, count in counts[stage].items())
        rest = whole - sum(product.flops(batch) * count for product, count in counts[stage].items())
        recorder.add(
            f"stage {stage}",
            "floor of its products",
            figure="ms a step",
            value=1e3 * (measured + rest / found.flops["bfloat16"]),
            note=f"{sum(counts[stage].values())} products; at the large product's rate "
            f"{1e3 * whole / found.flops['bfloat16']:.3g} ms",
        )


if __name__ == "__main__":
    sys.exit(run("ceilings", ceilings, parser(__doc__).parse_args()))
