// Puts a slider above pictures, of which one is seen. Its value is that of a picture.
(() => {
  const root = document.currentScript.closest(".touch");
  const pictures = [...root.querySelectorAll("img")];
  const make = (name, attributes, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const shown = make("b", { "aria-hidden": "true" });
  const state = make("p", { class: "touch-state", "aria-live": "polite" });
  const input = make("input", {
    type: "range",
    min: 0,
    max: pictures.length - 1,
    value: pictures.findIndex((picture) => !picture.hidden),
  });
  const values = pictures.map((picture) => make("span", {}, picture.dataset.value));
  const ticks = make("span", { class: "touch-ticks", "aria-hidden": "true" }, ...values);
  const show = () => {
    pictures.forEach((picture, place) => { picture.hidden = place !== Number(input.value); });
    const picture = pictures[Number(input.value)];
    shown.textContent = picture.dataset.value;
    input.setAttribute("aria-valuetext", picture.dataset.value);
    state.textContent = picture.alt;
  };
  input.addEventListener("input", show);
  show();
  root.querySelector("style").after(make("label", {}, `${root.dataset.label}: `, shown, input, ticks), state);
})();
