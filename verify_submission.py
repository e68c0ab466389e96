"""Audit a Parameter Golf record folder: logs, run records, submission.json, code, data manifest.

    python verify_submission.py DIR [--json]

One line per check: PASS, FAIL or UNKNOWN, the check, what was found, where it stands (file:line, or file: json key). A check
that fails or cannot tell prints a line for each finding. UNKNOWN means that the folder does not say enough; nothing passes
because nothing was found. --json prints a list of {check, verdict, seed, detail, evidence}.
Exit code 0, or 1 if a check fails, or 2 with one line on stderr for bad input: no such folder, no log in it.

Two formats of logs are understood, line by line: train_gpt.py's own, where every line is the text of an event in the run
record beside it, and that of the challenge's published records. Unknown lines are ignored. Nothing in the folder is run.

submission.json may compare the score with another submission: `comparison` = {against, difference_nats, p, test,
threshold_nats, required_p, new_record}. What it compares with, per seed, is `baseline` = {seed: val_bpb}, or `val_loss` =
{seed: nats per token}, or a list of either; or `against` is the path, from the folder, of a submission.json with seed_results.
The rule is the challenge's, whatever threshold, level and p are stated: more than 0.005 nats better, and the one-sided test of
that gives p < 0.01.
"""
from __future__ import annotations

import ast
import base64
import hashlib
import json
import lzma
import math
import os
import re
import statistics
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

try:
    import brotli  # packs our scripts; without it they stay closed
except ImportError:
    brotli = None

BYTES_CAP, SECONDS_CAP, LEAST_SEEDS = 16_000_000, 600.0, 3
THRESHOLD_NATS, LARGEST_P = 0.005, 0.01
PUBLISHED_TARGETS = 47_853_343  # of the published validation text, its tail included
SCORES_DIFFER = 1e-4  # bpb by which a repeated evaluation may differ from the first
UNPACKED_CAP, ENCODED_CAP, ENCODED_PIECE = 1 << 22, 4000, 64  # characters: unpacked at most; encoded that need no look; a piece
PASS, FAIL, UNKNOWN = "PASS", "FAIL", "UNKNOWN"

# Names that submission.json files use for a figure; mean_, _mean, std_, _std, max_, _ms and the like come on top.
ALIASES = {
    "val_bpb": "val_bpb bpb ttt_bpb ttt_val_bpb val_bpb_ttt post_ttt_bpb post_ttt_val_bpb quantized_ttt_bpb final_bpb",
    "val_loss": "val_loss loss ttt_loss ttt_val_loss post_ttt_loss post_ttt_val_loss quantized_ttt_loss",
    "pre_quant_bpb": "pre_quant_bpb pre_quant_val_bpb prequant_bpb prequant_val_bpb pre_quantization_bpb",
    "quantized_bpb": "quantized_bpb quantized_val_bpb quant_bpb quant_val_bpb post_quant_bpb",
    "steps": "steps step step_stop train_steps training_steps",
    "train_seconds": "train_seconds train_time training_time training_seconds train_wallclock wallclock_seconds",
    "eval_seconds": "eval_seconds eval_time evaluation_time ttt_eval_time ttt_eval_seconds ttt_seconds ttt_time",
    "artifact_bytes": "artifact_bytes bytes_artifact bytes_model model_bytes compressed_model_bytes artifact_size",
    "code_bytes": "code_bytes bytes_code code_size code_size_bytes",
    "total_bytes": "total_bytes bytes_total submission_bytes total_submission_bytes total_size_bytes",
}
FIGURES = {name: figure for figure, names in ALIASES.items() for name in names.split()}
# Facts of a log that such a figure may mean, ours first.
MEANINGS = {False: {"artifact_bytes": ("artifact_bytes", "total_bytes"), "eval_seconds": ("eval_seconds", "all_eval_seconds")},
            True: {"train_seconds": ("train_seconds", "step_seconds")}}
# What in submission.json is no figure of a log.
NO_FIGURES = {"seed", "seeds", "comparison", "github_id", "date", "num_seeds", "n_seeds"}
SEED_TABLES = {"seed_results", "seeds", "per_seed", "per_seed_results", "results", "runs"}

# Our events: the fields by which a line is known as one, and the facts that they state.
OUR_EVENTS = {
    "settings": {}, "finished": {"seconds": "run_seconds"}, "failed": {"error": "error"},
    "machine": {"device": "device", "devices": "devices"},
    "data": {"train_tokens": "train_tokens", "val_targets": "val_targets", "manifest": "manifest"},
    "code": {"sha256": "code_sha256", "packed_bytes": "packed_bytes"},
    "training": {"steps": "steps", "seconds": "step_seconds", "calibration_seconds": "calibration_seconds",
                 "clock_seconds": "train_seconds", "cap_seconds": "cap_seconds"},
    "step": {"step": "step", "train_loss": "train_loss", "grad_norm": "grad_norm"},
    "raw": {"val_bpb": "raw_bpb", "val_loss": "raw_loss", "targets": "raw_targets"},
    "averaged": {"val_bpb": "pre_quant_bpb", "val_loss": "pre_quant_loss", "targets": "pre_quant_targets"},
    "quantized": {"val_bpb": "quantized_bpb", "val_loss": "quantized_loss", "targets": "quantized_targets",
                  "seconds": "quantized_seconds"},
    "size": {"artifact_sha256": "artifact_sha256", "artifact_bytes": "artifact_bytes", "code_bytes": "code_bytes",
             "total_bytes": "total_bytes"},
    "ttt": {"val_bpb": "val_bpb", "val_loss": "val_loss", "targets": "targets", "seconds": "eval_seconds",
            "whole_text": "whole_text", "hints_inside_timer": "hints_inside_timer", "decodable": "decodable"},
}
MORE_FACTS = {"data": {"splits_disjoint": "splits_disjoint", "train_docs": "train_docs", "val_docs": "val_docs"}}
WORDS = {"device", "error", "code_sha256", "artifact_sha256", "manifest", "splits_disjoint", "whole_text", "hints_inside_timer",
         "decodable"}  # facts that are no numbers
OUR_KINDS = {*OUR_EVENTS, "model", "unigram", "warmup", "val", "looping", "context", "midrun_cap", "calibration",
             "no_checkpoint", "target_missed", "matrix", "artifact", "progress"}

# Lines of published logs; `fact*` is in milliseconds.
N = r"[:=]\s*([-+]?(?:\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf))"
PUBLISHED = [(re.compile(pattern, re.I), facts.split()) for pattern, facts in (
    (rf"\bstep{N}/\d+.*?\btrain_loss{N}", "step train_loss"),
    (rf"\bstep{N}/\d+.*?\btrain_time{N}ms", "last_step last_train_seconds*"),
    (rf"\bstopping_early\b.*?\btrain_time{N}ms", "train_seconds*"),
    (rf"\bstopping_early\b.*?\bstep{N}/", "steps"),
    (rf"\bpre-quantization\b.*?\bval_loss{N}\s+val_bpb{N}", "pre_quant_loss pre_quant_bpb"),
    (rf"\bdiagnostic quantized\s+val_loss{N}\s+val_bpb{N}", "quantized_loss quantized_bpb"),
    (rf"\bquantized_ttt\w*\s+val_loss{N}\s+val_bpb{N}", "val_loss val_bpb"),
    (rf"\bquantized_ttt\w*\s.*?\beval_time{N}ms", "eval_seconds*"),
    (rf"\btotal_eval_time{N}s", "all_eval_seconds"),
    (rf"\bTotal submission size quantized\S*{N} bytes", "total_bytes"),
    (rf"\bCode size(?: \(compressed\))?{N} bytes", "code_bytes"),
    (rf"\bSerialized model quantized\S*{N} bytes", "artifact_bytes"),
    (rf"^\s*val_tokens{N}\s*$", "val_targets"), (rf"\bscored_(?:tokens|targets){N}", "targets"),
    (rf"^\s*train_shards{N}\s*$", "train_shards"), (rf"^\s*world_size{N}\s*$", "world_size"),
    (r"\bcollected \d+ hessians in ()([\d.]+)s", "- calibration_seconds"), (rf"\beffective{N}ms", "budget_seconds*"),
    (rf"\bngram_tilt:hints\b.*?\bgated{N}", "hints"), (rf"\bngram_tilt:hints\b.*?\bwithin_gate{N}", "within_gate"),
    (rf"\bngram_tilt:hints\b.*?\bword_gate{N}", "word_gate"), (rf"\bngram_tilt:hints\b.*?\bagree\w*{N}", "agree_gate"),
    (rf"\bprefix_docs{N}\b.*\bsuffix_docs", "prefix_docs"))]
PLACES = [(re.compile(pattern, re.I), fact) for pattern, fact in (
    (r"eval timer", "timer_begins"), (r"outside[ _]timer|precompute_outside", "built_outside"),
    (r"inside[ _]timer", "built_inside"))]
OWN_TO_A_RUN = {"seed", "run_id", "artifact_dir", "logfile", "model_path", "quantized_model_path", "rank", "local_rank",
                "data_path", "data_dir", "datasets_dir", "tokenizer_path", "train_log_every"}
OWN_TO_AN_EVALUATION = OWN_TO_A_RUN | {"ttt_eval_only", "world_size"}
PEEKING = ("within_boost", "word_boost", "agree_add_boost")  # experts that look at the token being scored


class VerifyError(Exception):
    """There is nothing to audit (exit code 2)."""


