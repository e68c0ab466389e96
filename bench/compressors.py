"""Bytes and seconds of every compressor on the integers of one artifact, beside their order-0 entropy.

    ARTIFACT_DIR=... python bench/compressors.py [--json FILE] [--only NAME ...]

Settings come from the environment as in a run. Each compressor packs the same arrays of the artifact in
ARTIFACT_DIR and gives them back; times are wall clock. The integers' bytes are all bytes less those of the
other arrays alone. pergroup needs the program lrzip and is left out without it.
"""
import argparse
import json
import os
import shutil
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt as g  # noqa: E402
import torch  # noqa: E402

CODECS = [name for name in g.CODECS if name != "none"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CODECS, default=list(CODECS))
    options = parser.parse_args()
    settings = g.Settings.from_environment(os.environ)
    _, arrays = g.read_container(settings.artifact_path, g.GPT(settings), settings)
    specs = {name: (a.dtype.name, a.shape) for name, a in arrays.items()}
    codes, rest = g.split_codes(arrays)
    count = sum(a.size for a in codes.values())
    order0 = sum(g.order0_bytes(torch.from_numpy(matrix)) for a in codes.values() for matrix in a)
    print(f"{count:,} integers; order-0 entropy of each matrix alone {order0:,.0f} bytes = "
          f"{8 * order0 / count:.4f} bits each; {len(os.sched_getaffinity(0))} cores, "
          f"{torch.get_num_threads()} threads")
    rows = {"order-0 entropy": dict(code_bytes=round(order0))}
    alone = len(g.compress(rest))
    for name in options.only:
        if name == "pergroup" and not shutil.which("lrzip"):
            continue
        codec = g.CODECS[name]
        began = time.perf_counter()
        streams = codec.pack(arrays)
        packed = time.perf_counter()
        again = codec.unpack(streams, specs)
        unpacked = time.perf_counter()
        if any(again[n].tobytes() != a.tobytes() for n, a in arrays.items()):
            raise SystemExit(f"{name} does not give back what it was given")
        size = sum(map(len, streams))
        rows[name] = dict(all_bytes=size, code_bytes=size - alone, packing_seconds=round(packed - began, 2),
                          unpacking_seconds=round(unpacked - packed, 2))
    print(f"{'':16}{'integers':>12}{'all arrays':>12}{'pack s':>9}{'unpack s':>10}")
    for name, row in rows.items():
        print(f"{name:16}{row['code_bytes']:>12,}{row.get('all_bytes', 0):>12,}"
              f"{row.get('packing_seconds', 0):>9.2f}{row.get('unpacking_seconds', 0):>10.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(integers=count, **rows), file, indent=1)


if __name__ == "__main__":
    main()
