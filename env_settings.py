"""Settings from environment variables: parsing, ranges, refusals, --help.

A settings class is a frozen dataclass that inherits FromEnvironment and declares each field with `setting`. It knows nothing of
what the settings are for.
"""
from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import textwrap


class InputError(Exception):
    """Something the user gave is wrong: each line of the message names the variable or file and the remedy (exit 2)."""


def setting(group, default, text, *, unit="", low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, choices=()):
    """One environment variable: the field's name in upper case, parsed to the type of its default.

    low, high: inclusive bounds; above, below: exclusive ones; choices: the accepted strings.
    """
    return dataclasses.field(default=default, metadata=dict(
        group=group, text=text, unit=unit, low=low, high=high, above=above, below=below, choices=choices))


# Variables of the published systems that are no settings here: the one value that is accepted, if any, and why no other.
PEEKS = "its expert looks at the class of the token that it scores, which a decoder does not know"
ADAPTER = "no published run switched these adapters on"
DENSE_GATE = "no published run switched these gates on; use SPARSE_ATTN_GATE_ENABLED"
UNTRIED = "no published run used another value"
GLOBAL_MUON = "global phases train with SGD; Muon gained 0.00003 nats per token"
SHORT_CHUNKS = "TTT_SHORT_SCORE_FIRST_STEPS gives lengths and sizes of chunks"
FIXED_SETTINGS = {
    "TIE_EMBEDDINGS": ("1", "the output head is always the embedding; the untied head of earlier systems was never trained"),
    "EMBED_LR": ("", "it belonged to the untied embedding; use TIED_EMBED_LR"),
    "ROPE_YARN": ("0", "it scaled by the length of the packed buffer, not of the document"),
    "ROPE_TRAIN_SEQ_LEN": ("", "ignored by the systems that published it; positions count from the start of each segment"),
    "QK_GAIN_INIT_SCHEDULE": ("", "no published run used it; use QK_GAIN_INIT"),
    "PARALLEL_FINAL_LANE": ("mean", "no published run took another end of the two lanes"),
    "SPARSE_ATTN_GATE_INIT_STD": ("0", "the gates always start at zero, as in every published run"),
    "GATED_ATTN_ENABLED": ("0", DENSE_GATE), "GATED_ATTN_INIT_STD": ("0.01", DENSE_GATE),
    "ATTN_OUT_GATE_ENABLED": ("0", DENSE_GATE), "ATTN_OUT_GATE_SRC": ("proj", DENSE_GATE),
    "FUSED_CE_ENABLED": ("1", "soft cap and cross entropy are always fused"),
    "CONTROL_TENSOR_NAME_PATTERNS": ("", "parameter groups follow from the model, not from name fragments"),
    "COMPILE_SHAPE_WARMUP": ("1", "every context length and state of looping is compiled before the clock starts"),
    "COMPILE_SHAPE_WARMUP_ITERS": ("", "WARMUP_STEPS says how many steps each of them takes"),
    "COMPILE_SHAPE_WARMUP_LOOP_MODES": ("auto", "the schedules say which of them occur together"),
    "DYNAMO_CACHE_SIZE_LIMIT": ("", "nothing is compiled after the warm-up, so there is no limit to set"),
    "DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT": ("", "nothing is compiled after the warm-up, so there is no limit to set"),
    "MUON_HUBER_WD": ("0", "no published run used it"),
    "MUON_HUBER_DELTA": ("0.1", "no published run used it"),
    "WARMDOWN_ITERS": ("0", "no published run used it; use WARMDOWN_FRAC"),
    "TRAIN_SEQ_SCHEDULE_MODE": ("wallclock", "no published run used another; stages follow progress"),
    "MIDRUN_CAP_SCHEDULE": ("", "no published run used it"),
    "MIDRUN_CAP_LOG_UPDATES": ("0", "there is no such cap"),
    "MATRIX_CLIP_SIGMAS": ("", "no tensor falls into its class; use ATTN_CLIP_SIGMAS, MLP_CLIP_SIGMAS, EMBED_CLIP_SIGMAS"),
    "LQER_GROUP_SIZE": ("", "ignored by the system that published it; use LQER_ASYM_GROUP"),
    "GPTQ_CALIBRATION_MODE": ("random", "calibration windows begin anywhere; no published run began them at document starts"),
    "OPTROT_ENABLED": ("0", "no published run rotated the values, and the published rotation changed the model"),
    "LQER_SCOPE": ("all", "every matrix can be corrected; no published run narrowed that"),
    "LQER_GAIN_SELECT": ("0", "the matrices with the largest errors are corrected; no published run chose otherwise"),
    "LQER_ASYM_ENABLED": ("1", "the left factor has 2 bits, the right one 4; no published run used equal ones"),
    "LQER_FACTOR_BITS": ("4", "it belonged to LQER_ASYM_ENABLED=0, which no published run used"),
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
    "GLOBAL_TTT_OPTIMIZER": ("sgd", GLOBAL_MUON), "GLOBAL_TTT_MUON_NS_STEPS": ("5", GLOBAL_MUON),
    "GLOBAL_TTT_MUON_NESTEROV": ("1", GLOBAL_MUON),
    "GLOBAL_TTT_EPOCHS": ("1", UNTRIED), "GLOBAL_TTT_WARMUP_CHUNKS": ("0", UNTRIED), "GLOBAL_TTT_WARMUP_START_LR": ("0", UNTRIED),
    "TTT_OPTIMIZER": ("adam", "adapters are trained by AdamW; no published run used SGD"),
    "TTT_BETA1": ("0", "adapters are trained without a first moment; 0.5 lost 0.0007 nats per token"),
    "TTT_GRAD_STEPS": ("1", "a second step on a chunk lost 0.0028 nats per token"),
    "TTT_GRAD_STEPS_CLEAN": ("0", "there is one gradient step on a chunk, so none before it could be added"),
    "TTT_UPDATE_EVERY": ("1", UNTRIED), "TTT_LORA_EMA_DECAY": ("0", UNTRIED), "TEMPERATURE_SCALE": ("1", UNTRIED),
    "TTT_SHORT_DOC_LEN": ("2000", SHORT_CHUNKS), "TTT_SHORT_CHUNK_SIZE": ("32", SHORT_CHUNKS),
    "NGRAM_HINT_PRECOMPUTE_OUTSIDE": ("0", "hints counted outside the evaluation's time make no valid record"),
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
    ("MATRIX_BITS", "EMBED_BITS", "ATTN_CLIP_SIGMAS", "MLP_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS", "AWQ_LITE_ENABLED", "LQER_ENABLED"),
    ("STEP_RULE", "sigma"))}

