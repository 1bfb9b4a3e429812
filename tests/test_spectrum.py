"""The spectrum against scipy's DCT and the filter's formula; its shares, its errors and its picture."""

from __future__ import annotations

import builtins
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from automagic_bnb import AutomagicConfig, Spectrum, plot_spectrum, spectrum
from automagic_bnb.watch.spectrum import dct2

FLOAT64 = 1e-12
"""Relative to the largest coefficient: an FFT in double precision loses a few bits of 53."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(rows: int, columns: int, penalty: float) -> np.ndarray:
    """The rule's own formula for the frequency filter, by DCT-II mode."""
    p, q = np.arange(rows)[:, None], np.arange(columns)
    sines = 4 * np.sin(np.pi * p / (2 * rows)) ** 2 + 4 * np.sin(np.pi * q / (2 * columns)) ** 2
    return 1 - penalty / 8 * sines


def by_scipy(x: np.ndarray, cutoff: float, penalty: float, bins: int) -> dict[str, Any]:
    """All figures of a `Spectrum`, mode by mode."""
    slices = x.reshape(-1, *x.shape[-2:])
    rows, columns = slices.shape[1:]
    sums = {name: np.zeros(bins) for name in ("before", "after", "modes")}
    energy, high = {"before": 0.0, "after": 0.0}, {"before": 0.0, "after": 0.0}
    for one in slices:
        before = scipy.fft.dctn(one, norm="ortho")
        powers = {"before": before**2, "after": (before * gain(rows, columns, penalty)) ** 2}
        for p in range(rows):
            for q in range(columns):
                radius = math.hypot(p / rows, q / columns) / math.sqrt(2)
                sums["modes"][int(radius * bins)] += 1
                for name, power in powers.items():
                    sums[name][int(radius * bins)] += power[p, q]
                    energy[name] += power[p, q]
                    high[name] += power[p, q] * (radius > cutoff)
    with np.errstate(invalid="ignore"):
        means = {name: sums[name] / sums["modes"] for name in ("before", "after")}
    return {"power": means, "energy": energy, "share": {name: high[name] / energy[name] for name in energy}}


@pytest.mark.parametrize("shape", [(3, 3), (4, 7), (7, 4), (16, 16), (33, 5), (5, 1, 3, 3), (2, 3, 6, 5)])
@pytest.mark.parametrize(("cutoff", "penalty", "bins"), [(0.5, 0.05, 32), (0.31, 1.0, 7), (0.9, 0.0, 1)])
def test_figures(shape: tuple[int, ...], cutoff: float, penalty: float, bins: int) -> None:
    """Odd and even sizes, slices of more dimensions, the filter's gain at every mode."""
    x = normal(*shape)
    found, wanted = spectrum(x, cutoff, penalty, bins), by_scipy(x.numpy(), cutoff, penalty, bins)
    for name in ("before", "after"):
        power = getattr(found, f"power_{name}").numpy()
        np.testing.assert_allclose(power, wanted["power"][name], rtol=1e-9, atol=FLOAT64)
        assert getattr(found, f"energy_{name}") == pytest.approx(wanted["energy"][name], rel=1e-9)
        assert getattr(found, f"high_share_{name}") == pytest.approx(wanted["share"][name], rel=1e-9)
    assert found.shape == shape
    assert found.radius.tolist() == pytest.approx([(i + 0.5) / bins for i in range(bins)])


def test_another_filter_would_be_seen() -> None:
    """Negative control: a penalty one part in a thousand off moves the figures far beyond the tolerance."""
    x = normal(16, 12)
    found, wanted = spectrum(x, 0.5, 0.5005, 8), by_scipy(x.numpy(), 0.5, 0.5, 8)
    assert found.energy_after != pytest.approx(wanted["energy"]["after"], rel=1e-5)
    assert found.energy_before == pytest.approx(wanted["energy"]["before"], rel=1e-9)


