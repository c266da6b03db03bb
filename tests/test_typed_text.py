"""Words and YAML files: the field gives a text its type; needless YAML is refused."""

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from exactflow.cli.settings import resolve
from exactflow.cli.words import read_file
from exactflow.core.config import override
from exactflow.core.typed_text import MAX_BYTES, Typed, read_yaml


@dataclass(frozen=True)
class Fields:
    text: str = ""
    maybe: str | None = None
    count: int = 0
    limit: int | None = None
    rate: float = 0.0
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    shape: tuple[int, int] = (0, 0)
    steps: tuple[tuple[int, ...], ...] = ()


MEANINGS: list[tuple[str, str, Any]] = [
    *(("text", text, text) for text in ("photos #1", "2024", "no", "1e5", "a: b", "~", "[x]")),
    *(("maybe", text, text) for text in ("2024", "on", "{a}", "*x", "&x", "!x", "'q'", "NULLs")),
    ("maybe", "null", None),
    ("limit", "null", None),
    ("limit", "12", 12),
    ("count", "010", 10),
    ("count", "-3", -3),
    ("count", "50_000", 50_000),
    ("count", "1e6", 1_000_000),
    ("rate", "1e-3", 1e-3),
    ("rate", "1E-3", 1e-3),
    ("rate", ".5", 0.5),
    ("rate", "2", 2.0),
    ("rate", "010", 10.0),
    ("rate", ".inf", float("inf")),
    ("on", "true", True),
    ("on", "No", False),
    ("mode", "slow", "slow"),
    ("shape", "[8, 010]", (8, 10)),
    ("steps", "[[1, 2], [3]]", ((1, 2), (3,))),
]


@pytest.mark.parametrize(("field", "text", "value"), MEANINGS)
def test_a_word_means_what_its_field_holds(field: str, text: str, value: Any) -> None:
    found = getattr(override(Fields(), {field: Typed(text)}), field)
    assert found == value
    assert type(found) is type(value), "and nothing is left of how it came"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        *(case for case in MEANINGS if case[0] in ("count", "limit", "rate", "on", "mode")),
        *(case for case in MEANINGS if case[0] in ("shape", "steps")),
        *(("text", text, text) for text in ("2024", "no", "1e5", "010", "0x10", "1:30", "on")),
        ("text", "'# a: b'", "# a: b"),
        ("maybe", "'null'", "null"),
    ],
)
def test_a_file_means_the_same(field: str, text: str, value: Any) -> None:
    assert getattr(override(Fields(), read_yaml(f"{field}: {text}", "file")), field) == value


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("count", "1.5", "count: expected int, got '1.5'"),
        ("count", "0x10", "expected int"),
        ("count", "1:30", "expected int"),
        ("count", "", "expected int"),
        ("count", "null", "expected int, got 'null'"),
        ("count", "true", "expected int"),
        ("count", "٣", "expected int"),
        ("count", "9223372036854775808", "expected int"),
        ("count", "1e999999999", "expected int"),
        ("rate", "high", "rate: expected float, got 'high'"),
        ("on", "1", "on: expected bool, got '1'"),
        ("mode", "slwo", "did you mean 'slow'"),
        ("shape", "8", "expected a list of values, got '8'"),
        ("shape", "[8", "is not YAML"),
        ("shape", "[&a 8, *a]", "anchors are not read"),
        ("steps", "[" * 99, "levels of nesting"),
    ],
)
def test_what_the_field_cannot_hold_is_refused(field: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(Fields(), {field: Typed(text)})


@given(st.text(), st.one_of(st.none(), st.text()), st.floats(allow_nan=False), st.booleans())
def test_what_is_written_is_read(text: str, maybe: str | None, rate: float, on: bool) -> None:
    written = {"text": text, "maybe": maybe, "rate": rate, "on": on, "shape": [1, 2]}
    found = override(Fields(), read_yaml(yaml.safe_dump(written), "file"))
    assert found == replace(Fields(), text=text, maybe=maybe, rate=rate, on=on, shape=(1, 2))


BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in pairwise("abcd"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: {limit: 1}\ndata: {limit: 2}\n", "line 2: the key 'data' stands here twice"),
        (b"data:\n  limit: 1\n  'limit': 2\n", "line 3: the key 'limit' stands here twice"),
        (BOMB.encode(), "line 1: YAML anchors are not read"),
        (b"data: " + b"[" * 100_000, "levels of nesting"),
        (b"data: {source: !!python/name:os.system x}", "tags such as"),
        (b"preset: a\n---\npreset: b\n", "expected one YAML document"),
        (b"? [a]\n: 1\n", "expected text as a key"),
        (b"3: 4\n", "unknown section '3'"),
        (b"on: 4\n", "unknown section 'on'"),
        (b"null: 4\n", "unknown section 'null'"),
        (b"data: {3: 4}\n", "unknown field '3' of DataConfig"),
        (b"preset: [a]\n", "expected a preset's name"),
        ("preset: tarflow-tiny\n".encode("utf-16"), "expected text in UTF-8, found UTF-16"),
        ("preset: \u00e9\n".encode("latin-1"), "found byte 0xe9 at 8"),
        (b"preset: \x1b[31m", "is not YAML"),
        (b"a: [\n", "is not YAML"),
        (b"#" * (MAX_BYTES + 1), "at most"),
        (b"", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_settings_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        resolve("tarflow-tiny", [], file)
    assert "\n" not in str(caught.value)
    assert "run.yaml" in str(caught.value) or "DataConfig" in message


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "zero"):
        with pytest.raises(ValueError, match="expected a YAML file"):
            read_file(path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.yaml")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("preset: tarflow-tiny\n".encode("utf-8-sig"))
    assert read_file(tmp_path / "run.yaml") == {"preset": "tarflow-tiny"}
