"""JSON texts that satisfy a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from llguidance import LLMatcher

from genlm_bytes_smc.constraints.base import ConstraintError, show
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS

_WHITESPACE: dict[str, dict[str, Any]] = {
    "any": {"whitespace_flexible": True},
    "none": {"whitespace_flexible": False},
    "python": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}


class ByteJsonSchema(ByteMatcher):
    """JSON texts, as UTF-8, that a schema accepts.

    llguidance decides byte by byte; where it would let a text end, the `jsonschema` module
    has the last word, so every admitted text is JSON that satisfies the schema (`format` is
    llguidance's own). Not every such text is admitted: an object's properties come in the
    order the schema lists them, others after.

    Args:
        schema: the schema as a mapping, a bool, or JSON text; or a class that knows its own
            (pydantic's `model_json_schema`).
        whitespace: between tokens, "any" JSON whitespace, "none", "python" for the spaces
            `json.dumps` writes, or a regular expression.
        device: where weights are returned (None: the CPU).
        max_states: matchers held between calls (1 KiB and some 100 bytes a byte read, each).

    Raises:
        ConstraintError: the schema is no JSON, breaks its meta-schema (with the place), or
            uses a keyword that llguidance does not support (named).
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | str | type,
        whitespace: str = "any",
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        self.schema = _checked(schema)
        self.whitespace = whitespace
        options = _WHITESPACE.get(whitespace, {"whitespace_pattern": whitespace})
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(self.schema), overrides=options)
        except ValueError as e:
            raise ConstraintError(f"llguidance refuses this schema: {e}") from None
        super().__init__(grammar, device, max_states)
        self._validator = validator_for(self.schema)(self.schema)

    def _may_end(self, node: int) -> bool:
        # llguidance lets {"type": "number", "exclusiveMinimum": 0} be 0, for one.
        try:
            return bool(self._validator.is_valid(json.loads(self.text(node))))
        except RecursionError:  # nested too deeply to be looked at again
            return True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_validator"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._validator = validator_for(self.schema)(self.schema)

    def summary(self) -> dict[str, str]:
        """What `repr` and the notebook view show, name by name."""
        return {"schema": show(self.schema), "whitespace": self.whitespace, **super().summary()}


def _checked(schema: Any) -> dict[str, Any]:
    """The schema as plain JSON data, valid under its meta-schema."""
    if isinstance(schema, type) and callable(getattr(schema, "model_json_schema", None)):
        schema = schema.model_json_schema()  # type: ignore[attr-defined]
    if isinstance(schema, bytes | bytearray):
        schema = schema.decode("utf-8", "replace")
    try:
        data = json.loads(schema if isinstance(schema, str) else json.dumps(schema, default=_plain))
    except (TypeError, ValueError) as e:
        raise ConstraintError(f"a schema is JSON data or JSON text: {e}") from None
    if not isinstance(data, dict | bool):
        raise ConstraintError(f"a schema is an object or a bool, got {show(data)}")
    if isinstance(data, bool):
        if not data:
            raise ConstraintError("the schema false accepts nothing: no text would be left")
        return {}
    try:
        validator_for(data).check_schema(data)
    except SchemaError as e:
        raise ConstraintError(f"not a JSON Schema: at {e.json_path}, {e.message}") from None
    return data


def _plain(part: Any) -> Any:
    """A mapping that is no `dict`, as one."""
    if isinstance(part, Mapping):
        return dict(part)
    raise TypeError(f"{type(part).__name__} is no JSON data: {part!r}")
