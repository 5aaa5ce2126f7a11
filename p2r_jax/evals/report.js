"use strict";

// Galleries: a card stays if it has every chosen field value and contains every search word.
for (const bar of document.querySelectorAll(".filters")) {
  const gallery = document.getElementById(bar.dataset.gallery);
  const cards = [...gallery.children];
  const words = new Map();
  const fields = [...bar.querySelectorAll("select")];
  const search = bar.querySelector("[data-search]");
  const count = bar.querySelector("output");
  const empty = gallery.nextElementSibling;

  const apply = () => {
    const wanted = fields.filter((f) => f.value).map((f) => [f.dataset.field, f.value.slice(1)]);
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      if (terms.length && !words.has(card)) words.set(card, card.textContent.toLowerCase());
      const keep = wanted.every(([field, value]) => card.dataset[field] === value)
        && terms.every((term) => words.get(card).includes(term));
      card.hidden = !keep;
      shown += keep;
    }
    empty.hidden = shown > 0;
    count.textContent = `${shown} of ${cards.length} shown`;
  };
  bar.addEventListener("input", apply);
  bar.querySelector("[data-reset]").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    search.value = "";
    apply();
  });
  for (const field of fields) {
    // "all" and one value: nothing to choose.
    if (field.options.length < 3) field.parentElement.hidden = true;
  }
  apply();
}

// Pictures: a click shows the same drawing as large as the window allows.
const zoom = document.getElementById("zoom");
document.addEventListener("click", (event) => {
  const button = event.target.closest(".zoom");
  if (button) {
    zoom.querySelector("div").replaceChildren(button.querySelector("svg").cloneNode(true));
    zoom.showModal();
  } else if (event.target === zoom || event.target.closest(".close")) {
    zoom.close();
  }
});

// Charts: values at the step under the pointer, or moved to with the arrow keys.
const hover = JSON.parse(document.getElementById("hover").textContent);
const tooltip = document.getElementById("tooltip");
const text = (value) => (value === null ? "–" : Number(value).toPrecision(4).replace(/\.?0+$|\.?0+(?=e)/, ""));

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = hover.charts[Number(figure.dataset.chart)];
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const steps = [...new Set(chart.series.flatMap((s) => s.step))].sort((a, b) => a - b);
  if (!steps.length) continue;
  let at = steps.length - 1;

  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    const share = chart.last > chart.first ? (step - chart.first) / (chart.last - chart.first) : 0.5;
    const x = hover.left + share * (hover.right - hover.left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const lines = [`step ${step}`];
    for (const series of chart.series) {
      const i = series.step.indexOf(step);
      if (i < 0) continue;
      const mean = series.mean ? `   mean ${text(series.mean[i])}` : "";
      lines.push(`${series.name ? series.name + "  " : ""}${text(series.value[i])}${mean}`);
    }
    tooltip.textContent = lines.join("\n");
    tooltip.hidden = false;
    const frame = svg.getBoundingClientRect();
    const left = frame.left + x * frame.width / svg.viewBox.baseVal.width + 12;
    const flip = left + tooltip.offsetWidth > innerWidth - 8;
    tooltip.style.left = `${Math.max(4, flip ? left - tooltip.offsetWidth - 24 : left)}px`;
    tooltip.style.top = `${Math.max(4, frame.top - tooltip.offsetHeight + 14)}px`;
  };
  const hide = () => {
    tooltip.hidden = true;
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    const share = (x - hover.left) / (hover.right - hover.left);
    const target = chart.first + share * (chart.last - chart.first);
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < target) low = middle + 1; else high = middle;
    }
    show(low > 0 && target - steps[low - 1] < steps[low] - target ? low - 1 : low);
  });
  svg.addEventListener("pointerleave", hide);
  figure.addEventListener("focus", () => { if (figure.matches(":focus-visible")) show(at); });
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
    else if (event.key === "Escape") hide();
  });
}
