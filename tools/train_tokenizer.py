"""Train a lossless CaseOps tokenizer on the training documents.

    python tools/train_tokenizer.py --vocab-size V --docs docs.jsonl.xz --out tokenizers [--val-docs N]

Writes caseops_<V>_bpe_identity_v1.model. The first --val-docs documents are validation and are not looked at.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import lossless_caps  # noqa: E402
import prepare_caseops_data as prep  # noqa: E402
from prepare_caseops_data import DataError  # noqa: E402

SPECIAL_PIECES = 264  # pad, BOS, EOS, unknown, four operators, 256 bytes


class Sentences:
    """The CaseOps words of the training documents, as SentencePiece's trainer reads them.

    An exception while reading is kept in `failure`: the trainer would reduce it to its text.
    """

    def __init__(self, docs: Path, val_docs: int, max_docs: int | None):
        self.batches = prep.read_batches(docs, val_docs, max_docs)
        self.docs = {"val": 0, "train": 0}
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            with contextlib.closing(self.batches):
                for batch in self.batches:
                    self.docs[batch.split] += len(batch.lines)
                    if batch.split == "train":
                        yield from self.words(batch)
        except (Exception, KeyboardInterrupt) as error:
            self.failure = error

    def words(self, batch: prep.Batch) -> Iterator[str]:
        for number, line in batch.lines:
            text, _ = prep.parse_document(line, f"{batch.source}:{number}")
            # A literal word mark is written as its bytes (Tokenizer.encode), so pieces end there.
            yield from filter(None, lossless_caps.encode(text).split(lossless_caps.WORD_MARK))


def train_tokenizer(docs: Path, vocab_size: int, val_docs: int, max_docs: int | None = None) -> bytes:
    """A lossless BPE of `vocab_size` pieces, trained on the training documents of `docs`.

    Ids: 0 pad, 1 BOS, 2 EOS, 3 unknown, 4-7 the operators, 8-263 the bytes. Identity normalization, no dummy
    prefix and no whitespace removal keep every byte. Raises DataError when the documents cannot give
    `vocab_size` pieces.
    """
    if not SPECIAL_PIECES < vocab_size <= lossless_caps.MAX_UINT16:
        raise DataError(
            f"--vocab-size {vocab_size}: must be above the {SPECIAL_PIECES} pieces that every tokenizer has, "
            f"and at most {lossless_caps.MAX_UINT16}, which shards can hold"
        )
    sentences = Sentences(docs, val_docs, max_docs)
    model = io.BytesIO()
    reason = ""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,  # the rest are bytes
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=lossless_caps.BOS,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(lossless_caps.OPERATORS),
            max_sentence_length=1 << 30,  # longer ones would be skipped silently
            shuffle_input_sentence=False,
            num_threads=1,  # and no shuffling: the same documents give the same file
            minloglevel=2,  # errors alone
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    # Causes first: an error while reading explains why there are too few sentences.
    if sentences.failure:
        raise sentences.failure
    if not sentences.docs["train"]:
        raise prep.no_training_documents(docs, sentences.docs["val"], val_docs)
    if reason:
        raise DataError(f"{docs}: no tokenizer of {vocab_size} pieces comes of this; {remedy(reason)}")
    return model.getvalue()


def remedy(reason: str) -> str:
    """What to do about an error of SentencePiece's trainer."""
    most = re.search(r"Vocabulary size too high .* value <= (\d+)", reason)
    if most:
        return f"it gives at most {most[1]}: lower --vocab-size, or give more documents"
    fewest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason)
    if fewest:
        return f"its characters need {fewest[1]}: raise --vocab-size"
    detail = re.sub(r"^.*\] *", "", reason)
    return detail or "its training documents hold next to no text: give more"


def run(arguments: list[str]) -> None:
    parser = prep.command_parser(__file__, __doc__)
    number = {"type": prep.positive, "metavar": "N"}
    parser.add_argument("--docs", type=Path, required=True, help="documents, one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocab-size", **number, required=True, help="pieces of the tokenizer")
    parser.add_argument("--val-docs", **number, default=prep.VAL_DOCS, help="documents to skip (%(default)s)")
    parser.add_argument("--max-docs", **number, help="read only so many documents")
    options = parser.parse_args(arguments)
    with prep.hold(options.out):
        model = train_tokenizer(options.docs, options.vocab_size, options.val_docs, options.max_docs)
        path = options.out / model_name(options.vocab_size)
        prep.write_file(path, model)
    tokenizer = prep.read_tokenizer(path)
    print(f"{path.name}: {tokenizer.vocab_size} pieces, SHA-256 {tokenizer.sha256}")


def model_name(vocab_size: int) -> str:
    return f"caseops_{vocab_size}_bpe_identity_v1.model"


def main(arguments: list[str]) -> int:
    return prep.exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
