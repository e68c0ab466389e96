"""tools/sweep.py: what a list asks for, the queue, what is run again, the table, faults and interrupts."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.synthetic import INHERITED, ROOT, environment, write_corpus

PATH = ROOT / "tools" / "sweep.py"
spec = importlib.util.spec_from_file_location("sweep", PATH)
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

# Stands for train_gpt.py: notes its start, does what STUB says, leaves a record whose score is its rate.
STUB = '''
import json, os, signal, sys, time
from pathlib import Path

folder = Path(os.environ["ARTIFACT_DIR"])
rate = float(os.environ.get("MATRIX_LR", "0.5"))
act = os.environ.get("STUB", "")
with open(os.environ["STARTS"], "a") as file:
    file.write(f"{rate} {os.environ.get('CUDA_VISIBLE_DEVICES') or 'none'} {os.environ.get('WIDTH') or os.environ.get('TOKEN_BACKOFF', '')}\\n")
record = dict(status="running", settings=dict(matrix_lr=rate, width="", deep=3), results={}, events=[])

def save():
    (folder / (os.environ["RUN_ID"] + ".json")).write_text(json.dumps(record))

def end(number, frame):
    record.update(status="failed", events=[dict(event="failed", error="SystemExit: 143")])
    save()
    sys.exit(143)

if act == "refuse":
    print("train_gpt.py: MATRIX_LR: too | large")
    sys.exit(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN if act == "stubborn" else end)
save()
if act == "together":  # ends only when another run is under way beside it
    while len(open(os.environ["STARTS"]).readlines()) < 2:
        time.sleep(0.02)
if act.startswith("add "):
    with open(os.environ["LIST"], "a") as file:
        file.write(act[4:] + "\\n")
if act == "diverge":
    error = "FloatingPointError: loss is nan\\nlower it"
    record.update(status="failed", events=[dict(event="failed", error=error)])
elif act == "half":
    (folder / "run.json").write_text("{")
    sys.exit(0)
elif act in ("wait", "stubborn"):
    time.sleep(60)
else:
    record["results"] = dict(training=dict(steps=1234, seconds=2.0, tokens=2_000_000), raw=dict(val_bpb=rate),
                             averaged=dict(val_bpb=rate / 2))
    record.update(status="finished", events=[dict(event="finished", seconds=3.4)])
save()
'''
HEAD = "GPU | steps | tokens/s | raw | averaged | quantized | final | seconds | note |"


class Place:
    """A folder with a list of runs, the stub and what it noted."""

    def __init__(self, folder: Path):
        self.list = folder / "runs.txt"
        self.out = folder / "out"
        self.starts = folder / "starts.txt"
        self.stub = folder / "stub.py"
        self.stub.write_text(STUB)

    def write(self, *lines: str) -> None:
        self.list.write_text("\n".join(lines) + "\n")

    def started(self) -> list[str]:
        """A line for each start: rate, GPU, width."""
        return self.starts.read_text().splitlines() if self.starts.exists() else []

    def record(self, **settings: str) -> Path:
        return self.out / sweep.name_run(settings, {}) / "run.json"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    made = Place(tmp_path)
    monkeypatch.setattr(sweep, "SCRIPT", made.stub)
    monkeypatch.setattr(sweep, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setenv("STARTS", str(made.starts))
    monkeypatch.setenv("LIST", str(made.list))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return made


def call(place: Place, *options: str) -> int:
    return sweep.main([str(place.list), "--out", str(place.out), *options])


def table_of(output: str) -> list[list[str]]:
    """The cells of the table in what was printed, head and line left out."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# --- What a list asks for


def test_lines_grids_quotes_and_comments(place):
    place.write("# rates", "", "MATRIX_LR=1,2 SEED=0,1  # four", 'STEPS="1@0.5,2@1" EMPTY= SEED=3',
                "SEED=1 MATRIX_LR=2")
    assert sweep.read_runs(place.list, {"BASE": "b"}) == [
        {"BASE": "b", "MATRIX_LR": "1", "SEED": "0"}, {"BASE": "b", "MATRIX_LR": "1", "SEED": "1"},
        {"BASE": "b", "MATRIX_LR": "2", "SEED": "0"}, {"BASE": "b", "MATRIX_LR": "2", "SEED": "1"},
        {"BASE": "b", "STEPS": "1@0.5,2@1", "EMPTY": "", "SEED": "3"}]


