"""How hosts find each other, whoever else finds their port."""

import socket
import threading
import time

from farspan.engine_ext.star.mesh import Mesh, form_mesh


class Store:
    """torch's, as far as hosts use it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, name: str, value: str) -> None:
        self.values[name] = value

    def get(self, name: str) -> bytes:
        while name not in self.values:
            time.sleep(0.01)
        return self.values[name].encode()


def test_a_stranger_at_the_port_changes_nothing() -> None:
    store, formed = Store(), dict[int, Mesh]()

    def form(rank: int) -> None:
        formed[rank] = form_mesh(rank, 2, "127.0.0.1", store, 20)

    first = threading.Thread(target=form, args=(0,))
    first.start()
    host, port = store.get("mesh 0").decode().split()
    socket.create_connection((host, int(port))).close()
    second = threading.Thread(target=form, args=(1,))
    second.start()
    for thread in (first, second):
        thread.join(20)
    messages = dict[int, bytes]()
    other = threading.Thread(target=lambda: messages.update(formed[1].swap(b"b", 5)[0]))
    other.start()
    came, late, gone = formed[0].swap(b"a", 5)
    other.join(5)
    assert (came, messages, late, gone) == ({1: b"b"}, {0: b"a"}, [], [])
    for mesh in formed.values():
        mesh.close()
