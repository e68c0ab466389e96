"""The recipes of the published systems: their commands parse, and what each of them names really happens.

`python -m tests.test_recipes` writes the table of docs/recipes.md that this file checks.
"""
import dataclasses
import functools
import itertools
import math
import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as g
from env_settings import fields_by_group, read_recipe, setting_text
from tests.synthetic import (
    BOS, ROOT, TINY, bytes_of, documents, events, main_here, record, runtime, unigram_bpb, write_data)
from tools import diff_recipes

torch.set_num_threads(1)
PUBLISHED = tuple(sorted(path.stem for path in (ROOT / "recipes").glob("pr*.env")))
RECIPES = (*PUBLISHED, "record")
ALIASES = {}  # the settings that each alias stands for
for name, field in g.Settings.__dataclass_fields__.items():
    ALIASES.setdefault(field.metadata["rule"].alias, []).append(name.upper())
PAGE = ROOT / "docs" / "recipes.md"
SPEC = ROOT.parent / "shared" / "spec" / "settings.md"

# Every environment variable that one of the published systems reads.
VARIABLES = """
DATA_DIR DATA_PATH TOKENIZER_PATH CASEOPS_ENABLED VOCAB_SIZE TRAIN_BATCH_TOKENS VAL_DOC_FRACTION
EVAL_INCLUDE_TAIL SEED RUN_ID ARTIFACT_DIR ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_LOG_EVERY VAL_LOSS_EVERY
TTT_EVAL_ONLY PREQUANT_ONLY QUANTIZE_ONLY FORCE_STOP_STEP RANK WORLD_SIZE LOCAL_RANK DYNAMO_CACHE_SIZE_LIMIT
DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT LEAKY_RELU_SQ_SLOPE
XSA_LAST_N LOGIT_SOFTCAP ASYM_LOGIT_RESCALE TIE_EMBEDDINGS TIED_EMBED_INIT_STD ROPE_BASE ROPE_DIMS
ROPE_TRAIN_SEQ_LEN ROPE_YARN LN_SCALE QK_GAIN_INIT QK_GAIN_INIT_SCHEDULE NUM_LOOPS LOOP_START LOOP_END
PARALLEL_START_LAYER PARALLEL_FINAL_LANE FUSED_CE_ENABLED SKIP_GATES_ENABLED SMEAR_GATE_ENABLED
SMEAR_GATE_BOS_FIX GATE_WINDOW SPARSE_ATTN_GATE_ENABLED SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE
GATED_ATTN_ENABLED GATED_ATTN_INIT_STD ATTN_OUT_GATE_ENABLED ATTN_OUT_GATE_SRC GATED_XSA MATRIX_LR SCALAR_LR
TIED_EMBED_LR EMBED_LR MUON_MOMENTUM MUON_BACKEND_STEPS MUON_ROW_NORMALIZE MUON_WD MUON_HUBER_WD
MUON_HUBER_DELTA BETA1 BETA2 ADAM_EPS ADAM_WD EMBED_WD GRAD_CLIP_NORM EMA_DECAY SKYLIGHT_MUON BETA2_NORMUON
UW_FLOOR SKYLIGHT_UW_FLOOR SKYLIGHT_UW_RATIO SKYLIGHT_NORM_EMA SKYLIGHT_NORM_BETA2 SKYLIGHT_NORM_EPS
CONTROL_TENSOR_NAME_PATTERNS WARMUP_STEPS WARMDOWN_FRAC WARMDOWN_ITERS MIN_LR MIDRUN_CAP_SCHEDULE
MIDRUN_CAP_LOG_UPDATES ENABLE_LOOPING_AT MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS
GPTQ_RESERVE_SECONDS TRAIN_SEQ_LEN TRAIN_SEQ_SCHEDULE TRAIN_SEQ_SCHEDULE_MODE SEQ_CHANGE_WARMUP_STEPS
COMPILE_SHAPE_WARMUP COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES GPTQ_CALIBRATION_BATCHES
GPTQ_CALIBRATION_MODE MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS EMBED_CLIP_SIGMAS MLP_CLIP_SIGMAS
ATTN_CLIP_SIGMAS GATED_ATTN_QUANT_GATE OPTROT_ENABLED LQER_ENABLED LQER_RANK LQER_TOP_K LQER_FACTOR_BITS
LQER_ASYM_ENABLED LQER_ASYM_GROUP LQER_SCOPE LQER_GAIN_SELECT AWQ_LITE_ENABLED AWQ_LITE_BITS
AWQ_LITE_GROUP_TOP_K AWQ_LITE_GROUP_SIZE COMPRESSOR PERGROUP_ROUNDTRIP_CHECK EVAL_SEQ_LEN EVAL_STRIDE
VAL_BATCH_TOKENS TEMPERATURE_SCALE TTT_ENABLED TTT_LORA_RANK TTT_LORA_ALPHA TTT_LORA_LR TTT_LOCAL_LR_MULT
TTT_OPTIMIZER TTT_WEIGHT_DECAY TTT_BETA1 TTT_BETA2 TTT_WARM_START_A TTT_WARM_START_MEAN_ENABLED
TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_MOMENTUM TTT_MASK TTT_Q_LORA TTT_V_LORA TTT_K_LORA TTT_O_LORA
TTT_MLP_LORA TTT_CHUNK_SIZE TTT_EVAL_SEQ_LEN TTT_BATCH_SIZE TTT_GRAD_STEPS TTT_GRAD_STEPS_CLEAN
TTT_UPDATE_EVERY TTT_LORA_EMA_DECAY TTT_EVAL_BATCHES TTT_SHORT_SCORE_FIRST_ENABLED TTT_SHORT_SCORE_FIRST_STEPS
TTT_SHORT_DOC_LEN TTT_SHORT_CHUNK_SIZE TTT_SHORT_LORA_ENABLED TTT_SHORT_LORA_RANK TTT_SHORT_LORA_LR
TTT_SHORT_WEIGHT_DECAY TTT_SHORT_BETA2 TTT_TRAIN_MIN_DOC_LEN TTT_TRAIN_MAX_DOC_LEN PHASED_TTT_PREFIX_DOCS
PHASED_TTT_NUM_PHASES GLOBAL_TTT_OPTIMIZER GLOBAL_TTT_LR GLOBAL_TTT_MOMENTUM GLOBAL_TTT_MUON_NS_STEPS
GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_EPOCHS GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_BATCH_SEQS
GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR GLOBAL_TTT_GRAD_CLIP GLOBAL_TTT_RESPECT_DOC_BOUNDARIES
NGRAM_TILT_ENABLED NGRAM_HINT_PRECOMPUTE_OUTSIDE TOKEN_ORDER TOKEN_THRESHOLD TOKEN_BOOST WITHIN_TAU
WITHIN_BOOST WORD_ORDER WORD_NORMALIZE WORD_TAU WORD_BOOST AGREE_ADD_BOOST PG_NGRAM_BUILD_DIR
""".split()


