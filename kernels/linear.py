"""`act(rms(x) @ weightᵀ + bias) + residual` in one launch.

x (M, K), weight (N, K), out (M, N). rms is the row's factor 1 / sqrt(mean(x²) + eps), applied to
the finished product; its Σx² comes in partial sums from the launch that wrote x, and this launch
writes those of its own output where that is a residual stream. Persistent: a program goes on to its
next tile while the last one is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpus import Gpu
from .launch import (
    FP8,
    FP8_MAX,
    NAMES,
    SUM_BLOCK,
    Layout,
    Plan,
    Target,
    aligned,
    describable,
    launch,
    planned,
    table_of,
    target_of,
)
from .pieces import gelu, row_parts, row_sums, slices, square_sums, to_fp8, wait_for_inputs
from .tables import Tile

# Of K that an FP8 accumulator sums up alone: the tensor core keeps 14 bits of what it adds
# (DeepSeek-V3 technical report, section 3.3.2).
CHUNK = 2048
GROUP_M = 8  # tiles of rows that share a column tile of weight in the cache


@triton.jit
def _scales(
    sums_ptr, row_scale_ptr, rows, M, RMS: tl.constexpr, PARTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """What the factors of rows are made of, if there are any."""
    if RMS:
        scales = row_parts(sums_ptr, rows, M, PARTS)
    elif SCALE_ROWS:
        scales = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    else:
        scales = rows
    return scales


@triton.jit
def _factors(
    scales, rows, eps, M, K, RMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """What each row of the product is multiplied with: (BLOCK_M,), of `_scales`."""
    if RMS:
        mean = row_sums(scales, PARTS, BLOCK_M) / K
        factors = tl.where(rows < M, tl.rsqrt(mean + eps), 0.0)
    else:
        factors = scales
    return factors


@triton.jit
def _beside(
    first_row,
    first_column,
    bias_ptr,
    weight_scale_ptr,
    residual,
    M,
    N,
    SCALE_COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What meets the product of a slice, where it does: bias, scales of columns, residual."""
    columns = first_column + tl.arange(0, WIDTH)
    mask_n = columns < N
    bias = tl.load(bias_ptr + columns, mask=mask_n, other=0.0)
    scales = bias
    if SCALE_COLUMNS:
        scales = tl.load(weight_scale_ptr + columns, mask=mask_n, other=0.0)
    x = bias
    if RESIDUAL:
        if DESCRIPTORS:
            x = residual.load([first_row, first_column])
        else:
            rows = first_row + tl.arange(0, BLOCK_M)
            offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
            x = tl.load(residual + offsets, mask=(rows < M)[:, None] & mask_n[None, :], other=0.0)
    return bias, scales, x


@triton.jit
def _finish(
    acc,  # (BLOCK_M, WIDTH) float32: columns first_column... of the tile
    row_factors,  # (BLOCK_M,)
    beside,  # of `_beside`
    first_row,
    first_column,
    out,
    out_sums_ptr,
    out_factor,
    M,
    N,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, WIDTH)
    mask_n = columns < N
    mask = (rows < M)[:, None] & mask_n[None, :]
    bias, scales, x = beside
    if SCALE_ROWS:
        acc = acc * row_factors[:, None]
    if SCALE_COLUMNS:
        acc = acc * scales[None, :]
    acc = acc + bias.to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc, EXACT)
    if RESIDUAL:
        acc = acc + x.to(tl.float32)
    if QUANTIZE:
        y = to_fp8(acc * out_factor, FP8_MAX)
    elif DESCRIPTORS:
        y = acc.to(out.dtype)
    else:
        y = acc.to(out.dtype.element_ty)
    if DESCRIPTORS:
        out.store([first_row, first_column], y)
    else:
        tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], y, mask=mask)
    if RESIDUAL:
        if not DESCRIPTORS:  # which read zeros past the end
            acc = tl.where(mask_n[None, :], acc, 0.0)
        sums = square_sums(acc, BLOCK_M, WIDTH, SUM_BLOCK)
        parts = first_column // SUM_BLOCK + tl.arange(0, WIDTH // SUM_BLOCK)
        mask_s = (rows < M)[:, None] & (parts * SUM_BLOCK < N)[None, :]
        at = parts.to(tl.int64)[None, :] * M + rows[:, None]
        tl.store(out_sums_ptr + at, sums, mask=mask_s)


