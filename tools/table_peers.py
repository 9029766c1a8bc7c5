"""What people would use on a table instead: boosted trees, a ridge, near neighbours. Used by tools/bench_tables.py.

LightGBM, XGBoost    learning rate .05; 63 leaves, or depth 8 by histograms; categories as categories, gaps as gaps;
                     trees are added until the validation loss has not fallen for 50 of them
ridge                standardised numbers and one-hot categories; its penalty is the best of seven on `validation`
5 neighbours         by standardised numbers, for tables of up to 3 columns without categories
forest               100 extremely randomised trees, for the same tables

With hundreds of classes a round is hundreds of trees: no round begins after TREE_SECONDS. LightGBM's loss diverges
there at its own defaults (its best round is the first), so that its leaves get a penalty and a least weight of 1,
as XGBoost's have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from table_data import SPLITS

LEARNING_RATE, LEAVES, DEPTH = 0.05, 63, 8
PATIENCE, MOST_ROUNDS = 50, 5000
TREE_SECONDS = 600
PENALTIES = 10.0 ** np.arange(-8, 5, 2)
NEIGHBOURS, FOREST_TREES, FEW_COLUMNS = 5, 100, 3


@dataclass(frozen=True, slots=True)
class Rows:
    """The features and the target, classes as codes from 0, of each split by its name."""

    x: dict[str, pd.DataFrame]
    y: dict[str, NDArray[np.float64]]
    n_classes: int  # 0: the target is a number

    @classmethod
    def of(cls, files: dict[str, Path], target: str, task: str) -> Rows:
        """The rows of Parquet files. A category that `train` does not have is missing elsewhere."""
        frames = {name: pd.read_parquet(path) for name, path in files.items()}
        for column in frames["train"].select_dtypes("category"):
            known = frames["train"][column].cat.categories
            for frame in frames.values():
                frame[column] = frame[column].cat.set_categories(known)
        y = {name: frame.pop(target) for name, frame in frames.items()}
        if task == "regression":
            return cls(frames, {name: values.to_numpy(np.float64) for name, values in y.items()}, 0)
        codes = {name: values.cat.codes.to_numpy(np.float64) for name, values in y.items()}
        return cls(frames, codes, len(y["train"].cat.categories))

    def score(self, predicted: NDArray[Any]) -> float:
        """R2, or the accuracy of classes, of the predictions of `test`, (n,)."""
        y = self.y["test"]
        if self.n_classes:
            return float(np.mean(predicted == y))
        return float(1 - np.mean((predicted - y) ** 2) / y.var())


def lightgbm(rows: Rows, threads: int) -> Any:
    """A function from features to predictions, (n,), and how many rounds were best."""
    import lightgbm as lgb

    settings = {
        **objective(rows, "regression", "binary", "multiclass"),
        "learning_rate": LEARNING_RATE,
        "num_leaves": LEAVES,
        "num_threads": threads,
        "verbosity": -1,
        "seed": 0,
    }
    if rows.n_classes > 2:
        settings |= {"lambda_l2": 1.0, "min_sum_hessian_in_leaf": 1.0}
    end = time.perf_counter() + TREE_SECONDS

    def stop_late(round_: Any) -> None:
        if time.perf_counter() > end:
            raise lgb.callback.EarlyStopException(round_.iteration, round_.evaluation_result_list)

    train = lgb.Dataset(rows.x["train"], rows.y["train"])
    validation = lgb.Dataset(rows.x["validation"], rows.y["validation"], reference=train)
    booster = lgb.train(
        settings,
        train,
        num_boost_round=MOST_ROUNDS,
        valid_sets=[validation],
        callbacks=[lgb.early_stopping(PATIENCE, verbose=False), stop_late],
    )
    return lambda x: labels(rows, booster.predict(x)), f"{booster.best_iteration} rounds"


def xgboost(rows: Rows, threads: int) -> Any:
    """A function from features to predictions, (n,), and how many rounds were best."""
    import xgboost as xgb

    settings = {
        **objective(rows, "reg:squarederror", "binary:logistic", "multi:softprob"),
        "learning_rate": LEARNING_RATE,
        "max_depth": DEPTH,
        "tree_method": "hist",
        "nthread": threads,
        "verbosity": 0,
        "seed": 0,
    }
    train = xgb.QuantileDMatrix(rows.x["train"], rows.y["train"], enable_categorical=True)
    validation = xgb.QuantileDMatrix(
        rows.x["validation"], rows.y["validation"], ref=train, enable_categorical=True
    )
    end = time.perf_counter() + TREE_SECONDS

    class StopLate(xgb.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            """Whether to stop."""
            return time.perf_counter() > end

    booster = xgb.train(
        settings,
        train,
        num_boost_round=MOST_ROUNDS,
        evals=[(validation, "validation")],
        early_stopping_rounds=PATIENCE,
        verbose_eval=False,
        callbacks=[StopLate()],
    )
    rounds = booster.best_iteration + 1

    def predict(x: pd.DataFrame) -> NDArray[Any]:
        matrix = xgb.DMatrix(x, enable_categorical=True)
        return labels(rows, booster.predict(matrix, iteration_range=(0, rounds)))

    return predict, f"{rounds} rounds"


def objective(rows: Rows, number: str, two: str, many: str) -> dict[str, Any]:
    """A library's settings for the loss of this target: of a number, of two classes or of many."""
    if rows.n_classes > 2:
        return {"objective": many, "num_class": rows.n_classes}
    return {"objective": two if rows.n_classes else number}


