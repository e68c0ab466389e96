"""verify_submission.py on folders of every kind: one small folder for each trap, and folders drawn from a description."""
import base64
import hashlib
import json
import lzma
import random
import time
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import verify_submission as v

SEEDS = (0, 42, 314)
LOG = """Hyperparameters:
  max_wallclock_seconds: 600.0
  seed: {seed}
{settings}val_tokens: 47853343
4000/20000 train_loss: 2.4 train_time: 8.0m tok/s: 8000000
stopping_early: wallclock_cap train_time: {train}ms step: 4900/20000
{code_line}: {code} bytes
Serialized model quantized+brotli: {artifact} bytes
Total submission size quantized+brotli: {total} bytes
{middle}quantized_ttt_phased val_loss:2.32000000 val_bpb:1.06000000 eval_time:{evaluation}ms
total_eval_time:{rounded:.1f}s
{end}"""


def log(seed, artifact=15_900_000, code=30_000, evaluation=500_000, train=596_000, **texts) -> str:
    values = dict(settings="", middle="", end="", code_line="Code size (compressed)") | texts
    return LOG.format(seed=seed, artifact=artifact, code=code, total=artifact + code, train=train, evaluation=evaluation,
                      rounded=evaluation / 1000, **values)


def write(folder, *, submission=None, files=(), kind="train", **changes):
    """A folder with a log for each seed, submission.json and other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        (folder / f"{kind}_seed{seed}.log").write_text(log(seed, **changes))
    if submission is not None:
        (folder / "submission.json").write_text(json.dumps({"seeds": SEEDS} | submission))
    for name, data in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def failing(folder) -> dict[str, str]:
    """The details of what fails, by check."""
    found = [item for item in v.audit(folder) if item["verdict"] == v.FAIL]
    return {item["check"]: " / ".join(x["detail"] for x in found if x["check"] == item["check"]) for item in found}


def verdicts(folder, check) -> set[str]:
    return {item["verdict"] for item in v.audit(folder) if item["check"] == check}


def details(folder, check) -> str:
    return " / ".join(item["detail"] for item in v.audit(folder) if item["check"] == check)


# --- One folder for each trap


def test_long_texts_are_no_paths(tmp_path):
    against = {"comparison": {"against": "the merged leader " * 20, "p": 0.01}}
    assert failing(write(tmp_path / "against", submission=against)) == {}
    script = f"x = '{'a' * 300}.json'\n".encode()
    folder = write(tmp_path / "const", code=len(script), files={"train_gpt.py": script})
    assert verdicts(folder, "code") == {v.PASS}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_marks_and_wide_characters(tmp_path, encoding):
    folder = write(tmp_path / "a", submission={"val_bpb": 1.06})
    for path in folder.iterdir():
        path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    assert failing(folder) == {} and verdicts(folder, "submission.json") == {v.PASS}
    assert "59" in details(folder, "training seconds")


def test_score_lines_alone_are_a_log(tmp_path):
    for seed in SEEDS:
        (tmp_path / f"train_seed{seed}.log").write_text("final_int8_zlib_roundtrip_exact val_loss:1.979152 val_bpb:1.172165\n")
    assert failing(tmp_path) == {}
    (tmp_path / "submission.json").write_text(json.dumps({"seeds": SEEDS, "val_bpb": 1.172165}))
    assert verdicts(tmp_path, "submission.json") == {v.PASS}


@pytest.mark.parametrize("script, verdict", [
    ("import json\njson.dump({}, open('summary.json', 'w'))\n", v.PASS),
    ("path = 'summary.json'\nwith open(path, mode='wb') as f:\n    f.write(b'')\n", v.PASS),
    ("from pathlib import Path\nPath('summary.json').write_text('x')\n", v.PASS),
    ("import json\njson.load(open('summary.json'))\n", v.FAIL),
    ("path = 'summary.json'\nopen(path, 'w').write(open(path).read())\n", v.FAIL),
])
def test_what_a_script_writes_is_not_what_it_needs(tmp_path, script, verdict):
    folder = write(tmp_path / "a", code=len(script), files={"train_gpt.py": script, "summary.json": "{}"})
    assert verdicts(folder, "code") == {verdict}


def test_shipped_packed_script_counts_if_it_is_the_one_that_fits(tmp_path):
    files = {"train_gpt.py": b"print('packed')\n"}
    large = dict(artifact=15_970_000, code=86_046, code_line="Code size", files=files)
    folder = write(tmp_path / "a", submission={"bytes_total": 15_970_016}, **large)
    assert failing(folder) == {} and "15,970,016" in details(folder, "bytes") and "16,056,046" in details(folder, "bytes")
    assert "bytes" in failing(write(tmp_path / "silent", submission={}, **large))
    assert "submission.json" in failing(write(tmp_path / "wrong", submission={"bytes_total": 15_970_017}, **large))


def test_reruns_with_other_settings_lie_beside(tmp_path):
    folder = write(tmp_path, submission={"rerun": {"gptq_reserve_seconds": 8.0}, "gptq_reserve_seconds": 0.5},
                   settings="  gptq_reserve_seconds: 0.5\n")
    write(tmp_path, kind="rerun", settings="  gptq_reserve_seconds: 8.0\n", evaluation=400_000)
    assert failing(folder) == {} and "other settings" in details(folder, "same code, settings")
    (folder / "submission.json").write_text(json.dumps({"seeds": SEEDS, "eval_time": 400.0, "gptq_reserve_seconds": 0.5}))
    assert set(failing(folder)) == {"submission.json"}  # one figure of each group
    (folder / "submission.json").write_text(json.dumps({"seeds": SEEDS, "eval_time": 400.0, "gptq_reserve_seconds": 8.0}))
    assert failing(folder) == {}


def test_figures_by_seed_are_compared(tmp_path):
    for name in ("val_bpb_by_seed", "val_bpb", "bpb_per_seed"):
        right = {name: {str(seed): 1.06 for seed in SEEDS}}
        assert failing(write(tmp_path / "right", submission=right)) == {}
        for values in ({"0": 1.06, "seed_42": 0.5, "314": 1.06}, [1.06, 0.5, 1.06]):
            wrong = write(tmp_path / "wrong", submission={name: values})
            assert set(failing(wrong)) == {"submission.json"} and "its log says" in failing(wrong)["submission.json"]


def raw_lzma(data):
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])


@pytest.mark.parametrize("pack", [
    lambda data: base64.b85encode(raw_lzma(data)), lambda data: base64.b85encode(zlib.compress(data)),
    lambda data: base64.b64encode(zlib.compress(base64.b85encode(raw_lzma(data)))),
    lambda data: base64.b85encode(lzma.compress(base64.b64encode(zlib.compress(raw_lzma(data)))))],
    ids=["raw", "zlib", "b64 zlib b85 raw", "b85 lzma b64 zlib raw"])
def test_packed_code_is_opened_in_any_nesting(tmp_path, pack):
    noise = "\n".join(f"x{i} = '{hashlib.sha256(bytes([i])).hexdigest()[:40]} is noise'" for i in range(120))
    script = b"exec(unpack('%s'))\n" % pack(f"import helper\n{noise}\n".encode())
    files = {"train_gpt.py": script, "helper.py": "x = 1\n"}
    assert "helper.py (6)" in failing(write(tmp_path / "a", code=len(script), files=files))["code"]
    files = {"train_gpt.py": script, "other.py": "x = 1\n"}
    assert verdicts(write(tmp_path / "b", code=len(script), files=files), "code") == {v.PASS}


BASELINE = """seed:1337
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
step:1/20000 train_loss:6.9 train_time:60ms step_avg:60ms
step:500/20000 val_loss:2.9 val_bpb:1.9 train_time:21000ms step_avg:42ms
step:13780/20000 train_loss:2.0 train_time:{train}ms step_avg:43.5ms
stopping_early: wallclock_cap train_time:{train}ms step:13780/20000
Serialized model: 67224983 bytes
Code size: 9 bytes
Total submission size: 67224992 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15815856 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""


