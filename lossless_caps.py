"""CaseOps: a lossless text transform that takes capital letters out of the vocabulary's way, and its tokens.

Words are maximal runs of ASCII letters. A capitalized word is written in lower case behind one of three
operators, so that "The", "THE" and "the" share their subword pieces; a fourth operator escapes the
operators themselves. All four are characters of Unicode's private use area:

    TITLE   U+E001   the next letter is upper case            Hello  -> TITLE hello
    ALLCAPS U+E002   the whole word is upper case             NASA   -> ALLCAPS nasa
    CAPNEXT U+E003   the next letter, inside a word, is       iPhone -> i CAPNEXT phone
    ESC     U+E004   the next character is meant literally    U+E001 -> ESC U+E001

Everything else passes through. `decode(encode(text)) == text` for every Python string. The transform is
`lossless_caps_caseops_v1` of the Parameter Golf data set romeerp/parameter-golf-caseops-v1.

`attribute_bytes` says how many bytes of the original text each token piece of an encoded text stands for;
this is the denominator of bits per byte. `Tokenizer` makes the tokens and their byte counts.
"""

import hashlib
import itertools
import re
import struct
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import sentencepiece

TRANSFORM = "lossless_caps_caseops_v1"
TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC

# A word is matched from its first capital on: the lower-case letters before it stay as they are, and a
# pattern that began with them would scan long lower-case runs once per letter.
_TO_ENCODE = re.compile(f"[A-Z][A-Za-z]*|[{OPERATORS}]")
_CAPITAL = re.compile("[A-Z]")
_TO_DECODE = re.compile(
    f"{ESC}(?P<escaped>.)"
    f"|(?<![A-Za-z])(?P<mode>[{TITLE}{ALLCAPS}])(?P<word>(?:{CAPNEXT}?[A-Za-z])+)"
    f"|{CAPNEXT}(?P<capital>[A-Za-z])"
    f"|(?P<stray>[{OPERATORS}])",
    re.DOTALL,
)
_CAPNEXT_LETTER = re.compile(f"{CAPNEXT}([A-Za-z])")
_NAMES = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC"}


# -----------------------------------------------------------------------------------------------------------
# Text
# -----------------------------------------------------------------------------------------------------------


class CaseOpsError(ValueError):
    """An encoded text that breaks the rules of the transform. The message names operator and position."""


def encode(text: str) -> str:
    """The CaseOps form of `text`. Total: any string is accepted, operators and lone surrogates included."""
    return _TO_ENCODE.sub(_encode_match, text)


def decode(encoded: str) -> str:
    """The text whose CaseOps form is `encoded`.

    Accepts a little more than `encode` produces (TITLE CAPNEXT a, ALLCAPS word CAPNEXT a), so it is a left
    inverse of `encode`. Raises CaseOpsError where an operator is not followed by what it applies to, or
    where TITLE or ALLCAPS stands inside a word.
    """
    return _TO_DECODE.sub(_decode_match, encoded)


def attribute_bytes(pieces: Iterable[str]) -> list[int]:
    """UTF-8 bytes of the original text that each piece of its encoded form stands for.

    `pieces` are consecutive substrings of one encoded text, cut anywhere, empty ones allowed. An operator
    counts 0; every other character, and the one after ESC, counts its UTF-8 length; an ESC at the end of a
    piece acts on the next piece. For the pieces of `encode(text)` the counts sum to
    `len(text.encode())`. Raises UnicodeEncodeError on lone surrogates, which have no UTF-8 form.
    """
    counts = []
    escaped = False
    for piece in pieces:
        count = len(piece.encode())
        if escaped or not piece.isascii():
            for character in piece:
                if escaped:
                    escaped = False
                elif character in _NAMES:
                    count -= len(character.encode())
                    escaped = character == ESC
        counts.append(count)
    return counts


