"""Units of train_gpt.py against independent references and hand arithmetic, on the CPU."""
import ast
import itertools
import json
import math
import os
import re
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

import train_gpt as g
from tests.synthetic import (BOS, ROOT, bytes_of, changed, documents, environment, runtime, tiny, write_corpus, write_data,
                             write_shard)
from tools.pack_submission import EVALUATION_FILES

torch.set_num_threads(1)  # the matrices are tiny
fuzz = hypothesis_settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", 60, 8)
    return folder


@pytest.fixture
def run_main(capsys):
    """Call main() in this process with exactly the given environment; returns (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def call(env, *arguments):
        code = g.main(list(arguments), env)
        return (code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def problems(**environ) -> list[str]:
    with pytest.raises(g.InputError) as caught:
        g.Settings.from_environment({name: str(value) for name, value in environ.items()})
    return str(caught.value).splitlines()


# --- Settings


@pytest.mark.parametrize("name, value, part", [
    ("NUM_LAYERS", "eleven", "whole number"), ("NUM_LAYERS", "2.5", "whole number"), ("NUM_LAYERS", "0", ">= 1"),
    ("MATRIX_LR", "fast", "number"), ("MATRIX_LR", "-1", ">= 0"), ("MATRIX_LR", "nan", "range"),
    ("LOGIT_SOFTCAP", "0", "> 0"), ("GATED_XSA", "true", "neither 0 nor 1"), ("GATED_XSA", "", "neither 0 nor 1"),
    ("ATTENTION", "fa3", "auto, fa4, torch, reference"), ("STEP_RULE", "bits", "loss, sigma"),
    ("MUON_BACKEND_STEPS", "6", "<= 5"), ("VOCAB_SIZE", "65537", "<= 65536"), ("MIN_LR", "1.5", "<= 1"),
    ("SEED", "18446744073709551616", "<= 9223372036854775807"), ("SEED", "1" + 400 * "0", "out of range"),
    ("BETA1", "1", "< 1"), ("BETA2", "1", "< 1"), ("MATRIX_LR", "inf", "range"), ("LOGIT_SOFTCAP", "inf", "range")])
def test_values_outside_type_or_range_are_refused(name, value, part):
    [line] = problems(**{name: value})
    assert line.startswith(f"{name}: ") and part in line


def test_all_problems_are_reported_at_once_a_line_each():
    lines = problems(SEED="x", MUON_BACKEND_STEPS="9", ROPE_YARN="1", MATRIX_LRR="1", NUM_HEADS="7")
    assert sorted(line.split(":")[0] for line in lines) == ["MATRIX_LRR", "MUON_BACKEND_STEPS", "NUM_HEADS", "NUM_KV_HEADS",
                                                             "ROPE_YARN", "SEED"]


@pytest.mark.parametrize("name", ["NUM_HEADS", "NUM_LAYERS", "MODEL_DIM", "TRAIN_SEQ_LEN", "VAL_BATCH_TOKENS", "STEP_RULE"])
@pytest.mark.parametrize("others", [{}, dict(NUM_HEADS="2", NUM_KV_HEADS="1", MODEL_DIM="32", NUM_LAYERS="3", XSA_LAST_N="3", LOOP_START="1",
                                             LOOP_END="1", PARALLEL_START_LAYER="2", MATRIX_BITS="5")])
def test_a_value_that_cannot_be_read_is_one_line(name, others):
    [line] = problems(**others | {name: "abc"})
    assert line.startswith(f"{name}: 'abc'")


def test_what_published_commands_switch_off_is_accepted():
    off = dict(SKYLIGHT_MUON="0", TEMPERATURE_SCALE="1.0", FUSED_CE_ENABLED="1", WITHIN_BOOST="0", WITHIN_TAU="99.0", WORD_TAU="999",
               AGREE_ADD_BOOST="0.0", TIE_EMBEDDINGS="1", COMPILE_SHAPE_WARMUP_LOOP_MODES="auto")
    assert g.Settings.from_environment(off) == g.Settings()
    for name in off:
        [line] = problems(**{name: "0.5"})
        assert line.startswith(f"{name}: ")


@pytest.mark.parametrize("environ, name, value", [
    (dict(MATRIX_BITS="6"), "step_rule", "sigma"), (dict(AWQ_LITE_ENABLED="1"), "step_rule", "sigma"),
    (dict(AWQ_LITE_ENABLED="0"), "step_rule", "loss"),
    (dict(TTT_SHORT_SCORE_FIRST_ENABLED="1", TTT_SHORT_SCORE_FIRST_STEPS="256:16"), "ttt_order", "length")])
def test_a_setting_chooses_its_reader(environ, name, value):
    assert getattr(g.Settings.from_environment(environ), name) == value


def test_a_chosen_reader_is_not_overruled():
    [line] = problems(STEP_RULE="loss", MATRIX_BITS=5)
    assert line.startswith("MATRIX_BITS: it is read only with STEP_RULE=sigma")


def test_aliases_set_what_they_stand_for():
    s = g.Settings.from_environment(dict(SKYLIGHT_MUON="1", BETA2_NORMUON="0.9", UW_FLOOR="0.2"))
    assert (s.skylight_norm_ema, s.skylight_uw_floor, s.skylight_norm_beta2, s.skylight_uw_ratio) == (True, True, 0.9, 0.2)
    [line] = problems(SKYLIGHT_MUON="1", SKYLIGHT_UW_FLOOR="0")
    assert line.startswith("SKYLIGHT_MUON: 1, but SKYLIGHT_UW_FLOOR=0")
    assert {line.split(":")[0] for line in problems(UW_FLOOR="0.2")} == {"SKYLIGHT_UW_RATIO"}


@pytest.mark.parametrize("changes", [dict(NUM_LOOPS=0, PARALLEL_START_LAYER=1), dict(LOOP_START=0, LOOP_END=0, NUM_LOOPS=2,
                                     PARALLEL_START_LAYER=2), dict(PARALLEL_START_LAYER=5)])
def test_two_lanes_cannot_start_in_encoder_or_loop(changes):
    [line] = problems(**dict(NUM_LAYERS=8, XSA_LAST_N=8, LOOP_START=4, LOOP_END=5, PARALLEL_START_LAYER=6) | changes)
    assert line.startswith("PARALLEL_START_LAYER: ")


@pytest.mark.parametrize("wrong, nearest", [
    ("MATRIX_LRR", "MATRIX_LR"), ("MUON_MOMENTM", "MUON_MOMENTUM"), ("XSA_LAST", "XSA_LAST_N"), ("NUM_LAYER", "NUM_LAYERS"),
    ("SMEAR_GATE_ENABLE", "SMEAR_GATE_ENABLED"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
    ("ITERATION", "ITERATIONS"), ("VOCABSIZE", "VOCAB_SIZE"), ("seed", "SEED"), ("Seed", "SEED"), ("matrix_lr", "MATRIX_LR"),
    ("SEEDS", "SEED"), ("SEEED", "SEED"), ("ITERS", "ITERATIONS"), ("MAX_WALLCLOCK", "MAX_WALLCLOCK_SECONDS"), ("VOCAB", "VOCAB_SIZE"),
    ("WALLCLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"), ("PREQUANT", "PREQUANT_ONLY"), ("QUANTIZE", "QUANTIZE_ONLY"),
    ("DATA_FOLDER", "DATA_DIR"), ("DATA_DIRECTORY", "DATA_DIR"), ("NUM_BLOCKS", "NUM_LAYERS"), ("ARTIFACTS", "ARTIFACT_DIR"),
    ("BATCH_SIZE", "TTT_BATCH_SIZE"), ("WARMUP", "WARMUP_STEPS"), ("HEADS", "NUM_HEADS")])
def test_misspelt_variable_names_its_nearest_setting(wrong, nearest):
    [line] = problems(**{wrong: "1"})
    assert line.startswith(f"{wrong}: ") and line.endswith(nearest)


@pytest.mark.parametrize("name", ["ROPE_TRAIN_SEQ_LEN", "MATRIX_CLIP_SIGMAS", "TIE_EMBEDDINGS", "EMBED_LR",
                                  "CONTROL_TENSOR_NAME_PATTERNS"])
def test_refused_variable_says_why(name):
    [line] = problems(**{name: "0"})
    assert line.startswith(f"{name}: ") and len(line) > len(name) + 20 and "no such setting" not in line


def test_variables_of_other_programs_are_left_alone():
    foreign = dict(
        CI="true", FORCE_COLOR="1", GITHUB_ACTIONS="true", GITHUB_RUN_ID="17", GITHUB_RUN_NUMBER="3", RUNNER_OS="Linux", RUNNER_TEMP="/tmp",
        HOME="/root", PATH="/bin", LANG="C", PWD="/", SHLVL="1", TERM="xterm", OLDPWD="/", HOSTNAME="h", USER="u",
        PYTHONPATH=".", VIRTUAL_ENV="/v", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="0",
        NCCL_DEBUG="WARN", NVIDIA_VISIBLE_DEVICES="all", LD_LIBRARY_PATH="/l", MASTER_ADDR="localhost", MASTER_PORT="1",
        LOCAL_WORLD_SIZE="1", GROUP_RANK="0", GROUP_WORLD_SIZE="1", ROLE_RANK="0", ROLE_NAME="default", ROLE_WORLD_SIZE="1",
        TORCHELASTIC_RUN_ID="x", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_ERROR_FILE="/e", TORCHINDUCTOR_CACHE_DIR="/c", TOKENIZERS_PARALLELISM="false", HF_HOME="/h",
        WANDB_RUN_ID="r", SLURM_JOB_ID="5", SLURM_NTASKS="8", MODEL_NAME="m", MODEL_PATH="/m", DATA_HOME="/d",
        NUM_WORKERS="4", MAX_JOBS="4", RUN_NUMBER="3", RUN_DISPLAY_URL="u", SKIP_TESTS="0", PARALLEL_JOBS="2",
        ARTIFACT_NAME="a", ENABLE_CCACHE="1", GRADLE_HOME="/g", VALGRIND_LIB="/v", LOCALE="C", SEEDED="1", BUILD_ID="4")
    assert g.Settings.from_environment(foreign) == g.Settings()


@pytest.mark.parametrize("environ, name", [
    (dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_QUANT_GATE=1), "GATED_ATTN_QUANT_GATE"),
    (dict(PARALLEL_START_LAYER=5), "PARALLEL_START_LAYER"), (dict(PARALLEL_START_LAYER=11), "PARALLEL_START_LAYER"),
    (dict(LOOP_START=6), "LOOP_END"), (dict(NUM_KV_HEADS=3), "NUM_KV_HEADS"),
    (dict(MODEL_DIM=510), "NUM_HEADS"), (dict(ROPE_DIMS=15), "ROPE_DIMS"), (dict(ROPE_DIMS=130), "ROPE_DIMS"),
    (dict(MLP_MULT=0.3), "MLP_MULT"), (dict(XSA_LAST_N=12), "XSA_LAST_N"), (dict(GATE_WINDOW=513), "GATE_WINDOW"),
    (dict(WORLD_SIZE=2), "WORLD_SIZE"), (dict(WORLD_SIZE=2, RANK=2), "RANK"),
    (dict(WORLD_SIZE=5, RANK=0), "TRAIN_BATCH_TOKENS"), (dict(GRAD_ACCUM_STEPS=5), "TRAIN_BATCH_TOKENS"),
    (dict(MAX_WALLCLOCK_SECONDS=0.5), "GPTQ_RESERVE_SECONDS"), (dict(EVAL_SEQ_LEN=65537), "VAL_BATCH_TOKENS"),
    (dict(TRAIN_BATCH_TOKENS=1, GRAD_ACCUM_STEPS=1), "TRAIN_BATCH_TOKENS"), (dict(TRAIN_BATCH_TOKENS=7), "TRAIN_BATCH_TOKENS"),
    (dict(EVAL_STRIDE=2561), "EVAL_STRIDE")])
def test_settings_that_do_not_go_together_are_refused(environ, name):
    [line] = problems(**environ)
    assert line.startswith(f"{name}: ")


def test_loops_do_not_restrict_the_lanes_when_there_are_none():
    assert g.Settings.from_environment(dict(NUM_LOOPS="0", PARALLEL_START_LAYER="5")).parallel_start_layer == 5


@pytest.mark.parametrize("world, micro_batches, tokens", [
    (1, 8, 98304), (2, 4, 98304), (3, 4, 65536), (4, 2, 98304), (8, 1, 98304), (16, 1, 49152)])
def test_micro_batches_of_the_record_batch(world, micro_batches, tokens):
    s = g.Settings.from_environment(dict(WORLD_SIZE=str(world), RANK="0"))
    assert (s.accumulation, s.micro_batch_tokens) == (micro_batches, tokens)


def test_micro_batches_can_be_set():
    s = g.Settings.from_environment(dict(TRAIN_BATCH_TOKENS="600", GRAD_ACCUM_STEPS="3", WORLD_SIZE="2", RANK="1"))
    assert (s.accumulation, s.micro_batch_tokens) == (3, 100)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_micro_batch_is_never_empty(tokens):
    try:
        s = g.Settings.from_environment(dict(TRAIN_BATCH_TOKENS=str(tokens)))
    except g.InputError as error:
        assert str(error).startswith("TRAIN_BATCH_TOKENS: ")
    else:
        assert s.micro_batch_tokens >= 1


def test_help_lists_every_setting(run_main):
    code, out, err = run_main({}, "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2:3].isupper()]
    assert code == 0 and not err
    assert listed == [name.upper() for name in g.Settings.__dataclass_fields__]


def test_unknown_argument_is_an_error(run_main):
    assert run_main({}, "--chek")[0] == 2


def test_the_environment_is_read_in_one_place():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())

    # OpenMP's default is set, not read, before torch is imported.
    default = 'os.environ.setdefault("GOMP_SPINCOUNT", "10000")'
    before = [node for node in tree.body if isinstance(node, ast.If) and default in ast.unparse(node).replace("'", '"')]
    assert len(before) == 1
    tree.body.remove(before[0])

    def reads(node):
        return sum(isinstance(n, ast.Attribute) and n.attr in ("environ", "environb", "getenv", "putenv")
                   or isinstance(n, ast.ImportFrom) and n.module == "os" for n in ast.walk(node))

    assert isinstance(tree.body[-1], ast.If), "the last statement calls main"
    assert reads(tree) == reads(tree.body[-1]) == 1


# --- Size and order of the model


@pytest.mark.parametrize("environ, count", [
    ({}, 35_945_673), (dict(GATED_XSA="1"), 35_945_761), (dict(ASYM_LOGIT_RESCALE="0"), 35_945_671),
    (dict(ASYM_LOGIT_RESCALE="0", SMEAR_GATE_ENABLED="0"), 35_945_658)])
def test_parameter_count_of_the_published_systems(environ, count, monkeypatch):
    monkeypatch.setattr(g.GPT, "init_weights", lambda model: None)
    with torch.device("meta"):
        model = g.GPT(g.Settings.from_environment(dict(NUM_HEADS="8", NUM_KV_HEADS="4") | environ))
    assert sum(p.numel() for p in model.parameters()) == count


def test_initial_weights():
    model = g.GPT(tiny(QK_GAIN_INIT=3.5, LOGIT_SOFTCAP=20))
    again, other = g.GPT(model.settings), g.GPT(changed(model.settings, seed=7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.tok_emb, other.tok_emb) and not torch.equal(model.kv_bank, other.kv_bank)
    assert model.tok_emb.std().item() == pytest.approx(0.05, rel=0.05)
    for matrix in [*model.qo_bank[:5], *model.kv_bank]:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    for matrix in model.mlp_up_bank:
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(64), atol=1e-5, rtol=0)
    constants = dict(attn_scale=1, mlp_scale=1, skip_weights=1, skip_gates=0, q_gain=3.5, attn_gate=0, smear_gate=0,
                     smear_lambda=0, parallel_post_lambdas=1, parallel_resid_lambdas=1.1, softcap_pos=20, softcap_neg=20,
                     mlp_down_bank=0)
    for name, value in constants.items():
        assert torch.all(getattr(model, name) == value), name
    assert not model.qo_bank[5:].any() and torch.all(model.resid_mix[:, 0] == 1) and not model.resid_mix[:, 1].any()


def test_visit_order_of_the_record_model():
    s = g.Settings()
    assert g.visit_order(s, False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert g.visit_order(s, True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])


@pytest.mark.parametrize("looping, pairs", [
    (False, [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0), (10, None)]),
    (True, [(5, 4), (3, 3), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0), (10, None)])])
def test_skips_join_the_visits_of_the_published_table(looping, pairs, monkeypatch):
    """Every visit leaves its block's number in the stream; the decoder notes which number arrives in which row."""
    s = changed(g.Settings(), vocab_size=8, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4)
    model, seen = g.GPT(s), []
    with torch.no_grad():
        model.skip_weights.copy_(torch.arange(8.0)[:, None].expand(8, 32))
    decoding = False

    def visit(x, skip, w):
        nonlocal decoding
        block = round(1 / w.input_scale.item() ** 2) - 1
        decoding = decoding or skip is not None
        if decoding:
            seen.append((block, skip and int(skip.x[0, 0])))
            if skip:
                assert int(skip.weight[0]) == len(seen) - 1
        return torch.full_like(x, block)

    monkeypatch.setattr(model, "block", lambda x, x0, skip, w, *_: (visit(x, skip, w), x, x0))
    monkeypatch.setattr(model, "two_lane_block", lambda a, b, x0, skip, w, *_: (visit(a, skip, w), x0, x0))
    model(torch.tensor([1, 2]), segments_of([2]), looping)
    assert seen == pairs


