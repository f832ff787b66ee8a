"""Checkpoints of OCBench, VideoSAUR and OCLF: their published names, their formulas, and what is refused.

The state dicts are synthetic. Where PyTorch has the layers (OCBench's decoder is PyTorch's own) they are built with it;
the rest is written from the formulas, slot attention in `published_variants`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import published_variants as published
from spot_fast import convert
from spot_fast.checkpoints.runs import load_run
from spot_fast.checkpoints.third_party import convert as convert_third_party
from spot_fast.checkpoints.third_party import recognise
from spot_fast.errors import UserError
from spot_fast.model.encoder import Encoder
from spot_fast.model.patch_orders import patch_orders
from spot_fast.model.vits import build_vit
from tiny_runs import tiny

WIDTH, SLOT, HIDDEN, SLOTS, GRID, PATCH, DEPTH = 24, 16, 32, 5, 4, 8, 5
VIT = f"vit:patch={PATCH},width={WIDTH},depth={DEPTH},heads=3,hidden=96"


@pytest.fixture(scope="module")
def encoder():
    vit = build_vit(tiny(encoder=VIT))
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Encoder(vit, last_blocks=0).double()


def backbone(encoder, prefix):
    """A ViT without its final LayerNorm, as all three keep it."""
    return {
        prefix + name: value.float() for name, value in encoder.vit.state_dict().items() if not name.startswith("norm.")
    }


def random(*shape, seed=0):
    """float64 of values that float32 holds: files keep them exactly."""
    return (0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).double()


def layer(name, inputs, outputs, bias=True):
    return {f"{name}.weight": random(outputs, inputs)} | ({f"{name}.bias": random(outputs, seed=1)} if bias else {})


def norm(name, width, bias=True):
    weight = {f"{name}.weight": (1 + random(width)).float().double()}
    return weight | ({f"{name}.bias": random(width, seed=1)} if bias else {})


def gru(name):
    return {
        f"{name}.weight_ih": random(3 * SLOT, SLOT),
        f"{name}.weight_hh": random(3 * SLOT, SLOT, seed=1),
        f"{name}.bias_ih": random(3 * SLOT),
        f"{name}.bias_hh": random(3 * SLOT, seed=1),
    }


def projected(state, prefix, features, activation):
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    hidden = activation(published.dense(published.normed(features, state, "0"), state, "1"))
    return published.dense(hidden, state, "3")


def load(kind, state, tmp_path, **options):
    """Through the command: the model of the folder that it writes, float64."""
    torch.save({name: value.float() for name, value in state.items()}, tmp_path / "theirs.ckpt")
    argv = [str(tmp_path / "theirs.ckpt"), str(tmp_path / "ours"), "--encoder-heads", "3"]
    argv += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert convert.main(argv) == 0
    run = load_run(tmp_path / "ours")
    assert run.config.implementation == kind == recognise(state)
    return run.model.double()


def within(prefix, state):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


IMAGES = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(3)).double()
NOISE = torch.randn(2, SLOTS, SLOT, generator=torch.Generator().manual_seed(4)).double()


class OcbenchDecoder(nn.Module):
    """PyTorch's decoder, with the first LayerNorm in front of it; nine [BOS]."""

    def __init__(self):
        super().__init__()
        one = nn.TransformerDecoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
        )
        self.backbone = nn.TransformerDecoder(one, 2)
        self.norm0 = self.backbone.layers[0].norm1
        self.backbone.layers[0].norm1 = nn.Identity()
        self.bos = nn.Parameter(torch.zeros(9, 1, 1, WIDTH))
        self.project1 = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH))
        self.project2 = nn.Sequential(nn.Linear(SLOT, WIDTH, bias=False), nn.LayerNorm(WIDTH))
        for number, parameter in enumerate(self.parameters()):
            parameter.data += random(*parameter.shape, seed=number).float()

    def forward(self, features, slots, number):
        order = patch_orders(GRID, "spot9")[number]
        weights = []

        def keep(module, args, kwargs):
            weights.append(nn.MultiheadAttention.forward(module, *args, **kwargs | {"need_weights": True})[1])

        hook = self.backbone.layers[-1].multihead_attn.register_forward_pre_hook(keep, with_kwargs=True)
        tokens = torch.cat([self.bos[number].expand(len(features), -1, -1), features[:, order][:, :-1]], 1)
        mask = torch.ones(GRID**2, GRID**2, dtype=torch.bool).triu(1)
        out = self.backbone(self.norm0(self.project1(tokens)), self.project2(slots), tgt_mask=mask)
        hook.remove()
        return out[:, order.argsort()], weights[0][:, order.argsort()]


