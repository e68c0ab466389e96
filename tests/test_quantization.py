"""Quantization in train_gpt.py against plain references, brute force and hand arithmetic, on the CPU."""
import itertools
import math
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import train_gpt as g
from tests.synthetic import BOS, changed, documents, runtime, tiny, write_data
from tests.test_train_gpt import (CONFIGURATIONS, packed_documents, problems as complaints, random_model, reference_settings)

torch.set_num_threads(1)  # the matrices are tiny

# The state machine, once more: next state by state and parity, and what a code's value is off by.
NEXT = ((0, 1), (2, 3), (5, 4), (7, 6), (1, 0), (3, 2), (4, 5), (6, 7))
OFFSET = (-0.25, 0.25) * 4


def rule(**environ) -> g.Settings:
    """The published quantizer: float16 scales by deviation, rounding to nearest."""
    given = dict(STEP_RULE="sigma") | environ
    return g.Settings.from_environment({name: str(value) for name, value in given.items()})


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(layers: int, columns: int, seed: int = 1, spread: float = 0.5) -> torch.Tensor:
    """Hessians of correlated inputs, each layer's with an order of variances of its own."""
    mix = torch.eye(columns) + 1.5 * normal(layers, columns, columns, seed=seed) / math.sqrt(columns)
    scale = (spread * normal(layers, 1, columns, seed=seed + 2)).exp()
    x = normal(layers, 4 * columns, columns, seed=seed + 1) @ mix * scale
    return x.mT @ x / (4 * columns)


def problem(weight, hessian=None, curvature=None, bits=6, clip=12.0, visits=None) -> g.Problem:
    layers, rows, columns = weight.shape
    hessian = torch.eye(columns).repeat(layers, 1, 1) if hessian is None else hessian
    return g.Problem(g.Role("", 0, "", slice(None), bits, clip), weight, hessian,
                     torch.ones(layers, rows) if curvature is None else curvature,
                     torch.ones(layers) if visits is None else visits)


def damped(hessian: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """One layer's Hessian with `share` of its mean diagonal on the diagonal, float64."""
    h = hessian.double()
    return h + share * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def losses_of(p: g.Problem, error: torch.Tensor) -> torch.Tensor:
    """The predicted loss per layer, by its definition, float64."""
    e, h, c = error.double(), p.hessian.double(), p.curvature.double()
    return torch.einsum("lr,lrj,ljk,lrk->l", c, e, h, e) / 2


def published(p: g.Problem, spared=None, fine_bits: int = 8) -> g.Quantized:
    """The published quantizer; spared: the mask of the columns that AWQ-lite is made to choose."""
    s = rule(AWQ_LITE_ENABLED=int(spared is not None), AWQ_LITE_BITS=fine_bits, MATRIX_BITS=2)
    mask = torch.zeros_like(p.inputs, dtype=torch.bool) if spared is None else spared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "choose_awq_columns", lambda problems, s: {"a": mask})
        return g.quantize_published({"a": p}, s)["a"]


def by_loss(p: g.Problem, octaves: float, steps: g.LossSteps | None = None) -> g.Quantized:
    return g.quantize_by_loss({"a": p}, {"a": steps or g.steps_by_loss(p)}, octaves)["a"]


def octaves_for(p: g.Problem, bits: float) -> float:
    """A common factor that gives about `bits` bits per weight."""
    deviation = p.weight.std(2).clamp(min=1e-4).log2()
    return float((deviation - g.steps_by_loss(p).row_octaves).mean()) + 2.05 - bits


