"""spot_fast.train and spot_fast.evaluate in a moment: a Python that runs these stand-ins instead of them.

They read the options that the real ones read and make the files that the rest of the package looks for. Scores are the
seed's: mBO_i of order 0 is (stage + seed / 100) / 10, of all orders 0.05 more, of slots 0.01 less. What goes wrong is
asked for by the environment: STAND_IN_FAILS and STAND_IN_LASTS are parts of the names of folders whose training fails,
or lasts until it is stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

from spot_fast.config import Config, option_names
from spot_fast.training.arguments import parse


def save_facts(path: Path, facts: dict[str, str]) -> None:
    """A safetensors file without tensors; no library is imported for it, which would take most of a stand-in's time."""
    header = json.dumps({"__metadata__": facts}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def asked_for(name: str, folder: Path) -> bool:
    part = os.environ.get(name)
    return part is not None and part in folder.name


def train(words: list[str]) -> None:
    args = parse(words)
    config, folder, about = args.config(), args.out, {}
    if args.teacher is not None:
        theirs = Path(args.teacher)
        teacher = Config.from_json((theirs / "config.json").read_text())
        taken = {name: getattr(teacher, name) for name in option_names("inherited") if name not in args.given}
        config = replace(config, **taken)
        about = {"teacher_sha256": hashlib.sha256((theirs / "model.safetensors").read_bytes()).hexdigest()}
    if config.init_from is not None:
        origin = Path(config.init_from) / "model.safetensors"
        about = {"init_from_sha256": hashlib.sha256(origin.read_bytes()).hexdigest()}
    config = replace(config, precision="float32", loader="torch")  # a run keeps what auto became
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    about |= {"step": "4", "seconds": "60.0", "images": "32", "torch": "2", "device": "cpu", "threads": "1"}
    state, model = folder / "training_state.safetensors", folder / "model.safetensors"
    if asked_for("STAND_IN_LASTS", folder):
        signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped at step 1"))
        save_facts(state, about | {"step": "1"})
        time.sleep(60)
    if asked_for("STAND_IN_FAILS", folder):
        sys.exit("error: the loss is not finite")
    save_facts(state, about)
    save_facts(model, about | {"config": config.to_json()})


def evaluate(words: list[str]) -> None:
    def after(option: str) -> str:
        return words[words.index(option) + 1]

    config = Config.from_json((Path(words[0]) / "config.json").read_text())
    best = (config.stage + config.seed / 100) / 10

    def row(masks: str, value: float, orders=None, columns=None, num_masks=6) -> dict:
        scores = {"mbo_i": value, "mbo_c": None, "miou": value, "fg_ari": value, "ari": None, "p_ari": None, "pq": None}
        sizes = [{"above": 0.0, "to": 1.0, "mbo_i": value, "instances": 3}] * 8
        return {
            "masks": masks, "orders": orders, "columns": columns, "num_masks": num_masks, **scores, "sizes": sizes
        }  # fmt: skip

    rows = [row("decoder", best, 1)]
    rows += [row("decoder", best + 0.05, 9)] if config.orders == "spot9" else []
    rows += [row("slots", best - 0.01), row("blocks", 0.3, columns=2), row("kmeans", 0.4)]
    rows += [row("layout", 0.1, columns=1, num_masks=1)]
    names = after("--protocol").split(",")
    tables = [{"protocol": name, "rows": rows} for name in names]
    result = {"protocols": dict.fromkeys(names, {}), "settings": {"limit": 0}}
    result["runs"] = [{"images": 3, "rows": rows, "tables": tables}]
    Path(after("--json")).write_text(json.dumps(result))


def python(path: Path) -> Path:
    """Writes a program whose `-m spot_fast.train` is the stand-in, in place of sys.executable; returns its path."""
    path.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{__file__}" "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    {"spot_fast.train": train, "spot_fast.evaluate": evaluate}[sys.argv[1]](sys.argv[2:])
