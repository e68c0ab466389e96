"""Whole runs of train_gpt.py on tiny data: as a program, on several ranks, stopped and broken."""
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import host
import train_gpt as g
from tests.synthetic import (
    ROOT, environment, events, launch, main_here, record, runtime, start, tiny, unigram_bpb, write_corpus)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards") / "data", 400, 30)


@pytest.fixture
def place(tmp_path, data):
    """A fresh folder for one run."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """One run from start to end, as a user starts it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").symlink_to(data)
    result = launch(environment(folder, ITERATIONS=30, VAL_LOSS_EVERY=10, WARMUP_STEPS=1))
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(folder=folder, out=result.stdout, err=result.stderr, record=record(folder))


def run_here(place, **changes) -> dict:
    """A run in this process; returns its record."""
    s = tiny(place, **changes)
    log = g.RunLog(s, runtime())
    g.run(s, runtime(), log)
    log.close("finished")
    return record(place, s.run_id)


def assert_log_agrees(folder, run_id="tiny"):
    """Every event of the record is a line of the log, in the same order; no line looks like another event."""
    lines = (folder / "out" / f"{run_id}.txt").read_text().splitlines()
    expected = [" ".join([event["event"]] + [f"{k}:{v}" for k, v in event.items() if k != "event"])
                for event in record(folder, run_id)["events"]]
    assert [line for line in lines if re.match(r"[a-z]+ \w+:", line)] == expected


def test_a_run_learns(finished):
    results = finished.record["results"]
    unigram = unigram_bpb(finished.folder / "data")
    assert finished.record["status"] == "finished"
    for stage in ("raw", "averaged", "quantized"):
        assert results[stage]["val_bpb"] < unigram - 0.15, stage
    losses = [event["train_loss"] for event in events(finished.record, "step")]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5
    assert results["training"]["steps"] == 30 and results["training"]["tokens"] == 30 * 2048


def test_log_and_record_agree(finished):
    assert_log_agrees(finished.folder)
    assert finished.out == (finished.folder / "out" / "tiny.txt").read_text()
    for kind, figures in finished.record["results"].items():
        assert {"event": kind, **figures} in finished.record["events"]
    table = finished.out[finished.out.rindex("val_bpb   seconds"):]
    for stage in ("raw", "averaged", "quantized"):
        assert f"{finished.record['results'][stage]['val_bpb']:.5f}" in table


def test_validation_while_training(finished):
    assert [event["step"] for event in events(finished.record, "val")][:2] == [10, 20]
    bpb = [event["val_bpb"] for event in events(finished.record, "val")]
    assert bpb == sorted(bpb, reverse=True)


def test_looping_starts_at_its_share_of_the_run(finished):
    [event] = events(finished.record, "looping")
    # The first step with step / 30 >= 0.35.
    assert event["step"] == 11 == finished.record["results"]["training"]["looping_from"]


def test_size_in_the_log_is_the_size_on_disk(finished):
    size = finished.record["results"]["size"]
    assert size["artifact_bytes"] == (finished.folder / "out" / "final_model.int6.ptz").stat().st_size
    assert size["total_bytes"] == size["artifact_bytes"] + size["code_bytes"] and size["cap"] == 16_000_000
    assert size["code_bytes"] == len(g.packed_code()) and size["within_cap"]


def test_nothing_but_log_record_and_artifact_is_left(finished):
    left = {path.name for path in (finished.folder / "out").iterdir()}
    assert left == {"tiny.txt", "tiny.json", "final_model.int6.ptz", "final_model.fp32.ptz"}


def test_evaluation_of_the_saved_artifact_repeats_the_score(finished):
    result = main_here(environment(finished.folder, ITERATIONS=30, TTT_EVAL_ONLY=1, RUN_ID="evaluation"))
    assert result.returncode == 0, result.stderr
    evaluation = record(finished.folder, "evaluation")["results"]
    for figure in ("val_bpb", "val_loss", "targets"):
        assert evaluation["quantized"][figure] == finished.record["results"]["quantized"][figure]
    assert "training" not in evaluation


def curve(record: dict) -> list[tuple]:
    return [(e["step"], e["train_loss"], e["grad_norm"]) for e in events(record, "step")]


