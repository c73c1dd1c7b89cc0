"""From what TorchServe hands over to a question: JSON, form, text, multipart, addresses; fields by any name."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from handler.errors import RequestError
from handler.openai import MODELS_PATH, SPEECH_PATH, speech_fields
from handler.question import CancelQuestion, ClipQuestion, DescriptionQuestion, ModelsQuestion, Question
from handler.registry import VARIANTS
from handler.replicate import BOOLEANS, replicate_fields
from handler.request import ALIASES, CONDITION_FIELDS, DRAWN_SEEDS, GenerationRequest, Limits, shown

CANCEL_PATH = "cancel"
CLIENT_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What a client may call a request, in its header `x-request-id`."""

BODY, MODEL_NAME = "body", "model_name"
"""What TorchServe adds to the fields of a query: a GET's empty body, and at /invocations which model is asked."""

DELIVERY_FIELDS = frozenset({"format", "normalization", "sample_rate", "stream", "stream_format", "timeout"})
"""Fields that do not change the music, only how it is sent; an address has the same music in every format."""

FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
FORM_HELP = (
    "the form holds no fields. `curl -d 'prompt=80s pop'` sends a field; "
    '`curl --json \'{"prompt": "80s pop"}\'` sends JSON, which needs the header `Content-Type: application/json`'
)


class UnknownPathError(RequestError):
    """There is nothing at this path: 404."""


class MediaTypeError(RequestError):
    """The body is of a type that is not read: 415."""


