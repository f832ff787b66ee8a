"""The authors' checkpoints: every tensor finds its place, outputs are theirs, and a file cannot run code."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import golden_models
import golden_tensors
from golden_tensors import ROOT, assert_close, load
from spot_fast.errors import UserError
from spot_fast.model import reconstruction_loss
from spot_fast.official import infer_config, load_official, official_state_dict, official_weights, read_checkpoint

GOLDEN = ["stage1_state_dict:*", "stage2_student_state_dict:*", "checkpoints/*"]

FILE = ROOT / "checkpoints" / "stage1_checkpoint_numpy1.pt.tar"
SETTINGS = golden_tensors.index()["checkpoints"]["checkpoints/stage1_checkpoint_numpy1.pt.tar"]["config"]
STORED = "checkpoints/stage1_checkpoint_numpy1."


def official(**changes):
    return load_official(FILE, num_slots=SETTINGS["slots"], encoder_heads=SETTINGS["heads"], **changes)


def outputs(dtype):
    model = official().to(dtype)
    images, noise = load("checkpoints/images").to(dtype), load(STORED + "slot_noise").to(dtype)
    one, every = model.segment(images, noise=noise), model.segment(images, orders="all", noise=noise)
    target = model.encode(images)[1]

    def on_grid(maps):
        return maps.transpose(1, 2).unflatten(2, (4, 4))

    return {
        "slots": one.slots,
        "slot_attention": on_grid(one.slot_attn),
        "decoder_masks_order_0": on_grid(one.masks),
        "decoder_masks_all_orders": on_grid(every.masks),
        "loss_rec": reconstruction_loss(one.prediction, target).reshape(1),
        "loss_rec_all_orders": reconstruction_loss(every.prediction, target).reshape(1),
    }


def test_a_released_checkpoint_gives_the_authors_outputs():
    """The index states no error for these: allowed is 4 × what float32 itself loses, as for the other tensors."""
    single, double = outputs(torch.float32), outputs(torch.float64)
    for name, value in single.items():
        error = (value - double[name]).abs().max().item()
        assert_close(STORED + name, value, atol=4 * error + 1e-6 * value.abs().max().item())


def test_the_rest_of_the_checkpoint_is_plain_data():
    """NumPy scalars in the optimiser's state, which plain weights_only loading refuses."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(FILE, weights_only=True)
    contents = read_checkpoint(FILE)
    stored = golden_tensors.index()["checkpoints"]["checkpoints/stage1_checkpoint_numpy1.pt.tar"]
    assert list(contents) == stored["keys"] and len(contents["model"]) == stored["model_keys"]
    assert contents["optimizer"]["param_groups"][0]["lr"] == stored["lr"]


def test_both_names_of_numpys_module_are_read(tmp_path):
    """numpy.core is what NumPy 1 wrote, numpy._core what NumPy 2 writes."""
    contents = read_checkpoint(FILE) | {"epoch": np.float64(3)}
    torch.save(contents, tmp_path / "new.pt.tar")
    assert read_checkpoint(tmp_path / "new.pt.tar")["epoch"] == 3
    with zipfile.ZipFile(FILE) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        assert b"numpy.core" in archive.read(pickled)


def test_settings_are_read_off_the_tensors():
    config = infer_config(FILE)
    assert (config.stage, config.slot_dim, config.slot_mlp, config.dec_blocks, config.image_size, config.orders) == (
        1, SETTINGS["slot"], SETTINGS["mlp"], SETTINGS["dec"], SETTINGS["image_size"], "spot9")  # fmt: skip
    assert (config.slot_init, config.truncation) == ("gaussian", "none")
    student = infer_config(golden_tensors.stage2_state_dict())
    assert (student.stage, student.slot_init, student.truncation, student.num_slots, student.train_blocks) == (
        2, "learned", "bi_level", 7, 4)  # fmt: skip


