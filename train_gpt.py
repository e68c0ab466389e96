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

import base64
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import lzma
import math
import os
import platform
import queue
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import brotli
import constriction
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import online_ngram_tilt as ngram

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # CPU builds of PyTorch come without it; what needs it is then never called
    triton = tl = None

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # nor has every Triton this language, in which the order of loads, products and stores is written out
    gluon = gl = tma = None

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

# Variables of the published systems that are no settings here: the one value that is accepted, if any, and why no other.
PEEKS = "its expert looks at the class of the token that it scores, which a decoder does not know"
ADAPTER = "no published run switched these adapters on"
FIXED_SETTINGS = {
    "TIE_EMBEDDINGS": ("1", "the output head is always the embedding; the untied head of earlier systems was never trained"),
    "EMBED_LR": ("", "it belonged to the untied embedding; use TIED_EMBED_LR"),
    "ROPE_YARN": ("0", "it scaled by the length of the packed buffer, not of the document"),
    "ROPE_TRAIN_SEQ_LEN": ("", "ignored by the systems that published it; positions count from the start of each segment"),
    "FUSED_CE_ENABLED": ("1", "soft cap and cross entropy are always fused"),
    "CONTROL_TENSOR_NAME_PATTERNS": ("", "parameter groups follow from the model, not from name fragments"),
    "COMPILE_SHAPE_WARMUP": ("1", "every context length and state of looping is compiled before the clock starts"),
    "COMPILE_SHAPE_WARMUP_ITERS": ("", "WARMUP_STEPS says how many steps each of them takes"),
    "COMPILE_SHAPE_WARMUP_LOOP_MODES": ("auto", "the schedules say which of them occur together"),
    "DYNAMO_CACHE_SIZE_LIMIT": ("", "nothing is compiled after the warm-up, so there is no limit to set"),
    "DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT": ("", "nothing is compiled after the warm-up, so there is no limit to set"),
    "MIDRUN_CAP_LOG_UPDATES": ("1", "every change of that cap is logged"),
    "MATRIX_CLIP_SIGMAS": ("", "no tensor falls into its class; use ATTN_CLIP_SIGMAS, MLP_CLIP_SIGMAS, EMBED_CLIP_SIGMAS"),
    "LQER_GROUP_SIZE": ("", "ignored by the system that published it; use LQER_ASYM_GROUP"),
    "PERGROUP_ROUNDTRIP_CHECK": ("1", "every artifact is read back and compared, whatever the compressor"),
    "TTT_EVAL_BATCHES": ("", "it reordered the documents; every document is scored, in the order that TTT_ORDER names"),
    "TTT_TRAIN_MIN_DOC_LEN": ("0", "whether a document is trained on may not depend on a length that is not known yet"),
    "TTT_TRAIN_MAX_DOC_LEN": ("0", "whether a document is trained on may not depend on a length that is not known yet"),
    "TTT_SHORT_LORA_ENABLED": ("0", ADAPTER), "TTT_SHORT_LORA_RANK": ("", ADAPTER), "TTT_SHORT_LORA_LR": ("", ADAPTER),
    "TTT_SHORT_WEIGHT_DECAY": ("", ADAPTER), "TTT_SHORT_BETA2": ("", ADAPTER), "TTT_WARM_START_MEAN_ENABLED": ("0", ADAPTER),
    "TTT_WARM_START_MEAN_DOC_LEN": ("", ADAPTER), "TTT_WARM_START_MEAN_MOMENTUM": ("", ADAPTER),
    "PHASED_TTT_ENABLED": ("", "ignored by the systems that published it; PHASED_TTT_PREFIX_DOCS=0 turns the phase off"),
    "GLOBAL_TTT_BATCH_SEQS": ("", "one step takes GLOBAL_TTT_CHUNK_TOKENS; no published run reached this bound"),
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": ("1", "attention never crosses a document border"),
    "GLOBAL_TTT_MUON_NESTEROV": ("1", "Muon always looks ahead"),
    "WITHIN_BOOST": ("0", PEEKS), "WITHIN_TAU": (">1", PEEKS), "WORD_BOOST": ("0", PEEKS), "WORD_TAU": (">1", PEEKS),
    "WORD_ORDER": ("", PEEKS), "WORD_NORMALIZE": ("", PEEKS),
    "AGREE_ADD_BOOST": ("0", "only one expert is left, so none can agree"),
    "PG_NGRAM_BUILD_DIR": ("", "the C library is compiled once, into ~/.cache/online_ngram"),
}
# Names under which one of the published systems knows settings that another calls otherwise.
ALIASES = {"SKYLIGHT_MUON": ("SKYLIGHT_NORM_EMA", "SKYLIGHT_UW_FLOOR"), "BETA2_NORMUON": ("SKYLIGHT_NORM_BETA2",),
           "UW_FLOOR": ("SKYLIGHT_UW_RATIO",)}
TTT_MASKS = {"": "", "all": "", "baseline_all": "", "no_q": "Q", "no_v": "V", "no_qv": "QV"}  # TTT_MASK: adapters left out

# Settings that name their reader where the environment does not: (reader, its value).
IMPLIED = {"TTT_SHORT_SCORE_FIRST_ENABLED": ("TTT_ORDER", "length"), **dict.fromkeys(
    ("MATRIX_BITS", "EMBED_BITS", "ATTN_CLIP_SIGMAS", "MLP_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS", "SCALE_GRID", "AWQ_LITE_ENABLED"),
    ("STEP_RULE", "sigma"))}

# Settings that do something only with certain values of another; elsewhere they must keep their default.
READ_ONLY_WITH = {
    "muon_huber_delta": ("muon_huber_wd", (True,)), "skylight_uw_ratio": ("skylight_uw_floor", (True,)),
    "skylight_norm_beta2": ("skylight_norm_ema", (True,)), "skylight_norm_eps": ("skylight_norm_ema", (True,)),
    "val_doc_fraction": ("ttt_enabled", (True,)), "warmdown_frac": ("warmdown_iters", (0,)),
    "target_bytes": ("step_rule", ("loss",)),
    **{name: ("step_rule", ("sigma",)) for name in ("matrix_bits", "embed_bits", "attn_clip_sigmas", "mlp_clip_sigmas",
                                                    "embed_clip_sigmas", "scale_grid")},
    "token_threshold": ("ngram_boost", ("fixed", "calibrated")), "token_boost": ("ngram_boost", ("fixed",)),
    "token_backoff": ("ngram_boost", ("learned",)),
}

