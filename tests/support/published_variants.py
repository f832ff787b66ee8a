"""Slot attention as published, from the formulas, with the parameter names of each public implementation.

Each function takes a state dict `p` by those names, inputs [B, N, D] and initial slots [B, K, U] and gives the slots
and the attention of the last iteration, [B, H, K, N]. Nothing here comes from spot_kernels: these are what it is
compared with.
"""

import torch
import torch.nn.functional as F

BATCH, TOKENS, WIDTH, SLOTS, SLOT_WIDTH, HIDDEN = 8, 25, 12, 5, 16, 20


def normed(x, p, name, eps=1e-5, weight="weight", bias="bias"):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.{weight}"], p[f"{name}.{bias}"], eps)


def dense(x, p, name):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def gru(x, h, p, name="gru"):
    """PyTorch's GRU cell (Cho et al., 2014, reset after the product)."""
    from_x = (x @ p[f"{name}.weight_ih"].T + p[f"{name}.bias_ih"]).chunk(3, -1)
    from_h = (h @ p[f"{name}.weight_hh"].T + p[f"{name}.bias_hh"]).chunk(3, -1)
    return gated(h, *from_x, *from_h)


def gated(h, x_r, x_z, x_n, h_r, h_z, h_n):
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return (1 - z) * torch.tanh(x_n + r * h_n) + z * h


def heads_of(x, heads):
    """[B, N, H·d] → [B, H, N, d]"""
    return x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)


def joint_softmax(logits):
    """Over heads and slots together: [B, H, K, N]."""
    exponents = (logits - logits.amax((1, 2), keepdim=True)).exp()
    return exponents / exponents.sum((1, 2), keepdim=True)


def weighted_mean(attn, v, eps):
    weights = attn + eps
    return concatenated((weights / weights.sum(-1, keepdim=True)) @ v)


def mean_over_sum(attn, v, eps):
    return concatenated((attn / (attn.sum(-1, keepdim=True) + eps)) @ v)


def concatenated(x):
    return x.permute(0, 2, 1, 3).flatten(2)


def slate(
    p,
    inputs,
    slots,
    *,
    heads=1,
    iterations=3,
    mlp_last=True,
    mean=weighted_mean,
    eps=1e-8,
    features="norm_inputs",
    scale=None,
):
    """SLATE; STEVE has one head and no MLP after the last iteration. scale: of the logits."""
    x = normed(inputs, p, features)
    k, v = (heads_of(dense(x, p, f"project_{name}"), heads) for name in "kv")
    for i in range(iterations):
        q = heads_of(dense(normed(slots, p, "norm_slots"), p, "project_q"), heads)
        attn = joint_softmax(q @ k.mT * (scale or k.shape[-1] ** -0.5))
        slots = gru(mean(attn, v, eps), slots, p)
        if mlp_last or i < iterations - 1:
            slots = slots + dense(dense(normed(slots, p, "norm_mlp"), p, "mlp.0").relu(), p, "mlp.2")
    return slots, attn


def steve(p, inputs, slots, **settings):
    return slate(p, inputs, slots, mlp_last=False, **{"iterations": 2} | settings)


def truncated(step, slots, iterations, truncation):
    """BO-QSA's gradient rule around a function of one iteration."""
    first = slots
    for i in range(iterations):
        if i == iterations - 1 and truncation != "none":
            slots = slots.detach()
            if truncation == "bi_level":
                slots = slots + first - first.detach()
        slots, attn = step(slots)
    return slots, attn


def bo_qsa(p, inputs, slots, *, iterations=3, truncation="bi_level", eps=1.0):
    def step(slots):
        return slate(p, inputs, slots, iterations=1, mean=mean_over_sum, eps=eps, features="norm_feature")

    return truncated(step, slots, iterations, truncation)


def spot(p, inputs, slots, *, heads=1, iterations=3, truncation="none"):
    return truncated(lambda slots: slate(p, inputs, slots, heads=heads, iterations=1), slots, iterations, truncation)


def lucidrains(p, inputs, slots, *, iterations=3):
    x = normed(inputs, p, "norm_input")
    k, v = dense(x, p, "to_k"), dense(x, p, "to_v")
    for _ in range(iterations):
        q = dense(normed(slots, p, "norm_slots"), p, "to_q")
        attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(1)[:, None]
        slots = gru(weighted_mean(attn, v[:, None], 1e-8), slots, p)
        slots = slots + dense(dense(normed(slots, p, "norm_pre_ff"), p, "mlp.0").relu(), p, "mlp.2")
    return slots, attn


