"""Audit a Parameter Golf record folder: logs, run records, submission.json, code, data manifest.

    python verify_submission.py DIR [--json]        what the folder proves, check by check
    python verify_submission.py --compare DIR DIR   two folders, setting by setting and figure by figure
    python verify_submission.py --table DIR...      a leaderboard of many folders, from what their logs prove

One line per check: PASS, FAIL or UNKNOWN, the check, what was found, where it stands. UNKNOWN says what would
decide it; nothing passes because nothing was found. --json prints a list of {check, verdict, seed, detail,
evidence}. Exit code 0, 1 if a check fails, 2 with one line on stderr for bad input.

Every file becomes facts first: train_gpt.py's own logs, where every line is the text of an event in the run
record beside it, or the free-form logs of the challenge. The checks see facts only. Runs are grouped by equal
settings; submission.json's figures must belong to one group. Nothing in the folder is run, no text is taken
for a path. submission.json may compare its score with another's: `comparison` = {difference_nats, p, test,
new_record} with the other val_bpb by seed, or as a list, in `baseline`.
"""
from __future__ import annotations

import ast
import base64
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import statistics
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from scipy import stats

try:
    import brotli  # packs our scripts; without it they stay closed
except ImportError:
    brotli = None

PASS = "PASS"
FAIL = "FAIL"
UNKNOWN = "UNKNOWN"
SOUND = "SOUND"  # PASS if the check found nothing else
BYTES_CAP, SECONDS_CAP = 16_000_000, 600.0
LEAST_SEEDS = 3
THRESHOLD_NATS, LARGEST_P = 0.005, 0.01
PUBLISHED_TARGETS, PUBLISHED_DOCS = 47_853_343, 50_000  # of the published validation text, its tail included
LONGEST_TAIL = 4096  # tokens that cutting the text to whole windows can drop
SCORES_DIFFER = 1e-4  # bpb by which a repeated evaluation may differ from the first
UNPACKED_CAP = 1 << 22  # bytes of an unpacked text at most
ENCODED_CAP, ENCODED_PIECE = 4000, 64  # characters of encoded text that need no look; of its shortest piece
FOREIGN = "no log of the challenge says it; a run record and data_manifest.json would decide"

# The names of figures in log lines, with the fact where it has another name: in lines of any author
# (*), and in our own events, by how their lines begin.
LINES = """
*                 val_bpb val_loss train_loss step_avg train_time=train_seconds eval_time=eval_seconds
*                 total_eval_time=all_eval_seconds val_tokens=val_targets total_docs=documents prefix_docs
*                 train_shards world_size effective=budget_seconds within_gate word_gate agree2plus=agree_gate
machine device:   device devices=world_size
data folder:      folder train_tokens val_targets manifest splits_disjoint train_docs val_docs
track name:       name=track
code sha256:      sha256=code_sha256 packed_bytes
step step:        step=steps
training steps:   steps seconds=step_seconds calibration_seconds=calibration_inside cap_seconds
training steps:   clock_seconds=train_seconds
quantized val_    targets seconds=eval_seconds bytes=val_bytes
size artifact_    artifact_sha256 artifact_bytes code_bytes total_bytes
ttt val_          targets documents seconds=eval_seconds whole_text hints_inside_timer decodable
finished seconds: seconds=finished
failed error:     error=failed
"""
# Facts that are no numbers.
WORDS = set("device code_sha256 artifact_sha256 manifest splits_disjoint whole_text hints_inside_timer "
            "decodable folder failed track".split())
# The names of figures in submission.json; mean_, _std, max_, _ms, _by_seed and such come on top.
ALIASES = """
val_bpb         bpb ttt_bpb ttt_val_bpb val_bpb_ttt post_ttt_bpb post_ttt_val_bpb quantized_ttt_bpb final_bpb
val_loss        loss ttt_loss ttt_val_loss post_ttt_loss post_ttt_val_loss quantized_ttt_loss final_val_loss
pre_quant_bpb   pre_quant_val_bpb prequant_bpb prequant_val_bpb pre_quantization_bpb
quantized_bpb   quantized_val_bpb quant_bpb quant_val_bpb post_quant_bpb
steps           step step_stop train_steps training_steps
step_avg        step_time ms_per_step
train_seconds   train_time training_time training_seconds train_wallclock wallclock
eval_seconds    eval_time evaluation_time ttt_eval_time ttt_eval_seconds ttt_seconds ttt_time
artifact_bytes  bytes_artifact bytes_model model_bytes compressed_model_bytes artifact_size
code_bytes      bytes_code code_size code_size_bytes
total_bytes     bytes_total submission_bytes total_submission_bytes total_size_bytes
"""
STATISTICS = {"mean": "mean", "avg": "mean", "average": "mean", "std": "std", "stdev": "std", "stddev": "std",
              "max": "max", "largest": "max", "min": "min"}
WAYS = {"mean": ("mean", statistics.fmean), "std": ("sample standard deviation", statistics.stdev),
        "max": ("largest", max), "min": ("smallest", min)}
# What else a figure may mean.
ALSO = dict(artifact_bytes=["total_bytes"], train_seconds=["step_seconds"], eval_seconds=["all_eval_seconds"],
            total_bytes=["shipped_bytes"], code_bytes=["shipped_code_bytes", "raw_code_bytes"])
SEED_TABLES = {"seed_results", "seeds", "per_seed", "per_seed_results", "results", "runs"}
TABLES = SEED_TABLES | set("metrics result final summary settings hyperparameters config".split())
NO_FIGURES = {"seed", "github_id", "date", "num_seeds", "n_seeds"}
OWN_TO_A_RUN = set("seed run_id artifact_dir logfile model_path quantized_model_path rank local_rank "
                   "world_size data_path data_dir datasets_dir tokenizer_path train_log_every "
                   "ttt_eval_only".split())
GATES, PEEKING = ("within_gate", "word_gate", "agree_gate"), ("within_boost", "word_boost", "agree_add_boost")


FACTS_OF: dict[str, dict[str, str]] = {}
for line in LINES.strip().split("\n"):
    facts = {word.split("=")[0]: word.split("=")[-1] for word in line[18:].split()}
    FACTS_OF.setdefault(line[:18].strip(), {}).update(facts)
FIGURES = {name: row.split()[0] for row in ALIASES.strip().split("\n") for name in row.split()}

# A name begins only where a word does, so that a line of any length is read in linear time.
PAIR = re.compile(r"(?<![\w.+'\"-])([a-z_][\w.+-]*)\s?[:=]\s{0,9}(?!\w+[:=]\d)([^\s;|)\]]+)")
NUMBER = re.compile(r"([-+]?\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d{1,3})?|nan|inf)(ms|s)?(?!\w|\.\d)", re.I)
JSON_NUMBER = re.compile(rf"\s*~?{NUMBER.pattern}\s*(?:sec|seconds|bytes|nats|bpb)?\s*(?:[±(+].*)?", re.I)
LITERALS = {"True": True, "False": False, "None": None}
COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
BAR = re.compile(r"={50,}\s*")
SOURCE, IMPORT = re.compile(r"#|\"{3}|'{3}|(?:import|from) \w"), re.compile(r"(?:import|from) \w")
# What loggers and launchers put before a line: a time, a level, a rank.
PREFIX = re.compile(r"^(?:\[?\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}Z?\]? ?|\[?(?:INFO|DEBUG)\]?:? ?|[|-] ?"
                    r"|\[?(?:default|rank)?\d{1,3}\]: ?)+")
HEAD = re.compile(r"\s*(?:hyperparameters:\s*$|seed:\s?\d+\b|((?:train_batch_tokens|tie_embeddings|"
                  r"attention_mode|mtp_num_heads):))", re.I)
SETTING = re.compile(r"\s+([A-Za-z_]\w*):(.*)")
OUR_SETTINGS = re.compile(r"settings [A-Z_\d]+:")
EVENT_LINE = re.compile(r"(\w+)(?: \w+:|$)")
INTERIM = re.compile(r"\d/\d|\b(?:chunk|batch|epoch|phase|iter|running)\b")
SIZES = {"total submission size": "total_bytes", "serialized model": "artifact_bytes",
         "code size": "code_bytes"}
SIZE = re.compile(rf"({'|'.join(SIZES)})\s{{0,9}}\(?([\w+./-]*)[^:\d]{{0,20}}:\s{{0,9}}(\d[\d_,]*)\s?bytes")
PHRASES = dict(
    steps=re.compile(r"(?:\bstep:\s?|^\s*)(\d{1,9})/\d+\b"), own_seed=re.compile(r"^\s*seed:\s?(\d+)\b"),
    calibration_after=re.compile(r"\b(?:collected|calibrated)\b[^\n]{0,60}?\bin ([\d.]{1,12})\s?s\b"),
    longest=re.compile(r"\bdl:\d+-(\d+)"))
WORK = {"elapsed", "total", "gated", "total_targets", "seconds"}  # a line with one of these reports work
SEED_IN_KEY = re.compile(r"(?:^|_)seed[_-]?(\d{1,9})(?=_|$)|^(\d{1,9})$")
LIMIT = re.compile(r"(?:^|_)(?:max_wallclock|cap|limit|budget|reserve)(?:_|$)")  # no measurement
OF_SEEDS = re.compile(r"_(?:by|per|\d*)_?seeds?$|(?:^|_)seed[_-]?\d+|(?:^|_)\d+_?seeds?(?=_)")
SEED_IN_NAME = re.compile(r"seed[_-]?(\d{1,9})(?!\d)")


