"""Documents -> CaseOps token shards, validation byte sidecar, manifest.

    python prepare_caseops_data.py --docs docs.jsonl.xz --out data/mine --sp tokenizers/X.model --val-docs 2500
    python prepare_caseops_data.py --check data/mine [--docs docs.jsonl.xz]
    python prepare_caseops_data.py --download [--train-shards N] [--out DIR]
    python prepare_caseops_data.py --train-tokenizer --vocab-size V --docs docs.jsonl.xz --out tokenizers
    python prepare_caseops_data.py --demo [--out data/demo]

Input is one {"text": ...} per line, plain or compressed (.xz, .gz, .zst). The first --val-docs documents
are the validation split, the rest is the training split. A document becomes BOS (id 1) and the tokens of its
CaseOps form; a split is one stream of tokens, cut into shards regardless of documents. A shard is 256
little-endian int32 (20240520, 1, token count, zeros) and then uint16 tokens. The sidecar has the same layout and
holds the number of original bytes that each validation token stands for.

Both splits come from one run and are described by one manifest.json, written last: a folder without it is
unfinished. Until then everything lies in a subfolder `.incomplete`, which the next run into the folder clears away.

Exit codes: 0 done, 2 bad input (one line per fault), 130 interrupted.
"""

import argparse
import errno
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
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import sentencepiece
from tqdm import tqdm

import lossless_caps

MAGIC, VERSION, HEADER = 20240520, 1, struct.Struct("<256i")
BOS = 1
FIRST_OPERATOR_ID = 4
MAX_UINT16 = 65_535
WORD_MARK = "\u2581"  # what SentencePiece writes for a space
VAL_DOCS, SHARD_TOKENS = 50_000, 10_000_000
BATCH_BYTES = 1 << 20
AGAIN = "write or fetch it again"
MANIFEST, STAGING = "manifest.json", ".incomplete"
OWN_FILES = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin|manifest\.json")
PUBLISHED_REPO = "romeerp/parameter-golf-caseops-v1"
PUBLISHED_SHARDS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
PUBLISHED_TOKENIZER = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
PUBLISHED_FOLDER = Path("data/datasets/fineweb10B_sp8192_caseops")  # where train_gpt.py and run.sh look for it


class DataError(Exception):
    """Something the user can mend. The message is one line: which file, where in it, what to do."""


# -----------------------------------------------------------------------------------------------------------
# Documents
# -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Consecutive lines of the documents file, all of one split. Lines count from 1."""

    split: str
    source: str
    first_line: int
    lines: list[bytes]


def open_lines(raw: BinaryIO, name: str) -> Iterable[bytes]:
    """The decompressed lines of the documents file `name`, opened as `raw`."""
    if name.endswith(".xz"):
        return io.BufferedReader(lzma.open(raw), BATCH_BYTES)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(raw), BATCH_BYTES)
    return _zstandard_lines(raw, name) if name.endswith(".zst") else raw


