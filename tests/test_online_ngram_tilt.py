"""The n-gram counts against slow references that keep whole contexts, and the tilt against arithmetic.

Three properties make the hints usable for coding, and mutants that break them must fail the same checks: nothing at or after
a target changes its hint, the tilted distribution sums to one, and a decoder that asks before it learns gets the same.
"""
import bisect
import itertools
import lzma
import math
import shutil
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import online_ngram_tilt as ngram
from online_ngram_tilt import Experts, LearnedBoost, NgramError, NgramState, distinct, tilt, token_hints

torch.set_num_threads(1)
SOURCE = ngram.SOURCE.read_text()
ORDERS, DOCUMENT_ORDERS = [16, 4, 3], [3, 2]
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


def feed_all(tokens, order, threshold) -> ngram.Hints:
    """Entries for the token after each token, fed at once."""
    return NgramState(order, threshold).feed(tokens)


def concatenated(pieces) -> ngram.Hints:
    return ngram.Hints(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def experts_of(rows, orders=ORDERS, document_orders=DOCUMENT_ORDERS, bits=14) -> Experts:
    return Experts(orders, document_orders, bits, 1 + max((row[0] for row in rows), default=0))


def ask(tokens, rows, cuts=(), **options) -> ngram.Hints:
    """Hints for the targets of rows (document, first, begin, end), in as many calls as the cuts make."""
    experts = experts_of(rows, **options)
    rows = np.array(rows, np.int64).reshape(-1, 4)
    return concatenated([experts.ask(tokens, some) for some in np.split(rows, cuts)])


def ask_as_decoder(tokens, rows, **options) -> ngram.Hints:
    """The same by a decoder: it asks for each hint with a stream that ends before the target, then learns the target.

    Its documents lie elsewhere in its stream, each after the tokens that come before it in the text.
    """
    experts, entries = experts_of(rows, **options), []
    for document, first, begin, end in rows:
        for t in range(begin, end):
            entries.append(experts.ask(tokens[first:t + 1].copy(), np.array([[document, 0, t - first, t - first + 1]]), learn=False))
            experts.ask(np.append(np.uint16(7), tokens[first:t + 2]), np.array([[document, 1, t - first + 1, t - first + 2]]))
    return concatenated([*entries, experts.ask(tokens, np.zeros((0, 4), np.int64))])


def feed_pieces(tokens, cuts, order, threshold) -> ngram.Hints:
    state = NgramState(order, threshold)
    return concatenated([state.feed(piece) for piece in np.split(tokens, cuts)])


def reference(tokens, order, threshold, boost=2.625) -> ngram.Hints:
    """What feed_all returns, from dictionaries of tuples and the definitions."""
    pairs, totals, top, ids, tokens = defaultdict(int), defaultdict(int), {}, [], tokens.tolist()
    for t in range(len(tokens)):
        context, token = tuple(tokens[max(t - order + 1, 0):t]), tokens[t]
        if len(context) == order - 1:
            totals[context] += 1
            pairs[context, token] += 1
            if context not in top or pairs[context, token] > pairs[context, top[context]]:
                top[context] = token
        context = tuple(tokens[max(t - order + 2, 0):t + 1])
        total, best = totals[context], pairs[context, top.get(context)]
        ids.append(top[context] if total and np.float32(best / total) >= np.float32(threshold) else -1)
    ids = np.array(ids, np.int64).reshape(-1, 1)
    return ngram.Hints(np.where(ids < 0, 0, ids).astype(np.uint16), ids >= 0, np.float32(boost) * (ids >= 0))


class ReferenceExperts:
    """Experts by their definition, with whole contexts in dictionaries that forget nothing."""

    def __init__(self, orders, document_orders):
        self.kinds = [(order - 1, False) for order in orders] + [(order - 1, True) for order in document_orders]
        self.entries, self.runs = {}, defaultdict(int)
        self.rates = defaultdict(lambda: [0, 0])  # misses, hits

    def ask(self, tokens, document, first, t) -> list[tuple]:
        """(hint, whether there is one, logit of its rate) of each expert for tokens[t + 1], which is then learned."""
        result = []
        for expert, (width, in_document) in enumerate(self.kinds):
            result.append((0, False, 0.0))
            if t - first + 1 < width:
                continue
            key = expert, document if in_document else -1, tuple(tokens[t + 1 - width:t + 1])
            target, run = tokens[t + 1], (expert, document)
            if key not in self.entries:
                self.entries[key], self.runs[run] = (target, 1, 1), 0
                continue
            hint, confidence, occurrences = self.entries[key]
            levels = [bisect.bisect(firsts, x) for firsts, x in (((1, 2, 4, 8, 16, 32, 64, 255), self.runs[run]),
                                                                 ((1, 2, 3, 8), confidence), ((1, 2, 3, 8), occurrences))]
            misses, hits = rate = self.rates[expert, *levels]
            prior = 8 * (confidence + 0.5) / (occurrences + 1)
            result[-1] = hint, True, math.log((hits + prior) / (misses + 8 - prior))
            rate[hint == target] += 1
            confidence = min(confidence + 1, 255) if hint == target else confidence // 2
            self.runs[run] = min(self.runs[run] + 1, 255) if hint == target else 0
            self.entries[key] = hint if confidence else target, confidence or 1, min(occurrences + 1, 255)
        return result


def reference_experts(tokens, rows, orders=ORDERS, document_orders=DOCUMENT_ORDERS) -> ngram.Hints:
    """What `ask` returns as long as no bucket is full."""
    experts, tokens = ReferenceExperts(orders, document_orders), tokens.tolist()
    entries = [experts.ask(tokens, document, first, t) for document, first, begin, end in rows for t in range(begin, end)]
    table = np.array(entries, float).reshape(len(entries), len(experts.kinds), 3)
    return ngram.Hints(*(table[:, :, i].astype(dtype) for i, dtype in enumerate((np.uint16, bool, np.float32))))


def assert_equal(found: ngram.Hints, expected: ngram.Hints):
    """Same hints and gates, boosts as well as float32 can."""
    assert [array.dtype for array in found] == [np.uint16, bool, np.float32]
    np.testing.assert_array_equal(found.gate, expected.gate)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.boost, expected.boost, rtol=1e-6, atol=1e-6)


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


