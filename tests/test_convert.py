"""Protects the convert command: third-party checkpoints in, run folders out, and back; refused files write nothing."""

import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import golden_tensors
from golden_tensors import ROOT, assert_close, load
from spot_fast import convert, evaluate, segment, train
from spot_fast.checkpoints.official import convert as convert_official
from spot_fast.checkpoints.official import official_weights
from spot_fast.checkpoints.runs import CONFIG, MODEL, load_run, read_config
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.decoders import DECODERS, MlpDecoder
from tiny_runs import tiny
from untrained_runs import untrained

GOLDEN = [
    "checkpoints/images",
    "checkpoints/*.slot_noise",
    "checkpoints/*.slots",
    "checkpoints/*.decoder_masks_order_0",
]

FILE = ROOT / "checkpoints" / "stage1_checkpoint_numpy1.pt.tar"
OPTIONS = ["--num-slots", "4", "--encoder-heads", "3"]


def run(*argv, code=0):
    assert convert.main([str(a) for a in argv]) == code


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden checkpoint as a folder, moved after it was written."""
    folder = tmp_path_factory.mktemp("converted")
    run(FILE, folder / "first", *OPTIONS)
    return shutil.move(folder / "first", folder / "moved")


def test_a_converted_checkpoint_gives_the_authors_outputs(converted):
    model = load_run(converted).model
    reference = convert_official(FILE, num_slots=4, encoder_heads=3).model()
    images, noise = load("checkpoints/images"), load("checkpoints/stage1_checkpoint_numpy1.slot_noise")
    output, expected = model.segment(images, noise=noise), reference.segment(images, noise=noise)
    exact = reference.double().segment(images.double(), noise=noise.double())
    assert torch.equal(output.masks, expected.masks) and torch.equal(output.slots, expected.slots)
    for name, value, true in (
        ("slots", output.slots, exact.slots),
        ("decoder_masks_order_0", output.masks, exact.masks),
    ):
        atol = 4 * (value - true).abs().max().item() + 1e-6 * value.abs().max().item()
        value = value if name == "slots" else value.transpose(1, 2).unflatten(2, (4, 4))
        assert_close(f"checkpoints/stage1_checkpoint_numpy1.{name}", value, atol=atol)


def test_recognised_and_assumed_settings_are_printed(tmp_path, capsys):
    run(FILE, tmp_path / "out", *OPTIONS, "--preset", "voc")
    printed = capsys.readouterr().out
    shape = "vit:patch=16,width=24,depth=12,heads=3,hidden=96 at 64 px"
    for words in (
        "the authors' SPOT, stage 1, transformer decoder of 2 blocks in 9 orders",
        f"4 gaussian slots of width 16, encoder {shape}",
        "--preset voc",
        "--dec-heads 6",
        "--num-slots 4",
        "--slot-iterations 3",
        "encoder.safetensors",
        f"--stage 2 --preset voc --data DATA --teacher {tmp_path / 'out'}",
    ):
        assert words in printed, words
    config = read_config(tmp_path / "out")
    assert (config.preset, config.num_slots, config.crop, config.epochs) == ("voc", 4, "random", 560)


def test_a_folder_names_its_encoder_by_a_path_inside(converted):
    assert '"encoder_weights": "encoder.safetensors"' in (converted / CONFIG).read_text()
    assert read_config(converted).encoder_weights == str(converted / "encoder.safetensors")


def test_the_way_back_is_bit_equal(converted, tmp_path):
    run(converted, tmp_path / "back.pt.tar")
    contents = torch.load(tmp_path / "back.pt.tar", weights_only=True)
    original = read_checkpoint(FILE)["model"]
    assert contents.keys() == {"model"} and contents["model"].keys() == original.keys()
    for name, value in original.items():
        assert contents["model"][name].shape == value.shape and torch.equal(contents["model"][name], value), name


def test_there_and_back_from_our_side_is_bit_equal(tmp_path):
    """A student of ours: its encoder's trained blocks, learned slots and the frozen weights."""
    config = tiny(
        2, encoder="vit:patch=8,width=24,depth=5,heads=3,hidden=96", train_blocks=4, feature_norm=False, dec_heads=6
    )
    student = untrained(tmp_path / "student", config)
    run(student.path, tmp_path / "student.pt.tar")
    run(tmp_path / "student.pt.tar", tmp_path / "again", "--encoder-heads", 3)
    own, again = (load_file(tmp_path / name / MODEL) for name in ("student", "again"))
    assert own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)
    encoder = load_run(tmp_path / "again").model.encoder
    assert encoder.weights_hash() == student.model.encoder.weights_hash()