@pytest.mark.parametrize("build, official_state", [
    (golden_models.stage1, golden_tensors.stage1_state_dict), (golden_models.stage2, golden_tensors.stage2_state_dict)
])  # fmt: skip
def test_every_tensor_finds_its_place(build, official_state):
    """As many numbers arrive as the authors' model has, causal masks and the student's unused copies aside."""
    model, state = build(), official_state()
    converted = official_state_dict(state)
    own = model.state_dict()
    assert converted.keys() == own.keys()
    for name, value in converted.items():
        assert torch.equal(value, own[name]), name
    unused = [name for name in state if name.endswith("self_attn_mask")]
    if model.last_blocks is not None:  # trunk, embeddings and norm of the student's encoder are the frozen one's
        unused += [name for name in state if name.startswith("encoder.")
                   and not any(name.startswith(f"encoder.blocks.{i}.") for i in range(8, 12))]  # fmt: skip
    expected = sum(value.numel() for name, value in state.items() if name not in unused)
    assert sum(value.numel() for value in converted.values()) == expected


def test_older_key_names_and_wrappings_mean_the_same():
    state = golden_tensors.stage1_state_dict()
    expected = official_state_dict(state)
    older = {name.replace("dec.", "tf_dec.", 1) if name.startswith("dec.") else name: v for name, v in state.items()}
    parallel = {f"module.{name}": value for name, value in state.items()}
    for variant in (older, {"model": state, "epoch": 3}, parallel, {"model": older}):
        converted = official_state_dict(variant)
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cannot_run_code(tmp_path, zipped):
    file, trace = tmp_path / "evil.pt.tar", tmp_path / "executed"
    contents = {"model": official_weights(FILE), "epoch": Malicious(str(trace))}
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"was not loaded: it calls (posix|nt)\.mkdir"):
        read_checkpoint(file)
    assert not trace.exists()


def test_allowing_numpy_does_not_outlast_the_reading():
    before = set(map(repr, torch.serialization.get_safe_globals()))
    read_checkpoint(FILE)
    assert set(map(repr, torch.serialization.get_safe_globals())) == before


def test_other_files_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint .*missing.pt.tar is not a file"):
        read_checkpoint(tmp_path / "missing.pt.tar")
    (tmp_path / "half.pt.tar").write_bytes(FILE.read_bytes()[:100_000])
    (tmp_path / "text.pt.tar").write_text("hello")
    (tmp_path / "empty.pt.tar").write_bytes(b"")
    for name in ("half", "text", "empty"):
        with pytest.raises(UserError, match=rf"checkpoint .*{name}.pt.tar cannot be read .*no checkpoint"):
            read_checkpoint(tmp_path / f"{name}.pt.tar")
    torch.save([1, 2], tmp_path / "list.pt.tar")
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        read_checkpoint(tmp_path / "list.pt.tar")
    with pytest.raises(UserError, match="lacks encoder.patch_embed.proj.weight"):
        official_weights({"model": {"weight": torch.zeros(3)}})
    state = golden_tensors.stage1_state_dict()
    with pytest.raises(UserError, match="has head.weight, which the authors' models do not"):
        official_state_dict(state | {"head.weight": torch.zeros(3)})
    del state["dec.blocks.1.self_attn.proj_k.weight"]
    with pytest.raises(UserError, match="lacks a part of decoder.transformer.blocks.1.self_attention"):
        official_state_dict(state)


def test_a_student_trained_deeper_is_refused():
    """Only the last four blocks can differ: anything else would silently be replaced by the frozen encoder's."""
    state = golden_tensors.stage2_state_dict()
    state["encoder.blocks.5.norm1.weight"] = state["encoder.blocks.5.norm1.weight"] + 1
    with pytest.raises(UserError, match="changed encoder block 5 of 12"):
        official_state_dict(state)
    state = golden_tensors.stage2_state_dict()
    state["encoder.cls_token"] = state["encoder.cls_token"] + 1
    with pytest.raises(UserError, match="differ in encoder.cls_token"):
        official_state_dict(state)
