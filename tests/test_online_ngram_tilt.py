"""The n-gram state against a slow reference that keeps whole contexts, and the tilt against arithmetic.

Three properties make the hints usable for coding, and mutants that break them must fail the same checks: nothing at or after
a target changes its hint, the tilted distribution sums to one, and a decoder that feeds what it has decoded gets the same.
"""
import itertools
import lzma
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import online_ngram_tilt as ngram
from online_ngram_tilt import NgramError, NgramState, tilt, token_hints

torch.set_num_threads(1)
SOURCE = ngram.SOURCE.read_text()
fuzz = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def shared_cache(cache):
    """Everything in this module compiles into one temporary folder, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(cache))
        yield


@pytest.fixture
def mutant(monkeypatch, tmp_path):
    """Put the C source in force with pieces of it replaced."""
    def apply(*replacements):
        source = SOURCE
        for old, new in replacements:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)
        path = tmp_path / ngram.SOURCE.name
        path.write_text(source)
        monkeypatch.setattr(ngram, "SOURCE", path)
        ngram.load.cache_clear()

    yield apply
    ngram.load.cache_clear()


def feed_all(tokens, order, threshold, mode) -> ngram.Hints:
    """Entries for the token after each token, fed at once."""
    return NgramState(order, threshold, mode=mode).feed(tokens)


def bounds_of(rows) -> list[np.ndarray]:
    """first, begin and end of rows that are triples of them."""
    return [np.array(bound, np.int64) for bound in zip(*rows)] if len(rows) else [np.array([], np.int64)] * 3


def concatenated(pieces) -> ngram.Hints:
    return ngram.Hints(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def feed_rows(tokens, rows, order, threshold, mode, cuts=()) -> ngram.Hints:
    """Entries for the targets of rows, fed in as many calls as the cuts make."""
    state = NgramState(order, threshold, mode=mode)
    cuts = [0, *cuts, len(rows)]
    return concatenated([state.feed_rows(tokens, *bounds_of(rows[a:b])) for a, b in itertools.pairwise(cuts)])


def feed_rows_to_decoder(tokens, rows, order, threshold, mode) -> ngram.Hints:
    """The same token by token: what a decoder does that has decoded no more than the context of the next target."""
    state, entries = NgramState(order, threshold, mode=mode), []
    for first, begin, end in rows:
        state.restart()
        hints = state.feed(tokens[max(first, begin - order + 2):begin + 1])
        for t in range(begin, end):
            entries.append([array[-1:] for array in hints])
            hints = state.feed(tokens[t + 1:t + 2])
    return concatenated([*entries, state.feed(tokens[:0])])


def feed_pieces(tokens, cuts, order, threshold, mode) -> ngram.Hints:
    state = NgramState(order, threshold, mode=mode)
    return concatenated([state.feed(piece) for piece in np.split(tokens, cuts)])


class Reference:
    """Entries and counts from dictionaries of tuples and the definitions."""

    def __init__(self, order, threshold, mode, boost=2.625):
        self.width, self.threshold, self.mode, self.boost = order - 1, threshold, mode, boost
        self.pairs, self.totals, self.top = defaultdict(int), defaultdict(int), {}
        self.hits, self.misses, self.entries = defaultdict(int), defaultdict(int), []

    def bucket(self, context) -> tuple[int, int]:
        total = self.totals[context]
        count = total if total < 8 else 9 + math.frexp(total)[1] - 4  # frexp's exponent of 8 to 15 is 4
        return count, math.floor(Fraction(20 * self.pairs[context, self.top[context]], total))

    def predict(self, context):
        """Append the entry for the token after this context, all tokens of the present run or document."""
        context = tuple(context[-self.width:])
        total, best = self.totals[context], self.pairs[context, self.top.get(context)]
        if not total or np.float32(best / total) < np.float32(self.threshold):
            self.entries.append((0, False, 0))
            return
        prior, bucket = 8 * (best + 0.5) / (total + 1), self.bucket(context)
        odds = np.float32((self.hits[bucket] + prior) / (self.misses[bucket] + 8 - prior))
        self.entries.append((self.top[context], True, self.boost if self.mode == "fixed" else np.log(odds)))

    def learn(self, context, token):
        context = tuple(context[-self.width:])
        if len(context) < self.width:
            return
        if context in self.top:
            (self.hits if token == self.top[context] else self.misses)[self.bucket(context)] += 1
        self.totals[context] += 1
        self.pairs[context, token] += 1
        if context not in self.top or self.pairs[context, token] > self.pairs[context, self.top[context]]:
            self.top[context] = token

    def hints(self) -> ngram.Hints:
        ids, gate, boosts = zip(*self.entries) if self.entries else ((), (), ())
        return ngram.Hints(np.array(ids, np.uint16), np.array(gate, bool), np.array(boosts, np.float32))


def reference(tokens, order, threshold, mode) -> ngram.Hints:
    """What feed_all returns."""
    counts, tokens = Reference(order, threshold, mode), tokens.tolist()
    for t, token in enumerate(tokens):
        context = tokens[max(t - order, 0):t]
        counts.learn(context, token)
        counts.predict([*context, token])
    return counts.hints()


def reference_of_rows(tokens, rows, order, threshold, mode) -> ngram.Hints:
    """What feed_rows returns."""
    counts, tokens = Reference(order, threshold, mode), tokens.tolist()
    for first, begin, end in rows:
        for t in range(begin, end):
            context = tokens[max(t - order, first):t + 1]
            counts.predict(context)
            counts.learn(context, tokens[t + 1])
    return counts.hints()


def assert_equal(found: ngram.Hints, expected: ngram.Hints):
    """Same hints, gates and boosts to the bit (of a logarithm: to the last but one)."""
    assert [array.dtype for array in found] == [np.uint16, bool, np.float32]
    np.testing.assert_array_equal(found.gate, expected.gate)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.boost, expected.boost, rtol=3e-7, atol=1e-7)


def assert_same_bits(found: ngram.Hints, expected: ngram.Hints):
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def text_like(length: int, seed: int = 0, vocabulary: int = 8192) -> np.ndarray:
    """Zipf tokens, half of them copies of earlier passages with one token changed in each."""
    draw = np.random.default_rng(seed)
    tokens = np.minimum(draw.zipf(1.2, length) - 1, vocabulary - 1).astype(np.uint16)
    at = 200
    while at < length:
        span = min(int(draw.integers(20, 120)), length - at)
        if draw.random() < 0.5:
            start = int(draw.integers(0, at - 120))
            tokens[at:at + span] = tokens[start:start + span]
            tokens[at + int(draw.integers(span))] = draw.integers(vocabulary)
        at += span
    return tokens


@st.composite
def streams(draw) -> np.ndarray:
    """Few tokens in blocks that come back: contexts that occur often, with one, several or changing continuations."""
    alphabet = draw(st.sampled_from([[0], [0, 1], [0, 65535], [7, 8, 9], [0, 1, 2, 8191, 32768, 65535]]))
    blocks = draw(st.lists(st.lists(st.sampled_from(alphabet), min_size=1, max_size=24), min_size=1, max_size=4))
    order = draw(st.lists(st.integers(0, len(blocks) - 1), max_size=40))
    return np.array([token for index in order for token in blocks[index]], np.uint16)


def interleaved(documents, slots, lengths) -> list[tuple[int, int, int]]:
    """Rows of so many slots that take turns: each goes through document after document, in rows of these lengths.

    documents: position of the first and of the last token of each. lengths are repeated; idle slots have empty rows.
    """
    waiting, slots, rows, lengths = list(documents[::-1]), [(0, 0, 0)] * slots, [], itertools.cycle(lengths)
    while waiting or any(begin < last for _, begin, last in slots):
        for slot, (first, begin, last) in enumerate(slots):
            if begin == last and waiting:
                first, last = waiting.pop()
                begin = first
            end = min(begin + next(lengths), last)
            rows.append((first, begin, end))
            slots[slot] = first, end, last
    return rows


def cut(tokens, cuts) -> list[tuple[int, int]]:
    """First and last position of the documents between the cuts."""
    cuts = [0, *cuts, len(tokens)]
    return [(a, b - 1) for a, b in itertools.pairwise(cuts)]


@st.composite
def schedules(draw) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """A stream and rows of its documents: slots that take turns, or any rows at all."""
    tokens = np.tile(draw(streams().filter(len)), draw(st.integers(1, 8)))  # long contexts come back
    if draw(st.booleans()):
        documents = cut(tokens, sorted(draw(st.sets(st.integers(1, len(tokens)), max_size=12)) - {len(tokens)}))
        lengths = draw(st.lists(st.integers(1, 9) | st.integers(1, 150), min_size=1, max_size=20))
        return tokens, interleaved(documents, draw(st.integers(1, 5)), lengths)
    row = st.lists(st.integers(0, len(tokens) - 1), min_size=3, max_size=3).map(sorted).map(tuple)
    return tokens, draw(st.lists(row, max_size=12))


orders = st.sampled_from([2, 3, 5, 16])
thresholds = st.sampled_from([0.0, 0.5, 2 / 3, 0.8, 0.95, 1.0])
modes = st.sampled_from(ngram.MODES)

# Top of a context: 1, then 2 level with it (1 stays), then 2 ahead, then 1 ahead again after it had left the top.
OVERTAKING = np.array([5, 1, 5, 2, 5, 2, 5, 1, 5, 1, 5, 3, 5, 3, 5, 3, 5, 3, 5, 1, 5, 1, 5], np.uint16)


# --- The state against the reference


@fuzz
@given(streams(), orders, thresholds, modes)
@example(OVERTAKING, 2, 0.0, "learned")
@example(np.zeros(500, np.uint16), 16, 0.8, "learned")
@example(np.array([], np.uint16), 2, 0.8, "fixed")
def test_equals_the_reference(tokens, order, threshold, mode):
    assert_equal(feed_all(tokens, order, threshold, mode), reference(tokens, order, threshold, mode))


@pytest.mark.parametrize("mode", ngram.MODES)
@pytest.mark.parametrize(("order", "threshold"), [(16, 0.8), (4, 0.8), (2, 0.1)])
def test_equals_the_reference_on_long_streams(order, threshold, mode):
    """Tables grow many times; order 2 has contexts with hundreds of continuations."""
    tokens = text_like(60_000, vocabulary=3000)
    expected = reference(tokens, order, threshold, mode)
    assert expected.gate.sum() > 1000
    assert_equal(feed_all(tokens, order, threshold, mode), expected)
    assert_same_bits(feed_pieces(tokens, range(7, 60_000, 999), order, threshold, mode),
                     feed_all(tokens, order, threshold, mode))


def test_equals_the_reference_on_a_corpus(corpus):
    with lzma.open(corpus / "shards" / "fineweb_val_000000.bin.xz") as shard:
        tokens = np.frombuffer(shard.read(1024 + 600_000)[1024:], np.uint16)
    expected = reference(tokens, 16, 0.8, "learned")
    assert expected.gate.sum() > 1000
    assert_equal(feed_all(tokens, 16, 0.8, "learned"), expected)


@fuzz
@given(schedules(), st.data(), orders, thresholds, modes)
def test_rows_equal_the_reference(schedule, data, order, threshold, mode):
    tokens, rows = schedule
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    expected = reference_of_rows(tokens, rows, order, threshold, mode)
    assert_equal(feed_rows(tokens, rows, order, threshold, mode, cuts), expected)


@pytest.mark.parametrize("mode", ngram.MODES)
@pytest.mark.parametrize(("order", "threshold", "length"), [(16, 0.8, 48), (4, 0.8, 48), (2, 0.1, 7), (4, 0.8, 400)])
def test_rows_equal_the_reference_on_long_streams(order, threshold, length, mode):
    """Tables grow many times; most rows are longer than their context, or than what is prefetched."""
    tokens = text_like(30_000, vocabulary=3000)
    documents = cut(tokens, np.cumsum(np.random.default_rng(0).zipf(1.4, 200).clip(1, 2000)).clip(0, 29_999).tolist())
    rows = interleaved([(a, b) for a, b in documents if a <= b], 16, [length])
    expected = reference_of_rows(tokens, rows, order, threshold, mode)
    assert expected.gate.sum() > 1000
    assert_equal(feed_rows(tokens, rows, order, threshold, mode), expected)
    assert_same_bits(feed_rows(tokens, rows, order, threshold, mode, range(16, len(rows), 16)),
                     feed_rows(tokens, rows, order, threshold, mode))


CONTEXT_LENGTH = "return t - first < s->width ? t - first + 1 : s->width;"
ROW_MISTAKES = {
    "rows are not apart": ("        ngram_restart(s);\n        problem = ", "        problem = "),
    "the hash is not restarted": ("    s->hash = 0;\n", ""),
    "contexts reach before the document": (CONTEXT_LENGTH, "(void)first; return t < s->width ? t + 1 : s->width;"),
    "contexts lack a token": (CONTEXT_LENGTH, CONTEXT_LENGTH.replace("s->width", "(s->width - 1)")),
    "contexts are counted": (CONTEXT_LENGTH, CONTEXT_LENGTH.replace("s->width", "(s->width + 9)")),
    "the last target is not counted": ("context + n, entry,", "context + n - (n > 0), entry,"),
    "entries belong to the target before": ("entry, entry + n,", "entry - 1, entry - 1 + n,"),
}


@pytest.mark.parametrize("name", ROW_MISTAKES)
def test_mistakes_with_rows_are_caught(mutant, name):
    tokens = text_like(4000, vocabulary=50)
    rows = interleaved(cut(tokens, range(9, 4000, 99)), 4, [20])
    expected = reference_of_rows(tokens, rows, 4, 0.5, "learned")
    assert_equal(feed_rows(tokens, rows, 4, 0.5, "learned"), expected)
    mutant(ROW_MISTAKES[name])
    with pytest.raises(AssertionError):
        assert_equal(feed_rows(tokens, rows, 4, 0.5, "learned"), expected)


@pytest.mark.parametrize("bits", [0, 3, 11])
def test_colliding_hashes_change_nothing(mutant, bits):
    """All contexts share one hash, eight, or two thousand: only the comparison of contexts can tell them apart."""
    mutant(("(uint32_t)((mixed ^ mixed >> 29) * FACTOR >> 32)",
            f"(uint32_t)(((mixed ^ mixed >> 29) * FACTOR >> 32) & {(1 << bits) - 1}u)"))
    for tokens, order in ((text_like(3000), 16), (text_like(3000, vocabulary=20), 3)):
        assert_equal(feed_all(tokens, order, 0.8, "learned"), reference(tokens, order, 0.8, "learned"))
        rows = interleaved(cut(tokens, range(100, 3000, 200)), 4, [48])
        assert_equal(feed_rows(tokens, rows, order, 0.8, "learned"),
                     reference_of_rows(tokens, rows, order, 0.8, "learned"))


def test_the_hash_spreads():
    """Distinct windows, distinct keys: no structure of the stream piles contexts up. Timed by work, not by a clock."""
    test = "if (s->slots[i] >> 32 != key) continue;"
    assert SOURCE.count(test) == 1
    program = "static long probes;\n" + SOURCE.replace(test, "probes++; " + test) + """
