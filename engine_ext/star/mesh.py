"""Short messages between all hosts, one connection a pair: what they agree on before a step must not cost the step.

A group of torch hands each collective to threads of its own and back, which takes longer than all else that a host does
for a step of one token.
"""

import socket
import struct
import time
from contextlib import ExitStack
from typing import Any

RANK = struct.Struct("<q")
GREETING_S = 5.0
"""For a connection to say its rank: others than hosts may find the port."""


class Mesh:
    """Connections of one host with all others."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        """peers: by rank."""
        self.peers = peers

    def swap(self, message: bytes, timeout_s: float) -> tuple[dict[int, bytes], list[int], list[int]]:
        """Send a message to all hosts and receive theirs, all of one length.

        Returns what came by rank, the hosts whose message did not come in time, and those whose connection is gone.
        """
        came: dict[int, bytes] = {}
        late, gone = [], []
        for rank, peer in self.peers.items():
            try:
                peer.settimeout(timeout_s)
                peer.sendall(message)
            except OSError:
                gone.append(rank)
        deadline = time.monotonic() + timeout_s
        for rank, peer in self.peers.items():
            if rank in gone:
                continue
            try:
                received = receive(peer, len(message), deadline)
            except TimeoutError:
                late.append(rank)
            except OSError:
                gone.append(rank)
            else:
                came[rank] = received
        return came, late, gone

    def close(self) -> None:
        """End all connections; hosts that wait for a message notice."""
        for peer in self.peers.values():
            peer.close()


def receive(peer: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Raises TimeoutError after the deadline, ConnectionError where the other end is closed."""
    received = b""
    while len(received) < num_bytes:
        # A message that is there is taken however late it is.
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        part = peer.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("closed")
        received += part
    return received


def form_mesh(rank: int, num_hosts: int, address: str, store: Any, timeout_s: float) -> Mesh:
    """Connect to the hosts of lower ranks, and wait for those of higher ones.

    address: of rank 0; store: torch's, where hosts tell each other theirs. Raises OSError, or RuntimeError of the
    store, where a host does not come in time.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + timeout_s
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: it only says from which of this machine's addresses rank 0 is reached.
        probe.connect((address, 9))
        own = address if rank == 0 else probe.getsockname()[0]
    peers: dict[int, socket.socket] = {}
    with ExitStack() as unless_done, socket.create_server((own, 0), family=family, backlog=num_hosts) as server:
        unless_done.callback(lambda: Mesh(peers).close())
        store.set(f"mesh {rank}", f"{own} {server.getsockname()[1]}")
        for other in range(rank):
            host, port = store.get(f"mesh {other}").decode().split()
            peers[other] = socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 1.0))
            peers[other].sendall(RANK.pack(rank))
        while len(peers) < num_hosts - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            peer, _ = server.accept()
            try:
                other = RANK.unpack(receive(peer, RANK.size, min(deadline, time.monotonic() + GREETING_S)))[0]
            except OSError:  # nobody of ours
                other = -1
            if not rank < other < num_hosts or other in peers:
                peer.close()
                continue
            peers[other] = peer
        unless_done.pop_all()
    for peer in peers.values():
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Mesh(dict(sorted(peers.items())))
