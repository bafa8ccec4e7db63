"""The demonstration CLI: as a real child process, and its pure parts as functions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli import demo

Event = dict[str, Any]

SCRIPT = str(Path(demo.__file__))
COMMAND = [sys.executable, "-I", "-S", SCRIPT]
USUAL = [
    "-p",
    "--verbose",
    "--input-format=stream-json",
    "--output-format=stream-json",
]
ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
NOBODY = "00000000-0000-0000-0000-000000000005"
FOR_EVER = "100000000"  # milliseconds between two words: the turn stands still
LIMIT = 30  # seconds that no child of a test ever needs

# What the real program wrote, in order; several deltas of one block count once.
MESSAGE = "status message_start"
THINKING = "content_block_start thinking_tokens content_block_delta assistant content_block_stop"
BLOCK = "content_block_start content_block_delta assistant content_block_stop"
CLOSED = "message_delta message_stop"
REAL_THINKING = f"init {MESSAGE} {THINKING} {BLOCK} {CLOSED} success"
REAL_TOOL = f"init {MESSAGE} {BLOCK} {CLOSED} user {MESSAGE} {BLOCK} {CLOSED} success"


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def environment(folder: Path, delay: str = "0") -> dict[str, str]:
    return {"CLAUDE_PROXY_DEMO_DIR": str(folder), "CLAUDE_PROXY_DEMO_DELAY_MS": delay}


def user(text: object, uuid: str | None = None) -> Event:
    line = {"type": "user", "message": {"role": "user", "content": text}}
    return line | ({"uuid": uuid} if uuid else {})


def control(subtype: str, **fields: object) -> Event:
    request = {"subtype": subtype, **fields}
    return {"type": "control_request", "request_id": f"id-{subtype}", "request": request}


def lines(*events: Event) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def run(folder: Path, given: bytes, *options: str, cwd: Path | None = None) -> Any:
    return subprocess.run(
        [*COMMAND, *USUAL, *options],
        input=given,
        capture_output=True,
        check=False,
        timeout=LIMIT,
        env=environment(folder),
        cwd=cwd,
    )


def events_of(output: bytes) -> list[Event]:
    assert output.endswith(b"\n")
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def talk(folder: Path, *events: Event, options: tuple[str, ...] = ()) -> list[Event]:
    """The events of a run that goes well."""
    done = run(folder, lines(*events), *options)
    assert (done.returncode, done.stderr) == (0, b"")
    return events_of(done.stdout)


def only(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["type"] == kind]


def order(events: list[Event]) -> str:
    labels: list[str] = []
    for event in events:
        label = event.get("event", {}).get("type") or event.get("subtype") or event["type"]
        many = label in ("content_block_delta", "thinking_tokens")
        if not (many and label in labels[-2:]):
            labels.append(label)
    return " ".join(labels)


@contextmanager
def child(folder: Path, *options: str, delay: str = FOR_EVER) -> Iterator[subprocess.Popen[bytes]]:
    """A running demonstration, ended at the latest with the test."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*COMMAND, *USUAL, *options],
        bufsize=0,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=environment(folder, delay),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def say(process: subprocess.Popen[bytes], *events: Event) -> None:
    assert process.stdin
    process.stdin.write(lines(*events))


def hear(process: subprocess.Popen[bytes], label: str) -> Event:
    """Read until an event of this type or subtype."""
    assert process.stdout
    while line := process.stdout.readline():
        event: Event = json.loads(line)
        if label in (event.get("subtype"), event["type"], event.get("event", {}).get("type")):
            return event
    pytest.fail(f"the output ended before {label}")


# --- start and options -------------------------------------------------------------------------


def test_the_version_starts_like_the_real_one_and_says_demonstration() -> None:
    output = subprocess.check_output([*COMMAND, "--version"], timeout=LIMIT, text=True)
    assert output.split()[0] == "2.1.197"
    assert "demonstration" in output


