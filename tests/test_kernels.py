"""The kernels of test-time training: references against naive formulas, the Triton versions, interpreted, against them."""
import ast
import base64
import functools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import brotli
import pytest
import torch
import torch.nn.functional as F

import gpt_kernels as kernels
import train_gpt as g
from tests.synthetic import runtime
from tests.test_quantization import calibration_text
from tests.test_train_gpt import CONFIGURATIONS, packed_documents, random_model, reference_settings
from tests.test_ttt import adapt, small, stream
from tools import pack_submission

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are compiled; see test_gpu.py")
torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def keys_seen(lengths, begins, slots, room):
    """Segments of rows that see their documents' last `room` positions, where in rings these lie, which are the rows' own."""
    pairs = list(zip(lengths, begins))
    seen = [torch.arange(max(0, begin + n - room), begin + n) for n, begin in pairs]
    places = torch.cat([slot * room + positions % room for slot, positions in zip(slots, seen)])
    own = torch.cat([positions >= begin for positions, begin in zip(seen, begins)]).nonzero()[:, 0]
    bounds = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (lengths, map(len, seen))]
    longest = max(map(len, seen))
    return kernels.Segments(bounds[0], None, max(lengths), None, bounds[1], longest), places, own


def attend(q, k, v, keys, values, segments, places, own):
    """What the model and its cache do."""
    k, v = (kernels.WithPast.apply(x, ring, places, own) for x, ring in ((k, keys), (v, values)))
    return kernels.attention(kernels.Heads(q, k, v), segments, "reference")


def attention_case(lengths, begins, heads, kv_heads, room, D=16, seed=0):
    """Random rows, their slots, and rings with NaN wherever they hold nothing that a row may see."""
    g = generator(seed)
    rows, total = len(lengths), sum(lengths)
    q, k, v = (torch.randn(total, h, D, generator=g, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    slots = torch.randperm(rows + 2, generator=g)[:rows]
    keys, values = torch.full((2, rows + 2, room, kv_heads, D), float("nan"))
    for slot, begin in zip(slots, begins):
        held = torch.arange(max(0, begin - room), begin) % room
        keys[slot, held], values[slot, held] = torch.randn(2, len(held), kv_heads, D, generator=g)
    return q, k, v, keys, values, slots


def compare(function, reference, inputs, arguments, expanded=False, tolerance=2e-5):
    """Outputs and gradients of the leading `inputs` agree."""
    results = []  # of `expanded` outputs the incoming gradient has stride 0
    for f in (function, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves, *arguments)
        weights = torch.randn(out.shape, generator=generator(9)) if not expanded else torch.ones(()).expand(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, weights)])
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths, begins, heads, kv_heads, room", [
    ([5], [0], 2, 1, 32),  # one row without a past
    ([1], [7], 2, 2, 16),  # one token
    ([3, 1, 17, 8], [0, 40, 5, 150], 4, 2, 48),  # the ring wraps
    ([20, 9], [64, 65], 4, 2, 64),  # the whole room
    ([30, 4], [50, 6], 4, 1, 30),  # a row that fills the room sees no past
])
def test_attention_to_the_past(lengths, begins, heads, kv_heads, room):
    q, k, v, keys, values, slots = attention_case(lengths, begins, heads, kv_heads, room)
    known, first, expected = [keys.clone(), values.clone()], 0, []
    for n, begin, slot in zip(lengths, begins, slots):
        own = slice(first, first + n)
        past = torch.arange(max(0, begin + n - room), begin)
        row_k, row_v = (torch.cat((ring[slot, past % room], new[own])).repeat_interleave(heads // kv_heads, 1)
                        for ring, new in zip(known, (k, v)))
        scores = torch.einsum("qhd,khd->hqk", q[own], row_k) / math.sqrt(q.size(2))
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(past) + 1)
        expected.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(2), row_v))
        first += n
    out = attend(q, k, v, keys, values, *keys_seen(lengths, begins, slots, room))
    weights = torch.randn(out.shape, generator=generator(9))
    results = [[y, *torch.autograd.grad(y, (q, k, v), weights)] for y in (out, torch.cat(expected))]
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    segments, places, own = keys_seen(lengths, begins, slots, room)
    for ring, old, new in zip((keys, values), known, (k, v)):  # stored, and nothing else has changed
        assert torch.equal(ring.flatten(0, 1)[places[own]], new)
        ring.flatten(0, 1)[places[own]] = old.flatten(0, 1)[places[own]]
        assert torch.equal(ring.nan_to_num(9), old.nan_to_num(9))


def test_a_row_does_not_depend_on_the_others():
    lengths, begins = [40, 9, 70], [100, 3, 10]
    q, k, v, keys, values, slots = attention_case(lengths, begins, 4, 2, 128)
    together = attend(q, k, v, keys, values, *keys_seen(lengths, begins, slots, 128))
    alone = attend(q[40:49], k[40:49], v[40:49], keys, values, *keys_seen([9], [3], slots[1:2], 128))
    torch.testing.assert_close(together[40:49], alone)


def test_chunks_equal_attention_over_the_whole_document():
    g, heads, kv_heads, D, room = generator(), 4, 2, 16, 40
    documents = [torch.randn(n, heads + 2 * kv_heads, D, generator=g) for n in (100, 37, 64)]
    keys, values = torch.full((2, 5, room, kv_heads, D), float("nan"))
    outputs, done, slots, chunk = [[] for _ in documents], [0, 0, 0], torch.tensor([4, 0, 2]), 0
    while any(at < len(doc) for at, doc in zip(done, documents)):
        live = [i for i, doc in enumerate(documents) if done[i] < len(doc)]
        lengths = [min(7 + 5 * i + chunk % 3, len(documents[i]) - done[i]) for i in live]
        rows = torch.cat([documents[i][done[i]:done[i] + n] for i, n in zip(live, lengths)])
        q, k, v = rows.split((heads, kv_heads, kv_heads), 1)
        out = attend(q, k, v, keys, values, *keys_seen(lengths, [done[i] for i in live], slots[live], room))
        for i, piece in zip(live, out.split(lengths)):
            outputs[i].append(piece)
            done[i] += len(piece)
        chunk += 1
    for doc, pieces in zip(documents, outputs):
        q, k, v = (x.transpose(0, 1) for x in doc.split((heads, kv_heads, kv_heads), 1))
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        at = torch.arange(len(doc))
        end = ends[torch.searchsorted(ends, at, right=True)]  # of the chunk a query lies in
        visible = (at <= at[:, None]) & (at >= (end - room)[:, None])
        k, v = k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)
        weights = (q @ k.transpose(1, 2) / D ** 0.5).masked_fill(~visible, float("-inf")).softmax(-1)
        torch.testing.assert_close(torch.cat(pieces), (weights @ v).transpose(0, 1), rtol=1e-5, atol=1e-5)


def fused_nll(scores, *rest):
    return kernels.TwoValueNLL.apply(scores, None, None, *rest)


