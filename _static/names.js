// For who listens to a page. Folded cells are all announced under one name, which is not the text
// that they show, as are two buttons of the theme; parameters in lines of their own are a list of
// definitions that define nothing; the bibliography is a list without items; and what unfolds a
// part of the contents has a picture for a name.
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector) => document.querySelectorAll(selector);
  for (const named of all("summary[aria-label='Toggle hidden content'], .search-button-field"))
    named.removeAttribute("aria-label");
  for (const button of all(".theme-switch-button"))
    button.ariaLabel = "Color mode: Light, Dark, System Settings";
  for (const list of all("dt.sig > dl")) list.role = "list";
  for (const item of all("dt.sig > dl > dd, [role='doc-biblioentry']")) item.role = "listitem";
  for (const mark of all("li > details > summary"))
    mark.ariaLabel = `Pages of ${mark.closest("li").querySelector("a").textContent}`;
});
