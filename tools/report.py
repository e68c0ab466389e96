"""One page about one run or several, from the records that train_gpt.py writes.

    python tools/report.py [RECORD.json or FOLDER ...] [--out report]

Records are the JSON files that a run leaves (without arguments: those in logs/). Of a folder, every *.json
in it that is a record counts, and those of the seeds that `run.sh RECIPE SEED...` left there. The folder
given by --out receives report.html, which holds all its images and needs no network, and the same images as
report_*.png. Runs that failed or have not ended are shown as far as they came. What a record does not hold is
left out and named. The same records give the same page.

Exit code 2 with one line on stderr for bad input; --out is then left as it was. Needs matplotlib.
"""
import argparse
import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import os
import re
import shutil
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# In a submission train_gpt.py is packed, and source/ has the modules.
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]

# Colours of runs, which the colour-blind can tell apart; used up, they return with the next dash.
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#4d4d4d"
DASHES = "-", "--", ":", "-."
LOST = "–"  # stands where a record has no such figure

STAGES = (  # name, result of the record, its field
    ("raw", "raw", "val_bpb"),
    ("averaged", "averaged", "val_bpb"),
    ("quantized", "quantized", "val_bpb"),
    ("TTT, no tilt", "ttt", "untilted_bpb"),
    ("TTT, tilted", "ttt", "val_bpb"),
)
# "TTT" is the last stage where the record does not tell the tilt apart.
STAGE_NAMES = [name for name, *_ in STAGES] + ["TTT"]
TIMES = {
    "warm-up, compilation": "#c6dbef",
    "training": "#3b75af",
    "calibration": "#9ac5e8",
    "quantization": "#f4a259",
    "quantization, packing": "#dd8452",
    "packing, check": "#ffdd9e",
    "evaluation": "#8fce9b",
    "test-time training": "#2f8f5b",
    "rest": "#d9d9d9",
}
ROLES = {  # by the name of a matrix within its block
    "tok_emb": "embedding",
    "attn.c_q": "attention q",
    "attn.c_k": "attention k",
    "attn.c_v": "attention v",
    "attn.proj": "attention out",
    "mlp.fc": "MLP up",
    "mlp.proj": "MLP down",
}
CLASSES = {
    "embedding": "#f4a259",
    "attention q": "#c6dbef",
    "attention k": "#9ac5e8",
    "attention v": "#6ea6d6",
    "attention out": "#3b75af",
    "MLP up": "#8fce9b",
    "MLP down": "#2f8f5b",
    "other matrices": "#e6b8d4",
    "rest": "#d9d9d9",
    "code": "#595959",
}
# Settings of older records that changed the schedules, at the only values train_gpt.schedule still follows.
GONE = dict(lr_warmup_steps=0, warmdown_iters=0, midrun_cap_schedule="", train_seq_schedule_mode="wallclock")
# Settings that the schedules follow.
NEEDED = "max_wallclock_seconds", "iterations", "warmdown_frac", "min_lr", "train_seq_len"
# Settings in which the runs of one experiment may differ.
OWN = "seed", "run_id", "artifact_dir", "rank", "local_rank"
# Names of runs that nobody chose: time and process, or those of run.sh.
GIVEN_ID = re.compile(r"\d{8}_\d{6}_\d+|(?:train|eval)_seed\d+")


class InputError(Exception):
    """Something the user gave is wrong: one line that names it and the remedy."""


# --- Records ------------------------------------------------------------------------------------------------


def finite(value):
    """`value` if it is a number that can be drawn, else None, as for NaN in words or a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Infinity and the like would spoil an axis.
    return value if abs(value) < 1e15 else None


def plain(value, most: int = 300) -> str:
    """`value` in one line of printable characters, at most `most`; the middle of longer text is left out."""
    printable = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(printable.split())
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[:most - end - 1]}…{text[-end:]}"


@dataclass(eq=False)
class Run:
    """One record. number: its place in the report, which gives its colour; label: its name there, unique."""

    path: Path
    record: dict
    number: int = 0
    label: str = ""

    def result(self, kind: str) -> dict:
        """results[kind], empty if the record has none."""
        results = self.record.get("results")
        result = results.get(kind) if isinstance(results, dict) else None
        return result if isinstance(result, dict) else {}

    def figure(self, kind: str, name: str):
        """results[kind][name] if that is a number, else None."""
        return finite(self.result(kind).get(name))

    def events(self, kind: str, *names: str) -> list[dict]:
        """The events of this kind in which all the fields `names` are numbers."""
        events = [event for event in self.record["events"] if isinstance(event, dict)]
        return [event for event in events
                if event.get("event") == kind and all(finite(event.get(name)) is not None for name in names)]

    @property
    def settings(self) -> dict:
        return self.record["settings"]

    @property
    def run_id(self) -> str:
        return plain(self.record.get("run_id") or self.path.stem, 80)

    @property
    def status(self) -> str:
        status = plain(self.record.get("status", "unknown"), 60)
        if status == "running":
            return "running: no end recorded"
        if status == "failed":
            errors = [event.get("error") for event in self.events("failed")]
            return "failed: " + plain(errors[0] if errors else "no reason recorded")
        return status

    @property
    def machine(self) -> str:
        machine = self.record.get("machine")
        parts = []
        if isinstance(machine, dict):
            if "device" in machine:
                parts.append(f"{machine.get('devices', 1)} × {machine['device']}")
            if "torch" in machine:
                parts.append(f"torch {machine['torch']}")
        return plain(", ".join(parts), 120)

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.number // len(COLOURS) % len(DASHES)]


def read_record(path: Path):
    """What the JSON file holds; InputError if it cannot be read."""
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; name run records, the .json files beside a "
                         "run's log, or folders that hold some") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: no JSON, perhaps cut short; remove it or copy it again") from None


def is_run_record(record) -> bool:
    if not isinstance(record, dict):
        return False
    return isinstance(record.get("settings"), dict) and isinstance(record.get("events"), list)


def own_name(run: Run) -> str:
    """The run_id; recipe and seed where run.sh or the clock chose that; runs/RECIPE holds its runs."""
    folder = Path(str(run.settings.get("artifact_dir", "")))
    recipe = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    if not recipe or not GIVEN_ID.fullmatch(run.run_id):
        return run.run_id
    return plain(f"{recipe}, seed {run.settings.get('seed')}", 80)


def name_runs(runs: list[Run]) -> None:
    """Label runs; where several share a name, the file's name and then a number tell them apart."""
    names = [own_name(run) for run in runs]
    for run, name in zip(runs, names):
        run.label = name if names.count(name) == 1 else f"{name} ({plain(run.path.stem, 60)})"
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += f" #{run.number + 1}"


