"""Which browser is taken, and that looking for one ends."""

import os
import stat
import time

import browser
import pytest

STARTS, FAILS = "#!/bin/sh\n", "#!/bin/sh\nexit 1\n"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without a browser; returns a function that installs something."""
    for name in ("OURS", "PLAYWRIGHTS"):
        monkeypatch.setattr(browser, name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "named"))

    def install(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return install


def test_one_that_starts_is_found_on_path_or_where_playwright_keeps_its_own(bare):
    assert browser.find_browser() is None
    shell = "chrome-headless-shell-linux64/chrome-headless-shell"
    bare(f"OURS/chromium_headless_shell-1000/{shell}", STARTS)
    ours = bare(f"OURS/chromium_headless_shell-1255/{shell}", STARTS)
    bare("OURS/chromium-1255/chrome-linux64/chrome_crashpad_handler", STARTS)
    bare("bin/chromium-browser", FAILS)  # as Ubuntu's, which only asks for a snap
    assert browser.find_browser() == ours
    named = bare("named/chromium-7/chrome-linux/chrome", STARTS)
    assert browser.find_browser() == named
    on_path = bare("bin/google-chrome", STARTS)
    assert browser.find_browser() == on_path


def test_a_try_that_does_not_end_is_ended_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(browser, "LIMIT_S", 0.5)
    begun = time.monotonic()
    reason = browser.failure(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"])
    assert reason == "not done after 0.5 s"
    assert time.monotonic() - begun < 30
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


def test_why_a_try_failed_is_one_line():
    assert browser.failure(["sh", "-c", "echo 'E: no such package'; echo more; exit 3"]) == "E: no such package"
    assert browser.failure(["sh", "-c", "exit 3"]) == "exit status 3"
    assert "No such file" in browser.failure(["no-such-program"])
    assert browser.failure(["true"]) is None
