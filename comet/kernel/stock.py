"""Functions of the standard library as it has them, whether gevent has patched them or not.

A leaf. It looks for the patch instead of importing it, so the supervisor, which has no greenlets, can
use the kernel modules without loading gevent.
"""

import sys
from types import ModuleType
from typing import Any


def stock(module: ModuleType, name: str) -> Any:
    """The function `name` of `module` as it was before any patch."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched(module.__name__):
        return monkey.get_original(module.__name__, name)
    return getattr(module, name)
