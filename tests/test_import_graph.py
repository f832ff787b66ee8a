"""docs/import_graph.py counts what it says, on a package made for it and on this checkout."""

import import_graph
import pytest

from paths import ROOT

FILES = {
    "__init__.py": "",
    "low.py": "import os\n",
    "one.py": "from spot_fast import low, two\n",
    "two.py": "def late():\n    from .one import name\n",
    "part/__init__.py": "from . import inner\n",
    "part/inner.py": "import spot_fast.one\nfrom ..low import name\n",
}


@pytest.fixture
def tree(tmp_path):
    for folder in import_graph.PACKAGES.values():
        for name, text in FILES.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def test_arrows_levels_and_circles_by_hand(tree, capsys):
    import_graph.main([str(tree), "--levels"])
    rows, *groups = capsys.readouterr().out.split("\n\n")
    # one → low and two, two → one, part → part.inner, part.inner → one and low
    assert rows.splitlines()[2] == "| spot_fast | 6 | 4 | 6 | 1 | 7 | 23 |"
    assert groups[0] == "circle of 2 files: spot_fast.one, spot_fast.two"
    assert groups[1] == "spot_fast, level 1: spot_fast, spot_fast.low"
    assert groups[4] == "spot_fast, level 4: spot_fast.part"


def test_this_checkout_is_counted(capsys):
    import_graph.main([])
    fast, kernels = capsys.readouterr().out.splitlines()[2:4]
    assert int(fast.split("|")[2]) == len(list((ROOT / "spot_fast").rglob("*.py")))
    assert kernels.startswith("| spot_kernels | ")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        import_graph.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "give the root of a checkout" in capsys.readouterr().err
