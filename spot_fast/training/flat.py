"""Adam over flat buffers: weights, moments and gradients of all parameters, each in one tensor.

    weights   float32 [T]   the parameters of the model are views of it
    shadow    bfloat16 [S]  in bf16 runs: the weights of linear layers as products take them, views of it are what a
                            step's forward pass uses and backward differentiates by (`in_use`)
    moments   float32 [T] twice, step counts float32 [P]

Parameters begin at multiples of UNIT elements, those with a shadow first; the rest of their units stays zero. On a CPU
the views are updated one by one, by the same operator as torch.optim.Adam(fused=True) calls and with the same bits: a
tensor's last elements are computed by other instructions than those before, so one call on all of them would differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from spot_fast.training.optimiser import BETAS, EPS, clip_by_infinity_norm

UNIT = 1024
# Layers whose weights autocast rounds and nothing else reads: derived types may use theirs in float32.
_ROUNDED = (nn.Linear, nn.GRUCell)


def rounded_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of `model` that train and that a bf16 autocast would round at every use."""
    layers = (layer for layer in model.modules() if type(layer) in _ROUNDED)
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad))


class FlatAdam:
    """Adam (0.9, 0.999) without weight decay for float32 `parameters`, which become views of one buffer.

    model, rounded: in a bf16 run the model and its `rounded_weights`. graphed: steps may be recorded as a CUDA graph.

    leaves: what backward has to give gradients to, in the sequence of `parameters`: shadows, else the parameters.
    state: of each parameter that has had a gradient its `step`, `exp_avg` and `exp_avg_sq`, views.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        model: nn.Module | None = None,
        rounded: Sequence[nn.Parameter] = (),
        graphed: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        if any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ValueError("flat parameters are float32: leave others to torch.optim.Adam")
        self.device = self.parameters[0].device
        self.param_groups = [{"params": self.parameters, "lr": 0.0, "fused": True}]
        self._lay_out(set(rounded))
        self._shadows = self._make_shadows(model)
        self.leaves = [self._shadows.get(parameter, parameter) for parameter in self.parameters]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        if graphed:
            self.rate_on_device()

    def _lay_out(self, rounded: set[nn.Parameter]) -> None:
        """Makes the buffers, and views of them the parameters' data."""
        ordered = sorted(self.parameters, key=lambda parameter: parameter not in rounded)  # stable
        self._start, size = {}, 0
        for parameter in ordered:
            self._start[parameter] = size
            size += -(-parameter.numel() // UNIT) * UNIT
            if parameter in rounded:
                self._shadow_size = size
        if not rounded:
            self._shadow_size = 0
        self.weights, self.exp_avg, self.exp_avg_sq = (self._zeros(size, torch.float32) for _ in range(3))
        self.steps = self._zeros(len(self.parameters), torch.float32)
        self._number = {parameter: number for number, parameter in enumerate(self.parameters)}
        for parameter in self.parameters:
            view = self.view(self.weights, parameter)
            view.copy_(parameter.detach())
            parameter.data = view
        # Gradients of shadows, in float32: several passes and processes are added up in it.
        self.gradients = self._zeros(self._shadow_size, torch.float32)

    def _make_shadows(self, model: nn.Module | None) -> dict[nn.Parameter, nn.Parameter]:
        self.shadow = self._zeros(self._shadow_size, torch.bfloat16)
        shadowed = [parameter for parameter in self.parameters if self._start[parameter] < self._shadow_size]
        shadows = {parameter: nn.Parameter(self.view(self.shadow, parameter)) for parameter in shadowed}
        modules = model.modules() if model is not None else ()
        # Where the model has them, also where it has one twice.
        self._uses = [
            (module._parameters, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter in shadows
        ]
        self._versions: list[int] = []
        return shadows

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def view(self, buffer: Tensor, parameter: nn.Parameter) -> Tensor:
        """A parameter's part of a buffer, in its shape."""
        start = self._start[parameter]
        return buffer[start : start + parameter.numel()].view(parameter.shape)

    def tensors(self) -> list[Tensor]:
        """All that `update` changes in place, weights first."""
        return [self.weights, self.exp_avg, self.exp_avg_sq, self.steps, self.shadow]

    # ---- weights as products take them

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the weights anew; `in_use` does it after in-place changes, but does not see those to `.data`."""
        self.shadow.copy_(self.weights[: self._shadow_size])
        self._versions = self._present_versions()

    def _present_versions(self) -> list[int]:
        return [parameter._version for parameter in self._shadows]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[list[nn.Parameter]]:
        """The model's linear layers have their rounded weights in this block: autocast casts none. Yields `leaves`."""
        if self._versions != self._present_versions():
            self.refresh()
        for parameters, name, parameter in self._uses:
            parameters[name] = self._shadows[parameter]
        try:
            yield self.leaves
        finally:
            for parameters, name, parameter in self._uses:
                parameters[name] = parameter

    # ---- a step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Before the backward passes of a step: no parameter has a gradient."""
        for parameter, leaf in zip(self.parameters, self.leaves, strict=True):
            parameter.grad = leaf.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """After each backward pass: adds the shadows' gradients to their weights' in float32."""
        came = [parameter for parameter, shadow in self._shadows.items() if shadow.grad is not None]
        first = [parameter for parameter in came if parameter.grad is None]
        later = [parameter for parameter in came if parameter.grad is not None]
        for parameter in first:
            parameter.grad = self.view(self.gradients, parameter)
        for parameters, add in ((first, torch._foreach_copy_), (later, torch._foreach_add_)):
            if parameters:
                add([p.grad for p in parameters], [self._shadows[p].grad for p in parameters])
        for parameter in came:
            self._shadows[parameter].grad = None

    def clip(self, limit: float) -> Tensor:
        """As `clip_by_infinity_norm`."""
        return clip_by_infinity_norm(self.parameters, limit)

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Adam's step. bad: [] float32 on the device, which the host never reads: if it is 1, nothing changes."""
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        states = [self._state(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=self.param_groups[0]["lr"],
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            found_inf=bad,
        )
        torch._foreach_sub_(steps, [bad] * len(steps))
        self.refresh()

    # ---- settings and state

    def rate_on_device(self) -> None:
        """From now on the learning rate is a tensor on the device, which recorded steps read."""
        self.param_groups[0]["lr"] = torch.zeros((), dtype=torch.float32, device=self.device)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            self.state[parameter] = {
                "step": self.steps[self._number[parameter]],
                "exp_avg": self.view(self.exp_avg, parameter),
                "exp_avg_sq": self.view(self.exp_avg_sq, parameter),
            }
        return self.state[parameter]

    def load(self, parameter: nn.Parameter, what: str, value: Tensor) -> None:
        """Sets one tensor of a parameter's state."""
        self._state(parameter)[what].copy_(value)
