"""What settings of test-time training do to the score of one saved artifact: a line per variant, in one process.

    ARTIFACT_DIR=... DATA_PATH=... python bench/test_time_training.py [--docs N] [--train-shard] [--json FILE] [VARIANT ...]

A VARIANT is settings separated by commas, such as TTT_CHUNK_SIZE=32,TTT_LORA_LR=1e-4; without any, the settings of the
environment alone are run. They are told from each other on the first N documents of the validation text or, with
--train-shard, of the last training shard, which a run that is to choose between them must have left out of its training.
Loss is in nats per token, with the n-gram tilt and without.
"""
import argparse
import gc
import json
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt as g  # noqa: E402


class Documents:
    """The first documents of a stream, in the place of ValidationData; 1 byte a token where there is no sidecar."""

    def __init__(self, tokens: np.ndarray, sizes: np.ndarray | None, count: int):
        starts = np.flatnonzero(tokens == g.BOS_ID)
        first = starts[0]
        last = starts[count] + 1 if count < len(starts) else len(tokens)
        self.tokens = np.array(tokens[first:last])
        self.bytes = np.ones(len(self.tokens), np.uint16) if sizes is None else sizes[first:last]


class Silent:
    """Takes the place of the run log."""

    def event(self, *arguments, **fields):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=[""])
    parser.add_argument("--docs", type=int, default=1 << 40)
    parser.add_argument("--train-shard", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    base = g.Settings.from_environment(os.environ)
    with g.Runtime.start(base) as runtime:
        model = g.GPT(base, runtime.compute_dtype).to(runtime.device)
        looping = g.install(model, *g.read_container(base.artifact_path, model, base), base)
        weights = [p.detach().clone() for p in model.parameters()]
        if options.train_shard:
            documents = Documents(g.open_shard(g.shard_files(base.shards_dir, "train")[-1]), None, options.docs)
        else:
            data = g.ValidationData(base)
            documents = Documents(data.tokens, data.bytes, options.docs)
        rows = []
        for variant in options.variants:
            changes = dict(pair.split("=", 1) for pair in variant.split(",") if pair)
            settings = g.Settings.from_environment(dict(os.environ) | changes)
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), weights)
            gc.collect()
            if runtime.on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            figures = g.test_time_training(model, documents, looping, settings, runtime, Silent())
            per_bit = np.log(2) * figures["bytes"] / figures["targets"]
            memory = round(torch.cuda.max_memory_allocated() / 2**30, 1) if runtime.on_cuda else None
            rows.append(dict(variant=variant, loss=figures["val_loss"], untilted=round(figures["untilted_bpb"] * per_bit, 6),
                             seconds=figures["seconds"], tokens_per_second=figures["tokens_per_second"], memory_gib=memory))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if options.json and runtime.rank == 0:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(dict(machine=runtime.describe(), targets=len(documents.tokens) - 1, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
