"""python -m loadtest: what load tests are made of, each a subcommand. Needs loadtest/requirements.txt.

``friends`` makes the data set of metabrew's third part: who follows whom among so many users, a
Barabasi-Albert graph, in which who has many followers gets more. New users follow `--each` others that
were there before; all their links count for how attractive a user is, as in metabrew's undirected graph.
`python -m comet load-friends` loads it.

``million`` is the whole test (`loadtest.million`), ``soak`` its second part for hours, ``report`` writes the report of a run
again.
"""

import argparse
import random
import resource
import sys
import time
from pathlib import Path


def friends(users: int, each: int, seed: int, out: Path) -> None:
    """Write the edge list, a line ``follower followee``, and say what it is."""
    import igraph  # of load tests alone

    random.seed(seed)  # igraph takes its numbers from there
    began = time.monotonic()
    graph = igraph.Graph.Barabasi(users, each, outpref=True, directed=True)
    made = time.monotonic()
    with out.open("wb") as file:
        graph.write_edgelist(file)
    written = time.monotonic()
    followers = sorted(graph.indegree())
    print(
        f"{users:,} users, {graph.ecount():,} subscriptions: made in {made - began:.1f} s, written to {out} in {written - made:.1f} s, "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB\n"
        f"followers of a user: median {followers[users // 2]}, p99 {followers[int(users * 0.99)]}, most {followers[-1]:,}"
    )


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="What load tests are made of.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    add = commands.add_parser("friends", help="who follows whom, as an edge list", allow_abbrev=False)
    add.add_argument("--users", type=_number, default=1_000_000, help="how many (default: 1000000)")
    add.add_argument("--each", type=_number, default=15, help="others that each follows (default: 15)")
    add.add_argument("--seed", type=int, default=1, help="the same makes the same graph (default: 1)")
    add.add_argument("--out", type=Path, default=Path("friends.txt"), metavar="FILE", help="where (default: friends.txt)")
    _test(commands.add_parser("million", help="metabrew's test with everything around it", allow_abbrev=False), 1_000_000, 300, "Million")
    _test(commands.add_parser("soak", help="messages for hours; judges memory", allow_abbrev=False), 10_000, 3600, "Metabrew10kMessages")
    add = commands.add_parser("report", help="the report of a run, again", allow_abbrev=False)
    add.add_argument("folder", type=Path, help="the run's")
    parsed = vars(parser.parse_args())
    command = parsed.pop("command")
    if command == "friends":
        friends(**parsed)
        return 0
    if command == "report":
        from loadtest.report import report

        objections = report(parsed["folder"])["objections"]
        print("\n".join(objections) or "PASSED")
        return int(bool(objections))
    from loadtest.million import Order, run

    return run(Order(**parsed))


def _test(parser: argparse.ArgumentParser, clients: int, seconds: float, shape: str) -> None:
    """The flags of a whole test: `loadtest.million.Order`."""
    add = parser.add_argument
    add("--clients", type=_number, default=clients, help=f"how many (default: {clients})")
    add("--duration", type=float, default=seconds, metavar="S", help=f"seconds that messages are sent (default: {seconds})")
    add("--rate", type=float, default=1000.0, metavar="R", help="messages a second (default: 1000)")
    add("--shape", default=shape, help=f"of loadtest/shapes.py (default: {shape})")
    add("--then", default="", metavar="WHAT,…", help="after the messages: churn, search, broadcast")
    add("--churn", type=float, default=0.001, metavar="SHARE", help="of the clients that leave and come back each second (default: 0.001)")
    add("--endpoints", default="test:49,stream:1", metavar="NAME:SHARE,…", help="what clients ask for (default: test:49,stream:1)")
    add("--open-rate", type=float, default=15_000.0, metavar="R", help="clients opened a second at most (default: 15000)")
    add("--senders", type=_number, default=1000, metavar="N", help="how many send (default: 1000)")
    add(
        "--nap",
        type=float,
        default=0.0,
        metavar="S",
        help="of a swarm between two looks; latencies have it (default: 2 ms a process beyond two a core, at most 100)",
    )
    add("--each", type=_number, default=15, metavar="N", help="others that each user follows (default: 15)")
    add("--port", type=int, default=8000, help="of the service (default: 8000)")
    add("--service", default="", metavar="FLAGS", help="more flags for it")
    add("--apply", action="store_true", help="set what the kernel must allow, as root")
    add("--out", type=Path, default=Path(".million"), metavar="FOLDER", help="for data and runs (default: .million)")
    add("--host", default="", metavar="URL", help="a service that runs already, on another machine: nothing is started or loaded")
    add("--friends", default="", metavar="FILE", help="with --host: the edge list that it has loaded (default: nobody follows)")
    add("--sources", default="", metavar="ADDRESS,…", help="local addresses to connect from")


if __name__ == "__main__":
    sys.exit(main())