class RequestParser:
    """From what TorchServe hands over to a `GenerationRequest`, for one archive."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._model = GenerationRequest.for_archive(limits)
        properties = self._model.model_json_schema()["properties"]
        self._of_others = {
            name: kind for kind, names in CONDITION_FIELDS.items() for name in names if kind != limits.melody
        }
        self.fields: dict[str, dict[str, Any]] = {
            name: _flat(schema) for name, schema in properties.items() if name not in self._of_others
        }
        """Each field's JSON schema (type, bounds, choices, default, description), and its aliases."""
        for schema in self.fields.values():
            if "contentEncoding" in schema:
                schema |= {"max_bytes": limits.max_upload_bytes, "max_seconds": limits.max_upload_seconds}
        for alias, name in ALIASES.items():
            self.fields[name].setdefault("aliases", []).append(alias)

    def parse(self, row: Mapping[str, Any], headers: Mapping[str, str]) -> Question:
        """Read what is asked.

        Args:
            row: as TorchServe's handlers get it: `{"body": …}`, and one key per field of a form or a query.
            headers: the request's, by lower-case name; `url_path` is the path behind the model's version, and is
                there for addresses under /predictions alone.

        Raises:
            RequestError: (400) naming the field and the bounds; or its kin UnknownPathError (404),
                MediaTypeError (415).
        """
        path = headers.get("url_path", "").strip("/")
        if path == MODELS_PATH:
            return ModelsQuestion()
        if path == CANCEL_PATH:
            return CancelQuestion(self._cancelled(row, headers))
        if path == SPEECH_PATH:
            fields, ignored = speech_fields(self._fields_of_body(row, headers) or {})
            return ClipQuestion(self._request({}, fields), openai=True, ignored=ignored)
        of_path = _fields_of_path(path)
        # Some clients send a content type with a GET, and no body.
        of_body = self._fields_of_body(row, headers) if of_path is None or any(row.values()) else None
        if of_path is None and of_body is None:
            return DescriptionQuestion()
        condition = CONDITION_FIELDS[self.limits.melody][0] if self.limits.melody else None
        fields, ignored = replicate_fields(of_body or {}, condition)
        request = self._request(of_path or {}, fields, is_address=_is_address(row, headers))
        return ClipQuestion(request, ignored=ignored)

    def _request(self, *sources: Mapping[str, Any], is_address: bool = False) -> GenerationRequest:
        values: dict[str, Any] = {}
        for source in sources:
            self._add(values, source)
        if is_address and values.get("seed") is None:
            values["seed"] = _seed_of(values)
        return self._validate(values)

    def _cancelled(self, row: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        body = (self._fields_of_body(row, headers) or {}) if any(row.values()) else {}
        if unknown := body.keys() - {"id"}:
            raise RequestError(min(unknown)[:40], "is not a field; to cancel a request, give its `id`")
        given = body.get("id")
        if given is None:
            given = headers.get("x-request-id")
        if given is None:
            raise RequestError(
                "id", "is missing; give the x-request-id that the request was sent with, as `id` or in that header"
            )
        if isinstance(given, bytes | bytearray):
            given = _text(given, "id")
        if not isinstance(given, str) or not CLIENT_ID.fullmatch(given):
            raise RequestError("id", f"must be 1 to 128 letters, digits and ._:- characters, not {shown(given)}")
        return given

    def _fields_of_body(self, row: Mapping[str, Any], headers: Mapping[str, str]) -> Mapping[str, Any] | None:
        if _media_type(headers) == "multipart/form-data" and "boundary=" not in headers["content-type"].lower():
            raise RequestError(
                None, "the Content-Type header lacks the form's boundary; do not set the header, your HTTP library does"
            )
        if is_form(headers) and not row:
            raise RequestError(None, FORM_HELP)
        if not row:
            return None
        added = set() if "url_path" in headers else {MODEL_NAME}
        if not is_form(headers):
            added |= {BODY}
        # of a form, of a query, or of a call over gRPC, which has no content type
        fields = {name: self._from_form(name, value) for name, value in row.items() if name not in added}
        if is_form(headers) or (fields and not row.get(BODY)):
            return fields
        of_body = self._read_body(row.get(BODY), headers)
        if of_body is None or not fields:
            return of_body
        given = {name: value for name, value in of_body.items() if value is not None}
        if twice := fields.keys() & given.keys():
            raise RequestError(min(twice)[:40], "is given more than once, in the address and in the body")
        return {**fields, **given}

    def _read_body(self, body: Any, headers: Mapping[str, str]) -> Mapping[str, Any] | None:
        media_type = _media_type(headers)
        if media_type == "application/json":
            return _json_object(body)
        if media_type == "text/plain":
            return {"prompt": _text(body, "prompt")}
        if not media_type and not body:
            return None
        raise MediaTypeError(
            None,
            f"a body of type {shown(media_type) if media_type else 'none'} is not read; set the header Content-Type "
            "to application/json, text/plain, application/x-www-form-urlencoded or multipart/form-data",
        )

    def _from_form(self, name: str, value: Any) -> Any:
        """A form's value as its field's type, None if it is empty: a browser sends every field of a form.

        What cannot be read as that type is left for the validation to refuse.
        """
        if not isinstance(value, str | bytes | bytearray):
            return value
        if not value or value.isspace():
            return None
        if name in BOOLEANS and len(value) <= _LONGEST_BOOLEAN:
            return _FORM_BOOLEANS.get(_text(value, name).strip().lower(), value)
        schema = self.fields.get(ALIASES.get(name, name))
        if schema is None or "contentEncoding" in schema:
            return value
        text = _text(value, name)
        match schema["type"]:
            case "boolean":
                return _FORM_BOOLEANS.get(text.strip().lower(), text)
            case "integer" if _FORM_INTEGER.fullmatch(text.strip()):
                return int(text)
            case "number" if _FORM_NUMBER.fullmatch(text.strip()):
                return float(text)
        return text

    def _add(self, values: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Add fields under their own names; a field must come once, by whichever name. None means not given."""
        for key, value in given.items():
            name = ALIASES.get(key, key)
            if value is None and (name in self.fields or name in self._of_others):
                continue
            if name in self._of_others:
                raise RequestError(name, self._of_another_kind(name))
            if name not in self.fields:
                close = difflib.get_close_matches(key[:40], [*self.fields, *ALIASES], n=1)
                hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(self.fields)}"
                raise RequestError(key[:40], f"is not a field; {hint}")
            if name in values:
                others = ", ".join(alias for alias, target in ALIASES.items() if target == name)
                hint = f" (its other names: {others})" if others else ""
                raise RequestError(name, f"is given more than once{hint}")
            values[name] = value

    def _of_another_kind(self, field: str) -> str:
        audio = CONDITION_FIELDS[self._of_others[field]][0]
        variants = ", ".join(variant.name for variant in VARIANTS.values() if audio in variant.conditioners)
        kind = self.limits.melody
        own = "takes neither `melody` nor `style`" if kind is None else f"takes a `{CONDITION_FIELDS[kind][0]}`"
        return f"only models that take a {audio} have it (the variants {variants}); this model {own}"

    def _validate(self, values: dict[str, Any]) -> GenerationRequest:
        request = self._checked(values)
        if isinstance(request, RequestError):
            raise request
        return request

    def _checked(self, values: dict[str, Any]) -> GenerationRequest | RequestError:
        """The request, or what is wrong with it.

        A ValidationError is not seen by the garbage collector. Raised from it, what it holds would refer to it in turn,
        and with it whatever the request brought would stay in memory for ever.
        """
        try:
            return self._model.model_validate(values, context=self.limits)
        except ValidationError as error:
            return self._complaint(error)

    def _complaint(self, error: ValidationError) -> RequestError:
        problem = error.errors(include_url=False)[0]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            return RequestError(cause.field, cause.message)
        field = str(problem["loc"][0])
        if problem["type"] == "string_unicode":
            return RequestError(field, "the text is not valid Unicode")
        return RequestError(field, f"must be {_bounds(self.fields[field])}, not {shown(problem['input'])}")


_FORM_BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
_LONGEST_BOOLEAN = 8  # with white space around it; no audio file is as short
_FORM_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_FORM_NUMBER = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,4})?")


def is_form(headers: Mapping[str, str]) -> bool:
    """Whether a request, its headers by lower-case name, is a form, even one without fields."""
    return _media_type(headers) in FORM_TYPES


def _is_address(row: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether all fields are in the address, so that it can be asked for again: a body came, and it is empty."""
    has_fields = bool(headers.get("url_path") or row.keys() - {BODY, MODEL_NAME})
    return has_fields and row.get(BODY) in (b"", "") and not is_form(headers)


def _seed_of(values: Mapping[str, Any]) -> int:
    """A seed for an address that names none: the same for the same music."""
    music = {name: value for name, value in values.items() if value is not None and name not in DELIVERY_FIELDS}
    text = json.dumps(music, sort_keys=True, default=lambda value: bytes(value).hex())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) % DRAWN_SEEDS


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _fields_of_path(path: str) -> dict[str, Any] | None:
    """The fields of `play/<prompt>.<format>`, which streams what can be streamed; None for no path."""
    if not path:
        return None
    start, _, rest = path.partition("/")
    prompt, dot, audio_format = rest.rpartition(".")
    if start != "play" or not dot:
        raise UnknownPathError(
            None, f"there is nothing at {shown(path)}; post to the model itself, or get play/<prompt>.<format>"
        )
    audio_format = audio_format.lower()
    return {"prompt": prompt, "format": audio_format, "stream": audio_format != "json"}


def _json_object(body: Any) -> dict[str, Any]:
    if isinstance(body, bytes | bytearray):  # TorchServe hands over what it could not parse
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(None, f"the body is not valid JSON ({str(error)[:120]})") from error
    if not isinstance(body, dict):
        raise RequestError(None, f"the JSON body must be an object of fields, not {shown(body)}")
    return body


def _text(value: Any, field: str) -> str:
    try:
        return value if isinstance(value, str) else bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(field[:40], "the text is not valid UTF-8") from error


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without pydantic's title, and with `type | null` and a default of null told by `nullable`."""
    flat = {key: value for key, value in schema.items() if key not in ("title", "anyOf") and value is not None}
    for choice in schema.get("anyOf", []):
        flat |= {"nullable": True} if choice == {"type": "null"} else choice
    if "description" in flat:
        flat["description"] = " ".join(flat["description"].split())  # a docstring has line breaks
    return flat


def _bounds(schema: Mapping[str, Any]) -> str:
    """A field's type and bounds in words, as in "a number from 0 to 10"."""
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "string":
            return f"a text of at most {schema['maxLength']} characters"
    noun = "a whole number" if schema["type"] == "integer" else "a number"
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    bounds = " ".join([noun, *(f"{word} {schema[key]}" for key, word in words.items() if key in schema)])
    return f"{bounds}, or {schema['also']}" if "also" in schema else bounds
