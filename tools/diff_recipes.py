"""What two recipes set differently.

    python tools/diff_recipes.py A B     names of recipes/*.env, or files like them
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt during the imports ends it in silence

ROOT = Path(__file__).resolve().parent.parent
# In a submission train_gpt.py is packed, and source/ has the modules.
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]

from env_settings import InputError, fields_by_group, read_recipe, setting_text  # noqa: E402
from train_gpt import Settings  # noqa: E402


def settings_of(name: str) -> Settings:
    """The settings of recipes/NAME.env, or of the file NAME."""
    path = name if os.path.exists(name) else str(ROOT / "recipes" / f"{name}.env")
    values = read_recipe(path, Settings)
    try:
        return Settings.from_environment(values)
    except InputError as error:  # of settings that contradict each other
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def settings_diff(names: list[str]) -> str:
    """The settings in which two recipes differ, under the headings of --help, a line each."""
    recipes = [settings_of(name) for name in names]
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
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("recipes", nargs=2, metavar="RECIPE")
    options = parser.parse_args(arguments)
    try:
        print(settings_diff(options.recipes))
    except InputError as error:
        for line in str(error).splitlines():
            print(f"diff_recipes.py: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
