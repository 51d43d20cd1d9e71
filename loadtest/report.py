"""What a run was, from the files it has left: `report.json`, PNG charts and one HTML page that holds them; and whether it passed.

Files of a run: `run.json` (command, plan, machine), `timeline.jsonl` and `summary.json` (Locust's master), `samples.jsonl` (the
sampler). Neighbours: `loadtest.charts`, `loadtest.million`.
"""

import base64
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.charts import draw

Document = dict[str, Any]

SLOW = 1000.0
"""Milliseconds that p99 of the messages may be."""

ACHIEVED = 0.9
"""Of the rate asked for."""

WARM, GROWTH = 300.0, 0.05
"""A soak's memory at its end may be so much above what it was after so many seconds (or a fifth of it, if it is shorter)."""

METABREW = (
    ("mochiweb (Erlang), 10,000 clients", "8 KB a client", "1 s between messages to random users"),
    ("mochiweb (Erlang), 1,000,000 clients", "25 to 30 GB of process memory, 10 GB of kernel memory", "3 hours to open, 1,000 messages/s"),
    ("libevent (C), 1,000,000 clients", "under 2 GB of process memory, 8 GB of kernel memory", ""),
)
"""What metabrew published in "A Million-user Comet Application with Mochiweb", parts 1 to 3, 2008."""

COVERS = (
    "Every delivery that is counted was read from the client's own socket and parsed by the load generator, number and send time; only "
    "bytes that equal the last client's to the last one are not parsed again. At the end the count and the sum of the numbers that "
    "each client got are compared with what was sent to whom it follows (lost, doubled, other). Clients of /stream, /events and /poll "
    "check that each id follows the last, all the time; of /test, which has no ids, one client in sixteen checks that each sender's "
    "messages come in order. Latency is from before the write of the POST to the parsed message: both by one clock."
)


def lines(path: Path) -> list[Document]:
    """Of a JSON lines file; none where it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gather(folder: Path) -> Document:
    """Everything the run has left, and the figures made of it."""
    document: Document = json.loads((folder / "run.json").read_text())
    document["summary"] = json.loads((folder / "summary.json").read_text())
    document["series"] = series(lines(folder / "timeline.jsonl"), lines(folder / "samples.jsonl"))
    document["figures"] = figures(document)
    return document


def series(timeline: Sequence[Document], samples: Sequence[Document]) -> Document:
    """Columns over seconds since the first line: `clients` by the master's clock, `machine` by the sampler's."""
    start = min((one["time"] for one in (*timeline[:1], *samples[:1])), default=0.0)
    clients: Document = {name: [] for name in ("at", "section", "open", "opening", "deliveries", "messages", "p50", "p99")}
    for before, now in itertools.pairwise(timeline):
        seconds = max(0.1, now["time"] - before["time"])
        feed = now["latencies"].get("feed") or now["latencies"].get("everyone") or {}
        row = {
            "at": now["time"] - start, "section": now["section"], "open": now["open"],
            "opening": (now["opened"] - before["opened"]) / seconds,
            "deliveries": (now["received"] - before["received"]) / seconds,
            "messages": (now["sent"] - before["sent"]) / seconds,
            "p50": feed.get("p50"), "p99": feed.get("p99"),
        }  # fmt: skip
        for name, value in row.items():
            clients[name].append(round(value, 3) if isinstance(value, float) else value)
    names = ("at", "service", "load", "slab", "buffers", "available", "service_cores", "load_cores", "busy_cores")
    here: Document = {name: [] for name in names}
    for before, now in itertools.pairwise(samples):
        seconds = max(0.1, now["time"] - before["time"])
        row = {"at": now["time"] - start, "slab": now["kernel"]["Slab"], "buffers": now["sockets"]["memory_bytes"]}
        row["busy_cores"] = (now["busy"] - before["busy"]) / seconds if "busy" in before else None
        row["available"] = now["kernel"]["MemAvailable"]
        for name in ("service", "load"):
            mine, was = now.get(name), before.get(name)
            row[name] = mine["memory"] if mine else 0
            row[name + "_cores"] = max(0.0, mine["cpu"] - was["cpu"]) / seconds if mine and was else 0.0
        for name in names:
            here[name].append(None if row[name] is None else round(row[name], 3))
    sections = [
        (now["time"] - start, now["section"]) for at, now in enumerate(timeline) if not at or timeline[at - 1]["section"] != now["section"]
    ]
    return {"clients": clients, "machine": here, "sections": sections}


def within(data: Mapping[str, Sequence[Any]], name: str, since: float, until: float) -> list[float]:
    """A column's values between two times."""
    return [value for at, value in zip(data["at"], data[name], strict=True) if since <= at <= until and value is not None]


