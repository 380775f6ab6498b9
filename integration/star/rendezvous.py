"""Where hosts meet: ports that are bound before their numbers are told, so that nobody else can take them."""

import socket

NUM_PORTS = 2
"""One for the CPU group and one for the device group."""


def bind_ports(address: str) -> list[socket.socket]:
    """Sockets that listen on free ports of this machine. Raises OSError where the address is not its own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sockets = []
    for _ in range(NUM_PORTS):
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, 0))
        bound.listen()
        sockets.append(bound)
    return sockets
