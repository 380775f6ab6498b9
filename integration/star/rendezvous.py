"""Where hosts meet: a port that is bound before its number is told, so that nobody else can take it."""

import socket


def bind_port(address: str) -> socket.socket:
    """A socket that listens on a free port of this machine. Raises OSError where the address is not its own."""
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((address, 0))
    bound.listen()
    return bound
