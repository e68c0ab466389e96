"""What two recipes set differently.

    python tools/diff_recipes.py A B     names of recipes/*.env, or files like them
"""
from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In a submission train_gpt.py is packed, and source/ has the modules.
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]

from env_settings import InputError, fields_by_group, setting_text  # noqa: E402
from train_gpt import Settings  # noqa: E402


def read_recipe(name: str) -> Settings:
    """The settings of recipes/NAME.env, or of the file NAME: lines NAME=VALUE, empty ones, and # comments."""
    path = name if os.path.exists(name) else str(ROOT / "recipes" / f"{name}.env")
    values = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip() and not line.startswith("#"):
                    variable, value = re.fullmatch(r"(\w+)=(.*)", line.strip()).groups()
                    values[variable] = value
        return Settings.from_environment(values)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name one of recipes/*.env or a file like them") from None
    except (UnicodeDecodeError, AttributeError):
        raise InputError(f"{path}: no recipe, which has lines NAME=VALUE and comments alone") from None
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def settings_diff(names: list[str]) -> str:
    """The settings in which two recipes differ, under the headings of --help, a line each."""
    recipes = [read_recipe(name) for name in names]
    lines = []
    for group, fields in fields_by_group(Settings).items():
        changed = []
        for field in fields:
            first, second = (setting_text(getattr(recipe, field.name)) or "(empty)" for recipe in recipes)
            if first != second:
                changed.append(f"  {field.name.upper():30} {first:>24} {second:>24}")
        if changed:
            lines += ["", group, *changed]
    title = f"{'':32} {names[0]:>24} {names[1]:>24}"
    return "\n".join([title, *(lines or ["no difference"])])


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
