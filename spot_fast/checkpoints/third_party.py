"""Checkpoints of other slot models on frozen features → `Spot`'s tensors, if their mathematics is the same.

| kind | repository, files | models that convert |
|---|---|---|
| ocbench | Genera1Z/SmoothSA, object_centric_bench/model/{spot,ocl,basic}.py | its SPOT, teacher or distilled student |
| videosaur | martius-lab/videosaur, videosaur/modules/*.py | image models with the MLP decoder (its DINOSAUR) |
| dinosaur | amazon-science/object-centric-learning-framework, ocl/*.py | DINOSAUR with the MLP decoder |

Every tensor of a file must have a counterpart; a model with others is refused, naming one and the reason. Its slot
attention alone can still be loaded: `spot_kernels.SlotAttention.like(kind, …).load_variant(kind, …)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spot_fast.checkpoints.converted import Converted
from spot_fast.config import preset
from spot_fast.errors import UserError
from spot_fast.model.tensor_checks import require_plain
from spot_fast.model.vits import vit_name
from spot_kernels.modules import from_state_dict_of

KINDS = ("ocbench", "videosaur", "dinosaur")
# A tensor that every checkpoint of a kind has, and of that kind only.
_SIGNATURES = {
    "ocbench": re.compile(r"(.*\.)?aggregat\.norm1kv\.weight"),
    "videosaur": re.compile(r"(.*\.)?corrector\.norm_features\.weight"),
    "dinosaur": re.compile(r"(.*\.)?perceptual_grouping\.slot_attention\.norm_input\.weight"),
}


def recognise(contents: Mapping[str, Any]) -> str | None:
    """The kind, of `KINDS`, of a checkpoint's contents; None for any other."""
    names = _state(contents)
    return next((kind for kind, name in _SIGNATURES.items() if any(map(name.fullmatch, names))), None)


def convert(kind: str, contents: Mapping[str, Any], *, encoder_heads: int | None = None, **changes: Any) -> Converted:
    """Converts a checkpoint of `kind` (one of `KINDS`), as read by `read_checkpoint`.

    encoder_heads and changes (Config fields): settings that tensors do not show, as in `official.infer_config`.
    UserError for a checkpoint of another kind, or of a model whose mathematics is not `Spot`'s.
    """
    read = {"ocbench": _ocbench, "videosaur": _videosaur, "dinosaur": _dinosaur}[kind]
    if recognise(contents) != kind:
        raise UserError(f"this is no checkpoint of {kind}: it has no tensor named as its slot attention's LayerNorm")
    remaining = _Remaining(kind, _state(contents))
    try:
        values, learned, vit, notes = read(remaining)
    except KeyError as error:
        raise UserError(
            f"this checkpoint of {kind} has no {error.args[0]}: it belongs to another model, or is damaged"
        ) from None
    remaining.refuse_if_any()
    values |= dict(
        implementation=kind,
        encoder=vit_name(vit, encoder_heads),
        slot_heads=1,
        feature_norm=False,
        slot_dim=learned["slot_encoder.attention.project_q.weight"].shape[1],
        slot_mlp=learned["slot_encoder.attention.mlp.0.weight"].shape[0],
    )
    stage = values.pop("stage", 1)
    return Converted(preset(changes.pop("preset", "coco"), stage, **values | changes), learned, vit, notes=notes)


