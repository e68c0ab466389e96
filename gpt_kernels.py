"""Fused operations of train_gpt.py, each beside its plain formula.

Every operation comes in the same order: the public function with its formula and shapes, the plain reference,
the kernels, the autograd function. On the CPU, and where a width does not fit, the reference runs. Products
of 8-bit floats lie behind Activation, Matrix and Product: whoever calls an operation need not know of them.
"""
from __future__ import annotations

import functools
import importlib
import itertools
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # CPU builds of PyTorch come without it; what needs it is then never called
    triton = tl = None
HAS_TRITON = triton is not None

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # nor has every Triton this language, which spells out the order of loads and stores
    gluon = gl = tma = None


class KernelError(Exception):
    """A kernel that was asked for does not run here: the message names the setting and the remedy."""


# --- Launching kernels --------------------------------------------------------------------------------------

# One compilation serves every number of tokens T, of a step of training or of test-time training.
jit = functools.partial(triton.jit, do_not_specialize=["T", "M"]) if triton else lambda function: function


def fusible(x: Tensor, *widths: int) -> bool:
    """Whether the fused kernels run: on CUDA, where all widths are powers of two."""
    return x.is_cuda and all(width & (width - 1) == 0 for width in widths)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have."""
    if device.type != "cuda":
        return 232_448  # Hopper's
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class RowKernel:
    """A kernel over the rows of (T, ...) tensors, launched by keyword.

    Its programs, `per_multiprocessor` of them at most, each of `warps` warps, take tiles of `rows` rows in
    turn, with `stages` tiles on their way through shared memory. Every activation is read once per pass. What
    is summed over tokens, the gradients of vectors, each program sums over its own rows and writes once.
    """

    def __init__(self, function, rows: int, warps: int, per_multiprocessor: int, stages: int, strided: str):
        self.kernel = jit(function)
        self.name = function.__name__
        self.rows = rows
        self.warps = warps
        self.per_multiprocessor = per_multiprocessor
        self.stages = stages
        self.strided = strided

    def tile(self, x: Tensor) -> dict[str, int]:
        """Rows of a tile and stages, as fit in shared memory for rows as wide as x's."""
        fitting = max(1, 4096 * len(x) // x.numel())
        fitting = 1 << fitting.bit_length() - 1  # a power of two
        stages = self.stages if shared_memory(x.device) > 160_000 else 1
        return dict(ROWS=min(self.rows, fitting), STAGES=stages)

    def programs(self, x: Tensor) -> int:
        """How many programs share the rows of x, whatever their width."""
        return min(-(-len(x) // self.rows), self.per_multiprocessor * multiprocessors(x.device))

    def partial_sums(self, x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
        """For the gradient of each vector one row per program."""
        return [None if v is None else v.new_empty(self.programs(x), *v.shape) for v in vectors]

    def __call__(self, rows_of: Tensor, **arguments) -> None:
        """Run over the rows of `rows_of`. All tensors but the one called `strided` must be contiguous."""
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name != self.strided:
                assert value.is_contiguous(), (self.name, name)
        launch = self.kernel[self.programs(rows_of),]
        launch(**arguments, T=len(rows_of), **self.tile(rows_of), num_warps=self.warps)


def row_kernel(*, rows: int, warps: int, per_multiprocessor: int, stages: int = 1, strided: str = ""):
    """Decorator that makes a RowKernel of a function with the arguments T, ROWS and STAGES."""
    return lambda function: RowKernel(function, rows, warps, per_multiprocessor, stages, strided)


def summed(partial: list[Tensor | None], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The vectors' gradients from the programs' partial sums, where they are needed."""
    return [rows.sum(0) if need else None for rows, need in zip(partial, needed)]


@jit
def tile_rows(block, T, ROWS: tl.constexpr):
    """From the end: what the product before wrote last is still in the cache, as the beginning will be."""
    return (tl.cdiv(T, ROWS) - 1 - block) * ROWS + tl.arange(0, ROWS)


@jit
def read(x, at, inside):
    """float32 values; 0 outside."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@jit
def write(x, at, value, inside):
    """Store values as the type of the tensor x."""
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@jit
def rounded(value, like):
    """float32 values as the tensor `like` would keep them."""
    return value.to(like.dtype.element_ty).to(tl.float32)


# --- Products, in 8-bit floats where the matrix has them ----------------------------------------------------
# Training multiplies E4M3, floats of 8 bits with 3 of mantissa (Micikevicius et al. 2022), but for gradients
# of matrices. Weights have a scale per matrix, gradients one per row, by which the largest entry becomes 448,
# the largest E4M3. Activations have constant units, since normalization bounds them.

FP8 = torch.float8_e4m3fn
GATED_UNIT = 0.25  # what 1 in E4M3 stands for in attention's gated output, which so ends at 112
HIDDEN_UNIT = 4.0  # in the MLP's activation, which ends at 1,792
DHIDDEN_UNIT = 2.0 ** 17  # in the gradient before it, in units of the 8-bit product that it comes from


class E4M3(NamedTuple):
    """A tensor in 8-bit floats: about values * scale."""

    values: Tensor  # float8_e4m3fn
    scale: Tensor  # float32, () or one for each row


NO_FP8 = E4M3(None, None)


class Matrix(NamedTuple):
    """A weight matrix W (n, d) as products read it."""

    w: Tensor  # in the compute dtype; its gradient arrives here
    fp8: E4M3 | None = None  # W, for x W^T
    fp8_t: E4M3 | None = None  # W^T (d, n), for dy W: 8-bit products want both operands along the sum


class Activation(NamedTuple):
    """What products read, (T, d)."""

    x: Tensor
    fp8: E4M3 | None = None
    gate_input: Tensor | None = None  # (T, GATE_WINDOW), a tensor of its own: its gradient is small


class Product(NamedTuple):
    """x W^T of x (T, d) and W (n, d), not computed yet.

    The operation that takes it computes it, and rounds its gradient to 8 bits while that is in registers.
    """

    x: Activation
    w: Matrix

    def compute(self) -> Tensor:
        """The product (T, n), outside autograd."""
        if self.w.fp8 is None:
            return F.linear(self.x.x, self.w.w)
        x, w = self.x.fp8, self.w.fp8
        return torch._scaled_mm(x.values, w.values.T, x.scale, w.scale, out_dtype=torch.bfloat16,
                                use_fast_accum=True)

    def operands(self) -> tuple[Tensor | None, ...]:
        """What product_gradients needs, for save_for_backward."""
        return self.x.x, self.w.w, *(self.w.fp8_t or NO_FP8)


def computed(y: Product | Tensor) -> Tensor:
    """The product computed by itself, inside autograd; a tensor as it is."""
    if isinstance(y, Tensor):
        return y
    return F.linear(y.x.x, y.w.w) if y.w.fp8 is None else FP8Product.apply(y.x.x, y.w.w, y)


def for_autograd(y: Product | Tensor | None) -> tuple[Tensor | None, Tensor | None, Product | None]:
    """The tensors of an operation's input that autograd must see, and the product, if it is one."""
    return (y.x.x, y.w.w, y) if isinstance(y, Product) else (y, None, None)


def taken(y: Tensor | None, product: Product | None) -> tuple[Tensor | None, tuple]:
    """An operation's input, and its operands if it is a product, from two results of for_autograd."""
    return (y, ()) if product is None else (product.compute(), product.operands())


def fp8_room(operands: tuple, dy: Tensor) -> E4M3:
    """Room for the gradient dy in 8 bits, if the product with these operands wants it."""
    return empty_fp8_rows(dy) if operands and operands[2] is not None else NO_FP8


def product_gradients(operands: tuple, dy: Tensor, dy_fp8: E4M3) -> tuple[Tensor, Tensor | None]:
    """Gradients at x and at W, from dy and that in 8 bits; dy itself if there was no product.

    W's is computed first: x's, needed next, is then still in the cache.
    """
    if not operands:
        return dy, None
    x, w, *fp8_t = operands
    dw = dy.T @ x
    dx = dy @ w if dy_fp8.values is None else fp8_product(dy_fp8, E4M3(*fp8_t), torch.empty_like(x))
    return dx, dw


class FP8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, product):
        ctx.save_for_backward(*product.operands())
        return product.compute()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous()
        return *product_gradients(ctx.saved_tensors, dy, fp8_rows(dy)), None


def as_matrices(stack: Tensor, dtype: torch.dtype, fp8: bool) -> list[Matrix]:
    """The matrices of a stack (count, n, d); unbind gathers their gradients in one stack."""
    matrices = stack.to(dtype).unbind()
    if not fp8:
        return [Matrix(w) for w in matrices]
    stack = stack.detach()
    scales = stack.abs().amax((1, 2)).float().clamp(min=1e-12) / 448
    values = (stack / scales[:, None, None]).clamp(-448, 448).to(FP8)
    aligned = scales[:, None].repeat(1, 4)[:, 0].unbind()  # 16 bytes apart, as cuBLAS wants them
    straight = map(E4M3, values.unbind(), aligned)
    transposed = map(E4M3, values.mT.contiguous().unbind(), aligned)
    return list(map(Matrix, matrices, straight, transposed))


def wants_fp8(reader: Matrix | None) -> bool:
    """Whether the matrix that reads an activation next reads it in 8 bits."""
    return reader is not None and reader.fp8 is not None


@functools.cache
def constant(number: float, device: torch.device) -> Tensor:
    """The number as a float32 tensor (), for kernels to read from memory; made before a graph is recorded."""
    return torch.full((), number, dtype=torch.float32, device=device)


def norm_unit(width: int) -> float:
    """What 1 in E4M3 stands for in a normalized row of that width: the power of 2 that keeps it below 448."""
    return 2.0 ** -math.floor(math.log2(448 / math.sqrt(width)))


def as_activation(x: Tensor, reader: Matrix | None, gate_input: Tensor | None = None) -> Activation:
    """The normalized x (T, d), in 8 bits too if the matrix that reads it wants that."""
    unit = norm_unit(x.size(1))
    return with_fp8(x, (x.detach() / unit).to(FP8) if wants_fp8(reader) else None, unit, gate_input)


def with_fp8(x: Tensor, x_fp8: Tensor | None, unit: float, gate_input: Tensor | None = None) -> Activation:
    """x and, if there is one, its copy in 8 bits, in that unit."""
    return Activation(x, None if x_fp8 is None else E4M3(x_fp8, constant(unit, x.device)), gate_input)


def empty_fp8(x: Tensor, reader: Matrix | None) -> Tensor | None:
    """Room for x in 8 bits if the matrix that reads it wants that."""
    return torch.empty_like(x, dtype=FP8) if wants_fp8(reader) else None


@jit
def write_fp8(x_fp8, at, value, UNIT: tl.constexpr, inside):
    """Store values in E4M3, in that unit, where there is a tensor for it."""
    if x_fp8 is not None:
        write(x_fp8, at, value / UNIT, inside)


def fp8_products_fit(model_dim: int, kv_dim: int, mlp_dim: int, vocab_size: int, dtype: torch.dtype) -> bool:
    """Whether training's products can run in E4M3 here, for a model of these sizes."""
    if not torch.cuda.is_available():
        return False
    x = torch.empty(0, model_dim, dtype=dtype, device="cuda")
    widths_fit = model_dim % 256 == 0 and kv_dim % 16 == 0 and vocab_size % 16 == 0
    return widths_fit and fusible(x, model_dim) and mlp_fusible(x, mlp_dim)


def fp8_rows(x: Tensor) -> E4M3:
    """x (T, d) in E4M3, with a scale for each row: a gradient's rows differ, and change from step to step."""
    if not fusible(x, x.size(1)):
        scales = x.abs().amax(1).float().clamp(min=1e-30) / 448
        return E4M3((x / scales[:, None]).clamp(-448, 448).to(FP8), scales)
    rows = empty_fp8_rows(x)
    fp8_rows_kernel(rows_of=x, x=x, x_fp8=rows.values, scales=rows.scale, D=x.size(1))
    return rows


def empty_fp8_rows(x: Tensor) -> E4M3:
    return E4M3(torch.empty_like(x, dtype=FP8), x.new_empty(len(x), dtype=torch.float32))


@jit
def row_scale(largest):
    """The scale by which the largest absolute value of a row becomes 448."""
    return tl.maximum(largest, 1e-30) / 448


@jit
def write_fp8_rows(x_fp8, scales, row, value, T, D: tl.constexpr):
    """Store the rows (R, D) of value in E4M3, each with its scale; row (R, 1)."""
    scale = row_scale(tl.max(tl.abs(value), 1, keep_dims=True))
    tl.store(scales + row, scale, mask=row < T)
    write(x_fp8, row * D + tl.arange(0, D)[None, :], value * (1.0 / scale), row < T)


@row_kernel(rows=4, warps=4, per_multiprocessor=8)
def fp8_rows_kernel(x, x_fp8, scales, T, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        write_fp8_rows(x_fp8, scales, row, read(x, row * D + tl.arange(0, D)[None, :], row < T), T, D)


FP8_TILE = dict(BM=128, BN=256, BK=128, num_warps=8, num_stages=3)


def fp8_product(x: E4M3, w: E4M3, out: Tensor, *, add: bool = False, unit: float = 1.0,
                unit_scale: Tensor | None = None) -> Tensor:
    """out (M, N) = unit * unit_scale * x w^T, added to what `out` holds if `add`.

    x (M, K), with a scale for each row or one; w (N, K); unit_scale ().
    """
    per_row = x.scale.dim() == 1
    if not fusible(out):
        y = (x.values.float() @ w.values.float().T) * (x.scale[:, None] if per_row else x.scale)
        y = y * w.scale * unit * (1.0 if unit_scale is None else unit_scale)
        return out.copy_(out + y if add else y)
    BM, BN, BK, *_ = FP8_TILE.values()
    (M, K), N = x.values.shape, out.size(1)
    launch = fp8_product_kernel[min(triton.cdiv(M, BM) * (N // BN), multiprocessors(out.device)),]
    blocks_of = TensorDescriptor.from_tensor
    launch(x=blocks_of(x.values, [BM, BK]), w=blocks_of(w.values, [BN, BK]),
           out=blocks_of(out, [BM, BN // 2]), x_scale=x.scale, w_scale=w.scale, unit_scale=unit_scale, M=M,
           UNIT=unit, PER_ROW=per_row, ADD=add, N=N, K=K, **FP8_TILE)
    return out


@jit
def fp8_product_kernel(x, w, out, x_scale, w_scale, unit_scale, M, UNIT: tl.constexpr, PER_ROW: tl.constexpr,
                       ADD: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr):
    """Neighbouring tiles, which share rows of x, are computed at the same time."""
    scale = UNIT * tl.load(w_scale)
    if unit_scale is not None:
        scale *= tl.load(unit_scale)
    if not PER_ROW:
        scale *= tl.load(x_scale)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * (N // BN), tl.num_programs(0), flatten=True):
        row = tile // (N // BN) * BM
        column = tile % (N // BN) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        halves = acc.reshape([BM, 2, BN // 2]).permute([0, 2, 1]).split()
        factor = scale
        if PER_ROW:
            rows = row + tl.arange(0, BM)
            factor = scale * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
        for i in tl.static_range(2):
            y = halves[i] * factor
            if ADD:
                y += out.load([row, column + i * BN // 2]).to(tl.float32)
            out.store([row, column + i * BN // 2], y.to(tl.bfloat16))


# --- Entry of a block: U-Net skip, mix with the embedding, RMSNorm ------------------------------------------

NORM_EPS = 1.1920929e-7  # float32 epsilon, whatever the dtype of the activations


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without weight, float32 out (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS)


class Skip(NamedTuple):
    """A U-Net skip on its way into the decoder."""

    x: Tensor  # (T, d), what an encoder visit left
    weight: Tensor  # (d,)
    gate: Tensor | None  # (d,)


def merge_skip(x: Tensor, skip: Skip | None) -> Tensor:
    """Blend a U-Net skip into the stream by its gate, per channel; add it where there is no gate."""
    if skip is None:
        return x
    if skip.gate is None:
        return x + skip.weight * skip.x
    gate = torch.sigmoid(skip.gate)
    return gate * x + (1 - gate) * (skip.weight * skip.x)


def mix_norm(x: Tensor, x0: Tensor, skip: Skip | None, mix: Tensor, scale: Tensor, gate_channels: int,
             reader: Matrix | None = None,
             keep_stream: bool = False) -> tuple[Tensor, Activation, Tensor, Tensor]:
    """Entry of a block: mixed = mix_0 * merge_skip(x, skip) + mix_1 * x0; u = scale * RMSNorm(mixed).

    x, x0 (T, d); mix (2, d); scale (), without gradient; reader: the matrix that reads u. Returns the mixed
    stream, or with keep_stream the merged one before the mix; u with its leading gate_channels as gate_input;
    and x and x0 again: the backward kernel adds up the gradients of their later uses.
    """
    if not fusible(x, x.size(1)):
        return reference_mix_norm(x, x0, skip, mix, scale, gate_channels, reader, keep_stream)
    skip_x, weight, gate = skip if skip is not None else (None, None, None)
    stream, u, gate_input, u_fp8, entry, x0 = MixNorm.apply(
        x, x0, skip_x, weight, gate, mix, scale, gate_channels, keep_stream, reader)
    u = with_fp8(u, u_fp8, norm_unit(x.size(1)), gate_input)
    return entry if stream is None else stream, u, entry, x0


def reference_mix_norm(x, x0, skip, mix, scale, gate_channels, reader=None, keep_stream=False):
    merged = merge_skip(x, skip)
    if keep_stream:
        merged = merged.to(x0.dtype)
    mixed = (mix[0] * merged + mix[1] * x0).to(x0.dtype)
    u = (scale * norm(mixed)).to(x0.dtype)
    return merged if keep_stream else mixed, as_activation(u, reader, u[:, :gate_channels]), x, x0


@jit
def inverse_rms(x, WIDTH: tl.constexpr):
    """1 / rms of the last dimension, which is kept with size 1."""
    return tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / WIDTH + 1.1920929e-7)


@jit
def norm_gradient(x, g, WIDTH: tl.constexpr):
    """Gradient at x (R, WIDTH) of rms-normalized x, g being the gradient at the result."""
    r = inverse_rms(x, WIDTH)
    return r * (g - x * (r * r * tl.sum(x * g, 1, keep_dims=True) / WIDTH))


@jit
def blend(x, skip, weight, gate, SKIP: tl.constexpr):
    """A U-Net skip in the stream: 0 none, 1 added, 2 blended by a gate."""
    if SKIP == 2:
        x = gate * x + (1.0 - gate) * (weight * skip)
    elif SKIP == 1:
        x = x + weight * skip
    return x


@jit
def mix_vectors(mix, weight, gate, column, D: tl.constexpr, SKIP: tl.constexpr):
    """Both rows of mix, a skip's weight and how far its gate is open; (1, D) each."""
    w = 0.0
    gated = 0.0
    if SKIP:
        w = tl.load(weight + column)
    if SKIP == 2:
        gated = tl.sigmoid(tl.load(gate + column))
    return tl.load(mix + column), tl.load(mix + D + column), w, gated


@row_kernel(rows=4, warps=4, per_multiprocessor=5)
def mix_norm_forward_kernel(x, x0, skip, weight, gate, mix, scale, streamed, u, gate_input, u_fp8, T,
                            D: tl.constexpr, SKIP: tl.constexpr, KEEP_STREAM: tl.constexpr,
                            CHANNELS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    # The result is not called stream, a word that Triton's launcher keeps for itself.
    column = tl.arange(0, D)[None, :]
    mix0, mix1, w, gated = mix_vectors(mix, weight, gate, column, D, SKIP)
    scale = tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at = row * D + column
        inside = row < T
        merged = read(x, at, inside)
        start = read(x0, at, inside)
        if SKIP:
            merged = blend(merged, read(skip, at, inside), w, gated, SKIP)
        if KEEP_STREAM:
            merged = rounded(merged, u)
        mixed = rounded(mix0 * merged + mix1 * start, u)
        if not KEEP_STREAM:
            write(streamed, at, mixed, inside)
        elif SKIP:  # else the stream is as it was
            write(streamed, at, merged, inside)
        normal = scale * (inverse_rms(mixed, D) * mixed)
        write_fp8(u_fp8, at, normal, UNIT, inside)
        write(u, at, normal, inside)
        write(gate_input, row * CHANNELS + column, normal, inside & (column < CHANNELS))


@row_kernel(rows=8, warps=8, per_multiprocessor=1, stages=3)
def mix_norm_backward_kernel(dstream, du, dgate_input, dx_later, dx0_later, x, x0, skip, weight, gate, mix,
                             scale, dx, dx0, dskip, dweight, dgate, dmix, T, D: tl.constexpr,
                             SKIP: tl.constexpr, KEEP_STREAM: tl.constexpr, CHANNELS: tl.constexpr,
                             ROWS: tl.constexpr, STAGES: tl.constexpr):
    """dx_later and dx0_later: gradients from later uses of x and x0."""
    column = tl.arange(0, D)[None, :]
    mix0, mix1, w, gated = mix_vectors(mix, weight, gate, column, D, SKIP)
    scale = tl.load(scale)
    dmix0 = tl.zeros([ROWS, D], tl.float32)
    dmix1 = dmix0
    dw = dmix0
    dgated = dmix0
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at = row * D + column
        inside = row < T
        g = read(du, at, inside)
        before = read(x, at, inside)
        start = read(x0, at, inside)
        merged = before
        other = before
        if SKIP:
            other = read(skip, at, inside)
            merged = blend(before, other, w, gated, SKIP)
        if KEEP_STREAM:
            merged = rounded(merged, x0)
        if dgate_input is not None:
            g += read(dgate_input, row * CHANNELS + column, inside & (column < CHANNELS))
        g = norm_gradient(rounded(mix0 * merged + mix1 * start, x0), scale * g, D)
        if dstream is not None and not KEEP_STREAM:
            g += read(dstream, at, inside)
        dmix0 += g * merged
        dmix1 += g * start
        total = mix1 * g
        if dx0_later is not None:
            total += read(dx0_later, at, inside)
        write(dx0, at, total, inside)
        g = mix0 * g
        if dstream is not None and KEEP_STREAM:
            g += read(dstream, at, inside)
        total = g
        if SKIP == 2:
            dgated += g * (before - w * other)
            total = gated * g
            g = (1.0 - gated) * g
        if SKIP:
            dw += g * other
            write(dskip, at, w * g, inside)
        if dx_later is not None:
            total += read(dx_later, at, inside)
        write(dx, at, total, inside)
    at = tl.program_id(0) * D + tl.arange(0, D)
    dmix += tl.program_id(0) * D
    tl.store(dmix + at, tl.sum(dmix0, 0))
    tl.store(dmix + D + at, tl.sum(dmix1, 0))
    if SKIP:
        tl.store(dweight + at, tl.sum(dw, 0))
    if SKIP == 2:
        slope = tl.sigmoid(tl.load(gate + tl.arange(0, D)))
        tl.store(dgate + at, slope * (1.0 - slope) * tl.sum(dgated, 0))


class MixNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x0, skip, weight, gate, mix, scale, gate_channels, keep_stream, reader):
        ctx.save_for_backward(x, x0, skip, weight, gate, mix, scale)
        ctx.set_materialize_grads(False)
        ctx.kind = dict(D=x.size(1), SKIP=(skip is not None) + (gate is not None), KEEP_STREAM=keep_stream,
                        CHANNELS=gate_channels)
        stream = None if keep_stream and skip is None else torch.empty_like(x)
        u = torch.empty_like(x)
        gate_input = x.new_empty(len(x), gate_channels)
        u_fp8 = empty_fp8(u, reader)
        mix_norm_forward_kernel(
            rows_of=x, x=x, x0=x0, skip=skip, weight=weight, gate=gate, mix=mix, scale=scale, streamed=stream,
            u=u, gate_input=gate_input, u_fp8=u_fp8, UNIT=norm_unit(x.size(1)), **ctx.kind)
        frozen = [same for same, trained in zip((x, x0), ctx.needs_input_grad) if not trained]
        ctx.mark_non_differentiable(*frozen, *([] if u_fp8 is None else [u_fp8]))
        return stream, u, gate_input, u_fp8, x, x0

    @staticmethod
    def backward(ctx, *gradients):  # None where none comes; something always reaches u
        x, x0, skip, weight, gate, mix, scale = ctx.saved_tensors
        gradients = [None if g is None else g.contiguous() for g in gradients]
        dstream, du, dgate_input, _, dx_later, dx0_later = gradients
        dx = torch.empty_like(x)
        dx0 = torch.empty_like(x)
        dskip = None if skip is None else torch.empty_like(x)
        partial = mix_norm_backward_kernel.partial_sums(x, weight, gate, mix)
        dweight, dgate, dmix = partial
        mix_norm_backward_kernel(
            rows_of=x, dstream=dstream, du=du, dgate_input=dgate_input, dx_later=dx_later,
            dx0_later=dx0_later, x=x, x0=x0, skip=skip, weight=weight, gate=gate, mix=mix, scale=scale, dx=dx,
            dx0=dx0, dskip=dskip, dweight=dweight, dgate=dgate, dmix=dmix, **ctx.kind)
        return dx, dx0, dskip, *summed(partial, ctx.needs_input_grad[3:6]), None, None, None, None


# --- Queries, keys and values of the fused product ----------------------------------------------------------


class Heads(NamedTuple):
    """What attention reads."""

    q: Tensor  # (T, heads, D)
    k: Tensor  # (T, kv_heads * copies, D)
    v: Tensor  # (T, kv_heads * copies, D)
    own_value: Tensor | None = None  # (T, kv_heads, D): the values once more, for xsa_gate
    copies: int = 1  # how often every key and value head comes, in a row


def rotary_tables(positions: Tensor, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles in float32, (T, 1, dims / 2) each."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the leading `dims` of x (T, heads, D) in pairs i, i + dims / 2."""
    cos, sin = rope
    a, b, rest = x.split([cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def prepare_heads(qkv: Product | Tensor, rope: tuple[Tensor, Tensor], gain: Tensor, heads: int, kv_heads: int,
                  may_copy: bool = True) -> Heads:
    """q = gain * rotate(RMSNorm(q)), k = rotate(RMSNorm(k)) per head.

    qkv (T, (heads + 2 kv_heads) D); gain (heads,). With may_copy, where gradients are wanted on CUDA, every
    key and value head is copied for each query head that shares it: attention's backward pass is faster where
    no two query heads add to the same one. own_value is a strided view of qkv.
    """
    first, weight, product = for_autograd(qkv)
    width = first.size(1) if weight is None else len(weight)
    copies = heads // kv_heads if may_copy and first.is_cuda and first.requires_grad else 1
    if not fusible(first, heads, kv_heads, width // (heads + 2 * kv_heads), rope[0].size(-1)):
        return reference_prepare_heads(qkv, rope, gain, heads, kv_heads, copies)
    return Heads(*PrepareHeads.apply(first, weight, product, *rope, gain, heads, kv_heads, copies), copies)


def reference_prepare_heads(qkv, rope, gain, heads, kv_heads, copies=1):
    qkv = computed(qkv)
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    q = (rotate(norm(q), rope) * gain[:, None]).to(qkv.dtype)
    k = rotate(norm(k), rope).to(qkv.dtype)
    if copies == 1:
        return Heads(q, k, v, v)
    return Heads(q, k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1), v, copies)


@jit
def rope_rotate(x, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """x (ROWS, H, D) rotated; cos and sin from rotary_tile().

    x ^ (a ^ b) swaps the halves a, b of every rotary pair in registers, without shared memory.
    """
    x = tl.reshape(x, (ROWS, H, D // (2 * HALF), 2, HALF))
    bits = x.to(tl.int32, bitcast=True)
    partner = (bits ^ tl.xor_sum(bits, 3, keep_dims=True)).to(tl.float32, bitcast=True)
    return tl.reshape(x * cos + partner * sin, (ROWS, H, D))


@jit
def rotary_tile(cos, sin, row, T, D: tl.constexpr, HALF: tl.constexpr):
    """cos and signed sin (ROWS, 1, D / (2 HALF), 2, HALF) of the tokens row (ROWS,).

    They are 1 and 0 beyond the rotary dimensions; only the table is loaded, which is small.
    """
    token = row[:, None, None, None, None]
    at = token * HALF + tl.arange(0, HALF)[None, None, None, None, :]
    inside = token < T
    c = tl.load(cos + at, mask=inside, other=1.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    rotary = tl.arange(0, D // (2 * HALF))[None, None, :, None, None] == 0
    first = tl.arange(0, 2)[None, None, None, :, None] == 0
    return tl.where(rotary, c, 1.0), tl.where(rotary, tl.where(first, s, -s), 0.0)


@jit
def head_gradient(x, g, gain, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                  HALF: tl.constexpr):
    """Gradients at the raw heads x (ROWS, H, D) and at their gain, (ROWS, H, 1), from g at the result."""
    r = inverse_rms(x, D)
    n = r * x
    g = rope_rotate(g, cos, -sin, ROWS, H, D, HALF)
    dgain = tl.sum(n * g, 2, keep_dims=True)
    return (r * gain) * (g - n * (dgain / D)), dgain


@jit
def largest_of_row(x):
    """The largest absolute value of x (R, H, D) in each row, (R, 1, 1)."""
    return tl.max(tl.max(tl.abs(x), 2, keep_dims=True), 1, keep_dims=True)


@row_kernel(rows=4, warps=4, per_multiprocessor=8)
def prepare_heads_forward_kernel(qkv, cos, sin, gain, q, k, v, T, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                                 COPIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                                 ROWS: tl.constexpr, STAGES: tl.constexpr):
    head = tl.arange(0, HEADS)[None, :, None]
    kv_head = tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        inside = token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        kv_at = at + HEADS * D + kv_head * D + column
        x = read(qkv, at + head * D + column, inside)
        y = read(qkv, kv_at, inside)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        x = rope_rotate(x * (inverse_rms(x, D) * gain), c, s, ROWS, HEADS, D, HALF)
        y = rope_rotate(y * inverse_rms(y, D), c, s, ROWS, KV_HEADS, D, HALF)
        write(q, token * (HEADS * D) + head * D + column, x, inside)
        copy_at = (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            write(k, copy_at + copy * D, y, inside)
        if COPIES > 1:
            own_value = tl.load(qkv + kv_at + KV_HEADS * D, mask=inside, other=0.0)
            for copy in tl.static_range(COPIES):
                tl.store(v + copy_at + copy * D, own_value, mask=inside)


@row_kernel(rows=4, warps=4, per_multiprocessor=2, stages=3)
def prepare_heads_backward_kernel(dq, dk, dv, dv_own, qkv, cos, sin, gain, dqkv, dqkv_fp8, scales, dgain, T,
                                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COPIES: tl.constexpr,
                                  D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
                                  STAGES: tl.constexpr):
    head = tl.arange(0, HEADS)[None, :, None]
    kv_head = tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    gain_sum = tl.zeros([ROWS, HEADS, 1], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        inside = token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        q_at = at + head * D + column
        k_at = at + HEADS * D + kv_head * D + column
        v_at = k_at + KV_HEADS * D
        x = read(qkv, q_at, inside)
        gx = read(dq, token * (HEADS * D) + head * D + column, inside)
        y = read(qkv, k_at, inside)
        gv = read(dv_own, token * (KV_HEADS * D) + kv_head * D + column, inside)
        gy = tl.zeros_like(gv)
        copy_at = (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            gy += read(dk, copy_at + copy * D, inside)
            gv += read(dv, copy_at + copy * D, inside)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        gx, gain_part = head_gradient(x, gx, gain, c, s, ROWS, HEADS, D, HALF)
        gy, _ = head_gradient(y, gy, 1.0, c, s, ROWS, KV_HEADS, D, HALF)
        gain_sum += gain_part
        write(dqkv, q_at, gx, inside)
        write(dqkv, k_at, gy, inside)
        write(dqkv, v_at, gv, inside)
        if dqkv_fp8 is not None:
            largest = tl.maximum(largest_of_row(gx), tl.maximum(largest_of_row(gy), largest_of_row(gv)))
            scale = row_scale(largest)
            tl.store(scales + token, scale, mask=inside)
            factor = 1.0 / scale
            write(dqkv_fp8, q_at, gx * factor, inside)
            write(dqkv_fp8, k_at, gy * factor, inside)
            write(dqkv_fp8, v_at, gv * factor, inside)
    tl.store(dgain + tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None], tl.sum(gain_sum, 0))


class PrepareHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, weight, product, cos, sin, gain, heads, kv_heads, copies):
        qkv, operands = taken(qkv, product)
        ctx.save_for_backward(qkv, cos, sin, gain, *operands)
        D = qkv.size(1) // (heads + 2 * kv_heads)
        ctx.kind = dict(HEADS=heads, KV_HEADS=kv_heads, COPIES=copies, D=D, HALF=cos.size(-1))
        q = qkv.new_empty(len(qkv), heads, D)
        k = qkv.new_empty(len(qkv), kv_heads * copies, D)
        own_value = qkv[:, -kv_heads * D:].unflatten(1, (kv_heads, D))
        v = torch.empty_like(k) if copies > 1 else None
        prepare_heads_forward_kernel(rows_of=qkv, qkv=qkv, cos=cos, sin=sin, gain=gain, q=q, k=k, v=v,
                                     **ctx.kind)
        if v is None:
            v = own_value.view_as(own_value)  # two outputs, so that each has its gradient
        return q, k, v, own_value

    @staticmethod
    def backward(ctx, *gradients):
        qkv, cos, sin, gain, *operands = ctx.saved_tensors
        dq, dk, dv, dv_own = (g.contiguous() for g in gradients)
        dqkv = torch.empty_like(qkv)
        fp8 = fp8_room(operands, qkv)
        partial = prepare_heads_backward_kernel.partial_sums(qkv, gain)
        prepare_heads_backward_kernel(
            rows_of=qkv, dq=dq, dk=dk, dv=dv, dv_own=dv_own, qkv=qkv, cos=cos, sin=sin, gain=gain, dqkv=dqkv,
            dqkv_fp8=fp8.values, scales=fp8.scale, dgain=partial[0], **ctx.kind)
        dx, dw = product_gradients(operands, dqkv, fp8)
        return dx, dw, None, None, None, *summed(partial, ctx.needs_input_grad[5:6]), None, None, None


# --- Attention ----------------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """What attends to what in a packed row of T tokens: each token to its own segment up to itself."""

    cu_seqlens: Tensor  # (segments + 1,) int32, 0 .. T
    positions: Tensor  # (T,) int32, distance from the start of the segment
    max_seqlen: int  # upper bound on a segment's length
    previous: Tensor | None = None  # (T,) the token before each, -1 if none; None: its left neighbour
    keys_cu_seqlens: Tensor | None = None  # (segments + 1,) int32, if keys of a past come before a segment's
    keys_max_seqlen: int = 0

    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens of queries and keys, the longest of each."""
        if self.keys_cu_seqlens is None:
            return self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen
        return self.cu_seqlens, self.keys_cu_seqlens, self.max_seqlen, self.keys_max_seqlen


def attention(heads: Heads, segments: Segments, kernel: str) -> Tensor:
    """Causal attention inside each segment and to its past, like q (T, heads, D).

    Query heads are dealt to key/value heads in order: heads / kv_heads neighbours share one. Scores are
    scaled by 1/sqrt(D). kernel: as attention_kernel() returns it, for bf16 on CUDA.
    """
    q, k, v, *_ = heads
    if not q.is_cuda or kernel == "reference":
        return reference_attention(q, k, v, segments)
    if kernel == "fa4" and segments.keys_cu_seqlens is None:  # for a past PyTorch's kernel is the faster one
        return FlashAttention4.apply(q, k, v, segments.cu_seqlens, segments.max_seqlen, heads.copies)
    return torch.ops.aten._flash_attention_forward(q, k, v, *segments.bounds(), 0.0, True, False)[0]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same, segment by segment."""
    group = q.size(1) // k.size(1)
    of_queries, of_keys, *_ = segments.bounds()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    whole = (q, of_queries), (k, of_keys), (v, of_keys)
    pieces = (x.transpose(0, 1)[None].split(cu.diff().tolist(), dim=2) for x, cu in whole)
    outputs = []
    for q, k, v in zip(*pieces):  # (1, heads, length, D)
        mask = None
        if segments.keys_cu_seqlens is not None:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
            mask = mask.tril(k.size(2) - q.size(2))
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


class WithPast(torch.autograd.Function):
    """The K keys or values that segments see: their own (T, kv_heads, D), each behind its past.

    ring (slots, room, kv_heads, D) keeps them, at the places (K,) among slots * room, own_places (T,) of
    which are the segments' own: there `own` is stored first. Gradients reach it.
    """

    @staticmethod
    def forward(ctx, own, ring, places, own_places):
        ctx.save_for_backward(own_places)
        ring = ring.flatten(0, 1)
        ring.index_copy_(0, places[own_places], own)
        return ring.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient):
        own_places, = ctx.saved_tensors
        return gradient.index_select(0, own_places), None, None, None


FLASH_ATTENTION_4 = "flash_attn.cute.interface"
ATTENTION_KERNELS = ("fa4", "torch", "reference")  # the fastest first


@functools.cache
def attention_kernel(wanted: str, *shape) -> tuple[str, str]:
    """The kernel that ATTENTION stands for here, why no faster one; KernelError if the named one fails."""
    first = 2
    if torch.cuda.is_available():
        first = 0 if torch.cuda.get_device_capability()[0] == 9 else 1  # FlashAttention 4 is for Hopper
    reasons = []
    for kernel in ATTENTION_KERNELS[first:] if wanted == "auto" else [wanted]:
        try:
            if kernel != "reference":
                try_attention(kernel, *shape)
            return kernel, "; ".join(reasons)
        except Exception as error:  # kernels fail in many ways where they do not fit
            reasons.append(f"{kernel} does not load ({type(error).__name__}: {error})".splitlines()[0])
    raise KernelError(f"ATTENTION: {reasons[0]}; install requirements-cuda.txt for fa4, or choose auto")


def try_attention(kernel: str, *shape) -> None:
    """Raises whatever the kernel raises here, forward and backward, on one segment of the longest length."""
    longest, heads, kv_heads, head_dim = shape
    if kernel == "fa4":
        warnings.filterwarnings("ignore", "Argument aux_data")  # at its first calls, about what is None
    q = torch.zeros(longest, heads, head_dim, device="cuda").bfloat16().requires_grad_()
    segments = Segments(q.new_tensor([0, longest], dtype=torch.int32), None, longest)
    out = attention(Heads(q, q, q, copies=heads // kv_heads), segments, kernel)
    out.backward(out)
    torch.cuda.synchronize()


class FlashAttention4(torch.autograd.Function):
    """Dao et al. 2026. Of keys and values that come in copies, the forward pass reads one."""

    @staticmethod
    def forward(ctx, q, k, v, cu, longest, copies):
        ctx.bounds = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        forward = importlib.import_module(FLASH_ATTENTION_4)._flash_attn_fwd
        once = slice(None, None, copies)
        out, lse = forward(q, k[:, once], v[:, once], **ctx.bounds, causal=True, return_lse=True)[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        backward = importlib.import_module(FLASH_ATTENTION_4)._flash_attn_bwd
        gradients = backward(q, k, v, out, dout.contiguous(), lse, q.size(-1) ** -0.5, True, **ctx.bounds)
        return *gradients[:3], None, None, None


# --- Exclusive self-attention and the heads' gates ----------------------------------------------------------


def exclude_own_value(y: Tensor, v: Tensor, alpha: Tensor | None) -> Tensor:
    """XSA: take from each head's output y (T, heads, D) its component along the token's own value.

    v (T, kv_heads, D); with alpha (heads,) only tanh(alpha) of the component is taken.
    """
    direction = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, None]  # (T, kv_heads, 1, D)
    grouped = y.float().unflatten(1, (v.size(1), -1))  # (T, kv_heads, group, D)
    component = (grouped * direction).sum(-1, keepdim=True)
    if alpha is not None:
        component = component * torch.tanh(alpha).view(v.size(1), -1, 1)
    return (grouped - component * direction).flatten(1, 2).to(y.dtype)


def xsa_gate(y: Tensor, own_value: Tensor | None, gate_input: Tensor | None, gate: Tensor | None,
             alpha: Tensor | None, scale: float, reader: Matrix | None = None) -> Activation:
    """Head h of exclude_own_value(y, own_value, alpha), times sigmoid(scale * gate_h . gate_input_t).

    y (T, heads, D); own_value (T, kv_heads, D), None: nothing is taken away; alpha (heads,); gate (heads, w),
    None: no factor; gate_input (T, w); reader: the matrix that reads the result (T, heads D).
    """
    if own_value is None or not fusible(y, *y.shape[1:], own_value.size(1)):
        return reference_xsa_gate(y, own_value, gate_input, gate, alpha, scale, reader)
    z, z_fp8 = XSAGate.apply(y, own_value, gate_input, gate, alpha, scale, reader)
    return with_fp8(z, z_fp8, GATED_UNIT)


def reference_xsa_gate(y, own_value, gate_input, gate, alpha, scale, reader=None):
    if own_value is not None:
        y = exclude_own_value(y, own_value, alpha)
    if gate is not None:
        scores = F.linear(gate_input, gate.to(gate_input.dtype)).float()
        y = (y * torch.sigmoid(scale * scores)[..., None]).to(y.dtype)
    z = y.flatten(1)
    z_fp8 = (z.detach() / GATED_UNIT).clamp(-448, 448).to(FP8) if wants_fp8(reader) else None
    return with_fp8(z, z_fp8, GATED_UNIT)


@jit
def gate_vectors(alpha, gate, gate_input, head, i, ALPHA: tl.constexpr, GATE: tl.constexpr,
                 CHANNELS: tl.constexpr):
    """The share of the component that is taken, and the gate's weights, rounded as a product rounds them."""
    share = 1.0
    w = 0.0
    if ALPHA:
        share = 2.0 * tl.sigmoid(2.0 * tl.load(alpha + head)) - 1.0
    if GATE:
        w = rounded(tl.load(gate + head * CHANNELS + i, mask=i < CHANNELS, other=0.0), gate_input)
    return share, w


@jit
def unit(v):
    """v (..., D) over its length, the inverse length, and whether that is not clamped."""
    length = tl.sqrt(tl.sum(v * v, -1, keep_dims=True))
    inverse = 1.0 / tl.maximum(length, 1e-12)
    return v * inverse, inverse, length > 1e-12


# Tiles are (KV_HEADS, ROWS, GROUP, D): so the compiler gives a warp whole tokens, and no sum crosses warps.


@row_kernel(rows=1, warps=1, per_multiprocessor=32, strided="v")
def xsa_gate_forward_kernel(y, v, gate_input, gate, alpha, z, gates, z_fp8, T, v_stride, scale,
                            GATE: tl.constexpr, ALPHA: tl.constexpr, KV_HEADS: tl.constexpr,
                            GROUP: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
                            PADDED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    kv_head = tl.arange(0, KV_HEADS)[:, None, None, None]
    head = kv_head * GROUP + tl.arange(0, GROUP)[None, None, :, None]
    column = tl.arange(0, D)[None, None, None, :]
    i = tl.arange(0, PADDED)[None, None, None, :]
    share, w = gate_vectors(alpha, gate, gate_input, head, i, ALPHA, GATE, CHANNELS)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at = token * (KV_HEADS * GROUP * D) + head * D + column
        inside = token < T
        out = read(y, at, inside)
        direction, _, _ = unit(read(v, token * v_stride + kv_head * D + column, inside))
        out -= share * tl.sum(out * direction, 3, keep_dims=True) * direction
        if GATE:
            u = read(gate_input, token * CHANNELS + i, inside & (i < CHANNELS))
            opened = tl.sigmoid(scale * tl.sum(u * w, 3, keep_dims=True))
            tl.store(gates + token * (KV_HEADS * GROUP) + head, opened, mask=inside)
            out *= opened
        write(z, at, out, inside)
        write_fp8(z_fp8, at, out, UNIT, inside)


@row_kernel(rows=1, warps=1, per_multiprocessor=16, strided="v")
def xsa_gate_backward_kernel(dz, y, v, gate_input, gate, alpha, gates, dy, dv, dgate_input, dgate, dalpha, T,
                             v_stride, scale, GATE: tl.constexpr, ALPHA: tl.constexpr, KV_HEADS: tl.constexpr,
                             GROUP: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
                             PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    kv_head = tl.arange(0, KV_HEADS)[:, None, None, None]
    head = kv_head * GROUP + tl.arange(0, GROUP)[None, None, :, None]
    column = tl.arange(0, D)[None, None, None, :]
    i = tl.arange(0, PADDED)[None, None, None, :]
    share, w = gate_vectors(alpha, gate, gate_input, head, i, ALPHA, GATE, CHANNELS)
    da = tl.zeros([KV_HEADS, ROWS, GROUP, 1], tl.float32)
    dw = tl.zeros([KV_HEADS, ROWS, GROUP, PADDED], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at = token * (KV_HEADS * GROUP * D) + head * D + column
        inside = token < T
        out = read(y, at, inside)
        g = read(dz, at, inside)
        direction, inverse, free = unit(read(v, token * v_stride + kv_head * D + column, inside))
        component = tl.sum(out * direction, 3, keep_dims=True)
        along = tl.sum(g * direction, 3, keep_dims=True)
        if GATE:
            u = read(gate_input, token * CHANNELS + i, inside & (i < CHANNELS))
            opened = tl.load(gates + token * (KV_HEADS * GROUP) + head, mask=inside, other=0.0)
            dopened = tl.sum(g * out, 3, keep_dims=True) - share * component * along
            dscore = dopened * (scale * opened * (1.0 - opened))
            dw += dscore * u
            du = tl.sum(tl.sum(dscore * w, 2, keep_dims=True), 0, keep_dims=True)
            write(dgate_input, token * CHANNELS + i, du, inside & (i < CHANNELS))
            g *= opened
            along *= opened
        if ALPHA:
            da -= component * along * (1.0 - share * share)
        write(dy, at, g - share * along * direction, inside)
        ddirection = tl.sum(share * component * g + share * along * out, 2, keep_dims=True)  # its negative
        twice = 2.0 * tl.sum(share * component * along, 2, keep_dims=True)
        dvalue = inverse * (tl.where(free, twice, 0.0) * direction - ddirection)
        write(dv, token * (KV_HEADS * D) + kv_head * D + column, dvalue, inside)
    head += tl.program_id(0) * (KV_HEADS * GROUP)
    if GATE:
        tl.store(dgate + head * CHANNELS + i, tl.sum(dw, 1, keep_dims=True), mask=i < CHANNELS)
    if ALPHA:
        tl.store(dalpha + head, tl.sum(da, 1, keep_dims=True))


class XSAGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, v, gate_input, gate, alpha, scale, reader):
        assert v.stride()[1:] == (v.size(2), 1)
        y = y.contiguous()
        z = torch.empty_like(y).flatten(1)
        z_fp8 = empty_fp8(z, reader)
        gates = None if gate is None else y.new_empty(y.shape[:2], dtype=torch.float32)
        channels = 1 if gate is None else gate_input.size(1)
        ctx.save_for_backward(y, v, gate_input, gate, alpha, gates)
        ctx.set_materialize_grads(False)
        ctx.kind = dict(GATE=gate is not None, ALPHA=alpha is not None, KV_HEADS=v.size(1), D=y.size(2),
                        GROUP=y.size(1) // v.size(1), CHANNELS=channels,
                        PADDED=triton.next_power_of_2(channels), v_stride=v.stride(0), scale=scale)
        xsa_gate_forward_kernel(rows_of=y, y=y, v=v, gate_input=gate_input, gate=gate, alpha=alpha, z=z,
                                gates=gates, z_fp8=z_fp8, UNIT=GATED_UNIT, **ctx.kind)
        if z_fp8 is not None:
            ctx.mark_non_differentiable(z_fp8)
        return z, z_fp8

    @staticmethod
    def backward(ctx, dz, _):
        y, v, gate_input, gate, alpha, gates = ctx.saved_tensors
        dy = torch.empty_like(y)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        dgate_input = None if gate is None else torch.empty_like(gate_input)
        partial = xsa_gate_backward_kernel.partial_sums(y, gate, alpha)
        dgate, dalpha = partial
        xsa_gate_backward_kernel(
            rows_of=y, dz=dz.contiguous(), y=y, v=v, gate_input=gate_input, gate=gate, alpha=alpha,
            gates=gates, dy=dy, dv=dv, dgate_input=dgate_input, dgate=dgate, dalpha=dalpha, **ctx.kind)
        return dy, dv, dgate_input, *summed(partial, ctx.needs_input_grad[3:5]), None, None


# --- RMSNorm of a sum ---------------------------------------------------------------------------------------


def add_norm(x: Tensor, y: Product | Tensor | None, scale: Tensor,
             reader: Matrix | None = None) -> tuple[Tensor, Activation]:
    """total = x + y; u = scale * RMSNorm(total).

    x and y (T, d), y None: total is x itself; scale (), without gradient; reader: the matrix that reads u.
    The backward pass needs a gradient at u, but not total, which may be written over.
    """
    if not fusible(x, x.size(1)):
        return reference_add_norm(x, y, scale, reader)
    total, u, u_fp8 = AddNorm.apply(x, *for_autograd(y), scale, reader)
    return total, with_fp8(u, u_fp8, norm_unit(x.size(1)))


def reference_add_norm(x, y, scale, reader=None):
    total = x if y is None else x + computed(y)
    return total, as_activation((scale * norm(total)).to(x.dtype), reader)


@row_kernel(rows=4, warps=4, per_multiprocessor=8)
def add_norm_forward_kernel(x, y, scale, total, u, inverse, u_fp8, T, D: tl.constexpr, UNIT: tl.constexpr,
                            ROWS: tl.constexpr, STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    scale = tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at = row * D + column
        inside = row < T
        value = read(x, at, inside)
        if y is not None:
            value = rounded(value + read(y, at, inside), total)
            write(total, at, value, inside)
        r = inverse_rms(value, D)
        normal = scale * r * value
        write_fp8(u_fp8, at, normal, UNIT, inside)
        write(u, at, normal, inside)
        tl.store(inverse + row, r, mask=inside)


@row_kernel(rows=4, warps=4, per_multiprocessor=8)
def add_norm_backward_kernel(dtotal, du, u, scale, inverse, dx, dx_fp8, scales, T, D: tl.constexpr,
                             ROWS: tl.constexpr, STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    scale = tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at = row * D + column
        inside = row < T
        normal = read(u, at, inside) / scale
        g = scale * read(du, at, inside)
        r = tl.load(inverse + row, mask=inside, other=0.0)
        g = r * (g - normal * (tl.sum(normal * g, 1, keep_dims=True) / D))
        if dtotal is not None:
            g += read(dtotal, at, inside)
        write(dx, at, g, inside)
        if dx_fp8 is not None:
            write_fp8_rows(dx_fp8, scales, row, g, T, D)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, product, scale, reader):
        ctx.set_materialize_grads(False)
        ctx.two = y is not None
        y, operands = taken(y, product)
        total = x if y is None else torch.empty_like(x)
        u = torch.empty_like(x)
        u_fp8 = empty_fp8(u, reader)
        inverse = x.new_empty(len(x), dtype=torch.float32)
        add_norm_forward_kernel(rows_of=x, x=x, y=y, scale=scale, total=total, u=u, inverse=inverse,
                                u_fp8=u_fp8, D=x.size(1), UNIT=norm_unit(x.size(1)))
        ctx.save_for_backward(u, scale, inverse, *operands)
        if u_fp8 is not None:
            ctx.mark_non_differentiable(u_fp8)
        return total, u, u_fp8

    @staticmethod
    def backward(ctx, dtotal, du, _):
        u, scale, inverse, *operands = ctx.saved_tensors
        dx = torch.empty_like(u)
        fp8 = fp8_room(operands, u)
        dtotal = None if dtotal is None else dtotal.contiguous()
        add_norm_backward_kernel(rows_of=u, dtotal=dtotal, du=du.contiguous(), u=u, scale=scale,
                                 inverse=inverse, dx=dx, dx_fp8=fp8.values, scales=fp8.scale, D=u.size(1))
        dy, dw = product_gradients(operands, dx, fp8)
        return dx, dy if ctx.two else None, dw, None, None, None


# --- MLP ----------------------------------------------------------------------------------------------------
# On Hopper both products that meet the activation are one kernel, warp-specialised ping-pong (Shah et al.
# 2024): one producer warp loads by TMA; two consumer warpgroups alternate, one runs its epilogue while the
# other issues wgmma.

MLP_TILE = dict(BM=128, BN=128, BK=64, STAGES=4)  # rows, columns, depth of a tile; blocks of w in the ring
MLP_FP8_TILE = MLP_TILE | dict(BK=128, STAGES=6)  # with x and w in 8 bits


def squared_mlp(u: Activation, up: Matrix, down: Matrix, slope: float, x: Tensor | None = None) -> Tensor:
    """leaky_relu_squared(u W_up^T) W_down^T, added to x if given; u and x (T, d), W_up (F, d), W_down (d, F).

    On CUDA the sum is written over x, which nothing else may need then.
    """
    if not mlp_fusible(u.x, len(up.w)):
        y = F.linear(leaky_relu_squared(F.linear(u.x, up.w), slope), down.w)
        return y if x is None else x + y
    return SquaredMLP.apply(u.x, up.w, down.w, x, u, up, down, slope)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope).square()


def mlp_fusible(u: Tensor, hidden: int) -> bool:
    """Whether the kernel runs for u (T, d): bf16 on Hopper, whole tiles that fit into shared memory."""
    if gluon is None or not u.is_cuda or u.dtype != torch.bfloat16:
        return False
    BM, BN, BK, STAGES = MLP_TILE.values()
    d = u.shape[1]
    whole_tiles = d % BK == 0 and hidden % (2 * BN) == 0
    shared_bytes = 2 * (BM * d + STAGES * BK * BN + BM * BN)  # rows of u, blocks of w, parts of results
    fits = shared_bytes <= 226 * 1024  # the rest is for barriers
    return whole_tiles and fits and torch.cuda.get_device_capability(u.device)[0] == 9


def mlp_forward(u: Tensor | E4M3, w_up: Tensor | E4M3, slope: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden = leaky_relu_squared(u W_up^T) (M, F), where that product is negative, hidden in 8 bits or None.

    u (M, d), w_up (F, d). negative (F / 32, M) int32: bit j of word (i, m) stands for column 32 i + j of row
    m. The 8-bit copy, made if the operands are in E4M3, is in HIDDEN_UNIT.
    """
    fp8 = isinstance(u, E4M3)
    like = u.values if fp8 else u
    M, hidden_dim = len(like), len(w_up.values if fp8 else w_up)
    hidden = torch.empty(M, hidden_dim, dtype=torch.bfloat16, device=like.device)
    hidden_fp8 = torch.empty_like(hidden, dtype=FP8) if fp8 else None
    negative = torch.empty(hidden_dim // 32, M, dtype=torch.int32, device=like.device)
    launch_mlp_product(u, w_up, None, hidden, hidden_fp8, negative, slope, HIDDEN_UNIT)
    return hidden, negative, hidden_fp8


def mlp_backward(dy: Tensor | E4M3, w_down: Tensor | E4M3, hidden: Tensor, negative: Tensor,
                 slope: float) -> tuple[Tensor, Tensor | None]:
    """Gradient (M, F) before the activation, and that in E4M3 if the operands are.

    dy (M, d); w_down (d, F), in E4M3 its transpose (F, d), and dy with a scale for each row. The derivative
    of the activation is -2 slope sqrt(hidden) where `negative` is set, elsewhere 2 sqrt(hidden). The 8-bit
    copy is in units of DHIDDEN_UNIT dy.scale w_down.scale.
    """
    dp = torch.empty_like(hidden)
    dp_fp8 = torch.empty_like(hidden, dtype=FP8) if isinstance(dy, E4M3) else None
    launch_mlp_product(dy, w_down, hidden, dp, dp_fp8, negative, slope, DHIDDEN_UNIT)
    return dp, dp_fp8


def launch_mlp_product(x, w, hidden, out, out_fp8, negative, slope, unit):
    """The backward pass's product if it is given `hidden`."""
    fp8 = isinstance(x, E4M3)
    backward = hidden is not None
    x, x_scale = x if fp8 else (x.contiguous(), None)
    w, w_scale = w if fp8 else (w.contiguous(), None)
    tile = MLP_FP8_TILE if fp8 else MLP_TILE
    BM, BN, BK, _ = tile.values()
    M, K = x.shape
    part = [BM, BN // 4]
    mlp_product_kernel[min(triton.cdiv(M, BM), multiprocessors(x.device)),](
        x=descriptor(x, [BM, BK]), w=descriptor(w, [BK, BN] if backward and not fp8 else [BN, BK]),
        hidden=descriptor(hidden, part), out=descriptor(out, part), out_fp8=descriptor(out_fp8, part),
        negative=negative, M=M, slope=slope, x_scale=x_scale, w_scale=w_scale, UNIT=unit if fp8 else None,
        BACKWARD=backward, N=out.size(1), K=K, **tile, num_warps=4)


def descriptor(x: Tensor | None, block: list[int]):
    """How TMA finds blocks of x."""
    if x is None:
        return None
    kind = gl.float8e4nv if x.dtype == FP8 else gl.bfloat16
    return GluonDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kind))


gluon_jit = functools.partial(gluon.jit, do_not_specialize=["M"], do_not_specialize_on_alignment=[
    "x_scale", "w_scale"]) if gluon else lambda function: function
# The second names are those up to Triton 3.7.
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)
tma_store = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)


@gluon_jit
def barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """Each one's phase flips at every COUNT-th arrival. To wait for parity 0 is to wait for an odd flip."""
    made = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon_jit
def load_block(source, place, full, block):
    """Begin to copy the block at place = [row, column] to shared memory; `full` flips when it is there."""
    mbarrier.expect(full, source.block_type.nbytes)
    tma_load(source, place, full, block)


@gluon_jit
def producer(x, w, rings, M, ACROSS: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
             BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """Loads per row of tiles the blocks of x, per tile those of w, each as soon as its place is free."""
    xs, x_full, x_free, ws, w_full, w_free = rings
    step = 0
    tile_row = 0
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        for column in range(0, N, BN):
            for k in range(K // BK):
                if column == 0:
                    mbarrier.wait(x_free.index(k), tile_row & 1 ^ 1)
                    load_block(x, [row, k * BK], x_full.index(k), xs.index(k))
                stage = step % STAGES
                mbarrier.wait(w_free.index(stage), step // STAGES & 1 ^ 1)
                place = [k * BK, column] if ACROSS else [column, k * BK]
                load_block(w, place, w_full.index(stage), ws.index(stage))
                step += 1
        tile_row += 1


@gluon_jit
def multiply(rings, step, tile_row, last, done, ACROSS: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
             BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """A tile (BM, BN) of the product. A block is released once the next product runs.

    `step` counts blocks of w, `tile_row` rows of tiles; `last`: x is needed no more; `done` flips when the
    other group may begin.
    """
    xs, x_full, x_free, ws, w_full, w_free = rings
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth  # of one instruction
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, DEPTH])
    acc = hopper.warpgroup_mma_init(gl.zeros([BM, BN], gl.float32, LAYOUT))
    for k in range(K // BK):
        stage = (step + k) % STAGES
        before = gl.maximum(k - 1, 0)
        mbarrier.wait(x_full.index(k), tile_row & 1)
        mbarrier.wait(w_full.index(stage), (step + k) // STAGES & 1)
        right = ws.index(stage) if ACROSS else ws.index(stage).permute((1, 0))
        acc = hopper.warpgroup_mma(xs.index(k), right, acc, use_acc=k > 0, is_async=True)
        acc = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(w_free.index((step + before) % STAGES), count=1, pred=k > 0)
        mbarrier.arrive(x_free.index(before), count=1, pred=last & (k > 0))
    mbarrier.arrive(done, count=1)
    product = hopper.warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(w_free.index((step + K // BK - 1) % STAGES), count=1)
    mbarrier.arrive(x_free.index(K // BK - 1), count=1, pred=last)
    return product


@gluon_jit
def halves(x, R: gl.constexpr, C: gl.constexpr):
    """The left and the right half of x (R, C)."""
    return x.reshape([R, 2, C // 2]).permute([0, 2, 1]).split()


@gluon_jit
def consumer_group(GROUP: gl.constexpr, begin, done, parts, parts_full, fp8_parts, rings, hidden, out,
                   out_fp8, negative, M, slope, x_scale, w_scale, UNIT: gl.constexpr, BACKWARD: gl.constexpr,
                   N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                   STAGES: gl.constexpr):
    """Group 0 or 1 computes every other tile of a row.

    A tile leaves in four parts through the two buffers `parts`, by which `hidden` arrives too (then
    parts_full flips), and in 8 bits through fp8_parts. The group may multiply once `begin` flips and lets the
    other one do so by `done`.
    """
    IN_FP8: gl.constexpr = UNIT is not None
    ACROSS: gl.constexpr = BACKWARD and not IN_FP8
    C: gl.constexpr = BN // 4
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    bit = gl.expand_dims(1 << gl.arange(0, C, gl.SliceLayout(0, PART)), 0)
    scale = 1.0
    if IN_FP8:
        scale = gl.load(w_scale)
        if not BACKWARD:
            scale *= gl.load(x_scale)
    count = 0  # of tiles
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        rows = row + gl.arange(0, BM, gl.SliceLayout(1, PART))
        inside = rows < M
        for column in range(GROUP * BN, N, 2 * BN):
            words = negative + (column // C).to(gl.int64) * M + rows
            if BACKWARD:
                tma.store_wait(0)
                for i in gl.static_range(2):
                    load_block(hidden, [row, column + i * C], parts_full.index(i), parts.index(i))
                signs = (gl.load(words, mask=inside), gl.load(words + M, mask=inside),
                         gl.load(words + 2 * M, mask=inside), gl.load(words + 3 * M, mask=inside))
                if IN_FP8:
                    factor = gl.expand_dims(scale * gl.load(x_scale + rows, mask=inside, other=0.0), 1)
            # Not before the other group had its blocks of w: a parity tells only a turn from the next.
            mbarrier.wait(begin, count + 1 - GROUP & 1)
            acc = multiply(rings, (2 * count + GROUP) * (K // BK), count // (N // BN // 2),
                           column >= N - 2 * BN, done, ACROSS, K, BM, BN, BK, STAGES)
            left, right = halves(acc, BM, BN)
            quarters = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
            for i in gl.static_range(4):
                value = gl.convert_layout(quarters[i], PART)
                buffer = parts.index(i % 2)
                if BACKWARD:
                    mbarrier.wait(parts_full.index(i % 2), i // 2)
                    positive = (gl.expand_dims(signs[i], 1) & bit) == 0
                    value *= gl.sqrt(buffer.load(PART).to(gl.float32)) * gl.where(positive, 2.0, -2.0 * slope)
                    if IN_FP8:
                        fp8_parts.index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                        value *= factor
                else:
                    if IN_FP8:
                        value *= scale
                    gl.store(words + i * M, gl.sum(gl.where(value < 0, bit, 0), 1), mask=inside)
                    value = gl.where(value < 0, slope * value, value)
                    value *= value
                    tma.store_wait(2 if IN_FP8 else 1)
                    if IN_FP8:
                        fp8_parts.index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                buffer.store(value.to(gl.bfloat16))
                hopper.fence_async_shared()
                tma_store(out, [row, column + i * C], buffer)
                if IN_FP8:
                    tma_store(out_fp8, [row, column + i * C], fp8_parts.index(i % 2))
                if BACKWARD and i == 1:
                    for j in gl.static_range(2):
                        tma.store_wait((1 - j) * (1 + IN_FP8))
                        load_block(hidden, [row, column + (2 + j) * C], parts_full.index(j), parts.index(j))
            count += 1
    tma.store_wait(0)


@gluon_jit
def part_buffers(out):
    """Two buffers for parts of tiles on their way out."""
    return gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)


@gluon_jit
def mlp_product_kernel(x, w, hidden, out, out_fp8, negative, M, slope, x_scale, w_scale, UNIT: gl.constexpr,
                       BACKWARD: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
                       BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """A row of tiles at a time: its rows of x stay in shared memory, and w passes through a ring.

    A barrier that nothing waits for must not be made: its place would be given to other data, and where a
    kernel is interrupted, because another process has its turn, the barrier is restored there.
    """
    xs = gl.allocate_shared_memory(x.dtype, [K // BK, BM, BK], x.layout)
    IN_FP8: gl.constexpr = UNIT is not None
    ACROSS: gl.constexpr = BACKWARD and not IN_FP8
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BK, BN] if ACROSS else [STAGES, BN, BK], w.layout)
    rings = (xs, barriers(K // BK, 1), barriers(K // BK, 2), ws, barriers(STAGES, 1), barriers(STAGES, 1))
    turns = barriers(2, 1)
    parts0 = part_buffers(out)
    parts1 = part_buffers(out)
    full0 = barriers(2, 1) if BACKWARD else turns  # what is not used must still be something
    full1 = barriers(2, 1) if BACKWARD else turns
    fp8_parts0 = part_buffers(out_fp8) if IN_FP8 else parts0
    fp8_parts1 = part_buffers(out_fp8) if IN_FP8 else parts1
    hopper.fence_async_shared()
    gl.warp_specialize([
        (consumer_group, (0, turns.index(0), turns.index(1), parts0, full0, fp8_parts0, rings, hidden,
                          out, out_fp8, negative, M, slope, x_scale, w_scale, UNIT, BACKWARD, N, K, BM, BN,
                          BK, STAGES)),
        (consumer_group, (1, turns.index(1), turns.index(0), parts1, full1, fp8_parts1, rings, hidden,
                          out, out_fp8, negative, M, slope, x_scale, w_scale, UNIT, BACKWARD, N, K, BM, BN,
                          BK, STAGES)),
        (producer, (x, w, rings, M, ACROSS, N, K, BM, BN, BK, STAGES)),
    ], [4, 1], [232, 40])  # warps and registers of the second group and of the producer


class SquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u_x, w_up, w_down, x, u, up, down, slope):
        if up.fp8 is None:
            hidden, negative, _ = mlp_forward(u_x, w_up, slope)
            out = F.linear(hidden, w_down) if x is None else x.addmm_(hidden, w_down.T)
        else:
            hidden, negative, hidden_fp8 = mlp_forward(u.fp8, up.fp8, slope)
            hidden_fp8 = E4M3(hidden_fp8, constant(HIDDEN_UNIT, u_x.device))
            room = torch.empty_like(u_x) if x is None else x
            out = fp8_product(hidden_fp8, down.fp8, room, add=x is not None)
        fp8_t = *(up.fp8_t or NO_FP8), *(down.fp8_t or NO_FP8)
        ctx.save_for_backward(u_x, w_up, w_down, hidden, negative, *fp8_t)
        ctx.slope = slope
        ctx.added = x is not None
        if ctx.added:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    def backward(ctx, dy):
        u, w_up, w_down, hidden, negative, *fp8_t = ctx.saved_tensors
        up_t = E4M3(*fp8_t[:2])
        down_t = E4M3(*fp8_t[2:])
        fp8 = up_t.values is not None
        dy = dy.contiguous()
        dy_read, w_read = (fp8_rows(dy), down_t) if fp8 else (dy, w_down)
        dp, dp_fp8 = mlp_backward(dy_read, w_read, hidden, negative, ctx.slope)
        dw_down = dy.T @ hidden  # before du, which is needed next and then still in the cache
        dw_up = dp.T @ u
        if fp8:
            dp_fp8 = E4M3(dp_fp8, dy_read.scale)
            du = fp8_product(dp_fp8, up_t, torch.empty_like(u), unit=DHIDDEN_UNIT, unit_scale=down_t.scale)
        else:
            du = dp @ w_up
        return du, dw_up, dw_down, dy if ctx.added else None, None, None, None, None


# --- Losses of target and hints -----------------------------------------------------------------------------


def two_value_nll(scores: Product | Tensor, cap_pos: Tensor | float, cap_neg: Tensor | float, targets: Tensor,
                  hints: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-log p(target) (T,) and log p(hint) (T, K), float32, of raw logits `scores` (T, V) under the soft caps.

    Logits become c tanh(x / c), c = cap_pos where x >= 0, cap_neg elsewhere (0-dim float32 tensors or
    numbers). Gradients reach scores and caps, through the first result alone. On CUDA the backward pass
    writes the gradient over `scores`, which nothing else may need then. hints None: the targets.
    """
    hints = targets[:, None] if hints is None else hints
    first, weight, product = for_autograd(scores)
    if not fusible(first):
        return reference_two_value_nll(scores, cap_pos, cap_neg, targets, hints)
    return TwoValueNLL.apply(first, weight, product, cap_pos, cap_neg, targets, hints)


def reference_two_value_nll(scores, cap_pos, cap_neg, targets, hints):
    scores = computed(scores)
    cap_pos, cap_neg = (torch.as_tensor(cap, dtype=torch.float32) for cap in (cap_pos, cap_neg))
    caps = torch.where(scores >= 0, cap_pos, cap_neg)
    logs = (caps * torch.tanh(scores.float() / caps)).log_softmax(-1)
    return -logs.gather(1, targets[:, None])[:, 0], logs.gather(1, hints).detach()


@jit
def soft_cap(x, cap_pos, cap_neg):
    """tanh(x / c), a quarter of its derivative by x / c, and in units of ln 2: 2 x / c and c; float32."""
    z = x * tl.where(x >= 0, 2.8853900817779268 / cap_pos, 2.8853900817779268 / cap_neg)
    root = tl.rsqrt(1.0 + tl.exp2(z))  # its square takes fewer instructions than a division
    r = root * root
    cap = tl.where(x >= 0, cap_pos * 1.4426950408889634, cap_neg * 1.4426950408889634)
    return 1.0 - 2.0 * r, r - r * r, z, cap


@jit
def nll_forward_kernel(scores, stride, cap_pos, cap_neg, targets, hints, nll, log_q, lse, V: tl.constexpr,
                       BLOCK: tl.constexpr, HINTS: tl.constexpr, PLACES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scores += row * stride
    cap_pos, cap_neg = tl.load(cap_pos), tl.load(cap_neg)
    target = tl.load(scores + tl.load(targets + row))
    place = tl.arange(0, PLACES)  # a power of two
    hint = tl.load(scores + tl.load(hints + row * HINTS + place, place < HINTS, 0))
    t, _, _, cap = soft_cap(read(scores, at, at < V), cap_pos, cap_neg)
    logit = tl.where(at < V, t * cap, float("-inf"))
    top = tl.max(logit, 0)
    top += tl.log2(tl.sum(tl.exp2(logit - top), 0))
    t, _, _, cap = soft_cap(target.to(tl.float32), cap_pos, cap_neg)
    tl.store(nll + row, (top - t * cap) * 0.6931471805599453)
    t, _, _, cap = soft_cap(hint.to(tl.float32), cap_pos, cap_neg)
    tl.store(log_q + row * HINTS + place, (t * cap - top) * 0.6931471805599453, place < HINTS)
    tl.store(lse + row, top)


@jit
def nll_backward_kernel(scores, stride, cap_pos, cap_neg, targets, lse, dnll, dcaps, scores_fp8, scales, M,
                        V: tl.constexpr, BLOCK: tl.constexpr, CAPS: tl.constexpr):
    """M is V / 8, but unknown to the compiler: could it store more than 8 numbers of 8 bits at once, threads
    would hold other numbers than for the store in bf16, and all would be computed twice."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scores += row * stride
    cap_pos, cap_neg = tl.load(cap_pos), tl.load(cap_neg)
    x = read(scores, at, at < V)
    dnll = tl.load(dnll + row)
    target = tl.load(targets + row).to(tl.int32)
    t, slope, z, cap = soft_cap(x, cap_pos, cap_neg)
    g = tl.exp2(t * cap - tl.load(lse + row)) - tl.where(at == target, 1.0, 0.0)
    dscore = 4.0 * dnll * (g * slope)
    write(scores, at, dscore, at < V)
    if CAPS:
        g = tl.where(at < V, g * (t - 1.3862943611198906 * z * slope), 0.0)  # gradient of its cap, by dnll
        positive = tl.sum(tl.where(x >= 0, g, 0.0), 0)
        tl.store(dcaps + row * 2, dnll * positive)
        tl.store(dcaps + row * 2 + 1, dnll * (tl.sum(g, 0) - positive))
    if scores_fp8 is not None:
        scale = row_scale(tl.max(tl.where(at < V, tl.abs(dscore), 0.0), 0))
        tl.store(scales + row, scale)
        write(scores_fp8 + row * M * 8, at, dscore * (1.0 / scale), at < V)


class TwoValueNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, weight, product, cap_pos, cap_neg, targets, hints):
        scores, operands = taken(scores, product)
        if scores.stride(1) != 1:
            scores = scores.contiguous()
        targets = targets.contiguous()
        hints = hints.contiguous()
        caps = [cap_pos, cap_neg]
        caps = [cap if isinstance(cap, Tensor) else constant(cap, scores.device) for cap in caps]
        nll, log_q, lse = (scores.new_empty(x.shape, dtype=torch.float32) for x in (targets, hints, targets))
        ctx.row = dict(V=scores.size(1), BLOCK=triton.next_power_of_2(scores.size(1)))  # a row in registers
        ctx.warps = min(16, max(2, ctx.row["BLOCK"] // 4096))
        nll_forward_kernel[len(scores),](
            scores=scores, stride=scores.stride(0), cap_pos=caps[0], cap_neg=caps[1], targets=targets,
            hints=hints, nll=nll, log_q=log_q, lse=lse, HINTS=hints.size(1),
            PLACES=triton.next_power_of_2(hints.size(1)), **ctx.row, num_warps=2 * ctx.warps)
        ctx.save_for_backward(scores, *caps, targets, lse, *operands)
        ctx.mark_non_differentiable(log_q)
        return nll, log_q

    @staticmethod
    def backward(ctx, dnll, _):
        scores, cap_pos, cap_neg, targets, lse, *operands = ctx.saved_tensors
        trained_caps = any(ctx.needs_input_grad[3:5])
        dcaps = lse.new_empty(len(scores), 2) if trained_caps else None
        fp8 = fp8_room(operands, scores)
        nll_backward_kernel[len(scores),](
            scores=scores, stride=scores.stride(0), cap_pos=cap_pos, cap_neg=cap_neg, targets=targets,
            lse=lse, dnll=dnll.contiguous(), dcaps=dcaps, scores_fp8=fp8.values, scales=fp8.scale,
            M=scores.size(1) // 8, CAPS=trained_caps, **ctx.row, num_warps=min(32, 4 * ctx.warps))
        dcap_pos, dcap_neg = dcaps.sum(0) if trained_caps else (None, None)
        dx, dw = product_gradients(operands, scores, fp8)
        return dx, dw, None, dcap_pos, dcap_neg, None, None


class FullProduct(torch.autograd.Function):
    """x W^T of bf16 matrices x (T, d) and W (V, d), which is a constant, with a float32 result."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight, = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


# --- AdamW per slot -----------------------------------------------------------------------------------------


def adamw_rows(p: Tensor, work: Tensor, square: Tensor, slots: Tensor, on: Tensor, grad: Tensor,
               count: Tensor, rate: Tensor, decay: float, beta2: float) -> None:
    """One AdamW step without a first moment, in place, on the rows slots[s] of p (N, n) where on[s].

    p and square are float32; work receives p in the dtype of the products; slots (S,) int64, all different;
    grad (S, n); count (S,) float32: the row's steps including this one; rate (S,) float32.
    """
    if not fusible(p):
        return reference_adamw_rows(p, work, square, slots, on, grad, count, rate, decay, beta2)
    n = p.size(1)
    adamw_kernel[triton.cdiv(n, 1024), len(slots)](
        p, work, square, slots, on.float(), grad.contiguous(), 1 - beta2 ** count, rate, n, float(decay),
        float(beta2), BLOCK=1024, num_warps=4)


def reference_adamw_rows(p, work, square, slots, on, grad, count, rate, decay, beta2):
    slots = slots[on]
    count = count[on, None]
    rate = rate[on, None]
    g = grad[on].float()
    squares = beta2 * square[slots] + (1 - beta2) * g * g
    root = (squares / (1 - beta2 ** count)).sqrt() + 1e-10
    new = p[slots] * (1 - rate * decay) - rate * g / root
    square[slots] = squares
    p[slots] = new
    work[slots] = new.to(work.dtype)


@jit
def adamw_kernel(p, work, square, slots, on, grad, debias, rates, n, decay, beta2, BLOCK: tl.constexpr):
    s, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(on + s) == 0:
        return
    row, inside = tl.load(slots + s) * n + at, at < n
    g = tl.load(grad + s * n + at, mask=inside, other=0.0).to(tl.float32)
    squares = beta2 * tl.load(square + row, mask=inside, other=0.0) + (1 - beta2) * g * g
    tl.store(square + row, squares, mask=inside)
    rate = tl.load(rates + s)
    x = tl.load(p + row, mask=inside, other=0.0) * (1 - rate * decay)
    x -= rate * g / (tl.sqrt(squares / tl.load(debias + s)) + 1e-10)
    tl.store(p + row, x, mask=inside)
    tl.store(work + row, x.to(work.dtype.element_ty), mask=inside)


# --- A product per slot -------------------------------------------------------------------------------------


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y (T, N) with y[t] = x[t] @ w[s] where ends[s - 1] <= t < ends[s].

    x (T, K), w (S, K, N), ends (S,) int32. On CUDA bf16, K and N multiples of 8, S < 1024.
    """
    return GroupedProduct.apply(x, w, ends) if x.is_cuda else reference_grouped_product(x, w, ends)


def reference_grouped_product(x, w, ends):
    return torch.cat([x[a:b] @ matrix for (a, b), matrix in zip(itertools.pairwise([0, *ends.tolist()]), w)])


class GroupedProduct(torch.autograd.Function):
    """PyTorch's own derivative of grouped_mm passes expanded gradients on to a kernel that refuses them."""

    @staticmethod
    def forward(ctx, x, w, ends):
        x = x.contiguous()
        ctx.save_for_backward(x, w, ends)
        return F.grouped_mm(x, w, offs=ends)

    @staticmethod
    def backward(ctx, dy):
        x, w, ends = ctx.saved_tensors
        dy = dy.contiguous()
        dx = F.grouped_mm(dy, w.transpose(1, 2), offs=ends) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:  # in the layout of w
            dw = (F.grouped_mm(x.t(), dy, offs=ends) if w.stride(2) == 1
                  else F.grouped_mm(dy.t(), x, offs=ends).transpose(1, 2))
        return dx, dw, None