def read_records(paths: list[str]) -> tuple[list[Run], int]:
    """The runs in these files and folders, each file once, and how many other JSON files the folders hold."""
    named: dict[Path, bool] = {}  # whether the user named the file itself
    for path in map(Path, paths):
        if not path.is_dir():
            named[path] = True
            continue
        # The second pattern is what `run.sh RECIPE SEED...` leaves.
        for file in (*sorted(path.glob("*.json")), *sorted(path.glob("seed*/train_*.json"))):
            named.setdefault(file, False)
    runs = []
    others = 0
    seen = set()
    for path, by_name in named.items():
        record = read_record(path)
        if not is_run_record(record):
            if by_name:
                raise InputError(f"{path}: no run record, which has settings and events; name a .json file "
                                 "that train_gpt.py wrote beside a log")
            others += 1
        elif path.resolve() not in seen:  # else the same file by another path
            seen.add(path.resolve())
            runs.append(Run(path, record, len(runs)))
    if not runs:
        raise InputError(f"{', '.join(paths)}: no run record in there; name .json files that train_gpt.py "
                         "wrote, or folders that hold some")
    name_runs(runs)
    return runs, others


# --- What the sections show ---------------------------------------------------------------------------------


def stages(run: Run) -> list[tuple[str, float]]:
    """(stage, bits per byte) in the order of the run; what was not measured is missing."""
    found = [(name, run.figure(kind, figure)) for name, kind, figure in STAGES]
    untilted = found[3][1]
    tilted = found[4][1]
    if untilted is None or run.settings.get("ngram_tilt_enabled") is False:
        found[3:] = [("TTT", tilted)]
    return [(name, value) for name, value in found if value is not None]


def tilt_gain(run: Run):
    """Bits per byte that the n-gram tilt takes off, None without it."""
    values = dict(stages(run))
    if "TTT, no tilt" not in values or "TTT, tilted" not in values:
        return None
    return values["TTT, no tilt"] - values["TTT, tilted"]


def times(run: Run) -> tuple[dict[str, float], float | None, bool]:
    """Seconds by what they went into, seconds in all (None: unknown), and whether these are the whole run's.

    A run that failed has no total; then what the process had lived at the end of test-time training stands
    for it. With a total the parts sum up to it: what no event tells is the rest.
    """
    def total(*figures):
        return sum(seconds for seconds in figures if seconds is not None and seconds > 0)

    def spent(kind):
        return total(*(event["seconds"] for event in run.events(kind, "seconds")))

    training = run.figure("training", "seconds")
    calibration = run.figure("training", "calibration_seconds")
    packing = run.figure("artifact", "packing_seconds")
    unpacking = run.figure("artifact", "unpacking_seconds")
    evaluations = [run.figure(kind, "seconds") for kind in ("raw", "averaged", "quantized")]
    parts = {
        "warm-up, compilation": spent("warmup"),
        "training": total(training),
        "calibration": total(calibration, spent("calibration")),
        "quantization": total(run.figure("artifact", "quantization_seconds")),
        # Older records have one figure for both.
        "quantization, packing": total(run.figure("artifact", "seconds")),
        "packing, check": total(packing, unpacking),
        "evaluation": total(*evaluations, spent("val")),
        "test-time training": total(run.figure("ttt", "seconds")),
    }
    ends = [event["seconds"] for event in run.events("finished", "seconds")]
    seconds = ends[0] if ends else run.figure("ttt", "process_seconds")
    if seconds is not None:
        parts["rest"] = seconds - sum(parts.values())
    return {name: part for name, part in parts.items() if part > 0}, seconds, bool(ends)


def byte_shares(run: Run) -> dict[str, int]:
    """Bytes by class of tensor; nothing if the record has no matrices.

    A matrix counts what its integers need at their entropy. The rest of the artifact is scales, small
    tensors, the header and what the coder takes above (or, negative, saves below) that entropy.
    """
    matrices = run.events("matrix", "bytes")
    if not matrices:
        return {}
    shares = dict.fromkeys(CLASSES, 0)
    for event in matrices:
        name = str(event.get("name", ""))
        if name.startswith("blocks."):
            name = name.split(".", 2)[-1]  # blocks.3.attn.c_q: attn.c_q
        shares[ROLES.get(name, "other matrices")] += event["bytes"]
    artifact = run.figure("size", "artifact_bytes")
    if artifact:
        shares["rest"] = artifact - sum(shares.values())
    shares["code"] = run.figure("size", "code_bytes") or 0
    return {name: count for name, count in shares.items() if count}


class Schedule(NamedTuple):
    """What a run did in its steps, (steps,) arrays. recorded: which of them the record has a line about."""

    progress: np.ndarray
    multiplier: np.ndarray
    context: np.ndarray
    recorded: np.ndarray


def recorded_settings(run: Run, known: type):
    """The settings as `known`, train_gpt's class; None if the run followed another version's schedules."""
    if any(finite(run.settings.get(name)) is None for name in NEEDED):
        return None
    if any(run.settings.get(name, value) != value for name, value in GONE.items()):
        return None
    given = {}
    for field in dataclasses.fields(known):
        if field.name not in run.settings:
            continue
        value = run.settings[field.name]
        kind = type(field.default)
        # JSON may give a whole number for a float.
        if not isinstance(value, (int, float) if kind is float else kind):
            return None
        if kind in (int, float) and finite(value) is None:
            return None
        given[field.name] = value
    s = known(**given)
    try:
        s.context_stages, s.batch_stages
    except ValueError:  # a schedule in another notation
        return None
    return s if s.iterations >= 1 else None


