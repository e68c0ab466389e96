"""Many settings, one training run each: a queue over the GPUs of this machine and one table at its end.

    python tools/sweep.py RUNS.txt --out runs/rates [--base recipes/mini.env] [--gpus 0,1]

RUNS.txt has one run a line: NAME=value NAME=value. What stands behind a # is a comment. Commas make a grid:
MATRIX_LR=0.014,0.028 SEED=1,2 is four runs. A value in double quotes is one value, commas included. A line
wins over the base recipe, which wins over the environment.

Each run has a folder in --out with its record, its log and what it printed. A run that is finished is not run
again; one that failed or was cut off is, by the next call. RUNS.txt is read anew whenever a GPU is free, so
lines can be added meanwhile. The table is printed at the end and kept as table.md in --out.

Exit codes: 0 every run is finished, 1 some failed, 2 bad input, 130 interrupted.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from env_settings import InputError, read_recipe  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
ASSIGNMENT = re.compile(r'(?<!\S)([A-Z][A-Z0-9_]*)=("[^"]*"|[^\s"]*)(?!\S)')
OWN = {"RUN_ID", "ARTIFACT_DIR", "CUDA_VISIBLE_DEVICES"}
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_CLOSE = 30.0  # for an interrupted run to write its record


# --- What to run


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines without comments, empty ones left out, each behind its place FILE:NUMBER."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; name a file of NAME=value lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            found.append((f"{path}:{number}", line))
    return found


def parse_line(place: str, line: str) -> dict[str, str]:
    """The assignments of one line, values still in their quotes."""
    found = {}
    for name, value in ASSIGNMENT.findall(line):
        if name in OWN:
            raise InputError(f"{place}: {name} is the sweep's to set; remove it")
        if name in found:
            raise InputError(f"{place}: {name} is set twice; write {name}=a,b for one run with each value")
        found[name] = value
    rest = ASSIGNMENT.sub("", line).split()
    if rest:
        raise InputError(f"{place}: cannot read {rest[0]!r}; write NAME=value, the name in capitals")
    return found


def expand_grid(place: str, line: dict[str, str]) -> list[dict[str, str]]:
    """The settings of every combination of the values."""
    choices = []
    for name, value in line.items():
        values = [value.strip('"')] if value.startswith('"') else value.split(",")
        if len(values) > 1 and "" in values:
            raise InputError(f"{place}: {name}={value} has an empty value; remove a comma, or quote it all")
        choices.append(values)
    return [dict(zip(line, values)) for values in itertools.product(*choices)]


def read_runs(path: Path, base: dict[str, str]) -> list[dict[str, str]]:
    """The settings of every run that the file asks for, in its order, each once."""
    runs = []
    for place, line in read_lines(path):
        for settings in expand_grid(place, parse_line(place, line)):
            if base | settings not in runs:
                runs.append(base | settings)
    return runs


def read_base(path: Path) -> dict[str, str]:
    """The settings of a recipe file."""
    from train_gpt import Settings  # takes seconds, and most lists need no recipe

    return read_recipe(str(path), Settings)


def name_run(settings: dict[str, str], base: dict[str, str]) -> str:
    """The name of a run's folder: what it changes, and a digest of all its settings that makes it unique."""
    changes = [f"{name}_{value}" for name, value in settings.items() if base.get(name) != value]
    readable = re.sub(r"[^\w.]+", "_", "-".join(changes).lower())[:80]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{readable or 'base'}-{digest[:8]}"


# --- The queue


def load_json(path: Path) -> dict:
    """The file's content; empty if there is no such file or only half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_finished(folder: Path) -> bool:
    return load_json(folder / "run.json").get("status") == "finished"


def find_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES can be for one run; a single empty text where there is no GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    if shutil.which("nvidia-smi") is None:
        return [""]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split() or [""]


def start_run(folder: Path, settings: dict[str, str], gpu: str) -> subprocess.Popen:
    """Start a run in its emptied folder; in a session of its own, out of reach of the terminal's Ctrl-C."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"gpu": gpu, "settings": settings}, indent=1) + "\n")
    environment = os.environ | settings | {"RUN_ID": "run", "ARTIFACT_DIR": str(folder)}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, str(SCRIPT)], env=environment, stdin=subprocess.DEVNULL,
                                stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


