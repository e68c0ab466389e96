"""Fused operations of train_gpt.py, each beside its plain formula.

Every operation comes in the same order: the public function with its formula and shapes, the plain reference, the kernels, the
autograd function. On the CPU, and where a width does not fit, the reference runs.
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
except ImportError:  # nor has every Triton this language, in which the order of loads, products and stores is written out
    gluon = gl = tma = None

class KernelError(Exception):
    """A kernel that was asked for does not run on this machine: the message names the setting and the remedy."""


class Segments(NamedTuple):
    """What attends to what in a packed row of T tokens: token t sees the tokens of its own segment up to itself."""

    cu_seqlens: Tensor  # (segments + 1,) int32, 0 .. T
    positions: Tensor  # (T,) int32, distance from the start of the segment
    max_seqlen: int  # upper bound on a segment's length
    previous: Tensor | None = None  # (T,) the token before each in its document, where that is not the left neighbour


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str, copies: int = 1) -> Tensor:
    """Causal attention inside each segment; q (T, heads, D), k and v (T, kv_heads, D), result like q.

    Query heads are dealt to key/value heads in order: heads / kv_heads neighbours share one. Scores are scaled by
    1/sqrt(D). kernel: one that attention_kernel() returns, in bf16 on CUDA; on the CPU always the reference. Key and value
    heads may come `copies` times in a row; a forward pass that need not read all of them is told so.
    """
    if not q.is_cuda or kernel == "reference":
        return reference_attention(q, k, v, segments)
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    if kernel == "fa4":
        return FlashAttention4.apply(q, k, v, cu, longest, copies)
    return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0]


FLASH_ATTENTION_4 = "flash_attn.cute.interface"


@functools.cache
def attention_kernel(wanted: str) -> str:
    """The kernel that ATTENTION stands for on this machine; KernelError where the one that is asked for is not there."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if wanted == "fa4" or wanted == "auto" and hopper:
        try:
            importlib.import_module(FLASH_ATTENTION_4)
            warnings.filterwarnings("ignore", "Argument aux_data")  # at its first calls, about what is None
            try_flash_attention()
            return "fa4"
        except Exception as error:  # it fails in many ways where it does not fit
            if wanted == "fa4":
                raise KernelError(f"ATTENTION: fa4 does not load ({type(error).__name__}: {error}); install "
                                  "requirements-cuda.txt, or choose auto or torch") from None
    return "torch" if wanted == "auto" else wanted


def try_flash_attention() -> None:
    """Raises whatever FlashAttention 4 raises on this machine."""
    q = torch.zeros(128, 8, 64, dtype=torch.bfloat16, device="cuda")
    segments = Segments(torch.tensor([0, 128], dtype=torch.int32, device="cuda"), None, 2048)
    attention(q, q[:, :4], q[:, :4], segments, "fa4")
    torch.cuda.synchronize()


