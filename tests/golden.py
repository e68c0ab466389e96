"""What all recipes compute at toy size on the CPU, to the last bit: a check that a change of the code changes no result.

    python -m tests.golden write FILE      keep today's results
    python -m tests.golden compare FILE    print what differs from them; exit code 1 if anything does

Results hold for one machine and one version of PyTorch.
"""
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from tests.test_recipes import RECIPES, Laboratory

NOT_COMPUTED = ("seconds", "bytes", "sha256", "per_second", "memory", "reserve", "process", "packed", "file")


def digest(arrays) -> str:
    """SHA-256 of the arrays' dtypes, shapes and values."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def computed(value):
    """A record's figures without times and sizes."""
    if isinstance(value, dict):
        return {name: computed(item) for name, item in value.items() if not any(word in name for word in NOT_COMPUTED)}
    if isinstance(value, list):
        return [computed(item) for item in value]
    return value


def measure(recipe: str, lab: Laboratory) -> dict:
    run = lab.run(recipe)
    figures = {name: computed(fields) for name, fields in run.record["results"].items()}
    losses = [event["train_loss"] for event in run.record["events"] if "train_loss" in event]
    arrays = {name: digest([array]) for name, array in sorted(run.arrays.items())}
    trained = {name: digest([array]) for name, array in sorted(run.trained.items())}
    return dict(results=figures, train_losses=losses, trained=trained, artifact=arrays)


def differences(old, new, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{path}/{name}")]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def main(command: str, path: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder))
        figures = {recipe: measure(recipe, lab) for recipe in RECIPES}
    figures = json.loads(json.dumps(figures))
    if command == "write":
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
        return 0
    lines = differences(json.loads(Path(path).read_text()), figures)
    print("\n".join(lines) or "all results are the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
