"""Policies: how a unit of work begins, and whether it commits or rolls back.

A `Policy` says how transactions begin (``read_only``, ``isolation_level``), and its ``decide`` turns the
`Outcome` of the work into a `Decision`.  Derive one from another with `dataclasses.replace`::

    serializable = replace(commit_on_success, name="serializable", isolation_level="SERIALIZABLE")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, singledispatch
from inspect import iscoroutinefunction, isfunction, signature
from typing import Any, TypeAlias
from weakref import ref

from .exceptions import PolicyError

__all__ = [
    "Decision",
    "Outcome",
    "Policy",
    "by_method",
    "commit_on_success",
    "endpoint_policy",
    "manual",
    "read_only",
    "read_only_autocommit",
    "response_status",
]

SAFE_METHODS: frozenset[str] = frozenset({"GET", "HEAD", "OPTIONS", "QUERY", "TRACE"})
"""The HTTP methods that RFC 9110, section 9.2.1, defines as safe, and QUERY, a GET with a body."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known when a unit of work is settled.

    Attributes:
        status: the HTTP status of the response, or None outside HTTP and in work that
            follows the response.
        error: the exception that ended the work, handled by the app or not, or None.
        method: the HTTP method, or None outside HTTP.
        interrupted: True if the response body was cut short.
        background: True for work that follows the response, and can no longer change it.
    """

    status: int | None = None
    error: BaseException | None = None
    method: str | None = None
    interrupted: bool = False
    background: bool = False

    def __repr__(self) -> str:
        """Without the text of the error, which may hold the parameters of a statement."""
        error = None if self.error is None else type(self.error).__name__
        return (
            f"Outcome(status={self.status}, error={error}, method={self.method!r}, interrupted={self.interrupted}, "
            f"background={self.background})"
        )

    @property
    def failed(self) -> str | None:
        """Why the work counts as failed, or None if it is a success."""
        if self.error is not None:
            return type(self.error).__name__
        if self.interrupted:
            return "the response was cut short"
        if self.status is not None and self.status >= 400:
            return f"status {self.status}"
        return None

    @classmethod
    def of_response(cls, status: int | None, error: BaseException | None, method: str | None) -> Outcome:
        """Return the outcome of a request whose status is known.

        Outcomes without an error are cached: making a frozen one takes longer than the rest of a decision.
        """
        if error is None and type(status) is int:  # an equal number of another type is not the same
            return _of_response(status, method)
        return cls(status, error, method)

    @classmethod
    def raised(cls, error: BaseException, *, method: str | None = None) -> Outcome:
        """Return the outcome of work that ended in ``error``.

        An exception that is itself a response with a status below 400, such as a raised redirect, counts as a
        response and not as an error.
        """
        status = response_status(error)
        is_error = status is None or status >= 400
        return cls(status=status, error=error if is_error else None, method=method)


@lru_cache
def _of_response(status: int, method: str | None) -> Outcome:
    return Outcome(status, method=method)


@dataclass(frozen=True, slots=True)
class Decision:
    """How a transaction ends, and why; the reason goes to the log.

    Attributes:
        commit: True for COMMIT, False for ROLLBACK.
        reason: a few words, such as ``"status 404"``.
    """

    commit: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """How a unit of work begins and ends.

    Attributes:
        decide: from `Outcome` to `Decision`; called each time a transaction is settled.
        name: its name in logs and errors.
        read_only: begin READ ONLY transactions; the session refuses to flush.
        isolation_level: SQLAlchemy's name of the isolation level, or None for the engine's.
        safe: the policy of requests whose HTTP method is safe, or None for this one; see `by_method`.

    Raises:
        PolicyError: ``decide`` is not a plain function of one argument.
    """

    decide: Callable[[Outcome], Decision]
    name: str = "custom"
    read_only: bool = False
    isolation_level: str | None = None
    safe: Policy | None = None

    def for_method(self, method: str | None) -> Policy:
        """Return the policy of a unit of work with this HTTP method, or None outside HTTP."""
        return self if self.safe is None or method not in SAFE_METHODS else self.safe

    @property
    def reads_without_transactions(self) -> bool:
        """True if no BEGIN is sent: each statement is read-only and a transaction of its own."""
        return self.read_only and self.isolation_level == "AUTOCOMMIT"

    def __post_init__(self) -> None:
        decide = self.decide
        if not _takes_one_argument(decide) or is_coroutine_function(decide):
            raise PolicyError(
                f"The policy {self.name} must be a plain function that takes one Outcome and returns a Decision. To "
                "decorate an endpoint, write @db.policy(read_only)."
            )


PolicyLike: TypeAlias = Policy | Callable[[Outcome], Decision]
"""What is accepted as a policy."""


def is_coroutine_function(function: Any) -> bool:
    """Return True for a coroutine function, and for an object whose ``__call__`` is one."""
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _takes_one_argument(function: Any) -> bool:
    try:
        signature(function).bind(None)
    except TypeError:  # it is not callable, or takes other arguments
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True


@singledispatch
def response_status(error: BaseException) -> int | None:
    """Return the HTTP status of an exception that is itself a response, or None.

    An adapter registers its framework's own class.  An attribute alone does not tell:
    `urllib.error.HTTPError` has a ``code`` too, and is an error whatever its value.
    """
    return None


@singledispatch
def exit_code(error: BaseException) -> object:
    """Return the exit code of an exception that ends the program, or a message instead of one; None for any other.

    The integration of a framework registers the class that its commands raise.
    """
    return None


@exit_code.register
def _(error: SystemExit) -> object:
    return 0 if error.code is None else error.code


def _commit_unless_failed(outcome: Outcome) -> Decision:
    if failure := outcome.failed:
        return Decision(False, failure)
    return _commit("success" if outcome.status is None else f"status {outcome.status}")


@lru_cache
def _commit(reason: str) -> Decision:
    return Decision(True, reason)


def _never_commit(outcome: Outcome) -> Decision:
    return Decision(False, outcome.failed or "only an explicit commit() saves under this policy")


commit_on_success: Policy = Policy(_commit_unless_failed, "commit_on_success")
"""The default: COMMIT, unless there was an exception, a status of 400 or more, or a stream that was cut short."""

manual: Policy = Policy(_never_commit, "manual")
"""Nothing commits by itself: the app calls ``commit()``, and what it did not commit is rolled back."""

read_only: Policy = Policy(_commit_unless_failed, "read_only", read_only=True)
"""A READ ONLY transaction, which the database enforces where it can."""

read_only_autocommit: Policy = Policy(_commit_unless_failed, "read_only_autocommit", True, "AUTOCOMMIT")
"""Reads without a transaction: no BEGIN and no COMMIT are sent, and the database refuses every write.

