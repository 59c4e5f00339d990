"""The load generator: when requests go out, what is measured, and what it says of itself."""

import asyncio
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from fake_server import serving
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.errors import ConfigError, KvistError
from kvist.loadgen.client import Client, Endpoint
from kvist.loadgen.drive import Outcome, Target, drive, find_model
from kvist.loadgen.report import Latencies, in_flight, meets, parse_slo, percentile, summarize
from kvist.loadgen.traces import read_trace, replay
from kvist.loadgen.workload import Call, Lengths, Synthetic, synthesize, words

FIXTURES = Path(__file__).parents[1] / "fixtures" / "traces"


def run(url: str, calls: Sequence[Call], **target: object) -> list[Outcome]:
    async def work() -> list[Outcome]:
        client = Client(url, "a key")
        try:
            return await drive(client, Target("fake-1", **target), calls)  # type: ignore[arg-type]
        finally:
            client.close()

    return asyncio.run(work())


def calls(count: int, gap: float = 0.0, tokens: int = 4) -> list[Call]:
    return [Call(i * gap, words(10, str(i)), tokens, conversation=i) for i in range(count)]


# -- what is asked, and when ---------------------------------------------------------------------


def test_poisson_arrivals_come_at_the_rate_and_constant_ones_evenly():
    poisson = [c.at for c in synthesize(Synthetic(2000, 10.0, seed=1))]
    assert poisson == sorted(poisson)
    assert poisson[-1] == pytest.approx(200, rel=0.1)
    gaps = [b - a for a, b in pairwise(poisson)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.15)  # as an exponential's is
    even = [c.at for c in synthesize(Synthetic(5, 10.0, "constant"))]
    assert even == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_workload_follows_from_its_seed():
    made = [synthesize(Synthetic(9, 2.0, input_tokens=Lengths(5, 90), seed=s)) for s in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_lengths_are_words_within_their_range():
    workload = Synthetic(50, 1.0, input_tokens=Lengths(5, 9), output_tokens=Lengths(2, 3))
    made = synthesize(workload)
    assert {len(c.text.split()) for c in made} == {5, 6, 7, 8, 9}
    assert {c.max_tokens for c in made} == {2, 3}


def test_conversations_share_so_many_prefixes():
    made = synthesize(Synthetic(40, 1.0, prefix_tokens=30, prefixes=3))
    systems = {c.system for c in made}
    assert len(systems) == 3
    assert {len(system.split()) for system in systems} == {30}


def test_turns_are_due_a_think_time_apart():
    made = synthesize(Synthetic(2, 1.0, "constant", turns=3, think_time=4.0))
    assert [(c.conversation, c.turn, c.at) for c in made] == [
        (0, 0, 0.0), (1, 0, 1.0), (0, 1, 4.0), (1, 1, 5.0), (0, 2, 8.0), (1, 2, 9.0)
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "x", "0", "9-3", "1-2-3", "-4"])
def test_a_wrong_length_is_refused(text: str):
    with pytest.raises(ConfigError, match="no number of tokens"):
        Lengths.parse(text)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_never_sends_is_refused(rate: float):
    with pytest.raises(ConfigError, match="a rate of"):
        synthesize(Synthetic(3, rate))


# -- traces --------------------------------------------------------------------------------------


def test_mooncakes_trace_keeps_its_times_lengths_and_shared_blocks():
    rows = read_trace(FIXTURES / "mooncake.jsonl")
    made = replay(rows, speed=2.0, scale=0.125)
    assert [c.at for c in made] == [row.at / 2 for row in rows]
    assert [len(c.text.split()) for c in made] == [round(row.input_tokens / 8) for row in rows]
    texts = [c.text.split() for c in made]
    for a, one in zip(rows, texts, strict=True):
        for b, other in zip(rows, texts, strict=True):
            pairs = zip(a.hash_ids, b.hash_ids, strict=False)
            shared = next((i for i, (x, y) in enumerate(pairs) if x != y), 10**9) * 64
            end = min(shared, len(one), len(other))
            assert one[:end] == other[:end]
            assert end == len(one) or end == len(other) or one[end:] != other[end:]


def test_azures_trace_counts_from_its_first_request():
    rows = read_trace(FIXTURES / "azure.csv", limit=3)
    assert [row.input_tokens for row in rows] == [374, 396, 879]
    assert [row.output_tokens for row in rows] == [44, 109, 55]
    assert rows[0].at == 0
    assert rows[1].at == pytest.approx(4.314579)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "begins like no trace"),
        ("a,b\n1,2\n", "begins like no trace"),
        ('{"timestamp": 0}\n', "line 1: not a request of a trace: no 'input_length'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no request"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, content: str, says: str):
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_trace(path)


