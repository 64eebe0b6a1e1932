// The one script of the page: it hides rows of the table of all answers, and sorts them. It never makes HTML of text.
"use strict";
const body = document.querySelector("#all tbody");
const rows = [...body.rows];
const search = document.getElementById("search");
const category = document.getElementById("category");
const order = document.getElementById("order");
const shown = document.getElementById("shown");
const more = document.getElementById("more");
const STEP = Number(document.getElementById("all").dataset.shown);
let limit = STEP;

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const fits = (!category.value || row.dataset.category === category.value) && words.every((word) => text.includes(word));
    count += fits;
    row.classList.toggle("hidden", !fits || count > limit);
  }
  shown.textContent = `${count} of ${rows.length}` + (count > limit ? `, the first ${limit} are shown` : "");
  more.hidden = count <= limit;
}

function anew() {
  limit = STEP;
  show();
}

function sort() {
  const sign = { gain: -1, loss: 1 }[order.value];
  const key = (row) => (sign ? sign * Number(row.dataset.gain) : Number(row.dataset.place));
  for (const row of rows.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place)) body.append(row);
  anew();
}

search.addEventListener("input", anew);
category.addEventListener("change", anew);
order.addEventListener("change", sort);
more.addEventListener("click", () => {
  limit += STEP;
  show();
});
show();
