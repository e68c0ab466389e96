"""One page about one run or several, from the records that train_gpt.py writes.

    python tools/report.py [RECORD.json or FOLDER ...] [--out report]

Records are the JSON files that a run leaves (without arguments: those in logs/); of a folder, every *.json in it that is
one, and those of the seeds that `run.sh RECIPE SEED...` left there. The folder given by --out receives report.html, which
holds all its images and needs no network, and the same images as report_*.png. Runs that failed or have not ended are shown as
far as they came; what a record does not hold is left out and named. The same records give the same page.

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
import shutil
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]  # in a submission train_gpt.py is packed, and source/ has the modules

COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#4d4d4d"  # of runs; told apart by the colour-blind
DASHES = "-", "--", ":", "-."  # the next runs take the colours again, with another dash
LOST = "–"  # stands where a record has no such figure

STAGES = (("raw", "raw", "val_bpb"), ("averaged", "averaged", "val_bpb"), ("quantized", "quantized", "val_bpb"),
          ("TTT, no tilt", "ttt", "untilted_bpb"), ("TTT, tilted", "ttt", "val_bpb"))
STAGE_NAMES = [name for name, *_ in STAGES] + ["TTT"]  # the last where the record does not tell the tilt apart
TIMES = {"warm-up, compilation": "#c6dbef", "training": "#3b75af", "calibration": "#9ac5e8", "quantization": "#f4a259",
         "quantization, packing": "#dd8452", "packing, check": "#ffdd9e", "evaluation": "#8fce9b",
         "test-time training": "#2f8f5b", "rest": "#d9d9d9"}
ROLES = {"tok_emb": "embedding", "attn.c_q": "attention q", "attn.c_k": "attention k", "attn.c_v": "attention v",
         "attn.proj": "attention out", "mlp.fc": "MLP up", "mlp.proj": "MLP down"}
CLASSES = {"embedding": "#f4a259", "attention q": "#c6dbef", "attention k": "#9ac5e8", "attention v": "#6ea6d6",
           "attention out": "#3b75af", "MLP up": "#8fce9b", "MLP down": "#2f8f5b", "other matrices": "#e6b8d4",
           "rest": "#d9d9d9", "code": "#595959"}
# Settings of older records that changed the schedules, at the only values that train_gpt.schedule still follows.
GONE = dict(lr_warmup_steps=0, warmdown_iters=0, midrun_cap_schedule="", train_seq_schedule_mode="wallclock")
NEEDED = "max_wallclock_seconds", "iterations", "warmdown_frac", "min_lr", "train_seq_len"  # settings that schedules follow
OWN = "seed", "run_id", "artifact_dir", "rank", "local_rank"  # settings in which the runs of one experiment may differ


class InputError(Exception):
    """Something the user gave is wrong: one line that names it and the remedy."""


# --- Records ----------------------------------------------------------------------------------------------------------


def finite(value):
    """`value` if it is a number that can be drawn, else None: a missing figure, NaN as text, a truth value."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15 else None