@pytest.mark.parametrize("T, V, caps, dtype", [
    (5, 100, (30.0, 30.0), torch.float32),
    (4, 8192, (20.0, 35.0), torch.float32),
    (3, 5000, (torch.tensor(15.0), torch.tensor(25.0, requires_grad=True)), torch.float32),
    (1, 64, (2.0, 3.0), torch.float32),
    (6, 8192, (30.0, 20.0), torch.bfloat16),
])
@pytest.mark.parametrize("hinted", [1, 3, 8])
@pytest.mark.parametrize("expanded", [False, True])
def test_two_value_nll(T, V, caps, dtype, expanded, hinted):
    g = generator()
    scores = (12 * torch.randn(T, V + 3, generator=g)).to(dtype)[:, :V]
    scores[0, :3] = torch.tensor([0.0, 90.0, -90.0])
    ids = torch.randint(V, (T, 1 + hinted), generator=g)
    targets, hints = ids[:, 0], ids[:, 1:]  # neither lies in one piece
    targets[0] = 1
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # of the gradient, rounded to bf16 by both
    arguments = *caps, targets, hints
    compare(lambda *a: fused_nll(*a)[0], lambda *a: kernels.reference_two_value_nll(*a)[0], (scores,), arguments, expanded,
            tolerance)
    results = [f(scores, *arguments) for f in (fused_nll, kernels.reference_two_value_nll)]
    for ours, theirs in zip(*results):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-5)


def test_whole_caps_are_float32_too(monkeypatch):
    """Kernels take what lies behind a pointer by its type, and the next 30.0 is the same constant."""
    monkeypatch.setattr(kernels, "constant", functools.cache(kernels.constant.__wrapped__))
    scores, ids = 12 * torch.randn(3, 20, generator=generator()), torch.tensor([1, 2, 3])
    for cap in (30, 30.0):
        torch.testing.assert_close(fused_nll(scores, cap, cap, ids, ids[:, None])[0],
                                   kernels.reference_two_value_nll(scores, 30.0, 30.0, ids, ids[:, None])[0])
        assert kernels.constant(cap, scores.device).dtype == torch.float32


def test_hints_carry_no_gradient():
    scores, ids = torch.randn(3, 20, requires_grad=True), torch.tensor([1, 2, 3])
    for function in (fused_nll, kernels.reference_two_value_nll):
        nll, log_q = function(scores, 30.0, 30.0, ids, ids[:, None])
        assert nll.requires_grad and not log_q.requires_grad
        torch.testing.assert_close(nll.detach(), -log_q[:, 0])


@pytest.mark.parametrize("n", [7, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_rows(n, dtype, monkeypatch):
    results = []
    rate = torch.tensor([0.01, 0.02, 0.5, 0.001])
    slots, on, count = torch.tensor([4, 0, 2, 5]), torch.tensor([True, True, False, True]), torch.tensor([1.0, 3.0, 1.0, 50.0])
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fusible", lambda x, fused=fused: fused)
        g = generator()
        p, square = torch.randn(2, 6, n, generator=g)
        work, grad = p.to(dtype), torch.randn(4, n, generator=g).to(dtype)
        states = [p, work, square.abs_()]
        before = [x.clone() for x in states]
        kernels.adamw_rows(p, work, square, slots, on, grad, count, rate, 0.1, 0.99)
        for state, old in zip(states, before):
            assert all(torch.equal(state[i], old[i]) == (i in (1, 2, 3)) for i in range(6))
        ulp = 2.0 ** -7 if dtype == torch.bfloat16 and fused else 0  # interpreted, it truncates
        torch.testing.assert_close(work.float(), p.to(dtype).float(), rtol=ulp, atol=0)
        results.append(states)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.dtype == torch.float32 else 1e-2, atol=1e-6)


def test_adamw_rows_agrees_with_torch():
    x, g = torch.randn(1, 30, generator=generator()), torch.randn(5, 1, 30, generator=generator(1))
    p, square, work = x.clone(), torch.zeros(1, 30), x.bfloat16()
    theirs = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.0, 0.99), eps=1e-10, weight_decay=0.1)
    for step in range(5):
        count, on = torch.full((1,), step + 1.0), torch.ones(1, dtype=torch.bool)
        kernels.adamw_rows(p, work, square, torch.zeros(1, dtype=torch.long), on, g[step], count, torch.full((1,), 0.01), 0.1, 0.99)
        theirs.grad = g[step]
        optimizer.step()
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(work, p.bfloat16())


@pytest.mark.parametrize("sizes", [[5], [3, 17, 1, 40], [3, 0, 12]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_grouped_product(sizes, transposed, expanded):
    g, K, N = generator(), 16, 24
    ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    x, w = torch.randn(int(ends[-1]), K, generator=g), torch.randn(len(sizes), K, N, generator=g)
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for function in (kernels.grouped_product, kernels.GroupedProduct.apply):
        compare(function, lambda x, w, _: torch.einsum("tk,tkn->tn", x, w[rows]), (x, w), (ends,), expanded)


@pytest.mark.parametrize("copies", [1, 2])
def test_flash_attention_4_is_given_what_it_wants(copies, monkeypatch):
    """Its functions replaced by the reference and that one's derivative: results and gradients arrive where they belong."""
    segments = g.make_segments(torch.tensor([0, 3, 10], dtype=torch.int32).numpy(), 8)
    bounds = dict(cu_seqlens_q=segments.cu_seqlens, cu_seqlens_k=segments.cu_seqlens, max_seqlen_q=8, max_seqlen_k=8)

    def forward(q, k, v, causal, return_lse, **given):
        assert causal and return_lse and given == bounds and k.size(1) == v.size(1) == 2 and k.stride(2) == 1
        return kernels.reference_attention(q, k, v, segments), torch.ones(4, 10), "more"

    def backward(q, k, v, out, dout, lse, scale, causal, **given):
        assert dout.is_contiguous() and causal and given == bounds and scale == 0.25
        torch.testing.assert_close(out, kernels.reference_attention(q, k, v, segments))
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return *torch.autograd.grad(kernels.reference_attention(*leaves, segments), leaves, dout), "more"

    monkeypatch.setitem(sys.modules, kernels.FLASH_ATTENTION_4, SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))
    def copied(function):
        return lambda q, k, v: function(q, *(x.repeat_interleave(copies, 1) for x in (k, v)))

    compare(copied(lambda *qkv: kernels.FlashAttention4.apply(*qkv, segments.cu_seqlens, segments.max_seqlen, copies)),
            copied(lambda *qkv: kernels.reference_attention(*qkv, segments)),
            [torch.randn(10, heads, 16, generator=generator(heads)) for heads in (4, 2, 2)], (), expanded=True)


SHAPE = (2048, 4, 2, 128)  # longest segment, heads, kv_heads, head_dim


@pytest.mark.parametrize("works, capability, wanted, got", [
    ({"fa4", "torch"}, 9, "auto", "fa4"), ({"torch"}, 9, "auto", "torch"), ({"fa4", "torch"}, 8, "auto", "torch"), (set(), 9, "auto", "reference"),
    (set(), None, "auto", "reference"), (set(), None, "reference", "reference"), (set(), None, "torch", None), (set(), None, "fa4", None),
    ({"fa4", "torch"}, 9, "fa4", "fa4"), ({"torch"}, 9, "fa4", None), ({"fa4", "torch"}, 9, "torch", "torch"), (set(), 9, "torch", None),
    ({"fa4", "torch"}, 9, "reference", "reference")])
def test_attention_takes_the_best_kernel_that_runs(works, capability, wanted, got, monkeypatch):
    tried = []

    def attempt(kernel, *shape):
        tried.append(kernel)
        assert shape == SHAPE, "the run's own"
        if kernel not in works:
            raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(kernels, "try_attention", attempt)
    choose = kernels.attention_kernel.__wrapped__  # without its memory of earlier calls
    if got:
        kernel, reason = choose(wanted, *SHAPE)
        assert kernel == got and [name in reason for name in tried] == [name != got for name in tried]
        assert bool(reason) == ("no kernel image" in reason) and "\n" not in reason
    else:
        with pytest.raises(kernels.KernelError, match=f"^ATTENTION: {wanted} does not load .*no kernel image.*choose auto"):
            choose(wanted, *SHAPE)


def test_a_kernel_is_tried_forward_and_backward_on_the_run_s_shapes(monkeypatch):
    """On the host, where attention's reference stands for the kernel."""
    passes = []

    def stand_in(heads, segments, kernel):
        passes.append((kernel, heads.q.requires_grad, len(heads.q), heads.q.size(1), heads.k.size(1), heads.copies,
                       segments.cu_seqlens.tolist(), segments.max_seqlen))
        return kernels.reference_attention(heads.q.float(), heads.k.float(), heads.v.float(), segments)

    for name in ("tensor", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, device=None, **k: make(*a, **k))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "attention", stand_in)
    kernels.try_attention("torch", 10, 4, 2, 8)
    assert passes == [("torch", True, 10, 4, 4, 2, [0, 10], 10)]