def test_every_option_of_the_server_is_accepted(folder: Path) -> None:
    options = (
        "--include-partial-messages",
        "--replay-user-messages",
        f"--session-id={ONE}",
        "--model=opus",
        "--permission-mode=acceptEdits",
        "--effort=high",
        "--max-turns=7",
        "--system-prompt=be brief",
        "--append-system-prompt=a=b",
        "--allowedTools=Read",
        "--allowedTools=Bash(git *)",
        "--disallowedTools=Write",
        "--mcp-config=/nonexistent.json",
        "--strict-mcp-config",
        '--settings={"disableAllHooks":true}',
        "--setting-sources=user",
        "--add-dir=/srv/space",
        "--allow-dangerously-skip-permissions",
        "--json-schema={}",
    )
    events = talk(folder, user("hi"), options=options)
    assert events[0]["session_id"] == ONE
    assert events[0]["permissionMode"] == "acceptEdits"
    assert events[-1]["subtype"] == "success"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nope"], "error: unknown option '--nope'"),
        (["--nope=secret"], "error: unknown option '--nope'"),
        (["--verbose=1"], "error: unknown option '--verbose'"),
        (["--model", "x"], "error: unknown option '--model': write --model=VALUE"),
        (["--output-format=text"], "only speaks stream-json"),
        (["--input-format=text"], "only speaks stream-json"),
        (["--session-id=../../etc"], "Invalid session ID"),
        ([f"--session-id={ONE}", f"--resume={TWO}"], "--fork-session"),
    ],
)
def test_a_bad_option_is_refused(folder: Path, options: list[str], said: str) -> None:
    done = run(folder, b"", *options)
    assert (done.returncode, done.stdout) == (1, b"")
    assert said in done.stderr.decode()
    assert b"secret" not in done.stderr


@pytest.mark.parametrize("missing", ["-p", "--verbose", "--input-format=stream-json"])
def test_an_option_that_is_always_needed_is_missed(missing: str) -> None:
    words = [word for word in USUAL if word != missing]
    with pytest.raises(demo.RefusedError, match="stream-json"):
        demo.check_options(demo.parse_options(words))


# --- a turn ------------------------------------------------------------------------------------


def test_the_events_come_in_the_order_of_the_real_program(folder: Path) -> None:
    options = ("--include-partial-messages", "--disallowedTools=Bash,Read")
    assert order(talk(folder, user("hi"), options=options)) == REAL_THINKING


def test_the_events_of_a_tool_call_come_in_the_order_of_the_real_program(folder: Path) -> None:
    events = talk(folder, user("hi"), options=("--include-partial-messages",))
    thought = f"{MESSAGE} {THINKING}"
    assert thought in order(events)
    assert order(events).replace(thought, MESSAGE, 1) == REAL_TOOL


def test_without_partial_messages_only_whole_ones_are_sent(folder: Path) -> None:
    events = talk(folder, user("hi"))
    assert order(events) == "init thinking_tokens assistant assistant user assistant success"
    blocks = [event["message"]["content"] for event in only(events, "assistant")]
    assert [block["type"] for (block,) in blocks] == ["thinking", "tool_use", "text"]


def test_the_deltas_add_up_to_the_blocks(folder: Path) -> None:
    events = talk(folder, user("hi"), options=("--include-partial-messages",))
    streamed = [event["event"] for event in only(events, "stream_event")]
    deltas = [event["delta"] for event in streamed if event["type"] == "content_block_delta"]
    (thought,), (call,), (text,) = (e["message"]["content"] for e in only(events, "assistant"))
    assert "".join(delta.get("thinking", "") for delta in deltas) == thought["thinking"]
    assert "".join(delta.get("text", "") for delta in deltas) == text["text"]
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == call["input"]
    indexes = [event["index"] for event in streamed if event["type"] == "content_block_start"]
    assert indexes == [0, 1, 0]


