"""Seeds one after another, their statistics, and the folder that a record is copied from."""
import errno
import fcntl
import importlib.util
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import pytest

from tests.synthetic import INHERITED, ROOT, environment, write_corpus

spec = importlib.util.spec_from_file_location("submission", ROOT / "tools" / "submission.py")
sub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sub)

TRAIN = [sys.executable, str(ROOT / "train_gpt.py")]
SEEDS = (42, 0, 7)


def variables(place, **changes) -> dict[str, str]:
    tiny = environment(place, ITERATIONS=4, STEP_RULE="sigma", OMP_NUM_THREADS=1, **changes)
    del tiny["ARTIFACT_DIR"], tiny["RUN_ID"]
    return tiny | {name: os.environ[name] for name in INHERITED if name in os.environ}


def call(place, *arguments, **changes) -> SimpleNamespace:
    """The program in this process, what it runs in processes of their own; FOLDER is place/runs."""
    with (mock.patch.dict(os.environ, variables(place, **changes), clear=True), redirect_stdout(io.StringIO()) as out,
          redirect_stderr(io.StringIO()) as err):
        try:
            code = sub.main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three finished seeds."""
    place = tmp_path_factory.mktemp("seeds")
    write_corpus(place / "data", 300, 20)
    result = call(place, "seeds", place / "runs", *SEEDS, "--", *TRAIN)
    assert result.code == 0, result.out[-6000:] + result.err
    return SimpleNamespace(place=place, runs=place / "runs", out=result.out)


@pytest.fixture
def copied(three, tmp_path):
    """A copy of theirs to change."""
    shutil.copytree(three.runs, tmp_path / "runs")
    (tmp_path / "data").symlink_to(three.place / "data")
    return tmp_path


def record(folder, seed, kind="train") -> dict:
    return json.loads((folder / f"seed{seed}" / f"{kind}_seed{seed}.json").read_text())


def test_every_seed_has_log_record_and_artifact(three):
    for seed in SEEDS:
        names = {path.name for path in (three.runs / f"seed{seed}").iterdir()}
        assert names >= {f"train_seed{seed}.txt", f"train_seed{seed}.json", "final_model.int6.ptz"}
        assert record(three.runs, seed)["settings"]["seed"] == seed


def test_submission_json_is_that_of_the_records(three):
    submission = json.loads((three.runs / "submission.json").read_text())
    scores = [record(three.runs, seed)["results"]["quantized"]["val_bpb"] for seed in SEEDS]
    assert submission["seeds"] == list(SEEDS) and list(submission["seed_results"]) == list(map(str, SEEDS))
    assert submission["val_bpb"] == pytest.approx(statistics.mean(scores), abs=1e-8) and len(set(scores)) == 3
    variance = sum((x - statistics.mean(scores)) ** 2 for x in scores) / 2
    assert submission["val_bpb_std"] == pytest.approx(math.sqrt(variance), abs=1e-8)
    for seed in SEEDS:
        ours, results = submission["seed_results"][str(seed)], record(three.runs, seed)["results"]
        assert ours["steps"] == results["training"]["steps"] == 4 and ours["total_bytes"] == results["size"]["total_bytes"]
        assert ours["train_seconds"] == results["training"]["clock_seconds"]
        assert ours["eval_seconds"] == results["quantized"]["seconds"]
    assert submission["bytes_total"] == max(s["total_bytes"] for s in submission["seed_results"].values())


def test_results_table_has_a_row_for_every_seed_mean_and_deviation(three):
    rows = [line.split(" | ") for line in (three.runs / "results.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["seed", "---", "42", "0", "7", "mean", "std"]
    assert {len(row) for row in rows} == {9} and (three.runs / "results.md").read_text() in three.out


@pytest.fixture
def without_conclusion(monkeypatch):
    """Folder, report and audit after the seeds are those of `three`."""
    monkeypatch.setattr(sub, "conclude", lambda *_: 0)


def test_a_finished_seed_is_not_run_again(copied, without_conclusion):
    before = {path: path.read_bytes() for path in copied.glob("runs/seed*/train*")}
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--", *TRAIN)
    assert result.code == 0 and result.out.count("finished before") == 3
    assert before == {path: path.read_bytes() for path in copied.glob("runs/seed*/train*")}


def test_an_unfinished_seed_is_run_again_and_its_first_attempt_kept(copied, without_conclusion):
    path = copied / "runs" / "seed0" / "train_seed0.json"
    path.write_text(json.dumps(record(copied / "runs", 0) | dict(status="running")))
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--", *TRAIN)
    assert result.code == 0 and result.out.count("finished before") == 2, result.out
    assert record(copied / "runs", 0)["status"] == "finished"
    assert json.loads((path.parent / "attempt1_train_seed0.json").read_text())["status"] == "running"


def test_a_seed_that_fails_ends_the_row(copied):
    shutil.rmtree(copied / "runs" / "seed0")
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--", sys.executable, "-c", "raise SystemExit(3)")
    assert result.code == 3 and not (copied / "runs" / "seed0" / "train_seed0.json").exists()


@pytest.mark.parametrize("changes, word", [(dict(MATRIX_LR="0.01"), "MATRIX_LR"), (dict(NUM_HEADS="7"), "NUM_HEADS")])
def test_finished_seeds_with_other_settings_are_refused(copied, changes, word):
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--", *TRAIN, **changes)
    assert result.code == 2 and word in result.err and "Traceback" not in result.err


def test_a_seed_that_is_not_named_stops_the_line_before_it_runs(copied):
    result = call(copied, "seeds", copied / "runs", 42, 0, "--", *TRAIN)
    assert result.code == 2 and "seed7" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("action", [("seeds", *SEEDS), ("retest",)])
def test_a_folder_in_which_a_run_is_under_way_is_left_alone(copied, action):
    for seed in SEEDS:
        path = copied / "runs" / f"seed{seed}" / f"train_seed{seed}.json"
        path.write_text(json.dumps(record(copied / "runs", seed) | dict(status="running")))
    before = sorted(copied.glob("runs/*/*"))
    holders = [os.open(copied / "runs" / f"seed{seed}", os.O_RDONLY) for seed in SEEDS]
    try:
        for holder in holders:
            fcntl.flock(holder, fcntl.LOCK_EX)
        result = call(copied, action[0], copied / "runs", *action[1:], "--", *TRAIN)
    finally:
        for holder in holders:
            os.close(holder)
    assert result.code == 2 and "under way" in result.err and sorted(copied.glob("runs/*/*")) == before


@pytest.mark.parametrize("name", ["PREQUANT_ONLY", "QUANTIZE_ONLY", "TTT_EVAL_ONLY"])
def test_seeds_are_whole_runs(copied, name):
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--", *TRAIN, **{name: 1})
    assert result.code == 2 and name in result.err


def test_records_that_do_not_belong_together_have_no_mean(copied):
    path = copied / "runs" / "seed7" / "train_seed7.json"
    changed = record(copied / "runs", 7)
    changed["settings"]["beta2"] = 0.5
    path.write_text(json.dumps(changed))
    result = call(copied, "summary", copied / "runs")
    assert result.code == 2 and "BETA2" in result.err and len(result.err.splitlines()) == 1


def test_retest_repeats_the_scores(copied):
    result = call(copied, "retest", copied / "runs", "--", *TRAIN)
    assert result.code == 0, result.err
    for seed in SEEDS:
        assert record(copied / "runs", seed, "eval")["results"]["quantized"]["val_bpb"] == pytest.approx(
            record(copied / "runs", seed)["results"]["quantized"]["val_bpb"], abs=1e-9)


# --- Statistics


def test_same_seeds_are_compared_in_pairs():
    """By hand: differences 0.10, 0.12, 0.08, less 0.005: mean 0.095, deviation 0.02, t = 0.095 / (0.02 / sqrt 3)."""
    found = sub.compare(dict(a=1.0, b=1.1, c=1.2), dict(a=1.1, b=1.22, c=1.28), 1.0)
    t = 0.095 / (0.02 / math.sqrt(3))
    assert found["test"] == "paired t-test" and found["difference_nats"] == pytest.approx(0.1)
    assert found["p"] == pytest.approx(0.5 * (1 - t / math.sqrt(2 + t * t)), abs=1e-6), "Student's t with 2 degrees of freedom"
    assert found["new_record"] is (found["p"] < 0.01)


def test_other_seeds_are_compared_by_welch():
    """Values from a table of Student's t: 2.132 has p = 0.05 with 4 degrees of freedom."""
    deviation = 0.01
    theirs = {"1": 1.5 - deviation, "2": 1.5, "3": 1.5 + deviation}
    ours = {"4": 1.5 - deviation, "5": 1.5, "6": 1.5 + deviation}
    shift = 2.132 * math.sqrt(2 * deviation ** 2 / 3) + sub.RULE_NATS
    found = sub.compare({seed: value - shift for seed, value in ours.items()}, theirs, 1.0)
    assert found["test"] == "Welch's t-test" and found["p"] == pytest.approx(0.05, abs=2e-4) and not found["new_record"]