def interleaved(documents, slots, lengths) -> list[tuple[int, int, int, int]]:
    """Rows of so many slots that take turns: each goes through document after document, in rows of these lengths.

    documents: position of the first and of the last token of each. lengths are repeated; idle slots have empty rows.
    """
    waiting, rows, lengths = list(enumerate(documents))[::-1], [], itertools.cycle(lengths)
    slots = [(0, 0, 0, 0)] * slots
    while waiting or any(begin < last for *_, begin, last in slots):
        for slot, (document, first, begin, last) in enumerate(slots):
            if begin == last and waiting:
                document, (first, last) = waiting.pop()
                begin = first
            end = min(begin + next(lengths), last)
            rows.append((document, first, begin, end))
            slots[slot] = document, first, end, last
    return rows


def cut(tokens, cuts) -> list[tuple[int, int]]:
    """First and last position of the documents between the cuts."""
    cuts = [0, *cuts, len(tokens)]
    return [(a, b - 1) for a, b in itertools.pairwise(cuts)]


@st.composite
def schedules(draw) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """A stream and rows of its documents: slots that take turns, or any rows at all."""
    tokens = np.tile(draw(streams().filter(len)), draw(st.integers(1, 8)))  # long contexts come back
    if draw(st.booleans()):
        documents = cut(tokens, sorted(draw(st.sets(st.integers(1, len(tokens)), max_size=12)) - {len(tokens)}))
        lengths = draw(st.lists(st.integers(1, 9) | st.integers(1, 150), min_size=1, max_size=20))
        return tokens, interleaved(documents, draw(st.integers(1, 5)), lengths)
    row = st.lists(st.integers(0, len(tokens) - 1), min_size=3, max_size=3).map(sorted)
    return tokens, [(draw(st.integers(0, 9)), *bounds) for bounds in draw(st.lists(row, max_size=12))]


orders = st.sampled_from([2, 3, 5, 16])
thresholds = st.sampled_from([0.0, 0.5, 2 / 3, 0.8, 0.95, 1.0])
bits = st.sampled_from([2, 4, 14])

# Top of a context: 1, then 2 level with it (1 stays), then 2 ahead, then 1 ahead again after it had left the top.
OVERTAKING = np.array([5, 1, 5, 2, 5, 2, 5, 1, 5, 1, 5, 3, 5, 3, 5, 3, 5, 3, 5, 1, 5, 1, 5], np.uint16)


# --- The exact counts against the reference


@fuzz
@given(streams(), orders, thresholds)
@example(OVERTAKING, 2, 0.0)
@example(np.zeros(500, np.uint16), 16, 0.8)
@example(np.array([], np.uint16), 2, 0.8)
def test_equals_the_reference(tokens, order, threshold):
    assert_equal(feed_all(tokens, order, threshold), reference(tokens, order, threshold))


@pytest.mark.parametrize(("order", "threshold"), [(16, 0.8), (4, 0.8), (2, 0.1)])
def test_equals_the_reference_on_long_streams(order, threshold):
    """Tables grow many times; order 2 has contexts with hundreds of continuations."""
    tokens = text_like(60_000, vocabulary=3000)
    expected = reference(tokens, order, threshold)
    assert expected.gate.sum() > 1000
    assert_equal(feed_all(tokens, order, threshold), expected)
    assert_same_bits(feed_pieces(tokens, range(7, 60_000, 999), order, threshold), feed_all(tokens, order, threshold))