def test_baseline(tmp_path):
    (tmp_path / "train.log").write_text(BASELINE.format(train=599_938))
    (tmp_path / "submission.json").write_text(json.dumps(dict(val_bpb=1.2243657, val_loss=2.07269931, bytes_total=15815856)))
    assert set(failing(tmp_path)) == {"seeds"} and failing(tmp_path)["seeds"] == "1 seeds, 3 are needed"
    assert {item["seed"] for item in v.audit(tmp_path)} <= {1337, None}
    for check in ("submission.json", "bytes", "training seconds", "evaluation seconds"):
        assert verdicts(tmp_path, check) == {v.PASS}, check
    (tmp_path / "train.log").write_text(BASELINE.format(train=600_038))  # less than a step late
    assert verdicts(tmp_path, "training seconds") == {v.UNKNOWN}
    (tmp_path / "train.log").write_text(BASELINE.format(train=600_138))
    assert verdicts(tmp_path, "training seconds") == {v.FAIL}


@pytest.mark.parametrize("label", ["quantized_sliding_window", "final_int6_sliding_window_exact", "legal_ttt", "ngram_mixture",
                                   "diagnostic post_ema", "final_int8_zlib_roundtrip", "[rank0] DIAGNOSTIC post-EMA"])
def test_every_labelled_line_is_a_score(tmp_path, label):
    folder = write(tmp_path, submission={"val_bpb": 1.08, "eval_time_s": 1400})
    for path in folder.glob("*.log"):
        head, _, _ = path.read_text().partition("quantized_ttt")
        path.write_text(f"{head}{label} val_loss:2.79 val_bpb:1.08000000 eval_time:1400000ms\n")
    assert set(failing(folder)) == {"evaluation seconds"} and "1400.000 s" in failing(folder)["evaluation seconds"]


