"""Settings from environment variables: parsing, ranges, refusals, --help.

A settings class is a frozen dataclass whose fields are declared with `setting`:

    @dataclass(frozen=True)
    class Settings(FromEnvironment):
        num_layers: int = setting(11, "distinct transformer blocks", low=1, group="Model")

num_layers is then read from NUM_LAYERS. The code knows nothing of what the settings are for; only the table
at the end is of this project.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping


class InputError(Exception):
    """What the user gave is wrong, exit code 2; each line names a variable or file, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is said of one setting, besides its name, type and default."""

    text: str  # one line of meaning
    group: str = ""  # the heading in --help; settings without one belong to the group of the setting before
    unit: str = ""
    low: float = -math.inf  # inclusive bounds
    high: float = math.inf
    above: float = -math.inf  # exclusive bounds
    below: float = math.inf
    choices: Collection[str] = ()  # the accepted strings; a mapping says what each of them implies
    pattern: str = ""  # or a regular expression for all of the string, and in words what it accepts
    form: str = ""
    alias: str = ""  # another name of it in a published system; several settings can share one
    implies: str = ""  # assignments like STEP_RULE=sigma that it brings along, unless it is 0
    # Assignments without which nothing reads it, so that it must keep its default; * is any text but none.
    only_with: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number is finite and in range."""
        inclusive = self.low <= value <= self.high
        exclusive = self.above < value < self.below
        return math.isfinite(value) and inclusive and exclusive

    def range(self) -> str:
        """The accepted values in words; empty if any will do."""
        if self.form or self.choices:
            return self.form or "|".join(self.choices)
        bounds = {">": self.above, ">=": self.low, "<": self.below, "<=": self.high}
        return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))

    def implied_by(self, text: str) -> dict[str, str]:
        """The assignments that this value brings along."""
        if isinstance(self.choices, Mapping):
            return assignments(self.choices.get(text, ""))
        return {} if text == "0" else assignments(self.implies)


def setting(default, text: str, **rule):
    """A field for one environment variable, parsed to the type of its default; `rule` as in Rule."""
    return dataclasses.field(default=default, metadata={"rule": Rule(text, **rule)})


def list_of(item: str) -> str:
    """A pattern of comma-separated items, or of none."""
    return rf"({item}(,{item})*)?"


# What a setting is declared with whose value changes as a run goes on: each holds until the end behind it.
STAGES = dict(pattern=list_of(r"[1-9]\d*@(0?\.\d*[1-9]\d*|1(\.0*)?)"), form="a list like 1024@0.1,2048@1.0")


def parse_stages(text: str) -> list[tuple[int, float]]:
    """The (value, end) pairs of such a list, in order of their ends."""
    pairs = [stage.split("@") for stage in text.split(",")]
    return sorted(((int(value), float(end)) for value, end in pairs), key=lambda stage: stage[1])


def fields_by_group(settings: type) -> dict[str, list[dataclasses.Field]]:
    """The fields of a settings class under their headings."""
    result = {}
    group = ""
    for field in dataclasses.fields(settings):
        group = field.metadata["rule"].group or group
        result.setdefault(group, []).append(field)
    return result


