"""The n-gram state against a slow reference that keeps whole contexts, and the tilt against arithmetic.

Three properties make the hints usable for coding, and mutants that break them must fail the same checks: nothing at or after
a target changes its hint, the tilted distribution sums to one, and a decoder that feeds what it has decoded gets the same.
"""
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


def feed_pieces(tokens, cuts, order, threshold, mode) -> ngram.Hints:
    state = NgramState(order, threshold, mode=mode)
    pieces = [state.feed(piece) for piece in np.split(tokens, cuts)]
    return ngram.Hints(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def reference(tokens, order, threshold, mode, boost=2.625) -> ngram.Hints:
    """What feed_all returns, from dictionaries of tuples and the definitions."""
    pairs, totals, top = defaultdict(int), defaultdict(int), {}
    hits, misses = defaultdict(int), defaultdict(int)
    context, bucket, rows = None, None, []
    tokens = [int(token) for token in tokens]
    for t, token in enumerate(tokens):
        if context is not None:
            if context in top:
                (hits if token == top[context] else misses)[bucket] += 1
            totals[context] += 1
            pairs[context, token] += 1
            if context not in top or pairs[context, token] > pairs[context, top[context]]:
                top[context] = token
        if t + 1 >= order - 1:
            context = tuple(tokens[t + 2 - order:t + 1])
        if context not in top:
            rows.append((0, False, 0))
            continue
        total, best = totals[context], pairs[context, top[context]]
        count = total if total < 8 else 8 + math.frexp(total)[1] - 4  # frexp's exponent of 8 to 15 is 4
        bucket = count + (total >= 8), math.floor(Fraction(20 * best, total))
        if np.float32(best / total) < np.float32(threshold):
            rows.append((0, False, 0))
            continue
        prior = 8 * (best + 0.5) / (total + 1)
        odds = np.float32((hits[bucket] + prior) / (misses[bucket] + 8 - prior))
        rows.append((top[context], True, np.log(odds) if mode == "calibrated" else boost))
    ids, gate, boosts = zip(*rows) if rows else ((), (), ())
    return ngram.Hints(np.array(ids, np.uint16), np.array(gate, bool), np.array(boosts, np.float32))


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


orders = st.sampled_from([2, 3, 5, 16])
thresholds = st.sampled_from([0.0, 0.5, 2 / 3, 0.8, 0.95, 1.0])
modes = st.sampled_from(ngram.MODES)

# Top of a context: 1, then 2 level with it (1 stays), then 2 ahead, then 1 ahead again after it had left the top.
OVERTAKING = np.array([5, 1, 5, 2, 5, 2, 5, 1, 5, 1, 5, 3, 5, 3, 5, 3, 5, 3, 5, 1, 5, 1, 5], np.uint16)


# --- The state against the reference


@fuzz
@given(streams(), orders, thresholds, modes)
@example(OVERTAKING, 2, 0.0, "calibrated")
@example(np.zeros(500, np.uint16), 16, 0.8, "calibrated")
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
    expected = reference(tokens, 16, 0.8, "calibrated")
    assert expected.gate.sum() > 1000
    assert_equal(feed_all(tokens, 16, 0.8, "calibrated"), expected)


@pytest.mark.parametrize("bits", [0, 3, 11])
def test_colliding_hashes_change_nothing(mutant, bits):
    """All contexts share one hash, eight, or two thousand: only the comparison of contexts can tell them apart."""
    mutant(("(uint32_t)((mixed ^ mixed >> 29) * FACTOR >> 32)",
            f"(uint32_t)(((mixed ^ mixed >> 29) * FACTOR >> 32) & {(1 << bits) - 1}u)"))
    for tokens, order in ((text_like(3000), 16), (text_like(3000, vocabulary=20), 3)):
        assert_equal(feed_all(tokens, order, 0.8, "calibrated"), reference(tokens, order, 0.8, "calibrated"))


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


@fuzz
@given(streams(), st.data(), orders, thresholds, modes)
def test_the_future_changes_nothing(tokens, data, order, threshold, mode):
    check_causality(tokens, data.draw(st.integers(0, len(tokens))), order, threshold, mode)


@fuzz
@given(streams(), st.data(), orders, thresholds, modes)
def test_pieces_equal_the_whole(tokens, data, order, threshold, mode):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    assert_same_bits(feed_pieces(tokens, cuts, order, threshold, mode), feed_all(tokens, order, threshold, mode))


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
            check_causality(tokens, t, 4, 0.8, "calibrated")
    with pytest.raises(AssertionError):
        check_decoder(tokens, 4, 0.8, "calibrated")


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


def test_threshold_is_compared_in_float32():
    """A context followed by its hint in 4 of 5 cases passes 0.8, in 3 of 4 it does not."""
    tokens = np.array([5, 1, 5, 1, 5, 1, 5, 2, 5, 1, 5], np.uint16)
    gates = NgramState(2, 0.8).feed(tokens).gate[::2]
    assert gates.tolist() == [False, True, True, True, False, True]


# --- The calibrated boost


def test_calibrated_boost_follows_the_hit_rate():
    """500 contexts that go on with their own token in 60 or in 95 % of the cases: rates and hits agree in each kind."""
    draw = np.random.default_rng(0)
    contexts = draw.integers(2, 502, 60_000)
    kept = draw.random(60_000) < np.where(contexts % 2, 0.6, 0.95)
    tokens = np.ravel(np.column_stack([contexts, np.where(kept, 1000 + contexts, 2000)])).astype(np.uint16)
    hints = token_hints(tokens, order=2, threshold=0.0, mode="calibrated")
    rates = 1 / (1 + np.exp(-hints.boost[60_000::2]))
    hits = hints.ids[60_000::2] == tokens[60_001::2]
    for kind in (0, 1):
        of_kind = contexts[30_000:] % 2 == kind
        assert abs(rates[of_kind].mean() - hits[of_kind].mean()) < 0.02
    first = token_hints(tokens[[0, 1, 0, 1]], order=2, mode="calibrated")
    assert first.boost[2] == np.float32(math.log(3))  # one occurrence, nothing learned: rate 3/4


def test_calibrated_boost_ignores_what_is_still_to_come():
    """Two streams that differ from t on in whether hints come true: equal boosts for targets up to t, then not."""
    tokens = np.tile(text_like(300), 4)
    other = tokens.copy()
    other[600::3] ^= 1
    one, two = (token_hints(stream, order=4, mode="calibrated") for stream in (tokens, other))
    assert_same_bits(ngram.Hints(*(a[:600] for a in one)), ngram.Hints(*(a[:600] for a in two)))
    both = np.flatnonzero(one.gate & two.gate)[-50:]
    assert one.boost[both].mean() > two.boost[both].mean() + 0.3


# --- The tilted distribution


def distribution(log_p, hint, boost, gate, calibrated) -> torch.Tensor:
    """log p' of every token of the vocabulary as target; log_p: (..., vocabulary), the others (...)."""
    tokens = torch.arange(log_p.shape[-1])
    log_q = log_p.gather(-1, hint[..., None]).expand_as(log_p)
    return tilt(log_p, log_q, tokens == hint[..., None], boost[..., None], gate[..., None], calibrated)


@fuzz
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 17, 1000]), st.floats(0.1, 40), st.floats(0, 12), st.booleans(),
       st.sampled_from([torch.float32, torch.float64]))