@pytest.mark.parametrize("changes", [dict(WARMUP_STEPS=3), dict(VAL_LOSS_EVERY=2)],
                         ids=["warm-up", "validation"])
def test_what_is_no_training_changes_nothing(place, changes):
    common = dict(ITERATIONS=5, PREQUANT_ONLY=1, WARMUP_STEPS=0, VAL_LOSS_EVERY=0)
    plain, other = run_here(place, **common), run_here(place, RUN_ID="other", **common | changes)
    assert curve(plain) == curve(other) and len(curve(plain)) == 5
    for stage in ("raw", "averaged"):
        assert plain["results"][stage]["val_bpb"] == other["results"][stage]["val_bpb"]
    assert bool(events(other, "val")) == ("VAL_LOSS_EVERY" in changes)


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the clock is 0.4 s after the last one, whatever the machine takes in between."""
    clock = SimpleNamespace(now=time.perf_counter())

    def look():
        clock.now += 0.4
        return clock.now

    monkeypatch.setattr(g, "time", SimpleNamespace(perf_counter=look))
    return clock


def test_steps_leave_time_for_calibration(place, ticking):
    result = run_here(place, MAX_WALLCLOCK_SECONDS=3, ITERATIONS=100000, GPTQ_CALIBRATION_BATCHES=16,
                      GPTQ_RESERVE_SECONDS=0)
    [warmup], times = events(result, "warmup"), result["results"]["training"]
    assert warmup["reserve_seconds"] > 0.2 and times["calibration_seconds"] > 0
    assert 1 < times["seconds"] <= 3 - warmup["reserve_seconds"] and times["steps"] > 3
    assert times["clock_seconds"] == pytest.approx(times["seconds"] + times["calibration_seconds"], abs=0.002)
    assert times["clock_seconds"] <= 3 == times["cap_seconds"] and times["within_cap"]


@pytest.mark.parametrize("late, fewest, most, in_time", [(0, 10, 10, True), (1, 2, 6, True), (99, 1, 1, False)])
def test_calibration_stops_at_the_cap(place, ticking, monkeypatch, late, fewest, most, in_time):
    """Its rounds take so many seconds longer on a machine that became busy after the rehearsal."""
    rounds = []

    def slow(*arguments, make=g.calibration_batch):
        rounds.append(ticking.now)
        ticking.now += late * (len(rounds) > 2)  # the rehearsal is two
        return make(*arguments)

    monkeypatch.setattr(g, "calibration_pass", lambda *_: 1)
    monkeypatch.setattr(g, "calibration_batch", slow)
    run = main_here(environment(place, MAX_WALLCLOCK_SECONDS=12, ITERATIONS=100000, GPTQ_CALIBRATION_BATCHES=10))
    result, done = record(place), len(rounds) - 2
    assert fewest <= done <= most and "quantized" in result["results"] and run.returncode == int(not in_time)
    times = result["results"]["training"]
    assert times["within_cap"] == (times["clock_seconds"] <= 12) == in_time
    left_out = [event["rounds_left_out"] for event in events(result, "calibration_cut")]
    assert left_out == ([10 - done] if done < 10 else [])


def test_prequant_only_stops_before_the_artifact(place):
    result = run_here(place, ITERATIONS=2, PREQUANT_ONLY=1)
    assert {"raw", "averaged"} <= result["results"].keys()
    assert not {"artifact", "quantized"} & result["results"].keys()
    assert not (place / "out" / "final_model.int6.ptz").exists()


def test_without_averaging_the_raw_weights_are_kept(place):
    result = run_here(place, ITERATIONS=2, EMA_DECAY=0)
    assert "averaged" not in result["results"]
    raw = result["results"]["raw"]["val_bpb"]
    assert result["results"]["quantized"]["val_bpb"] == pytest.approx(raw, abs=0.05)


def test_a_time_cap_is_kept(place, ticking):
    result = run_here(place, MAX_WALLCLOCK_SECONDS=4, GPTQ_RESERVE_SECONDS=1, ITERATIONS=100000,
                      PREQUANT_ONLY=1, TRAIN_LOG_EVERY=5)
    training = result["results"]["training"]
    assert 2.5 < training["seconds"] <= 3 and training["steps"] > 3
    assert 1 < training["looping_from"] < training["steps"]


# --- Broken runs


def test_broken_data_fails_with_one_line_and_a_record(tmp_path):
    write_corpus(tmp_path / "data", 40, 4)
    shard = tmp_path / "data" / "fineweb_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = main_here(environment(tmp_path))
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert str(shard) in line and "truncated" in line
    failed = record(tmp_path)
    assert failed["status"] == "failed" and str(shard) in failed["events"][-1]["error"]
    assert_log_agrees(tmp_path)


def test_wrong_settings_fail_before_anything_is_written(tmp_path):
    result = launch(environment(tmp_path, NUM_HEADS=7, MATRIX_LRR=1, SEED="x"))
    assert result.returncode == 2 and not (tmp_path / "out").exists() and not result.stdout
    names = {line.split(": ")[1] for line in result.stderr.splitlines()}
    assert names >= {"NUM_HEADS", "MATRIX_LRR", "SEED"} and "Traceback" not in result.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_in_its_record(place, number, code):
    # A shell that runs the tests in the background has its children ignore interrupts.
    with start(environment(place, ITERATIONS=400, PREQUANT_ONLY=1),
               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        for line in process.stdout:
            if line.startswith("step step:3 "):
                process.send_signal(number)
                break
        process.stdout.read()
        assert process.wait(300) == code
        assert "Traceback" not in process.stderr.read()
    stopped = record(place)
    assert stopped["status"] == "failed" and len(events(stopped, "step")) >= 3
    assert_log_agrees(place)


def test_a_killed_run_leaves_a_whole_record_and_no_artifact(place):
    with start(environment(place, ITERATIONS=400)) as process:
        for line in process.stdout:
            if line.startswith("step step:3 "):
                process.kill()
                break
        process.stdout.read()
    assert record(place)["status"] == "running"
    assert not (place / "out" / "final_model.int6.ptz").exists()


def test_evaluation_without_an_artifact_says_what_to_do(place):
    result = main_here(environment(place, TTT_EVAL_ONLY=1))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and "final_model.int6.ptz" in line and record(place)["status"] == "failed"


@pytest.mark.parametrize("run_id", ["with/slash", "../outside"])
def test_a_run_id_is_a_name_and_not_a_path(place, run_id):
    result = main_here(environment(place, RUN_ID=run_id, ITERATIONS=1, PREQUANT_ONLY=1))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("train_gpt.py: RUN_ID")
    assert not (place / "outside.txt").exists()


# --- Several ranks


GROWING = dict(TRAIN_SEQ_SCHEDULE="64@0.2,128@0.6,256@1.0", SEQ_CHANGE_WARMUP_STEPS=2, SKYLIGHT_MUON=1)
GROWING_BATCH = dict(TRAIN_BATCH_SCHEDULE="512@0.2,1024@0.5,1536@1", TRAIN_BATCH_TOKENS=1024)
SHARES = dict(EMA_DECAY=g.Settings.ema_decay, EMA_SHARE=0.3, MUON_MOMENTUM_WARMUP_SHARE=0.4)


def test_context_grows_while_training(place):
    common = dict(ITERATIONS=10, TRAIN_BATCH_TOKENS=1024, PREQUANT_ONLY=1)
    result = run_here(place, **common, **GROWING)
    assert [(e["step"], e["tokens"]) for e in events(result, "context")] == [(3, 128), (7, 256)]
    [warm] = events(result, "warmup")
    assert warm["shapes"] == [[length, looping, 1024] for length, looping in (
        (64, False), (128, False), (128, True), (256, True))]
    later = GROWING | dict(TRAIN_SEQ_SCHEDULE="64@0.2,128@0.8,256@1.0")
    short = run_here(place, RUN_ID="short", **common, **later)
    assert curve(result)[:7] == curve(short)[:7] and curve(result)[7] != curve(short)[7]


def test_batch_grows_while_training(place, monkeypatch):
    seen, read = [], g.TrainingData.read
    monkeypatch.setattr(g.TrainingData, "read", lambda data, *where: seen.append(where) or read(data, *where))
    result = run_here(place, ITERATIONS=10, PREQUANT_ONLY=1, WARMUP_STEPS=0, **GROWING_BATCH)
    assert [(e["step"], e["tokens"]) for e in events(result, "step_tokens")] == [(3, 1024), (6, 1536)]
    steps = [512] * 3 + [1024] * 3 + [1536] * 4
    assert result["results"]["training"]["tokens"] == sum(steps) == 10752
    # Each stage goes on where the one before ended, in micro-batches no longer than 512.
    used = [(start, length - 1) for start, length in dict.fromkeys(seen)]
    assert set(used) >= {(start, 512) for start in range(0, sum(steps), 512)}
    assert {length for _, length in used} == {512}
    later = GROWING_BATCH | dict(TRAIN_BATCH_SCHEDULE="512@0.2,1024@0.7,1536@1")
    other = run_here(place, RUN_ID="later", ITERATIONS=10, PREQUANT_ONLY=1, WARMUP_STEPS=0, **later)
    assert curve(result)[:6] == curve(other)[:6] and curve(result)[6] != curve(other)[6]


@pytest.mark.parametrize("ranks, batch, micro_batches, more", [
    (2, 2048, 4, SHARES | dict(TRAIN_BATCH_SCHEDULE="1024@0.3,2048@0.5,4096@1")), (3, 1536, 6, GROWING)])
def test_several_ranks_train_like_one(place, ranks, batch, micro_batches, more):
    """The step is the same tokens in the same micro-batches: only the order of the sums differs."""
    changes = dict(TRAIN_BATCH_TOKENS=batch, ITERATIONS=8, ENABLE_LOOPING_AT=0.5) | more
    env = environment(place, RUN_ID="several", GRAD_ACCUM_STEPS=micro_batches // ranks, **changes)
    result = launch(env, ranks=ranks)
    assert result.returncode == 0, result.stderr
    several = record(place, "several")
    one = run_here(place, GRAD_ACCUM_STEPS=micro_batches, **changes)
    assert several["machine"]["devices"] == ranks and len(curve(one)) == 8
    for ours, theirs in zip(curve(several), curve(one), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    for stage in ("raw", "averaged", "quantized"):
        ours, theirs = several["results"][stage], one["results"][stage]
        assert ours["targets"] == theirs["targets"] and ours["bytes"] == theirs["bytes"]
        # One weight that rounds the other way moves the quantized score more than rounding in training does.
        tolerance = 1e-3 if stage == "quantized" else 1e-4
        assert ours["val_bpb"] == pytest.approx(theirs["val_bpb"], abs=tolerance), stage
    assert result.stdout.count("step step:1 ") == 1, "only rank 0 speaks"


def on_rank(place, rank: int, lines: str) -> Path:
    """A script that runs train_gpt.py after `lines` on one rank; `started` waits for rank 0's record."""
    script = place / "one_rank_differs.py"
    script.write_text(f"""\
import dataclasses, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as g
def started():
    while not os.path.exists({str(place / "out" / "tiny.json")!r}):
        time.sleep(0.01)
if os.environ["RANK"] == "{rank}":
    {lines}
os._exit(g.main([], dict(os.environ)))
""")
    return script


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("changes, words", [
    (dict(MAX_WALLCLOCK_SECS=5), "MAX_WALLCLOCK_SECS: no such setting"), (dict(DATA_PATH="/nowhere"), "DATA_PATH: no fineweb_*.bin"),
    (dict(MATRIX_LR=1e30, EMA_DECAY=0), "training diverged")])
