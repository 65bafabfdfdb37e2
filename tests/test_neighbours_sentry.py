"""Runs the Sentry tests in `sentry_cases` in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .servers import PostgreSQL


def test_sentry(postgresql: PostgreSQL) -> None:
    """Sentry reports a failed commit once, with its original exception, and no event of the plugin's own."""
    environ = {**os.environ, "SESSION_PLUGIN_TEST_POSTGRESQL": postgresql.url("psycopg", "postgres")}
    command = [sys.executable, "-m", "pytest", "-q", "tests/sentry_cases.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout
