"""Every error sentence in the source, by what one was doing, which docs/troubleshooting.md lists.

A sentence is the text of a UserError, CorruptImage or ValueError, with … for the values. What to do is what follows its
last colon; sentences that end without need an entry in `REMEDIES`, which the test asks for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ERRORS = ("UserError", "CorruptImage", "ValueError")

# Title → files, the first that fits counts.
_DOING = {
    "Starting a run": ("arguments", "config", "recipes", "presets", "train", "schedule", "precision", "step", "orders"),
    "While it trains": ("trainer", "nonfinite", "optimiser", "files", "run_folder"),
    "Several processes or GPUs": ("distributed",),
    "Stage 2, resuming and runs on disk": ("teacher", "checkpoint", "self_training"),
    "Opening a data set": (
        "data/__init__",
        "data/__main__",
        "data/check",
        "data/coco",
        "data/voc",
        "data/movi*",
        "data/tfrecord",
        "data/folder",
        "data/instances",
        "data/base",
        "data/transforms",
        "data/scenes",
        "data/labels",
        "data/regions",
        "data/fit",
        "data/names",
        "data/listing",
    ),
    "Loading and caching pictures": ("data/*",),
    "Encoder, slots and decoder": ("encoder*", "tensor_checks", "model", "decoders"),
    "Evaluating": ("evaluat*", "metrics", "protocols", "baselines", "size_plot"),
    "Segmenting": ("segment", "pictures"),
    "The authors' checkpoints": ("official",),
    "The packaged encoder": ("pretrain",),
    "Other commands": ("*",),
}
_KERNELS = "Calling spot_kernels"

# What to do, by the beginning of sentences that do not say so after a colon.
REMEDIES: dict[str, str] = {
    "--encoder-weights: …": "as it says of the file; it has to hold the ViT's weights",
    "--encoder-weights … …": "it says what the file has instead: pass a .safetensors or .pth file of the ViT",
    "the weights of … lack": "the --encoder that it names, or the weights of the --encoder given",
    "the weights of … have … tensors that": "the --encoder that it names, or the weights of the --encoder given",
    "…: tensor … …": "as it says: save it in plain numbers",
    "checkpoint … …": "as it says of the file: a Git LFS pointer, a web page, an archive, half a download",
    "checkpoint … was not loaded: it calls": "get it from its authors again, or save its tensors alone as it says",
    "checkpoint … was not loaded: what": "save its tensors alone as it says",
    "… needs …: pip install": "install it with the command that it gives",
    "slot attention of this checkpoint: …": "as it says; `--from` chooses another kind of checkpoint",
    "--preset … is unknown: …": "one of the names that it lists; `python -m spot_fast.presets` explains them",
    "the loss or its gradient was not finite": "lower --lr, or --precision float32",
    "--out … is not an empty folder: …": "another folder, or --resume as it says",
    "… is not finite after step …: …": "as it says; the saved state before it is intact",
    "…; go on with python -m spot_fast.train --resume": "the error is told first; when it is gone, the command given",
    "… does not fit its …: …": "the run's files are of two versions or were changed: restore them, or train again",
    "stage 2 needs a teacher, but …": "train stage 1 first, with the command it gives, or name a run with --teacher",
    "--preset … needs --data PATH, …": "add --data with the folder that it describes",
    "--data … is not a folder: …": "the folder that it describes; check the spelling and that the disk is mounted",
    "image … does not exist": "restore the file, or take it out of the list or annotations that name it",
    "image … cannot be read: …": "the file is damaged: download or export it again",
    "image … cannot be converted to RGB": "save it as an ordinary RGB picture",
    "… lists no images": "the file is empty or of another kind: download it again",
    "… names no images": "write one name a line into it",
    "… has no images (.jpg": "name a folder with pictures, at any depth",
    "it has no pixels": "the file is damaged: download or export it again",
    "… is neither a folder, nor an image": "name one of the three",
    "…: annotation … of image … cannot be decoded": "the file is damaged: download or export it again",
    "it has no segmentation": "export the annotations with polygons or masks, not with boxes alone",
    "a polygon's outline is longer": "export the annotation file again, with coordinates in pixels",
    "the size of the run lengths is": "the annotation's size differs from the image entry's: export the file again",
    "the run lengths add up to": "the mask is cut off: export the annotation file again",
    "a run length is": "the mask is damaged: export the annotation file again",
    "… has colours (…)": "save it as a palette or grey PNG whose values are the labels",
    "… is missing…": "put the file where it says, or name the right folder with --data",
    "… is missing: …": "as it says: the list of pictures, or --sbd",
    "… cannot be read: …": "the reason is at its end: permissions, or a damaged file",
    "file_name …": "export the annotation file again",
    "… is … x …, the frame's other masks": "the clip's masks have several sizes: convert it again",
    "… is not named *_mask_NN.png": "rename it, or move it out of the clip's folder",
    "clip … (…) has …": "the clip's record is incomplete: download its shard again",
    "--loader dali: …": "install DALI (pip install -e '.[dali]'), or --loader torch",
    "… of … images of … are corrupt or missing": "python -m spot_fast.data check PATH lists them: restore or remove",
    "cappa=… decodes in the standard order only": "--orders standard, or --cappa 0",
    "--encoder … is not a model timm knows: …": "one of the names it proposes",
    "this model cannot be built: …": "the reason is at its end; widths have to be multiples of heads",
    "none of the … pictures of … can be read": "the first reason is given; see Opening a data set",
    "a contact sheet needs": "give it a row",
}
# The same where what follows the colon is a reason.
INSTEAD: dict[str, str] = {
    "--remove …: …": "a name from python -m spot_fast.data caches",
    "--list …: the folder": "a file in a folder that exists",
    "config has unknown keys": "use the version that wrote it, or train again",
    "method … is unknown: it was": "use the version that wrote it, or train again",
    "--lr is 0": "use more: nothing would be learned",
    "--slot-heads …: the student": "drop it: a student has one head",
    "… cannot be resumed: …": "drop the option that it names, or drop --resume for a new run",
    "the loss or its gradient is not finite at": "lower --lr, --precision float32, or --on-bad-step skip",
    "the loss leapt at": "look at the pictures that it names; lower --lr, a higher --spike, or --on-bad-step skip",
    "… has no …: it is not the folder": "give the folder of a run, such as runs/scenes-stage1-001",
    "… cannot be read: it is not text": "name a text file, with one name a line",
    "… does not exist: name": "check the spelling; name an image or a folder of images",
    "… is not a COCO instances file: ": "the file is of another kind or damaged: name one with images and annotations",
    "the position table of shape": "pass weights of this --encoder",
    "the weights lack …: they belong": "restore the run's config.json, or use the run that they belong to",
    "the weights have …, which": "restore the run's config.json, or use the run that they belong to",
    "the weights have … of shape … but this model": "restore the run's config.json, or use the run that they belong to",
}
_KERNELS_REMEDY = "pass an argument that is so"


@cache
def sentences() -> dict[str, list[tuple[str, str]]]:
    """What one was doing → (sentence, what to do), each once, in the order of files and lines."""
    found: dict[str, dict[str, str]] = {title: {} for title in [*_DOING, _KERNELS]}
    for file in sorted((ROOT / "spot_fast").rglob("*.py")):
        name = file.relative_to(ROOT / "spot_fast").with_suffix("").as_posix()
        title = next(title for title, patterns in _DOING.items() if any(fnmatch(name, pattern) for pattern in patterns))
        found[title] |= dict.fromkeys(_raised(file))
    for file in sorted((ROOT / "kernels" / "spot_kernels").rglob("*.py")):
        found[_KERNELS] |= dict.fromkeys(_raised(file))
    rows = {title: [_split(text) for text in texts] for title, texts in found.items() if texts}
    rows[_KERNELS] = [(cause, remedy or _KERNELS_REMEDY) for cause, remedy in rows[_KERNELS]]
    return rows


def _raised(file: Path) -> Iterator[str]:
    """The sentences of a file's errors; those that are passed on from elsewhere have no words of their own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    inside = {id(node): function for function in functions.values() for node in ast.walk(function)}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS and node.args
    ]
    for call in sorted(calls, key=lambda node: node.lineno):
        for text in _texts(call.args[0], inside.get(id(call)), functions):
            if any(letter.isalpha() for letter in text):
                yield " ".join(text.split())