def timed_progress(run: Run, at: np.ndarray, last: int, batch_tokens: int, budget: float) -> np.ndarray:
    """Progress at the start of the steps `at` under a time cap, interpolated where it is not recorded."""
    known = {}
    for event in run.events("step", "step", "seconds"):
        pace = finite(event.get("tokens_per_second")) or 0
        length = batch_tokens / pace if pace > 0 else event["seconds"]
        # Step lines count from 1 and tell when a step ended.
        start = max(0.0, event["seconds"] - length)
        known[event["step"] - 1] = start / budget
    seconds = run.figure("training", "seconds")
    if seconds:
        known[last] = seconds / budget
    # These events record the progress itself, which is exact.
    for kind in ("looping", "context", "step_tokens"):
        for event in run.events(kind, "step", "progress"):
            known[event["step"]] = event["progress"]
    steps = sorted(known)
    # Rounded times may run backwards; progress does not.
    progress = np.maximum.accumulate([known[step] for step in steps])
    return np.interp(at, steps, progress).clip(0, 1)


def schedule(run: Run) -> Schedule | str:
    """Learning rate's factor and context length of every step, or of 5,000, by train_gpt's own function.

    Returns why not in a word or two where the record does not allow it.
    """
    try:
        import train_gpt
    except ImportError as error:
        return f"train_gpt.py needs {error.name}"
    s = recorded_settings(run, train_gpt.Settings)
    if s is None:
        return "settings of another version"
    steps = [event["step"] for event in run.events("step", "step", "seconds")]
    if not steps:
        return "no steps"
    # A run that did not finish training has no count of its steps, but lines about them.
    last = int(max(run.figure("training", "steps") or 0, *steps))
    recorded = [step - 1 for step in steps]
    evenly = np.linspace(0, last - 1, min(last, 5000)).round()
    at = np.unique(np.concatenate((evenly, recorded))).astype(int)
    if s.max_wallclock_seconds > 0:
        reserves = [event["reserve_seconds"] for event in run.events("warmup", "reserve_seconds")]
        # The warm-up records what was really held back for quantization.
        budget = s.max_wallclock_seconds - (reserves[0] if reserves else s.gptq_reserve_seconds)
        if budget <= 0:
            return "no time to train"
        progress = timed_progress(run, at, last, s.train_batch_tokens, budget)
    else:
        progress = at / s.iterations
    changes = [event["step"] for event in run.events("context", "step", "progress")]
    moments = []
    for step, share in zip(at.tolist(), progress.tolist()):
        context_start = max([change for change in changes if change <= step], default=0)
        moments.append(train_gpt.schedule(share, step, context_start, s))
    multiplier = np.array([now.lr_factor for now in moments])
    context = np.array([now.context for now in moments])
    return Schedule(progress, multiplier, context, recorded=np.isin(at, recorded))


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Runs of several seeds that share all other settings."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name not in OWN}
        # As text, since a setting may be anything that JSON holds.
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    found = []
    for group in groups.values():
        seeds = {str(run.settings.get("seed")) for run in group}
        if len(seeds) > 1:
            found.append(group)
    return found


# --- Figures ------------------------------------------------------------------------------------------------
# Each is drawn twice, for wide windows and for telephones; lengths in inches.


def canvas(narrow: bool, height: float, labels: int = 0, legend_columns: int = 1):
    """A figure with room for `height` of panels and a legend of so many labels below."""
    from matplotlib.figure import Figure

    width = 3.7 if narrow else 10.5
    if labels:
        rows = -(-labels // legend_columns)
        height += 0.19 * rows + 0.1
    return Figure(figsize=(width, height), layout="constrained")


def run_canvas(narrow: bool, height: float, runs: list[Run]):
    """A canvas with room for the legend of run_legend."""
    labels = len(runs) if len(runs) > 1 else 0
    return canvas(narrow, height, labels, legend_columns(runs, narrow))


def png(figure, narrow: bool) -> tuple[bytes, int, int]:
    """The figure as PNG, its width and its height in pixels."""
    buffer = io.BytesIO()
    dpi = 220 if narrow else 150  # telephones have finer pixels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        # No "Software": matplotlib's version would be in it.
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    width, height = figure.get_size_inches()
    return buffer.getvalue(), round(width * dpi), round(height * dpi)


def tidy(axes, title: str = "") -> None:
    for side in "top", "right":
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def short(run: Run, narrow: bool) -> str:
    return plain(run.label, 26 if narrow else 48)


def legend_columns(runs: list[Run], narrow: bool) -> int:
    """As many as the longest name leaves room for."""
    longest = max(len(short(run, narrow)) for run in runs)
    room = 3.5 if narrow else 10
    fitting = int(room / (0.65 + 0.075 * longest))
    return max(1, min(len(runs), fitting))


def run_legend(figure, runs: list[Run], narrow: bool) -> None:
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=run.colour, linestyle=run.dash, linewidth=2.5) for run in runs]
        names = [" " + short(run, narrow) for run in runs]
        columns = legend_columns(runs, narrow)
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.2)


def draw_loss(runs: list[Run], limits: tuple[float, float], narrow: bool):
    """Training loss (limits: its axis) over steps and over seconds."""
    figure = run_canvas(narrow, 4.6 if narrow else 3.4, runs)
    rows, columns = (2, 1) if narrow else (1, 2)
    # The loss at the same height in both, so that they read as one picture.
    panels = figure.subplots(rows, columns, sharey=True)
    for axes, name, unit in zip(panels, ("step", "seconds"), ("step", "seconds of training")):
        for run in runs:
            steps = run.events("step", name, "train_loss")
            places = [event[name] for event in steps]
            losses = [event["train_loss"] for event in steps]
            axes.plot(places, losses, run.dash, color=run.colour, linewidth=1.5, marker="o", markersize=3.5)
        axes.set(xlabel=unit, ylim=limits)
        tidy(axes)
    for axes in panels if narrow else panels[:1]:
        axes.set_ylabel("training loss, nats per token")
    run_legend(figure, runs, narrow)
    return figure


