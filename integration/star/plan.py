"""`farspan star plan`: how long more and more hosts would take over a fast or a slow link, without any of them."""

from farspan.engine_ext.errors import ConfigError
from farspan.model_shape import read_model
from farspan.needle import local_name
from farspan.plan_command import aligned
from farspan.scheduler.footprint import ModelShape
from farspan.scheduler.rates import LINKS, Link, Rates, rates_of
from farspan.star.scaling import Cluster

HOSTS = (1, 2, 4, 8, 16, 32, 64)
PAGE_SIZE = 128


def run_star_plan(model: str, num_tokens: int, block_len: int | None, gpu: str, link: str) -> int:
    """Print the table of a model and a length. Raises FarspanError."""
    if num_tokens < 2 * PAGE_SIZE:
        raise ConfigError(f"--length {num_tokens}; allowed: at least {2 * PAGE_SIZE} tokens. Use 131072.")
    shape = read_model(local_name(model)).shape
    print(format_star_plan(model, shape, num_tokens, block_len, gpu, LINKS[link]))
    return 0


def format_star_plan(
    model: str, shape: ModelShape, num_tokens: int, block_len: int | None, gpu: str, link: Link
) -> str:
    """Seconds until a context is read, by the number of hosts, and milliseconds of a token."""
    rates = rates_of(gpu)
    blocks = f"blocks of {block_len:,} tokens" if block_len else "blocks of N/4 or N/hosts, whichever is smaller"
    source = "measured" if link.is_measured else "assumed"
    return "\n".join(
        [
            f"{model}: a context of {num_tokens:,} tokens, {blocks}; hosts with one {gpu} each",
            f"{link.name}: {link.gbs:g} GB/s, {link.latency_us:g} us ({source}); seconds until the context is read",
            "",
            *aligned(plan_rows(shape, rates, link, num_tokens, block_len), "<"),
            "",
            "Left out: time in which hosts decide, and slower hosts. Memory is not checked: see `farspan plan`.",
        ]
    )


def plan_rows(shape: ModelShape, rates: Rates, link: Link, num_tokens: int, block_len: int | None) -> list[list[str]]:
    """A header and a line for each number of hosts."""
    rows = [["hosts", "star", "star, anchor shared", "all visible", "ring", "tensor parallel", "ms a token"]]
    for hosts in HOSTS:
        cluster = Cluster(shape, rates, link, hosts)
        if hosts == 1:
            token_ms = f"{cluster.token_s(num_tokens) * 1e3:.3g}"
            rows.append(["1", f"{cluster.exact_s(num_tokens):.3g}", "", "", "", "", token_ms])
            continue
        ways = [
            cluster.star(num_tokens, block_len, is_shared=False, page_size=PAGE_SIZE),
            cluster.star(num_tokens, block_len, is_shared=True, page_size=PAGE_SIZE),
            cluster.visible_all(num_tokens),
            cluster.ring(num_tokens),
            cluster.tensor_parallel(num_tokens),
        ]
        rows.append([str(hosts), *(f"{way.prefill_s:.3g}" for way in ways), f"{ways[0].token_s * 1e3:.3g}"])
    return rows
