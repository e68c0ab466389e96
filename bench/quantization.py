"""What quantization costs: val_bpb, bytes and seconds of each method on the checkpoint that a run left in ARTIFACT_DIR.

    ARTIFACT_DIR=... DATA_PATH=... python bench/quantization.py [--json FILE] [--only NAME ...]

Settings come from the environment as in the run that trained the checkpoint. Calibration runs once; every method then
quantizes the same weights, codes them with COMPRESSOR=entropy, reads them back and scores them. Bytes are artifact and code.
"""
import argparse
import copy
import dataclasses
import json
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt as g  # noqa: E402

PUBLISHED = dict(step_rule="sigma", awq_lite_enabled=False, lqer_enabled=False, compressor="entropy", quantize_only=True)
METHODS = {
    "rounding": dict(PUBLISHED, gptq_calibration_batches=0),
    "GPTQ": PUBLISHED,
    "GPTQ + AWQ-lite": dict(PUBLISHED, awq_lite_enabled=True),
    "GPTQ + LQER": dict(PUBLISHED, lqer_enabled=True, lqer_rank=4, lqer_top_k=3, lqer_asym_group=32),
    "by loss, on a trellis": dict(PUBLISHED, step_rule="loss"),
}


class Figures(dict):
    """Takes the place of the run log and keeps what it is told."""

    def event(self, kind, **fields):
        self.setdefault(kind, []).append(fields)

    result = event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    settings = g.Settings.from_environment(os.environ)
    with g.Runtime.start(settings) as runtime, tempfile.TemporaryDirectory() as folder:
        data, validation = g.TrainingData(settings, runtime), g.Evaluator(g.ValidationData(settings), settings, runtime)
        model = g.GPT(settings, runtime.compute_dtype).to(runtime.device).compile_parts(runtime)
        checkpoint, code = g.read_container(settings.checkpoint_path, model, settings), len(g.packed_code())
        looping = g.install(model, *checkpoint, settings)
        before = validation.score(model, looping)["val_bpb"]
        windows, statistics, seconds = g.calibration_windows(data, settings), {}, {}
        for name in ("GPTQ", "by loss, on a trellis"):  # without and with gradients
            s = dataclasses.replace(settings, **METHODS[name])
            runtime.synchronize()
            began = time.perf_counter()
            statistics[s.uses_curvature] = g.calibrate(model, windows, looping, s, runtime)
            runtime.synchronize()
            seconds[s.uses_curvature] = round(time.perf_counter() - began, 2)
        print(f"{runtime.describe()['device']}; before: val_bpb {before:.5f}; calibration on {len(windows)} windows of "
              f"{settings.eval_seq_len}: {seconds[False]} s, with gradients {seconds[True]} s")
        print(f"{'':30}{'val_bpb':>9}{'change':>10}{'bytes':>12}{'bits/w':>8}{'quantize s':>12}{'pack s':>8}"
              f"{'unpack s':>10}")
        rows = []
        for name in options.only:
            s = dataclasses.replace(settings, **METHODS[name], artifact_dir=folder)
            g.install(model, *checkpoint, s)
            model.settings, figures = s, Figures()
            runtime.synchronize()
            seen = copy.deepcopy(statistics[s.uses_curvature]) if s.gptq_calibration_batches else None
            g.save_artifact(model, looping, seen, code, s, figures)
            looping = g.install(model, *g.read_container(s.artifact_path, model, s), s)
            after, [times] = validation.score(model, looping)["val_bpb"], figures["artifact"]
            del times["file"]
            sizes = [m["rows"] * m["columns"] for m in figures["matrix"]]
            bits = sum(size * m["bits_per_weight"] for size, m in zip(sizes, figures["matrix"]))
            row = dict(method=name, val_bpb=after, change=round(after - before, 8),
                       total_bytes=os.path.getsize(s.artifact_path) + code,
                       bits_per_weight=bits / sum(sizes), corrected=sum(m["lqer"] for m in figures["matrix"]), **times)
            rows.append(row)
            print(f"{name:30}{after:>9.5f}{row['change']:>+10.5f}{row['total_bytes']:>12,}{row['bits_per_weight']:>8.3f}"
                  f"{row['quantization_seconds']:>12.1f}{row['packing_seconds']:>8.1f}{row['unpacking_seconds']:>10.1f}",
                  flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(dict(machine=runtime.describe(), before=before, code_bytes=code,
                               calibration_seconds=seconds, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
