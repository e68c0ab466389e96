"""Speed and memory of the n-gram hints on one core, at several lengths of the stream.

    python bench/ngram.py [SHARD ...] [--lengths 2 10 47.85] [--runs 3] [--piece N] [--record FILE.json]

SHARDs (fineweb_*.bin, or .bin.xz) are concatenated, and repeated where they are too short; without any, the
stream is synthetic: Zipf-distributed tokens, a tenth of them in passages copied from earlier ones. The fixed
tilt's state is fed the stream, by token_hints or with --piece N tokens at a time. The learned tilt's experts
are asked in rows: 512 equal documents take turns in slots, one call a step with 48 targets of each. Every run
is a fresh process; the time is that of these calls alone, allocation of everything included, the compilation
of the library not. System time, most of it the kernel's supply of fresh pages, is what varies from run to
run. Memory is the process's peak, and what of it the hints added to Python and the stream.
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

SLOTS, ROW = 512, 48  # those of a run with the default TTT_BATCH_SIZE and TTT_CHUNK_SIZE
# The defaults of the settings.
ORDERS = [33, 16, 9, 6]
DOCUMENT_ORDERS = [5, 3]
TABLE_BITS = 28
BOOSTS = "fixed", "learned"
TITLES = ("     tokens  boost     M targets/s       gated  peak MiB  of that hints  "
          "seconds of each run (of them system)")


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def peak_mib() -> float:
    """Most memory this process has used. Linux's ru_maxrss would count the process it was started from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, (n,) uint16: 1,024 bytes of header, of which the third int32 is n."""
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
    except (OSError, lzma.LZMAError) as error:
        raise SystemExit(f"cannot read {path}: {error}") from None
    magic, _, count = np.frombuffer(data, "<i4", 3) if len(data) >= 1024 else (0, 0, 0)
    if magic != 20240520 or len(data) != 1024 + 2 * count:
        raise SystemExit(f"{path} is not a token shard")
    return np.frombuffer(data, "<u2", offset=1024)


def synthetic(length: int) -> np.ndarray:
    """Zipf-distributed tokens of a vocabulary of 8,192, a tenth of them in copied passages of 100."""
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(10, 8202)
    cumulative = np.cumsum(weights / weights.sum()).astype(np.float32)
    uniform = draw.random(length, np.float32)
    tokens = np.searchsorted(cumulative[:-1], uniform).astype(np.uint16)
    for to in range(1000, length - 100, 1000):
        start = draw.integers(to - 100)
        tokens[to:to + 100] = tokens[start:start + 100]
    return tokens


def stream_of(shards: list[Path], length: int) -> tuple[np.ndarray, str]:
    """`length` tokens, and what they are."""
    if not shards:
        return synthetic(length), "synthetic"
    parts = []
    read = 0
    for shard in shards:
        if read < length:
            parts.append(read_shard(shard))
            read += len(parts[-1])
    return np.resize(np.concatenate(parts), length), f"{len(parts)} shards, {read} tokens"


def steps(length: int) -> list[np.ndarray]:
    """The rows (slots, 4) of each step: SLOTS equal documents side by side, ROW targets each."""
    size = -(-length // SLOTS)
    first = np.arange(0, length, size)
    last = np.minimum(first + size, length) - 1
    begins = [np.minimum(first + done, last) for done in range(0, size - 1, ROW)]
    document = np.arange(len(first))
    return [np.stack((document, first, begin, np.minimum(begin + ROW, last)), 1) for begin in begins]


def count(tokens: np.ndarray, rows: list[np.ndarray], boost: str, piece: int) -> int:
    """Count the tokens; returns how many targets have hints."""
    if boost == "learned":
        experts = ngram.Experts(ORDERS, DOCUMENT_ORDERS, TABLE_BITS, len(rows[0]))
        return sum(int(experts.ask(tokens, some).gate.any(1).sum()) for some in rows)
    if not piece:
        return int(ngram.token_hints(tokens).gate.sum())
    state = ngram.NgramState()
    pieces = (tokens[at:at + piece] for at in range(0, len(tokens) - 1, piece))
    return sum(int(state.feed(some).gate.sum()) for some in pieces)


def measure(path: str, length: int, boost: str, piece: int, connection) -> None:
    """In a process of its own: seconds, those in the kernel, gated targets, peak MiB, that at the start."""
    tokens = np.fromfile(path, np.uint16, length)
    rows = steps(length)
    ngram.load()  # its compilation is not measured
    before = peak_mib()
    system, started = os.times().system, time.perf_counter()
    gated = count(tokens, rows, boost, piece)
    seconds = time.perf_counter() - started
    connection.send((seconds, os.times().system - system, gated, peak_mib(), before))


def measured(*arguments) -> tuple:
    """What `measure` sends."""
    spawn = multiprocessing.get_context("spawn")  # a fork would start with this process's memory
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=measure, args=(*arguments, theirs))
    process.start()
    theirs.close()  # or recv would wait for ever on a process that has died
    result = ours.recv()
    process.join()
    return result


def row_of(length: int, boost: str, runs: list[tuple]) -> dict:
    seconds, system, gated, peaks, before = zip(*runs)
    rate = length / float(np.median(seconds))
    return dict(tokens=length, boost=boost, seconds=[round(x, 3) for x in seconds],
                system_seconds=[round(x, 2) for x in system], gated=gated[0], peak_mib=round(max(peaks)),
                targets_per_s=round(rate), hints_mib=round(max(peaks) - before[0]))


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("shards", nargs="*", type=Path, metavar="SHARD")
    parser.add_argument("--lengths", nargs="+", type=float, default=[2, 10, 47.85], metavar="M",
                        help="millions of tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--piece", type=int, default=0, metavar="N",
                        help="tokens a feed of the stream; 0: all")
    parser.add_argument("--record", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args()
    lengths = [round(millions * 1e6) for millions in options.lengths]
    if min(lengths) < 2 or options.runs < 1 or options.piece < 0:
        parser.error("needs at least two tokens, one run and no negative piece")
    stream, source = stream_of(options.shards, max(lengths))
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    record = dict(processor=processor_name(), cores=os.cpu_count(), compiler=compiler, numpy=np.__version__,
                  stream=source, piece=options.piece)
    print(", ".join(f"{name} {value}" for name, value in record.items()))
    print(TITLES)
    record["rows"] = []
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ngram_{os.getpid()}.bin"
    stream.tofile(path)  # faster than through the pipe
    del stream
    try:
        for length, boost in itertools.product(lengths, BOOSTS):
            arguments = str(path), length, boost, options.piece
            row = row_of(length, boost, [measured(*arguments) for _ in range(options.runs)])
            record["rows"].append(row)
            times = " ".join(f"{s:.3f} ({k:.2f})" for s, k in zip(row["seconds"], row["system_seconds"]))
            print(f"{length:11,}  {boost:8}  {row['targets_per_s'] / 1e6:11.1f}  {row['gated']:10,}"
                  f"  {row['peak_mib']:8,}  {row['hints_mib']:13,}  {times}", flush=True)
    finally:
        path.unlink()
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
