"""The artifact and the packed script: exact, small, whole whatever happens, and safe to take from a stranger."""
import ast
import base64
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
import torch

import host
import train_gpt as g
from env_settings import fields_by_group
from tools import pack_submission as pack
from tests.synthetic import ROOT, changed, environment, events, launch, main_here, record, runtime, tiny, write_corpus

torch.set_num_threads(1)

SMALL = dict(MODEL_DIM=16, NUM_HEADS=2, NUM_KV_HEADS=1, ROPE_DIMS=4, NUM_LAYERS=3, XSA_LAST_N=3, LOOP_START=0, LOOP_END=0,
             PARALLEL_START_LAYER=2, ITERATIONS=2, GPTQ_CALIBRATION_BATCHES=2, EVAL_SEQ_LEN=64)
RUN = dict(ITERATIONS=4, GPTQ_CALIBRATION_BATCHES=4)
FORMS = {"default": {},
         "int8 gates": dict(GATED_ATTN_QUANT_GATE=1),
         "published": dict(STEP_RULE="sigma"),
         "published, int8 gates": dict(STEP_RULE="sigma", GATED_ATTN_QUANT_GATE=1),
         "published, awq and lqer": dict(AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_SIZE=8, AWQ_LITE_GROUP_TOP_K=3, LQER_ENABLED=1,
                                         LQER_RANK=2, LQER_ASYM_GROUP=8, LQER_TOP_K=4)}
PACKERS = [pytest.param(name, marks=pytest.mark.skipif(name == "pergroup" and not shutil.which("lrzip"),
                                                       reason="needs the program lrzip")) for name in g.CODECS]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards") / "data", 200, 12)


@pytest.fixture
def place(tmp_path, data):
    """A fresh folder for one run."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """One run of the script from start to end, as a user starts it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").symlink_to(data)
    result = launch(environment(folder, **RUN))
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(folder=folder, out=folder / "out", record=record(folder))


