"""python -m spot_fast.train: trains stage 1 or stage 2, on generated scenes unless told otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .arguments import Arguments, check_config, conflicts, parse, with_free
from .checkpoint import CONFIG, STATE, find_folder, is_finished, read_config, read_metadata, run_folders, write_config
from .config import Config
from .errors import UserError
from .precision import resolve
from .progress import duration, scores_text
from .run_folder import CORRUPT, RunFolder, is_free
from .step import resolve_compile
from .teacher import check_teacher, find_teacher, inherit
from .trainer import FREE, Outcome, Trainer

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _train(parse(argv))
    except KeyboardInterrupt:
        print("interrupted; python -m spot_fast.train --resume goes on from the last saved state", file=sys.stderr)
        return _INTERRUPTED
    except torch.OutOfMemoryError:
        return _fail("the device's memory is full: use a smaller --batch-size or --cache none")
    except OSError as error:
        return _fail(f"{error.filename or 'a file'} cannot be used ({error.strerror or error}): check the path, its "
                     "permissions and the free space")  # fmt: skip
    except UserError as error:
        return _fail(str(error))


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _train(args: Arguments) -> int:
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: use 1 or more")
    device = _device(args.device)
    path = _run_to_resume(args) if args.resume is not None else None
    if path is not None:
        return _resume(args, path, device)
    config, teacher = _new_config(args)
    config = replace(config, precision=resolve(config.precision, device),
                     compile=resolve_compile(config.compile, device))  # fmt: skip
    if args.print_config:
        print(config.to_json(), end="")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer = Trainer(config, device=device, teacher=teacher)
    with RunFolder.create(trainer.config, root=args.runs, out=args.out) as folder:
        return _run(trainer, folder, args)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None
    return device


def _new_config(args: Arguments) -> tuple[Config, Path | None]:
    """Config and teacher of a new run."""
    if args.stage == 1:
        if args.teacher is not None:
            raise UserError(f"--teacher {args.teacher} belongs to stage 2: add --stage 2 or drop it")
        return check_config(args.config()), None
    teacher = find_teacher(args.teacher, args.runs, args.preset)
    theirs = read_config(teacher)
    config, taken = inherit(args.config(args.given.get("preset", theirs.preset)), theirs, args.given)
    check_teacher(teacher, theirs, check_config(config))
    if taken and not args.print_config:
        print("from the teacher: " + ", ".join(f"{name} {getattr(config, name)}" for name in taken))
    return config, teacher


def _run_to_resume(args: Arguments) -> Path | None:
    """The run that --resume means; None where there is nothing to resume and a new run has to begin."""
    if args.resume:
        return find_folder(args.resume, args.runs)
    if args.out is not None:
        return args.out if (args.out / CONFIG).is_file() else None
    everything = list(run_folders(args.runs))
    wanted = (args.preset, args.stage)
    alike = [(path, config) for path, config in everything if (config.preset, config.stage) == wanted]
    fitting = [(path, config) for path, config in alike if not conflicts(config, args.given, FREE)]
    unfinished = [(path, config) for path, config in fitting if not is_finished(path)]
    if unfinished:
        # Of several, the one that this command line would have begun; the newest of equals.
        line = asdict(args.config())
        free = [(path, config) for path, config in unfinished if is_free(path)] or unfinished[:1]
        return min(free, key=lambda run: sum(line[name] != value for name, value in asdict(run[1]).items()))[0]
    if fitting:
        return fitting[0][0]
    for path, _ in alike:
        if not is_finished(path):
            return path  # its conflicts are told when it is opened
    others = [path for path, _ in everything if not is_finished(path)]
    if others and not args.given:
        raise UserError(f"no run of preset {args.preset}, stage {args.stage} is in {args.runs}: to go on with another "
                        f"one use --resume {others[0]}")  # fmt: skip
    print(f"nothing to resume in {args.runs}: a new run begins")
    return None


def _resume(args: Arguments, path: Path, device: torch.device) -> int:
    config = read_config(path)
    if different := conflicts(config, args.given, FREE):
        raise UserError(f"{path} cannot be resumed: {different[0]}; drop the option, or drop --resume for a new run")
    config = check_config(with_free(config, args.given, FREE))
    if args.print_config:
        print(config.to_json(), end="")
        return 0
    if is_finished(path):
        print(f"{path} is finished: there is nothing to resume")
        return 0
    with RunFolder(path) as folder:
        about = read_metadata(path / STATE) if (path / STATE).is_file() else {}
        _same_machine(args, about, device)
        trainer = Trainer(config, device=device, teacher=_same_teacher(args, config, about, path))
        write_config(path, trainer.config)
        return _run(trainer, folder, args)


def _same_machine(args: Arguments, about: dict[str, str], device: torch.device) -> None:
    """As many threads as before; says so where the arithmetic may differ from before."""
    threads = args.threads or int(about.get("threads", 0))
    if threads:
        torch.set_num_threads(threads)
    now = {"threads": str(torch.get_num_threads()), "device": device.type, "torch": torch.__version__}
    for name, value in now.items():
        if about.get(name, value) != value:
            print(f"note: {name} was {about[name]} and is {value}: the last bits may differ from an uninterrupted run")


def _same_teacher(args: Arguments, config: Config, about: dict[str, str], path: Path) -> Path | None:
    if config.stage == 1:
        return None
    if args.teacher is not None or "teacher_path" not in about:
        return find_teacher(args.teacher, args.runs, config.preset)
    recorded = Path(about["teacher_path"])
    return find_teacher(recorded if recorded.is_dir() else path.parent / recorded.name, args.runs, config.preset)


def _run(trainer: Trainer, folder: RunFolder, args: Arguments) -> int:
    config, device, path = trainer.config, trainer.device, folder.path
    threads = torch.get_num_threads()
    where = f"CPU with {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    trained = sum(parameter.numel() for parameter in trainer.parameters) / 1e6
    print(f"{path}: preset {config.preset}, stage {config.stage}, {len(trainer.train_set)} images, "
          f"{trainer.total_steps} steps of {config.batch_size}, {trained:.1f} M parameters train, "
          f"{trainer.precision} on {where}", flush=True)  # fmt: skip
    outcome = trainer.run(folder, tensorboard=args.tensorboard)
    if trainer.loader.corrupt:
        reason = next(iter(trainer.loader.corrupt.values()))
        print(f"{len(trainer.loader.corrupt)} corrupt images were replaced by others, all in {path / CORRUPT}; the "
              f"first: {reason}")  # fmt: skip
    if not outcome.finished:
        print(f"stopped at step {outcome.step} of {outcome.total_steps}: go on with python -m spot_fast.train "
              f"--resume {path}")  # fmt: skip
        return _INTERRUPTED
    print(_summary(path, config, outcome))
    return 0


def _summary(path: Path, config: Config, outcome: Outcome) -> str:
    """What a user wants to know at the end, and what to type next."""
    lines = [f"{path} is finished: {outcome.total_steps} steps in {duration(outcome.seconds)}"]
    if outcome.scores:
        lines.append(scores_text(outcome.scores))
    student = "" if config.preset == "scenes" else f" --preset {config.preset}"
    lines += ["next:", f"  python -m spot_fast.evaluate {path}", f"  python -m spot_fast.segment IMAGE --run {path}"]
    if config.stage == 1:
        lines.insert(-2, f"  python -m spot_fast.train --stage 2{student} --teacher {path}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
