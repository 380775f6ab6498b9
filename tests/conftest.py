"""Leaves out what needs more GPUs than there are; without any, the Triton kernels run in Triton's interpreter.

The interpreter is chosen here, and not with the tests of the kernels: in a whole run other tests import triton first.
"""

import os
import signal

import pytest
import torch

NUM_GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The interpreter makes many tiny tensors: threads only get in each other's way.
    torch.set_num_threads(1)

# A shell has what it runs in the background ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` and `multi_gpu` where there are too few; mark those that plan a fault."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        if "fault" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.faults)
        for marker, needed in NUM_GPUS_NEEDED.items():
            if item.get_closest_marker(marker) and num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU{'s' * (needed > 1)}"))
