"use strict";
// The bar at the bottom shows id, weight and position of the token under the pointer, or of the focused one.
const bar = document.getElementById("bar");
bar.textContent = "Point at a token, or focus an example and use the arrow keys, to see its id, weight and position.";
let current = null;

function show(token) {
  if (!token) return;
  if (current) current.classList.remove("on");
  current = token;
  token.classList.add("on");
  bar.textContent = token.title;
}

function neighbour(view, forward) {
  if (!current || !view.contains(current)) return view.querySelector(".t");
  let next = current;
  do next = forward ? next.nextElementSibling : next.previousElementSibling;
  while (next && !next.matches(".t"));
  return next;
}

for (const event of ["pointerover", "click"])
  document.addEventListener(event, (e) => show(e.target.closest(".tokens .t")));
document.addEventListener("keydown", (e) => {
  const view = e.target.closest(".tokens");
  if (!view || !["ArrowLeft", "ArrowRight"].includes(e.key) || e.altKey || e.ctrlKey || e.metaKey) return;
  e.preventDefault();
  show(neighbour(view, e.key === "ArrowRight"));
  current.scrollIntoView({ block: "nearest" });
});
