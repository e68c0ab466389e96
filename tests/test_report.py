"""Tests of tools/report.py: figures, shares and schedules equal the records', the page is sound HTML, a browser shows it."""
import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import json
import random
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import synthetic

pytest.importorskip("matplotlib")

import train_gpt as g  # noqa: E402
from tools import report  # noqa: E402

RECORDS = Path(__file__).resolve().parent.parent / "bench" / "records"
FIGURES = {  # results of a synthetic run
    "unigram": dict(val_bpb=3.25),
    "training": dict(steps=40, seconds=20.5, calibration_seconds=1.25, clock_seconds=21.75, cap_seconds=0.0, within_cap=True,
                     tokens=163840, looping_from=14, tokens_per_second_plain=8417, tokens_per_second_looping=6294),
    "raw": dict(val_loss=2.7, val_bpb=1.30123456, targets=1000, bytes=4000, seconds=1.5),
    "averaged": dict(val_loss=2.7, val_bpb=1.29654321, targets=1000, bytes=4000, seconds=1.5),
    "artifact": dict(file="a", compressor="entropy", quantization_seconds=2.0, packing_seconds=0.75, unpacking_seconds=0.25),
    "size": dict(artifact_bytes=50_000, code_bytes=6_000, total_bytes=56_000, cap=60_000, within_cap=True),
    "quantized": dict(val_loss=2.7, val_bpb=1.29999999, targets=1000, bytes=4000, seconds=1.25),
    "ttt": dict(val_loss=2.7, val_bpb=1.28012345, untilted_bpb=1.28111111, whole_text=True, seconds=8.125,
                process_seconds=52.0)}
MATRICES = {"tok_emb": 9_000, "blocks.0.attn.c_q": 5_000, "blocks.1.attn.c_q": 5_500, "blocks.0.attn.c_k": 2_000,
            "blocks.0.attn.c_v": 2_500, "blocks.0.attn.proj": 5_000, "blocks.0.mlp.fc": 9_000, "blocks.10.mlp.proj": 10_000}


def make(folder: Path, run_id: str = "tiny", end: str = "finished", until: str = "", shift: float = 0.0, **settings) -> Path:
    """A record written by train_gpt's own RunLog. end: the last event; until: the last result; shift: added to every bpb."""
    s = synthetic.tiny(folder, RUN_ID=run_id, ITERATIONS=40, TRAIN_BATCH_TOKENS=4096, **settings)
    with contextlib.redirect_stdout(io.StringIO()):
        log = g.RunLog(s, synthetic.runtime())
        log.event("code", sha256="0" * 64, packed_bytes=6_000)
        log.event("warmup", steps=1, shapes=[[256, False]], seconds=4.5, reserve_seconds=0.0)
        for kind, fields in FIGURES.items():
            if kind == "training":
                for step in (*range(1, 6), 10, 20, 30, 40):
                    log.event("step", step=step, train_loss=round(6 / step ** 0.2, 4), grad_norm=1.0, seconds=0.5 * step,
                              tokens_per_second=8192 if step > 1 else 0)
                log.event("looping", step=14, progress=0.35)
            if kind == "artifact":
                for name, size in MATRICES.items():
                    log.event("matrix", name=name, rows=8, columns=8, bytes=size)
            log.result(kind, **{name: value + shift if name.endswith("bpb") else value for name, value in fields.items()})
            if kind == until:
                break
        if end == "finished":
            log.close("finished", seconds=50.0)
        elif end == "failed":
            log.close("failed", error="OverCapError: too <large> & late")
        else:
            log.save()
            log.file.close()
    return Path(log.path + ".json")


def change(path: Path, name: str, edit) -> Path:
    """A copy beside `path` after edit(record)."""
    record = json.loads(path.read_text())
    edit(record)
    copy = path.with_name(f"{name}.json")
    copy.write_text(json.dumps(record))
    return copy


def runs_of(*paths: Path) -> list[report.Run]:
    return report.read_records([str(path) for path in paths])[0]


class Page(HTMLParser):
    """What a page holds: rows of its tables, images, text of elements by tag; raises where tags do not nest."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.rows, self.text = [], [], {}, {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.table = self.rows.setdefault(f"table {len(self.rows)}", [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("th", "td"):
            self.table[-1].append("")
        elif tag == "data":
            self.table[-1][-1] = attributes["value"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data
        if tag in ("th", "td", "span") and "table" in self.open:
            self.table[-1][-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def summary(self) -> dict[str, list[str]]:
        """The cells of each row of the table of figures: a number's exact value, else the text."""
        figures = next(rows for rows in self.rows.values() if rows[1][0] == "status")
        return {row[0]: row[1:] for row in figures}


