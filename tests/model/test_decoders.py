"""Both decoders against the official implementation: nine orders, gradients, MLP with and without projection, CapPa."""

import pytest
import torch

import golden_models
import golden_tensors
from forced_layout import in_order_layout
from golden_tensors import assert_close, load
from spot_fast.checkpoints.official import convert
from spot_fast.model.decoders import AutoregressiveDecoder, MlpDecoder
from spot_fast.model.spot import reconstruction_loss

GOLDEN = ["decoder.*", "decoder_variants:*", "mlp_decoder_*", "cappa.*"]


DTYPES = [torch.float32, torch.float64]


def slots_and_target(dtype=torch.float32):
    slots, features = load("slot_attention.gaussian.slots"), load("features.frozen_encoder")[:2]
    return slots.to(dtype).requires_grad_(), features.to(dtype)


def assert_decoding(prefix, prediction, masks, target):
    """Prediction (of image 0 alone where only that is stored), masks and loss of one decoding."""
    stored = golden_tensors.index()["tensors"][f"{prefix}.prediction"]["shape"][0]
    assert_close(f"{prefix}.prediction", prediction[:stored])
    assert_close(f"{prefix}.masks", masks)
    loss = reconstruction_loss(prediction, target)
    assert_close(f"{prefix}.loss_rec", loss)
    return loss


def assert_gradients(prefix, model, slots, loss):
    loss.backward()
    golden_models.assert_grad(f"{prefix}.grad.slots", slots.grad)
    for key in golden_tensors.names():
        name = key.removeprefix(f"{prefix}.grad.")
        if name not in (key, "slots"):
            golden_models.assert_parameter(key, model, name, grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["raster", "order"])
@pytest.mark.parametrize("index", range(9))
def test_each_order(index, layout, dtype, monkeypatch):
    if layout == "order":
        in_order_layout(monkeypatch)
    model = golden_models.stage1(dtype)
    decoder, order_index = model.decoder, torch.tensor(index)
    slots, target = slots_and_target(dtype)
    order, prefix = decoder.orders[index], f"decoder.order_{index}"

    inputs = decoder.inputs(target, order_index)
    assert_close(f"{prefix}.input_first_image", inputs[0, order, :16])
    if index in (0, 8):
        assert_close(f"{prefix}.projected_input_first_image", decoder.input_proj(inputs)[0, order])

    loss = assert_decoding(prefix, *decoder(slots, target, order_index), target)
    if index in (0, 3, 8):
        assert_gradients(prefix, model, slots, loss)


def test_all_orders_averaged():
    model = golden_models.stage1()
    slots, target = slots_and_target()
    assert_decoding("decoder.all", *model.decode_all_orders(slots, target), target)


def calls(modules, monkeypatch) -> dict[str, int]:
    """Counts how often each of the named modules runs from now on."""
    counts = dict.fromkeys(modules, 0)
    for name, module in modules.items():

        def forward(*arguments, name=name, original=module.forward):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, "forward", forward)
    return counts


def test_orders_decoded_together_are_those_decoded_alone_and_share_what_no_order_changes(monkeypatch):
    model = golden_models.stage1().double()
    decoder, (slots, target) = model.decoder, slots_and_target(torch.float64)
    alone = [decoder(slots, target, torch.tensor(index)) for index in range(9)]
    first, last = decoder.transformer.blocks[0], decoder.transformer.blocks[-1]
    assert first is not last
    shared = {
        "input_proj": decoder.input_proj,
        "slot_proj": decoder.slot_proj,
        "norm": first.norm_self,
        "qkv": first.self_attention.project_qkv,
        "k": last.cross_attention.project_k,
        "v": last.cross_attention.project_v,
    }
    counts = calls(shared | {"ffn": last.ffn}, monkeypatch)
    together = list(decoder.all_orders(slots, target))
    assert counts == dict.fromkeys(shared, 1) | {"ffn": 9}
    for (prediction, masks), (expected, expected_masks) in zip(together, alone, strict=True):
        torch.testing.assert_close(prediction, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(masks, expected_masks, rtol=1e-11, atol=1e-11)


def test_a_teacher_computes_nothing_beyond_its_masks(monkeypatch):
    decoder = golden_models.stage1().decoder
    slots, target = slots_and_target()
    last = decoder.transformer.blocks[-1]
    unread = {
        "v": last.cross_attention.project_v,
        "o": last.cross_attention.project_o,
        "ffn": last.ffn,
        "norm": decoder.transformer.norm,
    }
    index = torch.tensor(3)
    expected = decoder(slots, target, index)[1]
    counts = calls(unread, monkeypatch)
    assert torch.equal(decoder.masks(slots, target, index), expected)
    assert counts == dict.fromkeys(unread, 0)


def variant(name, drop):
    """The stage-1 model with the parameters of one decoder variant."""
    state = {key: value for key, value in golden_tensors.stage1_state_dict().items() if not key.startswith(drop)}
    state |= golden_tensors.state_dict(f"decoder_variants:{name}/")
    return convert(state, num_slots=7, encoder_heads=3).model()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["projected", "raw"])
