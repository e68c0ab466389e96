"""run.sh and tools/launch.py: what is installed, which recipe runs on which data and how many processes, and what is refused first."""
import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt as g
from tests.synthetic import ROOT
from tools import launch

REQUIREMENTS = ("requirements.txt", "requirements-cuda.txt")

# Stands for python3: makes a .venv that only says how it was called, and waits meanwhile for the file `go`.
PYTHON3 = """#!/bin/sh
case "$*" in
  *"-m venv"*)
    mkdir -p .venv/bin
    printf '#!/bin/sh\\necho "called: $*"\\n' > .venv/bin/python
    chmod +x .venv/bin/python
    touch made
    while [ ! -e go ]; do sleep 0.02; done ;;
  *"import torch"*) exit 1 ;;
  *) exec {real} "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without .venv, and beside it a folder `bin` whose python3 installs nothing."""
    home = tmp_path / "check out"
    home.mkdir()
    for name in ("run.sh", *REQUIREMENTS):
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "recipes", home / "recipes")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON3.format(real=sys.executable))
    python.chmod(0o755)
    return home


def door(checkout: Path, *arguments: str, script: Path | None = None, cwd: Path | None = None, **variables: str):
    """./run.sh, started."""
    environ = {"PATH": f"{checkout.parent / 'bin'}:/usr/bin:/bin"} | variables
    return subprocess.Popen([str(script or checkout / "run.sh"), *arguments], cwd=cwd or checkout, env=environ, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def requirements_sum(home: Path) -> str:
    return subprocess.run("cat requirements*.txt | cksum", cwd=home, shell=True, text=True, capture_output=True).stdout.strip()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


# --- run.sh


def test_of_two_setups_at_once_one_works_and_the_other_says_who_does(checkout):
    first = door(checkout, "setup")
    wait_for(checkout / "made")
    code, out, err = ended(door(checkout, "demo"))
    assert code == 2 and "called" not in out
    assert err == f"run.sh: process {first.pid} on {os.uname().nodename} is setting up .venv; wait for its end, then start again\n"
    (checkout / "go").touch()
    assert ended(first)[0] == 0 and (checkout / ".venv" / "installed").exists()
    code, out, _ = ended(door(checkout, "demo"))
    assert code == 0 and out == "called: tools/launch.py run demo\n", "nothing is installed again"


def test_a_setup_that_was_killed_holds_nothing(checkout):
    first = door(checkout, "setup")
    wait_for(checkout / "made")
    os.killpg(first.pid, signal.SIGKILL)
    ended(first)
    (checkout / "go").touch()
    assert ended(door(checkout, "setup"))[0] == 0 and (checkout / ".venv" / "installed").exists()


def test_what_a_linked_venv_leads_to_is_never_emptied(checkout, tmp_path):
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").write_text("#!/bin/sh\n")
    (other / "installed").write_text("python3 of other requirements\n")
    (checkout / ".venv").symlink_to(other)
    code, _, err = ended(door(checkout, "setup"))
    assert code == 2 and f".venv is a link to {other}" in err
    assert sorted(path.name for path in other.rglob("*")) == ["bin", "installed", "python"]


@pytest.mark.parametrize("made_with, asked, again", [
    ("/some/python3.12", "", False), ("python3", "", False), ("/some/python3.12", "python3", True), ("python3", "python3", False)])
def test_a_venv_is_kept_whatever_python_it_was_made_with(checkout, made_with, asked, again):
    (checkout / "go").touch()
    ended(door(checkout, "setup"))
    (checkout / ".venv" / "installed").write_text(f"{made_with} {requirements_sum(checkout)}\n")
    (checkout / "made").unlink()
    code, _, _ = ended(door(checkout, "setup", **({"PYTHON": asked} if asked else {})))
    assert code == 0 and (checkout / "made").exists() == again


def test_other_requirements_are_installed(checkout):
    (checkout / "go").touch()
    ended(door(checkout, "setup"))
    (checkout / "made").unlink()
    (checkout / "requirements.txt").write_text("numpy\n")
    assert ended(door(checkout, "setup"))[0] == 0 and (checkout / "made").exists()


@pytest.fixture
def installed(checkout) -> Path:
    (checkout / "go").touch()
    assert ended(door(checkout, "setup"))[0] == 0
    return checkout


@pytest.mark.parametrize("link", ["../check out/run.sh", "absolute", "chain"])
def test_run_sh_may_be_called_through_links(installed, tmp_path, link):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = {"absolute": str(installed / "run.sh"), "chain": "golf2"}.get(link, link)
    (elsewhere / "golf").symlink_to(target)
    (elsewhere / "golf2").symlink_to(installed / "run.sh")
    code, out, err = ended(door(installed, "demo", script=elsewhere / "golf", cwd=elsewhere))
    assert (code, out) == (0, "called: tools/launch.py run demo\n"), err


def test_names_are_relative_to_the_caller_and_defaults_lie_beside_run_sh(installed, tmp_path):
    here = tmp_path / "here"
    (here / "runs").mkdir(parents=True)
    assert ended(door(installed, "pack-code", "mine.py", cwd=here))[1] == f"called: tools/pack_submission.py {here}/mine.py\n"
    assert ended(door(installed, "pack-code", cwd=here))[1] == "called: tools/pack_submission.py packed/train_gpt.py\n"
    code, out, _ = ended(door(installed, "report", "runs", "--out", "page", cwd=here))
    assert out == f"called: tools/report.py {here}/runs --out {here}/page\n"
    (here / "mine.env").touch()
    assert ended(door(installed, "diff", "demo", "mine.env", cwd=here))[1] == f"called: tools/diff_recipes.py demo {here}/mine.env\n"


COMMANDS = ("check", "retest", "decode", "submission", "diff", "report", "test", "setup", "pack-code")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_every_command_has_help_and_installs_nothing_for_it(checkout, command, word):
    code, out, err = ended(door(checkout, command, word))
    assert (code, err) == (0, "") and out.startswith(f"./run.sh {command}") and len(out.splitlines()) <= 3
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("help",), ("demo", "--help"), ("record", "42", "--help")])
def test_help_lists_all_commands(checkout, arguments):
    code, out, _ = ended(door(checkout, *arguments))
    assert code == 0 and all(f"./run.sh {command}" in out for command in COMMANDS)
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("arguments, words", [
    (("report",), "no logs/ and no runs/ yet"), (("report", "nothing"), "no file or folder nothing"), (("retest",), "runs/record: no folders seed"),
    (("retest", "demo"), "runs/demo: no folders seed"), (("submission", "out"), "runs/record: no folders seed"), (("submission",), "name the folder"),
    (("retest", "nonsense"), "no recipe"), (("diff", "demo"), "name two recipes"), (("nonsense",), "no recipe recipes/nonsense.env"),
    (("check", "nonsense"), "no recipe"), (("demo", "x"), "x is no seed"), (("demo", "--against", "none"), "no file none")])