def plain(value, most: int = 300) -> str:
    """`value` in one line of printable characters, at most `most` of them; the middle of longer text is left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= most else f"{text[:most - most // 2 - 1]}…{text[-(most // 2):]}"


@dataclass(eq=False)
class Run:
    """One record. number: its place in the report, which gives its colour; label: its name there, unique."""

    path: Path
    record: dict
    number: int = 0
    label: str = ""

    def figure(self, kind: str, name: str):
        """results[kind][name] if that is a number, else None."""
        results = self.record.get("results")
        result = results.get(kind) if isinstance(results, dict) else None
        return finite(result.get(name)) if isinstance(result, dict) else None

    def events(self, kind: str, *names: str) -> list[dict]:
        """The events of this kind in which all the fields `names` are numbers."""
        return [event for event in self.record["events"] if isinstance(event, dict) and event.get("event") == kind
                and all(finite(event.get(name)) is not None for name in names)]

    @property
    def settings(self) -> dict:
        return self.record["settings"]

    @property
    def run_id(self) -> str:
        return plain(self.record.get("run_id") or self.path.stem, 80)

    @property
    def status(self) -> str:
        status = plain(self.record.get("status", "unknown"), 60)
        if status == "failed":
            return "failed: " + plain(next((event.get("error") for event in self.events("failed")), "no reason recorded"))
        return "running: no end recorded" if status == "running" else status

    @property
    def machine(self) -> str:
        machine = self.record.get("machine")
        machine = machine if isinstance(machine, dict) else {}
        parts = [f"{machine.get('devices', 1)} × {machine['device']}"] if "device" in machine else []
        parts += [f"torch {machine['torch']}"] if "torch" in machine else []
        return plain(", ".join(parts), 120)

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.number // len(COLOURS) % len(DASHES)]


def read_records(paths: list[str]) -> tuple[list[Run], int]:
    """The runs in these files and folders, each file once, and how many other JSON files the folders hold."""
    files: dict[Path, bool] = {}  # whether the file was named itself
    for path in map(Path, paths):
        if path.is_dir():
            for file in (*sorted(path.glob("*.json")), *sorted(path.glob("seed*/train_*.json"))):  # `run.sh RECIPE SEED...`
                files.setdefault(file, False)
        else:
            files[path] = True
    runs, others, seen = [], 0, set()
    for path, named in files.items():
        try:
            record = json.loads(path.read_bytes().decode())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; name run records, the .json files beside a run's log, or "
                             "folders that hold some") from None
        except (ValueError, RecursionError):
            raise InputError(f"{path}: no JSON, perhaps cut short; remove it or copy it again") from None
        if not (isinstance(record, dict) and isinstance(record.get("settings"), dict)
                and isinstance(record.get("events"), list)):
            if named:
                raise InputError(f"{path}: no run record, which has settings and events; name a .json file that train_gpt.py "
                                 "wrote beside a log")
            others += 1
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            runs.append(Run(path, record, len(runs)))
    if not runs:
        raise InputError(f"{', '.join(paths)}: no run record in there; name .json files that train_gpt.py wrote, or folders "
                         "that hold some")
    ids = [run.run_id for run in runs]
    for run in runs:
        run.label = run.run_id if ids.count(run.run_id) == 1 else f"{run.run_id} ({plain(run.path.stem, 60)})"
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += f" #{run.number + 1}"
    return runs, others


# --- What the sections show -------------------------------------------------------------------------------------------


def stages(run: Run) -> list[tuple[str, float]]:
    """(stage, bits per byte) in the order of the run; what was not measured is missing."""
    found = [(name, run.figure(kind, figure)) for name, kind, figure in STAGES]
    if found[3][1] is None or run.settings.get("ngram_tilt_enabled") is False:
        found[3:] = [("TTT", found[4][1])]
    return [(name, value) for name, value in found if value is not None]


def tilt_gain(run: Run):
    """Bits per byte that the n-gram tilt takes off, None without it."""
    values = dict(stages(run))
    return values["TTT, no tilt"] - values["TTT, tilted"] if len(values.keys() & {"TTT, no tilt", "TTT, tilted"}) == 2 else None


def times(run: Run) -> tuple[dict[str, float], float | None, bool]:
    """Seconds by what they went into, seconds in all (None: unknown), and whether these are the whole run's.

    A run that failed has no total; then what the process had lived at the end of test-time training stands for it.
    With a total the parts sum up to it: what no event tells is the rest.
    """
    def total(*figures):
        return sum(seconds for seconds in figures if seconds is not None and seconds > 0)

    def spent(kind):
        return total(*(event["seconds"] for event in run.events(kind, "seconds")))

    f = run.figure
    parts = {"warm-up, compilation": spent("warmup"), "training": total(f("training", "seconds")),
             "calibration": total(f("training", "calibration_seconds"), spent("calibration")),
             "quantization": total(f("artifact", "quantization_seconds")),
             "quantization, packing": total(f("artifact", "seconds")),  # two figures in some records
             "packing, check": total(f("artifact", "packing_seconds"), f("artifact", "unpacking_seconds")),
             "evaluation": total(f("raw", "seconds"), f("averaged", "seconds"), f("quantized", "seconds"), spent("val")),
             "test-time training": total(f("ttt", "seconds"))}
    whole = next((event["seconds"] for event in run.events("finished", "seconds")), None)
    seconds = f("ttt", "process_seconds") if whole is None else whole
    if seconds is not None:
        parts["rest"] = seconds - sum(parts.values())
    return {name: part for name, part in parts.items() if part > 0}, seconds, whole is not None


def byte_shares(run: Run) -> dict[str, int]:
    """Bytes by class of tensor; nothing if the record has no matrices.

    A matrix counts what its integers need at their entropy. The rest of the artifact is scales, small tensors, the header and
    what the coder takes above (or, negative, saves below) that entropy.
    """
    shares = dict.fromkeys(CLASSES, 0)
    matrices = run.events("matrix", "bytes")
    for event in matrices:
        name = str(event.get("name", ""))
        shares[ROLES.get(name.split(".", 2)[-1] if name.startswith("blocks.") else name, "other matrices")] += event["bytes"]
    if artifact := run.figure("size", "artifact_bytes"):
        shares["rest"] = artifact - sum(shares.values())
    shares["code"] = run.figure("size", "code_bytes") or 0
    return {name: count for name, count in shares.items() if count} if matrices else {}


class Schedule(NamedTuple):
    """What a run did in its steps, (steps,) arrays. recorded: which of them the record has a line about."""

    progress: np.ndarray
    multiplier: np.ndarray
    context: np.ndarray
    recorded: np.ndarray


def recorded_settings(run: Run, known: type):
    """The run's settings as `known`, the class of train_gpt's; None if another version's schedules were meant."""
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
        if not isinstance(value, (int, float) if kind is float else kind):
            return None
        if kind in (int, float) and finite(value) is None:
            return None
        given[field.name] = value
    s = known(**given)
    try:
        s.context_stages
    except ValueError:  # TRAIN_SEQ_SCHEDULE in another notation
        return None
    return s if s.iterations >= 1 else None