def _zstandard_lines(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Frame by frame, because the package's own reader takes a file cut inside a frame for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{name}: reading .zst needs the package zstandard (pip install zstandard)") from None
    frame, compressed, rest = None, b"", b""
    while compressed := compressed or raw.read(BATCH_BYTES // 8):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            *lines, rest = (rest + frame.decompress(compressed)).split(b"\n")
        except zstandard.ZstdError as error:
            raise EOFError(error) from error
        yield from (line + b"\n" for line in lines)
        compressed, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is cut")
    if rest:
        yield rest


def read_batches(docs: Path, val_docs: int, max_docs: int | None = None) -> Iterator[Batch]:
    """The first `max_docs` lines of `docs` in order, about a MiB at a time, with a progress bar.

    Raises DataError where the file cannot be read or decompressed.
    """
    with disk_errors(docs):
        raw, size = open(docs, "rb"), docs.stat().st_size
    units = {"total": max_docs, "unit": " docs"} if max_docs else {"total": size, "unit": "B", "unit_scale": True}
    interval = 0.2 if sys.stderr.isatty() else 30.0
    line_number, lines, batch_bytes = 0, [], 0
    with raw, tqdm(desc=docs.name, mininterval=interval, **units) as bar:
        try:
            for line in itertools.islice(open_lines(raw, docs.name), max_docs):
                line_number += 1
                lines.append(line)
                batch_bytes += len(line)
                if batch_bytes >= BATCH_BYTES or line_number == val_docs:
                    yield _batch(docs, line_number, lines, val_docs)
                    lines, batch_bytes = [], 0
                    bar.update((line_number if max_docs else raw.tell()) - bar.n)
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise DataError(f"{docs}:{line_number + 1}: cut or damaged ({error}); fetch or write it again") from error
        if lines:
            yield _batch(docs, line_number, lines, val_docs)
        bar.update((line_number if max_docs else size) - bar.n)


def _batch(docs: Path, last_line: int, lines: list[bytes], val_docs: int) -> Batch:
    split = "val" if last_line <= val_docs else "train"
    return Batch(split, str(docs), last_line - len(lines) + 1, lines)


def parse_document(line: bytes, where: str) -> tuple[str, bytes]:
    """The text of one line and its UTF-8 form. Raises DataError that starts with `where`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: not valid JSON ({error}); write one {{"text": ...}} object per line') from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no field "text" that holds a string; write one {{"text": ...}} object per line')
    if not text:
        raise DataError(f"{where}: empty document; remove the line")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: lone surrogate \\u{ord(text[error.start]):04x} at character {error.start} has no UTF-8 form; "
            "replace it, for instance by U+FFFD"
        ) from error


# -----------------------------------------------------------------------------------------------------------
# Tokenizer
# -----------------------------------------------------------------------------------------------------------


# A NormalizerSpec without character map, dummy prefix or whitespace removal. Appended to a model it overrides the
# model's own, because protocol buffers merge a repeated message field by field.
IDENTITY_OVERRIDE = b"\x1a\x10\x0a\x08identity\x12\x00\x18\x00\x20\x00"
USE_CASEOPS = "use a CaseOps tokenizer (--train-tokenizer makes one)"
# What normalizers fold, collapse or drop, or the tokenizer itself might take for its own notation.
PROBE = "\t two  blanks\n\r\n\x00\x1b\x7f \ufb01\u2460\u00c5A\u030a\u00a0\u3000\ufeff\ufffd<s><0x0A>\U0001f600  "
NOT_LOSSLESS = (
    "its normalizer changes the text before tokens are made (line breaks, tabs, repeated, leading or trailing "
    "blanks, control or compatibility characters); the sidecar counts the original bytes"
)


_OTHER = rf"[^\x00-\x7f{WORD_MARK}{lossless_caps.OPERATORS}]"
# From fine to coarse: operators, digits, letters and punctuation apart (unless characters beyond ASCII join them);
# words with what clings to them; the whole document. Each begins with the blanks before it.
WORD_PATTERNS = (
    re.compile(
        f"{WORD_MARK}*(?:[0-9{lossless_caps.OPERATORS}]|[a-z]+(?![a-z]|{_OTHER})"
        rf"|[\x00-/:-`{{-\x7f]+(?![\x00-/:-`{{-\x7f]|{_OTHER})|[^{WORD_MARK}{lossless_caps.OPERATORS}]+)|{WORD_MARK}+"
    ),
    re.compile(f"{WORD_MARK}*[^{WORD_MARK}]+|{WORD_MARK}+"),
    re.compile("(?s:.+)"),
)


class Tokenizer:
    """A SentencePiece BPE with byte fallback, BOS id 1 and the CaseOps operators at ids 4 to 7.

    `lossless` says whether decoding gives back every byte of the encoded text. Raises DataError when the file is
    no such model.
    """

    def __init__(self, path: Path):
        with disk_errors(path):
            model = path.read_bytes()
        self.path, self.sha256 = path, hashlib.sha256(model).hexdigest()
        self.sp = _load_model(model, path)
        self.vocab_size = self.sp.get_piece_size()
        self._check()
        pieces = [self.sp.id_to_piece(index) for index in range(self.vocab_size)]
        self.piece_bytes = np.array(
            [1 if self.sp.is_byte(index) else len(piece.encode()) for index, piece in enumerate(pieces)]
        )
        self.lossless = self.sp.decode(self.sp.encode(PROBE)) == PROBE
        # SentencePiece writes a word mark found in the text as it writes a space; as bytes it survives.
        mark_ids = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_MARK.encode()]
        self.mark = _pack(mark_ids) if self.lossless else None
        self.word_pattern = self._word_pattern()
        self.words = _WordTokens(_load_model(model + IDENTITY_OVERRIDE, path))

    def _check(self) -> None:
        if self.vocab_size > MAX_UINT16:
            raise DataError(f"{self.path}: {self.vocab_size} pieces, but shards hold at most {MAX_UINT16}")
        wanted = {"BOS": (self.sp.bos_id(), BOS)}
        for index, operator in enumerate(lossless_caps.OPERATORS):
            wanted[f"U+{ord(operator):04X}"] = (self.sp.piece_to_id(operator), FIRST_OPERATOR_ID + index)
        for name, (found, needed) in wanted.items():
            if found != needed:
                raise DataError(f"{self.path}: {name} has id {found}, not {needed}; {USE_CASEOPS}")
        if sum(map(self.sp.is_byte, range(self.vocab_size))) != 256:
            raise DataError(f"{self.path}: no byte fallback, so rare characters would be lost; {USE_CASEOPS}")

    def _word_pattern(self) -> re.Pattern:
        """The finest way to cut a normalized text into words that BPE merges never cross."""
        scores = map(self.sp.get_score, range(self.vocab_size))
        if not all(score.is_integer() for score in scores):  # log probabilities: not a BPE, whose scores are ranks
            return WORD_PATTERNS[-1]
        special = (self.sp.is_byte, self.sp.is_control, self.sp.is_unknown)
        ids = [index for index in range(self.vocab_size) if not any(is_a(index) for is_a in special)]
        pieces = [self.sp.id_to_piece(index) for index in ids]
        return next(pattern for pattern in WORD_PATTERNS if all(pattern.findall(piece) == [piece] for piece in pieces))

    def encode(self, text: str) -> bytes:
        """Little-endian uint16 ids of the encoded text, without BOS; the same as SentencePiece's own.

        A word has the same tokens wherever it stands, so SentencePiece is asked once for each distinct word.
        """
        if self.lossless and WORD_MARK in text:
            return self.mark.join(map(self.encode, text.split(WORD_MARK)))
        return b"".join(map(self.words.__getitem__, self.word_pattern.findall(self.sp.normalize(text))))

    def encode_with_bytes(self, text: str) -> tuple[bytes, list[int]]:
        """`encode(text)` and the original UTF-8 bytes that each of its ids stands for.

        The pieces' lengths cut the normalized text, the normalizer's offsets carry the cuts back to `text`. A cut
        inside a character moves to its begin, which gives the character to its last byte piece.
        """
        tokens = self.encode(text)
        normalized, offsets = self.sp.normalize(text, with_offsets=True)
        utf8 = np.frombuffer(normalized.encode(), np.uint8)
        characters = np.append(np.cumsum(utf8 & 0xC0 != 0x80) - 1, len(normalized))  # of each byte, and the end
        cuts = np.append(0, np.cumsum(self.piece_bytes[np.frombuffer(tokens, "<u2")]))
        cuts = np.array(offsets)[characters[cuts]].tolist()
        return tokens, lossless_caps.attribute_bytes(text[begin:end] for begin, end in itertools.pairwise(cuts))


class _WordTokens(dict):
    """Word -> packed ids, bounded."""

    MAX_WORDS, MAX_WORD_LENGTH = 1 << 18, 64

    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        super().__init__()
        self.sp = sp

    def __missing__(self, word: str) -> bytes:
        tokens = _pack(self.sp.encode(word))
        if len(word) <= self.MAX_WORD_LENGTH:
            if len(self) >= self.MAX_WORDS:
                self.clear()
            self[word] = tokens
        return tokens


def _load_model(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model; give --sp a .model file") from error
    return sp


def _pack(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


# -----------------------------------------------------------------------------------------------------------
# Workers
# -----------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A document ready to be written; values are little-endian uint16. `sidecar` is empty in the training split."""

    line: int
    tokens: bytes  # BOS and its ids
    sidecar: bytes  # original bytes per token
    text_hash: bytes  # SHA-256 of its UTF-8 text
    text_bytes: int


_tokenizer: Tokenizer  # one per process, set by start_worker


def start_worker(model: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(model)
    if parent := multiprocessing.parent_process():
        # A killed main process cannot stop its workers, and their queue never ends by itself.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_batch(batch: Batch) -> tuple[str, list[Document]]:
    """(split, its documents). Raises DataError with the line of a bad one."""
    lines = enumerate(batch.lines, batch.first_line)
    return batch.split, [encode_document(line, number, batch) for number, line in lines]


def encode_document(line: bytes, number: int, batch: Batch) -> Document:
    where = f"{batch.source}:{number}"
    text, utf8 = parse_document(line, where)
    encoded, sidecar = lossless_caps.encode(text), b""
    if batch.split == "train":
        tokens = _tokenizer.encode(encoded)
    else:
        tokens, counts = _tokenizer.encode_with_bytes(encoded)
        if max(counts, default=0) > MAX_UINT16:
            raise DataError(
                f"{where}: one token stands for {max(counts)} bytes, a sidecar entry holds {MAX_UINT16}; "
                "shorten the run of blanks in this document"
            )
        sidecar = _pack([0, *counts])
    return Document(number, _pack([BOS]) + tokens, sidecar, hashlib.sha256(utf8).digest(), len(utf8))


def map_in_order(function: Callable, items: Iterable, workers: int, model: Path) -> Iterator:
    """`map(function, items)` in `workers` processes (1: this one), a bounded number of items in flight."""
    if workers == 1:
        start_worker(model)
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (model,))
    window = deque()
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
        raise DataError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns OSError into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        remedy = {errno.ENOSPC: "; free some space or choose another --out", errno.ENOENT: "; check the path"}
        raise DataError(f"{path}: {error.strerror or error}{remedy.get(error.errno, '')}") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes a whole file; `path` names it only when all of it is on disk."""
    part = path.with_name(path.name + STAGING)
    with disk_errors(path):
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with disk_errors(path), open(path, "rb") as file:
        while block := file.read(BATCH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder inside `out` to write into; on success its files get their final names, the manifest last.

    Raises DataError when `out` holds a data set and `overwrite` is off: two runs may disagree about which
    documents are validation, and a mixture of their shards would train on what it is scored on.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        old = sorted(filter(OWN_FILES.fullmatch, os.listdir(out)), key=lambda name: name != MANIFEST)
        if old and not overwrite:
            raise DataError(
                f"{out}: holds a data set already ({old[0]} and {len(old) - 1} more), and splits of different runs may "
                "share documents; choose another --out, or replace all of it with --overwrite"
            )
        stage = out / STAGING
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
    try:
        yield stage
        with disk_errors(out):
            for name in old:
                os.remove(out / name)
            for file in sorted(stage.iterdir(), key=lambda file: file.name == MANIFEST):
                if file.name == MANIFEST:
                    sync_folder(out)
                os.replace(file, out / file.name)
            sync_folder(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class ShardWriter:
    """Writes one stream of uint16 values into shards `<stem>_000000.bin`, ... of `shard_tokens` values each."""

    def __init__(self, folder: Path, stem: str, shard_tokens: int):
        self.folder, self.stem, self.shard_tokens = folder, stem, shard_tokens
        self.file, self.count = None, 0
        self.shards: list[dict] = []

    def write(self, values: bytes) -> None:
        rest = memoryview(values)
        while rest:
            if self.file is None:
                self.path = self.folder / f"{self.stem}_{len(self.shards):06d}.bin"
                with disk_errors(self.path):
                    self.file = open(self.path, "wb", buffering=0)
                    self.file.write(bytes(HEADER.size))
                self.count = 0
            room = 2 * (self.shard_tokens - self.count)
            part, rest = rest[:room], rest[room:]
            with disk_errors(self.path):
                unwritten = part
                while unwritten:
                    unwritten = unwritten[self.file.write(unwritten) :]
            self.count += len(part) // 2
            if self.count == self.shard_tokens:
                self._finish_shard()

    def close(self) -> list[dict]:
        """Finishes the last shard; returns name, tokens and SHA-256 of all."""
        if self.file:
            self._finish_shard()
        return self.shards

    def _finish_shard(self) -> None:
        with disk_errors(self.path), self.file as file:
            file.seek(0)
            file.write(HEADER.pack(MAGIC, VERSION, self.count, *[0] * 253))
            os.fsync(file.fileno())
        self.file = None
        self.shards.append({"file": self.path.name, "tokens": self.count, "sha256": sha256_file(self.path)})


# -----------------------------------------------------------------------------------------------------------
# Preparation
# -----------------------------------------------------------------------------------------------------------


class Split:
    """One split while it is written: its shards and running totals."""

    def __init__(self, name: str, first_doc: int, stage: Path, shard_tokens: int):
        self.shards = ShardWriter(stage, f"fineweb_{name}", shard_tokens)
        self.sidecar = ShardWriter(stage, f"fineweb_{name}_bytes", shard_tokens)
        self.text_hashes = hashlib.sha256()
        self.totals = {"docs": 0, "first_doc": first_doc, "tokens": 0, "text_bytes": 0}

    def add(self, document: Document) -> None:
        self.shards.write(document.tokens)
        self.sidecar.write(document.sidecar)
        self.text_hashes.update(document.text_hash)
        self.totals["docs"] += 1
        self.totals["tokens"] += len(document.tokens) // 2
        self.totals["text_bytes"] += document.text_bytes  # UTF-8 length of the documents

    def close(self) -> list[dict]:
        return [*self.shards.close(), *self.sidecar.close()]

    def record(self) -> dict:
        return self.totals | {"docs_sha256": self.text_hashes.hexdigest()}


def write_splits(
    stage: Path,
    docs: Path,
    model: Path,
    val_docs: int,
    max_docs: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    duplicates: str = "refuse",
) -> dict:
    """Writes tokenizer, shards and manifest into the folder `stage`; returns the manifest.

    A training document with the tokens of a validation document is an error, left out, or kept, as `duplicates`
    says ("refuse", "drop", "keep"). Tokens rather than texts are compared because the model sees tokens.
    """
    tokenizer = Tokenizer(model)
    if not tokenizer.lossless:
        print(f"{model.name} is not lossless: {NOT_LOSSLESS}")
    first_docs = {"val": 0, "train": val_docs}
    splits = {name: Split(name, first_doc, stage, shard_tokens) for name, first_doc in first_docs.items()}
    val_lines, val_bytes, repeated = {}, 0, []
    with closing(read_batches(docs, val_docs, max_docs)) as batches:
        for name, documents in map_in_order(encode_batch, batches, workers, model):
            for document in documents:
                token_hash = hash_tokens(document.tokens).digest()
                if name == "val":
                    val_lines[token_hash] = document.line
                    val_bytes += int(np.frombuffer(document.sidecar, "<u2").sum(dtype=np.int64))
                elif token_hash in val_lines:
                    if duplicates == "refuse":
                        raise DataError(
                            f"{docs}:{document.line}: this training document repeats the validation document of line "
                            f"{val_lines[token_hash]}; leave such documents out with --duplicates drop"
                        )
                    repeated.append(document.line)
                    if duplicates == "drop":
                        continue
                splits[name].add(document)
    if not splits["train"].totals["docs"]:
        raise DataError(f"{docs}: --val-docs {val_docs} leaves no document for training; lower it")
    write_file(stage / model.name, model.read_bytes())
    manifest = make_manifest(
        tokenizer,
        source={"file": docs.name, "sha256": sha256_file(docs)},
        splits={"val": splits["val"].record() | {"bytes": val_bytes}, "train": splits["train"].record()},
        duplicates={"rule": duplicates, "count": len(repeated), "lines": repeated},
        shards=[*splits["train"].close(), *splits["val"].close()],
    )
    write_file(stage / MANIFEST, manifest_bytes(manifest))
    return manifest


def make_manifest(tokenizer: Tokenizer, source: dict, splits: dict, duplicates: dict, shards: list[dict]) -> dict:
    return {
        "format": 1,
        "transform": lossless_caps.TRANSFORM,
        "tokenizer": {
            "file": tokenizer.path.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "lossless": tokenizer.lossless,
        }
        | ({} if tokenizer.lossless else {"note": NOT_LOSSLESS}),
        "bos_id": BOS,
        "source": source,
        "splits": splits,
        "splits_disjoint": duplicates["rule"] == "drop" or duplicates["count"] == 0,
        "duplicates": duplicates,
        "shards": shards,
    }


def manifest_bytes(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def prepare(docs: Path, out: Path, model: Path, overwrite: bool = False, **options) -> dict:
    """Writes the data set of `docs` into the folder `out` and returns its manifest; options as for write_splits.

    Raises DataError on bad input and on a full disk, with nothing left under a final name.
    """
    started = time.monotonic()
    with staged(out, overwrite) as stage:
        manifest = write_splits(stage, docs, model, **options)
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
# Checking
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Audit:
    """What a folder's shards hold, whatever its manifest says."""

    faults: list[str] = field(default_factory=list)
    shards: list[dict] = field(default_factory=list)
    splits: dict[str, dict] = field(default_factory=dict)  # docs, tokens; val: bytes
    shared_docs: int = 0  # training documents with the tokens of a validation document


def open_shard(path: Path) -> np.ndarray:
    """The values of a shard, (count,) little-endian uint16, mapped. Raises DataError on a bad header or size."""
    with disk_errors(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path}: {size} bytes, shorter than a shard's header; {AGAIN}")
    magic, version, count, *rest = HEADER.unpack(header)
    if (magic, version) != (MAGIC, VERSION) or any(rest):
        raise DataError(f"{path}: not a token shard (header {magic}, {version}); {AGAIN}")
    if count < 1 or size != HEADER.size + 2 * count:
        needed = HEADER.size + 2 * count
        raise DataError(f"{path}: {size} bytes, but the header's {count} tokens need {needed}: cut or damaged; {AGAIN}")
    return np.memmap(path, "<u2", "r", HEADER.size, (count,))


def hash_tokens(tokens: bytes) -> "hashlib._Hash":
    return hashlib.blake2b(tokens, digest_size=16)


def document_hashes(shards: Iterable[np.ndarray]) -> Iterator[bytes]:
    """One digest per document of a split; documents may run over shard ends."""
    digest = None
    for tokens in shards:
        cuts = [0, *np.flatnonzero(tokens == BOS).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(cuts):
            if begin == end:
                continue
            if tokens[begin] == BOS:
                if digest:
                    yield digest.digest()
                digest = hash_tokens(b"")
            digest.update(tokens[begin:end])
    yield digest.digest()


def audit(folder: Path, vocab_size: int) -> Audit:
    """Reads all shards of `folder`: headers, sizes, ids, BOS, sidecar, hashes, documents in both splits."""
    result, arrays = Audit(), {"train": [], "val": [], "val_bytes": []}
    paths = [path for path in sorted(folder.iterdir()) if path.suffix == ".bin" and OWN_FILES.fullmatch(path.name)]
    for path in tqdm(paths, desc=f"checking {folder.name}", unit=" shards", disable=None):
        try:
            values = open_shard(path)
        except DataError as error:
            result.faults.append(str(error))
            continue
        kind = OWN_FILES.fullmatch(path.name)[1]
        arrays[kind].append(values)
        result.shards.append({"file": path.name, "tokens": len(values), "sha256": sha256_file(path)})
        if kind != "val_bytes" and values.max() >= vocab_size:
            position = int(np.argmax(values >= vocab_size))
            result.faults.append(
                f"{path}: token {position} is {values[position]}, but the vocabulary has {vocab_size} pieces; {AGAIN}"
            )
    for kind, shards in arrays.items():
        if not shards:
            result.faults.append(f"{folder}: no usable fineweb_{kind}_*.bin; {AGAIN}")
        elif kind != "val_bytes" and shards[0][0] != BOS:
            result.faults.append(f"{folder}: the {kind} split does not start with BOS (id {BOS}); {AGAIN}")
    result.faults += sidecar_faults(folder, arrays["val"], arrays["val_bytes"])
    if not result.faults:
        val_hashes, train_docs = list(document_hashes(arrays["val"])), 0
        known = set(val_hashes)
        for digest in document_hashes(arrays["train"]):
            train_docs += 1
            result.shared_docs += digest in known
        val_bytes = sum(int(values.sum(dtype=np.int64)) for values in arrays["val_bytes"])
        result.splits = {
            "val": {"docs": len(val_hashes), "tokens": sum(map(len, arrays["val"])), "bytes": val_bytes},
            "train": {"docs": train_docs, "tokens": sum(map(len, arrays["train"]))},
        }
    return result


def sidecar_faults(folder: Path, val: list[np.ndarray], val_bytes: list[np.ndarray]) -> Iterator[str]:
    for index, (tokens, counts) in enumerate(zip(val, val_bytes)):
        name = folder / f"fineweb_val_bytes_{index:06d}.bin"
        if len(tokens) != len(counts):
            yield f"{name}: {len(counts)} entries, but its validation shard has {len(tokens)} tokens; {AGAIN}"
        elif counts[tokens == BOS].any():
            yield f"{name}: counts bytes for a BOS token; {AGAIN}"
    if len(val) != len(val_bytes):
        yield f"{folder}: {len(val)} readable validation shards, {len(val_bytes)} sidecars; {AGAIN}"


def read_manifest(folder: Path) -> dict:
    """The manifest of a data set. Raises DataError when it is missing or lacks something that `check` compares."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        wanted = {"docs", "tokens", "text_bytes", "docs_sha256"}
        for name, keys in {"val": wanted | {"bytes"}, "train": wanted}.items():
            if lacking := keys - manifest["splits"][name].keys():
                raise KeyError(f"{name} {min(lacking)}")
        if lacking := {"tokenizer", "shards", "duplicates", "splits_disjoint"} - manifest.keys():
            raise KeyError(min(lacking))
        return manifest
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, so the data set is unfinished; {AGAIN}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest of this tool ({error!r}); {AGAIN}") from error


def check(folder: Path, docs: Path | None = None) -> dict:
    """Verifies a data set against its manifest, and against its documents where given; returns the manifest.

    Raises DataError with one line per fault.
    """
    manifest = read_manifest(folder)
    tokenizer, splits = manifest["tokenizer"], manifest["splits"]
    stated = {shard["file"]: shard for shard in manifest["shards"]}
    shared_docs = 0 if manifest["splits_disjoint"] else manifest["duplicates"]["count"]
    model = folder / tokenizer["file"]
    found = audit(folder, tokenizer["vocab_size"])
    faults = found.faults
    if not model.is_file() or sha256_file(model) != tokenizer["sha256"]:
        faults.append(f"{model}: missing, or not the tokenizer that the manifest names; put it back")
    for shard in found.shards:
        if shard != stated.get(shard["file"]):
            faults.append(f"{folder / shard['file']}: not as the manifest says, changed or of another run; {AGAIN}")
    faults += [f"{folder / name}: missing; {AGAIN}" for name in stated if not (folder / name).is_file()]
    for name, counts in found.splits.items():
        for key, value in counts.items():
            if value != splits[name][key]:
                faults.append(f"{folder}: {value} {name} {key}, the manifest says {splits[name][key]}; {AGAIN}")
    if tokenizer["lossless"] and splits["val"]["text_bytes"] not in (None, splits["val"]["bytes"]):
        faults.append(f"{folder}: the sidecar's bytes do not sum to the validation text's; {AGAIN}")
    if found.shared_docs != shared_docs:
        faults.append(
            f"{folder}: {found.shared_docs} training documents repeat a validation document, the manifest says "
            f"{shared_docs}; write it again with --duplicates drop"
        )
    if docs:
        faults += document_faults(manifest, docs)
    if faults:
        raise DataError("\n".join(faults))
    return manifest


def document_faults(manifest: dict, docs: Path) -> Iterator[str]:
    """Whether `docs` are the documents that the manifest's splits were made of."""
    duplicates = manifest["duplicates"]
    dropped = set(duplicates["lines"]) if duplicates["rule"] == "drop" else set()
    val_docs, train_docs = (manifest["splits"][name]["docs"] for name in ("val", "train"))
    digests, val_hashes, shared = {"val": hashlib.sha256(), "train": hashlib.sha256()}, set(), 0
    with closing(read_batches(docs, val_docs, val_docs + train_docs + len(dropped))) as batches:
        for batch in batches:
            for number, line in enumerate(batch.lines, batch.first_line):
                if number in dropped:
                    continue
                text_hash = hashlib.sha256(parse_document(line, f"{docs}:{number}")[1]).digest()
                digests[batch.split].update(text_hash)
                if batch.split == "val":
                    val_hashes.add(text_hash)
                else:
                    shared += text_hash in val_hashes
    for name, digest in digests.items():
        stated = manifest["splits"][name]["docs_sha256"]
        if stated is None:
            yield f"{docs}: the manifest states no document hashes of the {name} split; leave out --docs"
        elif stated != digest.hexdigest():
            yield f"{docs}: not the documents of the {name} split; give the file that the data set was made of"
    if shared and manifest["splits_disjoint"]:
        yield f"{docs}: {shared} training documents repeat a validation document; prepare with --duplicates drop"


# -----------------------------------------------------------------------------------------------------------
# The published data set
# -----------------------------------------------------------------------------------------------------------


def download(out: Path, train_shards: int | None) -> Path:
    """Fetches the published data set into `out`, or what is still missing of it; returns the folder of its shards.

    The published files come without a manifest: one is written from what the shards are found to hold.
    Raises DataError offline and where the files are not a sound data set.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError("--download needs the package huggingface_hub (pip install huggingface_hub)") from None
    numbers = ["*"] if train_shards is None else [f"{index:06d}" for index in range(train_shards)]
    names = ["fineweb_val_*.bin"] + [f"fineweb_train_{number}.bin" for number in numbers]
    patterns = [f"*{PUBLISHED_SHARDS}/{name}" for name in names] + [f"*{PUBLISHED_TOKENIZER}"]
    try:
        snapshot_download(PUBLISHED_REPO, repo_type="dataset", local_dir=out, allow_patterns=patterns)
    except Exception as error:  # its releases raise what their HTTP library of the day raises
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(f"{PUBLISHED_REPO}: no download ({reason}); once online, run this again to resume") from error
    # Published uploads have had one and two levels of `datasets`.
    roots = [root for root in (out, out / "datasets") if (root / "datasets" / PUBLISHED_SHARDS).is_dir()]
    if not roots:
        raise DataError(f"{out}: the download holds no folder {PUBLISHED_SHARDS}; has {PUBLISHED_REPO} changed?")
    folder, model = roots[0] / "datasets" / PUBLISHED_SHARDS, roots[0] / "tokenizers" / PUBLISHED_TOKENIZER
    tokenizer = Tokenizer(model)
    found = audit(folder, tokenizer.vocab_size)
    if train_shards is not None and sum("train" in shard["file"] for shard in found.shards) < train_shards:
        found.faults.append(f"{folder}: fewer than {train_shards} training shards are published; ask for fewer")
    if found.faults:
        raise DataError("\n".join(found.faults))
    write_file(folder / model.name, model.read_bytes())
    unknown = {"text_bytes": None, "docs_sha256": None}
    first_doc = {"val": 0, "train": found.splits["val"]["docs"]}
    manifest = make_manifest(
        tokenizer,
        source={"file": PUBLISHED_REPO, "sha256": None},
        splits={name: counts | {"first_doc": first_doc[name]} | unknown for name, counts in found.splits.items()},
        duplicates={"rule": "keep", "count": found.shared_docs, "lines": []},
        shards=found.shards,
    )
    write_file(folder / MANIFEST, manifest_bytes(manifest))
    return folder


# -----------------------------------------------------------------------------------------------------------
# Tokenizer training
# -----------------------------------------------------------------------------------------------------------


def train_tokenizer(docs: Path, folder: Path, vocab_size: int, val_docs: int, max_docs: int | None = None) -> Path:
    """Trains a lossless BPE of `vocab_size` pieces on the training documents of `docs`; returns its file in `folder`.

    Ids: 0 pad, 1 BOS, 2 EOS, 3 unknown, 4-7 the operators, 8-263 the bytes. Identity normalization, no dummy
    prefix and no whitespace removal keep every byte. Raises DataError when the documents cannot give
    `vocab_size` pieces.
    """
    failure: list[BaseException] = []

    def sentences() -> Iterator[str]:
        try:
            with closing(read_batches(docs, val_docs, max_docs)) as batches:
                for batch in batches:
                    for number, line in enumerate(batch.lines, batch.first_line):
                        if batch.split == "train":
                            text = parse_document(line, f"{docs}:{number}")[0]
                            yield from filter(None, lossless_caps.encode(text).split(WORD_MARK))
        except BaseException as error:  # SentencePiece would report it as a text, without its type
            failure.append(error)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(lossless_caps.OPERATORS),
            max_sentence_length=1 << 30,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if not failure:
            reason = re.sub(r"^.*\] ", "", str(error).splitlines()[0])
            raise DataError(f"{docs}: no tokenizer of {vocab_size} pieces can be trained on this ({reason})") from error
    if failure:
        raise failure[0]
    path = folder / f"caseops_{vocab_size}_bpe_identity_v1.model"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(path, model.getvalue())
    tokenizer = Tokenizer(path)
    print(f"{path.name}: {tokenizer.vocab_size} pieces, SHA-256 {tokenizer.sha256}")
    return path


# -----------------------------------------------------------------------------------------------------------
# Demo corpus
# -----------------------------------------------------------------------------------------------------------

DEMO_DOCUMENT_CHARACTERS = 2_000
DEMO_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}


def demo_sources() -> Iterator[tuple[str, str]]:
    """(name, text) of what this Python carries: documentation topics, built-in docstrings, library source."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    yield from sorted((f"topic {name}", text) for name, text in topics.items())
    for name in sorted(sys.builtin_module_names):
        module = vars(importlib.import_module(name))
        classes = [vars(module[key]) for key in sorted(module) if isinstance(module[key], type)]
        members = [names[key] for names in (module, *classes) for key in sorted(names) if callable(names[key])]
        docstrings = (getattr(member, "__doc__", None) for member in members)
        yield f"builtin {name}", "\n\n\n".join(dict.fromkeys(doc for doc in docstrings if isinstance(doc, str)))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if DEMO_SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            try:
                yield f"source {path.relative_to(library).as_posix()}", path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # some sources declare another encoding on purpose


def cut_documents(text: str) -> Iterator[str]:
    """Documents of a few thousand characters, cut where two blank lines stand."""
    document = ""
    for block in text.split("\n\n\n"):
        document += ("\n\n\n" if document else "") + block
        if len(document) >= DEMO_DOCUMENT_CHARACTERS:
            yield document
            document = ""
    if document.strip():
        yield document


def demo(out: Path, vocab_size: int, shard_tokens: int, workers: int, overwrite: bool) -> dict:
    """Writes a small data set of real text into `out`: documents, tokenizer, shards, manifest.

    A tenth of the sources, chosen by a hash of their names, is validation; a source lies in one split whole, so
    that no document is scored whose other half was trained on. The same Python version gives the same files.
    """
    started = time.monotonic()
    documents, seen = {"val": [], "train": []}, set()
    for name, text in demo_sources():
        split = "val" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"
        fresh = [document for document in cut_documents(text) if document not in seen]
        seen.update(fresh)
        documents[split] += dict.fromkeys(fresh)
    if not documents["val"] or not documents["train"]:
        raise DataError(
            "this Python carries too little text for a demo; install its documentation topics or library source"
        )
    with staged(out, overwrite) as stage:
        docs = stage / "docs.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in documents["val"] + documents["train"])
        write_file(docs, "".join(lines).encode())
        val_docs = len(documents["val"])
        model = train_tokenizer(docs, stage, vocab_size, val_docs)
        manifest = write_splits(stage, docs, model, val_docs, shard_tokens=shard_tokens, workers=workers)
    report(manifest, out, started)
    return manifest


# -----------------------------------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------------------------------

# mode: (needed options, allowed options)
MODES = {
    "check": ((), ("docs",)),
    "download": ((), ("out", "train_shards")),
    "train_tokenizer": (("docs", "out", "vocab_size"), ("val_docs", "max_docs")),
    "demo": ((), ("out", "vocab_size", "shard_tokens", "workers", "overwrite")),
    None: (("docs", "out", "sp"), ("val_docs", "max_docs", "shard_tokens", "workers", "duplicates", "overwrite")),
}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=layout)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", type=Path, metavar="DIR", help="verify the data set in DIR")
    mode.add_argument("--download", action="store_true", help=f"fetch {PUBLISHED_REPO}")
    mode.add_argument("--train-tokenizer", action="store_true", help="train a lossless tokenizer")
    mode.add_argument("--demo", action="store_true", help="make a small data set from text that Python carries")
    parser.add_argument("--docs", type=Path, help="documents, one JSON object a line; plain, .xz, .gz or .zst")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--sp", type=Path, help="SentencePiece model")
    number = {"type": positive, "metavar": "N"}
    parser.add_argument("--val-docs", **number, default=VAL_DOCS, help="leading documents for validation (%(default)s)")
    parser.add_argument("--max-docs", **number, help="read only so many documents")
    parser.add_argument("--shard-tokens", **number, default=SHARD_TOKENS, help="tokens per shard (%(default)s)")
    parser.add_argument("--workers", **number, default=os.cpu_count() or 1, help="processes (%(default)s)")
    rules = parser.add_argument("--duplicates", choices=("refuse", "drop", "keep"), default="refuse")
    rules.help = "training documents that repeat a validation document (%(default)s)"
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in --out")
    parser.add_argument("--train-shards", **number, help="download only so many training shards")
    parser.add_argument("--vocab-size", **number, help="pieces of the tokenizer to train (demo: 1024)")
    options = parser.parse_args(arguments)
    mode_name = next((name for name in MODES if name and getattr(options, name)), None)
    needed, allowed = MODES[mode_name]
    missing = [name for name in needed if getattr(options, name) is None]
    if missing:
        parser.error(f"missing {', '.join(map(flag, missing))}")
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if unused := sorted(given - {mode_name, *needed, *allowed}):
        parser.error(f"{flag(mode_name) if mode_name else 'preparation'} takes no {flag(unused[0])}")
    return options


def run(options: argparse.Namespace) -> None:
    if options.check:
        started = time.monotonic()
        report(check(options.check, options.docs), options.check, started)
    elif options.download:
        folder = download(options.out or PUBLISHED_FOLDER, options.train_shards)
        print(f"DATA_PATH={folder} TOKENIZER_PATH={folder / PUBLISHED_TOKENIZER}")
    elif options.train_tokenizer:
        train_tokenizer(options.docs, options.out, options.vocab_size, options.val_docs, options.max_docs)
    else:
        shared = {name: getattr(options, name) for name in ("shard_tokens", "workers", "overwrite")}
        if options.demo:
            demo(options.out or Path("data/demo"), options.vocab_size or 1024, **shared)
        else:
            own = {name: getattr(options, name) for name in ("val_docs", "max_docs", "duplicates")}
            prepare(options.docs, options.out, options.sp, **shared, **own)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
