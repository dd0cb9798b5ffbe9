"""The networks of a sweep divided over processes, for where a network's loop is mostly Python.

PyTorch's operations on tensors this small hold Python's lock for so much of their time that two
threads take longer than one.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor, multiprocessing

import fused
from fused.makemore import engines
from fused.makemore.model import EPS, Settings
from fused.mlp_train import MLPParameters

# Steps of all networks together: starting the processes takes as long as 20,000 to 30,000 of them.
_LEAST_STEPS = 100_000


Steps = Callable[[Tensor, Tensor], Tensor]  # minibatches (S, K, B), rates (M,) -> losses (M, K)


@contextmanager
def trainer(
    engine: str, parameters: MLPParameters, x: Tensor, y: Tensor, s: Settings
) -> Iterator[Steps]:
    """What takes steps with M networks and updates their parameters: this process or several.

    Raises InputError where the engine cannot train them.
    """
    method = engines.METHODS[engine]
    train = partial(_train, method, parameters, x, y)
    nothing = torch.empty(1, 0, s.batch, dtype=torch.int64, device=x.device)
    rates = torch.zeros(len(parameters.C), device=x.device)
    with engines.input_errors(engine):
        train(nothing, rates)
    count = worthwhile(method, len(parameters.C), s.steps, x.device)
    if count == 1:
        yield train
        return
    with Processes(method, parameters, x, y, count) as processes:
        processes.train(nothing, rates)  # returns when all have started
        yield processes.train


def worthwhile(method: str, models: int, steps: int, device: torch.device) -> int:
    """How many processes to train that many networks in; 1 is this one."""
    if method != "eager" or device.type != "cpu" or models * steps < _LEAST_STEPS:
        return 1
    return min(models, torch.get_num_threads())


class Processes:
    """Trains its share of M networks in each of `count` processes; they end with the `with` block.

    parameters have the networks in front and move to shared memory, where they are updated.
    """

    def __init__(
        self, method: str, parameters: MLPParameters, x: Tensor, y: Tensor, count: int
    ) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
        of_all = torch.arange(len(parameters.C)).tensor_split(count)
        self._shares = [slice(int(m[0]), int(m[-1]) + 1) for m in of_all]
        self._connections, self._processes = [], []
        with without_interruption():
            for share in self._shares:
                ours, theirs = spawn.Pipe()
                models = MLPParameters(*(p.share_memory_()[share] for p in parameters))
                process = spawn.Process(
                    target=_work, args=(theirs, method, models, x, y), daemon=True
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def train(self, index: Tensor, lr: Tensor) -> Tensor:
        """A step for each of the minibatches index (S, K, B), at lr (M,); the losses (M, K).

        Network m takes index[m % S]. Raises RuntimeError where a process has ended.
        """
        try:
            for share, connection in zip(self._shares, self._connections, strict=True):
                streams = torch.arange(share.start, share.stop) % len(index)
                # As arrays they go through the pipe; tensors would take a shared file each time.
                connection.send((index[streams].numpy(), lr[share].numpy()))
            return torch.cat([torch.from_numpy(c.recv()) for c in self._connections])
        except (EOFError, ConnectionError):
            raise RuntimeError("a process that trains networks has ended") from None


def _train(
    method: str, parameters: MLPParameters, x: Tensor, y: Tensor, index: Tensor, lr: Tensor
) -> Tensor:
    _, losses = fused.train_mlp(parameters, x, y, index, lr, eps=EPS, method=method, inplace=True)
    return losses.cpu()


def _work(
    connection: Connection, method: str, parameters: MLPParameters, x: Tensor, y: Tensor
) -> None:
    torch.set_num_threads(1)
    try:
        while True:
            index, lr = (torch.from_numpy(array) for array in connection.recv())
            connection.send(_train(method, parameters, x, y, index, lr).numpy())
    except (EOFError, ConnectionError):
        return  # the sweep has ended, without a word where it was killed


@contextmanager
def without_interruption() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, from their first moment: the caller is to stop them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
