import os
from collections.abc import AsyncIterator
from typing import Annotated

from advanced_alchemy.exceptions import DuplicateKeyError, NotFoundError
from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    SQLAlchemyAsyncConfig,
    base,
    filters,
    repository,
    service,
)
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column


class Item(base.BigIntBase):
    name: Mapped[str] = mapped_column(unique=True)
    stock: Mapped[int] = mapped_column(default=0)


class ItemService(service.SQLAlchemyAsyncRepositoryService[Item]):
    class Repository(repository.SQLAlchemyAsyncRepository[Item]):
        model_type = Item

    repository_type = Repository


class ItemIn(BaseModel):
    name: str
    stock: int = 0


class ItemOut(ItemIn):
    id: int


alchemy = AdvancedAlchemy(
    config=SQLAlchemyAsyncConfig(
        connection_string=os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///shop.db"),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        create_all=True,
    )
)
app = FastAPI()
alchemy.init_app(app)

DatabaseSession = Annotated[AsyncSession, Depends(alchemy.provide_async_session())]


async def provide_items(session: DatabaseSession) -> AsyncIterator[ItemService]:
    async with ItemService.new(session=session) as items:
        yield items


Items = Annotated[ItemService, Depends(provide_items)]


@app.exception_handler(DuplicateKeyError)
async def conflict(request: Request, error: DuplicateKeyError):
    session = alchemy.get_async_session(request)
    await session.rollback()
    return JSONResponse({"detail": "conflict", "items": await ItemService(session=session).count()}, status_code=409)


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError):
    return JSONResponse({"detail": "No such item."}, status_code=404)


@app.post("/items", status_code=201)
async def create_item(given: ItemIn, items: Items) -> ItemOut:
    item = await items.create(given.model_dump(), auto_commit=True)
    return items.to_schema(item, schema_type=ItemOut)


@app.get("/items")
async def list_items(items: Items, page: int = 1) -> service.OffsetPagination[ItemOut]:
    chosen = filters.LimitOffset(limit=2, offset=(page - 1) * 2)
    found, total = await items.get_many_and_count(chosen, order_by=[(Item.id, False)])
    return items.to_schema(found, total, filters=[chosen], schema_type=ItemOut)


@app.get("/items.csv")
async def export_items(items: Items) -> StreamingResponse:
    found = await items.get_many(order_by=[(Item.id, False)])
    return StreamingResponse((f"{item.name},{item.stock}\n" for item in found), media_type="text/csv")


@app.get("/items/{item_id}")
async def show_item(item_id: int, items: Items) -> ItemOut:
    return items.to_schema(await items.get(item_id), schema_type=ItemOut)


@app.post("/items/{item_id}/sales")
async def sell_item(item_id: int, items: Items, session: DatabaseSession, number: int = 1) -> ItemOut:
    item = await items.get(item_id)
    item.stock -= number
    await session.flush()
    if item.stock < 0:
        raise HTTPException(400, "Out of stock.")
    await session.commit()
    return items.to_schema(item, schema_type=ItemOut)


@app.delete("/items/{item_id}", status_code=204)
async def delete_item(item_id: int, items: Items) -> None:
    await items.delete(item_id, auto_commit=True)


async def restock(number: int) -> None:
    """Run by cron: raise every item's stock."""
    async with alchemy.with_async_session() as session:
        for item in await ItemService(session=session).get_many():
            item.stock += number
        await session.commit()
