"""The bench of the exchange of gradients: its ways give the same gradients, and its table says so."""

import exchange_speed
import pytest


@pytest.mark.slow
def test_all_ways_give_the_same_gradients(tmp_path, capfd):
    assert exchange_speed.main(["--tiny", "--rounds", "1", "--csv", str(tmp_path / "exchange.csv")]) == 0
    lines = (tmp_path / "exchange.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("date,cpu,cores,torch,commit,stage,processes")
    out = capfd.readouterr().out
    assert "| 1 | in pieces | 2 |" in out and "FAILED" not in out


def test_a_way_that_is_wrong_is_seen():
    import torch

    one = torch.ones(3)
    assert exchange_speed._apart(one, one) == 0 and exchange_speed._apart(None, None) == 0
    assert exchange_speed._apart(one * 1.1, one) > 0.09 and exchange_speed._apart(None, one) == float("inf")


@pytest.mark.parametrize("argument", ["--processes 1", "--processes 0", "--rounds 0", "--batch-size 0", "--rounds -3"])
def test_too_few_is_one_sentence_before_anything_starts(argument, capsys):
    assert exchange_speed.main(["--tiny", *argument.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {argument} is too few: use ") and error.count("\n") == 1
