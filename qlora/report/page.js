// The one script of the page: it hides rows of the table of all answers, and sorts them. It never makes HTML of text.
"use strict";
const body = document.querySelector("#all tbody");
const rows = [...body.rows];
const search = document.getElementById("search");
const category = document.getElementById("category");
const order = document.getElementById("order");
const shown = document.getElementById("shown");

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const fits = (!category.value || row.dataset.category === category.value) && words.every((word) => text.includes(word));
    row.classList.toggle("hidden", !fits);
    count += fits;
  }
  shown.textContent = `${count} of ${rows.length}`;
}

function sort() {
  const sign = { gain: -1, loss: 1 }[order.value];
  const key = (row) => (sign ? sign * Number(row.dataset.gain) : Number(row.dataset.place));
  body.append(...rows.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place));
}

search.addEventListener("input", show);
category.addEventListener("change", show);
order.addEventListener("change", sort);
show();
