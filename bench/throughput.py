"""Where the time of a training step goes on one GPU, and tokens per second before and after looping starts.

    DATA_PATH=... [settings] python bench/throughput.py [--steps 8] [--kernels 25] [--record FILE]

Prints, for both states of looping, one table: tokens per second over whole steps, all products as share of the rate that an
8192^3 bf16 product reaches in the same process, what the host took to launch a step and waited for data, and ms of device time
by part of a step beside the part's floor: its FLOP at that rate plus the bytes of its activations at the speed of a copy.
--kernels lists the longest kernels. --record writes the same as JSON.
"""
import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as g  # noqa: E402

PARTS = ("attention", "MLP", "projections", "head and loss", "elementwise", "optimizer", "communication")


def part_of(names: list[str], shapes: list, s: g.Settings) -> str:
    """The part to which a kernel belongs, by its name, the operations around its launch and the sizes of their inputs."""
    def within(*words):
        return any(word in name for name in names for word in words)

    sizes = {size for shape in shapes for size in shape}
    product = within("aten::mm", "aten::linear", "aten::addmm", "_scaled_mm", "fp8_product")
    if within("nccl", "c10d"):
        return "communication"
    if within("bench: optimizer"):
        return "optimizer"
    if within("lash"):
        return "attention"
    if within("TwoValueNLL", "FullProduct") or s.vocab_size in sizes and product:
        return "head and loss"
    if within("SquaredMLP") or s.mlp_dim in sizes and (product or within("leaky", "aten::square")):
        return "MLP"
    return "projections" if product else "elementwise"


def parts_of(events, s: g.Settings) -> tuple[dict, dict]:
    """Device microseconds by part and by kernel name."""
    parts, kernels = dict.fromkeys(PARTS, 0.0), defaultdict(lambda: [0.0, 0])
    for event in events:
        for kernel in event.kernels:
            names, shapes, node = [kernel.name], [], event
            while node is not None:
                names.append(node.name)
                shapes += [shape for shape in node.input_shapes or () if shape]
                node = node.cpu_parent
            parts[part_of(names, shapes, s)] += kernel.duration
            kernels[kernel.name][0] += kernel.duration
            kernels[kernel.name][1] += 1
    return parts, kernels


