"use strict";
// A cell that fails opens the row beneath it, and closes it again. Without this script the link opens it by its address.
for (const link of document.querySelectorAll("a.opens")) {
  const panel = document.getElementById(link.hash.slice(1));
  const isOpen = () => getComputedStyle(panel).display !== "none";
  const show = (open) => {
    panel.classList.toggle("open", open);
    panel.classList.toggle("shut", !open);
    link.setAttribute("aria-expanded", String(open));
  };
  link.setAttribute("role", "button");
  link.setAttribute("aria-controls", panel.id);
  link.setAttribute("aria-expanded", String(isOpen()));
  link.addEventListener("click", (event) => {
    event.preventDefault();
    show(!isOpen());
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      show(false);
      link.focus();
    }
  });
}
