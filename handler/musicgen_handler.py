"""The archive's entry: what TorchServe loads and calls."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ts.context import Context

from handler import __version__
from handler.engine.engine import Engine
from handler.engine.messages import Failed, Finished, Job
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams
from handler.reply import Reply, clip_reply, description_reply, error_reply
from handler.request import GenerationRequest, Limits
from handler.request_parser import RequestParser
from handler.settings import Settings
from handler.torchserve_compat import SENT, Exchange, lock_worker_socket

logger = logging.getLogger(__name__)


class MusicGenHandler:
    """One variant: a request goes through preprocess, inference and postprocess, many requests side by side.

    `initialize` loads the model into an engine; `handle` never raises.
    """

    def initialize(self, context: Context) -> None:
        """Load the archive's model.

        Raises:
            SettingsError: for a bad `handler:` block in model-config.yaml.
            CheckpointError: for a checkpoint that cannot be used.
        """
        lock_worker_socket()
        # read when the model's parts import them; everything needed is in the archive
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        settings = Settings.from_model_config(context.model_yaml_config)
        checkpoint = Path(context.system_properties["model_dir"]) / "checkpoint"
        device = settings.device or _assigned_device(context.system_properties["gpu_id"])
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        load = partial(MusicGen.get_pretrained, checkpoint, device=device, dtype=dtype, hub_dir=checkpoint / "hub")
        started = time.monotonic()
        self.engine = Engine(load, settings.max_queue, settings.max_prompt_tokens)
        self.engine.start()
        self.variant: str = context.model_name
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
            )
        )
        logger.info("%s ready after %.1f s: %s", self.variant, time.monotonic() - started, card)

    async def handle(self, data: list[Mapping[str, Any]], context: Context) -> list[bytes]:
        """Answer one request (TorchServe's batch of one); every reply is sent from here, errors included."""
        exchange = Exchange(data[0], context)
        started = time.monotonic()
        outcome = "ok"
        try:
            reply = await self._answer(data[0], exchange)
        except BaseException as error:
            reply = error_reply(error, exchange.request_id)
            outcome = f"{reply.status} {type(error).__name__}"
            if reply.status == 500:
                logger.error("request %s failed", exchange.request_id, exc_info=error)
        try:
            await exchange.send(reply)
        except BaseException:
            logger.exception("request %s: the reply could not be sent", exchange.request_id)
        logger.info("request %s: %s in %.2f s", exchange.request_id, outcome, time.monotonic() - started)
        return [SENT]

    async def _answer(self, row: Mapping[str, Any], exchange: Exchange) -> Reply:
        started = time.monotonic()
        request = None if exchange.is_model_description else await self.preprocess(row, exchange.headers)
        if request is None:
            return description_reply(self.describe())
        clip = await asyncio.to_thread(clip_of, request, self.parser.limits.window)
        job = Job(exchange.request_id, clip, params_of(request), deadline=started + request.timeout)
        return await self.postprocess(request, await self.inference(job))

    async def preprocess(self, row: Mapping[str, Any], headers: Mapping[str, str]) -> GenerationRequest | None:
        """Parse a request, off the loop; None: the model's description is asked for."""
        return await asyncio.to_thread(self.parser.parse, row, headers)

    async def inference(self, job: Job) -> Finished:
        """Have the engine make the clip.

        Raises:
            RequestError, EngineError: or whatever the model raised.
        """
        async with aclosing(self.engine.generate(job)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
                if isinstance(event, Failed):
                    raise event.error
        raise AssertionError("the engine ended a job without a last event")

    async def postprocess(self, request: GenerationRequest, clip: Finished) -> Reply:
        """Set the level and encode, off the loop."""
        return await asyncio.to_thread(clip_reply, request, clip, self.variant)

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
            "max_duration": fields["duration"]["maximum"],
            "device": card.device,
            "dtype": card.dtype,
            "formats": fields["format"]["enum"],
            "fields": fields,
        }


def _assigned_device(gpu_id: int | None) -> str:
    return f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"


def clip_of(request: GenerationRequest, window: float) -> Clip:
    """Decode what a request's music is made from; of a melody no more than can be heard of it."""
    wav, end = request.style, None
    if request.melody is not None:
        # What follows the clip's last window changes nothing, nor does it change how that window's end is separated.
        wav, end = request.melody, request.duration + 2 * window
    continuation = request.continuation
    return Clip(
        description=request.prompt or None,
        melody=wav.read(end=end) if wav else None,
        melody_sample_rate=wav.sample_rate if wav else None,
        continuation=continuation.read(request.continuation_start, request.continuation_end) if continuation else None,
        continuation_sample_rate=continuation.sample_rate if continuation else None,
    )


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
