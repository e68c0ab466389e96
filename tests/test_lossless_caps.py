"""lossless_caps against a character-by-character reference and SentencePiece, and its invariants on arbitrary text."""

import string

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings, strategies as st

import lossless_caps as caps
from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE, Tokenizer
from tests.texts import make_texts, train_lossless, train_plain, write_docs

LETTERS = set(string.ascii_letters)
UPPER = set(string.ascii_uppercase)

# Plain st.text() hardly ever makes words or operators: both get a fair share here.
any_text = st.text(st.one_of(st.characters(), st.sampled_from("aAbBzZ'- \n\t0\x00éÉİß" + OPERATORS)))
utf8_text = any_text.map(lambda text: "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000))
# What normalizers change and the tokenizer itself might take for its notation.
token_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aAbB.,'- \n\t0\x00éﬁ½\u2581" + OPERATORS),
    )
)
encoded_like = st.text(st.sampled_from("abXY .é" + OPERATORS), max_size=12)


def reference_encode(text: str) -> str:
    out, position = [], 0
    while position < len(text):
        if text[position] in OPERATORS:
            out += [ESC, text[position]]
            position += 1
            continue
        end = position
        while end < len(text) and text[end] in LETTERS:
            end += 1
        word = text[position:end]
        if not word:
            out.append(text[position])
            position += 1
            continue
        position = end
        uppers = [letter in UPPER for letter in word]
        if not any(uppers):
            out.append(word)
        elif len(word) > 1 and all(uppers):
            out += [ALLCAPS, word.lower()]
        else:
            for index, letter in enumerate(word):
                if uppers[index]:
                    out.append(CAPNEXT if index else TITLE)
                out.append(letter.lower())
    return "".join(out)


def reference_decode(encoded: str) -> str:
    """The state machine of the transform's definition. Raises ValueError."""
    out, mode, all_caps, capnext, inside, escaped = [], None, False, False, False, False
    for character in encoded:
        if escaped:
            if mode or capnext:
                raise ValueError
            out.append(character)
            escaped, all_caps, inside = False, False, character in LETTERS
        elif character == ESC:
            escaped = True
            if mode or capnext:
                raise ValueError
        elif character in (TITLE, ALLCAPS):
            if mode or inside or capnext:
                raise ValueError
            mode = character
        elif character == CAPNEXT:
            if capnext:
                raise ValueError
            capnext = True
        elif character in LETTERS:
            if mode == ALLCAPS:
                all_caps = True
            out.append(character.upper() if mode or all_caps or capnext else character)
            mode, capnext, inside = None, False, True
        else:
            if mode or capnext:
                raise ValueError
            out.append(character)
            all_caps = inside = False
    if mode or capnext or escaped:
        raise ValueError
    return "".join(out)


def reference_bytes(pieces: list[str]) -> list[int]:
    counts, escaped = [], False
    for piece in pieces:
        count = 0
        for character in piece:
            if escaped or character not in OPERATORS:
                count += len(character.encode())
                escaped = False
            else:
                escaped = character == ESC
        counts.append(count)
    return counts


@pytest.mark.parametrize(
    "text, encoded",
    [
        ("the", "the"),
        ("NASA", ALLCAPS + "nasa"),
        ("Hello", TITLE + "hello"),
        ("iPhone", f"i{CAPNEXT}phone"),
        ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
        ("USAs", f"{TITLE}u{CAPNEXT}s{CAPNEXT}as"),
        ("I", TITLE + "i"),
        ("aB", f"a{CAPNEXT}b"),
        ("ÉCOLE", "É" + ALLCAPS + "cole"),
        ("O'Brien", f"{TITLE}o'{TITLE}brien"),
        (TITLE, ESC + TITLE),
        ("A" + ESC + "b", TITLE + "a" + ESC + ESC + "b"),
        ("", ""),
    ],
)
def test_examples(text, encoded):
    assert caps.encode(text) == encoded
    assert caps.decode(encoded) == text


