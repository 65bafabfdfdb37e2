"""`SessionScope`: a unit of work as an app sees it."""

from __future__ import annotations

from typing import Any, Generic

from ..policy import Outcome, Policy, PolicyLike
from . import ending
from .typevars import S
from .unit_of_work import UnitOfWork


class SessionScope(Generic[S]):
    """The unit of work that the running code is inside; ``db.scope`` returns it.

    Apps seldom need it: ``db.session``, ``db.use()`` and ``db.doom()`` do the same.  Adapters for other
    frameworks settle it where their framework has a response and has sent nothing.
    """

    __slots__ = ("_unit",)

    def __init__(self, unit: UnitOfWork[Any]) -> None:
        self._unit = unit

    def __repr__(self) -> str:
        return repr(self._unit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionScope) and other._unit is self._unit

    def __hash__(self) -> int:
        return hash(self._unit)

    @property
    def session(self) -> S:
        """The session, made at the first call.

        Raises:
            ScopeClosedError: the unit of work has ended, and had no session.
        """
        session: S = self._unit.session
        return session

    @property
    def method(self) -> str | None:
        """The HTTP method, or None outside HTTP."""
        return self._unit.method

    @property
    def error(self) -> BaseException | None:
        """The exception that the response reports; an adapter sets it when a handler of the app deals with one."""
        return self._unit.error

    @error.setter
    def error(self, error: BaseException | None) -> None:
        self._unit.error = error

    @property
    def wrote(self) -> bool:
        """True if rolling back now would discard work."""
        return self._unit.wrote

    @property
    def settled(self) -> bool:
        """True once its transaction was settled; what follows is late work."""
        return self._unit.settled

    @property
    def closed(self) -> bool:
        """True once it has ended; its session refuses further use."""
        return self._unit.closed

    @property
    def policy(self) -> Policy:
        """How it begins and ends."""
        return self._unit.policy

    def use(self, policy: PolicyLike) -> None:
        """Choose how it begins and ends.

        Raises:
            PolicyError: ``policy`` is not a policy, or a transaction has begun in another way.
        """
        self._unit.use(policy)

    def doom(self, reason: str = "doom() was called") -> None:
        """Decide now that it will roll back, whatever happens; ``reason`` is logged."""
        self._unit.doom(reason)

    def settle(self, outcome: Outcome) -> None:
        """End the transaction of a sync session: decide, commit or roll back, give the connection back, run the hooks.

        If it is settled already and nothing was done since, nothing happens.

        Raises:
            Exception: what COMMIT raised, after rolling back.
        """
        ending.settle(self._unit, outcome)

    async def asettle(self, outcome: Outcome) -> None:
        """As `settle`, under ASGI; for sync databases too."""
        await ending.asettle(self._unit, outcome)