class VerifyError(Exception):
    """There is nothing to audit (exit code 2)."""


class Fact(NamedTuple):
    """Something that a file states: the value, as it is written, and where; of a score the label too."""

    value: object
    text: str
    where: str
    label: str = ""

    @property
    def kind(self) -> str:
        """What a score's label says: interim, before (quantization), quantized, or final."""
        if re.match("interim|progress|val ", self.label):
            return "interim"
        if re.search(r"pre.?quant|post.?ema|^raw|averaged|\b(?:ema|swa)\b", self.label):
            return "before"
        after = re.search(r"ttt|slid|window|stride|mix|gram", self.label)
        return "quantized" if re.search(r"quant|int\d|roundtrip", self.label) and not after else "final"


NOT_STATED = Fact(None, "not stated", "")


def is_figure(value) -> bool:
    """Whether the value is a number to reckon with."""
    return type(value) in (int, float) and abs(value) < 1e18


def typed(text: str):
    """The value that a text stands for."""
    if text in LITERALS:
        return LITERALS[text]
    try:
        return int(text) if re.fullmatch(r"[-+]?\d{1,18}", text) else float(text)
    except ValueError:
        return text


def plain(match: re.Match, milli: bool = False) -> str:
    """The digits of a NUMBER; a time becomes seconds."""
    digits = re.sub("[_,]", "", match[1])
    milli = milli or (match[2] or "").lower() == "ms"
    return str(Decimal(digits).scaleb(-3)) if milli and is_figure(typed(digits)) else digits


def decode(data: bytes) -> str:
    """The text of a file in UTF-8 or UTF-16, with or without a byte order mark."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    for wide, start in (("utf-16-be", 0), ("utf-16-le", 1)):
        if data[start:400:2].count(0) > len(data[:400]) // 4:
            encoding = wide
    return data.decode(encoding, "replace").removeprefix("\ufeff")


# --- Facts: logs


@dataclass
class Run:
    """What one run's log says, with the run record beside it if there is one."""

    name: str
    facts: dict[str, list[Fact]] = field(default_factory=dict)
    settings: dict[str, Fact] = field(default_factory=dict)
    stated: dict[str, Fact] = field(default_factory=dict)  # the settings that the log lists, without defaults
    event_lines: list[tuple[int, str]] = field(default_factory=list)  # lines that may be events of ours
    last_line: str = ""
    ours: bool = False
    record: dict | None = None
    record_name: str = ""

    def add(self, name: str, value, where: str, text: str = "") -> None:
        self.facts.setdefault(name, []).append(Fact(value, text or str(value), where))

    def all(self, name: str) -> list[Fact]:
        """The facts of this name, or the setting."""
        setting = self.settings.get(name)
        return self.facts.get(name) or ([setting] if setting else [])

    def get(self, name: str) -> Fact | None:
        return (self.all(name) or [None])[-1]

    def last(self, name: str) -> list[Fact]:
        return self.facts.get(name, [])[-1:]

    def having(self, name: str, value) -> list[Fact]:
        """The last fact of this name, or the setting, if it has this value."""
        return [fact for fact in self.all(name)[-1:] if fact.value == value]

    @property
    def trains(self) -> bool:
        """Whether this run trained, and did not only evaluate."""
        return not {"steps", "train_seconds", "train_loss"}.isdisjoint(self.facts)

    def finals(self, name: str = "val_bpb") -> list[Fact]:
        """The scores of what is submitted; of the unquantized weights only if there is nothing else."""
        scores = self.facts.get(name, [])
        kinds = {score.kind for score in scores}
        wanted = kinds & {"final", "quantized"} or kinds & {"before"}
        return [score for score in scores if score.kind in wanted]

    def figures(self, name: str) -> list[Fact]:
        """What the log states last of a figure or setting; of scores one of each label, latest first."""
        found = self.all(name)[::-1] if name.endswith("_bytes") else self.all(name)[-1:]
        kind = {"pre_quant_bpb": "before", "quantized_bpb": "quantized"}.get(name)
        if kind:
            found = [score for score in self.all("val_bpb") if score.kind == kind][-1:]
        elif name in ("val_bpb", "val_loss", "eval_seconds"):
            found = list({score.label: score for score in self.finals(name)}.values())[::-1]
        for other in ALSO.get(name, ()):
            found = found + self.last(other)
        return found

    @property
    def named_seed(self) -> int | None:
        match = SEED_IN_NAME.search(self.name)
        return int(match[1]) if match else None

    @property
    def seed(self) -> int | None:
        """The seed by the settings, by a line of its own, or by the file's name."""
        stated = self.settings.get("seed") or self.get("own_seed")
        return stated.value if stated and type(stated.value) is int else self.named_seed

    def repeats(self, other: Run) -> bool:
        """Whether both are logs of one and the same run: of what both say the last is equal."""
        shared = self.facts.keys() & other.facts.keys()
        told = self.seed == other.seed and {"val_bpb", "train_seconds"} <= shared
        same_figures = all(self.facts[name][-1].text == other.facts[name][-1].text for name in shared)
        return told and same_figures and not any(
            NOT_STATED not in (one, two) for _, one, two in settings_apart(self.settings, other.settings))

    def take(self, line: str, where: str, number: int) -> None:
        """Enter a line of a log, or ignore it. Times become seconds."""
        lower = line.lower()
        event = next((start for start in FACTS_OF if line.startswith(start)), "")
        pairs = read_pairs(line if event else lower, where)
        names = FACTS_OF["*"] | FACTS_OF.get(event, {})
        if "val_bpb" in pairs and pairs["val_bpb"].kind != "interim" and "eval_time" not in pairs:
            names["elapsed"] = "eval_seconds"
        for name in names.keys() & pairs.keys():
            stated = pairs[name]
            if names[name] in WORDS:
                self.add(names[name], LITERALS.get(stated.text, stated.text), where, stated.text)
            elif type(stated.value) in (int, float):
                self.facts.setdefault(names[name], []).append(stated)
        if "train_time" in lower and "calibration_after" in self.facts:  # it lies inside this time
            self.facts["calibration_inside"] = self.facts.pop("calibration_after")
        for name, pattern in PHRASES.items():
            phrase = pattern.search(lower)
            if phrase:
                self.add(name, typed(phrase[1]), where, phrase[1])
        size = SIZE.search(lower)
        if size:
            raw = "raw_" if size[2] in ("", "raw", "uncompressed") else ""
            self.add(raw + SIZES[size[1]], int(re.sub("[_,]", "", size[3])), where)
        head = HEAD.match(line)
        if head and head[1]:
            self.settings.update(pairs)
        if "timer" in lower and ("begin" in lower or "start" in lower):
            self.add("timer_begins", number, where, lower)
        about_hints = "hints" in lower or "precompute" in lower and "ngram" in lower
        if about_hints and pairs.keys() & WORK and not event:
            done = "elapsed" in pairs or "done" in lower
            self.add("hints_done" if done else "hints_shown", number, where, lower)

    def complete(self, record: dict | None = None, record_name: str = "") -> None:
        """Name what follows: a record's settings, the end of a run by its steps, sizes without a codec."""
        self.record, self.record_name = record, record_name
        self.ours = self.ours or record is not None
        for name, value in record["settings"].items() if record else ():
            text = str(value)
            self.settings[name] = Fact(typed(text), text, f"{record_name}: settings.{name}")
        self.stated = self.stated or self.settings
        for name in SIZES.values():
            if f"raw_{name}" in self.facts:
                self.facts.setdefault(name, self.facts[f"raw_{name}"])
        steps, seconds = self.get("steps"), self.get("train_seconds")
        if steps and seconds and "step_avg" not in self.facts:
            average = seconds.value / max(1, steps.value)
            self.add("step_avg", average, seconds.where, f"{average:.5f}")


def read_pairs(line: str, where: str) -> dict[str, Fact]:
    """Name and value of everything that a line states; the words before a score are its label."""
    label = ""
    if "val_bpb" in line:
        before = re.split(r"\bval_(?:loss|bpb)\b", line, maxsplit=1)[0][-80:]
        words = re.findall(r"[a-z][\w+.-]*", before)
        interim = PHRASES["steps"].search(before) or INTERIM.search(before)
        label = " ".join(["interim", *words] if interim else words)
    found = {}
    for name, text in PAIR.findall(line):
        number = NUMBER.match(text)
        text = plain(number) if number else text
        found.setdefault(name, Fact(typed(text), text, where, label))
    if line.startswith("machine device:"):
        found["device"] = Fact(line, line[:80], where)
    return found


def log_lines(text: str, first: int) -> list[tuple[int, str]]:
    """The numbered lines of a log, bare of colours and prefixes, without the source that a script prints."""
    lines = []
    for number, whole in enumerate(COLOUR.sub("", text).split("\n"), first):
        parts = whole.rstrip("\r").split("\r")  # a bar draws over its line
        lines += [(number, PREFIX.sub("", part)) for part in parts]
    source = set()
    bars = [place for place, (_, line) in enumerate(lines) if BAR.fullmatch(line)]
    for begin, end in zip([0, *bars], bars):
        starts = [place for place in range(begin, end) if SOURCE.match(lines[place][1])]
        if any(IMPORT.match(lines[place][1]) for place in starts):
            source.update(range(starts[0], end))
    return [entry for place, entry in enumerate(lines) if place not in source]


