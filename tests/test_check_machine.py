"""tools/check_machine.py: what it measures, all of it on the CPU too, and what it counts as a fault."""
import fcntl
import json
import os
import re
import shutil
import time

import pytest

from tests.synthetic import environment, runtime, tiny, write_corpus
from tools import check_machine, launch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    write_corpus(folder / "data", 60, 8)
    return folder


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Nothing else is running, and what is written goes to a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_machine, "load", lambda: ("0.0 on 2 cores", []))


def tiny_environment(data, **changes) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
    changed = dict(TTT_ENABLED=1, TTT_LORA_RANK=8, OMP_NUM_THREADS=1) | changes
    environ = inherited | environment(data, **changed)
    del environ["ARTIFACT_DIR"], environ["RUN_ID"]
    return environ


def lines_of(output: str) -> dict[str, str]:
    return {line[:12].strip(): line[13:] for line in output.splitlines() if not line.startswith(("ready", "not ready"))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_machine_without_a_fault_is_ready(data, quiet, capsys, ranks):
    code = check_machine.main(["demo"], tiny_environment(data, NPROC_PER_NODE=ranks))
    out = capsys.readouterr().out
    assert code == 0 and out.splitlines()[-1] == "ready", out
    lines = lines_of(out)
    assert {"Python", "driver", "load", "recipe", "programs", "folder", "device 0", "attention", "8-bit floats", "data"} <= lines.keys()
    assert lines["recipe"] == f"demo, {ranks} process{'es' if ranks > 1 else ''}"
    assert ("all-reduce" in lines) == ("device 1" in lines) == (ranks == 2)
    assert all(float(rate) > 0 for rate in re.findall(r"[\d.e-]+(?= T)", lines["device 0"]))
    assert lines["attention"].startswith("reference, forward and backward at (") and lines["8-bit floats"] == "no"
    assert re.match(rf"{data / 'data'}: [\d,]+ tokens to train on, [\d,]+ to score; manifest: none$", lines["data"])


def test_everything_that_is_wrong_comes_at_once(data, quiet, capsys, monkeypatch, tmp_path):
    (tmp_path / "programs").mkdir()
    broken = tmp_path / "data"
    shutil.copytree(data / "data", broken)
    (broken / "fineweb_train_000001.bin").write_bytes(b"x")
    monkeypatch.setattr(check_machine, "LEAST_DISK", 1 << 62)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    environ = tiny_environment(data, DATA_PATH=broken, COMPRESSOR="pergroup", FP8="1", ATTENTION="fa4", PATH=tmp_path / "programs",
                               HOME=tmp_path, TTT_LORA_RANK=8)
    assert check_machine.main(["demo"], environ) == 2
    os.close(handle)
    out = capsys.readouterr().out
    faults = [line.removeprefix("not ready: ") for line in out.splitlines() if line.startswith("not ready: ")]
    wanted = ("disk: ", "ARTIFACT_DIR: another run", f"{broken}/fineweb_train_000001.bin: ",
              "ATTENTION: fa4 does not load", "FP8: 8-bit products need", "COMPRESSOR: pergroup needs the programs", "no working C compiler")
    assert all(sum(fault.startswith(words) for fault in faults) == 1 for words in wanted), out
    assert len(faults) == len(wanted)


def test_settings_that_are_wrong_are_faults_too(data, quiet, capsys):
    assert check_machine.main(["demo"], tiny_environment(data, NUM_HEADS="abc", SEEED=1)) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == ["not ready: SEEED: no such setting; the nearest is SEED", "not ready: NUM_HEADS: 'abc' is not a whole number"]


def test_processes_that_do_not_come_together_are_ended(data, monkeypatch):
    monkeypatch.setattr(check_machine, "SECONDS", 0.05)
    began = time.monotonic()
    found = check_machine.start_processes(launch.Plan("demo", tiny_environment(data), 1))
    assert found["devices"] == [] and "1 did not come together within 0.05 s" in found["faults"][0]
    assert time.monotonic() - began < 30


def test_a_process_that_fails_is_quoted(data):
    found = check_machine.start_processes(launch.Plan("demo", tiny_environment(data, WORLD_SIZE=2, RANK=0), 1))
    assert len(found["faults"]) == 1 and re.search(r"check_machine.py: \w+Error: .*MASTER_ADDR", found["faults"][0])


def device(name: str = "NVIDIA H200", taken: float = 0.6, **rates: float) -> dict:
    usual = dict(product=690.0, copy=4.3, all_reduce=350.0)
    return dict(name=name, on_cuda="CPU" not in name, taken=taken, rates=list(check_machine.Rates(**usual | rates)))


@pytest.mark.parametrize("devices, faults", [
    ([device(), device(product=650)], []), ([device(all_reduce=0.0)], []),
    ([device(product=500)], ["GPU 0: product 500 TFLOP/s, its kind reaches 686"]),
    ([device(), device(copy=2.1)], ["GPU 1: copy 2.1 TB/s, its kind reaches 4.28"]),
    ([device(all_reduce=38), device(all_reduce=38)], ["GPU 0: all-reduce 38 GB/s, its kind reaches 300", "GPU 1: all-reduce 38 GB/s"]),
    ([device(taken=31.0)], ["GPU 0: 31 GiB of its memory are taken"]),
    ([device("other", product=10), device("other", product=10), device("other", product=8)], ["GPU 2: product 8 TFLOP/s, the others 10"]),
    ([device("NVIDIA H100 80GB HBM3", copy=2.9)], []), ([device("NVIDIA H100 PCIe", product=350, copy=1.7)], []),
    ([device("x86_64 CPU", product=1.0), device("x86_64 CPU", product=0.1)], [])])
def test_devices_are_compared_with_their_kind_and_with_each_other(devices, faults):
    found = list(check_machine.judge_devices(devices))
    assert len(found) == len(faults) and all(line.startswith(fault) for line, fault in zip(found, faults)), found


def test_rates_stand_beside_what_the_kind_reaches():
    lines = dict(check_machine.describe_devices([device(product=690.0), device(all_reduce=320.0)]))
    assert lines["device 0"] == "NVIDIA H200: product 690 of 686 TFLOP/s, copy 4.3 of 4.28 TB/s"
    assert lines["all-reduce"] == "320 of 300 GB/s a link, 2 processes"
    [(_, other)] = check_machine.describe_devices([device("other", product=10.0)])
    assert other == "other: product 10 TFLOP/s, copy 4.3 TB/s"


def test_ranks_with_slower_kernels_are_faults():
    assert not list(check_machine.judge_kernels([["fa4", "", True], ["fa4", "", True]]))
    first, second = check_machine.judge_kernels([["fa4", "", True], ["torch", "fa4 does not load (ImportError: x)", False]])
    assert first == "ATTENTION: rank 1 takes torch, which is slower: fa4 does not load (ImportError: x)" and second.startswith("FP8: ")


def test_rates_are_positive_and_the_links_need_two(data):
    found = check_machine.measure_device(runtime())
    rates = check_machine.Rates(*found["rates"])
    assert rates.product > 0 and rates.copy > 0 and rates.all_reduce == 0 and found["taken"] == 0
    assert not found["on_cuda"] and json.loads(json.dumps(found))["rates"] == list(rates)


@pytest.mark.parametrize("average, cores, busy", [(0.4, 2, False), (1.0, 2, False), (1.5, 2, True), (30, 64, False), (40, 64, True)])
def test_a_busy_machine_is_a_fault(average, cores, busy, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    text, faults = check_machine.load()
    assert text == f"{average:.1f} on {cores} cores" and bool(faults) == busy


@pytest.mark.parametrize("version, good", [("2.10.1", False), ("2.11.0", True), ("2.13.0+cu130", True), ("2.14.0", False), ("3.0.0", False)])
def test_versions_of_torch(version, good, monkeypatch):
    monkeypatch.setattr(check_machine.torch, "__version__", version)
    assert (not check_machine.software()[1]) == good


def test_a_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path):
    text, faults = check_machine.folder(tiny(tmp_path, ARTIFACT_DIR=tmp_path / "new" / "deep"))
    assert text.startswith(f"{tmp_path}, ") and not faults
