"""The session classes that a database is generic in; SQLAlchemy's own ones unless said otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.orm import Session
from typing_extensions import TypeVar  # before 3.13 only it knows defaults

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

S = TypeVar("S", bound="Session | AsyncSession", default="Session")
SyncS = TypeVar("SyncS", bound=Session, default=Session)
AsyncS = TypeVar("AsyncS", bound="AsyncSession", default="AsyncSession")