@pytest.mark.parametrize("bits", [0, 3, 11])
def test_colliding_hashes_change_nothing(mutant, bits):
    """All contexts share one hash, eight, or two thousand: only the comparison of contexts can tell them apart."""
    mutant(("(uint32_t)(mixed(s->hash) >> 32)", f"(uint32_t)(mixed(s->hash) >> 32 & {(1 << bits) - 1}u)"))
    for tokens, order in ((text_like(3000), 16), (text_like(3000, vocabulary=20), 3)):
        assert_equal(feed_all(tokens, order, 0.8), reference(tokens, order, 0.8))


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
        ngram_feed(s, tokens, N, hints, gates);
        printf("%f ", (double)probes / N);
        ngram_destroy(s);
    }
}"""
    folder = ngram.Path.home()
    run = subprocess.run(["cc", "-O1", "-x", "c", "-", "-o", folder / "probe"], input=program.encode(), check=False)
    assert run.returncode == 0
    probes = [float(value) for value in subprocess.run([folder / "probe"], capture_output=True, check=True).stdout.split()]
    assert max(probes) < 3, probes  # linear probing at half load: 1.5 used slots a lookup of a new context at the end


def test_entries_are_aligned_with_the_targets():
    """The second time 1 2 3 passes by, entry t names tokens[t + 1]; 0 0 0 0 before it comes from context 1 2."""
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4], np.uint16)
    ids, gate, boost = (array[:, 0] for array in token_hints(tokens, order=3))
    assert ids.tolist() == [0, 0, 0, 0, 0, 0, 3, 4]
    assert gate.tolist() == [False] * 6 + [True] * 2
    assert boost.tolist() == [0] * 6 + [2.625] * 2
    assert tokens[1:][gate].tolist() == ids[gate].tolist()


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_streams(length):
    hints = token_hints(np.zeros(length, np.uint16), order=2)
    assert [array.shape for array in hints] == [(max(length - 1, 0), 1)] * 3 and not hints.gate.any()


def test_context_is_full_before_anything_is_counted():
    """Contexts of 15 tokens: the first hint for a constant stream belongs to target 16, the first lesson to target 15."""
    assert token_hints(np.full(40, 3, np.uint16)).gate[:, 0].tolist() == [False] * 15 + [True] * 24


def test_threshold_is_compared_in_float32():
    """A context followed by its hint in 4 of 5 cases passes 0.8, in 3 of 4 it does not."""
    tokens = np.array([5, 1, 5, 1, 5, 1, 5, 2, 5, 1, 5], np.uint16)
    gates = NgramState(2, 0.8).feed(tokens).gate[::2, 0]
    assert gates.tolist() == [False, True, True, True, False, True]


@fuzz
@given(streams(), st.data(), orders, thresholds)
def test_the_future_changes_nothing(tokens, data, order, threshold):
    """Hint and gate of targets up to t (entries up to t - 1) do not depend on tokens[t:], nor on how the stream is cut."""
    t = data.draw(st.integers(0, len(tokens)))
    whole = feed_all(tokens, order, threshold)
    for change in (tokens[t:] ^ 1, tokens[:0]):
        other = feed_all(np.concatenate([tokens[:t], change]), order, threshold)
        assert_same_bits(first_of(whole, t), first_of(other, t))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    assert_same_bits(feed_pieces(tokens, cuts, order, threshold), whole)


# --- The experts against the reference


@fuzz
@given(schedules(), st.data())
@example((OVERTAKING, [(0, 0, 0, len(OVERTAKING) - 1)]), None)
@example((np.zeros(900, np.uint16), [(0, 0, 0, 899)]), None)
def test_experts_equal_the_reference(schedule, data):
    tokens, rows = schedule
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4))) if data else []
    assert_equal(ask(tokens, rows, cuts), reference_experts(tokens, rows))


@pytest.mark.parametrize("length", [7, 48, 400])
def test_experts_equal_the_reference_on_long_streams(length):
    """Most rows are longer than their context, or than what is prefetched."""
    tokens = text_like(20_000, vocabulary=300)
    documents = cut(tokens, np.cumsum(np.random.default_rng(0).zipf(1.4, 200).clip(1, 2000)).clip(0, 19_999).tolist())
    rows = interleaved([(a, b) for a, b in documents if a <= b], 16, [length])
    expected = reference_experts(tokens, rows)
    assert expected.gate.sum(0).min() > 1000
    found = ask(tokens, rows, bits=20)
    assert_equal(found, expected)
    assert_same_bits(ask(tokens, rows, range(16, len(rows), 16), bits=20), found)


def test_experts_equal_the_reference_on_a_corpus(corpus):
    with lzma.open(corpus / "shards" / "fineweb_val_000000.bin.xz") as shard:
        tokens = np.frombuffer(shard.read(1024 + 200_000)[1024:], np.uint16)
    rows = interleaved(cut(tokens, np.flatnonzero(tokens == 1)[1:].tolist()), 16, [48])
    assert_equal(ask(tokens, rows, bits=22), reference_experts(tokens, rows))


def test_a_full_table_forgets_and_stays_of_use():
    """A table with room for a tenth of the contexts hints less often and hardly worse."""
    tokens = text_like(20_000, vocabulary=300)
    rows = interleaved(cut(tokens, range(500, 20_000, 500)), 4, [48])
    targets = np.concatenate([tokens[begin + 1:end + 1] for _, _, begin, end in rows])[:, None]
    rates = []
    for bits in (12, 20):
        hints = ask(tokens, rows, bits=bits)
        rates.append(((hints.ids == targets) & hints.gate).sum() / hints.gate.sum())
    assert 0.8 * rates[1] < rates[0] < 1.25 * rates[1]
    assert ask(tokens, rows, bits=12).gate.sum() < 0.9 * hints.gate.sum()


EXPERT_MISTAKES = {
    "contexts reach before the document": ("begin - first < s->widest ? first : begin - s->widest + 1",
                                           "begin < s->widest ? 0 : begin - s->widest + 1"),
    "contexts lack a token": ("begin - s->widest + 1;", "begin - s->widest + 2;"),
    "the last token does not leave the hash": ("if (ahead - start >= x->width) hash", "if (ahead - start > x->width) hash"),
    "documents share their contexts": ("mixed(document + 1) : 0", "mixed(1) : 0 * document"),
    "a document's contexts are those of the text": ("mixed(document + 1) : 0", "0 * document : 0"),
    "runs do not end": ("*run + (*run < 255) : 0", "*run + (*run < 255) : *run"),
    "a new context keeps the run": ("        *run = 0;\n", ""),
    "confidence is not halved": ("confidence / 2;", "confidence - 1;"),
    "misses are not counted": ("    answer.rate->misses += !hit;\n", ""),
}


@pytest.mark.parametrize("name", EXPERT_MISTAKES)
def test_mistakes_of_experts_are_caught(mutant, name):
    tokens = text_like(4000, vocabulary=50)
    rows = interleaved(cut(tokens, range(9, 4000, 99)), 4, [20])
    expected = reference_experts(tokens, rows)
    assert_equal(ask(tokens, rows, bits=20), expected)
    mutant(EXPERT_MISTAKES[name])
    with pytest.raises(AssertionError):
        assert_equal(ask(tokens, rows, bits=20), expected)


def test_an_expert_by_hand():
    """Contexts of one token in two documents, one target at a time."""
    experts = Experts([2], [2], 10, 2)
    tokens = np.array([1, 5, 6, 5, 6, 5, 7, 5, 1, 5, 6], np.uint16)
    hints = experts.ask(tokens, np.array([[0, 0, 0, 7], [1, 8, 8, 10]]))
    assert hints.gate[:, 0].tolist() == [False, False, False, True, True, True, False, True, True]
    assert hints.gate[:, 1].tolist() == [False, False, False, True, True, True, False, False, False]
    # 5 was followed by 6, 6, then 7: 6 keeps half of its confidence, and 5 -> 6 holds in the second document
    assert hints.ids[hints.gate[:, 0], 0].tolist() == [6, 5, 6, 5, 6]
    assert hints.boost[3, 0] == np.float32(math.log(3))  # one occurrence, nothing learned: rate 3/4


def test_rates_follow_the_hits():
    """500 contexts that go on with their own token in 60 or in 95 % of the cases: hints come true as often as they say."""
    draw = np.random.default_rng(0)
    contexts = draw.integers(2, 502, 60_000)
    kept = draw.random(60_000) < np.where(contexts % 2, 0.6, 0.95)
    tokens = np.ravel(np.column_stack([contexts, np.where(kept, 1000 + contexts, 2000)])).astype(np.uint16)
    hints = ask(tokens, [(0, 0, 0, len(tokens) - 1)], orders=[2], document_orders=[], bits=16)
    rates = 1 / (1 + np.exp(-hints.boost[60_000:, 0]))
    hits = hints.ids[60_000:, 0] == tokens[60_001:]
    groups = np.digitize(rates, [0.1, 0.3, 0.7])
    assert np.bincount(groups).min() > 500
    for group in range(4):
        assert abs(rates[groups == group].mean() - hits[groups == group].mean()) < 0.03


# --- Causality of the experts


def first_of(hints: ngram.Hints, n: int) -> ngram.Hints:
    return ngram.Hints(*(array[:n] for array in hints))


def check_causality(tokens, rows, r, t, **options):
    """Entries up to that of target t in row r do not depend on the target, nor on any token but those that came before.

    Those are the targets of the rows before and what precedes them in their documents, and in row r the tokens up to t.
    """
    whole = ask(tokens, rows, **options)
    known = np.zeros(len(tokens), bool)
    for _, first, _, end in [*rows[:r], (*rows[r][:3], t)]:
        known[first:end + 1] = True
    n = sum(end - begin for *_, begin, end in rows[:r]) + t + 1 - rows[r][2]
    for change in (65535, np.random.default_rng(t).permutation(tokens), tokens ^ 1):
        other = ask(np.where(known, tokens, change).astype(np.uint16), rows, **options)
        assert_same_bits(first_of(whole, n), first_of(other, n))


@fuzz
@given(schedules(), st.data(), bits)
def test_the_future_changes_nothing_in_rows(schedule, data, bits):
    tokens, rows = schedule
    targets = [(r, t) for r, (*_, begin, end) in enumerate(rows) for t in range(begin, end)]
    if targets:
        check_causality(tokens, rows, *data.draw(st.sampled_from(targets)), bits=bits)


@fuzz
@given(schedules(), bits)
def test_rows_equal_a_decoder(schedule, bits):
    tokens, rows = schedule
    assert_same_bits(ask(tokens, rows, bits=bits), ask_as_decoder(tokens, rows, bits=bits))


ASKED = "answers[e] = ask(s, &s->experts[e], place[e], &runs[e], &hints[e], &odds[e]);"
LEARNED = "learn_token(place[e], answers[e], &runs[e], hints[e], stream[t + 1]);"
PEEKING = {
    "hints are given only where they are right": (LEARNED, f"{{ {LEARNED} if (hints[e] != stream[t + 1]) odds[e] = 0; }}"),
    "hints include the target": (LEARNED, f"{{ {LEARNED} hints[e] = stream[t + 1]; }}"),
    "odds include the outcome": (ASKED, f"{{ {ASKED} if (learns && hints[e] == stream[t + 1]) odds[e] *= 2; }}"),
}


@pytest.mark.parametrize("name", PEEKING)
def test_peeking_experts_are_caught(mutant, name):
    mutant(PEEKING[name])
    tokens = text_like(2000, vocabulary=50)
    rows = interleaved(cut(tokens, [900, 1200]), 2, [48])
    with pytest.raises(AssertionError):
        for r, (*_, begin, end) in enumerate(rows):
            for t in range(begin, end, 5):
                check_causality(tokens, rows, r, t)
    with pytest.raises(AssertionError):
        assert_same_bits(ask(tokens, rows), ask_as_decoder(tokens, rows))


def test_learning_between_experts_is_caught(mutant):
    """What one expert learns may take the place of what the next is about to be asked for."""
    mutant((ASKED, f"{{ {ASKED} if (learns) {LEARNED} answers[e].entry = NULL; }}"))
    tokens = text_like(2000, vocabulary=50)
    rows = interleaved(cut(tokens, [900, 1200]), 2, [48])
    with pytest.raises(AssertionError):
        assert_same_bits(ask(tokens, rows, bits=6), ask_as_decoder(tokens, rows, bits=6))


def test_asking_without_learning_changes_nothing():
    tokens = text_like(2000, vocabulary=50)
    rows = np.array(interleaved(cut(tokens, [900, 1200]), 2, [48]))
    one, other = experts_of(rows), experts_of(rows)
    for some in np.split(rows, range(3, len(rows), 3)):
        other.ask(tokens, some, learn=False)
        assert_same_bits(one.ask(tokens, some), other.ask(tokens, some))


def test_no_rows_and_empty_rows():
    for rows in ([], [(0, 0, 0, 0)], [(0, 0, 0, 0), (3, 1, 2, 2)]):
        assert [array.shape for array in ask(np.zeros(3, np.uint16), rows)] == [(0, 5)] * 3


# --- The tilted distribution


def distribution(log_p, hints, boost, gate) -> torch.Tensor:
    """log p' of every token of the vocabulary as target; log_p: (n, vocabulary), the others (n, hints)."""
    n, vocabulary = log_p.shape
    _, gate = distinct(hints, gate)
    targets = torch.arange(vocabulary).repeat(n)
    log_q, hints, boost, gate = (x.repeat_interleave(vocabulary, 0) for x in (log_p.gather(1, hints), hints, boost, gate))
    return tilt(log_p.flatten(), log_q, targets[:, None] == hints, boost, gate).view(n, vocabulary)


