"""The command as a user runs it: what it prints, what it leaves behind, how it ends."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fused.makemore import checkpoint, cli, data, model, plots, training
from fused.makemore.cli import main
from fused.makemore.engines import ENGINES

CPU = torch.device("cpu")
FAST = ["--hidden", "20", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command."""
    try:
        status = main(list(arguments))
    except SystemExit as end:
        assert isinstance(end.code, int)
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def trained(tmp_path, capsys):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, "train", *FAST, "--steps", "60", "--out", str(folder))
    assert status == 0
    return folder, out


def test_check_prints_26_exact(capsys) -> None:
    status, out, _ = run(capsys, "check", "--device", "cpu")
    assert status == 0
    assert out.count("| exact: True  | approximate: True  | maxdiff: 0\n") == 26
    assert "26 of 26 exact" in out
    assert "approximate: False" not in out


def test_check_fails_where_a_gradient_is_wrong(capsys, monkeypatch) -> None:
    from fused.reference import mlp

    right = mlp.backward

    def wrong(*arguments):
        return {k: g * 1.01 if k == "W1" else g for k, g in right(*arguments).items()}

    monkeypatch.setattr(mlp, "backward", wrong)
    status, out, _ = run(capsys, "check", "--device", "cpu")
    assert status == 1
    assert "25 of 26 exact, 25 approximately equal" in out


