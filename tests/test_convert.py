"""Models converted in place: the same numbers, the same state, and a word on what changed."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused


class Block(nn.Module):
    """Two convolutions and a way around them, as in a residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.SiLU(),
        Block(8, 16, 2), Block(16, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.GELU(),
        nn.Linear(16, 10),
    )  # fmt: skip


def train(model: nn.Module, criterion: nn.Module, steps: int, device: torch.device) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last)
        target = torch.randint(10, (8,), generator=generator)
        loss = criterion(model(x.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Not in TF32, whose rounding makes 1e-3 of a difference in the last place."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.filterwarnings("ignore")  # importing an optimizer imports the compiler
def test_resnet_trains_the_same_converted(implementation, device, exact_convolutions) -> None:
    theirs, criterion = resnet().to(device), nn.CrossEntropyLoss()
    ours, our_criterion = copy.deepcopy(theirs), nn.CrossEntropyLoss()
    assert len(fused.convert(ours)) == 8
    assert fused.convert(our_criterion) == ["the model itself: CrossEntropyLoss"]
    expected = train(theirs, criterion, 20, device)
    losses = train(ours, our_criterion, 20, device)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    x = torch.randn(4, 3, 8, 8, device=device)
    trained = copy.deepcopy(ours.eval().state_dict())
    with torch.no_grad():
        ours.load_state_dict(theirs.eval().state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        ours.load_state_dict(trained)
        theirs.load_state_dict(trained)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_says_what_changed() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Sequential(nn.BatchNorm1d(4))
    )
    assert fused.convert(model) == ["1: BatchNorm1d with tanh from 2", "3.0: BatchNorm1d"]
    assert type(model[1]) is fused.BatchNorm1d and model[1].activation == "tanh"
    assert type(model[2]) is nn.Identity
    assert fused.convert(model) == []


def test_every_kind_of_module() -> None:
    kinds: list[Any] = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
    model = nn.Sequential(*(kind(4) for kind in kinds), nn.CrossEntropyLoss())
    found = [line.split(": ")[1] for line in fused.convert(model)]
    assert found == [type(module).__name__ for module in model]
    assert all(type(module).__module__.startswith("fused.") for module in model)
    pair = nn.Sequential(nn.SyncBatchNorm(4), nn.SiLU())
    assert fused.convert(pair) == ["0: SyncBatchNorm with silu from 1"]


def test_without_activations() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh())
    assert fused.convert(model, activations=False) == ["0: BatchNorm1d"]
    assert type(model[1]) is nn.Tanh and model[0].activation is None


def test_keeps_parameters_hooks_mode_and_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    parameters, norm = list(model.parameters()), model[1]
    fused.convert(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model[1] is norm and not norm.training
    assert (norm.eps, norm.momentum) == (1e-3, 0.3)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [1]


class OwnNorm(nn.BatchNorm1d):
    pass


class OwnForward(fused.BatchNorm1d):
    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input, residual) + 1


class OwnSequence(nn.Sequential):
    pass


def test_leaves_alone_what_it_does_not_know() -> None:
    shared = nn.BatchNorm1d(4)
    hooked = nn.Tanh()
    hooked.register_forward_hook(lambda *_: None)
    before = nn.Tanh()
    before.register_forward_pre_hook(lambda *_: None)
    watched, watched_too = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    watched.register_full_backward_pre_hook(lambda *_: None)
    watched_too.register_full_backward_hook(lambda *_: None)
    own_norm, own_tanh = nn.BatchNorm1d(4), nn.Tanh()
    for module in (own_norm, own_tanh):
        module.__dict__["forward"] = lambda x: x  # as wrapping libraries do
    cases = {
        "a subclass": (OwnNorm(4), nn.Tanh()),
        "a subclass of ours": (OwnForward(4), nn.Tanh()),
        "a norm with a forward of its own": (own_norm, nn.Tanh()),
        "an activation with a forward of its own": (nn.BatchNorm1d(4), own_tanh),
        "approximate gelu": (nn.BatchNorm1d(4), nn.GELU(approximate="tanh")),
        "a hook": (nn.BatchNorm1d(4), hooked),
        "a hook before": (nn.BatchNorm1d(4), before),
        "a hook of the gradient": (watched, nn.Tanh()),
        "another hook of the gradient": (watched_too, nn.Tanh()),
        "another activation": (nn.BatchNorm1d(4), nn.ELU()),
    }
    for name, (norm, activation) in cases.items():
        model = nn.Sequential(norm, activation)
        fused.convert(model)
        assert model[1] is activation, name
        assert getattr(norm, "activation", None) is None, name
    two = nn.Sequential(fused.BatchNorm1d(4, activation="relu"), nn.Tanh())
    assert fused.convert(two) == [] and two[0].activation == "relu"
    branch = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    for twice in (
        nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Tanh())),
        nn.Sequential(branch, nn.Linear(4, 4), branch),
    ):
        norm = twice[0][0]
        fused.convert(twice)
        assert type(norm) is fused.BatchNorm1d and norm.activation is None
    own = OwnSequence(nn.BatchNorm1d(4), nn.ReLU())
    fused.convert(own)
    assert type(own[0]) is fused.BatchNorm1d and type(own[1]) is nn.ReLU
    assert type(OwnNorm(4)) is OwnNorm