def loss_limits(runs: list[Run]) -> tuple[float, float]:
    """The axis of losses shows all of them but those of a run's first 2 %, which would flatten the rest."""
    losses = []
    for run in runs:
        steps = run.events("step", "step", "seconds", "train_loss")
        end = steps[-1]
        late = [event["train_loss"] for event in steps if event["step"] > 0.02 * end["step"]]
        losses += late or [end["train_loss"]]
    low = min(losses)
    high = max(losses)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def draw_schedule(runs: list[Run], schedules: dict[int, Schedule], narrow: bool):
    """Learning-rate multiplier above, context length below, over progress; schedules by the runs' numbers."""
    figure = run_canvas(narrow, 4.8 if narrow else 4.6, runs)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    starts = []
    lengths = set()
    for index, run in enumerate(runs):
        found = schedules[run.number]
        lengths.update(found.context.tolist())
        # Of a few runs the first lie broad under the later ones, so that equal curves all show.
        width = 1.5 + 1.3 * (len(runs) - 1 - index) if len(runs) <= 4 else 1.6
        style = dict(color=run.colour, linestyle=run.dash, linewidth=width)
        top.plot(found.progress, found.multiplier, **style)
        top.plot(
            found.progress[found.recorded], found.multiplier[found.recorded], "o",
            color=run.colour, markersize=width + 3, markeredgecolor="white", markeredgewidth=0.7)
        bottom.plot(found.progress, found.context, drawstyle="steps-post", **style)
        for event in run.events("looping", "progress")[:1]:
            starts.append(event["progress"])
            for axes in top, bottom:
                axes.axvline(event["progress"], color=run.colour, linestyle=(0, (4, 3)), linewidth=1)
    longest = max(lengths)
    ticks = sorted(lengths) if len(lengths) <= 5 else np.linspace(0, longest, 5).round()
    top.set(ylabel="learning-rate multiplier", ylim=(0, None))
    bottom.set(
        xlabel="progress (share of the training time, or of the steps)", xlim=(-0.02, 1.02),
        ylabel="context, tokens", ylim=(0, 1.15 * longest), yticks=ticks)
    for axes in top, bottom:
        tidy(axes)
    if starts:
        place = (min(starts), 0)
        top.annotate(
            "looping starts", place, (4, 5), textcoords="offset points", fontsize="small", color="#444")
    run_legend(figure, runs, narrow)
    return figure


class Bar(NamedTuple):
    """A stacked bar. total: what stands at its right, in words."""

    name: str
    parts: dict[str, float]
    total: str


def text_colour(ground: str) -> str:
    """White on a dark ground, given as #rrggbb, else nearly black."""
    red, green, blue = bytes.fromhex(ground[1:])
    brightness = 0.3 * red + 0.59 * green + 0.11 * blue
    return "white" if brightness < 140 else "#222"


