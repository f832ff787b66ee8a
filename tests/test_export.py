"""Exported files compute what PyTorch does, in standard operators and for any batch; or they are not kept."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import spot_fast
from small_models import SIZE, small_config
from spot_fast import export
from spot_fast.data import Scenes
from spot_fast.errors import UserError
from spot_fast.exporting import formats
from spot_fast.exporting.comparison import batches
from spot_fast.exporting.formats import FORMATS, METADATA, Format
from spot_fast.model.encoder import normalise
from spot_fast.random_streams import Stream, seed_of
from spot_kernels import mask_labels
from untrained_runs import untrained

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

IMAGES = Scenes(7, "val", size=SIZE).images
DECODER = ("slots", "decoder_masks", "decoder_labels", "slot_masks", "slot_labels")


def export_run(folder, *options, **changes):
    """An untrained run in `folder`, exported beside it."""
    run = untrained(folder / "run", small_config(**changes))
    assert export.main([str(folder / "run"), str(folder / "out"), "--threads", "1", *options]) == 0
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with gaussian slots, stage 2, with its decoder in both formats."""
    folder = tmp_path_factory.mktemp("exported")
    return export_run(folder, "--decoder", stage=2, slot_init="gaussian"), folder / "out"


def expected(run, images, orders="0"):
    config = run.config
    generator = torch.Generator().manual_seed(seed_of(Stream.SEGMENTATION_SLOTS, 0))
    noise = torch.randn(1, config.num_slots, config.slot_dim, generator=generator).expand(len(images), -1, -1)
    output = run.model.segment(
        normalise(images), orders=orders, noise=noise if config.slot_init == "gaussian" else None
    )
    return {
        "slots": output.slots,
        "decoder_masks": output.masks,
        "decoder_labels": mask_labels(output.masks, SIZE),
        "slot_masks": output.slot_attn,
        "slot_labels": mask_labels(output.slot_attn, SIZE),
    }


