"""Code the first documents of a text with a saved artifact into a file, and read them back from that file.

    [settings] python tools/decode.py [--documents 20] [--artifact FILE] [--code FILE]

Settings are environment variables, as for train_gpt.py; ./run.sh decode takes a recipe's. Coder and decoder
run the evaluation itself (`adapt` in train_gpt.py): adapters, global phases and tilt included. Each target is
coded with its tilted distribution by a range coder. Prints the bytes of the code, bits per byte, the figure
that the same evaluation reports, and whether what was read back is identical; exit code 1 if not.

The decoder is given the file of code and what `made_with` lists. It repeats the pass of a chunk
for each token of it, so one chunk makes a pass unless TTT_MICRO_BATCH_TOKENS is set. On the CPU, one thread:
two threads already round in another way.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import online_ngram_tilt as ngram  # noqa: E402
import train_gpt as g  # noqa: E402

RUNTIME = g.Runtime(0, 1, torch.device("cpu"))
SETTINGS = "Evaluation", "Test-time training", "Global test-time training", "N-gram tilt"  # groups
CODE = "train_gpt.py", "gpt_kernels.py", "online_ngram_tilt.py", "online_ngram_state.c", "tools/decode.py"
ENDLESS = 1 << 40  # length of a document whose end has not been read yet


LAYOUT = struct.Struct("<8s16sIII")  # magic, fingerprint, Header, CRC-32 of the code words
MAGIC = b"gptcode1"


class Header(NamedTuple):
    """All that a decoder is told of the text beside the code words; the text begins with BOS."""

    documents: int
    last: int  # targets of the last document, which no BOS ends


def made_with(artifact: str, s: g.Settings) -> dict:
    """All on which the bits of a score depend beside the text: coder and decoder must agree on it."""
    fields = [field.name for group in SETTINGS for field in g.fields_by_group(g.Settings)[group]]
    return dict(
        artifact=hashlib.sha256(Path(artifact).read_bytes()).hexdigest(),
        code={name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in CODE},
        settings={name: getattr(s, name) for name in ["seed", *fields]},
        ranks=RUNTIME.world_size,
        arithmetic=[torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(),
                    torch.get_num_threads()])


def fingerprint(artifact: str, s: g.Settings) -> bytes:
    return hashlib.sha256(json.dumps(made_with(artifact, s)).encode()).digest()[:16]


# --- Distributions

HINTS = "hints", "gate", "boost"  # the fields of Rows that tilt a target's distribution


class OpenLearner(g.Learner):
    """Knows the whole distribution of a target, by the functions that score it."""

    def scores(self, rows: g.Rows) -> Tensor:
        self.seen = super().scores(rows)
        return self.seen

    @torch.no_grad()
    def distribution(self, rows: g.Rows, at: int) -> Tensor:
        """Tilted log-probabilities (vocab,) of every token in the place of target `at` of the rows."""
        scores = self.seen[at]
        caps = self.view.softcaps(scores)
        log_p = (caps * torch.tanh(scores / caps)).log_softmax(0)

        size = len(log_p)
        hints = {name: getattr(rows, name)[at:at + 1] for name in HINTS}
        hints = {name: field.expand(size, *field.shape[1:]) for name, field in hints.items()}
        every_token = rows._replace(targets=torch.arange(size), **hints)
        return -self.tilted(-log_p, log_p[every_token.hints], every_token)

    def model_of(self, rows: g.Rows, at: int) -> constriction.stream.model.Categorical:
        """The distribution as the range coder takes it."""
        shares = frequencies(self.distribution(rows, at).numpy()) / TOTAL
        return constriction.stream.model.Categorical(shares, perfect=False)


TOTAL = 1 << 24


def frequencies(log_p: np.ndarray) -> np.ndarray:
    """Integers (n,) near TOTAL p that sum to TOTAL; none is 0, so that every token has a code."""
    p = np.exp(log_p.astype(np.float64))
    counts = 1 + np.floor((TOTAL - len(p)) * (p / p.sum())).astype(np.int64)
    counts[counts.argmax()] += TOTAL - counts.sum()
    return counts


# --- The coder


class Encoder(OpenLearner):
    """Codes each target when it is scored, in the order of scoring."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.coder = constriction.stream.queue.RangeEncoder()

    def score(self, rows: g.Rows) -> tuple[Tensor, Tensor]:
        result = super().score(rows)
        for at in rows.visible.tolist():
            self.coder.encode(int(rows.targets[at]), self.model_of(rows, at))
        return result


