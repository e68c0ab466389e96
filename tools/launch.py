"""Start what a recipe says: its settings, the data, one process per GPU.

    python tools/launch.py run [RECIPE]                              `./run.sh [RECIPE]`
    python tools/launch.py seeds RECIPE SEED... [OPTIONS]            `./run.sh RECIPE SEED...`
    python tools/launch.py retest RECIPE                             `./run.sh retest [RECIPE]`
    python tools/launch.py decode RECIPE [ARGS]                      `./run.sh decode [RECIPE] [ARGS]`

Without a name the recipe is record where there are a GPU and a data set, else demo. A recipe is data: its
assignments must be settings, and variables of the environment win over them.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt during the imports ends it in silence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]  # in a submission source/ has the modules

import torch  # noqa: E402

import train_gpt as g  # noqa: E402
from env_settings import InputError, read_recipe  # noqa: E402
from host import hold  # noqa: E402
from tools import demo_corpus  # noqa: E402

# Downloads have had one and two levels of `datasets`.
PUBLISHED_SETS = ("datasets/fineweb10B_sp8192_caseops/datasets/datasets/fineweb10B_sp8192_*",
                  "datasets/fineweb10B_sp8192_caseops/datasets/fineweb10B_sp8192_*")
DEMO_DATA = "data/demo"
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC_PER_NODE")  # a cluster may have left them here


class Plan(NamedTuple):
    """A run that is ready to be started."""

    recipe: str
    environ: dict[str, str]
    ranks: int

    def command(self, script: Path = ROOT / "train_gpt.py", *arguments: str) -> list[str]:
        launcher = []
        if self.ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        return [sys.executable, *launcher, str(script), *arguments]


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises InputError if there is none."""
    path = ROOT / "recipes" / f"{name}.env"
    if not path.is_file():
        names = " ".join(sorted(other.stem for other in path.parent.glob("*.env")))
        raise InputError(f"no recipe {path}; there are: {names}")
    return path


def find_data(environ: Mapping[str, str]) -> str:
    """The folder of DATA_PATH or of a download of the published set; empty if there is neither."""
    if environ.get("DATA_PATH"):
        return environ["DATA_PATH"]
    for pattern in PUBLISHED_SETS:
        for folder in sorted(Path(environ.get("DATA_DIR") or "data").glob(pattern)):
            if any(folder.glob("fineweb_train_*.bin")):
                return str(folder)
    return ""


def count_ranks(environ: Mapping[str, str], recipe: str, gpus: int) -> int:
    """Processes to start: NPROC_PER_NODE, else one per GPU; the demo is too small for more than one."""
    text = environ.get("NPROC_PER_NODE", "")
    if not text:
        return 1 if recipe == "demo" else max(gpus, 1)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"NPROC_PER_NODE: {text!r} is not a number of processes, 1 or more")
    if 0 < gpus < int(text):
        raise InputError(f"NPROC_PER_NODE: {text}, but torch sees {gpus} GPUs; lower it or unset it")
    return int(text)


def vocabulary(folder: str) -> dict[str, str]:
    """VOCAB_SIZE by the data's manifest, which wins over the recipe; empty without a manifest."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
        return {"VOCAB_SIZE": str(int(manifest["tokenizer"]["vocab_size"]))}
    except (OSError, ValueError, KeyError, TypeError):  # the run says what is wrong with it
        return {}


def check_gpus(environ: Mapping[str, str]) -> None:
    """Raise InputError if torch sees none of the machine's NVIDIA GPUs: nobody means the CPU then."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "all")
    if torch.cuda.is_available() or visible in ("", "-1") or not shutil.which("nvidia-smi"):
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout
    drivers = re.findall(r"^\d[\d.]*$", answer, flags=re.M)
    if drivers:
        raise InputError(f"CUDA: nvidia-smi lists {len(drivers)} GPUs (driver {drivers[0]}), of which torch "
                         f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}) sees none with "
                         f"CUDA_VISIBLE_DEVICES={visible}; install a newer driver or a torch for this one, "
                         "or set CUDA_VISIBLE_DEVICES= to use the CPU")


