import dataclasses
import datetime as dt
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from image import factory_key, possible, recipe
from image.__main__ import app
from image.errors import RecipeError

RECIPES = Path(recipe.__file__).parent / "recipes"
PRODUCT = RECIPES / "picket.toml"

SMALL = """
name = "small"
version = "1.0"
packages = ["systemd-sysv", "linux-image-arm64"]
boards = ["bcm2711-rpi-4-b"]
hardware = ["raspberrypi,4-model-b"]

[base]
suite = "trixie"
"""


TOKEN = "pkcs11:token=line;object=boot?module-path=/usr/lib/none.so&pin-source=file:/etc/picket/pin"

BOOT_KEY = rsa.generate_private_key(65537, 2048)


def pem(key: PrivateKeyTypes, passphrase: bytes = b"") -> bytes:
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


def written(folder: Path, text: str, name: str = "product.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def mistake(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(folder, text))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_recipe_never_brings_the_private_half_of_the_factorys_key_into_an_image(tmp_path: Path) -> None:
    private = factory_key.ensure(tmp_path / "factory")

    assert "factory holds the private half" in mistake(tmp_path, f'factory_key = "{private}"\n' + SMALL)
    assert recipe.load(written(tmp_path, f'factory_key = "{private}.pub"\n' + SMALL)).factory_key is not None


# --- the recipes that come along ----------------------------------------------------------------------------------


def test_the_products_recipe_is_one_and_nothing_is_wrong_with_it() -> None:
    product = recipe.load(PRODUCT)

    assert product.name == product.seed == "picket"
    assert product.base.suite == "trixie"
    assert product.overlays[0].is_file()
    assert product.lock == RECIPES / "picket.lock"
    assert recipe.lint_recipe(PRODUCT) == []


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_no_recipe_that_comes_along_names_a_mirror(path: Path) -> None:
    assert "://" not in path.read_text().replace("mailto:", "")


def test_the_product_on_raspberry_pi_os_is_five_lines(tmp_path: Path) -> None:
    (tmp_path / "keys.gpg").write_bytes(b"\x99\x02\x0d")
    text = f"""
    extends = ["{RECIPES}/raspios-trixie.toml", "{RECIPES}/picket.toml"]
    [base.vendor]
    mirror = "file:///srv/raspios"
    keyring = "keys.gpg"
    """

    product = recipe.load(written(tmp_path, text))

    assert (product.name, product.base.kind) == ("picket", "raspios")
    assert "linux-image-rpi-v8" in product.packages
    assert "linux-image-arm64" not in product.packages
    assert "libtpm2-pkcs11-1" in product.packages
    assert product.base.vendor.keyring == tmp_path / "keys.gpg"


def test_a_product_needs_little(tmp_path: Path) -> None:
    product = recipe.load(written(tmp_path, SMALL))

    assert product.base == recipe.BaseSettings(suite="trixie")
    assert (product.disk.root_mebibytes, product.pir_line, product.tpm) == (320, 17, "probe")


def test_every_key_has_a_check_or_any_value_of_its_type_is_right() -> None:
    unchecked = {key for key, hint in recipe._all_keys() if not dataclasses.is_dataclass(hint)} - set(possible.CHECKS)

    assert unchecked == {"support.until"}
    assert set(possible.CHECKS) <= {key for key, _ in recipe._all_keys()}


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('hostnmae = "x"', "product.toml: hostnmae is not a key: did you mean hostname?"),
        ('suite = "trixie"', "product.toml: suite is not a key: did you mean base.suite?"),
        ("frobnicate = 1", "product.toml: frobnicate is not a key; take it out (keys here: name, version"),
        ('exclude = "/usr/share/doc/*"', "product.toml: exclude: expected a list of texts, found '/usr/"),
        ("exclude = [1]", "product.toml: exclude: expected a list of texts, found [1]; write"),
        ("pir_line = true", "product.toml: pir_line: expected a number, found true; write pir_line = 17"),
        ('pir_line = "17"', "product.toml: pir_line: expected a number, found '17'; write pir_line = 17"),
        ("tpm = true", 'product.toml: tpm: expected a text, found true; write tpm = "yes" or "no" or "probe"'),
        ('boot = "autoboot"', "product.toml: boot: expected a table, found 'autoboot'; write [boot]"),
        ('exclude.plus = ["/a"]', "exclude.plus is not a key: a list is changed by exclude.add and exclude.remove"),
        ('exclude.add = "/a"', "exclude.add: expected a list of texts, found '/a'; write exclude.add = ["),
        ("disk.boot_mebibytes = 96.5", "expected a number, found 96.5; write disk.boot_mebibytes = 96"),
        ('exclude.remove = ["/a"]', "exclude.remove: /a is not in what this recipe extends"),
        ('support.until = "2031-12-31"', "support.until: expected a date, found '2031-12-31'; write "),
        ("support.until = 2031-12-31T00:00:00", "support.until: expected a date"),
        ('hostname = "a b"', "hostname: 'a b': write small letters"),
        ('tpm = "yse"', "tpm: 'yse' is none of yes, no, probe: did you mean yes?"),
        ("pir_line = 40", "pir_line: 40 is impossible; write a number from 0 to 27"),
        ("security_version = 0", "security_version: 0 is impossible"),
        ("disk.boot_mebibytes = 20", "disk.boot_mebibytes: 20 is impossible; write a number from 64 to 1024 MiB"),
        ('endpoint = "https://mqtt.example.com"', "endpoint: 'https://mqtt.example.com': write a host alone"),
        ('wifi_country = "de"', "wifi_country: 'de': write two capital letters"),
        ('shared = ["/var/lib/../x"]', "shared: '/var/lib/../x': write a whole path"),
        ('shared = ["/srv", "/srv"]', "shared: '/srv' stands there twice; take one out"),
        ('config = ["a\\nb"]', "config: 'a\\nb': write one line"),
        ('cmdline = ["a b"]', "cmdline: 'a b': write one word"),
        ('overlays = ["no.dts"]', "overlays: there is no file"),
        ('overlays = ["product.toml"]', "product.toml does not end in .dts"),
        ('files = ["product.toml"]', "files: there is no directory"),
        ('lock_of = "no.toml"', "lock_of: there is no file"),
        ('factory_key = "no.pub"', "factory_key: there is no file"),
        ('factory_key = "product.toml"', "product.toml is no public key as OpenSSH writes it"),
        ('boot.secure_boot_key = "no.pem"', "boot.secure_boot_key: there is no file"),
        ('support.contact = "me"', "support.contact: 'me': write mailto:"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_file_the_key_and_the_way_out(tmp_path: Path, line: str, complaint: str) -> None:
    assert complaint in mistake(tmp_path, line + "\n" + SMALL)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('name = "small"', "", 'product.toml: name is missing; write name = "..."'),
        ('"small"', '"Small One"', "product.toml: name: 'Small One': write small letters"),
        ('"1.0"', '"one"', "version: 'one': write a version like"),
        ('["systemd-sysv", "linux-image-arm64"]', "[]", "packages is empty"),
        ('"systemd-sysv"', '"systemd=257"', "packages: 'systemd=257': write a package's name alone"),
        ('suite = "trixie"', "", "base.suite is missing"),
        (
            'suite = "trixie"',
            'suite = "trixie"\nkind = "debain"',
            "'debain' is none of debian, raspios, image: did you",
        ),
        ('suite = "trixie"', 'suite = "trixie"\nkind = "raspios"', "base.vendor.mirror is missing"),
        ('suite = "trixie"', 'suite = "trixie"\nkind = "image"', "base.source is missing"),
        ('suite = "trixie"', 'suite = "trixie"\nsource = "no.img"', "base.source: there is no file"),
        ('suite = "trixie"', 'suite = "trixie"\nvendor.mirror = "file:/x"', "base.vendor.mirror is for kind raspios"),
        ('suite = "trixie"', 'suite = "trixie"\nmirror = "ftp.example.com"', "base.mirror: 'ftp.example.com': write"),
        ('suite = "trixie"', 'suite = "trixie"\narchitecture = "armhf"', "base.architecture: 'armhf' is none of arm64"),
    ],
)
def test_what_is_missing_or_impossible_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in SMALL

    assert complaint in mistake(tmp_path, SMALL.replace(old, new))


