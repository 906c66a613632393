"""Trials that train side by side, in runs that can be killed at any moment.

A run is a number of trials of one experiment, vmapped, and a function of its settings alone. Runs
are shared out among processes of one thread each. Every so many seconds, and when it is
interrupted, all that a run needs to go on is saved, its curves included; called again, it goes on
from there and ends with the same numbers as one that was never stopped.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

# A core each, and XLA's pool of threads has been seen to hang.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


class Run(NamedTuple):
    """Trials of one experiment.

    Attributes:
        name: of the folder with its checkpoints.
        settings: what its results depend on, for JSON.
        num_epochs: how long it trains.
        chunk: epochs that one call of ``advance`` does; divides ``num_epochs``.
        start: () -> the state before the first epoch, a pytree of arrays.
        advance: (state, epoch) -> (state, curves) after ``chunk`` epochs from ``epoch`` on;
            ``curves`` is a dict of arrays [chunk, trials, …].
        weight: what an epoch costs, roughly and in any unit, for the time left.
    """

    name: str
    settings: dict[str, Any]
    num_epochs: int
    chunk: int
    start: Callable[[], Any]
    advance: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]]
    weight: float = 1.0


class Trained(NamedTuple):
    """What came of a run: its curves [epochs, trials, …], and the seconds that one process needed
    for it, compilation included, before and after interruptions."""

    curves: dict[str, np.ndarray]
    seconds: float


def train(
    plans: dict[Any, Callable[[], Run]],
    folder: pathlib.Path,
    title: str,
    jobs: int,
    save_every: float,
) -> dict[Any, Trained]:
    """All runs, those that are done already from their checkpoints.

    Args:
      plans: by any key, functions that make a run; they go to other processes by pickle.
      folder: for the checkpoints, a folder a run.
      title: of the progress bar.
      jobs: processes.
      save_every: seconds between checkpoints of a run.
    """
    runs = {key: plan() for key, plan in plans.items()}
    for run in runs.values():
        _check_settings(run, folder / run.name)
    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"
    total = sum(run.weight * run.num_epochs for run in runs.values())
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    begin = dict(initializer=_begin, initargs=(events, stop, os.getpid()))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"  # for the others
    with (
        tqdm(total=total, desc=title, bar_format=form, smoothing=0.0) as bar,
        ProcessPoolExecutor(min(jobs, len(runs)), context, **begin) as pool,
    ):
        # The longest first, so that all processes end at about the same time.
        order = sorted(plans, key=lambda key: -runs[key].weight * runs[key].num_epochs)
        futures = {key: pool.submit(_work, plans[key], folder, save_every) for key in order}
        try:
            while not all(future.done() for future in futures.values()):
                _show(bar, events)
            return {key: futures[key].result() for key in plans}
        finally:  # on Ctrl-C all save what they have; beside a run that failed they have ended
            stop.set()
            pool.shutdown(cancel_futures=True)
            while not events.empty():
                _show(bar, events)


def _show(bar: tqdm, events) -> None:
    with contextlib.suppress(queue.Empty):
        gained, had_before, text = events.get(timeout=0.2)
        bar.initial += had_before  # does not count for the time left
        bar.set_postfix_str(text, refresh=False)
        bar.update(gained)


# In a process that works.

_events: Any = None
_stop: Any = None
_parent = 0


def _begin(events, stop, parent: int) -> None:
    global _events, _stop, _parent
    _events, _stop, _parent = events, stop, parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when to stop


def _work(plan: Callable[[], Run], folder: pathlib.Path, save_every: float) -> Trained:
    run = plan()
    with _alone(folder / run.name):
        return _train(run, folder / run.name, save_every)


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
    """Waits until no other process works in the folder: one whose parent was killed, say."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(run: Run, folder: pathlib.Path, save_every: float) -> Trained:
    begun = time.monotonic()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager((folder / "epochs").absolute(), options=options) as checkpoints:
        epoch = checkpoints.latest_step() or 0
        _events.put((run.weight * epoch, run.weight * epoch, run.name))
        if epoch == run.num_epochs:  # needs neither data nor a compiler
            kept = checkpoints.restore(epoch, args=ocp.args.StandardRestore())
            return Trained(kept["curves"], float(kept["seconds"]))
        kept = _room(run)
        if epoch:
            kept = checkpoints.restore(epoch, args=ocp.args.StandardRestore(kept))
        state, curves, before = kept["state"], kept["curves"], float(kept["seconds"])
        saved_at = begun
        while epoch < run.num_epochs:
            state, new = run.advance(state, epoch)
            for name, values in new.items():
                curves[name][epoch : epoch + run.chunk] = values
            epoch += run.chunk
            _events.put((run.weight * run.chunk, 0.0, f"{run.name} {epoch} of {run.num_epochs}"))
            stopping = _stop.is_set() or os.getppid() != _parent
            now = time.monotonic()
            if now - saved_at >= save_every or epoch == run.num_epochs or stopping:
                seconds = np.float64(before + now - begun)
                tree = dict(state=jax.tree.map(np.asarray, state), curves=curves, seconds=seconds)
                checkpoints.save(epoch, args=ocp.args.StandardSave(tree))
                saved_at, kept = now, tree
            if stopping:
                raise SystemExit("stopped")
    return Trained(curves, float(kept["seconds"]))


def _room(run: Run) -> dict[str, Any]:
    """What is kept in a checkpoint, before the first epoch."""
    state = jax.tree.map(np.asarray, run.start())
    _, shapes = jax.eval_shape(lambda state: run.advance(state, 0), state)
    curves = {
        name: np.full((run.num_epochs, *shape.shape[1:]), np.nan, shape.dtype)
        for name, shape in shapes.items()
    }
    return dict(state=state, curves=curves, seconds=np.float64(0.0))


def _check_settings(run: Run, folder: pathlib.Path) -> None:
    """Refuse to go on with what other settings began."""
    path = folder / "settings.json"
    settings = run.settings | dict(num_epochs=run.num_epochs, jax=jax.__version__)
    if run.num_epochs % run.chunk:
        raise ValueError(f"{run.name}: chunks of {run.chunk} do not make {run.num_epochs} epochs")
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in found | settings if settings.get(name) != found.get(name)]
    if names:
        changes = "; ".join(f"{k} was {found.get(k)!r}, is {settings.get(k)!r}" for k in names)
        raise SystemExit(
            f"{folder} has checkpoints of other settings ({changes}): "
            "--fresh begins again, --checkpoints names another folder"
        )