def timed_progress(run: Run, at: np.ndarray, last: int, batch_tokens: int, budget: float) -> np.ndarray:
    """Progress at the start of the steps `at` under a time cap: known at some steps, interpolated between them."""
    known = {}
    for event in run.events("step", "step", "seconds"):
        pace = finite(event.get("tokens_per_second")) or 0
        length = batch_tokens / pace if pace > 0 else event["seconds"]
        # Step lines count from 1 and tell when a step ended.
        known[event["step"] - 1] = max(0.0, event["seconds"] - length) / budget
    if run.figure("training", "seconds"):
        known[last] = run.figure("training", "seconds") / budget
    for kind in ("looping", "context"):
        known |= {event["step"]: event["progress"] for event in run.events(kind, "step", "progress")}
    steps = sorted(known)
    return np.interp(at, steps, np.maximum.accumulate([known[step] for step in steps])).clip(0, 1)


def schedule(run: Run) -> Schedule | str:
    """Learning rate's factor and context length of every step (of 5,000 in longer runs), by train_gpt's own function.

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
    last = int(max(run.figure("training", "steps") or 0, *steps))
    recorded = [step - 1 for step in steps]
    evenly = np.linspace(0, last - 1, min(last, 5000)).round()
    at = np.unique(np.concatenate((evenly, recorded))).astype(int)
    if s.max_wallclock_seconds > 0:
        reserves = [event["reserve_seconds"] for event in run.events("warmup", "reserve_seconds")]
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
    return Schedule(progress, multiplier=np.array([now.lr_factor for now in moments]),
                    context=np.array([now.context for now in moments]), recorded=np.isin(at, recorded))


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Runs of several seeds that share all other settings."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name not in OWN}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    return [group for group in groups.values() if len({str(run.settings.get("seed")) for run in group}) > 1]


# --- Figures ----------------------------------------------------------------------------------------------------------
# Each is drawn twice, for wide windows and for telephones; lengths in inches.


def canvas(narrow: bool, height: float, labels: int = 0, legend_columns: int = 1):
    """A figure with room for `height` of panels and a legend of so many labels below."""
    from matplotlib.figure import Figure

    rows = -(-labels // legend_columns)
    return Figure(figsize=(3.7 if narrow else 10.5, height + 0.19 * rows + 0.1 * bool(rows)), layout="constrained")


def png(figure, narrow: bool) -> tuple[bytes, int, int]:
    """The figure as PNG, its width and its height in pixels."""
    buffer, dpi = io.BytesIO(), 220 if narrow else 150
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue(), *(round(length * dpi) for length in figure.get_size_inches())


def tidy(axes, title: str = "") -> None:
    for side in "top", "right":
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def width_of(run: Run, runs: list[Run]) -> float:
    """Line width in points: of a few runs the first lie broad under the later ones, so that equal curves all show."""
    return 1.5 + 1.3 * (len(runs) - 1 - runs.index(run)) if len(runs) <= 4 else 1.6


def run_legend(figure, runs: list[Run], narrow: bool) -> None:
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=run.colour, linestyle=run.dash, linewidth=2.5) for run in runs]
        figure.legend(handles, [" " + short(run, narrow) for run in runs], loc="outside lower center", frameon=False,
                      ncols=legend_columns(runs, narrow), handlelength=2.2)


def legend_columns(runs: list[Run], narrow: bool) -> int:
    """As many as the longest name leaves room for."""
    return max(1, min(len(runs), int((3.5 if narrow else 10) / (0.65 + 0.075 * max(len(short(run, narrow)) for run in runs)))))


def short(run: Run, narrow: bool) -> str:
    return plain(run.label, 26 if narrow else 48)


def draw_loss(runs: list[Run], limits: tuple[float, float], narrow: bool):
    """Training loss (limits: its axis) over steps and over seconds."""
    figure = canvas(narrow, 4.6 if narrow else 3.4, len(runs) if len(runs) > 1 else 0, legend_columns(runs, narrow))
    panels = figure.subplots(2 if narrow else 1, 1 if narrow else 2, sharey=True)
    for axes, name, unit in zip(panels, ("step", "seconds"), ("step", "seconds of training")):
        for run in runs:
            steps = run.events("step", name, "train_loss")
            axes.plot([event[name] for event in steps], [event["train_loss"] for event in steps], run.dash, color=run.colour,
                      linewidth=1.5, marker="o", markersize=3.5)
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
        late = [event["train_loss"] for event in steps if event["step"] > 0.02 * steps[-1]["step"]]
        losses += late or [steps[-1]["train_loss"]]
    margin = 0.05 * (max(losses) - min(losses)) or 0.5
    return min(losses) - margin, max(losses) + margin


def draw_schedule(runs: list[Run], schedules: dict[int, Schedule], narrow: bool):
    """Learning-rate multiplier above, context length below, both over progress; schedules by the runs' numbers."""
    figure = canvas(narrow, 4.8 if narrow else 4.6, len(runs) if len(runs) > 1 else 0, legend_columns(runs, narrow))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    starts = []
    for run in runs:
        found, style = schedules[run.number], dict(color=run.colour, linestyle=run.dash, linewidth=width_of(run, runs))
        top.plot(found.progress, found.multiplier, **style)
        top.plot(found.progress[found.recorded], found.multiplier[found.recorded], "o", color=run.colour,
                 markersize=style["linewidth"] + 3, markeredgecolor="white", markeredgewidth=0.7)
        bottom.plot(found.progress, found.context, drawstyle="steps-post", **style)
        for event in run.events("looping", "progress")[:1]:
            starts.append(event["progress"])
            for axes in top, bottom:
                axes.axvline(event["progress"], color=run.colour, linestyle=(0, (4, 3)), linewidth=1)
    lengths = sorted({int(length) for run in runs for length in schedules[run.number].context})
    bottom.set(xlabel="progress (share of the training time, or of the steps)", ylabel="context, tokens", xlim=(-0.02, 1.02),
               ylim=(0, 1.15 * lengths[-1]), yticks=lengths if len(lengths) <= 5 else np.linspace(0, lengths[-1], 5).round())
    top.set(ylabel="learning-rate multiplier", ylim=(0, None))
    for axes in top, bottom:
        tidy(axes)
    if starts:
        top.annotate("looping starts", (min(starts), 0), (4, 5), textcoords="offset points", fontsize="small", color="#444")
    run_legend(figure, runs, narrow)
    return figure


