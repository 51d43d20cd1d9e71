"""gevent's patch of the standard library, with one search for gevent's plugins.

A leaf, imported before anything that gevent patches.
"""

from importlib import metadata
from typing import cast

from gevent import monkey


def patch_all() -> None:
    """Patch the standard library, as `gevent.monkey.patch_all` does.

    gevent searches the metadata of all installed packages for its plugins, anew for each event it tells of, two and more a module. Beside
    many packages a start spends much of its time there. Here they are searched once.
    """
    search = metadata.entry_points
    found = cast(metadata.EntryPoints, search())  # with Python 3.11's types a mapping, which is deprecated
    metadata.entry_points = found.select  # type: ignore[assignment]
    try:
        monkey.patch_all()
    finally:
        metadata.entry_points = search