def order_0_bits(codes) -> float:
    counts = np.unique(np.asarray(codes), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# --- hessian_factor


def test_factor_of_the_permuted_damped_hessian():
    hessian = correlated(3, 40)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    factor = g.hessian_factor(hessian, order)
    assert not factor.tril(-1).any()
    for h, o, r in zip(hessian, order, factor.double()):
        torch.testing.assert_close(r @ r.T, damped(h)[o][:, o], rtol=1e-5, atol=1e-5)


def test_dead_columns_do_not_touch_the_others():
    hessian, dead = correlated(2, 20), torch.tensor([3, 4, 19])
    hessian[1, dead] = 0
    hessian[1, :, dead] = 0
    order = torch.arange(20).flip(0).repeat(2, 1)
    factor = g.hessian_factor(hessian, order).double()
    product = (factor @ factor.mT).flip(1, 2)
    torch.testing.assert_close(product[0], damped(hessian[0]), rtol=1e-5, atol=1e-5)
    live = torch.tensor([i for i in range(20) if i not in dead])
    torch.testing.assert_close(product[1][live][:, live], damped(hessian[1])[live][:, live], rtol=1e-5, atol=1e-5)
    assert product[1][dead][:, live].abs().max() < 1e-6 and (product[1].diagonal()[dead] > 0).all()


def test_a_layer_without_any_input_has_a_factor_too():
    factor = g.hessian_factor(torch.zeros(1, 5, 5), torch.arange(5)[None])
    assert factor.isfinite().all() and (factor.diagonal(dim1=1, dim2=2) > 0).all()


def test_damping_rises_tenfold_only_where_it_must():
    turn = torch.linalg.qr(normal(16, 16))[0]
    good = correlated(1, 16)[0]
    spectra = [torch.linspace(0.2, 1.8, 16), torch.linspace(0.2, 1.8, 16)]  # mean 1, but for the lowest
    spectra[0][0], spectra[1][0] = -0.05, -0.5
    hessian = torch.stack([good, *(turn @ torch.diag(v) @ turn.T for v in spectra)])
    hessian = (hessian + hessian.mT) / 2
    factor = g.hessian_factor(hessian, torch.arange(16).repeat(3, 1)).double()
    for h, r, share in zip(hessian, factor, (0.01, 0.1, 1.0)):
        torch.testing.assert_close(r @ r.T, damped(h, share), rtol=1e-5, atol=1e-5)


@contextmanager
def at_most(seconds: float):
    """Break off what takes longer."""
    def stop(number, frame):
        raise TimeoutError(f"no end after {seconds} s")
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_does_not_raise_the_damping_for_ever(value):
    hessian = torch.eye(4)[None].clone()
    hessian[0, 1, 1] = value
    with at_most(60), pytest.raises((ArithmeticError, ValueError, RuntimeError, AssertionError)):
        g.hessian_factor(hessian, torch.arange(4)[None])


# --- GPTQ


def obs_codes(weight, hessian, order, step, bound):
    """Optimal brain quantization of one layer, column after column: invert what is left, round, make good. Float64."""
    h, w, step = damped(hessian)[order][:, order], weight.double()[:, order].clone(), step.double()
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for j, column in enumerate(order.tolist()):
        inverse = torch.linalg.inv(h[j:, j:])
        code = (w[:, j] / step[:, column]).round().clamp(-bound[column], bound[column])
        w[:, j:] -= ((w[:, j] - code * step[:, column]) / inverse[0, 0])[:, None] * inverse[0]
        codes[:, column] = code.to(torch.int8)
    return codes


@pytest.mark.parametrize("fine", [[], [(1, 32), (2, 144)]], ids=["one step", "AWQ-lite"])
def test_gptq_is_column_by_column_obs(fine):
    weight, hessian = normal(3, 12, 160), correlated(3, 160)
    p, spared = problem(weight, hessian), torch.zeros(3, 160, dtype=torch.bool)
    step = (12 * weight.std(2) / 31).half().float()[..., None].repeat(1, 1, 160)
    bound = torch.full((3, 160), 31)
    for layer, first in fine:
        spared[layer, first:first + 16] = True
        step[layer, :, first:first + 16] *= 31 / 127
        bound[layer, first:first + 16] = 127
    q = published(p, spared if fine else None)
    torch.testing.assert_close(g.step_sizes(q), step)
    orders = [torch.from_numpy(np.argsort(-h.diagonal().numpy(), kind="stable")) for h in hessian]
    assert not torch.equal(orders[0], orders[1])
    expected = torch.stack([obs_codes(*each) for each in zip(weight, hessian, orders, step, bound)])
    same = (q.codes == expected).all(2)
    assert same.float().mean() > 0.9, "rounding in float32 may tip a row over, not many"
    error = [losses_of(p, weight - step * codes.float()) for codes in (q.codes, expected)]
    torch.testing.assert_close(error[0], error[1], rtol=0.02, atol=0)


def test_without_correlation_gptq_is_plain_rounding():
    weight = normal(2, 30, 140)
    q = published(problem(weight))
    step = q.row_scale.float()[..., None]
    assert torch.equal(q.codes, (weight / step).round().to(torch.int8))
    assert (weight - g.dequantize(q)).abs().max() <= 0.5001 * step.max()


@pytest.mark.parametrize("columns", [60, 200])
def test_gptq_loses_less_than_rounding(columns):
    p = problem(normal(2, 40, columns), correlated(2, columns))
    q = published(p)
    plain = g.step_sizes(q) * (p.weight / g.step_sizes(q)).round()
    assert (losses_of(p, p.weight - g.dequantize(q)) < 0.8 * losses_of(p, p.weight - plain)).all()


def test_codes_stay_within_their_bits():
    p = problem(normal(2, 30, 64), correlated(2, 64), bits=3, clip=2.0)
    q = published(p)
    assert q.codes.min() == -3 and q.codes.max() == 3
    inside = torch.zeros(2, 64, dtype=torch.bool)
    inside[1, 16:48] = True
    q = published(p, inside, fine_bits=6)
    inside = inside[:, None].expand_as(q.codes)
    assert q.codes[~inside].abs().max() == 3 and 20 < q.codes[inside].abs().max() <= 31


# --- Trellis


def decoded(q: g.Quantized) -> torch.Tensor:
    """The weights by the state machine, one code at a time."""
    layers, rows, columns = q.codes.shape
    result = torch.empty(q.codes.shape)
    for i in range(layers):
        scales = q.column_scale[i].tolist()
        order = sorted(range(columns), key=lambda j: scales[j])
        for r in range(rows):
            row, state = 2.0 ** (q.row_scale[i, r].item() / 8), 0
            for j in order:
                code = q.codes[i, r, j].item()
                result[i, r, j] = row * 2.0 ** (scales[j] / 4) * (code + OFFSET[state])
                state = NEXT[state][code % 2]
    return result


@pytest.mark.parametrize("start", [0, 3, 6])
def test_trellis_finds_the_best_of_all_sequences(start):
    sequences = np.array(list(itertools.product(range(-3, 4), repeat=6)))
    state, values = np.full(len(sequences), start), np.empty(sequences.shape)
    for j, codes in enumerate(sequences.T):
        values[:, j] = codes + np.array(OFFSET)[state]
        state = np.array(NEXT)[state, codes % 2]
    weight, step = 1.5 * normal(2, 6, 6), 0.5 + normal(2, 6, 6, seed=1).abs()
    diagonal = 0.5 + normal(2, 6, seed=2).abs()
    codes, errors, ends = g.trellis_block(weight, torch.diag_embed(diagonal), step, torch.full((2, 1, 6), 3.0),
                                          torch.full((2, 6), start))
    for i, r in itertools.product(range(2), range(6)):
        all_errors = (weight[i, r].numpy() - step[i, r].numpy() * values) / diagonal[i].numpy()
        cost = (all_errors ** 2).sum(1)
        best = cost.argmin()
        assert (errors[i, r] ** 2).sum().item() == pytest.approx(cost[best], rel=1e-4)
        assert codes[i, r].tolist() == sequences[best].tolist() and ends[i, r] == state[best]
        np.testing.assert_allclose(errors[i, r].numpy(), all_errors[best], atol=1e-4)


def test_the_decoder_sees_what_the_encoder_saw(monkeypatch):
    """160 columns: the state crosses a block's border. The encoder's errors, squared, must add up to the weighted error."""
    p = problem(normal(2, 8, 160), correlated(2, 160), curvature=normal(2, 8, seed=3).exp())
    seen, plain = [], g.trellis_block
    monkeypatch.setattr(g, "trellis_block", lambda *a: seen.append(plain(*a)) or seen[-1])
    q = by_loss(p, octaves_for(p, 3.3))
    assert len(seen) == 2
    assert len(q.column_scale.unique()) > 4
    assert not torch.equal(g.trellis_order(q.column_scale)[0], torch.arange(160))
    weights = g.dequantize(q)
    torch.testing.assert_close(weights, decoded(q), rtol=1e-6, atol=0)
    believed = torch.cat([errors for _, errors, _ in seen], dim=2).double().square().sum(2)
    for i in range(2):
        error = (p.weight - weights)[i].double()
        torch.testing.assert_close(believed[i], ((error @ damped(p.hessian[i])) * error).sum(1), rtol=1e-3, atol=0)


def rounded_alike(p: g.Problem, q: g.Quantized) -> g.Quantized:
    """Plain GPTQ with the steps of `q` in its order of columns; dequantize would add the trellis."""
    return g.gptq(p, q, torch.full_like(p.weight[:, :1], 127), g.trellis_order(q.column_scale), g.round_block)


def test_trellis_gain_on_a_gaussian_source():
    """At step 0.4 deviations rounding loses step^2 / 12; the trellis at least 18 % less, for as many bits."""
    weight = normal(1, 1024, 128)
    p = problem(weight)
    coded = by_loss(p, 0.0, g.steps_by_loss(p)._replace(row_octaves=torch.full((1, 1024), math.log2(0.4))))
    plain, step = rounded_alike(p, coded), 2 ** (round(8 * math.log2(0.4)) / 8)
    torch.testing.assert_close(g.step_sizes(coded), torch.full_like(weight, step))
    loss = [float((weight - w).square().mean()) for w in (step * plain.codes, g.dequantize(coded))]
    assert loss[0] == pytest.approx(step ** 2 / 12, rel=0.01)
    assert loss[1] < 0.82 * loss[0]
    assert order_0_bits(coded.codes) < 1.005 * order_0_bits(plain.codes)


def test_trellis_gain_with_correlated_inputs():
    """The same steps in the same order of columns, with and without trellis."""
    p = problem(normal(2, 64, 192), correlated(2, 192))
    coded = by_loss(p, octaves_for(p, 3.4))
    plain = rounded_alike(p, coded)
    weights = g.step_sizes(plain) * plain.codes, g.dequantize(coded)
    loss = [losses_of(p, p.weight - w).sum() for w in weights]
    assert loss[1] < 0.85 * loss[0]
    assert order_0_bits(coded.codes) < 1.01 * order_0_bits(plain.codes)


# --- Steps


def test_published_steps_by_hand():
    weight = normal(2, 20, 50) * normal(2, 20, 1, seed=4).exp() + 0.3
    p = problem(weight, correlated(2, 50), bits=5, clip=9.0)
    exact = 9.0 * weight.double().numpy().std(2, ddof=1) / 15
    scale = published(p).row_scale
    assert scale.dtype == torch.float16
    np.testing.assert_allclose(scale.double().numpy(), exact, rtol=2 ** -10)


@pytest.mark.parametrize("octaves", [None, -40.0, 0.0, 40.0])
def test_no_step_is_zero(octaves):
    """With the published quantizer (None) and by loss."""
    weight = normal(2, 8, 32)
    weight[0, 0], weight[0, 1], weight[1, 2] = 0, weight[0, 1] * 1e-12, 1e-30
    weight[1] *= 1e-6
    curvature = torch.ones(2, 8)
    curvature[:, 3], curvature[1, 4] = 0, 1e30
    p = problem(weight, correlated(2, 32), curvature)
    q = published(p) if octaves is None else by_loss(p, octaves)
    steps, weights = g.step_sizes(q), g.dequantize(q)
    assert (steps > 0).all() and steps.isfinite().all() and weights.isfinite().all()
    if octaves is None:
        assert not weights[0, 0].any()
    assert weights[0, :2].abs().max() < 1e-2, "rows of zeros stay next to zero"


def test_steps_by_loss_never_cut_a_weight_off():
    """However fine the steps were wanted, outliers included, int8 holds the codes without clipping."""
    weight = normal(2, 24, 96)
    weight[0, 3, 5], weight[1, 7, 90], weight[1, 8, 0] = 90, -300, 1e4
    curvature = (2 * normal(2, 24, seed=5)).exp()
    p = problem(weight, correlated(2, 96, spread=1.0), curvature)
    for bits in (2, 4, 7, 12):
        q = by_loss(p, octaves_for(p, bits))
        error, steps = (weight - g.dequantize(q)).abs(), g.step_sizes(q)
        big = weight.abs() > 50
        assert q.codes.dtype == torch.int8 and q.codes.min() >= -127
        assert (error[big] < 0.06 * weight.abs()[big] + 2 * steps[big]).all()
    q = by_loss(problem(weight, None, curvature), -30.0)  # nothing to make good: every error is a rounding error
    error = (weight - g.dequantize(q)).abs() / g.step_sizes(q)
    assert error.max() < 1.3 and q.codes.abs().max() <= 127


def test_steps_by_loss_follow_curvature_and_input():
    """Between the limits: a row's step goes with curvature^-1/2, a column's with its input's deviation^-1."""
    curvature = torch.tensor([[1.0, 4.0, 64.0]])
    deviation = torch.tensor([1.0, 2.0, 0.5, 1.0])
    p = problem(normal(1, 3, 4), torch.diag(deviation.square())[None], curvature)
    free = g.steps_by_loss(p)._replace(min_octaves=torch.full((1, 3), -99.0), max_octaves=torch.full((1, 3), 99.0))
    step = g.step_sizes(by_loss(p, 0.0, free))[0].log2()
    assert (step[0] - step[1]).tolist() == pytest.approx([1.0] * 4, abs=1 / 8)
    assert (step[0] - step[2]).tolist() == pytest.approx([3.0] * 4, abs=1 / 8)
    assert (step[0, 0] - step[0]).tolist() == pytest.approx([0.0, 1.0, -1.0, 0.0], abs=1 / 8 + 0.02)


def one_step_per_row(p: g.Problem) -> g.Quantized:
    """The published steps, on the grid and on a trellis."""
    level = published(p).row_scale.float().log2()
    column = torch.zeros(len(p.weight), p.weight.size(2), dtype=torch.int8)
    return by_loss(p, 0.0, g.LossSteps(level, level - 99, level + 99, column))


def test_steps_by_loss_lose_less_at_equal_bytes():
    """Than the published steps with the same search of codes, whose gain is measured above."""
    curvature = (1.2 * normal(3, 48, seed=6)).exp()
    p = problem(normal(3, 48, 160), correlated(3, 160, spread=0.7), curvature)
    equal, steps = one_step_per_row(p), g.steps_by_loss(p)
    allowed = len(entropy_coded({"a": equal}))
    low, high, best = -20.0, 20.0, None  # the smallest octaves that need no more bytes
    for _ in range(10):
        middle = (low + high) / 2
        q = by_loss(p, middle, steps)
        fits = len(entropy_coded({"a": q})) <= allowed
        low, high, best = (low, middle, q) if fits else (middle, high, best)
    loss = [float(losses_of(p, p.weight - g.dequantize(x)).sum()) for x in (equal, best)]
    assert loss[1] < 0.8 * loss[0]


def two_problems() -> dict[str, g.Problem]:
    curvature = normal(2, 256, seed=7).exp()
    return {"a": problem(normal(2, 256, 128), correlated(2, 128), curvature),
            "b": problem(0.1 * normal(1, 512, 128, seed=8), correlated(1, 128, seed=9))}


def entropy_coded(quantized: dict[str, g.Quantized]) -> bytes:
    return b"".join(g.EntropyCodec().pack({f"{name}.codes": q.codes.numpy() for name, q in quantized.items()}))


@pytest.mark.parametrize("max_bytes", [40_000, 50_000, 80_000])
def test_the_size_is_filled(max_bytes):
    """The packed size, not an estimate, ends just below the bound, and is that of what is returned."""
    packed = []
    result, data = g.quantize_to_size(two_problems(), lambda q: packed.append(entropy_coded(q)) or packed[-1], max_bytes)
    assert max_bytes - g.SPARE_BYTES < len(data) <= max_bytes and data == entropy_coded(result)
    assert len(packed) <= 4, "each costs seconds at full size"


def test_a_small_model_gets_six_bits_and_no_more():
    result, data = g.quantize_to_size(two_problems(), entropy_coded, 10_000_000)
    matrices = [matrix for q in result.values() for matrix in q.codes]
    bits = 8 * sum(map(g.order0_bytes, matrices)) / sum(matrix.numel() for matrix in matrices)
    assert 5.5 < bits < 6.2 and data == entropy_coded(result)


def test_a_size_that_cannot_be_kept_to_gives_the_last_result():
    result, data = g.quantize_to_size(two_problems(), entropy_coded, 10)
    assert len(data) > 10 and data == entropy_coded(result)


# --- LQER


def low_rank_settings(**environ):
    return rule(**dict(LQER_ENABLED=1) | environ)


def truncated(matrix, rank):
    u, sizes, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * sizes[:rank], v[:rank]


@pytest.mark.parametrize("rows, columns", [(60, 24), (24, 60), (30, 30)])
def test_top_singular_is_the_truncated_svd(rows, columns):
    matrix = normal(rows, columns) @ torch.diag(torch.linspace(2, 0.1, columns))
    left, right = g.top_singular(matrix, 5)
    a, b = truncated(matrix, 5)
    torch.testing.assert_close((left @ right).double(), a @ b, rtol=0, atol=1e-4)
    torch.testing.assert_close(right @ right.T, torch.eye(5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows, columns, group", [(60, 24, 8), (24, 60, 20), (24, 60, 90)])
def test_asymmetric_integers_by_hand(rows, columns, group):
    s = low_rank_settings(LQER_RANK=3, LQER_ASYM_GROUP=1)
    s = changed(s, lqer_asym_group=group)
    error = normal(rows, 3) @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ normal(3, columns, seed=1)
    fit = g.fit_low_rank(error, s)
    a, b = truncated(error, 3)
    signs = (fit.right.double() * b).sum(1).sign()  # those of singular vectors are free
    a, b = a * signs, b * signs[:, None]
    left_scale = float(a.abs().max() / 1.5)
    assert fit.left_scale.tolist() == pytest.approx([left_scale], rel=2e-3)
    groups = b.reshape(-1, group)
    right_scale = groups.abs().amax(1) / 7.5
    torch.testing.assert_close(fit.right_scale.double(), right_scale, rtol=2e-3, atol=0)
    left = torch.clamp((a / left_scale).round(), -2, 1)
    right = torch.clamp((groups / right_scale[:, None]).round(), -8, 7)
    near = 0.02  # codes on the brink may tip over, as scales are float16
    for got, exact, want in ((fit.left.double(), a / left_scale, left),
                             (fit.right.double().view_as(groups), groups / right_scale[:, None], right)):
        brink = (exact - exact.floor() - 0.5).abs() < near
        assert torch.equal(got[~brink], want[~brink]) and (got - want).abs().max() <= 1 and brink.float().mean() < 0.25
    assert fit.left.min() >= -2 and fit.left.max() <= 1 and fit.right.min() >= -8 and fit.right.max() <= 7
    product = (fit.left.double() * float(fit.left_scale)) @ (
        fit.right.double().view(-1, group) * fit.right_scale.double()[:, None]).view(3, columns)
    torch.testing.assert_close(fit.product().double(), product, rtol=1e-5, atol=1e-6)


def uncorrected(problems: dict[str, g.Problem]) -> dict[str, g.Quantized]:
    """All codes 0: the error of every matrix is the matrix itself."""
    return {name: g.Quantized(torch.zeros_like(p.weight, dtype=torch.int8), torch.ones(p.weight.shape[:2]).half(),
                              torch.ones_like(p.inputs), {})
            for name, p in problems.items()}


def chosen(problems, s) -> set:
    q = uncorrected(problems)
    g.correct_largest_errors(problems, q, s)
    for name, one in q.items():
        for layer, fit in one.low_rank.items():
            torch.testing.assert_close(g.dequantize(one)[layer], fit.product())
    return {(name, layer) for name, one in q.items() for layer in one.low_rank}


def matrices() -> dict[str, g.Problem]:
    """Norms and structure in different orders: tok_emb is the largest, mlp.fc 1 has rank one, attn.c_q 0 nearly so."""
    thin = normal(32, 1, seed=11) @ normal(1, 16, seed=12)
    fc = torch.stack((1.5 * normal(32, 16), thin))
    query = torch.stack((thin[:16] + 0.05 * normal(16, 16, seed=13), 0.1 * normal(16, 16, seed=14)))
    return {"tok_emb": problem(3 * normal(1, 64, 16, seed=15)), "mlp.fc": problem(fc), "attn.c_q": problem(query)}


@pytest.mark.parametrize("top_k, expected", [
    (0, set()),
    (1, {("tok_emb", 0)}),
    (2, {("tok_emb", 0), ("mlp.fc", 0)}),
    (9, {("tok_emb", 0), ("mlp.fc", 0), ("mlp.fc", 1), ("attn.c_q", 0), ("attn.c_q", 1)})])
def test_which_matrices_are_corrected(top_k, expected):
    """Those with the largest errors."""
    problems = matrices()
    norms = {(name, i): e.norm().item() for name, p in problems.items() for i, e in enumerate(p.weight)}
    assert set(sorted(norms, key=norms.get, reverse=True)[:top_k]) == expected
    assert chosen(problems, low_rank_settings(LQER_TOP_K=top_k, LQER_RANK=1, LQER_ASYM_GROUP=16)) == expected


def test_order0_bytes_by_hand():
    assert g.order0_bytes(torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]], dtype=torch.int8)) == pytest.approx(2.0)
    assert g.order0_bytes(torch.zeros(50, dtype=torch.int8)) == 0