@pytest.fixture
def copy(finished, place):
    """The files of the finished run in a folder of its own."""
    (place / "out").mkdir()
    for file in finished.out.glob("*.ptz"):
        shutil.copy(file, place / "out")
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory, data):
    """The artifact of a default run with a very small model."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "data").symlink_to(data)
    s = tiny(folder, **SMALL)
    log = g.RunLog(s, runtime())
    g.run(s, runtime(), log)
    log.close("finished")
    model = g.GPT(s)
    table, arrays = g.read_container(s.artifact_path, model, s)
    return SimpleNamespace(folder=folder, s=s, model=model, table=table, arrays=arrays, path=s.artifact_path,
                           bytes=Path(s.artifact_path).read_bytes())


def random_model(s: g.Settings, seed: int = 0) -> g.GPT:
    draw = torch.Generator().manual_seed(seed)
    model = g.GPT(s)
    with torch.no_grad():
        for p in model.parameters():
            spread = torch.randn(p.shape[-1:], generator=draw).mul(0.4).exp()
            p.copy_(0.1 * torch.randn(p.shape, generator=draw) * spread)
    return model


def random_statistics(s: g.Settings, seed: int = 0) -> g.Statistics:
    draw = torch.Generator().manual_seed(seed)
    d, n = s.model_dim, s.num_layers
    shapes = dict(head=(1, s.vocab_size, d), qkv=(n, d + 2 * s.kv_dim, d), out=(n, d, d), up=(n, s.mlp_dim, d),
                  down=(n, d, s.mlp_dim))
    hessian, curvature = {}, {}
    for site, (layers, rows, columns) in shapes.items():
        x = torch.randn(layers, columns, 2 * columns, generator=draw) * torch.randn(columns, 1, generator=draw).exp()
        hessian[site] = x @ x.mT / columns
        curvature[site] = torch.randn(layers, rows, generator=draw).exp()
    return g.Statistics(hessian, curvature, torch.ones(n))


@pytest.fixture(scope="module")
def forms():
    """For each form of quantization: settings, quantized matrices, table and arrays of a small model."""
    made = {}
    for name, changes in FORMS.items():
        s = tiny(**SMALL | changes)
        model = random_model(s)
        problems = g.build_problems(model, random_statistics(s))
        if s.step_rule == "sigma":
            quantized = g.quantize_published(problems, s)
        else:
            steps = {role: g.steps_by_loss(p) for role, p in problems.items()}
            quantized = g.quantize_by_loss(problems, steps, g.octaves_for(4, steps))
        quantization, arrays = g.artifact_arrays(model, quantized, s)
        table = dict(function=s.function_settings(), looping=True, quantization=quantization)
        made[name] = SimpleNamespace(s=s, model=model, quantized=quantized, table=table, arrays=arrays)
    return made


def specs_of(arrays: dict[str, np.ndarray]) -> g.Specs:
    return {name: (a.dtype.name, a.shape) for name, a in arrays.items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert list(specs_of(ours).items()) == list(specs_of(theirs).items())
    assert all(ours[name].tobytes() == a.tobytes() for name, a in theirs.items())


def assert_packs(arrays: dict[str, np.ndarray], packer: str) -> list[bytes]:
    streams = g.CODECS[packer].pack(arrays)
    assert_same(g.CODECS[packer].unpack(streams, specs_of(arrays)), arrays)
    return streams


# --- Packing


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_array_and_weight_comes_back_exactly(forms, tmp_path, form, packer):
    made, path = forms[form], str(tmp_path / "a.ptz")
    assert any("column_scale" in name and a.dtype == np.float32 and (a < 1).any() for name, a in made.arrays.items()) == (
        "awq" in form)
    assert any(q.low_rank for q in made.quantized.values()) == ("lqer" in form)
    assert ("attn_gate.codes_by_row" in made.arrays) == ("gates" in form)
    assert made.arrays["mlp.fc.row_scale"].dtype == ("float16" if "published" in form else "int16")
    s = changed(made.s, compressor=packer)
    g.write_container(path, made.table, made.arrays, packer)
    loaded = g.GPT(s)
    table, arrays = g.read_container(path, loaded, s)
    assert_same(arrays, made.arrays)
    assert table["quantization"] == made.table["quantization"] and g.install(loaded, table, arrays, s) is True
    for name, role in g.matrix_roles(s).items():
        assert torch.equal(role.weights(loaded), g.dequantize(made.quantized[name])), name
    stacks = {role.stack for role in g.matrix_roles(s).values()}
    ours = dict(loaded.named_parameters())
    for name, p in made.model.named_parameters():
        if name == "attn_gate" and s.gated_attn_quant_gate:
            assert ((ours[name] - p).abs() <= p.abs().amax(2, keepdim=True) / 127 * 0.51).all()
        elif name not in stacks:
            assert torch.equal(ours[name], p.half().float()), name


def code_cases():
    draw = np.random.default_rng(0)

    def uniform(*shape, low=-127, high=128):
        return draw.integers(low, high, shape).astype(np.int8)

    spread = np.exp2(np.linspace(-4, 5, 40))
    yield "all zero", dict(codes=np.zeros((2, 31, 17), np.int8))
    yield "one value", dict(codes=np.full((2, 31, 17), -77, np.int8))
    yield "one code", dict(codes=np.full((1, 1, 1), 127, np.int8))
    yield "extremes", dict(codes=draw.choice(np.int8([-127, 127]), (2, 9, 40)))
    yield "all of -127..127", dict(codes=uniform(2, 64, 48))
    yield "all of int8", dict(codes=uniform(1, 64, 48, low=-128))
    yield "one row", dict(codes=uniform(2, 1, 300))
    yield "one column", dict(codes=uniform(2, 300, 1))
    yield "zero rows among others", dict(codes=uniform(2, 40, 30) * (draw.random((2, 40, 1)) < 0.3))
    yield "wide spread of columns", dict(codes=(draw.normal(size=(2, 50, 40)) * spread).clip(-127, 127).astype(np.int8))
    yield "equal rows", dict(codes=np.repeat(uniform(2, 1, 30), 20, 1))
    for name, dtype in (("int16", np.int16), ("float16", np.float16)):
        row = (draw.normal(size=(2, 20)) * 9).astype(dtype)
        yield f"{name} row scales", dict(codes=uniform(2, 20, 24), row_scale=row)
    row = draw.choice(np.int16([-32768, 32767, 0, -1, 255, -256]), (2, 20))
    column = draw.choice(np.int8([-128, 127, 0]), (2, 24))
    yield "huge exponents", dict(codes=uniform(2, 20, 24), row_scale=row, column_scale=column)
    yield "huge exponents of small codes", dict(codes=uniform(2, 20, 24, low=-1, high=2), row_scale=row, column_scale=column)
    bits = np.arange(0, 65536, 256, dtype=np.uint16).reshape(1, 256)
    yield "float16 of all kinds", dict(codes=uniform(1, 256, 3), row_scale=bits.view(np.float16))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("case", [parts for _, parts in code_cases()], ids=[name for name, _ in code_cases()])
def test_adverse_codes_come_back_exactly(case, packer):
    arrays = {}
    for role in ("attn.c_v", "mlp.fc"):  # the second is one of those that pergroup sorts
        arrays |= {f"{role}.{part}": a for part, a in case.items()}
    assert_packs(arrays | dict(vector=np.arange(3, dtype=np.float16), scalar=np.float16(2.5).reshape(())), packer)


def test_any_number_of_equal_codes_comes_back():
    """A class that holds one symbol fills its row of the table; the rounding there must not wrap around to nothing."""
    wrong = []
    for count in range(1, 400):
        arrays = {"tok_emb.codes": np.zeros((1, count, 1), np.int8)}
        try:
            assert_packs(arrays, "entropy")
        except BaseException as error:  # the panics of constriction are no Exception
            wrong.append((count, type(error).__name__))
    assert not wrong


def test_any_mixture_comes_back():
    draw = np.random.default_rng(5)
    for _ in range(150):
        layers, rows, columns = draw.integers(1, (4, 30, 30))
        spread = np.exp2(draw.uniform(-6, 7) + draw.normal(size=(layers, rows, 1)) + draw.normal(size=(layers, 1, columns)))
        codes = (draw.normal(size=(layers, rows, columns)) * spread).clip(-127, 127).astype(np.int8)
        codes *= draw.random((layers, rows, 1)) < draw.choice([1, 0.8])
        arrays = {"a.codes": codes, "a.row_scale": draw.integers(-200, 100, (layers, rows)).astype(np.int16)}
        if draw.random() < 0.5:
            arrays["a.column_scale"] = draw.integers(-16, 17, (layers, columns)).astype(np.int8)
        assert_packs(arrays, "entropy")


def gaussian_codes(seed: int, layers=2, rows=768, columns=512, deviation=6.0, spread=0.5) -> np.ndarray:
    draw = np.random.default_rng(seed)
    wide = deviation * np.exp(spread * draw.normal(size=(layers, 1, columns)))
    return (draw.normal(size=(layers, rows, columns)) * wide).round().clip(-127, 127).astype(np.int8)


def order0_bytes(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / codes.size)).sum() / 8)


@pytest.mark.parametrize("spread", [0.0, 0.35])
def test_entropy_coding_reaches_the_order_0_bound(spread):
    codes = gaussian_codes(1, spread=spread)
    assert sum(map(len, assert_packs({"mlp.fc.codes": codes}, "entropy"))) < 1.005 * order0_bytes(codes)


def test_columns_of_their_own_spread_are_coded_below_the_order_0_bound():
    codes = gaussian_codes(1)
    assert sum(map(len, g.EntropyCodec().pack({"mlp.fc.codes": codes}))) < 0.975 * order0_bytes(codes)


def naive_walk(rows: list[list[int]]) -> list[int]:
    order, unused = [0], set(range(1, len(rows)))
    while unused:
        last = rows[order[-1]]
        order.append(min(unused, key=lambda i: (sum(abs(a - b) for a, b in zip(rows[i], last)), i)))
        unused.remove(order[-1])
    return order


@pytest.mark.parametrize("rows, columns, largest", [(1, 4, 5), (2, 1, 1), (40, 2, 1), (40, 3, 2), (60, 8, 127),
                                                    (33, 1, 127)])
def test_similarity_order_is_the_greedy_walk_with_ties_to_the_lowest_row(rows, columns, largest):
    draw = np.random.default_rng(rows * columns)
    codes = draw.integers(-largest, largest + 1, (3, rows, columns)).astype(np.int8)
    assert g.similarity_order(torch.from_numpy(codes)).tolist() == [naive_walk(layer) for layer in codes.tolist()]


def test_without_lrzip_pergroup_ends_before_training(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    result = main_here(environment(place, COMPRESSOR="pergroup", **RUN))
    [line] = result.stderr.splitlines()
    assert result.returncode == 2
    assert line.startswith("train_gpt.py: COMPRESSOR: ") and "lrzip" in line
    failed = record(place)
    assert failed["status"] == "failed" and not events(failed, "step") and not list((place / "out").glob("*.ptz*"))
    with pytest.raises(RuntimeError, match="lrzip"):
        g.PergroupCodec().pack({"mlp.fc.codes": np.zeros((1, 4, 4), np.int8)})


def test_an_interruption_does_not_wait_for_lrzip(tmp_path, monkeypatch):
    started = tmp_path / "started"
    for name, text in (("prlimit", f"echo $$ >> {started}; exec sleep 600"), ("lrzip", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    previous = signal.signal(signal.SIGALRM, g.stop_on_signal)
    began = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(SystemExit):
            g.PergroupCodec().pack({f"{role}.codes": np.zeros((1, 4, 4), np.int8) for role in ("attn.c_q", "attn.c_v", "mlp.fc")})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - began < 120
    for process in started.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


# --- The container: what it is, and what it refuses


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    """Table and payload of an artifact."""
    head = g.ARTIFACT_HEADER.unpack_from(data)[2]
    start = g.ARTIFACT_HEADER.size
    return json.loads(brotli.decompress(data[start:start + head])), data[start + head:]


def signed(head: bytes, payload: bytes) -> bytes:
    """An artifact of this packed table and this payload, with a checksum that fits."""
    digest = hashlib.sha256(head + payload).digest()
    return g.ARTIFACT_HEADER.pack(g.ARTIFACT_MAGIC, g.ARTIFACT_VERSION, len(head), len(payload), digest) + head + payload


def rebuilt(table, payload: bytes) -> bytes:
    return signed(brotli.compress(json.dumps(table).encode(), quality=1), payload)


def refusal(path, model, s) -> str:
    with pytest.raises(g.InputError) as caught:
        g.read_container(str(path), model, s)
    return str(caught.value)


def one_line(path) -> str:
    return f"{path}: no whole artifact of version 3; copy it again or train again"


@pytest.mark.parametrize("changes", [
    dict(NUM_LOOPS=2), dict(NUM_LOOPS=0), dict(LOOP_START=1, LOOP_END=1), dict(GATE_WINDOW=8), dict(LEAKY_RELU_SQ_SLOPE=0.3),
    dict(SMEAR_GATE_ENABLED=0), dict(SMEAR_GATE_BOS_FIX=0), dict(LOGIT_SOFTCAP=20), dict(ASYM_LOGIT_RESCALE=0),
    dict(ROPE_BASE=5000), dict(ROPE_DIMS=8), dict(XSA_LAST_N=2), dict(SPARSE_ATTN_GATE_SCALE=1),
    dict(SPARSE_ATTN_GATE_ENABLED=0), dict(GATED_XSA=1), dict(SKIP_GATES_ENABLED=0),
    dict(LN_SCALE=0), dict(MLP_MULT=3), dict(NUM_KV_HEADS=2), dict(VOCAB_SIZE=300)], ids=str)
def test_another_function_is_refused_by_name(small, changes):
    s = tiny(small.folder, **SMALL | changes)
    lines = refusal(small.path, g.GPT(s), s).splitlines()
    assert {line.split(": ")[0] for line in lines} == changes.keys()
    for line in lines:
        name = line.split(": ")[0]
        theirs = getattr(small.s, name.lower())
        assert small.path in line and line.endswith(f"was made with {theirs}; set it to that")


def retold(small, path, function) -> None:
    """The small artifact, with this said of its function."""
    table, payload = taken_apart(small.bytes)
    path.write_bytes(rebuilt(table | dict(function=function), payload))


def test_a_setting_that_came_after_the_file_has_its_default_there(small, tmp_path):
    path, theirs = tmp_path / "a.ptz", taken_apart(small.bytes)[0]["function"]
    newer = next(name for name in theirs if getattr(small.s, name) == getattr(g.Settings, name) is True)
    retold(small, path, {name: value for name, value in theirs.items() if name != newer})
    assert_same(g.read_container(str(path), small.model, small.s)[1], small.arrays)
    other = changed(small.s, **{newer: False})
    line = refusal(path, small.model, other)
    assert line == f"{newer.upper()}: False, but {path} was made with True; set it to that"


def test_a_setting_that_is_gone_is_named(small, tmp_path):
    path, theirs = tmp_path / "a.ptz", taken_apart(small.bytes)[0]["function"]
    retold(small, path, theirs | dict(old_gate=0.5))
    line = refusal(path, small.model, small.s)
    assert line == f"{path}: made with OLD_GATE=0.5, which is no setting here; use the script that made it"


def test_every_setting_of_model_and_gates_travels():
    free = {"tied_embed_init_std", "qk_gain_init"}
    groups = fields_by_group(g.Settings)
    expected = {field.name for field in groups["Model"] + groups["Gates"]}
    assert tiny().function_settings().keys() == expected - free | {"vocab_size"} and free < expected


def test_settings_of_training_and_saving_do_not_refuse(small):
    s = tiny(small.folder, **SMALL | dict(SEED=5, MATRIX_LR=0.1, QK_GAIN_INIT=2, ITERATIONS=7, VAL_BATCH_TOKENS=8192,
                                          COMPRESSOR="brotli", STEP_RULE="sigma", MATRIX_BITS=5, GPTQ_CALIBRATION_BATCHES=0))
    assert_same(g.read_container(small.path, g.GPT(s), s)[1], small.arrays)


def damages():
    yield "nothing", lambda d: b""
    yield "header only", lambda d: d[:g.ARTIFACT_HEADER.size]
    yield "half a header", lambda d: d[:20]
    yield "last byte missing", lambda d: d[:-1]
    yield "half", lambda d: d[:len(d) // 2]
    yield "a byte more", lambda d: d + b"\0"
    yield "twice", lambda d: d + d
    yield "other magic", lambda d: b"X" + d[1:]
    yield "version 2", lambda d: d[:8] + b"\2" + d[9:]
    yield "version 4", lambda d: d[:8] + b"\4" + d[9:]
    yield "longer table", lambda d: d[:12] + bytes([d[12] + 1]) + d[13:]
    for part, at in (("lengths", 18), ("checksum", 30), ("table", 70), ("payload", -50)):
        yield f"flipped bit: {part}", lambda d, at=at % (1 << 30): d[:at % len(d)] + bytes([d[at % len(d)] ^ 4]) + \
            d[at % len(d) + 1:]


@pytest.mark.parametrize("damage", [d for _, d in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_file_is_refused_in_one_line(small, tmp_path, damage):
    path = tmp_path / "a.ptz"
    path.write_bytes(damage(small.bytes))
    assert refusal(path, small.model, small.s) == one_line(path)


def test_a_missing_file_is_named_with_the_remedy(small, tmp_path):
    for path in (tmp_path / "none.ptz", tmp_path):
        line = refusal(path, small.model, small.s)
        assert line.startswith(f"{path}: ") and "ARTIFACT_DIR" in line and len(line.splitlines()) == 1


def test_pergroup_from_a_stranger_needs_consent(small, tmp_path):
    path, (table, payload) = tmp_path / "a.ptz", taken_apart(small.bytes)
    path.write_bytes(rebuilt(table | dict(compressor="pergroup", streams=[0] * 7 + [len(payload)]), payload))
    line = refusal(path, small.model, small.s)
    assert line.startswith("COMPRESSOR: ") and str(path) in line and len(line.splitlines()) == 1


def checkpoint(s, model, path) -> tuple[dict, dict]:
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    table = dict(function=s.function_settings(), looping=False, quantization=None)
    g.write_container(str(path), table, arrays, "none")
    return table, arrays


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    s = tiny(**SMALL)
    model = random_model(s)
    with torch.no_grad():
        model.tok_emb[0, :5] = torch.tensor([-0.0, 1e-45, 3.4e38, math.pi, -1e-30])
    _, arrays = checkpoint(s, model, tmp_path / "c.ptz")
    table, again = g.read_container(str(tmp_path / "c.ptz"), g.GPT(s), s)
    assert_same(again, arrays)
    loaded = random_model(s, 1)
    assert g.install(loaded, table, again, s) is False
    assert all(a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
               for a, b in zip(loaded.parameters(), model.parameters()))


def falsified(arrays: dict[str, np.ndarray]):
    """The arrays with one of them missing, too many, of another type or shape: (what, arrays)."""
    for name, a in arrays.items():
        others = {k: v for k, v in arrays.items() if k != name}
        yield f"{name} missing", others
        yield f"{name} renamed", others | {name + "x": a}
        yield f"{name} wider", arrays | {name: a.astype({"f": "float64", "i": "int32"}[a.dtype.kind])}
        yield f"{name} retyped", arrays | {name: a.view({2: "uint16", 1: "uint8", 4: "uint32"}[a.itemsize])}
        yield f"{name} flat", arrays | {name: a.reshape(1, *a.shape)}
        if a.ndim > 1:
            yield f"{name} transposed", arrays | {name: a.reshape(*a.shape[:-2], a.shape[-1], -1, 1)}
        yield f"{name} longer", arrays | {name: np.concatenate((a.ravel(), a.ravel()[:1]))}
        yield f"{name} empty", arrays | {name: a.ravel()[:0]}
    yield "one too many", arrays | dict(extra=np.zeros(3, np.float16))


def accepted(path, table, cases, model, s) -> list[str]:
    """Which of the cases are not refused with the one clear line."""
    found = []
    for what, arrays in cases:
        g.write_container(str(path), table, arrays, "none")
        try:
            g.read_container(str(path), model, s)
            found.append(what)
        except g.InputError as error:
            assert str(error) == one_line(path), what
    return found


@pytest.mark.parametrize("form", ["default", "int8 gates", "published, awq and lqer"])
def test_arrays_that_the_model_does_not_have_are_refused(forms, tmp_path, form):
    made, path = forms[form], tmp_path / "a.ptz"
    assert not accepted(path, made.table, falsified(made.arrays), made.model, made.s)


def test_tensors_that_a_checkpoint_should_not_have_are_refused(tmp_path):
    s = tiny(**SMALL)
    model, path = random_model(s), tmp_path / "c.ptz"
    table, arrays = checkpoint(s, model, path)
    assert not accepted(path, table, falsified(arrays), model, s)


@pytest.mark.parametrize("quantized", [True, False], ids=["artifact", "checkpoint"])
def test_a_doubled_array_is_refused(forms, tmp_path, quantized):
    """A name that stands twice in the table's text, with its bytes twice in the payload."""
    made, path = forms["default"], tmp_path / "a.ptz"
    if quantized:
        g.write_container(str(path), made.table, made.arrays, "none")
    else:
        checkpoint(made.s, made.model, path)
    table, payload = taken_apart(path.read_bytes())
    for name, (dtype, shape) in table["arrays"].items():
        raw = np.dtype(dtype).itemsize * math.prod(shape)
        text = json.dumps(table | dict(streams=[len(payload) + raw]))
        entry = f'"{name}": {json.dumps([dtype, shape])}'
        assert text.count(entry) == 1
        head = brotli.compress(text.replace(entry, f"{entry}, {entry}").encode(), quality=1)
        path.write_bytes(signed(head, payload + bytes(raw)))
        assert refusal(path, made.model, made.s) == one_line(path), name


