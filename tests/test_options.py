"""The options of a conversion: what they may be, how a misspelt one is refused, and texts that name them."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import pytest

from normswap.errors import InputError, Term, Text, argument, full_cause, function, marked, spelled
from normswap.options import Options


def test_the_defaults_are_valid_and_globs_become_tuples() -> None:
    assert Options() == Options(include=["*"], exclude=(), spread=2)  # type: ignore[arg-type]
    assert Options(include="layer1.*").include == ("layer1.*",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spread": -1}, "spread must be ≥ 0 and finite, got -1"),
        ({"spread": float("nan")}, "spread must be ≥ 0 and finite, got nan"),
        ({"spread": float("inf")}, "spread must be ≥ 0 and finite, got inf"),
        ({"spread": "2"}, "spread must be ≥ 0 and finite, got '2'"),
        ({"spread": True}, "spread must be ≥ 0 and finite, got True"),
        ({"tune_steps": -1}, "tune_steps must be a whole number ≥ 0, got -1"),
        ({"tune_steps": 1.5}, "tune_steps must be a whole number ≥ 0, got 1.5"),
        ({"scale": "no"}, "scale must be True or False, got 'no'"),
        ({"inplace": 1}, "inplace must be True or False, got 1"),
        ({"init": ["match"]}, "init must be a text or None, got ['match']"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Options(**given)
    assert refused.value.message == message
    assert "the default is" in refused.value.hint


@pytest.mark.parametrize(
    ("wrong", "right"),
    [(5, "a"), (None, ("a",)), ([5], ["a", "b"]), ({1: 2}, {"a": 1})],
    ids=["5", "None", "list", "dict"],
)
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_globs_are_texts(name: str, wrong: object, right: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must be globs of names, got ") as refused:
        Options(**{name: wrong})  # type: ignore[arg-type]
    assert refused.value.code == "option-type"
    assert getattr(Options(**{name: right}), name) == tuple(right)  # negative control


@pytest.mark.parametrize("empty", [(), [], iter(())], ids=["tuple", "list", "iterator"])
def test_an_empty_list_of_norms_is_not_taken_for_all_of_them(empty: Any) -> None:
    with pytest.raises(InputError, match="include names no norm: it is empty") as refused:
        Options(include=empty)
    assert "leave it out to convert all norms" in refused.value.hint
    assert Options(exclude=empty).exclude == ()  # the negative control: to leave none is to convert all


def test_the_former_name_of_fresh_is_an_alias_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="init='fresh'"):
        former = Options(**{"init": "none"})
    assert former == Options(init="fresh")


def test_keyword_arguments_are_taken_apart() -> None:
    options, of_recipe = Options.split({"spread": 1, "num_groups": 4, "exclude": ["a"]}, ["num_groups", "eps"])
    assert options == Options(spread=1, exclude=("a",))
    assert of_recipe == {"num_groups": 4}


@pytest.mark.parametrize(
    ("name", "near"),
    [("groups", "num_groups"), ("spred", "spread"), ("tune_step", "tune_steps"), ("calibraton", "calibration")],
)
def test_a_misspelt_option_names_the_near_one(name: str, near: str) -> None:
    recipe_fields = ["num_groups", "group_size", "eps"]
    with pytest.raises(InputError) as refused:
        Options.split({name: 3}, recipe_fields, others=["calibration"])
    assert refused.value.message == f"there is no option {name!r}; did you mean {near!r}?"
    assert "num_groups, group_size, eps" in refused.value.hint


def test_an_option_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(InputError) as refused:
        Options.split({"xyzzy": 3}, [])
    assert refused.value.message == "there is no option 'xyzzy'"


def test_a_new_option_is_checked_and_taken_without_another_edit() -> None:
    from normswap.options import option

    @dataclass(frozen=True)
    class More(Options):
        warmth: float = option(0.5, "How warm", minimum=0.25)

    assert More.split({"warmth": 1.0}, [])[0] == More(warmth=1.0)
    with pytest.raises(InputError, match=r"warmth must be ≥ 0\.25 and finite, got 0"):
        More(warmth=0.0)


def test_the_docstring_says_of_each_option_what_its_field_says() -> None:
    described = dict(re.findall(r"^    (\w+): ((?:.|\n {8})+)", inspect.getdoc(Options) or "", flags=re.MULTILINE))
    assert list(described)[: len(fields(Options))] == [known.name for known in fields(Options)]
    for known in fields(Options):
        said = " ".join(described[known.name].split())
        assert said.startswith(str(known.metadata["meaning"].text)), known.name


# Texts that name arguments


def shouted(term: Term) -> str:
    return f"<{term.kind} {term.name}{''.join(map(repr, term.value))}>"


def test_a_text_reads_as_python_and_can_be_spelled_otherwise() -> None:
    text = Text(f"give {argument('calibration')} or {argument('scale', False)}; {function('fold')}; {full_cause()}")
    assert text == "give calibration= or scale=False; normswap.fold(model); the exception's __cause__"
    other = "give <argument calibration> or <argument scaleFalse>; <function fold>; <cause >"
    assert spelled(text, shouted) == other
    assert spelled(Text(f"{marked(text)}"), shouted) == other
    assert spelled("no term in it", shouted) == "no term in it"


def test_a_text_survives_copies_and_records() -> None:
    @dataclass(frozen=True)
    class Record:
        notes: tuple[str, ...]

    text = Text(f"give {argument('calibration')}")
    for same in (copy.deepcopy(text), pickle.loads(pickle.dumps(text)), asdict(Record((text,)))["notes"][0]):
        assert spelled(same, shouted) == "give <argument calibration>"
    assert json.dumps([text]) == '["give calibration="]'


def test_an_error_shows_its_arguments_as_python_does_and_keeps_them_marked() -> None:
    error = InputError(f"no {argument('calibration')}", code="none", hint=f"give {argument('init', 'absorb')}")
    assert str(error) == "error[none]: no calibration=\n  hint: give init='absorb'"
    assert (error.message, error.hint, error.args) == ("no calibration=", "give init='absorb'", ("no calibration=",))
    assert (
        spelled(error.text, shouted) == "error[none]: no <argument calibration>\n  hint: give <argument init'absorb'>"
    )
