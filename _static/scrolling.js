// A box that is wider than its place scrolls: a keyboard can reach it, it has a name, and book.css
// lets what goes on behind its edge fade.
document.addEventListener("DOMContentLoaded", async () => {
  const NAMES = {
    "mjx-container[display='true']": "Equation",
    "div.pst-scrollable-table-container": "Table",
    "div.output, div.output pre": "Output",
    "pre:not(div.output pre)": "Code",
  };

  const fade = (box) => {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more-right", rest > 1);
  };

  const mark = (box, name) => {
    const scrolls = box.scrollWidth > box.clientWidth; // by a pixel, too, as axe counts
    if (scrolls !== box.classList.contains("scrolls")) {
      box.classList.toggle("scrolls", scrolls);
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      box.role = scrolls ? "group" : null;
      box.ariaLabel = scrolls ? `${name}, scrolls sideways` : null;
    }
    fade(box);
  };

  await window.MathJax?.startup?.promise;
  for (const [selector, name] of Object.entries(NAMES)) {
    // Folded code gets its size when it is opened, everything another when a phone is turned.
    const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => mark(target, name)));
    for (const box of document.querySelectorAll(`.bd-article :is(${selector})`)) {
      box.addEventListener("scroll", () => fade(box), { passive: true });
      sizes.observe(box);
    }
  }
});
