"""Protects the choice of arithmetic: what auto becomes, and that weights and losses stay float32 under bf16."""

from __future__ import annotations

import pytest
import torch

from spot_fast import precision
from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.spot import Spot, reconstruction_loss
from spot_fast.training.run_folder import RunFolder
from spot_fast.training.trainer import Trainer
from spot_kernels.gpu import launch
from tiny_runs import tiny, train

CPU = torch.device("cpu")


def test_auto_follows_the_hardware(monkeypatch):
    for features, expected in (({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert precision.resolve("auto", CPU) == expected
        assert precision.resolve("float32", CPU) == "float32" and precision.resolve("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="fp8"):
        precision.resolve("fp8", CPU)


def test_bf16_keeps_weights_losses_and_gradients_in_float32_and_stays_near_float32():
    config = preset("scenes", num_slots=4, slot_dim=32, slot_mlp=32, dec_blocks=2)
    torch.manual_seed(0)
    model = Spot(config, frozen_encoder(config))
    target = torch.nn.functional.layer_norm(torch.randn(4, model.encoder.num_tokens, model.encoder.dim), (128,))
    noise = torch.randn(4, 4, 32)
    losses, gradients = {}, {}
    for name in ("float32", "bf16"):
        model.zero_grad()
        with precision.autocast(name, CPU):
            output = model(target, target, noise=noise)
            loss = reconstruction_loss(output.prediction, target)
        loss.backward()
        assert loss.dtype == output.slot_attn.dtype == output.slot_logits.dtype == output.masks.dtype == torch.float32
        losses[name] = loss.item()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert gradients[name].dtype == torch.float32
    # bfloat16 keeps 8 bits: one rounding is 0.4 %, and a loss is a mean of many.
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=5e-3)
    cosine = torch.nn.functional.cosine_similarity(gradients["bf16"], gradients["float32"], dim=0)
    assert cosine > 0.99


def test_tf32_is_for_gpus_that_have_it():
    with pytest.raises(UserError, match="--precision tf32 needs an NVIDIA GPU.*not cpu: use float32"):
        precision.resolve("tf32", CPU)


def test_tf32_ends_with_its_block_and_other_precisions_change_nothing():
    setting = torch.get_float32_matmul_precision
    before = setting()
    with pytest.raises(RuntimeError), precision.float32_products("tf32"):
        assert setting() == "high"
        raise RuntimeError
    assert setting() == before
    for name in ("float32", "bf16"):
        with precision.float32_products(name):
            assert setting() == before


MATMUL = torch.backends.cuda.matmul
# What a user may have set before: with PyTorch's older functions, with its newer attributes, with both.
SETTINGS = {
    "nothing": lambda: None,
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "newer, tf32": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "newer, tf32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, ieee": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
    "older, then newer": lambda: _both(fp32_precision="ieee"),
    "both of the older": lambda: _both(allow_tf32=False),
}


def _both(**attribute) -> None:
    torch.set_float32_matmul_precision("high")
    for name, value in attribute.items():
        setattr(MATMUL, name, value)


@pytest.fixture(params=SETTINGS)
def users_setting(request):
    """One of SETTINGS, and PyTorch's own again afterwards."""
    SETTINGS[request.param]()
    yield request.param
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest" and MATMUL.fp32_precision == "none"


def _settings() -> tuple[str, str]:
    try:
        return MATMUL.fp32_precision, torch.get_float32_matmul_precision()
    except RuntimeError:
        return MATMUL.fp32_precision, "raises"


def test_tf32_works_whatever_setting_a_user_has_and_leaves_it(users_setting):
    before = _settings()
    for _ in range(2):
        with precision.float32_products("tf32"):
            assert MATMUL.fp32_precision == "tf32"
        assert _settings() == before


def test_kernels_multiply_as_the_user_has_set_it(users_setting):
    """The launcher asks before every launch, of bfloat16 too: a getter that raises would be an error in any run."""
    tf32 = users_setting.startswith(("older, high", "older, medium", "older, allow", "newer, tf32"))
    assert launch.float32_precision(torch.device("cuda")) == ("tf32" if tf32 else "ieee")


def test_a_tf32_run_is_tf32_in_steps_caches_and_validation_only(tmp_path, monkeypatch):
    trainer = Trainer(tiny(epochs=2), device=CPU)
    trainer.precision = trainer.forward.precision = "tf32"
    seen = {}
    for name in ("train_step", "_open_cache"):
        method = getattr(trainer, name)

        def spied(*arguments, name=name, method=method):
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return method(*arguments)

        monkeypatch.setattr(trainer, name, spied)
    monkeypatch.setattr(
        "spot_fast.training.trainer.quick_validation",
        lambda *_, **__: seen.update(validation={torch.get_float32_matmul_precision()}) or {"val_loss": 0.0},
    )
    before = torch.get_float32_matmul_precision()
    with RunFolder.create(trainer.config, root=tmp_path) as folder:
        trainer.run(folder, tensorboard=False)
    assert seen == dict.fromkeys(("train_step", "_open_cache", "validation"), {"high"})
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("changes", [{}, dict(decoder="mlp", dec_mlp_hidden=16, orders="standard")])
def test_frozen_weights_in_bfloat16_change_no_bit(changes, tmp_path, monkeypatch):
    config = tiny(precision="bf16", eval_images=0, epochs=1, dec_blocks=1, **changes)
    teacher, _ = train(tmp_path, config)
    config = tiny(2, precision="bf16", dec_blocks=1, **changes)
    stored = Trainer(config, device=CPU, teacher=teacher)
    monkeypatch.setattr("spot_fast.training.models.store_in_bfloat16", lambda module: None)
    plain = Trainer(config, device=CPU, teacher=teacher)
    kinds = {
        module: {p.dtype for p in module.parameters() if p.dim() > 1}
        for module in (
            *stored.model.encoder.vit.blocks,
            stored.teacher.slot_encoder.attention,
            stored.teacher.decoder,
            stored.model.last_blocks,
        )
    }
    *frozen, trained = kinds.values()
    assert trained == {torch.float32} and all(torch.bfloat16 in dtypes for dtypes in frozen)
    for trainer in (stored, plain):
        for batch in list(trainer.batches())[:2]:
            trainer.train_step(batch)
    assert torch.equal(stored.meter.epoch, plain.meter.epoch)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stored.parameters, plain.parameters, strict=True))
    assert stored.validate() == plain.validate()


def test_weights_that_train_are_not_rounded():
    with pytest.raises(ValueError, match="keeps its float32 weights"):
        precision.store_in_bfloat16(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_rounds_products_on_a_gpu():
    device = torch.device("cuda")
    if not torch.cuda.is_tf32_supported():
        pytest.skip("needs TF32")
    assert precision.resolve("tf32", device) == "tf32"
    a = torch.randn(256, 256, device=device)
    exact = a.double() @ a.double()
    errors = {}
    for name in ("float32", "tf32"):
        with precision.float32_products(name):
            errors[name] = ((a @ a - exact).abs().max() / exact.abs().max()).item()
    assert errors["float32"] < 1e-5 < errors["tf32"] < 1e-2
