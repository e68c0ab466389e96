"""Documents -> CaseOps token shards, validation byte sidecar, manifest.

    python prepare_caseops_data.py --docs docs.jsonl.xz --out data/mine --sp X.model --val-docs 2500

Four more commands live in tools/, one file each; --help lists their options:

    python prepare_caseops_data.py --download           tools/download_data.py: the published data set
    python prepare_caseops_data.py --check data/mine    tools/check_data.py: a data set against its manifest
    python prepare_caseops_data.py --train-tokenizer    tools/train_tokenizer.py: a lossless tokenizer
    python prepare_caseops_data.py --demo               tools/demo_corpus.py: a data set of Python's own text

Input is one {"text": ...} per line, plain or compressed (.xz, .gz, .bz2, .zst), a file or a pipe. The first
--val-docs documents are the validation split, the rest is the training split. A document becomes BOS (id 1)
and the tokens of its CaseOps form; a split is one stream of tokens, cut into shards regardless of documents.
A shard is 256 little-endian int32 (20240520, 1, token count, zeros) and then uint16 tokens. The sidecar has
the same layout and holds the number of original bytes that each validation token stands for.

Both splits come from one run and are described by one manifest.json, written last: a folder without it is
unfinished. Until then everything lies in a subfolder `.incomplete`, which the next run into the folder clears
away. While one run writes into a folder, others refuse it.

Exit codes: 0 done, 2 bad input (one line per fault), 130 interrupted.
"""

import argparse
import bz2
import codecs
import contextlib
import errno
import fcntl
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt during the imports ends it in silence

import numpy as np
from tqdm import tqdm

import lossless_caps
from lossless_caps import BOS, MAX_UINT16, Tokenizer, TokenizerError, pack_uint16

# The shards of the challenge.
MAGIC, VERSION = 20240520, 1
HEADER = struct.Struct("<256i")
VAL_DOCS = 50_000  # as published
SHARD_TOKENS = 10_000_000
BATCH_BYTES = 1 << 20  # a few tenths of a second of work
MANIFEST = "manifest.json"
STAGING = ".incomplete"
HOLDER = "held_by"  # a file in STAGING: which process writes
# The only files that --overwrite removes.
OWN_FILES = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin|manifest\.json")
AGAIN = "write or fetch it again"
ONE_PER_LINE = 'write one {"text": ...} object per line'
NOT_LOSSLESS = (
    "its normalizer changes the text before tokens are made (line breaks, tabs, repeated, leading or "
    "trailing blanks, control or compatibility characters); the sidecar counts the original bytes"
)


class DataError(Exception):
    """Something the user can mend. The message is one line: which file, where in it, what to do."""


# -----------------------------------------------------------------------------------------------------------
# Documents
# -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Consecutive documents of one split, each with the number of its line, from 1."""

    split: str
    source: str
    lines: list[tuple[int, bytes]]


class WatchedFile(io.RawIOBase):
    """A file or pipe that is read once, front to back; every byte advances the bar and updates the digest."""

    def __init__(self, file: io.RawIOBase, bar: tqdm, digest: "hashlib._Hash | None"):
        self.file = file
        self.bar = bar
        self.digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(buffer)
        self.bar.update(count)
        if self.digest:
            self.digest.update(memoryview(buffer)[:count])
        return count


def read_batches(
    docs: Path, val_docs: int, max_docs: int | None = None, digest: "hashlib._Hash | None" = None
) -> Iterator[Batch]:
    """The first `max_docs` documents of `docs` in order, about a MiB at a time, with a progress bar.

    Blank lines are skipped. `digest` is updated with every byte of the file. Raises DataError where the file
    cannot be read or decompressed, and where it holds no document.
    """
    with disk_errors(docs):
        file = open(docs, "rb", buffering=0)
        size = os.fstat(file.fileno()).st_size or None  # a pipe has none
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with file, tqdm(desc=docs.name, total=size, unit="B", unit_scale=True, mininterval=interval) as bar:
        source = WatchedFile(file, bar, digest)
        count = batch_bytes = 0
        lines = []
        for number, line in itertools.islice(numbered_lines(source, docs), max_docs):
            count += 1
            batch_bytes += len(line)
            lines.append((number, line))
            if batch_bytes >= BATCH_BYTES or count == val_docs:
                yield Batch("val" if count <= val_docs else "train", str(docs), lines)
                batch_bytes = 0
                lines = []
        if lines:
            yield Batch("val" if count <= val_docs else "train", str(docs), lines)
        if not count:
            raise DataError(f"{docs}: holds no document; {ONE_PER_LINE}")
        with disk_errors(docs):
            # The digest is that of the whole file, even if `max_docs` ends earlier.
            while digest and source.read(BATCH_BYTES):
                pass


