"""N-gram tilt: the model's distribution is tilted toward the token that has followed the last 15 tokens most often.

The hint h, whether it is given (the gate) and its boost depend only on tokens already scored (online_ngram_state.c says how
they are counted). The distribution p becomes

    p'(h) = p(h) e^beta / Z,    p'(a) = p(a) / Z for a != h,    Z = 1 + p(h) (e^beta - 1),

which sums to 1 because neither h nor beta nor the gate knows the target. Two boosts:

    fixed        beta is a constant; pays where hints come true more often than the model expects
    calibrated   beta = logit(s) - logit(p(h)), at least 0: p'(h) becomes s, the smoothed hit rate so far of hints whose
                 contexts occurred about as often and agreed about as much; a model that is surer than s is left alone

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
    from torch import Tensor

SOURCE = Path(__file__).with_name("online_ngram_state.c")
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC")
MODES = ("fixed", "calibrated")


class NgramError(ValueError):
    """Bad input, no compiler, or no memory: one line that names the remedy."""


class Hints(NamedTuple):
    """Hints for n consecutive targets, all (n,). Ungated entries are 0."""

    ids: np.ndarray  # uint16, the hinted token
    gate: np.ndarray  # bool, whether there is a hint
    boost: np.ndarray  # float32, nats: beta in mode fixed, logit(s) in mode calibrated


class NgramState:
    """Counts of one token stream that is fed in pieces; how it is cut changes nothing. For one thread at a time.

    order: the context is the last order - 1 tokens, across document borders. threshold: smallest share of a context's
    occurrences, as float32, that the hint must have followed; a context seen once has share 1. boost: beta of mode fixed,
    nats. compiler: C compiler command, empty for cc or gcc of the search path. cache: folder of the compiled library, None
    for ~/.cache/online_ngram. Raises NgramError.
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
        self._boost = boost if mode == "fixed" else None
        self._state = self._library.ngram_create(order, threshold)
        if not self._state:
            raise NgramError("out of memory for the n-gram state")

    def feed(self, tokens: np.ndarray) -> Hints:
        """Count `tokens`, (n,) uint16. Entry i is the hint for the token after tokens[i], from all tokens up to that one."""
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint16 or tokens.ndim != 1:
            what = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
            raise NgramError(f"tokens must be a one-dimensional uint16 array, not {what}")
        if not self._state:
            raise NgramError("the n-gram state is closed")
        tokens = np.ascontiguousarray(tokens, np.uint16)
        ids, gate = np.empty_like(tokens), np.empty(len(tokens), bool)
        odds = np.empty(len(tokens), np.float32) if self._boost is None else None
        problem = self._library.ngram_feed(self._state, tokens.ctypes.data, len(tokens), ids.ctypes.data, gate.ctypes.data,
                                           None if odds is None else odds.ctypes.data)
        if problem:
            self.close()
            raise NgramError(("more than 2^31 tokens in one n-gram state", "out of memory for n-gram counts")[problem - 1])
        boost = np.multiply(gate, np.float32(self._boost)) if odds is None else np.log(odds, out=odds, where=gate)
        return Hints(ids, gate, boost)

    def close(self) -> None:
        """Free the counts."""
        if self._state:
            self._library.ngram_destroy(self._state)
        self._state = None

    __del__ = close


def token_hints(tokens: np.ndarray, order: int = 16, threshold: float = 0.8, boost: float = 2.625, mode: str = "fixed", *,
                compiler: str = "", cache: Path | None = None) -> Hints:
    """Hints for the targets tokens[1:]: entry t belongs to tokens[t + 1] and is computed from tokens[:t + 1].

    tokens: (n,) uint16, documents concatenated as in the shards. Arguments as for NgramState. Raises NgramError.
    """
    hints = NgramState(order, threshold, boost, mode, compiler=compiler, cache=cache).feed(tokens)
    return Hints(*(entries[:-1] for entries in hints))


def tilt(log_p: Tensor, log_q: Tensor, hit: Tensor, boost: Tensor, gate: Tensor, calibrated: bool = False) -> Tensor:
    """log p'(target), nats; all arguments of one shape.

    log_p, log_q: log-probabilities of the target and of the hint, float32 or float64; hit: target == hint, bool; boost,
    gate: those of Hints; calibrated: boost is logit(s). A tilt away from the hint is left out (beta >= 0): where p(h) is
    near 1 it would rest on the last bits of 1 - p(h), and the sum of p' with it.
    """
    log_q = log_q.clamp(max=0)
    beta = (boost - log_q + (-log_q.expm1()).log()).clamp(0, 80) if calibrated else boost
    log_z = ((log_q + beta).exp() - log_q.exp()).log1p()
    return (log_p + beta * hit - log_z).where(gate, log_p)


@functools.cache
def load(compiler: str = "", cache: Path | None = None) -> ctypes.CDLL:
    """The C functions, compiled if `cache` does not hold them for this source, compiler, flags and kind of machine.

    Any number of processes may do so at once: each compiles into a file of its own and renames it. Raises NgramError.
    """
    try:
        command = shlex.split(compiler) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise NgramError(f"no working C compiler ({error}): install gcc or set CC to a compiler") from None
    try:
        source = SOURCE.read_bytes()
        key = hashlib.sha256(repr((source, command, FLAGS, version, os.uname().machine)).encode()).hexdigest()[:32]
        folder = Path(cache or Path.home() / ".cache" / "online_ngram")
        library = folder / f"{key}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(".tmp", dir=folder)
            os.close(handle)
            try:
                build = [*command, *FLAGS, "-x", "c", "-", "-o", temporary]
                subprocess.run(build, input=source, capture_output=True, check=True)
                os.replace(temporary, library)
            finally:
                Path(temporary).unlink(missing_ok=True)
        functions = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().split("\n")[0] or f"exit code {error.returncode}"
        raise NgramError(f"{command[0]} cannot compile {SOURCE.name} ({reason}): set CC to another compiler") from None
    except (OSError, RuntimeError) as error:
        raise NgramError(f"no library from {SOURCE.name} ({error}): set XDG_CACHE_HOME to a writable folder") from None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    functions.ngram_create.argtypes, functions.ngram_create.restype = (ctypes.c_int, ctypes.c_float), pointer
    functions.ngram_destroy.argtypes, functions.ngram_destroy.restype = (pointer,), None
    functions.ngram_feed.argtypes = pointer, pointer, size, pointer, pointer, pointer
    return functions
