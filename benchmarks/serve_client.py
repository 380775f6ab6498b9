"""The process that runs `vllm bench serve`: once started, it sends the benchmark to one server after the other.

Its argument is the file descriptor of a `multiprocessing` connection. It sends True when vLLM is imported, then for
each list of command line arguments that it receives the result that `vllm bench serve` would save, as a dictionary, or
the end of a traceback where it failed.
"""

import argparse
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main() -> None:
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    connection.send(True)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            break
        try:
            answer: dict[str, Any] | str = serve.main(parser.parse_args(arguments))
        except (Exception, SystemExit):  # the next server may still be asked
            answer = traceback.format_exc(limit=-4)
        connection.send(answer)


if __name__ == "__main__":
    main()