#include <stdio.h>
int main(void) {
    enum { N = 1 << 17 };
    static uint16_t tokens[N], hints[N]; static uint8_t gates[N];
    for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < N; i++) tokens[i] = (uint16_t[]){i, i << 8 | i >> 8, i / 15, i & i >> 8}[kind];
        void *s = ngram_create(16, .8f);
        probes = 0;
        ngram_feed(s, tokens, N, hints, gates, NULL);
        printf("%f ", (double)probes / N);
        ngram_destroy(s);
    }
}"""
    folder = ngram.Path.home()
    run = subprocess.run(["cc", "-O1", "-x", "c", "-", "-o", folder / "probe"], input=program.encode(), check=False)
    assert run.returncode == 0
    probes = [float(value) for value in subprocess.run([folder / "probe"], capture_output=True, check=True).stdout.split()]
    assert max(probes) < 3, probes  # linear probing at half load: 1.5 used slots a lookup of a new context at the end


# --- Causality


def check_causality(tokens, t, order, threshold, mode):
    """Hint, gate and boost of targets up to t (entries up to t - 1) do not depend on tokens[t:]."""
    whole = feed_all(tokens, order, threshold, mode)
    draw = np.random.default_rng(t)
    for change in (np.full(len(tokens) - t, 65535), draw.permutation(tokens[t:]), tokens[t:] ^ 1, []):
        other = feed_all(np.concatenate([tokens[:t], change]).astype(np.uint16), order, threshold, mode)
        for one, two in zip(whole, other):
            np.testing.assert_array_equal(one[:t], two[:t])


def check_decoder(tokens, order, threshold, mode):
    """Asking for each hint with nothing fed but what came before gives the hints of the whole stream."""
    assert_same_bits(feed_pieces(tokens, range(1, len(tokens)), order, threshold, mode),
                     feed_all(tokens, order, threshold, mode))


def check_causality_of_rows(tokens, rows, r, t, order, threshold, mode):
    """Entries up to that of target t in row r do not depend on the target, nor on any token but those that came before.

    Those are the contexts and targets of the rows before, and in row r the tokens up to t. A stream that ends where the
    rows up to r do gives the same entries.
    """
    whole = feed_rows(tokens, rows, order, threshold, mode)
    known = np.zeros(len(tokens), bool)
    for first, begin, end in [*rows[:r], (*rows[r][:2], t)]:
        known[max(first, begin - order + 2):end + 1] = True
    n = sum(end - begin for _, begin, end in rows[:r]) + t + 1 - rows[r][1]
    draw = np.random.default_rng(t)
    for change in (65535, draw.permutation(tokens), tokens ^ 1):
        other = feed_rows(np.where(known, tokens, change).astype(np.uint16), rows, order, threshold, mode)
        for one, two in zip(whole, other):
            np.testing.assert_array_equal(one[:n], two[:n])
    rows = [*rows[:r], (*rows[r][:2], t + 1)]
    other = feed_rows(tokens[:max(end for _, _, end in rows) + 1], rows, order, threshold, mode)
    assert_same_bits(other, ngram.Hints(*(array[:n] for array in whole)))


@fuzz
@given(streams(), st.data(), orders, thresholds, modes)
def test_the_future_changes_nothing(tokens, data, order, threshold, mode):
    check_causality(tokens, data.draw(st.integers(0, len(tokens))), order, threshold, mode)


@fuzz
@given(streams(), st.data(), orders, thresholds, modes)
def test_pieces_equal_the_whole(tokens, data, order, threshold, mode):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    assert_same_bits(feed_pieces(tokens, cuts, order, threshold, mode), feed_all(tokens, order, threshold, mode))


@fuzz
@given(schedules(), st.data(), orders, thresholds, modes)
def test_the_future_changes_nothing_in_rows(schedule, data, order, threshold, mode):
    tokens, rows = schedule
    targets = [(r, t) for r, (_, begin, end) in enumerate(rows) for t in range(begin, end)]
    if targets:
        check_causality_of_rows(tokens, rows, *data.draw(st.sampled_from(targets)), order, threshold, mode)


@fuzz
@given(schedules(), orders, thresholds, modes)
def test_rows_equal_a_decoder(schedule, order, threshold, mode):
    tokens, rows = schedule
    assert_same_bits(feed_rows(tokens, rows, order, threshold, mode),
                     feed_rows_to_decoder(tokens, rows, order, threshold, mode))


@fuzz
@given(streams().filter(len), orders, thresholds, modes)
@example(OVERTAKING, 2, 0.0, "learned")
@example(np.zeros(1, np.uint16), 2, 0.0, "fixed")
def test_one_row_equals_the_stream(tokens, order, threshold, mode):
    """And feeds, rows and restarts may alternate: what is fed after rows follows the last one."""
    assert_same_bits(feed_rows(tokens, [(0, 0, len(tokens) - 1)], order, threshold, mode),
                     token_hints(tokens, order, threshold, mode=mode))
    one, other = (NgramState(order, threshold, mode=mode) for _ in range(2))
    for first in (0, len(tokens) // 2):
        one.feed_rows(tokens, *bounds_of([(first, first, len(tokens) - 1)]))
        other.restart()
        other.feed(tokens[first:])
        assert_same_bits(one.feed(tokens), other.feed(tokens))


@pytest.mark.parametrize("mode", ngram.MODES)
def test_causal_on_a_long_stream(mode):
    tokens = text_like(4000)
    for t in (*range(2000, 2200, 7), 0, 1, 15, 3999):
        check_causality(tokens, t, 4, 0.8, mode)
    check_decoder(tokens, 4, 0.8, mode)


PEEKING = {
    "gate knows whether the hint is right": (
        "const int gated = s->total &&", "const int gated = s->total && (i + 1 == n || tokens[i + 1] == s->hint) &&"),
    "rates include the outcome": (
        "if (odds) {", "if (odds && s->total && i + 1 < n && tokens[i + 1] == s->hint) s->bucket->hits++; if (odds) {"),
    "lookup happens after the next token is learned": (
        "const int gated =", "if (s->slot && i + 1 < n) { s->length++; learn(s, tokens[i + 1]); s->length--; "
                            "look_up(s, s->key); } const int gated ="),
}


@pytest.mark.parametrize("name", PEEKING)
def test_a_peeking_state_is_caught(mutant, name):
    mutant(PEEKING[name])
    tokens = text_like(4000)
    with pytest.raises(AssertionError):
        for t in range(2000, 2400):
            check_causality(tokens, t, 4, 0.8, "learned")
    with pytest.raises(AssertionError):
        check_decoder(tokens, 4, 0.8, "learned")
    rows = interleaved(cut(tokens, [900, 2100]), 2, [48])
    with pytest.raises(AssertionError):
        for r, (_, begin, end) in enumerate(rows):
            for t in range(begin, end, 5):
                check_causality_of_rows(tokens, rows, r, t, 4, 0.8, "learned")
    with pytest.raises(AssertionError):
        assert_same_bits(feed_rows(tokens, rows, 4, 0.8, "learned"),
                         feed_rows_to_decoder(tokens, rows, 4, 0.8, "learned"))


def test_counting_the_whole_stream_first_is_caught(monkeypatch):
    honest = NgramState.feed
    monkeypatch.setattr(NgramState, "feed", lambda self, tokens: (honest(self, tokens), honest(self, tokens))[1])
    with pytest.raises(AssertionError):
        check_causality(text_like(1000), 500, 4, 0.8, "fixed")


def test_entries_are_aligned_with_the_targets():
    """The second time 1 2 3 passes by, entry t names tokens[t + 1]; 0 0 0 0 before it comes from context 1 2."""
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4], np.uint16)
    hints = token_hints(tokens, order=3)
    assert hints.ids.tolist() == [0, 0, 0, 0, 0, 0, 3, 4]
    assert hints.gate.tolist() == [False] * 6 + [True] * 2
    assert hints.boost.tolist() == [0] * 6 + [2.625] * 2
    assert tokens[1:][hints.gate].tolist() == hints.ids[hints.gate].tolist()


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_streams(length):
    hints = token_hints(np.zeros(length, np.uint16), order=2)
    assert [len(array) for array in hints] == [max(length - 1, 0)] * 3 and not hints.gate.any()


def test_context_is_full_before_anything_is_counted():
    """Contexts of 15 tokens: the first hint for a constant stream belongs to target 16, the first lesson to target 15."""
    assert token_hints(np.full(40, 3, np.uint16)).gate.tolist() == [False] * 15 + [True] * 24


def test_rows_keep_counts_and_forget_contexts():
    """Documents 1 2 3 4 and 9 2 3 4 in turn, contexts of 2 tokens: the second one knows 2 3 -> 4, but not 9 2 -> 3."""
    tokens = np.array([1, 2, 3, 4, 9, 2, 3, 4], np.uint16)
    state = NgramState(3)
    rows = [(0, 0, 1), (4, 4, 5), (0, 1, 3), (4, 5, 7)]  # targets 2, 2, 3 4, 3 4
    hints = state.feed_rows(tokens, *bounds_of(rows))
    assert hints.ids.tolist() == [0, 0, 0, 0, 0, 4]
    state.restart()
    assert state.feed(tokens[1:3]).ids.tolist() == [0, 4]  # a context of 2 tokens, and the hint for what follows it
    assert state.feed(tokens[3:4]).ids.tolist() == [0]  # 3 4 ends both documents: nothing has followed it


def test_no_rows_and_empty_rows():
    state = NgramState(2)
    for rows in ([], [(0, 0, 0)], [(0, 0, 0), (1, 2, 2)]):
        hints = state.feed_rows(np.zeros(3, np.uint16), *bounds_of(rows))
        assert [len(array) for array in hints] == [0, 0, 0]
    assert len(NgramState(2).feed_rows(np.zeros(0, np.uint16), *bounds_of([])).ids) == 0
    state.restart()
    assert not state.feed(np.zeros(1, np.uint16)).gate.any()  # nothing was counted


def test_threshold_is_compared_in_float32():
    """A context followed by its hint in 4 of 5 cases passes 0.8, in 3 of 4 it does not."""
    tokens = np.array([5, 1, 5, 1, 5, 1, 5, 2, 5, 1, 5], np.uint16)
    gates = NgramState(2, 0.8).feed(tokens).gate[::2]
    assert gates.tolist() == [False, True, True, True, False, True]


# --- The hit rates


def test_rates_follow_the_hits():
    """500 contexts that go on with their own token in 60 or in 95 % of the cases: rates and hits agree in each kind."""
    draw = np.random.default_rng(0)
    contexts = draw.integers(2, 502, 60_000)
    kept = draw.random(60_000) < np.where(contexts % 2, 0.6, 0.95)
    tokens = np.ravel(np.column_stack([contexts, np.where(kept, 1000 + contexts, 2000)])).astype(np.uint16)
    hints = token_hints(tokens, order=2, threshold=0.0, mode="learned")
    rates = 1 / (1 + np.exp(-hints.boost[60_000::2]))
    hits = hints.ids[60_000::2] == tokens[60_001::2]
    for kind in (0, 1):
        of_kind = contexts[30_000:] % 2 == kind
        assert abs(rates[of_kind].mean() - hits[of_kind].mean()) < 0.02
    first = token_hints(tokens[[0, 1, 0, 1]], order=2, mode="learned")
    assert first.boost[2] == np.float32(math.log(3))  # one occurrence, nothing learned: rate 3/4


def test_rates_ignore_what_is_still_to_come():
    """Two streams that differ from t on in whether hints come true: equal boosts for targets up to t, then not."""
    tokens = np.tile(text_like(300), 4)
    other = tokens.copy()
    other[600::3] ^= 1
    one, two = (token_hints(stream, order=4, mode="learned") for stream in (tokens, other))
    assert_same_bits(ngram.Hints(*(a[:600] for a in one)), ngram.Hints(*(a[:600] for a in two)))
    both = np.flatnonzero(one.gate & two.gate)[-50:]
    assert one.boost[both].mean() > two.boost[both].mean() + 0.3


# --- The tilted distribution


def distribution(log_p, hint, boost, gate) -> torch.Tensor:
    """log p' of every token of the vocabulary as target; log_p: (..., vocabulary), the others (...)."""
    tokens = torch.arange(log_p.shape[-1])
    log_q = log_p.gather(-1, hint[..., None]).expand_as(log_p)
    return tilt(log_p, log_q, tokens == hint[..., None], boost[..., None], gate[..., None])


