"""What settings of test-time training do to the score of one saved artifact: a line per variant.

    ARTIFACT_DIR=... DATA_PATH=... python bench/test_time_training.py [--docs N] [--train-shard] [--json FILE]
        [VARIANT ...]

A VARIANT is settings separated by commas, such as TTT_CHUNK_SIZE=32,TTT_LORA_LR=1e-4; without any, the
settings of the environment alone are run. They score the first N documents of the validation text or, with
--train-shard, of the last training shard, which a run that is to choose between them must have left out of
its training. Loss is in nats per token, with the n-gram tilt and without.
"""
import argparse
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as g  # noqa: E402


class Documents:
    """The first documents of a stream, in the place of ValidationData; 1 byte a token without a sidecar."""

    def __init__(self, tokens: np.ndarray, sizes: np.ndarray | None, count: int):
        starts = np.flatnonzero(tokens == g.BOS_ID)
        first = starts[0]
        last = len(tokens)
        if count < len(starts):
            last = starts[count] + 1  # the last document's target of BOS, too
        self.tokens = np.array(tokens[first:last])
        self.bytes = np.ones_like(self.tokens)
        if sizes is not None:
            self.bytes = sizes[first:last]


class Silent:
    """Takes the place of the run log."""

    def event(self, *arguments, **fields):
        pass


def documents_of(options, settings: g.Settings) -> Documents:
    if options.train_shard:
        last = g.shard_files(settings.shards_dir, "train")[-1]
        return Documents(g.open_shard(last), None, options.docs)
    data = g.ValidationData(settings)
    return Documents(data.tokens, data.bytes, options.docs)


def settings_of(variant: str) -> g.Settings:
    changes = dict(pair.split("=", 1) for pair in variant.split(",") if pair)
    return g.Settings.from_environment(dict(os.environ) | changes)


def measure(variant: str, model: g.GPT, documents: Documents, looping: bool, runtime: g.Runtime) -> dict:
    gc.collect()
    if runtime.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = settings_of(variant)
    figures = g.test_time_training(model, documents, looping, settings, runtime, Silent())
    nats_of_bpb = np.log(2) * figures["bytes"] / figures["targets"]  # a token, of one bit a byte
    untilted = round(figures["untilted_bpb"] * nats_of_bpb, 6)
    memory = None
    if runtime.on_cuda:
        memory = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return dict(variant=variant, loss=figures["val_loss"], untilted=untilted, seconds=figures["seconds"],
                tokens_per_second=round(figures["targets"] / figures["seconds"]), memory_gib=memory)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=[""])
    parser.add_argument("--docs", type=int, default=1 << 40)
    parser.add_argument("--train-shard", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    base = g.Settings.from_environment(os.environ)
    with g.Runtime.start(base) as runtime:
        model = g.GPT(base, runtime.compute_dtype).to(runtime.device)
        table, arrays = g.read_container(base.artifact_path, model, base)
        looping = g.install(model, table, arrays, base)
        weights = [p.detach().clone() for p in model.parameters()]
        documents = documents_of(options, base)
        rows = []
        for variant in options.variants:
            with torch.no_grad():  # global phases train the weights
                torch._foreach_copy_(list(model.parameters()), weights)
            row = measure(variant, model, documents, looping, runtime)
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.json and runtime.rank == 0:
            record = dict(machine=runtime.describe(), targets=len(documents.tokens) - 1, rows=rows)
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
