"""`SlotAttention`, whose options cover the published variants: `VARIANTS` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spot_kernels import dispatch
from spot_kernels.modules.initial_slots import InitialSlots
from spot_kernels.modules.layers import (
    ACTIVATIONS,
    check_choice,
    check_heads,
    gru_and_norm,
    gru_step,
    is_exactly,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    split_heads,
    step_with_eps_in_sum,
)
from spot_kernels.modules.name_maps import from_state_dict_of
from spot_kernels.slot_attention import slot_attention_step

TRUNCATIONS = ("none", "fixed_point", "bi_level")

_OCBENCH = {"eps": 1e-5, "eps_in": "sum", "activation": "gelu", "initial": "gaussian"}

# What `SlotAttention.like` sets; every option that is not named has the default of `SlotAttention`.
VARIANTS: dict[str, dict[str, Any]] = {
    # Locatello et al. 2020; Keras layer norms have eps 1e-3
    "locatello": {"norm_eps": 1e-3, "initial": "gaussian"},
    # a widely used PyTorch port of it
    "lucidrains": {"bias": True, "initial": "gaussian"},
    # its heads do not compete with one another; `like` sets the width of their projection and the scale
    "lucidrains_heads": {"bias": True, "joint_heads": False, "initial": "gaussian"},
    # other ports; the first one learned sigma before it learned its logarithm, the last one learns neither
    "evelinehong": {"bias": True, "initial": "gaussian"},
    "evelinehong_2021": {"bias": True, "initial": "gaussian", "spread": "abs"},
    "untitled_ai": {"initial": "gaussian"},
    # further ports: of Dittadi et al. 2022, with Keras's eps; in Sajjadi et al. 2022's OSRT; in Yang et al. 2021
    "object_centric_library": {"norm_eps": 1e-3, "initial": "gaussian"},
    "osrt": {"initial": "learned"},
    "motion_grouping": {"bias": True, "initial": "learned"},
    # Singh et al. 2021
    "slate": {"initial": "gaussian"},
    # Singh et al. 2022: the MLP runs between iterations only
    "steve": {"iterations": 2, "mlp_last": False, "initial": "gaussian"},
    # Seitzer et al. 2023, and what was built on its code: Zhao et al. 2023 (multiple object tracking) and Fan et al.
    # 2024, where a network after it drops slots; Didolkar et al. 2025 wrote it anew
    "dinosaur": {"initial": "gaussian"},
    "mot": {"initial": "gaussian"},
    "adaslot": {"initial": "gaussian"},
    "ftdinosaur": {"eps_in": "sum", "initial": "gaussian"},
    # Jia et al. 2023, and the Slot Attention that they compare it with
    "bo_qsa": {"eps": 1.0, "eps_in": "sum", "truncation": "bi_level", "drop_path": 0.2, "initial": "learned"},
    "bo_qsa_plain": {"initial": "slot_gaussian"},
    # Kipf et al. 2021, the corrector; Flax layer norms have eps 1e-6, several heads do not compete with one another
    "savi": {"iterations": 1, "eps_in": "sum", "norm_eps": 1e-6, "joint_heads": False},
    # the PyTorch SAVi of Wu et al. 2022
    "slotformer": {"iterations": 2, "eps": 1e-6},
    # Kakogeorgiou et al. 2024
    "spot": {"initial": "gaussian"},
    # Zadaianchuk et al. 2023
    "videosaur": {"hidden": "normed", "initial": "gaussian"},
    # Jiang et al. 2023, and Nguyen et al. 2026 after it; `like` sets the scale, which is that of one head
    "lsd": {"initial": "gaussian"},
    "coda": {"initial": "gaussian"},
    # the models of Zhao et al.'s OCBench, its SPOT among them
    "ocbench": _OCBENCH,
    # Zhao et al. 2025, who train with the attention of every iteration; Liu et al. 2025, without their codebook
    "dias": {**_OCBENCH, "attn_of": "every"},
    "metaslot": _OCBENCH,
}


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al., 2020, algorithm 1), by default as in SPOT, section 3.1.

    k and v are projections of LN(inputs), k scaled. Each iteration attends with q, a projection of LN(slots), feeds the
    updates to a GRU whose state is the slots, and adds an MLP of LN(slots).

        slot_attention = SlotAttention(768, 256, mlp_hidden=1024, initial="gaussian")
        slots, attn, logits = slot_attention(features, num_slots=7)  # features [B, N, 768], slots [B, 7, 256]

    `SlotAttention.like("dinosaur", …)` sets the options of a published variant, `load_variant` loads its parameters.

    Args:
        input_dim: width D of the inputs.
        slot_dim: width U of the slots.
        mlp_hidden: hidden width of the MLP; None: no MLP.
        heads: attention heads.
        iterations: number of refinements, at least 1; a call may override it.
        truncation: the way of the gradients. `none`: through all iterations; `fixed_point`: through the last one only;
            `bi_level`: as `fixed_point`, and straight through to the initial slots (BO-QSA).
        eps: keeps the mean over tokens defined.
        eps_in: `weights`: eps is added to the attention before it is normalised over tokens; `sum`: to its sum only.
        joint_heads: True: one softmax over heads × slots; False: one over the slots of each head.
        attn_of: the iterations whose attention and logits are returned, the `last` or `every` one (DIAS).
        inner_dim: width of q, k and v; None: slot_dim.
        out_dim: width of a projection, with bias, of the updates of all heads; None: no projection.
        bias: whether the projections to q, k and v have a bias.
        scale: factor of the logits; None: (inner_dim / heads)^-1/2.
        update: `gru`; or, without a GRU, the updates `replace` the slots or are added to them (`residual`).
        hidden: the state of the GRU: the `slots`, or the `normed` slots that q is projected from.
        activation: of the MLP, `relu` or `gelu`.
        mlp_norm: `pre`: slots + MLP(LN(slots)); `post`: LN(slots + MLP(slots)); `none`: slots + MLP(slots).
        mlp_residual: False: without the `slots +`.
        mlp_last: False: no MLP after the last iteration (STEVE).
        dropout: probability for hidden units of the MLP, in training (OCBench).
        drop_path: probability that a sample skips the MLP of an iteration, in training; the others are scaled up
            (BO-QSA).
        norm_eps: eps of every LayerNorm.
        initial: `gaussian`, `slot_gaussian` or `learned`: the module owns `InitialSlots`, as `initial`; None: initial
            slots are passed to each call.
        num_slots, spread, eval_noise: of `InitialSlots`.

    Raises:
        ValueError: naming the option that is unknown or does not fit the others.
    """

    def __init__(
        self,
        input_dim: int,
        slot_dim: int,
        *,
        mlp_hidden: int | None,
        heads: int = 1,
        iterations: int = 3,
        truncation: str = "none",
        eps: float = 1e-8,
        eps_in: str = "weights",
        joint_heads: bool = True,
        attn_of: str = "last",
        inner_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        update: str = "gru",
        hidden: str = "slots",
        activation: str = "relu",
        mlp_norm: str = "pre",
        mlp_residual: bool = True,
        mlp_last: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        initial: str | None = None,
        num_slots: int | None = None,
        spread: str = "exp",
        eval_noise: bool = True,
    ):
        super().__init__()
        inner_dim = inner_dim or slot_dim
        check_heads("heads", inner_dim, heads)
        _check_iterations(iterations)
        check_choice("truncation", truncation, TRUNCATIONS)
        check_choice("eps_in", eps_in, ("weights", "sum"))
        check_choice("attn_of", attn_of, ("last", "every"))
        check_choice("update", update, ("gru", "residual", "replace"))
        check_choice("hidden", hidden, ("slots", "normed"))
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("mlp_norm", mlp_norm, ("pre", "post", "none"))
        for name, probability in (("drop_path", drop_path), ("dropout", dropout)):
            if not 0 <= probability < 1:
                raise ValueError(f"{name}={probability} must be a probability below 1")
        if update != "gru" and (out_dim or inner_dim) != slot_dim:
            raise ValueError(
                f"update={update!r} needs updates as wide as the slots, {slot_dim}: inner_dim is {inner_dim}, "
                f"out_dim {out_dim}"
            )
        self.heads, self.iterations, self.truncation, self.eps = heads, iterations, truncation, eps
        self.eps_in, self.joint_heads, self.update = eps_in, joint_heads or heads == 1, update
        self.hidden, self.attn_of = hidden, attn_of
        self.mlp_norm, self.mlp_residual, self.mlp_last = mlp_norm, mlp_residual, mlp_last
        self.drop_path = drop_path
        self.scale = (inner_dim // heads) ** -0.5 if scale is None else scale
        self.norm_inputs = nn.LayerNorm(input_dim, eps=norm_eps)
        self.norm_slots = nn.LayerNorm(slot_dim, eps=norm_eps)
        self.norm_mlp = None if mlp_hidden is None or mlp_norm == "none" else nn.LayerNorm(slot_dim, eps=norm_eps)
        self.project_q = linear(slot_dim, inner_dim, bias=bias)
        self.project_k = linear(input_dim, inner_dim, bias=bias)
        self.project_v = linear(input_dim, inner_dim, bias=bias)
        self.project_out = None if out_dim is None else linear(inner_dim, out_dim)
        self.gru = nn.GRUCell(out_dim or inner_dim, slot_dim) if update == "gru" else None
        if self.gru is not None:
            nn.init.xavier_uniform_(self.gru.weight_ih)
            nn.init.orthogonal_(self.gru.weight_hh)
            nn.init.zeros_(self.gru.bias_ih)
            nn.init.zeros_(self.gru.bias_hh)
        self.mlp = None
        if mlp_hidden is not None:
            self.mlp = mlp(slot_dim, mlp_hidden, slot_dim, activation=activation, dropout=dropout)
        self.initial = None
        if initial is not None:
            self.initial = InitialSlots(slot_dim, initial, num_slots=num_slots, spread=spread, eval_noise=eval_noise)

    @classmethod
    def like(
        cls, variant: str, input_dim: int, slot_dim: int, *, mlp_hidden: int | None, **options: Any
    ) -> SlotAttention:
        """The module with the options of a published variant.

        Args:
            variant: one of `VARIANTS`.
            options: of the constructor, before those of the variant. Widths, heads and the number of slots are always
                the caller's, as they differ between checkpoints.

        Raises:
            ValueError: for an unknown variant, or as the constructor.
        """
        check_choice("variant", variant, VARIANTS)
        options = {**VARIANTS[variant], **options}
        heads = options.get("heads", 1)
        if variant == "savi" and heads > 1:
            # heads are concatenated, then projected to the width of one
            options.setdefault("out_dim", (options.get("inner_dim") or slot_dim) // heads)
        if variant == "lucidrains_heads":
            options.setdefault("out_dim", slot_dim)
        if variant in ("lucidrains_heads", "lsd", "coda"):
            options.setdefault("scale", slot_dim**-0.5)
        module = cls(input_dim, slot_dim, mlp_hidden=mlp_hidden, **options)
        if variant == "untitled_ai" and module.initial is not None:
            # they are buffers in the published class
            module.initial.requires_grad_(False)
        return module

    def load_variant(
        self, variant: str, state: Mapping[str, Any], *, prefix: str = "", initial_prefix: str | None = None
    ) -> None:
        """Loads the parameters of a published implementation by its own names, see `from_state_dict_of`.

        Raises:
            ValueError: naming the parameters, those of the module's `initial` included, that are unknown, missing or
                of another shape.
        """
        loaded = from_state_dict_of(variant, state, prefix=prefix, initial_prefix=initial_prefix)
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"{variant} state does not fit this module's options: missing {', '.join(missing) or 'nothing'}; "
                f"unexpected {', '.join(unknown) or 'nothing'}"
            )
        for name, value in loaded.items():
            if value.shape != own[name].shape:
                raise ValueError(f"{variant} state: {name} {tuple(value.shape)} must be {tuple(own[name].shape)}")
        self.load_state_dict(loaded)

    def forward(
        self,
        inputs: torch.Tensor,
        slots: torch.Tensor | None = None,
        *,
        num_slots: int | None = None,
        iterations: int | None = None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Groups inputs [B, N, D] into slots.

        Args:
            slots: initial slots [B, K, U]; None: the module's `initial` makes them.
            num_slots, noise: for `initial`, see `InitialSlots`.
            iterations: instead of the module's.

        Returns:
            slots [B, K, U]; attention [B, N, K], summed over heads (averaged if each has its own softmax); logits
            [B, H, N, K]. Attention and logits are those of the last iteration, before its update; with
            attn_of="every" those of all I iterations, [B, I, N, K] and [B, I, H, N, K].

        Raises:
            ValueError: if there are no initial slots, or both `slots` and what would make them.
        """
        slots = self._initial(inputs.shape[0], slots, num_slots, noise)
        iterations = self.iterations if iterations is None else iterations
        _check_iterations(iterations)
        inputs = layer_norm(self.norm_inputs, inputs)
        k, v = map(self._split, self._keys_values(inputs))
        initial = slots
        every, earlier = self.attn_of == "every", []
        # Truncated gradients reach these iterations through their attention only: if it is not returned, no graph is
        # built.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.truncation == "none" or every)):
            for _ in range(iterations - 1):
                slots, *attention = self._refine(k, v, slots, last=False)
                earlier.append(attention)
        if self.truncation != "none":
            slots = slots.detach()
        if self.truncation == "bi_level":
            # Straight through: adds 0, and sends the gradient of the last iteration's input to the initial slots.
            slots = slots + (initial - initial.detach())
        slots, *attention = self._refine(k, v, slots, last=True)
        if not every:
            return slots, *attention
        attn, logits = (torch.stack(each, dim=1) for each in zip(*earlier, attention, strict=True))
        return slots, attn, logits

    def _initial(
        self, batch: int, slots: torch.Tensor | None, num_slots: int | None, noise: torch.Tensor | None
    ) -> torch.Tensor:
        if slots is None:
            if self.initial is None:
                raise ValueError("slot attention: pass initial slots, or build the module with initial=…")
            return self.initial(batch, num_slots, noise=noise)
        if num_slots is not None or noise is not None:
            raise ValueError("slot attention: slots were passed, so num_slots and noise have no effect: drop them")
        return slots

    def _keys_values(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, scaled, and v of normed inputs, [B, N, inner] each.

        One product instead of two, if both layers are no more than PyTorch's own: inputs are read once each way, and
        their gradient is not a sum of two. The scale goes into the weights, which are fewer than the keys; a power of
        two, as for 64 or 256 channels a head, changes no bit of the result.
        """
        k, v = self.project_k, self.project_v
        if not (dispatch.uses("joined_projections") and is_exactly(k, nn.Linear) and is_exactly(v, nn.Linear)):
            return k(inputs) * self.scale, v(inputs)
        weight = torch.cat((k.weight * self.scale, v.weight))
        bias = None if k.bias is None else torch.cat((k.bias * self.scale, v.bias))
        return F.linear(inputs, weight, bias).chunk(2, -1)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, inner] → [B, H, N, d], or [B·H, 1, N, d] if each head has its own softmax."""
        tokens = split_heads(tokens, self.heads)
        return tokens if self.joint_heads else tokens.flatten(0, 1).unsqueeze(1)

    def _refine(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One iteration → slots, attn, logits; k (scaled) and v as from `_split`; attn and logits may be None."""
        updates, attn, logits = self._attend(k, v, slots, maps=last or self.attn_of == "every")
        if self.project_out is not None:
            updates = self.project_out(updates)
        if self.hidden == "normed":
            slots = self.norm_slots(slots)
        return self._update(updates, slots, self.mlp is not None and (self.mlp_last or not last)), attn, logits

    def _attend(
        self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, maps: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        q = self._split(self.project_q(self.norm_slots(slots)))
        step = step_with_eps_in_sum if self.eps_in == "sum" else slot_attention_step
        updates, attn, logits = step(q, k, v, eps=self.eps, return_attn=maps, return_logits=maps)
        if not self.joint_heads:
            size = (slots.shape[0], self.heads)
            updates = updates.squeeze(1).unflatten(0, size)
            if maps:
                attn, logits = attn.unflatten(0, size).mean(1), logits.squeeze(1).unflatten(0, size)
        return merge_heads(updates), attn if maps else None, logits if maps else None

    def _update(self, updates: torch.Tensor, slots: torch.Tensor, with_mlp: bool) -> torch.Tensor:
        pre, normed = with_mlp and self.mlp_norm == "pre", None
        if self.gru is None:
            slots = updates if self.update == "replace" else slots + updates
        elif pre:
            slots, normed = gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        else:
            slots = gru_step(self.gru, updates, slots)
        if not with_mlp:
            return slots
        if pre and normed is None:
            normed = self.norm_mlp(slots)
        change = self.mlp(normed if pre else slots)
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            change = change * (change.new_empty(change.shape[0], 1, 1).bernoulli_(keep) / keep)
        slots = slots + change if self.mlp_residual else change
        return self.norm_mlp(slots) if self.mlp_norm == "post" else slots


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: slot attention needs at least one")