Each statement sees a snapshot of its own; server-side cursors and transaction-local settings do not work.
Its connections are those of a second pool, as large as the first one.
"""


def as_policy(value: object) -> Policy:
    """Return ``value`` as a `Policy`: itself, or one that decides by a function from `Outcome` to `Decision`.

    Raises:
        PolicyError: it is neither.
    """
    if isinstance(value, Policy):
        return value
    if callable(value):
        return Policy(value, name=getattr(value, "__name__", repr(value)))
    raise PolicyError(
        f"{value!r} is not a policy. Give commit_on_success, manual, read_only, a Policy, or a function "
        "that takes an Outcome and returns a Decision."
    )


def by_method(*, safe: PolicyLike, other: PolicyLike) -> Policy:
    """Return a policy that depends on the HTTP method of the request.

    Args:
        safe: for GET, HEAD, OPTIONS, QUERY and TRACE (RFC 9110, section 9.2.1), for example `read_only_autocommit`.
        other: for every other method, and outside HTTP: in jobs, WebSockets, and each ``session_scope(new=True)``.

    Raises:
        PolicyError: one of them is not a policy.
    """
    return replace(as_policy(other), safe=as_policy(safe).for_method("GET"))


_ENDPOINT_ATTRIBUTE = "__session_policies__"
_endpoints_have_policies = False


def set_endpoint_policy(endpoint: object, db: object, policy: Policy) -> None:
    """Set the policy of the database ``db`` on an endpoint, or on a class or a blueprint of endpoints."""
    global _endpoints_have_policies
    setattr(endpoint, _ENDPOINT_ATTRIBUTE, {**getattr(endpoint, _ENDPOINT_ATTRIBUTE, {}), db: policy})
    _endpoints_have_policies = True


def endpoint_policy(endpoint: object, db: Any) -> Policy | None:
    """Return the policy that ``@db.policy(...)`` set on ``endpoint``, or None; for ``find_policy`` of an adapter."""
    policies: dict[Any, Policy] = getattr(endpoint, _ENDPOINT_ATTRIBUTE, {})
    return policies.get(db) or policies.get(db.database) if policies else None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PolicyAbove:
    """A policy set above the decorator of a route, which has registered a function inside the decorated one.

    Attributes:
        db: the database or the plugin whose policy it is.
        policy: the policy.
        decorated: what ``@db.policy(...)`` returned.  If that is an endpoint, this policy is that one's only.
    """

    db: object
    policy: Policy
    decorated: ref[Any]


_ABOVE_ATTRIBUTE = "__session_policies_above__"


def set_policy_above(function: Any, db: object, policy: Policy, decorated: Any) -> None:
    """Note on ``function``, and on the functions that it wraps, that ``decorated`` has a policy."""
    above = PolicyAbove(db, policy, ref(decorated))
    for each in wrapped_functions(function):
        if each is not decorated:
            setattr(each, _ABOVE_ATTRIBUTE, [*getattr(each, _ABOVE_ATTRIBUTE, ()), above])


def policies_above(endpoint: object, db: Any) -> list[PolicyAbove]:
    """Return what decorates ``endpoint`` above the decorator of its route, the outermost first."""
    found: list[PolicyAbove] = getattr(endpoint, _ABOVE_ATTRIBUTE, [])
    return [above for above in reversed(found) if above.db in (db, db.database)] if found else found


def wrapped_functions(function: Any) -> Iterator[Any]:
    """Yield ``function`` and what it wraps, as far as that are functions."""
    while isfunction(function):
        yield function
        function = getattr(function, "__wrapped__", None)


def any_endpoint_policy() -> bool:
    """Return False as long as no endpoint was given a policy, of any database."""
    return _endpoints_have_policies
