"""Tables and effects of short runs on one GPU, as docs/measurements.md quotes them.

    python bench/screening.py

bench/records/mini_rates holds runs that change one or two settings of a common set, without their step lines.
In bench/records/screening, matrix_lr_*.json differ in MATRIX_LR alone. factors_*.json are eight runs in which
seven settings vary at once between two values, so that any two settings meet in all four pairs of values
equally often (a design of Plackett & Burman 1946). An effect is the mean of the four runs with one value
minus that of the other four.
"""
import json
import statistics
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records"
FACTORS = (
    "TIED_EMBED_LR",
    "SCALAR_LR",
    "MIN_LR",
    "WARMDOWN_FRAC",
    "ENABLE_LOOPING_AT",
    "MUON_WD",
    "EMA_DECAY",
)
# What the runs of mini_rates change, and the values of those that change nothing.
BASE = {
    "train_batch_tokens": 98304,
    "matrix_lr": 0.0196,
    "tied_embed_lr": 0.018,
    "muon_wd": 0.095,
    "enable_looping_at": 0.5,
    "min_lr": 0.1,
    "fp8": "auto",
    "gated_xsa": False,
    "leaky_relu_sq_slope": 0.5,
    "seed": 42,
}


def read(pattern: str) -> list[dict]:
    """The records whose paths fit the pattern, best averaged weights first."""
    paths = sorted(RECORDS.glob(pattern))
    records = [json.loads(path.read_text()) for path in paths]
    return sorted(records, key=lambda record: score(record, "averaged"))


def score(record: dict, weights: str) -> float:
    """val_bpb of the raw or averaged weights."""
    return record["results"][weights]["val_bpb"]


def value(record: dict, name: str) -> float:
    found = record["settings"][name.lower()]
    return int(found) if isinstance(found, bool) else found


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs(names: tuple[str, ...], records: list[dict]) -> str:
    """A row a run: its settings, its steps and speed, its scores."""
    head = [f"`{name}`" for name in names]
    head += ["steps", "tokens/s before looping", "raw", "averaged"]
    rows = []
    for record in records:
        training = record["results"]["training"]
        speed = training["tokens_per_second_plain"] / 1e6
        row = [f"{value(record, name):g}" for name in names]
        row += [str(training["steps"]), f"{speed:.3f}M"]
        row += [f"{score(record, weights):.5f}" for weights in ("raw", "averaged")]
        rows.append(row)
    return markdown(head, rows)


def effect(name: str, records: list[dict], weights: str) -> float:
    """How much higher val_bpb is with the setting's larger value than with its smaller one."""
    larger = max(value(record, name) for record in records)
    high = []
    low = []
    for record in records:
        side = high if value(record, name) == larger else low
        side.append(score(record, weights))
    assert len(high) == len(low), f"{name}: the runs are no balanced design"
    return statistics.mean(high) - statistics.mean(low)


def effects(records: list[dict]) -> str:
    """A row a setting, the largest effect first, each in the direction that helps the averaged weights."""
    averaged = {name: effect(name, records, "averaged") for name in FACTORS}
    rows = []
    for name in sorted(FACTORS, key=lambda name: -abs(averaged[name])):
        before, after = sorted({value(record, name) for record in records})
        raw = effect(name, records, "raw")
        if averaged[name] > 0:
            before, after = after, before
            raw = -raw
        change = f"`{name}` {before:g} to {after:g}"
        rows.append([change, f"{-abs(averaged[name]):+.4f}", f"{raw:+.4f}"])
    return markdown(["change", "averaged", "raw"], rows)


def describe(record: dict, base: dict) -> str:
    """The settings of BASE in which the record differs from the base."""
    changed = [name.upper() for name in BASE if record["settings"][name] != base["settings"][name]]
    return " ".join(f"`{name}={value(record, name)}`" for name in changed) or "nothing"


def changes(seconds: int) -> str:
    """A row a run of so many seconds: what it changes, and what that does to the averaged weights."""
    records = read(f"mini_rates/{seconds}s_*.json")
    base = next(record for record in records if BASE.items() <= record["settings"].items())
    head = ["changed", "GPU", "steps", "tokens/s before looping", "raw", "averaged", "difference"]
    rows = []
    for record in records:
        training = record["results"]["training"]
        difference = score(record, "averaged") - score(base, "averaged")
        row = [describe(record, base), record["gpu"], f"{training['steps']:,}"]
        row += [f"{training['tokens_per_second_plain'] / 1e6:.3f}M"]
        row += [f"{score(record, weights):.5f}" for weights in ("raw", "averaged")]
        rows.append([*row, "" if record is base else f"{difference:+.4f}"])
    return markdown(head, rows)


def report() -> list[str]:
    """The five tables."""
    design = read("screening/factors_*.json")
    learning_rates = read("screening/matrix_lr_*.json")
    rates = runs(("MATRIX_LR",), learning_rates)
    return [changes(240), changes(60), rates, runs(FACTORS, design), effects(design)]


if __name__ == "__main__":
    print("\n".join(report()), end="")
