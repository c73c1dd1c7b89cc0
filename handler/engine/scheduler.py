"""Continuous batching: which request runs, which waits, and what each has to show after every decode step."""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from handler.compression.streaming import StreamingDecoder
from handler.engine.codec import codec_executor
from handler.engine.messages import Audio, Done, Event, Failed, Job, ModelError, Prepared, Preparing, Progress, Started
from handler.errors import ModelDivergedError, RequestError
from handler.generation import Generation
from handler.lm.decoder import Slot, Window
from handler.lm.static_step import decoder_for
from handler.musicgen import MusicGen, require_finite_audio

logger = logging.getLogger(__name__)

Emit = Callable[[str, Event], None]
"""Takes a job's id and what became of it."""

PREPARERS = 2
"""Threads that encode conditions: a melody's stems take long, and a text behind it should not wait for them.

Each computes on one core: OpenMP would give each of them threads of its own, and as soon as there are more threads than
cores, all of them sleep between two products instead of spinning, which doubles the time of a decode step.
"""

PROGRESS_STEPS = 10
"""A request reports its progress every so many decode steps."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine holds at once; claimed when it starts, never grown.

    Attributes:
        requests, rows: how many requests run together, and rows of all of them.
        positions: the longest row, prefix included.
        steps: the longest sequence of one window.
    """

    requests: int
    rows: int
    positions: int
    steps: int


@dataclass(slots=True, eq=False)
class _Request:
    """A job on its way through the scheduler.

    Its conditions are prepared in a thread (`preparing`), its window waits for free rows (`window`), and then runs
    in them (`slot`); so it goes for every window it has, but that rows once taken are kept until the last is done.

    Attributes:
        steps: its decode steps so far.
        decoded: the frames given to its audio decoder so far.
        decoding: its chunks of audio that are being decoded, or are and nobody has looked at how that went; in order.
        finished: its last frame is among them.
        forgotten: no more of its events may go out.
    """

    job: Job
    audio: StreamingDecoder
    preparing: Future[tuple[Generation, Window]] | None = None
    generation: Generation | None = None
    window: Window | None = None
    slot: Slot | None = None
    steps: int = 0
    decoded: int = 0
    decoding: deque[Future[None]] = field(default_factory=deque)
    finished: bool = False
    forgotten: bool = False