class FromEnvironment:
    """A frozen dataclass whose fields are read from environment variables of the same name in upper case."""

    fixed: dict[str, tuple[str | None, str]] = {}  # variables that are no settings, see `fixed_variables`

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]):
        """Read every setting from `environ`; raises InputError with all problems at once, a line each."""
        rules = {field.name.upper(): field.metadata["rule"] for field in dataclasses.fields(cls)}
        known = rules.keys() | cls.fixed.keys() | {rule.alias for rule in rules.values()}
        problems = refusals(environ, cls.fixed) + misspellings(environ.keys() - known, rules)

        # An alias gives a value to every setting that has it.
        aliased = {name: rule.alias for name, rule in rules.items() if rule.alias in environ}
        given = {name: environ[alias] for name, alias in aliased.items()}
        given |= {name: environ[name] for name in rules if name in environ}
        for name, alias in aliased.items():
            if given[name] != environ[alias]:
                problems.append(f"{alias}: {environ[alias]}, but {name}={given[name]} means the same; "
                                "unset one of them")

        # What is implied gives way to what is given.
        texts = {}
        for name, text in given.items():
            texts |= rules[name].implied_by(text)
        texts |= given

        values = {}
        unknown = set()  # what could not be parsed: nothing that depends on it is a problem of its own
        for field in dataclasses.fields(cls):
            name = field.name.upper()
            if name in texts:
                try:
                    values[field.name] = parse_setting(aliased.get(name, name), texts[name], field)
                except InputError as error:
                    problems.append(str(error))
                    unknown.add(field.name)

        settings = cls(**values)
        problems += settings.unread(unknown) + settings.contradictions(unknown)
        if problems:
            raise InputError("\n".join(dict.fromkeys(problems)))
        return settings

    @classmethod
    def faults_of(cls, name: str, text: str) -> list[str]:
        """What is wrong with one assignment, whatever else is set, a line each."""
        if name in cls.fixed:
            return refusals({name: text}, cls.fixed)
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        meant = [field for key, field in fields.items() if name in (key, field.metadata["rule"].alias)]
        if not meant:
            nearest = misspellings([name], fields, likeness=0.8)
            return nearest or [f"{name}: no such setting; python train_gpt.py --help lists them"]
        try:
            for field in meant:
                parse_setting(name, text, field)
        except InputError as error:
            return [str(error)]
        return []

    def changes(self, texts: Mapping[str, str], apart: Collection[str] = ()) -> list[str]:
        """The settings, as NAME=value, that these texts alone would not give, but for the fields `apart`."""
        theirs = self.from_environment(texts)
        names = [field.name for field in dataclasses.fields(self) if field.name not in apart]
        return [f"{name.upper()}={setting_text(getattr(self, name))}" for name in names
                if getattr(self, name) != getattr(theirs, name)]

    def unread(self, unknown: Collection[str]) -> list[str]:
        """Settings that were changed although nothing reads them, a line each."""
        found = []
        for field in dataclasses.fields(self):
            for switch, wanted in assignments(field.metadata["rule"].only_with).items():
                text = setting_text(getattr(self, switch.lower()))
                read = bool(text) if wanted == "*" else text == wanted
                read = read or switch.lower() in unknown
                if not read and getattr(self, field.name) != field.default:
                    found.append(f"{field.name.upper()}: it is read only with {switch}={wanted}; set that or "
                                 "leave it unset")
        return found

    def contradictions(self, unknown: Collection[str]) -> list[str]:
        """The conflicts that do not hold, a line each, but for those that read a setting of unknown value."""
        reads = []
        found = []
        for holds, name, message in watched(self, unknown, reads).conflicts():
            if not holds and not reads:
                found.append(f"{name}: {setting_text(getattr(self, name.lower()))} {message}")
            reads.clear()
        return found

    def conflicts(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it holds, setting to name if not, what to say after its value) for all that has to hold.

        Each reads what it needs just before it is yielded, so that one knows what it depends on.
        """
        yield from ()


def watched(settings: FromEnvironment, names: Collection[str], reads: list[str]) -> FromEnvironment:
    """The same settings; whenever one of these names is read, by a property too, it is added to `reads`."""

    def read(self, name):
        if name in names:
            reads.append(name)
        return object.__getattribute__(self, name)

    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return type("Watched", (type(settings),), {"__getattribute__": read})(**values)


def assignments(text: str) -> dict[str, str]:
    """The pairs of a text like NAME=value OTHER=value."""
    return dict(pair.split("=", 1) for pair in text.split())


def refusals(environ: Mapping[str, str], fixed: dict[str, tuple[str | None, str]]) -> list[str]:
    """Variables that are no settings and have another value than the accepted one, a line each."""
    found = []
    for name, (accepted, why) in fixed.items():
        if name in environ and accepted is None:
            found.append(f"{name}: {why}; unset it")
        elif name in environ and not is_value(environ[name], accepted):
            found.append(f"{name}: {why}; set it to {accepted or 'the empty text'} or unset it")
    return found


def is_value(text: str, accepted: str) -> bool:
    """Whether a variable's text means the accepted value: a number, a bound like >1, a word, or * for any."""
    if accepted == "*":
        return True
    if accepted.startswith(">"):
        return number(text) > float(accepted[1:])
    return text == accepted or number(text) == number(accepted)


