"""Several processes train the run of one, and end together.

One process and two differ by rounding. How much depends on the processor's sums: found were up to 2.2e-6 of a tensor's
norm in gradients and 1.1e-5 in weights after 24 steps; twice and four times that is allowed. A wrong share shows in the
first digits.
Left out are parameters whose gradient is 0 but for rounding, of which Adam makes whole steps: a bias on the queries of
all slots adds the same to the logits of all slots, and a bias on the keys of a ViT the same to those of all keys.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import two_processes
from image_files import make_images, truncate
from paths import ROOT
from spot_fast import train
from spot_fast.checkpoints.runs import MODEL, STATE, read_metadata
from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.training.arguments import _parser
from spot_fast.training.distributed import World
from spot_fast.training.trainer import Trainer
from tiny_runs import STEPS, metrics, options, tiny
from tiny_runs import train as train_run


def call(*words: str) -> int:
    return train.main(["--no-tensorboard", "--threads", "1", *words])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of `tiny()` in one process."""
    return train_run(tmp_path_factory.mktemp("whole"), tiny())[0]


def assert_rounding(one: dict, other: dict, limit: float) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"slot_encoder.attention.norm_slots.bias"}:
        value, expected = one[name], other[name]
        if name.endswith("attn.qkv.bias"):
            value, expected = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, expected))
        error = (value - expected).norm() / expected.norm()
        assert error <= limit, (name, float(error))


def assert_same_but_rounding(one: Path, other: Path) -> None:
    assert_rounding(load_file(one / MODEL), load_file(other / MODEL), 4e-5)
    lines, expected = metrics(one), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        if line["kind"] != "validation":
            assert line.pop("kind") == wanted.pop("kind") and line == pytest.approx(wanted, rel=4e-5)


def save_gradients(rank: int) -> None:
    """Every process writes the gradients of its first step, as Adam gets them, and the images that it saw."""
    train_step = Trainer.train_step

    def recorded(self, batch):
        train_step(self, batch)
        if self.step == 0:
            gradients = {name: p.grad for p, name in self.names.items() if p.grad is not None}
            torch.save((gradients, batch.images, batch.indices), f"first-{rank}.pt")

    Trainer.train_step = recorded


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"orders": "standard", "cappa": 0.5, "seed": 3}])
def test_first_gradients_and_images(changes, workplace, monkeypatch):
    words = options(epochs=2, eval_images=0, cache="none", flip=True, log_every=3, **changes)
    ending = two_processes.train(workplace, [*words, "--out", "two"], prepare="test_distributed.save_gradients")
    assert ending.codes == [0, 0], ending.err
    parts = [torch.load(f"first-{rank}.pt") for rank in range(2)]
    monkeypatch.setattr(Trainer, "train_step", Trainer.train_step)
    save_gradients(7)
    assert call(*words, "--out", "one") == 0
    gradients, images, indices = torch.load("first-7.pt")
    assert torch.equal(torch.cat([part[1] for part in parts]), images)
    assert torch.equal(torch.cat([part[2] for part in parts]), indices)
    assert all(torch.equal(parts[0][0][name], parts[1][0][name]) for name in gradients)
    assert_rounding(parts[0][0], gradients, 5e-6)
    assert_same_but_rounding(workplace / "two", workplace / "one")


def test_both_stages_and_one_process_that_writes(workplace, whole):
    ending = two_processes.train(workplace, [*options(), "--out", "first"])
    assert ending.codes == [0, 0] and ending.out[1] == "" and ending.err == ["", ""]
    assert "float32 on 2 processes, each CPU with 1 thread" in ending.out[0]
    assert ending.out[0].count("epoch ") == 4 and "in each of 2 processes" in ending.out[0]
    assert_same_but_rounding(workplace / "first", whole)
    student = [
        "--stage",
        "2",
        "--teacher",
        str(whole),
        "--epochs",
        "2",
        "--warmup-steps",
        "7",
        "--precision",
        "float32",
        "--lr",
        "1e-3",
        "--slot-rate",
        "1",
    ]
    ending = two_processes.train(workplace, [*student, "--out", "second"])
    assert ending.codes == [0, 0], ending.err
    assert call(*student, "--out", "alone") == 0
    assert_same_but_rounding(workplace / "second", workplace / "alone")
    assert sorted(os.listdir("second")) == sorted(os.listdir("alone"))


@pytest.mark.parametrize("cache", ["none", "pixels", "features"])
def test_files_caches_and_a_corrupt_image(cache, workplace):
    (workplace / "images").mkdir()
    images = make_images(workplace / "images", 22, size=(48, 32))
    truncate(images / "013.png")
    words = [
        "--preset",
        "folder",
        "--data",
        str(images),
        "--workers",
        "1",
        "--feature-norm",
        "--encoder",
        "spot_scenes",
        "--train-blocks",
        "2",
        "--dec-heads",
        "4",
        "--lr",
        "1e-3",
        *options(train_images=0, eval_images=0, epochs=2, cache=cache, flip=True),
    ]
    ending = two_processes.train(workplace, [*words, "--out", "two"])
    assert ending.codes == [0, 0], ending.err
    assert call(*words, "--out", "one") == 0
    assert_same_but_rounding(workplace / "two", workplace / "one")
    assert "013.png" in (workplace / "two" / "corrupt.txt").read_text() and "corrupt" in ending.out[0]


