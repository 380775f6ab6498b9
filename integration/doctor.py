"""`farspan doctor`: what this machine and this environment can do with farspan, and what to do where they cannot."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from typing import Any, Literal

from farspan.engine_ext.errors import FarspanError

GIB = 2**30
ENTRY_GROUP, ENTRY_NAME = "vllm.general_plugins", "farspan"
PROBE_TIMEOUT_S = 300
MIN_MEMLOCK_BYTES = 64 * 2**20
PINNED_TEST_BYTES = 64 * 2**20
Outcome = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding. `note`: nothing is wrong, but something is not to be had on this machine."""

    name: str
    outcome: Outcome
    finding: str
    advice: str = ""
    """What to do; never empty where the outcome is "failed"."""


def add_doctor_command(subcommands: Any) -> None:
    """Add `doctor` to the subcommands of `farspan`."""
    parser = subcommands.add_parser(
        "doctor",
        help="what this machine and this environment can do, and what to do where they cannot",
        description="Check GPU, driver, vLLM, the plugin in vLLM's processes, kernels, memory, NCCL and Ray. Most "
        "of the time, about a minute, goes into starting vLLM's processes. Exit status 1: something failed.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the findings; returns 1 where a check failed, else 0."""
    checks = examine()
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(format_checks(checks))
    return int(any(check.outcome == "failed" for check in checks))


def format_checks(checks: Iterable[Check]) -> str:
    checks = list(checks)
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:6}  {check.name}: {check.finding}")
        if check.advice:
            lines.append(f"        -> {check.advice}")
    failed = [check.name for check in checks if check.outcome == "failed"]
    return "\n".join([*lines, "", f"failed: {', '.join(failed)}" if failed else "Nothing failed."])


def examine() -> list[Check]:
    """Run all checks, one after the other."""
    return [check for examination in EXAMINATIONS for check in guarded(examination)]


def guarded(examination: Callable[[], list[Check]]) -> list[Check]:
    """What an examination found; a failed check instead of any exception."""
    try:
        return examination()
    except Exception as error:
        name = examination.__name__.removeprefix("check_").replace("_", " ")
        finding = f"the check itself failed with {type(error).__name__}: {error}"
        return [Check(name, "failed", finding, "Report this with the whole output of `farspan doctor --json`.")]


def check_python() -> list[Check]:
    return [Check("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")]


def check_gpu() -> list[Check]:
    """GPUs as the driver lists them, and as torch sees them."""
    import torch
    from farspan.engine_ext.support import capability_refusal

    listed = driver_gpus()
    if not torch.cuda.is_available():
        if not listed:
            return [Check("GPU", "note", "none; attention is computed in PyTorch, through vLLM's CPU build")]
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            advice = "Unset CUDA_VISIBLE_DEVICES, which hides it."
        elif torch.version.cuda is None:
            advice = "Install a torch with CUDA (vLLM from PyPI brings one); this one is built for CPUs alone."
        else:
            advice = f"Update the driver: torch was built for CUDA {torch.version.cuda}."
        return [Check("GPU", "failed", f"the driver lists {listed[0]}, and torch sees none", advice)]
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        size = f"{properties.total_memory / GIB:.1f} GiB, compute capability {capability[0]}.{capability[1]}"
        refusal = capability_refusal(capability)
        checks.append(
            Check(f"GPU {index}", "failed", f"{properties.name}: {refusal}", "Use an Ampere GPU or a later one.")
            if refusal
            else Check(f"GPU {index}", "ok", f"{properties.name}, {size}")
        )
    driver = listed[0].rpartition(", ")[2] if listed else "not known (no nvidia-smi)"
    return [*checks, Check("driver", "ok", f"{driver}; torch {torch.__version__} for CUDA {torch.version.cuda}")]


