"""`KernelModel`: trained on one's own batches, of any size and form, it ends where a fit would."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problem import generator, points
from small_stores import make_store
from torch.utils.data import DataLoader, TensorDataset

import ep3stream
from ep3stream import ConfigError, DivergedError, InputError, KernelConfig, KernelModel
from ep3stream.online.sources import ArraySource, RowForm
from ep3stream.solver.step import Solver
from ep3stream.stream.order import RowOrder

GUIDE = Path(__file__).parents[1] / "docs" / "migrating-from-eigenpro3.md"
D, P, N = 3, 40, 1500
X = points(N, D, 1, torch.float32)
Y = torch.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2]
CENTERS = points(P, D, 2, torch.float32)
IDS = torch.bucketize(Y, torch.tensor([-0.5, 0.5]))


def model(n_outputs: int = 1, centers: torch.Tensor = CENTERS, **changes) -> KernelModel:
    return KernelModel(
        centers, **{"n_outputs": n_outputs, "bandwidth": 3.0, "nystrom_samples": 300} | changes
    )


def classifier(**changes) -> KernelModel:
    return model(3, task="classification", **changes)


def loader(y: torch.Tensor = Y, batch_size: int = 128, seed: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(X, y), batch_size, shuffle=True, generator=generator(seed))


def laplacian(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (-torch.cdist(x, z, compute_mode="donot_use_mm_for_euclid_dist") / 3).exp()


def least_squares(centers: torch.Tensor = CENTERS) -> torch.Tensor:
    """The dense float64 solution's values at X."""
    k_xz = laplacian(X.double(), centers.double())
    mean = Y.double().mean()
    return mean + k_xz @ torch.linalg.lstsq(k_xz, Y.double()[:, None] - mean).solution[:, 0]


def test_an_epoch_that_ends_no_better_than_the_mean_is_warned_of_once(caplog):
    blind = model(bandwidth=1e-4)
    for _ in range(3):
        blind.fit_epoch(loader())
    assert [
        record.message.partition(", ")[2]
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name == "ep3stream.online.kernel_model"
    ] == [
        "the model is no better than predicting the mean of the targets; try another bandwidth, more centers, a "
        "ridge, or, for targets with a few extreme values, a transform such as asinh or ranks; or the inputs tell "
        "nothing of the targets"
    ]


def test_where_all_targets_are_the_same_their_mean_is_right_and_nothing_is_warned_of(caplog):
    constant = model()
    constant.fit((X, Y * 0 + 3))
    assert constant.predict(X[:5]).tolist() == [3.0] * 5
    assert not [record for record in caplog.records if "no better" in record.message]


def test_values_beyond_float32_are_called_too_large():
    fitted = model()
    fitted.fit((X, Y))
    with pytest.raises(InputError, match=r"whose largest number is 3\.4e38"):
        fitted.predictor().outputs(X[:2].double() * 1e200)


def test_a_model_that_is_better_than_the_mean_is_not_warned_of_whether_resumed_or_not(caplog):
    first, second = model(), model()
    first.fit((X, Y))
    second.load_state_dict(first.state_dict())
    second.fit((X, Y))
    assert second._trainer.progress.running_score.n > first._trainer.progress.running_score.n > 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_it_converges_to_the_least_squares_solution():
    made = model(model_rank=30, momentum=0.9)
    made.fit((X, Y), epochs=60)
    assert float((made.predict(X) - least_squares()).square().mean()) < 1e-3 * float(Y.var())


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_one_step_is_that_of_the_dense_formula(projection):
    made = model(projection=projection, seed=3)
    made.fit((X, Y), epochs=1)
    before, trainer = made.state_dict(), made._trainer
    x, y = X[:16], Y[:16]
    solver = trainer.trainer.solver
    loss = made.fit_batch(x, y)
    ahead = before["weights"].double() + solver.momentum * before["velocity"].double()
    k_zb = laplacian(CENTERS.double(), x.double())
    scale, offset = before["target_scale"].double(), before["target_offset"].double()
    residual = ahead @ k_zb - (y - offset) / scale
    gradient = (residual @ k_zb.T).float()
    stage = solver.stage(before["rows_seen"])
    theta = stage.projection.direction(stage.projection.preconditioned(gradient, x, residual.float()))
    velocity = solver.momentum * before["velocity"] - trainer.step_size(16) * stage.step_scale * theta
    after = made.state_dict()
    assert loss == pytest.approx(float((residual * scale).square().mean()), rel=1e-4)
    assert torch.allclose(after["weights"], before["weights"] + velocity, rtol=1e-3, atol=1e-4)