# --- AWQ-lite


def fine_settings(**environ):
    return rule(**dict(AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_SIZE=8) | environ)


def saliency_problems() -> dict[str, g.Problem]:
    """Two matrices of 2 x 20 columns; what stands out are groups of a role at 8 bits and columns in no whole group."""
    hessian, weight = torch.diag_embed(1 + normal(2, 20).square()), normal(2, 30, 20, seed=1)
    eight = problem(50 * weight, hessian, bits=8)
    weight[:, :, 16:] *= 90
    return {"attn.c_q": problem(weight, hessian, visits=torch.tensor([1.0, 9.0])), "tok_emb": eight,
            "mlp.fc": problem(0.9 * weight.flip(1), hessian.flip(0))}


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
def test_groups_by_rms_times_mean_weight(top_k):
    problems, scores = saliency_problems(), {}
    for name in ("attn.c_q", "mlp.fc"):
        p = problems[name]
        for layer, group in itertools.product(range(2), range(2)):
            scores[name, layer, 8 * group] = sum(
                math.sqrt(p.hessian[layer, j, j] / p.visits[layer]) * p.weight[layer, :, j].abs().mean().item()
                for j in range(8 * group, 8 * group + 8))
    best = sorted(scores, key=scores.get, reverse=True)[:top_k]
    expected = {name: torch.zeros(2, 20, dtype=torch.bool) for name in problems}
    for name, layer, first in best:
        expected[name][layer, first:first + 8] = True
    s = fine_settings(AWQ_LITE_GROUP_TOP_K=top_k)
    spared = g.choose_awq_columns(problems, s)
    assert spared.keys() == problems.keys() and not spared["tok_emb"].any()
    for name, q in g.quantize_published(problems, s).items():
        assert torch.equal(spared[name], expected[name])
        coarse = 127 if name == "tok_emb" else 31
        torch.testing.assert_close(q.column_scale, torch.where(expected[name], coarse / 127, 1.0))