def evelinehong(p, inputs, slots, *, iterations=3):
    """The layers of the MLP are called fc1 and fc2."""
    mlp = {name.replace("fc1", "mlp.0").replace("fc2", "mlp.2"): value for name, value in p.items()}
    return lucidrains(mlp, inputs, slots, iterations=iterations)


def lucidrains_heads(p, inputs, slots, *, heads=2, iterations=3):
    """Every head has its own softmax, the logits of all are scaled as one of the slots' width."""
    x = normed(inputs, p, "norm_input")
    k, v = (heads_of(dense(x, p, name), heads) for name in ("to_k", "to_v"))
    for _ in range(iterations):
        q = heads_of(dense(normed(slots, p, "norm_slots"), p, "to_q"), heads)
        attn = (q @ k.mT * SLOT_WIDTH**-0.5).softmax(2)
        slots = gru(dense(weighted_mean(attn, v, 1e-8), p, "combine_heads"), slots, p)
        slots = slots + dense(dense(normed(slots, p, "norm_pre_ff"), p, "mlp.0").relu(), p, "mlp.2")
    return slots, attn


def lsd(p, inputs, slots, *, heads=1, truncation="none"):
    def step(slots):
        return slate(p, inputs, slots, heads=heads, iterations=1, scale=SLOT_WIDTH**-0.5)

    return truncated(step, slots, 3, truncation)


def bo_qsa_plain(p, inputs, slots):
    return slate(p, inputs, slots, features="norm_feature")


def ftdinosaur(p, inputs, slots, *, heads=1):
    return dinosaur(p, inputs, slots, heads=heads, mean=mean_over_sum)


def dinosaur(p, inputs, slots, *, heads=1, iterations=3, mean=weighted_mean):
    x = normed(inputs, p, "norm_input")
    k, v = (heads_of(dense(x, p, name), heads) for name in ("to_k", "to_v"))
    for _ in range(iterations):
        q = heads_of(dense(normed(slots, p, "norm_slots"), p, "to_q"), heads)
        attn = joint_softmax(q @ k.mT * k.shape[-1] ** -0.5)
        slots = gru(mean(attn, v, 1e-8), slots, p)
        if "ff_mlp.module.1.weight" in p:
            hidden = dense(normed(slots, p, "ff_mlp.module.0"), p, "ff_mlp.module.1").relu()
            slots = slots + dense(hidden, p, "ff_mlp.module.3")
    return slots, attn


def slotformer(p, inputs, slots, *, iterations=2):
    x = normed(inputs, p, "norm_inputs")
    k, v = dense(x, p, "project_k"), dense(x, p, "project_v")
    for _ in range(iterations):
        q = dense(normed(slots, p, "project_q.0"), p, "project_q.1")
        attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(1)[:, None]
        slots = gru(weighted_mean(attn, v[:, None], 1e-6), slots, p)
        slots = slots + dense(dense(normed(slots, p, "mlp.0"), p, "mlp.1").relu(), p, "mlp.3")
    return slots, attn


def videosaur(p, inputs, slots, *, iterations=3):
    """The GRU goes on from the normalised slots."""
    x = normed(inputs, p, "norm_features")
    k, v = dense(x, p, "to_k"), dense(x, p, "to_v")
    for _ in range(iterations):
        slots = normed(slots, p, "norm_slots")
        q = dense(slots, p, "to_q")
        attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(1)[:, None]
        slots = gru(weighted_mean(attn, v[:, None], 1e-8), slots, p)
        hidden = dense(normed(slots, p, "mlp.layers.0"), p, "mlp.layers.1").relu()
        slots = slots + dense(hidden, p, "mlp.layers.3")
    return slots, attn