# --- Fused steps of a block


def ways(*names) -> set[str]:
    return {f"{name}_{way}" for name in names for way in ("forward", "backward")}


@pytest.fixture
def fused(monkeypatch):
    """The fused kernels run on the CPU, three programs over tiles of four rows. Returns the names of those that ran."""
    ran, launch = set(), kernels.RowKernel.__call__
    small_tiles(monkeypatch, 4)
    monkeypatch.setattr(kernels, "fusible", lambda x, *widths: all(width & (width - 1) == 0 for width in widths))

    def note(kernel, **arguments):
        ran.add(kernel.name.removesuffix("_kernel"))
        launch(kernel, **arguments)

    monkeypatch.setattr(kernels.RowKernel, "__call__", note)
    return ran


def small_tiles(monkeypatch, rows):
    for kernel in vars(kernels).values():
        if isinstance(kernel, kernels.RowKernel):
            for name, value in dict(rows=rows, per_multiprocessor=1, stages=1).items():
                monkeypatch.setattr(kernel, name, value)


@pytest.fixture
def double(monkeypatch):
    """The references compute in float64 what is float64."""
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed + 7 * len(shape) + sum(shape))).to(dtype)


def tensors(result) -> list[torch.Tensor]:
    """The tensors of a result, those in 8 bits aside."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple) and not isinstance(result, kernels.E4M3):
        return [x for item in result for x in tensors(item)]
    return []


def graded(function, inputs, trained):
    """Outputs, and gradients at inputs[i], i in trained, for fixed random gradients of the outputs."""
    leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    for i in trained:
        leaves[i].requires_grad_()
    out = [x for x in tensors(function(*leaves)) if x.numel()]
    results = [x.detach().clone() for x in out]
    pairs = [(x, randn(*x.shape, seed=11 + i).to(x.dtype)) for i, x in enumerate(out) if x.requires_grad]
    outputs, gradients = zip(*pairs)
    return results + list(torch.autograd.grad(outputs, [leaves[i] for i in trained], gradients))


def agree(function, reference, inputs, trained, tolerance=None):
    """Results and gradients are those of the reference in float64, up to a share of each one's largest value."""
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    ours, theirs = graded(function, inputs, trained), graded(reference, wide, trained)
    assert len(ours) == len(theirs)
    # bf16 is rounded at every result by both, and interpreted it is truncated
    tolerance = tolerance or (0.02 if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in inputs) else 2e-5)
    for x, y in zip(ours, theirs):
        assert x.shape == y.shape and torch.isfinite(x).all()
        assert (x.double() - y).abs().max() <= tolerance * (y.abs().max() + 1e-6)


LENGTHS = [(1, torch.float32), (7, torch.float32), (33, torch.float32), (33, torch.bfloat16)]
lengths = pytest.mark.parametrize("T, dtype", LENGTHS, ids=[f"{T} {str(dtype)[6:]}" for T, dtype in LENGTHS])


@lengths
@pytest.mark.parametrize("skip", [None, "added", "gated"])
@pytest.mark.parametrize("lanes", [False, True])
def test_mix_norm(T, dtype, skip, lanes, fused, double):
    x, x0, left = (randn(T, 16, seed=i, dtype=dtype) for i in (1, 2, 3))
    inputs = [x, x0, *((left, randn(16, seed=4), randn(16, seed=5) if skip == "gated" else None) if skip else (None,) * 3),
              randn(2, 16, seed=6), torch.tensor(0.7), 0 if T == 7 else 3, None, lanes]

    def call(function):
        return lambda x, x0, *left: function(x, x0, kernels.Skip(*left[:3]) if skip else None, *left[3:])

    trained = [i for i in range(6) if inputs[i] is not None]
    agree(call(kernels.mix_norm), call(kernels.reference_mix_norm), inputs, trained)
    assert fused == ways("mix_norm")