def test_a_folder_is_named_by_what_changes_and_by_all_settings():
    one = sweep.name_run({"A": "1", "STEPS": "1@0.5,2@1"}, {"A": "1"})
    assert one.startswith("steps_1_0.5_2_1-")
    assert one == sweep.name_run({"STEPS": "1@0.5,2@1", "A": "1"}, {"A": "1"})
    assert one != sweep.name_run({"A": "2", "STEPS": "1@0.5,2@1"}, {"A": "2"})
    assert sweep.name_run({"A": "1"}, {"A": "1"}).startswith("base-")
    assert len(sweep.name_run({f"NAME{i}": "1" for i in range(99)}, {})) < 100


@pytest.mark.parametrize("line, complaint", [
    ("MATRIX_LR", "cannot read 'MATRIX_LR'; write NAME=value, the name in capitals"),
    ("SEED=1 matrix_lr=2", "cannot read 'matrix_lr=2'; write NAME=value, the name in capitals"),
    ('SEED=1 STEPS="1,2', """cannot read 'STEPS="1,2'; write NAME=value, the name in capitals"""),
    ("SEED=1 SEED=2", "SEED is set twice; write SEED=a,b for one run with each value"),
    ("RUN_ID=mine", "RUN_ID is the sweep's to set; remove it"),
    ("SEED=1,,2", "SEED=1,,2 has an empty value; remove a comma, or quote it all"),
])
def test_a_bad_line_is_named_and_nothing_runs(place, capsys, line, complaint):
    place.write("SEED=7", "# fine", line)
    assert call(place) == 2
    assert capsys.readouterr().err == f"sweep.py: {place.list}:3: {complaint}\n"
    assert not place.started()


def test_a_file_that_cannot_be_read_is_named(place, capsys):
    assert call(place) == 2
    assert capsys.readouterr().err == f"sweep.py: {place.list}: No such file or directory; name a text file\n"
    place.list.write_bytes(b"\xff\n")
    assert call(place) == 2
    assert "runs.txt: not UTF-8 text; name a file of NAME=value lines\n" in capsys.readouterr().err
    place.write("SEED=1")
    assert call(place, "--base", str(place.out / "no.env")) == 2
    assert "no.env: No such file or directory" in capsys.readouterr().err


# --- The queue


def test_a_recipe_is_read_as_everywhere(place, tmp_path, capsys):
    recipe = tmp_path / "mine.env"
    recipe.write_text("export MATRIX_LR='0.1'\r\nSEEED=1\r\n")
    place.write("SEED=1")
    assert call(place, "--base", str(recipe)) == 2 and not place.started()
    assert capsys.readouterr().err == f"sweep.py: {recipe}:2: SEEED: no such setting; the nearest is SEED\n"


def test_two_gpus_run_side_by_side_and_all_comes_into_the_table(place, capsys):
    place.write("MATRIX_LR=0.25,0.5 STUB=together", "WIDTH=9")
    assert call(place, "--gpus", "3,5") == 0
    output = capsys.readouterr().out
    assert {line.split()[1] for line in place.started()[:2]} == {"3", "5"}
    assert len(place.started()) == 3
    head = [line for line in output.splitlines() if line.endswith(HEAD)]
    assert head == ["| MATRIX_LR | STUB | WIDTH | " + HEAD]
    first, second, third = table_of(output)
    assert first[:2] == ["0.25", "together"] and first[3] in "35"
    assert first[4:] == ["1,234", "1,000,000", "0.25000", "0.12500", "", "", "3", ""]
    assert second[0] == "0.5" and third[:3] == ["(0.5)", "", "9"]  # in brackets: the default, from the record
    assert (place.out / "table.md").read_text() == "".join(output.partition("| MATRIX_LR")[1:])


