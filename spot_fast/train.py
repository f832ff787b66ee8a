"""python -m spot_fast.train: trains stage 1 or stage 2, by default on generated scenes.

Under torchrun all processes run this. Rank 0 alone decides whatever depends on files that may change meanwhile, writes
and prints (`distributed`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from spot_fast import cli
from spot_fast.checkpoints.runs import (
    CONFIG,
    STATE,
    find_folder,
    is_finished,
    read_config,
    read_metadata,
    run_folders,
    write_config,
)
from spot_fast.config import Config, check_config, preset
from spot_fast.errors import UserError
from spot_fast.precision import resolve
from spot_fast.recipes import METHODS
from spot_fast.system.cpu_threads import available_cores
from spot_fast.system.devices import usable_device
from spot_fast.training.arguments import Arguments, conflicts, parse, with_resumable
from spot_fast.training.compiled import resolve_compile
from spot_fast.training.console import duration, scores_text
from spot_fast.training.distributed import World, join
from spot_fast.training.run_folder import CORRUPT, OthersFolder, RunFolder, is_free
from spot_fast.training.teacher import (
    check_origin,
    check_teacher,
    find_teacher,
    going_on,
    inherit,
    one_run,
    student_method,
)
from spot_fast.training.throughput import measured_peak
from spot_fast.training.trainer import Outcome, Trainer

_GOES_ON = "python -m spot_fast.train --resume goes on from the last saved state"
_OUT_OF_MEMORY = "use a smaller --batch-size or --cache none, or --accumulate 2 for half a batch at a time"


@dataclass(frozen=True)
class _Job:
    """A new run, or the one in the folder `path`. threads: None is one for each core that the process may use.

    fixed_threads: keep their number however busy the machine is.
    """

    config: Config
    teacher: Path | None
    threads: int | None
    path: Path | None = None
    fixed_threads: bool = False


@cli.command(_GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    world = join()
    try:
        code = _train(world, argv)
    except BaseException as error:
        known = cli.failure(error, _GOES_ON, _OUT_OF_MEMORY)
        # Before the other processes hear of it: torchrun ends all as soon as one of them has ended.
        if known is not None and world.is_rank_0:
            print(f"error: {known[1]}", file=sys.stderr)
        world.leave(error)
        if known is None:
            raise
        return known[0]
    world.close()
    return code


def _train(world: World, argv: Sequence[str] | None) -> int:
    args = world.on_rank_0(lambda: parse(argv))
    device = world.on_all_ranks(lambda: usable_device(args.device, world.device))
    world.connect(device)
    with ExitStack() as stack:
        opened: list[RunFolder] = []  # in rank 0

        def prepare() -> _Job | None:
            job = _job(args, device, world)
            if job is not None and job.path is not None:
                opened.append(stack.enter_context(RunFolder(job.path)))
            return job

        def folder() -> Path:
            if opened:
                write_config(job.path, trainer.config)
            else:
                opened.append(stack.enter_context(RunFolder.create(trainer.config, root=args.runs, out=args.out)))
            return opened[0].path

        job = world.on_rank_0(prepare)
        if job is None:
            return 0
        torch.set_num_threads(job.threads or min(torch.get_num_threads(), available_cores()))
        trainer = world.on_all_ranks(
            lambda: Trainer(
                job.config,
                device=device,
                teacher=job.teacher,
                world=world,
                fixed_threads=job.fixed_threads,
                resumed=job.path is not None and (job.path / STATE).is_file(),
            )
        )
        if len(kinds := set(world.gather(trainer.loader.kind))) > 1:
            raise UserError(
                f"images are decoded by {' and '.join(sorted(kinds))} in different processes: add --loader torch"
            )
        trainer.choose_cache()  # an impossible --cache is an error before a run folder is made
        path = world.on_rank_0(folder)
        return _run(trainer, opened[0] if world.is_rank_0 else OthersFolder(path), args)


def _job(args: Arguments, device: torch.device, world: World) -> _Job | None:
    """The run that the command line asks for; None where there is nothing to train."""
    path = _run_to_resume(args) if args.resume is not None else None
    if path is not None:
        return _resume(args, path, device, world)
    config, teacher = new_config(args)
    config = replace(config, precision=resolve(config.precision, device))
    if args.print_config:
        print(replace(config, compile=resolve_compile(config.compile, device)).to_json(), end="")
        return None
    return _Job(config, teacher, args.threads, fixed_threads=args.threads is not None)


def new_config(args: Arguments) -> tuple[Config, Path | None]:
    """Config and teacher of a new run."""
    given = args.given
    if args.stage == 1 and args.teacher is not None:
        raise UserError(f"--teacher {args.teacher} belongs to stage 2: add --stage 2 or drop it")
    if given.get("online_teacher") and args.teacher is not None:
        raise UserError(f"--online-teacher and --teacher {args.teacher} both name the teacher: drop one")
    origin = Path(given["init_from"]) if given.get("init_from") else None
    if origin is not None:
        return _config_from(origin, args)
    if args.stage == 1:
        return check_config(args.config()), None
    if given.get("online_teacher"):
        return check_config(one_run(args.config(), preset(args.preset_name, 1), given)), None
    wanted = given.get("method", "spot"), given.get("encoder"), given.get("image_size")
    teacher = find_teacher(args.teacher, args.runs, args.preset, *wanted)
    config, theirs, taken = _student(args, teacher)
    check_teacher(teacher, theirs, check_config(config))
    _print_taken(args, config, "the teacher", taken)
    return config, teacher


def _student(args: Arguments, folder: Path) -> tuple[Config, Config, list[str]]:
    """A student's Config, that of the stage-1 run in `folder`, and the names of what is taken from it."""
    first = read_config(folder)
    method = student_method(args.given.get("method"), folder, first)
    # The teacher's encoder is the student's and brings its rates.
    asked = args.config(args.given.get("preset", first.preset), method=method, encoder=first.encoder)
    theirs = read_config(folder, like=asked)
    config, taken = inherit(asked, theirs, args.given)
    return config, theirs, taken


