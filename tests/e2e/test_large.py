"""Large prompts and large answers with the real CLIs, and clients that are slow."""

from __future__ import annotations

import json
import time
from uuid import uuid4

from tests.e2e.answers import big_text
from tests.e2e.claude_cli import Claude
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Server, StartServer

KILO = 1000
MEGA = 1_000_000


def test_a_large_system_prompt_reaches_the_model(new_server: Server) -> None:
    prompt = big_text(200 * KILO)
    for field in ("system_prompt", "append_system_prompt"):
        told = new_server.ask("[[echo]]", **{field: prompt}).told
        assert told["system_characters"] >= len(prompt)
        assert told["system_tail"].endswith(prompt[-900:])


def test_a_system_prompt_too_large_for_an_old_cli_is_refused(old_server: Server) -> None:
    for field in ("system_prompt", "append_system_prompt"):
        answer = old_server.ask("[[echo]]", **{field: big_text(200 * KILO)})
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")
        assert answer.error["param"] == field.replace("_", "-")
        assert "1.0.24" in answer.error["message"]
    fits = big_text(120 * KILO)
    told = old_server.ask("[[echo]]", system_prompt=fits).told
    assert told["system_characters"] >= len(fits)


def test_a_large_prompt_reaches_the_model(server: Server, messages_api: MessagesApi) -> None:
    name = f"five-megabytes-{uuid4()}"
    prompt = f"{big_text(5 * MEGA)} [[text {name}]]"
    assert server.ask(prompt).text == name
    [request] = messages_api.turns(name)
    assert request.conversation.user_texts[-1] == prompt


def test_a_large_answer_read_slowly_arrives_whole(server: Server) -> None:
    received = bytearray()
    with server.asking(f"[[big {2 * MEGA}]]") as response:
        for piece in response.iter_raw():
            received += piece
            time.sleep(0.02)
    events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: ")]
    assert [event["type"] for event in events] == ["system", "assistant", "result"]
    assert events[1]["message"]["content"][0]["text"] == big_text(2 * MEGA)
    assert events[2]["result"] == big_text(2 * MEGA)


def test_a_large_answer_comes_in_partial_messages_too(new_server: Server) -> None:
    answer = new_server.ask(f"[[big {2 * MEGA}]]", include_partial_messages=True)
    deltas = [event["event"].get("delta", {}) for event in answer.events if "event" in event]
    assert "".join(delta.get("text", "") for delta in deltas) == big_text(2 * MEGA)


def test_a_large_answer_comes_without_a_stream_too(server: Server) -> None:
    answer = server.ask(f"[[big {2 * MEGA}]]", stream=False)
    assert answer.text == big_text(2 * MEGA)


def test_a_large_answer_to_a_chat_comes_without_a_stream_too(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": f"[[big {2 * MEGA}]]"}]}
    with server.daemon.client() as client:
        completion = client.post("/v1/chat/completions", json=body).json()
    [choice] = completion["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == big_text(2 * MEGA)


def test_a_client_that_reads_nothing_is_let_go(claude: Claude, start_server: StartServer) -> None:
    server = start_server(claude, {"CLIENT_STALL_TIMEOUT_MS": "500"})
    connection = server.send(f"[[big {20 * MEGA}]]")
    try:
        server.daemon.wait_for_record("client_stalled", timeout=20)
        server.daemon.wait_for_record("process_exit")
    finally:
        connection.close()