def _state(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict, which is the file itself or its `state_dict` or `model`, as float32."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = {
        name.removeprefix("module."): value
        for name, value in contents.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    require_plain(tensors, "this checkpoint")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


class _Remaining:
    """The tensors of a state dict that have not been converted yet; readers take them out until none is left."""

    def __init__(self, kind: str, state: dict[str, Tensor]) -> None:
        self.kind, self.state = kind, state

    def strip(self, prefix: str, *unused: str) -> None:
        """Removes `prefix` from every name and drops names with an `unused` prefix; UserError for any other name."""
        under = self.under(prefix)
        for other in unused:
            self.under(other)
        self.refuse_if_any()
        self.state = under

    def take(self, name: str, *, default: Tensor | None = None) -> Tensor:
        """Removes and returns a tensor; KeyError if it is missing and there is no default."""
        return self.state.pop(name) if default is None else self.state.pop(name, default)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Removes and returns all tensors whose names begin with `prefix`, by their names without it."""
        return {name.removeprefix(prefix): self.state.pop(name) for name in list(self.state) if name.startswith(prefix)}

    def layer(self, theirs: str, ours: str, *, bias: bool = True) -> dict[str, Tensor]:
        """Weight and bias of a layer; a missing bias is zero."""
        weight = self.take(f"{theirs}.weight")
        learned = {f"{ours}.weight": weight}
        if bias:
            learned[f"{ours}.bias"] = self.take(f"{theirs}.bias", default=weight.new_zeros(weight.shape[0]))
        return learned

    def slot_attention(self, prefix: str, initial: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Slot attention and its initial slots, by `SlotEncoder`'s names, and the Config fields they decide."""
        own = {name: self.state.pop(name) for name in list(self.state) if name.startswith((prefix, initial))}
        try:
            tensors = from_state_dict_of(self.kind, own, prefix=prefix, initial_prefix=initial)
        except ValueError as error:
            raise UserError(f"slot attention of this checkpoint: {error}") from None
        if "initial.mean" not in tensors:
            raise KeyError(f"initial slots below {initial}")
        mean, scale = tensors.pop("initial.mean"), tensors.pop("initial.scale", None)
        learned = {f"slot_encoder.attention.{name}": value for name, value in tensors.items()}
        if mean.shape[1] == 1 and scale is not None:
            return learned | {"slot_encoder.slot_mean": mean, "slot_encoder.slot_log_scale": scale}, {}
        if scale is not None and self.kind != "ocbench":
            raise UserError(
                f"initial slots of this checkpoint are drawn around {mean.shape[1]} means of their own: "
                "Spot draws them around a common one, or learns them without noise"
            )
        values = dict(slot_init="learned", truncation="bi_level", num_slots=mean.shape[1])
        return learned | {"slot_encoder.slot_embedding": mean[0]}, values

    def vit(self, prefix: str) -> dict[str, Tensor]:
        """The ViT. These models lack the final LayerNorm, on which no feature depends: it gets ones and zeros."""
        weights = self.under(prefix)
        for needed in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
            if needed not in weights:
                raise KeyError(prefix + needed)
        width = weights["cls_token"].shape[-1]
        return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)} | weights

    def mlp_decoder(self, layers: str, positions: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The four layers and positions of the MLP decoder, and the Config fields they decide."""
        learned = {}
        for number in (0, 2, 4, 6):
            learned |= self.layer(f"{layers}{number}", f"decoder.mlp.{number}")
        learned["decoder.positions"] = self.take(positions).flatten(0, -2)
        hidden = learned["decoder.mlp.0.weight"].shape[0]
        return learned, dict(decoder="mlp", orders="standard", mlp_slot_proj=False, dec_mlp_hidden=hidden)

    def projection(self, prefix: str, times: int) -> dict[str, Tensor]:
        """LayerNorm, and the MLP from features, of width D, through times · D to slot width."""
        learned = self.layer(f"{prefix}0", "slot_encoder.norm")
        learned |= self.layer(f"{prefix}1", "slot_encoder.mlp.0") | self.layer(f"{prefix}3", "slot_encoder.mlp.2")
        hidden, width = learned["slot_encoder.mlp.0.weight"].shape
        if hidden != times * width:
            raise UserError(
                f"the MLP on the features has {hidden} hidden channels: {self.kind} has {times * width}, so this is "
                "another model"
            )
        return learned

    def refuse_if_any(self) -> None:
        if self.state:
            names = ", ".join(sorted(self.state)[:4]) + (", …" if len(self.state) > 4 else "")
            raise UserError(
                f"this checkpoint of {self.kind} has {len(self.state)} tensors without a counterpart in Spot, "
                f"such as {names}: it belongs to another model"
            )


_Read = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], list[str]]


def _ocbench(remaining: _Remaining) -> _Read:
    for prefix in ("m.", "student."):  # ModelWrap, and SPOTDistill, whose teacher is left out
        if any(name.startswith(prefix) for name in remaining.state):
            remaining.strip(prefix, "teacher.")
    if "decode.norm0.weight" not in remaining.state or "decode.bos" not in remaining.state:
        raise UserError(
            "this checkpoint of ocbench lacks the nine-order transformer decoder of its SPOT "
            "(decode.bos, decode.norm0): its other models have no counterpart here"
        )
    prefix = "encode_backbone.1."  # module 0 resizes images
    vit, values = remaining.vit(prefix), {}
    learned, slots = remaining.slot_attention("aggregat.", "initializ.")
    frozen = (
        remaining.vit(prefix.replace("encode_backbone", "encode_backbone2"))
        if any(name.startswith("encode_backbone2") for name in remaining.state)
        else None
    )
    # A second backbone is the frozen teacher of the target features; the first one is then a student's.
    if frozen is not None:
        values["stage"] = 2
        learned |= _last_blocks(vit, frozen)
        vit = frozen
    learned |= remaining.layer("encode_project.0", "slot_encoder.norm")
    learned |= remaining.layer("encode_project.1", "slot_encoder.mlp.0")
    learned |= remaining.layer("encode_project.3", "slot_encoder.mlp.2")
    learned["decoder.bos"] = remaining.take("decode.bos").flatten(0, -2)
    for theirs, ours in (("project1", "input_proj"), ("project2", "slot_proj")):
        learned |= remaining.layer(f"decode.{theirs}.0", f"decoder.{ours}.0", bias=False)
        learned |= remaining.layer(f"decode.{theirs}.1", f"decoder.{ours}.1")
    # The number of decoder blocks shows only in their names.
    layer = re.compile(r"decode\.backbone\.layers\.(\d+)\.")
    blocks = 1 + max((int(match[1]) for name in remaining.state if (match := layer.match(name))), default=0)
    for number in range(blocks):
        learned |= _ocbench_block(remaining, number)
    width = learned["decoder.bos"].shape[-1]
    grid, patch = _grid(vit), vit["patch_embed.proj.weight"].shape[-1]
    values |= slots | dict(
        dec_blocks=blocks,
        dec_heads=4 if width < 768 else 6,
        dec_cross_heads=0,
        orders="spot9",
        image_size=grid * patch,
        pos_resize="timm",
        train_blocks=4,
    )
    return (
        values,
        learned,
        vit,
        [
            "OCBench brings images to 256 px and scales them by 0.875, bicubic; here they are resized at once to "
            f"{grid * patch} px",
            "its metrics differ, too: python -m spot_fast.evaluate --protocol ocbench",
        ],
    )


def _ocbench_block(remaining: _Remaining, number: int) -> dict[str, Tensor]:
    """PyTorch's TransformerDecoderLayer without biases, LayerNorm first; the first layer's LayerNorm is `norm0`."""
    theirs, ours = f"decode.backbone.layers.{number}", f"decoder.transformer.blocks.{number}"
    learned = remaining.layer("decode.norm0" if number == 0 else f"{theirs}.norm1", f"{ours}.norm_self")
    learned[f"{ours}.self_attention.project_qkv.weight"] = remaining.take(f"{theirs}.self_attn.in_proj_weight")
    learned |= remaining.layer(f"{theirs}.self_attn.out_proj", f"{ours}.self_attention.project_o", bias=False)
    learned |= remaining.layer(f"{theirs}.norm2", f"{ours}.norm_cross")
    thirds = remaining.take(f"{theirs}.multihead_attn.in_proj_weight").chunk(3)
    learned |= {
        f"{ours}.cross_attention.project_{letter}.weight": third for letter, third in zip("qkv", thirds, strict=True)
    }
    learned |= remaining.layer(f"{theirs}.multihead_attn.out_proj", f"{ours}.cross_attention.project_o", bias=False)
    learned |= remaining.layer(f"{theirs}.norm3", f"{ours}.norm_ffn")
    return (
        learned
        | remaining.layer(f"{theirs}.linear1", f"{ours}.ffn.0")
        | remaining.layer(f"{theirs}.linear2", f"{ours}.ffn.2")
    )


def _last_blocks(student: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's last four blocks; UserError if its encoder differs from the frozen one before them."""
    first = 1 + max(int(match[1]) for name in frozen if (match := re.match(r"blocks\.(\d+)\.", name))) - 4
    learned = {}
    for name, value in student.items():
        match = re.match(r"blocks\.(\d+)\.", name)
        if match and int(match[1]) >= first:
            learned[f"last_blocks.{int(match[1]) - first}.{name[match.end() :]}"] = value
        elif not name.startswith("norm.") and not torch.equal(value, frozen[name]):
            raise UserError(
                f"the student's encoder differs from the frozen one in {name}, before its last four blocks: "
                "spot_fast trains only these"
            )
    return learned


def _grid(vit: Mapping[str, Tensor]) -> int:
    """Patches per side of a ViT's position table, which may have a position for the class token too."""
    return int(vit["pos_embed"].shape[1] ** 0.5)


def _videosaur(remaining: _Remaining) -> _Read:
    if any(name.startswith("processor.module.") for name in remaining.state):
        raise UserError(
            "this is a video model of videosaur: its predictor carries slots from frame to frame, which "
            "Spot does not; slot attention alone loads with spot_kernels: SlotAttention.like('videosaur', "
            "…).load_variant('videosaur', state, prefix='processor.module.corrector.')"
        )
    if "decoder.mlp.layers.0.weight" not in remaining.state:
        raise UserError(
            "this checkpoint of videosaur has no MLP decoder (decoder.mlp): its other decoders have no counterpart here"
        )
    vit = remaining.vit("encoder.backbone.model.")
    learned, slots = remaining.slot_attention("processor.corrector.", "initializer.")
    learned |= remaining.projection("encoder.output_transform.layers.", 2)
    decoder, values = remaining.mlp_decoder("decoder.mlp.layers.", "decoder.pos_emb")
    return *_mlp_model(learned | decoder, values | slots, vit, pos_resize="timm"), []


def _dinosaur(remaining: _Remaining) -> _Read:
    remaining.strip("models.", "losses.", "training_metrics.", "evaluation_metrics.")
    if any(name.startswith("object_decoder.cond_transform.") for name in remaining.state):
        raise UserError(
            "this DINOSAUR has OCLF's autoregressive decoder, whose attention has biases and whose first "
            "block keeps the residual, which Spot's does not; slot attention alone loads with "
            "spot_kernels: SlotAttention.like('dinosaur', …).load_variant('dinosaur', state, prefix="
            "'models.perceptual_grouping.slot_attention.')"
        )
    vit = remaining.vit("feature_extractor.model.")
    learned, slots = remaining.slot_attention("perceptual_grouping.slot_attention.", "conditioning.")
    learned |= remaining.projection("perceptual_grouping.positional_embedding.layers.1.", 1)
    decoder, values = remaining.mlp_decoder("object_decoder.decoder.", "object_decoder.pos_embed")
    return *_mlp_model(learned | decoder, values | slots, vit, pos_resize="dino"), []


def _mlp_model(
    learned: dict[str, Tensor], values: dict[str, Any], vit: dict[str, Tensor], *, pos_resize: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    patch, tokens = vit["patch_embed.proj.weight"].shape[-1], learned["decoder.positions"].shape[0]
    values |= dict(image_size=round(tokens**0.5) * patch, pos_resize=pos_resize)
    if values.get("slot_init") == "learned":
        values["truncation"] = "none"  # these models learn slots without BO-QSA's bi-level gradients
    return values, learned, vit