def test_a_line_wins_over_the_recipe_and_that_over_the_environment(place, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.env"
    recipe.write_text("# settings\nMATRIX_LR=0.1\nTOKEN_BACKOFF=10,6\n")
    monkeypatch.setenv("TOKEN_BACKOFF", "1")
    place.write("SEED=1", "MATRIX_LR=0.7")
    assert call(place, "--base", str(recipe)) == 0
    assert [line.split()[0::2] for line in place.started()] == [["0.1", "10,6"], ["0.7", "10,6"]]
    assert [row[:2] for row in table_of(capsys.readouterr().out)] == [["0.1", "1"], ["0.7", ""]]


def test_failures_are_told_in_the_table_and_stop_nothing(place, capsys):
    place.write("STUB=refuse", "STUB=diverge", "STUB=half", "STUB=fine")
    assert call(place) == 1
    output = capsys.readouterr().out
    assert [row[-1] for row in table_of(output)] == [
        r"cut off or failed: train_gpt.py: MATRIX_LR: too \| large",
        "failed: FloatingPointError: loss is nan", "cut off or failed: it printed nothing", ""]
    assert "stub_refuse" in output and "failed with code 2 after" in output


def test_only_what_is_not_finished_is_run_again(place, capsys):
    place.write("MATRIX_LR=1,2,3")
    assert call(place) == 0
    place.record(MATRIX_LR="2").write_text('{"status": "running", "results"')
    record = json.loads(place.record(MATRIX_LR="3").read_text())
    place.record(MATRIX_LR="3").write_text(json.dumps(record | {"status": "failed"}))
    leftover = place.record(MATRIX_LR="2").with_name("old.txt")
    leftover.write_text("of the first attempt")
    place.write("MATRIX_LR=1,2,3,4")
    assert call(place) == 0
    assert [line.split()[0] for line in place.started()] == ["1.0", "2.0", "3.0", "2.0", "3.0", "4.0"]
    assert not leftover.exists()
    assert [row[0] for row in table_of(capsys.readouterr().out)[-4:]] == ["1", "2", "3", "4"]


def test_lines_that_come_while_it_runs_are_run_too(place, capsys):
    place.write('STUB="add MATRIX_LR=4,5"')
    assert call(place) == 0
    assert [line.split()[0] for line in place.started()] == ["0.5", "4.0", "5.0"]
    assert len(table_of(capsys.readouterr().out)) == 3


def test_a_faulty_line_that_comes_meanwhile_is_told_once_and_the_rest_goes_on(place, capsys):
    place.write('STUB="add oops"', "MATRIX_LR=2")
    assert call(place) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sweep.py: {place.list}:3: cannot read 'oops'; write NAME=value")
    assert printed.err.count("\n") == 1
    assert len(place.started()) == 2 and len(table_of(printed.out)) == 2


def test_one_sweep_at_a_time_in_a_folder(place, capsys):
    place.write("SEED=1")
    handle = sweep.hold_folder(place.out)
    assert call(place) == 2
    assert "a sweep is under way in it; add to its file, or change --out" in capsys.readouterr().err
    os.close(handle)
    assert call(place) == 0


@pytest.mark.parametrize("act, grace, note", [("wait", 30.0, "failed: SystemExit: 143"),
                                              ("stubborn", 0.3, "cut off or failed")])
def test_an_interrupt_ends_the_runs_and_still_writes_the_table(place, act, grace, note):
    place.write(f"STUB={act}", "SEED=1")
    program = (f"import sys, pathlib; sys.path.insert(0, {str(PATH.parent)!r}); import sweep; "
               f"sweep.SCRIPT = pathlib.Path({str(place.stub)!r}); sweep.SECONDS_TO_CLOSE = {grace}; "
               "sys.exit(sweep.main(sys.argv[1:]))")
    command = [sys.executable, "-c", program, str(place.list), "--out", str(place.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not place.record(STUB=act).exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    first, second = table_of(out)
    assert note in first[-1] and second[-1] == "not run"
    assert len(place.started()) == 1


# --- The real program


def test_a_real_run_and_its_figures(tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path / "data", train_docs=100, val_docs=8)
    tiny = environment(tmp_path, ITERATIONS=2, PREQUANT_ONLY=1, WARMUP_STEPS=0)
    del tiny["ARTIFACT_DIR"], tiny["RUN_ID"]
    for name in set(os.environ) - set(INHERITED):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.env").write_text("".join(f"{name}={value}\n" for name, value in tiny.items()))
    (tmp_path / "runs.txt").write_text("SEED=5\nMATRIX_LRR=5\n")
    runs, out, base = (str(tmp_path / name) for name in ("runs.txt", "out", "tiny.env"))
    assert sweep.main([runs, "--out", out, "--base", base, "--gpus", "0"]) == 1
    good, bad = table_of(capsys.readouterr().out)
    folder = tmp_path / "out" / sweep.name_run(tiny | {"SEED": "5"}, tiny)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and good[-1] == "" == good[7] == good[8]  # neither quantized nor final
    assert good[0] == "5" and good[3] == "2" and record["settings"]["seed"] == 5
    assert good[5] == f"{record['results']['raw']['val_bpb']:.5f}"
    assert good[6] == f"{record['results']['averaged']['val_bpb']:.5f}"
    assert bad[-1].startswith("cut off or failed: train_gpt.py: MATRIX_LRR: no such setting")


def test_the_mini_track_is_a_recipe_of_our_settings():
    import train_gpt

    settings = train_gpt.Settings.from_environment(sweep.read_base(ROOT / "recipes" / "mini.env"))
    assert settings.max_wallclock_seconds == 240 and settings.accumulation == 1
