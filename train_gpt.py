"""Parameter Golf in one file: train a 36M-parameter language model for ten minutes, save it under 16,000,000
bytes, score it in bits per byte.

What is notable about the model (every part can be switched by a setting, see `python train_gpt.py --help`):

- 11 layers of width 512 whose middle layers 3..5 are visited three times once training is 35 % done
- U-Net skips from the first half of the visits to the second, blended by learned gates
- the last three layers run on two lanes: attention reads one, the MLP the other, learned scalars mix both
- exclusive self-attention (XSA): each head's output loses its component along the token's own value vector
- per-head output gates, RMSNorm on queries and keys, learned query gain, partial rotary embedding
- leaky ReLU squared MLP, tied embedding, tanh softcap on the logits, SmearGate on the embeddings
- Muon with Polar Express coefficients on weight banks dealt out to the ranks, AdamW on everything else
- documents packed without padding: attention never crosses a document border

Launch: SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py (on one device `python train_gpt.py`).
"""
from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

STARTED = time.perf_counter()  # of the process, before the imports that take seconds
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # and during which an interrupt should end it in silence
if not os.path.exists("/dev/nvidiactl"):  # OpenMP reads it when torch loads: threads that wait should sleep
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import brotli
import constriction
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import online_ngram_tilt as ngram
from env_settings import (
    PUBLISHED, STAGES, FromEnvironment, InputError, fields_by_group, fixed_variables, list_of, parse_stages,
    read_recipe, setting, settings_help)
from gpt_kernels import (
    ATTENTION_KERNELS, HAS_TRITON, Activation, FullProduct, KernelError, Matrix, Product, Segments, Skip,
    WithPast, adamw_rows, add_norm, as_activation, as_matrices, attention, attention_kernel, computed,
    fp8_products_fit, grouped_product, leaky_relu_squared, mix_norm, norm, prepare_heads, rotary_tables,
    squared_mlp, two_value_nll, xsa_gate)

# ============================================================================================================
# 1. Settings
# ============================================================================================================

# Where the download of the published set puts its shards.
PUBLISHED_SET = ("datasets/fineweb10B_sp8192_caseops/datasets/datasets/"
                 "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved")
BOS_ID = 1  # first token of every document, in every shard format this project knows
SIGMA = "STEP_RULE=sigma"  # the quantizer of the published systems
from host import EventLog, ahead, hold, ignore_signals, lasting_console, limit_memory, machine_memory
from host import print_errors, ran_out_of_memory, write_whole


@dataclass(frozen=True)
class Settings(FromEnvironment):
    """Everything a run can be told, by the environment variable of the name in upper case.

    Defaults are those of the record run. See Rule in env_settings.py for what `setting` takes.
    """

    fixed = fixed_variables(PUBLISHED)

    # Data
    data_dir: str = setting("./data", "folder of the default DATA_PATH", group="Data")
    data_path: str = setting("", "folder of the fineweb_*.bin shards; empty: the published CaseOps set")
    vocab_size: int = setting(8192, "rows of the embedding", unit="tokens", low=2, high=65536)
    train_batch_tokens: int = setting(786432, "one optimizer step over all ranks", unit="tokens", low=1)
    train_batch_schedule: str = setting("", "or in stages: tokens@end, each until that progress", **STAGES)
    train_batch_lr_power: float = setting(
        0.5, "rates follow these tokens to this power", low=0, high=1, only_with="TRAIN_BATCH_SCHEDULE=*")
    grad_accum_steps: int = setting(
        0, "micro-batches per rank and step; 0: the fewest that fit with ranks x micro-batches >= 8; another "
        "size cuts other documents, so that losses differ slightly", low=0)
    eval_include_tail: bool = setting(True, "1: score every validation token; 0: whole windows, as #2135")

    # Run
    seed: int = setting(1337, "seed of the initial weights; the data's order is fixed", low=0, group="Run")
    run_id: str = setting("", "name of log and record; empty: date, time and process id", pattern=r"[\w.-]*",
                          form="letters, digits and ._- alone")
    artifact_dir: str = setting("", "folder for artifact, log and record; empty: . and ./logs")
    iterations: int = setting(20000, "most optimizer steps; the measure of progress without a cap", low=1)
    max_wallclock_seconds: float = setting(600.0, "training time; 0: no cap", unit="s", low=0)
    force_stop_step: int = setting(0, "stop after this step, with schedules as if training went on", low=0)
    train_log_every: int = setting(500, "steps between log lines after the first five; 0: none", low=0)
    val_loss_every: int = setting(0, "steps between validations, off the clock; 0: none", low=0)
    ttt_eval_only: bool = setting(False, "1: no training; load the saved artifact and score it")
    quantize_only: bool = setting(False, "1: no training; quantize the checkpoint that an earlier run saved",
                                  only_with="TTT_EVAL_ONLY=0")
    prequant_only: bool = setting(False, "1: stop after the evaluation of the averaged weights",
                                  only_with="TTT_EVAL_ONLY=0")
    attention: str = setting("auto", "FlashAttention 4, PyTorch's or plain code; auto: the first there is",
                             choices=("auto", "fa4", "torch", "reference"))
    recorded_passes: bool = setting(True, "1: training on CUDA replays CUDA graphs, captured in the warm-up")
    fp8: str = setting("auto", "1: products with weights in 8-bit floats (E4M3) in training; auto: on Hopper",
                       choices=("auto", "0", "1"))
    recipe: str = setting("", "set by run.sh: whose settings these are, unless the track says which differ",
                          pattern=r"[\w.-]*", form="the name of a file recipes/*.env")
    rank: int = setting(-1, "set by torchrun", low=-1)
    local_rank: int = setting(0, "set by torchrun: index of this rank's device", low=0)
    world_size: int = setting(1, "set by torchrun", low=1)

    # Model
    num_layers: int = setting(11, "distinct transformer blocks", low=1, group="Model")
    model_dim: int = setting(512, "width of the residual stream", low=1)
    num_heads: int = setting(4, "query heads", low=1)
    num_kv_heads: int = setting(2, "key/value heads", low=1)
    mlp_mult: float = setting(4.0, "MLP hidden width over MODEL_DIM", above=0)
    leaky_relu_sq_slope: float = setting(0.5, "s of the activation: x^2, below 0 (s x)^2", low=0, high=1)
    xsa_last_n: int = setting(11, "how many of the last blocks use exclusive self-attention (XSA)", low=0)
    logit_softcap: float = setting(30.0, "logits become c tanh(logits / c)", above=0)
    asym_logit_rescale: bool = setting(True, "1: a learned cap for each sign, starting at LOGIT_SOFTCAP")
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding", above=0)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", above=1)
    rope_dims: int = setting(16, "leading dimensions of each head that are rotated; 0: all", low=0)
    ln_scale: bool = setting(True, "1: scale a block's normalized inputs by 1/sqrt(block index + 1)")
    qk_gain_init: float = setting(5.0, "initial learned gain on each head's normalized queries", above=0)
    num_loops: int = setting(2, "extra visits of blocks LOOP_START..LOOP_END; 0: no looping", low=0)
    loop_start: int = setting(3, "first looped block", low=0)
    loop_end: int = setting(5, "last looped block", low=0)
    parallel_start_layer: int = setting(8, "from this block on the decoder has two lanes; 0: never", low=0)

    # Gates
    skip_gates_enabled: bool = setting(True, "1: blend U-Net skips by a gate; 0: add them", group="Gates")
    smear_gate_enabled: bool = setting(True, "1: add a gated share of the previous token's embedding")
    smear_gate_bos_fix: bool = setting(True, "1: never across documents; 0: across them too, #2135's leak")
    gate_window: int = setting(12, "leading channels that drive the small gates", low=1)
    sparse_attn_gate_enabled: bool = setting(True, "1: head gate sigmoid(scale W x) of those channels")
    sparse_attn_gate_scale: float = setting(0.5, "the scale in that sigmoid", above=0)
    gated_xsa: bool = setting(False, "1: scale XSA by a learned tanh(alpha) per head, 0 at first; 0: by 1")

    # Optimizer
    matrix_lr: float = setting(0.028, "Muon learning rate of the weight banks", low=0, group="Optimizer")
    scalar_lr: float = setting(0.02, "AdamW learning rate of vectors, scalars and gates", low=0)
    tied_embed_lr: float = setting(0.03, "AdamW learning rate of the embedding", low=0)
    softcap_lr: float = setting(0.02, "AdamW learning rate of the two caps; 0: frozen, as published", low=0)
    muon_momentum: float = setting(0.97, "final Nesterov momentum of Muon", low=0, below=1)
    muon_backend_steps: int = setting(5, "Polar Express iterations", low=1, high=5)
    muon_row_normalize: bool = setting(True, "1: unit rows before these iterations")
    muon_wd: float = setting(0.095, "decoupled weight decay of the banks", low=0)
    skylight_norm_ema: bool = setting(False, "1: NorMuon: an update's rows over their running mean square",
                                      alias="SKYLIGHT_MUON")
    skylight_norm_beta2: float = setting(0.95, "coefficient of that mean", low=0, below=1,
                                         alias="BETA2_NORMUON", only_with="SKYLIGHT_NORM_EMA=1")
    skylight_norm_eps: float = setting(1e-7, "added to it before the square root", above=0,
                                       only_with="SKYLIGHT_NORM_EMA=1")
    skylight_uw_floor: bool = setting(False, "1: an update has SKYLIGHT_UW_RATIO x its matrix's norm or more",
                                      alias="SKYLIGHT_MUON")
    skylight_uw_ratio: float = setting(0.35, "that ratio, before the learning rate", above=0,
                                       alias="UW_FLOOR", only_with="SKYLIGHT_UW_FLOOR=1")
    beta1: float = setting(0.9, "AdamW first-moment coefficient", low=0, below=1)
    beta2: float = setting(0.99, "AdamW second-moment coefficient", low=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW epsilon", above=0)
    adam_wd: float = setting(0.02, "weight decay of vectors, scalars and gates", low=0)
    adam_wd_mode: str = setting("active", "active: what has had a gradient decays; zero: all, as published",
                                choices=("active", "zero"))
    embed_wd: float = setting(0.085, "weight decay of the embedding", low=0)
    grad_clip_norm: float = setting(0.3, "bound on the global norm of the averaged gradient; 0: none", low=0)
    ema_decay: float = setting(0.9965, "of the average of the weights, a step; 0: the last weights", low=0,
                               below=1, implies="EMA_SHARE=0.0", only_with="EMA_SHARE=0.0")
    ema_share: float = setting(0.0, "progress in which it keeps 1/e of a step; 0: EMA_DECAY", low=0, high=1)

    # Schedule: progress is training time / cap, or steps / ITERATIONS without a cap
    train_seq_len: int = setting(2048, "documents are cut to pieces of this length", unit="tokens", low=1,
                                 group="Schedule")
    train_seq_schedule: str = setting("", "or in stages: length@end, the longest TRAIN_SEQ_LEN", **STAGES)
    seq_change_warmup_steps: int = setting(
        0, "steps over which rates rise again after such a change", low=0,
        only_with="TRAIN_SEQ_SCHEDULE=* SEQ_CHANGE_WARMUP_SHARE=0.0")
    seq_change_warmup_share: float = setting(
        0.0, "or the progress over which they do", low=0, high=1, only_with="TRAIN_SEQ_SCHEDULE=*")
    warmup_steps: int = setting(3, "throw-away steps that compile everything before the clock starts", low=0)
    warmdown_frac: float = setting(0.85, "last fraction of progress, over which rates fall", low=0, high=1)
    min_lr: float = setting(0.1, "floor of the learning-rate multiplier", low=0, high=1)
    enable_looping_at: float = setting(0.35, "progress at which looping starts", low=0, high=1)
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum of the first step", low=0, below=1)
    muon_momentum_warmup_steps: int = setting(
        1500, "steps until MUON_MOMENTUM is reached", low=0, implies="MUON_MOMENTUM_WARMUP_SHARE=0.0",
        only_with="MUON_MOMENTUM_WARMUP_SHARE=0.0")
    muon_momentum_warmup_share: float = setting(0.0, "or the progress at which it is", low=0, high=1)
    gptq_reserve_seconds: float = setting(
        0.5, "at the cap's end, for calibration; its measured estimate if that is longer", unit="s", low=0)

    # Artifact
    matrix_bits: int = setting(6, "bits of attention and MLP matrices", unit="bits", low=2, high=8,
                               implies=SIGMA, only_with=SIGMA, group="Artifact")
    embed_bits: int = setting(7, "bits of the embedding", unit="bits", low=2, high=8,
                              implies=SIGMA, only_with=SIGMA)
    attn_clip_sigmas: float = setting(13.0, "clip of attention matrices, in deviations of the row", above=0,
                                      implies=SIGMA, only_with=SIGMA)
    mlp_clip_sigmas: float = setting(11.5, "clip of MLP matrices", above=0, implies=SIGMA, only_with=SIGMA)
    embed_clip_sigmas: float = setting(14.0, "clip of the embedding", above=0, implies=SIGMA, only_with=SIGMA)
    step_rule: str = setting(
        "loss", "loss: equal predicted loss per weight, scaled to fill TARGET_BYTES, on a trellis; sigma: by "
        "*_BITS and *_CLIP_SIGMAS, as published; naming one of these chooses it", choices=("loss", "sigma"))
    target_bytes: int = setting(15_998_000, "artifact and code", unit="bytes", low=1, high=15_999_999,
                                only_with="STEP_RULE=loss")
    gptq_calibration_batches: int = setting(
        32, "text for the Hessians, in eighths of TRAIN_BATCH_TOKENS; 0: no error feedback", low=0)
    gated_attn_quant_gate: bool = setting(False, "1: head gates as int8 rows; 0: as float16",
                                          only_with="SPARSE_ATTN_GATE_ENABLED=1")
    awq_lite_enabled: bool = setting(False, "1: some groups of columns get AWQ_LITE_BITS",
                                     implies=SIGMA, only_with=SIGMA)
    awq_lite_bits: int = setting(8, "bits of those groups", unit="bits", low=2, high=8)
    awq_lite_group_top_k: int = setting(1, "how many groups at most, over all matrices", low=0)
    awq_lite_group_size: int = setting(64, "columns of a group", low=1)
    lqer_enabled: bool = setting(False, "1: low-rank correction of the matrices that need it most",
                                 implies=SIGMA, only_with=SIGMA)
    lqer_rank: int = setting(4, "rank of a correction", low=1, high=64)
    lqer_top_k: int = setting(3, "how many matrices at most", low=0)
    lqer_asym_group: int = setting(64, "values of the right factor that share a scale", low=1)
    compressor: str = setting("entropy", "codes the integers", choices=("entropy", "pergroup", "brotli"))

    # Evaluation
    eval_seq_len: int = setting(2560, "longest context", unit="tokens", low=1, group="Evaluation")
    eval_stride: int = setting(0, "0: disjoint windows; else they advance by this and score only what is new",
                               unit="tokens", low=0)
    val_batch_tokens: int = setting(524288, "one eighth of it is one packed batch", unit="tokens", low=8)
    val_doc_fraction: float = setting(1.0, "share of the documents in TTT, drawn by SEED; below 1: no record",
                                      above=0, high=1, only_with="TTT_ENABLED=1")

    # Test-time training (TTT): every chunk is scored, then its document's adapters are trained on it
    ttt_enabled: bool = setting(True, "1: score once more, adapting to what has been scored",
                                group="Test-time training")
    ttt_context: str = setting(
        "cache", "the text before a chunk: cache: keys and values as they were when scored; recompute: "
        "computed again with the newest adapters", choices=("cache", "recompute"))
    ttt_order: str = setting(
        "stream", "stream: documents in order, each in the first free slot; length: the longest first, hints "
        "in the text's order, as published, for which no decoder exists", choices=("stream", "length"))
    ttt_batch_size: int = setting(64, "an eighth of the slots, a document in each; 0: one slot", low=0)
    ttt_chunk_size: int = setting(48, "scored before each update", unit="tokens", low=1)
    ttt_chunk_growth: float = setting(
        0.03125, "chunks grow to this share of the text before them, in whole TTT_CHUNK_SIZE", low=0, high=1)
    ttt_chunk_max: int = setting(96, "largest chunk then", unit="tokens", low=1)
    ttt_far_growth: float = setting(
        0.0, "or of what follows a document's first 20,000 tokens, up to TTT_EVAL_SEQ_LEN / 4", low=0, high=1)
    ttt_eval_seq_len: int = setting(3072, "longest context, chunk included", unit="tokens", low=1)
    ttt_micro_batch_tokens: int = setting(32768, "inputs of one forward pass at most", unit="tokens", low=1)
    ttt_lora_rank: int = setting(32, "rank of an adapter", low=1)
    ttt_lora_alpha: float = setting(144.0, "an adapter's output is scaled by this / rank", low=0)
    ttt_mask: str = setting(
        "", "turns TTT_Q_LORA, TTT_V_LORA or both off where they are not set",
        choices={"": "", "all": "", "baseline_all": "", "no_q": "TTT_Q_LORA=0", "no_v": "TTT_V_LORA=0",
                 "no_qv": "TTT_Q_LORA=0 TTT_V_LORA=0"})
    ttt_q_lora: bool = setting(True, "1: adapters on queries")
    ttt_k_lora: bool = setting(False, "1: adapters on keys")
    ttt_v_lora: bool = setting(True, "1: adapters on values")
    ttt_o_lora: bool = setting(True, "1: adapters from the block input to the attention output")
    ttt_mlp_lora: bool = setting(True, "1: adapters parallel to the MLPs; the head always has one")
    ttt_warm_start_a: bool = setting(True, "1: a new document keeps its slot's A; 0: it draws its own")
    ttt_lora_lr: float = setting(
        1.2e-4, "AdamW learning rate of the adapters, times chunk length / the first chunk's", low=0)
    ttt_local_lr_mult: float = setting(1.0, "factor on that rate", low=0)
    ttt_weight_decay: float = setting(2.0, "AdamW weight decay of the adapters", low=0)
    ttt_beta2: float = setting(0.99, "AdamW second-moment coefficient of the adapters", low=0, below=1)
    ttt_short_score_first_enabled: bool = setting(
        False, "1: chunks by a document's length", implies="TTT_ORDER=length", only_with="TTT_ORDER=length")
    ttt_short_score_first_steps: str = setting(
        "", "then: length:chunk pairs, lengths with both BOS; the first that is not exceeded counts",
        pattern=list_of(r"[1-9]\d*[:=][1-9]\d*"), form="a list like 256:16,2000:32")

    # Global phases of test-time training: all weights are trained on documents that are completely scored
    phased_ttt_prefix_docs: int = setting(2500, "documents scored before the last phase; 0: no phase", low=0,
                                          group="Global test-time training")
    phased_ttt_num_phases: int = setting(1, "phases, at equal parts of that count", low=1)
    global_ttt_lr: float = setting(0.001, "SGD learning rate at a phase's start; a cosine to 0", low=0)
    global_ttt_momentum: float = setting(0.9, "SGD momentum", low=0, below=1)
    global_ttt_chunk_tokens: int = setting(32768, "one step, over all ranks", unit="tokens", low=1)
    global_ttt_grad_clip: float = setting(1.0, "bound on the gradient's global norm; 0: none", low=0)

    # N-gram tilt of the scores of test-time training
    ngram_tilt_enabled: bool = setting(True, "1: tilt toward what has followed the last tokens most often",
                                       group="N-gram tilt")
    ngram_boost: str = setting(
        "learned", "fixed: one hint, by TOKEN_BOOST, as published; learned: a hint of every order, by a "
        "logistic mixture of the model's probability and the hit rates so far, fitted while scoring",
        choices={"fixed": "TTT_ORDER=length", "learned": ""})
    token_order: int = setting(33, "the context is one token less", unit="tokens", low=2, high=256)
    token_backoff: str = setting(
        "16,9,6", "further orders, which hint too; empty: none", pattern=list_of(r"\d{1,3}"),
        form="a list of falling orders like 16,9,6", only_with="NGRAM_BOOST=learned")
    document_orders: str = setting(
        "5,3", "orders of contexts counted in the document alone; empty: none", pattern=list_of(r"\d{1,3}"),
        form="a list of falling orders like 5,3", only_with="NGRAM_BOOST=learned")
    ngram_table_bits: int = setting(
        28, "2^this contexts of the whole text are kept, 8 bytes each", low=2, high=32)
    token_threshold: float = setting(0.8, "least share of a hint among its context's continuations", low=0,
                                     high=1, only_with="NGRAM_BOOST=fixed")
    token_boost: float = setting(2.625, "boost of a hint", unit="nats", low=0, high=50,
                                 only_with="NGRAM_BOOST=fixed")

    def conflicts(self):
        s = self
        yield s.world_size == 1 or s.rank >= 0, "WORLD_SIZE", "needs RANK; launch with torchrun"
        yield s.rank < s.world_size, "RANK", f"is not below WORLD_SIZE={s.world_size}; launch with torchrun"
        yield (s.accumulation, "TRAIN_BATCH_TOKENS",
               f"does not split evenly over WORLD_SIZE={s.world_size} ranks; choose another GRAD_ACCUM_STEPS")
        yield s.model_dim % s.num_heads == 0, "NUM_HEADS", f"does not divide MODEL_DIM={s.model_dim}"
        yield s.num_heads % s.num_kv_heads == 0, "NUM_KV_HEADS", f"does not divide NUM_HEADS={s.num_heads}"
        yield (s.rotary_dims % 2 == 0 and s.rotary_dims <= s.head_dim, "ROPE_DIMS",
               f"is not even or above the head width {s.head_dim}")
        yield (s.model_dim * s.mlp_mult) % 1 == 0, "MLP_MULT", f"x MODEL_DIM={s.model_dim} is not whole"
        yield s.gate_window <= s.model_dim, "GATE_WINDOW", f"is above MODEL_DIM={s.model_dim}"
        yield s.xsa_last_n <= s.num_layers, "XSA_LAST_N", f"is above NUM_LAYERS={s.num_layers}"
        yield (not s.num_loops or s.loop_start <= s.loop_end < s.num_layers, "LOOP_END",
               f"is not from LOOP_START={s.loop_start} to below NUM_LAYERS={s.num_layers}")
        # The lanes begin after every block that the encoder or a loop visits.
        first_lane = s.num_layers // 2
        if s.num_loops:
            first_lane = max(first_lane, s.loop_end + 1)
        yield (not s.parallel_start_layer or s.parallel_start_layer >= first_lane, "PARALLEL_START_LAYER",
               f"must come after the encoder and LOOP_END, from {first_lane} on")
        yield (s.parallel_start_layer < s.num_layers, "PARALLEL_START_LAYER",
               f"is not below NUM_LAYERS={s.num_layers}")
        for name, stages in ("TRAIN_BATCH", s.batch_stages), ("TRAIN_SEQ", s.context_stages):
            yield len({end for _, end in stages}) == len(stages), f"{name}_SCHEDULE", "has an end twice"
        for n, _ in s.batch_stages:
            even = not s.accumulation or s.world_size * math.prod(s.split_step(n)) == n
            yield even, "TRAIN_BATCH_SCHEDULE", f"has {n}, not to be split evenly into micro-batches"
        yield (max(s.context_stages)[0] == s.train_seq_len, "TRAIN_SEQ_LEN",
               f"is not the longest length of TRAIN_SEQ_SCHEDULE={s.train_seq_schedule}; make them equal")
        yield (not s.max_wallclock_seconds or s.max_wallclock_seconds > s.gptq_reserve_seconds,
               "GPTQ_RESERVE_SECONDS", f"leaves nothing of MAX_WALLCLOCK_SECONDS={s.max_wallclock_seconds}")
        yield (s.gptq_calibration_batches or s.step_rule == "sigma", "GPTQ_CALIBRATION_BATCHES",
               "is too few for STEP_RULE=loss, which needs calibration")
        enough = s.train_batch_tokens >= 8 or not (s.gptq_calibration_batches and s.accumulation)
        yield enough, "TRAIN_BATCH_TOKENS", "is too few for calibration, which takes eighths; make it 8"
        yield (not s.awq_lite_enabled or s.awq_lite_bits > min(s.matrix_bits, s.embed_bits), "AWQ_LITE_BITS",
               "is above neither MATRIX_BITS nor EMBED_BITS; raise it")
        lqer_values = s.lqer_rank * math.gcd(s.model_dim, s.mlp_dim)
        yield (not s.lqer_enabled or lqer_values % s.lqer_asym_group == 0, "LQER_ASYM_GROUP",
               f"does not divide LQER_RANK={s.lqer_rank} x the matrices' columns")
        yield (not s.lqer_enabled or s.lqer_rank <= s.kv_dim, "LQER_RANK",
               f"is above {s.kv_dim}, the rows of the key and value matrices")
        yield s.eval_batch_tokens >= s.eval_seq_len, "VAL_BATCH_TOKENS", "is below 8 x EVAL_SEQ_LEN; raise it"
        yield s.eval_stride <= s.eval_seq_len, "EVAL_STRIDE", f"is above EVAL_SEQ_LEN={s.eval_seq_len}"
        chunks = [s.ttt_chunk_size]
        if s.ttt_chunk_growth:
            chunks.append(s.ttt_chunk_max)
        if s.ttt_short_score_first_enabled:
            chunks += s.short_chunks.values()
        yield (s.ttt_eval_seq_len >= max(chunks), "TTT_EVAL_SEQ_LEN",
               f"is below the largest chunk, {max(chunks)}")
        yield (s.short_chunks or not s.ttt_short_score_first_enabled, "TTT_SHORT_SCORE_FIRST_ENABLED",
               "needs TTT_SHORT_SCORE_FIRST_STEPS, a list like 256:16,2000:32")
        for name, below in (("TOKEN_BACKOFF", s.token_order), ("DOCUMENT_ORDERS", 257)):
            text = getattr(s, name.lower())
            falling = all(a > b > 1 for a, b in itertools.pairwise([below, *list_orders(text)]))
            yield (falling or text == getattr(Settings, name.lower()), name,
                   f"is not a list of falling orders from below {below} to 2 or more")
        yield s.experts <= 16, "DOCUMENT_ORDERS", "and TOKEN_BACKOFF make more than 16 experts"
        yield (s.ngram_boost == "learned" or s.ttt_order == "length" or not s.ngram_tilt_enabled, "TTT_ORDER",
               "has no hints with NGRAM_BOOST=fixed, which counts them in the text's order; set length")

    # Derived values; none of them is a setting of its own.

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step, 0 if none fits. Published systems: ranks x micro-batches is 8."""
        candidates = [self.grad_accum_steps] if self.grad_accum_steps else range(-(-8 // self.world_size), 65)
        return next((a for a in candidates if self.train_batch_tokens % (self.world_size * a) == 0), 0)

    @property
    def micro_batch_tokens(self) -> int:
        return self.train_batch_tokens // (self.world_size * self.accumulation)

    def split_step(self, tokens: int) -> tuple[int, int]:
        """(micro-batches per rank, tokens of each) of a step: as few as keep to `micro_batch_tokens`."""
        count = math.ceil(tokens / (self.world_size * self.micro_batch_tokens))
        return count, tokens // (self.world_size * count)

    @property
    def eval_batch_tokens(self) -> int:
        return self.val_batch_tokens // 8

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def attention_shape(self) -> tuple[int, ...]:
        return self.train_seq_len, self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def rotary_dims(self) -> int:
        return self.rope_dims or self.head_dim

    @property
    def loops_at_end(self) -> bool:
        return self.num_loops > 0 and self.enable_looping_at < 1

    @property
    def context_stages(self) -> list[tuple[int, float]]:
        """(length at which documents are cut, progress until which it holds), in order of progress."""
        return parse_stages(self.train_seq_schedule or f"{self.train_seq_len}@1")

    @property
    def batch_stages(self) -> list[tuple[int, float]]:
        """(tokens of a step, progress until which they hold), in order of progress."""
        return parse_stages(self.train_batch_schedule or f"{self.train_batch_tokens}@1")

    @functools.cached_property
    def short_chunks(self) -> dict[int, int]:
        """Chunk sizes by the length, both BOS counted, up to which they hold, shortest first."""
        pairs = re.findall(r"(\d+)[:=](\d+)", self.ttt_short_score_first_steps)
        return dict(sorted((int(length), int(size)) for length, size in pairs))

    def first_chunk(self, length: int) -> int:
        """Size of a document's first chunk; its `length` is in targets."""
        if self.ttt_short_score_first_enabled:
            for limit, size in self.short_chunks.items():
                if length < limit:
                    return size
        return self.ttt_chunk_size

    @property
    def calibration_len(self) -> int:
        """Tokens of a window of calibration; the published quantizers take training's."""
        return self.train_seq_len if self.step_rule == "sigma" else self.eval_seq_len

    @property
    def ttt_slots(self) -> int:
        return max(1, 8 * self.ttt_batch_size)

    @property
    def expert_orders(self) -> tuple[list[int], list[int]]:
        """The orders of the tilt's contexts: those counted in the whole text, and in the document alone."""
        if self.ngram_boost == "fixed":
            return [self.token_order], []
        shorter = [order for order in list_orders(self.token_backoff) if order < self.token_order]
        return [self.token_order, *shorter], list_orders(self.document_orders)

    @property
    def experts(self) -> int:
        return sum(map(len, self.expert_orders))

    @property
    def shards_dir(self) -> str:
        return self.data_path or os.path.join(self.data_dir, PUBLISHED_SET)

    @property
    def log_dir(self) -> str:
        return self.artifact_dir or "logs"

    @property
    def artifact_path(self) -> str:
        return os.path.join(self.artifact_dir, "final_model.int6.ptz")

    @property
    def checkpoint_path(self) -> str:
        return os.path.join(self.artifact_dir, "final_model.fp32.ptz")

    def function_settings(self) -> dict:
        """The settings that decide what function a set of weights computes; they travel in the artifact."""
        names = {field.name for group in ("Model", "Gates") for field in fields_by_group(Settings)[group]}
        names -= {"tied_embed_init_std", "qk_gain_init"}  # where training starts
        return {name: getattr(self, name) for name in sorted(names | {"vocab_size"})}


def list_orders(text: str) -> list[int]:
    return [int(order) for order in re.findall(r"\d+", text)]


def visit_order(s: Settings, looping: bool) -> tuple[list[int], list[int]]:
    """The blocks in the order in which encoder and decoder visit them."""
    order = list(range(s.num_layers))
    if looping:
        order[s.loop_start:s.loop_end + 1] *= s.num_loops + 1
    return order[:len(order) // 2], order[len(order) // 2:]


# ============================================================================================================
# 2. Runtime
# ============================================================================================================

# torch 2.13 wants reduce_scatter_tensor and all_gather_into_tensor under new names, which 2.11 does not have.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", category=FutureWarning)


# What ends a run in one line; any other exception is a fault of this program and shows its traceback.
BAD_INPUT = (InputError, KernelError, ngram.NgramError)


@dataclass(frozen=True)
class Runtime:
    """This process's place in the run: its rank, the number of ranks, its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextmanager
    def start(cls, settings: Settings):
        """Join torchrun's process group (NCCL for CUDA, Gloo for host tensors); leave it at the end."""
        on_cuda = torch.cuda.is_available()
        device = torch.device("cuda", settings.local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            if settings.local_rank >= torch.cuda.device_count():
                raise InputError(f"LOCAL_RANK: rank {settings.local_rank} has no GPU, the machine shows "
                                 f"{torch.cuda.device_count()}; lower --nproc_per_node")
            torch.cuda.set_device(device)
            # The default, a thread per core, makes the ranks of a large host slow each other down.
            torch.set_num_threads(min(8, torch.get_num_threads()))
        else:
            limit_memory()
        distributed = settings.world_size > 1
        if distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                                    timeout=datetime.timedelta(minutes=30),
                                    device_id=device if on_cuda else None)
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
        """Rank 0's numbers on every rank. They travel between hosts, so no rank waits for its device."""
        if self.world_size == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, src=0)
        return message.tolist()

    def gather(self, value) -> list:
        """Every rank's value, a plain Python object, in the order of the ranks."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, *stages: Callable) -> list:
        """The results of what every rank does by itself; InputError, on all, with what stops any of them."""
        results, faults = [], []
        for stage in stages:
            try:
                results.append(stage())
            except (*BAD_INPUT, OSError) as error:
                faults += str(error).splitlines()
        everyone = self.gather(faults)
        shared = set(faults).intersection(*everyone)
        lines = [line if line in shared else f"rank {rank}: {line}"
                 for rank, found in enumerate(everyone) for line in found]
        if lines:
            raise InputError("\n".join(dict.fromkeys(lines)))
        return results

    @torch.no_grad()
    def broadcast(self, tensors) -> None:
        """Overwrite every rank's tensors with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def upload(self, values: list[float]) -> Tensor:
        """A few numbers as a float32 device tensor, copied without waiting for the device."""
        return self.to_device(torch.tensor(values, dtype=torch.float32))

    def to_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device. The copy is asynchronous, which it can be only from pinned memory."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.on_cuda else tensor

    def describe(self) -> dict:
        """The machine, for the run record."""
        name = torch.cuda.get_device_name(self.device) if self.on_cuda else f"{platform.machine()} CPU"
        return dict(device=name, devices=self.world_size, python=platform.python_version(),
                    torch=torch.__version__, cuda=torch.version.cuda or "none", cores=os.cpu_count(),
                    load=round(os.getloadavg()[0], 2))  # what else the machine was doing


class RunLog(EventLog):
    """The log `<run_id>.txt` and run record `<run_id>.json` in Settings.log_dir, which rank 0 writes."""

    def __init__(self, settings: Settings, runtime: Runtime):
        now = datetime.datetime.now().astimezone()
        run_id = settings.run_id or f"{now:%Y%m%d_%H%M%S}_{os.getpid()}"
        record = dict(run_id=run_id, status="running", started=now.isoformat(timespec="seconds"),
                      settings=dataclasses.asdict(settings), machine=runtime.describe(), results={},
                      events=[])
        super().__init__(os.path.join(settings.log_dir, run_id), record, runtime.rank == 0)
        if self.active:
            self.begin(hold(settings.artifact_dir or ".", "ARTIFACT_DIR", shared=settings.ttt_eval_only))


# ============================================================================================================
# 3. Data
# ============================================================================================================

# Shards of the public FineWeb sets: 256 int32 (magic, version, count, unused), then `count` uint16 values.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
TEXT_BYTES = "fineweb_val_bytes_*.bin, their sum"


def open_shard(path: str) -> np.ndarray:
    """The uint16 values of one shard, memory-mapped. Raises InputError if header and size disagree."""
    try:
        header = np.fromfile(path, dtype="<i4", count=3)
        size = os.path.getsize(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the data again") from None
    if len(header) < 3 or header[2] < 1 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path}: not a token shard (wrong magic or version, or empty); "
                         "use prepare_caseops_data.py")
    count = int(header[2])
    if size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(f"{path}: its header promises {count} values but it has {size} bytes; it is "
                         "truncated, prepare or download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def shard_files(folder: str, kind: str) -> list[str]:
    """The shards `fineweb_<kind>_<number>.bin` of a folder, in order. Raises InputError if there is none."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), f"fineweb_{kind}_[0-9]*.bin")))
    if not files:
        others = glob.glob(os.path.join(glob.escape(folder), "fineweb_*.bin"))
        wanted = f"fineweb_{kind}_*.bin" if others else "fineweb_*.bin"
        raise InputError(f"DATA_PATH: no {wanted} in {folder}; run prepare_caseops_data.py or set DATA_PATH")
    return files


def check_tokens(path: str, tokens: np.ndarray, settings: Settings, begins: bool = False) -> None:
    """Raise InputError if the tokens, of this file, do not all have a row in the embedding, or if a text that
    begins with them does not begin with a document: it could not be decoded."""
    if begins and tokens[0] != BOS_ID:
        raise InputError(f"{path}: it begins with token {tokens[0]}, not with a document's start ({BOS_ID}); "
                         "begin with the set's first shard, made with this tokenizer")
    largest = int(tokens.max(initial=0))
    if largest >= settings.vocab_size:
        raise InputError(f"{path}: token {largest} does not fit VOCAB_SIZE={settings.vocab_size}; set "
                         "VOCAB_SIZE to the tokenizer's")


def check_shards(settings: Settings, stated: dict[str, int]) -> None:
    """Raise InputError unless names and tokens of the shards, and the text's bytes, are as stated."""
    folder = settings.shards_dir
    kinds = ["val", "val_bytes"] if settings.ttt_eval_only else ["val", "val_bytes", "train"]
    paths = [path for kind in kinds for path in shard_files(folder, kind)]
    found = {os.path.basename(path): len(open_shard(path)) for path in paths}
    sidecar = shard_files(folder, "val_bytes")
    found[TEXT_BYTES] = sum(int(open_shard(path).sum(dtype=np.int64)) for path in sidecar)
    stated = {name: count for name, count in stated.items() if name.split("_")[1] in kinds}
    differing = sorted({name for name, _ in found.items() ^ stated.items()})
    if differing:
        name = differing[0]
        raise InputError(f"{folder}/{name}: {found.get(name, 'missing')}, but manifest.json says "
                         f"{stated.get(name, 'nothing of it')}, one of {len(differing)} differences; put "
                         "back the shards of this data set, and no others")


def check_manifest(settings: Settings) -> dict:
    """Compare settings and shards with the data set's manifest.json; returns what the record says of it.

    A data set may have none. Raises InputError if it is broken, if it belongs to another vocabulary or other
    shards, and if training and validation share documents.
    """
    path = os.path.join(settings.shards_dir, "manifest.json")
    if not os.path.exists(path):
        return dict(manifest="none")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        pieces = manifest["tokenizer"]["vocab_size"]
        disjoint = manifest["splits_disjoint"]
        prepared_here = manifest["source"]["sha256"] is not None
        stated = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
        stated[TEXT_BYTES] = manifest["splits"]["val"]["bytes"]
        facts = dict(manifest=path, train_docs=manifest["splits"]["train"]["docs"],
                     val_docs=manifest["splits"]["val"]["docs"], splits_disjoint=disjoint)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no manifest of prepare_caseops_data.py; prepare the data again") from None
    if pieces != settings.vocab_size:
        raise InputError(f"VOCAB_SIZE: {settings.vocab_size}, but {path} was made with a tokenizer of "
                         f"{pieces} pieces; set VOCAB_SIZE to that")
    check_shards(settings, stated)
    # The published sets do overlap and cannot be prepared again: there the record says so.
    if prepared_here and not disjoint:
        raise InputError(f"{path}: training and validation documents overlap; prepare the data again")
    return facts


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """Positions at which documents begin. The first token begins one, whether it is BOS or not."""
    return np.unique(np.concatenate(([0], np.flatnonzero(tokens == BOS_ID))))


def segment_bounds(starts: np.ndarray, total: int, max_seqlen: int) -> np.ndarray:
    """Boundaries 0 .. total of the segments that begin at `starts`, none longer than `max_seqlen`."""
    bounds = np.unique(np.concatenate(([0], starts, [total])))
    pieces = [np.arange(start, end, max_seqlen) for start, end in zip(bounds, bounds[1:])]
    return np.concatenate(pieces + [[total]]).astype(np.int32)


def make_segments(bounds: np.ndarray, max_seqlen: int) -> Segments:
    """Segments on the host from their boundaries (int32, 0 .. T)."""
    positions = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], np.diff(bounds))
    return Segments(torch.from_numpy(bounds), torch.from_numpy(positions), max_seqlen)