def ocbench_state(encoder, **more):
    decoder = OcbenchDecoder()
    state = {f"decode.{name}": value for name, value in decoder.state_dict().items()}
    state |= backbone(encoder, "encode_backbone.1.")
    state |= norm("encode_project.0", WIDTH) | layer("encode_project.1", WIDTH, WIDTH)
    state |= layer("encode_project.3", WIDTH, WIDTH)
    state |= {"initializ.mean": random(1, 1, SLOT), "initializ.logstd": random(1, 1, SLOT, seed=1)}
    attention = norm("norm1q", SLOT) | norm("norm1kv", WIDTH) | norm("norm2", SLOT) | gru("rnn")
    attention |= layer("proj_q", SLOT, SLOT, False) | layer("proj_k", WIDTH, SLOT, False)
    attention |= layer("proj_v", WIDTH, SLOT, False) | layer("ffn.0", SLOT, HIDDEN) | layer("ffn.2", HIDDEN, SLOT)
    state |= {f"aggregat.{name}": value for name, value in attention.items()} | more
    return {f"m.{name}": value.float() for name, value in state.items()}, decoder.double()


def close(ours, expected):
    torch.testing.assert_close(ours, expected.double(), rtol=1e-9, atol=1e-9)


def test_ocbenchs_spot_gives_its_own_outputs(encoder, tmp_path):
    """In two of the nine orders: features' MLP, slot attention, decoder, masks."""
    state, decoder = ocbench_state(encoder)
    model = load("ocbench", state, tmp_path, num_slots=SLOTS)
    theirs = within("m.", {name: value.double() for name, value in state.items()})
    features = encoder(IMAGES)
    slots = theirs["initializ.mean"] + theirs["initializ.logstd"].exp() * NOISE
    inputs = projected(theirs, "encode_project.", features, F.gelu)
    slots, attn = published.ocbench(within("aggregat.", theirs), inputs, slots)
    with torch.no_grad():
        for number in (0, 8):
            output = model(features, features, torch.tensor(number), noise=NOISE)
            prediction, masks = decoder(features, slots, number)
            close(output.slots, slots)
            close(output.slot_attn, attn.sum(1).mT)
            close(output.prediction, prediction)
            close(output.masks, masks)


def test_ocbenchs_student_becomes_stage_2(encoder, tmp_path, capsys):
    """The teacher is left out; its noise around learned slots is training's."""
    state, _ = ocbench_state(encoder)
    teacher = within("m.", state)
    student = dict(teacher) | {"initializ.mean": random(1, SLOTS, SLOT), "initializ.logstd": random(1, SLOTS, SLOT)}
    student |= {name.replace("backbone", "backbone2"): v for name, v in teacher.items() if "backbone.1" in name}
    moved = "encode_backbone.1.blocks.4.norm1.weight"
    student[moved] = student[moved] + 1
    both = {f"m.student.{name}": value for name, value in student.items()}
    both |= {f"m.teacher.{name}": value for name, value in teacher.items()}
    model = load("ocbench", both, tmp_path)
    assert model.config.stage == 2 and model.config.slot_init == "learned" and model.config.num_slots == SLOTS
    assert "OCBench brings images to 256 px" in capsys.readouterr().out
    close(model.slot_encoder.slot_embedding.detach(), student["initializ.mean"][0].float())
    close(model.last_blocks[3].norm1.weight.detach(), student[moved])
    close(model.encoder.vit.blocks[4].norm1.weight.detach(), teacher[moved])
    student["encode_backbone.1.cls_token"] = student["encode_backbone.1.cls_token"] + 1
    with pytest.raises(UserError, match="differs from the frozen one in cls_token"):
        convert_third_party("ocbench", {f"m.{name}": value for name, value in student.items()}, encoder_heads=3)