def test_train_leaves_a_whole_run(trained) -> None:
    folder, out = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    trained_model, dataset = checkpoint.load(folder, CPU).model, data.load(None, 3, CPU)
    for name in ("train", "val", "test"):
        loss = metrics[f"{name}_loss"]
        assert 2.0 < loss < 4.0 and loss == trained_model.loss(getattr(dataset, name))
        assert f"{loss:.4f}" in out
    assert metrics["steps"] == 60 and metrics["steps_per_second"] > 0
    assert metrics["engine"] in ("numba", "manual") and metrics["device"] == "cpu"
    assert f"engine {metrics['engine']}, device cpu" in out
    assert metrics["seed"] == 2147483647 and metrics["settings"]["hidden"] == 20
    assert metrics["versions"]["torch"] == torch.__version__
    for picture in ("loss.png", "dlogits.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert len(out.rstrip().split("\n\n")[-1].splitlines()) == 20  # sampled names


@pytest.mark.parametrize("engine", ["manual", "autograd", "chunked", "fused"])
def test_every_engine_trains(engine, tmp_path, capsys, trained) -> None:
    folder = tmp_path / engine
    arguments = ["--steps", "60", "--engine", engine, "--out", str(folder)]
    assert run(capsys, "train", *FAST, *arguments)[0] == 0
    ours, fastest = (
        json.loads((f / "metrics.json").read_text())["val_loss"] for f in (folder, trained[0])
    )
    assert ours == pytest.approx(fastest, abs=1e-3)


def test_sample(trained, capsys) -> None:
    folder, out = trained
    status, five, _ = run(capsys, "sample", str(folder), "--num", "5", "--device", "cpu")
    assert status == 0 and len(five.splitlines()) == 5
    of_train = ["--seed", str(2147483647 + 10)]
    _, first, _ = run(capsys, "sample", str(folder), "--num", "5", *of_train, "--device", "cpu")
    assert out.rstrip().split("\n\n")[-1].startswith(first.rstrip()) and first != five
    _, again, _ = run(capsys, "sample", str(folder), "--num", "5", "--device", "cpu")
    assert again == five
    _, other, _ = run(capsys, "sample", str(folder), "--num", "5", "--seed", "1")
    _, again, _ = run(capsys, "sample", str(folder / "checkpoint.pt"), "--num", "5", "--seed", "1")
    assert other == again != five
    _, zero, _ = run(capsys, "sample", str(folder), "--num", "5", "--seed", "0", "--device", "cpu")
    assert zero not in (five, other)


def test_settings_may_be_0(tmp_path, capsys) -> None:
    """Such a run can be resumed: its checkpoint is no damaged one."""
    folder = tmp_path / "run"
    options = ["--steps", "3", "--seed", "0", "--lr", "0", "--final-lr", "0", "--engine", "manual"]
    assert run(capsys, "train", *FAST, *options, "--out", str(folder))[0] == 0
    saved = checkpoint.load(folder, CPU)
    assert (saved.settings.seed, saved.settings.lr, saved.settings.final_lr) == (0, 0.0, 0.0)
    start, _ = model.initial_parameters(saved.settings, len(saved.vocabulary), CPU)
    for ours, theirs in zip(saved.model.parameters, start, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_picture_is_the_gradient_of_the_first_minibatch(tmp_path, capsys, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "logits_gradient", lambda *arguments: drawn.append(arguments[:2]))
    options = ["--steps", "3", "--batch", "8", "--engine", "manual", "--out", str(tmp_path / "run")]
    assert run(capsys, "train", *FAST, *options)[0] == 0
    ((dlogits, targets),) = drawn
    split = data.load(None, 3, CPU).train
    logits = checkpoint.load(tmp_path / "run", CPU).model.logits(split.x[:8]).requires_grad_()
    F.cross_entropy(logits, split.y[:8]).backward()
    torch.testing.assert_close(dlogits, logits.grad)
    assert targets.tolist() == split.y[:8].tolist()


@pytest.mark.parametrize("error, status", [(MemoryError(), 2), (KeyboardInterrupt(), 130)])
def test_how_it_ends_before_training(error, status, tmp_path, capsys, monkeypatch) -> None:
    def end(*_):
        raise error

    monkeypatch.setattr(model, "initial_parameters", end)
    found = run(capsys, "train", *FAST, "--out", str(tmp_path / "run"))
    assert found[0] == status and ("not enough memory" in found[2]) == (status == 2)


def test_checkpoints_are_saved_now_and_then(tmp_path, capsys, monkeypatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", lambda run, folder: steps.append(run.step))
    options = ["--steps", "40", "--engine", "manual", "--out", str(tmp_path / "run")]
    assert run(capsys, "train", *FAST, *options)[0] == 0
    assert steps[0] == 10 and steps[-1] == 40 and len(steps) > 2


def test_the_first_interruption_is_an_event_and_the_second_interrupts(interruptible) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with training._interruption() as event:
            assert not event.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            assert event.is_set()
            os.kill(os.getpid(), signal.SIGINT)
    with training._interruption():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_blocks_of_steps(monkeypatch, capsys) -> None:
    """None across the change of the rate, none larger than memory is for, from any step on."""
    monkeypatch.setattr(training, "_BLOCK_NUMBERS", 32 * 4 * 100)
    settings = model.Settings(steps=1000)
    for first, half in ((0, 500), (600, 1000)):
        blocks: list[int] = []

        def take(steps: int, blocks: list[int] = blocks) -> torch.Tensor:
            blocks.append(steps)
            return torch.zeros(steps)

        assert not training.take_blocks(take, lambda: None, first, settings, 1, torch.empty(0))[0]
        assert sum(blocks) == 1000 - first and max(blocks) == 100
        assert half - first in torch.tensor(blocks).cumsum(0)


def wait_for_step(process: subprocess.Popen, folder) -> None:
    deadline = time.monotonic() + 60
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # of two seconds of steps, on a fast machine
    assert process.poll() is None, process.communicate()


def test_interrupted_and_resumed_is_the_uninterrupted_run(tmp_path, interruptible) -> None:
    command = [sys.executable, "-m", "fused.makemore", "train", *FAST]
    options = ["--steps", "60000", "--hidden", "10", "--batch", "8", "--engine", "manual"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, *options, "--out", whole], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, *options, "--out", parts], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_step(process, parts)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"continue with: fused-makemore train --resume {parts}".encode() in out
    cpu = torch.device("cpu")
    step = checkpoint.load(parts, cpu).step
    assert 0 < step < 60000
    subprocess.run([*command[:4], "--resume", parts], check=True, capture_output=True)
    ours, expected = (checkpoint.load(folder, cpu) for folder in (parts, whole))
    assert ours.step == expected.step == 60000
    for a, b in zip(ours.model.parameters, expected.model.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(ours.losses, expected.losses)


@contextmanager
def interrupted():
    """Ctrl-C during the first block, in the place of training's `_interruption`"""
    looks = iter((False, True))
    yield SimpleNamespace(is_set=lambda: next(looks))


@contextmanager
def ready():
    """Ctrl-C before it"""
    yield SimpleNamespace(is_set=lambda: True)


def tiny(engine: str, tmp_path) -> list[str]:
    """A run that Triton's interpreter can take steps of; on the GPU, where there is one"""
    if engine in ("persistent", "graph", "numba"):
        pytest.importorskip("numba" if engine == "numba" else "triton")
    where = "auto" if engine in ("persistent", "graph") else "cpu"
    data = ["--data", words(tmp_path, b"ab\nba\nb\n" * 10), "--batch", "4", "--hidden", "10"]
    return [*data, "--context", "2", "--device", where, "--engine", engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_resumes_exactly(engine, tmp_path, capsys, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*tiny(engine, tmp_path), "--steps", "7"]
    where = options[options.index("--device") :][:2]
    assert run(capsys, "train", *options, "--out", str(whole))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(training, "_interruption", interrupted)
        assert run(capsys, "train", *options, "--out", str(parts))[0] == 130
    cpu = torch.device("cpu")
    assert checkpoint.load(parts, cpu).step == 3  # where the learning rate changes
    assert run(capsys, "train", "--resume", str(parts), *where)[0] == 0
    ours, expected = (checkpoint.load(folder, cpu) for folder in (parts, whole))
    assert ours.engine == engine
    for a, b in zip(ours.model.parameters, expected.model.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(ours.losses, expected.losses, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_stops_where_the_loss_is_no_number(engine, tmp_path, capsys) -> None:
    options = [*tiny(engine, tmp_path), "--steps", "8", "--out", str(tmp_path / "r")]
    status, _, err = run(capsys, "train", *options, "--lr", "1e38")
    assert status == 2
    assert re.search(r"no longer a finite number at step [1-4]; try a smaller --lr", err)
    assert not (tmp_path / "r").exists()


def test_the_step_whose_loss_is_no_number(tmp_path, capsys, monkeypatch) -> None:
    def losses(x, y, index, lr):
        return torch.zeros(len(index)).index_fill_(0, torch.tensor(2), torch.nan)

    engine = SimpleNamespace(run=losses)
    monkeypatch.setattr(training.engines, "start", lambda *_: engine)
    status, _, err = run(capsys, "train", *FAST, "--steps", "8", "--out", str(tmp_path / "r"))
    assert status == 2 and "no longer a finite number at step 2;" in err


def test_numbers_that_the_last_step_loses(tmp_path, capsys) -> None:
    """No loss shows them: there is no checkpoint of them, and none is sorted by them."""
    options = [*tiny("manual", tmp_path), "--steps", "1"]
    folder = tmp_path / "run"
    rates = ["--lr", "1e38", "--final-lr", "1e38"]
    status, _, err = run(capsys, "train", *options, *rates, "--out", str(folder))
    assert status == 2 and "finite number at step 1" in err and not folder.exists()
    options += ["--seed", "1", "--out", str(folder)]
    status, _, err = run(capsys, "sweep", *options, "--lr", "1e38")
    assert status == 2 and "of the last one at step 1;" in err and not folder.exists()
    assert run(capsys, "sweep", *options, "--lr", "1e38,0.1")[0] == 0
    results = json.loads((folder / "sweep.json").read_text())["results"]
    assert [(r["lr"], r["diverged_at"]) for r in results] == [(0.1, None), (1e38, 1)]


@pytest.mark.parametrize("engine", ["persistent", "graph"])
def test_a_sweep_by_the_kernels(engine, tmp_path, capsys) -> None:
    losses = []
    for name in (engine, "manual"):
        out = tmp_path / name
        options = [*tiny(name, tmp_path), "--steps", "2", "--seed", "3:5", "--out", str(out)]
        assert run(capsys, "sweep", *options, "--lr", "0.1,0.3")[0] == 0
        content = json.loads((out / "sweep.json").read_text())
        assert content["engine"] == name
        losses.append([(r["lr"], r["seed"], r["val_loss"]) for r in content["results"]])
    assert [ours[:2] for ours in losses[0]] == [theirs[:2] for theirs in losses[1]]
    for ours, theirs in zip(*losses, strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


def sweep_parts(engine: str, tmp_path, capsys, monkeypatch) -> tuple[list[str], str]:
    """The options of a sweep that Ctrl-C ended after 3 of its 7 steps; what it printed. It is in
    tmp_path / "parts"; the second of its three learning rates diverges."""
    options = [*tiny(engine, tmp_path), "--steps", "7", "--lr", "0.1,1e30,0.3", "--seed", "3:5"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_interruption", interrupted)
        status, out, _ = run(capsys, "sweep", *options, "--out", str(tmp_path / "parts"))
    assert status == 130
    return options, out


@pytest.mark.parametrize("engine", ["persistent", "graph", "numba", "manual"])
def test_a_sweep_resumes_exactly(engine, tmp_path, capsys, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options, out = sweep_parts(engine, tmp_path, capsys, monkeypatch)
    end = f"\ninterrupted at step 3; continue with: fused-makemore sweep --resume {parts}\n"
    assert out.endswith(end)
    assert [path.name for path in parts.iterdir()] == ["sweep.pt"]
    status, expected, _ = run(capsys, "sweep", *options, "--out", str(whole))
    assert status == 0 and "steps 0 to 7," in expected
    where = options[options.index("--device") :][:2]
    status, ours, _ = run(capsys, "sweep", "--resume", str(parts), *where)
    assert status == 0 and f"engine {engine}," in ours and "steps 3 to 7," in ours
    assert ours.split("steps/s")[1] == expected.split("steps/s")[1]
    a, b = (json.loads((folder / "sweep.json").read_text()) for folder in (parts, whole))
    assert a["results"] == b["results"] and a["settings"] == b["settings"]
    assert [r["diverged_at"] is None for r in a["results"]] == [True] * 4 + [False] * 2
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    assert names == ["losses.png", "sweep.json", "validation.png"]
    for picture in ("losses.png", "validation.png"):
        assert (parts / picture).read_bytes() == (whole / picture).read_bytes()


def test_a_sweep_interrupted_after_its_last_step(tmp_path, capsys, monkeypatch) -> None:
    """During the evaluation: sweep.json is written last."""
    folder = tmp_path / "sweep"
    options = [*tiny("manual", tmp_path), "--steps", "7", "--seed", "3", "--out", str(folder)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plots, "sweep_validation", interrupt)
        assert run(capsys, "sweep", *options)[0] == 130
    status, out, _ = run(capsys, "sweep", "--resume", str(folder / "sweep.pt"), "--device", "cpu")
    assert status == 0 and "steps 7 to 7," in out
    assert len(json.loads((folder / "sweep.json").read_text())["results"]) == 3


def test_what_a_resumed_sweep_refuses(tmp_path, capsys, monkeypatch) -> None:
    parts = str(tmp_path / "parts")
    options, _ = sweep_parts("manual", tmp_path, capsys, monkeypatch)
    other = tmp_path / "other"
    other.mkdir()
    for given, message in {
        ("--hidden", "64"): f"--hidden 64: the sweep in {parts} has --hidden 10",
        ("--lr", "0.1"): f"--lr 0.1: the sweep in {parts} has --lr 0.1,1e+30,0.3",
        ("--lr", "1,2,3"): f"--lr 1.0,2.0,3.0: the sweep in {parts} has --lr 0.1,1e+30,0.3",
        ("--seed", "0:8"): f"--seed 0:8: the sweep in {parts} has --seed 3:5",
        ("--engine", "numba"): f"--engine numba: the sweep in {parts} has --engine manual",
        ("--data", words(other, b"c\n" * 20)): f"is not the data that the sweep in {parts} began",
        ("--out", parts): "--out: a resumed sweep stays in its folder",
    }.items():
        status, out, err = run(capsys, "sweep", "--resume", parts, *given)
        assert status == 2 and message in err and out == ""
    status, out, err = run(capsys, "sweep", *options, "--out", parts)
    assert status == 2 and "already holds a sweep; continue it with: fused-makemore sweep" in err
    status, _, err = run(capsys, "train", *options[:-4], "--out", parts)
    assert status == 2 and "already holds a sweep; continue it with: fused-makemore sweep" in err
    status, _, err = run(capsys, "train", "--resume", parts)
    assert status == 2 and "cannot read" in err
    assert err.endswith("; sweep.pt is there, which is for fused-makemore sweep --resume\n")
    same = [*options, "--engine", "auto"]
    assert run(capsys, "sweep", "--resume", parts, *same)[0] == 0
    status, _, err = run(capsys, "sweep", "--resume", parts)
    assert status == 2 and f"the sweep in {parts} is complete" in err


def damage_sweep(saved: dict, how: str) -> object:
    match how:
        case "a run":
            return saved | {"format": "fused-makemore checkpoint"}
        case "no rates":
            return saved | {"lr": []}
        case "no rate":
            return saved | {"lr": [0.1, float("nan"), 0.3]}
        case "a rate twice":
            return saved | {"lr": [0.1, 0.3, 0.3]}
        case "half a seed":
            return saved | {"seeds": [3, 4.5]}
        case "another seed":
            return saved | {"seeds": [3, 4, 5]}
        case "half a generator":
            return saved | {"generators": saved["generators"][:, :100]}
        case "one network":
            saved["parameters"]["W1"] = saved["parameters"]["W1"][:1]
            return saved
        case "fewer losses":
            return saved | {"losses": saved["losses"][1:]}
        case "an engine of train":
            return saved | {"engine": "chunked"}
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how, message",
    [
        ("a run", "is not a sweep of fused-makemore"),
        ("no rates", "is damaged: it has no lr"),
        ("no rate", "is damaged: its lr is nan"),
        ("a rate twice", "is damaged: it has a lr twice"),
        ("half a seed", "is damaged: its seed is 4.5"),
        ("another seed", "is damaged: it has 2 generators for 3 seeds"),
        ("half a generator", "is damaged: "),
        ("one network", "expected W1 of shape (6, 20, 10), as its settings say, in float32, got"),
        ("fewer losses", "expected losses of shape (6, 2)"),
        ("an engine of train", "is damaged: there is no engine 'chunked'"),
    ],
)
def test_other_sweeps(how, message, tmp_path, capsys, monkeypatch) -> None:
    sweep_parts("manual", tmp_path, capsys, monkeypatch)
    path = tmp_path / "parts" / "sweep.pt"
    torch.save(damage_sweep(torch.load(path, weights_only=True), how), path)
    status, out, err = run(capsys, "sweep", "--resume", str(tmp_path / "parts"))
    assert status == 2 and message in err and len(err.splitlines()) == 1 and out == ""


def test_a_resumed_sweep_that_diverges_leaves_nothing(tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "sweep"
    options = [*tiny("manual", tmp_path), "--seed", "3", "--lr", "1e38", "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_interruption", ready)
        assert run(capsys, "sweep", *options, "--steps", "70")[0] == 130
    assert (folder / "sweep.pt").exists()
    status, _, err = run(capsys, "sweep", "--resume", str(folder), "--device", "cpu")
    assert status == 2 and "no longer a finite number" in err and not any(folder.iterdir())


def test_a_sweep_interrupted_before_its_first_block(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(training, "_interruption", ready)
    folder = str(tmp_path / "sweep")
    options = [*tiny("manual", tmp_path), "--steps", "7", "--seed", "3"]
    status, out, _ = run(capsys, "sweep", *options, "--out", folder)
    assert status == 130 and "interrupted at step 0;" in out
    monkeypatch.undo()
    assert run(capsys, "sweep", "--resume", folder, "--device", "cpu")[0] == 0


@pytest.mark.parametrize("engine", ["persistent", "graph", "numba", "manual"])
def test_a_sweep_ends_where_no_network_has_a_number(engine, tmp_path, capsys) -> None:
    """Long before its last step; where one has, the others are in the table (`test_sweep`)."""
    options = [*tiny(engine, tmp_path), "--steps", "100000000", "--out", str(tmp_path / "s")]
    status, out, err = run(capsys, "sweep", *options, "--lr", "1e37,1e38", "--seed", "0:2")
    assert status == 2 and "4 networks (2 learning rates x 2 seeds)" in out
    assert re.search(r"of the last one at step [1-9]; try a smaller --lr than 1e\+37\n$", err)
    assert not (tmp_path / "s").exists()


def test_sweep(tmp_path, capsys) -> None:
    """Sorted, with the divergent ones last; each network is the one that `train` trains."""
    folder = tmp_path / "sweep"
    common = [*FAST, "--steps", "60"]
    arguments = ["--lr", "0.03,1e30,0.1", "--seed", "3:5", "--out", str(folder)]
    status, out, _ = run(capsys, "sweep", *common, *arguments)
    assert status == 0 and "6 networks (3 learning rates x 2 seeds), engine " in out
    content = json.loads((folder / "sweep.json").read_text())
    (rate,) = re.findall(r"6 networks x (\d+) steps/s", out)
    assert content["models_steps_per_second"] == pytest.approx(6 * int(rate), abs=3.1)
    results = content["results"]
    assert [(r["lr"], r["seed"]) for r in results[4:]] == [(1e30, 3), (1e30, 4)]
    assert all(r["val_loss"] is None and r["diverged_at"] >= 1 for r in results[4:])
    assert {(r["lr"], r["seed"]) for r in results[:4]} == {
        (lr, seed) for lr in (0.03, 0.1) for seed in (3, 4)
    }
    losses = [r["val_loss"] for r in results[:4]]
    assert losses == sorted(losses)
    table = out.rstrip().split("\n\n")[-1].splitlines()
    assert len(table) == 7 and f"{losses[0]:.4f}" in table[1]
    assert table[-1].split()[-2:] == ["step", str(results[-1]["diverged_at"])]
    for picture in ("losses.png", "validation.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    best = results[0]
    alone = ["--seed", str(best["seed"]), "--lr", str(best["lr"])]
    alone += ["--final-lr", str(best["lr"] / 10), "--engine", content["engine"]]
    status, _, _ = run(capsys, "train", *common, *alone, "--out", str(tmp_path / "alone"))
    metrics = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert metrics["val_loss"] == best["val_loss"]


def test_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path) -> None:
    command = [sys.executable, "-m", "fused.makemore", "train", *FAST, "--steps", "50"]
    result = subprocess.run(
        [*command, "--out", tmp_path / "a"], capture_output=True, text=True, check=True
    )
    assert result.stderr.startswith("step 50/50  loss ") and "\r" not in result.stderr
    terminal, end = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run(
        [*command, "--out", tmp_path / "b"], stdout=subprocess.PIPE, stderr=end, check=True
    )
    os.close(end)
    bar = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "50/50" in bar and "steps/s" in bar and "loss" in bar


def words(tmp_path, text: bytes) -> str:
    path = tmp_path / "words.txt"
    path.write_bytes(text)
    return str(path)


BAD = {
    "missing": (lambda p: ["train", "--data", "nothing.txt"], "cannot read nothing.txt"),
    "empty": (lambda p: ["train", "--data", words(p, b"")], "is empty"),
    "not UTF-8": (lambda p: ["check", "--data", words(p, b"\xff")], "is not UTF-8"),
    "terminator": (lambda p: ["train", "--data", words(p, b"a.b\n")], "contains '.'"),
    "small": (lambda p: ["train", "--data", words(p, b"a\n" * 10)], "fewer than one minibatch"),
    "batch of 1": (lambda p: ["train", "--batch", "1"], "at least 2 examples"),
    "no command": (lambda p: [], "COMMAND"),
    "unknown engine": (lambda p: ["train", "--engine", "gpu"], "invalid choice: 'gpu'"),
    "zero steps": (lambda p: ["train", "--steps", "0"], "positive whole number, got '0'"),
    "negative seed": (lambda p: ["train", "--seed", "-1"], "whole number from 0"),
    "bad rate": (lambda p: ["train", "--lr", "fast"], "number from 0 to 3.4e38, got 'fast'"),
    "resume nothing": (lambda p: ["train", "--resume", str(p / "no")], "cannot read"),
    "resume into": (lambda p: ["train", "--resume", str(p), "--out", "x"], "stays in its folder"),
    "no checkpoint": (lambda p: ["sample", words(p, b"hello")], "is not a checkpoint"),
    "bad rates": (lambda p: ["sweep", "--lr", "0.1,fast"], "from 0 to 3.4e38, got 'fast'"),
    "rate beyond float32": (lambda p: ["train", "--lr", "1e39"], "from 0 to 3.4e38, got '1e39'"),
    "bad seeds": (lambda p: ["sweep", "--seed", "8:8"], "expected a range like 0:32"),
    "twice": (lambda p: ["sweep", "--seed", "1,2,1"], "expected every number once"),
    "the same rate": (lambda p: ["sweep", "--lr", "0.1,0.10000000001"], "every number once"),
    "too large": (
        lambda p: ["sweep", "--batch", "4096", "--engine", "persistent", "--out", str(p)],
        "one multiprocessor cannot hold this network",
    ),
    "huge": (lambda p: ["train", "--hidden", str(2**31)], "expected a number up to 2147483647"),
    "more than memory": (
        lambda p: ["train", "--embedding", str(2**31 - 1), "--hidden", str(2**31 - 1)],
        "not enough memory",
    ),
    "long contexts": (lambda p: ["train", "--context", "100000"], "expected at most 7431"),
    "no folder": (lambda p: ["train", "--out", words(p, b"")], "cannot make the folder"),
    "no folder to make": (lambda p: ["sweep", "--out", words(p, b"") + "/x"], "cannot make the f"),
    "resume nothing at all": (lambda p: ["train", "--resume", ""], "--resume: expected a path"),
    "an unnamed folder": (lambda p: ["train", "--out", ""], "--out: expected a path, got ''"),
    "an unnamed sweep": (lambda p: ["sweep", "--out", ""], "--out: expected a path, got ''"),
    "unnamed data": (lambda p: ["check", "--data", ""], "--data: expected a path, got ''"),
    "unnamed checkpoint": (lambda p: ["sample", ""], "checkpoint: expected a path, got ''"),
    "no cuda": (lambda p: ["check", "--device", "cuda"], "no CUDA device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, tmp_path, capsys) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    make, message = BAD[case]
    arguments = make(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_an_engine_that_cannot_run_leaves_no_folder(command, tmp_path, capsys, monkeypatch) -> None:
    data = words(tmp_path, b"abc\nba\n" * 2000)
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    options = ["--data", data, "--batch", "4096", "--engine", "persistent"]
    status, out, err = run(capsys, command, *options)
    assert status == 2 and out == "" and "cannot hold this network" in err
    assert list(tmp_path.iterdir()) == before


def test_a_run_is_not_overwritten(trained, capsys) -> None:
    status, _, err = run(capsys, "train", "--out", str(trained[0]))
    assert status == 2 and "already holds a run" in err


def test_a_sweep_is_not_overwritten(tmp_path, capsys) -> None:
    folder = tmp_path / "sweep"
    options = [*tiny("manual", tmp_path), "--steps", "1", "--seed", "1", "--out", str(folder)]
    assert run(capsys, "sweep", *options, "--lr", "0.1")[0] == 0
    before = (folder / "sweep.json").read_text()
    status, out, err = run(capsys, "sweep", *options, "--lr", "0.3")
    assert status == 2 and err.endswith(f"{folder} already holds a sweep; use another --out\n")
    assert out == "" and (folder / "sweep.json").read_text() == before


@pytest.mark.parametrize("command, parent", [("train", "runs"), ("sweep", "sweeps")])
def test_what_starts_in_the_same_second_has_its_own_folder(
    command, parent, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fused.makemore.cli.time.strftime", lambda _: "now")
    options = [*tiny("manual", tmp_path), "--steps", "1", "--seed", "1"]
    for name in ("now", "now-2", "now-3"):
        status, out, _ = run(capsys, command, *options)
        assert status == 0 and f"folder {parent}/{name}\n" in out
    assert sorted(f.name for f in (tmp_path / parent).iterdir()) == ["now", "now-2", "now-3"]


def test_a_link_to_nothing_in_the_place_of_the_runs(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nothing")
    status, _, err = run(capsys, "train", *tiny("manual", tmp_path), "--steps", "1")
    assert status == 2 and "cannot make the folder runs: File exists" in err


@pytest.mark.parametrize(
    "name, message",
    [
        ("foo", "expected backend to be one of auto, triton, eager, got 'foo'"),
        ("triton", "the Triton kernels were asked for"),
    ],
    ids=["foo", "triton"],
)
@pytest.mark.parametrize("command", ["check", "train", "train --engine fused", "sweep"])
def test_a_backend_that_cannot_serve(command, name, message, tmp_path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"FUSED_BACKEND": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-m", "fused.makemore", *command.split(), "--device", "cpu"]
    result = subprocess.run(
        arguments, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"fused-makemore: FUSED_BACKEND: {message}")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_looks_at_no_backend_takes_any(tmp_path, capsys, monkeypatch) -> None:
    def unserved(_: torch.Tensor) -> str:
        raise RuntimeError("not served")

    monkeypatch.setattr("fused.backend.name_for", unserved)
    options = [*FAST, "--steps", "2", "--out", str(tmp_path / "manual")]
    assert run(capsys, "train", *options, "--engine", "manual")[0] == 0
    assert run(capsys, "sample", str(tmp_path / "manual"), "--num", "1", "--device", "cpu")[0] == 0


def test_a_run_that_is_resumed_on_a_backend_that_cannot_serve(
    tmp_path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(training, "_interruption", interrupted)
    options = [*tiny("fused", tmp_path), "--steps", "7", "--out", str(folder)]
    assert run(capsys, "train", *options)[0] == 130

    def unserved(_: torch.Tensor) -> str:
        raise RuntimeError("not served")

    monkeypatch.setattr("fused.backend.name_for", unserved)
    status, _, err = run(capsys, "train", "--resume", str(folder), "--device", "cpu")
    assert (status, err) == (2, "fused-makemore: FUSED_BACKEND: not served\n")


def test_resume_refuses_other_settings_and_complete_runs(trained, capsys) -> None:
    folder, _ = trained
    status, _, err = run(capsys, "train", "--resume", str(folder), "--hidden", "64")
    assert status == 2 and f"--hidden 64: the run in {folder} has --hidden 20" in err
    status, _, err = run(capsys, "train", "--resume", str(folder))
    assert status == 2 and "is complete: 60 steps" in err


def test_resume_refuses_other_data(tmp_path, capsys, trained) -> None:
    folder, _ = trained
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["losses"] = saved["losses"][:10]
    torch.save(saved, folder / "checkpoint.pt")
    other = words(tmp_path, b"anna\nbob\n" * 50)
    status, _, err = run(capsys, "train", "--resume", str(folder), "--data", other)
    assert status == 2 and "is not the data that the run" in err


def test_a_run_interrupted_after_its_last_step_is_resumed(trained, capsys) -> None:
    """Ctrl-C during the evaluation: metrics.json is written last."""
    folder, out = trained
    (folder / "metrics.json").unlink()
    path = str(folder / "checkpoint.pt")
    status, again, _ = run(capsys, "train", "--resume", path, "--engine", "auto", "--device", "cpu")
    of_results = [text[text.index("\ntrain ") :] for text in (again, out)]
    assert status == 0 and of_results[0] == of_results[1] and "steps/s" not in again
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 60 and metrics["steps_per_second"] is None


def test_the_data_of_a_resumed_run_may_have_moved(tmp_path, capsys, monkeypatch) -> None:
    folder, options = tmp_path / "run", tiny("manual", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_interruption", interrupted)
        run(capsys, "train", *options, "--steps", "7", "--out", str(folder))
    before = Path(options[options.index("--data") + 1])
    after = before.rename(tmp_path / "elsewhere.txt")
    resume = ["train", "--resume", str(folder), "--device", "cpu"]
    status, _, err = run(capsys, *resume)
    assert status == 2 and err.endswith("began with it: --data says where it is now\n")
    assert run(capsys, *resume, "--data", str(after))[0] == 0


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_an_interrupted_evaluation_says_how_to_go_on(
    command, tmp_path, capsys, monkeypatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    folder, place = tmp_path / "run", "_report" if command == "train" else "_evaluated"
    with monkeypatch.context() as patch:
        patch.setattr(cli, place, interrupted)
        options = [*tiny("manual", tmp_path), "--steps", "2", "--out", str(folder)]
        status, out, _ = run(capsys, command, *options)
    assert status == 130
    assert out.splitlines()[-1].endswith(f"fused-makemore {command} --resume {folder}")
    status, out, _ = run(capsys, command, "--resume", str(folder), "--device", "cpu")
    assert status == 0 and "steps/s" not in out


def test_an_interruption_of_what_is_complete_says_nothing(tmp_path, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    options = [*tiny("manual", tmp_path), "--steps", "2", "--out", str(folder)]
    monkeypatch.setattr(model.Model, "sample", interrupted)
    status, out, _ = run(capsys, "train", *options)
    assert status == 130 and "--resume" not in out and (folder / "metrics.json").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path, capsys, monkeypatch) -> None:
    """The second Ctrl-C, during the save that the first one began: nothing half written stays."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    folder = tmp_path / "run"
    options = [*tiny("manual", tmp_path), "--steps", "2", "--out", str(folder)]
    assert run(capsys, "train", *options)[0] == 130 and not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors of POSIX")
@pytest.mark.parametrize("unread", ["closed", "gone"])
@pytest.mark.parametrize("good", [True, False])
def test_standard_error_that_nobody_reads(good, unread, tmp_path) -> None:
    """The status is that of the command; an error is not said on standard output instead."""
    options = [*tiny("manual", tmp_path), "--steps", "2", "--out", str(tmp_path / "run")]
    if not good:
        options += ["--data", str(tmp_path / "nothing.txt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fused.makemore", "train", *options]
    if unread == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=writing, env=environment, text=True
    )
    os.close(writing)
    assert done.returncode == (0 if good else 2)
    assert (tmp_path / "run" / "metrics.json").exists() == good == bool(done.stdout)


def test_a_folder_that_cannot_be_written_is_not_resumed(trained, capsys, monkeypatch) -> None:
    """Said before it trains for a minute. (Root may write everywhere.)"""
    folder, _ = trained

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (folder / "metrics.json").unlink(missing_ok=True)
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", refused)
    status, out, err = run(capsys, "train", "--resume", str(folder), "--device", "cpu")
    assert status == 2 and out == ""
    assert f"cannot write into the folder {folder}: Permission denied" in err


@pytest.mark.parametrize(
    "given, final",
    [([], 0.01), (["--lr", "0.07"], 0.007), (["--lr", "0.5", "--final-lr", "0.2"], 0.2)],
)
def test_the_final_rate_is_a_tenth_of_the_first(given, final, tmp_path, capsys) -> None:
    """As a sweep's."""
    folder = tmp_path / "run"
    options = [*tiny("manual", tmp_path), "--steps", "2", "--out", str(folder)]
    assert run(capsys, "train", *options, *given)[0] == 0
    assert checkpoint.load(folder, CPU).settings.final_lr == final


def test_where_nothing_can_be_written(tmp_path, capsys) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux")
    status, out, err = run(capsys, "train", "--out", "/proc/self")
    assert status == 2 and "cannot write into the folder /proc/self" in err and out == ""
    options = [*tiny("manual", tmp_path), "--steps", "2"]
    for command, file in (
        ("train", "checkpoint.tmp"),
        ("train", "loss.png"),
        ("sweep", "sweep.tmp"),
        ("sweep", "sweep.json"),
    ):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).symlink_to("/dev/full")
        status, _, err = run(capsys, command, *options, "--out", str(folder))
        assert status == 2 and err.endswith("No space left on device\n")
        assert f"{folder / file}: No" in err or not file.endswith(".tmp")
        assert len([line for line in err.splitlines() if "fused-makemore" in line]) == 1


def test_names_for_which_the_output_has_no_letters(tmp_path, monkeypatch) -> None:
    data = ["--data", words(tmp_path, "žofie\nåse\n".encode() * 10), "--batch", "8", "--steps", "2"]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["train", *FAST, *data, "--out", str(tmp_path / "run")]) == 0
    assert b"?" in written.getvalue()


def test_output_that_nobody_reads(trained, capsys, monkeypatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["sample", str(trained[0]), "--num", "2", "--device", "cpu"]) == 141
    assert capsys.readouterr().err == ""


def damage(saved: dict, how: str) -> object:
    match how:
        case "a list":
            return [1, 2]
        case "another program's":
            return {"format": "other"}
        case "newer":
            return saved | {"version": 99}
        case "no parameters":
            return {k: v for k, v in saved.items() if k != "parameters"}
        case "no version":
            return {k: v for k, v in saved.items() if k != "version"}
        case "a vocabulary of numbers":
            return saved | {"vocabulary": 27}
        case "an unknown engine":
            return saved | {"engine": "warp"}
        case "half a generator":
            return saved | {"generator": saved["generator"][:100]}
        case "no batch":
            return saved | {"settings": saved["settings"] | {"batch": 0}}
        case "other statistics":
            return saved | {"mean": saved["mean"][:, :3]}
        case "not finite":
            saved["parameters"]["C"][3] = float("nan")
            return saved
        case "older":
            return saved | {"version": 0}
        case "half a batch":
            return saved | {"settings": saved["settings"] | {"batch": 8.5}}
        case "infinite":
            return saved | {"var": saved["var"] + float("inf")}
        case "float64":
            saved["parameters"]["b2"] = saved["parameters"]["b2"].double()
            return saved
        case "losses in a column":
            return saved | {"losses": saved["losses"].unsqueeze(1)}
        case "a list for a parameter":
            saved["parameters"]["b1"] = [0.0] * 20
            return saved
        case "other sizes":
            saved["parameters"]["W1"] = saved["parameters"]["W1"][:, :3]
            return saved
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how, message",
    [
        ("a list", "is not a checkpoint of fused-makemore"),
        ("another program's", "is not a checkpoint of fused-makemore"),
        ("newer", "has version 99"),
        ("no parameters", "is damaged: it has no parameters"),
        ("no version", "is damaged: it has no version"),
        ("a vocabulary of numbers", "is damaged: it has no vocabulary"),
        ("an unknown engine", "is damaged: there is no engine 'warp'"),
        ("half a generator", "is damaged: "),
        ("no batch", "is damaged: its batch is 0"),
        ("other statistics", "expected mean of shape (1, 20)"),
        ("not finite", "C has numbers that are not finite"),
        ("older", "has version 0"),
        ("half a batch", "is damaged: its batch is 8.5"),
        ("infinite", "var has numbers that are not finite"),
        ("float64", "expected b2 of shape (27,), as its settings say, in float32, got (27,) in"),
        ("losses in a column", "expected losses of shape"),
        ("a list for a parameter", "is damaged: 'list' object has no attribute"),
        (
            "other sizes",
            "expected W1 of shape (30, 20), as its settings say, in float32, got (30, 3)",
        ),
    ],
)
def test_other_checkpoints(how, message, trained, capsys) -> None:
    folder, _ = trained
    path = folder / "checkpoint.pt"
    torch.save(damage(torch.load(path, weights_only=True), how), path)
    status, _, err = run(capsys, "sample", str(folder))
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_a_run_is_not_resumed_as_a_sweep(trained, capsys) -> None:
    status, _, err = run(capsys, "sweep", "--resume", str(trained[0]))
    assert status == 2 and "cannot read" in err
    assert err.endswith("; checkpoint.pt is there, which is for fused-makemore train --resume\n")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, capsys) -> None:
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save(Code(), tmp_path / "checkpoint.pt")
    status, _, err = run(capsys, "sample", str(tmp_path))
    assert status == 2 and "is not a checkpoint" in err
    assert not (tmp_path / "pwned").exists()


def test_a_crash_while_saving_leaves_the_checkpoint_before(trained, monkeypatch) -> None:
    folder, _ = trained
    before = (folder / "checkpoint.pt").read_bytes()
    saved = checkpoint.load(folder, torch.device("cpu"))

    def crash(descriptor):
        os.ftruncate(descriptor, 100)  # half a checkpoint
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        saved.save(folder)
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_the_notebooks_run(names_file, tmp_path, capsys) -> None:
    """200,000 steps on names.txt: the published losses are 2.0705 and 2.1099."""
    folder = tmp_path / "run"
    status, _, _ = run(capsys, "train", "--data", str(names_file), "--out", str(folder))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert status == 0
    assert metrics["train_loss"] <= 2.08 and metrics["val_loss"] <= 2.12
