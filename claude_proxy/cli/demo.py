"""
A stand-in for the `claude` program, so that the proxy can be tried without network or account.

It speaks what Claude Code 2.1 speaks in print mode (stream-json both ways, control requests,
sessions that can be resumed), but asks no model and runs nothing: every answer says so and quotes
the prompt.  It is a program of its own, started as `python -I .../demo.py -p --verbose ...`: it
imports nothing of claude_proxy and little else, because one starts for each agent process.

Environment: CLAUDE_PROXY_DEMO_DIR is where sessions are remembered, CLAUDE_CONFIG_DIR where there
may be transcripts of others, CLAUDE_PROXY_DEMO_DELAY_MS the milliseconds between two words (without
it 25 at most, and 2.5 seconds for a whole turn).
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

BANNER = "2.1.197 (demonstration of claude-proxy, not Claude Code: no model is asked)\n"
OPTIONS = """-p --verbose --version --include-partial-messages --replay-user-messages
 --fork-session --strict-mcp-config --dangerously-skip-permissions
 --allow-dangerously-skip-permissions --input-format= --output-format= --session-id= --resume=
 --model= --permission-mode= --effort= --max-turns= --system-prompt= --append-system-prompt=
 --allowedTools= --disallowedTools= --mcp-config= --settings= --setting-sources= --add-dir=
 --json-schema="""
QUOTED = 200  # characters of a prompt that are quoted and remembered
SESSIONS = 1000  # session files that are kept
WORD_SECONDS, TURN_SECONDS = 0.025, 2.5
THOUGHT = "Somebody is trying out the proxy. There is no model here, and I will say so."
COMMAND = {"command": "echo 'Hello from the demonstration'", "description": "Greet the user"}
NOT_RUN = "(not executed: the demonstration runs no commands)"
SHELL = {"stderr": "", "interrupted": False, "isImage": False, "noOutputExpected": False}
STRUCTURED = "Structured output provided successfully"
# What a schema may say and still be met by `sample`; with anything else its value might be a lie.
KEYWORDS = """type properties required additionalProperties items enum const
 title description default examples $schema $id"""
SIMPLE = {"string": "demo", "integer": 0, "number": 0, "boolean": False, "null": None, "array": []}
BLANK = {"text": "", "thinking": "", "signature": "", "input": {}}
# The parts of events that are always the same, as the real program writes them.
INIT = """{"type": "system", "subtype": "init", "mcp_servers": [], "model": "demo",
 "slash_commands": [], "apiKeySource": "none", "claude_code_version": "2.1.197",
 "output_style": "default", "agents": [], "skills": [], "plugins": [], "analytics_disabled": true,
 "product_feedback_disabled": true, "memory_paths": {}, "fast_mode_state": "off"}"""
SETUP = """{"commands": [], "agents": [], "output_style": "default", "account": {},
 "available_output_styles": ["default"], "models": [{"value": "default", "resolvedModel": "demo",
 "displayName": "Default", "description": "The demonstration, which asks no model"},
 {"value": "demo", "resolvedModel": "demo", "displayName": "Demo", "description": "The same"}]}"""
RESULT = """{"type": "result", "subtype": "error_during_execution", "is_error": true,
 "duration_ms": 0, "duration_api_ms": 0, "num_turns": 0, "stop_reason": null, "total_cost_usd": 0,
 "usage": {"input_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
 "output_tokens": 0, "server_tool_use": {"web_search_requests": 0, "web_fetch_requests": 0},
 "service_tier": "standard", "inference_geo": "", "iterations": [], "speed": "standard",
 "cache_creation": {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 0}},
 "modelUsage": {}, "permission_denials": []}"""
SUCCESS = """{"subtype": "success", "is_error": false, "api_error_status": null,
 "time_to_request_ms": 0, "terminal_reason": "completed"}"""
MODEL_USAGE = """{"cacheReadInputTokens": 0, "cacheCreationInputTokens": 0, "webSearchRequests": 0,
 "costUSD": 0, "contextWindow": 200000, "maxOutputTokens": 32000}"""

Json = dict[str, Any]
Options = dict[str, list[str]]


class RefusedError(Exception):
    """The program must end with exit code 1; the text is for stderr."""


class ControlError(Exception):
    """A control request is answered with this error; the program lives on."""


def parse_options(words: list[str]) -> Options:
    """Each option given, with its values in order (none for a flag). Raises RefusedError."""
    given: Options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name + equals not in OPTIONS.split():
            hint = f": write {name}=VALUE" if name + "=" in OPTIONS.split() else ""
            raise RefusedError(f"error: unknown option '{name}'{hint}")
        given.setdefault(name, []).extend([value] * len(equals))
    return given


def check_options(given: Options) -> None:
    """Refuse what the real program refuses, and what the demonstration cannot do."""
    formats = (given.get("--input-format"), given.get("--output-format"))
    if "-p" not in given or formats != (["stream-json"], ["stream-json"]):
        raise RefusedError(
            "Error: The demonstration only speaks stream-json. Start it with "
            "-p --verbose --input-format=stream-json --output-format=stream-json."
        )
    if "--verbose" not in given:
        sentence = "When using --print, --output-format=stream-json requires --verbose"
        raise RefusedError(f"Error: {sentence}")
    if not all(map(is_uuid, given.get("--session-id", []))):
        raise RefusedError("Error: Invalid session ID. Must be a valid UUID.")
    if "--session-id" in given and "--resume" in given and "--fork-session" not in given:
        raise RefusedError("Error: --session-id goes with --resume only if --fork-session does.")


def is_uuid(text: str) -> bool:
    """Whether `text` is a UUID in its usual spelling, and so safe as the name of a file."""
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False


def state_folder(environ: dict[str, str]) -> Path:
    """Where sessions are remembered."""
    if environ.get("CLAUDE_PROXY_DEMO_DIR"):
        return Path(environ["CLAUDE_PROXY_DEMO_DIR"])
    state = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/"), ".local", "state")
    return Path(state, "claude-proxy-demo")


def compact(value: object) -> str:
    """JSON text without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def encode(event: Json) -> bytes:
    """One line of output. U+2028 and U+2029 end a line for some readers, so they are escaped."""
    text = compact(event).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "replace") + b"\n"  # half a surrogate pair becomes a "?"


