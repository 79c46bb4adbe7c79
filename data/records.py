"""One reader for all records: JSON files and their lines, held against the schema that their owner declares.

A schema is a class derived from `Record`, or any other type that pydantic knows. Whatever is wrong with a record
becomes one DataError that names the file, the key, what is there and what should be. Keys that a schema does not name
are let through, so newer records can be read.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data import DataError
from data.files import plain_name

T = TypeVar("T")

# No text passes for a number, no 1 for True, and no infinity (1e999) for a figure.
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

# A number of things; JSON has larger ones, which nothing here could hold.
Count = Annotated[int, Field(ge=0, lt=2**63)]

# A file's name as data.files.plain_name has it: records may point at nothing outside their folder.
PlainName = Annotated[str, AfterValidator(plain_name)]


class Record(BaseModel):
    """Base of the schemas of JSON objects; `model_dump()` gives the dict again, unnamed keys included."""

    model_config = STRICT


def read_record(path, schema: type[T], what: str) -> T:
    """The JSON file at `path` as `schema` describes it. what: what it should be, e.g. "a run's record"."""
    return validated(parsed(read_text(Path(path), what), str(path)), schema, str(path), what)


def read_rows(path, schema: type, what: str) -> list[dict]:
    """The lines of a JSONL file as they stand, once `schema` accepts each; a last line that a kill cut short is left out."""
    rows, lines = [], read_text(Path(path), what).split("\n")
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        try:
            rows.append(parsed(line, where))  # as it stands: what is written again stays the same text
        except DataError:
            if number < len(lines):
                raise
        else:
            validated(rows[-1], schema, where, what)
    return rows


def read_text(path: Path, what: str) -> str:
    """A record's text; bytes that are no UTF-8 come through as escapes, for the parser to stumble over."""
    try:
        return path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError:
        raise DataError(f"there is no {path}, which should be {what}: check path, or restore it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def parsed(text: str, where: str):
    """The value of a JSON text. NaN and infinity, which JSON lacks but Python writes, are read as null."""
    try:
        text.encode()  # finds what was no UTF-8
        return json.loads(text, parse_constant=lambda constant: None)
    except (ValueError, RecursionError) as error:
        kinds = {UnicodeEncodeError: "no UTF-8 text", RecursionError: "nested too deeply"}
        why = kinds.get(type(error), f"no JSON: {error}")
        raise DataError(f"{where} is damaged ({why}); restore it, or make it again") from None


def validated(value, schema: type[T], where: str, what: str) -> T:
    """A value as `schema` describes it, or a DataError about the first key that differs."""
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise DataError(f"{where} is not {what}: {_difference(error.errors(include_url=False))}") from None


@lru_cache(maxsize=64)
def _adapter(schema) -> TypeAdapter:
    return TypeAdapter(schema)


def _difference(errors: list[dict]) -> str:
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" ({len(errors) - 1} more like this)" if len(errors) > 1 else ""
    if first["type"] == "missing":
        return f"it has no {key}{more}"
    there = json.dumps(first["input"], default=repr)
    there = there if len(there) <= 60 else there[:57] + "..."
    should = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
    if first["type"] in ("model_type", "dict_type", "dict_attributes_type"):
        should = "it should be a JSON object"
    return f"{key or 'the whole of it'} is {there}: {should}{more}"
