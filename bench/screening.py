"""Tables and effects of the screening runs in bench/records/screening, as docs/measurements.md quotes them.

    python bench/screening.py

matrix_lr_*.json differ in MATRIX_LR alone. factors_*.json are eight runs in which seven settings vary at once
between two values, so that any two settings meet in all four pairs of values equally often (a design of
Plackett & Burman 1946). An effect is the mean of the four runs with one value minus that of the other four.
"""
import json
import statistics
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records" / "screening"
FACTORS = (
    "TIED_EMBED_LR",
    "SCALAR_LR",
    "MIN_LR",
    "WARMDOWN_FRAC",
    "ENABLE_LOOPING_AT",
    "MUON_WD",
    "EMA_DECAY",
)


def read(pattern: str) -> list[dict]:
    """The records of one kind, best averaged weights first."""
    paths = sorted(RECORDS.glob(pattern))
    records = [json.loads(path.read_text()) for path in paths]
    return sorted(records, key=lambda record: score(record, "averaged"))


def score(record: dict, weights: str) -> float:
    """val_bpb of the raw or averaged weights."""
    return record["results"][weights]["val_bpb"]


def value(record: dict, name: str) -> float:
    return record["settings"][name.lower()]


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


def report() -> list[str]:
    """The three tables."""
    design = read("factors_*.json")
    learning_rates = read("matrix_lr_*.json")
    return [runs(("MATRIX_LR",), learning_rates), runs(FACTORS, design), effects(design)]


if __name__ == "__main__":
    print("\n".join(report()), end="")
