"""The browser that shows the report to its tests. As a program, a step of `make test`: brings one where none is."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Chromium and its shell without windows, as playwright's releases name them.
OF_PLAYWRIGHT = ("chrome", "chrome-headless-shell", "headless_shell")
OURS = Path(__file__).resolve().parent.parent / ".cache/browsers"
PLAYWRIGHTS = Path.home() / ".cache/ms-playwright"

PLAYWRIGHT = [[sys.executable, "-m", "playwright", "install", "--only-shell", "--no-progress", "chromium"]]
APT = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=60"]
DEBIAN = [[*APT, "update"], [*APT, "install", "--no-install-recommends", "chromium"]]
ENVIRONMENT = {"PLAYWRIGHT_BROWSERS_PATH": str(OURS), "DEBIAN_FRONTEND": "noninteractive"}
LIMIT_S = 120


def find_browser() -> str | None:
    """An installed browser that starts: one on PATH, else one that playwright has installed, the newest first."""
    found = [path for name in ON_PATH if (path := shutil.which(name))]
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    for folder, name in product((*([Path(named)] if named else ()), OURS, PLAYWRIGHTS), OF_PLAYWRIGHT):
        found += sorted(map(str, folder.glob(f"chromium*-*/*/{name}")), reverse=True)
    return next((path for path in found if failure([path, "--version"]) is None), None)


def failure(command: list[str]) -> str | None:
    """Runs it for LIMIT_S at most; a line that says why it failed, None where it did not."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True, **pipes)
    except OSError as error:
        return str(error)
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        end(process)
        return f"not done after {LIMIT_S} s"
    lines = said.splitlines() or [f"exit status {process.returncode}"]
    errors = [line for line in lines if line.startswith(("Error: ", "E: "))]
    return (errors or lines[-1:])[0] if process.returncode else None


def end(process: subprocess.Popen) -> None:
    """With its children. Asked first, apt leaves its packages in order."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
            return


def main() -> None:
    path, reasons = find_browser(), []
    ways = {"playwright install": PLAYWRIGHT}
    if os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get"):
        ways["apt-get install"] = DEBIAN
    for name, commands in ways.items():
        if path:
            break
        print(f"browser: none is installed; {name} chromium", flush=True)
        reason = next(filter(None, map(failure, commands)), "it does not start")
        path = find_browser()
        reasons.append(f"{name}: {reason}")
    if path is None:
        sys.exit(
            f"browser: the report's tests need one ({'; '.join(reasons)}): put chromium or Chrome on PATH "
            "(Debian: apt-get install chromium)"
        )
    print(f"browser: {path}")


if __name__ == "__main__":
    main()