def assert_equal(results, wanted):
    for name, value in results.items():
        assert value.dtype == wanted[name].dtype and value.shape == wanted[name].shape, name
        if value.dtype == torch.uint8:
            assert (value == wanted[name]).float().mean() >= 0.999, name
        else:
            torch.testing.assert_close(
                value, wanted[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
            )


@pytest.fixture(scope="module")
def runners(exported):
    return {name: FORMATS[name].open(exported[1] / FORMATS[name].file, 1) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_file_gives_what_pytorch_gives_for_any_batch(exported, runners, name, count):
    results = runners[name](IMAGES[:count])
    assert set(results) == set(DECODER)
    assert_equal(results, expected(exported[0], IMAGES[:count]))


def test_standard_operators_only(exported):
    _, out = exported
    program = torch.export.load(out / "model.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in called if not name.startswith(("aten.", "<built-in function getitem>"))}
    model = onnx.load(out / "model.onnx")
    assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
    assert {node.domain for node in model.graph.node} <= {""}


def test_the_onnx_file_has_names_a_free_batch_and_its_settings(exported):
    _, out = exported
    model = onnx.load(out / "model.onnx")
    shapes = {
        value.name: [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    batch = shapes["images"][0]
    assert isinstance(batch, str) and batch
    assert shapes == {
        "images": [batch, 3, SIZE, SIZE],
        "slots": [batch, 4, 16],
        "decoder_masks": [batch, 16, 4],
        "decoder_labels": [batch, SIZE, SIZE],
        "slot_masks": [batch, 16, 4],
        "slot_labels": [batch, SIZE, SIZE],
    }
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    about = dict(
        title="run",
        image_size="32",
        patch_size="8",
        num_slots="4",
        masks="decoder,slots",
        orders="0",
        adaptive_slots="False",
        spot_fast=spot_fast.__version__,
    )
    assert about.items() <= metadata.items() and "mean" in metadata["normalisation"]
    extra = {METADATA: ""}
    torch.export.load(out / "model.pt2", extra_files=extra)
    assert json.loads(extra[METADATA]) == metadata


def test_slots_that_are_joined_are_exported(tmp_path):
    """With the MLP decoder of the largest slots, and learned slots."""
    changes = dict(decoder="mlp", mlp_top_k=2, slot_init="learned")
    run = export_run(tmp_path, "--formats", "pt2", "--decoder", "--adaptive-slots", **changes)
    run.model.config = small_config(**changes, adaptive_slots=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.pt2"]
    results = FORMATS["pt2"].open(tmp_path / "out" / "model.pt2", 1)(IMAGES)
    wanted = expected(run, IMAGES)
    assert_equal(results, wanted)
    assert (wanted["slot_masks"].amax(1) == 0).any()  # some were joined


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, changes",
    [
        (("--orders", "all"), {}),
        ((), dict(decoder="mlp", mlp_top_k=2, adaptive_slots=True)),
        ((), dict(decoder="masked", slot_init="learned", slot_heads=2)),
        ((), dict(orders="standard", cappa=0.25)),
    ],
)
def test_every_decoder_as_onnx(tmp_path, options, changes):
    run = export_run(tmp_path, "--decoder", *options, **changes)
    results = FORMATS["onnx"].open(tmp_path / "out" / "model.onnx", 1)(IMAGES)
    assert_equal(results, expected(run, IMAGES, "all" if options else "0"))


@pytest.mark.slow
def test_latency_names_every_runtime_beside_its_error(tmp_path, capsys):
    export_run(tmp_path, "--latency", "--batch-size", "4")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["PyTorch", "torch.compile", "ONNX Runtime"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:3])
    assert all(row[3].strip() == "100.000 %" for row in rows[2:])


@pytest.mark.parametrize(
    "output, change, sentence",
    [
        ("slot_labels", lambda labels: labels ^ (torch.arange(SIZE) == 0).byte(), "of the pixels of slot_labels have"),
        ("slots", lambda slots: slots * torch.nan, "slots has values that are not finite"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(exported, runners, tmp_path, monkeypatch, capsys, output, change, sentence):
    def run(images):
        results = runners["pt2"](images)
        return results | {output: change(results[output])}

    differs = Format("model.pt2", lambda program, about, path: path.write_bytes(b"a file"), lambda path, threads: run)
    monkeypatch.setattr(export, "FORMATS", {"pt2": differs})
    monkeypatch.setattr(export, "traced", lambda graph: None)
    assert export.main([str(exported[0].path), str(tmp_path / "out"), "--formats", "pt2", "--decoder"]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_batches_have_sizes_other_than_the_traced_one():
    assert [len(batch) for batch in batches(torch.zeros(64, 1), 16)] == [1, 3, 16, 16, 16, 12]
    assert [len(batch) for batch in batches(torch.zeros(5, 1), 16)] == [1, 3, 1]


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main([str(tmp_path / "no run"), str(tmp_path / "out")]) == 2
    line = "error: --formats onnx needs onnxscript: pip install onnx onnxscript onnxruntime\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--orders", "all"), "--orders all belongs to the decoder masks: add --decoder"),
        (("--images", "photos"), "--images photos has too few images, 1: give 5 or more"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/one.png")
    untrained(tmp_path / "run", small_config())
    assert export.main(["run", "out", *options]) == 2
    assert sentence in capsys.readouterr().err and not Path("out").exists()


def test_an_existing_folder_is_left_alone(exported, capsys):
    run, out = exported
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert export.main([str(run.path), str(out)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_weights_beyond_one_onnx_file_are_refused(exported, tmp_path, monkeypatch):
    program = torch.export.load(exported[1] / "model.pt2")
    monkeypatch.setattr(formats, "_LARGEST", 1000)
    with pytest.raises(UserError, match="do not fit into one file: use pt2 alone"):
        FORMATS["onnx"].write(program, None, tmp_path / "model.onnx")
