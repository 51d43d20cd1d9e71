"""The charts of a run, as PNG. Neighbour: `loadtest.report`, whose columns these are. Needs matplotlib."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GIB = 2**30
SERVICE, LOAD, KERNEL, LINE = "#d1495b", "#8d96a3", "#edae49", "#00798c"


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """All of them; the first shows everything small."""
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.3}
    data, title = document["series"], f"{document['summary']['asked']['clients']:,} clients"
    parts: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
        "memory": memory, "opening": opening, "deliveries": deliveries, "latency": latency,
    }  # fmt: skip
    made = [folder / "overview.png"]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    figure.suptitle(f"{title} on {document['machine'].split(', Linux')[0]}, service and clients")
    for at, part in enumerate(parts.values()):
        axes = figure.add_subplot(2, 2, at + 1)
        part(axes, data)
    figure.savefig(made[0], dpi=90)
    for name, part in parts.items():
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.add_subplot()
        part(axes, data)
        sections(axes, data)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=90)
    return made


def sections(axes: Axes, data: Mapping[str, Any]) -> None:
    """Where each part of the run began."""
    for at, name in data["sections"]:
        axes.axvline(at, color="#ccc", linewidth=0.8)
        axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, color="#666", va="top", ha="right")


def memory(axes: Axes, data: Mapping[str, Any]) -> None:
    """As metabrew's figures: memory, and connections over it."""
    machine, clients = data["machine"], data["clients"]
    slab = [(value - machine["slab"][0]) / GIB for value in machine["slab"]]
    axes.plot(machine["at"], slab, color=KERNEL, label="kernel: sockets (slabs)")
    axes.plot(machine["at"], [value / GIB for value in machine["load"]], color=LOAD, label="load: all processes")
    axes.plot(machine["at"], [value / GIB for value in machine["service"]], color=SERVICE, label="service: all processes", linewidth=2)
    axes.set_ylabel("GiB")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(clients["at"], [value / 1000 for value in clients["open"]], color=LINE, linestyle="--", label="connections")
    other.set_ylabel("thousands of connections")
    other.set_ylim(bottom=0)
    other.grid(visible=False)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [str(one.get_label()) for one in lines], fontsize=7, loc="center right")
    axes.set_title("memory (proportional set size) and connections")


def opening(axes: Axes, data: Mapping[str, Any]) -> None:
    """Clients opened a second."""
    clients = data["clients"]
    axes.plot(clients["at"], clients["opening"], color=LINE)
    axes.set_title("clients opened a second")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)


def deliveries(axes: Axes, data: Mapping[str, Any]) -> None:
    """Deliveries and messages a second."""
    clients = data["clients"]
    axes.plot(clients["at"], clients["deliveries"], color=SERVICE, label="deliveries/s")
    axes.plot(clients["at"], clients["messages"], color=LINE, label="messages/s")
    axes.legend(fontsize=7)
    axes.set_title("deliveries and messages a second")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)


def latency(axes: Axes, data: Mapping[str, Any]) -> None:
    """From POST to parsed, each second's percentiles."""
    clients = data["clients"]
    for name, colour in (("p50", LINE), ("p99", SERVICE)):
        rows = [(at, value) for at, value in zip(clients["at"], clients[name], strict=True) if value]
        if rows:
            axes.plot(*zip(*rows, strict=True), color=colour, label=name)
    axes.set_yscale("log")
    if axes.get_lines():
        axes.legend(fontsize=7)
    axes.set_title("latency of deliveries, ms")
    axes.set_xlabel("seconds")