def test_a_lane_without_skip_is_not_copied(fused):
    x = randn(5, 16).requires_grad_()
    assert kernels.mix_norm(x, x, None, randn(2, 16), torch.tensor(0.7), 3, None, True)[0].data_ptr() == x.data_ptr()
    assert kernels.add_norm(x, None, torch.tensor(0.7))[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("used", [(1,), (0, 1), (1, 3), (1, 2, 4)])
def test_mix_norm_of_which_little_is_used(lanes, used, fused, double):
    inputs = [*(randn(9, 16, seed=i) for i in (1, 2)), None, randn(2, 16, seed=6), torch.tensor(0.7), 3, None, lanes]

    def some(function):
        return lambda *a: tuple(x for i, x in enumerate(tensors(function(*a))) if i in used)

    agree(some(kernels.mix_norm), some(kernels.reference_mix_norm), inputs, [0, 1, 3])


def test_mix_norm_returns_what_has_no_gradient_without_one(fused):
    x, x0 = randn(5, 16).requires_grad_(), randn(5, 16, seed=1)
    *_, again, same = kernels.mix_norm(x, x0, None, randn(2, 16), torch.tensor(0.7), 3)
    assert again.requires_grad and not same.requires_grad and torch.equal(same, x0)


@lengths
@pytest.mark.parametrize("heads, kv_heads, D, dims, copies", [
    (2, 1, 16, 4, 1), (8, 4, 64, 16, 1), (8, 4, 64, 16, 2), (4, 4, 16, 16, 1), (4, 2, 16, 8, 1), (4, 1, 16, 8, 4)])
def test_prepare_heads(T, dtype, heads, kv_heads, D, dims, copies, fused, double):
    angles = torch.arange(T)[:, None, None] * 10000.0 ** (-torch.arange(0, dims, 2) / dims)
    inputs = [randn(T, (heads + 2 * kv_heads) * D, dtype=dtype), angles.cos(), angles.sin(), randn(heads, seed=3)]

    def prepare(qkv, cos, sin, gain):
        if copies > 1:  # which only CUDA asks for
            return kernels.PrepareHeads.apply(qkv, None, None, cos, sin, gain, heads, kv_heads, copies)
        return kernels.prepare_heads(qkv, (cos, sin), gain, heads, kv_heads)

    def reference(qkv, cos, sin, gain):
        return kernels.reference_prepare_heads(qkv, (cos, sin), gain, heads, kv_heads, copies)

    agree(prepare, reference, inputs, [0, 3])
    assert fused == ways("prepare_heads")


def xsa_inputs(T, heads, kv_heads, D, gate, alpha, dtype):
    """Attention output, the product whose last columns are the values, window, weight, alpha."""
    return [randn(T, heads, D, seed=1, dtype=dtype), randn(T, (heads + 2 * kv_heads) * D, seed=2, dtype=dtype),
            *((randn(T, 5, seed=3, dtype=dtype), randn(heads, 5, seed=4)) if gate else (None, None)),
            randn(heads, seed=5) if alpha else None, 0.5]


def cut(function, kv_heads, D):
    """The function on values cut out of a product's output, as in the model."""
    return lambda y, qkv, *rest: function(y, qkv[:, -kv_heads * D:].unflatten(1, (kv_heads, D)), *rest)


@lengths
@pytest.mark.parametrize("heads, kv_heads, D", [(2, 2, 16), (8, 4, 64), (4, 1, 16)])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_xsa_gate(T, dtype, heads, kv_heads, D, gate, alpha, fused, double):
    inputs = xsa_inputs(T, heads, kv_heads, D, gate, alpha, dtype)
    trained = [i for i in range(5) if inputs[i] is not None]
    agree(cut(kernels.xsa_gate, kv_heads, D), cut(kernels.reference_xsa_gate, kv_heads, D), inputs, trained)
    assert fused == ways("xsa_gate")


def test_xsa_gate_of_a_value_that_is_zero(fused):
    inputs = xsa_inputs(3, 2, 1, 16, True, True, torch.float32)
    inputs[1][1] = 0
    ours, theirs = (graded(cut(f, 1, 16), inputs, [0, 2, 3, 4]) for f in (kernels.xsa_gate, kernels.reference_xsa_gate))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@lengths
def test_norms_of_sums(T, dtype, fused, double):
    x, y, scale = randn(T, 16, seed=1, dtype=dtype), randn(T, 16, seed=2, dtype=dtype), torch.tensor(0.6)
    agree(kernels.add_norm, kernels.reference_add_norm, [x, y, scale], [0, 1])
    agree(kernels.add_norm, kernels.reference_add_norm, [x, None, scale], [0])
    agree(lambda x, z, scale, weight: kernels.add_norm(x, kernels.Product(kernels.Activation(z), kernels.Matrix(weight)), scale),
          lambda x, z, scale, weight: kernels.reference_add_norm(x, F.linear(z, weight), scale),
          [x, randn(T, 8, seed=3, dtype=dtype), scale, randn(16, 8, seed=4, dtype=dtype)], [0, 1, 3])
    assert fused == ways("add_norm")


def in_8_bits(w: torch.Tensor) -> kernels.Matrix:
    [matrix] = kernels.as_matrices(w.detach()[None], w.dtype, fp8=True)
    return matrix._replace(w=w)


def narrow(x: torch.Tensor) -> kernels.E4M3:
    return in_8_bits(x).fp8


def normalized(x: torch.Tensor, unit: float = 2.0 ** -4) -> kernels.Activation:
    return kernels.Activation(x, kernels.E4M3((x.detach() / unit).to(torch.float8_e4m3fn), torch.tensor(unit)))


def wide(x: kernels.E4M3) -> torch.Tensor:
    return x.values.float() * (x.scale[:, None] if x.scale.dim() else x.scale)


def plain_mlp_forward(u, w_up, slope):
    """kernels.mlp_forward, whose kernel no CPU can run, in its layouts: bit j of negative[i, m] stands for p[m, 32 i + j]."""
    fp8 = isinstance(u, kernels.E4M3)
    p = wide(u) @ wide(w_up).T if fp8 else u @ w_up.T
    negative = ((p < 0).unflatten(1, (-1, 32)).long() << torch.arange(32)).sum(2).T.to(torch.int32)
    hidden = kernels.leaky_relu_squared(p, slope)
    if not fp8:
        return hidden, negative, None
    return hidden.bfloat16(), negative, (hidden / kernels.HIDDEN_UNIT).clamp(max=448).to(torch.float8_e4m3fn)


def plain_mlp_backward(dy, w_down, hidden, negative, slope):
    fp8 = isinstance(dy, kernels.E4M3)
    below = ((negative.T[:, :, None] >> torch.arange(32)) & 1).flatten(1) == 1
    dhidden = wide(dy) @ wide(w_down).T if fp8 else dy @ w_down
    dp = dhidden * hidden.to(dhidden.dtype).sqrt() * torch.where(below, -2 * slope, 2.0)
    if not fp8:
        return dp.to(hidden.dtype), None
    in_units = dp / (kernels.DHIDDEN_UNIT * dy.scale[:, None] * w_down.scale)
    return dp.bfloat16(), in_units.clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.fixture
def plain_mlp(monkeypatch):
    monkeypatch.setattr(kernels, "mlp_forward", plain_mlp_forward)
    monkeypatch.setattr(kernels, "mlp_backward", plain_mlp_backward)


def squared_mlp(u, up, down, slope, x=None):
    """kernels.squared_mlp where the kernel runs."""
    return kernels.SquaredMLP.apply(u.x, up.w, down.w, x, u, up, down, slope)


def squared_mlp_of(function):
    """The function of Activation and Matrix as one of tensors."""
    return lambda u, up, down, *rest: function(kernels.Activation(u), kernels.Matrix(up), kernels.Matrix(down), *rest)


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("T, hidden, d, dtype", [
    (1, 64, 32, torch.float32), (7, 32, 48, torch.float32), (33, 256, 32, torch.float32), (33, 64, 32, torch.bfloat16)])
def test_squared_mlp(T, hidden, d, dtype, slope, plain_mlp):
    inputs = [*(randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(T, d), (hidden, d), (d, hidden)])), slope]
    inputs[0][T // 2, :] *= 1e-30  # squared it underflows; its gradient is that of 0
    inputs[0][2:3] = 0
    tolerance = 3e-5 if dtype == torch.float32 else 0.02
    ours, theirs = squared_mlp_of(squared_mlp), squared_mlp_of(kernels.squared_mlp)
    agree(ours, theirs, inputs, range(3), tolerance)
    inputs.append(randn(T, d, seed=3, dtype=dtype))  # written over, so not a leaf
    agree(lambda *a: ours(*a[:4], 1 * a[4]), theirs, inputs, (0, 1, 2, 4), tolerance)


@pytest.fixture
def small_fp8_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "FP8_TILE", dict(BM=16, BN=32, BK=32, num_warps=1, num_stages=1))


