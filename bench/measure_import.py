"""CPU time of importing a package, beyond SQLAlchemy and its framework, in a fresh interpreter each."""

from __future__ import annotations

import subprocess
import sys
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
"""What is imported before, by package."""

CODE = "import time, {before}; start = time.process_time(); import {package}; print(time.process_time() - start)"


def measure(rounds: int, only: Collection[str] = ()) -> dict[str, Any]:
    """Milliseconds by package."""
    samples: dict[str, list[float]] = {package: [] for package in PACKAGES if package in (only or PACKAGES)}
    for _ in range(rounds):
        for package in samples:
            code = CODE.format(package=package, before=PACKAGES[package])
            run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
            samples[package].append(float(run.stdout) * 1000)
    return {"rows": [{"package": package, "cpu": summary(taken)} for package, taken in samples.items()]}