@fuzz
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 17, 1000]), st.floats(0.1, 40), st.floats(0, 12),
       st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_tilted_distribution_sums_to_one(seed, vocabulary, spread, size, hints, dtype):
    """Also where several hints name one token, with a boost of the token for each."""
    draw = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(8, vocabulary, generator=draw) * spread).clamp(-30, 30).to(dtype).log_softmax(-1)
    hint = torch.randint(vocabulary, (8, hints), generator=draw)
    hint[:4] = log_p[:4].argmax(-1, keepdim=True)
    boost = torch.rand(8, hints, generator=draw) * size
    gate = torch.rand(8, hints, generator=draw) < 0.8
    tilted = distribution(log_p, hint, boost, gate).double().exp().sum(-1)
    untilted = log_p.double().exp().sum(-1)  # a float32 softmax sums to one only so well
    assert torch.all((tilted - 1).abs() < 1e-6 + 2 * (untilted - 1).abs())


def test_tilt_equals_its_definition():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    hints = torch.tensor([[1, 2, 1], [1, 2, 3], [1, 2, 3]])
    gate = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    boost = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64).expand(3, 3)
    found = distribution(p.log().expand(3, 4), hints, boost, gate).exp()
    for row, raised in enumerate(({1: 2.0, 2: 1.0}, {2: 1.0}, {})):
        weights = torch.tensor([q * math.exp(raised.get(token, 0.0)) for token, q in enumerate(p.tolist())])
        torch.testing.assert_close(found[row], (weights / weights.sum()).double())
    assert torch.equal(found[2], p.log().exp())


