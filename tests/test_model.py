"""The model: what it predicts, what it refuses, and that it survives its files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep3stream.config import KERNEL_DEFAULTS
from ep3stream.errors import DamagedDataError, InputError
from ep3stream.prediction.models import load
from ep3stream.run.bundle import write_bundle
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import CallableKernel, RadialKernel
from ep3stream.solver.model import Predictor
from ep3stream.solver.named_kernels import NAMED_KERNELS, named_kernel
from ep3stream.solver.targets import TargetCode

P, D = 30, 4


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def model(n_outputs: int = 2, classes=None, kernel=None) -> Predictor:
    return Predictor(
        kernel or RadialKernel("gaussian", 1.5, draw(D)),
        draw(P, D),
        draw(P, n_outputs),
        InputScaling(draw(D), draw(D).abs()),
        TargetCode(classes is not None, draw(n_outputs), draw(n_outputs).abs()),
        tuple(f"x{i}" for i in range(D)),
        ("y",) if classes else tuple(f"y{i}" for i in range(n_outputs)),
        classes,
    )


def dense(made: Predictor, x: np.ndarray) -> np.ndarray:
    """offset + scale * K(x, Z) weights in float64."""
    scaled = [(a - made.inputs.shift.double().numpy()) * made.inputs.scale.double().numpy()
              for a in (x, made.centers.double().numpy())]  # fmt: skip
    squared = np.square(scaled[0][:, None] - scaled[1][None]).sum(2) / 1.5**2
    outputs = np.exp(-squared / 2) @ made.weights.double().numpy()
    return made.targets.offset.numpy() + made.targets.scale.numpy() * outputs


X = draw(2500, D).numpy()


def test_predictions_are_those_of_the_dense_formula_in_the_units_of_the_data():
    assert np.allclose(model().predict(X), dense(model(), X), atol=1e-4)


def test_one_target_predicts_a_vector_and_several_a_matrix():
    assert model(1).predict(X[:7]).shape == (7,)
    assert model(3).predict(X[:7]).shape == (7, 3)
    assert model(3).predict(X[:0]).shape == (0, 3)
    assert model(1).decision_function(X[:7]).shape == (7, 1)


def test_classes_are_predicted_by_name():
    made = model(3, ("ant", "bee", "cicada"))
    scores = made.decision_function(X[:50])
    assert list(made.predict(X[:50])) == [made.class_names[i] for i in scores.argmax(1)]


@pytest.mark.parametrize(
    "same",
    [
        torch.from_numpy(X[:9]),
        X[:9].astype(np.float64),
        np.asfortranarray(X[:9]),
        X[:9].astype(">f4"),
        X[8::-1][::-1],
        X[:9].tolist(),
    ],
    ids=["tensor", "float64", "fortran", "big-endian", "reversed", "list"],
)
def test_any_array_of_the_same_numbers_predicts_the_same(same):
    assert np.array_equal(model().predict(same), model().predict(X[:9]))


def test_an_array_that_may_not_be_written_is_read():
    frozen = X[:9].copy()
    frozen.flags.writeable = False
    assert np.array_equal(model().predict(frozen), model().predict(X[:9]))


@pytest.mark.parametrize("x", [X[:3, :2], X[0], X[None, :3]])
def test_another_number_of_features_is_refused_with_both_shapes(x):
    with pytest.raises(InputError, match=r"x has the shape \(.*\); the model takes \(n, 4\) features"):
        model().predict(x)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(value):
    x = X[:5].astype(np.float64)
    x[3, 2] = value
    with pytest.raises(InputError, match="not finite"):
        model().predict(x)


@pytest.mark.parametrize(
    "x", [np.array([["a", "b", "c", "d"]]), np.array([[None] * D]), np.ones((2, D), complex)]
)
def test_what_is_no_number_is_refused_by_its_type(x):
    with pytest.raises(InputError, match=f"x holds {x.dtype}, not numbers"):
        model().predict(x)


def written(tmp_path, made: Predictor, **changes):
    write_bundle(tmp_path / "model", "model", made.tensors(), made.description() | changes)
    return tmp_path


@pytest.mark.parametrize("classes", [None, ("no", "yes")])
def test_a_model_comes_back_from_its_files_bit_for_bit(tmp_path, classes):
    made = model(2, classes)
    again = load(written(tmp_path, made))
    assert again.description() == made.description()
    assert np.array_equal(again.decision_function(X), made.decision_function(X))


def function(z, x):
    return torch.exp(-torch.cdist(z, x))


def test_a_callable_kernel_must_be_given_again_and_a_named_one_may_not(tmp_path):
    made = model(kernel=CallableKernel(function))
    run = written(tmp_path / "callable", made)
    assert np.array_equal(load(run, function).predict(X), made.predict(X))
    with pytest.raises(InputError, match="callable kernel; pass it as kernel="):
        load(run)
    with pytest.raises(InputError, match="gaussian kernel; leave kernel= out"):
        load(written(tmp_path / "named", model()), function)


@pytest.mark.parametrize("kernel", [None, CallableKernel(function)])
def test_a_model_of_the_first_files_which_named_a_bandwidth_only_is_read(tmp_path, kernel):
    made = model(kernel=kernel)
    kept = (
        {"name": "gaussian", "bandwidth": 1.5} if kernel is None else {"name": "callable", "bandwidth": None}
    )
    again = load(written(tmp_path, made, kernel=kept), kernel and function)
    assert np.array_equal(again.predict(X[:50]), made.predict(X[:50]))


@pytest.mark.parametrize("name", NAMED_KERNELS)
def test_every_kernel_comes_back_from_its_files_bit_for_bit(tmp_path, name):
    parameters = {
        "bandwidth": 1.5,
        "shape": 0.7,
        "degree": 2,
        "offset": 0.3,
        "depth": 4,
        "bias": 0.6,
        "power": 1.5,
    }
    own = {item: parameters[item] for item in KERNEL_DEFAULTS[name]}
    made = model(
        kernel=named_kernel(name, own, {"kernel_centre": draw(D), "kernel_metric": draw(3, D).abs()})
    )
    again = load(written(tmp_path, made))
    assert again.description()["kernel"] == {"name": name, **own}
    assert np.array_equal(again.predict(X[:50]), made.predict(X[:50]))


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_names": ["x0"]},
        {"feature_names": 4},
        {"class_names": ["a", "b", "c"]},
        {"kernel": {"name": "sinc", "bandwidth": 1.0}},
        {"kernel": {"name": "gaussian", "bandwidth": -1.0}},
        {"kernel": {"name": "gaussian", "bandwidth": "wide"}},
        {"kernel": {"name": "gaussian", "bandwidth": "median"}},
        {"kernel": {"name": "gaussian", "bandwidth": 1.5, "degree": 3}},
        {"kernel": {"name": "gaussian", "bandwidth": 1.5, "width": 3}},
        {"kernel": {"name": "dispersal", "bandwidth": 1.5}},
        {"kernel": {"name": ["gaussian"]}},
        {"kernel": "gaussian"},
    ],
)
def test_a_model_file_that_contradicts_itself_is_refused(tmp_path, changes):
    with pytest.raises(DamagedDataError, match="model"):
        load(written(tmp_path, model(), **changes))


@pytest.mark.parametrize("name", ["weights", "centers", "input_shift", "kernel_centre"])
def test_a_tensor_of_another_shape_or_none_is_refused_by_name(tmp_path, name):
    made = model()
    tensors = made.tensors()
    for changed in ({**tensors, name: tensors[name][:-1]}, {**tensors, name: tensors[name].double()}):
        write_bundle(tmp_path / "model", "model", changed, made.description())
        with pytest.raises(DamagedDataError, match=f"{name}|weights"):
            load(tmp_path)
    write_bundle(
        tmp_path / "model", "model", {n: t for n, t in tensors.items() if n != "weights"}, made.description()
    )
    with pytest.raises(DamagedDataError, match="weights"):
        load(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run: it is an empty directory; give the RUN of a fit"):
        load(tmp_path)


@pytest.mark.parametrize(("kind", "low", "high"), [("standard", -1, 1), ("minmax", 0, 1), ("none", -2, 4)])
def test_inputs_are_scaled_and_constant_ones_come_out_finite(kind, low, high):
    x = torch.tensor([[-2.0, 5.0], [4.0, 5.0]], dtype=torch.float64)
    scaling = InputScaling.of(kind, x.mean(0), x.std(0, correction=0), x.amin(0), x.amax(0))
    scaled = scaling(x)
    assert scaled[:, 0].tolist() == pytest.approx([low, high])
    assert scaled[:, 1].tolist() == ([5, 5] if kind == "none" else [0, 0])