class Queue:
    """What is to run, and what runs: one at a time on each GPU."""

    def __init__(self, path: Path, out: Path, base: dict[str, str], gpus: list[str]):
        self.path = path
        self.out = out
        self.base = base
        self.free = list(gpus)
        self.running: dict[subprocess.Popen, tuple[str, str, float]] = {}
        self.tried: set[str] = set()
        self.runs = read_runs(path, base)
        self.fault = ""  # what is wrong with the file now
        self.interrupted = False

    def interrupt(self, number, frame) -> None:
        """For signals."""
        self.interrupted = True

    def read_again(self) -> None:
        """Take over what the file says now. While it is faulty, the runs known so far go on."""
        try:
            self.runs = read_runs(self.path, self.base)
            self.fault = ""
        except InputError as error:
            if self.fault != str(error):
                print(f"sweep.py: {error}", file=sys.stderr, flush=True)
            self.fault = str(error)

    def start_next(self) -> None:
        """Start the first run that is neither finished nor tried, if there is one."""
        for settings in self.runs:
            name = name_run(settings, self.base)
            if name not in self.tried and not is_finished(self.out / name):
                gpu = self.free.pop(0)
                self.tried.add(name)
                self.running[start_run(self.out / name, settings, gpu)] = (name, gpu, time.monotonic())
                print(f"{name}: started on {'GPU ' + gpu if gpu else 'the CPU'}", flush=True)
                return

    def collect_ended(self) -> None:
        """Report what has ended and free its GPU."""
        for process in list(self.running):
            if process.poll() is not None:
                name, gpu, began = self.running.pop(process)
                self.free.append(gpu)
                end = "finished" if is_finished(self.out / name) else f"failed with code {process.returncode}"
                print(f"{name}: {end} after {time.monotonic() - began:.0f} s", flush=True)

    def stop(self) -> None:
        """End what runs. On SIGTERM train_gpt.py closes its record."""
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_CLOSE
        for process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def work(self) -> None:
        """Run until nothing is left, or until a signal."""
        while not self.interrupted:
            self.collect_ended()
            before = len(self.running)
            if self.free:
                self.read_again()
                self.start_next()
            if not self.running:
                return
            if len(self.running) == before:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        self.stop()


# --- The table


def explain_failure(folder: Path) -> str:
    """Why the run of this folder is not finished, in a few words."""
    if not folder.exists():
        return "not run"
    for event in load_json(folder / "run.json").get("events", []):
        if event["event"] == "failed":
            return f"failed: {event['error'].splitlines()[0]}"
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    printed = [line.strip() for line in lines if line.strip()]
    return f"cut off or failed: {printed[-1] if printed else 'it printed nothing'}"


def show_setting(name: str, settings: dict[str, str], record: dict) -> str:
    """The value that the run was given, else the default that it had, in brackets."""
    if name in settings:
        return settings[name]
    default = record.get("settings", {}).get(name.lower(), "")
    return f"({default})" if default != "" else ""


def show_figures(record: dict) -> list[str]:
    """Steps, tokens/s, the four scores and the seconds of a record; empty where it has none."""
    results = record.get("results", {})
    cells = ["", ""]
    if results.get("training", {}).get("seconds"):
        training = results["training"]
        cells = [f"{training['steps']:,}", f"{training['tokens'] / training['seconds']:,.0f}"]
    for stage in ("raw", "averaged", "quantized", "ttt"):
        cells.append(f"{results[stage]['val_bpb']:.5f}" if stage in results else "")
    ends = [event for event in record.get("events", []) if event["event"] == "finished"]
    cells.append(f"{ends[0]['seconds']:.0f}" if ends else "")
    return cells


def make_table(runs: list[dict[str, str]], out: Path, base: dict[str, str]) -> str:
    """The settings that differ between the runs and what came out, as Markdown."""
    names = list(dict.fromkeys(name for settings in runs for name in settings))
    differing = [name for name in names if len({settings.get(name) for settings in runs}) > 1]
    figures = ["steps", "tokens/s", "raw", "averaged", "quantized", "final", "seconds"]
    rows = [[*differing, "GPU", *figures, "note"]]
    rows.append(["---"] * len(rows[0]))
    for settings in runs:
        folder = out / name_run(settings, base)
        record = load_json(folder / "run.json")
        note = "" if is_finished(folder) else explain_failure(folder).replace("|", "\\|")
        cells = [show_setting(name, settings, record) for name in differing]
        rows.append([*cells, load_json(folder / "sweep.json").get("gpu", ""), *show_figures(record), note])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# --- Main


def hold_folder(out: Path) -> int:
    """Keep other sweeps out of the folder until the returned handle is closed."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{out}: a sweep is under way in it; add to its file, or change --out") from None
    except OSError:  # a file system without locks
        pass
    return handle


def run_sweep(queue: Queue) -> int:
    """Work the queue off and write its table; returns the exit code."""
    handle = hold_folder(queue.out)
    previous = {number: signal.signal(number, queue.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        queue.work()
        table = make_table(queue.runs, queue.out, queue.base)
        (queue.out / "table.md").write_text(table, encoding="utf-8")
        print(table, end="", flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(handle)
    if queue.interrupted:
        return 130
    if queue.fault:
        return 2
    done = [is_finished(queue.out / name_run(settings, queue.base)) for settings in queue.runs]
    return 0 if all(done) else 1


def main(arguments: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", type=Path, metavar="RUNS.txt", help="one run or grid a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs' folders and the table")
    parser.add_argument("--base", type=Path, help="recipe that every run starts from")
    parser.add_argument("--gpus", help="their indices, comma separated; default: all")
    options = parser.parse_args(arguments)
    gpus = options.gpus.split(",") if options.gpus else find_gpus()
    try:
        base = read_base(options.base) if options.base else {}
        return run_sweep(Queue(options.runs, options.out.resolve(), base, gpus))
    except InputError as error:
        for line in str(error).splitlines():
            print(f"sweep.py: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
