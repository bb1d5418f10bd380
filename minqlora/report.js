// Values under the pointer, a finger or the arrow keys: they stand in the legend, and a rule shows where.
"use strict";

for (const figure of document.querySelectorAll("figure.chart")) {
  const { last, lines } = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot");
  const caption = figure.querySelector("figcaption b").textContent;
  const names = [...figure.querySelectorAll(".legend li")].map((item) => item.querySelector("span")?.textContent ?? "");
  const outputs = [...figure.querySelectorAll(".legend output")];
  const atRest = outputs.map((output) => output.textContent);
  const dots = figure.querySelectorAll(".at");
  const cursor = figure.querySelector(".cursor");
  const axis = figure.querySelector(".axis");
  const axisAtRest = axis.textContent;
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let place = steps.length - 1;

  // The place of the last element that is not beyond a value; -1 if all are.
  function upTo(sorted, value) {
    let [low, high] = [0, sorted.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  function show(newPlace) {
    place = Math.max(0, Math.min(steps.length - 1, newPlace));
    const step = steps[place];
    cursor.setAttribute("d", `M${(1000 * step) / last} 0V1000`);
    axis.textContent = `step ${step.toLocaleString("en")}`;
    axis.classList.add("moved");
    lines.forEach((line, i) => {
      const at = upTo(line.x, step);
      // An evaluation that was not at this step says at which it was.
      const since = at >= 0 && line.x.length < steps.length / 2 && line.x[at] !== step;
      outputs[i].textContent = at < 0 ? "–" : line.text[at] + (since ? ` at ${line.x[at].toLocaleString("en")}` : "");
      const drawn = at >= 0 && line.y[at] !== null;
      dots[i].setAttribute("d", drawn ? `M${(1000 * line.x[at]) / last} ${line.y[at]}h0` : "");
    });
    plot.setAttribute("aria-valuenow", step);
    const values = names.map((name, i) => `${name} ${outputs[i].textContent}`.trim());
    plot.setAttribute("aria-valuetext", [axis.textContent, ...values].join(", "));
  }

  function rest() {
    cursor.setAttribute("d", "");
    dots.forEach((dot) => dot.setAttribute("d", ""));
    outputs.forEach((output, i) => (output.textContent = atRest[i]));
    axis.textContent = axisAtRest;
    axis.classList.remove("moved");
  }

  function point(event) {
    const box = plot.getBoundingClientRect();
    const step = ((event.clientX - box.left) / box.width) * last;
    const before = Math.max(0, upTo(steps, step));
    const nearer = before + 1 < steps.length && steps[before + 1] - step < step - steps[before];
    show(before + nearer);
  }

  // With a script the picture becomes something to move along.
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", caption);
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", last);
  plot.setAttribute("aria-valuenow", steps[place]);
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && rest());
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && show(place));
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -far, PageUp: far, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(place + moves[event.key]);
  });
}