def read_log(text: str, name: str, place: str = ":{}", first: int = 1) -> list[Run]:
    """The runs in a log; none if no line of it is one of a log's."""
    runs = [Run(name)]
    in_block = False  # the settings stand in the block after their heading, and nowhere else
    for number, line in log_lines(text, first):
        where = name + place.format(number)
        if HEAD.match(line) and ("val_bpb" in runs[-1].facts or runs[-1].trains):
            runs.append(Run(where))
        run = runs[-1]
        setting = SETTING.fullmatch(line) if in_block else None
        in_block = bool(setting) or line.strip().lower() == "hyperparameters:"
        if setting:
            value = setting[2].strip()
            run.settings[setting[1].lower()] = Fact(typed(value), value, where)
            continue
        if OUR_SETTINGS.match(line):
            pairs = re.findall(r" ([A-Z_\d]+):(\S*)", line)
            run.settings = {key.lower(): Fact(typed(value), value, where) for key, value in pairs}
            run.stated = dict(run.settings)
            run.ours = True
        run.take(line, where, number)
        run.last_line = where if line.strip() else run.last_line
        if EVENT_LINE.match(line):
            run.event_lines.append((number, line))
    runs = [run for run in runs if run.facts or run.settings]
    for run in runs:
        run.complete()
    return runs


# --- Facts: submission.json


def read_json(path: Path, fraction: type = float) -> tuple[object, str]:
    """The JSON value in a file, and what is wrong with it. Fractions as text keep their digits."""
    try:
        return json.loads(decode(path.read_bytes()), parse_float=fraction, parse_constant=fraction), ""
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return None, f"{path.name} is no JSON: {error}"


def lookup(value, *keys):
    """value[key][key]..., None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def leaves(value, path: tuple = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(path, value) of every leaf of a JSON value; entries of a list go by the seed that they name."""
    children = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        children = [(lookup(child, "seed") or f"#{index}", child) for index, child in enumerate(value)]
    for key, child in children:
        yield from leaves(child, (*path, str(key) or "#"))
    if not isinstance(value, (dict, list)):
        yield path, value


def seed_of(key: str) -> int | None:
    """The seed that a key names: 42, seed42, seed_42, val_bpb_seed42 or seed_42_val_bpb."""
    match = SEED_IN_KEY.search(key)
    return int(match[1] or match[2]) if match else None


def seed_rows(table) -> list[int]:
    """The seeds of a table by seed, of a list of objects that name theirs, or of a list of seeds."""
    keys = table if isinstance(table, dict) else []
    if isinstance(table, list):
        keys = [str(lookup(row, "seed") if isinstance(row, dict) else row) for row in table]
    elif re.fullmatch(r"\d{1,9}(?:[\s,;]+\d{1,9})+", str(table)):
        keys = re.findall(r"\d+", str(table))
    return [seed_of(key) for key in keys if seed_of(key) is not None]


def half_unit(text: str) -> float:
    """Half a unit of the last digit that is given."""
    exponent = Decimal(text.split(" ")[0]).as_tuple().exponent
    return 0.5 * 10.0 ** exponent if isinstance(exponent, int) else 0.0


def agree(claim: Fact, value, text: str) -> bool:
    """Whether a claim is the value, which is given as text, to the digits of both; whole numbers exactly."""
    if isinstance(claim.value, int) and isinstance(value, int):
        return claim.value == value
    slack = max(half_unit(claim.text), half_unit(text)) * (1 + 1e-6)
    return abs(claim.value - value) <= slack + 1e-12 * abs(value)


def as_number(value, where: str, milli: bool = False) -> Fact | None:
    """A number of a JSON value, also as text like 599.6s or 1.05 ± 0.01, in seconds if it is a time."""
    match = JSON_NUMBER.fullmatch(str(value)) if type(value) in (int, str) else None
    text = plain(match, milli) if match else ""
    return Fact(typed(text), text, where) if is_figure(typed(text)) else None


class Claim(NamedTuple):
    """A number of submission.json: the figure or the setting that it names, over all seeds or of one."""

    path: str
    name: str
    statistic: str
    seed: int | None
    fact: Fact | None

    def judge(self, sources: list[Fact]) -> tuple[bool, str]:
        """Whether one fact for each seed gives what is claimed, and what it gives in words."""
        values = [fact.value for fact in sources]
        digits = max((fact.text for fact in sources), key=half_unit)
        value = values[0]
        said = f"its log says {digits}"
        if self.seed is None:
            word, reckon = WAYS[self.statistic or ("max" if self.name.endswith("_bytes") else "mean")]
            value = reckon(values)
            said = f"the {word} of the logs is {value:.10g}"
            if self.statistic == "std" and agree(self.fact, statistics.pstdev(values), digits):
                said += " (it is the population's, divided by n, not by n - 1)"
            notes = [fact.text for fact in sources if " " in fact.text]
            said = ": ".join([said, *notes])
        # Over which steps a log averages, it does not say.
        average = self.name == "step_avg" and abs(self.fact.value - value) <= 0.01 * value
        return average or agree(self.fact, value, digits), said


def named_figure(key: str) -> tuple[str, str, bool]:
    """What a key names: a figure or the key itself, a statistic or none, whether in milliseconds."""
    short = OF_SEEDS.sub("", key).strip("_")
    words = short.split("_")
    found = [word for word in words if word in STATISTICS and words[0] != "step"]  # step_avg
    short = "_".join(word for word in words if word not in found)
    untimed = re.sub(r"_(?:ms|s|sec|secs|seconds)$", "", short)
    figure = FIGURES.get(short) or FIGURES.get(untimed)
    if not figure or LIMIT.search(key):
        return key, "", False
    return figure, STATISTICS[found[0]] if found else "", short.endswith("_ms") or short.startswith("ms_")


def read_claims(submission: dict) -> Iterator[Claim]:
    """What submission.json says of the runs beside it; in objects of other names it speaks of other runs."""
    order = seed_rows(submission.get("seeds"))
    for path, value in leaves(submission):
        place = ".".join(path)
        entries = [int(key[1:]) for key in path if re.fullmatch(r"#\d{1,3}", key)]  # of lists by seed
        seeds = [seed_of(key) for key in path if seed_of(key) is not None]
        seeds += [order[entry] for entry in entries if entry < len(order)]
        keys = [key.lower() for key in path if SEED_IN_KEY.fullmatch(key) is None and key[0] != "#"]
        names = [key for key in keys if key not in STATISTICS] or ["seed"]
        if names[-1] in SEED_TABLES and isinstance(value, str) and not entries:
            names[-1] = "val_bpb"  # 42: 1.06
        known = TABLES.issuperset(names[:-1]) and names[-1] not in NO_FIGURES | SEED_TABLES
        if not known or value in (None, "") or entries and not seeds:
            continue
        name, statistic, milli = named_figure(names[-1])
        statistic = next((STATISTICS[key] for key in keys if key in STATISTICS), statistic)
        fact = as_number(value, f"submission.json: {place}", milli)
        if fact or name in FIGURES:
            yield Claim(place, name, statistic, seeds[0] if seeds else None, fact)


# --- Facts: the folder


def is_record(value) -> bool:
    """Whether a JSON value has the form of a run record."""
    kinds = [type(lookup(value, key)) for key in ("settings", "results", "events")]
    return kinds == [dict, dict, list] and all(lookup(event, "event") for event in value["events"])


def event_text(event: dict) -> str:
    """The log line of an event of a run record."""
    fields = [f"{key}:{value}" for key, value in event.items() if key != "event"]
    return " ".join([str(event["event"]), *fields])