def _encode_match(match: re.Match) -> str:
    run, start = match[0], match.start()
    if run in _NAMES:
        return ESC + run
    before = match.string[start - 1 : start]
    return _capnext_capitals(run) if before.isascii() and before.islower() else _encode_word(run)


@lru_cache(maxsize=1 << 16)
def _encode_word(word: str) -> str:
    """The CaseOps form of a word whose first letter is upper case."""
    if len(word) >= 2 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + _capnext_capitals(word[1:])


def _capnext_capitals(letters: str) -> str:
    return _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), letters)


def _decode_match(match: re.Match) -> str:
    kind = match.lastgroup
    if kind == "escaped":
        return match["escaped"]
    if kind == "capital":
        return match["capital"].upper()
    if kind == "word":
        word = _CAPNEXT_LETTER.sub(lambda letter: letter[1].upper(), match["word"])
        return word.upper() if match["mode"] == ALLCAPS else word[0].upper() + word[1:]
    raise CaseOpsError(
        f"{_NAMES[match['stray']]} at character {match.start()} is not followed by what it applies to, "
        "or stands inside a word"
    )


# -----------------------------------------------------------------------------------------------------------
# Tokens
# -----------------------------------------------------------------------------------------------------------

BOS = 1
FIRST_OPERATOR_ID = 4
MAX_UINT16 = 65_535
WORD_MARK = "\u2581"  # what SentencePiece writes for a space
USE_CASEOPS = "use a CaseOps tokenizer (tools/train_tokenizer.py makes one)"

# What normalizers fold, collapse or drop, or the tokenizer itself might take for its own notation.
PROBE = (
    "\t two  blanks\n\r\n\x00\x1b\x7f \ufb01\u2460\u00c5A\u030a\u00a0\u3000\ufeff\ufffd"
    "<s><0x0A>\U0001f600  "
)

# A NormalizerSpec without character map, dummy prefix or whitespace removal. Appended to a model it overrides
# the model's own, because protocol buffers merge a repeated message field by field.
IDENTITY_OVERRIDE = b"\x1a\x10\x0a\x08identity\x12\x00\x18\x00\x20\x00"

_OTHER = rf"[^\x00-\x7f{WORD_MARK}{OPERATORS}]"
# From fine to coarse: operators, digits, letters and punctuation apart (unless characters beyond ASCII join
# them); words with what clings to them; the whole document. Each begins with the blanks before it.
WORD_PATTERNS = (
    re.compile(
        rf"{WORD_MARK}*(?:[0-9{OPERATORS}]"
        rf"|[a-z]+(?![a-z]|{_OTHER})"
        rf"|[\x00-/:-`{{-\x7f]+(?![\x00-/:-`{{-\x7f]|{_OTHER})"
        rf"|[^{WORD_MARK}{OPERATORS}]+)|{WORD_MARK}+"
    ),
    re.compile(f"{WORD_MARK}*[^{WORD_MARK}]+|{WORD_MARK}+"),
    re.compile("(?s:.+)"),
)


class TokenizerError(ValueError):
    """A model that cannot tokenize CaseOps text into shards; the message says why and what to use."""