def build(paths: list, out: Path) -> Page:
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    return Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[list[Path], Path]:
    """A finished, a failed and a running record, and their report's folder."""
    folder = tmp_path_factory.mktemp("three")
    paths = [make(folder, "whole"), make(folder, "over_cap", "failed", shift=0.01, NUM_LOOPS=2),
             make(folder, "killed", "running", until="raw")]
    build(paths, folder / "report")
    return paths, folder / "report"


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_the_seeds_of_a_recipe_are_found_in_their_folders(three, tmp_path):
    paths, _ = three
    for seed, name in ((1, "train_seed1"), (2, "train_seed2"), (2, "eval_seed2")):
        (tmp_path / f"seed{seed}").mkdir(exist_ok=True)
        (tmp_path / f"seed{seed}" / f"{name}.json").write_bytes(paths[0].read_bytes())
    runs, others = report.read_records([str(tmp_path)])
    assert [run.path.name for run in runs] == ["train_seed1.json", "train_seed2.json"] and not others


def test_summary_holds_the_figures_of_the_records(three):
    paths, out = three
    page = Page((out / "report.html").read_text())
    rows = page.summary()
    assert rows["run"] == ["whole", "over_cap", "killed"]
    assert rows["status"] == ["finished", "failed: OverCapError: too <large> & late", "running: no end recorded"]
    assert rows["seed"] == ["1337"] * 3 and all("CPU" in text for text in rows["machine"])
    names = {"steps": ("training", "steps"), "tokens/s plain": ("training", "tokens_per_second_plain"),
             "tokens/s looping": ("training", "tokens_per_second_looping"), "val_bpb raw": ("raw", "val_bpb"),
             "val_bpb averaged": ("averaged", "val_bpb"), "val_bpb quantized": ("quantized", "val_bpb"),
             "val_bpb TTT": ("ttt", "val_bpb"), "artifact + code, bytes": ("size", "total_bytes"),
             "training seconds": ("training", "clock_seconds"), "plain evaluation seconds": ("quantized", "seconds"),
             "TTT evaluation seconds": ("ttt", "seconds"), "artifact": ("size", "artifact_bytes"),
             "code": ("size", "code_bytes")}
    for name, (kind, key) in names.items():
        for path, shown in zip(paths, rows[name]):
            value = json.loads(path.read_text())["results"].get(kind, {}).get(key)
            assert shown == (report.LOST if value is None else repr(value)), name
    assert float(rows["tilt gain"][0]) == pytest.approx(0.00098766) and rows["tilt gain"][2] == report.LOST
    assert rows["seconds in all"] == ["50.0", report.LOST, report.LOST]
    assert "1.30123" in page.text["data"] and "56,000" in page.text["data"]


def test_what_is_over_a_cap_says_so(tmp_path):
    def edit(record):
        record["results"]["size"]["within_cap"] = record["results"]["training"]["within_cap"] = False

    text = report.summary_table(runs_of(change(make(tmp_path), "over", edit)))
    assert text.count(" over the cap") == 2


def test_waterfall_numbers(three):
    run = runs_of(three[0][0])[0]
    assert report.stages(run) == [("raw", 1.30123456), ("averaged", 1.29654321), ("quantized", 1.29999999),
                                  ("TTT, no tilt", 1.28111111), ("TTT, tilted", 1.28012345)]
    texts = [image["alt"] for image in Page((three[1] / "report.html").read_text()).of("img")]
    assert any("whole: raw 1.30123, averaged 1.29654, quantized 1.30000, TTT, no tilt 1.28111, TTT, tilted 1.28012" in text
               for text in texts)
    for narrow in False, True:
        axes = report.draw_waterfall([run], narrow).axes[0]
        assert [text.get_text() for text in axes.texts] == ["1.30123", "1.29654 (-0.00469)", "1.30000 (+0.00346)",
                                                            "1.28111 (-0.01889)", "1.28012 (-0.00099)"]
        assert 1.27 < axes.get_xlim()[0] < 1.28012345 and "not from 0" in axes.get_xlabel()


