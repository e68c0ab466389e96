"""Score-first test-time training on a tiny model.

A decoder that reads the text back proves that the scores are code lengths. The other tests say where it would break,
and that adapters and weights learn what a plain loop learns.
"""
import contextlib
import io
import itertools
import math
import re
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import online_ngram_tilt as ngram
import train_gpt as g
from tests.synthetic import (BOS, ROOT, bytes_of, changed, environment, events, launch, record, runtime, tiny,
                             write_corpus, write_data)
from tests.test_online_ngram_tilt import ReferenceExperts
from tools import decode

torch.set_num_threads(1)
VOCAB = 64
TTT = dict(TTT_ENABLED=1, TTT_BATCH_SIZE=1, TTT_CHUNK_SIZE=8, TTT_CHUNK_GROWTH=0, TTT_EVAL_SEQ_LEN=32, TTT_LORA_RANK=2,
           TTT_LORA_ALPHA=4, TTT_LORA_LR=0.01, TTT_WEIGHT_DECAY=0.1, TTT_K_LORA=1,
           PHASED_TTT_PREFIX_DOCS=6, GLOBAL_TTT_CHUNK_TOKENS=128, GLOBAL_TTT_LR=0.05, TOKEN_ORDER=4)
LEARNED = dict(TOKEN_BACKOFF="3,2", DOCUMENT_ORDERS="3,2")
BOOSTS = dict(fixed=dict(NGRAM_BOOST="fixed", TTT_ORDER="length"), learned=LEARNED)
SMALL = TTT | dict(VOCAB_SIZE=VOCAB, NUM_LAYERS=3, MODEL_DIM=32, LOOP_END=1, XSA_LAST_N=3, PARALLEL_START_LAYER=2,
                   EVAL_SEQ_LEN=64)
FROZEN = dict(TTT_LORA_LR=0, PHASED_TTT_PREFIX_DOCS=0)
ONE_LAYER = dict(NUM_LAYERS=1, XSA_LAST_N=1, NUM_LOOPS=0, PARALLEL_START_LAYER=0, SMEAR_GATE_ENABLED=0)
contexts = pytest.mark.parametrize("context", ["cache", "recompute"])
orders = pytest.mark.parametrize("order", ["stream", "length"])
ADAPTERS = [name for sites in g.ADAPTER_SITES.values() for name in sites]
boosts = pytest.mark.parametrize("boost", BOOSTS)


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """The n-gram library is compiled into a temporary folder, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def small(**changes) -> g.Settings:
    boost = {} if changes.get("NGRAM_BOOST") == "fixed" else LEARNED
    return tiny(**SMALL | boost | changes)


class Stream:
    """Stands for ValidationData."""

    def __init__(self, tokens):
        self.tokens, self.bytes = tokens, bytes_of(tokens)


class Log:
    """Stands for RunLog."""

    def __init__(self):
        self.events = []

    def event(self, _, **figures):
        self.events.append(figures)


def text(count=14, seed=5, longest=60) -> list[np.ndarray]:
    """Documents, BOS included, of phrases that all of them share and one of their own, and of noise."""
    shared, draw = np.random.default_rng(98).integers(2, VOCAB, (10, 5)), np.random.default_rng(seed)
    result = []
    for length in draw.integers(1, longest, count):
        own, tokens = draw.integers(2, VOCAB, 5), [BOS]
        while len(tokens) <= length:
            kind = draw.random()
            phrase = own if kind < 0.4 else shared[draw.integers(10)] if kind < 0.9 else draw.integers(2, VOCAB, 2)
            tokens.extend(phrase.tolist())
        result.append(np.array(tokens[:length + 1], np.uint16))
    return result


def stream(*arguments, **options) -> np.ndarray:
    return np.concatenate(text(*arguments, **options))


def model_of(s: g.Settings) -> g.GPT:
    """A model whose every part works: no weight stays at zero."""
    model, draw = g.GPT(s), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def text_of(s: g.Settings, tokens=None, kind=g.Text) -> g.Text:
    return kind(Stream(stream() if tokens is None else tokens), s, runtime())


def learner_of(s: g.Settings, text: g.Text, kind=g.Learner, model=None) -> g.Learner:
    return kind(model or model_of(s), s.num_loops > 0, text.own_slots, s, runtime())


def parts_of(s: g.Settings, tokens=None) -> tuple[g.Text, g.Learner]:
    text = text_of(s, tokens)
    return text, learner_of(s, text)


def run_of(s: g.Settings, tokens=None, text=g.Text, learner=g.Learner, score=g.Score, model=None,
           watch=lambda *_: None) -> SimpleNamespace:
    """Test-time training with these classes in the place of the script's, its parts and what it computed.

    at: positions of the targets of each pass; order: all of them; nll, untilted: theirs, (n,). `watch` is called with the
    positions and scores of each pass when it is scored.
    """
    run = SimpleNamespace(model=model or model_of(s), tokens=stream() if tokens is None else tokens, log=Log(), at=[],
                          passes=[])

    class Recorder(score):
        def add(self, rows, tilted, plain):
            watch(rows.stream_positions, tilted, plain)
            run.at.append(rows.stream_positions)
            run.passes.append((tilted, plain))
            super().add(rows, tilted, plain)

    def kept(name, kind):
        def make(*arguments):
            part = kind(*arguments)
            setattr(run, name, part)
            return part
        return make

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "Text", kept("text", text))
        patch.setattr(g, "Learner", kept("learner", learner))
        patch.setattr(g, "Score", Recorder)
        run.result = g.test_time_training(run.model, Stream(run.tokens), s.num_loops > 0, s, runtime(), run.log)
    run.order = np.concatenate(run.at)
    run.nll, run.untilted = map(torch.cat, zip(*run.passes))
    if isinstance(run.learner, Open):
        run.table = torch.cat(run.learner.tables)
    return run


def adapt(s: g.Settings, tokens=None, **parts) -> np.ndarray:
    """NLL of every target, (len(tokens) - 1, 2) float32: tilted, not."""
    run = run_of(s, tokens, **parts)
    result = np.full((len(run.tokens) - 1, 2), np.nan, np.float32)
    result[run.order] = torch.stack((run.nll, run.untilted), 1).numpy()
    assert not np.isnan(result).any()
    return result


class Open(decode.OpenLearner):
    """Keeps the whole distribution of each score, `tables`: (n, vocab) for each pass."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tables = []

    def score(self, rows):
        tilted, plain = super().score(rows)
        table = torch.stack([self.distribution(rows, at) for at in rows.visible.tolist()])
        torch.testing.assert_close(-table[range(len(tilted)), rows.targets[rows.visible]], tilted, rtol=0, atol=1e-6)
        self.tables.append(table)
        return tilted, plain


# --- Mutants: each breaks what a test below must notice


class UpdatesFirst(Open):
    """Trains on the chunk that it is about to score."""

    def score(self, rows):
        super(Open, self).score(rows)
        super().train(rows)
        return super().score(rows)


class HintsInTextOrder(g.Text):
    """Counts hints as the published systems do: in the order of the text, far ahead of what has been scored."""

    def count_hints(self, step):
        if not self.hinted:
            documents = np.arange(len(self.starts))
            self.all = self.counter.ask(self.tokens, np.stack((documents, self.starts, self.starts,
                                                               self.starts + self.lengths), 1))
        self.hints, self.first_hint, self.hinted = self.all, self.rows(step)[:, 2], 1


class LearnsFirst(g.Text):
    """Learns a step's targets before it asks for their hints."""

    def count_hints(self, step):
        self.counter.ask(self.tokens, self.rows(step))
        super().count_hints(step)


class PhaseTooEarly(g.Text):
    """Trains all weights on documents that are still under way or have not begun."""

    def phases_due(self, step):
        for _ in super().phases_due(step):
            yield np.arange(len(self.lengths))


class ChunksByLength(g.Text):
    """Cuts a document's last chunk where the document ends, so that the shape of the pass depends on it."""

    def pack(self, step):
        yield from super().pack(step._replace(end=np.minimum(step.end, self.lengths[step.document])))


MUTANTS = dict(updates_first=dict(learner=UpdatesFirst), hints_in_text_order=dict(text=HintsInTextOrder),
               learns_first=dict(text=LearnsFirst),
               phase_too_early=dict(text=PhaseTooEarly))


# --- The decoder


class BoundedDecoder(decode.Decoder):
    """Gives up where the text of a wrong decoder does not end."""

    left = 2000

    def next_token(self, rows, at):
        self.left -= 1
        if not self.left:
            raise ValueError("more targets than there are")
        return super().next_token(rows, at)


