"""python -m loadtest: what load tests are made of, each a subcommand. Needs loadtest/requirements.txt.

``friends`` makes the data set of metabrew's third part: who follows whom among so many users, a
Barabasi-Albert graph, in which who has many followers gets more. New users follow `--each` others that
were there before; all their links count for how attractive a user is, as in metabrew's undirected graph.
`python -m comet load-friends` loads it.
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
    commands = parser.add_subparsers(required=True, metavar="command")
    add = commands.add_parser("friends", help="who follows whom, as an edge list", allow_abbrev=False)
    add.add_argument("--users", type=_number, default=1_000_000, help="how many (default: 1000000)")
    add.add_argument("--each", type=_number, default=15, help="others that each follows (default: 15)")
    add.add_argument("--seed", type=int, default=1, help="the same makes the same graph (default: 1)")
    add.add_argument("--out", type=Path, default=Path("friends.txt"), metavar="FILE", help="where (default: friends.txt)")
    parsed = parser.parse_args()
    friends(parsed.users, parsed.each, parsed.seed, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
