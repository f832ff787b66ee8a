"""Trains the packaged scenes encoder: a small ViT, by masked auto-encoding (He et al., 2022) of scenes.

    python -m spot_fast.pretrain                      # writes spot_fast/weights/scenes_vit.safetensors

Three quarters of the patches are hidden; the ViT sees the rest, and a shallow decoder predicts the hidden patches'
pixels, each patch normalised by its own mean and deviation. No label is used. Unlike the original, the decoder gets
positions for the hidden patches only, so that the features of the visible ones must carry theirs: SPOT's decoder has no
positions of its own, and without positions in the features its masks are blurred. The file holds float16 weights (under
3 MB) that load into timm's VisionTransformer.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from spot_fast import cli
from spot_fast.checkpoints.encoder_weights import packaged_weights
from spot_fast.config import preset
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.errors import UserError
from spot_fast.files import atomic_write, writable_target
from spot_fast.model.encoder import normalise, use_plain_attention
from spot_fast.model.timm_import import import_timm
from spot_fast.model.vits import build_vit
from spot_fast.precision import autocast, resolve


class MaskedAutoencoder(nn.Module):
    """`vit` with a decoder of `blocks` narrower transformer blocks. keep: fraction of the patches that it sees."""

    def __init__(self, vit: nn.Module, *, blocks: int = 2, width: int = 64, heads: int = 4, keep: float = 0.25) -> None:
        super().__init__()
        block = import_timm().models.vision_transformer.Block
        self.patch = vit.patch_embed.patch_size[0]
        self.vit, self.keep, self.tokens = vit, keep, vit.patch_embed.num_patches
        self.enter = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, self.tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(block(width, heads, qkv_bias=True) for _ in range(blocks)))
        use_plain_attention([*vit.blocks, *self.blocks])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * self.patch**2)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised images [B, 3, S, S] → mean squared error of the hidden patches."""
        batch = len(images)
        prefix = self.vit.num_prefix_tokens
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        kept = max(1, round(self.keep * self.tokens))
        order = torch.rand(batch, self.tokens, generator=generator).argsort(1)
        seen = tokens[:, prefix:].gather(1, order[:, :kept, None].expand(-1, -1, tokens.shape[-1]))
        # The final LayerNorm belongs to this training alone: SPOT takes features before it.
        encoded = self.enter(self.vit.norm(self.vit.blocks(torch.cat([tokens[:, :prefix], seen], 1)))[:, prefix:])
        # Positions for the hidden patches only, see the module's docstring.
        hidden = (self.mask_token + self.positions).expand(batch, -1, -1)
        hidden = hidden.gather(1, order[:, kept:, None].expand(-1, -1, encoded.shape[-1]))
        full = torch.cat([encoded, hidden], 1)
        predicted = self.head(self.norm(self.blocks(full)[:, kept:]))
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        target = F.layer_norm(patches, patches.shape[-1:])
        target = target.gather(1, order[:, kept:, None].expand(-1, -1, target.shape[-1]))
        return F.mse_loss(predicted.float(), target)


def pretrain(steps: int, batch: int, images: int, lr: float, seed: int) -> tuple[nn.Module, float]:
    """The trained ViT and its mean loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    config = preset("scenes")
    scenes = Scenes(images, "train", size=config.image_size).images
    model = MaskedAutoencoder(build_vit(config)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    precision = resolve("auto", device)
    recent = []
    bar = tqdm(range(steps), disable=None, desc="masked auto-encoding")
    for step in bar:
        warm, done = min(1.0, (step + 1) / (0.05 * steps)), step / steps
        for group in optimiser.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        chosen = torch.randint(len(scenes), (batch,), generator=generator)
        with autocast(precision, device):
            loss = model(normalise(scenes[chosen]), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        recent.append(loss.detach())
        if step % 50 == 49:
            mean = f"{torch.stack(recent[-50:]).mean():.4f}"
            bar.set_postfix(loss=mean)
            if bar.disable and step % 500 == 499:
                print(f"step {step + 1} of {steps}, loss {mean}", flush=True)
    return model.vit.eval(), float(torch.stack(recent[-max(1, steps // 10) :]).mean())


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m spot_fast.pretrain",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=packaged_weights(), metavar="FILE", help="file to write")
    parser.add_argument("--steps", action=cli.Number, least=1, default=1500, help="training steps")
    parser.add_argument("--batch", action=cli.Number, least=1, default=128, help="scenes a step")
    parser.add_argument("--images", action=cli.Number, least=1, default=12288, help="scenes to train on")
    parser.add_argument("--lr", action=cli.Number, least=0, type=float, metavar="X", default=1e-3, help="peak rate")
    parser.add_argument("--seed", action=cli.Number, least=0, default=0, help="seed of weights and batches")
    return parser


@cli.command("nothing was written")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.lr == 0:
        raise UserError("--lr is 0: use a number above 0, such as 1e-3")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    writable_target("out", str(args.out))  # before the training, not after it
    start = time.monotonic()
    vit, loss = pretrain(args.steps, args.batch, args.images, args.lr, args.seed)
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss}: nothing is written, use a lower --lr than {args.lr}")
    state = {name: value.detach().half().contiguous() for name, value in vit.state_dict().items()}
    about = {"made_by": "spot_fast.pretrain", "steps": str(args.steps), "loss": f"{loss:.4f}"}
    atomic_write(args.out, lambda partial: partial.write_bytes(save(state, about)))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, loss {loss:.4f}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(cli.run(main))
