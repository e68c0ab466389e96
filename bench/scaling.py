"""Tokens per second on 1, 2, 4, ... GPUs at 98,304 tokens a GPU and step, and what is lost to communication.

    DATA_PATH=... [settings] python bench/scaling.py [--tokens 98304] [--record FILE]

Runs bench/throughput.py under torchrun for each number of GPUs up to those of the machine. Efficiency is the
tokens per second of a GPU over those of one GPU alone.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def measure(gpus: int, tokens: int) -> dict:
    """What bench/throughput.py records on so many GPUs, `tokens` a GPU and step."""
    launcher = []
    if gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    batch = dict(TRAIN_BATCH_TOKENS=str(tokens * gpus), GRAD_ACCUM_STEPS="1")
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, *launcher, str(HERE / "throughput.py"), "--record", str(record)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | batch)
        return json.loads(record.read_text())


def print_phase(phase: str, records: dict[int, dict]) -> None:
    """A line per number of GPUs."""
    alone = records[1][phase]["tokens_per_second"]
    for gpus, record in records.items():
        rate = record[phase]["tokens_per_second"]
        parts = record[phase]["parts_ms"]
        efficiency = rate / gpus / alone
        print(f"{gpus:4} {phase:8}{rate:12,}{rate / gpus:12,.0f}{efficiency:12.1%}"
              f"{parts['communication']:18.2f}{parts['optimizer']:14.2f}")


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--record", default="")
    options = parser.parse_args()
    counts = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    if not counts:
        raise SystemExit("needs CUDA devices")

    records = {gpus: measure(gpus, options.tokens) for gpus in counts}
    print(f"{'GPUs':>4} {'':8}{'tokens/s':>12}{'a GPU':>12}{'efficiency':>12}"
          f"{'communication ms':>18}{'optimizer ms':>14}")
    for phase in ("plain", "looping"):
        if phase in records[1]:
            print_phase(phase, records)
    if options.record:
        Path(options.record).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