def seconds_of(function) -> float:
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def ceiling() -> float:
    """FLOP/s of an 8192^3 bf16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192 ** 3 / seconds_of(lambda: a @ b)


def bandwidth() -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    a = torch.empty(2 ** 30, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * 2 ** 30 / seconds_of(lambda: b.copy_(a))


def work(s: g.Settings, looping: bool, keys: float) -> dict[str, tuple[float, float]]:
    """FLOP and bytes of forward and backward of one step, for the parts that have a floor; keys: how many a query sees.

    Bytes are those of the bf16 activations that the fused steps between the products read and write, each once; of the head
    the logits, written and read forward, read and overwritten backward.
    """
    d, kv, tokens, order = s.model_dim, s.kv_dim, s.train_batch_tokens, sum(g.visit_order(s, looping), [])
    visits, skips = len(order), min(map(len, g.visit_order(s, looping)))
    lanes = sum(i >= s.parallel_start_layer for i in g.visit_order(s, looping)[1]) if s.parallel_start_layer else 0
    entry, qk, gate, norm = 10 * d, 5 * d + 8 * kv, 5 * d + 3 * kv, 8 * d  # the MLP's product adds to the stream itself
    in_lanes = 6 * d + 16 * d  # norm without a sum, and the update of both lanes
    elementwise = visits * (entry + qk + gate) + skips * 3 * d + (visits - lanes) * norm + lanes * in_lanes
    return {"attention": (3.5 * 4 * d * keys * visits * tokens, 0), "MLP": (3 * 4 * d * s.mlp_dim * visits * tokens, 0),
            "projections": (3 * 4 * d * (d + kv) * visits * tokens, 0),
            "head and loss": (3 * 2 * d * s.vocab_size * tokens, 4 * 2 * s.vocab_size * tokens),
            "elementwise": (0, 2 * elementwise * tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--record", default="")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    s = g.Settings.from_environment(os.environ)
    with g.Runtime.start(s) as runtime:
        data = g.TrainingData(s, runtime)
        model = g.GPT(s, runtime.compute_dtype).to(runtime.device).view(compiled=runtime, fp8=True)
        runtime.broadcast(model.parameters())
        optimizer = g.Optimizer(model, s, runtime)
        micro_batches = g.MicroBatches(model, optimizer, s, runtime)
        batches, first, waited = data.stream(s.train_seq_len), runtime.rank == 0, []

        def step(looping, forward_backward=micro_batches.accumulate):
            for _ in range(s.accumulation):
                began = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - began)
                forward_backward(batch, looping)
            with record_function("bench: optimizer"):
                optimizer.step(1.0, 0.95)

        lengths = (data.batch(0, 0, s.train_seq_len).segments.cu_seqlens.diff()).double()
        keys = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
        record = dict(machine=runtime.describe(), attention=model.attention_kernel, fp8=model.fp8, heads=s.num_heads,
                      batch_tokens=s.train_batch_tokens, micro_batch_tokens=s.micro_batch_tokens, keys_per_query=round(keys, 1),
                      ceiling_tflops=round(ceiling() / 1e12), bandwidth_tbs=round(bandwidth() / 1e12, 2))
        if first:
            print(record)
        for looping in sorted({False, s.loops_at_end}):
            began = time.perf_counter()
            step(looping)
            micro_batches.capture([(s.train_seq_len, looping)])
            step(looping)
            torch.cuda.synchronize()
            compiled, graphs = time.perf_counter() - began, g.compiled_graphs()
            waited.clear()
            began = time.perf_counter()
            for _ in range(options.steps):
                step(looping)
            host = time.perf_counter() - began  # ends when the last step is launched
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / options.steps
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiled:
                step(looping, micro_batches.forward_backward)  # a recorded pass does not tell which kernel belongs to what
                torch.cuda.synchronize()
            parts, kernels = parts_of(profiled.events(), s)
            parts_work = work(s, looping, keys)
            rate, flops = s.train_batch_tokens / seconds, sum(f for f, _ in parts_work.values()) / runtime.world_size / seconds
            floors = {name: 1e-9 * (flop / record["ceiling_tflops"] + moved / record["bandwidth_tbs"]) / runtime.world_size
                      for name, (flop, moved) in parts_work.items()}
            figures = dict(
                tokens_per_second=round(rate), step_ms=round(1e3 * seconds, 1), tflops_per_gpu=round(flops / 1e12, 1),
                share_of_ceiling=round(flops / 1e12 / record["ceiling_tflops"], 3), first_steps_seconds=round(compiled, 1),
                recompilations=g.compiled_graphs() - graphs, host_ms=round(1e3 * host / options.steps, 1),
                waited_for_data_ms=round(1e3 * sum(waited) / options.steps, 2),
                parts_ms={name: round(us / 1e3, 2) for name, us in parts.items()},
                floors_ms={name: round(ms, 2) for name, ms in floors.items()},
                device_ms=round(sum(parts.values()) / 1e3, 1),
                peak_memory_mib=round(torch.cuda.max_memory_reserved() / 2 ** 20))
            record["looping" if looping else "plain"] = figures
            if first:
                facts = (f"{name} {value}" for name, value in figures.items() if not name.endswith("s_ms"))
                print(f"{'looping' if looping else 'plain'}: {', '.join(facts)}", flush=True)
                for name, us in parts.items():
                    floor = f"   floor {floors[name]:8.2f} ms" if name in floors else ""
                    print(f"  {name:16}{us / 1e3:9.2f} ms {us / 1e3 / figures['step_ms']:6.1%}{floor}")
                for name, (us, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:options.kernels]:
                    print(f"  {us / 1e3:9.2f} ms {count:5} x {name[:110]}")
        if first and options.record:
            Path(options.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
