"""Metrics count what happened; the engine is asked when somebody scrapes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.scripted import ScriptedService

from indexshare.chat.types import Done, Start, Text, Usage
from indexshare.engine.sampler import SampledToken
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.metrics import Metrics
from indexshare.server.types import Piece

TOKEN = SampledToken(token_id=1, logprob=-0.5)
USAGE = Usage(num_prompt_tokens=7, num_completion_tokens=4, num_cached_tokens=3)
SCRIPT = [
    Piece(events=(Start(7),)),
    Piece(events=(Text("a"),), tokens=(TOKEN,)),
    Piece(events=(Text("b"),), tokens=(TOKEN, TOKEN)),
    Piece(events=(Done("stop", USAGE),), tokens=(TOKEN,)),
]


def scrape(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, in the alphabetical order of the labels."""
    text = asyncio.run(metrics.render()).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def ask(metrics: Metrics, *requests: tuple[str, str, dict[str, Any]], script: Sequence[Piece] = SCRIPT) -> list[int]:
    app = create_app(ScriptedService(lambda request: script), ServerSettings(), metrics=metrics)

    async def send() -> list[int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [(await client.request(method, path, **rest)).status_code for method, path, rest in requests]

    return asyncio.run(send())


CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/messages", CHAT | {"max_tokens": 9}),
        ("/v1/completions", {"model": "scripted", "prompt": "x"}),
    ],
)
def test_a_reply_is_counted_in_every_dialect(path: str, body: dict[str, Any]) -> None:
    metrics = Metrics()
    assert ask(metrics, ("POST", path, {"json": body})) == [200]
    samples = scrape(metrics)
    assert samples["indexshare_requests_total", "POST", path, "200"] == 1
    assert samples["indexshare_requests_in_flight",] == 0
    assert samples["indexshare_time_to_first_token_seconds_count",] == 1
    assert samples["indexshare_inter_token_seconds_count",] == 2
    for kind, number in {"prompt": 7, "cached": 3, "completion": 4}.items():
        assert samples["indexshare_tokens_total", kind] == number


def test_a_reply_that_breaks_off_counts_what_was_drawn() -> None:
    metrics = Metrics()
    ask(metrics, ("POST", "/v1/chat/completions", {"json": CHAT}), script=SCRIPT[:3])
    assert scrape(metrics)["indexshare_tokens_total", "completion"] == 3


def test_strangers_cannot_make_up_series() -> None:
    metrics = Metrics()
    assert ask(metrics, *[("GET", f"/nowhere/{number}", {}) for number in range(20)]) == [404] * 20
    assert ask(metrics, *[("GET", f"/v1/models/{number}", {}) for number in range(20)]) == [404] * 20
    samples = scrape(metrics)
    assert samples["indexshare_requests_total", "GET", "unknown", "404"] == 20
    assert len([key for key in samples if key[0] == "indexshare_requests_total"]) == 2


def test_metrics_of_two_servers_are_apart() -> None:
    one, two = Metrics(), Metrics()
    ask(one, ("GET", "/health", {}))
    assert ("indexshare_requests_total", "GET", "/health", "200") in scrape(one)
    assert ("indexshare_requests_total", "GET", "/health", "200") not in scrape(two)


def test_the_engine_is_asked_at_each_scrape_and_not_before() -> None:
    asked = []

    def stats() -> dict[str, Any]:
        asked.append(1)
        return {
            "waiting": 2,
            "free_pages": 5,
            "steps": 9.0 + len(asked),
            "drafted": (10, 6),
            "accepted": [8, 3],
            "expert_tokens": {3: {0: 11, 1: 4}},
            "something_new": 1.5,
        }

    metrics = Metrics(stats)
    assert not asked
    samples = scrape(metrics)
    assert samples["indexshare_engine_waiting",] == 2
    assert samples["indexshare_engine_steps_total",] == 10
    assert samples["indexshare_engine_drafted_total", "1"] == 6
    assert samples["indexshare_engine_accepted_total", "0"] == 8
    assert samples["indexshare_engine_expert_tokens_total", "1", "3"] == 4
    assert samples["indexshare_engine_something_new",] == 1.5
    assert scrape(metrics)["indexshare_engine_steps_total",] == 11


def test_an_engine_that_is_still_loading_has_no_figures() -> None:
    assert not [key for key in scrape(Metrics(dict)) if key[0].startswith("indexshare_engine")]