def test_a_strangers_words_reach_the_terminal_in_one_short_line(small, tmp_path):
    """What the table says of the function is shown to the user: no line breaks, no control characters, no megabytes."""
    path, (table, payload) = tmp_path / "a.ptz", taken_apart(small.bytes)
    for value in ("0.5\nall is well", "\x1b[2J\x1b]0;title\x07", "x" * 100_000, list(range(10_000))):
        path.write_bytes(rebuilt(table | dict(function=table["function"] | dict(num_loops=value)), payload))
        line = refusal(path, small.model, small.s)
        assert len(line.splitlines()) == 1 and line.isprintable() and len(line) < 1000 and str(path) in line


@pytest.mark.parametrize("changes", [
    dict(step_rule="other"), dict(step_rule="loss"), dict(lqer=[65, 8]), dict(lqer=[0, 8]), dict(lqer=[2, 0]),
    dict(lqer=[2, 7]), dict(lqer=[2]), dict(lqer=[True, 8]), dict(corrected=[]), dict(corrected=None), dict(int8_gates=True)],
    ids=str)
def test_a_quantization_that_does_not_fit_the_arrays_is_refused(forms, tmp_path, changes):
    made, path = forms["published, awq and lqer"], tmp_path / "a.ptz"
    table = made.table | dict(quantization=made.table["quantization"] | changes)
    g.write_container(str(path), table, made.arrays, "none")
    assert refusal(path, made.model, made.s) == one_line(path)


