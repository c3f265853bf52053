"""What the scripts share that `tests/systemd/run` runs in a booted Debian."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def run(*command: str | Path, check: bool = True) -> str:
    """Return what a command prints, standard error included."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    line = " ".join(map(str, command))
    assert not check or done.returncode == 0, f"{line}: {done.returncode}: {done.stdout}"
    return done.stdout.strip()


def read_blocks(page: Path, heading: str, language: str) -> list[str]:
    """Return the blocks in a language below a heading of a page, up to the next heading.

    A line with one # may be a comment, so the page's own title does not count.
    """
    sections = re.split(r"^##+ (.+)\n", page.read_text("utf-8"), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[heading]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert blocks, f"{page.name} has no {language} below {heading}"
    return blocks


def read_lines(page: Path, heading: str, language: str) -> str:
    return "".join(read_blocks(page, heading, language))


def follow(page: Path, heading: str) -> str:
    """Run the shell lines below a heading as an administrator pastes them, in a terminal."""
    blocks = read_blocks(page, heading, "sh")
    # Such a block is a file to save.
    lines = [block for block in blocks if not block.startswith("#!")]
    (HERE / "pasted").write_text("set -eu\n" + "".join(lines))
    return run("script", "-qec", "bash pasted", "/dev/null")


def list_files() -> set[str]:
    """Return every path, without the kernel's file systems, systemd's own files and the tests'."""
    skipped = {"/proc", "/sys", "/dev", "/lab", "/run/systemd", "/var/lib/systemd", "/var/log"}
    paths = set()
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
        paths |= {os.path.join(folder, name) for name in (*folders, *files)}
    return paths


def run_checks(checks: object) -> bool:
    """Call each test_ method, in the order of the class, and return whether all have passed."""
    names = [name for name in vars(type(checks)) if name.startswith("test_")]
    failed = 0
    for name in names:
        try:
            getattr(checks, name)()
            print(f"ok     {name}", flush=True)
        except Exception as exc:
            failed += 1
            print(f"FAILED {name}: {type(exc).__name__}: {exc}", flush=True)
    print(f"{len(names) - failed} passed, {failed} failed", flush=True)
    return failed == 0
