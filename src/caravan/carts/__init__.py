"""Carts: what a student means to buy. A wish, judged at the checkout; emptied by course once the purchase exists.

Owns: cart_items. Hears: PURCHASE_CONFIRMED, in the purchase's transaction and after it. Says nothing.
"""
