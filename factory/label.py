"""Label: drawn after PASS only, and read back before it counts.

One PNG, 50 x 25 mm at 300 dpi, with the serial as DataMatrix (ISO/IEC 16022) and in letters.
"""

import io
from pathlib import Path

import zxingcpp
from PIL import Image, ImageDraw, ImageFont

from factory.bench import Unit
from factory.errors import StationFault
from factory.files import write_whole
from factory.record import Step

DPI = 300
WIDTH_MM, HEIGHT_MM = 50, 25
_MM = DPI / 25.4


def label(unit: Unit, product: str, directory: Path, step: Step) -> Path:
    """Draw the unit's label and scan it back.

    Raises:
        StationFault: the label does not read as the serial.
    """
    picture = draw(unit, product)
    read = scan(picture)
    if read != unit.serial:
        raise StationFault(f"the label of {unit.serial} reads {read!r}", advice="Report it: the label is not printed.")
    path = directory / f"{unit.serial}.png"
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", dpi=(DPI, DPI))
    write_whole(path, encoded.getvalue(), mode=0o644)
    step.note("label", str(path))
    step.note("scanned", read)
    return path


def draw(unit: Unit, product: str) -> Image.Image:
    """The label as a picture: DataMatrix on the left, product, serial and batch on the right."""
    picture = Image.new("L", (round(WIDTH_MM * _MM), round(HEIGHT_MM * _MM)), 255)
    code = zxingcpp.create_barcode(unit.serial, zxingcpp.BarcodeFormat.DataMatrix)
    matrix = Image.fromarray(zxingcpp.write_barcode_to_image(code, scale=1, add_quiet_zones=False))
    scale = int(19 * _MM) // matrix.width
    matrix = matrix.resize((matrix.width * scale, matrix.height * scale), Image.Resampling.NEAREST)
    margin = (picture.height - matrix.height) // 2
    picture.paste(matrix, (margin, margin))
    pen = ImageDraw.Draw(picture)
    left = matrix.width + 2 * margin
    room = picture.width - left - round(2 * _MM)
    batch = f"batch {unit.batch}"
    pen.text((left, margin), product, fill=0, font=_fitting(product, room, 34))
    pen.text((left, margin + round(6 * _MM)), unit.serial, fill=0, font=_fitting(unit.serial, room, 56))
    pen.text((left, margin + round(14 * _MM)), batch, fill=0, font=_fitting(batch, room, 30))
    return picture


def scan(picture: Image.Image) -> str | None:
    """What a scanner reads off the label, or None."""
    found = zxingcpp.read_barcodes(picture)
    return found[0].text if len(found) == 1 else None


def _fitting(text: str, room: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    while size > 16 and ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text, ImageFont.load_default(size)) > room:
        size -= 2
    return ImageFont.load_default(size)
