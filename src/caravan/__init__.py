"""Caravan: what is paid for is delivered."""
