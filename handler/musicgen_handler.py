"""The archive's entry: what TorchServe loads and calls."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from ts.context import Context

from handler import __version__
from handler.cancel import CancelBoard
from handler.clip_audio import ClipAudio, audio_of
from handler.decoder import Decoders
from handler.drain import Drain
from handler.engine.engine import Engine
from handler.engine.messages import Audio, EngineUnavailableError, Event, Failed, Job, Restarted
from handler.engine.spec import ModelSpec
from handler.errors import UnknownRequestError
from handler.load_failure import forget_failures, record_failure
from handler.metrics import Metrics
from handler.openai import models_list
from handler.params import Clip, GenerationParams
from handler.question import CancelQuestion, ClipQuestion, DescriptionQuestion, ModelsQuestion, Question
from handler.reply import Reply, clip_reply, error_content, error_reply, json_reply, most_bytes
from handler.request import GenerationRequest, Limits
from handler.request_parser import RequestParser
from handler.server_control import stop_workers
from handler.settings import OVERRIDES, Settings, SettingsError
from handler.streaming import OPENAI, OURS, StreamedReply, streamed_reply
from handler.torchserve_compat import (
    SENT,
    Exchange,
    FrontendError,
    let_go,
    lock_worker_socket,
    metric_sink,
    require_frontend,
)

logger = logging.getLogger(__name__)

_EXPLAINED = (SettingsError, FrontendError, EngineUnavailableError, OSError)
"""Errors whose first line tells a person what is wrong."""

SHORTEST_PATIENCE = 60.0
"""Seconds that a decode step may take at least, however short the timeout of requests is: a prefill takes some."""

DRAINING = "this worker is about to stop and takes no more; try again"


class MusicGenHandler:
    """One variant: a request goes through preprocess, inference and postprocess, many requests side by side.

    `initialize` loads the model into an engine; neither it nor `handle` ever raises.
    """

    failure: EngineUnavailableError | None = None

    def initialize(self, context: Context) -> None:
        """Load the archive's model.

        Raises nothing: TorchServe would end the worker without telling anybody why, and leave every request hanging.
        If the model cannot be loaded, the log has the whole story, and whoever asks gets a 503 with the cause, those
        who ask the management API for the model's description included.
        """
        lock_worker_socket()
        self.variant: str = context.model_name
        self.metrics = Metrics(metric_sink(context), self.variant, str(os.getpid()))
        try:
            self._load(context)
        except Exception as error:
            cause = str(error).splitlines()[0] if isinstance(error, _EXPLAINED) else f"{type(error).__name__}: {error}"
            version = str(context.manifest["model"]["modelVersion"])
            record_failure(Path(tempfile.gettempdir()), self.variant, version, cause)
            logger.exception("%s cannot be served: %s", self.variant, cause)
            self.failure = EngineUnavailableError(f"{cause} (fix this, unregister the model and register it again)")
            if isinstance(error, FrontendError):
                self.failure = EngineUnavailableError(cause)
                self._leave(version)

    def _leave(self, version: str) -> None:
        """Have TorchServe end this worker: with these settings its frontend would lose requests and never answer."""
        try:
            stop_workers(self.variant, version)
        except (OSError, ValueError, KeyError, HTTPException) as error:
            logger.error("TorchServe could not be told to stop the workers of %s: %s", self.variant, error)

    def _load(self, context: Context) -> None:
        # read when the model's parts import them; everything needed is in the archive
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        torch.set_num_threads(1)  # the cores are the engine's
        require_frontend(context)
        settings = Settings.from_model_config(context.model_yaml_config, os.environ.get(OVERRIDES))
        checkpoint = Path(context.system_properties["model_dir"]) / "checkpoint"
        device = settings.device or _assigned_device(context.system_properties["gpu_id"])
        spec = ModelSpec(
            checkpoint=checkpoint,
            hub_dir=checkpoint / "hub",
            device=device,
            dtype=settings.dtype,
            threads=settings.threads,
            max_concurrency=settings.max_concurrency,
            memory_budget=settings.memory_budget,
            max_prompt_tokens=settings.max_prompt_tokens,
            chunk_seconds=settings.stream_chunk_seconds,
            deterministic=settings.deterministic,
            cuda_graphs=settings.cuda_graphs,
            patience=max(settings.timeout, SHORTEST_PATIENCE),  # by then every request in it has been given up
        )
        started = time.monotonic()
        self.engine = Engine(spec, settings.max_queue, settings.audio_budget)
        self.engine.start()
        version = context.manifest["model"]["modelVersion"]
        self.decoders = Decoders()
        self.board = CancelBoard(f"{self.variant}/{version}", self.engine.cancel)
        self.drain = Drain(Path(tempfile.gettempdir()), self.variant, version)
        self.loaded = int(time.time())
        self.metrics.watch(self.engine.status)
        card = self.engine.describe()
        self.parser = RequestParser(
            Limits(
                max_duration=settings.max_duration,
                timeout=settings.timeout,
                max_prompt_tokens=settings.max_prompt_tokens,
                max_upload_bytes=settings.max_upload_bytes,
                max_upload_seconds=settings.max_upload_seconds,
                frame_rate=card.frame_rate,
                window=card.window,
                melody=card.melody,
                style_codebooks=card.style.num_codebooks if card.style else 0,
            )
        )
        forget_failures(Path(tempfile.gettempdir()), self.variant, version)
        logger.info("%s ready after %.1f s: %s", self.variant, time.monotonic() - started, card)

    async def handle(self, data: list[dict[str, Any]], context: Context) -> list[bytes]:
        """Answer one request (TorchServe's batch of one); every reply is sent from here, errors included."""
        try:
            with self.metrics.in_flight():
                await self._handle(data[0], Exchange(data[0], context))
        except BaseException:
            # TorchServe would end every other request with it.
            logger.exception("a request could not be answered")
        return [SENT]

    async def _handle(self, row: dict[str, Any], exchange: Exchange) -> None:
        started = time.monotonic()
        outcome = "ok"
        try:
            await self._answer(row, exchange)
        except BaseException as error:
            content = error_content(error, exchange.request_id)["error"]
            outcome = content["type"]
            if content["code"] == 500:
                logger.error("request %s failed", exchange.request_id, exc_info=error)
            if not exchange.has_begun:
                await self._send_error(exchange, error)
        self.metrics.request(outcome)
        logger.info("request %s: %s in %.2f s", exchange.request_id, outcome, time.monotonic() - started)

    async def _answer(self, row: dict[str, Any], exchange: Exchange) -> None:
        arrived = time.monotonic()
        if self.failure is not None:
            raise self.failure
        question = await self.preprocess(row, exchange)
        match question:
            case DescriptionQuestion():
                # Routers look whether a description comes: one that drains is not to be chosen.
                if self.drain.requested and not exchange.is_model_description:
                    raise EngineUnavailableError(DRAINING)
                await exchange.send(json_reply(self.describe()))
            case ModelsQuestion():
                await exchange.send(json_reply(models_list(self.variant, self.loaded)))
            case CancelQuestion(request_id):
                await exchange.send(await self.cancel(request_id))
            case ClipQuestion(request):
                if self.drain.requested:
                    raise EngineUnavailableError(DRAINING)
                if request.streams:
                    exchange.require_streams()
                card = self.engine.describe()
                exchange.require_room(most_bytes(request, card))
                audio = audio_of(request, card, self.decoders)
                question = replace(question, request=request.without_audio())
                clip, deadline = Clip(request.prompt or None), arrived + request.timeout
                job = Job(exchange.request_id, clip, params_of(request), request.streams, deadline)
                events = self.inference(job, audio)
                del request, audio  # they hold what was uploaded
                async with aclosing(events):
                    reply = await self.postprocess(question, events, exchange.request_id)
                    if isinstance(reply, StreamedReply):
                        await exchange.send_stream(reply)
                if isinstance(reply, Reply):
                    await exchange.send(reply)

    async def preprocess(self, row: dict[str, Any], exchange: Exchange) -> Question:
        """Parse what is asked, off the loop, and empty the row."""
        if exchange.is_model_description:
            return DescriptionQuestion()
        try:
            return await asyncio.to_thread(self.parser.parse, row, exchange.headers)
        finally:
            let_go(row)

    async def inference(self, job: Job, audio: ClipAudio | None) -> AsyncGenerator[Event, None]:
        """Have the engine make the clip; gives its events as they come."""
        events = self.engine.generate(job, audio)
        del audio
        async with aclosing(events), aclosing(self.metrics.timed(events, job.params.duration)) as timed:
            async for event in timed:
                yield event

    async def postprocess(
        self, question: ClipQuestion, events: AsyncIterator[Event], request_id: str
    ) -> Reply | StreamedReply:
        """Set the level and encode, off the loop: the whole clip once it is there, or piece by piece.

        Raises:
            RequestError, EngineError: or whatever the model raised, before there is a reply.
        """
        request, card = question.request, self.engine.describe()
        reply: Reply | StreamedReply
        if request.streams:
            names = OPENAI if question.openai else OURS
            reply = await streamed_reply(events, request, card, self.variant, request_id, names)
        else:
            wav = await whole_clip(events)
            reply = await asyncio.to_thread(clip_reply, request, wav, card.sample_rate, self.variant)
        notes = {"accept-ranges": "none"}  # a clip is sent from its beginning; players fall back to that
        if question.ignored:
            notes["x-no-effect"] = ", ".join(question.ignored)
        return replace(reply, headers={**reply.headers, **notes})

    async def cancel(self, request_id: str) -> Reply:
        """Give up every request of an id, whichever worker has it.

        Raises:
            UnknownRequestError: there is none.
        """
        if not await asyncio.to_thread(self.board.cancel, request_id):
            raise UnknownRequestError("id", f"no request of the id {request_id} is waiting or running")
        return json_reply({"cancelled": request_id})

    async def _send_error(self, exchange: Exchange, error: BaseException) -> None:
        try:
            await exchange.send(error_reply(error, exchange.request_id))
        except BaseException:
            logger.exception("request %s: the reply could not be sent", exchange.request_id)

    def describe(self) -> dict[str, Any]:
        """What this variant is and what it accepts."""
        card = self.engine.describe()
        fields = self.parser.fields
        return {
            "variant": self.variant,
            "version": __version__,
            "conditioners": list(card.conditioners),
            "sample_rate": card.sample_rate,
            "channels": card.channels,
            "frame_rate": card.frame_rate,
            "window": card.window,
            "concurrency": card.concurrency,
            "max_duration": fields["duration"]["maximum"],
            "device": card.device,
            "dtype": card.dtype,
            "formats": fields["format"]["enum"],
            "fields": fields,
        }


async def whole_clip(events: AsyncIterator[Event]) -> Tensor:
    """The clip float32 `[C, T]` that the events of a job bring.

    Raises:
        Exception: what ended the job, if it did not end well.
    """
    pieces: list[NDArray[np.float32]] = []
    async for event in events:
        match event:
            case Audio(wav):
                pieces.append(wav)
            case Restarted():
                pieces.clear()
            case Failed(error):
                try:
                    raise error
                finally:
                    del error, event  # or this frame and the error would hold each other, and all the callers' audio
    return torch.from_numpy(np.concatenate(pieces, axis=1))


def _assigned_device(gpu_id: int | None) -> str:
    return f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"


def params_of(request: GenerationRequest) -> GenerationParams:
    return GenerationParams(
        use_sampling=request.use_sampling,
        top_k=request.top_k,
        top_p=request.top_p,
        temperature=request.temperature,
        duration=request.duration,
        cfg_coef=request.cfg_coef,
        cfg_coef_beta=request.cfg_coef_beta,
        two_step_cfg=request.two_step_cfg,
        extend_stride=request.extend_stride,
        seed=request.seed,
        eval_q=request.eval_q,
        excerpt_length=request.excerpt_length,
        ds_factor=request.ds_factor,
    )