def test_a_secure_boot_key_can_be_on_a_token(tmp_path: Path) -> None:
    product = recipe.load(written(tmp_path, 'boot.secure_boot_key = "X"\n'.replace("X", TOKEN) + SMALL))

    assert product.boot.secure_boot_key == TOKEN
    assert "boot.secure_boot_key: a pkcs11: URI needs token, object (or id)" in mistake(
        tmp_path, 'boot.secure_boot_key = "pkcs11:token=line"\n' + SMALL
    )
    assert "boot.secure_boot_key: 'garbage' is unknown" in mistake(
        tmp_path, 'boot.secure_boot_key = "pkcs11:garbage"\n' + SMALL
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\0noise", "key is no PEM key without a passphrase"),
        (b"", "key is no PEM key without a passphrase"),
        (pem(rsa.generate_private_key(65537, 3072)), "key is no RSA key of 2048 bits"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "key is no RSA key of 2048 bits"),
        (pem(BOOT_KEY, b"secret"), "key is no PEM key without a passphrase"),
        (pem(BOOT_KEY), ""),
    ],
    ids=["noise", "empty", "3072 bits", "EC", "passphrase", "right"],
)
def test_a_secure_boot_key_is_one_that_the_boot_loader_takes(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "key").write_bytes(content)

    said = recipe.lint_recipe(written(tmp_path, f'boot.secure_boot_key = "key"\n{SMALL}'))

    assert [complaint for line in said if "boot.secure_boot_key: " in line and complaint in line] == (
        [complaint] if complaint else []
    )


