"""Verify a data set against its manifest, and against its documents where they are given.

    python tools/check_data.py DIR [--docs docs.jsonl.xz]

Reads every shard: headers, sizes, ids, BOS, sidecar, hashes, documents that are in both splits. Prints a line
per fault.
"""

import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import prepare_caseops_data as prep  # noqa: E402
from lossless_caps import BOS  # noqa: E402
from prepare_caseops_data import AGAIN, HEADER, MAGIC, MANIFEST, OWN_FILES, VERSION, DataError  # noqa: E402


@dataclass
class Audit:
    """What a folder's shards hold, whatever its manifest says."""

    faults: list[str] = field(default_factory=list)
    shards: list[dict] = field(default_factory=list)
    splits: dict[str, dict] = field(default_factory=dict)  # docs, tokens; val: bytes
    shared_docs: int = 0  # training documents with the tokens of a validation document


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with prep.disk_errors(path), open(path, "rb") as file:
        for block in iter(lambda: file.read(prep.BATCH_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """The values of a shard, (count,) little-endian uint16, mapped.

    Raises DataError on a bad header or size.
    """
    with prep.disk_errors(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path}: {size} bytes, shorter than a shard's header; {AGAIN}")
    magic, version, count, *rest = HEADER.unpack(header)
    if (magic, version) != (MAGIC, VERSION) or any(rest):
        raise DataError(f"{path}: not a token shard (header {magic}, {version}); {AGAIN}")
    needed = HEADER.size + 2 * count
    if count < 1 or size != needed:
        raise DataError(
            f"{path}: {size} bytes, but the header's {count} tokens need {needed}: cut or damaged; {AGAIN}"
        )
    return np.memmap(path, "<u2", "r", HEADER.size, (count,))


def document_hashes(shards: Iterable[np.ndarray]) -> Iterator[bytes]:
    """One digest per document of a split; documents may run over shard ends."""
    digest = None  # of the document that the last shard ended in
    for tokens in shards:
        cuts = [0, *np.flatnonzero(tokens == BOS).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(cuts):
            if begin == end:
                continue
            if tokens[begin] == BOS:
                if digest:
                    yield digest.digest()
                digest = prep.hash_tokens(b"")
            digest.update(tokens[begin:end])
    yield digest.digest()


def audit(folder: Path, vocab_size: int) -> Audit:
    """Reads all shards of `folder`. Only where they have no fault are documents counted and compared."""
    result = Audit()
    arrays = {"train": [], "val": [], "val_bytes": []}
    paths = [path for path in sorted(folder.glob("*.bin")) if OWN_FILES.fullmatch(path.name)]
    for path in tqdm(paths, desc=f"checking {folder.name}", unit=" shards", disable=None):
        try:
            values = open_shard(path)
        except DataError as error:
            result.faults.append(str(error))
            continue  # one run finds all faults
        kind = OWN_FILES.fullmatch(path.name)[1]
        arrays[kind].append(values)
        result.shards.append({"file": path.name, "tokens": len(values), "sha256": sha256_file(path)})
        if kind != "val_bytes" and values.max() >= vocab_size:
            position = int(np.argmax(values >= vocab_size))
            result.faults.append(
                f"{path}: token {position} is {values[position]}, but the vocabulary has {vocab_size} pieces"
                f"; {AGAIN}"
            )
    for kind, shards in arrays.items():
        if not shards:
            result.faults.append(f"{folder}: no usable fineweb_{kind}_*.bin; {AGAIN}")
        elif kind != "val_bytes" and shards[0][0] != BOS:
            result.faults.append(f"{folder}: the {kind} split does not start with BOS (id {BOS}); {AGAIN}")
    result.faults += sidecar_faults(folder, arrays["val"], arrays["val_bytes"])
    if not result.faults:
        count_documents(result, arrays)
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


def count_documents(result: Audit, arrays: dict[str, list[np.ndarray]]) -> None:
    val_hashes = list(document_hashes(arrays["val"]))
    known = set(val_hashes)
    train_docs = 0
    for digest in document_hashes(arrays["train"]):
        train_docs += 1
        result.shared_docs += digest in known
    val_bytes = sum(int(values.sum(dtype=np.int64)) for values in arrays["val_bytes"])
    result.splits = {
        "val": {"docs": len(val_hashes), "tokens": sum(map(len, arrays["val"])), "bytes": val_bytes},
        "train": {"docs": train_docs, "tokens": sum(map(len, arrays["train"]))},
    }


def read_manifest(folder: Path) -> dict:
    """The manifest of a data set. Raises DataError when it is missing or lacks what `check` compares."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder; check the path")
    try:
        manifest = json.loads(path.read_bytes())
        wanted = {"docs", "tokens", "text_bytes", "docs_sha256"}
        # Only what is compared is asked for: other tools may add to a manifest.
        for name, keys in {"val": wanted | {"bytes"}, "train": wanted}.items():
            lacking = keys - manifest["splits"][name].keys()
            if lacking:
                raise KeyError(f"{name} {min(lacking)}")
        lacking = {"tokenizer", "shards", "duplicates", "splits_disjoint"} - manifest.keys()
        if lacking:
            raise KeyError(min(lacking))
        return manifest
    except FileNotFoundError as error:
        if not (folder / prep.STAGING).exists() and not any(folder.glob("fineweb_*.bin")):
            raise DataError(f"{folder}: holds no data set; check the path") from None
        raise DataError(f"{path}: missing, so the data set is unfinished; {AGAIN}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest of this tool ({error!r}); {AGAIN}") from error


def check(folder: Path, docs: Path | None = None) -> dict:
    """Verifies a data set; returns its manifest. Raises DataError with one line per fault."""
    manifest = read_manifest(folder)
    tokenizer, splits = manifest["tokenizer"], manifest["splits"]
    stated = {shard["file"]: shard for shard in manifest["shards"]}
    shared_docs = 0 if manifest["splits_disjoint"] else manifest["duplicates"]["count"]
    model = folder / tokenizer["file"]
    found = audit(folder, tokenizer["vocab_size"])
    faults = found.faults
    # Ids mean nothing without the tokenizer, so it is part of the data set.
    if not model.is_file() or sha256_file(model) != tokenizer["sha256"]:
        faults.append(f"{model}: missing, or not the tokenizer that the manifest names; put it back")
    for shard in found.shards:
        if shard != stated.get(shard["file"]):
            path = folder / shard["file"]
            faults.append(f"{path}: not as the manifest says, changed or of another run; {AGAIN}")
    faults += [f"{folder / name}: missing; {AGAIN}" for name in stated if not (folder / name).is_file()]
    for name, counts in found.splits.items():
        for key, value in counts.items():
            if value != splits[name][key]:
                stated_value = splits[name][key]
                faults.append(f"{folder}: {value} {name} {key}, the manifest says {stated_value}; {AGAIN}")
    # A lossy tokenizer drops some bytes entirely, and no token can count them.
    if tokenizer["lossless"] and splits["val"]["text_bytes"] not in (None, splits["val"]["bytes"]):
        faults.append(f"{folder}: the sidecar's bytes do not sum to the validation text's; {AGAIN}")
    if found.shared_docs != shared_docs:
        faults.append(
            f"{folder}: {found.shared_docs} training documents repeat a validation document, the manifest "
            f"says {shared_docs}; write it again with --duplicates drop"
        )
    if docs:
        faults += document_faults(manifest, docs)
    if faults:
        raise DataError("\n".join(faults))
    return manifest


def document_faults(manifest: dict, docs: Path) -> Iterator[str]:
    """Whether `docs` are the documents that the manifest's splits were made of."""
    duplicates = manifest["duplicates"]
    # Documents that were left out are lines of the file, but belong to no split.
    dropped = set(duplicates["lines"]) if duplicates["rule"] == "drop" else set()
    val_docs, train_docs = (manifest["splits"][name]["docs"] for name in ("val", "train"))
    digests = {"val": hashlib.sha256(), "train": hashlib.sha256()}
    val_hashes, shared = set(), 0
    batches = prep.read_batches(docs, val_docs, val_docs + train_docs + len(dropped))
    with contextlib.closing(batches):
        for split, number, text_hash in text_hashes(batches):
            if number in dropped:
                continue
            digests[split].update(text_hash)
            if split == "val":
                val_hashes.add(text_hash)
            else:
                shared += text_hash in val_hashes
    for name, digest in digests.items():
        stated = manifest["splits"][name]["docs_sha256"]
        if stated is None:
            yield f"{docs}: the manifest states no document hashes of the {name} split; leave out --docs"
        elif stated != digest.hexdigest():
            yield f"{docs}: not the documents of the {name} split; give the file that the data set is made of"
    if shared and manifest["splits_disjoint"]:
        yield f"{docs}: {shared} training documents repeat a validation document; use --duplicates drop"


def text_hashes(batches: Iterable[prep.Batch]) -> Iterator[tuple[str, int, bytes]]:
    """(split, line, SHA-256 of the UTF-8 text) of every document."""
    for batch in batches:
        for number, line in batch.lines:
            utf8 = prep.parse_document(line, f"{batch.source}:{number}")[1]
            yield batch.split, number, hashlib.sha256(utf8).digest()


def run(arguments: list[str]) -> None:
    parser = prep.command_parser(__file__, __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--docs", type=Path, help="the documents it was made of")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    prep.report(check(options.folder, options.docs), options.folder, started)


def main(arguments: list[str]) -> int:
    return prep.exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
