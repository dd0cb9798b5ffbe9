"""A small GPT, trained with and without the logits: the same losses, and the memory of both.

    python -m bench.gpt [--steps N] [--out FILE.json]

It learns the text of Python's own reference manual (`pydoc_data.topics`), one word or mark a token,
so that the vocabulary is large beside the network, as a language model's is.
"""

import argparse
import json
import re
import time
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from bench import machine, options
from bench.cases import Phase
from bench.measure import peak_bytes

_CONTEXT, _WIDTH, _HEADS, _LAYERS, _BATCH, _LR = 64, 128, 4, 2, 32, 1e-3


class Block(nn.Module):
    """Attention to what came before, then two layers for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.layers = nn.Sequential(
            nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        heads = self.qkv(self.norm1(x)).view(n, t, 3, _HEADS, c // _HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, c))
        return x + self.layers(self.norm2(x))


class GPT(nn.Module):
    """Tokens (n, t) to features (n * t, width); its embedding is the output layer too."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, _WIDTH), nn.Embedding(_CONTEXT, _WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)


def unfused_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(model(x), model.tokens.weight), y.flatten())


def fused_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    return fused.linear_cross_entropy(model(x), model.tokens.weight, y.flatten())


def corpus() -> tuple[Tensor, int]:
    """The manual as numbers of tokens, and how many there are to choose from."""
    words = re.findall(r"\w+|[^\w\s]|\n", "\n".join(topics[name] for name in sorted(topics)))
    vocabulary = {word: i for i, word in enumerate(sorted(set(words)))}
    return torch.tensor([vocabulary[word] for word in words]), len(vocabulary)


def train(loss: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Losses of `steps` steps of Adam from one start on the same batches; memory of the last."""
    text, size = corpus()
    torch.manual_seed(0)
    model = GPT(size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), _LR)
    draws = torch.Generator().manual_seed(0)
    losses, began = [], time.perf_counter()
    for _ in range(steps):
        starts = torch.randint(0, len(text) - _CONTEXT - 1, (_BATCH, 1), generator=draws)
        block = text[starts + torch.arange(_CONTEXT + 1)].to(device)
        optimizer.zero_grad()
        value = loss(model, block[:, :-1], block[:, 1:])
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    found = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - began

    def backward(_: Any) -> None:
        loss(model, block[:, :-1], block[:, 1:]).backward()

    optimizer.zero_grad()
    peak = peak_bytes(Phase(backward), device)
    return {"losses": found, "seconds": seconds, "peak_bytes": peak, "vocabulary": size}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpt", description=__doc__)
    parser.add_argument("--steps", type=options.count, metavar="N", default=200)
    parser.add_argument(
        "--out", type=options.file, metavar="FILE.json", help="a JSON of everything"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {"unfused": unfused_loss, "fused": fused_loss}
    found = {name: train(loss, arguments.steps, device) for name, loss in runs.items()}
    a, b = found["unfused"], found["fused"]
    print(f"{a['vocabulary']:,} words, {_BATCH * _CONTEXT:,} tokens a step")
    print(f"{'step':>6s} {'unfused':>9s} {'fused':>9s}")
    for step in range(0, arguments.steps, max(1, arguments.steps // 5)):
        print(f"{step:6d} {a['losses'][step]:9.4f} {b['losses'][step]:9.4f}")
    apart = max(abs(p - q) for p, q in zip(a["losses"], b["losses"], strict=True))
    print(f"largest difference of two losses: {apart:.1e}")
    for name, run in found.items():
        print(f"{name:8s} {run['peak_bytes'] / 2**20:7.1f} MiB a step, {run['seconds']:.1f} s")
    if arguments.out:
        result = {"machine": machine.describe(device), "gpt": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
