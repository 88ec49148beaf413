"""Money: checkouts (what was sold, frozen), payments (attempts to pay one), coins, refunds, and what providers tell us.

Owns: checkouts, payments, refunds, webhook_events, coin_entries. Says: PURCHASE_CONFIRMED, PURCHASE_REFUNDED, and
through deliveries PURCHASE_BLOCKED and PURCHASE_UNBLOCKED (AMOUNT_MISMATCH, PAID_TWICE). Hears no events.

`checkouts.paid_by` names the one payment of a checkout that may be delivered: it is set in the transaction that says
PURCHASE_CONFIRMED and never changes again. Whoever makes a purchase checks it.
"""
