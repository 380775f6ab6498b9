"""The process that `benchmarks.ring.RingHosts` starts: one host of a ring.

Its arguments are rank, number of hosts, the port of the store where hosts meet, and the file descriptor of a
connection. It receives a RingSpec, sends True when all hosts have met, then a RingAnswer for every (tokens, repeats,
returns_hidden).
"""

import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.plain_llama import PlainLlama
from benchmarks.ring import RingSpec, joined, prefill


def main() -> None:
    rank, num_hosts, port, descriptor = map(int, sys.argv[1:])
    connection: Connection[Any, Any] = Connection(descriptor)
    spec: RingSpec = connection.recv()
    with joined(rank, num_hosts, port, spec.timeout_s) as device:
        model = PlainLlama.random(spec.model, spec.dtype, device)
        # Both directions of every link are set up here, and not in the first measured prefill.
        prefill(model, torch.zeros(16 * num_hosts, dtype=torch.int64), 1, False)
        dist.barrier()
        connection.send(True)
        while True:
            try:
                tokens, repeats, returns_hidden = connection.recv()
            except EOFError:
                break
            connection.send(prefill(model, torch.tensor(tokens), repeats, returns_hidden))
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
