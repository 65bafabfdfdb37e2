"""A soak test of a few seconds; `make soak` runs the full one."""

from typing import Any

from .soak import Soak
from .soak_site import KINDS


def test_a_short_soak(postgresql: Any) -> None:
    """Under faults, the responses agree with the database, for each way and each kind of request."""
    soak = Soak(postgresql, 8)
    soak.run()
    assert soak.problems == []
    assert {call.way for call in soak.journal if call.saved} == {"async", "sync", "flask"}
    assert {call.kind for call in soak.journal} == set(KINDS)
    assert dict(soak.figures)["fault: worker killed"]