def test_a_missing_trace_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        read_trace(Path("nowhere.csv"))


# -- sending -------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("close", [False, True])
def test_tokens_usage_and_times_are_taken_down(api: str, close: bool):
    with serving(first=0.05, gap=0.02, cached=7, close=close) as server:
        [one] = run(server.url, calls(1), api=api)
    assert one.ok
    assert one.status == 200
    assert (one.prompt_tokens, one.cached_tokens, one.output_tokens) == (10, 7, 4)
    assert len(one.events) == 4
    told = Latencies.of(one)
    assert told.ttft >= 0.05
    assert told.tpot == pytest.approx(0.02, abs=0.015)
    assert server.headers[-1]["authorization"] == "Bearer a key"


def test_pieces_are_counted_where_the_server_tells_no_usage():
    with serving(usage=False) as server:
        [one] = run(server.url, calls(1))
    assert one.output_tokens == 4


def test_the_loop_is_open_a_slow_server_gets_the_same_load():
    with serving(first=0.2, one_at_a_time=True, tokens=1) as server:
        began = time.perf_counter()
        done = run(server.url, calls(6, gap=0.02))
        took = time.perf_counter() - began
    assert took >= 1.2
    assert [one.sent for one in done] == pytest.approx([i * 0.02 for i in range(6)], abs=0.1)
    waits = [Latencies.of(one).ttft for one in done]
    assert waits[-1] > waits[0] + 0.6  # the queue is in the latency


def test_idle_connections_are_used_again():
    with serving() as server:
        assert all(one.ok for one in run(server.url, calls(5, gap=0.05)))
        assert server.connections < 5


def test_a_turn_waits_for_the_answer_before_it_and_carries_what_was_said():
    turns = [
        Call(0.0, "first", 2, conversation=0, turn=0, system="be kind"),
        Call(0.01, "second", 2, conversation=0, turn=1, system="be kind"),
    ]
    with serving(first=0.15) as server:
        first, second = run(server.url, turns)
        assert second.due == first.end > 0.15
        assert [m["content"] for m in server.asked[1]["messages"]] == [
            "be kind",
            "first",
            "w0 w1 ",
            "second",
        ]


def test_a_refusal_is_counted_and_later_turns_are_not_sent():
    turns = [Call(0.0, "a", 2, conversation=0, turn=t) for t in range(3)]
    with serving(status=429) as server:
        outcomes = run(server.url, turns)
    assert [(one.status, one.error) for one in outcomes] == [(429, "429: too much")]
    report = summarize(outcomes, planned=3)
    assert (report.requests, report.answered, report.unsent) == (1, 0, 2)
    assert report.failures == {"429: too much": 1}
    assert report.ttft is None


def test_an_answer_that_breaks_off_is_a_failure():
    with serving(break_off=2) as server:
        [one] = run(server.url, calls(1))
    assert not one.ok
    assert "broke off" in str(one.error)


def test_a_timeout_is_a_failure():
    with serving(first=5.0) as server:
        [one] = run(server.url, calls(1), timeout=0.1)
    assert one.error == "no whole answer within 0.1 s"


def test_a_server_that_is_not_there_is_a_failure():
    [one] = run("http://127.0.0.1:1", calls(1))
    assert one.status == 0
    assert "cannot connect to 127.0.0.1:1" in str(one.error)


def test_the_first_model_listed_is_found():
    async def ask(url: str) -> str:
        return await find_model(Client(url))

    with serving() as server:
        assert asyncio.run(ask(server.url)) == "fake-1"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:99999"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ConfigError, match="no URL of a server"):
        Endpoint.parse(url)


def test_a_url_may_end_in_v1():
    assert Endpoint.parse("https://host/base/v1/") == Endpoint("host", 443, "/base", True)


# -- figures -------------------------------------------------------------------------------------


def outcome(due: float, sent: float, events: list[float], **fields: object) -> Outcome:
    end = events[-1] if events else sent + 1
    made = Outcome(0, 0, due, sent, events, end, output_tokens=len(events))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_latency_counts_from_when_a_request_was_due():
    told = Latencies.of(outcome(1.0, 1.5, [2.0, 2.1, 2.4]))
    assert told.ttft == pytest.approx(1.0)
    assert told.e2e == pytest.approx(1.4)
    assert told.tpot == pytest.approx(0.2)
    assert told.itl == pytest.approx(0.3)


