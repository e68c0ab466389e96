"""env_settings.py on a settings class of its own: what is parsed, implied, refused and printed."""
import dataclasses
import re

import pytest

import env_settings
from env_settings import FromEnvironment, InputError, fixed_variables, list_of, read_recipe, setting

TABLE = """
KETTLE=1 KETTLE_WATTS=>1000
    water is always
    boiled
MICROWAVE LEMON=
    not for tea
"""


@dataclasses.dataclass(frozen=True)
class Tea(FromEnvironment):
    fixed = fixed_variables(TABLE)

    leaf_kind: str = setting("black", "what is in the pot", choices=("black", "green"), group="Leaves")
    leaf_grams: float = setting(2.5, "how much of it", unit="g", above=0, high=50)
    steep_seconds: int = setting(180, "how long it stays", unit="s", low=0, below=3600, group="Pot")
    guest_count: int = setting(1, "cups", low=0)
    steep_again: bool = setting(False, "1: a second time", alias="TWICE")
    steep_again_seconds: int = setting(300, "then so long", only_with="STEEP_AGAIN=1", alias="TWICE_SECONDS")
    milk_share: float = setting(0.0, "milk in the cup", low=0, high=1, implies="LEAF_KIND=black")
    pour_order: str = setting("", "who is served", pattern=list_of(r"[a-z]+"), form="a list like ann,bob")
    preset: str = setting("", "common ways", choices={"": "", "quick": "STEEP_SECONDS=60 STEEP_AGAIN=0",
                                                      "long": "STEEP_SECONDS=600"})

    def conflicts(self):
        yield not (self.milk_share and self.leaf_kind == "green"), "LEAF_KIND", "tea takes no milk"
        yield self.seconds >= 60, "STEEP_SECONDS", "is too short"

    @property
    def seconds(self):
        return self.steep_seconds * (2 if self.steep_again else 1)


