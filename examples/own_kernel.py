"""A kernel on strings: short pieces of DNA, as letter codes, and whether a motif is in them.

    python examples/own_kernel.py [DIRECTORY]

Two sequences are as alike as the k-letter words that they have in common, wherever these stand: the spectrum kernel
(Leslie, Eskin, Noble, 2002). No kernel of distances between letter codes can say that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import ep3stream

MOTIF = "TATAAT"
WORD = 4
N_WORDS = 4**WORD


def spectrum(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Cosine between the counts of words of z, (p, length), and of x, (m, length); returns (p, m)."""
    return _counts(z) @ _counts(x).T


def _counts(letters: torch.Tensor) -> torch.Tensor:
    """How often each of the 4^WORD words stands in each row, scaled to length 1; (rows, N_WORDS)."""
    powers = 4 ** torch.arange(WORD, device=letters.device)
    words = (letters.round().long().unfold(1, WORD, 1) * powers).sum(2)
    counts = torch.zeros(len(letters), N_WORDS, device=letters.device)
    counts.scatter_add_(1, words, torch.ones_like(words, dtype=counts.dtype))
    return counts / counts.norm(dim=1, keepdim=True)


def sequences(n_rows: int, length: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random letters 0 to 3, (n_rows, length); half of them with the motif, at times mutated."""
    draw = np.random.default_rng(seed)
    letters = draw.integers(4, size=(n_rows, length))
    has_motif = draw.random(n_rows) < 0.5
    motif = np.array(["ACGT".index(letter) for letter in MOTIF])
    for row in np.flatnonzero(has_motif):
        place = draw.integers(length - len(motif))
        letters[row, place : place + len(motif)] = motif
        if draw.random() < 0.3:
            letters[row, place + draw.integers(len(motif))] = draw.integers(4)
    return letters.astype(np.float32), has_motif.astype(np.int64)


def main(directory: Path, n_rows: int = 20_000, n_centers: int = 1000) -> float:
    """The share of test sequences that are told apart correctly."""
    store = directory / "sequences.zarr"
    split = ep3stream.ConvertConfig(splits={"train": 0.8, "test": 0.2}, task="classification")
    ep3stream.convert(sequences(n_rows), store, split)
    # Letter codes are names, not amounts: they must not be scaled.
    data = ep3stream.DataConfig(scale="none")
    solver = ep3stream.SolverConfig(centers=n_centers, epochs=2)
    run = ep3stream.fit(
        store, directory / "run", ep3stream.FitConfig(data=data, solver=solver), kernel=spectrum
    )
    scores = ep3stream.evaluate(run, store, kernel=spectrum)
    print(f"{scores['accuracy']:.1%} of {scores['n']} sequences, AUC {scores['auc']:.3f}")
    return float(scores["accuracy"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".examples/own_kernel"))