def variables_of(recipe: str) -> dict[str, str]:
    lines = (ROOT / "recipes" / f"{recipe}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@functools.cache
def settings_of(recipe: str) -> g.Settings:
    return g.Settings.from_environment(variables_of(recipe))


def complaints(environ: dict[str, str]) -> list[str]:
    try:
        g.Settings.from_environment(environ)
    except g.InputError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.env")))
def test_recipe_sets_what_it_says_and_each_name_once(recipe):
    lines = (ROOT / "recipes" / f"{recipe}.env").read_text().splitlines()
    chosen = variables_of(recipe)
    assert read_recipe(str(ROOT / "recipes" / f"{recipe}.env"), g.Settings) == chosen
    assert len(chosen) == sum(line != "" and not line.startswith("#") for line in lines)
    for name in chosen.keys() - g.Settings.fixed.keys():
        text, value = chosen[name], getattr(settings_of(recipe), name.lower())
        assert setting_text(value) == text or float(text) == value


# --- Names of the published systems


def test_the_list_of_variables_is_that_of_the_specification():
    if not SPEC.exists():
        pytest.skip("needs shared/spec/settings.md beside the checkout")
    part1 = SPEC.read_text().split("\n## Part 1.")[1].split("\n## Part 2.")[0]
    assert re.findall(r"^\| `(\w+)` \|", part1, flags=re.M) == VARIABLES


def test_every_published_variable_is_a_setting_an_alias_or_refused():
    assert len(VARIABLES) == len(set(VARIABLES)) == 196
    fields = {f.name.upper() for f in dataclasses.fields(g.Settings)}
    for name in VARIABLES:
        assert [name in fields, name in ALIASES, name in g.Settings.fixed].count(True) == 1, name


@pytest.mark.parametrize("name", g.Settings.fixed)
def test_what_is_no_setting_is_refused_with_its_reason(name):
    accepted, why = g.Settings.fixed[name]
    assert len(why.split()) >= 3
    if accepted == "*":  # published commands name a place, and nothing reads it
        assert not complaints({name: "some/file"})
        return
    other = {None: "1", "": "1", "0": "1", "1": "0", ">1": "0.5"}.get(accepted, "something")
    [line] = complaints({name: other})
    assert line.startswith(f"{name}: {why}")
    if accepted is not None:
        assert not complaints({name: accepted.replace(">1", "1.5")})


# --- Published commands

REFUSED = {"pr1787": {"PHASED_TTT_ENABLED"}, "pr2118": {"PHASED_TTT_ENABLED", "LQER_GROUP_SIZE"},
           "pr2123": set(), "pr2135": set(), "pr2140": {"ROPE_TRAIN_SEQ_LEN", "COMPILE_SHAPE_WARMUP_ITERS"}}
# Set by the command, read by no line of the system's code; the recipe has what the code did.
NEVER_READ = {"pr2118": {"TTT_MASK", "TTT_Q_LORA", "TTT_V_LORA", "TTT_LOCAL_LR_MULT"},
              "pr2140": {"EVAL_STRIDE"}}


def header_of(recipe: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"),
                                (ROOT / "recipes" / f"{recipe}.env").read_text().splitlines())
    return " ".join(line[1:].strip() for line in lines)


def command_of(recipe: str) -> dict[str, str]:
    command = header_of(recipe).split("Its command")[1].split("torchrun")[0]
    return dict(re.findall(r"([A-Z]\w*)=(\S+)", command))


def fixed_by_code(recipe: str) -> dict[str, str]:
    """The last paragraph of a recipe: what its command does not say because its code had no choice."""
    text = (ROOT / "recipes" / f"{recipe}.env").read_text()
    fixed = text.split("# What its code fixes and is a setting here\n")[1]
    return dict(line.split("=", 1) for line in fixed.splitlines())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_command_parses(recipe):
    command, ours = command_of(recipe), settings_of(recipe)
    assert len(command) > 40 and "SEED" in command
    refused = {name for name in command if g.Settings.fixed.get(name, ("",))[0] is None}
    assert refused == REFUSED[recipe]
    assert {line.split(":")[0] for line in complaints(command)} == refused
    accepted = {name: value for name, value in command.items() if name not in refused}
    theirs = g.Settings.from_environment(fixed_by_code(recipe) | accepted)
    named = {setting for name in command for setting in ALIASES.get(name, [name])}
    named -= g.Settings.fixed.keys() | {"SEED"}
    differing = {name for name in named if getattr(theirs, name.lower()) != getattr(ours, name.lower())}
    assert differing == NEVER_READ.get(recipe, set())
    told = header_of(recipe).split("train_gpt.py")[-1]
    assert all(name in told for name in refused | differing), "the header names what its command got wrong"


# --- Toy runs

LENGTHS = ("TRAIN_SEQ_LEN", "EVAL_SEQ_LEN", "TTT_EVAL_SEQ_LEN")
SMALLER = dict.fromkeys(LENGTHS, 16) | dict(
    TTT_CHUNK_SIZE=4, TTT_CHUNK_MAX=4, TTT_LORA_RANK=16, TTT_LORA_ALPHA=16, PHASED_TTT_PREFIX_DOCS=250,
    TTT_CHUNK_GROWTH=1 / 8)
SIZES = {name: TINY[name] for name in """
    VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT XSA_LAST_N NUM_LOOPS LOOP_START LOOP_END
    PARALLEL_START_LAYER ROPE_DIMS VAL_BATCH_TOKENS MAX_WALLCLOCK_SECONDS WARMUP_STEPS TRAIN_LOG_EVERY
    TIED_EMBED_INIT_STD""".split()}
SIZES |= dict(ITERATIONS="14", TRAIN_BATCH_TOKENS="1024", GRAD_ACCUM_STEPS="1", TTT_BATCH_SIZE="1",
              GLOBAL_TTT_CHUNK_TOKENS="512")
LRZIP = shutil.which("lrzip") is not None


def toy(recipe: str, **changes) -> g.Settings:
    """The recipe, its sizes and lengths aside: lengths are a sixteenth, chunks a quarter, the global phases'
    documents one in 250."""
    ours = settings_of(recipe)
    smaller = {name: f"{getattr(ours, name.lower()) / share:g}" for name, share in SMALLER.items()}
    smaller["TRAIN_SEQ_SCHEDULE"] = re.sub(
        r"(\d+)@", lambda m: f"{int(m[1]) // 16}@", ours.train_seq_schedule)
    smaller["TTT_SHORT_SCORE_FIRST_STEPS"] = re.sub(
        r"(\d+):(\d+)", lambda m: f"{int(m[1]) // 16}:{int(m[2]) // 4}", ours.ttt_short_score_first_steps)
    if ours.compressor == "pergroup" and not LRZIP:
        smaller["COMPRESSOR"] = "brotli"
    changes = {name: str(value) for name, value in changes.items()}
    return g.Settings.from_environment(variables_of(recipe) | SIZES | smaller | changes)


def repeated(count: int, seed: int, longest: int) -> np.ndarray:
    """Documents, one after another, that say the same four times over, from the second time on with slips."""
    draw, result = np.random.default_rng(seed), []
    for document in documents(count, seed, longest):
        pieces = [document] + [document[1:].copy() for _ in range(3)]
        for piece in pieces[1:]:
            slips = draw.random(len(piece)) < 0.04
            piece[slips] = draw.integers(2, int(SIZES["VOCAB_SIZE"]), slips.sum())
        result += pieces
    return np.concatenate(result)


def once(method):
    """Keep a method's results, by its arguments."""
    @functools.wraps(method)
    def kept(self, recipe: str, **changes):
        key = method.__name__, recipe, *sorted(changes.items())
        if key not in self.results:
            self.results[key] = method(self, recipe, **changes)
        return self.results[key]
    return kept


@functools.cache
def evaluated(recipe: str) -> list:
    """All that a recipe says of model and evaluation."""
    s, values = settings_of(recipe), []
    for group, fields in fields_by_group(g.Settings).items():
        if group not in ("Data", "Run", "Optimizer", "Schedule", "Artifact"):
            values += [getattr(s, field.name) for field in fields]
    return values


def flat(model: g.GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Laboratory:
    """What a recipe does with `changes` to its settings, at toy size: stage by stage, and whole runs."""

    def __init__(self, folder):
        self.folder, self.results = folder, {}
        write_data(folder / "data", np.concatenate(documents(300, 1, 900)), repeated(16, 2, 75))
        self.text = repeated(11, 3, 40)  # what `evaluation` scores

    def places(self, run_id: str, folder: str) -> dict[str, str]:
        return dict(DATA_PATH=str(self.folder / "data"), ARTIFACT_DIR=str(self.folder / folder / "out"),
                    RUN_ID=run_id)

    @once
    def run(self, recipe: str, **changes) -> SimpleNamespace:
        """From the program's door to the score, here; with changes: quantized again, from its checkpoint."""
        folder, run_id = (f"{recipe}_changed", "changed") if changes else (recipe, "tiny")
        if changes:
            shutil.copytree(self.folder / recipe / "out", self.folder / folder / "out", dirs_exist_ok=True)
            changes |= dict(QUANTIZE_ONLY=1, TTT_ENABLED=0)
        # At toy size the average of a recipe would be the initial weights; `training` has the recipe's own.
        s = toy(recipe, EMA_DECAY=0.8, **changes, **self.places(run_id, folder))
        environ = {f.name.upper(): setting_text(getattr(s, f.name)) for f in dataclasses.fields(s)
                   if getattr(s, f.name) != f.default}
        windows, calibrate, read, opened = [], g.calibrate, g.read_container, []

        def calibrating(model, some, *others):
            windows.append(len(some))
            return calibrate(model, some, *others)

        def reading(*arguments):
            opened.append(read(*arguments))
            return opened[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(g, "packed_code", lambda: b"")  # takes longer than the rest
            patch.setattr(g, "calibrate", calibrating)
            patch.setattr(g, "read_container", reading)
            code = main_here(environ).returncode
        model = g.GPT(s)
        (table, arrays), (_, trained) = opened[-1], read(s.checkpoint_path, model, s)
        looping = g.install(model, table, arrays, s)
        with open(s.artifact_path, "rb") as file:
            streams = file.read()[-sum(table["streams"]):] if table["streams"] else b""
        cuts = list(itertools.accumulate(table["streams"], initial=0))
        return SimpleNamespace(
            settings=s, code=code, record=record(self.folder / folder, run_id), windows=windows, model=model,
            looping=looping, table=table, arrays=arrays, trained=trained,
            streams=[streams[a:b] for a, b in itertools.pairwise(cuts)])

    @once
    def model(self, recipe: str, spare: str = "", **changes) -> torch.Tensor:
        """Loss of every token of a model whose parameters, all but `spare`, have left their initial values, by
        the same steps with and without the changes."""
        s, draw, away = toy(recipe, **changes), torch.Generator().manual_seed(1), {}
        for name, p in g.GPT(toy(recipe)).named_parameters():
            away[name] = torch.randn(p.shape, generator=draw) * 0.1 * (name != spare)
        away |= dict(softcap_pos=torch.tensor(-28.0), softcap_neg=torch.tensor(-27.0))
        model = g.GPT(s)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += away[name][tuple(slice(n) for n in p.shape)]
        tokens = np.concatenate(documents(6, 4)).astype(np.int64)
        bounds = g.segment_bounds(np.flatnonzero(tokens[:-1] == BOS), len(tokens) - 1, s.train_seq_len)
        ids, targets = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
        with torch.no_grad():
            return model.token_losses(ids, targets, g.make_segments(bounds, s.train_seq_len), s.num_loops > 0)

    @once
    def steps(self, recipe: str, **changes) -> SimpleNamespace:
        """Training as the program does it, watched: weights before and after every step and what is kept of them, learning
        rates' factors, gradients' norms, the longest piece of text."""
        changes = dict(WARMUP_STEPS=0, TRAIN_BATCH_TOKENS=512) | changes
        s = toy(recipe, **changes, **self.places("", "nowhere"))
        model, seen = g.GPT(s), SimpleNamespace(factors=[], pieces=[], norms=[])
        seen.settings, seen.weights = s, [flat(model)]
        step, token_losses = g.Optimizer.step, g.GPT.token_losses

        def stepping(optimizer, multiplier, momentum):
            figures = step(optimizer, multiplier, momentum)
            seen.factors.append(multiplier)
            seen.weights.append(flat(model))
            seen.norms.append(float(figures[1]))
            return figures

        def losing(self, ids, targets, segments, looping):
            seen.pieces.append(int(segments.cu_seqlens.diff().max()))
            return token_losses(self, ids, targets, segments, looping)

        nothing = SimpleNamespace(
            event=lambda *_, **__: None, result=lambda *_, **__: None, score=lambda *_: {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(g.Optimizer, "step", stepping)
            patch.setattr(g.GPT, "token_losses", losing)
            data = g.TrainingData(s, runtime())
            g.train(model, data, nothing.score, lambda *_, **__: None, s, runtime(), nothing)
        seen.kept = flat(model)
        seen.caps = [float(cap.detach()) for cap in (model.softcap_pos, model.softcap_neg) if cap is not None]
        return seen

    def training(self, recipe: str, **changes) -> torch.Tensor:
        seen = self.steps(recipe, **changes)
        return torch.cat((seen.weights[-1], seen.kept))

    def evaluation_settings(self, recipe: str, **changes) -> g.Settings:
        """Rates are raised: a toy document has few chunks to learn from."""
        s = toy(recipe)
        common = dict(TTT_LORA_LR=100 * s.ttt_lora_lr, GLOBAL_TTT_LR=0.05, PHASED_TTT_PREFIX_DOCS=6,
                      TTT_CHUNK_GROWTH=2 * s.ttt_chunk_growth, GLOBAL_TTT_CHUNK_TOKENS=256)
        return toy(recipe, **common | changes)

    def evaluation(self, recipe: str, **changes) -> torch.Tensor:
        """Nats of every target with test-time training of the run's artifact, shared by recipes that evaluate
        alike."""
        alike = next(other for other in RECIPES if evaluated(other) == evaluated(recipe))
        return self.adapted(alike, **changes).nats

    @once
    def adapted(self, recipe: str, **changes) -> SimpleNamespace:
        run, s = self.run(recipe), self.evaluation_settings(recipe, **changes)
        model = g.GPT(run.settings)
        model.load_state_dict(run.model.state_dict())
        data = SimpleNamespace(tokens=self.text, bytes=bytes_of(self.text))
        nats, learners = torch.full((len(self.text) - 1,), math.nan), []

        class Learner(g.Learner):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                learners.append(self)

        class Score(g.Score):
            def add(self, rows, tilted, plain):
                nats[rows.stream_positions] = tilted
                super().add(rows, tilted, plain)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(g, "Learner", Learner)
            patch.setattr(g, "Score", Score)
            g.test_time_training(model, data, run.looping, s, runtime(), SimpleNamespace(event=lambda *_, **__: None))
        assert nats.isfinite().all()
        return SimpleNamespace(nats=nats, adapters=learners[0].adapters)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether nothing but rounding lies between two measurements."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-6 * one.abs().max())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # the n-gram library is compiled there
        yield Laboratory(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_from_training_to_score(recipe, lab):
    run = lab.run(recipe)
    results = run.record["results"]
    assert run.code == 0 and run.record["status"] == "finished"
    assert results.keys() >= {"training", "raw", "averaged", "artifact", "size", "quantized", "ttt"}
    assert results["training"]["steps"] == int(SIZES["ITERATIONS"])
    assert results["artifact"]["round_trip"] == "exact"
    assert results["averaged"]["val_bpb"] < unigram_bpb(lab.folder / "data")
    assert abs(results["quantized"]["val_bpb"] - results["averaged"]["val_bpb"]) < 0.1
    assert results["ttt"]["targets"] == results["quantized"]["targets"] and results["ttt"]["whole_text"]
    toy_sizes = SIZES.keys() | SMALLER.keys() | {"EMA_DECAY", "TRAIN_SEQ_SCHEDULE", "TTT_SHORT_SCORE_FIRST_STEPS",
                                                 "DATA_PATH", "ARTIFACT_DIR", "RUN_ID"}
    if not LRZIP:
        toy_sizes |= {"COMPRESSOR"}
    ran, published = g.Settings(**run.record["settings"]), settings_of(recipe)
    assert {f.name for f in dataclasses.fields(ran) if f.name.upper() not in toy_sizes
            and getattr(ran, f.name) != getattr(published, f.name)} == set()


# --- Evidence that goes beyond "it makes a difference"


def gated_xsa_starts_switched_off(lab, recipe):
    assert same(lab.model(recipe, spare="xsa_alpha"), lab.model(recipe, spare="xsa_alpha", XSA_LAST_N=0))


def caps_stay_or_move(lab, recipe):
    s, seen = toy(recipe), lab.steps(recipe)
    assert [cap != s.logit_softcap for cap in seen.caps] == 2 * [s.softcap_lr > 0]


def pieces_grow_and_rates_rise_again(lab, recipe):
    seen, at_once = lab.steps(recipe), lab.steps(recipe, SEQ_CHANGE_WARMUP_STEPS=0)
    s, stages = seen.settings, [pair.split("@") for pair in seen.settings.train_seq_schedule.split(",")]
    lengths = [next(int(length) for length, end in stages if step / s.iterations <= float(end))
               for step in range(s.iterations)]
    assert lengths == sorted(lengths) and len(set(lengths)) == len(stages) == 3
    assert seen.pieces == lengths  # every batch has documents that are longer
    change, later = [step for step in range(1, s.iterations) if lengths[step] != lengths[step - 1]]
    for step in range(change, s.iterations):
        since = step - (later if step >= later else change)
        rise = min(1, (since + 1) / s.seq_change_warmup_steps)
        assert seen.factors[step] == pytest.approx(at_once.factors[step] * rise)
    assert seen.factors[:change] == at_once.factors[:change]
    moved, freely = (float((run.weights[change + 1] - run.weights[change]).norm()) for run in (seen, at_once))
    assert moved == pytest.approx(freely / s.seq_change_warmup_steps, rel=1e-3)
    run = lab.run(recipe)
    assert [event["tokens"] for event in events(run.record, "context")] == sorted(set(lengths))[1:]
    shapes = [shape[:2] for shape in events(run.record, "warmup")[0]["shapes"]]
    assert shapes == [[64, False], [128, False], [128, True], [192, True]]


def average_by_hand(lab, recipe):
    seen, decay = lab.steps(recipe), settings_of(recipe).ema_decay
    average = seen.weights[0].double()
    for weights in seen.weights[1:]:
        average = decay * average + (1 - decay) * weights.double()
    torch.testing.assert_close(seen.kept.double(), average, rtol=1e-5, atol=1e-6)
    assert not same(seen.kept, seen.weights[-1])


def gradients_exceed_the_clip(lab, recipe):
    assert max(lab.steps(recipe).norms) > settings_of(recipe).grad_clip_norm


def rates_fall_to_the_floor(lab, recipe):
    s = settings_of(recipe)
    seen = lab.steps(recipe, **dict(SEQ_CHANGE_WARMUP_STEPS=0) if s.seq_change_warmup_steps else {})
    shares = [(1 - step / len(seen.factors)) / s.warmdown_frac for step in range(len(seen.factors))]
    assert seen.factors == pytest.approx([min(1.0, max(share, s.min_lr)) for share in shares])
    assert seen.factors[0] == 1 and seen.factors[-1] == s.min_lr


def codes_make_good_of_each_other(lab, recipe, run=None):
    run = run or lab.run(recipe)
    published, s = settings_of(recipe), run.settings
    assert run.windows == [math.ceil(published.gptq_calibration_batches * (s.train_batch_tokens // 8) / s.calibration_len)]
    if s.step_rule == "loss":
        assert run.arrays["attn.c_q.column_scale"].std() > 0  # without Hessians all columns would be alike
        return
    weights, scales = run.trained["qo_bank"][:s.num_layers], run.arrays["attn.c_q.row_scale"].astype(np.float32)
    rounded = np.round(weights / scales[..., None])
    share = (rounded != run.arrays["attn.c_q.codes"]).mean()
    assert 0.05 < share < 0.95 and np.abs(rounded - run.arrays["attn.c_q.codes"]).max() < 8


def steps_by_hand(lab, recipe, run=None):
    run, s = run or lab.run(recipe), settings_of(recipe)
    roles, scales = g.matrix_roles(s), {name: a for name, a in run.arrays.items() if name.endswith(".row_scale")}
    assert run.table["quantization"]["step_rule"] == s.step_rule
    if s.step_rule == "loss":
        assert all(scales[f"{name}.row_scale"].dtype == np.int16 and f"{name}.column_scale" in run.arrays for name in roles)
        return
    assert all((run.arrays[f"{name}.column_scale"] == 1).all() for name in roles) != s.awq_lite_enabled
    n = run.settings.num_layers
    for name, bank, bits, clip in (("tok_emb", run.trained["tok_emb"][None], s.embed_bits, s.embed_clip_sigmas),
                                   ("attn.c_v", run.trained["kv_bank"][n:], s.matrix_bits, s.attn_clip_sigmas),
                                   ("attn.proj", run.trained["qo_bank"][n:], s.matrix_bits, s.attn_clip_sigmas),
                                   ("mlp.proj", run.trained["mlp_down_bank"], s.matrix_bits, s.mlp_clip_sigmas),
                                   ("mlp.fc", run.trained["mlp_up_bank"], s.matrix_bits, s.mlp_clip_sigmas)):
        expected = clip * bank.std(axis=2, ddof=1) / (2 ** (bits - 1) - 1)
        if name == "mlp.fc":
            expected = np.sort(expected)  # the hidden units are
        assert scales[f"{name}.row_scale"].dtype == np.float16
        np.testing.assert_allclose(scales[f"{name}.row_scale"].astype(np.float32), expected, rtol=2e-3)


def gates_are_int8(lab, recipe, run=None):
    run = run or lab.run(recipe)
    codes, scale = run.arrays["attn_gate.codes_by_row"], run.arrays["attn_gate.row_scale"]
    assert codes.dtype == np.int8 and np.abs(codes).max() == 127 and "attn_gate" not in run.arrays
    np.testing.assert_allclose(codes * scale.astype(np.float32)[..., None], run.trained["attn_gate"], atol=float(scale.max()))


def corrections_are_stored(lab, recipe, run=None):
    run, s = run or lab.run(recipe), settings_of(recipe)
    corrected = run.table["quantization"]["corrected"]
    assert len(corrected) == s.lqer_top_k == sum(name.endswith(".left") for name in run.arrays)
    for key in corrected:
        left, left_scale, right, right_scale = (run.arrays[f"{key}.{part}"] for part in g.LowRank._fields)
        assert left.shape[1] == right.shape[0] == s.lqer_rank and left.any() and right.any()
        assert left.min() >= -2 and left.max() <= 1 and right.min() >= -8 and right.max() <= 7
        assert left_scale.size == 1 and right_scale.size == right.size // s.lqer_asym_group


def finer_groups_are_stored(lab, recipe, run=None):
    run, s = run or lab.run(recipe), settings_of(recipe)
    scales = {name: a for name, a in run.arrays.items() if name.endswith(".column_scale")}
    spared = [name for name, a in scales.items() if (a < 1).any()]
    assert len(spared) == 1
    name = spared[0]
    role, columns = name.removesuffix(".column_scale"), np.argwhere(scales[name] < 1)
    assert len(columns) == s.awq_lite_group_size and s.awq_lite_group_top_k == 1
    layer, first = columns[0]
    assert (columns == [[layer, first + i] for i in range(len(columns))]).all() and first % len(columns) == 0
    bits = s.embed_bits if role == "tok_emb" else s.matrix_bits
    np.testing.assert_allclose(scales[name][layer, first], (2 ** (bits - 1) - 1) / (2 ** (s.awq_lite_bits - 1) - 1))
    codes = run.arrays[f"{role}.codes"]
    assert np.abs(codes[layer, :, first:first + len(columns)]).max() > np.abs(np.delete(codes, layer, 0)).max(initial=0)


def frame_is_of_its_compressor(lab, recipe, run=None):
    run, name, roles = run or lab.run(recipe), settings_of(recipe).compressor, g.matrix_roles(settings_of(recipe))
    if name == "pergroup" and not LRZIP:
        pytest.skip("needs the program lrzip")
    assert run.table["compressor"] == name == run.record["results"]["artifact"]["compressor"]
    assert len(run.streams) == dict(pergroup=1 + len(roles), brotli=1, entropy=2)[name]
    assert sum(stream.startswith(b"LRZI") for stream in run.streams) == len(roles) * (name == "pergroup")
    last = g.brotli.decompress(run.streams[-1])
    whole = sum(a.nbytes for a in run.arrays.values())
    assert len(last) == whole if name == "brotli" else len(last) < whole


def adapters_sit_where_they_should(lab, recipe):
    run, s = lab.run(recipe), settings_of(recipe)
    adapters, visits = lab.adapted(recipe).adapters, sum(map(len, run.model.orders[True]))
    assert set(adapters.sites) == {(site, visit) for site in sites(s) for visit in range(visits)} | {("head", 0)}
    sizes = [rows * run.settings.ttt_lora_rank for rows in adapters.sites.values()]
    parts = adapters.value[:, adapters.first_b:].split(sizes, dim=1)
    assert all(b.abs().max() > 0 for b in parts), "each of them has learned"


def chunks_follow_lengths(lab, recipe):
    s = settings_of(recipe)
    lengths = (254, 255, 256, 1998, 1999, 2000, 10000)  # two BOS more or less
    chunks = [s.first_chunk(length) for length in lengths]
    assert sorted(set(chunks)) == [16, 32, 64] and chunks == sorted(chunks)
    assert chunks[0] == 16 and chunks[-1] == 64


def phases_are_recorded(lab, recipe):
    s, phases = settings_of(recipe), lab.run(recipe).record["results"]["ttt"]["phases"]
    due = [s.phased_ttt_prefix_docs // 250 * (k + 1) // s.phased_ttt_num_phases
           for k in range(s.phased_ttt_num_phases)]
    assert len(phases) == s.phased_ttt_num_phases
    assert all(number <= phase["documents"] < 16 and phase["steps"] > 0 for number, phase in zip(due, phases))


def hints_are_recorded(lab, recipe):
    result = lab.run(recipe).record["results"]["ttt"]
    assert 0 < result["hints"] < result["targets"] and result["val_bpb"] != result["untilted_bpb"]
    assert result["hints_inside_timer"]


def targets_by_hand(lab, recipe):
    s, run = settings_of(recipe), lab.run(recipe)
    everything = len(np.fromfile(lab.folder / "data" / "fineweb_val_000000.bin", "<u2")) - 512 - 1
    whole = everything // run.settings.eval_seq_len * run.settings.eval_seq_len
    assert whole < everything
    assert run.record["results"]["ttt"]["targets"] == (everything if s.eval_include_tail else whole)
    assert run.record["results"]["quantized"]["targets"] == (everything if s.eval_include_tail else whole)


def order_is_recorded(lab, recipe):
    s = settings_of(recipe)
    assert lab.run(recipe).record["results"]["ttt"]["decodable"] == (s.ttt_order == "stream")
    lengths = np.diff(np.flatnonzero(lab.text == BOS), append=len(lab.text) - 1)
    first = next(g.ttt_schedule(lengths, lab.evaluation_settings(recipe))).document
    order = np.arange(len(lengths)) if s.ttt_order == "stream" else np.argsort(-lengths, kind="stable")
    assert first.tolist() == order[:8].tolist()


# --- Features


class Feature(NamedTuple):
    stage: str  # the method of Laboratory that shows it
    cell: Callable[[g.Settings], object]  # what the table says of it; False: the recipe does not have it
    without: Callable[[g.Settings], list[dict]]  # changes, each of which must make a difference at that stage
    evidence: Callable | None = None  # what else must hold, called with the laboratory and the recipe's name


def off(**changes) -> Callable[[g.Settings], list[dict]]:
    return lambda s: [{name: value} for name, value in changes.items()]


def sites(s: g.Settings) -> list[str]:
    return [site for sites in g.ADAPTER_SITES.values() for site in sites if getattr(s, f"ttt_{site}_lora")]


def stored(cell, evidence) -> Feature:
    return Feature("artifact", cell, off(), evidence)


def smear(s: g.Settings) -> str:
    return s.smear_gate_enabled and ("BOS-fixed" if s.smear_gate_bos_fix else "leaks")


def boost(s: g.Settings) -> str:
    if s.ngram_boost == "fixed":
        return s.ngram_tilt_enabled and f"{s.token_boost:g} from {s.token_threshold:g}"
    return s.ngram_tilt_enabled and s.ngram_boost


def without_boost(s: g.Settings) -> list[dict]:
    if s.ngram_boost == "fixed":
        return [dict(NGRAM_TILT_ENABLED=0), dict(TOKEN_BOOST=1), dict(TOKEN_THRESHOLD=0.3)]
    return [dict(NGRAM_TILT_ENABLED=0), dict(TOKEN_BACKOFF=""), dict(NGRAM_BOOST="fixed")]


def other_order(s: g.Settings) -> list[dict]:
    if s.ttt_short_score_first_enabled or (s.ngram_tilt_enabled and s.ngram_boost == "fixed"):
        return []  # these need the order that they have
    return [dict(TTT_ORDER="stream" if s.ttt_order == "length" else "length")]


def other_context(s: g.Settings) -> list[dict]:
    other = "cache" if s.ttt_context == "recompute" else "recompute"
    return [dict(TTT_EVAL_SEQ_LEN=32), dict(TTT_CONTEXT=other)]


def other_decay(s: g.Settings) -> list[dict]:
    return [dict(ADAM_WD_MODE="active" if s.adam_wd_mode == "zero" else "zero")]


FEATURES = {
    "leaky slope": Feature("model", lambda s: s.leaky_relu_sq_slope, off(LEAKY_RELU_SQ_SLOPE=0)),
    "XSA": Feature("model", lambda s: f"{s.xsa_last_n} blocks", off(XSA_LAST_N=0)),
    "gated XSA": Feature("model", lambda s: s.gated_xsa, off(GATED_XSA=0), gated_xsa_starts_switched_off),
    "two soft caps": Feature(
        "model", lambda s: s.asym_logit_rescale and ("trained" if s.softcap_lr else "fixed"),
        off(ASYM_LOGIT_RESCALE=0), caps_stay_or_move),
    "SmearGate": Feature(
        "model", smear,
        lambda s: [dict(SMEAR_GATE_ENABLED=0), dict(SMEAR_GATE_BOS_FIX=int(not s.smear_gate_bos_fix))]),
    "sparse head gate": Feature(
        "model", lambda s: s.sparse_attn_gate_enabled and f"scale {s.sparse_attn_gate_scale:g}",
        lambda s: [dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_QUANT_GATE=0),
                   dict(SPARSE_ATTN_GATE_SCALE=0.75)]),
    "QK gain": Feature("model", lambda s: s.qk_gain_init, off(QK_GAIN_INIT=1)),
    "looping": Feature(
        "model", lambda s: s.num_loops > 0 and f"{s.num_loops} x {s.loop_start}-{s.loop_end}",
        off(NUM_LOOPS=0)),
    "two lanes": Feature(
        "model", lambda s: s.parallel_start_layer > 0 and f"from {s.parallel_start_layer}",
        off(PARALLEL_START_LAYER=0)),
    "skip gates": Feature("model", lambda s: s.skip_gates_enabled, off(SKIP_GATES_ENABLED=0)),
    "LN scale": Feature("model", lambda s: s.ln_scale, off(LN_SCALE=0)),
    "context schedule": Feature(
        "training", lambda s: s.train_seq_schedule and f"3 stages, re-warm {s.seq_change_warmup_steps}",
        lambda s: [dict(TRAIN_SEQ_SCHEDULE="", SEQ_CHANGE_WARMUP_STEPS=0), dict(SEQ_CHANGE_WARMUP_STEPS=0)],
        pieces_grow_and_rates_rise_again),
    "scalar weight decay": Feature("training", lambda s: s.adam_wd > 0 and s.adam_wd_mode, other_decay),
    "EMA": Feature("training", lambda s: s.ema_decay, off(), average_by_hand),
    "gradient clip": Feature(
        "training", lambda s: s.grad_clip_norm, off(GRAD_CLIP_NORM=0), gradients_exceed_the_clip),
    "warm-down, floor": Feature(
        "training", lambda s: f"{s.warmdown_frac:g}, {s.min_lr:g}", off(WARMDOWN_FRAC=0),
        rates_fall_to_the_floor),
    "Adam beta2": Feature("training", lambda s: s.beta2, off(BETA2=0.9)),
    "row-normalized Muon": Feature("training", lambda s: s.muon_row_normalize, off(MUON_ROW_NORMALIZE=0)),
    "GPTQ": stored(lambda s: s.gptq_calibration_batches > 0 and f"{s.gptq_calibration_batches} batches",
                   codes_make_good_of_each_other),
    "quantization steps": stored(
        lambda s: "loss, trellis" if s.step_rule == "loss" else f"{s.matrix_bits}/{s.embed_bits} bits",
        steps_by_hand),
    "int8 gates": stored(lambda s: s.gated_attn_quant_gate, gates_are_int8),
    "LQER": stored(
        lambda s: s.lqer_enabled and f"top {s.lqer_top_k}, rank {s.lqer_rank}, {s.lqer_asym_group}",
        corrections_are_stored),
    "AWQ-lite": stored(lambda s: s.awq_lite_enabled and f"{s.awq_lite_group_top_k} at {s.awq_lite_bits} bits",
                       finer_groups_are_stored),
    "compressor": stored(lambda s: s.compressor, frame_is_of_its_compressor),
    "adapters on": Feature(
        "evaluation", lambda s: " ".join(sites(s)),
        lambda s: [{f"TTT_{site.upper()}_LORA": 0 for site in sites(s)}], adapters_sit_where_they_should),
    "adapter rank, alpha": Feature(
        "evaluation", lambda s: f"{s.ttt_lora_rank}, {s.ttt_lora_alpha:g}",
        off(TTT_LORA_RANK=1, TTT_LORA_ALPHA=1)),
    "A kept": Feature("evaluation", lambda s: s.ttt_warm_start_a, off(TTT_WARM_START_A=0)),
    "adapter rate": Feature(
        "evaluation", lambda s: f"{s.ttt_lora_lr * s.ttt_local_lr_mult:g}",
        lambda s: [dict(TTT_LORA_LR=0)] + ([dict(TTT_LOCAL_LR_MULT=1)] if s.ttt_local_lr_mult != 1 else [])),
    "adapter decay, beta2": Feature(
        "evaluation", lambda s: f"{s.ttt_weight_decay:g}, {s.ttt_beta2:g}",
        off(TTT_WEIGHT_DECAY=0, TTT_BETA2=0.9)),
    "chunk": Feature(
        "evaluation",
        lambda s: f"{s.ttt_chunk_size} to {s.ttt_chunk_max}" if s.ttt_chunk_growth else f"{s.ttt_chunk_size}",
        lambda s: [dict(TTT_CHUNK_SIZE=7)] + ([dict(TTT_CHUNK_GROWTH=0)] if s.ttt_chunk_growth else [])),
    "short chunks": Feature(
        "evaluation", lambda s: s.ttt_short_score_first_enabled and "16, 32",
        off(TTT_SHORT_SCORE_FIRST_ENABLED=0), chunks_follow_lengths),
    "context of a chunk": Feature(
        "evaluation", lambda s: f"{s.ttt_eval_seq_len} {s.ttt_context}", other_context),
    "order of documents": Feature("evaluation", lambda s: s.ttt_order, other_order, order_is_recorded),
    "global phases": Feature(
        "evaluation",
        lambda s: s.phased_ttt_prefix_docs > 0 and f"{s.phased_ttt_num_phases} by {s.phased_ttt_prefix_docs}",
        lambda s: [dict(PHASED_TTT_PREFIX_DOCS=0)] + (
            [dict(PHASED_TTT_NUM_PHASES=1)] if s.phased_ttt_num_phases > 1 else []),
        phases_are_recorded),
    "tilt": Feature("evaluation", boost, without_boost, hints_are_recorded),
    "tail of the text": Feature(
        "evaluation", lambda s: "scored" if s.eval_include_tail else "cut", off(), targets_by_hand),
}


def cell(feature: str, recipe: str) -> str:
    value = FEATURES[feature].cell(settings_of(recipe))
    return "yes" if value is True else str(value) if value else "-"


def slug(feature: str) -> str:
    return re.sub(r"\W+", "_", feature)


CELLS = [(recipe, feature) for recipe in RECIPES for feature in FEATURES if cell(feature, recipe) != "-"]


@pytest.mark.parametrize("recipe, feature", CELLS,
                         ids=[f"{recipe}-{slug(feature)}" for recipe, feature in CELLS])
def test_feature_is_on(recipe, feature, lab):
    stage, _, without, evidence = FEATURES[feature]
    for changes in without(settings_of(recipe)):
        measure = getattr(lab, stage)
        assert not same(measure(recipe), measure(recipe, **changes)), f"{changes} changes nothing"
    assert evidence or without(settings_of(recipe))
    if evidence:
        evidence(lab, recipe)


# --- Each helper notices when nothing happens


@pytest.mark.parametrize("stage, changes", [
    ("model", dict(LEAKY_RELU_SQ_SLOPE=0)), ("training", dict(GRAD_CLIP_NORM=0)),
    ("evaluation", dict(TTT_WARM_START_A=0))])
def test_what_is_off_on_both_sides_makes_no_difference(stage, changes, lab):
    measured, known = getattr(lab, stage)("pr2140", **changes), lab.results
    assert not same(measured, getattr(lab, stage)("pr2140"))
    # Measure all but the runs again.
    lab.results = {key: result for key, result in known.items() if key[0] == "run"}
    assert same(measured, getattr(lab, stage)("pr2140", **changes))
    lab.results = known


WITHOUT = dict(GPTQ_CALIBRATION_BATCHES=0, MATRIX_BITS=5, GATED_ATTN_QUANT_GATE=0, LQER_ENABLED=0, AWQ_LITE_ENABLED=0,
               COMPRESSOR="brotli")


@pytest.mark.parametrize("feature", [name for name, f in FEATURES.items() if f.stage == "artifact"])
def test_an_artifact_without_the_feature_does_not_pass_for_one(feature, lab):
    lab.run("pr2140")
    with pytest.raises((AssertionError, KeyError)):
        FEATURES[feature].evidence(lab, "pr2140", lab.run("pr2140", **WITHOUT))


# --- The table of docs/recipes.md


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def features_table() -> str:
    """What each recipe has, and the test that shows it."""
    rows = [[name, *(cell(name, recipe) for recipe in RECIPES), f"`{slug(name)}`"] for name in FEATURES]
    return table(["feature", *RECIPES, "test_feature_is_on[recipe-...]"], rows)


def with_table(text: str) -> str:
    """docs/recipes.md with today's table in place of the one that it has."""
    today = features_table()
    text, count = re.subn(r"^\| feature \|.*\n(\|.*\n)+", lambda _: today, text, flags=re.M)
    assert count == 1, f"docs/recipes.md has {count} tables of features"
    return text


def test_recipes_page_has_the_table_of_today():
    text = PAGE.read_text()
    assert text == with_table(text), "python -m tests.test_recipes writes it"


def test_help_groups_settings():
    groups = fields_by_group(g.Settings)
    lines = g.settings_help(g.Settings).splitlines()
    assert [line for line in lines if line in groups] == list(groups)


# --- tools/diff_recipes.py


def test_diff_prints_what_two_recipes_differ_in(capsys):
    assert diff_recipes.main(["pr2135", "pr2140"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["pr2135", "pr2140"]
    one, other, expected = settings_of("pr2135"), settings_of("pr2140"), {}
    for group, fields in fields_by_group(g.Settings).items():
        for f in fields:
            values = [setting_text(getattr(side, f.name)) or "(empty)" for side in (one, other)]
            if values[0] != values[1]:
                expected.setdefault(group, []).append([f.name.upper(), *values])
    printed = {}
    for line in filter(None, lines):
        if line.startswith("  "):
            list(printed.values())[-1].append(line.split())
        else:
            printed[line] = []
    assert printed == expected and list(printed) == list(expected) and len(expected) > 5


def test_diff_of_a_recipe_with_itself_and_of_an_unknown_one(capsys):
    assert diff_recipes.main(["pr2135", "pr2135"]) == 0 and "no difference" in capsys.readouterr().out
    assert diff_recipes.main(["pr2135", "pr1"]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "pr1.env" in err


@pytest.mark.parametrize("content, word", [
    (b"\xff\xfe\x00", "NAME=value"), (b"just words\n", ":1: cannot read"), (b"MATRIX_LR=fast\n", ":1: MATRIX_LR"),
    (b"SEEED=1\n", ":1: SEEED: no such setting; the nearest is SEED"), (b"NUM_LAYERS=3\nNUM_LOOPS=0\nXSA_LAST_N=3\n", "PARALLEL_START_LAYER")])
def test_a_file_that_is_no_recipe_is_named(content, word, tmp_path, capsys):
    (tmp_path / "mine.env").write_bytes(content)
    assert diff_recipes.main(["record", str(tmp_path / "mine.env")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "mine.env:" in line and word in line


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