@given(some.integers(1, 9), some.integers(1, 9), some.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_transform_is_scipys(rows: int, columns: int, seed: int) -> None:
    x = normal(2, rows, columns, seed=seed)
    wanted = scipy.fft.dctn(x.numpy(), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(dct2(x).numpy(), wanted, atol=FLOAT64 * 100)


@given(some.integers(3, 40), some.integers(3, 40), some.integers(-15, 15), some.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_energy_is_the_sum_of_squares(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Parseval; and the filter takes energy off, never adds any."""
    x = normal(rows, columns, seed=seed) * 10.0**exponent
    found = spectrum(x)
    assert found.energy_before == pytest.approx(x.square().sum().item(), rel=1e-10)
    assert found.energy_after < found.energy_before
    assert found.high_share_after < found.high_share_before


@pytest.mark.parametrize(("p", "q"), [(0, 0), (3, 5), (0, 15), (11, 0), (11, 15)])
def test_a_single_wave_is_found_at_its_radius(p: int, q: int) -> None:
    """cos(πp(2i + 1) / 2R) · cos(πq(2j + 1) / 2C), by hand."""
    rows, columns, bins = 12, 16, 40
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    wave = torch.cos(math.pi * p * (2 * i + 1) / (2 * rows)) * torch.cos(math.pi * q * (2 * j + 1) / (2 * columns))
    found = spectrum(wave, cutoff=0.6, frequency_penalty=0.8, bins=bins)
    radius = math.hypot(p / rows, q / columns) / math.sqrt(2)
    held = torch.nan_to_num(found.power_before) > 1e-20
    assert held.nonzero().flatten().tolist() == [int(radius * bins)]
    assert found.high_share_before == pytest.approx(float(radius > 0.6), abs=1e-12)
    assert found.energy_after / found.energy_before == pytest.approx(gain(rows, columns, 0.8)[p, q] ** 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_any_dtype_counts_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    x = (normal(8, 12) * 3).to(dtype)
    found, wanted = spectrum(x), spectrum(x.double())
    assert torch.equal(found.power_before.nan_to_num(-1), wanted.power_before.nan_to_num(-1))
    # Only float16 and bfloat16 could lose something on the way to the filter; they do not.
    assert found.energy_after == wanted.energy_after


def test_parameters_gradients_and_views() -> None:
    """What users have at hand; and it is only read."""
    layer = torch.nn.Conv2d(4, 6, 3)
    layer(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.detach().clone()
    assert spectrum(layer.weight).energy_before == pytest.approx(layer.weight.square().sum().item(), rel=1e-5)
    assert spectrum(layer.weight.grad).energy_before > 0
    assert torch.equal(layer.weight, before)
    x = normal(20, 9)
    assert spectrum(x.T).energy_after == pytest.approx(spectrum(x.T.contiguous()).energy_after, rel=1e-12)


def test_many_slices_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(50, 4, 5)
    whole = spectrum(x)
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["automagic_bnb.watch.spectrum"], "PIECE", 60)
    assert spectrum(x).energy_after == pytest.approx(whole.energy_after, rel=1e-12)


def test_the_default_filter_is_the_optimizers() -> None:
    assert spectrum(normal(5, 5)).frequency_penalty == AutomagicConfig().frequency_penalty


def test_zeros_have_no_shares() -> None:
    """LoRA's B at its start."""
    found = spectrum(torch.zeros(16, 4))
    assert found.energy_before == found.energy_after == 0
    assert math.isnan(found.high_share_before)
    assert math.isnan(found.high_share_after)


@pytest.mark.parametrize(
    ("tensor", "options", "error", "message"),
    [
        (None, {}, TypeError, "NoneType"),
        ([[1.0]], {}, TypeError, "list"),
        (torch.zeros(5, 5, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.eye(5).to_sparse(), {}, TypeError, "sparse"),
        (torch.zeros(5), {}, ValueError, r"at least 2 dimensions.*\(5,\)"),
        (torch.zeros(()), {}, ValueError, "at least 2 dimensions"),
        (torch.zeros(2, 50), {}, ValueError, r"at least 3 rows and columns.*\(2, 50\)"),
        (torch.zeros(64, 32, 1, 1), {}, ValueError, "at least 3 rows and columns"),
        (torch.zeros(0, 5), {}, ValueError, r"\(0, 5\)"),
        (torch.tensor([[1.0, math.nan, math.inf]] * 3), {}, ValueError, "6 of 9 are NaN or infinite"),
        (torch.zeros(4, 4), {"cutoff": 0}, ValueError, "cutoff=0: must be above 0 and below 1"),
        (torch.zeros(4, 4), {"cutoff": 1.0}, ValueError, "cutoff=1.0"),
        (torch.zeros(4, 4), {"cutoff": math.nan}, ValueError, "cutoff=nan"),
        (torch.zeros(4, 4), {"cutoff": "0.5"}, TypeError, "cutoff='0.5'"),
        (torch.zeros(4, 4), {"cutoff": True}, TypeError, "cutoff=True"),
        (torch.zeros(4, 4), {"frequency_penalty": 1.5}, ValueError, "frequency_penalty=1.5"),
        (torch.zeros(4, 4), {"frequency_penalty": []}, TypeError, "frequency_penalty"),
        (torch.zeros(4, 4), {"bins": 0}, ValueError, "bins=0"),
        (torch.zeros(4, 4), {"bins": 3.5}, TypeError, "bins=3.5"),
    ],
)
def test_what_has_no_spectrum(tensor: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        spectrum(tensor, **options)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_picture(tmp_path: Path) -> None:
    """Both curves hold the figures, on a logarithmic axis, with the cut-off; the file is a picture."""
    found: Spectrum = spectrum(normal(30, 40), cutoff=0.37, frequency_penalty=0.9)
    figure = plot_spectrum(found, tmp_path / "spectrum.png")
    (axes,) = figure.axes
    before, after, cutoff = axes.lines
    assert axes.get_yscale() == "log"
    seen = found.power_before > 0
    assert np.asarray(before.get_ydata()).tolist() == found.power_before[seen].tolist()
    assert np.asarray(after.get_ydata()).tolist() == found.power_after[seen].tolist()
    assert set(np.asarray(cutoff.get_xdata()).tolist()) == {0.37}
    pixels = matplotlib.image.imread(tmp_path / "spectrum.png")
    assert pixels[..., :3].std() > 0.02  # a blank page has 0


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_with_gaps_and_of_nothing(suffix: str, tmp_path: Path) -> None:
    """3×3 kernels, most of whose bins are empty, a constant and zeros are drawn too, in each format."""
    for name, x in (("gaps", normal(6, 5, 3, 3)), ("constant", torch.ones(8, 8)), ("zeros", torch.zeros(16, 4))):
        figure = plot_spectrum(spectrum(x), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"{name}.{suffix}").stat().st_size > 1000
        assert "nan" not in "".join(str(label) for label in figure.axes[0].get_legend_handles_labels()[1])


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plot_spectrum(spectrum(normal(4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    found = spectrum(normal(4, 4))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"automagic-bnb\[plots\]"):
        plot_spectrum(found)
