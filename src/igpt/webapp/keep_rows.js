(rows, view) => {
    if (!view?.picture) return view;
    const pixels = view.hidden.length, kept = rows * Math.sqrt(pixels);
    return { ...view, hidden: "0".repeat(kept) + "1".repeat(pixels - kept) };
}