def test_events_have_the_keys_of_the_real_ones(folder: Path) -> None:
    events = talk(folder, user("hi"))
    init, result = events[0], events[-1]
    assert init.keys() == set(
        "type subtype cwd session_id tools mcp_servers model permissionMode slash_commands "  # noqa: SIM905  (a list is read best in this form)
        "apiKeySource claude_code_version output_style agents skills plugins analytics_disabled "
        "product_feedback_disabled uuid memory_paths fast_mode_state".split()
    )
    assert result.keys() == set(
        "type subtype is_error api_error_status duration_ms duration_api_ms ttft_ms "  # noqa: SIM905  (as above)
        "ttft_stream_ms time_to_request_ms num_turns result stop_reason session_id "
        "total_cost_usd usage modelUsage permission_denials terminal_reason fast_mode_state "
        "uuid".split()
    )
    assert len({event["uuid"] for event in events}) == len(events)
    assert {event["session_id"] for event in events} == {init["session_id"]}


def test_the_result_counts_like_the_real_one(folder: Path) -> None:
    events = talk(folder, user("hi"), user("again"))
    first, second = only(events, "result")
    assert (first["num_turns"], first["total_cost_usd"], first["is_error"]) == (2, 0, False)
    assert first["permission_denials"] == []
    assert first["terminal_reason"] == "completed"
    # usage is of the turn, modelUsage of the process
    total = first["usage"]["output_tokens"] + second["usage"]["output_tokens"]
    assert second["modelUsage"]["demo"]["outputTokens"] == total


def test_the_answer_says_what_it_is(folder: Path) -> None:
    result = talk(folder, user("What is the\nweather?"))[-1]["result"]
    assert "demonstration" in result
    assert "no model was asked" in result
    assert '"What is the\nweather?"' in result
    assert "turn 1 of this session" in result
    assert "ANTHROPIC_API_KEY" in result
    assert "--demo" in result


def test_the_tool_is_not_executed_and_its_result_says_so(folder: Path) -> None:
    (event,) = only(talk(folder, user("hi")), "user")
    (outcome,) = event["message"]["content"]
    assert "not executed" in outcome["content"]
    assert event["tool_use_result"]["stdout"] == outcome["content"]


@pytest.mark.parametrize("option", ["--disallowedTools=Read Bash", "--max-turns=1"])
def test_the_tool_can_be_refused(folder: Path, option: str) -> None:
    events = talk(folder, user("hi"), options=(option,))
    assert events[0]["tools"] == []
    assert only(events, "user") == []
    assert events[-1]["num_turns"] == 1


def test_messages_are_replayed_and_repeated_ones_dropped(folder: Path) -> None:
    given = (user("a", ONE), user("a", ONE), user("b", TWO))
    events = talk(folder, *given, options=("--replay-user-messages",))
    replays = [event for event in events if event.get("isReplay")]
    assert [(event["uuid"], event["message"]["content"]) for event in replays] == [
        (ONE, "a"),
        (TWO, "b"),
    ]
    assert len(only(events, "result")) == 2


def test_content_blocks_are_read_and_images_counted(folder: Path) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    image = {"type": "image", "source": source}
    content = [{"type": "text", "text": "look"}, image, image, {"type": "text", "text": "well"}]
    result = talk(folder, user(content))[-1]["result"]
    assert '(with 2 images): "look\nwell"' in result


def test_a_long_prompt_passes_and_is_shortened(folder: Path) -> None:
    result = talk(folder, user("x" * 3_000_000))[-1]["result"]
    assert "x" * 199 + "…" in result


def test_awkward_text_stays_one_line_of_valid_utf8(folder: Path) -> None:
    line = rb'{"type":"user","message":{"role":"user","content":"a\u2028b \ud800 \u00e9"}}'
    done = run(folder, b"\xef\xbb\xbf" + line, "--replay-user-messages")
    assert done.returncode == 0
    assert "\u2028" not in done.stdout.decode()
    assert 'a\u2028b ? é"' in events_of(done.stdout)[-1]["result"]


