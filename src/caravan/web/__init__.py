"""What every HTTP face stands on: who is asking, what they may, how an answer and a refusal look.

Owns: accounts, auth_tokens, realtime_tickets, login_attempts, idempotency_keys, audit_log. Knows nothing of tutoring.
"""