@pytest.mark.parametrize("key", ["base.keyring", "base.vendor.keyring"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\0noise", "keys is no OpenPGP key ring; write one by `gpg --export KEY`"),
        (b"", "keys is no OpenPGP key ring"),
        (b"\x7fELF\x02", "keys is no OpenPGP key ring"),
        (b"\x88\x75\x04", "keys is no OpenPGP key ring"),  # a signature
        (b"\0\0\0 \1\1\0\2KBXf", "keys is no OpenPGP key ring"),
        (b"\x95\x03\xbe", "keys holds a private key"),
        (b"\xc5\x03\xbe", "keys holds a private key"),
        (b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n", "keys holds a private key"),
        (b"\x99\x02\x0d", ""),
        (b"\x98\x33\x04", ""),
        (b"\xc6\x33\x04", ""),
        (b"\n-----BEGIN PGP PUBLIC KEY BLOCK-----\n", ""),
    ],
)
def test_a_key_ring_is_one_of_public_keys(tmp_path: Path, key: str, content: bytes, complaint: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    text = f'{key} = "keys"\n{SMALL}'.replace("[base]\nsuite", "base.suite")

    said = [line for line in recipe.lint_recipe(written(tmp_path, text)) if "support" not in line]

    assert len(said) == bool(complaint)
    assert not said or f"product.toml: {key}: {tmp_path}/{complaint}" in said[0]


def test_debians_own_key_ring_is_one(tmp_path: Path) -> None:
    ring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not ring.exists():
        pytest.skip("not on Debian")

    assert recipe.load(written(tmp_path, f'{SMALL}keyring = "{ring}"')).base.keyring == ring


@pytest.mark.parametrize(
    ("shared", "complaint"),
    [
        ([], "/var/lib/picket is missing, so that a unit would be another one after an update"),
        (["/var/lib/systemd"], "/var/lib/picket is missing"),
        (["/var/lib/picket2"], "/var/lib/picket is missing"),
        (["/var/lib/picket/state"], "/var/lib/picket is missing"),
        (["/var/lib/picket", "/etc"], "/etc cannot be shared: /etc is each image's own; name a directory like"),
        (["/var"], "/var cannot be shared"),
        (["/var/lib/picket", "/usr/lib"], "/usr/lib cannot be shared: /usr is each image's own"),
        (["/var/lib/picket", "/run/x"], "/run/x cannot be shared"),
        (["/var/lib/picket", "/opt/picket"], "/opt/picket cannot be shared"),
        (["/var/lib/picket", "/data"], "/data cannot be shared"),
        (["/var/lib", "/var/lib/picket"], "/var/lib/picket lies within /var/lib, which is shared whole; take one"),
        (["/var/lib/picket/x", "/var/lib/picket"], "/var/lib/picket/x lies within /var/lib/picket"),
        (["/var/lib"], ""),
        (["/var/lib/picket", "/srv", "/etc/product", "/usrdata"], ""),
    ],
)
def test_what_slots_share_is_who_the_unit_is_and_nothing_of_an_image(
    tmp_path: Path, shared: list[str], complaint: str
) -> None:
    path = written(tmp_path, f"shared = {json.dumps(shared)}\n{SMALL}")

    said = [line for line in recipe.lint_recipe(path) if "support" not in line]

    assert [line.startswith(f"{path}: shared: {complaint}") for line in said] == [True] * bool(complaint)


def test_a_recipe_that_says_nothing_of_it_shares_who_the_unit_is(tmp_path: Path) -> None:
    assert recipe.load(written(tmp_path, SMALL)).shared == ("/var/lib/picket",)
    assert "shared: /var/lib/picket is missing" in mistake(tmp_path, 'shared.remove = ["/var/lib/picket"]\n' + SMALL)


def test_a_period_of_support_that_is_over_is_advice_and_no_build_fails_by_the_day_it_is_made_on(tmp_path: Path) -> None:
    path = written(tmp_path, f'support = {{ until = 2020-01-01, contact = "mailto:a@b" }}\n{SMALL}')

    assert recipe.lint_recipe(path) == [f"{path}: support.until is past: 2020-01-01; write a day to come"]
    assert recipe.load(path).support.until == dt.date(2020, 1, 1)


def test_a_recipe_that_cannot_be_read_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"nowhere\.toml cannot be read: No such file or directory; name a file that is there"
    ):
        recipe.load(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        recipe.load(tmp_path)


def test_a_recipe_that_is_no_toml_is_a_mistake_too(tmp_path: Path) -> None:
    assert "product.toml is no TOML" in mistake(tmp_path, "name = ")


def test_lint_names_all_mistakes_and_load_says_how_many_more(tmp_path: Path) -> None:
    path = written(tmp_path, 'pir_line = 40\nhostname = "A"\n' + SMALL)

    assert len(recipe.lint_recipe(path)) == 2
    assert "(and 1 more: `python -m image lint" in mistake(tmp_path, path.read_text())


def test_lint_asks_for_what_buyers_must_be_told(tmp_path: Path) -> None:
    said = recipe.lint_recipe(written(tmp_path, SMALL))

    assert [line.split(": ")[1].split(" ")[0] for line in said] == ["support.until", "support.contact"]


def test_the_command_names_each_mistake_on_a_line_and_leaves_with_2(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["lint", str(written(tmp_path, 'pir_line = 40\nhostname = "A"\n' + SMALL))])
    right = CliRunner().invoke(app, ["lint", str(PRODUCT)])

    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 2)
    assert right.exit_code == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (f"pir_line = {'9' * 5000}", "product.toml is no recipe: a number in it has thousands of digits"),
        (f"pir_line = 0x{'f' * 5000}", "product.toml: pir_line: something too long to show is impossible; write a num"),
        (f"name = [0x{'f' * 5000}]", "product.toml: name: expected a text, found something too long to show"),
        (f"name = {'[' * 5000}{']' * 5000}", "product.toml is no recipe: its lists or tables lie too deep"),
        (f"pir_line{'.a' * 5000} = 1", "product.toml: pir_line: expected a number, found something too long to show"),
        ('extends = "a\\u0000b.toml"', "product.toml: extends: 'a\\x00b.toml' is no file's name"),
        (f"# {'x' * (1 << 20)}", "product.toml is no recipe: it has more than 1 MiB"),
        (f'overlays = ["{"x" * 300}.dts"]', "product.toml: overlays: there is no file"),
    ],
    ids=["digits", "hex digits", "a list of them", "lists", "tables", "zero byte", "size", "long name"],
)
def test_what_no_parser_stands_is_a_mistake_of_one_line(tmp_path: Path, line: str, complaint: str) -> None:
    text = SMALL.replace('name = "small"\n', "") if line.startswith("name") else SMALL

    assert complaint in mistake(tmp_path, line + "\n" + text)


