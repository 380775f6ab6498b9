"""What every program of ours does with mistakes and interruptions: one sentence and an exit status.

| status | meaning |
| --- | --- |
| 0 | done |
| 1 | done, and its result must not be used; one sentence on stderr says why |
| 2 | what was asked for cannot be done; one sentence on stderr says why and what to do |
| 130, 143, 129 | ended by Ctrl-C, SIGTERM, SIGHUP; engines and other child processes are ended first |

Any other exception is a fault of the program, and keeps its traceback.
"""

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from farspan.engine_ext.errors import ConfigError, FarspanError

logger = logging.getLogger(__name__)

ENGINE_FAILED = "Engine core initialization failed"
"""How vLLM's message begins where an engine's own process ends during its start."""
ENGINE_ENDED = "EngineDeadError"
CHILD_TIMEOUT_S = 20
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.05
"""After which a signal is sent once more whose exception Python dropped."""


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM and SIGHUP, so that context managers clean up."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def run_command(program: str, run: Callable[[], int | None], failures: tuple[type[Exception], ...] = ()) -> int:
    """Run a program and return its exit status; None from `run` counts as 0.

    program: its name, before the sentence. failures: exceptions for status 1, whose text is the sentence.
    """
    with terminable():
        try:
            return run() or 0
        except KeyboardInterrupt:
            return interrupted(program, "interrupted", 130)
        except Terminated as error:
            return interrupted(program, "terminated", 128 + error.signal_number)
        except failures as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            logger.debug("refused", exc_info=error)
            print(f"{program}: {sentence}", file=sys.stderr)
            return 2


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated on SIGTERM and SIGHUP inside; elsewhere than in the main thread, nothing changes.

    Once: signals that follow do not break off the cleaning up. Python drops what is raised in a destructor: such a
    signal, Ctrl-C included, is sent again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signal_number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(signal_number)

    def send_again(dropped: Any) -> None:
        error = dropped.exc_value
        if isinstance(error, Terminated):
            for each in SIGNALS:
                signal.signal(each, terminate)
            number = error.signal_number
        elif isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        else:
            hook(dropped)
            return
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()

    hook = sys.unraisablehook
    before = {each: signal.signal(each, terminate) for each in SIGNALS}
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)


def interrupted(program: str, word: str, status: int) -> int:
    end_children()
    print(f"{program}: {word}", file=sys.stderr)
    return status


def end_children() -> None:
    """End the child processes that `multiprocessing` started, vLLM's engines among them; engines end their workers."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(CHILD_TIMEOUT_S)
        if child.is_alive():
            child.kill()
            child.join()


def sentence_of(error: BaseException) -> str | None:
    """What an exception says to a user, in one line; None where it is no mistake of theirs."""
    chain = list(chain_of(error))
    for each in chain:
        if isinstance(each, FarspanError):
            return one_line(str(each))
    for each in chain:
        if isinstance(each, OSError) and each.strerror:
            where = f"{each.filename}: " if each.filename is not None else ""
            return one_line(f"{where}{each.strerror}")
        if isinstance(each, RuntimeError) and str(each).startswith(ENGINE_FAILED):
            return "vLLM's engine did not start; its log above says why."
        if type(each).__name__ == ENGINE_ENDED:
            return "vLLM's engine ended; its log above says why."
    for each in chain:
        # By name: neither is imported for this.
        library = type(each).__module__.partition(".")[0]
        if library == "pydantic_core" and isinstance(each, ValueError):
            return one_line("; ".join(dict.fromkeys(map(describe, each.errors()))))  # type: ignore[attr-defined]
        # The Hub's and transformers' own messages for a model that is not there.
        if library == "huggingface_hub" or (isinstance(each, OSError) and each.args):
            return one_line(str(each))
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from, and what pydantic collected in it."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if type(each).__module__.partition(".")[0] == "pydantic_core" and hasattr(each, "errors"):
            todo += [detail.get("ctx", {}).get("error") for detail in each.errors()]
        todo += [each.__cause__, None if each.__suppress_context__ else each.__context__]


def describe(detail: Mapping[str, Any]) -> str:
    """One of the errors that pydantic collected, with the name of the field where it has one."""
    names = [name for name in detail["loc"][-1:] if isinstance(name, str) and detail["type"] != "value_error"]
    return ": ".join([*names, detail["msg"].removeprefix("Value error, ")])


def one_line(text: str) -> str:
    return " ".join(text.split())


def need_matplotlib(instead: str) -> None:
    """Raise ConfigError where pictures cannot be drawn. instead: what to do without them, a half sentence."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            f"pictures need matplotlib, which is not installed. Install farspan's extra `report`, or {instead}."
        )


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder for results. Raises ConfigError where that, or writing into it, is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {folder} is no folder that can be written to ({error.strerror}). Name another folder."
        ) from error


def words(text: str) -> tuple[str, ...]:
    """Words separated by commas, each once; for argparse, as those below."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, each once."""
    try:
        return tuple(dict.fromkeys(int(word) for word in words(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, not {text!r}") from error


def floats(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, each once."""
    try:
        return tuple(dict.fromkeys(float(word) for word in words(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from error


def device(text: str) -> str:
    """A device that torch has here."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"torch has no device {text!r} here; use cpu or cuda") from error
    return text


def mapping(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as {{}}, not {text}")
    return value
