// The download button saves a file. Of a page read from disk a browser would show it instead; its
// text is in a script beside it (_ext/offline.py), which calls `save`.
const save = (name, text) => {
  const link = document.createElement("a");
  link.download = name;
  link.href = URL.createObjectURL(new Blob([text]));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a.btn-download-source-button");
  if (!link) return;
  event.preventDefault();
  const script = document.createElement("script");
  script.src = `${link.href}.js`;
  script.onload = () => script.remove();
  script.onerror = () => location.assign(link.href);
  document.head.append(script);
});