class Folder:
    """Everything that a record folder states, read as a submission.

    `group` are the runs of equal settings that submission.json describes, `mixed` if there is no such group,
    `chosen` the seeds whose figures it gives.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise VerifyError(f"{path}: no such folder")
        self.path = path
        names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        names = [name for name in names if not re.search(r"(^|/)(\.|__)", name)]
        self.names = sorted(names, key=lambda name: (name.count("/"), name))
        self.broken = []  # JSON files beside a log, and what is wrong with them
        self.every_run = self.read_runs()
        if not self.every_run:
            raise VerifyError(f"{path}: no log (*.log, *.txt) in this folder; name the folder of one record")
        self.recorded = all(run.record for run in self.every_run if run.ours)
        self.manifest, self.manifest_wrong = read_json(path / "data_manifest.json")
        self.submission, self.wrong = read_json(path / "submission.json", str)
        if not isinstance(self.submission, dict):
            self.submission = {}
            self.wrong = self.wrong or "submission.json is no JSON object"
        self.code = read_code(path, set(self.names)) if "train_gpt.py" in self.names else None
        for run in self.every_run if self.code else ():  # what lies here is a fact of every run
            run.add("shipped_code_bytes", self.code.total, "train_gpt.py")
            for artifact in run.all("artifact_bytes")[-1:]:
                run.add("shipped_bytes", artifact.value + self.code.total, f"train_gpt.py, {artifact.where}")
        self.claimed = sorted({seed for key in SEED_TABLES for seed in seed_rows(self.submission.get(key))})
        self.claims = list(read_claims(self.submission))
        totals = [claim.fact for claim in self.claims if claim.name == "total_bytes"]
        self.claimed_totals = [total.value for total in totals if total]
        self.choose_group()

    def read_runs(self) -> list[Run]:
        """The runs of all logs, with their records, by seed; a run that two logs tell of counts once."""
        logs = {}
        for name in self.names:
            if name.lower().endswith((".log", ".txt", ".out")):
                logs[name.rpartition(".")[0]] = read_log(decode((self.path / name).read_bytes()), name)
        logs = {stem: runs for stem, runs in logs.items() if runs}
        for name in [name for name in self.names if name.endswith(".json")]:
            stem = name.removesuffix(".json")
            record, wrong = read_json(self.path / name)
            if is_record(record):
                if stem not in logs:
                    text = "\n".join(map(event_text, record["events"]))
                    logs[stem] = read_log(text, name, ": events[{}]", 0) or [Run(name)]
                    logs[stem][0].event_lines.clear()
                logs[stem][0].complete(record, name)
            elif stem in logs:
                self.broken.append((name, wrong or f"{name} is no run record"))
        every_run = []
        found = itertools.chain(*logs.values())
        for run in sorted(found, key=lambda run: (run.record is None, -len(run.facts))):
            notes = run.seed is None and run.facts.keys() <= {"val_bpb", "val_loss"}
            if not any(run.repeats(other) for other in every_run) and not (notes and every_run):
                every_run.append(run)
        return sorted(every_run, key=lambda run: (run.seed is None, run.seed or 0, run.name))

    def listed(self, run: Run) -> dict[str, Fact]:
        """The settings by which runs compare: all of them where every run of ours has its record."""
        return run.settings if self.recorded else run.stated

    def choose_group(self) -> None:
        """Of the groups with all claimed seeds, or seeds enough, the one that submission.json fits best."""
        groups = {}
        for run in self.every_run:
            run_id = run.settings.get("run_id", NOT_STATED).text  # is part of some paths
            key = {(name, str(fact.value).replace(run_id, "")) for name, fact in self.listed(run).items()
                   if fact.text and name not in OWN_TO_A_RUN}
            groups.setdefault(frozenset(key), []).append(run)
        bare = groups.pop(frozenset(), []) if len(groups) > 1 else []  # may belong to every group
        every_seed = sorted({run.seed for run in self.every_run} - {None})
        whole = []
        for runs in groups.values():
            seeds = sorted({run.seed for run in runs + bare} - {None})
            enough = bool(seeds) if self.claimed else len(seeds) >= min(LEAST_SEEDS, len(every_seed))
            if enough and set(self.claimed) <= set(seeds):
                whole.append((runs + bare, seeds))
        self.mixed = not whole
        choices, faults = [], []
        for runs, seeds in whole or [(self.every_run, every_seed)]:
            wanted = [self.claimed] if self.claimed else [seeds, *([seed] for seed in seeds)]
            choices += [(runs, chosen) for chosen in wanted]
        for self.group, self.chosen in choices:
            verdicts = [self.judge(claim)[0] for claim in self.claims]
            faults.append((verdicts.count(False), verdicts.count(None)))
        self.group, self.chosen = choices[faults.index(min(faults))]

    @property
    def runs(self) -> list[Run]:
        """The runs of the group, and those that trained what it only evaluates."""
        inside = set(map(id, self.group))
        lacking = set(self.chosen) - {run.seed for run in self.group if run.trains}
        others = [run for run in self.every_run if run.trains and id(run) not in inside]
        return self.group + [run for run in others if run.seed in lacking]

    def of(self, seed: int | None) -> list[Run]:
        """The runs of a seed, the one that trained first."""
        return sorted((run for run in self.runs if run.seed == seed), key=lambda run: not run.trains)

    def facts(self, seed: int, name: str) -> list[Fact]:
        """What a seed's logs state of a figure or setting, the latest first, of scores one for each label."""
        found = [fact for run in reversed(self.of(seed)) for fact in run.figures(name)]
        return [fact for fact in found if is_figure(fact.value)]

    def counted(self, seed: int, name: str) -> list[Fact]:
        """The same; of scores of one artifact that disagree only the worse, which then names the better."""
        scored = [run for run in self.of(seed) if run.finals() and run.finals(name)]
        runs = [run for run in scored if "artifact_sha256" in run.facts]
        artifacts = {run.get("artifact_sha256").value for run in runs}
        scores = [run.finals()[-1].value for run in runs]
        one = name in ("val_bpb", "val_loss") and len(artifacts) == 1
        if not one or max(scores) - min(scores) <= SCORES_DIFFER * (1 + 1e-9):
            return self.facts(seed, name)
        ranked = sorted((run.finals(name)[-1] for run in runs), key=lambda fact: fact.value)
        better, worse = ranked[0], ranked[-1]
        text = f"{worse.text} (the better of two that disagree is {better.text})"
        return [Fact(worse.value, text, f"{worse.where}, {better.where}", worse.label)]

    def judge(self, claim: Claim) -> tuple[bool | None, str, list[Fact]]:
        """Whether the runs agree with a claim, None if they do not say; what they say; and the facts."""
        state = self.facts if claim.statistic == "std" else self.counted
        seeds = self.chosen if claim.seed is None else [claim.seed]
        facts = [state(seed, claim.name) for seed in seeds]
        too_few = len(facts) < (2 if claim.statistic == "std" else 1)
        if claim.fact is None or too_few or not all(facts):
            return None, "", []
        every = [fact for found in facts for fact in found]
        answers = []
        for label in dict.fromkeys(fact.label for fact in every):
            labelled = [[fact for fact in found if fact.label == label] or found for found in facts]
            for place in range(max(map(len, labelled))):
                sources = [found[min(place, len(found) - 1)] for found in labelled]
                answers.append((*claim.judge(sources), sources))
        agreeing = [answer for answer in answers if answer[0]]
        return agreeing[0] if agreeing else (False, answers[0][1], every)

    def script_named(self) -> bool:
        """Whether the folder's train_gpt.py is, byte by byte, the code that every run names."""
        named = {run.get("code_sha256").text if "code_sha256" in run.facts else "" for run in self.runs}
        return self.code is not None and named == {self.code.sha256}


# --- Facts: the code

FILE_NAME = re.compile(r"[\w./-]{1,200}\.(?:c|cc|cpp|cu|cuh|h|py|so|npy|npz|bin|json|pt)")
WRITERS = set("save savez savez_compressed write_text write_bytes touch unlink remove to_csv".split())
ENDS = (".py", "/__init__.py", ".so", ".c")  # of the files that a module may be


class Code(NamedTuple):
    """train_gpt.py as it lies in the folder, and what it needs beside it."""

    size: int
    sha256: str
    helpers: dict[str, int]  # bytes by name
    parsed: bool
    closed: int  # characters of encoded text that could not be unpacked
    total: int


def parse_nodes(text: str) -> list[ast.AST]:
    """The nodes of a Python source, none if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def inflate(data: bytes) -> bytes:
    """The data unpacked by the packer that made it; as it is if none did, or if it is too long."""
    raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}])
    for unpacker in (lzma.LZMADecompressor(memlimit=1 << 28), zlib.decompressobj(wbits=47), raw):
        try:
            found = unpacker.decompress(data, UNPACKED_CAP)
        except (lzma.LZMAError, zlib.error):
            continue
        if unpacker.eof and not unpacker.unused_data:
            return found
    try:
        unpacker = brotli.Decompressor()
        found = unpacker.process(data, output_buffer_limit=UNPACKED_CAP)
        return found if unpacker.is_finished() else data
    except (AttributeError, brotli.error if brotli else AttributeError):
        return data


def hidden_files(value: str | bytes, depth: int = 4) -> dict[str, str]:
    """The sources that a constant holds, encoded and compressed in any nesting, by name or one without."""
    for decoder in (base64.b85decode, base64.b64decode, bytes):
        try:
            inner = inflate(decoder(value))
            text = inner.decode("utf-8", "ignore")
            files = {"": text} if len(parse_nodes(text)) > 4 else {}
            files = json.loads(text) if text.startswith("{") else files
        except (ValueError, TypeError, RecursionError):
            continue
        if not files and depth and inner != value:
            files = hidden_files(inner, depth - 1)
        if files and isinstance(files, dict):
            return {name: str(source) for name, source in files.items()}
    return {}


def called(node: ast.AST) -> str:
    """The last name of the function that a node calls, empty for any other node."""
    func = node.func if isinstance(node, ast.Call) else None
    return getattr(func, "attr", getattr(func, "id", ""))


def texts_of(nodes: list[ast.AST]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def is_writing(node: ast.AST) -> bool:
    """Whether a node is a call that writes a file."""
    if called(node) != "open":
        return called(node) in WRITERS
    modes = texts_of([*node.args[:2], *(word.value for word in node.keywords)])
    return any(re.fullmatch("[wax][bt+]{0,2}", mode) for mode in modes)


def needed_names(nodes: list[ast.AST]) -> set[str]:
    """The files that a source imports or names, but for those that it only writes."""
    writing = {id(part) for node in nodes if is_writing(node) for part in ast.walk(node)}
    loads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    read = {node.id for node in loads if id(node) not in writing}
    only_written = {node.id for node in loads} - read
    modules = []
    for node in nodes:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in only_written:
            writing.update(id(part) for part in ast.walk(node))
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            modules += [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
        elif called(node) in ("import_module", "__import__", "run_module"):
            modules += texts_of(node.args)
    texts = texts_of([node for node in nodes if id(node) not in writing])
    named = {os.path.normpath(text.lstrip("./")) for text in texts if FILE_NAME.fullmatch(text)}
    return named | {module.replace(".", "/") + end for module in modules for end in ENDS}


def read_code(folder: Path, names: set[str]) -> Code:
    """The folder's script, the files of `names` that it imports or reads, and those that these do."""
    script = (folder / "train_gpt.py").read_bytes()
    waiting = [("train_gpt.py", decode(script))]
    helpers = {}
    brought = {"train_gpt.py", "submission.json"}  # and the files that the script holds itself
    parsed, closed = True, 0
    while waiting:
        name, text = waiting.pop()
        nodes = parse_nodes(text)
        parsed = parsed and bool(nodes)
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        for value in [value for value in constants if isinstance(value, (str, bytes))]:
            files = hidden_files(value) if len(value) > 1000 else {}
            brought |= files.keys()
            waiting += [(file or name, source) for file, source in files.items() if parse_nodes(source)]
            blanks = value.count(" " if isinstance(value, str) else b" ")  # prose has many, encoded text none
            if not files and len(value) >= ENCODED_PIECE and blanks * 100 < len(value):
                closed += len(value)
        for file in sorted(needed_names(nodes) & names - brought - helpers.keys()):
            data = (folder / file).read_bytes()
            helpers[file] = len(data)
            waiting += [(file, decode(data))] if file.endswith(".py") else []
    total = len(script) + sum(helpers.values())
    return Code(len(script), hashlib.sha256(script).hexdigest(), helpers, parsed, closed, total)


