"""Build what a release uploads, and try it where no checkout is near.

Run as `python .ci/release.py [FOLDER]` by a Python that has the package `build`; FOLDER keeps what
was built.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LICENCES = {"LICENSE", "hvit_jax/demo/images.LICENSE", "hvit_jax/demo/pictures.LICENSE"}
ABOUT = {"METADATA", "WHEEL", "RECORD", "entry_points.txt"}


def build(folder: Path, *options: str) -> Path:
    """Build into a folder, and give the wheel."""
    words = [sys.executable, "-m", "build", "--outdir", str(folder), *options]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """List a wheel's files with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {each.filename: each.CRC for each in archive.infolist()}


def check_contents(wheel: Path) -> None:
    """Refuse a wheel that holds anything but the package, its licences and what pip needs."""
    files = {path for path in (ROOT / "hvit_jax").rglob("*") if "__pycache__" not in path.parts}
    wanted = {str(path.relative_to(ROOT)) for path in files if path.is_file()}
    about = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    wanted |= {about + name for name in ABOUT | {f"licenses/{name}" for name in LICENCES}}
    if differing := sorted(wanted ^ contents(wheel).keys()):
        raise SystemExit(f"{wheel.name} lacks these files, or has them too much: {differing[:9]}")


def try_out(wheel: Path, folder: Path) -> None:
    """Install a wheel into an environment of its own, and run the demo there."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    for words in (
        ["pip", "install", "--quiet", str(wheel)],
        ["hvit", "--version"],
        ["hvit", "--help"],
        ["hvit", "eval", "--method", "hourglass"],
    ):
        subprocess.run([programs / words[0], *words[1:]], cwd=folder, check=True)


def main(folder: Path | None) -> None:
    """Build wheel and sdist, check them, and put them into a folder."""
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        wheel = build(trial / "built")  # Of the sdist, which is built first.
        if contents(wheel) != contents(build(trial / "direct", "--wheel")):
            raise SystemExit("the sdist makes another wheel than the checkout")
        check_contents(wheel)
        try_out(wheel, trial)
        if folder is not None:
            shutil.copytree(wheel.parent, folder, dirs_exist_ok=True)
    print(f"{wheel.name} holds what it should, and works")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