def test_a_recipe_that_is_a_link_to_itself_is_a_mistake_too(tmp_path: Path) -> None:
    (tmp_path / "product.toml").symlink_to("product.toml")

    with pytest.raises(RecipeError, match="cannot be read: Too many levels"):
        recipe.load(tmp_path / "product.toml")


# --- extending ----------------------------------------------------------------------------------------------------


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "board.dts").touch()
    written(tmp_path / "lib", 'overlays = ["board.dts"]\n' + SMALL, "parent.toml")

    child = recipe.load(
        written(
            tmp_path,
            'extends = "lib/parent.toml"\nname = "child"\npackages.add = ["nftables"]\n'
            'packages.remove = ["systemd-sysv"]\ndisk.root_mebibytes = 500\n',
        )
    )

    assert (child.name, child.version) == ("child", "1.0")
    assert child.packages == ("linux-image-arm64", "nftables")
    assert child.overlays == (tmp_path / "lib" / "board.dts",), "relative to the file that says it"
    assert child.disk == recipe.DiskSettings(root_mebibytes=500)


def test_a_mistake_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    written(tmp_path, SMALL + 'colour = "red"\n', "parent.toml")
    assert "parent.toml: base.colour is not a key" in mistake(tmp_path, 'extends = "parent.toml"\n')

    written(tmp_path, "pir_line = 40\n" + SMALL, "parent.toml")
    assert "parent.toml: pir_line: 40" in mistake(tmp_path, 'extends = "parent.toml"\n')