class Figure(float):
    """A number of a JSON file that remembers its digits."""

    def __new__(cls, text: str):
        self = super().__new__(cls, text)
        self.text = text
        return self


class Fact(NamedTuple):
    """Something that a file states: the value, as it is written, and where."""

    value: object
    text: str
    where: str


class Finding(NamedTuple):
    """One verdict of one check."""

    verdict: str
    detail: str
    evidence: str = ""
    seed: int | None = None


# ======================================================================================================================
# Reading
# ======================================================================================================================


def typed(text: str):
    """The value that a log line's text stands for."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False}.get(text)
    for kind in (int, float) if len(text) < 19 else (float,):
        try:
            return kind(text)
        except ValueError:
            pass
    if text[:1] in ("[", "{"):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return text


def parse_fields(text: str) -> dict[str, str]:
    """The pairs of `name:value name:value ...`; a value ends before the next ` name:` that stands in no bracket."""
    depth, found = 0, []
    for match in re.finditer(r"[\[({]|[\])}]|(?:^|(?<= ))([A-Za-z_]\w*):", text):
        if match[1]:
            found += [match] * (depth == 0)
        else:
            depth = max(0, depth + (1 if match[0] in "[({" else -1))
    ends = [match.start() - 1 for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end():end] for match, end in zip(found, ends)}


def our_event(line: str) -> tuple[str, dict[str, str]] | None:
    """Kind and fields of a line of ours, None for any other."""
    kind, _, rest = line.partition(" ")
    if kind not in OUR_EVENTS or rest and not re.match(r"[A-Za-z_]\w*:", rest):
        return None
    fields = parse_fields(rest)
    facts = OUR_EVENTS[kind] | {name: fact for name, fact in MORE_FACTS.get(kind, {}).items() if name in fields}
    if kind == "settings":
        known = all(name.isupper() for name in fields)
    else:
        known = facts.keys() <= fields.keys() and all(is_number(typed(fields[name])) or fact in WORDS
                                                      for name, fact in facts.items())
    return (kind, fields) if known else None


def event_text(event: dict) -> str:
    """The log line of an event of a run record."""
    return " ".join([str(event["event"])] + [f"{name}:{value}" for name, value in event.items() if name != "event"])


@dataclass
class Run:
    """What one log says, with the run record beside it if there is one."""

    name: str
    lines: list[str]
    ours: bool = False
    known: int = 0  # lines that say something
    facts: dict[str, list[Fact]] = field(default_factory=dict)
    settings: dict[str, Fact] = field(default_factory=dict)
    changed: dict[str, Fact] = field(default_factory=dict)  # of ours: the settings that the log lists, which are no defaults
    record: dict | None = None
    record_name: str = ""

    def add(self, name: str, value, where: str, text: str = "") -> None:
        self.facts.setdefault(name, []).append(Fact(value, text or str(value), where))

    def get(self, *names: str) -> Fact | None:
        """The last fact of the first of these names that is stated."""
        return next((self.facts[name][-1] for name in names if name in self.facts), None)

    @property
    def trains(self) -> bool:
        """Whether this run trained, and did not only evaluate."""
        return bool(self.get("steps", "train_seconds", "train_loss"))

    @property
    def seed(self) -> int | None:
        """The seed by the settings, else by the file's name."""
        stated = self.settings.get("seed")
        if stated and isinstance(stated.value, int):
            return stated.value
        return self.named_seed

    @property
    def named_seed(self) -> int | None:
        match = re.search(r"seed[_-]?(\d+)", self.name)
        return int(match[1]) if match else None

    @property
    def last_line(self) -> str:
        number = max((n for n, line in enumerate(self.lines, 1) if line.strip()), default=0)
        return f"{self.name}:{number}" if number else self.name

    def take(self, kind: str, fields: dict[str, str], where: str) -> None:
        """Enter an event of ours."""
        self.ours, self.known = True, self.known + 1
        for name, text in fields.items() if kind == "settings" else ():
            self.settings[name.lower()] = self.changed[name.lower()] = Fact(typed(text), text, where)
        for name, fact in (OUR_EVENTS[kind] | MORE_FACTS.get(kind, {})).items():
            if name in fields:
                self.add(fact, typed(fields[name]), where, fields[name])
        if kind in ("finished", "failed"):
            self.add("status", kind, where)

    def take_line(self, line: str, where: str) -> None:
        """Enter a line of a published log, or ignore it."""
        number = int(where.rpartition(":")[2])
        dumped = re.match(r"\s+([A-Za-z_]\w*): (.*?)\s*$", line) if not self.get("step") else None
        if dumped:
            self.settings[dumped[1].lower()] = Fact(typed(dumped[2]), dumped[2], where)
        elif line.strip().lower() == "hyperparameters:":
            self.settings.clear()
        for pattern, facts in PUBLISHED:
            for fact, text in zip(facts, match.groups()) if (match := pattern.search(line)) else ():
                if fact != "-":
                    text = re.sub("[_,]", "", text)
                    if fact.endswith("*") and is_figure(typed(text)):
                        text = str(Decimal(text).scaleb(-3))
                    self.add(fact.rstrip("*"), typed(text), where, text)
                    self.known += 1
        for pattern, fact in PLACES if not dumped else ():
            if pattern.search(line):
                self.add(fact, number, where)


def read_log(path: Path, name: str) -> Run | None:
    """The log `path`, or None if no line of it is one of a log."""
    run = Run(name, [line.rstrip("\r") for line in path.read_bytes().decode("utf-8", "replace").split("\n")])
    for number, line in enumerate(run.lines, 1):
        event = our_event(line)
        if event:
            run.take(*event, f"{name}:{number}")
        else:
            run.take_line(line, f"{name}:{number}")
    return complete(run) if run.known else None


def complete(run: Run) -> Run:
    """Name what follows from the facts: the score without test-time training, the figures of a run stopped by its steps."""
    if run.record:
        for name, value in run.record["settings"].items():
            run.settings[name] = Fact(value, str(value), f"{run.record_name}: settings.{name}")
    off = run.settings.get("ttt_enabled")
    plain = [("val_bpb", "quantized_bpb"), ("val_loss", "quantized_loss"), ("targets", "quantized_targets"),
             ("eval_seconds", "quantized_seconds")] if run.ours and off and off.value is False else []
    for name, other in [("pre_quant_bpb", "raw_bpb"), ("steps", "last_step"), ("train_seconds", "last_train_seconds"), *plain]:
        if name not in run.facts and other in run.facts and (run.ours or run.get("val_bpb", "quantized_bpb")):
            run.facts[name] = run.facts[other]
    return run


def read_json(path: Path) -> tuple[object, str]:
    """The JSON value in a file, numbers with their digits, and what is wrong with it."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_float=Figure,
                          parse_int=lambda text: int(text) if len(text) < 19 else Figure(text)), ""
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    except json.JSONDecodeError as error:
        return None, f"no JSON at line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return None, f"no JSON: {type(error).__name__}"


def lookup(value, *keys):
    """value[key][key]..., None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def is_record(value) -> bool:
    """Whether a JSON value has the form of a run record."""
    return (isinstance(value, dict) and isinstance(value.get("settings"), dict) and isinstance(value.get("results"), dict)
            and isinstance(value.get("events"), list) and all(isinstance(e, dict) and "event" in e for e in value["events"]))