# First words of our names under which other programs keep variables too; there only a near miss counts as misspelt.
SHARED_PREFIXES = {"DATA_", "RUN_", "MAX_", "NUM_", "MODEL_", "LOCAL_", "WORLD_", "VOCAB_", "TOKENIZER_", "ARTIFACT_",
                   "PARALLEL_", "SKIP_", "MIN_", "ENABLE_", "FORCE_", "GLOBAL_", "TOKEN_"}


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
    quantize_only: bool = setting("Run", False, "1: no training; quantize the checkpoint that an earlier run saved")
    prequant_only: bool = setting("Run", False, "1: stop after the evaluation of the averaged weights")
    attention: str = setting("Run", "auto", "attention on CUDA: FlashAttention 4 or 3, PyTorch's kernel or plain code; auto: "
                             "the first of them that there is", choices=("auto", "fa4", "fa3", "torch", "reference"))
    recorded_passes: bool = setting("Run", True, "on CUDA training replays CUDA graphs, recorded in the warm-up; their memory "
                                    "stays taken until it ends")
    fp8: str = setting("Run", "auto", "1: training's products with weights in 8-bit floats (E4M3), but for those that make the "
                       "weights' gradients; auto: where they run, on Hopper", choices=("auto", "0", "1"))
    rank: int = setting("Run", -1, "set by torchrun", low=-1)
    local_rank: int = setting("Run", 0, "set by torchrun: index of this rank's device", low=0)
    world_size: int = setting("Run", 1, "set by torchrun", low=1)

    # --- Model
    num_layers: int = setting("Model", 11, "distinct transformer blocks", low=1)
    model_dim: int = setting("Model", 512, "width of the residual stream", low=1)
    num_heads: int = setting("Model", 4, "query heads", low=1)
    num_kv_heads: int = setting("Model", 2, "key/value heads", low=1)
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
    qk_gain_init_schedule: str = setting("Model", "", "that gain block by block, comma separated; QK_GAIN_INIT for blocks "
                                         "behind the list's end")
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
    muon_huber_wd: bool = setting("Optimizer", False, "1: that decay stops growing with weights above MUON_HUBER_DELTA")
    muon_huber_delta: float = setting("Optimizer", 0.1, "that magnitude", above=0)
    skylight_norm_ema: bool = setting("Optimizer", False, "1: rows of Muon's update are evened out by the running mean of "
                                      "their squares, the matrix's norm kept (NorMuon)")
    skylight_norm_beta2: float = setting("Optimizer", 0.95, "coefficient of that mean", low=0, below=1)
    skylight_norm_eps: float = setting("Optimizer", 1e-7, "added to it before the square root", above=0)
    skylight_uw_floor: bool = setting("Optimizer", False, "1: no update of a matrix smaller than SKYLIGHT_UW_RATIO x its norm")
    skylight_uw_ratio: float = setting("Optimizer", 0.35, "least ratio of the update's norm to the matrix's, before the "
                                       "learning rate", above=0)
    beta1: float = setting("Optimizer", 0.9, "AdamW first-moment coefficient", low=0, below=1)
    beta2: float = setting("Optimizer", 0.99, "AdamW second-moment coefficient", low=0, below=1)
    adam_eps: float = setting("Optimizer", 1e-8, "AdamW epsilon", above=0)
    adam_wd: float = setting("Optimizer", 0.02, "weight decay of vectors, scalars and gates", low=0)
    adam_wd_mode: str = setting("Optimizer", "active", "what that decay does: active: pulls toward zero what has received "
                                "gradient; init: pulls all toward the initial value; zero: pulls all toward zero, also what "
                                "idles until looping starts, as the published systems did",
                                choices=("active", "init", "zero"))
    embed_wd: float = setting("Optimizer", 0.085, "weight decay of the embedding", low=0)
    grad_clip_norm: float = setting("Optimizer", 0.3, "bound on the global norm of the averaged gradient; 0: none", low=0)
    ema_decay: float = setting("Optimizer", 0.9965, "decay per step of the weight average that is kept; 0: the last "
                               "weights themselves", low=0, below=1)

    # --- Schedule (progress = training time / cap, or steps / ITERATIONS without a cap)
    train_seq_len: int = setting("Schedule", 2048, "documents are cut into pieces of at most this length", unit="tokens",
                                 low=1)
    train_seq_schedule: str = setting("Schedule", "", "that length in stages: comma-separated length@end, each until the "
                                      "progress `end`, the longest equal to TRAIN_SEQ_LEN; empty: one length")
    train_seq_schedule_mode: str = setting("Schedule", "wallclock", "what the stages follow: progress, or step / ITERATIONS",
                                           choices=("wallclock", "step"))
    seq_change_warmup_steps: int = setting("Schedule", 0, "steps over which learning rates rise again after each change of "
                                           "length", unit="steps", low=0)
    warmup_steps: int = setting("Schedule", 3, "throw-away steps that compile everything before the clock starts",
                                unit="steps", low=0)
    lr_warmup_steps: int = setting("Schedule", 0, "steps over which every learning rate rises linearly; 0: full rate "
                                   "from the first step", unit="steps", low=0)
    warmdown_frac: float = setting("Schedule", 0.85, "last fraction of progress over which learning rates fall", low=0,
                                   high=1)
    warmdown_iters: int = setting("Schedule", 0, "above 0: they fall over this many last steps instead, as far as the mean "
                                  "step so far can tell", unit="steps", low=0)
    min_lr: float = setting("Schedule", 0.1, "floor of the learning-rate multiplier", low=0, high=1)
    midrun_cap_schedule: str = setting("Schedule", "", "comma-separated factor@start: from the progress `start` on learning "
                                       "rates are multiplied by `factor`, at most 1; empty: never")
    enable_looping_at: float = setting("Schedule", 0.35, "progress at which looping starts", low=0, high=1)
    muon_momentum_warmup_start: float = setting("Schedule", 0.92, "Muon momentum of the first step", low=0, below=1)
    muon_momentum_warmup_steps: int = setting("Schedule", 1500, "steps until MUON_MOMENTUM is reached", unit="steps",
                                              low=0)
    gptq_reserve_seconds: float = setting("Schedule", 0.5, "taken off MAX_WALLCLOCK_SECONDS for calibration, unless its "
                                          "measured estimate is longer", unit="s", low=0)

    # --- Artifact
    matrix_bits: int = setting("Artifact", 6, "bits of attention and MLP matrices", unit="bits", low=2, high=8)
    embed_bits: int = setting("Artifact", 7, "bits of the embedding", unit="bits", low=2, high=8)
    attn_clip_sigmas: float = setting("Artifact", 13.0, "clip of attention matrices, in deviations of the row", above=0)
    mlp_clip_sigmas: float = setting("Artifact", 11.5, "clip of MLP matrices, in deviations of the row", above=0)
    embed_clip_sigmas: float = setting("Artifact", 14.0, "clip of the embedding, in deviations of the row", above=0)
    step_rule: str = setting("Artifact", "loss", "quantization steps: loss: every weight shall add the same predicted loss, "
                             "sized to TARGET_BYTES; sigma: by the *_BITS and *_CLIP_SIGMAS, chosen by naming one of them",
                             choices=("loss", "sigma"))
    target_bytes: int = setting("Artifact", 15_998_000, "artifact and code together, for STEP_RULE=loss",
                                unit="bytes", low=1, high=15_999_999)
    trellis_enabled: bool = setting("Artifact", True, "1: trellis-coded quantization; 0: rounding to nearest")
    scale_grid: str = setting("Artifact", "log", "row scales with STEP_RULE=sigma: a logarithmic grid or float16",
                              choices=("log", "fp16"))
    gptq_calibration_batches: int = setting("Artifact", 32, "training text for the Hessians, over all ranks, in eighths of "
                                            "TRAIN_BATCH_TOKENS; 0: no Hessians, no error feedback", low=0)
    gptq_calibration_mode: str = setting("Artifact", "random", "its windows begin anywhere or at document starts",
                                         choices=("random", "doc_start"))
    gated_attn_quant_gate: bool = setting("Artifact", False, "1: head gates as int8 rows; 0: as float16")
    optrot_enabled: bool = setting("Artifact", False, "1: Hadamard rotation of each head's values and the output "
                                   "projection before quantization")
    awq_lite_enabled: bool = setting("Artifact", False, "1: some groups of columns get AWQ_LITE_BITS")
    awq_lite_bits: int = setting("Artifact", 8, "bits of those groups", unit="bits", low=2, high=8)
    awq_lite_group_top_k: int = setting("Artifact", 1, "how many groups at most, over all matrices", low=0)
    awq_lite_group_size: int = setting("Artifact", 64, "columns of a group", low=1)
    awq_lite_weighted: bool = setting("Artifact", False, "1: choose by predicted loss per byte; 0: by input RMS x weight")
    lqer_enabled: bool = setting("Artifact", False, "1: low-rank correction of the matrices that need it most")
    lqer_rank: int = setting("Artifact", 4, "rank of a correction", low=1, high=64)
    lqer_top_k: int = setting("Artifact", 3, "how many matrices at most", low=0)
    lqer_factor_bits: int = setting("Artifact", 4, "bits of both factors with LQER_ASYM_ENABLED=0", unit="bits", low=2,
                                    high=8)
    lqer_asym_enabled: bool = setting("Artifact", True, "1: left factor 2 bits, right 4; 0: both LQER_FACTOR_BITS")
    lqer_asym_group: int = setting("Artifact", 64, "values of the right factor that share a scale", low=1)
    lqer_scope: str = setting("Artifact", "all", "which matrices", choices=("all", "mlp", "attn", "embed"))
    lqer_gain_select: bool = setting("Artifact", False, "1: choose by the error that goes away; 0: by its size")
    lqer_weighted: bool = setting("Artifact", False, "1: fit to and choose by predicted loss, only what pays for its bytes")
    compressor: str = setting("Artifact", "entropy", "how the integers are coded",
                              choices=("entropy", "pergroup", "brotli", "lzma"))

    # --- Evaluation
    eval_seq_len: int = setting("Evaluation", 2560, "longest context of plain evaluation", unit="tokens", low=1)
    eval_stride: int = setting("Evaluation", 0, "0: disjoint windows; else windows advance by this many tokens and score "
                               "only what is new, so every token past the first window sees at least EVAL_SEQ_LEN - "
                               "EVAL_STRIDE tokens of context", unit="tokens", low=0)
    val_batch_tokens: int = setting("Evaluation", 524288, "one eighth of it is one packed batch of plain evaluation",
                                    unit="tokens", low=8)
    val_doc_fraction: float = setting("Evaluation", 1.0, "share of the validation documents that test-time training scores, "
                                      "drawn by SEED; below 1: no valid record", above=0, high=1)

    # --- Test-time training (TTT): every chunk is scored, then its document's adapters are trained on it
    ttt_enabled: bool = setting("Test-time training", True, "1: score once more, adapting to what has been scored")
    ttt_context: str = setting("Test-time training", "cache", "what a chunk sees of its document: cache: keys and values as "
                               "they were when scored; recompute: its window, computed again with the newest adapters",
                               choices=("cache", "recompute"))
    ttt_order: str = setting("Test-time training", "stream", "stream: documents in order, the next takes the first free "
                             "slot; length: the longest first and hints in the order of the text, as the published systems "
                             "did, for which no decoder exists", choices=("stream", "length"))
    ttt_batch_size: int = setting("Test-time training", 64, "an eighth of the slots, in which documents are scored side by "
                                  "side; ranks share the slots", low=1)
    ttt_chunk_size: int = setting("Test-time training", 48, "scored before each update", unit="tokens", low=1)
    ttt_chunk_growth: float = setting("Test-time training", 0.03125, "chunks grow to this share of the text before them, in "
                                      "whole TTT_CHUNK_SIZE; 0: they do not", low=0, high=1)
    ttt_chunk_max: int = setting("Test-time training", 96, "largest chunk then", unit="tokens", low=1)
    ttt_eval_seq_len: int = setting("Test-time training", 3072, "longest context, chunk included", unit="tokens", low=1)
    ttt_micro_batch_tokens: int = setting("Test-time training", 32768, "bound on the inputs of one forward pass, for memory",
                                          unit="tokens", low=1)
    ttt_lora_rank: int = setting("Test-time training", 32, "rank of an adapter", low=1)
    ttt_lora_alpha: float = setting("Test-time training", 144.0, "an adapter's output is scaled by this / rank", low=0)
    ttt_mask: str = setting("Test-time training", "", "turns TTT_Q_LORA, TTT_V_LORA or both off where they are not set",
                            choices=tuple(TTT_MASKS))
    ttt_q_lora: bool = setting("Test-time training", True, "1: adapters on queries")
    ttt_k_lora: bool = setting("Test-time training", False, "1: adapters on keys")
    ttt_v_lora: bool = setting("Test-time training", True, "1: adapters on values")
    ttt_o_lora: bool = setting("Test-time training", True, "1: adapters from the block input to the attention output")
    ttt_mlp_lora: bool = setting("Test-time training", True, "1: adapters parallel to the MLPs; the head always has one")
    ttt_warm_start_a: bool = setting("Test-time training", True, "1: a new document keeps its slot's A; 0: it draws its own")
    ttt_optimizer: str = setting("Test-time training", "adam", "AdamW, or SGD with momentum TTT_BETA1",
                                 choices=("adam", "sgd"))
    ttt_lora_lr: float = setting("Test-time training", 1.2e-4, "learning rate of the adapters", low=0)
    ttt_local_lr_mult: float = setting("Test-time training", 1.0, "factor on that rate", low=0)
    ttt_lr_chunk_power: float = setting("Test-time training", 1.0, "a chunk k times as long as the document's first is trained "
                                        "on with k to this power times the rate", low=0, high=2)
    ttt_weight_decay: float = setting("Test-time training", 2.0, "weight decay of the adapters", low=0)
    ttt_beta1: float = setting("Test-time training", 0.0, "first-moment coefficient", low=0, below=1)
    ttt_beta2: float = setting("Test-time training", 0.99, "second-moment coefficient", low=0, below=1)
    temperature_scale: float = setting("Test-time training", 1.0, "divides the scores before the soft cap", above=0)
    ttt_grad_steps: int = setting("Test-time training", 1, "updates after each chunk, every one with a gradient of its own",
                                  low=1)
    ttt_grad_steps_clean: bool = setting("Test-time training", True, "0: they add to the gradients before them, as in #2135")
    ttt_update_every: int = setting("Test-time training", 1, "chunks whose gradients are summed for an update", low=1)
    ttt_lora_ema_decay: float = setting("Test-time training", 0.0, "above 0: the scores come from an average of the adapters "
                                        "with this decay per update, at the cost of a forward pass", low=0, below=1)
    ttt_short_score_first_enabled: bool = setting("Test-time training", False, "1: chunk by the document's length, which only "
                                                  "TTT_ORDER=length knows in advance")
    ttt_short_score_first_steps: str = setting("Test-time training", "", "then: length:chunk pairs, comma separated, lengths "
                                               "in tokens with both BOS; the first length that is not exceeded counts")
    ttt_short_doc_len: int = setting("Test-time training", 2000, "without such pairs: the length up to which ...",
                                     unit="tokens", low=1)
    ttt_short_chunk_size: int = setting("Test-time training", 48, "... chunks have this size", unit="tokens", low=1)

    # --- Global phases of test-time training: all weights are trained on documents that are completely scored
    phased_ttt_prefix_docs: int = setting("Global test-time training", 2500, "scored documents after which the last phase "
                                          "comes; 0: no phase", low=0)
    phased_ttt_num_phases: int = setting("Global test-time training", 1, "phases, at equal fractions of that count, each on "
                                         "all documents scored by then", low=1)
    global_ttt_optimizer: str = setting("Global test-time training", "sgd", "sgd: for all weights; muon: Muon for the banks",
                                        choices=("sgd", "muon"))
    global_ttt_lr: float = setting("Global test-time training", 0.001, "learning rate at the start of a phase; it falls to 0 "
                                   "as a cosine", low=0)
    global_ttt_momentum: float = setting("Global test-time training", 0.9, "momentum", low=0, below=1)
    global_ttt_muon_ns_steps: int = setting("Global test-time training", 5, "Newton-Schulz iterations with muon", low=1,
                                            high=5)
    global_ttt_epochs: int = setting("Global test-time training", 1, "steps on each chunk", low=1)
    global_ttt_chunk_tokens: int = setting("Global test-time training", 32768, "one chunk, over all ranks", unit="tokens",
                                           low=1)
    global_ttt_warmup_chunks: int = setting("Global test-time training", 0, "chunks over which the learning rate first rises",
                                            low=0)
    global_ttt_warmup_start_lr: float = setting("Global test-time training", 0.0, "from this value", low=0)
    global_ttt_grad_clip: float = setting("Global test-time training", 1.0, "bound on the gradient's global norm; 0: none",
                                          low=0)

    # --- N-gram tilt of the scores of test-time training
    ngram_tilt_enabled: bool = setting("N-gram tilt", True, "1: tilt toward what has followed the last tokens most often")
    ngram_boost: str = setting("N-gram tilt", "learned", "fixed: by TOKEN_BOOST; calibrated: to the hit rate so far; learned: "
                               "a logistic mixture of that rate and the model, fitted while scoring", choices=ngram.MODES)
    ngram_hint_precompute_outside: bool = setting("N-gram tilt", False, "1: hints before the timer starts, no valid record")
    token_order: int = setting("N-gram tilt", 16, "the context is one token less", unit="tokens", low=2, high=256)
    token_backoff: str = setting("N-gram tilt", "10,6", "learned: shorter orders that are asked in turn where a context is "
                                 "new; comma separated, empty: none")
    token_threshold: float = setting("N-gram tilt", 0.8, "fixed, calibrated: smallest share of a hint among its context's "
                                     "continuations", low=0, high=1)
    token_boost: float = setting("N-gram tilt", 2.625, "fixed: the boost", unit="nats", low=0, high=50)

    @classmethod
    def from_environment(cls, environ) -> Settings:
        """Read every setting from the mapping `environ`; raises InputError with all problems at once, a line each."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        problems = [f"{name}: {why}; " + (f"set it to {accepted} or unset it" if accepted else "unset it")
                    for name, (accepted, why) in FIXED_SETTINGS.items() if name in environ and
                    not (accepted and is_value(environ[name], accepted))]
        masked = {f"TTT_{letter}_LORA": "0" for letter in TTT_MASKS.get(environ.get("TTT_MASK", ""), "")}
        aliased = {name: alias for alias, names in ALIASES.items() if alias in environ for name in names}
        for name, alias in aliased.items():
            if environ.get(name, environ[alias]) != environ[alias]:
                problems.append(f"{alias}: {environ[alias]}, but {name}={environ[name]} means the same; unset one of them")
        implied = dict(IMPLIED[name] for name in IMPLIED if environ.get(name, "0") != "0")
        environ, values = masked | implied | {name: environ[alias] for name, alias in aliased.items()} | dict(environ), {}
        for name, field in fields.items():
            if name in environ:
                try:
                    values[field.name] = parse_setting(aliased.get(name, name), environ[name], field)
                except InputError as error:
                    problems.append(str(error))
        ours = tuple({"_".join(name.split("_")[:k]) + "_" for name in fields for k in (1, 2) if name.count("_") >= k}
                     - SHARED_PREFIXES)
        for name in sorted(environ.keys() - fields.keys() - FIXED_SETTINGS.keys() - ALIASES.keys()):
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0 if name.startswith(ours) else 0.9)
            if nearest:
                problems.append(f"{name}: no such setting; the nearest is {nearest[0]}")
        settings = cls(**values)
        problems += settings.conflicts()
        if problems:
            raise InputError("\n".join(dict.fromkeys(problems)))
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
        require(len(s.gains) <= s.num_layers and all(0 < gain < math.inf for gain in s.gains), "QK_GAIN_INIT_SCHEDULE: "
                f"{s.qk_gain_init_schedule!r} is no list of at most NUM_LAYERS={s.num_layers} positive gains like 5.0,5.25")
        stages, caps = s.stages(s.train_seq_schedule), s.stages(s.midrun_cap_schedule)
        fine = all(length >= 1 and length == int(length) and end > 0 for length, end in stages or ())
        require(stages is not None and fine, f"TRAIN_SEQ_SCHEDULE: {s.train_seq_schedule!r} is no list like 1024@0.1,2048@1.0 "
                "of whole lengths, each with an end of its own in (0, 1]")
        require(not stages or not fine or max(stages)[0] == s.train_seq_len, f"TRAIN_SEQ_LEN: {s.train_seq_len} is not the "
                f"longest length of TRAIN_SEQ_SCHEDULE={s.train_seq_schedule}; make them equal")
        require(stages or stages is None or not s.seq_change_warmup_steps and s.train_seq_schedule_mode == "wallclock",
                "SEQ_CHANGE_WARMUP_STEPS, TRAIN_SEQ_SCHEDULE_MODE: they are read only with TRAIN_SEQ_SCHEDULE; set that or "
                "leave them unset")
        require(caps is not None and all(0 < cap <= 1 for cap, _ in caps), f"MIDRUN_CAP_SCHEDULE: {s.midrun_cap_schedule!r} is "
                "no list like 0.5@0.3,1.0@0.6 of factors in (0, 1], each with a start of its own in [0, 1]")
        require(s.max_wallclock_seconds == 0 or s.max_wallclock_seconds > s.gptq_reserve_seconds,
                f"GPTQ_RESERVE_SECONDS: {s.gptq_reserve_seconds} leaves nothing of MAX_WALLCLOCK_SECONDS="
                f"{s.max_wallclock_seconds}")
        require(s.eval_batch_tokens >= s.eval_seq_len,
                f"VAL_BATCH_TOKENS: one eighth of {s.val_batch_tokens} is below EVAL_SEQ_LEN={s.eval_seq_len}")
        require(s.eval_stride <= s.eval_seq_len, f"EVAL_STRIDE: {s.eval_stride} is above EVAL_SEQ_LEN={s.eval_seq_len}")
        for name, (switch, read) in READ_ONLY_WITH.items():
            require(getattr(s, switch) in read or getattr(s, name) == getattr(Settings, name), f"{name.upper()}: it is read "
                    f"only with {switch.upper()}={' or '.join(map(setting_text, read))}; set that or leave it unset")
        require(s.step_rule == "sigma" or not s.awq_lite_enabled, "AWQ_LITE_ENABLED: STEP_RULE=loss gives every column its own "
                "step; set STEP_RULE=sigma or unset it")
        require(not (s.lqer_enabled and s.lqer_weighted and s.lqer_gain_select),
                "LQER_GAIN_SELECT: LQER_WEIGHTED=1 chooses by predicted loss; unset one of them")
        require(gates or not s.gated_attn_quant_gate, "GATED_ATTN_QUANT_GATE: no head gate is on; unset it or turn one on")
        require(not s.awq_lite_enabled or s.awq_lite_bits > min(s.matrix_bits, s.embed_bits),
                f"AWQ_LITE_BITS: {s.awq_lite_bits} is above neither MATRIX_BITS nor EMBED_BITS; raise it")
        if s.lqer_enabled and s.lqer_asym_enabled:
            require(s.lqer_rank * s.model_dim % s.lqer_asym_group == 0 == s.lqer_rank * s.mlp_dim % s.lqer_asym_group,
                    f"LQER_ASYM_GROUP: {s.lqer_asym_group} does not divide LQER_RANK={s.lqer_rank} x the matrices' columns")
        require(not s.lqer_enabled or s.lqer_rank <= s.kv_dim,
                f"LQER_RANK: {s.lqer_rank} is above {s.kv_dim}, the rows of the key and value matrices")
        require(s.gptq_calibration_batches or not s.uses_curvature,
                "GPTQ_CALIBRATION_BATCHES: STEP_RULE=loss, LQER_WEIGHTED and AWQ_LITE_WEIGHTED need calibration; raise it")
        require(not s.optrot_enabled or s.head_dim & (s.head_dim - 1) == 0,
                f"OPTROT_ENABLED: the head width {s.head_dim} is no power of two; unset it")
        require(not (s.ttt_eval_only and s.quantize_only), "QUANTIZE_ONLY: it has no meaning with TTT_EVAL_ONLY=1")
        orders = [s.token_order, *map(int, re.findall(r"\d+", s.token_backoff))]
        falling = all(a > b > 1 for a, b in itertools.pairwise(orders)) or s.token_backoff == Settings.token_backoff
        require(re.fullmatch(r"(\d{1,3}(,(?=\d)|$))*", s.token_backoff) and falling, f"TOKEN_BACKOFF: {s.token_backoff!r} is "
                f"no list of falling orders from 2 to below TOKEN_ORDER={s.token_order}")
        require(s.ttt_update_every == 1 or s.ttt_grad_steps == 1,
                "TTT_UPDATE_EVERY: above 1 it does not go with TTT_GRAD_STEPS above 1")
        largest = max(s.ttt_chunk_size, s.ttt_chunk_max * (s.ttt_chunk_growth > 0),
                      *s.short_chunks.values() if s.ttt_short_score_first_enabled else ())
        require(s.ttt_eval_seq_len >= largest, f"TTT_EVAL_SEQ_LEN: {s.ttt_eval_seq_len} is below the largest chunk, {largest}")
        require(not s.ttt_short_score_first_enabled or s.ttt_order == "length",
                "TTT_SHORT_SCORE_FIRST_ENABLED: a chunk by the document's length cannot be decoded; set TTT_ORDER=length")
        require(re.fullmatch(r"([1-9]\d*[:=][1-9]\d*(,(?=\d)|$))*", s.ttt_short_score_first_steps),
                f"TTT_SHORT_SCORE_FIRST_STEPS: {s.ttt_short_score_first_steps!r} is no list like 256:16,2000:32")
        return found

    # Derived values; none of them is a setting of its own.
    head_dim = property(lambda s: s.model_dim // s.num_heads)
    kv_dim = property(lambda s: s.num_kv_heads * s.head_dim)
    mlp_dim = property(lambda s: int(s.model_dim * s.mlp_mult))
    rotary_dims = property(lambda s: s.rope_dims or s.head_dim)
    eval_batch_tokens = property(lambda s: s.val_batch_tokens // 8)
    loops_at_end = property(lambda s: s.num_loops > 0 and s.enable_looping_at < 1)
    shards_dir = property(lambda s: s.data_path or os.path.join(
        s.data_dir, "datasets/fineweb10B_sp8192_caseops/datasets/datasets", f"fineweb10B_sp8192_{CASEOPS_NAME}"))
    tokenizer_file = property(lambda s: s.tokenizer_path or os.path.join(
        s.data_dir, "datasets/fineweb10B_sp8192_caseops/datasets/tokenizers", f"fineweb_8192_bpe_{CASEOPS_NAME}.model"))
    log_dir = property(lambda s: s.artifact_dir or "logs")
    artifact_path = property(lambda s: os.path.join(s.artifact_dir, "final_model.int6.ptz"))
    checkpoint_path = property(lambda s: os.path.join(s.artifact_dir, "final_model.fp32.ptz"))
    gains = property(lambda s: [number(gain) for gain in s.qk_gain_init_schedule.split(",")] if s.qk_gain_init_schedule else [])
    ttt_slots = property(lambda s: 8 * s.ttt_batch_size)
    token_orders = property(lambda s: [s.token_order] + [k for k in map(int, re.findall(r"\d+", s.token_backoff)) if
                                                         k < s.token_order and s.ngram_boost == "learned"])
    uses_curvature = property(lambda s: s.step_rule == "loss" or s.awq_lite_enabled and s.awq_lite_weighted
                              or s.lqer_enabled and s.lqer_weighted)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step, 0 if none fits. The published systems fix ranks x micro-batches at 8."""
        candidates = [self.grad_accum_steps] if self.grad_accum_steps else range(-(-8 // self.world_size), 65)
        return next((a for a in candidates if self.train_batch_tokens % (self.world_size * a) == 0), 0)

    @property
    def micro_batch_tokens(self) -> int:
        return self.train_batch_tokens // (self.world_size * self.accumulation)

    @staticmethod
    def stages(text: str) -> list[tuple[float, float]] | None:
        """The (value, point) pairs of a list like 1024@0.1,2048@1.0 in the order of their points; None if it is none."""
        if not re.fullmatch(r"([\d.]+@[\d.]+(,(?=[\d.])|$))*", text):
            return None
        pairs = [tuple(map(number, pair.split("@"))) for pair in text.split(",") if pair]
        sound = len({point for _, point in pairs}) == len(pairs) and all(v > 0 and 0 <= point <= 1 for v, point in pairs)
        return sorted(pairs, key=lambda pair: pair[1]) if sound else None

    def context_at(self, progress: float, step: int) -> int:
        """The length at which documents are cut in this step."""
        share = min(1.0, step / self.iterations) if self.train_seq_schedule_mode == "step" else progress
        stages = self.stages(self.train_seq_schedule) or [(self.train_seq_len, 1.0)]
        return int(next((length for length, end in stages if share <= end), stages[-1][0]))

    def first_chunk(self, length: int) -> int:
        """The size of a document's first chunk; its `length`, in targets, counts with TTT_SHORT_SCORE_FIRST_ENABLED alone."""
        if not self.ttt_short_score_first_enabled:
            return self.ttt_chunk_size
        return next((size for limit, size in self.short_chunks.items() if length < limit), self.ttt_chunk_size)

    @functools.cached_property
    def short_chunks(self) -> dict[int, int]:
        """Chunk sizes by the length, both BOS counted, up to which they hold, shortest first."""
        pairs = self.ttt_short_score_first_steps or f"{self.ttt_short_doc_len}:{self.ttt_short_chunk_size}"
        return dict(sorted(tuple(map(int, pair)) for pair in re.findall(r"(\d+)[:=](\d+)", pairs)))

    def function_settings(self) -> dict:
        """The settings that change what function a set of weights computes; they travel in the artifact."""
        free = {"tied_embed_init_std", "qk_gain_init", "qk_gain_init_schedule", "sparse_attn_gate_init_std",
                "gated_attn_init_std"}
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.metadata["group"] in ("Model", "Gates") and f.name not in free}
        return chosen | {"vocab_size": self.vocab_size}


def number(text: str) -> float:
    """The number that the text stands for, NaN if none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def is_value(text: str, accepted: str) -> bool:
    """Whether a variable's text means the accepted value: a number, a bound like >1, or a word."""
    if accepted.startswith(">"):
        return number(text) > float(accepted[1:])
    return text == accepted or number(text) == number(accepted)


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
    lines = [(__doc__ or "").strip(), "", "Settings are environment variables.", "  --help   this text",
             "  --check  validate settings and data, then stop",
             "  --diff A B  what two recipes (names or files) set differently, then stop",
             "  --pack-code FILE  write the one self-extracting script that a submission ships, then stop"]
    for group, fields in itertools.groupby(dataclasses.fields(Settings), key=lambda f: f.metadata["group"]):
        lines += ["", group]
        for f in fields:
            limits = "0|1" if isinstance(f.default, bool) else describe_range(f.metadata)
            facts = "; ".join(filter(None, (f"default {setting_text(f.default)}", f.metadata["unit"], limits)))
            lines += [f"  {f.name.upper()}  ({facts})"] + textwrap.wrap(
                f.metadata["text"], 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def read_recipe(name: str) -> Settings:
    """The settings of recipes/NAME.env, or of the file NAME: lines NAME=VALUE, empty ones, and comments that begin with #."""
    here = os.path.dirname(os.path.abspath(PACKED_SCRIPT or __file__))
    path = name if os.path.exists(name) else os.path.join(here, "recipes", f"{name}.env")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        return Settings.from_environment(dict(re.fullmatch(r"(\w+)=(.*)", line).groups() for line in lines))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name one of recipes/*.env or a file like them") from None
    except (UnicodeDecodeError, AttributeError):
        raise InputError(f"{path}: no recipe, which has lines NAME=VALUE and comments alone") from None
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def settings_diff(names: list[str]) -> str:
    """The settings in which two recipes differ, grouped like settings_help, a line each."""
    sides, lines = [read_recipe(name) for name in names], []
    for group, fields in itertools.groupby(dataclasses.fields(Settings), key=lambda f: f.metadata["group"]):
        values = [(f.name.upper(), *(setting_text(getattr(side, f.name)) for side in sides)) for f in fields]
        changed = [row for row in values if row[1] != row[2]]
        lines += ["", group] * bool(changed) + [f"  {name:30} {a:>24} {b:>24}" for name, a, b in changed]
    return "\n".join([f"{'':32} {names[0]:>24} {names[1]:>24}", *(lines or ["no difference"])])


def setting_text(value) -> str:
    """A setting's value as the environment would say it."""
    return str(int(value)) if isinstance(value, bool) else str(value) if value != "" else "(empty)"


# ======================================================================================================================
# 2. Runtime
# ======================================================================================================================


IMPORTED = time.perf_counter()

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
            torch.set_num_threads(min(8, torch.get_num_threads()))  # one for each core of a large host gets in the others' way
        distributed = settings.world_size > 1
        if distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                                    timeout=datetime.timedelta(minutes=30), device_id=device if on_cuda else None)
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
        torch._dynamo.config.recompile_limit = 64  # a function is compiled per shape and dtype
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


def process_seconds() -> float:
    """Seconds since this process was started, so far as the system says."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


def write_atomically(path: str, data: bytes) -> None:
    """`path` holds either what it held before or all of `data`, whatever happens on the way."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error, OSError) and not error.filename:
            error.filename = path
        raise
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def ahead(items, depth: int):
    """The items, an iterable, taken by a thread that runs up to `depth` of them ahead; it ends with the context.

    What is raised while taking an item is raised where that item is asked for.
    """
    ready, stopped, end = queue.Queue(depth), threading.Event(), object()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def produce():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except Exception as error:
            put((end, error))

    def consume():
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        thread.join()


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@contextmanager
def progress_bar(total: float, unit: str, text: str, runtime: Runtime):
    """Yields a function of (what is done, a note) that draws a bar on rank 0's terminal; where stderr is none, nothing."""
    with tqdm(total=round(total), unit=unit, desc=text, disable=runtime.rank > 0 or not sys.stderr.isatty(), leave=False,
              dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} {postfix}") as bar:
        def show(done: float, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(min(round(done), bar.total) - bar.n)  # tqdm draws nothing beyond its total

        yield show


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
            self.lock = self.claim(os.path.dirname(settings.artifact_path) or ".", settings.ttt_eval_only)
            self.file = open(self.path + ".txt", "w", buffering=1, encoding="utf-8")
            self.save()

    def claim(self, folder: str, reads_only: bool) -> int:
        """Hold the folder of the artifact, together with other runs that only read it, until the process ends."""
        if not os.access(folder, os.W_OK):
            raise InputError(f"ARTIFACT_DIR: no permission to write in {folder}; choose another folder")
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_SH if reads_only else fcntl.LOCK_EX))
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"ARTIFACT_DIR: another run is writing its artifact in {folder}; wait for its end, or choose "
                             "another folder") from None
        except OSError:  # a file system without locks
            pass
        return handle

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
            tqdm.write(text)  # above a bar, if there is one
            sys.stdout.flush()

    def save(self) -> None:
        if self.active:
            write_atomically(self.path + ".json", (json.dumps(self.record, indent=1) + "\n").encode())

    def close(self, status: str, **fields) -> None:
        self.record["status"] = status
        self.event(status, **fields)
        self.save()
        if self.active:
            self.file.close()
            os.close(self.lock)


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
    previous: Tensor | None = None  # (T,) the token before each in its document, where that is not the left neighbour


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
        """The batch on the device."""
        def move(tensor):
            return tensor.pin_memory().to(runtime.device, non_blocking=True) if runtime.on_cuda else tensor
        segments = self.segments._replace(cu_seqlens=move(self.segments.cu_seqlens),
                                          positions=move(self.segments.positions))
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

    def batch(self, step: int, micro: int, max_seqlen: int) -> Batch:
        """This rank's micro-batch on the host. Neighbouring micro-batches share one token: the target of the first."""
        s, r = self.settings, self.runtime
        length = s.micro_batch_tokens
        tokens = self.read(((step * s.accumulation + micro) * r.world_size + r.rank) * length, length + 1)
        bounds = segment_bounds(np.flatnonzero(tokens[:-1] == BOS_ID), length, max_seqlen)
        return Batch(torch.from_numpy(tokens[:-1].copy()), torch.from_numpy(tokens[1:].copy()),
                     make_segments(bounds, max_seqlen))

    def stream(self, max_seqlen: int, first: int = 0):
        """Yield this rank's micro-batches from step `first` on, on the device, documents cut to `max_seqlen` tokens."""
        order = ((step, micro, max_seqlen) for step in itertools.count(first) for micro in range(self.settings.accumulation))
        with ahead(itertools.starmap(self.batch, order), 4) as batches:
            for batch in batches:
                yield batch.to(self.runtime)

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
                raise InputError(f"EVAL_INCLUDE_TAIL: the {len(self.tokens)} validation tokens fill no window of "
                                 f"EVAL_SEQ_LEN={settings.eval_seq_len}; set EVAL_INCLUDE_TAIL=1")
            self.tokens, self.bytes = self.tokens[:keep], self.bytes[:keep]

    def sample(self, fraction: float, seed: int) -> ValidationData:
        """That share of the documents, at least one, drawn without replacement and kept in order."""
        starts = np.unique(np.concatenate(([0], np.flatnonzero(self.tokens[:-1] == BOS_ID))))
        count = max(1, round(fraction * len(starts)))
        chosen = np.sort(np.random.default_rng(seed).choice(len(starts), count, replace=False))
        keep = np.isin(np.searchsorted(starts, np.arange(len(self.tokens)), side="right") - 1, chosen)
        some = copy.copy(self)
        some.tokens, some.bytes = self.tokens[keep], self.bytes[keep]
        return some


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


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str,
              copies: int = 1) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside each segment; q (T, heads, D), k and v (T, kv_heads, D), result like q.

    Query heads are dealt to key/value heads in order: heads / kv_heads neighbours share one. Scores are scaled by
    1/sqrt(D). kernel: one that attention_kernel() returns, in bf16 on CUDA; on the CPU always the reference. Key and value
    heads may come `copies` times in a row; a forward pass that need not read all of them is told so. Beside the result: what
    xsa_gate may take as `lse`, or None.
    """
    if not q.is_cuda or kernel == "reference":
        return reference_attention(q, k, v, segments), None
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    if kernel == "fa4":
        return FlashAttention4.apply(q, k, v, cu, longest, copies)
    if kernel == "fa3":
        return flash_attention_3(q, k, v, cu, longest), None
    return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0], None


FLASH_ATTENTION = {  # in order of preference: the module, and where it comes from
    "fa4": ("flash_attn.cute.interface", "install requirements-cuda.txt"),
    "fa3": ("flash_attn_interface", "build it from the folder hopper of the flash-attention sources")}


@functools.cache
def attention_kernel(wanted: str) -> str:
    """The kernel that ATTENTION stands for on this machine; InputError where the one that is asked for is not there."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for kernel, (module, remedy) in FLASH_ATTENTION.items():
        if wanted == kernel or wanted == "auto" and hopper:
            try:
                importlib.import_module(module)
                warnings.filterwarnings("ignore", "Argument aux_data")  # fa4 at its first calls, about what is None
                try_attention(kernel)
                return kernel
            except Exception as error:  # it fails in many ways where it does not fit
                if wanted == kernel:
                    raise InputError(f"ATTENTION: {kernel} does not load ({type(error).__name__}: {error}); {remedy}, or "
                                     "choose auto or torch") from None
    return "torch" if wanted == "auto" else wanted


def try_attention(kernel: str) -> None:
    """Raises whatever it raises on this machine."""
    q = torch.zeros(128, 8, 64, dtype=torch.bfloat16, device="cuda")
    segments = Segments(torch.tensor([0, 128], dtype=torch.int32, device="cuda"), None, 2048)
    attention(q, q[:, :4], q[:, :4], segments, kernel)
    torch.cuda.synchronize()


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Shah et al. 2024, over packed segments, with its own derivative."""
    function = importlib.import_module(FLASH_ATTENTION["fa3"][0]).flash_attn_varlen_func
    out = function(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    return out[0] if isinstance(out, tuple) else out  # its first versions return the log-sum-exps too


class FlashAttention4(torch.autograd.Function):
    """Dao et al. 2026, over packed segments; the output (T, heads, D) and the log-sum-exps lse (heads, T) of the scores.

    The backward pass needs, per query and head, the sum of the output times its gradient, less the gradient of lse. Whoever
    knows that sum gives its negative as the gradient of lse; then the sum is not made again, nor the output read for it.
    """

    @staticmethod
    def library():
        return importlib.import_module(FLASH_ATTENTION["fa4"][0])

    @staticmethod
    def forward(ctx, q, k, v, cu, longest, copies):
        ctx.bounds = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        once, forward = slice(None, None, copies), FlashAttention4.library()._flash_attn_fwd
        out, lse = forward(q, k[:, once], v[:, once], **ctx.bounds, causal=True, return_lse=True)[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dlse is not None:
            out = out.new_zeros(out.size(-1)).expand_as(out)
        backward = FlashAttention4.library()._flash_attn_bwd
        gradients = backward(q, k, v, out, dout.contiguous(), lse, q.size(-1) ** -0.5, True, **ctx.bounds, dlse=dlse)
        return *gradients[:3], None, None, None


def reference_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same, segment by segment."""
    group = q.size(1) // k.size(1)
    lengths = segments.cu_seqlens.diff().tolist()
    pieces = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in
                   (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))))  # (1, heads, length, D) each
    outputs = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


# One compilation serves every number of tokens T, of a step of training or of test-time training.
jit = functools.partial(triton.jit, do_not_specialize=["T", "M"]) if triton else lambda function: function


def fusible(x: Tensor, *widths: int) -> bool:
    """Whether the fused kernels run: on CUDA, where all widths are powers of two."""
    return x.is_cuda and all(width & (width - 1) == 0 for width in widths)


# --- Attention with a cache -------------------------------------------------------------------------------------------


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, keys: Tensor, values: Tensor,
                     slots: Tensor, begins: Tensor, window: int) -> Tensor:
    """Attention of packed rows to themselves (causal) and to cached keys and values of their documents' past.

    q (T, heads, D), k and v (T, kv_heads, D), result like q. Row s is tokens cu[s] .. cu[s + 1] - 1; cu (S + 1,) int32,
    longest bounds a row's length. keys, values (slots, room, kv_heads, D) are rings: document position p lies at index
    p % room of slot slots[s]. begins (S,) int64: document position of the row's first token. A row of n tokens sees the
    cached positions from begins[s] + n - window on; room >= window. Scores are scaled by 1/sqrt(D), neighbouring query
    heads share a key/value head. Gradients reach q, k and v.
    """
    function = CachedAttention.apply if q.is_cuda else reference_cached_attention
    return function(q, k, v, cu, longest, keys, values, slots, begins, window)


def reference_cached_attention(q, k, v, cu, longest, keys, values, slots, begins, window):
    """The same, row by row."""
    group, room, outputs = q.size(1) // k.size(1), keys.size(1), []
    for (a, b), slot, begin in zip(itertools.pairwise(cu.tolist()), slots.tolist(), begins.tolist()):
        past = torch.arange(min(begin, max(0, begin + b - a - window)), begin, device=q.device) % room
        row_k, row_v = (torch.cat((cache[slot, past], own[a:b])).repeat_interleave(group, 1).transpose(0, 1)
                        for cache, own in ((keys, k), (values, v)))  # (heads, past + n, D) each
        visible = torch.ones(b - a, row_k.size(1), dtype=torch.bool, device=q.device).tril(len(past))
        outputs.append(F.scaled_dot_product_attention(q[a:b].transpose(0, 1), row_k, row_v, visible).transpose(0, 1))
    return torch.cat(outputs)


@jit
def row_bounds(cu, begins, s, window, room):
    """First token (int64) and length of row s, how many cached positions it sees, ring index of the oldest."""
    start, end = tl.load(cu + s), tl.load(cu + s + 1)
    begin = tl.load(begins + s).to(tl.int32)
    oldest = tl.minimum(tl.maximum(begin + (end - start) - window, 0), begin)
    return start.to(tl.int64), end - start, begin - oldest, oldest % room


@jit
def cached_block(keys, values, base, j, first, count, room, TAIL: tl.constexpr, KV_HEADS: tl.constexpr,
                 D: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values (BLOCK, D) of the cached positions j .. j + BLOCK - 1 after the oldest, and which are seen."""
    past = j + tl.arange(0, BLOCK)
    seen = (past < count) | (not TAIL)  # constant in full blocks: loads and scores then need no mask
    index = first + past
    index = tl.where(index < room, index, index - room)  # count <= room: it wraps at most once
    at = base + index[:, None] * (KV_HEADS * D) + tl.arange(0, D)[None, :]
    return (tl.load(keys + at, mask=seen[:, None], other=0.0), tl.load(values + at, mask=seen[:, None], other=0.0),
            seen[None, :])


@jit
def softmax_block(q, k, v, visible, scale, top, total, out):
    """One block of keys into the running softmax: maximum and sum (rows,), unnormalized output (rows, D)."""
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), out


@jit
def dq_block(q, dout, k, v, visible, scale, lse, delta, dq):
    """One block of keys into the gradient of the queries (rows, D)."""
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = tl.exp2(scores * scale - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


# Kernels run per (tile, kv head, row). A tile of queries holds BLOCK_M / GROUP tokens times the GROUP query heads that
# share the kv head, so that cached keys are read once for all. lse: log-sum-exp of the scores in base 2. A row's own
# keys come first: every query sees one of them, which makes the running maximum finite. Queries behind the end of a
# row are zeros that nobody reads. Masked loads of the cache give zeros: what was never written may be NaN.


@jit
def attention_forward_kernel(q, k, v, out, lse, cu, keys, values, slots, begins, window, room, scale,
                             KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    head, s = tl.program_id(1), tl.program_id(2)
    start, n, count, first = row_bounds(cu, begins, s, window, room)
    begin = tl.program_id(0) * (BLOCK_M // GROUP)
    if begin >= n:
        return
    d, m, j_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token = begin + m // GROUP
    line = token * (KV_HEADS * GROUP) + m % GROUP  # into (T, heads), from the row's first token and the first head on
    base, own, cached = (start * KV_HEADS + head) * GROUP, (start * KV_HEADS + head) * D, head * D
    cached += tl.load(slots + s).to(tl.int64) * room * (KV_HEADS * D)
    q_m = tl.load(q + base * D + (line[:, None] * D + d), mask=(token < n)[:, None], other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(0, tl.minimum(n, begin + BLOCK_M // GROUP), BLOCK_N):
        at, seen = (j + j_n)[:, None] * (KV_HEADS * D) + d, (j + j_n < n)[:, None]
        k_n = tl.load(k + own + at, mask=seen, other=0.0)
        v_n = tl.load(v + own + at, mask=seen, other=0.0)
        top, total, acc = softmax_block(q_m, k_n, v_n, (j + j_n)[None, :] <= token[:, None], scale, top, total, acc)
    full = count // BLOCK_N * BLOCK_N
    for tail in tl.static_range(2):
        for j in range(full * tail, count if tail else full, BLOCK_N):
            k_n, v_n, seen = cached_block(keys, values, cached, j, first, count, room, tail, KV_HEADS, D, BLOCK_N)
            top, total, acc = softmax_block(q_m, k_n, v_n, seen, scale, top, total, acc)
    tl.store(out + base * D + (line[:, None] * D + d), (acc / total[:, None]).to(out.dtype.element_ty),
             mask=(token < n)[:, None])
    tl.store(lse + base + line, top + tl.log2(total), mask=token < n)


@jit
def attention_dq_kernel(q, k, v, out, dout, lse, delta, dq, cu, keys, values, slots, begins, window, room, scale,
                        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Also writes delta (T, heads), the products of output and its gradient, for the other kernel."""
    head, s = tl.program_id(1), tl.program_id(2)
    start, n, count, first = row_bounds(cu, begins, s, window, room)
    begin = tl.program_id(0) * (BLOCK_M // GROUP)
    if begin >= n:
        return
    d, m, j_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token = begin + m // GROUP
    line = token * (KV_HEADS * GROUP) + m % GROUP
    base, own, cached = (start * KV_HEADS + head) * GROUP, (start * KV_HEADS + head) * D, head * D
    cached += tl.load(slots + s).to(tl.int64) * room * (KV_HEADS * D)
    at_m, inside = base * D + (line[:, None] * D + d), (token < n)[:, None]
    q_m = tl.load(q + at_m, mask=inside, other=0.0)
    dout_m = tl.load(dout + at_m, mask=inside, other=0.0)
    lse_m = tl.load(lse + base + line, mask=token < n, other=0.0)
    delta_m = tl.sum(tl.load(out + at_m, mask=inside, other=0.0).to(tl.float32) * dout_m.to(tl.float32), 1)
    tl.store(delta + base + line, delta_m, mask=token < n)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(0, tl.minimum(n, begin + BLOCK_M // GROUP), BLOCK_N):
        at, seen = (j + j_n)[:, None] * (KV_HEADS * D) + d, (j + j_n < n)[:, None]
        k_n = tl.load(k + own + at, mask=seen, other=0.0)
        v_n = tl.load(v + own + at, mask=seen, other=0.0)
        acc = dq_block(q_m, dout_m, k_n, v_n, (j + j_n)[None, :] <= token[:, None], scale, lse_m, delta_m, acc)
    full = count // BLOCK_N * BLOCK_N
    for tail in tl.static_range(2):
        for j in range(full * tail, count if tail else full, BLOCK_N):
            k_n, v_n, seen = cached_block(keys, values, cached, j, first, count, room, tail, KV_HEADS, D, BLOCK_N)
            acc = dq_block(q_m, dout_m, k_n, v_n, seen, scale, lse_m, delta_m, acc)
    tl.store(dq + at_m, (acc * (scale * 0.6931471805599453)).to(dq.dtype.element_ty), mask=inside)  # scale holds log2 e


@jit
def attention_dkv_kernel(q, k, v, dout, lse, delta, dk, dv, cu, scale,
                         KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradients of a row's own keys and values, from its own later queries. Scores are transposed: (keys, queries)."""
    head, s, begin = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK_N
    start = tl.load(cu + s).to(tl.int64)
    n = tl.load(cu + s + 1) - tl.load(cu + s)
    if begin >= n:
        return
    d, m, token_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    base = (start * KV_HEADS + head) * GROUP
    at_n, inside = (start * KV_HEADS + head) * D + (token_n[:, None] * (KV_HEADS * D) + d), (token_n < n)[:, None]
    k_n = tl.load(k + at_n, mask=inside, other=0.0)
    v_n = tl.load(v + at_n, mask=inside, other=0.0)
    dk_n = tl.zeros((BLOCK_N, D), tl.float32)
    dv_n = tl.zeros((BLOCK_N, D), tl.float32)
    for t in range(begin, n, BLOCK_M // GROUP):
        token = t + m // GROUP
        line = token * (KV_HEADS * GROUP) + m % GROUP
        at_m = base * D + (line[:, None] * D + d)
        q_m = tl.load(q + at_m, mask=(token < n)[:, None], other=0.0)
        dout_m = tl.load(dout + at_m, mask=(token < n)[:, None], other=0.0)
        lse_m = tl.load(lse + base + line, mask=token < n, other=0.0)
        delta_m = tl.load(delta + base + line, mask=token < n, other=0.0)
        scores = tl.dot(k_n, tl.trans(q_m), input_precision="ieee")
        p = tl.exp2(tl.where(token_n[:, None] <= token[None, :], scores, float("-inf")) * scale - lse_m[None, :])
        dv_n = tl.dot(p.to(dout_m.dtype), dout_m, dv_n, input_precision="ieee")
        ds = p * (tl.dot(v_n, tl.trans(dout_m), input_precision="ieee") - delta_m[None, :])
        dk_n = tl.dot(ds.to(q_m.dtype), q_m, dk_n, input_precision="ieee")
    tl.store(dk + at_n, (dk_n * (scale * 0.6931471805599453)).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at_n, dv_n.to(dv.dtype.element_ty), mask=inside)


FORWARD_TILE = dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
DQ_TILE = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
DKV_TILE = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


class CachedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu, longest, keys, values, slots, begins, window):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (_, heads, size), kv_heads, room = q.shape, k.size(1), keys.size(1)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.shape = dict(KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=size)
        ctx.longest = longest
        ctx.scale = size ** -0.5 * 1.4426950408889634  # the kernels use base 2
        # Not among the saved tensors: the rows may be stored before their backward pass, which overwrites nothing seen.
        ctx.past = keys, values, slots, begins, window, room
        tiles = triton.cdiv(longest * ctx.shape["GROUP"], FORWARD_TILE["BLOCK_M"])
        attention_forward_kernel[tiles, kv_heads, len(slots)](
            q, k, v, out, lse, cu, *ctx.past, ctx.scale, **ctx.shape, **FORWARD_TILE)
        ctx.save_for_backward(q, k, v, out, lse, cu)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu = ctx.saved_tensors
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tiles = triton.cdiv(ctx.longest * ctx.shape["GROUP"], DQ_TILE["BLOCK_M"])
        attention_dq_kernel[tiles, k.size(1), len(cu) - 1](
            q, k, v, out, dout, lse, delta, dq, cu, *ctx.past, ctx.scale, **ctx.shape, **DQ_TILE)
        attention_dkv_kernel[triton.cdiv(ctx.longest, DKV_TILE["BLOCK_N"]), k.size(1), len(cu) - 1](
            q, k, v, dout, lse, delta, dk, dv, cu, ctx.scale, **ctx.shape, **DKV_TILE)
        return dq, dk, dv, *[None] * 7


def ring_index(cu: Tensor, slots: Tensor, begins: Tensor, total: int, room: int) -> Tensor:
    """Where each of the `total` packed tokens lies in a cache of (slots * room) places: (T,) int64."""
    tokens = torch.arange(total, dtype=cu.dtype, device=cu.device)
    rows = torch.searchsorted(cu[1:], tokens, right=True)
    return slots[rows] * room + (begins[rows] + tokens - cu[rows]) % room


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """Write k and v (T, kv_heads, D) to the places `index` of keys and values (slots, room, kv_heads, D)."""
    for cache, new in ((keys, k), (values, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, index, new.detach())


# --- Losses of two tokens ---------------------------------------------------------------------------------------------


def two_value_nll(scores: Tensor, cap_pos: Tensor | float, cap_neg: Tensor | float, targets: Tensor,
                  hints: Tensor | None = None, weight: Tensor | None = None,
                  low_args: LowArgs | None = None) -> tuple[Tensor, Tensor]:
    """-log p(target) and log p(hint), (T,) float32 each, of raw logits `scores` (T, V) under the two-sided soft cap.

    Logits become c tanh(x / c), c = cap_pos where x >= 0, cap_neg elsewhere (0-dim float32 tensors or numbers). Gradients
    reach scores and caps, through the first result alone. On CUDA the backward pass writes the gradient over `scores`, which
    nothing else may need then. hints None: the targets. weight (V, d): given are not the scores but the input (T, d) of the
    product that makes them, which runs in E4M3.
    """
    function = TwoValueNLL.apply if fusible(scores) else reference_two_value_nll
    return function(scores, cap_pos, cap_neg, targets, targets if hints is None else hints, weight, low_args)


def reference_two_value_nll(scores, cap_pos, cap_neg, targets, hints, weight=None, low_args=None):
    scores = scores if weight is None else LowProduct.apply(scores, weight, low_args)
    caps = torch.where(scores >= 0, *(torch.as_tensor(cap, dtype=torch.float32) for cap in (cap_pos, cap_neg)))
    logs = (caps * torch.tanh(scores.float() / caps)).log_softmax(-1)
    return -logs.gather(1, targets[:, None])[:, 0], logs.gather(1, hints[:, None])[:, 0].detach()


@jit
def soft_cap(x, cap_pos, cap_neg):
    """tanh(x / c), a quarter of its derivative by x / c, and in units of ln 2: 2 x / c and c; float32, any shape."""
    z = x * tl.where(x >= 0, 2.8853900817779268 / cap_pos, 2.8853900817779268 / cap_neg)
    root = tl.rsqrt(1.0 + tl.exp2(z))  # its square takes fewer instructions than a division
    r = root * root
    return 1.0 - 2.0 * r, r - r * r, z, tl.where(x >= 0, cap_pos * 1.4426950408889634, cap_neg * 1.4426950408889634)


@jit
def nll_forward_kernel(scores, stride, cap_pos, cap_neg, targets, hints, nll, log_q, lse, V: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scores, cap_pos, cap_neg = scores + row * stride, tl.load(cap_pos), tl.load(cap_neg)
    target, hint = tl.load(scores + tl.load(targets + row)), tl.load(scores + tl.load(hints + row))
    t, _, _, cap = soft_cap(tl.load(scores + at, mask=at < V, other=0.0).to(tl.float32), cap_pos, cap_neg)
    logit = tl.where(at < V, t * cap, float("-inf"))
    top = tl.max(logit, 0)
    top += tl.log2(tl.sum(tl.exp2(logit - top), 0))
    t, _, _, cap = soft_cap(target.to(tl.float32), cap_pos, cap_neg)
    tl.store(nll + row, (top - t * cap) * 0.6931471805599453)
    t, _, _, cap = soft_cap(hint.to(tl.float32), cap_pos, cap_neg)
    tl.store(log_q + row, (t * cap - top) * 0.6931471805599453)
    tl.store(lse + row, top)


@jit
def nll_backward_kernel(scores, stride, cap_pos, cap_neg, targets, lse, dnll, dcaps, low, low_scales, M, V: tl.constexpr,
                        BLOCK: tl.constexpr, CAPS: tl.constexpr):
    # M is V / 8 but unknown to the compiler: were more than 8 numbers of 8 bits stored at once, the threads would lie otherwise
    # than for the store in bf16, and all would be computed for both.
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scores, cap_pos, cap_neg = scores + row * stride, tl.load(cap_pos), tl.load(cap_neg)
    x, dnll = tl.load(scores + at, mask=at < V, other=0.0).to(tl.float32), tl.load(dnll + row)
    target = tl.load(targets + row).to(tl.int32)
    t, slope, z, cap = soft_cap(x, cap_pos, cap_neg)
    g = tl.exp2(t * cap - tl.load(lse + row)) - tl.where(at == target, 1.0, 0.0)
    dscore = 4.0 * dnll * (g * slope)
    tl.store(scores + at, dscore.to(scores.dtype.element_ty), mask=at < V)
    if CAPS:
        g = tl.where(at < V, g * (t - 1.3862943611198906 * z * slope), 0.0)  # gradient of its cap, by dnll
        positive = tl.sum(tl.where(x >= 0, g, 0.0), 0)
        tl.store(dcaps + row * 2, dnll * positive)
        tl.store(dcaps + row * 2 + 1, dnll * (tl.sum(g, 0) - positive))
    if low is not None:
        scale = row_scale(tl.max(tl.where(at < V, tl.abs(dscore), 0.0), 0))
        tl.store(low_scales + row, scale)
        tl.store(low + row * M * 8 + at, (dscore * (1.0 / scale)).to(low.dtype.element_ty), mask=at < V)


class TwoValueNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, cap_pos, cap_neg, targets, hints, weight=None, low_args=None):
        product = () if weight is None else (scores, *low_args[3:])
        scores = low_args.product() if product else scores if scores.stride(1) == 1 else scores.contiguous()
        caps = [cap if isinstance(cap, Tensor) else scores.new_full((), cap, dtype=torch.float32)  # a fill: no wait
                for cap in (cap_pos, cap_neg)]
        nll, log_q, lse = (scores.new_empty(len(scores), dtype=torch.float32) for _ in range(3))
        ctx.block = dict(V=scores.size(1), BLOCK=triton.next_power_of_2(scores.size(1)))  # a program has a row in registers
        ctx.warps = min(16, max(2, ctx.block["BLOCK"] // 4096))
        nll_forward_kernel[len(scores),](scores, scores.stride(0), *caps, targets, hints, nll, log_q, lse, **ctx.block,
                                         num_warps=2 * ctx.warps)
        ctx.save_for_backward(scores, *caps, targets, lse, *product)
        ctx.mark_non_differentiable(log_q)
        return nll, log_q

    @staticmethod
    def backward(ctx, dnll, _):
        scores, *caps, targets, lse = ctx.saved_tensors[:5]
        product, trained = ctx.saved_tensors[5:], any(ctx.needs_input_grad[1:3])
        dcaps, rows = lse.new_empty(len(scores), 2) if trained else lse, empty_rows(scores) if product else E4M3(None, None)
        nll_backward_kernel[len(scores),](scores, scores.stride(0), *caps, targets, lse, dnll.contiguous(), dcaps, *rows[:2],
                                          scores.size(1) // 8, CAPS=trained, **ctx.block, num_warps=min(32, 4 * ctx.warps))
        dcaps = dcaps.sum(0) if trained else (None, None)
        if not product:
            return scores, *dcaps, *[None] * 4
        x, w_scale, w_turned = product
        dw = scores.T @ x  # before what is needed next
        return low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(x)), *dcaps, None, None, dw, None


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


class Skip(NamedTuple):
    """A U-Net skip on its way into the decoder."""

    x: Tensor  # (T, d), what an encoder visit left
    weight: Tensor  # (d,)
    gate: Tensor | None  # (d,)


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


# --- Fused steps of a block -------------------------------------------------------------------------------------------
# Every activation is read once per pass. Sums over tokens for the gradients of vectors are kept by each program over its
# rows and written once. The bf16 results are rounded where the plain formulas round them, but for products that add up.
# Trained vectors may come spread: expanded to a row for each program of the backward pass, whose gradient are those sums. So
# autograd adds up, in a fixed order, what the visits of all layers have left of a stack of vectors, and not at each visit.

TILES = {  # rows of a tile, warps of a program, programs per multiprocessor, tiles on their way through shared memory
    "mix_norm_forward": (4, 4, 5, 1), "mix_norm_backward": (8, 8, 1, 3), "qk_prep_forward": (4, 4, 8, 1),
    "qk_prep_backward": (4, 4, 2, 3), "xsa_gate_forward": (1, 1, 32, 1), "xsa_gate_backward": (1, 1, 16, 1),
    "add_norm_forward": (4, 4, 8, 1), "add_norm_backward": (4, 4, 8, 1), "lane_update_forward": (4, 4, 8, 1),
    "lane_update_backward": (4, 4, 4, 1), "low_rows": (4, 4, 8, 1)}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of it."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232_448


def row_tile(name: str, x: Tensor) -> tuple[int, int]:
    """Rows of a tile of the kernel `name` and tiles on their way, as fit in shared memory for rows as wide as x's."""
    rows, _, _, stages = TILES[name]
    fitting = max(1, 4096 // x[0].numel())
    return min(rows, 1 << fitting.bit_length() - 1), stages if shared_memory(x.device) > 160_000 else 1


def row_programs(name: str, x: Tensor) -> int:
    """How many programs the kernel `name` has for the rows of x, whatever their width."""
    return min(-(-len(x) // TILES[name][0]), TILES[name][2] * multiprocessors(x.device))


def spread(name: str, x: Tensor, *vectors: tuple[Tensor | None, int]) -> list[Tensor | None]:
    """Each (vector, its dimensions) spread for the step `name` on the rows of x; as it is if it is None or comes spread."""
    count = row_programs(name + "_backward", x)
    return [v if v is None or v.dim() > dims else v.expand(count, *v.shape) for v, dims in vectors]


def cut(stack: Tensor | None, programs: int = 0, first: int = 0):
    """The vectors of a stack, spread for that many programs if not 0, None before the `first`; of no stack None without end."""
    if stack is None:
        return itertools.repeat(None)
    used = stack[first:] if first else stack  # one that is cut and not used would cost a gradient of zeros
    return [None] * first + list(used.expand(programs, *used.shape).unbind(1) if programs else used.unbind())


def shares(name: str, x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """Room for what each program of the kernel `name` adds to the gradients of these vectors."""
    return [None if v is None else v.new_empty(row_programs(name, x), *v.shape) for v in vectors]


def over_rows(kernel, name: str, x: Tensor, *arguments, loose: Tensor | None = None, **constants) -> None:
    """Run `kernel` over as many rows as x has. All tensors but `loose` must be contiguous."""
    assert all(a is loose or a.is_contiguous() for a in arguments if isinstance(a, Tensor)), name
    rows, stages = row_tile(name, x)
    kernel[row_programs(name, x),](*arguments, T=len(x), **constants, ROWS=rows, STAGES=stages, num_warps=TILES[name][1])


@jit
def tile_rows(block, T, ROWS: tl.constexpr):
    """Tiles come from the end: what the product before wrote last is still in the cache, and so will be the beginning."""
    return (tl.cdiv(T, ROWS) - 1 - block) * ROWS + tl.arange(0, ROWS)


@jit
def inverse_rms(x, WIDTH: tl.constexpr):
    """1 / rms of the last dimension, which is kept with size 1."""
    return tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / WIDTH + 1.1920929e-7)


@jit
def norm_gradient(x, g, WIDTH: tl.constexpr):
    """Gradient at x (R, WIDTH) of rms-normalized x, g being the gradient at the result."""
    r = inverse_rms(x, WIDTH)
    return r * (g - x * (r * r * tl.sum(x * g, 1, keep_dims=True) / WIDTH))


@jit
def rounded(x, like):
    """float32 values as the tensor behind the pointer `like` would keep them."""
    return x.to(like.dtype.element_ty).to(tl.float32)


class E4M3(NamedTuple):
    """A tensor in 8-bit floats with 3 bits of mantissa: about values * scale."""

    values: Tensor  # float8_e4m3fn
    scale: Tensor  # float32, () or one for each row
    turned: Tensor | None = None  # of a matrix the transposed values: 8-bit products want both operands along the sum


def e4m3(matrices: Tensor) -> list[E4M3]:
    """Each of the matrices (n, rows, columns) with a scale of its own, by which its largest entry becomes 448, the largest."""
    scales = matrices.abs().amax((1, 2)).float().clamp(min=1e-12) / 448
    values = (matrices / scales[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return [E4M3(*one) for one in zip(values.unbind(), apart(scales), values.mT.contiguous().unbind())]


def apart(x: Tensor) -> tuple[Tensor, ...]:
    """The numbers of x (n,), each at a multiple of 16 bytes, as cuBLAS wants its scales."""
    return x[:, None].repeat(1, 4)[:, 0].unbind()


def low_products_fit(s: Settings, dtype: torch.dtype) -> bool:
    """Whether training's products can run in E4M3 here."""
    if not torch.cuda.is_available():
        return False
    x = torch.empty(0, s.model_dim, dtype=dtype, device="cuda")
    fits = s.model_dim % 256 == s.kv_dim % 16 == s.vocab_size % 16 == 0
    return fits and fusible(x, s.model_dim) and mlp_fusible(x, s.mlp_dim)


def low_unit(width: int) -> float:
    """What 1 is for the E4M3 copy of a normalized row of that width: a power of 2 by which no entry gets beyond 448."""
    return 2.0 ** -math.floor(math.log2(448 / math.sqrt(width)))


ATTENDED_UNIT = 0.25  # what 1 is for the E4M3 copy of an attention's output, which ends at 112


@jit
def put_low(low, at, x, UNIT: tl.constexpr, mask):
    """Store x in E4M3, in that unit, where the kernel was given a tensor for it."""
    if low is not None:
        tl.store(low + at, (x / UNIT).to(low.dtype.element_ty), mask=mask)


@jit
def row_scale(largest):
    """By which the largest entry of a row, in size, becomes 448."""
    return tl.maximum(largest, 1e-30) / 448


@jit
def put_low_rows(low, scales, row, D: tl.constexpr, x, T):
    """Store the rows x (R, D) in E4M3, each with the scale by which its largest entry becomes 448; row (R, 1)."""
    scale = row_scale(tl.max(tl.abs(x), 1, keep_dims=True))
    tl.store(scales + row, scale, mask=row < T)
    tl.store(low + row * D + tl.arange(0, D)[None, :], (x * (1.0 / scale)).to(low.dtype.element_ty), mask=row < T)


@jit
def low_rows_kernel(x, low, scales, T, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        here = tl.load(x + row * D + tl.arange(0, D)[None, :], mask=row < T, other=0.0).to(tl.float32)
        put_low_rows(low, scales, row, D, here, T)


def low_rows(x: Tensor) -> E4M3:
    """x (T, d) in E4M3, each row with a scale of its own: a gradient's rows differ, and none has to be remembered for it."""
    if not fusible(x, x.size(1)):
        scales = x.abs().amax(1).float().clamp(min=1e-30) / 448
        return E4M3((x / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
    rows = empty_rows(x)
    over_rows(low_rows_kernel, "low_rows", x, x, *rows[:2], D=x.size(1))
    return rows


def empty_rows(x: Tensor) -> E4M3:
    """Room for what low_rows makes of x."""
    return E4M3(torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32))


class LowArgs(NamedTuple):
    """What a product x W^T, x (T, d) and W (n, d) in bf16, needs besides to run in E4M3, as its gradient at x then does too."""

    x: Tensor
    x_scale: Tensor  # ()
    w: Tensor
    w_scale: Tensor  # ()
    w_turned: Tensor  # (d, n)

    def product(self) -> Tensor:
        return torch._scaled_mm(self.x, self.w.T, self.x_scale, self.w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


class LowProduct(torch.autograd.Function):
    """x W^T in E4M3; the gradient of W is a product in bf16."""

    @staticmethod
    def forward(ctx, x, w, low_args):
        ctx.save_for_backward(x, low_args.w_scale, low_args.w_turned)
        return low_args.product()

    @staticmethod
    def backward(ctx, dy):
        x, w_scale, w_turned = ctx.saved_tensors
        dw = dy.T @ x  # before what is needed next, which then is still in the cache
        return low_product(low_rows(dy.contiguous()), E4M3(w_turned, w_scale), torch.empty_like(x)), dw, None


def mix_norm(x: Tensor, x0: Tensor, skip: Skip | None, mix: Tensor, scale: Tensor, window: int,
             lanes: bool = False, low: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entry of a block on the stream x (T, d): merge a U-Net skip, mix with the embedding x0 (T, d), normalize.

    mix (2, d); scale (), without gradient. Returns the mixed stream, or with `lanes` the merged one before the mix; the
    scaled normalized mix u; u[:, :window], a copy of its own, so that the gates' gradient comes back as (T, window); and
    x and x0 again: what uses these later has its gradient added up in the kernel of the backward pass. low (T, d), if given,
    receives u in E4M3, in units of scale * low_unit(d).
    """
    if not fusible(x, x.size(1)):
        return reference_mix_norm(x, x0, skip, mix, scale, window, lanes, low)
    left, weight, gate = skip if skip is not None else (None, None, None)
    vectors = spread("mix_norm", x, (weight, 1), (gate, 1), (mix, 2))
    out, u, head, *same = MixNorm.apply(x, x0, left, *vectors, scale, window, lanes, low)
    x, x0 = (new if old.requires_grad else old for old, new in zip((x, x0), same))
    return x if lanes and skip is None else out, u, head, x, x0


def reference_mix_norm(x, x0, skip, mix, scale, window, lanes, low=None):
    merged = merge_skip(x, skip)
    merged = merged.to(x0.dtype) if lanes else merged
    mixed = (mix[0] * merged + mix[1] * x0).to(x0.dtype)
    normal = norm(mixed)
    if low is not None:
        low.copy_(normal.detach() / low_unit(x.size(1)))
    u = (scale * normal).to(x0.dtype)
    return merged if lanes else mixed, u, u[:, :window], x, x0


@jit
def blend(x, skip, weight, gate, SKIP: tl.constexpr):
    """A U-Net skip in the stream: 0 none, 1 added, 2 blended by a gate."""
    if SKIP == 2:
        x = gate * x + (1.0 - gate) * (weight * skip)
    elif SKIP == 1:
        x = x + weight * skip
    return x


@jit
def mix_norm_forward_kernel(x, x0, skip, weight, gate, mix, scale, out, u, head, low, T, D: tl.constexpr, SKIP: tl.constexpr,
                            LANES: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    keep, add, scale, w, gated = tl.load(mix + column), tl.load(mix + D + column), tl.load(scale), 0.0, 0.0
    if SKIP:
        w = tl.load(weight + column)
    if SKIP == 2:
        gated = tl.sigmoid(tl.load(gate + column))
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        merged = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            merged = blend(merged, tl.load(skip + at, mask=inside, other=0.0).to(tl.float32), w, gated, SKIP)
        if LANES:
            merged = rounded(merged, u)
        mixed = rounded(keep * merged + add * start, u)
        if LANES:
            if SKIP:  # else the lane is as it was
                tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside)
        normal = inverse_rms(mixed, D) * mixed
        put_low(low, at, normal, UNIT, inside)
        normal = (scale * normal).to(u.dtype.element_ty)
        tl.store(u + at, normal, mask=inside)
        if WINDOW:
            tl.store(head + row * WINDOW + column, normal, mask=inside & (column < WINDOW))


@jit
def mix_norm_backward_kernel(dout, du, dhead, more, more0, x, x0, skip, weight, gate, mix, scale, dx, dx0, dskip, dweight,
                             dgate, dmix, T, D: tl.constexpr, SKIP: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
                             ROWS: tl.constexpr, STAGES: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    keep, add, scale, w, gated = tl.load(mix + column), tl.load(mix + D + column), tl.load(scale), 0.0, 0.0
    if SKIP:
        w = tl.load(weight + column)
    if SKIP == 2:
        gated = tl.sigmoid(tl.load(gate + column))
    dkeep = tl.zeros([ROWS, D], tl.float32)
    dadd, dw, dgated = dkeep, dkeep, dkeep
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        g = tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
        stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
        merged, other = stream, stream
        if SKIP:
            other = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
            merged = blend(stream, other, w, gated, SKIP)
        if LANES:
            merged = rounded(merged, x0)
        if dhead is not None:
            g += tl.load(dhead + row * WINDOW + column, mask=inside & (column < WINDOW), other=0.0).to(tl.float32)
        g = norm_gradient(rounded(keep * merged + add * start, x0), scale * g, D)
        if dout is not None and not LANES:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        dkeep += g * merged
        dadd += g * start
        total = add * g
        if more0 is not None:
            total += tl.load(more0 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx0 + at, total.to(dx0.dtype.element_ty), mask=inside)
        g = keep * g
        if dout is not None and LANES:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        total = g
        if SKIP == 2:
            dgated += g * (stream - w * other)
            total = gated * g
            g = (1.0 - gated) * g
        if SKIP:
            dw += g * other
            tl.store(dskip + at, (w * g).to(dskip.dtype.element_ty), mask=inside)
        if more is not None:
            total += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * D + tl.arange(0, D)
    dmix += tl.program_id(0) * D
    tl.store(dmix + at, tl.sum(dkeep, 0))
    tl.store(dmix + D + at, tl.sum(dadd, 0))
    if SKIP:
        tl.store(dweight + at, tl.sum(dw, 0))
    if SKIP == 2:
        slope = tl.sigmoid(tl.load(gate + tl.arange(0, D)))
        tl.store(dgate + at, slope * (1.0 - slope) * tl.sum(dgated, 0))


class MixNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x0, skip, weight, gate, mix, scale, window, lanes, low=None):
        weight, gate, mix = (None if v is None else v[0] for v in (weight, gate, mix))
        ctx.save_for_backward(x, x0, skip, weight, gate, mix, scale)
        ctx.set_materialize_grads(False)
        ctx.kind = dict(D=x.size(1), SKIP=(skip is not None) + (gate is not None), LANES=lanes, WINDOW=window)
        out = x.new_empty(0) if lanes and skip is None else torch.empty_like(x)
        u, head = torch.empty_like(x), x.new_empty(len(x), window)
        over_rows(mix_norm_forward_kernel, "mix_norm_forward", x, x, x0, skip, weight, gate, mix, scale, out, u, head,
                  low, UNIT=low_unit(x.size(1)), **ctx.kind)
        return out, u, head, x, x0

    @staticmethod
    def backward(ctx, *gradients):  # at all five, None where nothing comes; something always reaches u
        x, x0, skip, weight, gate, mix, scale = ctx.saved_tensors
        dx, dx0, dskip = (None if like is None else torch.empty_like(x) for like in (x, x0, skip))
        own = shares("mix_norm_backward", x, weight, gate, mix)
        gradients = (None if g is None else g.contiguous() for g in gradients)
        over_rows(mix_norm_backward_kernel, "mix_norm_backward", x, *gradients, *ctx.saved_tensors, dx, dx0, dskip, *own,
                  **ctx.kind)
        return dx, dx0, dskip, *own, *[None] * 4


def qk_prep(qkv: Tensor, rope: tuple[Tensor, Tensor], gain: Tensor, heads: int, kv_heads: int, copies: int = 1,
            weight: Tensor | None = None, low_args: LowArgs | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (T, heads, D), keys and values (T, kv_heads copies, D) of the fused product qkv (T, (heads + 2 kv_heads) D).

    Queries and keys are normalized per head and rotated; queries are multiplied by gain (heads,). Every key and value head
    comes `copies` times in a row: the backward pass of attention is faster where no two query heads add to the same one.
    Last the values once more, a strided view (T, kv_heads, D), for what subtracts them: the gradients meet in one kernel.
    weight ((heads + 2 kv_heads) D, d): given is the product's input (T, d) instead, and the product runs in E4M3.
    """
    width = (qkv if weight is None else weight.T).size(1)
    if not fusible(qkv, heads, kv_heads, width // (heads + 2 * kv_heads), rope[0].size(-1)):
        return reference_qk_prep(qkv, rope, gain, heads, kv_heads, copies, weight, low_args)
    return QKPrep.apply(qkv, *rope, *spread("qk_prep", qkv, (gain, 1)), heads, kv_heads, copies, weight, low_args)


def reference_qk_prep(qkv, rope, gain, heads, kv_heads, copies=1, weight=None, low_args=None):
    qkv = qkv if weight is None else LowProduct.apply(qkv, weight, low_args)
    q, k, own = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (rotate(norm(k), rope).to(qkv.dtype), own))
    return (rotate(norm(q), rope) * gain[:, None]).to(qkv.dtype), k, v, own


@jit
def turned(x, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """x (ROWS, H, D) rotated; cos and sin from rotary_tile().

    The partner comes from a xor over pairs of halves: an exact exchange between neighbouring lanes, without shared memory.
    """
    x = tl.reshape(x, (ROWS, H, D // (2 * HALF), 2, HALF))
    bits = x.to(tl.int32, bitcast=True)
    partner = (bits ^ tl.xor_sum(bits, 3, keep_dims=True)).to(tl.float32, bitcast=True)
    return tl.reshape(x * cos + partner * sin, (ROWS, H, D))


@jit
def rotary_tile(cos, sin, row, T, D: tl.constexpr, HALF: tl.constexpr):
    """cos and signed sin (ROWS, 1, D / (2 HALF), 2, HALF) of the tokens row (ROWS,), 1 and 0 beyond the rotary dimensions.

    What is loaded is small enough for every thread to load its share, where a whole tile would go through shared memory.
    """
    token = row[:, None, None, None, None]
    at, inside = token * HALF + tl.arange(0, HALF)[None, None, None, None, :], token < T
    c, s = tl.load(cos + at, mask=inside, other=1.0), tl.load(sin + at, mask=inside, other=0.0)
    turns = tl.arange(0, D // (2 * HALF))[None, None, :, None, None] == 0
    first = tl.arange(0, 2)[None, None, None, :, None] == 0
    return tl.where(turns, c, 1.0), tl.where(turns, tl.where(first, s, -s), 0.0)


@jit
def qk_gradient(x, g, gain, cos, sin, ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Gradients at the raw heads x (ROWS, H, D) and at their gain, (ROWS, H, 1), from g at the rotated ones."""
    r = inverse_rms(x, D)
    n, g = r * x, turned(g, cos, -sin, ROWS, H, D, HALF)
    dgain = tl.sum(n * g, 2, keep_dims=True)
    return (r * gain) * (g - n * (dgain / D)), dgain


@jit
def heads_largest(x):
    """The largest size of an entry of x (R, H, D) in each row, (R, 1, 1)."""
    return tl.max(tl.max(tl.abs(x), 2, keep_dims=True), 1, keep_dims=True)


@jit
def qk_prep_forward_kernel(qkv, cos, sin, gain, q, k, v, T, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COPIES: tl.constexpr,
                           D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    head, kv_head = tl.arange(0, HEADS)[None, :, None], tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        own, kv_own, inside = head * D + column, kv_head * D + column, token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        x = tl.load(qkv + at + own, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(qkv + at + HEADS * D + kv_own, mask=inside, other=0.0).to(tl.float32)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        x = turned(x * (inverse_rms(x, D) * gain), c, s, ROWS, HEADS, D, HALF)
        y = turned(y * inverse_rms(y, D), c, s, ROWS, KV_HEADS, D, HALF)
        tl.store(q + token * (HEADS * D) + own, x.to(q.dtype.element_ty), mask=inside)
        to = (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            tl.store(k + to + copy * D, y.to(k.dtype.element_ty), mask=inside)
        if COPIES > 1:
            own_value = tl.load(qkv + at + (HEADS + KV_HEADS) * D + kv_own, mask=inside, other=0.0)
            for copy in tl.static_range(COPIES):
                tl.store(v + to + copy * D, own_value, mask=inside)


@jit
def qk_prep_backward_kernel(dq, dk, dv, dv_own, qkv, cos, sin, gain, dqkv, low, low_scales, dgain, T, HEADS: tl.constexpr,
                            KV_HEADS: tl.constexpr, COPIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                            ROWS: tl.constexpr, STAGES: tl.constexpr):
    head, kv_head = tl.arange(0, HEADS)[None, :, None], tl.arange(0, KV_HEADS)[None, :, None]
    column = tl.arange(0, D)[None, None, :]
    gain = tl.load(gain + head)
    total = tl.zeros([ROWS, HEADS, 1], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[:, None, None]
        own, kv_own, inside = head * D + column, kv_head * D + column, token < T
        at = token * ((HEADS + 2 * KV_HEADS) * D)
        at, kv_at = at + own, at + HEADS * D + kv_own
        x = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
        gx = tl.load(dq + token * (HEADS * D) + own, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(qkv + kv_at, mask=inside, other=0.0).to(tl.float32)
        gv = tl.load(dv_own + token * (KV_HEADS * D) + kv_own, mask=inside, other=0.0).to(tl.float32)
        gy, kv_from = tl.zeros_like(gv), (token * KV_HEADS + kv_head) * (COPIES * D) + column
        for copy in tl.static_range(COPIES):
            gy += tl.load(dk + kv_from + copy * D, mask=inside, other=0.0).to(tl.float32)
            gv += tl.load(dv + kv_from + copy * D, mask=inside, other=0.0).to(tl.float32)
        c, s = rotary_tile(cos, sin, row, T, D, HALF)
        gx, more = qk_gradient(x, gx, gain, c, s, ROWS, HEADS, D, HALF)
        gy, _ = qk_gradient(y, gy, 1.0, c, s, ROWS, KV_HEADS, D, HALF)
        total += more
        tl.store(dqkv + at, gx.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + kv_at, gy.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(dqkv + kv_at + KV_HEADS * D, gv.to(dqkv.dtype.element_ty), mask=inside)
        if low is not None:
            largest = tl.maximum(heads_largest(gx), tl.maximum(heads_largest(gy), heads_largest(gv)))
            scale = row_scale(largest)
            tl.store(low_scales + token, scale, mask=inside)
            factor = 1.0 / scale
            tl.store(low + at, (gx * factor).to(low.dtype.element_ty), mask=inside)
            tl.store(low + kv_at, (gy * factor).to(low.dtype.element_ty), mask=inside)
            tl.store(low + kv_at + KV_HEADS * D, (gv * factor).to(low.dtype.element_ty), mask=inside)
    tl.store(dgain + tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None], tl.sum(total, 0))


class QKPrep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, gain, heads, kv_heads, copies, weight=None, low_args=None):
        gain, product = gain[0], () if weight is None else (qkv, *low_args[3:])
        qkv = qkv if weight is None else low_args.product()
        ctx.save_for_backward(qkv, cos, sin, gain, *product)
        D = qkv.size(1) // (heads + 2 * kv_heads)
        ctx.kind = dict(HEADS=heads, KV_HEADS=kv_heads, COPIES=copies, D=D, HALF=cos.size(-1))
        q, k = (qkv.new_empty(len(qkv), n, D) for n in (heads, kv_heads * copies))
        v, own = (qkv[:, -kv_heads * D:].unflatten(1, (kv_heads, D)) for _ in range(2))
        v = torch.empty_like(k) if copies > 1 else v
        over_rows(qk_prep_forward_kernel, "qk_prep_forward", qkv, qkv, cos, sin, gain, q, k, v if copies > 1 else None,
                  **ctx.kind)
        return q, k, v, own

    @staticmethod
    def backward(ctx, *gradients):
        qkv, cos, sin, gain, *product = ctx.saved_tensors
        dqkv, [dgain] = torch.empty_like(qkv), shares("qk_prep_backward", qkv, gain)
        rows = empty_rows(qkv) if product else E4M3(None, None)
        over_rows(qk_prep_backward_kernel, "qk_prep_backward", qkv, *(g.contiguous() for g in gradients), qkv, cos, sin, gain,
                  dqkv, *rows[:2], dgain, **ctx.kind)
        if not product:
            return dqkv, None, None, dgain, *[None] * 5
        x, w_scale, w_turned = product
        dw = dqkv.T @ x  # before what is needed next
        return low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(x)), None, None, dgain, *[None] * 3, dw, None


def xsa_gate(y: Tensor, v: Tensor | None, window: Tensor | None, weight: Tensor | None, alpha: Tensor | None,
             scale: float, low: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """Attention output y (T, heads, D) without its component along the own value v (T, kv_heads, D), gated; (T, heads D).

    v None: nothing is taken away; alpha (heads,): only tanh(alpha) of the component is. weight (heads, w) and window (T, w),
    the leading channels of the normalized input: head h is multiplied by sigmoid(scale weight_h . window_t). low (T, heads D),
    if given, receives the result in E4M3, in units of ATTENDED_UNIT. lse (heads, T): of FlashAttention4, whose convention for
    its gradient is followed where that costs nothing.
    """
    if v is None or not fusible(y, *y.shape[1:], v.size(1)):
        return reference_xsa_gate(y, v, window, weight, alpha, scale, low)
    return XSAGate.apply(y, v, window, *spread("xsa_gate", y, (weight, 2), (alpha, 1)), scale, low, lse)


def reference_xsa_gate(y, v, window, weight, alpha, scale, low=None):
    if v is not None:
        y = exclude_own_value(y, v, alpha)
    if weight is not None:
        y = (y * torch.sigmoid(scale * F.linear(window, weight.to(window.dtype)).float())[..., None]).to(y.dtype)
    put_attended(low, y.flatten(1))
    return y.flatten(1)


def put_attended(low: Tensor | None, y: Tensor) -> None:
    if low is not None:
        low.copy_((y.detach() / ATTENDED_UNIT).clamp(-448, 448))


@jit
def gate_weights(weight, window, WINDOW: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """(KV_HEADS, 1, GROUP, PADDED), rounded as the product with the gates' inputs `window` rounds them."""
    i = tl.arange(0, PADDED)[None, None, None, :]
    head = tl.arange(0, KV_HEADS)[:, None, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :, None]
    return rounded(tl.load(weight + head * WINDOW + i, mask=i < WINDOW, other=0.0), window)


@jit
def unit(v):
    """v (..., D) over its length, the inverse length, and whether that is not clamped."""
    length = tl.sqrt(tl.sum(v * v, -1, keep_dims=True))
    inverse = 1.0 / tl.maximum(length, 1e-12)
    return v * inverse, inverse, length > 1e-12


# Tiles are (KV_HEADS, ROWS, GROUP, D): so the compiler gives a warp whole tokens, and no sum crosses warps.


@jit
def xsa_gate_forward_kernel(y, v, window, weight, alpha, z, gates, low, T, v_stride, scale, GATE: tl.constexpr,
                            ALPHA: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                            WINDOW: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr):
    kv_head, member = tl.arange(0, KV_HEADS)[:, None, None, None], tl.arange(0, GROUP)[None, None, :, None]
    head, column = kv_head * GROUP + member, tl.arange(0, D)[None, None, None, :]
    i, share, w = tl.arange(0, PADDED)[None, None, None, :], 1.0, 0.0
    if ALPHA:
        share = 2.0 * tl.sigmoid(2.0 * tl.load(alpha + head)) - 1.0
    if GATE:
        w = gate_weights(weight, window, WINDOW, PADDED, KV_HEADS, GROUP)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at, inside = token * (KV_HEADS * GROUP * D) + head * D + column, token < T
        out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_stride + kv_head * D + column, mask=inside, other=0.0).to(tl.float32)
        direction, _, _ = unit(value)
        out -= share * tl.sum(out * direction, 3, keep_dims=True) * direction
        if GATE:
            u = tl.load(window + token * WINDOW + i, mask=inside & (i < WINDOW), other=0.0).to(tl.float32)
            gate = tl.sigmoid(scale * tl.sum(u * w, 3, keep_dims=True))
            tl.store(gates + token * (KV_HEADS * GROUP) + head, gate, mask=inside)
            out *= gate
        tl.store(z + at, out.to(z.dtype.element_ty), mask=inside)
        put_low(low, at, out, UNIT, inside)


@jit
def xsa_gate_backward_kernel(dz, y, v, window, weight, alpha, gates, dy, dlse, dv, dwindow, dweight, dalpha, T, v_stride, scale,
                             GATE: tl.constexpr, ALPHA: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                             D: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                             STAGES: tl.constexpr):
    kv_head, member = tl.arange(0, KV_HEADS)[:, None, None, None], tl.arange(0, GROUP)[None, None, :, None]
    head, column = kv_head * GROUP + member, tl.arange(0, D)[None, None, None, :]
    i, share, w = tl.arange(0, PADDED)[None, None, None, :], 1.0, 0.0
    if ALPHA:
        share = 2.0 * tl.sigmoid(2.0 * tl.load(alpha + head)) - 1.0
    if GATE:
        w = gate_weights(weight, window, WINDOW, PADDED, KV_HEADS, GROUP)
    da, dw = tl.zeros([KV_HEADS, ROWS, GROUP, 1], tl.float32), tl.zeros([KV_HEADS, ROWS, GROUP, PADDED], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)
        token = row[None, :, None, None]
        at, inside = token * (KV_HEADS * GROUP * D) + head * D + column, token < T
        out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_stride + kv_head * D + column, mask=inside, other=0.0).to(tl.float32)
        direction, inverse, free = unit(value)
        component = tl.sum(out * direction, 3, keep_dims=True)
        along = tl.sum(g * direction, 3, keep_dims=True)
        if GATE:
            u = tl.load(window + token * WINDOW + i, mask=inside & (i < WINDOW), other=0.0).to(tl.float32)
            gate = tl.load(gates + token * (KV_HEADS * GROUP) + head, mask=inside, other=0.0)
            dscore = (tl.sum(g * out, 3, keep_dims=True) - share * component * along) * (scale * gate * (1.0 - gate))
            dw += dscore * u
            du = tl.sum(tl.sum(dscore * w, 2, keep_dims=True), 0, keep_dims=True)
            tl.store(dwindow + token * WINDOW + i, du.to(dwindow.dtype.element_ty), mask=inside & (i < WINDOW))
            g *= gate
            along *= gate
        if ALPHA:
            da -= component * along * (1.0 - share * share)
        rest = (g - share * along * direction).to(dy.dtype.element_ty)
        tl.store(dy + at, rest, mask=inside)
        if dlse is not None:  # of dy as it is rounded: that is what attention multiplies with the values
            tl.store(dlse + head * T + token, -tl.sum(out * rest.to(tl.float32), 3, keep_dims=True), mask=inside)
        turn = tl.sum(share * component * g + share * along * out, 2, keep_dims=True)  # less: gradient at the direction
        twice = 2.0 * tl.sum(share * component * along, 2, keep_dims=True)
        turn = inverse * (tl.where(free, twice, 0.0) * direction - turn)
        tl.store(dv + token * (KV_HEADS * D) + kv_head * D + column, turn.to(dv.dtype.element_ty), mask=inside)
    head += tl.program_id(0) * (KV_HEADS * GROUP)
    if GATE:
        tl.store(dweight + head * WINDOW + i, tl.sum(dw, 1, keep_dims=True), mask=i < WINDOW)
    if ALPHA:
        tl.store(dalpha + head, tl.sum(da, 1, keep_dims=True))


class XSAGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, v, window, weight, alpha, scale, low=None, lse=None):
        assert v.stride()[1:] == (v.size(2), 1)
        weight, alpha = (None if x is None else x[0] for x in (weight, alpha))
        y, z = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
        gates = None if weight is None else y.new_empty(y.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(y, v, window, weight, alpha, gates)
        count = 1 if weight is None else window.size(1)
        ctx.scale, ctx.kind = scale, dict(
            GATE=weight is not None, ALPHA=alpha is not None, KV_HEADS=v.size(1), GROUP=y.size(1) // v.size(1), D=y.size(2),
            WINDOW=count, PADDED=triton.next_power_of_2(count), v_stride=v.stride(0), scale=scale)
        over_rows(xsa_gate_forward_kernel, "xsa_gate_forward", y, y, v, window, weight, alpha, z, gates, low, loose=v,
                  UNIT=ATTENDED_UNIT, **ctx.kind)
        return z.flatten(1)

    @staticmethod
    def backward(ctx, dz):
        y, v, window, weight, alpha, gates = ctx.saved_tensors
        dy, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, v))
        dlse = y.new_empty(y.shape[1::-1], dtype=torch.float32) if ctx.needs_input_grad[7] else None
        dwindow = None if weight is None else torch.empty_like(window)
        own = shares("xsa_gate_backward", y, weight, alpha)
        over_rows(xsa_gate_backward_kernel, "xsa_gate_backward", y, dz.contiguous(), y, v, window, weight, alpha, gates, dy,
                  dlse, dv, dwindow, *own, loose=v, **ctx.kind)
        return dy, dv, dwindow, *own, None, None, dlse


def add_norm(x: Tensor, y: Tensor | None, scale: Tensor, low: Tensor | None = None, weight: Tensor | None = None,
             low_args: LowArgs | None = None) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm times scale (), which gets no gradient; both like x (T, d). y None: x itself and its norm.

    low: see mix_norm. weight (d, n): what is added is y W^T, y (T, n), and may be written over x, which nothing else may need
    then. The backward pass does without x + y, which may be written over, but not without a gradient at the norm.
    """
    return (AddNorm.apply if fusible(x, x.size(1)) else reference_add_norm)(x, y, scale, False, low, weight, low_args)


def mean_norm(x: Tensor, y: Tensor | None = None) -> Tensor:
    """RMSNorm of x (T, d), with y of (x + y) / 2."""
    return (AddNorm.apply if fusible(x, x.size(1)) else reference_add_norm)(x, y, None, y is not None)[1]


def reference_add_norm(x, y, scale, mean=False, low=None, weight=None, low_args=None):
    if weight is not None:
        y = F.linear(y, weight) if low_args is None else LowProduct.apply(y, weight, low_args)
    x = x if y is None else (x.float() + y.float()) / 2 if mean else x + y
    normal = norm(x)
    if low is not None:
        low.copy_(normal.detach() / low_unit(x.size(1)))
    return x, (normal if scale is None else scale * normal).to(x.dtype if y is None else y.dtype)


@jit
def add_norm_forward_kernel(x, y, scale, out, u, inverse, low, T, D: tl.constexpr, ADD: tl.constexpr, MEAN: tl.constexpr,
                            SCALED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    column, factor = tl.arange(0, D)[None, :], 1.0
    if SCALED:
        factor = tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD or MEAN:
            total += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            total = rounded(total, out)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
        if MEAN:
            total *= 0.5
        r = inverse_rms(total, D)
        put_low(low, at, r * total, UNIT, inside)
        tl.store(u + at, (factor * r * total).to(u.dtype.element_ty), mask=inside)
        if not MEAN:
            tl.store(inverse + row, r, mask=row < T)


@jit
def add_norm_backward_kernel(dout, du, x, y, scale, inverse, dx, low, low_scales, T, D: tl.constexpr, MEAN: tl.constexpr,
                             SCALED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    column, factor = tl.arange(0, D)[None, :], 1.0
    if SCALED:
        factor = tl.load(scale)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile_rows(block, T, ROWS)[:, None]
        at, inside = row * D + column, (row < T) & (column < D)
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = factor * tl.load(du + at, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            total = 0.5 * (total + tl.load(y + at, mask=inside, other=0.0).to(tl.float32))
            g = norm_gradient(total, g, D)
        else:  # x is the scaled norm
            total /= factor
            g = tl.load(inverse + row, mask=row < T, other=0.0) * (g - total * (tl.sum(total * g, 1, keep_dims=True) / D))
        if dout is not None:
            g += tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            g *= 0.5
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
        if low is not None:
            put_low_rows(low, low_scales, row, D, g, T)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, mean, low=None, weight=None, low_args=None):
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.mean, ctx.two = dict(D=x.size(1), MEAN=mean, SCALED=scale is not None), mean, y is not None
        if weight is not None:
            ctx.mark_dirty(x)
            if low_args is None:
                x.addmm_(y, weight.T)
            else:
                low_product(E4M3(*low_args[:2]), E4M3(*low_args[2:4]), x, True)
        add = ctx.two and not mean and weight is None
        out, u = torch.empty_like(x) if add else x, torch.empty_like(x)
        inverse = None if mean else x.new_empty(len(x), dtype=torch.float32)
        over_rows(add_norm_forward_kernel, "add_norm_forward", x, x, None if weight is not None else y, scale, out, u, inverse,
                  low, ADD=add, UNIT=low_unit(x.size(1)), **ctx.kind)
        ctx.save_for_backward(x if mean else u, y if mean or weight is not None else None, scale, inverse, weight,
                              *((None, None) if low_args is None else low_args[3:]))
        return out, u

    @staticmethod
    def backward(ctx, dout, du):
        x, y, scale, inverse, weight, w_scale, w_turned = ctx.saved_tensors
        dx, rows = torch.empty_like(x), E4M3(None, None) if w_turned is None else empty_rows(x)
        dout = None if dout is None else dout.contiguous()
        over_rows(add_norm_backward_kernel, "add_norm_backward", x, dout, du.contiguous(), x, y if ctx.mean else None, scale,
                  inverse, dx, *rows[:2], **ctx.kind)
        if weight is not None:
            dw = dx.T @ y  # before what is needed next
            dy = dx @ weight if w_turned is None else low_product(rows, E4M3(w_turned, w_scale), torch.empty_like(y))
            return dx, dy, None, None, None, dw, None
        return dx, dx if ctx.two else None, *[None] * 5


def lane_update(lane0: Tensor, lane1: Tensor, from_attn: Tensor, from_mlp: Tensor, resid: Tensor,
                post: Tensor) -> tuple[Tensor, Tensor]:
    """Both lanes (T, d) after a two-lane block: lane k becomes resid_k lane_k + post_0k from_attn + post_1k from_mlp.

    resid (2,) and post (2, 2).
    """
    if not fusible(lane0, lane0.size(1)):
        return reference_lane_update(lane0, lane1, from_attn, from_mlp, resid, post)
    return LaneUpdate.apply(lane0, lane1, from_attn, from_mlp, *spread("lane_update", lane0, (resid, 1), (post, 2)))


def reference_lane_update(lane0, lane1, from_attn, from_mlp, resid, post):
    return tuple((resid[k] * lane + post[0, k] * from_attn + post[1, k] * from_mlp).to(lane0.dtype)
                 for k, lane in enumerate((lane0, lane1)))


@jit
def lane_update_forward_kernel(lane0, lane1, attn, mlp, resid, post, new0, new1, T, D: tl.constexpr, ROWS: tl.constexpr,
                               STAGES: tl.constexpr):
    r0, r1 = tl.load(resid), tl.load(resid + 1)
    a0, a1, m0, m1 = tl.load(post), tl.load(post + 1), tl.load(post + 2), tl.load(post + 3)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, column = tile_rows(block, T, ROWS)[:, None], tl.arange(0, D)[None, :]
        at, inside = row * D + column, (row < T) & (column < D)
        a = tl.load(attn + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        x = r0 * tl.load(lane0 + at, mask=inside, other=0.0).to(tl.float32) + a0 * a + m0 * m
        tl.store(new0 + at, x.to(new0.dtype.element_ty), mask=inside)
        x = r1 * tl.load(lane1 + at, mask=inside, other=0.0).to(tl.float32) + a1 * a + m1 * m
        tl.store(new1 + at, x.to(new1.dtype.element_ty), mask=inside)


@jit
def lane_update_backward_kernel(dnew0, dnew1, lane0, lane1, attn, mlp, resid, post, dlane0, dlane1, dattn, dmlp, dresid,
                                dpost, T, D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    r0, r1 = tl.load(resid), tl.load(resid + 1)
    a0, a1, m0, m1 = tl.load(post), tl.load(post + 1), tl.load(post + 2), tl.load(post + 3)
    s0 = tl.zeros([ROWS], tl.float32)
    s1, s2, s3, s4, s5 = s0, s0, s0, s0, s0
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, column = tile_rows(block, T, ROWS)[:, None], tl.arange(0, D)[None, :]
        at, inside = row * D + column, (row < T) & (column < D)
        g0 = tl.load(dnew0 + at, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(dnew1 + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(attn + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mlp + at, mask=inside, other=0.0).to(tl.float32)
        s0 += tl.sum(g0 * tl.load(lane0 + at, mask=inside, other=0.0).to(tl.float32), 1)
        s1 += tl.sum(g1 * tl.load(lane1 + at, mask=inside, other=0.0).to(tl.float32), 1)
        s2 += tl.sum(g0 * a, 1)
        s3 += tl.sum(g1 * a, 1)
        s4 += tl.sum(g0 * m, 1)
        s5 += tl.sum(g1 * m, 1)
        tl.store(dlane0 + at, (r0 * g0).to(dlane0.dtype.element_ty), mask=inside)
        tl.store(dlane1 + at, (r1 * g1).to(dlane1.dtype.element_ty), mask=inside)
        tl.store(dattn + at, (a0 * g0 + a1 * g1).to(dattn.dtype.element_ty), mask=inside)
        tl.store(dmlp + at, (m0 * g0 + m1 * g1).to(dmlp.dtype.element_ty), mask=inside)
    dresid, dpost = dresid + tl.program_id(0) * 2, dpost + tl.program_id(0) * 4
    tl.store(dresid, tl.sum(s0, 0))
    tl.store(dresid + 1, tl.sum(s1, 0))
    tl.store(dpost, tl.sum(s2, 0))
    tl.store(dpost + 1, tl.sum(s3, 0))
    tl.store(dpost + 2, tl.sum(s4, 0))
    tl.store(dpost + 3, tl.sum(s5, 0))


class LaneUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lane0, lane1, from_attn, from_mlp, resid, post):
        resid, post = resid[0], post[0]
        ctx.save_for_backward(lane0, lane1, from_attn, from_mlp, resid, post)
        new = torch.empty_like(lane0), torch.empty_like(lane0)
        over_rows(lane_update_forward_kernel, "lane_update_forward", lane0, lane0, lane1, from_attn, from_mlp, resid, post,
                  *new, D=lane0.size(1))
        return new

    @staticmethod
    def backward(ctx, dnew0, dnew1):
        lane0, *_, resid, post = ctx.saved_tensors
        gradients = [torch.empty_like(lane0) for _ in range(4)]
        gradients += shares("lane_update_backward", lane0, resid, post)
        over_rows(lane_update_backward_kernel, "lane_update_backward", lane0, dnew0.contiguous(), dnew1.contiguous(),
                  *ctx.saved_tensors, *gradients, D=lane0.size(1))
        return tuple(gradients)


# --- MLP --------------------------------------------------------------------------------------------------------------
# On Hopper both products that meet the activation are one kernel: of the nine warps on a multiprocessor one loads, and two
# groups of four take turns, so that one finishes a tile while the other multiplies.

MLP_TILE = dict(BM=128, BN=128, BK=64, STAGES=4)  # rows, columns and depth of a tile; blocks of w in shared memory
LOW_RING = dict(BK=128, STAGES=6)  # instead, with x and w in 8 bits
LOW_TILE = dict(BM=128, BN=256, BK=128, num_warps=8, num_stages=3)  # of low_product
A_UNIT = 4.0  # what 1 is for the activation in 8 bits, which ends at 1,792
DP_UNIT = 2.0 ** 17  # likewise for the gradient before the activation, in units of the 8-bit product that it comes from


class LowMLP(NamedTuple):
    """What the products of squared_mlp need to run in E4M3, d a multiple of 256."""

    u: E4M3
    w_up: E4M3
    w_down: E4M3
    a_unit: Tensor  # (), A_UNIT
    dp_unit: Tensor  # (), DP_UNIT * w_up.scale * w_down.scale


def squared_mlp(u: Tensor, w_up: Tensor, w_down: Tensor, slope: float, x: Tensor | None = None,
                low: LowMLP | None = None) -> Tensor:
    """leaky_relu_squared(u W_up^T) W_down^T, added to x if given; u and x (T, d), w_up (F, d), w_down (d, F).

    On CUDA the sum is written over x, which nothing else may need then. `low`: where the kernel runs, the products of the
    forward pass and those for the gradients of activation and u multiply 8-bit floats; those for the matrices' do not.
    """
    if not mlp_fusible(u, len(w_up)):
        y = F.linear(leaky_relu_squared(F.linear(u, w_up), slope), w_down)
        return y if x is None else x + y
    return SquaredMLP.apply(u, w_up, w_down, slope, x, low)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope).square()


def mlp_fusible(u: Tensor, hidden: int) -> bool:
    """Whether the kernel runs for u (T, d): on Hopper, if rows of u, blocks of w and parts of results fit into 227 KiB."""
    (_, d), (BM, BN, BK, STAGES) = u.shape, MLP_TILE.values()
    return (gluon is not None and u.is_cuda and u.dtype == torch.bfloat16 and d % BK == hidden % (2 * BN) == 0
            and 2 * (BM * d + STAGES * BK * BN + BM * BN) <= 226 * 1024 and torch.cuda.get_device_capability(u.device)[0] == 9)


gluon_jit = functools.partial(gluon.jit, do_not_specialize=["M"], do_not_specialize_on_alignment=[
    "x_scale", "w_scale"]) if gluon else lambda function: function
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)  # the name up to 3.7
tma_store = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)


@gluon_jit
def barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """Each one's phase flips at every COUNT-th arrival. To wait for parity 0 is to wait for the first flip, the third, ..."""
    made = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon_jit
def load_block(source, place, full, block):
    """Begin to copy the block at place = [row, column] to shared memory; `full` flips when it is there."""
    mbarrier.expect(full, source.block_type.nbytes)
    tma_load(source, place, full, block)


@gluon_jit
def fetch(x, w, rings, M, ACROSS: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
          BK: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads: per row of tiles the blocks of x, per tile those of w, each as soon as its place is free."""
    xs, x_full, x_free, ws, w_full, w_free = rings
    step, turn = 0, 0
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        for column in range(0, N, BN):
            for k in range(K // BK):
                if column == 0:
                    mbarrier.wait(x_free.index(k), turn & 1 ^ 1)
                    load_block(x, [row, k * BK], x_full.index(k), xs.index(k))
                stage = step % STAGES
                mbarrier.wait(w_free.index(stage), step // STAGES & 1 ^ 1)
                load_block(w, [k * BK, column] if ACROSS else [column, k * BK], w_full.index(stage), ws.index(stage))
                step += 1
        turn += 1


@gluon_jit
def multiply(rings, step, turn, last, done, ACROSS: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             BK: gl.constexpr, STAGES: gl.constexpr):
    """A tile (BM, BN) of the product; `step` counts blocks of w, `turn` rows of tiles, `last`: x is needed no more.

    A block is given back once the next product runs. `done` flips when the other group may begin.
    """
    xs, x_full, x_free, ws, w_full, w_free = rings
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth  # of one instruction
    acc = hopper.warpgroup_mma_init(gl.zeros([BM, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, DEPTH])))
    for k in range(K // BK):
        stage, before = (step + k) % STAGES, gl.maximum(k - 1, 0)
        mbarrier.wait(x_full.index(k), turn & 1)
        mbarrier.wait(w_full.index(stage), (step + k) // STAGES & 1)
        right = ws.index(stage) if ACROSS else ws.index(stage).permute((1, 0))
        acc = hopper.warpgroup_mma(xs.index(k), right, acc, use_acc=k > 0, is_async=True)
        acc = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(w_free.index((step + before) % STAGES), count=1, pred=k > 0)
        mbarrier.arrive(x_free.index(before), count=1, pred=last & (k > 0))
    mbarrier.arrive(done, count=1)
    product = hopper.warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(w_free.index((step + K // BK - 1) % STAGES), count=1)
    mbarrier.arrive(x_free.index(K // BK - 1), count=1, pred=last)
    return product


@gluon_jit
def halves(x, R: gl.constexpr, C: gl.constexpr):
    """The left and the right one of x (R, C)."""
    return x.reshape([R, 2, C // 2]).permute([0, 2, 1]).split()


@gluon_jit
def take_turns(WHICH: gl.constexpr, own, rings, a, out, low, rest, UNIT: gl.constexpr, BACKWARD: gl.constexpr,
               N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """Group WHICH, 0 or 1, makes every other tile of a row. A tile leaves in four parts, and a arrives so, by two buffers."""
    bits, M, slope, x_scale, w_scale = rest
    begin, done, buffers = own[:3]  # then backward a barrier for each buffer, with UNIT the buffers for what leaves in 8 bits
    LOW: gl.constexpr = UNIT is not None
    ACROSS: gl.constexpr = BACKWARD and not LOW
    C: gl.constexpr = BN // 4
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    sign = gl.expand_dims(1 << gl.arange(0, C, gl.SliceLayout(0, PART)), 0)
    scale = 1.0
    if LOW:
        scale = gl.load(w_scale)
        if not BACKWARD:
            scale *= gl.load(x_scale)
    count = 0  # of tiles
    for row in range(gl.program_id(0) * BM, M, gl.num_programs(0) * BM):
        rows = row + gl.arange(0, BM, gl.SliceLayout(1, PART))
        for column in range(WHICH * BN, N, 2 * BN):
            words, inside = bits + (column // C).to(gl.int64) * M + rows, rows < M
            if BACKWARD:
                tma.store_wait(0)
                for i in gl.static_range(2):
                    load_block(a, [row, column + i * C], own[3].index(i), buffers.index(i))
                kept = (gl.load(words, mask=inside), gl.load(words + M, mask=inside),
                        gl.load(words + 2 * M, mask=inside), gl.load(words + 3 * M, mask=inside))
                if LOW:
                    factor = gl.expand_dims(scale * gl.load(x_scale + rows, mask=inside, other=0.0), 1)
            # Not before the other one has had all its blocks of w: a parity tells but one turn of the ring from the next.
            mbarrier.wait(begin, count + 1 - WHICH & 1)
            acc = multiply(rings, (2 * count + WHICH) * (K // BK), count // (N // BN // 2), column >= N - 2 * BN, done,
                           ACROSS, K, BM, BN, BK, STAGES)
            left, right = halves(acc, BM, BN)
            parts = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
            for i in gl.static_range(4):
                value, buffer = gl.convert_layout(parts[i], PART), buffers.index(i % 2)
                if BACKWARD:
                    mbarrier.wait(own[3].index(i % 2), i // 2)
                    positive = (gl.expand_dims(kept[i], 1) & sign) == 0
                    value *= gl.sqrt(buffer.load(PART).to(gl.float32)) * gl.where(positive, 2.0, -2.0 * slope)
                    if LOW:
                        own[4].index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                        value *= factor
                else:
                    if LOW:
                        value *= scale
                    gl.store(words + i * M, gl.sum(gl.where(value < 0, sign, 0), 1), mask=inside)
                    value = gl.where(value < 0, slope * value, value)
                    value *= value
                    tma.store_wait(2 if LOW else 1)
                    if LOW:
                        own[3].index(i % 2).store((value * (1 / UNIT)).to(gl.float8e4nv))
                buffer.store(value.to(gl.bfloat16))
                hopper.fence_async_shared()
                tma_store(out, [row, column + i * C], buffer)
                if LOW:
                    tma_store(low, [row, column + i * C], own[3 + BACKWARD].index(i % 2))
                if BACKWARD and i == 1:
                    for j in gl.static_range(2):
                        tma.store_wait((1 - j) * (1 + LOW))
                        load_block(a, [row, column + (2 + j) * C], own[3].index(j), buffers.index(j))
            count += 1
    tma.store_wait(0)


@gluon_jit
def part_buffers(out, low, BACKWARD: gl.constexpr):
    """What a group passes parts of tiles through, see own in take_turns.

    A barrier that nothing waits for must not be made: its place would be given to other data, and where a kernel is
    interrupted, because another process has its turn, the barrier is restored there.
    """
    made = (gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout),)
    if BACKWARD:
        made += (barriers(2, 1),)
    if low is not None:
        made += (gl.allocate_shared_memory(low.dtype, [2] + low.block_type.shape, low.layout),)
    return made


@gluon_jit
def mlp_product_kernel(x, w, a, out, low, bits, M, slope, x_scale, w_scale, UNIT: gl.constexpr, BACKWARD: gl.constexpr,
                       N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                       STAGES: gl.constexpr):
    """See mlp_product. While a row of tiles is made, its rows of x stay in shared memory and w passes through a ring.

    a is read in the backward pass; low, with UNIT, is what leaves once more, in 8 bits.
    """
    xs = gl.allocate_shared_memory(x.dtype, [K // BK, BM, BK], x.layout)
    ACROSS: gl.constexpr = BACKWARD and UNIT is None
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BK, BN] if ACROSS else [STAGES, BN, BK], w.layout)
    rings = (xs, barriers(K // BK, 1), barriers(K // BK, 2), ws, barriers(STAGES, 1), barriers(STAGES, 1))
    go = barriers(2, 1)
    one = (go.index(0), go.index(1)) + part_buffers(out, low, BACKWARD)
    other = (go.index(1), go.index(0)) + part_buffers(out, low, BACKWARD)
    hopper.fence_async_shared()
    rest = bits, M, slope, x_scale, w_scale
    gl.warp_specialize([
        (take_turns, (0, one, rings, a, out, low, rest, UNIT, BACKWARD, N, K, BM, BN, BK, STAGES)),
        (take_turns, (1, other, rings, a, out, low, rest, UNIT, BACKWARD, N, K, BM, BN, BK, STAGES)),
        (fetch, (x, w, rings, M, ACROSS, N, K, BM, BN, BK, STAGES))], [4, 1], [232, 40])  # warps, registers


def mlp_product(x: Tensor | E4M3, w: Tensor | E4M3, a: Tensor, bits: Tensor, slope: float, out: Tensor | None = None,
                low: Tensor | None = None) -> None:
    """Forward: with p = x w^T, x (M, K), w (N, K): fill a = phi(p) (M, N) and bits. Backward: out = (x w) phi'(p), w (K, N).

    bits (N / 32, M) int32: bit j of word (i, m) is set where p[m, 32 i + j] < 0. There phi(p) = (slope p)^2 and phi'(p) is
    -2 slope sqrt(a), elsewhere p^2 and 2 sqrt(a). With x and w in E4M3, backward a scale for each row of x and w^T (N, K) in
    place of w, low (M, N) is filled too: with a / A_UNIT, backward with out / (DP_UNIT x.scale w.scale).
    """
    backward, scales = out is not None, (None, None)
    if low is None:
        x, w, unit, tile = x.contiguous(), w.contiguous(), None, MLP_TILE
    else:
        scales, unit, tile = (x.scale, w.scale), DP_UNIT if backward else A_UNIT, MLP_TILE | LOW_RING
        x, w = x.values, w.values
    (M, K), N, (BM, BN, BK, _) = x.shape, a.size(1), tile.values()
    part, of_w = [BM, BN // 4], [BK, BN] if backward and low is None else [BN, BK]
    operands = [None if operand is None else GluonDescriptor.from_tensor(operand, block, gl.NVMMASharedLayout.get_default_for(
        block, gl.float8e4nv if operand.dtype == torch.float8_e4m3fn else gl.bfloat16)) for operand, block in (
            (x, [BM, BK]), (w, of_w), (a if backward else None, part), (out if backward else a, part), (low, part))]
    mlp_product_kernel[min(triton.cdiv(M, BM), multiprocessors(x.device)),](
        *operands, bits, M, slope, *scales, UNIT=unit, BACKWARD=backward, N=N, K=K, **tile, num_warps=4)


@jit
def low_product_kernel(x, w, out, x_scale, w_scale, M, PER_ROW: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr,
                       K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """See low_product. The tiles beside each other, which share rows of x, are made at the same time."""
    scale = tl.load(w_scale)
    if not PER_ROW:
        scale *= tl.load(x_scale)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * (N // BN), tl.num_programs(0), flatten=True):
        row, column = tile // (N // BN) * BM, tile % (N // BN) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        sides, factor = acc.reshape([BM, 2, BN // 2]).permute([0, 2, 1]).split(), scale
        if PER_ROW:
            rows = row + tl.arange(0, BM)
            factor = scale * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
        for i in tl.static_range(2):
            value = sides[i] * factor
            if ADD:
                value += out.load([row, column + i * BN // 2]).to(tl.float32)
            out.store([row, column + i * BN // 2], value.to(tl.bfloat16))


def low_product(x: E4M3, w: E4M3, out: Tensor, add: bool = False) -> Tensor:
    """out (M, N) = x w^T, added to what it holds if `add`; x (M, K), with a scale for each row or one, and w (N, K)."""
    per_row = x.scale.dim() == 1
    if not fusible(out):
        y = (x.values.float() @ w.values.float().T) * (x.scale[:, None] if per_row else x.scale) * w.scale
        return out.copy_(out + y if add else y)
    (BM, BN, BK, *_), (M, K), N = LOW_TILE.values(), x.values.shape, out.size(1)
    operands = [TensorDescriptor.from_tensor(*pair)
                for pair in ((x.values, [BM, BK]), (w.values, [BN, BK]), (out, [BM, BN // 2]))]
    low_product_kernel[min(triton.cdiv(M, BM) * (N // BN), multiprocessors(out.device)),](
        *operands, x.scale, w.scale, M, PER_ROW=per_row, ADD=add, N=N, K=K, **LOW_TILE)
    return out


class SquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, w_up, w_down, slope, x=None, low=None):
        a = torch.empty(len(u), len(w_up), dtype=u.dtype, device=u.device)
        bits = torch.empty(len(w_up) // 32, len(u), dtype=torch.int32, device=u.device)
        low_a = None if low is None else torch.empty_like(a, dtype=torch.float8_e4m3fn)
        mlp_product(*((u, w_up) if low is None else low[:2]), a, bits, slope, None, low_a)
        kept = () if low is None else (low.w_down.turned, low.w_down.scale, low.w_up.turned, low.dp_unit)
        ctx.save_for_backward(u, w_up, w_down, a, bits, *kept)
        ctx.slope, ctx.added = slope, x is not None
        if ctx.added:
            ctx.mark_dirty(x)
        if low is not None:
            return low_product(E4M3(low_a, low.a_unit), low.w_down, torch.empty_like(u) if x is None else x, ctx.added)
        return F.linear(a, w_down) if x is None else x.addmm_(a, w_down.T)

    @staticmethod
    def backward(ctx, dy):
        u, w_up, w_down, a, bits, *low = ctx.saved_tensors
        dy, dp = dy.contiguous(), torch.empty_like(a)
        if low:
            down_turned, down_scale, up_turned, dp_unit = low
            rows, low_dp = low_rows(dy), torch.empty_like(a, dtype=torch.float8_e4m3fn)
            mlp_product(rows, E4M3(down_turned, down_scale), a, bits, ctx.slope, dp, low_dp)
        else:
            mlp_product(dy, w_down, a, bits, ctx.slope, dp)
        dw_down, dw_up = dy.T @ a, dp.T @ u  # before what is needed next
        if low:
            du = low_product(E4M3(low_dp, rows.scale), E4M3(up_turned, dp_unit), torch.empty_like(u))
        else:
            du = dp @ w_up
        return du, dw_up, dw_down, None, dy if ctx.added else None, None


# --- AdamW per slot ---------------------------------------------------------------------------------------------------


def adamw_rows(p: Tensor, work: Tensor, square: Tensor, mean: Tensor | None, slots: Tensor, on: Tensor, grad: Tensor,
               count: Tensor, rate: Tensor, decay: float, beta1: float, beta2: float) -> None:
    """One AdamW step, in place, on the rows slots[s] (S,) int64, all different, of p (N, n) where on[s].

    p, square and mean (None without beta1) are float32; work receives p in the dtype of the products; grad (S, n);
    count (S,) float32: the row's steps including this one; rate (S,) float32: its learning rate.
    """
    function = triton_adamw_rows if p.is_cuda else reference_adamw_rows
    function(p, work, square, mean, slots, on, grad, count, rate, decay, beta1, beta2)


def reference_adamw_rows(p, work, square, mean, slots, on, grad, count, rate, decay, beta1, beta2):
    slots, g, count, rate = slots[on], grad[on].float(), count[on, None], rate[on, None]
    square[slots] = squares = beta2 * square[slots] + (1 - beta2) * g * g
    if mean is not None:
        mean[slots] = g = beta1 * mean[slots] + (1 - beta1) * g
        g = g / (1 - beta1 ** count)
    p[slots] = new = p[slots] * (1 - rate * decay) - rate * g / ((squares / (1 - beta2 ** count)).sqrt() + 1e-10)
    work[slots] = new.to(work.dtype)


@jit
def adamw_kernel(p, work, square, mean, slots, on, grad, debias1, debias2, rates, n, decay, beta1, beta2,
                 HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    s, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(on + s) == 0:
        return
    row, inside = tl.load(slots + s) * n + at, at < n
    g = tl.load(grad + s * n + at, mask=inside, other=0.0).to(tl.float32)
    squares = beta2 * tl.load(square + row, mask=inside, other=0.0) + (1 - beta2) * g * g
    tl.store(square + row, squares, mask=inside)
    if HAS_MEAN:
        g = beta1 * tl.load(mean + row, mask=inside, other=0.0) + (1 - beta1) * g
        tl.store(mean + row, g, mask=inside)
        g = g / tl.load(debias1 + s)
    rate = tl.load(rates + s)
    x = tl.load(p + row, mask=inside, other=0.0) * (1 - rate * decay)
    x -= rate * g / (tl.sqrt(squares / tl.load(debias2 + s)) + 1e-10)
    tl.store(p + row, x, mask=inside)
    tl.store(work + row, x.to(work.dtype.element_ty), mask=inside)


def triton_adamw_rows(p, work, square, mean, slots, on, grad, count, rate, decay, beta1, beta2):
    n = p.size(1)
    adamw_kernel[triton.cdiv(n, 1024), len(slots)](
        p, work, square, p if mean is None else mean, slots, on.float(), grad.contiguous(), 1 - beta1 ** count,
        1 - beta2 ** count, rate, n, float(decay), float(beta1), float(beta2), HAS_MEAN=mean is not None, BLOCK=1024,
        num_warps=4)


# --- A product per slot -----------------------------------------------------------------------------------------------


def grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y (T, N) with y[t] = x[t] @ w[s] where ends[s - 1] <= t < ends[s]; x (T, K), w (S, K, N), ends (S,) int32.

    On CUDA bf16, K and N multiples of 8, S < 1024.
    """
    return GroupedProduct.apply(x, w, ends) if x.is_cuda else reference_grouped_product(x, w, ends)


def reference_grouped_product(x, w, ends):
    return torch.cat([x[a:b] @ matrix for (a, b), matrix in zip(itertools.pairwise([0, *ends.tolist()]), w)])


class GroupedProduct(torch.autograd.Function):
    """PyTorch's own derivative of grouped_mm passes expanded gradients on to a kernel that refuses them."""

    @staticmethod
    def forward(ctx, x, w, ends):
        x = x.contiguous()
        ctx.save_for_backward(x, w, ends)
        return F.grouped_mm(x, w, offs=ends)

    @staticmethod
    def backward(ctx, dy):
        x, w, ends = ctx.saved_tensors
        dy = dy.contiguous()
        dx = F.grouped_mm(dy, w.transpose(1, 2), offs=ends) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:  # in the layout of w
            dw = (F.grouped_mm(x.t(), dy, offs=ends) if w.stride(2) == 1
                  else F.grouped_mm(dy.t(), x, offs=ends).transpose(1, 2))
        return dx, dw, None


class FullProduct(torch.autograd.Function):
    """x W^T of bf16 matrices x (T, d) and W (V, d), which is a constant, with a float32 result."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight, = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


# ======================================================================================================================
# 5. Model
# ======================================================================================================================

class Low(NamedTuple):
    """What the products of one block that run in E4M3 need."""

    unit: Tensor  # (), of the normalized inputs
    attended_unit: Tensor  # (), ATTENDED_UNIT
    a_unit: Tensor  # (), see LowMLP
    dp_unit: Tensor
    w_qkv: E4M3
    w_out: E4M3
    w_up: E4M3
    w_down: E4M3


class Layer(NamedTuple):
    """What one block needs, cut out of the stacked parameters. Matrices are in the compute dtype, the rest float32.

    The vectors from resid_mix on may come spread, with a row for each program.
    """

    w_qkv: Tensor  # ((heads + 2 kv_heads) D, d)
    w_out: Tensor  # (d, d), its rows multiplied by attn_scale
    w_up: Tensor  # (F, d)
    w_down: Tensor  # (d, F), its rows multiplied by mlp_scale
    input_scale: Tensor  # ()
    resid_mix: Tensor  # (2, d)
    q_gain: Tensor  # (heads,)
    attn_gate: Tensor | None  # (heads, GATE_WINDOW), (heads, d) for the dense gate
    xsa_alpha: Tensor | None  # (heads,)
    lane_post: Tensor | None  # (2, 2): [from attention, from MLP] x [to lane 0, to lane 1]; None before the first such block
    lane_resid: Tensor | None  # (2,)
    exclusive: bool  # whether XSA is on
    low: Low | None = None
    adapter: Callable | None = None  # called with (site, x, y, u) after each product, returns y
    context: Callable | None = None  # called with (q, k, v) in place of attention()

    def product(self, site: str, x: Tensor, weight: Tensor, u: Tensor) -> Tensor:
        """y = x W^T at one of the sites qkv, out, up, down; u is the normalized input of this attention or MLP."""
        y = F.linear(x, weight)
        return y if self.adapter is None else self.adapter(site, x, y, u)


class Rider:
    """What comes along on a forward pass, to see or to change it."""

    def embedding(self, ids: Tensor, x: Tensor, rows: int) -> None:
        """Sees the embedding's rows x (T, d) of `ids`, out of `rows`."""

    def block(self, visit: int, layer: int) -> dict:
        """The fields of Layer that it sets for this visit, the number `visit` of the pass, of block `layer`."""
        return {}


class GPT(nn.Module):
    """The language model over packed tokens: (T,) ids in, losses or logits per token out.

    Every per-layer tensor is stacked over the layers, so that there are 4 banks of matrices for Muon and a dozen small
    tensors, instead of hundreds. Parameters are float32 masters; matrix products run in `compute_dtype`.
    """

    PARTS = ("layers", "embed")  # what torch.compile makes of the rest would read the activations more than once

    def __init__(self, settings: Settings, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        s = self.settings = settings
        self.compute_dtype = compute_dtype
        self.attention_kernel = attention_kernel(s.attention) if torch.cuda.is_available() else "reference"
        self.fp8 = s.fp8 == "1" or s.fp8 == "auto" and low_products_fit(s, compute_dtype)  # in passes with gradients
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
        q_gain                                  QK_GAIN_INIT_SCHEDULE, else QK_GAIN_INIT
        attn_gate                               normal with its *_INIT_STD (0 for the published systems)
        skip_gates, smear_*, xsa_alpha          0
        parallel_post_lambdas / _resid_lambdas  1 / 1.1
        softcap_pos, softcap_neg                LOGIT_SOFTCAP
        """
        s, n = self.settings, self.settings.num_layers
        draw = torch.Generator().manual_seed(s.seed)
        constants = dict(mlp_down_bank=0, attn_scale=1, mlp_scale=1, skip_weights=1, skip_gates=0, smear_gate=0,
                         smear_lambda=0, xsa_alpha=0, parallel_post_lambdas=1, parallel_resid_lambdas=1.1,
                         softcap_pos=s.logit_softcap, softcap_neg=s.logit_softcap)
        for name, value in constants.items():
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)
        self.q_gain.copy_(torch.tensor((s.gains + [s.qk_gain_init] * n)[:n])[:, None])
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
        """Compile the parts that are compiled; the rest runs on its own kernels."""
        for part in self.PARTS:
            setattr(self, part, runtime.compile(getattr(self, part), fullgraph=True))
        return self

    def plain(self) -> GPT:
        """The same weights without compiled parts and 8-bit products."""
        plain = copy.copy(self)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if name not in self.PARTS} | dict(fp8=False)
        return plain

    def frozen(self) -> GPT:
        """The same weights without compiled parts and without gradients of their own."""
        plain = self.plain()
        plain.__dict__["_parameters"] = {name: p if p is None else p.detach() for name, p in self._parameters.items()}
        return plain

    def programs(self, x: Tensor) -> list[int]:
        """For how many programs the vectors of mix_norm, qk_prep, xsa_gate and lane_update are spread in a pass; 0: not."""
        s = self.settings
        wanted = torch.is_grad_enabled() and self.resid_mix.requires_grad and fusible(
            x, s.model_dim, s.num_heads, s.num_kv_heads, s.rotary_dims // 2)
        return [row_programs(name + "_backward", x) * wanted for name in ("mix_norm", "qk_prep", "xsa_gate", "lane_update")]

    def layers(self, mix: int = 0, gain: int = 0, gate: int = 0, lanes: int = 0) -> list[Layer]:
        """Cut the stacks into layers, once per forward pass; unbind gathers a bank's gradient in one stack.

        The arguments are those of programs(). The residual scales are multiplied into the output matrices, where they cost
        nothing per token.
        """
        s, n, dtype = self.settings, self.settings.num_layers, self.compute_dtype
        queries, outputs = self.qo_bank.split(n)
        query, key_value = queries.to(dtype).unbind(), self.kv_bank.to(dtype).unbind()
        out = (self.attn_scale[:, :, None] * outputs).to(dtype).unbind()
        up, down = self.mlp_up_bank.to(dtype).unbind(), (self.mlp_scale[:, :, None] * self.mlp_down_bank).to(dtype).unbind()
        gate = gate * (s.sparse_attn_gate_enabled and s.xsa_last_n >= n)  # else plain formulas may read them
        lambdas = (cut(x, lanes, s.parallel_start_layer) for x in (self.parallel_post_lambdas, self.parallel_resid_lambdas))
        small = zip(self.input_scales.unbind(), cut(self.resid_mix, mix), cut(self.q_gain, gain), cut(self.attn_gate, gate),
                    cut(self.xsa_alpha, gate), *lambdas)
        low = [None] * n
        if self.fp8 and torch.is_grad_enabled():
            stacks = (torch.cat((queries, *self.kv_bank.split(n)), 1), self.attn_scale[:, :, None] * outputs,
                      self.mlp_up_bank, self.mlp_scale[:, :, None] * self.mlp_down_bank)
            matrices = [e4m3(stack.detach()) for stack in stacks]
            one, (ups, downs) = torch.ones_like(self.input_scales), (torch.stack([w.scale for w in ws]) for ws in matrices[2:])
            units = low_unit(s.model_dim) * self.input_scales, ATTENDED_UNIT * one, A_UNIT * one, DP_UNIT * ups * downs
            low = [Low(*fields) for fields in zip(*map(apart, units), *matrices)]
        return [Layer(torch.cat((query[i], key_value[i], key_value[n + i])), out[i], up[i], down[i], *vectors,
                      exclusive=i >= n - s.xsa_last_n, low=low[i]) for i, vectors in enumerate(small)]

    def forward(self, ids: Tensor, segments: Segments, looping: bool, rider: Rider | None = None) -> Tensor:
        """Final normalized hidden states (T, d) of packed ids (T,); looping: visit the looped blocks again."""
        s = self.settings
        rope = rotary_tables(segments.positions, s.rotary_dims, s.rope_base)
        x0 = x = self.embed(ids, segments.positions, segments.previous, rider)
        programs, entered, lanes, visits = self.programs(x), [], None, itertools.count()
        layers = self.layers(*programs)

        def visited(i: int) -> Layer:
            return layers[i] if rider is None else layers[i]._replace(**rider.block(next(visits), i))

        encoder, decoder = self.orders[looping]
        for i in encoder:
            x, before, x0 = self.block(x, x0, None, visited(i), segments, rope)
            entered.append(before)
        skips = [*entered[1:], x]
        vectors = list(zip(*(cut(stack, programs[0]) for stack in (self.skip_weights, self.skip_gates))))[:len(skips)]
        for i, own in itertools.zip_longest(decoder, vectors):
            skip = Skip(skips.pop(), *own) if own is not None else None
            if s.parallel_start_layer and i >= s.parallel_start_layer:
                *lanes, x0 = self.two_lane_block(*(lanes or (x, None)), x0, skip, visited(i), segments, rope)
            else:
                x, _, x0 = self.block(x, x0, skip, visited(i), segments, rope)
        ends = {"mean": slice(2), "attn": slice(1), "mlp": slice(1, 2)}[s.parallel_final_lane]
        return mean_norm(*(lanes[ends] if lanes else (x,)))

    def embed(self, ids: Tensor, positions: Tensor, previous: Tensor | None = None, rider: Rider | None = None) -> Tensor:
        """Normalized embeddings (T, d); SmearGate adds a gated share of the previous token's in the segment."""
        s = self.settings
        x = F.embedding(ids, self.tok_emb)
        if rider is not None:
            rider.embedding(ids, x, s.vocab_size)
        if s.smear_gate_enabled:
            first = int(previous is None)  # a packed row's first token has no left neighbour
            leak = previous is None and not s.smear_gate_bos_fix
            keep = torch.ones_like(positions[first:]) if leak else positions[first:] > 0
            score = (x[first:, :s.gate_window] * self.smear_gate).sum(-1, keepdim=True)
            before = x[:-1] if previous is None else F.embedding(previous, self.tok_emb)
            x = torch.cat((x[:first], x[first:] + self.smear_lambda * torch.sigmoid(score) * keep[:, None] * before))
        return norm(x).to(self.compute_dtype)

    def block(self, x: Tensor, x0: Tensor, skip: Skip | None, w: Layer, segments: Segments,
              rope) -> tuple[Tensor, Tensor, Tensor]:
        """One transformer block on the stream x (T, d); also x as it was and the embedding x0, for later uses."""
        low, low1 = self.low_like(x, w)
        x, u, window, before, x0 = mix_norm(x, x0, skip, w.resid_mix, w.input_scale, self.settings.gate_window, False, low)
        y, low_args = self.attend(u, window, w, segments, rope, low)
        if w.adapter is None:
            x, u = add_norm(x, y, w.input_scale, low1, w.w_out, low_args)
        else:
            x, u = add_norm(x, w.product("out", y, w.w_out, u), w.input_scale, low1)
        return self.mlp(u, w, x, low1), before, x0

    def two_lane_block(self, lane0: Tensor, lane1: Tensor | None, x0: Tensor, skip: Skip | None, w: Layer,
                       segments: Segments, rope) -> tuple[Tensor, Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1 (at first the same), at the same time; both outputs go to both lanes."""
        low, low1 = self.low_like(lane0, w)
        lane0, u, window, before, x0 = mix_norm(lane0, x0, skip, w.resid_mix, w.input_scale, self.settings.gate_window, True,
                                                low)
        lane1, u1 = add_norm(before if lane1 is None else lane1, None, w.input_scale, low1)
        y, low_args = self.attend(u, window, w, segments, rope, low)
        y = w.product("out", y, w.w_out, u) if low_args is None else LowProduct.apply(y, w.w_out, low_args)
        return *lane_update(lane0, lane1, y, self.mlp(u1, w, None, low1), w.lane_resid, w.lane_post), x0

    def low_like(self, x: Tensor, w: Layer) -> list[Tensor | None]:
        """Room for the normalized inputs of a block's attention and MLP in E4M3, if it has products that read them."""
        return [None if w.low is None else torch.empty_like(x, dtype=torch.float8_e4m3fn) for _ in range(2)]

    def mlp(self, u: Tensor, w: Layer, x: Tensor | None = None, low: Tensor | None = None) -> Tensor:
        """Scaled MLP output (T, d) for the normalized u (T, d), added to x if given, which may be written over.

        low: u in E4M3 too.
        """
        slope = self.settings.leaky_relu_sq_slope
        if w.adapter is None:
            return squared_mlp(u, w.w_up, w.w_down, slope, x,
                               None if low is None else LowMLP(E4M3(low, w.low.unit), w.low.w_up, w.low.w_down,
                                                               w.low.a_unit, w.low.dp_unit))
        y = w.product("down", leaky_relu_squared(w.product("up", u, w.w_up, u), slope), w.w_down, u)
        return y if x is None else x + y

    def attend(self, u: Tensor, window: Tensor, w: Layer, segments: Segments, rope,
               low: Tensor | None = None) -> tuple[Tensor, LowArgs | None]:
        """What attention makes of the normalized u (T, d), whose leading channels are `window`: (T, d), for the product w_out.

        low: u in E4M3; then also what that product needs besides to run in E4M3, else None.
        """
        s = self.settings
        gated_by_q, product = s.attn_out_gate_enabled and s.attn_out_gate_src == "q", ()
        if low is None:
            qkv = w.product("qkv", u, w.w_qkv, u)
        elif gated_by_q:
            qkv = LowProduct.apply(u, w.w_qkv, LowArgs(low, w.low.unit, *w.low.w_qkv))
        else:  # the product and its gradient come with the next step
            qkv, product = u, (w.w_qkv, LowArgs(low, w.low.unit, *w.low.w_qkv))
        trains = qkv.is_cuda and qkv.requires_grad and w.context is None
        copies = s.num_heads // s.num_kv_heads if trains else 1
        q, k, v, own = qk_prep(qkv, rope, w.q_gain, s.num_heads, s.num_kv_heads, copies, *product)
        if w.context is None:
            y, lse = attention(q, k, v, segments, self.attention_kernel, copies)
        else:
            y, lse = w.context(q, k, v), None
        sparse = w.attn_gate if s.sparse_attn_gate_enabled else None
        dense, low = w.attn_gate is not None and sparse is None, None if low is None else torch.empty_like(low)
        y = xsa_gate(y, own if w.exclusive else None, window, sparse, w.xsa_alpha, s.sparse_attn_gate_scale,
                     None if dense else low, lse)
        if dense:
            source = qkv if gated_by_q else u
            gate = torch.sigmoid(F.linear(source[:, :w.attn_gate.size(-1)], w.attn_gate.to(source.dtype)).float())
            y = (y.unflatten(1, (s.num_heads, -1)) * ((1 + s.attn_out_gate_enabled) * gate)[..., None]).to(u.dtype).flatten(1)
            put_attended(low, y)
        return y, None if low is None else LowArgs(low, w.low.attended_unit, *w.low.w_out)

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits (T, vocab) before the soft cap; float32 unless the embedding is trained, then in the compute dtype."""
        weight = self.tok_emb.to(hidden.dtype)
        if hidden.is_cuda and not torch.is_grad_enabled():
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if hidden.is_cuda and not weight.requires_grad:
            return FullProduct.apply(hidden, weight)
        return F.linear(hidden, weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits (T, vocab), float32."""
        scores = self.scores(hidden).float()
        cap = self.softcaps(scores)
        return cap * torch.tanh(scores / cap)

    def softcaps(self, scores: Tensor) -> Tensor | float:
        """The cap of each score, by its sign."""
        if self.softcap_pos is None:
            return self.settings.logit_softcap
        return torch.where(scores >= 0, self.softcap_pos, self.softcap_neg)

    def caps(self) -> list[Tensor | float]:
        """The caps of positive and negative logits."""
        return [self.settings.logit_softcap if cap is None else cap for cap in (self.softcap_pos, self.softcap_neg)]

    def head_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if not (self.fp8 and torch.is_grad_enabled()):
            return two_value_nll(self.scores(hidden), *self.caps(), targets)[0]
        weight, unit = self.tok_emb.to(hidden.dtype), low_unit(self.settings.model_dim)
        [low], x_low = e4m3(weight.detach()[None]), (hidden.detach() / unit).to(torch.float8_e4m3fn)
        low_args = LowArgs(x_low, self.input_scales.new_full((), unit), *low)
        return two_value_nll(hidden, *self.caps(), targets, None, weight, low_args)[0]

    def token_losses(self, ids: Tensor, targets: Tensor, segments: Segments, looping: bool) -> Tensor:
        """Cross entropy of each target (T,) in nats, float32."""
        return self.head_losses(self(ids, segments, looping), targets)


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


def learning_rate_multiplier(progress: float, steps_left: float, step: int, changed: int, s: Settings) -> float:
    """What every learning rate is multiplied by in `step`: rises in steps, then 1, then a linear fall to MIN_LR.

    changed: the step in which the context length last changed, 0 if never. The fall is in progress (WARMDOWN_FRAC) or in
    steps that are left (WARMDOWN_ITERS).
    """
    rise = min(1.0, (step + 1) / max(1, s.lr_warmup_steps))
    if changed:
        rise *= min(1.0, (step - changed + 1) / max(1, s.seq_change_warmup_steps))
    if s.warmdown_iters:
        fall = steps_left / s.warmdown_iters
    else:
        fall = (1 - progress) / s.warmdown_frac if s.warmdown_frac else 1.0
    return rise * midrun_cap(progress, s) * min(1.0, max(fall, s.min_lr))


def midrun_cap(progress: float, s: Settings) -> float:
    """The factor of MIDRUN_CAP_SCHEDULE."""
    return next((cap for cap, start in reversed(s.stages(s.midrun_cap_schedule)) if progress >= start), 1.0)


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


def skylight(update: Tensor, weight: Tensor, square: Tensor, hyper: Tensor, even_out: bool, beta2: float, eps: float,
             least: float) -> Tensor:
    """What SKYLIGHT_NORM_EMA and SKYLIGHT_UW_FLOOR make of orthogonalized updates of (matrices, rows, columns), each by itself.

    even_out: divide each row by the root of the bias-corrected running mean `square` (matrices, rows, 1) of its squares, which
    is updated in place (hyper[2] = 1 - beta2^t), and restore the matrix's Frobenius norm (NorMuon, Li et al. 2025). least:
    norm of the update over that of the weights from which on it is scaled up. No branch depends on data.
    """
    result = update.float()
    norm = result.norm(dim=(-2, -1), keepdim=True)
    if even_out:
        square.lerp_(result.square().mean(-1, keepdim=True), 1 - beta2)
        result = result * (square / hyper[2] + eps).rsqrt()
        result = result * (norm / result.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))
    floor = least * weight.norm(dim=(-2, -1), keepdim=True) / norm.clamp(min=1e-12)
    return (result * floor.clamp(min=1.0)).to(update.dtype)


def apply_muon(weight: Tensor, update: Tensor, hyper: Tensor, scale: float, decay: float, bound: float) -> None:
    """Decoupled decay, of at most `bound` of each weight, and update; `scale` sqrt(max(1, rows / columns)) evens out shapes."""
    weight.sub_(hyper[0] * (decay * weight.clamp(-bound, bound) + scale * update))


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
        for bank in banks:
            bank.grad = torch.zeros_like(bank)
        # slots: each bank in `all`; runs: where this rank's share of it lies in `mine`, its weights, running means of squares
        self.slots, self.runs, first = [], [], 0
        low, high = runtime.rank * per_rank, (runtime.rank + 1) * per_rank
        for bank in banks:
            last = first + len(bank)
            self.slots.append(self.all[first:last].view_as(bank))
            a, b = max(first, low), min(last, high)
            if a < b:
                square = torch.zeros(b - a, bank.size(1), 1, device=runtime.device)
                weights = bank[a - first:b - first].detach()
                self.runs.append((slice(a - low, b - low), weights, square))
            first = last

    def launch_reduce(self) -> None:
        """Start averaging the banks' gradients over the ranks."""
        for bank, slot in zip(self.banks, self.slots):
            torch.mul(bank.grad, 1 / self.runtime.world_size, out=slot)
            bank.grad.zero_()
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
    Gradients stay where they are from step to step, as recorded passes need it.
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
        self.nesterov, self.skylight, self.apply_muon = map(runtime.compile, (nesterov, skylight, apply_muon))
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
        hyper = self.runtime.upload([s.matrix_lr * multiplier, momentum, 1 - s.skylight_norm_beta2 ** self.steps])
        for group in self.groups:
            for run, weight, square in group.runs:
                update = self.nesterov(group.mine[run].view_as(weight), group.momentum[run].view_as(weight), clip, hyper,
                                       s.muon_row_normalize)
                update = newton_schulz(update, s.muon_backend_steps)
                if s.skylight_norm_ema or s.skylight_uw_floor:
                    update = self.skylight(update, weight, square, hyper, s.skylight_norm_ema, s.skylight_norm_beta2,
                                           s.skylight_norm_eps, s.skylight_uw_ratio * s.skylight_uw_floor)
                group.mine[run] = update.flatten(1)
            group.launch_gather()
        for run, lr, *rule in self.flat_groups:
            adam = self.runtime.upload([lr * multiplier, 1 - s.beta1 ** self.steps, 1 - s.beta2 ** self.steps])
            self.apply_adamw(self.flat[run], self.flat_grad[run], self.mean[run], self.square[run], clip, adam, *rule,
                             s.beta1, s.beta2, s.adam_eps)
        for group in self.groups:
            group.wait()
            for bank, update in zip(group.banks, group.slots):
                self.apply_muon(bank, update, hyper, math.sqrt(max(1, bank.size(1) / bank.size(2))), s.muon_wd,
                                s.muon_huber_delta if s.muon_huber_wd else math.inf)
        figures = torch.stack((self.flat_grad[-1], gradient_norm))
        self.flat_grad.zero_()
        return figures

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        moments = [[group.momentum, *(square for *_, square in group.runs)] for group in self.groups]
        return self.weights + [self.mean, self.square] + sum(moments, [])

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
    def swap(self) -> None:
        """Exchange the weights and their average."""
        weights = [w.detach().clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        torch._foreach_copy_(self.average, weights)


# ======================================================================================================================
# 7. Training
# ======================================================================================================================


class TrainingClock:
    """Training time, and what follows from it: rank 0 reads the clock and every rank gets its verdict.

    On CUDA the host runs up to two steps ahead of the device. Before step s is launched rank 0 waits until step s - 2 is
    complete, so that the device still has step s - 1 to do, and adds the length of one step to the time read.
    """

    def __init__(self, settings: Settings, runtime: Runtime, reserve: float):
        self.settings, self.runtime = settings, runtime
        self.budget = settings.max_wallclock_seconds - reserve  # what is left for steps
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

    def begin_step(self, step: int) -> tuple[float, float, bool]:
        """At the start of this step: progress in [0, 1], steps that are left at the mean pace so far, whether to stop here."""
        self.observe(step - self.lag)
        s = self.settings
        if s.max_wallclock_seconds:
            start = self.completed[-1] + (self.lag - 1) * self.step_seconds() if self.completed else self.elapsed()
            progress = start / self.budget
            left = (self.budget - start) * len(self.completed) / self.completed[-1] if self.completed else math.inf
            stop = start + self.step_seconds() > self.budget
        else:
            progress, left, stop = step / s.iterations, s.iterations - step, False
        progress, left, stop = self.runtime.from_rank0([progress, left, float(stop)])
        self.progress = min(1.0, max(self.progress, progress))  # estimates may step back, schedules must not
        return self.progress, left, bool(stop) or step >= min(s.iterations, s.force_stop_step or s.iterations)

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


class Passes:
    """Forward and backward passes over micro-batches; they add to the gradients and to the loss of the step.

    With RECORDED_PASSES one is recorded for each context length and state of looping and replayed from then on: one launch by
    the host instead of some two thousand. Recorded passes read from buffers that stay in place, with room for more segments
    than documents usually make: those that a micro-batch lacks are empty, and one with more runs as if nothing was recorded.
    """

    def __init__(self, model: GPT, optimizer: Optimizer, settings: Settings, runtime: Runtime):
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.unrecorded = 0  # passes that ran without one of them
        self.buffers = None
        if runtime.on_cuda and settings.recorded_passes and model.attention_kernel != "reference":  # which waits for the device
            tokens, device = settings.micro_batch_tokens, runtime.device
            ids, targets = torch.empty(2, tokens, dtype=torch.int64, device=device)
            most = self.room(min(length for length, _ in training_shapes(settings)))
            bounds = torch.empty(most, dtype=torch.int32, device=device)
            self.buffers = Batch(ids, targets, Segments(bounds, torch.empty_like(ids, dtype=torch.int32), 0))
            self.memory = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time

    def room(self, context: int) -> int:
        """How many borders of segments fit: those of usual documents and of cuts at the context. Empty ones cost time."""
        tokens = self.settings.micro_batch_tokens
        return max(64, tokens // 768 + 32 + tokens // context) + 1

    def __call__(self, batch: Batch, looping: bool) -> None:
        kept = self.keep(batch)
        graph = self.graphs.get((batch.segments.max_seqlen, looping)) if kept is not None else None
        if graph is not None:
            graph.replay()
        else:
            self.unrecorded += self.buffers is not None
            self.run(batch if kept is None else kept, looping)

    def run(self, batch: Batch, looping: bool) -> None:
        loss = self.model.token_losses(*batch, looping).mean() / self.settings.accumulation
        loss.backward()
        self.optimizer.add_loss(loss)

    def buffered(self, context: int) -> Batch:
        segments = self.buffers.segments
        return self.buffers._replace(segments=segments._replace(cu_seqlens=segments.cu_seqlens[:self.room(context)],
                                                                max_seqlen=context))

    def keep(self, batch: Batch) -> Batch | None:
        """The micro-batch in the buffers, None if it does not fit."""
        if self.buffers is None:
            return None
        kept, count = self.buffered(batch.segments.max_seqlen), len(batch.segments.cu_seqlens)
        if count > len(kept.segments.cu_seqlens):
            return None
        for buffer, tensor in ((kept.inputs, batch.inputs), (kept.targets, batch.targets),
                               (kept.segments.positions, batch.segments.positions),
                               (kept.segments.cu_seqlens[:count], batch.segments.cu_seqlens)):
            buffer.copy_(tensor)
        kept.segments.cu_seqlens[count:].fill_(len(batch.inputs))
        return kept

    def record(self, shapes: list[tuple[int, bool]]) -> None:
        """Record a pass of each (context length, looping); all must have run before, to compile what they need."""
        for context, looping in shapes if self.buffers is not None else ():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):  # others may read data
                self.run(self.buffered(context), looping)
            self.graphs[context, looping] = graph


def train(model: GPT, data: TrainingData, validation: Evaluator, calibration: Callable, settings: Settings, runtime: Runtime,
          log: RunLog) -> tuple[bool, object]:
    """Train until the cap or the last iteration, install the weights' average, calibrate; then evaluate raw and average.

    calibration(looping, rehearsal) returns what quantization will need; one round of it is run and timed before the clock
    starts, so that training stops early enough for all of it. Returns whether looping was on at the end, from then on a
    property of the model, and what calibration found.
    """
    s = settings
    if s.fp8 == "1" and not low_products_fit(s, runtime.compute_dtype):
        raise InputError("FP8: products in 8-bit floats need a Hopper GPU, MODEL_DIM a power of 2 from 256, the MLP's width a "
                         "multiple of 256, and the keys' width and VOCAB_SIZE multiples of 16; set FP8=0")
    optimizer = Optimizer(model, s, runtime)
    passes = Passes(model, optimizer, s, runtime)

    def take_step(batches, looping: bool, multiplier: float, momentum: float) -> Tensor:
        for _ in range(s.accumulation):
            passes(next(batches), looping)
        return optimizer.step(multiplier, momentum)

    reserve = warm_up(take_step, passes, data, calibration, s, runtime, log)
    average = WeightAverage(optimizer.weights, s.ema_decay)
    context, changed, cap = s.context_at(0.0, 0), 0, 1.0
    batches, looping, looping_from = data.stream(context), False, None
    host_figures: dict[int, Tensor] = {}
    graphs_before = compiled_graphs()
    clock = TrainingClock(s, runtime, reserve)
    length = (clock.budget, "s") if s.max_wallclock_seconds else (s.iterations, "steps")
    with progress_bar(*length, "training", runtime) as show:
        for step in itertools.count():
            progress, steps_left, stop = clock.begin_step(step)
            log_steps(log, clock, host_figures, show, s)
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
            if s.context_at(progress, step) != context:
                context, changed = s.context_at(progress, step), step
                batches.close()
                batches = data.stream(context, step)
                log.event("context", step=step, progress=round(progress, 4), tokens=context)
            if midrun_cap(progress, s) != cap:
                cap = midrun_cap(progress, s)
                log.event("midrun_cap", step=step, progress=round(progress, 4), factor=cap)
            multiplier = learning_rate_multiplier(progress, steps_left, step, changed, s)
            figures = take_step(batches, looping, multiplier, muon_momentum(step, s))
            average.update()
            host_figures[step] = torch.empty(2, pin_memory=runtime.on_cuda).copy_(figures, non_blocking=True)
            clock.end_step(step)
        batches.close()
        for earlier in range(len(clock.completed), step):
            clock.observe(earlier)
        log_steps(log, clock, host_figures, show, s)
    recompilations = compiled_graphs() - graphs_before
    passes.graphs.clear()  # and their memory
    if s.ema_decay > 0:
        average.swap()
    found = calibration(looping, rehearsal=False)
    runtime.synchronize()
    unrecorded = runtime.sum(torch.tensor(passes.unrecorded, device=runtime.device)).item()
    report_training(log, clock, step, looping_from, s, runtime, recompilations=recompilations, unrecorded_passes=unrecorded)
    if s.ema_decay > 0:
        average.swap()
    log.result("raw", **validation.score(model, looping))
    if s.ema_decay > 0:
        average.swap()
        log.result("averaged", **validation.score(model, looping))
    return looping, found


def warm_up(take_step, passes: Passes, data: TrainingData, calibration: Callable, s: Settings, runtime: Runtime,
            log: RunLog) -> float:
    """Compile and record what training will run, by WARMUP_STEPS steps for each context length with each state of looping.

    The rehearsal undoes them. Returns the seconds to reserve for calibration: GPTQ_RESERVE_SECONDS, or the measured estimate
    where that is longer.
    """
    began, shapes = time.perf_counter(), training_shapes(s)
    with passes.optimizer.rehearsal():
        for steps in (s.warmup_steps, min(1, s.warmup_steps) if passes.buffers is not None else 0):  # then from the record
            for context, looping in shapes:
                batches = data.stream(context)
                for _ in range(steps):
                    take_step(batches, looping, multiplier=1.0, momentum=s.muon_momentum)
                batches.close()
            if steps and not passes.graphs:
                passes.record(shapes)
    passes.unrecorded = 0
    runtime.synchronize()
    estimate = 0.0
    if s.max_wallclock_seconds:
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            calibration(s.loops_at_end, rehearsal=True)
            runtime.synchronize()
            estimate = 1.25 * (time.perf_counter() - started) * calibration_rounds(s, runtime)
    reserve = runtime.from_rank0([max(s.gptq_reserve_seconds, estimate)])[0]
    log.event("warmup", steps=s.warmup_steps, shapes=list(map(list, shapes)), seconds=round(time.perf_counter() - began, 1),
              reserve_seconds=round(reserve, 3), process_seconds=round(process_seconds(), 1))
    if s.max_wallclock_seconds and reserve >= s.max_wallclock_seconds:
        raise InputError(f"MAX_WALLCLOCK_SECONDS: {s.max_wallclock_seconds} leaves no time to train, calibration alone "
                         f"needs {reserve:.1f} s; raise it or lower GPTQ_CALIBRATION_BATCHES")
    return reserve


def training_shapes(s: Settings) -> list[tuple[int, bool]]:
    """Every (context length, looping) that training can meet, in the order in which it meets them."""
    loop_at = s.enable_looping_at if s.num_loops else 1.0
    shapes, begin, stages = [], 0.0, s.stages(s.train_seq_schedule) or [(s.train_seq_len, 1.0)]
    for length, end in [*stages[:-1], (stages[-1][0], 1.0)]:  # the last goes on to the end
        apart = s.train_seq_schedule_mode == "step"  # stages then follow another clock than looping
        shapes += [(int(length), False)] * (apart or begin <= loop_at) + [(int(length), True)] * (
            s.loops_at_end and (apart or end >= loop_at))
        begin = end
    return list(dict.fromkeys(shapes))


def compiled_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo")  # seconds to import; where nothing asked for it, it has compiled nothing
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


def log_steps(log: RunLog, clock: TrainingClock, figures: dict[int, Tensor], show: Callable, s: Settings) -> None:
    """See to the steps whose figures have arrived on the host, and log the first five and each of TRAIN_LOG_EVERY."""
    for step in [step for step in figures if step < len(clock.completed)]:
        loss, gradient_norm = figures.pop(step).tolist()
        if not math.isfinite(loss + gradient_norm):
            raise FloatingPointError(f"training diverged: the loss of step {step + 1} is {loss}, its gradient's norm "
                                     f"{gradient_norm}; lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
        seconds = clock.completed[step]
        share = seconds / clock.budget if s.max_wallclock_seconds else (step + 1) / s.iterations
        show(seconds if s.max_wallclock_seconds else step + 1, f"loss {loss:.3f}")
        if step < 5 or s.train_log_every and (step + 1) % s.train_log_every == 0:
            first = max(0, step - max(1, s.train_log_every))
            window = seconds - clock.completed[first]
            rate = round((step - first) * s.train_batch_tokens / window) if window > 0 else 0
            log.event("step", step=step + 1, train_loss=round(loss, 4), grad_norm=round(gradient_norm, 4),
                      seconds=round(seconds, 3), tokens_per_second=rate, share=round(share, 4),
                      eta_seconds=round(seconds * (1 / share - 1), 1))


def report_training(log: RunLog, clock: TrainingClock, steps: int, looping_from: int | None, s: Settings, runtime: Runtime,
                    **counts: int) -> None:
    """Steps, seconds and speed, before and after looping started."""
    def rate(first: int, last: int) -> int:
        # The first step of a phase is left out: its end is the first moment at which the phase runs at its own speed.
        if last - first < 2:
            return 0
        return round((last - first - 1) * s.train_batch_tokens / (clock.completed[last - 1] - clock.completed[first]))

    switch = steps if looping_from is None else looping_from
    memory = torch.cuda.max_memory_reserved() / 2**20 if runtime.on_cuda else 0
    seconds, total = clock.completed[-1] if steps else 0.0, clock.elapsed()
    log.result("training", steps=steps, seconds=round(seconds, 3), calibration_seconds=round(total - seconds, 3),
               clock_seconds=round(total, 3), cap_seconds=s.max_wallclock_seconds,
               within_cap=total <= (s.max_wallclock_seconds or math.inf), tokens=steps * s.train_batch_tokens,
               looping_from=looping_from,
               tokens_per_second_plain=rate(0, switch), tokens_per_second_looping=rate(switch, steps),
               **counts, peak_memory_mib=round(memory))


# ======================================================================================================================
# 8. Quantization
# ======================================================================================================================

SCALES_PER_OCTAVE = 8  # grid of row scales: 2^(k / 8), k a small integer
COLUMN_SCALES_PER_OCTAVE = 4
HESSIAN_DAMPING = 0.01  # added to the diagonal, as a share of its mean
# Trellis-coded quantization with 8 states (Marcellin & Fischer 1990; the trellis of JPEG 2000 part 2): in state t a code k
# stands for step (k + TRELLIS_OFFSET[t]), and its parity chooses the next state TRELLIS_NEXT[t][k & 1].
TRELLIS_NEXT = ((0, 1), (2, 3), (5, 4), (7, 6), (1, 0), (3, 2), (4, 5), (6, 7))
TRELLIS_OFFSET = (-0.25, 0.25) * 4


class Role(NamedTuple):
    """The matrices that do the same work in every layer; they are quantized together, as (layers, rows, columns)."""

    stack: str  # the parameter that holds them
    start: int  # where in it the first layer's lies
    site: str  # the product in which they take part
    rows: slice  # which outputs of that product are theirs
    bits: int
    clip_sigmas: float

    def weights(self, model: GPT) -> Tensor:
        parameter = getattr(model, self.stack).detach()
        return parameter[None] if parameter.dim() == 2 else parameter[self.start:self.start + model.settings.num_layers]


def matrix_roles(s: Settings) -> dict[str, Role]:
    """Every matrix that is stored as integers, by the name of its role."""
    n, q, kv = s.num_layers, s.model_dim, s.kv_dim
    attn, mlp, every = (s.matrix_bits, s.attn_clip_sigmas), (s.matrix_bits, s.mlp_clip_sigmas), slice(None)
    return {"tok_emb": Role("tok_emb", 0, "head", every, s.embed_bits, s.embed_clip_sigmas),
            "attn.c_k": Role("kv_bank", 0, "qkv", slice(q, q + kv), *attn),
            "attn.c_q": Role("qo_bank", 0, "qkv", slice(0, q), *attn),
            "attn.c_v": Role("kv_bank", n, "qkv", slice(q + kv, None), *attn),
            "attn.proj": Role("qo_bank", n, "out", every, *attn),
            "mlp.fc": Role("mlp_up_bank", 0, "up", every, *mlp),
            "mlp.proj": Role("mlp_down_bank", 0, "down", every, *mlp)}


class Statistics(NamedTuple):
    """What calibration saw at each site (head, qkv, out, up, down), per token, stacked over the layers.

    A change E of a site's matrix raises the loss by about 1/2 sum over rows r of curvature[r] E[r] hessian E[r]^T (a
    Kronecker-factored Fisher matrix, Martens & Grosse 2015, with the output factor's diagonal alone).
    """

    hessian: dict[str, Tensor]  # (layers, columns, columns): sum of x x^T over the inputs x of all visits
    curvature: dict[str, Tensor]  # (layers, rows): mean square of the loss gradient at the outputs; ones if not asked for
    visits: Tensor  # (layers,): how often a token passes each layer


class Observer(Rider):
    """Accumulates sums for Statistics inside the forward pass and, through hooks, in the backward pass."""

    def __init__(self, gradients: bool):
        self.gradients = gradients
        self.sums: dict[tuple, Tensor] = {}

    def add(self, kind: str, site: str, layer: int, value: Tensor) -> None:
        key = (kind, site, layer)
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value

    def block(self, visit: int, layer: int) -> dict:
        def see(site: str, x: Tensor, y: Tensor, u: Tensor) -> Tensor:  # x (T, columns), y (T, rows)
            self.add("hessian", site, layer, second_moment(x.detach()))
            if self.gradients:
                y.register_hook(lambda g: self.add("squares", site, layer, g.float().square().sum(0)))
            return y
        return dict(adapter=see)

    def embedding(self, ids: Tensor, x: Tensor, rows: int) -> None:
        """The backward pass ends at the embedding's rows x (T, d) of `ids`."""
        def see(g):
            self.add("hessian", "embed", 0, second_moment(g))
            self.add("squares", "embed", 0, torch.zeros(rows, device=g.device).index_add_(0, ids, g.square().sum(1)))
        if self.gradients:
            x.requires_grad_().register_hook(see)

    def head(self, hidden: Tensor, logits: Tensor, caps: Tensor | float) -> None:
        """The head's curvature is known in closed form: p (1 - p), times the soft cap's slope squared."""
        self.add("hessian", "head", 0, second_moment(hidden))
        if self.gradients:
            p = logits.softmax(-1)
            self.add("squares", "head", 0, ((p - p * p) * (1 - (logits / caps).square()).square()).sum(0))


def second_moment(x: Tensor) -> Tensor:
    """x^T x of x (T, columns), float32. Products of bf16 are exact there, so tensor cores lose nothing."""
    exact = x.is_cuda and x.dtype == torch.bfloat16
    return torch.mm(x.T, x, out_dtype=torch.float32) if exact else x.T.float() @ x.float()


def calibration_pass(s: Settings, runtime: Runtime) -> int:
    """How many windows of calibration go through the model at once."""
    return max(1, (32768 if runtime.on_cuda else 4096) // s.eval_seq_len)


def calibration_rounds(s: Settings, runtime: Runtime) -> int:
    """How often every rank makes a pass."""
    return math.ceil(calibration_count(s) / (calibration_pass(s, runtime) * runtime.world_size))


def calibration_count(s: Settings) -> int:
    return math.ceil(s.gptq_calibration_batches * (s.train_batch_tokens // 8) / s.eval_seq_len)


def calibration_windows(data: TrainingData, s: Settings, most: int | None = None) -> list[np.ndarray]:
    """The training tokens that calibration reads: windows of EVAL_SEQ_LEN + 1, the same for every number of ranks.

    They begin anywhere (GPTQ_CALIBRATION_MODE=random) or at the first document start from there on (doc_start).
    """
    draw, windows = np.random.default_rng(0), []
    for _ in range(min(calibration_count(s), most or calibration_count(s))):
        at = int(draw.integers(data.total))
        while s.gptq_calibration_mode == "doc_start":
            starts = np.flatnonzero(data.read(at, 65536) == BOS_ID)
            at += int(starts[0]) if len(starts) else 65536
            if len(starts):
                break
        windows.append(data.read(at, s.eval_seq_len + 1))
    return windows


def calibrate(model: GPT, windows: list[np.ndarray], looping: bool, s: Settings, runtime: Runtime) -> Statistics:
    """Send the windows, dealt out to the ranks, through the model's forward and backward pass; sum what is seen.

    The weights take no gradient: the backward pass ends at the embedding. Attention stays inside documents.
    """
    plain, seen, per_pass = model.frozen(), Observer(s.uses_curvature), calibration_pass(s, runtime)
    passes = [windows[i:i + per_pass] for i in range(0, len(windows), per_pass)]
    for some in passes[runtime.rank::runtime.world_size]:
        ids, targets = (np.concatenate([window[cut] for window in some]) for cut in (slice(-1), slice(1, None)))
        starts = np.concatenate((np.arange(len(some)) * s.eval_seq_len, np.flatnonzero(ids == BOS_ID)))
        segments = make_segments(segment_bounds(starts, len(ids), s.eval_seq_len), s.eval_seq_len)
        batch = Batch(torch.from_numpy(ids), torch.from_numpy(targets), segments).to(runtime)
        with torch.set_grad_enabled(s.uses_curvature):
            hidden = plain(batch.inputs, batch.segments, looping, seen)
            if s.uses_curvature:
                plain.head_losses(hidden, batch.targets).sum().backward()
        with torch.no_grad():
            logits = plain.logits(hidden.detach())
            seen.head(hidden.detach(), logits, plain.softcaps(logits))
    return summarize(seen, model, len(windows) * s.eval_seq_len, looping, runtime)


@torch.no_grad()
def summarize(seen: Observer, model: GPT, tokens: int, looping: bool, runtime: Runtime) -> Statistics:
    """Statistics from what all ranks have seen in `tokens` tokens."""
    s, d = model.settings, model.settings.model_dim
    shapes = dict(head=(s.vocab_size, d), embed=(s.vocab_size, d), qkv=(d + 2 * s.kv_dim, d), out=(d, d),
                  up=(s.mlp_dim, d), down=(d, s.mlp_dim))  # rows, columns of each site's matrix

    def total(kind, site, *shape):  # a rank without windows has seen nothing
        layers = range(1 if site in ("head", "embed") else s.num_layers)
        blank = torch.zeros(shape, device=runtime.device)
        return runtime.sum(torch.stack([seen.sums.get((kind, site, i), blank) for i in layers])) / tokens

    wanted = [site for site in shapes if site != "embed" or seen.gradients]
    hessian = {site: total("hessian", site, shapes[site][1], shapes[site][1]) for site in wanted}
    order = sum(model.orders[looping], [])
    visits = torch.tensor([float(order.count(i)) for i in range(s.num_layers)], device=runtime.device)
    if not seen.gradients:
        ones = {site: torch.ones(len(h), shapes[site][0], device=h.device) for site, h in hessian.items()}
        return Statistics(hessian, ones, visits)
    curvature = {site: total("squares", site, shapes[site][0]) for site in wanted}
    for site in ("qkv", "out", "up", "down"):
        # A layer's visits feel the same change of its weights: if their gradients were independent, their mean square would
        # count (sum / visits), if they were equal, visits times that. The geometric mean of both fits measurement.
        curvature[site] /= visits[:, None].sqrt()
    curvature["out"] *= model.attn_scale ** 2  # the products were seen with the residual scales multiplied in
    curvature["down"] *= model.mlp_scale ** 2
    # The embedding works twice: as the head, and as the input, whose rows feel their own tokens' gradients alone.
    as_head, as_input = hessian["head"], hessian.pop("embed")
    spread = as_head.diagonal(dim1=1, dim2=2).sum()
    weight = curvature["head"].sum() * spread
    share = spread * curvature["embed"].sum() / as_input.diagonal(dim1=1, dim2=2).sum().clamp(min=1e-30)
    hessian["head"] = (as_head * weight + as_input * share) / (weight + curvature["embed"].sum()).clamp(min=1e-30)
    curvature["head"] += curvature.pop("embed") / spread.clamp(min=1e-30)
    return Statistics(hessian, curvature, visits)


def rotate_values(model: GPT) -> None:
    """OptRot: turn each head's values by a Hadamard matrix and the output projection's columns back, in place.

    Attention, XSA and the head gates commute with a rotation of a head's values, so the function stays the same; MLP
    units cannot be turned so, because a nonlinearity stands between their two matrices.
    """
    s, n = model.settings, model.settings.num_layers
    turn = torch.ones(1, 1, device=model.kv_bank.device)
    while len(turn) < s.head_dim:
        turn = torch.cat((torch.cat((turn, turn), 1), torch.cat((turn, -turn), 1))) / math.sqrt(2)
    with torch.no_grad():
        values, outputs = model.kv_bank[n:], model.qo_bank[n:]
        values.copy_((turn @ values.unflatten(1, (-1, s.head_dim))).flatten(1, 2))
        outputs.copy_((outputs.unflatten(2, (-1, s.head_dim)) @ turn.T).flatten(2, 3))


def sort_hidden_units(model: GPT, statistics: Statistics | None) -> None:
    """Put each MLP's hidden units in the order of their rows' steps, in place, in both matrices and the statistics.

    The function stays the same, and the row scales become cheap to code.
    """
    s, up, down = model.settings, model.mlp_up_bank.detach(), model.mlp_down_bank.detach()
    key = statistics.curvature["up"] if statistics and s.step_rule == "loss" else up.std(2)
    for i, order in enumerate(key.argsort(dim=1)):
        up[i], down[i] = up[i, order], down[i][:, order]
        if statistics:
            statistics.curvature["up"][i] = statistics.curvature["up"][i, order]
            statistics.hessian["down"][i] = statistics.hessian["down"][i][order][:, order]


class LowRank(NamedTuple):
    """Rank-r correction left right of one matrix, in integers with float16 scales that broadcast."""

    left: Tensor  # (rows, r) int8
    left_scale: Tensor  # (1,) or (rows,)
    right: Tensor  # (r, columns) int8
    right_scale: Tensor  # (r x columns / group,) or (r,)

    def product(self) -> Tensor:
        left = self.left.float() * self.left_scale.float().view(-1, 1)
        groups = self.right.float().view(len(self.right_scale), -1)
        return left @ (groups * self.right_scale.float()[:, None]).view_as(self.right)


class Quantized(NamedTuple):
    """One role's matrices as they are stored: row scale x column scale x (code + trellis offset) + low-rank correction."""

    codes: Tensor  # (layers, rows, columns) int8
    row_scale: Tensor  # (layers, rows): int16 k for 2^(k / SCALES_PER_OCTAVE), or the float16 scale itself
    column_scale: Tensor | None  # (layers, columns): int8 k for 2^(k / COLUMN_SCALES_PER_OCTAVE)
    fine: list  # AWQ-lite: [layer, first column, columns, numerator, denominator]: columns whose step is that fraction
    low_rank: dict[int, LowRank]  # LQER corrections by layer
    trellis: bool


def steps(q: Quantized) -> Tensor:
    """The quantization step of every weight, (layers, rows, columns) float32."""
    row = row_steps(q.row_scale)
    column = torch.ones_like(q.codes[:, :1], dtype=torch.float32) if q.column_scale is None else \
        grid_value(q.column_scale, COLUMN_SCALES_PER_OCTAVE)[:, None]
    step = row[..., None] * column
    for layer, first, count, numerator, denominator in q.fine:
        step[layer, :, first:first + count] *= numerator / denominator
    return step


def row_steps(row_scale: Tensor) -> Tensor:
    return row_scale.float() if row_scale.is_floating_point() else grid_value(row_scale, SCALES_PER_OCTAVE)


def grid_value(exponent: Tensor, per_octave: int) -> Tensor:
    return torch.exp2(exponent.double() / per_octave).float()


def trellis_order(column_scale: Tensor | None, like: Tensor) -> Tensor:
    """The order (layers, columns) in which a trellis runs through columns: finest step first, as a decoder can tell too."""
    if column_scale is None:
        return torch.arange(like.size(2), device=like.device).repeat(like.size(0), 1)
    return column_scale.argsort(dim=1, stable=True)


def dequantize(q: Quantized) -> Tensor:
    """The weights (layers, rows, columns) that the stored integers stand for, float32."""
    levels = q.codes.float()
    if q.trellis:
        following, offset = (torch.tensor(t, device=q.codes.device) for t in (TRELLIS_NEXT, TRELLIS_OFFSET))
        order = trellis_order(q.column_scale, q.codes)
        codes = q.codes.gather(2, order[:, None].expand_as(q.codes)).permute(2, 0, 1).contiguous()
        state = torch.zeros_like(codes[0], dtype=torch.long)
        offsets = torch.empty_like(codes, dtype=torch.float32)
        for j, code in enumerate(codes):
            offsets[j] = offset[state]
            state = following.flatten()[2 * state + (code & 1)]
        levels.scatter_add_(2, order[:, None].expand_as(q.codes), offsets.permute(1, 2, 0))
    weights = steps(q) * levels
    for layer, correction in q.low_rank.items():
        weights[layer] += correction.product()
    return weights


def hessian_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper triangular R with R R^T = the damped Hessians (layers, columns, columns), columns taken in `order`.

    Where a factorization fails the damping is raised tenfold until it succeeds.
    """
    n = hessian.size(-1)
    if not hessian.isfinite().all():
        raise FloatingPointError("a Hessian is not finite: training diverged")
    h = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    diagonal = h.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    mean = diagonal.sum(1) / (~dead).sum(1).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    h = h + torch.diag_embed(torch.where(dead, mean[:, None], 0.0))
    damping = HESSIAN_DAMPING * mean
    while True:
        damped = h + damping[:, None, None] * torch.eye(n, device=h.device)
        factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            return factor.flip(1, 2)
        damping = torch.where(failed > 0, 10 * damping, damping)


def gptq(weight: Tensor, factor: Tensor, step: Tensor, largest: Tensor, trellis: bool) -> Tensor:
    """Codes (layers, rows, columns) for `weight`, each column's error made good by those that follow (Frantar et al. 2022).

    factor: hessian_factor of the same column order; step: like weight; largest: (layers, 1, columns), the codes' bound.
    With a trellis the 8 best code sequences of each row compete within a block of columns, every one with its own errors.
    """
    layers, rows, columns = weight.shape
    upper = torch.linalg.solve_triangular(factor, torch.eye(columns, device=factor.device).expand_as(factor), upper=True)
    weight, codes = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    state = torch.zeros(layers, rows, dtype=torch.long, device=weight.device)
    for a in range(0, columns, 128):
        block = slice(a, min(a + 128, columns))
        arguments = weight[..., block], upper[:, block, block], step[..., block], largest[..., block]
        if trellis:
            codes[..., block], errors, state = trellis_block(*arguments, state)
        else:
            codes[..., block], errors = greedy_block(*arguments)
        weight[..., block.stop:] -= errors @ upper[:, block, block.stop:]
    return codes


def greedy_block(weight: Tensor, upper: Tensor, step: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns, rounded to nearest in turn, and their errors over the diagonal of `upper`."""
    weight, codes, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j in range(weight.size(2)):
        codes[..., j] = torch.clamp((weight[..., j] / step[..., j]).round(), -largest[..., j], largest[..., j])
        errors[..., j] = (weight[..., j] - step[..., j] * codes[..., j]) / upper[:, j, j, None]
        weight[..., j + 1:] -= errors[..., j, None] * upper[:, j, None, j + 1:]
    return codes.to(torch.int8), errors


def trellis_block(weight: Tensor, upper: Tensor, step: Tensor, largest: Tensor, state: Tensor):
    """The same by a Viterbi search from the rows' trellis `state` (layers, rows); returns codes, errors, final states."""
    layers, rows, columns = weight.shape
    device, states = weight.device, len(TRELLIS_NEXT)
    arrivals = torch.tensor([[2 * t + p for t in range(states) for p in (0, 1) if TRELLIS_NEXT[t][p] == end]
                             for end in range(states)], device=device)  # (states, 2): transitions into each state
    offset, parity = torch.tensor(TRELLIS_OFFSET, device=device), torch.arange(2, device=device)
    cost = torch.full((layers, rows, states), math.inf, device=device).scatter_(2, state[..., None], 0.0)
    paths = weight[:, :, None].repeat(1, 1, states, 1)
    history = []
    for j in range(columns):
        scale, bound = step[..., j, None, None], largest[..., j, None, None]
        x = paths[..., 0, None] / scale - offset[:, None]
        code = torch.maximum(torch.minimum(2 * ((x - parity) / 2).round() + parity, bound - 1 + parity), -bound + 1 - parity)
        error = (x - code) * scale / upper[:, j, j, None, None, None]
        reached = (cost[..., None] + error.square()).flatten(2)[..., arrivals]
        cost, pick = reached.min(-1)
        pick = arrivals.expand(layers, rows, states, 2).gather(3, pick[..., None])[..., 0]
        error, parent = error.flatten(2).gather(2, pick), pick // 2
        history.append((code.flatten(2).gather(2, pick), error, parent))
        rest = paths[..., 1:]
        paths = rest.gather(2, parent[..., None].expand_as(rest)) - error[..., None] * upper[:, j, None, None, j + 1:]
    state = at = cost.argmin(2, keepdim=True)
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    for j in reversed(range(columns)):
        code, error, parent = history[j]
        codes[..., j], errors[..., j] = code.gather(2, at)[..., 0], error.gather(2, at)[..., 0]
        at = parent.gather(2, at)
    return codes.to(torch.int8), errors, state[..., 0]


class Problem(NamedTuple):
    """What is known about one role before it is quantized."""

    role: Role
    weight: Tensor  # (layers, rows, columns); zero in columns that never had an input
    hessian: Tensor  # (layers, columns, columns)
    curvature: Tensor  # (layers, rows)
    live: Tensor  # (layers, 1, columns): whether a column ever had an input
    visits: Tensor  # (layers,): how often a token passes

    def loss(self, error: Tensor, layers: slice = slice(None)) -> Tensor:
        """Predicted rise of the loss in nats per token for a change `error` of these layers' weights, per layer."""
        return 0.5 * ((error @ self.hessian[layers] * error).sum(2) * self.curvature[layers]).sum(1)


class Plan(NamedTuple):
    """How one role will be quantized. With STEP_RULE=loss the row scales still lack the common factor."""

    row_scale: Tensor  # (layers, rows): float16, or int16 on the grid, or float32 octaves with STEP_RULE=loss
    row_limits: Tensor | None  # (2, layers, rows): fewest octaves, at which the codes fit int8, and most
    column_scale: Tensor | None
    fine: list
    order: Tensor  # (layers, columns)
    factor: Tensor  # hessian_factor in that order


def posed(model: GPT, statistics: Statistics | None) -> dict[str, Problem]:
    """The problem of each role; without calibration the Hessians are identities and GPTQ becomes plain rounding."""
    problems = {}
    for name, role in matrix_roles(model.settings).items():
        weight = role.weights(model).float()
        layers, rows, columns = weight.shape
        if statistics is None:
            hessian = torch.eye(columns, device=weight.device).repeat(layers, 1, 1)
            curvature, visits = torch.ones(layers, rows, device=weight.device), torch.ones(layers, device=weight.device)
        else:
            hessian, curvature = statistics.hessian[role.site], statistics.curvature[role.site][:, role.rows]
            visits = statistics.visits if role.site != "head" else torch.ones(1, device=weight.device)
        live = hessian.diagonal(dim1=1, dim2=2)[:, None] > 0
        problems[name] = Problem(role, weight * live, hessian, curvature, live, visits)
    return problems


def planned(p: Problem, fine: list, s: Settings) -> Plan:
    """Scales and column order of one role.

    STEP_RULE=sigma, the published rule: a row's step is its role's clip_sigmas deviations over the largest integer. Loss:
    every weight shall add the same loss, so row r's step goes with curvature[r]^(-1/2), and column j's with the inverse of
    what the columns that follow cannot make good of its error, the diagonal of the Hessian's factor. At high rates that
    spends bits best (reverse water-filling); no row's scale exceeds twice its deviation, where rounding only adds noise.
    """
    tiny = torch.finfo(torch.float16).tiny
    order = p.hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    count = p.live.sum(2)
    mean = p.weight.sum(2) / count.clamp(min=1)
    deviation = (((p.weight - mean[..., None]) * p.live).square().sum(2) / (count - 1).clamp(min=1)).sqrt()
    if s.step_rule == "loss":
        factor = hessian_factor(p.hessian, order)
        spread = torch.empty_like(factor[:, 0]).scatter_(1, order, factor.diagonal(dim1=1, dim2=2)).log2()
        level = spread.mean(1, keepdim=True)
        column = ((level - spread).clamp(-4, 4) * COLUMN_SCALES_PER_OCTAVE).round().to(torch.int8)
        row = -0.5 * p.curvature.clamp(min=1e-30).log2() - level
        reach = (p.weight.abs() / grid_value(column, COLUMN_SCALES_PER_OCTAVE)[:, None]).amax(2)
        limits = torch.stack(((reach / 120).clamp(min=tiny).log2(), deviation.clamp(min=tiny).log2() + 1))
        plan = Plan(row, limits, column, fine, order, factor)
    else:
        row = (p.role.clip_sigmas * deviation / (2 ** (p.role.bits - 1) - 1)).clamp(min=tiny)
        row = (row.log2() * SCALES_PER_OCTAVE).round().to(torch.int16) if s.scale_grid == "log" else row.half()
        plan = Plan(row, None, None, fine, order, torch.empty(0))
    if s.trellis_enabled:
        plan = plan._replace(order=trellis_order(plan.column_scale, p.weight))
    elif s.step_rule == "loss":
        return plan
    return plan._replace(factor=hessian_factor(p.hessian, plan.order))


def quantize_role(p: Problem, plan: Plan, s: Settings, octaves: float) -> Quantized:
    """The codes of one role; `octaves` is log2 of the common factor that the steps of STEP_RULE=loss lack."""
    row, largest = plan.row_scale, 2 ** (p.role.bits - 1) - 1
    if s.step_rule == "loss":
        row = torch.minimum(row + octaves, plan.row_limits[1]).maximum(plan.row_limits[0])
        row = (row * SCALES_PER_OCTAVE).round().to(torch.int16)
        largest = 127
    codes = torch.zeros_like(p.weight, dtype=torch.int8)
    q = Quantized(codes, row, plan.column_scale, plan.fine, {}, s.trellis_enabled)
    bound = torch.full_like(codes[:, :1], largest, dtype=torch.float32)
    for layer, first, count, _, finer in plan.fine:
        bound[layer, :, first:first + count] = finer
    arranged = [t.gather(2, plan.order[:, None].expand_as(t)) for t in (p.weight, steps(q), bound)]
    arranged = gptq(arranged[0], plan.factor, *arranged[1:], q.trellis)
    return q._replace(codes=codes.scatter(2, plan.order[:, None].expand_as(codes), arranged))


def choose_fine(problems: dict[str, Problem], s: Settings) -> dict[str, list]:
    """AWQ-lite: the AWQ_LITE_GROUP_TOP_K groups of columns that are worth AWQ_LITE_BITS, per role, as in Quantized.fine.

    Unweighted, by input RMS x mean |weight|. Weighted, by predicted loss per byte, and only what saves more loss than the
    same bytes would by making every step finer.
    """
    size, candidates, expected, count = s.awq_lite_group_size, [], 0.0, 0
    for name, p in problems.items():
        coarse, finer = (2 ** (bits - 1) - 1 for bits in (p.role.bits, s.awq_lite_bits))
        layers, rows, columns = p.weight.shape
        diagonal = p.hessian.diagonal(dim1=1, dim2=2)
        if s.awq_lite_weighted:
            plan = planned(p, [], s)
            step = row_steps(plan.row_scale)
            own = torch.empty_like(diagonal).scatter_(1, plan.order, plan.factor.diagonal(dim1=1, dim2=2).square())
            loss = own * (p.curvature * step.square() / 24).sum(1, keepdim=True)  # of rounding, per column
            expected, count = expected + float(loss.sum()), count + p.weight.numel()
            score = loss * (1 - (coarse / finer) ** 2) / (rows * math.log2(finer / coarse) / 8) if finer > coarse else loss
        else:
            score = (diagonal / p.visits[:, None]).sqrt() * p.weight.abs().mean(1)
        if finer > coarse:
            groups = score[:, :columns // size * size].unflatten(1, (-1, size)).sum(2)
            groups = groups / size if s.awq_lite_weighted else groups
            candidates += [(value, name, [i, g * size, size, coarse, finer])
                           for i, row in enumerate(groups.tolist()) for g, value in enumerate(row)]
    price = 16 * math.log(2) * expected / max(count, 1)  # nats per byte at the margin
    chosen = sorted(candidates, key=lambda c: -c[0])[:s.awq_lite_group_top_k]
    return {name: [fine for value, role, fine in chosen if role == name and value > price] for name in problems}


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (..., rows, rank), right (..., rank, columns): the best approximation left right; right has orthonormal rows."""
    wide = matrix.size(-2) < matrix.size(-1)
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    vectors = torch.linalg.eigh(gram.double())[1][..., -rank:].flip(-1).float()
    if not wide:
        return matrix @ vectors, vectors.mT
    right = vectors.mT @ matrix
    sizes = right.norm(dim=-1).clamp(min=1e-30)
    return vectors * sizes[..., None, :], right / sizes[..., None]


def fit_low_rank(error: Tensor, hessian: Tensor, curvature: Tensor, s: Settings) -> LowRank:
    """LQER (Zhang et al. 2024): `error` (rows, columns) as a product of two thin integer matrices.

    The fit minimizes the error's squared norm, or with LQER_WEIGHTED the predicted loss. LQER_ASYM_ENABLED: left -2..1 with
    one scale, right -8..7 with a scale per LQER_ASYM_GROUP values; else a scale per row of each, +-(2^(bits-1) - 1).
    """
    if s.lqer_weighted:
        factor = hessian_factor(hessian[None], torch.arange(len(hessian), device=hessian.device)[None])[0]
        height = curvature.clamp(min=1e-30).sqrt()[:, None]
        left, right = top_singular(height * error @ factor, s.lqer_rank)
        left, right = left / height, torch.linalg.solve_triangular(factor, right, upper=True, left=False)
    else:
        left, right = top_singular(error, s.lqer_rank)

    def integers(values, low, high, reach):  # one scale per row of `values`
        scale = (values.abs().amax(1) / reach).clamp(min=torch.finfo(torch.float16).tiny).half()
        return (values / scale.float()[:, None]).round().clamp(low, high).to(torch.int8), scale

    if s.lqer_asym_enabled:
        a, a_scale = integers(left.reshape(1, -1), -2, 1, 1.5)
        b, b_scale = integers(right.reshape(-1, s.lqer_asym_group), -8, 7, 7.5)
        return LowRank(a.view_as(left), a_scale, b.view_as(right), b_scale)
    largest = 2 ** (s.lqer_factor_bits - 1) - 1
    return LowRank(*integers(left, -largest, largest, largest), *integers(right, -largest, largest, largest))


def choose_low_rank(problems: dict[str, Problem], quantized: dict[str, Quantized], s: Settings) -> None:
    """Give the LQER_TOP_K matrices that need it most a correction, in place.

    Unweighted, by the norm of their error, or with LQER_GAIN_SELECT by how much of it the correction takes away. Weighted,
    by predicted loss saved per byte, and only where that beats making every step finer for the same bytes.
    """
    scopes = {"all": "", "mlp": "mlp", "attn": "attn", "embed": "tok_emb"}
    candidates, expected, count = [], 0.0, 0
    for name, p in problems.items():
        error = (p.weight - dequantize(quantized[name])) * p.live
        losses = p.loss(error)
        expected, count = expected + float(losses.sum()), count + error.numel()
        for layer, e in enumerate(error if name.startswith(scopes[s.lqer_scope]) else ()):
            correction, value = None, float(e.norm())
            if s.lqer_weighted or s.lqer_gain_select:
                correction = fit_low_rank(e, p.hessian[layer], p.curvature[layer], s)
                left = e - correction.product()
                value -= float(left.norm())
            if s.lqer_weighted:
                saved = float(losses[layer] - p.loss(left[None], slice(layer, layer + 1)))
                value = saved / sum(stored_bytes(part) for part in correction)
            candidates.append((value, name, layer, e, correction))
    price = 16 * math.log(2) * expected / count if s.lqer_weighted else 0.0  # nats per byte at the margin
    for value, name, layer, e, correction in sorted(candidates, key=lambda c: -c[0])[:s.lqer_top_k]:
        if value > price:
            p = problems[name]
            quantized[name].low_rank[layer] = correction or fit_low_rank(e, p.hessian[layer], p.curvature[layer], s)


def stored_bytes(integers: Tensor) -> float:
    """What a small array costs once coded: its order-0 entropy if it holds integers, else its own size."""
    if integers.is_floating_point():
        return integers.numel() * integers.itemsize
    counts = integers.flatten().unique(return_counts=True)[1].float()
    return float(-(counts * (counts / counts.sum()).log2()).sum() / 8)


@torch.no_grad()
def quantize(problems: dict[str, Problem], s: Settings, wanted: float,
             octaves: float | None = None) -> tuple[dict[str, Quantized], float]:
    """Quantize every role; STEP_RULE=loss finds the common factor at which the coded integers take `wanted` bytes.

    octaves: log2 of the factor to begin with; returned is the one that was found.
    """
    fine = choose_fine(problems, s) if s.awq_lite_enabled else {}
    plans = {name: planned(p, fine.get(name, []), s) for name, p in problems.items()}
    count = sum(p.weight.numel() for p in problems.values())
    if s.step_rule == "loss" and octaves is None:  # a normal variable in steps of its deviation has 2.05 bits
        wide = sum(float((plan.row_limits[1] - 1 - plan.row_scale).sum()) * p.weight.size(2)
                   for plan, p in zip(plans.values(), problems.values()))
        octaves = wide / count + 2.05 - 8 * wanted / count
    slope, before = count / 8, None  # bytes per octave, while every step is below its weights' deviation
    for _ in range(4):
        quantized = {name: quantize_role(p, plans[name], s, octaves or 0.0) for name, p in problems.items()}
        if s.step_rule != "loss":
            break
        size = float(sum(bits.sum() for bits in code_bits([q.codes for q in quantized.values()]))) / 8
        if abs(size - wanted) < min(2000, 0.001 * wanted):
            break
        if before and octaves != before[0]:
            slope = max(slope / 8, (before[1] - size) / (octaves - before[0]))
        before = octaves, size
        octaves += (size - wanted) / slope
    if s.lqer_enabled:
        choose_low_rank(problems, quantized, s)
    return quantized, octaves


# ======================================================================================================================
# 9. Artifact
# ======================================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFART", 2
ARTIFACT_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, table bytes, payload bytes, SHA-256 of table and payload
SIZE_CAP = 16_000_000
CLASS_PARTS, LOCATION_PARTS = (".row_class", ".column_class"), (".location_left", ".location_right")
SPREADS, SPREADS_PER_OCTAVE, SPREAD_OFFSET = 64, 4, 24  # classes of COMPRESSOR=entropy; the offset is that of spread 1
PERGROUP_SORTED = ("tok_emb.codes", "attn.c_q.codes", "mlp.fc.codes")
EVALUATION_FILES = ("train_gpt.py", "online_ngram_tilt.py", "online_ngram_state.c")  # all that an evaluation runs
PACKED_SCRIPT = globals().get("PACKED_SCRIPT")  # set by the loader of a packed script: its own path
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
    """The script that a submission ships: every evaluation file, minified and compressed, behind a loader.

    Its length is what the code counts for. A packed script returns itself. Minifying takes seconds: what came of the same files
    is kept in ~/.cache/parameter_golf.
    """
    if PACKED_SCRIPT:
        with open(PACKED_SCRIPT, "rb") as file:
            return file.read()
    try:
        import python_minifier  # noqa: F401
    except ImportError:
        raise InputError("python-minifier: the size of the code is counted minified; pip install python-minifier") from None
    texts = {}
    for name in EVALUATION_FILES:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), encoding="utf-8") as file:
            texts[name] = file.read()
    made_by = platform.python_version(), importlib.metadata.version("python-minifier"), brotli.version, LOADER
    stamp = hashlib.sha256(json.dumps([texts, made_by]).encode()).hexdigest()
    kept = os.path.join(os.path.expanduser("~"), ".cache", "parameter_golf", f"{stamp}.py")
    if os.path.exists(kept):
        with open(kept, "rb") as file:
            return file.read()
    packed = minified(texts)
    with suppress(OSError):  # without a home to write to it takes the same seconds next time
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        write_atomically(kept, packed)
    return packed


def minified(texts: dict[str, str]) -> bytes:
    """The files of that name and text as one packed script."""
    import python_minifier
    texts = dict(texts)
    for name in texts:
        if name.endswith(".py"):
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


class OverCapError(Exception):
    """The finished artifact is too large for a record."""


class DamagedError(Exception):
    """The bytes are no artifact that this program wrote."""


def spread_classes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of rows (layers, rows) and columns (layers, columns), int16, whose sum gives the spread of each code.

    A code's spread is modelled as row factor x column factor, fitted to the second moments by alternation, on a
    logarithmic grid.
    """
    squares = codes.float().square() + 1e-3
    row, column = squares.mean(2), torch.ones_like(squares[:, 0])
    for _ in range(4):
        column = ((1 / row)[:, None] @ squares)[:, 0] / codes.size(1)
        column = column / column.log().mean(1, keepdim=True).exp()
        row = (squares @ (1 / column)[..., None])[..., 0] / codes.size(2)
    return tuple((0.5 * f.log2() * SPREADS_PER_OCTAVE).round().to(torch.int16) for f in (row, column))


class CodeModel(NamedTuple):
    """What the entropy coder assumes of a stack of codes: every one has a spread and a location.

    Spread: row factor x column factor. Location, for a stack of one matrix (the embedding, whose columns have means and
    whose rows resemble each other): spread x (mean of the column + a product of rank 2). All of it is stored, in integers,
    and evaluated in integers, so that every machine sees the same model.
    """

    row: Tensor  # (layers, rows) int16, classes of spread_classes
    column: Tensor  # (layers, columns) int16
    left: Tensor | None = None  # (1, rows, rank) int8, in 1/4
    right: Tensor | None = None  # (1, 1 + rank, columns) int8, in 1/16, the means first

    def classes(self) -> Tensor:
        """The class (layers, rows, columns) of every code, uint8 below SPREADS."""
        return (self.row[:, :, None] + self.column[:, None] + SPREAD_OFFSET).clamp(0, SPREADS - 1).to(torch.uint8)

    def locations(self, classes: Tensor) -> Tensor | int:
        """The location of every code, rounded, int16."""
        if self.left is None:
            return 0
        right = self.right.float()
        product = self.left.float() @ right[:, 1:] + 4 * right[:, :1]  # exact: whole numbers below 2^24
        spread = torch.tensor([round(2 ** (10 + (k - SPREAD_OFFSET) / SPREADS_PER_OCTAVE)) for k in range(SPREADS)],
                              device=classes.device)
        return (product.long() * spread[classes.int()] + (1 << 15) >> 16).clamp(-127, 127).short()


def location_rank(shape) -> int:
    return min(2, *shape[1:]) if shape[0] == 1 else 0


def fit_code_model(codes: Tensor) -> CodeModel:
    """The model of the codes (layers, rows, columns), int8."""
    row, column = spread_classes(codes)
    if len(codes) > 1:
        return CodeModel(row, column)
    for final in (False, True):  # first a rough location, about which the spreads can be taken
        spread = torch.exp2((row[:, :, None] + column[:, None]) / SPREADS_PER_OCTAVE)
        mean = (codes / spread).mean(1, keepdim=True)
        left, right = top_singular(codes / spread - mean, location_rank(codes.shape))
        if not final:
            row, column = spread_classes(codes - spread * (mean + left @ right))
    size = left.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    left, right = 4 * left / size, 16 * torch.cat((mean, right * size.mT), 1)
    return CodeModel(row, column, *(factor.round().clamp(-127, 127).to(torch.int8) for factor in (left, right)))


def wrapped(values: Tensor) -> Tensor:
    """Values modulo 256, in -128 .. 127, int8."""
    return ((values + 128 & 255) - 128).to(torch.int8)


def code_histogram(symbols: Tensor, classes: Tensor) -> Tensor:
    """Counts (SPREADS, 256) of the symbols -128 .. 127 in each class."""
    return torch.bincount((classes.int() * 256 + symbols.int() + 128).flatten(), minlength=SPREADS * 256).view(SPREADS, 256)


def code_bits(codes: list[Tensor]) -> list[Tensor]:
    """What each matrix costs with COMPRESSOR=entropy, in bits: one tensor (layers,) for each stack of codes."""
    histograms = []
    for stack in codes:
        model = fit_code_model(stack)
        classes = model.classes()
        symbols = wrapped(stack.short() - model.locations(classes))
        histograms.append(torch.stack([code_histogram(*pair) for pair in zip(symbols, classes)]))
    total = sum(h.sum(0) for h in histograms).double()
    length = -(total / total.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-30).log2()
    return [(h * length).sum((1, 2)) for h in histograms]


def planes(array: np.ndarray) -> bytes:
    """An array's bytes with the low bytes of all values first, then the next."""
    little = np.ascontiguousarray(array).view(np.uint8).reshape(array.size, array.itemsize)
    return little.T.tobytes()


def from_planes(raw: bytes, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    return np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(shape)


def join(arrays: dict[str, np.ndarray]) -> bytes:
    return b"".join(planes(a) for a in arrays.values())


def split(raw: bytes, specs: list) -> dict[str, np.ndarray]:
    """The arrays that `specs` [(name, dtype, shape)] promises, out of the bytes of `join`."""
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in specs]
    if len(raw) != sum(sizes):
        raise DamagedError
    ends = itertools.accumulate(sizes)
    return {name: from_planes(raw[end - size:end], np.dtype(dtype), shape)
            for (name, dtype, shape), size, end in zip(specs, sizes, ends)}


def inflate(packed: bytes, specs: list, method: str = "brotli") -> dict[str, np.ndarray]:
    """Undo `deflate`; never makes more bytes than the specs promise."""
    expected = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in specs)
    try:
        if method == "brotli":
            raw = brotli.Decompressor().process(packed, output_buffer_limit=expected + 1)
        else:
            raw = lzma.LZMADecompressor(memlimit=1 << 27).decompress(packed, max_length=expected + 1)
    except (brotli.error, lzma.LZMAError):
        raise DamagedError from None
    return split(raw, specs)


def deflate(arrays: dict[str, np.ndarray], method: str = "brotli") -> bytes:
    raw = join(arrays)
    return brotli.compress(raw, quality=11, lgwin=24) if method == "brotli" else lzma.compress(raw, preset=9)


def is_codes(name: str) -> bool:
    return name.endswith(".codes")


def entropy_models(table: np.ndarray) -> dict[int, tuple]:
    """For each class in use its lowest symbol and constriction's model of the symbols from there on."""
    models = {}
    for spread in np.flatnonzero(table.any(1)):
        used = np.flatnonzero(table[spread])
        weights = table[spread, used[0]:used[-1] + 1] * 1000.0 + 1  # whole numbers: their sum is exact on every machine
        if len(weights) == 1:
            weights = np.append(weights, 1.0)  # a model needs two symbols
        models[int(spread)] = int(used[0]), constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)
    return models


def code_arrays(arrays: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(name, a) for name, a in arrays.items() if is_codes(name)]


def scale_classes(name: str, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What the scales beside the codes `name` say of the classes of rows and columns."""
    row, column = (arrays.get(name.replace(".codes", part)) for part in (".row_scale", ".column_scale"))
    if column is None:  # steps by deviation: the spread of the codes is smooth itself
        return np.int16(0), np.int16(0)
    return -(row >> (SCALES_PER_OCTAVE // SPREADS_PER_OCTAVE - 1)), -column.astype(np.int16)


def stored_model(name: str, side: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> CodeModel:
    """The model of the codes `name` from what is stored of it."""
    known = scale_classes(name, arrays)
    spreads = [torch.from_numpy(side[name + part] + offset) for part, offset in zip(CLASS_PARTS, known)]
    return CodeModel(*spreads, *(torch.from_numpy(side[name + part]) for part in LOCATION_PARTS if name + part in side))


def pack_entropy(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """Asymmetric numeral systems (Duda 2009) over the codes, class by class; brotli over the rest and the models."""
    side, symbols, kinds, counts = {}, [], [], 0
    for name, array in code_arrays(arrays):
        fitted = fit_code_model(torch.from_numpy(array))
        for part, spread, known in zip(CLASS_PARTS, fitted, scale_classes(name, arrays)):
            side[name + part] = (spread.numpy() - known).astype(np.int8)
        for part, factor in zip(LOCATION_PARTS, fitted[2:]):
            if factor is not None:
                side[name + part] = factor.numpy()
        model = stored_model(name, side, arrays)
        classes = model.classes()
        kinds.append(classes.numpy().ravel())
        shifted = wrapped(torch.from_numpy(array).short() - model.locations(classes))
        symbols.append(shifted.numpy().ravel())
        counts = counts + code_histogram(shifted, classes).numpy()
    side["table"] = np.ceil(counts / counts.sum(1, keepdims=True).clip(min=1) * 65535).astype(np.uint16)
    ordered = np.concatenate(symbols)[np.argsort(np.concatenate(kinds), kind="stable")]
    coder, end = constriction.stream.stack.AnsCoder(), len(ordered)
    for spread, (lowest, model) in reversed(entropy_models(side["table"]).items()):
        start = end - int(counts[spread].sum())
        coder.encode_reverse(ordered[start:end].astype(np.int32) + (128 - lowest), model)
        end = start
    rest = {name: a for name, a in arrays.items() if not is_codes(name)}
    floats = {name: a for name, a in rest.items() if a.dtype.kind == "f"}
    integers = {name: a for name, a in rest.items() if a.dtype.kind != "f"}
    return [coder.get_compressed().astype("<u4").tobytes(), deflate(floats), deflate(integers | side)]


def unpack_entropy(streams: list[bytes], specs: list) -> dict[str, np.ndarray]:
    coded = [spec for spec in specs if is_codes(spec[0])]
    rest = [spec for spec in specs if not is_codes(spec[0])]
    side = []
    for name, _, (layers, rows, columns) in coded:
        rank = location_rank((layers, rows, columns))
        shapes = [(layers, rows), (layers, columns)] + [(1, rows, rank), (1, 1 + rank, columns)] * (layers == 1)
        side += [(name + part, "int8", shape) for part, shape in zip(CLASS_PARTS + LOCATION_PARTS, shapes)]
    arrays = inflate(streams[1], [spec for spec in rest if spec[1][0] == "f"]) | inflate(
        streams[2], [spec for spec in rest if spec[1][0] != "f"] + side + [("table", "uint16", (SPREADS, 256))])
    stored = {name: stored_model(name, arrays, arrays) for name, _, _ in coded}
    classes = {name: model.classes() for name, model in stored.items()}
    merged = np.concatenate([kinds.numpy().ravel() for kinds in classes.values()])
    counts, models = np.bincount(merged, minlength=SPREADS), entropy_models(arrays.pop("table"))
    if len(streams[0]) % 4 or set(np.flatnonzero(counts)) != set(models):
        raise DamagedError
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(streams[0], "<u4").astype(np.uint32))
    ordered = np.concatenate([(coder.decode(model, int(counts[spread])) + (lowest - 128)).astype(np.int8)
                              for spread, (lowest, model) in models.items()])
    if not coder.is_empty():
        raise DamagedError
    symbols = np.empty_like(ordered)
    symbols[np.argsort(merged, kind="stable")] = ordered
    start = 0
    for name, _, shape in coded:
        shifted = torch.from_numpy(symbols[start:start + math.prod(shape)]).view(tuple(shape))
        arrays[name] = wrapped(shifted.short() + stored[name].locations(classes[name])).numpy()
        start += math.prod(shape)
    return {name: arrays[name] for name, _, _ in specs}


def similarity_order(codes: Tensor) -> Tensor:
    """Row order (layers, rows) of a greedy walk: from row 0 on, always to the nearest unused row by L1 distance."""
    layers, rows, _ = codes.shape
    wide, which = codes.float(), torch.arange(layers, device=codes.device)
    order = torch.zeros(layers, rows, dtype=torch.long, device=codes.device)
    used = torch.zeros(layers, rows, dtype=torch.bool, device=codes.device)
    for step in range(rows):
        if step:
            distance = torch.cdist(wide[which, order[:, step - 1]][:, None], wide, p=1)[:, 0]  # whole numbers, exact
            order[:, step] = distance.masked_fill(used, math.inf).argmin(1)
        used[which, order[:, step]] = True
    return order


PROGRAMS: set[subprocess.Popen] = set()  # that run now


def lrzip(data: bytes, *arguments: str, limit: int = 1 << 30) -> bytes:
    """Run the program lrzip over `data`; the result may have at most `limit` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = os.path.join(folder, "in.lrz"), os.path.join(folder, "out")
        with open(source, "wb") as file:
            file.write(data)
        try:
            command = ["prlimit", f"--fsize={limit}", "lrzip", "-q", *arguments, "-o", result, source]
            with subprocess.Popen(command, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)) as program:
                PROGRAMS.add(program)
                try:
                    code = program.wait(600)
                finally:
                    PROGRAMS.discard(program)
                    program.kill()
            if code:
                raise OSError(f"exit code {code}")
            with open(result, "rb") as file:
                return file.read()
        except (subprocess.TimeoutExpired, OSError) as error:
            raise RuntimeError(f"lrzip {' '.join(arguments)} failed: {error}") from None


def side_by_side(function, *arguments) -> list:
    """Results of `function`, each call in a thread; an interruption ends the programs that run in them."""
    with ThreadPoolExecutor() as pool:
        try:
            return list(pool.map(function, *arguments))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for program in list(PROGRAMS):
                program.kill()
            raise


def pack_pergroup(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """Each role's codes, some with sorted rows, column after column through lrzip's ZPAQ; brotli for the rest."""
    rest, texts = {name: a for name, a in arrays.items() if not is_codes(name)}, []
    for name, codes in arrays.items():
        if is_codes(name):
            if name in PERGROUP_SORTED:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                order = similarity_order(torch.from_numpy(codes).to(device)).cpu().numpy()
                codes = np.take_along_axis(codes, order[..., None], 1)
                rest[name + ".order"] = order.astype(np.uint16)
            texts.append(codes.transpose(0, 2, 1).tobytes())
    return [*side_by_side(lambda plane: lrzip(plane, "-z", "-L", "9"), texts), deflate(rest)]


def unpack_pergroup(streams: list[bytes], specs: list) -> dict[str, np.ndarray]:
    coded = [spec for spec in specs if is_codes(spec[0])]
    orders = [(name + ".order", "uint16", shape[:2]) for name, _, shape in coded if name in PERGROUP_SORTED]
    rest = inflate(streams[-1], [spec for spec in specs if not is_codes(spec[0])] + orders)
    try:
        texts = side_by_side(lambda spec, stream: lrzip(stream, "-d", limit=math.prod(spec[2])), coded, streams)
    except RuntimeError:
        raise DamagedError from None
    for (name, _, shape), raw in zip(coded, texts):
        layers, rows, columns = shape
        if len(raw) != math.prod(shape):
            raise DamagedError
        codes = np.frombuffer(raw, np.int8).reshape(layers, columns, rows).transpose(0, 2, 1)
        if name in PERGROUP_SORTED:
            order = rest.pop(name + ".order").astype(np.int64)
            if (np.sort(order, 1) != np.arange(rows)).any():
                raise DamagedError
            codes = np.take_along_axis(codes, order.argsort(1)[..., None], 1)
        rest[name] = np.ascontiguousarray(codes)
    return {name: rest[name] for name, _, _ in specs}


PACKERS = {  # name: (arrays -> streams, (streams, specs) -> arrays)
    "entropy": (pack_entropy, unpack_entropy),
    "pergroup": (pack_pergroup, unpack_pergroup),
    "brotli": (lambda arrays: [deflate(arrays)], lambda streams, specs: inflate(streams[0], specs)),
    "lzma": (lambda arrays: [deflate(arrays, "lzma")], lambda streams, specs: inflate(streams[0], specs, "lzma")),
    "none": (lambda arrays: [join(arrays)], lambda streams, specs: split(streams[0], specs)),
}


def write_container(path: str, table: dict, arrays: dict[str, np.ndarray], compressor: str) -> int:
    """Write named arrays with their table to `path`, all or nothing; returns the bytes written."""
    data = container(table, arrays, compressor)
    write_atomically(path, data)
    return len(data)


def container(table: dict, arrays: dict[str, np.ndarray], compressor: str) -> bytes:
    """Named arrays and their table in one byte string.

    Layout: header; table (JSON under brotli: what the caller says of function and roles, the compressor, name, dtype and
    shape of each array, lengths of the streams); streams. Nothing in it is code.
    """
    streams = PACKERS[compressor][0](arrays)
    table = table | dict(compressor=compressor, arrays=[[name, a.dtype.name, list(a.shape)] for name, a in arrays.items()],
                         streams=[len(stream) for stream in streams])
    head, payload = brotli.compress(json.dumps(table, separators=(",", ":")).encode()), b"".join(streams)
    digest = hashlib.sha256(head + payload).digest()
    return ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head), len(payload), digest) + head + payload


def read_container(path: str, model: GPT, s: Settings) -> tuple[dict, dict[str, np.ndarray]]:
    """Table and arrays of the file `path`; raises InputError when it is missing, or what open_container raises."""
    try:
        with open(path, "rb") as file:
            return open_container(file.read(5 * sum(p.numel() for p in model.parameters()) + (4 << 20)), path, model, s)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; train first, or set ARTIFACT_DIR to its folder") from None


def open_container(data: bytes, path: str, model: GPT, s: Settings) -> tuple[dict, dict[str, np.ndarray]]:
    """Undo `container`; nothing in the data is executed, and nothing larger than the model is allocated.

    Raises InputError, naming `path`, when it is damaged or was made for another function than the settings describe.
    """
    damaged = InputError(f"{path}: no whole artifact of version {ARTIFACT_VERSION}; copy it again or train again")
    body = memoryview(data)[ARTIFACT_HEADER.size:]
    try:
        magic, version, head_bytes, payload_bytes, digest = ARTIFACT_HEADER.unpack_from(data)
        if (magic, version) != (ARTIFACT_MAGIC, ARTIFACT_VERSION) or len(body) != head_bytes + payload_bytes \
                or hashlib.sha256(body).digest() != digest:
            raise damaged
        table = json.loads(brotli.Decompressor().process(bytes(body[:head_bytes]), output_buffer_limit=1 << 20))
        made_with = dict(table["function"])
        if made_with == s.function_settings():
            check_table(table, model, s)
    except (struct.error, brotli.error, DamagedError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            RecursionError):
        raise damaged from None
    wrong = [f"{name.upper()}: {mine}, but {path} was made with {printable(made_with.get(name))}; set it to that"
             for name, mine in s.function_settings().items() if made_with.get(name) != mine]
    if wrong or made_with != s.function_settings():
        raise InputError("\n".join(wrong)) if wrong else damaged
    if table["compressor"] == "pergroup" != s.compressor:
        raise InputError(f"COMPRESSOR: {path} needs the program lrzip; set COMPRESSOR=pergroup if you trust the file")
    cuts = [head_bytes + end for end in itertools.accumulate(table["streams"], initial=0)]
    try:
        if cuts[-1] != len(body):
            raise DamagedError
        streams = [bytes(body[a:b]) for a, b in zip(cuts, cuts[1:])]
        arrays = PACKERS[table["compressor"]][1](streams, table["arrays"])
    except (DamagedError, ValueError):
        raise damaged from None
    for a in arrays.values():  # no weight is infinite or 2^30
        huge = a.dtype == np.int16 and np.abs(a.astype(np.int32)).max() > 30 * SCALES_PER_OCTAVE
        if huge or a.dtype.kind == "f" and not np.isfinite(a).all():
            raise damaged
    return table, arrays


def printable(value) -> str:
    """A value from a stranger's file, fit for a terminal."""
    return re.sub(r"[^\w.+-]", "?", str(value)[:40], flags=re.A)


def check_table(table: dict, model: GPT, s: Settings) -> None:
    """Raise DamagedError unless the table promises this model's arrays, in one of the forms that this program writes."""
    def require(condition):
        if not condition:
            raise DamagedError

    def whole(value, low, high):
        require(type(value) is int and low <= value <= high)
        return value

    require(type(table["looping"]) is bool and (s.num_loops or not table["looping"]) and table["compressor"] in PACKERS)
    promised = {name: (dtype, tuple(whole(n, 0, 1 << 24) for n in shape)) for name, dtype, shape in table["arrays"]}
    require(len(promised) == len(table["arrays"]))
    for length in table["streams"]:
        whole(length, 0, 1 << 30)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if table["roles"] is None:  # a checkpoint
        require(type(table["rotated"]) is bool and table["compressor"] == "none" and len(table["streams"]) == 1)
        require(promised == {name: ("float32", shape) for name, shape in parameters.items()})
        return
    roles = matrix_roles(s)
    require(table["roles"].keys() == roles.keys())
    require(len(table["streams"]) == {"entropy": 3, "pergroup": len(roles) + 1}.get(table["compressor"], 1))
    for name, role in roles.items():
        form, shape = table["roles"][name], tuple(role.weights(model).shape)
        layers, rows, columns = shape
        require(type(form["trellis"]) is bool)
        require(promised.pop(name + ".codes") == ("int8", shape))
        scales = promised.pop(name + ".row_scale"), promised.pop(name + ".column_scale", None)
        require(scales in ((("float16", shape[:2]), None), (("int16", shape[:2]), None),
                           (("int16", shape[:2]), ("int8", (layers, columns)))))
        for layer, first, count, numerator, denominator in form["fine"]:
            whole(layer, 0, layers - 1), whole(first + whole(count, 1, columns), 1, columns), whole(first, 0, columns)
            whole(numerator, 1, 127), whole(denominator, 1, 127)
        fine = [(layer, column) for layer, first, count, *_ in form["fine"][:layers * columns]
                for column in range(first, first + count)]
        require(len(fine) == len(set(fine)) and len(form["fine"]) <= layers * columns)  # groups are disjoint
        for layer in form["low_rank"]:
            key = f"{name}.{whole(layer, 0, layers - 1)}."
            left, right = promised.pop(key + "left"), promised.pop(key + "right")
            rank = whole(right[1][0], 1, 64)
            require(left == ("int8", (rows, rank)) and right == ("int8", (rank, columns)))
            require(promised.pop(key + "left_scale") in (("float16", (1,)), ("float16", (rows,))))
            dtype, (groups,) = promised.pop(key + "right_scale")
            require(dtype == "float16" and groups > 0 and rank * columns % groups == 0)
        parameters.pop(role.stack, None)
    if "attn_gate.codes_by_row" in promised:
        shape = parameters.pop("attn_gate")
        require(promised.pop("attn_gate.codes_by_row") == ("int8", shape))
        require(promised.pop("attn_gate.row_scale") == ("float16", shape[:2]))
    require(promised == {name: ("float16", shape) for name, shape in parameters.items()})


def artifact_arrays(model: GPT, quantized: dict[str, Quantized], s: Settings) -> tuple[dict, dict[str, np.ndarray]]:
    """The roles' entry in the table and every array of the artifact."""
    forms, tensors = {}, {}
    for name, q in quantized.items():
        forms[name] = dict(trellis=q.trellis, fine=q.fine, low_rank=sorted(q.low_rank))
        tensors |= {f"{name}.codes": q.codes, f"{name}.row_scale": q.row_scale}
        if q.column_scale is not None:
            tensors[f"{name}.column_scale"] = q.column_scale
        for layer in sorted(q.low_rank):
            tensors |= {f"{name}.{layer}.{part}": t for part, t in q.low_rank[layer]._asdict().items()}
    stacks = {role.stack for role in matrix_roles(s).values()}
    for name, parameter in model.named_parameters():
        if name == "attn_gate" and s.gated_attn_quant_gate:
            scale = (parameter.abs().amax(2) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
            codes = (parameter / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
            tensors |= {"attn_gate.codes_by_row": codes, "attn_gate.row_scale": scale}
        elif name not in stacks:
            tensors[name] = parameter.half()
    return forms, {name: t.detach().cpu().contiguous().numpy() for name, t in tensors.items()}


@torch.no_grad()
def save_artifact(model: GPT, looping: bool, statistics: Statistics | None, code: int, s: Settings, log: RunLog) -> None:
    """Quantize the model, code it, decode it again and compare, write the artifact, log what became of every matrix.

    With STEP_RULE=loss the steps are chosen so that artifact and `code` bytes end just below TARGET_BYTES.
    """
    began, coding, octaves = time.perf_counter(), 0.0, None
    sort_hidden_units(model, statistics)
    problems = posed(model, statistics)
    wanted = s.target_bytes - code - 90_000  # what is not codes is known after the first packing
    most = 0.75 * sum(p.weight.numel() for p in problems.values())  # 6 bits per weight, for models too small for the target
    fitting = None  # the largest that keeps to the target
    for _ in range(4):
        wanted = min(wanted, most)
        quantized, octaves = quantize(problems, s, wanted, octaves)
        forms, arrays = artifact_arrays(model, quantized, s)
        started = time.perf_counter()
        data = container(dict(function=s.function_settings(), looping=looping, roles=forms), arrays, s.compressor)
        coding += time.perf_counter() - started
        spare = s.target_bytes - code - len(data)
        if s.step_rule != "loss":
            break
        if spare >= 0 and (fitting is None or len(data) > len(fitting[0])):
            fitting = data, arrays, quantized
        if 0 <= spare < 6000 or wanted == most and spare >= 0:
            break
        wanted += spare - 2000
    if fitting:
        data, arrays, quantized = fitting
    elif s.step_rule == "loss":
        log.event("target_missed", target_bytes=s.target_bytes, total_bytes=len(data) + code)
    started = time.perf_counter()
    again = open_container(data, s.artifact_path, model, s)[1]
    unpacking = time.perf_counter() - started
    if any(again[name].dtype != a.dtype or again[name].tobytes() != a.tobytes() for name, a in arrays.items()):
        raise AssertionError(f"COMPRESSOR={s.compressor} did not give back what it was given; nothing was written")
    write_atomically(s.artifact_path, data)
    bits = code_bits([q.codes for q in quantized.values()])
    expected = 0.0
    for (name, q), p, spent in zip(quantized.items(), problems.values(), bits):
        error = p.weight - dequantize(q)
        losses, size_of = p.loss(error), p.weight[0].numel()
        relative = ((error @ p.hessian) * error).sum((1, 2)) / ((p.weight @ p.hessian) * p.weight).sum((1, 2))
        expected += float(losses.sum())
        for i in range(len(p.weight)):
            extra = sum(stored_bytes(part) for part in q.low_rank.get(i, ()))
            log.event("matrix", name=name if name == "tok_emb" else f"blocks.{i}.{name}", rows=p.weight.size(1),
                      columns=p.weight.size(2), weighted_error=float(f"{relative[i]:.4g}"),
                      predicted_loss=float(f"{losses[i]:.4g}") if s.uses_curvature else None,
                      bits_per_weight=round(float(spent[i]) / size_of, 4), bytes=round(float(spent[i]) / 8 + extra),
                      awq_columns=sum(f[2] for f in q.fine if f[0] == i), lqer=i in q.low_rank)
    log.result("artifact", file=s.artifact_path, compressor=s.compressor, quantization_seconds=round(
        started - began - coding, 1), packing_seconds=round(coding, 1), unpacking_seconds=round(unpacking, 1),
        predicted_loss=round(expected, 6) if s.uses_curvature else None, round_trip="exact")


@torch.no_grad()
def install(model: GPT, table: dict, arrays: dict[str, np.ndarray], s: Settings) -> bool:
    """Put the stored weights into the model; returns whether looping is on."""
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    for name, role in matrix_roles(s).items() if table["roles"] else ():
        form = table["roles"][name]
        low_rank = {layer: LowRank(*(tensors[f"{name}.{layer}.{part}"] for part in LowRank._fields))
                    for layer in form["low_rank"]}
        role.weights(model).copy_(dequantize(Quantized(
            tensors[name + ".codes"], tensors[name + ".row_scale"], tensors.get(name + ".column_scale"), form["fine"],
            low_rank, form["trellis"])))
    if "attn_gate.codes_by_row" in tensors:
        tensors["attn_gate"] = tensors["attn_gate.codes_by_row"] * tensors["attn_gate.row_scale"].float()[..., None]
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    return table["looping"]


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


MOST_ROWS = 1000  # of one forward pass; grouped_mm takes fewer than 1,024 matrices


class Step(NamedTuple):
    """What the slots do in one step of the schedule; arrays (slots,). Positions count the targets of a document."""

    document: np.ndarray  # its index, -1 for an idle slot
    begin: np.ndarray  # the chunk's first target
    end: np.ndarray  # behind its last one, were the document to go on; 0 for an idle slot
    fresh: np.ndarray  # bool, whether the document is new to the slot


def ttt_schedule(lengths: np.ndarray, s: Settings):
    """Yield the Steps that score each target of documents of these lengths once, in the order (step, slot, position).

    The next document takes the first slot whose document has ended: in corpus order with TTT_ORDER=stream, the longest
    first with TTT_ORDER=length. A chunk's end follows from its begin alone; only where TTT_ORDER=length may it follow from
    the document's length. `lengths` is read after a step, when a decoder too knows which documents ended in it: at a BOS.
    Beforehand it must be told only how many documents there are, and the length of the last, which no BOS ends.
    """
    slots = min(s.ttt_slots, len(lengths))

    def chunk(document: int, begin: int) -> int:
        c = s.first_chunk(lengths[document])
        return max(c, min(int(begin * s.ttt_chunk_growth), s.ttt_chunk_max) // c * c)

    document, begin, end = (np.full(slots, value) for value in (-1, 0, 0))
    waiting = iter(range(len(lengths)) if s.ttt_order == "stream" else np.argsort(-lengths, kind="stable").tolist())
    while True:
        fresh = np.zeros(slots, bool)
        for slot, new in zip(np.flatnonzero(document < 0), waiting):
            document[slot], begin[slot], fresh[slot] = new, 0, True
        active = np.flatnonzero(document >= 0)
        if not len(active):
            return
        end[active] = [b + chunk(d, b) for d, b in zip(document[active].tolist(), begin[active].tolist())]
        yield Step(document.copy(), begin.copy(), end.copy(), fresh)
        over = active[end[active] >= lengths[document[active]]]
        begin[active] = end[active]
        document[over], begin[over], end[over] = -1, 0, 0


class Rows(NamedTuple):
    """Chunks of R documents for one forward pass: T packed inputs, of which C are scored, document by document."""

    slots: Tensor  # (R,) int64, among this rank's slots
    begins: Tensor  # (R,) int64, where the chunk begins in its document
    trains: Tensor  # (R,) bool, whether the document goes on behind the chunk
    ids: Tensor  # (T,) int64
    previous: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (R + 1,) int32, borders of the rows in T
    chunk: Tensor  # (C,) int64, which inputs are scored
    chunk_ends: Tensor  # (R,) int32, borders of the rows in C
    growth: Tensor  # (R,) float32, length of the chunk over that of the document's first
    weights: Tensor  # (C,) float32, 0 on rows that do not train, else one over the length of the chunk
    targets: Tensor  # (C,) int64
    hints: Tensor  # (C,) int64
    gate: Tensor  # (C,) bool
    boost: Tensor  # (C,) float32
    expert: Tensor  # (C,) int64, which of Settings.token_orders gave the hint
    visible: Tensor  # (n,) int64, which of the C lie inside their documents
    longest: int  # of the R rows
    training: bool  # whether any row trains
    at: np.ndarray  # (n,) their targets' positions in the stream, of tokens[1:]


def ranges(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs first .. first + count - 1, one after another, and the number of the run that each element is of."""
    run = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(run)) + (firsts - np.cumsum(counts) + counts)[run], run


class Adapters:
    """Low-rank adapters (Hu et al. 2021) of the documents in this rank's slots, a set per block visit, one at the head.

    Each adds alpha / r B A u to a projection: q, k, v and o from the attention's normalized input u, mlp from the MLP's; o
    and mlp before the residual scale, head before the soft cap. A slot's A (r, in) and B (out, r), all of them, are one row
    of `value` (slots, n), float32, first every A, then every B; `work` is its copy in the compute dtype.
    """

    def __init__(self, model: GPT, looping: bool, slots: np.ndarray, s: Settings, runtime: Runtime):
        self.model, self.settings, self.runtime = model, s, runtime
        outputs = dict(q=s.model_dim, k=s.kv_dim, v=s.kv_dim, o=s.model_dim, mlp=s.model_dim)
        visits, r = sum(map(len, model.orders[looping])), s.ttt_lora_rank
        self.sites = {(name, visit): rows for visit in range(visits) for name, rows in outputs.items()
                      if getattr(s, f"ttt_{name}_lora")} | {("head", 0): s.vocab_size}
        self.shapes = [(r, s.model_dim)] * len(self.sites) + [(rows, r) for rows in self.sites.values()]
        self.first_b = len(self.sites) * r * s.model_dim
        size = sum(rows * columns for rows, columns in self.shapes)

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=runtime.device)

        self.value, self.work = zeros(len(slots), size), zeros(len(slots), size, dtype=runtime.compute_dtype)
        self.square = zeros(len(slots), size) if s.ttt_optimizer == "adam" else None
        self.mean = zeros(len(slots), size) if s.ttt_beta1 else None
        self.pending = zeros(len(slots), size) if s.ttt_update_every > 1 else None
        self.average = zeros(len(slots), size) if s.ttt_lora_ema_decay else None
        self.count, self.chunks = zeros(len(slots)), zeros(len(slots))
        for row, slot in enumerate(slots.tolist()):
            self.draw(row, slot)

    @torch.no_grad()
    def draw(self, row: int, number: int) -> None:
        """Draw every A of a slot uniformly from +-1/sqrt(in), seeded by (SEED, number)."""
        seed = int(np.random.SeedSequence((self.settings.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        draw = torch.Generator(self.runtime.device).manual_seed(seed)
        bound = 1 / math.sqrt(self.settings.model_dim)
        self.value[row, :self.first_b].uniform_(-bound, bound, generator=draw)
        self.work[row] = self.value[row]
        if self.average is not None:
            self.average[row] = self.value[row]

    @torch.no_grad()
    def reset(self, rows: np.ndarray, documents: np.ndarray) -> None:
        """Start these slots anew for other documents: B and the optimizer's state 0, A kept or drawn."""
        index = torch.from_numpy(rows)
        if self.runtime.on_cuda:
            index = index.pin_memory().to(self.runtime.device, non_blocking=True)
        for state in (self.square, self.mean, self.pending, self.count, self.chunks):
            if state is not None:
                state.index_fill_(0, index, 0)
        for copy_of in (self.value, self.work):
            copy_of[:, self.first_b:].index_fill_(0, index, 0)
        if not self.settings.ttt_warm_start_a:
            for row, document in zip(rows.tolist(), documents.tolist()):
                self.draw(row, document)
        if self.average is not None:
            self.average[index] = self.value[index]

    def take(self, rows: Rows, averaged: bool = False) -> None:
        """The next forward passes are those of these rows' adapters."""
        flat = self.average[rows.slots].to(self.work.dtype) if averaged else self.work[rows.slots]
        parts = flat.split([a * b for a, b in self.shapes], dim=1)
        self.leaves = [part.detach().unflatten(1, shape).requires_grad_() for part, shape in zip(parts, self.shapes)]
        self.pairs = dict(zip(self.sites, zip(self.leaves, self.leaves[len(self.sites):])))
        self.ends = rows.cu_seqlens[1:]

    def delta(self, site: tuple, u: Tensor, ends: Tensor) -> Tensor:
        """What the adapters add for packed inputs u (T, in), rows ending at `ends`: (T, out)."""
        a, b = self.pairs[site]
        low = grouped_product(u, a.mT, ends)
        return self.settings.ttt_lora_alpha / self.settings.ttt_lora_rank * grouped_product(low, b.mT, ends)

    def block(self, visit: int, layer: int) -> Callable:
        """The Layer.adapter of this visit."""
        s = self.settings

        def add(site: str, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
            if site == "qkv":
                parts = zip("qkv", y.split((s.model_dim, s.kv_dim, s.kv_dim), dim=-1))
                return torch.cat([part + self.delta((name, visit), u, self.ends) if (name, visit) in self.pairs else part
                                  for name, part in parts], dim=-1)
            name, scales = {"out": ("o", self.model.attn_scale), "down": ("mlp", self.model.mlp_scale)}.get(site, ("", None))
            if (name, visit) not in self.pairs:
                return y
            return y + (scales[layer] * self.delta((name, visit), u, self.ends)).to(y.dtype)
        return add

    @torch.no_grad()
    def update(self, rows: Rows, gradients: tuple[Tensor, ...], last: bool) -> None:
        """One step, with these gradients of self.leaves, of the slots of the rows that train; last of this chunk's steps.

        With TTT_UPDATE_EVERY above 1, gradients are summed until so many chunks of the document have been trained on.
        """
        s, on = self.settings, rows.trains
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
        if s.ttt_update_every > 1:
            flat = self.pending[rows.slots] + flat * on[:, None]
            chunks = self.chunks.index_add_(0, rows.slots, (on & last).float())[rows.slots]
            on = on & (chunks % s.ttt_update_every == 0)
            self.pending[rows.slots] = flat * ~on[:, None]
            flat = flat.to(self.work.dtype)
        count = self.count.index_add_(0, rows.slots, on.float())[rows.slots]
        rate = s.ttt_lora_lr * s.ttt_local_lr_mult * rows.growth ** s.ttt_lr_chunk_power
        if s.ttt_optimizer == "adam":
            adamw_rows(self.value, self.work, self.square, self.mean, rows.slots, on, flat, count, rate,
                       s.ttt_weight_decay, s.ttt_beta1, s.ttt_beta2)
        else:
            value = self.value[rows.slots]
            step = flat.float() + s.ttt_weight_decay * value
            if self.mean is not None:
                step = torch.where(on[:, None], s.ttt_beta1 * self.mean[rows.slots] + step, self.mean[rows.slots])
                self.mean[rows.slots] = step
            self.value[rows.slots] = value - (rate * on)[:, None] * step
            self.work[rows.slots] = self.value[rows.slots].to(self.work.dtype)
        if self.average is not None:
            weight = (1 - s.ttt_lora_ema_decay) * on.float()[:, None]
            self.average[rows.slots] = torch.lerp(self.average[rows.slots], self.value[rows.slots], weight)


class ContextCache:
    """Keys and values of each slot's last TTT_EVAL_SEQ_LEN tokens as they were when scored, a ring per block visit."""

    def __init__(self, visits: int, slots: int, s: Settings, runtime: Runtime):
        self.window = s.ttt_eval_seq_len
        self.rings = torch.zeros(visits, 2, slots, self.window, s.num_kv_heads, s.head_dim, dtype=runtime.compute_dtype,
                                 device=runtime.device)

    def take(self, rows: Rows, keep: bool) -> None:
        """The next forward pass is that of these rows; keep: its keys and values stay."""
        self.rows, self.keep = rows, keep
        self.ring = ring_index(rows.cu_seqlens, rows.slots, rows.begins, len(rows.ids), self.window)

    def block(self, visit: int) -> Callable:
        """The Layer.context of this visit."""
        keys, values = self.rings[visit]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = self.rows
            y = cached_attention(q, k, v, rows.cu_seqlens, rows.longest, keys, values, rows.slots, rows.begins, self.window)
            if self.keep:  # overwrites only what the rows' own window has left behind: the backward pass finds the rest
                store(keys, values, k, v, self.ring)
            return y
        return attend


def check_machine(s: Settings, runtime: Runtime) -> None:
    """Raise InputError, before anything is trained, if test-time training will not run here."""
    problems = []
    if runtime.on_cuda:
        problems += ["triton: test-time training on CUDA needs it; pip install triton"] * (triton is None)
        group = s.num_heads // s.num_kv_heads
        for name, value, good in (("TTT_LORA_RANK", s.ttt_lora_rank, s.ttt_lora_rank % 8 == 0), ("MODEL_DIM", s.model_dim,
                                  s.model_dim % 8 == 0), ("VOCAB_SIZE", s.vocab_size, s.vocab_size % 8 == 0)):
            problems += [f"{name}: {value} is no multiple of 8, which test-time training on CUDA needs"] * (not good)
        for name, value, good in (("NUM_HEADS", s.num_heads, group & (group - 1) == 0), ("MODEL_DIM", s.model_dim,
                                  s.head_dim >= 16 and s.head_dim & (s.head_dim - 1) == 0)):
            problems += [f"{name}: {value}: test-time training on CUDA needs heads of 16, 32, 64 or 128 and 1, 2, 4 or 8 query "
                         "heads per key/value head; set TTT_ENABLED=0"] * (not good)
    if problems:
        raise InputError("\n".join(problems))
    if s.ngram_tilt_enabled:
        if runtime.rank == 0:
            ngram.load()  # compiles, once for all ranks of a host
        runtime.from_rank0([0.0])


class TestTimeTraining(Rider):
    """Score-first test-time training: each chunk is scored, then its document's adapters are trained on it.

    Scores and updates go step by step through ttt_schedule, which follows from where documents end; ranks split its slots.
    After the step in which a share of PHASED_TTT_PREFIX_DOCS documents is complete, all weights of `model` train on the
    complete ones. Adapters and cached context of documents that are under way stay. From the Parameter Golf systems #1787
    to #2140, whose hints and scores follow two orders, so that no decoder could; TTT_ORDER=stream has one order.
    """

    def __init__(self, model: GPT, data: ValidationData, looping: bool, s: Settings, runtime: Runtime):
        self.model, self.data, self.looping, self.settings, self.runtime = model, data, looping, s, runtime
        self.tokens, last = data.tokens, len(data.tokens) - 1
        self.starts = np.unique(np.concatenate(([0], np.flatnonzero(data.tokens[:last] == BOS_ID))))
        self.lengths = np.diff(self.starts, append=last)
        self.mine = np.arange(runtime.rank, min(s.ttt_slots, len(self.lengths)), runtime.world_size)
        self.plain = model.frozen()
        self.cut_layers()
        visits = sum(map(len, model.orders[looping]))
        self.adapters = Adapters(self.plain, looping, self.mine, s, runtime)
        self.cache = ContextCache(visits, len(self.mine), s, runtime) if s.ttt_context == "cache" else None
        self.hints = ngram.Hints(np.zeros(last, np.uint16), np.zeros(last, bool), np.zeros(last, np.float32))
        self.counted = False  # whether self.hints are complete
        self.phases: list[dict] = []  # figures of the global phases
        self.experts = np.zeros(last, np.uint8)
        self.ngrams = [ngram.NgramState(order, s.token_threshold * (s.ngram_boost != "learned"), s.token_boost, s.ngram_boost)
                       for order in s.token_orders * s.ngram_tilt_enabled]
        learned = s.ngram_tilt_enabled and s.ngram_boost == "learned"
        self.learned = ngram.LearnedBoost(len(self.ngrams), runtime.device) if learned else None

    def cut_layers(self) -> None:
        """Cut the weights into layers, once for all forward passes until they change."""
        self.plain.__dict__.pop("layers", None)
        layers = self.plain.layers()
        self.plain.layers = lambda *_: layers

    def block(self, visit: int, layer: int) -> dict:
        return dict(adapter=self.adapters.block(visit, layer), context=self.cache.block(visit) if self.cache else None)

    # Host: what every step needs, packed by a thread while the device is at earlier steps.

    def prepared(self):
        """Every Step of the schedule with the Rows, host tensors, of this rank's slots."""
        for step in ttt_schedule(self.lengths, self.settings):
            self.count_hints(step)
            yield step, list(self.pack(step))

    def count_hints(self, step: Step) -> None:
        """Enter the step's hints into self.hints, counted target by target in the order of the schedule.

        Contexts stay inside documents. With TTT_ORDER=length all hints are counted at once, in the order of the text.
        """
        if self.counted or not self.settings.ngram_tilt_enabled:
            return
        entered = slice(None)
        if self.settings.ttt_order == "stream":
            active = step.document >= 0
            first = self.starts[step.document[active]]
            begin, count = step.begin[active], np.minimum(step.end, self.lengths[step.document])[active] - step.begin[active]
            entered, rows = ranges(first + begin, count)[0], (first, first + begin, first + begin + count)
        for number, state in reversed(list(enumerate(self.ngrams))):  # what a longer context says goes over a shorter one's
            if self.settings.ttt_order == "stream":
                found = state.feed_rows(self.tokens, *rows)
            else:
                found, self.counted = state.feed(self.tokens[:-1]), True
            for array, entries in zip((*self.hints, self.experts), (*found, number)):
                array[entered] = np.where(found.gate, entries, array[entered])

    def pack(self, step: Step):
        """Yield the Rows of this rank's slots, as many to one as TTT_MICRO_BATCH_TOKENS allows.

        What lies behind a document's end is filled up with BOS: no shape depends on it.
        """
        s = self.settings
        slots = np.flatnonzero(step.document[self.mine] >= 0)
        document, begin, end, _ = (field[self.mine[slots]] for field in step)
        first = begin if self.cache else np.maximum(0, end - s.ttt_eval_seq_len)  # of the row, in the document
        ends, at = np.cumsum(end - first), 0
        while at < len(slots):  # greedily
            before = ends[at - 1] if at else 0
            fitting = np.searchsorted(ends, before + s.ttt_micro_batch_tokens, side="right")
            some = slice(at, min(max(at + 1, int(fitting)), at + MOST_ROWS))
            yield self.pack_rows(slots[some], document[some], begin[some], end[some], first[some])
            at = some.stop

    def pack_rows(self, slots: np.ndarray, document: np.ndarray, begin: np.ndarray, end: np.ndarray,
                  first: np.ndarray) -> Rows:
        """The Rows of these slots; all (R,). A row's inputs begin at `first` in the document."""
        s, length, start = self.settings, self.lengths[document], self.starts[document]
        at, row = ranges(first, end - first)
        inside = at < length[row]
        stream = np.where(inside, start[row] + at, 0)
        ids = np.where(inside, self.tokens[stream], BOS_ID)
        previous = np.where(inside & (at > 0), self.tokens[stream - 1], BOS_ID)
        cu_seqlens = np.concatenate(([0], np.cumsum(end - first)))
        scored, owner = ranges(begin, end - begin)
        real = scored < length[owner]
        visible, target = np.flatnonzero(real), np.where(real, start[owner] + scored, 0)
        hints, gate, boost, expert = (np.where(real, array[target], 0) for array in (*self.hints, self.experts))
        trains = end < length

        def tensor(array, dtype=np.int64):
            found = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
            return found.pin_memory() if self.runtime.on_cuda else found

        return Rows(tensor(slots), tensor(begin), tensor(trains, bool), tensor(ids), tensor(previous),
                    tensor(at if self.cache else at - first[row]), tensor(cu_seqlens, np.int32),
                    tensor(scored - first[owner] + cu_seqlens[owner]), tensor(np.cumsum(end - begin), np.int32),
                    tensor((end - begin) / [s.first_chunk(x) for x in length.tolist()], np.float32),
                    tensor((trains / (end - begin))[owner], np.float32),
                    tensor(self.tokens[target + 1]), tensor(hints), tensor(gate, bool), tensor(boost, np.float32),
                    tensor(expert), tensor(visible), int((end - first).max()), bool(trains.any()), target[visible])

    # Device

    def losses(self, rows: Rows, first_pass: bool) -> tuple[Tensor, Tensor]:
        """NLL of each target (C,), nats, with gradients to the adapters' leaves, and log-probabilities of the hints."""
        if self.cache:
            self.cache.take(rows, keep=first_pass)
        segments = Segments(rows.cu_seqlens, rows.positions, rows.longest, rows.previous)
        hidden = self.plain(rows.ids, segments, self.looping, self)
        if not self.cache:
            hidden = hidden[rows.chunk]
        scores = self.plain.scores(hidden) + self.adapters.delta(("head", 0), hidden, rows.chunk_ends)
        if self.settings.temperature_scale != 1:
            scores = scores / self.settings.temperature_scale
        return two_value_nll(scores, *self.plain.caps(), rows.targets, rows.hints)

    def score_and_train(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """NLL of the rows' targets, tilted and not, nats, (n,) each, as they were before the adapters trained on them."""
        s, training = self.settings, rows.training and self.settings.ttt_lora_lr > 0
        averaged = s.ttt_lora_ema_decay > 0
        self.adapters.take(rows, averaged)
        with torch.set_grad_enabled(training and not averaged):
            losses, log_q = self.losses(rows, first_pass=True)
        scores = tilted = losses.detach()
        if s.ngram_tilt_enabled:
            hit, boost = rows.hints == rows.targets, rows.boost
            if self.learned:
                boost = self.learned(log_q, rows.boost, rows.expert)
                self.learned.observe(log_q, rows.boost, rows.expert, hit, rows.gate)
            tilted = -ngram.tilt(-scores, log_q, hit, boost, rows.gate, s.ngram_boost == "calibrated")
        result = tilted[rows.visible], scores[rows.visible]
        total = None
        for step in range(s.ttt_grad_steps if training else 0):
            if step or averaged:
                self.adapters.take(rows)
                losses, _ = self.losses(rows, first_pass=False)
            gradients = torch.autograd.grad((losses * rows.weights).sum(), self.adapters.leaves)
            if total is not None and not s.ttt_grad_steps_clean:
                gradients = tuple(a + b for a, b in zip(total, gradients))
            total = gradients
            self.adapters.update(rows, gradients, last=step == s.ttt_grad_steps - 1)
        return result

    def rehearse(self) -> None:
        """Compile the kernels on a first chunk in every slot; nothing is trained or kept that a document would see."""
        if self.runtime.on_cuda and self.settings.phased_ttt_prefix_docs:
            few = np.arange(min(self.settings.eval_seq_len, len(self.tokens) - 1))
            self.weight_gradients(few, np.array([0, len(few)]))
        if self.runtime.on_cuda and len(self.mine):
            most = max(1, min(MOST_ROWS, self.settings.ttt_micro_batch_tokens // self.settings.ttt_chunk_size))
            slots = np.arange(min(len(self.mine), most))
            zero = np.zeros_like(slots)
            rows = self.pack_rows(slots, zero, zero, zero + self.settings.ttt_chunk_size, zero)
            nothing = dict(trains=torch.zeros_like(rows.trains), gate=torch.zeros_like(rows.gate))
            for longest in (rows.longest, self.settings.ttt_eval_seq_len):  # attention has a kernel for one tile of keys
                for training in (False, True):
                    self.score_and_train(self.to_device(rows._replace(**nothing, longest=longest, training=training)))
            if self.learned:
                self.learned.step()

    def to_device(self, rows: Rows) -> Rows:
        return Rows(*(x.to(self.runtime.device, non_blocking=True) if isinstance(x, Tensor) else x for x in rows))

    def steps(self):
        """Yield where targets lie in the stream (n,), of tokens[1:], and their NLL, tilted and not, nats, (n,) each.

        Each rank yields the targets of its own slots and takes part in every global phase.
        """
        s, finished = self.settings, np.zeros(len(self.lengths), bool)
        prefix, phases = min(len(self.lengths), s.phased_ttt_prefix_docs), s.phased_ttt_num_phases
        pauses = sorted({prefix * (k + 1) // phases for k in range(phases)} - {0})
        with ahead(self.prepared(), 4) as prepared:
            for step, groups in prepared:
                fresh = np.flatnonzero(step.fresh[self.mine])
                if len(fresh):
                    self.adapters.reset(fresh, step.document[self.mine[fresh]])
                for rows in groups:
                    yield rows.at, *self.score_and_train(self.to_device(rows))
                if self.learned:
                    self.learned.step(self.runtime.sum)
                over = (step.document >= 0) & (step.end >= self.lengths[step.document])
                finished[step.document[over]] = True
                while pauses and pauses[0] <= finished.sum() < len(finished):  # after the last document it would help none
                    pauses.pop(0)
                    self.train_all_weights(np.flatnonzero(finished))

    def weight_gradients(self, inputs: np.ndarray, bounds: np.ndarray) -> list[Tensor | None]:
        """Gradients of the summed losses at these places of the stream, in segments, for every weight that trains."""
        ids, labels = (torch.from_numpy(self.tokens[inputs + k].astype(np.int64)) for k in (0, 1))
        batch = Batch(ids, labels, make_segments(bounds.astype(np.int32), self.settings.eval_seq_len)).to(self.runtime)
        losses = self.model.plain().token_losses(*batch, self.looping)
        return torch.autograd.grad(losses.sum(), [p for p in self.model.parameters() if p.requires_grad], allow_unused=True)

    def train_all_weights(self, documents: np.ndarray) -> None:
        """Train every weight on these documents, GLOBAL_TTT_CHUNK_TOKENS a step, whole segments dealt to the ranks."""
        s, r, size, began = self.settings, self.runtime, self.settings.global_ttt_chunk_tokens, time.perf_counter()
        inputs = ranges(self.starts[documents], self.lengths[documents])[0]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        banks = {id(bank) for bank in self.model.banks()}
        momentum = [torch.zeros_like(p) for p in weights]
        count, warm = -(-len(inputs) // size), s.global_ttt_warmup_chunks
        for number in (n for n in range(count) for _ in range(s.global_ttt_epochs)):
            chunk = inputs[number * size:(number + 1) * size]
            bounds = segment_bounds(np.flatnonzero(self.tokens[chunk] == BOS_ID), len(chunk), s.eval_seq_len)
            low, high = bounds[np.searchsorted(bounds, [len(chunk) * (r.rank + k) // r.world_size for k in (0, 1)])]
            gradients = [torch.zeros_like(p) for p in weights]
            if high > low:
                found = self.weight_gradients(chunk[low:high], bounds[(bounds >= low) & (bounds <= high)] - low)
                gradients = [zero if g is None else g / len(chunk) for g, zero in zip(found, gradients)]
            if number < warm:
                lr = s.global_ttt_warmup_start_lr
                lr += (s.global_ttt_lr - lr) * number / max(1, warm - 1)
            else:
                lr = s.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1, count - warm)))
            with torch.no_grad():
                flat = r.sum(torch.cat([g.flatten() for g in gradients]))
                clip = (s.global_ttt_grad_clip / (flat.norm() + 1e-6)).clamp(max=1) if s.global_ttt_grad_clip else 1.0
                gradients = [g.view_as(p) for g, p in zip((flat * clip).split([p.numel() for p in weights]), weights)]
                hyper = r.upload([lr, s.global_ttt_momentum])
                for p, g, m in zip(weights, gradients, momentum):
                    if s.global_ttt_optimizer == "muon" and id(p) in banks:
                        update = newton_schulz(nesterov(g, m, torch.ones((), device=r.device), hyper, False),
                                               s.global_ttt_muon_ns_steps)
                        apply_muon(p, update, hyper, math.sqrt(max(1, p.size(1) / p.size(2))), 0.0, math.inf)
                    else:
                        p.sub_(lr * m.mul_(s.global_ttt_momentum).add_(g))
        self.cut_layers()
        r.synchronize()
        self.phases.append(dict(documents=len(documents), tokens=len(inputs), steps=count * s.global_ttt_epochs,
                                seconds=round(time.perf_counter() - began, 3)))

    def score(self, log: RunLog) -> dict:
        """Adapt and score, with a line every 5 %: val_loss (nats per token), val_bpb, without tilt too, and what it took."""
        s = self.settings
        if s.ngram_hint_precompute_outside:
            for step in ttt_schedule(self.lengths, s):
                self.count_hints(step)
            self.counted = True
        self.rehearse()
        self.runtime.synchronize()
        self.runtime.from_rank0([0.0])  # all ranks begin together
        began, graphs = time.perf_counter(), compiled_graphs()
        sums = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)  # nats tilted, nats, targets
        times, seen, total, shown = np.zeros(len(self.tokens) - 1, np.uint8), [0, 0], len(self.tokens) - 1, 0.0
        with progress_bar(total, "tokens", "test-time training", self.runtime) as show:
            for at, tilted, plain in self.steps():
                sums += torch.stack((tilted.double().sum(), plain.double().sum(), torch.ones_like(plain).double().sum()))
                np.add.at(times, at, 1)
                seen = [seen[0] + len(at), seen[1] + int(self.data.bytes[at + 1].sum(dtype=np.int64))]
                share, seconds = min(1.0, self.runtime.world_size * seen[0] / total), time.perf_counter() - began
                show(share * total)
                if share >= shown + 0.05:
                    shown = share
                    bpb = float(sums[0]) / math.log(2) / max(1, seen[1])  # the one place where the host waits for the device
                    log.event("progress", share=round(share, 3), val_bpb=round(bpb, 6),
                              tokens_per_second=round(share * total / seconds), eta_seconds=round(seconds * (1 / share - 1), 1))
        nats, untilted, count = self.runtime.sum(sums).tolist()
        size, times = int(self.data.bytes[1:].sum(dtype=np.int64)), self.runtime.sum(torch.from_numpy(times).to(sums.device))
        if count != total or int(times.min()) != 1 or int(times.max()) != 1:
            raise AssertionError(f"{count:.0f} of {total} validation targets were scored, from {times.min()} to {times.max()} "
                                 "times each")
        if not math.isfinite(nats):
            raise FloatingPointError("the loss of test-time training is not finite: lower TTT_LORA_LR")
        if compiled_graphs() != graphs:
            raise AssertionError("test-time training compiled something inside its timer")
        seconds = time.perf_counter() - began
        return dict(val_loss=round(nats / total, 8), val_bpb=round(nats / math.log(2) / size, 8),
                    untilted_bpb=round(untilted / math.log(2) / size, 8), targets=total, bytes=size,
                    documents=len(self.lengths), whole_text=s.val_doc_fraction == 1, phases=self.phases,
                    hints=int(self.hints.gate.sum()), hints_inside_timer=not s.ngram_hint_precompute_outside,
                    decodable=s.ttt_order == "stream", seconds=round(seconds, 3), tokens_per_second=round(total / seconds),
                    process_seconds=round(process_seconds(), 3))


# ======================================================================================================================
# 11. Main
# ======================================================================================================================


def run(settings: Settings, runtime: Runtime, log: RunLog) -> None:
    """Train, calibrate, quantize, save, load and score; or start from a checkpoint; or only load and score."""
    s, first = settings, runtime.rank == 0
    changed = {f.name.upper(): getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
    log.event("settings", **changed)
    log.event("machine", **runtime.describe())
    if first and s.compressor == "pergroup" and not s.prequant_only and not all(map(shutil.which, ("lrzip", "prlimit"))):
        raise InputError("COMPRESSOR: pergroup needs the programs lrzip and prlimit; install them, or choose entropy, brotli "
                         "or lzma")
    if s.ttt_enabled and not s.prequant_only:
        check_machine(s, runtime)
    data = None if s.ttt_eval_only else TrainingData(s, runtime)
    validation = Evaluator(ValidationData(s), s, runtime)
    log.event("data", folder=s.shards_dir, train_tokens=data.total if data else 0, val_targets=validation.targets,
              **check_manifest(s))
    packed = packed_code() if first and not s.prequant_only else b""  # before training: a missing tool must show now
    code = len(packed)
    log.event("code", sha256=hashlib.sha256(packed).hexdigest() if packed else "not packed", packed_bytes=code)
    model = GPT(s, runtime.compute_dtype).to(runtime.device).compile_parts(runtime)
    runtime.share(model.parameters())
    log.event("model", parameters=sum(p.numel() for p in model.parameters()), micro_batch_tokens=s.micro_batch_tokens,
              micro_batches=s.accumulation, attention=model.attention_kernel if runtime.on_cuda else "reference",
              fp8=model.fp8)

    def calibration(looping: bool, rehearsal: bool) -> Statistics | None:
        if s.optrot_enabled and not rehearsal and not s.prequant_only:
            rotate_values(model)
        if s.prequant_only or not s.gptq_calibration_batches:
            return None
        one_round = calibration_pass(s, runtime) * runtime.world_size if rehearsal else None
        return calibrate(model, calibration_windows(data, s, one_round), looping, s, runtime)

    def load(path: str) -> bool:  # rank 0's file counts, whichever disks the ranks see
        looping = False
        if first:
            table, arrays = read_container(path, model, s)
            looping = install(model, table, arrays, s)
            if (table["roles"] is None) != (path == s.checkpoint_path):
                raise InputError(f"{path}: a checkpoint where an artifact belongs, or the reverse; train again")
            if table["roles"] is None and table["rotated"]:
                rotate_values(model)  # a Hadamard rotation undoes itself
        looping = bool(runtime.from_rank0([float(looping)])[0])
        runtime.share(model.parameters())
        return looping

    if data:
        if first:
            bits = data.unigram_bits(validation.data.tokens[1:])
            log.result("unigram", val_bpb=round(bits / validation.bytes, 8))
        if s.quantize_only:
            looping = load(s.checkpoint_path)
            began = time.perf_counter()
            statistics = calibration(looping, rehearsal=False)
            runtime.synchronize()
            log.event("calibration", windows=calibration_count(s), seconds=round(time.perf_counter() - began, 3))
            log.result("averaged", **validation.score(model, looping))
        else:
            looping, statistics = train(model, data, validation, calibration, s, runtime, log)
        if s.prequant_only:
            return
        if first:
            if not s.quantize_only:
                arrays = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
                table = dict(function=s.function_settings(), looping=looping, roles=None, rotated=s.optrot_enabled)
                try:
                    write_container(s.checkpoint_path, table, arrays, "none")
                except OSError as error:  # the artifact is what counts
                    log.event("no_checkpoint", error=str(error))
            save_artifact(model, looping, statistics, code, s, log)
    looping = load(s.artifact_path)
    if first:
        artifact = os.path.getsize(s.artifact_path)
        log.result("size", artifact_sha256=file_sha256(s.artifact_path), artifact_bytes=artifact, code_bytes=code,
                   total_bytes=artifact + code, cap=SIZE_CAP, within_cap=artifact + code < SIZE_CAP)
    log.result("quantized", **validation.score(model, looping))
    if s.ttt_enabled:
        text = validation.data if s.val_doc_fraction == 1 else validation.data.sample(s.val_doc_fraction, s.seed)
        log.result("ttt", **TestTimeTraining(model, text, looping, s, runtime).score(log))
    if first and artifact + code >= SIZE_CAP:
        raise OverCapError(f"artifact and code take {artifact + code:,} bytes, not below {SIZE_CAP:,}: no valid record")


def summary(record: dict) -> str:
    """The figures of a run as a small table."""
    results = record["results"]
    rows = [(name, f"{results[key]['val_bpb']:.5f}", f"{results[key].get('seconds', ''):>9}") for name, key in
            (("unigram model", "unigram"), ("raw weights", "raw"), ("averaged weights", "averaged"),
             ("from the artifact", "quantized"), ("test-time training", "ttt")) if key in results]
    lines = ["", f"{'':20}{'val_bpb':>9}{'seconds':>10}"] + [f"{name:20}{bpb:>9} {seconds}" for name, bpb, seconds in rows]
    if "training" in results:
        times = results["training"]
        lines.append(f"{'training':20}{times['steps']:>9} steps and calibration in {times['clock_seconds']} s"
                     + ("" if times["within_cap"] else f", over the cap of {times['cap_seconds']} s"))
    if "size" in results:
        size = results["size"]
        lines.append(f"{'artifact + code':20}{size['total_bytes']:>9,} bytes of {size['cap']:,}")
    return "\n".join(lines)


def stop_on_signal(number, frame):
    raise SystemExit(128 + number)


def ignore_signals() -> None:
    """torchrun ends every rank as soon as one has failed, but one that has failed too closes its record first."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
        if len(arguments) != dict([("--check", 1), ("--pack-code", 2), ("--diff", 3)]).get(*arguments[:1] or [""], 0):
            raise InputError(f"{' '.join(arguments)}: settings are environment variables; the arguments are --help, "
                             "--check, --pack-code FILE, --diff RECIPE RECIPE")
        if arguments[:1] == ["--diff"]:
            print(settings_diff(arguments[1:]))
            return 0
        settings = Settings.from_environment(environ)
    except InputError as error:
        return complain(error, rank) if rank in ("0", "") or not rank.isdigit() else 2  # the same on every rank
    try:
        if arguments[:1] == ["--pack-code"]:
            write_atomically(arguments[1], packed_code())
            print(f"{arguments[1]}: {os.path.getsize(arguments[1]):,} bytes")
            return 0
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
                try:
                    ignore_signals()
                except (SystemExit, KeyboardInterrupt):  # of a signal that was on its way already
                    ignore_signals()
                if not isinstance(error, (InputError, ngram.NgramError, OverCapError, FloatingPointError, SystemExit,
                                          KeyboardInterrupt)):
                    log.write(traceback.format_exc())
                log.close("failed", error=f"{type(error).__name__}: {error}", seconds=round(time.perf_counter() - began, 1))
                raise
            log.write(summary(log.record) + "\n")
            log.close("finished", seconds=round(time.perf_counter() - began, 1), process_seconds=round(process_seconds(), 1))
        return 0
    except (InputError, ngram.NgramError, OSError) as error:
        return complain(error, rank)
    except (OverCapError, FloatingPointError) as error:
        complain(error, rank)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    environment = os.environ
    environment.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # FlashAttention 4 keeps what it compiles
    exit_code = main(sys.argv[1:], dict(environment))
    sys.stdout.flush()
    sys.stderr.flush()
    if environment.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # Gloo's threads can outlive the interpreter and abort a run that is complete
    sys.exit(exit_code)
