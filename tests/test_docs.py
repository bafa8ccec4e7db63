"""
What the documents promise: their examples run, and what they list is what the code has.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from claude_proxy.dialects.fields import TurnFields
from claude_proxy.dialects.native import NativeRequest
from claude_proxy.dialects.sampling import IGNORED_FIELDS, REFUSED_FIELDS, USED_FIELDS
from claude_proxy.errors import Failure
from claude_proxy.settings import SETTINGS
from claude_proxy.tap import Options
from tests.e2e.daemon import Daemon

_ROOT = Path(__file__).resolve().parent.parent
_PAGES = sorted([*_ROOT.glob("*.md"), *(_ROOT / "docs").glob("*.md")])
_URL = "http://localhost:3000"
_SECONDS = 60

_FIELDS = [info.encode_name for info in msgspec.structs.fields(NativeRequest)]

_NOT_OURS = {
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_VERTEX_PROJECT_ID",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "CLAUDE_CODE_MAX_RETRIES",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLAUDE_CODE_VERSION",
    "CLAUDE_CONFIG_DIR",
    "CLOUD_ML_REGION",
    "ENABLE_FORWARD_USER_INFO_HEADERS",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTPS_PROXY",
    "IS_SANDBOX",
    "LIBRECHAT_BODY_CONVERSATIONID",
    "STATE_DIRECTORY",
    "TICKETS_TOKEN",
    "XDG_STATE_HOME",
}
"""Variables of other programs that the documents speak of."""


@dataclass(frozen=True)
class _Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def _blocks(page: Path) -> Iterator[_Block]:
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for match in fenced.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield _Block(page, line, match[1], match[2])


def _bash_blocks(page: Path) -> list[_Block]:
    return [block for block in _blocks(page) if block.language == "bash"]


_EXAMPLES = [block for page in _PAGES for block in _bash_blocks(page) if f"{_URL}/" in block.text]


def _rows(page: Path, heading: str = "") -> list[list[str]]:
    """The body rows of the tables under a heading, to the next one of any level."""
    text = page.read_text(encoding="utf-8")
    if heading:
        text = re.split(r"^#", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[
            0
        ]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def _code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]*)`", cell)


# The examples.


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The demonstration without keys, with the MCP configuration that is shipped."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "cwd").mkdir()
    example = (_ROOT / "mcp-config.json.example").read_bytes()
    (folder / "cwd" / "mcp-config.json").write_bytes(example)
    with _demonstration(folder, {}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The demonstration with the keys of the README."""
    folder = tmp_path_factory.mktemp("closed")
    setting, names = (b.text for b in _blocks(_ROOT / "README.md") if b.language == "ini")
    key_file = folder / "keys"
    key_file.write_text(names, encoding="utf-8")
    variable, _, key = setting.strip().partition("=")
    with _demonstration(folder, {variable: key, "API_KEYS_FILE": str(key_file)}) as daemon:
        yield daemon


def _demonstration(folder: Path, env: dict[str, str]) -> Daemon:
    # Tests may run as root, who must say that this is no accident.
    quick = {"CLAUDE_PROXY_DEMO_DELAY_MS": "0", "IS_SANDBOX": "1"}
    return Daemon(folder, "claude", "http://127.0.0.1:9", env={**quick, **env}, args=["--demo"])


_STRICT_CURL = """
set -euo pipefail
curl() { command curl --fail-with-body --no-progress-meter --max-time 30 "$@" | tee -a answers; }
"""


