"""Recognises unexpected files: a Git LFS pointer, a saved web page, an archive.

For readers that fail: the libraries' own messages about such files ("header too large") help nobody.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

_HEAD = 4096  # bytes that are read
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar")
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body|script|meta)\b", re.IGNORECASE)
_CODE = re.compile(rb"<code>\s*([\w. -]{1,60})\s*</code>", re.IGNORECASE)
# Other formats by their first bytes. Without a remedy of its own it is "pass another file".
_SIGNATURES = (
    (b"BZh", "is compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\0", "is compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a rar archive: unpack it first"),
    (b"\x93NUMPY", "is a NumPy array (.npy)"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras and TensorFlow write them"),
    (b"GGUF", "is a GGUF file of quantised weights"),
    (b"\x89PNG\r\n", "is a PNG image"),
    (b"\xff\xd8\xff", "is a JPEG image"),
    (b"%PDF", "is a PDF document"),
)


def file_problem(path: Path, wanted: str = "weights", *, text: bool = False) -> str | None:
    """A predicate with a remedy for a file `path` that is no complete file of `wanted`; None if unknown.

    The name's suffix does not count. text: `wanted` is text itself.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        example = f", such as {files[0]}" if files else ""
        return f"is a folder: pass the file of {wanted} in it{example}"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if not head:
        return "is empty: download it again"
    if not any(head) and _only_zeros(path):
        return "holds nothing but zero bytes, its download never finished: download it again"
    if head.startswith(b"\x1f\x8b"):
        return _text(_inflated(head), wanted) or "is compressed by gzip: unpack it first"
    if head.startswith(b"PK\x03\x04"):
        return _zip(path, wanted)
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind if ":" in kind else f"{kind}, not {wanted}: pass another file"
    if head[257:262] == b"ustar":
        return f"is a tar archive: unpack it and pass the file of {wanted} in it"
    return _text(head, wanted, any_text=text)


def _only_zeros(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(any(block) for block in iter(lambda: file.read(1 << 20), b""))


def _inflated(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD)
    except zlib.error:
        return b""


def _zip(path: Path, wanted: str) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "ends too early, its download was cut short: download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "is a TorchScript program, which would have to be run: save its tensors alone with "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("data.pkl") for name in names):
        return None  # torch.save's format
    if names and all(name.endswith(".npy") for name in names):
        return f"is an archive of NumPy arrays (.npz, as JAX models have), not {wanted}: use timm's .safetensors of it"
    example = f" ({names[0]}, …)" if names else ""
    return f"is a zip archive{example}: unpack it and pass the file of {wanted} in it"


def _text(head: bytes, wanted: str, *, any_text: bool = False) -> str | None:
    """What a text file is; None for a binary one."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "is a Git LFS pointer, not the file itself: run git lfs pull in its repository, or download the file"
    if head.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "is a git-annex pointer, not the file itself: run git annex get on it"
    if head.startswith(b"<") and _HTML.search(head):
        return f"is a web page, not {wanted}: download it again"
    if head.startswith(b"<"):
        code = _CODE.search(head)
        reason = f" ({code[1].decode()})" if code else ""
        return f"is a web server's answer in XML{reason}, not {wanted}: download it again"
    if b'"weight_map"' in head:
        return "lists the files of weights that were split into several: join them into one file"
    if any_text or not head or any(byte < 32 and byte not in b"\t\r\n\f" for byte in head):
        return None
    line = head.splitlines()[0][:40].decode("utf-8", "replace")
    return f"is text, not {wanted} (it begins with {line!r}): download it again"
