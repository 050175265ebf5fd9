"""`python -m cloud keys`: who may say what units run. Making, using, replacing and renewing the keys of updates.

Three holders keep a directory of keys each, the online keys lie on the server that publishes, and the canaries' key
where releases are built. One person can play all parts on one machine, in several directories.

    keys init                     three holders, online, builder; the first root, signed and published
    keys new DIR                  a holder makes keys on a machine of their own; `init` then uses `DIR/public.json`
    keys sign [ROLE]              a holder adds signatures to what is staged
    keys publish                  with the online keys: put in force what is fully signed
    keys renew                    whatever has spent half of its time: online at once, offline staged
    keys rotate ROLE              another key instead of one that was lost or stolen
    keys canaries SERIAL...       which units take releases before all others
    keys status                   who holds what, what expires when, what waits for whom
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from securesystemslib.signer import CryptoSigner, Key

from cloud.keyring import add_key, load_keys, make_keys, read_public
from cloud.repository import Repository
from cloud.roles import HOLDERS, ONLINE, canary_role

DEFAULT_REPOSITORY = Path("build/updates/repository")
DEFAULT_KEYS = Path("build/updates/keys")
_ONLINE_DIRECTORY, _BUILDER_DIRECTORY = "online", "builder"

app = typer.Typer(help="Keys of the updates: who may say what units run.", no_args_is_help=True)

RepositoryPath = Annotated[Path, typer.Option("--repository", help="Directory of the update repository.")]
KeyPaths = Annotated[
    list[Path], typer.Option("--keys", help="A holder's directory of keys; may be given more than once.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="First line is the passphrase; asked for if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for scripts.")]


# --- commands -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example:  python -m cloud keys init --holders ann,bob,eve")
def init(
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    keys: Annotated[Path, typer.Option("--keys", help="Where the directories of keys are made.")] = DEFAULT_KEYS,
    product: Annotated[str, typer.Option(help="Whose releases.")] = "picket",
    holders: Annotated[str, typer.Option(help="Three names; each gets a directory.")] = "holder-1,holder-2,holder-3",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make the keys and the first root. Directories that `keys new` made are used as they are."""
    names = [name.strip() for name in holders.split(",") if name.strip()]
    if len(set(names) - {_ONLINE_DIRECTORY, _BUILDER_DIRECTORY}) != HOLDERS or any(
        Path(name).name != name for name in names
    ):
        raise typer.BadParameter(f"say {HOLDERS} different names", param_hint="--holders")
    people = [(keys / name, name, ("root", "targets", product)) for name in names]
    machines = [
        (keys / _ONLINE_DIRECTORY, "online", ONLINE),
        (keys / _BUILDER_DIRECTORY, "builder", (canary_role(product),)),
    ]
    signers: list[CryptoSigner] = []
    public: dict[str, list[Key]] = {}
    for directory, holder, roles in (*people, *machines):
        if not (directory / "public.json").exists():
            signers += make_keys(directory, holder, roles, _passphrase(passphrase_file, holder, new=True))
        for role, key in read_public(directory).keys.items():
            public.setdefault(role, []).append(key)
    made = Repository.create(repository, product, public)
    for role in made.staged_roles():
        made.sign(role, signers)
    if any(made.signing(role).missing for role in made.staged_roles()):
        _say(f"{repository} waits for signatures:")
        _say_waiting(made)
        return
    made.publish(signers)
    _say(f"{repository} is published. Its root goes into the image: {repository}/root.json")
    _say(f"Now give each holder their directory of {keys}, and delete it here.")


