"""What is asked at `cancel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from handler.question import CancelQuestion
from tests.unit.test_request import FORM, MULTIPART, PARSER, refusal

CANCEL = {"url_path": "cancel"}
JSON = {**CANCEL, "content-type": "application/json"}


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": {"id": "mine"}}, JSON),
        ({"body": bytearray(b'{"id": "mine"}')}, JSON),
        ({"id": bytearray(b"mine")}, {**CANCEL, **FORM}),
        ({"id": bytearray(b"mine")}, {**CANCEL, **MULTIPART}),
        ({"body": b""}, {**CANCEL, "x-request-id": "mine"}),
        ({"body": {}}, {**JSON, "x-request-id": "mine"}),
        ({}, {**CANCEL, **FORM, "x-request-id": "mine"}),
        ({"body": {"id": "mine"}}, {**JSON, "x-request-id": "of-the-cancel-itself"}),
    ],
)
def test_a_request_is_cancelled_by_the_id_in_the_body_a_form_or_the_header(
    row: Mapping[str, Any], headers: Mapping[str, str]
) -> None:
    assert PARSER.parse(row, headers) == CancelQuestion("mine")


@pytest.mark.parametrize("row", [{"body": b""}, {"body": {}}, {}])
def test_a_cancel_without_an_id_says_how_to_give_it(row: Mapping[str, Any]) -> None:
    error = refusal(row, JSON if row else {**CANCEL, **FORM})
    assert error.field == "id"
    assert "x-request-id" in error.message


@pytest.mark.parametrize("given", ["", "a b", "é", "x" * 129, "../x", "a\n", "\ud800", 3, True, ["a"], {"a": 1}])
def test_an_id_that_no_request_can_have_is_refused(given: Any) -> None:
    error = refusal({"body": {"id": given}}, JSON)
    assert error.field == "id"
    assert "1 to 128 letters" in error.message
    assert len(error.message) < 200


def test_an_id_that_is_not_text_is_refused() -> None:
    assert "UTF-8" in refusal({"id": bytearray(b"\xff")}, {**CANCEL, **FORM}).message


def test_a_cancel_has_no_other_field() -> None:
    error = refusal({"body": {"id": "mine", "prompt": "x"}}, JSON)
    assert error.field == "prompt"
    assert "`id`" in error.message