@fuzz
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 17, 1000]), st.floats(0.1, 40), st.floats(0, 12),
       st.sampled_from([torch.float32, torch.float64]))
def test_tilted_distribution_sums_to_one(seed, vocabulary, spread, size, dtype):
    draw = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(8, vocabulary, generator=draw) * spread).clamp(-30, 30).to(dtype).log_softmax(-1)
    hint = torch.where(torch.arange(8) < 4, log_p.argmax(-1), torch.randint(vocabulary, (8,), generator=draw))
    boost = torch.rand(8, generator=draw) * size
    gate = torch.rand(8, generator=draw) < 0.8
    tilted = distribution(log_p, hint, boost, gate).double().exp().sum(-1)
    untilted = log_p.double().exp().sum(-1)  # a float32 softmax sums to one only so well
    assert torch.all((tilted - 1).abs() < 1e-6 + 2 * (untilted - 1).abs())


def test_tilt_equals_its_definition():
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(2, 3)
    hint, gate = torch.tensor([1, 1]), torch.tensor([True, False])
    found = distribution(log_p, hint, torch.full((2,), 2.0, dtype=torch.float64), gate).exp()
    weights = [0.5, 0.3 * math.exp(2), 0.2]
    torch.testing.assert_close(found[0], torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64))
    assert torch.equal(found[1], log_p[1].exp())


