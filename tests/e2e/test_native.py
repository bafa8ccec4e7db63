"""`POST /api/claude` with the real CLIs: what a request may ask for, and what it gets."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Server, StartServer

# What is answered.


def test_the_events_of_a_turn_are_streamed(server: Server) -> None:
    answer = server.ask("[[text Grüße an alle.]]")
    assert [event["type"] for event in answer.events] == ["system", "assistant", "result"]
    assert answer.events[0]["subtype"] == "init"
    assert answer.events[1]["message"]["content"][0]["text"] == "Grüße an alle."
    assert answer.text == "Grüße an alle."
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


def test_the_session_is_told_before_the_first_event(server: Server) -> None:
    answer = server.ask("[[text hello]]")
    told = answer.headers["x-claude-session-id"]
    assert str(UUID(told)) == told
    assert {event["session_id"] for event in answer.events} == {told}


def test_an_answer_without_a_stream_is_the_result(server: Server) -> None:
    answer = server.ask("[[text hello]]", stream=False)
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == "hello"
    assert answer.result["session_id"] == answer.headers["x-claude-session-id"]


def test_no_character_breaks_the_stream(server: Server) -> None:
    texts = ["a\u2028b\u2029c\u0085d", "\r\n\r\ndata: {}\n\n", "\x00\x1b😀"]
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(server.ask, [f"[[text {json.dumps(text)}]]" for text in texts])
        assert [answer.text for answer in answers] == texts


def test_partial_messages_come_when_they_are_wanted(new_server: Server) -> None:
    answer = new_server.ask("[[tokens 5]]", include_partial_messages=True)
    raw = [event["event"] for event in answer.events if event["type"] == "stream_event"]
    assert (raw[0]["type"], raw[-1]["type"]) == ("message_start", "message_stop")
    deltas = [event["delta"]["text"] for event in raw if event["type"] == "content_block_delta"]
    assert deltas == ["tok0 ", "tok1 ", "tok2 ", "tok3 ", "tok4 "]
    assert answer.text == "".join(deltas)


def test_thinking_is_an_event(server: Server) -> None:
    answer = server.ask("[[thinking Well, well.]] [[text It is so.]]")
    blocks = [b for e in answer.events if e["type"] == "assistant" for b in e["message"]["content"]]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[0]["thinking"] == "Well, well."
    assert answer.text == "It is so."


# What the request says reaches the model.


def test_a_system_prompt_replaces_the_cli_s_own(server: Server) -> None:
    usual = server.ask("[[echo]]").told
    told = server.ask("[[echo]]", system_prompt="You are a parrot.").told
    assert told["system_tail"].strip().endswith("You are a parrot.")
    assert told["system_characters"] < usual["system_characters"] / 2


def test_an_appended_system_prompt_comes_after_the_cli_s_own(server: Server) -> None:
    usual = server.ask("[[echo]]").told
    told = server.ask("[[echo]]", append_system_prompt="Speak Latin.\nAlways.").told
    assert told["system_tail"].strip().endswith("Speak Latin.\nAlways.")
    assert told["system_characters"] > usual["system_characters"]


def test_a_model_is_asked_for_by_name(server: Server) -> None:
    assert server.ask("[[echo]]", model="claude-parrot-4-5").told["model"] == "claude-parrot-4-5"


def test_an_effort_is_passed_on(new_server: Server) -> None:
    assert new_server.ask("[[echo]]", effort="low").told["output_config"]["effort"] == "low"


def test_a_permission_mode_is_taken(server: Server) -> None:
    answer = server.ask("[[text hello]]", permission_mode="plan")
    assert answer.events[0]["permissionMode"] == "plan"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("include_partial_messages", True),
        ("effort", "low"),
        ("permission_mode", "dontAsk"),
    ],
)
def test_what_an_old_cli_cannot_do_is_refused(
    old_server: Server, messages_api: MessagesApi, field: str, value: object
) -> None:
    answer = old_server.ask(f"[[text never asked {field}]]", **{field: value})
    assert answer.status == 400
    assert answer.error["code"] == "invalid_value"
    assert answer.error["param"] == field.replace("_", "-")
    assert "1.0.24" in answer.error["message"]
    assert messages_api.turns(f"never asked {field}") == []


def test_a_mode_that_is_none_is_refused(new_server: Server) -> None:
    answer = new_server.ask("[[text hello]]", permission_mode="bogus")
    assert (answer.status, answer.error["param"]) == (400, "permission-mode")
    assert "acceptEdits" in answer.error["message"]


def test_the_number_of_model_turns_is_limited(server: Server) -> None:
    script = '[[tool:Bash {"command": "ls"}]] [[then]] [[tool:Bash {"command": "ls"}]]'
    for stream in (True, False):
        result = server.ask(script, max_turns=1, stream=stream).result
        assert result["subtype"] == "error_max_turns"


def test_empty_fields_are_as_absent(server: Server) -> None:
    answer = server.ask(
        "[[text hello]]",
        session_id="",
        workspace=None,
        system_prompt="",
        allowed_tools=None,
        model="",
        max_turns=None,
        permission_mode="",
    )
    assert answer.text == "hello"


# Prompts that look like something else.


def test_a_prompt_that_looks_like_something_else_is_a_prompt(server: Server) -> None:
    starts = ["-p", "--version", "--", "/home/me is a path", "@nowhere", "!ls", "# note", "}{", "é"]
    prompts = [f"{start} [[history]]" for start in starts]
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(server.ask, prompts)
        assert [answer.told for answer in answers] == [[prompt] for prompt in prompts]


def test_an_unknown_command_is_answered_by_the_newer_cli(new_server: Server) -> None:
    assert new_server.ask("/nope [[text x]]").text == "Unknown command: /nope"


def test_an_unknown_command_is_a_prompt_for_the_old_cli(old_server: Server) -> None:
    assert old_server.ask("/nope [[text x]]").text == "x"


def test_a_file_that_the_prompt_names_is_read(server: Server, messages_api: MessagesApi) -> None:
    workspace = server.daemon.base / "workspace" / "at-file"
    workspace.mkdir(parents=True, exist_ok=True)
    (workspace / "note.txt").write_text("the note says forty-two")
    server.ask("@note.txt [[text read by the cli]]", workspace="at-file")
    request = messages_api.wait_for(lambda _: True, text="read by the cli")
    assert "the note says forty-two" in json.dumps(request.body)


# Permissions.


def test_permissions_are_skipped_where_the_cli_lets_them(
    claude: Claude, start_server: StartServer
) -> None:
    server = start_server(claude, {"IS_SANDBOX": "1"})
    script = '[[tool:Bash {"command": "echo made > made"}]] [[then]] [[text done]]'
    for field in ({"dangerously_skip_permissions": True}, {"permission_mode": "bypassPermissions"}):
        workspace = server.daemon.base / "workspace" / next(iter(field))
        answer = server.ask(script, workspace=workspace.name, **field)
        if claude.is_old and os.geteuid() == 0:  # it knows of no sandbox
            assert (answer.status, answer.error["code"]) == (400, "invalid_value")
            assert "as another user" in answer.error["message"]
        else:
            assert answer.text == "done"
            assert (workspace / "made").read_text() == "made\n"


def test_permissions_are_not_skipped_where_the_server_forbids_it(
    claude: Claude, start_server: StartServer
) -> None:
    server = start_server(claude, {"IS_SANDBOX": "1", "ALLOW_SKIP_PERMISSIONS": "false"})
    for field in ({"dangerously_skip_permissions": True}, {"permission_mode": "bypassPermissions"}):
        answer = server.ask("[[text hello]]", **field)
        assert answer.status == 400
        assert "ALLOW_SKIP_PERMISSIONS" in answer.error["message"]
