"""The command line: what a user types and what a user reads."""

import json
import os
import re
import shutil
import signal
import sys
import time
import types
from dataclasses import asdict, fields

import pytest
import torch

from image_files import make_images
from spot_fast import train
from spot_fast.checkpoints.runs import CONFIG, METRICS, MODEL, STATE, load_run, read_config, read_metadata
from spot_fast.config import Config, preset
from spot_fast.precision import resolve
from spot_fast.recipes import DATA_SETS
from spot_fast.training import arguments, trainer
from spot_fast.training.run_folder import RunFolder
from spot_fast.training.trainer import Trainer
from tiny_runs import STEPS, assert_same_run, metrics, options, stop_after, tiny
from tiny_runs import train as train_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("trained"), tiny())[0]


@pytest.fixture
def workplace(tmp_path, monkeypatch, trained):
    """A current folder whose runs/ has a finished stage-1 run."""
    shutil.copytree(trained, tmp_path / "runs" / "scenes-stage1-001")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    return train.main(["--no-tensorboard", "--threads", "1", *words])


def refused(capsys, *words: str) -> str:
    """The sentence with which a command line is refused."""
    capsys.readouterr()
    try:
        code = call(*words)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (code, error)
    return error


def printed_config(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert call("--print-config", *words) == 0
    return json.loads(capsys.readouterr().out)


def test_both_stages_with_nothing_but_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*options()) == 0
    output = capsys.readouterr().out
    assert "runs/scenes-stage1-001: preset scenes, stage 1, 26 images, 24 steps of 4" in output
    assert output.count("epoch ") == 4 and "mBO_i" in output
    assert re.search(r"is finished: 24 steps in \d+ s", output)
    student = re.search(r"python -m spot_fast.train (--stage 2 --teacher \S+)", output)[1].split()

    assert "note: " not in output
    assert call(*student, "--epochs", "2", "--warmup-steps", "5") == 0
    output = capsys.readouterr().out
    assert "note: --warmup-steps 5 is less than an epoch and rounded to none: use 7 or more for a warm-up" in output
    assert "from the teacher: batch_size 4, dec_blocks 2" in output and "att " in output
    assert "runs/scenes-stage2-001 is finished" in output and "--stage 2" not in output
    run = load_run("runs/scenes-stage2-001")
    assert run.metadata["teacher"] == "scenes-stage1-001" and len(run.metadata["teacher_sha256"]) == 64
    assert (run.config.slot_init, run.config.truncation, run.config.num_slots) == ("learned", "bi_level", 3)


