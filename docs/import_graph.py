"""Prints how the files of spot_fast and spot_kernels import each other: files, levels, arrows, circles, lines, words.

    python docs/import_graph.py [TREE] [--levels]

TREE is a checkout, this one unless given; nothing in it is imported. An arrow is one file that imports another of its
package, wherever in the file. The level of a file that imports none is 1, of any other one more than the highest that
it imports; files of a circle share a level. --levels lists the files level by level.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

PACKAGES = {"spot_fast": "spot_fast", "spot_kernels": "kernels/spot_kernels"}


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name → file of the package in `folder`."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    """Names of the other `files` that the file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                origin = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from package import x` imports the file package/x.py if there is one, and else the package itself
            found.update(
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in files else origin for alias in node.names
            )
    return (found & files.keys()) - {name}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of at least two files of which each reaches every other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reached(name) for name in arrows}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in arrows}
    return sorted((set(group) for group in groups if len(group) > 1), key=len, reverse=True)


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    group = {name: frozenset(circle) for circle in circles(arrows) for name in circle}
    level: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in level:
            members = group.get(name, frozenset([name]))
            below = {other for member in members for other in arrows[member]} - members
            number = 1 + max(map(of, sorted(below)), default=0)
            level.update(dict.fromkeys(members, number))
        return level[name]

    return {name: of(name) for name in arrows}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--levels", action="store_true", help="list the files level by level, the lowest first")
    options = parser.parse_args(words)
    rows, graphs = (
        ["| package | files | levels | arrows | circles | lines | words |", "|---|---|---|---|---|---|---|"],
        {},
    )
    for package, folder in PACKAGES.items():
        files = modules(options.tree / folder)
        if not files:
            parser.error(f"{options.tree / folder} has no Python files: give the root of a checkout")
        arrows = graphs[package] = {name: imported(name, path, files) for name, path in files.items()}
        texts = [path.read_text(encoding="utf-8") for path in files.values()]
        counts = (len(files), max(levels(arrows).values()), sum(map(len, arrows.values())), len(circles(arrows)))
        sizes = (sum(len(text.splitlines()) for text in texts), sum(len(text.split()) for text in texts))
        rows.append(f"| {package} | " + " | ".join(f"{count:,}" for count in (*counts, *sizes)) + " |")
    print("\n".join(rows))
    for package, arrows in graphs.items():
        for circle in circles(arrows):
            print(f"\ncircle of {len(circle)} files: {', '.join(sorted(circle))}")
        if options.levels:
            level = levels(arrows)
            for number in range(1, max(level.values()) + 1):
                print(f"\n{package}, level {number}: {', '.join(name for name in arrows if level[name] == number)}")


if __name__ == "__main__":
    main()