# --- input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense SECRET",
        b'{"type":"user","SECRET":1}',
        b'{"type":"control_request"}',
        b"[1]",
        b"[" * 100_000,
    ],
    ids=range(5),
)
def test_a_malformed_line_ends_the_program(folder: Path, line: bytes) -> None:
    done = run(folder, line)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"Error parsing streaming input line: ")
    assert b"SECRET" not in done.stderr


def test_a_malformed_line_ends_a_running_turn_without_a_result(folder: Path) -> None:
    with child(folder) as process:
        say(process, user("hi"))
        hear(process, "init")
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"nonsense\n")
        assert process.wait(LIMIT) == 1
        assert b"result" not in process.stdout.read()


def test_unknown_and_empty_lines_are_ignored(folder: Path) -> None:
    assert run(folder, b'\n{"type":"keep_alive"}\n\n{}\n').stdout == b""


def test_a_message_sent_in_the_middle_of_a_turn_gets_its_own(folder: Path) -> None:
    with child(folder, delay="1") as process:
        say(process, user("first"))
        hear(process, "assistant")
        say(process, user("second"))
        assert '"first"' in hear(process, "result")["result"]
        assert '"second"' in hear(process, "result")["result"]


def test_the_end_of_input_lets_the_running_turn_finish(folder: Path) -> None:
    with child(folder, delay="1") as process:
        say(process, user("hi"))
        hear(process, "init")
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        assert hear(process, "result")["subtype"] == "success"
        assert process.wait(LIMIT) == 0