def ocbench(p, inputs, slots, *, iterations=3):
    x = normed(inputs, p, "norm1kv")
    k, v = dense(x, p, "proj_k"), dense(x, p, "proj_v")
    for _ in range(iterations):
        q = dense(normed(slots, p, "norm1q"), p, "proj_q")
        attn = (q @ k.mT * q.shape[-1] ** -0.5).softmax(1)[:, None]
        slots = gru(mean_over_sum(attn, v[:, None], 1e-5), slots, p, "rnn")
        last = "ffn.3" if "ffn.3.weight" in p else "ffn.2"
        slots = slots + dense(F.gelu(dense(normed(slots, p, "norm2"), p, "ffn.0")), p, last)
    return slots, attn


def locatello(p, inputs, slots, *, iterations=3):
    """The original in TensorFlow: weights are [in, out], the GRU's gates update, reset, candidate."""
    keras = {"eps": 1e-3, "weight": "gamma", "bias": "beta"}
    x = normed(inputs, p, "norm_inputs", **keras)
    k, v = x @ p["project_k.kernel"], x @ p["project_v.kernel"]
    for _ in range(iterations):
        q = normed(slots, p, "norm_slots", **keras) @ p["project_q.kernel"] * slots.shape[-1] ** -0.5
        attn = (k @ q.mT).softmax(-1).mT[:, None]
        updates = weighted_mean(attn, v[:, None], 1e-8)
        x_z, x_r, x_n = (updates @ p["gru.kernel"] + p["gru.bias"][0]).chunk(3, -1)
        h_z, h_r, h_n = (slots @ p["gru.recurrent_kernel"] + p["gru.bias"][1]).chunk(3, -1)
        slots = gated(slots, x_r, x_z, x_n, h_r, h_z, h_n)
        first, second = "mlp.layer_with_weights-0", "mlp.layer_with_weights-1"
        hidden = (normed(slots, p, "norm_mlp", **keras) @ p[f"{first}.kernel"] + p[f"{first}.bias"]).relu()
        slots = slots + hidden @ p[f"{second}.kernel"] + p[f"{second}.bias"]
    return slots, attn


def savi(p, inputs, slots, *, iterations=1):
    """SAVi's corrector in Flax: every head has its own softmax, eps is added to the sum, projections are [in, H, d]."""
    flax = {"eps": 1e-6, "weight": "scale"}
    x = normed(inputs, p, "LayerNorm_1", **flax)
    k, v = (torch.einsum("bnc,chd->bhnd", x, p[f"general_dense_{name}_0.kernel"]) for name in "kv")
    for _ in range(iterations):
        q = torch.einsum("bnc,chd->bhnd", normed(slots, p, "LayerNorm_0", **flax), p["general_dense_q_0.kernel"])
        attn = (q / q.shape[-1] ** 0.5 @ k.mT).softmax(2)
        updates = mean_over_sum(attn, v, 1e-8)
        if q.shape[1] > 1:
            name = "InvertedDotProductAttention_0.DenseGeneral_0"
            updates = updates @ p[f"{name}.kernel"].flatten(0, 1) + p[f"{name}.bias"]
        cell = {gate: p[f"GRU_0.GRUCell_0.{gate}.kernel"] for gate in ("ir", "iz", "in", "hr", "hz", "hn")}
        bias = {gate: p[f"GRU_0.GRUCell_0.{gate}.bias"] for gate in ("ir", "iz", "in", "hn")}
        from_x = [updates @ cell[gate] + bias[gate] for gate in ("ir", "iz", "in")]
        slots = gated(slots, *from_x, slots @ cell["hr"], slots @ cell["hz"], slots @ cell["hn"] + bias["hn"])
        if "MLP_0.dense_mlp_0.kernel" in p:
            hidden = normed(slots, p, "MLP_0.LayerNorm_0", **flax) @ p["MLP_0.dense_mlp_0.kernel"]
            hidden = (hidden + p["MLP_0.dense_mlp_0.bias"]).relu()
            slots = slots + hidden @ p["MLP_0.dense_mlp_1.kernel"] + p["MLP_0.dense_mlp_1.bias"]
    return slots, attn


def norm_shapes(name, width, weight="weight", bias="bias"):
    return {f"{name}.{weight}": (width,), f"{name}.{bias}": (width,)}


