// A box that is wider than its place scrolls: a keyboard can reach it, it has a name, and book.css
// lets what goes on behind its edge fade. Equations shrink first, as far as they can be read.
document.addEventListener("DOMContentLoaded", async () => {
  const NAMES = {
    "span.math:has(mjx-math)": "", // which no line ends, and which cannot scroll
    "mjx-container[display='true']": "Equation",
    "div.pst-scrollable-table-container": "Table",
    "div.output, div.output pre": "Output",
    "pre:not(div.output pre)": "Code",
  };
  const fade = (box) => {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more-right", rest > 1);
  };
  // Measured all together, so that the page is laid out once.
  const fit = (boxes) => {
    const formulas = boxes.filter((box) => box.matches("span.math, mjx-container"));
    const style = (box) => box.querySelector("mjx-math").style;
    for (const box of formulas) style(box).zoom = "";
    const width = (part) => part.getBoundingClientRect().width;
    const parts = formulas.map((box) => width(box) / width(box.querySelector("mjx-math")));
    formulas.forEach((box, i) => {
      if (parts[i] < 0.997) style(box).zoom = Math.max(0.6, 0.99 * parts[i]);
    });
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
    const sizes = new ResizeObserver((entries) => {
      const boxes = entries.map(({ target }) => target);
      fit(boxes);
      if (name) for (const box of boxes) mark(box, name);
    });
    for (const box of document.querySelectorAll(`.bd-article :is(${selector})`)) {
      box.addEventListener("scroll", () => fade(box), { passive: true });
      sizes.observe(box);
    }
  }
});