def test_tilt_at_the_ends():
    """Hints with probability 0 and 1 in float32, and a logarithm that rounding has pushed above 0: all scores finite."""
    log_q = torch.tensor([-200.0, -80.0, -1e-7, 0.0, 3e-7])
    every = torch.ones(5, dtype=torch.bool)
    for hit in (every, ~every):
        log_p = log_q if hit.all() else torch.full((5,), -12.0)
        found = tilt(log_p, log_q, hit, torch.full((5,), 2.625), every)
        assert found.isfinite().all() and (found <= 1e-6).all()


def test_tilt_from_numpy_hints():
    hints = token_hints(text_like(2000), order=4)
    log_p = torch.full((1999,), -3.0)
    found = tilt(log_p, log_p, torch.ones(1999, dtype=torch.bool), *map(torch.from_numpy, (hints.boost, hints.gate)))
    assert torch.equal(found == -3.0, ~torch.from_numpy(hints.gate))


# --- Bad input


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(order=1), "order=1"), (dict(order=999), "order=999"), (dict(threshold=99), "threshold=99"),
    (dict(threshold=math.nan), "threshold=nan"), (dict(boost=-1), "boost=-1"), (dict(boost=math.inf), "boost=inf"),
    (dict(mode="free"), "mode=free"),
])
def test_bad_settings(arguments, words):
    with pytest.raises(NgramError, match=words) as caught:
        token_hints(np.zeros(3, np.uint16), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [[1, 2], np.zeros(4, np.int64), np.zeros((2, 2), np.uint16), np.uint16(3), None,
                                    np.zeros(4, ">u2")], ids=repr)
