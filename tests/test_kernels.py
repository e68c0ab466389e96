"""The kernels of test-time training: references against naive formulas, the Triton versions, interpreted, against them."""
import base64
import json
import os
import re
import subprocess
import sys

import brotli
import pytest
import torch

import train_gpt as kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are compiled; see test_gpu.py")
torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def attention_case(lengths, begins, heads, kv_heads, room, D=16, seed=0):
    """Random rows with NaN wherever the cache holds nothing that a row may see."""
    g = generator(seed)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total, rows = int(cu[-1]), len(lengths)
    q, k, v = (torch.randn(total, h, D, generator=g, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    slots = torch.randperm(rows + 2, generator=g)[:rows]
    keys, values = torch.full((2, rows + 2, room, kv_heads, D), float("nan"))
    for slot, begin in zip(slots, begins):
        held = torch.arange(max(0, begin - room), begin) % room
        keys[slot, held], values[slot, held] = torch.randn(2, len(held), kv_heads, D, generator=g)
    return q, k, v, cu, max(lengths), keys, values, slots, torch.tensor(begins)


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


@pytest.mark.parametrize("lengths, begins, heads, kv_heads, room, window", [
    ([5], [0], 2, 1, 32, 32),  # one row without a past
    ([1], [7], 2, 2, 16, 16),  # one token
    ([3, 1, 17, 8], [0, 40, 5, 150], 4, 2, 64, 48),  # ring wraps, window below begin
    ([70, 1, 33], [100, 0, 333], 4, 1, 160, 160),  # four heads share, several own blocks and tiles
    ([70, 140], [200, 3], 2, 2, 256, 192),  # none share; own tokens over two tiles
    ([20, 9], [64, 65], 4, 2, 64, 64),  # the whole room
    ([30, 4], [50, 6], 2, 1, 40, 16),  # a row longer than the window sees no past
])
@pytest.mark.parametrize("expanded", [False, True])
def test_attention_kernels(lengths, begins, heads, kv_heads, room, window, expanded):
    q, k, v, *rest = attention_case(lengths, begins, heads, kv_heads, room)
    compare(kernels.CachedAttention.apply, kernels.reference_cached_attention, (q, k, v), (*rest, window), expanded)


@pytest.mark.parametrize("seed", range(6))
def test_attention_kernels_on_random_rows(seed):
    g = generator(seed)
    rows = int(torch.randint(1, 7, (1,), generator=g))
    lengths = torch.randint(1, 80, (rows,), generator=g).tolist()
    begins = [0 if i % 3 == 1 else int(torch.randint(400, (1,), generator=g)) for i in range(rows)]
    kv_heads, group = 1 + seed % 2, (1, 2, 4)[seed % 3]
    q, k, v, cu, longest, *rest = attention_case(lengths, begins, kv_heads * group, kv_heads, 131, seed=seed)
    arguments = cu, longest + 70 * (seed % 2), *rest, (131, 100)[seed % 2]  # the bound need not be tight
    compare(kernels.CachedAttention.apply, kernels.reference_cached_attention, (q, k, v), arguments)


def test_attention_kernels_take_strided_inputs_and_odd_head_widths():
    q, k, v, *rest = attention_case([9, 20], [30, 2], 4, 2, 64, D=64)
    packed = torch.cat((q, k, v), 1).detach()
    compare(lambda x, *a: kernels.CachedAttention.apply(*x.split((4, 2, 2), 1), *a),
            lambda x, *a: kernels.reference_cached_attention(*x.split((4, 2, 2), 1), *a), (packed,), (*rest, 50))


def test_a_row_does_not_depend_on_the_others():
    q, k, v, cu, longest, keys, values, slots, begins = attention_case([40, 9, 70], [100, 3, 10], 4, 2, 128)
    together = kernels.CachedAttention.apply(q, k, v, cu, longest, keys, values, slots, begins, 128)
    alone = kernels.CachedAttention.apply(q[40:49], k[40:49], v[40:49], cu[1:3] - cu[1], 9, keys, values, slots[1:2],
                                          begins[1:2], 128)
    assert torch.equal(together[40:49], alone)


@pytest.mark.parametrize("function", [kernels.reference_cached_attention, kernels.CachedAttention.apply])
def test_chunks_equal_attention_over_the_whole_document(function):
    g, heads, kv_heads, D, room, window = generator(), 4, 2, 16, 48, 40
    documents = [torch.randn(n, heads + 2 * kv_heads, D, generator=g) for n in (100, 37, 64)]
    keys, values = torch.full((2, 5, room, kv_heads, D), float("nan"))
    outputs, done, slots, chunk = [[] for _ in documents], [0, 0, 0], torch.tensor([4, 0, 2]), 0
    while any(at < len(doc) for at, doc in zip(done, documents)):
        live = [i for i, doc in enumerate(documents) if done[i] < len(doc)]
        lengths = [min(7 + 5 * i + chunk % 3, len(documents[i]) - done[i]) for i in live]
        rows = torch.cat([documents[i][done[i]:done[i] + n] for i, n in zip(live, lengths)])
        q, k, v = (x.requires_grad_() for x in rows.split((heads, kv_heads, kv_heads), 1))
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        begins = torch.tensor([done[i] for i in live])
        index = kernels.ring_index(cu, slots[live], begins, len(rows), room)
        out = function(q, k, v, cu, max(lengths), keys, values, slots[live], begins, window)
        before = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
        kernels.store(keys, values, k, v, index)
        if function is not kernels.reference_cached_attention:  # what a row sees survives the storing of the row
            assert all(map(torch.equal, before, torch.autograd.grad(out.square().sum(), (q, k, v))))
        for i, piece in zip(live, out.detach().split(lengths)):
            outputs[i].append(piece)
            done[i] += len(piece)
        chunk += 1
    for doc, pieces in zip(documents, outputs):
        q, k, v = (x.transpose(0, 1) for x in doc.split((heads, kv_heads, kv_heads), 1))
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        at = torch.arange(len(doc))
        end = ends[torch.searchsorted(ends, at, right=True)]  # of the chunk a query lies in
        visible = (at <= at[:, None]) & (at >= (end - window)[:, None])
        k, v = k.repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0)
        weights = (q @ k.transpose(1, 2) / D ** 0.5).masked_fill(~visible, float("-inf")).softmax(-1)
        torch.testing.assert_close(torch.cat(pieces), (weights @ v).transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_ring_index_counts_every_token():
    cu, slots, begins = torch.tensor([0, 3, 4, 9], dtype=torch.int32), torch.tensor([2, 0, 5]), torch.tensor([0, 11, 6])
    wanted = [2 * 8 + 0, 2 * 8 + 1, 2 * 8 + 2, 0 * 8 + 3, 5 * 8 + 6, 5 * 8 + 7, 5 * 8 + 0, 5 * 8 + 1, 5 * 8 + 2]
    index = kernels.ring_index(cu, slots, begins, 9, 8)
    assert index.tolist() == wanted and index.dtype == torch.int64
    keys, values, k = torch.zeros(6, 8, 2, 4), torch.zeros(6, 8, 2, 4), torch.randn(9, 2, 4, requires_grad=True)
    kernels.store(keys, values, k, -k, index)
    assert torch.equal(keys.view(-1, 2, 4)[index], k) and torch.equal(values, -keys) and int((keys != 0).sum()) == 72


@pytest.mark.parametrize("T, V, caps, dtype", [
    (5, 100, (30.0, 30.0), torch.float32),
    (4, 8192, (20.0, 35.0), torch.float32),
    (3, 5000, (torch.tensor(15.0), torch.tensor(25.0, requires_grad=True)), torch.float32),
    (1, 64, (2.0, 3.0), torch.float32),
    (6, 8192, (30.0, 20.0), torch.bfloat16),
])
@pytest.mark.parametrize("expanded", [False, True])
def test_two_value_nll(T, V, caps, dtype, expanded):
    g = generator()
    scores = (12 * torch.randn(T, V + 3, generator=g)).to(dtype)[:, :V]
    scores[0, :3] = torch.tensor([0.0, 90.0, -90.0])
    targets, hints = torch.randint(V, (2, T), generator=g)
    targets[0] = 1
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # of the gradient, rounded to bf16 by both
    arguments = *caps, targets, hints
    compare(lambda *a: kernels.TwoValueNLL.apply(*a)[0], lambda *a: kernels.reference_two_value_nll(*a)[0], (scores,),
            arguments, expanded, tolerance)
    results = [f(scores, *arguments) for f in (kernels.TwoValueNLL.apply, kernels.reference_two_value_nll)]
    for ours, theirs in zip(*results):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-5)


def test_hints_carry_no_gradient():
    scores, ids = torch.randn(3, 20, requires_grad=True), torch.tensor([1, 2, 3])
    for function in (kernels.TwoValueNLL.apply, kernels.reference_two_value_nll):
        nll, log_q = function(scores, 30.0, 30.0, ids, ids)
        assert nll.requires_grad and not log_q.requires_grad
        torch.testing.assert_close(nll.detach(), -log_q)


@pytest.mark.parametrize("n", [7, 1024, 2500])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_rows(n, beta1, dtype):
    results = []
    rate = torch.tensor([0.01, 0.02, 0.5, 0.001])
    slots, on, count = torch.tensor([4, 0, 2, 5]), torch.tensor([True, True, False, True]), torch.tensor([1.0, 3.0, 1.0, 50.0])
    for function in (kernels.triton_adamw_rows, kernels.reference_adamw_rows):
        g = generator()
        p, square, mean = torch.randn(3, 6, n, generator=g)
        work, grad = p.to(dtype), torch.randn(4, n, generator=g).to(dtype)
        mean = mean if beta1 else None
        states = [x for x in (p, work, square.abs_(), mean) if x is not None]
        before = [x.clone() for x in states]
        function(p, work, square, mean, slots, on, grad, count, rate, 0.1, beta1, 0.99)
        for state, old in zip(states, before):
            assert all(torch.equal(state[i], old[i]) == (i in (1, 2, 3)) for i in range(6))
        ulp = 2.0 ** -7 if dtype == torch.bfloat16 and function is kernels.triton_adamw_rows else 0  # interpreted, it truncates
        torch.testing.assert_close(work.float(), p.to(dtype).float(), rtol=ulp, atol=0)
        results.append(states)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.dtype == torch.float32 else 1e-2, atol=1e-6)