def test_distinct_tokens():
    ids, gate = torch.tensor([[7, 8, 7, 0, 7]]), torch.tensor([[True, True, True, False, True]])
    same, first = distinct(ids, gate)
    assert first.tolist() == [[True, True, False, False, False]]
    assert same[0].int().tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0] * 5, [1, 0, 1, 0, 1]]


def test_tilt_at_the_ends():
    """Hints with probability 0 and 1 in float32, and a logarithm that rounding has pushed above 0: all scores finite."""
    log_q = torch.tensor([-200.0, -80.0, -1e-7, 0.0, 3e-7])[:, None]
    every = torch.ones(5, 1, dtype=torch.bool)
    for hit in (every, ~every):
        log_p = log_q[:, 0] if hit.all() else torch.full((5,), -12.0)
        found = tilt(log_p, log_q, hit, torch.full((5, 1), 2.625), every)
        assert found.isfinite().all() and (found <= 1e-6).all()


def test_tilt_from_numpy_hints():
    hints = token_hints(text_like(2000), order=4)
    log_p = torch.full((1999,), -3.0)
    beta, gate = map(torch.from_numpy, (hints.boost, hints.gate))
    found = tilt(log_p, log_p[:, None], torch.ones(1999, 1, dtype=torch.bool), beta, gate)
    assert torch.equal(found == -3.0, ~gate[:, 0])