def numbered_lines(source: WatchedFile, docs: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the decompressed lines that are not blank."""
    number = 0  # decompression may fail before the first line
    try:
        for number, line in enumerate(decompressed_lines(source, docs), 1):
            if not line.isspace():
                yield number, line
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{docs}:{number + 1}: cut or damaged ({error}); fetch or write it again") from error


def decompressed_lines(source: WatchedFile, docs: Path) -> Iterable[bytes]:
    """The decompressed lines of `source`. Its name tells the format, or its first bytes."""
    file = io.BufferedReader(source, BATCH_BYTES)
    start = file.peek()[:512]
    name = docs.name.lower()  # that of a pipe says nothing
    if not start:
        return []
    if name.endswith(".xz") or start.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.open(file), BATCH_BYTES)
    if name.endswith(".gz") or start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(file), BATCH_BYTES)
    if name.endswith(".bz2") or start.startswith(b"BZh"):
        return io.BufferedReader(bz2.open(file), BATCH_BYTES)
    if name.endswith((".zst", ".zstd")) or start.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstandard_lines(file, docs)
    # Once a file starts like a document, a bad byte is the fault of one line, reported with its number.
    if not start.lstrip().startswith(b"{") and not is_text(start):
        raise DataError(f"{docs}: neither text nor .xz, .gz, .bz2 or .zst; decompress it and {ONE_PER_LINE}")
    return file


def is_text(start: bytes) -> bool:
    """Whether a file that begins with `start`, cut anywhere, may be UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)


def _zstandard_lines(file: BinaryIO, docs: Path) -> Iterator[bytes]:
    """Frame by frame, because the package's own reader takes a file cut inside a frame for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{docs}: reading .zst needs the package zstandard (pip install zstandard)") from None
    frame = None
    rest = b""
    compressed = file.read(BATCH_BYTES // 8)
    while compressed:
        if frame is None:
            frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            *lines, rest = (rest + frame.decompress(compressed)).split(b"\n")
        except zstandard.ZstdError as error:
            raise EOFError(error) from error
        for line in lines:
            yield line + b"\n"
        compressed = frame.unused_data or file.read(BATCH_BYTES // 8)
        if frame.eof:
            frame = None
    if frame:
        raise EOFError("the last frame is cut")
    if rest:
        yield rest


def parse_document(line: bytes, where: str) -> tuple[str, bytes]:
    """The text of one line and its UTF-8 form. Raises DataError that starts with `where`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        # JSON's own "line 1" would contradict the line of the file.
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not valid JSON ({reason}); {ONE_PER_LINE}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no field "text" that holds a string; {ONE_PER_LINE}')
    if not text:
        raise DataError(f"{where}: empty document; remove the line")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: lone surrogate \\u{ord(text[error.start]):04x} at character {error.start} "
            "has no UTF-8 form; replace it, for instance by U+FFFD"
        ) from error


# -----------------------------------------------------------------------------------------------------------
# Workers
# -----------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A document ready to be written; values are little-endian uint16."""

    line: int
    tokens: bytes  # BOS and its ids
    sidecar: bytes  # original bytes per token; empty in the training split
    text_hash: bytes  # SHA-256 of its UTF-8 text
    text_bytes: int


_tokenizer: Tokenizer | None = None  # one per process, set by start_worker


def start_worker(model: bytes) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(model)
    parent = multiprocessing.parent_process()
    if parent:
        # A killed main process cannot stop its workers, and their queue never ends by itself.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_batch(batch: Batch) -> tuple[str, list[Document]]:
    """(split, its documents). Raises DataError with the line of a bad one."""
    return batch.split, [encode_document(line, number, batch) for number, line in batch.lines]