# --- Checks, from facts alone: (verdict, what was found, its sources); of a run the first with sources counts


def check_figures(f: Folder) -> Iterator[tuple]:
    """Every figure of submission.json against the logs of one group of equal settings."""
    if f.wrong:
        verdict = FAIL if "submission.json" in f.names else UNKNOWN
        yield verdict, f"{f.wrong}; it would decide", "submission.json"
        return
    judged = [(claim, *f.judge(claim)) for claim in f.claims]
    for claim, same, said, sources in judged:
        if same is False:
            yield FAIL, f"{claim.path} {claim.fact.text}, {said}", claim.seed, claim.fact, *sources
    unsaid = [claim.path for claim, same, *_ in judged if same is None]
    if unsaid:
        yield UNKNOWN, f"no log states {', '.join(unsaid)}; it would decide", "submission.json"
    hardware = str(f.submission.get("hardware", ""))[:200]
    for count, device in re.findall(r"(\d{1,4})\s?[x×*]\s?(?:NVIDIA\s)?([A-Z]{1,9}\d+)", hardware)[:1]:
        for run in [run for run in f.runs if run.trains]:
            wrong = [fact for fact in run.facts.get("world_size", []) if fact.value != int(count)]
            wrong += [fact for fact in run.facts.get("device", []) if device not in fact.text]
            for fact in wrong[:1]:
                said = f"hardware {hardware}, the log says {fact.text}"
                yield FAIL, said, run, "submission.json: hardware", fact
    agreed = [fact for _, same, _, sources in judged if same for fact in sources]
    if agreed:
        notes = [fact.text for fact in agreed if " " in fact.text]  # scores that other evaluations contradict
        if len(f.chosen) == 1 < len({run.seed for run in f.group}):
            notes.append(f"of seed {f.chosen[0]} alone")
        said = f"{sum(same is True for _, same, *_ in judged)} figures are those of the logs"
        yield PASS, ", ".join([said, *dict.fromkeys(notes)]), "submission.json", *agreed[:9]
    elif not judged:
        yield UNKNOWN, "it states no figure of a run; val_bpb would decide", "submission.json"


def check_records(f: Folder) -> Iterator[tuple]:
    """Every event of a run record is a line of its log, every event line of the log one of the record."""
    for name, wrong in f.broken:
        yield FAIL, wrong, name
    for run in f.every_run:
        if not run.ours:
            yield UNKNOWN, FOREIGN, run
        elif run.record and run.event_lines:
            whole = PASS, f"{len(run.record['events'])} events", run, run.last_line, run.record_name
            yield record_fault(run) or whole
        elif run.name.rpartition(".")[0] + ".json" not in dict(f.broken):
            yield UNKNOWN, f"no {'log' if run.record else 'run record'} beside it; that would decide", run


def record_fault(run: Run) -> tuple | None:
    """The first difference between log and record."""
    events = run.record["events"]
    kinds = {str(event["event"]) for event in events} | {start.split(" ")[0] for start in FACTS_OF}
    lines = [(f"{run.name}:{number}", line) for number, line in run.event_lines
             if EVENT_LINE.match(line)[1] in kinds]
    texts = [event_text(event).split("\n")[0] for event in events]
    for index, (found, text) in enumerate(itertools.zip_longest(lines, texts, fillvalue="nothing")):
        where, line = found if index < len(lines) else (run.last_line, found)
        if line != text:
            pairs = itertools.zip_longest(line.split(" "), text.split(" "), fillvalue="")
            apart = next(pair for pair in pairs if pair[0] != pair[1])
            said = f"the log says {apart[0][-60:]}, the record {apart[1][-60:]}"
            return FAIL, said, run, where, f"{run.record_name}: events[{index}]"
    last = {str(event["event"]): (where, event) for (where, _), event in zip(lines, events)}
    for kind, fields in run.record["results"].items():
        where, event = last.get(kind, (run.name, {}))
        if fields != {name: value for name, value in event.items() if name != "event"}:
            said = f"results.{kind} is not what was logged"
            return FAIL, said, run, f"{run.record_name}: results.{kind}", where
    status = run.record.get("status")
    ended = next((kind for kind in ("finished", "failed") if kind in last), "running")
    said = f"status {status}, the log says {ended}"
    return None if status == ended else (FAIL, said, run, f"{run.record_name}: status", run.last_line)


def check_bytes(f: Folder, run: Run) -> Iterator[tuple]:
    """Artifact and code of every seed below the cap and adding up; the text's own bytes counted."""
    paths = [run.get(name) for name in ("data_path", "datasets_dir", "tokenizer_path", "folder", "manifest")]
    caseops = [fact for fact in paths if fact and re.search("caseops|manifest.json$", fact.text.lower())]
    off = caseops and run.having("caseops_enabled", False)
    said = "CASEOPS_ENABLED=0 over CaseOps shards counts bytes of the transformed text, not of the original"
    yield FAIL, said, off and off + caseops
    total, artifacts = run.get("total_bytes"), run.facts.get("artifact_bytes", [])
    packed, shipped = run.get("packed_bytes"), run.get("shipped_bytes")
    if not total:
        yield UNKNOWN, "no total submission size; it would decide", [run]
        return
    codes = run.last("code_bytes") + run.last("raw_code_bytes")
    # A log may state the sizes of several compressors.
    pairs = [(artifact, code) for artifact in artifacts for code in codes]
    adding = [pair for pair in pairs if pair[0].value + pair[1].value == total.value]
    for artifact, code in pairs[-1:] if not adding else ():
        said = f"artifact and code are {artifact.value + code.value:,} bytes, the log says {total.value:,}"
        yield FAIL, said, [total, artifact, code]
    for code in codes if packed and packed.value not in [code.value for code in codes] else ():
        said = f"{code.value:,} bytes of code counted, the packed script has {packed.value:,}"
        yield FAIL, said, [code, packed]
    if total.value < BYTES_CAP:
        for artifact, code in adding:
            yield PASS, f"{artifact.value:,} + {code.value:,} = {total.value:,} bytes", [total]
        yield UNKNOWN, f"{total.value:,} bytes; a line with those of the code would decide", [total]
    if shipped and shipped.value < BYTES_CAP and shipped.value in f.claimed_totals:
        said = f"{shipped.value:,} bytes with the script shipped here, as submission.json says"
        yield PASS, f"{said}; the log counts {total.value:,}", [shipped, total]
    yield FAIL, f"{total.value:,} bytes, not below {BYTES_CAP:,}", [total]


def check_code(f: Folder) -> Iterator[tuple]:
    """The code in the folder is the code that was counted, all of it."""
    counted = [run.get("code_bytes") for run in f.runs if "code_bytes" in run.facts]
    if not f.code or not counted:
        yield UNKNOWN, f"no {'log states the bytes of code' if f.code else 'train_gpt.py'}; that would decide"
        return
    counts = sorted({fact.value for fact in counted})
    shipped = [fact for run in f.runs for fact in run.all("shipped_bytes") if fact.value < BYTES_CAP]
    helpers = ", ".join(f"{name} ({size:,})" for name, size in f.code.helpers.items())
    needs = f", and it needs {helpers}" if helpers else ""
    verdict, said = PASS, "it needs no other file of the folder"
    if counts != [f.code.size] and any(fact.value in f.claimed_totals for fact in shipped):
        said = "submission.json counts what is shipped"
    elif counts != [f.code.size]:
        packed = len(counts) > 1 or any("packed_bytes" in run.facts for run in f.runs)
        verdict, said = FAIL if packed else UNKNOWN, "another form of it was counted; that form would decide"
    elif helpers:
        verdict, said = FAIL, "what it needs is not counted"
    elif not f.code.parsed:
        verdict, said = UNKNOWN, "what it imports cannot be told; a script of this Python would decide"
    elif f.code.closed > ENCODED_CAP and f.script_named():
        said = "it cannot be unpacked here, but its SHA-256 is that of the whole code of every run"
    elif f.code.closed > ENCODED_CAP:
        verdict = UNKNOWN
        said = f"{f.code.closed:,} characters of it cannot be unpacked here; the source would decide"
    bytes_counted = " or ".join(f"{count:,}" for count in counts)
    text = f"{bytes_counted} bytes of code counted, train_gpt.py has {f.code.size:,}{needs}; {said}"
    yield verdict, text, "train_gpt.py", *f.code.helpers, *counted


