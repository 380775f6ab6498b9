"""What shifted rotary positions (STRING) cost in a request with the kernels of the device: a quarter of 8B's layers.

The last measurement of `string_e2e`, to its file, in a minute instead of many: two engines on one GPU, in turns; each
request has a prompt of 64K or 128K tokens and 16 further ones.
"""

from benchmarks.engine import LLAMA_8B
from benchmarks.record import Recorder
from benchmarks.string_calls import GOAL
from benchmarks.string_e2e import NAME, OFF_AUTO, ON_AUTO, engine_specs, run_engines

NUM_LAYERS = 8


def cases(dry_run: bool) -> list[int]:
    """List prompt lengths; in a dry run the first is below the shift."""
    return [90, 200] if dry_run else [65536, 131072]


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    label = "tiny-fp32" if dry_run else f"llama8b-{NUM_LAYERS}layers-bf16"
    model = LLAMA_8B | {"num_hidden_layers": NUM_LAYERS}
    run_engines(recorder, engine_specs(dry_run, cases(dry_run), OFF_AUTO, ON_AUTO, "auto", model), label)
    medians = {(row.case, row.variant): float(row.p50) for row in recorder.rows if row.benchmark == NAME}
    for length in cases(dry_run):
        case = f"total-n{length}-b1-{label}"
        found = medians[case, ON_AUTO] / medians[case, OFF_AUTO]
        verdict = "reached" if found <= GOAL else "MISSED"
        recorder.note(f"{case}: {ON_AUTO} takes {found:.3f} of {OFF_AUTO}, goal {GOAL} {verdict}")
