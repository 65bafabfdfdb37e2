"""The adapter for FastAPI, which is Starlette's: ``Depends(db.get_session)`` is all that FastAPI adds.

::

    db = AsyncSessionPlugin("postgresql+asyncpg://localhost/shop")
    app = FastAPI()
    db.init_app(app)
    SessionDep = Annotated[AsyncSession, Depends(db.get_session)]
"""

from ..starlette import AsyncSessionPlugin, SessionPlugin

__all__ = ["AsyncSessionPlugin", "SessionPlugin"]