def test_nats_follow_from_bytes_per_token():
    found = sub.compare(dict(a=1.0, b=1.0), dict(a=1.01, b=1.02), 2.0)
    assert found["difference_nats"] == pytest.approx(0.03)


@pytest.mark.parametrize("text, expected", [
    ("42 1.05\n0 1.06\n", {"42": 1.05, "0": 1.06}), ("1.05\n1.06\n", {"#1": 1.05, "#2": 1.06}),
    ('{"seed_results": {"42": {"val_bpb": 1.05}, "0": {"val_bpb": 1.06}}}', {"42": 1.05, "0": 1.06})])
def test_baselines_are_read(tmp_path, text, expected):
    (tmp_path / "theirs").write_text(text)
    assert sub.baseline(tmp_path / "theirs") == expected


@pytest.mark.parametrize("text", ["1.05\n", "seed value\n", "", "42 nan\n1 1.0\n", '{"seed_results": {}}',
                                  '{"seed_results": {"42": {"val_bpb": 1.05}}}'])
def test_a_baseline_that_is_none_is_refused_before_anything_runs(copied, text):
    (copied / "theirs").write_text(text)
    shutil.rmtree(copied / "runs" / "seed7")
    result = call(copied, "seeds", copied / "runs", *SEEDS, "--against", copied / "theirs", "--", *TRAIN)
    assert result.code == 2 and "--against" in result.err and not (copied / "runs" / "seed7").exists()


