"""The tables of docs/clients.md, made from what the tests assert: `python -m tests.clients.table` writes them."""

import sys
from collections.abc import Sequence

from tests.clients.catalog import CLIENTS, FAULTS
from tests.clients.install import ROOT

DOCUMENT = ROOT / "docs" / "clients.md"
BEGIN = "<!-- made by python -m tests.clients.table -->\n"
END = "<!-- end -->\n"


def tables() -> str:
    """What stands between `BEGIN` and `END`."""
    faults = [["client", "where", *FAULTS.values()]]
    faults += [[f"`{known.name}`", known.where, *(getattr(known, fault) for fault in FAULTS)] for known in CLIENTS]
    needs = [["client", "resumes by", "what to know"]]
    needs += [[f"`{known.name}`", known.cursor, known.note] for known in CLIENTS]
    return f"{_table(faults)}\n{_table(needs)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return "".join([head, f"|{' --- |' * len(rows[0])}\n", *body])


def document() -> str:
    """The document as it should be."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    sys.exit(0)