def make_plan(name: str, environ: Mapping[str, str]) -> Plan:
    """What to start. Raises InputError; may build the demo's data."""
    check_gpus(environ)
    gpus = torch.cuda.device_count()
    data = find_data(environ)
    recipe = name or ("record" if gpus and data else "demo")
    chosen = read_recipe(str(recipe_path(recipe)), g.Settings)
    data = data or find_data(chosen)
    ranks = count_ranks(environ, recipe, gpus)
    if not data and recipe != "demo":
        raise InputError("DATA_PATH: no data set found; get it with python prepare_caseops_data.py "
                         "--download, or set DATA_PATH; ./run.sh demo makes its own")
    if not data:
        print("no data set found: the demo runs on its own, made from Python's library (README.md says how "
              "to get the real one)", flush=True)
        if not (ROOT / DEMO_DATA / "manifest.json").exists():
            code = demo_corpus.main(["--out", DEMO_DATA, "--keep"])
            if code:
                raise SystemExit(code)
        data = DEMO_DATA
    merged = chosen | vocabulary(data) | dict(environ) | {"DATA_PATH": data}
    merged["RECIPE"] = recipe  # so that the record says in what it differs
    return Plan(recipe, {key: value for key, value in merged.items() if key not in OF_A_LAUNCHER}, ranks)


def check_first(plan: Plan) -> None:
    """Settings and data are checked by one process, which says what is wrong; SystemExit if anything is."""
    ranked = plan.environ | {"RANK": "0", "WORLD_SIZE": str(plan.ranks)}
    code = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), "--check"], env=ranked).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def start(command: list[str], environ: dict[str, str]) -> None:
    """Become this command."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environ)


def seeds_command(plan: Plan, folder: str, action: str, arguments: list[str]) -> list[str]:
    script = str(ROOT / "tools" / "submission.py")
    return [sys.executable, script, action, folder, *arguments, "--", *plan.command()]


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    if options.action == "run":
        plan = make_plan(options.recipe, environ)
        # Whether another run is under way there, before the seconds that a check takes.
        only_reads = plan.environ.get("TTT_EVAL_ONLY") == "1"
        os.close(hold(plan.environ.get("ARTIFACT_DIR") or ".", "ARTIFACT_DIR", shared=only_reads))
        check_first(plan)
        start(plan.command(), plan.environ)
    if options.action == "decode":
        plan = make_plan(options.recipe, environ)
        check_first(plan)
        start([sys.executable, str(ROOT / "tools" / "decode.py"), *options.arguments], plan.environ)
    # The folder of all seeds is no setting of a run.
    folder = environ.get("ARTIFACT_DIR") or f"runs/{options.recipe}"
    plan = make_plan(options.recipe, {key: value for key, value in environ.items() if key != "ARTIFACT_DIR"})
    arguments = []
    if options.action == "seeds":
        for seed in options.seeds:
            for fault in g.Settings.faults_of("SEED", seed):
                raise InputError(fault)
        arguments = list(options.seeds)
        if options.against:
            arguments += ["--against", options.against]
        if options.publish:
            arguments += ["--publish", options.publish]
    check_first(plan)
    start(seeds_command(plan, folder, options.action, arguments), plan.environ)


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("run").add_argument("recipe", nargs="?", default="")
    actions.add_parser("retest").add_argument("recipe")
    decode = actions.add_parser("decode", add_help=False)
    decode.add_argument("recipe")
    decode.add_argument("arguments", nargs=argparse.REMAINDER)
    seeds = actions.add_parser("seeds")
    seeds.add_argument("recipe")
    seeds.add_argument("seeds", nargs="+")
    seeds.add_argument("--against", default="")
    seeds.add_argument("--publish", default="")
    options = parser.parse_args(arguments)
    try:
        run(options, environ)
    except (InputError, OSError) as error:
        for line in str(error).splitlines():
            print(f"run.sh: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], os.environ))