# --- The model's symmetries


def outputs(model, looping=True):
    ids, targets, segments = packed_documents((20, 1, 30, 13))
    with torch.no_grad():
        return model.logits(model(ids, segments, looping)), model.token_losses(ids, targets, segments, looping)


@pytest.mark.parametrize("step_rule", ["sigma", "loss"])
def test_sorted_hidden_units_leave_the_function_alone(step_rule):
    s = reference_settings(STEP_RULE=step_rule, EVAL_SEQ_LEN=48, VAL_BATCH_TOKENS=4096)
    model = random_model(s)
    windows = calibration_text(s, 3)
    statistics = g.calibrate(model, windows, True, s, runtime())
    before, weights = outputs(model), model.mlp_up_bank.detach().clone()
    g.sort_hidden_units(model, statistics)
    assert not torch.equal(model.mlp_up_bank, weights)
    for a, b in zip(before, outputs(model)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for i in range(s.num_layers):  # the same rows, put in order
        assert sorted(map(tuple, model.mlp_up_bank[i].tolist())) == sorted(map(tuple, weights[i].tolist()))
    keys = statistics.curvature["up"] if step_rule == "loss" else model.mlp_up_bank.detach().std(2)
    assert (keys.diff(dim=1) >= 0).all()
    again = g.calibrate(model, windows, True, s, runtime())
    for kind in ("hessian", "curvature"):
        for site, want in getattr(again, kind).items():
            torch.testing.assert_close(getattr(statistics, kind)[site], want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_hidden_units_are_sorted_without_statistics_too():
    model = random_model(reference_settings(STEP_RULE="sigma", GPTQ_CALIBRATION_BATCHES=0))
    before = outputs(model)
    g.sort_hidden_units(model, None)
    assert (model.mlp_up_bank.std(2).diff(dim=1) >= 0).all()
    torch.testing.assert_close(before[1], outputs(model)[1], rtol=1e-4, atol=1e-4)


# --- Problems


def test_every_role_has_its_own_matrices_inputs_and_outputs():
    """Against what the layers multiply with; the joint matrix holds 32 rows of queries, 16 of keys, 16 of values."""
    s = reference_settings(EVAL_SEQ_LEN=48, VAL_BATCH_TOKENS=4096)
    model = random_model(s)
    with torch.no_grad():
        model.attn_scale.fill_(1), model.mlp_scale.fill_(1)
    statistics = g.calibrate(model, calibration_text(s, 3), True, s, runtime())
    problems, layers = g.build_problems(model, statistics), model.layers()
    places = {"attn.c_q": ("qkv", "qkv", 0, 32), "attn.c_k": ("qkv", "qkv", 32, 48),
              "attn.c_v": ("qkv", "qkv", 48, 64), "attn.proj": ("out", "out", 0, 32),
              "mlp.fc": ("up", "up", 0, 128), "mlp.proj": ("down", "down", 0, 32)}
    assert set(problems) == {*places, "tok_emb"}
    for name, (site, matrix, first, last) in places.items():
        p = problems[name]
        for i, layer in enumerate(layers):
            assert torch.equal(p.weight[i], getattr(layer, matrix).w[first:last].detach()), name
        assert torch.equal(p.hessian, statistics.hessian[site]) and p.visits.tolist() == [1, 1, 3, 3, 1, 1]
        assert torch.equal(p.curvature, statistics.curvature[site][:, first:last])
    head = problems["tok_emb"]
    assert torch.equal(head.weight[0], model.tok_emb) and torch.equal(head.curvature, statistics.curvature["head"])
    assert sum(p.weight.numel() for p in problems.values()) == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("_bank") or n == "tok_emb")
    for p in problems.values():
        error = normal(*p.weight.shape)
        torch.testing.assert_close(p.predicted_loss(error).double(), losses_of(p, error), rtol=1e-4, atol=0)


def test_without_calibration_quantization_is_rounding():
    s = reference_settings(STEP_RULE="sigma", GPTQ_CALIBRATION_BATCHES=0)
    problems = g.build_problems(random_model(s), None)
    result = g.quantize_published(problems, s)
    for name, p in problems.items():
        bits, clip = (7, 14.0) if name == "tok_emb" else (6, 11.5 if name.startswith("mlp") else 13.0)
        step = result[name].row_scale.float()[..., None]
        wanted = clip * p.weight.std(2, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((step / wanted).log2().abs() <= 1 / 16 + 1e-4).all()
        assert torch.equal(result[name].codes, (p.weight / step).round().to(torch.int8))


# --- Calibration


def calibration_text(s: g.Settings, count: int, seed: int = 0, documents: int = 3) -> list[np.ndarray]:
    """Windows of EVAL_SEQ_LEN + 1 tokens that begin inside documents and hold several."""
    draw = np.random.default_rng(seed)
    windows = [draw.integers(2, s.vocab_size, s.eval_seq_len + 1) for _ in range(count)]
    for window in windows:
        window[draw.integers(0, s.eval_seq_len + 1, documents)] = BOS
    return windows


def watched(model, windows, looping, monkeypatch):
    """Every product's inputs and its outputs' gradients, by plain autograd, one document at a time, float64 sums.

    Returns ({(site, layer): [sum of x x^T, sum of squared gradients]}, [hidden states], [(ids, gradient at the embedding)]).
    """
    order, sums, hiddens, embedded = sum(model.orders[looping], []), {}, [], []
    lookup, rider = torch.nn.functional.embedding, g.Hooks()
    for window in windows:
        cuts = [0, *(t for t in range(1, len(window) - 1) if window[t] == BOS), len(window) - 1]
        for a, b in zip(cuts, cuts[1:]):
            ids, targets = torch.tensor(window[a:b]), torch.tensor(window[a + 1:b + 1])
            calls, rows = [], []

            def note(site, x, y, u):
                calls.append((site, x, y))
                return y

            def look_up(*arguments):
                rows.append(lookup(*arguments))
                return rows[-1]

            rider.block = lambda *_: dict(adapter=note)
            monkeypatch.setattr(torch.nn.functional, "embedding", look_up)
            hidden = model(ids, g.make_segments(np.array([0, b - a], dtype=np.int32), 10_000), looping, rider)
            monkeypatch.undo()
            loss = model.head_losses(hidden, targets).sum()
            gradients = torch.autograd.grad(loss, [y for *_, y in calls] + rows)
            visit = -1
            for (site, x, _), gradient in zip(calls, gradients):
                visit += site == "qkv"
                x, gradient = x.detach().double(), gradient.double()
                entry = sums.setdefault((site, order[visit]), [0, 0])
                entry[0] = entry[0] + x.T @ x
                entry[1] = entry[1] + gradient.square().sum(0)
            assert visit == len(order) - 1
            hiddens.append(hidden.detach())
            embedded.append((ids, gradients[-1].double()))
    return sums, hiddens, embedded


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("name", ["record", "one softcap"])
def test_statistics_are_those_of_plain_autograd(name, looping, monkeypatch):
    s = reference_settings(EVAL_SEQ_LEN=90, VAL_BATCH_TOKENS=4096, **CONFIGURATIONS[name])
    model, windows = random_model(s), calibration_text(s, 4)
    before = [p.detach().clone() for p in model.parameters()]
    statistics = g.calibrate(model, windows, looping, s, runtime())
    assert all(p.grad is None and p.requires_grad and torch.equal(p, b) for p, b in zip(model.parameters(), before))
    sums, hiddens, embedded = watched(model, windows, looping, monkeypatch)
    tokens = 4 * 90
    assert sum(len(h) for h in hiddens) == tokens
    visits = [sum(model.orders[looping], []).count(i) for i in range(6)]
    assert statistics.visits.tolist() == visits == ([1, 1, 3, 3, 1, 1] if looping else [1] * 6)
    assert set(statistics.hessian) == set(statistics.curvature) == {"head", "qkv", "out", "up", "down"}

    def close(got, want):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-4 * want.abs().max().item())

    assert len(sums) == 4 * 6
    for (site, i), (moments, squares) in sums.items():
        close(statistics.hessian[site][i], moments / tokens)
        scale = {"out": model.attn_scale[i], "down": model.mlp_scale[i]}.get(site, torch.ones(1)).detach().double()
        close(statistics.curvature[site][i], squares / tokens / math.sqrt(visits[i]) * scale ** 2)

    # The head: second derivatives of the loss by the raw scores, with the soft cap's slope from autograd.
    hidden = torch.cat(hiddens)
    scores = (hidden @ model.tok_emb.detach().T).requires_grad_()
    cap = torch.where(scores >= 0, model.softcap_pos, model.softcap_neg) if s.asym_logit_rescale else s.logit_softcap
    logits = cap * torch.tanh(scores / cap)
    slope = torch.autograd.grad(logits.sum(), scores)[0].double()
    p = logits.detach().double().softmax(1)
    head = (p * (1 - p) * slope ** 2).sum(0) / tokens
    as_head = (hidden.double().T @ hidden.double()) / tokens
    as_input, rows = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for ids, gradient in embedded:
        as_input += gradient.T @ gradient / tokens
        rows.index_add_(0, ids, gradient.square().sum(1) / tokens)
    # Both roles in one product: rows and columns add up as in the sum of two products, of which each has its own trace.
    close(statistics.curvature["head"][0], head + rows / as_head.trace())
    both = (head.sum() * as_head + rows.sum() * as_input / as_input.trace()) / (head.sum() + rows.sum() / as_head.trace())
    close(statistics.hessian["head"][0], both)


def test_without_curvature_there_is_no_backward_pass(monkeypatch):
    s = reference_settings(EVAL_SEQ_LEN=60, TRAIN_SEQ_LEN=60, VAL_BATCH_TOKENS=4096, STEP_RULE="sigma")
    model = random_model(s)
    # No document begins inside a window, where the published rule would go on.
    windows = [np.where(window == BOS, BOS + 1, window) for window in calibration_text(s, 2)]
    with_gradients = g.calibrate(model, windows, True, changed(s, step_rule="loss"), runtime())
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("no gradient was asked for"))
    statistics = g.calibrate(model, windows, True, s, runtime())
    assert not any(c.any() for c in statistics.curvature.values())
    assert {site: c.shape for site, c in statistics.curvature.items()} == {
        site: c.shape for site, c in with_gradients.curvature.items()}
    for site in ("qkv", "out", "up", "down"):
        torch.testing.assert_close(statistics.hessian[site], with_gradients.hessian[site], rtol=1e-4, atol=1e-5)