def test_loss_that_is_no_number_in_lines_without_a_name_for_the_step(tmp_path):
    folder = write(tmp_path)
    path = folder / "train_seed42.log"
    path.write_text(path.read_text().replace("train_loss: 2.4", "train_loss: nan"))
    assert set(failing(folder)) == {"finite figures"}


def test_units_limits_and_rounded_maxima(tmp_path):
    right = {"seed_results": {str(s): {"step_avg_ms": 121.3, "eval_time_s": 499.96} for s in SEEDS}, "eval_time_s_max": 500.0,
             "max_wallclock_seconds": 600, "time_limit_seconds": 600, "eval_budget_s": 600}
    assert failing(write(tmp_path / "right", submission=right, evaluation=499_960)) == {}
    wrong = {"seed_results": {str(seed): {"step_avg_ms": 240.0} for seed in SEEDS}}
    assert set(failing(write(tmp_path / "average", submission=wrong))) == {"submission.json"}
    assert set(failing(write(tmp_path / "max", submission={"eval_time_s_max": 499.0}))) == {"submission.json"}


def test_logs_at_any_depth_count(tmp_path):
    rows = {str(seed): {"val_bpb": 1.055, "eval_time_ms": 640_000} for seed in SEEDS}
    folder = write(tmp_path, submission={"val_bpb": 1.055, "seed_results": rows})
    for seed in SEEDS:
        place = folder / "final" / "eval"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"seed_{seed}.log").write_text(f"Hyperparameters:\n  max_wallclock_seconds: 600.0\n  seed: {seed}\n"
                                                "quantized_ttt_phased val_loss:2.31 val_bpb:1.05500000 eval_time:640000ms\n")
    assert set(failing(folder)) == {"evaluation seconds"} and "640.000 s" in failing(folder)["evaluation seconds"]


def test_only_the_block_is_settings_and_blanks_are_none(tmp_path):
    folder = write(tmp_path / "a", settings="  midrun_cap_schedule:\n", end="Quantized weights:\n  gate_int8_row: blocks\n")
    path = folder / "train_seed42.log"
    path.write_text(path.read_text().replace("schedule:", "schedule:  ").replace("  gate_int8_row: blocks", "def f(\n    x: int"))
    assert failing(folder) == {} and verdicts(folder, "same code, settings") == {v.PASS}