def test_a_loader_a_store_and_arrays_reach_the_same_error(tmp_path):
    made = []
    with ep3stream.open_store(make_store(tmp_path / "rows.zarr", n_rows=4000)) as store:
        x, y = store.split("train").read_rows(np.arange(store.split("train").info.n_rows))
        batches = DataLoader(
            TensorDataset(torch.tensor(x), torch.tensor(y)), 100, True, generator=generator()
        )
        for data in (store.split("train"), (x, y), batches):
            made.append(KernelModel(x[:100], n_outputs=2, bandwidth=4.0, nystrom_samples=300))
            history = made[-1].fit(data, epochs=4, validation=store.split("test"))
            assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    errors = [one.score(x, y)["mse"] for one in made]
    assert max(errors) < 1.05 * min(errors)
    assert min(errors) < 0.2 * y.var()


def test_a_model_saved_after_a_store_can_be_evaluated_on_it(tmp_path):
    path = make_store(tmp_path / "rows.zarr")
    with ep3stream.open_store(path) as store:
        made = KernelModel(np.eye(5), n_outputs=2, bandwidth=4.0)
        made.fit(store.split("train"))
        score = made.fit(store.split("train"), validation=store.split("test"))[-1]["validation"]
    made.save(tmp_path / "run")
    assert ep3stream.evaluate(tmp_path / "run", path)["mse"] == pytest.approx(score["mse"])


def test_batches_work_without_fit_and_the_rows_held_back_are_trained_on():
    made = model()
    losses = [made.fit_batch(x, y) for x, y in zip(X.split(100), Y.split(100), strict=True)]
    n_held = 300 + 1024
    assert [bool(np.isnan(loss)) for loss in losses] == [100 * (i + 1) < n_held for i in range(15)]
    assert made._trainer.progress.state.averaged >= 15
    assert made.score(X, Y)["mse"] < 0.5 * float(Y.var())


def test_too_few_rows_for_the_sample_are_enough_once_the_model_is_asked_for():
    made = model()
    assert np.isnan(made.fit_batch(X[:50], Y[:50]))
    assert made.predict(X).shape == (N,)
    assert made.fit_batch(X, Y) > 0


@pytest.mark.parametrize("batch_size", [7, 64, 1500])
def test_an_epoch_with_the_set_up_in_it_trains_on_every_row_once(monkeypatch, batch_size):
    seen = []
    step = Solver.step

    def spied(self, state, x, y, step_size, score, rows_seen):
        seen.append(x.clone())
        return step(self, state, x, y, step_size, score, rows_seen)

    monkeypatch.setattr(Solver, "step", spied)
    model(nystrom_samples=X[:200]).fit_epoch(loader(batch_size=batch_size))
    assert torch.equal(torch.cat(seen).sort(0)[0], X.sort(0)[0])


def test_a_batch_above_the_safe_size_is_split_and_a_small_one_takes_the_step_of_its_size():
    made = model(nystrom_samples=X[:300])
    made.fit_epoch(loader())
    trainer = made._trainer
    settled = trainer.result.settled
    largest, steps = settled.batch_size, trainer.progress.step
    made.fit_batch(X[: 3 * largest + 1], Y[: 3 * largest + 1])
    assert trainer.progress.step == steps + 4
    assert 32 < largest < 64
    assert trainer.step_size(largest) == settled.step_size
    assert trainer.step_size(1) == trainer.step_size(16) >= trainer.step_size(30) >= settled.step_size


def test_the_step_of_a_size_is_stable_on_every_batch_of_it():
    made = model(nystrom_samples=X[:300], momentum=0, averaging=0)
    made.fit((X, Y))
    trainer = made._trainer
    settled = trainer.result.settled
    for size in (1, 5, 16, 40):
        for stage in settled.stages:
            found = trainer.result.builder.stability(stage.projection, X[500:], size)
            assert trainer.step_size(size) * stage.step_scale * found.lambda_max < 2
    assert trainer.step_size(16) > settled.step_size


def test_class_ids_one_hot_rows_and_arrays_of_either_train_the_same_model():
    one_hot = torch.nn.functional.one_hot(IDS, 3)
    made = []
    for y in (IDS, one_hot, one_hot.double(), IDS.numpy(), IDS.to(torch.uint8)):
        made.append(classifier())
        made[-1].fit((X, y), epochs=2)
    assert all(torch.equal(made[0].outputs(X), other.outputs(X)) for other in made)
    assert made[0].predict(X).dtype == torch.int64
    scores = made[0].score(X, one_hot)
    assert scores == made[0].score(X, IDS)
    assert scores["accuracy"] == pytest.approx(float((made[0].predict(X) == IDS).double().mean()))
    assert scores["accuracy"] > 0.7


