"""Make a small data set of the text that Python carries: documentation topics, docstrings, library source.

    python tools/demo_corpus.py [--out data/demo] [--keep]

Writes documents, tokenizer, shards and manifest. The same Python version gives the same files.
"""

import hashlib
import importlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import prepare_caseops_data as prep  # noqa: E402
from prepare_caseops_data import DataError  # noqa: E402
from tools.train_tokenizer import model_name, train_tokenizer  # noqa: E402

DOCUMENT_CHARACTERS = 2_000  # some 700 tokens: the demo's model sees 512 at most
# What users install differs from machine to machine; tests and tables are no text to learn from.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}


def sources() -> Iterator[tuple[str, str]]:
    """(name, text) of everything that the data set is made of."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for name in sorted(sys.builtin_module_names):
        yield f"builtin {name}", builtin_docstrings(name)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            try:
                yield f"source {path.relative_to(library).as_posix()}", path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # some sources declare another encoding on purpose


def builtin_docstrings(name: str) -> str:
    """The docstrings of a built-in module's functions, of its classes and of their methods, each once."""
    module = vars(importlib.import_module(name))
    classes = [vars(module[key]) for key in sorted(module) if isinstance(module[key], type)]
    found = {}
    for names in (module, *classes):
        for key in sorted(names):
            doc = getattr(names[key], "__doc__", None)
            if callable(names[key]) and isinstance(doc, str):
                found[doc] = None
    return "\n\n\n".join(found)


def cut_documents(text: str) -> Iterator[str]:
    """Documents of a few thousand characters, cut where two blank lines stand."""
    document = ""
    for block in text.split("\n\n\n"):
        document += ("\n\n\n" if document else "") + block
        if len(document) >= DOCUMENT_CHARACTERS:
            yield document
            document = ""
    if document.strip():
        yield document


def make_documents() -> dict[str, list[str]]:
    """The documents of each split, none twice.

    A tenth of the sources, chosen by a hash of their names, is validation; a source lies in one split whole,
    so that no document is scored whose other half was trained on. Raises DataError where there is too little.
    """
    documents = {"val": [], "train": []}
    seen = set()  # licences and boilerplate repeat
    for name, text in sources():
        split = "val" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"
        for document in cut_documents(text):
            if document not in seen:
                seen.add(document)
                documents[split].append(document)
    if not documents["val"] or not documents["train"]:
        raise DataError(
            "this Python carries too little text for a demo; install its documentation or library source"
        )
    return documents


def write_demo(stage: Path, vocab_size: int, shard_tokens: int, workers: int) -> dict:
    """Writes the data set into the folder `stage`; returns its manifest."""
    documents = make_documents()
    val_docs = len(documents["val"])
    docs = stage / "docs.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in documents["val"] + documents["train"]]
    prep.write_file(docs, "".join(lines).encode())
    model = stage / model_name(vocab_size)
    prep.write_file(model, train_tokenizer(docs, vocab_size, val_docs))
    options = prep.Options(val_docs, shard_tokens=shard_tokens, workers=workers)
    return prep.write_splits(stage, docs, model, options)


def run(arguments: list[str]) -> None:
    number = {"type": prep.positive, "metavar": "N"}
    parser = prep.command_parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (%(default)s)")
    parser.add_argument("--vocab-size", **number, default=1024, help="pieces of the tokenizer (%(default)s)")
    parser.add_argument("--shard-tokens", **number, default=prep.SHARD_TOKENS, help="per shard (%(default)s)")
    parser.add_argument("--workers", **number, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in --out")
    parser.add_argument("--keep", action="store_true", help="keep a finished data set, replace others")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with prep.hold(options.out) as stage:
        # Checked under the lock: another run may just have finished it.
        if options.keep and (options.out / prep.MANIFEST).exists():
            print(f"{options.out}: holds a data set already")
            return
        old = prep.old_files(options.out, options.overwrite or options.keep)
        manifest = write_demo(stage, options.vocab_size, options.shard_tokens, options.workers)
        prep.publish(stage, options.out, old)
    prep.report(manifest, options.out, started)


def main(arguments: list[str]) -> int:
    return prep.exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