def encode_document(line: bytes, number: int, batch: Batch) -> Document:
    where = f"{batch.source}:{number}"
    text, utf8 = parse_document(line, where)
    encoded = lossless_caps.encode(text)
    if batch.split == "train":
        tokens = _tokenizer.encode(encoded)
        sidecar = b""
    else:
        tokens, counts = _tokenizer.encode_with_bytes(encoded)
        if max(counts, default=0) > MAX_UINT16:
            raise DataError(
                f"{where}: one token stands for {max(counts)} bytes, a sidecar entry holds {MAX_UINT16}; "
                "shorten the run of blanks in this document"
            )
        sidecar = pack_uint16([0, *counts])
    return Document(number, pack_uint16([BOS]) + tokens, sidecar, hashlib.sha256(utf8).digest(), len(utf8))


def map_in_order(function: Callable, items: Iterable, workers: int, model: bytes) -> Iterator:
    """`map(function, items)` in `workers` processes (1: this one), a bounded number of items in flight."""
    if workers == 1:  # easier to debug and profile, and nothing to pickle
        start_worker(model)
        yield from map(function, items)
        return
    # Forked workers would inherit the progress bar's thread in an unknown state, and all open files.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (model,))
    window = deque()  # in order; what is in it, not the file, bounds the memory
    try:
        # Processes inherit an ignored Ctrl-C: it is for the main process to act on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(workers):
            pool.submit(os.getpid)
        signal.signal(signal.SIGINT, handler)
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for want of memory; lower --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns OSError into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        remedy = "check the path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space or choose another --out"
        raise DataError(f"{path}: {error.strerror or error}; {remedy}") from error


def read_tokenizer(path: Path) -> Tokenizer:
    with disk_errors(path):
        model = path.read_bytes()
    try:
        return Tokenizer(model)
    except TokenizerError as error:
        raise DataError(f"{path}: {error}") from error


def write_file(path: Path, *contents: bytes) -> None:
    """Writes a whole file; `path` names it only when all of it is on disk."""
    part = path.with_name(path.name + STAGING)
    try:
        with disk_errors(path):
            with open(part, "wb") as file:
                for content in contents:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(out: Path) -> Iterator[Path]:
    """Locks the folder `out` against other runs; yields a subfolder to write into, removed at the end.

    Raises DataError that says who holds the lock. The operating system drops it when its process ends.
    """
    stage = out / STAGING
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    try:
        lock(folder, out)
        try:
            with disk_errors(out):
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
                (stage / HOLDER).write_text(f"process {os.getpid()} on {os.uname().nodename}")
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(folder)


def lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "another run"
        with contextlib.suppress(OSError):  # it has only just begun, or is about to end
            holder = (out / STAGING / HOLDER).read_text() or holder
        raise DataError(f"{out}: {holder} is writing here; wait for it or choose another --out") from None
    except OSError:
        print(f"{out}: its file system has no locks, so start nothing else that writes there")


def old_files(out: Path, overwrite: bool) -> list[str]:
    """The names of the data set in `out`, the manifest first.

    Raises DataError when there are some and `overwrite` is off: two runs may disagree about which documents
    are validation, and a mixture of their shards would train on what it is scored on.
    """
    names = sorted(filter(OWN_FILES.fullmatch, os.listdir(out)), key=lambda name: name != MANIFEST)
    if names and not overwrite:
        raise DataError(
            f"{out}: holds a data set already ({names[0]} and {len(names) - 1} more), and splits of "
            "different runs may share documents; choose another --out, or replace all of it with --overwrite"
        )
    return names


def publish(stage: Path, out: Path, old: list[str]) -> None:
    """Moves the files in `stage` to their final names in `out`, in place of the files `old`.

    The old manifest goes first and the new one comes last, so that none ever vouches for a mixture.
    """
    with disk_errors(out):
        os.remove(stage / HOLDER)
        for name in old:
            os.remove(out / name)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == MANIFEST):
            if file.name == MANIFEST:
                sync_folder(out)  # without this a crash could keep the manifest and lose a shard
            os.replace(file, out / file.name)
        sync_folder(out)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class ShardWriter:
    """Writes a stream of uint16 values into shards `<stem>_000000.bin`, ... of `shard_tokens` values each."""

    def __init__(self, folder: Path, stem: str, shard_tokens: int):
        self.folder = folder
        self.stem = stem
        self.shard_bytes = 2 * shard_tokens
        self.pending = bytearray()  # less than a shard
        self.shards: list[dict] = []

    def write(self, values: bytes) -> None:
        self.pending += values
        while len(self.pending) >= self.shard_bytes:
            self._write_shard(self.pending[: self.shard_bytes])
            del self.pending[: self.shard_bytes]

    def close(self) -> list[dict]:
        """Writes the last shard, which may be short; returns name, tokens and SHA-256 of all."""
        if self.pending:
            self._write_shard(self.pending)
        return self.shards

    def _write_shard(self, values: bytearray) -> None:
        path = self.folder / f"{self.stem}_{len(self.shards):06d}.bin"
        tokens = len(values) // 2
        header = HEADER.pack(MAGIC, VERSION, tokens, *[0] * 253)
        write_file(path, header, values)
        digest = hashlib.sha256(header)
        digest.update(values)
        self.shards.append({"file": path.name, "tokens": tokens, "sha256": digest.hexdigest()})


