"""Protects the options of a run: each field says all about itself, and everything that depends on it is derived."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace

import pytest

from spot_fast.config import OPTIONS, SOURCED_DEFAULTS, Config, check_config, flag, option_names, preset
from spot_fast.errors import UserError
from spot_fast.training.arguments import conflicts, parse, with_resumable
from spot_fast.training.teacher import check_teacher, inherit

BY_NAME = {each.name: each for each in fields(Config)}
KINDS = {name: each.type.split(" | ")[0] for name, each in BY_NAME.items()}


def other(name: str, config: Config) -> object:
    """Another valid value of a field than `config` has."""
    value, option = getattr(config, name), OPTIONS[name]
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if isinstance(value, bool):
        return not value
    return f"{value}x" if KINDS[name] == "str" else (value or 0) + (3 if KINDS[name] == "int" else 0.5)


@pytest.mark.parametrize("name", OPTIONS)
def test_metadata_is_complete(name):
    option, kind = OPTIONS[name], KINDS[name]
    assert option.help and not option.help.endswith(".") and "%(" not in option.help and option.group
    # A number has a bound unless it is a choice, and nothing else has one.
    assert (option.least is not None) == (kind in ("int", "float") and option.choices is None)
    assert option.choices is None or BY_NAME[name].default in option.choices
    assert not option.keeps_auto or "auto" in option.choices
    assert not option.keywords or option.path
    assert not option.path or kind == "str"
    # A student and its teacher can only be told apart in an inherited option by asking for it.
    assert not option.shared or option.inherited
    assert option.only is None or option.only[0] in OPTIONS
    assert re.fullmatch(r"|\d(\.\d.*)?|D\.\d|authors' code", option.source)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.least is not None])
def test_values_below_the_bound_are_refused_by_name(name):
    least = OPTIONS[name].least
    for value in (least - 1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"^{flag(name)} is {value}: use {least} or more$"):
            check_config(replace(Config(), **{name: value}))


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.choices])
def test_choices_are_the_command_lines(name, capsys):
    for choice in OPTIONS[name].choices:
        if choice != "auto":
            assert parse([flag(name), str(choice)]).given == {name: choice}
    with pytest.raises(SystemExit):
        parse([flag(name), "none of them"])
    assert f"argument {flag(name)}: invalid" in capsys.readouterr().err


def test_auto_asks_a_resumed_run_for_what_it_settled_on():
    for name in OPTIONS:
        if "auto" in (OPTIONS[name].choices or ()):
            asked = {} if OPTIONS[name].keeps_auto else {name: "auto"}
            assert parse([flag(name), "auto"]).given == asked
    assert option_names("keeps_auto") == ("precision", "compile", "loader")


def test_paths_become_absolute_but_keywords_do_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert option_names("path") == ("data", "sbd", "cache_dir", "encoder_weights", "init_from")
    for name in option_names("path"):
        assert parse([flag(name), "here"]).given == {name: str(tmp_path / "here")}
        for word in OPTIONS[name].keywords:
            assert parse([flag(name), word]).given == {name: word}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_may_change_exactly_the_resumable_options(name):
    config = Config()
    given = {name: other(name, config)}
    changed = replace(config, **given)
    if OPTIONS[name].resumable:
        assert conflicts(config, given) == [] and with_resumable(config, given) == changed
        assert changed.fingerprint() == config.fingerprint()
    else:
        assert conflicts(config, given) == [f"{flag(name)} is {given[name]} but the run has {getattr(config, name)}"]
        assert with_resumable(config, given) == config
        assert changed.fingerprint() != config.fingerprint()


def test_resumable_options_are_those_that_decide_nothing():
    """By hand, so that no option becomes resumable by accident: it would go on with other weights."""
    assert set(option_names("resumable")) == {
        "accumulate",
        "data",
        "sbd",
        "encoder_weights",
        "init_from",  # its weights are in the run's first saved state
        "workers",
        "cache",
        "cache_dir",
        "compile",
        "cuda_graph",
        "save_every",
        "on_bad_step",
        "spike",
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_a_student_inherits_what_it_is_not_given(name):
    asked = Config(stage=2)
    teacher = replace(Config(), **{name: other(name, Config())}) if name != "stage" else Config()
    student, taken = inherit(asked, teacher, given=())
    assert taken == ([name] if OPTIONS[name].inherited else [])
    assert student == (replace(asked, **{name: getattr(teacher, name)}) if OPTIONS[name].inherited else asked)
    assert inherit(asked, teacher, given=(name,)) == (asked, [])


def test_inherited_options_are_the_images_the_encoder_the_model_and_the_batch():
    """By hand: initial slots, gradient rule, heads of slot attention and the optimisation are the stage's own."""
    own = {"slot_init", "truncation", "slot_heads", "train_blocks", "sbd", "loader", "workers", "cache", "cache_dir"}
    groups = {"data", "frozen encoder", "slot attention", "decoder"}
    expected = {name for name, option in OPTIONS.items() if option.group in groups} - own | {"batch_size"}
    assert set(option_names("inherited")) == expected


@pytest.mark.parametrize("name", option_names("shared"))
def test_a_teacher_with_another_value_of_a_shared_option_is_refused(name, tmp_path):
    student, teacher = Config(stage=2), replace(Config(), **{name: other(name, Config())})
    check_teacher(tmp_path, Config(), student)
    with pytest.raises(
        UserError, match=f"has {name} .* but {flag(name)} is .*: both need the same {OPTIONS[name].shared}"
    ):
        check_teacher(tmp_path, teacher, student)


def test_help_has_every_option_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for group in {option.group for option in OPTIONS.values()}:
        assert f"\n{group}:\n" in text
    assert text.count("config.json keeps the choice") == len(option_names("keeps_auto"))


def test_config_json_goes_there_and_back_and_refuses_wrong_types():
    config = preset("coco", 2, data="/data", workers=3, att_weight_final=0.1)
    assert Config.from_json(config.to_json()) == config
    for name, kind in KINDS.items():
        wrong = {"int": "1", "float": "1.5", "str": 1, "bool": 1}[kind]
        with pytest.raises(ValueError, match=f"{name} is {wrong!r}, not {re.escape(BY_NAME[name].type)}|method"):
            Config.from_json(f'{{"{name}": {wrong!r}}}'.replace("'", '"'))
    with pytest.raises(ValueError, match="seed is True, not int"):
        Config.from_json('{"seed": true}')


def test_sourced_defaults_are_the_defaults():
    assert {name: value for name, (value, _) in SOURCED_DEFAULTS.items()}.items() <= asdict(Config()).items()