def test_mlp_decoder(kind, dtype):
    name = f"mlp_decoder_{kind}_slots"
    model = variant(name, ("dec.", "slot_proj.")).to(dtype)
    assert model.config.mlp_slot_proj == (kind == "projected") and model.config.dec_mlp_hidden == 128
    slots, target = slots_and_target(dtype)
    loss = assert_decoding(name, *model.decoder(slots, target), target)
    assert_gradients(name, model, slots, loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, parallel", [("parallel", True), ("autoregressive_with_positions", False)])
def test_cappa(name, parallel, dtype):
    model = variant("parallel_decoding", ("bos_tokens",)).to(dtype)
    assert model.config.cappa > 0
    slots, target = slots_and_target(dtype)
    prediction, masks = model.decoder(slots, target, parallel=parallel)
    loss = assert_decoding(f"cappa.{name}", prediction, masks, target)
    assert_gradients(f"cappa.{name}", model, slots, loss)


def autoregressive(**settings):
    torch.manual_seed(0)
    return AutoregressiveDecoder(24, 16, 4, **({"blocks": 2, "heads": 4} | settings))


def test_bos_and_cappa_tokens_start_as_specified():
    """Normal with standard deviation 0.02; one [BOS] per order."""
    torch.manual_seed(0)
    wide = AutoregressiveDecoder(480, 16, 4, blocks=1, heads=4)
    assert wide.bos.shape == (9, 480)
    torch.testing.assert_close(wide.bos.std().item(), 0.02, rtol=0.05, atol=0)
    cappa = AutoregressiveDecoder(480, 16, 4, blocks=1, heads=4, orders="standard", cappa=0.25)
    for token in (cappa.mask_token, cappa.positions):
        torch.testing.assert_close(token.std().item(), 0.02, rtol=0.1, atol=0)


def test_certain_parallel_steps_are_always_parallel():
    """p ≥ 1: the target is never read, not even at evaluation; p < 1 decodes in parallel only on request."""
    always, sometimes = (autoregressive(orders="standard", cappa=p) for p in (1.0, 0.25))
    sometimes.load_state_dict(always.state_dict())
    slots, target = torch.randn(2, 3, 16), torch.randn(2, 16, 24)
    expected = sometimes(slots, target, parallel=True)
    torch.testing.assert_close(always(slots, 5 * target), expected)
    torch.testing.assert_close(always.masks(slots, target), expected[1])
    assert (sometimes(slots, target)[1] - expected[1]).abs().max() > 1e-4


def test_parallel_needs_a_mask_token():
    decoder = autoregressive()
    with pytest.raises(ValueError, match="parallel=True needs a decoder with cappa > 0"):
        decoder(torch.randn(2, 3, 16), torch.randn(2, 16, 24), parallel=True)
    with pytest.raises(ValueError, match="cappa=0.25 decodes in the standard order only"):
        autoregressive(cappa=0.25)


def test_prediction_depends_on_predecessors_and_slots_only():
    """Changing the target at a token changes predictions behind it in the order and nowhere else."""
    decoder = autoregressive().double()
    slots, target = torch.randn(1, 3, 16).double(), torch.randn(1, 16, 24).double()
    for index in range(9):
        order = decoder.orders[index]
        changed = target.clone()
        changed[:, order[7]] += 1.0
        before, after = (decoder(slots, t, torch.tensor(index))[0] for t in (target, changed))
        differs = (before != after).any(-1)[0, order]
        assert differs.tolist() == [False] * 8 + [True] * 8


def test_mlp_decoder_equals_decoding_every_slot_at_every_position():
    """The layer-wise shortcuts (slot and position apart, mixing before the last layer) change nothing."""
    torch.manual_seed(0)
    decoder = MlpDecoder(12, 8, 9, hidden=16).double()
    slots = torch.randn(2, 5, 8).double()
    tokens = decoder.slot_proj(slots).unsqueeze(2) + decoder.positions
    features, alpha = decoder.mlp(tokens).split([12, 1], -1)
    weights = alpha.softmax(1)
    prediction, masks = decoder(slots, torch.empty(2, 9, 12).double())
    torch.testing.assert_close(prediction, (weights * features).sum(1))
    torch.testing.assert_close(masks, weights.squeeze(-1).transpose(1, 2))
    assert all(not layer.bias.any() for layer in decoder.mlp[::2])
    assert torch.equal(decoder.masks(slots, None), masks)