@pytest.mark.parametrize("block", _EXAMPLES, ids=lambda block: block.place)
def test_an_example_works(block: _Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    keyed = "sk-" in block.text
    daemon: Daemon = request.getfixturevalue("closed_server" if keyed else "open_server")
    done = subprocess.run(
        ["bash", "-c", _STRICT_CURL + block.text.replace(_URL, daemon.url)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "no_proxy": "*"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = (tmp_path / "answers").read_text(encoding="utf-8")
    turns = block.text.count(f"{_URL}/api/claude")
    assert answers.count('"type":"result","subtype":"success","is_error":false') == turns
    chats = block.text.count(f"{_URL}/v1/chat/completions")
    assert answers.count('"finish_reason":"stop"') == chats
    models = block.text.count(f"{_URL}/v1/models")
    assert answers.count('{"object":"list","data":[{"id":"claude-code"') == models
    assert answers.count('"status":"degraded","timestamp"') == block.text.count(f"{_URL}/health")


def test_the_closed_server_is_closed(closed_server: Daemon) -> None:
    with closed_server.client() as client:
        assert client.post("/api/claude", json={"prompt": "Hello"}).status_code == 401


@pytest.mark.parametrize("field", _FIELDS)
def test_the_readme_has_an_example_of_each_field(field: str) -> None:
    examples = [block.text for block in _EXAMPLES if block.page.name == "README.md"]
    assert any(f'"{field}":' in text for text in examples)


def test_ci_runs_the_readme_s_test_command() -> None:
    _install, test = (block.text for block in _bash_blocks(_ROOT / "README.md")[:2])
    script = (_ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.endswith(f"\n{test}")
    workflow = (_ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run\n" in workflow


# The lists.


def test_every_setting_is_documented_as_it_is() -> None:
    documented = [
        tuple("".join(_code(cell)) for cell in row[:3])
        for row in _rows(_ROOT / "docs" / "settings.md")
    ]
    expected = [
        (setting.variable, f"--{setting.flag}" if setting.flag else "", setting.default)
        for setting in SETTINGS
    ]
    assert documented == expected


def test_the_unit_of_a_setting_is_documented() -> None:
    words = {"ms": "milliseconds", "bytes": "bytes"}
    meanings = {_code(row[0])[0]: row[3] for row in _rows(_ROOT / "docs" / "settings.md")}
    silent = [s.variable for s in SETTINGS if s.unit and words[s.unit] not in meanings[s.variable]]
    assert silent == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_no_page_speaks_of_an_unknown_setting(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text))
    assert named - _NOT_OURS - {setting.variable for setting in SETTINGS} == set()


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_no_page_uses_an_unknown_flag(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    used = set(re.findall(r"claude-proxy --([a-z-]+)", text))
    known = Options()
    assert {flag for flag in used if flag not in known} - {"help", "version"} == set()


def test_every_field_is_documented() -> None:
    documented = [_code(row[0])[0] for row in _rows(_ROOT / "docs" / "api.md", "### Fields")]
    assert sorted(documented) == sorted(_FIELDS)


def test_every_field_of_a_chat_without_effect_is_documented() -> None:
    rows = _rows(_ROOT / "docs" / "openai.md", "### Fields without effect")
    documented = [name for row in rows for name in _code(row[0])]
    assert sorted(documented) == sorted(IGNORED_FIELDS)


def test_every_field_of_a_chat_that_is_refused_is_documented() -> None:
    rows = _rows(_ROOT / "docs" / "openai.md", "### Fields that are refused")
    assert {_code(row[0])[0]: row[1] for row in rows} == REFUSED_FIELDS


def test_every_field_of_a_chat_that_counts_is_documented() -> None:
    rows = _rows(_ROOT / "docs" / "openai.md", "### Fields that count")
    documented = {name.partition(".")[0] for row in rows for name in _code(row[0])}
    assert documented == set(USED_FIELDS)


def test_every_field_of_the_claude_object_is_documented() -> None:
    text = (_ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    section = text.partition("### The `claude` object\n")[2].partition("```")[0]
    fields = [info.encode_name for info in msgspec.structs.fields(TurnFields)]
    assert [field for field in fields if f"`{field}`" not in section] == []


def test_every_error_is_documented_as_it_is() -> None:
    documented = [
        (_code(code)[0], int(status), _code(kind)[0])
        for code, status, kind, *_ in _rows(_ROOT / "docs" / "errors.md")
    ]
    assert documented == [(failure.code, failure.status, failure.type) for failure in Failure]


def _logged() -> dict[str, set[str]]:
    """The types of log records in the code, each with the fields that are given by name."""
    found: dict[str, set[str]] = {}
    for path in sorted((_ROOT / "claude_proxy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {word.arg: word.value for word in node.keywords if word.arg is not None}
                kind = given.pop("type", None)
                if isinstance(kind, ast.Constant):
                    found.setdefault(str(kind.value), set()).update(given)
    return found


def test_every_log_record_is_documented_with_its_fields() -> None:
    documented = {
        _code(kind)[0]: set(_code(fields))
        for kind, _level, _when, fields in (
            row for row in _rows(_ROOT / "docs" / "logs.md") if len(row) == 4
        )
    }
    logged = _logged()
    assert set(documented) == set(logged)
    missing = {kind: fields - documented[kind] for kind, fields in logged.items()}
    assert {kind: fields for kind, fields in missing.items() if fields} == {}


def test_the_picture_of_the_layers_has_every_module() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.partition("## The layers")[2].partition("```\n")[2].partition("```")[0]
    named = set(re.findall(r"[a-z]+", picture))
    package = _ROOT / "claude_proxy"
    modules = {path.stem for path in package.rglob("*.py") if not path.stem.startswith("_")}
    inside_settings = {path.stem for path in (package / "settings").glob("*.py")}
    assert modules - inside_settings - named == set()


def test_the_way_of_a_request_enters_rooms_that_exist_and_each_once() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| \d+ \| `([^`]+)` \|", text, re.MULTILINE)
    assert len(rooms) == len(set(rooms)) > 10
    assert [room for room in rooms if not (_ROOT / "claude_proxy" / room).is_file()] == []


# The links.


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_readme_links_every_page() -> None:
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(_ROOT).as_posix() for page in (_ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"]({page})" not in text] == []


# The tables whose rows are tests.


def _tested_rows(page: Path) -> list[list[str]]:
    """The body rows of the tables whose last column names tests."""
    rows, in_table = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        in_table = line.endswith("| test |") or (in_table and line.startswith("| "))
        if in_table and not line.endswith(("| test |", "| --- |")):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(
    ("name", "least"), [("reliability.md", 80), ("outcomes.md", 40), ("security.md", 50)]
)
def test_every_row_names_tests_that_exist(name: str, least: int) -> None:
    rows = _tested_rows(_ROOT / "docs" / name)
    assert len(rows) > least
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", row[-1])
        assert named, row[0]
        file = ""
        for named_file, test in named:
            # A name without a file is in the file that was named before it.
            file = named_file or file
            assert re.search(rf"def {test}\(", (_ROOT / file).read_text(encoding="utf-8")), test
