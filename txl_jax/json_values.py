"""Values read from JSON that anybody could have written: of the right form, or left out."""

import json
import math
from datetime import UTC, datetime
from typing import Any

_WHOLE = 1 << 63
_YEAR_10000 = 253402300800.0


def parse(content: bytes | str | None) -> Any:
    """What JSON says; None if it is none."""
    try:
        return json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON's integers have no bounds
        return None
    return found if math.isfinite(found) else None


def count(value: Any) -> int | None:
    """A whole number of things, from 0, that 64 bits hold; None for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < _WHOLE else None


def text(value: Any) -> str:
    """A text, or an empty one for anything else."""
    return value if isinstance(value, str) else ""


def seconds(value: Any) -> float | None:
    """A time in seconds since 1970 for which there is a date; None for anything else."""
    found = number(value)
    return found if found is not None and 0 <= found < _YEAR_10000 else None


def moment(value: Any) -> datetime | None:
    """A time since 1970 in ISO 8601, in UTC if it does not say where; None for anything else."""
    try:
        found = datetime.fromisoformat(text(value))
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return found if seconds(found.timestamp()) is not None else None


def listed(value: Any) -> list[Any]:
    """A list, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """What has names, or nothing for anything else."""
    return value if isinstance(value, dict) else {}
