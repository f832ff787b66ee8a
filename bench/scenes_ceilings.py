"""What masks on the scenes preset can reach at best, and which part sets the limit: grid, features or clustering.

    python bench/scenes_ceilings.py [--images 200] [--encoder-weights FILE]

Rows, from the loosest bound to a plain baseline, each scored as a model's masks are:

- the ground truth rounded to grids of 8, 12 and 16 tokens a side;
- each token given to the nearest mean feature of a true object (labels used): what clusters of the features could be;
- k-means with the true count after a linear map that was trained with labels on the first half of the images, scored on
  the second: what features hold about instances;
- k-means with the true number of objects and the ground, and with as many clusters as the preset has slots.

Below: how much of the features' variance depends on the position alone, and how well a linear map reads the position.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness.tables import METRICS
from harness.token_ceiling import rounded, token_ceiling
from torch import Tensor, nn

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.evaluation.baselines import kmeans_labels
from spot_fast.evaluation.metrics import Scores, labels_from_soft
from spot_fast.model.encoder import normalise


def score(labels: Tensor, scenes: Scenes, first: int = 0) -> list[float]:
    """Token labels [B, N] of the scenes from `first` on → percent by metric."""
    masks = F.one_hot(labels, int(labels.max()) + 1).float()
    scores, part = Scores(), slice(first, first + len(labels))
    scores.add(
        labels_from_soft(masks, scenes.size),
        masks.shape[-1],
        scenes.instances[part].long(),
        scenes.classes[part].long(),
    )
    result = scores.result()
    return [100 * result[name] for name in METRICS]


def true_means(features: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """features [B, N, D], labels [B, N] → mean feature of each label [B, K, D] and whether there is one [B, K]."""
    member = F.one_hot(truth).to(features.dtype)
    count = member.sum(1)
    return member.mT @ features / count.clamp(min=1)[..., None], count > 0


def nearest(features: Tensor, means: Tensor, present: Tensor) -> Tensor:
    """The label [B, N] of the nearest present mean."""
    return torch.cdist(features, means).masked_fill(~present[:, None], float("inf")).argmin(-1)


def kmeans_true_count(features: Tensor, truth: Tensor) -> Tensor:
    """k-means of each image with as many clusters as it has labels."""
    counts, labels = torch.tensor([len(t.unique()) for t in truth]), torch.zeros_like(truth)
    for count in counts.unique():
        labels[counts == count] = kmeans_labels(features[counts == count], int(count))
    return labels


def probe(features: Tensor, truth: Tensor, width: int = 32, steps: int = 300) -> nn.Module:
    """A linear map under which tokens are near the mean of their own object; trained with labels."""
    torch.manual_seed(0)
    linear = nn.Linear(features.shape[-1], width)
    sharpness = nn.Parameter(torch.tensor(5.0))
    optimiser = torch.optim.Adam([*linear.parameters(), sharpness], lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(features), (16,))
        tokens = F.normalize(linear(features[chosen]), dim=-1)
        means, present = true_means(tokens, truth[chosen])
        logits = (sharpness * tokens @ means.mT).masked_fill(~present[:, None], -1e4)
        loss = F.cross_entropy(logits.flatten(0, 1), truth[chosen].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return linear.requires_grad_(False)


def about_position(features: Tensor) -> tuple[float, float]:
    """Share of the variance that depends on the position alone, and R² of a ridge regression of row and column."""
    spread = features - features.mean((0, 1))
    grid = round(features.shape[1] ** 0.5)
    line = torch.linspace(-0.5, 0.5, grid)
    place = torch.cartesian_prod(line, line).repeat(len(features), 1)
    inputs = torch.cat([features.flatten(0, 1), torch.ones(len(place), 1)], 1)
    weights = torch.linalg.solve(inputs.T @ inputs + 0.1 * torch.eye(inputs.shape[1]), inputs.T @ place)
    missed = (inputs @ weights - place).square().sum() / place.square().sum()
    return float(spread.mean(0).square().sum(-1).mean() / spread.square().sum(-1).mean()), float(1 - missed)


@torch.no_grad()
def features_of(scenes: Scenes, weights: str | None) -> Tensor:
    """The frozen features [B, N, D] that the decoder reconstructs."""
    encoder = frozen_encoder(preset("scenes", encoder_weights=weights))
    return torch.cat([encoder(normalise(part)) for part in scenes.images.split(32)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=200, metavar="N", help="first validation scenes (default: 200)")
    parser.add_argument("--encoder-weights", type=Path, metavar="FILE", help="instead of the packaged ones")
    args = parser.parse_args(argv)
    if args.images < 2:
        parser.error(f"--images is {args.images}: use 2 or more, of which the first half trains the probe")
    config = preset("scenes")
    scenes = Scenes(args.images, "val", size=config.image_size)
    features = features_of(scenes, args.encoder_weights and str(args.encoder_weights))
    truth = torch.stack(list(rounded(list(scenes.instances.long()), round(features.shape[1] ** 0.5))))
    unit = F.normalize(features, dim=-1)
    half = args.images // 2
    with torch.enable_grad():
        linear = probe(features[:half], truth[:half])
    rows = {
        f"ground truth on {grid} × {grid} tokens": [100 * value for value in token_ceiling(scenes, grid).values()]
        for grid in (8, 12, 16)
    }
    rows["nearest true mean"] = score(nearest(unit, *true_means(unit, truth)), scenes)
    rows["linear probe, k-means with the true count"] = score(
        kmeans_true_count(linear(features[half:]), truth[half:]), scenes, half
    )
    rows["k-means with the true count"] = score(kmeans_true_count(features, truth), scenes)
    rows[f"k-means, k = {config.num_slots}"] = score(kmeans_labels(features, config.num_slots), scenes)
    print("| masks | mBO_i | mBO_c | mIoU | FG-ARI |\n|---|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    share, read = about_position(features)
    print(f"\nposition: {100 * share:.0f} % of features' variance, R² {read:.3f} of a linear map; {len(scenes)} scenes")


if __name__ == "__main__":
    main()
