"""Many networks at once: learning rates times seeds, each trained as if alone."""

import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused.makemore import engines, processes, training
from fused.makemore.checkpoint import SWEEP_FILE, SweepCheckpoint, generator
from fused.makemore.data import Dataset
from fused.makemore.errors import InputError
from fused.makemore.model import Settings, calibrate, initial_parameters, tenth
from fused.mlp_train import MLPParameters

VARIED = ("lr", "final_lr", "seed")


@dataclass(frozen=True)
class Result:
    """What became of one network; the losses are None where it diverged."""

    lr: float
    seed: int
    val_loss: float | None
    last_loss: float | None  # of training, mean of the last 1,000 steps
    diverged_at: int | None  # the step whose loss is no longer a finite number


@dataclass
class Models:
    """A sweep under way: networks in the order of their learning rates, then of their seeds."""

    settings: Settings  # without what is varied
    engine: str
    data_option: str | None
    dataset: Dataset
    lr: Tensor  # (M,), on the CPU
    seeds: list[int]  # S
    parameters: MLPParameters  # with the models in front, updated in place
    generators: list[torch.Generator]  # one a seed: seeds alike see the same minibatches
    losses: Tensor  # (M, steps so far), on the CPU

    def __len__(self) -> int:
        return len(self.lr)

    @property
    def step(self) -> int:
        return self.losses.shape[1]

    def checkpoint(self) -> SweepCheckpoint:
        return SweepCheckpoint(
            self.settings,
            self.engine,
            self.data_option,
            self.dataset.sha256,
            self.dataset.vocabulary,
            self.parameters,
            self.losses,
            self.lr[:: len(self.seeds)].tolist(),
            self.seeds,
            torch.stack([g.get_state() for g in self.generators]),
        )

    def results(self) -> list[Result]:
        """Sorted by validation loss, those that diverged last."""
        results, dataset = [], self.dataset
        for m, lr in enumerate(self.lr.tolist()):
            seed, losses = self.seeds[m % len(self.seeds)], self.losses[m]
            model = calibrate(MLPParameters(*(p[m] for p in self.parameters)), dataset.train)
            val_loss, last = model.loss(dataset.val), losses[-training.RECENT :].mean().item()
            bad = [*losses.isfinite().logical_not().nonzero()[:, 0].tolist(), len(losses)][0]
            if bad == len(losses) and math.isfinite(val_loss):
                results.append(Result(lr, seed, val_loss, last, None))
            else:
                results.append(Result(lr, seed, None, None, bad))
        return sorted(results, key=lambda r: (r.val_loss is None, r.val_loss, r.lr, r.seed))


def start(
    settings: Settings,
    lr: list[float],
    seeds: list[int],
    engine: str,
    data_option: str | None,
    dataset: Dataset,
) -> Models:
    """A network for each learning rate and seed, each as `train --lr --seed` starts it."""
    device = dataset.train.x.device
    drawn = [
        initial_parameters(dataclasses.replace(settings, seed=s), len(dataset.vocabulary), device)
        for s in seeds
    ]
    of_seeds = [torch.stack(tensors) for tensors in zip(*(p for p, _ in drawn), strict=True)]
    parameters = MLPParameters(*(p.repeat(len(lr), *[1] * (p.dim() - 1)) for p in of_seeds))
    if engine == "auto":
        engine = engines.fastest(parameters, dataset.train.x, settings.batch)
    return Models(
        settings,
        engine,
        data_option,
        dataset,
        _of_models(lr, seeds),
        seeds,
        parameters,
        [g for _, g in drawn],
        torch.empty(len(lr) * len(seeds), 0),
    )


def resumed(saved: SweepCheckpoint, data_option: str | None, dataset: Dataset) -> Models:
    """The networks where they were saved."""
    return Models(
        saved.settings,
        saved.engine,
        data_option,
        dataset,
        _of_models(saved.lr, saved.seeds),
        saved.seeds,
        saved.parameters,
        [generator(state) for state in saved.generators],
        saved.losses,
    )


def _of_models(lr: list[float], seeds: list[int]) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64).repeat_interleave(len(seeds))


def train(models: Models, folder: Path) -> training.Outcome:
    """Trains until the last step, or until Ctrl-C; saves a checkpoint now and then and at the end.

    Raises InputError where the engine cannot run, and where no network's loss is a finite number
    any more; then nothing is left in the folder.
    """
    s, split, first = models.settings, models.dataset.train, models.step
    rates = models.lr.tolist()
    both = torch.tensor([rates, [tenth(rate) for rate in rates]], dtype=torch.float32)
    lr, final_lr = both.to(split.x.device)

    blocks: list[Tensor] = []  # the losses that models.losses has not yet
    step, saved = first, time.perf_counter()
    finite = models.losses.isfinite().all(1)  # networks whose every loss was

    def draw(generator: torch.Generator, out: Tensor) -> None:
        training.minibatches(generator, len(split), len(out), s.batch, out)

    def take(count: int) -> Tensor:
        nonlocal step, finite, saved
        streams = torch.empty(len(models.generators), count, s.batch, dtype=torch.int64)
        # Side by side: at 10 to 20 ns a number, those of many seeds take longer than a GPU's steps.
        list(threads.map(draw, models.generators, streams))
        late = step >= s.steps // 2
        blocks.append(steps(streams.to(split.x.device), final_lr if late else lr))
        bad = blocks[-1].isfinite().logical_not()
        if bad[finite].any(1).all():
            raise all_diverged(models, step + int(bad[finite].int().argmax(1).max()), folder)
        finite &= ~bad.any(1)
        step += count
        shown = blocks[-1].nanmean(0)
        if time.perf_counter() - saved > training.SAVE_SECONDS:
            save()
            saved = time.perf_counter()
        return shown

    def save() -> None:
        models.losses = torch.cat((models.losses, *blocks), 1)
        blocks.clear()
        models.checkpoint().save(folder)

    with (
        processes.trainer(models.engine, models.parameters, split.x, split.y, s) as steps,
        ThreadPoolExecutor(torch.get_num_threads()) as threads,
    ):
        saved = time.perf_counter()
        recent = models.losses[:, -training.RECENT :].nanmean(0)
        interrupted, seconds = training.take_blocks(take, save, first, s, len(models), recent)
    return training.Outcome.of(interrupted, step - first, seconds)


def all_diverged(models: Models, step: int, folder: Path) -> InputError:
    """What to say of a sweep whose last network to go diverged at that step; its checkpoint, from
    which it would do so again, is removed."""
    (folder / SWEEP_FILE).unlink(missing_ok=True)
    return InputError(
        "the loss of every network is no longer a finite number, of the last one at step "
        f"{step}; try a smaller --lr than {models.lr.min():g}"
    )


def table(results: list[Result]) -> str:
    """A line a network, with a heading."""
    lines = [f"{'':>4s}  {'lr':>8s}  {'seed':>10s}  {'validation':>10s}  {'last 1000':>10s}"]
    for rank, r in enumerate(results, 1):
        losses = f"no longer a number at step {r.diverged_at}"
        if r.val_loss is not None:
            losses = f"{r.val_loss:>10.4f}  {r.last_loss:>10.4f}"
        lines.append(f"{rank:>4d}  {r.lr:>8g}  {r.seed:>10d}  {losses}")
    return "\n".join(lines)