def test_bad_tokens(tokens):
    with pytest.raises(NgramError, match="one-dimensional uint16 array"):
        token_hints(tokens)


@pytest.mark.parametrize(("bounds", "words"), [
    (([0], [0, 1], [0, 1]), "1 first, 2 begin, 2 end"), (([0], [0], []), "1 first, 1 begin, 0 end"),
    (([0, -1], [0, 0], [5, 5]), "row 1, first=-1"), (([3], [2], [5]), "first=3, begin=2"), (([0], [5], [4]), "end=4"),
    (([0, 0], [0, 0], [9, 10]), "row 1, .* end=10: .*< 10, the length"), (([0], [2**62], [2**62]), "begin=46"),
    (([0.0], [0], [1]), "first must be .* int64 array, not float64"), (([0], [0], "end"), "end must be .*not <U3"),
    (([0], [[0]], [1]), "begin must be .*not int64 .1, 1"),
])
def test_bad_rows(bounds, words):
    arrays = [np.array(bound, None if len(bound) else np.int64) for bound in bounds]
    state = NgramState(2)
    with pytest.raises(NgramError, match=words) as caught:
        state.feed_rows(np.zeros(10, np.uint16), *arrays)
    assert "\n" not in str(caught.value)
    assert not state.feed(np.zeros(2, np.uint16)).gate[0]  # nothing was counted