def coded(s: g.Settings, tokens: np.ndarray, text=g.Text, learner=Open) -> tuple[SimpleNamespace, tuple]:
    """The coder's run, and what a decoder gets."""
    class EncodingLearner(decode.Encoder, learner):
        pass

    run = run_of(s, tokens, text, EncodingLearner)
    run.words = run.learner.coder.get_compressed()
    header = decode.Header(len(run.text.starts), int(run.text.lengths[-1]))
    return run, (header, run.words, model_of(s), s.num_loops > 0, s)


CODED = dict(TTT_MICRO_BATCH_TOKENS=50, PHASED_TTT_PREFIX_DOCS=8, PHASED_TTT_NUM_PHASES=2)


@pytest.mark.parametrize("changes", [
    dict(TTT_CONTEXT="cache", TTT_CHUNK_GROWTH=0.5, TTT_CHUNK_MAX=16),
    dict(TTT_CONTEXT="recompute", TTT_WARM_START_A=0, NGRAM_TABLE_BITS=6),
    dict(TTT_CONTEXT="recompute", TTT_EVAL_SEQ_LEN=16, TOKEN_BACKOFF="", DOCUMENT_ORDERS="")
], ids=["cache", "recompute", "one expert"])
def test_a_decoder_reads_the_text_back(changes):
    """It has only the code words and a header, repeats every update, and ends with the same weights, bit for bit."""
    s, tokens = small(**CODED | changes), stream(10, 6, 40)
    encoder, given = coded(s, tokens)
    read, decoder = decode.decode(*given)
    np.testing.assert_array_equal(read.stream(), tokens)
    for name in ("value", "work", "square", "count"):
        assert torch.equal(*(getattr(learner.adapters, name) for learner in (encoder.learner, decoder))), name
    for (name, ours), theirs in zip(encoder.model.named_parameters(), decoder.model.parameters()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(encoder.learner.learned_boost.weights, decoder.learned_boost.weights)
    assert encoder.learner.adapters.count.sum() > 0 and not torch.equal(encoder.model.qo_bank, model_of(s).qo_bank)
    assert encoder.text.hinted > 20
    bits, reported = 32 * len(encoder.words), float(encoder.nll.double().sum()) / math.log(2)
    assert abs(bits - reported) < 0.01 * reported + 64
    assert bits < len(tokens) * math.log2(VOCAB)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_decoder_fails_on_what_looks_ahead(mutant, monkeypatch):
    monkeypatch.setattr(decode, "Decoder", BoundedDecoder)
    s, tokens = small(**CODED | dict(PHASED_TTT_PREFIX_DOCS=1, PHASED_TTT_NUM_PHASES=1)), stream(10, 6, 30)
    _, given = coded(s, tokens, **MUTANTS[mutant])
    try:
        read, _ = decode.decode(*given)
    except (AssertionError, ValueError):  # no such code word, or a text that does not end
        return
    assert not np.array_equal(read.stream(), tokens)


# --- C1: what a score may depend on


def continued(run, cut: int, draw) -> np.ndarray:
    """Another text that has the first `cut` targets, in the order of scoring, in common with the run's.

    Documents that are not complete by then go on in another way and end elsewhere.
    """
    starts, lengths, pieces = run.text.starts, run.text.lengths, []
    known = np.bincount(np.searchsorted(starts, run.order[:cut], "right") - 1, minlength=len(starts))
    for i, (a, length, kept) in enumerate(zip(starts, lengths, known)):
        final = i == len(starts) - 1
        new = draw.integers(2, VOCAB, draw.integers(final, 30)) if kept < length else []
        pieces += [run.tokens[a:a + min(kept + 1, length + final)], np.array(new, np.uint16)]
    return np.concatenate(pieces)


def agree(one, other, cut: int) -> bool:
    """Whether the first `cut` scores and distributions are the same, bit for bit, and the distribution after them."""
    return (np.array_equal(places(one)[:cut], places(other)[:cut]) and torch.equal(one.nll[:cut], other.nll[:cut])
            and torch.equal(one.table[:cut + 1], other.table[:cut + 1]))


def places(run) -> np.ndarray:
    document = np.searchsorted(run.text.starts, run.order, "right") - 1
    return np.stack((document, run.order - run.text.starts[document]), 1)


def depends_on_the_past_alone(s: g.Settings, cuts=(0, 1, 37, 130, 210, 300), text=g.Text, learner=Open) -> bool:
    run, draw = run_of(s, None, text, learner), np.random.default_rng(3)
    for cut in cuts:
        other = run_of(s, continued(run, cut, draw), text, learner)
        if not agree(run, other, cut):
            return False
        size = min(len(run.table), len(other.table))
        assert not torch.equal(run.table[:size], other.table[:size])
    return True


@contexts
def test_c1_scores_and_distributions_depend_on_what_is_scored_alone(context):
    s = small(TTT_CONTEXT=context, PHASED_TTT_NUM_PHASES=2, **BOOSTS["learned"])
    run = run_of(s)
    assert run.text.hinted > 50 and not torch.equal(run.model.qo_bank, model_of(s).qo_bank)
    assert depends_on_the_past_alone(s)


@contexts
@pytest.mark.parametrize("more", [1, 5, 30])
def test_c1_where_a_document_ends_changes_nothing_before(context, more):
    """A document turns out longer and nothing else changes: in stream order the schedule may not have looked ahead."""
    s = small(TTT_CONTEXT=context, PHASED_TTT_PREFIX_DOCS=3, **BOOSTS["learned"])
    run = run_of(s, learner=Open)
    longest = int(run.text.lengths[:8].argmax())
    end = run.text.starts[longest] + run.text.lengths[longest]
    other = run_of(s, np.insert(run.tokens, end, np.full(more, 5, np.uint16)), learner=Open)
    cut = run.order.tolist().index(end - 1)
    assert cut > 150 and agree(run, other, cut) and not torch.equal(run.nll[cut], other.nll[cut])


@pytest.mark.parametrize("mutant", [*MUTANTS, "length_order"])
def test_c1_fails_for_what_looks_ahead(mutant):
    s = small(PHASED_TTT_PREFIX_DOCS=1, TTT_ORDER="length" if mutant == "length_order" else "stream")
    assert not depends_on_the_past_alone(s, [130], **MUTANTS.get(mutant, {}))


@contexts
@pytest.mark.parametrize("kind", [g.Text, ChunksByLength])
def test_no_shape_follows_from_where_a_document_ends(context, kind):
    """All of a pass but the text is known before its step: it is the same for documents without end."""
    one, endless = (text_of(small(TTT_CONTEXT=context, TTT_MICRO_BATCH_TOKENS=60), kind=kind) for _ in range(2))
    endless.starts, endless.lengths = np.zeros_like(one.starts), np.full(len(one.starts), 1000)
    endless.tokens = np.full(2000, 5, np.uint16)

    def known(text, step):
        groups = list(text.pack(step))
        keys = [(rows.segments.keys_cu_seqlens, rows.key_places, rows.own_keys) * (context == "cache") for rows in groups]
        return [[x.tolist() for x in (rows.slots, rows.segments.positions, rows.segments.cu_seqlens, *seen, rows.scored,
                                      rows.chunk_ends, rows.chunk_ratio)]
                + [rows.segments.max_seqlen, rows.segments.keys_max_seqlen, rows.ids.shape, rows.segments.previous.shape,
                   rows.targets.shape] for rows, seen in zip(groups, keys)]

    same = [known(one, step) == known(endless, step) for step in g.ttt_schedule(one.lengths, one.settings)]
    assert all(same) == (kind is g.Text)


# --- C2 to C4: distributions, scores before updates, each target once


@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_c2_the_tilted_distribution_sums_to_one(scale):
    draw, n = torch.Generator().manual_seed(7), 200
    s = small()
    text = text_of(s)
    learner = learner_of(s, text, Open)
    learner.view.softcap_neg.fill_(17.0)
    scores = scale * torch.randn(n, VOCAB, generator=draw)
    hints, gate = torch.randint(VOCAB, (n, 3), generator=draw), torch.rand(n, 3, generator=draw) < 0.8
    hints[:50, 0] = scores[:50].argmax(1)
    hints[:90, 2] = hints[:90, 1]
    boost = 4 * torch.rand(n, 3, generator=draw)
    _, [rows] = next(text.packed_steps())
    rows = rows._replace(hints=hints, gate=gate, boost=boost)
    _, gate = ngram.distinct(hints, gate)
    learner.seen, learner.learned_boost = scores, None
    table = torch.stack([learner.distribution(rows, at) for at in range(n)])
    np.testing.assert_allclose(table.double().exp().sum(1), 1, atol=1e-6)
    rows = rows._replace(gate=torch.zeros_like(gate))
    plain = torch.stack([learner.distribution(rows, at) for at in range(n)])
    np.testing.assert_allclose(plain.double().exp().sum(1), 1, atol=1e-6)
    assert (table == plain)[~gate.any(1)].all()
    raised = (table - plain).gather(1, hints) - (table - plain).amin(1, keepdim=True)  # by beta, against what is not hinted
    if scale < 30:
        torch.testing.assert_close(raised[gate], boost[gate], rtol=0, atol=1e-4)


@boosts
def test_c2_every_distribution_of_a_run_sums_to_one(boost):
    run = run_of(small(**BOOSTS[boost]), learner=Open)
    np.testing.assert_allclose(run.table.double().exp().sum(1), 1, atol=1e-6)


@contexts
def test_c3_scores_come_before_the_update(context):
    """The first chunk of a document cannot know the learning rate."""
    s, tokens = small(TTT_CONTEXT=context, PHASED_TTT_PREFIX_DOCS=0, TTT_WARM_START_A=0), stream()
    starts = np.flatnonzero(tokens == BOS)
    at = np.arange(len(tokens) - 1)
    first = at - starts[np.searchsorted(starts, at, "right") - 1] < s.ttt_chunk_size
    mild, huge = (adapt(changed(s, ttt_lora_lr=lr), tokens)[:, 1] for lr in (0.01, 0.5))
    assert (mild == huge)[first].all() and (mild != huge)[~first].mean() > 0.9
    mild, huge = (adapt(changed(s, ttt_lora_lr=lr), tokens, learner=UpdatesFirst)[:, 1] for lr in (0.01, 0.5))
    assert (mild != huge)[first].mean() > 0.5


def test_c3_what_was_not_scored_cannot_be_trained_on():
    text, learner = parts_of(small())
    [first, second, *_] = [rows for _, groups in text.packed_steps() for rows in groups]
    for before in (None, first):
        if before:
            learner.score(before)
        with pytest.raises(AssertionError, match="C3"):
            learner.train(second)


@pytest.mark.parametrize("fault", ["drops", "repeats", "mistakes", "doubles"])
def test_c4_scoring_a_target_never_or_twice_is_an_error(fault):
    class Faulty(g.Score):
        passes, before = 0, None

        def add(self, rows, tilted, plain):
            at, times = rows.stream_positions, 1
            if self.passes == 2:
                if fault == "mistakes":  # one target for another that was scored before
                    at = np.concatenate((self.before[:1], at[1:]))
                if fault == "doubles":  # one target for another of the same pass
                    at = np.concatenate((at[1:2], at[1:]))
                times = dict(drops=0, repeats=2).get(fault, 1)
            for _ in range(times):
                super().add(rows._replace(stream_positions=at), tilted, plain)
            self.passes, self.before = self.passes + 1, at

    assert run_of(small(**FROZEN)).result["targets"] == len(stream()) - 1
    with pytest.raises(AssertionError, match="C4: .*were scored"):
        run_of(small(**FROZEN), score=Faulty)


def test_progress_is_the_score_so_far():
    run = run_of(small(**BOOSTS["learned"]))
    log = run.log
    seen = np.cumsum([len(at) for at in run.at])
    assert len(log.events) > 5 and log.events[-1]["share"] > 0.9
    for event in log.events:
        n = seen[np.abs(seen / seen[-1] - event["share"]).argmin()]
        bits = float(run.nll[:n].double().sum()) / math.log(2)
        assert event["val_bpb"] == pytest.approx(bits / bytes_of(run.tokens)[1:][run.order[:n]].sum(), rel=1e-5)
        assert event["eta_seconds"] >= 0


# --- The schedule


@orders
@pytest.mark.parametrize("count, batch, chunk, growth", [
    (1, 1, 16, 0), (40, 2, 16, 0.5), (100, 3, 7, 0), (30, 1, 1000, 0), (9, 4, 1, 1), (60, 1, 4, 0.3)])
def test_schedule_scores_every_target_once(order, count, batch, chunk, growth):
    """Documents start in their order, no slot idles while one waits, and a chunk's end follows from its begin alone."""
    lengths = np.random.default_rng(count).integers(1, 200, count)
    s = small(TTT_ORDER=order, TTT_BATCH_SIZE=batch, TTT_CHUNK_SIZE=chunk, TTT_CHUNK_GROWTH=growth, TTT_CHUNK_MAX=37,
              TTT_EVAL_SEQ_LEN=2048)
    at, slot_of, ends, started = np.zeros(count, int), {}, {}, []
    for step in g.ttt_schedule(lengths, s):
        for slot, (document, begin, end) in enumerate(zip(*(field.tolist() for field in step))):
            if document < 0:
                assert begin == end == 0
                continue
            assert begin == at[document] < lengths[document] and ends.setdefault(begin, end) == end
            assert slot_of.setdefault(document, slot) == slot
            started += [document] * (begin == 0)
            at[document] = min(end, lengths[document])
        assert len(started) == count or (step.document >= 0).all()
    assert (at == lengths).all()
    assert started == sorted(range(count), key=lambda i: (-lengths[i] if order == "length" else 0, i))
    for begin, end in ends.items():
        assert end - begin == max(chunk, min(begin * growth, 37) // chunk * chunk)
    assert (max(end - begin for begin, end in ends.items()) > chunk) == bool(growth)


def test_chunks_grow_far_into_a_document_alone():
    """The first 20,000 targets are cut as without TTT_FAR_GROWTH, with which later chunks follow from their begin too."""
    lengths = np.array([50_000, 19_000, 300])
    usual, far = (small(TTT_CHUNK_SIZE=48, TTT_CHUNK_GROWTH=0.03125, TTT_CHUNK_MAX=96, TTT_EVAL_SEQ_LEN=3072,
                        TTT_FAR_GROWTH=growth) for growth in (0, 0.125))
    steps = [[(step.begin[0], step.end[0]) for step in g.ttt_schedule(lengths, s)] for s in (usual, far)]
    same = sum(begin < 20_000 for begin, _ in steps[0])
    assert steps[0][:same] == steps[1][:same] and len(steps[1]) < 0.75 * len(steps[0])
    for begin, end in steps[1][same:]:
        grown = min((begin - 20_000) / 8, 3072 / 4)
        assert end == 0 or end - begin == max(96, grown // 48 * 48)


def test_a_single_slot_keeps_the_order_of_the_text():
    order = run_of(small(TTT_BATCH_SIZE=0, **FROZEN)).order
    assert np.array_equal(order, np.arange(len(stream()) - 1))


def test_schedule_learns_where_documents_end_after_their_steps():
    lengths, s = np.random.default_rng(0).integers(1, 60, 30), small()
    known, expected = np.full(30, 1 << 40), g.ttt_schedule(lengths, s)
    for step in g.ttt_schedule(known, s):
        for ours, theirs in zip(step, next(expected)):
            np.testing.assert_array_equal(ours, theirs)
        over = step.document[(step.document >= 0) & (step.end >= lengths[step.document])]
        known[over] = lengths[over]
    assert next(expected, None) is None


def test_in_length_order_chunks_may_follow_from_the_length():
    """Lengths count tokens with both BOS: one more than targets."""
    lengths = np.array([5, 9, 10, 29, 30, 50])
    s = small(TTT_ORDER="length", TTT_SHORT_SCORE_FIRST_ENABLED=1, TTT_SHORT_SCORE_FIRST_STEPS="30:4,10=2")
    seen = {}
    for step in g.ttt_schedule(lengths, s):
        for document, begin, end in zip(*step):
            if document >= 0:
                assert seen.setdefault(document, end - begin) == end - begin
    assert [seen[i] for i in range(6)] == [2, 2, 4, 4, 8, 8]
    for _, groups in text_of(s).packed_steps():  # no chunk is a grown one, whatever its size
        assert all((rows.chunk_ratio == 1).all() for rows in groups)


# --- What is scored


def plain_scores(model: g.GPT, tokens, s: g.Settings) -> np.ndarray:
    """One forward pass per chunk over its window, in a document on its own."""
    last = len(tokens) - 1
    starts = np.flatnonzero(tokens[:last] == BOS)
    result = np.zeros(last, np.float32)
    for a, b in zip(starts, [*starts[1:], last]):
        for begin in range(a, b, s.ttt_chunk_size):
            end = begin + s.ttt_chunk_size
            inside = min(end, b)
            first, end = max(a, (inside if s.ttt_order == "length" else end) - s.ttt_eval_seq_len), inside
            segments = g.make_segments(np.array([0, end - first], dtype=np.int32), end - first)
            ids, targets = (torch.from_numpy(tokens[first + k:end + k].astype(np.int64)) for k in (0, 1))
            with torch.no_grad():
                losses = model.token_losses(ids, targets, segments, s.num_loops > 0)
            result[begin:end] = losses[begin - first:].numpy()
    return result


@orders
@contexts
def test_without_learning_the_scores_are_those_of_a_plain_loop(context, order):
    s = small(TTT_CONTEXT=context, TTT_ORDER=order, TTT_EVAL_SEQ_LEN=64, **FROZEN)  # no document is longer
    scores = adapt(s)
    np.testing.assert_allclose(scores[:, 1], plain_scores(model_of(s), stream(), s), atol=1e-4)
    untilted = adapt(changed(s, ngram_tilt_enabled=False))
    np.testing.assert_array_equal(untilted[:, 0], untilted[:, 1])
    np.testing.assert_array_equal(untilted[:, 1], scores[:, 1])


@pytest.mark.parametrize("context, order, layers", [("recompute", "stream", {}), ("recompute", "length", {}),
                                                    ("cache", "stream", ONE_LAYER)])
def test_windows_slide_over_long_documents(context, order, layers):
    """A layer has no memory beyond its window, so that with a single one the cache agrees too.

    The last window ends where a whole chunk would, or in length order, as published, where the document does.
    """
    s = small(TTT_CONTEXT=context, TTT_ORDER=order, TTT_EVAL_SEQ_LEN=24, TTT_CHUNK_SIZE=9, **FROZEN, **layers)
    tokens = stream(4, 1, 150)
    scores = plain_scores(model_of(s), tokens, s)
    np.testing.assert_allclose(adapt(s, tokens)[:, 1], scores, atol=1e-4)
    assert np.abs(scores - plain_scores(model_of(s), tokens, changed(s, ttt_eval_seq_len=64))).max() > 0.01


@contexts
def test_the_split_into_passes_changes_nothing(context):
    s = small(TTT_CONTEXT=context)
    split = changed(s, ttt_micro_batch_tokens=20)
    for _, groups in text_of(split).packed_steps():  # as much to a pass as fits
        sizes = [rows.segments.cu_seqlens.diff().tolist() for rows in groups]
        assert all(sum(size) <= 20 or len(size) == 1 for size in sizes)
        assert all(sum(one) + other[0] > 20 for one, other in itertools.pairwise(sizes))
    assert sum(len(groups) for _, groups in text_of(split).packed_steps()) > 1.5 * len(list(text_of(s).packed_steps()))
    np.testing.assert_allclose(adapt(split), adapt(s), atol=1e-4)


def hints_of(text: g.Text) -> ngram.Hints:
    """The hints of all targets, (n, experts), as the passes over the text get them; none is asked for twice."""
    n = len(text.tokens) - 1
    found, seen = None, np.zeros(n, int)
    for _, groups in text.packed_steps():
        found = found or ngram.no_hints(n, text.hints.ids.shape[1])
        for rows in groups:
            np.add.at(seen, rows.stream_positions, 1)
            outside = np.ones(len(rows.targets), bool)
            outside[rows.visible] = False
            assert not rows.gate[outside].any()
            for array, mine in zip(found, (rows.hints, rows.gate, rows.boost)):
                array[rows.stream_positions] = mine[rows.visible].numpy()
    assert (seen == 1).all() and text.hinted == found.gate.any(1).sum()
    return found


@pytest.mark.parametrize("order", ["stream", "length"])
def test_hints_are_counted_in_the_order_of_scoring(order):
    s, tokens = small(TTT_ORDER=order), stream(30)
    starts = g.document_starts(tokens[:-1])
    lengths = np.diff(starts, append=len(tokens) - 1)
    experts, found = ReferenceExperts(*s.expert_orders), hints_of(text_of(s, tokens))
    for step in g.ttt_schedule(lengths, s):
        for document, begin, end in zip(*step):
            for t in starts[document] + np.arange(begin, min(end, lengths[document])):
                entry = list(zip(*experts.ask(tokens.tolist(), document, starts[document], t)))
                np.testing.assert_allclose([array[t] for array in found], entry, rtol=1e-5, atol=1e-6)
    assert found.gate.sum(0).min() > 50


def test_fixed_hints_are_those_of_the_text():
    """As in the published systems."""
    s, tokens = small(**BOOSTS["fixed"]), stream(30)
    expected = ngram.token_hints(tokens, s.token_order, s.token_threshold, s.token_boost)
    assert expected.gate.sum() > 100
    for ours, theirs in zip(hints_of(text_of(s, tokens)), expected):
        np.testing.assert_array_equal(ours, theirs)


@boosts
def test_the_tilt_moves_scores_within_its_bounds(boost):
    s, tokens = small(**FROZEN, **BOOSTS[boost]), stream(30)
    run, hints = run_of(s, tokens), hints_of(text_of(s, tokens))
    gained = np.zeros(len(tokens) - 1, np.float32)
    gained[run.order] = (run.untilted - run.nll).numpy()
    given, hit = hints.gate.any(1), (hints.gate & (hints.ids == tokens[1:, None])).any(1)
    assert (gained[~given] == 0).all() and (gained[hit] > 0.1).sum() > 100
    assert (gained[given & ~hit] <= 0).all() and (gained < -0.01).sum() > 10
    assert gained.mean() > 0.05
    if boost == "fixed":
        assert (gained[hit] >= 0).all() and gained.max() <= s.token_boost


def test_the_learned_boost_learns_from_what_was_scored_in_earlier_steps():
    """From the distributions of a run without tilt; nothing past the end of a document counts."""
    s = small(**FROZEN)
    run, hints = run_of(s, stream(30), learner=Open), hints_of(text_of(s, stream(30)))
    plain = run_of(small(NGRAM_TILT_ENABLED=0, **FROZEN), stream(30), learner=Open)
    learned = ngram.LearnedBoost(hints.ids.shape[1], "cpu")
    assert len(run.at) == len(list(g.ttt_schedule(run.text.lengths, s)))
    for at, tilted, table in zip(run.at, run.learner.tables, plain.learner.tables):
        ids, gate, logit_s = (torch.from_numpy(array[at]) for array in hints)
        ids = ids.long()
        same, first = ngram.distinct(ids, gate)
        log_q, target = table.gather(1, ids).double(), torch.from_numpy(run.tokens[at + 1].astype(np.int64))[:, None]
        expected = torch.stack([
            ngram.tilt(table[:, token].double(), log_q, ids == token, learned(log_q, logit_s, same), first)
            for token in range(VOCAB)], 1)
        torch.testing.assert_close(tilted.double(), expected, rtol=0, atol=1e-4)
        learned.observe(log_q, logit_s, same, ids == target, first)
        learned.step()
    torch.testing.assert_close(run.learner.learned_boost.weights, learned.weights, rtol=0, atol=1e-3)
    prior = ngram.LearnedBoost(hints.ids.shape[1], "cpu").weights
    assert ((learned.weights - prior).abs().amax(1)[:3] > 0.05).all()  # what a document knows, the text knows too


# --- Learning, against one document at a time with dense matrices and torch's optimizers


def optimizer_of(parameters: list, s: g.Settings) -> torch.optim.Optimizer:
    rate, decay = s.ttt_lora_lr * s.ttt_local_lr_mult, s.ttt_weight_decay
    return torch.optim.AdamW(parameters, rate, (0.0, s.ttt_beta2), 1e-10, decay)


class Dense(g.Hooks):
    """One document's adapters, parameters {site: (A, B)}, and with TTT_CONTEXT=cache its keys and values so far."""

    def __init__(self, model: g.GPT, pairs: dict, s: g.Settings):
        self.model, self.settings, self.known = model.view(trainable=False), s, {}
        self.pairs = {site: [torch.nn.Parameter(x.clone()) for x in pair] for site, pair in pairs.items()}
        parameters = [x for pair in self.pairs.values() for x in pair]
        self.optimizer = optimizer_of(parameters, s)

    def block(self, visit, layer):
        s, model = self.settings, self.model

        def delta(name, u):
            if (name, visit) not in self.pairs:
                return 0
            a, b = self.pairs[name, visit]
            return s.ttt_lora_alpha / s.ttt_lora_rank * (u @ a.T @ b.T)

        def add(site, x, y, u):
            if site == "qkv":
                parts = zip("qkv", y.split([s.model_dim, s.kv_dim, s.kv_dim], 1))
                return torch.cat([part + delta(name, u) for name, part in parts], 1)
            if site == "out":
                return y + model.attn_scale[layer] * delta("o", u)
            return y + model.mlp_scale[layer] * delta("mlp", u) if site == "down" else y

        def context(k, v):
            keys, values = self.known.get(visit, (k[:0], v[:0]))
            if not torch.is_grad_enabled():  # when it is scored
                self.known[visit] = torch.cat((keys, k.detach())), torch.cat((values, v.detach()))
            return [torch.cat((old[self.first:self.begin], new)) for old, new in ((keys, k), (values, v))]

        return dict(adapter=add, context=context if s.ttt_context == "cache" else None)

    def losses(self, text, begin: int, size: int) -> torch.Tensor:
        """NLL of the chunk that begins there in `text`, a document with the token after it, (targets,) int64."""
        s, self.begin = self.settings, begin
        self.first = max(0, begin + size - s.ttt_eval_seq_len)
        cached, end = s.ttt_context == "cache", min(begin + size, len(text) - 1)
        first = begin if cached else self.first
        n = end - first
        segments = g.make_segments(np.array([0, n], dtype=np.int32), n)
        if cached:
            before = torch.cat((text[:1], text))[first:end]
            keys = end - self.first
            segments = segments._replace(positions=segments.positions + first, previous=before,
                                         keys_cu_seqlens=torch.tensor([0, keys], dtype=torch.int32), keys_max_seqlen=keys)
        hidden = self.model(text[first:end], segments, s.num_loops > 0, self)[begin - first:]
        a, b = self.pairs["head", 0]
        scores = self.model.scores(hidden) + s.ttt_lora_alpha / s.ttt_lora_rank * (hidden @ a.T @ b.T)
        cap = self.model.softcaps(scores)
        return F.cross_entropy(cap * torch.tanh(scores / cap), text[begin + 1:end + 1], reduction="none")

    def run(self, text):
        """Yield the scores of chunk after chunk."""
        s, begin, last = self.settings, 0, len(text) - 1
        while True:
            size = min(int(s.ttt_chunk_growth * begin), s.ttt_chunk_max) // s.ttt_chunk_size * s.ttt_chunk_size
            chunk = begin, max(s.ttt_chunk_size, size)
            with torch.no_grad():
                yield self.losses(text, *chunk)
            begin = sum(chunk)
            if begin >= last:
                return
            self.optimizer.param_groups[0]["lr"] = s.ttt_lora_lr * s.ttt_local_lr_mult * chunk[1] / s.ttt_chunk_size
            self.optimizer.zero_grad()
            self.losses(text, *chunk).mean().backward()
            self.optimizer.step()


def pairs_of(adapters: g.Adapters, row: int) -> dict:
    """A and B, copies, of each site of a slot."""
    parts = adapters.value[row].split([a * b for a, b in adapters.shapes])
    parts = [part.view(shape).clone() for part, shape in zip(parts, adapters.shapes)]
    return dict(zip(adapters.sites, zip(parts, parts[len(adapters.sites):])))


def scores_by_hand(s: g.Settings, tokens) -> np.ndarray:
    """What `adapt` returns in its second column, a document after another; from the real path come only the first A."""
    text, model = text_of(s, tokens), model_of(s)
    adapters, result, kept = learner_of(s, text).adapters, np.zeros(len(tokens) - 1, np.float32), {}
    for step in g.ttt_schedule(text.lengths, s):
        for slot in np.flatnonzero((step.document >= 0) & (step.begin == 0)).tolist():
            document = int(step.document[slot])
            pairs = pairs_of(adapters, slot)
            if s.ttt_warm_start_a:
                pairs = {site: (kept.get((slot, site), a), b) for site, (a, b) in pairs.items()}
            else:
                adapters.value[0, :adapters.first_b] = adapters.drawn(document)
                pairs = pairs_of(adapters, 0)
            dense, a, length = Dense(model, pairs, s), text.starts[document], text.lengths[document]
            result[a:a + length] = torch.cat(list(dense.run(torch.from_numpy(tokens[a:a + length + 1].astype(np.int64))))).numpy()
            kept |= {(slot, site): pair[0].detach() for site, pair in dense.pairs.items()}
    return result


OPTIONS = [dict(), dict(TTT_BETA2=0.5), dict(TTT_WARM_START_A=0), dict(TTT_LOCAL_LR_MULT=0.5),
            dict(TTT_WEIGHT_DECAY=9), dict(TTT_LORA_ALPHA=8), dict(TTT_LORA_RANK=5),
           dict(TTT_MASK="no_qv"), dict(TTT_K_LORA=0, TTT_O_LORA=0, TTT_MLP_LORA=0),
           dict(TTT_CHUNK_GROWTH=0.9, TTT_CHUNK_MAX=24), dict(ASYM_LOGIT_RESCALE=0, LOGIT_SOFTCAP=9)]
CASES = [("cache", changes) for changes in OPTIONS] + [("recompute", changes) for changes in OPTIONS[:2]]


@pytest.fixture(scope="module")
def compared():
    """A stream, and for each context its scores without learning and with no option but the defaults.

    A document of whole chunks, not trained on its last one, leaves its A to another.
    """
    tokens = stream(11, 36, 60)
    text = text_of(small(), tokens)
    assert text.lengths[0] % 8 == 0 and any(step.document[0] > 0 for step in g.ttt_schedule(text.lengths, text.settings))
    return tokens, {context: [adapt(small(TTT_CONTEXT=context, PHASED_TTT_PREFIX_DOCS=0, TTT_LORA_LR=lr), tokens)[:, 1]
                              for lr in (0, 0.01)] for context in ("cache", "recompute")}


@pytest.mark.parametrize("context, changes", CASES, ids=lambda x: x if isinstance(x, str) else
                         ",".join(f"{name}={value}" for name, value in x.items()) or "defaults")
def test_adapters_learn_as_by_hand(context, changes, compared):
    tokens, plain = compared
    s = small(TTT_CONTEXT=context, PHASED_TTT_PREFIX_DOCS=0, **changes)
    scores = adapt(s, tokens)[:, 1]
    np.testing.assert_allclose(scores, scores_by_hand(s, tokens), atol=2e-3)
    frozen, default = plain[context]
    assert np.abs(scores - frozen).max() > 0.05 and (np.abs(scores - default).max() > 0.01) == bool(changes)


@contexts
def test_adapting_to_repetitive_text_pays(context):
    """Documents that repeat a phrase of their own: the model cannot know it, an adapter can learn it."""
    draw = np.random.default_rng(0)
    tokens = np.concatenate([np.concatenate(([BOS], np.tile(draw.integers(2, VOCAB, 5), 20))) for _ in range(8)])
    s = small(TTT_CONTEXT=context, NGRAM_TILT_ENABLED=0, PHASED_TTT_PREFIX_DOCS=0)
    frozen, adapted = (adapt(changed(s, ttt_lora_lr=lr), tokens.astype(np.uint16))[:, 1] for lr in (0, 0.02))
    at = np.arange(len(tokens) - 1) % 101
    early, late = (float((adapted - frozen)[part].mean()) for part in (at < 24, at >= 60))
    assert late < early - 0.3 and late < -0.5


class Row(SimpleNamespace):
    """What Adapters.update reads of Rows."""

    def __init__(self, slots, continues, ratio=(1.0,)):
        super().__init__(slots=torch.tensor(slots), continues=torch.tensor(continues),
                         chunk_ratio=torch.tensor(ratio).expand(len(slots)))


def adapters_of(s: g.Settings, slots: int) -> g.Adapters:
    """Adapters that are not zero."""
    adapters, draw = learner_of(s, text_of(s)).adapters, torch.Generator().manual_seed(2)
    adapters.value.copy_(0.2 * torch.randn(adapters.value.shape, generator=draw))
    adapters.work.copy_(adapters.value)
    return adapters


def drawn(adapters: g.Adapters, rows: int, draw) -> tuple[torch.Tensor, ...]:
    """Gradients of the leaves of so many rows."""
    return tuple(torch.randn(rows, *shape, generator=draw) for shape in adapters.shapes)


@pytest.mark.parametrize("changes", [dict(), dict(TTT_LOCAL_LR_MULT=0.5), dict(TTT_BETA2=0.5)])
def test_the_optimizer_is_that_of_torch_with_a_clock_for_each_slot(changes):
    s = small(**changes)
    adapters, draw = adapters_of(s, 8), torch.Generator().manual_seed(5)
    before, history = adapters.value.clone(), []
    for trains in ([True, False], [True, True], [False, True], [True, True]):
        gradients = drawn(adapters, 2, draw)
        history.append((trains, torch.cat([x.flatten(1) for x in gradients], 1)))
        adapters.update(Row([4, 1], trains, [1.0, 4.0]), gradients)
    for row, slot in enumerate((4, 1)):
        value = torch.nn.Parameter(before[slot].clone())
        optimizer = optimizer_of([value], changed(s, ttt_lora_lr=s.ttt_lora_lr * (1, 4)[row]))
        for trains, gradients in history:
            if trains[row]:
                value.grad = gradients[row].clone()
                optimizer.step()
        torch.testing.assert_close(adapters.value[slot], value.data, rtol=1e-5, atol=1e-6)
    assert torch.equal(adapters.work, adapters.value) and adapters.count.tolist() == [0, 3, 0, 0, 3, 0, 0, 0]
    others = [0, 2, 3, 5, 6, 7]
    assert torch.equal(adapters.value[others], before[others])


@pytest.mark.parametrize("site", [*ADAPTERS, "none"])
@contexts
def test_each_adapter_learns_where_it_is_switched_on(context, site):
    switches = {f"TTT_{name.upper()}_LORA": int(name == site) for name in ADAPTERS}
    s = small(TTT_CONTEXT=context, PHASED_TTT_PREFIX_DOCS=0, **switches)
    text, learner = parts_of(s, np.tile(np.array([BOS, 5, 9, 7, 8, 11, 5, 6, 7, 9, 30, 31], np.uint16), 4)[:48])
    first = pairs_of(learner.adapters, 0)
    _, [rows] = next(text.packed_steps())
    learner.score(rows)
    learner.train(rows)
    visits = range(sum(map(len, learner.model.orders[True])))
    assert len(visits) == 4 and set(first) == {("head", 0)} | {(site, visit) for visit in visits if site != "none"}
    for site_of, (a, b) in pairs_of(learner.adapters, 0).items():
        assert (first[site_of][1] == 0).all() and b.abs().max() > 0.5 * s.ttt_lora_lr
        assert first[site_of][0].abs().max() <= 1 / math.sqrt(s.model_dim) < 1.2 * first[site_of][0].abs().max()


def test_an_unknown_adapter_site_is_refused():
    s = small()
    add = adapters_of(s, 8).at_visit(0, 0)
    with pytest.raises(KeyError, match="gate"):
        add("gate", *torch.zeros(3, 4, s.model_dim))


@pytest.mark.parametrize("warm", [0, 1])
def test_reset_touches_only_its_slots(warm):
    s = small(TTT_WARM_START_A=warm)
    adapters, draw = adapters_of(s, 8), torch.Generator().manual_seed(7)
    for _ in range(3):
        adapters.update(Row([0, 1, 2], [True] * 3), drawn(adapters, 3, draw))
    states = {name: getattr(adapters, name) for name in ("value", "work", "square", "count")}
    before = {name: state.clone() for name, state in states.items()}
    assert all((state[:3].flatten(1) != 0).any(1).all() for state in (x[:, None] for x in states.values()))
    adapters.reset(np.array([1]), np.array([77]))
    for name, state in states.items():
        assert torch.equal(state[[0, 2]], before[name][[0, 2]]), name
        if name in ("value", "work"):
            assert torch.equal(state[1], adapters.value[1]) and (state[1, adapters.first_b:] == 0).all()
        else:
            assert (state[1] == 0).all(), name
    a = adapters.value[1, :adapters.first_b]
    assert torch.equal(a, before["value"][1, :adapters.first_b]) == bool(warm)
    if not warm:  # a draw depends on the document alone
        adapters.reset(np.array([3]), np.array([77]))
        assert torch.equal(adapters.value[3], adapters.value[1]) and a.abs().max() <= 1 / math.sqrt(s.model_dim)


# --- Global phases


@pytest.mark.parametrize("order, prefix, number, due", [
    ("stream", 9, 3, [3, 6, 9]), ("stream", 50, 5, [10]), ("length", 50, 5, [4, 8, 12, 16])])
def test_global_phases_train_on_what_is_scored_completely(order, prefix, number, due, monkeypatch):
    """Each comes right after the step in which enough documents end, unless they were the last. In the published order a
    prefix above their number is that number."""
    s = small(TTT_ORDER=order, PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=number, GLOBAL_TTT_CHUNK_TOKENS=1000)
    phases, model, tokens = [], model_of(s), stream(20)
    text, train, scored = text_of(s, tokens), g.train_all_weights, np.zeros(len(tokens) - 1, bool)

    def complete():
        return [i for i, (a, n) in enumerate(zip(text.starts, text.lengths)) if scored[a:a + n].all()]

    def watched(model, text, documents, *others):
        assert documents.tolist() == complete()
        phases.append(len(documents))
        return train(model, text, documents, *others)

    def watch(at, *_):
        assert len(phases) == sum(len(complete()) >= n for n in due)
        scored[at] = True

    monkeypatch.setattr(g, "train_all_weights", watched)
    run_of(s, tokens, model=model, watch=watch)
    assert len(phases) == len(due) and all(trained >= n for trained, n in zip(phases, due))
    for (name, p), before in zip(model.named_parameters(), model_of(s).parameters()):
        assert "softcap" in name or not torch.equal(before, p), name  # a step is below the last bit of the caps


def test_a_phase_acts_on_all_scores_after_it_and_on_none_before(monkeypatch):
    """Without adapters: scores before it are those of the old weights, scores after it those of the new ones."""
    s, seen, scored = small(TTT_CONTEXT="recompute", TTT_LORA_LR=0, TTT_EVAL_SEQ_LEN=64, PHASED_TTT_PREFIX_DOCS=5), [], []
    train, model, tokens = g.train_all_weights, model_of(s), stream()

    def watched(*arguments):
        seen.append(len(scored))
        return train(*arguments)

    monkeypatch.setattr(g, "train_all_weights", watched)
    old = plain_scores(model, tokens, s)
    run_of(s, tokens, model=model, watch=lambda at, _, plain: scored.append((at, plain.numpy())))
    new = plain_scores(model, tokens, s)
    assert len(seen) == 1 and 0 < seen[0] < len(scored) - 2 and np.abs(new - old).max() > 0.1
    for number, (at, scores) in enumerate(scored):
        np.testing.assert_allclose(scores, (old if number < seen[0] else new)[at], atol=1e-4)


def phase_by_hand(model: g.GPT, tokens, documents, s: g.Settings) -> list[torch.Tensor]:
    """Training on the mean loss of chunks of the concatenated documents, at a rate that falls as a cosine."""
    starts = np.flatnonzero(tokens[:-1] == BOS)
    lengths, size = np.diff(starts, append=len(tokens) - 1), s.global_ttt_chunk_tokens
    inputs = [starts[i] + at for i in documents for at in range(lengths[i])]
    chunks = [inputs[i:i + size] for i in range(0, len(inputs), size)]
    weights, momentum = list(model.parameters()), None
    for number, chunk in enumerate(chunks):
        bounds = [i for i, a in enumerate(chunk) if tokens[a] == BOS or i == 0]
        pieces = [b for a, b in itertools.pairwise([*bounds, len(chunk)]) for b in range(a, b, s.eval_seq_len)]
        segments = g.make_segments(np.array([*pieces, len(chunk)], dtype=np.int32), s.eval_seq_len)
        ids, targets = (torch.from_numpy(tokens[np.array(chunk) + k].astype(np.int64)) for k in (0, 1))
        gradients = torch.autograd.grad(model.token_losses(ids, targets, segments, True).mean(), weights)
        norm = math.sqrt(sum(float(x.square().sum()) for x in gradients))
        clip = min(1, s.global_ttt_grad_clip / norm) if s.global_ttt_grad_clip else 1
        gradients, before = [clip * x for x in gradients], momentum or [torch.zeros_like(x) for x in gradients]
        momentum = [s.global_ttt_momentum * m + x for m, x in zip(before, gradients)]
        rate = s.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * number / len(chunks)))
        with torch.no_grad():
            for p, m in zip(weights, momentum):
                p -= rate * m
    return weights


@pytest.mark.parametrize("changes", [dict(GLOBAL_TTT_GRAD_CLIP=0.3), dict(GLOBAL_TTT_GRAD_CLIP=0), dict(GLOBAL_TTT_GRAD_CLIP=100),
                                     dict(GLOBAL_TTT_CHUNK_TOKENS=100_000)])
def test_a_phase_is_that_of_a_plain_loop(changes):
    s, tokens = small(**dict(GLOBAL_TTT_CHUNK_TOKENS=30, GLOBAL_TTT_MOMENTUM=0.5, EVAL_SEQ_LEN=20) | changes), stream(6)
    model, documents = model_of(s), [0, 2, 3]
    expected = phase_by_hand(model_of(s), tokens, documents, s)
    g.train_all_weights(model, text_of(s, tokens), np.array(documents), True, s, runtime())
    for (name, ours), p, before in zip(model.named_parameters(), expected, model_of(s).parameters()):
        torch.testing.assert_close(ours, p, rtol=1e-4, atol=1e-6)
        assert "softcap" in name or not torch.equal(ours, before), name


# --- Ranks


def score_on(rank: int, ports: dict[int, int], s: g.Settings, folder) -> None:
    """One of as many ranks as the largest number in `ports`; scores with each number of them in turn."""
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank < world:
            torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
            model, log = model_of(s), Log()
            result = g.test_time_training(model, Stream(stream()), True, s, runtime(rank, world), log)
            if rank == world - 1:
                weights = [p.detach() for p in model.parameters()]
                torch.save((result, log.events[-1]["share"], weights), folder / f"{world}")
            torch.distributed.destroy_process_group()


def test_ranks_share_the_work_and_agree(tmp_path):
    s, ports = small(PHASED_TTT_PREFIX_DOCS=5, PHASED_TTT_NUM_PHASES=2, **BOOSTS["learned"]), {}
    model = model_of(s)
    alone = run_of(s, model=model).result
    for world in (2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports[world] = probe.getsockname()[1]
    torch.multiprocessing.spawn(score_on, (ports, s, tmp_path), nprocs=3)
    for world in (2, 3):
        result, share, weights = torch.load(tmp_path / f"{world}")
        assert 0.6 < share <= 1
        for name in ("val_loss", "val_bpb", "untilted_bpb"):
            assert result[name] == pytest.approx(alone[name], rel=1e-5), name
        assert result["targets"] == alone["targets"] == len(stream()) - 1 and result["hints"] == alone["hints"]
        for ours, p in zip(weights, model.parameters()):
            torch.testing.assert_close(ours, p.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 25, 90), (0, 1, 2, 3, 90)])