def test_the_comparison_is_in_json_and_table(copied):
    scores = {seed: record(copied / "runs", seed)["results"]["quantized"]["val_bpb"] for seed in SEEDS}
    theirs = [f"{seed} {score + 0.1 + 0.001 * i}\n" for i, (seed, score) in enumerate(scores.items())]
    (copied / "theirs").write_text("".join(theirs))
    assert call(copied, "summary", copied / "runs", "--against", copied / "theirs").code == 0
    comparison = json.loads((copied / "runs" / "submission.json").read_text())["comparison"]
    results = record(copied / "runs", 42)["results"]["quantized"]
    assert comparison["difference_nats"] == pytest.approx(0.101 * math.log(2) * results["bytes"] / results["targets"], abs=1e-5)
    assert comparison["new_record"] and "paired" in comparison["test"]
    assert "Against theirs" in (copied / "runs" / "results.md").read_text()


# --- The folder


def test_the_folder_runs_on_its_own(copied):
    out = copied / "out folder"
    result = call(copied, "folder", copied / "runs", out)
    assert result.code == 0, result.err
    names = {path.name for path in out.iterdir()}
    assert names >= {"train_gpt.py", "source", "tokenizers", "recipes", "requirements.txt", "run.sh", "README.md",
                     "submission.json", "lossless_caps.py", "prepare_caseops_data.py", "verify_submission.py",
                     *(f"train_seed{seed}.{kind}" for seed in SEEDS for kind in ("log", "json"))}
    pages = {path.name for path in (ROOT / "docs").iterdir()}
    assert {path.name for path in (out / "docs").iterdir()} == pages and (out / "LICENSE").exists()
    assert (out / "train_gpt.py").stat().st_size == record(copied / "runs", 42)["results"]["size"]["code_bytes"]
    assert (copied / "runs" / "results.md").read_text() in (out / "README.md").read_text()
    shutil.copy(copied / "runs" / "seed42" / "final_model.int6.ptz", copied)
    elsewhere = shutil.move(out, copied / "moved")
    scored = subprocess.run([sys.executable, "train_gpt.py"], cwd=elsewhere, text=True, capture_output=True, timeout=300,
                            env=variables(copied, TTT_EVAL_ONLY=1) | dict(ARTIFACT_DIR=str(copied), RUN_ID="again"))
    assert scored.returncode == 0, scored.stderr
    again = json.loads((copied / "again.json").read_text())
    before = record(copied / "runs", 42)["results"]
    assert again["results"]["quantized"] | dict(seconds=0) == before["quantized"] | dict(seconds=0)
    assert again["results"]["size"]["total_bytes"] == before["size"]["total_bytes"]
    helped = subprocess.run(["bash", "run.sh", "help"], cwd=elsewhere, text=True, capture_output=True)
    assert helped.returncode == 0 and "RECIPE" in helped.stdout
    env, here = variables(copied), [sys.executable, "tools/submission.py"]
    shutil.copytree(copied / "runs", copied / "theirs")
    again = subprocess.run([*here, "seeds", str(copied / "theirs"), *map(str, SEEDS), "--", sys.executable, "train_gpt.py"],
                           env=env, cwd=elsewhere, text=True, capture_output=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("finished before") == 3, again.stderr
    compared = subprocess.run([sys.executable, "tools/diff_recipes.py", "record", "pr2140"], cwd=elsewhere, env=env, text=True,
                              capture_output=True)
    assert compared.returncode == 0 and "TRAIN_SEQ_SCHEDULE" in compared.stdout


def test_the_folder_is_whole_or_not_there(copied):
    (copied / "taken").mkdir()
    (copied / "taken" / "file").write_text("mine")
    result = call(copied, "folder", copied / "runs", copied / "taken")
    assert result.code == 2 and "not empty" in result.err and [p.name for p in (copied / "taken").iterdir()] == ["file"]
    for seed in SEEDS:
        path = copied / "runs" / f"seed{seed}" / f"train_seed{seed}.json"
        path.write_text(path.read_text().replace(sub.event(record(copied / "runs", seed), "code")["sha256"], "0" * 64))
    result = call(copied, "folder", copied / "runs", copied / "new")
    assert result.code == 2 and "packs into" in result.err and not (copied / "new").exists()
    assert not list(copied.glob(".submission*"))


# --- The track


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's top to publish into."""
    top = tmp_path / "top"
    top.mkdir()
    (top / "README.md").write_text("# A\n")
    monkeypatch.setattr(sub, "ROOT", top)
    return top


def relabel(runs, name, because) -> None:
    for seed in SEEDS:
        path = runs / f"seed{seed}" / f"train_seed{seed}.json"
        changed = record(runs, seed)
        sub.event(changed, "track").update(name=name, because=because)
        path.write_text(json.dumps(changed))


def test_a_run_on_another_track_is_labelled_everywhere(three):
    """Other text, other hardware, other settings than recipe record: in record, table, json and audit."""
    because = sub.event(record(three.runs, 42), "track")["because"]
    submission = json.loads((three.runs / "submission.json").read_text())
    assert submission["track"] == "non_record_16mb" and not submission["record"] and submission["because"] == because
    assert f"No record: {because}." in (three.runs / "results.md").read_text()
    for part in ("targets: another text", "CPU are not 8 x H100", "not as recipe record: ", "NUM_LAYERS=5"):
        assert part in because
    [line] = [line for line in three.out.splitlines() if line.startswith("UNKNOWN track ")]
    assert because in line and not any(line.startswith("FAIL") for line in three.out.splitlines())


def test_a_claim_to_the_track_is_checked(copied):
    path = copied / "runs" / "submission" / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(track="10min_16mb")))
    found = [item for item in sub.verify_submission.audit(copied / "runs" / "submission") if item["check"] == "track"]
    assert {item["verdict"] for item in found} == {"FAIL"}


