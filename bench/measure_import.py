"""The CPU time of importing a package in a fresh interpreter, after SQLAlchemy and its framework were imported.

The garbage collector is disabled during the import; otherwise, a pass over all earlier objects would be
added to the time of one package.  All bytecode is cached, as after an installation: with
``PYTHONDONTWRITEBYTECODE``, the modules of a source tree would be compiled at each import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from typing import Any

from .statistics import summary

SQLALCHEMY = "sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio"
PACKAGES = {
    "session_plugin": SQLALCHEMY,
    "session_plugin.wsgi": SQLALCHEMY,
    "session_plugin.asgi": SQLALCHEMY,
    "session_plugin.flask": f"{SQLALCHEMY}, flask",
    "session_plugin.starlette": f"{SQLALCHEMY}, starlette.applications",
    "session_plugin.fastapi": f"{SQLALCHEMY}, fastapi",
    "flask_sqlalchemy": f"{SQLALCHEMY}, flask",
    "flask_sqlalchemy_lite": f"{SQLALCHEMY}, flask",
    "advanced_alchemy.extensions.flask": f"{SQLALCHEMY}, flask",
    "advanced_alchemy.extensions.fastapi": f"{SQLALCHEMY}, fastapi",
    "fastapi_async_sqlalchemy": f"{SQLALCHEMY}, fastapi",
}
"""The modules that are imported before each package."""

CODE = """
import gc, time
import {before}
gc.collect()
gc.disable()
start = time.process_time()
import {package}
print(time.process_time() - start)
"""


def measure(rounds: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The milliseconds that importing each package takes."""
    samples: dict[str, list[float]] = {package: [] for package in PACKAGES if package in (only or PACKAGES)}
    with tempfile.TemporaryDirectory() as folder:
        for package in samples:
            _milliseconds(package, folder)  # writes the bytecode
        for _ in range(rounds):
            for package in samples:
                samples[package].append(_milliseconds(package, folder))
    return {"rows": [{"package": package, "cpu": summary(taken)} for package, taken in samples.items()]}


def _milliseconds(package: str, bytecode: str) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    code = CODE.format(package=package, before=PACKAGES[package])
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(run.stdout) * 1000