def draw_stacks(rows: list[tuple[str, dict[str, float], str]], colours: dict[str, str], unit: str, digits: int,
                bound: float | None, narrow: bool):
    """Horizontal stacked bars. rows: (name, parts, what stands behind the name); bound: where a line is drawn, if any."""
    from matplotlib.patches import Patch

    used = [name for name in colours if any(parts.get(name, 0) > 0 for _, parts, _ in rows)]
    columns = 2 if narrow else min(5, len(used))
    figure = canvas(narrow, 0.6 + 0.62 * len(rows), len(used), columns)
    axes = figure.subplots()
    reach = 1.02 * max([bound or 0, 1e-3, *(sum(part for part in parts.values() if part > 0) for _, parts, _ in rows)])
    for y, (name, parts, behind) in enumerate(rows):
        at = 0.0
        for part in used:
            share = max(0, parts.get(part, 0))
            axes.barh(y, share, left=at, height=0.46, color=colours[part], edgecolor="white", linewidth=0.6)
            text = f"{share:,.{digits}f}" if share < 1e6 else f"{share / 1e6:.2f}M"
            if share > reach * (len(text) + 1) * 0.07 / (3.2 if narrow else 9.8):
                red, green, blue = (int(colours[part][i:i + 2], 16) for i in (1, 3, 5))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 140
                axes.text(at + share / 2, y, text, ha="center", va="center", fontsize="x-small",
                          color="white" if dark else "#222")
            at += share
        axes.annotate(plain(name, 28 if narrow else 60), (0, y - 0.27), (0, 1), textcoords="offset points", va="bottom",
                      fontsize="small", fontweight="bold")
        axes.annotate(plain(behind, 40 if narrow else 80), (1, y - 0.27), (0, 1), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", va="bottom", fontsize="x-small" if narrow else "small",
                      bbox=dict(facecolor="white", edgecolor="none", pad=1))
    if bound:
        axes.axvline(bound, color="#a00", linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set(xlim=(0, reach), ylim=(len(rows) - 0.6, -0.75), yticks=[], xlabel=unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if reach > 2e6 else f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=4 if narrow else 8)
    tidy(axes)
    axes.spines["left"].set_visible(False)
    figure.legend([Patch(color=colours[name]) for name in used], used, loc="outside lower center", ncols=columns, frameon=False,
                  handlelength=1.2)
    return figure


def draw_waterfall(runs: list[Run], narrow: bool):
    """A panel per run: the first and the last stage reach from the axis' left end, what lies between shows its change alone."""
    columns = 1 if narrow or len(runs) == 1 else 3 if len(runs) in (3, 5) or len(runs) > 6 else 2
    rows = -(-len(runs) // columns)
    found = [stages(run) for run in runs]
    tall = max(map(len, found))
    figure = canvas(narrow, rows * (0.75 + 0.25 * tall))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, run, stage, (low, high) in zip(panels, runs, found, waterfall_ends(found)):
        span = max(high - low, 0.002)
        left = low - 0.12 * span
        right = high + (1.15 if narrow or columns == 3 else 0.55) * span
        for y, (_, value) in enumerate(stage):
            before = stage[y - 1][1] if y else value
            if y in (0, len(stage) - 1):
                axes.barh(y, value - left, left=left, height=0.66, color=run.colour, alpha=0.45 if y else 0.85, linewidth=0)
            if y:
                worse = value > before
                axes.barh(y, value - before, left=before, height=0.66, color=run.colour, linewidth=0,
                          edgecolor="white" if worse else run.colour, hatch="////" * worse)
                axes.plot([before, before], [y - 1.33, y + 0.33], color="#666", linewidth=0.7)
            change = f"{value:.5f}" + (f" ({value - before:+.5f})" if y else "")
            axes.annotate(change, (max(value, before), y), (3, 0), textcoords="offset points", va="center", fontsize="small")
        axes.plot([0.012, 0.024], [-0.035, 0.035], transform=axes.transAxes, color="#333", linewidth=1, clip_on=False)
        axes.plot([0.026, 0.038], [-0.035, 0.035], transform=axes.transAxes, color="#333", linewidth=1, clip_on=False)
        axes.set(xlim=(left, right), ylim=(tall - 0.4, -0.6), xlabel=f"val_bpb, axis cut at {left:.3f}, not from 0")
        axes.set_yticks(range(len(stage)), [name for name, _ in stage])
        axes.locator_params(axis="x", nbins=4 if columns > 1 or narrow else 8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3f}")
        tidy(axes, short(run, narrow or columns == 3) if len(runs) > 1 else "")
    for axes in panels[len(runs):]:
        axes.set_visible(False)
    return figure


def waterfall_ends(found: list[list[tuple[str, float]]]) -> list[tuple[float, float]]:
    """Least and greatest val_bpb of each run's axis: those of all runs, unless some run's changes would then be too small."""
    ends = [(min(value for _, value in stage), max(value for _, value in stage)) for stage in found]
    whole = min(low for low, _ in ends), max(high for _, high in ends)
    spans = [high - low for stage, (low, high) in zip(found, ends) if len(stage) > 2 or len(stage) == max(map(len, found))]
    return [whole] * len(found) if whole[1] - whole[0] <= 5 * min(spans) else ends


def draw_seeds(groups: list[list[Run]], narrow: bool):
    """A panel per experiment: each stage's runs as dots around their mean, one sample standard deviation shaded."""
    tall = [len(seed_figures(group)) for group in groups]
    figure = canvas(narrow, sum(0.75 + 0.3 * count for count in tall))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=tall).ravel()
    for axes, group in zip(panels, groups):
        figures = seed_figures(group)
        for y, (_, values, mean, deviation) in enumerate(figures):
            axes.barh(y, 2e3 * deviation, left=-1e3 * deviation, height=0.6, color="#ddd")
            for run, value in zip(group, values):
                if value is not None:
                    axes.plot(1e3 * (value - mean), y, "o", color=run.colour, markersize=6, markeredgecolor="white")
                    if not narrow:  # the table has them
                        axes.annotate(plain(run.settings.get("seed"), 12), (1e3 * (value - mean), y), (0, 6), ha="center",
                                      textcoords="offset points", fontsize="xx-small", color="#444")
        axes.axvline(0, color="#666", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set(ylim=(len(figures) - 0.4, -0.7), xlabel="thousandths of val_bpb from the mean of the seeds")
        axes.set_yticks(range(len(figures)), [name for name, *_ in figures])
        tidy(axes, ", ".join(short(run, True) for run in group) if len(groups) > 1 and not narrow else "")
    return figure


def seed_figures(group: list[Run]) -> list[tuple[str, list, float, float]]:
    """(stage, val_bpb of each run or None, mean, sample standard deviation) for the stages that two runs have reached."""
    values = [dict(stages(run)) for run in group]
    rows = []
    for name in STAGE_NAMES:
        column = [found.get(name) for found in values]
        reached = [value for value in column if value is not None]
        if len(reached) > 1:
            rows.append((name, column, statistics.mean(reached), statistics.stdev(reached)))
    return rows


# --- The page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #57606a; --ground: #fff; --soft: #f4f6f8; --line: #d0d7de;
  --link: #0b5cad; --bad: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #a3adb8; --ground: #14181d; --soft: #1e242b;
  --line: #3a434d; --link: #7db8f5; --bad: #ff8f98 } }
body { margin: 0 auto; max-width: 74rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p { max-width: 50rem; margin: .5rem 0 } .note { color: var(--dim); font-size: .9rem } .bad { color: var(--bad) }
a { color: var(--link) } nav a { margin-right: 1rem; display: inline-block; padding: .15rem 0 }
figure { margin: .75rem 0 } picture { display: block }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  box-sizing: border-box; padding: .4rem; margin: 0 auto }
@media (max-width: 760px) { img { max-width: 34rem } }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line);
  border-radius: 6px; margin: .5rem 0 }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--dim); padding: .35rem .6rem; caption-side: bottom }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  min-width: 7.5rem }
