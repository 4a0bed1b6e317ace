"""How chat templates come by today's date."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

# What Transformers gives to every template: the clock, by a format.
CLOCK = "strftime_now"
# A variable that Llama 3's templates take the date from. Where it is not given they set it themselves: by the clock
# (3.2), or to a day of 2024 (3.1), as everyone's prompts have it.
STRING = "date_string"
STRING_FORMAT = "%d %b %Y"
_SETS_STRING = re.compile(rf"\bset\s+{STRING}\s*=")


def writes_date(template: Any) -> bool:
    """Whether a tokenizer's `chat_template` may write today's date."""
    return bool(date_variables(template, datetime.min))


def date_variables(template: Any, date: datetime) -> dict[str, Any]:
    """The template's variables by which today's date is `date`; none for a template without one."""
    text = str(template or "")
    variables: dict[str, Any] = {}
    if CLOCK in text:
        variables[CLOCK] = date.strftime
    if STRING in text and not _SETS_STRING.search(text):
        variables[STRING] = date.strftime(STRING_FORMAT)
    return variables
