"""The drivers that the tests run on."""

SYNC = ["sqlite+pysqlite", "postgresql+psycopg", "postgresql+psycopg2", "mariadb+pymysql", "mariadb+mysqldb"]
ASYNC = [
    "sqlite+aiosqlite",
    "postgresql+psycopg_async",
    "postgresql+asyncpg",
    "mariadb+asyncmy",
    "mariadb+aiomysql",
]
SQLITE = [driver for driver in [*SYNC, *ASYNC] if driver.startswith("sqlite")]
POSTGRESQL = [driver for driver in [*SYNC, *ASYNC] if driver.startswith("postgresql")]
MARIADB = [driver for driver in [*SYNC, *ASYNC] if driver.startswith("mariadb")]