def test_only_a_record_is_published(copied, project):
    call(copied, "summary", copied / "runs")
    said = sub.published(copied / "runs", "record")
    assert "no record" in said and "--publish any" in said and sorted(os.listdir(project)) == ["README.md"]
    assert (project / "README.md").read_text() == "# A\n"
    assert "have these results" in sub.published(copied / "runs", "any")
    assert "No record" in (project / "README.md").read_text() and (project / "submission.json").exists()


def test_a_record_is_published(copied, project):
    relabel(copied / "runs", "10min_16mb", "nothing differs")
    call(copied, "summary", copied / "runs")
    assert "have these results" in sub.published(copied / "runs", "record")
    published = json.loads((project / "submission.json").read_text())
    assert published["track"] == "10min_16mb" and published["record"] and "No record" not in (project / "README.md").read_text()


def test_publishing_in_a_read_only_checkout_says_so(copied, project, monkeypatch):
    def read_only(path, _):
        raise OSError(errno.EROFS, "Read-only file system", path)

    relabel(copied / "runs", "10min_16mb", "nothing differs")
    call(copied, "summary", copied / "runs")
    monkeypatch.setattr(sub, "write_whole", read_only)
    said = sub.published(copied / "runs", "record")
    assert "Read-only file system" in said and str(copied / "runs") in said and "\n" not in said
    assert sorted(os.listdir(project)) == ["README.md"]