thead th { background: var(--soft); max-width: 14rem } td { max-width: 18rem } data { white-space: nowrap }
th[scope=row], th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--soft);
  min-width: 5.5rem; max-width: 12rem }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--link) }
"""
# What a browser made of the page, for whoever opens it by program: images that decoded, pixels it is too wide.
SCRIPT = """addEventListener("load", () => { const page = document.documentElement;
document.body.dataset.images = [...document.images].filter(image => image.naturalWidth > 0).length;
document.body.dataset.overflow = page.scrollWidth - page.clientWidth })"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'".format(
    base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())


def cell(value, form: str = ",", after: str = "") -> str:
    """A number as formatted, with the exact one in the markup."""
    return LOST if value is None else f'<data value="{value!r}">{value:{form}}</data>{html.escape(after)}'


def table(caption: str, head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """`head` (the first column's included), and of each row the header and the cells, are HTML; the caption is text."""
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>',
             f"<caption>{html.escape(caption)}</caption>", "<thead><tr>", *(f'<th scope="col">{name}</th>' for name in head),
             "</tr></thead><tbody>"]
    for name, cells in rows:
        lines.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def heading(run: Run) -> str:
    return f'<span class="swatch" style="background:{run.colour}"></span>{html.escape(run.label)}'


def left_out(reasons: dict[str, str]) -> str:
    """A note on the runs, by label, that a section leaves out and why."""
    if not reasons:
        return ""
    return '<p class="note">Left out: ' + html.escape("; ".join(f"{name} ({why})" for name, why in reasons.items())) + ".</p>"


