const picture = new Image();
const canvas = () => element.querySelector("canvas");
let hidden = [], stroke = null;
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
