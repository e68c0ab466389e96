"""N-gram tilt: the distribution is tilted toward tokens that have followed the same contexts before.

The hinted tokens h, whether they are given (the gate) and their boosts depend only on tokens already scored
(C1, C3; online_ngram_state.c says how they are counted) and on the model's distribution p, which becomes

    p'(h) = p(h) e^beta(h) / Z,    p'(a) = p(a) / Z for a not hinted,    Z = 1 + sum_h p(h) (e^beta(h) - 1)

over distinct tokens h. It sums to 1 because neither hints nor boosts nor gates know the target (C2).

    fixed     one hint, the most frequent continuation of the last 15 tokens of the text (NgramState); beta is
              a constant. The token expert of the Parameter Golf systems #2018 to #2140, with contexts
              compared instead of hashed; counted in the order of the text, so that no decoder exists
    learned   a hint of each of several experts (Experts); p'(h) is a logistic mixture of p(h) and the
              experts' hit rates, fitted while scoring (LearnedBoost)
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("online_ngram_state.c")
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC")
PROBLEMS = {1: "more than 2^31 tokens in one n-gram state", 2: "out of memory for n-gram counts"}  # from C


class NgramError(ValueError):
    """Bad input, no compiler, or no memory: one line that names the remedy."""


class Hints(NamedTuple):
    """Hints for n targets by so many experts, all (n, experts). Ungated entries are 0."""

    ids: np.ndarray  # uint16, the hinted token
    gate: np.ndarray  # bool, whether there is a hint
    boost: np.ndarray  # float32, nats: beta of NgramState, logit of the hit rate of Experts


def no_hints(n: int, experts: int) -> Hints:
    return Hints(*(np.zeros((n, experts), dtype) for dtype in (np.uint16, bool, np.float32)))


class NgramState:
    """Counts of one token stream that is fed in pieces; how it is cut changes nothing. Not thread-safe.

    order: the context is the last order - 1 tokens, across document borders. threshold: smallest share of a
    context's occurrences, as float32, that the hint must have followed; the share of a context seen once is
    1. boost: beta, nats. compiler: C compiler command, empty for cc or gcc of the search path. cache: folder
    of the compiled library, None for ~/.cache/online_ngram. Raises NgramError.
    """

    _state = None

    def __init__(self, order: int = 16, threshold: float = 0.8, boost: float = 2.625, *, compiler: str = "",
                 cache: Path | None = None):
        if not 2 <= order <= 256:
            raise NgramError(f"order={order}: must be 2 to 256")
        if not 0 <= threshold <= 1:
            raise NgramError(f"threshold={threshold}: must be 0 to 1")
        if not 0 <= boost <= 50:
            raise NgramError(f"boost={boost}: must be 0 to 50 nats")
        self._library = load(compiler, cache)
        self._beta = np.float32(boost)
        self._state = self._library.ngram_create(order, threshold)
        if not self._state:
            raise NgramError("out of memory for the n-gram state")

    def feed(self, tokens: np.ndarray) -> Hints:
        """Count `tokens` (n,) uint16. Entry i (1 expert) is for the token after tokens[i]."""
        self._check_open()
        tokens = _contiguous(tokens, np.uint16, "tokens")
        ids = np.empty((len(tokens), 1), np.uint16)
        gate = np.empty((len(tokens), 1), bool)
        problem = self._library.ngram_feed(self._state, tokens.ctypes.data, len(tokens), ids.ctypes.data,
                                           gate.ctypes.data)
        if problem:
            self.close()
            raise NgramError(PROBLEMS[problem])
        return Hints(ids, gate, np.multiply(gate, self._beta))

    def _check_open(self) -> None:
        if not self._state:
            raise NgramError("the n-gram state is closed")

    def close(self) -> None:
        """Free the counts."""
        if self._state:
            self._library.ngram_destroy(self._state)
        self._state = None

    __del__ = close


class Experts:
    """Hints by several contexts at once, counted in the order in which targets are scored. Not thread-safe.

    orders: an expert each, whose contexts are the last order - 1 tokens of the document, counted in the whole
    text; document_orders: the same, counted in the document alone. table_bits: 2^table_bits contexts of the
    text are kept, 8 bytes each. documents: how many there are. compiler, cache: as for NgramState. Raises
    NgramError.
    """

    _state = None

    def __init__(self, orders: list[int], document_orders: list[int], table_bits: int, documents: int, *,
                 compiler: str = "", cache: Path | None = None):
        every = [*orders, *document_orders]
        if not 1 <= len(every) <= 16 or not all(2 <= order <= 256 for order in every):
            raise NgramError(f"orders {every}: must be 1 to 16 numbers from 2 to 256")
        if not 2 <= table_bits <= 32:
            raise NgramError(f"table_bits={table_bits}: must be 2 to 32")
        self.count = len(every)
        self.documents = documents
        widths = np.array(every, np.int32) - 1
        in_document = np.repeat(np.int32([0, 1]), [len(orders), len(document_orders)])
        self._library = load(compiler, cache)
        self._state = self._library.experts_create(self.count, widths.ctypes.data, in_document.ctypes.data,
                                                   table_bits, documents)
        if not self._state:
            raise NgramError(f"out of memory for {8 << table_bits} bytes of n-gram contexts")

    def ask(self, stream: np.ndarray, rows: np.ndarray, learn: bool = True) -> Hints:
        """Hints for the targets of rows, one after another; each is learned before the next is asked for.

        rows: (rows, 4) int64: number of the document, where its first token is in `stream` (n,) uint16, the
        first target and one past the last. Target t is stream[t + 1]; without `learn` it is never read, and
        nothing changes: what a decoder asks before it knows the target.
        """
        stream = _contiguous(stream, np.uint16, "stream")
        if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 4:
            raise NgramError(f"rows must be (rows, 4) int64, not {rows.shape} {rows.dtype}")
        document, first, begin, end = np.ascontiguousarray(rows.T)
        # C trusts these bounds.
        bad = (document < 0) | (document >= self.documents)
        bad |= (first < 0) | (first > begin) | (begin > end) | (end >= len(stream) + (not learn))
        if bad.any():
            row = int(bad.argmax())
            raise NgramError(f"row {row}, {rows[row].tolist()}: must be a document below {self.documents} "
                             f"and 0 <= first <= begin <= end < {len(stream)}, the length of the stream")
        shape = int((end - begin).sum()), self.count
        ids = np.empty(shape, np.uint16)
        odds = np.empty(shape, np.float32)
        self._library.experts_ask(
            self._state, stream.ctypes.data, len(rows), document.ctypes.data, first.ctypes.data,
            begin.ctypes.data, end.ctypes.data, learn, ids.ctypes.data, odds.ctypes.data)
        gate = odds > 0
        return Hints(ids, gate, np.log(odds, out=odds, where=gate))

    def __del__(self):
        if self._state:
            self._library.experts_destroy(self._state)


def _contiguous(array: np.ndarray, dtype: type, name: str) -> np.ndarray:
    """The array, copied if it has strides. Raises NgramError for more dimensions or another type."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise NgramError(f"{name} must be a one-dimensional {dtype.__name__} array, not {what}")
    return np.ascontiguousarray(array, dtype)