@settings(max_examples=1000)
@given(any_text)
@example("".join(map(chr, range(0x300))))
@example("\ud800A\udfff")
def test_round_trip_and_reference(text):
    encoded = caps.encode(text)
    assert encoded == reference_encode(text)
    assert caps.decode(encoded) == text


def test_every_character_beside_letters():
    text = "".join(f"aB{chr(code)}Cd{chr(code)}EF" for code in [*range(0x3000), *range(0xD700, 0x10400)])
    encoded = caps.encode(text)
    assert encoded == reference_encode(text)
    assert caps.decode(encoded) == text


@settings(max_examples=3000)
@given(encoded_like)
def test_decode_accepts_what_the_reference_accepts(encoded):
    try:
        expected = reference_decode(encoded)
    except ValueError:
        with pytest.raises(caps.CaseOpsError):
            caps.decode(encoded)
    else:
        assert caps.decode(encoded) == expected


@pytest.mark.parametrize(
    "encoded, name, position",
    [
        (TITLE, "TITLE", 0),
        ("ab " + ALLCAPS + " c", "ALLCAPS", 3),
        ("a" + TITLE + "b", "TITLE", 1),
        (CAPNEXT * 2 + "a", "CAPNEXT", 0),
        ("x" + ESC, "ESC", 1),
        (TITLE + ESC + ESC, "TITLE", 0),
        (TITLE + "é", "TITLE", 0),
    ],
)
def test_decode_names_operator_and_position(encoded, name, position):
    with pytest.raises(caps.CaseOpsError) as error:
        caps.decode(encoded)
    assert isinstance(error.value, ValueError)
    assert str(error.value).startswith(f"{name} at character {position} ")
    assert "\n" not in str(error.value)


@settings(max_examples=1000)
@given(utf8_text, st.data())
def test_bytes_sum_over_arbitrary_cuts(text, data):
    encoded = caps.encode(text)
    cuts = data.draw(st.lists(st.integers(0, len(encoded)), max_size=12).map(sorted))
    bounds = [0, *cuts, len(encoded)]
    pieces = [encoded[begin:end] for begin, end in zip(bounds, bounds[1:])]
    counts = caps.attribute_bytes(pieces)
    assert len(counts) == len(pieces)
    assert counts == reference_bytes(pieces)
    assert sum(counts) == len(text.encode())


def test_bytes_per_piece():
    pieces = [" ", TITLE, "hel", "lo", ESC, "", TITLE + "x", "é", "😀" + ESC + ESC + CAPNEXT]
    assert caps.attribute_bytes(pieces) == [1, 0, 3, 2, 0, 0, 4, 2, 7]
    assert caps.attribute_bytes([]) == []


def test_surrogates_have_no_bytes():
    with pytest.raises(UnicodeEncodeError):
        caps.attribute_bytes(["\ud800"])


def test_time_is_linear():
    """A run of a million letters is a word like any other: quadratic scanning would take hours."""
    for text in ("a" * 1_000_000 + "B", "aB" * 500_000, "A" * 1_000_000, ESC * 1_000_000):
        assert caps.decode(caps.encode(text)) == text


# Tokens


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def model(work):
    return train_lossless(work / "lossless.model", write_docs(work / "docs.jsonl", make_texts(300)))


def surfaces(sp: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[str]]:
    """SentencePiece's own ids and surfaces, read from the serialized form that all its releases share."""

    def fields(message: bytes):
        position = 0
        while position < len(message):
            numbers = []
            for _ in range(2):
                value = shift = 0
                while True:
                    byte = message[position]
                    position += 1
                    value |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                numbers.append(value)
                if len(numbers) == 1 and value & 7 == 5:
                    numbers.append(None)
                    position += 4
                    break
            key, value = numbers
            if key & 7 == 2:
                value, position = message[position : position + value], position + value
            yield key >> 3, value

    pieces = [dict(fields(value)) for key, value in fields(sp.encode(text, out_type="serialized_proto")) if key == 2]
    return [piece.get(2, 0) for piece in pieces], [piece.get(3, b"").decode() for piece in pieces]