class Folder:
    """Everything that a record folder states."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise VerifyError(f"{path}: no such folder")
        self.path, self.runs, self.broken = path, [], []  # broken: (file, what is wrong) of JSON files beside a log
        names = sorted(str(p.relative_to(path)) for pattern in ("*", "*/*") for p in path.glob(pattern)
                       if p.is_file() and not any(part.startswith((".", "__")) for part in p.relative_to(path).parts))
        logs = {}
        for name in sorted(names, key=lambda name: "/" in name):
            if name.endswith((".log", ".txt")) and not ("/" in name and any("/" not in stem for stem in logs)):
                try:
                    run = read_log(path / name, name)
                except OSError as error:
                    raise VerifyError(f"{path / name}: {error.strerror}") from None
                if run:
                    logs[name.rpartition(".")[0]] = run
        records = {}
        for name in names:
            stem = name.removesuffix(".json")
            if stem != name and ("/" not in name or stem in logs) and name not in ("submission.json", "data_manifest.json"):
                value, wrong = read_json(path / name)
                if is_record(value):
                    records[stem] = (name, value)
                elif stem in logs:
                    self.broken.append((name, wrong or "not a run record"))
        if not logs and not records:
            raise VerifyError(f"{path}: no log (*.log, *.txt) in this folder; name the folder of one record")
        for stem, (name, record) in records.items():
            if stem not in logs:
                logs[stem] = run = Run(name, [])
                for index, event in enumerate(record["events"]):
                    fields = {key: str(value) for key, value in event.items() if key != "event"}
                    if event["event"] in OUR_EVENTS:
                        run.take(event["event"], fields, f"{name}: events[{index}]")
            logs[stem].record, logs[stem].record_name = record, name
            complete(logs[stem])
        self.runs = list(logs.values())
        self.seeds = sorted({run.seed for run in self.runs if run.seed is not None})
        self.ours = any(run.ours for run in self.runs)
        self.submission, self.submission_wrong = None, ""
        if (path / "submission.json").is_file():
            self.submission, self.submission_wrong = read_json(path / "submission.json")
            if not isinstance(self.submission, dict):
                self.submission, self.submission_wrong = None, self.submission_wrong or "not a JSON object"

    def of(self, seed: int | None) -> list[Run]:
        """The runs of a seed, the one that trained first."""
        return sorted((run for run in self.runs if run.seed == seed), key=lambda run: not run.trains)

    def logs_of(self, seed: int) -> str:
        return evidence(*(run.name for run in self.of(seed)))

    def facts(self, seed: int, figure: str) -> list[Fact]:
        """What the logs of a seed state of a figure, the latest evaluation first."""
        found = []
        for run in reversed(self.of(seed)):
            for name in MEANINGS[run.ours].get(figure, (figure,)):
                found += [fact for fact in (run.get(name),) if fact]
        return found

    @property
    def claimed_seeds(self) -> list[int] | None:
        """The seeds that submission.json names, None if it names none."""
        tables = [value for key, value in (self.submission or {}).items() if key in SEED_TABLES]
        found = [seed for table in tables for seed, _ in seed_entries(table)]
        found += [seed for table in tables if isinstance(table, list) for seed in table if isinstance(seed, int)]
        return sorted(set(found)) or None


def seed_entries(table) -> list[tuple[int, dict]]:
    """(seed, its figures) of a table by seed, or of a list of objects that name their seed."""
    rows = table.items() if isinstance(table, dict) else [
        (row.get("seed"), row) for row in table if isinstance(row, dict)] if isinstance(table, list) else []
    return [(int(match[1]), row) for seed, row in rows if isinstance(row, dict)
            and (match := re.fullmatch(r"(?:seed[_-]?)?(\d+)", str(seed)))]


def half_unit(text: str) -> float:
    """Half a unit of the last digit that is given."""
    try:
        exponent = Decimal(text).as_tuple().exponent
        return 0.5 * 10.0 ** exponent if isinstance(exponent, int) else 0.0
    except ArithmeticError:
        return 0.0


def agree(a: Fact, b: Fact) -> bool:
    """Whether two numbers are equal to the digits given; whole numbers exactly."""
    if isinstance(a.value, int) and isinstance(b.value, int):
        return a.value == b.value
    return abs(a.value - b.value) <= max(half_unit(a.text), half_unit(b.text)) * (1 + 1e-6) + 1e-12 * abs(a.value)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_figure(value) -> bool:
    """Whether the value is a number to reckon with."""
    return is_number(value) and abs(value) < 1e18


def evidence(*facts: Fact | str | None) -> str:
    return ", ".join(dict.fromkeys(fact if isinstance(fact, str) else fact.where for fact in facts if fact))


# ======================================================================================================================
# Statistics
# ======================================================================================================================


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (modified Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    c, d = 1.0, 1 / away_from_zero(1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / away_from_zero(1 + term * d), away_from_zero(1 + term / c)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * total


def away_from_zero(value: float) -> float:
    """The value, kept away from zero."""
    return value if abs(value) > 1e-300 else 1e-300


def student_t_sf(t: float, freedom: float) -> float:
    """P(T > t) of Student's t distribution."""
    if math.isinf(t):
        return float(t < 0)
    if t * t < freedom:  # where the tail is no small number, count from the middle
        return 0.5 - math.copysign(0.5, t) * incomplete_beta(0.5, freedom / 2, t * t / (freedom + t * t))
    tail = 0.5 * incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t > 0 else 1 - tail


def t_test(high: list[float], low: list[float], paired: bool, shift: float = 0.0) -> tuple[float, float]:
    """t and degrees of freedom for mean(high) - mean(low) > shift, paired or Welch's."""
    if paired:
        differences = [a - b - shift for a, b in zip(high, low)]
        mean, freedom = statistics.fmean(differences), len(high) - 1.0
        error2 = statistics.variance(differences) / len(differences)
    else:
        mean = statistics.fmean(high) - statistics.fmean(low) - shift
        parts = [statistics.variance(side) / len(side) for side in (high, low)]
        error2 = sum(parts)
        freedom = error2**2 / away_from_zero(sum(p * p / (len(side) - 1) for p, side in zip(parts, (high, low))))
    return (mean / math.sqrt(error2) if error2 > 0 else math.copysign(math.inf, mean)), max(freedom, 1.0)


# ======================================================================================================================
# Checks: each yields its findings
# ======================================================================================================================


def named_figure(key: str) -> tuple[str | None, str, int]:
    """What a key of submission.json names: figure, statistic (empty, mean, std, max or min), power of ten to seconds."""
    key, statistic, power = key.lower(), "", 0
    for word, meaning in (("mean", "mean"), ("avg", "mean"), ("average", "mean"), ("std", "std"), ("stdev", "std"),
                          ("stddev", "std"), ("max", "max"), ("largest", "max"), ("min", "min")):
        short = re.sub(rf"^{word}_|_{word}(?=_|$)", "", key)
        if short != key:
            key, statistic = short, meaning
    if key not in FIGURES and (match := re.fullmatch(r"(.*)_(ms|s|sec|secs|seconds)", key)):
        key, power = match[1], -3 if match[2] == "ms" else 0
    return FIGURES.get(key), statistic, power