def number(text: str) -> float:
    """The number that the text stands for, NaN if none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# First words of usual settings under which other programs keep variables too.
SHARED_PREFIXES = {"DATA_", "RUN_", "MAX_", "NUM_", "MODEL_", "LOCAL_", "WORLD_", "VOCAB_", "TOKENIZER_",
                   "ARTIFACT_", "PARALLEL_", "SKIP_", "MIN_", "ENABLE_", "FORCE_", "GLOBAL_", "TOKEN_"}
# Words that other programs use as names by themselves.
SHARED_WORDS = set("""
    A AT BASE DATA DIR ENABLE ENABLED END FORCE GLOBAL GROUP ID INIT K LOCAL MASK MAX MIN MODE MODEL N NUM
    ONLY ORDER PARALLEL PATH RUN SIZE SKIP START TARGET TOKEN WORLD
""".split())
# What settings are called elsewhere, without the plural.
SYNONYMS = {"DIRECTORY": "DIR", "FOLDER": "DIR", "BLOCK": "LAYER", "ITER": "ITERATION", "SEC": "SECOND",
            "EPSILON": "EPS", "LENGTH": "LEN", "FRAC": "FRACTION"}


def words_of(name: str) -> list[str]:
    """The words of a name, whatever its case, plurals and synonyms."""
    words = [word.removesuffix("S") for word in name.upper().split("_")]
    return [SYNONYMS.get(word, word) for word in words]


def is_part(words: list[str], whole: list[str]) -> bool:
    """Whether a name's words are another's, or the beginning or the end of them."""
    if len(words) == 1 < len(whole) and words[0] in SHARED_WORDS:
        return False
    return words in (whole[:len(words)], whole[-len(words):])


def misspellings(unknown: Collection[str], names: Collection[str], likeness: float = 0.88) -> list[str]:
    """Unknown variables that were meant for one of the settings of these names, a line each.

    A variable is meant for a setting if its words are the setting's or a part of them. One that begins with
    the first word or two of a setting is meant for some setting; any other only if it is so much like one.
    """
    prefixes = set()
    for name in names:
        words = name.split("_")
        for count in (1, 2):
            if len(words) > count:
                prefixes.add("_".join(words[:count]) + "_")
    ours = tuple(prefixes - SHARED_PREFIXES)
    found = []
    for name in sorted(unknown):
        candidates = [whole for whole in names if is_part(words_of(name), words_of(whole))]
        least = 0.0 if candidates or name.upper().startswith(ours) else likeness
        for nearest in difflib.get_close_matches(name.upper(), candidates or names, n=1, cutoff=least):
            found.append(f"{name}: no such setting; the nearest is {nearest}")
    return found


LARGEST = 2 ** 63 - 1  # what 64 bits hold


def parse_setting(name: str, text: str, field: dataclasses.Field):
    """The value of one variable; raises InputError with one line that says what would be accepted."""
    kind = type(field.default)
    rule = field.metadata["rule"]
    if kind is bool:
        if text not in ("0", "1"):
            raise InputError(f"{name}: {text!r} is neither 0 nor 1")
        return text == "1"
    if kind is str:
        if rule.choices and text not in rule.choices:
            raise InputError(f"{name}: {text!r} is none of {', '.join(rule.choices)}")
        if rule.pattern and not re.fullmatch(rule.pattern, text):
            raise InputError(f"{name}: {text!r} is not {rule.form}")
        return text
    try:
        value = kind(text)
    except ValueError:
        value = None
    # Python's digit groups, 1_000, are no notation for a command line.
    if value is None or "_" in text:
        raise InputError(f"{name}: {text!r} is not {'a whole number' if kind is int else 'a number'}")
    if kind is int and abs(value) > LARGEST:
        raise InputError(f"{name}: {text} is out of range (<= {LARGEST})")
    if not rule.holds(value):
        raise InputError(f"{name}: {text} is out of range ({rule.range()})")
    return value


# One line of a recipe. Nothing in it is expanded or executed, so what a shell would expand is refused.
RECIPE_LINE = re.compile(r"""(?:export[ \t]+)?([A-Za-z_]\w*)=
    (?: "([^"$`\\\x00-\x1f]*)" | '([^'\x00-\x1f]*)' | ([\w.,:@=/+%-]*) )
    (?:[ \t]+\#.*)?""", re.VERBOSE)


def read_recipe(path: str, settings: type) -> dict[str, str]:
    """The assignments of a file of lines NAME=value: data, whoever wrote it.

    Also read are blank lines, comments, `export` before a name, quotes around a value, a byte order mark and
    the line ends of other systems. Raises InputError with all problems, each behind its place FILE:LINE.
    """
    values = {}
    lines = {}
    problems = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a recipe, a file of lines NAME=value") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; a recipe has lines NAME=value alone") from None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = RECIPE_LINE.fullmatch(line)
        if not match:
            problems.append(f"{path}:{number}: cannot read {line[:60]!r}; write NAME=value, without blanks "
                            "or anything for a shell to expand")
            continue
        name = match[1]
        value = match[2] or match[3] or match[4] or ""
        problems += [f"{path}:{number}: {fault}" for fault in settings.faults_of(name, value)]
        if name in values:
            problems.append(f"{path}:{number}: {name}: line {lines[name]} sets it too; remove one of them")
        values[name] = value
        lines[name] = number
    if problems:
        raise InputError("\n".join(problems))
    return values


def setting_text(value) -> str:
    """A setting's value as the environment would say it."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value)


def settings_help(settings: type) -> str:
    """Every setting of the class with default, unit, range and meaning, under its group's heading."""
    lines = []
    for group, fields in fields_by_group(settings).items():
        lines += ["", group]
        for field in fields:
            rule = field.metadata["rule"]
            accepted = "0|1" if isinstance(field.default, bool) else rule.range()
            read = f"only with {rule.only_with}" if rule.only_with else ""
            facts = [f"default {setting_text(field.default) or '(empty)'}", rule.unit, accepted, read]
            lines.append(f"  {field.name.upper()}  ({'; '.join(filter(None, facts))})")
            lines += textwrap.wrap(rule.text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def fixed_variables(table: str) -> dict[str, tuple[str | None, str]]:
    """{name: (accepted value, None if there is none; why no other)} of a table like PUBLISHED."""
    result = {}
    for paragraph in re.split(r"\n(?=\S)", table.strip()):
        variables, _, why = paragraph.partition("\n")
        for variable in variables.split():
            name, given, accepted = variable.partition("=")
            result[name] = (accepted if given else None, " ".join(why.split()))
    return result


# Variables of the published systems that are no settings here: NAME=VALUE if that value is accepted, NAME if
# none is, and in the next line the reason why no other.
PUBLISHED = """
CASEOPS_ENABLED=1 TOKENIZER_PATH=*
    bytes per token always come from the sidecar that prepare_caseops_data.py writes, not from a tokenizer
TIE_EMBEDDINGS=1
    the output head is always the embedding; the untied head of earlier systems was never trained
EMBED_LR
    it belonged to the untied embedding; use TIED_EMBED_LR
ROPE_YARN=0
    it scaled by the length of the packed buffer, not of the document
ROPE_TRAIN_SEQ_LEN
    ignored by the systems that published it; positions count from the start of each segment
QK_GAIN_INIT_SCHEDULE=
    no published run used it; use QK_GAIN_INIT
PARALLEL_FINAL_LANE=mean
    no published run took another end of the two lanes
SPARSE_ATTN_GATE_INIT_STD=0
    the gates always start at zero, as in every published run
GATED_ATTN_ENABLED=0 GATED_ATTN_INIT_STD=0.01 ATTN_OUT_GATE_ENABLED=0 ATTN_OUT_GATE_SRC=proj
    no published run switched these gates on; use SPARSE_ATTN_GATE_ENABLED
FUSED_CE_ENABLED=1
    soft cap and cross entropy are always fused
CONTROL_TENSOR_NAME_PATTERNS
    parameter groups follow from the model, not from name fragments
COMPILE_SHAPE_WARMUP=1
    every context length and state of looping is compiled before the clock starts
COMPILE_SHAPE_WARMUP_ITERS
    WARMUP_STEPS says how many steps each of them takes
COMPILE_SHAPE_WARMUP_LOOP_MODES=auto
    the schedules say which of them occur together
DYNAMO_CACHE_SIZE_LIMIT DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT
    nothing is compiled after the warm-up, so there is no limit to set
MUON_HUBER_WD=0 MUON_HUBER_DELTA=0.1 MIDRUN_CAP_SCHEDULE= MIDRUN_CAP_LOG_UPDATES=0
    no published run used it
WARMDOWN_ITERS=0
    no published run used it; use WARMDOWN_FRAC
TRAIN_SEQ_SCHEDULE_MODE=wallclock
    stages follow progress, as in every published run
MATRIX_CLIP_SIGMAS
    no tensor falls into its class; use ATTN_CLIP_SIGMAS, MLP_CLIP_SIGMAS, EMBED_CLIP_SIGMAS
GPTQ_CALIBRATION_MODE=random
    calibration windows begin anywhere; no published run began them at document starts
OPTROT_ENABLED=0
    no published run rotated the values, and the published rotation changed the model
LQER_GROUP_SIZE
    ignored by the system that published it; use LQER_ASYM_GROUP
LQER_SCOPE=all
    every matrix can be corrected; no published run narrowed that
LQER_GAIN_SELECT=0
    the matrices with the largest errors are corrected; no published run chose otherwise
LQER_ASYM_ENABLED=1 LQER_FACTOR_BITS=4
    the left factor has 2 bits, the right one 4; no published run used equal ones
PERGROUP_ROUNDTRIP_CHECK=1
    every artifact is read back and compared, whatever the compressor
TTT_EVAL_BATCHES
    it reordered the documents; every document is scored, in the order that TTT_ORDER names
TTT_OPTIMIZER=adam
    adapters are trained by AdamW; no published run used SGD
TTT_BETA1=0
    adapters are trained without a first moment; 0.5 lost 0.0007 nats per token
TTT_GRAD_STEPS=1
    a second step on a chunk lost 0.0028 nats per token
TTT_GRAD_STEPS_CLEAN=0
    there is one gradient step on a chunk, so none before it could be added
TTT_UPDATE_EVERY=1 TTT_LORA_EMA_DECAY=0 TEMPERATURE_SCALE=1
    no published run used another value
TTT_TRAIN_MIN_DOC_LEN=0 TTT_TRAIN_MAX_DOC_LEN=0
    whether a document is trained on may not depend on a length that is not known yet
TTT_SHORT_DOC_LEN=2000 TTT_SHORT_CHUNK_SIZE=32
    TTT_SHORT_SCORE_FIRST_STEPS gives lengths and sizes of chunks
TTT_SHORT_LORA_ENABLED=0 TTT_SHORT_LORA_RANK TTT_SHORT_LORA_LR TTT_SHORT_WEIGHT_DECAY TTT_SHORT_BETA2
    no published run switched these adapters on
TTT_WARM_START_MEAN_ENABLED=0 TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_MOMENTUM
    no published run started adapters from a mean
PHASED_TTT_ENABLED
    ignored by the systems that published it; PHASED_TTT_PREFIX_DOCS=0 turns the phase off
GLOBAL_TTT_BATCH_SEQS
    one step takes GLOBAL_TTT_CHUNK_TOKENS; no published run reached this bound
GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1
    attention never crosses a document border
GLOBAL_TTT_OPTIMIZER=sgd GLOBAL_TTT_MUON_NS_STEPS=5 GLOBAL_TTT_MUON_NESTEROV=1
    global phases train with SGD; Muon gained 0.00003 nats per token
GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_WARMUP_CHUNKS=0 GLOBAL_TTT_WARMUP_START_LR=0
    no published run used another value
NGRAM_HINT_PRECOMPUTE_OUTSIDE=0
    hints counted outside the evaluation's time make no valid record
WITHIN_BOOST=0 WITHIN_TAU=>1 WORD_BOOST=0 WORD_TAU=>1 WORD_ORDER WORD_NORMALIZE
    its expert looks at the class of the token that it scores, which a decoder does not know
AGREE_ADD_BOOST=0
    only one expert is left, so none can agree
PG_NGRAM_BUILD_DIR
    the C library is compiled once, into ~/.cache/online_ngram
"""