def driver_gpus() -> list[str]:
    """`name, driver version` of each GPU that nvidia-smi lists; empty where it cannot."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return run.stdout.strip().splitlines() if run.returncode == 0 else []


def check_vllm() -> list[Check]:
    """Whether vLLM is there, in a version that farspan supports."""
    from farspan.vllm_compat.versions import version_refusal, vllm_version

    try:
        version = vllm_version()
    except ImportError as error:
        return [Check("vLLM", "failed", f"cannot be imported ({error})", "pip install 'vllm>=0.32,<0.34'.")]
    refusal = version_refusal(version)
    if refusal:
        return [Check("vLLM", "failed", refusal, "Install a supported vLLM.")]
    return [Check("vLLM", "ok", version)]


def check_plugin() -> list[Check]:
    """Whether vLLM finds the plugin, is allowed to load it, and has it in its front end and workers."""
    entries = [entry for entry in metadata.entry_points(group=ENTRY_GROUP) if entry.name == ENTRY_NAME]
    if not entries:
        return [
            Check(
                "plugin",
                "failed",
                f"vLLM finds no entry point {ENTRY_NAME!r} in {sys.prefix}",
                "pip install farspan into the environment that runs vLLM; a folder on PYTHONPATH is not enough.",
            )
        ]
    checks = [Check("plugin", "ok", f"entry point {entries[0].value}")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_NAME not in [name.strip() for name in allowed.split(",")]:
        advice = f"Add {ENTRY_NAME} to it (names are separated by commas), or unset it."
        return [*checks, Check("VLLM_PLUGINS", "failed", f"{allowed!r}, without {ENTRY_NAME}", advice)]
    checks.append(Check("VLLM_PLUGINS", "ok", "not set: vLLM loads all plugins" if allowed is None else repr(allowed)))
    return [*checks, *judge_probe(probe())]


def probe() -> dict[str, str]:
    """Start a process as vLLM's front end and from it one as a worker, and ask both for the backend CUSTOM.

    Returns by process the path of the class, or what went wrong.
    """
    code = "from farspan.doctor import print_probe; print_probe()"
    command = [sys.executable, "-c", code]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"front end": f"no answer after {PROBE_TIMEOUT_S} s"}
    try:
        answer: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        end = " ".join(run.stderr.strip().splitlines()[-1:]) or "no output"
        return {"front end": f"ended with status {run.returncode}: {end}"}
    return answer


def print_probe() -> None:
    """The process behind `probe`."""
    answer = {"front end": loaded_backend()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        answer["worker"] = workers.submit(loaded_backend).result()
    print("\n" + json.dumps(answer))


def loaded_backend() -> str:
    """The class path of the backend CUSTOM after vLLM has loaded its plugins in this process, or what went wrong."""
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        AttentionBackendEnum.CUSTOM.get_class()
        return str(AttentionBackendEnum.CUSTOM.get_path())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def judge_probe(answer: dict[str, str]) -> list[Check]:
    from farspan.vllm_compat import BACKEND

    checks = []
    for process in ("front end", "worker"):
        found = answer.get(process, "not asked, as the front end has none")
        name = f"plugin in vLLM's {process}"
        if found == BACKEND:
            checks.append(Check(name, "ok", "the backend CUSTOM is farspan's"))
            continue
        advice = "Run `python -c 'import farspan.plugin as p; p.register()'` in this environment for the whole error."
        if ":" not in found and found.count(".") > 1:
            advice = "Another plugin has taken CUSTOM: uninstall it, or name only farspan in VLLM_PLUGINS."
        checks.append(Check(name, "failed", found, advice))
    return checks


def check_kernels() -> list[Check]:
    """Compile (GPU) or run in PyTorch (CPU) writing KV, prefill and decode, against the float32 reference."""
    import torch
    from farspan.kernels.batch import KVView, PagedBatch
    from farspan.kernels.reference import paged_attention

    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    kv_len, query_len, page_size, head_dim = 300, 200, 128, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pages = torch.zeros(4, 2, page_size, 2 * head_dim, dtype=dtype, device=device)
    batch = PagedBatch(
        query_start_loc=torch.tensor([0, query_len], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([kv_len], dtype=torch.int32, device=device),
        block_table=torch.tensor([[2, 0, 3]], dtype=torch.int32, device=device),
        max_query_len=query_len,
        max_kv_len=kv_len,
    )
    positions = torch.arange(kv_len, device=device)
    slots = batch.block_table[0].long()[positions // page_size] * page_size + positions % page_size
    key, value, query = (normal(*shape, head_dim) for shape in ((kv_len, 2), (kv_len, 2), (query_len, 4)))
    kv = KVView(pages)
    if on_gpu:
        from farspan.kernels.decode import paged_decode
        from farspan.kernels.kv_write import write_kv
        from farspan.kernels.prefill import paged_prefill
        from farspan.kernels.tiles import make_prefill_tiles

        write_kv(key, value, pages, slots)
        tiles = make_prefill_tiles([0, query_len], [kv_len], 128, device)
        out = paged_prefill(query, kv, batch, tiles, head_dim**-0.5)[0]
        last = paged_decode(query[-1:], kv, batch, head_dim**-0.5, num_splits=2, min_split_keys=64)[0]
    else:
        from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu

        write_kv_cpu(key, value, pages, slots)
        out = torch.empty_like(query)
        cpu_attention(query, kv, batch, head_dim**-0.5, out=out)
        last = out[-1:]
    expected = paged_attention(query, kv, batch, head_dim**-0.5)[0]
    # torch's maximum keeps NaN, unlike Python's.
    error = float(torch.cat([out - expected, last - expected[-1:]]).abs().max())
    where = "compiled by Triton" if on_gpu else "in PyTorch"
    if not error < (0.05 if on_gpu else 1e-4):
        advice = "Do not serve with this environment. Try the torch and Triton that vLLM asks for."
        return [Check("kernels", "failed", f"{where}, wrong by {error:.3g}", advice)]
    return [Check("kernels", "ok", f"{where}, prefill and decode agree with the reference within {error:.1g}")]


def check_memory() -> list[Check]:
    """Host memory, the limit on locked memory, and whether torch can pin."""
    import torch
    from farspan.host_memory import available_bytes

    checks = [Check("host memory", "ok", f"{available_bytes() / GIB:.1f} GiB available")]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_limited = limit != resource.RLIM_INFINITY
    shown = f"{limit / 2**20:,.0f} MiB" if is_limited else "unlimited"
    if not torch.cuda.is_available():
        return [*checks, Check("pinned memory", "note", f"not used without a GPU (memlock limit: {shown})")]
    try:
        torch.empty(PINNED_TEST_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        advice = "Raise the memlock limit: `ulimit -l unlimited`, in a container `--ulimit memlock=-1`."
        return [*checks, Check("pinned memory", "failed", f"{error} (memlock limit: {shown})", advice)]
    finding = f"{PINNED_TEST_BYTES >> 20} MiB pinned; memlock limit: {shown}"
    if is_limited and limit < MIN_MEMLOCK_BYTES:
        advice = "If a large host pool is refused: `ulimit -l unlimited`, in a container `--ulimit memlock=-1`."
        return [*checks, Check("pinned memory", "note", finding, advice)]
    return [*checks, Check("pinned memory", "ok", finding)]


def check_distributed() -> list[Check]:
    """NCCL and Ray, which only several GPUs and several engines need."""
    import torch
    import torch.distributed

    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        checks = [Check("NCCL", "note", "not used without a GPU")]
    elif torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        linked = all(torch.cuda.can_device_access_peer(0, other) for other in range(1, num_gpus))
        link = "" if num_gpus < 2 else "; GPUs reach each other" if linked else "; GPUs exchange through the host"
        checks = [Check("NCCL", "ok", f"{version}, {num_gpus} GPU{'s' * (num_gpus != 1)}{link}")]
    else:
        outcome: Outcome = "failed" if num_gpus > 1 else "note"
        checks = [Check("NCCL", outcome, "not in this torch", "Install torch from PyPI to use several GPUs.")]
    try:
        checks.append(Check("Ray", "ok", metadata.version("ray")))
    except metadata.PackageNotFoundError:
        checks.append(Check("Ray", "note", "not installed; needed for Ray jobs only", "pip install 'ray>=2.50'."))
    return checks


def check_options() -> list[Check]:
    """Which options an engine can have on this machine."""
    import torch
    from farspan.engine_ext.config import PREFILL_METHODS, FarspanConfig, Kernel
    from farspan.engine_ext.launch import choose_dense_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels, refusals = [], []
    for kernel in Kernel.__args__:  # type: ignore[attr-defined]
        try:
            chosen = choose_dense_kernel(FarspanConfig(kernel=kernel), device, 128, torch.bfloat16)
            kernels.append(f"{kernel} ({chosen})" if kernel == "auto" else kernel)
        except FarspanError as error:
            refusals.append(str(error))
    checks = [
        Check("prefill.method", "ok", ", ".join(PREFILL_METHODS)),
        Check("kernel", "ok", ", ".join(kernels)),
        *(Check("kernel", "note", refusal) for refusal in refusals),
    ]
    most = max(torch.cuda.device_count(), 1)
    return [*checks, Check("--tensor-parallel-size", "ok", f"1 to {most} on this machine" if most > 1 else "1")]


EXAMINATIONS: tuple[Callable[[], list[Check]], ...] = (
    check_python,
    check_gpu,
    check_vllm,
    check_plugin,
    check_kernels,
    check_memory,
    check_distributed,
    check_options,
)