def leaves(value, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """(path, value) of every number or text in a JSON value; entries of a list that name their seed go by it."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            seed = child.get("seed") if isinstance(child, dict) else None
            yield from leaves(child, (*path, str(index if seed is None else seed)))
    else:
        yield path, value


def as_claim(value, path: tuple, power: int) -> Fact | None:
    """A number of submission.json, also as text like 599.6s, in seconds if it is a time."""
    text = value.text if isinstance(value, Figure) else str(value) if is_number(value) else value
    match = re.fullmatch(r"\s*([\d.,]*\d)\s*(ms|s)?\s*", text) if isinstance(text, str) and isinstance(value, str) else None
    if match:
        text, power = match[1].replace(",", ""), -3 if match[2] == "ms" else power
    elif not is_figure(value):
        return None
    try:
        text = str(Decimal(text).scaleb(power))
    except ArithmeticError:
        return None
    return Fact(typed(text), text, f"submission.json: {'.'.join(map(str, path))}") if is_figure(typed(text)) else None


def check_figures(f: Folder) -> Iterator[Finding]:
    """Every figure of submission.json against the logs."""
    if f.submission is None:
        there = bool(f.submission_wrong)
        yield Finding(FAIL if there else UNKNOWN, f"submission.json: {f.submission_wrong}" if there else
                      "no submission.json in the folder", "submission.json")
        return
    confirmed, unknown, shown, two = 0, [], [], {}
    for path, value in leaves(f.submission):
        if (path[0] in NO_FIGURES and (path[0] not in SEED_TABLES or len(path) == 2) or path[-1] in NO_FIGURES
                or isinstance(value, bool) or value is None):
            continue
        match = re.fullmatch(r"(?:seed[_-]?)?(\d+)", path[1]) if path[0] in SEED_TABLES and len(path) == 3 else None
        seed = int(match[1]) if match else None
        figure, statistic, power = named_figure(str(path[-1]))
        by_seed = len(path) == 2 and figure and re.fullmatch(r"\d+", str(path[1]))  # "val_bpb_by_seed": {"42": ...}
        figure = figure if len(path) == 1 or seed is not None or by_seed else None
        claim = as_claim(value, path, power) if figure or is_number(value) else None
        if claim is None:
            if figure and value != "":
                unknown.append(".".join(map(str, path)))
            continue
        dumped = str(path[-1]).lower()
        if figure is None and len(path) <= 2 and any(dumped in run.settings for run in f.runs):
            stated = [run.settings[dumped] for run in f.runs if dumped in run.settings]
            wrong = [fact for fact in stated if is_figure(fact.value) and not agree(claim, fact)]
            if wrong:
                yield Finding(FAIL, f"{claim.where[17:]} {claim.text}, the logs ran with {wrong[0].text}",
                              evidence(claim, *wrong))
            else:
                confirmed += 1
            continue
        found = None
        if figure and seed is not None:
            facts = [fact for fact in f.facts(seed, figure) if is_figure(fact.value)]
            found = f"its log says {' or '.join(dict.fromkeys(fact.text for fact in facts))}" if facts else None
            agreed = [fact for fact in facts if agree(claim, fact)]
            sources = agreed[:1] or facts
            if agreed and is_better(f, seed, figure, max(agreed, key=lambda fact: fact.value)):
                yield Finding(FAIL, f"{claim.where[17:]} {claim.text}, the better of two scores that disagree: "
                              f"{tell_apart(f, [seed], figure)}", evidence(claim, *scores_apart(f, seed, figure)), seed)
                continue
        elif figure:
            found, agreed, sources = compare_over_seeds(f, figure, statistic, claim)
        if not found:
            unknown.append(".".join(map(str, path)))
        elif agreed:
            confirmed += 1
            shown += sources[:1] if figure == "val_bpb" and seed is not None else []
            seeds = [seed] if seed is not None else f.claimed_seeds or f.seeds
            two |= {(figure, seed): scores_apart(f, seed, figure) for seed in seeds}
        else:
            yield Finding(FAIL, f"{claim.where[17:]} {claim.text}, {found}", evidence(claim, *sources), seed)
    two = {key: apart for key, apart in two.items() if apart}
    yield from check_hardware(f)
    if unknown:
        yield Finding(UNKNOWN, f"no log states {', '.join(unknown)}", "submission.json")
    if confirmed:
        notes = [f"the better {figure} of two that disagree is not the one named: {tell_apart(f, [seed], figure)}"
                 for figure, seed in two]
        yield Finding(PASS, "; ".join([f"{confirmed} figures of submission.json are those of the logs", *notes]),
                      evidence("submission.json", *shown, *(fact for apart in two.values() for fact in apart)))


def compare_over_seeds(f: Folder, figure: str, statistic: str, claim: Fact) -> tuple[str | None, bool, list[Fact]]:
    """What the logs give for a figure over all seeds: in words, None if a seed lacks it; whether the claim agrees; sources."""
    seeds = f.claimed_seeds or f.seeds
    if not all(any(is_figure(fact.value) for fact in f.facts(seed, figure)) for seed in seeds):
        return None, False, []
    refused = None
    for first in (True, False):  # a seed without a row of its own: by the repeated evaluation, or by the training log
        sources = [named_fact(f, seed, figure, first) for seed in seeds]
        text, same, sources = over_seeds(f, figure, statistic, claim, sources)
        better = [seed for seed, fact in zip(seeds, sources) if statistic != "std" and is_better(f, seed, figure, fact)]
        if same and not better:
            return text, True, sources
        if same:
            return (f"which takes the better of two scores that disagree: {tell_apart(f, better, figure)}", False,
                    [fact for seed in better for fact in scores_apart(f, seed, figure)])
        refused = refused or (text, False, sources)
    return refused


def figures_of(f: Folder, seed: int, figure: str) -> list[Fact]:
    return [fact for fact in f.facts(seed, figure) if is_figure(fact.value)]


def named_fact(f: Folder, seed: int, figure: str, first: bool = True) -> Fact:
    """What a seed's logs state of a figure: that which its row in submission.json names, else the first or the last."""
    facts = figures_of(f, seed, figure)
    rows = [row for name in SEED_TABLES for number, row in seed_entries((f.submission or {}).get(name)) if number == seed]
    stated = [fact for row in rows for key, value in row.items() if named_figure(str(key))[0] == figure
              and (fact := as_claim(value, (key,), named_figure(str(key))[2]))]
    return next((fact for fact in facts for row in stated if agree(fact, row)), facts[0 if first else -1])


def scores_apart(f: Folder, seed: int, figure: str) -> list[Fact]:
    """A seed's scores by its training and its repeated evaluation, if they disagree."""
    facts = figures_of(f, seed, figure) if figure.endswith("_bpb") or figure == "val_loss" else []
    nats = 1.0
    if facts and figure == "val_loss":
        bpb = figures_of(f, seed, "val_bpb")
        nats = facts[0].value / bpb[0].value if bpb and bpb[0].value > 0 else math.log(2)
    values = [fact.value for fact in facts]
    return facts if facts and max(values) - min(values) > SCORES_DIFFER * nats * (1 + 1e-9) else []


def is_better(f: Folder, seed: int, figure: str, fact: Fact) -> bool:
    """Whether this is the better of a seed's scores that disagree."""
    apart = scores_apart(f, seed, figure)
    return bool(apart) and fact.value < 0.5 * (max(x.value for x in apart) + min(x.value for x in apart))


def tell_apart(f: Folder, seeds: list[int], figure: str) -> str:
    return ", ".join(f"seed {seed} {' and '.join(fact.text for fact in scores_apart(f, seed, figure))}" for seed in seeds)


def over_seeds(f: Folder, figure: str, statistic: str, claim: Fact, sources: list[Fact]) -> tuple[str | None, bool, list[Fact]]:
    """compare_over_seeds() with one fact for each seed."""
    values = [fact.value for fact in sources]
    if not values or statistic == "std" and len(values) < 2:
        return None, False, []
    digits = max((fact.text for fact in sources), key=half_unit)

    def same(value: float) -> bool:
        slack = half_unit(digits) if statistic != "max" or not isinstance(value, int) else 0
        return abs(value - claim.value) <= max(slack, half_unit(claim.text)) * (1 + 1e-6) + 1e-12 * abs(value)

    if statistic == "std":
        sample, population = statistics.stdev(values), statistics.pstdev(values)
        note = " (it is the population's, divided by n, not by n - 1)" if same(population) else ""
        return f"the sample standard deviation of the logs is {sample:.8g}{note}", same(sample), sources
    mean, largest = statistics.fmean(values), max(values)
    if statistic == "min":
        return f"the smallest of the logs is {min(values)}", same(min(values)), sources
    if statistic == "max" or figure.endswith("_bytes") and not statistic:
        published = not f.ours and statistic != "max"
        return f"the largest of the logs is {largest}", largest == claim.value or published and same(mean), sources
    return f"the mean of the logs is {mean:.10g}", same(mean), sources


def check_hardware(f: Folder) -> Iterator[Finding]:
    """The hardware that submission.json names against the machine of the logs."""
    named = re.search(r"(\d+)\s*[x×*]\s*(?:NVIDIA\s*)?([A-Z]+\d+)", str(f.submission.get("hardware", "")), re.I)
    for run in f.runs if named else ():
        count, device = run.get("devices", "world_size"), run.get("device")
        for fact, wrong in ((count, count and count.value != int(named[1])),
                            (device, device and named[2].lower() not in device.text.lower())):
            if wrong and run.trains:
                yield Finding(FAIL, f"hardware {named[0]}, the log says {fact.text}", evidence(
                    "submission.json: hardware", fact), run.seed)


def check_bytes(f: Folder) -> Iterator[Finding]:
    """Artifact and code of every seed below the cap, and adding up."""
    for run in f.runs:
        total, artifact, code, packed = map(run.get, ("total_bytes", "artifact_bytes", "code_bytes", "packed_bytes"))
        parts = f"{artifact.value:,} + {code.value:,}" if artifact and code else ""
        if not total:
            if not any(other.get("total_bytes") for other in f.of(run.seed)):
                yield Finding(UNKNOWN, "the log states no total", run.name, run.seed)
            continue
        good = True
        if artifact and code and artifact.value + code.value != total.value:
            good = False
            yield Finding(FAIL, f"{parts} are {artifact.value + code.value:,} bytes, the log says {total.value:,}",
                          evidence(total, artifact, code), run.seed)
        if packed and code and packed.value != code.value:
            good = False
            yield Finding(FAIL, f"{code.value:,} bytes of code counted, the packed script has {packed.value:,}",
                          evidence(code, packed), run.seed)
        if total.value >= BYTES_CAP:
            good = False
            yield Finding(FAIL, f"{total.value:,} bytes, not below {BYTES_CAP:,}", evidence(total), run.seed)
        if good and parts:
            yield Finding(PASS, f"{parts} = {total.value:,} bytes", evidence(total), run.seed)
        elif good:
            yield Finding(UNKNOWN, f"{total.value:,} bytes; what of it is code the log does not say", evidence(total), run.seed)


def parse_nodes(text: str) -> list[ast.AST] | None:
    """The nodes of a Python source, None if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def unpack_lzma(data: bytes) -> bytes | None:
    unpacker = lzma.LZMADecompressor(memlimit=1 << 28)
    found = unpacker.decompress(data, UNPACKED_CAP)
    return found if unpacker.eof and not unpacker.unused_data else None


def unpack_zlib(data: bytes) -> bytes | None:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, UNPACKED_CAP)
    return found if unpacker.eof and not unpacker.unused_data else None


def unpack_brotli(data: bytes) -> bytes | None:
    unpacker = brotli.Decompressor()
    found = unpacker.process(data, output_buffer_limit=UNPACKED_CAP)
    return found if unpacker.is_finished() else None


def hidden_source(nodes: list[ast.AST]) -> tuple[list[str], int]:
    """The texts that the constants of a self-extracting script hold; characters of encoded constants that stay closed."""
    found, closed = [], 0
    for node in nodes:
        value = node.value if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) else ""
        opened = []
        for decode in (base64.b85decode, base64.b64decode, bytes) if len(value) > 1000 else ():
            for unpack in (unpack_lzma, unpack_zlib, unpack_brotli):
                try:
                    opened.append(unpack(decode(value)).decode("utf-8"))
                except Exception:  # whatever a stranger's constant is, it is then no source
                    continue
        blanks = value.count(b" " if isinstance(value, bytes) else " ")  # prose and code have many, what is encoded has none
        if not opened and len(value) >= ENCODED_PIECE and blanks * 100 < len(value):
            closed += len(value)
        found += opened
    return found, closed


def bundle(text: str) -> dict[str, str]:
    """The files of a script that packs several, as JSON {name: text}; empty for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and all(isinstance(x, str) for x in value.values()) else {}


def helper_files(folder: Path, script: str = "train_gpt.py") -> tuple[set[str], bool, int]:
    """Files of the folder that the script imports or names, and those that these do; whether all could be parsed; how many
    characters of encoded text could not be unpacked."""
    seen, waiting, parsed, closed = set(), [(script, (folder / script).read_text("utf-8", "replace"))], True, 0
    packed = set()  # names of files that the script brings itself
    while waiting:
        name, text = waiting.pop()
        nodes = parse_nodes(text)
        if nodes is None:
            parsed = False
            continue
        sources, more = hidden_source(nodes)
        closed += more
        for source in sources:
            files = bundle(source)
            packed |= files.keys()
            waiting += [x for x in files.items() if x[0].endswith(".py") or parse_nodes(x[1])] if files else [(name, source)]
        wanted = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted |= {node.module or ""} | {f"{node.module}.{alias.name}".removeprefix("None.") for alias in node.names}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                    "import_module", "__import__", "run_module"):
                wanted |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        paths = {f"{module.replace('.', '/')}{end}" for module in wanted for end in (".py", "/__init__.py")}
        paths |= {f"{module.replace('.', '/')}{end}" for module in wanted for end in (".so", ".c")} if wanted else set()
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(
                    r"[\w./-]+\.(c|cc|cpp|cu|cuh|h|py|so|npy|bin|json)", node.value):
                paths.add(node.value.lstrip("./"))
        for path in sorted(paths - seen - packed - {script, "submission.json"}):
            if (folder / path).is_file() and ".." not in path:
                seen.add(path)
                if path.endswith(".py"):
                    waiting.append((path, (folder / path).read_text("utf-8", "replace")))
    return seen, parsed, closed


