"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before anything imports triton.

Here, and not beside the tests of the kernels: in a whole run other tests import triton first.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The interpreter makes many tiny tensors: threads only get in each other's way.
    torch.set_num_threads(1)
