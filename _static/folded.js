// One switch in the header shows the folded code of all pages; closed, code takes no room
// (boxes.css). A browser opens by itself what an address leads into, and keeps in its place what
// is read. Without this script each cell has a mark.
document.documentElement.dataset.code = "switched";
document.addEventListener("DOMContentLoaded", () => {
  const cells = document.querySelectorAll(".bd-article div.cell > details.hide");
  if (!cells.length) return;
  const KEY = "show-code";
  const button = document.createElement("button");
  const about = { type: "button", className: "btn btn-sm show-code", ariaLabel: "Show code" };
  Object.assign(button, about);
  button.innerHTML = `<i class="fas fa-code"></i><span>${button.ariaLabel}</span>`;
  document.querySelector(".article-header-buttons").prepend(button);
  const show = (on) => {
    button.ariaPressed = on;
    for (const cell of cells) cell.open = on;
  };
  // A browser may refuse its storage: so this comes last.
  button.addEventListener("click", () => {
    show(button.ariaPressed !== "true");
    localStorage.setItem(KEY, button.ariaPressed);
  });
  show(false);
  show(localStorage.getItem(KEY) === "true");
});
