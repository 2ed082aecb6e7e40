"use strict";
// What lies under the pointer says its data-tip at once.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const under = event.target.closest("[data-tip]");
  tip.hidden = !under;
  if (!under) return;
  tip.textContent = under.dataset.tip;
  const right = innerWidth - tip.offsetWidth - 8, below = event.clientY + 18;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, right)) + "px";
  tip.style.top = (below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below) + "px";
});