def check_train_seconds(f: Folder, run: Run) -> Iterator[tuple]:
    """Training time of every run within the cap, calibration on training data included."""
    spent, steps, step = map(run.get, ("train_seconds", "step_seconds", "step_avg"))
    after, inside = run.get("calibration_after"), run.get("calibration_inside")
    if not spent:
        yield UNKNOWN, "no train_time; it would decide", [run]
        return
    limits = [run.get(name) for name in ("cap_seconds", "max_wallclock_seconds") if run.get(name)]
    cap = min([SECONDS_CAP, *(fact.value for fact in limits if is_figure(fact.value) and fact.value > 0)])
    total = round(spent.value + (after.value if after else 0), 3)
    text = f"{spent.text} s of {cap:g}"
    if after:
        text = f"{total} s of {cap:g}: {spent.text} s, and {after.text} s of calibration after it"
    elif inside:
        text += f", {inside.text} s of calibration included"
    if steps and inside and abs(steps.value + inside.value - spent.value) > 0.0021:
        said = f"{steps.text} s of steps and {inside.text} s of calibration are not {spent.text} s"
        yield FAIL, said, [spent]
    yield PASS, text, total <= cap and [fact for fact in (spent, after) if fact]
    said = f"{text}: the step under way at the cap ended after it; the rule's makers would decide"
    yield UNKNOWN, said, step and total - cap <= step.value and not after and not steps and [spent]
    yield FAIL, text, [spent, after, *limits]


def check_eval_seconds(f: Folder, run: Run) -> Iterator[tuple]:
    """Every evaluation of every run within the cap."""
    times = run.facts.get("eval_seconds", []) + run.facts.get("all_eval_seconds", [])
    over = [fact for fact in times if not fact.value <= SECONDS_CAP]
    yield FAIL, f"{' and '.join(fact.text for fact in over)} s of {SECONDS_CAP:g}", over
    longest = sorted(times, key=lambda fact: fact.value)[-1:]
    yield PASS, f"{''.join(fact.text for fact in longest)} s of {SECONDS_CAP:g}", longest
    yield UNKNOWN, "no eval_time; it would decide", [run]


def check_hints(f: Folder, run: Run) -> Iterator[tuple]:
    """N-gram hints are computed inside the timer; the order of the lines decides, then the settings."""
    setting = "ngram_hint_precompute_outside"
    begins, shown, done = (run.facts.get(name, []) for name in ("timer_begins", "hints_shown", "hints_done"))
    early = [fact for fact in shown + done if begins and fact.value < begins[0].value]
    yield PASS, "no hints", run.having("ngram_tilt_enabled", False)
    yield FAIL, "outside the timer", run.having("hints_inside_timer", False)
    yield PASS, "inside the timer", run.having("hints_inside_timer", True)
    yield FAIL, "counted before the timer begins, by the order of the lines", early and early[:1] + begins[:1]
    yield PASS, "counted after the timer begins, by the order of the lines", begins and done[:1]
    yield FAIL, "the settings put them outside the timer", run.having(setting, True)
    said = "a line says outside the timer; a line where the timer begins would decide"
    yield UNKNOWN, said, [fact for fact in done if "outside" in fact.text]
    yield PASS, "inside the timer", run.having(setting, False) or begins and shown[:1]
    yield UNKNOWN, "not said; lines for the timer's begin and the hints would decide", [run]


def check_experts(f: Folder, run: Run) -> Iterator[tuple]:
    """Experts that look at the token being scored are off."""
    experts = {name: run.get(name) for name in GATES + PEEKING}
    on = [fact for fact in experts.values() if fact and fact.value]
    shown = ", ".join(f"{name} {fact.text}" for name, fact in experts.items() if fact in on)
    gates = [fact for name in GATES for fact in run.having(name, 0)]
    boosts = [fact for name in PEEKING for fact in run.having(name, 0)]
    taus = [tau for tau in map(run.get, ("within_tau", "word_tau")) if tau and is_figure(tau.value)]
    closed = len(boosts) == 3 and sum(tau.value > 1 for tau in taus) == 2
    yield PASS, "no tilt", run.having("ngram_tilt_enabled", False)
    yield FAIL, f"experts that see the target are on: {shown}", on
    yield PASS, "this program has token hints only", run.record and run.all("ngram_boost")
    yield PASS, "their gates opened nowhere", len(gates) == 3 and gates
    yield PASS, "their boosts are zero and their thresholds above 1", closed and boosts + taus
    yield UNKNOWN, "which experts opened is not said; the counts of their gates would decide", [run]


def check_targets(f: Folder, run: Run) -> Iterator[tuple]:
    """Every token of the validation text is scored."""
    text, scored, documents, docs = map(run.get, ("val_targets", "targets", "documents", "val_docs"))
    tokens = lookup(f.manifest, "splits", "val", "tokens")
    short = PUBLISHED_TARGETS - text.value if text else -1
    published = 0 <= short < LONGEST_TAIL
    whole = docs.value if docs else PUBLISHED_DOCS if published else 0
    yield FAIL, "a part of the validation documents was scored", run.having("whole_text", False)
    if scored and text and scored.value != text.value:
        said = f"{text.value - scored.value:,} targets unscored: {scored.value:,} of {text.value:,}"
        yield FAIL, said, [scored, text]
    if documents and documents.value < whole:
        yield FAIL, f"{whole - documents.value:,} documents unscored, of {whole:,}", [documents]
    for name, fact in run.settings.items():
        size = 1 if re.search("(?:val|eval|ttt)_.*(?:fraction|frac|subset)$", name) else 0
        if re.search("(?:max|limit)_(?:val|eval)_|(?:val|eval)_(?:max|limit)_", name):
            size = whole if "doc" in name else text.value if text and "token" in name else 0
        if is_figure(fact.value) and 0 < fact.value < size:
            yield FAIL, f"{name} {fact.text}: a part of the validation text was scored", [fact]
    # A run that says it scored all of its own text may have another text than the published one.
    own = run.having("whole_text", True) or run.having("eval_include_tail", True)
    full = PUBLISHED_TARGETS if published and not (own and short) else None
    full = tokens - 1 if is_figure(tokens) else full
    if text and full and text.value != full:
        said = f"{full - text.value:,} targets unscored: {text.value:,} of {full:,}, the tail is cut"
        yield FAIL, said, [text]
    if text and full and (scored or not own):
        yield PASS, f"{text.value:,} targets, the tail included", [text, scored]
    yield FAIL, "the tail of the validation text is cut", run.having("eval_include_tail", False)
    yield UNKNOWN, "how many there are is not said; data_manifest.json would decide", [text or run]


def check_seeds(f: Folder) -> Iterator[tuple]:
    """Three seeds or more, each with one finished run, the same ones in submission.json."""
    seeds = sorted({run.seed for run in f.group} - {None})
    for run in f.runs:
        finals = run.finals()
        if run.seed is None:
            yield UNKNOWN, "neither the log nor its name says the seed, which would decide", run
        elif run.named_seed not in (None, run.seed):
            yield FAIL, f"the file's name says seed {run.named_seed}, the run had {run.seed}", run, run.name
        if run.ours and "finished" not in run.facts:
            end = run.facts.get("failed", [run.last_line])[0]
            yield FAIL, "the run failed" if "failed" in run.facts else "the run has no end", run, end
        elif not finals and any(other.finals() for other in f.of(run.seed)):
            said = "the log ends without a score; an artifact's SHA-256 in both logs would decide"
            yield UNKNOWN, said, run, run.last_line
        elif not finals:
            yield FAIL, "the log ends without a score", run, run.last_line
        last = {score.label: score for score in finals}
        for score in finals if run.seed is not None else ():
            other = last[score.label]
            if not agree(score, other.value, other.text):
                yield FAIL, f"one log, two scores: {score.text} and {other.text}", run, score, other
    for seed in seeds:
        trained = [run for run in f.of(seed) if run.trains]
        finished = [run.name for run in trained if run.finals() or run.ours]
        if len(finished) > 1:
            yield FAIL, f"{len(finished)} training logs of one seed with equal settings", seed, *finished
        elif not trained:
            yield UNKNOWN, "no training log of this seed; it would decide", *f.of(seed)
    if len(seeds) < LEAST_SEEDS:
        yield FAIL, f"{len(seeds)} seeds, {LEAST_SEEDS} are needed", *(run.name for run in f.group)
    if not f.claimed:
        yield UNKNOWN, "no seeds in submission.json; a list of them would decide", "submission.json"
    elif f.claimed != seeds:
        said = f"submission.json names seeds {f.claimed}, the logs are of {seeds}"
        yield FAIL, said, "submission.json: seeds"
    said = f"seeds {', '.join(map(str, seeds))}, each with one finished run"
    yield SOUND, said, *(run.last_line for run in f.runs)