def problems(**environ: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        Tea.from_environment(environ)
    return str(caught.value).splitlines()


def test_without_variables_everything_is_at_its_default():
    assert Tea.from_environment({}) == Tea()


def test_values_have_the_type_of_their_default():
    tea = Tea.from_environment(dict(LEAF_KIND="green", LEAF_GRAMS="3", STEEP_SECONDS="60", STEEP_AGAIN="1",
                                    POUR_ORDER="ann,bob"))
    assert dataclasses.astuple(tea)[:5] == ("green", 3.0, 60, 1, True) and tea.pour_order == "ann,bob"
    assert [type(value) for value in dataclasses.astuple(tea)[:5]] == [str, float, int, int, bool]


@pytest.mark.parametrize("name, text, part", [
    ("LEAF_KIND", "herbal", "black, green"), ("LEAF_GRAMS", "0", "> 0"), ("LEAF_GRAMS", "51", "<= 50"),
    ("LEAF_GRAMS", "nan", "range"), ("LEAF_GRAMS", "inf", "range"), ("LEAF_GRAMS", "much", "a number"),
    ("STEEP_SECONDS", "2.5", "whole number"), ("STEEP_SECONDS", "1_0", "whole number"),
    ("STEEP_SECONDS", "-1", ">= 0"), ("STEEP_SECONDS", "3600", "< 3600"),
    ("STEEP_AGAIN", "yes", "neither 0 nor 1"), ("STEEP_AGAIN", "", "neither 0 nor 1"),
    ("POUR_ORDER", "ann,", "a list like ann,bob"), ("POUR_ORDER", "ann;bob", "a list like ann,bob"),
    ("GUEST_COUNT", "9223372036854775808", "<= 9223372036854775807"), ("GUEST_COUNT", "1" * 300, "range")])
def test_values_outside_type_or_range_are_refused(name, text, part):
    [line] = problems(**{name: text})
    assert line.startswith(f"{name}: ") and part in line


def test_all_problems_come_at_once():
    lines = problems(LEAF_GRAMS="0", STEEP_SECOND="9", KETTLE="0", LEAF_KIND="green", MILK_SHARE="0.1")
    assert {line.split(":")[0] for line in lines} == {"LEAF_GRAMS", "STEEP_SECOND", "KETTLE", "LEAF_KIND"}


def test_a_value_that_cannot_be_read_brings_no_other_lines():
    [line] = problems(STEEP_SECONDS="soon", STEEP_AGAIN_SECONDS="300")
    assert line.startswith("STEEP_SECONDS: ")
    lines = problems(STEEP_AGAIN="yes", STEEP_SECONDS="5", STEEP_AGAIN_SECONDS="9")
    assert [line.split(":")[0] for line in lines] == ["STEEP_AGAIN"], "what depends on it is not known yet"
    lines = problems(STEEP_AGAIN="yes", LEAF_KIND="green", MILK_SHARE="1")
    assert [line.split(":")[0] for line in lines] == ["STEEP_AGAIN", "LEAF_KIND"], "what does not depend on it counts"


def test_an_alias_sets_its_setting_and_may_not_contradict_it():
    assert Tea.from_environment(dict(TWICE="1", TWICE_SECONDS="9")).steep_again_seconds == 9
    assert Tea.from_environment(dict(TWICE="1", STEEP_AGAIN="1")).steep_again
    [line] = problems(TWICE="1", STEEP_AGAIN="0")
    assert line.startswith("TWICE: 1, but STEEP_AGAIN=0")
    [line] = problems(TWICE="2")
    assert line.startswith("TWICE: ")


def test_a_setting_that_nothing_reads_must_keep_its_default():
    [line] = problems(STEEP_AGAIN_SECONDS="9")
    assert line == "STEEP_AGAIN_SECONDS: it is read only with STEEP_AGAIN=1; set that or leave it unset"
    assert Tea.from_environment(dict(STEEP_AGAIN_SECONDS="300")) == Tea()


def test_what_a_value_implies_gives_way_to_what_is_said():
    assert Tea.from_environment(dict(PRESET="quick")).steep_seconds == 60
    assert Tea.from_environment(dict(PRESET="quick", STEEP_SECONDS="90")).steep_seconds == 90
    assert Tea.from_environment(dict(MILK_SHARE="0.1")).leaf_kind == "black"
    assert Tea.from_environment(dict(MILK_SHARE="0", LEAF_KIND="green")).leaf_kind == "green"
    assert problems(MILK_SHARE="0.1", LEAF_KIND="green") == ["LEAF_KIND: green tea takes no milk"]


def test_fixed_variables_have_one_value_or_none():
    boiled = "water is always boiled"
    assert Tea.fixed == {"KETTLE": ("1", boiled), "KETTLE_WATTS": (">1000", boiled),
                         "MICROWAVE": (None, "not for tea"), "LEMON": ("", "not for tea")}
    assert Tea.from_environment(dict(KETTLE="1.0", KETTLE_WATTS="1200", LEMON="")) == Tea()
    assert problems(KETTLE="0") == ["KETTLE: water is always boiled; set it to 1 or unset it"]
    assert problems(KETTLE_WATTS="900")[0].startswith("KETTLE_WATTS: ")
    assert problems(MICROWAVE="0") == ["MICROWAVE: not for tea; unset it"]
    assert problems(LEMON="1") == ["LEMON: not for tea; set it to the empty text or unset it"]


@pytest.mark.parametrize("wrong, nearest", [
    ("LEAF_GRAM", "LEAF_GRAMS"), ("LEAF_KND", "LEAF_KIND"), ("PRESETS", "PRESET"),
    ("STEEP_AGAIN_SECOND", "STEEP_AGAIN_SECONDS"), ("preset", "PRESET"), ("Leaf_Kind", "LEAF_KIND"), ("leaf_gram", "LEAF_GRAMS"),
    ("POUR", "POUR_ORDER"), ("AGAIN_SECONDS", "STEEP_AGAIN_SECONDS"), ("STEEP_SECS", "STEEP_SECONDS"),
    ("GUESTS", "GUEST_COUNT")])
def test_a_misspelt_name_is_an_error_that_names_the_nearest(wrong, nearest):
    [line] = problems(**{wrong: "1"})
    assert line == f"{wrong}: no such setting; the nearest is {nearest}"


def test_variables_of_others_are_left_alone():
    assert Tea.from_environment(dict(HOME="/root", LEAVES="3", POTS="2", ORDER="3", ORDERS="4", _="x", seconds_again="7")) == Tea()


# --- Recipes


@pytest.fixture
def recipe(tmp_path):
    """Write these bytes as a file and read it; returns its assignments."""
    path = tmp_path / "mine.env"

    def read(content: bytes) -> dict[str, str]:
        path.write_bytes(content)
        return read_recipe(str(path), Tea)

    return read


@pytest.mark.parametrize("content", [
    b"LEAF_KIND=green\nSTEEP_SECONDS=60\n", b"LEAF_KIND=green\nSTEEP_SECONDS=60", b"LEAF_KIND=green\r\nSTEEP_SECONDS=60\r\n",
    b"\xef\xbb\xbf# a comment\nLEAF_KIND=green\nSTEEP_SECONDS=60\n", b"export LEAF_KIND=green\nexport STEEP_SECONDS=60\n",
    b"  # a=b\n\n  LEAF_KIND=green  \nSTEEP_SECONDS=60 # a minute\n", b"LEAF_KIND=\"green\"\nSTEEP_SECONDS='60'\n",
    b"\tLEAF_KIND=green\rSTEEP_SECONDS=60\r"])
def test_ways_to_write_one_recipe(recipe, content):
    assert recipe(content) == dict(LEAF_KIND="green", STEEP_SECONDS="60")


@pytest.mark.parametrize("line, words", [
    ("just words", "cannot read 'just words'"), ("LEAF_KIND = green", "cannot read"), ("LEAF_KIND=green tea", "cannot read"),
    ("LEAF_KIND", "cannot read"), ("=green", "cannot read"), ("LEAF_KIND='green", "cannot read"), ("x[$(touch executed)]=1", "cannot read"),
    ("LEAF_KIND=$HOME", "cannot read"), ("LEAF_KIND=`id`", "cannot read"), ('LEAF_KIND="$(id)"', "cannot read"),
    ("LEAF_KIND=green;id", "cannot read"), ("LEAF_KIND=gr\\een", "cannot read"), ("LEAF_KIND=green&", "cannot read"),
    ("LEAF_KIND=a\0b", "cannot read"), ("source other.env", "cannot read"), ("STEEP_SECONDS=60 STEEP_AGAIN=1", "cannot read"),
    ("STEEP_SECONDS=soon", "STEEP_SECONDS: 'soon' is not a whole number"), ("STEEP_SECONDS=9999", "out of range"),
    ("STEEP_SECOND=9", "the nearest is STEEP_SECONDS"), ("PATH=/tmp", "PATH: no such setting"), ("LD_PRELOAD=x.so", "no such setting"),
    ("leaf_kind=green", "the nearest is LEAF_KIND"), ("KETTLE=0", "water is always boiled"), ("MICROWAVE=1", "not for tea"),
    ("TWICE=7", "TWICE: "), ("LEAF_GRAMS=3", "line 1 sets it too")])
def test_a_recipe_is_data_and_each_fault_has_its_line(recipe, line, words):
    with pytest.raises(InputError) as caught:
        recipe(f"LEAF_GRAMS=3\n# fine\n{line}\n".encode())
    [fault] = str(caught.value).splitlines()
    assert re.match(r"\S+mine\.env:3: ", fault) and words in fault


def test_all_faults_of_a_recipe_come_at_once(recipe):
    with pytest.raises(InputError) as caught:
        recipe(b"nonsense\nLEAF_GRAMS=0\nKETTLE=1\nLEAF_GRAMS=2\n")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "2", "4"]


