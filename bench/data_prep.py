"""Speed of prepare_caseops_data.py with one and with two workers, beside the reference tool's.

    python bench/data_prep.py --docs docs.jsonl.xz --sp X.model [--val-docs 2500] [--max-docs N]

Prints MB/s of UTF-8 text, everything included: decompression, JSON, transform, tokens, sidecar, hashes, disk.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece

import prepare_caseops_data as prep

REFERENCE_MB_PER_S = 1.6  # of the reference tool, 222 MB in 139 s on one core: quoted, not measured here


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def measure(options: argparse.Namespace, workers: int) -> tuple[float, dict]:
    """(seconds, manifest) of one preparation into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        manifest = prep.prepare(
            options.docs,
            Path(folder),
            options.sp,
            val_docs=options.val_docs,
            max_docs=options.max_docs,
            workers=workers,
        )
        return time.perf_counter() - started, manifest


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--sp", type=Path, required=True)
    parser.add_argument("--val-docs", type=int, default=2500)
    parser.add_argument("--max-docs", type=int)
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, sentencepiece {sentencepiece.__version__}"
    rows = []
    for workers in (1, 2):
        seconds, manifest = measure(options, workers)
        megabytes = sum(split["text_bytes"] for split in manifest["splits"].values()) / 1e6
        speed = f"{megabytes / seconds:6.1f} MB/s  ({megabytes:.0f} MB in {seconds:.1f} s)"
        rows.append(f"workers {workers}  {speed}")
    print(f"\n{processor_name()}, {os.cpu_count()} cores, {versions}")
    print("\n".join(rows))
    print(f"reference  {REFERENCE_MB_PER_S:6.1f} MB/s  (quoted: one core)")


if __name__ == "__main__":
    main()
