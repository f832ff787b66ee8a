"""A cache's key follows what files hold, whatever their names, sizes and times say."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from spot_fast.data.base import ImageFiles
from spot_fast.data.listing import identity


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(identity, "_GRANULE", 0)


def make(folder, contents, when=315532800):
    """Files of those contents, all with the same times, as archives have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.bmp").write_bytes(content)
        os.utime(folder / f"{number:03d}.bmp", (when, when))
    return sorted(folder.iterdir())


def key(paths):
    return identity.Files(paths).key


def frozen(monkeypatch, **values):
    """A file system that gives every file the same values, such as ctime and inode of an image made reproducibly."""

    def stat(path):
        names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev")
        about = os.stat(path)
        return SimpleNamespace(**{name: getattr(about, name) for name in names} | values)

    monkeypatch.setattr(identity, "os", SimpleNamespace(stat=stat, fstat=os.fstat, makedev=os.makedev))


def test_the_same_files_have_the_same_key(tmp_path):
    paths = make(tmp_path / "images", [b"a" * 9, b"b" * 9])
    assert key(paths) == key(list(paths)) and key(paths) != key(paths[::-1]) != key(paths[:1])


@pytest.mark.parametrize("where", ["first", "last", "middle of a large file"])
def test_contents_tell_where_no_time_and_no_inode_does(tmp_path, monkeypatch, where):
    """Two squashfs images made reproducibly, FAT, some FUSE."""
    size = 3_000_000 if where == "middle of a large file" else 50
    one = [bytes(size), bytes(size), bytes(size)]
    other = list(one)
    other[2 if where == "last" else 0] = bytes(size // 2) + b"x" * (size // 8) + bytes(size - size // 2 - size // 8)
    a, b = make(tmp_path / "a" / "images", one), make(tmp_path / "b" / "images", other)
    frozen(monkeypatch, st_ctime_ns=0, st_ino=7)
    assert key(a) != key(b)
    shutil.rmtree(tmp_path / "b")
    assert key(a) == key(make(tmp_path / "b" / "images", one))  # nothing else is in it


@pytest.mark.parametrize("how", ["in place", "another file", "two swapped by links", "two swapped by folders"])
def test_one_file_among_thousands_with_its_times_restored(tmp_path, monkeypatch, how):
    """Not among those that are read: the time of change or the inode tells."""
    monkeypatch.setattr(identity, "SAMPLE", 2)
    paths = make(tmp_path / "images", [bytes([65 + i]) * 9 for i in range(8)])
    if "folders" in how:
        for path in paths:
            (path.parent / path.stem).mkdir()
            path.rename(path.parent / path.stem / "frame.bmp")
        paths = sorted((tmp_path / "images").glob("*/frame.bmp"))
    if "links" in how:
        (tmp_path / "links").mkdir()
        for path in paths:
            (tmp_path / "links" / path.name).symlink_to(path)
        paths = sorted((tmp_path / "links").iterdir())
    before, target = identity.Files(paths), paths[3]
    assert before.changed(range(8)) == []
    if how == "in place":
        with open(target, "r+b") as file:
            file.write(b"x" * 9)
    elif how == "another file":
        target.with_suffix(".new").write_bytes(b"x" * 9)
        os.replace(target.with_suffix(".new"), target)
    else:
        one, other = (path if "links" in how else path.parent for path in (paths[3], paths[4]))
        one.rename(tmp_path / "aside"), other.rename(one), (tmp_path / "aside").rename(other)
    os.utime(target, (315532800, 315532800))
    if "swapped" in how:
        frozen(monkeypatch, st_ctime_ns=0)
    assert key(paths) != before.key
    assert "swapped" in how or before.changed(range(8)) == [3]


def test_a_copy_is_another_set_and_permissions_change_the_key(tmp_path):
    """The safe side: what cannot be told from a change counts as one."""
    paths = make(tmp_path / "images", [b"a" * 9, b"b" * 9])
    before = key(paths)
    shutil.copytree(tmp_path / "images", tmp_path / "copy" / "images")
    assert key(sorted((tmp_path / "copy" / "images").iterdir())) != before
    paths[0].chmod(0o600)
    assert key(paths) != before


def test_a_moved_folder_is_the_same_set(tmp_path):
    before = key(make(tmp_path / "old" / "images", [b"a" * 9, b"b" * 9]))
    (tmp_path / "old").rename(tmp_path / "new")
    assert key(sorted((tmp_path / "new" / "images").iterdir())) == before


def test_missing_and_impossible_names_are_states(tmp_path):
    paths = make(tmp_path / "images", [b"a"]) + [tmp_path / name for name in ("b.bmp", "c\0.bmp", "\ud800.bmp")]
    paths.append(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bmp")))
    before = identity.Files(paths)
    assert before.key == key(paths)
    (tmp_path / "b.bmp").write_bytes(b"b")
    assert key(paths) != before.key and before.changed(range(5)) == [1]
    paths[4].write_bytes(b"b")
    assert before.changed(range(5)) == [1, 4]


def test_inodes_count_where_they_last(tmp_path, monkeypatch):
    """exFAT, CIFS and FUSE may number a file anew while it is mounted: no reason to build a cache again."""
    (path,) = make(tmp_path / "images", [b"a" * 9])
    device = os.stat(path).st_dev
    mounts, keys = tmp_path / "mountinfo", {}
    monkeypatch.setattr(identity, "_MOUNTS", str(mounts))
    for kind in ("ext4", "exfat", "fuse.sshfs"):
        mounts.write_text(f"22 1 {os.major(device)}:{os.minor(device)} / / rw,noatime shared:1 - {kind} /dev/sda rw\n")
        for inode in (1, 2):
            with monkeypatch.context() as patch:
                frozen(patch, st_ino=inode)
                keys[kind, inode] = key([path])
    assert keys["ext4", 1] != keys["ext4", 2]
    assert keys["exfat", 1] == keys["exfat", 2] == keys["fuse.sshfs", 1]


def test_files_just_written_are_waited_for_where_they_are_not_read(tmp_path, monkeypatch):
    """A second change at the same tick of the clock would leave no trace."""
    slept = []
    monkeypatch.setattr(identity, "_GRANULE", 2 * 10**9)
    monkeypatch.setattr(time, "sleep", slept.append)
    paths = make(tmp_path / "images", [b"a"] * 4)
    key(paths)
    assert not slept
    monkeypatch.setattr(identity, "SAMPLE", 2)
    key(paths)
    assert 1 < slept.pop() <= 2
    os.utime(paths[0], (2**32, 2**32))  # a time to come says nothing
    key(paths)
    assert 1 < slept.pop() <= 2


def test_unreadable_contents_count_as_one_state(tmp_path, monkeypatch):
    paths = make(tmp_path / "images", [b"a" * 9, b"b" * 9])
    before = key(paths)

    def fails(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(identity, "open", fails, raising=False)
    assert key(paths) == key(paths) != before


def test_the_key_of_another_process_can_be_taken(tmp_path):
    """Of several processes, on other machines with copies of their own, one decides."""
    image_set = ImageFiles(make(tmp_path / "images", [b"a"]), image_size=16, mask_size=16)
    image_set.take_key("abc")
    assert image_set.content_key() == "abc" and image_set.changed([0]) == []
