"""PostgreSQL: the pool, transactions with typed verbs, migrations, the embedded server, wake-up hints."""

from caravan.db.pool import Database
from caravan.db.tx import Tx

__all__ = ["Database", "Tx"]
