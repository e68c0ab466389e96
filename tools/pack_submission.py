"""Pack the files that an evaluation runs into the one self-extracting script that a submission ships.

    python tools/pack_submission.py [FILE]     default packed/train_gpt.py
"""
from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import brotli

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "source" if (ROOT / "source").is_dir() else ROOT  # a submission keeps the unpacked files there
sys.path[:0] = [str(SOURCE), str(ROOT)]

from env_settings import InputError  # noqa: E402

EVALUATION_FILES = ("train_gpt.py", "gpt_kernels.py", "env_settings.py", "online_ngram_tilt.py", "online_ngram_state.c")
LOADER = '''"""A Parameter Golf submission in one file, packed by run.sh pack-code. Run it as the train_gpt.py it holds."""
import atexit, base64, brotli, hashlib, json, os, runpy, shutil, sys, tempfile
packed = base64.b85decode("%s")
here = os.path.abspath(__file__)
folder = os.path.join(os.path.dirname(here), "__pycache__", "packed-" + hashlib.sha256(packed).hexdigest()[:16])
try:
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK): raise OSError
except OSError:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
for name, text in json.loads(brotli.decompress(packed)).items():
    handle, part = tempfile.mkstemp(dir=folder)
    with open(handle, "w", encoding="utf-8") as file: file.write(text)
    os.replace(part, os.path.join(folder, name))
sys.path.insert(0, folder)
runpy.run_path(os.path.join(folder, "train_gpt.py"), {"PACKED_SCRIPT": here}, "__main__")
'''


@functools.cache
def packed_code() -> bytes:
    """Every evaluation file, minified and compressed, behind a loader.

    Minifying takes seconds: what came of the same files is kept in ~/.cache/parameter_golf.
    """
    try:
        import python_minifier  # noqa: F401
    except ImportError:
        raise InputError("python-minifier: the size of the code is counted minified; pip install python-minifier") from None
    texts = {name: (SOURCE / name).read_text(encoding="utf-8") for name in EVALUATION_FILES}
    made_by = platform.python_version(), importlib.metadata.version("python-minifier"), brotli.version, LOADER
    stamp = hashlib.sha256(json.dumps([texts, made_by]).encode()).hexdigest()
    kept = Path.home() / ".cache" / "parameter_golf" / f"{stamp}.py"
    if kept.exists():
        return kept.read_bytes()
    packed = minified(texts)
    with suppress(OSError):  # without a home to write to it takes the same seconds next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, packed)
    return packed


def write_whole(path: Path, data: bytes) -> None:
    """`path` holds all of `data` or what it held before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def minified(texts: dict[str, str]) -> bytes:
    """The files of that name and text as one packed script."""
    import python_minifier
    texts = dict(texts)
    for name in texts:
        if name.endswith(".py"):
            texts[name] = re.sub(r"^.*# not shipped\n", "", texts[name], flags=re.M)
            kernels = re.findall(r"^@(?:gluon_)?jit\ndef \w+\((.*?)\):$", texts[name], flags=re.S | re.M)  # Triton needs their
            arguments = [word for line in kernels for word in re.findall(r"(\w+)\s*[,:]|(\w+)$", line) for word in word if word]
            texts[name] = python_minifier.minify(
                texts[name], name, remove_literal_statements=True, rename_globals=False, preserve_locals=arguments,
                hoist_literals=False,  # Triton's kernels may not read globals
                remove_annotations=python_minifier.RemoveAnnotationsOptions(remove_variable_annotations=False,
                                                                                    remove_argument_annotations=False))
        else:  # C: without comments, literals untouched
            literal, comment = r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')', r"/\*.*?\*/|//[^\n]*"
            texts[name] = re.sub(f"{literal}|{comment}", lambda m: m[1] or " ", texts[name], flags=re.S)
            texts[name] = re.sub(r"\s*\n\s*", "\n", texts[name])
    packed = brotli.compress(json.dumps(texts).encode(), quality=11, lgwin=24)
    return (LOADER % base64.b85encode(packed).decode()).encode()


def main(arguments: list[str]) -> int:
    path = Path(arguments[0] if arguments else "packed/train_gpt.py")
    try:
        packed = packed_code()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, packed)
    except (InputError, OSError) as error:
        print(f"pack_submission.py: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(packed):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