def script_named(f: Folder) -> bool:
    """Whether the folder's train_gpt.py is, byte by byte, the code that every run's own record names."""
    script = f.path / "train_gpt.py"
    named = {fact.text if (fact := run.get("code_sha256")) and run.ours else "" for run in f.runs}
    return script.is_file() and named == {hashlib.sha256(script.read_bytes()).hexdigest()}


def check_code(f: Folder) -> Iterator[Finding]:
    """The code in the folder is the code that was counted, all of it."""
    counted = [run.get("code_bytes") for run in f.runs if run.get("code_bytes")]
    script = f.path / "train_gpt.py"
    if not script.is_file():
        yield Finding(UNKNOWN, "no train_gpt.py in the folder")
        return
    if not counted:
        yield Finding(UNKNOWN, f"no log states the bytes of code; train_gpt.py has {script.stat().st_size:,}", "train_gpt.py")
        return
    size, counts = script.stat().st_size, sorted({fact.value for fact in counted})
    files, parsed, closed = helper_files(f.path)
    helpers = {name: (f.path / name).read_bytes() for name in sorted(files)}
    text = f"{' or '.join(f'{count:,}' for count in counts)} bytes of code counted, train_gpt.py has {size:,}"
    extra = sum(map(len, helpers.values()))
    if helpers:
        text += f", and it needs {', '.join(f'{name} ({len(data):,})' for name, data in helpers.items())}"
    where = evidence("train_gpt.py", *helpers, *counted)
    if any(count != size for count in counts) and (f.ours or len(counts) > 1):
        yield Finding(FAIL, text + ("" if f.ours else "; not one script"), where)
    elif counts == [size] and helpers:
        yield Finding(FAIL, f"{text}, which are not counted", where)
    elif counts != [size]:
        totals = [run.get("total_bytes").value for run in f.runs if run.get("total_bytes")]
        note = f"; largest total {max(totals):,}, with the script and its helpers as they lie here " \
               f"{max(totals) - counts[0] + size + extra:,}" if totals else ""
        yield Finding(UNKNOWN, f"{text}: another form of it was counted{note}", where)
    elif not parsed:
        yield Finding(UNKNOWN, f"{text}; what it imports cannot be told, it is no Python of this version", where)
    elif closed > ENCODED_CAP and not script_named(f):
        yield Finding(UNKNOWN, f"{text}; whether it needs other files cannot be told: {closed:,} characters of it are encoded "
                      "and cannot be unpacked here", where)
    elif closed > ENCODED_CAP:
        yield Finding(PASS, f"{text}; it cannot be unpacked here, but its SHA-256 is that of the whole code of every run",
                      evidence(where, *(run.get("code_sha256") for run in f.runs)))
    else:
        yield Finding(PASS, f"{text} and needs no other file of the folder", where)


def check_train_seconds(f: Folder) -> Iterator[Finding]:
    """Training time of every seed within the cap, calibration included where the log says so."""
    for seed in f.seeds:
        runs = [run for run in f.of(seed) if run.get("train_seconds")]
        if not runs:
            yield Finding(UNKNOWN, "no log of this seed states its training time", f.logs_of(seed), seed)
        for run in runs:
            spent, calibration, steps = map(run.get, ("train_seconds", "calibration_seconds", "step_seconds"))
            limit = run.get("cap_seconds") or run.settings.get("max_wallclock_seconds")
            cap = min(SECONDS_CAP, limit.value if limit and is_number(limit.value) and limit.value > 0 else SECONDS_CAP)
            text = f"{spent.text} s of {cap:g}"
            if calibration:
                text += f", {calibration.text} s of calibration {'included' if run.ours else 'not included'}"
            if run.ours and calibration and steps and abs(steps.value + calibration.value - spent.value) > 0.0021:
                yield Finding(FAIL, f"{steps.text} s of steps and {calibration.text} s of calibration are not {spent.text} s",
                              evidence(spent), seed)
            elif not spent.value <= cap:
                yield Finding(FAIL, text, evidence(spent, limit), seed)
            else:
                yield Finding(PASS, text, evidence(spent, None if run.ours else calibration), seed)


def check_eval_seconds(f: Folder) -> Iterator[Finding]:
    """Evaluation time of every seed within the cap."""
    for seed in f.seeds:
        times = [fact for run in f.of(seed) for name in ("eval_seconds", "all_eval_seconds") if (fact := run.get(name))]
        if not times:
            yield Finding(UNKNOWN, "no log of this seed states its evaluation time", f.logs_of(seed), seed)
        for spent in [fact for fact in times if not fact.value <= SECONDS_CAP]:
            yield Finding(FAIL, f"{spent.text} s of {SECONDS_CAP:g}", evidence(spent), seed)
        if times and all(fact.value <= SECONDS_CAP for fact in times):
            worst = max(times, key=lambda fact: fact.value)
            yield Finding(PASS, f"{worst.text} s of {SECONDS_CAP:g}", evidence(worst), seed)


def scored_runs(f: Folder) -> Iterator[tuple[int, Run]]:
    """(seed, run) of every run with a score, or the seed's only other runs if none has."""
    for seed in f.seeds:
        runs = f.of(seed)
        yield from ((seed, run) for run in [run for run in runs if run.get("val_bpb")] or runs)


def check_hints(f: Folder) -> Iterator[Finding]:
    """N-gram hints are computed inside the evaluation's timer."""
    for seed, run in scored_runs(f):
        tilt, outside = run.settings.get("ngram_tilt_enabled"), run.settings.get("ngram_hint_precompute_outside")
        inside, begins = run.get("hints_inside_timer"), run.get("timer_begins")
        said_outside, said_inside = run.get("built_outside"), run.get("built_inside")
        if tilt and tilt.value in (False, 0):
            yield Finding(PASS, "no hints", evidence(tilt), seed)
        elif outside and outside.value not in (False, 0):
            yield Finding(FAIL, "the settings put them outside the timer", evidence(inside, outside, said_outside), seed)
        elif inside:
            true = inside.value is True
            yield Finding(PASS if true else FAIL, "inside the timer" if true else "outside the timer", evidence(inside), seed)
        elif said_outside and begins:
            late = said_outside.value > begins.value
            yield Finding(PASS if late else FAIL, "built after the timer had begun, whatever the line calls it" if late else
                          "built before the timer began", evidence(said_outside, begins, outside), seed)
        elif said_outside:
            yield Finding(UNKNOWN if outside or said_inside else FAIL, "the log contradicts itself" if outside or said_inside
                          else "outside the timer", evidence(said_outside, outside, said_inside), seed)
        elif outside or said_inside:
            yield Finding(PASS, "inside the timer", evidence(outside, said_inside), seed)
        else:
            yield Finding(UNKNOWN, "the log does not say where hints were computed", run.name, seed)


def check_experts(f: Folder) -> Iterator[Finding]:
    """Experts that look at the token being scored are off."""
    for seed, run in scored_runs(f):
        gates = [fact for name in ("within_gate", "word_gate", "agree_gate") if (fact := run.get(name))]
        boosts = [run.settings[name] for name in PEEKING if name in run.settings]
        taus = [run.settings[name] for name in ("within_tau", "word_tau") if name in run.settings]
        tilt = run.settings.get("ngram_tilt_enabled")
        opened = [(name, fact) for name in ("within_gate", "word_gate", "agree_gate") if (fact := run.get(name)) and fact.value]
        boosted = [(name, run.settings[name]) for name in PEEKING if name in run.settings and run.settings[name].value]
        closed = len(gates) == 3
        if tilt and tilt.value in (False, 0):
            yield Finding(PASS, "no tilt", evidence(tilt), seed)
        elif opened or boosted:
            text = ", ".join([f"{name} {fact.value:,}" for name, fact in opened] + [f"{n} {x.text}" for n, x in boosted])
            where = evidence(*(fact for _, fact in opened + boosted))
            yield Finding(FAIL, f"experts that see the target are on: {text}", where, seed)
        elif run.ours and run.record and "ngram_boost" in run.settings:
            yield Finding(PASS, "this program has token hints only", evidence(run.settings["ngram_boost"]), seed)
        elif closed:
            yield Finding(PASS, "their gates opened nowhere", evidence(*gates[:1], *boosts), seed)
        elif len(boosts) == 3 and len(taus) == 2 and all(is_number(tau.value) and tau.value > 1 for tau in taus):
            yield Finding(PASS, "their boosts are zero and their thresholds above 1", evidence(*boosts, *taus), seed)
        elif len(boosts) == 3:
            yield Finding(UNKNOWN, "their boosts are zero, but an open gate may still drop token hints",
                          evidence(*boosts, *taus), seed)
        else:
            yield Finding(UNKNOWN, "the log does not say which experts ran", run.name, seed)


