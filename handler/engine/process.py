"""The engine's own process: loads the model, then runs the scheduler over what comes through a pipe.

It is a child of the worker, so that what can die here (a CUDA fault, the out-of-memory killer) takes no client with
it. It leaves by itself when the pipe closes: TorchServe ends workers by SIGKILL, and nobody else would end it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from handler.cgroup import available_cores
from handler.engine.memory import give_memory_back
from handler.engine.messages import (
    Cancel,
    Card,
    Close,
    Command,
    Done,
    Event,
    Failed,
    Job,
    Load,
    LoadFailed,
    Ready,
    StyleCard,
    Wake,
    receive,
    send,
)
from handler.engine.spec import ModelSpec
from handler.engine.watchdog import Watchdog
from handler.params import Clip, GenerationParams

if TYPE_CHECKING:
    from handler.engine.scheduler import Emit, Scheduler
    from handler.musicgen import MusicGen

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 0.2
"""Of the clip that is made before the first client's."""

LOAD_SECONDS = 1.0
"""Between two reports of how busy the process is."""

QUIET_SECONDS = 1.0
"""Without a command, and with nothing to step, before memory is given back."""


def run(connection: Connection, spec: ModelSpec) -> None:
    """The process's main: never returns before the pipe closes."""
    # Ctrl-C goes to the whole group of a terminal; the worker decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    writing = threading.Lock()

    def emit(job_id: str, event: Event) -> None:
        with writing:
            send(connection, (job_id, event))

    threading.Thread(target=_read, args=(connection, commands), name="commands", daemon=True).start()
    try:
        scheduler, card = _load(spec, emit, lambda: commands.put(Wake()))
    except Exception as error:
        logger.exception("the model could not be loaded")
        with suppress(OSError):
            emit("", LoadFailed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return
    emit("", Ready(card))
    try:
        _serve(scheduler, commands, emit, Watchdog(spec.patience, partial(_give_up, spec.patience)))
    except BaseException:
        logger.exception("the engine cannot go on")
        os._exit(1)  # at once: an orderly end would first wait for all that is being prepared


def _give_up(patience: float) -> NoReturn:
    logger.error("a decode step has taken more than %g s; the engine ends, and another takes its place", patience)
    faulthandler.dump_traceback()
    os._exit(1)


def _serve(scheduler: Scheduler, commands: queue.SimpleQueue[Command], emit: Emit, watchdog: Watchdog) -> NoReturn:
    """Makes decode steps, and obeys in between."""
    rounds, since = 0, time.monotonic()
    while True:
        # Blocks while there is nothing to do; between two steps it only looks.
        while not commands.empty() or not scheduler.busy:
            if not scheduler.busy and rounds:
                emit("", Load(0, 0.0))
                rounds = 0
            _obey(scheduler, _next(commands))
        if rounds == 0:
            since = time.monotonic()
        with watchdog.turn():
            scheduler.round()
        rounds += 1
        elapsed = time.monotonic() - since
        if elapsed >= LOAD_SECONDS:
            emit("", Load(scheduler.rows, rounds / elapsed))
            rounds, since = 1, time.monotonic()


def _next(commands: queue.SimpleQueue[Command]) -> Command:
    """Waits for a command; when none has come for a while, memory that is free goes back to the system, as glibc would
    keep it."""
    try:
        return commands.get(timeout=QUIET_SECONDS)
    except queue.Empty:
        give_memory_back()
    return commands.get()


def _read(connection: Connection, commands: queue.SimpleQueue[Command]) -> None:
    """Takes commands off the pipe as they come, so that the worker never waits for a decode step."""
    status = 0
    try:
        while not isinstance(command := receive(connection), Close):
            commands.put(command)
            del command  # or the last job's audio would stay
    except (EOFError, OSError):
        pass  # the worker is gone
    except Exception:
        logger.exception("a command cannot be read")
        status = 1
    finally:
        os._exit(status)


def _obey(scheduler: Scheduler, command: Command) -> None:
    match command:
        case Job():
            scheduler.submit(command)
        case Cancel(job_id):
            scheduler.cancel(job_id)


def _load(spec: ModelSpec, emit: Emit, wake: Callable[[], None]) -> tuple[Scheduler, Card]:
    # Imported here, in the child alone: the worker stays thin.
    import torch

    from handler.engine.capacity import capacity_for, require_room
    from handler.engine.scheduler import Scheduler
    from handler.musicgen import MusicGen, serving_device

    # More threads than a container's quota allows would be stopped in the middle of a step, and the others wait.
    torch.set_num_threads(spec.threads or min(torch.get_num_threads(), available_cores()))
    device = serving_device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches where this points, and GPU 0 is not touched by others' workers
    require_room(spec)
    model = MusicGen.get_pretrained(spec.checkpoint, spec.device, spec.dtype, spec.hub_dir)
    capacity = capacity_for(model, spec)
    chunk_frames = max(1, round(spec.chunk_seconds * model.frame_rate))
    scheduler = Scheduler(
        model, capacity, chunk_frames, spec.max_prompt_tokens, emit, wake, spec.deterministic, spec.cuda_graphs
    )
    _warm_up(scheduler)
    return scheduler, _card_of(model, capacity.requests)


def _warm_up(scheduler: Scheduler) -> None:
    """Makes a clip, so that the first client does not wait for what is set up at the first use.

    Raises:
        EngineError: what a client's request would end with.
    """
    events: list[Event] = []
    emit, scheduler.emit = scheduler.emit, lambda _, event: events.append(event)
    scheduler.submit(Job("warm-up", Clip("warm-up"), GenerationParams(duration=WARM_UP_SECONDS, seed=0)))
    while not (events and isinstance(events[-1], Done | Failed)):
        if scheduler.busy:
            scheduler.round()
        else:
            time.sleep(0.001)
    scheduler.emit = emit
    if isinstance(events[-1], Failed):
        raise events[-1].error


def _card_of(model: MusicGen, concurrency: int) -> Card:
    return Card(
        sample_rate=model.sample_rate,
        channels=model.audio_channels,
        frame_rate=float(model.frame_rate),
        window=float(model.max_duration),
        conditioners=tuple(model.conditioners),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        concurrency=concurrency,
        melody=model.melody,
        style=_style_card(model),
    )


def _style_card(model: MusicGen) -> StyleCard | None:
    style = model.style
    if style is None:
        return None
    return StyleCard(style.sample_rate, style.params.excerpt_length, style.use_middle, style.num_codebooks)
