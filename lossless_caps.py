"""CaseOps: a lossless text transform that takes capital letters out of the vocabulary's way.

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
this is the denominator of bits per byte.
"""

import re
from functools import lru_cache
from collections.abc import Iterable

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
