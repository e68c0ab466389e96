"""The best batch and learning rate by budget, from the records of a sweep; extrapolated to the record's.

    python bench/batch_law.py FOLDER... [--speed 1200000] [--gpus 8] [--seconds 600] [--figure FILE.png]

FOLDER holds run records, also in folders of their own, as tools/sweep.py leaves them. Runs with the same
MAX_WALLCLOCK_SECONDS are a budget. Those count that differ from most runs in clock, batch, MATRIX_LR, seed
and the lengths of average and momentum alone; the other learning rates may be multiplied by MATRIX_LR's
factor too. The rest is named and left out.

With z = (log2 batch, log2 MATRIX_LR), n = log2 of the tokens that a budget's runs saw on average, both less
their means, and c one constant a budget, the bits per byte of the averaged weights are fitted by

    bpb = c + (a + b n) . z + z . H z

which is linear in c, a, b, H. In each budget it is a parabola, of the same curvature H in all; the optimum
z = -H^-1 (a + b n) / 2 is a power law of the tokens. Intervals hold 90 % of the fits to resampled residuals.
"""
from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What may differ between runs of one law besides batch, rates and budget.
FREE = {
    "run_id", "artifact_dir", "data_dir", "data_path", "seed", "grad_accum_steps", "prequant_only",
    "train_log_every", "ema_decay", "ema_share", "muon_momentum_warmup_steps", "muon_momentum_warmup_share",
}
RATES = ("matrix_lr", "scalar_lr", "tied_embed_lr")
VARIED = FREE | set(RATES) | {"train_batch_tokens", "max_wallclock_seconds"}
RESAMPLES = 1000


class InputError(Exception):
    """The records do not make a law: one line."""


class Run(NamedTuple):
    name: str
    seconds: float  # the budget
    tokens: int  # that training saw
    steps: int
    batch: int
    rate: float  # MATRIX_LR
    factor: float  # that over most runs'
    bpb: float


class Law(NamedTuple):
    budgets: list[float]  # seconds
    tokens: list[float]  # of each budget, mean of its runs
    middle: np.ndarray  # (log2 tokens, log2 batch, log2 rate), means over the runs
    coefficients: np.ndarray  # c of each budget, a (2), b (2), then H[0, 0], H[0, 1], H[1, 1]
    error: float  # standard deviation of the residuals, bits per byte
    resampled: np.ndarray  # coefficients of the fits to resampled residuals, those with an optimum


# --- Records


def read_records(folders: list[Path]) -> dict[str, dict]:
    """The finished training runs of the folders, by path."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"{path}: no JSON; is its run still under way?") from None
            if isinstance(record, dict) and {"training", "averaged"} <= record.get("results", {}).keys():
                found[str(path)] = record
    return found


def most_common(values: list):
    return collections.Counter(values).most_common(1)[0][0]


def fixed_settings(settings: dict) -> str:
    """What has to be the same in all runs of a law."""
    return json.dumps({name: value for name, value in settings.items() if name not in VARIED}, sort_keys=True)


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs of the law, and the names of those that differ in something else."""
    records = read_records(folders)
    if not records:
        raise InputError(f"{', '.join(map(str, folders))}: no record of a training run in it")
    fixed = {name: fixed_settings(record["settings"]) for name, record in records.items()}
    usual = most_common(list(fixed.values()))
    alike = {name: record for name, record in records.items() if fixed[name] == usual}
    base = {}
    for rate in RATES:
        base[rate] = most_common([record["settings"][rate] for record in alike.values()])
    runs = []
    for name, record in alike.items():
        s = record["settings"]
        factor, *others = (s[rate] / base[rate] for rate in RATES)
        if all(other == 1 or math.isclose(other, factor, rel_tol=0.1) for other in others):
            training = record["results"]["training"]
            runs.append(Run(
                name=name,
                seconds=s["max_wallclock_seconds"],
                tokens=training["tokens"],
                steps=training["steps"],
                batch=s["train_batch_tokens"],
                rate=s["matrix_lr"],
                factor=factor,
                bpb=record["results"]["averaged"]["val_bpb"]))
    used = {run.name for run in runs}
    return runs, [name for name in records if name not in used]


# --- The fit


def terms(runs: list[Run], budgets: list[float], tokens: list[float], middle: np.ndarray) -> np.ndarray:
    """What the coefficients of the law are multiplied by, a row a run."""
    rows = []
    for run in runs:
        k = budgets.index(run.seconds)
        constants = np.eye(len(budgets))[k]
        n, x, y = np.log2([tokens[k], run.batch, run.rate]) - middle
        slopes = [x, y, n * x, n * y]
        curves = [x * x, 2 * x * y, y * y]
        rows.append([*constants, *slopes, *curves])
    return np.array(rows)