def decode(line: bytes) -> Json:
    """One line of input, as lenient about its bytes as the real program. Raises RefusedError."""
    try:
        value = json.loads(line.decode("utf-8", "replace").lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:  # neither quotes the line, which may be secret
        raise RefusedError(f"Error parsing streaming input line: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError("Error parsing streaming input line: not a JSON object")
    return value


def read_prompt(content: object) -> tuple[str, int]:
    """The text of a message, and the number of its images."""
    if isinstance(content, str):
        return content, 0
    blocks = [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []
    texts = [b["text"] for b in blocks if isinstance(b.get("text"), str) and b["text"].strip()]
    return "\n".join(texts), sum(b.get("type") == "image" for b in blocks)


def user_event(content: object) -> Json:
    """A `user` event: a tool's result, a note of the program, or a message replayed."""
    seconds = time.time()
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    stamp = f"{clock}.{int(seconds % 1 * 1000):03}Z"
    message = {"role": "user", "content": content}
    return {"type": "user", "message": message, "parent_tool_use_id": None, "timestamp": stamp}


def shorten(text: str) -> str:
    """At most QUOTED characters of `text`."""
    return text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"


def answer(content: object, turn: int, before: str) -> str:
    """The text of every answer: what this is, what was asked, and how to get the real thing."""
    prompt, images = read_prompt(content)
    pictures = f" (with {images} image{'s' * (images > 1)})" if images else ""
    previous = f' Before that you wrote: "{before}"' if turn > 1 else ""
    return (
        "This is a demonstration: no model was asked and nothing was executed.\n\n"
        f'You wrote{pictures}: "{shorten(prompt)}"\n\n'
        f"This is turn {turn} of this session.{previous}\n\n"
        "For real answers, install the Claude Code CLI "
        "(`npm install -g @anthropic-ai/claude-code`), set ANTHROPIC_API_KEY, "
        "and start the server without `--demo`."
    )


def split_words(text: str) -> list[str]:
    """The text in pieces of one word each; joined they are the text again."""
    return re.findall(r"\S+\s*|\s+", text)


def sample(schema: Any) -> Any:
    """The smallest value for a simple JSON schema. Any other raises some LookupError or so."""
    if not set(KEYWORDS.split()).issuperset(schema):
        raise LookupError
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"][0] if isinstance(schema["type"], list) else schema["type"]
    if kind == "object":
        return {name: sample(schema["properties"][name]) for name in schema.get("required", [])}
    return SIMPLE[kind]


def structured(schema: object) -> Json | None:
    """The object that answers a schema, or None where only text can."""
    try:
        value = sample(schema) if isinstance(schema, dict) else None
    except (LookupError, TypeError, RecursionError):  # no schema, or one that asks for more
        return None
    return value if isinstance(value, dict) else None


class Wire:
    """Lines from stdin, events to stdout."""

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []
        self._lines: deque[bytes] = deque()
        self._ended = False

    def send(self, event: Json) -> None:
        """Write one event as a whole line. Raises OSError when nobody can read it any more."""
        left = memoryview(encode(event))
        while left:
            left = left[os.write(1, left) :]

    def line(self, deadline: float | None) -> bytes | None:
        """The next line; None when there is none until `deadline` (monotonic), or ever again."""
        while not self._lines:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._ended:
                time.sleep(wait or 0.0)
                return None
            if not select.select([0], [], [], wait)[0]:
                return None
            self._read()
        return self._lines.popleft()

    def _read(self) -> None:
        chunk = os.read(0, 1 << 20)
        self._ended = not chunk
        # At the end of input a last line without its newline counts too.
        first, *others = (chunk or b"\n").split(b"\n")
        self._unfinished.append(first)
        for piece in others:
            self._lines.append(b"".join(self._unfinished))
            self._unfinished = [piece]


class Memory:
    """What is remembered of each session: its directory, its turns, its last prompt."""

    def __init__(self, folder: Path, transcripts: str = "") -> None:
        self._folder = folder
        self._transcripts = Path(transcripts, "projects") if transcripts else None

    def load(self, session_id: str) -> tuple[str, int, str] | None:
        """The (cwd, turns, last prompt) of a session, or None when it is unknown."""
        if not is_uuid(session_id):
            return None
        return self._recall(session_id) or self._read_transcript(session_id)

    def _recall(self, session_id: str) -> tuple[str, int, str] | None:
        try:
            known = json.loads((self._folder / f"{session_id}.json").read_bytes())
            return str(known["cwd"]), int(known["turns"]), str(known["last_prompt"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _read_transcript(self, session_id: str) -> tuple[str, int, str] | None:
        """What the proxy wrote down of a conversation that was begun elsewhere."""
        for path in self._transcripts.glob(f"*/{session_id}.jsonl") if self._transcripts else ():
            with suppress(OSError, ValueError, TypeError, KeyError, IndexError):
                lines = [json.loads(line) for line in path.read_bytes().splitlines()]
                said = [line["message"]["content"] for line in lines if line["type"] == "user"]
                last = shorten(read_prompt(said[-1])[0]) if said else ""
                return str(lines[0]["cwd"]), len(said), last
        return None

    def save(self, session_id: str, cwd: str, turns: int, last_prompt: str) -> None:
        """Remember a session. Like the real program, say nothing where that is not possible."""
        known = {"cwd": cwd, "turns": turns, "last_prompt": last_prompt}
        target = self._folder / f"{session_id}.json"
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_new = not target.exists()
            scratch.touch(mode=0o600)  # prompts are nobody else's business
            scratch.write_text(json.dumps(known), encoding="ascii")
            scratch.replace(target)
            if is_new:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        # The pattern spares files that somebody else may keep in the same folder.
        ours = list(self._folder.glob("????????-????-????-????-????????????.json*"))
        ours.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in ours[SESSIONS:]:
            path.unlink(missing_ok=True)


class Turn:
    """The events of one turn, without the ids that each of them carries on the wire."""

    def __init__(self, prompt: str, text: str, used: Json) -> None:
        self._size = max(1, len(prompt) // 4)  # of the prompt in tokens, by a rule of thumb
        self._words, self._used = split_words(text), used
        self.delay = min(WORD_SECONDS, TURN_SECONDS / (len(self._words) + 30))
        self._started = time.monotonic()
        self._first_ms = 0  # when the first words came
        self._message: Json = {}  # the assistant's, that is being streamed
        self._index = self._pieces = 0  # its content block; its words, which count as its tokens
        self._heard = ""  # the text so far of a block that is not complete
        self._taken = self._made = 0  # tokens of the messages that are complete
        self._asides = 0  # `user` events, which the real program counts as turns

    def events(
        self, tools: list[str], schema: object, replay: Json | None
    ) -> Iterator[Json | None]:
        """A turn that nobody interrupts. None is the time that a word takes."""
        yield from self._open_message()
        if replay:
            yield replay
        yield from self._block(
            {"type": "thinking", "thinking": THOUGHT, "signature": "ZGVtbw=="},
            [{"type": "thinking_delta", "thinking": word} for word in split_words(THOUGHT)]
            + [{"type": "signature_delta", "signature": "ZGVtbw=="}],
        )
        if "Bash" in tools:
            yield from self._use_tool("Bash", COMMAND, NOT_RUN, {"stdout": NOT_RUN, **SHELL})
            yield from self._open_message()
        value = structured(schema)
        if value is not None:
            yield from self._use_tool("StructuredOutput", value, STRUCTURED, STRUCTURED)
            end = {"result": compact(value), "stop_reason": "tool_use", "structured_output": value}
        else:
            text = "".join(self._words)
            deltas = [{"type": "text_delta", "text": word} for word in self._words]
            yield from self._block({"type": "text", "text": text}, deltas)
            yield from self._close_message("end_turn")
            end = {"result": text, "stop_reason": "end_turn"}
        times = {"ttft_ms": self._first_ms, "ttft_stream_ms": self._first_ms}
        yield self._result(**json.loads(SUCCESS), **times, **end)

    def interrupted(self) -> Iterator[Json]:
        """How a turn ends when it is interrupted where `events` has got to."""
        if self._heard:
            yield self._assistant({"type": "text", "text": self._heard})
        yield self._aside({"type": "text", "text": "[Request interrupted by user]"})
        about = "[ede_diagnostic] result_type=user last_content_type=n/a stop_reason=null"
        yield self._result(terminal_reason="aborted_streaming", errors=[about])

    def _open_message(self) -> Iterator[Json]:
        yield {"type": "system", "subtype": "status", "status": "requesting"}
        self._index = self._pieces = 0
        self._message = {
            "id": f"msg_demo{uuid4().hex[:16]}",
            "type": "message",
            "role": "assistant",
            "model": "demo",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(1),
        }
        yield self._stream("message_start", message=self._message)

    def _close_message(self, reason: str) -> Iterator[Json]:
        delta, usage = {"stop_reason": reason, "stop_sequence": None}, self._usage(self._pieces)
        yield self._stream("message_delta", delta=delta, usage=usage)
        yield self._stream("message_stop")
        self._taken, self._made = self._taken + self._size, self._made + self._pieces
        for key, count in (("inputTokens", self._size), ("outputTokens", self._pieces)):
            self._used[key] = self._used.get(key, 0) + count

    def _usage(self, made: int) -> Json:
        cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"input_tokens": self._size, **cache, "output_tokens": made}

    def _block(self, block: Json, deltas: list[Json]) -> Iterator[Json | None]:
        blank = {key: BLANK.get(key, value) for key, value in block.items()}
        yield self._stream("content_block_start", index=self._index, content_block=blank)
        for delta in deltas:
            yield None
            self._first_ms = self._first_ms or self._elapsed_ms()
            self._pieces += 1
            self._heard += delta.get("text", "")
            if "thinking" in delta:
                count = {"estimated_tokens": self._pieces, "estimated_tokens_delta": 1}
                yield {"type": "system", "subtype": "thinking_tokens", **count}
            yield self._stream("content_block_delta", index=self._index, delta=delta)
        yield self._assistant(block)
        yield self._stream("content_block_stop", index=self._index)
        self._index, self._heard = self._index + 1, ""

    def _use_tool(self, name: str, given: Json, said: str, record: object) -> Iterator[Json | None]:
        tool_id = f"toolu_demo{uuid4().hex[:16]}"
        words = ["", *split_words(json.dumps(given))]
        deltas = [{"type": "input_json_delta", "partial_json": word} for word in words]
        block = {"type": "tool_use", "id": tool_id, "name": name, "input": given}
        yield from self._block(block, deltas)
        yield from self._close_message("tool_use")
        outcome = {"type": "tool_result", "content": said, "is_error": False}
        yield self._aside({"tool_use_id": tool_id, **outcome}) | {"tool_use_result": record}

    def _stream(self, kind: str, **fields: object) -> Json:
        event = {"type": kind, **fields}
        return {"type": "stream_event", "event": event, "parent_tool_use_id": None}

    def _assistant(self, block: Json) -> Json:
        message = {**self._message, "content": [block], "context_management": None}
        request_id = f"req_demo{uuid4().hex[:16]}"
        return {
            "type": "assistant",
            "message": message,
            "parent_tool_use_id": None,
            "request_id": request_id,
        }

    def _aside(self, block: Json) -> Json:
        self._asides += 1
        return user_event([block])

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self._started) * 1000)

    def _result(self, **fields: object) -> Json:
        event: Json = json.loads(RESULT)
        event["usage"] |= {"input_tokens": self._taken, "output_tokens": self._made}
        if self._used:
            event["modelUsage"] = {"demo": {**self._used, **json.loads(MODEL_USAGE)}}
        figures = {"duration_ms": self._elapsed_ms(), "num_turns": 1 + self._asides}
        return {**event, **figures, "fast_mode_state": "off", **fields}


class Session:
    """One process: its options, its queue of messages, its answers to control requests."""

    def __init__(self, given: Options, wire: Wire, memory: Memory, cwd: str) -> None:
        self._given, self._wire, self._memory, self._cwd = given, wire, memory, cwd
        skips = "--dangerously-skip-permissions" in given
        self._may_skip = skips or "--allow-dangerously-skip-permissions" in given
        mode = "bypassPermissions" if skips else "default"
        self._mode = self._option("--permission-mode") or mode
        self._schema: object = None
        with suppress(ValueError):  # what is no schema cannot be met, like one that is too hard
            self._schema = json.loads(self._option("--json-schema"))
        self._turns, self._last_prompt = 0, ""
        self._session_id = self._choose_session()
        self._used: Json = {}  # tokens of the whole process
        self._initialized = self._running = self._interrupted = self._stopping = False
        self._seen: set[str] = set()
        self._queue: deque[tuple[object, str]] = deque()

    def _option(self, name: str) -> str:
        return (self._given.get(name) or [""])[-1]

    def _choose_session(self) -> str:
        wanted, resumed = self._option("--session-id"), self._option("--resume")
        if wanted and self._memory.load(wanted):
            raise RefusedError(f"Error: Session ID {wanted} is already in use.")
        if not resumed:
            return wanted or str(uuid4())
        known = self._memory.load(resumed)
        if known is None or known[0] != self._cwd:
            sentence = f"No conversation found with session ID: {resumed}"
            self._session_id = resumed
            self._tell({**json.loads(RESULT), "errors": [sentence]})
            raise RefusedError(sentence)
        _, self._turns, self._last_prompt = known
        return wanted or str(uuid4()) if "--fork-session" in self._given else resumed

    def _tell(self, event: Json) -> None:
        ids = {"session_id": self._session_id, "uuid": str(uuid4())}
        self._wire.send({**event, **ids, **event})  # a replay has its own uuid

    def run(self) -> int:
        """Serve messages until the input ends; the exit code. Raises RefusedError."""
        failed = False
        while not self._stopping:
            while not self._queue:
                line = self._wire.line(None)
                if line is None:
                    return int(failed)
                self._accept(line)
            self._running, self._interrupted = True, False
            failed = self._serve(*self._queue.popleft())
            self._running = False
        return 0

    def _serve(self, content: object, message_id: str) -> bool:
        """Write one turn; whether its result is an error."""
        before, prompt = self._last_prompt, read_prompt(content)[0]
        self._turns, self._last_prompt = self._turns + 1, shorten(prompt)
        self._memory.save(self._session_id, self._cwd, self._turns, self._last_prompt)
        tools, schema = self._tools(), self._schema
        mine = {"cwd": self._cwd, "tools": tools, "permissionMode": self._mode}
        self._tell({**json.loads(INIT), **mine})
        replays = "--replay-user-messages" in self._given
        replay = user_event(content) | {"uuid": message_id, "isReplay": True} if replays else None
        turn = Turn(prompt, answer(content, self._turns, before), self._used)
        override = os.environ.get("CLAUDE_PROXY_DEMO_DELAY_MS", "")
        delay = int(override) / 1000 if override.isdecimal() else turn.delay
        for event in turn.events(tools, schema, replay):
            if event is not None:
                self._tell_if_wanted(event)
            elif self._interrupted_within(delay):
                for last in turn.interrupted():
                    self._tell(last)
                return True
        return False

    def _tools(self) -> list[str]:
        refused = " ".join(self._given.get("--disallowedTools", [])).replace(",", " ").split()
        # With a limit of one call to the model, nobody would be there to read Bash's output.
        bash = "Bash" not in refused and self._option("--max-turns") != "1"
        return ["Bash"] * bash + ["StructuredOutput"] * (self._schema is not None)

    def _tell_if_wanted(self, event: Json) -> None:
        partial = event["type"] == "stream_event" or event.get("subtype") == "status"
        if not partial or "--include-partial-messages" in self._given:
            self._tell(event)

    def _interrupted_within(self, seconds: float) -> bool:
        """Wait, and hear what stdin says meanwhile; whether that ends the turn."""
        deadline = time.monotonic() + seconds
        while not self._interrupted and (line := self._wire.line(deadline)) is not None:
            self._accept(line)
        return self._interrupted

    def stop(self) -> None:
        """SIGINT: end the running turn as an interrupt does, then the process; exit code 0."""
        if not self._running:
            sys.exit(0)
        self._interrupted = self._stopping = True

    def _accept(self, line: bytes) -> None:
        event = decode(line) if line.strip() else {}
        field = {"user": "message", "control_request": "request"}.get(str(event.get("type")))
        if field is None:
            return  # other types are ignored
        body = event.get(field)
        if not isinstance(body, dict):
            raise RefusedError(f"Error parsing streaming input line: no {field}")
        if field == "request":
            self._answer_control(event.get("request_id"), body)
            return
        message_id = str(event.get("uuid") or uuid4())
        if message_id not in self._seen:  # a message that comes twice is taken once
            self._seen.add(message_id)
            self._queue.append((body.get("content"), message_id))

    def _answer_control(self, request_id: object, request: Json) -> None:
        response: Json = {"subtype": "success", "request_id": request_id}
        try:
            said = self._control(str(request.get("subtype")), request)
            response |= {} if said is None else {"response": said}
        except ControlError as error:
            response |= {"subtype": "error", "error": str(error)}
        self._wire.send({"type": "control_response", "response": response})
        if "mode" in response.get("response", {}):
            status = {"subtype": "status", "status": None, "permissionMode": self._mode}
            self._tell({"type": "system", **status})

    def _control(self, subtype: str, request: Json) -> Json | None:
        """Do what a control request asks; what to say about it. Raises ControlError."""
        match subtype:
            case "initialize":
                # A second one changes nothing.  Prompts change nothing either: nobody reads them.
                if not self._initialized and request.get("jsonSchema") is not None:
                    self._schema = request["jsonSchema"]
                self._initialized = True
                return {**json.loads(SETUP), "pid": os.getpid()}
            case "interrupt":
                self._interrupted = True  # without effect when idle: the next turn clears it
            case "set_model":
                note = f"Set model to {request.get('model') or 'demo'}"
                note = f"<local-command-stdout>{note}</local-command-stdout>"
                self._tell(user_event(note) | {"isReplay": True})
            case "apply_flag_settings":
                settings = request.get("settings")
                if isinstance(settings, dict) and settings.get("model"):
                    self._control("set_model", settings)
            case "set_permission_mode":
                if request.get("mode") == "bypassPermissions" and not self._may_skip:
                    raise ControlError(
                        "Cannot set permission mode to bypassPermissions because the session was "
                        "not launched with --dangerously-skip-permissions"
                    )
                self._mode = str(request.get("mode") or "default")
                return {"mode": self._mode}
            case "mcp_status":
                return {"mcpServers": []}
            case _:
                raise ControlError(f"Unsupported control request subtype: {subtype}")
        return None


def main() -> int:
    """Run as a program; the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        given = parse_options(sys.argv[1:])
        if "--version" in given:
            os.write(1, BANNER.encode())
            return 0
        check_options(given)
        memory = Memory(state_folder(dict(os.environ)), os.environ.get("CLAUDE_CONFIG_DIR", ""))
        session = Session(given, Wire(), memory, str(Path.cwd()))
        signal.signal(signal.SIGINT, lambda *_: session.stop())
        return session.run()
    except BrokenPipeError:
        return 0  # nobody reads stdout any more: there is nobody to tell
    except (RefusedError, OSError) as error:
        with suppress(OSError):
            os.write(2, f"{error}\n".encode("utf-8", "replace"))
        return 1


if __name__ == "__main__":
    sys.exit(main())