class Batch(NamedTuple):
    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    segments: Segments

    def to(self, runtime: Runtime) -> Batch:
        """The batch on the device."""
        cu_seqlens = runtime.to_device(self.segments.cu_seqlens)
        positions = runtime.to_device(self.segments.positions)
        segments = self.segments._replace(cu_seqlens=cu_seqlens, positions=positions)
        if segments.previous is not None:
            segments = segments._replace(previous=runtime.to_device(segments.previous))
        return Batch(runtime.to_device(self.inputs), runtime.to_device(self.targets), segments)


def make_batch(inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray, max_seqlen: int,
               before: np.ndarray | None = None) -> Batch:
    """A packed row (T,) on the host whose segments begin at `starts`, none longer than `max_seqlen`; before:
    the token before each, -1 if none, where that is not the left one."""
    segments = make_segments(segment_bounds(starts, len(inputs), max_seqlen), max_seqlen)
    if before is not None:
        segments = segments._replace(previous=torch.from_numpy(before))
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), segments)


class TrainingData:
    """The training shards as one endless stream of tokens, dealt out to steps, micro-batches and ranks.

    Micro-batch m of rank r follows from its step's first token and size, m and r alone; a step holds the same
    for every number of ranks. Documents continue across shard borders; the first shard follows the last.
    """

    SAMPLE = 1_000_000  # tokens of each shard that are checked at once; `read` checks what is used

    def __init__(self, settings: Settings, runtime: Runtime):
        self.settings, self.runtime = settings, runtime
        self.files = shard_files(settings.shards_dir, "train")
        self.shards = [open_shard(path) for path in self.files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])
        if self.total < settings.micro_batch_tokens + 1:
            raise InputError(f"TRAIN_BATCH_TOKENS: the shards in {settings.shards_dir} hold only "
                             f"{self.total} tokens; one micro-batch is {settings.micro_batch_tokens}")
        # Data of another tokenizer shows at once, not when training has come to it.
        for path, shard in zip(self.files, self.shards):
            check_tokens(path, shard[:self.SAMPLE], settings, begins=path == self.files[0])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the endless stream, int64."""
        pieces = []
        while count > 0:
            start %= self.total
            index = int(np.searchsorted(self.ends, start, side="right"))
            shard = self.shards[index]
            offset = start - (int(self.ends[index]) - len(shard))
            piece = shard[offset:offset + count]
            check_tokens(self.files[index], piece, self.settings)
            pieces.append(piece.astype(np.int64))
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def batch(self, start: int, length: int, max_seqlen: int) -> Batch:
        """`length` tokens from position `start` on, on the host, documents cut to `max_seqlen` tokens."""
        tokens = self.read(start, length + 1)  # one more: the last input's target
        starts = np.flatnonzero(tokens[:-1] == BOS_ID)
        return make_batch(tokens[:-1].copy(), tokens[1:].copy(), starts, max_seqlen)

    def stream(self, max_seqlen: int, step_tokens: int, first: int = 0):
        """Yield this rank's micro-batches, on the device, of steps of such a size from token `first` on."""
        _, length = self.settings.split_step(step_tokens)
        starts = itertools.count(first + self.runtime.rank * length, self.runtime.world_size * length)
        order = ((start, length, max_seqlen) for start in starts)
        with closing(ahead(itertools.starmap(self.batch, order), 4)) as batches:
            for batch in batches:
                yield batch.to(self.runtime)


class ValidationData:
    """The validation stream: `tokens` (N,) and `bytes` (N,), the bytes each stands for; both uint16."""

    def __init__(self, settings: Settings):
        files = shard_files(settings.shards_dir, "val")
        self.tokens = np.concatenate([open_shard(path) for path in files])
        if len(self.tokens) < 2:
            raise InputError(f"{files[0]}: fewer than two validation tokens; prepare the data again")
        check_tokens(files[0], self.tokens, settings, begins=True)
        sidecar = shard_files(settings.shards_dir, "val_bytes")
        self.bytes = np.concatenate([open_shard(path) for path in sidecar])
        if len(self.bytes) != len(self.tokens):
            raise InputError(f"{sidecar[0]}: the byte sidecar has {len(self.bytes)} values for "
                             f"{len(self.tokens)} validation tokens; prepare both again")
        if not settings.eval_include_tail:  # whole windows, as the published systems score
            window = settings.eval_seq_len
            kept = (len(self.tokens) - 1) // window * window + 1
            if kept == 1:
                raise InputError(f"EVAL_INCLUDE_TAIL: {len(self.tokens)} validation tokens fill no window "
                                 f"of EVAL_SEQ_LEN={window}; set EVAL_INCLUDE_TAIL=1")
            self.tokens, self.bytes = self.tokens[:kept], self.bytes[:kept]

    def sample(self, fraction: float, seed: int) -> ValidationData:
        """That fraction of the documents that have bytes, at least one, without replacement, in order."""
        starts = document_starts(self.tokens[:-1])
        size = np.add.reduceat(np.where(self.tokens == BOS_ID, 0, self.bytes), starts, dtype=np.int64)
        count = max(1, round(fraction * np.count_nonzero(size)))
        chosen = np.random.default_rng(seed).choice(np.flatnonzero(size), count, replace=False)
        document = np.searchsorted(starts, np.arange(len(self.tokens)), side="right") - 1  # of each token
        kept = np.isin(document, chosen)
        sampled = copy.copy(self)
        sampled.tokens, sampled.bytes = self.tokens[kept], self.bytes[kept]
        return sampled


# ============================================================================================================
# 4. Model
# ============================================================================================================

class Layer(NamedTuple):
    """One block's weights, cut out of the stacks, and what a pass adds to them. Vectors are float32."""

    qkv: Matrix  # ((heads + 2 kv_heads) D, d)
    out: Matrix  # (d, d), its rows multiplied by attn_scale
    up: Matrix  # (F, d)
    down: Matrix  # (d, F), its rows multiplied by mlp_scale
    input_scale: Tensor  # ()
    resid_mix: Tensor  # (2, d): of the stream, of the embedding
    q_gain: Tensor  # (heads,)
    head_gate: Tensor | None  # (heads, GATE_WINDOW)
    xsa_alpha: Tensor | None  # (heads,)
    lane_resid: Tensor | None  # (2,); None where there is one lane
    lane_post: Tensor | None  # (2, 2): [from attention, from MLP] x [to lane 0, to lane 1]
    exclusive: bool  # whether XSA is on
    adapter: Callable | None = None  # (site, x, y, u) -> y after a product; u: the block's normalized input
    context: Callable | None = None  # (k, v) -> the same, each segment's behind those of its past


class Hooks:
    """Called during a forward pass: may observe activations, or supply a visit's adapter and context."""

    def embedding(self, ids: Tensor, x: Tensor) -> None:
        """Sees the embedding's rows x (T, d) of `ids`."""

    def block(self, visit: int, layer: int) -> dict:
        """The fields of Layer that it supplies for the pass's visit number `visit`, to block `layer`."""
        return {}