def test_what_is_missing_is_said_before_anything_is_installed(checkout, arguments, words):
    code, out, err = ended(door(checkout, *arguments))
    assert code == 2 and not out and err.startswith("run.sh: ") and words in err
    assert not (checkout / ".venv").exists()


# --- tools/launch.py: what a run is


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder to start from, with its recipes, and a number of GPUs; the demo's data are not really made."""
    made = argparse.Namespace(gpus=0, folder=tmp_path, demos=0)

    def make_demo(arguments):
        made.demos += 1
        return 0

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: made.gpus)
    monkeypatch.setattr(launch.demo_corpus, "main", make_demo)
    return made


def write_set(folder: Path, vocab_size: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin").touch()
    if vocab_size:
        (folder / "manifest.json").write_text(json.dumps(dict(tokenizer=dict(vocab_size=vocab_size))))
    return folder


@pytest.mark.parametrize("gpus, data, recipe, ranks", [
    (0, False, "demo", 1), (0, True, "demo", 1), (1, False, "demo", 1), (8, False, "demo", 1), (1, True, "record", 1), (8, True, "record", 8)])
def test_the_record_runs_only_where_there_are_a_gpu_and_a_data_set(machine, gpus, data, recipe, ranks):
    machine.gpus = gpus
    environ = {"DATA_PATH": str(write_set(machine.folder / "mine"))} if data else {}
    plan = launch.make_plan("", environ)
    assert (plan.recipe, plan.ranks) == (recipe, ranks)
    assert plan.environ["DATA_PATH"] == environ.get("DATA_PATH", "data/demo")
    assert machine.demos == (0 if data else 1)
    assert ("NUM_LAYERS" in plan.environ) == (recipe == "demo")
    assert ("--nproc_per_node=8" in plan.command()) == (ranks == 8) and plan.command()[-1].endswith("train_gpt.py")


@pytest.mark.parametrize("recipe", ["record", "mini", "pr2135"])
def test_a_recipe_that_is_named_does_not_run_on_the_demo_s_data(machine, recipe):
    with pytest.raises(g.InputError, match="^DATA_PATH: no data set found; .*--download.* ./run.sh demo"):
        launch.make_plan(recipe, {})
    assert not machine.demos


@pytest.mark.parametrize("nesting", ["datasets/datasets", "datasets"])
def test_a_download_is_found(machine, nesting):
    folder = write_set(machine.folder / "data" / "datasets" / "fineweb10B_sp8192_caseops" / nesting / "fineweb10B_sp8192_x")
    assert machine.folder / launch.make_plan("record", {}).environ["DATA_PATH"] == folder


def test_the_environment_wins_over_the_recipe_and_the_data_s_vocabulary_too(machine):
    data = str(write_set(machine.folder / "mine", vocab_size=777))
    (machine.folder / "recipes" / "x.env").write_text("SEED=7\nVOCAB_SIZE=1024\nNUM_LAYERS=9\n")
    plan = launch.make_plan("x", dict(DATA_PATH=data, NUM_LAYERS="10"))
    assert [plan.environ[name] for name in ("SEED", "VOCAB_SIZE", "NUM_LAYERS")] == ["7", "777", "10"]
    assert launch.make_plan("x", dict(DATA_PATH=data, VOCAB_SIZE="5")).environ["VOCAB_SIZE"] == "5"


def test_a_recipe_can_name_its_data(machine):
    data = str(write_set(machine.folder / "mine"))
    (machine.folder / "recipes" / "x.env").write_text(f"DATA_PATH='{data}'\n")
    assert launch.make_plan("x", {}).environ["DATA_PATH"] == data


def test_a_recipe_is_data_to_run_sh(machine, capsys):
    (machine.folder / "recipes" / "x.env").write_text("SEED=7\nx[$(touch executed)]=1\nSEEED=8\n")
    assert launch.main(["run", "x"], {}) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"run.sh: {machine.folder}/recipes/x.env:2: cannot read") and not list(machine.folder.rglob("executed"))
    assert second == f"run.sh: {machine.folder}/recipes/x.env:3: SEEED: no such setting; the nearest is SEED"


