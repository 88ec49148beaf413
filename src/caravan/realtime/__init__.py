"""Tell a student's screens that something happened, without a gap and in order.

Reads: student_feed, student_feed_heads (the outbox writes them). Push is a hint over a durable feed: losing a frame
costs time, never truth, because a client that refetches after any frame, or after reconnecting, is right.
"""