# --- The learned boost


def random_hints(n=400, experts=4, vocabulary=6, seed=0) -> tuple:
    """log p, targets, and of each hint: its token, gate, logit(s)."""
    draw = torch.Generator().manual_seed(seed)
    log_p = torch.randn(n, vocabulary, generator=draw, dtype=torch.float64).log_softmax(1)
    ids = torch.randint(vocabulary, (n, experts), generator=draw)
    gate = torch.rand(n, experts, generator=draw) < 0.7
    logit_s = torch.randn(n, experts, generator=draw).double() * gate
    targets = torch.where(torch.rand(n, generator=draw) < 0.5, ids[:, 0], torch.randint(vocabulary, (n,), generator=draw))
    return log_p, targets, ids, gate, logit_s


def loss_by_definition(weights, log_p, targets, ids, gate, logit_s) -> torch.Tensor:
    """-log p' of each target in plain loops."""
    result = []
    for i in range(len(targets)):
        given = [e for e in range(ids.shape[1]) if gate[i, e]]
        b, *others = weights[given[0] if given else 0]
        c, d = others[:len(others) // 2], others[len(others) // 2:]
        scores = log_p[i].clone()
        for token in {int(ids[i, e]) for e in given}:
            logit = torch.logit(log_p[i, token].exp())
            odds = b * logit + sum(c[e] + d[e] * logit_s[i, e] for e in given if ids[i, e] == token)
            scores[token] = log_p[i, token] + (odds - logit).clamp(min=0)
        result.append(scores.logsumexp(0) - scores[targets[i]])
    return torch.stack(result)


def test_learned_boost_equals_its_definition():
    """Scores, and the first step: Newton's, on the loss of what was observed and a ridge, for each set of weights."""
    log_p, targets, ids, gate, logit_s = inputs = random_hints()
    learned = LearnedBoost(4, "cpu")
    learned.weights += 0.5 * torch.rand(4, 9, generator=torch.Generator().manual_seed(1)).double()
    learned.weights[:, 1:5] += 4  # every boost is above 0, so that the loss is smooth
    before = learned.weights.clone()
    same, first = distinct(ids, gate)
    log_q, hit = log_p.gather(1, ids), ids == targets[:, None]
    log_target = log_p.gather(1, targets[:, None])[:, 0]
    found = -tilt(log_target, log_q, hit, learned(log_q, logit_s, same), first)
    torch.testing.assert_close(found, loss_by_definition(before, *inputs))
    learned.observe(log_q[:150], logit_s[:150], same[:150], hit[:150], first[:150])
    learned.observe(log_q[150:], logit_s[150:], same[150:], hit[150:], first[150:])

    def loss(weights):
        return loss_by_definition(weights, *inputs).sum()

    gradient = torch.autograd.functional.jacobian(loss, before)
    torch.testing.assert_close(learned.seen[:, 0], gradient)
    hessian = torch.autograd.functional.hessian(loss, before)[range(4), :, range(4)]
    x, _ = learned.features(log_q, logit_s, same)
    for i, k in first.nonzero().tolist():  # of each hinted token, as if it were sure, a ten-thousandth
        hessian[gate[i].int().argmax()] += 1e-4 * torch.outer(x[i, k], x[i, k])
    torch.testing.assert_close(learned.seen[:, 1:], hessian)
    curvature = learned.curvature + learned.seen[:, 1:]
    move = torch.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
    learned.step()
    largest = move.abs().amax(1, keepdim=True)
    torch.testing.assert_close(before - learned.weights, move * (0.25 / largest).clamp(max=1))


def test_learned_boost_finds_what_hints_are_worth():
    """It starts as no tilt at all; with hints that come true in half of the cases it gains, with random ones it does not lose."""
    for seed, worth in ((0, True), (1, False)):
        log_p, targets, ids, gate, logit_s = random_hints(20_000, seed=seed)
        if not worth:
            targets = torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(2))[:, 0]
        learned, gains = LearnedBoost(4, "cpu"), []
        for some in torch.arange(20_000).split(500):
            same, first = distinct(ids[some], gate[some])
            log_q, hit = log_p[some].gather(1, ids[some]), ids[some] == targets[some, None]
            gains.append(tilt(torch.zeros(500).double(), log_q, hit, learned(log_q, logit_s[some], same), first).mean())
            learned.observe(log_q, logit_s[some], same, hit, first)
            learned.step()
        assert gains[0] == 0
        assert sum(gains[20:]) / 20 > 0.15 if worth else abs(sum(gains[20:]) / 20) < 0.002


