"""Protects messages about files of the wrong kind: each is recognised by its contents and gets a remedy."""

import gzip
import io
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from spot_fast.checkpoints.file_kinds import file_problem

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343279349\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def archive(names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 50)
    return data.getvalue()


def tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pth"))
    return data.getvalue()


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (POINTER, "is a Git LFS pointer, not the file itself: run git lfs pull"),
        (b"../.git/annex/objects/aa/bb/MD5", "is a git-annex pointer"),
        (PAGE, "is a web page, not weights: download it again"),
        (b"\xef\xbb\xbf \n<html lang=en>", "is a web page"),
        ("<!DOCTYPE html><html></html>".encode("utf-16"), "is a web page"),
        (gzip.compress(PAGE, mtime=0), "is a web page"),
        (gzip.compress(b"\0\1\2" * 99, mtime=0), "is compressed by gzip"),
        (
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            r"web server's answer in XML \(AccessDenied\)",
        ),
        (b'{"message": "Not Found"}', "is text, not weights .it begins with '{"),
        (b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "split into several"),
        (b"404: Not Found", "is text"),
        (bytes(9000), "nothing but zero bytes"),
        (tar(), "is a tar archive: unpack it"),
        (archive(["w.pth"]), r"is a zip archive \(w.pth, …\): unpack it"),
        (archive(["w/constants.pkl", "w/data.pkl"]), "TorchScript program"),
        (archive(["a.npy", "b.npy"]), "NumPy arrays"),
        (archive(["w/data.pkl"] * 1)[:60], "its download was cut short"),
        (b"\x89HDF\r\n\x1a\n123", "HDF5 file.* not weights"),
    ],
    # not the data, which has times in it: processes that collect tests have to agree on their names
    ids=lambda value: value if isinstance(value, str) else "data",
)
def test_a_wrong_file_is_named_with_the_remedy(tmp_path, data, words):
    (tmp_path / "w.safetensors").write_bytes(data)
    problem = file_problem(tmp_path / "w.safetensors")
    assert problem and re.search(words, problem), problem


def test_expected_and_unknown_files_are_no_problem(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "zip.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("zip.pth", "old.pth", "noise", "missing"):
        assert file_problem(tmp_path / name) is None


def test_a_folder_names_a_file_in_it(tmp_path):
    assert file_problem(tmp_path) == "is a folder: pass the file of weights in it"
    (tmp_path / "model.safetensors").touch()
    assert file_problem(tmp_path).endswith("model.safetensors")
    assert file_problem(tmp_path / "model.safetensors", "a checkpoint") == "is empty: download it again"
