"""Speed and memory of the n-gram hints on one core, at several lengths of the stream.

    python bench/ngram.py [SHARD ...] [--lengths 2 10 47.85] [--runs 3] [--piece N] [--record FILE.json]

SHARDs (fineweb_*.bin, or .bin.xz) are concatenated, and repeated where they are too short; without any, the stream is
synthetic: Zipf-distributed tokens, a tenth of them in passages copied from earlier ones. It is fed as one stream, by
token_hints or with --piece N tokens at a time, and in rows: 512 equal documents take turns in slots, one call a step
with 48 targets of each. Every run is a fresh process; the time is that of these calls alone, allocation of everything
included, the compilation of the library not. System time, most of it the kernel's supply of fresh pages, is what varies
from run to run. Memory is the process's peak, and what of it the hints added to Python and the stream.
"""
import argparse
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import online_ngram_tilt as ngram  # noqa: E402

SLOTS, ROW = 512, 48
FEEDS = "stream", "rows"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def peak_mib() -> float:
    """Most memory this process has had in use. Linux's ru_maxrss would count the process it was started from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, (n,) uint16: 1,024 bytes of header, of which the third int32 is n."""
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    magic, _, count = np.frombuffer(data, "<i4", 3) if len(data) >= 1024 else (0, 0, 0)
    if magic != 20240520 or len(data) != 1024 + 2 * count:
        raise SystemExit(f"{path} is not a token shard")
    return np.frombuffer(data, "<u2", offset=1024)


def synthetic(length: int) -> np.ndarray:
    """Zipf-distributed tokens of a vocabulary of 8,192, a tenth of them in passages of 100 copied from earlier places."""
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(10, 8202)
    cumulative = np.cumsum(weights / weights.sum()).astype(np.float32)
    tokens = np.searchsorted(cumulative[:-1], draw.random(length, np.float32)).astype(np.uint16)
    for to in range(1000, length - 100, 1000):
        start = draw.integers(to - 100)
        tokens[to:to + 100] = tokens[start:start + 100]
    return tokens


def steps(length: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """first, begin and end of the rows of each step: SLOTS documents of equal length side by side, ROW targets each."""
    size = -(-length // SLOTS)
    first = np.arange(0, length, size)
    last = np.minimum(first + size, length) - 1
    begins = [np.minimum(first + done, last) for done in range(0, size - 1, ROW)]
    return [(first, begin, np.minimum(begin + ROW, last)) for begin in begins]


def measure(path: str, length: int, feed: str, mode: str, piece: int, connection) -> None:
    """In a process of its own: (seconds, of them in the kernel, gated targets, peak MiB, peak MiB before it began)."""
    tokens, rows = np.fromfile(path, np.uint16, length), steps(length)
    ngram.load()
    before, system, started = peak_mib(), os.times().system, time.perf_counter()
    if feed == "rows":
        state = ngram.NgramState(mode=mode)
        gated = sum(int(state.feed_rows(tokens, *bounds).gate.sum()) for bounds in rows)
        seconds = time.perf_counter() - started
    elif piece:
        state = ngram.NgramState(mode=mode)
        gated = sum(int(state.feed(tokens[at:at + piece]).gate.sum()) for at in range(0, length - 1, piece))
        seconds = time.perf_counter() - started
    else:
        hints = ngram.token_hints(tokens, mode=mode)
        seconds = time.perf_counter() - started
        gated = int(hints.gate.sum())
    connection.send((seconds, os.times().system - system, gated, peak_mib(), before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="*", type=Path, metavar="SHARD")
    parser.add_argument("--lengths", nargs="+", type=float, default=[2, 10, 47.85], metavar="M", help="millions of tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--piece", type=int, default=0, metavar="N", help="tokens a feed of the stream; 0: all")
    parser.add_argument("--record", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args()
    lengths = [round(millions * 1e6) for millions in options.lengths]
    if min(lengths) < 2 or options.runs < 1 or options.piece < 0:
        parser.error("needs at least two tokens, one run and no negative piece")
    parts, reach = [], 0
    for shard in options.shards:
        if reach < max(lengths):
            parts.append(read_shard(shard))
            reach += len(parts[-1])
    stream = np.resize(np.concatenate(parts), max(lengths)) if parts else synthetic(max(lengths))
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    record = dict(processor=processor_name(), cores=os.cpu_count(), compiler=compiler, numpy=np.__version__,
                  stream=f"{len(parts)} shards, {reach} tokens" if parts else "synthetic", piece=options.piece, rows=[])
    print(", ".join(f"{name} {value}" for name, value in record.items() if name != "rows"))
    print("     tokens  fed as  mode        M tokens/s       gated  peak MiB  of that hints"
          "  seconds of each run (of them system)")
    spawn = multiprocessing.get_context("spawn")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ngram_{os.getpid()}.bin"
    stream.tofile(path)
    del stream, parts
    try:
        for length in lengths:
            for feed, mode in itertools.product(FEEDS, ngram.MODES):
                runs = []
                for _ in range(options.runs):
                    ours, theirs = spawn.Pipe()
                    process = spawn.Process(target=measure, args=(str(path), length, feed, mode, options.piece, theirs))
                    process.start()
                    theirs.close()
                    runs.append(ours.recv())
                    process.join()
                seconds = [round(run[0], 3) for run in runs]
                peak, before = max(run[3] for run in runs), runs[0][4]
                row = dict(tokens=length, fed_as=feed, mode=mode, seconds=seconds,
                           system_seconds=[round(run[1], 2) for run in runs], gated=runs[0][2], peak_mib=round(peak),
                           tokens_per_s=round(length / float(np.median(seconds))), hints_mib=round(peak - before))
                record["rows"].append(row)
                times = " ".join(f"{s:.3f} ({k:.2f})" for s, k in zip(seconds, row["system_seconds"]))
                print(f"{length:11,}  {feed:6}  {mode:10}  {row['tokens_per_s'] / 1e6:10.1f}  {row['gated']:10,}"
                      f"  {row['peak_mib']:8,}  {row['hints_mib']:13,}  {times}", flush=True)
    finally:
        path.unlink()
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
