"""No golden tensor is forgotten: each is claimed by a test file, and the session fails where one was not compared."""

import golden_coverage
import golden_tensors
from golden_coverage import claims, forgotten, matches


def test_every_tensor_is_claimed():
    patterns = [pattern for claimed in claims().values() for pattern in claimed]
    assert [name for name in golden_tensors.names() if not matches(name, patterns)] == []


def test_every_pattern_matches_something():
    for file, patterns in claims().items():
        for pattern in patterns:
            assert any(matches(name, [pattern]) for name in golden_tensors.names()), f"{file}: {pattern}"


def test_a_claimed_tensor_that_was_only_loaded_is_forgotten(monkeypatch):
    outputs, inputs = "decoder.*", "inputs:*"
    monkeypatch.setattr(golden_coverage, "claims", lambda: {"a.py": [outputs, inputs], "b.py": [outputs]})
    output, *others = [name for name in golden_tensors.names() if matches(name, [outputs])]
    given = {name for name in golden_tensors.names() if matches(name, [inputs])}
    assert others and given
    assert forgotten(["a.py"], loaded=given | {output}, compared=set(others)) == [f"a.py: {output}"]
    assert forgotten(["a.py"], loaded=given, compared={output, *others}) == []
    assert forgotten(["other.py"], loaded=set(), compared=set()) == []
