"""How an image comes to be: `build_image` is the whole story, from the recipe to the description."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from image import (
    base,
    bmap,
    boot,
    bundle,
    checksums,
    configure,
    disk,
    factory_key,
    imager,
    layout,
    secure_boot,
    signing,
    space,
    wheels,
)
from image.boot_key import BootSigner
from image.bundle import Fields
from image.cache import held
from image.debs import Shown
from image.errors import ImageError, RecipeError
from image.layout import Layout
from image.manifest import SCHEMA, ImageManifest, Origin, Package, Partition, Shipped, Support, digest, shipped
from image.progress import WAIT, Stage
from image.recipe import Recipe
from image.release import agent_version
from image.run import run

_HERE = Path(__file__).parent
LOCK = _HERE.parent / "requirements" / "device.lock"

#: Times in the file systems, where no file brings its own.
EPOCH = base.EPOCH


@dataclass(frozen=True)
class Keys:
    """Whose word counts on the units of an image.

    Attributes:
        factory: the factory's SSH key; made if there is none. It counts where the recipe names no other.
        update_root: the TUF root; None for an image whose agent takes no updates.
        signing_key: URI of the key that signs what is shipped (image.signing). Its public half goes on to the image,
            which takes no image that this key has not signed. The usual one is made if there is none. With `public:`
            the image has the same bits, but there is no bundle and no signature.
    """

    factory: Path
    update_root: Path | None
    signing_key: str = ""

    def opened(self, recipe: Recipe) -> "Word":
        """These keys, opened for a recipe, which may name some itself.

        Raises:
            RecipeError: the update root is none, or the recipe's boards cannot have the secure boot that it wants.
            SigningError: a key is none, or cannot be used.
        """
        if self.update_root:
            check_update_root(self.update_root)
        factory = recipe.factory_key or factory_key.ensure(self.factory).with_name(self.factory.name + ".pub")
        return Word(
            factory_key.read_public(factory),
            self.update_root,
            signing.open_signer(self.signing_key or f"file:{signing.ensure()}"),
            secure_boot.signer_of(recipe),
        )


@dataclass(frozen=True)
class Word:
    """Whose word counts on the units of an image, opened; see `Keys`."""

    factory_line: str
    update_root: Path | None
    signer: signing.Signer
    boot_signer: BootSigner | None


def build_image(
    recipe: Recipe, output: Path, cache: Path, keys: Keys, stage: Stage, address: str | None = None
) -> ImageManifest:
    """Build the image of a recipe.

    Args:
        recipe: what to build.
        output: where `<name>-<version>/` with the results goes, and the link `<name>.json` to the newest description.
        cache: directory of what can be used again.
        keys: whose word counts.
        stage: context manager that shows and times one stage.
        address: URL at which the results will be offered, for Raspberry Pi Imager; None for where they are now.

    Raises:
        RecipeError: a board is not known, or no update root is where one should be.
        SigningError: a key cannot be used.
        ImageError: anything else; the message says what to do.
    """
    imager.check(recipe)
    word = keys.opened(recipe)
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{recipe.name}-{recipe.version}"
    final = output / stem
    # Of all versions alike: whichever of them a slot holds looks for its partitions by it.
    signature = disk.identifier(recipe.seed, "disk").int >> 96 or 1
    places = _laid_out(recipe, signature)
    with (
        _one_umask(),
        _alone(cache, stage),
        tempfile.TemporaryDirectory(dir=cache, prefix="build-") as name,
        _directory(final) as made,
        space.room({cache: space.WORKING_BYTES, output: space.OUTPUT_BYTES}),
    ):
        working = Path(name)
        root, boot_tree, image = working / "root", working / "boot", made / f"{stem}.img"

        with stage("base root file system") as say:
            root_base = base.base_root(recipe, cache, say)
        with stage("device packages") as say:
            library = wheels.device_library(LOCK, root_base, cache, say)
        with stage("unpack"):
            root_base.unpack(root)
        with stage("agent and settings"):
            _make_it_a_unit(root, root_base, library, recipe, places, word)
        with stage("boot files"):
            kernel = boot.take_boot_files(root, recipe, places, boot_tree)
            configure.set_epoch(root, EPOCH)
            configure.mark_updated(root, EPOCH)
        with stage("root"):
            packages = (*_debian_packages(root), *_python_packages())
            disk.make_squashfs(root, working / "root.squashfs", EPOCH)
            salt = hashlib.sha256(_identifier(recipe, "verity").bytes).digest()
            verity = disk.add_verity(working / "root.squashfs", salt)
            slot = boot.slot_directory(boot_tree, places.control)
            (slot / "cmdline.txt").write_text(boot.cmdline_txt(signature, verity, recipe))
        with stage("partitions"):
            slot_boot = make_partitions(working, places, boot_tree, recipe, word.boot_signer)
        with stage("disk"):
            disk.assemble(image, signature, places.slices, contents(working, places))
            (made / f"{stem}.bmap").write_text(bmap.write(bmap.create(image)))
        with stage("compress"):
            run("zstd", "-q", "-f", "-T0", "-3", "--sparse", image, "-o", f"{image}.zst")
        with stage("bundle") as say:
            bundled = _bundled(slot_boot, working / "root.squashfs", _signed(recipe, places), word.signer, made, say)
        with stage("describe"):
            manifest = ImageManifest(
                name=recipe.name,
                version=recipe.version,
                agent=agent_version(),
                kernel=kernel,
                security_version=recipe.security_version,
                epoch=EPOCH,
                base=Origin(recipe.base.kind, recipe.base.suite, recipe.base.architecture, digest(recipe.lock)),
                boards=_boards(recipe, boot_tree),
                hardware=recipe.hardware,
                control=recipe.boot.control,
                verity=verity,
                support=Support(recipe.support.until, recipe.support.contact or None),
                factory_key=signing.fingerprint(word.factory_line),
                image=shipped(image),
                compressed=shipped(made / f"{image.name}.zst"),
                bmap=shipped(made / f"{stem}.bmap"),
                bundle=bundled,
                partitions=tuple(_described(recipe, places, verity)),
                packages=packages,
                directory=final,
            )
            (made / f"{stem}.json").write_text(manifest.dump())
            shutil.copyfile(SCHEMA, made / SCHEMA.name)
            _write_what_is_in_it(made / stem, root, boot_tree, library, recipe)
            _offer(made, manifest, recipe, address or final.as_uri())
        with stage("sign"):
            checksums.write(made, word.signer if word.signer.raw else None, known={image.name: manifest.image.sha256})
        _forget_old(cache, {root_base.directory.name, library.name})
    _point(output / f"{recipe.name}.json", f"{stem}/{stem}.json")
    return manifest


@contextmanager
def _alone(cache: Path, stage: Stage) -> Iterator[None]:
    """Hold the cache; where another build has it, waiting is a stage like others."""
    with ExitStack() as waiting:

        def wait(words: str) -> None:
            waiting.enter_context(stage(WAIT))(words)

        with held(cache, wait):
            waiting.close()
            yield


def _make_it_a_unit(
    root: Path, root_base: base.Base, library: Path, recipe: Recipe, places: Layout, word: Word
) -> None:
    """The agent, its user, the services, the settings, and whose word counts."""
    configure.install_files(root, recipe.files)
    configure.install_agent(root, root_base, library, recipe)
    configure.install_launcher(root)
    configure.install_update_root(root, word.update_root)
    configure.install_signers(root, word.signer.public_line)
    configure.create_users(root)
    configure.write_settings(root, recipe, places, word.factory_line)
    configure.choose_units(root)
    configure.drop_privileged_programs(root)
    configure.check_shared(root, recipe)


def check_update_root(path: Path) -> None:
    """That units could trust releases by it.

    Raises:
        RecipeError: it is no root of update keys that its own keys have signed.
    """
    from tuf.api.exceptions import RepositoryError  # noqa: PLC0415 - half a second to load
    from tuf.api.metadata import Metadata, Root  # noqa: PLC0415

    try:
        root = Metadata[Root].from_bytes(path.read_bytes())
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (RepositoryError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{path} is no root of update keys ({error}), and units could never trust a release: name the root.json"
            " that `python -m cloud keys` made"
        ) from error


def _boards(recipe: Recipe, boot_tree: Path) -> tuple[str, ...]:
    """The boards whose device trees are in the image."""
    wanted = (*recipe.boards, *recipe.experimental_boards)
    return tuple(name for name in wanted if any(boot_tree.rglob(f"{name}.dtb")))


def _signed(recipe: Recipe, places: Layout) -> Fields:
    """What the bundle says of the image, beside its parts."""
    floor = recipe.security_version  # the agent's is the recipe's, too
    return Fields(recipe.name, recipe.version, floor, floor, recipe.hardware, places.control, places.disk_signature)


def _bundled(boot: Path, root: Path, fields: Fields, signer: signing.Signer, made: Path, say: Shown) -> Shipped | None:
    """One slot as a bundle; none without the key that signs it."""
    if signer.raw is None:
        say("not signed, so there is none")
        return None
    return shipped(bundle.build(boot, root, fields, signer.sign, made).bundle)


def _laid_out(recipe: Recipe, signature: int) -> Layout:
    sizes = (recipe.disk.boot_mebibytes, recipe.disk.root_mebibytes, recipe.disk.data_mebibytes)
    boot_bytes, root_bytes, data_bytes = (size * disk.MEBIBYTE for size in sizes)
    return Layout.of(signature, boot_bytes, root_bytes, data_bytes, configure.AGENT_ID, recipe.boot.control)


def _write_what_is_in_it(stem: Path, root: Path, boot_tree: Path, library: Path, recipe: Recipe) -> None:
    """Bills of materials in both forms, and the licences."""
    from image import licences, sbom  # noqa: PLC0415 - a second to load, and packages that the demo does without

    place, name = stem.parent, stem.name
    sbom.write(root, boot_tree, recipe.name, recipe.version, EPOCH, place / f"{name}.spdx.json",
               place / f"{name}.cdx.json")  # fmt: skip
    licences.write(root, boot_tree, library, recipe.name, recipe.version, place / f"{name}.licences.txt")


def _offer(made: Path, manifest: ImageManifest, recipe: Recipe, address: str) -> None:
    """The list by which Raspberry Pi Imager offers the image."""
    icon = f"{manifest.name}.png"
    imager.draw_icon(made / icon)
    assert manifest.compressed is not None  # noqa: S101 - for the type checker
    offer = imager.Offer(
        name=str(manifest),
        description=f"{manifest} with agent {manifest.agent}; starts in factory mode",
        address=address,
        image=manifest.compressed.file,
        size=manifest.image.size,
        sha256=manifest.image.sha256,
        download_size=manifest.compressed.size,
        epoch=EPOCH,
        boards=recipe.boards,
        icon=icon,
        bmap=manifest.bmap.file,
        website=None,
    )
    (made / "os_list.json").write_text(imager.os_list(offer))


@dataclass(frozen=True)
class _Filled:
    """What a partition of a new image is filled with: the file, the kind of file system, its label."""

    file: str
    kind: str
    label: str


#: By the partition's name. Slot b is empty.
_FILLED = {
    "control": _Filled("control", "vfat", "PICKETCTL"),
    "boot": _Filled("boot-files", "vfat", "PICKETBOOT"),
    "boot-a": _Filled("boot-a", "vfat", "PICKETBOOT"),
    "root-a": _Filled("root.squashfs", "squashfs", "picket-root"),
    "data": _Filled("data", "ext4", "picket-data"),
}


def _identifier(recipe: Recipe, what: str) -> UUID:
    """The UUID of something of this image, from the recipe's seed: the same recipe, the same identifiers."""
    return disk.identifier(recipe.seed, recipe.version, what)


