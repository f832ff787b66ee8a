"""Stage 2 from the images on against the official inner loop: teacher labels, matching, L_ATT, losses, gradients."""

import pytest
import torch

import golden_models
from golden_tensors import assert_close, load
from spot_fast.model.spot import reconstruction_loss
from spot_fast.training.losses import attention_loss, teacher_labels
from spot_kernels import assign_masks

GOLDEN = ["self_training.*", "inputs:teacher_slot_noise.*"]

CASES = ["regular", "empty_teacher_slot"]
DTYPES = [torch.float32, torch.float64]
TEACHER_ORDER, STUDENT_ORDER, ATT_WEIGHT = torch.tensor(3), torch.tensor(8), 0.005


def on_grid(maps):
    """[B, N, K] → [B, K, G, G], as the golden maps are laid out; label maps [B, N] → [B, G, G]."""
    return maps.unflatten(1, (14, 14)).permute(0, 3, 1, 2) if maps.dim() == 3 else maps.unflatten(1, (14, 14))


def teacher_of(case, dtype):
    teacher = golden_models.stage1(dtype)
    with torch.no_grad():
        features, target = teacher.encode(load("inputs:images").to(dtype))
        slots, _, _ = teacher.slot_encoder(features, load(f"inputs:teacher_slot_noise.{case}").to(dtype))
        return teacher.decode_masks(slots, target, TEACHER_ORDER)


def student_step(dtype):
    student = golden_models.stage2(dtype).train()
    features, target = student.encode(load("inputs:images").to(dtype))
    out = student(features, target, STUDENT_ORDER)
    return student, out, reconstruction_loss(out.prediction, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_student_outputs(dtype):
    _, out, loss = student_step(dtype)
    assert_close("self_training.student_attention", on_grid(out.slot_attn))
    assert_close("self_training.student_attention_labels", on_grid(out.slot_attn.argmax(-1)))
    assert_close("self_training.student_logits", out.slot_logits[:, 0])
    assert_close("self_training.student_masks", on_grid(out.masks))
    assert_close("self_training.student_slots", out.slots)
    assert_close("self_training.loss_rec", loss)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_and_matching(case, dtype):
    prefix = f"self_training.{case}"
    masks = teacher_of(case, dtype)
    labels = teacher_labels(masks)
    assert_close(f"{prefix}.teacher_masks", on_grid(masks))
    assert_close(f"{prefix}.teacher_labels", on_grid(labels))
    pixels = torch.nn.functional.one_hot(labels, 7).sum(1)
    assert_close(f"{prefix}.teacher_slot_pixels", pixels)
    assert bool((pixels == 0).any()) == (case == "empty_teacher_slot")

    student = load("self_training.student_attention_labels").flatten(1)
    assignment, iou, _ = assign_masks(student, labels, 7)
    assert bool(load(f"{prefix}.matching_is_unique").all())
    assert_close(f"{prefix}.matching", assignment)
    assert_close(f"{prefix}.matching_iou", iou)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(case, dtype):
    prefix = f"self_training.{case}"
    student, out, loss_rec = student_step(dtype)
    loss_att, renamed = attention_loss(out.slot_logits, out.slot_attn, teacher_labels(teacher_of(case, dtype)))
    total = loss_rec + ATT_WEIGHT * loss_att
    assert_close(f"{prefix}.loss_att", loss_att)
    assert_close(f"{prefix}.loss_total", total)
    matching, labels = load(f"{prefix}.matching"), load(f"{prefix}.teacher_labels").flatten(1)
    assert torch.equal(renamed, matching.gather(1, labels))

    loss_att.backward(retain_graph=True)
    golden_models.assert_all_parameters(f"{prefix}.grad_loss_att.", student, grad=True)
    student.zero_grad()
    total.backward()
    golden_models.assert_all_parameters(f"{prefix}.grad.", student, grad=True)
    norm = max(p.grad.abs().max() for p in student.parameters() if p.requires_grad)
    golden_models.assert_grad(f"{prefix}.grad_inf_norm", norm.reshape(1))
    assert all(p.grad is None for p in student.encoder.parameters())


def test_renaming_labels_equals_permuting_logits():
    """The loss as the paper words it: student slots permuted by the matching, teacher labels as they are."""
    torch.manual_seed(0)
    logits = torch.randn(3, 1, 20, 5)
    attn, labels = logits[:, 0].softmax(-1), torch.randint(5, (3, 20))
    assignment, _, _ = assign_masks(attn.argmax(-1), labels, 5)
    permuted = logits[:, 0].gather(2, assignment[:, None].expand(-1, 20, -1))
    loss, _ = attention_loss(logits, attn, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(permuted.transpose(1, 2), labels))


def test_half_precision_logits_give_a_float32_loss():
    logits = torch.randn(2, 1, 20, 5, dtype=torch.bfloat16)
    loss, _ = attention_loss(logits, logits[:, 0].softmax(-1), torch.zeros(2, 20, dtype=torch.int64))
    assert loss.dtype == torch.float32


def test_several_heads_are_refused():
    logits = torch.randn(2, 3, 20, 5)
    with pytest.raises(ValueError, match=r"student_logits \(2, 3, 20, 5\) must be \[2, 1, 20, 5\]"):
        attention_loss(logits, logits.softmax(-1).mean(1), torch.zeros(2, 20, dtype=torch.int64))


def test_teacher_labels_take_the_lower_slot_on_a_tie():
    assert teacher_labels(torch.tensor([[[0.2, 0.4, 0.4], [0.5, 0.0, 0.5]]])).tolist() == [[1, 0]]


def test_a_token_without_a_label_does_not_count(monkeypatch):
    """-1 from a matching that was given up is no device-side assertion, and no share of the mean."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 1, 9, 4, generator=generator), torch.randint(4, (2, 9), generator=generator)
    attn = logits.softmax(-1).squeeze(1)
    expected, renamed = attention_loss(logits[:1], attn[:1], labels[:1])
    broken = torch.cat([renamed, torch.full_like(renamed, -1)])
    monkeypatch.setattr("spot_fast.training.losses.match_masks", lambda *_: broken)
    assert torch.equal(attention_loss(logits, attn, labels)[0], expected)
