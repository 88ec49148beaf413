"""The port that a process answers at: taken before anything else starts, refused in one sentence."""

from __future__ import annotations

import socket


class PortRefused(Exception):
    """Nothing can listen there; the message is one line that says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortRefused."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise PortRefused(
            f"Port {port} on {host} cannot be used ({error.strerror}):"
            " stop what runs there, or choose another one with --port."
        ) from None
    return listener


def address(host: str, port: int) -> str:
    """As a browser takes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