def spans(document: Document) -> dict[str, tuple[float, float]]:
    """When each section began and ended."""
    began = document["series"]["sections"]
    last = max(document["series"]["clients"]["at"], default=0.0)
    return {name: (at, end) for (at, name), end in zip(began, [*(at for at, _ in began), last][1:], strict=True)}


def figures(document: Document) -> list[tuple[str, str]]:
    """Name and text, a row each."""
    found: list[tuple[str, str]] = []
    facts, verdict = document["summary"]["facts"], document["summary"]["verdict"]
    clients, machine, when = document["series"]["clients"], document["series"]["machine"], spans(document)
    if "open" in facts:
        found.append(
            ("clients opened", f"{facts['open']['clients']:,} in {facts['open']['seconds']:.1f} s: {facts['open']['rate']:,.0f}/s")
        )
    after = when.get("idle", when.get("messages", (0.0, 0.0)))[0]
    until = when.get("audit", (max(clients["at"], default=0.0), 0.0))[0]
    held = within(clients, "open", after, until)
    if held:
        found.append(("clients held", f"at least {min(held):,.0f} for {until - after:,.0f} s"))
    for name, label in (("idle", "before the first message"), ("messages", "at the end of the messages")):
        if name in when and machine["at"]:
            since, end = when[name]
            found += memory(document, max(since, end - 5), end + 1, label)
    for one in facts.get("messages", []):
        text = (
            f"{one['achieved']:,.0f}/s of {one['asked']:,.0f}/s asked for, {one['deliveries']:,.0f} deliveries/s "
            f"for {one['seconds']:,.0f} s; p50 {one['p50']:,.1f} ms, p99 {one['p99']:,.1f} ms, p99.9 {one['p99.9']:,.1f} ms, "
            f"most {one['max']:,.0f} ms"
        )
        found.append((f"messages: {one['name']}", text))
        since = when.get(one["name"], (0.0, 0.0))[0]  # what comes behind its seconds is the drain
        cores = [within(machine, f"{part}_cores", since, since + one["seconds"]) for part in ("service", "load", "busy")]
        if all(cores):
            shares = [sum(part) / len(part) for part in cores]
            service = f"service {shares[0]:.2f} cores, " if document["plan"]["workers"] else ""
            found.append(
                (
                    f"CPU: {one['name']}",
                    f"{service}load {shares[1]:.2f} cores, others {shares[2] - shares[0] - shares[1]:.2f}",
                )
            )
    if "fastest" in facts:
        found.append(
            (
                "fastest with p99 under 1 s",
                f"{facts['fastest']['achieved']:,.0f} messages/s, {facts['fastest']['deliveries']:,.0f} deliveries/s",
            )
        )
    if "search" in facts:
        one = facts["search"]
        found.append(("at rates that were too high", f"{one['refused']:,} messages refused, {one['unsure']:,} not confirmed"))
    if "churn" in facts:
        found.append(("churn", f"{facts['churn']['left']:,} left and came back with their cursor: {facts['churn']['rate']:,.0f}/s"))
    if "broadcast" in facts:
        one = facts["broadcast"]
        found.append(
            ("one message to everybody", f"{one['clients']:,} clients: {one['rate']:,.0f} deliveries/s (median of {len(one['each'])})")
        )
        for name, label in (("direct_alone", "a direct message, nothing else"), ("direct", "a direct message during broadcasts")):
            found.append((label, f"p50 {one[name]['p50']:,.1f} ms, p99 {one[name]['p99']:,.1f} ms ({one[name]['count']:,.0f} messages)"))
    if verdict:
        text = (
            f"{verdict['sent']:,} messages acknowledged, {verdict['due']:,} deliveries due, {verdict['received']:,} received; "
            f"lost {verdict['lost']:,}, doubled {verdict['doubled']:,}, other {verdict['other']:,}"
        )
        found.append(("audit" if verdict["complete"] else "audit, of sums alone", text))
    failures = document["summary"]["failures"]
    found.append(("failures", ", ".join(f"{what} {count:,}" for what, count in failures.items()) or "none"))
    return found