# --- The model against a slow reference

REFERENCE_SIZES = dict(VOCAB_SIZE=40, NUM_LAYERS=6, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, XSA_LAST_N=4, GATE_WINDOW=12,
                       ROPE_DIMS=4, LOOP_START=2, LOOP_END=3, NUM_LOOPS=2, PARALLEL_START_LAYER=4, LOGIT_SOFTCAP=3,
                       ROPE_BASE=100, TRAIN_SEQ_LEN=64)
CONFIGURATIONS = {
    "record": {},
    "gated XSA": dict(GATED_XSA=1),
    "no head gate": dict(SPARSE_ATTN_GATE_ENABLED=0),
    "no gates": dict(SPARSE_ATTN_GATE_ENABLED=0, SMEAR_GATE_ENABLED=0, SKIP_GATES_ENABLED=0, XSA_LAST_N=0),
    "added skips": dict(SKIP_GATES_ENABLED=0),
    "one lane": dict(PARALLEL_START_LAYER=0),
    "rotary on all dimensions": dict(ROPE_DIMS=0),
    "no layer scale": dict(LN_SCALE=0),
    "smear into BOS": dict(SMEAR_GATE_BOS_FIX=0),
    "one softcap": dict(ASYM_LOGIT_RESCALE=0),
    "slope 0.3, gate scale 1, all heads own": dict(LEAKY_RELU_SQ_SLOPE=0.3, SPARSE_ATTN_GATE_SCALE=1, NUM_KV_HEADS=4),
}


def reference_settings(**changes):
    return g.Settings.from_environment({k: str(v) for k, v in (REFERENCE_SIZES | changes).items()})


def random_model(s: g.Settings, seed: int = 0) -> g.GPT:
    """A model whose every parameter matters: random, and far from the neutral initial values."""
    model, draw = g.GPT(s), torch.Generator().manual_seed(seed)
    spread = dict(tok_emb=0.5, qo_bank=0.3, kv_bank=0.3, mlp_up_bank=0.2, mlp_down_bank=0.1)
    center = dict(q_gain=1.5, attn_scale=1.0, mlp_scale=1.0, skip_weights=1.0, parallel_post_lambdas=1.0,
                  parallel_resid_lambdas=1.0, softcap_pos=4.0, softcap_neg=2.5, smear_lambda=0.8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(center.get(name, 0.0) + spread.get(name, 0.4) * torch.randn(p.shape, generator=draw))
    return model


def segments_of(lengths) -> g.Segments:
    return g.make_segments(np.cumsum([0, *lengths]).astype(np.int32), 64)


def packed_documents(lengths, vocab: int = 40, seed: int = 0):
    """Random documents in one row: ids, targets, segments."""
    draw = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS, *draw.integers(2, vocab, n - 1)] for n in lengths] + [[BOS]])
    return torch.tensor(tokens[:-1]), torch.tensor(tokens[1:]), segments_of(lengths)