@pytest.mark.parametrize("bound", [[1], 1, None, np.zeros(1, np.int32), np.zeros(1, ">i8"), np.int64(0)], ids=repr)
def test_bad_types_of_rows(bound):
    state, zero = NgramState(), np.zeros(1, np.int64)
    for arrays in ([bound, zero, zero], [zero, bound, zero], [zero, zero, bound]):
        with pytest.raises(NgramError, match="(first|begin|end) must be a one-dimensional int64 array"):
            state.feed_rows(np.zeros(3, np.uint16), *arrays)
    for stream in ([1, 2], np.zeros(4, np.int64), np.zeros((2, 2), np.uint16)):
        with pytest.raises(NgramError, match="stream must be a one-dimensional uint16 array"):
            state.feed_rows(stream, zero, zero, zero)


def test_rows_without_a_stream():
    with pytest.raises(NgramError, match="< 0, the length of the stream"):
        NgramState().feed_rows(np.zeros(0, np.uint16), *bounds_of([(0, 0, 0)]))


def test_strided_rows():
    tokens, rows = text_like(2000), interleaved([(0, 900), (901, 1999)], 2, [48])
    strided = NgramState(4).feed_rows(np.repeat(tokens, 2)[::2], *np.ascontiguousarray(rows).T)
    assert_same_bits(strided, feed_rows(tokens, rows, 4, 0.8, "fixed"))


def test_strided_tokens():
    tokens = text_like(2000)
    assert_same_bits(token_hints(np.repeat(tokens, 2)[::2], 4), token_hints(tokens, 4))


def test_closed_state():
    state = NgramState()
    state.close()
    state.close()
    with pytest.raises(NgramError, match="closed"):
        state.feed(np.zeros(1, np.uint16))
    with pytest.raises(NgramError, match="closed"):
        state.restart()
    with pytest.raises(NgramError, match="closed"):
        state.feed_rows(np.zeros(1, np.uint16), *bounds_of([(0, 0, 0)]))


@pytest.mark.parametrize(("limit", "words"), [("TOO_MANY_TOKENS", r"2\^31 tokens"), ("OUT_OF_MEMORY", "out of memory")])
def test_limits_of_the_state(mutant, limit, words):
    mutant(("if (n > MAX_TOKENS - s->length) return TOO_MANY_TOKENS;", f"if (n > 99) return {limit};"))
    with pytest.raises(NgramError, match=words):
        token_hints(np.zeros(100, np.uint16))
    with pytest.raises(NgramError, match=words):
        feed_rows(np.zeros(100, np.uint16), [(0, 0, 50)] * 2, 16, 0.8, "fixed")