def test_without_any_message_it_says_nothing(folder: Path) -> None:
    done = run(folder, b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nobody_reads_the_output_and_it_leaves_quietly(folder: Path) -> None:
    with child(folder, delay="0") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdout = None
        say(process, user("hi"))
        assert process.wait(LIMIT) == 0
        assert process.stderr.read() == b""


# --- control requests --------------------------------------------------------------------------


def answers(events: list[Event]) -> list[Event]:
    return [event["response"] for event in only(events, "control_response")]


def test_initialize_is_answered_as_the_real_program_does(folder: Path) -> None:
    (answer,) = answers(talk(folder, control("initialize", systemPrompt=["be brief"])))
    said = answer["response"]
    assert (answer["subtype"], answer["request_id"]) == ("success", "id-initialize")
    assert (said["commands"], said["account"]) == ([], {})
    assert {model["resolvedModel"] for model in said["models"]} == {"demo"}
    assert said["pid"] > 0


def test_the_other_requests_are_answered(folder: Path) -> None:
    events = talk(
        folder,
        control("interrupt"),
        control("set_model", model="opus"),
        control("set_permission_mode", mode="plan"),
        control("apply_flag_settings", settings={"permissions": {"allow": []}}),
        control("mcp_status"),
        control("set_cwd"),
        user("hi"),
    )
    by_name = {answer["request_id"][3:]: answer for answer in answers(events)}
    assert [answer["subtype"] for answer in by_name.values()] == ["success"] * 5 + ["error"]
    assert by_name["set_permission_mode"]["response"] == {"mode": "plan"}
    assert by_name["mcp_status"]["response"] == {"mcpServers": []}
    assert by_name["set_cwd"]["error"] == "Unsupported control request subtype: set_cwd"
    assert "response" not in by_name["interrupt"]
    note = only(events, "user")[0]["message"]["content"]
    assert note == "<local-command-stdout>Set model to opus</local-command-stdout>"
    (status,) = [event for event in events if event.get("subtype") == "status"]
    assert (status["status"], status["permissionMode"]) == (None, "plan")
    (init,) = [event for event in events if event.get("subtype") == "init"]
    assert init["permissionMode"] == "plan"
    assert events[-1]["subtype"] == "success"  # an interrupt before the turn does not reach it


@pytest.mark.parametrize(
    ("option", "outcome"),
    [
        ("--fork-session", "error"),
        ("--allow-dangerously-skip-permissions", "success"),
        ("--dangerously-skip-permissions", "success"),
    ],
)
def test_permissions_are_skipped_only_if_allowed_at_the_start(
    folder: Path, option: str, outcome: str
) -> None:
    request = control("set_permission_mode", mode="bypassPermissions")
    (answer,) = answers(talk(folder, request, options=(option,)))
    assert answer["subtype"] == outcome


def test_a_running_turn_answers_requests_and_can_be_interrupted(folder: Path) -> None:
    with child(folder) as process:
        say(process, user("hi"))
        hear(process, "init")
        say(process, control("mcp_status"))
        assert hear(process, "control_response")["response"]["subtype"] == "success"
        say(process, control("interrupt"))
        answer = hear(process, "control_response")["response"]
        assert answer == {"subtype": "success", "request_id": "id-interrupt"}
        (note,) = hear(process, "user")["message"]["content"]
        assert note["text"] == "[Request interrupted by user]"
        result = hear(process, "result")
        assert result["subtype"] == "error_during_execution"
        assert (result["is_error"], result["num_turns"]) == (True, 2)
        assert result["terminal_reason"] == "aborted_streaming"
        assert "result" not in result
        say(process, user("next"))  # the process goes on
        hear(process, "init")
        say(process, control("interrupt"))
        hear(process, "result")
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        assert process.wait(LIMIT) == 1  # the last result was an error


def test_an_interrupt_that_comes_with_the_message_still_counts(folder: Path) -> None:
    done = run(folder, lines(user("hi"), control("interrupt")))
    assert done.returncode == 1
    assert events_of(done.stdout)[-1]["terminal_reason"] == "aborted_streaming"


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    turn = demo.Turn("hi", "one two three four", {})
    heard = ""
    for event in turn.events([], None, None):
        heard += ((event or {}).get("event", {}).get("delta") or {}).get("text", "")
        if heard == "one two ":
            break
    assistant, note, result = turn.interrupted()
    assert assistant["message"]["content"] == [{"type": "text", "text": "one two "}]
    assert note["type"] == "user"
    assert (result["subtype"], result["modelUsage"]) == ("error_during_execution", {})


@pytest.mark.parametrize("delay", [None, FOR_EVER], ids=["idle", "in a turn"])
def test_sigterm_ends_it_at_once(folder: Path, delay: str | None) -> None:
    with child(folder) as process:
        say(process, user("hi") if delay else control("mcp_status"))
        hear(process, "init" if delay else "control_response")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 143


def test_sigint_ends_it_when_idle(folder: Path) -> None:
    with child(folder) as process:
        say(process, control("mcp_status"))
        hear(process, "control_response")
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0


def test_sigint_ends_a_turn_with_its_result(folder: Path) -> None:
    with child(folder, delay="200") as process:  # a turn of some 20 seconds
        say(process, user("hi"))
        hear(process, "init")
        process.send_signal(signal.SIGINT)
        assert hear(process, "result")["terminal_reason"] == "aborted_streaming"
        assert process.wait(LIMIT) == 0


# --- structured output -------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "x": {"not": {}}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("by_option", [True, False])
def test_a_simple_schema_is_met(folder: Path, by_option: bool) -> None:
    options = (f"--json-schema={json.dumps(PERSON)}",) if by_option else ()
    late = {} if by_option else {"jsonSchema": PERSON}
    events = talk(folder, control("initialize", **late), user("hi"), options=options)
    result = events[-1]
    assert result["structured_output"] == {"name": "demo", "age": 0}
    assert json.loads(result["result"]) == result["structured_output"]
    assert (result["stop_reason"], result["num_turns"]) == ("tool_use", 3)
    call = only(events, "assistant")[-1]["message"]["content"][0]
    assert (call["name"], call["input"]) == ("StructuredOutput", result["structured_output"])


def test_only_the_first_initialize_sets_the_schema(folder: Path) -> None:
    given = (control("initialize"), control("initialize", jsonSchema=PERSON), user("hi"))
    assert "structured_output" not in talk(folder, *given)[-1]


def one(schema: object) -> Event:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, {}),
        (one({"type": "number"}), {"a": 0}),
        (one({"type": "boolean"}), {"a": False}),
        (one({"type": ["null", "string"]}), {"a": None}),
        (one({"type": "array", "items": {"type": "string"}}), {"a": []}),
        (one({"enum": ["red", "blue"]}), {"a": "red"}),
        (one({"const": 7}), {"a": 7}),
        (one(one({"type": "string"})), {"a": {"a": "demo"}}),
    ],
)
def test_what_a_schema_is_answered_with(schema: object, value: object) -> None:
    assert demo.structured(schema) == value


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        "type",
        {},
        {"type": "string"},
        {"type": []},
        {"type": {}},
        {"type": "object", "required": ["a"]},
        {"type": "object", "required": 1},
        {"type": "object", "required": [[]], "properties": {}},
        {"type": "object", "minProperties": 1},
        one({"type": "string", "minLength": 9}),
        one({"$ref": "#/$defs/x"}),
        one({"enum": []}),
        one("type"),
        one(["const"]),
    ],
)
def test_a_schema_that_is_not_understood_gets_only_text(schema: object) -> None:
    assert demo.structured(schema) is None


