"""N-gram tilt: the distribution is tilted toward the token that has followed the last 15 tokens most often.

The hint h, whether it is given (the gate) and its boost depend only on tokens already scored (C1, C3;
online_ngram_state.c says how they are counted). The distribution p becomes

    p'(h) = p(h) e^beta / Z,    p'(a) = p(a) / Z for a != h,    Z = 1 + p(h) (e^beta - 1),

which sums to 1 because neither h nor beta nor the gate knows the target (C2). Two boosts:

    fixed     beta is a constant; pays where hints come true more often than the model expects
    learned   p'(h) is a logistic mixture of p(h) and s, the smoothed hit rate so far of hints whose
              contexts occurred about as often and agreed about as much; its weights are fitted while scoring

The token expert of the Parameter Golf systems #2018 to #2140, with contexts compared instead of hashed.
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
    from collections.abc import Callable

    from torch import Tensor

SOURCE = Path(__file__).with_name("online_ngram_state.c")
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC")
MODES = ("fixed", "learned")
PROBLEMS = {1: "more than 2^31 tokens in one n-gram state", 2: "out of memory for n-gram counts"}  # from C


class NgramError(ValueError):
    """Bad input, no compiler, or no memory: one line that names the remedy."""


class Hints(NamedTuple):
    """Hints for n consecutive targets, all (n,). Ungated entries are 0."""

    ids: np.ndarray  # uint16, the hinted token
    gate: np.ndarray  # bool, whether there is a hint
    boost: np.ndarray  # float32, nats: beta in mode fixed, logit(s) in mode learned


def no_hints(n: int) -> Hints:
    return Hints(np.zeros(n, np.uint16), np.zeros(n, bool), np.zeros(n, np.float32))


class NgramState:
    """Counts of one token stream that is fed in pieces; how it is cut changes nothing. Not thread-safe.

    order: the context is the last order - 1 tokens, across document borders but not restarts.
    threshold: smallest share of a context's occurrences, as float32, that the hint must have followed; the
    share of a context seen once is 1. boost: beta of mode fixed, nats. compiler: C compiler command, empty
    for cc or gcc of the search path. cache: folder of the compiled library, None for ~/.cache/online_ngram.
    Raises NgramError.
    """

    _state = None

    def __init__(self, order: int = 16, threshold: float = 0.8, boost: float = 2.625, mode: str = "fixed", *,
                 compiler: str = "", cache: Path | None = None):
        if not 2 <= order <= 256:
            raise NgramError(f"order={order}: must be 2 to 256")
        if not 0 <= threshold <= 1:
            raise NgramError(f"threshold={threshold}: must be 0 to 1")
        if not 0 <= boost <= 50:
            raise NgramError(f"boost={boost}: must be 0 to 50 nats")
        if mode not in MODES:
            raise NgramError(f"mode={mode}: must be one of {', '.join(MODES)}")
        self._library = load(compiler, cache)
        self._beta = np.float32(boost) if mode == "fixed" else None
        self._state = self._library.ngram_create(order, threshold)
        if not self._state:
            raise NgramError("out of memory for the n-gram state")

    def feed(self, tokens: np.ndarray) -> Hints:
        """Count `tokens` (n,) uint16. Entry i is the hint for the token after tokens[i], from all so far."""
        tokens = _contiguous(tokens, np.uint16, "tokens")
        return self._hints(len(tokens), self._library.ngram_feed, tokens.ctypes.data, len(tokens))

    def restart(self) -> None:
        """Forget the present context, not the counts: the next order - 1 tokens are context, not counted."""
        self._check_open()
        self._library.ngram_restart(self._state)

    def feed_rows(self, stream: np.ndarray, first: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Hints:
        """Hints for targets begin[r] to end[r] - 1 of each row r in turn, concatenated; each is then counted.

        Target t is stream[t + 1]; its context lies within the document whose first token is stream[first[r]].
        stream: (n,) uint16, the others (rows,) int64. A decoder gets the same for each row from a restart, a
        feed of the context of its first target (the last entry is that target's) and a feed of each target.
        """
        stream = _contiguous(stream, np.uint16, "stream")
        first = _contiguous(first, np.int64, "first")
        begin = _contiguous(begin, np.int64, "begin")
        end = _contiguous(end, np.int64, "end")
        if not len(first) == len(begin) == len(end):
            raise NgramError(f"{len(first)} first, {len(begin)} begin, {len(end)} end: must be one each for "
                             "every row")
        # C trusts these bounds.
        bad = (first < 0) | (first > begin) | (begin > end) | (end >= len(stream))
        if bad.any():
            row = int(bad.argmax())
            raise NgramError(f"row {row}, first={first[row]}, begin={begin[row]}, end={end[row]}: must be "
                             f"0 <= first <= begin <= end < {len(stream)}, the length of the stream")
        targets = int((end - begin).sum())
        return self._hints(targets, self._library.ngram_feed_rows, stream.ctypes.data, len(first),
                           first.ctypes.data, begin.ctypes.data, end.ctypes.data)

    def _hints(self, n: int, function: Callable[..., int], *arguments: int) -> Hints:
        """The n entries that the C function writes. The caller keeps arrays whose addresses it passes."""
        self._check_open()
        ids, gate = np.empty(n, np.uint16), np.empty(n, bool)  # C fills them whole
        fixed = self._beta is not None
        odds = None if fixed else np.empty(n, np.float32)
        odds_address = None if fixed else odds.ctypes.data
        problem = function(self._state, *arguments, ids.ctypes.data, gate.ctypes.data, odds_address)
        if problem:
            self.close()
            raise NgramError(PROBLEMS[problem])
        if fixed:
            return Hints(ids, gate, np.multiply(gate, self._beta))
        return Hints(ids, gate, np.log(odds, out=odds, where=gate))

    def _check_open(self) -> None:
        if not self._state:
            raise NgramError("the n-gram state is closed")

    def close(self) -> None:
        """Free the counts."""
        if self._state:
            self._library.ngram_destroy(self._state)
        self._state = None

    __del__ = close


def _contiguous(array: np.ndarray, dtype: type, name: str) -> np.ndarray:
    """The array, copied if it has strides. Raises NgramError for more dimensions or another type."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise NgramError(f"{name} must be a one-dimensional {dtype.__name__} array, not {what}")
    return np.ascontiguousarray(array, dtype)


def token_hints(tokens: np.ndarray, order: int = 16, threshold: float = 0.8, boost: float = 2.625,
                mode: str = "fixed", *, compiler: str = "", cache: Path | None = None) -> Hints:
    """Hints for the targets tokens[1:]: entry t belongs to tokens[t + 1] and is computed from tokens[:t + 1].

    tokens: (n,) uint16, documents concatenated as in the shards. Other arguments: see NgramState.
    """
    hints = NgramState(order, threshold, boost, mode, compiler=compiler, cache=cache).feed(tokens)
    return Hints(*(entries[:-1] for entries in hints))


def tilt(log_p: Tensor, log_q: Tensor, hit: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """log p'(target), nats; all arguments of one shape.

    log_p, log_q: log-probabilities of the target and of the hint, float32 or float64; hit: target == hint;
    beta: the boost, at least 0; gate: that of Hints.
    """
    log_q = log_q.clamp(max=0)  # rounding may have pushed it above
    log_z = ((log_q + beta).exp() - log_q.exp()).log1p()
    return (log_p + beta * hit - log_z).where(gate, log_p)


class LearnedBoost:
    """beta = a + b logit(q) + c logit(s) - logit(q), at least 0, with a, b, c of each expert learned online.

    q = p(h) is the model's probability of the hint, s the hit rate of hints like it; an expert is one length
    of context. There is no tilt away from the hint: where q is near 1 it would rest on the last bits of
    1 - q, and with it the sum of p'.

    A logistic regression of whether hints come true, by online Newton steps (Hazan et al. 2007) no longer
    than REACH, so that a burst of surprises cannot overshoot. Mixing in the logistic domain is Mahoney's
    (PAQ). C3: nothing changes between two calls of `step`; scores in between rest on what was seen before.
    """

    RIDGE = 50.0  # weight of the prior a = 0, b = 1, c = 0: the model as it is
    REACH = 0.25  # by which a step may move a weight

    def __init__(self, experts: int, device):
        import torch

        prior = [0.0, 1.0, 0.0]  # a, b, c
        self.weights = torch.tensor([prior] * experts, dtype=torch.float64, device=device)
        identity = torch.eye(3, dtype=torch.float64, device=device)
        self.curvature = self.RIDGE * identity.repeat(experts, 1, 1)
        # Observed since the last step, for each expert: a row of gradient, three of curvature.
        self.seen = torch.zeros(experts, 4, 3, dtype=torch.float64, device=device)
        self.experts = torch.arange(experts, device=device)

    def features(self, log_q: Tensor, logit_s: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
        """1, logit(q), logit(s) of each hint (n, 3) and their weighted sum (n,), float64."""
        log_q = log_q.double().clamp(-30, -1e-7)  # the logit of 0 or 1 is infinite
        x = log_q.new_ones(len(log_q), 3)
        x[:, 1] = log_q - (-log_q.expm1()).log()
        x[:, 2] = logit_s
        return x, (x * self.weights[expert]).sum(1)

    def __call__(self, log_q: Tensor, logit_s: Tensor, expert: Tensor) -> Tensor:
        """beta (n,), nats, of hints with log p(h), logit(s) (n,) by these experts (n,) int64."""
        x, odds = self.features(log_q, logit_s, expert)
        return (odds - x[:, 1]).clamp(0, 80).to(log_q.dtype)

    def observe(self, log_q: Tensor, logit_s: Tensor, expert: Tensor, hit: Tensor, gate: Tensor) -> None:
        """Count hints that were scored; hit (n,) bool: whether they came true; gate as in tilt."""
        x, odds = self.features(log_q, logit_s, expert)
        of_expert = ((self.experts == expert[:, None]) & gate[:, None]).double()  # (n, experts)
        p = odds.sigmoid()
        error = (p - hit.double())[:, None] * of_expert
        weight = (p * (1 - p)).clamp(min=1e-4)[:, None] * of_expert  # of a sure hint too, or steps explode
        weighted = (weight[:, :, None] * x[:, None]).flatten(1)  # (n, experts * 3)
        self.seen[:, 0] += error.T @ x
        self.seen[:, 1:] += (weighted.T @ x).view(-1, 3, 3)

    def step(self, total=None) -> None:
        """Learn from what was observed since the last step; total: sums a tensor over the ranks, in place."""
        import torch

        if total is not None:
            total(self.seen)
        self.curvature += self.seen[:, 1:]
        solution, _ = torch.linalg.solve_ex(self.curvature, self.seen[:, 0, :, None])
        move = solution[:, :, 0]  # (experts, 3); solve_ex, since solve would wait for the device
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
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    functions.ngram_create.restype = pointer
    functions.ngram_create.argtypes = ctypes.c_int, ctypes.c_float
    functions.ngram_destroy.restype = None
    functions.ngram_destroy.argtypes = (pointer,)
    functions.ngram_restart.restype = None
    functions.ngram_restart.argtypes = (pointer,)
    functions.ngram_feed.argtypes = pointer, pointer, size, *[pointer] * 3
    functions.ngram_feed_rows.argtypes = pointer, pointer, size, *[pointer] * 6
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
