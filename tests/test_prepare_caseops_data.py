"""prepare_caseops_data and its tools: the reference shards bit for bit, faults, kills, check, download, the demo."""

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lossless_caps
import prepare_caseops_data as prep
from tests.texts import make_texts, train_lossless, train_plain, write_docs
from tools import check_data, demo_corpus, download_data, submission


def final_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != prep.STAGING) if folder.exists() else []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in final_files(folder)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prepare")


@pytest.fixture(scope="module")
def docs(work) -> Path:
    return write_docs(work / "docs.jsonl", make_texts(300))


@pytest.fixture(scope="module")
def model(work, docs) -> Path:
    return train_lossless(work / "lossless.model", docs)


@pytest.fixture(scope="module")
def lossy_model(work) -> Path:
    """A tokenizer with the published one's normalizer."""
    return train_plain(work / "lossy.model", normalization_rule_name="nmt_nfkc", split_digits=True)


@pytest.fixture(scope="module")
def built(work, docs, model) -> Path:
    """A small sound data set, never to be changed."""
    prep.prepare(docs, work / "built", model, val_docs=50, shard_tokens=4000)
    return work / "built"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A data set to damage."""
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


# The reference


DOCS = 84_040 if "WHOLE_CORPUS" in os.environ else 15_500  # 15,500 fill the validation shard and the first training shard


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The corpus prepared: of its documents the first ones, all of them with WHOLE_CORPUS=1 (seven times as long)."""
    folder = tmp_path_factory.mktemp("reference")
    out, docs = folder / "out", folder / "docs.jsonl"
    with lzma.open(corpus / "docs.jsonl.xz") as file, open(docs, "wb") as copy:
        copy.writelines(itertools.islice(file, DOCS))
    model = next((corpus / "tokenizers").glob("*.model"))
    arguments = ["--docs", docs, "--out", out, "--sp", model, "--val-docs", 2500, "--workers", 2]
    assert prep.main([str(argument) for argument in arguments]) == 0
    yield SimpleNamespace(out=out, docs=docs)
    shutil.rmtree(folder)


def test_reference_shards_bit_for_bit(reference, corpus):
    """The last shard of the first documents is what the reference's begins with."""
    lines = (corpus / "shards" / "SHA256SUMS").read_text().splitlines()
    expected = {name: digest for digest, name in map(str.split, lines)}
    assert len(expected) == 10
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in reference.out.glob("*.bin")}
    if DOCS < 84_040:
        last = max(name for name in found if "train" in name)
        del found[last]
        whole = lzma.open(corpus / "shards" / f"{last}.xz").read()
        assert whole[1024:].startswith((reference.out / last).read_bytes()[1024:])
        assert last == "fineweb_train_000001.bin" and found.keys() == {
            "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"}
        expected = {name: expected[name] for name in found}
    assert found == expected


def test_reference_manifest_and_check(reference, capsys):
    assert prep.main(["--check", str(reference.out), "--docs", str(reference.docs)]) == 0
    manifest = json.loads((reference.out / "manifest.json").read_text())
    assert manifest["tokenizer"]["lossless"] is False and "line breaks" in manifest["tokenizer"]["note"]
    assert manifest["splits"]["val"]["docs"] == 2500 and manifest["splits"]["val"]["tokens"] == 2_184_449
    assert manifest["splits"]["train"]["docs"] == DOCS - 2500 and manifest["splits"]["train"]["first_doc"] == 2500
    assert manifest["splits_disjoint"] is True
    assert "NOT" not in capsys.readouterr().out


# Shards and manifest