def check_targets(f: Folder) -> Iterator[Finding]:
    """Every token of the validation text is scored."""
    manifest, _ = read_json(f.path / "data_manifest.json")
    tokens = lookup(manifest, "splits", "val", "tokens")
    stated = Fact(tokens - 1, "", "data_manifest.json: splits.val.tokens") if is_number(tokens) else None
    for seed, run in scored_runs(f):
        text, scored, whole = run.get("val_targets"), run.get("targets"), run.get("whole_text")
        tail = run.settings.get("eval_include_tail")
        length = run.settings.get("eval_seq_len")
        full = Fact(PUBLISHED_TARGETS, "", "") if not run.ours else stated or (
            text if text and text.value == PUBLISHED_TARGETS else None)
        if scored and text and scored.value != text.value:
            yield Finding(FAIL, f"{text.value - scored.value:,} targets unscored: {scored.value:,} of {text.value:,}",
                          evidence(scored, text), seed)
        elif whole and whole.value is not True:
            yield Finding(FAIL, "a part of the validation documents was scored", evidence(whole), seed)
        elif run.ours and tail and tail.value is False and not (text and full and text.value == full.value):
            yield Finding(FAIL, "the tail of the validation text is cut", evidence(tail), seed)
        elif run.ours and text and full and text.value != full.value:
            yield Finding(FAIL, f"{full.value - text.value:,} targets unscored: {text.value:,} of {full.value:,}",
                          evidence(text, full), seed)
        elif run.ours and text and not (full and scored):
            yield Finding(UNKNOWN, f"{text.value:,} targets; " + (
                "the log does not say how many were scored" if full else "how many the whole text has only its manifest can "
                "say, and data_manifest.json is not here" if manifest is None else "data_manifest.json does not say how many "
                "the whole text has"), evidence(text, scored), seed)
        elif run.ours and text:
            yield Finding(PASS, f"{scored.value:,} of {text.value:,} targets", evidence(scored, text), seed)
        elif text and text.value == PUBLISHED_TARGETS:
            yield Finding(PASS, f"{text.value:,} targets, the tail included", evidence(text), seed)
        elif text and 0 < PUBLISHED_TARGETS - text.value < (length.value if length and is_number(length.value) else 4096):
            yield Finding(FAIL, f"{PUBLISHED_TARGETS - text.value:,} targets unscored: the tail of the published text is cut, "
                          f"{text.value:,} of {PUBLISHED_TARGETS:,}", evidence(text), seed)
        elif text:
            yield Finding(UNKNOWN, f"{text.value:,} targets; how many the text has is not said", evidence(text), seed)
        else:
            yield Finding(UNKNOWN, "the log does not say how many targets there are", run.name, seed)


def check_seeds(f: Folder) -> Iterator[Finding]:
    """Three seeds or more, each with one finished run, the same ones in submission.json."""
    good = True

    def fail(text: str, *where, seed=None) -> Finding:
        nonlocal good
        good = False
        return Finding(FAIL, text, evidence(*where), seed)

    for run in f.runs:
        if run.seed is None:
            good = False
            yield Finding(UNKNOWN, "neither the log nor its name says the seed", run.name)
        elif run.named_seed not in (None, run.seed):
            yield fail(f"the file's name says seed {run.named_seed}, the run had {run.seed}", run.settings["seed"], run.name,
                       seed=run.seed)
        status, scores = run.get("status"), run.facts.get("val_bpb", [])
        if run.ours and (not status or status.value != "finished"):
            yield fail("the run failed" if status else "the run has no end", status or run.last_line, seed=run.seed)
        elif not run.ours and not scores and any(other.get("val_bpb") for other in f.of(run.seed)):
            good = False
            yield Finding(UNKNOWN, "this log ends without a score; whether the other log scored its artifact is not said",
                          evidence(run.last_line, *(other.get("val_bpb") for other in f.of(run.seed))), run.seed)
        elif not scores:
            yield fail("the log ends without a score", run.last_line, seed=run.seed)
        different = [score for score in scores if not agree(score, scores[-1])]
        if different:
            yield fail(f"one log, two scores: {different[0].text} and {scores[-1].text}", different[0], scores[-1],
                       seed=run.seed)
    for seed in f.seeds:
        trained = [run for run in f.of(seed) if run.trains]
        if len(trained) > 1:
            yield fail(f"{len(trained)} training logs of one seed", *(run.name for run in trained), seed=seed)
        elif not trained:
            good = False
            yield Finding(UNKNOWN, "no training log of this seed", f.logs_of(seed), seed)
    if len(f.seeds) < LEAST_SEEDS:
        yield fail(f"{len(f.seeds)} seeds, {LEAST_SEEDS} are needed", *(run.name for run in f.runs))
    claimed = f.claimed_seeds
    if claimed is None:
        good = False
        yield Finding(UNKNOWN, "submission.json names no seeds" if f.submission else "no submission.json to name the seeds",
                      "submission.json" if f.submission else "")
    else:
        if set(claimed) != set(f.seeds):
            yield fail(f"submission.json names seeds {claimed}, the logs are of {f.seeds}", "submission.json: seeds",
                       *(run.name for run in f.runs if run.seed not in claimed))
        for key in SEED_TABLES & f.submission.keys():
            table = f.submission[key]
            listed = [seed for seed in table if isinstance(seed, int)] if isinstance(table, list) else []
            listed = listed or [seed for seed, _ in seed_entries(table)]
            if listed and sorted(listed) != claimed:
                yield fail(f"{key} lists {listed}, submission.json as a whole {claimed}", f"submission.json: {key}")
    if good:
        yield Finding(PASS, f"seeds {', '.join(map(str, f.seeds))}, each with one finished run",
                      evidence(*(run.get("status") or run.get("val_bpb") for run in f.runs)))


def check_data(f: Folder) -> Iterator[Finding]:
    """Training and validation documents are disjoint: the manifest says so, and it is here."""
    manifest, wrong = read_json(f.path / "data_manifest.json")
    there, good = (f.path / "data_manifest.json").is_file(), True
    shipped, key = lookup(manifest, "splits_disjoint"), "data_manifest.json: splits_disjoint"
    overlap, unsaid = "training and validation documents overlap", "whether the splits are disjoint is not said"
    if there and shipped is not True:
        good = False
        yield (Finding(FAIL, f"data_manifest.json: {wrong}", "data_manifest.json") if wrong else
               Finding(FAIL, overlap, key) if shipped is False else Finding(UNKNOWN, unsaid, "data_manifest.json"))
    for name in ("train_tokens", "val_targets", "train_docs", "val_docs", "train_shards"):
        stated = [fact for run in f.runs if (fact := run.get(name)) and (run.trains or name != "train_tokens")]
        other = next((fact for fact in stated if fact.value != stated[0].value), None)
        if other:
            good = False
            yield Finding(FAIL, f"{name} differs between runs: {stated[0].text} and {other.text}", evidence(stated[0], other))
    for run in f.runs:
        named, disjoint = run.get("manifest"), run.get("splits_disjoint")
        if not named or named.value == "none":
            if run.trains or not run.ours:
                good = False
                yield Finding(UNKNOWN, "the log names no manifest of its data", evidence(named or run.name), run.seed)
            continue
        if not disjoint or disjoint.value is not True:
            good = False
            false = disjoint and disjoint.value is False
            yield Finding(FAIL if false else UNKNOWN, overlap if false else unsaid, evidence(disjoint or named), run.seed)
        for split in ("train", "val") if isinstance(manifest, dict) else ():
            docs = run.get(f"{split}_docs")
            given = lookup(manifest, "splits", split, "docs")
            if docs and given is not None and docs.value != given:
                good = False
                yield Finding(FAIL, f"{docs.text} {split} documents in the log, {given} in the manifest: another data set",
                              evidence(docs, f"data_manifest.json: splits.{split}.docs"), run.seed)
    if good and there:
        yield Finding(PASS, "splits are disjoint, by the logs and by data_manifest.json", evidence(
            key, *(run.get("splits_disjoint") for run in f.runs)))
    elif good:
        yield Finding(UNKNOWN, "the logs say that the splits are disjoint, but data_manifest.json is not here",
                      evidence(*(run.get("splits_disjoint") for run in f.runs)))


