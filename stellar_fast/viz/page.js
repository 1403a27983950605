"use strict";
const dialog = document.querySelector("dialog");
const hits = [...document.querySelectorAll("button.hit")];
const part = (name) => dialog.querySelector(name);
let shown = null;

function neighbours(hit) {
  return [...hit.closest("ol").querySelectorAll("button.hit")];
}

function show(hit) {
  const row = neighbours(hit);
  const place = row.indexOf(hit);
  shown = hit;
  part(".stage").replaceChildren(hit.querySelector(".photo").cloneNode(true));
  part("h2").textContent = hit.dataset.id;
  part(".about").textContent = hit.dataset.about;
  const near = hit.parentElement.querySelector(".near").cloneNode(true);
  near.hidden = false;
  part(".near").replaceWith(near);
  part(".around").hidden = !near.querySelector("li");
  part(".place").textContent = `${place + 1} of ${row.length}`;
  part(".previous").disabled = place === 0;
  part(".next").disabled = place === row.length - 1;
  part("nav .maps").hidden = !hit.querySelector("img.map");
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const row = neighbours(shown);
  const next = row[row.indexOf(shown) + by];
  if (next) show(next);
}

function toggle() {
  const off = document.documentElement.classList.toggle("no-maps");
  for (const button of document.querySelectorAll("button.maps")) button.ariaPressed = String(!off);
}

for (const hit of hits) hit.addEventListener("click", () => show(hit));
for (const button of document.querySelectorAll("button.maps")) button.addEventListener("click", toggle);
part(".previous").addEventListener("click", () => step(-1));
part(".next").addEventListener("click", () => step(1));
part(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => shown.focus());
dialog.addEventListener("click", (event) => {
  const to = event.target.closest("[data-to]");
  if (to) show(document.getElementById(to.dataset.to));
  else if (event.target === dialog) dialog.close(); // beside the picture
});
// On the document: a button that was just disabled loses the focus to it.
document.addEventListener("keydown", (event) => {
  if (!dialog.open) return;
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "m") toggle();
});
