"""Adam over flat buffers: weights, moments and gradients of all parameters, each in one tensor.

    weights   float32 [T]   the parameters of the model are views of it
    shadow    bfloat16 [S]  in bf16 runs: the weights of linear layers as products take them, views of it are what a
                            step's forward pass uses and backward differentiates by (`in_use`)
    moments   float32 [T] twice, step counts float32 [P]

Parameters begin at multiples of UNIT elements, those with a shadow first; the rest of their units stays zero.

On a GPU `spot_kernels.infinity_norm` and `clipped_adam` read and write these buffers once. Gradients are gathered for
them, in the precision that backward gives them in; several passes are added up in float32. Several processes add up in
float32 in the buffer of `SharedGradients`, which the kernels then read where it lies. On a CPU the views are updated
one by one, by the same operator as torch.optim.Adam(fused=True) calls and with the same bits: a tensor's last elements
are computed by other instructions than those before, so one call on all of them would differ.

Bytes of a step on a GPU for C rounded weights: gathering 4 C, norm 2 C, update with shadow 28 C, together 34 C. With
autocast and torch's Adam: casts of weights 6 C and of their gradients 6 C, norm 4 C, clipping 8 C, Adam 28 C, together
52 C. The gathering could be left out by a kernel that takes the addresses of all gradients: 39 µs of 41 M weights at an
H200's 4.2 TB/s, for a table on the device that would have to be right in every step, eager and recorded.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from spot_fast.training.optimiser import BETAS, EPS, Slow, clip_by_infinity_norm, slowed
from spot_fast.training.shared_gradients import LocalGradients, SharedGradients
from spot_kernels import clipped_adam, dispatch, infinity_norm
from spot_kernels.clipped_adam import UNIT

# Layers whose weights autocast rounds and nothing else reads: derived types may use theirs in float32.
_ROUNDED = (nn.Linear, nn.GRUCell)


def rounded_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of `model` that train and that a bf16 autocast would round at every use."""
    layers = (layer for layer in model.modules() if type(layer) in _ROUNDED)
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad))


