"""The whole evaluation of a saved artifact at a record's length: seconds by phase, memory, running score.

    ARTIFACT_DIR=... DATA_PATH=... [torchrun --standalone --nproc_per_node=4] bench/full_evaluation.py
        [--tokens 47851519] [--record FILE] [--figure FILE]
    DATA_PATH=... python bench/full_evaluation.py --schedule     steps and busy slots alone, on the CPU
    python bench/full_evaluation.py --draw RECORD --figure FILE

Validation text first, then training shards where it is too short: the questions are speed, memory and
stability, not the score. Bytes of training text are the validation text's mean for each token. Any number of
ranks. From the schedule and the time of its steps follows an estimate for eight.
"""
import argparse
import dataclasses
import json
import os
import re
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as g  # noqa: E402

RECORD_TARGETS = 47_851_519
BUCKETS = 200  # of the text, for the running score and the speed over time
TAIL = 0.95  # where the last part of the text begins
FAR_GROWTHS = 0, 1 / 16, 1 / 8, 1 / 4


class StandIn:
    """Text of so many targets, in the place of ValidationData."""

    def __init__(self, targets: int, s: g.Settings):
        val = g.ValidationData(s)
        pieces = [val.tokens]
        missing = targets + 1 - len(val.tokens)
        for path in g.shard_files(s.shards_dir, "train") if missing > 0 else []:
            pieces.append(g.open_shard(path)[:max(0, missing)])
            missing -= len(pieces[-1])
        self.tokens = np.concatenate(pieces)[:targets + 1]
        self.from_training = max(0, len(self.tokens) - len(val.tokens))
        seen = np.bincount(val.tokens, minlength=s.vocab_size)
        total = np.bincount(val.tokens, val.bytes, minlength=s.vocab_size)
        mean = np.where(seen > 0, total / np.maximum(seen, 1), val.bytes.mean())
        self.bytes = np.rint(mean).astype(np.uint16)[self.tokens]
        self.bytes[:len(val.bytes)] = val.bytes[:len(self.bytes)]


