"""What only a CUDA device can show. Run with `pytest -m gpu`."""
import numpy as np
import pytest
import torch

import train_gpt as g

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


runtime = g.Runtime(0, 1, torch.device("cuda"))


def compiled(settings):
    return g.GPT(settings, torch.bfloat16).cuda().compile_parts(runtime)


def random_segments(length, longest, seed):
    starts = np.sort(np.random.default_rng(seed).choice(length, size=length // 100, replace=False))
    segments = g.make_segments(g.segment_bounds(starts, length, longest), longest)
    return segments._replace(cu_seqlens=segments.cu_seqlens.cuda(), positions=segments.positions.cuda())


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_flash_attention_matches_reference_forward_and_backward():
    segments = random_segments(3000, 512, seed=0)
    q, k, v, out_grad = (torch.randn(3000, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 4, 4, 8))
    results = []
    for function, dtype in ((g.flash_attention, torch.bfloat16), (g.reference_attention, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, segments)
        results.append([out, *torch.autograd.grad(out, inputs, out_grad.to(dtype))])
    for got, expected in zip(*results):
        assert relative_error(got, expected) < 1e-2


@pytest.fixture
def tiny():
    return g.Settings(vocab_size=512, model_dim=128, num_heads=2, num_kv_heads=1, num_layers=5, xsa_last_n=5, num_loops=1,
                      loop_start=1, loop_end=2, parallel_start_layer=3, gated_xsa=True, smear_gate_enabled=True)


def liven(model):
    """Give every zero-initialized parameter a value, so that no path is dead."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device))


@pytest.mark.parametrize("looping", [False, True])
def test_compiled_bf16_model_matches_float32_on_the_host(tiny, looping):
    host, device = g.GPT(tiny), compiled(tiny)
    liven(host)
    device.load_state_dict(host.state_dict())
    tokens = torch.randint(2, 512, (1025,), generator=torch.Generator().manual_seed(1))
    segments = random_segments(1024, 256, seed=1)
    on_host = segments._replace(cu_seqlens=segments.cu_seqlens.cpu(), positions=segments.positions.cpu())
    expected = host.token_losses(tokens[:-1], tokens[1:], on_host, looping).mean()
    got = device.token_losses(tokens[:-1].cuda(), tokens[1:].cuda(), segments, looping).mean()
    assert abs(got.item() - expected.item()) < 0.02
    expected.backward()
    got.backward()
    for (name, p), q in zip(host.named_parameters(), device.parameters()):
        if p.grad is not None and p.grad.norm() > 1e-6:
            assert relative_error(q.grad.cpu(), p.grad) < 0.1, name


def test_number_of_documents_costs_no_recompilation(tiny):
    model = compiled(tiny)
    tokens = torch.randint(2, 512, (2048,))
    before = None
    for documents in (1, 2, 7, 60):
        bounds = g.segment_bounds(np.linspace(0, 2048, documents, endpoint=False).astype(int), 2048, 2048)
        batch = g.Batch(tokens, tokens, g.make_segments(bounds, 2048)).to(runtime)
        model.token_losses(*batch, True).mean().backward()
        before = before or g.compiled_graphs()
    assert g.compiled_graphs() == before


def test_no_host_synchronization_inside_a_step(tiny, tmp_path):
    """Forward, backward and optimizer step run with synchronizing calls turned into errors."""
    model = compiled(tiny)
    optimizer = g.Optimizer(model, tiny, runtime)
    average = g.WeightAverage(optimizer.weights, 0.9)
    tokens = torch.randint(2, 512, (2048,))
    host_batch = g.Batch(tokens, tokens, g.make_segments(np.array([0, 700, 2048], dtype=np.int32), 2048))

    def step():
        batch = host_batch.to(runtime)
        loss = model.token_losses(*batch, True).mean()
        loss.backward()
        optimizer.add_loss(loss)
        figures = optimizer.step(1.0, 0.9)
        average.update()
        return torch.empty(2, pin_memory=True).copy_(figures, non_blocking=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.isfinite(figures).all() and figures[0] > 0
