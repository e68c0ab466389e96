"""bench/batch_law.py: a law that is known is found again, what does not belong to it is left out, too little is refused."""
import json
import math

import numpy as np
import pytest

from bench import batch_law

SETTINGS = dict(max_wallclock_seconds=60.0, train_batch_tokens=98304, matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.03,
                seed=1, ema_share=0.04, num_layers=11, run_id="run")
SPEED = 1_000_000


def best(tokens: float) -> tuple[float, float]:
    """The batch and rate that are best in the law of these tests."""
    return 98304 * (tokens / 60e6) ** 0.4, 0.03 * (tokens / 60e6) ** -0.2


def bpb_by_law(tokens: float, batch: float, rate: float) -> float:
    x, y = math.log2(batch / best(tokens)[0]), math.log2(rate / best(tokens)[1])
    return 1.9 - 0.03 * math.log2(tokens) + 0.006 * x * x - 0.004 * x * y + 0.01 * y * y


def write(folder, name: str, noise: float = 0.0, **settings) -> None:
    s = SETTINGS | settings
    tokens = round(s["max_wallclock_seconds"] * SPEED)
    bpb = bpb_by_law(tokens, s["train_batch_tokens"], s["matrix_lr"]) + noise
    results = dict(training=dict(tokens=tokens, steps=tokens // s["train_batch_tokens"]), averaged=dict(val_bpb=bpb))
    (folder / name).mkdir(parents=True)
    (folder / name / "run.json").write_text(json.dumps(dict(status="finished", settings=s, results=results)))
    (folder / name / "sweep.json").write_text("{}")


def write_grid(folder, spread: float = 0.0, budgets=(60.0, 120.0, 240.0)) -> None:
    draw = np.random.default_rng(7)
    for seconds in budgets:
        for batch in (49152, 98304, 196608):
            for rate in (0.014, 0.02, 0.028):
                write(folder, f"{seconds:g}_{batch}_{rate}", spread * draw.standard_normal(), train_batch_tokens=batch,
                      max_wallclock_seconds=seconds, matrix_lr=rate)


def test_a_known_law_is_found_again(tmp_path):
    write_grid(tmp_path)
    runs, left_out = batch_law.read_runs([tmp_path])
    law = batch_law.fit(runs)
    assert len(runs) == 27 and not left_out and law.error < 1e-12
    assert batch_law.exponents(law.coefficients) == pytest.approx([0.4, -0.2])
    for tokens in (60e6, 240e6, 4.8e9):
        assert 2 ** batch_law.optimum(law.coefficients, tokens, law.middle) == pytest.approx(best(tokens))


def noisy_runs(seed: int) -> list[batch_law.Run]:
    """A grid of three budgets with errors of 0.0005 bits per byte."""
    draw = np.random.default_rng(seed)
    runs = []
    for seconds in (60.0, 120.0, 240.0):
        for batch in (49152, 98304, 196608):
            for rate in (0.014, 0.02, 0.028):
                tokens = round(seconds * SPEED)
                bpb = bpb_by_law(tokens, batch, rate) + 0.0005 * draw.standard_normal()
                runs.append(batch_law.Run("", seconds, tokens, 1, batch, rate, 1.0, bpb))
    return runs


def test_the_interval_grows_with_the_distance_and_holds_the_truth(monkeypatch):
    monkeypatch.setattr(batch_law, "RESAMPLES", 300)
    held = []
    for seed in range(30):
        law = batch_law.fit(noisy_runs(seed))
        assert law.error == pytest.approx(0.0005, rel=0.5)
        widths = []
        for tokens in (240e6, 4.8e9):
            low, high = batch_law.interval(law, lambda coefficients: batch_law.optimum(coefficients, tokens, law.middle))
            held.append((low < np.log2(best(tokens))) & (np.log2(best(tokens)) < high))
            widths.append(high - low)
        assert np.all(widths[1] > 2 * widths[0])
    assert 0.75 < np.mean(held) < 0.99  # of 0.9


def test_runs_that_differ_in_something_else_are_left_out(tmp_path):
    write_grid(tmp_path)
    write(tmp_path, "deeper", num_layers=12)
    write(tmp_path, "another_embedding_rate", tied_embed_lr=0.015)
    write(tmp_path, "all_rates", matrix_lr=0.04, scalar_lr=0.04, tied_embed_lr=0.06)
    write(tmp_path, "another_seed", seed=2, ema_share=0.03)
    runs, left_out = batch_law.read_runs([tmp_path])
    assert left_out == [str(tmp_path / name / "run.json") for name in ("another_embedding_rate", "deeper")] and len(runs) == 29
    table = batch_law.table_of_runs(runs).splitlines()
    assert len(table) == 2 + 28
    assert any(row.startswith("| 60 | 98,304 | 0.02 | 1.00 | 2 | 610 | 60M | 1.12") for row in table)
    assert any(row.startswith("| 60 | 98,304 | 0.04 | 2.00 | 1 | 610 | 60M | 1.1") for row in table)


@pytest.mark.parametrize("budgets, rates, words", [
    ((60.0,), (0.014, 0.02, 0.028), "6 runs in 1 budgets"), ((60.0, 120.0), (0.02,), "do not determine the law")])
def test_too_little_is_refused_in_one_line(tmp_path, capsys, budgets, rates, words):
    for seconds in budgets:
        for batch in (49152, 98304):
            for rate in rates:
                write(tmp_path, f"{seconds}_{batch}_{rate}", max_wallclock_seconds=seconds, train_batch_tokens=batch, matrix_lr=rate)
    assert batch_law.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("batch_law.py: ") and words in err and err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{")
    assert batch_law.main([str(tmp_path / "half")]) == 2 and "run.json: no JSON" in capsys.readouterr().err
    assert batch_law.main([str(tmp_path / "empty")]) == 2 and "no record of a training run" in capsys.readouterr().err


def test_tables_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_grid(tmp_path / "runs", spread=0.0003)
    assert batch_law.main([str(tmp_path / "runs"), "--gpus", "2", "--seconds", "600", "--figure", str(tmp_path / "law.png")]) == 0
    out = capsys.readouterr().out
    assert "| record | 1,200M | " in out and "The record's budget is 5.0 times the longest measured one." in out
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
