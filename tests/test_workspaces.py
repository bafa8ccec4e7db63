"""Workspaces: names are checked, directories made, links that lead out refused, causes named."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions import workspaces as module
from claude_proxy.sessions.workspaces import Probe, Workspaces, check_name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that does not exist yet, with a real path."""
    return tmp_path.resolve() / "srv" / "base"


def refused(base: Path, name: str | None) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        Workspaces(base).open(name)
    return caught.value


def unavailable(base: Path, name: str | None) -> str:
    error = refused(base, name)
    assert error.failure is Failure.WORKSPACE_UNAVAILABLE
    assert str(base.parent) not in error.message
    return error.message


def leads_out(base: Path, name: str | None) -> str:
    error = refused(base, name)
    assert error.failure is Failure.INVALID_VALUE
    assert error.param == "workspace"
    assert "leads out of its place" in error.message
    assert str(base.parent) not in error.message
    return error.message


def failing(code: int, last: str) -> Callable[[Path, int, bool, bool], None]:
    """A `Path.mkdir` that fails for one directory and makes all others."""
    real = Path.mkdir

    def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == last:
            raise OSError(code, os.strerror(code), str(path))
        real(path, mode, parents, exist_ok)

    return mkdir


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "-", "_", "0", "a..", "x" * 64])
def test_a_good_name_is_accepted(name: str, base: Path) -> None:
    check_name(name)
    assert Workspaces(base).open(name) == base / "workspace" / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "a/b", "../a", "/etc", "a\\b", "a b", "a\n", "a\0", "é", "٣", "x" * 65],
)
def test_a_bad_name_is_refused_before_anything_is_made(name: str, base: Path) -> None:
    error = refused(base, name)
    assert error.failure is Failure.INVALID_VALUE
    assert error.param == "workspace"
    assert repr(name) in error.message
    assert "1 to 64" in error.message
    assert not base.exists()


def test_a_long_bad_name_is_shown_cut() -> None:
    with pytest.raises(ProxyError) as caught:
        check_name("x" * 5000)
    assert len(caught.value.message) < 300


@given(name=st.text("aZ9._-/\\~\0\n é", max_size=70))
def test_a_name_that_passes_is_one_path_step(name: str) -> None:
    try:
        check_name(name)
    except ProxyError:
        assert not re.fullmatch(r"[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,63}", name)
    else:
        assert Path("/b", name).parent == Path("/b")
        assert Path("/b", name).name == name
        assert name not in (".", "..")


def test_directories_are_made_on_first_use_and_found_again(base: Path) -> None:
    workspaces = Workspaces(base)
    assert not base.exists()
    shared, named = workspaces.open(None), workspaces.open("one")
    assert shared == base / "shared_workspace"
    assert named == base / "workspace" / "one"
    (named / "file").touch()
    assert workspaces.open("one") == named
    assert workspaces.open(None) == shared
    assert (named / "file").exists()