class Quiet:
    """Takes the place of the run log."""

    def event(self, *_, **__):
        pass


def encode(data, model: g.GPT, looping: bool, s: g.Settings) -> tuple[Header, np.ndarray, dict]:
    """Header and code words (uint32) of a text, and the figures of the evaluation that made them."""
    text = g.Text(data, s, RUNTIME)
    learner = Encoder(model, looping, text.own_slots, s, RUNTIME)
    total = g.Score(data, RUNTIME, Quiet())
    with total.timer():
        g.adapt(learner, text, text.packed_steps(), total.add)
    header = Header(len(text.lengths), int(text.lengths[-1]))
    return header, learner.coder.get_compressed(), total.results()


def pack_code(header: Header, words: np.ndarray, key: bytes) -> bytes:
    """The file of code; `key` is the fingerprint of what it was made with."""
    payload = words.astype("<u4").tobytes()
    return LAYOUT.pack(MAGIC, key, *header, zlib.crc32(payload)) + payload


def open_code(path: str, key: bytes) -> tuple[Header, np.ndarray]:
    """Header and code words of a file; raises InputError if it is damaged or was made with something else."""
    data = Path(path).read_bytes()
    payload = data[LAYOUT.size:]
    try:
        magic, made_by, documents, last, checksum = LAYOUT.unpack_from(data)
    except struct.error:
        magic = b""
    if magic != MAGIC or zlib.crc32(payload) != checksum:
        raise g.InputError(f"{path}: no whole file of tools/decode.py; code the text again")
    if made_by != key:
        raise g.InputError(f"{path}: made with another artifact, code, setting or arithmetic; use the same")
    return Header(documents, last), np.frombuffer(payload, "<u4").astype(np.uint32)


# --- The decoder


class Decoder(OpenLearner):
    """Reads tokens from the code words."""

    def __init__(self, words: np.ndarray, *arguments):
        super().__init__(*arguments)
        self.coder = constriction.stream.queue.RangeDecoder(words)

    def next_token(self, rows: g.Rows, at: int) -> int:
        """Target `at` of the rows, which hold the true tokens before it and anything after it."""
        self.adapters.take(rows)
        with torch.no_grad():
            self.scores(rows)
        return int(self.coder.decode(self.model_of(rows, at)))


class DecodedText(g.Text):
    """The text as far as it has been read: document i lies from token i * `room` on."""

    def __init__(self, documents: int, last: int, s: g.Settings):
        blank = argparse.Namespace(tokens=np.full(documents + 1, g.BOS_ID, np.uint16))
        super().__init__(blank, s, RUNTIME)
        self.room = 1
        self.lengths = np.full(documents, ENDLESS)
        self.lengths[-1] = last

    def make_room(self, least: int) -> None:
        """Give every document room for `least` tokens."""
        if least <= self.room:
            return
        documents = len(self.lengths)
        read = self.tokens[:-1].reshape(documents, self.room)
        more = 2 * least - self.room
        self.room += more
        self.tokens = np.append(np.pad(read, [(0, 0), (0, more)]), np.uint16(0))
        self.starts = np.arange(documents) * self.room

    def packed_steps(self, learner: Decoder):
        """As Text's, but a step is read when its rows are asked for: after its slots were made ready."""
        for step in g.ttt_schedule(self.lengths, self.settings):
            self.make_room(int(step.end.max()) + 1)
            yield step, self.read_step(step, learner)

    def read_step(self, step: g.Step, learner: Decoder):
        """Read the step's chunks, slot by slot; then yield its rows."""
        longest = int((step.end - step.begin).max())
        self.hints = ngram.no_hints(longest * len(step.end), self.settings.experts)
        self.first_hint = longest * np.arange(len(step.end))
        for slots in [rows.slots.numpy() for rows in self.pack(step)]:
            others = np.delete(np.arange(len(step.document)), slots)
            document = step.document.copy()
            document[others] = -1
            for row, slot in enumerate(slots.tolist()):
                self.read_chunk(step._replace(document=document), row, slot, learner)
        yield from self.pack(step)

    def read_chunk(self, step: g.Step, row: int, slot: int, learner: Decoder) -> None:
        """Read the chunk of a slot, token by token, from the one pass that the step's active slots share."""
        document, begin, end = [int(field[slot]) for field in step]
        start = self.starts[document]
        for position in range(begin, end):
            target = np.array([[document, start, start + position, start + position + 1]])
            if self.counter:
                for kept, new in zip(self.hints, self.counter.ask(self.tokens, target, learn=False)):
                    kept[self.first_hint[slot] + position - begin] = new[0]
            [rows] = self.pack(step)
            token = learner.next_token(rows, int(rows.chunk_ends[row]) - end + position)
            self.tokens[start + position + 1] = token
            if self.counter:
                self.counter.ask(self.tokens, target)
            if token == g.BOS_ID or position + 1 == self.lengths[document]:
                self.lengths[document] = position + 1
                break

    def stream(self) -> np.ndarray:
        """All documents, one after another, with the target of the last one's last token."""
        pieces = [self.tokens[a:a + n] for a, n in zip(self.starts, self.lengths)]
        end = self.starts[-1] + self.lengths[-1]
        return np.concatenate([*pieces, self.tokens[end:end + 1]])