def test_waterfall_leaves_out_what_is_missing(tmp_path):
    path = make(tmp_path)
    old = change(path, "old", lambda record: record["results"]["ttt"].pop("untilted_bpb"))
    off = change(path, "off", lambda record: record["settings"].update(ngram_tilt_enabled=False))
    only = change(path, "only", lambda record: [record["results"].pop(kind) for kind in ("raw", "averaged", "ttt")])
    for run in runs_of(old, off):
        assert report.stages(run)[3:] == [("TTT", 1.28012345)] and report.tilt_gain(run) is None
    assert report.stages(runs_of(only)[0]) == [("quantized", 1.29999999)]


def test_waterfalls_share_an_axis_unless_that_hides_changes():
    def ends(*runs):
        return report.waterfall_ends([list(enumerate(run)) for run in runs])

    assert ends([1.27, 1.28, 1.26], [1.28, 1.29, 1.27]) == [(1.26, 1.29)] * 2
    assert ends([2.3, 2.4, 1.8], [1.28, 1.29, 1.27]) == [(1.8, 2.4), (1.27, 1.29)]
    assert ends([1.27, 1.28, 1.26], [1.27]) == [(1.26, 1.28)] * 2


def test_time_shares_sum_up(three):
    whole, failed, killed = (report.times(run) for run in runs_of(*three[0]))
    parts, seconds, ended = whole
    assert seconds == 50.0 and ended and sum(parts.values()) == pytest.approx(50.0)
    assert parts == {"warm-up, compilation": 4.5, "training": 20.5, "calibration": 1.25, "quantization": 2.0,
                     "packing, check": 1.0, "evaluation": 4.25, "test-time training": 8.125, "rest": pytest.approx(8.375)}
    assert failed[1:] == (52.0, False) and sum(failed[0].values()) == pytest.approx(52.0)
    assert killed[1:] == (None, False) and "rest" not in killed[0] and sum(killed[0].values()) == 4.5 + 20.5 + 1.25 + 1.5


@pytest.mark.parametrize("name", ["mini_pr2135_240s", "mini_record_lr_warmup_10", "quantize_default", "ttt_one_gpu"])
def test_times_of_real_records_sum_up(name):
    run = runs_of(RECORDS / f"{name}.json")[0]
    parts, seconds, ended = report.times(run)
    assert ended and sum(parts.values()) == pytest.approx(seconds) and min(parts.values()) > 0
    assert seconds == run.events("finished")[0]["seconds"]


def test_bytes_sum_up(three):
    shares = report.byte_shares(runs_of(three[0][0])[0])
    assert shares == {"embedding": 9_000, "attention q": 10_500, "attention k": 2_000, "attention v": 2_500,
                      "attention out": 5_000, "MLP up": 9_000, "MLP down": 10_000, "rest": 2_000, "code": 6_000}
    assert sum(shares.values()) == FIGURES["size"]["total_bytes"]
    assert report.byte_shares(runs_of(three[0][2])[0]) == {}


def test_bytes_with_a_saving_coder_and_unknown_names(tmp_path):
    def edit(record):
        record["results"]["size"]["artifact_bytes"] = 40_000
        record["events"].append(dict(event="matrix", name="blocks.0.new.role", bytes=500))

    run = runs_of(change(make(tmp_path), "other", edit))[0]
    shares = report.byte_shares(run)
    assert shares["rest"] == 40_000 - 48_500 and shares["other matrices"] == 500
    assert report.bytes_section([run]).picture.text.count("rest -8,500") == 1


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_schedule_of_an_untimed_run_is_that_of_training(tmp_path):
    schedules = dict(TRAIN_SEQ_LEN=256, TRAIN_SEQ_SCHEDULE="128@0.5,256@1.0", SEQ_CHANGE_WARMUP_STEPS=4)
    event, s = dict(event="context", step=21, progress=0.525, tokens=256), synthetic.tiny(tmp_path, ITERATIONS=40, **schedules)
    path = change(make(tmp_path, **schedules), "grown", lambda record: record["events"].append(event))
    found = report.schedule(runs_of(path)[0])
    assert len(found.progress) == 40 and np.flatnonzero(found.recorded).tolist() == [0, 1, 2, 3, 4, 9, 19, 29, 39]
    for step, progress in enumerate(np.arange(40) / 40):
        changed = 21 if step >= 21 else 0
        assert found.progress[step] == progress and found.context[step] == g.schedule(progress, 0, 0, s).context == (128, 256)[step > 20]
        assert found.multiplier[step] == g.schedule(progress, step, changed, s).lr_factor


