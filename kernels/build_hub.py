"""Writes spot_kernels as Hugging Face's package `kernels` loads it: from a folder, or uploaded from the hub.

python kernels/build_hub.py OUT
python kernels/build_hub.py OUT --repo ORG/NAME --source https://…   # names for the card and the metadata

OUT/build/torch-BACKEND is the package without the native library, once for each backend. `kernels` imports it under an
identifier of its own and may load several versions into one process, beside an installed spot_kernels. Therefore all
imports become relative, and operators are registered under that identifier, which a hash of the sources makes unique.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "spot_kernels"
# Those that have kernels; on a CPU PyTorch runs.
BACKENDS = ("cpu", "cuda", "rocm")

_PAPER = "https://arxiv.org/abs/2312.00648"
_CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
- triton
- slot-attention
- object-centric-learning
---

# {title}

{about}

These are its Triton kernels, version {version}, forward and backward, for CUDA and ROCm. On a CPU, and outside a
kernel's limits, PyTorch computes the same. Python 3.11, PyTorch 2.11 and `kernels` 0.14 or newer.

```python
import torch
from kernels import get_kernel

spot_kernels = get_kernel("{repo}", version={major}, trust_remote_code=["{repo}"])
attention = spot_kernels.SlotAttention(256, 256, mlp_hidden=1024)
slots, attn, logits = attention(torch.randn(2, 196, 256), torch.randn(2, 7, 256))
```

`spot_kernels.patch(model)` runs the slot attention of a published model on them, in place. `help()` of each name says
its shapes and limits: {names}. `linear_assignment` on a CPU needs scipy.

License: Apache 2.0. {link}
"""


def sources() -> dict[str, str]:
    """Path in the package → text, for all that is imported; `python -m` does not reach a kernel of the hub."""
    root = HERE / PACKAGE
    paths = sorted(path for path in root.rglob("*.py") if path.name != "__main__.py")
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def renamed(name: str, text: str, identifier: str) -> str:
    """The module `name` of the package for a package called `identifier`: relative imports, operators of its own.

    Raises:
        ValueError: for `import spot_kernels…`, which has no relative form.
    """
    to_root = "." * (name.count("/") + 1)
    lines = text.encode().splitlines(keepends=True)  # ast counts columns in bytes
    edits: list[tuple[int, int, int, str]] = []  # line, first and last column, the new text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{name}:{node.lineno}: import {PACKAGE} has no relative form: use from {PACKAGE}")
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            first = node.col_offset + len("from ")
            module = to_root + node.module.removeprefix(PACKAGE).removeprefix(".")
            edits.append((node.lineno, first, first + len(node.module), module))
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{PACKAGE}::"):
            first = node.col_offset + 1  # after the quotation mark
            edits.append((node.lineno, first, first + len(PACKAGE), identifier))
        elif isinstance(node, ast.Attribute) and node.attr == PACKAGE and ast.unparse(node.value) == "torch.ops":
            edits.append((node.end_lineno, node.end_col_offset - len(PACKAGE), node.end_col_offset, identifier))
    for line, first, last, new in sorted(edits, reverse=True):
        old = lines[line - 1]
        lines[line - 1] = old[:first] + new.encode() + old[last:]
    return b"".join(lines).decode()


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def write_variant(folder: Path, backend: str, upstream: str) -> None:
    """folder: the variant's, new. Its metadata.json has the identifier and the hashes of all other files."""
    texts = sources()
    content = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    identifier = f"_{PACKAGE}_{backend}_{content[:10]}"
    hashes = {}
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = renamed(name, text, identifier).encode()
        file.write_bytes(data)
        hashes[name] = base64.b64encode(hashlib.sha256(data).digest()).decode()
    metadata = {
        "name": PACKAGE.replace("_", "-"),
        "id": identifier,
        "version": major(),
        "license": "Apache-2.0",
        **({"upstream": upstream} if upstream else {}),
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _assigned(name: str) -> object:
    """The literal that `spot_kernels/__init__.py` gives a name, read without importing torch."""
    for node in ast.parse(sources()["__init__.py"]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def major() -> int:
    """The hub's version: 0 as long as the interface may change, then it is the branch that has this interface."""
    return int(_assigned("__version__").split(".")[0])


def card(repo: str, upstream: str) -> str:
    """The repository's README.md; the introduction is that of kernels/README.md."""
    title, about = (HERE / "README.md").read_text(encoding="utf-8").split("\n\n")[:2]
    return _CARD.format(
        title=title.removeprefix("# "),
        about=about,
        version=_assigned("__version__"),
        major=major(),
        repo=repo,
        names=", ".join(f"`{name}`" for name in _assigned("__all__")),
        link=f"Sources, tests and measurements: {upstream}" if upstream else f"Made for SPOT, {_PAPER}.",
    )


def write(out: Path, repo: str, upstream: str) -> None:
    """All of the repository into `out`, which appears when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
        folder = Path(unfinished) / "repository"
        for backend in BACKENDS:
            write_variant(folder / "build" / f"torch-{backend}", backend, upstream)
        (folder / "README.md").write_text(card(repo, upstream), encoding="utf-8")
        (folder / "LICENSE").write_bytes((HERE / "LICENSE").read_bytes())
        folder.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--repo", default="ORG/spot-kernels", metavar="ORG/NAME", help="where it will be uploaded")
    parser.add_argument("--source", default="", metavar="URL", help="the git repository with the sources")
    args = parser.parse_args(arguments)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"OUT is {args.out}, which exists and is no empty folder: name a new one")
    if args.repo.count("/") != 1:
        parser.error(f"--repo is {args.repo!r}: name it as on the hub, ORG/NAME")
    if args.source and not args.source.startswith("https://"):  # `kernels` would not load what is no git address
        parser.error(f"--source is {args.source!r}: pass an address that begins with https://")
    write(args.out, args.repo, args.source)
    variants = sorted((args.out / "build").iterdir())
    size = sum(file.stat().st_size for file in variants[0].rglob("*.py"))
    print(f"{args.out}: version {major()}, {', '.join(path.name for path in variants)} of {size / 1e6:.1f} MB each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