def _config_from(folder: Path, args: Arguments) -> tuple[Config, Path | None]:
    """Config and teacher of a run that begins with the weights of the one in `folder`.

    A stage-1 run teaches the student that begins with its weights, unless another teacher is named. A student that
    goes on has an online teacher, because its own may have had another image size.
    """
    given = args.given
    if "initial_weights" in given:
        raise UserError(f"--init-from {folder} and --initial-weights both say where training starts: drop one")
    first = read_config(folder)
    teacher = None
    if args.stage == 2:
        given = {"online_teacher": first.stage == 2 and args.teacher is None} | given
        if not given["online_teacher"]:
            teacher = find_folder(args.teacher, args.runs) if args.teacher else folder
    if first.stage == args.stage:
        config, taken = going_on(args.config(given.get("preset", first.preset)), first, given), []
    else:
        config, first, taken = _student(replace(args, given=given), folder)
    check_origin(folder, first, check_config(config))
    if teacher is not None:
        check_teacher(teacher, read_config(teacher, like=config), config)
    _print_taken(args, config, f"--init-from {folder}", taken)
    return config, teacher


def _print_taken(args: Arguments, config: Config, origin: str, taken: Sequence[str]) -> None:
    if taken and not args.print_config:
        print(f"from {origin}: " + ", ".join(f"{name} {getattr(config, name)}" for name in taken))


def _run_to_resume(args: Arguments) -> Path | None:
    """The run that --resume means; None where there is nothing to resume and a new run begins."""
    if args.resume:
        return find_folder(args.resume, args.runs)
    if args.out is not None:
        return args.out if (args.out / CONFIG).is_file() else None
    everything = list(run_folders(args.runs))
    wanted = (args.preset, args.stage)
    alike = [(path, config) for path, config in everything if (config.preset, config.stage) == wanted]
    fitting = [(path, config) for path, config in alike if not conflicts(config, args.given)]
    unfinished = [(path, config) for path, config in fitting if not is_finished(path)]
    if unfinished:
        # Of several, the run whose settings differ least from this command line's; the newest of equals.
        line = asdict(args.config())
        free = [(path, config) for path, config in unfinished if is_free(path)] or unfinished[:1]
        return min(free, key=lambda run: sum(line[name] != value for name, value in asdict(run[1]).items()))[0]
    if fitting:
        return fitting[0][0]
    for path, _ in alike:
        if not is_finished(path):
            return path  # `_resume` reports its conflicts
    others = [path for path, _ in everything if not is_finished(path)]
    if others and not args.given:
        raise UserError(
            f"no run of preset {args.preset}, stage {args.stage} is in {args.runs}: to go on with another "
            f"one use --resume {others[0]}"
        )
    print(f"nothing to resume in {args.runs}: a new run begins")
    return None