def test_contexts_of_rows_count_against_the_limit(mutant):
    """A row of one target after a context of 3 tokens stores 4 of them, all rows of a call or none."""
    mutant(("#define MAX_TOKENS (INT64_C(1) << 31)", "#define MAX_TOKENS 40"))
    tokens, row = np.arange(9, dtype=np.uint16), (0, 5, 6)
    state = NgramState(4)
    assert len(state.feed_rows(tokens, *bounds_of([row] * 9)).ids) == 9
    assert len(state.feed_rows(tokens, *bounds_of([row])).ids) == 1
    with pytest.raises(NgramError, match=r"2\^31 tokens"):
        state.feed_rows(tokens, *bounds_of([row]))
    with pytest.raises(NgramError, match=r"2\^31 tokens"):
        NgramState(4).feed_rows(tokens, *bounds_of([row] * 11))


# --- The library


def test_source_compiles_without_a_warning(tmp_path):
    for compiler in filter(shutil.which, ("gcc", "clang")):
        strict = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")
        run = subprocess.run([compiler, *ngram.FLAGS, *strict, ngram.SOURCE, "-o", tmp_path / "x.so"], capture_output=True)
        assert run.returncode == 0, run.stderr.decode()


def test_compiled_once_per_content(mutant, tmp_path):
    cache = tmp_path / "a" / "b"
    ngram.load.cache_clear()
    ngram.load(cache=cache)
    [library] = cache.iterdir()
    written = library.stat().st_mtime_ns
    ngram.load.cache_clear()
    ngram.load(cache=cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    mutant(("#define AHEAD 64", "#define AHEAD 8"))
    ngram.load(cache=cache)
    assert len(list(cache.iterdir())) == 2


def test_several_processes_compile_at_once(root, tmp_path):
    code = ("import sys, pathlib, numpy as np; from online_ngram_tilt import token_hints; "
            "print(token_hints(np.zeros(99, np.uint16), cache=pathlib.Path(sys.argv[1])).gate.sum())")
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
            for _ in range(6)]
    assert [run.communicate(timeout=300)[0].strip() for run in runs] == ["83"] * 6
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def one_line(**arguments) -> str:
    ngram.load.cache_clear()
    with pytest.raises(NgramError) as caught:
        token_hints(np.zeros(3, np.uint16), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_compiler(monkeypatch, tmp_path):
    for compiler in ("/nowhere/cc", "false", "'"):
        assert "install gcc, or another compiler" in one_line(compiler=compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc" in one_line()


def test_compiler_may_have_arguments(tmp_path):
    assert len(token_hints(np.zeros(3, np.uint16), compiler="env cc -g", cache=tmp_path).ids) == 2


def test_failing_compiler_leaves_nothing_behind(mutant, tmp_path):
    mutant(("#include <stdint.h>", "#error not today"))
    assert "not today" in one_line(cache=tmp_path / "cache") and not list((tmp_path / "cache").iterdir())


def test_unusable_cache_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "make that folder writable" in one_line(cache=tmp_path / "file")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:3000], lambda data: bytes(len(data)),
                                    lambda data: data[:-1] + b"x"], ids=["empty", "cut", "zeros", "one byte"])
def test_a_damaged_library_is_made_again(tmp_path, damage):
    ngram.load.cache_clear()
    ngram.load(cache=tmp_path)
    [library] = tmp_path.iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is mapped into this process: another file has to take its place
    library.write_bytes(damage(whole))
    ngram.load.cache_clear()
    assert token_hints(np.zeros(99, np.uint16), cache=tmp_path).gate.sum() == 83
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


# --- Sanitizers

DRIVER = """
#include <stdio.h>
int main(int count, char **arguments) {
    if (count != 4) return 2;
    void *state = ngram_create(atoi(arguments[1]), (float)atof(arguments[2]));
    const size_t piece = (size_t)atoi(arguments[3]);
    for (size_t n;;) {  /* buffers of exactly the piece, so that a step beyond is seen */
        uint16_t *tokens = malloc(piece * 2);
        n = fread(tokens, 2, piece, stdin);
        uint16_t *fed = malloc(n * 2 + !n), *hints = malloc(n * 2 + !n);
        uint8_t *gates = malloc(n + !n);
        float *odds = malloc(n * 4 + !n);
        memcpy(fed, tokens, n * 2);
        if (ngram_feed(state, fed, (int64_t)n, hints, gates, odds)) return 3;
        for (size_t i = 0; i < n; i++) fwrite(&hints[i], 2, 1, stdout), fwrite(&odds[i], 4, 1, stdout);
        free(tokens), free(fed), free(hints), free(gates), free(odds);
        if (!n) break;
    }
    ngram_destroy(state);
    return 0;
}
"""


# Rows from the second file, `piece` a call; with piece 0 each is a restart and feeds of one token.
ROW_DRIVER = """
#include <stdio.h>
static void *copy(const void *from, size_t n, size_t size) {  /* of exactly this size */
    void *to = malloc(n * size + !n);
    return n ? memcpy(to, from, n * size) : to;
}
static size_t read(const char *path, void *to, size_t size, size_t most) {
    FILE *file = fopen(path, "rb");
    const size_t n = file ? fread(to, size, most, file) : 0;
    if (file) fclose(file);
    return n;
}
int main(int count, char **arguments) {
    enum { MOST = 1 << 18 };
    static uint16_t tokens[MOST];
    static int64_t rows[MOST][3];
    if (count != 6) return 2;
    const int width = atoi(arguments[1]) - 1;
    void *state = ngram_create(width + 1, (float)atof(arguments[2]));
    const int64_t piece = atoi(arguments[3]), n_rows = (int64_t)read(arguments[5], rows, sizeof *rows, MOST);
    if (!read(arguments[4], tokens, 2, MOST) || !n_rows) return 4;
    for (int64_t at = 0; at < n_rows;) {
        const int64_t take = !piece ? 1 : piece < n_rows - at ? piece : n_rows - at;
        int64_t *bounds[3], last = 0, n = 0;
        for (int k = 0; k < 3; k++) {
            bounds[k] = malloc((size_t)take * 8);
            for (int64_t r = 0; r < take; r++) bounds[k][r] = rows[at + r][k];
        }
        for (int64_t r = 0; r < take; r++) {
            n += bounds[2][r] - bounds[1][r];
            if (bounds[2][r] > last) last = bounds[2][r];
        }
        uint16_t *hints = malloc((size_t)n * 2 + !n), *stream = copy(tokens, (size_t)last + 1, 2);
        uint8_t *gates = malloc((size_t)n + !n);
        float *odds = malloc((size_t)n * 4 + !n);
        if (piece) {
            if (ngram_feed_rows(state, stream, take, bounds[0], bounds[1], bounds[2], hints, gates, odds)) return 3;
        } else {
            const int64_t first = *bounds[0], begin = *bounds[1];
            uint16_t hint;
            uint8_t gate;
            float odd;
            ngram_restart(state);
            for (int64_t t = begin - width + 1 > first ? begin - width + 1 : first; t <= last; t++) {
                uint16_t *token = copy(stream + t, 1, 2);
                if (ngram_feed(state, token, 1, &hint, &gate, &odd)) return 3;
                if (t >= begin && t < last) hints[t - begin] = hint, gates[t - begin] = gate, odds[t - begin] = odd;
                free(token);
            }
        }
        for (int64_t i = 0; i < n; i++) fwrite(&hints[i], 2, 1, stdout), fwrite(&odds[i], 4, 1, stdout);
        free(bounds[0]), free(bounds[1]), free(bounds[2]), free(stream), free(hints), free(gates), free(odds);
        at += take;
    }
    ngram_destroy(state);
    return 0;
}
"""


