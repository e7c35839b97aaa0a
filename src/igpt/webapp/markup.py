"""Style sheet, HTML templates and scripts of the web page, read from files in this folder.

Images are data URIs at their own size, and the browser enlarges them: each pixel stays a square of
one colour. Hidden pixels are transparent, over a hatched background.
"""

from importlib.resources import files


def _read(name: str) -> str:
    return files("igpt.webapp").joinpath(name).read_text(encoding="utf-8")


STYLE = _read("style.css")
# Images: a list of {"caption", "picture", "download"}, the last one optional; the one captioned
# "original" has a frame.
PICTURES = _read("pictures.html")
# A ZIP, or an empty string.
ARCHIVE = _read("archive.html")
# A list of images to choose from, and its script.
EXAMPLES, CHOOSE = _read("examples.html"), _read("choose_example.js")
# The upload: a list of one {"caption", "picture"}, or of none.
UPLOAD = _read("upload.html")
# {"picture", "hidden"}: the image as the model sees it, and "1" for hidden pixels, "0" for others.
VIEW, PAINT = _read("view.html"), _read("paint.js")
# Hide the rows below the slider.
KEEP_ROWS = _read("keep_rows.js")
# A random seed.
NEW_SEED = "() => crypto.getRandomValues(new Uint32Array(1))[0]"
