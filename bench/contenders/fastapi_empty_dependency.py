"""The cost of a FastAPI dependency that does nothing."""

from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from bench.shop import HELLO


async def nothing():
    return None


def make_app(url, engine_options, is_async=True):
    app = FastAPI()
    Nothing = Annotated[None, Depends(nothing)]  # noqa: N806

    if is_async:

        @app.get("/bare")
        async def bare():
            return HELLO

        @app.get("/declared")
        async def declared(nothing: Nothing):
            return HELLO
    else:

        @app.get("/bare")
        def bare_in_thread():
            return HELLO

        @app.get("/declared")
        def declared_in_thread(nothing: Nothing):
            return HELLO

    return app, (create_async_engine if is_async else create_engine)(url, **engine_options)
