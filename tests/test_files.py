"""Files appear whole or not at all, on any file system; what a disk refuses is an error."""

import errno
import os
import stat

import pytest
import torch

from spot_fast.checkpoints.runs import read_tensors, save_tensors
from spot_fast.errors import UserError
from spot_fast.files import atomic_write


def write(path, content=b"new"):
    atomic_write(path, lambda partial: partial.write_bytes(content))


def refuse(monkeypatch, number, *, folders):
    """os.fsync fails with error `number`, for folders alone or for everything."""
    fsync = os.fsync

    def refused(descriptor):
        if not folders or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EPERM", "EACCES"])
def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch, name, folders):
    refuse(monkeypatch, getattr(errno, name), folders=folders)
    write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path, monkeypatch):
    """Write and search permission are enough to put a file there."""
    real = os.open

    def refused(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_fails_is_an_error_and_the_old_file_stays(tmp_path, monkeypatch, name):
    write(tmp_path / "a", b"old")
    refuse(monkeypatch, getattr(errno, name), folders=False)
    with pytest.raises(UserError, match="a cannot be written .*free some space"):
        write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_file_system_without_permissions_takes_tensors(tmp_path, monkeypatch):
    """vfat and some CIFS mounts refuse chmod."""

    def refused(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    assert read_tensors(tmp_path / "a.safetensors")[0]["x"].tolist() == [1, 1]