def labels(rows: Rows, scores: NDArray[Any]) -> NDArray[Any]:
    """Numbers as they are; the class of a probability, (n,), or of one for each class, (n, classes)."""
    if not rows.n_classes:
        return scores
    return scores.argmax(1) if scores.ndim == 2 else (scores > 0.5).astype(np.float64)


def ridge(rows: Rows, threads: int) -> Any:
    """(X'X / n + penalty I)^-1 X'y / n in float64; for classes on 0/1 targets, and the largest output counts."""
    features = Standardised.of(rows.x["train"])
    x, validation = (features(rows.x[name]) for name in SPLITS[:2])
    y = np.eye(rows.n_classes)[rows.y["train"].astype(int)] if rows.n_classes else rows.y["train"][:, None]
    offset, n = y.mean(0), len(x)
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / n)
    moment = vectors.T @ (x.T @ (y - offset)) / n
    candidates = {
        penalty: vectors @ (moment / (np.maximum(eigenvalues, 0) + penalty)[:, None]) for penalty in PENALTIES
    }

    def predict(x: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[Any]:
        outputs = x @ weights + offset
        return outputs.argmax(1) if rows.n_classes else outputs[:, 0]

    def error(penalty: float) -> float:
        predicted, y = predict(validation, candidates[penalty]), rows.y["validation"]
        return float(np.mean(predicted != y) if rows.n_classes else np.mean((predicted - y) ** 2))

    best = min(candidates, key=error)
    return lambda x: predict(features(x), candidates[best]), f"penalty {best:g}"


def neighbours(rows: Rows, threads: int) -> Any:
    """The mean, or the most frequent class, of the nearest rows; None where the table is not made for it."""
    from sklearn import neighbors

    kind = neighbors.KNeighborsClassifier if rows.n_classes else neighbors.KNeighborsRegressor
    return of_few_columns(rows, kind(NEIGHBOURS, n_jobs=threads)), ""


def forest(rows: Rows, threads: int) -> Any:
    """The mean, or the vote, of extremely randomised trees; None where `neighbours` is none."""
    from sklearn import ensemble

    kind = ensemble.ExtraTreesClassifier if rows.n_classes else ensemble.ExtraTreesRegressor
    return of_few_columns(rows, kind(FOREST_TREES, n_jobs=threads, random_state=0)), f"{FOREST_TREES} trees"


def of_few_columns(rows: Rows, model: Any) -> Any:
    """A function from features to predictions, (n,), by a model of scikit-learn; None where columns are not few."""
    x = rows.x["train"]
    if x.shape[1] > FEW_COLUMNS or len(x.select_dtypes("number").columns) < x.shape[1]:
        return None
    features = Standardised.of(x)
    model.fit(features(x), rows.y["train"])
    return lambda x: model.predict(features(x))


@dataclass(frozen=True, slots=True)
class Standardised:
    """Numbers with mean 0 and deviation 1, gaps at 0 and told by a 0/1 column; categories as 0/1 columns."""

    mean: pd.Series
    std: pd.Series
    with_gaps: list[str]

    @classmethod
    def of(cls, x: pd.DataFrame) -> Standardised:
        """Mean and deviation of each column of numbers, gaps left out."""
        numbers = x.select_dtypes("number")
        std = numbers.std().replace(0, 1)
        return cls(numbers.mean(), std, list(numbers.columns[numbers.isna().any()]))

    def __call__(self, x: pd.DataFrame) -> NDArray[np.float64]:
        """x: n rows. Returns (n, features)."""
        numbers = ((x[self.mean.index] - self.mean) / self.std).fillna(0.0)
        gaps = x[self.with_gaps].isna()
        categories = x.select_dtypes("category")
        flags = [pd.get_dummies(categories)] if len(categories.columns) else []
        return np.column_stack([numbers, gaps, *flags]).astype(np.float64)


PEERS: dict[str, Callable[[Rows, int], Any]] = {
    "LightGBM": lightgbm,
    "XGBoost": xgboost,
    "ridge": ridge,
    "5 neighbours": neighbours,
    "forest": forest,
}