@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.inf, math.nan])
def test_column_scales_of_awq_lite_are_fractions(forms, tmp_path, value):
    made, path = forms["published, awq and lqer"], tmp_path / "a.ptz"
    scale = made.arrays["mlp.fc.column_scale"].copy()
    scale[1, 2] = value
    g.write_container(str(path), made.table, made.arrays | {"mlp.fc.column_scale": scale}, "none")
    assert refusal(path, made.model, made.s) == one_line(path)


def test_a_group_that_divides_no_factor_is_refused(forms, tmp_path):
    """The arrays are as the table promises, but the scales would not cover the factor."""
    made, path = forms["published, awq and lqer"], tmp_path / "a.ptz"
    quantization = made.table["quantization"] | dict(lqer=[2, 9])
    arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in g.layout(made.model, quantization).items()}
    g.write_container(str(path), made.table | dict(quantization=quantization), arrays, "none")
    assert refusal(path, made.model, made.s) == one_line(path)


def test_a_checkpoint_without_its_stream_is_refused(forms, tmp_path):
    made, path = next(iter(forms.values())), tmp_path / "a.ptz"
    table = dict(function=made.s.function_settings(), looping=True, quantization=None, compressor="none",
                 arrays=g.layout(made.model, None), streams=[])
    path.write_bytes(rebuilt(table, b""))
    assert refusal(path, made.model, made.s) == one_line(path)


def test_looping_without_loops_is_refused(tmp_path):
    s, path = tiny(**SMALL | dict(NUM_LOOPS=0)), tmp_path / "a.ptz"
    model = random_model(s)
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    g.write_container(str(path), dict(function=s.function_settings(), looping=True, quantization=None), arrays, "none")
    assert refusal(path, model, s) == one_line(path)