def test_a_loader_that_fills_one_buffer_again_and_again_is_copied_from():
    x, y = torch.empty(100, D), torch.empty(100)

    def refilled():
        for rows in torch.arange(N).split(100):
            yield x.copy_(X[rows]), y.copy_(Y[rows])

    reusing, plain = model(), model()
    batches = list(zip(X.split(100), Y.split(100), strict=True))
    assert reusing.fit_epoch(refilled()) == plain.fit_epoch(batches)
    assert torch.equal(reusing.predict(X), plain.predict(X))


def test_arrays_are_shuffled_anew_in_every_epoch_and_the_same_for_the_same_seed():
    source = ArraySource(X, Y, RowForm(D, 1, "regression", X.device))
    order = RowOrder(3, N, 200, 3, 64, np.array([5, 700]))
    steps = order.steps_per_epoch

    def rows(start, stop):
        with source.batches(order, range(start, stop), X.device) as batches:
            return torch.cat([batch.x for batch in batches])

    first, again, second = rows(0, steps), rows(0, steps), rows(steps, 2 * steps)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    kept = torch.from_numpy(np.delete(X.numpy(), [5, 700], 0))
    assert torch.equal(first.sort(0)[0], kept.sort(0)[0])
    assert torch.equal(
        torch.cat([first, second])[-len(rows(steps + 3, 2 * steps)) :], rows(steps + 3, 2 * steps)
    )


def test_a_constant_target_is_predicted_as_it_is():
    made = model()
    made.fit((X, torch.full((N,), 7.0)))
    assert torch.allclose(made.predict(X), torch.tensor(7.0))


def test_targets_of_one_column_or_none_are_the_same():
    flat, column = model(), model()
    assert flat.fit_epoch((X, Y)) == column.fit_epoch((X, Y[:, None].numpy()))
    assert torch.equal(flat.predict(X), column.predict(X))


def test_a_callable_kernel_gives_what_the_named_one_gives(tmp_path):
    made = KernelModel(CENTERS, laplacian, nystrom_samples=300)
    named = model()
    for one in (made, named):
        one.fit((X, Y), epochs=3)
    assert torch.allclose(made.predict(X), named.predict(X), atol=0.02)
    made.save(tmp_path / "run")
    loaded = ep3stream.load(tmp_path / "run", kernel=laplacian)
    assert np.array_equal(loaded.predict(X), made.predict(X).numpy())


@pytest.mark.parametrize(
    "kernel", ["gaussian", KernelConfig("polynomial", degree=2), KernelConfig("ntk_relu")]
)
def test_a_saved_model_predicts_the_same(tmp_path, kernel):
    made = classifier(kernel=kernel, bandwidth="median")
    made.fit((X, IDS))
    made.save(tmp_path / "run")
    loaded = ep3stream.load(tmp_path / "run")
    assert np.array_equal(loaded.decision_function(X), made.outputs(X).numpy())
    assert [int(name) for name in loaded.predict(X)] == made.predict(X).tolist()


@pytest.mark.parametrize("projection", ["nystrom", "eigenpro", "exact"])
def test_a_state_goes_on_with_the_same_bits_through_a_file(tmp_path, projection):
    through, resumed = (model(projection=projection, nystrom_samples=X[:200]) for _ in range(2))
    through.fit((X, Y))
    torch.save(through.state_dict(), tmp_path / "state.pt")
    through.fit((X, Y))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.fit((X, Y))
    mine, theirs = through.state_dict(), resumed.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in ("weights", "velocity", "average", "probes"))
    assert mine["step"] == theirs["step"]


def test_a_state_of_other_arguments_is_refused_by_name():
    made = model()
    made.fit_epoch((X, Y))
    state = made.state_dict()
    with pytest.raises(InputError, match=r"momentum is 0\.5 but was None"):
        model(momentum=0.5).load_state_dict(state)
    with pytest.raises(InputError, match="centers are not those"):
        model(centers=CENTERS + 1).load_state_dict(state)
    with pytest.raises(InputError, match="version None"):
        model().load_state_dict({})


