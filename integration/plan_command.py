"""`farspan plan`: what fits on a machine and how fast it will be, without a GPU and without weights."""

import argparse
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from farspan.command import mapping
from farspan.planning import GIB, GPU_MEMORY, CapacityPlan, PlanSettings, Prediction, Side, make_plan
from farspan.scheduler.rates import GPUS, MEASURED_GPU

SIZE_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
TOKEN_UNITS = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
PAGE_SIZES = (16, 32, 64, 128)
DOES_NOT_FIT = 1
DEFAULT_UTILIZATION = 0.92


def add_plan_command(subcommands: Any) -> None:
    """Add `plan` to the subcommands of `farspan`."""
    parser = subcommands.add_parser(
        "plan",
        help="what fits on a machine, with KV in HBM alone and with cold heads in host memory, and how fast",
        description="Plan memory and times of a model from its configuration alone: neither a GPU nor weights are "
        "needed. Memory is in GiB, or with a unit (24GB, 80GiB); tokens as for vLLM: 128K is 131072, 128k is 128000. "
        "Exit status 1: the asked context does not fit.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, or a Hugging Face name")
    add("--gpu", type=_gpu, default=MEASURED_GPU, help=f"whose speed: {', '.join(GPUS)} (default {MEASURED_GPU})")
    add("--gpu-memory", type=_size, metavar="G", help="of each GPU (default: what --gpu has)")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=DEFAULT_UTILIZATION,
        metavar="F",
        help=f"as for vLLM (default {DEFAULT_UTILIZATION})",
    )
    add("--host-memory", type=_size, metavar="H", help="of the machine, for cold heads (default: no offload)")
    add("--context", type=_tokens, metavar="N", help="tokens of a request, answer included (default: the longest)")
    add("--concurrency", type=int, default=1, metavar="C", help="requests of that length at once (default 1)")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of weights and KV")
    add("--tensor-parallel-size", type=int, default=1, metavar="T", help="GPUs of one machine (default 1)")
    add("--block-size", type=int, choices=PAGE_SIZES, default=128, help="tokens of a page (default 128)")
    add("--max-num-batched-tokens", type=_tokens, metavar="N", help="of a step (default: 8192, or fewer if they fit)")
    add(
        "--hot-heads",
        type=int,
        default=0,
        metavar="n",
        help="KV heads of each layer that stay in HBM (default 0)",
    )
    add("--group-size", type=_count_or_auto, default=None, metavar="n|auto", help="KV heads gathered at once")
    add("--weights", type=_size, metavar="G", help="of the whole model, where its configuration does not tell")
    add("--hf-overrides", type=mapping, default={}, metavar="JSON", help="values in config.json to change, as for vLLM")
    add("--tflops", type=float, metavar="X", help="prefill reaches, in linear layers and attention")
    add("--hbm-gbs", type=float, metavar="X", help="GB/s at which decode reads KV from HBM")
    add("--pcie-gbs", type=float, metavar="X", help="GB/s at which kernels read host memory")
    add("--json", action="store_true", help="print everything as JSON instead, in bytes, tokens and seconds")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan; returns DOES_NOT_FIT where the asked context fits in no way, else 0. Raises FarspanError."""
    from farspan.model_shape import read_model

    settings = PlanSettings(
        model=arguments.model,
        gpu=arguments.gpu,
        gpu_memory=arguments.gpu_memory or GPUS[arguments.gpu].memory_mib * 2**20,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        host_memory=arguments.host_memory,
        context=arguments.context,
        concurrency=arguments.concurrency,
        tensor_parallel_size=arguments.tensor_parallel_size,
        page_size=arguments.block_size,
        dtype=arguments.dtype,
        hf_overrides=arguments.hf_overrides,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        hot_heads=arguments.hot_heads,
        group_size=arguments.group_size,
        weights=arguments.weights,
        tflops=arguments.tflops,
        hbm_gbs=arguments.hbm_gbs,
        pcie_gbs=arguments.pcie_gbs,
    )
    plan = make_plan(settings, read_model(settings.model, settings.dtype, settings.hf_overrides))
    print(json.dumps(asdict(plan) | {"fits": plan.fits}, indent=2) if arguments.json else format_plan(plan))
    return 0 if plan.fits else DOES_NOT_FIT


def format_plan(plan: CapacityPlan) -> str:
    """The plan as text."""
    settings, rates = plan.settings, plan.rates
    ranks = settings.tensor_parallel_size
    each = "" if ranks == 1 else " on each GPU"
    lines = [
        f"{settings.model}: {plan.num_layers} layers, {plan.num_kv_heads} KV heads of {plan.head_dim}"
        f"{each}; {plan.dtype}; positions for {plan.max_positions:,} tokens",
        f"{ranks} × {settings.gpu}; pages of {settings.page_size} tokens, steps of up to "
        f"{plan.max_num_batched_tokens:,} tokens, {requests_of(plan)} at once",
        f"Rates ({plan.rate_source}): {rates.linear_tflops:,.0f} TFLOP/s in linear layers, "
        f"{rates.attention_tflops:,.0f} in attention; {rates.weight_gbs:,.0f} GB/s for weights, "
        f"{rates.kv_gbs:,.0f} for KV in HBM, {rates.host_gbs:,.1f} for KV in host memory",
        "",
        *aligned(memory_rows(plan), "<><"),
        "",
        *aligned(side_rows(plan), "<>>"),
    ]
    for title, side in sides_of(plan):
        lines += ["", f"{title}:", *aligned(prediction_rows(side, settings.concurrency))]
    lines += ["", *advice(plan)]
    return "\n".join(lines).rstrip()


def sides_of(plan: CapacityPlan) -> list[tuple[str, Side]]:
    sides = [("Without offload", plan.without_offload)]
    return sides if plan.with_offload is None else [*sides, ("With offload", plan.with_offload)]


def memory_rows(plan: CapacityPlan) -> list[list[str]]:
    settings = plan.settings
    rows = [
        ["Memory of each GPU", gib(settings.gpu_memory), ""],
        ["  that vLLM may use", gib(plan.usable_bytes), f"--gpu-memory-utilization {settings.gpu_memory_utilization}"],
        ["  weights", gib(plan.weight_bytes), plan.weight_source],
        ["  activations", gib(plan.activation_bytes), "estimated"],
        ["  CUDA and communication", gib(plan.cuda_bytes), "estimated"],
        ["  left for KV", gib(plan.kv_bytes), ""],
    ]
    if settings.host_memory:
        note = "" if settings.tensor_parallel_size == 1 else f"{gib(plan.host_bytes)} for each rank"
        rows.append(["Host memory for KV", gib(settings.host_memory), note])
    return rows


def side_rows(plan: CapacityPlan) -> list[list[str]]:
    sides = sides_of(plan)
    return [
        ["", *(title for title, _ in sides)],
        ["Longest context, tokens", *(f"{side.longest_context:,}" for _, side in sides)],
        ["  limited by", *(side.limited_by for _, side in sides)],
        ["KV in HBM for each token, bytes", *(f"{side.hbm_bytes_per_token:,}" for _, side in sides)],
        ["KV in host memory for each token, bytes", *(f"{side.host_bytes_per_token:,}" for _, side in sides)],
    ]


def prediction_rows(side: Side, concurrency: int) -> list[list[str]]:
    """A header and one row a context; slots, groups and staging only where there is offload."""
    has_offload = side.host_bytes_per_token > 0
    step = "ms a token" if concurrency == 1 else f"ms a step of {concurrency}"
    offload_columns = (
        ["hot heads", "slots", "KV in HBM", "group", "span", "staging", "host memory"] if has_offload else []
    )
    rows = [["context", "requests", *offload_columns, "first token", *(["waiting"] * has_offload), step]]
    for each in side.predictions:
        if not each.fits:
            rows.append([f"{each.context:,}", "does not fit", *[""] * (len(rows[0]) - 2)])
            continue
        cells = offload_cells(each) if has_offload else []
        times = [each.first_token_s, each.waiting_s] if has_offload else [each.first_token_s]
        seconds = ["unknown" if time is None else f"{time:,.2f} s" for time in times]
        rows.append([f"{each.context:,}", f"{each.max_requests:,}", *cells, *seconds, f"{each.token_ms:,.1f}"])
    return rows


def offload_cells(prediction: Prediction) -> list[str]:
    return [
        f"{prediction.hot_heads}",
        f"{prediction.num_slots:,}",
        f"{100 * (prediction.share_in_hbm or 0):.0f} %",
        f"{prediction.group_size or '-'}",
        span_cell(prediction),
        gib(prediction.staging_bytes or 0),
        gib(prediction.host_bytes or 0),
    ]


def span_cell(prediction: Prediction) -> str:
    """What a buffer holds of the context."""
    if not prediction.span_len:
        return "-"
    return "all" if prediction.span_len == prediction.context else f"{prediction.span_len:,}"


def advice(plan: CapacityPlan) -> list[str]:
    """What to do, in sentences."""
    settings = plan.settings
    sides = [side for _, side in sides_of(plan)]
    longest = max(side.longest_context for side in sides)
    if not plan.fits:
        asked = "Not even one page" if settings.context is None else f"A context of {settings.context:,} tokens"
        remedy = "Give --host-memory" if plan.with_offload is None else "Give more host memory"
        if plan.with_offload is not None and plan.with_offload.limited_by == GPU_MEMORY:
            remedy = "Take a larger GPU, or more of them"
        verb = "fits" if settings.context is None else "does not fit"
        return [
            f"{asked} {verb} with {requests_of(plan)} at once; the longest context that does has {longest:,} tokens. "
            f"{remedy}, or ask for less."
        ]
    context = settings.context or longest
    words = [
        f"Start vLLM with --max-model-len {context} --max-num-seqs {settings.concurrency} --max-num-batched-tokens "
        f"{plan.max_num_batched_tokens} --block-size {settings.page_size}"
    ]
    if settings.tensor_parallel_size > 1:
        words.append(f"--tensor-parallel-size {settings.tensor_parallel_size}")
    if settings.gpu_memory_utilization != DEFAULT_UTILIZATION:
        words.append(f"--gpu-memory-utilization {settings.gpu_memory_utilization:g}")
    if settings.dtype != "auto":
        words.append(f"--dtype {settings.dtype}")
    if settings.hf_overrides:
        words.append(f"--hf-overrides {shlex.quote(json.dumps(settings.hf_overrides))}")
    if context > plan.without_offload.longest_context:
        words.append(f"--attention-backend CUSTOM --additional-config '{json.dumps(offload_config(plan, context))}'")
    # No full stop, which would be copied.
    return [" ".join(words)]


def offload_config(plan: CapacityPlan, context: int) -> dict[str, Any]:
    """additional_config of an engine that the plan predicts for a context with offload."""
    settings = plan.settings
    assert plan.with_offload is not None
    assert settings.host_memory is not None
    (of_rank,) = (each.host_bytes or 0 for each in plan.with_offload.predictions if each.context == context)
    needed, given = math.ceil(of_rank * settings.tensor_parallel_size / GIB), settings.host_memory / GIB
    options: dict[str, Any] = {"host_memory": needed if needed <= given else given}
    if settings.hot_heads:
        options["hot_heads"] = settings.hot_heads
    if settings.group_size is not None:
        options["group_size"] = settings.group_size
    return {"farspan": {"offload": options}}


def aligned(rows: Sequence[Sequence[str]], sides: str = ">") -> list[str]:
    """Rows as columns, each to the left or to the right as `sides` says; its last sign is for all further columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return ["  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]


def requests_of(plan: CapacityPlan) -> str:
    number = plan.settings.concurrency
    return f"{number} request{'s' * (number > 1)}"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or (match[2] and match[2] not in SIZE_UNITS) or float(match[1]) == 0:
        units = ", ".join(SIZE_UNITS)
        raise argparse.ArgumentTypeError(
            f"must be above 0, in GiB or with one of the units {units}, such as 24 or 24GB, not {text!r}"
        )
    return int(float(match[1]) * SIZE_UNITS[match[2] or "GiB"])


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmKM]?)", text.strip())
    number = float(match[1]) * TOKEN_UNITS.get(match[2], 1) if match else 0.5
    if number != int(number) or number < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of tokens above 0, such as 131072 or 128K (128k is 128000), not {text!r}"
        )
    return int(number)


def _gpu(text: str) -> str:
    plain = re.sub(r"[^A-Z0-9]", "", text.upper())
    if plain not in GPUS:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(GPUS)}, not {text!r}; for another GPU take the nearest, and give --gpu-memory, "
            "--tflops, --hbm-gbs and --pcie-gbs"
        )
    return plain


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, not {text!r}")
    return int(text)