def modules(tree: ast.Module) -> set[str]:
    """The first names of all modules that a script imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[0] for name in names}


def test_nothing_in_an_artifact_is_code():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    imported = modules(tree)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not imported & {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
    assert not called & {"torch.load", "torch.save", "np.load", "np.save", "eval", "exec", "torch.jit.load"}


# --- Fuzz

BOMB_BYTES = 1 << 28
FUZZ_COUNTS = dict(raw=9000, table=5000, text=2000, streams=2500, arrays=2000, bombs=60)
VALUES = (
    0, 1, -1, 2, 3, 63, 64, 127, 128, 255, 65535, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 63, -(1 << 63), 10 ** 40, 0.0, 0.5,
    1.0, -1.5, 1e308, math.inf, -math.inf, math.nan, True, False, None, "", "0", "x", "int8", "float16", "float32", "int64",
    "object", "O", "V4", "U9", "entropy", "brotli", "lzma", "none", "pergroup", "pickle", "../../etc/passwd", "tok_emb",
    "tok_emb.codes", [], {}, [[]], [{}], [1], [0, 0, 1, 1, 1], [0, 0, 16, 127, 1], [-1, 0, 1, 1, 1], [0] * 9, [1 << 24] * 3,
    {"a": 1}, [None], "y" * 9000, list(range(500)), [[0, 0, 16, 127, 63]] * 40)


def nested(depth: int, inner=None):
    for _ in range(depth):
        inner = [inner] if depth % 2 else {"k": inner}
    return inner


class Mutations:
    """Mutations of one artifact, as bytes; which one depends on the kind and the number alone."""

    def __init__(self, data: bytes, arrays: dict[str, np.ndarray], model: g.GPT):
        self.data, self.arrays, self.model = data, arrays, model
        self.table, self.payload = taken_apart(data)
        self.text = json.dumps(self.table)
        cuts = list(itertools.accumulate(self.table["streams"], initial=0))
        self.streams = [self.payload[a:b] for a, b in zip(cuts, cuts[1:])]
        self.inner = [self.streams[0]] + [brotli.decompress(stream) for stream in self.streams[1:]]
        small = brotli.Compressor(quality=1)
        blocks = [bytes(1 << 20)] * (BOMB_BYTES >> 20)  # piece by piece: the memory of this process is measured
        self.brotli_bomb = b"".join(map(small.process, blocks)) + small.finish()

    def scramble(self, r: random.Random, data: bytes) -> bytes:
        """Flip, cut, insert, swap, repeat or overwrite some bytes."""
        out = bytearray(data)
        for _ in range(r.choice((1, 1, 1, 2, 5))):
            a, b = sorted(r.randrange(len(out) + 1) for _ in range(2)) if out else (0, 0)
            kind = r.randrange(8)
            if kind < 3 and out:
                for _ in range(r.choice((1, 1, 2, 8))):
                    out[r.randrange(len(out))] ^= 1 << r.randrange(8)
            elif kind == 3:
                del out[a:len(out) if r.random() < 0.5 else min(b, a + 40)]
            elif kind == 4:
                out[a:a] = r.randbytes(r.choice((1, 4, 100)))
            elif kind == 5:
                c = min(b, a + 64)
                out[a:c], out[b:b + c - a] = out[b:b + c - a], out[a:c]
            elif kind == 6:
                out[a:a] = out[a:min(b, a + 100)]
            else:
                out[a:a + 16] = bytes([r.choice((0, 255, r.randrange(256)))]) * min(16, len(out) - a)
        return bytes(out)

    @staticmethod
    def value(r):
        return json.loads(json.dumps(r.choice(VALUES)))  # a copy: some are edited afterwards

    def damaged(self, r):
        return self.scramble(r, self.data)

    def edited_table(self, r):
        """A copy of the table with one to three nodes replaced, removed, doubled or wrapped."""
        table = json.loads(self.text)
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            # The function is compared first, so most edits there end alike: take other keys more often.
            key = r.choice(("arrays", "arrays", "arrays", *["quantization"] * 3, "streams", "compressor", "looping",
                            "function", None))
            holder, at = table, key
            while isinstance(holder, dict) and at in holder and isinstance(holder[at], (dict, list)) and holder[at] \
                    and r.random() < 0.85:
                holder = holder[at]
                at = r.choice(list(holder)) if isinstance(holder, dict) else r.randrange(len(holder))
                if isinstance(holder, list) and isinstance(holder[at], list) and holder[at] and r.random() < 0.85:
                    holder, at = holder[at], r.randrange(len(holder[at]))
            kind = r.randrange(10)
            try:
                if kind < 5 or at is None:
                    holder[at if at is not None else r.choice(("extra", "compressor", "quantization"))] = self.value(r)
                elif kind == 5:
                    del holder[at]
                elif kind == 6:
                    holder[at] = nested(r.choice((1, 2, 50, 300)), holder[at])
                elif kind == 7 and isinstance(holder, list):
                    holder.insert(at, json.loads(json.dumps(r.choice(holder))))
                elif kind == 8 and isinstance(holder, list):
                    other = r.randrange(len(holder))
                    holder[at], holder[other] = holder[other], holder[at]
                elif isinstance(holder[at], (int, float)):
                    holder[at] = holder[at] + r.choice((-1, 1, 0.5, 1 << 20))
                else:
                    holder[r.choice(VALUES[:5]) if isinstance(holder, list) else str(at) + "x"] = self.value(r)
            except (KeyError, IndexError, TypeError):
                pass
        return table

    def with_table(self, r):
        return rebuilt(self.edited_table(r), self.payload)

    def with_text(self, r):
        kind = r.randrange(12)
        if kind < 5:
            head = brotli.compress(self.scramble(r, self.text.encode()), quality=1)
        elif kind == 5:
            deep = r.choice((900, 5000, 200_000))
            text = r.choice(('{"a":', "[")) * deep
            head = brotli.compress(r.choice((text, self.text[:-1] + ', "x": ' + text)).encode(), quality=1)
        elif kind == 6:
            number = "9" * r.choice((20, 400, 4000, 5000, 300_000))
            head = brotli.compress(re.sub(r"\b\d+\b", lambda m: number if r.random() < 0.1 else m[0], self.text)
                                   .encode()[:1 << 21], quality=1)
        elif kind == 7:
            twice = json.dumps({r.choice(list(self.table)): self.value(r)})[1:-1]
            text = r.choice((f"{{{twice}, {self.text[1:]}", f"{self.text[:-1]}, {twice}}}"))
            head = brotli.compress(text.encode(), quality=1)
        elif kind == 8:
            head = brotli.compress(r.choice((b"", b"null", b"[]", b"{}", b"0", b'"x"', b"\xff\xfe", b"NaN", b"{" * 9,
                                             self.text.encode("utf-16"), self.text.encode("utf-32"), b" " * 3_000_000)))
        elif kind == 9:
            head = self.scramble(r, brotli.compress(self.text.encode()))
        elif kind == 10:
            head = r.randbytes(r.randrange(200))
        else:
            head = brotli.compress(self.text.encode().replace(b'"none"', b"null"), quality=r.randrange(3)) + r.randbytes(
                r.choice((0, 1, 50)))
        return signed(head, self.payload)

    def joined(self, streams: list[bytes], **changes) -> bytes:
        return rebuilt(self.table | dict(streams=[len(stream) for stream in streams]) | changes, b"".join(streams))

    def with_streams(self, r):
        """The payload changed behind its compression: codes, and the rest with floats, scales, classes and symbol tables."""
        inner, which, kind = [bytearray(part) for part in self.inner], r.randrange(2), r.randrange(6)
        rows = g.SPREADS * 256
        if kind == 0:
            inner[which][:] = self.scramble(r, bytes(inner[which]))
        elif kind == 1:
            for _ in range(r.choice((1, 3, 30))):
                inner[which][r.randrange(len(inner[which]))] = r.randrange(256)
        elif kind == 2:  # the symbol tables lie at the end of the last stream, low bytes first
            spread = r.choice((slice(0, g.SPREADS), slice(a := r.randrange(g.SPREADS), a + 1)))
            table = np.zeros((g.SPREADS, 256), np.uint16)
            table[:] = np.frombuffer(bytes(inner[1][-2 * rows:]), np.uint8).reshape(2, -1).T.copy().view(np.uint16).reshape(
                g.SPREADS, 256)
            draw = np.random.default_rng(r.randrange(1 << 30))
            table[spread] = r.choice((0, 1, 65535, draw.integers(0, 65536, (1, 256)), draw.integers(0, 2, (1, 256)) * 65535,
                                      (draw.random((1, 256)) < 0.01) * 7, np.eye(256, dtype=np.uint16)[r.randrange(256)]))
            if r.random() < 0.3:
                table = np.roll(table, r.randrange(1, g.SPREADS), 0)
            inner[1][-2 * rows:] = g.byte_planes(table)
        elif kind == 3:  # scales and classes
            side = len(inner[1]) - 2 * rows
            a = r.randrange(side)
            b = min(side, a + r.choice((1, 20, side)))
            inner[1][a:b] = r.choice((bytes(b - a), b"\x7f" * (b - a), b"\x80" * (b - a), r.randbytes(b - a)))
        elif kind == 4:
            inner[0][:] = r.choice((b"", bytes(8), b"\xff" * 64, r.randbytes(4 * r.randrange(3000)), inner[0][:-4],
                                    inner[0] + r.randbytes(4), inner[0] + bytes(4), inner[0][4:], inner[0] * 3))
        else:
            streams = [bytes(inner[0])] + self.streams[1:]
            streams[which] = self.scramble(r, streams[which])
            return self.joined(streams)
        return self.joined([bytes(inner[0])] + [brotli.compress(bytes(part), quality=1) for part in inner[1:]])

    def with_arrays(self, r):
        """Wrong values in well-formed arrays, packed with any method; wrong methods; forms that this run did not choose."""
        table = json.loads(self.text)
        draw = np.random.default_rng(r.randrange(1 << 30))
        quantization = table["quantization"]
        quantization["step_rule"] = r.choice(("loss", "loss", "sigma"))
        if r.random() < 0.3:
            quantization["lqer"] = [r.choice((1, 2, 64, 65)), r.choice((1, 2, 7, 16))]
            quantization["corrected"] = r.sample(["tok_emb.0", "mlp.fc.1", "attn.c_q.2", "mlp.fc.9", "none"], r.choice((1, 3)))
        arrays = {}
        for name, spec in g.layout(self.model, quantization).items():
            known = specs_of(self.arrays).get(name) == spec
            arrays[name] = self.arrays[name] if known else np.ones(spec[1], spec[0])
        for name in r.sample(list(arrays), r.choice((1, 3, len(arrays)))):
            a = arrays[name]
            arrays[name] = np.frombuffer(r.choice((draw.bytes(a.nbytes), bytes(a.nbytes), b"\xff" * a.nbytes,
                                                   b"\x7f" * a.nbytes, b"\x80" * a.nbytes)), a.dtype).reshape(a.shape)
        if r.random() < 0.1:
            del arrays[r.choice(list(arrays))]
        table["arrays"] = specs_of(arrays)
        method = r.choice(("none", "brotli"))
        stream = g.pack_arrays(arrays)
        if method == "brotli":
            stream = brotli.compress(stream, quality=1)
        if r.random() < 0.3:
            stream = self.scramble(r, stream)
        if r.random() < 0.1:
            method = r.choice(list(g.CODECS))
        return rebuilt(table | dict(compressor=method, streams=[len(stream)]), stream)

    def with_bomb(self, r):
        """Streams and tables that swell to 256 MiB."""
        kind = r.randrange(3)
        if kind == 0:
            return signed(self.brotli_bomb, self.payload)
        if kind == 1:
            return self.joined([self.streams[0], self.brotli_bomb])
        return self.joined([self.brotli_bomb], compressor="brotli")


KINDS = dict(raw=Mutations.damaged, table=Mutations.with_table, text=Mutations.with_text, streams=Mutations.with_streams,
             arrays=Mutations.with_arrays, bombs=Mutations.with_bomb)


def outcome(path: str, small_arrays: dict, model, s) -> str:
    """What becomes of the file: refused, exact or decoded; anything else is raised."""
    try:
        table, arrays = g.read_container(path, model, s)
    except g.InputError as error:
        lines = str(error).splitlines()
        named = [line for line in lines if path in line and len(line) < 20_000]
        if not named or len(named) != len(lines) or len(lines) > len(s.function_settings()):
            raise AssertionError(f"unclear: {str(error)[:300]}") from None
        return "refused"
    promised = {name: (dtype, tuple(shape)) for name, (dtype, shape) in table["arrays"].items()}
    if specs_of(arrays) != promised:
        raise AssertionError(f"{specs_of(arrays)} for {promised}")
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    looping = g.install(model, table, arrays, s)
    if type(looping) is not bool or before != {name: (p.shape, p.dtype) for name, p in model.named_parameters()}:
        raise AssertionError("another model")
    same = arrays.keys() == small_arrays.keys() and all(a.tobytes() == small_arrays[n].tobytes() for n, a in arrays.items())
    return "exact" if same else "decoded"


def peak_memory() -> int:
    """MiB. Not getrusage's ru_maxrss, which a child takes over from its parent."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10


