"""Pack the files that an evaluation runs into the one self-extracting script that a submission ships.

    python tools/pack_submission.py [FILE]     default packed/train_gpt.py
"""
from __future__ import annotations

import ast
import base64
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import brotli

ROOT = Path(__file__).resolve().parent.parent
UNPACKED = ROOT / "source"  # where a submission keeps the unpacked files
SOURCE = UNPACKED if UNPACKED.is_dir() else ROOT
sys.path[:0] = [str(SOURCE), str(ROOT)]

from env_settings import InputError  # noqa: E402
from host import lasting_console, write_whole  # noqa: E402

EVALUATION_FILES = ("train_gpt.py", "gpt_kernels.py", "env_settings.py", "host.py", "online_ngram_tilt.py",
                    "online_ngram_state.c")
KERNEL_DECORATORS = {"jit", "gluon_jit", "row_kernel"}
LOADER = '''"""A Parameter Golf submission in one file, packed by run.sh pack-code: a train_gpt.py."""
import atexit, base64, brotli, hashlib, json, os, runpy, shutil, sys, tempfile
packed = base64.b85decode("%s")
here = os.path.abspath(__file__)
name = "packed-" + hashlib.sha256(packed).hexdigest()[:16]
folder = os.path.join(os.path.dirname(here), "__pycache__", name)
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
        remedy = "pip install python-minifier"
        raise InputError(f"python-minifier: the size of the code is counted minified; {remedy}") from None
    texts = {name: (SOURCE / name).read_text(encoding="utf-8") for name in EVALUATION_FILES}
    versions = platform.python_version(), importlib.metadata.version("python-minifier"), brotli.version
    packer = LOADER, Path(__file__).read_text(encoding="utf-8")
    stamp = hashlib.sha256(json.dumps([texts, versions, packer]).encode()).hexdigest()
    folder = Path.home() / ".cache" / "parameter_golf"
    for kept in folder.glob(f"{stamp}-*.py"):
        packed = kept.read_bytes()
        if kept.stem.endswith(hashlib.sha256(packed).hexdigest()):  # else it is damaged and made again
            return packed
    packed = minified(texts)
    with suppress(OSError):  # without a home to write to it takes the same seconds next time
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(str(folder / f"{stamp}-{hashlib.sha256(packed).hexdigest()}.py"), packed)
    return packed


def minified(texts: dict[str, str]) -> bytes:
    """The files of that name and text as one packed script."""
    small = {name: minified_python(name, text) if name.endswith(".py") else minified_c(text)
             for name, text in texts.items()}
    packed = brotli.compress(json.dumps(small).encode(), quality=11, lgwin=24)
    return (LOADER % base64.b85encode(packed).decode()).encode()


def minified_python(name: str, text: str) -> str:
    """Without comments, docstrings, annotations, lines marked `not shipped`; local names are short.

    Triton binds the arguments of its kernels by name and type: they stay as they are. So do annotated fields.
    """
    import python_minifier
    tree = ast.parse(re.sub(r"^.*# not shipped\n", "", text, flags=re.M), name)
    kept = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
            if is_kernel(function):
                kept.update(argument.arg for argument in arguments)
            else:
                for argument in arguments:
                    argument.annotation = None
    options = python_minifier.RemoveAnnotationsOptions(
        remove_variable_annotations=False, remove_argument_annotations=False)
    return python_minifier.minify(
        ast.unparse(tree), name, remove_literal_statements=True, remove_annotations=options,
        rename_globals=False, preserve_locals=sorted(kept),
        hoist_literals=False)  # a kernel may not read globals


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a decorator hands the function to Triton."""
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list}
    return not decorators.isdisjoint(KERNEL_DECORATORS)


def minified_c(text: str) -> str:
    """Without comments and blanks around lines, literals untouched."""
    literal = r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
    comment = r"/\*.*?\*/|//[^\n]*"
    text = re.sub(f"{literal}|{comment}", lambda match: match[1] or " ", text, flags=re.S)
    return re.sub(r"\s*\n\s*", "\n", text)


@lasting_console()
def main(arguments: list[str]) -> int:
    path = Path(arguments[0] if arguments else "packed/train_gpt.py")
    try:
        packed = packed_code()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(str(path), packed)
    except (InputError, OSError) as error:
        print(f"pack_submission.py: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(packed):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
