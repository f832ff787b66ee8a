"""Trains the packaged scenes encoder: a small ViT, by masked auto-encoding (He et al., 2022) of scenes.

    python -m spot_fast.pretrain                      # writes spot_fast/weights/scenes_vit.safetensors

Three quarters of the patches are hidden; the ViT sees the rest, and a shallow decoder predicts the hidden patches'
pixels. No label is used. Four things are not the original's:

- The decoder gets positions for the hidden patches only, so that the features of the visible ones must carry theirs:
  SPOT's decoder has no positions of its own, and without positions in the features its masks are blurred.
- Positions start as sines of a fixed amplitude. From small random ones the ViT first has to discover that there are
  positions, and until then it predicts mean colours.
- Pixels are predicted as they are, not normalised patch by patch: an object's colours are what it is known by.
- Matrices of the transformer blocks train with Muon.

The file holds float16 weights (under 3 MB) that load into timm's VisionTransformer.
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

_AMPLITUDE = 0.5  # of the positions in the ViT
_WARM_UP = 150  # steps


def sines(grid: int, width: int) -> Tensor:
    """Positions [1, grid², width]: sines and cosines of row and column, with wavelengths of 4 to 400 patches."""
    rates = 1.5 * 100 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)[None]


class MaskedAutoencoder(nn.Module):
    """`vit` with a decoder of `blocks` narrower transformer blocks. keep: fraction of the patches that it sees."""

    def __init__(self, vit: nn.Module, *, blocks: int = 2, width: int = 64, heads: int = 4, keep: float = 0.25) -> None:
        super().__init__()
        block = import_timm().models.vision_transformer.Block
        self.patch = vit.patch_embed.patch_size[0]
        self.vit, self.keep, self.tokens = vit, keep, vit.patch_embed.num_patches
        grid = vit.patch_embed.grid_size[0]
        with torch.no_grad():
            vit.pos_embed.zero_()
            vit.pos_embed[:, vit.num_prefix_tokens :] = _AMPLITUDE * sines(grid, vit.embed_dim)
        self.enter = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(sines(grid, width))
        self.blocks = nn.Sequential(*(block(width, heads, qkv_bias=True) for _ in range(blocks)))
        use_plain_attention([*vit.blocks, *self.blocks])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * self.patch**2)

    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the weights of the blocks' linear layers."""
        return [weight for part in (self.vit.blocks, self.blocks) for weight in part.parameters() if weight.dim() == 2]

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
        target = patches.gather(1, order[:, kept:, None].expand(-1, -1, patches.shape[-1]))
        return F.mse_loss(predicted.float(), target)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, 3, S, S], turned by a multiple of 90°, mirrored or not, with channels exchanged: the batch in one way.

    None of it makes a scene that could not have been drawn.
    """
    turns, mirror = (int(torch.randint(count, (1,), generator=generator)) for count in (4, 2))
    images = torch.rot90(images, turns, (2, 3))
    return (images.flip(3) if mirror else images)[:, torch.randperm(3, generator=generator)]


def pretrain(steps: int, batch: int, images: int, lr: float, seed: int) -> tuple[nn.Module, float]:
    """The trained ViT and its mean loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    config = preset("scenes")
    scenes = Scenes(images, "train", size=config.image_size).images
    model = MaskedAutoencoder(build_vit(config)).train()
    matrices = model.matrices()
    of_muon = set(matrices)
    others = [weight for weight in model.parameters() if weight not in of_muon]
    optimisers = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
        torch.optim.Muon(matrices, lr=3 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    peaks = [(group, group["lr"]) for optimiser in optimisers for group in optimiser.param_groups]
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    precision = resolve("auto", device)
    recent = []
    bar = tqdm(range(steps), disable=None, desc="masked auto-encoding")
    for step in bar:
        warm, done = min(1.0, (step + 1) / min(_WARM_UP, 0.2 * steps)), step / steps
        for group, peak in peaks:
            group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * done))
        chosen = torch.randint(len(scenes), (batch,), generator=generator)
        with autocast(precision, device):
            loss = model(normalise(varied(scenes[chosen], generator)), generator)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        for optimiser in optimisers:
            optimiser.step()
        recent.append(loss.item())  # a number: small tensors that stay would scatter the memory of every step
        if step % 50 == 49:
            mean = f"{sum(recent[-50:]) / 50:.4f}"
            bar.set_postfix(loss=mean)
            if bar.disable and step % 500 == 499:
                print(f"step {step + 1} of {steps}, loss {mean}", flush=True)
    last = recent[-max(1, steps // 10) :]
    return model.vit.eval(), sum(last) / len(last)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m spot_fast.pretrain",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=packaged_weights(), metavar="FILE", help="file to write")
    parser.add_argument("--steps", action=cli.Number, least=1, default=2500, help="training steps")
    parser.add_argument("--batch", action=cli.Number, least=1, default=64, help="scenes a step")
    parser.add_argument("--images", action=cli.Number, least=1, default=16384, help="scenes to train on")
    parser.add_argument(
        "--lr",
        action=cli.Number,
        least=0,
        type=float,
        metavar="X",
        default=1e-3,
        help="peak rate; Muon's: 3 ×",
    )
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
