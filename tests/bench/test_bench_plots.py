"""What the plots of a run draw."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.measure import Times

plots = pytest.importorskip("bench.plots", exc_type=ImportError)  # without matplotlib


def row(case: str, phase: str, contender: str, seconds: float) -> dict[str, Any]:
    return {
        "operation": "op", "case": case, "phase": phase, "contender": contender, "dtype": "f32",
        "times": {"wall": asdict(Times.of([seconds]))}, "least_bytes": None,
        "peak_bytes": 128, "tensor_bytes": 256,
    }  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Any:
    """The axes of each picture of a run with these rows, by the picture's name."""

    def draw(rows: list[dict[str, Any]]) -> dict[str, Any]:
        axes: dict[str, Any] = {}
        figure = type(plots.plt.figure())
        save = figure.savefig

        def kept(self: Any, path: Path, **options: Any) -> None:
            axes[path.stem] = self.axes
            save(self, path, **options)

        monkeypatch.setattr(figure, "savefig", kept)
        plots.draw({"rows": rows, "machine": {"type": "cpu"}}, tmp_path, "run")
        assert {path.stem for path in tmp_path.glob("*.png")} == set(axes)
        return axes

    return draw


@pytest.mark.parametrize("phase", ["step", "fwd_bwd"])
def test_each_case_has_bars_of_its_own(phase, drawn) -> None:
    """Though the cases have contenders of one name."""
    seconds = {"a": {"torch": 3e-4, "compile": 2e-4}, "b": {"torch": 4e-4, "jax": 1e-4}}
    rows = [row(c, phase, n, t) for c, times in seconds.items() for n, t in times.items()]
    axes = drawn(rows)["run-op-speed"]
    assert [ax.get_title() for ax in axes] == ["op a", "op b"]
    for ax, times in zip(axes, seconds.values(), strict=True):
        assert [label.get_text() for label in ax.get_yticklabels()] == list(times)
        widths = [bar.get_width() for bar in ax.patches]
        assert widths == pytest.approx([t * 1e6 for t in times.values()])


def test_memory_is_drawn_where_forward_and_backward_are_measured(drawn) -> None:
    """Also of an operation that has no bound by bytes; not of a training loop."""
    assert set(drawn([row("a", "fwd_bwd", "torch", 1.0)])) == {"run-op-speed", "run-op-memory"}


def test_no_memory_is_drawn_of_a_loop(drawn) -> None:
    assert set(drawn([row("a", "step", "torch", 1.0)])) == {"run-op-speed"}
