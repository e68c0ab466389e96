"""Where the time of a training step goes on one GPU, and tokens per second before and after looping starts.

DATA_PATH=... [settings] python bench/throughput.py [--steps 8] [--kernels 25] [--record FILE]

Prints, for both states of looping, one table: tokens per second over whole steps, all products as share of
the rate that an 8192^3 bf16 product reaches in the same process, what the host took to launch a step and
waited for data, and ms of device time by part of a step beside the part's floor: its FLOP at that rate plus
the bytes of its activations at the speed of a copy. --kernels lists the longest kernels. --record writes the
same as JSON.
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
    """The part to which a kernel belongs, by its name, the operations around its launch and their sizes."""
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
    parts = dict.fromkeys(PARTS, 0.0)
    kernels = defaultdict(lambda: [0.0, 0])
    for event in events:
        for kernel in event.kernels:
            names, shapes = [kernel.name], []
            node = event
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
    """FLOP and bytes, both ways, of one step's parts that have a floor; keys: how many a query sees.

    Bytes are those of the bf16 activations that the fused steps between the products read and write, each
    once; of the head the logits, written and read forward, read and overwritten backward.
    """
    d, kv = s.model_dim, s.kv_dim
    tokens = s.train_batch_tokens
    encoder, decoder = g.visit_order(s, looping)
    visits = len(encoder) + len(decoder)
    skips = min(len(encoder), len(decoder))
    lanes = sum(i >= s.parallel_start_layer for i in decoder) if s.parallel_start_layer else 0
    heads_and_gate = (5 * d + 8 * kv) + (5 * d + 3 * kv)
    entry = 10 * d
    norm = 8 * d  # of attention's sum; the MLP's product adds to the stream itself
    in_lanes = 6 * d + 16 * d  # norm without a sum, and the update of both lanes
    elementwise = visits * (entry + heads_and_gate) + skips * 3 * d
    elementwise += (visits - lanes) * norm + lanes * in_lanes
    return {"attention": (3.5 * 4 * d * keys * visits * tokens, 0),
            "MLP": (3 * 4 * d * s.mlp_dim * visits * tokens, 0),
            "projections": (3 * 4 * d * (d + kv) * visits * tokens, 0),
            "head and loss": (3 * 2 * d * s.vocab_size * tokens, 4 * 2 * s.vocab_size * tokens),
            "elementwise": (0, 2 * elementwise * tokens)}


class Steps:
    """Training steps on one stream of data, and what they take."""

    def __init__(self, s: g.Settings, runtime: g.Runtime):
        self.settings = s
        self.runtime = runtime
        data = g.TrainingData(s, runtime)
        self.model = g.GPT(s, runtime.compute_dtype).to(runtime.device).view(compiled=runtime, fp8=True)
        runtime.broadcast(self.model.parameters())
        self.optimizer = g.Optimizer(self.model, s, runtime)
        self.micro_batches = g.MicroBatches(self.model, self.optimizer, s, runtime)
        self.batches = data.stream(s.train_seq_len, s.train_batch_tokens)
        self.waited = []  # seconds for each micro-batch
        lengths = data.batch(0, s.micro_batch_tokens, s.train_seq_len).segments.cu_seqlens.diff().double()
        self.keys_per_query = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def step(self, looping: bool, forward_backward=None) -> None:
        for _ in range(self.settings.accumulation):
            began = time.perf_counter()
            batch = next(self.batches)
            self.waited.append(time.perf_counter() - began)
            take = forward_backward or self.micro_batches.accumulate
            take(batch, looping, self.settings.train_batch_tokens)
        with record_function("bench: optimizer"):
            self.optimizer.step(1.0, 0.95)

    def describe(self) -> dict:
        s = self.settings
        return dict(
            machine=self.runtime.describe(), attention=self.model.attention_kernel, fp8=self.model.fp8,
            heads=s.num_heads, batch_tokens=s.train_batch_tokens, micro_batch_tokens=s.micro_batch_tokens,
            keys_per_query=round(self.keys_per_query, 1), ceiling_tflops=round(ceiling() / 1e12),
            bandwidth_tbs=round(bandwidth() / 1e12, 2))

    def measure(self, looping: bool, count: int, machine: dict) -> tuple[dict, dict]:
        """The figures of `count` steps, and the kernels of one more by name: [microseconds, launches]."""
        s, ranks = self.settings, self.runtime.world_size
        began = time.perf_counter()
        self.step(looping)
        if self.micro_batches.records:
            self.micro_batches.capture([(s.train_seq_len, looping, s.train_batch_tokens)])
        self.step(looping)
        torch.cuda.synchronize()
        first_steps = time.perf_counter() - began
        graphs = g.compiled_graphs()
        self.waited.clear()
        began = time.perf_counter()
        for _ in range(count):
            self.step(looping)
        host = time.perf_counter() - began  # ends when the last step is launched
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / count
        waited = sum(self.waited) / count
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities, record_shapes=True) as profiled:
            # A recorded pass does not tell which kernel belongs to what.
            self.step(looping, self.micro_batches.forward_backward)
            torch.cuda.synchronize()
        parts, kernels = parts_of(profiled.events(), s)
        parts_work = work(s, looping, self.keys_per_query)
        tflops = sum(flop for flop, _ in parts_work.values()) / ranks / seconds / 1e12
        floors = {name: 1e-9 * (flop / machine["ceiling_tflops"] + moved / machine["bandwidth_tbs"]) / ranks
                  for name, (flop, moved) in parts_work.items()}
        figures = dict(
            tokens_per_second=round(s.train_batch_tokens / seconds), step_ms=round(1e3 * seconds, 1),
            tflops_per_gpu=round(tflops, 1), share_of_ceiling=round(tflops / machine["ceiling_tflops"], 3),
            first_steps_seconds=round(first_steps, 1), recompilations=g.compiled_graphs() - graphs,
            host_ms=round(1e3 * host / count, 1), waited_for_data_ms=round(1e3 * waited, 2),
            parts_ms={name: round(us / 1e3, 2) for name, us in parts.items()},
            floors_ms={name: round(ms, 2) for name, ms in floors.items()},
            device_ms=round(sum(parts.values()) / 1e3, 1),
            peak_memory_mib=round(torch.cuda.max_memory_reserved() / 2 ** 20))
        return figures, kernels


def show(name: str, figures: dict, kernels: dict, most: int) -> None:
    """Print the figures, the parts of a step and its `most` longest kernels."""
    facts = (f"{fact} {value}" for fact, value in figures.items() if not fact.endswith("s_ms"))
    print(f"{name}: {', '.join(facts)}", flush=True)
    floors = figures["floors_ms"]
    for part, ms in figures["parts_ms"].items():
        floor = f"   floor {floors[part]:8.2f} ms" if part in floors else ""
        print(f"  {part:16}{ms:9.2f} ms {ms / figures['step_ms']:6.1%}{floor}")
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])
    for kernel, (us, launches) in longest[:most]:
        print(f"  {us / 1e3:9.2f} ms {launches:5} x {kernel[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--record", default="")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    s = g.Settings.from_environment(os.environ)
    with g.Runtime.start(s) as runtime:
        steps = Steps(s, runtime)
        record = steps.describe()
        if runtime.rank == 0:
            print(record)
        for looping in sorted({False, s.loops_at_end}):
            name = "looping" if looping else "plain"
            record[name], kernels = steps.measure(looping, options.steps, record)
            if runtime.rank == 0:
                show(name, record[name], kernels, options.kernels)
        if runtime.rank == 0 and options.record:
            Path(options.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