@pytest.mark.parametrize("variant", ["projected_slots", "raw_slots"])
def test_tensors_that_the_authors_do_not_use_come_back_too(variant, tmp_path):
    """With the MLP decoder: an input projection and a [BOS]. Older files say tf_dec."""
    state = golden_tensors.stage1_state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(("dec.", "slot_proj."))}
    state["bos_tokens"] = state["bos_tokens"][:1]
    prefix = f"decoder_variants:mlp_decoder_{variant}/"
    state |= golden_tensors.state_dict(prefix)
    older = {name.replace("dec.", "tf_dec.", 1) if name.startswith("dec.") else name: v for name, v in state.items()}
    torch.save(older, tmp_path / "older.pt.tar")
    run(tmp_path / "older.pt.tar", tmp_path / "out", "--encoder-heads", "3")
    run(tmp_path / "out", tmp_path / "back.pt.tar")
    back = torch.load(tmp_path / "back.pt.tar", weights_only=True)["model"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_run_becomes_one_folder_to_share(tmp_path):
    config = tiny(data="/home/me/data", cache_dir="/scratch")
    source = untrained(tmp_path / "run", config)
    run(source.path, tmp_path / "shared")
    shared = load_run(tmp_path / "shared")
    assert sorted(os.listdir(tmp_path / "shared")) == [
        "README.md",
        "config.json",
        "encoder.safetensors",
        "model.safetensors",
    ]
    assert (shared.config.data, shared.config.cache_dir) == (None, None)  # paths of this machine
    own = source.model.learned_state_dict()
    assert all(torch.equal(value, own[name]) for name, value in shared.model.learned_state_dict().items())


def test_every_command_takes_the_authors_file_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(FILE), "--data", str(ROOT / "coco_mini"), "--limit", "1", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert "stage1_checkpoint_numpy1.pt.tar · preset coco · stage 1" in captured.out
    assert "do not show all settings, assumed are --preset coco, --num-slots 7" in captured.err
    assert segment.main(["--run", str(FILE), "--scenes", "1"]) == 0
    assert (tmp_path / "segments" / "scene_000_labels.png").is_file()
    options = [
        "--stage",
        "2",
        "--preset",
        "scenes",
        "--teacher",
        str(FILE),
        "--num-slots",
        "5",
        "--mask-size",
        "64",
        "--train-images",
        "4",
        "--val-images",
        "2",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--warmup-steps",
        "1",
        "--eval-images",
        "0",
        "--no-tensorboard",
        "--precision",
        "float32",
    ]
    assert train.main(options) == 0
    student = load_run("runs/scenes-stage2-001")
    assert student.config.num_slots == 5 and student.config.encoder_weights == str(FILE)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluated:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('executed')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "evil, name", [(Command("touch executed"), r"posix\.system"), (Evaluated(), r"builtins\.eval")]
)
def test_a_malicious_file_is_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch, capsys, evil, name, zipped):
    """In the state of the optimiser, where NumPy's scalars are allowed."""
    monkeypatch.chdir(tmp_path)
    contents = {"model": {"a": torch.zeros(2)}, "optimizer": {"state": {0: {"step": evil}}, "param_groups": []}}
    torch.save(contents, "evil.pt.tar", _use_new_zipfile_serialization=zipped)
    run("evil.pt.tar", "out", code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(rf"evil.pt.tar was not loaded: it calls {name}", error), error
    assert os.listdir(tmp_path) == ["evil.pt.tar"]


def test_refusals_write_nothing(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("text")
    scenes = untrained(tmp_path / "scenes", tiny())
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    before = sorted(tmp_path.rglob("*"))
    for argv, words in (
        ((FILE, tmp_path / "there"), "there exists and is not overwritten: choose"),
        ((FILE, tmp_path / "x.pt.tar"), "is a checkpoint file already"),
        ((FILE, tmp_path / "x", "--from", "ocbench"), "looks like a checkpoint of authors"),
        ((FILE, tmp_path / "x", "--num-slots", "0"), "--num-slots is 0: use 1 or more"),
        ((FILE, tmp_path / "x", "--cappa", "-1"), "--cappa is -1.0: use 0 or more"),
        ((FILE, tmp_path / "x", "--cappa", "nan"), "--cappa is nan: use 0 or more"),
        ((FILE, tmp_path / "x", "--dec-heads", "7"), "this model cannot be built"),
        ((FILE, tmp_path / "x", "--encoder", "vit:patch=16,width=12,depth=12,heads=3,hidden=48"), "another ViT"),
        ((scenes.path, tmp_path / "x", "--preset", "voc"), "--preset belongs to checkpoint files"),
        ((scenes.path, tmp_path / "x.pt.tar"), "its features are normalised"),
        ((tmp_path / "other.pt", tmp_path / "x"), "lacks encoder.patch_embed.proj.weight"),
        ((tmp_path / "nowhere" / "file.pt", tmp_path / "x"), "is no file, folder or run"),
    ):
        run(*argv, code=2)
        assert words in capsys.readouterr().err, words
        assert sorted(tmp_path.rglob("*")) == before, words


def test_a_registered_decoder_goes_by_its_own_name_and_is_no_checkpoint_of_the_authors(tmp_path, monkeypatch, capsys):
    """A decoder is neither labelled nor exported as another, and its run loads only where it is registered."""
    with monkeypatch.context() as patch:
        patch.setitem(DECODERS, "dot", lambda _, encoder: MlpDecoder(encoder.dim, 16, encoder.num_tokens, hidden=8))
        source = untrained(tmp_path / "run", tiny(decoder="dot", orders="standard", feature_norm=False)).path
        run(source, tmp_path / "back.pt.tar", code=2)
        error = capsys.readouterr().err
        assert "cannot become a checkpoint of the authors' implementation: its decoder is dot" in error
        assert error.count("\n") == 1 and not (tmp_path / "back.pt.tar").exists()
        run(source, tmp_path / "shared")
        card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
        for text in (capsys.readouterr().out, card):
            assert "dot decoder" in text and "transformer" not in text and "MLP" not in text
    with pytest.raises(UserError, match="--decoder dot is unknown: use one of transformer, masked, mlp, or call"):
        load_run(source)


def test_a_converted_student_has_both_encoders():
    """A trained block is the student's, everything else is in both."""
    state = official_weights(golden_tensors.stage2_state_dict())
    converted = convert_official(state, encoder_heads=3)
    assert converted.config.stage == 2 and not converted.unused
    trained = converted.model().last_blocks[0].attn.qkv.weight
    assert torch.equal(trained, state["encoder.blocks.8.attn.qkv.weight"])
    assert preset("coco", 2).epochs == converted.config.epochs
