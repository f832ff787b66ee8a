"""The examples run, train, and say how the patched model compares with the plain one."""

import importlib
import re

import pytest

from paths import ROOT

EXAMPLES = ROOT / "examples"
# example → its model, its image size, how its slot attention is known
MODELS = {"slate": ("Slate", 64, "SLATE"), "dinosaur_mlp": ("DinosaurMlp", 128, "OCLF (DINOSAUR)")}


@pytest.fixture
def example(request, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module.side_by_side, "CALLS", 3)
    model, size, implementation = MODELS[request.param]

    def run(*options):
        argv = [*options, "--steps", "3", "--batch-size", "2"]
        return module.side_by_side.main(getattr(module, model), size, "", argv)

    return run, implementation


@pytest.mark.parametrize("example", MODELS, indirect=True)
def test_patched_and_plain_train_alike_and_their_times_are_printed(example, capsys):
    run, implementation = example
    assert run() == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^slot_attention +SlotAttention +{re.escape(implementation)} +attention", printed, re.M)
    losses = [(float(a), float(b)) for a, b in re.findall(r"loss plain (\S+), patched (\S+)", printed)]
    assert len(set(losses)) == 3
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in losses)
    speed = r": [\d.]+ ms before, [\d.]+ ms after patching; [\d.]+ times as fast$"
    assert all(re.search(f"^{what}{speed}", printed, re.M) for what in ("training step", "slot_attention alone"))
    loss, gradients = re.search(r"loss of a step (\S+); in float64, gradients of .* (\S+)$", printed, re.M).groups()
    assert float(loss) < 1e-4 and float(gradients) < 1e-12


@pytest.mark.parametrize("example", ["dinosaur_mlp"], indirect=True)
def test_without_patching_one_model_trains(example, capsys):
    run, _ = example
    assert run("--no-patch") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all(re.fullmatch(r"step \d: loss plain \S+", line) for line in printed)


def test_each_example_is_short():
    for name in MODELS:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 150