class GPT(nn.Module):
    """The language model over packed tokens: (T,) ids in, losses or logits per token out.

    Every per-layer tensor is stacked over the layers: so there are 4 banks of matrices for Muon and a dozen
    small tensors, instead of hundreds. Parameters are float32 masters; products run in `compute_dtype`.
    """

    # Uncompiled, these would read activations more than once.
    COMPILED = ("layers", "embed", "lane_update", "final_norm")

    def __init__(self, settings: Settings, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        s = self.settings = settings
        self.compute_dtype = compute_dtype
        self.attention_kernel, _ = attention_kernel(s.attention, *s.attention_shape)
        self.fp8 = s.fp8 != "0" and fp8_products_fit(  # in passes with gradients
            s.model_dim, s.kv_dim, s.mlp_dim, s.vocab_size, compute_dtype)
        self.kept_layers: list[Layer] | None = None
        n, d = s.num_layers, s.model_dim
        heads = s.num_heads

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
        self.attn_gate = parameter(n, heads, s.gate_window) if s.sparse_attn_gate_enabled else None
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
        attn_gate, xsa_alpha                    0
        skip_gates, smear_gate, smear_lambda    0
        parallel_post_lambdas / _resid_lambdas  1 / 1.1
        softcap_pos, softcap_neg                LOGIT_SOFTCAP
        """
        s, n = self.settings, self.settings.num_layers
        draw = torch.Generator().manual_seed(s.seed)
        constants = dict(
            mlp_down_bank=0, attn_scale=1, mlp_scale=1, q_gain=s.qk_gain_init, attn_gate=0, xsa_alpha=0,
            skip_weights=1, skip_gates=0, smear_gate=0, smear_lambda=0, parallel_post_lambdas=1,
            parallel_resid_lambdas=1.1, softcap_pos=s.logit_softcap, softcap_neg=s.logit_softcap)
        for name, p in self.named_parameters():
            if name in constants:
                p.fill_(constants[name])
        self.tok_emb.normal_(0, s.tied_embed_init_std, generator=draw)
        for matrix in itertools.chain(self.qo_bank[:n], self.kv_bank, self.mlp_up_bank):
            nn.init.orthogonal_(matrix, generator=draw)
        self.qo_bank[n:].zero_()
        self.resid_mix.copy_(torch.tensor([1.0, 0.0])[:, None])

    def banks(self) -> list[nn.Parameter]:
        """The stacks of matrices, (count, rows, columns) each."""
        return [self.mlp_up_bank, self.mlp_down_bank, self.qo_bank, self.kv_bank]

    def view(self, *, compiled: Runtime | None = None, fp8: bool = False, trainable: bool = True,
             keep_layers: bool = False) -> GPT:
        """The same weights, seen differently.

        compiled: torch.compile the parts that run on no kernel of ours; fp8: products run in 8 bits where FP8
        chose that. Training has both, other passes neither. trainable=False: the weights take no gradient.
        keep_layers: the stacks are cut once, now; after a change of the weights take another view.
        """
        view = copy.copy(self)
        view.fp8 = fp8 and self.fp8
        view.kept_layers = None
        for part in self.COMPILED:
            view.__dict__.pop(part, None)  # compiled for the view this one is taken from
            if compiled is not None:
                setattr(view, part, compiled.compile(getattr(view, part), fullgraph=True))
        if not trainable:
            view._parameters = {name: p if p is None else p.detach() for name, p in self._parameters.items()}
        if keep_layers:
            view.kept_layers = view.layers()
        return view

    # Where to change a block's design:
    # - A factor on a matrix's rows or columns: multiply it into the stack in layers(), as attn_scale is.
    #   So it costs nothing per token. A factor on attention's scores: multiply q_gain (layers, heads), which
    #   already is a learned factor by head, by it there; a temperature divides. No kernel changes.
    # - A vector or gate that an operation reads: a parameter in __init__ and init_weights(), a field of Layer
    #   and its line in layers(); then the operation's formula in gpt_kernels.py, the reference first.
    # - A matrix: a bank in __init__, init_weights() and banks(), a field of Layer and its line in layers(),
    #   a Role for quantization; project() multiplies by it, with the field's name as the site.
    # What is a parameter is trained (no bank: AdamW, SCALAR_LR, decay ADAM_WD toward 0), averaged and saved.
    # Settings of the groups Model and Gates travel in the artifact; a file without one has its default.

    def layers(self) -> list[Layer]:
        """Cut the stacks into layers, once per forward pass."""
        s, n = self.settings, self.settings.num_layers
        queries, outputs = self.qo_bank.split(n)
        keys, values = self.kv_bank.split(n)
        return [Layer(*fields) for fields in zip(
            self.matrices(torch.cat((queries, keys, values), 1)),
            self.matrices(self.attn_scale[:, :, None] * outputs),
            self.matrices(self.mlp_up_bank),
            self.matrices(self.mlp_scale[:, :, None] * self.mlp_down_bank),
            self.input_scales.unbind(),
            self.resid_mix.unbind(),
            self.q_gain.unbind(),
            per_layer(self.attn_gate, n),
            per_layer(self.xsa_alpha, n),
            per_layer(self.parallel_resid_lambdas, n, first=s.parallel_start_layer),
            per_layer(self.parallel_post_lambdas, n, first=s.parallel_start_layer),
            [i >= n - s.xsa_last_n for i in range(n)])]

    def matrices(self, stack: Tensor) -> list[Matrix]:
        return as_matrices(stack, self.compute_dtype, self.fp8 and torch.is_grad_enabled())

    def visits(self, looping: bool, hooks: Hooks | None) -> tuple[list[Layer], list[Layer]]:
        """The layers in the order in which encoder and decoder visit them, with what the hooks supply."""
        layers = self.kept_layers or self.layers()
        encoder, decoder = self.orders[looping]
        order = [*encoder, *decoder]
        visits = [layers[i] for i in order]
        if hooks is not None:
            visits = [w._replace(**hooks.block(visit, i)) for visit, (i, w) in enumerate(zip(order, visits))]
        return visits[:len(encoder)], visits[len(encoder):]

    def skips(self, outputs: list[Tensor]) -> list[Skip]:
        """The encoder visits' outputs on their way into the decoder, last in, first out."""
        gates = per_layer(self.skip_gates, len(self.skip_weights))
        return list(map(Skip, reversed(outputs), self.skip_weights.unbind(), gates))

    def forward(self, ids: Tensor, segments: Segments, looping: bool, hooks: Hooks | None = None) -> Tensor:
        """Final normalized hidden states (T, d) of packed ids (T,); looping: visit the looped blocks again.

        encoder visits  0 1 2 | 3 4 5 3 4       each leaves a skip
        decoder visits  5 3 4 5 6 7 | 8 9 10    all but the last take one; from block 8 on in two lanes

        This is the record model with looping; without it they are 0..4 and 5..10. A block returns x as it
        came and x0 again: gradients of later uses are added inside the backward kernel of the block's entry.
        """
        s = self.settings
        rope = rotary_tables(segments.positions, s.rotary_dims, s.rope_base)
        x = x0 = self.embed(ids, segments.positions, segments.previous, hooks)
        encoder, decoder = self.visits(looping, hooks)
        outputs = []
        for w in encoder:
            x, entry, x0 = self.block(x, x0, None, w, segments, rope)
            outputs.append(entry)
        skips = self.skips([*outputs[1:], x])  # an entry is the output of the visit before
        lanes = None
        for w, skip in itertools.zip_longest(decoder, skips):
            if w.lane_post is None:
                x, _, x0 = self.block(x, x0, skip, w, segments, rope)
            else:
                lane0, lane1 = lanes or (x, x)
                *lanes, x0 = self.two_lane_block(lane0, lane1, x0, skip, w, segments, rope)
        return self.final_norm(*(lanes or [x]))

    def embed(self, ids: Tensor, positions: Tensor, previous: Tensor | None = None,
              hooks: Hooks | None = None) -> Tensor:
        """Normalized embeddings (T, d); SmearGate adds a gated share of the previous token's."""
        s = self.settings
        x = F.embedding(ids, self.tok_emb)
        if hooks is not None:
            hooks.embedding(ids, x)
        if s.smear_gate_enabled:
            first = int(previous is None)  # a packed row's first token has no left neighbour
            keep = positions > 0 if s.smear_gate_bos_fix else torch.ones_like(positions, dtype=torch.bool)
            score = (x[first:, :s.gate_window] * self.smear_gate).sum(-1, keepdim=True)
            before = x[:-1]
            if previous is not None:
                before = F.embedding(previous.clamp(min=0), self.tok_emb)
                keep = keep & (previous >= 0)
            smear = self.smear_lambda * torch.sigmoid(score) * keep[first:, None] * before
            x = torch.cat((x[:first], x[first:] + smear))
        return norm(x).to(self.compute_dtype)

    def final_norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """RMSNorm of x (T, d), with y of the mean of both."""
        return norm(x if y is None else (x.float() + y.float()) / 2).to(x.dtype)

    def block(self, x, x0, skip: Skip | None, w: Layer, segments: Segments,
              rope) -> tuple[Tensor, Tensor, Tensor]:
        """x += W_out Attention(norm(mix(x, x0))); x += MLP(norm(x)). Returns x, x as it came, and x0."""
        x, u, entry, x0 = mix_norm(x, x0, skip, w.resid_mix, w.input_scale, self.settings.gate_window, w.qkv)
        y = self.attention(u, w, segments, rope)
        x, v = add_norm(x, self.project("out", y, w, u), w.input_scale, w.up)
        return self.mlp(v, w, x), entry, x0

    def two_lane_block(self, lane0, lane1, x0, skip: Skip | None, w: Layer, segments: Segments,
                       rope) -> tuple[Tensor, Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1; both outputs go to both. Returns the lanes and x0."""
        first = lane1 is lane0  # the lanes part here
        lane0, u, entry, x0 = mix_norm(lane0, x0, skip, w.resid_mix, w.input_scale, self.settings.gate_window,
                                       w.qkv, keep_stream=True)
        lane1, v = add_norm(entry if first else lane1, None, w.input_scale, w.up)
        y = self.attention(u, w, segments, rope)
        from_attention = computed(self.project("out", y, w, u))
        from_mlp = self.mlp(v, w)
        return *self.lane_update(lane0, lane1, from_attention, from_mlp, w.lane_resid, w.lane_post), x0

    def lane_update(self, lane0, lane1, from_attention, from_mlp, resid, post) -> tuple[Tensor, Tensor]:
        """Lane k becomes resid_k lane_k + post_0k from_attention + post_1k from_mlp, (T, d) each."""
        y, z = from_attention.float(), from_mlp.float()
        new0 = resid[0] * lane0.float() + post[0, 0] * y + post[1, 0] * z
        new1 = resid[1] * lane1.float() + post[0, 1] * y + post[1, 1] * z
        return new0.to(lane0.dtype), new1.to(lane1.dtype)

    def attention(self, u: Activation, w: Layer, segments: Segments, rope) -> Activation:
        """Gated exclusive self-attention of the normalized u, before the output matrix."""
        s = self.settings
        qkv = self.project("qkv", u, w, u)
        heads = prepare_heads(qkv, rope, w.q_gain, s.num_heads, s.num_kv_heads, may_copy=w.context is None)
        if w.context is not None:
            k, v = w.context(heads.k, heads.v)
            heads = heads._replace(k=k, v=v)
        y = attention(heads, segments, self.attention_kernel)
        own_value = heads.own_value if w.exclusive else None
        return xsa_gate(y, own_value, u.gate_input, w.head_gate, w.xsa_alpha, s.sparse_attn_gate_scale, w.out)

    def mlp(self, u: Activation, w: Layer, x: Tensor | None = None) -> Tensor:
        """W_down leaky_relu(W_up u)^2 (T, d), added to x if given, which may be written over."""
        slope = self.settings.leaky_relu_sq_slope
        if w.adapter is None:
            return squared_mlp(u, w.up, w.down, slope, x)
        hidden = leaky_relu_squared(self.project("up", u, w, u), slope)
        y = self.project("down", Activation(hidden), w, u)
        return y if x is None else x + y

    def project(self, site: str, x: Activation, w: Layer, u: Activation) -> Product | Tensor:
        """x W^T at a site: left to the operation that takes it, unless an adapter wants to see it first."""
        product = Product(x, getattr(w, site))
        return product if w.adapter is None else w.adapter(site, x.x, computed(product), u.x)

    def scores(self, hidden: Tensor) -> Product | Tensor:
        """Logits (T, vocab) before the soft cap: float32, or hidden's dtype where the embedding trains."""
        if torch.is_grad_enabled() and self.tok_emb.requires_grad:
            [head] = self.matrices(self.tok_emb.to(hidden.dtype)[None])
            return Product(as_activation(hidden, head), head)
        weight = self.tok_emb.to(hidden.dtype)
        if hidden.is_cuda and not torch.is_grad_enabled():
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return FullProduct.apply(hidden, weight) if hidden.is_cuda else F.linear(hidden, weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits (T, vocab), float32."""
        scores = computed(self.scores(hidden)).float()
        cap = self.softcaps(scores)
        return cap * torch.tanh(scores / cap)

    def softcaps(self, scores: Tensor) -> Tensor:
        """The cap of each score, by its sign."""
        return torch.where(scores >= 0, *self.caps())

    def caps(self) -> list[Tensor | float]:
        """The caps of positive and negative logits."""
        if self.softcap_pos is None:
            return [self.settings.logit_softcap] * 2
        return [self.softcap_pos, self.softcap_neg]

    def head_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy (T,) in nats of the targets, from the final hidden states (T, d)."""
        return two_value_nll(self.scores(hidden), *self.caps(), targets)[0]

    def token_losses(self, ids: Tensor, targets: Tensor, segments: Segments, looping: bool) -> Tensor:
        """Cross entropy of each target (T,) in nats, float32."""
        return self.head_losses(self(ids, segments, looping), targets)


def per_layer(stack: Tensor | None, count: int, first: int = 0) -> Sequence[Tensor | None]:
    """The tensors of a stack of `count`, None before the first that is used, or where there is no stack."""
    if stack is None:
        return [None] * count
    return [*[None] * first, *stack[first:].unbind()]


# ============================================================================================================
# 5. Optimizers
# ============================================================================================================

# --- Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): one function for each of its steps, put
# together in Optimizer.muon_update. They take stacks (matrices, rows, columns). None branches on data, so the
# host never waits for the device.

# The Polar Express (Amsel, Persson, Musco & Gower 2025, arXiv:2505.16932): coefficients (a, b, c) of each
# iteration. Composed, they are the best polynomial of its degree at moving singular values to 1. Computed for
# five iterations with a safety factor of 0.02 and a cushion of 2, as in modded-nanogpt.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def momentum_step(gradient: Tensor, momentum: Tensor, clip: Tensor, hyper: Tensor,
                  row_normalize: bool) -> Tensor:
    """What enters the iterations, in their dtype: one kernel when compiled. Optimizer.step makes `hyper`."""
    gradient = gradient.float() * clip
    mu = hyper[1]
    momentum.mul_(mu).add_(gradient)
    update = gradient + mu * momentum  # Nesterov's look-ahead
    if row_normalize:  # so that no output channel dominates what follows
        update = update / update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    return update.to(torch.bfloat16 if update.is_cuda else torch.float32)


def polar_express(update: Tensor, iterations: int) -> Tensor:
    """About the nearest semi-orthogonal matrices: singular values go to 1, singular vectors stay.

    Each iteration is X <- a X + (b G + c G^2) X with G = X X^T.
    """
    # A tall matrix is transposed, so that G is the smaller of its two Gram matrices.
    is_tall = update.size(-2) > update.size(-1)
    x = update.mT if is_tall else update
    # No singular value exceeds the Frobenius norm, and the iterations want them all in [0, 1].
    x = (x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(update.dtype)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).contiguous()


def even_out_rows(update: Tensor, mean_square: Tensor, hyper: Tensor, beta2: float, eps: float) -> Tensor:
    """NorMuon (Li et al. 2025, arXiv:2510.05491): every row over the root of its running mean square.

    mean_square: (matrices, rows, 1), updated in place. Each matrix keeps its Frobenius norm.
    """
    rows = update.float()
    norm = rows.norm(dim=(-2, -1), keepdim=True)
    mean_square.lerp_(rows.square().mean(-1, keepdim=True), 1 - beta2)
    # hyper[2] = 1 - beta2^t makes good for the mean's start at zero.
    rows = rows * (mean_square / hyper[2] + eps).rsqrt()
    rows = rows * (norm / rows.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))
    return rows.to(update.dtype)


def raise_to_floor(update: Tensor, weight: Tensor, ratio: float) -> Tensor:
    """An update whose Frobenius norm is below `ratio` times that of its matrix is scaled up to it."""
    norm = update.float().norm(dim=(-2, -1), keepdim=True)
    floor = ratio * weight.norm(dim=(-2, -1), keepdim=True)
    factor = (floor / norm.clamp(min=1e-12)).clamp(min=1.0)
    return (update * factor).to(update.dtype)


def apply_muon(weight: Tensor, update: Tensor, hyper: Tensor, decay: float) -> None:
    """Decoupled weight decay and the update."""
    # Tall matrices move further, so that outputs of all shapes change by about as much in root mean square.
    shape_factor = math.sqrt(max(1, weight.size(-2) / weight.size(-1)))
    weight.sub_(hyper[0] * (decay * weight + shape_factor * update))


class OwnMatrices(NamedTuple):
    """The matrices of one bank that this rank updates: views (matrices, rows, columns)."""

    weight: Tensor
    update: Tensor  # holds their averaged gradients until the update takes their place
    momentum: Tensor  # float32
    mean_square: Tensor  # (matrices, rows, 1), of NorMuon


class ShardedBanks:
    """Banks whose matrices have equally many elements, dealt out to the ranks in runs of equal length.

    1. One reduce-scatter averages the gradients over the ranks; each rank gets those of its own matrices.
    2. Each rank computes the updates of its own matrices; it alone has their momentum.
    3. One all-gather brings all updates to all ranks, which apply them alike.
    An all-reduce would move as many bytes and leave every rank to compute all updates. On CUDA bf16 moves.
    """

    def __init__(self, banks: list[nn.Parameter], runtime: Runtime):
        self.banks, self.runtime = banks, runtime
        self.pending = None
        count = sum(len(bank) for bank in banks)
        per_rank = math.ceil(count / runtime.world_size)
        # (matrices of all ranks, elements): gradients on their way out, updates on their way back
        shape = per_rank * runtime.world_size, banks[0][0].numel()
        self.all = torch.zeros(shape, dtype=runtime.compute_dtype, device=runtime.device)
        self.own = torch.zeros_like(self.all[:per_rank]) if runtime.world_size > 1 else self.all
        momentum = torch.zeros_like(self.own, dtype=torch.float32)
        self.updates = []  # each bank's part of `all`, in its shape
        self.owned: list[OwnMatrices] = []
        first_own = runtime.rank * per_rank
        first = 0
        for bank in banks:
            bank.grad = torch.zeros_like(bank)
            last = first + len(bank)
            self.updates.append(self.all[first:last].view_as(bank))
            begin = max(first, first_own)
            end = min(last, first_own + per_rank)
            if begin < end:
                weight = bank[begin - first:end - first].detach()
                part = slice(begin - first_own, end - first_own)
                self.owned.append(OwnMatrices(
                    weight, self.own[part].view_as(weight), momentum[part].view_as(weight),
                    torch.zeros(len(weight), bank.size(1), 1, device=runtime.device)))
            first = last

    def start_reduce_scatter(self) -> None:
        for bank, gradient in zip(self.banks, self.updates):
            torch.mul(bank.grad, 1 / self.runtime.world_size, out=gradient)
            bank.grad.zero_()
        if self.runtime.world_size > 1:
            self.pending = dist.reduce_scatter_tensor(self.own, self.all, async_op=True)

    def start_all_gather(self) -> None:
        if self.runtime.world_size > 1:
            self.pending = dist.all_gather_into_tensor(self.all, self.own, async_op=True)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None


# --- AdamW, for what is no matrix, and both together


class AdamWGroup(NamedTuple):
    """Parameters that lie side by side in the flat buffer and that AdamW treats alike: views (elements,)."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    mean_square: Tensor
    lr: float
    decay: float
    spare_idle: bool  # no decay where no gradient has ever arrived, as in what idles until looping starts


def apply_adamw(group: AdamWGroup, clip: Tensor, hyper: Tensor, beta1: float, beta2: float,
                eps: float) -> None:
    """AdamW (Loshchilov & Hutter 2019); hyper = (lr, 1 - beta1^t, 1 - beta2^t)."""
    gradient = group.gradient * clip
    group.mean.lerp_(gradient, 1 - beta1)
    group.mean_square.lerp_(gradient.square(), 1 - beta2)
    update = (group.mean / hyper[1]) / ((group.mean_square / hyper[2]).sqrt() + eps)
    decay = group.decay * group.weight
    if group.spare_idle:
        decay = decay * (group.mean_square > 0)
    group.weight.sub_(hyper[0] * (update + decay))


class Optimizer:
    """Muon for the banks, AdamW for everything else: each trained parameter belongs to exactly one of them.

    What AdamW trains lives in one flat float32 buffer, its gradients in another: one all-reduce for them all.
    The last of these gradients is the loss: its mean over the ranks costs nothing. Gradients keep their place
    from step to step, because captured passes write there.
    """

    def __init__(self, model: GPT, settings: Settings, runtime: Runtime):
        s = self.settings = settings
        self.runtime = runtime
        self.steps = 0
        banks = model.banks()
        self.shards = [ShardedBanks(list(alike), runtime)
                       for _, alike in itertools.groupby(banks, key=lambda bank: bank[0].numel())]
        trained = [p for p in model.parameters() if p.requires_grad]
        caps = [p for p in trained if p is model.softcap_pos or p is model.softcap_neg]
        elsewhere = {id(p) for p in [model.tok_emb, *banks, *caps]}
        scalars = [p for p in trained if id(p) not in elsewhere]
        self.build_flat([
            ([model.tok_emb], s.tied_embed_lr, s.embed_wd, False),
            (scalars, s.scalar_lr, s.adam_wd, s.adam_wd_mode == "active"),
            (caps, s.softcap_lr, 0.0, False),
        ])
        self.weights = [self.flat, *banks]
        self.momentum_step = runtime.compile(momentum_step)
        self.even_out_rows = runtime.compile(even_out_rows)
        self.raise_to_floor = runtime.compile(raise_to_floor)
        self.apply_muon = runtime.compile(apply_muon)
        self.apply_adamw = runtime.compile(apply_adamw)

    @torch.no_grad()
    def build_flat(self, plan) -> None:
        """Move the parameters of `plan` [(parameters, lr, decay, spare_idle)] into the flat buffer."""
        def room(p: Tensor) -> int:
            return -(-p.numel() // 16) * 16  # so that each begins at a multiple of 64 bytes

        size = sum(room(p) for parameters, *_ in plan for p in parameters)
        self.flat = torch.zeros(size, device=self.runtime.device)
        self.flat_grad = torch.zeros(size + 1, device=self.runtime.device)
        mean, mean_square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.adamw_groups = []
        first = 0
        for parameters, *rule in plan:
            last = first
            for p in parameters:
                place = slice(last, last + p.numel())
                self.flat[place] = p.flatten()
                p.data, p.grad = self.flat[place].view_as(p), self.flat_grad[place].view_as(p)
                last += room(p)
            if parameters:
                views = [buffer[first:last] for buffer in (self.flat, self.flat_grad, mean, mean_square)]
                self.adamw_groups.append(AdamWGroup(*views, *rule))
            first = last

    def add_loss(self, loss: Tensor) -> None:
        self.flat_grad[-1].add_(loss.detach())

    def average_gradients(self) -> Tensor:
        """Average them over the ranks; returns their norm. Those of matrices move to OwnMatrices.update."""
        world_size = self.runtime.world_size
        flat_pending = None
        if world_size > 1:
            flat_pending = dist.all_reduce(self.flat_grad.mul_(1 / world_size), async_op=True)
        for shard in self.shards:
            shard.start_reduce_scatter()
        for shard in self.shards:
            shard.wait()
        norms = [torch.linalg.vector_norm(shard.own, dtype=torch.float32) for shard in self.shards]
        squares = self.runtime.sum(sum(norm.square() for norm in norms))
        if flat_pending is not None:
            flat_pending.wait()
        return (squares + self.flat_grad[:-1].square().sum()).sqrt()

    def muon_update(self, own: OwnMatrices, clip: Tensor, hyper: Tensor) -> Tensor:
        """Muon for a stack of matrices W with gradients G and momentum M:

            M <- mu M + G,  U = G + mu M          momentum_step
            U <- rows of U over their norms       momentum_step     MUON_ROW_NORMALIZE
            U <- nearest semi-orthogonal matrix   polar_express     MUON_BACKEND_STEPS
            U <- rows of U over their mean size   even_out_rows     SKYLIGHT_NORM_EMA
            U <- max(1, ratio |W| / |U|) U        raise_to_floor    SKYLIGHT_UW_FLOOR
            W <- W - lr (decay W + factor U)      apply_muon, once every rank has U

        Another idea is a function like these and a line here; what it remembers is a field of OwnMatrices.
        """
        s = self.settings
        update = self.momentum_step(own.update, own.momentum, clip, hyper, s.muon_row_normalize)
        update = polar_express(update, s.muon_backend_steps)
        if s.skylight_norm_ema:
            update = self.even_out_rows(update, own.mean_square, hyper, s.skylight_norm_beta2,
                                        s.skylight_norm_eps)
        if s.skylight_uw_floor:
            update = self.raise_to_floor(update, own.weight, s.skylight_uw_ratio)
        return update

    @torch.no_grad()
    def step(self, lr_factor: float, momentum: float) -> Tensor:
        """Average, clip and apply what has accumulated; returns (mean loss, gradient norm) on the device.

        Nothing here waits for the device: rates travel in small uploads, the clip factor stays where it is.
        """
        s = self.settings
        self.steps += 1
        gradient_norm = self.average_gradients()
        bound = s.grad_clip_norm or math.inf
        clip = (bound / (gradient_norm + 1e-6)).clamp(max=1.0)

        # learning rate, mu, bias correction of NorMuon's mean
        muon = self.runtime.upload([s.matrix_lr * lr_factor, momentum, 1 - s.skylight_norm_beta2**self.steps])
        for shard in self.shards:
            for own in shard.owned:
                own.update.copy_(self.muon_update(own, clip, muon))
            shard.start_all_gather()
        for group in self.adamw_groups:  # while the updates travel
            rates = [group.lr * lr_factor, 1 - s.beta1**self.steps, 1 - s.beta2**self.steps]
            adam = self.runtime.upload(rates)
            self.apply_adamw(group, clip, adam, s.beta1, s.beta2, s.adam_eps)
        for shard in self.shards:
            shard.wait()
            for bank, update in zip(shard.banks, shard.updates):
                self.apply_muon(bank, update, muon, s.muon_wd)

        figures = torch.stack((self.flat_grad[-1], gradient_norm))
        self.flat_grad.zero_()
        return figures

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        moments = []
        for shard in self.shards:
            for own in shard.owned:
                moments += [own.momentum, own.mean_square]
        for group in self.adamw_groups:
            moments += [group.mean, group.mean_square]
        return self.weights + moments

    @contextmanager
    def rehearsal(self):
        """Steps taken inside leave no trace: weights, moments and step count are put back at the end."""
        steps = self.steps
        saved = [t.detach().clone() for t in self.state()]
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.state(), saved)
        self.steps = steps


class WeightAverage:
    """Exponential moving average of all weights: A <- decay A + (1 - decay) W after every step.

    The decay is EMA_DECAY (0: the weights themselves) or follows from EMA_SHARE and the step's progress.
    """

    def __init__(self, weights: list[Tensor], settings: Settings):
        self.weights, self.settings = weights, settings
        self.average = [w.detach().clone() for w in weights]
        self.progress = 0.0

    @torch.no_grad()
    def update(self, progress: float) -> None:
        share = self.settings.ema_share
        decay = math.exp((self.progress - progress) / share) if share else self.settings.ema_decay
        self.progress = progress
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        weights = [w.detach().clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        torch._foreach_copy_(self.average, weights)


# ============================================================================================================
# 6. Training
# ============================================================================================================


class Moment(NamedTuple):
    """What the schedules say about one step."""

    context: int  # tokens; documents are cut to this length
    looping: bool
    step_tokens: int  # over all ranks
    lr_factor: float  # on every learning rate
    momentum: float  # Muon's


def schedule(progress: float, step: int, context_start: int, s: Settings) -> Moment:
    """Every schedule of training, a function of these four alone.

    progress: 0 to 1, as the step begins: training time over its cap, or steps over ITERATIONS without one.
    context_start: the step in which the present context length began.

    For another shape of the learning rate write a function beside `linear_warmdown`, call it here, and
    declare its settings in the group "Schedule" of Settings: no other place has to know.
    """
    step_tokens = stage_at(progress, s.batch_stages)
    lr_factor = linear_warmdown(progress, s) * warmup_after_change(progress, step, context_start, s)
    lr_factor *= (step_tokens / s.train_batch_tokens) ** s.train_batch_lr_power
    looping = s.num_loops > 0 and progress >= s.enable_looping_at
    context = stage_at(progress, s.context_stages)
    return Moment(context, looping, step_tokens, lr_factor, muon_momentum(progress, step, s))


def stage_at(progress: float, stages: list[tuple[int, float]]) -> int:
    """The value of the first stage whose end is not past, else of the last."""
    return next((value for value, end in stages if progress <= end), stages[-1][0])


def linear_warmdown(progress: float, s: Settings) -> float:
    """1, then a linear fall toward 0 over the last WARMDOWN_FRAC of progress, but not below MIN_LR."""
    fall = (1 - progress) / s.warmdown_frac if s.warmdown_frac else 1.0
    return min(1.0, max(fall, s.min_lr))


def warmup_after_change(progress: float, step: int, context_start: int, s: Settings) -> float:
    """A rise over SEQ_CHANGE_WARMUP_SHARE or _STEPS after each change of context; none as training begins."""
    if context_start == 0:
        return 1.0
    change = max((end for _, end in s.context_stages[:-1] if end < progress), default=0.0)
    return risen(progress - change, s.seq_change_warmup_share,
                 step - context_start + 1, s.seq_change_warmup_steps)


def muon_momentum(progress: float, step: int, s: Settings) -> float:
    """A rise from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over MUON_MOMENTUM_WARMUP_SHARE or _STEPS."""
    share = risen(progress, s.muon_momentum_warmup_share, step, s.muon_momentum_warmup_steps)
    return s.muon_momentum_warmup_start + (s.muon_momentum - s.muon_momentum_warmup_start) * share


def risen(progress: float, share: float, steps: int, all_steps: int) -> float:
    """A linear rise from 0 to 1 over a share of the run or, where that is 0, over a number of steps."""
    done, whole = (progress, share) if share else (steps, all_steps)
    return min(1.0, done / whole) if whole else 1.0


def training_shapes(s: Settings) -> list[tuple[int, bool, int]]:
    """Every (context, looping, step_tokens) that training can meet, in the order in which it meets them."""
    starts = [math.nextafter(end, 1.0) for _, end in s.context_stages + s.batch_stages]
    moments = [schedule(at, 0, 0, s) for at in sorted([0.0, s.enable_looping_at, *starts]) if at < 1]
    return list(dict.fromkeys(now[:3] for now in moments))


class TrainingClock:
    """Training time, and what follows from it: rank 0 reads the clock and every rank gets its verdict.

    On CUDA the host runs up to two steps ahead of the device. Before step s is launched, rank 0 waits until
    step s - 2 is complete, so that the device still has step s - 1 to do, and adds one step to the time read.
    """

    def __init__(self, settings: Settings, runtime: Runtime, reserve: float):
        self.settings, self.runtime = settings, runtime
        self.budget = settings.max_wallclock_seconds - reserve  # what is left for steps
        self.lag = 2 if runtime.on_cuda else 1
        self.marks: dict[int, torch.cuda.Event] = {}
        self.progress = 0.0
        self.shapes: list[tuple[int, bool, int]] = []  # as in training_shapes, of each step that has begun
        self.tokens = [0]  # in so many steps
        self.seconds = [0.0]  # training time at which so many steps were seen to be complete
        self.latest = 0.0  # seconds of the latest step that is known to be complete
        self.longest: dict[tuple[int, bool, int], float] = {}  # of the longest of each shape
        self.left_out = 0  # rounds of calibration for which there was no time
        runtime.synchronize()
        self.origin = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.origin

    def speed(self, first: int, last: int) -> int:
        """Tokens per second from the end of step `first`, counted from 1, to that of step `last`."""
        if last <= first:
            return 0
        return round((self.tokens[last] - self.tokens[first]) / (self.seconds[last] - self.seconds[first]))

    def begin_step(self, step: int) -> tuple[float, bool]:
        """At the start of this step: progress in [0, 1], and whether to stop here."""
        self.observe(step - self.lag)
        s = self.settings
        start = self.seconds[-1] + (self.lag - 1) * self.latest
        progress = start / self.budget if s.max_wallclock_seconds else step / s.iterations
        shape = schedule(progress, 0, 0, s)[:3]
        is_over = s.max_wallclock_seconds > 0 and start + self.longest.get(shape, self.latest) > self.budget
        progress, is_over = self.runtime.from_rank0([progress, float(is_over)])
        # Estimates may step back, schedules must not.
        self.progress = min(1.0, max(self.progress, progress))
        self.shapes.append(schedule(self.progress, 0, 0, s)[:3])
        self.tokens.append(self.tokens[-1] + self.shapes[-1][2])
        return self.progress, bool(is_over) or step >= min(s.iterations, s.force_stop_step or s.iterations)

    def end_step(self, step: int) -> None:
        if self.runtime.on_cuda:
            self.marks[step] = torch.cuda.current_stream().record_event()

    def observe(self, last: int) -> None:
        """Wait until every step up to this one is complete, and note the times."""
        for step in range(len(self.seconds) - 1, last + 1):
            if self.runtime.on_cuda:
                self.marks.pop(step).synchronize()
            self.seconds.append(self.elapsed())
            self.latest = self.seconds[-1] - self.seconds[-2]
            shape = self.shapes[step]
            self.longest[shape] = max(self.longest.get(shape, 0.0), self.latest)

    def in_time(self, rounds: Sequence):
        """Yield the first round of work, and others while the cap leaves time for one like the longest."""
        times = self.runtime.from_rank0(self.seconds[-1:])
        for number, one in enumerate(rounds):
            if number:
                self.runtime.synchronize()
                times += self.runtime.from_rank0([self.elapsed()])
                longest = max(end - start for start, end in itertools.pairwise(times))
                if times[-1] + 1.25 * longest > (self.settings.max_wallclock_seconds or math.inf):
                    self.left_out = len(rounds) - number
                    return
            yield one

    @contextmanager
    def paused(self, step: int):
        """Time inside does not count: for validation in the middle of training, before `step`."""
        self.observe(step - 1)
        began = time.perf_counter()
        yield
        self.runtime.synchronize()
        self.origin += time.perf_counter() - began


class MicroBatches:
    """Forward and backward passes over micro-batches, which add to the gradients and to the loss of the step.

    With RECORDED_PASSES each of training_shapes has a CUDA graph: one launch instead of some two thousand. It
    reads from buffers that stay in place, with room for more segments than documents usually make. Those that
    a micro-batch lacks are empty; one that has more runs without a graph.
    """

    def __init__(self, model: GPT, optimizer: Optimizer, settings: Settings, runtime: Runtime):
        self.model, self.optimizer = model, optimizer
        self.settings, self.runtime = settings, runtime
        # Plain attention waits for the device, which a graph cannot.
        self.records = runtime.on_cuda and settings.recorded_passes and model.attention_kernel != "reference"
        self.memory = torch.cuda.graph_pool_handle() if self.records else None  # graphs take turns
        self.graphs: dict[tuple[int, bool, int], torch.cuda.CUDAGraph] = {}
        self.buffers: dict[tuple[int, int], Batch] = {}  # by context and length of the micro-batch
        self.unrecorded = 0  # passes that could have been replayed and were not

    def accumulate(self, batch: Batch, looping: bool, step_tokens: int) -> None:
        """Add one micro-batch's gradients and loss, by a graph where there is one that it fits."""
        if self.records:
            context = batch.segments.max_seqlen
            buffers = self.buffers_of(context, len(batch.inputs))
            if len(batch.segments.cu_seqlens) <= len(buffers.segments.cu_seqlens):
                batch = self.fill(buffers, batch)
                if (context, looping, step_tokens) in self.graphs:
                    self.graphs[context, looping, step_tokens].replay()
                    return
            self.unrecorded += 1
        self.forward_backward(batch, looping, step_tokens)

    def forward_backward(self, batch: Batch, looping: bool, step_tokens: int) -> None:
        loss = self.model.token_losses(*batch, looping).mean() / self.settings.split_step(step_tokens)[0]
        loss.backward()
        self.optimizer.add_loss(loss)

    def buffers_of(self, context: int, length: int) -> Batch:
        """Room for usual documents and their cuts at the context, and no more: empty segments cost time."""
        if (context, length) not in self.buffers:
            ids, targets = torch.empty(2, length, dtype=torch.int64, device=self.runtime.device)
            bounds = max(64, length // 768 + 32 + length // context) + 1
            cu_seqlens = torch.empty(bounds, dtype=torch.int32, device=self.runtime.device)
            positions = torch.empty(length, dtype=torch.int32, device=self.runtime.device)
            self.buffers[context, length] = Batch(ids, targets, Segments(cu_seqlens, positions, context))
        return self.buffers[context, length]

    def fill(self, buffers: Batch, batch: Batch) -> Batch:
        """The micro-batch in the buffers."""
        bounds, bounds_buffer = batch.segments.cu_seqlens, buffers.segments.cu_seqlens
        torch._foreach_copy_([*buffers[:2], buffers.segments.positions, bounds_buffer[:len(bounds)]],
                             [*batch[:2], batch.segments.positions, bounds])
        bounds_buffer[len(bounds):].fill_(len(batch.inputs))  # segments from the end to the end are empty
        return buffers

    def capture(self, shapes: list[tuple[int, bool, int]]) -> None:
        """Capture a graph of each of training_shapes. All must have run before and so be compiled."""
        for context, looping, step_tokens in shapes:
            buffers = self.buffers_of(context, self.settings.split_step(step_tokens)[1])
            graph = torch.cuda.CUDAGraph()
            # Other threads go on meanwhile.
            with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
                self.forward_backward(buffers, looping, step_tokens)
            self.graphs[context, looping, step_tokens] = graph


def train(model: GPT, data: TrainingData, score: Callable, calibration: Callable, settings: Settings,
          runtime: Runtime, log: RunLog) -> tuple[bool, object]:
    """Train until the cap or the last iteration, calibrate on the averaged weights, score those and the last.

    score(model, looping) returns the figures of an evaluation, calibration(looping, rehearsal, in_time) what
    quantization will need. One round is timed before the clock starts; should they take longer, there are
    fewer. Returns whether looping was on at the end, a property of the model now, and what calibration found.
    """
    s = settings
    optimizer = Optimizer(model, s, runtime)
    micro_batches = MicroBatches(model, optimizer, s, runtime)

    def take_step(batches, now: Moment) -> Tensor:
        for _ in range(s.split_step(now.step_tokens)[0]):
            micro_batches.accumulate(next(batches), now.looping, now.step_tokens)
        return optimizer.step(now.lr_factor, now.momentum)

    reserve = warm_up(take_step, micro_batches, data, calibration, s, runtime, log)
    average = WeightAverage(optimizer.weights, s)
    now = schedule(0.0, 0, 0, s)
    batches = data.stream(now.context, now.step_tokens)
    context_start = 0
    looping_from = None
    figures_of: dict[int, Tensor] = {}  # of steps: (mean loss, gradient norm) on their way to the host
    compiled_before = compiled_graphs()
    clock = TrainingClock(s, runtime, reserve)
    for step in itertools.count():
        progress, stop = clock.begin_step(step)
        log_steps(log, clock, figures_of, s)
        if stop:
            break
        if s.val_loss_every and step and step % s.val_loss_every == 0:
            with clock.paused(step):
                log.event("val", step=step, **score(model, now.looping))
        before = now
        if stage_at(progress, s.context_stages) != now.context:
            context_start = step
        now = schedule(progress, step, context_start, s)
        for kind in ("context", "step_tokens"):
            if getattr(now, kind) != getattr(before, kind):
                log.event(kind, step=step, progress=round(progress, 4), tokens=getattr(now, kind))
                batches.close()
                batches = data.stream(now.context, now.step_tokens, clock.tokens[step])
        if now.looping and looping_from is None:
            looping_from = step
            log.event("looping", step=step, progress=round(progress, 4))
        figures = take_step(batches, now)
        average.update(progress)
        figures_of[step + 1] = torch.empty(2, pin_memory=runtime.on_cuda).copy_(figures, non_blocking=True)
        clock.end_step(step)
    batches.close()
    clock.observe(step - 1)
    log_steps(log, clock, figures_of, s)

    recompilations = compiled_graphs() - compiled_before  # 0 but for validations in between
    micro_batches.graphs.clear()  # and their memory
    average.swap()
    found = calibration(now.looping, rehearsal=False, in_time=clock.in_time)
    runtime.synchronize()
    if clock.left_out:
        log.event("calibration_cut", rounds_left_out=clock.left_out)
    report_training(log, clock, step, looping_from, s, recompilations=recompilations,
                    unrecorded_passes=micro_batches.unrecorded)
    average.swap()
    log.result("raw", **score(model, now.looping))
    average.swap()
    if s.ema_decay or s.ema_share:
        log.result("averaged", **score(model, now.looping))
    return now.looping, found


def warm_up(take_step: Callable, micro_batches: MicroBatches, data: TrainingData, calibration: Callable,
            s: Settings, runtime: Runtime, log: RunLog) -> float:
    """Compile and capture what training will run, without a trace; returns the seconds for calibration."""
    began = time.perf_counter()
    shapes = training_shapes(s)

    def take_steps(count: int) -> None:
        for shape in shapes:
            now = Moment(*shape, lr_factor=1.0, momentum=s.muon_momentum)
            batches = data.stream(now.context, now.step_tokens)
            for _ in range(count):
                take_step(batches, now)
            batches.close()

    with micro_batches.optimizer.rehearsal():
        take_steps(s.warmup_steps)
        if s.warmup_steps and micro_batches.records:
            micro_batches.capture(shapes)
            take_steps(1)  # the first replay of a graph takes longer too
    micro_batches.unrecorded = 0
    runtime.synchronize()
    reserve = calibration_reserve(calibration, s, runtime)
    log.event("warmup", steps=s.warmup_steps, shapes=list(map(list, shapes)),
              seconds=round(time.perf_counter() - began, 1), reserve_seconds=round(reserve, 3),
              process_seconds=round(time.perf_counter() - STARTED, 1))
    if s.max_wallclock_seconds and reserve >= s.max_wallclock_seconds:
        raise InputError(f"MAX_WALLCLOCK_SECONDS: {s.max_wallclock_seconds} leaves no time to train: "
                         f"calibration needs {reserve:.1f} s; raise it or lower GPTQ_CALIBRATION_BATCHES")
    return reserve


def calibration_count(s: Settings) -> int:
    """How many windows calibration reads."""
    return math.ceil(s.gptq_calibration_batches * (s.train_batch_tokens // 8) / s.calibration_len)


def calibration_pass(s: Settings, runtime: Runtime) -> int:
    """How many windows of calibration go through the model at once."""
    return max(1, (32768 if runtime.on_cuda else 4096) // s.calibration_len)


def calibration_reserve(calibration: Callable, s: Settings, runtime: Runtime) -> float:
    """Seconds: GPTQ_RESERVE_SECONDS, or under a cap what one timed round lets expect where that is longer."""
    estimate = 0.0
    if s.max_wallclock_seconds:
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            calibration(s.loops_at_end, rehearsal=True)
            runtime.synchronize()
            seconds = time.perf_counter() - started
        rounds = math.ceil(calibration_count(s) / (calibration_pass(s, runtime) * runtime.world_size))
        estimate = 1.25 * seconds * rounds
    return runtime.from_rank0([max(s.gptq_reserve_seconds, estimate)])[0]


def compiled_graphs() -> int:
    # It takes seconds to import; where nothing has asked for it, it has compiled nothing.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


def log_steps(log: RunLog, clock: TrainingClock, figures_of: dict[int, Tensor], s: Settings) -> None:
    """See to steps whose figures have reached the host; log the first five and each of TRAIN_LOG_EVERY."""
    for step in [step for step in figures_of if step < len(clock.seconds)]:
        loss, gradient_norm = figures_of.pop(step).tolist()
        if not math.isfinite(loss + gradient_norm):
            raise FloatingPointError(f"training diverged: the loss of step {step} is {loss}, its gradient's "
                                     f"norm {gradient_norm}; lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
        if step <= 5 or s.train_log_every and step % s.train_log_every == 0:
            seconds = clock.seconds[step]
            share = seconds / clock.budget if s.max_wallclock_seconds else step / s.iterations
            rate = clock.speed(max(1, step - max(1, s.train_log_every)), step)
            log.event("step", step=step, train_loss=round(loss, 4), grad_norm=round(gradient_norm, 4),
                      seconds=round(seconds, 3), tokens_per_second=rate, share=round(share, 4),
                      eta_seconds=round(seconds * (1 / share - 1), 1))


def report_training(log: RunLog, clock: TrainingClock, steps: int, looping_from: int | None, s: Settings,
                    **counts: int) -> None:
    """Steps, seconds and speed, before and after looping started."""
    switch = steps if looping_from is None else looping_from
    seconds = clock.seconds[steps]
    total = clock.elapsed()
    log.result("training", steps=steps, seconds=round(seconds, 3),
               calibration_seconds=round(total - seconds, 3), clock_seconds=round(total, 3),
               cap_seconds=s.max_wallclock_seconds, within_cap=total <= (s.max_wallclock_seconds or math.inf),
               tokens=clock.tokens[steps], looping_from=looping_from,
               tokens_per_second_plain=clock.speed(1, switch),  # a phase's first step has not its speed
               tokens_per_second_looping=clock.speed(switch + 1, steps),
               **counts, peak_memory_mib=round(torch.cuda.max_memory_reserved() / 2**20))


# ============================================================================================================
# 7. Quantization
# ============================================================================================================

HESSIAN_DAMPING = 0.01  # added to the diagonal, as a share of its mean
GPTQ_BLOCK = 128  # columns whose errors reach the later ones in one product
SMALLEST_SCALE = torch.finfo(torch.float16).tiny
# quantize_by_loss stores scales as whole numbers k: 2^(k / 8) for a row, 2^(k / 4) for a column.
SCALES_PER_OCTAVE = 8
COLUMN_SCALES_PER_OCTAVE = 4
GAUSSIAN_BITS = 2.05  # entropy of a normal variable in steps of its deviation
MAX_BITS = 6  # per weight, where the whole model would need less than TARGET_BYTES
SPARE_BYTES = 6000  # the size search ends when less than this is left

# Trellis-coded quantization with 8 states (Marcellin & Fischer 1990; the trellis of JPEG 2000 part 2). In
# state t a code k stands for step (k + TRELLIS_OFFSET[t]); its parity chooses the next state
# TRELLIS_NEXT[2 t + (k & 1)].
TRELLIS_NEXT = (0, 1, 2, 3, 5, 4, 7, 6, 1, 0, 3, 2, 4, 5, 6, 7)
TRELLIS_OFFSET = (-0.25, 0.25) * 4


class Role(NamedTuple):
    """The matrices that do the same work in every layer, quantized together as (layers, rows, columns)."""

    stack: str  # the parameter that holds them
    start: int  # where in it the first layer's lies
    site: str  # the product in which they take part
    rows: slice  # which outputs of that product are theirs
    bits: int
    clip_sigmas: float

    def weights(self, model: GPT) -> Tensor:
        parameter = getattr(model, self.stack).detach()
        if parameter.dim() == 2:  # the embedding
            return parameter[None]
        return parameter[self.start:self.start + model.settings.num_layers]


def matrix_roles(s: Settings) -> dict[str, Role]:
    """Every matrix that is stored as integers, by the name of its role."""
    n = s.num_layers
    q = s.model_dim
    kv = s.kv_dim
    everything = slice(None)
    attn = (s.matrix_bits, s.attn_clip_sigmas)
    mlp = (s.matrix_bits, s.mlp_clip_sigmas)
    return {
        "tok_emb": Role("tok_emb", 0, "head", everything, s.embed_bits, s.embed_clip_sigmas),
        "attn.c_k": Role("kv_bank", 0, "qkv", slice(q, q + kv), *attn),
        "attn.c_q": Role("qo_bank", 0, "qkv", slice(0, q), *attn),
        "attn.c_v": Role("kv_bank", n, "qkv", slice(q + kv, None), *attn),
        "attn.proj": Role("qo_bank", n, "out", everything, *attn),
        "mlp.fc": Role("mlp_up_bank", 0, "up", everything, *mlp),
        "mlp.proj": Role("mlp_down_bank", 0, "down", everything, *mlp),
    }


# --- Calibration


class Statistics(NamedTuple):
    """What calibration saw at each site (head, qkv, out, up, down), per token, stacked over the layers.

    A change E of a site's matrix raises the loss by about 1/2 sum over rows r of curvature[r] E[r] hessian
    E[r]^T (a Fisher matrix in Kronecker factors, Martens & Grosse 2015, of the second its diagonal alone).
    """

    hessian: dict[str, Tensor]  # (layers, columns, columns): sum of x x^T over the inputs x of all visits
    curvature: dict[str, Tensor]  # (layers, rows): mean square of the loss gradient at the outputs, or zeros
    visits: Tensor  # (layers,): how often a token passes each layer


class Observer(Hooks):
    """Accumulates sums for Statistics inside the forward pass and, through hooks, in the backward pass."""

    def __init__(self, model: GPT, gradients: bool):
        s = model.settings
        self.gradients = gradients
        embedding = 1, *model.tok_emb.shape
        shapes = dict(  # layers, rows, columns of each site's matrices
            head=embedding, embed=embedding, qkv=(s.num_layers, s.model_dim + 2 * s.kv_dim, s.model_dim),
            out=(s.num_layers, s.model_dim, s.model_dim), up=model.mlp_up_bank.shape,
            down=model.mlp_down_bank.shape)
        zeros = model.tok_emb.detach().new_zeros
        self.hessian = {site: zeros(n, columns, columns) for site, (n, _, columns) in shapes.items()}
        self.curvature = {site: zeros(n, rows) for site, (n, rows, _) in shapes.items()}

    def block(self, visit: int, layer: int) -> dict:
        def see(site, x, y, u):  # x (T, columns), y (T, rows)
            def see_gradient(g):
                self.curvature[site][layer] += g.float().square().sum(0)

            self.hessian[site][layer] += second_moment(x.detach())
            if self.gradients:
                y.register_hook(see_gradient)
            return y
        return dict(adapter=see)

    def embedding(self, ids: Tensor, x: Tensor) -> None:
        """The backward pass ends at the embedding's rows x (T, d) of `ids`."""
        def see_gradient(g):
            self.hessian["embed"][0] += second_moment(g)
            self.curvature["embed"][0].index_add_(0, ids, g.square().sum(1))

        if self.gradients:
            x.requires_grad_().register_hook(see_gradient)

    @torch.no_grad()
    def head(self, model: GPT, hidden: Tensor) -> None:
        """The head's curvature is known in closed form: p (1 - p), times the soft cap's slope squared."""
        self.hessian["head"][0] += second_moment(hidden)
        if self.gradients:
            logits = model.logits(hidden)
            p = logits.softmax(-1)
            slope = 1 - (logits / model.softcaps(logits)).square()
            curvature = (p - p * p) * slope.square()
            self.curvature["head"][0] += curvature.sum(0)


def second_moment(x: Tensor) -> Tensor:
    """x^T x of x (T, columns), float32. Products of bf16 are exact there, so tensor cores lose nothing."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.T.float() @ x.float()


def calibration_windows(data: TrainingData, s: Settings, max_windows: int | None = None) -> list[np.ndarray]:
    """Windows (calibration_len + 1,) from anywhere in the training text, whatever the number of ranks."""
    draw = np.random.default_rng(0)
    starts = [int(draw.integers(data.total)) for _ in range(calibration_count(s))]
    return [data.read(start, s.calibration_len + 1) for start in starts[:max_windows]]


def calibration_batch(windows: list[np.ndarray], s: Settings) -> Batch:
    """The windows in one batch. Attention stays inside documents, as published only inside windows."""
    text = np.stack(windows)
    ids = text[:, :-1]
    begins = (ids == BOS_ID) & (s.step_rule == "loss")
    begins[:, 0] = True
    return make_batch(ids.flatten(), text[:, 1:].flatten(), np.flatnonzero(begins), s.calibration_len)


def calibrate(model: GPT, windows: list[np.ndarray], looping: bool, s: Settings, runtime: Runtime,
              in_time: Callable = iter) -> Statistics:
    """Send the windows, dealt out to the ranks, through the model forward and backward; sum what is seen.

    The weights take no gradient; STEP_RULE=sigma needs no backward pass. in_time: see TrainingClock.
    """
    gradients = s.step_rule == "loss"
    plain = model.view(trainable=False)
    observer = Observer(model, gradients)
    per_pass = calibration_pass(s, runtime)
    per_round = per_pass * runtime.world_size
    for start in in_time(range(0, len(windows), per_round)):
        seen = min(start + per_round, len(windows))
        first = start + runtime.rank * per_pass
        if first < seen:
            batch = calibration_batch(windows[first:first + per_pass], s).to(runtime)
            with torch.set_grad_enabled(gradients):
                hidden = plain(batch.inputs, batch.segments, looping, observer)
                if gradients:
                    plain.head_losses(hidden, batch.targets).sum().backward()
            observer.head(plain, hidden.detach())
    tokens = seen * s.calibration_len
    hessian = observer.hessian
    curvature = observer.curvature
    for sums in (hessian, curvature):
        for site, total in sums.items():
            sums[site] = runtime.sum(total) / tokens
    order = sum(model.orders[looping], [])
    visits = torch.tensor(order).bincount().float().to(runtime.device)
    for site in ("qkv", "out", "up", "down"):
        # A layer's visits feel the same change of its weights: if their gradients were independent, their
        # mean square would count (sum / visits), if they were equal, visits times that. The geometric mean
        # of both fits measurement.
        curvature[site] /= visits[:, None].sqrt()
    # The products were seen with the residual scales multiplied in.
    curvature["out"] *= plain.attn_scale ** 2
    curvature["down"] *= plain.mlp_scale ** 2
    join_embedding(hessian, curvature)
    return Statistics(hessian, curvature, visits)


def join_embedding(hessian: dict[str, Tensor], curvature: dict[str, Tensor]) -> None:
    """Add what was seen at the site "embed" to the site "head", in place.

    The embedding works twice: as the head, and as the input, whose rows feel their own tokens' gradients
    alone. The sum of the two Kronecker products becomes one product that keeps each one's trace.
    """
    as_input = hessian.pop("embed")
    rows = curvature.pop("embed")  # (1, vocabulary): squared gradients, summed over the columns
    if not rows.any():  # no backward pass
        return
    as_head = hessian["head"]
    head_trace = as_head.diagonal(dim1=1, dim2=2).sum()
    input_trace = as_input.diagonal(dim1=1, dim2=2).sum()
    share = rows.sum() / (rows.sum() + curvature["head"].sum() * head_trace)
    hessian["head"] = as_head.lerp(as_input * (head_trace / input_trace), share)
    curvature["head"] += rows / head_trace


def sort_hidden_units(model: GPT, statistics: Statistics | None) -> None:
    """Put each MLP's hidden units in the order of their rows' steps, in matrices and statistics, in place.

    The function stays the same, and the row scales become cheap to code.
    """
    up = model.mlp_up_bank.detach()
    down = model.mlp_down_bank.detach()
    key = statistics.curvature["up"] if model.settings.step_rule == "loss" else up.std(2)
    for i, order in enumerate(key.argsort(dim=1)):
        up[i] = up[i, order]
        down[i] = down[i][:, order]
        if statistics:
            curvature = statistics.curvature["up"]
            hessian = statistics.hessian["down"]
            curvature[i] = curvature[i, order]
            hessian[i] = hessian[i][order][:, order]


# --- From matrices to integers and back


class Problem(NamedTuple):
    """What is known about one role before it is quantized."""

    role: Role
    weight: Tensor  # (layers, rows, columns)
    hessian: Tensor  # (layers, columns, columns)
    curvature: Tensor  # (layers, rows)
    visits: Tensor  # (layers,): how often a token passes

    @property
    def inputs(self) -> Tensor:
        """Sum of squares of each column's inputs, per token, (layers, columns)."""
        return self.hessian.diagonal(dim1=1, dim2=2)

    @property
    def by_input(self) -> Tensor:
        """The columns' order (layers, columns), those with the largest inputs first."""
        return self.inputs.argsort(dim=1, descending=True, stable=True)

    def predicted_loss(self, error: Tensor) -> Tensor:
        """Rise of the loss for a change `error` of the weights, in nats per token, (layers,)."""
        rows = (error @ self.hessian * error).sum(2)
        return 0.5 * (rows * self.curvature).sum(1)


Problems = dict[str, Problem]  # by role


def build_problems(model: GPT, statistics: Statistics | None) -> Problems:
    """The problem of each role; without calibration Hessians are identities and GPTQ is plain rounding."""
    problems = {}
    for name, role in matrix_roles(model.settings).items():
        weight = role.weights(model).float()
        layers, rows, columns = weight.shape
        visits = weight.new_ones(layers)
        if statistics is None:
            hessian = torch.eye(columns, device=weight.device).repeat(layers, 1, 1)
            curvature = weight.new_ones(layers, rows)
        else:
            hessian = statistics.hessian[role.site]
            curvature = statistics.curvature[role.site][:, role.rows]
            if role.site != "head":
                visits = statistics.visits
        problems[name] = Problem(role, weight, hessian, curvature, visits)
    return problems


class LowRank(NamedTuple):
    """Rank-r correction left right of one matrix, in integers with float16 scales."""

    left: Tensor  # (rows, r) int8
    left_scale: Tensor  # (1,)
    right: Tensor  # (r, columns) int8
    right_scale: Tensor  # (r x columns / group,), each for `group` neighbouring values

    def product(self) -> Tensor:
        left = self.left.float() * self.left_scale.float()
        groups = self.right.float().view(len(self.right_scale), -1)
        right = groups * self.right_scale.float()[:, None]
        return left @ right.view_as(self.right)


class Quantized(NamedTuple):
    """One role's matrices as stored: row scale x column scale x (code + offset) + low-rank correction.

    By loss, scales are whole numbers k for 2^(k / SCALES_PER_OCTAVE) and 2^(k / COLUMN_SCALES_PER_OCTAVE),
    and the trellis gives the offsets. Published, scales are stored themselves (1 for columns, less with
    AWQ-lite), and there are no offsets.
    """

    codes: Tensor | None  # (layers, rows, columns) int8; gptq fills them in
    row_scale: Tensor  # (layers, rows) int16, or float16
    column_scale: Tensor  # (layers, columns) int8, or float32
    low_rank: dict[int, LowRank]  # by layer

    @property
    def by_loss(self) -> bool:
        return self.row_scale.dtype == torch.int16


QuantizedRoles = dict[str, Quantized]


def grid_value(exponent: Tensor, per_octave: int) -> Tensor:
    return torch.exp2(exponent.double() / per_octave).float()


def float16_scale(value: Tensor) -> Tensor:
    return value.clamp(min=SMALLEST_SCALE).half()


def step_sizes(q: Quantized) -> Tensor:
    """The quantization step of every weight, (layers, rows, columns) float32."""
    row = q.row_scale.float()
    column = q.column_scale
    if q.by_loss:
        row = grid_value(q.row_scale, SCALES_PER_OCTAVE)
        column = grid_value(q.column_scale, COLUMN_SCALES_PER_OCTAVE)
    return row[:, :, None] * column[:, None]


def take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """The columns of `matrices` (layers, rows, columns) in `order` (layers, columns)."""
    return matrices.gather(2, order[:, None].expand_as(matrices))


def trellis_order(column_scale: Tensor) -> Tensor:
    """The order (layers, columns) in which a trellis runs: finest column first, as a decoder can tell too."""
    return column_scale.argsort(dim=1, stable=True)


def trellis_offsets(codes: Tensor, order: Tensor) -> Tensor:
    """What the trellis adds to each of the codes (layers, rows, columns), float32."""
    following = torch.tensor(TRELLIS_NEXT, device=codes.device)
    offset = torch.tensor(TRELLIS_OFFSET, device=codes.device)
    codes = take_columns(codes, order)
    offsets = torch.empty_like(codes, dtype=torch.float32)
    state = torch.zeros_like(codes[..., 0], dtype=torch.long)
    for j in range(codes.size(2)):
        offsets[..., j] = offset[state]
        state = following[2 * state + (codes[..., j] & 1)]
    return take_columns(offsets, order.argsort(1))


def dequantize(q: Quantized) -> Tensor:
    """The weights (layers, rows, columns) that the stored integers stand for, float32."""
    levels = q.codes.float()
    if q.by_loss:
        levels += trellis_offsets(q.codes, trellis_order(q.column_scale))
    weights = step_sizes(q) * levels
    for layer, correction in q.low_rank.items():
        weights[layer] += correction.product()
    return weights


# --- GPTQ: integers whose errors make up for each other


def hessian_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper triangular R, R R^T = the damped Hessians (layers, columns, columns) with columns in `order`.

    Where a factorization fails the damping is raised tenfold until it succeeds.
    """
    if not hessian.isfinite().all():
        raise FloatingPointError("a Hessian is not finite: training diverged")
    h = take_columns(take_columns(hessian.mT, order).mT, order)  # its rows, then its columns
    diagonal = h.diagonal(dim1=1, dim2=2)
    damping = HESSIAN_DAMPING * diagonal.mean(1).clamp(min=1e-30)
    while True:
        damped = h + torch.diag_embed(damping[:, None].expand_as(diagonal))
        # The factor of the reversed matrix is lower triangular: reversed back, upper.
        factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            return factor.flip(1, 2)
        damping = torch.where(failed > 0, 10 * damping, damping)


def gptq(p: Problem, q: Quantized, max_code: Tensor, order: Tensor, quantize_block: Callable) -> Quantized:
    """`q` with codes for which later columns make up for earlier ones' errors (GPTQ, Frantar et al. 2022).

    max_code (layers, 1, columns); order: that in which columns are taken, (layers, columns).
    """
    weight = take_columns(p.weight, order)
    step = take_columns(step_sizes(q), order)
    max_code = take_columns(max_code, order)
    columns = weight.size(2)
    factor = hessian_factor(p.hessian, order)
    identity = torch.eye(columns, device=factor.device)
    upper = torch.linalg.solve_triangular(factor, identity, upper=True)  # of the inverse Hessian
    codes = torch.empty_like(weight, dtype=torch.int8)
    state = torch.zeros_like(codes[..., 0], dtype=torch.long)  # (layers, rows)
    for start in range(0, columns, GPTQ_BLOCK):
        block = slice(start, start + GPTQ_BLOCK)
        later = slice(start + GPTQ_BLOCK, None)
        codes[..., block], errors, state = quantize_block(
            weight[..., block], upper[:, block, block], step[..., block], max_code[..., block], state)
        weight[..., later] -= errors @ upper[:, block, later]
    return q._replace(codes=take_columns(codes, order.argsort(1)))


def round_block(weight: Tensor, upper: Tensor, step: Tensor, max_code: Tensor, state: Tensor):
    """Codes of a block of columns, rounded in turn; errors over the diagonal of `upper`; `state`."""
    weight = weight.clone()
    codes = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for j in range(weight.size(2)):
        x = weight[..., j]
        scale = step[..., j]
        bound = max_code[..., j]
        code = (x / scale).round().clamp(-bound, bound)
        error = (x - scale * code) / upper[:, j, j, None]
        weight[..., j + 1:] -= error[..., None] * upper[:, j, None, j + 1:]
        codes[..., j] = code
        errors[..., j] = error
    return codes.to(torch.int8), errors, state


def trellis_block(weight: Tensor, upper: Tensor, step: Tensor, max_code: Tensor, state: Tensor):
    """Like round_block, by a Viterbi search from the rows' `state` (layers, rows); returns the final states.

    The best code sequences into each of the 8 states compete within the block, every one with its own errors.
    """
    layers, rows, columns = weight.shape
    device = weight.device
    states = len(TRELLIS_OFFSET)
    every_state = torch.arange(states, device=device)
    following = torch.tensor(TRELLIS_NEXT, device=device)
    # The two transitions 2 t + parity that lead into each state.
    arrivals = following.argsort(stable=True).view(states, 2)
    offset = torch.tensor(TRELLIS_OFFSET, device=device)[:, None]
    parity = torch.arange(2, device=device)
    cost = weight.new_full((layers, rows, states), math.inf)
    cost.scatter_(2, state[..., None], 0.0)
    paths = weight[:, :, None].repeat(1, 1, states, 1)  # weights less the errors on the way into each state
    history = []
    for j in range(columns):
        scale = step[..., j, None, None]
        bound = max_code[..., j, None, None]
        x = paths[..., 0, None] / scale - offset  # (layers, rows, states, 1)
        nearest = 2 * ((x - parity) / 2).round() + parity  # of either parity: (layers, rows, states, 2)
        code = nearest.minimum(bound - 1 + parity).maximum(-bound + 1 - parity)
        error = (x - code) * scale / upper[:, j, j, None, None, None]
        total = (cost[..., None] + error.square()).flatten(2)  # (layers, rows, transitions)
        cost, better = total[..., arrivals].min(-1)
        transition = arrivals[every_state, better]  # (layers, rows, states)
        code = code.flatten(2).gather(2, transition)
        error = error.flatten(2).gather(2, transition)
        parent = transition // 2
        history.append((code, error, parent))
        paths = paths[..., 1:]
        paths = paths.gather(2, parent[..., None].expand_as(paths))
        paths -= error[..., None] * upper[:, j, None, None, j + 1:]

    final = at = cost.argmin(2, keepdim=True)
    codes = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for j in reversed(range(columns)):
        code, error, parent = history[j]
        codes[..., j] = code.gather(2, at)[..., 0]
        errors[..., j] = error.gather(2, at)[..., 0]
        at = parent.gather(2, at)
    return codes.to(torch.int8), errors, final[..., 0]


# --- The published quantizer


def quantize_published(problems: Problems, s: Settings) -> QuantizedRoles:
    """What #1787 to #2140 did: GPTQ with rounding, AWQ-lite, LQER corrections.

    A row's step is its role's clip_sigmas deviations over the largest code, in float16. GPTQ takes the
    columns with the largest inputs first.
    """
    spared = choose_awq_columns(problems, s)
    quantized = {}
    for name, p in problems.items():
        largest = 2 ** (p.role.bits - 1) - 1
        max_code = torch.full_like(p.inputs, largest)  # (layers, columns)
        max_code[spared[name]] = 2 ** (s.awq_lite_bits - 1) - 1
        row_scale = float16_scale(p.role.clip_sigmas * p.weight.std(2) / largest)
        q = Quantized(None, row_scale, largest / max_code, {})
        quantized[name] = gptq(p, q, max_code[:, None], p.by_input, round_block)
    if s.lqer_enabled:
        correct_largest_errors(problems, quantized, s)
    return quantized


def choose_awq_columns(problems: Problems, s: Settings) -> dict[str, Tensor]:
    """AWQ-lite: masks (layers, columns) of the AWQ_LITE_GROUP_TOP_K groups of columns with AWQ_LITE_BITS.

    Like AWQ (Lin et al. 2023) it spares columns by their activations, here by the input's root mean square
    times the weights' mean magnitude, and with more bits instead of a scale.
    """
    size = s.awq_lite_group_size
    candidates = []
    for name, p in problems.items():
        if not s.awq_lite_enabled or s.awq_lite_bits <= p.role.bits:
            continue
        input_rms = (p.inputs / p.visits[:, None]).sqrt()
        saliency = input_rms * p.weight.abs().mean(1)  # (layers, columns)
        totals = saliency.unfold(1, size, size).sum(2)  # (layers, groups)
        for layer, row in enumerate(totals.tolist()):
            for i, total in enumerate(row):
                candidates.append((total, name, layer, i * size))
    candidates.sort(key=lambda candidate: -candidate[0])
    spared = {name: torch.zeros_like(p.inputs, dtype=torch.bool) for name, p in problems.items()}
    for _, name, layer, first in candidates[:s.awq_lite_group_top_k]:
        spared[name][layer, first:first + size] = True
    return spared


def correct_largest_errors(problems: Problems, quantized: QuantizedRoles, s: Settings) -> None:
    """LQER: give the LQER_TOP_K matrices with the largest errors, by their norm, a correction, in place."""
    candidates = []
    for name, p in problems.items():
        errors = p.weight - dequantize(quantized[name])
        for layer, error in enumerate(errors):
            candidates.append((float(error.norm()), name, layer, error))
    candidates.sort(key=lambda candidate: -candidate[0])
    for _, name, layer, error in candidates[:s.lqer_top_k]:
        quantized[name].low_rank[layer] = fit_low_rank(error, s)


def fit_low_rank(error: Tensor, s: Settings) -> LowRank:
    """`error` (rows, columns) as a product of two thin integer matrices (LQER, Zhang et al. 2024).

    The left one holds -2 .. 1 with one scale, the right one -8 .. 7 with a scale per LQER_ASYM_GROUP values.
    """
    left, right = top_singular(error, s.lqer_rank)
    left_codes, left_scale = round_rows(left.reshape(1, -1), -2, 1)
    right_codes, right_scale = round_rows(right.reshape(-1, s.lqer_asym_group), -8, 7)
    return LowRank(left_codes.view_as(left), left_scale, right_codes.view_as(right), right_scale)


def round_rows(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes low .. high of `values` (..., columns), and a scale for each row, (...,).

    A row's largest magnitude lies half of low .. high away from 0.
    """
    scale = float16_scale(values.abs().amax(-1) / ((high - low) / 2))
    codes = (values / scale.float()[..., None]).round()
    return codes.clamp(low, high).to(torch.int8), scale


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (rows, rank), right (rank, columns), the best approximation; right has orthonormal rows."""
    wide = matrix.size(0) < matrix.size(1)
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram.double())[1]  # by rising eigenvalue
    vectors = vectors[:, -rank:].flip(1).float()
    if not wide:
        return matrix @ vectors, vectors.T
    right = vectors.T @ matrix
    sizes = right.norm(dim=1).clamp(min=1e-30)
    return vectors * sizes, right / sizes[:, None]


# --- The record's quantizer


class LossSteps(NamedTuple):
    """The steps of one role with quantize_by_loss, but for the factor that all roles share."""

    row_octaves: Tensor  # (layers, rows): log2 of the rows' steps without that factor
    min_octaves: Tensor  # (layers, rows): finer, and int8 would not hold the codes
    max_octaves: Tensor  # (layers, rows): coarser than twice the row's deviation, rounding only adds noise
    column_scale: Tensor  # (layers, columns) int8, as in Quantized


def steps_by_loss(p: Problem) -> LossSteps:
    """Steps such that every weight adds the same predicted loss.

    Row r's step goes with curvature[r]^(-1/2), and column j's with the inverse of what the columns after it
    cannot make up of its error, the diagonal of the Hessian's factor. At high rates that spends bits best
    (reverse water-filling, Cover & Thomas, Elements of Information Theory, section 10.3).
    """
    diagonal = hessian_factor(p.hessian, p.by_input).diagonal(dim1=1, dim2=2)
    residual = diagonal.log2().gather(1, p.by_input.argsort(1))
    level = residual.mean(1, keepdim=True)
    column_octaves = (level - residual).clamp(-4, 4)
    column_scale = (column_octaves * COLUMN_SCALES_PER_OCTAVE).round().to(torch.int8)
    column = grid_value(column_scale, COLUMN_SCALES_PER_OCTAVE)
    largest = (p.weight.abs() / column[:, None]).amax(2)
    return LossSteps(
        row_octaves=-0.5 * p.curvature.clamp(min=1e-30).log2() - level,
        min_octaves=(largest / 120).clamp(min=SMALLEST_SCALE).log2(),
        max_octaves=p.weight.std(2).clamp(min=SMALLEST_SCALE).log2() + 1,
        column_scale=column_scale)


def quantize_by_loss(problems: Problems, steps: dict[str, LossSteps], octaves: float) -> QuantizedRoles:
    """Steps 2^octaves times those of steps_by_loss, on a logarithmic grid; GPTQ on a trellis."""
    quantized = {}
    for name, p in problems.items():
        row_octaves, min_octaves, max_octaves, column_scale = steps[name]
        row_octaves = (row_octaves + octaves).minimum(max_octaves).maximum(min_octaves)
        row_scale = (row_octaves * SCALES_PER_OCTAVE).round().to(torch.int16)
        q = Quantized(None, row_scale, column_scale, {})
        max_code = torch.full_like(p.inputs[:, None], 127)
        quantized[name] = gptq(p, q, max_code, trellis_order(column_scale), trellis_block)
    return quantized


def octaves_for(bits: float, steps: dict[str, LossSteps]) -> float:
    """log2 of the common factor at which codes take about so many bits, were their rows normal."""
    total, count = 0.0, 0
    for row_octaves, _, max_octaves, column_scale in steps.values():
        columns = column_scale.size(1)
        deviation = max_octaves - 1
        total += columns * float((deviation - row_octaves).sum())
        count += columns * deviation.numel()
    return total / count + GAUSSIAN_BITS - bits


def quantize_to_size(problems: Problems, pack: Callable, max_bytes: int) -> tuple[QuantizedRoles, bytes]:
    """quantize_by_loss with the steps at which the bytes that `pack` makes end just below `max_bytes`.

    A secant search on the packed size, until less than SPARE_BYTES are left. Returns the last result that
    fits, with its bytes; if none does, the last one.
    """
    steps = {name: steps_by_loss(p) for name, p in problems.items()}
    weights = sum(p.weight.numel() for p in problems.values())
    finest = octaves_for(MAX_BITS, steps)
    octaves = max(finest, octaves_for(8 * max_bytes / weights, steps))
    bytes_per_octave = weights / 8  # a bit of each weight, while every step is below its row's deviation
    best = before = None
    for _ in range(6):
        quantized = quantize_by_loss(problems, steps, octaves)
        packed = pack(quantized)
        bytes_left = max_bytes - len(packed)
        if bytes_left >= 0:
            best = quantized, packed
            if bytes_left < SPARE_BYTES or octaves == finest:
                break
        if before:
            slope = (before[1] - len(packed)) / (octaves - before[0])
            bytes_per_octave = max(bytes_per_octave / 8, slope)
        before = octaves, len(packed)
        octaves = max(finest, octaves - (bytes_left - SPARE_BYTES / 3) / bytes_per_octave)
    return best or (quantized, packed)


# ============================================================================================================
# 8. Artifact
# ============================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFART", 3
ARTIFACT_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, table bytes, payload bytes, SHA-256 of both
SIZE_CAP = 16_000_000
# Codes of a spread of 2^((class - SPREAD_OFFSET) / SPREADS_PER_OCTAVE) share a table of symbol frequencies.
SPREADS = 64
SPREADS_PER_OCTAVE = 4
SPREAD_OFFSET = 24
PERGROUP_SORTED = ("tok_emb.codes", "attn.c_q.codes", "mlp.fc.codes")
PACKED_SCRIPT = globals().get("PACKED_SCRIPT")  # its own path, set by the loader of a packed script


@functools.cache
def packed_code() -> bytes:
    """The one script that a submission ships; its length is what the code counts for.

    A packed script returns itself: it is packed without the lines marked `not shipped`.
    """
    if PACKED_SCRIPT:
        with open(PACKED_SCRIPT, "rb") as file:
            return file.read()
    from tools import pack_submission  # not shipped
    return pack_submission.packed_code()  # not shipped


class OverCapError(Exception):
    """The finished run is too long or its artifact too large for a record."""


# What reading a damaged or forged file can raise on the way: RuntimeError by lrzip and for deep nesting.
UNREADABLE = (brotli.error, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError,
              RuntimeError)


def require(condition: bool) -> None:
    """Raise one of UNREADABLE unless what was read is what this program writes."""
    if not condition:
        raise ValueError


# --- Layout: which arrays an artifact holds


Arrays = dict[str, np.ndarray]  # by name
Specs = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of arrays, by name


def layout(model: GPT, quantization: dict | None) -> Specs:
    """Every array of an artifact, in order: the writer fills exactly these, a reader accepts no other.

    quantization: what the table says of it, None for a checkpoint.
    """
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if quantization is None:
        return {name: ("float32", shape) for name, shape in parameters.items()}
    by_loss = quantization["step_rule"] == "loss"
    rank, group = quantization["lqer"]
    specs = {}
    for name, role in matrix_roles(model.settings).items():
        layers, rows, columns = role.weights(model).shape
        specs[f"{name}.codes"] = "int8", (layers, rows, columns)
        specs[f"{name}.row_scale"] = "int16" if by_loss else "float16", (layers, rows)
        specs[f"{name}.column_scale"] = "int8" if by_loss else "float32", (layers, columns)
        for matrix in (f"{name}.{layer}" for layer in range(layers)):
            if matrix in quantization["corrected"]:
                specs[f"{matrix}.left"] = "int8", (rows, rank)
                specs[f"{matrix}.left_scale"] = "float16", (1,)
                specs[f"{matrix}.right"] = "int8", (rank, columns)
                specs[f"{matrix}.right_scale"] = "float16", (rank * columns // group,)
        parameters.pop(role.stack, None)
    if quantization["int8_gates"]:
        shape = parameters.pop("attn_gate")
        specs["attn_gate.codes_by_row"] = "int8", shape
        specs["attn_gate.row_scale"] = "float16", shape[:2]
    for name, shape in parameters.items():
        specs[name] = "float16", shape
    return specs


def artifact_arrays(model: GPT, quantized: QuantizedRoles, s: Settings) -> tuple[dict, Arrays]:
    """What the table says of the quantization, and every array of the artifact."""
    tensors = {name: parameter.half() for name, parameter in model.named_parameters()}
    if s.gated_attn_quant_gate:
        codes, scale = round_rows(model.attn_gate, -127, 127)
        tensors |= {"attn_gate.codes_by_row": codes, "attn_gate.row_scale": scale}
    corrected = []
    for name, q in quantized.items():
        tensors[f"{name}.codes"] = q.codes
        tensors[f"{name}.row_scale"] = q.row_scale
        tensors[f"{name}.column_scale"] = q.column_scale
        for layer, correction in q.low_rank.items():
            corrected.append(f"{name}.{layer}")
            tensors |= {f"{name}.{layer}.{part}": tensor for part, tensor in correction._asdict().items()}
    quantization = dict(step_rule=s.step_rule, lqer=[s.lqer_rank, s.lqer_asym_group], corrected=corrected,
                        int8_gates=s.gated_attn_quant_gate)
    return quantization, {name: tensors[name].detach().cpu().contiguous().numpy()
                          for name in layout(model, quantization)}


@torch.no_grad()
def install(model: GPT, table: dict, arrays: Arrays, s: Settings) -> bool:
    """Put the stored weights into the model; returns whether looping is on."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name, role in matrix_roles(s).items():
        if f"{name}.codes" not in tensors:  # a checkpoint
            continue
        codes, low_rank = tensors[f"{name}.codes"], {}
        for layer in range(len(codes)):
            if f"{name}.{layer}.left" in tensors:
                low_rank[layer] = LowRank(*(tensors[f"{name}.{layer}.{part}"] for part in LowRank._fields))
        q = Quantized(codes, tensors[f"{name}.row_scale"], tensors[f"{name}.column_scale"], low_rank)
        role.weights(model).copy_(dequantize(q))
    if "attn_gate.codes_by_row" in tensors:
        scale = tensors["attn_gate.row_scale"].float()
        tensors["attn_gate"] = tensors["attn_gate.codes_by_row"] * scale[..., None]
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
    return table["looping"]


# --- Codecs: arrays to byte streams and back


def split_codes(named: dict) -> tuple[dict, dict]:
    """Arrays or specs by name: those of all roles' codes, and the others."""
    codes = {name: value for name, value in named.items() if name.endswith(".codes")}
    rest = {name: value for name, value in named.items() if name not in codes}
    return codes, rest


def total_bytes(specs: Specs) -> int:
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in specs.values())


def byte_planes(array: np.ndarray) -> bytes:
    """An array's bytes with the low bytes of all values first, then the next."""
    values = np.ascontiguousarray(array).view(np.uint8)
    return values.reshape(array.size, array.itemsize).T.tobytes()


def pack_arrays(arrays: Arrays) -> bytes:
    return b"".join(byte_planes(array) for array in arrays.values())


def unpack_arrays(raw: bytes, specs: Specs) -> Arrays:
    """Undo `pack_arrays` for arrays of these specs."""
    require(len(raw) == total_bytes(specs))
    arrays, start = {}, 0
    for name, (dtype, shape) in specs.items():
        size, width = math.prod(shape), np.dtype(dtype).itemsize
        planes = np.frombuffer(raw, np.uint8, size * width, start).reshape(width, size)
        arrays[name] = planes.T.copy().view(dtype).reshape(shape)
        start += size * width
    return arrays


def compress(arrays: Arrays) -> bytes:
    return brotli.compress(pack_arrays(arrays), quality=11, lgwin=24)


def decompress(packed: bytes, specs: Specs) -> Arrays:
    """Undo `compress`; never makes more bytes than the specs promise."""
    max_bytes = total_bytes(specs) + 1
    return unpack_arrays(brotli.Decompressor().process(packed, output_buffer_limit=max_bytes), specs)


class OneStreamCodec(NamedTuple):
    """All arrays in one stream."""

    compress: Callable[[Arrays], bytes]
    decompress: Callable[[bytes, Specs], Arrays]

    def pack(self, arrays: Arrays) -> list[bytes]:
        return [self.compress(arrays)]

    def unpack(self, streams: list[bytes], specs: Specs) -> Arrays:
        [stream] = streams
        return self.decompress(stream, specs)


def spread_classes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of rows (layers, rows) and columns (layers, columns), int8; a code's class is the sum of both.

    Their factors are fitted to the codes' second moments by alternation.
    """
    squares = codes.float().square() + 1e-3
    row, column = squares.mean(2), torch.ones_like(squares[:, 0])
    for _ in range(4):
        by_row = 1 / row
        column = (by_row[:, None] @ squares)[:, 0] / codes.size(1)
        column = column / column.log().mean(1, keepdim=True).exp()
        by_column = 1 / column
        row = (squares @ by_column[..., None])[..., 0] / codes.size(2)
    classes = [0.5 * factor.log2() * SPREADS_PER_OCTAVE for factor in (row, column)]  # of a square's root
    return classes[0].round().to(torch.int8), classes[1].round().to(torch.int8)


class EntropyCodec:
    """Asymmetric numeral systems (Duda 2009) over the codes, brotli over the rest.

    A code's spread is modelled as row factor x column factor; codes of one class of spread share frequencies.
    """

    def pack(self, arrays: Arrays) -> list[bytes]:
        codes, stored = split_codes(arrays)
        for name, stack in codes.items():
            row, column = spread_classes(torch.from_numpy(stack))
            stored[name + ".row_class"] = row.numpy()
            stored[name + ".column_class"] = column.numpy()
        classes = self.classes_of(codes, stored)
        symbols = np.concatenate([stack.ravel() for stack in codes.values()])
        cells = classes.astype(np.int32) * 256 + symbols + 128
        counts = np.bincount(cells, minlength=SPREADS * 256).reshape(SPREADS, 256)
        totals = counts.sum(1, keepdims=True)
        shares = counts / totals.clip(min=1)
        stored["table"] = np.ceil(shares * 65535).astype(np.uint16)  # not 0 where a symbol occurs

        coder = constriction.stream.stack.AnsCoder()
        ordered = symbols[np.argsort(classes, kind="stable")]
        models, end = self.models_of(stored["table"]), len(ordered)
        for spread, (lowest, model) in reversed(models.items()):  # the coder is a stack: last in, first out
            start = end - int(totals[spread, 0])
            coder.encode_reverse(ordered[start:end].astype(np.int32) - lowest, model)
            end = start
        return [coder.get_compressed().astype("<u4").tobytes(), compress(stored)]

    def unpack(self, streams: list[bytes], specs: Specs) -> Arrays:
        coded, packed = streams
        codes, stored = split_codes(specs)
        for name, (_, (layers, rows, columns)) in codes.items():
            stored[name + ".row_class"] = "int8", (layers, rows)
            stored[name + ".column_class"] = "int8", (layers, columns)
        stored["table"] = "uint16", (SPREADS, 256)
        arrays = decompress(packed, stored)
        classes = self.classes_of(codes, arrays)
        totals = np.bincount(classes, minlength=SPREADS)
        models = self.models_of(arrays["table"])
        require(set(np.flatnonzero(totals)) == set(models))

        words = np.frombuffer(coded, "<u4").astype(np.uint32)
        coder = constriction.stream.stack.AnsCoder(words)
        decoded = []
        for spread, (lowest, model) in models.items():
            symbols = coder.decode(model, int(totals[spread])) + lowest
            decoded.append(symbols.astype(np.int8))
        require(coder.is_empty())
        symbols = np.empty(len(classes), np.int8)
        # Back to where `pack` took them from.
        symbols[np.argsort(classes, kind="stable")] = np.concatenate(decoded)
        for name, (_, shape) in codes.items():
            stack, symbols = np.split(symbols, [math.prod(shape)])
            arrays[name] = stack.reshape(shape)
        return {name: arrays[name] for name in specs}

    def classes_of(self, codes: dict, stored: Arrays) -> np.ndarray:
        """The class, uint8 below SPREADS, of every code of the stacks named in `codes`, one after another."""
        classes = []
        for name in codes:
            row, column = stored[name + ".row_class"], stored[name + ".column_class"]
            sums = row[:, :, None].astype(np.int16) + column[:, None] + SPREAD_OFFSET
            classes.append(sums.clip(0, SPREADS - 1).astype(np.uint8).ravel())
        return np.concatenate(classes)

    def models_of(self, table: np.ndarray) -> dict[int, tuple]:
        """For each class in use its lowest symbol and constriction's model of the symbols from there on."""
        models = {}
        for spread in np.flatnonzero(table.any(1)):
            used = np.flatnonzero(table[spread])
            frequencies = table[spread, used[0]:used[-1] + 1]
            weights = frequencies * 1000.0 + 1  # whole numbers, whose sum is exact on every machine
            if len(weights) == 1:
                weights = np.append(weights, 1.0)  # a model needs two symbols
            model = constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)
            models[int(spread)] = int(used[0]) - 128, model
        return models


def order0_bytes(integers: Tensor) -> float:
    """What integers cost where their frequencies are known."""
    _, counts = integers.unique(return_counts=True)
    shares = counts / counts.sum()
    return float(-(counts * shares.log2()).sum() / 8)


def similarity_order(codes: Tensor) -> np.ndarray:
    """Row order (layers, rows) of a greedy walk from row 0, each time to the nearest unused row (L1)."""
    wide = codes.to("cuda" if torch.cuda.is_available() else "cpu").float()
    layers, rows, _ = wide.shape
    which = torch.arange(layers, device=wide.device)
    order = torch.zeros(layers, rows, dtype=torch.long, device=wide.device)
    used = torch.zeros(layers, rows, dtype=torch.bool, device=wide.device)
    used[:, 0] = True
    for step in range(1, rows):
        last = wide[which, order[:, step - 1]]
        distance = torch.cdist(last[:, None], wide, p=1)[:, 0]  # whole numbers: exact on every machine
        order[:, step] = distance.masked_fill(used, math.inf).argmin(1)
        used[which, order[:, step]] = True
    return order.cpu().numpy()


def lrzip(data: bytes, *arguments: str, max_bytes: int = 1 << 30) -> bytes:
    """Run the program lrzip over `data`; raises RuntimeError if it fails or makes more than `max_bytes`."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "in.lrz")
        result = os.path.join(folder, "out")
        with open(source, "wb") as file:
            file.write(data)
        command = ["prlimit", f"--fsize={max_bytes}", "lrzip", "-q", *arguments, "-o", result, source]
        try:
            subprocess.run(command, check=True, timeout=600, capture_output=True, stdin=subprocess.DEVNULL)
            with open(result, "rb") as file:
                return file.read()
        except (subprocess.SubprocessError, OSError) as error:
            raise RuntimeError(f"lrzip {' '.join(arguments)} failed: {error}") from None


class PergroupCodec:
    """Each role's codes, column after column through lrzip's ZPAQ; brotli for the rest.

    The compressor of #2135. The rows of some roles are sorted so that neighbours resemble each other.
    """

    def pack(self, arrays: Arrays) -> list[bytes]:
        all_codes, rest = split_codes(arrays)
        streams = []
        for name, codes in all_codes.items():
            if name in PERGROUP_SORTED:
                order = similarity_order(torch.from_numpy(codes))
                codes = np.take_along_axis(codes, order[..., None], 1)
                rest[name + ".order"] = order.astype(np.uint16)
            text = codes.transpose(0, 2, 1).tobytes()  # columns: their neighbours are alike after the sort
            streams.append(lrzip(text, "-z", "-L", "9"))
        return [*streams, compress(rest)]

    def unpack(self, streams: list[bytes], specs: Specs) -> Arrays:
        *coded, packed = streams
        codes, rest = split_codes(specs)
        for name, (_, shape) in codes.items():
            if name in PERGROUP_SORTED:
                rest[name + ".order"] = "uint16", shape[:2]
        arrays = decompress(packed, rest)
        for (name, (_, shape)), stream in zip(codes.items(), coded, strict=True):
            layers, rows, columns = shape
            raw = lrzip(stream, "-d", max_bytes=math.prod(shape))
            stack = np.frombuffer(raw, np.int8).reshape(layers, columns, rows).transpose(0, 2, 1)
            if name in PERGROUP_SORTED:
                order = arrays[name + ".order"].astype(np.int64)
                require((np.sort(order, 1) == np.arange(rows)).all())  # a permutation
                stack = np.take_along_axis(stack, order.argsort(1)[..., None], 1)
            arrays[name] = np.ascontiguousarray(stack)
        return {name: arrays[name] for name in specs}


CODECS = {
    "entropy": EntropyCodec(),
    "pergroup": PergroupCodec(),
    "brotli": OneStreamCodec(compress, decompress),
    "none": OneStreamCodec(pack_arrays, unpack_arrays),  # of checkpoints
}


# --- The file


def container(table: dict, arrays: Arrays, compressor: str) -> bytes:
    """Named arrays and their table in one byte string. Nothing in it is code.

    Header; table (JSON under brotli: function, looping and quantization as the caller gives them, the
    compressor, name, dtype and shape of each array, lengths of the streams); streams.
    """
    streams = CODECS[compressor].pack(arrays)
    specs = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    lengths = [len(stream) for stream in streams]
    table = table | dict(compressor=compressor, arrays=specs, streams=lengths)
    text = json.dumps(table, separators=(",", ":"))
    packed_table = brotli.compress(text.encode())
    payload = b"".join(streams)
    digest = hashlib.sha256(packed_table + payload).digest()
    header = ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed_table), len(payload), digest)
    return header + packed_table + payload


def write_container(path: str, table: dict, arrays: Arrays, compressor: str) -> None:
    """Write the container to `path`, all or nothing."""
    write_whole(path, container(table, arrays, compressor))


def read_container(path: str, model: GPT, s: Settings) -> tuple[dict, Arrays]:
    """Table and arrays of the file `path`; raises InputError if it is missing or open_container raises it."""
    parameters = sum(p.numel() for p in model.parameters())
    max_bytes = 5 * parameters + (4 << 20)  # a checkpoint has 4 for each; no more of a forged file is read
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes)
    except OSError as error:
        remedy = "train first, or set ARTIFACT_DIR to its folder"
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None
    return open_container(data, path, model, s)


def open_container(data: bytes, path: str, model: GPT, s: Settings) -> tuple[dict, Arrays]:
    """Undo `container`; nothing in the data is executed, and nothing larger than the model is allocated.

    Raises InputError, naming `path`, if it is damaged or was made for another function than the settings'.
    """
    try:
        table, payload = open_envelope(data)
        check_function(dict(table["function"]), path, s)
        specs = check_table(table, model)
        # lrzip is no parser that strangers' bytes should reach unasked.
        if table["compressor"] == "pergroup" != s.compressor:
            remedy = "set COMPRESSOR=pergroup if you trust the file"
            raise InputError(f"COMPRESSOR: {path} needs the program lrzip; {remedy}")
        ends = list(itertools.accumulate(table["streams"], initial=0))
        require(ends[-1] == len(payload))
        streams = [payload[start:end] for start, end in itertools.pairwise(ends)]
        arrays = CODECS[table["compressor"]].unpack(streams, specs)
        check_values(arrays)
    except UNREADABLE:
        damage = f"no whole artifact of version {ARTIFACT_VERSION}"
        raise InputError(f"{path}: {damage}; copy it again or train again") from None
    return table, arrays


def open_envelope(data: bytes) -> tuple[dict, bytes]:
    """Table and payload of a whole file of this version."""
    body = data[ARTIFACT_HEADER.size:]
    magic, version, table_bytes, payload_bytes, digest = ARTIFACT_HEADER.unpack_from(data)
    require((magic, version) == (ARTIFACT_MAGIC, ARTIFACT_VERSION))
    require(len(body) == table_bytes + payload_bytes)
    require(hashlib.sha256(body).digest() == digest)
    # A megabyte holds any table of ours; a forged one could swell to gigabytes.
    text = brotli.Decompressor().process(body[:table_bytes], output_buffer_limit=1 << 20)
    return json.loads(text), body[table_bytes:]


def check_function(made_with: dict, path: str, s: Settings) -> None:
    """Raise InputError, a line for each setting, unless the file was made for the settings' function.

    A setting that the file does not name came after the file, which has its default.
    """
    ours = s.function_settings()
    problems = []
    for name, theirs in ({name: getattr(Settings, name) for name in ours} | made_with).items():
        if name not in ours:
            problems.append(f"{path}: made with {printable(name).upper()}={printable(theirs)}, which is no "
                            "setting here; use the script that made it")
        elif theirs != ours[name]:
            made = f"{path} was made with {printable(theirs)}"
            problems.append(f"{name.upper()}: {ours[name]}, but {made}; set it to that")
    if problems:
        raise InputError("\n".join(problems))


def printable(value) -> str:
    """A value from a stranger's file, fit for a terminal."""
    return re.sub(r"[^\w.+-]", "?", str(value)[:40], flags=re.A)


def check_table(table: dict, model: GPT) -> Specs:
    """The layout that the table describes; raises one of UNREADABLE if this program writes no such table."""
    s = model.settings
    looping, quantization = table["looping"], table["quantization"]
    require(type(looping) is bool and (s.num_loops > 0 or not looping))
    if quantization is None:
        require(table["compressor"] == "none")
    else:
        rank, group = quantization["lqer"]
        require(type(rank) is type(group) is int and 1 <= rank <= 64 and group >= 1)
        groups_fit = all(rank * columns % group == 0 for columns in (s.model_dim, s.mlp_dim))
        require(groups_fit or not quantization["corrected"])
        require(quantization["step_rule"] in ("loss", "sigma"))
    specs = layout(model, quantization)
    require(table["arrays"] == json.loads(json.dumps(specs)))
    return specs


def check_values(arrays: Arrays) -> None:
    """Raise one of UNREADABLE where a weight would be infinite or reach 2^30."""
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            require(np.isfinite(array).all())
        if array.dtype == np.int16:
            require(np.abs(array.astype(np.int32)).max() <= 30 * SCALES_PER_OCTAVE)
        if name.endswith(".column_scale") and array.dtype == np.float32:
            require((array > 0).all() and (array <= 1).all())


@torch.no_grad()
def save_artifact(model: GPT, looping: bool, statistics: Statistics | None, code: int, s: Settings,
                  log: RunLog) -> None:
    """Quantize the model, code it, decode it again and compare, write the artifact, log every matrix.

    With STEP_RULE=loss the steps are chosen so that artifact and `code` bytes end just below TARGET_BYTES.
    """
    began = time.perf_counter()
    sort_hidden_units(model, statistics)
    problems = build_problems(model, statistics)

    def pack(quantized: QuantizedRoles) -> bytes:
        quantization, arrays = artifact_arrays(model, quantized, s)
        table = dict(function=s.function_settings(), looping=looping, quantization=quantization)
        return container(table, arrays, s.compressor)

    if s.step_rule == "sigma":
        quantized = quantize_published(problems, s)
        data = pack(quantized)
    else:
        quantized, data = quantize_to_size(problems, pack, s.target_bytes - code)
        total_bytes = len(data) + code
        if total_bytes > s.target_bytes:
            log.event("target_missed", target_bytes=s.target_bytes, total_bytes=total_bytes)
    packed = time.perf_counter()
    _, decoded = open_container(data, s.artifact_path, model, s)
    finished = time.perf_counter()
    # The search may have gone on after this result, so its arrays are made once more.
    _, arrays = artifact_arrays(model, quantized, s)
    if any(decoded[name].tobytes() != array.tobytes() for name, array in arrays.items()):
        raise AssertionError(f"COMPRESSOR={s.compressor} does not give back what it got; nothing was written")
    write_whole(s.artifact_path, data)
    predicted_loss = log_matrices(problems, quantized, s, log)
    log.result("artifact", file=s.artifact_path, compressor=s.compressor, seconds=round(packed - began, 1),
               unpacking_seconds=round(finished - packed, 1), predicted_loss=predicted_loss,
               round_trip="exact")


def log_matrices(problems: Problems, quantized: QuantizedRoles, s: Settings, log: RunLog) -> float | None:
    """Log what became of every matrix; returns the predicted loss in nats per token, or None."""
    total_loss = 0.0
    for name, q in quantized.items():
        p = problems[name]
        losses = p.predicted_loss(p.weight - dequantize(q))
        total_loss += float(losses.sum())
        for i, codes in enumerate(q.codes):
            rows, columns = codes.shape
            code_bytes = order0_bytes(codes)
            full_name = name if name == "tok_emb" else f"blocks.{i}.{name}"
            predicted_loss = float(f"{losses[i]:.4g}") if q.by_loss else None
            log.event("matrix", name=full_name, rows=rows, columns=columns, predicted_loss=predicted_loss,
                      bits_per_weight=round(8 * code_bytes / codes.numel(), 4), bytes=round(code_bytes),
                      lqer=i in q.low_rank)
    return round(total_loss, 6) if s.step_rule == "loss" else None


# ============================================================================================================
# 9. Evaluation
# ============================================================================================================


def evaluation_windows(tokens: np.ndarray, s: Settings) -> np.ndarray:
    """Pieces of tokens[:-1] that plain evaluation reads, (windows, 3): begin, end, the first that it scores.

    Together they score every target once. None crosses a document border. With EVAL_STRIDE=0 the windows of a
    long document are disjoint.
    """
    borders = [*document_starts(tokens[:-1]).tolist(), len(tokens) - 1]
    windows = []
    for start, document_end in itertools.pairwise(borders):
        later = range(start + s.eval_seq_len, document_end, s.eval_stride or s.eval_seq_len)
        for first_scored, end in itertools.pairwise([start, *later, document_end]):
            begin = max(start, end - s.eval_seq_len) if s.eval_stride else first_scored
            windows.append((begin, end, first_scored))
    return np.array(windows)


def pack(lengths: np.ndarray, capacity: int, most: int = 1 << 62) -> list[list[int]]:
    """Neighbouring pieces that share a forward pass: as many as fit into `capacity` tokens, at least one."""
    passes = []
    tokens = 0
    for index, length in enumerate(lengths.tolist()):
        if not passes or tokens + length > capacity or len(passes[-1]) == most:
            passes.append([])
            tokens = 0
        passes[-1].append(index)
        tokens += length
    return passes


class Evaluator:
    """Plain evaluation in bits per byte: the sum of -log2 p(token) over the bytes that the tokens stand for.

    Every target of the validation stream is scored once. The batches are the same for every number of ranks,
    which take them in turn; sums are float64.
    """

    def __init__(self, data: ValidationData, settings: Settings, runtime: Runtime):
        self.data = data
        self.settings = settings
        self.runtime = runtime
        self.windows = evaluation_windows(data.tokens, settings)
        self.batches = pack(self.windows[:, 1] - self.windows[:, 0], settings.eval_batch_tokens)
        self.targets = len(data.tokens) - 1
        self.bytes = int(data.bytes[1:].sum(dtype=np.int64))
        if not self.bytes:
            raise InputError(f"DATA_PATH: the validation tokens in {settings.shards_dir} stand for no bytes; "
                             "prepare the data again")
        self.rehearsed = set()

    def batch(self, index: int) -> tuple[Batch, Tensor]:
        """Batch `index`, padded to its fixed length, and the mask (T,) of the targets that it scores."""
        s = self.settings
        begin, end, first_scored = self.windows[self.batches[index]].T
        place, window = ranges(begin, end - begin)  # of each input
        padding = 0, s.eval_batch_tokens - len(place)
        inputs = np.pad(self.data.tokens[place].astype(np.int64), padding, constant_values=BOS_ID)
        targets = np.pad(self.data.tokens[place + 1].astype(np.int64), padding)
        scored = np.pad(place >= first_scored[window], padding)
        before = None
        if not s.smear_gate_bos_fix:
            # What leaks comes from the text, wherever a batch begins; else its packing would decide scores.
            before = np.where(place > 0, self.data.tokens[place - 1].astype(np.int64), -1)
            before = np.pad(before, padding, constant_values=-1)
        batch = make_batch(inputs, targets, np.cumsum(end - begin), s.eval_seq_len, before)
        return batch.to(self.runtime), torch.from_numpy(scored).to(self.runtime.device)

    @torch.no_grad()
    def score(self, model: GPT, looping: bool) -> dict:
        """val_loss (nats per token), val_bpb, targets, bytes and seconds (compilation not counted)."""
        if looping not in self.rehearsed:
            model.token_losses(*self.batch(0)[0], looping)
            self.rehearsed.add(looping)
        self.runtime.synchronize()
        began = time.perf_counter()
        nats = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for index in range(self.runtime.rank, len(self.batches), self.runtime.world_size):
            batch, scored = self.batch(index)
            losses = model.token_losses(*batch, looping)
            nats += (losses.double() * scored).sum()
        nats = self.runtime.sum(nats).item()
        seconds = round(time.perf_counter() - began, 3)
        return loss_and_bpb(nats, self.targets, self.bytes, "training diverged") | dict(seconds=seconds)


def loss_and_bpb(nats: float, targets: int, size: int, cause: str) -> dict:
    """Figures of nats summed over these targets, `size` bytes. FloatingPointError if they are not finite."""
    if not math.isfinite(nats):
        raise FloatingPointError(f"the validation loss is not finite: {cause}")
    return dict(val_loss=round(nats / targets, 8), val_bpb=round(nats / math.log(2) / size, 8),
                targets=targets, bytes=size)


# --- Score-first test-time training -------------------------------------------------------------------------
#
# Each chunk of a document is scored, then the document's adapters are trained on it. Four guarantees make the
# scores code lengths; each is named where it is kept:
#
#   C1 causal                a score depends on earlier tokens alone, in the order (step, slot, position)
#   C2 normalized            the tilted distribution sums to one
#   C3 score before update   no weight, adapter or count has seen a token that is still to be scored
#   C4 single pass           every target is scored once, each document from left to right
#
# From the Parameter Golf systems #1787 to #2140. Those score the longest document first but count hints in
# the order of the text, so that no decoder could follow; TTT_ORDER=stream keeps to one order.

class Step(NamedTuple):
    """What each slot does in one step of the schedule, (slots,). Positions count a document's targets."""

    document: np.ndarray  # its index, -1 for an idle slot
    begin: np.ndarray  # the chunk's first target, 0 where the document is new to the slot
    end: np.ndarray  # one past the chunk's last target if the document did not end; 0 for an idle slot


def ttt_schedule(lengths: np.ndarray, s: Settings):
    """Yield the Steps that score every target of documents of these `lengths` once (C4).

    The next document takes the first free slot: in corpus order with TTT_ORDER=stream, the longest first with
    TTT_ORDER=length. C1: a chunk's end follows from its begin; only TTT_ORDER=length lets it follow from the
    document's length. `lengths` is read after a step, when a decoder too knows which documents ended: at a
    BOS. In advance it must be told how many there are, and the length of the last, which no BOS ends.
    """
    documents = np.arange(len(lengths))
    if s.ttt_order == "length":
        documents = np.argsort(-lengths, kind="stable")
    waiting = iter(documents)
    slots = min(s.ttt_slots, len(lengths))
    document = np.full(slots, -1)
    end = np.zeros(slots, np.int64)
    while True:
        for slot, new in zip(np.flatnonzero(document < 0), waiting):
            document[slot] = new
        active = np.flatnonzero(document >= 0)
        if not len(active):
            return
        begin = end.copy()
        for slot in active:
            first_chunk = s.first_chunk(lengths[document[slot]])
            near = min(begin[slot] * s.ttt_chunk_growth, s.ttt_chunk_max)
            far = min((begin[slot] - 20_000) * s.ttt_far_growth, s.ttt_eval_seq_len / 4)
            end[slot] += max(first_chunk, int(max(near, far)) // first_chunk * first_chunk)
        yield Step(document.copy(), begin, end.copy())
        ended = end >= lengths[document]  # never in an idle slot, whose end is 0
        document[ended] = -1
        end[ended] = 0


class Rows(NamedTuple):
    """Chunks of R documents for one forward pass: T packed inputs, of which C are scored, row by row.

    Of the C targets n lie inside their documents; positions past a document's end are padded.
    """

    slots: Tensor  # (R,) int64, among this rank's slots
    continues: Tensor  # (R,) bool, whether the document continues after the chunk
    chunk_ratio: Tensor  # (R,) float32, length of the chunk over that of the document's first
    segments: Segments  # one for each row
    chunk_ends: Tensor  # (R,) int32, ends of the rows in C
    ids: Tensor  # (T,) int64
    key_places: Tensor | None  # (K,) int64, where in the cache the keys that they see lie; None without one
    own_keys: Tensor | None  # (T,) int64, which of the K are those of the inputs
    scored: Tensor  # (C,) int64, which of the T inputs are scored
    targets: Tensor  # (C,) int64
    weights: Tensor  # (C,) float32, of the losses: 1 / the chunk's length, 0 where the document ends
    hints: Tensor  # (C, experts) int64
    gate: Tensor  # (C, experts) bool, whether there is a hint
    boost: Tensor  # (C, experts) float32, as in Hints
    visible: Tensor  # (n,) int64, which of the C lie inside their documents
    stream_positions: np.ndarray  # (n,) where these targets lie in tokens[1:]


def ranges(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs first .. first + count - 1, one after another, and for each element the index of its run."""
    run = np.repeat(np.arange(len(counts)), counts)
    offset = firsts - np.cumsum(counts) + counts
    return np.arange(len(run)) + offset[run], run


class Text:
    """The text to be scored: its documents, n-gram hints, and the packed rows of every step."""

    def __init__(self, data: ValidationData, s: Settings, runtime: Runtime):
        self.tokens = data.tokens
        self.settings = s
        self.runtime = runtime
        count = len(data.tokens) - 1
        self.starts = document_starts(data.tokens[:-1])
        self.lengths = np.diff(self.starts, append=count)  # in targets
        documents = len(self.starts)
        self.own_slots = np.arange(runtime.rank, min(s.ttt_slots, documents), runtime.world_size)
        self.finished = np.zeros(documents, bool)
        # The numbers of finished documents at which a global phase is due.
        prefix, phases = s.phased_ttt_prefix_docs, s.phased_ttt_num_phases
        if s.ttt_order == "length":
            prefix = min(documents, prefix)  # as published
        self.phase_points = {prefix * (k + 1) // phases for k in range(phases)}

        self.counter = None
        if s.ngram_tilt_enabled and s.ngram_boost == "learned":
            self.counter = ngram.Experts(*s.expert_orders, s.ngram_table_bits, documents)
        elif s.ngram_tilt_enabled:
            self.counter = ngram.NgramState(s.token_order, s.token_threshold, s.token_boost)
        self.hints = ngram.no_hints(count, s.experts)  # of a step, or of the whole text
        self.first_hint = np.zeros(s.ttt_slots, np.int64)  # where each slot's begin
        self.hinted = 0  # targets with a hint so far

    def packed_steps(self):
        """Yield every Step of the schedule with the Rows of this rank's slots."""
        for step in ttt_schedule(self.lengths, self.settings):
            if self.settings.ngram_tilt_enabled:
                self.count_hints(step)
            yield step, list(self.pack(step))

    def count_hints(self, step: Step) -> None:
        """Take the hints of the step's targets, each from what precedes it in the order of scoring (C1, C3);
        fixed ones are all counted at the first step, in the text's order."""
        rows = self.rows(step)
        if self.settings.ngram_boost == "fixed":
            if self.counter:
                self.hints = self.counter.feed(self.tokens[:-1])
                self.hinted = int(self.hints.gate.sum())
                self.counter = None  # nothing is left to count
            self.first_hint = rows[:, 2]
            return
        self.hints = self.counter.ask(self.tokens, rows)
        self.hinted += int(self.hints.gate.any(1).sum())
        counts = rows[:, 3] - rows[:, 2]
        self.first_hint = np.cumsum(counts) - counts

    def rows(self, step: Step) -> np.ndarray:
        """Each slot's document, where it begins in the stream, and the first and one past the last target of
        its chunk, (slots, 4); no target in an idle slot."""
        begin = self.starts[step.document] + step.begin
        end = self.starts[step.document] + np.minimum(step.end, self.lengths[step.document])
        end = np.where(step.document < 0, begin, end)
        return np.stack((np.maximum(step.document, 0), self.starts[step.document], begin, end), 1)

    def pack(self, step: Step):
        """Yield the Rows of this rank's active slots, as many to one as TTT_MICRO_BATCH_TOKENS allows."""
        s = self.settings
        slots = np.flatnonzero(step.document[self.own_slots] >= 0)
        own = self.own_slots[slots]
        first = step.begin[own]  # of each row's inputs, in its document
        if s.ttt_context == "recompute":
            end = step.end[own]
            if s.ttt_order == "length":  # as published: the last window ends where its document does
                end = np.minimum(end, self.lengths[step.document[own]])
            first = np.maximum(0, end - s.ttt_eval_seq_len)
        # grouped_product takes fewer than 1,024 matrices
        for some in pack(step.end[own] - first, s.ttt_micro_batch_tokens, most=1000):
            yield self.pack_rows(step, slots[some], first[some])

    def pack_rows(self, step: Step, slots: np.ndarray, first: np.ndarray) -> Rows:
        """The Rows, on the device, of these slots (R,), given by their indices among this rank's.

        C1: what is past a document's end is padded with BOS, so that no shape depends on where it ends.
        """
        s = self.settings
        own = self.own_slots[slots]
        document, begin, end = [field[own] for field in step]
        start, length = self.starts[document], self.lengths[document]
        chunk, continues = end - begin, end < length
        first_chunk = [s.first_chunk(n) for n in length.tolist()]

        # (T,) of each input: its position in the document, its row, its place in the stream
        position, row = ranges(first, end - first)
        inside = position < length[row]
        place = np.where(inside, start[row] + position, 0)
        scored = np.flatnonzero(position >= begin[row])  # (C,)
        target, visible = place[scored], np.flatnonzero(inside[scored])  # (C,), (n,)
        hint = np.where(inside, self.first_hint[own][row] + position - begin[row], 0)[scored]
        ids = np.where(inside, self.tokens[place], BOS_ID)
        positions = position if s.ttt_context == "cache" else position - first[row]
        previous = np.where(inside & (positions > 0), self.tokens[place - 1].astype(np.int64), -1)

        def tensor(array, dtype=np.int64) -> Tensor:
            return self.runtime.to_device(torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)))

        def borders(sizes) -> Tensor:
            return tensor(np.append(0, np.cumsum(sizes)), np.int32)

        inputs = end - first  # of each row
        segments = Segments(borders(inputs), tensor(positions), int(inputs.max()), tensor(previous))
        key_places = own_keys = None
        if s.ttt_context == "cache":
            window = s.ttt_eval_seq_len
            oldest = np.maximum(0, end - window)
            keys = end - oldest  # of each row
            key_position, key_row = ranges(oldest, keys)  # (K,)
            key_places = tensor(slots[key_row] * window + key_position % window)
            own_keys = tensor(np.flatnonzero(key_position >= begin[key_row]))
            segments = segments._replace(keys_cu_seqlens=borders(keys), keys_max_seqlen=int(keys.max()))

        return Rows(
            slots=tensor(slots), continues=tensor(continues, bool),
            chunk_ratio=tensor(chunk / first_chunk, np.float32),
            segments=segments, chunk_ends=tensor(np.cumsum(chunk), np.int32), ids=tensor(ids),
            key_places=key_places, own_keys=own_keys, scored=tensor(scored),
            targets=tensor(self.tokens[target + 1]),
            weights=tensor((continues / chunk)[row[scored]], np.float32),
            hints=tensor(self.hints.ids[hint]),
            gate=tensor(self.hints.gate[hint] & inside[scored, None], bool),
            boost=tensor(self.hints.boost[hint], np.float32),
            visible=tensor(visible), stream_positions=target[visible])

    def phases_due(self, step: Step):
        """After a step, yield for each global phase that is due the documents completely scored by then (C3).

        None is due after the last. Adapters and cached context of documents under way stay.
        """
        before = self.finished.sum()
        self.finished[step.document[step.end >= self.lengths[step.document]]] = True
        finished = np.flatnonzero(self.finished)
        for point in self.phase_points:
            if before < point <= len(finished) < len(self.starts):
                yield finished

    def batch(self, inputs: np.ndarray, low: int = 0, high: int | None = None) -> Batch:
        """The tokens at these places of the stream, from number `low` to before `high`, and their targets.

        Segments go by document. What leaks across them with SMEAR_GATE_BOS_FIX=0 is the same for any part.
        """
        ids = self.tokens[inputs].astype(np.int64)
        before = None if self.settings.smear_gate_bos_fix else np.append(-1, ids[:-1])[low:high]
        ids = ids[low:high]
        targets = self.tokens[inputs[low:high] + 1].astype(np.int64)
        starts = np.flatnonzero(ids == BOS_ID)
        return make_batch(ids, targets, starts, self.settings.eval_seq_len, before).to(self.runtime)


class AdapterSite(NamedTuple):
    """Outputs of one of a block's products to which a low-rank adapter adds."""

    outputs: str  # how many they are, as Settings names that size
    scale: str = ""  # the GPT parameter (layers, rows) that scales them before they join the stream


# Every adapter but the head's, by the products that Layer names. To add one: a line here, and a setting
# TTT_<NAME>_LORA that switches it on; memory, gradients, updates and resets follow. Adapters of one product
# share its outputs, in this order and without a gap. Each reads the normalized input u (T, model_dim) of its
# half of the block: attention's at qkv and out, the MLP's at up and down.
ADAPTER_SITES = {
    "qkv": {"q": AdapterSite("model_dim"), "k": AdapterSite("kv_dim"), "v": AdapterSite("kv_dim")},
    "out": {"o": AdapterSite("model_dim", "attn_scale")},
    "up": {},
    "down": {"mlp": AdapterSite("model_dim", "mlp_scale")},
}


class Adapters:
    """Low-rank adapters (LoRA, Hu et al. 2021) of the documents in this rank's slots.

    There is a set for each block visit, and one at the head. Each adds alpha / r B A u to its outputs, before
    the residual scale or the soft cap. All A (r, in) of a slot, then all B (out, r), are one row of `value`
    (slots, n), float32; `work` is its copy in the compute dtype.
    """

    def __init__(self, model: GPT, visits: int, slots: np.ndarray, s: Settings, runtime: Runtime):
        self.model = model
        self.settings = s
        self.runtime = runtime
        # The outputs of each adapter, by name and block visit.
        self.sites = {(name, visit): getattr(s, site.outputs) for visit in range(visits)
                      for sites in ADAPTER_SITES.values() for name, site in sites.items()
                      if getattr(s, f"ttt_{name}_lora")}
        self.sites["head", 0] = s.vocab_size
        rank = s.ttt_lora_rank
        self.shapes = [(rank, s.model_dim)] * len(self.sites)  # of A, then of B
        self.shapes += [(outputs, rank) for outputs in self.sites.values()]
        self.sizes = [rows * columns for rows, columns in self.shapes]
        self.first_b = len(self.sites) * rank * s.model_dim
        shape = len(slots), sum(self.sizes)
        self.value = torch.zeros(shape, device=runtime.device)
        self.work = torch.zeros(shape, dtype=runtime.compute_dtype, device=runtime.device)
        self.square = torch.zeros(shape, device=runtime.device)  # AdamW's running mean of squared gradients
        self.count = torch.zeros(len(slots), device=runtime.device)  # its steps
        for row, slot in enumerate(slots.tolist()):
            self.value[row, :self.first_b] = self.drawn(slot)
        self.work.copy_(self.value)

    def drawn(self, key: int) -> Tensor:
        """Every A of a slot (n,), drawn uniformly from +-1/sqrt(in), seeded by (SEED, key)."""
        sequence = np.random.SeedSequence((self.settings.seed, key))
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits
        generator = torch.Generator(self.runtime.device).manual_seed(seed)
        bound = 1 / math.sqrt(self.settings.model_dim)
        return self.value.new_empty(self.first_b).uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def reset(self, rows: np.ndarray, documents: np.ndarray) -> None:
        """Start slots over for new documents: B and the optimizer's state are 0, A is kept or drawn anew; one
        with NaN or infinity in it is never kept."""
        index = self.runtime.to_device(torch.from_numpy(rows))
        for state in (self.value[:, self.first_b:], self.work[:, self.first_b:], self.square, self.count):
            state.index_fill_(0, index, 0)
        for row, document in zip(rows.tolist(), documents.tolist()):
            a = self.value[row, :self.first_b]
            keeps = self.settings.ttt_warm_start_a & a.isfinite().all()
            a.copy_(torch.where(keeps, a, self.drawn(document)))
            self.work[row, :self.first_b] = a

    def take(self, rows: Rows) -> None:
        """The next forward passes are those of these rows: their A and B become leaves of the graph."""
        parts = self.work[rows.slots].split(self.sizes, dim=1)
        self.leaves = [part.detach().unflatten(1, shape).requires_grad_()
                       for part, shape in zip(parts, self.shapes)]
        self.pairs = dict(zip(self.sites, zip(self.leaves, self.leaves[len(self.sites):])))
        self.row_ends = rows.segments.cu_seqlens[1:]

    def delta(self, site: tuple[str, int], u: Tensor, ends: Tensor) -> Tensor:
        """alpha / r B A u for packed inputs u (T, in), rows ending at `ends`: (T, out)."""
        a, b = self.pairs[site]
        low = grouped_product(u, a.mT, ends)  # (T, r)
        return self.settings.ttt_lora_alpha / self.settings.ttt_lora_rank * grouped_product(low, b.mT, ends)

    def at_visit(self, visit: int, layer: int) -> Callable:
        """The Layer.adapter of this visit."""
        def add(product: str, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
            sites = ADAPTER_SITES[product]
            if not any((name, visit) in self.pairs for name in sites):
                return y
            parts = list(y.split([getattr(self.settings, site.outputs) for site in sites.values()], dim=-1))
            for index, (name, site) in enumerate(sites.items()):
                if (name, visit) in self.pairs:
                    delta = self.delta((name, visit), u, self.row_ends)
                    if site.scale:
                        delta = (getattr(self.model, site.scale)[layer] * delta).to(y.dtype)
                    parts[index] = parts[index] + delta
            return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return add

    @torch.no_grad()
    def update(self, rows: Rows, gradients: tuple[Tensor, ...]) -> None:
        """One AdamW step, with these gradients of the leaves, for the rows whose documents continue."""
        s = self.settings
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
        count = self.count.index_add_(0, rows.slots, rows.continues.float())[rows.slots]
        rate = s.ttt_lora_lr * s.ttt_local_lr_mult * rows.chunk_ratio
        adamw_rows(self.value, self.work, self.square, rows.slots, rows.continues, flat, count, rate,
                   s.ttt_weight_decay, s.ttt_beta2)


class ContextCache:
    """Keys and values of each slot's last TTT_EVAL_SEQ_LEN tokens, as when scored: a ring per block visit."""

    def __init__(self, visits: int, slots: int, s: Settings, runtime: Runtime):
        shape = visits, 2, slots, s.ttt_eval_seq_len, s.num_kv_heads, s.head_dim
        self.rings = torch.zeros(shape, dtype=runtime.compute_dtype, device=runtime.device)

    def at_visit(self, visit: int, rows: Rows) -> Callable:
        """The Layer.context of this visit for these rows."""
        def context(k: Tensor, v: Tensor) -> list[Tensor]:
            return [WithPast.apply(own, ring, rows.key_places, rows.own_keys)
                    for own, ring in zip((k, v), self.rings[visit])]
        return context


class Learner(Hooks):
    """The documents in this rank's slots: adapters, cached context, and how they score and learn."""

    def __init__(self, model: GPT, looping: bool, slots: np.ndarray, s: Settings, runtime: Runtime):
        self.model = model
        self.looping = looping
        self.slots = slots
        self.settings = s
        self.runtime = runtime
        self.refresh_layers()
        visits = sum(map(len, model.orders[looping]))
        self.adapters = Adapters(self.view, visits, slots, s, runtime)
        self.cache = ContextCache(visits, len(slots), s, runtime) if s.ttt_context == "cache" else None
        learned = s.ngram_tilt_enabled and s.ngram_boost == "learned"
        self.learned_boost = ngram.LearnedBoost(s.experts, runtime.device) if learned else None
        self.rows = None  # of the last forward pass

    def refresh_layers(self) -> None:
        """Cut the weights into layers, once for all forward passes until they change."""
        self.view = self.model.view(trainable=False, keep_layers=True)

    def block(self, visit: int, layer: int) -> dict:
        context = self.cache.at_visit(visit, self.rows) if self.cache else None
        return dict(adapter=self.adapters.at_visit(visit, layer), context=context)

    def begin_step(self, step: Step) -> None:
        """A document that is new to its slot starts with fresh adapters."""
        document = step.document[self.slots]
        fresh = np.flatnonzero((document >= 0) & (step.begin[self.slots] == 0))
        if len(fresh):
            self.adapters.reset(fresh, document[fresh])

    def score(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Nats of the rows' targets, tilted and not, (n,) each. Keeps the graph for `train`."""
        self.adapters.take(rows)
        # C1: also where no document continues, since a pass without gradients may round otherwise
        with torch.set_grad_enabled(self.settings.ttt_lora_lr > 0):
            self.nll, self.log_q = self.losses(rows)
        plain = self.nll.detach()
        return self.tilted(plain, self.log_q, rows)[rows.visible], plain[rows.visible]

    def train(self, rows: Rows) -> None:
        """Learn from the rows just scored: what hints were worth, and one AdamW step on the adapters."""
        if rows is not self.rows:
            raise AssertionError("C3: rows must be scored before anything learns from them")
        if self.learned_boost:
            same, gate = ngram.distinct(rows.hints, rows.gate)
            hit = rows.hints == rows.targets[:, None]
            self.learned_boost.observe(self.log_q, rows.boost, same, hit, gate)
        if self.nll.requires_grad:
            loss = (self.nll * rows.weights).sum()
            self.adapters.update(rows, torch.autograd.grad(loss, self.adapters.leaves))

    def end_step(self) -> None:
        """Fit the tilt's boosts to all that the ranks observed in this step."""
        if self.learned_boost:
            self.learned_boost.step(self.runtime.sum)

    def losses(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """NLL of each target (C,), with gradients to the leaves, and log p of its hints (C, experts)."""
        return two_value_nll(self.scores(rows), *self.view.caps(), rows.targets, rows.hints)

    def scores(self, rows: Rows) -> Tensor:
        """Logits (C, vocab) of the targets before the soft cap."""
        self.rows = rows
        hidden = self.view(rows.ids, rows.segments, self.looping, self)
        if not self.cache:
            hidden = hidden[rows.scored]
        return self.view.scores(hidden) + self.adapters.delta(("head", 0), hidden, rows.chunk_ends)

    def tilted(self, nll: Tensor, log_q: Tensor, rows: Rows) -> Tensor:
        """Nats (C,) under the tilted distribution. C2: neither hint nor boost nor gate knows the target."""
        same, gate = ngram.distinct(rows.hints, rows.gate)
        boost = rows.boost
        if self.learned_boost:
            boost = self.learned_boost(log_q, rows.boost, same)
        return -ngram.tilt(-nll, log_q, rows.hints == rows.targets[:, None], boost, gate)

    def rehearse(self, text: Text) -> None:
        """Compile the kernels on a first pass over documents without text, from which nothing is learned."""
        s = self.settings
        if not self.runtime.on_cuda:
            return
        text = copy.copy(text)
        text.tokens = np.zeros_like(text.tokens)
        if s.phased_ttt_prefix_docs:
            few = np.arange(min(s.eval_seq_len, len(text.tokens) - 1))
            weight_gradient(self.model, text.batch(few), self.looping)
        first_step = next(ttt_schedule(text.lengths, s))
        for rows in itertools.islice(text.pack(first_step), 1):  # a rank may have none
            rows = rows._replace(continues=torch.zeros_like(rows.continues), gate=torch.zeros_like(rows.gate))
            for longest in (rows.segments.max_seqlen, s.ttt_eval_seq_len):  # for short rows another kernel
                tried = rows._replace(segments=rows.segments._replace(max_seqlen=longest))
                self.score(tried)
                self.train(tried)
        self.end_step()


def weight_gradient(model: GPT, batch: Batch, looping: bool) -> Tensor:
    """Gradient of the batch's summed losses at all weights that train, one vector."""
    weights = [p for p in model.parameters() if p.requires_grad]
    losses = model.view().token_losses(*batch, looping)
    gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def train_all_weights(model: GPT, text: Text, documents: np.ndarray, looping: bool, s: Settings,
                      runtime: Runtime) -> dict:
    """A global phase: SGD on every weight over these documents, GLOBAL_TTT_CHUNK_TOKENS a step; its figures.

    Whole segments are dealt to the ranks. The rate falls to 0 as a cosine.
    """
    inputs, _ = ranges(text.starts[documents], text.lengths[documents])
    size = s.global_ttt_chunk_tokens
    chunks = np.split(inputs, range(size, len(inputs), size))
    weights = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in weights]
    momentum = torch.zeros(sum(sizes), device=runtime.device)
    for step, chunk in enumerate(chunks):
        starts = np.flatnonzero(text.tokens[chunk] == BOS_ID)
        bounds = segment_bounds(starts, len(chunk), s.eval_seq_len)
        share = len(chunk) * np.arange(runtime.rank, runtime.rank + 2) // runtime.world_size
        low, high = bounds[np.searchsorted(bounds, share)]
        gradient = torch.zeros_like(momentum)
        if high > low:
            gradient = weight_gradient(model, text.batch(chunk, low, high), looping) / len(chunk)
        runtime.sum(gradient)
        rate = s.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * step / len(chunks)))
        with torch.no_grad():
            if s.global_ttt_grad_clip:
                gradient *= (s.global_ttt_grad_clip / (gradient.norm() + 1e-6)).clamp(max=1)
            momentum.mul_(s.global_ttt_momentum).add_(gradient)
            for p, update in zip(weights, momentum.split(sizes)):
                p.sub_(rate * update.view_as(p))
    return dict(documents=len(documents), tokens=len(inputs), steps=len(chunks))


class Score:
    """The score so far and its clock: nats, tilted and not, bytes, and how often each target was scored."""

    def __init__(self, data: ValidationData, runtime: Runtime, log: RunLog):
        self.data = data
        self.runtime = runtime
        self.log = log
        self.targets = len(data.tokens) - 1
        self.nats = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # tilted, not
        self.times = np.zeros(self.targets, np.uint8)  # each target was scored
        self.seen_targets = 0  # by this rank
        self.seen_bytes = 0
        self.logged_share = 0.0

    @contextmanager
    def timer(self):
        """Everything that the score needs is computed inside; all ranks begin together."""
        self.runtime.synchronize()
        self.runtime.gather(None)  # all ranks begin together
        self.began = time.perf_counter()
        yield
        self.runtime.sum(self.nats)
        times = self.runtime.sum(torch.from_numpy(self.times).to(self.runtime.device))
        if (times != 1).any():
            raise AssertionError("C4: some validation targets were scored twice or never")
        self.seconds = time.perf_counter() - self.began

    def add(self, rows: Rows, tilted: Tensor, plain: Tensor) -> None:
        """Count the rows' nats (n,), and log a line every 5 % of the text."""
        self.nats += torch.stack((tilted.double().sum(), plain.double().sum()))
        np.add.at(self.times, rows.stream_positions, 1)
        self.seen_targets += len(rows.stream_positions)
        self.seen_bytes += int(self.data.bytes[rows.stream_positions + 1].sum(dtype=np.int64))
        share = min(1.0, self.runtime.world_size * self.seen_targets / self.targets)
        if share >= self.logged_share + 0.05:
            self.logged_share = share
            nats = float(self.nats[0])  # the one place where the host waits for the device
            val_bpb = round(nats / math.log(2) / max(1, self.seen_bytes), 8)
            eta_seconds = round((time.perf_counter() - self.began) * (1 / share - 1), 1)
            self.log.event("progress", share=round(share, 3), val_bpb=val_bpb, eta_seconds=eta_seconds)

    def results(self) -> dict:
        """val_loss (nats per token) and val_bpb, without the tilt too, and the time they took."""
        size = int(self.data.bytes[1:].sum(dtype=np.int64))
        tilted, plain = [loss_and_bpb(nats, self.targets, size, "lower TTT_LORA_LR")
                         for nats in self.nats.tolist()]
        return tilted | dict(
            untilted_bpb=plain["val_bpb"], seconds=round(self.seconds, 3),
            process_seconds=round(time.perf_counter() - STARTED, 3))


def adapt(learner: Learner, text: Text, packed_steps: Iterable, add: Callable) -> list[dict]:
    """Score step after step and learn from each; `add` gets rows and nats. Returns the phases' figures."""
    phases = []
    for step, groups in packed_steps:
        learner.begin_step(step)
        for rows in groups:
            add(rows, *learner.score(rows))  # C3: scored ...
            learner.train(rows)  # ... before anything has learned from it
        learner.end_step()
        for documents in text.phases_due(step):
            phases.append(train_all_weights(learner.model, text, documents, learner.looping, learner.settings,
                                            learner.runtime))
            learner.refresh_layers()
    return phases


def test_time_training(model: GPT, data: ValidationData, looping: bool, s: Settings, runtime: Runtime,
                       log: RunLog) -> dict:
    """Score the text once (C4), adapting to what has been scored; returns the figures."""
    text = Text(data, s, runtime)
    learner = Learner(model, looping, text.own_slots, s, runtime)
    total = Score(data, runtime, log)
    learner.rehearse(text)
    with total.timer(), closing(ahead(text.packed_steps(), 4)) as packed_steps:
        phases = adapt(learner, text, packed_steps, total.add)
    return total.results() | dict(
        documents=len(text.lengths), whole_text=s.val_doc_fraction == 1, phases=phases,
        hints=text.hinted, hints_inside_timer=True, decodable=s.ttt_order == "stream")


# ============================================================================================================
# 10. Main
# ============================================================================================================


def off_track(s: Settings, targets: int, machine: dict) -> list[str]:
    """Why a run is no record, whatever it scores: other text, other hardware, other settings."""
    recipe = os.path.join(os.path.dirname(PACKED_SCRIPT or __file__), "recipes", f"{s.recipe}.env")
    apart = "seed run_id artifact_dir data_dir data_path recipe rank local_rank world_size ttt_eval_only"
    given = read_recipe(recipe, Settings) if s.recipe else {}
    changed = s.changes(given, apart=[*apart.split(), "train_log_every"])
    reasons = []
    if not 0 <= 47_853_343 - targets < (1 if s.eval_include_tail else s.eval_seq_len):  # the published text
        reasons.append(f"{targets:,} targets: another text")
    if machine["devices"] != 8 or "H100" not in machine["device"]:
        reasons.append("{devices} x {device} are not 8 x H100".format(**machine))
    if changed:
        reasons.append(f"not as recipe {s.recipe or 'record'}: {', '.join(changed)}")
    return reasons


def memory_error(s: Settings, runtime: Runtime, factor: float) -> InputError | None:
    """What to say if training takes over `factor` times what the device has: about what its products read."""
    visits = sum(map(len, visit_order(s, s.loops_at_end)))
    values = visits * (4 * s.model_dim + 2 * s.kv_dim + s.mlp_dim) + s.vocab_size  # of a token
    needed = s.micro_batch_tokens * values * (3.5 if runtime.on_cuda else 18)  # bytes for each were measured
    there = torch.cuda.mem_get_info(runtime.device)[1] if runtime.on_cuda else machine_memory()
    return None if needed <= factor * there else InputError(
        f"GRAD_ACCUM_STEPS: {s.accumulation}; with micro-batches of {s.micro_batch_tokens:,} tokens "
        f"training takes about {needed / 2**30:,.1f} GiB a rank, {runtime.device} has {there / 2**30:,.1f}: "
        "out of memory; raise it, or take recipe demo; for scoring lower VAL_BATCH_TOKENS or TTT_BATCH_SIZE")


def check_tools(s: Settings, runtime: Runtime) -> None:
    """Raise InputError with all that is missing: memory, and what is needed only after training."""
    error = memory_error(s, runtime, 2.0)  # the estimate is not so far off
    lacking = [] if error is None or s.ttt_eval_only or s.quantize_only else [str(error)]
    compresses = runtime.rank == 0 and s.compressor == "pergroup" and not s.prequant_only
    if compresses and not (shutil.which("lrzip") and shutil.which("prlimit")):
        lacking.append("COMPRESSOR: pergroup needs the programs lrzip and prlimit; install them, or choose "
                       "entropy or brotli")
    if s.ttt_enabled and runtime.on_cuda and not s.prequant_only:
        if not HAS_TRITON:
            lacking.append("triton: test-time training on CUDA needs it; pip install triton")
        sizes = dict(TTT_LORA_RANK=s.ttt_lora_rank, VOCAB_SIZE=s.vocab_size)
        lacking += [f"{name}: {size} is no multiple of 8, as test-time training on CUDA wants; change it or "
                    "set TTT_ENABLED=0" for name, size in sizes.items() if size % 8]
    if lacking:
        raise InputError("\n".join(lacking))


def allow_fp8(s: Settings, runtime: Runtime) -> bool:
    """Whether products run in 8 bits on this rank; InputError if they cannot and FP8=1 asks for it."""
    fits = fp8_products_fit(s.model_dim, s.kv_dim, s.mlp_dim, s.vocab_size, runtime.compute_dtype)
    if s.fp8 == "1" and not fits:
        raise InputError("FP8: 8-bit products need a Hopper GPU, MODEL_DIM a power of 2 from 256, the MLP's "
                         "width a multiple of 256, the keys' width and VOCAB_SIZE of 16; set FP8=0")
    return s.fp8 != "0" and fits


def prepare(s: Settings, runtime: Runtime) -> list:
    """What a run takes from data and machine. All that any rank lacks is raised at once, as InputError."""
    tilts = s.ttt_enabled and s.ngram_tilt_enabled and not s.prequant_only
    return runtime.together(
        lambda: (check_manifest(s), None if s.ttt_eval_only else TrainingData(s, runtime), ValidationData(s)),
        lambda: attention_kernel(s.attention, *s.attention_shape),
        lambda: allow_fp8(s, runtime),
        lambda: check_tools(s, runtime),
        lambda: ngram.load() if tilts and s.local_rank == 0 else None)  # compiles, once on each host


def agree_on_kernels(mine: tuple[str, str, bool], s: Settings, runtime: Runtime, log: RunLog) -> Settings:
    """The settings with ATTENTION and FP8 as all ranks can have them; mine: kernel, why none faster, FP8."""
    kernels, reasons, fp8 = zip(*runtime.gather(mine))
    for reason in dict.fromkeys(filter(None, reasons)):
        log.event("slower_attention", ranks=reasons.count(reason), reason=reason)
    slowest = max(kernels, key=ATTENTION_KERNELS.index)
    return dataclasses.replace(s, attention=slowest, fp8=str(int(all(fp8))))


def measure_code(s: Settings, runtime: Runtime, log: RunLog) -> int:
    """Bytes of the packed script, which count beside the artifact's; rank 0 alone packs it."""
    packed = packed_code() if runtime.rank == 0 and not s.prequant_only else b""
    sha256 = hashlib.sha256(packed).hexdigest() if packed else "not packed"
    log.event("code", sha256=sha256, packed_bytes=len(packed))
    if s.step_rule == "loss" and len(packed) >= s.target_bytes:
        raise InputError(f"TARGET_BYTES: {s.target_bytes}, but the code alone takes {len(packed)}; raise it")
    return len(packed)


def build_model(s: Settings, runtime: Runtime, log: RunLog) -> GPT:
    model = GPT(s, runtime.compute_dtype).to(runtime.device).view(compiled=runtime, fp8=True)
    runtime.broadcast(model.parameters())
    log.event("model", parameters=sum(p.numel() for p in model.parameters()),
              micro_batch_tokens=s.micro_batch_tokens, micro_batches=s.accumulation,
              attention=model.attention_kernel, fp8=model.fp8)
    return model


def collect_statistics(model: GPT, data: TrainingData, s: Settings, runtime: Runtime, looping: bool,
                       rehearsal: bool, in_time: Callable = iter) -> Statistics | None:
    """What quantization needs to know of the model's activations, None if it asks for nothing."""
    if s.prequant_only or not s.gptq_calibration_batches:
        return None
    # A rehearsal is one round, from which the time of the whole calibration is estimated and reserved.
    one_round = calibration_pass(s, runtime) * runtime.world_size if rehearsal else None
    return calibrate(model, calibration_windows(data, s, one_round), looping, s, runtime, in_time)


def save_checkpoint(model: GPT, looping: bool, s: Settings, log: RunLog) -> None:
    """Keep the averaged weights, float32, for a later run with QUANTIZE_ONLY=1."""
    arrays = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    table = dict(function=s.function_settings(), looping=looping, quantization=None)
    try:
        write_container(s.checkpoint_path, table, arrays, "none")
    except OSError as error:  # the run goes on: what counts is the artifact
        log.event("no_checkpoint", error=str(error))


def load_weights(model: GPT, path: str, s: Settings, runtime: Runtime) -> bool:
    """Install the weights of an artifact or checkpoint; returns whether looping is on."""
    looping = False
    # Nodes need not share a disk: rank 0 reads the file and sends what it holds.
    if runtime.rank == 0:
        table, arrays = read_container(path, model, s)
        looping = install(model, table, arrays, s)
        if (table["quantization"] is None) != (path == s.checkpoint_path):
            raise InputError(f"{path}: a checkpoint where an artifact belongs, or the reverse; train again")
    looping = bool(runtime.from_rank0([float(looping)])[0])
    runtime.broadcast(model.parameters())
    return looping


def calibrate_checkpoint(model: GPT, validation: Evaluator, calibration: Callable, s: Settings,
                         runtime: Runtime, log: RunLog) -> tuple[bool, Statistics | None]:
    """In place of training: load the averaged weights of an earlier run, calibrate and score them."""
    looping = load_weights(model, s.checkpoint_path, s, runtime)
    began = time.perf_counter()
    statistics = calibration(looping, rehearsal=False)
    runtime.synchronize()
    log.event("calibration", windows=calibration_count(s), seconds=round(time.perf_counter() - began, 3))
    log.result("averaged", **validation.score(model, looping))
    return looping, statistics


def log_size(code_bytes: int, s: Settings, log: RunLog) -> None:
    with open(s.artifact_path, "rb") as file:
        artifact = file.read()
    total = len(artifact) + code_bytes
    log.result("size", artifact_sha256=hashlib.sha256(artifact).hexdigest(), artifact_bytes=len(artifact),
               code_bytes=code_bytes, total_bytes=total, cap=SIZE_CAP, within_cap=total < SIZE_CAP)


def run(settings: Settings, runtime: Runtime, log: RunLog) -> None:
    """The stages of a run. All ranks compute; rank 0 alone writes files."""
    given = log.record["settings"].items()
    changed = {name.upper(): value for name, value in given if value != getattr(Settings, name)}
    log.event("settings", **changed)
    log.event("machine", **log.record["machine"])
    (facts, data, text), attention_here, fp8_here, *_ = prepare(settings, runtime)
    s = agree_on_kernels((*attention_here, fp8_here), settings, runtime, log)
    if not (s.ttt_eval_only or s.prequant_only) and os.path.exists(s.artifact_path):
        log.event("replaces", artifact=s.artifact_path, to_keep_it="choose another ARTIFACT_DIR")
    validation = Evaluator(text, s, runtime)
    log.event("data", folder=s.shards_dir, train_tokens=data.total if data else 0,
              val_targets=validation.targets, **facts)
    because = "; ".join(off_track(settings, validation.targets, log.record["machine"]))
    log.event("track", name="non_record_16mb" if because else "10min_16mb", because=because or "no reason")
    code_bytes = measure_code(s, runtime, log)
    model = build_model(s, runtime, log)

    if not s.ttt_eval_only:
        calibration = functools.partial(collect_statistics, model, data, s, runtime)
        if s.quantize_only:
            looping, statistics = calibrate_checkpoint(model, validation, calibration, s, runtime, log)
        else:
            looping, statistics = train(model, data, validation.score, calibration, s, runtime, log)
        if s.prequant_only:
            return check_caps(s, log)
        if runtime.rank == 0:
            if not s.quantize_only:
                save_checkpoint(model, looping, s, log)
            save_artifact(model, looping, statistics, code_bytes, s, log)

    # From here on the model is the one that the artifact holds.
    looping = load_weights(model, s.artifact_path, s, runtime)
    if runtime.rank == 0:
        log_size(code_bytes, s, log)
    log.result("quantized", **validation.score(model, looping))
    if s.ttt_enabled:
        if s.val_doc_fraction < 1:
            text = text.sample(s.val_doc_fraction, s.seed)
        log.result("ttt", **test_time_training(model, text, looping, s, runtime, log))
    check_caps(s, log)


def check_caps(s: Settings, log: RunLog) -> None:
    """Last of all, since its scores are worth having: raise OverCapError if the run is too long or large."""
    results = log.record["results"]
    times, size = results.get("training"), results.get("size")
    faults = []
    if times and not times["within_cap"]:
        faults.append(f"training took {times['clock_seconds']} s, the cap is {times['cap_seconds']}")
    if size and not size["within_cap"]:
        faults.append(f"artifact and code take {size['total_bytes']:,} bytes, not below {SIZE_CAP:,}")
    elif size and "artifact" in results and s.step_rule == "loss" and size["total_bytes"] > s.target_bytes:
        faults.append(f"artifact and code cannot be less than {size['total_bytes']:,} bytes, TARGET_BYTES is "
                      f"{s.target_bytes}")
    if faults and log.active:
        raise OverCapError("; ".join(faults) + ": no valid record")


SCORED = {"raw": "raw weights", "averaged": "averaged weights", "quantized": "from the artifact",
          "ttt": "test-time training"}


def summary(record: dict) -> str:
    """The figures of a run as a small table."""
    results = record["results"]
    lines = ["", f"{'':20}{'val_bpb':>9}{'seconds':>10}"]
    for kind, name in SCORED.items():
        if kind in results:
            lines.append(f"{name:20}{results[kind]['val_bpb']:>9.5f} {results[kind].get('seconds', ''):>9}")
    if "training" in results:
        times = results["training"]
        line = f"{'training':20}{times['steps']:>9} steps and calibration in {times['clock_seconds']} s"
        lines.append(line if times["within_cap"] else f"{line}, over the cap of {times['cap_seconds']} s")
    if "size" in results:
        size = results["size"]
        lines.append(f"{'artifact + code':20}{size['total_bytes']:>9,} bytes of {size['cap']:,}")
    return "\n".join(lines)


FAILED_RUN = (OverCapError, FloatingPointError)
INTERRUPTS = (SystemExit, KeyboardInterrupt)


def stop_on_signal(number, frame):
    raise SystemExit(128 + number)


def run_with_record(settings: Settings) -> None:
    """Join the other ranks and run; the record says how it ended."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop_on_signal)
    with Runtime.start(settings) as runtime:
        log = RunLog(settings, runtime)
        began = time.perf_counter()
        try:
            run(settings, runtime, log)
            log.write(summary(log.record) + "\n")
        except BaseException as error:
            # A signal that has arrived but is not handled yet is raised by the first call.
            try:
                ignore_signals()
            except INTERRUPTS:
                ignore_signals()
            if ran_out_of_memory(error):
                error = memory_error(settings, runtime, 0.0)
            if not isinstance(error, BAD_INPUT + FAILED_RUN + INTERRUPTS):
                log.write(traceback.format_exc())
            seconds = round(time.perf_counter() - began, 1)
            log.close("failed", error=f"{type(error).__name__}: {error}", seconds=seconds)
            raise error
        log.close("finished", seconds=round(time.perf_counter() - began, 1),
                  process_seconds=round(time.perf_counter() - STARTED, 1))


def check(settings: Settings) -> None:
    """What a run does before its first step, and a look at every training token. Raises InputError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (_, data, _), *_ = prepare(settings, Runtime(0, settings.world_size, device))
    if data:
        with ThreadPoolExecutor() as threads:
            list(threads.map(check_tokens, data.files, data.shards, itertools.repeat(settings)))
    print("settings and data are fine")


HELP = f"""{(__doc__ or "").strip()}

Settings are environment variables.
  --help   this text
  --check  validate settings and data, then stop
"""


@lasting_console()
def main(arguments: list[str], environ: dict[str, str]) -> int:
    """The program; returns its exit code: 0 done, 1 the run failed, 2 something the user gave is wrong."""
    if arguments in (["--help"], ["-h"]):
        print(HELP + settings_help(Settings))
        return 0
    try:
        if arguments not in ([], ["--check"]):
            raise InputError(f"{' '.join(arguments)}: settings are environment variables; the arguments are "
                             "--help and --check")
        settings = Settings.from_environment(environ)
        (check if arguments else run_with_record)(settings)
        return 0
    except (*BAD_INPUT, *FAILED_RUN, OSError) as error:
        print_errors("train_gpt.py", error, environ)
        return 1 if isinstance(error, FAILED_RUN) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ
    # FlashAttention 4 keeps what it compiles for the next run.
    environment.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    exit_code = main(sys.argv[1:], dict(environment))
    if environment.get("WORLD_SIZE", "1") != "1":
        os._exit(exit_code)  # Gloo's threads can outlive the interpreter and abort a run that is complete
    sys.exit(exit_code)
