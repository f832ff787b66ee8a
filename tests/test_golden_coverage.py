"""No golden tensor is forgotten: each is claimed by a test module, and what was claimed was compared.

A test module claims tensors with a module-level list `GOLDEN` of name patterns (`fnmatch`). Inputs count as used once
they were loaded; everything else has to go through `golden_tensors.assert_close`.
"""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import golden_tensors

# What the official implementation was given; the rest is what it returned.
INPUTS = [
    "inputs:*",
    "stage1_state_dict:*",
    "stage2_student_state_dict:*",
    "decoder_variants:*",
    "matching.student_labels",
    "matching.teacher_labels",
    "*.is_unique",
    "*.matching_is_unique",
    "*.step",
    "metrics.soft_masks",
    "metrics.ground_truth_*",
    "metrics.ignore",
    "metrics.near_tie",
    "checkpoints/images",
    "checkpoints/*.slot_noise",
]


def _claims() -> dict[str, list[str]]:
    """Test module → its GOLDEN patterns, read from the source: a module that cannot be imported still counts."""
    claims = {}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "GOLDEN":
                claims[path.name] = ast.literal_eval(node.value)
    return claims


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def test_every_tensor_is_claimed():
    patterns = [pattern for claimed in _claims().values() for pattern in claimed]
    assert [name for name in golden_tensors.names() if not _matches(name, patterns)] == []


def test_every_pattern_matches_something():
    for module, patterns in _claims().items():
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in golden_tensors.names()), f"{module}: {pattern}"


def test_claimed_tensors_were_compared(request):
    """Asked of the modules that ran in this session; a run narrowed to single tests has nothing to say."""
    option = request.config.option
    if option.keyword or option.markexpr or any("::" in argument for argument in request.config.args):
        pytest.skip("single tests were selected")
    ran = {item.path.name for item in request.session.items}
    for module, patterns in _claims().items():
        if module not in ran:
            continue
        claimed = [name for name in golden_tensors.names() if _matches(name, patterns)]
        used = golden_tensors.compared | {name for name in golden_tensors.loaded if _matches(name, INPUTS)}
        assert [name for name in claimed if name not in used] == [], module
