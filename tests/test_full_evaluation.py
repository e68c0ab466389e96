"""bench/full_evaluation.py on a tiny artifact: what is timed, what is counted, the estimate, the figure."""
import importlib.util
import json

import numpy as np
import pytest

import train_gpt as g
from tests.synthetic import ROOT, environment, launch, main_here, runtime, tiny, write_corpus

SCRIPT = ROOT / "bench" / "full_evaluation.py"
spec = importlib.util.spec_from_file_location("full_evaluation", SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

TTT = dict(TTT_ENABLED=1, TTT_BATCH_SIZE=1, TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=128, TTT_LORA_RANK=2, TTT_LORA_LR=0.01,
           PHASED_TTT_PREFIX_DOCS=6, GLOBAL_TTT_CHUNK_TOKENS=128, TOKEN_ORDER=4, TOKEN_BACKOFF="3,2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and an artifact."""
    folder = tmp_path_factory.mktemp("full")
    write_corpus(folder / "data", 60, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setattr(g, "packed_code", lambda: b"")
        assert main_here(environment(folder, ITERATIONS=2, WARMUP_STEPS=0)).returncode == 0
        yield folder


def test_the_text_goes_on_with_training_shards(folder):
    s = tiny(folder, **TTT)
    val = g.ValidationData(s)
    short, long = (bench.StandIn(n, s) for n in (500, len(val.tokens) + 700))
    assert len(short.tokens) == 501 and short.from_training == 0
    np.testing.assert_array_equal(short.bytes, val.bytes[:501])
    assert len(long.tokens) == len(val.tokens) + 701 and long.from_training == 701
    shards = np.concatenate([g.open_shard(path) for path in g.shard_files(s.shards_dir, "train")])
    np.testing.assert_array_equal(long.tokens, np.append(val.tokens, shards[:701]))
    known = {int(t): int(b) for t, b in zip(val.tokens, val.bytes)}  # here a token has its bytes wherever it stands
    found = [(known[t], b) for t, b in zip(long.tokens[-701:].tolist(), long.bytes[-701:].tolist()) if t in known]
    assert len(found) > 300 and all(a == b for a, b in found)


def test_the_record_of_a_tiny_run(folder):
    """Figures are those of the run itself, phases add up, and the running scores end with the totals."""
    s = tiny(folder, **TTT)
    record = json.loads(json.dumps(bench.measure(s, 3000, runtime())))
    bench.report(record)
    model = g.GPT(s)
    looping = g.load_weights(model, s.artifact_path, s, runtime())
    data = bench.StandIn(3000, s)
    plain = g.Evaluator(data, s, runtime()).score(model, looping)
    adapted = g.test_time_training(model, data, looping, s, runtime(), bench.Quiet())
    assert record["plain_bpb"] == pytest.approx(plain["val_bpb"], abs=1e-5)
    for name in ("val_bpb", "untilted_bpb", "targets", "bytes"):
        assert record["adapted"][name] == adapted[name], name
    assert record["running_adapted_bpb"][-1] == pytest.approx(adapted["val_bpb"], abs=1e-5)
    assert record["running_untilted_bpb"][-1] == pytest.approx(adapted["untilted_bpb"], abs=1e-5)
    assert record["global_phases"] == adapted["phases"] != [] and record["hints"] == adapted["hints"] > 0
    phases = record["phases"]
    parts = [phases[name] for name in ("scoring and training, first 95 %", "the tail, last 5 %", "global phases")]
    assert sum(parts) == pytest.approx(phases["test-time training"], rel=0.2) and min(parts) > 0
    assert record["estimate"]["gpus"] == 8 and record["estimate"]["seconds"] > 0
    assert record["running_targets"][-1] == 3000 and len(record["tokens_per_second"]) == 10


def test_two_ranks_write_one_record_and_a_figure(folder):
    """Its command, under torchrun."""
    values = environment(folder, **TTT)
    arguments = "--tokens", "1500", "--record", str(folder / "r.json"), "--figure", str(folder / "r.png")
    result = launch(values | dict(HOME=str(folder)), *arguments, ranks=2, script=SCRIPT)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((folder / "r.json").read_text())
    assert record["targets"] == 1500 and record["machine"]["devices"] == 2
    assert "estimate for 8 GPUs" in result.stdout and (folder / "r.png").stat().st_size > 5000


def test_the_fit_finds_what_a_step_and_an_input_cost():
    chunks = np.random.default_rng(0).integers(0, 96, (60, 16))
    chunks[40:, 2:] = 0
    inputs = bench.busiest(chunks, 2)
    assert inputs[0] == max(chunks[0, ::2].sum(), chunks[0, 1::2].sum())
    seconds = np.cumsum(0.02 + 3e-6 * inputs)
    marks = [(k, 10 * k, seconds[k - 1]) for k in range(5, 61, 5)]
    np.testing.assert_allclose(bench.step_costs(marks, inputs), (0.02, 3e-6), rtol=1e-6)
    adapted = dict(chunks=chunks, marks=marks, hint_seconds=0.1, pack_seconds=0.2, phase_seconds=4.0)
    found = bench.estimate(dict(seconds=8.0), adapted, ranks=2, of=8)
    device = 60 * 0.02 + 3e-6 * bench.busiest(chunks, 8).sum()
    assert found["plain"] == 2 and found["test_time_training"] == pytest.approx(device + 1, abs=0.06)


def test_the_schedule_alone(folder, capsys):
    s = tiny(folder, **TTT)
    bench.print_schedules(bench.StandIn(3000, s), s)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(bench.FAR_GROWTHS) and "3,000 targets" in lines[0]
    chunks = np.array([[5, 5, 5, 5, 5], [5, 0, 0, 0, 0], [5, 5, 0, 0, 0]])
    assert bench.slot_figures(chunks) == dict(steps=3, under_a_quarter=1, share_under_a_quarter=0.3333, in_the_tail=1)
