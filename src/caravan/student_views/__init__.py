"""What a student's screens show: home, learning, sessions, and the pages. Reads everybody's tables, writes none.

Hears: every event that a student may see (handlers.invalidate_views). Says: nothing.
"""
