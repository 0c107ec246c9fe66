from __future__ import annotations

import pytest

from m3cli.errors import ForeignFolder
from m3cli.jobs.run import parse_run


def test_a_run_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ForeignFolder, match=r"written by m3cli 0\.0\.9"):
        parse_run({"m3cli_version": "0.0.9", "config": {}})


def test_a_member_that_this_version_does_not_know_is_refused() -> None:
    with pytest.raises(ForeignFolder, match="cannot read it"):
        parse_run({"m3cli_version": "9", "config": {"fields": {"kept": [], "columns": [], "new": 1}, "outputs": []}})
