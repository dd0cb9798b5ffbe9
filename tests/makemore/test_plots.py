"""What is drawn: the numbers that the pictures show."""

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fused.makemore import plots
from fused.makemore.sweep import Result


@pytest.fixture
def drawn(monkeypatch) -> list[Axes]:
    """The axes of each picture, in place of a file."""
    axes: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.append(figure.axes[0]))
    return axes


def test_the_loss_is_averaged_over_windows(drawn, tmp_path) -> None:
    """Each drawn at its last step; what does not fill a window is left out."""
    plots.loss_curve(torch.arange(1, 1004, dtype=torch.float32), tmp_path)
    (line,) = drawn[0].lines
    assert line.get_xdata()[:2].tolist() == [5, 10] and line.get_xdata()[-1] == 1000
    assert line.get_ydata()[:2].tolist() == [3.0, 8.0] and len(line.get_ydata()) == 200
    plots.loss_curve(torch.tensor([3.0, 2.0]), tmp_path)
    assert drawn[1].lines[0].get_ydata().tolist() == [3.0, 2.0]


def test_a_sweep_without_its_divergent_networks(drawn, tmp_path) -> None:
    nan = float("nan")
    losses = torch.tensor([[3.0, 2.0], [1.0, 1.0], [3.0, nan], [5.0, 4.0], [nan, nan]])
    rates = torch.tensor([0.1, 0.1, 0.3, 0.3, 1e30])
    plots.sweep_losses(losses, rates, tmp_path)
    assert [line.get_ydata().tolist() for line in drawn[0].lines] == [[2.0, 1.5], [5.0, 4.0]]
    assert [t.get_text() for t in drawn[0].get_legend().get_texts()] == ["lr 0.1", "lr 0.3"]
    plots.sweep_losses(losses[4:], rates[4:], tmp_path)
    assert not drawn[1].lines and drawn[1].get_legend() is None

    results = [Result(lr, 1, loss, loss, None) for lr, loss in ((0.1, 2.0), (0.0, 4.0), (0.1, 3.0))]
    plots.sweep_validation([*results, Result(1e30, 1, None, None, 5)], tmp_path)
    (line,) = drawn[2].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0.0, 0.1], [4.0, 2.5])
    assert drawn[2].get_xscale() == "linear"  # which has a place for 0
    plots.sweep_validation(results[::2], tmp_path)
    assert drawn[3].get_xscale() == "log"