def test_tilted_distribution_sums_to_one(seed, vocabulary, spread, size, calibrated, dtype):
    draw = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(8, vocabulary, generator=draw) * spread).clamp(-30, 30).to(dtype).log_softmax(-1)
    hint = torch.where(torch.arange(8) < 4, log_p.argmax(-1), torch.randint(vocabulary, (8,), generator=draw))
    boost = torch.rand(8, generator=draw) * size
    if calibrated:
        boost = boost - size / 2
    gate = torch.rand(8, generator=draw) < 0.8
    tilted = distribution(log_p, hint, boost, gate, calibrated).double().exp().sum(-1)
    untilted = log_p.double().exp().sum(-1)  # a float32 softmax sums to one only so well
    assert torch.all((tilted - 1).abs() < 1e-6 + 2 * (untilted - 1).abs())


def test_tilt_equals_its_definition():
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(2, 3)
    hint, gate = torch.tensor([1, 1]), torch.tensor([True, False])
    found = distribution(log_p, hint, torch.full((2,), 2.0, dtype=torch.float64), gate, False).exp()
    weights = [0.5, 0.3 * math.exp(2), 0.2]
    torch.testing.assert_close(found[0], torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64))
    assert torch.equal(found[1], log_p[1].exp())


def test_calibrated_tilt_gives_the_hint_its_rate():
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(2, 3)
    logit = torch.tensor([math.log(3), -3.0], dtype=torch.float64)  # rates 0.75 and 0.047
    found = distribution(log_p, torch.tensor([1, 1]), logit, torch.tensor([True, True]), True).exp()
    torch.testing.assert_close(found[0], torch.tensor([0.25 * 5 / 7, 0.75, 0.25 * 2 / 7], dtype=torch.float64))
    torch.testing.assert_close(found[1], log_p[1].exp())  # the model is surer than the rate: left alone


