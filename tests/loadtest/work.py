"""A load test's process without a load test: Locust's environment, and what `loadtest.control` adds to it."""

import itertools
from collections.abc import Sequence
from typing import Any

from locust import User
from locust.argument_parser import LocustArgumentParser, setup_parser_arguments
from locust.env import Environment

from loadtest.control import Master, Worker
from loadtest.options import add_flags


def environment(*flags: str, shape: Any = None, classes: Sequence[type[User]] = ()) -> Environment:
    """As Locust has it with these flags."""
    parser = LocustArgumentParser()
    setup_parser_arguments(parser)  # type: ignore[no-untyped-call]
    add_flags(parser)
    made = Environment(
        parsed_options=parser.parse_args(list(flags)), host="http://127.0.0.1:8000", shape_class=shape, user_classes=list(classes)
    )
    made.create_local_runner()
    return made


def process(*flags: str, shape: Any = None) -> tuple[Environment, Worker, Master]:
    """One that is master and worker, which reports when a test says so."""
    made = environment(*flags, shape=shape)
    assert made.runner is not None
    if shape is not None:
        shape.runner = made.runner
    return made, Worker(made, made.runner), Master(made, made.runner)


def steps(shape: Any, worker: Worker, seconds: int) -> int:
    """Let so many seconds pass, or until the shape's end: the ticks that there were. The worker reports before each."""
    for count in itertools.count():
        worker._report()
        if count == seconds or shape.tick() is None:
            return count
    raise AssertionError
