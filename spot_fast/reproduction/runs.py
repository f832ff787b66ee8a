"""The runs that tables need, each once: `Planner` makes a `RunSpec` of a recipe and a seed.

A run is known by the settings that decide its weights and by the runs it begins with, not by how they were written.
Settings are resolved by spot_fast.train itself, with the parents' planned settings in the place of their folders.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spot_fast.checkpoints.runs import MODEL, write_config
from spot_fast.config import OPTIONS, Config
from spot_fast.errors import UserError
from spot_fast.published import IMAGES, OTHER_IMAGES
from spot_fast.recipes import DATA_SETS, ENCODERS, default_encoder, encoder_recipe, timm_name
from spot_fast.reproduction.tables import Recipe
from spot_fast.train import new_config
from spot_fast.training.arguments import parse

# Names the way, decides no weight: runs that differ in it alone are the same.
_LABELS = ("method",)
# What the plan sets for each run.
_OWN = "preset method stage seed data teacher init-from out resume runs device threads".split()


@dataclass(frozen=True, eq=False)
class RunSpec:
    """A run that is wanted. words: options of spot_fast.train but for folders and device."""

    name: str
    config: Config
    words: tuple[str, ...]
    teacher: RunSpec | None = None
    init_from: RunSpec | None = None

    @property
    def parents(self) -> dict[str, RunSpec]:
        """Option of spot_fast.train → the run whose folder it names."""
        both = {"--teacher": self.teacher, "--init-from": self.init_from}
        return {option: run for option, run in both.items() if run is not None}


def settings(config: Config) -> dict[str, object]:
    """The settings that decide a run's weights.

    Paths are left out, as data and weights may move; that weights are random is not.
    """
    decisive = {
        name: value for name, value in asdict(config).items() if not OPTIONS[name].resumable and name not in _LABELS
    }
    return decisive | {"random_encoder": config.encoder_weights == "none"}


def is_same(wanted: Config, existing: Config) -> bool:
    """Whether the two make the same weights. An existing run keeps what a wanted "auto" became."""
    theirs = settings(existing)
    return all(
        value == theirs[name] or (value == "auto" and OPTIONS[name].keeps_auto)
        for name, value in settings(wanted).items()
    )


def check_options(options: Sequence[str]) -> None:
    """UserError where an option for every training is one that the plan sets itself."""
    for word in options:
        name = word.partition("=")[0]
        if name.removeprefix("--") in _OWN:
            raise UserError(f"{name} after -- is set for each run by its table: drop it, or use {_remedy(name)}")


def _remedy(name: str) -> str:
    ours = {"--seed": "--seeds N …", "--preset": "--preset NAME before --"}
    return ours.get(name, f"{name} before --" if name in ("--data", "--runs", "--device", "--threads") else "TABLE")


@dataclass
class Planner:
    """Makes the runs of one data set.

    options: of every training. weights: encoder → file, for encoders without weights on the hub or for no network.
    runs: those made so far by name, parents before their students.
    """

    preset: str
    data: str | None = None
    options: Sequence[str] = ()
    weights: dict[str, str] = field(default_factory=dict)
    runs: dict[str, RunSpec] = field(default_factory=dict)
    _made: dict[tuple[Recipe, int], RunSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in DATA_SETS:
            raise UserError(f"--preset {self.preset} is no data set: use one of {', '.join(DATA_SETS)}")
        check_options(self.options)

    def run(self, recipe: Recipe, seed: int) -> RunSpec:
        """The run of a recipe; UserError where spot_fast.train would refuse it."""
        if (recipe, seed) not in self._made:
            self._made[recipe, seed] = self._make(recipe, seed)
        return self._made[recipe, seed]

    def _make(self, recipe: Recipe, seed: int) -> RunSpec:
        parents = {
            option: self.run(parent, seed)
            for option, parent in (("--teacher", recipe.teacher), ("--init-from", recipe.init_from))
            if parent is not None
        }
        words = self._words(recipe, seed, parents)
        config = resolved(words, parents)
        spec = RunSpec(_name(config, parents), config, words, parents.get("--teacher"), parents.get("--init-from"))
        return self.runs.setdefault(spec.name, spec)

    def lacks(self, recipe: Recipe) -> str | None:
        """Why a recipe makes no sense on the data set, or lacks something; None where it can be trained."""
        encoder = next((part for part in recipe.parts.split("+") if part in ENCODERS), None)
        if encoder and "encoder" in DATA_SETS[self.preset].values:
            return f"{DATA_SETS[self.preset].title} have an encoder of their own"
        if (
            "steps1" in recipe.options.split()
            and steps(parse(["--preset", self.preset, *self.options]).config()) is None
        ):
            return f"the steps of {DATA_SETS[self.preset].title} are not known before it is opened"
        if encoder == "moco_vitb16" and encoder not in self.weights:
            return "neither timm nor the hub has MoCo-v3's weights: add --weights moco_vitb16=FILE"
        return None

    def _words(self, recipe: Recipe, seed: int, parents: dict[str, RunSpec]) -> tuple[str, ...]:
        words = [
            "--preset", "+".join(filter(None, [self.preset, recipe.parts])),
            "--stage", str(recipe.stage),
            "--seed", str(seed),
        ]  # fmt: skip
        if self.data:
            words += ["--data", self.data]
        words += self.options
        encoder = next((part for part in recipe.parts.split("+") if part in ENCODERS), "dino_vitb16")
        if encoder in self.weights:
            words += ["--encoder-weights", self.weights[encoder]]
        return *words, *self._filled(recipe, words, parents)

    def _filled(self, recipe: Recipe, words: list[str], parents: dict[str, RunSpec]) -> Iterator[str]:
        """A recipe's options with numbers in the place of 2x, sum and steps1."""
        name = ""
        for word in shlex.split(recipe.options):
            if word.startswith("--"):
                name = word.removeprefix("--").replace("-", "_")
            factor = word[:-1] if word.endswith("x") else ""
            if _is_number(factor):
                base = resolved(words, parents) if recipe.stage == 1 or parents else parse(words).config()
                yield _times(float(factor), getattr(base, name))
            elif word in ("sum", "steps1"):
                stages = [parse([*words, "--stage", str(stage)]).config() for stage in (1, 2)]
                yield str(sum(each.epochs for each in stages) if word == "sum" else steps(stages[0]))
            else:
                yield word


