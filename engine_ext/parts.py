"""Results of passes that see some of their rows' keys, or some of their heads, put together."""

import torch
from farspan.engine_ext.launch import is_on_host
from farspan.engine_ext.passes import Pass
from farspan.engine_ext.star.exchange import PartialResult
from farspan.kernels.combine import add_part, combine_partials
from farspan.kernels.reference import combine_partials as combine_partials_on_host


class Parts:
    """Results of the partial passes over some rows until the last of their set combines them into the output."""

    def __init__(self, output: torch.Tensor, group_size: int) -> None:
        """output: [num_tokens, num_q_heads, head_dim] of a layer; group_size: query heads per KV head."""
        self.output, self.group_size = output, group_size
        self.sums: RunningSum | None = None
        self.mine: PartialResult | None = None
        """Of all heads of the rows, where hosts exchange it."""

    def heads_of(self, each: Pass) -> slice:
        """The query heads of a pass."""
        return slice(each.kv_heads.start * self.group_size, each.kv_heads.stop * self.group_size)

    def room(self, each: Pass) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where a pass puts its result and its LSE; None for any place."""
        heads = self.heads_of(each)
        out = rows_of(self.output, each.rows, heads)
        if each.part is None:
            return out, None
        if each.part.count > 1:
            assert each.part.exchange is None, "hosts exchange what they have of all their keys"
            if each.part.index > 0:
                return out, None
            self.sums = RunningSum(out)
            return self.sums.first, None
        assert each.part.exchange is not None, "a part alone is one of several hosts'"
        if self.mine is None:
            self.mine = PartialResult.empty(rows_of(self.output, each.rows, slice(0, self.output.shape[1])))
        mine = self.mine.out[:, heads]
        # Kernels differ by whether a row begins at 16 bytes, and that of some heads may begin anywhere.
        return mine, self.mine.lse if mine.shape == self.mine.out.shape else None

    def add(self, each: Pass, lse: torch.Tensor) -> None:
        """Take in the LSE of the part last made; after the last part of the set, write the output."""
        part, heads = each.part, self.heads_of(each)
        assert part is not None
        if part.count > 1:
            assert self.sums is not None
            assert part.index == self.sums.num_parts, "the passes of a set follow each other"
            out = rows_of(self.output, each.rows, heads)
            if part.index + 1 < part.count:
                self.sums.put(self.sums.first if part.index == 0 else out, lse)
                return
            self.sums.finish(out, lse, out)
            self.sums = None
            return
        assert part.exchange is not None
        assert self.mine is not None
        if lse is not self.mine.lse:
            self.mine.lse[heads].copy_(lse)
        if part.is_last:
            out = rows_of(self.output, each.rows, slice(0, self.output.shape[1]))
            combine(*part.exchange.gather(self.mine), out, torch.empty_like(self.mine.lse))
            self.mine = None


def rows_of(tensor: torch.Tensor, rows: slice, heads: slice) -> torch.Tensor:
    """`tensor[rows, heads]` of [num_tokens, num_heads, head_dim]; the tensor itself where that is all of it."""
    if rows.start == heads.start == 0 and (rows.stop, heads.stop) == tensor.shape[:2]:
        return tensor
    return tensor[rows, heads]


class RunningSum:
    """Partial attention of some rows, added up part by part: in float32 until the last."""

    def __init__(self, out: torch.Tensor) -> None:
        """For results like `out`, [num_tokens, num_heads, head_dim]."""
        self.first = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        """Where the first part's result goes."""
        self.total = self.first
        """Of all parts so far."""
        self.lse: torch.Tensor | None = None
        """[num_heads, num_tokens] float32, natural log, of `total`; None before the first part."""
        self.num_parts = 0

    def put(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Take in another part, which is not the last; the first one's `out` is `first`. `lse` is kept, and changed."""
        if self.lse is None:
            assert out is self.first
        else:
            self.add_to(self.widened(), out, lse)
        self.lse = lse
        self.num_parts += 1

    def finish(self, out: torch.Tensor, lse: torch.Tensor, target: torch.Tensor) -> None:
        """Take in the last part: the sum of all goes to `target`, which may be `out`, and their LSE to `lse`."""
        self.add_to(target, out, lse)
        self.num_parts += 1

    def widened(self) -> torch.Tensor:
        """The total's memory, in float32."""
        if self.total is self.first:
            return torch.empty(self.first.shape, dtype=torch.float32, device=self.first.device)
        return self.total

    def add_to(self, target: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write total and part together to `target` and `lse`."""
        assert self.lse is not None
        if is_on_host(out):
            both = torch.stack([self.total.float(), out.float()]), torch.stack([self.lse, lse])
            combined_out, combined_lse = combine_partials_on_host(*both)
            target.copy_(combined_out)
            lse.copy_(combined_lse)
        else:
            add_part(self.total, self.lse, out, lse, out=target)
        self.total = target


def combine(part_out: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Combine partial attention of the same queries into `out` and `lse`; arguments as in `combine_partials`."""
    if is_on_host(out):
        combined_out, combined_lse = combine_partials_on_host(part_out.float(), part_lse)
        out.copy_(combined_out)
        lse.copy_(combined_lse)
    else:
        combine_partials(part_out, part_lse, out=out, lse=lse)