def test_layout(built, docs, model):
    tokenizer = prep.read_tokenizer(model)
    streams = {"val": [], "train": [], "val_bytes": []}
    for index, line in enumerate(docs.read_text(encoding="utf-8").splitlines()):
        tokens, counts = tokenizer.encode_with_bytes(lossless_caps.encode(json.loads(line)["text"]))
        streams["val" if index < 50 else "train"] += [1, *np.frombuffer(tokens, "<u2").tolist()]
        if index < 50:
            streams["val_bytes"] += [0, *counts]
    manifest = json.loads((built / "manifest.json").read_text())
    listed = {shard["file"]: shard for shard in manifest["shards"]}
    for kind, stream in streams.items():
        chunks = [stream[start : start + 4000] for start in range(0, len(stream), 4000)]
        assert len(chunks) > 1
        for index, chunk in enumerate(chunks):
            name = f"fineweb_{kind}_{index:06d}.bin"
            content = (built / name).read_bytes()
            header = np.frombuffer(content[:1024], "<i4").tolist()
            assert header == [20240520, 1, len(chunk)] + [0] * 253
            assert np.frombuffer(content[1024:], "<u2").tolist() == chunk
            assert listed.pop(name) == {
                "file": name,
                "tokens": len(chunk),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    assert not listed
    texts = [json.loads(line)["text"].encode() for line in docs.read_text(encoding="utf-8").splitlines()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts[:50])).hexdigest()
    size = sum(map(len, texts[:50]))
    assert manifest["splits"]["val"] == {
        "docs": 50,
        "first_doc": 0,
        "tokens": len(streams["val"]),
        "text_bytes": size,
        "docs_sha256": digest,
        "bytes": size,
    }
    assert manifest["splits"]["train"]["docs"] == 250 and manifest["splits"]["train"]["first_doc"] == 50
    assert manifest["format"] == 1 and manifest["bos_id"] == 1 and manifest["transform"] == "lossless_caps_caseops_v1"
    assert manifest["tokenizer"] == {
        "file": model.name,
        "sha256": tokenizer.sha256,
        "vocab_size": 420,
        "lossless": True,
    }
    assert manifest["source"] == {"file": docs.name, "sha256": hashlib.sha256(docs.read_bytes()).hexdigest()}


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_compressed_documents_and_workers_change_nothing(suffix, built, docs, model, tmp_path, monkeypatch):
    content = docs.read_bytes()
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        frames = [zstandard.ZstdCompressor().compress(part) for part in (content[:5000], content[5000:])]
        packed = b"".join(frames)
    else:
        packed = {".xz": lzma, ".gz": gzip}[suffix].compress(content)
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(packed)
    monkeypatch.setattr(prep, "BATCH_BYTES", 1 << 13)
    prep.prepare(path, tmp_path / "out", model, val_docs=50, shard_tokens=4000, workers=3 if suffix == ".xz" else 1)
    expected, found = snapshot(built), snapshot(tmp_path / "out")
    expected.pop("manifest.json"), found.pop("manifest.json")
    assert found == expected
    assert check_data.check(tmp_path / "out", path)["splits"]["train"]["docs"] == 250


def zstandard_frames(content: bytes) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    return compressor.compress(content[:5000]) + compressor.compress(content[5000:])


COMPRESSIONS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard_frames}


NAMES = [("docs.jsonl.XZ", ".xz"), ("docs.GZ", ".gz"), ("docs.BZ2", ".bz2"), ("docs.zstd", ".zst"),
         *itertools.product(["docs.jsonl", "docs"], COMPRESSIONS)]


@pytest.mark.parametrize("name, kind", NAMES)
def test_documents_are_known_by_name_or_content(name, kind, docs, tmp_path):
    path = tmp_path / name
    path.write_bytes(COMPRESSIONS[kind](docs.read_bytes()))
    lines = [line for batch in prep.read_batches(path, 50) for line in batch.lines]
    assert lines == list(enumerate(docs.read_bytes().splitlines(keepends=True), 1))


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("max_docs", [None, 70])
def test_documents_from_a_pipe(kind, max_docs, docs, model, tmp_path):
    """A pipe has no name, no size and can be read once."""
    content = COMPRESSIONS[kind](docs.read_bytes())
    (tmp_path / "docs").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    options = {"val_docs": 50, "shard_tokens": 4000, "max_docs": max_docs}
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    manifest = prep.prepare(tmp_path / "pipe", tmp_path / "piped", model, **options)
    writer.join()
    assert manifest["source"] == {"file": "pipe", "sha256": hashlib.sha256(content).hexdigest()}
    prep.prepare(tmp_path / "docs", tmp_path / "read", model, **options)
    found, expected = snapshot(tmp_path / "piped"), snapshot(tmp_path / "read")
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


@pytest.mark.parametrize("blank", [b"\n", b" \t\n", b"\r\n"])
def test_blank_lines_are_no_documents(blank, built, docs, model, tmp_path, capsys):
    """At the begin, before and after the end of validation, in training and at the end; lines keep their numbers."""
    lines = docs.read_bytes().splitlines(keepends=True)
    path = tmp_path / "docs.jsonl"
    path.write_bytes(blank.join([b"", *lines[:1], b"".join(lines[1:49]), lines[49], *lines[50:52], b""]) +
                     b"".join(lines[52:]) + 2 * blank + blank.strip(b"\n"))
    prep.prepare(path, tmp_path / "out", model, val_docs=50, shard_tokens=4000)
    found, expected = snapshot(tmp_path / "out"), snapshot(built)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected
    assert check_data.check(tmp_path / "out", path)["splits"]["val"]["docs"] == 50
    path.write_bytes(b"".join(lines[:20]) + 2 * blank + b"{\n")
    expect_fault(path, model, tmp_path / "fault", capsys, f"{path}:23: not valid JSON")