@pytest.mark.parametrize("text, words", [
    ("abc", "'abc' is not a number of processes"), ("0", "'0' is not"), ("-1", "'-1' is not"), ("1.5", "'1.5' is not"), ("3", "torch sees 2 GPUs")])
def test_the_number_of_processes_is_refused_by_its_own_name(machine, capsys, text, words):
    machine.gpus = 2
    assert launch.main(["run", "demo"], dict(NPROC_PER_NODE=text)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("run.sh: NPROC_PER_NODE: ") and words in line


@pytest.fixture
def started(monkeypatch) -> list:
    """Commands that launch would have become, with their environments."""
    calls = []
    monkeypatch.setattr(launch, "start", lambda command, environ: calls.append((command, environ)) or sys.exit(0))
    monkeypatch.setattr(launch, "check_first", lambda plan: None)
    return calls


def launched(*arguments: str, **environ: str) -> None:
    with pytest.raises(SystemExit) as left:
        launch.main(list(arguments), environ)
    assert left.value.code == 0


def test_what_a_launcher_left_behind_reaches_no_run(machine, started):
    launched("run", "demo", RANK="3", LOCAL_RANK="3", WORLD_SIZE="8", NPROC_PER_NODE="2")
    [(command, environ)] = started
    assert "--nproc_per_node=2" in command and not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC_PER_NODE"} & environ.keys()


def test_seeds_go_to_the_tool_and_their_folder_reaches_no_run(machine, started):
    launched("seeds", "demo", "42", "0", "--against", "/their.json", ARTIFACT_DIR="/mine")
    [(command, environ)] = started
    assert command[1].endswith("tools/submission.py")
    assert command[2:8] == ["seeds", "/mine", "42", "0", "--against", "/their.json"] and command[8] == "--"
    assert command[-1].endswith("train_gpt.py") and "ARTIFACT_DIR" not in environ
    assert environ["RECIPE"] == "demo"
    launched("retest", "demo")
    assert started[1][0][2:5] == ["retest", "runs/demo", "--"]


def test_a_decoder_gets_its_words_and_the_recipe_s_settings(machine, started):
    launched("decode", "demo", "--documents", "3", "--text", "x")
    [(command, environ)] = started
    assert command[1].endswith("tools/decode.py") and command[2:] == ["--documents", "3", "--text", "x"]
    assert environ["NUM_LAYERS"] == "5" and environ["DATA_PATH"] == "data/demo"


def test_a_seed_that_no_run_takes_is_refused_first(machine, started, capsys):
    assert launch.main(["seeds", "demo", "42", "18446744073709551616"], {}) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("run.sh: SEED: 18446744073709551616 is out of range")
    assert not started


def test_a_second_run_beside_the_first_is_refused_before_it_begins(machine, started, capsys):
    handle = os.open(machine.folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert launch.main(["run", "demo"], {}) == 2
    assert "run.sh: ARTIFACT_DIR: another run" in capsys.readouterr().err and not started
    os.close(handle)
    launched("run", "demo")


def test_a_failed_check_ends_the_launch_with_its_code(tmp_path):
    environ = {"PATH": os.environ["PATH"], "MATRIX_LR": "fast", "OMP_NUM_THREADS": "1"}
    with pytest.raises(SystemExit) as left:
        launch.check_first(launch.Plan("demo", environ, 3))
    assert left.value.code == 2


# --- GPUs that torch does not see


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name which says this, and ends with this code."""
    def place(says: str, code: int = 0) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'E'\n{says}\nE\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return place


def test_gpus_that_torch_does_not_see_stop_the_run(machine, nvidia_smi, monkeypatch, capsys):
    nvidia_smi("535.54.03\n535.54.03")
    monkeypatch.setattr(launch.torch.version, "cuda", "13.0")
    for arguments in (["run"], ["run", "demo"], ["seeds", "demo", "42"]):
        assert launch.main(arguments, {}) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("run.sh: CUDA: nvidia-smi lists 2 GPUs (driver 535.54.03)") and "install a newer driver" in line
        assert f"torch {launch.torch.__version__} (CUDA 13.0) sees none with CUDA_VISIBLE_DEVICES=all" in line
    monkeypatch.setattr(launch.torch.version, "cuda", None)
    assert launch.main(["run"], dict(CUDA_VISIBLE_DEVICES="5")) == 2
    assert "(CUDA none) sees none with CUDA_VISIBLE_DEVICES=5;" in capsys.readouterr().err
    assert not machine.demos


@pytest.mark.parametrize("says, code, environ", [
    ("535.54.03", 0, dict(CUDA_VISIBLE_DEVICES="")), ("535.54.03", 0, dict(CUDA_VISIBLE_DEVICES="-1")),
    ("No devices were found", 6, {}), ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, {})])
def test_a_machine_without_usable_gpus_runs_the_demo_on_its_cpu(machine, nvidia_smi, says, code, environ):
    nvidia_smi(says, code)
    assert launch.make_plan("", environ).recipe == "demo"
