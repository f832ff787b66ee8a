"""Checkpoints are pickles: what may be in one, what is refused by name, and that nothing in it runs."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import golden_tensors
from golden_tensors import ROOT
from spot_fast.errors import UserError
from spot_fast.official import official_weights
from spot_fast.safe_pickle import read_checkpoint

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
