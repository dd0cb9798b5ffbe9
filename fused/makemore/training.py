"""The training loop: minibatches to an engine, progress to the terminal, checkpoints to disk."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import torch
from torch import Tensor
from tqdm import tqdm

from fused.makemore import engines
from fused.makemore.checkpoint import Checkpoint
from fused.makemore.data import Dataset
from fused.makemore.errors import InputError
from fused.makemore.model import Settings, calibrate
from fused.mlp_train import MLPParameters

_BLOCK_SECONDS = 0.2  # between two looks at the clock, the keyboard and the loss
SAVE_SECONDS = 60.0
_BLOCK_NUMBERS = 1 << 26  # of contexts: bounds what an engine may keep of a block
RECENT = 1000  # steps in the running loss


@dataclass
class Run:
    """A run under way: what it is, and where it is."""

    settings: Settings
    engine: str
    data_option: str | None
    dataset: Dataset
    parameters: MLPParameters  # updated in place
    generator: torch.Generator  # draws the minibatches
    losses: Tensor  # (steps so far,), on the CPU

    @property
    def step(self) -> int:
        return len(self.losses)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.settings,
            self.engine,
            self.data_option,
            self.dataset.sha256,
            self.dataset.vocabulary,
            calibrate(self.parameters, self.dataset.train),
            self.losses,
            self.generator.get_state(),
        )


@dataclass(frozen=True)
class Outcome:
    interrupted: bool
    steps_per_second: float | None  # None where no step was left

    @staticmethod
    def of(interrupted: bool, steps: int, seconds: float) -> "Outcome":
        return Outcome(interrupted, steps / seconds if steps else None)


def train(run: Run, folder: Path) -> Outcome:
    """Trains until the last step, or until Ctrl-C; saves a checkpoint now and then and at the end.

    Raises InputError where the engine cannot run, and where the loss is not a finite number; the
    checkpoint before stays.
    """
    s, split = run.settings, run.dataset.train
    engine = engines.start(run.engine, run.parameters, split.x, split.y, s.batch)
    first, saved = run.step, time.perf_counter()

    def diverged(step: int) -> InputError:
        return InputError(
            f"the loss is no longer a finite number at step {step}; try a smaller --lr than {s.lr}"
        )

    def save() -> None:
        checkpoint = run.checkpoint()
        model = checkpoint.model
        if not all(t.isfinite().all() for t in (*model.parameters, model.mean, model.var)):
            raise diverged(run.step)
        checkpoint.save(folder)

    def take(steps: int) -> Tensor:
        nonlocal saved
        lr = s.lr if run.step < s.steps // 2 else s.final_lr
        index = minibatches(run.generator, len(split), steps, s.batch).to(split.x.device)
        losses = engine.run(split.x, split.y, index, lr).cpu()
        if not losses.isfinite().all():
            raise diverged(run.step + int(losses.isfinite().logical_not().nonzero()[0]))
        run.losses = torch.cat((run.losses, losses))
        if time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
        return losses

    interrupted, elapsed = take_blocks(take, save, first, s, models=1, recent=run.losses)
    return Outcome.of(interrupted, run.step - first, elapsed)


def minibatches(
    generator: torch.Generator, examples: int, steps: int, batch: int, out: Tensor | None = None
) -> Tensor:
    """Rows of the training examples, (steps, batch). Blocks of any size draw the same stream."""
    return torch.randint(0, examples, (steps, batch), generator=generator, out=out)


def take_blocks(
    take: Callable[[int], Tensor],
    save: Callable[[], None],
    first: int,
    s: Settings,
    models: int,
    recent: Tensor,
) -> tuple[bool, float]:
    """Calls take(steps) for block after block, until s.steps or Ctrl-C, and then save(), which the
    first Ctrl-C leaves alone.

    Returns whether Ctrl-C ended it before s.steps, and the seconds of all blocks. take returns the
    losses (steps,) that progress shows, after those in `recent`. No block goes beyond the step at
    which the learning rate changes, so blocks have no influence on the result.
    """
    step, size = first, 10
    most = max(1, _BLOCK_NUMBERS // (s.batch * (s.context + 1) * models))
    with _interruption() as interrupted:
        started = time.perf_counter()
        with _Progress(s.steps, first) as progress:
            while step < s.steps and not interrupted.is_set():
                half = s.steps // 2
                steps = min(size, (half if step < half else s.steps) - step)
                began = time.perf_counter()
                recent = torch.cat((recent, take(steps)))[-RECENT:]
                step += steps
                progress.update(steps, recent.mean().item())
                size = int(steps * _BLOCK_SECONDS / (time.perf_counter() - began))
                size = min(most, max(1, size))
        seconds = time.perf_counter() - started
        save()
    return step < s.steps, seconds


class _Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing where nobody reads it."""

    _LINE_SECONDS = 10.0

    def __init__(self, total: int, initial: int) -> None:
        self._total, self._initial, self._step = total, initial, initial
        self._started = self._printed = time.perf_counter()
        self._bar, self._out = None, sys.stderr  # None where it is closed
        if self._out is not None and self._out.isatty():
            self._bar = tqdm(total=total, initial=initial, unit=" steps", dynamic_ncols=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int, loss: float) -> None:
        self._step += steps
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(steps)
            return
        now = time.perf_counter()
        soon = now - self._printed < self._LINE_SECONDS and self._step < self._total
        if soon or self._out is None:
            return
        rate = (self._step - self._initial) / (now - self._started)
        left = int((self._total - self._step) / rate)
        line = (
            f"step {self._step}/{self._total}  loss {loss:.4f}  {rate:.0f} steps/s  "
            f"{left // 60}:{left % 60:02d} left"
        )
        try:
            print(line, file=self._out, flush=True)
        except OSError:  # its reader went away
            forget(self._out)
            self._out = None
        self._printed = now


def forget(stream: IO[str]) -> None:
    """Of a stream that nobody reads: Python flushes it once more as it ends, and would fail."""
    with suppress(OSError, ValueError):  # it has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as a shell starts what runs in the background
        yield event
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