# --- Bad input


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(order=1), "order=1"), (dict(order=999), "order=999"), (dict(threshold=99), "threshold=99"),
    (dict(threshold=math.nan), "threshold=nan"), (dict(boost=-1), "boost=-1"), (dict(boost=math.inf), "boost=inf"),
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


@pytest.mark.parametrize(("arguments", "words"), [
    (([1], [], 9, 1), "orders .1."), (([], [], 9, 1), "orders .."), (([2] * 9, [2] * 8, 9, 1), "1 to 16"),
    (([2], [257], 9, 1), "from 2 to 256"), (([2], [], 1, 1), "table_bits=1"), (([2], [], 33, 1), "table_bits=33"),
])
def test_bad_experts(arguments, words):
    with pytest.raises(NgramError, match=words) as caught:
        Experts(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "words"), [
    ((0, -1, 0, 5), r"row 1, \[0, -1, 0, 5\]"), ((0, 3, 2, 5), "<= begin"), ((0, 0, 5, 4), "<= end"),
    ((0, 0, 9, 10), "< 10, the length"), ((0, 0, 2**62, 2**62), "< 10, the length"), ((5, 0, 0, 1), "below 5"),
    ((-1, 0, 0, 1), "below 5"),
])
def test_bad_rows(row, words):
    experts = Experts([2], [], 10, 5)
    with pytest.raises(NgramError, match=words) as caught:
        experts.ask(np.zeros(10, np.uint16), np.array([(0, 0, 0, 3), row]))
    assert "\n" not in str(caught.value)
    assert not experts.ask(np.zeros(2, np.uint16), np.array([(0, 0, 0, 1)])).gate[0]  # nothing was learned


@pytest.mark.parametrize("rows", [np.zeros(4, np.int64), np.zeros((1, 3), np.int64), np.zeros((1, 4), np.int32)], ids=repr)
def test_bad_types_of_rows(rows):
    experts = Experts([2], [], 10, 5)
    with pytest.raises(NgramError, match="rows must be"):
        experts.ask(np.zeros(3, np.uint16), rows)
    for stream in ([1, 2], np.zeros(4, np.int64), np.zeros((2, 2), np.uint16)):
        with pytest.raises(NgramError, match="stream must be a one-dimensional uint16 array"):
            experts.ask(stream, np.zeros((1, 4), np.int64))


def test_strided_rows():
    tokens, rows = text_like(2000), np.array(interleaved([(0, 900), (901, 1999)], 2, [48]))
    strided = experts_of(rows).ask(np.repeat(tokens, 2)[::2], np.asfortranarray(np.repeat(rows, 2, 0)[::2]))
    assert_same_bits(strided, ask(tokens, rows))


def test_strided_tokens():
    tokens = text_like(2000)
    assert_same_bits(token_hints(np.repeat(tokens, 2)[::2], 4), token_hints(tokens, 4))


def test_closed_state():
    state = NgramState()
    state.close()
    state.close()
    with pytest.raises(NgramError, match="closed"):
        state.feed(np.zeros(1, np.uint16))


@pytest.mark.parametrize(("limit", "words"), [("TOO_MANY_TOKENS", r"2\^31 tokens"), ("OUT_OF_MEMORY", "out of memory")])
def test_limits_of_the_state(mutant, limit, words):
    mutant(("if (n > MAX_TOKENS - s->length) return TOO_MANY_TOKENS;", f"if (n > 99) return {limit};"))
    with pytest.raises(NgramError, match=words):
        token_hints(np.zeros(100, np.uint16))


