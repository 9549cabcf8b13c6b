"""Data sets of the examples, and the exact likelihood that they report.

NumPy and scikit-learn only.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

FREY_FACES = (
    "The original is https://cs.nyu.edu/~roweis/data/frey_rawface.mat; give its path with --data "
    "or in the environment variable BISM_DATA"
)


def checkerboard(n: int, rng: np.random.Generator, num_columns: int = 2) -> np.ndarray:
    """Uniform draws from the squares (i, j), i + j even, of a board over [0, 1]².

    With ``num_columns=2`` this is the toy density of Bao et al. (2020) as their published code has
    it: the two squares [0, ½]² and [½, 1]². An even number of columns leaves half of the area, so
    the density is 2 there and no model's expected log-likelihood exceeds log 2 = 0.693. A noise of
    σ = 0.05 is to be read against squares of side 1/``num_columns``.

    :returns: float32, shape (n, 2).
    """
    squares = np.argwhere(np.indices((num_columns, num_columns)).sum(0) % 2 == 0)
    corner = squares[rng.integers(len(squares), size=n)]
    return ((corner + rng.uniform(size=(n, 2))) / num_columns).astype(np.float32)


class Split(NamedTuple):
    """Images as flat rows of floats in [0, 1], shape (n, height·width).

    :ivar shape: (height, width).
    """

    train: np.ndarray
    test: np.ndarray
    shape: tuple[int, int]


def digits(num_test: int = 297) -> Split:
    """scikit-learn's bundled digits: 1,797 real images of 8 x 8, always split the same way.

    :param num_test: how many to hold out, balanced over the ten classes.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(
        (bunch.data / 16).astype(np.float32),
        test_size=num_test,
        stratify=bunch.target,
        random_state=0,
    )
    return Split(train, test, (8, 8))


def frey_faces(path: str | os.PathLike | None = None) -> Split:
    """Frey faces: 1,965 frames of 28 x 20, first 1,400 to train, last 265 to test.

    That is the split of Bao et al. (2020); they validate on the 300 between. The set is not
    bundled: its licence is not stated.

    :param path: ``frey_rawface.mat``, or an ``.npz`` with ``x`` of shape (1965, 28, 20), or a
        folder with one of them (``freyface.npz``); None reads the environment variable
        ``BISM_DATA``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file holds something else.
    """
    given = path or os.environ.get("BISM_DATA")
    if not given:
        raise FileNotFoundError(f"No path to the Frey faces was given. {FREY_FACES}.")
    file = Path(given)
    if file.is_dir():
        names = ("freyface.npz", "frey_rawface.mat")
        file = next((file / name for name in names if (file / name).exists()), file / names[0])
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist. {FREY_FACES}.")
    if file.suffix == ".mat":
        from scipy.io import loadmat  # scikit-learn brings SciPy

        x = loadmat(file)["ff"].T
    else:
        with np.load(file) as archive:
            x = archive["x"]
    if x.size != 1965 * 560:
        raise ValueError(f"{file} should hold 1,965 images of 28 x 20, found an array of shape {x.shape}.")
    x = x.reshape(1965, 560).astype(np.float32) / 255
    return Split(x[:1400], x[1700:], (28, 20))


def grbm_log_likelihood(v, b, c, W, s) -> np.ndarray:
    """Exact log p(v) of a Gaussian-Bernoulli RBM, all 2^k hidden states enumerated; (n,).

    E(v, h) = ½ ‖(v - b)/s‖² - cᵀh - vᵀW h, log p(v) = -F(v) - log Z with
    F(v) = ½ ‖(v - b)/s‖² - Σ_j softplus(c_j + (Wᵀv)_j) and
    Z = Σ_h exp(cᵀh + bᵀW h + ½ ‖s ∘ W h‖²) Π_i √(2π) s_i.

    :param v: shape (n, d).
    :param b: visible bias, shape (d,).
    :param c: hidden bias, shape (k,); k up to about 20.
    :param W: shape (d, k).
    :param s: standard deviation of v given h: a number or shape (d,).
    """
    v, b, c, W, s = (np.asarray(x, dtype=np.float64) for x in (v, b, c, W, s))
    k = len(c)
    chunk_peaks, chunk_sums = [], []
    for start in range(0, 1 << k, 1 << 12):
        number = np.arange(start, min(start + (1 << 12), 1 << k))
        h = (number[:, None] >> np.arange(k) & 1).astype(np.float64)
        drive = h @ W.T
        log_weight = h @ c + drive @ b + 0.5 * ((drive * s) ** 2).sum(-1)
        chunk_peaks.append(log_weight.max())
        chunk_sums.append(np.exp(log_weight - chunk_peaks[-1]).sum())
    peak = max(chunk_peaks)
    total = np.dot(np.exp(np.array(chunk_peaks) - peak), chunk_sums)
    volume = np.broadcast_to(np.log(s) + 0.5 * np.log(2 * np.pi), b.shape).sum()
    free_energy = 0.5 * (((v - b) / s) ** 2).sum(-1) - np.logaddexp(0, c + v @ W).sum(-1)
    return -free_energy - (peak + np.log(total) + volume)
