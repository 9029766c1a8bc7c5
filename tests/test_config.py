"""Settings: what they refuse, in which words, and that TOML gives back what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep3stream.cli.options import Parser, add_settings, given_settings
from ep3stream.config import (
    FIT_TABLES,
    KERNEL_DEFAULTS,
    ConvertConfig,
    DataConfig,
    FitConfig,
    KernelConfig,
    KernelName,
    RunConfig,
    SolverConfig,
    parse_bytes,
    parse_splits,
    parse_weights,
    settings_of,
)
from ep3stream.config.parse import parse_epochs
from ep3stream.config.settings import at_least, check_settings, setting
from ep3stream.errors import ConfigError
from ep3stream.solver.named_kernels import NAMED_KERNELS

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
sizes = st.integers(0, 2**40)
weights = st.dictionaries(names, st.floats(1e-300, 1e300) | st.integers(1, 2**40), max_size=3)
kernel_values = {
    "bandwidth": st.just("median") | st.floats(1e-300, 1e300),
    "shape": st.floats(0, 2, exclude_min=True),
    "degree": st.integers(1, 100),
    "offset": st.floats(0, 1e300),
    "depth": st.integers(1, 1000),
    "bias": st.floats(0, 1e300),
    "power": st.floats(0, 2, exclude_min=True),
}
configs = st.builds(
    FitConfig,
    st.builds(
        DataConfig,
        names,
        st.none() | names,
        st.sampled_from(["none", "standard", "minmax"]),
        st.booleans(),
    ),
    st.sampled_from(get_args(KernelName)).flatmap(
        lambda name: st.fixed_dictionaries(
            {"name": st.just(name)},
            optional={item: kernel_values[item] for item in KERNEL_DEFAULTS.get(name, ["bandwidth"])},
        ).map(lambda values: KernelConfig(**values))
    ),
    st.builds(
        SolverConfig,
        st.integers(1, 2**40) | names,
        st.sampled_from(["nystrom", "exact"]),
        st.integers(1, 2**40) | st.floats(1e-300, 1e300) | st.just("auto"),
        sizes,
        sizes,
        momentum=st.floats(0, 1, exclude_max=True),
        averaging=st.floats(0, 1e300),
        validate_every=st.floats(1e-300, 1e300),
        patience=sizes | st.just("auto"),
        class_weights=st.sampled_from(["none", "balanced"]) | weights.filter(bool),
        output_weights=weights,
    ),
    st.builds(
        RunConfig,
        st.integers(1, 2**62),
        sizes,
        st.floats(0, 1e300),
        st.integers(1, 2**40),
        st.sampled_from([1, "auto"]),
        st.integers(0, 2**63 - 1),
        st.none() | names,
        minutes=st.floats(0, 1e300),
    ),
)


@given(configs)
def test_settings_come_back_from_toml_as_they_went(config):
    again = FitConfig.from_toml(config.to_toml(), "test")
    assert again == config
    assert config.differences(again) == {}


def test_a_missing_setting_has_its_default():
    assert FitConfig.from_toml("", "test") == FitConfig()
    assert FitConfig.from_toml("[solver]\nepochs = 3", "test").solver == SolverConfig(epochs=3)


def test_differences_name_table_setting_and_both_values():
    other = replace(FitConfig(), solver=SolverConfig(epochs=3))
    assert FitConfig().differences(other) == {"solver.epochs": ("auto", 3)}


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("epochs", "settings.toml is not TOML"),
        ("format_version = 2", "format_version 2; this version of ep3stream reads 1"),
        ("[sover]\nepochs = 1", r"unknown table \['sover'\]; use data, kernel, solver, run"),
        ("solver = 1", "solver must be a table"),
        ("[solver]\nepoch = 1", "solver.epoch is not a setting; use one of centers"),
        ("[solver]\npatience = 1.5", "solver.patience is 1.5; it must be int"),
        ("[solver]\npatience = -1", "patience is -1; use a positive number, or 0 for none"),
        ("[solver]\nvalidate_every = 0", "validate_every is 0; use a positive number"),
        ("[solver]\nepochs = inf", "epochs is inf; use a positive number"),
        ("[solver]\nclass_weights = 'even'", "class_weights is 'even'; choose one of none, balanced"),
        ("[solver]\nclass_weights = 2", "class_weights is 2; it must be dict or str"),
        ("[solver.class_weights]\ncat = 0", "class_weights of 'cat' is 0; use a positive, finite number"),
        ("[solver.class_weights]", "class_weights has no class; leave it out, or name one"),
        ("[solver.output_weights]\ndelay = 'big'", "output_weights of 'delay' is 'big'; use a positive"),
        (
            "[solver]\nridge = 0.1\nprojection = 'eigenpro'",
            "ridge is 0.1, but projection is 'eigenpro', the published method, which has none",
        ),
        ("[solver]\nepochs = true", "solver.epochs is True; it must be float or int"),
        ("[solver]\nepochs = 0", "epochs is 0; use a positive number, like 2 or 0.5"),
        (f"[solver]\nbatch_size = {10**400}", "solver.batch_size has more than 64 bits"),
        ("[solver]\nbatch_size = -1", "batch_size is -1; use a positive number, or 0"),
        ("[solver]\ncenters = 0", "centers is 0; use at least 1"),
        ("[solver]\nmomentum = 1", r"momentum is 1; use a number in \[0, 1\)"),
        ("[solver]\nmomentum = nan", "momentum is nan"),
        ("[solver]\naveraging = inf", "averaging is inf"),
        ("[solver]\nprojection = 'none'", "projection is 'none'; choose one of nystrom"),
        ("[solver]\ndata_rank = 5\nnystrom_samples = 5", "data_rank < 5 or more nystrom_samples"),
        ("[kernel]\nname = 'sinc'", "kernel is 'sinc'; choose one of auto, laplacian, gaussian"),
        ("[kernel]\nbandwidth = 'mean'", "bandwidth is 'mean'; use 'median' or a positive"),
        ("[kernel]\nbandwidth = 0", "bandwidth is 0"),
        ("[kernel]\nbandwidth = inf", "bandwidth is inf"),
        ("[kernel]\nshape = 1.0", "shape is 1.0, which the auto kernel does not have; leave it out"),
        ("[kernel]\nname = 'ntk_relu'\nbandwidth = 2", "bandwidth is 2, .* this kernel takes depth, bias"),
        ("[kernel]\nname = 'dispersal'\nshape = 2.5", r"shape is 2.5; the dispersal kernel .* \(0, 2\]"),
        ("[kernel]\nname = 'rational_quadratic'\nshape = 0", "shape is 0; use a positive"),
        ("[kernel]\nname = 'polynomial'\ndegree = 0", "degree is 0; use a whole number from 1 to 100"),
        ("[kernel]\nname = 'polynomial'\ndegree = 2.5", "kernel.degree is 2.5; it must be int"),
        ("[kernel]\nname = 'polynomial'\noffset = -1", "offset is -1; use 0 or a positive"),
        ("[kernel]\nname = 'ntk_relu'\ndepth = 0", "depth is 0; use a whole number from 1"),
        ("[kernel]\nname = 'ntk_relu'\nbias = nan", "bias is nan; use 0 or a positive"),
        ("[data]\nscale = 'log'", "scale is 'log'; choose one of auto, standard, minmax, none"),
        ("[run]\nmemory_bytes = 0", "memory is 0 bytes"),
        ("[run]\nseed = -1", "seed is -1"),
        ("[run]\ndevices = 0", "devices is 0; use at least 1, or auto"),
        ("[run]\ndask = 1", "run.dask is 1; it must be str"),
        ("[run]\ncheckpoint_minutes = nan", "checkpoint_minutes is nan"),
        ("[run]\ncheckpoint_steps = -1", "checkpoint_steps is -1"),
        ("[run]\nkeep_checkpoints = 0", "keep_checkpoints is 0; use at least 1"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_remedy(toml, words):
    with pytest.raises(ConfigError, match=words):
        FitConfig.from_toml(toml, "settings.toml")


def test_a_file_name_that_is_not_utf8_is_refused_before_it_is_written():
    with pytest.raises(ConfigError, match=r"solver\.centers .* not UTF-8"):
        FitConfig().with_settings({"solver": {"centers": "z\udcff.npy"}}, "command line")


def test_the_kernels_of_the_settings_are_those_of_the_solver():
    assert get_args(KernelName) == ("auto", *NAMED_KERNELS)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("1", 1), ("512MB", 512 * 10**6), ("8GiB", 8 << 30), (" 1.5 kib ", 1536), ("2TB", 2 * 10**12)],
)
def test_bytes_read_with_their_unit(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", "1e9", "3 parsecs", "0", "0.2B", "1 2", "9" * 400, "9999999999TB"]
)
def test_bytes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="bytes"):
        parse_bytes(text)


def test_splits_read_as_names_and_fractions():
    assert parse_splits("train=0.9, test = 0.1") == {"train": 0.9, "test": 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train", "NAME=FRACTION"),
        ("train=most", "NAME=FRACTION"),
        ("train=0.5,train=0.5", "'train' is given twice"),
        ("train=0.5", "sum to 0.5; they must sum to 1"),
        ("train=1.5,test=-0.5", "split train has the fraction 1.5"),
        ("train=nan", "split train has the fraction nan"),
        ("../up=1", r"split name '\.\./up' is not allowed"),
    ],
)
def test_bad_splits_are_refused_by_name(text, words):
    with pytest.raises(ConfigError, match=words):
        ConvertConfig(splits=parse_splits(text))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "ranking"}, "task is 'ranking'; choose one of regression, classification"),
        ({"format": "csv"}, "format is 'csv'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"seed": -1}, "seed is -1"),
        ({"segment_bytes": 1}, "segment_bytes is 1; use at least 4KiB"),
        ({"memory_bytes": 1}, "memory is 1 bytes but segments have"),
    ],
)
def test_bad_settings_of_a_conversion_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        ConvertConfig(**settings)


def test_whole_epochs_are_written_whole():
    config = FitConfig(solver=SolverConfig(epochs=parse_epochs("2.0")))
    assert "epochs = 2\n" in config.to_toml()
    assert 'epochs = "auto"\n' in FitConfig().to_toml()


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 100), (0.5, 50), (2.25, 225), (1e-9, 1), (0.004, 1), (0.016, 2)]
)
def test_a_part_of_an_epoch_is_that_part_of_its_steps_but_one_at_least(epochs, steps):
    assert SolverConfig(epochs=epochs).n_steps(100) == steps
    assert SolverConfig(validate_every=epochs).validation_steps(100) == steps


def test_settings_in_use_are_those_that_the_left_out_ones_stand_for():
    given = SolverConfig(momentum=0.9, averaging=2.0, step="measured")
    assert SolverConfig().in_use() == given.in_use()
    published = FitConfig(solver=SolverConfig(projection="eigenpro")).in_use().solver
    assert (published.momentum, published.averaging, published.step) == (0, 0, "published")
    kernel = KernelConfig("dispersal")
    assert FitConfig(kernel=kernel).in_use() == FitConfig(kernel=replace(kernel, shape=1.5)).in_use()


def test_weights_are_parsed_by_name_and_refused_by_part():
    assert parse_weights('cat=2, "a=b,c"=0.5') == {"cat": 2, "a=b,c": 0.5}
    for text, words in (
        ("cat", "weight 'cat' is not NAME=WEIGHT"),
        ("a=1,a=2", "weight of 'a' is given twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_weights(text)


@dataclass(frozen=True, slots=True)
class Oven:
    """One setting of each type."""

    heat_c: float = setting(180.0, "of the air", limit=at_least(20), option="heat")
    racks: int | Literal["all"] = setting("all", "that are used", limit=at_least(1, "at least 1, or all"))
    fan: Literal["off", "slow"] = setting("off", "behind the grid")
    light: bool | str = setting(False, "a lamp")
    dish: str | None = setting(None, "what is baked")
    clock: bool = setting(True, "on the door", option=None)
    guests: Mapping[str, float] = setting(dict, "portions", metavar="NAME=N,...", parse=parse_weights)

    def __post_init__(self) -> None:
        check_settings(self)


def test_a_setting_is_declared_once_and_its_option_check_and_help_follow():
    parser = Parser("oven")
    add_settings(parser, Oven, "oven")

    def bake(*words: str) -> Oven:
        return Oven(**given_settings(parser.parse_args(words), Oven, "oven"))

    assert bake() == Oven()
    words = "--heat 200 --racks 2 --fan slow --light --light-dir hall --dish pie --guests a=1,b=2"
    assert bake(*words.split()) == Oven(200.0, 2, "slow", "hall", "pie", True, {"a": 1.0, "b": 2.0})
    assert bake("--no-light", "--racks", "all").racks == "all"
    for wrong, message in (
        ("--heat 10", r"heat_c is 10\.0; use at least 20"),
        ("--racks 0", "racks is 0; use at least 1, or all"),
        ("--racks most", "argument --racks: 'most' is neither 'all' nor a number; see oven --help"),
        ("--fan fast", "argument --fan: invalid choice: 'fast'"),
        ("--guests a", "argument --guests: weight 'a' is not NAME=WEIGHT"),
        ("--clock", "unrecognized arguments: --clock"),
    ):
        with pytest.raises(ConfigError, match=message):
            bake(*wrong.split())
    text = " ".join(parser.format_help().split())
    for line in ("--heat X of the air; default: 180", "--racks all|N", "--dish DISH what is baked"):
        assert line in text


def test_every_setting_says_what_it_is_and_defaults_pass_their_own_checks():
    for table in (*FIT_TABLES.values(), ConvertConfig):
        table()
        for each in settings_of(table):
            assert len(each.help) > 8, each.name
            assert each.on_resume in ("fixed", "override", "free")


def test_the_options_of_a_fit_are_those_that_scripts_know():
    options = " ".join(
        sorted(
            f"{each.option}" for table in FIT_TABLES.values() for each in settings_of(table) if each.option
        )
    )
    assert options == (
        "bandwidth batch-size bias center-sampling centers checkpoint-minutes checkpoint-steps class-weights dask "
        "data-rank degree depth devices effects epochs host-memory inputs-rank kernel linear max-restarts memory "
        "metric metric-rounds minutes model-rank nystrom-samples offset output-weights patience power precision "
        "projection projection-passes projection-tolerance read-timeout ridge "
        "scale seed shape sharpness split step tail tensorboard validate validate-every"
    )
