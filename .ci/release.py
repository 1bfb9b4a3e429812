"""Build sdist and wheel to publish: python .ci/release.py https://the.host/owner/repository [--out dist]

In a copy of the checkout README's relative links become absolute, as a package index needs them, and the project gets
its addresses; build makes sdist and wheel there, and twine checks them. Needs `pip install build twine`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?!https?://|#)[^)\s]+)\)")


def absolute(readme: str, url: str, tag: str) -> str:
    """The text with each relative link leading to the repository, and each picture to its file."""

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return LINK.sub(link, readme)


def with_addresses(pyproject: str, url: str) -> str:
    """The project's file with a table of addresses."""
    table = f"""[project.urls]
Homepage = "{url}"
Documentation = "{url}/blob/HEAD/docs/README.md"
Changelog = "{url}/blob/HEAD/CHANGELOG.md"
Issues = "{url}/issues"

"""
    before, mark, after = pyproject.partition("[project.scripts]")
    if not mark or "[project.urls]" in pyproject:
        raise ValueError("pyproject.toml must have [project.scripts], and no [project.urls]")
    return before + table + mark + after


def version() -> str:
    (found,) = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "automagic_bnb/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found


def prepare(folder: Path, url: str) -> None:
    """A copy of what git tracks, or will, with links and addresses."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, change in (
        ("README.md", lambda text: absolute(text, url, f"v{version()}")),
        ("pyproject.toml", lambda text: with_addresses(text, url)),
    ):
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the repository's address, which begins with https://")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for sdist and wheel")
    parser.add_argument("--no-isolation", action="store_true", help="build with the packages that are installed")
    args = parser.parse_args(arguments)
    if not args.url.startswith("https://"):
        parser.error("the address must begin with https://")
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), args.url.rstrip("/"))
        command = [sys.executable, "-m", "build", "--outdir", str(args.out.resolve()), scratch]
        subprocess.run([*command, *(["--no-isolation"] if args.no_isolation else [])], cwd=scratch, check=True)
    built = sorted(map(str, args.out.glob(f"automagic_bnb-{version()}*")))
    return subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