def test_second_moment_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert g.second_moment(x).tolist() == [[10.0, -1.0], [-1.0, 5.0]]
    assert g.second_moment(x.bfloat16()).dtype == torch.float32


class TwoRanks:
    """Two threads as ranks, whose sums meet, in place as all_reduce's do."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=30), [None, None]

    def rank(self, number: int) -> g.Runtime:
        meeting = self

        class Rank(g.Runtime):
            def sum(self, tensor):
                meeting.given[number] = tensor.clone()
                meeting.barrier.wait()
                tensor.copy_(meeting.given[0] + meeting.given[1])
                meeting.barrier.wait()
                return tensor

        return Rank(number, 2, torch.device("cpu"))

    def run(self, function) -> list:
        results, errors = [None, None], []

        def work(number):
            try:
                results[number] = function(self.rank(number))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        if errors:
            raise errors[0]
        return results


def assert_same_on_two_ranks(s, windows):
    model, looping = random_model(s), s.num_loops > 0
    alone = g.calibrate(model, windows, looping, s, runtime())
    for shared in TwoRanks().run(lambda rank: g.calibrate(model, windows, looping, s, rank)):
        for kind in ("hessian", "curvature"):
            for site, want in getattr(alone, kind).items():
                got = getattr(shared, kind)[site]
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item(), msg=lambda text: (
                    f"{kind} of {site}: {text}"))


def test_two_ranks_see_what_one_sees():
    s = reference_settings(NUM_LAYERS=2, MODEL_DIM=8, NUM_HEADS=1, NUM_KV_HEADS=1, XSA_LAST_N=2, GATE_WINDOW=8, NUM_LOOPS=0,
                           PARALLEL_START_LAYER=0, EVAL_SEQ_LEN=16_400, VAL_BATCH_TOKENS=200_000)  # one window a pass
    assert_same_on_two_ranks(s, calibration_text(s, 3, documents=60))


@pytest.mark.parametrize("step_rule", ["loss", "sigma"])
def test_a_rank_without_windows_changes_nothing(step_rule):
    s = reference_settings(EVAL_SEQ_LEN=90, VAL_BATCH_TOKENS=4096, STEP_RULE=step_rule)
    assert_same_on_two_ranks(s, calibration_text(s, 3))  # all in one pass


def test_calibration_that_is_cut_short_knows_what_it_has_seen():
    """Statistics are means over the tokens of the rounds that were made, whatever the number of ranks."""
    s = reference_settings(NUM_LAYERS=2, MODEL_DIM=8, NUM_HEADS=1, NUM_KV_HEADS=1, XSA_LAST_N=2, GATE_WINDOW=8, NUM_LOOPS=0,
                           PARALLEL_START_LAYER=0, EVAL_SEQ_LEN=2100, VAL_BATCH_TOKENS=200_000)  # one window a pass
    model, windows = random_model(s), calibration_text(s, 6, documents=60)
    whole = g.calibrate(model, windows[:4], False, s, runtime())
    alone = g.calibrate(model, windows, False, s, runtime(), lambda rounds: rounds[:4])
    pair = TwoRanks().run(lambda rank: g.calibrate(model, windows, False, s, rank, lambda rounds: rounds[:2]))
    for cut in (alone, *pair):
        for site, want in whole.hessian.items():
            torch.testing.assert_close(cut.hessian[site], want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


# --- Calibration windows


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory):
    """A function from tokens to the settings of a data set of them."""
    def make(tokens, **changes):
        folder = tmp_path_factory.mktemp("windows")
        write_data(folder / "data", tokens, [1, 2, 3])
        return tiny(folder, **changes)
    return make


def read_windows(s, rank=0, world_size=1, most=None, **fields):
    s = changed(s, **fields)
    return g.calibration_windows(g.TrainingData(s, runtime(rank, world_size)), s, most)


def test_windows_come_from_the_stream_whatever_the_number_of_ranks(stream_of):
    stream = np.concatenate(documents(60, 1)).astype(np.int64)
    s = stream_of(stream, EVAL_SEQ_LEN=100, GPTQ_CALIBRATION_BATCHES=3)
    windows = read_windows(s)
    assert len(windows) == math.ceil(3 * 256 / 100) and all(len(w) == 101 for w in windows)
    assert len(read_windows(s, most=5)) == 5 and len(read_windows(s, most=500)) == len(windows)
    for rank in range(4):
        for a, b in zip(windows, read_windows(changed(s, world_size=4, rank=rank), rank, 4), strict=True):
            assert np.array_equal(a, b)
    circle = np.concatenate((stream, stream[:100]))
    every = np.lib.stride_tricks.sliding_window_view(circle, 101)
    starts = [np.flatnonzero((every == window).all(1)) for window in windows]
    assert all(len(found) for found in starts) and len({found[0] for found in starts}) == len(windows)
    assert sum(window[0] == BOS for window in windows) < len(windows) / 2


def test_published_calibration_attends_across_documents(stream_of):
    """The published systems cut windows of TRAIN_SEQ_LEN without separators; ours end at documents too."""
    stream = np.concatenate(documents(60, 1)).astype(np.int64)
    s = stream_of(stream, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=100, GPTQ_CALIBRATION_BATCHES=3)
    for rule, length in (("sigma", 64), ("loss", 100)):
        s = changed(s, step_rule=rule)
        windows = read_windows(s)
        assert len(windows) == math.ceil(3 * 256 / length) and {len(w) for w in windows} == {length + 1}
        inside = sum(int((w[1:-1] == BOS).sum()) for w in windows)  # documents that begin inside a window
        assert inside > 3
        bounds = g.calibration_batch(windows, s).segments.cu_seqlens.tolist()
        assert len(bounds) == len(windows) + 1 + (inside if rule == "loss" else 0)


# --- Settings


@pytest.mark.parametrize("environ, name, words", [
    (dict(STEP_RULE="loss", MATRIX_BITS=5), "MATRIX_BITS", "STEP_RULE=sigma"),
    (dict(STEP_RULE="loss", EMBED_BITS=8), "EMBED_BITS", "STEP_RULE=sigma"),
    (dict(STEP_RULE="loss", ATTN_CLIP_SIGMAS=12), "ATTN_CLIP_SIGMAS", "STEP_RULE=sigma"),
    (dict(STEP_RULE="loss", MLP_CLIP_SIGMAS=12), "MLP_CLIP_SIGMAS", "STEP_RULE=sigma"),
    (dict(STEP_RULE="loss", EMBED_CLIP_SIGMAS=12), "EMBED_CLIP_SIGMAS", "STEP_RULE=sigma"),
    (dict(GPTQ_CALIBRATION_BATCHES=0), "GPTQ_CALIBRATION_BATCHES", "STEP_RULE=loss"),
    (dict(STEP_RULE="loss", AWQ_LITE_ENABLED=1), "AWQ_LITE_ENABLED", "STEP_RULE=sigma"),
    (dict(STEP_RULE="loss", LQER_ENABLED=1), "LQER_ENABLED", "STEP_RULE=sigma"),
    (dict(LQER_ENABLED=1, LQER_ASYM_GROUP=48), "LQER_ASYM_GROUP", "48"),
    (dict(QUANTIZE_ONLY=1, TTT_EVAL_ONLY=1), "QUANTIZE_ONLY", "TTT_EVAL_ONLY")])
def test_artifact_settings_that_do_not_go_together(environ, name, words):
    [line] = complaints(**environ)
    assert line.startswith(f"{name}: ") and words in line and len(line) < 200


@pytest.mark.parametrize("environ", [
    dict(STEP_RULE="sigma", MATRIX_BITS=5, EMBED_CLIP_SIGMAS=15, AWQ_LITE_ENABLED=1, GPTQ_CALIBRATION_BATCHES=0),
    dict(LQER_ENABLED=1), dict(LQER_ASYM_GROUP=48), dict(MODEL_DIM=384), dict(QUANTIZE_ONLY=1)])
def test_artifact_settings_that_go_together(environ):
    g.Settings.from_environment({name: str(value) for name, value in environ.items()})
