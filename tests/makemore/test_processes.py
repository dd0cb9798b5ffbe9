"""A sweep divided over processes is the sweep undivided."""

import os
import signal
from pathlib import Path

import pytest
import torch

from fused.makemore import data, processes, sweep
from fused.makemore.model import Settings

SETTINGS = Settings(hidden=20, steps=30)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load(None, SETTINGS.context, CPU)


def swept(dataset: data.Dataset, tmp_path: Path) -> sweep.Models:
    models = sweep.start(SETTINGS, [0.1, 1e30, 0.03], [3, 4], "manual", None, dataset)
    outcome = sweep.train(models, tmp_path)
    assert not outcome.interrupted
    return models


def test_the_last_loss_is_the_mean_of_1000_steps(dataset) -> None:
    models = sweep.start(SETTINGS, [0.1], [3], "manual", None, dataset)
    models.losses = torch.arange(2000.0).unsqueeze(0)
    (result,) = models.results()
    assert result.last_loss == 1499.5 and result.diverged_at is None


def test_divided_as_undivided(dataset, tmp_path, monkeypatch) -> None:
    """To the last bit, with networks that diverge, and Ctrl-C reaching the processes. The second
    one's first network, the fourth, has the second seed's minibatches."""
    undivided, started = swept(dataset, tmp_path), []

    class Interrupted(processes.Processes):
        def __enter__(self):
            started.extend(self._processes)
            for process in started:
                os.kill(process.pid, signal.SIGINT)
            return self

    monkeypatch.setattr(processes, "Processes", Interrupted)
    monkeypatch.setattr(processes, "worthwhile", lambda *_: 2)
    divided = swept(dataset, tmp_path)
    assert len(started) == 2 and not any(process.is_alive() for process in started)
    assert divided.losses[:2].isfinite().all() and divided.losses[2:4].isnan().any(1).all()
    for ours, theirs in zip(
        [*divided.parameters, divided.losses],
        [*undivided.parameters, undivided.losses],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_process_that_ends(dataset) -> None:
    models = sweep.start(SETTINGS, [0.1], [3, 4], "manual", None, dataset)
    split, before = dataset.train, signal.getsignal(signal.SIGINT)
    with processes.Processes("eager", models.parameters, split.x, split.y, 2) as divided:
        os.kill(divided._processes[1].pid, signal.SIGKILL)
        index = torch.zeros(1, 0, 32, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="has ended"):
            divided.train(index, torch.zeros(2))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "method, models, steps, device, expected",
    [
        ("eager", 3, 40_000, "cpu", 3),
        ("eager", 20, 5_000, "cpu", 4),
        ("eager", 20, 4_999, "cpu", 1),
        ("eager", 1, 200_000, "cpu", 1),
        ("numba", 20, 200_000, "cpu", 1),
        ("eager", 20, 200_000, "meta", 1),
    ],
)
def test_processes_where_they_are_worth_their_start(
    method, models, steps, device, expected, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert processes.worthwhile(method, models, steps, torch.device(device)) == expected
