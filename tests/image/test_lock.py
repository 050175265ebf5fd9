"""Locks: what is written is what is read, and each mistake is named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from image import lock
from image.__main__ import app
from image.errors import LockError
from image.lock import SETS, Lock, Pin
from image.recipe import Recipe, load
from image.resolve import HEADERS, locked, wanted

ROOT = Path(__file__).parents[2]
PRODUCT = ROOT / "image/recipes/picket.toml"

NAMES = st.text("ab1+.-", min_size=1, max_size=3).map(lambda text: f"a{text}")
PINS = st.builds(
    Pin,
    NAMES,
    st.text("19.+~-", max_size=4).map(lambda text: f"1:{text}0"),
    st.sampled_from(["all", "amd64", "arm64"]),
    st.integers(0, 10**9),
    st.integers(0, 2**32).map("{:064x}".format),
    NAMES.map("pool/main/{}.deb".format),
)
PIN_SETS = st.lists(PINS, max_size=2, unique_by=lambda pin: pin.name).map(lambda pins: tuple(sorted(pins)))
LOCKS = st.builds(
    Lock,
    st.dictionaries(st.sampled_from(["kind", "suite", "packages"]), st.lists(NAMES, max_size=3).map(tuple)),
    st.fixed_dictionaries(dict.fromkeys(SETS, PIN_SETS)),
)


@given(LOCKS)
def test_what_is_written_is_what_is_read(before: Lock) -> None:
    after = lock.parse(before.dump(), "x.lock")

    assert (after.wanted, after.sets) == (before.wanted, before.sets)


@given(LOCKS, LOCKS)
def test_what_moved_leads_from_the_old_lock_to_the_new_one(before: Lock, after: Lock) -> None:
    moved = lock.moves(before, after)

    assert lock.moves(after, after) == []
    for key in SETS:
        versions = {pin.name: pin.version for pin in before.sets[key]}
        for move in moved:
            if move.set == key:
                assert versions.pop(move.name, None) == move.old
                if move.new is not None:
                    versions[move.name] = move.new
        assert versions == {pin.name: pin.version for pin in after.sets[key]}


@given(st.text(max_size=200))
def test_any_text_is_a_lock_or_a_mistake_in_words(text: str) -> None:
    with pytest.raises(LockError, match="make image-lock"):
        lock.parse(text, "x.lock")


PIN = Pin("vim", "2:9.1-1", "arm64", 5, "0" * 64, "pool/main/v/vim_9.1-1_arm64.deb")


def small(pins: tuple[Pin, ...] = (PIN,), **wants: tuple[str, ...]) -> Lock:
    return Lock({"packages": ("vim",), **wants}, {key: pins if key == "target" else () for key in SETS})


@given(st.integers(0, 200), st.sampled_from(["", " ", "0", "'", "\n", "/", "z"]))
def test_a_damaged_line_is_never_taken_for_another_package(place: int, instead: str) -> None:
    text = small().dump()
    start = text.index(PIN.line)
    place = start + place % len(PIN.line)
    damaged = text[:place] + instead + text[place + 1 :]

    try:
        after = lock.parse(damaged, "x.lock")
    except LockError:
        return
    assert after.dump() == damaged


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("format = 1", "format = 2", "has format 2"),
        ("[wanted]", "[else]", r"has no \[wanted\]"),
        ("twin-arm64 = [", "twin-mips = [", "must hold target, headers, twin-amd64, twin-arm64"),
        ("packages = ['vim']", "packages = 'vim'", "wanted.packages is no list of texts"),
        ("0" * 64, "0" * 63, "is no package"),
        (" arm64 5 ", " arm64 five ", "is no package"),
        ("pool/main/v", "../main/v", "is no package"),
        ("pool/main/v", "/pool/main/v", "is no package"),
        (f"    '{PIN.line}',\n", f"    '{PIN.line}',\n" * 2, "vim stands there twice"),
    ],
)
def test_a_damaged_lock_is_named_with_the_way_out(old: str, new: str, complaint: str) -> None:
    text = small().dump()
    assert old in text

    with pytest.raises(LockError, match=f"x.lock.*{complaint}.*make image-lock RECIPE=x.toml"):
        lock.parse(text.replace(old, new), "x.lock")


@pytest.mark.parametrize(
    ("wants", "complaint"),
    [
        ({"packages": ("vim", "nano")}, "packages: it lacks nano"),
        ({"packages": ("nano",)}, "packages: it lacks nano; it has vim, which the recipe has not"),
        ({"suite": ("trixie",)}, "suite: it lacks trixie"),
    ],
)
def test_a_lock_of_another_recipe_is_refused_with_what_differs(
    wants: dict[str, tuple[str, ...]], complaint: str
) -> None:
    with pytest.raises(LockError, match=f"does not belong to a.toml: {complaint}"):
        lock.check_belongs(small(), wants, Path("a.lock"), Path("a.toml"))


def test_a_move_says_what_it_was_and_is() -> None:
    newer = Pin("vim", "2:9.2-1", "arm64", 5, "1" * 64, "pool/x.deb")
    rebuilt = Pin("vim", "2:9.1-1", "arm64", 5, "1" * 64, "pool/x.deb")

    def said(old: tuple[Pin, ...], new: tuple[Pin, ...]) -> list[str]:
        return [str(move) for move in lock.moves(small(old), small(new))]

    assert said((PIN,), (newer,)) == ["target: vim 2:9.1-1 -> 2:9.2-1"]
    assert said((), (PIN,)) == ["target: vim 2:9.1-1 added"]
    assert said((PIN,), ()) == ["target: vim 2:9.1-1 removed"]
    assert said((PIN,), (rebuilt,)) == ["target: vim 2:9.1-1 has other bits"]


def test_a_lock_takes_its_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.write_text("old")

    lock.write(small(), path)

    assert path.read_text() == small().dump()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.lock"]


def test_recipes_of_the_same_packages_share_a_lock(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{PRODUCT}"\nlock_of = "{PRODUCT}"\n')

    assert locked(load(tmp_path / "mine.toml")) == locked(load(PRODUCT))


def test_what_wants_other_packages_is_told_to_have_a_lock_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{PRODUCT}"\nlock_of = "{PRODUCT}"\npackages.add = ["tcpdump"]\n')

    with pytest.raises(
        LockError, match=r"does not belong to \S+/mine\.toml.*it lacks tcpdump.*take lock_of out of \S+/mine"
    ):
        locked(load(tmp_path / "mine.toml"))


def test_whoever_extends_a_recipe_does_not_share_its_lock_unasked(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{PRODUCT.with_name("picket-zero.toml")}"\n')

    assert load(tmp_path / "mine.toml").lock == tmp_path / "mine.lock"


def test_renewing_a_shared_lock_renews_it_for_the_recipe_that_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner.toml").write_text(f'extends = "{PRODUCT}"\n')
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "owner.toml"\nlock_of = "owner.toml"\npackages.add = ["tcpdump"]\n')
    resolved: list[Recipe] = []

    def resolve(recipe: Recipe) -> Lock:
        resolved.append(recipe)
        return small()

    monkeypatch.setattr("image.resolve.resolve", resolve)
    done = CliRunner().invoke(app, ["lock", "--recipe", str(mine)])

    assert done.exit_code == 0, done.output
    assert "tcpdump" not in resolved[0].packages
    assert (tmp_path / "owner.lock").read_text() == small().dump()
    assert not (tmp_path / "mine.lock").exists()


def test_a_recipe_without_a_lock_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{PRODUCT}"\n')

    with pytest.raises(
        LockError,
        match=r"mine\.lock cannot be read: No such file or directory; `make image-lock RECIPE=\S+/mine\.toml`",
    ):
        locked(load(tmp_path / "mine.toml"))


# --- the lock that comes along ------------------------------------------------------------------------------------


def test_the_products_lock_belongs_to_the_products_recipe() -> None:
    found = locked(load(PRODUCT))

    names = {pin.name for pin in found.sets["target"]}
    assert set(load(PRODUCT).packages) <= names
    assert {"libc6", "base-files", "dpkg"} <= names, "what is essential belongs to it"
    assert {pin.name for pin in found.sets["headers"]} == {HEADERS}
    assert {pin.architecture for pin in found.sets["twin-amd64"]} <= {"amd64", "all"}
    assert wanted(load(PRODUCT)) == dict(found.wanted)


@pytest.mark.parametrize("path", sorted((ROOT / "image/recipes").glob("picket*.toml")), ids=lambda path: path.name)
def test_each_product_that_comes_along_has_a_lock_that_belongs_to_it(path: Path) -> None:
    assert locked(load(path)).sets["target"]


@pytest.mark.parametrize("path", sorted((ROOT / "image/recipes").glob("*.lock")), ids=lambda path: path.name)
def test_no_lock_names_a_host(path: Path) -> None:
    assert "//" not in path.read_text()