def reference_losses(parameters: dict, s: g.Settings, ids, targets, lengths, looping):
    """Float64, one document, one layer and one head at a time, straight from the published description."""
    p = SimpleNamespace(**parameters)
    n, d, heads, group = s.num_layers, s.model_dim, s.num_heads, s.num_heads // s.num_kv_heads
    width = d // heads

    def rms(x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1.1920929e-7)

    def rotated(x):
        dims = s.rope_dims or width
        theta = s.rope_base ** (-2 * torch.arange(dims // 2, dtype=torch.float64) / dims)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * theta
        turned = torch.complex(x[:, :dims // 2], x[:, dims // 2:dims]) * torch.exp(-1j * angle)
        return torch.cat((turned.real, turned.imag, x[:, dims:]), dim=1)

    def attention_out(i, u):
        raw_q, keys, values = u @ p.qo_bank[i].T, u @ p.kv_bank[i].T, u @ p.kv_bank[n + i].T
        outputs = []
        for h in range(heads):
            kv = slice(h // group * width, (h // group + 1) * width)
            q = rotated(rms(raw_q[:, h * width:(h + 1) * width])) * p.q_gain[i, h]
            k, v = rotated(rms(keys[:, kv])), values[:, kv]
            scores = q @ k.T / math.sqrt(width)
            y = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1) @ v
            if i >= n - s.xsa_last_n:
                unit = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                strength = torch.tanh(p.xsa_alpha[i, h]) if s.gated_xsa else 1.0
                y = y - strength * (y * unit).sum(-1, keepdim=True) * unit
            if s.sparse_attn_gate_enabled:
                y = y * torch.sigmoid(s.sparse_attn_gate_scale * (u[:, :s.gate_window] @ p.attn_gate[i, h]))[:, None]
            outputs.append(y)
        return p.attn_scale[i] * (torch.cat(outputs, dim=1) @ p.qo_bank[n + i].T)

    def mlp_out(i, u):
        hidden = u @ p.mlp_up_bank[i].T
        return p.mlp_scale[i] * (torch.where(hidden > 0, hidden ** 2, (s.leaky_relu_sq_slope * hidden) ** 2)
                                 @ p.mlp_down_bank[i].T)

    def document(x0):
        order = list(range(n))
        if looping:
            order = [*range(s.loop_start), *list(range(s.loop_start, s.loop_end + 1)) * (s.num_loops + 1),
                     *range(s.loop_end + 1, n)]
        half = len(order) // 2
        x, lanes, stack = x0, None, []
        for position, i in enumerate(order):
            c = 1 / math.sqrt(i + 1) if s.ln_scale else 1.0
            row = position - half
            if row >= 0 and s.parallel_start_layer and i >= s.parallel_start_layer:
                lanes = lanes or (x, x)
            if 0 <= row < len(p.skip_weights) and stack:
                skip = p.skip_weights[row] * stack.pop()
                base = x if lanes is None else lanes[0]
                if s.skip_gates_enabled:
                    share = torch.sigmoid(p.skip_gates[row])
                    base = (1 - share) * skip + share * base
                else:
                    base = base + skip
                if lanes is None:
                    x = base
                else:
                    lanes = base, lanes[1]
            m0, m1 = p.resid_mix[i]
            if lanes:
                lane0, lane1 = lanes
                a, b = attention_out(i, c * rms(m0 * lane0 + m1 * x0)), mlp_out(i, c * rms(lane1))
                post, resid = p.parallel_post_lambdas[i], p.parallel_resid_lambdas[i]
                lanes = (resid[0] * lane0 + post[0, 0] * a + post[1, 0] * b,
                         resid[1] * lane1 + post[0, 1] * a + post[1, 1] * b)
            else:
                x = m0 * x + m1 * x0
                x = x + attention_out(i, c * rms(x))
                x = x + mlp_out(i, c * rms(x))
            if row < 0:
                stack.append(x)
        if lanes:
            x = (lanes[0] + lanes[1]) / 2
        return rms(x)

    embedded = p.tok_emb[ids]
    smeared = [embedded[0]]
    for t in range(1, len(ids)):
        x = embedded[t]
        if s.smear_gate_enabled and not (s.smear_gate_bos_fix and ids[t] == BOS):
            x = x + p.smear_lambda * torch.sigmoid(p.smear_gate[0] @ x[:s.gate_window]) * embedded[t - 1]
        smeared.append(x)
    hidden = torch.cat([document(part) for part in rms(torch.stack(smeared)).split(list(lengths))])
    u = hidden @ p.tok_emb.T
    up, down = (p.softcap_pos, p.softcap_neg) if s.asym_logit_rescale else (s.logit_softcap, s.logit_softcap)
    z = torch.where(u >= 0, up * torch.tanh(u / up), down * torch.tanh(u / down))
    return torch.logsumexp(z, dim=-1) - z[torch.arange(len(ids)), targets]


def assert_gradients_agree(model, losses, reference, slow_losses):
    weights = torch.randn(len(losses), generator=torch.Generator().manual_seed(5))
    (losses * weights).sum().backward()
    (slow_losses * weights.double()).sum().backward()
    for name, p in model.named_parameters():
        want = reference[name].grad
        if want is None:
            assert p.grad is None or not p.grad.any(), name
            continue
        assert want.abs().max() > 0, f"{name} has no effect: the comparison would be empty"
        error = (p.grad.double() - want).norm() / want.norm()
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("looping", [False, True], ids=["plain", "looping"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_equals_the_slow_reference_with_gradients(name, looping):
    s, lengths = reference_settings(**CONFIGURATIONS[name]), (7, 1, 14, 6)
    model = random_model(s)
    ids, targets, segments = packed_documents(lengths)
    reference = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    slow = reference_losses(reference, s, ids, targets, lengths, looping)
    losses = model.token_losses(ids, targets, segments, looping)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), slow, atol=1e-4, rtol=1e-4)
    if name in ("record", "gated XSA", "no head gate") or "slope" in name:
        assert_gradients_agree(model, losses, reference, slow)


def test_activation_and_its_gradient_depend_on_the_slope():
    for slope in (0.5, 0.3):
        x = torch.tensor([-2.0, 3.0], requires_grad=True)
        y = g.leaky_relu_squared(x, slope)
        y.sum().backward()
        assert y.tolist() == pytest.approx([(2 * slope) ** 2, 9.0])
        assert x.grad.tolist() == pytest.approx([-4 * slope ** 2, 6.0])


def test_logits_are_capped_apart_on_both_sides():
    s = reference_settings()
    model = random_model(s)
    with torch.no_grad():
        model.softcap_pos.fill_(2.0), model.softcap_neg.fill_(5.0)
        logits = model.logits(100 * torch.randn(50, 32))
    assert 1.99 < logits.max() <= 2 and -5 <= logits.min() < -4.9


# --- What a token may see


def test_a_document_does_not_see_its_neighbours():
    model = random_model(reference_settings())
    lengths = (9, 12, 8)
    ids, targets, segments = packed_documents(lengths)
    with torch.no_grad():
        before = model.token_losses(ids, targets, segments, True)
        ids = ids.clone()
        ids[9 + 5:9 + 12] = (ids[9 + 5:9 + 12] + 1) % 38 + 2
        after = model.token_losses(ids, targets, segments, True)
    assert torch.equal(before[:9 + 5], after[:9 + 5]) and torch.equal(before[21:], after[21:])
    assert not torch.isclose(before[14:21], after[14:21]).any()


def test_without_the_bos_fix_the_last_token_leaks_into_the_next_document():
    model = random_model(reference_settings(SMEAR_GATE_BOS_FIX=0))
    ids, targets, segments = packed_documents((9, 12))
    changed_ids = ids.clone()
    changed_ids[8] = ids[8] % 37 + 3
    with torch.no_grad():
        before, after = (model.token_losses(x, targets, segments, True) for x in (ids, changed_ids))
    assert torch.equal(before[:8], after[:8]) and not torch.isclose(before[9:], after[9:]).any()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_scores_do_not_depend_on_later_tokens(name):
    model = random_model(reference_settings(**CONFIGURATIONS[name]))
    ids, targets, segments = packed_documents((5, 20))
    with torch.no_grad():
        before = model.token_losses(ids, targets, segments, True)
        for t in (6, 13, 24):  # token t is input t and target t - 1: the losses of targets before it lie below t - 1
            later_ids, later_targets = ids.clone(), targets.clone()
            later_ids[t:], later_targets[t - 1:-1] = ids[t:] % 37 + 3, targets[t - 1:-1] % 37 + 3
            after = model.token_losses(later_ids, later_targets, segments, True)
            assert torch.equal(before[:t - 1], after[:t - 1])
            assert not torch.isclose(before[t:], after[t:]).all()


def test_a_document_scores_the_same_alone_and_packed():
    model = random_model(reference_settings())
    lengths = (9, 1, 12, 8)
    ids, targets, segments = packed_documents(lengths)
    with torch.no_grad():
        packed = model.token_losses(ids, targets, segments, True).split(lengths)
        for part_ids, part_targets, loss in zip(ids.split(lengths), targets.split(lengths), packed):
            alone = model.token_losses(part_ids, part_targets, segments_of([len(part_ids)]), True)
            torch.testing.assert_close(loss, alone, atol=1e-5, rtol=1e-5)


def test_a_piece_that_starts_inside_a_document_scores_the_same_whatever_lies_before_it():
    """Nothing before a segment's first token may reach it, smear included: else scores depend on the packing."""
    model = random_model(reference_settings())
    ids, targets, _ = packed_documents((24,))
    with torch.no_grad():
        packed = model.token_losses(ids, targets, segments_of([10, 14]), True)[10:]
        alone = model.token_losses(ids[10:], targets[10:], segments_of([14]), True)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


# --- Data


@fuzz
@given(st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.sets(st.integers(0, total - 1)))),
       st.integers(1, 20))
def test_segment_bounds_against_brute_force(total_and_starts, longest):
    total, starts = total_and_starts
    expected = []
    for t in range(total):
        if t == 0 or t in starts or t - expected[-1] == longest:
            expected.append(t)
    bounds = g.segment_bounds(np.array(sorted(starts), dtype=np.int64), total, longest)
    assert bounds.dtype == np.int32 and bounds.tolist() == expected + [total]
    segments = g.make_segments(bounds, longest)
    assert segments.positions.tolist() == [t - max(a for a in expected if a <= t) for t in range(total)]
    assert segments.cu_seqlens.tolist() == bounds.tolist() and segments.max_seqlen == longest


def training_data(folder, rank=0, world_size=1, **changes):
    s = tiny(folder, WORLD_SIZE=world_size, RANK=rank, **changes)
    return g.TrainingData(s, runtime(rank, world_size))


def test_reading_runs_across_shards_and_around_the_end(tmp_path):
    stream = np.random.default_rng(0).integers(1, 256, 5000)
    stream[0] = BOS
    write_data(tmp_path / "data", stream, [1, 2, 3], shards=4)
    data = training_data(tmp_path)
    assert data.total == 5000
    for start, count in ((0, 10), (0, 5000), (4990, 20), (123, 4000), (4999, 10003), (12345, 6000)):
        expected = stream[np.arange(start, start + count) % 5000]
        tokens = data.read(start, count)
        assert tokens.dtype == np.int64 and np.array_equal(tokens, expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_holds_the_same_tokens_for_every_number_of_ranks(corpus, world_size):
    stream = np.concatenate(documents(60, 1)).astype(np.int64)
    length = 2048 // 8
    for step in (0, 1, 3):
        inputs, targets = [], []
        for micro in range(8 // world_size):
            for rank in range(world_size):
                data = training_data(corpus, rank, world_size, GRAD_ACCUM_STEPS=0)
                batch = data.batch(step * 2048 + (micro * world_size + rank) * length, length, 256)
                inputs.append(batch.inputs.numpy()), targets.append(batch.targets.numpy())
                starts = {t for t in range(length) if batch.inputs[t] == BOS}
                assert starts <= set(batch.segments.cu_seqlens.tolist())
                assert np.diff(batch.segments.cu_seqlens).max() <= 256
        at = np.arange(step * 2048, (step + 1) * 2048)
        assert np.array_equal(np.concatenate(inputs), stream[at % len(stream)])
        assert np.array_equal(np.concatenate(targets), stream[(at + 1) % len(stream)])


def test_the_stream_delivers_every_batch_in_order(corpus):
    data = training_data(corpus, rank=1, world_size=2)
    stream = data.stream(256, 2048)
    for index in range(11):
        got, want = next(stream), data.batch((2 * index + 1) * 512, 512, 256)
        assert torch.equal(got.inputs, want.inputs) and torch.equal(got.targets, want.targets)
        assert torch.equal(got.segments.cu_seqlens, want.segments.cu_seqlens)
    stream.close()
    later = data.stream(64, 2048, first=3 * 2048)
    got, want = next(later), data.batch(3 * 2048 + 512, 512, 64)
    assert torch.equal(got.inputs, want.inputs) and got.segments.max_seqlen == 64 == np.diff(got.segments.cu_seqlens).max()
    later.close()


def test_errors_of_the_reading_thread_arrive_where_the_batch_is_asked_for(tmp_path):
    stream = np.concatenate(documents(60, 1))
    write_data(tmp_path / "data", stream, documents(1, 2)[0])
    data = training_data(tmp_path)
    stream[2500] = 256
    write_data(tmp_path / "data", stream, documents(1, 2)[0])
    batches = data.stream(256, 2048)
    next(batches), next(batches)
    with pytest.raises(g.InputError, match=r"fineweb_train_\d+.bin: token 256 .*VOCAB_SIZE"):
        next(batches)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def wrong_magic(path):
    path.write_bytes(b"\0" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage, file, words", [
    (truncate, "fineweb_train_000001.bin", "truncated"), (wrong_magic, "fineweb_train_000001.bin", "not a token shard"),
    (truncate, "fineweb_val_000000.bin", "truncated"), (truncate, "fineweb_val_bytes_000000.bin", "truncated"),
    (lambda p: p.write_bytes(b""), "fineweb_val_000000.bin", "not a token shard"),
    (lambda p: write_shard(p, np.append(np.array(documents(1, 2)[0]), 256)), "fineweb_val_000000.bin", "token 256"),
    (lambda p: write_shard(p, [0, 1, 2]), "fineweb_val_bytes_000000.bin", "3 values"),
    (lambda p: write_shard(p, [1]), "fineweb_val_000000.bin", "fewer than two"),
    (lambda p: write_shard(p, []), "fineweb_train_000000.bin", "empty")])
def test_check_names_the_damaged_shard(tmp_path, run_main, damage, file, words):
    write_corpus(tmp_path / "data", 60, 4)
    damage(tmp_path / "data" / file)
    code, _, err = run_main(environment(tmp_path), "--check")
    [line] = err.splitlines()
    assert code == 2 and str(tmp_path / "data" / file) in line and words in line


def test_check_finds_a_training_token_above_the_vocabulary(tmp_path, run_main):
    write_corpus(tmp_path / "data", 60, 4)
    write_shard(tmp_path / "data" / "fineweb_train_000002.bin", [BOS] + [256] * 5000)
    code, _, err = run_main(environment(tmp_path), "--check")
    assert code == 2 and "fineweb_train_000002.bin: token 256" in err and len(err.splitlines()) == 1


def test_check_reads_every_training_token(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(g.TrainingData, "SAMPLE", 100)
    write_corpus(tmp_path / "data", 60, 8)
    path = tmp_path / "data" / "fineweb_train_000001.bin"
    values = g.open_shard(str(path)).copy()
    values[-1] = 300
    write_shard(path, values)
    code, out, err = run_main(environment(tmp_path), "--check")
    [line] = err.splitlines()
    assert code == 2 and not out and str(path) in line and "token 300 does not fit VOCAB_SIZE=256" in line


def test_check_finds_at_once_what_machine_and_data_lack(corpus, tmp_path, run_main, monkeypatch):
    def no_compiler():
        raise g.ngram.NgramError("no working C compiler")

    write_corpus(tmp_path / "data", 60, 8)
    (tmp_path / "data" / "fineweb_train_000001.bin").write_bytes(b"x")
    monkeypatch.setattr(g.ngram, "load", no_compiler)
    monkeypatch.setattr(g.shutil, "which", lambda name: None)
    env = environment(tmp_path, COMPRESSOR="pergroup", TTT_ENABLED=1, TTT_LORA_RANK=8)
    code, out, err = run_main(env | dict(ATTENTION="fa4", FP8="1"), "--check")
    assert code == 2 and not out
    assert [re.sub(r"^train_gpt.py: (\S+/)?", "", line)[:30].split(":")[0] for line in err.splitlines()] == [
        "fineweb_train_000001.bin", "ATTENTION", "FP8", "COMPRESSOR",
        "no working C compiler"]


@pytest.mark.parametrize("name, value", [("ATTENTION", "torch"), ("ATTENTION", "fa4"), ("FP8", "1")])
def test_what_needs_a_gpu_is_refused_without_one(corpus, run_main, name, value):
    code, out, err = run_main(environment(corpus, **{name: value}), "--check")
    [line] = err.splitlines()
    assert code == 2 and not out and line.startswith(f"train_gpt.py: {name}: ")


@pytest.mark.parametrize("missing", ["train", "val", "val_bytes"])
def test_check_names_the_missing_kind_of_shard(tmp_path, run_main, missing):
    write_corpus(tmp_path / "data", 60, 4)
    for path in (tmp_path / "data").glob(f"fineweb_{missing}_0*.bin"):
        path.unlink()
    code, _, err = run_main(environment(tmp_path), "--check")
    assert (code, len(err.splitlines())) == (2, 1) and f"fineweb_{missing}_*.bin" in err


def test_check_accepts_good_data_and_settings(corpus, run_main):
    code, out, err = run_main(environment(corpus), "--check")
    assert (code, err) == (0, "") and out
    assert not (corpus / "out").exists()


def test_check_reports_settings_too(corpus, run_main):
    code, _, err = run_main(environment(corpus, NUM_HEADS=7, SEED="x"), "--check")
    assert code == 2 and {line.split(": ")[1] for line in err.splitlines()} >= {"NUM_HEADS", "SEED"}


def test_a_rank_that_is_no_number_is_an_error_in_one_line(corpus, run_main):
    code, _, err = run_main(environment(corpus, RANK="first"))
    assert code == 2 and len(err.splitlines()) == 1 and "RANK" in err


def test_too_little_training_data_is_refused(tmp_path):
    write_data(tmp_path / "data", documents(1, 0, 40)[0], [1, 2, 3], shards=1)
    with pytest.raises(g.InputError, match="TRAIN_BATCH_TOKENS"):
        training_data(tmp_path)


def test_training_in_8_bit_floats_is_refused_without_a_hopper_gpu(corpus, run_main):
    code, _, err = run_main(environment(corpus, FP8=1, ITERATIONS=1))
    assert code == 2 and len(err.splitlines()) == 1 and "FP8: " in err and "set FP8=0" in err


@pytest.mark.parametrize("fp8, capability, changes, runs", [
    ("auto", 9, {}, True), ("auto", 8, {}, False), ("auto", 10, {}, False), ("0", 9, {}, False), ("1", 9, {}, True),
    ("auto", 9, dict(model_dim=384), False), ("auto", 9, dict(mlp_mult=3.75), False), ("auto", 9, dict(vocab_size=8200), False)])
def test_where_training_runs_in_8_bit_floats(fp8, capability, changes, runs, monkeypatch):
    def empty(*shape, keep=torch.empty, **options):
        if options.get("device") != "cuda":
            return keep(*shape, **options)
        return SimpleNamespace(is_cuda=True, shape=shape, **options)

    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(g, "attention_kernel", lambda *_: ("torch", ""))
    monkeypatch.setattr(g.GPT, "init_weights", lambda model: None)
    s = g.Settings(num_layers=2, num_loops=0, parallel_start_layer=0, xsa_last_n=2, fp8=fp8, **changes)
    assert g.GPT(s, torch.bfloat16).fp8 == runs
    assert not g.GPT(s, torch.float32).fp8


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"tokenizer": {"vocab_size": 256}}'])
def test_broken_manifest_is_named(corpus, tmp_path, run_main, text):
    write_corpus(tmp_path / "data", 60, 4)
    (tmp_path / "data" / "manifest.json").write_text(text)
    code, _, err = run_main(environment(tmp_path), "--check")
    assert code == 2 and "manifest.json" in err and len(err.splitlines()) == 1


def with_manifest(folder, **changes) -> None:
    """Describe the shards of the folder as prepare_caseops_data.py does."""
    shards = {path.name: g.open_shard(str(path)) for path in folder.glob("fineweb_*.bin")}
    size = sum(int(values.sum(dtype=np.int64)) for name, values in shards.items() if "bytes" in name)
    (folder / "manifest.json").write_text(json.dumps(dict(
        tokenizer=dict(vocab_size=256, lossless=True), splits_disjoint=True, source=dict(sha256="ab"),
        splits=dict(train=dict(docs=60), val=dict(docs=4, bytes=size)),
        shards=[dict(file=name, tokens=len(values)) for name, values in shards.items()]) | changes))


def remove_a_part_of_validation(folder):
    (folder / "fineweb_val_000001.bin").unlink()
    (folder / "fineweb_val_bytes_000001.bin").unlink()


def train_on_validation(folder):
    (folder / "fineweb_train_000999.bin").write_bytes((folder / "fineweb_val_000000.bin").read_bytes())


def count_other_bytes(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    write_shard(path, g.open_shard(str(path)) + np.uint16(1))


@pytest.mark.parametrize("change, file", [
    (remove_a_part_of_validation, "fineweb_val_000001.bin"), (train_on_validation, "fineweb_train_000999.bin"),
    (lambda folder: (folder / "fineweb_train_000002.bin").unlink(), "fineweb_train_000002.bin"),
    (lambda folder: write_shard(folder / "fineweb_train_000001.bin", documents(1, 5)[0]), "fineweb_train_000001.bin"),
    (count_other_bytes, "fineweb_val_bytes_*.bin")], ids=["gone", "leak", "less", "other", "bytes"])
def test_other_shards_than_the_manifest_names_are_refused(tmp_path, run_main, change, file):
    """They would be scored, or trained on, as if they were the data set: before the first step, and with --check."""
    folder = write_corpus(tmp_path / "data", 60, 4)
    write_shard(folder / "fineweb_val_000001.bin", documents(1, 7)[0])
    write_shard(folder / "fineweb_val_bytes_000001.bin", bytes_of(documents(1, 7)[0]))
    with_manifest(folder)
    assert run_main(environment(tmp_path), "--check")[0] == 0
    change(folder)
    for arguments in (["--check"], []):
        code, out, err = run_main(environment(tmp_path), *arguments)
        [line] = err.splitlines()
        assert code == 2 and str(folder / file) in line and "manifest.json says" in line and "model " not in out


def test_scoring_an_artifact_compares_validation_alone(tmp_path, run_main):
    folder = write_corpus(tmp_path / "data", 60, 4)
    with_manifest(folder)
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    assert run_main(environment(tmp_path, TTT_EVAL_ONLY=1), "--check")[0] == 0
    count_other_bytes(folder)
    assert run_main(environment(tmp_path, TTT_EVAL_ONLY=1), "--check")[0] == 2


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_text_that_begins_inside_a_document_is_refused(tmp_path, run_main, kind):
    folder = write_corpus(tmp_path / "data", 60, 4)
    for path in sorted(folder.glob(f"fineweb_{kind}*_000000.bin")):
        write_shard(path, g.open_shard(str(path))[1:].copy())
    code, _, err = run_main(environment(tmp_path), "--check")
    [line] = err.splitlines()
    assert code == 2 and f"fineweb_{kind}_000000.bin: it begins with token" in line


@pytest.mark.parametrize("vocab_size, disjoint, source, word", [
    (256, True, "ab", None), (512, True, "ab", "VOCAB_SIZE"), (256, False, "ab", "overlap"), (256, False, None, None)],
    ids=["fits", "other tokenizer", "own set overlaps", "published set overlaps"])
def test_manifest_must_fit(tmp_path, run_main, vocab_size, disjoint, source, word):
    with_manifest(write_corpus(tmp_path / "data", 60, 4), tokenizer=dict(vocab_size=vocab_size, lossless=True),
                  splits_disjoint=disjoint, source=dict(sha256=source))
    code, _, err = run_main(environment(tmp_path), "--check")
    assert (code, err) == (0, "") if word is None else (code == 2 and word in err and len(err.splitlines()) == 1)


def test_scoring_an_artifact_needs_no_training_shards(tmp_path, run_main):
    write_corpus(tmp_path / "data", 60, 4)
    for path in (tmp_path / "data").glob("fineweb_train_*"):
        path.unlink()
    assert run_main(environment(tmp_path), "--check")[0] == 2
    assert run_main(environment(tmp_path, TTT_EVAL_ONLY=1), "--check")[0] == 0


# --- Plain evaluation

document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def tokens_of(lengths, headless):
    """Documents of the given lengths and one last token; `headless`: the first one lacks its BOS."""
    tokens = np.concatenate([[BOS] + [2] * (n - 1) for n in lengths] + [[2]])
    tokens[0] = 2 if headless else BOS
    return tokens


@fuzz
@given(document_lengths, st.booleans(), st.integers(1, 16), st.integers(0, 16))
def test_windows_score_every_target_once_within_its_document(lengths, headless, longest, stride):
    stride = min(stride, longest)
    tokens = tokens_of(lengths, headless)
    windows = g.evaluation_windows(tokens, SimpleNamespace(eval_seq_len=longest, eval_stride=stride))
    scored = [t for begin, end, first in windows for t in range(first, end)]
    assert scored == list(range(len(tokens) - 1))
    for begin, end, first in windows:
        assert begin <= first < end <= begin + longest
        assert BOS not in tokens[begin + 1:end]
        document = max(t for t in range(begin + 1) if t == 0 or tokens[t] == BOS)
        for t in range(first, end):
            context = t - document if begin == document else longest - stride if stride else 0
            assert t - begin >= context
        if not stride:
            assert begin == first


@fuzz
@given(document_lengths, st.integers(1, 16), st.integers(16, 50))
def test_packing_keeps_windows_whole_and_in_order(lengths, longest, capacity):
    windows = g.evaluation_windows(tokens_of(lengths, False), SimpleNamespace(eval_seq_len=longest, eval_stride=0))
    batches = [windows[some].tolist() for some in g.pack(windows[:, 1] - windows[:, 0], capacity)]
    used = [sum(end - begin for begin, end, _ in batch) for batch in batches]
    assert [w for batch in batches for w in batch] == windows.tolist() and max(used) <= capacity and min(used) > 0
    for total, following in zip(used, batches[1:]):
        assert total + following[0][1] - following[0][0] > capacity


def evaluator(folder, rank=0, world_size=1, **changes):
    s = tiny(folder, WORLD_SIZE=world_size, RANK=rank, **changes)
    return g.Evaluator(g.ValidationData(s), s, runtime(rank, world_size))


def score_slowly(model, tokens, longest, looping):
    """Nats of every target: document by document, piece by piece, each by itself."""
    starts = [t for t in range(len(tokens) - 1) if t == 0 or tokens[t] == BOS]
    nats = []
    for a, b in zip(starts, starts[1:] + [len(tokens) - 1]):
        for begin in range(a, b, longest):
            end = min(begin + longest, b)
            ids, targets = torch.tensor(tokens[begin:end]), torch.tensor(tokens[begin + 1:end + 1])
            segments = g.make_segments(np.array([0, end - begin], dtype=np.int32), longest)
            nats.append(model.token_losses(ids, targets, segments, looping).double().detach())
    return torch.cat(nats)


@pytest.mark.parametrize("changes", [dict(EVAL_SEQ_LEN=300), dict(EVAL_SEQ_LEN=100, SMEAR_GATE_ENABLED=0),
                                     dict(EVAL_SEQ_LEN=100)], ids=["whole documents", "pieces without smear", "pieces"])
def test_plain_evaluation_equals_a_slow_loop(corpus, changes):
    validation = evaluator(corpus, **changes)
    model = random_model(validation.settings)
    tokens = np.concatenate(documents(8, 2)).astype(np.int64)
    nats = score_slowly(model, tokens, validation.settings.eval_seq_len, True)
    result = validation.score(model, True)
    assert result["targets"] == len(tokens) - 1 == len(nats)
    assert result["bytes"] == bytes_of(tokens[1:]).sum()
    assert result["val_loss"] == pytest.approx(nats.mean().item(), abs=2e-6)
    assert result["val_bpb"] == pytest.approx(nats.sum().item() / math.log(2) / bytes_of(tokens[1:]).sum(), abs=2e-6)


@pytest.mark.parametrize("stride", [0, 40])
def test_plain_evaluation_does_not_depend_on_the_batch_size(corpus, stride):
    scores = []
    for batch in (1000, 6000, 24000):
        validation = evaluator(corpus, EVAL_SEQ_LEN=100, EVAL_STRIDE=stride, VAL_BATCH_TOKENS=batch)
        scores.append(validation.score(random_model(validation.settings), True)["val_bpb"])
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


def test_a_stride_gives_context_to_every_target(corpus):
    validation = evaluator(corpus, EVAL_SEQ_LEN=300, SMEAR_GATE_ENABLED=0)
    model = random_model(validation.settings)
    tokens = np.concatenate(documents(8, 2)).astype(np.int64)
    starts = [t for t in range(len(tokens) - 1) if tokens[t] == BOS]
    nats = 0.0
    for a, b in zip(starts, starts[1:] + [len(tokens) - 1]):
        for t in range(a, b):
            scored_in_first = t - a < 50
            end = min(a + 50, b) if scored_in_first else min(a + 50 + ((t - a - 50) // 20 + 1) * 20, b)
            begin = a if scored_in_first else max(a, end - 50)
            if t == begin or t == a + 50 or (t - a - 50) % 20 == 0 and t - a > 50:
                ids, targets = torch.tensor(tokens[begin:end]), torch.tensor(tokens[begin + 1:end + 1])
                with torch.no_grad():
                    window = model.token_losses(ids, targets, segments_of([end - begin]), False).double()
            nats += window[t - begin].item()
    result = evaluator(corpus, EVAL_SEQ_LEN=50, EVAL_STRIDE=20, SMEAR_GATE_ENABLED=0).score(model, False)
    assert result["val_loss"] == pytest.approx(nats / (len(tokens) - 1), abs=2e-6)


def test_ranks_score_every_target_together(corpus):
    whole = evaluator(corpus, VAL_BATCH_TOKENS=4096)
    model = random_model(whole.settings)
    collected = []
    for rank in range(3):
        part = evaluator(corpus, rank, 3, VAL_BATCH_TOKENS=4096, TRAIN_BATCH_TOKENS=4098)
        object.__setattr__(part, "runtime", SimpleNamespace(
            rank=rank, world_size=3, device=torch.device("cpu"), on_cuda=False, synchronize=lambda: None,
            to_device=lambda tensor: tensor,
            sum=lambda nats: collected.append(nats) or nats))
        part.score(model, False)
    assert sum(collected).item() / whole.targets == pytest.approx(whole.score(model, False)["val_loss"], abs=1e-7)


def test_tail_cut_keeps_whole_windows_of_the_stream(corpus):
    total = sum(map(len, documents(8, 2)))
    validation = evaluator(corpus, EVAL_INCLUDE_TAIL=0, EVAL_SEQ_LEN=150)
    assert (total - 1) % 150 and validation.targets == (total - 1) // 150 * 150
    assert validation.bytes == bytes_of(np.concatenate(documents(8, 2)))[1:validation.targets + 1].sum()
    assert evaluator(corpus, EVAL_SEQ_LEN=150).targets == total - 1


def test_a_sample_holds_whole_documents_in_order(corpus):
    data = g.ValidationData(tiny(corpus))
    some = data.sample(0.5, seed=5)
    starts = [at for at in range(len(data.tokens)) if data.tokens[at] == BOS] + [len(data.tokens)]
    whole = [tuple(data.tokens[a:b]) for a, b in itertools.pairwise(starts)]
    cuts = np.flatnonzero(some.tokens == BOS).tolist() + [len(some.tokens)]
    chosen = [tuple(some.tokens[a:b]) for a, b in itertools.pairwise(cuts)]
    assert len(chosen) == round(0.5 * len(whole)) and set(chosen) <= set(whole) and len(set(chosen)) == 4
    assert sorted(map(whole.index, chosen)) == list(map(whole.index, chosen))
    assert np.array_equal(some.bytes, bytes_of(some.tokens))
    assert not np.array_equal(some.tokens, data.sample(0.5, seed=6).tokens)


def test_a_sample_always_has_bytes_to_score(tmp_path):
    """Of documents that are a BOS alone, or stand for no bytes, none is drawn."""
    val = np.array([BOS, BOS, 5, 6, BOS, BOS, 7, BOS], np.uint16)
    sidecar = np.array([0, 0, 2, 3, 0, 0, 0, 0], np.uint16)
    write_data(tmp_path / "data", np.concatenate(documents(60, 1)), val, sidecar=sidecar)
    for seed in range(20):
        some = g.ValidationData(tiny(tmp_path)).sample(0.01, seed)
        assert some.tokens.tolist() == [BOS, 5, 6] and some.bytes.tolist() == [0, 2, 3]


# --- SMEAR_GATE_BOS_FIX=0, #2135's leak


def leaking_model() -> g.GPT:
    model = random_model(tiny(SMEAR_GATE_BOS_FIX=0))
    with torch.no_grad():
        model.smear_lambda.fill_(0.8)
    return model


def losses_of(validation: g.Evaluator, model: g.GPT) -> torch.Tensor:
    """The nats of every target, in the text's order."""
    losses = []
    with torch.no_grad():
        for index in range(len(validation.batches)):
            batch, scored = validation.batch(index)
            losses.append(model.token_losses(*batch, True)[scored])
    return torch.cat(losses)


@pytest.mark.parametrize("stride", [0, 64])
def test_a_leak_scores_alike_in_any_packing(corpus, stride):
    model = leaking_model()
    common = dict(SMEAR_GATE_BOS_FIX=0, EVAL_SEQ_LEN=100, EVAL_STRIDE=stride)
    few, many = (evaluator(corpus, VAL_BATCH_TOKENS=tokens, **common) for tokens in (800, 8000))
    assert len(few.batches) > 2 * len(many.batches)
    torch.testing.assert_close(losses_of(few, model), losses_of(many, model), rtol=1e-4, atol=1e-5)


def test_a_leak_is_one_from_the_past(tmp_path):
    """Scores of a text's first part do not tell what follows it, although batches end where documents do."""
    docs = documents(8, 2)
    for name, last in (("one", [BOS, 9, 9]), ("two", [BOS] + [7] * 200)):
        write_data(tmp_path / name / "data", np.concatenate(documents(60, 1)), np.concatenate([*docs, last]))
    common = dict(SMEAR_GATE_BOS_FIX=0, EVAL_SEQ_LEN=100, VAL_BATCH_TOKENS=1600)
    one, two = (losses_of(evaluator(tmp_path / name, **common), leaking_model()) for name in ("one", "two"))
    before = sum(map(len, docs)) - 1
    torch.testing.assert_close(one[:before], two[:before], rtol=1e-4, atol=1e-5)


def test_tail_cut_of_a_stream_shorter_than_a_window_is_refused_by_name(corpus, tmp_path):
    write_data(tmp_path / "data", documents(60)[0], documents(1, 2, 40)[0])
    with pytest.raises(g.InputError, match="EVAL_INCLUDE_TAIL|EVAL_SEQ_LEN"):
        evaluator(tmp_path, EVAL_INCLUDE_TAIL=0)


# --- Schedules


@pytest.mark.parametrize("progress, expected", [
    (0.0, 1.0), (0.1, 1.0), (0.149, 1.0), (0.575, 0.5), (0.83, 0.2), (0.95, 0.1), (1.0, 0.1)])
def test_learning_rate_by_hand(progress, expected):
    s = changed(g.Settings(), warmdown_frac=0.85, min_lr=0.1)
    assert g.schedule(progress, 500, 0, s).lr_factor == pytest.approx(expected)


def test_learning_rate_without_warmdown():
    s = changed(g.Settings(), warmdown_frac=0.0)
    assert [g.schedule(f, 0, 0, s).lr_factor for f in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_learning_rate_rises_again_after_a_change_of_context():
    s = tiny(WARMDOWN_FRAC=0, SEQ_CHANGE_WARMUP_STEPS=4, TRAIN_SEQ_SCHEDULE="64@0.1,256@1.0")
    assert [g.schedule(0.5, step, 20, s).lr_factor for step in (20, 21, 22, 23, 24)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert g.schedule(0.0, 0, 0, s).lr_factor == 1.0
    shares = tiny(WARMDOWN_FRAC=0, SEQ_CHANGE_WARMUP_SHARE=0.2, TRAIN_SEQ_SCHEDULE="64@0.1,128@0.5,256@0.8")
    factors = [g.schedule(progress, 20, start, shares).lr_factor for progress, start in (
        (0.05, 0), (0.15, 9), (0.3, 9), (0.45, 9), (0.55, 20), (0.9, 20))]
    assert factors == pytest.approx([1.0, 0.25, 1.0, 1.0, 0.25, 1.0])
    falling = changed(s, warmdown_frac=0.8)
    assert g.schedule(0.6, 21, 20, falling).lr_factor == pytest.approx(0.25)  # half risen, half fallen


def test_context_grows_with_progress():
    s = tiny(TRAIN_SEQ_SCHEDULE="128@0.7,64@0.1,256@0.9", ITERATIONS=10)
    assert [g.schedule(f, 3, 0, s).context for f in (0.0, 0.1, 0.11, 0.7, 1.0)] == [64, 64, 128, 128, 256]


def test_batch_and_rates_by_hand():
    s = tiny(TRAIN_BATCH_SCHEDULE="4096@1,512@0.25,2048@0.5", WARMDOWN_FRAC=0.4, MIN_LR=0)
    moments = [g.schedule(progress, 3, 0, s) for progress in (0.0, 0.25, 0.26, 0.5, 0.6, 0.8, 1.0)]
    assert [now.step_tokens for now in moments] == [512, 512, 2048, 2048, 4096, 4096, 4096]
    falls = [1, 1, 1, 1, 1, 0.5, 0]
    grown = [0.5, 0.5, 1, 1, math.sqrt(2), math.sqrt(2), math.sqrt(2)]  # TRAIN_BATCH_TOKENS is 2048
    assert [now.lr_factor for now in moments] == pytest.approx([a * b for a, b in zip(falls, grown)])
    straight = changed(s, train_batch_lr_power=1.0)
    assert g.schedule(0.1, 3, 0, straight).lr_factor == 0.25
    assert g.schedule(0.1, 3, 0, changed(s, train_batch_lr_power=0.0)).lr_factor == 1.0


@pytest.mark.parametrize("ranks, tokens, count, length", [
    (1, 512, 1, 512), (1, 1024, 1, 1024), (1, 2048, 2, 1024), (1, 3072, 3, 1024), (1, 1536, 2, 768), (2, 2048, 2, 512),
    (2, 512, 1, 256), (4, 6144, 6, 256)])
def test_a_step_is_split_into_micro_batches_no_longer_than_the_usual(ranks, tokens, count, length):
    s = tiny(WORLD_SIZE=ranks, RANK=0)  # 2 micro-batches of 2048 tokens over the ranks
    assert s.split_step(tokens) == (count, length) and s.split_step(2048) == (2, s.micro_batch_tokens)


@pytest.mark.parametrize("name, value, words", [
    ("TRAIN_BATCH_SCHEDULE", "2048@0.5,4097@1", "has 4097, not to be split evenly"),
    ("TRAIN_BATCH_SCHEDULE", "2048@0.5,4096@0.5", "has an end twice"),
    ("TRAIN_BATCH_SCHEDULE", "2048@0,4096@1", "is not a list like 1024@0.1,2048@1.0"),
    ("TRAIN_SEQ_SCHEDULE", "64@0.5,256@.5", "has an end twice"),
    ("TRAIN_BATCH_LR_POWER", "0.3", "it is read only with TRAIN_BATCH_SCHEDULE=*"),
    ("SEQ_CHANGE_WARMUP_STEPS", "3", "it is read only with TRAIN_SEQ_SCHEDULE=*"),
    ("SEQ_CHANGE_WARMUP_SHARE", "0.1", "it is read only with TRAIN_SEQ_SCHEDULE=*")])
def test_schedules_in_stages_that_are_refused(name, value, words):
    [line] = problems(**environment(**{name: value}))
    assert line.startswith(f"{name}: ") and words in line


@pytest.mark.parametrize("changes, expected", [
    (dict(), [(256, False, 2048), (256, True, 2048)]),
    (dict(ENABLE_LOOPING_AT=1), [(256, False, 2048)]), (dict(NUM_LOOPS=0), [(256, False, 2048)]),
    (dict(TRAIN_SEQ_SCHEDULE="64@0.1,128@0.7,256@1.0"),
     [(64, False, 2048), (128, False, 2048), (128, True, 2048), (256, True, 2048)]),
    (dict(TRAIN_SEQ_SCHEDULE="64@0.1,128@0.7,256@1.0", NUM_LOOPS=0),
     [(64, False, 2048), (128, False, 2048), (256, False, 2048)]),
    (dict(TRAIN_SEQ_SCHEDULE="64@0.1,256@0.2"), [(64, False, 2048), (256, False, 2048), (256, True, 2048)]),
    (dict(TRAIN_SEQ_SCHEDULE="64@0.5,256@1", TRAIN_BATCH_SCHEDULE="512@0.2,1024@0.5,4096@1"),
     [(64, False, 512), (64, False, 1024), (64, True, 1024), (256, True, 4096)])])
def test_every_shape_that_training_meets_is_compiled(changes, expected):
    s = tiny(**changes)
    assert g.training_shapes(s) == expected
    met = {g.schedule(f, 3, 0, s)[:3] for f in np.linspace(0, 1, 201)[:-1]}
    assert met <= set(expected)


@pytest.mark.parametrize("step, expected", [(0, 0.92), (750, 0.945), (1500, 0.97), (9999, 0.97)])
def test_muon_momentum_by_hand(step, expected):
    assert g.schedule(0.5, step, 0, g.Settings()).momentum == pytest.approx(expected)
    assert g.schedule(0.5, step, 0, changed(g.Settings(), muon_momentum_warmup_steps=0)).momentum == 0.97


@pytest.mark.parametrize("progress, expected", [(0.0, 0.92), (0.1, 0.945), (0.2, 0.97), (0.9, 0.97)])
def test_muon_momentum_in_shares_of_the_run_by_hand(progress, expected):
    s = changed(g.Settings(), muon_momentum_warmup_share=0.2)
    assert g.schedule(progress, 3, 0, s).momentum == pytest.approx(expected)


# --- Optimizer


def set_gradients(model, seed, size=1.0):
    """The same random gradients for every model of the same shapes; float64 copies are returned."""
    draw, gradients = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters():
        gradient = size * torch.randn(p.shape, generator=draw)
        gradients[name] = gradient.double()
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)
    return gradients


def slow_polar_express(update):
    triples = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
               (4.042929935166739, -2.808917465908714, 0.5000178451051316),
               (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
               (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
               (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


class SlowOptimizer:
    """Matrix by matrix in float64, from the published description."""

    def __init__(self, model, s):
        self.s, self.t = s, 0
        self.p = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.start = {name: p.clone() for name, p in self.p.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.rows = {}

    def skylight(self, update, matrix, key):
        s, norm = self.s, update.norm()
        if s.skylight_norm_ema:
            beta2 = s.skylight_norm_beta2
            self.rows[key] = beta2 * self.rows.get(key, 0.0) + (1 - beta2) * (update ** 2).mean(1)
            update = update / torch.sqrt(self.rows[key] / (1 - beta2 ** self.t) + s.skylight_norm_eps)[:, None]
            update = update * norm / update.norm()
        if s.skylight_uw_floor and norm < s.skylight_uw_ratio * matrix.norm():
            update = update * (s.skylight_uw_ratio * matrix.norm() / norm)
        return update

    def step(self, gradients, multiplier, momentum):
        s = self.s
        self.t += 1
        norm = math.sqrt(sum((x ** 2).sum().item() for x in gradients.values()))
        factor = min(1.0, s.grad_clip_norm / (norm + 1e-6)) if s.grad_clip_norm else 1.0
        for name, p in self.p.items():
            gradient = gradients[name] * factor
            if name.endswith("_bank"):
                lr = s.matrix_lr * multiplier
                for i, matrix in enumerate(p):
                    self.m[name][i] = momentum * self.m[name][i] + gradient[i]
                    update = gradient[i] + momentum * self.m[name][i]
                    if s.muon_row_normalize:
                        update = update / update.norm(dim=1, keepdim=True).clamp(min=1e-7)
                    update = self.skylight(slow_polar_express(update), matrix, (name, i))
                    matrix -= lr * s.muon_wd * matrix
                    matrix -= lr * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * update
                continue
            base, decay = {"tok_emb": (s.tied_embed_lr, s.embed_wd), "softcap_pos": (s.softcap_lr, 0.0),
                           "softcap_neg": (s.softcap_lr, 0.0)}.get(name, (s.scalar_lr, s.adam_wd))
            lr = base * multiplier
            self.m[name] = s.beta1 * self.m[name] + (1 - s.beta1) * gradient
            self.v[name] = s.beta2 * self.v[name] + (1 - s.beta2) * gradient ** 2
            mean, square = self.m[name] / (1 - s.beta1 ** self.t), self.v[name] / (1 - s.beta2 ** self.t)
            self.p[name] = p - lr * decay * p - lr * mean / (square.sqrt() + s.adam_eps)
        return norm


@pytest.mark.parametrize("changes", [dict(GRAD_CLIP_NORM=0.3),
                                     dict(GRAD_CLIP_NORM=0, ADAM_WD_MODE="zero", ADAM_EPS=0.1),
                                     dict(GRAD_CLIP_NORM=1e6, MUON_ROW_NORMALIZE=0, NUM_KV_HEADS=4, GATED_XSA=1),
                                     dict(SKYLIGHT_MUON=1, SKYLIGHT_NORM_BETA2=0.9, SKYLIGHT_NORM_EPS=1e-3, UW_FLOOR=2.5),
                                     dict(SKYLIGHT_UW_FLOOR=1)],
                         ids=["clipped", "decay of all", "no row norm, one bank group", "rows evened out, floor", "floor"])
def test_optimizer_equals_a_slow_one_over_three_steps(changes):
    s = tiny(**dict(MUON_WD=0.5, ADAM_WD=0.5, EMBED_WD=0.5, ADAM_EPS=1e-3) | changes)
    model = random_model(s)
    slow, optimizer = SlowOptimizer(model, s), g.Optimizer(model, s, runtime())
    for step, (multiplier, momentum) in enumerate(((0.5, 0.92), (1.0, 0.95), (0.25, 0.97))):
        gradients = set_gradients(model, step)
        optimizer.add_loss(torch.tensor(1.5 + step))
        loss, norm = optimizer.step(multiplier, momentum).tolist()
        assert norm == pytest.approx(slow.step(gradients, multiplier, momentum), rel=1e-5)
        assert loss == 1.5 + step
        for name, p in model.named_parameters():
            moved = slow.p[name] - slow.start[name]
            error = (p.detach().double() - slow.p[name]).norm() / moved.norm()
            assert error < 1e-4, f"{name}, step {step}: relative error {error:.1e}"


def test_gradients_are_zero_after_a_step():
    model = random_model(tiny())
    optimizer = g.Optimizer(model, model.settings, runtime())
    set_gradients(model, 0)
    optimizer.step(1.0, 0.9)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 128, 32), (2, 32, 128)])
def test_polar_express_makes_matrices_nearly_orthogonal(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = g.polar_express(update, 5)
    assert result.is_contiguous() and result.shape == update.shape
    values = torch.linalg.svdvals(result)
    assert 0.7 < values.min() and values.max() < 1.3
    for matrix, made in zip(update, result):
        torch.testing.assert_close(made.double(), slow_polar_express(matrix.double()), atol=1e-4, rtol=1e-3)
    assert not g.polar_express(torch.zeros(shape), 5).any()


def holds(tensor, p):
    """Whether the memory of p lies inside that of `tensor`."""
    begin = tensor.data_ptr()
    return begin <= p.data_ptr() < begin + tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("changes", [*CONFIGURATIONS.values(), dict(SOFTCAP_LR=0)])
def test_every_trained_parameter_is_in_exactly_one_group(changes):
    model = random_model(reference_settings(**changes))
    optimizer = g.Optimizer(model, model.settings, runtime())
    runs = [group.weight for group in optimizer.adamw_groups]
    for name, p in model.named_parameters():
        places = sum(p is bank for shard in optimizer.shards for bank in shard.banks) + sum(holds(run, p) for run in runs)
        assert places == (1 if p.requires_grad else 0), name
        assert p.requires_grad or "softcap" in name and model.settings.softcap_lr == 0


@pytest.mark.parametrize("lr, moves", [(0.02, True), (0, False)])
def test_softcaps_train_unless_their_rate_is_zero(lr, moves):
    model = random_model(reference_settings(SOFTCAP_LR=lr))
    before = model.softcap_pos.item(), model.softcap_neg.item()
    optimizer = g.Optimizer(model, model.settings, runtime())
    ids, targets, segments = packed_documents((9, 12))
    model.token_losses(ids, targets, segments, False).mean().backward()
    if moves:
        assert model.softcap_pos.grad != 0 and model.softcap_neg.grad != 0
    optimizer.step(1.0, 0.9)
    after = model.softcap_pos.item(), model.softcap_neg.item()
    assert all((a != b) == moves for a, b in zip(before, after))


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that keep what was to be run, on the CPU; returns those that were recorded."""
    made, run = [], g.MicroBatches.forward_backward

    class Graph:
        def replay(self):
            run(*self.call)

    @contextmanager
    def recording(graph, pool, capture_error_mode):
        with monkeypatch.context() as patch:
            patch.setattr(g.MicroBatches, "forward_backward", lambda *call: setattr(graph, "call", call))
            yield
        made.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def micro_batches_of(s, kernel="torch"):
    model = random_model(s)
    model.attention_kernel = kernel
    return g.MicroBatches(model, g.Optimizer(model, s, runtime()), s, SimpleNamespace(on_cuda=True, device=torch.device("cpu")))


def batch_of(lengths, context, seed=0):
    ids, targets, _ = packed_documents(lengths, seed=seed)
    return g.Batch(ids, targets, g.make_segments(g.segment_bounds(np.cumsum((0, *lengths))[:-1], sum(lengths), context), context))


def test_recorded_passes_see_their_micro_batch_and_count_the_others(graphs):
    """Fewer segments than before, as many, more than there is room for, another context; each adds the right gradients."""
    s = changed(reference_settings(), train_batch_tokens=8 * 130, grad_accum_steps=8, train_seq_len=64)
    batches = [batch_of(lengths, context, seed) for seed, (lengths, context) in enumerate([
        ((100, 30), 64), ((50, 50, 30), 64), ((130,), 64), ((2,) * 65, 64), ((60, 70), 32)])]
    plain, recorded = micro_batches_of(changed(s, recorded_passes=False)), micro_batches_of(s)
    recorded.capture([(64, True, 1040), (64, False, 1040)])
    assert len(graphs) == 2 and recorded.optimizer.flat_grad.count_nonzero() == 0
    for batch in batches:
        for micro_batches in (plain, recorded):
            micro_batches.accumulate(batch, True, 1040)
        assert torch.equal(plain.optimizer.flat_grad, recorded.optimizer.flat_grad)
        for ours, theirs in zip(recorded.model.banks(), plain.model.banks()):
            assert torch.equal(ours.grad, theirs.grad) and ours.grad.count_nonzero()
    assert (plain.unrecorded, recorded.unrecorded) == (0, 2)
    assert not micro_batches_of(s, "reference").records


def test_warm_up_runs_every_shape_before_it_records_them(graphs, corpus):
    s = changed(reference_settings(), train_batch_tokens=260, grad_accum_steps=2, train_seq_len=64, warmup_steps=2,
                train_seq_schedule="32@0.2,64@1.0", enable_looping_at=0.5, data_path=str(corpus / "data"), vocab_size=BOS + 300,
                gptq_calibration_batches=0)
    micro_batches, steps, log = micro_batches_of(s), [], SimpleNamespace(event=lambda name, **facts: None)

    def take_step(batches, now):
        for _ in range(s.accumulation):
            batch = next(batches)
            micro_batches.accumulate(batch, now.looping, now.step_tokens)
        assert now.context == batch.segments.max_seqlen and now[3:] == (1.0, s.muon_momentum)
        steps.append((*now[:3], len(graphs)))

    before = [p.detach().clone() for p in micro_batches.model.parameters()]
    g.warm_up(take_step, micro_batches, g.TrainingData(s, runtime()), lambda looping, rehearsal: None, s, runtime(), log)
    shapes = [(32, False, 260), (64, False, 260), (64, True, 260)]
    assert steps == [(*shape, 0) for shape in shapes for _ in range(2)] + [(*shape, 3) for shape in shapes]
    assert list(micro_batches.graphs) == shapes and micro_batches.unrecorded == 0
    assert all(map(torch.equal, before, micro_batches.model.parameters()))


@pytest.mark.parametrize("mode, factor", [("active", 1.0), ("zero", (1 - 0.02 * 0.5) ** 3)])
def test_parameters_that_idle_before_looping(mode, factor):
    model = g.GPT(tiny(ADAM_WD_MODE=mode, ADAM_WD=0.5, SCALAR_LR=0.02))
    optimizer = g.Optimizer(model, model.settings, runtime())
    start = model.skip_weights[1].detach().clone()
    ids, targets, segments = packed_documents((9, 12))
    for _ in range(3):
        model.token_losses(ids, targets, segments, False).mean().backward()
        optimizer.step(1.0, 0.9)
    assert model.skip_weights.shape[0] == 3  # 5 visits have 2 skips, 7 visits with loops have 3
    for idle, initial in ((model.skip_weights[2], 1.0), (model.parallel_post_lambdas[:3], 1.0),
                          (model.parallel_resid_lambdas[:3], 1.1)):
        torch.testing.assert_close(idle.detach(), torch.full_like(idle, initial * factor), atol=0 if factor == 1 else 1e-6, rtol=0)
    assert not torch.equal(model.skip_weights[1], start)


def test_rehearsal_leaves_no_trace():
    models = [random_model(tiny()) for _ in range(2)]
    fresh, rehearsed = [g.Optimizer(model, model.settings, runtime()) for model in models]
    for optimizer, model in zip((fresh, rehearsed), models):
        set_gradients(model, 0)
        optimizer.step(1.0, 0.9)
    before = [p.clone() for p in models[1].parameters()]
    with rehearsed.rehearsal():
        for seed in (7, 8):
            set_gradients(models[1], seed, 30.0)
            rehearsed.add_loss(torch.tensor(4.0))
            rehearsed.step(1.0, 0.97)
        assert not any(torch.equal(a, b) for a, b in zip(before, models[1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, models[1].parameters()))
    assert rehearsed.steps == fresh.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(fresh.state(), rehearsed.state()))
    for optimizer, model in zip((fresh, rehearsed), models):
        set_gradients(model, 1)
        optimizer.step(1.0, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_weight_average_by_hand():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    average = g.WeightAverage(weights, tiny(EMA_DECAY=0.75))
    weights[0].copy_(torch.tensor([5.0, 2.0])), weights[1].fill_(0.0)
    average.update(0.0)
    weights[0].fill_(10.0)
    average.update(0.5)
    average.swap()
    assert weights[0].tolist() == [0.75 * 2.0 + 2.5, 0.75 * 2.0 + 2.5] and weights[1].item() == 2.25


def averaged(progress, seen, **fields):
    """What the average makes of one weight, 1 at first, that is `seen` after the steps which begin at `progress`."""
    weight = torch.ones(1, dtype=torch.float64)
    average = g.WeightAverage([weight], changed(tiny(), **fields))
    for share, value in zip(progress, seen, strict=True):
        weight.fill_(value)
        average.update(share)
    average.swap()
    return weight.item()


def test_weight_average_in_shares_of_the_run_by_hand():
    once, twice = math.exp(-0.5), math.exp(-1)  # what is left after a tenth and a fifth of the run
    expected = (1 * once + 4 * (1 - once)) * twice + 8 * (1 - twice)
    assert averaged([0.0, 0.1, 0.3], [7, 4, 8], ema_share=0.2) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [40, 400])
def test_weight_average_in_shares_is_the_same_for_any_number_of_steps(steps):
    progress = np.arange(steps + 1) / steps
    seen = [2.0 if share <= 0.5 else 5.0 for share in progress]
    expected = 5 - 3 * math.exp(-0.5 / 0.1) - math.exp(-1 / 0.1)
    assert averaged(progress, seen, ema_share=0.1) == pytest.approx(expected)
    per_step = averaged(progress[1:], seen[1:], ema_decay=math.exp(-1 / steps / 0.1))
    assert per_step == pytest.approx(expected)


@pytest.mark.parametrize("steps, share", [("EMA_DECAY", "EMA_SHARE"),
                                          ("MUON_MOMENTUM_WARMUP_STEPS", "MUON_MOMENTUM_WARMUP_SHARE")])
def test_lengths_in_steps_and_in_shares_exclude_each_other(steps, share):
    [line] = problems(**{steps: 0.5 if steps == "EMA_DECAY" else 5, share: 0.1})
    assert line.startswith(f"{steps}: it is read only with {share}=0.0")
    g.Settings.from_environment({share: "0.1"})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_matrix_is_dealt_to_exactly_one_rank(world_size):
    model = random_model(tiny())
    loads = np.zeros(world_size, dtype=int)
    for number in range(3):
        dealt, whole = [], None
        for rank in range(world_size):
            shard = g.Optimizer(model, model.settings, runtime(rank, world_size)).shards[number]
            for update, bank in zip(shard.updates, shard.banks):
                update.copy_(bank.detach())
            share = len(shard.all) // world_size
            shard.own.copy_(shard.all[rank * share:(rank + 1) * share])  # as the reduce-scatter would
            assert all(torch.equal(own.update, own.weight) for own in shard.owned)
            assert all(own.momentum.shape == own.weight.shape for own in shard.owned)
            matrices = [matrix for own in shard.owned for matrix in own.update]
            dealt += matrices
            loads[rank] += len(matrices)
            whole = [matrix for bank in shard.banks for matrix in bank]
        assert len(dealt) == len(whole) and all(torch.equal(a, b) for a, b in zip(dealt, whole))
        assert share == math.ceil(len(whole) / world_size)
    assert loads.sum() == 30 and loads.max() <= 3 * math.ceil(10 / world_size)


# --- Clock


class FakeTime:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(g, "time", SimpleNamespace(perf_counter=lambda: self.now))


def drive(clock, fake, lengths):
    """Run until the clock says stop; returns the progress of every step and the training time at the end."""
    seen = []
    for step in itertools.count():
        progress, stop = clock.begin_step(step)
        if stop:
            return seen, clock.elapsed()
        seen.append(progress)
        fake.now += lengths(step)
        clock.end_step(step)


@pytest.mark.parametrize("lengths", [lambda s: 1.0, lambda s: 0.7, lambda s: 3.0 - 0.2 * min(s, 10),
                                     lambda s: (1.0, 1.5)[s >= 4]], ids=["even", "uneven end", "faster", "slower once"])
def test_clock_stops_before_the_cap(monkeypatch, lengths):
    fake = FakeTime(monkeypatch)
    clock = g.TrainingClock(tiny(MAX_WALLCLOCK_SECONDS=10.5, GPTQ_RESERVE_SECONDS=0.5, ITERATIONS=1000), runtime(), 0.5)
    seen, seconds = drive(clock, fake, lengths)
    assert 10 - 2 * lengths(len(seen) - 1) < seconds <= 10.0
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] <= 1
    ends = np.cumsum([0] + [lengths(step) for step in range(len(seen))])
    assert seen == pytest.approx((ends[:-1] / 10).tolist())


def test_clock_looks_ahead_by_the_longest_step_of_its_state(monkeypatch):
    """The first step of 3 s was a plain one; of the looped ones, which take 1 s, one took 2 s."""
    fake = FakeTime(monkeypatch)
    clock = g.TrainingClock(tiny(MAX_WALLCLOCK_SECONDS=20.5, ITERATIONS=1000), runtime(), 0.5)
    seen, seconds = drive(clock, fake, lambda step: {0: 3.0, 10: 2.0}.get(step, 1.0))
    assert clock.longest == {(256, False, 2048): 3.0, (256, True, 2048): 2.0} and seconds == 19.0


def test_clock_counts_iterations_without_a_cap(monkeypatch):
    clock = g.TrainingClock(tiny(ITERATIONS=4), runtime(), 0.0)
    seen, _ = drive(clock, FakeTime(monkeypatch), lambda step: 100.0)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_iterations_end_a_capped_run_too(monkeypatch):
    fake = FakeTime(monkeypatch)
    clock = g.TrainingClock(tiny(ITERATIONS=3, MAX_WALLCLOCK_SECONDS=100), runtime(), 0.0)
    assert len(drive(clock, fake, lambda step: 1.0)[0]) == 3


@pytest.mark.parametrize("iterations, force, expected", [(6, 3, [0, 1 / 6, 2 / 6]), (4, 9, [0, 0.25, 0.5, 0.75])])
def test_forced_stop_leaves_the_schedule_as_it_is(monkeypatch, iterations, force, expected):
    clock = g.TrainingClock(tiny(ITERATIONS=iterations, FORCE_STOP_STEP=force), runtime(), 0.0)
    seen, _ = drive(clock, FakeTime(monkeypatch), lambda step: 1.0)
    assert seen == pytest.approx(expected)


def test_every_rank_leaves_out_the_same_rounds(monkeypatch):
    """Rank 1, whose clock is five seconds ahead, follows that of rank 0."""
    fake, sent = FakeTime(monkeypatch), []

    class Rank(g.Runtime):
        def from_rank0(self, values):
            if self.rank == 0:
                sent.append(values)
                return values
            return sent.pop(0)

    done = []
    for rank in range(2):
        clock = g.TrainingClock(tiny(MAX_WALLCLOCK_SECONDS=10, GPTQ_RESERVE_SECONDS=0), Rank(rank, 2, torch.device("cpu")), 0)
        fake.now += 5.0 * rank
        for number in clock.in_time(range(20)):
            fake.now += 3.0 if number == 1 else 1.0
            done.append((rank, number))
        assert clock.left_out == 15
    # The second round takes 3 s, so that from then on 3.75 s must be left: at 4, 5 and 6 s they are, at 7 s not.
    assert done == [(rank, number) for rank in range(2) for number in range(5)] and not sent


def test_pauses_do_not_count(monkeypatch):
    fake = FakeTime(monkeypatch)
    clock = g.TrainingClock(tiny(MAX_WALLCLOCK_SECONDS=10.5, ITERATIONS=1000), runtime(), 0.5)
    for step in range(2):
        clock.begin_step(step)
        fake.now += 1.0
        clock.end_step(step)
    with clock.paused(2):
        fake.now += 500.0
    assert clock.begin_step(2) == (pytest.approx(0.2), False)
    assert clock.elapsed() == 2.0 and clock.seconds == [0, 1, 2] and clock.speed(1, 2) == 2048
    with clock.paused(2):
        fake.now += 500.0
    fake.now += 3.0
    assert clock.begin_step(3)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("name", [name for name in EVALUATION_FILES if name.endswith(".py")])
def test_nothing_is_unpickled(name):
    tree = ast.parse((ROOT / name).read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in ([node] if isinstance(node, ast.ImportFrom) else node.names) if getattr(alias, "name", None)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not imported & {"pickle", "shelve", "marshal", "dill"}
    assert not called & {"torch.load", "torch.save", "np.load", "eval", "exec"}


# --- Files appear complete or not at all


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        g.write_whole(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
