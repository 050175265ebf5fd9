"""A signed apt archive of tiny packages, made on the spot."""

import gzip
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

CONTROL = """Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: Nobody <nobody@example.com>
Description: a package of the tests
"""


class TinyArchive:
    """An archive in a directory, with its own key; `publish` makes what was added to it known."""

    def __init__(self, folder: Path, suite: str = "trixie", components: Sequence[str] = ("main",)) -> None:
        self.folder = folder
        self.suite = suite
        self._component = components[0]
        folder.mkdir(parents=True, exist_ok=True)
        # The agent's socket lies in the home, and a socket's path has at most 107 characters.
        self._home = tempfile.TemporaryDirectory(prefix="gpg-", dir="/tmp")
        self.keyring = folder / "archive-key.gpg"
        self.top = folder / "archive"
        self.top.mkdir()
        self._gpg("--quick-generate-key", "--passphrase", "", "Archive of the tests <archive@example.com>", "ed25519")
        self.keyring.write_bytes(self._gpg("--export"))

    @property
    def mirror(self) -> str:
        return f"file://{self.top}"

    def close(self) -> None:
        subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=self._environment(), check=False)
        self._home.cleanup()

    def add(
        self, name: str, version: str = "1.0", architecture: str = "arm64", *, depends: str = "", more: str = "",
        content: str = "nothing",
    ) -> Path:  # fmt: skip
        """Make a package and put it into the pool."""
        tree = self.folder / "trees" / f"{name}-{version}-{architecture}"
        (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
        control = CONTROL.format(name=name, version=version, architecture=architecture)
        (tree / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else "") + more)
        (tree / f"usr/share/{name}").mkdir(parents=True, exist_ok=True)
        (tree / f"usr/share/{name}/content").write_text(content)
        deb = self.top / f"pool/main/{name[0]}/{name}/{name}_{version.partition(':')[2] or version}_{architecture}.deb"
        deb.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, deb], check=True, capture_output=True)
        return deb

    def add_deb(self, source: Path, name: str) -> None:
        """Put a package that is there already into the pool."""
        deb = self.top / "pool/main" / name
        deb.parent.mkdir(parents=True, exist_ok=True)
        deb.hardlink_to(source)

    def publish(self) -> None:
        """Write and sign the indexes."""
        names, digests = [], []
        for architecture in ("amd64", "arm64"):
            listed = subprocess.run(
                ["dpkg-scanpackages", "--multiversion", f"--arch={architecture}", "pool"],
                cwd=self.top, check=True, capture_output=True,
            ).stdout  # fmt: skip
            index = self.top / f"dists/{self.suite}/{self._component}/binary-{architecture}/Packages.gz"
            index.parent.mkdir(parents=True, exist_ok=True)
            index.write_bytes(gzip.compress(listed, mtime=0))
            for path, content in ((index, index.read_bytes()), (index.with_suffix(""), listed)):
                names.append(path.relative_to(self.top / "dists" / self.suite))
                digests.append((hashlib.sha256(content).hexdigest(), len(content)))
        lines = [f" {digest} {size} {name}" for name, (digest, size) in zip(names, digests, strict=True)]
        release = self.top / f"dists/{self.suite}/Release"
        release.write_text(
            f"Origin: Tests\nSuite: {self.suite}\nCodename: {self.suite}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\n"
            f"Architectures: amd64 arm64\nComponents: {self._component}\nSHA256:\n" + "\n".join(lines) + "\n"
        )
        release.with_name("InRelease").write_bytes(self._gpg("--clearsign", "--output", "-", str(release)))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "GNUPGHOME": self._home.name}

    def _gpg(self, *arguments: str) -> bytes:
        done = subprocess.run(
            ["gpg", "--batch", "--yes", *arguments], env=self._environment(), check=True, capture_output=True
        )
        return done.stdout
