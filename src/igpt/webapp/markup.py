"""How the web page looks: its style sheet, rows of small pictures, and the picture whose pixels a brush hides.

The pictures travel as data URIs at their own size and are enlarged by the browser, so each pixel
stays a square of one colour, and a row that is drawn anew does not flicker. Open pixels are clear;
the page hatches the ground beneath them.
"""

STYLE = """
.igpt-pictures, .igpt-view { --hatch: repeating-linear-gradient(45deg, #8886 0 3px, #8882 3px 7px); }
.igpt-pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
.igpt-pictures figure, .igpt-view figure { margin: 0; min-width: 0; }
.igpt-pictures img, .igpt-view canvas { width: 100%; display: block; image-rendering: pixelated;
    background: var(--hatch); border: 1px solid var(--border-color-primary); }
.igpt-pictures figcaption, .igpt-view figcaption { font-size: .85rem; margin-top: .3rem;
    color: var(--block-info-text-color); line-height: 1.35; }
.igpt-pictures:has(> figure:only-child) { grid-template-columns: minmax(0, 20rem); }
.igpt-pictures .original img { outline: 2px solid var(--color-accent); outline-offset: -1px; }
.igpt-view canvas { touch-action: none; cursor: crosshair; max-width: 20rem; }
.igpt-view canvas[hidden] { display: none; }
.igpt-examples { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; }
.igpt-examples button { padding: 0; border: 1px solid var(--border-color-primary); background: none; cursor: pointer; }
.igpt-examples button:hover, .igpt-examples button:focus-visible { outline: 2px solid var(--color-accent); }
.igpt-examples img { width: 44px; height: 44px; display: block; image-rendering: pixelated; }
.igpt-about section { margin: 0 0 2rem; max-width: 54rem; }
.igpt-about h2 { font-size: 1.15rem; font-weight: 600; margin: 0 0 .4rem; }
.igpt-about img { max-width: 100%; display: block; margin: .6rem 0; }
.igpt-about .pixels { image-rendering: pixelated; }
.igpt-about figure { margin: 0; }
.igpt-about p, .igpt-about figcaption { font-size: .9rem; margin: .3rem 0; overflow-wrap: anywhere; }
.igpt-about table { font-size: .85rem; border-collapse: collapse; margin: .4rem 0; }
.igpt-about th, .igpt-about td { padding: .15rem .9rem .15rem 0; text-align: right; font-weight: 400; }
.igpt-about summary { cursor: pointer; font-size: .9rem; }
.igpt-words { min-height: 1.6rem; }
footer .divider { display: none; }
"""

# A list of {"caption", "picture"}; the true image has a frame.
PICTURES = """
<div class="igpt-pictures">{{#each value}}<figure class="{{caption}}">
<a href="{{picture}}" download="{{caption}}.png" title="Download"><img src="{{picture}}" alt="{{caption}}"></a>
<figcaption>{{caption}}</figcaption></figure>{{/each}}</div>
"""

# A list of pictures to choose from.
EXAMPLES = """
<div class="igpt-examples"><span>or take one of these:</span>
{{#each value}}<button type="button" aria-label="example {{@index}}"><img src="{{this}}" alt=""></button>{{/each}}</div>
"""
CHOOSE = """
element.addEventListener("click", (event) => {
    const buttons = [...element.querySelectorAll("button")], index = buttons.indexOf(event.target.closest("button"));
    if (index >= 0) trigger("select", { index });
});
"""

# {"picture", "hidden"}: the model's view at its own size, and for each of its pixels "1" if it is
# hidden, else "0".
VIEW = """
<div class="igpt-view"><figure><canvas hidden role="img" aria-label="The model's view; paint to hide pixels"></canvas>
<figcaption></figcaption></figure></div>
"""
PAINT = """
const picture = new Image();
const canvas = () => element.querySelector("canvas");
let hidden = [], stroke = null;
const show = () => {
    const side = picture.naturalWidth, pen = canvas().getContext("2d");
    canvas().width = canvas().height = side;
    pen.drawImage(picture, 0, 0);
    hidden.forEach((one, place) => one === "1" && pen.clearRect(place % side, Math.floor(place / side), 1, 1));
    canvas().hidden = false;
    const count = hidden.filter((one) => one === "1").length;
    element.querySelector("figcaption").textContent =
        `${count} of ${hidden.length} pixels are hidden. Paint to hide more; on hidden ones, to show them again.`;
};
const take = () => {
    const view = props.value;
    canvas().hidden = !view?.picture;
    element.querySelector("figcaption").textContent = "";
    if (!view?.picture) return;
    hidden = [...view.hidden];
    picture.onload = show;
    if (picture.src === view.picture) show(); else picture.src = view.picture;
};
const at = (event) => {
    const box = canvas().getBoundingClientRect(), side = picture.naturalWidth;
    return [(event.clientX - box.left) / box.width * side, (event.clientY - box.top) / box.height * side];
};
const dab = (x, y) => {  // a square brush, a twelfth of the picture wide
    const side = picture.naturalWidth, wide = Math.ceil(side / 12);
    const left = Math.floor(x - (wide - 1) / 2), top = Math.floor(y - (wide - 1) / 2);
    for (let row = Math.max(0, top); row < Math.min(side, top + wide); row++)
        for (let column = Math.max(0, left); column < Math.min(side, left + wide); column++)
            hidden[row * side + column] = stroke.mark;
};
element.addEventListener("pointerdown", (event) => {
    if (event.target !== canvas() || event.button) return;
    event.preventDefault();
    const [x, y] = at(event), side = picture.naturalWidth;
    const within = (value) => Math.min(side - 1, Math.max(0, Math.floor(value)));
    stroke = { mark: hidden[within(y) * side + within(x)] === "1" ? "0" : "1", x, y };
    canvas().setPointerCapture(event.pointerId);
    dab(x, y);
    show();
});
element.addEventListener("pointermove", (event) => {
    if (!stroke) return;
    const [x, y] = at(event), steps = Math.max(1, Math.ceil(2 * Math.hypot(x - stroke.x, y - stroke.y)));
    for (let step = 1; step <= steps; step++)
        dab(stroke.x + (x - stroke.x) * step / steps, stroke.y + (y - stroke.y) * step / steps);
    stroke = { ...stroke, x, y };
    show();
});
const lift = () => {
    if (stroke) props.value = { ...props.value, hidden: hidden.join("") };
    stroke = null;
};
element.addEventListener("pointerup", lift);
element.addEventListener("pointercancel", lift);
watch("value", take);
take();
"""

# Hides what is below the rows to keep.
KEEP_ROWS = """
(rows, view) => {
    if (!view?.picture) return view;
    const places = view.hidden.length, kept = rows * Math.sqrt(places);
    return { ...view, hidden: "0".repeat(kept) + "1".repeat(places - kept) };
}
"""