def contents(working: Path, places: Layout) -> dict[int, Path]:
    """The files that the partitions are filled with, by number."""
    return {places.numbers[name]: working / filled.file for name, filled in _FILLED.items() if name in places.numbers}


def make_partitions(
    working: Path, places: Layout, boot_tree: Path, recipe: Recipe, boot_signer: BootSigner | None
) -> Path:
    """All file systems but the root's, which is made before its hash is known to the boot files.

    Args:
        working: where their files go.
        places: the partitions.
        boot_tree: what a new image boots from; with control "os-prefix" the control files are added to it.
        recipe: what is built.
        boot_signer: signs the boot files for boards with secure boot, as one file.

    Returns:
        The boot files of a slot as its bundle has them.

    Raises:
        ImageError: the boot files do not fit.
    """
    if boot_signer is not None:
        outer = working / "outer"
        secure_boot.make_boot_files(boot_tree, outer, _identifier(recipe, "boot.img").int >> 96, boot_signer, EPOCH)
        boot_tree = outer
    _check_room(boot_tree, places)
    trees = {places.holds_boot: boot_tree}
    if places.holds_control not in trees:
        trees[places.holds_control] = working / "control-tree"
        trees[places.holds_control].mkdir()
    for name, content in places.control_files().items():
        (trees[places.holds_control] / name).write_bytes(content)
    for name, tree in trees.items():
        filled = _FILLED[name]
        size = places.part(name).size
        disk.make_fat(tree, working / filled.file, size, filled.label, _volume(recipe, name), EPOCH)
    filled = _FILLED["data"]
    identifier = _identifier(recipe, "data")
    disk.make_data(working / filled.file, places.part("data").size, filled.label, identifier, EPOCH)
    if places.control == layout.AUTOBOOT:
        return working / _FILLED["boot-a"].file
    slot_boot = working / "slot-boot"
    slot = boot.slot_directory(boot_tree, places.control)
    slot_boot.write_bytes(bundle.pack_files(_files(slot)))
    return slot_boot


