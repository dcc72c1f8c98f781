import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.sources import json_stream
from data_tools.sources.base import AnnotationError
from data_tools.sources.json_stream import entries

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
COMMON = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path: Path, key: str | None = None) -> list[Any]:
    return [entry for _, entry in entries(path, key)]


@COMMON
@given(
    items=st.lists(JSON, max_size=6),
    others=st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_equals_the_plain_parser(
    items: list[Any],
    others: dict[str, Any],
    block: int,
    indent: int | None,
    ascii_only: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    monkeypatch.setattr(json_stream, "_EDGE", 64)
    path = tmp_path / "a.json"
    others.pop("items", None)
    for tree, key in ((items, None), ({"a": 1, "items": items, **others}, "items")):
        path.write_text(json.dumps(tree, indent=indent, ensure_ascii=ascii_only), "utf-8", "surrogatepass")
        try:
            path.read_text("utf-8")
        except UnicodeDecodeError:  # a lone surrogate written as it is: no UTF-8
            with pytest.raises(AnnotationError):
                read(path, key)
            continue
        assert read(path, key) == json.loads(json.dumps(items))


@COMMON
@given(items=st.lists(JSON, min_size=1, max_size=6), block=st.integers(1, 40), data=st.data())
def test_a_cut_file_is_an_error(
    items: list[Any], block: int, data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "a.json"
    text = json.dumps({"items": items})
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))], "utf-8")
    with pytest.raises(AnnotationError, match=r"a\.json: line 1 column \d+"):
        read(path, "items")


@pytest.mark.parametrize("block", [4, 1 << 20])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"images": [\n {"a": 1},\n {"a": }\n]}', ["line 3 column 8", "images[1]", "Expecting value"]),
        ('{"images": [{"a": 1} {"a": 2}]}', ["line 1 column 22", "',' or ']' after images[0]"]),
        ('{"other": [1, 2], "x": {}}', ["field 'images' is missing"]),
        ('{"images": {"a": 1}}', ["found '{'", "the list 'images'"]),
        ('{"images": [1], "images": [2]}', ["'images' stands in the object twice"]),
        ("[1, 2]", ["line 1 column 1", "start of an object"]),
        ("", ["the file ends"]),
    ],
)
def test_faults_are_placed(
    block: int, text: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    with pytest.raises(AnnotationError) as caught:
        read(path, "images")
    for part in ["a.json", *parts]:
        assert part in str(caught.value)


def test_an_early_fault_of_a_large_file_does_not_read_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"a": x}' + " " * 300_000 + "]}", "utf-8")
    monkeypatch.setattr(json_stream, "BLOCK", 10_000)
    monkeypatch.setattr(json_stream, "MAX_ENTRY", 50_000)
    with pytest.raises(AnnotationError, match="line 1 column 19"):
        read(path, "images")


@pytest.mark.parametrize(
    "data", [b'["\xff\xfe"]', b"[" * 200_000, b'["' + b"a" * 100_000, b"[" + b"9" * 5000]
)
def test_hostile_files(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ENTRY", 50_000)
    monkeypatch.setattr(json_stream, "BLOCK", 10_000)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=r"a\.json"):
        read(path)


def test_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"images": [1, 2]}')
    assert [where for where, _ in entries(path, "images")] == [f"{path}: images[0]", f"{path}: images[1]"]
    path.write_text("[7]", "utf-8")
    assert list(entries(path)) == [(f"{path}: entry [0]", 7)]