def summary_table(runs: list[Run]) -> str:
    def row(name, value, form=",", after=lambda run: ""):
        return name, [cell(value(run), form, after(run)) for run in runs]

    def figure(name, kind, key, form=","):
        return row(name, lambda run: run.figure(kind, key), form)

    def text(name, value):
        return name, [html.escape(plain(value(run))) or LOST for run in runs]

    def failing(kind):
        return lambda run: " over the cap" if isinstance(found := run.record.get("results"), dict) and isinstance(
            found.get(kind), dict) and found[kind].get("within_cap") is False else ""

    def speed(key):
        return row(f"tokens/s {key}", lambda run: run.figure("training", f"tokens_per_second_{key}") or None)

    def trained(run):
        seconds = run.figure("training", "clock_seconds")
        return run.figure("training", "seconds") if seconds is None else seconds

    states = [f'<span class="bad">{html.escape(run.status)}</span>' if run.status.startswith("failed") else
              html.escape(run.status) for run in runs]
    rows = [("status", states), text("record", lambda run: run.path.name),
            text("started", lambda run: run.record.get("started", "")), text("seed", lambda run: run.settings.get("seed", "")),
            text("machine", lambda run: run.machine), figure("steps", "training", "steps"), speed("plain"), speed("looping"),
            *(figure(f"val_bpb {name}", name.lower(), "val_bpb", ".5f") for name in ("raw", "averaged", "quantized", "TTT")),
            row("tilt gain", tilt_gain, ".5f"),
            row("artifact + code, bytes", lambda run: run.figure("size", "total_bytes"), after=failing("size")),
            figure("artifact", "size", "artifact_bytes"), figure("code", "size", "code_bytes"),
            row("training seconds", trained, ",.1f", failing("training")),
            figure("plain evaluation seconds", "quantized", "seconds", ",.1f"),
            figure("TTT evaluation seconds", "ttt", "seconds", ",.1f"),
            row("seconds in all", lambda run: times(run)[1] if times(run)[2] else None, ",.1f")]
    note = ("TTT: test-time training, its n-gram tilt included. Training counts calibration. "
            f"{LOST}: the record has no such figure.")
    return table("Figures of each run", ["run", *map(heading, runs)], rows) + f'<p class="note">{note}</p>'


class Picture(NamedTuple):
    name: str
    wide: tuple[bytes, int, int]
    narrow: tuple[bytes, int, int]
    text: str  # what it shows, for those who do not see it

    def markup(self) -> str:
        (wide, *size), (narrow, *small) = ((f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)
                                           for data, width, height in (self.wide, self.narrow))
        return (f'<figure><picture><source media="(max-width: 760px)" srcset="{narrow}" width="{small[0]}" height="{small[1]}">'
                f'<img src="{wide}" width="{size[0]}" height="{size[1]}" alt="{html.escape(self.text)}"></picture></figure>')


def drawn(name: str, text: str, draw, *arguments) -> Picture:
    """What draw(*arguments, narrow) draws, in both widths, with matplotlib's own defaults whatever the user's."""
    import matplotlib

    pictures = []
    for narrow in False, True:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update({"font.size": 8 if narrow else 9.5, "text.parse_math": False, "hatch.linewidth": 1.2})
            pictures.append(png(draw(*arguments, narrow), narrow))
    return Picture(name, *pictures, text)


def loss_section(runs: list[Run]):
    shown = [run for run in runs if run.events("step", "step", "seconds", "train_loss")]
    lost = {run.label: "no training steps" for run in runs if run not in shown}
    if not shown:
        return None, "", lost
    ends = [(run, run.events("step", "step", "seconds", "train_loss")[-1]) for run in shown]
    text = "Training loss over steps and over seconds. " + "; ".join(
        f"{run.label}: {end['train_loss']} in step {end['step']} after {end['seconds']} s" for run, end in ends)
    limits = loss_limits(shown)
    above = max(event["train_loss"] for run in shown for event in run.events("step", "step", "seconds", "train_loss"))
    note = "Losses of single batches; dots are the recorded steps." + (
        f" The axis ends at {limits[1]:.2f}; the first steps lie above it, up to {above:.2f}." if above > limits[1] else "")
    for run in runs:
        if wild := len(run.events("step", "step", "seconds")) - len(run.events("step", "step", "seconds", "train_loss")):
            note += f" {run.label}: {wild} recorded losses are not finite."
    return drawn("loss", text, draw_loss, shown, limits), note, lost


