// Read-outs: the drawn points are turned back into data, so the page carries each number once.
"use strict";
function axisOf(text) {
  const [low, high, log, unit, ...label] = text.split(",");
  const [a, b] = [Number(low), Number(high)];
  return { label: label.join(","), at: t => (log === "1" ? a * (b / a) ** t : a + (b - a) * t) / Number(unit) };
}
function textOf(value) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e12) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}
for (const plot of document.querySelectorAll(".plot")) {
  const frame = plot.querySelector(".frame"), cross = plot.querySelector(".cross"), out = plot.querySelector(".read-out");
  const x = axisOf(plot.dataset.x), y = axisOf(plot.dataset.y);
  const curves = [...frame.querySelectorAll("path.main, path.point, path.bars")].map(path => ({
    name: path.dataset.name,
    points: [...path.getAttribute("d").matchAll(/(-?[\d.]+),(-?[\d.]+)/g)].map(m => [m[1] / 1000, m[2] / 1000]),
  }));
  frame.addEventListener("pointermove", event => {
    const box = frame.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width;
    const nearest = curves.map(c => ({ name: c.name, point: c.points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a) }));
    if (!nearest.length) return;
    const at = nearest[0].point[0], close = nearest.filter(n => Math.abs(n.point[0] - at) < 0.02);
    out.textContent = [`${x.label}: ${textOf(x.at(at))}`, ...close.map(n => `${n.name}: ${textOf(y.at(1 - n.point[1]))}`)].join("\n");
    cross.style.left = `${at * 100}%`;
    out.style.left = at < 0.5 ? `calc(${at * 100}% + 8px)` : "auto";
    out.style.right = at < 0.5 ? "auto" : `calc(${(1 - at) * 100}% + 8px)`;
    cross.hidden = out.hidden = false;
  });
  frame.addEventListener("pointerleave", () => { cross.hidden = out.hidden = true; });
}