# Settings that do something only with certain values of another; elsewhere they must keep their default.
READ_ONLY_WITH = {
    "skylight_uw_ratio": ("skylight_uw_floor", (True,)),
    "skylight_norm_beta2": ("skylight_norm_ema", (True,)), "skylight_norm_eps": ("skylight_norm_ema", (True,)),
    "val_doc_fraction": ("ttt_enabled", (True,)),
    "target_bytes": ("step_rule", ("loss",)),
    **{name: ("step_rule", ("sigma",)) for name in ("matrix_bits", "embed_bits", "attn_clip_sigmas", "mlp_clip_sigmas",
                                                    "embed_clip_sigmas")},
    "token_threshold": ("ngram_boost", ("fixed",)), "token_boost": ("ngram_boost", ("fixed",)),
    "token_backoff": ("ngram_boost", ("learned",)),
}

# First words of our names under which other programs keep variables too; there only a near miss counts as misspelt.
SHARED_PREFIXES = {"DATA_", "RUN_", "MAX_", "NUM_", "MODEL_", "LOCAL_", "WORLD_", "VOCAB_", "TOKENIZER_", "ARTIFACT_",
                   "PARALLEL_", "SKIP_", "MIN_", "ENABLE_", "FORCE_", "GLOBAL_", "TOKEN_"}


class FromEnvironment:
    """A frozen dataclass whose fields are read from environment variables of the same name in upper case."""

    @classmethod
    def from_environment(cls, environ) :
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
        return []


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


def settings_help(settings: type) -> str:
    """Every setting of the class with default, unit, range and meaning, grouped as they are declared."""
    lines = []
    for group, fields in itertools.groupby(dataclasses.fields(settings), key=lambda f: f.metadata["group"]):
        lines += ["", group]
        for f in fields:
            limits = "0|1" if isinstance(f.default, bool) else describe_range(f.metadata)
            facts = "; ".join(filter(None, (f"default {setting_text(f.default)}", f.metadata["unit"], limits)))
            lines += [f"  {f.name.upper()}  ({facts})"] + textwrap.wrap(
                f.metadata["text"], 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def setting_text(value) -> str:
    """A setting's value as the environment would say it."""
    return str(int(value)) if isinstance(value, bool) else str(value) if value != "" else "(empty)"