def test_lines_left_out_after_blank_ones(model, tmp_path):
    texts = make_texts(40)
    texts[25] = texts[3]
    path = write_docs(tmp_path / "docs.jsonl", texts)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n"))
    manifest = prep.prepare(path, tmp_path / "out", model, val_docs=10, duplicates="drop")
    assert manifest["duplicates"]["lines"] == [51]
    check_data.check(tmp_path / "out", path)


def test_max_docs(docs, model, tmp_path):
    manifest = prep.prepare(docs, tmp_path / "out", model, val_docs=50, max_docs=70)
    assert manifest["splits"]["train"]["docs"] == 20
    check_data.check(tmp_path / "out", docs)


def test_batches_in_flight_are_bounded(docs, model):
    pulled = itertools.count()
    drawn = []

    def batches():
        for batch in list(prep.read_batches(docs, 50)) * 30:
            drawn.append(next(pulled))
            yield batch

    for finished, encoded in enumerate(prep.map_in_order(prep.encode_batch, batches(), 2, model.read_bytes())):
        assert len(drawn) - finished <= 5
        assert encoded[0] == ("train" if finished % 2 else "val")
    assert len(drawn) == 60


@pytest.mark.parametrize("rule", ["refuse", "drop", "keep"])
def test_training_documents_that_repeat_validation(rule, model, tmp_path, capsys):
    texts = make_texts(40)
    texts[25] = texts[3]
    path = write_docs(tmp_path / "docs.jsonl", texts)
    options = [
        "--docs",
        path,
        "--out",
        tmp_path / "out",
        "--sp",
        model,
        "--val-docs",
        10,
        "--workers",
        1,
        "--duplicates",
        rule,
    ]
    code = prep.main([str(option) for option in options])
    output = capsys.readouterr()
    if rule == "refuse":
        assert code == 2 and final_files(tmp_path / "out") == []
        assert f"{path}:26: this training document repeats the validation document of line 4" in output.err
        return
    assert code == 0
    manifest = check_data.check(tmp_path / "out", path)
    assert manifest["duplicates"] == {"rule": rule, "count": 1, "lines": [26]}
    assert manifest["splits_disjoint"] == (rule == "drop")
    kept = texts[10:25] + texts[26:] if rule == "drop" else texts[10:]
    assert manifest["splits"]["train"]["docs"] == len(kept)
    assert manifest["splits"]["train"]["text_bytes"] == sum(len(text.encode()) for text in kept)
    assert ("NOT disjoint: 1 " if rule == "keep" else "1 training documents that repeat") in output.out


def test_refuses_a_folder_with_another_run(copy, docs, model, capsys):
    before = snapshot(copy)
    arguments = ["--docs", str(docs), "--out", str(copy), "--sp", str(model), "--val-docs", "20", "--workers", "1"]
    assert prep.main(arguments) == 2
    assert "splits of different runs may share documents" in capsys.readouterr().err
    assert snapshot(copy) == before
    assert prep.main([*arguments, "--overwrite"]) == 0
    assert check_data.check(copy, docs)["splits"]["val"]["docs"] == 20
    assert len(list(copy.glob("fineweb_train_*.bin"))) == 1


# Bad input


def bad_lines() -> dict[str, tuple[bytes, str]]:
    return {
        "broken json": (b'{"text": "a', "not valid JSON"),
        "not utf-8": (b'{"text": "\xff"}', "not valid JSON"),
        "too deep": (b"[" * 100_000, "not valid JSON"),
        "no text": (b'{"txt": "a"}', 'no field "text"'),
        "not an object": (b'["text"]', 'no field "text"'),
        "text is a number": (b'{"text": 3}', 'no field "text"'),
        "empty": (b'{"text": ""}', "empty document"),
        "surrogate": (b'{"text": "ab\\ud800"}', "lone surrogate \\ud800 at character 2"),
    }


@pytest.mark.parametrize("kind", bad_lines())
@pytest.mark.parametrize("line_number", [3, 33])
def test_bad_document(kind, line_number, model, tmp_path, capsys):
    line, message = bad_lines()[kind]
    lines = [json.dumps({"text": text}).encode() for text in make_texts(40)]
    lines[line_number - 1] = line
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    expect_fault(path, model, tmp_path / "out", capsys, f"{path}:{line_number}: {message}")


