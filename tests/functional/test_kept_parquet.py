"""Kept Parquet fields: every type that pyarrow writes is kept with equal values, or refused before a run begins."""

from __future__ import annotations

import decimal
import os
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.errors import CorpusError
from tests.conftest import Completed
from tests.functional.conftest import EncodeWith
from tests.functional.test_bad_rows import read_ids, read_skipped

M3 = Callable[..., Completed]
NOT_UTF8 = b"\xff\xfe"
FAR = 1 << 62
LONG = "longer than the 12 bytes that a view holds by itself"
ZONES = (None, "UTC", "Europe/Berlin", "Mars/Base", "+05:30")


def _numbers(kind: Any, largest: int = 2) -> Any:
    width = pa.int32() if pa.types.is_temporal(kind) and kind.bit_width == 32 else pa.int64()
    return pa.array([1, None, largest], width).cast(kind)


def _strings(kind: Any) -> Any:
    """Strings of which the middle one is not UTF-8."""
    raw = pa.array([b"ok", NOT_UTF8, None], pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, 3, raw.buffers())


def _in_struct(values: Any) -> Any:
    return pa.StructArray.from_arrays([values, pa.array([b"\xff"] * 3)], ["a", "b"])


def _in_list(values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), values)


_SCALARS = [
    *(pa.array([1, None, 2], getattr(pa, f"{sign}int{bits}")()) for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(pa.array([1.5, None, float("inf")], kind) for kind in (pa.float16(), pa.float32(), pa.float64())),
    *(_numbers(kind) for kind in (pa.time32("s"), pa.time32("ms"))),
    *(_numbers(pa.time64(unit), 86_399_999_999) for unit in ("us", "ns")),
    *(_numbers(pa.timestamp("s", zone), 1 << 52) for zone in ZONES),
    *(_numbers(pa.timestamp(unit, zone), FAR + 1) for unit in ("ms", "us", "ns") for zone in ZONES),
    *(_numbers(pa.duration(unit), FAR + 1) for unit in ("s", "ms", "us", "ns")),
    _numbers(pa.date32(), (1 << 31) - 1),
    _numbers(pa.date64(), 86_400_000 * 10**6),
    pa.array([None, None, None]),
    pa.array([True, None, False]),
    *(pa.array(["a", None, LONG], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *(pa.array([b"a", None, NOT_UTF8 * 9], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    pa.array([b"ab", None, NOT_UTF8], pa.binary(2)),
    *(
        pa.array([decimal.Decimal("1.23"), None, decimal.Decimal("-4.50")], kind)
        for kind in (pa.decimal32(5, 2), pa.decimal64(10, 2), pa.decimal128(20, 2), pa.decimal256(50, 2))
    ),
]
_NESTED = [
    *(pa.array([[1, 2], None, [3, None]], make) for make in (pa.list_(pa.int64()), pa.large_list(pa.int64()))),
    pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
    pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    pa.array([[("a", LONG)], None, []], pa.map_(pa.string_view(), pa.string_view())),
    pa.array([[LONG], None, [None]], pa.list_(pa.string_view())),
    pa.array([[LONG], None, ["a"]], pa.list_(pa.string_view(), 1)),
    *map(_in_struct, [*_SCALARS[-20:], _numbers(pa.timestamp("ns"), FAR + 1), _numbers(pa.duration("s"), FAR)]),
    *map(_in_list, [_numbers(pa.timestamp("ns", "UTC"), FAR + 1), _in_struct(pa.array(["a", None, LONG]))]),
]
_OTHERS = [
    *(pa.array(values).dictionary_encode() for values in (["a", None, "b"], [b"a", None, NOT_UTF8], [1.5, None, 2.5])),
    pa.array(["a", None, "b"]).cast(pa.dictionary(pa.int8(), pa.large_string())),
    _in_struct(pa.array(["a", None, "b"]).dictionary_encode()),
    _in_list(pa.array(["a", None, "b"]).dictionary_encode()),
    pa.array([b"0123456789abcdef", None, b"0" * 16], pa.uuid()),
    pa.array(['{"a":1}', None, "[]"], pa.json_()),
    pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
    pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "name", "vendor"), pa.array(["a", None, "b"])),
]


def _is_written(values: Any) -> bool:
    """Whether this pyarrow writes a type to Parquet: decimal32 from 22 on, list_view from 24 on."""
    try:
        pq.write_table(pa.table({"k": values}), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True


TRIED = {f"{number} {values.type}": values for number, values in enumerate([*_SCALARS, *_NESTED, *_OTHERS])}
KEPT = {name: values for name, values in TRIED.items() if _is_written(values)}
NOT_KEPT = {
    "list_view": pa.array([[1], None, []], pa.list_view(pa.int64())),
    "large_list_view": pa.array([[1], None, []], pa.large_list_view(pa.int64())),
    "a view in an extension": pa.ExtensionArray.from_storage(
        pa.json_(pa.string_view()), pa.array(["[]", None, "{}"], pa.string_view())
    ),
    "an extension in a list": _in_list(pa.array(["[]", None, "{}"], pa.json_())),
    "a struct with a name twice": pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, ["a", "a"]),
}
REFUSED = {name: values for name, values in NOT_KEPT.items() if _is_written(values)}
NOT_IN_PARQUET = (
    *("INTERVAL_MONTHS", "INTERVAL_DAY_TIME", "INTERVAL_MONTH_DAY_NANO"),
    *("RUN_END_ENCODED", "SPARSE_UNION", "DENSE_UNION"),
)


def _write(path: Path, columns: dict[str, Any], *, num_groups: int = 1) -> Path:
    table = pa.table({"text": ["one", "two", "three"], **columns})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(num_groups):
            writer.write_table(table)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, encode_with: EncodeWith) -> tuple[Any, Any]:
    """The input's table and the folder's, with a column for each type."""
    folder = tmp_path_factory.mktemp("kept")
    corpus = _write(folder / "corpus.parquet", KEPT, num_groups=2)
    code = encode_with(corpus, out=folder / "out.m3", outputs=("dense",), keep_fields=tuple(KEPT), shard_size=1 << 20)
    assert code == 0
    return pq.read_table(corpus), pq.read_table(folder / "out.m3" / "rows")


@pytest.mark.parametrize("name", KEPT)
def test_every_type_is_kept_with_equal_values(written: tuple[Any, Any], name: str) -> None:
    wanted, found = (table.column(name) for table in written)
    assert found.cast(wanted.type).equals(wanted)
    if "view" not in str(wanted.type):
        assert found.type == wanted.type


def test_no_type_is_forgotten() -> None:
    every = {value for name, value in vars(pa.lib).items() if name.startswith("Type_")}
    outside = {getattr(pa.lib, f"Type_{name}", None) for name in NOT_IN_PARQUET}
    tried = {values.type.id for values in [*TRIED.values(), *NOT_KEPT.values()]}
    assert every - outside <= tried


@pytest.mark.parametrize("what", REFUSED)
def test_a_type_that_cannot_be_kept_is_refused_first(tmp_path: Path, encode_with: EncodeWith, what: str) -> None:
    corpus = _write(tmp_path / "c.parquet", {"k": REFUSED[what]})
    with pytest.raises(CorpusError, match=r"kept field 'k' is .* in c\.parquet.*leave the field out of --keep-fields"):
        encode_with(corpus, out=tmp_path / "o.m3", keep_fields=("k",))
    assert not (tmp_path / "o.m3").exists()
    assert encode_with(corpus, out=tmp_path / "o.m3", outputs=("dense",)) == 0


IN_ARROW_ONLY = {
    "run_end_encoded": pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", "b"])),
    "union": pa.UnionArray.from_sparse(pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["a"] * 3)]),
    "interval": pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval()),
}


