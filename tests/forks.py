"""Run pytest in several directories, each in a forked process, so that common modules are imported only once.

``python forks.py DIRECTORY...`` prints the exit code and the output for each directory, as JSON.
"""

import gc
import importlib
import json
import os
import sys
import warnings
from pathlib import Path

import pytest

COMMON = (
    "advanced_alchemy.extensions.fastapi",
    "aiosqlite",
    "fastapi.testclient",
    "flask_sqlalchemy",
    "flask_sqlalchemy_lite",
    "session_plugin.fastapi",
    "session_plugin.flask",
)
UNDISPOSED = "ignore:unclosed database:ResourceWarning"  # the fixtures of these tests do not dispose of their engines
OPTIONS = ("--quiet", "--rootdir=.", "--config-file=/dev/null", "-pno:cacheprovider", "-Werror", "-W", UNDISPOSED)


def start(directory: str) -> int:
    """Start the tests in ``directory``, and return the process id."""
    pid = os.fork()
    if pid == 0:
        os.chdir(directory)
        output = os.open("output.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = pytest.main(list(OPTIONS))
        sys.stdout.flush()
        os._exit(code)
    return pid


def main(directories: list[str]) -> None:
    with warnings.catch_warnings(action="ignore"):  # the imported libraries warn about one another
        for name in COMMON:
            importlib.import_module(name)
    gc.freeze()  # otherwise a collection in a child would copy every object that it visits
    started = {directory: start(directory) for directory in directories}
    ended = {directory: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for directory, pid in started.items()}
    print(json.dumps({name: (code, (Path(name) / "output.txt").read_text()) for name, code in ended.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