SHORT_OF_MEMORY = """
#define _DEFAULT_SOURCE
#include <stdlib.h>
static int left;
static void *failing_calloc(size_t count, size_t size) { return left-- > 0 ? calloc(count, size) : NULL; }
static void *failing_realloc(void *memory, size_t size) { return left-- > 0 ? realloc(memory, size) : NULL; }
#define calloc failing_calloc
#define realloc failing_realloc
""" + SOURCE + """
int main(void) {
    enum { N = 9000 };
    static uint16_t tokens[N], hints[N];
    static uint8_t gates[N];
    for (int i = 0; i < N; i++) tokens[i] = (uint16_t)(i * i % 677 / (1 + i / 3000));
    for (int rows = 0; rows < 2; rows++) {
        int problem = OUT_OF_MEMORY, allowed = 0;
        for (; problem && allowed < 100; allowed++) {
            left = allowed;
            void *state = ngram_create(2, 0);
            problem = state ? OK : OUT_OF_MEMORY;
            for (int64_t i = 0, end; i < N && !problem; i += 100) {
                end = i + 99;
                problem = rows ? ngram_feed_rows(state, tokens, 1, &i, &i, &end, hints, gates, NULL)
                               : ngram_feed(state, tokens + i, 100, hints, gates, NULL);
            }
            if (state) ngram_destroy(state);
        }
        if (problem || allowed <= 10) return 1;  /* so many allocations have each failed once */
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Compiles a C program with sanitizers and returns its path."""
    folder = tmp_path_factory.mktemp("sanitized")

    def build(name, program):
        flags = "-std=c11 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -x c -".split()
        run = subprocess.run(["cc", *flags, "-o", folder / name], input=program.encode(), capture_output=True)
        return folder / name if run.returncode == 0 else None

    empty = build("empty", "int main(void) { return 0; }")
    if not empty or subprocess.run([empty], capture_output=True).returncode:
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers that run here")
    return build


def test_running_out_of_memory_at_any_allocation(sanitized):
    run = subprocess.run([sanitized("short_of_memory", SHORT_OF_MEMORY)], capture_output=True)
    assert run.returncode == 0 and not run.stderr, run.stderr.decode()


def assert_clean_run(arguments, expected, **options):
    run = subprocess.run(arguments, capture_output=True, **options)
    assert run.returncode == 0 and not run.stderr, run.stderr.decode()
    found = np.frombuffer(run.stdout, np.dtype([("hint", np.uint16), ("odds", np.float32)]))
    np.testing.assert_array_equal(found["hint"], expected.ids)
    np.testing.assert_allclose(np.log(found["odds"], where=expected.gate, out=np.zeros(len(found), np.float32)),
                               expected.boost, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("order", "threshold", "piece"), [(16, 0.8, 1 << 20), (16, 0.8, 1000), (2, 0.0, 64), (5, 0.5, 1)])
def test_sanitizers_find_nothing(sanitized, order, threshold, piece):
    streams = text_like(20_000, seed=piece), np.zeros(3000, np.uint16), OVERTAKING, text_like(3000, vocabulary=5)
    tokens = np.concatenate(streams)
    arguments = [sanitized("driver", SOURCE + DRIVER), str(order), str(threshold), str(piece)]
    assert_clean_run(arguments, feed_all(tokens, order, threshold, "learned"), input=tokens.tobytes())


@pytest.mark.parametrize(("order", "threshold", "piece"), [(16, 0.8, 1 << 20), (16, 0.8, 1), (2, 0.0, 64), (5, 0.5, 0)])
def test_sanitizers_find_nothing_in_rows(sanitized, tmp_path, order, threshold, piece):
    tokens = np.concatenate([text_like(9000, seed=piece), np.zeros(900, np.uint16), text_like(3000, vocabulary=5)])
    documents = cut(tokens, np.sort(np.random.default_rng(0).choice(np.arange(1, len(tokens)), 60, False)).tolist())
    rows = interleaved(documents, 8, [48, 1, 15, 130])
    tokens.tofile(tmp_path / "tokens")
    np.array(rows, np.int64).tofile(tmp_path / "rows")
    arguments = [sanitized("row_driver", SOURCE + ROW_DRIVER), *map(str, (order, threshold, piece))]
    assert_clean_run([*arguments, tmp_path / "tokens", tmp_path / "rows"],
                     feed_rows(tokens, rows, order, threshold, "learned"))