def test_schedule_of_a_timed_run_changes_where_the_record_says():
    run = runs_of(RECORDS / "mini_pr2140_240s.json")[0]
    found = report.schedule(run)
    assert len(found.context) == run.figure("training", "steps") == 452
    assert (np.flatnonzero(np.diff(found.context)) + 1).tolist() == [event["step"] for event in run.events("context")]
    looping = run.events("looping")[0]
    assert found.progress[looping["step"]] == looping["progress"] and found.progress[0] == 0 < 0.99 < found.progress[-1] <= 1
    assert np.all(np.diff(found.progress) >= 0) and found.multiplier[-1] == run.settings["min_lr"]
    assert found.multiplier[62] == pytest.approx(1 / 32) and found.multiplier[61] == 1


def test_schedule_under_a_cap_follows_the_clock(tmp_path):
    path = make(tmp_path, WARMDOWN_FRAC=0.5, MIN_LR=0)
    assert report.schedule(runs_of(path)[0]).multiplier == pytest.approx([min(1, (40 - step) / 20) for step in range(40)])
    timed = change(path, "timed", lambda record: record["settings"].update(max_wallclock_seconds=20.5))
    found = report.schedule(runs_of(timed)[0])  # half a second a step: 41 steps in all
    assert np.allclose(found.progress, np.arange(40) / 41, atol=0.01) and found.multiplier[0] == 1
    assert np.allclose(found.multiplier[25:], (41 - np.arange(25, 40)) / 20.5, atol=0.03)


@pytest.mark.parametrize("edit, why", [
    (lambda record: record["settings"].pop("warmdown_frac"), "settings of another version"),
    (lambda record: record["settings"].update(iterations="many"), "settings of another version"),
    (lambda record: record["settings"].update(train_seq_schedule=7), "settings of another version"),
    (lambda record: record["settings"].update(train_seq_schedule="often"), "settings of another version"),
    (lambda record: record["settings"].update(lr_warmup_steps=10), "settings of another version"),
    (lambda record: record["settings"].update(max_wallclock_seconds=1.0, gptq_reserve_seconds=2.0)
     or record["events"].remove(next(e for e in record["events"] if e["event"] == "warmup")), "no time to train"),
    (lambda record: record.update(events=[]), "no steps")])
def test_schedule_that_cannot_be_computed_says_why(tmp_path, edit, why):
    run = runs_of(change(make(tmp_path), "odd", edit))[0]
    section = report.schedule_section([run])
    assert section.picture is None and section.lost == {run.label: why}


def test_schedule_without_pytorch(three, monkeypatch):
    monkeypatch.setitem(report.sys.modules, "torch", None)
    monkeypatch.delitem(report.sys.modules, "train_gpt")
    assert report.schedule(runs_of(three[0][0])[0]) == "train_gpt.py needs torch"


# --- Seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_side_by_side(tmp_path):
    shifts = {42: 0.0, 0: 0.004, 1234: -0.001}
    paths = [make(tmp_path, f"seed_{seed}", shift=shift, SEED=seed) for seed, shift in shifts.items()]
    other = make(tmp_path, "other", SEED=7, MATRIX_LR=0.03)
    assert [[run.label for run in group] for group in report.seed_groups(runs_of(*paths, other))] == [
        ["seed_42", "seed_0", "seed_1234"]]
    page = build([*paths, other], tmp_path / "report")
    table = page.rows[f"table {len(page.rows) - 1}"]
    values = [FIGURES["raw"]["val_bpb"] + shift for shift in shifts.values()]
    assert table[1] == ["raw", *map(repr, values), repr(statistics.mean(values)), repr(statistics.stdev(values))]
    assert table[0][1:] == ["seed_42seed 42", "seed_0seed 0", "seed_1234seed 1234", "mean", "standard deviation"]
    assert len(table) == 6 and (tmp_path / "report" / "report_seeds.png").exists()


