"""README.md and docs/: links, names, commands and figures are those of the project.

A row of a table that names records, or whose table is introduced by a paragraph that names them, holds only
numbers that stand in one of these records. Numbers with fewer than four significant digits are skipped: they
are too easy to find to prove anything.
"""
import ast
import dataclasses
import fnmatch
import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import get_args_parser

import train_gpt as g
from tests.synthetic import ROOT
from tests.test_recipes import FEATURES, slug
from tools import submission

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = ROOT / "bench" / "records"
# What a run writes, or the reader brings.
NOT_OURS = ("runs/", "logs/", "data/", "report/", "final_model.", "manifest.json", "RUNS.txt")


def every(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


# --- Links and names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every()
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def code_spans(page: Path) -> list[str]:
    """What stands in backticks in the text, code blocks left out."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", prose)


@functools.cache
def defined() -> set[str]:
    """Functions, classes and their members in the project's Python files, members as Class.member."""
    names = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                members = [member for member in node.body if isinstance(member, ast.FunctionDef)]
                names |= {f"{node.name}.{member.name}" for member in members}
    return names


@functools.cache
def constants() -> set[str]:
    """Names in capitals that train_gpt.py defines."""
    statements = ast.parse((ROOT / "train_gpt.py").read_text()).body
    targets = [statement.targets[0] for statement in statements if isinstance(statement, ast.Assign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def figures() -> set[str]:
    """Names of figures in run records."""
    record = json.loads((RECORDS / "mini_record_fp8_seed42.json").read_text())
    return {name for stage in record["results"].values() for name in stage}


@functools.cache
def variables() -> set[str]:
    """Everything that the environment may say to the script or to run.sh."""
    fields = dataclasses.fields(g.Settings)
    names = {field.name.upper() for field in fields} | {field.metadata["rule"].alias for field in fields}
    of_run_sh = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "run.sh").read_text()))
    return names | set(g.Settings.fixed) | of_run_sh


def test_the_words_in_backticks_are_found_at_all():
    spans = {span for page in PAGES for span in code_spans(page)}
    assert len(spans & variables()) > 20 and len(spans & defined()) > 20


VARIABLE = r"([A-Z][A-Z0-9*]*(?:_[A-Z0-9*]+)+)(=\S+)?"  # NAME_OF_IT, NAME_OF_IT=value, NAME_*
NAME = r"\w+\(\)|[a-z]+_\w+|[A-Z]\w*[a-zT](\.\w+)?"  # function(), snake_case, Class, Class.member


@every()
def test_names_in_backticks_exist(page):
    tests_of_features = {slug(feature) for feature in FEATURES}
    known = defined() | figures() | tests_of_features | {path.stem for path in RECORDS.rglob("*")}
    for span in code_spans(page):
        if match := re.fullmatch(VARIABLE, span):
            assert fnmatch.filter(variables() | constants(), match[1]), f"{page.name}: no variable {span}"
        elif re.fullmatch(NAME, span):
            assert span.removesuffix("()") in known, f"{page.name}: no function or class {span}"


@every()
def test_files_in_backticks_exist(page):
    for span in code_spans(page):
        is_path = re.fullmatch(r"[\w./*-]+(/|\.(py|c|sh|env|md|txt|json|model))", span)
        if is_path and not any(fnmatch.fnmatch(span, f"*{name}*") for name in NOT_OURS):
            assert (ROOT / span).exists() or (page.parent / span).exists(), f"{page.name}: no file {span}"


def test_error_messages_are_those_of_the_code():
    text = (ROOT / "docs" / "running.md").read_text()
    table = text.split("## When something fails")[1].split("## ")[0]
    quoted = re.findall(r"^\| `([^`]+)`", table, flags=re.M)
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
    assert len(quoted) >= 8
    for message in quoted:
        fixed = re.split(r"\.\.\.|\b[A-Z_]{4,}\b:?|16,000,000", message)
        assert all(part.strip(" ,;:") in code for part in fixed), message


# --- Commands


class Command(NamedTuple):
    page: str
    variables: dict[str, str]
    words: list[str]


def command_lines(page: Path) -> Iterator[str]:
    text = page.read_text().replace("\\\n", " ")
    yield from re.findall(r"^(?:    |RUN |CMD )(.+)$", text, flags=re.M)
    yield from code_spans(page)