def test_resumed_with_another_number_of_processes(workplace, whole):
    ending = two_processes.train(workplace, [*options(), "--out", "run"], prepare="test_distributed.stop_in_rank_1")
    assert ending.codes == [130, 130] and read_metadata(workplace / "run" / STATE)["step"] == "10"
    assert "stopped at step 10 of 24: go on" in ending.out[0] and ending.out[1] == ending.err[1] == ""
    assert call("--resume", "run") == 0
    assert_same_but_rounding(workplace / "run", whole)


def test_begun_alone_and_resumed_by_two(workplace, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", Trainer.train_step)
        stop_in_rank_1(1)
        assert call(*options(), "--out", "run") == 130
    ending = two_processes.train(workplace, ["--resume", "run"])
    assert ending.codes == [0, 0] and "note: processes was 1 and is 2" in ending.out[0]
    assert_same_but_rounding(workplace / "run", whole)


def stop_in_rank_1(rank: int) -> None:
    _at_step_9(rank, lambda: os.kill(os.getpid(), signal.SIGTERM))


def fail_in_rank_1(rank: int) -> None:
    def fail():
        raise UserError("image 7 is missing")

    _at_step_9(rank, fail)


def break_in_rank_1(rank: int) -> None:
    def fail():
        raise RuntimeError("a defect")

    _at_step_9(rank, fail)


def fail_in_rank_0(rank: int) -> None:
    fail_in_rank_1(1 - rank)


def die_in_rank_1(rank: int) -> None:
    _at_step_9(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _at_step_9(rank: int, action) -> None:
    """`action` at the beginning of step 9, counted from 0, in rank 1."""
    train_step = Trainer.train_step

    def acting(self, batch):
        if self.step == 9 and rank == 1:
            action()
        train_step(self, batch)

    Trainer.train_step = acting


@pytest.mark.parametrize(
    "fault, codes, sentence, saved",
    [
        (
            "fail_in_rank_1",
            [2, 2],
            "error: another process of the run has ended (process 1: image 7 is missing)",
            "9",
        ),
        ("break_in_rank_1", [2, 1], "has ended (process 1: RuntimeError: a defect)", "9"),
        ("die_in_rank_1", [2, -9], "has ended (it left no reason)", "9"),
        ("fail_in_rank_0", [2, 2], "error: image 7 is missing", "0"),
    ],
)
def test_an_error_in_one_ends_all(fault, codes, sentence, saved, workplace):
    ending = two_processes.train(
        workplace, [*options(eval_images=0), "--out", "run"], prepare=f"test_distributed.{fault}"
    )
    assert ending.codes == codes and sentence in ending.err[0] and ending.err[0].count("\n") == 1, ending
    assert ("Traceback" in ending.err[1]) == (fault == "break_in_rank_1")
    assert ending.apart < 10
    assert read_metadata(workplace / "run" / STATE)["step"] == saved and not (workplace / "run" / MODEL).exists()


def no_set_in_rank_1(rank: int) -> None:
    def fail(config, split):
        raise UserError("no disk here")

    if rank == 1:
        sys.modules["spot_fast.training.trainer"].open_set = fail


@pytest.mark.parametrize(
    "words, prepare, sentence",
    [
        ("--batch-size 5", "", "--batch-size 5 cannot be divided among 2 processes: use a multiple"),
        ("--epochs two", "", "argument --epochs: invalid int value: 'two'"),
        ("--device cpu:0", "", "--device cpu:0 is one device and there are 2 processes: use --device cpu"),
        ("", "test_distributed.no_set_in_rank_1", "error: process 1: no disk here"),
    ],
)
def test_what_is_wrong_from_the_start_is_one_sentence(words, prepare, sentence, workplace):
    ending = two_processes.train(workplace, [*options(), *words.split()], prepare=prepare)
    assert ending.codes == [2, 2] and sentence in ending.err[0] and ending.err[0].count("\n") == 1, ending
    assert ending.out[1] == ending.err[1] == "" and not (workplace / "runs").exists()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes here but there is 1 GPU: use --nproc-per-node 1, or"):
        World(1, 2, 1).device("cuda")


def test_torchrun_leaves_every_option_to_training():
    """torchrun refuses an option of ours that begins more than one of its own, wherever it stands (--start did)."""
    from torch.distributed.run import get_args_parser

    names = [option for action in _parser(Config())._actions for option in action.option_strings]
    assert "--initial-weights" in names and len(names) > 70
    for name in names:
        words = get_args_parser().parse_args(["--standalone", "-m", "spot_fast.train", name, "value"])
        assert words.training_script_args == [name, "value"], name


@pytest.mark.slow
def test_torchrun_itself(workplace, whole):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "spot_fast.train",
        "--no-tensorboard",
        "--out",
        "run",
    ]
    process = subprocess.Popen(
        [*command, *options(save_every=2)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    state = workplace / "run" / STATE
    end = time.monotonic() + 300
    while not (state.is_file() and int(read_metadata(state)["step"]) >= 2) and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    step = int(read_metadata(state)["step"])
    assert f"stopped at step {step} of {STEPS}" in output, output
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_but_rounding(workplace / "run", whole)