@pytest.mark.parametrize("content", [b"\xff\xfeL\0", b"LEAF_KIND=gr\xfcn\n"])
def test_a_file_that_is_no_text_is_no_recipe(recipe, content):
    with pytest.raises(InputError, match="mine.env: not UTF-8 text"):
        recipe(content)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.env"):
        with pytest.raises(InputError, match=f"^{path}: .*name a recipe"):
            read_recipe(str(path), Tea)


def test_help_prints_every_setting_under_its_heading():
    lines = env_settings.settings_help(Tea).splitlines()
    assert [line for line in lines if re.match(r"\w", line)] == ["Leaves", "Pot"]
    assert "  LEAF_GRAMS  (default 2.5; g; > 0, <= 50)" in lines
    assert "  LEAF_KIND  (default black; black|green)" in lines
    assert "  STEEP_AGAIN_SECONDS  (default 300; only with STEEP_AGAIN=1)" in lines
    assert "  POUR_ORDER  (default (empty); a list like ann,bob)" in lines
    assert sum(line.startswith("  ") and line[2] != " " for line in lines) == len(dataclasses.fields(Tea))


def test_groups_hold_the_fields_in_order():
    groups = env_settings.fields_by_group(Tea)
    assert [field.name for field in groups["Leaves"]] == ["leaf_kind", "leaf_grams"]
    assert [field for fields in groups.values() for field in fields] == list(dataclasses.fields(Tea))