def commands() -> Iterator[Command]:
    """Every command of the pages that begins with ./run.sh, python or torchrun, settings before it apart."""
    for page in [*PAGES, ROOT / "docs" / "Dockerfile"]:
        for line in command_lines(page):
            for part in line.split(" && "):
                settings, rest = re.fullmatch(r"((?:[A-Z_]+=\S* )*)(.*)", part).groups()
                if re.match(r"(\./run\.sh|python|torchrun)( |$)", rest):
                    variables = dict(pair.split("=", 1) for pair in settings.split())
                    yield Command(page.name, variables, shlex.split(rest, comments=True))


def commands_of(program: str):
    found = [command for command in commands() if command.words[0] == program]
    names = [f"{command.page}: {' '.join([*command.variables, *command.words])}" for command in found]
    assert len(found) >= 2
    return pytest.mark.parametrize("command", found, ids=names)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A copy of run.sh and its files, with one empty shard and a Python that only says how it was called."""
    home = tmp_path_factory.mktemp("shell")
    for name in ("run.sh", "requirements.txt", "requirements-cuda.txt"):
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "recipes", home / "recipes")
    shutil.copytree(RECORDS, home / "bench" / "records")
    shards = home / "data" / "datasets" / "fineweb10B_sp8192_caseops" / "datasets" / "fineweb10B_sp8192_x"
    shards.mkdir(parents=True)
    (shards / "fineweb_train_000000.bin").touch()
    python = home / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 8; else echo "called: $*"; fi\n')
    python.chmod(0o755)
    stamp = subprocess.run("echo python3 $(cat requirements*.txt | cksum)", cwd=home, shell=True, text=True,
                           capture_output=True, check=True).stdout
    (python.parent.parent / "installed").write_text(stamp)
    return home


@commands_of("./run.sh")
def test_run_sh_takes_the_command(command, shell):
    settings = command.variables.copy()
    settings.pop("NPROC_PER_NODE", None)
    g.Settings.from_environment(settings)
    environment = {"PATH": "/usr/bin:/bin"} | command.variables
    run = subprocess.run(command.words, cwd=shell, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    calls = re.findall(r"^called: (\S+)", run.stdout, flags=re.M)
    assert calls or command.words[1] in ("help", "setup")
    assert all((ROOT / call).exists() for call in calls if call.endswith(".py"))


@commands_of("python")
def test_python_takes_the_command(command):
    script, *rest = command.words[1:]
    if script == "-m":
        assert importlib.util.find_spec(rest[0]), rest[0]
        return
    assert (ROOT / script).exists(), script
    if script == "train_gpt.py":
        g.Settings.from_environment(command.variables)
    options = [word for word in rest if word.startswith("--")]
    is_tool = script == "prepare_caseops_data.py" and options[0] in ("--download", "--check")
    tool = options[:1] if is_tool else []
    call = [sys.executable, script, *tool, "--help"]
    helped = subprocess.run(call, cwd=ROOT, text=True, capture_output=True)
    # verify_submission.py answers with its usage, as bad input.
    assert helped.returncode == 0 or f"python {script}" in helped.stderr, helped.stderr
    for option in options[len(tool):]:
        assert re.search(rf"{option}\b", helped.stdout + helped.stderr), f"{script} knows no {option}"


@commands_of("torchrun")
def test_torchrun_takes_the_command(command):
    g.Settings.from_environment(command.variables)
    assert get_args_parser().parse_args(command.words[1:]).training_script == "train_gpt.py"


# --- Figures


class Table(NamedTuple):
    page: str
    around: str  # the paragraph before it, and the one after it if that begins with "(Record"
    text: str


def tables(page: Path) -> Iterator[Table]:
    """The tables of a page with the text that can name their records."""
    paragraphs = re.split(r"\n\s*\n", page.read_text())
    for before, paragraph, after in zip(["", *paragraphs], paragraphs, [*paragraphs[1:], ""]):
        lines = [line for line in paragraph.splitlines() if line.startswith("|")]
        if lines:
            note = after if after.startswith("(Record") else ""
            yield Table(page.name, f"{before}\n{note}", "\n".join(lines))


@functools.cache
def numbers_in(path: Path) -> set[float]:
    """Every number of a record, also in its texts, or of a recipe."""
    if path.suffix != ".json":
        return {float(word.replace(",", "")) for word in re.findall(r"\d[\d,]*(?:\.\d+)?", path.read_text())}

    def walk(value) -> Iterator[float]:
        if isinstance(value, dict):
            yield from walk(list(value.values()))
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)
        elif isinstance(value, str):
            yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield abs(value)

    return set(walk(json.loads(path.read_text())))


def sources(text: str) -> list[Path]:
    """The records that a text names, patterns included, and recipes whose headers it cites."""
    words = [word for word in re.findall(r"[\w*/]+", text) if "_" in word]
    found = []
    for path in sorted(RECORDS.rglob("*.json")):
        name = path.relative_to(RECORDS).as_posix().removesuffix(".json")
        if any(fnmatch.fnmatchcase(name, word) for word in words):
            found.append(path)
    return found + [ROOT / name for name in re.findall(r"`(recipes/\w+\.env)`", text)]


def printed_numbers(text: str) -> list[str]:
    """Numbers with at least four significant digits; code, names and exponents are left out."""
    text = re.sub(r"`[^`]*`|#\d+|\b[A-Za-z]\w*_\w*", " ", text)
    words = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.]*e-)", text)
    return [word.rstrip(",") for word in words if len(re.sub(r"^0*", "", re.sub(r"[.,]", "", word))) >= 4]


def is_rounding_of(word: str, value: float) -> bool:
    """Whether a number is printed so, as it is or in millions."""
    digits = len(word.partition(".")[2])
    wanted = word.replace(",", "")
    return f"{value:.{digits}f}" == wanted or f"{value / 1e6:.{digits}f}" == wanted


def rows_with_records() -> Iterator[tuple[Table, str, list[Path]]]:
    """Each row with the records that must hold its numbers: its own, else those named around the table."""
    for page in PAGES:
        for table in tables(page):
            around = sources(table.around)
            for row in table.text.splitlines():
                found = sources(row) or around
                if found and printed_numbers(row):
                    yield table, row, found


def test_rows_with_records_are_found():
    assert len(list(rows_with_records())) > 80
    found = {path.stem for path in sources("(records mini_*_240s, ngram_speed).")}
    assert found > {"mini_pr2135_240s", "ngram_speed"}
    row = "| `pr2135` 12 | 1.2345 | 0.0012 | 15,996,458 | #2135 | 8e-05 | mini_1234 |"
    assert printed_numbers(row) == ["1.2345", "15,996,458"]
    assert is_rounding_of("1.407", 1407124) and not is_rounding_of("1.408", 1407124)


@every()
def test_figures_stand_in_the_records_that_are_named(page):
    for table, row, found in rows_with_records():
        values = set().union(*map(numbers_in, found))
        for word in printed_numbers(row) if table.page == page.name else []:
            assert any(is_rounding_of(word, value) for value in values), f"{page.name}: {word} in {row}"


def test_every_record_is_quoted():
    quoted = {path for page in PAGES for path in sources(page.read_text())}
    unused = set(RECORDS.rglob("*.json")) - quoted
    assert not unused, "neither README.md nor docs/ name these records: remove them"
    text = "".join(page.read_text() for page in PAGES)
    assert all(path.name in text for path in RECORDS.rglob("*") if path.is_file() and path.suffix != ".json")


def test_screening_tables_are_those_of_the_script():
    call = [sys.executable, "bench/screening.py"]
    printed = subprocess.run(call, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    text = (ROOT / "docs" / "measurements.md").read_text()
    tables_of_it = printed.split("\n\n")
    assert len(tables_of_it) == 5 and all(table.strip() in text for table in tables_of_it)


def test_the_demo_prints_what_the_readme_shows():
    record = json.loads((RECORDS / "demo_two_cores.json").read_text())
    block = g.summary(record)
    text = (ROOT / "README.md").read_text()
    for line in block.strip().splitlines():
        assert line.strip() in text, line


def test_submission_json_holds_the_figures_of_its_records():
    stated = json.loads((ROOT / "submission.json").read_text())
    if stated["record"]:
        pytest.skip("the figures of a run on eight H100, whose records lie in its own folder")
    for seed in stated["seeds"]:
        record = json.loads((RECORDS / f"mini_240s_seed{seed}.json").read_text())
        assert stated["seed_results"][str(seed)] == submission.figures(record)
        assert stated["clock_seconds"] == record["settings"]["max_wallclock_seconds"]
        assert stated["hardware"] == f"{record['machine']['devices']} x {record['machine']['device']}"
    mean = sum(row["val_bpb"] for row in stated["seed_results"].values()) / len(stated["seeds"])
    assert stated["val_bpb"] == pytest.approx(mean, abs=1e-8)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