def token_hints(tokens: np.ndarray, order: int = 16, threshold: float = 0.8, boost: float = 2.625,
                *, compiler: str = "", cache: Path | None = None) -> Hints:
    """Hints for the targets tokens[1:]: entry t belongs to tokens[t + 1] and is computed from tokens[:t + 1].

    tokens: (n,) uint16, documents concatenated as in the shards. Other arguments: see NgramState.
    """
    hints = NgramState(order, threshold, boost, compiler=compiler, cache=cache).feed(tokens)
    return Hints(*(entries[:-1] for entries in hints))


def distinct(ids: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Which hints name the same token, (n, experts, experts) bool, and which is the first to name its token,
    (n, experts): the gate under which every hinted token counts once. ids (n, experts), gate as in Hints."""
    same = (ids[:, :, None] == ids[:, None, :]) & gate[:, :, None] & gate[:, None, :]
    return same, gate & ~same.tril(-1).any(2)


def tilt(log_p: Tensor, log_q: Tensor, hit: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """log p'(target), nats, (n,); log_p (n,), the others (n, tokens): log-probabilities of the target and of
    the hinted tokens, float32 or float64; whether that is the target; its boost, at least 0; whether it is
    hinted. No token may be hinted twice.
    """
    log_q = log_q.clamp(max=0)  # rounding may have pushed it above
    beta = beta * gate
    log_z = ((log_q + beta).exp() - log_q.exp()).sum(1).log1p()
    return log_p + (beta * hit).sum(1) - log_z


class LearnedBoost:
    """beta(h) = b logit(p(h)) + sum_e (c_e + d_e logit(s_e)) - logit(p(h)), at least 0, over the experts e
    that hint the token h; s_e is the hit rate of hints like theirs.

    The weights are learned online, a set (b, c, d) for each expert: it serves the targets for which that
    expert is the first to have a hint. No token is tilted away from: where p(h) is near 1 it would rest on
    the last bits of 1 - p(h), and with it the sum of p'.

    A multinomial logistic regression of the target on the hinted tokens, by online Newton steps (Hazan et
    al. 2007) no longer than REACH, so that a burst of surprises cannot overshoot. Mixing in the logistic
    domain is Mahoney's (PAQ). C3: nothing changes between two calls of `step`; scores in between rest on what
    was seen before.
    """

    RIDGE = 50.0  # weight of the prior b = 1, c = d = 0: the model as it is
    REACH = 0.25  # by which a step may move a weight

    def __init__(self, experts: int, device):
        import torch

        size = 1 + 2 * experts  # b, every c, every d
        self.weights = torch.zeros(experts, size, dtype=torch.float64, device=device)
        self.weights[:, 0] = 1.0
        identity = torch.eye(size, dtype=torch.float64, device=device)
        self.curvature = self.RIDGE * identity.repeat(experts, 1, 1)
        # Observed since the last step, for each set: a row of gradient, the others of curvature.
        self.seen = torch.zeros(experts, 1 + size, size, dtype=torch.float64, device=device)
        self.sets = torch.arange(experts, device=device)

    def features(self, log_q: Tensor, logit_s: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """What the weights multiply (n, experts, size) and beta (n, experts) of the token of each hint."""
        import torch

        log_q = log_q.double().clamp(-30, -1e-7)  # the logit of 0 or 1 is infinite
        logit_q = log_q - (-log_q.expm1()).log()
        hinted_by = same.double()
        x = torch.cat((logit_q[:, :, None], hinted_by, hinted_by * logit_s[:, None]), 2)
        weights = self.weights[self.first(same)]  # (n, size)
        return x, ((x @ weights[:, :, None])[:, :, 0] - logit_q).clamp(0, 80)

    @staticmethod
    def first(same: Tensor) -> Tensor:
        """The first expert that has a hint, (n,); 0 where none has."""
        return same.diagonal(dim1=1, dim2=2).byte().argmax(1)

    def __call__(self, log_q: Tensor, logit_s: Tensor, same: Tensor) -> Tensor:
        """beta (n, experts), nats, of the token of each hint; its log-probability, logit(s), and `distinct`'s
        first result."""
        return self.features(log_q, logit_s, same)[1].to(log_q.dtype)

    def observe(self, log_q: Tensor, logit_s: Tensor, same: Tensor, hit: Tensor, gate: Tensor) -> None:
        """Count hints that were scored; hit, gate: as in tilt."""
        import torch

        x, beta = self.features(log_q, logit_s, same)
        q = log_q.double().clamp(max=0).exp() * gate
        raised = q * beta.exp()
        p = raised / (1 + (raised - q).sum(1, keepdim=True))  # p', 0 where a token is another hint's
        error = p - (hit & gate).double()
        weight = p + 1e-4 * gate  # of a sure hint too, or steps explode
        mean = p[:, None] @ x  # (n, 1, size)
        gradient = error[:, None] @ x
        curvature = (weight[:, :, None] * x).mT @ x - mean.mT @ mean
        # A product with zeros and ones, since the order in which index_add sums is not fixed.
        of_set = (self.first(same)[:, None] == self.sets).double()
        self.seen += (of_set.T @ torch.cat((gradient, curvature), 1).flatten(1)).view_as(self.seen)

    def step(self, total=None) -> None:
        """Learn from what was observed since the last step; total: sums a tensor over the ranks, in place."""
        import torch

        if total is not None:
            total(self.seen)
        self.curvature += self.seen[:, 1:]
        solution, _ = torch.linalg.solve_ex(self.curvature, self.seen[:, 0, :, None])
        move = solution[:, :, 0]  # (sets, size); solve_ex, since solve would wait for the device
        longest = move.abs().amax(1, keepdim=True).clamp(min=1e-9)
        self.weights -= move * (self.REACH / longest).clamp(max=1)
        self.seen.zero_()


@functools.cache
def load(compiler: str = "", cache: Path | None = None) -> ctypes.CDLL:
    """The C functions, compiled unless `cache` holds them for this source, compiler, flags and machine.

    Raises NgramError.
    """
    try:
        command = shlex.split(compiler) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise NgramError(f"no working C compiler ({error}): install gcc, or another compiler "
                         "as cc; NGRAM_TILT_ENABLED=0 needs none") from None
    try:
        source = SOURCE.read_bytes()
        made_from = repr((source, command, FLAGS, version, os.uname().machine))
        key = hashlib.sha256(made_from.encode()).hexdigest()[:32]
        # Another compiler, source or machine makes another file, so that none is ever out of date.
        folder = Path(cache or Path.home() / ".cache" / "online_ngram")
        library = _kept(folder, key) or _compile(source, command, folder, key)
        functions = ctypes.CDLL(str(library))  # not PyDLL: other threads run while it counts
    except subprocess.CalledProcessError as error:
        first_line = error.stderr.decode(errors="replace").strip().split("\n")[0]
        reason = first_line or f"exit code {error.returncode}"
        raise NgramError(f"{command[0]} cannot compile {SOURCE.name} ({reason}): install another compiler "
                         "as cc") from None
    except (OSError, RuntimeError) as error:
        place = cache or "~/.cache/online_ngram"
        raise NgramError(f"no library from {SOURCE.name} in {place} ({error}): make that folder "
                         "writable") from None
    pointer = ctypes.c_void_p
    size = ctypes.c_int64
    number = ctypes.c_int
    signatures = {
        "ngram_create": (pointer, number, ctypes.c_float),
        "ngram_destroy": (None, pointer),
        "ngram_feed": (number, pointer, pointer, size, pointer, pointer),
        "experts_create": (pointer, number, pointer, pointer, number, size),
        "experts_destroy": (None, pointer),
        "experts_ask": (None, pointer, pointer, size, *[pointer] * 4, number, pointer, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(functions, name)
        function.restype = result
        function.argtypes = arguments
    return functions


def _kept(folder: Path, key: str) -> Path | None:
    """The library of this key, if it is as it was written. Loading one that was cut would end the process."""
    for library in folder.glob(f"{key}-*.so"):
        if library.stem == f"{key}-{_digest(library)}":
            return library
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _compile(source: bytes, command: list[str], folder: Path, key: str) -> Path:
    """Compile the source into the folder. Any number of processes may: each renames a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".tmp", dir=folder)
    os.close(handle)
    try:
        build = [*command, *FLAGS, "-x", "c", "-", "-o", temporary]
        subprocess.run(build, input=source, capture_output=True, check=True)
        library = folder / f"{key}-{_digest(Path(temporary))}.so"
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, library)
        return library
    finally:
        Path(temporary).unlink(missing_ok=True)
