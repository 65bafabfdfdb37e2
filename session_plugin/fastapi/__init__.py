"""The adapter for FastAPI: Starlette's, whose ``get_session`` is the dependency.

::

    db = AsyncSessionPlugin("postgresql+asyncpg://localhost/shop")
    app = FastAPI()
    db.init_app(app)
    SessionDep = Annotated[AsyncSession, Depends(db.get_session)]
"""

from ..starlette import AsyncSessionPlugin, SessionPlugin

__all__ = ["AsyncSessionPlugin", "SessionPlugin"]