def curvature(coefficients: np.ndarray) -> np.ndarray:
    """H."""
    xx, xy, yy = coefficients[-3:]
    rows = [[xx, xy], [xy, yy]]
    return np.array(rows)


def optimum(coefficients: np.ndarray, tokens: float, middle: np.ndarray) -> np.ndarray:
    """(log2 batch, log2 MATRIX_LR) at which the law is lowest."""
    n = math.log2(tokens) - middle[0]
    a = coefficients[-7:-5]
    b = coefficients[-5:-3]
    slope = a + b * n
    return middle[1:] - np.linalg.solve(curvature(coefficients), slope) / 2


def exponents(coefficients: np.ndarray) -> np.ndarray:
    """How the best batch and rate grow: with the tokens to these powers."""
    return -np.linalg.solve(curvature(coefficients), coefficients[-5:-3]) / 2


def has_optimum(coefficients: np.ndarray) -> bool:
    return bool(np.linalg.eigvalsh(curvature(coefficients))[0] > 0)


def fit(runs: list[Run]) -> Law:
    """Least squares; raises InputError where the runs do not determine the law."""
    budgets = sorted({run.seconds for run in runs})
    tokens = []
    for seconds in budgets:
        seen = [run.tokens for run in runs if run.seconds == seconds]
        tokens.append(statistics.mean(seen))
    places = [(tokens[budgets.index(run.seconds)], run.batch, run.rate) for run in runs]
    middle = np.log2(places).mean(axis=0)
    rows = terms(runs, budgets, tokens, middle)
    bpb = np.array([run.bpb for run in runs])
    if np.linalg.matrix_rank(rows, tol=1e-6) < rows.shape[1] or len(budgets) < 2:
        raise InputError(f"{len(runs)} runs in {len(budgets)} budgets do not determine the law: it needs two "
                         "budgets or more, and three batches and three rates that do not vary together")
    solve = np.linalg.pinv(rows)
    coefficients = solve @ bpb
    if not has_optimum(coefficients):
        raise InputError("the fit has no lowest point: add batches or rates beyond the best ones so far")
    residuals = bpb - rows @ coefficients
    freedom = len(runs) - rows.shape[1]
    error = math.nan
    resampled = []
    if freedom > 0:
        error = math.sqrt(residuals @ residuals / freedom)
        # Residuals of a fit are smaller than the errors by the share of its coefficients.
        errors = residuals * math.sqrt(len(runs) / freedom)
        draw = np.random.default_rng(0)
        for _ in range(RESAMPLES):
            again = rows @ coefficients + draw.choice(errors, len(runs))
            other = solve @ again
            if has_optimum(other):
                resampled.append(other)
    return Law(budgets, tokens, middle, coefficients, error, np.array(resampled))


def interval(law: Law, figure) -> tuple[np.ndarray, np.ndarray]:
    """The bounds between which `figure` of 90 % of the resampled fits lies."""
    if not len(law.resampled):
        unknown = figure(law.coefficients) * math.nan
        return unknown, unknown
    values = np.array([figure(coefficients) for coefficients in law.resampled])
    low, high = np.quantile(values, [0.05, 0.95], axis=0)
    return low, high


# --- What is printed


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_of_runs(runs: list[Run]) -> str:
    """A row for each budget, batch and rate; seeds are averaged."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.seconds, run.batch, run.rate, run.factor].append(run)
    rows = []
    for (seconds, batch, rate, factor), group in sorted(groups.items()):
        tokens = statistics.mean(run.tokens for run in group)
        steps = statistics.mean(run.steps for run in group)
        bpb = statistics.mean(run.bpb for run in group)
        rows.append([f"{seconds:g}", f"{batch:,}", f"{rate:g}", f"{factor:.2f}", str(len(group)),
                     f"{steps:,.0f}", f"{tokens / 1e6:.0f}M", f"{bpb:.5f}"])
    head = ["clock s", "batch", "`MATRIX_LR`", "factor", "runs", "steps", "tokens", "averaged"]
    return markdown(head, rows)


def with_bounds(value: float, low: float, high: float, form: str) -> str:
    """log2 figures as what they are logarithms of."""
    return f"{2 ** value:{form}} ({2 ** low:{form}} to {2 ** high:{form}})"


def table_of_optima(law: Law, target: float) -> str:
    """The best batch and rate of each budget and of the record's, with intervals."""
    rows = []
    for seconds, tokens in zip([*law.budgets, None], [*law.tokens, target]):
        best = optimum(law.coefficients, tokens, law.middle)
        low, high = interval(law, lambda coefficients: optimum(coefficients, tokens, law.middle))
        batch = with_bounds(best[0], low[0], high[0], ",.0f")
        rate = with_bounds(best[1], low[1], high[1], ".4f")
        clock = "record" if seconds is None else f"{seconds:g}"
        rows.append([clock, f"{tokens / 1e6:,.0f}M", batch, rate, f"{tokens / 2 ** best[0]:,.0f}"])
    return markdown(["clock s", "tokens", "best batch", "best `MATRIX_LR`", "steps"], rows)