def mlp_decoder(layers, positions):
    state = layer(f"{layers}0", SLOT, HIDDEN) | layer(f"{layers}2", HIDDEN, HIDDEN)
    state |= layer(f"{layers}4", HIDDEN, HIDDEN) | layer(f"{layers}6", HIDDEN, WIDTH + 1)
    return state | positions


def mlp_decoded(state, layers, positions, slots):
    hidden = slots.unsqueeze(2) + positions.reshape(1, 1, GRID**2, SLOT)
    for number in (0, 2, 4):
        hidden = published.dense(hidden, state, f"{layers}{number}").relu()
    features, alpha = published.dense(hidden, state, f"{layers}6").split((WIDTH, 1), -1)
    masks = alpha.softmax(1)
    return (features * masks).sum(1), masks.squeeze(-1).mT


def videosaur_state(encoder):
    state = backbone(encoder, "encoder.backbone.model.")
    state |= norm("encoder.output_transform.layers.0", WIDTH)
    state |= layer("encoder.output_transform.layers.1", WIDTH, 2 * WIDTH)
    state |= layer("encoder.output_transform.layers.3", 2 * WIDTH, SLOT)
    attention = norm("norm_features", SLOT) | norm("norm_slots", SLOT) | gru("gru") | norm("mlp.layers.0", SLOT)
    attention |= layer("mlp.layers.1", SLOT, HIDDEN) | layer("mlp.layers.3", HIDDEN, SLOT)
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        attention[f"{name}.weight"] = random(SLOT, SLOT, seed=number)
    state |= {f"processor.corrector.{name}": value for name, value in attention.items()}
    state |= {"initializer.mean": random(1, 1, SLOT), "initializer.log_std": random(1, 1, SLOT, seed=1)}
    return state | mlp_decoder("decoder.mlp.layers.", {"decoder.pos_emb": random(1, 1, GRID**2, SLOT)})


def dinosaur_state(encoder):
    names = {
        "processor.corrector.norm_features": "perceptual_grouping.slot_attention.norm_input",
        "processor.corrector.mlp.layers.": "perceptual_grouping.slot_attention.ff_mlp.module.",
        "processor.corrector.": "perceptual_grouping.slot_attention.",
        "initializer.mean": "conditioning.slots_mu",
        "initializer.log_std": "conditioning.slots_logsigma",
        "encoder.backbone.model.": "feature_extractor.model.",
        "encoder.output_transform.layers.": "perceptual_grouping.positional_embedding.layers.1.",
        "decoder.mlp.layers.": "object_decoder.decoder.",
        "decoder.pos_emb": "object_decoder.pos_embed",
    }
    state = {}
    for name, value in videosaur_state(encoder).items():
        old = next(old for old in names if name.startswith(old))
        state["models." + name.replace(old, names[old], 1)] = value
    prefix = "models.perceptual_grouping.positional_embedding.layers.1."
    return state | layer(prefix + "1", WIDTH, WIDTH) | layer(prefix + "3", WIDTH, SLOT)