def check_data(f: Folder) -> Iterator[tuple]:
    """Training and validation documents are disjoint: the manifest says so, and it is here."""
    if f.manifest_wrong and "data_manifest.json" in f.names:
        yield FAIL, f.manifest_wrong, "data_manifest.json"
    elif f.manifest_wrong and any(run.ours for run in f.runs):
        yield UNKNOWN, f"{f.manifest_wrong}; it would decide", "data_manifest.json"
    stated = lookup(f.manifest, "splits_disjoint")
    claims = [] if f.manifest_wrong else [Fact(stated, "", "data_manifest.json: splits_disjoint")]
    for run in f.runs:
        named = run.get("manifest")
        if named and named.value != "none":
            claims.append(run.get("splits_disjoint") or named)
        elif run.trains or not run.ours:
            said = "the log names no manifest of its data, which would decide"
            yield UNKNOWN, said if run.ours else FOREIGN, run, named
        for split, what in (
                ("train", "docs"),
                ("val", "docs"),
                ("val", "bytes")):
            cut = what == "bytes" and run.having("eval_include_tail", False)
            fact, given = run.get(f"{split}_{what}"), lookup(f.manifest, "splits", split, what)
            if fact and given is not None and fact.value != given and not cut:
                said = f"{fact.text} {split} {what}, {given} in the manifest: another data set"
                yield FAIL, said, run, fact
    for fact in claims:
        if fact.value is False:
            yield FAIL, "training and validation documents overlap", fact
        elif fact.value is not True:
            yield UNKNOWN, "whether the splits are disjoint is not said; splits_disjoint would decide", fact
    for name in ("train_tokens", "val_targets", "train_docs", "val_docs", "train_shards"):
        runs = [run for run in f.runs if run.trains or name != "train_tokens"]
        facts = [run.get(name) for run in runs if name in run.facts]
        for other in [fact for fact in facts if fact.value != facts[0].value][:1]:
            yield FAIL, f"{name} differs between runs: {facts[0].text} and {other.text}", facts[0], other
    yield SOUND, "splits are disjoint, by the logs and by data_manifest.json", *claims


def settings_apart(one: dict[str, Fact], two: dict[str, Fact]) -> list[tuple[str, Fact, Fact]]:
    """The settings that differ between two runs, by name; a blank one says nothing."""
    names = sorted((one.keys() | two.keys()) - OWN_TO_A_RUN)
    pairs = [(name, one.get(name, NOT_STATED), two.get(name, NOT_STATED)) for name in names]
    return [(name, a, b) for name, a, b in pairs if a.value != b.value and a.text and b.text]


def check_same(f: Folder) -> Iterator[tuple]:
    """All seeds ran the same code with the same settings but for the seed."""
    trained = [run for run in f.runs if run.trains] or f.runs
    first = trained[0]
    for run in f.runs:
        bases = dict(code_sha256=first, code_bytes=first, world_size=first, artifact_sha256=f.of(run.seed)[0])
        for name, base in bases.items():
            pair = base.last(name) + run.last(name)
            apart = len({fact.value for fact in pair}) > 1
            if apart and (run.trains or name != "world_size"):
                yield FAIL, f"{name} differs: {' and '.join(fact.text[:16] for fact in pair)}", run, *pair
        apart = settings_apart(f.listed(first), f.listed(run)) if f.mixed and run.settings else []
        if apart:
            shown = ", ".join(f"{name} {a.text} and {b.text}" for name, a, b in apart)
            said = f"settings of {first.name} and {run.name} differ: {shown}"
            yield FAIL, said, run, *(fact for _, *facts in apart for fact in facts)
    bare = [run for run in trained if not run.settings]
    if bare:
        yield UNKNOWN, "no settings in the log; a block of them under Hyperparameters: would decide", *bare
    elif len(trained) < 2:
        yield UNKNOWN, "one training run alone; others would decide", first
    digests = [fact for run in f.runs for fact in run.all("code_sha256")]
    if digests and not all(re.fullmatch(r"[0-9a-f]{64}", fact.text) for fact in digests):
        yield UNKNOWN, "a log does not name its code; its SHA-256 would decide", *digests
    elif digests and not f.script_named():
        yield UNKNOWN, "the script that ran is not here as train_gpt.py; it would decide", *digests
    beside = len(f.every_run) - len(f.runs)
    said = f"one set of settings but for the seed; {'one' if digests else 'unidentified'} code"
    said += f"; {beside} runs with other settings lie beside them" if beside else ""
    yield SOUND, said, *(run.settings.get("seed") or run for run in trained)


def check_settings(f: Folder, run: Run) -> Iterator[tuple]:
    """Settings that are stated are settings that act."""
    cap, reserve, budget = map(run.get, ("max_wallclock_seconds", "gptq_reserve_seconds", "budget_seconds"))
    docs, used = map(run.get, ("phased_ttt_prefix_docs", "prefix_docs"))
    if all(fact and is_figure(fact.value) for fact in (cap, reserve, budget)):
        gap = abs(cap.value - reserve.value - budget.value)
        said = f"the head says {cap.text} s less {reserve.text} s, the run had {budget.text} s"
        yield FAIL, said, gap > 0.0011 and [reserve, budget]
    if docs and used and docs.value != used.value:
        yield FAIL, f"the head says {docs.text} prefix documents, the run took {used.text}", [docs, used]
    events = [event for event in run.record["events"] if event["event"] == "settings"] if run.record else []
    for event in events:
        for name, value in event.items():
            acting = run.record["settings"].get(name.lower(), "nothing")
            said = f"{name} was set to {value}, the run's settings say {acting}"
            yield FAIL, said, name != "event" and acting != value and [run.stated.get(name.lower(), run)]
    if events:
        said = f"{len(run.record['settings'])} settings, those of the log among them"
        yield PASS, said, list(run.stated.values())
    yield UNKNOWN, "no run record with the settings; it would decide" if run.ours else FOREIGN, [run]


def check_track(f: Folder, run: Run) -> Iterator[tuple]:
    """The published text, eight H100, a recipe's settings, or another track in submission.json."""
    claimed = str(f.submission.get("track", "10min_16mb")).startswith("10min")
    events = run.record["events"] if run.record else []
    for event in events:
        if event["event"] == "track":
            on_track = event.get("name") == "10min_16mb"
            said = f"no record: {event.get('because')}; runs without that would decide"
            yield PASS, "text, hardware and settings of a record", on_track and run.last("track")
            yield FAIL if claimed else UNKNOWN, said, run.last("track")
    yield UNKNOWN, "no track in its run record; it would decide" if run.ours else FOREIGN, [run]


def check_order(f: Folder, run: Run) -> Iterator[tuple]:
    """Scores and hints follow one order in which a decoder could read the text."""
    said = "documents are scored in the order of their lengths, which no decoder knows"
    lengths = run.facts.get("longest", [])
    changes = [two.value - one.value for one, two in zip(lengths, lengths[1:])]
    falling, rising = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    ordered = falling + rising > 0 and min(falling, rising) * 10 <= max(falling, rising)
    yield PASS, "decodable", run.having("decodable", True)
    yield FAIL, said, run.having("decodable", False)
    yield FAIL, f"{said}, by the log's dl:a-b", ordered and lengths[:1] + lengths[-1:]
    yield PASS, "plain evaluation, left to right", run.having("ttt_enabled", False)
    yield UNKNOWN, "not said; lines with the lengths of documents (dl:a-b) would decide", [run]


def check_finite(f: Folder) -> Iterator[tuple]:
    """No figure is infinite or not a number, and training did not diverge."""
    for run in f.runs:
        bad = [(name, fact) for name, facts in run.facts.items() for fact in facts
               if isinstance(fact.value, float) and not math.isfinite(fact.value)]
        losses, steps = run.facts.get("train_loss", []), run.facts.get("steps", [])
        if bad:
            yield FAIL, f"{bad[0][0]} is {bad[0][1].text}, one of {len(bad)} such figures", run, bad[0][1]
        elif not losses and run.trains:
            yield UNKNOWN, "no training loss; lines with train_loss would decide", run
        elif losses:
            early = steps and steps[0].value <= 20  # a log that begins late shows noise
            risen = len(losses) > 1 and losses[-1].value >= losses[0].value * (1.0 if early else 1.2)
            verdict = FAIL if risen and steps and steps[-1].value > 20 else PASS
            yield verdict, f"training loss {losses[0].text} to {losses[-1].text}", run, losses[0], losses[-1]
    for path, value in leaves(f.submission):
        if str(typed(str(value))) in ("nan", "inf", "-inf"):
            yield FAIL, f"{'.'.join(path)} is {value}", f"submission.json: {'.'.join(path)}"


def t_test(high: list[float], low: list[float], paired: bool, shift: float) -> float:
    """p of the mean of `high` being above that of `low` by more than a shift."""
    moved = [value - shift for value in high]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all equal
        if paired:
            test = stats.ttest_rel(moved, low, alternative="greater")
        else:
            test = stats.ttest_ind(moved, low, equal_var=False, alternative="greater")
    if math.isnan(test.pvalue):
        return float(statistics.fmean(moved) <= statistics.fmean(low))
    return float(test.pvalue)


def other_scores(comparison) -> dict[int, float]:
    """The other side of a comparison by seed, or by place in a list."""
    found = {}
    for place, (path, value) in enumerate(leaves(lookup(comparison, "baseline"))):
        fact, seed = as_number(value, ""), seed_of(path[0]) if path else None
        if fact and len(path) == 1:
            found[place if seed is None else seed] = fact.value
    return found


