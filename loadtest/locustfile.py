"""For Locust: the users (`loadtest.users`), one shape (`loadtest.shapes`), and what joins its processes (`loadtest.control`).

    COMET_SHAPE=Smoke locust -f loadtest/locustfile.py --headless --processes 2 --host http://127.0.0.1:8000 --clients 2000
    locust -f loadtest/locustfile.py StreamUser FriendSender     # the web page, users and rates by hand

`make million` does the first with everything around it. Run it from the checkout's root. By hand (`loadtest.control`) there are as many
clients as Locust is told, whatever --clients says, and senders send to those who are connected.
"""

import os

from locust import events

from loadtest import shapes
from loadtest.control import set_up
from loadtest.options import add_flags
from loadtest.users import (  # noqa: F401 - Locust looks for them here
    Churn,
    DirectSender,
    EventsUser,
    EveryoneSender,
    FriendSender,
    LongPollUser,
    LongTailSender,
    StreamUser,
    SwarmUser,
)

events.init_command_line_parser.add_listener(add_flags)
events.init.add_listener(set_up)

_name = os.environ.get("COMET_SHAPE", "")
if _name:
    if _name not in shapes.SHAPES:
        raise SystemExit(f"COMET_SHAPE={_name}: it is one of {', '.join(shapes.SHAPES)}")
    shape = shapes.SHAPES[_name]  # Locust takes the one that it finds
