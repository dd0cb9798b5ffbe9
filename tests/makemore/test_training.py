"""The loop around an engine: blocks, what is shown of them, and what ends a run."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused.makemore import checkpoint, data, engines, model, sweep, training
from fused.makemore.errors import InputError
from fused.makemore.model import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load(None, Settings().context, CPU)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes as far as a test says."""
    time = SimpleNamespace(now=100.0)
    time.perf_counter = lambda: time.now
    monkeypatch.setattr(training, "time", time)
    return time


def run_of(dataset: data.Dataset, settings: Settings, losses: Tensor) -> training.Run:
    """A run under way, after as many steps as there are losses."""
    parameters, generator = model.initial_parameters(settings, len(dataset.vocabulary), CPU)
    return training.Run(settings, "manual", None, dataset, parameters, generator, losses)


def with_losses(monkeypatch: pytest.MonkeyPatch, of: Callable[[int], Tensor]) -> None:
    """Trains by an engine that only returns losses, of so many steps."""
    engine = SimpleNamespace(run=lambda x, y, index, lr: of(len(index)))
    monkeypatch.setattr(training.engines, "start", lambda *_: engine)


def take_blocks(
    take: Callable[[int], Tensor], first: int, settings: Settings, models: int = 1
) -> tuple[bool, float]:
    return training.take_blocks(take, lambda: None, first, settings, models, torch.empty(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("done", [0, 7])
def test_the_first_step_whose_loss_is_no_number(done, bad, dataset, tmp_path, monkeypatch) -> None:
    """Counted from the beginning of the run, and not the last such step of its block."""
    places = torch.tensor([2, 5])
    with_losses(monkeypatch, lambda n: torch.zeros(n).index_fill_(0, places, bad))
    run = run_of(dataset, Settings(hidden=5, steps=40), torch.zeros(done))
    with pytest.raises(InputError, match=f"no longer a finite number at step {done + 2};"):
        training.train(run, tmp_path)
    assert len(run.losses) == done and not list(tmp_path.iterdir())


def test_statistics_that_are_no_numbers_are_not_saved(dataset, tmp_path, monkeypatch) -> None:
    """Of parameters that are: 1e30 squared is none of float32's."""
    with_losses(monkeypatch, torch.zeros)
    run = run_of(dataset, Settings(hidden=5, steps=3), torch.empty(0))
    run.parameters.W1.mul_(1e30)
    assert all(p.isfinite().all() for p in run.parameters)
    with pytest.raises(InputError, match="no longer a finite number at step 3"):
        training.train(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_no_numbers_are_not_saved(dataset, tmp_path, monkeypatch) -> None:
    """Nor those of which no statistics come."""
    with_losses(monkeypatch, torch.zeros)
    run = run_of(dataset, Settings(hidden=5, steps=3), torch.empty(0))
    run.parameters.W2[1, 2] = float("inf")
    with pytest.raises(InputError, match="no longer a finite number at step 3"):
        training.train(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_minute_passes_between_two_checkpoints(dataset, tmp_path, monkeypatch, clock) -> None:
    def losses(steps: int) -> Tensor:
        clock.now += 25.0
        return torch.zeros(steps)

    saved: list[int] = []
    with_losses(monkeypatch, losses)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", lambda run, folder: saved.append(run.step))
    run = run_of(dataset, Settings(hidden=5, steps=17), torch.empty(0))
    outcome = training.train(run, tmp_path)
    # Blocks of 8, the half, and of 1 step each: 75 seconds are three of them.
    assert saved == [10, 13, 16, 17]
    assert outcome.steps_per_second == pytest.approx(17 / (25 * 10))


def test_the_speed_of_a_resumed_run_is_of_its_own_steps(
    dataset, tmp_path, monkeypatch, clock, capsys
) -> None:
    def losses(steps: int) -> Tensor:
        clock.now += 2.0
        return torch.full((steps,), 3.0)

    with_losses(monkeypatch, losses)
    run = run_of(dataset, Settings(hidden=5, steps=12), torch.full((6,), 1.0))
    assert training.train(run, tmp_path).steps_per_second == 3.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split() == "step 12/12 loss 2.0000 3 steps/s 0:00 left".split()


def test_lines_of_progress(clock, capsys, monkeypatch) -> None:
    """Every ten seconds and at the end; the loss is the mean of the last thousand steps."""
    monkeypatch.setattr(training, "RECENT", 2)

    def take(steps: int) -> Tensor:
        clock.now += 4.0
        return torch.full((steps,), clock.now)

    assert take_blocks(take, 0, Settings(steps=16)) == (False, 36.0)
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    # 8 steps in 4 seconds, then one each.
    assert [words[1] for words in lines] == ["10/16", "13/16", "16/16"]
    assert [words[3] for words in lines] == ["110.0000", "122.0000", "134.0000"]


def test_blocks_of_many_networks_are_smaller(monkeypatch, capsys) -> None:
    monkeypatch.setattr(training, "_BLOCK_NUMBERS", 32 * 4 * 100)
    for models, most in ((1, 100), (4, 25), (1000, 1)):
        blocks: list[int] = []

        def take(steps: int, blocks: list[int] = blocks) -> Tensor:
            blocks.append(steps)
            return torch.zeros(steps)

        take_blocks(take, 0, Settings(steps=300), models)
        assert max(blocks[1:]) == most


def test_an_interruption_of_the_last_block_interrupts_nothing(monkeypatch, capsys) -> None:
    """The run is complete."""
    event = threading.Event()

    @contextmanager
    def interruption() -> Iterator[threading.Event]:
        yield event

    def take(steps: int) -> Tensor:
        event.set()
        return torch.zeros(steps)

    monkeypatch.setattr(training, "_interruption", interruption)
    for steps, interrupted in ((1, False), (30, True)):
        event.clear()
        settings = Settings(steps=steps)
        assert take_blocks(take, 0, settings)[0] == interrupted


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("sweeping", [False, True])
def test_an_interruption_of_the_last_save(
    sweeping, dataset, tmp_path, monkeypatch, interruptible
) -> None:
    """Which is not lost; the second interrupts."""
    kind = checkpoint.SweepCheckpoint if sweeping else checkpoint.Checkpoint
    save = kind.save
    interruptions = 1

    def interrupted(saved: Any, folder: Path) -> None:
        for _ in range(interruptions):
            os.kill(os.getpid(), signal.SIGINT)
        save(saved, folder)

    monkeypatch.setattr(kind, "save", interrupted)
    settings = Settings(hidden=5, steps=3, batch=4)

    def run(folder: Path) -> training.Outcome:
        folder.mkdir()
        if sweeping:
            models = sweep.start(settings, [0.1], [0, 1], "manual", None, dataset)
            return sweep.train(models, folder)
        return training.train(run_of(dataset, settings, torch.empty(0)), folder)

    assert not run(tmp_path / "one").interrupted and len(list((tmp_path / "one").iterdir())) == 1
    interruptions = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two")


@pytest.mark.parametrize("closed", [True, False])
def test_progress_that_nobody_reads(closed, dataset, tmp_path, monkeypatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", None if closed else Gone())
    run = run_of(dataset, Settings(hidden=5, steps=12, batch=4), torch.empty(0))
    assert not training.train(run, tmp_path).interrupted
    assert (tmp_path / checkpoint.FILE).exists()


def test_an_interruption_that_is_ignored_stays_so() -> None:
    """As of what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with training._interruption() as event:
            os.kill(os.getpid(), signal.SIGINT)
            assert not event.is_set() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_beside_the_main_thread() -> None:
    """Where no signals can be handled."""
    found: list[bool] = []

    def enter() -> None:
        with training._interruption() as event:
            found.append(event.is_set())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def swept(dataset: data.Dataset, steps: int, lr: list[float], seeds: list[int]) -> sweep.Models:
    return sweep.start(Settings(hidden=5, steps=steps), lr, seeds, "manual", None, dataset)


def test_a_network_whose_loss_was_no_number_has_diverged(dataset) -> None:
    """Though it goes on with numbers; those that diverged are in the order of their rates."""
    models = swept(dataset, 4, [0.3, 0.2, 0.1], [4, 3])
    models.losses = torch.ones(6, 4)
    models.losses[:4, 2] = float("inf")
    results = models.results()
    assert [r.diverged_at for r in results] == [None, None, 2, 2, 2, 2]
    assert [(r.lr, r.seed) for r in results[2:]] == [(0.2, 3), (0.2, 4), (0.3, 3), (0.3, 4)]


def test_what_is_shown_of_a_sweep_is_the_mean_of_the_networks_that_go_on(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    models = swept(dataset, 4, [0.1, 0.2], [3])

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        yield lambda index, lr: torch.tensor([[2.0], [float("nan")]]).expand(2, index.shape[1])

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    assert not sweep.train(models, tmp_path).interrupted
    assert "loss 2.0000" in capsys.readouterr().err


@pytest.mark.parametrize("done", [0, 6])
def test_a_sweep_stops_at_the_last_network_to_go(
    done, dataset, tmp_path, monkeypatch, capsys
) -> None:
    """Its step is counted from the first, not from its block; those before stop nothing, and one
    that has numbers again is gone all the same, also where the sweep was resumed since."""
    models = swept(dataset, 40, [0.2, 0.1, 0.3], [3])
    losses = torch.ones(3, 40)
    losses[0, 4] = losses[1, 17] = losses[2, 16] = float("inf")
    models.losses = losses[:, :done]
    blocks = [done]

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        def steps(index: Tensor, lr: Tensor) -> Tensor:
            blocks.append(index.shape[1])
            return losses[:, sum(blocks[:-1]) : sum(blocks)]

        yield steps

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    with pytest.raises(InputError, match="last one at step 17; try a smaller --lr than 0.1"):
        sweep.train(models, tmp_path)
    assert blocks == ([0, 10, 10] if done == 0 else [6, 10, 4])


def test_the_speed_of_a_resumed_sweep_is_of_its_own_steps(
    dataset, tmp_path, monkeypatch, clock, capsys
) -> None:
    """The loss that it shows is of the steps before as well."""
    models = swept(dataset, 12, [0.1, 0.2], [3])
    models.losses = torch.full((2, 6), 1.0)

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        def steps(index: Tensor, lr: Tensor) -> Tensor:
            clock.now += 2.0
            return torch.full((2, index.shape[1]), 3.0)

        yield steps

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    assert sweep.train(models, tmp_path).steps_per_second == 3.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split() == "step 12/12 loss 2.0000 3 steps/s 0:00 left".split()


def test_a_minute_passes_between_two_checkpoints_of_a_sweep(
    dataset, tmp_path, monkeypatch, clock, capsys
) -> None:
    """Each has every loss once."""
    models = swept(dataset, 17, [0.1], [3])
    saved: list[int] = []

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        def steps(index: Tensor, lr: Tensor) -> Tensor:
            clock.now += 25.0
            return torch.zeros(1, index.shape[1])

        yield steps

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    monkeypatch.setattr(sweep, "time", clock)
    kind = checkpoint.SweepCheckpoint
    monkeypatch.setattr(kind, "save", lambda models, folder: saved.append(models.step))
    sweep.train(models, tmp_path)
    # Blocks of 8, the half, and of 1 step each: 75 seconds are three of them.
    assert saved == [10, 13, 16, 17]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_minibatches_of_a_sweep_are_those_of_its_seeds(
    threads, dataset, tmp_path, monkeypatch, capsys
) -> None:
    """However many threads draw them."""
    models = swept(dataset, 30, [0.1, 0.2], [3, 9, 4, 7])
    drawn: list[Tensor] = []

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        def steps(index: Tensor, lr: Tensor) -> Tensor:
            drawn.append(index)
            return torch.zeros(8, index.shape[1])

        yield steps

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sweep.train(models, tmp_path)
    for ours, seed in zip(torch.cat(drawn, 1), (3, 9, 4, 7), strict=True):
        s = Settings(hidden=5, seed=seed)
        _, generator = model.initial_parameters(s, len(dataset.vocabulary), CPU)
        assert torch.equal(ours, training.minibatches(generator, len(dataset.train), 30, s.batch))


def test_blocks_of_a_sweep_are_as_small_as_its_networks_are_many(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    models = swept(dataset, 30, [0.1, 0.2], [3, 4])
    blocks: list[int] = []

    @contextmanager
    def trainer(*_: object) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        def steps(index: Tensor, lr: Tensor) -> Tensor:
            blocks.append(index.shape[1])
            return torch.zeros(4, index.shape[1])

        yield steps

    monkeypatch.setattr(sweep.processes, "trainer", trainer)
    monkeypatch.setattr(training, "_BLOCK_NUMBERS", 32 * 4 * 4 * 2)
    sweep.train(models, tmp_path)
    assert max(blocks[1:]) == 2


def test_the_engine_of_a_sweep_is_the_fastest_for_its_batch(dataset, monkeypatch) -> None:
    asked: list[int] = []

    def fastest(parameters: object, x: Tensor, batch: int) -> str:
        asked.append(batch)
        return "manual"

    monkeypatch.setattr(engines, "fastest", fastest)
    models = sweep.start(Settings(hidden=5, batch=48), [0.1], [3], "auto", None, dataset)
    assert asked == [48] and models.engine == "manual"


def test_the_fastest_engine_has_a_name_of_its_own(dataset, monkeypatch) -> None:
    parameters, _ = model.initial_parameters(Settings(), len(dataset.vocabulary), CPU)
    for method, name in (("eager", "manual"), ("numba", "numba"), ("graph", "graph")):
        monkeypatch.setattr(engines, "train_mlp_method", lambda *_, method=method: method)
        assert engines.fastest(parameters, dataset.train.x, 32) == name


def test_an_engine_is_tried_with_the_batch_of_the_run(dataset) -> None:
    """Before anything is written; the library's words, and none of its function's name."""
    parameters, _ = model.initial_parameters(Settings(), len(dataset.vocabulary), CPU)
    with pytest.raises(InputError, match="^--engine manual: a minibatch needs at least 2"):
        engines.start("manual", parameters, dataset.train.x, dataset.train.y, 1)
