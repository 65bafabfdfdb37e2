"""``python -m bench.instructions``: count the instructions of one request with valgrind's callgrind.

Unlike times, the counts do not depend on the load of the machine, so that small changes are visible.  On
Python 3.12 or newer, ``--functions`` also counts them for each function of this package, including its callees.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .contenders import KINDS, NAMES, by_key, of_kind
from .drive import Running
from .machine import postgresql
from .parts import DRIVERS
from .shop import ENDPOINTS, fill_database

FEW, MANY = 100, 600
"""The requests of the two runs that are subtracted from each other, which removes what a process does once."""
OURS = re.compile(r"py::(?P<function>.*?):.*/(?P<file>session_plugin/.*)")


class Count:
    """The instructions that one process has executed.

    Attributes:
        total: all instructions of the process.
        functions: the instructions of each Python function of this package, including its callees.
    """

    def __init__(self, command: list[str], *, functions: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "callgrind.out")
            valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={output}"]
            interpreter = [sys.executable]
            if functions:
                valgrind.append("--smc-check=all-non-file")
                interpreter += ["-X", "perf"]  # a trampoline for each function, and a file with the addresses
            process = subprocess.Popen(
                [*valgrind, *interpreter, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
            output_of_valgrind, _ = process.communicate()
            collected = re.search(r"Collected : (\d+)", output_of_valgrind)
            if process.returncode or collected is None:
                raise RuntimeError(f"callgrind failed:\n{output_of_valgrind}")
            self.total = int(collected[1])
            self.functions: Counter[str] = Counter()
            addresses = Path("/tmp", f"perf-{process.pid}.map")  # Python writes the file here, regardless of TMPDIR
            if functions:
                self.functions = _by_function(output, addresses)
                addresses.unlink()


def _by_function(output: Path, addresses: Path) -> Counter[str]:
    """Parse the output, whose format is described in valgrind's manual, "Callgrind Format Specification"."""
    known = sorted(_trampolines(addresses))
    names: dict[str, str | None] = {}
    found: Counter[str] = Counter()
    function: str | None = None
    with output.open(errors="replace") as lines:
        for line in lines:
            kind, _, rest = line.rstrip().partition("=")
            if kind in ("fn", "cfn"):
                number, _, name = rest.partition(" ")
                if name:
                    names[number] = _python_name(name.partition("'")[0], known)
                function = names[number] if kind == "fn" else function
            elif line[0] in "+-*0123456789" and function is not None:
                found[function] += int(line.split()[1])
    return found


def _trampolines(addresses: Path) -> Iterator[tuple[int, int, str]]:
    for line in addresses.read_text(errors="replace").splitlines():
        start, size, name = line.split(" ", 2)
        if (ours := OURS.match(name)) is not None:
            yield int(start, 16), int(size, 16), f"{ours['function']} ({ours['file']})"


def _python_name(name: str, known: list[tuple[int, int, str]]) -> str | None:
    if not name.startswith("0x"):
        return None
    address = int(name, 16)
    at = bisect.bisect(known, (address, sys.maxsize, "")) - 1
    start, size, function = known[at] if at >= 0 else (0, 0, "")
    return function if address < start + size else None


def serve(key: str, url: str, endpoint: str, requests: int) -> None:
    """Send the requests, and exit without cleaning up."""
    running = Running(by_key(key), url)
    running.run(endpoint, 30)
    gc.collect()
    gc.freeze()
    running.run(endpoint, requests)
    os._exit(0)


def per_request(key: str, url: str, endpoint: str, *, functions: bool) -> tuple[int, Counter[str]]:
    """The instructions of one request, in total and for each function of this package."""
    command = ["-m", "bench.instructions", "--serve", key, url, endpoint]
    with ThreadPoolExecutor(2) as pool:
        few, many = pool.map(lambda times: Count([*command, str(times)], functions=functions), (FEW, MANY))
    requests = MANY - FEW
    many.functions.subtract(few.functions)
    inside = Counter({name: count // requests for name, count in many.functions.items() if count >= requests})
    return (many.total - few.total) // requests, inside


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        key, url, endpoint, requests = sys.argv[2:]
        serve(key, url, endpoint, int(requests))
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--endpoint", nargs="+", choices=ENDPOINTS, default=list(ENDPOINTS))
    parser.add_argument("--contender", nargs="+", choices=NAMES, default=[], metavar="NAME", help="; ".join(NAMES))
    parser.add_argument("--functions", action="store_true", help="which of our functions execute them")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed.")
    if options.functions and sys.version_info < (3, 12):
        sys.exit("Python tells valgrind of its functions from 3.12 on.")
    with postgresql() as server:
        database = server.new_database()
        fill_database(server.url("psycopg", database))
        print("| thousands of instructions | endpoint | |\n|---|---|---:|")
        for kind in options.kind:
            for contender in of_kind(kind, options.contender):
                for endpoint in contender.endpoints or options.endpoint:
                    if endpoint not in options.endpoint:
                        continue
                    url = server.url(DRIVERS[kind][0], database)
                    total, functions = per_request(contender.key, url, endpoint, functions=options.functions)
                    print(f"| {contender.key} | {endpoint} | {total / 1000:.0f} |", flush=True)
                    for name, count in functions.most_common(60):
                        print(f"| - {name} | | {count / 1000:.1f} |")
        server.drop(database)


if __name__ == "__main__":
    main()