def test_whatever_stops_all_ranks_is_said_once(place, ranks, changes, words):
    """Whoever is last to import, rank 0 in the first case: torchrun ends the others as soon as one has left."""
    script = on_rank(place, 0, "time.sleep(1)") if "MAX_WALLCLOCK_SECS" in changes else ROOT / "train_gpt.py"
    result = launch(environment(place, TRAIN_BATCH_TOKENS=6144, **changes), ranks=ranks, script=script)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert result.returncode != 0 and len(lines) == 1 and lines[0].startswith(f"train_gpt.py: {words}"), result.stderr


def test_a_rank_that_is_left_in_the_environment_silences_nothing(place):
    result = launch(environment(place, MAX_WALLCLOCK_SECS=5, RANK=1, LOCAL_RANK=1), "--check")
    assert result.returncode == 2
    assert [line.split(":")[2].strip() for line in result.stderr.splitlines()] == ["MAX_WALLCLOCK_SECS", "RANK"]


def test_a_kernel_that_does_not_load_on_one_rank_is_said_once(place):
    script = on_rank(place, 1, "def fail(*_): raise g.KernelError('ATTENTION: fa4 does not load (ImportError: no module)'); "
                               "g.attention_kernel = fail".replace("; ", "\n    ", 1))
    result = launch(environment(place), ranks=2, script=script)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert lines == ["train_gpt.py: rank 1: ATTENTION: fa4 does not load (ImportError: no module)"] and result.returncode != 0
    assert record(place)["status"] == "failed" and not events(record(place), "model")