def schedule_section(runs: list[Run]):
    found = {run.number: schedule(run) for run in runs}
    shown = [run for run in runs if isinstance(found[run.number], Schedule)]
    lost = {run.label: found[run.number] for run in runs if run not in shown}
    if not shown:
        return None, "", lost
    parts = []
    for run in shown:
        s = found[run.number]
        lengths = " to ".join(str(length) for length, _ in itertools.groupby(s.context.tolist()))
        starts = "".join(f", looping from {event['progress']:.2f} on" for event in run.events("looping", "progress")[:1])
        parts.append(f"{run.label}: context {lengths} tokens, multiplier {s.multiplier[-1]:.3f} at the end{starts}")
    text = "Learning-rate multiplier and context length over progress. " + "; ".join(parts)
    note = ("Computed by train_gpt.py's functions from the recorded settings and clock, which is interpolated between the "
            "recorded steps (dots). Dashed: the start of looping.")
    return drawn("schedule", text, draw_schedule, shown, found), note, lost


def time_section(runs: list[Run]):
    found = {run.number: times(run) for run in runs}
    shown = [run for run in runs if found[run.number][0]]
    lost = {run.label: "no times" for run in runs if run not in shown}
    if not shown:
        return None, "", lost
    bars, rows = [], []
    for run in shown:
        parts, seconds, whole = found[run.number]
        behind = "total not recorded" if seconds is None else f"{seconds:,.1f} s" + " to the end of TTT" * (not whole)
        bars.append((run.label, parts, behind))
    used = [name for name in TIMES if any(name in parts for parts, *_ in found.values())]
    for name in used:
        shares = [(found[run.number][0].get(name), found[run.number][1]) for run in shown]
        rows.append((name, [cell(part, ",.1f", f" ({part / seconds:.1%})" if part and seconds else "")
                            for part, seconds in shares]))
    rows.append(("in all", [cell(found[run.number][1], ",.1f") for run in shown]))
    partial = [run.label for run in shown if found[run.number][1] and not found[run.number][2]]
    text = "Seconds of each run by what they went into. " + "; ".join(
        f"{name}: {behind}, of which " + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        for name, parts, behind in bars)
    note = ("Rest: start, data, compilation of evaluation and test-time training, files. Evaluation: "
            "of the raw, averaged and quantized weights.")
    if partial:
        note += (f" The total of runs that did not finish ({', '.join(partial)}) is from the start of the process to the end "
                 "of test-time training.")
    extra = table("Seconds, and shares of the total where known", ["part", *map(heading, shown)], rows)
    return drawn("time", text, draw_stacks, bars, TIMES, "seconds", 1, None), note, lost, extra


def waterfall_section(runs: list[Run]):
    shown = [run for run in runs if stages(run)]
    lost = {run.label: "no val_bpb" for run in runs if run not in shown}
    if not shown:
        return None, "", lost
    samples = [run.label for run in shown if isinstance(run.record["results"].get("ttt"), dict)
               and run.record["results"]["ttt"].get("whole_text") is False]
    text = "Bits per byte on the validation text after each stage. " + "; ".join(
        f"{run.label}: " + ", ".join(f"{name} {value:.5f}" for name, value in stages(run)) for run in shown)
    note = "Each axis starts near the values, not at 0. In brackets the change from the stage above; hatched: it got worse."
    if len(set(waterfall_ends([stages(run) for run in shown]))) > 1:
        note += " The runs' axes differ."
    if samples:
        note += f" Test-time training saw a sample of the documents and is no step from the others: {', '.join(samples)}."
    found = [dict(stages(run)) for run in shown]
    names = [name for name in STAGE_NAMES if any(name in values for values in found)]
    rows = [(name, [cell(values.get(name), ".5f") for values in found]) for name in names]
    extra = table("val_bpb after each stage", ["stage", *map(heading, shown)], rows)
    return drawn("bpb", text, draw_waterfall, shown), note, lost, extra


def bytes_section(runs: list[Run]):
    found = {run.number: byte_shares(run) for run in runs}
    shown = [run for run in runs if found[run.number]]
    lost = {run.label: "no matrices recorded" for run in runs if run not in shown}
    if not shown:
        return None, "", lost
    totals = {run.number: run.figure("size", "total_bytes") for run in shown}
    bars = [(run.label, found[run.number], f"{totals[run.number]:,} bytes" if totals[run.number] else "size not recorded")
            for run in shown]
    cap = max((run.figure("size", "cap") or 0 for run in shown), default=0)
    bound = cap if 0 < cap < 2 * max(sum(parts.values()) for _, parts, _ in bars) else None
    used = [name for name in CLASSES if any(name in parts for parts in found.values())]
    rows = [(name, [cell(found[run.number].get(name), ",") for run in shown]) for name in used]
    rows.append(("artifact + code", [cell(totals[run.number], ",") for run in shown]))
    text = "Bytes of artifact and code by class of tensor. " + "; ".join(
        f"{name}: {behind}, of which " + ", ".join(f"{part} {value:,}" for part, value in parts.items())
        for name, parts, behind in bars)
    note = ("A matrix counts the entropy of its integers; rest: scales, small tensors, header, and what the coder takes above "
            "that entropy or, negative, saves.")
    if cap:
        note += f" Dashed: the cap of {cap:,} bytes." if bound else f" The cap, {cap:,} bytes, lies far to the right."
    extra = table("Bytes by class", ["class", *map(heading, shown)], rows)
    return drawn("bytes", text, draw_stacks, bars, CLASSES, "bytes", 0, bound), note, lost, extra