class Curve:
    """Nats by the bucket of the text in which their targets lie."""

    def __init__(self, targets: int, runtime: g.Runtime):
        self.targets = targets
        self.runtime = runtime
        self.nats = torch.zeros(BUCKETS, dtype=torch.float64, device=runtime.device)

    def add(self, positions: np.ndarray, nats: Tensor) -> None:
        """Nats (n,) of the targets at these positions (n,)."""
        bucket = torch.from_numpy(positions * BUCKETS // self.targets)
        self.nats.index_add_(0, self.runtime.to_device(bucket), nats.double())

    def running_bpb(self, data: StandIn) -> list[float]:
        """Bits per byte of the text up to the end of each bucket."""
        nats = self.runtime.sum(self.nats).cumsum(0).cpu().numpy()
        bucket = np.arange(self.targets) * BUCKETS // self.targets
        size = np.bincount(bucket, data.bytes[1:], minlength=BUCKETS).cumsum()
        return np.round(nats / np.log(2) / np.maximum(size, 1), 6).tolist()


class Clock:
    """Seconds since the ranks began together."""

    def __init__(self, runtime: g.Runtime):
        self.runtime = runtime
        runtime.gather(None)  # which all ranks leave together
        self.began = self.now()

    def now(self) -> float:
        self.runtime.synchronize()
        return time.perf_counter()

    def seconds(self) -> float:
        return self.now() - self.began


class TimedText(g.Text):
    """Times what its host thread and the global phases take, and keeps the schedule."""

    hint_seconds = 0.0
    pack_seconds = 0.0
    phase_seconds = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.chunks = []  # of each step, the inputs (slots,)

    def packed_steps(self):
        for step, groups in super().packed_steps():
            self.chunks.append(step.end - step.begin)
            yield step, groups

    def count_hints(self, step):
        began = time.perf_counter()
        super().count_hints(step)
        self.hint_seconds += time.perf_counter() - began

    def pack(self, step):
        began = time.perf_counter()
        yield from super().pack(step)
        self.pack_seconds += time.perf_counter() - began

    def phases_due(self, step):
        for documents in super().phases_due(step):
            clock = Clock(self.runtime)
            yield documents
            self.phase_seconds += clock.seconds()


class Marks:
    """When each bucket of the text was scored: steps, targets of all ranks and seconds so far."""

    def __init__(self, text: TimedText, clock: Clock):
        self.text = text
        self.clock = clock
        self.rows = []

    def watch(self, packed_steps):
        """Pass the steps on, and look at the clock whenever another bucket's worth of targets is scored."""
        scored = 0
        total = int(self.text.lengths.sum())
        for index, (step, groups) in enumerate(packed_steps, 1):
            yield step, groups
            scored += targets_of(step, self.text.lengths)
            if scored * BUCKETS >= (len(self.rows) + 1) * total:
                seconds = self.clock.seconds() - self.text.phase_seconds
                self.rows.append((index, scored, seconds))


def targets_of(step: g.Step, lengths: np.ndarray) -> int:
    """How many targets a step scores."""
    active = step.document >= 0
    end = np.minimum(step.end[active], lengths[step.document[active]])
    return int((end - step.begin[active]).sum())


class Quiet:
    """Takes the place of the run log."""

    def event(self, *_, **__):
        pass


@torch.no_grad()
def plain_pass(model: g.GPT, data: StandIn, looping: bool, s: g.Settings, runtime: g.Runtime) -> dict:
    """Seconds and running score of the plain evaluation."""
    evaluator = g.Evaluator(data, s, runtime)
    model.token_losses(*evaluator.batch(0)[0], looping)  # compiles
    curve = Curve(evaluator.targets, runtime)
    clock = Clock(runtime)
    for index in range(runtime.rank, len(evaluator.batches), runtime.world_size):
        batch, scored = evaluator.batch(index)
        losses = model.token_losses(*batch, looping) * scored
        begin, end, _ = evaluator.windows[evaluator.batches[index]].T
        positions, _ = g.ranges(begin, end - begin)
        curve.add(positions, losses[:len(positions)])
    running = curve.running_bpb(data)
    return dict(seconds=clock.seconds(), running_bpb=running)


def adapted_pass(model: g.GPT, data: StandIn, looping: bool, s: g.Settings, runtime: g.Runtime) -> dict:
    """Test-time training as the run does it, with its clock read on the way."""
    text = TimedText(data, s, runtime)
    learner = g.Learner(model, looping, text.own_slots, s, runtime)
    total = g.Score(data, runtime, Quiet())
    tilted, untilted = [Curve(total.targets, runtime) for _ in range(2)]

    def add(rows, nats, plain):
        total.add(rows, nats, plain)
        tilted.add(rows.stream_positions, nats)
        untilted.add(rows.stream_positions, plain)

    learner.rehearse(text)
    marks = Marks(text, Clock(runtime))
    with total.timer(), closing(g.ahead(text.packed_steps(), 4)) as packed_steps:
        phases = g.adapt(learner, text, marks.watch(packed_steps), add)
    before = resident_mib()
    text.counter = None  # which frees its tables
    counts_mib = before - resident_mib()
    return dict(
        results=total.results(), documents=len(text.lengths), phases=phases, hints=text.hinted,
        phase_seconds=text.phase_seconds, hint_seconds=text.hint_seconds, pack_seconds=text.pack_seconds,
        counts_mib=counts_mib, marks=marks.rows, chunks=np.array(text.chunks),
        running_bpb=tilted.running_bpb(data), running_untilted_bpb=untilted.running_bpb(data))


def resident_mib() -> float:
    """Memory that this process holds."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


# --- The schedule, and what follows from it


def busiest(chunks: np.ndarray, ranks: int) -> np.ndarray:
    """Inputs of the rank that has most of them in each step (steps, slots): (steps,)."""
    own = [chunks[:, rank::ranks].sum(1) for rank in range(ranks)]
    return np.max(own, axis=0)


def slot_figures(chunks: np.ndarray) -> dict:
    """Steps, and how many of them find few slots busy."""
    busy = (chunks > 0).sum(1)
    few = busy < chunks.shape[1] / 4
    scored = chunks.sum(1).cumsum() / chunks.sum()
    return dict(steps=len(chunks), under_a_quarter=int(few.sum()), share_under_a_quarter=round(few.mean(), 4),
                in_the_tail=int((scored > TAIL).sum()))


def print_schedules(data: StandIn, s: g.Settings) -> None:
    """What TTT_FAR_GROWTH does to the steps of this text."""
    starts = g.document_starts(data.tokens[:-1])
    lengths = np.diff(starts, append=len(data.tokens) - 1)
    print(f"{len(lengths):,} documents, {lengths.sum():,} targets, the longest "
          f"{', '.join(f'{n:,}' for n in sorted(lengths.tolist())[-3:])}")
    for growth in FAR_GROWTHS:
        changed = dataclasses.replace(s, ttt_far_growth=growth)
        chunks = np.array([step.end - step.begin for step in g.ttt_schedule(lengths, changed)])
        figures = slot_figures(chunks)
        print(f"TTT_FAR_GROWTH={growth:<7} steps {figures['steps']}, under a quarter of the slots busy in "
              f"{figures['under_a_quarter']} ({figures['share_under_a_quarter']:.1%}), in the tail "
              f"{figures['in_the_tail']}; inputs of the busiest of 8 ranks {busiest(chunks, 8).sum():,}")


def step_costs(marks: list, inputs: np.ndarray) -> tuple[float, float]:
    """Seconds of a step and of each input of its busiest rank, fitted to the times between the marks."""
    marks = [(0, 0, 0.0), *marks]
    steps, _, seconds = np.array(marks).T
    upto = np.append(0, inputs.cumsum())[steps.astype(int)]
    costs, _ = nnls(np.stack((np.diff(steps), np.diff(upto)), 1), np.diff(seconds))
    return float(costs[0]), float(costs[1])


def estimate(plain: dict, adapted: dict, ranks: int, of: int) -> dict:
    """Seconds on `of` GPUs like the `ranks` that were timed, and what they rest on."""
    chunks = adapted["chunks"]
    per_step, per_input = step_costs(adapted["marks"], busiest(chunks, ranks))
    device = per_step * len(chunks) + per_input * busiest(chunks, of).sum()
    host = adapted["hint_seconds"] + adapted["pack_seconds"] * ranks / of
    ttt = max(device, host) + adapted["phase_seconds"] * ranks / of
    plain_seconds = plain["seconds"] * ranks / of
    return dict(
        gpus=of, seconds=round(plain_seconds + ttt, 1), plain=round(plain_seconds, 1),
        test_time_training=round(ttt, 1), milliseconds_a_step=round(1e3 * per_step, 2),
        microseconds_an_input=round(1e6 * per_input, 3), steps=len(chunks),
        inputs_of_the_busiest_rank=int(busiest(chunks, of).sum()), host_seconds=round(host, 1),
        rests_on=f"the exact schedule; times of a step and of an input fitted on {ranks} ranks; plain "
        "evaluation, packing and global phases shared evenly; hints counted on every host beside the GPU")


def phase_table(plain: dict, adapted: dict, targets: int) -> dict[str, float]:
    """Seconds by phase."""
    seconds = adapted["results"]["seconds"]
    until_tail = min(s for _, scored, s in adapted["marks"] if scored >= TAIL * targets)
    return {
        "plain": plain["seconds"],
        "scoring and training, first 95 %": until_tail,
        "the tail, last 5 %": max(0.0, seconds - until_tail - adapted["phase_seconds"]),
        "global phases": adapted["phase_seconds"],
        "test-time training": seconds,
        "hints, beside it on the host": adapted["hint_seconds"],
        "packing, beside it on the host": adapted["pack_seconds"],
    }


def report(record: dict) -> None:
    for phase, seconds in record["phases"].items():
        print(f"{phase:34}{seconds:10.1f} s")
    slots = record["slots"]
    few = slots["share_under_a_quarter"]
    print(f"{slots['steps']} steps, under a quarter of the slots busy in {few:.1%}")
    print(f"host memory of the counts {record['counts_mib']:,} MiB a rank; GPU {record['gpu_gib']} GiB")
    rates = [f"{rate:,}" for rate in record["tokens_per_second"]]
    print("tokens/s in each tenth of the text:", " ".join(rates))
    print(f"plain {record['plain_bpb']:.5f}, adapted {record['adapted']['val_bpb']:.5f}, "
          f"without the tilt {record['adapted']['untilted_bpb']:.5f} bits per byte")
    on_eight = record["estimate"]
    print(f"estimate for {on_eight['gpus']} GPUs: {on_eight['seconds']} s, from {on_eight['rests_on']}: "
          f"{on_eight['milliseconds_a_step']} ms a step, {on_eight['microseconds_an_input']} us an input")


def speed_over_time(marks: list) -> list[int]:
    """Targets per second in tenths of the text."""
    _, scored, seconds = np.array([(0, 0, 0.0), *marks]).T
    borders = np.linspace(0, scored[-1], 11)
    times = np.interp(borders, scored, seconds)
    return np.rint(np.diff(borders) / np.maximum(np.diff(times), 1e-9)).astype(int).tolist()


def measure(s: g.Settings, targets: int, runtime: g.Runtime) -> dict:
    """The record of this bench."""
    g.check_tools(dataclasses.replace(s, ttt_eval_only=True), runtime)
    data = StandIn(targets, s)
    targets = len(data.tokens) - 1
    model = g.build_model(s, runtime, Quiet())
    looping = g.load_weights(model, s.artifact_path, s, runtime)
    plain = plain_pass(model, data, looping, s, runtime)
    adapted = adapted_pass(model, data, looping, s, runtime)
    gpu_gib = 0.0
    if runtime.on_cuda:
        gpu_gib = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    phases = {phase: round(seconds, 2) for phase, seconds in phase_table(plain, adapted, targets).items()}
    return dict(
        machine=runtime.describe(), host_cores=os.cpu_count(), changed=changed_settings(s), targets=targets,
        documents=adapted["documents"], targets_from_training_shards=data.from_training, phases=phases,
        slots=slot_figures(adapted["chunks"]), counts_mib=round(adapted["counts_mib"]), gpu_gib=gpu_gib,
        hints=adapted["hints"], global_phases=adapted["phases"], plain_bpb=plain["running_bpb"][-1],
        adapted=adapted["results"], estimate=estimate(plain, adapted, runtime.world_size, 8),
        tokens_per_second=speed_over_time(adapted["marks"]), running_targets=bucket_ends(targets),
        running_plain_bpb=plain["running_bpb"], running_adapted_bpb=adapted["running_bpb"],
        running_untilted_bpb=adapted["running_untilted_bpb"])


def changed_settings(s: g.Settings) -> dict:
    return {field.name: getattr(s, field.name) for field in dataclasses.fields(s)
            if getattr(s, field.name) != field.default}


def bucket_ends(targets: int) -> list[int]:
    return [-(-targets * (k + 1) // BUCKETS) for k in range(BUCKETS)]


def draw(record: dict, path: str) -> None:
    """The running scores of a record as a figure."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    millions = np.array(record["running_targets"]) / 1e6
    for name, label in (("plain", "plain"), ("untilted", "test-time training"), ("adapted", "with the tilt")):
        axes.plot(millions, record[f"running_{name}_bpb"], label=label)
    axes.set_xlabel("million tokens scored, in the order of the text")
    axes.set_ylabel("bits per byte so far")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--tokens", type=int, default=RECORD_TARGETS, metavar="N",
                        help="targets (%(default)s)")
    parser.add_argument("--record", metavar="FILE", help="write the figures there")
    parser.add_argument("--figure", metavar="FILE", help="draw the running scores there")
    parser.add_argument("--draw", metavar="RECORD", help="draw those of this record, measure nothing")
    parser.add_argument("--schedule", action="store_true", help="print steps and busy slots, measure nothing")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(Path(options.draw).read_text()), options.figure)
        return
    s = g.Settings.from_environment(os.environ)
    if options.schedule:
        print_schedules(StandIn(options.tokens, s), s)
        return
    with g.Runtime.start(s) as runtime:
        record = measure(s, options.tokens, runtime)
        if runtime.rank == 0:
            report(record)
            if options.record:
                Path(options.record).write_text(json.dumps(record, indent=1) + "\n")
            if options.figure:
                draw(record, options.figure)


if __name__ == "__main__":
    main()
