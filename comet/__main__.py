"""python -m comet: what is done beside a service, each a subcommand.

A subcommand is a function in `COMMANDS` that adds its parser, with `run` set to what does it and answers the exit status.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comet.arguments import Parser
from comet.kernel import check
from comet.kernel.output import open_standard
from comet.settings import DAY, Unreadable, read_secret

Run = Callable[[argparse.Namespace], int]

UNWRITTEN = 2
"""The exit status of a subcommand whose output could not be written."""


def main(arguments: Sequence[str]) -> int:
    """Do what they say; the exit status."""
    parser = Parser(prog="python -m comet", description="What is done beside a service.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    parsed = parser.parse_args(arguments)
    run: Run = parsed.run
    try:
        status = run(parsed)
        sys.stdout.flush()
    except OSError as error:  # of standard output: each subcommand says by itself what else it can't read or write
        print(f"python -m comet: the output can't be written: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else what is left of it fails once more, as Python ends
        return UNWRITTEN
    return status


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="what the machine must allow for so many clients, and what it allows",
        description="What the machine must allow for so many clients, beside what it allows. Changes nothing and needs no root.",
        epilog="Exit status: 0 when all is well, 1 when something wanted is not met, 2 when that can't be told. What can't be read is "
        "unknown, and no failure.",
    )
    parser.add_argument("--clients", type=_number(), metavar="N", help="connections in all (default: what the limit on open files allows)")
    parser.add_argument("--port", type=_number(65535), metavar="N", default=8000, help="the service's (default: 8000)")
    parser.add_argument("--workers", type=_number(), metavar="N", default=1, help="processes that share the clients (default: 1)")
    parser.add_argument("--hibernate", choices=("on", "off"), default="on", help="as the service is run (default: on)")
    parser.add_argument("--max-bodies", type=_number(1 << 40), metavar="N", default=check.BODIES, help="as the service's, in bytes")
    parser.add_argument("--max-per-address", type=_number(), metavar="N", default=check.PER_ADDRESS, help="as the service's")
    parser.add_argument("--loopback", action="store_true", help="the clients run on this machine too (a load test)")
    parser.set_defaults(run=_check)


def _check(parsed: argparse.Namespace) -> int:
    clients: int | None = parsed.clients or check.capacity(parsed.workers)
    if clients is None:
        print("python -m comet check: the limit on open files can't be read here: say --clients", file=sys.stderr)
        return 2
    hibernate, bodies, per_address = parsed.hibernate == "on", parsed.max_bodies, parsed.max_per_address
    plan = check.Plan(clients, parsed.port, parsed.workers, hibernate, parsed.loopback, bodies, per_address)
    rows = check.rows(plan)
    print(f"{plan.clients:,} clients on port {plan.port}, {plan.workers} worker{'s' if plan.workers > 1 else ''}\n")
    print(table(rows))
    unmet = sum(row.unmet for row in rows)
    print(f"\n{unmet} of {len(rows)} not met" if unmet else "\nall met, as far as can be known")
    return 1 if unmet else 0


def table(rows: Sequence[check.Row]) -> str:
    """Rows in aligned columns, each with its reason below it, and with what sets it where it is unmet."""
    cells = [("", "limit", "found", "wanted"), *((row.verdict, row.name, row.found, row.wanted) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    indent = " " * (widths[0] + 2)
    text = lines[:1]
    for line, row in zip(lines[1:], rows, strict=True):
        text += [line, f"{indent}  {row.why}", *(f"{indent}  > {one}" for one in row.set)]
    return "\n".join(text)


def _number(most: int = 1 << 30) -> Callable[[str], int]:
    def convert(text: str) -> int:
        number = int(text)
        if not 1 <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not within 1 to {most}")
        return number

    convert.__name__ = "number"
    return convert


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= DAY:
        raise argparse.ArgumentTypeError(f"{text} is not within 0.1 to {DAY:.0f}")
    return seconds


_seconds.__name__ = "number"


def _add_top(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="a running service, live",
        description="What a running service says of itself (GET /stats), live in the terminal. Ctrl-C ends it.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where it listens (default: http://127.0.0.1:8000)")
    parser.add_argument("--key", default="", help="its publish key, if it has one (better: COMET_PUBLISH_KEY)")
    parser.add_argument("--every", type=_seconds, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="one look, printed")
    parser.set_defaults(run=_top)


def _top(parsed: argparse.Namespace) -> int:
    from comet import top  # its tables are a package that `check` can do without

    return top.show(parsed.url, parsed.key, parsed.every, parsed.once)


def _add_load_friends(commands: Any) -> None:
    parser = commands.add_parser(
        "load-friends",
        help="an edge list into the subscription database",
        description="Load who follows whom from a file of lines 'follower followee' into a service's data folder. What is there stays. "
        "Run it again after a break: it ends in the same state. A service may run on the folder meanwhile.",
        epilog="Exit status: 0 when all lines are stored, safe on the disk; 2 when they are, and that can't be told; 1 otherwise.",
    )
    parser.add_argument("file", type=Path, help="the edge list, such as python -m loadtest friends makes")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, metavar="DIR", help="the service's data folder")
    where.add_argument("--backplane", metavar="URL", help="the service's Redis, where it keeps them there; its password shows in ps")
    where.add_argument("--backplane-file", type=Path, metavar="FILE", help="the same URL in a file")
    parser.add_argument("--redis-prefix", metavar="TEXT", default="c:", help="as the service's (default: c:)")
    parser.set_defaults(run=_load_friends)


def _load_friends(parsed: argparse.Namespace) -> int:
    if parsed.backplane or parsed.backplane_file:
        from comet import loading_redis

        try:
            url = parsed.backplane or read_secret(parsed.backplane_file, "--backplane-file", "URL of Redis")
        except Unreadable as error:
            print(f"load-friends: {error}", file=sys.stderr)
            return 1
        return loading_redis.load(parsed.file, url, parsed.redis_prefix)
    from comet import loading

    return loading.load(parsed.file, parsed.data)


COMMANDS = (_add_check, _add_top, _add_load_friends)


if __name__ == "__main__":
    open_standard()
    sys.exit(main(sys.argv[1:]))