def fuzz(folder: str) -> None:
    """Runs in a child process of at most 4 GB; prints what happened as JSON."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    s = tiny(Path(folder), **SMALL)
    model = g.GPT(s)
    data = Path(s.artifact_path).read_bytes()
    arrays = g.read_container(s.artifact_path, model, s)[1]
    g.install(model, *g.read_container(s.artifact_path, model, s), s)
    mutations = Mutations(data, arrays, model)
    memory, path = peak_memory(), os.path.join(folder, "fuzzed.ptz")
    counts, failures, slowest, began = Counter(), [], (0.0, ""), time.process_time()
    for kind, make in KINDS.items():
        for number in range(FUZZ_COUNTS[kind]):
            mutation = make(mutations, random.Random(f"{kind} {number}"))
            with open(path, "wb") as file:
                file.write(mutation)
            started = time.process_time()
            try:
                result = outcome(path, arrays, model, s)
                if kind == "raw" and result == "decoded":
                    raise AssertionError("damage went unnoticed")
            except BaseException as error:  # the panics of constriction are no Exception
                result = "failed"
                failures.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}")
            slowest = max(slowest, (time.process_time() - started, f"{kind} {number}"))
            counts[f"{kind} {result}"] += 1
    print(json.dumps(dict(counts=counts, failures=failures[:30], failed=len(failures), slowest=slowest,
                          memory=peak_memory() - memory, seconds=round(time.process_time() - began, 1))))


def test_mutations_end_in_the_exact_tensors_or_in_one_clear_line(small):
    """Each within a second, all within 4 GB. A payload that is signed again may decode, but only to what was promised."""
    code = "import sys, tests.test_artifact as t; t.fuzz(sys.argv[1])"
    child = subprocess.run([sys.executable, "-c", code, str(small.folder)], cwd=ROOT, capture_output=True, text=True,
                           timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    report = json.loads(child.stdout.splitlines()[-1])
    print(f"\n{sum(report['counts'].values())} mutations in {report['seconds']} s, {report['memory']} MiB more, "
          f"slowest {report['slowest']}: {report['counts']}")
    assert not report["failed"], "\n".join(report["failures"])
    assert sum(report["counts"].values()) == sum(FUZZ_COUNTS.values()) >= 20_000
    assert report["slowest"][0] < 1 and report["memory"] < 300, report
    for kind in ("table", "text", "streams", "arrays"):  # none of them stops at the door
        assert report["counts"].get(f"{kind} decoded", 0) + report["counts"].get(f"{kind} exact", 0) > 10, report
        assert report["counts"][f"{kind} refused"] > 10, report


@pytest.mark.skipif(not shutil.which("lrzip"), reason="needs the program lrzip")
def test_streams_for_lrzip_that_are_not_its_own_are_refused(forms, tmp_path):
    made, path = forms["default"], tmp_path / "a.ptz"
    s = changed(made.s, compressor="pergroup")
    g.write_container(str(path), made.table, made.arrays, "pergroup")
    table, payload = taken_apart(path.read_bytes())
    cuts = list(itertools.accumulate(table["streams"], initial=0))
    streams, r = [payload[a:b] for a, b in zip(cuts, cuts[1:])], random.Random(0)
    (tmp_path / "large").write_bytes(bytes(40_000_000))
    subprocess.run(["lrzip", "-q", "-o", tmp_path / "large.lrz", tmp_path / "large"], check=True)
    others = [b"", b"LRZI", (tmp_path / "large.lrz").read_bytes(), streams[0][:-5], streams[0][:30]]
    for number in range(20):
        flipped = bytearray(streams[0])
        for _ in range(r.choice((1, 4))):
            flipped[r.randrange(len(flipped) if number % 2 else 40)] ^= 1 << r.randrange(8)
        others.append(bytes(flipped))
    for other in others:
        forged = [other] + streams[1:]
        path.write_bytes(rebuilt(table | dict(streams=[len(stream) for stream in forged]), b"".join(forged)))
        try:
            assert specs_of(g.read_container(str(path), made.model, s)[1]) == specs_of(made.arrays)
        except g.InputError as error:
            assert str(error) == one_line(path)


# --- Files appear complete or not at all


def in_child(work) -> int:
    """The exit code of `work` in a forked process."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_any_moment_the_artifact_is_whole(small, tmp_path):
    path = tmp_path / "a.ptz"
    versions = [small.arrays, {name: np.zeros_like(a) for name, a in small.arrays.items()}]
    whole = []
    for arrays in versions:
        g.write_container(str(path), small.table, arrays, "none")
        whole.append(path.read_bytes())
    r, seen = random.Random(0), Counter()
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                for arrays in itertools.cycle(versions):
                    g.write_container(str(path), small.table, arrays, "none")
            finally:
                os._exit(1)
        time.sleep(r.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        seen[path.read_bytes()] += 1
    assert set(seen) <= set(whole)


class HalfWritten:
    """A file that writes half of what it is given and then stops."""

    def __init__(self, file, stop):
        self.file, self.stop = file, stop

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.stop()


@pytest.mark.parametrize("moment", ["half written", "before rename", "after rename"])
def test_killed_while_writing(small, tmp_path, moment):
    path = tmp_path / "a.ptz"
    g.write_container(str(path), small.table, small.arrays, "entropy")
    old = path.read_bytes()

    def work():
        def stop():
            os.kill(os.getpid(), signal.SIGKILL)

        rename = os.replace
        if moment == "half written":
            host.open = lambda *arguments: HalfWritten(open(*arguments), stop)
        elif moment == "before rename":
            os.replace = lambda *names: stop()
        else:
            os.replace = lambda *names: (rename(*names), stop())
        g.write_container(str(path), small.table | dict(looping=not small.table["looping"]), small.arrays, "entropy")

    assert in_child(work) == -signal.SIGKILL
    assert (path.read_bytes() == old) == (moment != "after rename")
    table, arrays = g.read_container(str(path), small.model, small.s)
    assert (table["looping"] == small.table["looping"]) == (moment != "after rename")
    assert_same(arrays, small.arrays)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(small, tmp_path, failing):
    path = tmp_path / "a.ptz"
    g.write_container(str(path), small.table, small.arrays, "entropy")
    old = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    def work():
        if failing == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, len(old) // 2))
        else:
            setattr(os, failing, fail)
        try:
            g.write_container(str(path), small.table | dict(looping=False), small.arrays, "none")
        except OSError:
            return 7

    assert in_child(work) == 7
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.ptz"]


def test_a_run_whose_disk_is_full_fails_and_leaves_the_old_artifact(copy, capfd):
    artifact = copy / "out" / "final_model.int6.ptz"
    old = artifact.read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) - 1000, len(old) - 1000))
        result = main_here(environment(copy, QUANTIZE_ONLY=1, **RUN))
        print(result.stderr, file=sys.stderr, end="", flush=True)
        return result.returncode

    assert in_child(work) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("train_gpt.py: ")
    assert artifact.read_bytes() == old and record(copy)["status"] == "failed"
    assert {file.name for file in (copy / "out").iterdir()} == {"tiny.txt", "tiny.json", "final_model.int6.ptz",
                                                              "final_model.fp32.ptz"}