def test_a_childs_vendor_without_its_kind_names_the_child(tmp_path: Path) -> None:
    written(tmp_path, SMALL + 'kind = "debian"\n', "parent.toml")

    said = mistake(tmp_path, 'extends = "parent.toml"\nbase.vendor.mirror = "file:/x"\n')

    assert said.startswith(f"{tmp_path}/product.toml: base.vendor.mirror is for kind raspios alone")


def test_every_example_of_a_number_is_possible() -> None:
    for key, hint in recipe._all_keys():
        if hint is int:
            assert possible.CHECKS[key](recipe._default_of(key)) is None


def test_what_the_child_says_takes_the_place_of_a_parents_mistake_in_value(tmp_path: Path) -> None:
    written(tmp_path, "pir_line = 40\n" + SMALL, "parent.toml")

    assert recipe.load(written(tmp_path, 'extends = "parent.toml"\npir_line = 4\n')).pir_line == 4


def test_a_circle_is_named(tmp_path: Path) -> None:
    written(tmp_path, 'extends = "product.toml"', "parent.toml")

    said = mistake(tmp_path, 'extends = "parent.toml"')

    assert "product.toml -> parent.toml -> product.toml goes in a circle" in said


def test_a_missing_parent_is_named_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    written(tmp_path, SMALL, "parent.toml")

    said = mistake(tmp_path, 'extends = "paernt.toml"')

    assert "product.toml: extends:" in said
    assert "did you mean parent.toml?" in said


@pytest.mark.parametrize("parents", ["3", '[""]', "[1]", "{}"])
def test_extends_takes_files(tmp_path: Path, parents: str) -> None:
    assert "extends: expected a file or a list of files" in mistake(tmp_path, f"extends = {parents}")


def test_a_parent_that_two_others_extend_counts_once(tmp_path: Path) -> None:
    """Else its second turn would undo what the first of the two changed."""
    written(tmp_path, SMALL, "top.toml")
    written(tmp_path, 'extends = "top.toml"\npir_line = 4\npackages.remove = ["systemd-sysv"]\n', "left.toml")
    written(tmp_path, 'extends = "top.toml"\ntpm = "no"\npackages.add = ["nftables"]\n', "right.toml")

    both = recipe.load(written(tmp_path, 'extends = ["left.toml", "right.toml"]'))

    assert (both.pir_line, both.tpm, both.packages) == (4, "no", ("linux-image-arm64", "nftables"))


