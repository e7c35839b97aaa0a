element.addEventListener("click", (event) => {
    const buttons = [...element.querySelectorAll("button")], index = buttons.indexOf(event.target.closest("button"));
    if (index >= 0) trigger("select", { index });
});