def _name(config: Config, parents: dict[str, RunSpec]) -> str:
    """Of the run's folder: what is special about it in words, and a hash of its settings and parents.

    Defaults are not in the hash: it stays the same when options are added.
    """
    default = settings(Config())
    changed = {name: value for name, value in settings(config).items() if value != default[name]}
    facts = [changed, *(f"{option} {run.name}" for option, run in parents.items())]
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    own = "encoder" in DATA_SETS[config.preset].values or config.encoder == timm_name(default_encoder(config.preset))
    words = [
        config.preset,
        "" if own else encoder_recipe(config.encoder) or config.encoder.split(".")[0],
        config.decoder if config.decoder != "transformer" else "one_order" if config.orders == "standard" else "",
        f"stage{config.stage}",
        f"seed{config.seed}",
        hashed[:8],
    ]
    return "-".join(filter(None, words))


def steps(config: Config, images: int | None = None) -> int | None:
    """Of a run; images: of its training set, by default as many as are known without opening it. None: unknown."""
    known = images or (IMAGES | OTHER_IMAGES).get(config.preset, 0)
    if config.train_images and known:
        known = min(known, config.train_images)
    elif config.train_images:
        known = config.train_images
    return known // config.batch_size * config.epochs if known else None


def resolved(words: Sequence[str], parents: dict[str, RunSpec]) -> Config:
    """The Config that spot_fast.train makes of `words`, with stand-ins for the folders of runs that may not exist."""
    with tempfile.TemporaryDirectory() as place:
        named = []
        for option, run in parents.items():
            folder = Path(place) / run.name
            folder.mkdir(exist_ok=True)
            write_config(folder, run.config)
            (folder / MODEL).touch()
            named += [option, str(folder)]
        return new_config(parse([*words, *named, "--print-config"]))[0]


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _times(factor: float, base: float) -> str:
    """As an option's value; whole numbers stay whole, at least 1."""
    return str(max(1, round(factor * base))) if isinstance(base, int) else f"{factor * base:.12g}"
