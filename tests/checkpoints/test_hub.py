"""Protects models on the hub: which names ask it, quick errors without a network, and no code among the downloads."""

import time

import huggingface_hub
import pytest

from spot_fast.checkpoints import hub
from spot_fast.checkpoints.runs import find_folder, load_run
from spot_fast.checkpoints.shared_folder import save_pretrained
from spot_fast.errors import UserError
from tiny_runs import tiny
from untrained_runs import untrained


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_without_a_network_one_sentence_comes_quickly(offline):
    start = time.monotonic()
    with pytest.raises(UserError, match="owner/model is no file or folder here, and the hub does not give it"):
        find_folder("owner/model")
    assert time.monotonic() - start < 5


def test_a_path_never_asks_the_hub(offline, monkeypatch, tmp_path):
    monkeypatch.setattr("spot_fast.checkpoints.runs.hub_folder", lambda *arguments: pytest.fail("asked the hub"))
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", "typo", "a/b/c", str(tmp_path / "nowhere"), "../x/y"):
        with pytest.raises(UserError, match="is not a folder"):
            load_run(find_folder(name))


def test_a_model_of_the_hub_loads_as_any_folder(monkeypatch, tmp_path):
    save_pretrained(untrained(tmp_path / "run", tiny()).model, tmp_path / "snapshot")
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    run = load_run(find_folder("owner/model@v1"))
    assert run.config.num_slots == 3 and (asked["repository"], asked["revision"]) == ("owner/model", "v1")
    assert not asked["local_files_only"]
    assert set(asked["allow_patterns"]) == {"config.json", "*.safetensors", "README.md"}  # no code, no pickles
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="owner/model on the hub has no model.safetensors"):
        find_folder("owner/model")