def test_print_config_is_the_preset_with_what_was_given(capsys):
    fast = resolve("auto", torch.device("cpu"))
    assert printed_config(capsys, "--device", "cpu") == asdict(preset("scenes", precision=fast, compile="no"))
    assert printed_config(capsys, "--preset", "movi_e", "--precision", "bf16", "--compile", "yes") == asdict(
        preset("movi_e", precision="bf16", compile="yes")
    )
    changes = dict(
        precision="float32",
        compile="no",
        num_slots=9,
        lr=0.5,
        flip=True,
        att_weight_final=0.1,
        cache="none",
        feature_norm=False,
    )
    words = [
        "--num-slots",
        "9",
        "--lr",
        "0.5",
        "--flip",
        "--att-weight-final",
        "0.1",
        "--cache",
        "none",
        "--no-feature-norm",
        "--data",
        "some/where",
        "--precision",
        "float32",
        "--compile",
        "no",
    ]
    expected = asdict(preset("scenes", data=os.path.abspath("some/where"), **changes))
    assert printed_config(capsys, *words) == expected


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"].split()[0] in text
    for name in (*DATA_SETS, "--teacher", "--resume", "--runs", "--threads", "--device"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 125


def test_help_shows_the_defaults_of_preset_and_stage(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--preset", "movi_c", "--stage", "2", "--help"])
    text = capsys.readouterr().out
    for shown in ("slots K (default: 11)", "(default: 0.00015)", "initial slots (default: learned)"):
        assert shown in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--preset cocoa", "--preset cocoa is unknown: use one of scenes, coco, voc"),
        ("--preset coco", "--preset coco needs --data PATH"),
        ("--preset voc --data /no/such/folder", "--data /no/such/folder is not a folder"),
        ("--num-slot 7", "unrecognized arguments: --num-slot 7"),
        ("--epochs two", "argument --epochs: invalid int value: 'two'"),
        ("--crop round", "argument --crop: invalid choice: 'round'"),
        ("--epochs 0", "--epochs is 0: use 1 or more"),
        ("--lr nan", "--lr is nan: use"),
        ("--lr 0", "--lr is 0: nothing would be learned"),
        ("--lr-low 1", "--lr-low 1.0 is above the peak --lr 0.002"),
        ("--seed -1", "--seed is -1: use 0 or more"),
        ("--threads 0", "--threads is 0: use 1 or more"),
        ("--slot-heads 5 --slot-dim 64", "--slot-heads 5 does not divide --slot-dim 64"),
        ("--cappa 0.25", "--cappa 0.25 works in the standard patch order only: add --orders standard"),
        ("--decoder mlp --orders spot9", "--decoder mlp works in the standard patch order only"),
        ("--decoder masked --masked-drawn 2", "--masked-drawn is 2.0: use 1 or less"),
        ("--batch-size 100 --train-images 9", "9 training images, fewer than --batch-size 100"),
        (
            "--warmup-steps 9000 --epochs 24",
            "--warmup-steps 9000 is 1125 epochs but --epochs is 24: use --warmup-steps 19",
        ),
        ("--dec-heads 5 --encoder-weights none", "this model cannot be built: "),
        ("--device tpu:7", "--device tpu:7 cannot be used"),
        ("--encoder vit_of_nobody", "--encoder vit_of_nobody is not a model timm knows"),
        ("--encoder-weights nowhere.safetensors", "nowhere.safetensors is not a file"),
        ("--image-size 30 --mask-size 30", "--image-size 30 is not a multiple"),
        ("--teacher x", "--teacher x belongs to stage 2"),
        ("--resume nowhere", "run nowhere is not a folder"),
        ("--spike -1", "--spike is -1.0: use 0 or more"),
        ("--spike 0.5", "--spike 0.5 takes ordinary losses for spikes: use more than 1, or 0 to accept"),
        ("--cuda-graph yes --device cpu", "--cuda-graph yes needs an NVIDIA GPU, not cpu: use auto or no"),
        (
            "--image-size 32 --encoder-weights none",
            "mask_size is 96 but scenes are drawn at 32: --mask-size must equal",
        ),
        ("--float8 --precision bf16 --device cpu", "--float8 needs an NVIDIA GPU of compute capability 8.9 or more"),
        ("--float8 --precision float32", "--float8 belongs to --precision bf16, not float32: leave one out"),
        ("--method dino", "--method dino is unknown: use one of spot, spot_ens"),
        ("--accumulate 3", "--accumulate 3 does not divide the 8 images of a process"),
        ("--precision tf32 --device cpu", "--precision tf32 needs an NVIDIA GPU"),
        ("--profile -1", "--profile is -1: use 0 or more"),
        ("--cache-dir /dev/null/x", "--cache-dir /dev/null/x is not a folder that can be made and written to"),
        (
            "--preset folder --data {images} --encoder spot_scenes --image-size 16 --mask-size 16 --dec-heads 4 "
            "--crop random --cache features",
            "--cache features: a random crop of image folder train has unlimited outcomes",
        ),
        ("--preset folder --data {images} --sbd x --cache none --loader tape", "argument --loader: invalid choice"),
        (
            "--stage 2",
            "stage 2 needs a teacher, but there is no finished stage 1 run of preset scenes in runs: train one "
            "with python -m spot_fast.train --stage 1",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(words, sentence, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = make_images(tmp_path_factory.mktemp("images"), 8)
    small = ["--train-images", "64", "--val-images", "2", "--batch-size", "8", "--warmup-steps", "8"]
    assert sentence in refused(capsys, *small, *words.format(images=images).split())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--num-slots 4", "has num_slots 3 but --num-slots is 4: both need the same number of slots"),
        ("--image-size 40 --mask-size 40", "has image_size 32 but --image-size is 40: both need the same image size"),
        ("--encoder vit_tiny_patch16_224", "has encoder spot_scenes but --encoder is vit_tiny_patch16_224"),
        ("--no-feature-norm", "has feature_norm True but --feature-norm is False"),
        ("--slot-heads 2", "--slot-heads 2: the student of stage 2 needs 1"),
        ("--teacher nowhere", "run nowhere is not a folder"),
    ],
)
def test_a_teacher_that_does_not_fit(words, sentence, workplace, capsys):
    assert sentence in refused(capsys, "--stage", "2", *words.split())


def test_a_teacher_with_other_encoder_weights(workplace, capsys):
    from safetensors.torch import save_file

    from spot_fast.checkpoints.encoder_weights import frozen_encoder

    weights = frozen_encoder(tiny()).vit.state_dict()
    save_file({name: value + 1 for name, value in weights.items()}, "other.safetensors")
    error = refused(capsys, "--stage", "2", "--encoder-weights", "other.safetensors", "--warmup-steps", "7")
    assert re.search(r"trained with encoder spot_scenes of sha256 \w{12}, but the weights found .* have \w{12}", error)


def test_an_unfinished_teacher_and_a_student_as_teacher(workplace, capsys):
    (workplace / "runs/scenes-stage1-001" / MODEL).unlink()
    assert "--resume runs/scenes-stage1-001" in refused(capsys, "--stage", "2")
    assert "is not finished" in refused(capsys, "--stage", "2", "--teacher", "scenes-stage1-001")
    with RunFolder.create(tiny(2), root=workplace / "runs") as folder:
        (folder.path / MODEL).write_bytes(b"")
    assert "is a stage-2 run" in refused(capsys, "--stage", "2", "--teacher", "scenes-stage2-001")


def test_threads_are_fewer_on_a_busy_machine_unless_their_number_is_given(tmp_path, monkeypatch, capsys):
    """On a run that is resumed too, which keeps both: the number, and whether it is fixed."""
    made, looked = [], []

    class Threads:
        def __init__(self, most, say):
            made.append(most)

        def adapt(self):
            looked.append(torch.get_num_threads())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "CpuThreads", Threads)
    short = [*options(epochs=2), "--no-tensorboard"]
    with stop_after(monkeypatch, 4):
        assert train.main([*short, "--out", "shared"]) == 130
        assert (made, len(looked)) == ([1], 4)
        assert train.main([*short, "--threads", "1", "--out", "fixed"]) == 130
    assert read_metadata(tmp_path / "shared" / STATE)["fixed_threads"] == "no"
    assert train.main(["--resume", "fixed"]) == 0
    assert (made, len(looked)) == ([1], 4)
    assert train.main(["--resume", "shared"]) == 0
    assert (made, len(looked)) == ([1, 1], 12)


def test_resume_finds_the_run_of_the_command_line(workplace, monkeypatch, capsys, trained):
    with stop_after(monkeypatch, 3):
        assert call(*options(seed=1)) == 130
        assert "go on with python -m spot_fast.train --resume runs/scenes-stage1-002" in capsys.readouterr().out
        assert call(*options(seed=2)) == 130
    assert call(*options(seed=1), "--resume") == 0
    assert "runs/scenes-stage1-002 is finished" in capsys.readouterr().out
    assert call("--resume", "scenes-stage1-003") == 0
    assert "runs/scenes-stage1-003 is finished" in capsys.readouterr().out
    before = os.listdir("runs")
    assert call(*options(), "--resume") == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert os.listdir("runs") == before


def test_resume_keeps_the_runs_settings(workplace, monkeypatch, capsys):
    with stop_after(monkeypatch, 3):
        assert call(*options(), "--out", "mine") == 130
    path = workplace / "mine"
    for words in (["--resume", "mine"], ["--out", "mine", "--resume"]):
        assert "mine cannot be resumed: --lr is 0.5 but the run has 0.001" in refused(capsys, *words, "--lr", "0.5")
    assert call("--resume", "mine", "--cache", "none", "--save-every", "2") == 0
    assert (read_config(path).cache, read_config(path).save_every) == ("none", 2)
    assert call("--resume", "mine", "--print-config") == 0
    (path / CONFIG).write_text((path / CONFIG).read_text().replace('"seed": 0', '"seed": 3'))
    (path / MODEL).unlink()
    assert "mine cannot be resumed: it began with other settings" in refused(capsys, "--resume", "mine")


def test_resume_of_several_runs_prefers_none_that_is_in_use(workplace, monkeypatch, capsys):
    (workplace / "runs/scenes-stage1-001" / MODEL).unlink()
    with RunFolder(workplace / "runs/scenes-stage1-001"):
        assert "is being trained by another process" in refused(capsys, "--resume")


def test_resume_with_nothing_to_resume_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with stop_after(monkeypatch, 2):
        assert call(*options(), "--resume") == 130
    assert "nothing to resume in runs: a new run begins" in capsys.readouterr().out
    (tmp_path / "runs/scenes-stage1-001").rename(tmp_path / "runs/other")
    config = tmp_path / "runs/other" / CONFIG
    config.write_text(config.read_text().replace('"preset": "scenes"', '"preset": "voc"'))
    assert "to go on with another one use --resume runs/other" in refused(capsys, "--resume")


def test_a_folder_without_a_state_begins_again(workplace, capsys):
    path = workplace / "runs/scenes-stage1-001"
    for name in (STATE, MODEL):
        (path / name).unlink()
    assert call("--resume", str(path)) == 0
    lines = (path / METRICS).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == STEPS and len(lines) == STEPS // 4 + 4 + 2


def test_stage_2_resumes_with_its_teacher_also_when_moved(workplace, monkeypatch, capsys):
    student = ["--stage", "2", "--epochs", "2", "--warmup-steps", "7"]
    assert call(*student, "--out", "runs/whole") == 0
    with stop_after(monkeypatch, 4):
        assert call(*student) == 130
    shutil.move("runs", "moved")
    assert call("--resume", "moved/scenes-stage2-001") == 0
    assert_same_run(workplace / "moved/scenes-stage2-001", workplace / "moved/whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(number, workplace, monkeypatch, capsys, trained):
    train_step = Trainer.train_step

    def signalled(self, batch):
        if self.step == 9:
            os.kill(os.getpid(), number)
        train_step(self, batch)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert call(*options(), "--out", "mine") == 130
    output = capsys.readouterr().out
    assert "stopped at step 10 of 24: go on with python -m spot_fast.train --resume mine" in output
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert call("--resume", "mine") == 0
    assert_same_run(workplace / "mine", trained)


def test_a_second_ctrl_c_does_not_wait_and_loses_nothing(workplace, monkeypatch, capsys, trained):
    train_step = Trainer.train_step

    def signalled(self, batch):
        if self.step == 9:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert call(*options(), "--out", "mine", "--save-every", "4") == 130
    assert "interrupted" in capsys.readouterr().err and read_metadata(workplace / "mine" / STATE)["step"] == "8"
    assert call("--resume", "mine") == 0
    assert_same_run(workplace / "mine", trained)


def test_interrupted_before_the_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "Trainer", interrupt)
    assert call(*options()) == 130 and "interrupted" in capsys.readouterr().err


def test_an_unwritable_place_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "file" in refused(capsys, *options(), "--runs", "file/runs")


@pytest.mark.parametrize("broken", ["import", "folder", "while it trains", "at the end"])
def test_a_broken_tensorboard_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, broken):
    """Such as protobuf of another version, or a full disk in the thread that writes."""
    monkeypatch.chdir(tmp_path)
    if broken == "import":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("empty"))
    else:
        from torch.utils import tensorboard

        where = {"folder": "__init__", "while it trains": "add_scalar", "at the end": "close"}[broken]

        def fail(*_, **__):
            raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file")

        monkeypatch.setattr(tensorboard.SummaryWriter, where, fail)
    assert train.main(["--threads", "1", "--out", "run", *options(epochs=1)]) == 0
    out = capsys.readouterr().out
    why = r"ImportError: .*" if broken == "import" else r"TypeError: Descriptors cannot be created directly\."
    assert len(re.findall(rf"note: TensorBoard's events are not written from here on \({why}\)", out)) == 1
    assert "run is finished" in out and (tmp_path / "run" / MODEL).exists()
    assert any(line["kind"] == "validation" for line in metrics(tmp_path / "run"))


def test_tensorboard_goes_on_where_the_log_does_and_no_bar_without_a_terminal(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    words = ["--threads", "1", "--out", "run", *options()]
    with stop_after(monkeypatch, 10):
        assert train.main(words) == 130
    state = (tmp_path / "run" / STATE).read_bytes()
    with stop_after(monkeypatch, 15):
        assert train.main([*words, "--resume"]) == 130
    (tmp_path / "run" / STATE).write_bytes(state)  # as if it had been killed before it could save
    time.sleep(1.1)  # TensorBoard names its files by the second
    capsys.readouterr()
    assert train.main([*words, "--resume"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and len(captured.out.splitlines()) == 2 + 3 + 6, captured
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(4, STEPS + 1, 4))
    assert {"train/lr", "train/grad_norm", "validation/mbo_i_slots"} <= set(events.Tags()["scalars"])