@pytest.mark.parametrize("kind", ["videosaur", "dinosaur"])
def test_a_dinosaur_gives_its_own_outputs(kind, encoder, tmp_path):
    state = {"videosaur": videosaur_state, "dinosaur": dinosaur_state}[kind](encoder)
    wrapped = {"state_dict": {name: value.float() for name, value in state.items()}, "epoch": 3}
    assert recognise(wrapped) == kind
    model = load(kind, state, tmp_path, num_slots=SLOTS)
    attention, project, mean, log_scale, layers, positions = {
        "videosaur": (
            "processor.corrector.",
            "encoder.output_transform.layers.",
            "initializer.mean",
            "initializer.log_std",
            "decoder.mlp.layers.",
            "decoder.pos_emb",
        ),
        "dinosaur": (
            "models.perceptual_grouping.slot_attention.",
            "models.perceptual_grouping.positional_embedding.layers.1.",
            "models.conditioning.slots_mu",
            "models.conditioning.slots_logsigma",
            "models.object_decoder.decoder.",
            "models.object_decoder.pos_embed",
        ),
    }[kind]
    features = encoder(IMAGES)
    formula, mean, log_scale = getattr(published, kind), state[mean], state[log_scale]
    inputs = projected(state, project, features, torch.relu)
    slots, attn = formula(within(attention, state), inputs, mean + log_scale.exp() * NOISE)
    prediction, masks = mlp_decoded(state, layers, state[positions], slots)
    with torch.no_grad():
        output = model(features, features, noise=NOISE)
    for ours, expected in (
        (output.slots, slots),
        (output.slot_attn, attn.sum(1).mT),
        (output.prediction, prediction),
        (output.masks, masks),
    ):
        close(ours, expected)


def test_models_without_a_counterpart_are_refused_with_the_reason(encoder):
    ocbench, videosaur, dinosaur = ocbench_state(encoder)[0], videosaur_state(encoder), dinosaur_state(encoder)

    def refuse(kind, state, match):
        with pytest.raises(UserError, match=match):
            convert_third_party(kind, state, encoder_heads=3)

    video = {name.replace("processor.", "processor.module."): value for name, value in videosaur.items()}
    refuse("videosaur", video, "predictor carries slots from frame to frame.*SlotAttention.like")
    refuse("videosaur", {n: v for n, v in videosaur.items() if not n.startswith("decoder.")}, "has no MLP decoder")
    refuse(
        "dinosaur",
        dinosaur | {"models.object_decoder.cond_transform.0.weight": torch.zeros(1)},
        "attention has biases and whose first block keeps the residual",
    )
    refuse(
        "dinosaur",
        dinosaur | {"models.object_decoder.inp_transform.weight": torch.zeros(1)},
        "1 tensors without a counterpart in Spot, such as object_decoder.inp_transform.weight",
    )
    refuse("dinosaur", dinosaur | {"models.conditioning.slots_mu": torch.zeros(1, SLOTS, SLOT)}, "5 means of their own")
    refuse("ocbench", {n: v for n, v in ocbench.items() if "norm0" not in n}, "nine-order transformer decoder")
    refuse("ocbench", ocbench | {"other.weight": torch.zeros(1)}, "without a counterpart in Spot, such as other.weight")
    refuse("dinosaur", dinosaur | {"gate.weight": torch.zeros(1)}, "without a counterpart in Spot, such as gate.weight")
    bias = "decode.backbone.layers.0.self_attn.in_proj_bias"
    refuse("ocbench", ocbench | {f"m.{bias}": torch.zeros(1)}, f"without a counterpart in Spot, such as {bias}")
    for name in ("encode_backbone.1.cls_token", "decode.backbone.layers.1.linear1.weight", "encode_project.3.weight"):
        refuse(
            "ocbench", {n: v for n, v in ocbench.items() if n != f"m.{name}"}, f"has no {name}: it belongs to another"
        )
    no_slots = {n: v for n, v in videosaur.items() if not n.startswith("initializer.")}
    refuse("videosaur", no_slots, "has no initial slots below initializer.")
    refuse("ocbench", videosaur, "this is no checkpoint of ocbench")
    assert recognise({"encoder.patch_embed.proj.weight": torch.zeros(1)}) is None


def test_a_third_party_file_in_place_of_a_run_names_the_command(encoder, tmp_path):
    torch.save(videosaur_state(encoder), tmp_path / "theirs.ckpt")
    with pytest.raises(UserError, match="is a checkpoint of videosaur, not of the authors: python -m"):
        load_run(tmp_path / "theirs.ckpt")
