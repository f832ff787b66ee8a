"""python hub_copies.py FOLDER importlib|kernels: two copies that build_hub.py wrote beside the installed spot_kernels.

A process of its own, because nothing may have imported spot_kernels before. With TRITON_INTERPRET=1 the kernels run.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from published_modules import SLOT_WIDTH, SLOTS, WIDTH, Slate


def load_with_kernels(variant):
    from kernels import get_local_kernel

    return get_local_kernel(variant)


def load_with_importlib(variant):
    """As `kernels` does it: under the identifier, from a folder that is on no path."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operators(namespace):
    return {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}


def attention(package):
    """Slots, attention, all gradients."""
    module = package.SlotAttention(WIDTH, SLOT_WIDTH, mlp_hidden=20, iterations=2)
    inputs, slots = torch.randn(2, 25, WIDTH, requires_grad=True), torch.randn(2, SLOTS, SLOT_WIDTH)
    updated, attn, _ = module(inputs, slots)
    (updated.sum() + attn.square().sum()).backward()
    return [updated, attn, inputs.grad, *(parameter.grad for parameter in module.parameters())]


def step(package):
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 25, 25))
    return package.slot_attention_step(q, k, v, return_attn=True)[:2]


def decoding(package):
    tokens, bos, order = torch.randn(2, 25, 48), torch.randn(48), torch.randperm(25)
    q, k, v = package.shift_by_order(tokens, bos, order).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
    return [package.permuted_causal_attention(q, k, v, order)]


def matching(package):
    labels = torch.randint(5, (2, 3, 25))
    return [package.linear_assignment(torch.rand(3, 4, 6)), package.match_masks(*labels, 5)]


def patched(package):
    model = Slate()
    report = package.patch(model)
    assert len(report.replaced) == 1, report
    return model(torch.randn(2, 25, WIDTH), torch.randn(2, SLOTS, SLOT_WIDTH))


def results(package, what, backend):
    torch.manual_seed(0)
    with package.use_backend(backend):
        return what(package)


def compare(installed, package, computations, backend):
    for what in computations:
        pairs = zip(results(installed, what, backend), results(package, what, backend), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), (package.__name__, backend, what.__name__)


def main(folder, loader):
    load = {"kernels": load_with_kernels, "importlib": load_with_importlib}[loader]
    copies = {backend: load(Path(folder) / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")}
    assert not [name for name in sys.modules if name.split(".")[0] == "spot_kernels"]
    assert not operators("spot_kernels")
    for backend, package in copies.items():
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == package.__name__]
        inside = Path(folder).resolve() / "build" / f"torch-{backend}"
        assert len(modules) > 20 and all(Path(module.__file__).is_relative_to(inside) for module in modules)

    import spot_kernels

    for package in copies.values():
        assert operators(package.__name__) == operators("spot_kernels")
        compare(spot_kernels, package, (attention, step, decoding, matching, patched), "auto")
    if spot_kernels.dispatch.INTERPRETED:
        compare(spot_kernels, copies["cuda"], (attention, decoding, matching), "triton")
    print("equal:", *(package.__name__ for package in copies.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
