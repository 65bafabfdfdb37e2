"""The rows that a unit of work loaded and did not change, which stay readable after its ROLLBACK.

SQLAlchemy expires every row of a session that rolls back.  What was read before the first write of the transaction,
and is unchanged, is what the database holds after the ROLLBACK too, so it is put back.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.orm.collections import collection_adapter

MANY_ROWS = 10_000
"""Above this number of rows none is remembered, so that a job with many rows does not hold them twice."""

_MISSING = object()


class LoadedRow(NamedTuple):
    """What a row has loaded and not changed, by the names of its attributes."""

    columns: dict[str, Any]
    references: dict[str, Any]
    collections: dict[str, list[Any]]


LoadedRows: TypeAlias = dict[InstanceState[Any], LoadedRow]


def loaded_rows(session: Session) -> LoadedRows:
    """Return what the rows of ``session`` have loaded, without the rows that have a changed column."""
    if len(session.identity_map) > MANY_ROWS:
        return {}
    states = map(instance_state, session.identity_map.values())
    return {state: loaded for state in states if (loaded := _loaded(state)) is not None}


def unchanged_rows(session: Session, loaded: LoadedRows) -> LoadedRows:
    """Return those of the ``loaded`` rows that are as they were, without the relationships that are not.

    A row with a column that was changed or loaded anew is left out: its values may be those that are rolled back.
    So is a collection with such a row: it may need that one's values as its keys, and a query to get them.
    """
    unchanged = {}
    for state, before in loaded.items():
        row = state.obj()
        if row is None or state.session is not session or not state.persistent or row in session.deleted:
            continue
        now = _loaded(state)
        if now is None or not all(now.columns.get(key, _MISSING) is before.columns[key] for key in before.columns):
            continue
        references, collections = before.references, before.collections
        unchanged[state] = LoadedRow(
            before.columns,
            {key: references[key] for key in references if now.references.get(key, _MISSING) is references[key]},
            {key: collections[key] for key in collections if _are_same(now.collections.get(key), collections[key])},
        )
    for _, _, collections in unchanged.values():
        for key in [*collections]:
            if not all(instance_state(member) in unchanged for member in collections[key]):
                del collections[key]
    return unchanged


def restore_rows(rows: LoadedRows) -> None:
    """Give ``rows``, which were expired since, their values back; columns first, for the keys of the collections."""
    for kind in range(len(LoadedRow._fields)):
        for state, loaded in rows.items():
            row = state.obj()
            if row is not None:
                for key, value in loaded[kind].items():
                    set_committed_value(row, key, value)


def _loaded(state: InstanceState[Any]) -> LoadedRow | None:
    """Return what ``state`` has loaded and not changed, or None if a column was changed."""
    loaded, unmodified = state.dict, state.unmodified
    columns = state.mapper.column_attrs.keys()
    if not unmodified.issuperset(columns):
        return None
    row = LoadedRow({key: loaded[key] for key in columns if key in loaded}, {}, {})
    for relationship in state.mapper.relationships:
        key = relationship.key
        if key not in loaded or key not in unmodified:
            continue
        if relationship.uselist:
            row.collections[key] = [*collection_adapter(loaded[key])]
        else:
            row.references[key] = loaded[key]
    return row


def _are_same(now: list[Any] | None, before: list[Any]) -> bool:
    return now is not None and [*map(id, now)] == [*map(id, before)]
