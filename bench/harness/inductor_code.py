"""What Inductor generates of a function and its backward pass for a GPU that is not there.

`generated` traces, differentiates, fuses and generates code as on an H100 or H200, and stops before Triton compiles it.
Everything that Inductor asks of the card is answered; what it would measure there (padding of products) is off.
`no_accelerator.load()` has to come before torch is imported. For the PyTorch that `bench/step_operations.py` names.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from harness.fake_gpu import CPU

# As DeviceProperties of an H200.
_CARD = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=150_000_000_000,
    L2_cache_size=60 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)


@dataclass(frozen=True)
class Generated:
    """One graph: the Python that launches its kernels, its operators, the bytes its kernels read and write (each buffer
    of each kernel once), and the most that it holds at once beside weights, what it returns included."""

    backward: bool
    code: str
    graph: torch.fx.Graph
    bytes: int
    peak: int

    @property
    def body(self) -> str:
        """The statements that launch."""
        return self.code[self.code.index("def call(") :].partition("def benchmark_compiled_module")[0]


class _Done(Exception):
    """Instead of running what was generated."""


class _Driver:
    """What Triton's code generation asks of its driver."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def generated(function: Callable, arguments: Sequence[object], **inductor: object) -> list[Generated]:
    """The graphs of `function`, forward and then backward; inside the FakeTensorMode of its arguments.

    inductor: options of torch._inductor.config.
    """
    found: list[Generated] = []

    def keep(lowering: GraphLowering) -> types.SimpleNamespace:
        code, _ = lowering.codegen()
        nodes = lowering.scheduler.nodes
        with V.set_graph_handler(lowering):
            moved = sum(node.get_read_write_buffers_sizes() for node in nodes)
            inputs = get_freeable_input_buf(nodes, OrderedSet(lowering.graph_inputs))
            peak, _ = estimate_peak_memory(nodes, inputs, OrderedSet(lowering.get_output_names()))
        output = next(node for node in lowering.graph.nodes if node.op == "output")
        made = {id(t): t for node in output.all_input_nodes if node.op != "placeholder" for t in [node.meta["val"]]}
        peak = max(peak, sum(t.numel() * t.element_size() for t in made.values() if isinstance(t, torch.Tensor)))
        found.append(Generated(lowering.is_backward, code.value, lowering.graph, moved, peak))

        def call(args: list) -> None:
            raise _Done

        return types.SimpleNamespace(call=call, __file__=__file__)

    torch._dynamo.reset()
    with _card(), patch.object(GraphLowering, "compile_to_module", keep), contextlib.suppress(_Done):
        with torch._inductor.config.patch(fx_graph_cache=False, shape_padding=False, **inductor):
            torch.compile(function, fullgraph=True, dynamic=False)(*arguments)
    return found


@contextlib.contextmanager
def _card() -> Iterator[None]:
    """Answers what compilation asks of the card."""
    deduce = UniformValueConstantFolder._deduce_value

    def on_the_host(self: UniformValueConstantFolder, node: torch.fx.Node) -> object:
        """Folding computes a value of each constant, on its device."""
        kept = node.kwargs
        if isinstance(kept.get("device"), torch.device):
            node.kwargs = {**kept, "device": CPU}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kept

    def answer(value: object) -> staticmethod:
        return staticmethod(lambda *args, **kwargs: value)

    import triton

    with contextlib.ExitStack() as stack:
        for kind in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(patch.object(kind, "get_device_properties", answer(_CARD)))
            stack.enter_context(patch.object(kind, "current_device", answer(0)))
        for name, value in (("get_compute_capability", 90), ("is_bf16_supported", True), ("is_available", True)):
            stack.enter_context(patch.object(CudaInterface, name, answer(value)))
        for name, value in (
            ("get_device_properties", _CARD),
            ("get_device_capability", (9, 0)),
            ("current_device", 0),
            ("device_count", 1),
        ):
            stack.enter_context(patch.object(torch.cuda, name, lambda *args, value=value: value))
        stack.enter_context(patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None))
        stack.enter_context(patch.object(UniformValueConstantFolder, "_deduce_value", on_the_host))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(_cudnn_attention())
        before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
        triton.runtime.driver.set_active(_Driver())
        try:
            yield
        finally:
            triton.runtime.driver._active = before


@contextlib.contextmanager
def _cudnn_attention() -> Iterator[None]:
    """`scaled_dot_product_attention` is cuDNN's, which PyTorch chooses on an H200; it asks the card otherwise."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        chosen = torch.ops.aten._scaled_dot_product_cudnn_attention
        return chosen(q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, False, scale=scale)[0]

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attend, "AutogradCUDA")
    try:
        yield
    finally:
        library._destroy()
