"""Writes what is generated in docs/ and the READMEs: the tables of reproducing.md, measured ones from bench/results,
and the classes that spot_kernels.patch knows.

python docs/generate.py            # writes; --check says whether all is current
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "bench" / "results"
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "kernels"), str(DOCS.parent / "bench")]

import hours

from spot_fast.files import atomic_write
from spot_fast.presets import main_scores, score_name
from spot_fast.reproduction.plan import make_plan
from spot_fast.reproduction.results import cell
from spot_fast.reproduction.runs import Planner, steps
from spot_fast.reproduction.tables import PAPER
from spot_kernels.patching.implementations import IMPLEMENTATIONS


def scores() -> str:
    lines = ["| preset | mBO_i | mBO_c | mIoU | FG-ARI | source |", "|---|---|---|---|---|---|"]
    lines += [f"| {score_name(row)} | {' | '.join(row.figures)} | {row.source} |" for row in main_scores()]
    return "\n".join(lines)


def tables() -> str:
    """What each table of the paper trains on COCO, alone and all together."""
    lines = ["| TABLE | | runs a seed | steps a seed |", "|---|---|---|---|"]
    for name, names in [*((name, [name]) for name in PAPER), ("all", list(PAPER))]:
        planner = Planner("coco", weights={"moco_vitb16": "vit-b-300ep.pth.tar"})
        runs = [run.config for run in make_plan(names, planner, [0]).runs]
        title = PAPER[name].title if name in PAPER else "all of them: each run is trained once"
        lines.append(f"| `{name}` | {title} | {len(runs)} | {sum(map(steps, runs)):,} |")
    return "\n".join(lines)


_SHOWN = {"mbo_i": "mBO_i", "miou": "mIoU", "fg_ari": "FG-ARI", "pq": "PQ"}


def measured(name: str) -> str:
    """The rows of a CSV that spot_fast.reproduce wrote: a line a row, decoder masks beside slot masks."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    first, *others = _SHOWN.values()
    text = [
        "| | " + " | ".join([f"decoder: {first}", *others, f"slots: {first}", *others, "seeds"]) + " |",
        "|---|" + "---|" * (2 * len(_SHOWN) + 1),
    ]
    for row in dict.fromkeys(line["row"] for line in lines):
        cells, seeds = [], set()
        for slots in (False, True):
            found = [line for line in lines if line["row"] == row and (line["masks"] == "slots") == slots]
            seeds |= {line["seed"] for line in found}
            values = [[float(line[metric]) if line[metric] else None for line in found] for metric in _SHOWN]
            cells += [cell(each) if found else "" for each in values]
        text.append(f"| {row} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(text)


def patched() -> str:
    """The published classes that spot_kernels.patch replaces."""
    lines = ["| reported as | published as | `like` | replaced |", "|---|---|---|---|"]
    for known in IMPLEMENTATIONS:
        if not known.default_noise:
            methods = (
                "" if [*known.methods] == ["forward"] else f" ({', '.join(f'`{name}`' for name in known.methods)})"
            )
            variants = ", ".join(f"`{name}`" for name in known.variants)
            lines.append(f"| {known.name} | {known.source} | {variants} | {known.replaced}{methods} |")
    return "\n".join(lines)


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"scenes": lambda: measured("scenes-1.csv")},
    "../kernels/README.md": {"patched": patched},
    "options.md": {"options": lambda: measured("scenes-options.csv")},
    "reproducing.md": {"tables": tables, "scores": scores, "hours": lambda: hours.table(hours.SHARE)},
}


def renewed(name: str) -> str:
    """The text of docs/`name` with its generated sections as they have to be."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for marker, make in SECTIONS[name].items():
        before, opening, rest = text.partition(f"<!-- {marker} -->\n")
        _, closing, after = rest.partition(f"<!-- /{marker} -->")
        assert opening and closing, f"{name} has no section {marker}"
        text = f"{before}{opening}{make()}\n{closing}{after}"
    return text


def _write(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is not current")
    check = parser.parse_args(argv).check
    old = 0
    for name in SECTIONS:
        file, text = (DOCS / name).resolve(), renewed(name)
        if text == file.read_text(encoding="utf-8"):
            continue
        old += 1
        if not check:
            atomic_write(file, partial(_write, text))
        print(f"{file.relative_to(DOCS.parent)} {'is not current: python docs/generate.py' if check else 'is written'}")
    return int(check and old > 0)


if __name__ == "__main__":
    sys.exit(main())
