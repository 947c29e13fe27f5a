"""The page's files: exactly the table is served, and they keep what the page promises (tests/e2e drives it)."""

import re
from importlib.resources import files

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from indexshare.server import page

DIRECTORY = files("indexshare.server") / "page"
TEXTS = {entry.name: entry.read_text(encoding="utf-8") for entry in DIRECTORY.iterdir()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


def get(path: str, **headers: str) -> httpx2.Response:
    client = TestClient(Starlette(routes=list(page.routes())), base_url="http://127.0.0.1")
    return client.get(path, headers=headers)


@pytest.mark.parametrize(("path", "name"), page.FILES.items())
def test_each_file_is_served_as_what_it_is(path: str, name: str) -> None:
    answer = get(path)
    assert answer.status_code == 200
    assert answer.text == TEXTS[name]
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == kinds[name.split(".")[-1]]
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_table_names_every_file_and_no_other() -> None:
    assert sorted(page.FILES.values()) == sorted(TEXTS)


@pytest.mark.parametrize(
    "path",
    "/page /page/ /page/index.html /page/../page.py /page/..%2fpage.py /page/%2e%2e/http.py //page/page.js".split(),
)
def test_nothing_else_is_served(path: str) -> None:
    assert get(path).status_code == 404


def test_only_get_and_head_are_answered() -> None:
    client = TestClient(Starlette(routes=list(page.routes())))
    assert client.post("/").status_code == 405
    assert client.head("/").content == b""


def test_an_unchanged_file_is_not_sent_again() -> None:
    etag = get("/").headers["etag"]
    assert get("/", **{"if-none-match": etag}).status_code == 304
    assert get("/", **{"if-none-match": '"another"'}).status_code == 200
    assert get("/page/page.js").headers["etag"] != etag


def test_files_refer_to_each_other_only() -> None:
    for name, text in TEXTS.items():
        addresses = re.findall(r"https?://[^\s\"']+", text)
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, name
        for reference in re.findall(r"""(?:src|href)="(/[^"]*)"|from "\.(/[^"]*)\"""", text):
            path = reference[0] or f"/page{reference[1]}"
            assert path in page.FILES, f"{name} refers to {path}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_of_the_model_cannot_become_markup(name: str) -> None:
    """Nothing in the scripts parses HTML or runs text; the policy would stop inline code, but not a link or a form."""
    parsers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|setHTML|\beval\b|\bFunction\("
    assert not re.search(parsers, SCRIPTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_files_read_in_one_sitting(name: str) -> None:
    assert len(TEXTS[name].splitlines()) <= 300
    assert max(map(len, TEXTS[name].splitlines())) <= 140 or not name.endswith(".js") or name == "i18n.js"


def words(language: str) -> dict[str, str]:
    block = re.search(rf"\n  {language}: \{{\n(.*?)\n  \}},", TEXTS["i18n.js"], re.DOTALL)
    assert block
    entries = re.findall(r'^    (\w+): "(.*)",$', block[1], re.MULTILINE)
    assert len(entries) == len(block[1].splitlines()), "one entry a line"
    return dict(entries)


def test_both_languages_say_everything() -> None:
    english, chinese = words("en"), words("zh")
    assert list(english) == list(chinese)
    for key in english:
        assert set(re.findall(r"\{\w+\}", english[key])) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_word_that_is_asked_for_exists_and_none_is_left_over() -> None:
    known = set(words("en"))
    marked = set(re.findall(r'data-t(?:-\w+)?="(\w+)"', TEXTS["index.html"]))
    code = "".join(text for name, text in SCRIPTS.items() if name != "i18n.js")
    assert marked <= known
    assert set(re.findall(r'(?:\bt\(|makeButton\(|announce\()"(\w+)"', code)) <= known
    assert set(re.findall(r'(?:say\([^"]*?, |showBanner\(|new Failure\(|remark\()"(\w+)"', code)) <= known
    assert known - marked == {key for key in known - marked if f'"{key}"' in code}