# --- properties ---------------------------------------------------------------------------------------------------

NAMES = st.text("abcdef", min_size=2, max_size=3)
LISTS = st.lists(NAMES, unique=True, max_size=5)
CHANGES = st.one_of(LISTS, st.fixed_dictionaries({}, optional={"add": LISTS, "remove": LISTS}))
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "pir_line": st.integers(0, 27),
        "packages": CHANGES,
        "disk": st.fixed_dictionaries({}, optional={"boot_mebibytes": st.integers(), "root_mebibytes": st.integers()}),
    },
)
WHOLE = TABLES.filter(lambda table: isinstance(table.get("packages", []), list))


@given(WHOLE, TABLES)
def test_a_change_holds_and_what_it_does_not_name_stays(before: dict[str, Any], change: dict[str, Any]) -> None:
    merged = recipe.merge(before, change)

    for name in ("name", "pir_line"):
        assert merged.get(name) == change.get(name, before.get(name))
    assert merged.get("disk", {}) == {**before.get("disk", {}), **change.get("disk", {})}
    assert set(merged) == set(before) | set(change)


@given(WHOLE, CHANGES)
def test_a_list_is_replaced_or_changed_in_order(before: dict[str, Any], change: Any) -> None:
    had = before.get("packages", [])

    has = recipe.merge(before, {"packages": change})["packages"]

    if isinstance(change, list):
        assert has == change
    else:
        assert set(has) == (set(had) - set(change.get("remove", ()))) | set(change.get("add", ()))
        assert len(has) == len(set(has))
        kept = [item for item in had if item in has and item not in change.get("remove", ())]
        assert has[: len(kept)] == kept


@given(WHOLE, TABLES)
def test_the_same_change_twice_is_the_change_once(before: dict[str, Any], change: dict[str, Any]) -> None:
    once = recipe.merge(before, change)

    again = recipe.merge(once, change)

    assert {**again, "packages": set(again.get("packages", ()))} == {**once, "packages": set(once.get("packages", ()))}


@given(WHOLE)
def test_merging_changes_nothing_that_it_was_given(before: dict[str, Any]) -> None:
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in before.items()}

    recipe.merge(before, {"packages": {"add": ["zz"]}, "disk": {"boot_mebibytes": 1}})

    assert before == copy


VALUES = st.recursive(
    st.one_of(st.text("ab1./:-\n", max_size=8), st.integers(0, 99), st.booleans(), st.just(dt.date(2030, 1, 1))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abk_", max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from([name for name, _ in recipe._all_keys() if "." not in name] + ["nmae", "pakages", ""])
ANYTHING = st.dictionaries(KEYS, VALUES, max_size=5)


@given(ANYTHING)
def test_any_table_is_a_recipe_or_lines_that_say_why_not(table: dict[str, Any]) -> None:
    file = Path("any.toml")
    whole = {**tomllib.loads(SMALL), **table}

    said = list(recipe.check_shape(file, whole))
    if not said:
        whole = recipe._with_paths(whole, file)
        said = list(recipe.check_values(file, recipe.merge({}, whole)))
    if not said:
        assert recipe._build(recipe.Recipe, recipe.merge({}, whole), file).file == file
    assert all(line.startswith("any.toml: ") and "\n" not in line for line in said)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_a_recipe_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "product.toml"
    path.write_bytes(content)

    said = recipe.lint_recipe(path)

    assert said
    assert all("\n" not in line for line in said)


def test_dates_are_dates(tmp_path: Path) -> None:
    product = recipe.load(written(tmp_path, "support.until = 2031-12-31\n" + SMALL))

    assert product.support.until == dt.date(2031, 12, 31)


def test_an_image_as_a_base_may_bring_all_packages(tmp_path: Path) -> None:
    (tmp_path / "official.img").touch()
    settings_of_image = f'kind = "image"\nsource = "official.img"\nsource_sha256 = "{"0" * 64}"\n'

    product = recipe.load(
        written(tmp_path, SMALL.replace('["systemd-sysv", "linux-image-arm64"]', "[]") + settings_of_image)
    )

    assert product.packages == ()
    assert product.base.source == tmp_path / "official.img"
