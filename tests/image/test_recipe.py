import tomllib
from pathlib import Path
from typing import Any

import pytest

from image import recipe
from image.errors import RecipeError

PRODUCT = Path(recipe.__file__).parent / "recipes" / "picket.toml"


def table(**changes: Any) -> dict[str, Any]:
    return {**tomllib.loads(PRODUCT.read_text()), **changes}


def test_the_products_recipe_is_one() -> None:
    assert recipe.load(PRODUCT).name == "picket"


def test_the_products_recipe_names_no_mirror() -> None:
    assert recipe.load(PRODUCT).mirror == ""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"nmae": "x"}, "unknown: nmae"),
        ({"name": None}, "missing: name"),
        ({"name": "Picket Image"}, "name"),
        ({"version": "one"}, "version"),
        ({"hostname": "a b"}, "hostname"),
        ({"packages": "python3"}, "packages"),
        ({"packages": []}, "packages"),
        ({"boot_mebibytes": True}, "boot_mebibytes"),
        ({"boot_mebibytes": 20}, "boot_mebibytes"),
        ({"root_spare_mebibytes": 0}, "root_spare_mebibytes"),
        ({"key": {"store": "eeprom"}}, "key.store"),
        ({"key": {"store": "tpm", "size": 1}}, r"\[key\]"),
        ({"key": "tpm"}, r"\[key\]"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe.parse(table(**changes))


def test_a_recipe_that_is_not_there_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml"):
        recipe.load(tmp_path / "nowhere.toml")


def test_a_recipe_that_is_no_toml_is_a_mistake_too(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = ")

    with pytest.raises(RecipeError, match="TOML"):
        recipe.load(path)
