"""gevent's patch of the standard library, with one search for gevent's plugins.

A leaf, imported before anything that gevent patches.
"""

from importlib import metadata
from typing import Any

from gevent import monkey


def patch_all() -> None:
    """Patch the standard library, as `gevent.monkey.patch_all` does.

    gevent searches the metadata of all installed packages for its plugins, anew for each of 25 events: beside Locust's packages
    that was a third of the time that a start takes (cProfile). Here they are searched once.
    """
    search = metadata.entry_points
    found: Any = search()
    metadata.entry_points = found.select
    try:
        monkey.patch_all()
    finally:
        metadata.entry_points = search