def expect_fault(docs, model, out, capsys, message, *more):
    capsys.readouterr()
    arguments = ["--docs", docs, "--out", out, "--sp", model, "--val-docs", 10, "--workers", 1, *more]
    assert prep.main([str(argument) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert final_files(out) == [] and not (out / prep.STAGING).exists()


def test_bad_document_in_a_worker(model, tmp_path, capsys):
    path = write_docs(tmp_path / "docs.jsonl", [*make_texts(40), ""])
    expect_fault(path, model, tmp_path / "out", capsys, f"{path}:41: empty document", "--workers", 2)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_compressed_documents(suffix, damage, docs, model, tmp_path, capsys):
    content = docs.read_bytes()
    if suffix == ".zst":
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    else:
        packed = {".xz": lzma, ".gz": gzip}[suffix].compress(content)
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(packed[:-20] if damage == "cut" else b"not compressed at all " * 50)
    expect_fault(path, model, tmp_path / "out", capsys, "cut or damaged")


def test_documents_without_documents(model, tmp_path, capsys):
    contents = {"no bytes": b"", "blank lines": b"\n \n\r\n"}
    for (what, content), (suffix, compress) in itertools.product(contents.items(), COMPRESSIONS.items()):
        path = tmp_path / f"docs.jsonl{suffix}"
        path.write_bytes(compress(content))
        expect_fault(path, model, tmp_path / "out", capsys, f"{path}: holds no document; write one")
        path.write_bytes(b"")
        expect_fault(path, model, tmp_path / "out", capsys, f"{path}: holds no document; write one")


def archive(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("docs.jsonl", content)
    return packed.getvalue()


UNREADABLE = {
    "docs.zip": archive,
    "docs.jsonl.lz4": lambda content: b"\x04\x22\x4d\x18" + content,
    "docs.7z": lambda content: b"7z\xbc\xaf\x27\x1c" + content,
    "docs.parquet": lambda content: b"PAR1\x15\x04\x15" + content,
    "docs.tar": lambda content: b"docs.jsonl".ljust(100, b"\0") + content,
    "utf-16.jsonl": lambda content: content.decode().encode("utf-16"),
    "docs.jsonl": archive,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unknown_compressions(name, docs, model, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name](docs.read_bytes()))
    expect_fault(path, model, tmp_path / "out", capsys, f"{path}: neither text nor .xz, .gz, .bz2 or .zst; decompress")


def test_missing_files(docs, model, tmp_path, capsys):
    expect_fault(tmp_path / "no.jsonl", model, tmp_path / "out", capsys, f"{tmp_path / 'no.jsonl'}: No such file")
    expect_fault(docs, tmp_path / "no.model", tmp_path / "out", capsys, f"{tmp_path / 'no.model'}: No such file")
    expect_fault(tmp_path, model, tmp_path / "out", capsys, f"{tmp_path}: Is a directory; check the path")
    expect_fault(docs, tmp_path, tmp_path / "out", capsys, f"{tmp_path}: Is a directory; check the path")


def test_folder_that_is_a_file(docs, model, capsys):
    reads = ["--docs", str(docs), "--val-docs", "50"]
    for arguments in (["--sp", str(model), *reads], ["--train-tokenizer", "--vocab-size", "420", *reads],
                      ["--demo"], ["--download"]):
        assert prep.main([*arguments, "--out", str(docs)]) == 2
        assert capsys.readouterr().err == f"error: {docs}: File exists; check the path\n"


def test_too_few_documents(model, tmp_path, capsys):
    path = write_docs(tmp_path / "docs.jsonl", make_texts(10))
    expect_fault(path, model, tmp_path / "out", capsys, "leaves no document for training")


def test_wrong_tokenizers(docs, work, tmp_path, capsys):
    cases = {
        "not a SentencePiece model": lambda path: path.write_bytes(b"\x00garbage") and path,
        "BOS has id 2, not 1": lambda path: train_plain(path, bos_id=2, eos_id=1),
        "U+E001 has id 5, not 4": lambda path: train_plain(
            path, user_defined_symbols=list("x" + lossless_caps.OPERATORS)
        ),
        "no byte fallback": lambda path: train_plain(path, byte_fallback=False, vocab_size=100),
    }
    for message, make in cases.items():
        path = make(tmp_path / "wrong.model")
        expect_fault(docs, path, tmp_path / "out", capsys, f"{path}: {message}")


def test_vocabulary_that_16_bits_cannot_hold(docs, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lossless_caps, "MAX_UINT16", 419)
    expect_fault(docs, model, tmp_path / "out", capsys, "420 pieces, but shards hold at most 419")


def test_token_that_stands_for_too_many_bytes(lossy_model, tmp_path, capsys):
    path = write_docs(tmp_path / "docs.jsonl", ["a" + " " * 70_000 + "b", *make_texts(20)])
    expect_fault(path, lossy_model, tmp_path / "out", capsys, f"{path}:1: one token stands for 70000 bytes")


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "fineweb_val_bytes_000000.bin", "manifest.json"])
def test_full_disk(name, docs, model, tmp_path, capsys, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path, *arguments, **options):
        return Full(path, "w") if Path(path).name.startswith(name) else open(path, *arguments, **options)

    monkeypatch.setattr(prep, "open", open_full, raising=False)
    expect_fault(
        docs,
        model,
        tmp_path / "out",
        capsys,
        f"{name}: No space left on device; free some space",
        "--shard-tokens",
        4000,
    )


def test_arguments_missing(capsys):
    with pytest.raises(SystemExit) as exit_:
        prep.main(["--docs", "x.jsonl"])
    assert exit_.value.code == 2
    assert "required: --out, --sp" in capsys.readouterr().err


def test_arguments_of_another_mode(capsys):
    with pytest.raises(SystemExit) as exit_:
        prep.main(["--demo", "--val-docs", "5"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --val-docs 5" in capsys.readouterr().err


# Two runs at once


def test_second_run_says_who_writes(root, long_docs, docs, model, tmp_path, capsys):
    """The first one's data set is whole, the second's options notwithstanding."""
    out = tmp_path / "out"
    options = ["--out", out, "--sp", model, "--val-docs", 50, "--workers", 1, "--shard-tokens", 50_000]
    first = start(root, "--docs", long_docs, *options)
    wait_for_shards(first, out, 2)
    for second in (["--docs", docs, *options], ["--docs", docs, *options, "--overwrite"], ["--demo", "--out", out],
                   ["--demo", "--keep", "--out", out], ["--download", "--out", out],
                   ["--train-tokenizer", "--docs", docs, "--vocab-size", 420, "--val-docs", 50, "--out", out]):
        assert prep.main([str(argument) for argument in second]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith(f"error: {out}: process {first.pid} on ") and "is writing here" in errors[-1]
    assert first.wait(timeout=300) == 0, first.communicate()
    first.communicate()
    assert check_data.check(out, long_docs)["splits"]["val"]["docs"] == 50
    assert not (out / prep.STAGING).exists()


def test_demo_keeps_a_finished_data_set(copy, monkeypatch, capsys):
    before = snapshot(copy)
    assert prep.main(["--demo", "--keep", "--out", str(copy)]) == 0
    assert "holds a data set already" in capsys.readouterr().out and snapshot(copy) == before
    assert prep.main(["--demo", "--out", str(copy)]) == 2
    assert "holds a data set already" in capsys.readouterr().err and snapshot(copy) == before
    (copy / "manifest.json").unlink()
    texts = [(f"topic {number}", text) for number, text in enumerate(make_texts(60))]
    monkeypatch.setattr(demo_corpus, "sources", lambda: iter(texts))
    assert prep.main(["--demo", "--keep", "--out", str(copy), "--vocab-size", "400"]) == 0
    assert check_data.check(copy, copy / "docs.jsonl")["tokenizer"]["vocab_size"] == 400


# A console that goes away


@pytest.mark.parametrize("console", ["full disk", "closed", "no reader"])
def test_console_that_goes_away(console, root, docs, lossy_model, tmp_path):
    """A lossy tokenizer is spoken of before the first document, the progress bar writes meanwhile."""
    out = tmp_path / "out"
    command = [sys.executable, root / "prepare_caseops_data.py", "--docs", docs, "--out", out, "--sp", lossy_model,
               "--val-docs", "50", "--workers", "2"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    redirects = {"full disk": '"$@" > /dev/full 2>&1', "closed": '"$@" >&- 2>&-', "no reader": f'"$@" >&{write_end} 2>&1'}
    shell = ["bash", "-c", redirects[console], "bash", *map(str, command)]
    assert subprocess.run(shell, pass_fds=[write_end]).returncode == 0
    os.close(write_end)
    check_data.check(out, docs)


# Kills


@pytest.fixture(scope="module")
def long_docs(work) -> Path:
    """Enough text for some seconds of work."""
    return write_docs(work / "long.jsonl", make_texts(30_000, seed=5))


def start(root, *arguments) -> subprocess.Popen:
    command = [sys.executable, str(root / "prepare_caseops_data.py"), *map(str, arguments)]
    # A shell that runs the tests in the background has its children ignore interrupts.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for_shards(process: subprocess.Popen, out: Path, count: int) -> None:
    while len(list((out / prep.STAGING).glob("*.bin"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("shards, workers", [(1, 1), (4, 2), (9, 1)])
def test_killed_run_leaves_no_final_name(shards, workers, root, long_docs, docs, model, tmp_path):
    out = tmp_path / "out"
    options = ["--out", out, "--sp", model, "--val-docs", 50, "--workers", workers, "--shard-tokens", 50_000]
    process = start(root, "--docs", long_docs, *options)
    wait_for_shards(process, out, shards)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert final_files(out) == [] and (out / prep.STAGING).is_dir()
    deadline = time.monotonic() + 120
    while alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their main process"
        time.sleep(0.02)
    prep.prepare(docs, out, model, val_docs=50)
    assert not (out / prep.STAGING).exists()
    check_data.check(out, docs)


@pytest.mark.parametrize("renames", [5, 6, 8])  # the first five are inside the staging folder
def test_killed_while_renaming(renames, root, docs, model, copy):
    """Replacing a data set: whatever has a final name is complete, and no manifest vouches for the mixture."""
    script = f"""
import os, signal, sys
import prepare_caseops_data as prep
replace, done = os.replace, []
def count(*names):
    if len(done) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(replace(*names))
os.replace = count
sys.exit(prep.main(sys.argv[1:]))
"""
    options = ["--docs", docs, "--out", copy, "--sp", model, "--val-docs", 20, "--workers", 1, "--overwrite"]
    process = subprocess.run([sys.executable, "-c", script, *map(str, options)], cwd=root, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert "manifest.json" not in final_files(copy)
    shards = list(copy.glob("*.bin"))
    for shard in shards:
        check_data.open_shard(shard)
    with pytest.raises(prep.DataError, match="manifest.json: missing"):
        check_data.check(copy)
    assert prep.main([str(option) for option in options]) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt(workers, root, long_docs, model, tmp_path):
    out = tmp_path / "out"
    options = ["--out", out, "--sp", model, "--val-docs", 50, "--workers", workers, "--shard-tokens", 50_000]
    process = start(root, "--docs", long_docs, *options)
    wait_for_shards(process, out, 3)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert final_files(out) == [] and not (out / prep.STAGING).exists()


# --check


def rewrite(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def put(position: int, value: int):
    return lambda content: content.__setitem__(slice(position, position + 2), value.to_bytes(2, "little"))


def shorten_sidecar(folder: Path) -> None:
    path = folder / "fineweb_val_bytes_000000.bin"
    values = check_data.open_shard(path)[:-1].tobytes()
    path.write_bytes(prep.HEADER.pack(prep.MAGIC, prep.VERSION, len(values) // 2, *[0] * 253) + values)


FAULTS = {
    "cut shard": (
        lambda d: rewrite(d / "fineweb_train_000000.bin", lambda c: c.__delitem__(slice(-2, None))),
        "cut or damaged",
    ),
    "cut header": (lambda d: (d / "fineweb_val_000000.bin").write_bytes(b"12"), "shorter than a shard's header"),
    "wrong magic": (lambda d: rewrite(d / "fineweb_train_000001.bin", put(0, 7)), "not a token shard"),
    "token changed": (lambda d: rewrite(d / "fineweb_train_000000.bin", put(1030, 9)), "not as the manifest says"),
    "id too large": (lambda d: rewrite(d / "fineweb_train_000000.bin", put(1030, 420)), "token 3 is 420"),
    "no BOS": (lambda d: rewrite(d / "fineweb_val_000000.bin", put(1024, 9)), "does not start with BOS"),
    "shard missing": (lambda d: (d / "fineweb_train_000002.bin").unlink(), "fineweb_train_000002.bin: missing"),
    "shard too many": (
        lambda d: shutil.copy(d / "fineweb_train_000000.bin", d / "fineweb_train_000099.bin"),
        "000099.bin: not as the manifest",
    ),
    "sidecar shorter": (shorten_sidecar, "entries, but its validation shard has"),
    "sidecar missing": (
        lambda d: (d / "fineweb_val_bytes_000001.bin").unlink(),
        "2 readable validation shards, 1 sidecars",
    ),
    "sidecar counts BOS": (
        lambda d: rewrite(d / "fineweb_val_bytes_000000.bin", put(1024, 3)),
        "counts bytes for a BOS",
    ),
    "no validation": (lambda d: [path.unlink() for path in d.glob("fineweb_val_0*")], "no usable fineweb_val_*.bin"),
    "tokenizer missing": (lambda d: next(d.glob("*.model")).unlink(), "not the tokenizer that the manifest names"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json: missing"),
    "broken manifest": (lambda d: (d / "manifest.json").write_text("{"), "not a manifest of this tool"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text("[]"), "not a manifest of this tool"),
    "manifest without a count": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["val"].pop("bytes")),
        "not a manifest of this",
    ),
    "docs miscounted": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["train"].update(docs=7)),
        "250 train docs, the manifest says 7",
    ),
    "bytes miscounted": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["val"].update(bytes=7)),
        "do not sum to the validation text's",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_check_finds(kind, copy, capsys):
    damage, message = FAULTS[kind]
    damage(copy)
    assert prep.main(["--check", str(copy)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors), errors


def test_check_finds_a_leak_without_documents(docs, model, tmp_path, capsys):
    """Training shards of one run beside the validation shards of another that holds more documents back."""
    prep.prepare(docs, tmp_path / "few", model, val_docs=10)
    prep.prepare(docs, tmp_path / "many", model, val_docs=50)
    for path in (tmp_path / "many").glob("fineweb_val*"):
        shutil.copy(path, tmp_path / "few")
    assert prep.main(["--check", str(tmp_path / "few")]) == 2
    assert "40 training documents repeat a validation document, the manifest says 0" in capsys.readouterr().err


def test_check_against_documents(built, docs, tmp_path, capsys):
    assert prep.main(["--check", str(built), "--docs", str(docs)]) == 0
    texts = [json.loads(line)["text"] for line in docs.read_text(encoding="utf-8").splitlines()]
    others = write_docs(tmp_path / "other.jsonl", texts[:10] + ["changed"] + texts[11:])
    assert prep.main(["--check", str(built), "--docs", str(others)]) == 2
    error = capsys.readouterr().err
    assert "not the documents of the val split" in error and "of the train split" not in error


def test_check_of_what_is_no_data_set(built, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / prep.STAGING).mkdir(parents=True)
    cases = {
        tmp_path / "nowhere": f"{tmp_path / 'nowhere'}: no such folder; check the path",
        built / "manifest.json": f"{built / 'manifest.json'}: not a folder; check the path",
        tmp_path / "empty": f"{tmp_path / 'empty'}: holds no data set; check the path",
        tmp_path: f"{tmp_path}: holds no data set; check the path",
        tmp_path / "begun": "manifest.json: missing, so the data set is unfinished; write or fetch it again",
    }
    for folder, message in cases.items():
        assert prep.main([f"--check={folder}"]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and error.endswith(message)


def test_check_of_sound_folder_is_short(built, capsys):
    assert prep.main(["--check", str(built)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


# --download


@pytest.fixture
def hub(monkeypatch, built, lossy_model):
    """huggingface_hub with a snapshot_download that copies a small data set instead; records its calls."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from fnmatch import fnmatch

    def serve(nesting: str, failure: Exception | None = None) -> list[dict]:
        calls = []

        def snapshot_download(repo_id, repo_type, local_dir, allow_patterns):
            calls.append({"repo_id": repo_id, "repo_type": repo_type})
            if failure:
                raise failure
            shards = {f"{nesting}datasets/{download_data.SHARDS}/{path.name}": path for path in built.glob("*.bin")}
            model = {f"{nesting}tokenizers/{download_data.TOKENIZER}": next(built.glob("*.model"))}
            for name, source in (shards | model).items():
                if any(fnmatch(name, pattern) for pattern in allow_patterns):
                    target = Path(local_dir) / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)
            return str(local_dir)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return serve


@pytest.mark.parametrize("nesting", ["", "datasets/"])
@pytest.mark.parametrize("train_shards", [None, 2])
def test_download(nesting, train_shards, hub, built, tmp_path, capsys):
    calls = hub(nesting)
    more = ["--train-shards", str(train_shards)] if train_shards else []
    assert prep.main(["--download", "--out", str(tmp_path), *more]) == 0
    assert calls == [{"repo_id": "romeerp/parameter-golf-caseops-v1", "repo_type": "dataset"}]
    folder = tmp_path / nesting / "datasets" / download_data.SHARDS
    assert f"DATA_PATH={folder}\n" in capsys.readouterr().out
    shards = sorted(path.name for path in folder.glob("fineweb_train_*.bin"))
    assert shards == sorted(path.name for path in built.glob("fineweb_train_*.bin"))[:train_shards]
    manifest = check_data.check(folder)
    assert manifest["source"]["file"] == "romeerp/parameter-golf-caseops-v1"
    assert manifest["splits"]["val"]["docs"] == 50 and manifest["splits_disjoint"] is True


def test_download_offline_and_unsound(hub, tmp_path, capsys):
    hub("", OSError("no route to host\nmore words"))
    assert prep.main(["--download", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: romeerp/parameter-golf-caseops-v1: no download (no route to host); "
        "once online, run this again to resume\n"
    )
    hub("elsewhere/")
    assert prep.main(["--download", "--out", str(tmp_path)]) == 2
    assert "holds no folder" in capsys.readouterr().err
    hub("")
    assert prep.main(["--download", "--out", str(tmp_path), "--train-shards", "99"]) == 2
    assert "fewer than 99 training shards" in capsys.readouterr().err


def test_download_without_a_network(root, tmp_path):
    """The real client against a port where nothing listens."""
    pytest.importorskip("huggingface_hub")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(root / "prepare_caseops_data.py"), "--download", "--out", str(tmp_path / "data")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 2
    assert [line for line in process.stderr.splitlines() if line.startswith("error: ")] == process.stderr.splitlines()[
        -1:
    ]
    assert "Traceback" not in process.stderr


# --train-tokenizer and --demo


def test_trained_tokenizer_knows_training_documents_only(tmp_path, capsys):
    texts = ["qvqxq " * 40] * 20 + make_texts(200)
    path = write_docs(tmp_path / "docs.jsonl", texts)
    arguments = ["--train-tokenizer", "--vocab-size", "400", "--docs", str(path), "--val-docs", "20", "--out"]
    assert prep.main([*arguments, str(tmp_path / "a")]) == 0
    assert prep.main([*arguments, str(tmp_path / "b")]) == 0
    first, second = (
        tmp_path / "a" / "caseops_400_bpe_identity_v1.model",
        tmp_path / "b" / "caseops_400_bpe_identity_v1.model",
    )
    assert first.read_bytes() == second.read_bytes()
    assert final_files(tmp_path / "a") == [first.name]
    tokenizer = prep.read_tokenizer(first)
    assert tokenizer.lossless
    pieces = [tokenizer.sp.id_to_piece(index) for index in range(400)]
    assert pieces[:8] == ["<pad>", "<s>", "</s>", "<unk>", *lossless_caps.OPERATORS]
    assert not any("qv" in piece or "xq" in piece for piece in pieces)


def test_tokenizer_training_faults(docs, tmp_path, capsys):
    arguments = [
        "--train-tokenizer",
        "--docs",
        str(docs),
        "--val-docs",
        "20",
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
    ]
    assert prep.main([*arguments, "60000"]) == 2
    assert "no tokenizer of 60000 pieces" in capsys.readouterr().err
    assert final_files(tmp_path / "out") == []
    broken = write_docs(tmp_path / "broken.jsonl", make_texts(30) + [""])
    arguments[2] = str(broken)
    assert prep.main([*arguments, "400"]) == 2
    assert f"{broken}:31: empty document" in capsys.readouterr().err


def test_tokenizers_of_small_corpora(tmp_path, capsys):
    """What is wrong is named with the number that would be right."""
    cases = [
        (["one", "two", "three"], 300, None, "holds 3 documents, and --val-docs 50000 leaves no document for training"),
        (["one", "two", "three"], 300, 3, "holds 3 documents, and --val-docs 3 leaves no document for training"),
        (["one", "two", "three"], 300, 1, r"it gives at most (\d+): lower --vocab-size, or give more documents"),
        (["one", "two", "three"], 266, 1, r"its characters need (\d+): raise --vocab-size"),
        (["one", " "], 300, 1, "it gives at most 265: lower --vocab-size, or give more documents"),
        (["one", "\u2581"], 300, 1, "its training documents hold next to no text: give more"),
        (["one", "\x00"], 300, 1, "its training documents hold next to no text: give more"),
        (["one", "two"], 264, 1, "--vocab-size 264: must be above the 264 pieces that every tokenizer has"),
        (["one", "two"], 65536, 1, "at most 65535, which shards can hold"),
        ([], 300, 1, "holds no document"),
    ]
    for texts, pieces, val_docs, message in cases:
        path = write_docs(tmp_path / "docs.jsonl", texts)
        arguments = ["--train-tokenizer", "--docs", path, "--out", tmp_path / "out", "--vocab-size", pieces]
        if val_docs:
            arguments += ["--val-docs", val_docs]
        assert prep.main([str(argument) for argument in arguments]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (texts, errors)
        found = re.search(message, errors[0])
        assert found, (texts, errors)
        assert final_files(tmp_path / "out") == []
        if found.groups():  # the number that it names will do
            assert prep.main([str(argument) for argument in [*arguments, "--vocab-size", found[1]]]) == 0
            shutil.rmtree(tmp_path / "out")


def test_tools_are_commands_of_their_own(root, docs, tmp_path):
    tools = dict(prep.TOOLS)
    assert {f"tools/{tool}.py" for tool in tools.values()} <= set(submission.SHIPPED)
    for tool in tools.values():
        command = [sys.executable, str(root / "tools" / f"{tool}.py"), "--help"]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        assert shown.startswith(f"usage: {tool}.py")
    forwarded = subprocess.run([sys.executable, str(root / "prepare_caseops_data.py"), "--demo", "--help"], cwd=tmp_path,
                               capture_output=True, text=True).stdout
    assert forwarded.startswith("usage: demo_corpus.py")


def test_demo(root, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        command = [sys.executable, str(root / "prepare_caseops_data.py"), "--demo", "--out", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    assert snapshot(folders[0]) == snapshot(folders[1])
    manifest = check_data.check(folders[0], folders[0] / "docs.jsonl")
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["vocab_size"] == 1024
    splits = manifest["splits"]
    assert splits["train"]["tokens"] > 300_000
    assert 0.02 < splits["val"]["tokens"] / splits["train"]["tokens"] < 0.3


def test_demo_on_a_bare_python(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "sources", lambda: iter([("topic only", "a text")]))
    assert prep.main(["--demo", "--out", str(tmp_path / "out")]) == 2
    assert "too little text" in capsys.readouterr().err
