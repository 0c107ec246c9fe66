"""run.json of another version, and of a hand that sealed what it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3cli.errors import DamageFound, ForeignFolder
from m3cli.store.documents import dumps_with_checksum, read_run, run_document
from m3cli.store.layout import RUN_NAME
from tests.store import samples


def seal_run(root: Path, **changes: Any) -> None:
    (root / RUN_NAME).parent.mkdir(exist_ok=True)
    (root / RUN_NAME).write_bytes(dumps_with_checksum({**run_document(samples.make_run()), **changes}))


def test_a_run_of_another_version_with_other_members_is_refused_by_name(tmp_path: Path) -> None:
    seal_run(tmp_path, m3cli_version="0.0.9", meaning={})
    with pytest.raises(ForeignFolder, match=r"written by m3cli 0\.0\.9"):
        read_run(tmp_path)


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    seal_run(tmp_path)
    assert read_run(tmp_path) == samples.make_run()


RUN = run_document(samples.make_run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {**RUN["config"], "limit": []}}, r"run\.json .*: config\.limit is \[\], expected an integer"),
        ({"config": {**RUN["config"], "outputs": ["dense", 1]}}, r"config\.outputs\[1\] is 1, expected one of dense"),
        ({"config": {**RUN["config"], "mcls": True}}, r"config\.mcls is true, expected an integer"),
        ({"config": {**RUN["config"], "new": 1}}, r"config\.new is a member that this m3 does not know"),
        ({"config": {**RUN["config"], "prefix": "x"}}, "fingerprint is not that of its members"),
        ({"runtime": {"threads": 1}}, r"runtime\.max_batch_tokens is missing"),
        ({"runtime": {"threads": 0, "max_batch_tokens": 1}}, r"runtime\.threads is 0, expected a number from 1 to"),
        ({"sources": [1]}, r"sources\[0\] is 1, expected an object"),
    ],
)
def test_a_member_that_is_not_what_m3_writes_is_damage_that_names_it(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    seal_run(tmp_path, **changes)
    with pytest.raises(DamageFound, match=message):
        read_run(tmp_path)
