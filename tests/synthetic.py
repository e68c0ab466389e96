"""Tiny learnable data sets and a tiny model for the tests of train_gpt.py."""
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import train_gpt as g

ROOT = Path(__file__).resolve().parent.parent
BOS = 1
VOCAB = 256

TINY = dict(
    VOCAB_SIZE="256", NUM_LAYERS="5", MODEL_DIM="64", NUM_HEADS="4", NUM_KV_HEADS="2", MLP_MULT="2",
    XSA_LAST_N="5", NUM_LOOPS="1", LOOP_START="1", LOOP_END="2", PARALLEL_START_LAYER="3", ROPE_DIMS="8",
    TRAIN_BATCH_TOKENS="2048", GRAD_ACCUM_STEPS="2", TRAIN_SEQ_LEN="256", EVAL_SEQ_LEN="256",
    VAL_BATCH_TOKENS="16384", ITERATIONS="20", MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="1",
    TRAIN_LOG_EVERY="1", EMA_DECAY="0.8", TIED_EMBED_INIT_STD="0.05", GRAD_CLIP_NORM="1.0",
    GPTQ_CALIBRATION_BATCHES="4", TTT_ENABLED="0", NGRAM_TABLE_BITS="16")

# Of the tests' own environment only these reach a run.
INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")


def environment(folder=None, **changes) -> dict[str, str]:
    """The variables of a tiny run: data in folder/data, everything it writes in folder/out."""
    result = dict(TINY)
    if folder:
        result |= dict(DATA_PATH=str(folder / "data"), ARTIFACT_DIR=str(folder / "out"), RUN_ID="tiny")
    return result | {name: str(value) for name, value in changes.items()}


def tiny(folder=None, **changes) -> g.Settings:
    return g.Settings.from_environment(environment(folder, **changes))


def documents(count: int, seed: int = 0, longest: int = 300) -> list[np.ndarray]:
    """Random documents, BOS included: mostly a fixed successor of the last token, else a skewed draw."""
    successor = np.random.default_rng(99).permutation(np.arange(2, VOCAB))
    draw = np.random.default_rng(seed)
    result = []
    for length in draw.integers(2, longest, count):
        tokens = [BOS]
        follows = draw.random(length) < 0.8
        others = 2 + np.minimum(draw.geometric(0.03, length), VOCAB - 3)
        for kept, other in zip(follows, others):
            tokens.append(int(successor[tokens[-1] - 2]) if kept and tokens[-1] != BOS else int(other))
        result.append(np.array(tokens, dtype=np.uint16))
    return result


def bytes_of(tokens: np.ndarray) -> np.ndarray:
    """The bytes that the synthetic tokens stand for: none for BOS, else one to four."""
    return np.where(tokens == BOS, 0, 1 + tokens % 4).astype(np.uint16)


def write_shard(path: Path, values) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(values)
    path.write_bytes(header.tobytes() + np.asarray(values, dtype="<u2").tobytes())


def write_data(folder: Path, train, val, shards: int = 3, sidecar=None) -> Path:
    """Write the two streams, any sequences of token ids; training's is cut into `shards` uneven pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    train, val = np.asarray(train), np.asarray(val)
    cuts = [len(train) * (i + 1) ** 2 // (shards + 1) ** 2 for i in range(shards - 1)]
    for number, piece in enumerate(np.split(train, cuts)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", piece)
    write_shard(folder / "fineweb_val_000000.bin", val)
    write_shard(folder / "fineweb_val_bytes_000000.bin", bytes_of(val) if sidecar is None else sidecar)
    return folder


def write_corpus(folder: Path, train_docs: int = 600, val_docs: int = 60) -> Path:
    train, val = documents(train_docs, 1), documents(val_docs, 2)
    return write_data(folder, np.concatenate(train), np.concatenate(val))


def unigram_bpb(folder: Path) -> float:
    """Bits per byte of the validation stream under add-one counts of the training stream."""
    train = np.concatenate([g.open_shard(str(path)) for path in folder.glob("fineweb_train_*.bin")])
    targets = g.open_shard(str(folder / "fineweb_val_000000.bin"))[1:]
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    return float(-np.log2(counts / counts.sum())[targets].sum() / bytes_of(targets).sum())


def start(env: dict, *arguments, ranks=1, script=ROOT / "train_gpt.py", **options) -> subprocess.Popen:
    """Start the program in a clean environment plus `env`; more than one rank through torchrun."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([sys.executable, *launcher, str(script), *arguments],
                            env=inherited | {"OMP_NUM_THREADS": "1"} | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def launch(env: dict, *arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """`start` and wait for the end."""
    with start(env, *arguments, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def main_here(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """The program in this process, which has imported already what takes a new one four seconds."""
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    handlers = [signal.getsignal(number) for number in numbers]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = g.main(list(arguments), env)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
    print(out.getvalue(), err.getvalue(), sep="\n")  # for whoever reads why a test failed
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def record(folder: Path, run_id: str = "tiny") -> dict:
    return json.loads((folder / "out" / f"{run_id}.json").read_text())


def events(record: dict, kind: str) -> list[dict]:
    return [event for event in record["events"] if event["event"] == kind]


def runtime(rank: int = 0, world_size: int = 1) -> g.Runtime:
    return g.Runtime(rank, world_size, g.torch.device("cpu"))


def changed(settings: g.Settings, **fields) -> g.Settings:
    return dataclasses.replace(settings, **fields)