@app.command("new", epilog="Example:  python -m cloud keys new /media/stick/ann --holder ann")
def new_holder(
    directory: Annotated[Path, typer.Argument(help="Where the keys are made.")],
    holder: Annotated[str, typer.Option(help="Your name, as others will see it.")],
    product: Annotated[str, typer.Option(help="Whose releases.")] = "picket",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a holder's keys on a machine of their own; only `public.json` leaves it."""
    make_keys(directory, holder, ("root", "targets", product), _passphrase(passphrase_file, holder, new=True))
    _say(f"Keep {directory}. Give {directory}/public.json to whoever runs `keys init`.")


@app.command(epilog="Example:  python -m cloud keys sign --keys /media/stick/ann")
def sign(
    keys: KeyPaths,
    role: Annotated[str | None, typer.Argument(help="root, targets or a product; all that waits if left out.")] = None,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Add your signatures to what is staged."""
    found = Repository(repository)
    signers = load_signers(keys, passphrase_file)
    roles = [role] if role else list(found.staged_roles())
    if not roles:
        _say("Nothing waits for signatures.")
    for name in roles:
        before = found.signing(name).missing
        after = found.sign(name, signers)
        unused = " (none of these keys counts for it, or they have signed before)" if before == after.missing else ""
        _say(f"{after}{unused if after.missing else ''}")


@app.command(epilog="Example:  python -m cloud keys publish --keys build/updates/keys/online")
def publish(
    keys: KeyPaths,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Put in force what is fully signed, with the online keys."""
    found = Repository(repository)
    done = found.publish(load_signers(keys, passphrase_file))
    _say(f"In force now: {', '.join((*done, 'timestamp'))}.")
    _say_waiting(found)


@app.command(epilog="Example:  python -m cloud keys renew --keys build/updates/keys/online")
def renew(
    keys: KeyPaths,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Renew whatever has spent half of its time: online roles at once, offline ones as far as these keys go.

    Run it each day with the online keys; what it then says is waiting is for the holders.
    """
    found = Repository(repository)
    signers = load_signers(keys, passphrase_file)
    due = found.due()
    for role in due:
        if role not in ONLINE and found.staged(role) is None:
            found.refresh(role)
        if role not in ONLINE:
            found.sign(role, signers)
    ready = [role for role in found.staged_roles() if not found.signing(role).missing]
    if ready or set(due) & set(ONLINE):
        done = found.publish(signers)
        _say(f"In force now: {', '.join((*done, 'timestamp'))}.")
    elif not due:
        _say("Nothing is due.")
    _say_waiting(found)


@app.command(epilog="Example:  python -m cloud keys rotate timestamp --keys build/updates/keys/online")
def rotate(
    role: Annotated[str, typer.Argument(help="root, targets, a product, its canaries, snapshot or timestamp.")],
    keys: Annotated[Path, typer.Option("--keys", help="The holder's directory, where the new key is made.")],
    old: Annotated[str | None, typer.Option(help="Key id (its beginning) of the one that goes, if it is lost.")] = None,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a new key for a role and stage that it takes the place of the holder's old one.

    The signatures of the other holders make it so; the old key counts no more once that is published.
    """
    found = Repository(repository)
    going = _going(found, role, keys, old)
    holder = {key.keyid: name for name, key in found.keys_of(role)}[going]
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = add_key(keys, holder, role, _passphrase(passphrase_file, holder, new=True))
    roles = found.replace_key(role, going, made.public_key)
    for name in roles:
        found.sign(name, [made])
    _say(f"Key {made.public_key.keyid[:8]} takes the place of {going[:8]} for {role} when these are signed:")
    _say_waiting(found)


@app.command(epilog="Example:  python -m cloud keys canaries PK-000001 PK-000002")
def canaries(
    serials: Annotated[list[str] | None, typer.Argument(help="All canaries, from now on.")] = None,
    repository: RepositoryPath = DEFAULT_REPOSITORY,
    *,
    none: Annotated[bool, typer.Option("--none", help="No unit is a canary.")] = False,
) -> None:
    """Say which units are canaries, or show them. Two holders sign it, as it decides whose key reaches which units."""
    found = Repository(repository)
    if serials or none:
        found.set_canaries(serials or ())
        _say_waiting(found)
    for serial in found.canaries():
        _print(serial)


@app.command(epilog="Example:  python -m cloud keys status --json")
def status(repository: RepositoryPath = DEFAULT_REPOSITORY, *, as_json: AsJson = False) -> None:
    """Who holds what, what expires when, and what waits for whom."""
    found = Repository(repository)
    now = datetime.now(UTC)
    roles = found.status()
    waiting = [found.signing(role) for role in found.staged_roles()]
    if as_json:
        value = {
            "product": found.product,
            "roles": [
                {**asdict(role), "expires": role.expires.isoformat(), "days_left": round(role.days_left(now), 1)}
                for role in roles
            ],
            "staged": [asdict(signing) for signing in waiting],
            "releases": [
                {"ring": release.ring, "version": release.version, "path": release.path, "length": release.length}
                for release in found.releases()
            ],
            "canaries": list(found.canaries()),
        }
        _print(json.dumps(value))
        return
    table = Table("role", "version", "holders", "must sign", "good for", title=f"{found.product}, {repository}")
    for role in roles:
        left = role.days_left(now)
        table.add_row(role.role, str(role.version), ", ".join(role.holders), str(role.threshold), words_for_days(left))
    Console().print(table)
    _say_waiting(found)


def words_for_days(days: float) -> str:
    """How long something is still good for, for people: `7 days`, `20 hours`, `EXPIRED 3 days ago`."""
    if days < 0:
        return f"EXPIRED {words_for_days(-days)} ago"
    if days < 2:
        hours = int(days * 24)
        return f"{hours} hour{'s' if hours != 1 else ''}"
    return f"{round(days)} days"


# --- within -------------------------------------------------------------------------------------------------------


def _going(repository: Repository, role: str, keys: Path, old: str | None) -> str:
    """Id of the key that a new one replaces: the one that begins with `old`, else the one in the holder's directory."""
    listed = {key.keyid: name for name, key in repository.keys_of(role)}
    if not listed:
        raise typer.BadParameter(f"the repository has no role {role!r}", param_hint="ROLE")
    if old is not None:
        found = [keyid for keyid in listed if old and keyid.startswith(old)]
    else:
        mine = read_public(keys).keys.get(role)
        found = [mine.keyid] if mine and mine.keyid in listed else []
    if len(found) != 1:
        known = ", ".join(f"{keyid[:8]} ({name})" for keyid, name in listed.items())
        raise typer.BadParameter(f"which key of {role} goes? Known are {known}", param_hint="--old")
    return found[0]


def load_signers(directories: Sequence[Path], passphrase_file: Path | None) -> list[CryptoSigner]:
    """All keys of these directories; asks for each passphrase where no file has it."""
    return [
        signer
        for directory in directories
        for signer in load_keys(directory, _passphrase(passphrase_file, directory.name, new=False))
    ]


def _passphrase(file: Path | None, holder: str, *, new: bool) -> bytes:
    """From the file, else from whoever sits at the terminal."""
    if file is not None:
        try:
            words = file.read_text().partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file} holds no passphrase: {error}", param_hint="--passphrase-file") from None
    elif sys.stdin.isatty():
        words = typer.prompt(f"Passphrase of {holder}", hide_input=True, confirmation_prompt=new, err=True)
    else:
        raise typer.BadParameter("nobody is here to be asked for the passphrase", param_hint="--passphrase-file")
    if not words:
        raise typer.BadParameter("the passphrase is empty", param_hint="--passphrase-file")
    return str(words).encode()


def _say_waiting(repository: Repository) -> None:
    for role in repository.staged_roles():
        signing = repository.signing(role)
        ready = "" if signing.missing else "; `python -m cloud keys publish` puts it in force"
        _say(f"staged: {signing}{ready}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