def memory(document: Document, since: float, until: float, label: str) -> list[tuple[str, str]]:
    """Rows for a part of the run."""
    clients, machine = document["series"]["clients"], document["series"]["machine"]
    held = within(clients, "open", since, until)
    if not held or not held[-1]:
        return []
    number = held[-1]
    rows = []
    for name, what in (
        ("service", "the service's memory"),
        ("load", "the load's memory"),
        ("slab", "the kernel's slabs"),
        ("buffers", "in socket buffers"),
    ):
        values = within(machine, name, since, until)
        if values and values[-1]:
            grown = values[-1] - (machine["slab"][0] if name == "slab" else 0)
            rows.append((f"{what}, {label}", f"{grown / 2**30:.2f} GiB, {grown / number:,.0f} bytes a client"))
    return rows


def judge(document: Document) -> list[str]:
    """Why it did not pass, a sentence each."""
    summary = document["summary"]
    facts, verdict = summary["facts"], summary["verdict"]
    found = [facts["failed"]] if "failed" in facts else []
    found += [f"{what}: {count:,}" for what, count in summary["failures"].items()]
    if verdict is None:
        found.append("there was no audit")
    else:
        refused, unsure = (verdict[name] - facts.get("search", {}).get(name, 0) for name in ("refused", "unsure"))
        if refused or unsure:
            found.append(f"of the messages {refused:,} were refused, and {unsure:,} not confirmed")
    for one in facts.get("messages", []):
        if one["name"] not in ("messages", "churn"):
            continue  # the search is for what fails
        if one["p99"] > SLOW and one["name"] == "messages":  # of clients that come and go it is asked that they miss nothing
            found.append(f"{one['name']}: p99 {one['p99']:,.0f} ms, more than {SLOW:,.0f}")
        if one["achieved"] < ACHIEVED * one["asked"]:
            found.append(f"{one['name']}: {one['achieved']:,.0f}/s of {one['asked']:,.0f}/s asked for")
    if document["shape"] == "Metabrew10kMessages":
        found += soak(document)
    return found


def soak(document: Document) -> list[str]:
    """Whether the service's memory grew."""
    since, until = spans(document).get("messages", (0.0, 0.0))
    warm = since + min(WARM, (until - since) / 5)
    machine = document["series"]["machine"]
    first, last = within(machine, "service", warm - 5, warm + 5), within(machine, "service", until - 10, until)
    if not first or not last:
        return ["memory was not sampled"]
    before, after = sum(first) / len(first), sum(last) / len(last)
    if not before:
        document["figures"].append(("memory's growth", "unknown: the service is on another machine"))
        return []
    growth = (after - before) / before
    document["figures"].append(
        ("memory's growth", f"{growth:+.1%}, from {before / 2**20:,.1f} MiB after {warm - since:,.0f} s to {after / 2**20:,.1f} MiB")
    )
    return [f"the service's memory grew by {growth:.1%}"] if growth > GROWTH else []


def report(folder: Path) -> Document:
    """Write all of it."""
    document = gather(folder)
    objections = judge(document)
    document["objections"] = objections
    charts = draw(document, folder)
    (folder / "report.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    (folder / "report.html").write_text(page(document, charts))
    return document


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As HTML."""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(one)}</th>" for one in head) + f"</tr>{cells}</table>"


def page(document: Document, charts: Sequence[Path]) -> str:
    """One file, nothing beside it."""
    objections = document["objections"]
    images = "".join(f'<img alt="{one.stem}" src="data:image/png;base64,{base64.b64encode(one.read_bytes()).decode()}">' for one in charts)
    verdict = "Passed" if not objections else "Failed: " + html.escape("; ".join(objections))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>comet: {document["summary"]["asked"]["clients"]:,} clients</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: left }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }} code {{ background: #f4f4f4 }}
</style>
<h1>{document["summary"]["asked"]["clients"]:,} clients</h1>
<p><strong>{verdict}</strong></p>
<p><code>{html.escape(document["command"])}</code><br>{html.escape(document["machine"])}; service: {document["plan"]["workers"]} workers,
load: {document["summary"]["processes"]} Locust processes, all on this machine unless the command says otherwise.</p>
{table(("figure", ""), document["figures"])}
{images}
<h2>Beside metabrew's figures of 2008</h2>
{table(("", "memory", ""), METABREW)}
<h2>What the counters cover</h2><p>{html.escape(COVERS)}</p>
</html>
"""