def describe(law: Law, runs: list[Run], left_out: list[str], target: float) -> str:
    power = exponents(law.coefficients)
    low, high = interval(law, exponents)
    sentences = [
        f"{len(runs)} runs, {len(left_out)} left out, {len(law.coefficients)} coefficients; residuals of "
        f"{law.error:.5f} bits per byte.",
        f"The best batch grows with the tokens to the power {power[0]:.2f} ({low[0]:.2f} to {high[0]:.2f}),",
        f"the best MATRIX_LR with {power[1]:.2f} ({low[1]:.2f} to {high[1]:.2f}).",
        f"{len(law.resampled)} of {RESAMPLES} resampled fits have a lowest point.",
        f"The record's budget is {target / law.tokens[-1]:.1f} times the longest measured one."]
    return "\n".join([table_of_runs(runs), table_of_optima(law, target), *sentences,
                      *(f"left out: {name}" for name in left_out)]) + "\n"


# --- The figure


def draw_budget(axes, k: int, law: Law, runs: list[Run]) -> None:
    """A budget's parabola over the batch, at the best rate of each; runs are moved there along the fit."""
    best = optimum(law.coefficients, law.tokens[k], law.middle)
    h = curvature(law.coefficients)
    away = best - law.middle[1:]
    lowest = law.coefficients[k] - away @ h @ away
    stiffness = h[0, 0] - h[0, 1] ** 2 / h[1, 1]

    def parabola(batch):
        return lowest + stiffness * (np.log2(batch) - best[0]) ** 2

    batches = np.array([run.batch for run in runs])
    along = np.geomspace(batches.min() / 1.5, batches.max() * 1.5, 100)
    label = f"{law.budgets[k]:g} s, {law.tokens[k] / 1e6:,.0f}M tokens"
    [line] = axes.plot(along, parabola(along), label=label)
    fitted = terms(runs, law.budgets, law.tokens, law.middle) @ law.coefficients
    residuals = [run.bpb for run in runs] - fitted
    axes.plot(batches, parabola(batches) + residuals, "o", color=line.get_color(), markersize=4)


def draw_optimum(axes, law: Law, target: float) -> None:
    """The best batch over the tokens, from the shortest budget to the record's."""
    def best(tokens):
        return 2 ** optimum(law.coefficients, tokens, law.middle)[0]

    along = np.geomspace(law.tokens[0], target, 60)
    lows = []
    highs = []
    for tokens in along:
        low, high = interval(law, lambda coefficients: optimum(coefficients, tokens, law.middle))
        lows.append(2 ** low[0])
        highs.append(2 ** high[0])
    axes.fill_between(along, lows, highs, alpha=0.2, linewidth=0, label="90 % of resampled fits")
    axes.plot(along, list(map(best, along)), color="C0")
    axes.plot(law.tokens, list(map(best, law.tokens)), "o", color="C0", label="measured budgets")
    axes.plot([target], [best(target)], "*", color="C3", markersize=11, label="the record's budget")


def draw(law: Law, runs: list[Run], target: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, seconds in enumerate(law.budgets):
        draw_budget(left, k, law, [run for run in runs if run.seconds == seconds])
    left.set(xscale="log", xlabel="batch, tokens", ylabel="averaged weights, bits per byte",
             title="at the best rate of each batch")
    draw_optimum(right, law, target)
    right.set(xscale="log", yscale="log", xlabel="tokens of the run", ylabel="tokens", title="the best batch")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main(arguments: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--speed", type=float, help="tokens/s of a GPU; default: the longest budget's median")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0, help="the record's clock")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        runs, left_out = read_runs(options.folders)
        law = fit(runs)
    except InputError as error:
        print(f"batch_law.py: {error}", file=sys.stderr)
        return 2
    speeds = [run.tokens / run.seconds for run in runs if run.seconds == law.budgets[-1]]
    target = (options.speed or statistics.median(speeds)) * options.gpus * options.seconds
    print(describe(law, runs, left_out, target), end="")
    if options.figure:
        draw(law, runs, target, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
