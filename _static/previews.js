// A reference to a statement, an equation or a figure shows what it refers to: to a pointer that
// rests on it, to a keyboard that reaches it, to a finger at the first tap; the second tap follows
// it. What can be shown, by its anchor, is in preview-data.js, as pages from disk may not fetch;
// where it is shown, in boxes.css. Without scripts a reference is a link.
document.addEventListener("DOMContentLoaded", () => {
  const article = document.querySelector(".bd-article");
  const REST = 250; // milliseconds for which a pointer has to rest, or may be away
  const root = document.documentElement.dataset.content_root;
  const make = (name, about) =>
    document.body.appendChild(Object.assign(document.createElement(name), about));
  const box = make("div", { className: "preview", id: "preview", role: "tooltip", hidden: true });
  make("script", { src: `${root}_static/preview-data.js` });
  let shown = null; // the link whose preview is open
  let timer = 0;
  let touched = false; // whether the last pointer was a finger

  const preview = (link) => window.previews?.[decodeURIComponent(link.hash.slice(1))];
  const linkAt = (target) => {
    const link = target.closest?.("a[href*='#']:not(.headerlink)");
    return link && article?.contains(link) && preview(link) ? link : null;
  };
  const hide = () => {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    shown?.style.removeProperty("anchor-name");
    shown = null;
    box.hidden = true;
  };
  const show = (link) => {
    clearTimeout(timer);
    if (shown === link) return;
    hide();
    shown = link;
    box.innerHTML = preview(link);
    for (const picture of box.querySelectorAll("img[data-src]")) {
      picture.src = root + picture.dataset.src;
    }
    box.hidden = false;
    box.scrollTop = 0;
    link.setAttribute("aria-describedby", box.id);
    link.style.setProperty("anchor-name", "--previewed");
    window.MathJax?.startup?.promise.then(() => window.MathJax.typesetPromise([box]));
  };
  const soon = (action) => {
    clearTimeout(timer);
    timer = setTimeout(action, REST);
  };

  document.addEventListener("pointerover", ({ pointerType, target }) => {
    touched = pointerType === "touch";
    const link = linkAt(target);
    if (touched) return;
    if (link) soon(() => show(link));
    else if (box.contains(target)) clearTimeout(timer);
    else soon(hide);
  });
  document.addEventListener("focusin", ({ target }) => {
    const link = linkAt(target);
    if (link?.matches(":focus-visible") && !touched) show(link);
  });
  document.addEventListener("focusout", () => soon(hide));
  document.addEventListener("keydown", ({ key }) => {
    touched = false;
    if (key === "Escape") hide();
  });
  document.addEventListener("click", (event) => {
    const link = linkAt(event.target);
    if (link && touched && shown !== link) {
      event.preventDefault();
      show(link);
    } else if (!box.contains(event.target)) hide();
  });
});
