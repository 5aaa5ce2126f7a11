"use strict";

// Galleries: a card stays if it has every chosen field value and contains every search word.
for (const bar of document.querySelectorAll(".filters")) {
  const gallery = document.getElementById(bar.dataset.gallery);
  const cards = [...gallery.children];
  const words = new Map();
  const fields = [...bar.querySelectorAll("select")];
  const has = (card, field, value) => {
    const own = card.dataset[field.dataset.field];
    return "many" in field.dataset ? JSON.parse(own || "[]").includes(value) : own === value;
  };
  const search = bar.querySelector("[data-search]");
  const count = bar.querySelector("output");
  const empty = gallery.parentElement.querySelector(".empty");
  const more = gallery.parentElement.querySelector(".more");
  const page = Number(bar.dataset.page);
  let limit = page;

  const apply = () => {
    const wanted = fields.filter((f) => f.value);
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let matching = 0;
    for (const card of cards) {
      if (terms.length && !words.has(card)) words.set(card, card.textContent.toLowerCase());
      const keep = wanted.every((field) => has(card, field, field.value.slice(1)))
        && terms.every((term) => words.get(card).includes(term));
      matching += keep;
      card.hidden = !keep || matching > limit;
    }
    empty.hidden = matching > 0;
    more.hidden = matching <= limit;
    const all = matching < cards.length ? `, ${cards.length} in all` : "";
    count.textContent = `${Math.min(matching, limit)} of ${matching} shown${all}`;
  };
  bar.addEventListener("input", () => { limit = page; apply(); });
  more.addEventListener("click", () => { limit += page; apply(); });
  bar.querySelector("[data-reset]").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    search.value = "";
    limit = page;
    apply();
  });
  for (const field of fields) {
    // "all" and one value that every card has: nothing to choose.
    const least = "many" in field.dataset ? 2 : 3;
    if (field.options.length < least) field.parentElement.hidden = true;
  }
  apply();
}

// Pictures: text until a card that shows them comes near the window.
const pictures = document.getElementById("pictures");
const waiting = new Map();
for (const text of document.querySelectorAll("template[data-picture]")) {
  waiting.set(`#${text.dataset.picture}`, text);
}
const load = (card) => {
  for (const use of card.querySelectorAll("use")) {
    const text = waiting.get(use.getAttribute("href"));
    if (!text) continue;
    waiting.delete(use.getAttribute("href"));
    const image = document.createElementNS(pictures.namespaceURI, "image");
    image.setAttribute("width", text.dataset.width);
    image.setAttribute("height", text.dataset.height);
    image.setAttribute("href", text.content.textContent);
    image.id = text.dataset.picture;
    pictures.append(image);
    text.remove();
  }
};
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    load(entry.target);
  }
}, { rootMargin: "800px" });
const withPictures = document.querySelectorAll(".cards > *, .sample-groups > *");
for (const card of withPictures) near.observe(card);
addEventListener("beforeprint", () => {
  for (const card of withPictures) if (!card.hidden) load(card);
});

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
const text = (value) => (value === null ? "–" : Number(value).toPrecision(4).replace(/\.0+$|(\.\d*?)0+$|\.?0+(?=e)/, "$1"));

const linesOf = (chart, step) => {
  const lines = [`step ${step}`];
  let total = 0;
  for (const series of chart.series) {
    const i = series.step.indexOf(step);
    if (i < 0) continue;
    if (chart.stacked && !series.value[i]) continue;
    total += series.value[i];
    const range = series.range && series.range[i] ? `   ${series.range[i].map(text).join(" – ")}` : "";
    const mean = series.mean ? `   mean ${text(series.mean[i])}` : "";
    lines.push(`${series.name ? series.name + "  " : ""}${text(series.value[i])}${chart.unit}${mean}${range}`);
  }
  if (chart.stacked) lines.push(`all  ${text(total)}${chart.unit}`);
  return lines;
};

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = hover.charts[Number(figure.dataset.chart)];
  const steps = [...new Set(chart.series.flatMap((s) => s.step))].sort((a, b) => a - b);
  if (!steps.length) continue;
  const drawings = [...figure.querySelectorAll("svg")];
  let at = steps.length - 1;

  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    const share = chart.last > chart.first ? (step - chart.first) / (chart.last - chart.first) : 0.5;
    // A wide chart is drawn twice; the window's width hides one of them.
    const svg = drawings.find((drawing) => drawing.getClientRects().length) || drawings[0];
    const left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    const x = left + share * (right - left);
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    tooltip.textContent = linesOf(chart, step).join("\n");
    tooltip.hidden = false;
    const frame = svg.getBoundingClientRect();
    const place = frame.left + x * frame.width / svg.viewBox.baseVal.width + 12;
    const flip = place + tooltip.offsetWidth > innerWidth - 8;
    tooltip.style.left = `${Math.max(4, flip ? place - tooltip.offsetWidth - 24 : place)}px`;
    tooltip.style.top = `${Math.max(4, frame.top - tooltip.offsetHeight + 14)}px`;
  };
  const hide = () => {
    tooltip.hidden = true;
    for (const drawing of drawings) {
      drawing.querySelector(".cursor").setAttribute("x1", -9);
      drawing.querySelector(".cursor").setAttribute("x2", -9);
    }
  };
  for (const svg of drawings) {
    const left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      const target = chart.first + (x - left) / (right - left) * (chart.last - chart.first);
      let low = 0, high = steps.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (steps[middle] < target) low = middle + 1; else high = middle;
      }
      const before = !chart.stacked && low > 0 && target - steps[low - 1] < steps[low] - target;
      show(before ? low - 1 : low);
    });
    svg.addEventListener("pointerleave", hide);
  }
  figure.addEventListener("focus", () => { if (figure.matches(":focus-visible")) show(at); });
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
    else if (event.key === "Escape") hide();
  });
}
