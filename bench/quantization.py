"""What quantization costs: val_bpb, bytes and seconds of each method on the checkpoint in ARTIFACT_DIR.

    ARTIFACT_DIR=... DATA_PATH=... python bench/quantization.py [--json FILE] [--only NAME ...]

Settings come from the environment as in the run that trained the checkpoint. Calibration runs once; every
method then quantizes the same weights, codes them with COMPRESSOR=entropy, reads them back and scores them.
Bytes are artifact and code.
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

PUBLISHED = dict(step_rule="sigma", awq_lite_enabled=False, lqer_enabled=False, compressor="entropy",
                 quantize_only=True)
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


def timed_calibration(model, windows, looping, s, runtime) -> tuple[g.Statistics, float]:
    runtime.synchronize()
    began = time.perf_counter()
    statistics = g.calibrate(model, windows, looping, s, runtime)
    runtime.synchronize()
    return statistics, round(time.perf_counter() - began, 2)


def measure(model, looping, statistics, code, s) -> dict:
    """Quantize the model, read the artifact back into it; what became of it."""
    figures = Figures()
    g.save_artifact(model, looping, copy.deepcopy(statistics), code, s, figures)
    g.install(model, *g.read_container(s.artifact_path, model, s), s)
    matrices, [result] = figures["matrix"], figures["artifact"]
    weights = sum(m["rows"] * m["columns"] for m in matrices)
    bits = sum(m["rows"] * m["columns"] * m["bits_per_weight"] for m in matrices)
    del result["file"]
    return dict(total_bytes=os.path.getsize(s.artifact_path) + code, bits_per_weight=bits / weights,
                corrected=sum(m["lqer"] for m in matrices), **result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    settings = g.Settings.from_environment(os.environ)
    code = len(g.packed_code())
    with g.Runtime.start(settings) as runtime, tempfile.TemporaryDirectory() as folder:
        data = g.TrainingData(settings, runtime)
        validation = g.Evaluator(g.ValidationData(settings), settings, runtime)
        model = g.GPT(settings, runtime.compute_dtype).to(runtime.device).view(compiled=runtime, fp8=True)
        checkpoint = g.read_container(settings.checkpoint_path, model, settings)
        looping = g.install(model, *checkpoint, settings)
        before = validation.score(model, looping)["val_bpb"]
        windows = g.calibration_windows(data, settings)
        statistics, seconds = {}, {}
        for name in ("GPTQ", "by loss, on a trellis"):  # without and with gradients
            s = dataclasses.replace(settings, **METHODS[name])
            kind = s.step_rule
            statistics[kind], seconds[kind] = timed_calibration(model, windows, looping, s, runtime)
        print(f"{runtime.describe()['device']}; before: val_bpb {before:.5f}; calibration on {len(windows)} "
              f"windows of {settings.eval_seq_len}: {seconds['sigma']} s, with gradients {seconds['loss']} s")
        print(f"{'':24}{'val_bpb':>9}{'change':>10}{'bytes':>12}{'bits/w':>8}"
              f"{'quantize, pack s':>18}{'unpack s':>10}")
        rows = []
        for name in options.only:
            s = dataclasses.replace(settings, **METHODS[name], artifact_dir=folder)
            g.install(model, *checkpoint, s)
            model.settings = s
            seen = statistics[s.step_rule] if s.gptq_calibration_batches else None
            row = dict(method=name, **measure(model, looping, seen, code, s))
            row["val_bpb"] = validation.score(model, looping)["val_bpb"]
            row["change"] = round(row["val_bpb"] - before, 8)
            rows.append(row)
            print(f"{name:24}{row['val_bpb']:>9.5f}{row['change']:>+10.5f}{row['total_bytes']:>12,}"
                  f"{row['bits_per_weight']:>8.3f}{row['seconds']:>18.1f}{row['unpacking_seconds']:>10.1f}",
                  flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(dict(machine=runtime.describe(), before=before, code_bytes=code,
                               calibration_seconds=seconds, rows=rows), file, indent=1)


if __name__ == "__main__":
    main()