@pytest.mark.parametrize("what", IN_ARROW_ONLY)
def test_a_type_that_parquet_has_not_is_refused_first(tmp_path: Path, encode_with: EncodeWith, what: str) -> None:
    table = pa.table({"text": ["one", "two", "three"], "k": IN_ARROW_ONLY[what]})
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CorpusError, match=r"kept field 'k' is .* in c\.arrow.*leave the field out of --keep-fields"):
        encode_with(tmp_path / "c.arrow", out=tmp_path / "o.m3", keep_fields=("k",))
    assert not (tmp_path / "o.m3").exists()


@pytest.mark.parametrize("name", ["k", "id", "text"])
def test_two_columns_of_one_name_are_refused_first(m3_here: M3, tmp_path: Path, tiny_m3: Path, name: str) -> None:
    columns = [pa.array(["a", "b"])] * 4
    table = pa.Table.from_arrays(columns, names=["text", "id", "k", name])
    pq.write_table(table, tmp_path / "c.parquet")
    done = m3_here("encode", "c.parquet", "--keep-fields", "k", "--model", tiny_m3)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert f"c.parquet has 2 columns named {name!r}: rename" in done.stderr
    assert not (tmp_path / "c.m3").exists()


@pytest.mark.parametrize(
    "values",
    [
        _strings(pa.string()),
        _strings(pa.large_string()),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), _strings(pa.string()).slice(0, 2)),
        _in_list(_strings(pa.string())),
        _in_struct(_strings(pa.string())),
        _in_struct(_in_list(_strings(pa.large_string()))),
        pa.StructArray.from_arrays([_numbers(pa.timestamp("s", "Mars/Base")), _strings(pa.string())], ["t", "s"]),
        pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["a", "b", "c"]), _strings(pa.string())),
        pa.ExtensionArray.from_storage(pa.json_(), _strings(pa.string())),
    ],
    ids=lambda values: str(values.type)[:40],
)
def test_a_row_whose_kept_string_is_not_utf8_is_skipped(tmp_path: Path, encode_with: EncodeWith, values: Any) -> None:
    corpus = _write(tmp_path / "c.parquet", {"id": ["x", "y", "z"], "k": values})
    assert encode_with(corpus, out=tmp_path / "o.m3", outputs=("dense",), keep_fields=("k",)) == 3
    assert read_ids(tmp_path / "o.m3") == ["x", "z"]
    (skipped,) = read_skipped(tmp_path / "o.m3")
    assert (skipped["position"], skipped["reason"]) == (1, "invalid UTF-8")
    assert skipped["detail"] == "in kept field 'k'"


def test_a_run_goes_on_where_a_time_zone_is_unknown(tmp_path: Path, encode_with: EncodeWith) -> None:
    times = pa.array([1, None, 1 << 40], pa.int64()).cast(pa.timestamp("us", "Europe/Berlin"))
    corpus, out = _write(tmp_path / "c.parquet", {"at": times}), tmp_path / "out.m3"
    assert encode_with(corpus, out=out, outputs=("dense",), keep_fields=("at",)) == 0
    zoneinfo.reset_tzpath(to=[])
    zoneinfo.ZoneInfo.clear_cache()
    try:
        os.utime(corpus)
        assert encode_with(corpus, out=out, outputs=("dense",), keep_fields=("at",)) == 0
    finally:
        zoneinfo.reset_tzpath()