def test_an_unmet_schema_gets_an_ordinary_answer(folder: Path) -> None:
    schema = json.dumps({"type": "object", "minProperties": 1})
    result = talk(folder, user("hi"), options=(f"--json-schema={schema}",))[-1]
    assert "structured_output" not in result
    assert "demonstration" in result["result"]


# --- sessions ----------------------------------------------------------------------------------


def test_a_session_is_resumed_and_remembers(folder: Path) -> None:
    talk(folder, user("first words"), options=(f"--session-id={ONE}",))
    events = talk(folder, user("second"), user("third"), options=(f"--resume={ONE}",))
    assert {event["session_id"] for event in events} == {ONE}
    second, third = (event["result"] for event in only(events, "result"))
    assert "turn 2 of this session" in second
    assert 'you wrote: "first words"' in second
    assert "turn 3 of this session" in third
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    known = json.loads(file.read_text())
    assert known == {"cwd": str(Path.cwd()), "turns": 3, "last_prompt": "third"}


def test_nothing_is_remembered_before_the_first_message(folder: Path) -> None:
    talk(folder, control("initialize"), options=(f"--session-id={ONE}",))
    assert not folder.exists()


def test_a_session_is_forked(folder: Path) -> None:
    talk(folder, user("first words"), options=(f"--session-id={ONE}",))
    fork = (f"--resume={ONE}", "--fork-session")
    events = talk(folder, user("b"), options=(*fork, f"--session-id={TWO}"))
    assert {event["session_id"] for event in events} == {TWO}
    assert 'turn 2 of this session. Before that you wrote: "first words"' in events[-1]["result"]
    assert talk(folder, user("b"), options=fork)[0]["session_id"] not in (ONE, TWO)


@pytest.mark.parametrize("wanted", [NOBODY, "../../etc/passwd"])
def test_an_unknown_session_fails_as_it_really_does(folder: Path, wanted: str) -> None:
    done = run(folder, b"", f"--resume={wanted}")
    sentence = f"No conversation found with session ID: {wanted}"
    assert (done.returncode, done.stderr.decode()) == (1, sentence + "\n")
    (result,) = events_of(done.stdout)
    assert result["subtype"] == "error_during_execution"
    assert (result["is_error"], result["num_turns"]) == (True, 0)
    assert (result["session_id"], result["errors"]) == (wanted, [sentence])


def test_a_session_of_another_directory_is_unknown(folder: Path, tmp_path: Path) -> None:
    talk(folder, user("hi"), options=(f"--session-id={ONE}",))
    assert run(folder, b"", f"--resume={ONE}", cwd=tmp_path).returncode == 1


