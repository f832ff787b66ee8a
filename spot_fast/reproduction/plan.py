"""What tables ask for: their rows' runs, the state of each, and what is left to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spot_fast.errors import UserError
from spot_fast.reproduction.folders import Folders, pace
from spot_fast.reproduction.runs import Planner, RunSpec
from spot_fast.reproduction.tables import PAPER, TABLES, Row
from spot_fast.training.console import duration


@dataclass(frozen=True)
class PlannedRow:
    """runs: of each seed."""

    row: Row
    runs: tuple[RunSpec, ...]


@dataclass(frozen=True)
class Plan:
    """tables: name → rows that the data set has. left_out: sentences about the others. runs: parents first."""

    preset: str
    seeds: tuple[int, ...]
    tables: dict[str, list[PlannedRow]]
    left_out: list[str]
    runs: list[RunSpec]

    def users(self, run: RunSpec) -> list[str]:
        """The tables' rows that need a run, as "1 (a)" or "teacher"."""
        named = []
        for name, rows in self.tables.items():
            labels = [each.row.title for each in rows if run in each.runs]
            named += [f"{name}: {label}" for label in dict.fromkeys(labels)]
        return named or ["parent of others"]


def chosen(names: Sequence[str]) -> list[str]:
    """The tables that a command line names, each once; `all` is the paper's."""
    wanted = [table for name in names for table in (PAPER if name == "all" else [_known(name)])]
    return list(dict.fromkeys(wanted))


def _known(name: str) -> str:
    if name not in TABLES:
        raise UserError(f"table {name} is unknown: use all, or some of {', '.join(TABLES)}")
    return name


def make_plan(names: Sequence[str], planner: Planner, seeds: Sequence[int]) -> Plan:
    """UserError where nothing of the tables can be trained on the data set."""
    tables: dict[str, list[PlannedRow]] = {}
    left_out: dict[str, None] = {}
    for name in names:
        table = TABLES[name]
        if table.presets and planner.preset not in table.presets:
            left_out[f"table {name} is about {' and '.join(table.presets)}: left out on {planner.preset}"] = None
            continue
        rows = []
        for row in table.rows:
            if why := planner.lacks(row.recipe):
                left_out[f"table {name}, {_about(row)}: left out, {why}"] = None
            else:
                rows.append(PlannedRow(row, tuple(planner.run(row.recipe, seed) for seed in seeds)))
        if rows:
            tables[name] = rows
    if not tables:
        raise UserError("; ".join(left_out))
    return Plan(planner.preset, tuple(seeds), tables, list(left_out), list(planner.runs.values()))


def _about(row: Row) -> str:
    return f"rows with {row.recipe.parts}" if row.recipe.parts else f"row {row.title}"


def state(plan: Plan, folders: Folders) -> str:
    """A line for each run: how far it is, its cost, and who needs it; then the sum of what is left."""
    found = {run.name: folders.find(run) for run in plan.runs}
    lines = [["run", "state", "steps", "minutes", "needed by"]]
    for run in plan.runs:
        here = found[run.name]
        total = here.steps
        if here.finished:
            how, minutes = "finished", f"{here.seconds / 60:.1f}" if here.facts else "?"
        else:
            how = f"at step {here.step} of {total or '?'}" if here.begun else "missing"
            left = seconds_left(run, folders)
            minutes = "not measured yet" if left is None else f"{left / 60:.1f} more"
        name = run.name if here.path.name == run.name else f"{run.name} (in {here.path.name})"
        lines.append([name, how, f"{total:,}" if total else "?", minutes, "; ".join(plan.users(run))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    text = ["  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines]
    return "\n".join([*text, "", rest(plan, folders)])


def rest(plan: Plan, folders: Folders, jobs: int = 1) -> str:
    """What is left to do, as a sentence. jobs: runs at once."""
    todo = [run for run in plan.runs if not folders.find(run).finished]
    if not todo:
        return f"all {len(plan.runs)} runs are finished"
    text = f"{len(todo)} of {len(plan.runs)} runs are left"
    steps = [(here.steps or 0) - here.step for here in map(folders.find, todo)]
    if all(steps):
        text += f", {sum(steps):,} steps"
    left = [seconds_left(run, folders) for run in todo]
    known = sum(seconds for seconds in left if seconds is not None) / jobs
    if None not in left:
        return f"{text}, about {duration(known)}"
    if known:
        return f"{text}, about {duration(known)} and {left.count(None)} runs of a kind that is not measured yet"
    return f"{text}; minutes are known when the first has begun"


def seconds_left(run: RunSpec, folders: Folders) -> float | None:
    """Of a run that is not finished; None where no run of its kind was measured or its steps are unknown."""
    here = folders.find(run)
    each = pace(folders.all_found, here.config)
    return None if each is None or here.steps is None else max(0, here.steps - here.step) * each
