"""What makes a base root a unit of ours: the agent, its user, the services, the settings."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from image import signing
from image.base import Base
from image.errors import ImageError, RecipeError
from image.layout import Layout
from image.recipe import Recipe
from image.release import device_release
from image.render import render

_HERE = Path(__file__).parent
_AGENT = _HERE.parent / "firmware_agent"

#: The agent's user and the groups of its devices, with fixed numbers: state survives a change of the image. A group
#: that the base has already keeps its own: devices belong to it, and no file.
AGENT_ID = 900
_GROUPS = {"gpio": 901}
_SUPPLEMENTARY = ("gpio", "tss")

#: The release that the image brings.
RELEASES = "usr/lib/picket/releases"

#: Where the agent's settings look for the update root.
UPDATE_ROOT = "usr/share/picket/root.json"

#: Where units keep their key, by what the recipe says of the TPM.
_KEY_STORES = {"yes": "tpm", "no": "file", "probe": "probe-once"}

#: Directories in which systemd looks for a unit file.
_UNIT_PATHS = ("etc/systemd/system", "usr/lib/systemd/system")

_ENABLED = (
    "nftables.service",
    "picket-agent.service",
    "picket-clock.timer",
    "picket-factory.service",
    "picket-grow.service",
    "picket-hostkey.service",
    "picket-reboot.path",
    "picket-seal.path",
    "picket-slots-check.service",
    "picket-slots.socket",
    "picket-trial.timer",
    "picket-vtpm.service",
    "picket-zram.service",
    "ssh.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
)

#: Units without a use on a unit of ours; each one less is a process less at every boot. A console login is no use
#: either: there is no password to log in with. Nobody speaks D-Bus: systemd's own services do without.
_MASKED = (
    "console-getty.service",
    "dbus.service",
    "dbus.socket",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "getty.target",
    "getty@.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "proc-sys-fs-binfmt_misc.mount",
    "run-lock.mount",
    "serial-getty@.service",
    "ssh.socket",
    "sshd-keygen.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hostnamed.socket",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrmachine.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-remount-fs.service",
    "systemd-sysext.socket",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tpm2-setup-early.service",
    "systemd-tpm2-setup.service",
    "systemd-udev-load-credentials.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    "wpa_supplicant.service",
)

#: All generators: they look for what this image never has, or would take orders from the command line.
_MASKED_GENERATORS = (
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-factory-reset-generator",
    "systemd-fstab-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-ssh-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-tpm2-generator",
    "systemd-veritysetup-generator",
)


def install_agent(root: Path, base: Base, library: Path, recipe: Recipe) -> None:
    """The agent as the very release that an archive of it would install.

    It is root's, read-only and verified; each slot's own directory of releases begins with a link to it (image/init).
    """
    releases = root / RELEASES
    releases.mkdir(parents=True)
    release = device_release(releases, base, library, recipe)
    for path in (releases, release, *release.rglob("*")):
        os.chown(path, 0, 0)
    (root / "opt/picket").mkdir()


def install_launcher(root: Path) -> None:
    """What starts the release in force. It stays root's: no update and no fault of the agent ever changes it."""
    target = root / "usr/lib/picket/launcher.py"
    shutil.copyfile(_AGENT / "launcher.py", target)
    target.chmod(0o644)


def install_update_root(root: Path, trusted: Path | None) -> None:
    """Whose signatures count: the TUF root that units of this image begin with. Without one, they take no updates."""
    if trusted is None:
        return
    target = root / UPDATE_ROOT
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trusted, target)
    target.chmod(0o644)


def check_shared(root: Path, recipe: Recipe) -> None:
    """That there is what both slots are to share: /init takes the first copy of each directory out of the root.

    Raises:
        RecipeError: a directory is not there.
    """
    for path in recipe.shared:
        if not (root / path.lstrip("/")).is_dir():
            raise RecipeError(
                f"{recipe.file}: shared: the image has no directory {path}; add it by files, or take it out"
            )


def install_signers(root: Path, public_line: str) -> None:
    """Whose signature lets another image into a slot, and who may take a unit back into factory mode."""
    namespaces = [signing.BUNDLE, signing.IMAGE, signing.FACTORY_MODE]
    _text(root, "usr/share/picket/os-signers", signing.allowed_signers([public_line], namespaces))


