"""env_settings.py on a settings class of its own: what is parsed, implied, refused and printed."""
import dataclasses
import re

import pytest

import env_settings
from env_settings import FromEnvironment, InputError, fixed_variables, list_of, setting

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
    steep_again: bool = setting(False, "1: a second time", alias="TWICE")
    steep_again_seconds: int = setting(300, "then so long", only_with="STEEP_AGAIN=1", alias="TWICE_SECONDS")
    milk_share: float = setting(0.0, "milk in the cup", low=0, high=1, implies="LEAF_KIND=black")
    pour_order: str = setting("", "who is served", pattern=list_of(r"[a-z]+"), form="a list like ann,bob")
    preset: str = setting("", "common ways", choices={"": "", "quick": "STEEP_SECONDS=60 STEEP_AGAIN=0",
                                                      "long": "STEEP_SECONDS=600"})

    def conflicts(self):
        return ["LEAF_KIND: green tea takes no milk"] if self.milk_share and self.leaf_kind == "green" else []


def problems(**environ: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        Tea.from_environment(environ)
    return str(caught.value).splitlines()


def test_without_variables_everything_is_at_its_default():
    assert Tea.from_environment({}) == Tea()


def test_values_have_the_type_of_their_default():
    tea = Tea.from_environment(dict(LEAF_KIND="green", LEAF_GRAMS="3", STEEP_SECONDS="60", STEEP_AGAIN="1",
                                    POUR_ORDER="ann,bob"))
    assert dataclasses.astuple(tea)[:4] == ("green", 3.0, 60, True) and tea.pour_order == "ann,bob"
    assert [type(value) for value in dataclasses.astuple(tea)[:4]] == [str, float, int, bool]


@pytest.mark.parametrize("name, text, part", [
    ("LEAF_KIND", "herbal", "black, green"), ("LEAF_GRAMS", "0", "> 0"), ("LEAF_GRAMS", "51", "<= 50"),
    ("LEAF_GRAMS", "nan", "range"), ("LEAF_GRAMS", "inf", "range"), ("LEAF_GRAMS", "much", "a number"),
    ("STEEP_SECONDS", "2.5", "whole number"), ("STEEP_SECONDS", "1_0", "whole number"),
    ("STEEP_SECONDS", "-1", ">= 0"), ("STEEP_SECONDS", "3600", "< 3600"),
    ("STEEP_AGAIN", "yes", "neither 0 nor 1"), ("STEEP_AGAIN", "", "neither 0 nor 1"),
    ("POUR_ORDER", "ann,", "a list like ann,bob"), ("POUR_ORDER", "ann;bob", "a list like ann,bob")])
def test_values_outside_type_or_range_are_refused(name, text, part):
    [line] = problems(**{name: text})
    assert line.startswith(f"{name}: ") and part in line


def test_all_problems_come_at_once():
    lines = problems(LEAF_GRAMS="0", STEEP_SECOND="9", KETTLE="0", LEAF_KIND="green", MILK_SHARE="0.1")
    assert {line.split(":")[0] for line in lines} == {"LEAF_GRAMS", "STEEP_SECOND", "KETTLE", "LEAF_KIND"}


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
    ("STEEP_AGAIN_SECOND", "STEEP_AGAIN_SECONDS")])
def test_a_misspelt_name_is_an_error_that_names_the_nearest(wrong, nearest):
    [line] = problems(**{wrong: "1"})
    assert line == f"{wrong}: no such setting; the nearest is {nearest}"


def test_variables_of_others_are_left_alone():
    assert Tea.from_environment(dict(HOME="/root", LEAVES="3", POTS="2")) == Tea()


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