def _files(top: Path) -> list[tuple[str, bytes]]:
    """All files below a directory by their names in it."""
    return [(path.relative_to(top).as_posix(), path.read_bytes()) for path in top.rglob("*") if path.is_file()]


def _check_room(boot_tree: Path, places: Layout) -> None:
    """That the boot files fit, and with control "os-prefix" a second slot's beside them."""
    needed = disk.fat_size(boot_tree)
    if places.control == layout.OS_PREFIX:
        needed += disk.fat_size(boot.slot_directory(boot_tree, places.control))
    room = places.part(places.holds_boot).size
    if needed > room:
        raise ImageError(
            f"the boot files want {needed / disk.MEBIBYTE:.1f} MiB and their partition has {room >> 20}: give them more"
            " by the recipe's disk.boot_mebibytes"
        )


def _volume(recipe: Recipe, name: str) -> int:
    """The serial number of a FAT volume. Both slots' are alike, as their content is."""
    return _identifier(recipe, _FILLED[name].file).int >> 96


def _described(recipe: Recipe, places: Layout, verity: disk.Verity) -> Iterator[Partition]:
    for part in places.slices:
        name = places.name(part.number)
        if name is None:
            continue
        filled = _FILLED.get(name, _Filled("", "none", "none"))
        if filled.kind == "vfat":
            serial = _volume(recipe, name)
            uuid = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"
        else:
            data = str(_identifier(recipe, "data"))
            uuid = {"squashfs": verity.root_hash, "ext4": data}.get(filled.kind, "none")
        partuuid = disk.partuuid(places.signature, part.number)
        yield Partition(part.number, filled.kind, filled.label, part.start, part.size, uuid, partuuid)