def test_a_second_line_of_seeds_waits_its_turn(copied, without_conclusion):
    """While the first is between two seeds, no record is live; its folder is held all the same."""
    before = sorted(copied.glob("runs/*/*"))
    lock = sub.hold(str(copied / "runs"), "first")
    try:
        for action in (("seeds", *SEEDS), ("retest",)):
            result = call(copied, action[0], copied / "runs", *action[1:], "--", *TRAIN)
            [line] = result.err.splitlines()
            assert result.code == 2 and "another run is under way" in line and "remove" not in line
    finally:
        os.close(lock)
    assert sorted(copied.glob("runs/*/*")) == before
    assert call(copied, "seeds", copied / "runs", *SEEDS, "--", *TRAIN).code == 0


def test_results_replace_what_stood_between_the_marks():
    readme = "# A\n\n" + sub.BEGIN + "\nold\n" + sub.END + "\n\n## B\n"
    once = sub.with_results(readme, "new\n")
    assert "old" not in once and once.count("new") == 1 and once.startswith("# A") and once.endswith("## B\n")
    assert sub.with_results(once, "new\n") == once
    assert sub.with_results("# A\n", "new\n").endswith(f"{sub.BEGIN}\nnew\n{sub.END}\n")


@pytest.mark.parametrize("arguments, word", [(("summary", "nothing"), "seed"), (("seeds", "runs", "1", "1"), "twice")])
def test_bad_input_is_one_line(tmp_path, arguments, word):
    result = subprocess.run([sys.executable, str(ROOT / "tools" / "submission.py"), arguments[0], str(tmp_path / arguments[1]),
                             *arguments[2:]], text=True, capture_output=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and word in result.stderr
