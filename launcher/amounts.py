"""Times and sums of money, as people read them."""

import math
from datetime import timedelta


def duration(time: timedelta) -> str:
    """`12 s`, `7 min`, `3 h 05 min` or `2 d 4 h`."""
    seconds = max(0, math.floor(time.total_seconds()))
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds} s"


def dollars(amount: float | None) -> str:
    """US dollars and cents; `unknown` for None."""
    return "unknown" if amount is None else f"${amount:,.2f}"
