"""Time of one optimizer step at the record's settings, plain and looping, on this machine's GPU.

    DATA_PATH=... python bench/train_step.py [--steps N] [--profile K]

Settings come from the environment as in a run. Prints tokens per second from CUDA events over N steps after warm-up, and
with --profile K the K kernels that take most of the time.
"""
import argparse
import os
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt as g  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", type=int, default=0, metavar="K", help="print the K kernels that take most time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    settings = g.Settings.from_environment(os.environ)
    with g.Runtime.start(settings) as runtime:
        print(runtime.describe())
        data = g.TrainingData(settings, runtime)
        model = g.GPT(settings, runtime.compute_dtype).to(runtime.device).compile_parts(runtime)
        optimizer = g.Optimizer(model, settings, runtime)
        batches = data.stream(settings.train_seq_len)

        def micro_batches(looping):
            for _ in range(settings.accumulation):
                (model.token_losses(*next(batches), looping).mean() / settings.accumulation).backward()

        def step(looping):
            micro_batches(looping)
            optimizer.step(1.0, 0.95)

        for looping in sorted({False, settings.loops_at_end}):
            began = time.perf_counter()
            for _ in range(3):
                step(looping)
            torch.cuda.synchronize()
            compiled = time.perf_counter() - began
            times = []
            for action in (step, micro_batches):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(options.steps):
                    action(looping)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / options.steps)
            optimizer.step(0.0, 0.95)
            print(f"looping {int(looping)}: first 3 steps {compiled:.1f} s; step {times[0]:.1f} ms of "
                  f"{settings.train_batch_tokens} tokens = {settings.train_batch_tokens / times[0] / 1e3:.3f}M tokens/s; "
                  f"forward and backward {times[1]:.1f} ms; {settings.accumulation} micro-batches of "
                  f"{settings.micro_batch_tokens}; peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB", flush=True)
            if options.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    step(looping)
                    torch.cuda.synchronize()
                kernels = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
                for k in kernels[:options.profile]:
                    print(f"{k.self_device_time_total / 1e3:9.2f} ms {k.count:5} x {k.key[:100]}")
                print(f"{sum(k.self_device_time_total for k in kernels) / 1e3:9.2f} ms in all")
        batches.close()


if __name__ == "__main__":
    main()