class FlashAttention4(torch.autograd.Function):
    """Dao et al. 2026, over packed segments; the output (T, heads, D)."""

    @staticmethod
    def library():
        return importlib.import_module(FLASH_ATTENTION_4)

    @staticmethod
    def forward(ctx, q, k, v, cu, longest, copies):
        ctx.bounds = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        once, forward = slice(None, None, copies), FlashAttention4.library()._flash_attn_fwd
        out, lse = forward(q, k[:, once], v[:, once], **ctx.bounds, causal=True, return_lse=True)[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        backward = FlashAttention4.library()._flash_attn_bwd
        gradients = backward(q, k, v, out, dout.contiguous(), lse, q.size(-1) ** -0.5, True, **ctx.bounds)
        return *gradients[:3], None, None, None


def reference_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same, segment by segment."""
    group = q.size(1) // k.size(1)
    lengths = segments.cu_seqlens.diff().tolist()
    pieces = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in
                   (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))))  # (1, heads, length, D) each
    outputs = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


# One compilation serves every number of tokens T, of a step of training or of test-time training.
jit = functools.partial(triton.jit, do_not_specialize=["T", "M"]) if triton else lambda function: function


def fusible(x: Tensor, *widths: int) -> bool:
    """Whether the fused kernels run: on CUDA, where all widths are powers of two."""
    return x.is_cuda and all(width & (width - 1) == 0 for width in widths)


# --- Attention with a cache -------------------------------------------------------------------------------------------


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, keys: Tensor, values: Tensor,
                     slots: Tensor, begins: Tensor, window: int) -> Tensor:
    """Attention of packed rows to themselves (causal) and to cached keys and values of their documents' past.

    q (T, heads, D), k and v (T, kv_heads, D), result like q. Row s is tokens cu[s] .. cu[s + 1] - 1; cu (S + 1,) int32,
    longest bounds a row's length. keys, values (slots, room, kv_heads, D) are rings: document position p lies at index
    p % room of slot slots[s]. begins (S,) int64: document position of the row's first token. A row of n tokens sees the
    cached positions from begins[s] + n - window on; room >= window. Scores are scaled by 1/sqrt(D), neighbouring query
    heads share a key/value head. Gradients reach q, k and v.
    """
    function = CachedAttention.apply if q.is_cuda else reference_cached_attention
    return function(q, k, v, cu, longest, keys, values, slots, begins, window)


def reference_cached_attention(q, k, v, cu, longest, keys, values, slots, begins, window):
    """The same, row by row."""
    group, room, outputs = q.size(1) // k.size(1), keys.size(1), []
    for (a, b), slot, begin in zip(itertools.pairwise(cu.tolist()), slots.tolist(), begins.tolist()):
        past = torch.arange(min(begin, max(0, begin + b - a - window)), begin, device=q.device) % room
        row_k, row_v = (torch.cat((cache[slot, past], own[a:b])).repeat_interleave(group, 1).transpose(0, 1)
                        for cache, own in ((keys, k), (values, v)))  # (heads, past + n, D) each
        visible = torch.ones(b - a, row_k.size(1), dtype=torch.bool, device=q.device).tril(len(past))
        outputs.append(F.scaled_dot_product_attention(q[a:b].transpose(0, 1), row_k, row_v, visible).transpose(0, 1))
    return torch.cat(outputs)


@jit
def row_bounds(cu, begins, s, window, room):
    """First token (int64) and length of row s, how many cached positions it sees, ring index of the oldest."""
    start, end = tl.load(cu + s), tl.load(cu + s + 1)
    begin = tl.load(begins + s).to(tl.int32)
    oldest = tl.minimum(tl.maximum(begin + (end - start) - window, 0), begin)
    return start.to(tl.int64), end - start, begin - oldest, oldest % room


@jit
def cached_block(keys, values, base, j, first, count, room, TAIL: tl.constexpr, KV_HEADS: tl.constexpr,
                 D: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values (BLOCK, D) of the cached positions j .. j + BLOCK - 1 after the oldest, and which are seen."""
    past = j + tl.arange(0, BLOCK)
    seen = (past < count) | (not TAIL)  # constant in full blocks: loads and scores then need no mask
    index = first + past
    index = tl.where(index < room, index, index - room)  # count <= room: it wraps at most once
    at = base + index[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    return (tl.load(keys + at, mask=seen[:, None], other=0.0), tl.load(values + at, mask=seen[:, None], other=0.0),
            seen[None, :])


@jit
def softmax_block(q, k, v, visible, scale, top, total, out):
    """One block of keys into the running softmax: maximum and sum (rows,), unnormalized output (rows, D)."""
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), out


@jit
def dq_block(q, dout, k, v, visible, scale, lse, delta, dq):
    """One block of keys into the gradient of the queries (rows, D)."""
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = tl.exp2(scores * scale - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


# Kernels run per (tile, kv head, row). A tile of queries holds BLOCK_M / GROUP tokens times the GROUP query heads that
# share the kv head, so that cached keys are read once for all. lse: log-sum-exp of the scores in base 2. A row's own
# keys come first: every query sees one of them, which makes the running maximum finite. Queries behind the end of a
# row are zeros that nobody reads. Masked loads of the cache give zeros: what was never written may be NaN.


@jit
def attention_forward_kernel(q, k, v, out, lse, cu, keys, values, slots, begins, window, room, scale,
                             KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    head, s = tl.program_id(1), tl.program_id(2)
    start, n, count, first = row_bounds(cu, begins, s, window, room)
    begin = tl.program_id(0) * (BLOCK_M // GROUP)
    if begin >= n:
        return
    d, m, j_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token = begin + m // GROUP
    line = token * (KV_HEADS * GROUP) + m % GROUP  # into (T, heads), from the row's first token and the first head on
    base, own, cached = (start * KV_HEADS + head) * GROUP, (start * KV_HEADS + head) * D, head * D
    cached += tl.load(slots + s).to(tl.int64) * room * (KV_HEADS * D)
    q_m = tl.load(q + base * D + (line[:, None] * D + d), mask=(token < n)[:, None], other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(0, tl.minimum(n, begin + BLOCK_M // GROUP), BLOCK_N):
        at, seen = (j + j_n)[:, None] * (KV_HEADS * D) + d, (j + j_n < n)[:, None]
        k_n = tl.load(k + own + at, mask=seen, other=0.0)
        v_n = tl.load(v + own + at, mask=seen, other=0.0)
        top, total, acc = softmax_block(q_m, k_n, v_n, (j + j_n)[None, :] <= token[:, None], scale, top, total, acc)
    full = count // BLOCK_N * BLOCK_N
    for tail in tl.static_range(2):
        for j in range(full * tail, count if tail else full, BLOCK_N):
            k_n, v_n, seen = cached_block(keys, values, cached, j, first, count, room, tail, KV_HEADS, D, BLOCK_N)
            top, total, acc = softmax_block(q_m, k_n, v_n, seen, scale, top, total, acc)
    tl.store(out + base * D + (line[:, None] * D + d), (acc / total[:, None]).to(out.dtype.element_ty),
             mask=(token < n)[:, None])
    tl.store(lse + base + line, top + tl.log2(total), mask=token < n)


@jit
def attention_dq_kernel(q, k, v, out, dout, lse, delta, dq, cu, keys, values, slots, begins, window, room, scale,
                        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Also writes delta (T, heads), the products of output and its gradient, for the other kernel."""
    head, s = tl.program_id(1), tl.program_id(2)
    start, n, count, first = row_bounds(cu, begins, s, window, room)
    begin = tl.program_id(0) * (BLOCK_M // GROUP)
    if begin >= n:
        return
    d, m, j_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token = begin + m // GROUP
    line = token * (KV_HEADS * GROUP) + m % GROUP
    base, own, cached = (start * KV_HEADS + head) * GROUP, (start * KV_HEADS + head) * D, head * D
    cached += tl.load(slots + s).to(tl.int64) * room * (KV_HEADS * D)
    at_m, inside = base * D + (line[:, None] * D + d), (token < n)[:, None]
    q_m = tl.load(q + at_m, mask=inside, other=0.0)
    dout_m = tl.load(dout + at_m, mask=inside, other=0.0)
    lse_m = tl.load(lse + base + line, mask=token < n, other=0.0)
    delta_m = tl.sum(tl.load(out + at_m, mask=inside, other=0.0).to(tl.float32) * dout_m.to(tl.float32), 1)
    tl.store(delta + base + line, delta_m, mask=token < n)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(0, tl.minimum(n, begin + BLOCK_M // GROUP), BLOCK_N):
        at, seen = (j + j_n)[:, None] * (KV_HEADS * D) + d, (j + j_n < n)[:, None]
        k_n = tl.load(k + own + at, mask=seen, other=0.0)
        v_n = tl.load(v + own + at, mask=seen, other=0.0)
        acc = dq_block(q_m, dout_m, k_n, v_n, (j + j_n)[None, :] <= token[:, None], scale, lse_m, delta_m, acc)
    full = count // BLOCK_N * BLOCK_N
    for tail in tl.static_range(2):
        for j in range(full * tail, count if tail else full, BLOCK_N):
            k_n, v_n, seen = cached_block(keys, values, cached, j, first, count, room, tail, KV_HEADS, D, BLOCK_N)
            acc = dq_block(q_m, dout_m, k_n, v_n, seen, scale, lse_m, delta_m, acc)
    tl.store(dq + at_m, (acc * (scale * 0.6931471805599453)).to(dq.dtype.element_ty), mask=inside)  # scale holds log2 e


@jit
def attention_dkv_kernel(q, k, v, dout, lse, delta, dk, dv, cu, scale,
                         KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradients of a row's own keys and values, from its own later queries. Scores are transposed: (keys, queries)."""
    head, s, begin = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK_N
    start = tl.load(cu + s).to(tl.int64)
    n = tl.load(cu + s + 1) - tl.load(cu + s)
    if begin >= n:
        return
    d, m, token_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    base = (start * KV_HEADS + head) * GROUP
    at_n, inside = (start * KV_HEADS + head) * D + (token_n[:, None] * (KV_HEADS * D) + d), (token_n < n)[:, None]
    k_n = tl.load(k + at_n, mask=inside, other=0.0)
    v_n = tl.load(v + at_n, mask=inside, other=0.0)
    dk_n = tl.zeros((BLOCK_N, D), tl.float32)
    dv_n = tl.zeros((BLOCK_N, D), tl.float32)
    for t in range(begin, n, BLOCK_M // GROUP):
        token = t + m // GROUP
        line = token * (KV_HEADS * GROUP) + m % GROUP
        at_m = base * D + (line[:, None] * D + d)
        q_m = tl.load(q + at_m, mask=(token < n)[:, None], other=0.0)
        dout_m = tl.load(dout + at_m, mask=(token < n)[:, None], other=0.0)
        lse_m = tl.load(lse + base + line, mask=token < n, other=0.0)
        delta_m = tl.load(delta + base + line, mask=token < n, other=0.0)
        scores = tl.dot(k_n, tl.trans(q_m), input_precision="ieee")
        p = tl.exp2(tl.where(token_n[:, None] <= token[None, :], scores, float("-inf")) * scale - lse_m[None, :])
        dv_n = tl.dot(p.to(dout_m.dtype), dout_m, dv_n, input_precision="ieee")
        ds = p * (tl.dot(v_n, tl.trans(dout_m), input_precision="ieee") - delta_m[None, :])
        dk_n = tl.dot(ds.to(q_m.dtype), q_m, dk_n, input_precision="ieee")
    tl.store(dk + at_n, (dk_n * (scale * 0.6931471805599453)).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at_n, dv_n.to(dv.dtype.element_ty), mask=inside)


FORWARD_TILE = dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
DQ_TILE = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
DKV_TILE = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


class CachedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu, longest, keys, values, slots, begins, window):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (_, heads, size), kv_heads, room = q.shape, k.size(1), keys.size(1)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.shape = dict(KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=size)
        ctx.longest = longest
        ctx.scale = size ** -0.5 * 1.4426950408889634  # the kernels use base 2
        # Not among the saved tensors: the rows may be stored before their backward pass, which overwrites nothing seen.
        ctx.past = keys, values, slots, begins, window, room
        tiles = triton.cdiv(longest * ctx.shape["GROUP"], FORWARD_TILE["BLOCK_M"])
        attention_forward_kernel[tiles, kv_heads, len(slots)](
            q, k, v, out, lse, cu, *ctx.past, ctx.scale, **ctx.shape, **FORWARD_TILE)
        ctx.save_for_backward(q, k, v, out, lse, cu)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu = ctx.saved_tensors
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tiles = triton.cdiv(ctx.longest * ctx.shape["GROUP"], DQ_TILE["BLOCK_M"])
        attention_dq_kernel[tiles, k.size(1), len(cu) - 1](
            q, k, v, out, dout, lse, delta, dq, cu, *ctx.past, ctx.scale, **ctx.shape, **DQ_TILE)
        attention_dkv_kernel[triton.cdiv(ctx.longest, DKV_TILE["BLOCK_N"]), k.size(1), len(cu) - 1](
            q, k, v, dout, lse, delta, dk, dv, cu, ctx.scale, **ctx.shape, **DKV_TILE)
        return dq, dk, dv, *[None] * 7


def ring_index(cu: Tensor, slots: Tensor, begins: Tensor, total: int, room: int) -> Tensor:
    """Where each of the `total` packed tokens lies in a cache of (slots * room) places: (T,) int64."""
    tokens = torch.arange(total, dtype=cu.dtype, device=cu.device)
    rows = torch.searchsorted(cu[1:], tokens, right=True)
    return slots[rows] * room + (begins[rows] + tokens - cu[rows]) % room


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """Write k and v (T, kv_heads, D) to the places `index` of keys and values (slots, room, kv_heads, D)."""
    for cache, new in ((keys, k), (values, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, index, new.detach())


# --- Losses of two tokens ---------------------------------------------------------------------------------------------


def two_value_nll(scores: Tensor, cap_pos: Tensor | float, cap_neg: Tensor | float, targets: Tensor,
                  hints: Tensor | None = None, weight: Tensor | None = None,
                  low_args: LowArgs | None = None) -> tuple[Tensor, Tensor]:
    """-log p(target) and log p(hint), (T,) float32 each, of raw logits `scores` (T, V) under the two-sided soft cap.

    Logits become c tanh(x / c), c = cap_pos where x >= 0, cap_neg elsewhere (0-dim float32 tensors or numbers). Gradients
    reach scores and caps, through the first result alone. On CUDA the backward pass writes the gradient over `scores`, which
    nothing else may need then. hints None: the targets. weight (V, d): given are not the scores but the input (T, d) of the
    product that makes them, which runs in E4M3.
    """
    function = TwoValueNLL.apply if fusible(scores) else reference_two_value_nll
    return function(scores, cap_pos, cap_neg, targets, targets if hints is None else hints, weight, low_args)


def reference_two_value_nll(scores, cap_pos, cap_neg, targets, hints, weight=None, low_args=None):
    scores = scores if weight is None else LowProduct.apply(scores, weight, low_args)
    caps = torch.where(scores >= 0, *(torch.as_tensor(cap, dtype=torch.float32) for cap in (cap_pos, cap_neg)))
    logs = (caps * torch.tanh(scores.float() / caps)).log_softmax(-1)
    return -logs.gather(1, targets[:, None])[:, 0], logs.gather(1, hints[:, None])[:, 0].detach()


@jit
def soft_cap(x, cap_pos, cap_neg):
    """tanh(x / c), a quarter of its derivative by x / c, and in units of ln 2: 2 x / c and c; float32, any shape."""
    z = x * tl.where(x >= 0, 2.8853900817779268 / cap_pos, 2.8853900817779268 / cap_neg)
    root = tl.rsqrt(1.0 + tl.exp2(z))  # its square takes fewer instructions than a division
    r = root * root
    return 1.0 - 2.0 * r, r - r * r, z, tl.where(x >= 0, cap_pos * 1.4426950408889634, cap_neg * 1.4426950408889634)


@jit
def nll_forward_kernel(scores, stride, cap_pos, cap_neg, targets, hints, nll, log_q, lse, V: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scores, cap_pos, cap_neg = scores + row * stride, tl.load(cap_pos), tl.load(cap_neg)
    target, hint = tl.load(scores + tl.load(targets + row)), tl.load(scores + tl.load(hints + row))
    t, _, _, cap = soft_cap(tl.load(scores + at, mask=at < V, other=0.0).to(tl.float32), cap_pos, cap_neg)
    logit = tl.where(at < V, t * cap, float("-inf"))
    top = tl.max(logit, 0)
    top += tl.log2(tl.sum(tl.exp2(logit - top), 0))
    t, _, _, cap = soft_cap(target.to(tl.float32), cap_pos, cap_neg)
    tl.store(nll + row, (top - t * cap) * 0.6931471805599453)
    t, _, _, cap = soft_cap(hint.to(tl.float32), cap_pos, cap_neg)
    tl.store(log_q + row, (t * cap - top) * 0.6931471805599453)
    tl.store(lse + row, top)


@jit
def nll_backward_kernel(scores, stride, cap_pos, cap_neg, targets, lse, dnll, dcaps, low, low_scales, M, V: tl.constexpr,
                        BLOCK: tl.constexpr, CAPS: tl.constexpr):
    # M is V / 8 but unknown to the compiler: were more than 8 numbers of 8 bits stored at once, the threads would lie otherwise
    # than for the store in bf16, and all would be computed for both.
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scores, cap_pos, cap_neg = scores + row * stride, tl.load(cap_pos), tl.load(cap_neg)
    x, dnll = tl.load(scores + at, mask=at < V, other=0.0).to(tl.float32), tl.load(dnll + row)
    target = tl.load(targets + row).to(tl.int32)
    t, slope, z, cap = soft_cap(x, cap_pos, cap_neg)
    g = tl.exp2(t * cap - tl.load(lse + row)) - tl.where(at == target, 1.0, 0.0)
    dscore = 4.0 * dnll * (g * slope)
    tl.store(scores + at, dscore.to(scores.dtype.element_ty), mask=at < V)
    if CAPS:
        g = tl.where(at < V, g * (t - 1.3862943611198906 * z * slope), 0.0)  # gradient of its cap, by dnll
        positive = tl.sum(tl.where(x >= 0, g, 0.0), 0)
        tl.store(dcaps + row * 2, dnll * positive)
        tl.store(dcaps + row * 2 + 1, dnll * (tl.sum(g, 0) - positive))
    if low is not None:
        scale = row_scale(tl.max(tl.where(at < V, tl.abs(dscore), 0.0), 0))
        tl.store(low_scales + row, scale)
        tl.store(low + row * M * 8 + at, (dscore * (1.0 / scale)).to(low.dtype.element_ty), mask=at < V)


class TwoValueNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, cap_pos, cap_neg, targets, hints, weight=None, low_args=None):
        product = () if weight is None else (scores, *low_args[3:])
        scores = low_args.product() if product else scores if scores.stride(1) == 1 else scores.contiguous()
        caps = [cap if isinstance(cap, Tensor) else scores.new_full((), cap, dtype=torch.float32)  # a fill: no wait
                for cap in (cap_pos, cap_neg)]
        nll, log_q, lse = (scores.new_empty(len(scores), dtype=torch.float32) for _ in range(3))
        ctx.block = dict(V=scores.size(1), BLOCK=triton.next_power_of_2(scores.size(1)))  # a program has a row in registers
        ctx.warps = min(16, max(2, ctx.block["BLOCK"] // 4096))
        nll_forward_kernel[len(scores),](scores, scores.stride(0), *caps, targets, hints, nll, log_q, lse, **ctx.block,
                                         num_warps=2 * ctx.warps)
        ctx.save_for_backward(scores, *caps, targets, lse, *product)
        ctx.mark_non_differentiable(log_q)
        return nll, log_q

    @staticmethod
    def backward(ctx, dnll, _):
        scores, *caps, targets, lse = ctx.saved_tensors[:5]
        product, trained = ctx.saved_tensors[5:], any(ctx.needs_input_grad[1:3])
        dcaps, rows = lse.new_empty(len(scores), 2) if trained else lse, empty_rows(scores) if product else E4M3(None, None)
        nll_backward_kernel[len(scores),](scores, scores.stride(0), *caps, targets, lse, dnll.contiguous(), dcaps, *rows[:2],
                                          scores.size(1) // 8, CAPS=trained, **ctx.block, num_warps=min(32, 4 * ctx.warps))
        dcaps = dcaps.sum(0) if trained else (None, None)
        if not product:
            return scores, *dcaps, *[None] * 4
        x, w_scale, w_turned = product
        dw = scores.T @ x  # before what is needed next
        return low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(x)), *dcaps, None, None, dw, None


NORM_EPS = 1.1920929e-7  # float32 epsilon, whatever the dtype of the activations


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without weight, float32 out."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS)


def rotary_tables(positions: Tensor, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles in float32, (T, 1, dims / 2) each."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the leading dimensions of x (T, heads, D); pairs are (i, i + dims / 2)."""
    cos, sin = rope
    a, b, rest = x.split([cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


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


def exclude_own_value(y: Tensor, v: Tensor, alpha: Tensor | None) -> Tensor:
    """XSA: take from each head's output y (T, heads, D) its component along the token's own value v (T, kv_heads, D).

    With alpha (heads,) only tanh(alpha) of the component is taken.
    """
    direction = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, None]  # (T, kv_heads, 1, D)
    grouped = y.float().unflatten(1, (v.size(1), -1))  # (T, kv_heads, group, D)
    component = (grouped * direction).sum(-1, keepdim=True)
    if alpha is not None:
        component = component * torch.tanh(alpha).view(v.size(1), -1, 1)
    return (grouped - component * direction).flatten(1, 2).to(y.dtype)


# --- Fused steps of a block -------------------------------------------------------------------------------------------
# Every activation is read once per pass. Sums over tokens for the gradients of vectors are kept by each program over its
# rows, written once and then added up. The bf16 results are rounded where the plain formulas round them.

TILES = {  # rows of a tile, warps of a program, programs per multiprocessor, tiles on their way through shared memory
    "mix_norm_forward": (4, 4, 5, 1), "mix_norm_backward": (8, 8, 1, 3), "qk_prep_forward": (4, 4, 8, 1),
    "qk_prep_backward": (4, 4, 2, 3), "xsa_gate_forward": (1, 1, 32, 1), "xsa_gate_backward": (1, 1, 16, 1),
    "add_norm_forward": (4, 4, 8, 1), "add_norm_backward": (4, 4, 8, 1), "lane_update_forward": (4, 4, 8, 1),
    "lane_update_backward": (4, 4, 4, 1), "low_rows": (4, 4, 8, 1)}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of it."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232_448


def row_tile(name: str, x: Tensor) -> tuple[int, int]:
    """Rows of a tile of the kernel `name` and tiles on their way, as fit in shared memory for rows as wide as x's."""
    rows, _, _, stages = TILES[name]
    fitting = max(1, 4096 // x[0].numel())
    return min(rows, 1 << fitting.bit_length() - 1), stages if shared_memory(x.device) > 160_000 else 1


def row_programs(name: str, x: Tensor) -> int:
    """How many programs the kernel `name` has for the rows of x, whatever their width."""
    return min(-(-len(x) // TILES[name][0]), TILES[name][2] * multiprocessors(x.device))


def partial_sums(name: str, x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """One row of partial gradient for each program of the kernel `name`, for each of these vectors."""
    return [None if v is None else v.new_empty(row_programs(name, x), *v.shape) for v in vectors]


def totals(partial: list[Tensor | None], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The vectors' gradients, where they are needed."""
    return [p.sum(0) if wanted else None for p, wanted in zip(partial, needed)]


def over_rows(kernel, name: str, x: Tensor, *arguments, loose: Tensor | None = None, **constants) -> None:
    """Run `kernel` over as many rows as x has. All tensors but `loose` must be contiguous."""
    assert all(a is loose or a.is_contiguous() for a in arguments if isinstance(a, Tensor)), name
    rows, stages = row_tile(name, x)
    kernel[row_programs(name, x),](*arguments, T=len(x), **constants, ROWS=rows, STAGES=stages, num_warps=TILES[name][1])


@jit
def tile_rows(block, T, ROWS: tl.constexpr):
    """Tiles come from the end: what the product before wrote last is still in the cache, and so will be the beginning."""
    return (tl.cdiv(T, ROWS) - 1 - block) * ROWS + tl.arange(0, ROWS)


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
def rounded(x, like):
    """float32 values as the tensor behind the pointer `like` would keep them."""
    return x.to(like.dtype.element_ty).to(tl.float32)


class E4M3(NamedTuple):
    """A tensor in 8-bit floats with 3 bits of mantissa: about values * scale."""

    values: Tensor  # float8_e4m3fn
    scale: Tensor  # float32, () or one for each row
    turned: Tensor | None = None  # of a matrix the transposed values: 8-bit products want both operands along the sum


def e4m3(matrices: Tensor) -> list[E4M3]:
    """Each of the matrices (n, rows, columns) with a scale of its own, by which its largest entry becomes 448, the largest."""
    scales = matrices.abs().amax((1, 2)).float().clamp(min=1e-12) / 448
    values = (matrices / scales[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return [E4M3(*one) for one in zip(values.unbind(), apart(scales), values.mT.contiguous().unbind())]


def apart(x: Tensor) -> tuple[Tensor, ...]:
    """The numbers of x (n,), each at a multiple of 16 bytes, as cuBLAS wants its scales."""
    return x[:, None].repeat(1, 4)[:, 0].unbind()


def low_products_fit(s, dtype: torch.dtype) -> bool:
    """Whether training's products can run in E4M3 here, for the model that the settings s describe."""
    if not torch.cuda.is_available():
        return False
    x = torch.empty(0, s.model_dim, dtype=dtype, device="cuda")
    fits = s.model_dim % 256 == s.kv_dim % 16 == s.vocab_size % 16 == 0
    return fits and fusible(x, s.model_dim) and mlp_fusible(x, s.mlp_dim)


def low_unit(width: int) -> float:
    """What 1 is for the E4M3 copy of a normalized row of that width: a power of 2 by which no entry gets beyond 448."""
    return 2.0 ** -math.floor(math.log2(448 / math.sqrt(width)))


ATTENDED_UNIT = 0.25  # what 1 is for the E4M3 copy of an attention's output, which ends at 112


@jit
def put_low(low, at, x, UNIT: tl.constexpr, mask):
    """Store x in E4M3, in that unit, where the kernel was given a tensor for it."""
    if low is not None:
        tl.store(low + at, (x / UNIT).to(low.dtype.element_ty), mask=mask)


@jit
def row_scale(largest):
    """By which the largest entry of a row, in size, becomes 448."""
    return tl.maximum(largest, 1e-30) / 448


@jit
def put_low_rows(low, scales, row, D: tl.constexpr, x, T):
    """Store the rows x (R, D) in E4M3, each with the scale by which its largest entry becomes 448; row (R, 1)."""
    scale = row_scale(tl.max(tl.abs(x), 1, keep_dims=True))
    tl.store(scales + row, scale, mask=row < T)
    tl.store(low + row * D + tl.arange(0, D)[None, :], (x * (1.0 / scale)).to(low.dtype.element_ty), mask=row < T)


@jit
def low_rows_kernel(x, low, scales, T, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        here = tl.load(x + row * D + tl.arange(0, D)[None, :], mask=row < T, other=0.0).to(tl.float32)
        put_low_rows(low, scales, row, D, here, T)


def low_rows(x: Tensor) -> E4M3:
    """x (T, d) in E4M3, each row with a scale of its own: a gradient's rows differ, and none has to be remembered for it."""
    if not fusible(x, x.size(1)):
        scales = x.abs().amax(1).float().clamp(min=1e-30) / 448
        return E4M3((x / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
    rows = empty_rows(x)
    over_rows(low_rows_kernel, "low_rows", x, x, *rows[:2], D=x.size(1))
    return rows


def empty_rows(x: Tensor) -> E4M3:
    """Room for what low_rows makes of x."""
    return E4M3(torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32))


class LowArgs(NamedTuple):
    """What a product x W^T, x (T, d) and W (n, d) in bf16, needs besides to run in E4M3, as its gradient at x then does too."""

    x: Tensor
    x_scale: Tensor  # ()
    w: Tensor
    w_scale: Tensor  # ()
    w_turned: Tensor  # (d, n)

    def product(self) -> Tensor:
        return torch._scaled_mm(self.x, self.w.T, self.x_scale, self.w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


class LowProduct(torch.autograd.Function):
    """x W^T in E4M3; the gradient of W is a product in bf16."""

    @staticmethod
    def forward(ctx, x, w, low_args):
        ctx.save_for_backward(x, low_args.w_scale, low_args.w_turned)
        return low_args.product()

    @staticmethod
    def backward(ctx, dy):
        x, w_scale, w_turned = ctx.saved_tensors
        dw = dy.T @ x  # before what is needed next, which then is still in the cache
        return low_product(low_rows(dy.contiguous()), E4M3(w_turned, w_scale), torch.empty_like(x)), dw, None


def mix_norm(x: Tensor, x0: Tensor, skip: Skip | None, mix: Tensor, scale: Tensor, window: int,
             lanes: bool = False, low: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entry of a block on the stream x (T, d): merge a U-Net skip, mix with the embedding x0 (T, d), normalize.

    mix (2, d); scale (), without gradient. Returns the mixed stream, or with `lanes` the merged one before the mix; the
    scaled normalized mix u; u[:, :window], a copy of its own, so that the gates' gradient comes back as (T, window); and
    x and x0 again: what uses these later has its gradient added up in the kernel of the backward pass. low (T, d), if given,
    receives u in E4M3, in units of scale * low_unit(d).
    """
    if not fusible(x, x.size(1)):
        return reference_mix_norm(x, x0, skip, mix, scale, window, lanes, low)
    left, weight, gate = skip if skip is not None else (None, None, None)
    out, u, head, *same = MixNorm.apply(x, x0, left, weight, gate, mix, scale, window, lanes, low)
    x, x0 = (new if old.requires_grad else old for old, new in zip((x, x0), same))
    return x if lanes and skip is None else out, u, head, x, x0


def reference_mix_norm(x, x0, skip, mix, scale, window, lanes, low=None):
    merged = merge_skip(x, skip)
    merged = merged.to(x0.dtype) if lanes else merged
    mixed = (mix[0] * merged + mix[1] * x0).to(x0.dtype)
    normal = norm(mixed)
    if low is not None:
        low.copy_(normal.detach() / low_unit(x.size(1)))
    u = (scale * normal).to(x0.dtype)
    return merged if lanes else mixed, u, u[:, :window], x, x0


@jit
def blend(x, skip, weight, gate, SKIP: tl.constexpr):
    """A U-Net skip in the stream: 0 none, 1 added, 2 blended by a gate."""
    if SKIP == 2:
        x = gate * x + (1.0 - gate) * (weight * skip)
    elif SKIP == 1:
        x = x + weight * skip
    return x


@jit
def mix_norm_forward_kernel(x, x0, skip, weight, gate, mix, scale, out, u, head, low, T, D: tl.constexpr, SKIP: tl.constexpr,
                            LANES: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    keep, add, scale, w, gated = tl.load(mix + column), tl.load(mix + D + column), tl.load(scale), 0.0, 0.0
    if SKIP:
        w = tl.load(weight + column)
    if SKIP == 2:
        gated = tl.sigmoid(tl.load(gate + column))
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        merged = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            merged = blend(merged, tl.load(skip + at, mask=inside, other=0.0).to(tl.float32), w, gated, SKIP)
        if LANES:
            merged = rounded(merged, u)
        mixed = rounded(keep * merged + add * start, u)
        if LANES:
            if SKIP:  # else the lane is as it was
                tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside)
        normal = inverse_rms(mixed, D) * mixed
        put_low(low, at, normal, UNIT, inside)
        normal = (scale * normal).to(u.dtype.element_ty)
        tl.store(u + at, normal, mask=inside)
        if WINDOW:
            tl.store(head + row * WINDOW + column, normal, mask=inside & (column < WINDOW))


@jit
def mix_norm_backward_kernel(dout, du, dhead, more, more0, x, x0, skip, weight, gate, mix, scale, dx, dx0, dskip, dweight,
                             dgate, dmix, T, D: tl.constexpr, SKIP: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
                             ROWS: tl.constexpr, STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    keep, add, scale, w, gated = tl.load(mix + column), tl.load(mix + D + column), tl.load(scale), 0.0, 0.0
    if SKIP:
        w = tl.load(weight + column)
    if SKIP == 2:
        gated = tl.sigmoid(tl.load(gate + column))
    dkeep = tl.zeros([ROWS, D], tl.float32)
    dadd, dw, dgated = dkeep, dkeep, dkeep
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        g = tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
        stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        merged, other = stream, stream
        if SKIP:
            other = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
            merged = blend(stream, other, w, gated, SKIP)
        if LANES:
            merged = rounded(merged, x0)
        if dhead is not None:
            g += tl.load(dhead + row * WINDOW + column, mask=inside & (column < WINDOW), other=0.0).to(tl.float32)
        g = norm_gradient(rounded(keep * merged + add * start, x0), scale * g, D)
        if dout is not None and not LANES:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        dkeep += g * merged
        dadd += g * start
        total = add * g
        if more0 is not None:
            total += tl.load(more0 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx0 + at, total.to(dx0.dtype.element_ty), mask=inside)
        g = keep * g
        if dout is not None and LANES:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        total = g
        if SKIP == 2:
            dgated += g * (stream - w * other)
            total = gated * g
            g = (1.0 - gated) * g
        if SKIP:
            dw += g * other
            tl.store(dskip + at, (w * g).to(dskip.dtype.element_ty), mask=inside)
        if more is not None:
            total += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * D + tl.arange(0, D)
    dmix += tl.program_id(0) * D
    tl.store(dmix + at, tl.sum(dkeep, 0))
    tl.store(dmix + D + at, tl.sum(dadd, 0))
    if SKIP:
        tl.store(dweight + at, tl.sum(dw, 0))
    if SKIP == 2:
        slope = tl.sigmoid(tl.load(gate + tl.arange(0, D)))
        tl.store(dgate + at, slope * (1.0 - slope) * tl.sum(dgated, 0))


class MixNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x0, skip, weight, gate, mix, scale, window, lanes, low=None):
        ctx.save_for_backward(x, x0, skip, weight, gate, mix, scale)
        ctx.set_materialize_grads(False)
        ctx.kind = dict(D=x.size(1), SKIP=(skip is not None) + (gate is not None), LANES=lanes, WINDOW=window)
        out = x.new_empty(0) if lanes and skip is None else torch.empty_like(x)
        u, head = torch.empty_like(x), x.new_empty(len(x), window)
        over_rows(mix_norm_forward_kernel, "mix_norm_forward", x, x, x0, skip, weight, gate, mix, scale, out, u, head,
                  low, UNIT=low_unit(x.size(1)), **ctx.kind)
        return out, u, head, x, x0

    @staticmethod
    def backward(ctx, *gradients):  # at all five, None where nothing comes; something always reaches u
        x, x0, skip, weight, gate, mix, scale = ctx.saved_tensors
        dx, dx0, dskip = (None if like is None else torch.empty_like(x) for like in (x, x0, skip))
        partial = partial_sums("mix_norm_backward", x, weight, gate, mix)
        gradients = (None if g is None else g.contiguous() for g in gradients)
        over_rows(mix_norm_backward_kernel, "mix_norm_backward", x, *gradients, *ctx.saved_tensors, dx, dx0, dskip, *partial,
                  **ctx.kind)
        return dx, dx0, dskip, *totals(partial, ctx.needs_input_grad[3:6]), *[None] * 4


def qk_prep(qkv: Tensor, rope: tuple[Tensor, Tensor], gain: Tensor, heads: int, kv_heads: int, copies: int = 1,
            weight: Tensor | None = None, low_args: LowArgs | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (T, heads, D), keys and values (T, kv_heads copies, D) of the fused product qkv (T, (heads + 2 kv_heads) D).

    Queries and keys are normalized per head and rotated; queries are multiplied by gain (heads,). Every key and value head
    comes `copies` times in a row: the backward pass of attention is faster where no two query heads add to the same one.
    Last the values once more, a strided view (T, kv_heads, D), for what subtracts them: the gradients meet in one kernel.
    weight ((heads + 2 kv_heads) D, d): given is the product's input (T, d) instead, and the product runs in E4M3.
    """
    width = (qkv if weight is None else weight.T).size(1)
    if not fusible(qkv, heads, kv_heads, width // (heads + 2 * kv_heads), rope[0].size(-1)):
        return reference_qk_prep(qkv, rope, gain, heads, kv_heads, copies, weight, low_args)
    return QKPrep.apply(qkv, *rope, gain, heads, kv_heads, copies, weight, low_args)


def reference_qk_prep(qkv, rope, gain, heads, kv_heads, copies=1, weight=None, low_args=None):
    qkv = qkv if weight is None else LowProduct.apply(qkv, weight, low_args)
    q, k, own = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (rotate(norm(k), rope).to(qkv.dtype), own))
    return (rotate(norm(q), rope) * gain[:, None]).to(qkv.dtype), k, v, own


@jit
def turned(x, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """x (ROWS, H, D) rotated; cos and sin from rotary_tile().

    The partner comes from a xor over pairs of halves: an exact exchange between neighbouring lanes, without shared memory.
    """
    x = tl.reshape(x, (ROWS, H, D // (2 * HALF), 2, HALF))
    bits = x.to(tl.int32, bitcast=True)
    partner = (bits ^ tl.xor_sum(bits, 3, keep_dims=True)).to(tl.float32, bitcast=True)
    return tl.reshape(x * cos + partner * sin, (ROWS, H, D))


@jit
def rotary_tile(cos, sin, row, T, D: tl.constexpr, HALF: tl.constexpr):
    """cos and signed sin (ROWS, 1, D / (2 HALF), 2, HALF) of the tokens row (ROWS,), 1 and 0 beyond the rotary dimensions.

    What is loaded is small enough for every thread to load its share, where a whole tile would go through shared memory.
    """
    token = row[:, None, None, None, None]
    at, inside = token * HALF + tl.arange(0, HALF)[None, None, None, None, :], token < T
    c, s = tl.load(cos + at, mask=inside, other=1.0), tl.load(sin + at, mask=inside, other=0.0)
    turns = tl.arange(0, D // (2 * HALF))[None, None, :, None, None] == 0
    first = tl.arange(0, 2)[None, None, None, :, None] == 0
    return tl.where(turns, c, 1.0), tl.where(turns, tl.where(first, s, -s), 0.0)


@jit
def qk_gradient(x, g, gain, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Gradients at the raw heads x (ROWS, H, D) and at their gain, (ROWS, H, 1), from g at the rotated ones."""
    r = inverse_rms(x, D)
    n, g = r * x, turned(g, cos, -sin, ROWS, H, D, HALF)
    dgain = tl.sum(n * g, 2, keep_dims=True)
    return (r * gain) * (g - n * (dgain / D)), dgain


@jit
def heads_largest(x):
    """The largest size of an entry of x (R, H, D) in each row, (R, 1, 1)."""
    return tl.max(tl.max(tl.abs(x), 2, keep_dims=True), 1, keep_dims=True)


@jit
def qk_prep_forward_kernel(qkv, cos, sin, gain, q, k, v, T, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COPIES: tl.constexpr,
                           D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    head, kv_head = tl.arange(0, HEADS)[None, :, None], tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        own, kv_own, inside = head * D + column, kv_head * D + column, token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        x = tl.load(qkv + at + own, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(qkv + at + HEADS * D + kv_own, mask=inside, other=0.0).to(tl.float32)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        x = turned(x * (inverse_rms(x, D) * gain), c, s, ROWS, HEADS, D, HALF)
        y = turned(y * inverse_rms(y, D), c, s, ROWS, KV_HEADS, D, HALF)
        tl.store(q + token * (HEADS * D) + own, x.to(q.dtype.element_ty), mask=inside)
        to = (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            tl.store(k + to + copy * D, y.to(k.dtype.element_ty), mask=inside)
        if COPIES > 1:
            own_value = tl.load(qkv + at + (HEADS + KV_HEADS) * D + kv_own, mask=inside, other=0.0)
            for copy in tl.static_range(COPIES):
                tl.store(v + to + copy * D, own_value, mask=inside)


@jit
def qk_prep_backward_kernel(dq, dk, dv, dv_own, qkv, cos, sin, gain, dqkv, low, low_scales, dgain, T, HEADS: tl.constexpr,
                            KV_HEADS: tl.constexpr, COPIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                            ROWS: tl.constexpr, STAGES: tl.constexpr):
    head, kv_head = tl.arange(0, HEADS)[None, :, None], tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    total = tl.zeros([ROWS, HEADS, 1], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        own, kv_own, inside = head * D + column, kv_head * D + column, token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        at, kv_at = at + own, at + HEADS * D + kv_own
        x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
        gx = tl.load(dq + token * (HEADS * D) + own, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(qkv + kv_at, mask=inside, other=0.0).to(tl.float32)
        gv = tl.load(dv_own + token * (KV_HEADS * D) + kv_own, mask=inside, other=0.0).to(tl.float32)
        gy, kv_from = tl.zeros_like(gv), (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            gy += tl.load(dk + kv_from + copy * D, mask=inside, other=0.0).to(tl.float32)
            gv += tl.load(dv + kv_from + copy * D, mask=inside, other=0.0).to(tl.float32)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        gx, more = qk_gradient(x, gx, gain, c, s, ROWS, HEADS, D, HALF)
        gy, _ = qk_gradient(y, gy, 1.0, c, s, ROWS, KV_HEADS, D, HALF)
        total += more
        tl.store(dqkv + at, gx.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + kv_at, gy.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + kv_at + KV_HEADS * D, gv.to(dqkv.dtype.element_ty), mask=inside)
        if low is not None:
            largest = tl.maximum(heads_largest(gx), tl.maximum(heads_largest(gy), heads_largest(gv)))
            scale = row_scale(largest)
            tl.store(low_scales + token, scale, mask=inside)
            factor = 1.0 / scale
            tl.store(low + at, (gx * factor).to(low.dtype.element_ty), mask=inside)
            tl.store(low + kv_at, (gy * factor).to(low.dtype.element_ty), mask=inside)
            tl.store(low + kv_at + KV_HEADS * D, (gv * factor).to(low.dtype.element_ty), mask=inside)
    tl.store(dgain + tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None], tl.sum(total, 0))


class QKPrep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, gain, heads, kv_heads, copies, weight=None, low_args=None):
        product = () if weight is None else (qkv, *low_args[3:])
        qkv = qkv if weight is None else low_args.product()
        ctx.save_for_backward(qkv, cos, sin, gain, *product)
        D = qkv.size(1) // (heads + 2 * kv_heads)
        ctx.kind = dict(HEADS=heads, KV_HEADS=kv_heads, COPIES=copies, D=D, HALF=cos.size(-1))
        q, k = (qkv.new_empty(len(qkv), n, D) for n in (heads, kv_heads * copies))
        v, own = (qkv[:, -kv_heads * D:].unflatten(1, (kv_heads, D)) for _ in range(2))
        v = torch.empty_like(k) if copies > 1 else v
        over_rows(qk_prep_forward_kernel, "qk_prep_forward", qkv, qkv, cos, sin, gain, q, k, v if copies > 1 else None,
                  **ctx.kind)
        return q, k, v, own

    @staticmethod
    def backward(ctx, *gradients):
        qkv, cos, sin, gain, *product = ctx.saved_tensors
        dqkv, partial = torch.empty_like(qkv), partial_sums("qk_prep_backward", qkv, gain)
        rows = empty_rows(qkv) if product else E4M3(None, None)
        over_rows(qk_prep_backward_kernel, "qk_prep_backward", qkv, *(g.contiguous() for g in gradients), qkv, cos, sin, gain,
                  dqkv, *rows[:2], *partial, **ctx.kind)
        [dgain] = totals(partial, ctx.needs_input_grad[3:4])
        if not product:
            return dqkv, None, None, dgain, *[None] * 5
        x, w_scale, w_turned = product
        dw = dqkv.T @ x  # before what is needed next
        return low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(x)), None, None, dgain, *[None] * 3, dw, None


def xsa_gate(y: Tensor, v: Tensor | None, window: Tensor | None, weight: Tensor | None, alpha: Tensor | None,
             scale: float, low: Tensor | None = None) -> Tensor:
    """Attention output y (T, heads, D) without its component along the own value v (T, kv_heads, D), gated; (T, heads D).

    v None: nothing is taken away; alpha (heads,): only tanh(alpha) of the component is. weight (heads, w) and window (T, w),
    the leading channels of the normalized input: head h is multiplied by sigmoid(scale weight_h . window_t). low (T, heads D),
    if given, receives the result in E4M3, in units of ATTENDED_UNIT.
    """
    if v is None or not fusible(y, *y.shape[1:], v.size(1)):
        return reference_xsa_gate(y, v, window, weight, alpha, scale, low)
    return XSAGate.apply(y, v, window, weight, alpha, scale, low)


def reference_xsa_gate(y, v, window, weight, alpha, scale, low=None):
    if v is not None:
        y = exclude_own_value(y, v, alpha)
    if weight is not None:
        y = (y * torch.sigmoid(scale * F.linear(window, weight.to(window.dtype)).float())[..., None]).to(y.dtype)
    y = y.flatten(1)
    if low is not None:
        low.copy_((y.detach() / ATTENDED_UNIT).clamp(-448, 448))
    return y


@jit
def gate_weights(weight, window, WINDOW: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """(KV_HEADS, 1, GROUP, PADDED), rounded as the product with the gates' inputs `window` rounds them."""
    i = tl.arange(0, PADDED)[None, None, None, :]
    head = tl.arange(0, KV_HEADS)[:, None, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :, None]
    return rounded(tl.load(weight + head * WINDOW + i, mask=i < WINDOW, other=0.0), window)


@jit
def unit(v):
    """v (..., D) over its length, the inverse length, and whether that is not clamped."""
    length = tl.sqrt(tl.sum(v * v, -1, keep_dims=True))
    inverse = 1.0 / tl.maximum(length, 1e-12)
    return v * inverse, inverse, length > 1e-12


# Tiles are (KV_HEADS, ROWS, GROUP, D): so the compiler gives a warp whole tokens, and no sum crosses warps.


@jit
def xsa_gate_forward_kernel(y, v, window, weight, alpha, z, gates, low, T, v_stride, scale, GATE: tl.constexpr,
                            ALPHA: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                            WINDOW: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    kv_head, member = tl.arange(0, KV_HEADS)[:, None, None, None], tl.arange(0, GROUP)[None, None, :, None]
    head, column = kv_head * GROUP + member, tl.arange(0, D)[None, None, None, :]
    i, share, w = tl.arange(0, PADDED)[None, None, None, :], 1.0, 0.0
    if ALPHA:
        share = 2.0 * tl.sigmoid(2.0 * tl.load(alpha + head)) - 1.0
    if GATE:
        w = gate_weights(weight, window, WINDOW, PADDED, KV_HEADS, GROUP)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at, inside = token * (KV_HEADS * GROUP * D) + head * D + column, token < T
        out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_stride + kv_head * D + column, mask=inside, other=0.0).to(tl.float32)
        direction, _, _ = unit(value)
        out -= share * tl.sum(out * direction, 3, keep_dims=True) * direction
        if GATE:
            u = tl.load(window + token * WINDOW + i, mask=inside & (i < WINDOW), other=0.0).to(tl.float32)
            gate = tl.sigmoid(scale * tl.sum(u * w, 3, keep_dims=True))
            tl.store(gates + token * (KV_HEADS * GROUP) + head, gate, mask=inside)
            out *= gate
        tl.store(z + at, out.to(z.dtype.element_ty), mask=inside)
        put_low(low, at, out, UNIT, inside)


@jit
def xsa_gate_backward_kernel(dz, y, v, window, weight, alpha, gates, dy, dv, dwindow, dweight, dalpha, T, v_stride, scale,
                             GATE: tl.constexpr, ALPHA: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                             D: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                             STAGES: tl.constexpr):
    kv_head, member = tl.arange(0, KV_HEADS)[:, None, None, None], tl.arange(0, GROUP)[None, None, :, None]
    head, column = kv_head * GROUP + member, tl.arange(0, D)[None, None, None, :]
    i, share, w = tl.arange(0, PADDED)[None, None, None, :], 1.0, 0.0
    if ALPHA:
        share = 2.0 * tl.sigmoid(2.0 * tl.load(alpha + head)) - 1.0
    if GATE:
        w = gate_weights(weight, window, WINDOW, PADDED, KV_HEADS, GROUP)
    da, dw = tl.zeros([KV_HEADS, ROWS, GROUP, 1], tl.float32), tl.zeros([KV_HEADS, ROWS, GROUP, PADDED], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at, inside = token * (KV_HEADS * GROUP * D) + head * D + column, token < T
        out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_stride + kv_head * D + column, mask=inside, other=0.0).to(tl.float32)
        direction, inverse, free = unit(value)
        component = tl.sum(out * direction, 3, keep_dims=True)
        along = tl.sum(g * direction, 3, keep_dims=True)
        if GATE:
            u = tl.load(window + token * WINDOW + i, mask=inside & (i < WINDOW), other=0.0).to(tl.float32)
            gate = tl.load(gates + token * (KV_HEADS * GROUP) + head, mask=inside, other=0.0)
            dscore = (tl.sum(g * out, 3, keep_dims=True) - share * component * along) * (scale * gate * (1.0 - gate))
            dw += dscore * u
            du = tl.sum(tl.sum(dscore * w, 2, keep_dims=True), 0, keep_dims=True)
            tl.store(dwindow + token * WINDOW + i, du.to(dwindow.dtype.element_ty), mask=inside & (i < WINDOW))
            g *= gate
            along *= gate
        if ALPHA:
            da -= component * along * (1.0 - share * share)
        tl.store(dy + at, (g - share * along * direction).to(dy.dtype.element_ty), mask=inside)
        turn = tl.sum(share * component * g + share * along * out, 2, keep_dims=True)  # less: gradient at the direction
        twice = 2.0 * tl.sum(share * component * along, 2, keep_dims=True)
        turn = inverse * (tl.where(free, twice, 0.0) * direction - turn)
        tl.store(dv + token * (KV_HEADS * D) + kv_head * D + column, turn.to(dv.dtype.element_ty), mask=inside)
    head += tl.program_id(0) * (KV_HEADS * GROUP)
    if GATE:
        tl.store(dweight + head * WINDOW + i, tl.sum(dw, 1, keep_dims=True), mask=i < WINDOW)
    if ALPHA:
        tl.store(dalpha + head, tl.sum(da, 1, keep_dims=True))


class XSAGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, v, window, weight, alpha, scale, low=None):
        assert v.stride()[1:] == (v.size(2), 1)
        y, z = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
        gates = None if weight is None else y.new_empty(y.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(y, v, window, weight, alpha, gates)
        count = 1 if weight is None else window.size(1)
        ctx.scale, ctx.kind = scale, dict(
            GATE=weight is not None, ALPHA=alpha is not None, KV_HEADS=v.size(1), GROUP=y.size(1) // v.size(1), D=y.size(2),
            WINDOW=count, PADDED=triton.next_power_of_2(count), v_stride=v.stride(0), scale=scale)
        over_rows(xsa_gate_forward_kernel, "xsa_gate_forward", y, y, v, window, weight, alpha, z, gates, low, loose=v,
                  UNIT=ATTENDED_UNIT, **ctx.kind)
        return z.flatten(1)

    @staticmethod
    def backward(ctx, dz):
        y, v, window, weight, alpha, gates = ctx.saved_tensors
        dy, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, v))
        dwindow = None if weight is None else torch.empty_like(window)
        partial = partial_sums("xsa_gate_backward", y, weight, alpha)
        over_rows(xsa_gate_backward_kernel, "xsa_gate_backward", y, dz.contiguous(), y, v, window, weight, alpha, gates, dy,
                  dv, dwindow, *partial, loose=v, **ctx.kind)
        return dy, dv, dwindow, *totals(partial, ctx.needs_input_grad[3:5]), None, None


def add_norm(x: Tensor, y: Tensor | None, scale: Tensor, low: Tensor | None = None, weight: Tensor | None = None,
             low_args: LowArgs | None = None) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm times scale (), which gets no gradient; both like x (T, d). y None: x itself and its norm.

    low: see mix_norm. weight (d, n): what is added is y W^T, y (T, n). The backward pass does without x + y, which may be
    written over, but not without a gradient at the norm.
    """
    return (AddNorm.apply if fusible(x, x.size(1)) else reference_add_norm)(x, y, scale, low, weight, low_args)


def reference_add_norm(x, y, scale, low=None, weight=None, low_args=None):
    if weight is not None:
        y = F.linear(y, weight) if low_args is None else LowProduct.apply(y, weight, low_args)
    x = x if y is None else x + y
    normal = norm(x)
    if low is not None:
        low.copy_(normal.detach() / low_unit(x.size(1)))
    return x, (scale * normal).to(x.dtype)


@jit
def add_norm_forward_kernel(x, y, scale, out, u, inverse, low, T, D: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr,
                            ROWS: tl.constexpr, STAGES: tl.constexpr):
    column, factor = tl.arange(0, D)[None, :], tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            total = rounded(total + tl.load(y + at, mask=inside, other=0.0).to(tl.float32), out)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
        r = inverse_rms(total, D)
        put_low(low, at, r * total, UNIT, inside)
        tl.store(u + at, (factor * r * total).to(u.dtype.element_ty), mask=inside)
        tl.store(inverse + row, r, mask=row < T)


@jit
def add_norm_backward_kernel(dout, du, u, scale, inverse, dx, low, low_scales, T, D: tl.constexpr, ROWS: tl.constexpr,
                             STAGES: tl.constexpr):
    column, factor = tl.arange(0, D)[None, :], tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        normal = tl.load(u + at, mask=inside, other=0.0).to(tl.float32) / factor
        g = factor * tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(inverse + row, mask=row < T, other=0.0) * (g - normal * (tl.sum(normal * g, 1, keep_dims=True) / D))
        if dout is not None:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
        if low is not None:
            put_low_rows(low, low_scales, row, D, g, T)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, low=None, weight=None, low_args=None):
        ctx.set_materialize_grads(False)
        ctx.added, factor = y is not None, y if weight is not None else None
        if weight is not None:
            y = F.linear(y, weight) if low_args is None else low_args.product()
        out, u = x if y is None else torch.empty_like(x), torch.empty_like(x)
        inverse = x.new_empty(len(x), dtype=torch.float32)
        over_rows(add_norm_forward_kernel, "add_norm_forward", x, x, y, scale, out, u, inverse, low, D=x.size(1),
                  ADD=y is not None, UNIT=low_unit(x.size(1)))
        ctx.save_for_backward(u, factor, scale, inverse, weight, *((None, None) if low_args is None else low_args[3:]))
        return out, u

    @staticmethod
    def backward(ctx, dout, du):
        u, y, scale, inverse, weight, w_scale, w_turned = ctx.saved_tensors
        dx, rows = torch.empty_like(u), E4M3(None, None) if w_turned is None else empty_rows(u)
        dout = None if dout is None else dout.contiguous()
        over_rows(add_norm_backward_kernel, "add_norm_backward", u, dout, du.contiguous(), u, scale, inverse, dx, *rows[:2],
                  D=u.size(1))
        if weight is not None:
            dw = dx.T @ y  # before what is needed next
            dy = dx @ weight if w_turned is None else low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(y))
            return dx, dy, None, None, dw, None
        return dx, dx if ctx.added else None, *[None] * 4


def lane_update(lane0: Tensor, lane1: Tensor, from_attn: Tensor, from_mlp: Tensor, resid: Tensor,
                post: Tensor) -> tuple[Tensor, Tensor]:
    """Both lanes (T, d) after a two-lane block: lane k becomes resid_k lane_k + post_0k from_attn + post_1k from_mlp.

    resid (2,) and post (2, 2).
    """
    if not fusible(lane0, lane0.size(1)):
        return reference_lane_update(lane0, lane1, from_attn, from_mlp, resid, post)
    return LaneUpdate.apply(lane0, lane1, from_attn, from_mlp, resid, post)


def reference_lane_update(lane0, lane1, from_attn, from_mlp, resid, post):
    return tuple((resid[k] * lane + post[0, k] * from_attn + post[1, k] * from_mlp).to(lane0.dtype)
                 for k, lane in enumerate((lane0, lane1)))


@jit
def lane_update_forward_kernel(lane0, lane1, attn, mlp, resid, post, new0, new1, T, D: tl.constexpr, ROWS: tl.constexpr,
                               STAGES: tl.constexpr):
    r0, r1 = tl.load(resid), tl.load(resid + 1)
    a0, a1, m0, m1 = tl.load(post), tl.load(post + 1), tl.load(post + 2), tl.load(post + 3)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, column = tile_rows(block, T, ROWS)[:, None], tl.arange(0, D)[None, :]
        at, inside = row * D + column, (row < T) & (column < D)
        a = tl.load(attn + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        x = r0 * tl.load(lane0 + at, mask=inside, other=0.0).to(tl.float32) + a0 * a + m0 * m
        tl.store(new0 + at, x.to(new0.dtype.element_ty), mask=inside)
        x = r1 * tl.load(lane1 + at, mask=inside, other=0.0).to(tl.float32) + a1 * a + m1 * m
        tl.store(new1 + at, x.to(new1.dtype.element_ty), mask=inside)


@jit
def lane_update_backward_kernel(dnew0, dnew1, lane0, lane1, attn, mlp, resid, post, dlane0, dlane1, dattn, dmlp, dresid,
                                dpost, T, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    r0, r1 = tl.load(resid), tl.load(resid + 1)
    a0, a1, m0, m1 = tl.load(post), tl.load(post + 1), tl.load(post + 2), tl.load(post + 3)
    s0 = tl.zeros([ROWS], tl.float32)
    s1, s2, s3, s4, s5 = s0, s0, s0, s0, s0
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, column = tile_rows(block, T, ROWS)[:, None], tl.arange(0, D)[None, :]
        at, inside = row * D + column, (row < T) & (column < D)
        g0 = tl.load(dnew0 + at, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(dnew1 + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(attn + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        s0 += tl.sum(g0 * tl.load(lane0 + at, mask=inside, other=0.0).to(tl.float32), 1)
        s1 += tl.sum(g1 * tl.load(lane1 + at, mask=inside, other=0.0).to(tl.float32), 1)
        s2 += tl.sum(g0 * a, 1)
        s3 += tl.sum(g1 * a, 1)
        s4 += tl.sum(g0 * m, 1)
        s5 += tl.sum(g1 * m, 1)
        tl.store(dlane0 + at, (r0 * g0).to(dlane0.dtype.element_ty), mask=inside)
        tl.store(dlane1 + at, (r1 * g1).to(dlane1.dtype.element_ty), mask=inside)
        tl.store(dattn + at, (a0 * g0 + a1 * g1).to(dattn.dtype.element_ty), mask=inside)
        tl.store(dmlp + at, (m0 * g0 + m1 * g1).to(dmlp.dtype.element_ty), mask=inside)
    dresid, dpost = dresid + tl.program_id(0) * 2, dpost + tl.program_id(0) * 4
    tl.store(dresid, tl.sum(s0, 0))
    tl.store(dresid + 1, tl.sum(s1, 0))
    tl.store(dpost, tl.sum(s2, 0))
    tl.store(dpost + 1, tl.sum(s3, 0))
    tl.store(dpost + 2, tl.sum(s4, 0))
    tl.store(dpost + 3, tl.sum(s5, 0))


class LaneUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lane0, lane1, from_attn, from_mlp, resid, post):
        ctx.save_for_backward(lane0, lane1, from_attn, from_mlp, resid, post)
        new = torch.empty_like(lane0), torch.empty_like(lane0)
        over_rows(lane_update_forward_kernel, "lane_update_forward", lane0, lane0, lane1, from_attn, from_mlp, resid, post,
                  *new, D=lane0.size(1))
        return new

    @staticmethod
    def backward(ctx, dnew0, dnew1):
        lane0, *_, resid, post = ctx.saved_tensors
        gradients = [torch.empty_like(lane0) for _ in range(4)]
        partial = partial_sums("lane_update_backward", lane0, resid, post)
        over_rows(lane_update_backward_kernel, "lane_update_backward", lane0, dnew0.contiguous(), dnew1.contiguous(),
                  *ctx.saved_tensors, *gradients, *partial, D=lane0.size(1))
        return *gradients, *totals(partial, ctx.needs_input_grad[4:])


# --- MLP --------------------------------------------------------------------------------------------------------------
# On Hopper both products that meet the activation are one kernel: of the nine warps on a multiprocessor one loads, and two
# groups of four take turns, so that one finishes a tile while the other multiplies.

MLP_TILE = dict(BM=128, BN=128, BK=64, STAGES=4)  # rows, columns and depth of a tile; blocks of w in shared memory
LOW_RING = dict(BK=128, STAGES=6)  # instead, with x and w in 8 bits
LOW_TILE = dict(BM=128, BN=256, BK=128, num_warps=8, num_stages=3)  # of low_product
A_UNIT = 4.0  # what 1 is for the activation in 8 bits, which ends at 1,792
DP_UNIT = 2.0 ** 17  # likewise for the gradient before the activation, in units of the 8-bit product that it comes from


class LowMLP(NamedTuple):
    """What the products of squared_mlp need to run in E4M3, d a multiple of 256."""

    u: E4M3
    w_up: E4M3
    w_down: E4M3
    a_unit: Tensor  # (), A_UNIT
    dp_unit: Tensor  # (), DP_UNIT * w_up.scale * w_down.scale


def squared_mlp(u: Tensor, w_up: Tensor, w_down: Tensor, slope: float, x: Tensor | None = None,
                low: LowMLP | None = None) -> Tensor:
    """leaky_relu_squared(u W_up^T) W_down^T, added to x if given; u and x (T, d), w_up (F, d), w_down (d, F).

    On CUDA the sum is written over x, which nothing else may need then. `low`: where the kernel runs, the products of the
    forward pass and those for the gradients of activation and u multiply 8-bit floats; those for the matrices' do not.
    """
    if not mlp_fusible(u, len(w_up)):
        y = F.linear(leaky_relu_squared(F.linear(u, w_up), slope), w_down)
        return y if x is None else x + y
    return SquaredMLP.apply(u, w_up, w_down, slope, x, low)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope).square()


def mlp_fusible(u: Tensor, hidden: int) -> bool:
    """Whether the kernel runs for u (T, d): on Hopper, if rows of u, blocks of w and parts of results fit into 227 KiB."""
    (_, d), (BM, BN, BK, STAGES) = u.shape, MLP_TILE.values()
    return (gluon is not None and u.is_cuda and u.dtype == torch.bfloat16 and d % BK == hidden % (2 * BN) == 0
            and 2 * (BM * d + STAGES * BK * BN + BM * BN) <= 226 * 1024 and torch.cuda.get_device_capability(u.device)[0] == 9)


gluon_jit = functools.partial(gluon.jit, do_not_specialize=["M"], do_not_specialize_on_alignment=[
    "x_scale", "w_scale"]) if gluon else lambda function: function
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)  # the name up to 3.7
tma_store = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)


@gluon_jit
def barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """Each one's phase flips at every COUNT-th arrival. To wait for parity 0 is to wait for the first flip, the third, ..."""
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
def fetch(x, w, rings, M, ACROSS: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
          BK: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads: per row of tiles the blocks of x, per tile those of w, each as soon as its place is free."""
    xs, x_full, x_free, ws, w_full, w_free = rings
    step, turn = 0, 0
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        for column in range(0, N, BN):
            for k in range(K // BK):
                if column == 0:
                    mbarrier.wait(x_free.index(k), turn & 1 ^ 1)
                    load_block(x, [row, k * BK], x_full.index(k), xs.index(k))
                stage = step % STAGES
                mbarrier.wait(w_free.index(stage), step // STAGES & 1 ^ 1)
                load_block(w, [k * BK, column] if ACROSS else [column, k * BK], w_full.index(stage), ws.index(stage))
                step += 1
        turn += 1


@gluon_jit
def multiply(rings, step, turn, last, done, ACROSS: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             BK: gl.constexpr, STAGES: gl.constexpr):
    """A tile (BM, BN) of the product; `step` counts blocks of w, `turn` rows of tiles, `last`: x is needed no more.

    A block is given back once the next product runs. `done` flips when the other group may begin.
    """
    xs, x_full, x_free, ws, w_full, w_free = rings
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth  # of one instruction
    acc = hopper.warpgroup_mma_init(gl.zeros([BM, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, DEPTH])))
    for k in range(K // BK):
        stage, before = (step + k) % STAGES, gl.maximum(k - 1, 0)
        mbarrier.wait(x_full.index(k), turn & 1)
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
    """The left and the right one of x (R, C)."""
    return x.reshape([R, 2, C // 2]).permute([0, 2, 1]).split()


@gluon_jit
def take_turns(WHICH: gl.constexpr, own, rings, a, out, low, rest, UNIT: gl.constexpr, BACKWARD: gl.constexpr,
               N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """Group WHICH, 0 or 1, makes every other tile of a row. A tile leaves in four parts, and a arrives so, by two buffers."""
    bits, M, slope, x_scale, w_scale = rest
    begin, done, buffers = own[:3]  # then backward a barrier for each buffer, with UNIT the buffers for what leaves in 8 bits
    LOW: gl.constexpr = UNIT is not None
    ACROSS: gl.constexpr = BACKWARD and not LOW
    C: gl.constexpr = BN // 4
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    sign = gl.expand_dims(1 << gl.arange(0, C, gl.SliceLayout(0, PART)), 0)
    scale = 1.0
    if LOW:
        scale = gl.load(w_scale)
        if not BACKWARD:
            scale *= gl.load(x_scale)
    count = 0  # of tiles
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        rows = row + gl.arange(0, BM, gl.SliceLayout(1, PART))
        for column in range(WHICH * BN, N, 2 * BN):
            words, inside = bits + (column // C).to(gl.int64) * M + rows, rows < M
            if BACKWARD:
                tma.store_wait(0)
                for i in gl.static_range(2):
                    load_block(a, [row, column + i * C], own[3].index(i), buffers.index(i))
                kept = (gl.load(words, mask=inside), gl.load(words + M, mask=inside),
                        gl.load(words + 2 * M, mask=inside), gl.load(words + 3 * M, mask=inside))
                if LOW:
                    factor = gl.expand_dims(scale * gl.load(x_scale + rows, mask=inside, other=0.0), 1)
            # Not before the other one has had all its blocks of w: a parity tells but one turn of the ring from the next.
            mbarrier.wait(begin, count + 1 - WHICH & 1)
            acc = multiply(rings, (2 * count + WHICH) * (K // BK), count // (N // BN // 2), column >= N - 2 * BN, done,
                           ACROSS, K, BM, BN, BK, STAGES)
            left, right = halves(acc, BM, BN)
            parts = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
            for i in gl.static_range(4):
                value, buffer = gl.convert_layout(parts[i], PART), buffers.index(i % 2)
                if BACKWARD:
                    mbarrier.wait(own[3].index(i % 2), i // 2)
                    positive = (gl.expand_dims(kept[i], 1) & sign) == 0
                    value *= gl.sqrt(buffer.load(PART).to(gl.float32)) * gl.where(positive, 2.0, -2.0 * slope)
                    if LOW:
                        own[4].index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                        value *= factor
                else:
                    if LOW:
                        value *= scale
                    gl.store(words + i * M, gl.sum(gl.where(value < 0, sign, 0), 1), mask=inside)
                    value = gl.where(value < 0, slope * value, value)
                    value *= value
                    tma.store_wait(2 if LOW else 1)
                    if LOW:
                        own[3].index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                buffer.store(value.to(gl.bfloat16))
                hopper.fence_async_shared()
                tma_store(out, [row, column + i * C], buffer)
                if LOW:
                    tma_store(low, [row, column + i * C], own[3 + BACKWARD].index(i % 2))
                if BACKWARD and i == 1:
                    for j in gl.static_range(2):
                        tma.store_wait((1 - j) * (1 + LOW))
                        load_block(a, [row, column + (2 + j) * C], own[3].index(j), buffers.index(j))
            count += 1
    tma.store_wait(0)


@gluon_jit
def part_buffers(out, low, BACKWARD: gl.constexpr):
    """What a group passes parts of tiles through, see own in take_turns.

    A barrier that nothing waits for must not be made: its place would be given to other data, and where a kernel is
    interrupted, because another process has its turn, the barrier is restored there.
    """
    made = (gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout),)
    if BACKWARD:
        made += (barriers(2, 1),)
    if low is not None:
        made += (gl.allocate_shared_memory(low.dtype, [2] + low.block_type.shape, low.layout),)
    return made


@gluon_jit
def mlp_product_kernel(x, w, a, out, low, bits, M, slope, x_scale, w_scale, UNIT: gl.constexpr, BACKWARD: gl.constexpr,
                       N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                       STAGES: gl.constexpr):
    """See mlp_product. While a row of tiles is made, its rows of x stay in shared memory and w passes through a ring.

    a is read in the backward pass; low, with UNIT, is what leaves once more, in 8 bits.
    """
    xs = gl.allocate_shared_memory(x.dtype, [K // BK, BM, BK], x.layout)
    ACROSS: gl.constexpr = BACKWARD and UNIT is None
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BK, BN] if ACROSS else [STAGES, BN, BK], w.layout)
    rings = (xs, barriers(K // BK, 1), barriers(K // BK, 2), ws, barriers(STAGES, 1), barriers(STAGES, 1))
    go = barriers(2, 1)
    one = (go.index(0), go.index(1)) + part_buffers(out, low, BACKWARD)
    other = (go.index(1), go.index(0)) + part_buffers(out, low, BACKWARD)
    hopper.fence_async_shared()
    rest = bits, M, slope, x_scale, w_scale
    gl.warp_specialize([
        (take_turns, (0, one, rings, a, out, low, rest, UNIT, BACKWARD, N, K, BM, BN, BK, STAGES)),
        (take_turns, (1, other, rings, a, out, low, rest, UNIT, BACKWARD, N, K, BM, BN, BK, STAGES)),
        (fetch, (x, w, rings, M, ACROSS, N, K, BM, BN, BK, STAGES))], [4, 1], [232, 40])  # warps, registers


def mlp_product(x: Tensor | E4M3, w: Tensor | E4M3, a: Tensor, bits: Tensor, slope: float, out: Tensor | None = None,
                low: Tensor | None = None) -> None:
    """Forward: with p = x w^T, x (M, K), w (N, K): fill a = phi(p) (M, N) and bits. Backward: out = (x w) phi'(p), w (K, N).

    bits (N / 32, M) int32: bit j of word (i, m) is set where p[m, 32 i + j] < 0. There phi(p) = (slope p)^2 and phi'(p) is
    -2 slope sqrt(a), elsewhere p^2 and 2 sqrt(a). With x and w in E4M3, backward a scale for each row of x and w^T (N, K) in
    place of w, low (M, N) is filled too: with a / A_UNIT, backward with out / (DP_UNIT x.scale w.scale).
    """
    backward, scales = out is not None, (None, None)
    if low is None:
        x, w, unit, tile = x.contiguous(), w.contiguous(), None, MLP_TILE
    else:
        scales, unit, tile = (x.scale, w.scale), DP_UNIT if backward else A_UNIT, MLP_TILE | LOW_RING
        x, w = x.values, w.values
    (M, K), N, (BM, BN, BK, _) = x.shape, a.size(1), tile.values()
    part, of_w = [BM, BN // 4], [BK, BN] if backward and low is None else [BN, BK]
    operands = [None if operand is None else GluonDescriptor.from_tensor(operand, block, gl.NVMMASharedLayout.get_default_for(
        block, gl.float8e4nv if operand.dtype == torch.float8_e4m3fn else gl.bfloat16)) for operand, block in (
            (x, [BM, BK]), (w, of_w), (a if backward else None, part), (out if backward else a, part), (low, part))]
    mlp_product_kernel[min(triton.cdiv(M, BM), multiprocessors(x.device)),](
        *operands, bits, M, slope, *scales, UNIT=unit, BACKWARD=backward, N=N, K=K, **tile, num_warps=4)


@jit
def low_product_kernel(x, w, out, x_scale, w_scale, M, PER_ROW: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr,
                       K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """See low_product. The tiles beside each other, which share rows of x, are made at the same time."""
    scale = tl.load(w_scale)
    if not PER_ROW:
        scale *= tl.load(x_scale)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * (N // BN), tl.num_programs(0), flatten=True):
        row, column = tile // (N // BN) * BM, tile % (N // BN) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        sides, factor = acc.reshape([BM, 2, BN // 2]).permute([0, 2, 1]).split(), scale
        if PER_ROW:
            rows = row + tl.arange(0, BM)
            factor = scale * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
        for i in tl.static_range(2):
            value = sides[i] * factor
            if ADD:
                value += out.load([row, column + i * BN // 2]).to(tl.float32)
            out.store([row, column + i * BN // 2], value.to(tl.bfloat16))


def low_product(x: E4M3, w: E4M3, out: Tensor, add: bool = False) -> Tensor:
    """out (M, N) = x w^T, added to what it holds if `add`; x (M, K), with a scale for each row or one, and w (N, K)."""
    per_row = x.scale.dim() == 1
    if not fusible(out):
        y = (x.values.float() @ w.values.float().T) * (x.scale[:, None] if per_row else x.scale) * w.scale
        return out.copy_(out + y if add else y)
    (BM, BN, BK, *_), (M, K), N = LOW_TILE.values(), x.values.shape, out.size(1)
    operands = [TensorDescriptor.from_tensor(*pair)
                for pair in ((x.values, [BM, BK]), (w.values, [BN, BK]), (out, [BM, BN // 2]))]
    low_product_kernel[min(triton.cdiv(M, BM) * (N // BN), multiprocessors(out.device)),](
        *operands, x.scale, w.scale, M, PER_ROW=per_row, ADD=add, N=N, K=K, **LOW_TILE)
    return out


class SquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, w_up, w_down, slope, x=None, low=None):
        a = torch.empty(len(u), len(w_up), dtype=u.dtype, device=u.device)
        bits = torch.empty(len(w_up) // 32, len(u), dtype=torch.int32, device=u.device)
        low_a = None if low is None else torch.empty_like(a, dtype=torch.float8_e4m3fn)
        mlp_product(*((u, w_up) if low is None else low[:2]), a, bits, slope, None, low_a)
        kept = () if low is None else (low.w_down.turned, low.w_down.scale, low.w_up.turned, low.dp_unit)
        ctx.save_for_backward(u, w_up, w_down, a, bits, *kept)
        ctx.slope, ctx.added = slope, x is not None
        if ctx.added:
            ctx.mark_dirty(x)
        if low is not None:
            return low_product(E4M3(low_a, low.a_unit), low.w_down, torch.empty_like(u) if x is None else x, ctx.added)
        return F.linear(a, w_down) if x is None else x.addmm_(a, w_down.T)

    @staticmethod
    def backward(ctx, dy):
        u, w_up, w_down, a, bits, *low = ctx.saved_tensors
        dy, dp = dy.contiguous(), torch.empty_like(a)
        if low:
            down_turned, down_scale, up_turned, dp_unit = low
            rows, low_dp = low_rows(dy), torch.empty_like(a, dtype=torch.float8_e4m3fn)
            mlp_product(rows, E4M3(down_turned, down_scale), a, bits, ctx.slope, dp, low_dp)
        else:
            mlp_product(dy, w_down, a, bits, ctx.slope, dp)
        dw_down, dw_up = dy.T @ a, dp.T @ u  # before what is needed next
        if low:
            du = low_product(E4M3(low_dp, rows.scale), E4M3(up_turned, dp_unit), torch.empty_like(u))
        else:
            du = dp @ w_up
        return du, dw_up, dw_down, None, dy if ctx.added else None, None


# --- AdamW per slot ---------------------------------------------------------------------------------------------------


def adamw_rows(p: Tensor, work: Tensor, square: Tensor, slots: Tensor, on: Tensor, grad: Tensor, count: Tensor, rate: Tensor,
               decay: float, beta2: float) -> None:
    """One AdamW step without a first moment, in place, on the rows slots[s] (S,) int64, all different, of p (N, n) where on[s].

    p and square are float32; work receives p in the dtype of the products; grad (S, n); count (S,) float32: the row's steps
    including this one; rate (S,) float32: its learning rate.
    """
    function = triton_adamw_rows if p.is_cuda else reference_adamw_rows
    function(p, work, square, slots, on, grad, count, rate, decay, beta2)


def reference_adamw_rows(p, work, square, slots, on, grad, count, rate, decay, beta2):
    slots, g, count, rate = slots[on], grad[on].float(), count[on, None], rate[on, None]
    square[slots] = squares = beta2 * square[slots] + (1 - beta2) * g * g
    p[slots] = new = p[slots] * (1 - rate * decay) - rate * g / ((squares / (1 - beta2 ** count)).sqrt() + 1e-10)
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


def triton_adamw_rows(p, work, square, slots, on, grad, count, rate, decay, beta2):
    n = p.size(1)
    adamw_kernel[triton.cdiv(n, 1024), len(slots)](
        p, work, square, slots, on.float(), grad.contiguous(), 1 - beta2 ** count, rate, n, float(decay), float(beta2), BLOCK=1024,
        num_warps=4)


# --- A product per slot -----------------------------------------------------------------------------------------------


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y (T, N) with y[t] = x[t] @ w[s] where ends[s - 1] <= t < ends[s]; x (T, K), w (S, K, N), ends (S,) int32.

    On CUDA bf16, K and N multiples of 8, S < 1024.
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