def draw_stacks(bars: list[Bar], colours: dict[str, str], unit: str, bound: float | None, narrow: bool):
    """Horizontal stacked bars, of seconds with a decimal; bound: where a line is drawn, if any."""
    from matplotlib.patches import Patch

    used = [name for name in colours if any(bar.parts.get(name, 0) > 0 for bar in bars)]
    columns = 2 if narrow else min(5, len(used))
    figure = canvas(narrow, 0.6 + 0.62 * len(bars), len(used), columns)
    axes = figure.subplots()
    # A negative rest has no length; the table shows it.
    lengths = [sum(part for part in bar.parts.values() if part > 0) for bar in bars]
    reach = 1.02 * max(bound or 0, 1e-3, *lengths)
    letter = reach * 0.07 / (3.2 if narrow else 9.8)  # its width
    digits = 1 if unit == "seconds" else 0
    for y, bar in enumerate(bars):
        at = 0.0
        for part in used:
            share = max(0, bar.parts.get(part, 0))
            ground = colours[part]
            axes.barh(y, share, left=at, height=0.46, color=ground, edgecolor="white", linewidth=0.6)
            text = f"{share:,.{digits}f}" if share < 1e6 else f"{share / 1e6:.2f}M"
            if share > letter * (len(text) + 1):  # the number fits in
                axes.text(
                    at + share / 2, y, text, ha="center", va="center", fontsize="x-small",
                    color=text_colour(ground))
            at += share
        above = dict(xytext=(0, 1), textcoords="offset points", va="bottom")
        name = plain(bar.name, 28 if narrow else 60)
        total = plain(bar.total, 40 if narrow else 80)
        axes.annotate(name, (0, y - 0.27), fontsize="small", fontweight="bold", **above)
        axes.annotate(
            total, (1, y - 0.27), xycoords=("axes fraction", "data"), ha="right",
            fontsize="x-small" if narrow else "small",
            bbox=dict(facecolor="white", edgecolor="none", pad=1), **above)
    if bound:
        axes.axvline(bound, color="#a00", linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set(xlim=(0, reach), ylim=(len(bars) - 0.6, -0.75), yticks=[], xlabel=unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if reach > 2e6 else f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=4 if narrow else 8)
    tidy(axes)
    axes.spines["left"].set_visible(False)
    patches = [Patch(color=colours[name]) for name in used]
    figure.legend(
        patches, used, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.2)
    return figure


def draw_steps(axes, run: Run, left: float) -> None:
    """A bar for each stage: the first and the last reach from `left`, all others show their change alone."""
    found = stages(run)
    last = len(found) - 1
    before = found[0][1]
    for y, (_, value) in enumerate(found):
        if y in (0, last):
            alpha = 0.45 if y else 0.85
            axes.barh(y, value - left, left=left, height=0.66, color=run.colour, alpha=alpha, linewidth=0)
        label = f"{value:.5f}"
        if y:
            change = value - before
            label += f" ({change:+.5f})"
            edge, hatch = ("white", "////") if change > 0 else (run.colour, "")
            axes.barh(
                y, change, left=before, height=0.66, color=run.colour, linewidth=0, edgecolor=edge,
                hatch=hatch)
            axes.plot([before, before], [y - 1.33, y + 0.33], color="#666", linewidth=0.7)
        place = (max(value, before), y)
        axes.annotate(label, place, (3, 0), textcoords="offset points", va="center", fontsize="small")
        before = value
    axes.set_yticks(range(len(found)), [name for name, _ in found])


def draw_waterfall(runs: list[Run], narrow: bool):
    """A panel per run with the bits per byte of its stages."""
    if narrow or len(runs) == 1:
        columns = 1
    elif len(runs) in (2, 4, 6):
        columns = 2
    else:
        columns = 3
    rows = -(-len(runs) // columns)
    slim = narrow or columns == 3  # a panel is
    found = [stages(run) for run in runs]
    tall = max(map(len, found))
    figure = canvas(narrow, rows * (0.75 + 0.25 * tall))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, run, (low, high) in zip(panels, runs, waterfall_ends(found)):
        span = max(high - low, 0.002)
        left = low - 0.12 * span
        right = high + (1.15 if slim else 0.55) * span  # room for the labels
        draw_steps(axes, run, left)
        # Two strokes through the axis: it is cut.
        for x in 0.012, 0.026:
            axes.plot(
                [x, x + 0.012], [-0.035, 0.035], transform=axes.transAxes, color="#333", linewidth=1,
                clip_on=False)
        cut = f"val_bpb, axis cut at {left:.3f}, not from 0"
        axes.set(xlim=(left, right), ylim=(tall - 0.4, -0.6), xlabel=cut)
        axes.locator_params(axis="x", nbins=4 if columns > 1 or narrow else 8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3f}")
        tidy(axes, short(run, slim) if len(runs) > 1 else "")
    for axes in panels[len(runs):]:
        axes.set_visible(False)
    return figure


def waterfall_ends(found: list[list[tuple[str, float]]]) -> list[tuple[float, float]]:
    """Least and greatest val_bpb of each run's axis.

    All runs share one axis, unless some run's changes would then be too small to see.
    """
    most = max(map(len, found))
    ends = []
    spans = []
    for stage in found:
        values = [value for _, value in stage]
        low = min(values)
        high = max(values)
        ends.append((low, high))
        # One change alone may be small, so that a run of two stages has no say among longer ones.
        if len(stage) > 2 or len(stage) == most:
            spans.append(high - low)
    lowest = min(low for low, _ in ends)
    highest = max(high for _, high in ends)
    if highest - lowest <= 5 * min(spans):
        return [(lowest, highest)] * len(found)
    return ends


class SeedFigures(NamedTuple):
    """val_bpb of a stage, of each run or None, with the mean and the sample standard deviation."""

    stage: str
    values: list
    mean: float
    deviation: float


def seed_figures(group: list[Run]) -> list[SeedFigures]:
    """The figures of the stages that two runs have reached."""
    values = [dict(stages(run)) for run in group]
    rows = []
    for name in STAGE_NAMES:
        column = [found.get(name) for found in values]
        reached = [value for value in column if value is not None]
        if len(reached) > 1:
            rows.append(SeedFigures(name, column, statistics.mean(reached), statistics.stdev(reached)))
    return rows


def draw_seeds(groups: list[list[Run]], narrow: bool):
    """A panel per experiment: a stage's runs as dots around their mean, one standard deviation shaded."""
    tall = [len(seed_figures(group)) for group in groups]
    figure = canvas(narrow, sum(0.75 + 0.3 * count for count in tall))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=tall).ravel()
    for axes, group in zip(panels, groups):
        figures = seed_figures(group)
        for y, row in enumerate(figures):
            axes.barh(y, 2e3 * row.deviation, left=-1e3 * row.deviation, height=0.6, color="#ddd")
            for run, value in zip(group, row.values):
                if value is None:
                    continue
                x = 1e3 * (value - row.mean)
                axes.plot(x, y, "o", color=run.colour, markersize=6, markeredgecolor="white")
                if not narrow:  # the table has them
                    seed = plain(run.settings.get("seed"), 12)
                    axes.annotate(
                        seed, (x, y), (0, 6), ha="center", textcoords="offset points", fontsize="xx-small",
                        color="#444")
        axes.axvline(0, color="#666", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set(ylim=(len(figures) - 0.4, -0.7), xlabel="thousandths of val_bpb from the mean of the seeds")
        axes.set_yticks(range(len(figures)), [row.stage for row in figures])
        several = len(groups) > 1 and not narrow
        tidy(axes, ", ".join(short(run, True) for run in group) if several else "")
    return figure


# --- The page -----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #57606a; --ground: #fff; --soft: #f4f6f8;
  --line: #d0d7de; --link: #0b5cad; --bad: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #a3adb8; --ground: #14181d;
  --soft: #1e242b; --line: #3a434d; --link: #7db8f5; --bad: #ff8f98 } }
body { margin: 0 auto; max-width: 74rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem;
  background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p { max-width: 50rem; margin: .5rem 0 } .note { color: var(--dim); font-size: .9rem }
.bad { color: var(--bad) }
a { color: var(--link) } nav a { margin-right: 1rem; display: inline-block; padding: .15rem 0 }
figure { margin: .75rem 0 } picture { display: block }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; box-sizing: border-box; padding: .4rem; margin: 0 auto }
@media (max-width: 760px) { img { max-width: 34rem } }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line);
  border-radius: 6px; margin: .5rem 0 }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--dim); padding: .35rem .6rem; caption-side: bottom }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  min-width: 7.5rem }
thead th { background: var(--soft); max-width: 14rem } td { max-width: 18rem } data { white-space: nowrap }
th[scope=row], th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0;
  background: var(--soft); min-width: 5.5rem; max-width: 12rem }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--link) }
"""
# What a browser made of the page, for whoever opens it by program: images decoded, pixels it is too wide.
SCRIPT = """addEventListener("load", () => { const page = document.documentElement;
document.body.dataset.images = [...document.images].filter(image => image.naturalWidth > 0).length;
document.body.dataset.overflow = page.scrollWidth - page.clientWidth })"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"


