"""Fetch the published data set, or what is still missing of it.

    python tools/download_data.py [--train-shards N] [--out DIR]

It is romeerp/parameter-golf-caseops-v1 of the Hugging Face hub. Prints the DATA_PATH to set.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import prepare_caseops_data as prep  # noqa: E402
from prepare_caseops_data import DataError  # noqa: E402
from tools.check_data import audit  # noqa: E402

REPO = "romeerp/parameter-golf-caseops-v1"
SHARDS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
TOKENIZER = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
FOLDER = Path("data/datasets/fineweb10B_sp8192_caseops")  # where train_gpt.py and run.sh look for it


def download(out: Path, train_shards: int | None) -> Path:
    """Fetches what is missing of the published data set into `out`; returns the folder of its shards.

    Raises DataError offline and where the files are not a sound data set.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError("--download needs huggingface_hub (pip install huggingface_hub)") from None
    numbers = ["*"] if train_shards is None else [f"{index:06d}" for index in range(train_shards)]
    names = ["fineweb_val_*.bin"] + [f"fineweb_train_{number}.bin" for number in numbers]
    patterns = [f"*{SHARDS}/{name}" for name in names] + [f"*{TOKENIZER}"]
    with prep.hold(out):
        try:
            snapshot_download(REPO, repo_type="dataset", local_dir=out, allow_patterns=patterns)
        except Exception as error:  # its releases raise what their HTTP library of the day raises
            reason = (str(error) or repr(error)).splitlines()[0]
            raise DataError(
                f"{REPO}: no download ({reason}); once online, run this again to resume"
            ) from error
        # Published uploads have had one and two levels of `datasets`.
        roots = [root for root in (out, out / "datasets") if (root / "datasets" / SHARDS).is_dir()]
        if not roots:
            raise DataError(f"{out}: the download holds no folder {SHARDS}; has {REPO} changed?")
        folder = roots[0] / "datasets" / SHARDS
        describe(folder, roots[0] / "tokenizers" / TOKENIZER, train_shards)
    return folder


def describe(folder: Path, model: Path, train_shards: int | None) -> None:
    """Puts tokenizer and manifest beside the shards in `folder`, which are published without.

    The manifest says what the shards are found to hold. Raises DataError where they are not sound.
    """
    tokenizer = prep.read_tokenizer(model)
    found = audit(folder, tokenizer.vocab_size)
    if train_shards is not None and sum("train" in shard["file"] for shard in found.shards) < train_shards:
        found.faults.append(f"{folder}: fewer than {train_shards} training shards exist; ask for fewer")
    if found.faults:
        raise DataError("\n".join(found.faults))
    prep.write_file(folder / model.name, tokenizer.model)
    unknown = {"text_bytes": None, "docs_sha256": None}
    val = found.splits["val"] | {"first_doc": 0} | unknown
    train = found.splits["train"] | {"first_doc": val["docs"]} | unknown
    manifest = prep.make_manifest(
        tokenizer,
        model.name,
        source={"file": REPO, "sha256": None},
        splits={"val": val, "train": train},
        duplicates={"rule": "keep", "count": found.shared_docs, "lines": []},
        shards=found.shards,
    )
    prep.write_manifest(folder, manifest)


def run(arguments: list[str]) -> None:
    parser = prep.command_parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (%(default)s)")
    parser.add_argument("--train-shards", type=prep.positive, metavar="N", help="so many training shards")
    options = parser.parse_args(arguments)
    folder = download(options.out, options.train_shards)
    print(f"DATA_PATH={folder}")


def main(arguments: list[str]) -> int:
    return prep.exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