def test_repeats_of_one_seed_are_no_seeds(tmp_path):
    first = make(tmp_path, "first", SEED=1)
    assert report.seed_groups(runs_of(first, make(tmp_path, "again", SEED=1))) == []
    second = make(tmp_path, "second", SEED=2)
    moved = change(second, "moved", lambda record: record["machine"].update(device="another"))
    note = report.seeds_section(runs_of(first, moved)).note
    assert "first, second differ in machine too" in note


# --- The page ---------------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_accessible(three):
    out = three[1]
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.of("html") == [{"lang": "en"}] and page.text["title"] == "3 runs: run report"
    assert not re.findall(r"https?:|//[\w.]+/|url\(|@import|<link", re.sub(r"base64,[\w+/=]+", "", text))
    images = page.of("img")
    assert len(images) == 5 and all(len(image["alt"]) > 60 for image in images)
    assert {"viewport"} < {tag.get("name") for tag in page.of("meta")}
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))
    beside = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert sorted(beside) == [f"report_{name}.png" for name in ("bpb", "bytes", "loss", "schedule", "time")]
    assert {base64.b64decode(image["src"].partition("base64,")[2]) for image in images} == set(beside.values())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {link["href"][1:] for link in page.of("a")} < set(ids)
    assert "prefers-color-scheme: dark" in text and "killed (no val_bpb)" not in text
    assert "Left out: killed (no matrices recorded)." in page.text["p"]
    assert "No two records share all settings but the seed." in page.text["p"]


def test_policy_admits_the_pages_own_script_alone(three):
    page = Page((three[1] / "report.html").read_text())
    policy = next(tag["content"] for tag in page.of("meta") if "http-equiv" in tag)
    digest = base64.b64encode(hashlib.sha256(page.text["script"].encode()).digest()).decode()
    assert len(page.of("script")) == 1 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_same_records_same_page(three, tmp_path):
    build(three[0], tmp_path / "again")
    for path in three[1].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_legend_names_runs_only_where_there_are_several(three):
    runs = runs_of(*three[0])
    for shown, count in ((runs, 3), (runs[:1], 0)):
        legends = report.draw_loss(shown, (0, 5), False).legends
        assert [text.get_text().strip() for legend in legends for text in legend.texts] == [
            run.label for run in shown][:count]
    assert len({(report.Run(Path(), {}, n).colour, report.Run(Path(), {}, n).dash) for n in range(28)}) == 28


def test_markup_in_a_record_stays_text(three, tmp_path):
    evil = '<b>$x_1$ & "q"</b><script>alert(1)</script>\n\u0000'

    def edit(record):
        record["run_id"] = record["started"] = record["settings"]["seed"] = record["status"] = evil
        record["machine"]["device"] = evil + "x" * 500
        for event in record["events"]:
            if event["event"] == "matrix":
                event["name"] = evil

    paths = [change(three[0][0], f"evil_{n}", edit) for n in range(2)]
    page = build(paths, tmp_path / "report")
    assert not page.of("b") and len(page.of("script")) == 1 and page.of("img")[0].keys() == {"src", "width", "height", "alt"}
    shown = '<b>$x_1$ & "q"</b><script>alert(1)</script>'
    assert page.summary()["run"] == [f"{shown} (evil_{n})" for n in range(2)] and page.summary()["status"] == [shown] * 2
    for path in paths:
        path.unlink()


def test_older_records(tmp_path):
    names = "first150_softcap_lr", "mini_record_lr_warmup_10", "quantize_default"
    page = build([RECORDS / f"{name}.json" for name in names], tmp_path / "report")
    rows = page.summary()
    assert rows["training seconds"] == ["61.984", "267.336", report.LOST]
    assert rows["val_bpb quantized"] == [report.LOST, "1.30326141", "1.26836704"]
    assert rows["tokens/s looping"] == [report.LOST, "636335", report.LOST]
    assert "quantize_default (no training steps)" in page.text["p"]


@pytest.mark.parametrize("record", [
    dict(settings={}, events=[]), dict(run_id=None, status="failed", settings={}, events=[], results=None, machine=None),
    dict(run_id="r", status="running", settings={"seed": [1]}, results={"ttt": 3, "raw": {"val_bpb": "nan"}},
         events=[3, {}, {"event": "step"}, {"event": "step", "step": 1, "seconds": "x"}, {"event": "matrix", "bytes": None}])])
def test_records_with_next_to_nothing(tmp_path, record):
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(record))
    page = build([path], tmp_path / "report")
    assert not page.of("img") and page.text["p"].count("No ") >= 5