@pytest.mark.parametrize("T", [1, 7, 33])
def test_a_product_in_8_bits_that_is_added_before_a_norm(T, fused, small_fp8_tiles):
    x, z, w = (randn(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(T, 64), (T, 64), (64, 64)]))
    x.requires_grad_(), z.requires_grad_(), w.requires_grad_()
    product, scale = kernels.Product(normalized(z, kernels.GATED_UNIT), in_8_bits(w)), torch.tensor(0.3)
    found = tensors(kernels.add_norm(x, product, scale))
    total = x.detach().float() + wide(product.x.fp8) @ wide(product.w.fp8).T
    exact = total.requires_grad_(), scale * F.rms_norm(total, (64,), eps=1.1920929e-7)
    draws = [randn(T, 64, seed=i, dtype=torch.bfloat16) for i in (5, 6)]
    dx, dz, dw = torch.autograd.grad(found, (x, z, w), draws)
    [wanted] = torch.autograd.grad(exact, total, [draw.float() for draw in draws])
    for got, right in zip((*found, dx, dw), (*exact, wanted, wanted.T @ z.float())):
        assert (got.float() - right).norm() < 0.01 * right.norm()
    dz_fp8 = wide(kernels.fp8_rows(wanted)) @ wide(product.w.fp8)  # interpreted, some numbers are halved on their way to E4M3
    assert (dz.float() - dz_fp8).norm() < 0.12 * dz_fp8.norm()
    assert fused >= {"add_norm_backward"}


@pytest.mark.parametrize("unit_scale", [None, 0.3])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("M, N, K, add", [(1, 32, 32, False), (50, 64, 96, False), (33, 96, 64, True), (200, 32, 32, True)])
def test_product_in_8_bits(M, N, K, add, per_row, unit_scale, request):
    x, w, out = randn(M, K) * 2.0 ** randn(M, 1), narrow(randn(N, K, seed=1)), randn(M, N, seed=2, dtype=torch.bfloat16)
    x = kernels.fp8_rows(x) if per_row else narrow(x)
    unit = {} if unit_scale is None else dict(unit=2.0, unit_scale=torch.tensor(unit_scale))
    wanted = wide(x) @ wide(w).T * (1 if unit_scale is None else 2 * unit_scale) + add * out.float()
    for fixtures in ((), ("fused", "small_fp8_tiles")):  # as a plain formula, then as a kernel
        for fixture in fixtures:
            request.getfixturevalue(fixture)
        found = out.clone()
        assert kernels.fp8_product(x, w, found, add=add, **unit) is found
        assert ((found.float() - wanted).norm(dim=1) < 0.01 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("T", [1, 33])
def test_gradients_in_8_bits_have_a_scale_for_each_row(T, request):
    x = 1e-6 * randn(T, 64, dtype=torch.bfloat16) * 2.0 ** (8 * randn(T, 1, seed=1)).bfloat16()
    x[T // 2] = 0
    for fixtures, share in (((), 0.03), (("fused",), 0.25)):  # interpreted, some numbers are halved on their way to E4M3
        ran = [request.getfixturevalue(fixture) for fixture in fixtures]
        rows = kernels.fp8_rows(x)
        assert rows.values.dtype == torch.float8_e4m3fn and rows.scale.shape == (T,)
        torch.testing.assert_close(448 * rows.scale, x.abs().amax(1).float().clamp(min=1e-30), rtol=1e-6, atol=0)
        assert ((wide(rows) - x.float()).norm(dim=1) <= share * x.float().norm(dim=1)).all()
        assert ran in ([], [{"fp8_rows"}])


@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("T", [1, 33])
def test_squared_mlp_in_8_bits(T, slope, plain_mlp):
    """What operands rounded to 8 bits make, but for the matrices' gradients, whose operands are those in bf16."""
    u, up, down = (randn(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(T, 32), (64, 32), (32, 64)]))
    u.requires_grad_(), up.requires_grad_(), down.requires_grad_()
    operands = kernels.Activation(u, narrow(u)), in_8_bits(up), in_8_bits(down)
    low_u, low_up, low_down = (wide(x.fp8) for x in operands)
    x, dy = (randn(T, 32, seed=i, dtype=torch.bfloat16) for i in (3, 4))
    dy *= 1e-5 * 2.0 ** randn(T, 1, seed=5).bfloat16()
    p = low_u @ low_up.T
    wanted = kernels.leaky_relu_squared(p, slope) @ low_down.T
    a = kernels.leaky_relu_squared(p, slope).bfloat16().float()
    dp = wide(kernels.fp8_rows(dy)) @ low_down * 2 * a.sqrt() * torch.where(p < 0, -slope, 1.0)
    for added in (False, True):
        kept = x.clone().requires_grad_()
        held = 1 * kept if added else None
        y = squared_mlp(*operands, slope, held)
        assert y.dtype == torch.bfloat16 and (y is held) == added
        assert (y - added * x - wanted).norm() < 0.03 * wanted.norm()  # the activation is rounded to 8 bits too
        du, dup, ddown, *dx = torch.autograd.grad(y, [u, up, down] + [kept] * added, dy)
        exact = dy.float() @ down.float() * 2 * a.sqrt() * torch.where(p < 0, -slope, 1.0) @ up.float()
        for found, formula, share in ((du, dp @ low_up, 0.04), (du, exact, 0.1), (dup, dp.T @ u.float(), 0.01),
                                      (ddown, dy.float().T @ a, 0.01)):
            assert (found - formula).norm() <= share * formula.norm()
        assert not added or torch.equal(*dx, dy)


def test_what_is_kept_of_the_products_before_the_activation():
    p = torch.tensor([[1.0, -1.0], [-3.0, 0.5], [-0.0, -2.0]])
    a, negative, _ = plain_mlp_forward(p, torch.eye(2).repeat(32, 1), 0.5)
    assert a[:, :2].tolist() == [[1, 0.25], [2.25, 0.25], [0, 1]]
    assert (negative.long() & 0xFFFFFFFF).tolist() == [[0xAAAAAAAA, 0x55555555, 0xAAAAAAAA]] * 2


@pytest.mark.parametrize("d, hidden, device, dtype, runs", [
    (512, 2048, 0, torch.bfloat16, True), (64, 256, 0, torch.bfloat16, True), (512, 2048, 0, torch.float32, False),
    (576, 2304, 0, torch.bfloat16, False), (480, 1920, 0, torch.bfloat16, False), (512, 1920, 0, torch.bfloat16, False),
    (512, 2048, 1, torch.bfloat16, False), (512, 2048, None, torch.bfloat16, False)])
def test_what_the_kernel_of_the_mlp_serves(d, hidden, device, dtype, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (10, 0))[device])
    u = SimpleNamespace(is_cuda=device is not None, device=device, dtype=dtype, shape=(7, d))
    assert kernels.mlp_fusible(u, hidden) == runs
    monkeypatch.setattr(kernels, "gluon", None)
    assert not kernels.mlp_fusible(u, hidden)


def test_what_the_fused_kernels_serve():
    device, host = (SimpleNamespace(is_cuda=on) for on in (True, False))
    assert kernels.fusible(device) and kernels.fusible(device, 1, 2, 512) and not kernels.fusible(host, 512)
    assert not kernels.fusible(device, 512, 384)