# --- The packed script


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed script in a folder of its own, and the files inside."""
    folder = tmp_path_factory.mktemp("packed")
    script = folder / "train_gpt.py"
    assert pack.main([str(script)]) == 0
    text = script.read_text(encoding="ascii")
    [inside] = re.findall(r'b85decode\("([^"]+)"\)', text)
    return SimpleNamespace(folder=folder, script=script, files=json.loads(brotli.decompress(base64.b85decode(inside))))


def test_packing_is_deterministic_and_complete(packed):
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in pack.EVALUATION_FILES}
    assert packed.script.read_bytes() == g.packed_code() == pack.minified(texts)
    assert tuple(packed.files) == pack.EVALUATION_FILES
    for name in (name for name in pack.EVALUATION_FILES if name.endswith(".py")):
        ours, theirs = (ast.parse(text) for text in ((ROOT / name).read_text(), packed.files[name]))

        def names(tree):  # a definition or setting that fell out would be missed only at evaluation
            return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] + sorted(
                {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, float)})
        assert names(ours) == names(theirs)
        assert len(packed.files[name]) < len((ROOT / name).read_text())


def test_packed_code_is_kept_for_the_same_files_alone(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pack, "minified", lambda texts: (made.append(texts), b"packed %d" % len(made))[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pack.packed_code.__wrapped__() == pack.packed_code.__wrapped__() == b"packed 1" and len(made) == 1
    [kept] = (tmp_path / ".cache" / "parameter_golf").iterdir()
    assert kept.read_bytes() == b"packed 1"
    monkeypatch.setattr(pack, "LOADER", "another")
    assert pack.packed_code.__wrapped__() == b"packed 2"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # no folder can be made there
    assert [pack.packed_code.__wrapped__() for _ in range(2)] == [b"packed 3", b"packed 4"]


@pytest.mark.parametrize("damaged", [b"", b"packed", b"packed 9"])
def test_damaged_packed_code_is_made_again(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(pack, "minified", lambda texts: b"packed 1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pack.packed_code.__wrapped__() == b"packed 1"
    [kept] = (tmp_path / ".cache" / "parameter_golf").iterdir()
    kept.write_bytes(damaged)
    assert pack.packed_code.__wrapped__() == kept.read_bytes() == b"packed 1"


def test_pack_code_says_how_many_bytes(tmp_path, capsys):
    assert pack.main([str(tmp_path / "p.py")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.py'}: {len(g.packed_code()):,} bytes\n"
    (tmp_path / "file").write_text("")
    assert pack.main([str(tmp_path / "file" / "p.py")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and sorted(os.listdir(tmp_path)) == ["file", "p.py"]
    assert re.search(r"^ +pack-code\)", (ROOT / "run.sh").read_text(), re.M)


def c_tokens(text: str) -> tuple[list[str], str]:
    """The string and character literals of a C text, and the rest without comments and blanks."""
    literals, rest, at = [], [], 0
    while at < len(text):
        if text.startswith("/*", at):
            at = text.index("*/", at) + 2
            rest.append(" ")
        elif text.startswith("//", at):
            at = text.find("\n", at)
        elif text[at] in "\"'":
            end = at + 1
            while text[end] != text[at]:
                end += 1 + (text[end] == "\\")
            literals.append(text[at:end + 1])
            rest.append("\0")
            at = end + 1
        else:
            rest.append(text[at])
            at += 1
    return literals, " ".join("".join(rest).split())


def test_the_packed_c_is_the_same_program(packed, tmp_path):
    ours, theirs = (ROOT / "online_ngram_state.c").read_text(), packed.files["online_ngram_state.c"]
    assert c_tokens(ours) == c_tokens(theirs)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    (tmp_path / "a.c").write_text(theirs)
    subprocess.run([compiler, "-std=c11", "-fsyntax-only", "-Wall", str(tmp_path / "a.c")], check=True)


def test_what_looks_like_a_comment_in_a_c_string_stays(tmp_path, monkeypatch):
    source = r'''/* header "not a string" */
#include <stdio.h>
int main(void) { // a comment with "quotes"
    const char *a = "// none", *b = "/* none */", *c = "\"/*\\", *d = "x" /* one */ "*/";
    int quotient = 8 / 2;   /* two
    lines */ puts(a);
    return quotient; /**/
}
'''
    (tmp_path / "online_ngram_state.c").write_text(source)
    for name in (name for name in pack.EVALUATION_FILES if name.endswith(".py")):
        (tmp_path / name).write_text('"""Text."""\nx = 1\n')
    monkeypatch.setattr(pack, "SOURCE", tmp_path)
    [inside] = re.findall(r'b85decode\("([^"]+)"\)', pack.packed_code.__wrapped__().decode())
    files = json.loads(brotli.decompress(base64.b85decode(inside)))
    assert c_tokens(files["online_ngram_state.c"]) == c_tokens(source) and "one" not in files["online_ngram_state.c"].split()
    assert files["train_gpt.py"].strip() == "x=1"


def test_every_local_module_is_counted():
    scripts = [name for name in pack.EVALUATION_FILES if name.endswith(".py")]
    for name in scripts:
        tree = ast.parse((ROOT / name).read_text())
        imported = modules(tree)
        local = {module + ".py" for module in imported - {"tools"}
                 if (ROOT / f"{module}.py").exists() or (ROOT / module).is_dir()}
        assert local <= set(pack.EVALUATION_FILES), name
        read = set(re.findall(r"[\"']([\w.]+\.(?:c|py|json|model))[\"']", (ROOT / name).read_text()))
        assert {file for file in read if (ROOT / file).exists()} <= set(pack.EVALUATION_FILES), name


def test_the_packed_script_repeats_the_score_of_the_run(packed, finished, copy):
    elsewhere = copy / "elsewhere"
    elsewhere.mkdir()
    result = launch(environment(copy, TTT_EVAL_ONLY=1, RUN_ID="again", **RUN), script=packed.script, cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    again, first = record(copy, "again")["results"], finished.record["results"]
    for figure in ("val_bpb", "val_loss", "targets", "bytes"):
        assert again["quantized"][figure] == first["quantized"][figure]
    assert again["size"] == first["size"] and again["size"]["code_bytes"] == packed.script.stat().st_size
    [code] = events(record(copy, "again"), "code")
    assert code["sha256"] == hashlib.sha256(packed.script.read_bytes()).hexdigest()
    assert not list(elsewhere.iterdir())


def test_the_packed_script_runs_from_a_folder_it_cannot_write(packed, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    shutil.copy(packed.script, folder)
    (folder / "__pycache__").write_text("")  # root may write everywhere, but not below a file
    folder.chmod(0o555)
    try:
        result = launch(dict(TMPDIR=str(tmp_path)), "--help", script=Path("train_gpt.py"), cwd=folder)
    finally:
        folder.chmod(0o755)
    assert result.returncode == 0 and not result.stderr
    assert "MATRIX_LR" in result.stdout and "--check" in result.stdout
    assert {file.name for file in folder.iterdir()} == {"train_gpt.py", "__pycache__"}


# --- Whole runs


def test_over_the_cap_is_a_failed_record(place, monkeypatch):
    monkeypatch.setattr(g, "SIZE_CAP", 50_000)
    result = main_here(environment(place, **RUN | dict(ITERATIONS=1)))
    failed, [line] = record(place), result.stderr.splitlines()
    assert result.returncode == 1
    assert failed["status"] == "failed" and "OverCapError" in failed["events"][-1]["error"]
    results = failed["results"]
    total = results["size"]["total_bytes"]
    assert line == f"train_gpt.py: artifact and code take {total:,} bytes, not below 50,000: no valid record"
    assert line.removeprefix("train_gpt.py: ") in (place / "out" / "tiny.txt").read_text()
    assert results["size"]["within_cap"] is False and results["size"]["cap"] == 50_000
    assert results["quantized"]["val_bpb"] > 0
    assert total == results["size"]["artifact_bytes"] + len(g.packed_code())


def test_exactly_the_cap_is_too_much(copy, finished, monkeypatch):
    total = finished.record["results"]["size"]["total_bytes"]
    for number, (cap, code) in enumerate(((total, 1), (total + 1, 0))):
        monkeypatch.setattr(g, "SIZE_CAP", cap)
        assert main_here(environment(copy, TTT_EVAL_ONLY=1, RUN_ID=f"run{number}", **RUN)).returncode == code


def test_quantizing_the_checkpoint_again_gives_the_same_bytes(copy, finished):
    old = (copy / "out" / "final_model.int6.ptz").read_bytes()
    (copy / "out" / "final_model.int6.ptz").unlink()
    assert main_here(environment(copy, QUANTIZE_ONLY=1, **RUN)).returncode == 0
    assert (copy / "out" / "final_model.int6.ptz").read_bytes() == old
    ours, theirs = record(copy)["results"], finished.record["results"]
    for stage in ("averaged", "quantized"):
        assert ours[stage]["val_bpb"] == theirs[stage]["val_bpb"]
    assert events(record(copy), "matrix") == events(finished.record, "matrix") and not events(record(copy), "step")


def test_evaluation_repeats_the_score_to_the_last_digit(copy, finished):
    assert main_here(environment(copy, TTT_EVAL_ONLY=1, **RUN)).returncode == 0
    for figure in ("val_bpb", "val_loss", "targets", "bytes"):
        assert record(copy)["results"]["quantized"][figure] == finished.record["results"]["quantized"][figure]


def test_the_record_tells_of_every_quantized_matrix(finished):
    found = events(finished.record, "matrix")
    roles = g.matrix_roles(tiny())
    expected = {"tok_emb"} | {f"blocks.{i}.{role}" for role in roles if role != "tok_emb" for i in range(5)}
    assert {event["name"] for event in found} == expected and len(found) == len(expected)
    for event in found:
        assert 0 < event["bits_per_weight"] <= 8 and event["predicted_loss"] > 0
        assert event["bytes"] == pytest.approx(event["bits_per_weight"] * event["rows"] * event["columns"] / 8, abs=1)
    table, _ = taken_apart((finished.out / "final_model.int6.ptz").read_bytes())
    assert sum(event["bytes"] for event in found) == pytest.approx(table["streams"][0], rel=0.03)
    weights = sum(event["rows"] * event["columns"] for event in found)
    assert weights == sum(role.weights(g.GPT(tiny())).numel() for role in roles.values())
    assert finished.record["results"]["artifact"]["round_trip"] == "exact"