def install_files(root: Path, more: Sequence[Path] = ()) -> None:
    """Copy `image/files/` and the recipe's own over the root; all is root's, and only programs are executable.

    Symbolic links stay what they are.
    """
    for top in (_HERE / "files", *more):
        for source in sorted(top.rglob("*")):
            if "__pycache__" in source.parts:
                continue
            target = root / source.relative_to(top)
            if source.is_symlink():  # as it stands: it leads somewhere on the unit, not here
                target.unlink(missing_ok=True)
                target.symlink_to(source.readlink())
            elif source.is_dir():
                if not target.exists():
                    target.mkdir(mode=0o755)
            else:
                shutil.copyfile(source, target)
                target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def write_settings(root: Path, recipe: Recipe, layout: Layout, factory_key: str) -> None:
    """Everything that is rendered from the recipe."""
    names = {"name": recipe.name, "version": recipe.version}
    _text(
        root,
        "etc/picket/agent.toml",
        render(
            "agent.toml", **names, key_store=_KEY_STORES[recipe.tpm], pir_line=recipe.pir_line, endpoint=recipe.endpoint
        ),
    )
    _text(root, "etc/picket/factory_authorized_keys", render("factory_authorized_keys", factory_key=factory_key))
    _text(root, "etc/fstab", render("fstab"))
    _text(root, "etc/hostname", f"{recipe.hostname}\n")
    described = layout.description(recipe.name, recipe.version, recipe.security_version, recipe.hardware)
    _text(root, "usr/lib/picket/layout.json", described)
    release = root / "usr/lib/os-release"
    release.write_text(render("os-release", debian=release.read_text(), **names))
    _link(root / "etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    _link(root / "etc/hosts", "../run/hosts")
    _link(root / "etc/tmpfiles.d/provision.conf", "/dev/null")  # takes keys and users from whoever starts the board
    (root / "data").mkdir(mode=0o755)


def create_users(root: Path) -> None:
    """The agent's user and groups. Nobody has a password, and none can be set that would let anybody in by it."""
    home = "/var/lib/picket"
    _append(root / "etc/passwd", f"picket:x:{AGENT_ID}:{AGENT_ID}:Picket agent:{home}:/bin/sh")
    # `*` and not `!`: sshd takes the latter for a locked account and refuses the key as well.
    _append(root / "etc/shadow", "picket:*:20000::::::")
    _append(root / "etc/group", f"picket:x:{AGENT_ID}:")
    _append(root / "etc/gshadow", "picket:*::")
    there = {line.partition(":")[0] for line in (root / "etc/group").read_text().splitlines()}
    for name, number in _GROUPS.items():
        if name in there:
            continue
        _append(root / "etc/group", f"{name}:x:{number}:")
        _append(root / "etc/gshadow", f"{name}:*::")
    _add_member(root / "etc/group", "picket", _SUPPLEMENTARY, field=3)
    _add_member(root / "etc/gshadow", "picket", _SUPPLEMENTARY, field=3)
    _lock_passwords(root / "etc/shadow")
    state = root / home.removeprefix("/")
    state.mkdir(mode=0o700)
    os.chown(state, AGENT_ID, AGENT_ID)


def drop_privileged_programs(root: Path) -> None:
    """Nothing on a unit becomes another user by being started: what must be root is started by systemd."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and (mode := path.stat().st_mode) & 0o6000:
            path.chmod(mode & 0o1777)


def choose_units(root: Path) -> None:
    """Enable our units, mask what has no use here, and boot to multi-user."""
    for name in _MASKED:
        _link(root / "etc/systemd/system" / name, "/dev/null")
    for name in _MASKED_GENERATORS:
        _link(root / "etc/systemd/system-generators" / name, "/dev/null")
    for wants in (root / "etc/systemd/system").glob("*.wants/*"):
        if wants.name in _MASKED or wants.name.partition("@")[0] + "@.service" in _MASKED:
            wants.unlink()
    for name in _ENABLED:
        _enable(root, name)
    _link(root / "etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")


def set_epoch(root: Path, epoch: int) -> None:
    """A clock that says less is certainly wrong: systemd starts it here, and the agent knows it (clock-epoch)."""
    stamp = root / "usr/lib/clock-epoch"
    stamp.write_bytes(b"")
    os.utime(stamp, (epoch, epoch))


def mark_updated(root: Path, epoch: int) -> None:
    """Tell systemd that /etc and /var belong to this /usr, so that no unit makes them anew at the first boot."""
    moment = epoch * 10**9
    for place in ("etc", "var"):
        stamp = root / place / ".updated"
        stamp.write_text(f"# Written when the image was built.\nTIMESTAMP_NSEC={moment}\n")
        os.utime(stamp, ns=(moment, moment))
    os.utime(root / "usr", ns=(moment, moment))


def _text(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def _append(path: Path, line: str) -> None:
    name = line.partition(":")[0]
    text = path.read_text()
    if any(existing.partition(":")[0] == name for existing in text.splitlines()):
        raise ImageError(f"{name} is already in {path.name} of the base")
    path.write_text(f"{text}{line}\n")


def _add_member(path: Path, user: str, groups: tuple[str, ...], field: int) -> None:
    lines = path.read_text().splitlines()
    missing = set(groups) - {line.partition(":")[0] for line in lines}
    if missing:
        raise ImageError(f"the base has no group {', '.join(sorted(missing))}")
    for number, line in enumerate(lines):
        columns = line.split(":")
        if columns[0] in groups:
            columns[field] = ",".join(filter(None, [columns[field], user]))
            lines[number] = ":".join(columns)
    path.write_text("".join(f"{line}\n" for line in lines))


def _lock_passwords(path: Path) -> None:
    """Nobody has a password, whatever the base says of its users."""
    lines = [line.split(":") for line in path.read_text().splitlines()]
    for columns in lines:
        if columns[1] not in {"*", "!", "!*"}:
            columns[1] = "*"
    path.write_text("".join(f"{':'.join(columns)}\n" for columns in lines))


def _unit_file(root: Path, name: str) -> Path:
    for place in _UNIT_PATHS:
        path = root / place / name
        if path.is_file() and not path.is_symlink():
            return path
    raise ImageError(f"the root has no unit {name}")


def _enable(root: Path, name: str) -> None:
    """What `systemctl enable` does with a plain unit: the links that its [Install] section asks for."""
    file = _unit_file(root, name)
    for line in file.read_text().splitlines():
        key, _, value = line.partition("=")
        folder = {"WantedBy": "wants", "RequiredBy": "requires"}.get(key.strip())
        for target in value.split() if folder else ():
            _link(root / f"etc/systemd/system/{target}.{folder}/{name}", f"/{file.relative_to(root)}")


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
