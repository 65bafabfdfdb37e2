"""A few seconds of the soak; `make soak` is the whole of it."""

from typing import Any

from .soak import Soak
from .soak_site import KINDS


def test_a_short_soak(postgresql: Any) -> None:
    """Under faults, what the clients were told is what the database holds; each way and kind was among them."""
    soak = Soak(postgresql, 8)
    soak.run()
    assert soak.problems == []
    assert {told.way for told in soak.journal if told.saved} == {"async", "sync", "flask"}
    assert {told.kind for told in soak.journal} == set(KINDS)
    assert dict(soak.figures)["fault: worker killed"]
