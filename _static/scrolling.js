// A box that is wider than its place scrolls: a keyboard can reach it, it has a name, and book.css
// lets what goes on behind an edge fade there.
document.addEventListener("DOMContentLoaded", async () => {
  const NAMES = {
    "mjx-container[display='true']": "Equation",
    "div.pst-scrollable-table-container": "Table",
    "div.output": "Output",
    "div.output pre": "Output",
    pre: "Code",
  };
  const boxes = Object.keys(NAMES).map((selector) => `.bd-article ${selector}`).join();

  const edges = (box) => {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", rest > 1);
  };

  const mark = (box) => {
    const scrolls = box.scrollWidth > box.clientWidth; // by a pixel, too, as axe counts
    box.classList.toggle("scrolls", scrolls);
    if (scrolls) {
      const selector = Object.keys(NAMES).find((one) => box.matches(one));
      box.tabIndex = 0;
      box.role = "group";
      box.ariaLabel = `${NAMES[selector]}, scrolls sideways`;
    } else if (box.role === "group") {
      box.removeAttribute("tabindex");
      box.removeAttribute("role");
      box.removeAttribute("aria-label");
    }
    edges(box);
  };

  await window.MathJax?.startup?.promise;
  // Folded code gets its size when it is opened, everything another when a phone is turned.
  const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => mark(target)));
  for (const box of document.querySelectorAll(boxes)) {
    box.addEventListener("scroll", () => edges(box), { passive: true });
    sizes.observe(box);
  }
});
