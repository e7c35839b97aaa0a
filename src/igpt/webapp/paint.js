const picture = new Image();
const canvas = () => element.querySelector("canvas");
const button = (name) => element.querySelector(`button[name=${name}]`);
let hidden = [], stroke = null;
// Earlier states of `hidden`. Of consecutive moves of the slider, only the state before the first is kept, and
// none while nothing was painted: the slider itself can be moved back.
let past = [], sliding = true;
const show = () => {
    const side = picture.naturalWidth, pen = canvas().getContext("2d");
    canvas().width = canvas().height = side;
    pen.drawImage(picture, 0, 0);
    const unknown = props.value.unknown;
    if (unknown) pen.fillStyle = unknown;
    hidden.forEach((one, pixel) => one === "1"
        && pen[unknown ? "fillRect" : "clearRect"](pixel % side, Math.floor(pixel / side), 1, 1));
    canvas().hidden = false;
    const count = hidden.filter((one) => one === "1").length;
    element.querySelector("figcaption").textContent =
        `${count} of ${hidden.length} pixels are hidden. Paint to hide more pixels, or on hidden ones to show them.`;
    button("undo").disabled = !past.length;
    button("keep").disabled = !count;
};
const take = () => {
    const view = props.value;
    canvas().hidden = element.querySelector(".igpt-tools").hidden = !view?.picture;
    element.querySelector("figcaption").textContent = "";
    if (!view?.picture || picture.src !== view.picture) {
        past = [];
        sliding = true;
    } else if (hidden.join("") !== view.hidden) {
        if (!sliding) past.push(hidden.join(""));
        sliding = true;
    }
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
    stroke = { mark: hidden[within(y) * side + within(x)] === "1" ? "0" : "1", before: hidden.join(""), x, y };
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
const put = (marks) => {
    hidden = [...marks];
    sliding = false;
    props.value = { ...props.value, hidden: marks };
    show();
};
const lift = () => {
    if (!stroke) return;
    past.push(stroke.before);
    stroke = null;
    put(hidden.join(""));
};
element.addEventListener("click", (event) => {
    if (event.target === button("undo")) put(past.pop());
    if (event.target !== button("keep")) return;
    past.push(hidden.join(""));
    put("0".repeat(hidden.length));
});
element.addEventListener("pointerup", lift);
element.addEventListener("pointercancel", lift);
watch("value", take);
take();
