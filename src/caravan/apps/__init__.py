"""How the parts become processes: the wiring (subscriptions), the deployables (services), web, workers, `up`."""
