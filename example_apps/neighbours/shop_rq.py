"""An RQ worker of the shop, which forks a process for each job.

python -m example_apps.neighbours.shop_rq
"""

import os

from redis import Redis
from rq import Queue, Worker
from sqlalchemy import func, select

from .shop_database import db

connection = Redis.from_url(os.environ["SHOP_REDIS"])
queue = Queue(connection=connection)

if __name__ == "__main__":
    with db.session_scope() as session:  # in the parent process, before it forks
        print("parent", session.scalar(select(func.pg_backend_pid())), flush=True)
    Worker([queue], connection=connection).work(burst=True)