def check_same(f: Folder) -> Iterator[Finding]:
    """All seeds ran the same code with the same settings but for the seed."""
    first = next((run for run in f.runs if run.trains), f.runs[0])
    good, code_known = True, bool(f.runs[0].get("code_sha256"))
    for run in f.runs:
        for name, text in (("code_sha256", "the code"), ("code_bytes", "the bytes of code")):
            a, b = first.get(name), run.get(name)
            if a and b and a.value != b.value:
                good = False
                yield Finding(FAIL, f"{text} differ{'s' * (name == 'code_sha256')} between seeds {first.seed} and {run.seed}: "
                              f"{a.text[:16]} and {b.text[:16]}", evidence(a, b), run.seed)
                break
        if run.ours and not is_digest(run.get("code_sha256")):
            code_known = False
        base = first if run.trains or run.seed is None else f.of(run.seed)[0]  # what it is to be equal to
        a, b = base.get("artifact_sha256"), run.get("artifact_sha256")
        if a and b and a.value != b.value and not run.trains and base.seed == run.seed:
            good = False
            yield Finding(FAIL, "the repeated evaluation scored another artifact", evidence(a, b), run.seed)
        own = OWN_TO_A_RUN if run.trains else OWN_TO_AN_EVALUATION
        # A log of ours lists the settings that are changed, a record all of them.
        one, two = (base.settings, run.settings) if not run.ours or base.record and run.record else (base.changed, run.changed)
        tags = [str(x.settings["run_id"].value) for x in (base, run) if "run_id" in x.settings]
        changed = {}
        for name in sorted((one.keys() | two.keys()) - own):
            a, b = one.get(name), two.get(name)
            if (a is None or b is None or a.value != b.value) and not all(
                    x and any(tag and tag in x.text for tag in tags) for x in (a, b)):
                changed[name] = a, b
        if changed:
            good = False
            shown = [f"{name} {' and '.join(x.text if x else 'not stated' for x in pair)}" for name, pair in changed.items()]
            more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
            yield Finding(FAIL, f"settings of {base.name} and {run.name} differ: {', '.join(shown[:5])}{more}",
                          evidence(*[x for pair in list(changed.values())[:5] for x in pair]), run.seed)
    bare = [run for run in f.runs if not run.settings]
    if bare:
        yield Finding(UNKNOWN, "no settings in the log", evidence(*(run.name for run in bare)))
    elif good and not f.ours:
        yield Finding(PASS, "the settings in the heads of the logs differ in the seed only; the code is not identified",
                      evidence(*(run.settings.get("seed") or run.name for run in f.runs)))
    elif good and code_known and script_named(f):
        yield Finding(PASS, "one script, which train_gpt.py is, one set of settings", evidence(
            "train_gpt.py", *(run.get("code_sha256") for run in f.runs)))
    elif good and not code_known:
        yield Finding(UNKNOWN, "a log does not name its code", evidence(
            *(run.get("code_sha256") or run.name for run in f.runs if not is_digest(run.get("code_sha256")))))
    if code_known and f.ours and not script_named(f):
        here = (f.path / "train_gpt.py").is_file()
        yield Finding(UNKNOWN, "the script that ran is not here, train_gpt.py has another SHA-256" if here else
                      "the script that ran is not here: no train_gpt.py", evidence(
                          "train_gpt.py" if here else None, *(run.get("code_sha256") for run in f.runs)))


def is_digest(fact: Fact | None) -> bool:
    """Whether a log states a SHA-256; of a script that was not packed it does not."""
    return bool(fact and re.fullmatch(r"[0-9a-f]{64}", fact.text))


def check_settings(f: Folder) -> Iterator[Finding]:
    """Settings that are stated are settings that act."""
    for run in f.runs:
        if not run.ours:
            s, failed = run.settings, False
            cap, reserve, budget = s.get("max_wallclock_seconds"), s.get("gptq_reserve_seconds"), run.get("budget_seconds")
            if all(x and is_number(x.value) for x in (cap, reserve, budget)) and abs(
                    cap.value - reserve.value - budget.value) > 0.0011:
                failed = True
                yield Finding(FAIL, f"the head says {cap.text} s less {reserve.text} s, the run had {budget.text} s", evidence(
                    reserve, budget), run.seed)
            docs, used = s.get("phased_ttt_prefix_docs"), run.get("prefix_docs")
            if docs and used and docs.value != used.value:
                failed = True
                yield Finding(FAIL, f"the head says {docs.text} prefix documents, the run took {used.text}",
                              evidence(docs, used), run.seed)
            if not failed:
                yield Finding(UNKNOWN, "a published log does not show which of its settings the code reads", run.name, run.seed)
            continue
        if not run.record:
            yield Finding(UNKNOWN, "no run record to compare the settings with", run.name, run.seed)
            continue
        shown = [(index, e) for index, e in enumerate(run.record["events"]) if e["event"] == "settings"]
        wrong = [(index, name) for index, event in shown for name, value in event.items()
                 if name != "event" and run.record["settings"].get(name.lower()) != value]
        line = next((f"{run.name}:{n}" for n, text in enumerate(run.lines, 1) if re.match(r"settings( |$)", text)), run.name)
        for index, name in wrong:
            value = run.record["settings"].get(name.lower(), "no such setting")
            yield Finding(FAIL, f"{name} was set to {run.record['events'][index][name]}, the run's settings say {value}",
                          evidence(line, f"{run.record_name}: settings.{name.lower()}"), run.seed)
        if not shown:
            yield Finding(UNKNOWN, "the record has no event of its settings", run.record_name, run.seed)
        elif not wrong:
            yield Finding(PASS, f"{len(run.record['settings'])} settings, those of the log among them", line, run.seed)


def check_order(f: Folder) -> Iterator[Finding]:
    """Scores and hints follow one order in which a decoder could read the text."""
    for seed, run in scored_runs(f):
        fact, off = run.get("decodable"), run.settings.get("ttt_enabled")
        if fact and fact.value is True:
            yield Finding(PASS, "decodable", evidence(fact), seed)
        elif fact and fact.value is False:
            yield Finding(FAIL, "documents are scored in the order of their lengths, hints follow that of the text: a decoder "
                          "knows neither", evidence(fact), seed)
        elif run.ours and off and off.value is False:
            yield Finding(PASS, "plain evaluation, left to right", evidence(off), seed)
        else:
            yield Finding(UNKNOWN, "the log does not say in which order documents are scored and hints counted", run.name, seed)


def check_finite(f: Folder) -> Iterator[Finding]:
    """No figure is infinite or not a number, and training did not diverge."""
    for run in f.runs:
        facts = [(name, fact) for name, found in run.facts.items() for fact in found
                 if isinstance(fact.value, float) and not math.isfinite(fact.value)]
        for name, fact in facts[:3]:
            yield Finding(FAIL, f"{name} is {fact.text}{f', one of {len(facts)} such figures' * (len(facts) > 3)}",
                          evidence(fact), run.seed)
        losses = run.facts.get("train_loss", [])
        risen = len(losses) > 1 and is_number(losses[-1].value) and losses[-1].value >= losses[0].value
        if not facts and risen and run.get("step").value > 20:
            yield Finding(FAIL, f"training diverged: its loss went from {losses[0].text} to {losses[-1].text}",
                          evidence(losses[0], losses[-1]), run.seed)
        elif not facts and losses:
            yield Finding(PASS, f"training loss {losses[0].text} to {losses[-1].text}", evidence(losses[0], losses[-1]),
                          run.seed)
        elif not facts and run.trains:
            yield Finding(UNKNOWN, "the log shows no training loss", run.name, run.seed)
    for path, value in leaves(f.submission) if f.submission else ():
        if isinstance(value, float) and not math.isfinite(value):
            yield Finding(FAIL, f"{'.'.join(map(str, path))} is {value}", f"submission.json: {'.'.join(map(str, path))}")


def other_scores(f: Folder, comparison: dict) -> tuple[dict | None, str, str]:
    """The other side of a comparison by seed (or by place in a list), its unit val_loss or val_bpb, and where it stands."""
    against, place = comparison.get("against"), "submission.json: comparison"
    if isinstance(against, str):
        path = f.path / against
        path = path / "submission.json" if path.is_dir() else path
        against = read_json(path)[0] if path.suffix == ".json" and path.is_file() else None
        other_place = f"{path}: seed_results"
    else:
        other_place = f"{place}.against"
    for holder, where in ((comparison, place), (against, other_place)):
        for key in ("val_loss", "baseline", "val_bpb", *SEED_TABLES) if isinstance(holder, dict) else ():
            values, unit = holder.get(key), "val_loss" if key == "val_loss" else "val_bpb"
            if key in SEED_TABLES:
                rows = seed_entries(values)
                unit = "val_loss" if rows and all("val_loss" in row for _, row in rows) else "val_bpb"
                values = {seed: row.get(unit) for seed, row in rows}
            elif isinstance(values, list):
                values = dict(enumerate(values))
            elif isinstance(values, dict):
                values = {int(seed) if str(seed).isdigit() else seed: value for seed, value in values.items()}
            if isinstance(values, dict) and len(values) > 1 and all(map(is_figure, values.values())):
                return values, unit, where if key in SEED_TABLES else f"{where}.{key}"
    return None, "", place


