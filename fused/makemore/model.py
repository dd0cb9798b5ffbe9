"""The network outside training: its start, its calibration, its losses, its samples."""

from dataclasses import asdict, dataclass
from decimal import Decimal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.makemore.data import TERMINATOR, Split
from fused.mlp_train import MLPParameters

EPS = 1e-5  # of batch norm
_ROWS = 65536  # examples at a time over a whole split: bounds the memory, not the result
_LONGEST = 1000  # characters of a sampled name; an untrained model may not find the terminator


def tenth(lr: float) -> float:
    """A learning rate from half way, as one would write it: 0.007 of 0.07, not 0.07 / 10."""
    return float(Decimal(repr(lr)) / 10)


@dataclass(frozen=True)
class Settings:
    """What a run is: with the data, it determines every parameter of the trained network."""

    context: int = 3
    embedding: int = 10
    hidden: int = 200
    batch: int = 32
    steps: int = 200_000
    lr: float = 0.1
    final_lr: float = 0.01  # from half way
    seed: int = 2147483647

    def asdict(self) -> dict[str, int | float]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """A network to evaluate and sample: parameters, and batch norm statistics of the data."""

    parameters: MLPParameters
    mean: Tensor  # (1, H) of hprebn over the whole training set
    var: Tensor  # (1, H), unbiased

    def logits(self, x: Tensor) -> Tensor:
        """Scores (N, V) of the next character after contexts x (N, T)."""
        p = self.parameters
        scale = p.bngain * (self.var + EPS) ** -0.5
        return torch.tanh(scale * (_preactivation(p, x) - self.mean) + p.bnbias) @ p.W2 + p.b2

    @torch.no_grad()
    def loss(self, split: Split) -> float:
        """Mean cross-entropy over a split."""
        total = sum(
            F.cross_entropy(self.logits(x), y, reduction="sum").item()
            for x, y in zip(split.x.split(_ROWS), split.y.split(_ROWS), strict=True)
        )
        return total / len(split)

    @torch.no_grad()
    def sample(self, vocabulary: str, context: int, num: int, seed: int) -> list[str]:
        """`num` names, one character at a time; the first names do not depend on `num`."""
        generator = torch.Generator().manual_seed(seed)
        device = self.mean.device
        names = []
        for _ in range(num):
            name, window = "", [0] * context
            while len(name) < _LONGEST:
                logits = self.logits(torch.tensor([window], device=device)).cpu()
                draw = torch.multinomial(F.softmax(logits, dim=1), 1, generator=generator)
                character = int(draw)
                if vocabulary[character] == TERMINATOR:
                    break
                name += vocabulary[character]
                window = [*window[1:], character]
            names.append(name)
        return names


def parameter_shapes(settings: Settings, vocabulary_size: int) -> list[tuple[int, ...]]:
    """The shapes of `MLPParameters`, in its order."""
    s, v = settings, vocabulary_size
    return [
        (v, s.embedding),
        (s.context * s.embedding, s.hidden),
        (s.hidden,),
        (s.hidden, v),
        (v,),
        (1, s.hidden),
        (1, s.hidden),
    ]


def initial_parameters(
    settings: Settings, vocabulary_size: int, device: torch.device
) -> tuple[MLPParameters, torch.Generator]:
    """The notebook's initialisation, and the generator that goes on to draw the minibatches.

    The notebook draws bngain and bnbias from the unseeded global generator. Here they have a
    seeded one of their own, so that the minibatches are the notebook's.
    """
    g = torch.Generator().manual_seed(settings.seed)
    own = torch.Generator().manual_seed(settings.seed + 1)
    shapes = parameter_shapes(settings, vocabulary_size)
    parameters = MLPParameters(
        C=torch.randn(shapes[0], generator=g),
        W1=torch.randn(shapes[1], generator=g) * (5 / 3) / shapes[1][0] ** 0.5,
        b1=torch.randn(shapes[2], generator=g) * 0.1,
        W2=torch.randn(shapes[3], generator=g) * 0.1,
        b2=torch.randn(shapes[4], generator=g) * 0.1,
        bngain=torch.randn(shapes[5], generator=own) * 0.1 + 1.0,
        bnbias=torch.randn(shapes[6], generator=own) * 0.1,
    )
    return MLPParameters(*(p.to(device) for p in parameters)), g


@torch.no_grad()
def calibrate(parameters: MLPParameters, train: Split) -> Model:
    """The batch norm statistics over the whole training set, in two passes."""
    n = len(train)
    chunks = train.x.split(_ROWS)
    mean = torch.zeros_like(parameters.bngain, dtype=torch.float64)
    for x in chunks:
        mean += _preactivation(parameters, x).sum(0, dtype=torch.float64) / n
    mean = mean.to(parameters.bngain.dtype)
    var = torch.zeros_like(parameters.bngain, dtype=torch.float64)
    for x in chunks:
        d = _preactivation(parameters, x).sub_(mean)
        var += d.square_().sum(0, dtype=torch.float64) / (n - 1)
    return Model(parameters, mean, var.to(mean.dtype))


def _preactivation(p: MLPParameters, x: Tensor) -> Tensor:
    return torch.addmm(p.b1, p.C[x].flatten(1), p.W1)  # hprebn, (N, H)
