// The theme opens a notebook's source in a new tab, where a page read from disk shows raw JSON.
document.addEventListener("DOMContentLoaded", () => {
  for (const link of document.querySelectorAll("a.btn-download-source-button")) {
    link.setAttribute("download", "");
  }
});