@lengths
@pytest.mark.parametrize("caps", [(torch.tensor(20.0), torch.tensor(35.0)), (15.0, 25.0)], ids=["tensors", "numbers"])
@pytest.mark.parametrize("hinted", [0, 1, 6])
def test_two_value_nll_and_its_caps(T, dtype, caps, hinted, fused, double):
    scores = (12 * randn(T, 103)).to(dtype)
    scores[0, :3] = torch.tensor([0.0, 90.0, -90.0])
    targets = torch.arange(T) * 7 % 100
    hints = (targets.flip(0)[:, None] + torch.arange(hinted)) * 3 % 100 if hinted else None
    inputs = [scores, *caps, targets, hints]

    def reference(x, cap_pos, cap_neg, targets, hints):
        return kernels.reference_two_value_nll(x, cap_pos, cap_neg, targets, targets[:, None] if hints is None else hints)

    def strided(function):
        return lambda x, *rest: function(x[:, :100], *rest)

    for trained in ([0], [0, 1, 2]) if isinstance(caps[0], torch.Tensor) else ([0],):
        agree(strided(kernels.two_value_nll), strided(reference), inputs, trained)


def test_the_gradient_of_two_value_nll_takes_the_place_of_the_scores(fused):
    wide, targets = randn(3, 35), torch.tensor([1, 2, 3])
    product, beyond = wide * 1.0, wide[:, 32:].clone()
    scores = product[:, :32].requires_grad_()
    kernels.two_value_nll(scores, 30.0, 30.0, targets)[0].sum().backward()
    assert torch.equal(product[:, :32], scores.grad) and torch.equal(product[:, 32:], beyond)
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(3), atol=0.05, rtol=0)  # the cap's slope is nearly 1


# --- The model on the fused path


def on_both_paths(function, monkeypatch, mlp=True) -> tuple:
    """What the function returns with the fused kernels, the MLP's among them if asked for, and with the references."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "fusible", lambda *_: False)
        plain = function()
    with monkeypatch.context() as patch:
        small_tiles(patch, 8)  # two programs for 13 tokens
        if mlp:
            patch.setattr(kernels, "mlp_forward", plain_mlp_forward)
            patch.setattr(kernels, "mlp_backward", plain_mlp_backward)
            patch.setattr(g, "squared_mlp", squared_mlp)
        return function(), plain


MODELS = [  # changes, looping
    ({}, False), ({}, True), (dict(NUM_LOOPS=0), False), (dict(XSA_LAST_N=6), False), (dict(XSA_LAST_N=6), True),
    (dict(GATED_XSA=1), False),
    *((CONFIGURATIONS[name], looping) for name, looping in (
        ("no head gate", True), ("no gates", False), ("added skips", False), ("one lane", True), ("one softcap", False),
        ("smear into BOS", False), ("rotary on all dimensions", False)))]


def losses_and_gradients(model, looping, lengths=(5, 1, 7)) -> dict:
    ids, targets, segments = packed_documents(lengths)
    model.zero_grad()
    losses = model.token_losses(ids, targets, segments, looping)
    (losses * randn(len(ids))).sum().backward()
    return dict(losses=losses.detach()) | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        assert (ours[name] - x).norm() < tolerance * x.norm() + 1e-7, name


@pytest.mark.parametrize("changes, looping", MODELS)
def test_the_fused_model_equals_the_plain_one(changes, looping, fused, monkeypatch):
    s = reference_settings(**changes)
    model = random_model(s)
    assert_same(*on_both_paths(lambda: losses_and_gradients(model, looping), monkeypatch), 1e-4)
    assert fused == ways("mix_norm", "prepare_heads", "add_norm", *["xsa_gate"] * (s.xsa_last_n > 0))


def test_the_fused_model_equals_the_plain_one_in_bf16(fused, monkeypatch):
    model = random_model(reference_settings())
    model.compute_dtype = torch.bfloat16
    assert_same(*on_both_paths(lambda: losses_and_gradients(model, True, (7, 1, 14, 6)), monkeypatch, mlp=False), 0.1)


def test_calibration_sees_the_same_on_the_fused_path(fused, monkeypatch):
    s = reference_settings(EVAL_SEQ_LEN=24, VAL_BATCH_TOKENS=4096)
    model, windows = random_model(s), calibration_text(s, 1)
    ours, theirs = on_both_paths(lambda: g.calibrate(model, windows, True, s, runtime()), monkeypatch)
    for field in ("hessian", "curvature"):
        assert_same(getattr(ours, field), getattr(theirs, field), 1e-4)
    assert fused == ways("mix_norm", "prepare_heads", "xsa_gate", "add_norm")


@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_test_time_training_scores_the_same_on_the_fused_path(context, fused, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the n-gram library is compiled
    s = small(TTT_CONTEXT=context, TTT_BATCH_SIZE=2, TTT_CHUNK_SIZE=16, PHASED_TTT_PREFIX_DOCS=1)
    tokens = stream(3, longest=40)
    ours, theirs = on_both_paths(lambda: torch.from_numpy(adapt(s, tokens)), monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fused == ways("mix_norm", "prepare_heads", "xsa_gate", "add_norm")


# --- Products in 8-bit floats


@pytest.mark.parametrize("width", [16, 64, 512, 768])
def test_no_normalized_row_leaves_the_range_of_e4m3(width):
    unit = kernels.norm_unit(width)
    assert 224 < width ** 0.5 / unit <= 448 and math.log2(unit) % 1 == 0


def test_matrices_in_e4m3():
    stack = torch.stack((randn(6, 8), 1e-3 * randn(6, 8, seed=1), torch.zeros(6, 8)))
    for matrix, (w, (values, scale), (transposed, same_scale)) in zip(stack, kernels.as_matrices(stack, torch.bfloat16, True)):
        assert torch.equal(w, matrix.bfloat16())
        assert values.dtype == torch.float8_e4m3fn and values.is_contiguous() and scale.shape == () and scale == same_scale
        assert transposed.is_contiguous() and torch.equal(transposed.T.float(), values.float())
        assert values.float().abs().max() == (448 if matrix.any() else 0)
        torch.testing.assert_close(values.float() * scale, matrix, rtol=1 / 16, atol=scale.item() / 512)


def test_gradients_of_a_product_in_e4m3():
    x, w, dy = (randn(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(5, 32), (48, 32), (5, 48)]))
    x.requires_grad_(), w.requires_grad_()
    product, exact = kernels.Product(normalized(x), in_8_bits(w)), torch.autograd.grad(F.linear(x, w), (x, w), dy)
    y = kernels.computed(product)
    torch.testing.assert_close(y.float(), wide(product.x.fp8) @ wide(product.w.fp8).T, rtol=0.01, atol=0.01)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert torch.equal(dw, exact[1]) and not torch.equal(dx, exact[0])
    wanted = wide(kernels.fp8_rows(dy)) @ wide(product.w.fp8)
    assert (dx - wanted).norm() < 0.01 * wanted.norm() and (dx - exact[0]).norm() < 0.06 * exact[0].norm()


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("name, rows", [("prepare_heads", 128), ("two_value_nll", 128), ("two_value_nll", 96)])
def test_operations_that_compute_their_product(name, rows, in_bf16, T, request):
    """What comes of the product apart; interpreted, some numbers are halved on their way to E4M3."""
    x, w = randn(T, 64, dtype=torch.bfloat16), randn(rows, 64, seed=1, dtype=torch.bfloat16)
    targets, rope = torch.randint(rows, (T,), generator=generator()), tuple(randn(2, T, 1, 4))
    gain, cap = randn(4, seed=2), torch.tensor(20.0)
    calls = {"prepare_heads": lambda f, product, gain, cap: f(product, rope, gain, 4, 2),
             "two_value_nll": lambda f, product, gain, cap: f(product, cap, cap, targets, targets[:, None])[0]}
    results = []
    for fixtures, f, apart in (((), "reference_" + name, True), ((), name, False), (("fused", "small_fp8_tiles"), name, False)):
        for fixture in fixtures:
            request.getfixturevalue(fixture)
        x_leaf, *vectors, w_leaf = [a.detach().clone().requires_grad_() for a in (x, gain, cap, w)]
        product = kernels.Product(normalized(x_leaf), in_8_bits(w_leaf))
        if in_bf16:
            product = kernels.Product(kernels.Activation(x_leaf), kernels.Matrix(w_leaf))
        out = tensors(calls[name](getattr(kernels, f), kernels.computed(product) if apart else product, *vectors))
        draws = [randn(*y.shape, seed=11 + i).to(y.dtype) for i, y in enumerate(out)]
        gradients = torch.autograd.grad(out, [x_leaf, *vectors, w_leaf], draws, allow_unused=True)
        results.append([*out, *(g for g in gradients if g is not None)])
    for i, (apart, plain, kernel) in enumerate(zip(*results)):
        assert torch.equal(apart, plain)
        share = 0.2 if i == len(results[0]) - 3 and not in_bf16 else 0.02  # the gradient at x
        assert (kernel.float() - apart.float()).norm() <= share * apart.float().norm()


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("name", ["mix_norm", "mix_norm of a lane", "add_norm", "norm"])
def test_normalized_rows_in_e4m3(T, name, fused, monkeypatch):
    x, y, reader = randn(T, 64), randn(T, 64, seed=1), in_8_bits(randn(64, 64, seed=3))
    x[0, 1:] = 1e-3  # its first entry is nearly as large as there can be
    scale = torch.tensor(0.7)
    x.requires_grad_()
    for prefix, dtype in (("", torch.float16), ("reference_", torch.float8_e4m3fn)):  # interpreted, the cast to E4M3 is wrong
        monkeypatch.setattr(kernels, "FP8", dtype)
        if name.startswith("mix"):
            function, mix = getattr(kernels, prefix + "mix_norm"), randn(2, 64, seed=2)
            u = function(x, y, None, mix, scale, 3, reader, "lane" in name)[1]
        else:
            u = getattr(kernels, prefix + "add_norm")(x, y if name == "add_norm" else None, scale, reader)[1]
        assert u.fp8.values.dtype == dtype and u.fp8.scale == kernels.norm_unit(64) and not u.fp8.values.requires_grad
        torch.testing.assert_close(wide(u.fp8), u.x.detach(), rtol=1 / 16, atol=2 ** -12)
        assert u.x.requires_grad and torch.autograd.grad(u.x.sum(), x)[0].any()
    assert fused


@pytest.mark.parametrize("exclusive", [True, False])
def test_gated_outputs_in_e4m3(exclusive, fused, monkeypatch):
    y, qkv, *rest = xsa_inputs(7, 4, 2, 16, True, False, torch.float32)
    v = qkv[:, -32:].unflatten(1, (2, 16)) if exclusive else None
    y[3] *= 1e3  # beyond the range
    y.requires_grad_()
    for function, dtype in ((kernels.xsa_gate, torch.float16), (kernels.reference_xsa_gate, torch.float8_e4m3fn)):
        monkeypatch.setattr(kernels, "FP8", dtype)
        z = function(y, v, *rest, reader=in_8_bits(randn(64, 64)))
        assert z.fp8.values.dtype == dtype and z.fp8.values.shape == (7, 64) and not z.fp8.values.requires_grad
        end = math.inf if exclusive and dtype == torch.float16 else 112  # the kernel, interpreted, has no cast to E4M3
        torch.testing.assert_close(wide(z.fp8), z.x.detach().clamp(-end, end), rtol=1 / 16, atol=2 ** -11)
        assert (z.x.abs() > 112).any() and torch.autograd.grad(z.x.sum(), y)[0].any()
    assert fused == (ways("xsa_gate") if exclusive else set())


def test_which_passes_have_products_in_e4m3(monkeypatch):
    products = []
    monkeypatch.setattr(kernels.FP8Product, "forward", lambda ctx, x, w, *_, keep=kernels.FP8Product.forward: (
        products.append(w.shape), keep(ctx, x, w, *_))[1])
    model = random_model(reference_settings(VOCAB_SIZE=48))
    model.compute_dtype = torch.bfloat16
    exact = losses_and_gradients(model, True)
    model.fp8 = True
    low = losses_and_gradients(model, True)
    count = 2 * len(sum(model.orders[True], [])) + 1  # into and out of attention at each visit, and the head
    assert len(products) == count
    assert not torch.equal(low["losses"], exact["losses"])
    assert_same(low, exact, 0.3)
    with torch.no_grad():
        model.token_losses(*packed_documents((5, 3)), True)
    losses_and_gradients(model.view(), True)
    assert len(products) == count


COMPILE = """
import os
import re
import subprocess
import sys
sys.path.insert(0, sys.argv[1])
import torch
import gpt_kernels as g
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