def _debian_packages(root: Path) -> list[Package]:
    """What dpkg's status file of the root says is installed."""
    found = []
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            found.append(Package("debian", fields["Package"], fields["Version"]))
    return sorted(found, key=lambda package: package.name)


def _python_packages() -> list[Package]:
    return [Package("python", name, version) for name, version in sorted(wheels.versions(LOCK.read_text()).items())]


@contextmanager
def _one_umask() -> Iterator[None]:
    """Whoever builds, files are born with the same modes."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _directory(final: Path) -> Iterator[Path]:
    """A directory that takes its name, and the place of the one before, when all in it is on the disk.

    What a build left that was killed goes.
    """
    for left in final.parent.glob(f".{final.name}-*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as folder:
        made = Path(folder, "new")
        made.mkdir()
        yield made
        for path in (*made.iterdir(), made):
            _sync(path)
        if final.exists():
            final.rename(Path(folder, "old"))
        made.rename(final)
        _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, target: str) -> None:
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def _forget_old(cache: Path, used: set[str]) -> None:
    """Keep what this build used and the newest three others of each kind; a base is half a gigabyte."""
    for kind in ("base-*", "wheels-*"):
        others = [path for path in cache.glob(kind) if path.name not in used]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[3:]:
            shutil.rmtree(path)
