"""What would stop or slow a run on this machine, all of it at once, in under a minute.

    python tools/check_machine.py [RECIPE]     `./run.sh check [RECIPE]`

One process per GPU is started as for a run of the recipe. Each measures its device, all of them the links
between; then they do what a run does before its first step. Ends with "ready" or the list of what is wrong.

Exit codes: 0 ready, 2 not ready.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt during the imports ends it in silence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]  # in a submission source/ has the modules

import torch  # noqa: E402

import train_gpt as g  # noqa: E402
from env_settings import InputError  # noqa: E402
from host import hold  # noqa: E402
from tools import launch  # noqa: E402

SECONDS = 50  # for all processes; most of it goes into imports and, once, into compiling attention
LEAST_DISK = 2 << 30  # bytes: checkpoint, artifact, compiled kernels
TORCH_VERSIONS = ((2, 11), (2, 14))  # from the first to below the second, as in requirements.txt
MOST_TAKEN = 2.0  # GiB of a GPU's memory that may be gone before the run begins
FELLOWS_SHARE, KIND_SHARE = 0.9, 0.85  # of the other devices' rate, and of the kind's


class Rates(NamedTuple):
    """What a device does in a second."""

    product: float  # TFLOP/s of products in the precision of training
    copy: float  # TB/s read and written
    all_reduce: float = 0.0  # GB/s through the slowest link


UNITS = Rates("TFLOP/s", "TB/s", "GB/s")
# What a kind reaches with nothing in its way. The H200's product and copy are measured; the H100's copy
# follows from the ratio of their memories, and NVLink is far above its figure here, PCIe far below.
KINDS = {"H200": Rates(686, 4.28, 300), "H100 80GB HBM3": Rates(686, 2.99, 300)}


# --- Measured by each process of the run


def seconds_of(action: Callable, runtime: g.Runtime, repeats: int = 10) -> float:
    """Seconds of one call, after three that do not count."""
    for count in (3, repeats):
        runtime.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            action()
        runtime.synchronize()
    return (time.perf_counter() - began) / repeats


def measure_device(runtime: g.Runtime) -> dict:
    """Name, GiB that others hold, and rates of this process's device."""
    found = runtime.describe()
    taken = 0.0
    if runtime.on_cuda:
        free, total = torch.cuda.mem_get_info(runtime.device)
        taken = (total - free) / 2**30
    width = 8192 if runtime.on_cuda else 512
    x = torch.randn(width, width, dtype=runtime.compute_dtype, device=runtime.device)
    out = torch.empty_like(x)
    product = 2 * width**3 / seconds_of(lambda: torch.mm(x, x, out=out), runtime)
    source = torch.zeros(2**30 if runtime.on_cuda else 2**26, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds_of(lambda: target.copy_(source), runtime)
    all_reduce = measure_links(source.view(torch.float32), runtime)
    rates = Rates(product / 1e12, copy / 1e12, all_reduce / 1e9)
    return dict(name=found["device"], on_cuda=runtime.on_cuda, taken=taken, rates=rates)


def measure_links(buffer: torch.Tensor, runtime: g.Runtime) -> float:
    """Bytes/s through each device's link while all add up a buffer, as the ring algorithm sends them."""
    if runtime.world_size == 1:
        return 0.0
    part = buffer[:2**26]
    sent = 2 * (runtime.world_size - 1) / runtime.world_size * 4 * part.numel()
    return sent / seconds_of(lambda: runtime.sum(part), runtime, repeats=5)


def measure(path: str, settings: g.Settings) -> None:
    """One process of the run; the first writes what all have found to `path`."""
    with g.Runtime.start(settings) as runtime:
        devices = runtime.gather(measure_device(runtime))
        facts = {}
        faults = []
        try:
            (manifest, data, text), attention, fp8, *_ = g.prepare(settings, runtime)
            facts = dict(train_tokens=data.total if data else 0, val_tokens=len(text.tokens),
                         manifest=manifest["manifest"], kernels=runtime.gather((*attention, fp8)))
        except InputError as error:
            faults = str(error).splitlines()
        if runtime.rank == 0:
            found = dict(devices=devices, facts=facts, faults=faults)
            Path(path).write_text(json.dumps(found), encoding="utf-8")


# --- Judged by the process that the user starts


def start_processes(plan: launch.Plan) -> dict:
    """What the processes found; their last words are a fault if they did not come to an end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = plan.command(Path(__file__).resolve(), "--measure", str(path))
        # As a run does: what FlashAttention compiles here is there for it.
        environ = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"} | plan.environ
        process = subprocess.Popen(command, env=environ, text=True, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, words = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            words = f"{plan.ranks} did not come together within {SECONDS} s; NCCL_DEBUG=INFO shows where"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    own = [line for line in words.splitlines() if line.startswith("check_machine.py:")]
    lines = [line.strip() for line in own or words.splitlines() if line.strip()]
    last = lines[-1] if lines else "ended without a word"
    return dict(devices=[], facts={}, faults=[f"processes of the run: {last}"])


def kind_rates(name: str) -> Rates:
    """What devices of this name should reach; zeros where that is not known."""
    for kind, rates in KINDS.items():
        if kind in name:
            return rates
    return Rates(0.0, 0.0)


def judge_devices(devices: list[dict]) -> Iterator[str]:
    """Faults of GPUs that are taken, or slower than their kind or their fellows."""
    for index, device in enumerate(devices):
        if not device["on_cuda"]:
            continue
        if device["taken"] > MOST_TAKEN:
            yield f"GPU {index}: {device['taken']:.0f} GiB of its memory are taken; end what holds them"
        of_kind = kind_rates(device["name"])
        usual = Rates(*map(statistics.median, zip(*(other["rates"] for other in devices))))
        for field, unit, rate, wanted, others in zip(Rates._fields, UNITS, device["rates"], of_kind, usual):
            figure = f"GPU {index}: {field.replace('_', '-')} {rate:.3g} {unit}"
            if 0 < rate < KIND_SHARE * wanted:
                yield (f"{figure}, its kind reaches {wanted:g}; look for other programs, heat, a power limit "
                       "or missing links in nvidia-smi -q")
            elif rate < FELLOWS_SHARE * others:
                yield f"{figure}, the others {others:.3g}; all wait for the slowest"


def judge_kernels(kernels: list[list]) -> Iterator[str]:
    """Faults of ranks that cannot have the kernels of the fastest."""
    for rank, (kernel, reason, _) in enumerate(kernels):
        if reason:
            yield f"ATTENTION: rank {rank} takes {kernel}, which is slower: {reason}"
    if len({fp8 for _, _, fp8 in kernels}) > 1:
        yield "FP8: some GPUs cannot multiply in 8-bit floats, so none will"


def describe_devices(devices: list[dict]) -> Iterator[tuple[str, str]]:
    """(what, how) for each device, and for the links."""
    for index, device in enumerate(devices):
        product, copy, _ = zip(device["rates"], kind_rates(device["name"]))
        yield (f"device {index}", f"{device['name']}: product {against(*product)} {UNITS.product}, "
                                  f"copy {against(*copy)} {UNITS.copy}")
    if len(devices) > 1:
        slowest = min(Rates(*device["rates"]).all_reduce for device in devices)
        wanted = kind_rates(devices[0]["name"]).all_reduce
        yield "all-reduce", f"{against(slowest, wanted)} {UNITS.all_reduce} a link, {len(devices)} processes"


def against(rate: float, wanted: float) -> str:
    """A rate beside what it should reach, where that is known."""
    return f"{rate:.3g} of {wanted:g}" if wanted else f"{rate:.3g}"


def software() -> tuple[str, list[str]]:
    """Versions of Python and torch."""
    faults = []
    first, last = TORCH_VERSIONS
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not first <= version < last:
        faults.append(f"torch: {torch.__version__} is not 2.11 to 2.13; rm -r .venv, then ./run.sh setup")
    cuda = torch.version.cuda or "none"
    return f"{platform.python_version()}, torch {torch.__version__}, CUDA {cuda}", faults


def driver() -> str:
    """What nvidia-smi says of the machine's GPUs."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return "; ".join(dict.fromkeys(answer.stdout.strip().splitlines())) or "nvidia-smi lists no GPU"


def programs(s: g.Settings) -> str:
    """The programs that a run calls."""
    names = [shutil.which("cc") or shutil.which("gcc") or "no C compiler"]
    if s.compressor == "pergroup":
        names += [shutil.which(name) or f"no {name}" for name in ("lrzip", "prlimit")]
    return ", ".join(names)


def folder(s: g.Settings) -> tuple[str, list[str]]:
    """Room in the artifact's folder, and whether another run holds it."""
    place = Path(s.artifact_dir or ".").resolve()
    while not place.is_dir():
        place = place.parent
    faults = []
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        needed = LEAST_DISK / 2**30
        faults.append(f"disk: {free / 2**30:.1f} GiB free in {place}, a run may need {needed:.0f}; make room "
                      "or set ARTIFACT_DIR to another disk")
    try:
        os.close(hold(str(place), "ARTIFACT_DIR", shared=s.ttt_eval_only))
    except InputError as error:
        faults.append(str(error))
    return f"{place}, {free / 2**30:.0f} GiB free", faults


def load() -> tuple[str, list[str]]:
    """What else keeps the cores busy."""
    average, cores = os.getloadavg()[0], os.cpu_count() or 1
    faults = []
    if average > cores / 2:
        faults.append(f"load: {average:.1f} on {cores} cores: other programs take the run's time; end them")
    return f"{average:.1f} on {cores} cores", faults


def tell(what: str, how: str) -> None:
    print(f"{what:12} {how}", flush=True)


def check(recipe: str, environ: Mapping[str, str]) -> list[str]:
    """Print a line for each part of machine and run; return the faults."""
    busy, faults = load()  # before this program adds to it
    versions, wrong = software()
    faults += wrong
    tell("Python", versions)
    tell("driver", driver())
    tell("load", busy)
    try:
        plan = launch.make_plan(recipe, environ)
        tell("recipe", f"{plan.recipe}, {plan.ranks} {'process' if plan.ranks == 1 else 'processes'}")
        settings = g.Settings.from_environment(plan.environ | {"RANK": "0", "WORLD_SIZE": str(plan.ranks)})
    except InputError as error:
        return faults + str(error).splitlines()
    tell("programs", programs(settings))
    room, wrong = folder(settings)
    faults += wrong
    tell("folder", room)
    found = start_processes(plan)
    for what, how in describe_devices(found["devices"]):
        tell(what, how)
    facts = found["facts"]
    if facts:
        kernel, _, fp8 = facts["kernels"][0]
        tell("attention", f"{kernel}, forward and backward at {settings.attention_shape}")
        tell("8-bit floats", "yes" if fp8 else "no")
        tell("data", f"{settings.shards_dir}: {facts['train_tokens']:,} tokens to train on, "
                     f"{facts['val_tokens']:,} to score; manifest: {facts['manifest']}")
        faults += judge_kernels(facts["kernels"])
    return faults + list(judge_devices(found["devices"])) + found["faults"]


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("recipe", nargs="?", default="", help="default: as ./run.sh chooses")
    parser.add_argument("--measure", metavar="FILE", help="for the processes that it starts itself")
    options = parser.parse_args(arguments)
    if options.measure:
        try:
            measure(options.measure, g.Settings.from_environment(environ))
        except Exception as error:  # NCCL and CUDA have many ways to fail
            print(f"check_machine.py: {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
            return 1
        return 0
    try:
        faults = check(options.recipe, environ)
    except KeyboardInterrupt:
        return 130
    print("".join(f"not ready: {fault}\n" for fault in faults) or "ready\n", end="")
    return 2 if faults else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], os.environ))
