"""What a load test takes: worked out for machines that are made up."""

import pytest

from comet.kernel.machine import Machine
from loadtest.plan import nap, plan, settings, unmet


def made_up(files: int = 20_000, gib: float = 23.0, tcp_mem: int = 575_796) -> Machine:
    answers = {
        "/proc/self/limits": f"Max open files            {files}                {files}                files\n",
        "/proc/meminfo": f"MemTotal:       {int(gib * 2**20)} kB\nMemAvailable:   {int(gib * 2**20)} kB\n",
        "/proc/sys/net/ipv4/tcp_mem": f"1 2 {tcp_mem}",
        "/proc/sys/fs/file-max": "9000000",
        "/proc/sys/fs/file-nr": "1000 0 9000000",
        "/proc/sys/fs/nr_open": "1048576",
    }

    def read(path: str) -> str:
        if path in answers:
            return answers[path]
        raise OSError(path)

    return Machine(read, lambda: "")


def test_a_million_takes_the_processes_that_the_file_limit_asks_for() -> None:
    made = plan(1_000_000, 8000, machine=made_up(), processors=2)
    assert made.workers == 60
    assert made.processes * (20_000 - 512) >= 1_000_000 > (made.processes - 1) * (20_000 - 512)
    assert made.each * made.processes >= 1_000_000
    assert made.addresses == 500
    assert not made.objections


def test_a_few_take_a_process_a_core() -> None:
    made = plan(1000, 8000, machine=made_up(), processors=2)
    assert (made.workers, made.processes, made.each) == (2, 2, 500)


def test_senders_are_open_files_too() -> None:
    made = plan(38_000, 8000, machine=made_up(), processors=2, senders=10_000)
    assert made.processes * (20_000 - 512) >= 38_000 + 10_000
    assert made.processes == 3


def test_what_does_not_fit_is_refused_and_says_what_would() -> None:
    made = plan(4_000_000, 8000, machine=made_up(), processors=2)
    (objection,) = made.objections
    fitting = int(objection.split("about ")[1].split(" ")[0].replace(",", ""))
    assert not plan(fitting, 8000, machine=made_up(), processors=2).objections


def test_a_service_elsewhere_takes_nothing_here() -> None:
    here, elsewhere = (plan(1_000_000, 8000, one, made_up(), 2) for one in (True, False))
    assert elsewhere.workers == 0
    assert elsewhere.memory < 0.6 * here.memory


def test_the_kernel_settings_are_commands() -> None:
    rows = unmet(plan(1_000_000, 8000, machine=made_up(), processors=2), made_up())
    assert ["sysctl", "-w", "net.ipv4.tcp_mem=500000 666666 1000000"] in settings(rows)
    assert not unmet(plan(1_000_000, 8000, machine=made_up(tcp_mem=1_000_000), processors=2), made_up(tcp_mem=1_000_000))


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_hardly_any(clients: int) -> None:
    made = plan(clients, 8000, machine=made_up(), processors=2)
    assert made.each * made.processes >= clients


def test_a_port_of_another_machine_clashes_with_nothing_here() -> None:
    machine = made_up(tcp_mem=1_000_000)
    answers = {"/proc/sys/net/ipv4/ip_local_port_range": "1024 65000", "/proc/sys/net/core/somaxconn": "16"}
    small = Machine(lambda path: answers.get(path) or machine.read(path), lambda: "")
    here, elsewhere = (unmet(plan(1_000_000, 8000, one, machine, 2), small) for one in (True, False))
    assert {row.name for row in here} == {"net.ipv4.ip_local_port_range", "net.core.somaxconn"}
    assert not elsewhere


@pytest.mark.parametrize(("processes", "seconds"), [(2, 0.002), (4, 0.002), (10, 0.012), (52, 0.096), (103, 0.1)])
def test_the_more_processes_share_a_core_the_longer_each_naps(processes: int, seconds: float) -> None:
    assert nap(processes, 2) == pytest.approx(seconds)
