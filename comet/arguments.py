"""The parser of every command line here: what is wrong is said in one line, which stands alone.

argparse prints the usage first, a page of it where there are fifty flags, and guesses nothing. A leaf, standard library only.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

CLOSE = 0.6
"""How alike two names must be for one to be taken for the other (`difflib`)."""


class Parser(argparse.ArgumentParser):
    """argparse's parser; an error is one line, and an unknown flag is told the nearest that there is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # an abbreviation in somebody's script would break with the next flag
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on standard error."""
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: error: {message}{end} See {self.prog} --help.\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse all of `args`; exit with status 2 and one line if something is wrong."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = rest[0].partition("=")[0]
            self.error(f"{flag} is not known here{meant(flag, self._flags()) if flag.startswith('-') else ''}")
        return parsed

    def _flags(self) -> Iterable[str]:
        """Return the flags of this parser and its subcommands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for one in action.choices.values():
                    yield from one._flags()
            yield from (name for name in action.option_strings if name.startswith("--"))


def meant(name: str, known: Iterable[str], prefix: str = "--") -> str:
    """Return the end of a sentence that names the nearest of `known`, or an empty text if none is near. All begin with `prefix`,
    which makes no two of them alike."""
    near = difflib.get_close_matches(name.removeprefix(prefix), [one.removeprefix(prefix) for one in known], n=1, cutoff=CLOSE)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
