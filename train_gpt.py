"""Parameter Golf in one file: train a 36M-parameter language model for ten minutes, save it under 16,000,000 bytes,
score it in bits per byte.

What is notable about the model (every part can be switched by a setting, see `python train_gpt.py --help`):

- 11 layers of width 512 whose middle layers 3..5 are visited three times once training is 35 % done
- U-Net skips from the first half of the visits to the second, blended by learned gates
- the last three layers run on two lanes: attention reads one, the MLP the other, learned scalars mix both
- exclusive self-attention (XSA): each head's output loses its component along the token's own value vector
- per-head output gates, RMSNorm on queries and keys, learned query gain, rotary embedding on 16 of 64 dimensions
- leaky ReLU squared MLP, tied embedding, tanh softcap on the logits, SmearGate on the embeddings
- Muon with Polar Express coefficients on weight banks dealt out to the ranks, AdamW on everything else
- documents packed without padding: attention never crosses a document border

Launch: SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py (or plain `python train_gpt.py` on one device).
"""
from __future__ import annotations

import dataclasses
import datetime
import difflib
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import re
import signal
import struct
import sys
import textwrap
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import brotli
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ======================================================================================================================
# 1. Settings
# ======================================================================================================================


class InputError(Exception):
    """Something the user gave is wrong: each line of the message names the variable or file and the remedy (exit 2)."""


def setting(group, default, text, *, unit="", low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, choices=()):
    """One environment variable: the field's name in upper case, parsed to the type of its default.

    low, high: inclusive bounds; above, below: exclusive ones; choices: the accepted strings.
    """
    return dataclasses.field(default=default, metadata=dict(
        group=group, text=text, unit=unit, low=low, high=high, above=above, below=below, choices=choices))


CASEOPS_NAME = "lossless_caps_caseops_v1_reserved"
BOS_ID = 1  # first token of every document, in every shard format this project knows

# Variables of earlier published systems that must not be set: a knob that nothing reads would be a false record.
REFUSED_SETTINGS = {
    "ROPE_TRAIN_SEQ_LEN": "no published system used it; positions count from the start of each segment",
    "ROPE_YARN": "it scaled by the length of the packed buffer, not of the document; leave it unset",
    "MATRIX_CLIP_SIGMAS": "no tensor falls into its class; use ATTN_CLIP_SIGMAS, MLP_CLIP_SIGMAS, EMBED_CLIP_SIGMAS",
    "TIE_EMBEDDINGS": "the output head is always the embedding; the untied head of earlier systems was never trained",
    "EMBED_LR": "it belonged to the untied embedding; use TIED_EMBED_LR",
    "CONTROL_TENSOR_NAME_PATTERNS": "parameter groups follow from the model, not from name fragments",
}

# Parts of the published systems that are not built yet. To ignore their variables would be a false record too.
MISSING_PREFIXES = ("LQER_", "AWQ_LITE_", "OPTROT_", "COMPRESSOR", "PERGROUP_", "PHASED_TTT_", "GLOBAL_TTT_", "NGRAM_",
                    "TOKEN_ORDER", "TOKEN_THRESHOLD", "TOKEN_BOOST", "WITHIN_TAU", "WITHIN_BOOST", "WORD_ORDER",
                    "WORD_NORMALIZE", "WORD_TAU", "WORD_BOOST", "AGREE_ADD_BOOST", "TEMPERATURE_SCALE", "SKYLIGHT_",
                    "BETA2_NORMUON", "UW_FLOOR", "MIDRUN_CAP_", "COMPILE_SHAPE_", "SEQ_CHANGE_", "FUSED_CE_", "QUANTIZE_ONLY")

# First words of our names under which other programs keep variables too; there only a near miss counts as misspelt.
SHARED_PREFIXES = {"DATA_", "RUN_", "MAX_", "NUM_", "MODEL_", "LOCAL_", "WORLD_", "VOCAB_", "TOKENIZER_", "ARTIFACT_",
                   "PARALLEL_", "SKIP_", "MIN_", "ENABLE_", "FORCE_"}


