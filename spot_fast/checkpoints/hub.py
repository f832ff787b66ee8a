"""The Hugging Face hub: whether it answers, and models downloaded from it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from spot_fast.errors import UserError
from spot_fast.system.optional import required

_HUB_SECONDS = 3.0
_FILES = ("config.json", "*.safetensors", "README.md")  # a saved model has no others: no code, no pickles


def hub_answers() -> bool:
    """Whether the hub can be reached, after a few seconds at most."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT"):
        return True  # by a proxy or mirror: the download will show
    answered = []

    def connect() -> None:
        try:
            socket.create_connection(("huggingface.co", 443), timeout=_HUB_SECONDS).close()
            answered.append(True)
        except OSError:
            pass

    # In a thread, because resolving a name without a network ignores the socket's timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return bool(answered)


def hub_folder(name: str, needed: Sequence[str]) -> Path:
    """The local folder of the hub's model `owner/name` or `owner/name@revision`, downloaded or cached.

    UserError if neither gives a folder with the `needed` files.
    """
    hub = required("huggingface_hub", f"{name} on the hub", "huggingface_hub")
    repository, _, revision = name.partition("@")
    answers = hub_answers()
    try:
        folder = Path(
            hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(_FILES), local_files_only=not answers
            )
        )
    except Exception as error:  # its client raises its own exceptions and those of several libraries below it
        reason = str(error).strip().splitlines()[0][:120] if answers and str(error).strip() else "it does not answer"
        raise UserError(
            f"{name} is no file or folder here, and the hub does not give it ({reason}): check the name, "
            "or pass the path of a run"
        ) from None
    if missing := [file for file in needed if not (folder / file).is_file()]:
        raise UserError(f"{name} on the hub has no {missing[0]}: it is not a model that spot_fast has saved")
    return folder