def decode(header: Header, words: np.ndarray, model: g.GPT, looping: bool,
           s: g.Settings) -> tuple[DecodedText, Decoder]:
    """The text, and the learner that has read it, in the state in which the coder's ended."""
    text = DecodedText(header.documents, header.last, s)
    learner = Decoder(words, model, looping, text.own_slots, s, RUNTIME)
    with tqdm(total=header.documents, desc="decoding", unit=" documents") as bar:
        def advance(*_):
            bar.update(int((text.lengths < ENDLESS).sum()) - bar.n)

        g.adapt(learner, text, text.packed_steps(learner), advance)
    return text, learner


# --- The tool


class Documents:
    """The first documents of a text, in the place of ValidationData; the next one's BOS ends them."""

    def __init__(self, data: g.ValidationData, count: int):
        starts = g.document_starts(data.tokens[:-1])
        end = starts[count] + 1 if count < len(starts) else len(data.tokens)
        self.tokens = data.tokens[:end]
        self.bytes = data.bytes[:end]


def settings_from(environment: dict) -> g.Settings:
    """The settings, for a CPU: one chunk makes a pass unless TTT_MICRO_BATCH_TOKENS is set."""
    s = g.Settings.from_environment({"TTT_MICRO_BATCH_TOKENS": "1"} | environment)
    if s.ttt_order != "stream":
        raise g.InputError(f"TTT_ORDER: no decoder exists for {s.ttt_order}; set TTT_ORDER=stream")
    return dataclasses.replace(s, attention="reference", fp8="0", ttt_eval_only=True)


def load(path: str, s: g.Settings) -> tuple[g.GPT, bool]:
    """The model of an artifact, and whether it loops."""
    model = g.GPT(s)
    table, arrays = g.read_container(path, model, s)
    looping = g.install(model, table, arrays, s)
    return model, looping


def run(arguments: list[str], environment: dict) -> bool:
    """Code, decode and compare; whether all is identical."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--documents", type=int, default=20, metavar="N", help="the first N (%(default)s)")
    parser.add_argument("--artifact", metavar="FILE", help="default: that of ARTIFACT_DIR")
    parser.add_argument("--code", metavar="FILE", help="file to write (text.code beside it)")
    options = parser.parse_args(arguments)
    if options.documents < 1:
        parser.error("--documents: at least 1")
    s = settings_from(environment)
    artifact = options.artifact or s.artifact_path
    path = options.code or str(Path(artifact).with_name("text.code"))
    torch.set_num_threads(1)

    g.check_tools(s, RUNTIME)
    model = load(artifact, s)
    key = fingerprint(artifact, s)
    data = Documents(g.ValidationData(s), options.documents)
    header, words, figures = encode(data, *model, s)
    code = pack_code(header, words, key)
    g.write_whole(path, code)
    print(f"{header.documents} documents, {figures['targets']:,} targets, {figures['bytes']:,} bytes of text")
    print(f"{path}: {len(code):,} bytes, of which {LAYOUT.size} of header: "
          f"{8 * len(code) / figures['bytes']:.5f} bits per byte")
    print(f"reported by the evaluation: {figures['val_bpb']:.5f} bits per byte", flush=True)

    began = time.perf_counter()
    header, words = open_code(path, key)
    model = load(artifact, s)
    text, _ = decode(header, words, *model, s)
    identical = np.array_equal(text.stream(), data.tokens)
    print(f"read back in {time.perf_counter() - began:.0f} s: {'identical' if identical else 'DIFFERENT'}")
    return identical


def main(arguments: list[str], environment: dict) -> int:
    try:
        return 0 if run(arguments, environment) else 1
    except (*g.BAD_INPUT, OSError) as error:
        for line in str(error).splitlines():
            print(f"decode.py: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