def test_training_leaves_a_predictor_taken_before_as_it_was():
    made = model()
    made.fit_epoch((X, Y))
    taken = made.predictor()
    before = taken.predict(X)
    made.fit_epoch((X, Y))
    assert np.array_equal(taken.predict(X), before)


def test_the_guard_takes_a_step_that_is_too_large_back(caplog):
    made = model(nystrom_samples=X[:300])
    made.fit((X, Y), epochs=3)
    good = made.score(X, Y)["mse"]
    made._trainer.progress.guard.step_size *= 8
    with caplog.at_level(logging.WARNING):
        made.fit((X, Y), epochs=5)
    assert "blew up" in caplog.text
    assert 1 <= made._trainer.progress.guard.n_cuts <= 3
    assert made.score(X, Y)["mse"] < 2 * good


def test_a_fit_that_no_smaller_step_saves_keeps_its_last_good_weights():
    made = model(nystrom_samples=X[:300])
    made.fit((X, Y), epochs=3)
    made._trainer.progress.guard.step_size *= 1e6
    with pytest.raises(DivergedError, match="after 3 cuts"):
        made.fit((X, Y), epochs=3)
    assert made.score(X, Y)["mse"] < float(Y.var())


def test_the_example_for_those_who_come_from_eigenpro3_runs_and_classifies_well(
    tmp_path, monkeypatch, capsys
):
    (snippet,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(compile(snippet, GUIDE.name, "exec"), made)
    accuracy = re.search(r"'accuracy': ([\d.]+)", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.85
    assert [int(name) for name in made["classes"]] == made["model"].predict(made["X_test"]).tolist()


def test_the_guide_names_every_argument():
    text = GUIDE.read_text()
    for name in inspect.signature(KernelModel).parameters:
        assert name == "seed" or name in text, name


def test_neither_the_random_state_nor_the_output_is_touched(capsys):
    state = torch.random.get_rng_state()
    model().fit((X, Y), validation=(X, Y))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("make", "x", "y", "message"),
    [
        (model, X[:, :2], Y, r"x has the shape \(1500, 2\); the centers have 3 features"),
        (model, X[0], Y[:1], r"x has the shape \(3,\)"),
        (model, X[:0], Y[:0], "at least one row"),
        (model, X, Y[:9], r"x has 1500 rows but y has the shape \(9,\)"),
        (model, X, Y[:, None].expand(-1, 2), r"y has the shape \(1500, 2\) but n_outputs is 1"),
        (lambda: model(3), X, IDS, "task='classification'"),
        (classifier, X, IDS + 1, "ids from 1 to 3, but n_outputs is 3"),
        (classifier, X, Y, "class ids are whole numbers"),
        (classifier, X, torch.ones(N, 3), "not one-hot"),
        (model, X / 0, Y, "not finite"),
        (model, X, Y / 0, "y has a value that is not finite"),
        (model, X, np.full(N, "a"), "not numbers"),
    ],
)
def test_rows_of_a_wrong_form_are_named(make, x, y, message):
    with pytest.raises(InputError, match=message):
        make().fit_batch(x, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_outputs": 0}, "n_outputs is 0"),
        ({"task": "classification"}, "n_outputs is 1; classification has at least 2"),
        ({"task": "ranking"}, "task is 'ranking'"),
        ({"nystrom_samples": 0}, "nystrom_samples is 0"),
        ({"nystrom_samples": X[:, :1]}, "nystrom_samples has the shape"),
        ({"centers": X[:0]}, "centers has the shape"),
        ({"kernel": laplacian}, "bandwidth is 3.0, but the kernel is no name"),
        ({"kernel": "cubic"}, "kernel is 'cubic'"),
        ({"seed": -1}, "seed is -1"),
        ({"memory": "much"}, "not a number of bytes"),
        ({"step": "published"}, "step is 'published' but projection is 'nystrom'"),
        ({"data_rank": 300}, "data_rank is 300 but only 300"),
    ],
)
def test_arguments_that_cannot_be_are_named_at_once(changes, message):
    with pytest.raises(InputError, match=message):
        model(**changes)


def test_a_memory_too_small_for_the_model_is_named_at_the_set_up():
    with pytest.raises(ConfigError, match=r"memory is 0\.1 MB"):
        model(memory="100KB").fit((X, Y))


@pytest.mark.parametrize("data", [X, "train", 3])
def test_data_of_another_kind_are_named(data):
    with pytest.raises(InputError, match="the data are a"):
        model().fit(data)


def test_an_iterator_that_is_used_up_is_named():
    with pytest.raises(InputError, match="used up by one epoch"):
        model().fit(iter([(X, Y)]), epochs=2)