# -----------------------------------------------------------------------------------------------------------
# Preparation
# -----------------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """How documents become a data set. `duplicates`: "refuse", "drop" or "keep", see write_splits."""

    val_docs: int = VAL_DOCS
    max_docs: int | None = None
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    duplicates: str = "refuse"


class Split:
    """One split while it is written: its shards and running totals."""

    def __init__(self, name: str, first_doc: int, stage: Path, shard_tokens: int):
        self.shards = ShardWriter(stage, f"fineweb_{name}", shard_tokens)
        self.sidecar = ShardWriter(stage, f"fineweb_{name}_bytes", shard_tokens)
        self.sidecar_bytes = 0
        self.text_hashes = hashlib.sha256()
        self.totals = {"docs": 0, "first_doc": first_doc, "tokens": 0, "text_bytes": 0}

    def add(self, document: Document) -> None:
        self.shards.write(document.tokens)
        self.sidecar.write(document.sidecar)
        self.sidecar_bytes += int(np.frombuffer(document.sidecar, "<u2").sum(dtype=np.int64))
        self.text_hashes.update(document.text_hash)
        self.totals["docs"] += 1
        self.totals["tokens"] += len(document.tokens) // 2
        self.totals["text_bytes"] += document.text_bytes  # UTF-8 length of the documents

    def close(self) -> list[dict]:
        return [*self.shards.close(), *self.sidecar.close()]

    def record(self) -> dict:
        return self.totals | {"docs_sha256": self.text_hashes.hexdigest()}


def write_splits(stage: Path, docs: Path, model: Path, options: Options) -> dict:
    """Writes tokenizer, shards and manifest into the folder `stage`; returns the manifest.

    A training document with the tokens of a validation document is an error, left out, or kept, as
    `options.duplicates` says. Tokens rather than texts are compared because the model sees tokens.
    """
    tokenizer = read_tokenizer(model)
    if not tokenizer.lossless:
        print(f"{model.name} is not lossless: {NOT_LOSSLESS}")
    val = Split("val", 0, stage, options.shard_tokens)
    train = Split("train", options.val_docs, stage, options.shard_tokens)
    val_lines = {}  # of each validation document, by the hash of its tokens
    repeated = []
    digest = hashlib.sha256()
    with contextlib.closing(read_batches(docs, options.val_docs, options.max_docs, digest)) as batches:
        for name, documents in map_in_order(encode_batch, batches, options.workers, tokenizer.model):
            for document in documents:
                token_hash = hash_tokens(document.tokens).digest()
                if name == "val":
                    val_lines[token_hash] = document.line
                    val.add(document)
                elif token_hash not in val_lines:
                    train.add(document)
                elif options.duplicates == "refuse":
                    raise DataError(
                        f"{docs}:{document.line}: this training document repeats the validation document of "
                        f"line {val_lines[token_hash]}; leave such documents out with --duplicates drop"
                    )
                else:
                    repeated.append(document.line)
                    if options.duplicates == "keep":
                        train.add(document)
    if not train.totals["docs"]:
        raise no_training_documents(docs, val.totals["docs"], options.val_docs)
    write_file(stage / model.name, tokenizer.model)
    manifest = make_manifest(
        tokenizer,
        model.name,
        source={"file": docs.name, "sha256": digest.hexdigest()},
        splits={"val": val.record() | {"bytes": val.sidecar_bytes}, "train": train.record()},
        duplicates={"rule": options.duplicates, "count": len(repeated), "lines": repeated},
        shards=[*train.close(), *val.close()],
    )
    write_manifest(stage, manifest)
    return manifest


