"""Flags that would be read and change nothing: refused, for whoever typed one expects something of it."""

from __future__ import annotations

from collections.abc import Mapping

from m3cli.errors import UsageError


def check_ignored_options(typed: Mapping[str, object], *, beside: str, reason: str) -> None:
    """Refuse the first flag that was typed.

    Args:
        typed: values by flag; None and '' are those of a flag that was not given.
        beside: the flag, and its value, that makes the others idle.
        reason: why it does.

    Raises:
        UsageError: one was typed.
    """
    for flag, value in typed.items():
        if value not in (None, ""):
            raise UsageError(f"{flag} {value} with {beside}: {reason}; leave {flag} out")
