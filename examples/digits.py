"""Classification: scikit-learn's digits, from arrays to a report with confusions and calibration.

python examples/digits.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import ep3stream


def main(directory: Path, epochs: int = 5) -> float:
    """The accuracy on images never seen."""
    images, digits = load_digits(return_X_y=True)
    store = directory / "digits.zarr"
    splits = ep3stream.ConvertConfig(
        task="classification", splits={"train": 0.7, "validation": 0.1, "test": 0.2}
    )
    ep3stream.convert((images.astype(np.float32), digits), store, splits)

    config = ep3stream.FitConfig(
        # Pixels are alike: they need one scale for all, not one each.
        data=ep3stream.DataConfig(scale="none", validate="validation"),
        kernel=ep3stream.KernelConfig("gaussian", bandwidth=20.0),
        solver=ep3stream.SolverConfig(centers=600, epochs=epochs),
    )
    run = ep3stream.fit(store, directory / "run", config)
    scores = ep3stream.evaluate(run, store)
    report = ep3stream.write_report(run)
    print(f"{scores['accuracy']:.1%} of {scores['n']} digits; open {report}")
    return float(scores["accuracy"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".examples/digits"))