def check_comparison(f: Folder) -> Iterator[Finding]:
    """The score rule: better by the threshold, in nats, and significantly; recomputed from the scores per seed."""
    comparison, key = (f.submission or {}).get("comparison"), "submission.json: comparison"
    if not isinstance(comparison, dict):
        yield Finding(UNKNOWN, "submission.json compares with nothing" if f.submission else "no submission.json", key)
        return
    theirs, unit, place = other_scores(f, comparison)
    losses, bpbs = ({seed: fact.value for seed in f.claimed_seeds or f.seeds if figures_of(f, seed, figure)
                     and (fact := max(scores_apart(f, seed, figure), key=lambda fact: fact.value, default=None)
                          or named_fact(f, seed, figure)).value > 0} for figure in ("val_loss", "val_bpb"))
    if theirs is None or min(len(losses), len(bpbs)) < 2 or losses.keys() != bpbs.keys():
        yield Finding(UNKNOWN, "the scores per seed of both sides are not there, so nothing can be recomputed", place)
        return
    nats = statistics.fmean(losses[seed] / bpbs[seed] for seed in losses)  # per token and bpb: a property of the text
    ours = {seed: value * nats for seed, value in bpbs.items()} if unit == "val_bpb" else losses
    theirs = {seed: value * (nats if unit == "val_bpb" else 1) for seed, value in theirs.items()}
    paired = "pair" in str(comparison.get("test", "")).lower()
    order = list(ours) if ours.keys() == theirs.keys() else list(theirs)
    high, low = [theirs[seed] for seed in order], list(ours.values())
    if paired and len(high) != len(low):
        yield Finding(FAIL, f"{len(high)} scores and {len(low)} cannot be paired", f"{key}.test")
        return
    gain, faults = statistics.fmean(high) - statistics.fmean(low), []
    shifts = [THRESHOLD_NATS, 0.0]
    for name, rule, stricter in (("threshold_nats", THRESHOLD_NATS, 1), ("required_p", LARGEST_P, -1)):
        value = comparison.get(name)
        said = as_claim(value, ("comparison", name), 0)
        value = said.value if said else value
        if is_number(value) and not stricter * value >= stricter * rule:
            faults.append(Finding(FAIL, f"{name} {value}, the rule has {rule:g}", f"{key}.{name}"))
        elif name == "threshold_nats" and is_figure(value):
            shifts.insert(1, float(value))
    stated, p = (as_claim(comparison.get(name), ("comparison", name), 0) for name in ("difference_nats", "p"))
    if stated and abs(stated.value - gain) > half_unit(stated.text) * (1 + 1e-6) + 1e-7:
        faults.append(Finding(FAIL, f"difference_nats {stated.text}, the scores give {gain:.8f}", evidence(stated, place)))
    found = {}  # p of every test that the text may mean
    for shift in shifts:
        t, freedom = t_test(high, low, paired, shift)
        found[f"one-sided, above {shift:g}"] = student_t_sf(t, freedom)
        found[f"two-sided, other than {shift:g}"] = 2 * student_t_sf(abs(t), freedom)
    sides = re.search(r"(one|two|1|2)[- ]?(?:sided|tailed)", str(comparison.get("test", "")).lower())
    found = {name: value for name, value in found.items() if not sides or (sides[1] in "one1") == name.startswith("one")}
    test, shown = "paired t-test" if paired else "Welch's t-test", "; ".join(f"{v:.4g} ({n})" for n, v in found.items())
    meant = [name for name, value in found.items()
             if p and abs(value - p.value) <= max(half_unit(p.text), 2e-3 * value) + 1e-12]
    if p and not meant:
        faults.append(Finding(FAIL, f"p {p.text}, the {test} gives {shown}", evidence(p, place)))
    t, freedom = t_test(high, low, paired, THRESHOLD_NATS)
    rule, rule_p = f"one-sided, above {THRESHOLD_NATS:g}", student_t_sf(t, freedom)
    reached, claimed = gain > THRESHOLD_NATS and rule_p < LARGEST_P, comparison.get("new_record", True)
    text = f"{gain:.6f} nats better, {test}, p {rule_p:.4g} {rule}"
    if meant and rule not in meant:
        text += f"; the p that is stated, {p.text}, fits only the test that is {meant[0]}, which is not the rule's"
    if not stated or not p:
        faults.append(Finding(UNKNOWN, f"{'p' if stated else 'difference_nats'} is not stated; the difference is {gain:.8f} "
                              f"nats, {test}: {shown}", key))
    if not reached and (claimed if meant else comparison.get("new_record")):
        faults.append(Finding(FAIL, f"{text}: a record needs more than {THRESHOLD_NATS:g} and p below {LARGEST_P:g}", evidence(
            (stated if gain <= THRESHOLD_NATS else p) or key, place)))
    elif not faults:
        yield Finding(PASS, f"{text}{': no new record' * (not reached)}{', and it claims none' * (not claimed)}", evidence(
            stated, p, place))
    yield from faults


def check_records(f: Folder) -> Iterator[Finding]:
    """Every event of a run record is a line of its log, every event line of the log one of the record."""
    for name, wrong in f.broken:
        yield Finding(FAIL, f"{name}: {wrong}", name)
    for run in f.runs:
        if run.record is None or not run.lines:
            if run.ours and not any(name.removesuffix(".json") == run.name.rpartition(".")[0] for name, _ in f.broken):
                yield Finding(UNKNOWN, "no log beside the record" if run.record else "no run record beside the log", run.name,
                              run.seed)
            elif not run.ours:
                yield Finding(UNKNOWN, "a published log has no run record", run.name, run.seed)
            continue
        fault = record_fault(run)
        yield Finding(FAIL, *fault, run.seed) if fault else Finding(
            PASS, f"{len(run.record['events'])} events", evidence(f"{run.name}:1-{len(run.lines)}", run.record_name), run.seed)


def record_fault(run: Run) -> tuple[str, str] | None:
    """The first difference between log and record, and where it stands."""
    events, record = run.record["events"], run.record_name
    kinds = OUR_KINDS | {str(event["event"]) for event in events}
    found = [number for number, line in enumerate(run.lines, 1)
             if (match := re.match(r"(\w+)(?: \w+:|$)", line)) and match[1] in kinds]
    for index, event in enumerate(events):
        text = event_text(event)
        if index >= len(found):
            return (f"the log ends before the record's event {index}, {text.split(' ')[0]}",
                    evidence(run.last_line, f"{record}: events[{index}]"))
        number = found[index]
        line = "\n".join(run.lines[number - 1:number + text.count("\n")])
        if line != text:
            words = [(a, b) for a, b in zip(line.split(" "), text.split(" ")) if a != b] or [(line[-40:], text[-40:])]
            return (f"the log says {words[0][0][:60]}, the record {words[0][1][:60]}",
                    evidence(f"{run.name}:{number}", f"{record}: events[{index}]"))
    if len(found) > len(events):
        number = found[len(events)]
        return f"a line that is no event of the record: {run.lines[number - 1][:60]}", evidence(f"{run.name}:{number}", record)
    last = {str(event["event"]): (i, {k: v for k, v in event.items() if k != "event"}) for i, event in enumerate(events)}
    for kind, fields in run.record["results"].items():
        index, stated = last.get(kind, (None, {}))
        if stated != fields:
            names = [n for n in {**stated, **(fields if isinstance(fields, dict) else {})}
                     if not isinstance(fields, dict) or stated.get(n) != fields.get(n)] or [""]
            line = f"{run.name}:{found[index]}" if index is not None else run.name
            return f"results.{kind}.{names[0]} is not what was logged", evidence(f"{record}: results.{kind}.{names[0]}", line)
    ended = next((kind for kind in ("finished", "failed") if kind in last), "running")
    if run.record.get("status") != ended:
        return f"status {run.record.get('status')}, the log says {ended}", evidence(
            f"{record}: status", f"{run.name}:{found[-1] if found else 1}")
    return None


CHECKS = {
    "submission.json": check_figures, "record and log agree": check_records, "bytes": check_bytes, "code": check_code,
    "training seconds": check_train_seconds, "evaluation seconds": check_eval_seconds, "hints inside timer": check_hints,
    "token hints only": check_experts, "all targets scored": check_targets, "seeds": check_seeds, "data": check_data,
    "same code, settings": check_same, "settings act": check_settings, "decodable order": check_order,
    "finite figures": check_finite, "score rule": check_comparison,
}


def audit(path: str | Path) -> list[dict]:
    """The findings of every check on a record folder: {check, verdict, seed, detail, evidence}. Raises VerifyError."""
    folder, found = Folder(Path(path)), []
    for name, check in CHECKS.items():
        findings = list(check(folder)) or [Finding(UNKNOWN, "the folder says nothing of it")]
        found += [dict(check=name, verdict=x.verdict, seed=x.seed, detail=x.detail, evidence=x.evidence) for x in findings]
    return found


def report(found: list[dict]) -> str:
    """A line for each check, or for each of its findings that is no PASS."""
    lines = []
    for name in CHECKS:
        merged: dict[tuple, list[dict]] = {}  # what is found of several seeds in the same words
        for finding in found:
            if finding["check"] == name:
                merged.setdefault((finding["verdict"], finding["detail"]), []).append(finding)
        texts: dict[str, list[str]] = {FAIL: [], UNKNOWN: [], PASS: []}
        for (verdict, detail), findings in merged.items():
            seeds = list(dict.fromkeys(str(x["seed"]) for x in findings if x["seed"] is not None))
            head = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: " if seeds else ""
            where = evidence(*(x["evidence"] for x in findings))
            texts[verdict].append(f"{head}{detail}" + (f" ({where})" if where else ""))
        for verdict, items in texts.items():
            lines += [f"{verdict:8}{name:22}{item}" for item in (["; ".join(items)] if items and verdict == PASS else items)]
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufffd]", "?", line) for line in lines)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if arguments in (["-h"], ["--help"]):
        checks = [f"  {name:22}{check.__doc__}" for name, check in CHECKS.items()]
        print("\n".join([__doc__.strip(), "", "Checks:", *checks]))
        return 0
    names = [argument for argument in arguments if argument != "--json"]
    try:
        if len(names) != 1 or names[0].startswith("-"):
            raise VerifyError("one folder, and --json if wanted: python verify_submission.py DIR [--json]")
        found = audit(names[0])
    except (VerifyError, OSError) as error:
        print(f"verify_submission.py: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(found, indent=1) if "--json" in arguments else report(found), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(finding["verdict"] == FAIL for finding in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