def check_comparison(f: Folder) -> Iterator[tuple]:
    """The score rule: better by the threshold in nats, and significantly; from the scores per seed."""
    comparison, key = f.submission.get("comparison"), "submission.json: comparison"
    theirs = other_scores(comparison)
    ours = {}  # (bpb, nats) by seed, of the training log where another one scored the artifact too
    for seed in f.chosen:
        pair = []
        for name in ("val_bpb", "val_loss"):
            found = f.counted(seed, name)
            pair += [fact.value for fact in found if fact.label == found[0].label][-1:]
        if len(pair) == 2 and min(pair) > 0:
            ours[seed] = pair
    if min(len(theirs), len(ours)) < 2:
        yield UNKNOWN, "no comparison with the scores per seed of both sides; they would decide", key
        return
    nats = statistics.fmean(loss / bpb for bpb, loss in ours.values())  # of a token at 1 bpb: the text's
    order = ours if ours.keys() == theirs.keys() else theirs
    high = [theirs[seed] * nats for seed in order]
    low = [bpb * nats for bpb, _ in ours.values()]
    paired = "pair" in str(comparison.get("test", "")).lower()
    if paired and len(high) != len(low):
        yield FAIL, f"{len(high)} scores and {len(low)} cannot be paired", f"{key}.test"
        return
    names = ("difference_nats", "p", "threshold_nats", "required_p")
    stated, p, threshold, level = (as_number(comparison.get(name), f"{key}.{name}") for name in names)
    if threshold and threshold.value < THRESHOLD_NATS:
        yield FAIL, f"threshold_nats {threshold.text}, the rule has {THRESHOLD_NATS:g}", threshold
    if level and level.value > LARGEST_P:
        yield FAIL, f"required_p {level.text}, the rule has {LARGEST_P:g}", level
    gain = statistics.fmean(high) - statistics.fmean(low)
    if stated and not agree(stated, gain, "0.0000001"):
        yield FAIL, f"difference_nats {stated.text}, the scores give {gain:.8f}", stated, key
    rule, against_zero = (t_test(high, low, paired, shift) for shift in (THRESHOLD_NATS, 0.0))
    test = "paired" if paired else "Welch"
    text = f"{gain:.6f} nats better, {test} t-test, p {rule:.4g} one-sided, above {THRESHOLD_NATS:g}"
    if p and not agree(p, rule, f"{rule:.3e}"):
        if agree(p, against_zero, f"{against_zero:.3e}"):
            text += f"; the p that is stated, {p.text}, is one-sided, above 0, which is not the rule's"
        else:
            yield FAIL, f"p {p.text}; {text}", p, key
    reached = gain > THRESHOLD_NATS and rule < LARGEST_P
    if not reached and comparison.get("new_record", bool(p)):
        said = f"{text}: a record needs more than {THRESHOLD_NATS:g} and p below {LARGEST_P:g}"
        yield FAIL, said, stated, p, key
    yield SOUND, text if reached else f"{text}: no new record", stated, p, key


# --- Output

OF_A_FOLDER = {
    "submission.json": check_figures, "record and log agree": check_records, "code": check_code,
    "seeds": check_seeds, "data": check_data, "same code, settings": check_same,
    "finite figures": check_finite, "score rule": check_comparison}
OF_A_RUN = {
    "bytes": check_bytes, "training seconds": check_train_seconds, "evaluation seconds": check_eval_seconds,
    "hints inside timer": check_hints, "token hints only": check_experts, "all targets scored": check_targets,
    "settings act": check_settings, "decodable order": check_order, "track": check_track}
CHECKS = OF_A_FOLDER | OF_A_RUN  # in the order of the output


def finding(name: str, verdict: str, detail: str, *sources) -> dict:
    """A finding with its evidence: where the facts stand, of runs alone their names."""
    runs = [source for source in sources if isinstance(source, Run)]
    seeds = [run.seed for run in runs] + [source for source in sources if isinstance(source, int)]
    where = [getattr(source, "where", source) for source in sources if isinstance(source, (Fact, str))]
    where = [place for place in where if place] or [run.name for run in runs]
    return dict(check=name, verdict=PASS if verdict == SOUND else verdict, seed=seeds[0] if seeds else None,
                detail=detail, evidence=", ".join(dict.fromkeys(where)))


def findings_of_runs(f: Folder, function: Callable) -> list[tuple]:
    """The first finding with sources of each run; none where only another log of its seed can tell."""
    found = []
    for run in f.runs:
        held = [(verdict, text, run, *facts) for verdict, text, facts in function(f, run) if facts]
        found += held[:1]
    told = {run.seed for verdict, _, run, *_ in found if verdict != UNKNOWN}
    return [item for item in found if item[0] != UNKNOWN or item[2].seed not in told]


def findings_of(f: Folder) -> list[dict]:
    """The findings of every check on a folder."""
    found = []
    for name, function in CHECKS.items():
        items = findings_of_runs(f, function) if name in OF_A_RUN else list(function(f))
        others = [item for item in items if item[0] != SOUND]
        found += [finding(name, *item) for item in others or items]
    return found


def audit(path: str | Path) -> list[dict]:
    """The findings on a record folder: {check, verdict, seed, detail, evidence}. Raises VerifyError."""
    return findings_of(Folder(Path(path)))


def report(found: list[dict]) -> str:
    """A line for each check, or for each finding that is no PASS; one for what no foreign log can say."""
    lines, silent = [], []
    for name in CHECKS:
        mine = [item for item in found if item["check"] == name]
        if {item["detail"] for item in mine} == {FOREIGN}:
            silent.append(name)
            continue
        for verdict in (FAIL, UNKNOWN, PASS):
            texts = merged([item for item in mine if item["verdict"] == verdict])
            texts = ["; ".join(texts)] if verdict == PASS and texts else texts
            lines += [f"{verdict:8}{name:22}{text}" for text in texts]
    if silent:
        lines.append(f"{UNKNOWN:8}{'no foreign log says':22}{', '.join(silent)}: {FOREIGN}")
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufffd]", "?", line) for line in lines)


def merged(found: list[dict]) -> list[str]:
    """What was found, of several seeds in one text where the words are the same."""
    texts = []
    for detail in dict.fromkeys(item["detail"] for item in found):
        items = [item for item in found if item["detail"] == detail]
        seeds = list(dict.fromkeys(str(item["seed"]) for item in items if item["seed"] is not None))
        where = ", ".join(dict.fromkeys(item["evidence"] for item in items if item["evidence"]))
        told = f"seed{'s' if seeds[1:] else ''} {', '.join(seeds)}: {detail}" if seeds else detail
        texts.append(f"{told} ({where})" if where else told)
    return texts


def summary(f: Folder) -> dict[str, list[float]]:
    """Every figure that the logs of all seeds state, by seed."""
    found = {}
    for name in FIGURES.values():
        facts = [f.counted(seed, name) for seed in f.chosen]
        found[name] = [one[0].value for one in facts] if all(facts) else []
    return found


def compare(one: Folder, two: Folder) -> str:
    """Two folders side by side: the settings that differ, and every figure as its mean over the seeds."""
    rows = [("", one.path, two.path), ("seeds", one.chosen, two.chosen)]
    for name, *facts in settings_apart(one.group[0].settings, two.group[0].settings):
        rows.append((name, *(fact.text for fact in facts)))
    figures = [summary(one), summary(two)]
    for name in figures[0]:
        found = [side[name] for side in figures]
        rows.append((name, *(f"{statistics.fmean(x):.8g}" if x else "not stated" for x in found)))
    return "\n".join(f"{name:34}{a!s:>34} {b!s:>34}" for name, a, b in rows)


def table(paths: list[str]) -> str:
    """A leaderboard from the logs: mean val_bpb, seeds, the largest total and times, the verdicts."""
    rows = []
    for path in paths:
        try:
            f = Folder(Path(path))
        except (VerifyError, OSError) as error:
            rows.append((math.inf, f"{'':12} {error}"))
            continue
        figures, verdicts = summary(f), [item["verdict"] for item in findings_of(f)]
        score = statistics.fmean(figures["val_bpb"]) if figures["val_bpb"] else math.inf
        names = ("total_bytes", "train_seconds", "eval_seconds")
        shown = " ".join(f"{max(figures[name]):12,.10g}" if figures[name] else f"{'?':>12}" for name in names)
        counts = f"{verdicts.count(FAIL):5} {verdicts.count(UNKNOWN):7}"
        rows.append((score, f"{score:12.8f} {len(f.chosen):5} {shown} {counts} {path}"))
    head = f"{'val_bpb':>12} seeds {'bytes':>12} {'training s':>12} {'evaluation s':>12}  FAIL UNKNOWN folder"
    return "\n".join([head, *(text for _, text in sorted(rows))])


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if arguments in (["-h"], ["--help"]):
        checks = [f"  {name:22}{function.__doc__}" for name, function in CHECKS.items()]
        print("\n".join([__doc__.strip(), "", "Checks:", *checks]))
        return 0
    names = [argument for argument in arguments if argument not in ("--json", "--compare", "--table")]
    option = "".join(argument for argument in arguments if argument not in names)
    code = 0
    try:
        wanted = {"": 1, "--json": 1, "--compare": 2, "--table": max(1, len(names))}.get(option)
        if len(names) != wanted or any(name.startswith("-") for name in names):
            raise VerifyError("one folder, and --json if wanted; or --compare DIR DIR; or --table DIR...")
        if option == "--compare":
            text = compare(*(Folder(Path(name)) for name in names))
        elif option == "--table":
            text = table(names)
        else:
            found = audit(names[0])
            code = int(any(item["verdict"] == FAIL for item in found))
            text = json.dumps(found, indent=1) if option else report(found)
    except (VerifyError, OSError) as error:
        print(f"verify_submission.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