def test_no_settings_are_no_equal_settings(tmp_path):
    for seed in SEEDS:
        (tmp_path / f"train_seed{seed}.log").write_text(f"def f(\n    x: int,\n):\nseed:{seed} lr:0.{seed}\n"
                                                        "quantized_ttt val_loss:2.3 val_bpb:1.06 eval_time:1000ms\n")
    assert verdicts(tmp_path, "same code, settings") == {v.UNKNOWN} and failing(tmp_path) == {}


@pytest.mark.parametrize("line", ["step:1/2 " * 12_000, "a" * 300_000, "a:" * 100_000, "val_bpb:" * 40_000, "x=1," * 80_000,
                                  "collected " * 30_000, "code size " * 30_000, "settings A:" + "(" * 200_000, "1" * 300_000,
                                  " " * 300_000, "hints precompute begin timer " * 9_000, "train_loss:9 " * 20_000])
def test_reading_is_linear_in_the_length_of_a_line(line):
    def seconds(text):
        began = time.process_time()
        v.read_log(text + "\nfinal val_bpb:1.06\n", "a.log")
        return time.process_time() - began

    half = min(seconds(line[:len(line) // 2]) for _ in range(2))
    assert min(seconds(line) for _ in range(2)) < 4 * half + 0.1


def test_every_evaluation_is_capped(tmp_path):
    folder = write(tmp_path / "seedless", files={"evaluation.log": "quantized_ttt_phased val_loss:2.32 val_bpb:1.06 "
                                                                   "eval_time:1274666ms\n"})
    assert set(failing(folder)) == {"evaluation seconds"}
    first = "quantized_ttt_phased val_loss:2.32000000 val_bpb:1.06000000 eval_time:700000ms\ntotal_eval_time:700.0s\n"
    assert set(failing(write(tmp_path / "first", middle=first))) == {"evaluation seconds"}


@pytest.mark.parametrize("setting, middle", [
    ("val_doc_fraction: 0.1", ""), ("eval_max_docs: 5000", ""), ("max_val_tokens: 1000000", ""),
    ("x: 1", "ttt_phased: total_docs:5000 prefix_docs:10 suffix_docs:4990\n")])
def test_a_part_of_the_text_is_not_the_text(tmp_path, setting, middle):
    assert set(failing(write(tmp_path, settings=f"  {setting}\n", middle=middle))) == {"all targets scored"}


@pytest.mark.parametrize("setting", ["val_doc_fraction: 1.0", "eval_max_docs: 0", "ttt_eval_batches: 7", "eval_seq_len: 2560"])
def test_the_whole_text_is_the_text(tmp_path, setting):
    assert verdicts(write(tmp_path, settings=f"  {setting}\n"), "all targets scored") == {v.PASS}


HINTS = "ngram_tilt:hints total=47853343 gated=5 within_gate=0 word_gate=0 agree2plus=0\n"
DONE = "ngram_tilt:precompute_done elapsed=147.0s total_targets=47853343\n"
TIMER = "beginning TTT eval timer\n"


@pytest.mark.parametrize("middle, verdict", [(HINTS + DONE + TIMER, v.FAIL), (TIMER + HINTS + DONE, v.PASS),
                                             (DONE + TIMER + HINTS, v.FAIL), (TIMER + DONE, v.PASS)])
@pytest.mark.parametrize("outside", [False, True])
def test_order_of_lines_beats_settings(tmp_path, middle, verdict, outside):
    text = f"  ngram_tilt_enabled: True\n  ngram_hint_precompute_outside: {outside}\n"
    assert verdicts(write(tmp_path, settings=text, middle=middle), "hints inside timer") == {verdict}


def test_calibration_after_the_end_is_added(tmp_path):
    collected = "GPTQ:collected 67 Hessians in 13.1s\n"
    assert "613.09 s" in failing(write(tmp_path / "a", train=599_990, middle=collected))["training seconds"]
    assert failing(write(tmp_path / "b", train=586_000, middle=collected)) == {}


@pytest.mark.parametrize("ranges, verdict", [(["5000-97113", "4100-5000", "60-64"], v.FAIL), (["60-64", "4100-5000"], v.FAIL),
                                             (["60-64", "4100-5000", "70-90"], v.UNKNOWN), (["60-64"], v.UNKNOWN)])
def test_order_of_documents_is_read(tmp_path, ranges, verdict):
    lines = "".join(f"ttp: b{n}/782 bl:2.3 bb:1.06 rl:2.3 rb:1.06 dl:{text} gd:0\n" for n, text in enumerate(ranges))
    assert verdicts(write(tmp_path, middle=lines), "decodable order") == {verdict}


def test_several_runs_in_one_file_are_told_apart(tmp_path):
    (tmp_path / "all.log").write_text("".join(log(seed) for seed in SEEDS))
    (tmp_path / "submission.json").write_text(json.dumps({"seeds": SEEDS, "val_bpb": 1.06, "steps": 4900}))
    assert failing(tmp_path) == {} and verdicts(tmp_path, "seeds") == {v.PASS}


def test_one_summary_line_for_what_no_foreign_log_can_answer(tmp_path, capsys):
    assert v.main([str(write(tmp_path / "a", submission={}))]) == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if "run record" in line]
    assert len(lines) == 1 and all(name in lines[0] for name in ("record and log agree", "data", "settings act"))
    assert all("would decide" in item["detail"] or "needs" in item["detail"] for item in v.audit(tmp_path / "a")
               if item["verdict"] == v.UNKNOWN)


# --- Several folders


def test_two_folders_side_by_side(tmp_path, capsys):
    one = write(tmp_path / "one", settings="  lr: 0.1\n  beta: 0.9\n")
    two = write(tmp_path / "two", settings="  lr: 0.2\n  beta: 0.9\n", evaluation=550_000)
    assert v.main(["--compare", str(one), str(two)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.split("\n")]
    assert ["lr", "0.1", "0.2"] in rows and ["eval_seconds", "500", "550"] in rows and ["val_bpb", "1.06", "1.06"] in rows
    assert not any(row[:1] == ["beta"] for row in rows)
    assert v.main(["--compare", str(one)]) == 2


def test_leaderboard(tmp_path, capsys):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", artifact=15_990_000)
    for path in two.glob("*.log"):
        path.write_text(path.read_text().replace("1.06000000", "1.05000000"))
    assert v.main(["--table", str(one), str(tmp_path / "none"), str(two)]) == 0
    head, *rows = capsys.readouterr().out.strip().split("\n")
    assert [row.split()[-1] for row in rows[:2]] == [str(two), str(one)] and "no such folder" in rows[2]
    assert rows[0].split()[:3] == ["1.05000000", "3", "16,020,000"] and int(rows[0].split()[-3]) == 3  # FAIL of bytes


# --- Folders from a description


class Described:
    """A sound folder of either dialect; a fault changes it before it is written."""

    def __init__(self, rng: random.Random, dialect: str, seeds: list[int]):
        self.rng, self.dialect, self.seeds, self.faulty = rng, dialect, seeds, rng.choice(seeds)
        self.label = rng.choice(["quantized_ttt_phased", "final_int6_sliding_window", "legal_ttt", "final_int8_zlib_roundtrip"])
        self.settings = {seed: dict(matrix_lr=0.02, num_layers=11, max_wallclock_seconds=600.0) for seed in seeds}
        self.figures = {seed: dict(val_bpb=round(rng.uniform(1.05, 1.07), 8), val_loss=round(rng.uniform(2.2, 2.4), 8),
                                   eval_seconds=round(rng.uniform(300, 590), 3), steps=rng.randint(4000, 5000),
                                   train_seconds=round(rng.uniform(560, 590), 3), artifact_bytes=rng.randint(15_800_000, 15_900_000),
                                   total_bytes=0, targets=47_853_343, losses=[9.01, 2.5], inside=True, decodable=True, finished=True)
                        for seed in seeds}
        self.script, self.helper = b"import json\nprint('a script')\n", False
        self.code_bytes = len(self.script)
        self.doctored = None

    def fault(self, name: str) -> str:
        """Break it; returns the check that has to fail."""
        figures, settings = self.figures[self.faulty], self.settings[self.faulty]
        if name == "evaluation over its cap":
            figures["eval_seconds"] = 600.5
            return "evaluation seconds"
        if name == "training over its cap":
            figures["train_seconds"] = 601.5
            return "training seconds"
        if name == "artifact over the cap":
            figures["artifact_bytes"] = 15_999_990
            return "bytes"
        if name == "bytes that do not add up":
            figures["total_bytes"] = figures["artifact_bytes"] + self.code_bytes + 1
            return "bytes"
        if name == "another setting":
            settings["matrix_lr"] = 0.021
            return "same code, settings"
        if name == "tail of the text cut":
            for every in self.figures.values():
                every["targets"] -= 1823
            return "all targets scored"
        if name == "hints outside the timer":
            figures["inside"] = False
            return "hints inside timer"
        if name == "documents by length":
            figures["decodable"] = False
            return "decodable order"
        if name == "a loss that is no number":
            figures["losses"] = [9.01, "nan"]
            return "finite figures"
        if name == "a run without its end":
            figures["finished"] = False
            return "seeds"
        if name == "a helper that is not counted":
            self.helper = True
            self.script = b"import helper\n"
            self.code_bytes = len(self.script)
            return "code"
        self.doctored = name  # of submission.json
        return "submission.json"

    def write(self, folder):
        folder.mkdir()
        rows = {}
        for seed in self.seeds:
            figures = self.figures[seed]
            figures["total_bytes"] = figures["total_bytes"] or figures["artifact_bytes"] + self.code_bytes
            text = self.ours(seed, figures, folder) if self.dialect == "ours" else self.challenge(seed, figures)
            encoding = self.rng.choice(["utf-8", "utf-8-sig", "utf-16"]) if self.dialect != "ours" else "utf-8"
            (folder / f"train_seed{seed}.log").write_bytes(text.encode(encoding))
            names = ("val_bpb", "eval_seconds", "steps", "train_seconds", "artifact_bytes", "total_bytes")
            rows[str(seed)] = {name: figures[name] for name in names if figures["finished"] or name not in names[:2]}
        mean = sum(self.figures[seed]["val_bpb"] for seed in self.seeds) / len(rows)
        submission = dict(seeds=self.seeds, seed_results=rows, val_bpb=round(mean, 8), matrix_lr=0.02,
                          bytes_total=max(row["total_bytes"] for row in rows.values()))
        if len({settings["matrix_lr"] for settings in self.settings.values()}) > 1:
            del submission["matrix_lr"]
        if not all(figures["finished"] for figures in self.figures.values()):
            del submission["val_bpb"]
        if self.doctored == "the mean":
            submission["val_bpb"] = round(mean + self.rng.choice([-1, 1]) * 1e-4, 8)
        elif self.doctored == "the largest total":
            submission["bytes_total"] += 1
        elif self.doctored == "a setting":
            submission["matrix_lr"] = 0.03
        elif self.doctored:
            row = rows[str(self.faulty)]
            row[self.doctored] += 0.01 if self.doctored == "val_bpb" else 1  # more than the digits of a log leave open
        (folder / "submission.json").write_text(json.dumps(submission))
        (folder / "train_gpt.py").write_bytes(self.script)
        if self.helper:
            (folder / "helper.py").write_text("x = 1\n")
        if self.dialect == "ours":
            (folder / "data_manifest.json").write_text(json.dumps(
                dict(splits_disjoint=True, splits=dict(val=dict(tokens=47_853_344, docs=50_000), train=dict(docs=9)))))

    def challenge(self, seed, x) -> str:
        block = "".join(f"  {name}: {value}\n" for name, value in (self.settings[seed] | dict(seed=seed)).items())
        hints = "ngram_tilt:precompute_done elapsed=12.5s total_targets=5\n"
        timer = "beginning TTT eval timer\n"
        lengths = [90, 70, 80] if x["decodable"] else sorted(self.rng.sample(range(20, 99), 3), reverse=True)
        lines = [
            self.rng.choice(["", "W0430 torch.distributed.run\n"]), "Hyperparameters:\n", block, f"val_tokens: {x['targets']}\n",
            f"step:1/20000 train_loss: {x['losses'][0]} train_time: 0.0m\n", f"900/20000 train_loss: {x['losses'][1]} train_time: 1.0m\n",
            f"stopping_early: wallclock_cap train_time: {x['train_seconds'] * 1000:.0f}ms step: {x['steps']}/20000\n",
            f"Serialized model int6+zstd: {x['artifact_bytes']} bytes\n", f"Code size: {self.code_bytes} bytes\n",
            f"Total submission size int6+zstd: {x['total_bytes']} bytes\n", timer + hints if x["inside"] else hints + timer,
            *(f"ttp: b1/9 bl:2.3 dl:{length - 9}-{length} gd:0\n" for length in lengths)]
        score = f"{self.label} val_loss:{x['val_loss']:.8f} val_bpb:{x['val_bpb']:.8f} eval_time:{x['eval_seconds'] * 1000:.0f}ms\n"
        return "".join(lines) + (score if x["finished"] else "")

    def ours(self, seed, x, folder) -> str:
        settings = {name.upper(): value for name, value in self.settings[seed].items()} | dict(SEED=seed, RUN_ID=f"r{seed}")
        score = dict(val_loss=x["val_loss"], val_bpb=x["val_bpb"])
        calibration = 9.5
        events = [
            ("settings", settings), ("machine", dict(device="NVIDIA H100 80GB HBM3", devices=8, python="3.12")),
            ("data", dict(folder="data", train_tokens=70_000_000, val_targets=47_853_343, manifest="data/m.json", train_docs=9,
                          val_docs=50_000, splits_disjoint=True)),
            ("code", dict(sha256=hashlib.sha256(self.script).hexdigest(), packed_bytes=self.code_bytes)),
            ("step", dict(step=1, train_loss=x["losses"][0], grad_norm=2.3)), ("step", dict(step=900, train_loss=x["losses"][1])),
            ("training", dict(steps=x["steps"], seconds=round(x["train_seconds"] - calibration, 3), calibration_seconds=calibration,
                              clock_seconds=x["train_seconds"], cap_seconds=600.0)),
            ("averaged", score | dict(seconds=1.1)),
            ("size", dict(artifact_sha256=hashlib.sha256(bytes([seed % 256])).hexdigest(), artifact_bytes=x["artifact_bytes"],
                          code_bytes=self.code_bytes, total_bytes=x["total_bytes"])),
            ("ttt", score | dict(targets=x["targets"], documents=50_000, whole_text=True, phases=[dict(documents=7, seconds=0.1)],
                                 hints_inside_timer=x["inside"], decodable=x["decodable"], seconds=x["eval_seconds"])),
            ("finished", dict(seconds=1200.5))]
        events = [dict(event=kind, **fields) for kind, fields in (events if x["finished"] else events[:-2])]
        last = {event["event"]: {name: value for name, value in event.items() if name != "event"} for event in events}
        record = dict(status="finished" if x["finished"] else "running", events=events,
                      settings={name.lower(): value for name, value in settings.items()} | dict(ngram_boost=2.6, ttt_enabled=True),
                      results={kind: last[kind] for kind in ("training", "size", "ttt") if kind in last})
        (folder / f"train_seed{seed}.json").write_text(json.dumps(record))
        return "".join(v.event_text(event) + "\nsome words of no event\n" for event in events)


FAULTS = ["evaluation over its cap", "training over its cap", "artifact over the cap", "bytes that do not add up", "another setting",
          "tail of the text cut", "hints outside the timer", "documents by length", "a loss that is no number",
          "a run without its end", "a helper that is not counted", "the mean", "the largest total", "a setting", "val_bpb",
          "eval_seconds", "steps", "train_seconds", "artifact_bytes", "total_bytes"]


@given(seed=st.integers(0, 2**32), dialect=st.sampled_from(["ours", "challenge"]), fault=st.sampled_from([None, *FAULTS]),
       seeds=st.lists(st.integers(0, 9999), min_size=3, max_size=5, unique=True))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_fault_and_only_the_fault_is_found(tmp_path_factory, seed, dialect, fault, seeds):
    described = Described(random.Random(seed), dialect, seeds)
    expected = {described.fault(fault)} if fault else set()
    folder = tmp_path_factory.mktemp("described") / "folder"
    described.write(folder)
    assert set(failing(folder)) == expected, failing(folder)
