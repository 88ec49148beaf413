"""What is somebody else's answers as what doesn't exist, word for word. Found by `verify/authz.py`."""

from __future__ import annotations

import pytest

from caravan.db import Database
from caravan.ids import new_id
from caravan.payments.routes import router
from tests import builders
from tests.clients import an_account, bearer, client_of, make_app


@pytest.mark.parametrize("what", ["payment", "confirm", "checkout"])
async def test_a_strangers_payment_is_not_there(db: Database, what: str) -> None:
    headers = await bearer(db, await an_account(db, "asha@example.com"))
    async with db.transaction() as tx:
        payment = await builders.a_payment(tx)
    async with client_of(make_app(db, router)) as client:
        answers: list[dict[str, object]] = []
        for payment_id, checkout_id in ((payment.id, payment.checkout_id), (new_id(), new_id())):
            if what == "payment":
                answer = await client.get(f"/api/v1/payments/{payment_id}", headers=headers)
            elif what == "confirm":
                answer = await client.post(f"/api/v1/payments/{payment_id}/confirm", headers=headers)
            else:
                answer = await client.post("/api/v1/payments", json={"checkoutId": str(checkout_id)}, headers=headers)
            assert answer.status_code == 404
            answers.append({name: said for name, said in answer.json().items() if name != "instance"})
    assert answers[0] == answers[1]
