"""Protects the presets: their values against the paper, their names on the command line, and the list of them."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from image_files import make_images
from spot_fast import evaluate, presets, recipes, train
from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.checkpoints.runs import CONFIG, MODEL, find_run, write_config
from spot_fast.config import ONE_ORDER, SOURCED_DEFAULTS, Config, check_config, preset
from spot_fast.data import READERS, Folder, Reader, open_set
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.spot import Spot
from spot_fast.model.vits import build_vit
from spot_fast.published import SCORES, scores
from spot_fast.recipes import DATA_SETS, ENCODERS, METHODS, SIZES
from spot_fast.training.arguments import parse
from spot_fast.training.teacher import find_teacher
from tiny_runs import options

# From arXiv 2312.00648v3, by hand: preset, stage → what its text says. Appendix D.2 unless another place is named.
PAPER = [
    # "on COCO, PASCAL, MOVi-C, and MOVi-E we use 7, 6, 11, and 24 slots"; "50 and 560 training epochs"; "4 x 10^-4" and
    # "4 x 10^-7" on COCO and PASCAL with DINO and MoCo-v3; lambda 0.005; crops, flips and mask sizes: D.3
    ("coco", 1, dict(num_slots=7, epochs=50, lr=4e-4, lr_low=4e-7, crop="center", flip=True, mask_size=320)),
    ("coco", 2, dict(num_slots=7, epochs=50, lr=4e-4, lr_low=4e-7, att_weight=0.005, train_blocks=4)),
    ("voc", 1, dict(num_slots=6, epochs=560, lr=4e-4, lr_low=4e-7, crop="random", flip=True, mask_size=320)),
    ("voc", 2, dict(num_slots=6, epochs=560, lr=4e-4, lr_low=4e-7, att_weight=0.005)),
    # "65 and 30 epochs for the first and second stages"; 2 x 10^-4 to 4 x 10^-5, then to 1.5 x 10^-4
    ("movi_c", 1, dict(num_slots=11, epochs=65, lr=2e-4, lr_low=4e-5, crop="stretch", flip=False, mask_size=128)),
    ("movi_c", 2, dict(num_slots=11, epochs=30, lr=2e-4, lr_low=1.5e-4, att_weight=0.005)),
    ("movi_e", 1, dict(num_slots=24, epochs=65, lr=2e-4, lr_low=4e-5, crop="stretch", flip=False, mask_size=128)),
    ("movi_e", 2, dict(num_slots=24, epochs=30, lr=2e-4, lr_low=1.5e-4, att_weight=0.005)),
    # "For both stages with MAE on COCO": 2 x 10^-4 to 4 x 10^-5. "For MLP-based decoder, MoCo-v3, and MAE": 0.001
    ("coco+mae_vitb16", 1, dict(lr=2e-4, lr_low=4e-5, epochs=50, encoder="vit_base_patch16_224.mae")),
    ("coco+mae_vitb16", 2, dict(lr=2e-4, lr_low=4e-5, epochs=50, att_weight=0.001)),
    ("coco+moco_vitb16", 1, dict(lr=4e-4, lr_low=4e-7)),
    ("coco+moco_vitb16", 2, dict(lr=4e-4, lr_low=4e-7, att_weight=0.001)),
    ("voc+moco_vitb16", 2, dict(lr=4e-4, lr_low=4e-7, att_weight=0.001, epochs=560)),
    ("movi_c+mae_vitb16", 2, dict(lr=2e-4, lr_low=1.5e-4, att_weight=0.001)),  # MOVi's rates: MAE's are "on COCO"
    ("coco+spot_mlp", 1, dict(decoder="mlp", dec_mlp_hidden=2048, orders="standard", epochs=50, lr=4e-4)),
    ("coco+spot_mlp", 2, dict(decoder="mlp", att_weight=0.001, slot_init="learned", truncation="bi_level")),
    ("coco+dinosaur_mlp", 1, dict(decoder="mlp", orders="standard", epochs=50, slot_init="gaussian")),
    # Table 9: "Except for DINOSAUR (Offic.) ... all others are trained for 100 epochs"; BO-QSA is [30]'s trainable
    # initial slots with bi-level optimisation (B.3)
    ("coco+dinosaur", 1, dict(orders="standard", epochs=100, slot_init="gaussian", truncation="none", cappa=0.0)),
    ("coco+bo_qsa", 1, dict(orders="standard", epochs=100, slot_init="learned", truncation="bi_level")),
    # Table 3: parallel prediction for 25% of training iterations, no self-training
    ("coco+cappa", 1, dict(orders="standard", cappa=0.25, epochs=50, slot_init="gaussian")),
    # section 3.3: Gaussian initial slots first, learned ones with bi-level optimisation in stage 2; nine orders in both
    ("coco+spot", 1, dict(slot_init="gaussian", truncation="none", orders="spot9")),
    ("coco+spot", 2, dict(slot_init="learned", truncation="bi_level", orders="spot9")),
]
# D.2, of every preset on the paper's data: Adam without weight decay has no field.
ALWAYS = dict(
    batch_size=64,
    warmup_steps=10_000,
    slot_dim=256,
    slot_mlp=1024,
    slot_iterations=3,
    dec_blocks=4,
    dec_heads=6,
    image_size=224,
    clip=0.3,
    slot_heads=1,
)


def combinations():
    for data, method, encoder in itertools.product(DATA_SETS, METHODS, ["", *ENCODERS]):
        for stage in (1, 2) if METHODS[method].stage2 is not None else (1,):
            yield "+".join(filter(None, (data, method, encoder))), stage


@pytest.mark.parametrize("name, stage, expected", PAPER)
def test_values_are_those_of_the_paper(name, stage, expected):
    config = asdict(preset(name, stage))
    assert {field: config[field] for field in expected | ALWAYS} == expected | ALWAYS


def test_every_combination_is_a_valid_config_with_a_source_for_every_value():
    defaults = asdict(Config())
    for name, stage in combinations():
        config = check_config(preset(name, stage))
        assert Config.from_json(config.to_json()) == config
        found = SOURCED_DEFAULTS | recipes.values(
            config.preset, config.method, recipes.encoder_recipe(config.encoder), stage
        )
        changed = {field for field, value in asdict(config).items() if value != defaults[field]}
        assert changed - {"preset", "method", "stage"} <= found.keys()
        assert all(source for _, source in found.values())


@pytest.mark.parametrize("decoder", ONE_ORDER)
def test_a_decoder_of_one_order_has_it_unless_another_is_asked_for(decoder):
    assert check_config(preset("coco", decoder=decoder)).orders == "standard"
    assert preset("coco+spot_mlp", decoder="transformer").orders == "standard"
    assert preset("coco").orders == "spot9"
    asked = preset("coco", decoder=decoder, orders="spot9")
    with pytest.raises(UserError, match=f"^--decoder {decoder} works in the standard patch order only: add --orders"):
        check_config(asked)


def test_names_come_in_any_order_and_as_options():
    config = preset("coco+cappa+mae_vitb16")
    assert preset("mae_vitb16+cappa+coco") == preset("coco", method="cappa", encoder="mae_vitb16") == config
    assert preset("coco+cappa", encoder="vit_base_patch16_224.mae") == config
    assert preset("dinosaur") == preset("scenes+dinosaur") and preset("scenes", encoder="vit_x").encoder == "vit_x"
    assert preset("coco", encoder="vit_base_patch14_dinov2").encoder == "vit_base_patch14_dinov2"
    assert preset("coco+mae_vitb16", lr=0.5, att_weight=1.0).lr == 0.5
    assert preset("coco+spot_ens") == replace(preset("coco"), method="spot_ens")
    assert preset("coco").recipe == "coco" and config.recipe == "coco+cappa"
    large = preset("448px+coco+dinov2_vits14", 2)
    assert large == replace(preset("coco+dinov2_vits14", 2), image_size=448) == preset("coco+dinov2_vits14+448px", 2)
    assert preset("coco+448px", image_size=448) == preset("coco", image_size=448)
    assert preset("518px", encoder="dinov2_vits14").image_size == 518


def test_the_command_line_takes_names_apart():
    args = parse("--preset mae_vitb16+voc+spot_mlp --stage 2".split())
    named = dict(preset="voc", method="spot_mlp", encoder="vit_base_patch16_224.mae", stage=2)
    assert args.given == named
    assert args.config() == preset("voc+spot_mlp+mae_vitb16", 2)
    assert "preset" not in parse("--preset spot_mlp --stage 2 --teacher x --data y".split()).given
    assert parse("--preset coco --encoder mae_vitb16".split()).config() == preset("coco+mae_vitb16")
    assert parse("--preset 336px+voc".split()).given == dict(preset="voc", image_size=336)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--preset coco+dinosour", "--preset coco+dinosour is unknown: use one of scenes, coco, voc, movi_c, movi_e"),
        ("--preset coco+dinosour", "did you mean dinosaur?"),
        ("--preset coco+voc", "--preset coco+voc has two data sets: choose coco or voc"),
        ("--preset spot+cappa", "--preset spot+cappa has two methods: choose spot or cappa"),
        ("--preset coco+mae_vitb16+dino_vitb16", "has two encoders: choose mae_vitb16 or dino_vitb16"),
        ("--preset coco+cappa --method spot", "--preset coco+cappa and --method spot differ: give the method once"),
        ("--preset coco+mae_vitb16 --encoder vit_b", "--encoder vit_b differ: give the encoder once"),
        ("--preset coco --method capa", "--method capa is unknown: use one of spot, spot_ens, spot_mlp, spot_masked"),
        ("--preset coco+bo_qsa --stage 2", "--method bo_qsa has no stage 2, it is stage 1 alone: use --method spot"),
        (
            "--preset dinosaur --data COCO",
            "--preset dinosaur names no data set for --data COCO: write the set before it",
        ),
        ("--preset coco+", "--preset coco+ is unknown: use one of scenes"),
        ("--preset coco+518", "did you mean 518px?"),
        ("--preset coco+336px+448px", "--preset coco+336px+448px has two sizes: choose 336px or 448px"),
        ("--preset coco+336px --image-size 448", "and --image-size 448 differ: give the image size once"),
        (
            "--preset voc+518px",
            "voc+518px: 518px is not a multiple of the patch size 16 of dino_vitb16, use 336px, 448px or 512px",
        ),
        ("--preset coco+dinov2_vits14+512px", "patch size 14 of dinov2_vits14, use 336px, 448px or 518px"),
    ],
)
def test_names_that_make_no_sense_are_refused(capsys, words, sentence):
    assert train.main(["--print-config", *words.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_encoders_by_their_names():
    small = dict(image_size=32, encoder_weights="none")
    with torch.device("meta"):
        assert build_vit(preset("coco", encoder="moco_vitb16", **small)).patch_embed.grid_size == (2, 2)
    assert build_vit(replace(preset("scenes"), encoder="spot_scenes")).embed_dim == 128
    with pytest.raises(
        UserError,
        match=r"neither timm nor the hub has the weights of --encoder moco_vitb16: download "
        r"https://dl\.fbaipublicfiles\.com/moco-v3/.+ and pass it as --encoder-weights FILE",
    ):
        frozen_encoder(preset("coco+moco_vitb16", image_size=32))
    with pytest.raises(UserError, match=r"--encoder dino_vitb61 is not a model timm knows: did you mean dino_vitb16"):
        build_vit(preset("coco", encoder="dino_vitb61"))


@pytest.mark.parametrize("encoder", ["spot_scenes", *ENCODERS])
def test_every_combination_builds_a_model(encoder):
    """On the meta device, so without memory. The slots are all in which models of other data sets differ."""
    grid = 12 if encoder == "spot_scenes" else 16 if "14" in encoder else 14
    dim = 128 if encoder == "spot_scenes" else 384 if "vits" in encoder else 768
    named = ["scenes"] if encoder == "spot_scenes" else ["coco", encoder]
    with torch.device("meta"):
        first = preset("+".join(named))
        frozen = Encoder(build_vit(first), last_blocks=first.train_blocks, feature_norm=first.feature_norm)
        assert (frozen.grid, frozen.dim) == (grid, dim)
        for method in METHODS:
            for stage in (1, 2) if METHODS[method].stage2 is not None else (1,):
                config = preset("+".join([*named, method]), stage)
                model = Spot(config, frozen)
                assert model.num_orders == (9 if config.orders == "spot9" else 1)
                assert hasattr(model.slot_encoder, "slot_embedding") == (config.slot_init == "learned")
                assert model.slot_encoder.attention.iterations == (5 if encoder == "spot_scenes" else 3)
                learned = sum(parameter.numel() for parameter in model.decoder.parameters())
                assert (
                    learned > 4 * dim * config.dec_mlp_hidden
                    if config.decoder == "mlp"
                    else learned > config.dec_blocks * 16 * dim * dim
                )


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name.startswith("dinov")])
def test_positions_and_registers_at_every_size(encoder):
    """Features are one a patch at each size that fits: positions resampled, class token and registers dropped."""
    patch, registers = ENCODERS[encoder].patch, 4 if "reg4" in encoder or "dinov3" in encoder else 0
    sides = [224, *(side for side in SIZES.values() if side % patch == 0)]
    assert sides == [224, 336, 448, 518 if patch == 14 else 512]
    for side in sides:
        config = preset("+".join(["coco", encoder, *([f"{side}px"] if side != 224 else [])]))
        with torch.device("meta"):
            frozen = Encoder(build_vit(config), last_blocks=4)
            features = frozen(torch.empty(2, 3, side, side))
        assert frozen.num_prefix == 1 + registers
        assert features.shape == (2, (side // patch) ** 2, frozen.dim) and frozen.grid == side // patch
        assert Spot(config, frozen).num_orders == 9


def a_run(root: Path, name: str, number: int, **changes) -> Path:
    config = preset(name, **changes)
    folder = root / f"{config.recipe.replace('+', '-')}-stage{config.stage}-{number:03d}"
    folder.mkdir(parents=True)
    write_config(folder, config)
    (folder / MODEL).touch()
    return folder


def test_a_student_finds_a_teacher_of_its_kind(tmp_path):
    spot = a_run(tmp_path, "coco", 1)
    plain = a_run(tmp_path, "coco+dinosaur", 1)
    mlp = a_run(tmp_path, "coco+dinosaur_mlp", 1)
    assert find_teacher(None, tmp_path, "coco") == find_teacher(None, tmp_path, "coco", "spot_ens") == spot
    assert find_teacher(None, tmp_path, "coco", "spot_mlp") == mlp
    assert find_teacher(str(plain), tmp_path, "coco") == plain
    mae = a_run(tmp_path, "coco+mae_vitb16", 2)
    assert find_teacher(None, tmp_path, "coco") == mae
    for encoder, teacher in (("vit_base_patch16_224.dino", spot), ("vit_base_patch16_224.mae", mae), ("another", mae)):
        assert find_teacher(None, tmp_path, "coco", "spot", encoder) == teacher
    assert find_run(tmp_path, preset="coco", stage=1) == mae  # the newest, whatever its method
    large = a_run(tmp_path, "coco+448px", 3)
    for size, teacher in ((448, large), (224, spot), (None, large)):
        assert find_teacher(None, tmp_path, "coco", "spot", "vit_base_patch16_224.dino", size) == teacher
    with pytest.raises(UserError, match=r"no finished stage 1 run of preset voc\+spot_mlp in .*voc\+spot_mlp$"):
        find_teacher(None, tmp_path, "voc", "spot_mlp")


def config_of(capsys, root: Path, *words: str) -> dict:
    capsys.readouterr()
    assert train.main(["--print-config", "--runs", str(root), *words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_student_follows_its_teacher(tmp_path, capsys):
    student = ("--stage", "2", "--teacher")
    plain = a_run(tmp_path, "coco+dinosaur+mae_vitb16", 1)
    config = config_of(capsys, tmp_path, *student, str(plain))  # row (e) of Table 1, with MAE's rates
    assert (config["preset"], config["method"], config["orders"]) == ("coco", "spot", "standard")
    assert (config["encoder"], config["lr"], config["att_weight"]) == ("vit_base_patch16_224.mae", 2e-4, 0.001)
    mlp = a_run(tmp_path, "coco+dinosaur_mlp", 1)
    config = config_of(capsys, tmp_path, *student, str(mlp))
    assert (config["method"], config["decoder"], config["att_weight"]) == ("spot_mlp", "mlp", 0.001)
    masked = a_run(tmp_path, "coco", 2, decoder="masked", masked_shown=0.25)
    config = config_of(capsys, tmp_path, *student, str(masked))
    names = ("method", "decoder", "orders", "masked_shown", "att_weight")
    assert [config[name] for name in names] == ["spot", "masked", "standard", 0.25, 0.005]
    config = config_of(capsys, tmp_path, *student, str(a_run(tmp_path, "coco+spot_masked", 3)))
    assert [config[name] for name in names] == ["spot_masked", "masked", "standard", 0.1, 0.005]
    # The teacher has nine orders, which the student's decoder does not know.
    config = config_of(capsys, tmp_path, "--decoder", "masked", *student, str(a_run(tmp_path, "coco", 4)))
    assert (config["decoder"], config["orders"]) == ("masked", "standard")
    config = config_of(capsys, tmp_path, "--preset", "spot_ens", *student, str(a_run(tmp_path, "voc", 1)))
    assert (config["preset"], config["method"], config["epochs"]) == ("voc", "spot_ens", 560)
    large = a_run(tmp_path, "coco+dinov3_vits16+336px", 1)
    for words in (["--preset", "coco"], ["--preset", "coco+336px"], []):
        config = config_of(capsys, tmp_path, *words, *student, str(large))
        assert (config["image_size"], config["encoder"]) == (336, "vit_small_patch16_dinov3.lvd1689m")
    config = config_of(capsys, tmp_path, "--preset", "coco+336px", "--stage", "2")
    assert config["image_size"] == 336
    assert train.main(["--print-config", "--preset", "coco+448px", *student, str(large)]) == 2
    assert "has image_size 336 but --image-size is 448: both need the same image size" in capsys.readouterr().err
    assert train.main(["--print-config", "--method", "spot", *student, str(mlp)]) == 2
    assert "was trained with method dinosaur_mlp but --method spot needs spot or spot_ens" in capsys.readouterr().err


def test_a_run_from_before_methods_is_spot(tmp_path):
    folder = a_run(tmp_path, "coco", 1)
    old = json.loads((folder / CONFIG).read_text())
    del old["method"]
    assert Config.from_json(json.dumps(old)) == preset("coco")
    with pytest.raises(ValueError, match="method 'later' is unknown: it was written by another version"):
        Config.from_json(json.dumps(old | {"method": "later"}))


def test_the_list_names_every_preset_and_the_main_scores(capsys):
    assert presets.main([]) == 0
    text = capsys.readouterr().out
    for name in (*DATA_SETS, *METHODS, *ENCODERS, *SIZES):
        assert f"  {name} " in text
    rows = {line.split()[0]: line.split()[1:5] for line in text.splitlines() if line.startswith("  coco+")}
    # Tables 1 (f) and (g), 4, 3, 9 and 10 of the paper
    assert rows["coco+spot"] == ["34.7±0.1", "44.3±0.3", "32.7±0.1", "36.6±0.3"]
    assert rows["coco+spot_ens"] == ["35.0±0.1", "44.7±0.3", "33.0±0.1", "37.0±0.2"]
    assert rows["coco+spot_mlp"] == ["28.4", "32.4", "27.0", "42.5"]
    assert rows["coco+cappa"] == ["27.8", "-", "26.5", "35.3"]
    assert rows["coco+bo_qsa"] == ["31.5", "39.7", "-", "-"]
    assert rows["coco+dinosaur"] == ["32.3±0.3", "42.1±0.2", "30.2±0.3", "31.8±0.9"]
    assert rows["coco+spot+mae_vitb16"] == ["33.3±0.3", "40.7±0.7", "31.4±0.3", "37.5±1.0"]
    assert max(map(len, text.splitlines())) <= 125


@pytest.mark.parametrize(
    "name",
    [
        "scenes",
        "coco",
        "movi_e+spot",
        "spot_mlp",
        "coco+bo_qsa",
        "moco_vitb16",
        "voc+cappa+dinov3_vitb16",
        "518px+dinov2_vitb14_reg4",
    ],
)
def test_a_page_is_what_its_commands_train(capsys, name):
    assert presets.main([name]) == 0
    page = capsys.readouterr().out
    assert presets.main([name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for stage, command in enumerate(found["commands"][:-1], start=1):
        words = command.split()[3:]
        assert command in page
        config = parse(words).config()
        assert config.stage == stage
        for field, value in found["settings"][f"stage {stage}"].items():
            assert getattr(config, field) == value["value"] and value["source"]
    if found["scores"]:
        assert found["scores"][0]["source"] in page


def test_a_name_that_is_none_is_one_sentence(capsys):
    assert presets.main(["coco+dinosuar"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: coco+dinosuar is unknown: use one of") and "did you mean dinosaur?" in error
    assert error.count("\n") == 1


def test_scores_are_of_presets_and_complete():
    for score in SCORES:
        assert score.data in DATA_SETS and score.method in METHODS and score.source.startswith("Tab. ")
        assert score.stage == 1 or METHODS[score.method].stage2 is not None
        assert all(mean is None or 0 < mean < 100 for mean in score.means)
        assert all(deviation is None or deviation < 5 for deviation in score.deviations)
    assert len({(s.data, s.method, s.encoder, s.stage, s.masks, s.note, s.source) for s in SCORES}) == len(SCORES)
    best = scores("voc", "spot_ens")[0]
    assert best.means == (48.3, 55.6, 46.8, 19.9) and best.deviations == (0.4, 0.4, 0.4, 0.9)  # Table 6


def test_methods_of_scenes_train(tmp_path, monkeypatch, capsys):
    """From the command line to the end: an MLP teacher, and the command that it prints for its student."""
    monkeypatch.chdir(tmp_path)
    tiny = options(epochs=2, train_images=8, warmup_steps=2, val_images=2, eval_images=0, dec_mlp_hidden=16)
    assert train.main(["--preset", "dinosaur_mlp", "--no-tensorboard", "--threads", "1", *tiny]) == 0
    out = capsys.readouterr().out
    assert "runs/scenes-dinosaur_mlp-stage1-001: preset scenes+dinosaur_mlp, stage 1" in out
    assert "--stage 2" not in out  # it has none of its own
    student = ["--preset", "spot_mlp", "--stage", "2", "--epochs", "2", "--warmup-steps", "2", "--eval-images", "0"]
    assert train.main([*student, "--no-tensorboard", "--threads", "1"]) == 0
    assert "runs/scenes-spot_mlp-stage2-001 is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, words",
    [("spot_masked", "--initial-weights clustering"), ("spot_mlp", "--mlp-top-k 2 --initial-weights teacher")],
)
def test_both_stages_of_other_decoders_train_and_are_evaluated(tmp_path, monkeypatch, capsys, method, words):
    monkeypatch.chdir(tmp_path)
    tiny = options(epochs=2, train_images=8, warmup_steps=2, val_images=2, eval_images=2, dec_mlp_hidden=16)
    words = ["--preset", method, "--no-tensorboard", "--threads", "1", *tiny, *words.split()]
    first = [word.replace("teacher", "xavier") for word in words]
    assert train.main(first) == 0 and train.main([*words, "--stage", "2"]) == 0
    for stage in (1, 2):
        run = f"runs/scenes-{method}-stage{stage}-001"
        capsys.readouterr()
        assert evaluate.main([run, "--threads", "1"]) == 0
        assert "decoder" in capsys.readouterr().out


def test_presets_and_readers_are_the_same_sets():
    for name in DATA_SETS:
        if name != "scenes":
            with pytest.raises(UserError, match=f"--preset {name} needs --data PATH"):
                open_set(preset(name), "train")


def test_a_registered_data_set_is_a_preset_like_any_other(tmp_path, monkeypatch, capsys):
    """Two entries, a reader and a recipe: every command knows it, methods and encoders bring the values of COCO."""
    monkeypatch.setitem(READERS, "photos", Reader(Folder, "a folder of photos"))
    monkeypatch.setitem(DATA_SETS, "photos", recipes.DataSet("our photos", "photos", DATA_SETS["coco"].values))
    assert presets.main([]) == 0
    assert "\n  photos             our photos\n" in capsys.readouterr().out
    for name in ("photos", "photos+spot_mlp+mae_vitb16"):
        assert presets.main([name, "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert presets.main([name]) == 0
        assert f"  python -m spot_fast.train --preset {name} --data DATA --stage 2\n" in capsys.readouterr().out
        assert about["scores"] == [] and not any("no scores" in note for note in about["notes"])
    stage2 = about["settings"]["stage 2"]
    assert stage2["att_weight"] == {"value": 0.001, "source": "D.2"}
    assert stage2["lr"] == {"value": 2e-4, "source": "as coco+mae_vitb16"}
    make_images(tmp_path, 3)
    words = ["--preset", "photos", "--data", str(tmp_path)]
    assert train.main([*words, "--print-config"]) == 0
    config = Config.from_json(capsys.readouterr().out)
    assert len(open_set(config, "train")) == 3
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert ", photos (need --data PATH)" in capsys.readouterr().out
    assert train.main(["--preset", "photos"]) == 2
    assert "--preset photos needs --data PATH, a folder of photos" in capsys.readouterr().err


def test_a_registered_encoder_without_rates_has_those_of_the_data_set(monkeypatch, capsys):
    vit = recipes.Vit("a small ViT", timm="vit_mini", source="ours", licence="yours", weights="mini.safetensors")
    monkeypatch.setitem(ENCODERS, "mini", vit)
    assert presets.main([]) == 0
    assert "  mini               a small ViT; lr 0.0004 to 4e-07, lambda 0.005\n" in capsys.readouterr().out
    assert preset("movi_e+mini") == preset("movi_e", encoder="vit_mini")
