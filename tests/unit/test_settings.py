from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from handler.settings import Settings, SettingsError


@pytest.mark.parametrize("config", [None, {}, {"minWorkers": 1}, {"handler": None}, {"handler": {}}])
def test_a_missing_block_gives_the_defaults(config: dict[str, Any] | None) -> None:
    settings = Settings.from_model_config(config)
    assert settings.max_duration == 120
    assert settings.max_queue == 64
    assert settings.max_prompt_tokens == 512
    assert settings.timeout == 600
    assert settings.device is None


def test_yaml_whole_numbers_serve_as_seconds() -> None:
    settings = Settings.from_model_config({"handler": {"max_duration": 30, "dtype": "bfloat16", "device": "cuda:1"}})
    assert (settings.max_duration, settings.dtype, settings.device) == (30.0, "bfloat16", "cuda:1")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().max_queue = 3


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ({"max_durations": 3}, r"handler\.max_durations.*not a setting.*max_duration"),
        ({"max_duration": 0}, r"handler\.max_duration.*greater than 0"),
        ({"max_duration": float("inf")}, r"handler\.max_duration"),
        ({"max_duration": "30"}, r"handler\.max_duration.*'30'"),
        ({"max_queue": True}, r"handler\.max_queue.*True"),
        ({"max_queue": -1}, r"handler\.max_queue.*greater than or equal to 0"),
        ({"max_concurrency": 0}, r"handler\.max_concurrency.*greater than or equal to 1"),
        ({"memory_budget": 1.5}, r"handler\.memory_budget.*1\.5"),
        ({"threads": 0}, r"handler\.threads.*greater than or equal to 1"),
        ({"stream_chunk_seconds": 11}, r"handler\.stream_chunk_seconds.*less than or equal to 10"),
        ({"dtype": "int4"}, r"handler\.dtype.*'float32', 'float16', 'bfloat16' or 'int8'"),
        ({"device": "tpu"}, r"handler\.device.*cuda"),
        ({"timeout": float("nan")}, r"handler\.timeout"),
        ([1, 2], "must be a block"),
        ("cpu", "must be a block"),
    ],
)
def test_a_bad_block_is_an_error_naming_the_key_and_the_bounds(block: Any, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        Settings.from_model_config({"handler": block})


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())
