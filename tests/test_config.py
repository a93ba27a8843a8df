import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from tests import tiny
from txl_jax import config
from txl_jax.config import Command, Config, load, parse, parse_words
from txl_jax.errors import UserError

pytest_plugins = ["tests.tiny_runs"]

SECTIONS = ("model", "data", "optim", "train", "cluster")
PROG = "python -m txl_jax.train"


def fields() -> list[tuple[str, str, Any]]:
    """Section, name and type of every field of an experiment."""
    return [
        (section, name, hint)
        for section in SECTIONS
        for name, hint in get_type_hints(type(getattr(Config(), section))).items()
    ]


def another(value: Any, hint: Any) -> Any:
    """A value of the type `hint` that is not `value`."""
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if choice != value), value)
    if hint is bool:
        return not value
    if hint in (int, int | None):
        return (value or 0) + 7
    if hint in (float, float | None):
        return (value or 0) / 2 + 0.125
    if hint is str:
        return f"{value}/a b=é"
    entry = {tuple[bool, ...]: True, tuple[int, ...]: 3}[hint]
    return (*value, entry)


def unboxed(text: str) -> str:
    """Help as running text, without the boxes that are drawn around it."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def spelt(name: str, value: Any) -> list[list[str]]:
    """The words that set a field, in both spellings of its name."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [[f"--{dashed}"], [f"--{name}"]] if value else [[f"--no-{dashed}"], [f"--no_{name}"]]
    if isinstance(value, tuple):
        return [[f"--{word}", *map(str, value)] for word in (dashed, name)]
    return [[f"--{dashed}", str(value)], [f"--{name}={value}"], [f"--{dashed}={value}"]]


@pytest.mark.parametrize("section, name, hint", fields())
def test_every_field_has_an_option_in_both_spellings(section, name, hint):
    plain = load("quickstart")
    part = getattr(plain, section)
    value = another(getattr(part, name), hint)
    changed = dataclasses.replace(part, **{name: value})
    expected = dataclasses.replace(plain, **{section: changed})
    for words in spelt(name, value):
        assert load("quickstart", words) == expected, words


def test_option_names_are_unique():
    names = [name for _, name, _ in fields()]
    names += [field.name for field in dataclasses.fields(Command) if field.name != "experiment"]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize(
    "instance", [Command(Config()), Config(), *(getattr(Config(), s) for s in SECTIONS)]
)
def test_configs_are_frozen(instance):
    name = dataclasses.fields(instance)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, name, None)
    assert hash(instance) == hash(dataclasses.replace(instance))


def test_a_command_names_an_experiment_and_where_it_runs():
    command = parse(PROG, [])
    assert (command.config, command.local) == ("quickstart", False)
    assert command.experiment == load("quickstart")
    command = parse(PROG, ["--batch", "3", "--config", "quickstart", "--local", "--batch=4"])
    assert (command.config, command.local, command.experiment.train.batch) == (
        "quickstart",
        True,
        4,
    )


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of configs with `small_run` and `large_run` beside the project's."""
    for name, layers in (("small_run", 3), ("large_run", 33)):
        (tmp_path / f"{name}.py").write_text(
            f'"""A {name}, as its docstring says."""\n'
            "from txl_jax.config import Config, ModelConfig\n"
            f"def config(): return Config(model=ModelConfig(n_layer={layers}))\n"
        )
    (tmp_path / "_hidden.py").touch()
    import configs

    monkeypatch.setattr(configs, "__path__", [str(tmp_path)])
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    for name in ("small_run", "large_run"):
        monkeypatch.delitem(sys.modules, f"configs.{name}", raising=False)


def test_every_file_in_configs_is_an_experiment(others):
    assert config.experiments() == ["large_run", "small_run"]
    assert load("small_run") == dataclasses.replace(
        Config(), model=dataclasses.replace(Config().model, n_layer=3)
    )
    for words in (["--config", "large_run"], ["--config=large_run"]):
        assert parse(PROG, words).experiment.model.n_layer == 33
        assert parse(PROG, [*words, "--n-layer", "5"]).experiment.model.n_layer == 5


def test_of_two_names_the_last_counts(others):
    command = parse(PROG, ["--config", "small_run", "--config=large_run"])
    assert (command.config, command.experiment.model.n_layer) == ("large_run", 33)