def test_all_ranks_take_the_kernel_that_runs_on_all(place):
    reason = "fa4 does not load (RuntimeError: no kernel image)"
    script = on_rank(place, 0, "g.attention_kernel = lambda wanted, *shape: ('torch' if wanted == 'auto' else wanted, '')\n"
                               f"else: g.attention_kernel = lambda *_: ('reference', {reason!r})")
    result = launch(environment(place, ITERATIONS=2, PREQUANT_ONLY=1), ranks=2, script=script)
    assert result.returncode == 0, result.stderr
    [model], [slower] = (events(record(place), kind) for kind in ("model", "slower_attention"))
    assert model["attention"] == "reference" and slower == dict(event="slower_attention", ranks=1, reason=reason)


@pytest.mark.parametrize("script, module", [
    ("train_gpt.py", "brotli"), ("tools/launch.py", "brotli"), ("tools/check_machine.py", "brotli"), ("tools/diff_recipes.py", "brotli"),
    ("prepare_caseops_data.py", "tqdm")])
def test_an_interrupt_while_modules_are_imported_ends_in_silence(tmp_path, script, module):
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'here')!r}, 'w').close()\nimport time\ntime.sleep(60)\n")
    with start({"PYTHONPATH": str(tmp_path)}, script=ROOT / script,
               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        while not (tmp_path / "here").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


# --- A busy machine


@pytest.mark.parametrize("given, taken", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_waiting_threads_sleep_instead_of_spinning(given, taken):
    """What OpenMP itself says that it has read."""
    process = start(given | {"OMP_DISPLAY_ENV": "verbose"}, "--help")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and re.search(rf"GOMP_SPINCOUNT = '{taken}'", err)


def test_a_run_beside_a_busy_process_for_each_core_ends_and_learns(place):
    """Its threads, one for each core, wait for each other at every operation; how long it takes is not asked."""
    cores = os.cpu_count()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        result = launch(environment(place, ITERATIONS=10, PREQUANT_ONLY=1, OMP_NUM_THREADS=cores))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert result.returncode == 0, result.stderr
    losses = [event["train_loss"] for event in events(record(place), "step")]
    assert losses[-1] < losses[0] - 0.1
    machine = record(place)["machine"]
    assert machine["cores"] == cores and machine["load"] >= 0


def test_a_rank_says_what_it_lacks(place):
    """torchrun ends the other ranks as soon as one has failed: only the first to fail is sure to be heard."""
    (place / "empty").mkdir()
    script = on_rank(
        place, 1, f"empty = {str(place / 'empty')!r}; load = g.TrainingData; "
                  "g.TrainingData = lambda s, runtime: "
                  "started() or load(dataclasses.replace(s, data_path=empty), runtime)")
    result = launch(environment(place), ranks=2, script=script)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert result.returncode != 0
    assert line.startswith("train_gpt.py: rank 1: ") and str(place / "empty") in line
    assert record(place)["status"] == "failed"


def test_rank_0_has_its_say_though_the_launcher_ends_it(place):
    """Where every rank has the same fault, torchrun's signal can come while rank 0 closes its record."""
    script = on_rank(
        place, 0, f"os.environ['DATA_PATH'] = {str(place / 'nowhere')!r}; close = g.RunLog.close; "
                  "g.RunLog.close = lambda *a, **k: (os.kill(os.getpid(), 15), close(*a, **k))")
    result = launch(environment(place), ranks=2, script=script)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert result.returncode != 0 and str(place / "nowhere") in line
    [failed] = events(record(place), "failed")
    assert record(place)["status"] == "failed" and "nowhere" in failed["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_its_way_does_not_hide_the_failure(place, number):
    """It comes while a C function runs, which then fails: Python handles it at its next call."""
    script = place / "fails.py"
    script.write_text(f"""\
import itertools, os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as g
children = []
def run(*_):
    children.append(subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{number:d} {{os.getpid()}}"]))
    sum(itertools.chain(range(10**8), [None]))
g.run = run
sys.exit(g.main([], dict(os.environ)))
""")
    result = launch(environment(place), script=script,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    [failed] = events(record(place), "failed")
    assert record(place)["status"] == "failed" and "TypeError" in failed["error"]
    assert result.returncode == 1, result.stderr


def test_rank_0_s_artifact_is_scored_whatever_lies_on_other_disks(place):
    """Two nodes without a shared file system: the second one holds the artifact of an earlier, worse run."""
    run_here(place, ITERATIONS=1, RUN_ID="earlier")
    shutil.copytree(place / "out", place / "elsewhere")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(ITERATIONS=6, LOCAL_RANK=0, WORLD_SIZE=2, GRAD_ACCUM_STEPS=1, MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port)
    nodes = [dict(RUN_ID="node0", RANK=0, ARTIFACT_DIR=place / "out"),
             dict(RUN_ID="node1", RANK=1, ARTIFACT_DIR=place / "elsewhere")]
    processes = [start(environment(place, **node, **common)) for node in nodes]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    results = record(place, "node0")["results"]
    assert results["quantized"]["val_bpb"] == pytest.approx(results["averaged"]["val_bpb"], abs=0.03)


def test_a_dead_rank_ends_the_launch(place):
    with start(environment(place, ITERATIONS=400, PREQUANT_ONLY=1, GRAD_ACCUM_STEPS=1), ranks=2) as launcher:
        for line in launcher.stdout:
            if line.startswith("step step:2 "):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        [victim] = [int(pid) for pid in children
                    if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(victim, signal.SIGKILL)
        launcher.stdout.read()
        assert launcher.wait(300) != 0
    assert record(place)["status"] == "failed"


def test_a_diverged_run_names_its_step_and_leaves_the_old_artifact(place):
    (place / "out").mkdir()
    (place / "out" / "final_model.int6.ptz").write_bytes(b"old")
    result = main_here(environment(place, MATRIX_LR=1e30, TIED_EMBED_LR=1e30, ITERATIONS=6,
                                   TRAIN_LOG_EVERY=0))
    [line] = result.stderr.splitlines()
    assert result.returncode == 1 and "diverged: the loss of step 2 is" in line and "MATRIX_LR" in line
    stopped = record(place)
    assert stopped["status"] == "failed" and "step 2" in stopped["events"][-1]["error"]
    assert len(events(stopped, "step")) == 1
    assert (place / "out" / "final_model.int6.ptz").read_bytes() == b"old"


def test_a_second_run_in_the_folder_is_refused(place):
    with start(environment(place, ITERATIONS=4000, PREQUANT_ONLY=1)) as process:
        for line in process.stdout:
            if line.startswith("step step:1 "):
                break
        second = main_here(environment(place, RUN_ID="second", ITERATIONS=1))
        process.terminate()
        process.stdout.read()
    [line] = second.stderr.splitlines()
    assert second.returncode == 2 and line.startswith("train_gpt.py: ARTIFACT_DIR: another run")
    assert not list((place / "out").glob("second*"))
    again = main_here(environment(place, RUN_ID="second", ITERATIONS=1, PREQUANT_ONLY=1))
    assert again.returncode == 0, "it is free again"


def test_a_full_disk_fails_with_one_line_and_leaves_nothing_half_written(place):
    limit = 60_000  # bytes a file may have: the record fits, the artifact does not
    result = launch(environment(place, ITERATIONS=2),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and "final_model.int6.ptz" in line
    stopped = record(place)
    assert stopped["status"] == "failed" and "averaged" in stopped["results"]
    assert events(stopped, "no_checkpoint")
    assert sorted(path.name for path in (place / "out").iterdir()) == ["tiny.json", "tiny.txt"]


# --- A console that goes away


def gone(kind: str):
    """A stream like the program's own whose terminal, pipe or disk no longer takes anything."""
    if kind == "none":
        return None
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


@pytest.mark.parametrize("kind", ["pipe", "full disk", "none"])
def test_a_console_that_goes_away_does_not_end_the_run(place, kind, monkeypatch):
    out, err = gone(kind), gone(kind)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = g.main([], environment(place, ITERATIONS=2, PREQUANT_ONLY=1))
    assert g.main([], environment(place, RUN_ID="bad", NUM_HEADS=7)) == 2
    monkeypatch.undo()
    for stream in filter(None, (out, err)):
        stream.close()  # nothing is left in it that could fail now
    assert code == 0 and record(place)["status"] == "finished"
    assert_log_agrees(place)


def test_a_program_without_streams_finishes(place):
    """Started with stdout and stderr closed, where the first files that it opens could take their numbers."""
    result = launch(environment(place, ITERATIONS=1, PREQUANT_ONLY=1),
                    preexec_fn=lambda: (os.close(1), os.close(2)))
    assert result.returncode == 0 and record(place)["status"] == "finished"
    assert_log_agrees(place)


def test_nohup_is_kept(place):
    with start(environment(place, ITERATIONS=30, PREQUANT_ONLY=1),
               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        for line in process.stdout:
            if line.startswith("step step:2 "):
                process.send_signal(signal.SIGHUP)
                break
        process.stdout.read()
        assert process.wait(300) == 0
    assert record(place)["status"] == "finished"


@pytest.mark.parametrize("file", ["log", "record"])
def test_the_record_is_closed_whatever_cannot_be_written(place, monkeypatch, file):
    """A disk that is full when the run ends: for its log, or for another copy of its record."""
    s = tiny(place)
    log = g.RunLog(s, runtime())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == "log":
        log.file.close()
        monkeypatch.setattr(log, "file", SimpleNamespace(write=full, close=lambda: None))
        with pytest.raises(OSError, match="tiny.txt"):
            log.close("failed", error="broken")
    else:
        monkeypatch.setattr(host, "write_whole", full)
        log.close("failed", error="broken")
    assert record(place)["status"] == "failed"


def test_a_name_that_is_no_text_can_be_logged(place):
    """Of a file system, where a name is bytes."""
    (place / "data").rename(place / os.fsdecode(b"data\xff"))
    result = main_here(environment(place, DATA_PATH=place / os.fsdecode(b"data\xff"), ITERATIONS=1, PREQUANT_ONLY=1))
    assert result.returncode == 0 and record(place)["status"] == "finished"


# --- Folders and files


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(place, name):
    (place / "file").write_text("")
    result = main_here(environment(place, ARTIFACT_DIR=place / name))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("train_gpt.py: ARTIFACT_DIR: nothing can be written in")
    assert not result.stdout


def test_a_second_run_says_what_it_replaces(place):
    common = dict(ITERATIONS=1, STEP_RULE="sigma")
    first = main_here(environment(place, RUN_ID="first", **common))
    second = main_here(environment(place, RUN_ID="second", **common))
    assert (first.returncode, second.returncode) == (0, 0)
    assert not events(record(place, "first"), "replaces")
    [event] = events(record(place, "second"), "replaces")
    assert event["artifact"] == str(place / "out" / "final_model.int6.ptz") and "ARTIFACT_DIR" in event["to_keep_it"]
    assert second.stdout.index("replaces artifact:") < second.stdout.index("step step:1 ")


def test_renamed_files_and_their_folder_are_on_disk(tmp_path, monkeypatch):
    """The content before the name, the name before anything relies on it."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths[1]))
    g.write_whole(str(tmp_path / "file"), b"new")
    assert len(calls) == 3 and calls[0].startswith(str(tmp_path / "file.")) and calls[1:] == [
        str(tmp_path / "file"), str(tmp_path)]


# --- Memory


def test_a_run_that_cannot_fit_is_refused_with_its_estimate(place, monkeypatch):
    monkeypatch.setattr(g, "machine_memory", lambda: 2**20)
    result = main_here(environment(place))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("train_gpt.py: GRAD_ACCUM_STEPS: 2") and "out of memory" in line
    assert not events(record(place), "step") and record(place)["status"] == "failed"


@pytest.mark.parametrize("stage", ["GPT", "Learner"])
@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")], ids=["host", "gpu", "cpu", "cublas"])
def test_running_out_of_memory_is_one_line(place, monkeypatch, error, stage):
    def fail(*_):
        raise error

    monkeypatch.setattr(g, stage, fail)
    result = main_here(environment(place, ITERATIONS=1, TTT_ENABLED=int(stage == "Learner")))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and "GRAD_ACCUM_STEPS" in line and "GiB" in line and "TTT_BATCH_SIZE" in line
    assert "Traceback" not in result.stdout and record(place)["status"] == "failed"


def test_a_cpu_run_is_not_killed_for_its_memory(place):
    """It has a limit below which an allocation fails, and the run says so in one line."""
    limit = 2**29
    result = launch(environment(place, TRAIN_BATCH_TOKENS=49152, GRAD_ACCUM_STEPS=1, ITERATIONS=1, WARMUP_STEPS=0),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    [line] = [line for line in result.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert result.returncode == 2 and "GRAD_ACCUM_STEPS: 1" in line and record(place)["status"] == "failed"


@pytest.mark.parametrize("tokens, gib", [(98_304, 153 * 10**9 / 2**30)])
def test_the_estimate_is_what_was_measured(tokens, gib):
    """The record model on a CPU took 1.557 MB a token: 5.34 GB at its peak with 3,072 tokens, 2.15 GB with 1,024."""
    s = g.Settings(train_batch_tokens=8 * tokens)
    said = str(g.memory_error(s, runtime(), 0.0))
    assert float(re.search(r"about ([\d,.]+) GiB", said)[1].replace(",", "")) == pytest.approx(gib, rel=0.1)


# --- Caps


@pytest.mark.parametrize("changes, scored", [({}, "quantized"), (dict(PREQUANT_ONLY=1), "averaged")])
def test_a_run_over_its_training_cap_fails_once_all_is_scored(place, ticking, changes, scored):
    """Each look at the clock is 0.4 s later, so the first step alone takes more than the whole budget."""
    result = main_here(environment(place, MAX_WALLCLOCK_SECONDS=0.7, GPTQ_RESERVE_SECONDS=0.65, ITERATIONS=1000,
                                   GPTQ_CALIBRATION_BATCHES=0, STEP_RULE="sigma", **changes))
    [line] = result.stderr.splitlines()
    failed = record(place)
    assert result.returncode == 1 and "training took" in line and "the cap is 0.7" in line
    assert failed["status"] == "failed" and not failed["results"]["training"]["within_cap"]
    [step] = events(failed, "step")
    assert step["share"] > 1 and scored in failed["results"]


def test_a_target_that_cannot_be_met_fails(place):
    code = len(g.packed_code())
    refused = main_here(environment(place, TARGET_BYTES=code, ITERATIONS=1))
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 2 and "TARGET_BYTES" in line and not events(record(place), "step")
    missed = main_here(environment(place, TARGET_BYTES=code + 1000, ITERATIONS=1, RUN_ID="missed"))
    [line] = missed.stderr.splitlines()
    failed = record(place, "missed")
    assert missed.returncode == 1 and f"TARGET_BYTES is {code + 1000}" in line
    assert failed["status"] == "failed" and "quantized" in failed["results"]


def test_step_lines_tell_the_share_done_and_the_time_left(finished):
    steps = events(finished.record, "step")
    assert [step["share"] for step in steps] == [round(step["step"] / 30, 4) for step in steps]
    assert all(step["eta_seconds"] > 0 for step in steps[:-1]) and steps[-1]["eta_seconds"] == 0
