"""Compile pyproject.toml's dependency groups into hash-pinned lock files that name no index.

`development` comes first; the others are held to its versions, so one tested set is what every place runs.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OPTIONS = [
    "--universal", "--generate-hashes", "--python-version=3.11", "--no-header", "--no-annotate",
    "--no-emit-index-url", "--no-emit-find-links", "--quiet",
]  # fmt: skip


def main() -> None:
    """Compile the four locks."""
    for group in ("development", "image", "station", "device"):
        held = [] if group == "development" else ["--constraint", str(HERE / "development.lock")]
        subprocess.run(
            [
                sys.executable, "-m", "uv", "pip", "compile", *OPTIONS, *held,
                "--group", f"{HERE.parent / 'pyproject.toml'}:{group}", "--output-file", str(HERE / f"{group}.lock"),
            ],
            check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