def test_no_memory_for_experts(mutant):
    mutant(("    if (!s->tables[0] || !s->tables[1] || !s->runs) {", "    if (s->runs) {"))
    with pytest.raises(NgramError, match="out of memory for 131072 bytes"):
        Experts([2], [], 14, 5)


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
        memcpy(fed, tokens, n * 2);
        if (ngram_feed(state, fed, (int64_t)n, hints, gates)) return 3;
        for (size_t i = 0; i < n; i++) fwrite(&hints[i], 2, 1, stdout);
        free(tokens), free(fed), free(hints), free(gates);
        if (!n) break;
    }
    ngram_destroy(state);
    return 0;
}
"""


# Rows from the second file, `piece` a call, each with a stream and results of exactly the size they need.
ROW_DRIVER = """
#include <stdio.h>
static size_t read(const char *path, void *to, size_t size, size_t most) {
    FILE *file = fopen(path, "rb");
    const size_t n = file ? fread(to, size, most, file) : 0;
    if (file) fclose(file);
    return n;
}
int main(int count, char **arguments) {
    enum { MOST = 1 << 18 };
    static uint16_t tokens[MOST];
    static int64_t rows[MOST][4];
    if (count != 5) return 2;
    const int32_t widths[] = {15, 3, 2, 2, 1}, in_document[] = {0, 0, 0, 1, 1};
    const int64_t piece = atoi(arguments[1]), n_rows = (int64_t)read(arguments[4], rows, sizeof *rows, MOST);
    if (!read(arguments[3], tokens, 2, MOST) || !n_rows) return 4;
    void *state = experts_create(5, widths, in_document, atoi(arguments[2]), rows[n_rows - 1][0] + 1);
    for (int64_t at = 0; at < n_rows;) {
        const int64_t take = piece < n_rows - at ? piece : n_rows - at;
        int64_t *bounds[4], last = 0, n = 0;
        for (int k = 0; k < 4; k++) {
            bounds[k] = malloc((size_t)take * 8);
            for (int64_t r = 0; r < take; r++) bounds[k][r] = rows[at + r][k];
        }
        for (int64_t r = 0; r < take; r++) {
            n += bounds[3][r] - bounds[2][r];
            if (bounds[3][r] > last) last = bounds[3][r];
        }
        uint16_t *hints = malloc((size_t)n * 10 + !n), *stream = malloc(((size_t)last + 1) * 2);
        float *odds = malloc((size_t)n * 20 + !n);
        memcpy(stream, tokens, ((size_t)last + 1) * 2);
        experts_ask(state, stream, take, bounds[0], bounds[1], bounds[2], bounds[3], 1, hints, odds);
        for (int64_t i = 0; i < 5 * n; i++) fwrite(&hints[i], 2, 1, stdout);
        for (int k = 0; k < 4; k++) free(bounds[k]);
        free(stream), free(hints), free(odds);
        at += take;
    }
    experts_destroy(state);
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
    const int32_t width = 1;
    int problem = OUT_OF_MEMORY, allowed = 0;
    for (; problem && allowed < 100; allowed++) {
        left = allowed;
        void *state = ngram_create(2, 0);
        problem = state ? OK : OUT_OF_MEMORY;
        for (int64_t i = 0; i < N && !problem; i += 100) problem = ngram_feed(state, tokens + i, 100, hints, gates);
        if (state) ngram_destroy(state);
    }
    if (problem || allowed <= 10) return 1;  /* so many allocations have each failed once */
    for (allowed = 0; allowed < 5; allowed++) {
        left = allowed;
        void *state = experts_create(1, &width, &width, 10, 9);
        if (!state != (allowed < 4)) return 2;
        if (state) experts_destroy(state);
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
    np.testing.assert_array_equal(np.frombuffer(run.stdout, np.uint16), expected.ids.ravel())


@pytest.mark.parametrize(("order", "threshold", "piece"), [(16, 0.8, 1 << 20), (16, 0.8, 1000), (2, 0.0, 64), (5, 0.5, 1)])
def test_sanitizers_find_nothing(sanitized, order, threshold, piece):
    streams = text_like(20_000, seed=piece), np.zeros(3000, np.uint16), OVERTAKING, text_like(3000, vocabulary=5)
    tokens = np.concatenate(streams)
    arguments = [sanitized("driver", SOURCE + DRIVER), str(order), str(threshold), str(piece)]
    assert_clean_run(arguments, feed_all(tokens, order, threshold), input=tokens.tobytes())


@pytest.mark.parametrize(("piece", "bits"), [(1 << 20, 14), (1, 14), (64, 2), (7, 6)])
def test_sanitizers_find_nothing_in_rows(sanitized, tmp_path, piece, bits):
    tokens = np.concatenate([text_like(9000, seed=piece), np.zeros(900, np.uint16), text_like(3000, vocabulary=5)])
    documents = cut(tokens, np.sort(np.random.default_rng(0).choice(np.arange(1, len(tokens)), 60, False)).tolist())
    rows = interleaved(documents, 8, [48, 1, 15, 130])
    rows.append((max(rows)[0], 0, 0, 0))  # the driver reads the number of documents there
    tokens.tofile(tmp_path / "tokens")
    np.array(rows, np.int64).tofile(tmp_path / "rows")
    arguments = [sanitized("row_driver", SOURCE + ROW_DRIVER), str(piece), str(bits)]
    assert_clean_run([*arguments, tmp_path / "tokens", tmp_path / "rows"], ask(tokens, rows, bits=bits))