def test_an_untrained_model_says_so():
    with pytest.raises(InputError, match="has seen no rows yet"):
        model().predict(X)
    with pytest.raises(InputError, match="x has 3 rows and y 2"):
        model().fit((X[:3], Y[:2]))


@settings(max_examples=25)
@given(
    p=st.integers(1, 12),
    n=st.integers(2, 30),
    c=st.integers(1, 3),
    m=st.integers(1, 9),
    s=st.integers(1, 40),
    projection=st.sampled_from(["nystrom", "eigenpro", "exact"]),
    twice=st.booleans(),
)
def test_every_shape_trains_to_finite_outputs(p, n, c, m, s, projection, twice):
    centers = points(p, D, 3, torch.float32)
    if twice:
        centers = centers[torch.arange(p) // 2]
    x, y = X[:n], torch.stack([Y[:n]] * c, 1)
    made = KernelModel(centers, n_outputs=c, bandwidth=3.0, projection=projection, nystrom_samples=s)
    for _ in range(3):
        made.fit_epoch(list(zip(x.split(m), y.split(m), strict=True)))
    assert made.outputs(X).shape == (N, c)
    assert made.score(x, y)["mse"] <= 1.5 * float(y.var(0, correction=0).mean()) + 1e-6


@pytest.mark.parametrize("projection", ["nystrom", "eigenpro", "exact"])
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("n_centers", [1, 2])
def test_the_smallest_problems_train(n_centers, n_samples, projection):
    centers = points(n_centers, D, 3, torch.float32)
    made = KernelModel(centers, bandwidth=3.0, projection=projection, nystrom_samples=n_samples)
    made.fit((X[:2], Y[:2]), epochs=3)
    assert torch.isfinite(made.outputs(X)).all()


def test_centers_that_the_basis_does_not_know_are_damped() -> None:
    generator = torch.Generator().manual_seed(0)
    x, centers = (3 * torch.randn(n, 6, generator=generator) for n in (4000, 400))
    model = KernelModel(centers, "laplacian", bandwidth=12.0, nystrom_samples=300, tail="none")
    model.fit((x, x[:, 0].sin()))
    projection = model._trainer.result.settled.projection
    unknown = 1 - projection.basis.square() @ projection.eigenvalues
    assert projection.center_damping is not None
    assert int(projection.center_damping.argmin()) == int(unknown.argmax())


NOISY = Y + torch.randn(N, generator=generator(9))
WEIGHTS = {"0": 4.0, 1: 1.0, "2": 0.25}


def penalised(coded: torch.Tensor, ridge: float, row_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Values at X, (n, c), of argmin 1/(2n) sum_i w_i |f(x_i) - y_i|^2 + ridge/2 |f|^2; dense, float64."""
    k_xz, k_zz = laplacian(X.double(), CENTERS.double()), laplacian(CENTERS.double(), CENTERS.double())
    left = k_xz.T if row_weights is None else k_xz.T * row_weights
    return k_xz @ torch.linalg.solve(left @ k_xz + N * ridge * k_zz, left @ coded)


def trained(made: KernelModel, y: torch.Tensor, epochs: int = 60) -> torch.Tensor:
    made.fit((X, y), epochs)
    return made.outputs(X).double()


def relative(found: torch.Tensor, expected: torch.Tensor, zero: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - zero).norm())


@pytest.mark.parametrize(("projection", "ridge"), [("nystrom", 0.01), ("nystrom", 1.0), ("exact", 0.01)])
def test_a_ridge_gives_the_dense_ridge_solution(projection, ridge):
    made = model(projection=projection, model_rank=P, ridge=ridge)
    found, code = trained(made, NOISY), made.predictor().targets
    mean, spread = code.offset.double(), code.scale.double()
    expected = mean + spread * penalised(((NOISY - mean) / spread)[:, None].double(), ridge)
    plain = mean + spread * penalised(((NOISY - mean) / spread)[:, None].double(), 0)
    assert relative(found, expected, mean) < 0.04
    assert relative(plain, expected, mean) > 0.06


def test_a_ridge_of_outputs_is_divided_by_their_weights():
    y = torch.stack([NOISY, NOISY.flip(0)], 1)
    made = model(2, model_rank=P, ridge=0.1, output_weights={"y1": 20.0})
    found, code = trained(made, y), made.predictor().targets
    mean, spread = code.offset.double(), code.scale.double()
    for output, ridge in enumerate((0.1, 0.1 / 20)):
        coded = ((y.double() - mean) / spread)[:, [output]]
        expected = mean[output] + spread[output] * penalised(coded, ridge)
        assert relative(found[:, [output]], expected, mean[output]) < 0.05


@pytest.mark.parametrize(
    ("weights", "ridge"), [(WEIGHTS, 0.1), ("balanced", 0.0)], ids=["by name", "balanced"]
)
def test_class_weights_give_the_dense_weighted_solution(weights, ridge):
    made = classifier(model_rank=P, class_weights=weights, ridge=ridge, nystrom_samples=500)
    found = trained(made, IDS)
    targets = made._trainer.trainer.solver.targets
    each, offset = targets.weights.double(), targets.offset.double()
    if weights == "balanced":
        counts = torch.bincount(IDS).double()
        torch.testing.assert_close(each, N / (3 * counts), rtol=0.1, atol=0)
        torch.testing.assert_close(offset, torch.full((3,), 1 / 3).double(), rtol=1e-5, atol=0)
    else:
        assert each.tolist() == [4.0, 1.0, 0.25]
    one_hot = torch.nn.functional.one_hot(IDS, 3).double() - offset
    expected = offset + penalised(one_hot, ridge, each[IDS])
    assert relative(found, expected, offset) < 0.02
    assert relative(offset + penalised(one_hot, ridge), expected, offset) > 0.04


@pytest.mark.parametrize("sample", [300, X[:300]], ids=["drawn", "given"])
def test_a_weighted_state_goes_on_with_the_same_bits(sample):
    arguments = {"class_weights": "balanced", "ridge": 0.01, "nystrom_samples": sample}
    made, again = classifier(**arguments), classifier(**arguments)
    made.fit((X, IDS))
    again.load_state_dict(made.state_dict())
    for each in (made, again):
        each.fit((X, IDS))
    assert torch.equal(made.outputs(X), again.outputs(X))
    with pytest.raises(InputError, match=r"ridge is 0\.0 but was 0\.01"):
        classifier(**arguments | {"ridge": 0.0}).load_state_dict(made.state_dict())


def test_a_state_of_the_version_before_has_neither_ridge_nor_weights():
    made = model()
    made.fit((X, Y))
    state = made.state_dict()
    old = {
        k: v for k, v in state["settings"].items() if k not in ("ridge", "class_weights", "output_weights")
    }
    again = model()
    again.load_state_dict(state | {"version": 2, "settings": old})
    assert torch.equal(made.outputs(X), again.outputs(X))
    with pytest.raises(InputError, match=r"ridge is 0\.1 but was 0\.0"):
        model(ridge=0.1).load_state_dict(state | {"version": 2, "settings": old})


def test_a_state_of_an_earlier_version_goes_on_with_the_averaging_of_these():
    made, again = model(averaging=3.0), model()
    made.fit((X, Y))
    state = made.state_dict()
    assert state["averaging"] == 3.0
    del state["averaging"]
    again.load_state_dict(state | {"settings": state["settings"] | {"averaging": None}})
    for each in (made, again):
        each.fit((X, Y))
    assert torch.equal(made.outputs(X), again.outputs(X))


def test_a_state_goes_on_in_the_precision_that_its_set_up_has_settled():
    made, again = model(), model()
    made.fit((X, Y))
    state = made.state_dict()
    assert state["precision"] == "float32"
    model(precision="float32").load_state_dict(state)
    with pytest.raises(InputError, match="precision is 'tf32' but was 'float32'"):
        model(precision="tf32").load_state_dict(state)
    # Earlier versions knew no `auto`.
    del state["precision"]
    again.load_state_dict(state | {"settings": state["settings"] | {"precision": "float32"}})
    assert torch.equal(made.outputs(X), again.outputs(X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(class_weights="balanced"), "targets are numbers; use output_weights"),
        (lambda: classifier(output_weights={"y": 2.0}), "targets are classes; use class_weights"),
        (lambda: model(output_weights={"y0": 2.0}), "without a ridge they change nothing"),
        (lambda: classifier(class_weights={"0": -1.0}), "class_weights of '0' is -1.0"),
        (lambda: model(ridge=-1.0), "ridge is -1.0"),
        (lambda: model(ridge=0.1, projection="eigenpro"), "the published method, which has none"),
        (
            lambda: classifier(class_weights={7: 2.0}).fit((X, IDS)),
            "class_weights has '7', which is no class; use some of 0, 1, 2",
        ),
    ],
)
def test_weights_that_cannot_be_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