def test_the_umask_decides_the_mode(base: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Workspaces(base).open("one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_a_base_that_is_a_link_is_fine(base: Path, tmp_path: Path) -> None:
    base.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(base)
    assert Workspaces(link).open("one") == base / "workspace" / "one"
    assert Workspaces(link).open(None) == base / "shared_workspace"


def test_a_link_to_another_workspace_is_fine(base: Path) -> None:
    target = Workspaces(base).open("one")
    (base / "workspace" / "alias").symlink_to(target)
    assert Workspaces(base).open("alias") == target


def test_a_room_moved_within_the_base_is_fine(base: Path) -> None:
    (base / "big").mkdir(parents=True)
    (base / "workspace").symlink_to("big")
    assert Workspaces(base).open("one") == base / "big" / "one"


@pytest.mark.parametrize(
    "target", ["/etc", "../../outside", "../shared_workspace", "..", ".", "/nonexistent/x"]
)
def test_a_named_workspace_that_leads_out_is_refused(target: str, base: Path) -> None:
    (base / "workspace").mkdir(parents=True)
    (base / "shared_workspace").mkdir()
    (base.parent / "outside").mkdir()
    (base / "workspace" / "one").symlink_to(target)
    assert "'workspace/one'" in leads_out(base, "one")


def test_a_neighbour_with_the_same_beginning_is_outside(base: Path) -> None:
    (base / "workspace").mkdir(parents=True)
    (base / "workspace2").mkdir()
    (base / "workspace" / "one").symlink_to(base / "workspace2")
    leads_out(base, "one")


def test_nothing_is_made_behind_a_room_that_leads_out(base: Path) -> None:
    outside = base.parent / "outside"
    outside.mkdir(parents=True)
    base.mkdir()
    (base / "workspace").symlink_to(outside)
    assert "'workspace'" in leads_out(base, "one")
    assert not list(outside.iterdir())


@pytest.mark.parametrize("target", ["/etc", ".", "..", "/nonexistent/x"])
def test_a_shared_workspace_that_leads_out_is_refused(target: str, base: Path) -> None:
    base.mkdir(parents=True)
    (base / "shared_workspace").symlink_to(target)
    assert "'shared_workspace'" in leads_out(base, None)


def test_a_link_chain_that_leads_out_is_refused(base: Path) -> None:
    room = base / "workspace"
    room.mkdir(parents=True)
    (room / "two").symlink_to("/etc")
    (room / "one").symlink_to("two")
    leads_out(base, "one")


@pytest.mark.parametrize("place", ["base", "workspace", "workspace/one"])
def test_a_file_in_the_way_is_named(place: str, base: Path) -> None:
    file = base if place == "base" else base / place
    file.parent.mkdir(parents=True)
    file.touch()
    message = unavailable(base, "one")
    assert "not a directory is in the way" in message
    assert ("WORKSPACE_BASE_PATH" if place == "base" else f"'{place}'") in message


def test_a_file_above_the_base_is_in_the_way_too(base: Path) -> None:
    base.parent.touch()
    with pytest.raises(ProxyError, match="in the way"):
        Workspaces(base).open(None)


def test_links_in_a_circle_are_named(base: Path) -> None:
    room = base / "workspace"
    room.mkdir(parents=True)
    (room / "one").symlink_to("two")
    (room / "two").symlink_to("one")
    assert "lead in a circle" in unavailable(base, "one")


def test_a_base_in_a_circle_is_named(base: Path) -> None:
    base.parent.mkdir()
    base.symlink_to(base)
    message = unavailable(base, "one")
    assert "WORKSPACE_BASE_PATH" in message


def test_a_link_to_nowhere_within_is_named(base: Path) -> None:
    room = base / "workspace"
    room.mkdir(parents=True)
    (room / "one").symlink_to("gone")
    assert "leads nowhere" in unavailable(base, "one")


def test_a_path_that_is_too_long_is_named(base: Path) -> None:
    with pytest.raises(ProxyError, match="too long"):
        Workspaces(base / ("x" * 300)).open(None)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "permission was denied"),
        (errno.EPERM, "permission was denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "no space is left"),
        (errno.EIO, "the system says 'Input/output error'"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        (None, "base", "WORKSPACE_BASE_PATH"),
        (None, "shared_workspace", "'shared_workspace'"),
        ("one", "workspace", "'workspace'"),
        ("one", "one", "'workspace/one'"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(
    code: int,
    said: str,
    place: tuple[str | None, str, str],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, last, label = place
    monkeypatch.setattr(Path, "mkdir", failing(code, last))
    message = unavailable(base, name)
    assert said in message
    assert label in message


def test_an_existing_directory_counts_whatever_error_making_it_gives(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Workspaces(base).open("one")
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS, "one"))
    assert Workspaces(base).open("one") == made


@pytest.mark.parametrize(("name", "label"), [(None, "shared_workspace"), ("one", "workspace/one")])
def test_a_directory_that_may_not_be_entered_is_named(
    name: str | None, label: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Workspaces(base).open(name)
    monkeypatch.setattr(module, "_may", lambda path, mode: not mode & os.X_OK)
    message = unavailable(base, name)
    assert f"'{label}'" in message
    assert "permission was denied" in message


def test_the_probe_finds_and_makes_the_shared_workspace(base: Path) -> None:
    expected = Probe(readable=True, writable=True, path=base / "shared_workspace")
    assert Workspaces(base).probe() == expected
    assert Workspaces(base).probe() == expected
    assert list(base.rglob("*")) == [base / "shared_workspace"]


def test_the_probe_tells_an_unwritable_workspace(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_may", lambda path, mode: not mode & os.W_OK)
    assert Workspaces(base).probe() == Probe(True, False, base / "shared_workspace")


def test_the_probe_tells_an_unreadable_workspace(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_may", lambda path, mode: not mode & os.R_OK)
    assert Workspaces(base).probe() == Probe(False, False, base / "shared_workspace")


def test_the_probe_tells_a_workspace_that_cannot_be_made(base: Path) -> None:
    base.parent.touch()
    assert Workspaces(base).probe() == Probe(False, False, base / "shared_workspace")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_permission_is_that_of_the_effective_user() -> None:
    # Not tmp_path: pytest lets nobody else into the directories above it.
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        base.chmod(0o755)
        Workspaces(base).open(None).chmod(0o755)
        os.seteuid(65534)
        try:
            probe = Workspaces(base).probe()
            with pytest.raises(ProxyError, match="permission was denied"):
                Workspaces(base).open("one")
        finally:
            os.seteuid(0)
    assert (probe.readable, probe.writable) == (True, False)