def test_a_leak_trains_alike_in_any_share(cuts):
    """SMEAR_GATE_BOS_FIX=0: the gradient of a global phase's chunk is the sum of those of its parts."""
    s = small(SMEAR_GATE_BOS_FIX=0, EVAL_SEQ_LEN=64)
    text, model = text_of(s), model_of(s)
    chunk = np.arange(5, 95)
    whole = g.weight_gradient(model, text.batch(chunk), True)
    starts = text.tokens[chunk] == BOS
    ends = [next((at for at in range(cut, 90) if starts[at]), 90) for cut in cuts]  # segments are not cut
    parts = [g.weight_gradient(model, text.batch(chunk, low, high), True)
             for low, high in zip(ends, ends[1:]) if high > low]
    rest = [g.weight_gradient(model, text.batch(chunk, 0, ends[0]), True)] if ends[0] else []
    torch.testing.assert_close(sum(rest + parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("warm", [0, 1])
def test_what_broke_an_adapter_ends_with_its_document(warm):
    """NaN or infinity in A, also where it is kept; the next document begins as it does elsewhere."""
    s = small(TTT_WARM_START_A=warm)
    text, learner = parts_of(s)
    adapters = learner.adapters
    sound = adapters.value[1].clone()
    for broken in (math.nan, math.inf):
        adapters.value[0, 3] = adapters.work[0, 3] = broken
        adapters.reset(np.array([0, 1]), np.array([7, 8]))
        for state in (adapters.value, adapters.work):
            assert state[0, :adapters.first_b].equal(adapters.drawn(7)) and not state[0, adapters.first_b:].any()
        expected = sound[:adapters.first_b] if warm else adapters.drawn(8)
        assert adapters.value[1, :adapters.first_b].equal(expected)


def test_ranks_beyond_the_documents_have_nothing_to_score():
    s, tokens = small(PHASED_TTT_PREFIX_DOCS=0), stream(2)
    scored = [0, 0, 0]
    for rank in range(3):
        text = g.Text(Stream(tokens), s, runtime(rank, 3))
        learner = learner_of(s, text)
        for step, groups in text.packed_steps():
            learner.begin_step(step)
            for rows in groups:
                scored[rank] += len(learner.score(rows)[0])
    assert sum(scored) == len(tokens) - 1 and scored[2] == 0 < min(scored[:2])


# --- The run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run that ends with test-time training."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "data", 60, 12)
    run_here(folder, ITERATIONS=4, WARMUP_STEPS=0)
    return folder


def run_here(folder, **changes) -> dict:
    s = tiny(folder, **TTT | dict(TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=128) | changes)
    log = g.RunLog(s, runtime())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "packed_code", lambda: b"")  # takes longer than the rest
        g.run(s, runtime(), log)
    log.close("finished")
    return record(folder, s.run_id)


def test_a_run_adapts_and_reports(finished):
    run = record(finished)
    plain, adapted = run["results"]["quantized"], run["results"]["ttt"]
    assert (adapted["targets"], adapted["bytes"]) == (plain["targets"], plain["bytes"])
    assert adapted["val_bpb"] == pytest.approx(adapted["val_loss"] * plain["val_bpb"] / plain["val_loss"], rel=1e-6)
    assert adapted["val_bpb"] < adapted["untilted_bpb"] < plain["val_bpb"]  # so few steps leave much to learn
    assert adapted["process_seconds"] >= adapted["seconds"] > 0
    assert adapted["decodable"] is True and adapted["hints_inside_timer"] is True
    assert 0 < adapted["hints"] < adapted["targets"]
    [phase] = adapted["phases"]
    assert 6 <= phase["documents"] <= 12 and 0 < phase["tokens"] < adapted["targets"]
    assert phase["steps"] == -(-phase["tokens"] // 128)
    shares = [event["share"] for event in events(run, "progress")]
    assert len(shares) > 3 and shares == sorted(shares) and shares[-1] <= 1
    assert events(run, "progress")[-1]["val_bpb"] == pytest.approx(adapted["val_bpb"], rel=0.1)
    assert "test-time training" in g.summary(run)


def decode_here(folder, *arguments, **changes) -> tuple[int, str, str]:
    """The tool on a tiny artifact, in this process: exit code, stdout, stderr."""
    values = environment(folder, **TTT | dict(TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=128, PHASED_TTT_PREFIX_DOCS=2) | changes)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = decode.main(list(arguments), values)
    return code, out.getvalue(), err.getvalue()


def test_the_tool_codes_and_reads_back(finished):
    code, out, err = decode_here(finished, "--documents", "4", "--code", str(finished / "code"))
    assert code == 0 and out.splitlines()[-1].endswith("identical"), out + err
    size, bits = re.search(r"code: ([\d,]+) bytes, of which 36 of header: ([\d.]+) bits per byte", out).groups()
    [reported] = re.findall(r"reported by the evaluation: ([\d.]+) bits per byte", out)
    text_bytes = int(re.search(r"4 documents, .* targets, ([\d,]+) bytes of text", out)[1].replace(",", ""))
    size = int(size.replace(",", ""))
    assert size == (finished / "code").stat().st_size and float(bits) == pytest.approx(8 * size / text_bytes, abs=1e-5)
    assert size - 36 == pytest.approx(float(reported) * text_bytes / 8, abs=8, rel=2e-3)


def test_the_tool_says_when_a_text_differs(finished, monkeypatch):
    stream = decode.DecodedText.stream
    monkeypatch.setattr(decode.DecodedText, "stream", lambda text: stream(text)[::-1])
    code, out, _ = decode_here(finished, "--documents", "1", "--code", str(finished / "other"))
    assert code == 1 and "DIFFERENT" in out


def test_a_file_of_code_is_bound_to_all_that_made_it(finished):
    s = decode.settings_from(environment(finished, **TTT))
    assert s.ttt_micro_batch_tokens == 1
    key, path = decode.fingerprint(s.artifact_path, s), finished / "bound"
    words = np.arange(5, dtype=np.uint32)
    path.write_bytes(decode.pack_code(decode.Header(3, 7), words, key))
    header, read = decode.open_code(str(path), key)
    assert header == (3, 7) and np.array_equal(read, words)
    for changes in (dict(seed=5), dict(ttt_lora_lr=0.5), dict(token_order=5), dict(eval_seq_len=64)):
        with pytest.raises(g.InputError, match="made with another artifact, code, setting"):
            decode.open_code(str(path), decode.fingerprint(s.artifact_path, changed(s, **changes)))
    for damaged in (b"", path.read_bytes()[:-1], b"x" + path.read_bytes()[1:], path.read_bytes() + b"1234"):
        path.write_bytes(damaged)
        with pytest.raises(g.InputError, match="no whole file of tools/decode.py"):
            decode.open_code(str(path), key)


def test_the_tool_refuses_what_no_decoder_can_follow(finished, tmp_path):
    code, _, err = decode_here(finished, TTT_ORDER="length")
    assert code == 2 and err.startswith("decode.py: TTT_ORDER: no decoder exists")
    code, _, err = decode_here(finished, "--artifact", str(tmp_path / "none"))
    assert code == 2 and "train first" in err
    write_data(tmp_path / "data", np.full(500, 5), np.full(500, 5))
    code, _, err = decode_here(finished, DATA_PATH=tmp_path / "data")
    assert code == 2 and "it begins with token 5" in err


@pytest.mark.parametrize("size", [2, 64, 8192])
def test_frequencies_leave_no_token_without_a_code(size):
    log_p = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(9).log_softmax(0).numpy()
    counts = decode.frequencies(log_p)
    assert counts.sum() == decode.TOTAL and counts.min() >= 1
    np.testing.assert_allclose(counts / decode.TOTAL, np.exp(log_p), atol=2 * size / decode.TOTAL)


def test_length_order_is_reported_as_not_decodable(finished):
    run = run_here(finished, RUN_ID="length", TTT_EVAL_ONLY=1, TTT_ORDER="length", NGRAM_TILT_ENABLED=0)
    result = run["results"]["ttt"]
    assert not result["decodable"] and result["hints"] == 0 and result["val_bpb"] == result["untilted_bpb"]


def test_a_rank_that_dies_ends_the_launch(finished, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt as g\n"
                      "if os.environ['RANK'] == '1':\n    g.Learner.score = lambda *_: os._exit(9)\n"
                      "code = g.main([], dict(os.environ))\nos._exit(code)\n")
    result = launch(environment(finished, **TTT, TTT_EVAL_ONLY=1, RUN_ID="dies"), ranks=2, script=script)  # or it times out
    assert result.returncode not in (0, None)
    assert "exitcode  : 9" in result.stderr or "exitcode: 9" in result.stderr, result.stderr[-2000:]
    assert "test-time training" not in result.stdout


# --- Settings


@pytest.mark.parametrize("changes, line", [
    *((dict([pair]), f"{pair[0]}: .*set it to (0|>1) or unset it") for pair in (
        ("WITHIN_BOOST", "0.5"), ("WORD_BOOST", "1"), ("AGREE_ADD_BOOST", ".1"), ("WITHIN_BOOST", "off"),
        ("WITHIN_TAU", "0.4"), ("WORD_TAU", "1"), ("TTT_SHORT_LORA_ENABLED", "1"),
        ("TTT_WARM_START_MEAN_ENABLED", "1"))),
    *(({name: 4}, f"{name}: ") for name in ("TTT_EVAL_BATCHES", "TTT_TRAIN_MIN_DOC_LEN", "TTT_TRAIN_MAX_DOC_LEN",
                                            "GLOBAL_TTT_BATCH_SEQS", "GLOBAL_TTT_MUON_NESTEROV")),
    (dict(TTT_MASK="no_k"), "TTT_MASK: 'no_k' is none of .*no_qv"),
    (dict(TTT_LORA_LRS=1), "TTT_LORA_LRS: no such setting; the nearest is TTT_LORA_LR"),
    (dict(TTT_EVAL_SEQ_LEN=7), "TTT_EVAL_SEQ_LEN: 7 is below the largest chunk, 8"),
    (dict(TTT_CHUNK_GROWTH=0.1, TTT_CHUNK_MAX=33), "TTT_EVAL_SEQ_LEN: 32 is below the largest chunk, 33"),
    (dict(TTT_ORDER="length", TTT_SHORT_SCORE_FIRST_ENABLED=1, TTT_SHORT_SCORE_FIRST_STEPS="9:40"),
     "TTT_EVAL_SEQ_LEN: 32 is below the largest chunk, 40"),
    (dict(TTT_SHORT_SCORE_FIRST_ENABLED=1, TTT_ORDER="stream"), "TTT_SHORT_SCORE_FIRST_ENABLED: .*TTT_ORDER=length"),
    (dict(TTT_ORDER="length", TTT_SHORT_SCORE_FIRST_ENABLED=1), "TTT_SHORT_SCORE_FIRST_ENABLED: 1 needs TTT_SHORT_SCORE_FIRST_STEPS"),
    (dict(TTT_ORDER="file"), "TTT_ORDER: 'file' is none of stream, length"),
    (dict(NGRAM_BOOST="free"), "NGRAM_BOOST: 'free' is none of fixed, learned"),
    (dict(NGRAM_BOOST="learned", TOKEN_BOOST=2), "TOKEN_BOOST: it is read only with NGRAM_BOOST=fixed"),
    (dict(NGRAM_BOOST="learned", TOKEN_THRESHOLD=0.7), "TOKEN_THRESHOLD: it is read only with NGRAM_BOOST=fixed"),
    (dict(NGRAM_BOOST="fixed", TOKEN_BACKOFF="3"), "TOKEN_BACKOFF: it is read only with NGRAM_BOOST=learned"),
    (dict(NGRAM_BOOST="fixed", TTT_ORDER="stream"), "TTT_ORDER: .*NGRAM_BOOST=fixed"),
    (dict(DOCUMENT_ORDERS="2,3"), "DOCUMENT_ORDERS: .* not a list of falling orders"),
    (dict(TOKEN_ORDER=20, TOKEN_BACKOFF="19,18,17,16,15,14,13,12,11,10", DOCUMENT_ORDERS="9,8,7,6,5,4"),
     "DOCUMENT_ORDERS: .*16 experts"),
    *((dict(NGRAM_BOOST="learned", TOKEN_ORDER=9, TOKEN_BACKOFF=orders), "TOKEN_BACKOFF: .* not a list of falling orders")
      for orders in ("6,6", "6;5", "1", "5,6", "6,", "9")),
    (dict(TTT_BETA2=1), "TTT_BETA2: "), (dict(TTT_LORA_RANK=0), "TTT_LORA_RANK: "),
    *((dict(TTT_SHORT_SCORE_FIRST_STEPS=steps), "TTT_SHORT_SCORE_FIRST_STEPS: ")
      for steps in ("256", "256:", "0:4", "256:16,", "256:16;9:4", "256:-1", ":4", "256:16 9:4"))])
def test_settings_that_cannot_work_are_refused(changes, line):
    with pytest.raises(g.InputError) as problem:
        small(**changes)
    assert any(re.match(line, found) for found in str(problem.value).splitlines()), problem.value


def test_published_command_lines_are_accepted():
    """Parts that look ahead, or were never used, may be switched off; the list of adapters has a short form."""
    assert small() == small(WITHIN_BOOST=0, WORD_BOOST="0.0", AGREE_ADD_BOOST=0, WITHIN_TAU=99, WORD_TAU=99,
                            TTT_SHORT_LORA_ENABLED=0, TTT_WARM_START_MEAN_ENABLED=0)
    masks = {"": "qv", "all": "qv", "baseline_all": "qv", "no_q": "v", "no_v": "q", "no_qv": ""}
    for mask, expected in masks.items():
        s = small(TTT_MASK=mask)
        assert (s.ttt_q_lora, s.ttt_v_lora) == ("q" in expected, "v" in expected) and s.ttt_o_lora and s.ttt_k_lora
    s = small(TTT_MASK="no_qv", TTT_Q_LORA=1)
    assert s.ttt_q_lora and not s.ttt_v_lora
    s = small(TTT_ORDER="length", TTT_SHORT_SCORE_FIRST_ENABLED=1, TTT_SHORT_SCORE_FIRST_STEPS="256:16,32=8")
    assert [s.first_chunk(length) for length in (31, 32, 255, 256)] == [8, 16, 16, 8]
    assert changed(s, ttt_short_score_first_enabled=False).first_chunk(40) == 8


# --- The warm-up before the clock


def test_the_warm_up_reads_no_text_and_learns_nothing():
    """As on CUDA, where alone there is something to compile."""
    s = small(**BOOSTS["learned"])
    text, learner = parts_of(s)
    score, seen = learner.score, []
    learner.runtime = SimpleNamespace(on_cuda=True, sum=lambda tensor: tensor)
    learner.score = lambda rows: seen.append(rows) or score(rows)
    learner.rehearse(text)
    assert len(seen) == 2
    for rows in seen:
        assert rows.ids.max() <= BOS and rows.segments.previous.max() <= BOS and not rows.targets.any()
    fresh = learner_of(s, text)
    for name in ("value", "work", "square", "count"):
        assert torch.equal(getattr(learner.adapters, name), getattr(fresh.adapters, name)), name
    assert torch.equal(learner.learned_boost.weights, fresh.learned_boost.weights)
    [rows] = next(text.packed_steps())[1]
    assert rows.targets.any() and all(map(torch.equal, score(rows), fresh.score(rows)))


# --- Work ahead of the device


def workers() -> int:
    return sum(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_ahead_keeps_the_order_and_stays_ahead():
    taken, before = [], workers()
    items = g.ahead((taken.append(i) or i for i in range(50)), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 120
    while len(taken) < 4 and time.monotonic() < deadline:  # one handed out, three waiting
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == list(range(4)) and workers() == before + 1
    assert list(items) == list(range(1, 50)) and workers() == before


def test_ahead_raises_where_the_item_is_asked_for():
    def items():
        yield from "ab"
        raise KeyError("broken")

    found = g.ahead(items(), 4)
    assert next(found) == "a"
    time.sleep(0.05)
    assert next(found) == "b"
    with pytest.raises(KeyError, match="broken"):
        next(found)


def test_ahead_ends_its_thread_when_the_user_leaves_early():
    before = workers()
    with pytest.raises(ZeroDivisionError), contextlib.closing(g.ahead(itertools.count(), 2)) as items:
        assert next(items) == 0
        raise ZeroDivisionError
    assert workers() == before

    def leave(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_of(small(**FROZEN), watch=leave)
    assert workers() == before


def test_a_failure_of_the_host_thread_ends_the_scoring():
    class Broken(g.Text):
        def pack(self, step):
            if step.begin.max() > 10:
                raise MemoryError("broken")
            yield from super().pack(step)

    with pytest.raises(MemoryError, match="broken"):
        run_of(small(**FROZEN), text=Broken)
