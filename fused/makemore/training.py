"""The training loop: minibatches to an engine, progress to the terminal, checkpoints to disk."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from fused.makemore.checkpoint import Checkpoint
from fused.makemore.data import Dataset
from fused.makemore.engines import ENGINES, Engine
from fused.makemore.errors import InputError
from fused.makemore.model import Settings, calibrate
from fused.reference.mlp import Parameters

_BLOCK_SECONDS = 0.2  # between two looks at the clock, the keyboard and the loss
_SAVE_SECONDS = 60.0
_BLOCK_NUMBERS = 1 << 22  # of logits: bounds what an engine may keep of a block
_RECENT = 1000  # steps in the running loss


@dataclass
class Run:
    """A run under way: what it is, and where it is."""

    settings: Settings
    engine: str
    data_option: str | None
    dataset: Dataset
    parameters: Parameters  # updated in place
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
    steps_per_second: float


def train(run: Run, folder: Path) -> Outcome:
    """Trains until the last step, or until Ctrl-C; saves a checkpoint now and then and at the end.

    The blocks in which steps are taken have no influence on the result: minibatches are drawn from
    one stream of numbers, and the learning rate changes at its step.

    Raises InputError where the loss is not a finite number; the checkpoint before stays.
    """
    s = run.settings
    engine = ENGINES[run.engine](run.parameters)
    first, started, saved = run.step, time.monotonic(), time.monotonic()
    most = max(1, _BLOCK_NUMBERS // (s.batch * len(run.dataset.vocabulary)))
    size, recent = 10, run.losses[-_RECENT:]
    with _interruption() as interrupted, _Progress(s.steps, first) as progress:
        while run.step < s.steps and not interrupted.is_set():
            half = s.steps // 2
            last = half if run.step < half else s.steps
            lr = s.lr if run.step < half else s.final_lr
            began = time.monotonic()
            block = _train_block(run, engine, min(size, last - run.step), lr)
            recent = torch.cat((recent, block))[-_RECENT:]
            now = time.monotonic()
            progress.update(len(block), recent.mean().item())
            size = min(most, max(1, int(len(block) * _BLOCK_SECONDS / (now - began))))
            if now - saved > _SAVE_SECONDS:
                run.checkpoint().save(folder)
                saved = now
    elapsed = time.monotonic() - started
    run.checkpoint().save(folder)
    return Outcome(run.step < s.steps, (run.step - first) / elapsed)


def _train_block(run: Run, engine: Engine, steps: int, lr: float) -> Tensor:
    """Takes `steps` steps with one learning rate and records their losses."""
    split, s = run.dataset.train, run.settings
    index = torch.randint(0, len(split), (steps, s.batch), generator=run.generator)
    index = index.to(split.x.device)
    losses = engine.run(split.x[index], split.y[index], lr).cpu()
    if not losses.isfinite().all():
        bad = run.step + int(losses.isfinite().logical_not().nonzero()[0])
        raise InputError(
            f"the loss is no longer a finite number at step {bad}; try a smaller --lr than {s.lr}"
        )
    run.losses = torch.cat((run.losses, losses))
    return losses


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    _LINE_SECONDS = 10.0

    def __init__(self, total: int, initial: int) -> None:
        self._total, self._initial, self._step = total, initial, initial
        self._started = self._printed = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
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
        now = time.monotonic()
        if now - self._printed < self._LINE_SECONDS and self._step < self._total:
            return
        rate = (self._step - self._initial) / (now - self._started)
        left = int((self._total - self._step) / rate)
        print(
            f"step {self._step}/{self._total}  loss {loss:.4f}  {rate:.0f} steps/s  "
            f"{left // 60}:{left % 60:02d} left",
            file=sys.stderr,
            flush=True,
        )
        self._printed = now


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