@triton.jit
def _operands(
    x,
    weight,
    first_row,
    first_column,
    first_k,
    M,
    N,
    K,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_K) of x and (BLOCK_N, BLOCK_K) of weight."""
    if DESCRIPTORS:
        a = x.load([first_row, first_k])
        b = weight.load([first_column, first_k])
    else:
        # Rows past the end read the last one; what comes of them is not stored.
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        ks = first_k + tl.arange(0, BLOCK_K)
        a_ptrs = x + rows[:, None] * K + ks[None, :]
        b_ptrs = weight + columns[:, None] * K + ks[None, :]
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(ks < K)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(ks < K)[None, :], other=0.0)
    return a, b


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x,  # (M, K): pointer, or descriptor of (BLOCK_M, BLOCK_K)
    weight,  # (N, K): pointer, or descriptor of (BLOCK_N, BLOCK_K)
    out,  # (M, N): pointer, or descriptor of (BLOCK_M, BLOCK_N // SLICES)
    bias_ptr,  # (N,)
    weight_scale_ptr,  # (N,) float32
    residual,  # (M, N): pointer, or unless AHEAD descriptor as out's
    sums_ptr,  # (PARTS, M) float32: partial Σx²
    row_scale_ptr,  # (M,) float32
    out_sums_ptr,  # (ceil(N / SUM_BLOCK), M) float32
    out_factor,  # 1 / scale of a quantized output
    eps,
    M,
    N,
    K,
    RMS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of K, whose sums are added up in float32
    CHUNK: tl.constexpr,  # K of each but the last, whole steps
    ONE_LOOP: tl.constexpr,  # over the steps of all tiles
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,  # one tile, and what meets its product is read before it
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = acc
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=ONE_LOOP and not AHEAD
    ):
        # Tiles that run at the same time share GROUP_M rows of x and few columns of weight.
        group = tile // (GROUP_M * tiles_n)
        group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        first_row = (group * GROUP_M + (tile % (GROUP_M * tiles_n)) % group_rows) * BLOCK_M
        first_column = ((tile % (GROUP_M * tiles_n)) // group_rows) * BLOCK_N

        rows = first_row + tl.arange(0, BLOCK_M)
        if AHEAD:  # asked for here, waited for behind the products
            scales = _scales(sums_ptr, row_scale_ptr, rows, M, RMS, PARTS, SCALE_ROWS)
            left = _beside(
                first_row, first_column, bias_ptr, weight_scale_ptr, residual, M, N,
                SCALE_COLUMNS, RESIDUAL, False, BLOCK_M, WIDTH,
            )  # fmt: skip
            right = left
            if SLICES == 2:
                right = _beside(
                    first_row, first_column + WIDTH, bias_ptr, weight_scale_ptr, residual, M, N,
                    SCALE_COLUMNS, RESIDUAL, False, BLOCK_M, WIDTH,
                )  # fmt: skip

        if CHUNKS == 1:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(steps):
                a, b = _operands(
                    x, weight, first_row, first_column, step * BLOCK_K, M, N, K,
                    DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
        elif ONE_LOOP:
            # The next operands are on their way over the ends of chunks and of tiles. Products stay
            # asynchronous in this form alone: one use of their sum, which leaves it at zero.
            for step in range(steps):
                a, b = _operands(
                    x, weight, first_row, first_column, step * BLOCK_K, M, N, K,
                    DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
                if ((step + 1) % (CHUNK // BLOCK_K) == 0) | (step + 1 == steps):
                    if step < CHUNK // BLOCK_K:
                        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    total += acc
                    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for chunk in range(CHUNKS):
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for first_k in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, K), BLOCK_K):
                    a, b = _operands(
                        x, weight, first_row, first_column, first_k, M, N, K,
                        DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                    acc = tl.dot(a, b.T, acc, input_precision="ieee")
                total += acc

        if not AHEAD:
            scales = _scales(sums_ptr, row_scale_ptr, rows, M, RMS, PARTS, SCALE_ROWS)
        row_factors = _factors(scales, rows, eps, M, K, RMS, PARTS, BLOCK_M)
        columns_of = slices(total if CHUNKS > 1 else acc, BLOCK_M, BLOCK_N, SLICES)
        for slice in tl.static_range(SLICES):
            if AHEAD:
                beside = left if slice == 0 else right
            else:
                beside = _beside(
                    first_row, first_column + slice * WIDTH, bias_ptr, weight_scale_ptr, residual,
                    M, N, SCALE_COLUMNS, RESIDUAL, DESCRIPTORS, BLOCK_M, WIDTH,
                )  # fmt: skip
            _finish(
                columns_of[slice],
                row_factors,
                beside,
                first_row,
                first_column + slice * WIDTH,
                out=out,
                out_sums_ptr=out_sums_ptr,
                out_factor=out_factor,
                M=M,
                N=N,
                SCALE_ROWS=RMS or SCALE_ROWS,
                SCALE_COLUMNS=SCALE_COLUMNS,
                EXACT=bias_ptr.dtype.element_ty == tl.float32,
                GELU=GELU,
                RESIDUAL=RESIDUAL,
                QUANTIZE=QUANTIZE,
                DESCRIPTORS=DESCRIPTORS,
                BLOCK_M=BLOCK_M,
                WIDTH=WIDTH,
                SUM_BLOCK=SUM_BLOCK,
                FP8_MAX=FP8_MAX,
            )


def linear_tile(gpu: Gpu, x: torch.dtype, rows: int, columns: int, depth: int) -> Tile:
    """The tile of a matrix product (rows, depth) x (depth, columns): tuned, or by heuristics.

    Wide tiles read less, narrow ones leave no processor without work. All have the same rows, warps
    and instruction: see `launch.py`.
    """
    tuned = table_of(gpu).linear_tile(NAMES.get(x, ""), rows, columns, depth)
    if tuned is not None:
        return tuned
    if x == torch.float32:
        return Tile(128, 64, 16, num_warps=8, num_stages=2)
    deep = 128 if x == FP8 else 64
    chunks, _ = chunks_of(x, depth)
    if gpu.shared < 200_000:
        return _smaller_tile(gpu, x, rows, columns, depth)
    choices = [
        Tile(128, 128, deep, num_warps=8, num_stages=4, slices=2),
        Tile(128, 64, deep, num_warps=8, num_stages=4),
    ]
    if chunks == 1:  # a second accumulator would not fit into the registers
        choices.insert(0, Tile(128, 256, deep, num_warps=8, num_stages=3, slices=2))
    return min(choices, key=lambda tile: _cycles(gpu, tile, rows, columns, depth * x.itemsize))


def _smaller_tile(gpu: Gpu, x: torch.dtype, rows: int, columns: int, depth: int) -> Tile:
    """Of a part with less shared memory and accumulators in registers: no 256-wide tile.

    On sm_89 by predicted times: one stage more, but not for what fc1 writes in FP8, which leaves
    registers for two programs, if stages leave shared memory.
    """
    step = 64 if x == FP8 else 32
    two = x == FP8 and columns > 3 * depth
    more = 1 if gpu.arch == 89 and not two else 0
    wide = Tile(128, 128, step, num_warps=8, num_stages=3 + more, slices=2)
    narrow = Tile(128, 64, step, num_warps=8, num_stages=4 + more)
    tiles_m = -(-rows // 128)
    fills = tiles_m * -(-columns // 128) >= gpu.processors
    if gpu.arch != 89 or (two and not fills):
        return wide if fills else narrow

    def cycles(tile: Tile) -> int:
        """Of the busiest processor, counted in columns; a tile takes some four beside its own."""
        waves = -(-tiles_m * -(-columns // tile.block_n) // gpu.processors)
        return waves * (tile.block_n + 4)

    return min(wide, narrow, key=cycles)


def chunks_of(x: torch.dtype, depth: int) -> tuple[int, int]:
    """How many chunks of a product's depth are summed up apart, and the depth of each.

    A function of dtype and depth alone, or a row's sums would depend on its batch.
    """
    chunks = -(-depth // CHUNK) if x == FP8 else 1
    return chunks, -(-depth // (chunks * 256)) * 256  # whole steps of every tile


def _cycles(gpu: Gpu, tile: Tile, rows: int, columns: int, row_bytes: int) -> float:
    """What decides between tiles of a product: reading operands, and finishing tiles.

    A processor reads 64 bytes a cycle from the cache, which gives all of them some 34 each; what a
    tile takes beside its reading grows with its columns, by about 32 cycles each.
    """
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    read = (tile.block_m + tile.block_n) * row_bytes
    busiest = -(-tiles // gpu.processors) * (read / 64 + 32 * tile.block_n)
    return max(busiest, tiles * read / (34 * gpu.processors))


def _sums(tile: Tile, chunks: int) -> int:
    """Registers of a thread that a tile's sums take."""
    return tile.block_m * tile.block_n // (32 * tile.num_warps) * min(chunks, 2)


