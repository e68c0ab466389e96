"""Tokens per second on 1, 2, 4, ... GPUs at 98,304 tokens a GPU and step, and what is lost to communication.

    DATA_PATH=... [settings] python bench/scaling.py [--tokens 98304] [--record FILE]

Runs bench/throughput.py under torchrun for each number of GPUs up to those of the machine. Efficiency is the tokens per second
of a GPU over those of one GPU alone.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--record", default="")
    options = parser.parse_args()
    counts = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    if not counts:
        raise SystemExit("needs CUDA devices")
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            record = os.path.join(folder, f"{count}.json")
            launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            subprocess.run([sys.executable, *launcher, str(HERE / "throughput.py"), "--record", record], check=True,
                           stdout=subprocess.DEVNULL,
                           env=os.environ | dict(TRAIN_BATCH_TOKENS=str(options.tokens * count), GRAD_ACCUM_STEPS="1"))
            records[count] = json.loads(Path(record).read_text())
    print(f"{'GPUs':>4} {'':8}{'tokens/s':>12}{'a GPU':>12}{'efficiency':>12}{'communication ms':>18}{'optimizer ms':>14}")
    for phase in ("plain", "looping"):
        for count in counts:
            if phase in records[count]:
                rate, parts = records[count][phase]["tokens_per_second"], records[count][phase]["parts_ms"]
                share = rate / count / records[1][phase]["tokens_per_second"]
                print(f"{count:4} {phase:8}{rate:12,}{rate / count:12,.0f}{share:12.1%}{parts['communication']:18.2f}"
                      f"{parts['optimizer']:14.2f}")
    if options.record:
        Path(options.record).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