def test_a_generator_that_is_late_says_so():
    on_time = [outcome(i, i + 0.001, [i + 0.5]) for i in range(5)]
    late = [outcome(i, i + 0.2, [i + 0.5]) for i in range(5)]
    assert not summarize(on_time, 5).generator_was_late
    assert summarize(late, 5).generator_was_late


def test_goodput_counts_the_requests_that_met_every_goal():
    outcomes = [
        outcome(0.0, 0.0, [0.1, 0.2]),
        outcome(1.0, 1.0, [1.9, 2.0]),  # a late first token
        outcome(2.0, 2.0, [2.1, 3.0]),  # a slow second one
        outcome(3.0, 3.0, [3.1]),  # one token has no pace
        outcome(9.0, 9.0, [], error="500"),
    ]
    report = summarize(outcomes, 5, parse_slo("ttft=500ms,tpot=0.2s"))
    assert report.good == 2
    assert report.goodput == pytest.approx(2 / report.duration)
    assert report.duration == pytest.approx(10.0)
    assert (report.answered, report.requests) == (4, 5)


def test_requests_under_way_are_counted():
    outcomes = [outcome(0, 0.0, [2.0]), outcome(0, 1.0, [3.0]), outcome(0, 4.0, [5.0])]
    assert in_flight(outcomes) == [(0, 1), (1, 2), (2, 1), (3, 0), (4, 1), (5, 0)]
    assert summarize(outcomes, 3).most_in_flight == 2


def test_percentiles_lie_between_the_nearest_two():
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 1.0) == 4.0
    assert percentile([5.0], 0.99) == 5.0


def test_goals_are_read_in_seconds_and_milliseconds():
    assert parse_slo("ttft=500ms, e2e=2s") == {"ttft": 0.5, "e2e": 2.0}
    assert meets(Latencies(0.4, 1.0, None, None), {"ttft": 0.5, "tpot": 0.1})


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "speed=5s", "ttft=-1s", "ttft=xms"])
def test_a_wrong_goal_is_refused(text: str):
    with pytest.raises(ConfigError, match="is no goal"):
        parse_slo(text)


def test_a_report_is_json():
    told = json.loads(json.dumps(summarize([outcome(0, 0, [1.0, 2.0])], 1).as_json()))
    assert told["e2e"]["p99"] == 2.0
    assert told["generator_was_late"] is False


# -- the command ---------------------------------------------------------------------------------


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_the_command_prints_a_table(tmp_path: Path):
    with serving(first=0.01, gap=0.002, cached=3) as server:
        done = bench(
            "--url", server.url, "--rate", "50", "--requests", "12", "--slo", "ttft=5s",
            "--output-tokens", "4-9", "--ignore-eos",
        )  # fmt: skip
        assert {asked["ignore_eos"] for asked in server.asked} == {True}
        assert len(server.asked) == 13  # one to warm up
    assert done.exit_code == 0
    for line in ("fake-1", "first token (TTFT)", "goodput", "100.0 % within ttft <= 5.00 s"):
        assert line in done.stdout


def test_the_command_writes_json_every_request_and_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "load.png"
    with serving(gap=0.002) as server:
        done = bench(
            "--url", server.url + "/v1", "--requests", "5", "--rate", "100", "--json",
            "--arrivals", "constant", "--out", str(out), "--plot", str(plot),
        )  # fmt: skip
    told = json.loads(done.stdout)
    assert (told["model"], told["answered"], told["output_tokens"]) == ("fake-1", 5, 320)
    written = json.loads(out.read_text())
    assert len(written["requests"]) == 5
    assert written["report"]["answered"] == 5
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_replays_a_trace():
    with serving() as server:
        done = bench(
            "--url", server.url, "--trace", str(FIXTURES / "azure.csv"), "--scale", "0.02",
            "--speed", "100", "--limit", "4", "--warmup", "0", "--api", "completions", "--json",
        )  # fmt: skip
        lengths = [len(asked["prompt"].split()) for asked in server.asked]
    assert json.loads(done.stdout)["requests"] == 4
    assert sorted(lengths) == [2, 7, 8, 18]


def test_a_server_that_refuses_the_first_request_is_one_line():
    with serving(status=401) as server:
        done = bench("--url", server.url)
    assert isinstance(done.exception, KvistError)
    assert str(done.exception).endswith("the first request failed: 401: too much")


def test_nothing_answered_is_an_error_status():
    with serving(break_off=1) as server:
        done = bench("--url", server.url, "--requests", "2", "--rate", "90", "--warmup", "0")
    assert done.exit_code == 1
    assert "2 x the answer broke off" in done.stdout