def reads_ahead(gpu: Gpu, tile: Tile, x: torch.dtype, chunks: int, tiles: int) -> bool:
    """Whether a program reads bias, residual and factors of rows before its products.

    Where all tiles run at once, nothing else hides what a program would wait for behind its
    products; before them it comes with the first operands. The loops over tiles and steps stay two
    there, or it would be held once for each stage. float32 has no registers for it; nor have more
    than 32 sums a thread, where the operands of products are in registers too.
    """
    at_once = tiles <= gpu.processors * tile.residents
    most = 64 if gpu.arch in (90, 100) else 32
    return at_once and x != torch.float32 and _sums(tile, chunks) <= most


def linear_options(
    tile: Tile, x: torch.dtype, descriptors: bool, quantizes: bool, ahead: bool
) -> dict[str, int]:
    """Options of the compiler for a product; `quantizes` its output to FP8.

    Left to itself, the assembler caps the registers so low that it spills: in that epilogue, and
    where float32 operands come by pointers.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if quantizes and _sums(tile, 1) <= 64:
        options["maxnreg"] = 168 if ahead and _sums(tile, 1) > 32 else 128
    if x == torch.float32 and not descriptors:
        options["maxnreg"] = 160
    return options


def _check(
    x: torch.Size,
    weight: torch.Size,
    bias: torch.Size,
    residual: torch.Size | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    scaled: bool,
) -> None:
    if len(x) != 3 or len(weight) != 2 or x[2] != weight[1]:
        raise ValueError(
            f"x must be (B, S, I) and weight (O, I), got {tuple(x)} and {tuple(weight)}"
        )
    if bias != weight[:1]:
        raise ValueError(f"bias must be ({weight[0]},), got {tuple(bias)}")
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"x and weight must have one dtype, got {dtypes[0]} and {dtypes[1]}")
    if (dtypes[1] == FP8) != scaled:
        raise ValueError(f"weight_scale goes with an e4m3 weight, got {dtypes[1]}")
    if residual is not None and residual != (*x[:2], weight[0]):
        raise ValueError(f"residual must be {(*x[:2], weight[0])}, got {tuple(residual)}")


@planned
def _plan(
    target: Target,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    bias_shape: torch.Size,
    residual_shape: torch.Size | None,
    sums_shape: torch.Size | None,
    dtypes: tuple[torch.dtype, torch.dtype],  # of x and weight
    out: torch.dtype,  # and of the residual
    strides: tuple[int, ...] | None,  # of x (B * S, I), unless contiguous
    on_grid: bool,  # x, weight and residual `aligned`
    row_scales: bool,
    column_scales: bool,
    norm_eps: float | None,
    gelu: bool,
    out_scale: float | None,
) -> Plan:
    _check(x_shape, weight_shape, bias_shape, residual_shape, dtypes, column_scales)
    gpu, x = target.gpu, dtypes[0]
    columns, depth = weight_shape
    rows = x_shape[0] * x_shape[1]
    parts = 0 if sums_shape is None or rows == 0 else sums_shape.numel() // rows
    tile = linear_tile(gpu, x, rows, columns, depth)
    chunks, chunk = chunks_of(x, depth)
    width = tile.block_n // tile.slices
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    ahead = reads_ahead(gpu, tile, x, chunks, tiles)
    strides = (depth, 1) if strides is None else strides
    descriptors = (
        gpu.descriptors
        and min(rows, columns, depth) > 0
        and on_grid
        and all(describable(s, d) for s, d in ((strides, x), ((depth, 1), x), ((columns, 1), out)))
    )
    layouts = {}
    if descriptors:
        written = Layout([rows, columns], [columns, 1], [tile.block_m, width])
        layouts = {
            "x": Layout([rows, depth], list(strides), [tile.block_m, tile.block_k]),
            "weight": Layout([columns, depth], [depth, 1], [tile.block_n, tile.block_k]),
            "out": written,
        }
        if residual_shape is not None and not ahead:  # TMA's would be waited for at once
            layouts["residual"] = written
    return Plan(
        target,
        _linear_kernel,
        (min(tiles, gpu.processors * tile.residents) if descriptors else tiles,),
        linear_options(tile, x, descriptors, out_scale is not None, ahead),
        {
            "out_factor": 1.0 if out_scale is None else 1.0 / out_scale,
            "eps": float(norm_eps or 0.0),
            "M": rows,
            "N": columns,
            "K": depth,
            "RMS": norm_eps is not None,
            "PARTS": parts,
            "SCALE_ROWS": row_scales,
            "SCALE_COLUMNS": column_scales,
            "GELU": gelu,
            "RESIDUAL": residual_shape is not None,
            "QUANTIZE": out_scale is not None,
            "DESCRIPTORS": descriptors,
            "CHUNKS": chunks,
            "CHUNK": chunk,
            "ONE_LOOP": chunks == 1 or gpu.arch == 90,
            "EVEN_K": descriptors or depth % tile.block_k == 0,
            "AHEAD": ahead,
            "SLICES": tile.slices,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": GROUP_M,
            "SUM_BLOCK": SUM_BLOCK,
            "FP8_MAX": FP8_MAX,
        },
        layouts,
    )


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    sums: Tensor | None = None,
    gelu: bool = False,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: float | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The product (B, S, O), and of a residual stream the sums of its rows."""
    shape, device, strides = x.shape, x.device, None
    weight = weight.contiguous()
    if not x.is_contiguous() and len(shape) == 3:
        x = x.flatten(0, 1)
        strides = x.stride()
    if residual is None:
        dtype, on_grid = bias.dtype if out_scale is None else FP8, aligned(x, weight)
    else:
        residual = residual.contiguous()
        dtype, on_grid = residual.dtype, aligned(x, weight, residual)
    plan = _plan(
        target_of(device),
        shape,
        weight.shape,
        bias.shape,
        None if residual is None else residual.shape,
        None if sums is None else sums.shape,
        (x.dtype, weight.dtype),
        dtype,
        strides,
        on_grid,
        x_scale is not None,
        weight_scale is not None,
        norm_eps,
        gelu,
        out_scale,
    )
    columns = weight.shape[0]
    out = torch.empty((shape[0], shape[1], columns), dtype=dtype, device=device)
    out_sums = None
    if residual is not None:
        parts = (-(-columns // SUM_BLOCK), shape[0], shape[1])
        out_sums = torch.empty(parts, dtype=torch.float32, device=device)
    launch(
        plan,
        device,
        x=x if plan.layouts else x.contiguous(),
        weight=weight,
        out=out,
        bias_ptr=bias.contiguous(),
        weight_scale_ptr=weight_scale,
        residual=residual,
        sums_ptr=None if sums is None else sums.contiguous(),
        row_scale_ptr=None if x_scale is None else x_scale.contiguous(),
        out_sums_ptr=out_sums,
    )
    return out, out_sums


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    sums: Tensor | None = None,
    gelu: bool = False,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: float | None = None,
) -> Tensor:
    """`reference.ops.linear`. x and weight have one dtype: that of the products.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if norm_eps is not None and x_scale is not None:
        raise ValueError("quantized rows are normalised already; norm_eps does not go with x_scale")
    if norm_eps is not None and sums is None:
        sums = x.float().square().sum(-1)
    out, _ = _multiply(
        x,
        weight,
        bias,
        norm_eps=norm_eps,
        sums=sums,
        gelu=gelu,
        x_scale=x_scale,
        weight_scale=weight_scale,
        out_scale=out_scale,
    )
    return out


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.ops.linear_residual`; one partial sum of squares for every 64 columns.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    out, sums = _multiply(x, weight, bias, weight_scale=weight_scale, residual=residual)
    assert sums is not None
    return out, sums