KINDS = {"i32": "T M n stride v_stride", "fp32": "slope factor decay beta2", "*i32": "negative",
         "*fp8e4nv": "x_fp8 u_fp8 z_fp8 dx_fp8 dqkv_fp8 scores_fp8",
         "*i64": "slots targets hints",
         "*fp32": "lse nll log_q cap_pos cap_neg dnll dcaps square on debias rates weight gate mix "
         "cos sin gain alpha gates dmix dgain dweight dgate dalpha inverse x_scale w_scale "
         "unit_scale scales"}
KINDS = {argument: kind for kind, arguments in KINDS.items() for argument in arguments.split()}
NONE_WITHOUT = dict(GATE="gate_input gate gates dgate_input dgate", ALPHA="alpha dalpha",
                    SKIP="skip weight gate dskip dweight dgate", UNIT="x_scale w_scale out_fp8")

def kind(name, argument):
    special = dict(p="*fp32" if name == "adamw" else "*bf16", scale="fp32" if "xsa" in name else "*fp32")
    return special.get(argument) or KINDS.get(argument, "*bf16")

def compile(name, constants, descriptors={}, **options):
    kernel = getattr(g, name + "_kernel")
    kernel = kernel.kernel if isinstance(kernel, g.RowKernel) else kernel
    none = [a for switch, arguments in NONE_WITHOUT.items() if not constants.get(switch, True) for a in arguments.split()]
    none += ["gate", "dgate"] * (constants.get("SKIP") == 1) + ["v"] * (name == "prepare_heads_forward" and constants["COPIES"] == 1)
    none += ["hidden"] * (name == "mlp_product" and not constants["BACKWARD"])
    constants = {a: None for a in kernel.arg_names if a in none} | constants
    kinds = {a: "constexpr" if a in constants else descriptors.get(a) or kind(name, a) for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if kinds[a][0] == "*"}
    source = (GluonASTSource if name == "mlp_product" else ASTSource)(
        kernel, kinds, {(kernel.arg_names.index(a),): v for a, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 232_448, (name, constants, compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    words = [word for word in ("wgmma.mma_async", "f32.e4m3.e4m3", "cvt.rn.satfinite.e4m3x2.f32", "cp.async.bulk.tensor",
                               "setmaxnreg") if word in ptx]
    if descriptors:  # registers that did not suffice would lie on the stack
        with open("kernel.cubin", "wb") as file:
            file.write(compiled.asm["cubin"])
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        said = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
        words += re.findall("(?:STACK|LOCAL):[0-9]+", said)
    if name == "mlp_product":  # the compiler gives the place of a barrier that is never used to data, which it then spoils
        places = dict(re.findall(r"add\\.s32\\s+(%r\\d+), %r\\d+, (\\d+);", ptx))
        first = min(int(places[r]) for r in re.findall(r"mbarrier\\.init\\.shared::cta\\.b64 \\[(%r\\d+)\\]", ptx))
        size, parts = (1, 3) if constants["UNIT"] else (2, 2)  # bytes of what comes in and of what leaves
        tiles, ring = constants["BM"] * constants["K"], constants["STAGES"] * constants["BK"] * constants["BN"]
        assert first >= size * (tiles + ring) + parts * constants["BM"] * constants["BN"], (first, constants)
    print(name, len(ptx), "|".join(words))

compile("fp8_rows", dict(D=512, ROWS=4, STAGES=1), num_warps=4)
compile("nll_forward", dict(V=8192, BLOCK=8192, HINTS=1, PLACES=1), num_warps=4)
compile("nll_forward", dict(V=8192, BLOCK=8192, HINTS=6, PLACES=8), num_warps=4)
for caps in (False, True):
    compile("nll_backward", dict(V=8192, BLOCK=8192, CAPS=caps, scores_fp8=None, scales=None), num_warps=8)
    compile("nll_backward", dict(V=8192, BLOCK=8192, CAPS=caps), num_warps=8)
compile("adamw", dict(BLOCK=1024))
for way in ("forward", "backward"):
    unit = dict(UNIT=0.0625) if way == "forward" else {}
    cases = [(f"mix_norm_{way}", dict(D=512, SKIP=skip, KEEP_STREAM=keep, CHANNELS=12) | unit)
             for skip, keep in ((0, False), (1, False), (2, True))]
    cases += [(f"prepare_heads_{way}", dict(HEADS=8, KV_HEADS=4, COPIES=copies, D=64, HALF=8)) for copies in (1, 2)]
    cases += [(f"xsa_gate_{way}", dict(GATE=gate, ALPHA=alpha, KV_HEADS=4, GROUP=2, D=64, CHANNELS=12, PADDED=16) | unit)
              for gate, alpha in ((True, False), (False, True))]
    cases += [(f"add_norm_{way}", dict(D=512) | unit)]
    cases += [(f"add_norm_{way}", dict(D=512, y=None) | unit)] * (way == "forward")
    # What keeps most rows at a time fits for wider models too.
    cases += [(f"mix_norm_{way}", dict(D=1024, SKIP=2, KEEP_STREAM=False, CHANNELS=12) | unit),
              (f"add_norm_{way}", dict(D=1024) | unit)]
    for name, constants in cases:
        kernel = getattr(g, name + "_kernel")
        tile = kernel.tile(torch.empty(1, constants["D"] * constants.get("HEADS", 1)))
        compile(name, constants | tile, num_warps=kernel.warps)
for low in (False, True):
    for backward in (False, True):
        c = g.MLP_FP8_TILE if low else g.MLP_TILE
        part, of_w = [c["BM"], c["BN"] // 4], [c["BK"], c["BN"]] if backward and not low else [c["BN"], c["BK"]]
        blocks = dict(x=[c["BM"], c["BK"]], w=of_w, hidden=part, out=part, out_fp8=part)
        types = {a: ("fp8e4nv", g.gl.float8e4nv) if low and a in ("x", "w", "out_fp8") else ("bf16", g.gl.bfloat16) for a in blocks}
        unit = (g.DHIDDEN_UNIT if backward else g.HIDDEN_UNIT) if low else None
        compile("mlp_product", c | dict(K=512, N=2048, BACKWARD=backward, UNIT=unit),
                {a: f"tensordesc<{types[a][0]}[{block[0]},{block[1]}],"
                 f"{g.gl.NVMMASharedLayout.get_default_for(block, types[a][1])!r}>" for a, block in blocks.items()}, num_warps=4)
BM, BN, BK, warps, stages = g.FP8_TILE.values()
for add, per_row, K, unit in ((True, False, 2048, dict(UNIT=1.0, unit_scale=None)), (False, True, 512, dict(UNIT=2.0 ** 17))):
    compile("fp8_product", dict(BM=BM, BN=BN, BK=BK, PER_ROW=per_row, ADD=add, N=512, K=K) | unit, dict(
            x=f"tensordesc<fp8e4nv[{BM},{BK}]>", w=f"tensordesc<fp8e4nv[{BN},{BK}]>", out=f"tensordesc<bf16[{BM},{BN // 2}]>"),
            num_warps=warps, num_stages=stages)
"""


def test_kernels_of_the_packed_script_compile_for_hopper(root, tmp_path):
    """The interpreter takes what the compiler refuses, such as the globals that a minifier makes of literals."""
    [inside] = re.findall(r'b85decode\("([^"]+)"\)', pack_submission.packed_code().decode())
    for name, text in json.loads(brotli.decompress(base64.b85decode(inside))).items():
        (tmp_path / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    run = subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 7 + 12 + 10 + 4 + 2
    products = [line.split()[2] for line in lines if line.split()[0] in ("mlp_product", "fp8_product")]
    low, fits = "wgmma.mma_async|f32.e4m3.e4m3", "STACK:0|LOCAL:0"
    assert products == [f"wgmma.mma_async|cp.async.bulk.tensor|setmaxnreg|{fits}"] * 2 + [
        f"{low}|cvt.rn.satfinite.e4m3x2.f32|cp.async.bulk.tensor|setmaxnreg|{fits}"] * 2 + [
        f"{low}|cp.async.bulk.tensor|{fits}"] * 2
    every = set(re.findall(r"^def (\w+)_kernel\(", (root / "gpt_kernels.py").read_text(), flags=re.M)) - {"attention", "row"}
    assert every == {line.split()[0] for line in lines}


def test_kernels_leave_the_launchers_own_names_alone(root):
    """Launches pass arguments by keyword, and Triton takes some of them for its own; its interpreter does not."""
    own = {"stream", "device", "device_type", "grid", "warmup", "num_warps", "num_stages", "num_ctas", "maxnreg"}
    functions = [node for node in ast.walk(ast.parse((root / "gpt_kernels.py").read_text()))
                 if isinstance(node, ast.FunctionDef)
                 and any(re.match("jit|gluon_jit|row_kernel", ast.unparse(decorator)) for decorator in node.decorator_list)]
    assert len(functions) > 30
    for function in functions:
        assert not own & {argument.arg for argument in function.args.args}, function.name
