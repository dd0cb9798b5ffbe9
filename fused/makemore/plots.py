"""The pictures of a run and of a sweep."""

import warnings
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from fused.makemore.sweep import Result


def loss_curve(losses: Tensor, path: Path) -> None:
    """The training loss (steps,), averaged over windows so that the trend shows, as PNG."""
    steps, whole, window = _windows(losses)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, whole.numpy())
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} step(s)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _windows(losses: Tensor) -> tuple[range, Tensor, int]:
    """Losses (..., steps) averaged over 200 windows or fewer: (steps, means, window)."""
    steps = losses.shape[-1]
    window = max(1, steps // 200)
    means = losses[..., : steps // window * window].unflatten(-1, (-1, window)).mean(-1)
    return range(window, steps + 1, window), means, window


def logits_gradient(dlogits: Tensor, targets: Tensor, vocabulary: str, path: Path) -> None:
    """dlogits (n, V) of one minibatch as PNG: each row pulls its target up and the rest down."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    bound = float(dlogits.abs().max())
    image = axes.imshow(dlogits.cpu().numpy(), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    axes.set(
        xlabel="character",
        ylabel="example and its target",
        title="dlogits = (softmax(logits) - onehot(target)) / n",
    )
    if max(dlogits.shape) <= 64:  # else the labels would cover one another
        axes.set_xticks(range(len(vocabulary)), list(vocabulary))
        axes.set_yticks(range(len(targets)), [vocabulary[int(t)] for t in targets])
    figure.colorbar(image)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # then it draws a box
        figure.savefig(path, dpi=120)


def sweep_losses(losses: Tensor, lr: Tensor, path: Path) -> None:
    """Training losses (models, steps): of each learning rate the mean over seeds, and the range."""
    steps, means, window = _windows(losses)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for rate in lr.unique():
        curves = means[(lr == rate) & means.isfinite().all(1)]
        if len(curves) == 0:
            continue
        (line,) = axes.plot(steps, curves.mean(0).numpy(), label=f"lr {float(rate):g}")
        low, high = curves.min(0).values.numpy(), curves.max(0).values.numpy()
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} step(s)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def sweep_validation(results: list[Result], path: Path) -> None:
    """Validation loss over learning rate: every network, and the mean over seeds."""
    points = [(r.lr, r.val_loss) for r in results if r.val_loss is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([lr for lr, _ in points], [loss for _, loss in points], alpha=0.5)
    rates = sorted({lr for lr, _ in points})
    of_rate = [[loss for lr, loss in points if lr == rate] for rate in rates]
    axes.plot(rates, [sum(losses) / len(losses) for losses in of_rate])
    axes.set(xlabel="learning rate", ylabel="validation loss")
    if rates and rates[0] > 0:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