def test_adamw_rows_agrees_with_torch():
    x, g = torch.randn(1, 30, generator=generator()), torch.randn(5, 1, 30, generator=generator(1))
    p, square, mean, work = x.clone(), torch.zeros(1, 30), torch.zeros(1, 30), x.bfloat16()
    theirs = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.1)
    for step in range(5):
        count, on = torch.full((1,), step + 1.0), torch.ones(1, dtype=torch.bool)
        kernels.adamw_rows(p, work, square, mean, torch.zeros(1, dtype=torch.long), on, g[step], count, torch.full((1,), 0.01), 0.1, 0.9, 0.99)
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


COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
import train_gpt as g
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

attention = dict(KV_HEADS=4, GROUP=2, D=64, BLOCK_N=64)
pointers = dict(cu="i32", slots="i64", begins="i64", lse="fp32", delta="fp32", scores="fp32", targets="i64", hints="i64", nll="fp32",
                log_q="fp32", cap_pos="fp32", cap_neg="fp32", dnll="fp32", dscores="fp32", p="fp32", square="fp32", mean="fp32",
                on="fp32", debias1="fp32", debias2="fp32", rates="fp32")
numbers = dict(window="i32", room="i32", stride="i32", n="i32", scale="fp32", decay="fp32", beta1="fp32", beta2="fp32")
for name, constants in (("attention_forward_kernel", attention | dict(BLOCK_M=128)), ("attention_dq_kernel", attention | dict(BLOCK_M=64)),
                        ("attention_dkv_kernel", attention | dict(BLOCK_M=64)), ("nll_forward_kernel", dict(V=8192, BLOCK=4096)),
                        ("nll_backward_kernel", dict(V=8192, BLOCK=4096)), ("adamw_kernel", dict(HAS_MEAN=True, BLOCK=1024))):
    kernel = getattr(g, name)
    kinds = {a: "constexpr" if a in constants else numbers.get(a) or "*" + pointers.get(a, "bf16") for a in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs={(kernel.arg_names.index(a),): v for a, v in constants.items()})
    print(name, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_compile_for_hopper_also_from_the_packed_script(packed, root, tmp_path):
    """The interpreter takes what the compiler refuses, such as the globals that a minifier makes of literals."""
    folder = root
    if packed:
        folder = tmp_path
        [inside] = re.findall(r'b85decode\("([^"]+)"\)', kernels.packed_code().decode())
        for name, text in json.loads(brotli.decompress(base64.b85decode(inside))).items():
            (folder / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    run = subprocess.run([sys.executable, "-c", COMPILE, str(folder)], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.splitlines()) == 6