class Scheduler:
    """Runs jobs together, first come first served.

    Of the requests whose conditions are ready the oldest goes first; if it needs more rows than are free, it waits
    and nobody overtakes it: so nobody starves, three rows or not. Audio is decoded in chunks that end at fixed
    frames of each request, whoever else runs, so its bytes depend on the request alone. What goes wrong with a request
    ends that one; what goes wrong in a step, or with the device, is everybody's, and is raised.

    Args:
        model: the loaded model.
        capacity: what runs at once.
        chunk_frames: frames of one chunk of audio; the first is half of one, to be heard early.
        max_prompt_tokens: the longest description, in tokens of T5.
        emit: where events go; called from the thread that calls `round`, those that prepare requests, and that which
            decodes audio.
        wake: called from any of them when `round` has something to do.
        deterministic, cuda_graphs: of the decode step on a GPU, see `StaticDecoder`.
    """

    def __init__(
        self,
        model: MusicGen,
        capacity: Capacity,
        chunk_frames: int,
        max_prompt_tokens: int,
        emit: Emit,
        wake: Callable[[], None],
        deterministic: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.capacity = capacity
        self.chunk_frames = chunk_frames
        self.max_prompt_tokens = max_prompt_tokens
        self.emit = emit
        self.wake = wake
        self.decoder = decoder_for(
            model.lm,
            capacity.requests,
            capacity.rows,
            capacity.positions,
            capacity.steps,
            model.longest_condition(max_prompt_tokens),
            model.fuser.adds,
            deterministic,
            cuda_graphs,
        )
        self._requests: list[_Request] = []  # by arrival
        self._codec: Executor = codec_executor(model.device)
        self._preparers = _preparers(PREPARERS, model.device)
        # A request under way does not wait behind those that have not begun.
        self._followers = _preparers(1, model.device)
        # A few that are used again: memory is kept apart for each stream there ever was.
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        if model.device.type == "cuda":
            for _ in range(PREPARERS + 1):
                self._streams.put(torch.cuda.Stream(model.device))

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(len(slot.rows) for slot in self.decoder.slots)

    @property
    def busy(self) -> bool:
        """Whether `round` has anything to do before the next call of `wake`."""
        return any(_runs(r) or r.window is not None or any(f.done() for f in _pending(r)) for r in self._requests)

    def submit(self, job: Job) -> None:
        """Takes a job in; its events follow."""
        request = _Request(job, StreamingDecoder(self.model.compression_model))
        insort(self._requests, request, key=lambda known: known.job.arrival)
        self._prepare(request, self._preparers, lambda: self._start(job))

    def cancel(self, job_id: str) -> None:
        """Forgets a job, and frees its rows before the next step."""
        for request in [request for request in self._requests if request.job.id == job_id]:
            self._forget(request)

    @torch.inference_mode()
    def round(self) -> None:
        """One turn: lets a request in, makes one decode step, and hands out what is finished."""
        self._collect()
        self._admit()
        running = [request for request in self._requests if _runs(request)]
        for request in running:
            request.steps += 1
        self.decoder.step()
        for request in running:
            with self._contained(request):
                self._advance(request)

    def _start(self, job: Job) -> Generation:
        tokens = self.model.prompt_tokens(job.clip.description)
        if tokens > self.max_prompt_tokens:
            raise RequestError("prompt", f"must be a text of at most {self.max_prompt_tokens} tokens, not {tokens}")
        return self.model.start(job.clip, job.params)

    def _prepare(self, request: _Request, pool: ThreadPoolExecutor, start: Callable[[], Generation]) -> None:
        """Encodes a request's conditions and prompt, in a thread."""

        @torch.inference_mode()
        def work() -> tuple[Generation, Window]:
            self.emit(request.job.id, Preparing())
            with self._beside():
                generation = start()
                window = generation.next_window()
            assert window is not None
            return generation, window

        request.preparing = pool.submit(work)
        request.preparing.add_done_callback(lambda _: self.wake())

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU, work that the decode step neither waits for nor makes wait; it is done when the context ends."""
        if self.model.device.type != "cuda":
            yield
            return
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                yield
            stream.synchronize()
        finally:
            self._streams.put(stream)

    def _collect(self) -> None:
        """Takes in what the other threads have done."""
        for request in list(self._requests):
            self._collect_audio(request)
            if request.forgotten or request.preparing is None or not request.preparing.done():
                continue
            preparing, request.preparing = request.preparing, None
            with self._contained(request):
                request.generation, window = preparing.result()
                self._check_fits(window)
                request.window = window
                self.emit(request.job.id, Prepared())

    def _collect_audio(self, request: _Request) -> None:
        """Takes in how decoding a request's audio went, and forgets the request after its last chunk."""
        while request.decoding and request.decoding[0].done():
            with self._contained(request):
                request.decoding.popleft().result()
        if request.finished and not request.decoding and not request.forgotten:
            self._forget(request)

    def _check_fits(self, window: Window) -> None:
        if window.rows > self.capacity.rows:
            raise RequestError("cfg_coef_beta", f"needs {window.rows} rows; this server holds {self.capacity.rows}")
        if window.positions > self.capacity.positions:
            raise RequestError(
                None,
                f"the prompt, the audio to follow and the clip take {window.positions} positions together; "
                f"this server holds {self.capacity.positions}",
            )

    def _admit(self) -> None:
        """Prefills the oldest request that is ready, if its rows are free; one a turn, not to hold up the others."""
        ready = [request for request in self._requests if request.window is not None]
        # Those that keep rows wait for nobody.
        request = next((request for request in ready if request.slot is not None), ready[0] if ready else None)
        if request is None or request.window is None:
            return
        if request.slot is None and not self.decoder.has_room(request.window):
            return
        if request.steps == 0:
            self.emit(request.job.id, Started())
        with self._contained(request):
            self._leave(request)
            window, request.window = request.window, None
            request.slot = self.decoder.join(window)
            request.steps += 1
            self._advance(request)

    @contextmanager
    def _contained(self, request: _Request) -> Iterator[None]:
        """What goes wrong inside ends this request."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # the device is good for nobody any more
        except Exception as error:
            self._fail(request, error)
            # It holds the frames of what failed, and with them the request's audio; some of them hold it in turn.
            error.__traceback__ = None

    def _fail(self, request: _Request, error: Exception) -> None:
        self._forget(request)
        if isinstance(error, ModelDivergedError):
            logger.error("request %s: %s", request.job.id, error)
        elif not isinstance(error, RequestError):
            # The rest of what it is may not go through a pipe.
            logger.error("request %s failed", request.job.id, exc_info=error)
            error = ModelError(f"{type(error).__name__}: {error}")
        self.emit(request.job.id, Failed(error))

    def _advance(self, request: _Request) -> None:
        """Hands out the frames that became final, and goes on to the next window or the end."""
        generation, slot = request.generation, request.slot
        assert generation is not None
        assert slot is not None
        ready = generation.frames_ready(slot.step)
        if slot.done or (request.decoded < ready and self._chunk_end(request) <= ready):
            self.decoder.require_finite(slot)  # on a GPU it waits, as handing out frames does
        while request.decoded < ready and (self._chunk_end(request) <= ready or slot.done):
            last = min(self._chunk_end(request), ready)
            codes = generation.read(self.decoder.sequence_of(slot), request.decoded, last)
            request.decoded = last
            self._decode(request, partial(request.audio.push, codes))
        if request.steps % PROGRESS_STEPS == 0:
            self.emit(request.job.id, Progress(request.steps, generation.total_steps))
        if not slot.done:
            return
        generation.accept(self.decoder.sequence_of(slot))
        if generation.finished:
            self._leave(request)
            request.finished = True
            self._decode(request, request.audio.finish, Done(generation.codes.numpy()))
            self._collect_audio(request)
        else:
            self._prepare(request, self._followers, lambda: generation)

    def _chunk_end(self, request: _Request) -> int:
        """The frame at which the next chunk of audio ends: half a chunk, then whole ones."""
        half = max(1, self.chunk_frames // 2)
        whole = max(0, request.decoded - half + self.chunk_frames) // self.chunk_frames
        return half + whole * self.chunk_frames

    def _decode(self, request: _Request, chunk: Callable[[], Tensor], then: Event | None = None) -> None:
        """Decodes a request's next chunk and hands it out; then, after the last, the event that ends the request."""

        @torch.inference_mode()
        def work() -> None:
            if request.forgotten:
                return
            try:
                wav = chunk().float().cpu()  # [channels, m]
                require_finite_audio(wav)
                if wav.shape[-1]:
                    self.emit(request.job.id, Audio(wav.numpy()))
                if then is not None:
                    self.emit(request.job.id, then)
            except BaseException:
                request.forgotten = True  # the chunks behind it would not fit those before it
                raise

        decoding = self._codec.submit(work)
        request.decoding.append(decoding)
        if not decoding.done():
            decoding.add_done_callback(lambda _: self.wake())

    def _forget(self, request: _Request) -> None:
        self._requests.remove(request)
        request.forgotten = True
        if request.preparing is not None:
            request.preparing.cancel()
        self._leave(request)

    def _leave(self, request: _Request) -> None:
        if request.slot is not None:
            slot, request.slot = request.slot, None
            self.decoder.leave(slot)


def _runs(request: _Request) -> bool:
    """Whether the next decode step is one of this request."""
    return request.slot is not None and not request.slot.done


def _pending(request: _Request) -> list[Future[Any]]:
    """What other threads do for a request."""
    return [*request.decoding, *([] if request.preparing is None else [request.preparing])]


def _preparers(count: int, device: torch.device) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "prepare", _settle, (device,))


def _settle(device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or the thread would go back to GPU 0 after each stream, and take memory there
