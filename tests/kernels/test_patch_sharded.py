"""`patch` and `unpatch` around fully_shard (FSDP2), FullyShardedDataParallel and DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from patch_modules import assert_equal_to_rounding, build, inputs_of, only, run
from published_modules import Slate
from spot_kernels import patch, unpatch

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not dist.is_available() or not hasattr(fsdp, "fully_shard"), reason="needs fully_shard")
SHARDED = "is sharded: patch before fully_shard or FullyShardedDataParallel"


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """One process that is a group."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def results(module):
    with torch.no_grad():
        return module(*(x.detach() for x in inputs_of("SLATE")))


def test_a_module_sharded_after_patching_is_unpatched(group):
    """And stays sharded."""
    module = build("SLATE")
    expected = results(module)
    patch(module)
    fsdp.fully_shard(module, mesh=group)
    torch.testing.assert_close(results(module), expected, rtol=1e-5, atol=1e-5)
    assert [report.note for report in patch(module).modules] == ["was patched before"]
    assert unpatch(module) == [""] and unpatch(module) == []
    assert isinstance(module, fsdp.FSDPModule) and isinstance(module, Slate)
    assert type(module).forward is Slate.forward and type(module).__name__ == "FSDPSlotAttention"
    torch.testing.assert_close(results(module), expected, rtol=1e-5, atol=1e-5)
    module.unshard()
    module.reshard()


def test_a_layer_of_a_patched_module_may_be_sharded(group):
    module = build("SLATE")
    before = run(module, inputs_of("SLATE"))
    patch(module)
    fsdp.fully_shard(module.gru, mesh=group)
    assert_equal_to_rounding([results(module)], [before[0]])


@pytest.mark.parametrize("where", ["itself", "around", "inside"])
def test_a_sharded_module_is_left_with_the_right_order_in_the_note(where, group):
    model = nn.Sequential(build("SLATE"))
    fsdp.fully_shard({"itself": model[0], "around": model, "inside": model[0].project_k}[where], mesh=group)
    report = only(patch(model))
    assert report.replaced == "" and report.note == SHARDED


def test_fsdp1_is_left_with_the_right_order_in_the_note():
    model = fsdp.FullyShardedDataParallel(nn.Sequential(build("STEVE")), device_id=torch.device("cpu"))
    assert only(patch(model)).note == SHARDED


def test_a_model_in_data_parallel_is_patched():
    model = nn.parallel.DistributedDataParallel(build("SLATE"))
    assert [report.path for report in patch(model).replaced] == ["module"] and unpatch(model) == ["module"]