def test_help_shows_the_defaults_of_the_experiment_that_is_named(others, capsys):
    for name, layers in (("small_run", 3), ("large_run", 33)):
        with pytest.raises(SystemExit) as ended:
            parse(PROG, ["--config", name, "--help"])
        assert not ended.value.code
        text, errors = capsys.readouterr()
        assert f"A {name}, as its docstring says." in text
        assert f"--n-layer INT Layers L. (default: {layers}) --n-head" in unboxed(text)
        assert errors == ""


def test_the_project_s_experiments_can_be_loaded():
    assert "quickstart" in config.experiments()
    for name in config.experiments():
        assert isinstance(load(name), Config)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            ["--config", "quikstart"],
            r"no config 'quikstart' \(did you mean quickstart\?\); there ar",
        ),
        (["--config=zzz"], r"there is no config 'zzz'; there are: (.*, )?quickstart"),
        (["--config"], "Missing value for argument '--config'"),
        (["--n-layers", "3"], r"unknown option --n-layers \(did you mean --n-layer\?\)"),
        (["--n_layers=3"], r"unknown option --n_layers \(did you mean --n-layer\?\)"),
        (["--learning-rate", "3"], "unknown option --learning-rate"),
        (["--model.n-layer", "3"], "unknown option --model.n-layer"),
        (["--batch", "3", "4"], "unknown option 4"),
        (["batch=3"], "unknown option batch"),
        (["--batch", "3x"], "--batch: .*'3x'"),
        (["--batch", "1e3"], "--batch: .*'1e3'"),
        (["--batch"], "Missing value for argument '--batch'"),
        (["--lr", "--batch", "3"], "Missing value for argument '--lr'"),
        (["--lr", "fast"], "--lr: .*'fast'"),
        (["--optim", "adamm"], "'adamm' .*'--optim'.*'adam', 'adamw', 'sgd'"),
        (["--dtype=float64"], "'float64' .*'--dtype'.*'float32', 'bfloat16', 'float16'"),
        (["--d-embed", "wide"], "--d-embed: .*'wide'"),
        (["--tie-projs", "perhaps"], "'perhaps' .*'--tie-projs'"),
        (["--same-length", "perhaps"], "unknown option perhaps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_do_not_fit_get_one_line(words, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        parse(PROG, words)
    assert "\n" not in str(caught.value)
    if "--config" not in words[0]:
        assert str(caught.value).endswith(f"; see {PROG} --help")


def test_other_commands_are_parsed_the_same_way():
    @dataclasses.dataclass(frozen=True)
    class Arguments:
        logdir: str
        """A folder."""
        tgt_len: int | None = None

    def parsed(*words: str) -> Arguments:
        return parse_words(Arguments, None, "python -m other", "About it.", list(words))

    assert parsed("--logdir", "a b", "--tgt_len=3") == Arguments("a b", 3)
    with pytest.raises(UserError, match=r"--logdir.*; see python -m other --help") as caught:
        parsed("--tgt-len", "3")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"unknown option --log-dir \(did you mean --logdir\?\)"):
        parsed("--logdir", "a", "--log-dir", "b")


@dataclasses.dataclass(frozen=True)
class MayBe:
    may_be: bool | None = None
    text: str = ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("--may-be", True),
        ("--may_be", True),
        ("--no-may-be", False),
        ("--may-be True", True),
        ("--may-be False", False),
        ("--may-be None", None),
        ("--may-be=False", False),
        ("--may-be --text a", True),
        ("--text a --no_may_be", False),
    ],
)
def test_a_bool_that_may_be_none_is_a_flag_too(words, expected):
    text = "a" if "--text" in words else ""
    assert parse_words(MayBe, None, PROG, "", words.split()) == MayBe(expected, text)


def test_the_command_refuses_with_status_2_and_helps_with_status_0(shell, tmp_path):
    refusal = shell.refused("train", "--n-layers", "3", cwd=tmp_path)
    assert refusal == (f"unknown option --n-layers (did you mean --n-layer?); see {PROG} --help")
    assert list(tmp_path.iterdir()) == []
    status, text, errors = shell.run("train", "--config=quickstart", "--help", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert f"usage: {PROG}" in text
    lr = load("quickstart").optim.lr
    assert lr != Config().optim.lr
    assert f"Highest learning rate, before any scaling by --lr-batch. (default: {lr})" in unboxed(
        text
    )
    assert list(tmp_path.iterdir()) == []


def test_configs_are_read_without_jax():
    script = (
        "import json, sys, txl_jax.config as c\n"
        "for name in c.experiments(): c.load(name, ['--batch', '4'])\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorboardX", "tensorstore"}
    assert heavy & set(json.loads(done.stdout)) == set()
