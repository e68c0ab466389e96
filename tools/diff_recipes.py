"""What two recipes set differently.

    python tools/diff_recipes.py A B     names of recipes/*.env, or files like them
"""
from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]  # in a submission train_gpt.py is packed, and source/ has the modules

from env_settings import InputError, setting_text  # noqa: E402
from train_gpt import Settings  # noqa: E402


def read_recipe(name: str) -> Settings:
    """The settings of recipes/NAME.env, or of the file NAME: lines NAME=VALUE, empty ones, and comments that begin with #."""
    path = name if os.path.exists(name) else str(ROOT / "recipes" / f"{name}.env")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        return Settings.from_environment(dict(re.fullmatch(r"(\w+)=(.*)", line).groups() for line in lines))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name one of recipes/*.env or a file like them") from None
    except (UnicodeDecodeError, AttributeError):
        raise InputError(f"{path}: no recipe, which has lines NAME=VALUE and comments alone") from None
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def settings_diff(names: list[str]) -> str:
    """The settings in which two recipes differ, grouped like settings_help, a line each."""
    sides, lines = [read_recipe(name) for name in names], []
    for group, fields in itertools.groupby(dataclasses.fields(Settings), key=lambda f: f.metadata["group"]):
        values = [(f.name.upper(), *(setting_text(getattr(side, f.name)) for side in sides)) for f in fields]
        changed = [row for row in values if row[1] != row[2]]
        lines += ["", group] * bool(changed) + [f"  {name:30} {a:>24} {b:>24}" for name, a, b in changed]
    return "\n".join([f"{'':32} {names[0]:>24} {names[1]:>24}", *(lines or ["no difference"])])


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 2:
            raise InputError("name two recipes: names of recipes/*.env, or files like them")
        print(settings_diff(arguments))
    except InputError as error:
        for line in str(error).splitlines():
            print(f"diff_recipes.py: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
