"""What shifted rotary positions (STRING) cost in one call: the first two measurements of `string_e2e`, to its file.

Of the kernels that the device has: on Hopper that is the one in Gluon, with the shift and without, beside FA3.
"""

import torch

from benchmarks.inputs import LLAMA_8B, TINY
from benchmarks.record import Recorder
from benchmarks.string_e2e import FA3, NAME, ON, run_kernels

CHOOSES_CASES = True
GOAL = 1.015


def cases(dry_run: bool) -> list[int]:
    """List prompt lengths."""
    return [200] if dry_run else [65536, 131072]


def run(recorder: Recorder) -> None:
    shape = TINY if recorder.dry_run else LLAMA_8B
    for length in cases(recorder.dry_run):
        case = f"prefill-n{length}-b1-{shape.label}"
        if not recorder.wants(case):
            continue
        run_kernels(recorder, shape, length)
        medians = {row.variant: float(row.p50) for row in recorder.rows if (row.benchmark, row.case) == (NAME, case)}
        if FA3 in medians:
            found = medians[ON] / medians[FA3]
            verdict = "reached" if found <= GOAL else "MISSED"
            recorder.note(f"{case}: {ON} takes {found:.3f} of {FA3}, goal {GOAL} {verdict}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
