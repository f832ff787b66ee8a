"""segment --onnx writes what segment writes of the run itself, without the run, and refuses what a file cannot give."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from small_models import small_config
from spot_fast import export, segment
from spot_fast.segmentation import record
from untrained_runs import untrained

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run: an untrained run whose slots are joined; out/model.onnx: its slot masks; photos of three shapes."""
    folder = tmp_path_factory.mktemp("onnx")
    untrained(folder / "run", small_config(adaptive_slots=True))
    assert export.main([str(folder / "run"), str(folder / "out"), "--formats", "onnx"]) == 0
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    for width, height in ((90, 50), (31, 200), (64, 64)):
        pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{width}.png")
    return folder


def test_label_maps_masks_and_slots_are_those_of_the_run(folder, tmp_path, monkeypatch):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.onnx").symlink_to(folder / "out" / "model.onnx")
    monkeypatch.chdir(tmp_path / "alone")  # nowhere near the run
    same = [str(folder / "photos"), "--soft", "--slots", "--no-overlay", "--threads", "1"]
    assert segment.main([*same, "--onnx", "model.onnx", "--out", str(tmp_path / "onnx")]) == 0
    run = ["--run", str(folder / "run"), "--masks", "slots", "--precision", "float32"]
    assert segment.main([*same, *run, "--out", str(tmp_path / "torch")]) == 0
    names, others = ({p.name for p in (tmp_path / by).iterdir()} - {record.NAME} for by in ("onnx", "torch"))
    assert names == others and len(names) == 9
    for name in names:
        one, other = tmp_path / "onnx" / name, tmp_path / "torch" / name
        if name.endswith(".png"):
            assert (np.asarray(Image.open(one)) == np.asarray(Image.open(other))).mean() >= 0.999
        else:
            assert_close(load_file(one), load_file(other), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--run", "run"], "--run run is another model"),
        (["--encoder", "vit"], "--encoder vit is another model"),
        (["--fit", "interpolate"], "--fit interpolate needs other grids of patches"),
        (["--size", "64"], "--size 64 needs other grids"),
        (["--precision", "bf16"], "--precision bf16 is not the file's"),
        (["--device", "cuda"], "--device cuda is not the CPU"),
        (["--masks", "decoder"], "has slot masks only, export it with --decoder"),
        (["--orders", "all"], "export it with --decoder --orders all"),
        (["--no-adaptive-slots"], "export it with --no-adaptive-slots"),
    ],
)
def test_what_the_file_cannot_give_is_refused(folder, tmp_path, capsys, options, sentence):
    file = str(folder / "out" / "model.onnx")
    assert segment.main(["--scenes", "1", "--out", str(tmp_path), "--onnx", file, *options]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_files_of_others_are_refused(folder, tmp_path, capsys):
    text, foreign = tmp_path / "text.onnx", tmp_path / "foreign.onnx"
    text.write_text("no model")
    model = onnx.load(folder / "out" / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, foreign)
    for file, sentence in (
        (tmp_path / "none.onnx", "is not a file"),
        (text, "cannot be run as ONNX"),
        (foreign, "does not say what model it holds"),
    ):
        assert segment.main(["--scenes", "1", "--onnx", str(file)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and "python -m spot_fast.export RUN OUT" in error and str(file) in error