class Tokenizer:
    """A SentencePiece BPE with byte fallback, BOS id 1 and the CaseOps operators at ids 4 to 7.

    `lossless` says whether decoding gives back every byte of the encoded text. Raises TokenizerError when the
    bytes `model` are no such model.
    """

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.sp = _load_model(model)
        self.vocab_size = self.sp.get_piece_size()
        self._check()
        pieces = [self.sp.id_to_piece(index) for index in range(self.vocab_size)]
        self.piece_bytes = np.array(
            [1 if self.sp.is_byte(index) else len(piece.encode()) for index, piece in enumerate(pieces)]
        )
        self.lossless = self.sp.decode(self.sp.encode(PROBE)) == PROBE
        # SentencePiece writes a word mark found in the text as it writes a space; as bytes it survives.
        mark_ids = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_MARK.encode()]
        self.mark_tokens = pack_uint16(mark_ids)
        self.word_pattern = self._word_pattern()
        self.words = _WordTokens(_load_model(model + IDENTITY_OVERRIDE))

    def _check(self) -> None:
        if self.vocab_size > MAX_UINT16:
            raise TokenizerError(f"{self.vocab_size} pieces, but shards hold at most {MAX_UINT16}; use fewer")
        wanted = {"BOS": (self.sp.bos_id(), BOS)}
        for index, operator in enumerate(OPERATORS):
            wanted[f"U+{ord(operator):04X}"] = (self.sp.piece_to_id(operator), FIRST_OPERATOR_ID + index)
        for name, (found, needed) in wanted.items():
            if found != needed:
                raise TokenizerError(f"{name} has id {found}, not {needed}; {USE_CASEOPS}")
        if sum(map(self.sp.is_byte, range(self.vocab_size))) != 256:
            raise TokenizerError(f"no byte fallback, so rare characters would be lost; {USE_CASEOPS}")

    def _word_pattern(self) -> re.Pattern:
        """The finest way to cut a normalized text into words that BPE merges never cross."""
        scores = map(self.sp.get_score, range(self.vocab_size))
        # A BPE's scores are ranks. Log probabilities are those of a unigram model, which sees the whole text.
        if not all(score.is_integer() for score in scores):
            return WORD_PATTERNS[-1]
        special = (self.sp.is_byte, self.sp.is_control, self.sp.is_unknown)
        ids = [index for index in range(self.vocab_size) if not any(is_a(index) for is_a in special)]
        pieces = [self.sp.id_to_piece(index) for index in ids]
        for pattern in WORD_PATTERNS[:-1]:
            if all(pattern.findall(piece) == [piece] for piece in pieces):
                return pattern
        return WORD_PATTERNS[-1]

    def encode(self, text: str) -> bytes:
        """Little-endian uint16 ids of the CaseOps form `text`, without BOS; the same as SentencePiece's own.

        A word has the same tokens wherever it stands, so SentencePiece is asked once for each distinct word.
        """
        if self.lossless and WORD_MARK in text:
            return self.mark_tokens.join(map(self.encode, text.split(WORD_MARK)))
        words = self.word_pattern.findall(self.sp.normalize(text))
        return b"".join(map(self.words.__getitem__, words))

    def encode_with_bytes(self, text: str) -> tuple[bytes, list[int]]:
        """`encode(text)` and the original UTF-8 bytes that each of its ids stands for.

        The pieces' lengths cut the normalized text, the normalizer's offsets carry the cuts back to `text`. A
        cut inside a character moves to its begin, which gives the character to its last byte piece.
        """
        tokens = self.encode(text)
        normalized, offsets = self.sp.normalize(text, with_offsets=True)
        utf8 = np.frombuffer(normalized.encode(), np.uint8)
        # The character to which each byte belongs, and the end.
        characters = np.append(np.cumsum(utf8 & 0xC0 != 0x80) - 1, len(normalized))
        byte_cuts = np.append(0, np.cumsum(self.piece_bytes[np.frombuffer(tokens, "<u2")]))
        text_cuts = np.array(offsets)[characters[byte_cuts]].tolist()
        return tokens, attribute_bytes(text[begin:end] for begin, end in itertools.pairwise(text_cuts))


class _WordTokens(dict):
    """Word -> packed ids, bounded."""

    MAX_WORDS = 1 << 18
    MAX_WORD_LENGTH = 64

    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        super().__init__()
        self.sp = sp

    def __missing__(self, word: str) -> bytes:
        tokens = pack_uint16(self.sp.encode(word))
        if len(word) <= self.MAX_WORD_LENGTH:
            if len(self) >= self.MAX_WORDS:
                self.clear()
            self[word] = tokens
        return tokens


def _load_model(model: bytes) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise TokenizerError("not a SentencePiece model; give a .model file") from error
    return sp


def pack_uint16(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)
