"""The two pictures of a run."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def loss_curve(losses: Tensor, path: Path) -> None:
    """The training loss (steps,), averaged over windows so that the trend shows, as PNG."""
    window = max(1, len(losses) // 200)
    whole = losses[: len(losses) // window * window].view(-1, window).mean(1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(window, len(losses) + 1, window), whole.numpy())
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} step(s)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


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
    figure.savefig(path, dpi=120)