def _resume(args: Arguments, path: Path, device: torch.device, world: World) -> _Job | None:
    config = read_config(path)
    if different := conflicts(config, args.given):
        raise UserError(f"{path} cannot be resumed: {different[0]}; drop the option, or drop --resume for a new run")
    config = check_config(with_resumable(config, args.given))
    if args.print_config:
        print(config.to_json(), end="")
        return None
    if is_finished(path):
        print(f"{path} is finished: there is nothing to resume")
        return None
    about = read_metadata(path / STATE) if (path / STATE).is_file() else {}
    threads = _same_machine(args, about, device, world)
    fixed = args.threads is not None or about.get("fixed_threads") == "yes"
    return _Job(config, _same_teacher(args, config, about, path), threads, path, fixed)


def _same_machine(args: Arguments, about: dict[str, str], device: torch.device, world: World) -> int:
    """The number of threads, as before; 0 = PyTorch's choice. Prints a note where the arithmetic may differ."""
    threads = args.threads or int(about.get("threads", 0))
    if threads:
        torch.set_num_threads(threads)
    now = {
        "threads": str(torch.get_num_threads()),
        "device": device.type,
        "torch": torch.__version__,
        "processes": str(world.size),
    }
    for name, value in now.items():
        if about.get(name, value) != value:
            print(f"note: {name} was {about[name]} and is {value}: the last bits may differ from an uninterrupted run")
    return threads


def _same_teacher(args: Arguments, config: Config, about: dict[str, str], path: Path) -> Path | None:
    if config.stage == 1 or config.online_teacher:
        return None
    if args.teacher is not None or "teacher_path" not in about:
        return find_teacher(args.teacher, args.runs, config.preset, config.method)
    recorded = Path(about["teacher_path"])
    return find_teacher(recorded if recorded.exists() else path.parent / recorded.name, args.runs, config.preset)


def _run(trainer: Trainer, folder: RunFolder | OthersFolder, args: Arguments) -> int:
    if not trainer.world.is_rank_0:
        return 0 if trainer.run(folder, tensorboard=False).finished else cli.INTERRUPTED
    config, device, path = trainer.config, trainer.device, folder.path
    threads, processes = torch.get_num_threads(), trainer.world.size
    where = f"CPU with {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    if processes > 1:
        where = f"{processes} {'GPUs' if device.type == 'cuda' else f'processes, each {where}'}"
    trained = sum(parameter.numel() for parameter in trainer.parameters) / 1e6
    for note in dict.fromkeys([*trainer.train_set.notes, *(trainer.val_set.notes if trainer.val_set else ())]):
        print(f"note: {note}")
    if config.warmup_steps and not trainer.rate.warmup_steps:
        print(
            f"note: --warmup-steps {config.warmup_steps} is less than an epoch and rounded to none: use "
            f"{math.ceil(len(trainer.train_set) / config.batch_size)} or more for a warm-up"
        )
    print(
        f"{path}: preset {config.recipe}, stage {config.stage}, {len(trainer.train_set)} images, "
        f"{trainer.total_steps} steps of {config.batch_size}, {trained:.1f} M parameters train, "
        f"{trainer.precision} on {where}",
        flush=True,
    )
    if args.measure_peak:
        trainer.throughput.peak = measured_peak(device, trainer.precision)
        print(f"{trainer.throughput.peak / 1e12:.3g} TFLOP/s measured in {trainer.precision}: MFU is against that")
    outcome = trainer.run(folder, tensorboard=args.tensorboard, profile=args.profile)
    if trainer.loader.corrupt:
        reason = next(iter(trainer.loader.corrupt.values()))
        count = len(trainer.loader.corrupt)
        what = "1 corrupt image was" if count == 1 else f"{count} corrupt images were"
        print(f"{what} replaced by others, all in {path / CORRUPT}; the first: {reason}")
    if not outcome.finished:
        print(
            f"stopped at step {outcome.step} of {outcome.total_steps}: go on with python -m spot_fast.train "
            f"--resume {path}"
        )
        return cli.INTERRUPTED
    print(_summary(path, config, outcome))
    return 0


def _summary(path: Path, config: Config, outcome: Outcome) -> str:
    """The result of a finished run, and the commands to type next."""
    lines = [f"{path} is finished: {outcome.total_steps} steps in {duration(outcome.seconds)}"]
    if outcome.scores:
        lines.append(scores_text(outcome.scores))
    student = "" if config.recipe == "scenes" else f" --preset {config.recipe}"
    orders = " --orders all" if config.method == "spot_ens" else ""
    lines += [
        "next:",
        f"  python -m spot_fast.evaluate {path}",
        f"  python -m spot_fast.segment IMAGE --run {path}{orders}",
    ]
    if config.stage == 1 and METHODS[config.method].stage2 is not None:
        lines.insert(-2, f"  python -m spot_fast.train --stage 2{student} --teacher {path}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