class FlatAdam:
    """Adam (0.9, 0.999) without weight decay for float32 `parameters`, which become views of one buffer.

    model, rounded: in a bf16 run the model and its `rounded_weights`. graphed: steps may be recorded as a CUDA graph.
    passes: backward passes of a step.

    leaves: what backward has to give gradients to, in the sequence of `parameters`: shadows, else the parameters.
    state: of each parameter that has had a gradient its `step`, `exp_avg` and `exp_avg_sq`, views.
    slow: parameters with a lower rate, None for none.
    """

    slow: Slow | None = None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        model: nn.Module | None = None,
        rounded: Sequence[nn.Parameter] = (),
        graphed: bool = False,
        passes: int = 1,
    ) -> None:
        self.parameters = list(parameters)
        if any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ValueError("flat parameters are float32: leave others to torch.optim.Adam")
        self.device = self.parameters[0].device
        self.param_groups = [{"params": self.parameters, "lr": 0.0, "fused": True}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._lay_out(set(rounded))
        self._kernels = dispatch.choose("clipped_adam", self.weights) == "triton"
        self._shadows = self._make_shadows(model)
        self.leaves = [self._shadows.get(parameter, parameter) for parameter in self.parameters]
        self._make_gradients(torch.float32 if passes > 1 or not self._kernels else torch.bfloat16)
        if graphed or self._kernels:
            self.rate_on_device()

    def _lay_out(self, rounded: set[nn.Parameter]) -> None:
        """Makes the buffers, and views of them the parameters' data."""
        ordered = sorted(self.parameters, key=lambda parameter: parameter not in rounded)  # stable
        self._number = {parameter: number for number, parameter in enumerate(ordered)}
        units = [-(-parameter.numel() // UNIT) for parameter in ordered]
        self._start = {parameter: UNIT * sum(units[:number]) for parameter, number in self._number.items()}
        self._shadow_size = UNIT * sum(units[: len(rounded)])
        size = UNIT * sum(units)
        self.weights, self.exp_avg, self.exp_avg_sq = (self._zeros(size, torch.float32) for _ in range(3))
        self.steps = self._zeros(len(ordered), torch.float32)
        numbers = torch.arange(len(ordered), dtype=torch.int32, device="cpu")
        owners = numbers.repeat_interleave(torch.tensor(units, device="cpu"), output_size=sum(units))
        self._owners = owners.to(self.device)
        for parameter in self.parameters:
            view = self.view(self.weights, parameter)
            view.copy_(parameter.detach())
            parameter.data = view

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

    def _make_gradients(self, dtype: torch.dtype) -> None:
        """Buffers for the gradients of shadows, of this dtype, and for those of others, which kernels need as well."""
        sizes = [self._shadow_size, len(self.weights) - self._shadow_size if self._kernels else 0]
        buffers = [self._zeros(size, kind) for size, kind in zip(sizes, (dtype, torch.float32), strict=True)]
        self._gradients = [buffer for buffer in buffers if len(buffer)]
        kept = self.parameters if self._kernels else self._shadows
        self._views = {p: self.view(buffers[p not in self._shadows], p, self._offset(p)) for p in kept}
        self._found: set[nn.Parameter] = set()
        self._limit, self._norm = 0.0, None
        self._present: dict[frozenset[nn.Parameter], Tensor] = {}
        self._shared: SharedGradients | None = None
        self._starts, self._places = None, None

    def take_from(self, gradients: LocalGradients) -> None:
        """Has gradients where several processes add them up, if they do."""
        if isinstance(gradients, SharedGradients):
            self._shared, self._gradients, self._views = gradients, [], {}

    def _offset(self, parameter: nn.Parameter) -> int:
        """Where a parameter's gradients begin in their buffer."""
        return self._start[parameter] - (0 if parameter in self._shadows else self._shadow_size)

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def view(self, buffer: Tensor, parameter: nn.Parameter, start: int | None = None) -> Tensor:
        """A parameter's part of a buffer, in its shape; start: where it begins, by default as in `weights`."""
        start = self._start[parameter] if start is None else start
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
        self._found.clear()

    @torch.no_grad()
    def collect(self) -> None:
        """After each backward pass: moves its gradients into the buffers, adding those of several passes."""
        moves: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for parameter, view in self._views.items():
            leaf = self._shadows.get(parameter, parameter)
            # Later passes add to the view themselves where it is the leaf's own gradient.
            if leaf.grad is None or leaf.grad is view:
                continue
            later, same = parameter in self._found, leaf.grad.stride() == view.stride()
            # One launch for each kind: a list of several dtypes, or one transposed tensor, is copied one by one.
            views, gradients = moves[later, same, view.dtype, leaf.grad.dtype]
            views.append(view)
            gradients.append(leaf.grad)
            leaf.grad = None
            if view.dtype == parameter.dtype:
                parameter.grad = view
            self._found.add(parameter)
        for (later, *_), (views, gradients) in moves.items():
            (torch._foreach_add_ if later else torch._foreach_copy_)(views, gradients)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """As `clip_by_infinity_norm`; kernels scale the gradients only in `update`."""
        if not self._kernels:
            return clip_by_infinity_norm(self.parameters, limit)
        if self._shared is not None:
            self._find_shared(self._shared)
        if not self._found:
            raise ValueError("no parameter has a gradient: call backward() first")
        if self._shared is None:
            for parameter in self._without():
                self._views[parameter].zero_()
        self._limit, self._norm = limit, infinity_norm(self._gradients)
        return self._norm

    def _find_shared(self, shared: SharedGradients) -> None:
        self._found.update(parameter for parameter in self.parameters if parameter.grad is not None)
        self._gradients = [shared.buffer]
        if self._starts is not shared.starts:  # another layout
            self._starts = shared.starts
            units = [range(self._starts[p], self._starts[p] + p.numel(), UNIT) for p in self._number]
            places = torch.tensor(
                [place for parameter in units for place in parameter], dtype=torch.int64, device="cpu"
            )
            self._places = places.to(self.device)

    def _without(self) -> frozenset[nn.Parameter]:
        return frozenset(parameter for parameter in self.parameters if parameter not in self._found)

    def update(self, bad: Tensor) -> None:
        """Adam's step. bad: [] float32 on the device, which the host never reads: if it is 1, nothing changes."""
        with slowed(self.slow):
            if self._kernels:
                self._update_at_once(bad)
            else:
                self._update_one_by_one(bad)
        if self.slow is not None:
            self.refresh()  # the update rounded what was taken back in part

    @torch.no_grad()
    def _update_at_once(self, bad: Tensor) -> None:
        for parameter in self._found:
            self._state(parameter)
        present, without = None, self._without()
        if without:
            if without not in self._present:
                self._present[without] = torch.ones_like(self.steps)
                for parameter in without:
                    self._present[without][self._number[parameter]].zero_()
            present = self._present[without]
        clipped_adam(
            self.weights,
            self._gradients,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            self.param_groups[0]["lr"],
            owners=self._owners,
            copy=self.shadow if len(self.shadow) else None,
            norm=self._norm,
            limit=self._limit,
            bad=bad,
            present=present,
            places=self._places,
            betas=BETAS,
            eps=EPS,
        )

    @torch.no_grad()
    def _update_one_by_one(self, bad: Tensor) -> None:
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

    @torch.no_grad()
    def last_gradients(self) -> list[Tensor | None]:
        """The gradients of the last step, clipped, float32, in the sequence of `parameters`."""
        if not self._kernels:
            return [parameter.grad for parameter in self.parameters]
        views = self._views if self._shared is None else {p: p.grad for p in self._found}
        scale = (self._limit / (self._norm + 1e-6)).clamp(max=1.0) if self._limit > 0 else 1.0
        return [views[p].float() * scale if p in self._found else None for p in self.parameters]

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