def seeds_section(runs: list[Run]):
    groups = [group for group in seed_groups(runs) if seed_figures(group)]
    if not groups:
        return None, "", {}
    tables, mixed = [], []
    for group in groups:
        rows = [(name, [*(cell(value, ".5f") for value in values), cell(mean, ".5f"), cell(deviation, ".5f")])
                for name, values, mean, deviation in seed_figures(group)]
        seeds = [f"{heading(run)}<br>seed {html.escape(plain(run.settings.get('seed'), 20))}" for run in group]
        tables.append(table("val_bpb by seed, mean, sample standard deviation",
                            ["stage", *seeds, "mean", "standard deviation"], rows))
        codes = {str(event.get("sha256")) for run in group for event in run.events("code")}
        kinds = [what for what, values in (("code", codes), ("machine", {run.machine for run in group})) if len(values) > 1]
        if kinds:
            mixed.append(f"{', '.join(run.label for run in group)} differ in {' and '.join(kinds)} too")
    text = "Runs that differ in their seed alone, around their mean. " + "; ".join(
        f"{name}: mean {mean:.5f}, sample standard deviation {deviation:.5f}"
        for group in groups for name, _, mean, deviation in seed_figures(group))
    note = "All other settings are equal" + "".join(f"; {line}" for line in mixed) + ". Grey: one sample standard deviation."
    return drawn("seeds", text, draw_seeds, groups), note, {}, "\n".join(tables)


SECTIONS = (("loss", "Training loss", loss_section, "No record has training steps."),
            ("schedule", "Learning rate and context", schedule_section, "The schedules cannot be computed."),
            ("time", "Where the time went", time_section, "No record has times."),
            ("bpb", "Bits per byte, stage by stage", waterfall_section, "No record has a val_bpb."),
            ("bytes", "Bytes by class of tensor", bytes_section, "No record lists its matrices."),
            ("seeds", "Seeds", seeds_section, "No two records share all settings but the seed."))


def page(runs: list[Run], others: int) -> tuple[str, list[Picture]]:
    """The page as HTML, and the pictures in it."""
    pictures, body = [], []
    for name, title, section, nothing in SECTIONS:
        picture, note, lost, *extra = section(runs)
        body.append(f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>')
        if picture:
            pictures.append(picture)
            body += [picture.markup(), f'<p class="note">{html.escape(note)}</p>']
        else:
            body.append(f"<p>{nothing}</p>")
        body.append(left_out(lost))
        for figures in extra:
            if name != "seeds":
                figures = f"<details><summary>The figures as a table</summary>{figures}</details>"
            body.append(figures)
        body.append("</section>")
    states = [run.status.split(":")[0] for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    title = f"{len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].label}"
    beside = f" {others} other JSON file{'s' * (others != 1)} beside them left out." if others else ""
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, *_ in SECTIONS)
    return "\n".join((
        '<!doctype html>', '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}: run report</title>", f"<style>{STYLE}</style>", "</head>", "<body>", "<header>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">From {len(runs)} record{"s" * (len(runs) != 1)}: {html.escape(counts)}.{beside}</p>',
        f'<nav aria-label="Sections">{links}</nav>', "</header>", "<main>",
        '<section id="summary" aria-labelledby="summary-title"><h2 id="summary-title">Summary</h2>',
        summary_table(runs), "</section>",
        *body, "</main>", f"<script>{SCRIPT}</script>", "</body>", "</html>", "")), pictures


def write(folder: Path, text: str, pictures: list[Picture]) -> None:
    """Put the report into `folder`, made if need be: all of it is written aside before the first file is replaced."""
    files = {f"report_{picture.name}.png": picture.wide[0] for picture in pictures} | {"report.html": text.encode()}
    folder = Path(os.path.abspath(folder))
    temporary = (folder if folder.is_dir() else folder.parent) / f".report.{os.getpid()}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        if not folder.exists():
            temporary.rename(folder)
            return
        for name in files:  # the page itself last
            os.replace(temporary / name, folder / name)
        for name in {f"report_{name}.png" for name, *_ in SECTIONS} - files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror or error}; choose another folder with --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", default=["logs"], metavar="RECORD.json|FOLDER")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise InputError(f"{options.out}: a file where the report's folder belongs; choose another folder with --out")
        runs, others = read_records(options.records)
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError("matplotlib is missing; install it with: python -m pip install matplotlib") from None
        text, pictures = page(runs, others)
        write(options.out, text, pictures)
    except InputError as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.out / 'report.html'}: {len(runs)} run{'s' * (len(runs) != 1)}, {len(text) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