def hash_tokens(tokens: bytes) -> "hashlib._Hash":
    return hashlib.blake2b(tokens, digest_size=16)  # 16 bytes: it is kept for every validation document


def no_training_documents(docs: Path, found: int, val_docs: int) -> DataError:
    return DataError(
        f"{docs}: holds {found} documents, and --val-docs {val_docs} "
        "leaves no document for training; lower it"
    )


def make_manifest(
    tokenizer: Tokenizer, name: str, source: dict, splits: dict, duplicates: dict, shards: list[dict]
) -> dict:
    about_tokenizer = {
        "file": name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "lossless": tokenizer.lossless,
    }
    if not tokenizer.lossless:
        about_tokenizer["note"] = NOT_LOSSLESS
    return {
        "format": 1,  # of this manifest
        "transform": lossless_caps.TRANSFORM,
        "tokenizer": about_tokenizer,
        "bos_id": BOS,
        "source": source,
        "splits": splits,
        "splits_disjoint": duplicates["rule"] == "drop" or duplicates["count"] == 0,
        "duplicates": duplicates,
        "shards": shards,
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def prepare(docs: Path, out: Path, model: Path, overwrite: bool = False, **options) -> dict:
    """Writes the data set of `docs` into the folder `out` and returns its manifest; options as in Options.

    Raises DataError on bad input and on a full disk, with nothing left under a final name.
    """
    started = time.monotonic()
    with hold(out) as stage:
        old = old_files(out, overwrite)
        manifest = write_splits(stage, docs, model, Options(**options))
        publish(stage, out, old)
    report(manifest, out, started)
    return manifest


def report(manifest: dict, folder: Path, started: float) -> None:
    for name, split in manifest["splits"].items():
        print(f"{name}: {split['docs']:,} documents, {split['tokens']:,} tokens")
    count = manifest["duplicates"]["count"]
    if not manifest["splits_disjoint"]:
        print(f"NOT disjoint: {count:,} training documents repeat a validation document")
    elif count:
        print(f"{count:,} training documents that repeat a validation document were left out")
    print(f"{folder}: {len(manifest['shards'])} shards, {time.monotonic() - started:.1f} s")


# -----------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------

TOOLS = {
    "--check": "check_data",
    "--download": "download_data",
    "--train-tokenizer": "train_tokenizer",
    "--demo": "demo_corpus",
}


class Console:
    """A stream that outlives its terminal, pipe or disk: the files matter, not the messages about them."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            # What is still in the stream's buffer goes where it cannot fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def exit_code(function: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a command: 0, 2 with one line per fault on bad input, 130 when interrupted."""
    with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
        try:
            function(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (DataError, OSError) as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return 2
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def command_parser(file: str, text: str) -> argparse.ArgumentParser:
    """A parser for the script `file`, without options yet, whose help is the docstring `text`."""
    summary, _, details = text.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    name = Path(file).name
    return argparse.ArgumentParser(name, description=summary, epilog=details, formatter_class=layout)


def run(arguments: list[str]) -> None:
    number = {"type": positive, "metavar": "N"}
    parser = command_parser(__file__, __doc__)
    parser.add_argument("--docs", type=Path, required=True, help="documents; /dev/stdin reads a pipe")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--sp", type=Path, required=True, metavar="MODEL", help="SentencePiece model")
    parser.add_argument("--val-docs", **number, default=VAL_DOCS, help="for validation (%(default)s)")
    parser.add_argument("--max-docs", **number, help="read only so many documents")
    parser.add_argument("--shard-tokens", **number, default=SHARD_TOKENS, help="per shard (%(default)s)")
    parser.add_argument("--workers", **number, default=os.cpu_count() or 1, help="processes (%(default)s)")
    rules = parser.add_argument("--duplicates", choices=("refuse", "drop", "keep"), default="refuse")
    rules.help = "training documents that repeat a validation document (%(default)s)"
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in --out")
    options = vars(parser.parse_args(arguments))
    prepare(options.pop("docs"), options.pop("out"), options.pop("sp"), **options)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in TOOLS:
            tool = importlib.import_module(f"tools.{TOOLS[option]}")
            return tool.main([*arguments[:index], *filter(None, [value]), *arguments[index + 1 :]])
    return exit_code(run, arguments)


if __name__ == "__main__":
    import prepare_caseops_data  # the copy that tools/ import, so that both use the same classes

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(prepare_caseops_data.main())
