"""Serve one contender on a real server: ``python -m bench.serve KEY URL PORT POOL_TIMEOUT``.

FastAPI runs on uvicorn, and Flask on gunicorn's gthread worker, with one worker process each.
"""

from __future__ import annotations

import sys
from typing import Any

from .contenders import by_key

THREADS = 64
"""The threads of a gthread worker: more than there are slow clients."""


def main(key: str, url: str, port: int, pool_timeout: float) -> None:
    contender = by_key(key)

    def make_app() -> Any:
        app, _ = contender.make_app(url, pool_timeout=pool_timeout)
        return app

    if contender.kind == "flask":
        _gunicorn(make_app, port)
    else:
        import uvicorn

        uvicorn.run(make_app(), host="127.0.0.1", port=port, log_level="error", access_log=False)


def _gunicorn(make_app: Any, port: int) -> None:
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):
        def load_config(self) -> None:
            self.cfg.set("bind", f"127.0.0.1:{port}")
            self.cfg.set("worker_class", "gthread")
            self.cfg.set("threads", THREADS)
            self.cfg.set("loglevel", "error")
            self.cfg.set("graceful_timeout", 1)

        def load(self) -> Any:
            return make_app()

    Application().run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