def _texts(node: ast.expr, function: ast.FunctionDef | None, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What an expression may say: of a name what its function gives it, of a call what that function returns."""
    if isinstance(node, ast.Name) and function is not None:
        given = [
            one.value
            for one in ast.walk(function)
            if isinstance(one, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == node.id for target in one.targets)
        ]
        return [text for value in given for text in _texts(value, None, functions)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        returned = [one.value for one in ast.walk(functions[node.func.id]) if isinstance(one, ast.Return) and one.value]
        return [text for value in returned for text in _texts(value, None, functions)]
    return [_text(node)]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _split(sentence: str) -> tuple[str, str]:
    """Cause and remedy; the remedy is empty where nothing says what to do."""
    for beginning, remedy in INSTEAD.items():
        if sentence.startswith(beginning):
            return sentence, remedy
    cause, colon, remedy = sentence.rpartition(": ")
    said = cause.strip("… ")
    # What stands before the colon may be no more than the operator's name.
    if colon and (" " in said or "=" in said or said == "is" or said.startswith("--")) and remedy.strip("… "):
        return cause, remedy
    # The longest beginning: one may be that of another.
    fitting = [beginning for beginning in REMEDIES if sentence.startswith(beginning)]
    return sentence, REMEDIES[max(fitting, key=len)] if fitting else ""


def listing() -> str:
    """Markdown: a table for each thing that one may have been doing."""
    lines = []
    for title, rows in sentences().items():
        lines += [f"### {title}", "", "| it says | what to do |", "|---|---|"]
        lines += [f"| {_cell(cause)} | {_cell(remedy)} |" for cause, remedy in rows]
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