@pytest.mark.parametrize("kind", ["lossy", "lossless", "digits joined", "unigram", "dummy prefix", "published"])
def test_tokens_and_bytes_are_those_of_sentencepiece(kind, model, work, request):
    if kind == "published":
        path = next((request.getfixturevalue("corpus") / "tokenizers").glob("*.model"))
    else:
        path = {
            "lossy": lambda: train_plain(
                work / "lossy.model", normalization_rule_name="nmt_nfkc", split_digits=True),
            "lossless": lambda: model,
            "digits joined": lambda: train_plain(work / "digits.model", split_digits=False),
            "unigram": lambda: train_plain(work / "unigram.model", model_type="unigram"),
            "dummy prefix": lambda: train_plain(work / "prefix.model", add_dummy_prefix=True, split_digits=True),
        }[kind]()
    tokenizer = Tokenizer(path.read_bytes())
    assert tokenizer.lossless == (kind == "lossless")
    finest = {"digits joined": 1, "unigram": 2}.get(kind, 0)
    assert caps.WORD_PATTERNS.index(tokenizer.word_pattern) == finest

    @settings(max_examples=400, deadline=None)
    @given(token_text)
    @example("\n".join(make_texts(5)))
    @example("  \u3000 Ab\u0301ﬁﬁ ①㎏ 한글 ｶﾞ x\u200b\ufeffy  ")
    def same(text):
        encoded = caps.encode(text)
        if tokenizer.lossless:
            encoded = encoded.replace(caps.WORD_MARK, "")
        tokens, counts = tokenizer.encode_with_bytes(encoded)
        ids, originals = surfaces(tokenizer.sp, encoded)
        assert np.frombuffer(tokens, "<u2").tolist() == ids == tokenizer.sp.encode(encoded)
        assert tokenizer.encode(encoded) == tokens
        assert counts == caps.attribute_bytes(originals)

    same()


@settings(max_examples=500, deadline=None)
@given(text=token_text)
@example(text=caps.PROBE)
@example(text="▁ ▁▁  a▁B\n\n\t ▁")
def test_lossless_tokenizer_gives_back_every_byte(model, text):
    tokenizer = Tokenizer(model.read_bytes())
    tokens, counts = tokenizer.encode_with_bytes(caps.encode(text))
    ids = np.frombuffer(tokens, "<u2").tolist()
    assert caps.decode(tokenizer.sp.decode(ids)) == text
    assert len(counts) == len(ids) and sum(counts) == len(text.encode())


def test_shipped_tokenizer(root):
    (path,) = (root / "tokenizers").glob("*.model")
    tokenizer = Tokenizer(path.read_bytes())
    assert tokenizer.lossless and tokenizer.vocab_size == 8192
    assert [tokenizer.sp.pad_id(), tokenizer.sp.bos_id(), tokenizer.sp.eos_id(), tokenizer.sp.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.sp.piece_to_id("<0x00>") == 8
    assert tokenizer.sha256 in (root / "tokenizers" / "README.md").read_text()


def test_words_are_forgotten_when_too_many(model, monkeypatch):
    monkeypatch.setattr(caps._WordTokens, "MAX_WORDS", 10)
    tokenizer = Tokenizer(model.read_bytes())
    text = caps.encode(" ".join(make_texts(3)) + " " + "x" * 1000).replace(caps.WORD_MARK, "")
    assert np.frombuffer(tokenizer.encode(text), "<u2").tolist() == tokenizer.sp.encode(text)
    assert len(tokenizer.words) <= 10 and all(len(word) <= 64 for word in tokenizer.words)
