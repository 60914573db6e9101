"""The demo's pictures: every emoji as a captioned drawing, or handwritten digits without the font.

Start at `draw_emoji`. The drawings come from the system's colour emoji font (Debian package
fonts-noto-color-emoji), the captions are the emoji's names.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from clipserve.errors import ConfigError

# Noto Color Emoji holds bitmaps of one size only: 136x128 pixels, selected as 109 pixels per em.
_FONT_SIZE = 109
_CANVAS_SIDE = 136
_SIDE = 96
_FONT_NAMES = ("NotoColorEmoji.ttf",)
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class Drawing:
    """A picture file, its caption, and what names it among the others."""

    file: Path
    caption: str
    name: str


def find_emoji_font() -> Path | None:
    """The colour emoji font, if it is installed and Pillow can shape joined emoji (Raqm)."""
    if not features.check("raqm"):
        return None
    for folder in _FONT_FOLDERS:
        for name in _FONT_NAMES:
            found = next(Path(folder).expanduser().rglob(name), None)
            if found is not None:
                return found
    return None


def draw_emoji(font_file: Path, folder: Path) -> list[Drawing]:
    """Write each fully-qualified emoji as a 96x96 PNG on white, leaving out missing glyphs.

    A glyph is missing when the font draws a sequence as several glyphs side by side.
    """
    try:
        import emoji
    except ModuleNotFoundError:
        raise ConfigError("the demo needs the emoji package: install clipserve[demo]") from None

    font = ImageFont.truetype(str(font_file), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    drawings = []
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        if font.getlength(text) > _CANVAS_SIDE + 1:
            continue
        caption = entry["en"].strip(":").replace("_", " ")
        file = folder / f"{'-'.join(f'{ord(character):04x}' for character in text)}.png"
        picture = Image.new("RGB", (_CANVAS_SIDE, _CANVAS_SIDE), "white")
        blank = picture.tobytes()
        ImageDraw.Draw(picture).text((0, 4), text, font=font, embedded_color=True)
        if picture.tobytes() == blank:
            continue
        picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).save(file)
        drawings.append(Drawing(file, caption, caption))
    return drawings


def draw_digits(folder: Path) -> list[Drawing]:
    """scikit-learn's 1,797 handwritten digits, enlarged, each with a sentence that names it."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigError("the demo needs scikit-learn: install clipserve[demo]") from None

    digits = load_digits()
    drawings = []
    for i, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = (255 - values * (255 / 16)).round().astype("uint8")
        file = folder / f"{i:04d}.png"
        Image.fromarray(grey).resize((64, 64), Image.Resampling.BICUBIC).save(file)
        drawings.append(Drawing(file, f"the handwritten digit {_DIGITS[label]}", file.name))
    return drawings
