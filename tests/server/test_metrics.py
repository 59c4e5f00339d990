"""Metrics under the names that the dashboard asks for, counting what happened."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from running import Running, running

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "kvist.json"


def read(server: Running) -> dict[str, float]:
    """Every sample by its name and labels."""
    text = server.http.get("/metrics").text
    return {
        sample.name + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_happens_is_counted(model: object) -> None:
    body = {
        "model": "dense_tied", "prompt": "a prompt of several blocks, to be found again",
        "max_tokens": 6, "ignore_eos": True, "seed": 1, "n": 2,
    }  # fmt: skip
    with running(model, ui=False) as server:  # type: ignore[arg-type]
        used = [server.http.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
        server.http.post("/v1/completions", json={})
        found = read(server)
        snapshot = server.http.get("/v1/cache").json()
    assert found["kvist_http_requests_total path=/v1/completions status=200"] == 2
    assert found["kvist_http_requests_total path=/v1/completions status=400"] == 1
    assert found["kvist_outputs_total reason=length"] == 4
    assert found["kvist_output_tokens_total"] == 24
    assert found["kvist_prompt_tokens_total"] == 4 * used[0]["prompt_tokens"]
    cached = used[1]["prompt_tokens_details"]["cached_tokens"]
    assert found["kvist_cached_prompt_tokens_total tier=device"] >= cached > 0
    assert found["kvist_cached_prompt_tokens_total tier=fork"] > 0
    assert found["kvist_time_to_first_token_seconds_count"] == 2
    assert found["kvist_inter_token_latency_seconds_count"] == 20
    assert found["kvist_request_duration_seconds_count"] == 2
    assert found["kvist_steps_total"] == snapshot["step"]
    steps = [value for name, value in found.items() if name.startswith("kvist_step_seconds_count")]
    assert 12 <= sum(steps) <= snapshot["step"]
    assert found["kvist_step_part_seconds_total part=launch"] > 0
    blocks = [value for name, value in found.items() if "kvist_cache_blocks group=0" in name]
    assert sum(blocks) == snapshot["groups"][0]["num_blocks"] - 1
    assert found["kvist_requests_running"] == found["kvist_requests_waiting"] == 0
    assert 0 < found["kvist_prefix_hit_ratio"] < 1


def test_the_dashboard_asks_for_metrics_that_there_are(server: Running) -> None:
    server.http.post(
        "/v1/completions", json={"model": "dense_tied", "prompt": "x", "max_tokens": 2}
    )
    known = {name.split(" ")[0] for name in read(server)}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"kvist_\w+", target["expr"])
    }
    assert len(panels) >= 15
    assert asked - known == set()
