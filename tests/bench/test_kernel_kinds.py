"""What a profile's kernels are for, by names as an H200 has given them."""

import pytest
from harness import kernel_kinds
from harness.kernel_kinds import Share, by_kind, kind_of, our_kernels

from spot_kernels import dispatch

NAMES = {
    "nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(int)": "products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_kernel0_0": "attention",
    "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)": "attention",
    "triton_per_fused__to_copy_add_native_layer_norm_backward_view_8": "LayerNorm",
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>(float)": "reductions",
    "triton_red_fused_sum_threshold_backward_view_6": "reductions",
    "triton_poi_fused__to_copy_view_1": "casts",
    "triton_poi_fused__to_copy_t_20": "casts",
    "triton_poi_fused_cat_transpose_view_10": "copies and fills",
    "Memcpy DtoD (Device -> Device)": "copies and fills",
    "triton_poi_fused_relu_threshold_backward_view_25": "elementwise",
    "triton_poi_fused__to_copy_add_33": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::AbsFunctor<float>>(int)": "elementwise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<3>>(int)": (
        "optimiser and clipping"
    ),
    "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>(int)": (
        "random numbers"
    ),
    "_backward_keys": "ours: _backward_keys",
    "cudaGraphLaunch": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds_by_name(name):
    assert kind_of(name, {"_backward_keys"}) == NAMES[name]


@pytest.mark.skipif(not dispatch.TRITON, reason="needs triton")
def test_ours_are_known_by_name():
    assert {"_forward", "_backward_keys", "_shift"} <= our_kernels()


def test_shares_add_up():
    kernels = {"nvjet_a": Share(10.0, 2.0), "nvjet_b": Share(5.0, 1.0), "_forward": Share(20.0, 4.0)}
    assert by_kind(kernels, {"_forward"}) == {"ours: _forward": Share(20.0, 4.0), "products": Share(15.0, 3.0)}
    assert list(by_kind(kernels, ()))[0] == kernel_kinds.OTHER
