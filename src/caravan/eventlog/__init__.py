"""The event log: say things (outbox), read them once per group (consumer), give them up openly (dead letters).

Owns: outbox, student_feed, student_feed_heads, log_cursors, processed_events, dead_letters, workers, installation.
"""
