"""What a program needs of its host, whatever it computes: whole files, a folder of its own, memory, a log.

Whatever becomes of terminal, disk or memory, a run ends with a closed record and a line that says why.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from env_settings import InputError


def write_whole(path: str, data: bytes) -> None:
    """Write a file so that `path` always holds its old content or all of `data`, even after a power cut."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error, OSError):
            error.filename = path  # the user knows no temporary file
        raise


def sync_folder(folder: str) -> None:
    """Wait until the disk knows the folder's names, where its file system can tell."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def ignore_signals() -> None:
    """torchrun ends every rank as soon as one has failed; one that has failed too closes its record first."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def print_errors(program: str, error: Exception, environ: Mapping[str, str]) -> None:
    """A line on stderr for each problem.

    torchrun ends all ranks of a host as soon as one has left. What all of them have found is said by the
    first at once; the others speak only if they are still there after a while, with something of their own.
    """
    rank = environ.get("RANK", "0")
    if "TORCHELASTIC_RUN_ID" in environ and environ.get("LOCAL_RANK") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
    source = program if rank == "0" else f"{program}: rank {rank}"
    for line in str(error).splitlines():
        print(f"{source}: {line}", file=sys.stderr)


def hold(folder: str, refusal: str, shared: bool = False) -> int:
    """Lock the folder, made if it is not there, until the process ends or closes the returned handle.

    Raises InputError, beginning with `refusal`, if nothing can be written there or someone else holds it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        if not shared:
            tempfile.TemporaryFile(dir=folder).close()
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{refusal}: nothing can be written in {folder} ({error.strerror}); choose another "
                         "folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{refusal}: another run is under way in {folder}; wait for its end, or choose "
                         "another folder") from None
    except OSError:  # a file system without locks
        pass
    return handle


def machine_memory() -> int:
    """Bytes of memory that the machine has, or that its container may take."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        limits.append(int(file.read()))
    return min(limits)


def limit_memory() -> None:
    """Let an allocation beyond the machine's memory fail; else the system would kill the process later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (machine_memory(), hard))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, the host's or a GPU's, did not suffice."""
    words = "out of memory|allocate memory|ALLOC_FAILED|bad_alloc"
    said = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(said)


def ahead(items, depth: int):
    """Yield the items, computed up to `depth` ahead by a thread that ends with this generator.

    What is raised while computing an item is raised where that item is asked for.
    """
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        try:
            pending = deque(thread.submit(next, source, end) for _ in range(depth))
            while True:
                item = pending.popleft().result()
                if item is end:
                    return
                pending.append(thread.submit(next, source, end))
                yield item
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


class EventLog:
    """A log and a record, written together: each log line is the text form of an event.

    They are `path`.txt and `path`.json; the record's `status` is running, finished or failed. Where it is not
    active the calls write nothing.
    """

    def __init__(self, path: str, record: dict, active: bool):
        self.path = path
        self.record = record
        self.active = active

    def begin(self, lock: int) -> None:
        """Begin both files, under a lock that the end gives back; InputError if an earlier run has them."""
        self.lock = lock
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if os.path.exists(self.path + ".json"):
            os.close(lock)
            raise InputError(f"RUN_ID: {self.path}.json is the record of an earlier run; choose another "
                             "RUN_ID or remove it")
        # No buffer, so that a run that is killed leaves all it has said.
        self.file = open(self.path + ".txt", "wb", buffering=0)
        self.save()

    def event(self, kind: str, **fields) -> None:
        """Log and record one event. Floats appear as given; NaN and infinity, which JSON lacks, as text."""
        if not self.active:
            return
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                fields[name] = str(value)
        self.record["events"].append({"event": kind, **fields})
        self.write(" ".join([kind] + [f"{name}:{value}" for name, value in fields.items()]))

    def result(self, kind: str, **fields) -> None:
        """An event whose fields are also figures of the run: results[kind]."""
        self.record["results"][kind] = fields
        self.event(kind, **fields)
        self.save()

    def write(self, text: str) -> None:
        if not self.active:
            return
        try:
            self.file.write((text + "\n").encode(errors="backslashreplace"))
        except OSError as error:
            error.filename = self.path + ".txt"
            raise
        print(text)

    def save(self) -> None:
        if self.active:
            write_whole(self.path + ".json", (json.dumps(self.record, indent=1) + "\n").encode())

    def close(self, status: str, **fields) -> None:
        """Say how the run ended, in log and record, each even if the other cannot be written."""
        self.record["status"] = status
        try:
            self.event(status, **fields)
        finally:
            if self.active:
                self.save_end()
                self.file.close()
                os.close(self.lock)

    def save_end(self) -> None:
        """Save the record; on a full disk, which has no room for another, at least its status."""
        try:
            self.save()
        except OSError:
            with open(self.path + ".json", "r+b") as file:
                text = file.read()
                file.seek(0)
                file.write(text.replace(b'"status": "running",', b'"status": "failed", ', 1))
            if self.record["status"] == "finished":
                raise


class Console:
    """A stream that outlives its terminal, pipe or disk: the files matter, not the lines about them."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except OSError:
            # What is still in the stream's buffer goes where it cannot fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_console():
    """Decorates a program: whatever becomes of its standard streams, it goes on."""
    with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
        yield
