"""Documents and tokenizers for the tests of the data tools."""
import io
import json
import random
from pathlib import Path

import sentencepiece

import lossless_caps
from tools.train_tokenizer import train_tokenizer

WORDS = (
    "the quick Brown FOX jumps over McDonald's lazy dogs, and iPhones (in 2024) cost 999.50 euros: café naïve".split()
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + f"\n\nNo {seed}.{index}  \t▁\n" for index in range(count)
    ]


def write_docs(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def train_lossless(path: Path, docs: Path) -> Path:
    """A lossless tokenizer of 420 pieces, trained on all but the first 50 documents."""
    path.write_bytes(train_tokenizer(docs, 420, 50))
    return path


def train_plain(path: Path, **options) -> Path:
    """A tokenizer of any kind, lossy where `options` do not say otherwise."""
    content = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "add_dummy_prefix": False,
        "user_defined_symbols": list(lossless_caps.OPERATORS),
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    texts = (lossless_caps.encode(text) for text in make_texts(200, seed=9))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=content, **settings | options)
    path.write_bytes(content.getvalue())
    return path
