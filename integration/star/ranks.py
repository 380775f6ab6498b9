"""What a host asks of its ranks: of itself with one GPU, of worker processes with several.

The first half runs where the exchange is, the second where the host decides. Errors of hosts travel as values, since
vLLM's workers send only the text of an exception.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from farspan.engine_ext.errors import StarError
from farspan.host_memory import boot_id
from farspan.star.protocol import EngineGone, HostSetup, RanksApart
from farspan.star.rendezvous import bind_port

MEASURED_RUNS = 4
"""The first of them opens connections."""
REPLY_S = 30.0
"""For a rank to answer what takes no time, beyond what it may wait for others."""
LEAVING_S = 1.0
"""For ranks to leave their groups before they are ended."""


@dataclass(frozen=True)
class Refused:
    """A StarError of a rank, as it travels."""

    sentence: str
    kind: str
    """See `team.error_of`."""


@dataclass(frozen=True)
class Failure:
    """The last error of a rank's group."""

    sentence: str
    kind: str
    """See `team.error_of`."""
    is_torn: bool
    """Whether it came inside a step, where ranks of a host wait for each other as well."""


_bound: socket.socket | None = None
"""Where this rank of all hosts meets; bound in the first host, before its number is told."""


def attempt(worker: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A function below with these arguments; a StarError is a result."""
    try:
        return function(*arguments)
    except StarError as error:
        return Refused(str(error), type(error).__name__)


def bind(address: str) -> int:
    """Bind a port of the first host for this rank; returns its number."""
    global _bound
    if _bound is not None:
        _bound.close()
    _bound = bind_port(address)
    return int(_bound.getsockname()[1])


def keep(listening: socket.socket | None) -> None:
    """Take over a port that is bound already, in a host whose only rank is this process."""
    global _bound
    _bound = listening


def join(setup: HostSetup, address: str, ports: Sequence[int]) -> None:
    """Meet the same rank of the other hosts. ports: of the first host, by rank."""
    global _bound
    from farspan.engine_ext.star.exchange import form_exchange, set_exchange
    from farspan.engine_ext.star.team import RankTeam

    team, rank = None, 0
    if setup.num_ranks > 1:
        from vllm.distributed.parallel_state import get_tp_group

        team, rank = RankTeam(get_tp_group()), get_tp_group().rank_in_group
    listening, _bound = _bound, None
    exchange = form_exchange(
        setup.rank,
        setup.num_hosts,
        address,
        ports[rank],
        listening=listening,
        device_type=setup.device_type,
        timeout_s=setup.timeout_s,
        start_timeout_s=setup.start_timeout_s,
        team=team,
        machine=number_of_machine(),
    )
    exchange.gathers_keys = setup.gathers_keys
    exchange.host_bytes = setup.host_bytes
    set_exchange(exchange)


def number_of_machine() -> int:
    """The same on one machine alone, of 56 bits."""
    return int.from_bytes(hashlib.blake2b(boot_id().encode(), digest_size=7).digest(), "big")


def leave() -> None:
    """Leave the group."""
    from farspan.engine_ext.star.exchange import set_exchange

    set_exchange(None)


def begin(phase: str, timeout_s: float) -> int:
    """A request begins, for whose exchanges hosts wait so long; returns the bytes received so far."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    if exchange is None:
        return 0
    exchange.is_aborted, exchange.failure, exchange.is_torn = False, None, False
    exchange.anchor_of, exchange.phase, exchange.timeout_s = None, phase, timeout_s
    exchange.take_waited_s()
    return exchange.num_bytes


def end() -> tuple[int, float]:
    """The bytes received so far, and seconds in exchanges of keys since the request began."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    return (0, 0.0) if exchange is None else (exchange.num_bytes, exchange.take_waited_s())


def seed(number: int) -> None:
    """Of the process's generator, from which all ranks draw the same."""
    import torch

    torch.manual_seed(number)


def agree(digest: bytes, number: int) -> list[int]:
    """`Exchange.agree`."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    assert exchange is not None
    return exchange.agree(digest, number)


def expect_anchor(name: str) -> None:
    """Send or receive the anchor of a request at the next step that can."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    assert exchange is not None
    exchange.anchor_of = name


def expects_anchor() -> bool:
    """Whether that step has not come yet."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    return exchange is not None and exchange.anchor_of is not None


def abort() -> None:
    """End the request together with the other hosts, at the next step."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    if exchange is not None:
        exchange.is_aborted = True


def last_failure() -> Failure | None:
    """Of the group, since the request began."""
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    if exchange is None or exchange.failure is None:
        return None
    return Failure(str(exchange.failure), type(exchange.failure).__name__, exchange.is_torn)


def measure(dtype: Any) -> tuple[float, float]:
    """Seconds to send a byte from the first host to all others, and of one product and sum of a matrix product.

    dtype: torch's, of the model. Asked of all hosts at the same time.
    """
    import torch
    from farspan.engine_ext.star.exchange import current

    exchange = current()
    assert exchange is not None
    device = exchange.device
    num_bytes, side = (64 << 20, 4096) if device.type == "cuda" else (4 << 20, 512)
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    matrix = torch.zeros(side, side, dtype=dtype, device=device)
    exchange.agree(b"rates")
    send_s = best_time(lambda: exchange.send_pages(buffer), device)
    compute_s = best_time(lambda: matrix @ matrix, device)
    exchange.take_waited_s()
    return send_s / num_bytes, compute_s / side**3


def best_time(work: Callable[[], Any], device: Any) -> float:
    """Seconds of the fastest of a few runs on the device."""
    import torch

    times = []
    for _ in range(MEASURED_RUNS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


class Ranks:
    """The ranks of a host, asked one after the other by the thread that works."""

    def __init__(self, setup: HostSetup) -> None:
        self.setup = setup
        self.executor: Any = None
        """`vllm_compat.host_executor.HostExecutor`; None where the only rank is this process."""

    def ask(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = REPLY_S) -> list[Any]:
        """A function above on all ranks, by rank. Raises the StarError of the first that does, or EngineGone where a
        rank does not answer.
        """
        from farspan.engine_ext.star.team import error_of

        if self.executor is None:
            return [function(*arguments)]
        try:
            answers = self.executor.collective_rpc(attempt, timeout=timeout_s, args=(function, arguments))
        except TimeoutError as error:
            raise EngineGone(f"a rank did not answer within {timeout_s:g} s") from error
        except Exception as error:
            raise self.error_of(error) from error
        for answer in answers:
            if isinstance(answer, Refused):
                raise error_of(answer.kind, answer.sentence)
        return list(answers)

    def error_of(self, error: Exception) -> Exception:
        """What an exception of the executor means: a rank that is dead, or the exception itself."""
        if self.executor is None or not self.has_dead_rank():
            return error
        return EngineGone("the process of one of its GPUs ended")

    def has_dead_rank(self) -> bool:
        """Whether vLLM has noticed that a worker process is gone; it does a little after the others feel it."""
        deadline = time.monotonic() + 1.0
        while not self.executor.is_failed:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def error_of_step(self, error: Exception) -> Exception:
        """What made a step of the engine fail, as a rank that is this process would have raised it."""
        from farspan.engine_ext.star.team import error_of

        if self.executor is None:
            return error
        if isinstance(error, TimeoutError):
            # Its reply may still come, and would be taken for that to the next question.
            return EngineGone(f"a step did not end within VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS: {error}")
        try:
            failure = self.executor.collective_rpc(
                attempt, timeout=REPLY_S, args=(last_failure, ()), unique_reply_rank=0
            )
        except Exception:
            failure = None
        if failure is not None and not failure.is_torn:
            return error_of(failure.kind, failure.sentence)
        meaning = self.error_of(error)
        if meaning is not error or failure is None:
            return meaning
        return RanksApart(failure.sentence)

    def meet(self, address: str, ports: Sequence[int]) -> None:
        """All ranks meet those of the other hosts. Raises StarError where one does not come."""
        self.ask(join, self.setup, address, list(ports), timeout_s=self.setup.start_timeout_s + REPLY_S)

    def leave(self) -> None:
        """Leave the groups for good; ranks that do not answer soon are ended with the engine."""
        if self.executor is None:
            leave()
            return
        try:
            self.executor.collective_rpc(attempt, timeout=LEAVING_S, args=(leave, ()))
        except Exception:
            self.executor.shutdown()
