"""Protects `--adaptive-slots`: which slots are joined, and that every use of masks joins them alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spot_fast.model.adaptive_slots import joined, slot_groups
from spot_fast.training.trainer import Trainer
from tiny_runs import CPU, tiny


def written_out(masks: torch.Tensor, features: torch.Tensor, share: float) -> list[int]:
    """One image: joins the pair whose union explains least less, computed from the sums of squares themselves."""
    masks, features = masks.double(), features.double()
    slots = masks.shape[1]
    members = {slot: [slot] for slot in range(slots)}

    def unexplained(group: list[int]) -> float:
        weight = masks[:, group].sum(1)
        mean = (weight[:, None] * features).sum(0) / weight.sum()
        return float((weight * (features - mean).square().sum(1)).sum())

    limit = share * float((features - features.mean(0)).square().sum())
    while len(members) > 1:
        pairs = [(i, j) for i in members for j in members if i < j]
        costs = [
            unexplained(members[i] + members[j]) - unexplained(members[i]) - unexplained(members[j]) for i, j in pairs
        ]
        best = min(range(len(pairs)), key=costs.__getitem__)
        if costs[best] > limit:
            break
        i, j = pairs[best]
        members[i] += members.pop(j)
    return [next(i for i, group in members.items() if slot in group) for slot in range(slots)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.2, 2.0])
def test_groups_are_those_of_a_loop_over_sums_of_squares(share):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 30, 8, generator=generator) + 5
    masks = (3 * torch.randn(6, 30, 5, generator=generator)).softmax(-1)
    groups = slot_groups(masks, features, share)
    assert groups.tolist() == [written_out(m, f, share) for m, f in zip(masks, features, strict=True)]


def test_an_object_that_two_slots_divide_is_joined_and_no_other():
    objects = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])  # of eight tokens; slots 0 and 3 divide object 0
    slots = torch.tensor([0, 3, 3, 1, 1, 2, 2, 2])
    features = 10 * F.one_hot(objects, 4).float()[None]
    masks = F.one_hot(slots, 4).float()[None]
    groups = slot_groups(masks, features, 0.01)
    assert groups.tolist() == [[0, 1, 2, 0]]
    merged = joined(masks, groups)
    assert torch.equal(merged.argmax(-1)[0], objects) and torch.equal(merged.sum(-1), masks.sum(-1))
    assert not merged[..., 3].any() and joined(masks, None) is masks


def test_an_image_of_one_colour_has_one_slot_and_one_slot_remains_one():
    masks = torch.rand(2, 9, 4).softmax(-1)
    assert slot_groups(masks, torch.ones(2, 9, 3), 0.01).tolist() == [[0] * 4] * 2
    assert slot_groups(masks[..., :1], torch.rand(2, 9, 3), 0.5).tolist() == [[0], [0]]


def test_bf16_and_an_empty_slot():
    """Autocast does not round the differences of means; a slot without tokens explains nothing."""
    features = (torch.randn(3, 20, 6) + 20).bfloat16()
    masks = torch.cat([(4 * torch.randn(3, 20, 3)).softmax(-1), torch.zeros(3, 20, 1)], 2)
    with torch.autocast("cpu", torch.bfloat16):
        groups = slot_groups(masks, features, 0.02)
    assert torch.equal(groups, slot_groups(masks, features.float(), 0.02))
    assert (groups[:, 3] != 3).all()


def test_the_teacher_and_segment_join_alike():
    trainer = Trainer(tiny(2, adaptive_slots=True, slot_variance=0.3, online_teacher=True), device=CPU)
    batch, draws, model = next(trainer.batches()), trainer.draw(0), trainer.model
    target, hidden = trainer.forward.targets(batch)
    labels = trainer.forward.teach(target, hidden, draws)
    with torch.no_grad():
        teacher = trainer.teacher
        output = teacher(trainer.forward.slot_features(teacher, target, hidden), target, draws.teacher_order)
    groups = model.groups(output.slot_attn, target)
    assert (groups != torch.arange(3)).any()
    assert torch.equal(labels, joined(output.masks, groups).argmax(-1))
    assert not torch.equal(labels, output.masks.argmax(-1))
    images = torch.rand(2, 3, 32, 32)
    for orders in ("0", "all"):
        whole = model.segment(images, orders=orders)
        features, target = model.encode(images)
        model.config = replace(model.config, adaptive_slots=False)
        parts = model.segment(images, orders=orders)
        model.config = replace(model.config, adaptive_slots=True)
        groups = model.groups(parts.slot_attn, target)
        assert torch.equal(whole.masks, joined(parts.masks, groups))
        assert torch.equal(whole.slot_attn, joined(parts.slot_attn, groups))
