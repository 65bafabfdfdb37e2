"""Run a measurement in a separate process: ``python -m bench.child measure_cpu measure < job``."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def measured(module: str, function: str = "measure", **job: Any) -> Any:
    """Call a module's function in a fresh interpreter, and return its result."""
    command = [sys.executable, "-m", "bench.child", module, function]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return json.loads(done.stdout)


if __name__ == "__main__":
    function = getattr(import_module(f"bench.{sys.argv[1]}"), sys.argv[2])
    print(json.dumps(function(**json.load(sys.stdin))))