def test_converted_modules_compute_what_they_did() -> None:
    for activation in (nn.Tanh(), nn.ReLU(), nn.GELU(), nn.SiLU()):
        theirs = nn.Sequential(nn.BatchNorm1d(4), activation)
        ours = copy.deepcopy(theirs)
        kind = type(activation).__name__.lower()
        assert fused.convert(ours) == [f"0: BatchNorm1d with {kind} from 1"]
        x = torch.randn(9, 4)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        assert not any(module.training for module in ours.modules())
        fused.convert(evaluated := copy.deepcopy(theirs))
        assert not any(module.training for module in evaluated.modules())


@pytest.mark.parametrize("between", [nn.AvgPool1d(2), nn.Linear(4, 4), nn.Dropout(0.5)], ids=str)
def test_a_module_that_occurs_twice_stands_between(between) -> None:
    """The second time it has no name of its own, but it has a place."""
    theirs = nn.Sequential(nn.Conv1d(3, 4, 1), between, nn.BatchNorm1d(4), between, nn.Tanh())
    ours = copy.deepcopy(theirs)
    assert fused.convert(ours) == ["2: BatchNorm1d"]
    assert type(ours[4]) is nn.Tanh
    x = torch.randn(5, 3, 4)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        found.append(model(x))
    torch.testing.assert_close(*found)


def test_an_activation_that_occurs_twice() -> None:
    """It keeps nothing: each place is its own, and a third, behind no batch norm, stays."""
    tanh = nn.Tanh()
    theirs = nn.Sequential(
        nn.BatchNorm1d(4), tanh, nn.Linear(4, 4), tanh, nn.BatchNorm1d(4), tanh, nn.Linear(4, 4)
    )
    ours = copy.deepcopy(theirs)
    assert fused.convert(ours) == [
        "0: BatchNorm1d with tanh from 1",
        "4: BatchNorm1d with tanh from 5",
    ]
    assert type(ours[1]) is type(ours[5]) is nn.Identity and type(ours[3]) is nn.Tanh
    x = torch.randn(9, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_batch_norm_that_occurs_twice_in_a_sequence() -> None:
    norm = nn.BatchNorm1d(4)
    theirs = nn.Sequential(norm, nn.Tanh(), nn.Linear(4, 4), norm, nn.ReLU())
    ours = copy.deepcopy(theirs)
    assert fused.convert(ours) == ["0: BatchNorm1d"]
    x = torch.randn(9, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_linear_loss_with_options_is_left_alone() -> None:
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("torch has it from 2.13 on")
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    model = nn.ModuleList(
        nn.LinearCrossEntropyLoss(4, 5, options=options)
        for options in (None, LinearCrossEntropyOptions())
    )
    assert fused.convert(model) == ["0: LinearCrossEntropyLoss"]
    assert type(model[1]) is nn.LinearCrossEntropyLoss
