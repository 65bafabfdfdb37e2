import subprocess
import sys

import pytest

from .demo import Case, Reply, gained, is_true

FALSIFIED = """
import dataclasses, sys
from example_apps import demo
demo.CASES = [dataclasses.replace(demo.CASES[0], asked={"alice": -31, "bob": 31})]
sys.exit(demo.main([]))
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_demo_finds_every_response_true():
    """The demo ends by itself, and every verdict in its table is true."""
    done = run("-m", "example_apps.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [line.split()[-1] for line in done.stdout.splitlines()[2:]]
    assert set(verdicts) == {"true"}


def test_demo_fails_on_an_untrue_response():
    """The exit status is 1 if the database does not hold what a success response promised."""
    done = run("-c", FALSIFIED)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FALSE" in done.stdout


ASKED = {"alice": -30, "bob": 30}


@pytest.mark.parametrize(
    ("received", "reply", "gain", "verdict"),
    [
        ("201", Reply(201, complete=True), ASKED, True),
        ("201", Reply(201, complete=True), {}, False),
        ("201", Reply(201, complete=True), {"alice": -30}, False),
        ("201", Reply(500, complete=True), {}, False),
        ("400", Reply(400, complete=True), {}, True),
        ("400", Reply(400, complete=True), ASKED, False),
        ("200, broken off", Reply(200, complete=False), {}, True),
        ("200, broken off", Reply(200, complete=False), ASKED, False),
    ],
)
def test_verdict(received, reply, gain, verdict):
    """A success is true if the database gained all the requested changes; any other response, if it gained none."""
    assert is_true(Case("", "", {}, received, ASKED), reply, gain, "") is verdict


def test_verdict_on_the_log():
    """If a case requires a log message, its verdict is true only if that message was logged."""
    case = Case("", "", {}, "201", ASKED, logged="the hook failed")
    assert not is_true(case, Reply(201, complete=True), ASKED, "")
    assert is_true(case, Reply(201, complete=True), ASKED, "so the hook failed")


def test_gained():
    """`gained()` names only the accounts that changed, including those that are new or were removed."""
    assert gained({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 5, "new": 7}) == {"b": 3, "gone": -3, "new": 7}