def cell(value, form: str = ",", after: str = "") -> str:
    """A number as formatted, with the exact one in the markup."""
    if value is None:
        return LOST
    return f'<data value="{value!r}">{value:{form}}</data>{html.escape(after)}'


def table(caption: str, head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table of HTML cells, in `head` and in each row the first column's included; the caption is text."""
    title = html.escape(caption)
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>']
    lines.append(f"<caption>{title}</caption>")
    lines.append("<thead><tr>")
    for name in head:
        lines.append(f'<th scope="col">{name}</th>')
    lines.append("</tr></thead><tbody>")
    for name, cells in rows:
        columns = "".join(f"<td>{text}</td>" for text in cells)
        lines.append(f'<tr><th scope="row">{name}</th>{columns}</tr>')
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def heading(run: Run) -> str:
    return f'<span class="swatch" style="background:{run.colour}"></span>{html.escape(run.label)}'


def left_out(reasons: dict[str, str]) -> str:
    """A note on the runs, by label, that a section leaves out and why."""
    if not reasons:
        return ""
    text = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    return f'<p class="note">Left out: {html.escape(text)}.</p>'


def status_cell(run: Run) -> str:
    status = html.escape(run.status)
    return f'<span class="bad">{status}</span>' if run.status.startswith("failed") else status


def training_seconds(run: Run):
    """Training with calibration; older records have training alone."""
    seconds = run.figure("training", "clock_seconds")
    return run.figure("training", "seconds") if seconds is None else seconds


def total_seconds(run: Run):
    """None unless the record has the run's end."""
    _, seconds, whole = times(run)
    return seconds if whole else None


def differences(runs: list[Run]) -> str:
    """A section with the settings that are not the same in all runs; nothing for one run."""
    if len(runs) == 1:
        return ""
    names = {name for run in runs for name in run.settings} - {"run_id", "artifact_dir", "rank", "local_rank"}
    rows = []
    for name in sorted(names):
        values = [plain(run.settings.get(name, LOST)) or "empty" for run in runs]
        if len(set(values)) > 1:
            rows.append((html.escape(plain(name)), [html.escape(value) for value in values]))
    shown = "<p>All settings are the same.</p>"
    if rows:
        shown = table("Settings that are not the same in all runs", ["setting", *map(heading, runs)], rows)
    return ('<section id="differences" aria-labelledby="differences-title">'
            f'<h2 id="differences-title">What differs</h2>\n{shown}\n</section>')


def summary_table(runs: list[Run]) -> str:
    rows = [("status", [status_cell(run) for run in runs])]

    def add_text(name, texts):
        rows.append((name, [html.escape(plain(text)) or LOST for text in texts]))

    def add_figure(name, kind, key, form=","):
        rows.append((name, [cell(run.figure(kind, key), form) for run in runs]))

    def add_capped(name, kind, figure, form=","):
        cells = []
        for run in runs:
            over = run.result(kind).get("within_cap") is False
            cells.append(cell(figure(run), form, " over the cap" if over else ""))
        rows.append((name, cells))

    add_text("record", [run.path.name for run in runs])
    add_text("started", [run.record.get("started", "") for run in runs])
    add_text("seed", [run.settings.get("seed", "") for run in runs])
    add_text("machine", [run.machine for run in runs])
    add_figure("steps", "training", "steps")
    for phase in "plain", "looping":
        speeds = [run.figure("training", f"tokens_per_second_{phase}") for run in runs]
        # A phase that never ran has speed 0.
        rows.append((f"tokens/s {phase}", [cell(speed or None) for speed in speeds]))
    for name in "raw", "averaged", "quantized", "TTT":
        add_figure(f"val_bpb {name}", name.lower(), "val_bpb", ".5f")
    rows.append(("tilt gain", [cell(tilt_gain(run), ".5f") for run in runs]))
    add_capped("artifact + code, bytes", "size", lambda run: run.figure("size", "total_bytes"))
    add_figure("artifact", "size", "artifact_bytes")
    add_figure("code", "size", "code_bytes")
    add_capped("training seconds", "training", training_seconds, ",.1f")
    add_figure("plain evaluation seconds", "quantized", "seconds", ",.1f")
    add_figure("TTT evaluation seconds", "ttt", "seconds", ",.1f")
    rows.append(("seconds in all", [cell(total_seconds(run), ",.1f") for run in runs]))
    note = ("TTT: test-time training, its n-gram tilt included. Training counts calibration. "
            f"{LOST}: the record has no such figure.")
    figures = table("Figures of each run", ["run", *map(heading, runs)], rows)
    return f'{figures}<p class="note">{note}</p>'


class Picture(NamedTuple):
    """A figure as (PNG, width, height) for wide and narrow windows; text: the same in words."""

    name: str
    wide: tuple[bytes, int, int]
    narrow: tuple[bytes, int, int]
    text: str

    def markup(self) -> str:
        def attributes(source, picture):
            data, width, height = picture
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            return f'{source}="{url}" width="{width}" height="{height}"'

        narrow = attributes("srcset", self.narrow)
        wide = attributes("src", self.wide)
        return (f'<figure><picture><source media="(max-width: 760px)" {narrow}>'
                f'<img {wide} alt="{html.escape(self.text)}"></picture></figure>')


def drawn(name: str, text: str, draw, *arguments) -> Picture:
    """What draw(*arguments, narrow) draws, in both widths, with matplotlib's own defaults, not the user's."""
    import matplotlib

    pictures = []
    for narrow in False, True:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            size = 8 if narrow else 9.5
            matplotlib.rcParams.update({"font.size": size, "text.parse_math": False, "hatch.linewidth": 1.2})
            pictures.append(png(draw(*arguments, narrow), narrow))
    return Picture(name, *pictures, text)


class Section(NamedTuple):
    """What a section shows: nothing without a picture. lost: why it leaves out runs, by their labels."""

    lost: dict[str, str]
    picture: Picture | None = None
    note: str = ""
    table: str = ""


def loss_section(runs: list[Run]) -> Section:
    losses = {run.number: run.events("step", "step", "seconds", "train_loss") for run in runs}
    shown = [run for run in runs if losses[run.number]]
    lost = {run.label: "no training steps" for run in runs if run not in shown}
    if not shown:
        return Section(lost)
    ends = []
    for run in shown:
        end = losses[run.number][-1]
        ends.append(f"{run.label}: {end['train_loss']} in step {end['step']} after {end['seconds']} s")
    text = "Training loss over steps and over seconds. " + "; ".join(ends)
    limits = loss_limits(shown)
    highest = max(event["train_loss"] for run in shown for event in losses[run.number])
    note = "Losses of single batches; dots are the recorded steps."
    if highest > limits[1]:
        note += f" The axis ends at {limits[1]:.2f}; the first steps lie above it, up to {highest:.2f}."
    for run in runs:
        wild = len(run.events("step", "step", "seconds")) - len(losses[run.number])
        if wild:
            note += f" {run.label}: {wild} recorded losses are not finite."
    picture = drawn("loss", text, draw_loss, shown, limits)
    return Section(lost, picture, note)


def schedule_section(runs: list[Run]) -> Section:
    found = {run.number: schedule(run) for run in runs}
    shown = [run for run in runs if isinstance(found[run.number], Schedule)]
    lost = {run.label: found[run.number] for run in runs if run not in shown}
    if not shown:
        return Section(lost)
    parts = []
    for run in shown:
        s = found[run.number]
        lengths = " to ".join(str(length) for length, _ in itertools.groupby(s.context.tolist()))
        part = f"{run.label}: context {lengths} tokens, multiplier {s.multiplier[-1]:.3f} at the end"
        for event in run.events("looping", "progress")[:1]:
            part += f", looping from {event['progress']:.2f} on"
        parts.append(part)
    text = "Learning-rate multiplier and context length over progress. " + "; ".join(parts)
    note = ("Computed by train_gpt.py's functions from the recorded settings and clock, which is "
            "interpolated between the recorded steps (dots). Dashed: the start of looping.")
    picture = drawn("schedule", text, draw_schedule, shown, found)
    return Section(lost, picture, note)


def bars_in_words(bars: list[Bar], form: str) -> str:
    lines = []
    for bar in bars:
        parts = ", ".join(f"{name} {value:{form}}" for name, value in bar.parts.items())
        lines.append(f"{bar.name}: {bar.total}, of which {parts}")
    return "; ".join(lines)


def time_section(runs: list[Run]) -> Section:
    found = {run.number: times(run) for run in runs}
    shown = [run for run in runs if found[run.number][0]]
    lost = {run.label: "no times" for run in runs if run not in shown}
    if not shown:
        return Section(lost)
    bars = []
    totals = []
    partial = []
    for run in shown:
        parts, seconds, whole = found[run.number]
        total = "total not recorded" if seconds is None else f"{seconds:,.1f} s"
        if not whole and seconds is not None:
            total += " to the end of TTT"
        if not whole and seconds:
            partial.append(run.label)
        bars.append(Bar(run.label, parts, total))
        totals.append(seconds)
    rows = []
    for name in TIMES:
        cells = []
        for bar, seconds in zip(bars, totals):
            part = bar.parts.get(name)
            share = f" ({part / seconds:.1%})" if part and seconds else ""
            cells.append(cell(part, ",.1f", share))
        if any(name in bar.parts for bar in bars):
            rows.append((name, cells))
    rows.append(("in all", [cell(seconds, ",.1f") for seconds in totals]))
    text = "Seconds of each run by what they went into. " + bars_in_words(bars, ".1f")
    note = ("Rest: start, data, compilation of evaluation and test-time training, files. Evaluation: "
            "of the raw, averaged and quantized weights.")
    if partial:
        note += (f" The total of runs that did not finish ({', '.join(partial)}) is from the start of the "
                 "process to the end of test-time training.")
    figures = table("Seconds, and shares of the total where known", ["part", *map(heading, shown)], rows)
    picture = drawn("time", text, draw_stacks, bars, TIMES, "seconds", None)
    return Section(lost, picture, note, figures)


def waterfall_section(runs: list[Run]) -> Section:
    shown = [run for run in runs if stages(run)]
    lost = {run.label: "no val_bpb" for run in runs if run not in shown}
    if not shown:
        return Section(lost)
    lines = []
    for run in shown:
        values = ", ".join(f"{name} {value:.5f}" for name, value in stages(run))
        lines.append(f"{run.label}: {values}")
    text = "Bits per byte on the validation text after each stage. " + "; ".join(lines)
    note = ("Each axis starts near the values, not at 0. In brackets the change from the stage above; "
            "hatched: it got worse.")
    if len(set(waterfall_ends([stages(run) for run in shown]))) > 1:
        note += " The runs' axes differ."
    samples = [run.label for run in shown if run.result("ttt").get("whole_text") is False]
    if samples:
        note += (" Test-time training saw a sample of the documents and is no step from the others: "
                 f"{', '.join(samples)}.")
    found = [dict(stages(run)) for run in shown]
    rows = []
    for name in STAGE_NAMES:
        if any(name in values for values in found):
            rows.append((name, [cell(values.get(name), ".5f") for values in found]))
    figures = table("val_bpb after each stage", ["stage", *map(heading, shown)], rows)
    picture = drawn("bpb", text, draw_waterfall, shown)
    return Section(lost, picture, note, figures)


def bytes_section(runs: list[Run]) -> Section:
    shown = [run for run in runs if byte_shares(run)]
    lost = {run.label: "no matrices recorded" for run in runs if run not in shown}
    if not shown:
        return Section(lost)
    totals = [run.figure("size", "total_bytes") for run in shown]
    bars = []
    for run, total in zip(shown, totals):
        words = f"{total:,} bytes" if total else "size not recorded"
        bars.append(Bar(run.label, byte_shares(run), words))
    rows = []
    for name in CLASSES:
        if any(name in bar.parts for bar in bars):
            rows.append((name, [cell(bar.parts.get(name)) for bar in bars]))
    rows.append(("artifact + code", [cell(total) for total in totals]))
    text = "Bytes of artifact and code by class of tensor. " + bars_in_words(bars, ",")
    note = ("A matrix counts the entropy of its integers; rest: scales, small tensors, header, and what the "
            "coder takes above that entropy or, negative, saves.")
    bound = None
    cap = max(run.figure("size", "cap") or 0 for run in shown)
    if cap:
        longest = max(sum(bar.parts.values()) for bar in bars)
        if 0 < cap < 2 * longest:
            bound = cap
            note += f" Dashed: the cap of {cap:,} bytes."
        else:
            note += f" The cap, {cap:,} bytes, lies far to the right."
    figures = table("Bytes by class", ["class", *map(heading, shown)], rows)
    picture = drawn("bytes", text, draw_stacks, bars, CLASSES, "bytes", bound)
    return Section(lost, picture, note, figures)


def other_differences(group: list[Run]) -> str:
    """What else than the seed the runs differ in: "code", "machine", both or nothing."""
    codes = {str(event.get("sha256")) for run in group for event in run.events("code")}
    machines = {run.machine for run in group}
    kinds = []
    if len(codes) > 1:
        kinds.append("code")
    if len(machines) > 1:
        kinds.append("machine")
    return " and ".join(kinds)


def seeds_section(runs: list[Run]) -> Section:
    groups = [group for group in seed_groups(runs) if seed_figures(group)]
    if not groups:
        return Section({})
    tables = []
    lines = []
    note = "All other settings are equal"
    for group in groups:
        rows = []
        for stage, values, mean, deviation in seed_figures(group):
            rows.append((stage, [cell(value, ".5f") for value in (*values, mean, deviation)]))
            lines.append(f"{stage}: mean {mean:.5f}, sample standard deviation {deviation:.5f}")
        head = ["stage"]
        for run in group:
            seed = plain(run.settings.get("seed"), 20)
            head.append(f"{heading(run)}<br>seed {html.escape(seed)}")
        head += ["mean", "standard deviation"]
        tables.append(table("val_bpb by seed, mean, sample standard deviation", head, rows))
        differences = other_differences(group)
        if differences:
            note += f"; {', '.join(run.label for run in group)} differ in {differences} too"
    note += ". Grey: one sample standard deviation."
    text = "Runs that differ in their seed alone, around their mean. " + "; ".join(lines)
    picture = drawn("seeds", text, draw_seeds, groups)
    return Section({}, picture, note, "\n".join(tables))


SECTIONS = (  # name, title, function, what stands there without a picture
    ("loss", "Training loss", loss_section, "No record has training steps."),
    ("schedule", "Learning rate and context", schedule_section, "The schedules cannot be computed."),
    ("time", "Where the time went", time_section, "No record has times."),
    ("bpb", "Bits per byte, stage by stage", waterfall_section, "No record has a val_bpb."),
    ("bytes", "Bytes by class of tensor", bytes_section, "No record lists its matrices."),
    ("seeds", "Seeds", seeds_section, "No two records share all settings but the seed."),
)


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def page(runs: list[Run], others: int) -> tuple[str, list[Picture]]:
    """The page as HTML, and the pictures in it."""
    pictures = []
    body = []
    for name, title, compose, nothing in SECTIONS:
        section = compose(runs)
        body.append(f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>')
        if section.picture:
            pictures.append(section.picture)
            body.append(section.picture.markup())
            body.append(f'<p class="note">{html.escape(section.note)}</p>')
        else:
            body.append(f"<p>{nothing}</p>")
        body.append(left_out(section.lost))
        # The table of seeds is what its section is about; the others repeat the picture.
        if name == "seeds" and section.table:
            body.append(section.table)
        elif section.table:
            body.append(f"<details><summary>The figures as a table</summary>{section.table}</details>")
        body.append("</section>")
    states = [run.status.split(":")[0] for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    title = html.escape(f"{len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].label}")
    origin = f"From {counted(len(runs), 'record')}: {html.escape(counts)}."
    if others:
        origin += f" {counted(others, 'other JSON file')} beside them left out."
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, *_ in SECTIONS)
    text = "\n".join((
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: run report</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{title}</h1>",
        f'<p class="note">{origin}</p>',
        f'<nav aria-label="Sections">{links}</nav>',
        "</header>",
        "<main>",
        differences(runs),
        '<section id="summary" aria-labelledby="summary-title"><h2 id="summary-title">Summary</h2>',
        summary_table(runs),
        "</section>",
        *body,
        "</main>",
        f"<script>{SCRIPT}</script>",
        "</body>",
        "</html>",
        "",
    ))
    return text, pictures


def write(folder: Path, text: str, pictures: list[Picture]) -> None:
    """Put the report into `folder`, made if need be: nothing is replaced before all is written aside."""
    files = {f"report_{picture.name}.png": picture.wide[0] for picture in pictures}
    files["report.html"] = text.encode()  # the page itself is replaced last
    folder = Path(os.path.abspath(folder))
    place = folder if folder.is_dir() else folder.parent
    # In the same file system as the folder, so that each replacement is one rename.
    temporary = place / f".report.{os.getpid()}.tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        if not folder.exists():
            temporary.rename(folder)
            return
        for name in files:
            os.replace(temporary / name, folder / name)
        # Pictures of an older report that this one does not have.
        for name in {f"report_{name}.png" for name, *_ in SECTIONS} - files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror or error}; choose another folder with "
                         "--out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("records", nargs="*", default=["logs"], metavar="RECORD.json|FOLDER")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise InputError(f"{options.out}: a file where the report's folder belongs; choose another "
                             "folder with --out")
        runs, others = read_records(options.records)
        # Functions that draw import matplotlib themselves; here its lack becomes a line of advice.
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError("matplotlib is missing; install it with: "
                             "python -m pip install matplotlib") from None
        text, pictures = page(runs, others)
        write(options.out, text, pictures)
    except InputError as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.out / 'report.html'}: {counted(len(runs), 'run')}, {len(text) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