def test_a_session_id_cannot_be_used_twice(folder: Path) -> None:
    talk(folder, user("hi"), options=(f"--session-id={ONE}",))
    done = run(folder, lines(user("hi")), f"--session-id={ONE}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"Error: Session ID {ONE} is already in use.\n"


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert talk(blocked, user("hi"))[-1]["subtype"] == "success"


def test_the_oldest_sessions_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SESSIONS", 3)
    memory = demo.Memory(folder)
    folder.mkdir()
    (folder / "notes.json").write_text("somebody else's")
    ids = [str(uuid4()) for _ in range(5)]
    for age, session_id in enumerate(ids):
        memory.save(session_id, "/", 1, "")
        if (folder / f"{session_id}.json").exists():
            os.utime(folder / f"{session_id}.json", (age, age))
    assert [memory.load(session_id) is not None for session_id in ids] == [False] * 2 + [True] * 3
    assert (folder / "notes.json").exists()


def test_a_conversation_that_began_elsewhere_goes_on(tmp_path: Path) -> None:
    said = [("user", "one"), ("assistant", "1"), ("user", [{"type": "text", "text": "two"}])]
    told = [
        {"type": role, "cwd": "/w", "message": {"role": role, "content": content}}
        for role, content in said
    ]
    path = tmp_path / "config" / "projects" / "-w" / f"{ONE}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lines(*told))
    memory = demo.Memory(tmp_path / "own", str(tmp_path / "config"))
    assert memory.load(ONE) == ("/w", 2, "two")
    assert memory.load(TWO) is None
    memory.save(ONE, "/w", 3, "three")
    assert memory.load(ONE) == ("/w", 3, "three")


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", '{"type": "user"}'])
def test_a_broken_transcript_is_an_unknown_session(tmp_path: Path, text: str) -> None:
    path = tmp_path / "projects" / "-w" / f"{ONE}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert demo.Memory(tmp_path / "own", str(tmp_path)).load(ONE) is None


def test_a_block_of_nothing_but_blanks_is_not_part_of_the_prompt() -> None:
    blocks = [{"type": "text", "text": "hi"}, {"type": "text", "text": "\n"}]
    assert demo.read_prompt(blocks) == ("hi", 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cwd": "/", "turns": "x"}', "\x00"])
def test_a_broken_session_file_is_an_unknown_session(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{ONE}.json").write_text(text)
    assert demo.Memory(tmp_path).load(ONE) is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"CLAUDE_PROXY_DEMO_DIR": "/d", "XDG_STATE_HOME": "/x"}, "/d"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/claude-proxy-demo"),
        ({"CLAUDE_PROXY_DEMO_DIR": "", "HOME": "/h"}, "/h/.local/state/claude-proxy-demo"),
    ],
)
def test_where_sessions_are_remembered(environ: dict[str, str], expected: str) -> None:
    assert demo.state_folder(environ) == Path(expected)


# --- hostile input to the pure parts -----------------------------------------------------------


@given(st.text())
def test_words_add_up_to_their_text(text: str) -> None:
    assert "".join(demo.split_words(text)) == text


@given(st.binary())
def test_any_line_is_an_object_or_refused(line: bytes) -> None:
    try:
        assert isinstance(demo.decode(line), dict)
    except demo.RefusedError as error:
        assert str(error).startswith("Error parsing streaming input line: ")  # noqa: PT017  (either outcome is right)


@given(st.text(alphabet=st.sampled_from('a\n\r\u2028\u2029\u0085\x00é\\"')))
def test_any_event_is_one_line(text: str) -> None:
    line = demo.encode({"text": text})
    assert line.count(b"\n") == 1
    assert not {"\u2028", "\u2029"} & set(line.decode())
    assert json.loads(line) == {"text": text}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["type", "text", "object", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "properties", "required", "enum", "const", "a"]), inner
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_content_has_a_prompt_and_any_schema_an_outcome(value: object) -> None:
    text, images = demo.read_prompt(value)
    assert demo.answer(value, 1, "").count("demonstration") >= 1
    assert isinstance(text, str)
    assert images >= 0
    assert isinstance(demo.structured(value), dict | None)