def dense_shapes(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def gru_shapes(inputs=SLOT_WIDTH, width=SLOT_WIDTH):
    return {
        "gru.weight_ih": (3 * width, inputs),
        "gru.weight_hh": (3 * width, width),
        "gru.bias_ih": (3 * width,),
        "gru.bias_hh": (3 * width,),
    }


def torch_shapes(names, inner=SLOT_WIDTH, width=WIDTH, bias=False, with_mlp=True):
    """names: of norm_inputs, norm_slots, q, k, v, norm_mlp and the MLP's two layers."""
    norm_inputs, norm_slots, q, k, v, norm_mlp, first, second = names
    shapes = {
        **norm_shapes(norm_inputs, width),
        **norm_shapes(norm_slots, SLOT_WIDTH),
        **dense_shapes(q, SLOT_WIDTH, inner, bias),
        **dense_shapes(k, width, inner, bias),
        **dense_shapes(v, width, inner, bias),
        **gru_shapes(inner),
    }
    if with_mlp:
        shapes |= norm_shapes(norm_mlp, SLOT_WIDTH) | dense_shapes(first, SLOT_WIDTH, HIDDEN)
        shapes |= dense_shapes(second, HIDDEN, SLOT_WIDTH)
    return shapes


def heads_shapes(inner):
    """lucidrains' heads: 16 wide outside, `inner` in all."""
    names = (*_LUCIDRAINS, "norm_pre_ff", "mlp.0", "mlp.2")
    shapes = torch_shapes(names, inner=inner, width=SLOT_WIDTH, bias=True) | gru_shapes()
    return shapes | dense_shapes("combine_heads", inner, SLOT_WIDTH)


def keras_shapes():
    u, d = SLOT_WIDTH, WIDTH
    shapes = {"project_q.kernel": (u, u), "project_k.kernel": (d, u), "project_v.kernel": (d, u)}
    for name, width in (("norm_inputs", d), ("norm_slots", u), ("norm_mlp", u)):
        shapes |= norm_shapes(name, width, "gamma", "beta")
    for i, (inputs, outputs) in enumerate(((u, HIDDEN), (HIDDEN, u))):
        name = f"mlp.layer_with_weights-{i}"
        shapes |= {f"{name}.kernel": (inputs, outputs), f"{name}.bias": (outputs,)}
    return shapes | {"gru.kernel": (u, 3 * u), "gru.recurrent_kernel": (u, 3 * u), "gru.bias": (2, 3 * u)}


def flax_shapes(heads=1, with_mlp=False):
    u, d, width = SLOT_WIDTH, WIDTH, SLOT_WIDTH // heads
    shapes = {f"general_dense_{name}_0.kernel": (u if name == "q" else d, heads, width) for name in "qkv"}
    shapes |= norm_shapes("LayerNorm_0", u, "scale") | norm_shapes("LayerNorm_1", d, "scale")
    if heads > 1:
        name = "InvertedDotProductAttention_0.DenseGeneral_0"
        shapes |= {f"{name}.kernel": (heads, width, width), f"{name}.bias": (width,)}
    for gate in ("ir", "iz", "in", "hr", "hz", "hn"):
        shapes[f"GRU_0.GRUCell_0.{gate}.kernel"] = (width if gate[0] == "i" else u, u)
        if gate not in ("hr", "hz"):
            shapes[f"GRU_0.GRUCell_0.{gate}.bias"] = (u,)
    if with_mlp:
        shapes |= norm_shapes("MLP_0.LayerNorm_0", u, "scale")
        shapes |= {"MLP_0.dense_mlp_0.kernel": (u, HIDDEN), "MLP_0.dense_mlp_0.bias": (HIDDEN,)}
        shapes |= {"MLP_0.dense_mlp_1.kernel": (HIDDEN, u), "MLP_0.dense_mlp_1.bias": (u,)}
    return shapes


_SLATE = ("norm_inputs", "norm_slots", "project_q", "project_k", "project_v", "norm_mlp", "mlp.0", "mlp.2")
_LUCIDRAINS = ("norm_input", "norm_slots", "to_q", "to_k", "to_v")
_EVELINEHONG = torch_shapes((*_LUCIDRAINS, "norm_pre_ff", "fc1", "fc2"), width=SLOT_WIDTH, bias=True)
_DINOSAUR = (*_LUCIDRAINS, "ff_mlp.module.0", "ff_mlp.module.1", "ff_mlp.module.3")
_SLOTFORMER = ("norm_inputs", "project_q.0", "project_q.1", "project_k", "project_v", "mlp.0", "mlp.1", "mlp.3")
_VIDEOSAUR = ("norm_features", "norm_slots", "to_q", "to_k", "to_v", "mlp.layers.0", "mlp.layers.1", "mlp.layers.3")
_OCBENCH = ("norm1kv", "norm1q", "proj_q", "proj_k", "proj_v", "norm2", "ffn.0", "ffn.2")
# Published formula, its state dict, the options of our module beyond those of the variant, the formula's settings.
CASES = {
    "locatello": (locatello, keras_shapes(), {}, {}),
    "lucidrains": (
        lucidrains,
        torch_shapes((*_LUCIDRAINS, "norm_pre_ff", "mlp.0", "mlp.2"), width=SLOT_WIDTH, bias=True),
        {},
        {},
    ),
    "lucidrains_heads": (lucidrains_heads, heads_shapes(24), {"heads": 2, "inner_dim": 24}, {}),
    "evelinehong": (evelinehong, _EVELINEHONG, {}, {}),
    "evelinehong_2021": (evelinehong, _EVELINEHONG, {}, {}),
    "untitled_ai": (slate, torch_shapes(_SLATE, width=SLOT_WIDTH), {}, {}),
    "lsd": (lsd, torch_shapes(_SLATE), {}, {}),
    "lsd, 4 heads, bi-level": (
        lsd,
        torch_shapes(_SLATE),
        {"heads": 4, "truncation": "bi_level"},
        {"heads": 4, "truncation": "bi_level"},
    ),
    "slate": (slate, torch_shapes(_SLATE), {}, {}),
    "slate, 4 heads": (slate, torch_shapes(_SLATE), {"heads": 4}, {"heads": 4}),
    "steve": (steve, torch_shapes(_SLATE), {}, {}),
    "dinosaur": (dinosaur, torch_shapes(_DINOSAUR), {}, {}),
    "dinosaur, 2 heads of 12, biases": (
        dinosaur,
        torch_shapes(_DINOSAUR, inner=24, bias=True),
        {"heads": 2, "inner_dim": 24, "bias": True},
        {"heads": 2},
    ),
    "dinosaur without MLP": (dinosaur, torch_shapes(_DINOSAUR, with_mlp=False), {"mlp_hidden": None}, {}),
    "ftdinosaur": (ftdinosaur, torch_shapes(_DINOSAUR), {}, {}),
    "ftdinosaur, 2 heads": (ftdinosaur, torch_shapes(_DINOSAUR), {"heads": 2}, {"heads": 2}),
    "bo_qsa_plain": (bo_qsa_plain, torch_shapes(("norm_feature", *_SLATE[1:]), width=SLOT_WIDTH), {}, {}),
    "bo_qsa": (
        bo_qsa,
        torch_shapes(("norm_feature", *_SLATE[1:]), width=SLOT_WIDTH),
        {"initial": None, "drop_path": 0.0},
        {},
    ),
    "savi": (savi, flax_shapes(), {"mlp_hidden": None}, {}),
    "savi, 2 heads, MLP, 2 iterations": (savi, flax_shapes(2, True), {"heads": 2, "iterations": 2}, {"iterations": 2}),
    "slotformer": (slotformer, torch_shapes(_SLOTFORMER), {}, {}),
    "spot": (spot, torch_shapes(_SLATE), {}, {}),
    "spot, bi-level": (spot, torch_shapes(_SLATE), {"truncation": "bi_level"}, {"truncation": "bi_level"}),
    "videosaur": (videosaur, torch_shapes(_VIDEOSAUR), {}, {}),
    "ocbench": (
        ocbench,
        {name.replace("gru.", "rnn."): shape for name, shape in torch_shapes(_OCBENCH).items()},
        {},
        {},
    ),
    "ocbench, dropout in the MLP": (
        ocbench,
        {name.replace("gru.", "rnn."): shape for name, shape in torch_shapes((*_OCBENCH[:-1], "ffn.3")).items()},
        {},
        {},
    ),
    "spot, fixed point": (spot, torch_shapes(_SLATE), {"truncation": "fixed_point"}, {"truncation": "fixed_point"}),
}


def random_state(shapes, seed=0):
    """Values of the size that trained parameters have: no layer is idle, no gate saturated."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 + (len(shape) == 1) * 0.3)
        for name, shape in shapes.items()
    }
