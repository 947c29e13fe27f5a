"""Prefixes on disk: they come back exactly, and a damaged, foreign or missing file is only a miss."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.llm import LLM, load
from indexshare.engine.prefix_store import MAGIC, PrefixStore, purge
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.sequence import Generation, Output
from indexshare.errors import ConfigError

KEY = bytes(range(16))


def ask(llm: LLM, directory: Path, generation: Generation, **options: object) -> list[Output]:
    """Serve one request in an engine of its own, as after a restart."""
    outputs: list[Output] = []
    settings = {"page_size": 4, "cache_tokens": 400, "num_drafts": 2, "adapts_drafts": False, **options}
    engine = Engine(llm, EngineOptions(prefix_store=directory, **settings), deliver=outputs.extend)
    engine.submit(generation)
    while engine.step():
        pass
    engine.close()
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


def pages(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*/tenant-*/*.page"))


@pytest.fixture
def request_() -> Generation:
    return Generation(prompt_ids=tuple(range(20, 61)), params=SamplingParams(max_new_tokens=12), scope="somebody")


def test_a_prefix_survives_a_restart(tiny_llm: LLM, tmp_path: Path, request_: Generation) -> None:
    first = ask(tiny_llm, tmp_path, request_)
    again = ask(tiny_llm, tmp_path, replace(request_))
    assert tokens(again) == tokens(first)
    assert first[0].num_cached_tokens == 0 and again[0].num_cached_tokens == 40
    for file in pages(tmp_path):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_another_tenant_another_model_another_page_size_find_nothing(
    tiny_llm: LLM, tiny_directory: Path, tmp_path: Path, request_: Generation
) -> None:
    ask(tiny_llm, tmp_path, request_)
    assert ask(tiny_llm, tmp_path, replace(request_, scope="else"))[0].num_cached_tokens == 0
    assert ask(tiny_llm, tmp_path, replace(request_), page_size=8)[0].num_cached_tokens == 0
    other = load(tiny_directory, device="cpu", dtype="bfloat16", threads=1)
    assert ask(other, tmp_path, replace(request_))[0].num_cached_tokens == 0


def test_weights_held_in_another_way_find_nothing(tmp_path: Path) -> None:
    ask_for = Generation(prompt_ids=tuple(range(20, 161)), params=SamplingParams(max_new_tokens=4))
    options = {"page_size": 64, "cache_tokens": 4096}
    for quant in (None, "int8", "int4"):
        llm = load("nano", device="cpu", threads=1, quant=quant)
        cold = ask(llm, tmp_path, replace(ask_for), **options)
        assert cold[0].num_cached_tokens == 0, quant
        assert ask(llm, tmp_path, replace(ask_for), **options)[0].num_cached_tokens == 128


def test_something_else_in_the_place_of_a_page_is_a_miss(tiny_llm: LLM, tmp_path: Path, request_: Generation) -> None:
    first = ask(tiny_llm, tmp_path, request_)
    for file in pages(tmp_path):
        file.unlink()
        file.mkdir()
        (file / "x").touch()
    assert tokens(ask(tiny_llm, tmp_path, replace(request_))) == tokens(first)


def test_a_purged_store_goes_on(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, "model", max_bytes=10**6)
    purge(tmp_path)
    assert store.put("t", KEY, b"rows")
    store.close()
    assert len(pages(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "magic", "longer"])
def test_a_damaged_page_is_skipped_and_removed(
    tiny_llm: LLM, tmp_path: Path, request_: Generation, damage: str
) -> None:
    first = ask(tiny_llm, tmp_path, request_)
    chain = sorted(pages(tmp_path), key=lambda file: file.stat().st_mtime_ns)
    content = bytearray(chain[3].read_bytes())
    match damage:
        case "flip":
            content[-5] ^= 1
        case "truncate":
            del content[-7:]
        case "empty":
            content.clear()
        case "magic":
            content[0] ^= 1
        case "longer":
            content += b"x"
    chain[3].write_bytes(content)
    again = ask(tiny_llm, tmp_path, replace(request_))
    assert tokens(again) == tokens(first) and again[0].num_cached_tokens == 12
    assert ask(tiny_llm, tmp_path, replace(request_))[0].num_cached_tokens == 40, "a good page took its place"


def test_the_size_is_kept_the_oldest_go_first(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, "model", max_bytes=4 * (1000 + len(MAGIC) + 32))
    keys = [bytes([number]) * 16 for number in range(7)]
    for key in keys[:4]:
        store.put("t", key, bytes(1000))
    store._queue.put(None)
    store._writer.join()
    store = PrefixStore(tmp_path, "model", max_bytes=4 * (1000 + len(MAGIC) + 32))
    assert store.get("t", keys[0], 1000) == bytes(1000)
    for key in keys[4:]:
        store.put("t", key, bytes(1000))
    store.close()
    assert [("t", key) in store for key in keys] == [True, False, False, False, True, True, True]
    assert store.num_bytes == sum(file.stat().st_size for file in pages(tmp_path))


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(tmp_path, "model", max_bytes=10**6)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    store.put("t", KEY, b"rows")
    store.close()
    assert pages(tmp_path) == [] and not list(tmp_path.rglob("*.part"))


def test_purge_removes_pages_and_nothing_else(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", "model", max_bytes=10**6)
    store.put("t", KEY, b"rows")
    store.close()
    (page,) = pages(tmp_path / "store")
    outside = tmp_path / "letter.page"
    outside.write_text("dear")
    (page.parent / ("ab" * 16 + ".page")).symlink_to(outside)
    (page.parent / "notes.txt").write_text("mine")
    (tmp_path / "store" / "photos").mkdir()
    assert purge(tmp_path / "store") == 1
    assert outside.read_text() == "dear" and (page.parent / "notes.txt").exists() and not page.exists()
    with pytest.raises(ConfigError, match="cannot read"):
        purge(tmp_path / "missing")
    with pytest.raises(ConfigError, match="holds no prefixes"):
        purge(tmp_path)


def test_an_unusable_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        PrefixStore(tmp_path / "file", "model", max_bytes=1)
