"""`python -m spot_fast.data check PATH` exits with 0 if PATH can be trained on, else with 2 and a sentence.

`python -m spot_fast.data caches` lists and removes what training has cached on disk.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spot_fast import cli
from spot_fast.data import check
from spot_fast.data.caching.plan import folder_of, text
from spot_fast.data.caching.store import cached, remove
from spot_fast.errors import UserError
from spot_fast.files import atomic_write

_MAX_JOBS = 16


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m spot_fast.data", description="Looks after data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|caches")
    command = commands.add_parser(
        "check",
        help="say what a folder holds, what is wrong with it and how to train on it",
        description="Says what PATH holds (COCO, VOC, MOVi as PNG clips or TFRecord, a folder or a list of images), "
        "how many images and masks, what is missing or damaged, and the command to train with.",
    )
    command.add_argument("path", metavar="PATH", type=Path, help="folder of a data set, or a text file listing images")
    command.add_argument("--sbd", metavar="DIR", help="folder of SBD, for VOC without trainaug.txt")
    command.add_argument(
        "--decode",
        action="store_true",
        help="decode every image and mask, instead of looking at both ends of the files: finds "
        "images that were damaged inside, which decoders fill with grey or garbage",
    )
    command.add_argument(
        "--jobs",
        action=cli.Number,
        least=1,
        default=min(_MAX_JOBS, os.cpu_count() or 1),
        help="threads (default: one a core)",
    )
    command.add_argument("--list", metavar="FILE", type=Path, help="write the names of missing and damaged files there")
    command = commands.add_parser(
        "caches",
        help="list the caches of pixels and features on disk, and remove them",
        description="Lists what training has cached on disk: size, day, data set. A removed cache is built again when "
        "it is needed.",
    )
    command.add_argument(
        "--cache-dir", metavar="DIR", help="their folder (default: $SPOT_FAST_CACHE or ~/.cache/spot_fast)"
    )
    command.add_argument("--remove", metavar="NAME", help="remove the one of that name, or all")
    return parser


@cli.command("run it again for the rest")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return _caches(args) if args.command == "caches" else _check(args)


def _check(args: argparse.Namespace) -> int:
    if args.list is not None and not args.list.parent.is_dir():
        raise UserError(f"--list {args.list}: the folder {args.list.parent} does not exist")
    options = {"sbd": args.sbd}
    result = check.find(args.path, options, decode=args.decode)
    check.inspect(result, jobs=args.jobs)
    if args.list is not None:
        lines = "".join(f"{name}\n" for name in check.bad_files(result)).encode(errors="surrogateescape")
        atomic_write(args.list, lambda partial: partial.write_bytes(lines))
    for line in check.report(args.path, result, options):
        print(line)
    sentence = check.verdict(result)
    if sentence is None:
        return 0
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _caches(args: argparse.Namespace) -> int:
    folder = folder_of(args.cache_dir)
    if folder is None:
        raise UserError("there is no folder of caches, $HOME is not set: name one with --cache-dir")
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder} cannot be read: use another --cache-dir, or ask its owner")
    caches, errors, removing = list(cached(folder)), [], args.remove is not None
    if removing:
        chosen = [cache for cache in caches if args.remove in ("all", cache.folder.name)]
        if not chosen and args.remove != "all":
            raise UserError(f"--remove {args.remove}: {folder} has no cache of that name, list them without --remove")
        caches = []
        for cache in chosen:  # the others too if one of them cannot be removed
            try:
                remove(cache)
                caches.append(cache)
            except UserError as error:
                errors.append(error)
    for cache in caches:
        state = "removed" if removing else "complete" if cache.complete else "incomplete"
        print(f"{text(cache.nbytes):>8}  {state:10}  {cache.built}  {cache.folder.name}  {cache.what}")
    print(f"{text(sum(cache.nbytes for cache in caches))} {'freed' if removing else 'used'} in {folder}")
    if errors:
        raise errors[0]
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
