"""Protects against code in checkpoints, which are pickles: harmless objects are read, calls are refused by name."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import os
import pathlib
import pickle
import random
import subprocess
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import golden_tensors
from golden_tensors import ROOT
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.errors import UserError

FILE = ROOT / "checkpoints" / "stage1_checkpoint_numpy1.pt.tar"


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


class Method(enum.Enum):
    SPOT = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Easy(dict):
    """As configuration libraries have them."""


class Calls:
    """Its pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


BESIDE = {
    "args": argparse.Namespace(out=pathlib.Path("a/b"), nested=argparse.Namespace(lr=1)),
    "config": [Settings(), Easy(lr=0.1), types.SimpleNamespace(lr=1), functools.partial(max, 1), Method.SPOT],
    "when": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), decimal.Decimal(1)],
    "sums": [collections.defaultdict(list, a=[1]), collections.deque([1]), collections.Counter("aa"), frozenset("a")],
    "random": [np.random.get_state(), random.getstate(), torch.get_rng_state(), np.arange(3), np.float32(1), range(2)],
    "named": [int, os.path.join, torch.optim.lr_scheduler.LambdaLR],
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
}


@pytest.mark.parametrize("zipped", [True, False])
def test_files_with_other_objects_beside_their_tensors_are_read(tmp_path, zipped):
    """None of these objects is created: stand-ins take the place of every class."""
    for name, stored in BESIDE.items():
        torch.save(
            {"model": {"w": torch.ones(2)}, name: stored}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped
        )
        contents = read_checkpoint(tmp_path / "w.pth")
        assert torch.equal(contents["model"]["w"], torch.ones(2)), name
        for value in contents[name] if isinstance(stored, list) else [contents[name]]:
            assert not isinstance(value, argparse.Namespace | Settings | Method | datetime.date), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function, name",
    [
        (os.mkdir, r"(posix|nt)\.mkdir"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (open, r"\w+\.open"),
        (subprocess.getoutput, r"\w+\.getoutput"),
        (torch.hub.load, "torch.hub.load"),
        (np.load, r"numpy[\w.]*\.load"),
    ],
)
def test_a_checkpoint_cannot_run_code(tmp_path, zipped, function, name):
    file, trace = tmp_path / "evil.pt.tar", tmp_path / "executed"
    command = {eval: f"open({str(trace)!r}, 'w')", subprocess.getoutput: f"touch {trace}"}.get(function, str(trace))
    contents = {"model": {"w": torch.ones(2)}, "epoch": Calls(function, command, "w")}
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"was not loaded: it calls {name}, .*get it from its authors again"):
        read_checkpoint(file)
    assert not trace.exists()


def test_code_does_not_run_when_hidden_in_a_stand_in(tmp_path):
    """In the arguments of what may be called, and in a class that is named instead of called."""
    file, trace = tmp_path / "evil.pth", tmp_path / "executed"
    evil = Calls(eval, f"open({str(trace)!r}, 'w')")
    for value in (pathlib.Path("x"), Settings()):
        hidden = [argparse.Namespace(value=value, evil=evil), functools.partial(max, evil)]
        torch.save({"w": torch.ones(2), "args": hidden}, file)
        with pytest.raises(UserError, match="it calls builtins.eval"):
            read_checkpoint(file)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_errors_about_whole_model_objects_say_how_to_save_their_tensors(tmp_path, zipped):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"whole model object, not a state dict: save its tensors alone .*state_dict"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"w": torch.ones(2), "args": Method}, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(UserError, match="pickled by another protocol than 2"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_safetensors_file_is_read_whatever_its_name(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.pth")
    assert torch.equal(read_checkpoint(tmp_path / "w.pth")["w"], torch.ones(2))
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-2])
    with pytest.raises(UserError, match="cannot be read .*download it again"):
        read_checkpoint(tmp_path / "w.pth")


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
    (tmp_path / "noise.pt.tar").write_bytes(bytes(range(256)) * 9)
    for name, words in (
        ("half", ".*its download was cut short: download it"),
        ("empty", "is empty: download it"),
        ("text", "is text, not weights"),
        ("noise", "cannot be read .*no checkpoint"),
    ):
        with pytest.raises(UserError, match=rf"checkpoint .*{name}.pt.tar {words}"):
            read_checkpoint(tmp_path / f"{name}.pt.tar")
    with pytest.raises(UserError, match="is a folder: pass the file of weights in it, such as .*pt.tar"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt.tar")
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        read_checkpoint(tmp_path / "list.pt.tar")