@dataclass(frozen=True)
class Settings:
    """Everything a run can be told. Defaults are those of the record run."""

    # --- Data
    data_dir: str = setting("Data", "./data", "folder under which the default DATA_PATH and TOKENIZER_PATH lie")
    data_path: str = setting("Data", "", "folder with the fineweb_{train,val,val_bytes}_*.bin shards; empty: the "
                             "published CaseOps set under DATA_DIR")
    tokenizer_path: str = setting("Data", "", "SentencePiece model, read only when CASEOPS_ENABLED=0; empty: the "
                                  "published one under DATA_DIR")
    caseops_enabled: bool = setting("Data", True, "1: bytes per token from the val_bytes sidecar; 0: from the "
                                    "tokenizer's pieces")
    vocab_size: int = setting("Data", 8192, "token ids, rows of the embedding", unit="tokens", low=2, high=65536)
    train_batch_tokens: int = setting("Data", 786432, "one optimizer step over all ranks", unit="tokens", low=1)
    grad_accum_steps: int = setting("Data", 0, "micro-batches per rank and step; 0: so many that ranks x micro-batches "
                                    "is at least 8 and divides the batch", low=0)
    eval_include_tail: bool = setting("Data", True, "1: score every validation token; 0: cut the stream to whole "
                                      "EVAL_SEQ_LEN windows, as #2135 and its ancestors did")

    # --- Run
    seed: int = setting("Run", 1337, "seed of the initial weights; the order of the data is fixed", low=0)
    run_id: str = setting("Run", "", "names the log and the run record; empty: date, time and process id")
    artifact_dir: str = setting("Run", "", "folder for log, record and artifact; empty: the working folder, with log "
                                "and record under logs/")
    iterations: int = setting("Run", 20000, "most optimizer steps; measures progress when there is no time cap",
                              unit="steps", low=1)
    max_wallclock_seconds: float = setting("Run", 600.0, "training time; 0: no cap", unit="s", low=0)
    force_stop_step: int = setting("Run", 0, "stop after this step, with every schedule as if training went on; 0: never",
                                   unit="steps", low=0)
    train_log_every: int = setting("Run", 500, "steps between loss lines after the first five; 0: none", unit="steps",
                                   low=0)
    val_loss_every: int = setting("Run", 0, "steps between validations while training (the clock stops); 0: none",
                                  unit="steps", low=0)
    ttt_eval_only: bool = setting("Run", False, "1: no training; load the saved artifact and score it")
    prequant_only: bool = setting("Run", False, "1: stop after the evaluation of the averaged weights")
    rank: int = setting("Run", -1, "set by torchrun", low=-1)
    local_rank: int = setting("Run", 0, "set by torchrun: index of this rank's device", low=0)
    world_size: int = setting("Run", 1, "set by torchrun", low=1)

    # --- Model
    num_layers: int = setting("Model", 11, "distinct transformer blocks", low=1)
    model_dim: int = setting("Model", 512, "width of the residual stream", low=1)
    num_heads: int = setting("Model", 8, "query heads", low=1)
    num_kv_heads: int = setting("Model", 4, "key/value heads", low=1)
    mlp_mult: float = setting("Model", 4.0, "MLP hidden width over MODEL_DIM", above=0)
    leaky_relu_sq_slope: float = setting("Model", 0.5, "negative-side slope s of the MLP activation: x^2 above 0, "
                                         "(s x)^2 below", low=0, high=1)
    xsa_last_n: int = setting("Model", 11, "how many of the last blocks use exclusive self-attention", low=0)
    logit_softcap: float = setting("Model", 30.0, "logits become c tanh(logits / c)", above=0)
    asym_logit_rescale: bool = setting("Model", True, "1: separate caps for positive and negative logits, starting at "
                                       "LOGIT_SOFTCAP, in training and evaluation alike")
    tied_embed_init_std: float = setting("Model", 0.005, "standard deviation of the initial embedding", above=0)
    rope_base: float = setting("Model", 10000.0, "base of the rotary frequencies", above=1)
    rope_dims: int = setting("Model", 16, "leading dimensions of each head that are rotated; 0: all", low=0)
    ln_scale: bool = setting("Model", True, "1: scale a block's normalized inputs by 1/sqrt(block index + 1)")
    qk_gain_init: float = setting("Model", 5.0, "initial learned gain on each head's normalized queries", above=0)
    num_loops: int = setting("Model", 2, "extra visits of blocks LOOP_START..LOOP_END; 0: no looping", low=0)
    loop_start: int = setting("Model", 3, "first looped block", low=0)
    loop_end: int = setting("Model", 5, "last looped block", low=0)
    parallel_start_layer: int = setting("Model", 8, "from this block on the decoder runs on two lanes; 0: never", low=0)
    parallel_final_lane: str = setting("Model", "mean", "what leaves the two lanes", choices=("mean", "attn", "mlp"))

    # --- Gates
    skip_gates_enabled: bool = setting("Gates", True, "1: blend U-Net skips by a learned gate; 0: add them")
    smear_gate_enabled: bool = setting("Gates", True, "1: mix a gated share of the previous token's embedding in")
    smear_gate_bos_fix: bool = setting("Gates", True, "1: no smear into a document's first token; 0: the leak between "
                                       "documents with which #2135 was published")
    gate_window: int = setting("Gates", 12, "leading channels that drive the small gates", low=1)
    sparse_attn_gate_enabled: bool = setting("Gates", True, "1: head gate sigmoid(scale * W x) from GATE_WINDOW channels")
    sparse_attn_gate_init_std: float = setting("Gates", 0.0, "standard deviation of its initial weights", low=0)
    sparse_attn_gate_scale: float = setting("Gates", 0.5, "the factor inside that sigmoid", above=0)
    gated_attn_enabled: bool = setting("Gates", False, "1: head gate sigmoid(W x) from all channels")
    gated_attn_init_std: float = setting("Gates", 0.01, "standard deviation of its initial weights", low=0)
    attn_out_gate_enabled: bool = setting("Gates", False, "1: head gate 2 sigmoid(W x) from GATE_WINDOW channels")
    attn_out_gate_src: str = setting("Gates", "proj", "its input: the block input or the raw query projection",
                                     choices=("proj", "q"))
    gated_xsa: bool = setting("Gates", False, "1: scale XSA by a learned tanh(alpha) per head that starts at 0; 0: by 1")

    # --- Optimizer
    matrix_lr: float = setting("Optimizer", 0.028, "Muon learning rate of the weight banks", low=0)
    scalar_lr: float = setting("Optimizer", 0.02, "AdamW learning rate of vectors, scalars and gates", low=0)
    tied_embed_lr: float = setting("Optimizer", 0.03, "AdamW learning rate of the embedding", low=0)
    softcap_lr: float = setting("Optimizer", 0.02, "AdamW learning rate of the two caps of ASYM_LOGIT_RESCALE; 0: frozen "
                                "at LOGIT_SOFTCAP, as in every published system", low=0)
    muon_momentum: float = setting("Optimizer", 0.97, "final Nesterov momentum of Muon", low=0, below=1)
    muon_backend_steps: int = setting("Optimizer", 5, "Newton-Schulz iterations", low=1, high=5)
    muon_row_normalize: bool = setting("Optimizer", True, "1: unit rows before Newton-Schulz")
    muon_wd: float = setting("Optimizer", 0.095, "decoupled weight decay of the banks", low=0)
    beta1: float = setting("Optimizer", 0.9, "AdamW first-moment coefficient", low=0, below=1)
    beta2: float = setting("Optimizer", 0.99, "AdamW second-moment coefficient", low=0, below=1)
    adam_eps: float = setting("Optimizer", 1e-8, "AdamW epsilon", above=0)
    adam_wd: float = setting("Optimizer", 0.02, "weight decay of vectors, scalars and gates", low=0)
    adam_wd_mode: str = setting("Optimizer", "active", "what that decay does: active: pulls toward zero what has received "
                                "gradient; init: pulls all toward the initial value; zero: pulls all toward zero, also what "
                                "idles until looping starts, as the published systems did", choices=("active", "init", "zero"))
    embed_wd: float = setting("Optimizer", 0.085, "weight decay of the embedding", low=0)
    grad_clip_norm: float = setting("Optimizer", 0.3, "bound on the global norm of the averaged gradient; 0: none", low=0)
    ema_decay: float = setting("Optimizer", 0.9965, "decay per step of the weight average that is kept; 0: the last "
                               "weights themselves", low=0, below=1)

    # --- Schedule (progress = training time / cap, or steps / ITERATIONS without a cap)
    train_seq_len: int = setting("Schedule", 2048, "documents are cut into pieces of at most this length", unit="tokens",
                                 low=1)
    warmup_steps: int = setting("Schedule", 3, "throw-away steps that compile everything before the clock starts",
                                unit="steps", low=0)
    lr_warmup_steps: int = setting("Schedule", 0, "steps over which every learning rate rises linearly; 0: full rate "
                                   "from the first step", unit="steps", low=0)
    warmdown_frac: float = setting("Schedule", 0.85, "last fraction of progress over which learning rates fall", low=0,
                                   high=1)
    min_lr: float = setting("Schedule", 0.1, "floor of the learning-rate multiplier", low=0, high=1)
    enable_looping_at: float = setting("Schedule", 0.35, "progress at which looping starts", low=0, high=1)
    muon_momentum_warmup_start: float = setting("Schedule", 0.92, "Muon momentum of the first step", low=0, below=1)
    muon_momentum_warmup_steps: int = setting("Schedule", 1500, "steps until MUON_MOMENTUM is reached", unit="steps",
                                              low=0)
    gptq_reserve_seconds: float = setting("Schedule", 0.5, "taken off MAX_WALLCLOCK_SECONDS for what follows training",
                                          unit="s", low=0)

    # --- Artifact
    matrix_bits: int = setting("Artifact", 6, "bits of attention and MLP matrices", unit="bits", low=2, high=8)
    embed_bits: int = setting("Artifact", 7, "bits of the embedding", unit="bits", low=2, high=8)
    attn_clip_sigmas: float = setting("Artifact", 13.0, "clip of attention matrices, in deviations of the row", above=0)
    mlp_clip_sigmas: float = setting("Artifact", 11.5, "clip of MLP matrices, in deviations of the row", above=0)
    embed_clip_sigmas: float = setting("Artifact", 14.0, "clip of the embedding, in deviations of the row", above=0)

    # --- Evaluation
    eval_seq_len: int = setting("Evaluation", 2560, "longest context of plain evaluation", unit="tokens", low=1)
    eval_stride: int = setting("Evaluation", 0, "0: disjoint windows; else windows advance by this many tokens and score "
                               "only what is new, so every token past the first window sees at least EVAL_SEQ_LEN - "
                               "EVAL_STRIDE tokens of context", unit="tokens", low=0)
    val_batch_tokens: int = setting("Evaluation", 524288, "one eighth of it is one packed batch of plain evaluation",
                                    unit="tokens", low=8)

    @classmethod
    def from_environment(cls, environ) -> Settings:
        """Read every setting from the mapping `environ`; raises InputError with all problems at once, a line each."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        problems = [f"{name}: {why}" for name, why in REFUSED_SETTINGS.items() if name in environ]
        values = {}
        for name, field in fields.items():
            if name in environ:
                try:
                    values[field.name] = parse_setting(name, environ[name], field)
                except InputError as error:
                    problems.append(str(error))
        ours = tuple({"_".join(name.split("_")[:k]) + "_" for name in fields for k in (1, 2) if name.count("_") >= k}
                     - SHARED_PREFIXES)
        for name in sorted(environ.keys() - fields.keys() - REFUSED_SETTINGS.keys()):
            if name.startswith(MISSING_PREFIXES):
                problems.append(f"{name}: this version has no such part yet; unset it")
                continue
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0 if name.startswith(ours) else 0.9)
            if nearest:
                problems.append(f"{name}: no such setting; the nearest is {nearest[0]}")
        settings = cls(**values)
        problems += settings.conflicts()
        if problems:
            raise InputError("\n".join(problems))
        return settings

    def conflicts(self) -> list[str]:
        """Settings that do not go together, a line each."""
        s, found = self, []

        def require(condition, line):
            if not condition:
                found.append(line)

        require(s.world_size == 1 or s.rank >= 0, "WORLD_SIZE: it is above 1 but RANK is not set; launch with torchrun")
        require(s.rank < s.world_size, f"RANK: {s.rank} is not below WORLD_SIZE={s.world_size}; launch with torchrun")
        require(re.fullmatch(r"[\w.-]*", s.run_id), f"RUN_ID: {s.run_id!r} names files; use letters, digits and ._- alone")
        require(not (s.ttt_eval_only and s.prequant_only), "PREQUANT_ONLY: it has no meaning with TTT_EVAL_ONLY=1")
        require(s.model_dim % s.num_heads == 0, f"NUM_HEADS: {s.num_heads} does not divide MODEL_DIM={s.model_dim}")
        require(s.num_heads % s.num_kv_heads == 0,
                f"NUM_KV_HEADS: {s.num_kv_heads} does not divide NUM_HEADS={s.num_heads}")
        require(s.rotary_dims % 2 == 0 and s.rotary_dims <= s.head_dim,
                f"ROPE_DIMS: {s.rotary_dims} must be even and at most the head width {s.head_dim}")
        require(float(s.model_dim * s.mlp_mult).is_integer(),
                f"MLP_MULT: {s.mlp_mult} x MODEL_DIM={s.model_dim} is not a whole width")
        require(s.gate_window <= s.model_dim, f"GATE_WINDOW: {s.gate_window} is above MODEL_DIM={s.model_dim}")
        require(s.xsa_last_n <= s.num_layers, f"XSA_LAST_N: {s.xsa_last_n} is above NUM_LAYERS={s.num_layers}")
        gates = [n for n in ("sparse_attn_gate_enabled", "gated_attn_enabled", "attn_out_gate_enabled") if getattr(s, n)]
        require(len(gates) <= 1, f"{' and '.join(g.upper() for g in gates)}: at most one head gate can be on")
        if s.num_loops:
            require(s.loop_start <= s.loop_end < s.num_layers,
                    f"LOOP_START, LOOP_END: {s.loop_start}..{s.loop_end} is not a range of {s.num_layers} blocks")
        first_lane = 1 + max([-1, *visit_order(s, False)[0], *visit_order(s, s.num_loops > 0)[0],
                              s.loop_end if s.num_loops else -1])
        require(not s.parallel_start_layer or s.parallel_start_layer >= first_lane,
                f"PARALLEL_START_LAYER: {s.parallel_start_layer} must lie behind encoder and LOOP_END, from {first_lane} on")
        require(s.parallel_start_layer < s.num_layers,
                f"PARALLEL_START_LAYER: {s.parallel_start_layer} is not below NUM_LAYERS={s.num_layers}")
        require(s.accumulation, f"TRAIN_BATCH_TOKENS: {s.train_batch_tokens} does not split evenly over WORLD_SIZE="
                f"{s.world_size} ranks x {s.grad_accum_steps or 'any number up to 64 of'} micro-batches (GRAD_ACCUM_STEPS)")
        require(s.max_wallclock_seconds == 0 or s.max_wallclock_seconds > s.gptq_reserve_seconds,
                f"GPTQ_RESERVE_SECONDS: {s.gptq_reserve_seconds} leaves nothing of MAX_WALLCLOCK_SECONDS="
                f"{s.max_wallclock_seconds}")
        require(s.eval_batch_tokens >= s.eval_seq_len,
                f"VAL_BATCH_TOKENS: one eighth of {s.val_batch_tokens} is below EVAL_SEQ_LEN={s.eval_seq_len}")
        require(s.eval_stride <= s.eval_seq_len, f"EVAL_STRIDE: {s.eval_stride} is above EVAL_SEQ_LEN={s.eval_seq_len}")
        return found

    # Derived values; none of them is a setting of its own.
    head_dim = property(lambda s: s.model_dim // s.num_heads)
    kv_dim = property(lambda s: s.num_kv_heads * s.head_dim)
    mlp_dim = property(lambda s: int(s.model_dim * s.mlp_mult))
    rotary_dims = property(lambda s: s.rope_dims or s.head_dim)
    eval_batch_tokens = property(lambda s: s.val_batch_tokens // 8)
    loops_at_end = property(lambda s: s.num_loops > 0 and s.enable_looping_at < 1)
    train_seconds = property(lambda s: s.max_wallclock_seconds - s.gptq_reserve_seconds if s.max_wallclock_seconds else 0)
    shards_dir = property(lambda s: s.data_path or os.path.join(
        s.data_dir, "datasets/fineweb10B_sp8192_caseops/datasets/datasets", f"fineweb10B_sp8192_{CASEOPS_NAME}"))
    tokenizer_file = property(lambda s: s.tokenizer_path or os.path.join(
        s.data_dir, "datasets/fineweb10B_sp8192_caseops/datasets/tokenizers", f"fineweb_8192_bpe_{CASEOPS_NAME}.model"))
    log_dir = property(lambda s: s.artifact_dir or "logs")
    artifact_path = property(lambda s: os.path.join(s.artifact_dir, "final_model.int6.ptz"))

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step, 0 if none fits. The published systems fix ranks x micro-batches at 8."""
        candidates = [self.grad_accum_steps] if self.grad_accum_steps else range(-(-8 // self.world_size), 65)
        return next((a for a in candidates if self.train_batch_tokens % (self.world_size * a) == 0), 0)

    @property
    def micro_batch_tokens(self) -> int:
        return self.train_batch_tokens // (self.world_size * self.accumulation)

    def function_settings(self) -> dict:
        """The settings that change what function a set of weights computes; they travel in the artifact."""
        free = {"tied_embed_init_std", "qk_gain_init", "sparse_attn_gate_init_std", "gated_attn_init_std"}
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.metadata["group"] in ("Model", "Gates") and f.name not in free}
        return chosen | {"vocab_size": self.vocab_size}


def parse_setting(name: str, text: str, field: dataclasses.Field):
    """The value of one variable, or InputError with one line that says what would be accepted."""
    kind, rule = type(field.default), field.metadata
    if kind is bool:
        if text not in ("0", "1"):
            raise InputError(f"{name}: {text!r} is neither 0 nor 1")
        return text == "1"
    if kind is str:
        if rule["choices"] and text not in rule["choices"]:
            raise InputError(f"{name}: {text!r} is none of {', '.join(rule['choices'])}")
        return text
    try:
        value = kind(text)
        if "_" in text:  # Python's digit groups are no notation for a command line
            raise ValueError
    except ValueError:
        raise InputError(f"{name}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    if not (math.isfinite(value) and rule["low"] <= value <= rule["high"] and rule["above"] < value < rule["below"]):
        raise InputError(f"{name}: {text} is out of range ({describe_range(rule)})")
    return value


def describe_range(rule) -> str:
    if rule["choices"]:
        return "|".join(rule["choices"])
    lower = f"> {rule['above']:g}" if rule["above"] > -math.inf else f">= {rule['low']:g}" if rule["low"] > -math.inf else ""
    upper = f"< {rule['below']:g}" if rule["below"] < math.inf else f"<= {rule['high']:g}" if rule["high"] < math.inf else ""
    return ", ".join(filter(None, (lower, upper)))


def visit_order(s: Settings, looping: bool) -> tuple[list[int], list[int]]:
    """The blocks in the order in which encoder and decoder visit them."""
    order = list(range(s.num_layers))
    if looping:
        order[s.loop_start:s.loop_end + 1] *= s.num_loops + 1
    return order[:len(order) // 2], order[len(order) // 2:]


def settings_help() -> str:
    """Every setting with default, unit, range and meaning, grouped as they are declared."""
    lines = [__doc__.strip(), "", "Settings are environment variables.", "  --help   this text",
             "  --check  validate settings and data, then stop"]
    for group, fields in itertools.groupby(dataclasses.fields(Settings), key=lambda f: f.metadata["group"]):
        lines += ["", group]
        for f in fields:
            default = int(f.default) if isinstance(f.default, bool) else f.default
            limits = "0|1" if isinstance(f.default, bool) else describe_range(f.metadata)
            facts = "; ".join(filter(None, (f"default {default}" if default != "" else "default empty",
                                            f.metadata["unit"], limits)))
            lines += [f"  {f.name.upper()}  ({facts})"] + textwrap.wrap(
                f.metadata["text"], 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


# ======================================================================================================================
# 2. Runtime
# ======================================================================================================================


# torch 2.13 wants reduce_scatter_tensor and all_gather_into_tensor under new names, which 2.11 does not have.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its rank among how many, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextmanager
    def start(cls, settings: Settings):
        """Join torchrun's process group (NCCL for CUDA tensors, Gloo for host tensors) and leave it at the end."""
        on_cuda = torch.cuda.is_available()
        device = torch.device("cuda", settings.local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            if settings.local_rank >= torch.cuda.device_count():
                raise InputError(f"LOCAL_RANK: rank {settings.local_rank} has no GPU, the machine shows "
                                 f"{torch.cuda.device_count()}; lower --nproc_per_node")
            torch.cuda.set_device(device)
        distributed = settings.world_size > 1
        if distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                                    timeout=datetime.timedelta(minutes=10), device_id=device if on_cuda else None)
        try:
            yield cls(max(settings.rank, 0), settings.world_size, device)
        finally:
            if distributed and dist.is_initialized():
                dist.destroy_process_group()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_cuda else torch.float32

    def compile(self, function, **options):
        """torch.compile on CUDA, the function itself on the CPU."""
        if not self.on_cuda:
            return function
        torch._dynamo.config.recompile_limit = 64  # a part is compiled per shape, dtype and kind of layer
        return torch.compile(function, dynamic=False, **options)

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_rank0(self, values: list[float]) -> list[float]:
        """Rank 0's numbers on every rank. They travel between hosts, so no device is waited for."""
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, src=0)
        return message.tolist()

    @torch.no_grad()
    def share(self, tensors) -> None:
        """Give every rank the values of rank 0's tensors, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def upload(self, values: list[float]) -> Tensor:
        """A few float32 numbers as a device tensor, copied without waiting for the device."""
        host = torch.tensor(values, dtype=torch.float32)
        return host.pin_memory().to(self.device, non_blocking=True) if self.on_cuda else host

    def describe(self) -> dict:
        device = torch.cuda.get_device_name(self.device) if self.on_cuda else f"{platform.machine()} CPU"
        return dict(device=device, devices=self.world_size, host_cores=os.cpu_count(), python=platform.python_version(),
                    torch=torch.__version__, cuda=torch.version.cuda or "none")


def write_atomically(path: str, data: bytes) -> None:
    """`path` holds either what it held before or all of `data`, whatever happens on the way."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


class RunLog:
    """The log and the run record, from one place: a log line is the text form of an event in the record.

    Rank 0 writes `<run_id>.txt` and `<run_id>.json` in Settings.log_dir; the other ranks' calls do nothing. The record's
    `status` is running, finished or failed.
    """

    def __init__(self, settings: Settings, runtime: Runtime):
        run_id = settings.run_id or f"{datetime.datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}"
        self.active = runtime.rank == 0
        self.path = os.path.join(settings.log_dir, run_id)
        if self.active and os.path.exists(self.path + ".json"):
            raise InputError(f"RUN_ID: {self.path}.json is the record of an earlier run; choose another RUN_ID or remove it")
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.record = dict(run_id=run_id, status="running", started=started,
                           settings=dataclasses.asdict(settings), machine=runtime.describe(), results={}, events=[])
        if self.active:
            os.makedirs(settings.log_dir, exist_ok=True)
            if not os.access(os.path.dirname(settings.artifact_path) or ".", os.W_OK):
                raise InputError(f"ARTIFACT_DIR: no permission to write {settings.artifact_path}; choose another folder")
            self.file = open(self.path + ".txt", "w", buffering=1, encoding="utf-8")
            self.save()

    def event(self, kind: str, **fields) -> None:
        """Log and record one event; floats appear in both as they are given here, NaN as text, which JSON lacks."""
        if self.active:
            fields = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
            self.record["events"].append({"event": kind, **fields})
            self.write(" ".join([kind] + [f"{name}:{value}" for name, value in fields.items()]))

    def result(self, kind: str, **fields) -> None:
        """An event whose fields are also figures of the run: results[kind]."""
        self.record["results"][kind] = fields
        self.event(kind, **fields)
        self.save()

    def write(self, text: str) -> None:
        if self.active:
            self.file.write(text + "\n")
            print(text, flush=True)

    def save(self) -> None:
        if self.active:
            write_atomically(self.path + ".json", (json.dumps(self.record, indent=1) + "\n").encode())

    def close(self, status: str, **fields) -> None:
        self.record["status"] = status
        self.event(status, **fields)
        self.save()
        if self.active:
            self.file.close()


# ======================================================================================================================
# 3. Data
# ======================================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: str) -> np.ndarray:
    """The uint16 values of one shard, memory-mapped. Raises InputError when header and size disagree."""
    try:
        header = np.fromfile(path, dtype="<i4", count=3)
        size = os.path.getsize(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the data again") from None
    if len(header) < 3 or header[2] < 1 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path}: not a token shard (wrong magic or version, or empty); use prepare_caseops_data.py")
    if size != SHARD_HEADER_BYTES + 2 * int(header[2]):
        raise InputError(f"{path}: its header promises {header[2]} values but it has {size} bytes; it is truncated, "
                         "prepare or download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(int(header[2]),))


def shard_files(folder: str, kind: str) -> list[str]:
    """The shards `fineweb_<kind>_<number>.bin` of a folder, in order; InputError when there is none."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), f"fineweb_{kind}_[0-9]*.bin")))
    if not files:
        raise InputError(f"DATA_PATH: no fineweb_{kind}_*.bin in {folder}; run prepare_caseops_data.py or set DATA_PATH")
    return files


def check_manifest(settings: Settings) -> dict:
    """Compare the settings with the data set's manifest.json, if it has one; returns what the log should say of it."""
    path = os.path.join(settings.shards_dir, "manifest.json")
    if not os.path.exists(path):
        return dict(manifest="none")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        pieces, lossless = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["lossless"]
        docs = [manifest["splits"][split]["docs"] for split in ("train", "val")]
        disjoint, ours = manifest["splits_disjoint"], manifest["source"]["sha256"] is not None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a manifest of prepare_caseops_data.py; prepare the data again") from None
    if pieces != settings.vocab_size:
        raise InputError(f"VOCAB_SIZE: {settings.vocab_size}, but {path} was made with a tokenizer of {pieces} pieces; "
                         "set VOCAB_SIZE to that")
    if not disjoint and ours:  # a published set is what it is; the log says that it overlaps
        raise InputError(f"{path}: training and validation documents overlap; prepare the data again")
    return dict(manifest=path, train_docs=docs[0], val_docs=docs[1], splits_disjoint=disjoint, tokenizer_lossless=lossless)


class Segments(NamedTuple):
    """What attends to what in a packed row of T tokens: token t sees the tokens of its own segment up to itself."""

    cu_seqlens: Tensor  # (segments + 1,) int32, 0 .. T
    positions: Tensor  # (T,) int32, distance from the start of the segment
    max_seqlen: int  # upper bound on a segment's length


def segment_bounds(starts: np.ndarray, total: int, max_seqlen: int) -> np.ndarray:
    """Boundaries 0 .. total of the segments that begin at `starts`, none longer than `max_seqlen`."""
    bounds = np.unique(np.concatenate(([0], starts, [total])))
    pieces = [np.arange(a, b, max_seqlen) for a, b in zip(bounds, bounds[1:])]
    return np.concatenate(pieces + [[total]]).astype(np.int32)


def make_segments(bounds: np.ndarray, max_seqlen: int) -> Segments:
    """Segments on the host from their boundaries (int32, 0 .. T)."""
    positions = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], np.diff(bounds))
    cu_seqlens = torch.from_numpy(bounds)
    return Segments(cu_seqlens, torch.from_numpy(positions), max_seqlen)


class Batch(NamedTuple):
    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    segments: Segments

    def to(self, runtime: Runtime) -> Batch:
        """The batch on the device. The number of segments varies from batch to batch: it must not cost a recompilation."""
        def move(tensor):
            return tensor.pin_memory().to(runtime.device, non_blocking=True) if runtime.on_cuda else tensor
        segments = self.segments._replace(cu_seqlens=move(self.segments.cu_seqlens),
                                          positions=move(self.segments.positions))
        if runtime.on_cuda:
            torch._dynamo.mark_dynamic(segments.cu_seqlens, 0)
        return Batch(move(self.inputs), move(self.targets), segments)


class TrainingData:
    """The training shards as one endless stream of tokens, dealt out to steps, micro-batches and ranks.

    Micro-batch m of rank r in step s is a function of (s, m, r) alone, and a step holds the same tokens whatever the
    number of ranks. Documents run on across shard borders; after the last shard the stream starts over.
    """

    def __init__(self, settings: Settings, runtime: Runtime):
        self.files = shard_files(settings.shards_dir, "train")
        self.shards = [open_shard(path) for path in self.files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.settings, self.runtime = settings, runtime
        if self.total < settings.micro_batch_tokens + 1:
            raise InputError(f"TRAIN_BATCH_TOKENS: the shards in {settings.shards_dir} hold only {self.total} tokens, fewer "
                             f"than one micro-batch of {settings.micro_batch_tokens}")
        for path, shard in zip(self.files, self.shards):  # a look at each; `read` checks every token that is used
            self.check_tokens(path, shard[:1_000_000])
        if not (self.shards[0][:1_000_000] == BOS_ID).any():
            raise InputError(f"{self.files[0]}: no document start (token {BOS_ID}) in it; it was made for another tokenizer")

    def check_tokens(self, path: str, tokens: np.ndarray) -> None:
        if len(tokens) and int(tokens.max()) >= self.settings.vocab_size:
            raise InputError(f"{path}: token {int(tokens.max())} does not fit VOCAB_SIZE={self.settings.vocab_size}; set "
                             "VOCAB_SIZE to the tokenizer's")

    @property
    def total(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the endless stream, int64."""
        pieces = []
        while count > 0:
            start %= self.total
            index = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - (int(self.ends[index]) - len(self.shards[index]))
            piece = self.shards[index][offset:offset + count]
            self.check_tokens(self.files[index], piece)
            pieces.append(piece.astype(np.int64))
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def batch(self, step: int, micro: int) -> Batch:
        """This rank's micro-batch on the host. Neighbouring micro-batches share one token: the target of the first."""
        s, r = self.settings, self.runtime
        length = s.micro_batch_tokens
        tokens = self.read(((step * s.accumulation + micro) * r.world_size + r.rank) * length, length + 1)
        bounds = segment_bounds(np.flatnonzero(tokens[:-1] == BOS_ID), length, s.train_seq_len)
        return Batch(torch.from_numpy(tokens[:-1].copy()), torch.from_numpy(tokens[1:].copy()),
                     make_segments(bounds, s.train_seq_len))

    def stream(self, depth: int = 4):
        """Yield this rank's micro-batches from step 0 on, read and packed by a thread `depth` batches ahead."""
        ready, stopped = queue.Queue(depth), threading.Event()

        def produce():
            for step, micro in ((s, m) for s in itertools.count() for m in range(self.settings.accumulation)):
                try:
                    item = self.batch(step, micro)
                except Exception as error:  # handed over, so that it is raised where the batch is asked for
                    item = error
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        pass
                if stopped.is_set() or isinstance(item, Exception):
                    return

        thread = threading.Thread(target=produce, daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item.to(self.runtime)
        finally:
            stopped.set()
            thread.join()

    def unigram_bits(self, tokens: np.ndarray, most: int = 20_000_000) -> float:
        """Bits that a unigram model, counted on the first `most` training tokens plus one each, spends on `tokens`."""
        counts = np.bincount(self.read(0, min(most, self.total)), minlength=self.settings.vocab_size) + 1.0
        return float(-np.log2(counts / counts.sum())[tokens].sum())


class ValidationData:
    """The whole validation stream and the bytes that each of its tokens stands for."""

    def __init__(self, settings: Settings):
        files = shard_files(settings.shards_dir, "val")
        self.tokens = np.concatenate([open_shard(path) for path in files])
        if len(self.tokens) < 2:
            raise InputError(f"{files[0]}: fewer than two validation tokens; prepare the data again")
        if int(self.tokens.max()) >= settings.vocab_size:
            raise InputError(f"{files[0]}: token {int(self.tokens.max())} does not fit VOCAB_SIZE={settings.vocab_size}; "
                             "set VOCAB_SIZE to the tokenizer's")
        if settings.caseops_enabled:
            sidecars = shard_files(settings.shards_dir, "val_bytes")
            self.bytes = np.concatenate([open_shard(path) for path in sidecars])
            if len(self.bytes) != len(self.tokens):
                raise InputError(f"{sidecars[0]}: the byte sidecar has {len(self.bytes)} values for {len(self.tokens)} "
                                 "validation tokens; prepare both again")
        else:
            self.bytes = token_bytes(self.tokens, settings)
        if not settings.eval_include_tail:
            keep = (len(self.tokens) - 1) // settings.eval_seq_len * settings.eval_seq_len + 1
            if keep == 1:
                raise InputError(f"EVAL_INCLUDE_TAIL: the {len(self.tokens)} validation tokens fill no window of EVAL_SEQ_LEN="
                                 f"{settings.eval_seq_len}; set EVAL_INCLUDE_TAIL=1")
            self.tokens, self.bytes = self.tokens[:keep], self.bytes[:keep]


def token_bytes(tokens: np.ndarray, settings: Settings) -> np.ndarray:
    """Bytes per token from the tokenizer's pieces: the word mark counts one byte unless it follows a control token."""
    import sentencepiece  # only needed for data without a sidecar

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=settings.tokenizer_file)
    except (OSError, RuntimeError):
        raise InputError(f"TOKENIZER_PATH: cannot read a SentencePiece model from {settings.tokenizer_file}; "
                         "CASEOPS_ENABLED=0 needs it") from None
    if model.vocab_size() != settings.vocab_size:
        raise InputError(f"VOCAB_SIZE: {settings.vocab_size}, but {settings.tokenizer_file} has {model.vocab_size()} pieces")
    silent = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(len(model))])
    marked = np.array([model.id_to_piece(i).startswith("\u2581") for i in range(len(model))]) & ~silent
    widths = np.array([0 if silent[i] else 1 if model.is_byte(i) else
                       len(model.id_to_piece(i).removeprefix("\u2581").encode()) for i in range(len(model))])
    follows_text = np.concatenate(([False], ~silent[tokens[:-1]]))
    return (widths[tokens] + (marked[tokens] & follows_text)).astype(np.uint16)


# ======================================================================================================================
# 4. Kernels
# ======================================================================================================================


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each segment; q (T, heads, D), k and v (T, kv_heads, D), result like q.

    Query heads are dealt to key/value heads in order: heads / kv_heads neighbours share one. Scores are scaled by
    1/sqrt(D). PyTorch's variable-length flash kernel on CUDA (bf16), the reference on the CPU.
    """
    return flash_attention(q, k, v, segments) if q.is_cuda else reference_attention(q, k, v, segments)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same, segment by segment."""
    group = q.size(1) // k.size(1)
    outputs = []
    bounds = segments.cu_seqlens.tolist()
    for a, b in zip(bounds, bounds[1:]):
        heads_first = [x[a:b].transpose(0, 1)[None] for x in
                       (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]  # (1, heads, length, D)
        outputs.append(F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outputs)


# ======================================================================================================================
# 5. Model
# ======================================================================================================================

NORM_EPS = 1.1920929e-7  # float32 epsilon, whatever the dtype of the activations


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension without weight, float32 out."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS)


def rotary_tables(positions: Tensor, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles in float32, (T, 1, dims / 2) each."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the leading dimensions of x (T, heads, D); pairs are (i, i + dims / 2)."""
    cos, sin = rope
    a, b, rest = x.split([cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope).square()


class Layer(NamedTuple):
    """What one block needs, cut out of the stacked parameters. Matrices are in the compute dtype, the rest float32."""

    w_qkv: Tensor  # ((heads + 2 kv_heads) D, d)
    w_out: Tensor  # (d, d), its rows multiplied by attn_scale
    w_up: Tensor  # (F, d)
    w_down: Tensor  # (d, F), its rows multiplied by mlp_scale
    input_scale: Tensor  # ()
    resid_mix: Tensor  # (2, d)
    q_gain: Tensor  # (heads,)
    attn_gate: Tensor | None  # (heads, GATE_WINDOW), (heads, d) for the dense gate
    xsa_alpha: Tensor | None  # (heads,)
    lane_post: Tensor | None  # (2, 2): [from attention, from MLP] x [to lane 0, to lane 1]
    lane_resid: Tensor | None  # (2,)
    exclusive: bool  # whether XSA is on


class Skip(NamedTuple):
    """A U-Net skip on its way into the decoder."""

    x: Tensor  # (T, d), what an encoder visit left
    weight: Tensor  # (d,)
    gate: Tensor | None  # (d,)


class GPT(nn.Module):
    """The language model over packed tokens: (T,) ids in, losses or logits per token out.

    Every per-layer tensor is stacked over the layers, so that there are 4 banks of matrices for Muon and a dozen small
    tensors, instead of hundreds. Parameters are float32 masters; matrix products run in `compute_dtype`.
    """

    def __init__(self, settings: Settings, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        s = self.settings = settings
        self.compute_dtype = compute_dtype
        n, d, heads = s.num_layers, s.model_dim, s.num_heads

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape))

        self.tok_emb = parameter(s.vocab_size, d)
        self.qo_bank = parameter(2 * n, d, d)  # query matrices of all layers, then output matrices
        self.kv_bank = parameter(2 * n, s.kv_dim, d)  # key matrices, then value matrices
        self.mlp_up_bank = parameter(n, s.mlp_dim, d)
        self.mlp_down_bank = parameter(n, d, s.mlp_dim)
        self.attn_scale = parameter(n, d)
        self.mlp_scale = parameter(n, d)
        self.resid_mix = parameter(n, 2, d)
        self.q_gain = parameter(n, heads)
        gate_inputs = d if s.gated_attn_enabled else s.gate_window
        has_gate = s.gated_attn_enabled or s.sparse_attn_gate_enabled or s.attn_out_gate_enabled
        self.attn_gate = parameter(n, heads, gate_inputs) if has_gate else None
        self.xsa_alpha = parameter(n, heads) if s.gated_xsa else None
        self.orders = {looping: visit_order(s, looping) for looping in (False, s.num_loops > 0)}
        skips = min(map(len, self.orders[s.num_loops > 0]))
        self.skip_weights = parameter(skips, d)
        self.skip_gates = parameter(skips, d) if s.skip_gates_enabled else None
        two_lanes = s.parallel_start_layer > 0
        self.parallel_post_lambdas = parameter(n, 2, 2) if two_lanes else None
        self.parallel_resid_lambdas = parameter(n, 2) if two_lanes else None
        self.smear_gate = parameter(1, s.gate_window) if s.smear_gate_enabled else None
        self.smear_lambda = parameter(1) if s.smear_gate_enabled else None
        self.softcap_pos = parameter(()) if s.asym_logit_rescale else None
        self.softcap_neg = parameter(()) if s.asym_logit_rescale else None
        if s.asym_logit_rescale and not s.softcap_lr:
            self.softcap_pos.requires_grad_(False)
            self.softcap_neg.requires_grad_(False)
        scales = [1 / math.sqrt(i + 1) if s.ln_scale else 1.0 for i in range(n)]
        self.register_buffer("input_scales", torch.tensor(scales), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights on the host from SEED, the same on every rank and device.

        tok_emb                                 normal, TIED_EMBED_INIT_STD
        qo_bank                                 queries orthogonal, outputs 0
        kv_bank, mlp_up_bank                    orthogonal
        mlp_down_bank                           0
        attn_scale, mlp_scale, skip_weights     1
        resid_mix                               row 0 (the stream) 1, row 1 (the embedding) 0
        q_gain                                  QK_GAIN_INIT
        attn_gate                               normal with its *_INIT_STD (0 for the published systems)
        skip_gates, smear_*, xsa_alpha          0
        parallel_post_lambdas / _resid_lambdas  1 / 1.1
        softcap_pos, softcap_neg                LOGIT_SOFTCAP
        """
        s, n = self.settings, self.settings.num_layers
        draw = torch.Generator().manual_seed(s.seed)
        constants = dict(mlp_down_bank=0, attn_scale=1, mlp_scale=1, skip_weights=1, q_gain=s.qk_gain_init, skip_gates=0,
                         smear_gate=0, smear_lambda=0, xsa_alpha=0, parallel_post_lambdas=1, parallel_resid_lambdas=1.1,
                         softcap_pos=s.logit_softcap, softcap_neg=s.logit_softcap)
        for name, value in constants.items():
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)
        self.tok_emb.normal_(0, s.tied_embed_init_std, generator=draw)
        for matrix in itertools.chain(self.qo_bank[:n], self.kv_bank, self.mlp_up_bank):
            nn.init.orthogonal_(matrix, generator=draw)
        self.qo_bank[n:].zero_()
        self.resid_mix.copy_(torch.tensor([1.0, 0.0])[:, None])
        if self.attn_gate is not None:
            std = s.gated_attn_init_std if s.gated_attn_enabled else \
                s.sparse_attn_gate_init_std if s.sparse_attn_gate_enabled else 0.0
            self.attn_gate.normal_(0, std, generator=draw) if std > 0 else self.attn_gate.zero_()

    def banks(self) -> list[nn.Parameter]:
        """The stacks of matrices, (count, rows, columns) each."""
        return [self.mlp_up_bank, self.mlp_down_bank, self.qo_bank, self.kv_bank]

    def compile_parts(self, runtime: Runtime) -> GPT:
        """Compile each part of the forward pass by itself: every block shares the code of its kind.

        The parts' inputs and outputs are what the backward pass keeps; compiled as a whole, the residual stream would be
        recomputed through all layers instead.
        """
        for part in ("layers", "embed", "block", "two_lane_block", "final_norm", "head_losses"):
            setattr(self, part, runtime.compile(getattr(self, part), fullgraph=True))
        return self

    def layers(self) -> list[Layer]:
        """Cut the stacks into layers, once per forward pass; unbind gathers a bank's gradient in one stack.

        The residual scales are multiplied into the output matrices, where they cost nothing per token.
        """
        s, n, dtype = self.settings, self.settings.num_layers, self.compute_dtype
        queries, outputs = self.qo_bank.split(n)
        query, key_value = queries.to(dtype).unbind(), self.kv_bank.to(dtype).unbind()
        out = (self.attn_scale[:, :, None] * outputs).to(dtype).unbind()
        up, down = self.mlp_up_bank.to(dtype).unbind(), (self.mlp_scale[:, :, None] * self.mlp_down_bank).to(dtype).unbind()

        def rows(stack):
            return stack.unbind() if stack is not None else [None] * n

        small = zip(*map(rows, (self.input_scales, self.resid_mix, self.q_gain, self.attn_gate, self.xsa_alpha,
                                self.parallel_post_lambdas, self.parallel_resid_lambdas)))
        return [Layer(torch.cat((query[i], key_value[i], key_value[n + i])), out[i], up[i], down[i], *vectors,
                      exclusive=i >= n - s.xsa_last_n) for i, vectors in enumerate(small)]

    def forward(self, ids: Tensor, segments: Segments, looping: bool) -> Tensor:
        """Final normalized hidden states (T, d) of packed ids (T,); looping: visit the looped blocks again."""
        s = self.settings
        rope = rotary_tables(segments.positions, s.rotary_dims, s.rope_base)
        x0 = x = self.embed(ids, segments.positions)
        layers, skips, lanes = self.layers(), [], None
        encoder, decoder = self.orders[looping]
        for i in encoder:
            x = self.block(x, x0, None, layers[i], segments, rope)
            skips.append(x)
        weights = self.skip_weights.unbind()
        gates = self.skip_gates.unbind() if self.skip_gates is not None else [None] * len(weights)
        for i, weight, gate in itertools.zip_longest(decoder, weights[:len(skips)], gates[:len(skips)]):
            skip = Skip(skips.pop(), weight, gate) if weight is not None else None
            if s.parallel_start_layer and i >= s.parallel_start_layer:
                lanes = self.two_lane_block(*(lanes or (x, x)), x0, skip, layers[i], segments, rope)
            else:
                x = self.block(x, x0, skip, layers[i], segments, rope)
        return self.final_norm(*(lanes or (x, x)))

    def final_norm(self, lane0: Tensor, lane1: Tensor) -> Tensor:
        merged = {"mean": (lane0.float() + lane1.float()) / 2, "attn": lane0, "mlp": lane1}
        return norm(merged[self.settings.parallel_final_lane]).to(lane0.dtype)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Normalized embeddings (T, d); SmearGate adds a gated share of the previous token's in the segment."""
        s = self.settings
        x = F.embedding(ids, self.tok_emb)
        if s.smear_gate_enabled:
            keep = positions[1:] > 0 if s.smear_gate_bos_fix else torch.ones_like(positions[1:])
            score = (x[1:, :s.gate_window] * self.smear_gate).sum(-1, keepdim=True)
            x = torch.cat((x[:1], x[1:] + self.smear_lambda * torch.sigmoid(score) * keep[:, None] * x[:-1]))
        return norm(x).to(self.compute_dtype)

    def block(self, x: Tensor, x0: Tensor, skip: Skip | None, w: Layer, segments: Segments, rope) -> Tensor:
        """One transformer block on the stream x (T, d)."""
        x = (w.resid_mix[0] * merge_skip(x, skip) + w.resid_mix[1] * x0).to(x.dtype)
        x = x + self.attend(x, w, segments, rope)
        return x + self.mlp(x, w)

    def two_lane_block(self, lane0: Tensor, lane1: Tensor, x0: Tensor, skip: Skip | None, w: Layer, segments: Segments,
                       rope) -> tuple[Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1, at the same time; both outputs go to both lanes."""
        lane0 = merge_skip(lane0, skip).to(x0.dtype)
        from_attn = self.attend((w.resid_mix[0] * lane0 + w.resid_mix[1] * x0).to(x0.dtype), w, segments, rope)
        from_mlp = self.mlp(lane1, w)
        return tuple((w.lane_resid[k] * lane + w.lane_post[0, k] * from_attn + w.lane_post[1, k] * from_mlp).to(x0.dtype)
                     for k, lane in enumerate((lane0, lane1)))

    def mlp(self, x: Tensor, w: Layer) -> Tensor:
        """Scaled MLP output (T, d) for the stream x (T, d)."""
        u = (w.input_scale * norm(x)).to(x.dtype)
        return F.linear(leaky_relu_squared(F.linear(u, w.w_up), self.settings.leaky_relu_sq_slope), w.w_down)

    def attend(self, x: Tensor, w: Layer, segments: Segments, rope) -> Tensor:
        """Scaled attention output (T, d) for the stream x (T, d)."""
        s = self.settings
        u = (w.input_scale * norm(x)).to(x.dtype)
        raw_q, k, v = F.linear(u, w.w_qkv).split((s.model_dim, s.kv_dim, s.kv_dim), dim=-1)
        v = v.unflatten(-1, (s.num_kv_heads, s.head_dim))
        q = rotate(norm(raw_q.unflatten(-1, (s.num_heads, s.head_dim))), rope) * w.q_gain[:, None]
        k = rotate(norm(k.unflatten(-1, (s.num_kv_heads, s.head_dim))), rope)
        y = attention(q.to(x.dtype), k.to(x.dtype), v, segments)
        if w.exclusive:
            y = exclude_own_value(y, v, w.xsa_alpha)
        if w.attn_gate is not None:
            y = (y * self.head_gate(u, raw_q, w.attn_gate)[..., None]).to(x.dtype)
        return F.linear(y.flatten(1), w.w_out)

    def head_gate(self, u: Tensor, raw_q: Tensor, weight: Tensor) -> Tensor:
        """Gate per token and head (T, heads) on the attention output, driven by the block's normalized input u (T, d)."""
        s = self.settings
        source = raw_q if s.attn_out_gate_enabled and s.attn_out_gate_src == "q" else u
        scores = F.linear(source[:, :weight.size(-1)], weight.to(source.dtype)).float()
        if s.attn_out_gate_enabled:
            return 2 * torch.sigmoid(scores)
        return torch.sigmoid(s.sparse_attn_gate_scale * scores if s.sparse_attn_gate_enabled else scores)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits (T, vocab), float32. Without gradients the product itself keeps float32."""
        weight = self.tok_emb.to(hidden.dtype)
        if hidden.is_cuda and not torch.is_grad_enabled():
            scores = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            scores = F.linear(hidden, weight).float()
        cap = self.settings.logit_softcap
        if self.softcap_pos is not None:
            cap = torch.where(scores >= 0, self.softcap_pos, self.softcap_neg)
        return cap * torch.tanh(scores / cap)

    def head_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), targets, reduction="none")

    def token_losses(self, ids: Tensor, targets: Tensor, segments: Segments, looping: bool) -> Tensor:
        """Cross entropy of each target (T,) in nats, float32."""
        return self.head_losses(self(ids, segments, looping), targets)


def merge_skip(x: Tensor, skip: Skip | None) -> Tensor:
    """Blend a U-Net skip into the stream by its gate, per channel; add it where there is no gate."""
    if skip is None:
        return x
    if skip.gate is None:
        return x + skip.weight * skip.x
    gate = torch.sigmoid(skip.gate)
    return gate * x + (1 - gate) * (skip.weight * skip.x)


def exclude_own_value(y: Tensor, v: Tensor, alpha: Tensor | None) -> Tensor:
    """XSA: take from each head's output y (T, heads, D) its component along the token's own value v (T, kv_heads, D).

    With alpha (heads,) only tanh(alpha) of the component is taken.
    """
    direction = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, None]  # (T, kv_heads, 1, D)
    grouped = y.float().unflatten(1, (v.size(1), -1))  # (T, kv_heads, group, D)
    component = (grouped * direction).sum(-1, keepdim=True)
    if alpha is not None:
        component = component * torch.tanh(alpha).view(v.size(1), -1, 1)
    return (grouped - component * direction).flatten(1, 2).to(y.dtype)


# ======================================================================================================================
# 6. Optimizers
# ======================================================================================================================

POLAR_EXPRESS = (  # (a, b, c) of iteration i: X <- a X + (b G + c G G) X with G = X X^T (Amsel et al. 2025)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def learning_rate_multiplier(progress: float, step: int, s: Settings) -> float:
    """What every learning rate is multiplied by: linear warm-up in steps, flat, linear fall to MIN_LR in progress."""
    warm = min(1.0, (step + 1) / s.lr_warmup_steps) if s.lr_warmup_steps else 1.0
    if s.warmdown_frac <= 0 or progress < 1 - s.warmdown_frac:
        return warm
    return warm * max((1 - progress) / s.warmdown_frac, s.min_lr)


def muon_momentum(step: int, s: Settings) -> float:
    """Momentum rises linearly over MUON_MOMENTUM_WARMUP_STEPS steps."""
    share = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return s.muon_momentum_warmup_start + (s.muon_momentum - s.muon_momentum_warmup_start) * share


def newton_schulz(update: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values of each (rows, columns) matrix of the stack go to 1."""
    wide = update if update.size(-2) <= update.size(-1) else update.mT
    x = (wide / (wide.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(update.dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is update else x.mT).contiguous()


def nesterov(gradient: Tensor, momentum: Tensor, clip: Tensor, hyper: Tensor, row_normalize: bool) -> Tensor:
    """Add the clipped gradient to `momentum` in place and return the look-ahead update; hyper = (lr, mu)."""
    gradient = gradient.float() * clip
    momentum.mul_(hyper[1]).add_(gradient)
    update = gradient + hyper[1] * momentum
    if row_normalize:
        update = update / update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    return update.to(torch.bfloat16 if update.is_cuda else torch.float32)


def apply_muon(weight: Tensor, update: Tensor, hyper: Tensor, scale: float, decay: float) -> None:
    """Decoupled decay and update in one pass; `scale` sqrt(max(1, rows / columns)) evens out the shapes."""
    weight.mul_(1 - hyper[0] * decay).sub_(hyper[0] * scale * update)


def apply_adamw(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, clip: Tensor, hyper: Tensor, decay: float,
                anchor: Tensor | float, spare_idle: bool, beta1: float, beta2: float, eps: float) -> None:
    """AdamW (Loshchilov & Hutter 2019) with decay toward `anchor`; hyper = (lr, 1 - beta1^t, 1 - beta2^t).

    spare_idle: no decay where no gradient has ever arrived.
    """
    gradient = gradient * clip
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    step = (mean / hyper[1]) / ((square / hyper[2]).sqrt() + eps)
    pull = decay * (weight - anchor)
    weight.sub_(hyper[0] * (step + (pull * (square > 0) if spare_idle else pull)))


class BankGroup:
    """Banks whose matrices have equally many elements, dealt out to the ranks in runs of equal length for Muon.

    Gradients are averaged and cut up in one reduce-scatter, each rank orthogonalizes its run, and one all-gather brings
    the updates back. Communication is bf16 on CUDA.
    """

    def __init__(self, banks: list[nn.Parameter], runtime: Runtime):
        self.banks, self.runtime = banks, runtime
        count = sum(len(bank) for bank in banks)
        per_rank = -(-count // runtime.world_size)
        self.all = torch.zeros(per_rank * runtime.world_size, banks[0][0].numel(), dtype=runtime.compute_dtype,
                               device=runtime.device)
        self.mine = torch.zeros_like(self.all[:per_rank]) if runtime.world_size > 1 else self.all
        self.momentum = torch.zeros_like(self.mine, dtype=torch.float32)
        self.pending = None
        self.slots, self.runs, first = [], [], 0  # slots: each bank in `all`; runs: this rank's share of it in `mine`
        low, high = runtime.rank * per_rank, (runtime.rank + 1) * per_rank
        for bank in banks:
            last = first + len(bank)
            self.slots.append(self.all[first:last].view_as(bank))
            a, b = max(first, low), min(last, high)
            if a < b:
                self.runs.append((slice(a - low, b - low), (b - a, *bank.shape[1:])))
            first = last

    def launch_reduce(self) -> None:
        """Start averaging the banks' gradients over the ranks."""
        for bank, slot in zip(self.banks, self.slots):
            torch.mul(bank.grad, 1 / self.runtime.world_size, out=slot)
            bank.grad = None
        if self.runtime.world_size > 1:
            self.pending = dist.reduce_scatter_tensor(self.mine, self.all, async_op=True)

    def launch_gather(self) -> None:
        """Start collecting every rank's updates."""
        if self.runtime.world_size > 1:
            self.pending = dist.all_gather_into_tensor(self.all, self.mine, async_op=True)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


class FlatGroup(NamedTuple):
    """A run of the flat buffer that shares its AdamW settings."""

    run: slice
    lr: float
    decay: float
    anchor: Tensor | float  # what decay pulls toward
    spare_idle: bool  # whether decay leaves out what has never received gradient


class Optimizer:
    """Muon for the banks, AdamW for everything else, every trained parameter in exactly one place.

    What is not a bank lives in one flat float32 buffer, parameters and gradients alike: one all-reduce and one AdamW call
    per group. The gradient buffer's last element carries the loss, so that its mean over the ranks costs nothing extra.
    """

    def __init__(self, model: GPT, settings: Settings, runtime: Runtime):
        self.settings, self.runtime, self.steps = settings, runtime, 0
        banks = model.banks()
        self.groups = [BankGroup(list(same), runtime) for _, same in
                       itertools.groupby(banks, key=lambda bank: bank[0].numel())]
        caps = [p for p in (model.softcap_pos, model.softcap_neg) if p is not None and p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        elsewhere = {id(p) for p in [model.tok_emb, *banks, *caps]}
        scalars = [p for p in trained if id(p) not in elsewhere]
        self.build_flat([([model.tok_emb], settings.tied_embed_lr, settings.embed_wd, "zero"),
                         (scalars, settings.scalar_lr, settings.adam_wd, settings.adam_wd_mode),
                         (caps, settings.softcap_lr, 0.0, "zero")])
        placed = [id(p) for p in [*banks, *self.flat_parameters]]
        if sorted(placed) != sorted(map(id, trained)):
            raise AssertionError("every trained parameter must belong to exactly one optimizer group")
        self.weights = [self.flat, *banks]
        self.nesterov, self.apply_muon = runtime.compile(nesterov), runtime.compile(apply_muon)
        self.apply_adamw = runtime.compile(apply_adamw)

    @torch.no_grad()
    def build_flat(self, plan) -> None:
        """Move the parameters of `plan` [(parameters, lr, decay, decay mode)] into one buffer, 64-byte aligned."""
        self.flat_parameters = [p for parameters, *_ in plan for p in parameters]
        sizes = [-(-p.numel() // 16) * 16 for p in self.flat_parameters]
        device = self.runtime.device
        self.flat = torch.zeros(sum(sizes), device=device)
        self.flat_grad = torch.zeros(sum(sizes) + 1, device=device)
        offset, self.flat_groups = 0, []
        for parameters, lr, decay, mode in plan:
            start = offset
            for p in parameters:
                view = slice(offset, offset + p.numel())
                self.flat[view] = p.flatten()
                p.data, p.grad = self.flat[view].view_as(p), self.flat_grad[view].view_as(p)
                offset += -(-p.numel() // 16) * 16
            if parameters:
                run = slice(start, offset)
                anchor = self.flat[run].clone() if mode == "init" else 0.0
                self.flat_groups.append(FlatGroup(run, lr, decay, anchor, mode == "active"))
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def add_loss(self, loss: Tensor) -> None:
        self.flat_grad[-1].add_(loss.detach())

    @torch.no_grad()
    def step(self, multiplier: float, momentum: float) -> Tensor:
        """Average, clip and apply the accumulated gradients; returns (mean loss, gradient norm) on the device.

        Nothing here waits for the device: learning rates travel in small uploads, the clip factor stays where it is.
        """
        s, world = self.settings, self.runtime.world_size
        self.steps += 1
        flat_pending = None
        if world > 1:
            flat_pending = dist.all_reduce(self.flat_grad.mul_(1 / world), async_op=True)
        for group in self.groups:
            group.launch_reduce()
        for group in self.groups:
            group.wait()
        squares = self.runtime.sum(sum(torch.linalg.vector_norm(g.mine, dtype=torch.float32).square() for g in self.groups))
        if flat_pending is not None:
            flat_pending.wait()
        gradient_norm = (squares + self.flat_grad[:-1].square().sum()).sqrt()
        clip = (s.grad_clip_norm / (gradient_norm + 1e-6)).clamp(max=1.0) if s.grad_clip_norm else torch.ones_like(squares)
        hyper = self.runtime.upload([s.matrix_lr * multiplier, momentum])
        for group in self.groups:
            for run, shape in group.runs:
                update = self.nesterov(group.mine[run].view(shape), group.momentum[run].view(shape), clip, hyper,
                                       s.muon_row_normalize)
                group.mine[run] = newton_schulz(update, s.muon_backend_steps).flatten(1)
            group.launch_gather()
        for run, lr, *rule in self.flat_groups:
            adam = self.runtime.upload([lr * multiplier, 1 - s.beta1 ** self.steps, 1 - s.beta2 ** self.steps])
            self.apply_adamw(self.flat[run], self.flat_grad[run], self.mean[run], self.square[run], clip, adam, *rule,
                             s.beta1, s.beta2, s.adam_eps)
        for group in self.groups:
            group.wait()
            for bank, update in zip(group.banks, group.slots):
                self.apply_muon(bank, update, hyper, math.sqrt(max(1, bank.size(1) / bank.size(2))), s.muon_wd)
        figures = torch.stack((self.flat_grad[-1], gradient_norm))
        self.flat_grad.zero_()
        return figures

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        return self.weights + [self.mean, self.square] + [group.momentum for group in self.groups]

    @contextmanager
    def rehearsal(self):
        """Steps taken inside leave no trace: weights, moments and step count are put back at the end."""
        saved, steps = [t.detach().clone() for t in self.state()], self.steps
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.state(), saved)
        self.steps = steps


class WeightAverage:
    """Exponential moving average of all weights: average <- decay average + (1 - decay) weights after every step."""

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay = weights, decay
        self.average = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.average, self.weights, 1 - self.decay)

    @torch.no_grad()
    def install(self) -> None:
        """Replace the weights by their average."""
        torch._foreach_copy_(self.weights, self.average)


# ======================================================================================================================
# 7. Training
# ======================================================================================================================


class TrainingClock:
    """Training time, and what follows from it: rank 0 reads the clock and every rank gets its verdict.

    On CUDA the host runs up to two steps ahead of the device. Before step s is launched rank 0 waits until step s - 2 is
    complete, so that the device still has step s - 1 to do, and adds the length of one step to the time read.
    """

    def __init__(self, settings: Settings, runtime: Runtime):
        self.settings, self.runtime = settings, runtime
        self.lag = 2 if runtime.on_cuda else 1
        self.marks: dict[int, torch.cuda.Event] = {}
        self.progress = 0.0
        self.completed: list[float] = []  # training time at which each step was seen to be complete
        runtime.synchronize()
        self.origin = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.origin

    def step_seconds(self) -> float:
        """Length of the latest step that is known to be complete."""
        recent = self.completed[-2:]
        return recent[-1] - recent[0] if len(recent) == 2 else recent[0] if recent else 0.0

    def begin_step(self, step: int) -> tuple[float, bool]:
        """Progress in [0, 1] at the start of this step, and whether to stop instead of taking it."""
        self.observe(step - self.lag)
        s = self.settings
        if s.max_wallclock_seconds:
            start = self.completed[-1] + (self.lag - 1) * self.step_seconds() if self.completed else self.elapsed()
            progress = start / s.train_seconds
            stop = start + self.step_seconds() > s.train_seconds
        else:
            progress, stop = step / s.iterations, False
        progress, stop = self.runtime.from_rank0([progress, float(stop)])
        self.progress = min(1.0, max(self.progress, progress))  # estimates may step back, schedules must not
        return self.progress, bool(stop) or step >= min(s.iterations, s.force_stop_step or s.iterations)

    def end_step(self, step: int) -> None:
        if self.runtime.on_cuda:
            self.marks[step] = torch.cuda.Event()
            self.marks[step].record()

    def observe(self, step: int) -> None:
        """Wait until `step` is complete and note the time."""
        if step >= 0 and step == len(self.completed):
            if self.runtime.on_cuda:
                self.marks.pop(step).synchronize()
            self.completed.append(self.elapsed())

    @contextmanager
    def paused(self, step: int):
        """Time inside does not count: for validation in the middle of training, before `step`."""
        for earlier in range(len(self.completed), step):
            self.observe(earlier)
        self.runtime.synchronize()
        began = time.perf_counter()
        yield
        self.runtime.synchronize()
        self.origin += time.perf_counter() - began


def train(model: GPT, data: TrainingData, validation: Evaluator, settings: Settings, runtime: Runtime,
          log: RunLog) -> bool:
    """Train until the cap or the last iteration, evaluate the raw weights, install and evaluate their average.

    Returns whether looping was on at the end: from then on it belongs to the model.
    """
    s = settings
    optimizer = Optimizer(model, s, runtime)

    def take_step(batches, looping: bool, multiplier: float, momentum: float) -> Tensor:
        for _ in range(s.accumulation):
            loss = model.token_losses(*next(batches), looping).mean() / s.accumulation
            loss.backward()
            optimizer.add_loss(loss)
        return optimizer.step(multiplier, momentum)

    warm_up(take_step, optimizer, data, s, runtime, log)
    average = WeightAverage(optimizer.weights, s.ema_decay)
    batches, looping, looping_from = data.stream(), False, None
    host_figures: dict[int, Tensor] = {}
    graphs_before = compiled_graphs()
    clock = TrainingClock(s, runtime)
    for step in itertools.count():
        progress, stop = clock.begin_step(step)
        log_step(log, clock, host_figures, s)
        if stop:
            break
        if s.val_loss_every and step and step % s.val_loss_every == 0:
            with clock.paused(step):
                graphs_before -= compiled_graphs()
                log.event("val", step=step, **validation.score(model, looping))
                graphs_before += compiled_graphs()
        if not looping and s.num_loops and progress >= s.enable_looping_at:
            looping, looping_from = True, step
            log.event("looping", step=step, progress=round(progress, 4))
        multiplier = learning_rate_multiplier(progress, step, s)
        figures = take_step(batches, looping, multiplier, muon_momentum(step, s))
        average.update()
        if step < 5 or s.train_log_every and (step + 1) % s.train_log_every == 0:
            host_figures[step] = torch.empty(2, pin_memory=runtime.on_cuda).copy_(figures, non_blocking=True)
        clock.end_step(step)
    batches.close()
    for earlier in range(len(clock.completed), step):
        clock.observe(earlier)
    log_step(log, clock, host_figures, s)
    report_training(log, clock, step, looping_from, compiled_graphs() - graphs_before, s, runtime)
    log.result("raw", **validation.score(model, looping))
    if s.ema_decay > 0:
        average.install()
        log.result("averaged", **validation.score(model, looping))
    return looping


def warm_up(take_step, optimizer: Optimizer, data: TrainingData, s: Settings, runtime: Runtime, log: RunLog) -> None:
    """Compile what training will run, by WARMUP_STEPS steps for each state of looping; the rehearsal undoes them."""
    began = time.perf_counter()
    batches = data.stream()
    with optimizer.rehearsal():
        for looping in sorted({False, s.loops_at_end}):
            for _ in range(s.warmup_steps):
                take_step(batches, looping, multiplier=1.0, momentum=s.muon_momentum)
    batches.close()
    runtime.synchronize()
    log.event("warmup", steps=s.warmup_steps, seconds=round(time.perf_counter() - began, 1))


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def log_step(log: RunLog, clock: TrainingClock, figures: dict[int, Tensor], s: Settings) -> None:
    """Log the steps whose figures have arrived on the host."""
    for step in [step for step in figures if step < len(clock.completed)]:
        loss, gradient_norm = figures.pop(step).tolist()
        first = max(0, step - max(1, s.train_log_every))
        window = clock.completed[step] - clock.completed[first]
        rate = round((step - first) * s.train_batch_tokens / window) if window > 0 else 0
        log.event("step", step=step + 1, train_loss=round(loss, 4), grad_norm=round(gradient_norm, 4),
                  seconds=round(clock.completed[step], 3), tokens_per_second=rate)


def report_training(log: RunLog, clock: TrainingClock, steps: int, looping_from: int | None, recompilations: int,
                    s: Settings, runtime: Runtime) -> None:
    """Steps, seconds and speed, before and after looping started."""
    def rate(first: int, last: int) -> int:
        # The first step of a phase is left out: its end is the first moment at which the phase runs at its own speed.
        if last - first < 2:
            return 0
        return round((last - first - 1) * s.train_batch_tokens / (clock.completed[last - 1] - clock.completed[first]))

    switch = steps if looping_from is None else looping_from
    memory = torch.cuda.max_memory_allocated() / 2**20 if runtime.on_cuda else 0
    log.result("training", steps=steps, seconds=round(clock.completed[-1] if steps else 0.0, 3),
               tokens=steps * s.train_batch_tokens, looping_from=looping_from,
               tokens_per_second_plain=rate(0, switch), tokens_per_second_looping=rate(switch, steps),
               recompilations=recompilations, peak_memory_mib=round(memory))


# ======================================================================================================================
# 8. Quantization
# ======================================================================================================================


def quantize_rows(weight: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor]:
    """Round each row of `weight` (..., columns) to signed integers of `bits` bits; returns (int8 like weight, fp16 scales).

    The step is clip_sigmas standard deviations of the row over the largest integer; it never rounds to zero.
    """
    largest = 2 ** (bits - 1) - 1
    scale = clip_sigmas * weight.float().std(dim=-1) / largest
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny).half()
    integers = (weight.float() / scale.float()[..., None]).round().clamp(-largest, largest)
    return integers.to(torch.int8), scale


# ======================================================================================================================
# 9. Artifact
# ======================================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFART", 1
ARTIFACT_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, table bytes, payload bytes, SHA-256 of table and payload
SIZE_CAP = 16_000_000


def tensor_encodings(s: Settings) -> dict[str, tuple[int, float]]:
    """(bits, clip in deviations) of the tensors stored as integers; the others are stored as float16."""
    attn, mlp = (s.matrix_bits, s.attn_clip_sigmas), (s.matrix_bits, s.mlp_clip_sigmas)
    return dict(tok_emb=(s.embed_bits, s.embed_clip_sigmas), qo_bank=attn, kv_bank=attn, mlp_up_bank=mlp, mlp_down_bank=mlp)


def save_artifact(model: GPT, looping: bool, path: str, s: Settings) -> int:
    """Quantize the model and write it to `path`, all or nothing; returns the bytes written.

    Layout: header, table (JSON: the settings that change the function; whether looping is on; name, shape and encoding of
    each tensor), payload (brotli over the tensors' bytes in table order: int8 values then float16 row scales, or float16
    values).
    """
    encodings, tensors, payload = tensor_encodings(s), [], []
    for name, parameter in model.named_parameters():
        weight = parameter.detach().cpu()
        if name in encodings:
            parts, encoding = quantize_rows(weight, *encodings[name]), "int8_rows"
        else:
            parts, encoding = (weight.half(),), "float16"
        tensors.append([name, list(weight.shape), encoding])
        payload += [part.numpy().tobytes() for part in parts]
    table = json.dumps(dict(function=s.function_settings(), looping=looping, tensors=tensors)).encode()
    packed = brotli.compress(b"".join(payload), quality=11, lgwin=24)
    digest = hashlib.sha256(table + packed).digest()
    data = ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(table), len(packed), digest) + table + packed
    write_atomically(path, data)
    return len(data)


def load_artifact(model: GPT, path: str, s: Settings) -> bool:
    """Put the weights stored in `path` into the model; returns whether looping is on. Nothing in the file is executed.

    Raises InputError when the file is damaged, or was made for another function than the settings describe.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; train first, or set ARTIFACT_DIR to the artifact's folder") from None
    damaged = InputError(f"{path}: not a whole artifact of version {ARTIFACT_VERSION}; copy it again or train again")
    if len(data) < ARTIFACT_HEADER.size:
        raise damaged
    magic, version, table_bytes, payload_bytes, digest = ARTIFACT_HEADER.unpack_from(data)
    body = data[ARTIFACT_HEADER.size:]
    if (magic, version) != (ARTIFACT_MAGIC, ARTIFACT_VERSION) or len(body) != table_bytes + payload_bytes \
            or hashlib.sha256(body).digest() != digest:
        raise damaged
    parameters = dict(model.named_parameters())
    stored_as = [[name, list(p.shape), "int8_rows" if name in tensor_encodings(s) else "float16"]
                 for name, p in parameters.items()]
    try:
        table = json.loads(body[:table_bytes])
        made_with, looping, tensors = dict(table["function"]), bool(table["looping"]), table["tensors"]
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    wrong = [f"{name.upper()}: {mine}, but {path} was made with {made_with.get(name)}; set it to that"
             for name, mine in s.function_settings().items() if made_with.get(name) != mine]
    if wrong:
        raise InputError("\n".join(wrong))
    if tensors != stored_as:
        raise damaged
    unpack_tensors(body[table_bytes:], stored_as, parameters, damaged)
    return looping


@torch.no_grad()
def unpack_tensors(packed: bytes, table: list, parameters: dict[str, nn.Parameter], damaged: InputError) -> None:
    """Decode the payload into the parameters, in the order of the table; raises `damaged` if it does not fit them."""
    parts = [part for _, shape, encoding in table for part in
             ([(torch.int8, shape), (torch.float16, shape[:-1])] if encoding == "int8_rows" else [(torch.float16, shape)])]
    expected = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
    try:
        raw = bytearray(brotli.Decompressor().process(packed, output_buffer_limit=expected + 1))
    except brotli.error:
        raise damaged from None
    if len(raw) != expected:
        raise damaged
    offset, values = 0, []
    for dtype, shape in parts:
        values.append(torch.frombuffer(raw, dtype=dtype, count=math.prod(shape), offset=offset).view(shape).float())
        offset += dtype.itemsize * math.prod(shape)
    values = iter(values)
    for name, _, encoding in table:
        weight = next(values)
        parameters[name].copy_(weight * next(values)[..., None] if encoding == "int8_rows" else weight)


def code_bytes() -> int:
    """Size of the code that an evaluation needs, as it lies in the folder."""
    return os.path.getsize(os.path.abspath(__file__))


# ======================================================================================================================
# 10. Evaluation
# ======================================================================================================================


def evaluation_windows(tokens: np.ndarray, s: Settings) -> list[tuple[int, int, int]]:
    """(begin, end, first scored) of the windows over the inputs tokens[:-1]; together they score every target once.

    A window never crosses a document border. With EVAL_STRIDE = 0 a long document is cut into disjoint windows.
    """
    last = len(tokens) - 1
    starts = np.unique(np.concatenate(([0], np.flatnonzero(tokens[:last] == BOS_ID))))
    windows = []
    for a, b in zip(starts.tolist(), starts[1:].tolist() + [last]):
        end = min(a + s.eval_seq_len, b)
        windows.append((a, end, a))
        while end < b:
            scored_from, end = end, min(end + (s.eval_stride or s.eval_seq_len), b)
            windows.append((max(a, end - s.eval_seq_len) if s.eval_stride else scored_from, end, scored_from))
    return windows


def pack_windows(windows: list[tuple[int, int, int]], capacity: int) -> list[list[tuple[int, int, int]]]:
    """Whole windows in order, as many to a batch as fit into `capacity` tokens."""
    batches, room = [], 0
    for window in windows:
        length = window[1] - window[0]
        if length > room:
            batches.append([])
            room = capacity
        batches[-1].append(window)
        room -= length
    return batches


class Evaluator:
    """Plain evaluation in bits per byte: val_bpb = sum of -log2 p(token) / sum of the bytes the tokens stand for.

    Every target of the validation stream is scored once. The batches are the same for every number of ranks, which take
    them in turn; sums are float64.
    """

    def __init__(self, data: ValidationData, settings: Settings, runtime: Runtime):
        self.data, self.settings, self.runtime = data, settings, runtime
        self.batches = pack_windows(evaluation_windows(data.tokens, settings), settings.eval_batch_tokens)
        self.targets, self.bytes = len(data.tokens) - 1, int(data.bytes[1:].sum(dtype=np.int64))
        if not self.bytes:
            raise InputError(f"DATA_PATH: the validation tokens in {settings.shards_dir} stand for no bytes; prepare again")
        self.rehearsed = set()

    def batch(self, index: int) -> tuple[Batch, Tensor]:
        """Batch `index`, filled up to its fixed length, and the (T,) mask of the targets that it scores."""
        s, tokens = self.settings, self.data.tokens
        inputs = np.full(s.eval_batch_tokens, BOS_ID, dtype=np.int64)
        targets, scored = np.zeros_like(inputs), np.zeros(len(inputs), dtype=bool)
        starts, at = [], 0
        for begin, end, first in self.batches[index]:
            starts.append(at)
            stop = at + end - begin
            inputs[at:stop], targets[at:stop] = tokens[begin:end], tokens[begin + 1:end + 1]
            scored[at + first - begin:stop] = True
            at = stop
        bounds = segment_bounds(np.array(starts + [at]), len(inputs), s.eval_seq_len)
        segments = make_segments(bounds, s.eval_seq_len)
        mask = torch.from_numpy(scored).to(self.runtime.device)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), segments).to(self.runtime), mask

    @torch.no_grad()
    def score(self, model: GPT, looping: bool) -> dict:
        """val_loss (nats per token), val_bpb, targets, bytes and seconds (compilation not counted)."""
        if looping not in self.rehearsed:
            model.token_losses(*self.batch(0)[0], looping)
            self.rehearsed.add(looping)
        self.runtime.synchronize()
        began = time.perf_counter()
        sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)  # nats, targets
        for index in range(self.runtime.rank, len(self.batches), self.runtime.world_size):
            batch, scored = self.batch(index)
            losses = model.token_losses(*batch, looping)
            sums += torch.stack(((losses.double() * scored).sum(), scored.sum().double()))
        nats, targets = self.runtime.sum(sums).tolist()
        if targets != self.targets:
            raise AssertionError(f"{targets} of {self.targets} validation targets were scored")
        if not math.isfinite(nats):
            raise FloatingPointError("the validation loss is not finite: training diverged")
        return dict(val_loss=round(nats / targets, 8), val_bpb=round(nats / math.log(2) / self.bytes, 8),
                    targets=self.targets, bytes=self.bytes, seconds=round(time.perf_counter() - began, 3))


# ======================================================================================================================
# 11. Main
# ======================================================================================================================


def run(settings: Settings, runtime: Runtime, log: RunLog) -> None:
    """Train, save, load and score; or only load and score."""
    s = settings
    changed = {f.name.upper(): getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
    log.event("settings", **changed)
    log.event("machine", **runtime.describe())
    log.event("code", sha256=file_sha256(__file__))
    data = None if s.ttt_eval_only else TrainingData(s, runtime)
    validation = Evaluator(ValidationData(s), s, runtime)
    log.event("data", folder=s.shards_dir, train_tokens=data.total if data else 0, val_targets=validation.targets,
              **check_manifest(s))
    model = GPT(s, runtime.compute_dtype).to(runtime.device).compile_parts(runtime)
    runtime.share(model.parameters())
    log.event("model", parameters=sum(p.numel() for p in model.parameters()), micro_batch_tokens=s.micro_batch_tokens,
              micro_batches=s.accumulation, attention="flash" if runtime.on_cuda else "reference")
    if data:
        if runtime.rank == 0:
            bits = data.unigram_bits(validation.data.tokens[1:])
            log.result("unigram", val_bpb=round(bits / validation.bytes, 8))
        looping = train(model, data, validation, s, runtime, log)
        if s.prequant_only:
            return
        if runtime.rank == 0:
            began = time.perf_counter()
            save_artifact(model, looping, s.artifact_path, s)
            log.result("artifact", file=s.artifact_path, seconds=round(time.perf_counter() - began, 1))
    looping = False
    if runtime.rank == 0:  # one file is scored, whichever disks the ranks see
        looping = load_artifact(model, s.artifact_path, s)
        artifact = os.path.getsize(s.artifact_path)
        log.result("size", artifact_sha256=file_sha256(s.artifact_path), artifact_bytes=artifact, code_bytes=code_bytes(),
                   total_bytes=artifact + code_bytes(), cap=SIZE_CAP)
    looping = bool(runtime.from_rank0([float(looping)])[0])
    runtime.share(model.parameters())
    log.result("quantized", **validation.score(model, looping))


def summary(record: dict) -> str:
    """The figures of a run as a small table."""
    results = record["results"]
    rows = [(name, f"{results[key]['val_bpb']:.5f}", f"{results[key].get('seconds', ''):>9}") for name, key in
            (("unigram model", "unigram"), ("raw weights", "raw"), ("averaged weights", "averaged"),
             ("from the artifact", "quantized")) if key in results]
    lines = ["", f"{'':20}{'val_bpb':>9}{'seconds':>10}"] + [f"{name:20}{bpb:>9} {seconds}" for name, bpb, seconds in rows]
    if "training" in results:
        lines.append(f"{'training':20}{results['training']['steps']:>9} steps in {results['training']['seconds']} s")
    if "size" in results:
        size = results["size"]
        lines.append(f"{'artifact + code':20}{size['total_bytes']:>9,} bytes of {size['cap']:,}")
    return "\n".join(lines)


def stop_on_signal(number, frame):
    raise SystemExit(128 + number)


def complain(error: Exception, rank: str) -> int:
    """One line on stderr for each problem; returns the exit code of bad input."""
    for line in str(error).splitlines():
        print(f"train_gpt.py: {line}" if rank == "0" else f"train_gpt.py: rank {rank}: {line}", file=sys.stderr)
    return 2


def main(arguments: list[str], environ: dict[str, str]) -> int:
    if arguments in (["--help"], ["-h"]):
        print(settings_help())
        return 0
    rank = environ.get("RANK", "0")
    try:
        if arguments not in ([], ["--check"]):
            raise InputError(f"{' '.join(arguments)}: settings are environment variables; the arguments are --help, --check")
        settings = Settings.from_environment(environ)
    except InputError as error:
        return complain(error, rank) if rank in ("0", "") or not rank.isdigit() else 2  # the same on every rank
    try:
        if arguments == ["--check"]:
            check_manifest(settings)
            ValidationData(settings)
            if not settings.ttt_eval_only:
                TrainingData(settings, Runtime(0, settings.world_size, torch.device("cpu")))
            print("settings and data are fine")
            return 0
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop_on_signal)
        with Runtime.start(settings) as runtime:
            log = RunLog(settings, runtime)
            began = time.perf_counter()
            try:
                run(settings, runtime, log)
            except BaseException as error:
                if not isinstance(error, (InputError, SystemExit, KeyboardInterrupt)):
                    log.write(traceback.format_exc())
                log.close("failed", error=f"{type(error).__name__}: {error}")
                raise
            log.write(summary(log.record) + "\n")
            log.close("finished", seconds=round(time.perf_counter() - began, 1))
        return 0
    except (InputError, OSError) as error:
        return complain(error, rank)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    environment = dict(os.environ)
    exit_code = main(sys.argv[1:], environment)
    sys.stdout.flush()
    sys.stderr.flush()
    if environment.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # Gloo's threads can outlive the interpreter and abort a run that is complete
    sys.exit(exit_code)