@pytest.mark.parametrize("calibrated", [False, True])
def test_tilt_at_the_ends(calibrated):
    """Hints with probability 0 and 1 in float32, and a logarithm that rounding has pushed above 0: all scores finite."""
    log_q = torch.tensor([-200.0, -80.0, -1e-7, 0.0, 3e-7])
    every = torch.ones(5, dtype=torch.bool)
    for hit in (every, ~every):
        log_p = log_q if hit.all() else torch.full((5,), -12.0)
        found = tilt(log_p, log_q, hit, torch.full((5,), 2.625), every, calibrated)
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
    mutant(("if (n < 1) return OK;", f"if (n > 99) return {limit};"))
    with pytest.raises(NgramError, match=words):
        token_hints(np.zeros(100, np.uint16))


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
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["83"] * 6
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def one_line(**arguments) -> str:
    ngram.load.cache_clear()
    with pytest.raises(NgramError) as caught:
        token_hints(np.zeros(3, np.uint16), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_compiler(monkeypatch, tmp_path):
    for compiler in ("/nowhere/cc", "false", "'"):
        assert "set CC to a compiler" in one_line(compiler=compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc" in one_line()


def test_compiler_may_have_arguments(tmp_path):
    assert len(token_hints(np.zeros(3, np.uint16), compiler="env cc -g", cache=tmp_path).ids) == 2


def test_failing_compiler_leaves_nothing_behind(mutant, tmp_path):
    mutant(("#include <stdint.h>", "#error not today"))
    assert "not today" in one_line(cache=tmp_path / "cache") and not list((tmp_path / "cache").iterdir())


def test_unusable_cache_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "XDG_CACHE_HOME" in one_line(cache=tmp_path / "file")
    ngram.load(cache=tmp_path / "good")
    [library] = (tmp_path / "good").iterdir()
    (tmp_path / library.name).write_bytes(library.read_bytes()[:100])
    assert library.name in one_line(cache=tmp_path)


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
    for (int allowed = 0; allowed < 100; allowed++) {
        left = allowed;
        void *state = ngram_create(2, 0);
        if (!state) continue;
        int problem = OK;
        for (int i = 0; i < N && !problem; i += 100) problem = ngram_feed(state, tokens + i, 100, hints, gates, NULL);
        ngram_destroy(state);
        if (!problem) return allowed < 10;  /* so many allocations have each failed once */
    }
    return 1;
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


@pytest.mark.parametrize(("order", "threshold", "piece"), [(16, 0.8, 1 << 20), (16, 0.8, 1000), (2, 0.0, 64), (5, 0.5, 1)])
def test_sanitizers_find_nothing(sanitized, order, threshold, piece):
    streams = text_like(20_000, seed=piece), np.zeros(3000, np.uint16), OVERTAKING, text_like(3000, vocabulary=5)
    tokens = np.concatenate(streams)
    arguments = [sanitized("driver", SOURCE + DRIVER), str(order), str(threshold), str(piece)]
    run = subprocess.run(arguments, input=tokens.tobytes(), capture_output=True)
    assert run.returncode == 0 and not run.stderr, run.stderr.decode()
    found = np.frombuffer(run.stdout, np.dtype([("hint", np.uint16), ("odds", np.float32)]))
    expected = feed_all(tokens, order, threshold, "calibrated")
    np.testing.assert_array_equal(found["hint"], expected.ids)
    np.testing.assert_allclose(np.log(found["odds"], where=expected.gate, out=np.zeros(len(tokens), np.float32)),
                               expected.boost, rtol=1e-6, atol=1e-7)