def test_losses_that_are_not_finite_are_counted(tmp_path):
    def edit(record):
        for event in record["events"]:
            if event.get("step") in (30, 40):
                event["train_loss"] = "nan"

    run = runs_of(change(make(tmp_path), "wild", edit))[0]
    assert "tiny: 2 recorded losses are not finite" in report.loss_section([run]).note


@pytest.mark.parametrize("seed", range(3))
def test_damaged_records_give_a_page(tmp_path, seed):
    """Values anywhere in a record are replaced or removed: a page comes out, or one line of bad input."""
    draw = random.Random(seed)
    record = json.loads((RECORDS / "mini_pr2140_240s.json").read_text())
    odd = None, "nan", -1, 0, 1e300, [], {}, True, "<i>", 10 ** 30, 2.5

    def damage(value, rate):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            if isinstance(value[key], (dict, list)):
                damage(value[key], rate)
            elif draw.random() < rate:
                value[key] = draw.choice(odd)

    for part, rate in (("settings", 0.02), ("results", 0.2), ("events", 0.2), ("machine", 0.5)):
        damage(record[part], rate)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(record))
    assert build([path], tmp_path / "report").summary()["run"] == ["mini_pr2140_240s"]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_folders_and_defaults(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    shutil.copy(make(tmp_path), tmp_path / "logs" / "tiny.json")
    (tmp_path / "logs" / "figures.json").write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    for name in "report_seeds.png", "mine.txt", "report.html":
        (tmp_path / "report" / name).write_text("old")
    assert report.main([]) == 0
    assert capsys.readouterr().out.startswith("report/report.html: 1 run, ")
    assert "1 other JSON file beside them left out." in (tmp_path / "report" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["mine.txt", "report.html"] + [
        f"report_{name}.png" for name in ("bpb", "bytes", "loss", "schedule", "time")]
    assert len(runs_of(tmp_path / "logs", tmp_path / "logs" / "tiny.json", tmp_path / "logs" / ".." / "logs")) == 1


def test_labels_are_unique(tmp_path):
    path = make(tmp_path)
    (tmp_path / "b").mkdir()
    copies = [change(path, "copy", lambda record: None), tmp_path / "b" / "copy.json"]
    shutil.copy(path, copies[1])
    assert [run.label for run in runs_of(path, *copies)] == ["tiny (tiny)", "tiny (copy) #2", "tiny (copy) #3"]


@pytest.mark.parametrize("content, remedy", [
    (None, "name run records"), ("{\"settings\": {", "remove it or copy it again"), ("\xff\xfe", "copy it again"),
    ("[" * 100_000, "copy it again"), ("[]", "no run record"), ("{\"settings\": {}}", "no run record"),
    ("9" * 5000, "copy it again")])
def test_bad_input_is_one_line_and_leaves_the_report_alone(three, tmp_path, capsys, content, remedy):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.html").write_text("old")
    assert report.main([str(three[0][0]), str(path), "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"report.py: {path}: ") and remedy in line
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("report.html", "old")]


def test_folder_without_records_and_unwritable_places(three, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    record = str(three[0][0])
    for arguments, named in (([str(tmp_path / "empty")], "empty"), ([record, "--out", str(tmp_path / "file")], "file"),
                             ([record, "--out", str(tmp_path / "file" / "deeper")], "file")):
        assert report.main(arguments) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"{tmp_path}/{named}" in line and ("choose" in line or "name .json" in line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_failure_while_writing_leaves_the_old_report(three, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "report", Path.write_bytes
    build(three[0][:1], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path, data):
        if path.name == "report.html":
            raise OSError(28, "No space left on device", str(path))
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert report.main([*map(str, three[0]), "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_matplotlib(three, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(report.sys.modules, "matplotlib", None)
    assert report.main([str(three[0][0]), "--out", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == "report.py: matplotlib is missing; install it with: python -m pip install matplotlib\n"
    assert not (tmp_path / "report").exists()


def test_figures_are_drawn_with_matplotlibs_defaults(three, tmp_path):
    import matplotlib

    matplotlib.rcParams["font.size"] = 31
    try:
        build(three[0][:1], tmp_path / "large")
    finally:
        matplotlib.rcdefaults()
    build(three[0][:1], tmp_path / "usual")
    for path in (tmp_path / "usual").iterdir():
        assert path.read_bytes() == (tmp_path / "large" / path.name).read_bytes()


# --- In a browser -----------------------------------------------------------------------------------------------------


def browse(tmp_path: Path, page: Path, *options: str) -> str:
    """What Chromium prints about the page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("needs chromium, chromium-browser or google-chrome on PATH")
    profile = tmp_path / f"profile_{len(list(tmp_path.iterdir()))}"
    return subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True).stdout


def test_browser_decodes_every_image(three, tmp_path):
    dom = browse(tmp_path, three[1] / "report.html", "--window-size=1600,1000", "--dump-dom")
    body = re.search(r"<body[^>]*>", dom).group()
    assert 'data-images="5"' in body and 'data-overflow="0"' in body


@pytest.mark.parametrize("width", [360, 400])
def test_narrow_page_does_not_scroll_sideways(three, tmp_path, width):
    """In a frame: Chromium's own window is never narrower than 500 pixels."""
    long = change(three[0][0], "long", lambda record: record.update(run_id="a_name_without_any_blank_" * 6))
    build([*three[0], long], tmp_path / "report")
    long.unlink()
    frame = tmp_path / "frame.html"
    text = html.escape((tmp_path / "report" / "report.html").read_text())
    frame.write_text(f"""<!doctype html><iframe width={width} height=900 style="border:0" srcdoc="{text}"></iframe><script>
        addEventListener("load", () => {{ const page = document.querySelector("iframe").contentDocument
        document.body.dataset.found = [page.body.dataset.images, page.body.dataset.overflow,
          page.documentElement.clientWidth, page.images[0].currentSrc === page.images[0].src].join(" ") }})</script>""")
    dom = browse(tmp_path, frame, "--dump-dom")
    assert re.search(r'data-found="([^"]*)"', dom).group(1) == f"5 0 {width} false"  # the last: the narrow drawing is shown


def test_screenshot_is_not_blank(three, tmp_path):
    from matplotlib.image import imread

    browse(tmp_path, three[1] / "report.html", "--window-size=1200,3000", f"--screenshot={tmp_path / 'page.png'}")
    pixels = (imread(tmp_path / "page.png")[..., :3] * 255).round().astype(np.uint32)
    colours, counts = np.unique(pixels @ np.array([65536, 256, 1], np.uint32), return_counts=True)
    assert pixels.shape[:2] == (3000, 1200) and len(colours) > 200 and counts.max() < 0.97 * counts.sum()
    drawn = {int(report.Run(Path(), {}, number).colour[1:], 16) for number in range(3)}
    assert drawn <= set(colours.tolist())


def test_settings_of_this_version_are_known():
    names = {field.name for field in dataclasses.fields(g.Settings)}
    assert names >= {*report.NEEDED, *report.OWN}
    assert g.matrix_roles(synthetic.tiny()).keys() == report.ROLES.keys()


def test_runs_are_named_by_recipe_and_seed_unless_somebody_named_them(tmp_path):
    path = make(tmp_path / "a")
    ids = {"20260430_120001_77": "runs/record", "train_seed42": "/x/runs/record/seed42", "eval_seed7": "", "mine": "runs/record/seed42"}
    copies = [change(path, f"copy{number}", lambda record: (record.update(run_id=run_id), record["settings"].update(
        seed=42, artifact_dir=folder))) for number, (run_id, folder) in enumerate(ids.items())]
    assert [run.label for run in runs_of(*copies)] == ["record, seed 42 (copy0)", "record, seed 42 (copy1)", "eval_seed7", "mine"]
    assert [run.label for run in runs_of(*copies[1:])] == ["record, seed 42", "eval_seed7", "mine"]


def test_first_table_shows_what_differs(tmp_path):
    one = make(tmp_path / "a")
    two = change(one, "two", lambda record: record["settings"].update(seed=7, matrix_lr="<0.5>", run_id="b", artifact_dir="b"))
    text, _ = report.page(runs_of(one, two), 0)
    first = text[text.index("<table>"):text.index("</table>")]
    assert re.findall(r'<th scope="row">(\w+)</th>', first) == ["matrix_lr", "seed"] and "&lt;0.5&gt;" in first
    same, _ = report.page(runs_of(one, change(one, "same", lambda record: None)), 0)
    assert "All settings are the same." in same and "What differs" not in report.page(runs_of(one), 0)[0]
